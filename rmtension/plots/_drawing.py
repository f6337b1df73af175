"""Shared parts of all figures: figures without pyplot, colours, dots with intervals, legends outside."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import ceil
from textwrap import wrap
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from rmtension.errors import OptionError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

WIDTH = 8.0
GREY = "#8A8A8A"
_SMALL = 8.5
# About the number of characters of small text in an inch.
_CHARACTERS = 13
# The palette of Okabe and Ito, which people with any colour vision can tell apart.
_PALETTE = ("#CC79A7", "#E69F00", "#56B4E9", "#0072B2", "#D55E00", "#009E73", "#F0E442")
_COLOURS = {
    "helpful": "#0072B2",
    "harmless": "#D55E00",
    "mixed": "#009E73",
    "helpful only": "#0072B2",
    "harmless only": "#D55E00",
    "shared": "#CC79A7",
    "mixed top": "#009E73",
    "base top": GREY,
    "length only": GREY,
    "random": GREY,
    "chosen": "#56B4E9",
    "rejected": "#E69F00",
    "early": "#F0E442",
    "middle": "#56B4E9",
    "late": "#0072B2",
}
_MARKERS = "osD^vPX*"


def colours(names: Iterable[str]) -> dict[str, str]:
    """A colour per name; names of models and sets in a study always have the same colour."""
    names = list(names)
    others = [name for name in names if name not in _COLOURS]
    taken = {_COLOURS[name] for name in names if name in _COLOURS}
    free = [colour for colour in _PALETTE if colour not in taken] or _PALETTE
    return _COLOURS | {name: free[index % len(free)] for index, name in enumerate(others)}


def looks(names: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Colour and marker per name, so that names differ in more than colour."""
    palette = colours(names)
    return {
        name: {"color": palette[name], "marker": _MARKERS[index % len(_MARKERS)]} for index, name in enumerate(names)
    }


def as_text(name: object) -> str:
    """A text of the data for matplotlib, which reads dollar signs as formulas and hides labels that begin with "_"."""
    text = str(name).replace("$", r"\$")
    return f"\N{ZERO WIDTH SPACE}{text}" if text.startswith("_") else text


def readable(name: object) -> str:
    """The name of a column or score, with spaces for underscores."""
    return str(name).replace("_", " ")


