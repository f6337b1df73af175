"""How much time bfloat16 saves on this processor, and what it costs in precision.

    python tests/programs/benchmarks/half_precision.py --pairs hh_harmless_test.jsonl.gz --model my-reward-model --n 24

A reward model is opened in float32 and in bfloat16. Each round runs rewards, statistics and gradient x activation once
with each, so that a ratio is of neighbouring runs. The errors are those of rewards and margins, and of the scores of
all MLP neurons: their rank correlation, and the share of the top 10% that both have.
"""

import argparse
import os
import statistics
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from passes import OURS, evenly_long, open_folder, seconds
from scipy import stats

from rmtension import NeuronAttribution, PreferencePairs


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=Path, required=True)
    parser.add_argument(
        "--model", required=True, help="a folder of a reward model with a context of 1,024 tokens or more"
    )
    parser.add_argument("--n", type=int, default=24, help="how many pairs, evenly spread over all lengths")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    everything = PreferencePairs.from_jsonl(options.pairs, on_invalid="skip")
    heads = {}
    for dtype in ("float32", "bfloat16"):
        options.dtype = dtype
        heads[dtype] = open_folder(options.model, options)
    pairs = evenly_long(heads["float32"], everything, options.n)
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}")
    print("| what runs | bfloat16, float32 = 1 | smallest to largest of runs |\n|---|---|---|")
    for name, run in list(OURS.items())[1:]:
        ratios = []
        for _ in range(options.runs):
            times = {dtype: seconds(head, run, pairs) for dtype, head in heads.items()}
            ratios.append(times["bfloat16"] / times["float32"])
        print(f"| {name} | {statistics.median(ratios):.2f} | {min(ratios):.2f} to {max(ratios):.2f} |", flush=True)
    exact, rounded = (head.score_pairs(pairs) for head in heads.values())
    rewards, changed = (torch.cat([part.chosen, part.rejected]).double() for part in (exact, rounded))
    errors = (rewards - changed).abs()
    flipped = int((exact.margin.sign() != rounded.margin.sign()).sum())
    print(f"\nrewards: largest error {errors.max():.3g}, median {errors.median():.3g}, standard deviation", end=" ")
    print(f"of rewards {rewards.std():.3g}; {flipped} of {len(pairs)} margins change their sign")
    scores = [NeuronAttribution(head, method="gradient_x_activation").score(pairs) for head in heads.values()]
    values = [each.values.flatten().double().numpy() for each in scores]
    tops = [each.top(0.1) for each in scores]
    print(f"scores: rank correlation {stats.spearmanr(*values).statistic:.4f},", end=" ")
    print(f"{len(tops[0] & tops[1]) / len(tops[0]):.1%} of the top 10% in common")


if __name__ == "__main__":
    main()
