"""One main number of a study, with its interval, control and n, and the direction that these give it."""

from dataclasses import dataclass

from rmtension.evaluation._intervals import with_interval


@dataclass(frozen=True)
class Finding:
    """One number of a study with its question, interval and control; `none` is the value of no difference.

    `other` is the interval against a second control, if the study drew one. A direction has to hold against both.
    `n_questions` is the number of questions about ablated sets of this family, if this is one of them, and
    `holds_adjusted` says whether the direction also holds when all of them are counted (Holm 1979).
    """

    family: str
    question: str
    quantity: str
    value: float
    low: float
    high: float
    control: str
    n: str
    none: float = 0.0
    identical: bool = False
    other: tuple[float, float] | None = None
    n_questions: int = 1
    holds_adjusted: bool = True

    @property
    def is_same(self) -> bool:
        """Whether nothing can differ: two models are identical, or the difference is exactly none in every pair."""
        return self.identical or bool(self.value == self.low == self.high == self.none)

    @property
    def is_open(self) -> bool:
        """Whether the direction is open: an interval contains the value of no difference, or there is no interval.

        It is also open if the controls do not agree, or if it does not hold when all questions about sets are counted.
        """
        return not self.is_same and (self._side == 0 or self.is_contested or not self.holds_adjusted)

    @property
    def is_contested(self) -> bool:
        """Whether the interval excludes no difference, and the one against the second control does not agree."""
        return self._side != 0 and self.other is not None and side_of(*self.other, self.none) != self._side

    @property
    def direction(self) -> str:
        """Which side of no difference the interval is on, in words."""
        if self.identical:
            return "identical models, the same rewards"
        if self.is_same:
            return "no difference in any pair"
        if self._side == 0:
            return "not decided"
        side = f"{'above' if self._side > 0 else 'below'} {self.none:g}"
        if self.is_contested:
            return f"not decided: {side} by this control only"
        return side if self.holds_adjusted else f"not decided: {side} before adjusting for {self.n_questions} questions"

    @property
    def why_open(self) -> str:
        """Why the direction is open, as a sentence."""
        if self.low != self.low or self.high != self.high:
            return "There is no interval."
        if self._side == 0:
            return f"The interval does not exclude {self.none:g}."
        if self.is_contested:
            return (
                f"The interval excludes {self.none:g}, but the one against the other control is not on the same side."
            )
        return (
            f"The interval excludes {self.none:g}, but the wider one that {self.n_questions} questions about ablated "
            "sets ask for does not."
        )

    @property
    def estimate(self) -> str:
        """The number with its interval."""
        return with_interval(self.value, self.low, self.high, form="+.3f" if self.none == 0 else ".3f")

    @property
    def _side(self) -> int:
        return side_of(self.low, self.high, self.none)


def side_of(low: float, high: float, none: float = 0.0) -> int:
    """1 for an interval above the value of no difference, -1 for one below it, 0 for one that contains it or NaN."""
    return int(low > none) - int(high < none)
