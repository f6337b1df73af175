"""Figures of behaviour: accuracy, subsets, refusing and responding, comparisons, transferability."""

from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from rmtension.errors import OptionError
from rmtension.plots._drawing import (
    GREY,
    Canvas,
    as_text,
    colours,
    keep_within,
    looks,
    name_rows,
    point,
    readable,
    row_height,
    series,
)
from rmtension.plots._rows import INTERVAL, Rows, Source, sized

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_QUANTITIES = {
    "transferability": "transferability T",
    "accuracy": "accuracy of mixed",
    "beyond accuracy": "T - accuracy",
    "jaccard helpful": "Jaccard, mixed and helpful",
    "jaccard harmless": "Jaccard, mixed and harmless",
}


def accuracy(
    table: Source, ax: "Axes | None" = None, *, family: str | None = None, level: float | None = None
) -> "Figure":
    """The accuracy of every model by objective and measure (share of items). Draws `StudyResult.accuracy`.

    Raises `OptionError` for a table without these columns or without any measure except "margin".

    Examples:
        >>> from rmtension import StudyOptions, TensionStudy
        >>> models = dict.fromkeys(("helpful", "harmless", "mixed"), head)
        >>> study = TensionStudy(models, pairs, options=StudyOptions(analyses=("accuracy",)))
        >>> figure = accuracy(study.run(progress=False))
        >>> figure.savefig("accuracy.png")
    """
    rows = Rows.of(table, "accuracy", ("model", "objective", "measure", *INTERVAL), family=family, level=level)
    means = rows.means(("model", "objective", "measure"))
    means = means[means["measure"] != "margin"]
    if means.empty:
        raise OptionError("table: expected a measure that is a share of items, such as 'accuracy', got only 'margin'.")
    groups = means[["objective", "measure"]].drop_duplicates()
    canvas = Canvas.of(ax, height=row_height(len(groups), means["model"].nunique()))
    axes = canvas.panels[0]
    shown = series(axes, means, ("objective", "measure"), "model")
    name_rows(axes, _named(shown, "measure"))
    axes.axvline(0.5, color="black", linewidth=0.8, linestyle=":")
    axes.set(xlim=(-0.02, 1.02), xlabel="share of items ranked correctly (dotted: one half)")
    return canvas.finish(rows.title("Accuracy by objective and measure"))


def radar(
    table: Source,
    ax: "Axes | None" = None,
    *,
    objective: str | None = None,
    family: str | None = None,
    level: float | None = None,
) -> "Figure":
    """The accuracy on every subset, with one polygon per model and bands for intervals. Draws `StudyResult.subsets`.

    The subsets of one objective are next to each other; `objective` shows only its subsets. Raises `OptionError` for
    fewer than three subsets, and for an `ax` that is not polar.

    Examples:
        >>> rows = [("mixed", "helpful", name, 0.8, 0.7, 0.9, 0.5) for name in ("code", "maths", "essays")]
        >>> table = pd.DataFrame(rows, columns=["model", "objective", "subset", "accuracy", "low", "high", "chance"])
        >>> print(radar(table).get_suptitle())
        Accuracy by subset
        Bands: 95% intervals
    """
    columns = ("model", "objective", "subset", "accuracy", "low", "high", "chance")
    rows = Rows.of(table, "subsets", columns, family=family, level=level).where(objective=objective)
    means = rows.means(("model", "objective", "subset"), "accuracy", extra=("chance",))
    # Group the subsets by objective, whatever the order of the rows.
    order = list(dict.fromkeys(means["objective"]))
    spokes = sorted(
        dict.fromkeys(zip(means["objective"], means["subset"], strict=True)), key=lambda spoke: order.index(spoke[0])
    )
    if len(spokes) < 3:
        raise OptionError(f"table: a radar needs at least 3 subsets, got {[subset for _, subset in spokes]}.")
    canvas = Canvas.of(ax, height=5.0, polar=True)
    axes: Any = canvas.panels[0]
    angles = np.linspace(0, 2 * np.pi, len(spokes), endpoint=False)
    around = np.append(angles, angles[0])
    models = list(dict.fromkeys(means["model"]))

    def closed(frame: pd.DataFrame, column: str) -> np.ndarray:
        """The column's values by spoke, with the first repeated at the end."""
        values = frame.drop_duplicates(["objective", "subset"]).set_index(["objective", "subset"])[column]
        by_spoke = values.reindex(pd.MultiIndex.from_tuples(spokes)).to_numpy()
        return np.append(by_spoke, by_spoke[0])

    for model in models:
        part = means[means["model"] == model]
        style = looks(models)[model]
        axes.plot(around, closed(part, "value"), **style, markersize=4.5, linewidth=1.4, label=model, clip_on=False)
        band = closed(part, "low"), closed(part, "high")
        axes.fill_between(around, *band, color=style["color"], alpha=0.13, linewidth=0)
    axes.plot(around, closed(means, "chance"), color="black", linewidth=0.9, linestyle=":", label="chance")
    axes.set_theta_zero_location("N")
    axes.set_theta_direction(-1)
    axes.set_ylim(0, 1)
    axes.set_yticks([0.25, 0.5, 0.75, 1.0], ["", "0.5", "", "1"], color="#555555")
    # Between the last spoke and the first, where the arcs leave a gap.
    axes.set_rlabel_position(-np.degrees(np.pi / len(spokes)))
    axes.grid(color="#DDDDDD", linewidth=0.7)
    axes.spines["polar"].set_color("#BBBBBB")
    _name_spokes(axes, spokes, angles)
    return canvas.finish(rows.title("Accuracy by subset", seeds="mean of {} seeds", intervals="bands: {} intervals"))


