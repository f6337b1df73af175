"""The effect of ablating neuron sets on every group of pairs, compared with random sets."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from rmtension.errors import OptionError
from rmtension.evaluation._metrics import QUANTITIES, check_quantity
from rmtension.plots._drawing import GREY, Canvas, as_text, looks, name_rows, offsets, row_height

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_COLUMNS = ("set", "size", "group", "quantity", "before", "effect", "low", "high", "random_effect", "random_sd", "n")
# An axis is never narrower than this share of the quantity's own size, so that rounding errors look like what they are.
_SMALLEST = 0.02


def effects_by_group(
    table: pd.DataFrame, *, quantity: str | None = None, title: str | None = None, ax: "Axes | None" = None
) -> "Figure":
    """Draw the table of `ablation_effects`: one row per group, one mark per set, and the random sets in grey.

    A mark is the mean change with its interval. The grey bar at the same height is the mean effect of the matched
    random sets, plus and minus two standard deviations between sets. There is one panel for the accuracy and one for
    the margin, or one for `quantity`. The title is made from the table unless `title` is given.

    Raises `OptionError` for another table, or with `ax` and without `quantity`.

    Examples:
        >>> table = ablation_effects(head, neurons, pairs["helpful"], by="objective", n_draws=2)
        >>> figure = effects_by_group(table, quantity="margin")
        >>> figure.savefig("effects.svg")
    """
    if not isinstance(table, pd.DataFrame) or not {*_COLUMNS} <= {*table.columns}:
        raise OptionError("table: expected the table of rmtension.ablation_effects.")
    if quantity is not None:
        check_quantity(quantity)
    quantities = [name for name in QUANTITIES if quantity in (None, name) and (table["quantity"] == name).any()]
    if not quantities:
        raise OptionError("table: expected at least one row with the quantity that is drawn, got none.")
    groups, sets = (list(dict.fromkeys(table[column])) for column in ("group", "set"))
    canvas = Canvas.of(ax, len(quantities), height=row_height(len(groups), len(sets)), columns=2, choose="quantity")
    for number, (axes, name) in enumerate(zip(canvas.panels, quantities, strict=True)):
        rows = table[table["quantity"] == name]
        _panel(axes, rows, groups, sets)
        labels = _labels(rows, groups)
        name_rows(axes, labels if canvas.left(number) else [""] * len(groups))
        axes.set_xlabel(f"change of {name}")
    return canvas.finish(title or _title(table, sets))


def _panel(axes: "Axes", rows: pd.DataFrame, groups: Sequence[str], sets: Sequence[str]) -> None:
    styles = looks(sets)
    for name, shift in zip(sets, offsets(len(sets)), strict=True):
        part = rows[rows["set"] == name]
        heights = np.array([groups.index(group) for group in part["group"]]) + shift
        has_control = part["random_effect"].notna().to_numpy()
        spread = 2 * part["random_sd"].to_numpy()[has_control]
        axes.barh(
            heights[has_control], 2 * spread, left=part["random_effect"].to_numpy()[has_control] - spread,
            height=0.5 / max(len(sets), 2), color=GREY, alpha=0.35, linewidth=0, label="random sets, ± 2 sd", zorder=1,
        )  # fmt: skip
        axes.plot(
            part["random_effect"].to_numpy()[has_control], heights[has_control], linestyle="", marker="|", color=GREY,
            markersize=8, zorder=2, label="_random",
        )  # fmt: skip
        reach = np.array([part["effect"] - part["low"], part["high"] - part["effect"]]).clip(min=0)
        size = int(part["size"].iloc[0])
        label = as_text(f"{'ablated' if name == 'neurons' else name} ({_counted(size)})")
        axes.errorbar(
            part["effect"], heights, xerr=reach, linestyle="", markersize=5, capsize=2.5, elinewidth=1.1, zorder=3,
            label=label, **styles[name],
        )  # fmt: skip
    axes.axvline(0, color="#444444", linewidth=0.8, zorder=1)
    _widen(axes, rows)


def _widen(axes: "Axes", rows: pd.DataFrame) -> None:
    """Make the axis at least as wide as a small part of the quantity, so that rounding noise is not magnified."""
    least = _SMALLEST * max(float(rows["before"].abs().max()), 1e-12)
    left, right = axes.get_xlim()
    axes.set_xlim(min(left, -least), max(right, least))


def _labels(rows: pd.DataFrame, groups: Sequence[str]) -> list[str]:
    n = dict(zip(rows["group"], rows["n"].tolist(), strict=True))
    return [as_text(f"{group}  (n = {n[group]:,})") for group in groups]


def _title(table: pd.DataFrame, sets: Sequence[str]) -> str:
    sizes: dict[str, Any] = dict(zip(table["set"], table["size"], strict=True))
    if len(sets) > 1:
        what = f"Effect of ablating {len(sets)} sets of neurons"
    else:
        name = "" if sets[0] == "neurons" else as_text(f" ({sets[0]})")
        what = f"Effect of ablating {_counted(int(sizes[sets[0]]))}{name}"
    return f"{what}\nMean change per group with its interval; grey: random sets of the same size per layer"


def _counted(n: int) -> str:
    return f"{n:,} neuron" if n == 1 else f"{n:,} neurons"