@dataclass(frozen=True, eq=False)
class Canvas:
    """A figure and its panels; `own` is False if the user gave the axis."""

    figure: "Figure"
    panels: "list[Axes]"
    columns: int
    own: bool

    @classmethod
    def of(
        cls,
        ax: "Axes | None",
        n: int = 1,
        *,
        height: float,
        columns: int = 3,
        share_x: bool = False,
        share_y: bool = False,
        choose: str = "",
        polar: bool = False,
    ) -> "Canvas":
        """`n` panels of `height` inches in rows of `columns`, or the axis that was given."""
        if ax is not None:
            if n != 1:
                raise OptionError(
                    f"ax: an axis holds one panel, and this figure has {n}. Select a panel with {choose}."
                )
            if polar != (ax.name == "polar"):
                kind = "a polar axis (projection='polar')" if polar else "an axis with straight coordinates"
                raise OptionError(f"ax: expected {kind}, got a {ax.name} axis.")
            owner: Any = ax.figure
            return cls(owner, [ax], 1, own=False)
        try:
            from rmtension.plots._figure import ShownFigure
        except ImportError as error:
            raise OptionError("plots: needs matplotlib. Run `pip install matplotlib`.") from error
        columns = min(columns, n)
        rows = ceil(n / columns)
        # Without pyplot there is no global state and no window, and the figure is freed with its last reference.
        figure = ShownFigure(figsize=(WIDTH, rows * height + 1.1), layout="constrained")
        kind_of: dict[str, Any] = {"polar": True} if polar else {}
        grid = figure.subplots(rows, columns, squeeze=False, sharex=share_x, sharey=share_y, subplot_kw=kind_of)
        panels = list(grid.ravel())
        for unused in panels[n:]:
            unused.set_visible(False)
        return cls(figure, panels[:n], columns, own=True)

    def left(self, number: int) -> bool:
        """Whether a panel is at the left edge, where labels are drawn."""
        return number % self.columns == 0

    def bottom(self, number: int) -> bool:
        """Whether there is no panel below this one."""
        return number + self.columns >= len(self.panels)

    def finish(self, title: str, names: Sequence[str] = (), *, legend: str | None = None) -> "Figure":
        """Add the title, the panels' `names`, and one legend for everything that is labelled, outside the panels."""
        marks: dict[str, Any] = {}
        for number, axes in enumerate(self.panels):
            axes.tick_params(labelsize=_SMALL)
            axes.xaxis.label.set_fontsize(9)
            axes.yaxis.label.set_fontsize(9)
            if axes.name != "polar":
                axes.spines[["top", "right"]].set_visible(False)
                if self.own and self.bottom(number):
                    # With a shared scale, matplotlib leaves out the numbers even if there is no panel below.
                    axes.tick_params(labelbottom=True)
            handles, labels = axes.get_legend_handles_labels()
            marks |= {label: handle for label, handle in zip(labels, handles, strict=True) if label not in marks}
        if self.own:
            self._head(title, names)
            location: dict[str, Any] = {"loc": "outside lower center"}
            if marks:
                self.figure.legend(list(marks.values()), list(marks), **location, **_legend(marks, WIDTH, legend))
        else:
            self._head_given(title, names)
            if marks:
                self._legend_given(marks, legend)
        return self.figure

    def _head(self, title: str, names: Sequence[str]) -> None:
        self.figure.suptitle(title, fontsize=10.5)
        for axes, name in zip(self.panels, names, strict=False):
            axes.set_title(name, fontsize=9.5)

    def _head_given(self, title: str, names: Sequence[str]) -> None:
        """Set the title in lines no wider than the axis, whose width before the layout is approximate."""
        axes = self.panels[0]
        wide = max(20, int(axes.get_window_extent().width / self.figure.dpi * _CHARACTERS))
        lines = [part for line in (*title.split("\n"), *names) for part in wrap(line, wide)]
        # A polar axis has labels around the circle, which need room.
        axes.set_title("\n".join(lines), fontsize=9, pad=20 if axes.name == "polar" else None)

    def _legend_given(self, marks: dict[str, Any], legend: str | None) -> None:
        """Draw the legend below the axis and its label; next to it, the legend would take the width of narrow axes."""
        from matplotlib.transforms import ScaledTranslation

        axes = self.panels[0]
        below = axes.transAxes + ScaledTranslation(0, -34 / 72, self.figure.dpi_scale_trans)
        location: dict[str, Any] = {"loc": "upper center", "bbox_to_anchor": (0.5, 0), "bbox_transform": below}
        width = axes.get_window_extent().width / self.figure.dpi
        axes.legend(list(marks.values()), list(marks), **location, **_legend(marks, width, legend))


def _legend(marks: Mapping[str, Any], width: float, title: str | None) -> dict[str, Any]:
    """Keyword arguments of a legend that fits in `width` inches."""
    columns = len(marks)
    # All columns have the width of the longest name; a mark takes about as much room as 6 characters.
    while columns > 1 and columns * 6 + sum(sorted(map(len, marks))[-columns:]) > _CHARACTERS * width:
        columns -= 1
    # Fill the rows as evenly as possible.
    columns = ceil(len(marks) / ceil(len(marks) / columns)) if marks else 1
    style = {"frameon": False, "fontsize": _SMALL, "title": title, "title_fontsize": _SMALL}
    return style | {"ncols": columns, "columnspacing": 1.4}


