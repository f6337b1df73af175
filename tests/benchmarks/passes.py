"""How long things take that run over pairs, relative to running every text once, plainly.

    python tests/benchmarks/passes.py --pairs hh_harmless_test.jsonl.gz --n 150 --runs 5

A plain run (= 1) is transformers' own model without the vocabulary projection, over batches of texts of similar
length, under `no_grad`. Beside it, each on the same texts, tokenising included: this library's passes, TransformerLens'
`run_with_cache`, captum's layer gradient x activation, and the procedure of arXiv 2606.13209 (everything padded to
1,024 tokens, 32 texts a batch, a hook on every activation function), which runs on `--n-slow` of the pairs.

Models have random weights: GPT-2- and Llama-shaped, 6 layers, width 384. Every run of a candidate stands next to a
plain run; a ratio is of these two. The table has the median of the ratios, the smallest and the largest, and tokens
a second. On a GPU (`--device cuda`) it has also the share of the rate that a large matrix product reaches there.
"""

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import captum.attr
import torch
import transformers

from rmtension import ActivationCollector, NeuronAttribution, PreferencePairs, RewardHead
from rmtension.encoding import encode_pairs
from rmtension.tokens import text_batches
from rmtension.training import train_tokenizer

SHAPES = {
    "gpt2": lambda n: transformers.GPT2Config(
        vocab_size=n, n_positions=1024, n_embd=384, n_layer=6, n_head=6, num_labels=1, pad_token_id=1
    ),
    "llama": lambda n: transformers.LlamaConfig(
        vocab_size=n,
        hidden_size=384,
        intermediate_size=1024,
        num_hidden_layers=6,
        num_attention_heads=6,
        max_position_embeddings=1024,
        num_labels=1,
        pad_token_id=1,
    ),
}


def open_head(shape: str, tokenizer, device: str, dtype: torch.dtype) -> RewardHead:
    config = SHAPES[shape](len(tokenizer))
    config.bos_token_id = config.eos_token_id = 0
    with tempfile.TemporaryDirectory() as folder:
        transformers.AutoModelForSequenceClassification.from_config(config).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        return RewardHead.from_pretrained(folder, device=device, dtype=dtype)


def single_texts(head: RewardHead, pairs: PreferencePairs):
    """All texts in buckets of similar length, one a row."""
    encoded = head.encode(pairs)
    return text_batches(
        [*encoded.chosen, *encoded.rejected],
        tokens_per_batch=head.tokens_together(),
        pad_token_id=head.pad_token_id,
        device=head.device,
    )


def plain(head: RewardHead, pairs: PreferencePairs) -> None:
    with torch.no_grad():
        for batch in single_texts(head, pairs):
            head.body.plain(input_ids=batch.input_ids, use_cache=False)


def run_with_cache(head: RewardHead, pairs: PreferencePairs) -> None:
    """Mean activation of every MLP neuron with TransformerLens, the unembedding left out by stopping before it."""
    sums = [0.0] * head.n_layers
    names = [f"blocks.{layer}.mlp.hook_post" for layer in range(head.n_layers)]
    with torch.no_grad():
        for batch in single_texts(head, pairs):
            _, cache = head.model.run_with_cache(
                batch.input_ids, names_filter=lambda name: name in names, stop_at_layer=head.n_layers, return_type=None
            )
            for layer, name in enumerate(names):
                sums[layer] += (cache[name] * batch.mask[..., None]).sum((0, 1))


def captum_gradient(head: RewardHead, pairs: PreferencePairs) -> None:
    """Gradient x activation of every MLP neuron with captum, in batches of single texts."""
    layers = [head.body.plain.get_submodule(head.body.projection_names["mlp", one]) for one in range(head.n_layers)]
    for batch in single_texts(head, pairs):
        method = captum.attr.LayerGradientXActivation(lambda ids, batch=batch: reward(head, ids, batch), layers)
        found = method.attribute(batch.input_ids, attribute_to_layer_input=True)
        _ = [one.detach().sum(1) for one in found]


def reward(head: RewardHead, ids: torch.Tensor, batch) -> torch.Tensor:
    return head.read(batch.at_last(head.body.plain(input_ids=ids, use_cache=False)[0]))