def _name_spokes(axes: Any, spokes: list[tuple[str, str]], angles: np.ndarray) -> None:
    """Names of the subsets around the circle, in the colour of their objective, and an arc for each objective."""
    axes.set_xticks(angles, [""] * len(spokes))
    names = list(dict.fromkeys(objective for objective, _ in spokes))
    palette = colours(names)
    for (objective, subset), angle in zip(spokes, angles, strict=True):
        sine = np.sin(angle)
        side = "center" if abs(sine) < 0.1 else ("left" if sine > 0 else "right")
        style = {"fontsize": 8, "color": palette[objective], "clip_on": False}
        axes.text(angle, 1.13, as_text(readable(subset)), ha=side, va="center", **style)
    reach = 0.8 * np.pi / len(spokes)
    for objective in names:
        spokes_at = angles[[name == objective for name, _ in spokes]]
        arc = np.linspace(spokes_at[0] - reach, spokes_at[-1] + reach, 100)
        style = {"color": palette[objective], "linewidth": 3, "clip_on": False}
        axes.plot(arc, np.full(100, 1.06), label=f"{objective} subsets", **style)


def refuse_respond(
    table: Source,
    ax: "Axes | None" = None,
    *,
    objective: str | None = None,
    family: str | None = None,
    level: float | None = None,
) -> "Figure":
    """Accuracy where refusing is right against accuracy where responding is right, with one point per model.

    Draws the measures "refusing" and "responding" of `StudyResult.accuracy` (share of items). A model that treats all
    requests alike, for example one that always refuses, is on the dashed line. An `ax` holds the panel of one
    objective: select it with `objective`.

    Examples:
        >>> rows = [("refusing", 0.9, 0.8, 1.0, 50), ("responding", 0.6, 0.5, 0.7, 40)]
        >>> table = pd.DataFrame(rows, columns=["measure", "value", "low", "high", "n"])
        >>> table = table.assign(model="mixed", objective="harmless")
        >>> print(refuse_respond(table).axes[0].get_title())
        harmless pairs
        refusing (n = 50), responding (n = 40)
    """
    rows = Rows.of(table, "accuracy", ("model", "objective", "measure", *INTERVAL), family=family, level=level)
    means = rows.where(objective=objective).means(("model", "objective", "measure"))
    up, across = (
        means[means["measure"] == measure].set_index(["objective", "model"]) for measure in ("refusing", "responding")
    )
    shared = [key for key in across.index if key in up.index]
    if not shared:
        raise OptionError(
            "table: expected the measures 'refusing' and 'responding' of a model, got "
            f"{rows.names('measure')}. Name the subsets of the pairs in StudyOptions(refuse=..., respond=...)."
        )
    objectives, models = (list(dict.fromkeys(names)) for names in zip(*shared, strict=True))
    canvas = Canvas.of(ax, len(objectives), height=3.9, columns=2, choose="objective=")
    for axes, name in zip(canvas.panels, objectives, strict=True):
        line: dict[str, Any] = {"color": GREY, "linewidth": 1, "linestyle": "--", "zorder": 1}
        axes.plot([0, 1], [1, 0], **line, label="all requests alike")
        words: dict[str, Any] = {"rotation": -45, "rotation_mode": "anchor", "transform_rotates_text": True}
        for x, text in ((0.2, "more refusing"), (0.8, "more responding")):
            axes.text(x - 0.01, 0.99 - x, text, ha="center", va="top", fontsize=8, color="#555555", **words)
        for model in models:
            if (name, model) in shared:
                key = [(name, model)]
                point(axes, across.loc[key], up.loc[key], label=model, **looks(models)[model])
        axes.set(xlim=(-0.05, 1.05), ylim=(-0.05, 1.05), aspect="equal")
        axes.set_xlabel("accuracy where responding is right (share)")
        axes.set_ylabel("accuracy where refusing is right (share)")
        axes.grid(color="#EAEAEA", linewidth=0.6)
    sizes = [
        (up.xs(on, level="objective")["n"].iloc[0], across.xs(on, level="objective")["n"].iloc[0]) for on in objectives
    ]
    names = [
        f"{on} pairs\n{sized('refusing', refuse)}, {sized('responding', respond)}"
        for on, (refuse, respond) in zip(objectives, sizes, strict=True)
    ]
    return canvas.finish(rows.title("Accuracy where refusing, and where responding, is right"), names)


