"""How the outputs of an inspected model agree: their rankings, and which neurons they share or fight over."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from rmtension.attribution._neuron_attribution import NeuronAttribution
from rmtension.data._pairs import PreferencePairs
from rmtension.data._tokens import TokenBatch
from rmtension.errors import OptionError
from rmtension.evaluation import _metrics as metrics
from rmtension.evaluation._intervals import Estimate, percentile_interval, resampled_sums
from rmtension.evaluation._pair_rewards import PairRewards
from rmtension.heads._outputs import ALL
from rmtension.interventions._replacements import Mean
from rmtension.neurons._conflict import conflict
from rmtension.neurons._conflict_report import ConflictReport, have_columns
from rmtension.neurons._pair_attributions import PairAttributions
from rmtension.passes._pair_pass import run_pass
from rmtension.passes._rewards_of_pairs import RewardsOfPairs
from rmtension.reward_head import RewardHead
from rmtension.store._work_folder import below
from rmtension.study._inspection_tables import maps_table

Groups = Mapping[str, PreferencePairs]


@dataclass(frozen=True, eq=False)
class OutputComparison:
    """The tables `outputs` and `output_maps` of an inspection, and the report of every two outputs."""

    outputs: pd.DataFrame
    maps: dict[tuple[str, str], ConflictReport] = field(default_factory=dict)

    @property
    def tables(self) -> dict[str, pd.DataFrame]:
        """The tables by name."""
        return {"outputs": self.outputs, "output_maps": output_maps_table(self.maps)}


def chosen_outputs(head: RewardHead, outputs: object) -> dict[str, RewardHead]:
    """The inspected output and those to compare it with, by name; raises `OptionError` for outputs that do not fit."""
    inspected = head.output_name
    if inspected is None:
        raise OptionError(
            f"outputs: expected a model with several outputs, got one with the output {head.outputs[0]!r}. Leave out "
            "the argument outputs."
        )
    if isinstance(outputs, str) and (outputs != ALL or ALL in head.outputs):
        outputs = [outputs]
    if not isinstance(outputs, str | Iterable):
        raise OptionError(f"outputs: expected a list of outputs or 'all', got {outputs!r:.80}.")
    listed: Sequence[Any] = head.outputs if isinstance(outputs, str) else list(outputs)
    heads = {inspected: head}
    for output in listed:
        other = head.output(output)
        assert other.output_name is not None
        heads.setdefault(other.output_name, other)
    if len(heads) < 2:
        raise OptionError(
            f"outputs: expected outputs other than {inspected!r}, which is inspected, got {outputs!r:.80}. The outputs "
            f"are {head.outputs[:20]}."
        )
    return heads


def compare_outputs(
    heads: Mapping[str, RewardHead],
    used: Groups,
    scoring: PreferencePairs,
    replacement: Mean,
    *,
    method: str,
    site: str,
    level: float,
    seed: int,
    work: Path | None,
    progress: bool | None,
) -> OutputComparison:
    """Compare the outputs in `heads`, of which the first is inspected.

    Cost: a forward pass over the pairs that are used, and per output a forward and a backward pass over those that
    score neurons. Memory: the scores of all these pairs by every output.
    """
    together = PreferencePairs(pair for part in used.values() for pair in part)
    first_head = next(iter(heads.values()))
    statistic = RewardsOfPairs(first_head, together, partial(_rewards, list(heads.values())), n=len(heads))
    scored = run_pass(first_head, together, statistic, work=below(work, "rewards"), progress=progress)
    rewards = dict(zip(heads, scored, strict=True))
    by_pair: dict[str, PairAttributions] = {}
    for number, (name, head) in enumerate(heads.items()):
        attribution = NeuronAttribution(head, method, replacement=replacement, site=site)
        by_pair[name] = attribution.per_pair(scoring, work=below(work, f"attribution-{number}"), progress=progress)
    maps = {}
    for first, second in combinations(by_pair, 2):
        if not all(by_pair[name].mean().any() for name in (first, second)):
            continue  # every score is 0, so that there is no direction to compare
        names = (first, second) if have_columns((first, second)) else (f"output {first}", f"second output {second}")
        maps[names] = conflict(by_pair[first], by_pair[second], names=names, level=level, seed=seed)
    return OutputComparison(outputs_table(rewards, used, level=level, seed=seed), maps)


@torch.no_grad()
def _rewards(heads: Sequence[RewardHead], batch: TokenBatch) -> list[Float[Tensor, "text"]]:
    """The rewards of a batch by outputs of one model, from one forward pass."""
    first = heads[0]
    places = first.require_head().tokens(batch)
    with first.last_mlp_where_read(batch):
        states = batch.gather(places, first.residual(batch))
    return [head.read_places(states, places, batch) for head in heads]


def outputs_table(rewards: Mapping[str, PairRewards], used: Groups, *, level: float, seed: int) -> pd.DataFrame:
    """One row per output, group and measure: accuracy, margin, and the correlation with the first output's margins."""
    rows: list[dict[str, Any]] = []
    inspected = next(iter(rewards.values()))
    start = 0
    for group, part in used.items():
        members = list(range(start, start + len(part)))
        start += len(part)
        for output, scored in rewards.items():
            of_group = scored.take(members)
            measures = {
                "accuracy": metrics.accuracy(of_group, level=level, seed=seed),
                "margin": metrics.mean_margin(of_group, level=level, seed=seed),
            }
            if scored is not inspected:
                margins = inspected.take(members).margin, of_group.margin
                measures["correlation"] = correlation(*margins, of_group.pairs, level=level, seed=seed)
            rows += [
                {"output": output, "group": group, "measure": measure, **estimate.to_dict()}
                for measure, estimate in measures.items()
            ]
    return pd.DataFrame(rows)


def output_maps_table(maps: Mapping[tuple[str, str], ConflictReport]) -> pd.DataFrame:
    """One row per two outputs: that of `maps_table`, and how many neurons count for one output only."""
    table = maps_table(maps)
    for side, names in (("first_only", 0), ("second_only", 1)):
        table[side] = [
            sum(report.counts()[f"{report.names[names]} only {way}"] for way in ("up", "down"))
            for report in maps.values()
        ]
    return table


def correlation(
    first: Float[Tensor, "pair"], second: Float[Tensor, "pair"], pairs: PreferencePairs, *, level: float, seed: int
) -> Estimate:
    """The Pearson correlation of two margins over pairs, with a percentile bootstrap interval over prompts."""
    # Centred, so that squares of large means do not cancel.
    x, y = ((values.double() - values.double().mean()) for values in (first, second))
    columns = torch.stack([torch.ones_like(x), x, y, x * x, y * y, x * y], dim=1)
    value = _correlation(columns.sum(dim=0, keepdim=True).numpy())[0]
    n_prompts = len(pairs.prompts)
    low = high = float("nan")
    if n_prompts > 1:
        low, high = percentile_interval(_correlation(resampled_sums(columns, pairs, seed=seed)), level)
    return Estimate(float(value), low, high, len(pairs), n_prompts, level)


def _correlation(sums: Float[np.ndarray, "resample 6"]) -> Float[np.ndarray, "resample"]:
    n, x, y, xx, yy, xy = sums.T
    with np.errstate(divide="ignore", invalid="ignore"):
        result: Float[np.ndarray, "resample"] = (n * xy - x * y) / np.sqrt((n * xx - x * x) * (n * yy - y * y))
    return result
