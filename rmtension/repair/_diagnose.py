"""What can be mended, before anything is edited."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from jaxtyping import Float
from torch import Tensor

from rmtension.data._pairs import PreferencePairs
from rmtension.errors import ModelError, OptionError
from rmtension.evaluation._intervals import Estimate, bootstrap_share
from rmtension.repair._ceiling import SpecialistEnsemble, closed_share
from rmtension.repair._choice import change_of_accuracy, correct
from rmtension.repair._edit import Edit, has_reward_row
from rmtension.repair._features import GroupMargins, ReadStates, SplitStates, margins_of, read_states
from rmtension.repair._probe import fit_probe
from rmtension.repair._refit import refit_head
from rmtension.repair._splits import RepairPairs
from rmtension.reward_head import RewardHead

# A feature counts as present if a probe recovers at least this share of the gap.
_PRESENT = 0.5


@dataclass(frozen=True)
class Diagnosis:
    """What a repair can hope for, measured on development pairs.

    - `contradictory`: the share of the weak objective's pairs that the strong one labels in the opposite way.
    - `before` and `ceiling`: the weak objective's accuracy per pair, and what can be reached. `ceiling_of` says how
      that is known: by "specialists", or by a "probe": a reward row that is fitted to the weak objective nearly alone.
    - `gap`: their difference, pair by pair: what can be mended.
    - `probe`: the share of the gap that the probe recovers; `is_present` says that this is half or more: the states
      that the reward is read from hold what the objective needs. If not, an edit of the row can do nothing, and edits
      of neurons have little to work with. Without specialists the probe is the ceiling, and what it does not recover
      is not known. NaN for a reward that is not one row of a linear head.
    - `predicted`: the share of the gap that an edit is predicted to close: that of the best refit that spares the
      strong objective.

    Examples:
        >>> from rmtension.synthetic import plant_damage
        >>> damaged = plant_damage(head, pairs["harmless"], n=4, factor=-0.5).head
        >>> found = diagnose(damaged, pairs, weak="harmless", strong="helpful", most_lost=0.4, progress=False)
        >>> found.has_gap, found.is_present, found.ceiling_of
        (True, True, 'probe')
    """

    weak: str
    strong: str
    contradictory: float
    before: Estimate
    ceiling: Estimate
    ceiling_of: str
    gap: Estimate
    probe: Estimate
    predicted: Estimate

    @property
    def is_present(self) -> bool:
        """Whether a probe recovers at least half of the gap."""
        return self.probe.value >= _PRESENT

    @property
    def has_gap(self) -> bool:
        """Whether the interval of the gap is above 0."""
        return self.gap.low > 0

    @property
    def n_needed(self) -> int | None:
        """About how many development prompts would show a gap of this size; None if there are enough, or no gap."""
        if self.has_gap or self.gap.value <= 0:
            return None
        half = (self.gap.high - self.gap.low) / 2
        return int(self.gap.n_prompts * (half / self.gap.value) ** 2) + 1

    def __repr__(self) -> str:
        lines = [
            f"Diagnosis: {self.weak} is the weak objective, {self.strong} the one to keep",
            f"  accuracy on {self.weak}: {self.before}; it can reach {self.ceiling} (by {self.ceiling_of})",
            f"  repairable gap: {self.gap}; contradictory pairs: {self.contradictory:.1%}, not counted in it",
        ]
        if not self.has_gap:
            more = "" if self.n_needed is None else f" About {self.n_needed:,} prompts would decide a gap of this size."
            if self.ceiling_of == "probe":
                more += " Pass specialists of both objectives to measure what the states of this model do not hold."
            return "\n".join([*lines, f"  Nothing to repair is shown: the interval of the gap includes 0.{more}"])
        if math.isnan(self.probe.value):
            return "\n".join([*lines, "  no refit predicts a closed share: the reward is not one row of a linear head"])
        if self.ceiling_of != "probe":
            held = "holds" if self.is_present else "does not hold"
            lines.append(
                f"  the state that the reward is read from {held} what {self.weak} needs: a probe recovers "
                f"{self.probe} of the gap"
            )
        return "\n".join([*lines, f"  predicted closed share of an edit that spares {self.strong}: {self.predicted}"])


def diagnose(
    head: RewardHead,
    pairs: Mapping[str, PreferencePairs] | RepairPairs,
    *,
    weak: str | None = None,
    strong: str | None = None,
    specialists: Mapping[str, RewardHead] | None = None,
    most_lost: float = 0.01,
    level: float = 0.95,
    seed: int = 0,
    progress: bool | None = None,
) -> Diagnosis:
    """Say what a repair of the weak objective can hope for, from the fit and development pairs; the test is not read.

    `pairs` are pairs by objective, divided by `RepairPairs.split` with `seed` and `most_lost`, or a `RepairPairs`.
    Raises `CheckError` if the model fails `head.check()`. Cost: the check, and forward passes over the fit and
    development pairs, of the model and of the specialists.

    Examples:
        >>> whole = diagnose(head, pairs, weak="harmless", strong="helpful", most_lost=0.4, progress=False)
        >>> whole.has_gap, whole.gap.value
        (False, 0.0)
    """
    split = divide(pairs, weak, strong, most_lost, seed)
    return Evidence.gather(head, split, specialists, progress=progress).diagnosis(level=level, seed=seed)


def divide(
    pairs: Mapping[str, PreferencePairs] | RepairPairs,
    weak: str | None,
    strong: str | None,
    most_lost: float,
    seed: int,
) -> RepairPairs:
    """The pairs in three splits, if they are not yet."""
    if isinstance(pairs, RepairPairs):
        if weak not in (None, pairs.weak) or strong not in (None, pairs.strong):
            raise OptionError(
                f"weak, strong: the splits are made for weak {pairs.weak!r} and strong {pairs.strong!r}, got {weak!r} "
                f"and {strong!r}. Leave them out, or divide the pairs again with RepairPairs.split."
            )
        return pairs
    if weak is None or strong is None:
        raise OptionError(f"weak, strong: expected two of {list(pairs)}, got {weak!r} and {strong!r}.")
    return RepairPairs.split(pairs, weak=weak, strong=strong, most_lost=most_lost, seed=seed)


@dataclass(frozen=True, eq=False)
class Evidence:
    """What diagnosis, ceiling and controls of one repair share: the states, the best refit, probe, and ensemble.

    `probe` is what is added to the row so that it serves the weak objective nearly alone.
    """

    head: RewardHead
    pairs: RepairPairs
    states: SplitStates | None
    before: GroupMargins
    refit: Edit | None
    probe: Float[Tensor, "d_model"] | None
    ensemble: SpecialistEnsemble | None

    @classmethod
    def gather(
        cls,
        head: RewardHead,
        pairs: RepairPairs,
        specialists: Mapping[str, RewardHead] | None,
        *,
        progress: bool | None = None,
    ) -> "Evidence":
        """Check the model, run the fit and development pairs, and refit the reward row if there is one.

        Raises `CheckError` if the model fails `head.check()`, and `ModelError` if its reward is not one row of a linear
        head and there are no specialists.
        """
        head.check(pairs.fit[pairs.weak])
        ensemble = None if specialists is None else SpecialistEnsemble(specialists, pairs, progress=progress)
        if not has_reward_row(head):
            if ensemble is None:
                raise ModelError(
                    "specialists: the reward of this model is not one row of a linear head, so no refit of a row says "
                    "what can be reached. Pass specialists=..., a model for each objective."
                )
            return cls(head, pairs, None, margins_of(head, pairs.development, progress=progress), None, None, ensemble)
        states = SplitStates.of(head, pairs, progress=progress)
        refit, _ = refit_head(head, pairs, states=states)
        probe = fit_probe(states.fit[pairs.weak], states.fit[pairs.strong], pairs.fit[pairs.weak])
        return cls(head, pairs, states, states.margins, refit, probe, ensemble)

    def ceiling(self, part: PreferencePairs, states: ReadStates | None = None) -> Float[Tensor, "pair"]:
        """The margins of weak pairs at the ceiling: those of the ensemble, or with the probe's row.

        `states` are those of the pairs, if they are known. Cost: a forward pass of the specialists, or of the model.
        """
        if self.ensemble is not None:
            return self.ensemble.margins(part)
        assert self.probe is not None
        known = read_states(self.head, part) if states is None else states
        return known.margin + known.difference @ self.probe

    def diagnosis(self, *, level: float = 0.95, seed: int = 0) -> Diagnosis:
        """What a repair can hope for."""
        pairs, weak, strong = self.pairs, self.pairs.weak, self.pairs.strong
        development = pairs.development[weak]
        states = None if self.states is None else self.states.development[weak]
        before, ceiling = self.before[weak], self.ceiling(development, states)
        n_apart = len(pairs.contradictory[weak])
        n_all = n_apart + sum(len(part[weak]) for part in (pairs.fit, pairs.development, pairs.test))
        judging: dict[str, Any] = {"level": level, "seed": seed}
        nan = float("nan")
        unknown = Estimate(nan, nan, nan, len(development), len(development.prompts), level)
        probe = predicted = unknown
        if states is not None and self.probe is not None:
            row = None if self.refit is None else self.refit.row
            refitted = before if row is None else before + states.difference @ row.double()
            probed = before + states.difference @ self.probe
            probe, predicted = (
                closed_share(development, before, after, ceiling, **judging) for after in (probed, refitted)
            )
        return Diagnosis(
            weak,
            strong,
            n_apart / n_all,
            bootstrap_share(correct(before), development, **judging),
            bootstrap_share(correct(ceiling), development, **judging),
            "probe" if self.ensemble is None else "specialists",
            change_of_accuracy(correct(ceiling) - correct(before), development, **judging),
            probe,
            predicted,
        )
