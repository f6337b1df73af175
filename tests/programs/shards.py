"""Whether several processes together compute the same as one process.

    torchrun --nproc-per-node 2 tests/programs/shards.py MODEL PAIRS OUT [--die RANK]

In float64 and in float32, every process first computes everything alone, then together with the others, and prints the
largest relative difference of all numbers. A run is interrupted and resumed. Then process 1 gets fewer pairs, or pairs
in another order, which has to be an error in all processes. With `--die`, that process kills itself at its first batch.
"""

import argparse
import os
import signal
from pathlib import Path

import torch

import rmtension.store._work_folder
from rmtension import (
    AblationContext,
    ActivationCollector,
    Mean,
    NeuronAttribution,
    NeuronSet,
    OtherResponse,
    PreferencePairs,
    Resample,
    RewardHead,
    Zero,
)
from rmtension.attribution._single_effects import single_neuron_effects
from rmtension.distributed import current, sharded
from rmtension.errors import ShardError
from rmtension.passes._collect_profiles import collect_profiles
from rmtension.study._model_runs import ModelRuns


def numbers(head: RewardHead, pairs: PreferencePairs, folder: Path | None = None) -> dict[str, torch.Tensor]:
    """Results of everything that runs over pairs."""
    mask = torch.zeros(head.n_layers, head.n_neurons("mlp"), dtype=torch.bool)
    mask[0, 3] = mask[-1, 5] = True
    neurons = NeuronSet(mask, "mlp", head.architecture)
    statistics = ActivationCollector(head).collect(pairs)
    sample = ActivationCollector(head).sample(pairs, n=16)
    results = {
        "texts": head.score([pair.text("chosen") for pair in pairs]),
        "sample": sample.values,
        "iterable": ActivationCollector(head).collect(iter(pairs)).rms,
        "effects": single_neuron_effects(head, pairs, neurons=neurons).values[mask],
        # Computed twice; only the folder of the first process has the result of the first time.
        "runs": [ModelRuns(head, folder=folder).rewards(pairs, without=neurons).margin for _ in range(2)][1],
    }
    results |= {name: getattr(statistics, name) for name in ("mean", "abs_mean", "rms", "frequency", "channel_mean")}
    results["n tokens"] = torch.tensor([statistics.n_tokens])
    for replacement in (Zero(), Mean(statistics), Resample(sample)):
        with AblationContext(head, neurons, replacement):
            results[f"without neurons, {replacement.name}"] = head.score_pairs(pairs).margin
    for method, more in {
        "mean_difference": {},
        "gradient_x_activation": {"aggregate": "absolute"},
        "attribution_patching": {"replacement": OtherResponse()},
        "integrated_gradients": {"steps": 2, "replacement": Mean(statistics)},
    }.items():
        scores = NeuronAttribution(head, method=method, **more).score(pairs)
        results |= {f"{method} {name}": getattr(scores, name) for name in ("values", "stderr", "without_block")}
        if scores.completeness_gap is not None:
            results[f"{method} gap"] = scores.completeness_gap
    results["per pair"] = NeuronAttribution(head, method="gradient_x_activation").per_pair(pairs).values
    profile = collect_profiles(head, pairs, positions=("response",))["mlp", "response"]
    return results | {"profile": profile.sums, "profile weights": profile.weights}


def resumed(head: RewardHead, pairs: PreferencePairs, work: Path) -> torch.Tensor:
    """Statistics from a run that each process interrupts at another batch, and that all resume together."""
    seen, observe = 0, head.observe

    def interrupted(*arguments):
        nonlocal seen
        seen += 1
        if seen > 1 + current().rank:
            raise InterruptedError
        observe(*arguments)

    rmtension.store._work_folder.EVERY, rmtension.store._work_folder._SHARE = 0.0, float("inf")
    head.observe = interrupted
    try:
        ActivationCollector(head).collect(pairs, work=work)
        raise AssertionError("the run was not interrupted")
    except InterruptedError:
        head.observe = observe
    assert (work / f"progress-{current().rank}.safetensors").exists()
    return ActivationCollector(head).collect(pairs, work=work).mean


def difference(first: torch.Tensor, second: torch.Tensor) -> float:
    """The largest difference, relative to the largest number; both have to be NaN at the same entries."""
    assert torch.equal(first.isnan(), second.isnan())
    first, second = (values.nan_to_num().double() for values in (first, second))
    return float((first - second).abs().max() / first.abs().max().clamp(min=1e-300))


def share(head: RewardHead, pairs: PreferencePairs, out: Path, die: int | None) -> None:
    """Compute everything together, and write the rewards to `out`."""
    alone = {} if die is not None else numbers(head, pairs)
    forward, n_run = head.forward, 0

    def watched(batch):
        nonlocal n_run
        n_run += batch.n_pairs
        if die == current().rank:
            os.kill(os.getpid(), signal.SIGKILL)
        return forward(batch)

    with sharded(timeout=60) as shard:
        head.forward = watched
        head.score_pairs(pairs).save(out)
        head.forward = forward
        print(f"{head.dtype}: process {shard.rank} of {shard.size} ran {n_run} of {len(pairs)} pairs", flush=True)
        same = torch.equal(
            resumed(head, pairs, out.with_suffix(".work")), ActivationCollector(head).collect(pairs).mean
        )
        print(f"resumed: {same}", flush=True)
        together = numbers(head, pairs, out.with_suffix(f".{shard.rank}"))
        for others in (pairs[: len(pairs) - shard.rank], pairs[shard.rank :] + pairs[: shard.rank]):
            try:
                ActivationCollector(head).collect(others)
            except ShardError as error:
                print(error, flush=True)
    assert current().size == 1
    worst = {name: difference(alone[name], value) for name, value in together.items()}
    print(f"largest relative difference {max(worst.values()):.1e}, of {worst}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("pairs", type=Path)
    parser.add_argument("out", type=Path, help="a folder")
    parser.add_argument("--die", type=int)
    options = parser.parse_args()
    # The suite that reads the results runs with one thread, and the last digits of float32 depend on it.
    torch.set_num_threads(1)
    pairs = PreferencePairs.from_jsonl(options.pairs)
    for dtype in (torch.float64, torch.float32):
        head = RewardHead.from_pretrained(options.model, dtype=dtype, device="cpu", tokens_per_batch=200)
        share(head, pairs, options.out / f"{dtype}.safetensors".removeprefix("torch."), options.die)


if __name__ == "__main__":
    main()