def comparisons(
    table: Source,
    ax: "Axes | None" = None,
    *,
    objective: str | None = None,
    family: str | None = None,
    level: float | None = None,
) -> "Figure":
    """The accuracy of the mixed model minus that of each specialist, paired by item. Draws `StudyResult.comparisons`.

    There is one row per objective and subset; "all" is all pairs of the objective.

    Examples:
        >>> from rmtension import StudyOptions, TensionStudy
        >>> models = dict.fromkeys(("helpful", "harmless", "mixed"), head)
        >>> result = TensionStudy(models, pairs, options=StudyOptions(analyses=("accuracy",))).run(progress=False)
        >>> comparisons(result, objective="helpful").axes[0].get_xlabel()
        'difference in accuracy (share of items)'
    """
    columns = ("first", "second", "objective", "subset", "difference", "low", "high")
    rows = Rows.of(table, "comparisons", columns, family=family, level=level).where(objective=objective)
    means = rows.means(("first", "second", "objective", "subset"), "difference")
    groups = means[["objective", "subset"]].drop_duplicates()
    canvas = Canvas.of(ax, height=row_height(len(groups), means["second"].nunique()))
    axes = canvas.panels[0]
    labels = {str(row.second): f"{row.first} - {row.second}" for row in means.itertuples()}
    shown = series(axes, means, ("objective", "subset"), "second", labels)
    name_rows(axes, _named(shown, "subset"))
    axes.axvline(0, color="black", linewidth=0.8)
    keep_within(axes, -1.0, 1.0)
    axes.set_xlabel("difference in accuracy (share of items)")
    return canvas.finish(rows.title("Accuracy of the mixed model minus that of a specialist"))


def transferability(
    table: Source, ax: "Axes | None" = None, *, family: str | None = None, level: float | None = None
) -> "Figure":
    """Transferability T, the mixed model's accuracy, their difference, and the Jaccard indices.

    Draws `StudyResult.transferability`.

    Examples:
        >>> from rmtension import StudyOptions, TensionStudy
        >>> models = dict.fromkeys(("helpful", "harmless", "mixed"), head)
        >>> study = TensionStudy(models, pairs, options=StudyOptions(analyses=("transferability",)))
        >>> print(transferability(study.run(progress=False)).get_suptitle())
        Transferability and accuracy of the mixed model
        95% intervals
    """
    rows = Rows.of(table, "transferability", ("objective", "quantity", *INTERVAL), family=family, level=level)
    means = rows.means(("objective", "quantity"))
    canvas = Canvas.of(ax, height=row_height(means["quantity"].nunique(), means["objective"].nunique()))
    axes = canvas.panels[0]
    sizes = means.drop_duplicates("objective").set_index("objective")["n"]
    labels = {str(on): sized(f"on {on} pairs", n) for on, n in sizes.items()}
    shown = series(axes, means, ("quantity",), "objective", labels)
    name_rows(axes, [_QUANTITIES.get(quantity, readable(quantity)) for quantity in shown["quantity"]])
    axes.axvline(0, color="black", linewidth=0.8)
    keep_within(axes, -1.0, 1.0)
    axes.set_xlabel("share of items")
    return canvas.finish(rows.title("Transferability and accuracy of the mixed model"))


def _named(rows: pd.DataFrame, column: str) -> list[str]:
    """Labels of the rows: objective, value of `column`, and n."""
    return [
        sized(f"{objective}: {as_text(readable(name))}", n)
        for objective, name, n in zip(rows["objective"], rows[column], rows["n"], strict=True)
    ]