def name_rows(axes: "Axes", labels: Sequence[str]) -> None:
    """Label the rows from top to bottom, and shade every other row grey."""
    axes.set_yticks(range(len(labels)), labels)
    axes.set_ylim(len(labels) - 0.5, -0.5)
    axes.tick_params(axis="y", length=0)
    for row in range(1, len(labels), 2):
        axes.axhspan(row - 0.5, row + 0.5, color="#F3F3F3", zorder=0, linewidth=0)
    axes.grid(axis="x", color="#E2E2E2", linewidth=0.6)
    axes.set_axisbelow(True)


def row_height(groups: int, series: int) -> float:
    """The height in inches of `groups` rows with `series` marks each."""
    return 0.5 + groups * max(0.32, 0.14 * series + 0.06)


def offsets(n: int) -> np.ndarray:
    """Vertical offsets of `n` marks around the middle of their row."""
    return (np.arange(n) - (n - 1) / 2) * 0.66 / max(n, 3)


def series(
    axes: "Axes",
    means: pd.DataFrame,
    keys: Sequence[str],
    by: str,
    labels: Mapping[str, str] | None = None,
) -> pd.DataFrame:
    """Draw one row per value of `keys` and one series of dots per value of `by`; returns the rows in their order.

    `labels` are the names of the series in the legend.
    """
    rows = means.drop_duplicates(list(keys)).reset_index(drop=True)
    order = [tuple(row) for row in rows[list(keys)].to_numpy()]
    names = list(dict.fromkeys(means[by]))
    for name, shift in zip(names, offsets(len(names)), strict=True):
        part = means[means[by] == name]
        y = np.array([order.index(tuple(row)) for row in part[list(keys)].to_numpy()]) + shift
        dots(axes, part, y, label=name if labels is None else labels[name], **looks(names)[name])
    return rows


def dots(
    axes: "Axes",
    means: pd.DataFrame,
    y: np.ndarray,
    *,
    color: str,
    marker: str = "o",
    label: str | None = None,
    hollow: bool = False,
) -> None:
    """Draw the estimates of `Rows.means` at the heights `y`, with intervals; single seeds are faint."""
    for height, each in zip(y, means["each"], strict=True):
        if len(each) > 1:
            _faint(axes, each, [height] * len(each), color=color, marker=marker)
    axes.errorbar(
        means["value"], y, xerr=_reach(means), linestyle="", marker=marker, color=color, markersize=5,
        markerfacecolor="white" if hollow else color, capsize=2.5, elinewidth=1.1, label=label, zorder=3,
    )  # fmt: skip


def point(axes: "Axes", across: pd.DataFrame, up: pd.DataFrame, *, color: str, marker: str, label: str) -> None:
    """Draw one estimate in a plane with both intervals; single seeds are faint. Each frame is a row of `Rows.means`."""
    each = across["each"].iloc[0], up["each"].iloc[0]
    if len(each[0]) > 1:
        _faint(axes, *each, color=color, marker=marker)
    axes.errorbar(
        across["value"], up["value"], xerr=_reach(across), yerr=_reach(up), linestyle="", marker=marker, color=color,
        markersize=6.5, capsize=2.5, elinewidth=1.1, label=label, zorder=3,
    )  # fmt: skip


def keep_within(axes: "Axes", low: float, high: float) -> None:
    """Limit the scale to the range of the quantity, which intervals of differences over few seeds can exceed."""
    left, right = axes.get_xlim()
    axes.set_xlim(max(left, low - 0.02), min(right, high + 0.02))


def _faint(axes: "Axes", x: Sequence[float], y: Sequence[float], *, color: str, marker: str) -> None:
    # A label that starts with an underscore stays out of the legend.
    style: dict[str, Any] = {"linestyle": "", "markersize": 4.5, "markeredgewidth": 0, "label": "_seeds", "zorder": 2}
    axes.plot(x, y, marker=marker, color=color, alpha=0.45, **style)


def _reach(means: pd.DataFrame) -> np.ndarray:
    """The extent of the intervals below and above the values, in the format of `errorbar`."""
    below, above = means["value"] - means["low"], means["high"] - means["value"]
    return np.array([below.clip(lower=0), above.clip(lower=0)])
