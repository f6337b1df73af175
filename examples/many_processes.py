"""Compute statistics, scores and rewards of a reward model on many pairs, with one or several processes.

    python examples/many_processes.py --model my-reward-model --pairs pairs.jsonl.gz --out results
    torchrun --nproc-per-node 8 examples/many_processes.py --model my-reward-model --pairs pairs.jsonl.gz --out results

Both commands write the same three files. The pairs are read line by line; only the rewards, one row per pair, keep all
pairs in memory. `--n-devices` is for one process and a model that is larger than a GPU.
"""

import argparse
from pathlib import Path

import torch

from rmtension import ActivationCollector, NeuronAttribution, PreferencePairs, RewardHead
from rmtension.distributed import sharded


def main() -> None:
    """Open the model, run it over the pairs and write the three files."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="a folder, or a name on the hub")
    parser.add_argument("--pairs", type=Path, required=True, help="JSON lines, plain or gzip")
    parser.add_argument("--out", type=Path, required=True, help="a folder")
    parser.add_argument("--dtype", default="float32", help="bfloat16 on a GPU halves memory and time")
    parser.add_argument("--n-devices", type=int, help="spread the model over this number of GPUs")
    options = parser.parse_args()
    more = {} if options.n_devices is None else {"n_devices": options.n_devices}
    # Opened inside `sharded`, so that every process uses its own GPU.
    with sharded() as shard:
        head = RewardHead.from_pretrained(options.model, dtype=getattr(torch, options.dtype), **more)
        show = {"progress": shard.is_first}
        statistics = ActivationCollector(head).collect(PreferencePairs.iter_jsonl(options.pairs), **show)
        statistics.save(options.out / "statistics.safetensors")
        attribution = NeuronAttribution(head, "gradient_x_activation")
        scores = attribution.score(PreferencePairs.iter_jsonl(options.pairs), **show)
        scores.save(options.out / "scores.safetensors")
        scored = head.score_pairs(PreferencePairs.iter_jsonl(options.pairs), **show)
        scored.save(options.out / "rewards.safetensors")
        if shard.is_first:
            print(f"{shard.size} processes, {len(scored)} pairs, {statistics.n_tokens} tokens: {scored}")


if __name__ == "__main__":
    main()