def papers_procedure(head: RewardHead, pairs: PreferencePairs) -> None:
    """Everything padded to 1,024 tokens, 32 texts a batch in the order of the data, sums by hooks."""
    encoded = encode_pairs(head.tokenizer, pairs, max_length=1024)
    texts = [text.ids for one in zip(encoded.chosen, encoded.rejected, strict=True) for text in one]
    layers = [head.body.plain.get_submodule(head.body.projection_names["mlp", one]) for one in range(head.n_layers)]
    sums = {}
    handles = []
    for layer in layers:

        def keep(module, inputs):
            sums[module] = sums.get(module, 0.0) + inputs[0].reshape(-1, inputs[0].shape[-1]).sum(0)

        handles.append(layer.register_forward_pre_hook(keep))
    try:
        with torch.no_grad():
            for start in range(0, len(texts), 32):
                some = texts[start : start + 32]
                ids = torch.zeros(len(some), 1024, dtype=torch.long)
                mask = torch.zeros_like(ids)
                for row, one in enumerate(some):
                    ids[row, : len(one)], mask[row, : len(one)] = torch.tensor(one), 1
                ids, mask = ids.to(head.device), mask.to(head.device)
                head.body.plain(input_ids=ids, attention_mask=mask, use_cache=False)
    finally:
        for handle in handles:
            handle.remove()


CANDIDATES: dict[str, Callable[[RewardHead, PreferencePairs], object]] = {
    "score_pairs": lambda head, pairs: head.score_pairs(pairs),
    "collect mean, abs_mean, rms, frequency, all MLP neurons": lambda head, pairs: ActivationCollector(head).collect(
        pairs
    ),
    "gradient_x_activation, all MLP neurons": lambda head, pairs: NeuronAttribution(
        head, method="gradient_x_activation"
    ).score(pairs),
    "TransformerLens run_with_cache, mean of all MLP neurons": run_with_cache,
    "captum LayerGradientXActivation, all MLP neurons": captum_gradient,
}


def seconds(head: RewardHead, run: Callable, pairs: PreferencePairs) -> float:
    start = time.perf_counter()
    run(head, pairs)
    if head.device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def compare(head: RewardHead, run: Callable, pairs: PreferencePairs, runs: int) -> tuple[list[float], float]:
    """Ratios to the plain run before each run, and tokens a second."""
    ratios, times = [], []
    for _ in range(runs):
        base = seconds(head, plain, pairs)
        times.append(seconds(head, run, pairs))
        ratios.append(times[-1] / base)
    return ratios, head.encode(pairs).n_tokens / statistics.median(times)


def matrix_product_rate(device: str, dtype: torch.dtype) -> float:
    """Floating-point operations a second of a large product."""
    a = torch.randn(8192, 8192, device=device, dtype=dtype)
    a @ a
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(10):
        a @ a
    torch.cuda.synchronize()
    return 10 * 2 * 8192**3 / (time.perf_counter() - start)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=Path, required=True)
    parser.add_argument("--n", type=int, default=150)
    parser.add_argument("--n-slow", type=int, default=16)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--shapes", nargs="+", default=list(SHAPES))
    options = parser.parse_args()
    dtype = getattr(torch, options.dtype)
    everything = PreferencePairs.from_jsonl(options.pairs, on_invalid="skip")
    pairs = everything.sample(options.n, seed=0)
    tokenizer = train_tokenizer([pair.text("chosen") for pair in everything], 8192, max_length=1024)
    ceiling = matrix_product_rate(options.device, dtype) if options.device != "cpu" else None
    print(f"torch {torch.__version__}, transformers {transformers.__version__}, {torch.get_num_threads()} threads")
    for shape in options.shapes:
        head = open_head(shape, tokenizer, options.device, dtype)
        tokens = head.encode(pairs).n_tokens
        n_parameters = (
            sum(p.numel() for p in head.body.plain.layers.parameters())
            if shape == "llama"
            else sum(p.numel() for p in head.body.plain.h.parameters())
        )
        print(f"\n{shape}: {len(pairs)} pairs, {tokens / 2 / len(pairs):.0f} tokens a text\n")
        print("| what runs | time, plain run = 1 | smallest to largest of runs | tokens a second |")
        print("|---|---|---|---|")
        plain(head, pairs[:32])
        cases = [(name, run, pairs, options.runs) for name, run in CANDIDATES.items()]
        cases.append(("the paper's procedure", papers_procedure, pairs[: options.n_slow], options.runs))
        for name, run, some, runs in [("plain, again", plain, pairs, options.runs), *cases]:
            ratios, rate = compare(head, run, some, runs)
            share = f", {2 * n_parameters * rate / ceiling:.1%} of the product's" if ceiling else ""
            print(
                f"| {name} | {statistics.median(ratios):.2f} | {min(ratios):.2f} to {max(ratios):.2f} | "
                f"{rate:,.0f}{share} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
