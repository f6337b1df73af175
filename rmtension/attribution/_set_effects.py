"""Predict what ablating sets of neurons does, from scores of single neurons and a few true ablations."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Int
from scipy import stats
from torch import Tensor

from rmtension._arguments import require_arguments
from rmtension.attribution._batch_scores import BatchScorer, run_batch
from rmtension.attribution._methods import METHODS
from rmtension.attribution._ratio_process import RatioProcess
from rmtension.data._pairs import PreferencePairs
from rmtension.data._tokens import TokenBatch, margins
from rmtension.errors import OptionError
from rmtension.evaluation._intervals import check_level
from rmtension.interventions._ablation import AblationContext
from rmtension.interventions._replacement import SingleTextReplacement
from rmtension.interventions._replacements import Zero
from rmtension.interventions._sweep import score_without
from rmtension.models._reward_model import RewardModel
from rmtension.neurons._neuron_set import NeuronSet
from rmtension.passes._pair_pass import run_pass
from rmtension.passes._pair_statistic import PairStatistic
from rmtension.passes._pass_record import PassRecord
from rmtension.store._provenance import Provenance, digest_of
from rmtension.store._records import read_table
from rmtension.store._storage import read_result, write_result

_METHOD = "predicted effects of sets"
_SCORES = ("attribution_patching", "relp")
# A true ablation of a set runs this many pairs. With fewer, more sets are seen, but each less well.
_PAIRS_PER_SET = 8
# More true ablations than this take longer to learn from than they are worth.
_MOST_ABLATIONS = 640
# A part of the magnitudes of single scores in the scale of an effect, so that scores that cancel do not make it 0.
_FLOOR = 0.05
_FOLDS = 6


@dataclass(frozen=True, eq=False)
class SetEffects:
    """The predicted effects of ablating sets, which `predict_set_effects` returns.

    `table` has one row per set: its `size`, the `predicted` change of the mean margin over the pairs, with an interval,
    `low` and `high`, and the sums of the single predictions: `attribution_patching` and `relp`.

    The intervals come from the sets that were truly ablated: each was predicted from the others, and the errors,
    relative to the size of the scores of the set, are as large for a new set as for these (cross-validation+, Barber et
    al. 2021, without their allowance for its variance). They include what ablating on a few pairs adds to the error, so
    they tend to be wide.

    `checked` has one row per truly ablated set: how many `pairs` it ran, the `effect` on them, and the effect on them
    `predicted` from the other sets.
    `spearman` and `slope` compare both columns: the rank correlation, and the least-squares slope of effects on
    predictions, which is 1 if predictions have the right size.

    Examples:
        >>> sets = {"top 2": scores.top(k=2), "top 8": scores.top(k=8), "top 12": scores.top(k=12)}
        >>> predicted = predict_set_effects(head, pairs["helpful"], sets, passes=12, progress=False)
        >>> list(predicted.table.columns)
        ['set', 'size', 'predicted', 'low', 'high', 'attribution_patching', 'relp']
        >>> predicted.save("effects.safetensors")
        >>> SetEffects.load("effects.safetensors").table.equals(predicted.table)
        True
    """

    table: pd.DataFrame
    checked: pd.DataFrame
    provenance: Provenance
    level: float

    @property
    def spearman(self) -> float:
        """The rank correlation of effects with predictions, over the truly ablated sets."""
        return float(stats.spearmanr(self.checked["predicted"], self.checked["effect"]).statistic)

    @property
    def slope(self) -> float:
        """The least-squares slope of effects on predictions, over the truly ablated sets."""
        return float(np.polyfit(self.checked["predicted"], self.checked["effect"], 1)[0])

    def to_frame(self) -> pd.DataFrame:
        """The table `table`."""
        return self.table

    def __repr__(self) -> str:
        return (
            f"SetEffects(of {len(self.table)} sets; {len(self.checked)} ablated on a few pairs: Spearman "
            f"{self.spearman:.2f}, slope {self.slope:.2f})"
        )

    def save(self, path: str | Path) -> None:
        """Write both tables and the provenance to one safetensors file."""
        values: dict[str, Any] = {
            **{name: getattr(self, name).to_dict("split", index=False) for name in ("table", "checked")},
            "provenance": self.provenance.to_dict(),
            "level": self.level,
        }
        write_result(path, "SetEffects", {}, values)

    @classmethod
    def load(cls, path: str | Path) -> "SetEffects":
        """Read a file that `save` wrote; raises `StorageError` if it is missing, damaged or of another kind."""
        path = Path(path)
        expected = {"table": dict, "checked": dict, "provenance": dict, "level": float}
        _, values = read_result(path, "SetEffects", tensors={}, values=expected)
        tables = {name: read_table(path, values[name], ["set"]) for name in ("table", "checked")}
        return cls(**tables, provenance=Provenance.from_dict(values["provenance"]), level=values["level"])


def predict_set_effects(
    head: RewardModel,
    pairs: PreferencePairs,
    sets: Mapping[str, NeuronSet],
    replacement: SingleTextReplacement = Zero(),
    *,
    positions: str = "all",
    passes: int | float = 3,
    level: float = 0.95,
    seed: int = 0,
    progress: bool | None = None,
) -> SetEffects:
    """Predict the change of the mean margin when each of many sets is ablated, without ablating them on all pairs.

    Sums of single scores fail for sets: attribution patching misses that neurons back each other up and that effects
    saturate, RelP has the wrong size. Here a few sets, the given ones and random halves of them, are truly ablated, on
    8 pairs each. From these ablations a Gaussian process learns, pair by pair, how an effect relates to both sums: the
    ratio of the effect to the size of the scores, as a function of their proportions, their size and the margin. The
    prediction of a set is the mean over all pairs.

    Cost: a forward and a backward pass for attribution patching, the same for RelP, and true ablations that run at most
    as many pairs as `passes` plain passes. Learning takes seconds. `replacement` and `positions` are those of
    `AblationContext`. Needs transformers' own modules, as RelP does.

    Raises `OptionError` for sets of different sites, without sets, and for fewer pairs or passes than 12 true ablations
    of 8 pairs need.

    Examples:
        >>> sets = {"top 2": scores.top(k=2), "top 8": scores.top(k=8), "top 12": scores.top(k=12)}
        >>> predicted = predict_set_effects(head, pairs["helpful"], sets, passes=12, progress=False)
        >>> true = head.with_ablation(sets["top 8"]).score_pairs(pairs["helpful"]).margin.mean() - scored.margin.mean()
        >>> row = predicted.table.set_index("set").loc["top 8"]
        >>> bool(row["low"] < true < row["high"])
        True
    """
    require_arguments(
        "predict_set_effects(head, pairs, sets)", head=(head, RewardModel), pairs=(pairs, PreferencePairs),
        sets=(sets, Mapping),
    )  # fmt: skip
    check_level(level)
    sites = sorted({neurons.site for neurons in sets.values()})
    if len(sites) != 1:
        raise OptionError(f"sets: expected at least one set, all of one site, got {sites}.")
    for neurons in sets.values():
        AblationContext(head, neurons, replacement, positions=positions)  # raises for a set of another model
    n_ablated = min(round(passes * len(pairs)), _MOST_ABLATIONS) // _PAIRS_PER_SET
    if len(pairs) < _PAIRS_PER_SET or n_ablated < 2 * _FOLDS:
        raise OptionError(
            f"pairs, passes: {passes:g} passes over {len(pairs)} pairs allow {n_ablated} true ablations of "
            f"{_PAIRS_PER_SET} pairs, expected at least {2 * _FOLDS}. Use more pairs or passes."
        )
    ablated = _drawn_sets(sets, n_ablated, seed)
    asked = [*sets.values(), *ablated]
    sums = run_pass(head, pairs, _Sums(head, pairs, asked, replacement, positions), progress=progress)
    few = _drawn_pairs(len(pairs), n_ablated, seed)
    observed = []
    for neurons, rows in zip(ablated, few, strict=True):
        some = PreferencePairs([pairs[row] for row in rows.tolist()])
        (rewards,) = score_without(head, some, [neurons], replacement, positions=positions, progress=False)
        observed.append(rewards.margin.double().numpy() - sums.margin[rows])
    learned = _Learned(sums, np.arange(len(sets), len(asked)), few, np.stack(observed), seed)
    predicted = np.array([learned.effect(number) for number in range(len(sets))])
    errors, both = learned.checked()
    reach = _quantile(errors, level)
    scales = np.array([learned.scale(number) for number in range(len(sets))])
    table = pd.DataFrame(
        {
            "set": list(sets),
            "size": [len(neurons) for neurons in sets.values()],
            "predicted": predicted,
            "low": predicted - reach * scales,
            "high": predicted + reach * scales,
            **{name: sums.signed[column, :, : len(sets)].mean(axis=0) for column, name in enumerate(_SCORES)},
        }
    )
    sizes = [len(neurons) for neurons in ablated]
    checked = pd.DataFrame({"set": range(n_ablated), "size": sizes, "pairs": _PAIRS_PER_SET, **both})
    provenance = replace(sums.provenance, method=_METHOD, replacement=replacement.label)
    return SetEffects(table, checked, provenance, level)


# -- inside ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class _SetSums:
    """Sums over sets of the scores of every pair, signed and as magnitudes, and the margins."""

    signed: Float[np.ndarray, "score pair set"]
    absolute: Float[np.ndarray, "score pair set"]
    margin: Float[np.ndarray, "pair"]
    provenance: Provenance


class _Sums(PairStatistic[_SetSums]):
    """The sums over sets of both scores of every pair: one forward and one backward pass each."""

    keeps_layers = True
    name = "scores of sets"

    def __init__(
        self,
        head: RewardModel,
        pairs: PreferencePairs,
        sets: Sequence[NeuronSet],
        replacement: SingleTextReplacement,
        positions: str,
    ) -> None:
        site = sets[0].site
        self._scorers = [
            BatchScorer(head, METHODS[name], site, positions, "signed", replacement, 1, graddrop=False)
            for name in _SCORES
        ]
        self._masks = torch.stack([neurons.mask.flatten() for neurons in sets], dim=1).double()
        self._values = torch.zeros(len(pairs), 1 + 2 * len(_SCORES) * len(sets), dtype=torch.float64)
        self.sharing = "pair" if replacement.shares_tokens else "none"

    @property
    def settings(self) -> Mapping[str, Any]:
        """The settings of the scorers, and the sets."""
        return {"attributions": [scorer.settings for scorer in self._scorers], "sets": digest_of(self._masks)}

    @property
    def state(self) -> Mapping[str, Tensor]:
        """The margins and sums so far, [pair, value]."""
        return {"values": self._values}

    def observe(self, batch: TokenBatch) -> list[Tensor]:
        """The margin of every pair, and its sums over the sets."""
        run = run_batch(self._scorers, batch)
        assert run.rewards is not None
        parts = [margins(run.rewards).double().cpu()[:, None]]
        for scorer in self._scorers:
            scores = scorer.signed_of_pairs(run)[0].flatten(1).double().cpu()
            parts += [scores @ self._masks, scores.abs() @ self._masks]
        return [torch.cat(parts, dim=1)]

    def update(self, batch: TokenBatch, observed: list[Tensor]) -> None:
        """Store the values at the indices of their pairs."""
        self._values[list(batch.indices[: batch.n_pairs])] = observed[0]

    def compute(self, record: PassRecord) -> _SetSums:
        """All values; a pair that was skipped has none, so it raises."""
        record.require_pairs()
        if record.skipped:
            raise OptionError(
                f"pairs: {len(record.skipped)} pairs gave NaN or infinite scores and were skipped. Leave them out: "
                f"{list(record.skipped.values())[:3]}."
            )
        values = self._values.numpy()
        shape = (len(values), len(_SCORES), 2, self._masks.shape[1])
        sums = values[:, 1:].reshape(shape).transpose(2, 1, 0, 3)
        head = self._scorers[0].head
        provenance = record.provenance(
            head, site=self._scorers[0].site, positions=self._scorers[0].positions, method=_METHOD
        )
        return _SetSums(sums[0], sums[1], values[:, 0], provenance)


class _Learned:
    """What the true ablations teach: the effect of any set on any pair, from the sums of its scores."""

    def __init__(
        self,
        sums: _SetSums,
        ablated: Int[np.ndarray, "ablated"],
        few: Int[np.ndarray, "ablated pair"],
        observed: Float[np.ndarray, "ablated pair"],
        seed: int,
    ) -> None:
        self._sums, self._ablated, self._few, self._observed = sums, ablated, few, observed
        squares = sums.signed**2 + _FLOOR * sums.absolute**2
        # The scale of an effect: of 0 only if no neuron of the set has a score.
        self._scales = np.sqrt(squares.sum(axis=0)) + np.finfo(np.float64).tiny
        whole = np.sqrt(np.mean(sums.margin**2)) + np.finfo(np.float64).tiny
        features = [part / self._scales for part in sums.signed]
        features += [np.log(self._scales / whole), np.broadcast_to(sums.margin[:, None] / whole, self._scales.shape)]
        stacked = np.stack(features, axis=-1)
        seen = stacked[few, ablated[:, None]].reshape(-1, stacked.shape[-1])
        self._features = (stacked - seen.mean(axis=0)) / (seen.std(axis=0) + 1e-9)
        self._folds = np.random.default_rng(seed).permutation(len(ablated)) % _FOLDS
        self._process = self._fitted(np.ones(len(ablated), dtype=bool))

    def effect(self, number: int) -> float:
        """The predicted effect of a set on the mean margin of all pairs."""
        return self._mean(self._process, number, np.arange(len(self._sums.margin)))

    def scale(self, number: int) -> float:
        """The size of the scores of a set: its mean over all pairs."""
        return float(self._scales[:, number].mean())

    def checked(self) -> tuple[Float[np.ndarray, "ablated"], dict[str, Float[np.ndarray, "ablated"]]]:
        """The errors of the ablated sets, predicted without their fold, relative to their sizes; and both effects."""
        predicted = np.zeros(len(self._ablated))
        sizes = np.zeros(len(self._ablated))
        for fold in range(_FOLDS):
            process = self._fitted(self._folds != fold, like=self._process)
            for row in np.flatnonzero(self._folds == fold):
                predicted[row] = self._mean(process, int(self._ablated[row]), self._few[row])
                sizes[row] = self._scales[self._few[row], self._ablated[row]].mean()
        effects = self._observed.mean(axis=1)
        return np.abs(effects - predicted) / sizes, {"effect": effects, "predicted": predicted}

    def _fitted(self, rows: Any, like: RatioProcess | None = None) -> RatioProcess:
        numbers, few = self._ablated[rows][:, None], self._few[rows]
        ratios = self._observed[rows] / self._scales[few, numbers]
        inputs = self._features[few, numbers]
        return RatioProcess.fit(inputs.reshape(-1, inputs.shape[-1]), ratios.ravel(), like=like)

    def _mean(self, process: RatioProcess, number: int, pairs: Int[np.ndarray, "pair"]) -> float:
        ratios = process.predict(self._features[pairs, number])
        return float((self._scales[pairs, number] * ratios).mean())


def _drawn_sets(sets: Mapping[str, NeuronSet], n: int, seed: int) -> list[NeuronSet]:
    """`n` sets to ablate: given ones in random order, and once all are taken random halves of them, nested."""
    generator = np.random.default_rng(seed)
    given = [neurons for neurons in sets.values() if len(neurons)]
    if not given:
        raise OptionError("sets: all of them are empty, so ablating them changes nothing.")
    drawn: list[NeuronSet] = []
    layer = given
    while len(drawn) < n:
        drawn += [layer[number] for number in generator.permutation(len(layer))[: n - len(drawn)]]
        halves = [neurons.subsample(len(neurons) // 2, seed=seed + len(drawn)) for neurons in layer if len(neurons) > 1]
        layer = halves or given
    return drawn


def _drawn_pairs(n_pairs: int, n_sets: int, seed: int) -> Int[np.ndarray, "set pair"]:
    """Pairs for every set, so that all pairs are used about equally often."""
    generator = np.random.default_rng(seed)
    rounds = -(-n_sets * _PAIRS_PER_SET // n_pairs) + 1
    order = np.concatenate([generator.permutation(n_pairs) for _ in range(rounds)])
    rows: list[list[int]] = []
    position = 0
    for _ in range(n_sets):
        row = list(dict.fromkeys(order[position : position + _PAIRS_PER_SET].tolist()))
        position += _PAIRS_PER_SET
        # A set that spans two rounds may have drawn a pair twice.
        left = [number for number in range(n_pairs) if number not in row]
        row += generator.permutation(left)[: _PAIRS_PER_SET - len(row)].tolist()
        rows.append(row)
    return np.array(rows)


def _quantile(errors: Float[np.ndarray, "ablated"], level: float) -> float:
    """The error that a share `level` of new sets stays below, if they are drawn like these."""
    ordered = np.sort(errors)
    rank = int(np.ceil(level * (len(ordered) + 1)))
    return float(ordered[min(rank, len(ordered)) - 1])
