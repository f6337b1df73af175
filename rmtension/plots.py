"""Pictures of a study's tables. Every function returns the Figure, draws into `ax` if given one, and shows nothing."""

from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from rmtension.errors import OptionError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito's palette: told apart with any colour vision.
_COLOURS = {
    "helpful": "#0072B2",
    "harmless": "#D55E00",
    "mixed": "#009E73",
    "length only": "#999999",
    "early": "#9ecae1",
    "middle": "#4292c6",
    "late": "#084594",
}


def accuracy(table: pd.DataFrame, ax: "Axes | None" = None) -> "Figure":
    """Accuracy of every model on every objective with its interval; refusing, responding and their mean beside it.

    `table` is `StudyResult.accuracy`.
    """
    figure, axes = _axes(ax, (8.0, 4.0))
    rows = table[table["measure"] != "margin"]
    groups = list(dict.fromkeys(zip(rows["objective"], rows["measure"], strict=True)))
    models = list(dict.fromkeys(rows["model"]))
    width = 0.8 / len(models)
    for number, model in enumerate(models):
        mine = rows[rows["model"] == model].set_index(["objective", "measure"])
        places = [place for place, group in enumerate(groups) if group in mine.index]
        values = mine.loc[[groups[place] for place in places]]
        axes.errorbar(
            np.array(places) + (number - (len(models) - 1) / 2) * width,
            values["value"],
            yerr=[(values["value"] - values["low"]).clip(lower=0), (values["high"] - values["value"]).clip(lower=0)],
            fmt="o",
            color=_COLOURS[model],
            label=model,
            capsize=3,
        )
    axes.axhline(0.5, color="black", linewidth=0.8, linestyle=":")
    axes.set_xticks(range(len(groups)), [f"{objective}\n{measure}" for objective, measure in groups])
    axes.set(ylim=(-0.02, 1.02), ylabel="share of pairs ranked correctly")
    axes.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0), frameon=False)
    axes.set_title(f"Accuracy with {_level(rows)} intervals (dotted: a coin)")
    return figure


def overlap(table: pd.DataFrame, ax: "Axes | None" = None) -> "Figure":
    """Jaccard index of every two top sets, with and without the base's own, beside what chance gives.

    `table` is `StudyResult.overlap`.
    """
    figure, axes = _axes(ax, (7.0, 3.6))
    names = list(dict.fromkeys(zip(table["a"], table["b"], strict=True)))
    marks = {False: ("o", "top sets"), True: ("s", "without the base's top set")}
    for without, part in table.groupby("without_base"):
        marker, label = marks[bool(without)]
        places = np.array([names.index(pair) for pair in zip(part["a"], part["b"], strict=True)])
        shift = 0.12 if without else -0.12
        axes.plot(places + shift, part["jaccard"], marker, color="#0072B2" if not without else "#56B4E9", label=label)
        # A label that starts with an underscore stays out of the legend.
        chance = "_chance" if without else "chance"
        axes.hlines(part["expected_jaccard"], places + shift - 0.1, places + shift + 0.1, color="black", label=chance)
        layered = f"{chance}, layer by layer"
        axes.hlines(
            part["layer_expected_jaccard"], places + shift - 0.1, places + shift + 0.1, color="#D55E00", label=layered
        )
    axes.set_xticks(range(len(names)), [f"{a} / {b}" for a, b in names])
    axes.set(ylim=(0, 1), xlim=(-0.6, len(names) - 0.4), ylabel="Jaccard index")
    axes.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0), frameon=False)
    axes.set_title("Overlap of top neurons")
    return figure


def depth(table: pd.DataFrame, ax: "Axes | None" = None) -> "Figure":
    """Share of every set in the early, middle and late third of the model's layers. `table` is `StudyResult.depth`."""
    figure, axes = _axes(ax, (7.0, 3.8))
    names = [f"{name} ({size})" for name, size in zip(table["set"], table["size"], strict=True)]
    left = np.zeros(len(table))
    for third in ("early", "middle", "late"):
        share = table[third].fillna(0).to_numpy()
        axes.barh(names, share, left=left, color=_COLOURS[third], label=third)
        left += share
    axes.invert_yaxis()
    axes.set(xlim=(0, 1), xlabel="share of the set")
    axes.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0), frameon=False, title="third of the layers")
    axes.set_title("Where in the model the sets lie (number of neurons)")
    return figure


def ablation(table: pd.DataFrame, ax: "Axes | None" = None, *, quantity: str = "margin") -> "Figure":
    """What the mixed model's accuracy or margin changes by without each set, and without random sets of that size.

    `table` is `StudyResult.ablation`; bars of the random sets span two standard deviations between draws either way.
    """
    if quantity not in ("accuracy", "margin"):
        raise OptionError(f"quantity: expected 'accuracy' or 'margin', got {quantity!r}.")
    figure, axes = _axes(ax, (8.0, 4.0))
    rows = table[table["quantity"] == quantity]
    names = list(dict.fromkeys(zip(rows["set"], rows["size"], strict=True)))
    for number, (objective, part) in enumerate(rows.groupby("objective", sort=False)):
        places = np.arange(len(part)) + (number - 0.5) * 0.36
        spread = [(part["effect"] - part["low"]).clip(lower=0), (part["high"] - part["effect"]).clip(lower=0)]
        colour = _COLOURS[str(objective)]
        axes.errorbar(places - 0.06, part["effect"], yerr=spread, fmt="o", color=colour, capsize=3, label=objective)
        label = "random sets" if number == 0 else None
        axes.errorbar(
            places + 0.06,
            part["random_effect"],
            yerr=2 * part["random_sd"],
            fmt="_",
            color="#999999",
            label=label,
            capsize=3,
        )
    axes.axhline(0, color="black", linewidth=0.8)
    axes.set_xticks(range(len(names)), [f"without\n{name} ({size})" for name, size in names])
    unit = "share of pairs" if quantity == "accuracy" else "reward units"
    axes.set_ylabel(f"change of {quantity} ({unit})")
    axes.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0), frameon=False, title="evaluated on")
    axes.set_title(f"Ablating neurons of the mixed model: change of {quantity}")
    return figure


def _axes(ax: "Axes | None", size: tuple[float, float]) -> tuple["Figure", "Axes"]:
    if ax is not None:
        owner: Any = ax.figure
        return owner, ax
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise OptionError('plots: needs matplotlib. Run `pip install "rmtension[viz]"`.') from error
    # Not pyplot: no global state, no window, and the figure goes away with its last reference.
    figure = Figure(figsize=size, layout="constrained")
    return figure, figure.add_subplot()


def _level(rows: pd.DataFrame) -> str:
    return f"{100 * float(rows['level'].iloc[0]):g}%"
