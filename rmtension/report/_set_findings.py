"""What a study says about ablated sets, with directions that are adjusted for the number of these questions."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from rmtension.report._finding import Finding, side_of
from rmtension.report._mean_row import mean_row, n_of
from rmtension.study._result import StudyResult

_QUESTIONS = {
    "mixed top": "Do the mixed model's own top neurons carry the {} margin?",
    "shared": "Do shared neurons carry the {} margin?",
}
_CONTROLS = ("layer", "magnitude")


def set_findings(result: StudyResult, family: str) -> Iterator[Finding]:
    """The findings about ablated sets of a family; those of one set and objective have one per kind of random sets."""
    questions = [question for question in _asked(result, family) if question.cells]
    decided = _decided_together(questions, float(result.summary["options"]["level"]))
    for question, is_decided in zip(questions, decided, strict=True):
        found = [
            replace(cell.finding(), n_questions=len(questions), holds_adjusted=is_decided) for cell in question.cells
        ]
        if len(found) == 2:
            first, second = ((one.low, one.high) for one in found)
            found = [replace(found[0], other=second), replace(found[1], other=first)]
        yield from found


# -- inside ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Cell:
    """One row of a study, as its mean over seeds: where it is, and what the report calls it."""

    result: StudyResult
    family: str
    question: str
    quantity: str
    table: str
    where: dict[str, str]
    columns: tuple[str, str, str]
    extra: tuple[str, ...]

    @cached_property
    def at_own_level(self) -> Any:
        """The row at the level of the study."""
        return self.row()

    def row(self, level: float | None = None) -> Any:
        return mean_row(self.result, self.family, self.table, self.where, self.columns, self.extra, level=level)

    @property
    def is_comparison(self) -> bool:
        """Whether there is something to compare: neurons were ablated, and random sets of their size were drawn."""
        row = self.at_own_level
        return row is not None and bool(row["size"]) and not math.isnan(row.get("random_effect", 0.0))

    def finding(self) -> Finding:
        row = self.at_own_level
        if self.table == "ablation":
            control = f"without them {row['effect']:+.3f}, random sets {row['random_effect']:+.3f}"
            n = n_of(row)
        else:
            control = f"retained: helpful {row['retained_helpful']:.3f}, harmless {row['retained_harmless']:.3f}"
            n = " and ".join(str(part["evaluating"]) for part in self.result.summary["pairs"].values())
        return Finding(self.family, self.question, self.quantity, row["value"], row["low"], row["high"], control, n)


@dataclass(frozen=True)
class _Question:
    """A question about an ablated set, with a row for each kind of random sets that it is compared with."""

    cells: Sequence[_Cell]

    def is_decided(self, level: float) -> bool:
        """Whether the intervals of all rows at this level are on the same side of 0."""
        rows = [cell.row(level) for cell in self.cells]
        return {side_of(row["low"], row["high"]) for row in rows} in ({1}, {-1})


def _asked(result: StudyResult, family: str) -> Iterator[_Question]:
    columns = ("beyond_random", "beyond_low", "beyond_high")
    for name, question in _QUESTIONS.items():
        for objective in ("helpful", "harmless"):
            where = {"set": name, "objective": objective, "quantity": "margin"}
            cells = [
                _Cell(
                    result, family, question.format(objective), f"change of the margin beyond random ({control})",
                    "ablation", where | {"control": control}, columns, ("random_effect", "effect", "size"),
                )
                for control in _CONTROLS
            ]  # fmt: skip
            yield _Question([cell for cell in cells if cell.is_comparison])
    retained = _Cell(
        result, family, "Does ablating shared neurons cost one objective more?",
        "retained share of the margin, helpful - harmless", "collapse", {"set": "shared", "quantity": "margin"},
        ("difference", "difference_low", "difference_high"), ("retained_helpful", "retained_harmless", "size"),
    )  # fmt: skip
    yield _Question([retained] if retained.is_comparison else [])


def _decided_together(questions: Sequence[_Question], level: float) -> list[bool]:
    """Which questions have a direction, so that about a share `level` of studies has no wrong one.

    Holm's procedure (1979) on intervals, as far as each of them keeps its level: with m questions left, each is asked
    at 1 - (1 - level) / m.
    """
    decided = [False] * len(questions)
    while not all(decided):
        at = 1 - (1 - level) / (len(questions) - sum(decided))
        found = [known or one.is_decided(at) for known, one in zip(decided, questions, strict=True)]
        if found == decided:
            break
        decided = found
    return decided
