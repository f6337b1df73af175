"""How long a pass takes with each kind of head, relative to the linear head.

    python tests/programs/benchmarks/heads.py --runs 7

One Llama-shaped body with random weights (4 layers, width 256 unless `--layers` and `--width` set other sizes) and 96
pairs with prompts of 40 words and responses of 10 to 60; language models have 32,000 tokens. Every head runs once in
every round, in an order that is drawn for each round, and is compared with the linear head of that round: scoring, and
gradient x activation. The linear head also runs a second time under another name; its ratio shows the noise. The tables
have the median of the ratios, the smallest and the largest.
"""

import argparse
import os
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
sys.path.insert(0, str(Path(__file__).parents[2] / "helpers"))

import torch
import transformers
from replicas import WORDS, Replica, make_tokenizer

from rmtension import NeuronAttribution, PreferencePairs, RewardHead
from rmtension.heads import LinearHead, LogRatioHead, ProcessHead
from rmtension.heads._computed_heads import MeanHead, PromptWeightedHead, WeightedHead, Weights
from rmtension.heads._head import Head
from rmtension.heads._layers import Layers
from rmtension.heads._unembedding import CappedLogits

HEADER = [3, 4, 5]  # w0 w1 w2
# Entries of the unembedding of the language models.
VOCABULARY = 32_000
REPLICA = Replica("", "", lambda *_: torch.zeros(1), lambda draw: {})


def heads(width: int) -> dict[str, Head]:
    """The heads by kind, with the published sizes in relation to the width where they have one."""
    draw = torch.Generator().manual_seed(0)

    def layers(*sizes: int) -> Layers:
        shapes = zip(sizes[1:], sizes[:-1], strict=True)
        return Layers({f"{2 * n}.weight": torch.randn(*shape, generator=draw) / 16 for n, shape in enumerate(shapes)})

    row = torch.randn(width, generator=draw)
    objectives = [str(number) for number in range(19)]
    gate = Weights(layers(width, width // 4, width // 4, width // 4, 19), temperature=10.0)
    return {
        "linear": LinearHead(row),
        "linear, again": LinearHead(row.clone()),
        "three outputs, one read": LinearHead(torch.randn(3, width, generator=draw)),
        "MLP, 1024 (GRM)": _single(layers(width, 1024, 1)),
        "MLP, width (INF-ORM)": _single(layers(width, width, 1)),
        "19 objectives, gated by the prompt (ArmoRM)": PromptWeightedHead(layers(width, 19), gate, objectives, HEADER),
        "5 attributes with learned weights (URM)": WeightedHead(
            layers(width, 5), Weights(layers(width, width, width, 5)), objectives[:5]
        ),
        "mean over tokens": MeanHead(LinearHead(row)),
        "capped logits of two tokens": CappedLogits(LinearHead(torch.randn(2, width, generator=draw)), 30.0),
    }


def _single(layers: Layers) -> Head:
    from rmtension.heads._computed_heads import LayeredHead

    return LayeredHead(layers, ("reward",))


def make_pairs(n: int) -> PreferencePairs:
    draw = random.Random(0)

    def words(length: int) -> str:
        return " ".join(draw.choices(WORDS[3:], k=length))

    rows = [
        {
            "prompt": f"{words(40)} w0 w1 w2",
            "chosen": f" {words(draw.randint(10, 60))} w3",
            "rejected": f" {words(draw.randint(10, 60))} w3",
        }
        for _ in range(n)
    ]
    return PreferencePairs.from_records(rows)


def seconds(head: RewardHead, pairs: PreferencePairs) -> dict[str, float]:
    """The time of each pass."""
    taken = {}
    # On the CPU, the time of this process, because other processes may share its core.
    clock = time.process_time if head.device.type == "cpu" else time.perf_counter
    start = clock()
    head.score_pairs(pairs)
    taken["score"] = clock() - start
    start = clock()
    NeuronAttribution(head, "gradient_x_activation").score(pairs)
    taken["gradient x activation"] = clock() - start
    return taken


def show(ratios: Mapping[str, list[dict[str, float]]]) -> None:
    names = list(next(iter(ratios.values()))[0])
    print(f"| head | {' | '.join(names)} |\n|---|{'---|' * len(names)}")
    for kind, rounds in ratios.items():
        cells = []
        for name in names:
            values = [row[name] for row in rounds]
            cells.append(f"{statistics.median(values):.2f} ({min(values):.2f} to {max(values):.2f})")
        print(f"| {kind} | {' | '.join(cells)} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--n", type=int, default=96)
    parser.add_argument("--runs", type=int, default=7)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    torch.set_num_threads(1)
    transformers.utils.logging.set_verbosity_error()
    pairs = make_pairs(options.n)
    with tempfile.TemporaryDirectory() as folder:
        config = transformers.LlamaConfig(
            vocab_size=300,
            hidden_size=options.width,
            intermediate_size=8 * options.width // 3,
            num_hidden_layers=options.layers,
            num_attention_heads=options.width // 64,
            max_position_embeddings=512,
        )
        torch.manual_seed(0)
        transformers.LlamaModel(config).save_pretrained(folder)
        make_tokenizer(REPLICA).save_pretrained(folder)
        opened = {
            kind: RewardHead.from_pretrained(folder, head=head, output=0, device=options.device)
            for kind, head in heads(options.width).items()
        }
        step = torch.randn(2, options.width, generator=torch.Generator().manual_seed(1))
        opened["steps at a marker (process rewards)"] = RewardHead.from_pretrained(
            folder, head=ProcessHead("w3", step=(step, 0.0)), output="min", device=options.device
        )
        config.vocab_size = VOCABULARY
        for name in ("policy", "reference"):
            transformers.LlamaForCausalLM(config).save_pretrained(f"{folder}/{name}")
            make_tokenizer(REPLICA).save_pretrained(f"{folder}/{name}")
        for kind, head in {
            "log-likelihood of the response": LogRatioHead(),
            "log-ratio with a reference of the same size (DPO)": LogRatioHead(f"{folder}/reference"),
        }.items():
            opened[kind] = RewardHead.from_pretrained(f"{folder}/policy", head=head, device=options.device)
    for head in opened.values():
        seconds(head, pairs)  # warm up
    ratios: dict[str, list[dict[str, float]]] = {kind: [] for kind in opened}
    draw = random.Random(0)
    for _ in range(options.runs):
        order = draw.sample(list(opened), len(opened))
        taken = {kind: seconds(opened[kind], pairs) for kind in order}
        for kind, row in taken.items():
            ratios[kind].append({name: value / taken["linear"][name] for name, value in row.items()})
    linear = taken["linear"]
    print(
        f"{options.n} pairs, {options.runs} rounds; the linear head takes {linear['score']:.2f} s to score. Ratios:\n"
    )
    show(ratios)


if __name__ == "__main__":
    main()
