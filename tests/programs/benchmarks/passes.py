"""How long passes over pairs take, relative to a plain run of every text.

    python tests/programs/benchmarks/passes.py --pairs hh_harmless_test.jsonl.gz --n 200 --n-slow 48 --runs 5
    python tests/programs/benchmarks/passes.py --pairs hh_harmless_test.jsonl.gz --n 0 --share-out --n-slow 48 --runs 5

A plain run (= 1) is transformers' own model without the vocabulary projection, over batches of texts of similar
length, under `no_grad`. The program measures, on the same texts and with tokenising: this library's passes over all
pairs; on `--n-slow` of them, evenly spread over all lengths, also TransformerLens' `run_with_cache`, captum's layer
gradient x activation, and the procedure of arXiv 2606.13209 (all texts padded to 1,024 tokens, 32 texts per batch, a
hook on every activation function); then ablations one by one and as a sweep, and best-of-four.

Models have random weights: GPT-2- and Llama-shaped, 6 layers, width 384 unless `--layers` and `--width` set other
sizes. Each candidate runs once in every round, and is compared with the plain run of that round. With `--share-out`,
every round has its own part of all pairs. The tables have the median of the ratios, the smallest and the largest, and
tokens per second. On a GPU (`--device cuda`) they also have the share of the rate that a large matrix product reaches.
"""

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import captum.attr
import torch
import transformers

from rmtension import AblationContext, ActivationCollector, NeuronAttribution, NeuronSet, PreferencePairs, RewardHead
from rmtension.data._encoding import encode_pairs
from rmtension.data._length_buckets import text_batches
from rmtension.interventions._sweep import score_without
from rmtension.training._train_tokenizer import train_tokenizer

SHAPES = {
    "gpt2": lambda n, layers, width: transformers.GPT2Config(
        vocab_size=n,
        n_positions=1024,
        n_embd=width,
        n_layer=layers,
        n_head=width // 64,
        num_labels=1,
        pad_token_id=1,
    ),
    "llama": lambda n, layers, width: transformers.LlamaConfig(
        vocab_size=n,
        hidden_size=width,
        intermediate_size=8 * width // 3,
        num_hidden_layers=layers,
        num_attention_heads=width // 64,
        max_position_embeddings=1024,
        num_labels=1,
        pad_token_id=1,
    ),
}


def open_head(shape: str, tokenizer, options: argparse.Namespace) -> RewardHead:
    config = SHAPES[shape](len(tokenizer), options.layers, options.width)
    config.bos_token_id = config.eos_token_id = 0
    dtype = getattr(torch, options.dtype)
    if options.device != "cpu":  # drawn on the device: a large model takes minutes to write
        with torch.device(options.device):
            model = transformers.AutoModelForSequenceClassification.from_config(config, dtype=dtype)
        return RewardHead.from_classifier(model, tokenizer=tokenizer)
    with tempfile.TemporaryDirectory() as folder:
        transformers.AutoModelForSequenceClassification.from_config(config).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        return RewardHead.from_pretrained(folder, device=options.device, dtype=dtype)


def open_folder(folder: str, options: argparse.Namespace) -> RewardHead:
    return RewardHead.from_pretrained(
        folder, device=options.device, dtype=getattr(torch, options.dtype), max_length=1024
    )


def single_texts(head: RewardHead, pairs: PreferencePairs):
    """All texts in batches of similar length, one text per row."""
    encoded = head.encode(pairs)
    return text_batches(
        [*encoded.chosen, *encoded.rejected],
        tokens_per_batch=head.tokens_together(),
        read_at=head.read_at,
        device=head.device,
    )


def plain(head: RewardHead, pairs: PreferencePairs) -> None:
    with torch.no_grad():
        for batch in single_texts(head, pairs):
            head.body.native(input_ids=batch.input_ids, use_cache=False)


def run_with_cache(head: RewardHead, pairs: PreferencePairs) -> None:
    """Mean activation of every MLP neuron with TransformerLens, which stops before the unembedding."""
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
    names = [head.body.projection_names["mlp", layer] for layer in range(head.n_layers)]
    layers = [head.body.native.get_submodule(name) for name in names]
    for batch in single_texts(head, pairs):
        method = captum.attr.LayerGradientXActivation(lambda ids, batch=batch: reward(head, ids, batch), layers)
        by_layer = method.attribute(batch.input_ids, attribute_to_layer_input=True)
        _ = [values.detach().sum(1) for values in by_layer]


def reward(head: RewardHead, ids: torch.Tensor, batch) -> torch.Tensor:
    return head.read(batch.gather_last(head.body.native(input_ids=ids, use_cache=False)[0]))


