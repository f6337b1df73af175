"""Figures of a repair: the share of the gap that an edit and its controls close, and what the edit changed."""

from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from rmtension.errors import OptionError
from rmtension.evaluation._intervals import Estimate
from rmtension.plots._drawing import GREY, Canvas, as_text, looks, name_rows, row_height

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_EDIT, _LOST = "#0072B2", "#D55E00"
_CONTROLS, _CHECKS = ("control", "closed"), ("quantity", "change", "low", "high", "spared", "n")
_PATH = ("numbers", "closed", "allowed")


def closed_share(
    closed: Estimate, controls: pd.DataFrame, *, title: str | None = None, ax: "Axes | None" = None
) -> "Figure":
    """Draw the closed share of an edit with its interval, and those of its controls in grey, one dot per fit.

    `closed` and `controls` are those of a `RepairReport`. Infinite ends of the interval are drawn to the edge.

    Raises `OptionError` for another table.

    Examples:
        >>> controls = pd.DataFrame({"control": ["shuffled labels", "head refit"], "closed": [0.0, 0.9]})
        >>> figure = closed_share(Estimate(0.8, 0.7, 0.9, n=60, n_prompts=60), controls)
        >>> figure.savefig("closed.svg")
    """
    _require(controls, _CONTROLS, "controls")
    kinds = list(dict.fromkeys(controls["control"]))
    canvas = Canvas.of(ax, height=row_height(len(kinds) + 1, 1))
    (axes,) = canvas.panels
    finite = [value for value in (closed.value, closed.low, closed.high, *controls["closed"]) if np.isfinite(value)]
    left, right = min(0.0, *finite, 0.0), max(1.0, *finite, 1.0)
    edge = 0.06 * (right - left)
    low, high = (float(np.clip(np.nan_to_num(end), left - edge, right + edge)) for end in (closed.low, closed.high))
    reach = np.array([[max(closed.value - low, 0)], [max(high - closed.value, 0)]])
    axes.errorbar(
        [closed.value], [0], xerr=reach, linestyle="", marker="o", color=_EDIT, markersize=6, capsize=3,
        elinewidth=1.2, zorder=3, label="the edit, with its interval",
    )  # fmt: skip
    labels = ["this edit"]
    for row, kind in enumerate(kinds, start=1):
        values = controls.loc[controls["control"] == kind, "closed"].to_numpy()
        axes.plot(
            values, np.full(len(values), row), linestyle="", marker="o", color=GREY, markersize=5, alpha=0.6,
            label="controls, one dot per fit", zorder=3,
        )  # fmt: skip
        labels.append(as_text(kind if len(values) == 1 else f"{kind} ({len(values)})"))
    for edge_of_gap in (0, 1):
        axes.axvline(edge_of_gap, color="#444444", linewidth=0.8, zorder=1)
    axes.set_xlim(left - edge, right + edge)
    name_rows(axes, labels)
    axes.set_xlabel("closed share of the gap: 0 as before, 1 the ceiling")
    return canvas.finish(
        title or "Closed share of the gap on test pairs\nThe edit, and controls fitted in the same way"
    )


def repair_checks(
    checks: pd.DataFrame, *, most_lost: float = 0.01, title: str | None = None, ax: "Axes | None" = None
) -> "Figure":
    """Draw the change of every accuracy in the checks of a `RepairReport`, with its interval, and the allowed loss.

    Changes whose lower end is below -`most_lost` are hollow. Margins, which have another scale, are left out.

    Raises `OptionError` for another table.

    Examples:
        >>> row = {"quantity": "helpful accuracy", "change": 0.0, "low": -0.02, "high": 0.01, "spared": False, "n": 60}
        >>> figure = repair_checks(pd.DataFrame([row]))
        >>> figure.savefig("checks.svg")
    """
    _require(checks, _CHECKS, "checks")
    rows = checks[~checks["quantity"].str.endswith(" margin")].reset_index(drop=True)
    canvas = Canvas.of(ax, height=row_height(len(rows), 1))
    (axes,) = canvas.panels
    for spared, part in rows.groupby("spared"):
        reach = np.array([part["change"] - part["low"], part["high"] - part["change"]]).clip(min=0)
        axes.errorbar(
            part["change"], part.index, xerr=reach, linestyle="", marker="o", color=_EDIT, markersize=6, capsize=3,
            markerfacecolor=_EDIT if spared else "white", elinewidth=1.2, zorder=3,
            label="lower end within the allowed loss" if spared else "lower end beyond the allowed loss",
        )  # fmt: skip
    axes.axvline(0, color="#444444", linewidth=0.8, zorder=1)
    axes.axvline(-most_lost, color=_LOST, linewidth=1, linestyle="--", zorder=1, label=f"allowed loss: {most_lost:g}")
    name_rows(axes, [as_text(f"{row['quantity']}  (n = {row['n']:,})") for row in rows.to_dict("records")])
    axes.set_xlabel("change on test pairs")
    return canvas.finish(
        title or "What the edit changed\nChange of accuracy and of choices on test pairs, with intervals"
    )


def repair_path(path: pd.DataFrame, *, title: str | None = None, ax: "Axes | None" = None) -> "Figure":
    """Draw the closed share of every candidate over the numbers that it changes: what each neuron adds.

    `path` is that of a `RepairReport` for gains or medians. There is one line per weight of the weak objective;
    candidates that cost the strong objective too much are hollow.

    Raises `OptionError` for another table.

    Examples:
        >>> path = pd.DataFrame({"numbers": [1, 8], "closed": [0.2, 0.9], "allowed": [True, True]})
        >>> figure = repair_path(path)
        >>> figure.savefig("path.svg")
    """
    _require(path, _PATH, "path")
    canvas = Canvas.of(ax, height=2.4)
    (axes,) = canvas.panels
    names = path["share"] if "share" in path else pd.Series("candidates", index=path.index)
    styles = looks([str(name) for name in dict.fromkeys(names)])
    for name, part in path.groupby(names, sort=False):
        ordered = part.sort_values("numbers")
        style = styles[str(name)]
        label = f"weight of the weak objective: {name}" if "share" in path else as_text(name)
        axes.plot(ordered["numbers"], ordered["closed"], linewidth=1.2, markersize=6, label=label, zorder=3, **style)
        refused = ordered[~ordered["allowed"]]
        axes.plot(
            refused["numbers"], refused["closed"], linestyle="", marker=style["marker"], color="white", markersize=4,
            zorder=4, label="_refused",
        )  # fmt: skip
    for edge_of_gap in (0, 1):
        axes.axhline(edge_of_gap, color="#444444", linewidth=0.8, zorder=1)
    axes.set_xscale("log")
    numbers = sorted(set(path["numbers"]))
    axes.set_xticks(numbers, [f"{number:,}" for number in numbers])
    axes.set_xticks([], minor=True)
    axes.grid(color="#E2E2E2", linewidth=0.6)
    axes.set_xlabel("numbers that the edit changes")
    axes.set_ylabel("closed share, development pairs")
    return canvas.finish(title or "Closed share of every candidate\nHollow: the strong objective loses too much")


def _require(table: pd.DataFrame, columns: tuple[str, ...], name: str) -> None:
    if not isinstance(table, pd.DataFrame) or not {*columns} <= {*table.columns} or not len(table):
        raise OptionError(f"{name}: expected the table of a RepairReport with the columns {list(columns)}.")
