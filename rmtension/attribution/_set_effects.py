"""Predict what ablating sets of neurons does, from scores of single neurons and a few true ablations."""

from collections.abc import Mapping
from dataclasses import replace
from math import ceil
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Float, Int

from rmtension._arguments import require_arguments
from rmtension.attribution._ratio_process import RatioProcess
from rmtension.attribution._set_effects_result import SetEffects
from rmtension.attribution._set_sums import SCORES, SetSums, SumsOverSets
from rmtension.data._pairs import PreferencePairs
from rmtension.errors import OptionError
from rmtension.evaluation._intervals import check_level
from rmtension.interventions._ablation import AblationContext
from rmtension.interventions._replacement import SingleTextReplacement
from rmtension.interventions._replacements import Zero
from rmtension.interventions._sweep import score_without
from rmtension.models._reward_model import RewardModel
from rmtension.neurons._neuron_set import NeuronSet
from rmtension.passes._pair_pass import run_pass

_METHOD = "predicted effects of sets"
# A true ablation of a set runs this many pairs. With fewer, more sets are seen, but each less well.
_PAIRS_PER_SET = 6
# More true ablations than this take longer to learn from than they are worth.
_MOST_ABLATIONS = 640
_FOLDS = 6


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

    The sum of single scores does not predict a set: attribution patching misses that neurons back each other up and
    that effects saturate, and sums of RelP have the wrong size. Here a few of the sets, and random halves if there are
    few, are truly ablated, on 6 pairs each. A Gaussian process learns from these ablations, pair by pair, how large an
    effect is in units of the scores, given their proportions, their size and the margin. The prediction of a set is the
    mean over all pairs.

    Cost: a forward and a backward pass for attribution patching, the same for RelP, and true ablations that run at most
    as many pairs as `passes` plain passes. Learning takes seconds. `replacement` and `positions` are those of
    `AblationContext`. Needs transformers' own modules, as RelP does.

    Raises `OptionError` for sets of different sites, without sets, and if `passes` over the pairs allow too few true
    ablations of 6 pairs: 19 are needed at the default `level`, and max(12, level / (1 - level)) at others.

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
    head.require_all_pairs()
    sites = sorted({neurons.site for neurons in sets.values()})
    if len(sites) != 1:
        raise OptionError(f"sets: expected at least one set, all of one site, got {sites}.")
    for neurons in sets.values():
        AblationContext(head, neurons, replacement, positions=positions)  # raises for a set of another model
    n_ablated = min(round(passes * len(pairs)), _MOST_ABLATIONS) // _PAIRS_PER_SET
    # The largest of n errors is an upper bound for the next one with probability n / (n + 1).
    n_needed = max(2 * _FOLDS, ceil(level / (1 - level) - 1e-9))
    n_most = _MOST_ABLATIONS // _PAIRS_PER_SET
    if n_needed > n_most:
        raise OptionError(f"level: expected at most {n_most / (n_most + 1):.3f}, got {level:g}.")
    if len(pairs) < _PAIRS_PER_SET or n_ablated < n_needed:
        lower = ", or a lower level" if n_needed > 2 * _FOLDS else ""
        raise OptionError(
            f"pairs, passes: {passes:g} passes over {len(pairs)} pairs allow {n_ablated} true ablations of "
            f"{_PAIRS_PER_SET} pairs, expected at least {n_needed} for intervals at {level:.0%}. Use more pairs or "
            f"passes{lower}."
        )
    asked = [*sets.values(), *_halves(sets, n_ablated, seed)]
    sums = run_pass(head, pairs, SumsOverSets(head, pairs, asked, replacement, positions), progress=progress)
    ablated = _chosen(sums, np.array([number for number, each in enumerate(asked) if len(each)]), n_ablated, seed)
    few = _drawn_pairs(len(pairs), n_ablated, seed)
    observed = []
    for number, rows in zip(ablated.tolist(), few, strict=True):
        some = PreferencePairs([pairs[row] for row in rows.tolist()])
        (rewards,) = score_without(head, some, [asked[number]], replacement, positions=positions, progress=False)
        observed.append(rewards.margin.double().numpy() - sums.margin[rows])
    learned = _Learned(sums, ablated, few, np.stack(observed), seed)
    predicted = np.array([learned.effect(number) for number in range(len(sets))])
    both = learned.checked()
    errors = np.abs(both["effect"] - both["predicted"])
    scales = sums.scales.mean(axis=0)
    power = _power(errors, scales[ablated])
    reach = _quantile(errors / scales[ablated] ** power, level) * scales[: len(sets)] ** power
    # Ablating nothing changes nothing.
    changes = np.array([len(neurons) > 0 for neurons in sets.values()])
    predicted, reach = predicted * changes, reach * changes
    table = pd.DataFrame(
        {
            "set": list(sets),
            "size": [len(neurons) for neurons in sets.values()],
            "predicted": predicted,
            "low": predicted - reach,
            "high": predicted + reach,
            **{name: sums.signed[column, :, : len(sets)].mean(axis=0) for column, name in enumerate(SCORES)},
        }
    )
    names = [*sets, *(f"half {number}" for number in range(len(asked) - len(sets)))]
    labels, sizes = ([part[number] for number in ablated] for part in (names, list(map(len, asked))))
    checked = pd.DataFrame({"set": labels, "size": sizes, "pairs": _PAIRS_PER_SET, **both})
    provenance = replace(sums.provenance, method=_METHOD, replacement=replacement.label)
    return SetEffects(table, checked, provenance, level)