def papers_procedure(head: RewardHead, pairs: PreferencePairs) -> None:
    """All texts padded to 1,024 tokens, 32 texts per batch in the order of the data, sums by hooks."""
    encoded = encode_pairs(head.tokenizer, pairs, max_length=1024)
    texts = [text.ids for pair in zip(encoded.chosen, encoded.rejected, strict=True) for text in pair]
    names = [head.body.projection_names["mlp", layer] for layer in range(head.n_layers)]
    layers = [head.body.native.get_submodule(name) for name in names]
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
                for row, text in enumerate(some):
                    ids[row, : len(text)], mask[row, : len(text)] = torch.tensor(text), 1
                ids, mask = ids.to(head.device), mask.to(head.device)
                head.body.native(input_ids=ids, attention_mask=mask, use_cache=False)
    finally:
        for handle in handles:
            handle.remove()


OURS: dict[str, Callable[[RewardHead, PreferencePairs], object]] = {
    "plain, again": plain,
    "score_pairs": lambda head, pairs: head.score_pairs(pairs),
    "collect mean, abs_mean, rms, frequency, all MLP neurons": lambda head, pairs: ActivationCollector(head).collect(
        pairs
    ),
    "gradient_x_activation, all MLP neurons": lambda head, pairs: NeuronAttribution(
        head, method="gradient_x_activation"
    ).score(pairs),
    "the same at response tokens": lambda head, pairs: NeuronAttribution(
        head, method="gradient_x_activation", positions="response"
    ).score(pairs),
}
PAPER = "the paper's procedure"
COLLECT = "collect mean, abs_mean, rms, frequency, all MLP neurons"
SLOW: dict[str, Callable[[RewardHead, PreferencePairs], object]] = {
    COLLECT: OURS[COLLECT],
    "TransformerLens run_with_cache, mean of all MLP neurons": run_with_cache,
    "captum LayerGradientXActivation, all MLP neurons": captum_gradient,
    PAPER: papers_procedure,
}


def seconds(head: RewardHead, run: Callable, pairs: PreferencePairs) -> float:
    start = time.perf_counter()
    run(head, pairs)
    if head.device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def compare(
    head: RewardHead, cases: dict[str, Callable], rounds: list[PreferencePairs], base: Callable = plain
) -> dict[str, tuple[list[float], float]]:
    """For every case: its ratios to the base run of the same round, and tokens per second."""
    times: dict[str, list[float]] = {name: [] for name in cases}
    bases = []
    for pairs in rounds:
        bases.append(seconds(head, base, pairs))
        for name, run in cases.items():
            times[name].append(seconds(head, run, pairs))
    n_tokens = statistics.mean(head.encode(pairs).n_tokens for pairs in rounds)
    return {
        name: ([time / base for time, base in zip(some, bases, strict=True)], n_tokens / statistics.median(some))
        for name, some in times.items()
    }


def by_length(head: RewardHead, pairs: PreferencePairs) -> list[int]:
    """Indices of the pairs, from the shortest to the longest."""
    encoded = head.encode(pairs)
    both = zip(encoded.chosen, encoded.rejected, strict=True)
    lengths = [len(chosen) + len(rejected) for chosen, rejected in both]
    return sorted(range(len(pairs)), key=lengths.__getitem__)


