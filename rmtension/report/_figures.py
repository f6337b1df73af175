"""The figures of a report: the figures of each section, and their pictures."""

import importlib.util
import io
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd

from rmtension import plots
from rmtension.report._tables import SECTIONS, families_of, rows_of_family
from rmtension.study._result import StudyResult

NO_FIGURES = "No figures: matplotlib is not installed. Install it (`pip install matplotlib`), and write the page again."
_DPI = 144
# Table -> file names, functions and arguments of its figures.
_FIGURES: dict[str, tuple[tuple[str, Callable[..., Any], dict[str, str]], ...]] = {
    "accuracy": (("accuracy", plots.accuracy, {}), ("refuse_respond", plots.refuse_respond, {})),
    "subsets": (("radar", plots.radar, {}),),
    "comparisons": (("comparisons", plots.comparisons, {}),),
    "transferability": (("transferability", plots.transferability, {}),),
    "confidence": (("confidence", plots.confidence, {}),),
    "rewards": (("distributions", plots.distributions, {}),),
    "depth": (("depth", plots.depth, {}),),
    "overlap": (("overlap", plots.overlap, {}),),
    "curves": (
        ("curves_accuracy", plots.curves, {"quantity": "accuracy"}),
        ("curves_margin", plots.curves, {"quantity": "margin_change"}),
    ),
    "ablation": (
        ("matrix_margin", plots.matrix, {"quantity": "margin"}),
        ("matrix_accuracy", plots.matrix, {"quantity": "accuracy"}),
    ),
    "equal_size": (("equal_size", plots.equal_size, {}),),
    "collapse": (("collapse", plots.collapse, {}),),
}


@dataclass(frozen=True)
class Picture:
    """A figure as PNG: its file name, the first line and the rest of its title, and its size in inches."""

    name: str
    caption: str
    rest: str
    png: bytes
    inches: tuple[float, float]


# Table -> its pictures; None without matplotlib.
Pictures = Mapping[str, Sequence[Picture]] | None


def draw_pictures(result: StudyResult) -> Pictures:
    """All figures of a study by table; None without matplotlib."""
    if not can_draw_figures():
        return None
    tables = [section.table for section in SECTIONS if section.table in result.tables]
    return {table: list(_pictures(result, table)) for table in tables}


def can_draw_figures() -> bool:
    """Whether matplotlib is installed."""
    return importlib.util.find_spec("matplotlib") is not None


def as_picture(figure: Any, name: str) -> Picture:
    """A matplotlib figure as PNG; the lines of its title become the caption and the rest."""
    first, *others = str(figure.get_suptitle()).split("\n")
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=_DPI)
    width, height = figure.get_size_inches()
    return Picture(name, re.sub(r"[\[\]]", "", first), " ".join(others), buffer.getvalue(), (width, height))


def _pictures(result: StudyResult, table: str) -> Iterator[Picture]:
    families = families_of(result)
    for number, family in enumerate(families, start=1):
        frame = rows_of_family(result, table, family)
        for name, draw, options in _FIGURES.get(table, ()):
            if _can_draw(name, frame):
                # The number distinguishes families whose names differ only in characters that file names cannot hold.
                suffix = f"-{number}-{re.sub(r'[^A-Za-z0-9_.-]+', '-', family)}" if len(families) > 1 else ""
                yield as_picture(draw(result, family=family, **options), f"{name}{suffix}.png")


def _can_draw(figure: str, frame: pd.DataFrame) -> bool:
    """Whether there are enough rows for a figure; some figures need several."""
    if figure == "radar":
        return len(frame[["objective", "subset"]].drop_duplicates()) >= 3
    if figure == "refuse_respond":
        return {"refusing", "responding"} <= set(frame["measure"])
    return len(frame) > 0