# -- inside ------------------------------------------------------------------------------------------------------------


class _Learned:
    """What the true ablations teach: the effect of any set on any pair, from the sums of its scores."""

    def __init__(
        self,
        sums: SetSums,
        ablated: Int[np.ndarray, "ablated"],
        few: Int[np.ndarray, "ablated pair"],
        observed: Float[np.ndarray, "ablated pair"],
        seed: int,
    ) -> None:
        self._ablated, self._few, self._observed = ablated, few, observed
        self._scales = sums.scales
        seen = sums.features[few, ablated[:, None]].reshape(-1, sums.features.shape[-1])
        self._features = (sums.features - seen.mean(axis=0)) / (seen.std(axis=0) + 1e-9)
        self._folds = np.random.default_rng(seed).permutation(len(ablated)) % _FOLDS
        self._process = self._fitted(np.ones(len(ablated), dtype=bool))

    def effect(self, number: int) -> float:
        """The predicted effect of a set on the mean margin of all pairs."""
        return self._mean(self._process, number, np.arange(len(self._scales)))

    def checked(self) -> dict[str, Float[np.ndarray, "ablated"]]:
        """The effects of the ablated sets on their few pairs, and the effects predicted without the set's fold."""
        predicted = np.zeros(len(self._ablated))
        for fold in range(_FOLDS):
            process = self._fitted(self._folds != fold, like=self._process)
            for row in np.flatnonzero(self._folds == fold):
                predicted[row] = self._mean(process, int(self._ablated[row]), self._few[row])
        return {"effect": self._observed.mean(axis=1), "predicted": predicted}

    def _fitted(self, rows: Any, like: RatioProcess | None = None) -> RatioProcess:
        numbers, few = self._ablated[rows][:, None], self._few[rows]
        ratios = self._observed[rows] / self._scales[few, numbers]
        inputs = self._features[few, numbers]
        return RatioProcess.fit(inputs.reshape(-1, inputs.shape[-1]), ratios.ravel(), like=like)

    def _mean(self, process: RatioProcess, number: int, pairs: Int[np.ndarray, "pair"]) -> float:
        ratios = process.predict(self._features[pairs, number])
        return float((self._scales[pairs, number] * ratios).mean())


def _halves(sets: Mapping[str, NeuronSet], n: int, seed: int) -> list[NeuronSet]:
    """Random halves of the sets, their halves and so on, so that together there are at least `n` sets to ablate."""
    given = [neurons for neurons in sets.values() if len(neurons)]
    if not given:
        raise OptionError("sets: all of them are empty, so ablating them changes nothing.")
    halves: list[NeuronSet] = []
    layer = given
    while layer and len(given) + len(halves) < n:
        layer = [each.subsample(len(each) // 2, seed=seed + len(halves)) for each in layer if len(each) > 1]
        halves += layer
    return halves


def _chosen(sums: SetSums, candidates: Int[np.ndarray, "set"], n: int, seed: int) -> Int[np.ndarray, "ablated"]:
    """The sets to ablate: half of them far from each other in what is known of them, the others at random.

    Sets far from each other include the extremes, between which predictions are safer. If there are fewer candidates
    than `n`, some are taken again, on other pairs.
    """
    generator = np.random.default_rng(seed)
    known = sums.features[..., :-1].mean(axis=0)[candidates]
    known = (known - known.mean(axis=0)) / (known.std(axis=0) + 1e-9)
    chosen = [int(generator.integers(len(candidates)))]
    nearest = np.full(len(candidates), np.inf)
    while len(chosen) < min(n // 2, len(candidates)):
        nearest = np.minimum(nearest, ((known - known[chosen[-1]]) ** 2).sum(axis=1))
        chosen.append(int(nearest.argmax()))
    left = np.setdiff1d(np.arange(len(candidates)), chosen)
    while len(chosen) < n:
        chosen += generator.permutation(left)[: n - len(chosen)].tolist()
        left = np.arange(len(candidates))
    return candidates[chosen]


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


def _power(errors: Float[np.ndarray, "ablated"], scales: Float[np.ndarray, "ablated"]) -> float:
    """How errors grow with the scores of a set: the power from 0 (not at all) to 1 (in proportion) that fits best."""
    least = 1e-3 * errors.mean() + np.finfo(np.float64).tiny
    if np.ptp(np.log(scales)) == 0:
        return 0.0
    return float(np.clip(np.polyfit(np.log(scales), np.log(errors + least), 1)[0], 0, 1))


def _quantile(errors: Float[np.ndarray, "ablated"], level: float) -> float:
    """The error that a share `level` of new sets stays below, if they are drawn like these."""
    ordered = np.sort(errors)
    rank = ceil(level * (len(ordered) + 1) - 1e-9)
    return float(ordered[rank - 1])