def evenly_long(head: RewardHead, pairs: PreferencePairs, n: int) -> PreferencePairs:
    """`n` pairs at even ranks of length, because the cost of padding depends on the lengths."""
    order = by_length(head, pairs)
    return PreferencePairs(pairs[order[(2 * rank + 1) * len(order) // (2 * n)]] for rank in range(n))


def shared_out(head: RewardHead, pairs: PreferencePairs, n: int) -> list[PreferencePairs]:
    """The pairs in `n` parts; each part has every n-th pair by length."""
    order = by_length(head, pairs)
    return [PreferencePairs(pairs[index] for index in order[start::n]) for start in range(n)]


def sets_of_a_tenth(head: RewardHead, n: int) -> list[NeuronSet]:
    """Random tenths of the MLP neurons, all layers."""
    shape, rng = (head.n_layers, head.n_neurons("mlp")), torch.Generator().manual_seed(0)
    return [NeuronSet(torch.rand(shape, generator=rng) < 0.1, "mlp", head.architecture) for _ in range(n)]


def ablate_one_by_one(head: RewardHead, pairs: PreferencePairs) -> None:
    for neurons in sets_of_a_tenth(head, 9):
        with AblationContext(head, neurons):
            head.score_pairs(pairs)


def best_of_four(pairs: PreferencePairs) -> PreferencePairs:
    """Every prompt with its own two responses and the two of the next pair: three pairs per item."""
    made = []
    for number, pair in enumerate(pairs):
        other = pairs[(number + 1) % len(pairs)]
        for rejected in (pair.rejected, other.chosen, other.rejected):
            made.append(replace(pair, rejected=rejected, item=pair.id, id=""))
    return PreferencePairs(made)


def plain_of_distinct(head: RewardHead, pairs: PreferencePairs) -> None:
    encoded = head.encode(pairs)
    texts = list(dict.fromkeys([*encoded.chosen, *encoded.rejected]))
    batches = text_batches(texts, tokens_per_batch=head.tokens_together(), read_at=head.read_at, device=head.device)
    with torch.no_grad():
        for batch in batches:
            head.body.native(input_ids=batch.input_ids, use_cache=False)


def matrix_product_rate(device: str, dtype: torch.dtype) -> float:
    """Floating-point operations per second of a large product."""
    a = torch.randn(8192, 8192, device=device, dtype=dtype)
    a @ a
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(10):
        a @ a
    torch.cuda.synchronize()
    return 10 * 2 * 8192**3 / (time.perf_counter() - start)


def print_table(found: dict[str, tuple[list[float], float]], each: int = 1, work: float = 0.0) -> None:
    """Print a table; `work` is the share of a product's rate that one token per second takes."""
    print("| what runs | time, plain run = 1 | smallest to largest of runs | tokens per second |")
    print("|---|---|---|---|")
    for name, (ratios, rate) in found.items():
        low, middle, high = (pick(ratios) / each for pick in (min, statistics.median, max))
        share = f", {work * rate * each:.1%} of a product's" if work else ""
        print(f"| {name} | {middle:.2f} | {low:.2f} to {high:.2f} | {rate * each:,.0f}{share} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=Path, required=True)
    parser.add_argument("--n", type=int, default=200, help="how many pairs; 0 takes all")
    parser.add_argument("--n-slow", type=int, default=48, help="how many pairs for the slow procedures")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--share-out", action="store_true", help="each run of the first table uses its own part of --n")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--width", type=int, default=384, help="of the residual stream; heads have 64 channels")
    parser.add_argument("--shapes", nargs="+", default=list(SHAPES))
    parser.add_argument("--model", help="a folder of a reward model, in place of the shapes")
    parser.add_argument("--passes-only", action="store_true", help="the first table of each model, and no other")
    options = parser.parse_args()
    everything = PreferencePairs.from_jsonl(options.pairs, on_invalid="skip")
    pairs = everything.sample(options.n, seed=0) if options.n else everything
    tokenizer = train_tokenizer([pair.text("chosen") for pair in everything], 8192, max_length=1024)
    ceiling = matrix_product_rate(options.device, getattr(torch, options.dtype)) if options.device != "cpu" else None
    print(f"torch {torch.__version__}, transformers {transformers.__version__}, {torch.get_num_threads()} threads")
    for shape in [options.model] if options.model else options.shapes:
        head = open_head(shape, tokenizer, options) if shape in SHAPES else open_folder(shape, options)
        blocks = [head.body.block(layer) for layer in range(head.n_layers)]
        n_parameters = sum(parameter.numel() for block in blocks for parameter in block.parameters())
        work = 2 * n_parameters / ceiling if ceiling else 0.0
        few = evenly_long(head, pairs, options.n_slow)
        parts = shared_out(head, pairs, options.runs) if options.share_out else [pairs] * options.runs
        for some, rounds, cases in ((pairs, parts, OURS), (few, [few] * options.runs, SLOW)):
            tokens = head.encode(some).n_tokens
            print(f"\n{shape}: {len(some)} pairs, {tokens / 2 / len(some):.0f} tokens per text\n")
            plain(head, few)
            found = compare(head, cases, rounds)
            print_table(found, work=work)
            if options.passes_only:
                break
        if options.passes_only:
            continue
        times = [paper / ours for paper, ours in zip(found[PAPER][0], found[COLLECT][0], strict=True)]
        print(
            f"\ncollecting is {statistics.median(times):.1f} ({min(times):.1f} to {max(times):.1f}) times faster than "
            "the paper's procedure"
        )
        few = evenly_long(head, pairs, options.n_slow // 2)
        sweeps = {
            "ablations of a tenth of the neurons, one by one": ablate_one_by_one,
            "the same by score_without": lambda head, some: score_without(head, some, sets_of_a_tenth(head, 9)),
        }
        print(f"\n{shape}: {len(few)} pairs, each of 9 ablations\n")
        print_table(compare(head, sweeps, [few] * options.runs), each=9)
        items = best_of_four(few)
        print(f"\n{shape}: best of four, {len(few)} items of three pairs, every distinct text once = 1\n")
        scoring = {"score_pairs": OURS["score_pairs"]}
        print_table(compare(head, scoring, [items] * options.runs, plain_of_distinct))


if __name__ == "__main__":
    main()
