"""What the time of a pass is spent on, in shares of a plain run, and how many tokens run.

    python tests/programs/benchmarks/where_time_goes.py --pairs hh_harmless_test.jsonl.gz --n 96 --runs 3

A plain run (= 1) is that of `passes.py`: every text once, without the vocabulary projection. PyTorch's profiler gives
the seconds of each operation without those that it calls. "tokens" is the number of token positions that run, with
padding, in plain runs: a pass that takes as long per token as a plain run takes this share of its time. "time" is the
share that it does take under the profiler, and the columns after it add up to it. "the rest" is what the process does
outside of PyTorch's operations, such as Python and tokenising. Medians over the rounds.
"""

import argparse
import os
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pandas as pd
from passes import OURS, SHAPES, evenly_long, open_folder, open_head, plain
from torch.profiler import ProfilerActivity, profile, record_function

from rmtension import PreferencePairs, RewardHead
from rmtension.training._train_tokenizer import train_tokenizer

PASS = "the whole pass"
# Beginnings of the names of operations, by kind.
KINDS = {
    "products": ("aten::addmm", "aten::mm", "aten::mkldnn", "mkldnn::"),
    "attention": ("aten::bmm", "aten::baddbmm", "aten::_scaled_dot_product", "aten::_softmax"),
    "activations": ("aten::gelu", "aten::tanh", "aten::pow", "aten::silu", "aten::mul", "aten::add", "aten::sigmoid"),
    "norms": ("aten::native_layer_norm", "aten::rsqrt", "aten::mean"),
    "copies": ("aten::copy_", "aten::cat", "aten::index", "aten::gather", "aten::fill_", "aten::masked_fill"),
}


def kind_of(operation: str) -> str:
    return next((kind for kind, starts in KINDS.items() if operation.startswith(starts)), "other operations")


def spent(head: RewardHead, run: Callable, pairs: PreferencePairs) -> dict[str, float]:
    """Token positions that ran, seconds in all, and seconds by kind of operation."""
    vocabulary = head.body.native.get_input_embeddings().weight.shape[0]
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as profiled, record_function(PASS):
        run(head, pairs)
    found = dict.fromkeys(["tokens", "time", *KINDS, "other operations", "the rest"], 0.0)
    for event in profiled.key_averages(group_by_input_shape=True):
        seconds = event.self_cpu_time_total / 1e6
        if event.key == PASS:
            found["time"], found["the rest"] = event.cpu_time_total / 1e6, seconds
            continue
        found[kind_of(event.key)] += seconds
        if event.key == "aten::embedding" and event.input_shapes[0][0] == vocabulary:
            rows, columns = event.input_shapes[1]
            found["tokens"] += rows * columns * event.count
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=Path, required=True)
    parser.add_argument("--n", type=int, default=96, help="how many pairs, evenly spread over all lengths")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--shapes", nargs="+", default=list(SHAPES))
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--width", type=int, default=384)
    parser.add_argument("--model", help="a folder of a reward model, in place of the shapes")
    options = parser.parse_args()
    options.device, options.dtype = "cpu", "float32"  # of `open_head` and `open_folder`
    everything = PreferencePairs.from_jsonl(options.pairs, on_invalid="skip")
    tokenizer = train_tokenizer([pair.text("chosen") for pair in everything], 8192, max_length=1024)
    for shape in [options.model] if options.model else options.shapes:
        head = open_head(shape, tokenizer, options) if shape in SHAPES else open_folder(shape, options)
        pairs = evenly_long(head, everything, options.n)
        plain(head, pairs)
        rows = []
        for _ in range(options.runs):
            base = spent(head, plain, pairs)
            for name, run in {"plain": plain, **OURS}.items():
                found = base if name == "plain" else spent(head, run, pairs)
                shares = {key: value / base["tokens" if key == "tokens" else "time"] for key, value in found.items()}
                rows.append({"what runs": name, **shares})
        table = pd.DataFrame(rows).groupby("what runs", sort=False).median().round(2)
        print(f"\n{shape}: {len(pairs)} pairs, {head.encode(pairs).n_tokens / 2 / len(pairs):.0f} tokens per text\n")
        print(table.to_string(), flush=True)


if __name__ == "__main__":
    main()
