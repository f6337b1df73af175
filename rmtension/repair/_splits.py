"""The pairs of a repair: fit, development and test splits of a weak and a strong objective, and contradictory pairs."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from rmtension.data._pairs import PreferencePairs
from rmtension.errors import DataError, OptionError
from rmtension.evaluation._intervals import exact_ends

SPLITS = ("fit", "development", "test")
# Bounds are one-sided at 95%: the lower ends of intervals of 90%.
LEVEL = 0.90


@dataclass(frozen=True)
class RepairPairs:
    """Pairs of a weak and a strong objective in three splits that share no prompt.

    An edit is computed on `fit`, every choice is made on `development`, and `test` is read once. Each maps the two
    objectives to pairs. `contradictory` holds the pairs that the objectives label in opposite ways: no reward model can
    satisfy both, so they are in no split. An edit may cost the strong objective at most `most_lost` of its accuracy, by
    the lower bound of the change; 0.01 is one point, which takes 299 prompts to show even if no pair is lost.

    Raises `OptionError` for splits that share prompts or lack an objective, and for fewer strong development prompts
    than it takes to show a loss of at most `most_lost`.

    Examples:
        >>> RepairPairs.split(pairs, weak="harmless", strong="helpful", most_lost=0.4)
        RepairPairs(weak harmless, strong helpful: fit 11 + 8, development 8 + 7, test 5 + 9; 0 contradictory)
    """

    weak: str
    strong: str
    fit: Mapping[str, PreferencePairs]
    development: Mapping[str, PreferencePairs]
    test: Mapping[str, PreferencePairs]
    contradictory: Mapping[str, PreferencePairs]
    most_lost: float = 0.01

    def __post_init__(self) -> None:
        if not 0 <= self.most_lost < 1:
            raise OptionError(f"most_lost: expected a share of the pairs, 0 or more and below 1, got {self.most_lost}.")
        for name in (self.weak, self.strong):
            if not isinstance(name, str) or not name.strip() or "\n" in name:
                raise OptionError(f"weak, strong: expected names of one line, got {name!r}.")
        prompts: dict[str, set[object]] = {}
        for split in SPLITS:
            groups = getattr(self, split)
            if set(groups) != {self.weak, self.strong} or not all(map(len, groups.values())):
                raise OptionError(
                    f"{split}: expected pairs of {self.weak!r} and {self.strong!r}, got "
                    f"{ {name: len(part) for name, part in groups.items()} }."
                )
            prompts[split] = {prompt for part in groups.values() for prompt in part.prompts}
        for first, second in (("fit", "development"), ("fit", "test"), ("development", "test")):
            shared = prompts[first] & prompts[second]
            if shared:
                raise OptionError(
                    f"{second}: {len(shared)} of its prompts are in {first} too, so the report would be measured on "
                    "pairs that the edit was fitted to. Use RepairPairs.split(pairs, weak=..., strong=...)."
                )
        n = len(self.development[self.strong].prompts)
        least = -exact_ends(0.0, n, LEVEL)[1]
        if least < -self.most_lost:
            raise OptionError(
                f"development: {n} prompts of {self.strong!r} cannot show that an edit costs at most "
                f"{self.most_lost:g} of its accuracy: if no pair is lost, the lower bound is still {least:.3f}. "
                f"{_more_prompts(self.most_lost)} most_lost={math.ceil(-1000 * least) / 1000:g}."
            )

    def __repr__(self) -> str:
        sizes = ", ".join(
            f"{split} {len(getattr(self, split)[self.weak])} + {len(getattr(self, split)[self.strong])}"
            for split in SPLITS
        )
        n_contradictory = len(self.contradictory[self.weak])
        return f"RepairPairs(weak {self.weak}, strong {self.strong}: {sizes}; {n_contradictory} contradictory)"

    @classmethod
    def split(
        cls,
        pairs: Mapping[str, PreferencePairs],
        *,
        weak: str,
        strong: str,
        shares: Sequence[float] = (0.4, 0.3, 0.3),
        most_lost: float = 0.01,
        seed: int = 0,
    ) -> "RepairPairs":
        """Divide pairs by prompt into splits of these `shares`, after taking contradictory pairs out.

        Raises `OptionError` for an objective that there is not, or for shares that are not three positive numbers with
        the sum 1, and `DataError` if a split gets no pair of an objective.
        """
        if not isinstance(pairs, Mapping):
            raise OptionError(f"pairs: expected a dict of name to PreferencePairs, got a {type(pairs).__name__}.")
        missing = [name for name in (weak, strong) if name not in pairs]
        if missing or weak == strong:
            raise OptionError(f"weak, strong: expected two of {list(pairs)}, got {weak!r} and {strong!r}.")
        if len(shares) != len(SPLITS) or min(shares) <= 0 or abs(sum(shares) - 1) > 1e-9:
            raise OptionError(f"shares: expected three positive numbers with the sum 1, got {list(shares)}.")
        both = {weak: pairs[weak], strong: pairs[strong]}
        contradictory = contradictory_pairs(both[weak], both[strong])
        apart = {name: _keys(part) for name, part in zip(both, contradictory, strict=True)}
        kept = {
            name: PreferencePairs(pair for pair in part if pair.digest() not in apart[name])
            for name, part in both.items()
        }
        for name, part in kept.items():
            if not len(part):
                raise DataError(
                    f"pairs: no {name} pairs are left: of {len(both[name])}, {len(apart[name])} contradict pairs of "
                    f"the other objective. Pass {name} pairs that the other objective does not label the opposite way."
                )
        if _keys(kept[weak]) == _keys(kept[strong]):
            raise OptionError(f"pairs: {weak!r} and {strong!r} have the same pairs. Pass pairs of two objectives.")
        everything = sum(kept.values(), start=PreferencePairs([]))
        n_prompts = len(everything.prompts)
        if n_prompts * min(shares) < 1:
            raise DataError(f"pairs: {n_prompts} prompts are too few for splits of {list(shares)}. Give more pairs.")
        rest, test = everything.split(shares[2], seed=seed)
        fit, development = rest.split(shares[1] / (shares[0] + shares[1]), seed=seed)
        held = {split: set(part.prompts) for split, part in zip(SPLITS, (fit, development, test), strict=True)}
        parts = {
            split: {
                name: PreferencePairs(pair for pair in part if pair.prompt in prompts) for name, part in kept.items()
            }
            for split, prompts in held.items()
        }
        for split, groups in parts.items():
            for name, part in groups.items():
                if not len(part):
                    raise DataError(
                        f"pairs: none of the {len(kept[name])} {name} pairs is in the {split} split. Give more pairs, "
                        "or larger shares."
                    )
        apart_pairs = dict(zip(both, contradictory, strict=True))
        return cls(weak, strong, **parts, contradictory=apart_pairs, most_lost=most_lost)

    def shuffled(self, seed: int) -> "RepairPairs":
        """The same splits with wrong labels for half of the weak fit and development pairs, at random: a control."""
        fit, development = (
            {**groups, self.weak: shuffled_labels(groups[self.weak], seed)} for groups in (self.fit, self.development)
        )
        return replace(self, fit=fit, development=development)


def contradictory_pairs(first: PreferencePairs, second: PreferencePairs) -> tuple[PreferencePairs, PreferencePairs]:
    """The pairs of each group whose prompt and responses are in the other group with the labels exchanged."""
    return _opposed(first, _keys(second)), _opposed(second, _keys(first))


def shuffled_labels(part: PreferencePairs, seed: int) -> PreferencePairs:
    """The pairs with the labels of a random half exchanged: nothing can be learned from them."""
    exchanged = exchanged_labels(len(part), seed)
    return PreferencePairs(
        pair.swapped() if exchange else pair for pair, exchange in zip(part, exchanged.tolist(), strict=True)
    )


def exchanged_labels(n: int, seed: int) -> NDArray[np.bool_]:
    """Which of `n` pairs have their labels exchanged in `shuffled_labels`."""
    return np.random.default_rng(seed).permutation(n) < n // 2


# -- inside ------------------------------------------------------------------------------------------------------------


def _more_prompts(share: float) -> str:
    """How many prompts show a loss of at most `share` if no pair is lost: the beginning of a sentence."""
    if share == 0:
        return "No number of prompts shows a loss of exactly 0: pass"
    return f"Give {math.ceil(math.log((1 - LEVEL) / 2) / math.log(1 - share)):,} prompts, or pass"


def _opposed(pairs: PreferencePairs, others: set[str]) -> PreferencePairs:
    return PreferencePairs(pair for pair in pairs if not pair.is_tie and pair.swapped().digest() in others)


def _keys(pairs: PreferencePairs) -> set[str]:
    return {pair.digest() for pair in pairs}
