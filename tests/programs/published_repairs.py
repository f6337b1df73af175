"""What three published recipes against style biases do on models with a planted bias each, beside their controls.

    python tests/programs/published_repairs.py --folder mended [--seeds 3]

The models are mixed models of the embedded world. In the first two, the reward rises with the length of the response:
by neurons that follow it, and by a direction of the reward row. The weak objective is then the pairs whose chosen
response is shorter, the strong one the others. In the third, the reward row points against the mean difference of the
pairs that should be refused, and harmlessness is weak.
"""

import argparse
from collections.abc import Callable, Iterator
from pathlib import Path

import pandas as pd
import torch

from rmtension import PreferencePairs, RewardHead
from rmtension.errors import OptionError
from rmtension.models._classifiers import current_checkpoint
from rmtension.repair._edit import Edit, reward_row
from rmtension.repair._features import ReadStates, read_states
from rmtension.repair._repair import repair
from rmtension.repair._splits import RepairPairs
from rmtension.synthetic import preference_world
from rmtension.training import train_family

# The weak objective is damaged until its accuracy on fit pairs is below this.
_WEAK_BELOW = 0.75
_SIZES = tuple(0.1 * 1.2**step for step in range(36))


def by_length(pairs: PreferencePairs) -> dict[str, PreferencePairs]:
    """Pairs whose chosen response is shorter, and those where it is longer."""
    longer = [len(pair.text("chosen")) > len(pair.text("rejected")) for pair in pairs]
    return {
        name: PreferencePairs(pair for pair, is_longer in zip(pairs, longer, strict=True) if is_longer == wanted)
        for name, wanted in (("shorter", False), ("longer", True))
    }


def row_of(head: RewardHead) -> torch.Tensor:
    """The reward row in float64."""
    linear, number = reward_row(head)
    return linear.weight[number].detach().double()


