"""Faithfulness: how well scores predict the effects of ablating single neurons, and sets of growing size."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from rmtension._arguments import require_arguments
from rmtension._progress import progress_bar
from rmtension.attribution._single_effects import EFFECT, single_neuron_effects
from rmtension.data._pairs import PreferencePairs
from rmtension.errors import OptionError, StorageError
from rmtension.evaluation._intervals import bootstrap_mean, check_level, with_interval
from rmtension.interventions._ablation import AblationContext
from rmtension.interventions._replacements import Replacement, Zero, check_replacement
from rmtension.neurons._neuron_scores import NeuronScores, top_size
from rmtension.neurons._neuron_set import NeuronSet
from rmtension.neurons._score_agreement import MEASURES, agreement
from rmtension.reward_head import RewardHead
from rmtension.store._provenance import METHOD_FIELDS, Provenance
from rmtension.store._records import read_table
from rmtension.store._storage import read_result, write_result

_SAME_MODEL = ("architecture", "model", "site")
_COLUMNS = ("layer", "neuron", "effect", "stderr")
# Share of neurons that `top_precision` takes.
_TOP_SHARE = 0.1


@dataclass(frozen=True, eq=False)
class Faithfulness:
    """How well the scores of each method agree with the true effects of ablation; `faithfulness` returns it.

    `summary` has one row per method: `n` neurons compared and, each with its interval (`_low`, `_high`),

    - `spearman`: rank correlation of predicted and true effects of single neurons;
    - `sign_agreement`: among neurons where neither effect is 0, the share whose true effect has the predicted sign;
    - `top_precision`: among the `top` neurons (10%) with the largest predicted magnitude, the share that is also among
      the `top` with the largest true magnitude; chance gives `top / n`;
    - `slope`: least-squares slope of the true effect on the predicted effect; 1 if predictions have the right size.

    Scores without a direction (`aggregate="absolute"`, magnitudes of activations) are compared with magnitudes, and
    have no sign agreement.

    `neurons` has one row per ablated neuron: layer, neuron, its true effect and standard error, and one column of
    predicted effects per method. `sets` has one row per method and fraction: `size`, the `predicted` effect of ablating
    these neurons together (the sum of their predicted effects), the true `effect` with `low` and `high` over prompts,
    and the `random` control: mean, smallest and largest effect of `n_random` random sets of equal size. `match` is
    "layer" if the random sets have the same number of neurons in every layer, "model" if only the total is the same,
    because the set takes more than half of some layer.

    Examples:
        >>> result = faithfulness(head, pairs["helpful"], scores, set_fractions=(0.1,), n_random=2, progress=False)
        >>> print(str(result).splitlines()[0])
        Faithfulness to the effect of ablation to zero (24 pairs, 0.95 intervals)
        >>> result.sets[["method", "size", "predicted", "effect", "random"]].round(2)
                          method  size  predicted  effect  random
        0  gradient_x_activation     5      -4.73   -4.73   -0.21
        >>> result.save("faithfulness.safetensors")
        >>> Faithfulness.load("faithfulness.safetensors").summary.equals(result.summary)
        True
    """

    summary: pd.DataFrame
    neurons: pd.DataFrame
    sets: pd.DataFrame
    provenance: Provenance
    level: float

    def to_frame(self) -> pd.DataFrame:
        """The table `summary`."""
        return self.summary

    def __repr__(self) -> str:
        lines = [
            f"Faithfulness to the {self.provenance.label} ({self.provenance.n_pairs} pairs, {self.level:g} intervals)"
        ]
        for row in self.summary.to_dict("records"):
            parts = [f"{name} {with_interval(row[name], row[f'{name}_low'], row[f'{name}_high'])}" for name in MEASURES]
            lines.append(f"  {row['method']} (n = {row['n']}): {', '.join(parts)}")
        return "\n".join(lines)

    def save(self, path: str | Path) -> None:
        """Write the three tables and the provenance to one safetensors file."""
        columns = {name: torch.from_numpy(column.to_numpy(copy=True)) for name, column in self.neurons.items()}
        values: dict[str, Any] = {
            **{name: getattr(self, name).to_dict("split", index=False) for name in ("summary", "sets")},
            "columns": list(columns),
            "provenance": self.provenance.to_dict(),
            "level": self.level,
        }
        write_result(path, "Faithfulness", {str(name): column for name, column in columns.items()}, values)

    @classmethod
    def load(cls, path: str | Path) -> "Faithfulness":
        """Read a file that `save` wrote; raises `StorageError` if it is missing, damaged or of another kind."""
        path = Path(path)
        expected = {"summary": dict, "sets": dict, "columns": list, "provenance": dict, "level": float}
        tensors, values = read_result(path, "Faithfulness", tensors={"*": "any neuron"}, values=expected)
        names = values["columns"]
        if not all(isinstance(name, str) for name in names) or sorted(names) != sorted(tensors):
            raise StorageError(f"{path}: damaged: its columns differ from the names it lists. Save the result again.")
        neurons = pd.DataFrame({name: tensors[name].numpy() for name in names})
        shown = ["method", "n", *(name + end for name in MEASURES for end in ("", "_low", "_high"))]
        summary, sets = read_table(path, values["summary"], shown), read_table(path, values["sets"], ["method"])
        return cls(summary, neurons, sets, Provenance.from_dict(values["provenance"]), values["level"])


def faithfulness(
    head: RewardHead,
    pairs: PreferencePairs,
    scores: NeuronScores | Mapping[str, NeuronScores],
    replacement: Replacement = Zero(),
    *,
    positions: str | None = None,
    sample: int | None = None,
    true_effects: NeuronScores | None = None,
    set_fractions: Sequence[float] = (0.01, 0.02, 0.05, 0.1, 0.2),
    n_random: int = 8,
    level: float = 0.95,
    seed: int = 0,
    progress: bool | None = None,
) -> Faithfulness:
    """Compare scores with the true effects of ablating this model's neurons on the margins of `pairs`.

    The predicted effect is `NeuronScores.as_effects`: for methods that score contributions, minus the score, because
    ablating a neuron removes its contribution. Intervals resample blocks of prompts (jointly for scores and true
    effects that come from the same pairs). Resampling adds noise that lowers every agreement, so the resamples are
    shifted to have the observed value as their mean. For a sample of neurons, the neurons are resampled too, within
    layers.

    Cost: that of `single_neuron_effects`, plus one forward pass without ablation and 1 + `n_random` forward passes per
    method and fraction. A pass runs both texts of every pair.

    Args:
        head: the model that was scored.
        pairs: the pairs to measure effects on: the scored pairs or others.
        scores: the scores of one method, or a mapping of names to scores.
        replacement: what replaces the activations. If the scores used a replacement, pass the same one. With
            `OtherResponse()`, no sets are ablated.
        positions: the tokens whose activations are replaced; default: the positions of the scores.
        sample: how many neurons to ablate, drawn evenly from all layers; default: all. With fewer than two neurons per
            layer, intervals treat all layers as one.
        true_effects: the result of `single_neuron_effects` for the same model, pairs and ablation, to avoid running it.
        set_fractions: sizes of the sets as shares of all neurons; pass () to ablate no sets.
        n_random: number of random sets per set.
        level: level of the intervals.
        seed: seed of the sample, the random sets and the resamples.
        progress: show progress bars.

    Raises `ProvenanceError` for scores of another model or true effects of another ablation, and `OptionError` for
    invalid options; both before the model runs.

    Examples:
        >>> result = faithfulness(head, pairs["helpful"], scores, set_fractions=())
        >>> result.summary[["method", "n", "spearman", "sign_agreement"]].round(2)
                          method   n  spearman  sign_agreement
        0  gradient_x_activation  48       1.0             1.0
    """
    named = {scores.provenance.label: scores} if isinstance(scores, NeuronScores) else scores
    require_arguments(
        "faithfulness(head, pairs, scores)",
        head=(head, RewardHead),
        pairs=(pairs, PreferencePairs),
        scores=(named, Mapping),
    )
    check_level(level)
    if n_random < 0:
        raise OptionError(f"n_random: expected 0 or more sets, got {n_random}.")
    site, positions = _where(head, named, positions)
    check_replacement(replacement, head, site)
    neurons = None if sample is None else sample_neurons(head, site, sample, seed=seed)
    planned = _plan(named, set_fractions, n_random, seed) if replacement.ablates else []
    if true_effects is None:
        measured = (
            torch.ones(head.n_layers, head.n_neurons(site), dtype=torch.bool) if neurons is None else neurons.mask
        )
    else:
        if sample is not None:
            raise OptionError(
                "sample: true_effects fixes which neurons are compared. Pass sample or true_effects, not both."
            )
        n_tokens = true_effects.provenance.n_tokens
        expected = head.provenance(pairs.digest, len(pairs), n_tokens, site=site, positions=positions, method=EFFECT)
        expected = replace(expected, aggregate="signed", replacement=replacement.label)
        true_effects.provenance.require_same(
            expected, (*_SAME_MODEL, "positions", *METHOD_FIELDS, "data"), what="true_effects of faithfulness"
        )
        measured = torch.isfinite(true_effects.as_effects())
    if int(measured.sum()) < 3:
        raise OptionError(f"sample: expected at least 3 neurons to compare, got {int(measured.sum())}.")
    if true_effects is None:
        true_effects = single_neuron_effects(
            head,
            pairs,
            replacement=replacement,
            site=site,
            positions=positions,
            neurons=neurons,
            progress=progress,
        )
    rows = []
    for name, one in named.items():
        measures = agreement(one, true_effects, measured, top=_TOP_SHARE, level=level, seed=seed)
        n = int(measured.sum())
        rows.append({"method": name, "n": n, "top": top_size(_TOP_SHARE, n), **measures})
    predicted = {name: one.as_effects()[measured].numpy() for name, one in named.items()}
    table = (
        true_effects.to_frame()
        .rename(columns={"score": "effect"})[[*_COLUMNS]]
        .dropna(subset="effect")
        .assign(**predicted)
    )
    ablate = partial(AblationContext, head, replacement=replacement, positions=positions)
    sets = _set_rows(head, planned, pairs, ablate, level, seed, progress)
    return Faithfulness(pd.DataFrame(rows), table.reset_index(drop=True), sets, true_effects.provenance, level)


def sample_neurons(head: RewardHead, site: str, n: int, *, seed: int = 0) -> NeuronSet:
    """Draw `n` neurons of a site at random, equally many from every layer; layers drawn at random get the remainder.

    Raises `OptionError` unless `n` is between 1 and the number of neurons.

    Examples:
        >>> sample_neurons(head, "mlp", 7).n_per_layer
        [4, 3]
    """
    layers, width = head.n_layers, head.n_neurons(site)
    if not 0 < n <= layers * width:
        raise OptionError(f"sample: expected 1 to {layers * width} neurons, got {n}.")
    generator = np.random.default_rng(seed)
    sizes = np.full(layers, n // layers)
    sizes[generator.permutation(layers)[: n % layers]] += 1
    mask = torch.zeros(layers, width, dtype=torch.bool)
    for layer, size in enumerate(sizes):
        mask[layer, torch.from_numpy(generator.permutation(width)[:size])] = True
    return NeuronSet(mask, site, head.architecture)


def _where(head: RewardHead, named: Mapping[str, NeuronScores], positions: str | None) -> tuple[str, str]:
    """The site and positions of all scores; raises unless they are of this model and keep blocks of prompts."""
    if not named:
        raise OptionError("scores: expected at least one NeuronScores, got none.")
    if reserved := sorted(set(named) & set(_COLUMNS)):
        raise OptionError(f"scores: {reserved} are names of columns of the result. Give these methods other names.")
    first = next(iter(named.values())).provenance
    expected = replace(first, architecture=head.architecture, model=head.fingerprint)
    for name, one in named.items():
        one.provenance.require_same(expected, _SAME_MODEL, what=f"faithfulness of {name}")
        one.require_blocks()
    scored_at = {one.provenance.positions for one in named.values()}
    if positions is None and len(scored_at) > 1:
        raise OptionError(
            f"positions: the scores are of {sorted(scored_at)} tokens. Pass positions=... to say where activations are "
            "replaced, or compare scores of the same positions."
        )
    return first.site, scored_at.pop() if positions is None else positions


@dataclass(frozen=True)
class _Planned:
    """A set to ablate, with its random controls."""

    method: str
    fraction: float
    neurons: NeuronSet
    predicted: float
    match: str
    random: list[NeuronSet]


def _plan(named: Mapping[str, NeuronScores], fractions: Sequence[float], n_random: int, seed: int) -> list[_Planned]:
    """Draw all sets before the model runs, so that a set that cannot be drawn raises at once."""
    planned = []
    for name, scores in named.items():
        for fraction in fractions:
            neurons = scores.top(fraction)
            predicted = float(scores.as_effects()[neurons.mask].sum())
            # A layer that is mostly in the set has too few other neurons for a random set of equal size.
            fits = all(2 * n <= neurons.mask.shape[1] for n in neurons.n_per_layer)
            match = "layer" if fits else "model"
            random = [neurons.matched_random(seed=seed + draw, match=match) for draw in range(n_random)]
            planned.append(_Planned(name, fraction, neurons, predicted, match, random))
    return planned


def _set_rows(
    head: RewardHead,
    planned: Sequence[_Planned],
    pairs: PreferencePairs,
    ablate: Callable[..., AblationContext],
    level: float,
    seed: int,
    progress: bool | None,
) -> pd.DataFrame:
    """True and predicted effects of ablating the top sets of each method."""
    if not planned:
        return pd.DataFrame()
    base = head.score_pairs(pairs).margin
    rows = []
    total = sum(1 + len(one.random) for one in planned)
    with progress_bar(progress=progress, total=total, desc="ablate sets", unit="set") as bar:

        def change(neurons: NeuronSet) -> Float[Tensor, "pair"]:
            with ablate(neurons=neurons):
                margin = head.score_pairs(pairs).margin
            bar.update()
            return (margin - base).double()

        for one in planned:
            estimate = bootstrap_mean(change(one.neurons), pairs, level=level, seed=seed)
            random = [float(change(neurons).mean()) for neurons in one.random]
            rows.append(
                {
                    "method": one.method,
                    "fraction": one.fraction,
                    "size": len(one.neurons),
                    "predicted": one.predicted,
                    "effect": estimate.value,
                    "low": estimate.low,
                    "high": estimate.high,
                    "n": estimate.n,
                    "random": float(np.mean(random)) if random else np.nan,
                    "random_min": min(random, default=np.nan),
                    "random_max": max(random, default=np.nan),
                    "n_random": len(random),
                    "match": one.match,
                }
            )
    return pd.DataFrame(rows)
