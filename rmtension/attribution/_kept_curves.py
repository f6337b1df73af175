"""How much of a margin a few neurons keep when all others are replaced: CPR, CMD, completeness and minimality."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor

from rmtension._arguments import require_arguments
from rmtension.data._pairs import PreferencePairs
from rmtension.errors import OptionError
from rmtension.evaluation._intervals import (
    check_level,
    percentile_interval,
    resampled_sums,
    variance_of_mean,
    with_interval,
)
from rmtension.interventions._replacement import Replacement
from rmtension.interventions._replacements import Zero
from rmtension.interventions._sweep import score_without
from rmtension.models._reward_model import RewardModel
from rmtension.neurons._neuron_scores import NeuronScores, top_size
from rmtension.neurons._neuron_set import NeuronSet
from rmtension.store._provenance import Provenance
from rmtension.store._records import read_table, written_tables
from rmtension.store._storage import read_result, write_result

# The shares of MIB (Mueller et al. 2025, arXiv 2504.13151).
FRACTIONS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)
_METHOD = "kept curves"
# Below this many standard errors, m_M - m_0 is not told from 0, and f is a ratio to noise.
_LEAST_RANGE = 2.0


@dataclass(frozen=True, eq=False)
class KeptCurves:
    """What `kept_curves` found; m is the mean margin, and f = (m - m_0) / (m_M - m_0).

    m_M is the margin of the whole model and m_0 that with every neuron replaced, so f is 1 for the whole model and 0
    if every neuron is replaced. `curves` has one row per ranking and share:

    - `faithfulness`: f with only the top share kept and all other neurons replaced;
    - `completeness`: f with only the top share replaced; 0 if the remaining neurons cannot do its work.

    `areas` has one row per ranking, as the benchmark MIB defines them, over shares from 0 to 1: `cpr`, the area under f
    (higher is better), and `cmd`, the area of |1 - f| (lower is better). "random" are random rankings.

    All values have 95% (or `level`) intervals over prompts, `_low` and `_high`, which take m_M and m_0 from the same
    resamples.

    Examples:
        >>> curves = kept_curves(head, pairs["helpful"], scores, fractions=(0.1, 0.2, 1.0), n_random=1, progress=False)
        >>> curves.areas[["ranking", "cpr", "cmd"]].round(2)
                         ranking   cpr   cmd
        0  gradient_x_activation  0.94  0.06
        1               random 0  0.45  0.55
        >>> curves.save("kept.safetensors")
        >>> KeptCurves.load("kept.safetensors").areas.equals(curves.areas)
        True
    """

    curves: pd.DataFrame
    areas: pd.DataFrame
    whole: float
    nothing: float
    provenance: Provenance
    level: float

    def to_frame(self) -> pd.DataFrame:
        """The table `areas`."""
        return self.areas

    def __repr__(self) -> str:
        lines = [
            f"KeptCurves of {self.provenance.n_pairs} pairs: margin {self.whole:.3f}, {self.nothing:.3f} with every "
            f"{self.provenance.site} neuron replaced by {self.provenance.replacement} ({self.level:g} intervals)"
        ]
        for row in self.areas.to_dict("records"):
            parts = [f"{name.upper()} {with_interval(row[name], *_ends(row, name))}" for name in ("cpr", "cmd")]
            lines.append(f"  {row['ranking']}: {', '.join(parts)}")
        return "\n".join(lines)

    def save(self, path: str | Path) -> None:
        """Write both tables and the provenance to one safetensors file."""
        values: dict[str, Any] = {
            **written_tables(curves=self.curves, areas=self.areas),
            **{name: getattr(self, name) for name in ("whole", "nothing", "level")},
            "provenance": self.provenance.to_dict(),
        }
        write_result(path, "KeptCurves", {}, values)

    @classmethod
    def load(cls, path: str | Path) -> "KeptCurves":
        """Read a file that `save` wrote; raises `StorageError` if it is missing, damaged or of another kind."""
        path = Path(path)
        expected = {"curves": dict, "areas": dict, "whole": float, "nothing": float, "level": float, "provenance": dict}
        _, values = read_result(path, "KeptCurves", tensors={}, values=expected)
        tables = {name: read_table(path, values[name], ["ranking"]) for name in ("curves", "areas")}
        provenance = Provenance.from_dict(values["provenance"])
        return cls(
            **tables, whole=values["whole"], nothing=values["nothing"], provenance=provenance, level=values["level"]
        )


def kept_curves(
    head: RewardModel,
    pairs: PreferencePairs,
    rankings: NeuronScores | Mapping[str, NeuronScores],
    replacement: Replacement = Zero(),
    *,
    positions: str = "all",
    fractions: Sequence[float] = FRACTIONS,
    rank_by: str = "magnitude",
    n_random: int = 3,
    level: float = 0.95,
    seed: int = 0,
    work: str | Path | None = None,
    progress: bool | None = None,
) -> KeptCurves:
    """Keep the top neurons of each ranking and replace all others, over growing shares; and the other way round.

    Sets are nested and exact, `ceil(share * N)` neurons ranked over all layers by `rank_by` (see `NeuronScores.top`).
    `n_random` random rankings are the control. `replacement` and `positions` are those of `AblationContext`; to keep a
    set of your own, ablate its complement: `AblationContext(head, ~neurons, replacement)`. `work` and `progress` are
    those of `run_pass`.

    Cost: 2 ablations per ranking and share below 1, and 2 more, together as one `score_without`.

    Raises `OptionError` for shares that do not increase to 1, and if m_M and m_0 do not differ by two standard errors:
    then there is nothing to keep. Raises `ProvenanceError` for rankings of another model.

    Examples:
        >>> curves = kept_curves(head, pairs["helpful"], scores, fractions=(0.1, 1.0), n_random=0, progress=False)
        >>> curves.curves[["share", "size", "faithfulness", "completeness"]].round(2)
           share  size  faithfulness  completeness
        0    0.1     5          0.92          0.08
        1    1.0    48          1.00          0.00
    """
    named = {rankings.provenance.label: rankings} if isinstance(rankings, NeuronScores) else rankings
    require_arguments(
        "kept_curves(head, pairs, rankings)", head=(head, RewardModel), pairs=(pairs, PreferencePairs),
        rankings=(named, Mapping),
    )  # fmt: skip
    check_level(level)
    _check_fractions(fractions)
    if not named:
        raise OptionError("rankings: expected at least one NeuronScores, got none.")
    if reserved := [name for name in named if name.startswith(_RANDOM)]:
        raise OptionError(f"rankings: {reserved} are names of random rankings. Give these rankings other names.")
    site = next(iter(named.values())).provenance.site
    expected = replace(next(iter(named.values())).provenance, architecture=head.architecture, model=head.fingerprint)
    for name, scores in named.items():
        scores.provenance.require_same(expected, ("architecture", "model", "site"), what=f"kept_curves of {name}")
    tops = {name: [scores.top(share, rank_by=rank_by) for share in fractions] for name, scores in named.items()}
    for draw in range(n_random):
        tops[f"{_RANDOM}{draw}"] = _random_tops(head, site, fractions, seed + draw)
    sets = [top for ranking in tops.values() for top in ranking[:-1]]
    run = _Run(head, pairs, [*(~top for top in sets), *sets], site, replacement, positions, level, seed, work, progress)
    rows, areas = [], []
    for number, (name, ranking) in enumerate(tops.items()):
        first = number * (len(fractions) - 1)
        kept = [run.f(first + step) for step in range(len(fractions) - 1)] + [run.f(None)]
        without = [run.f(len(sets) + first + step) for step in range(len(fractions) - 1)] + [0 * run.f(None)]
        for share, top, inside, outside in zip(fractions, ranking, kept, without, strict=True):
            values = run.with_interval("faithfulness", inside) | run.with_interval("completeness", outside)
            rows.append({"ranking": name, "share": share, "size": len(top), **values})
        heights = np.stack([0 * kept[0], *kept])
        shares = np.array([0.0, *fractions])
        values = run.with_interval("cpr", np.trapezoid(heights, shares, axis=0))
        values |= run.with_interval("cmd", np.trapezoid(np.abs(1 - heights), shares, axis=0))
        areas.append({"ranking": name, **values})
    provenance = replace(run.provenance, site=site, positions=positions, method=_METHOD, replacement=replacement.label)
    return KeptCurves(pd.DataFrame(rows), pd.DataFrame(areas), run.whole, run.nothing, provenance, level)


def minimality(
    head: RewardModel,
    pairs: PreferencePairs,
    neurons: NeuronSet,
    replacement: Replacement = Zero(),
    *,
    positions: str = "all",
    parts: int = 10,
    level: float = 0.95,
    seed: int = 0,
    progress: bool | None = None,
) -> pd.DataFrame:
    """What each random part of a set adds to it: f with only the set kept, minus f with the set without the part kept.

    f is that of `KeptCurves`. One row per part: `part`, `size`, `f` of the whole set and the `loss` without the part,
    with intervals over prompts. A loss near 0 means that the set has neurons that it does not need (Marks et al. 2024,
    arXiv 2403.19647, for parts of one neuron). Cost: `parts` + 3 ablations as one `score_without`.

    Examples:
        >>> minimality(head, pairs["helpful"], neurons, parts=2, progress=False)[["part", "size", "f", "loss"]].round(2)
           part  size    f  loss
        0     0     1  0.4  0.19
        1     1     1  0.4  0.20
    """
    require_arguments(
        "minimality(head, pairs, neurons)", head=(head, RewardModel), pairs=(pairs, PreferencePairs),
        neurons=(neurons, NeuronSet),
    )  # fmt: skip
    check_level(level)
    if not 1 <= parts <= len(neurons):
        raise OptionError(f"parts: expected 1 to {len(neurons)} (the size of the set), got {parts}.")
    order = torch.from_numpy(np.random.default_rng(seed).permutation(len(neurons)))
    members = neurons.mask.flatten().nonzero()[:, 0][order]
    removed = [_of_indices(neurons, members[part::parts]) for part in range(parts)]
    kept = [neurons, *(neurons - part for part in removed)]
    run = _Run(head, pairs, [~each for each in kept], neurons.site, replacement, positions, level, seed, None, progress)
    rows = [
        {
            "part": number,
            "size": len(part),
            **run.with_interval("f", run.f(0)),
            **run.with_interval("loss", run.f(0) - run.f(1 + number)),
        }
        for number, part in enumerate(removed)
    ]
    return pd.DataFrame(rows)


# -- inside ------------------------------------------------------------------------------------------------------------

_RANDOM = "random "


class _Run:
    """The margins without each of some sets, as values of f: the measured one, then its resamples over prompts."""

    def __init__(
        self,
        head: RewardModel,
        pairs: PreferencePairs,
        sets: Sequence[NeuronSet],
        site: str,
        replacement: Replacement,
        positions: str,
        level: float,
        seed: int,
        work: str | Path | None,
        progress: bool | None,
    ) -> None:
        shape = (head.n_layers, head.n_neurons(site))
        every = NeuronSet(torch.ones(shape, dtype=torch.bool), site, head.architecture)
        scored = score_without(
            head, pairs, [~every, every, *sets], replacement, positions=positions, work=work, progress=progress
        )
        margins = torch.stack([rewards.margin.double() for rewards in scored], dim=1)
        self.provenance = scored[0].provenance
        self.whole, self.nothing = (float(margins[:, column].mean()) for column in range(2))
        self._level = level
        kept = scored[0].pairs
        standard_error = variance_of_mean(margins[:, 0] - margins[:, 1], kept) ** 0.5
        rounding = 1e-6 * float(margins[:, :2].abs().mean())
        if not abs(self.whole - self.nothing) > _LEAST_RANGE * standard_error + rounding:
            raise OptionError(
                f"pairs: the mean margin is {self.whole:.3f}, and {self.nothing:.3f} with every neuron of site "
                f"{site!r} replaced: not {_LEAST_RANGE:g} standard errors apart, so there is nothing to keep. Use more "
                "pairs, pairs of the objective that the model was trained on, or another replacement."
            )
        sums = resampled_sums(margins, kept, seed=seed)
        means = np.concatenate([margins.sum(dim=0).numpy()[None], sums])
        self._f = (means - means[:, 1:2]) / (means[:, 0:1] - means[:, 1:2])

    def f(self, number: int | None) -> Float[np.ndarray, "value"]:
        """The values of f without set `number`; for None, of the whole model."""
        column: Float[np.ndarray, "value"] = self._f[:, 0 if number is None else 2 + number]
        return column

    def with_interval(self, name: str, values: Float[np.ndarray, "value"]) -> dict[str, float]:
        """The value and the ends of its interval, under `name`, `name_low` and `name_high`."""
        low, high = percentile_interval(values[1:], self._level)
        return {name: float(values[0]), f"{name}_low": low, f"{name}_high": high}


def _random_tops(head: RewardModel, site: str, fractions: Sequence[float], seed: int) -> list[NeuronSet]:
    shape = (head.n_layers, head.n_neurons(site))
    order = torch.from_numpy(np.random.default_rng(seed).permutation(shape[0] * shape[1]))
    nothing = NeuronSet(torch.zeros(shape, dtype=torch.bool), site, head.architecture)
    return [_of_indices(nothing, order[: top_size(share, len(order))]) for share in fractions]


def _of_indices(like: NeuronSet, indices: Int[Tensor, "neuron"]) -> NeuronSet:
    mask = torch.zeros_like(like.mask)
    mask.view(-1)[indices] = True
    return NeuronSet(mask, like.site, like.architecture)


def _check_fractions(fractions: Sequence[float]) -> None:
    rising = all(low < high for low, high in pairwise(fractions))
    if not fractions or not rising or fractions[0] <= 0 or fractions[-1] != 1:
        raise OptionError(f"fractions: expected shares that increase to 1, such as {FRACTIONS}, got {list(fractions)}.")


def _ends(row: Mapping[Any, Any], name: str) -> tuple[float, float]:
    return row[f"{name}_low"], row[f"{name}_high"]