def direction(differences: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """The direction whose products with the differences of states are nearest to the targets, by ridge regression."""
    moments = differences.T @ differences
    ridge = 1e-3 * moments.diagonal().mean() * torch.eye(len(moments), dtype=moments.dtype)
    return torch.linalg.solve(moments + ridge, differences.T @ targets)


def scaled(found: torch.Tensor, states: list[ReadStates], size: float) -> torch.Tensor:
    """A direction whose margins have `size` times the standard deviation of the model's own."""
    own = torch.cat([part.margin for part in states]).std()
    return size * own * found / (torch.cat([part.difference for part in states]) @ found).std()


@torch.no_grad()
def states_read_by_mlp(head: RewardHead, pairs: PreferencePairs, layer: int) -> torch.Tensor:
    """What a layer's MLP reads at the last token of every text, chosen responses first; by plain transformers."""
    native, read = head.body.native, []
    handle = native.get_submodule(f"h.{layer}.mlp.c_fc").register_forward_pre_hook(
        lambda _, given: read.append(given[0][0, -1].double())
    )
    for text in (pair.text(side) for side in ("chosen", "rejected") for pair in pairs):
        native(input_ids=torch.tensor([head.tokenizer(text)["input_ids"]]))
    handle.remove()
    return torch.stack(read)


def neurons_that_follow_length(head: RewardHead, split: RepairPairs, size: float) -> Edit:
    """Eight neurons of the first layer get weights with which they follow length, and write the reward row."""
    both = split.fit[split.weak] + split.fit[split.strong]
    states = states_read_by_mlp(head, both, 0)
    lengths = torch.tensor([len(pair.text(side)) for side in ("chosen", "rejected") for pair in both]).double()
    centred = states - states.mean(dim=0)
    generator = torch.Generator().manual_seed(0)
    _, base = current_checkpoint(head, "bias")
    mlp = base.get_submodule("h.0.mlp")
    # The neurons that write least are replaced.
    replaced = mlp.c_proj.weight.norm(dim=1).argsort()[:8]
    changes = {name: torch.zeros_like(value).double() for name, value in mlp.named_parameters()}
    row = row_of(head)
    for number in replaced.tolist():
        half = torch.randperm(len(centred), generator=generator)[: len(centred) // 2]
        follows = direction(centred[half], (lengths - lengths.mean())[half])
        # Between 1 and 5 over the texts, where GELU is nearly linear.
        reading = follows / (centred @ follows).std()
        offset = 3 - states.mean(dim=0) @ reading
        changes["c_fc.weight"][:, number] = reading - mlp.c_fc.weight[:, number].double()
        changes["c_fc.bias"][number] = offset - mlp.c_fc.bias[number].double()
        changes["c_proj.weight"][number] = size * row / row.norm() - mlp.c_proj.weight[number].double()
    changes["c_proj.bias"] = -8 * 3 * size * row / row.norm()
    parameters = {f"h.0.mlp.{name}": change for name, change in changes.items()}
    return Edit("bias", head.fingerprint, head.architecture, parameters=parameters)


def row_that_follows_length(head: RewardHead, split: RepairPairs, size: float) -> Edit:
    """The reward row gets the direction that predicts how much longer the chosen response is."""
    states = [read_states(head, split.fit[name], progress=False) for name in ("shorter", "longer")]
    longer = [
        len(pair.text("chosen")) - len(pair.text("rejected"))
        for name in ("shorter", "longer")
        for pair in split.fit[name]
    ]
    found = direction(torch.cat([part.difference for part in states]), torch.tensor(longer, dtype=torch.float64))
    return Edit("bias", head.fingerprint, head.architecture, row=scaled(found, states, size))


def row_against_refusals(head: RewardHead, split: RepairPairs, size: float) -> Edit:
    """The reward row gets a direction against pairs that should be refused, which other pairs do not vary in."""
    states = [read_states(head, split.fit[name], progress=False) for name in ("harmless", "helpful")]
    refused = [float(pair.subset == "should_refuse") for name in ("harmless", "helpful") for pair in split.fit[name]]
    found = direction(torch.cat([part.difference for part in states]), torch.tensor(refused, dtype=torch.float64))
    return Edit("bias", head.fingerprint, head.architecture, row=-scaled(found, states, size))


def biased(
    head: RewardHead, split: RepairPairs, plant: Callable[[RewardHead, RepairPairs, float], Edit]
) -> tuple[RewardHead, float]:
    """The model with the mildest bias of which fit pairs show it, and the bias's size."""
    for size in _SIZES:
        made = plant(head, split, size).apply(head)
        if made.score_pairs(split.fit[split.weak], progress=False).accuracy() < _WEAK_BELOW:
            break
    return made, size


def cases(
    world_pairs: dict[str, PreferencePairs],
) -> Iterator[tuple[str, dict[str, PreferencePairs], str, str, Callable]]:
    """The method, pairs, weak and strong objective, and how the bias is planted."""
    lengths = by_length(world_pairs["harmless"] + world_pairs["helpful"])
    yield "medians", lengths, "shorter", "longer", neurons_that_follow_length
    yield "reward shaping", lengths, "shorter", "longer", row_that_follows_length
    yield "subspace removal", dict(world_pairs), "harmless", "helpful", row_against_refusals


def main() -> None:
    """Print one row per model and recipe."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("mended"))
    parser.add_argument("--seeds", type=int, default=3)
    options = parser.parse_args()
    rows = []
    for seed in range(options.seeds):
        world = preference_world(seed)
        folders = train_family(world.train, options.folder / f"seed-{seed}", seed=seed, resume=True, progress=False)
        head = RewardHead.from_pretrained(folders["mixed"])
        for method, pairs, weak, strong, plant in cases(world.test):
            split = RepairPairs.split(pairs, weak=weak, strong=strong, most_lost=0.06, seed=seed)
            made, size = biased(head, split, plant)
            whole = head.score_pairs(split.test[weak], progress=False).accuracy()
            try:
                report = repair(made, split, method, seed=seed, progress=False).report
            except OptionError as error:
                print(f"seed {seed}, {method}: {str(error).splitlines()[0]}", flush=True)
                continue
            checks = report.checks.set_index("quantity")
            controls = report.controls.groupby("control")["closed"].mean().round(3).to_dict()
            rows.append(
                {
                    "seed": seed, "method": method, "size": size, "whole": whole,
                    "before": checks.loc[f"{weak} accuracy", "before"], "closed": report.closed.value,
                    "low": report.closed.low, "high": report.closed.high,
                    "strong change": checks.loc[f"{strong} accuracy", "change"], "numbers": report.edit["numbers"],
                    **controls,
                }
            )  # fmt: skip
            print(pd.DataFrame(rows[-1:]).round(3).to_string(index=False), flush=True)
    table = pd.DataFrame(rows)
    table.to_csv(options.folder / "published.csv", index=False)
    print(table.round(3).to_string(index=False))


if __name__ == "__main__":
    main()
