"""Figures of ablations: curves, the matrix of sets and objectives, equal sizes, and what is retained."""

from itertools import product
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from rmtension.errors import OptionError
from rmtension.plots._drawing import (
    GREY,
    Canvas,
    colours,
    dots,
    looks,
    name_rows,
    offsets,
    point,
    readable,
    row_height,
    series,
)
from rmtension.plots._rows import Rows, Source, count, sized

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_CURVES = {
    "accuracy": "accuracy\n(share of items)",
    "change": "change of accuracy\n(share of items)",
    "drop": "1 - accuracy / before",
    "normalised": "accuracy above chance\n/ before",
    "margin": "mean margin\n(reward units)",
    "margin_change": "change of margin\n(reward units)",
}
# Columns that give these quantities before ablation; the others start at 0 or 1.
_BEFORE = {"accuracy": ("before",), "margin": ("margin_change",)}
_EFFECTS = {"margin": "change of mean margin (reward units)", "accuracy": "change of accuracy (share of items)"}
_CONTROLS = {
    "layer": ("s", "random, by layer"),
    "magnitude": ("D", "random, by layer and magnitude"),
}


def curves(
    table: Source,
    ax: "Axes | None" = None,
    *,
    quantity: str = "accuracy",
    model: str | None = None,
    objective: str | None = None,
    family: str | None = None,
) -> "Figure":
    """Ablation curves: a quantity against the share of top neurons ablated, with one panel per model and objective.

    Draws `StudyResult.curves`. `quantity` is "accuracy", "change", "drop", "normalised", "margin" or "margin_change". A
    line is the mean over seeds (and draws of random sets), its band spans the lowest to the highest of them; intervals
    over prompts are in the table. An `ax` holds one panel: select it with `model` and `objective`.

    Examples:
        >>> from rmtension.study import Ablations, ModelRuns, ablation_curves
        >>> ablations = Ablations(ModelRuns(head), pairs)
        >>> table = ablation_curves(ablations, {"gradient": scores}, (0.02, 0.1), n_draws=1).assign(model="mixed")
        >>> [panel.get_title() for panel in curves(table, quantity="margin").axes]
        ['mixed on helpful (n = 24)', 'mixed on harmless (n = 24)']
    """
    if quantity not in _CURVES:
        raise OptionError(f"quantity: expected one of {list(_CURVES)}, got {quantity!r}.")
    columns = ("model", "score", "draw", "fraction", "objective", quantity, *_BEFORE.get(quantity, ()))
    rows = Rows.of(table, "curves", columns, family=family)
    rows = rows.where(model=model, objective=objective)
    models, objectives, scores = rows.names("model"), rows.names("objective"), rows.names("score")
    shown = list(product(objectives, models))
    shared = quantity in ("accuracy", "drop", "change")
    canvas = Canvas.of(
        ax, len(shown), height=2.3, columns=len(models), share_x=True, share_y=shared, choose="model= and objective="
    )
    names = []
    for number, (axes, (on, name)) in enumerate(zip(canvas.panels, shown, strict=True)):
        part = rows.frame[(rows.frame["model"] == name) & (rows.frame["objective"] == on)]
        for score in scores:
            _curve(axes, part[part["score"] == score], quantity, score, scores)
        axes.axhline(_whole(part, quantity), color="black", linewidth=0.8, linestyle=":", label="whole model")
        axes.set_xscale("log")
        _percentages(axes, sorted(set(rows.frame["fraction"])))
        axes.grid(color="#E8E8E8", linewidth=0.6)
        if canvas.left(number):
            axes.set_ylabel(_CURVES[quantity])
        if canvas.bottom(number):
            axes.set_xlabel("neurons ablated (%)")
        n = (int(part["n"].min()), int(part["n"].max())) if "n" in part and len(part) else None
        names.append(sized(f"{name} on {on}", n))
    several = int(rows.frame.groupby("score")["draw"].nunique().max()) > 1
    draws = "band: lowest to highest draw" if several and rows.n_seeds == 1 else ""
    seeds = "mean of {} seeds; bands: lowest to highest of seeds" + (" and draws" if several else "")
    title = rows.title(
        f"Ablation of top neurons: {_CURVES[quantity].replace(chr(10), ' ')}", draws, seeds=seeds, intervals=""
    )
    return canvas.finish(title, names, legend="neurons ranked by")


def _curve(axes: "Axes", frame: pd.DataFrame, quantity: str, score: str, scores: list[str]) -> None:
    """The line of one score, and a band if there are several seeds or draws."""
    if frame.empty:
        return
    per_seed = frame.groupby(["fraction", "seed"])[quantity].mean()
    mean = per_seed.groupby(level="fraction").mean()
    ends = frame.groupby("fraction")[quantity].agg(["min", "max"])
    # Random draws come last, so that the markers of scores do not depend on them.
    style = looks([*(name for name in scores if name != "random"), "random"])[score]
    zorder = 2 if score == "random" else 3
    axes.plot(mean.index, mean, **style, markersize=3.5, linewidth=1.4, label=readable(score), zorder=zorder)
    if len(frame.groupby(["seed", "draw"])) > 1:
        axes.fill_between(ends.index, ends["min"], ends["max"], alpha=0.13, linewidth=0, color=style["color"])


def _whole(frame: pd.DataFrame, quantity: str) -> float:
    """The value of the quantity before ablation, averaged over seeds."""
    if quantity not in _BEFORE:
        return 1.0 if quantity == "normalised" else 0.0
    before = frame["before"] if quantity == "accuracy" else frame["margin"] - frame["margin_change"]
    return float(before.groupby(frame["seed"]).mean().mean())


def _percentages(axes: "Axes", fractions: list[float]) -> None:
    """Ticks at the ablated fractions, without those that would touch the previous tick."""
    kept: list[float] = []
    for fraction in fractions:
        if not kept or fraction / kept[-1] > 1.45:
            kept.append(fraction)
    if kept[-1] != fractions[-1]:
        kept[-1] = fractions[-1]
    axes.set_xticks(kept, [f"{100 * fraction:g}" for fraction in kept])
    axes.set_xticks([], minor=True)


def matrix(
    table: Source,
    ax: "Axes | None" = None,
    *,
    quantity: str = "margin",
    objective: str | None = None,
    family: str | None = None,
    level: float | None = None,
) -> "Figure":
    """The effect of ablating every set, compared with random sets of its size, with one panel per objective.

    Draws `StudyResult.ablation`. `quantity` is "margin" or "accuracy". The bars of random sets span two standard
    deviations between draws on either side (the mean over seeds). An `ax` holds one panel: select it with `objective`.

    Examples:
        >>> from rmtension.study import Ablations, ModelRuns, ablation_matrix
        >>> table = ablation_matrix(Ablations(ModelRuns(head), pairs), {"helpful": neurons}, n_draws=2)
        >>> [panel.get_title() for panel in matrix(table).axes]
        ['helpful pairs (n = 24)', 'harmless pairs (n = 24)']
    """
    columns = (
        *("set", "objective", "quantity", "control", "size", "effect", "low", "high"),
        *("random_effect", "random_sd"),
    )
    rows = Rows.of(table, "ablation", columns, family=family, level=level)
    rows = rows.where(quantity=quantity, objective=objective)
    objectives, sets = rows.names("objective"), rows.names("set")
    controls = rows.names("control")
    canvas = Canvas.of(
        ax,
        len(objectives),
        height=0.5 + len(sets) * (0.2 + 0.15 * (1 + len(controls))),
        columns=2,
        share_x=True,
        share_y=True,
        choose="objective=",
    )
    sizes = rows.frame.groupby("set")["size"].agg(["min", "max"]).astype(int)
    labels = [f"{name}\n({count(*sizes.loc[name])})" for name in sets]
    names = []
    for axes, on in zip(canvas.panels, objectives, strict=True):
        name_rows(axes, labels)
        part = rows.where(objective=on)
        shifts = offsets(1 + len(controls))
        effects = part.means(("set",), "effect")
        dots(
            axes, effects, _row_numbers(effects, sets) + shifts[0], label=f"set on {on}", color=colours(objectives)[on]
        )
        for control, shift in zip(controls, shifts[1:], strict=True):
            means = _random(part.where(control=control))
            marker, label = _CONTROLS.get(control, ("^", f"random, {control}"))
            y = _row_numbers(means, sets) + shift
            dots(axes, means, y, label=label, color=GREY, marker=marker, hollow=control != "layer")
        axes.axvline(0, color="black", linewidth=0.8)
        axes.set_xlabel(_EFFECTS.get(quantity, readable(quantity)))
        names.append(sized(f"{on} pairs", effects["n"].iloc[0]))
    title = rows.title(f"Effect of ablating sets on the mixed model's {quantity}", "random sets: 2 sd of draws")
    return canvas.finish(title, names)


def _random(rows: Rows) -> pd.DataFrame:
    """The mean effect of random sets, with two standard deviations between draws on either side."""
    frame = rows.frame
    ends = {
        "less": frame["random_effect"] - 2 * frame["random_sd"],
        "more": frame["random_effect"] + 2 * frame["random_sd"],
    }
    means = Rows(frame.assign(**ends), rows.level).means(
        ("set",), "random_effect", "less", "more", extra=("less", "more")
    )
    # The mean over seeds is not widened by their spread: these bars show draws, and single seeds are drawn too.
    return means.assign(low=means["less"], high=means["more"])


def equal_size(
    table: Source,
    ax: "Axes | None" = None,
    *,
    quantity: str = "margin",
    family: str | None = None,
    level: float | None = None,
) -> "Figure":
    """The effect per neuron of every set, from random subsamples of equal size.

    Draws `StudyResult.equal_size`. `quantity` is "margin" or "accuracy".

    Examples:
        >>> from rmtension.study import Ablations, ModelRuns, equal_size_effects
        >>> sets = {"helpful only": neurons, "shared": organism.truth["shared"]}
        >>> table = equal_size_effects(Ablations(ModelRuns(head), pairs), sets, against="shared", n_subsamples=2)
        >>> print(equal_size(table).get_suptitle().splitlines()[0])
        Effect per neuron, 2 neurons of each set at a time
    """
    columns = ("set", "objective", "quantity", "size", "effect", "low", "high")
    rows = Rows.of(table, "equal_size", columns, family=family, level=level).where(quantity=quantity)
    frame = rows.frame
    per_neuron = {column: 1000 * frame[column] / frame["size"] for column in ("effect", "low", "high")}
    each = Rows(frame.assign(**per_neuron), rows.level, rows.name)
    means = each.means(("set", "objective"), "effect")
    canvas = Canvas.of(ax, height=row_height(means["set"].nunique(), means["objective"].nunique()))
    axes = canvas.panels[0]
    sizes = means.drop_duplicates("objective").set_index("objective")["n"]
    labels = {str(on): sized(f"on {on} pairs", n) for on, n in sizes.items()}
    name_rows(axes, list(series(axes, means, ("set",), "objective", labels)["set"]))
    axes.axvline(0, color="black", linewidth=0.8)
    unit = "reward units" if quantity == "margin" else "share of items"
    axes.set_xlabel(f"change of {quantity} per neuron (10$^{{-3}}$ {unit})")
    size = count(int(frame["size"].min()), int(frame["size"].max()))
    return canvas.finish(each.title(f"Effect per neuron, {size} neurons of each set at a time"))


def collapse(
    table: Source,
    ax: "Axes | None" = None,
    *,
    quantity: str = "margin",
    family: str | None = None,
    level: float | None = None,
) -> "Figure":
    """The share of the helpful margin that each ablation retains, against the share of the harmless margin.

    Draws `StudyResult.collapse`. `quantity` is "margin" or "accuracy". 1 is the whole model, 0 is chance; on the dashed
    line both objectives fell alike.

    Examples:
        >>> from rmtension import study
        >>> ablations = study.Ablations(study.ModelRuns(head), pairs)
        >>> table = study.collapse(ablations, {"helpful only": neurons, "shared": organism.truth["shared"]})
        >>> collapse(table).axes[0].get_xlabel()
        'harmless margin retained (share)'
    """
    first, second = "helpful", "harmless"
    ends = {name: (f"retained_{name}", f"retained_{name}_low", f"retained_{name}_high") for name in (first, second)}
    columns = ("set", "size", "quantity", *ends[first], *ends[second])
    rows = Rows.of(table, "collapse", columns, family=family, level=level).where(quantity=quantity)
    y, x = (rows.means(("set",), *ends[name]) for name in (first, second))
    sets = rows.names("set")
    sizes = rows.frame.groupby("set")["size"].agg(["min", "max"]).astype(int)
    canvas = Canvas.of(ax, height=4.4)
    axes = canvas.panels[0]
    for number, name in enumerate(sets):
        label = f"without {name} ({count(*sizes.loc[name])})"
        point(axes, x.iloc[[number]], y.iloc[[number]], label=label, **looks(sets)[name])
    axes.plot(1, 1, "+", color="black", markersize=10, label="whole model")
    low, high = _limits(x, y)
    axes.plot([low, high], [low, high], color=GREY, linewidth=1, linestyle="--", zorder=1, label="both fell alike")
    axes.set(xlim=(low, high), ylim=(low, high), aspect="equal")
    axes.set_xlabel(f"harmless {quantity} retained (share)")
    axes.set_ylabel(f"helpful {quantity} retained (share)")
    axes.grid(color="#EAEAEA", linewidth=0.6)
    return canvas.finish(rows.title("What ablations leave of the mixed model's two objectives"))


def _limits(x: pd.DataFrame, y: pd.DataFrame) -> tuple[float, float]:
    """Limits of both axes that include every point, its interval, and the whole model at 1."""
    each = [np.array(values) for frame in (x, y) for values in frame["each"]]
    ends = np.concatenate([*each, *(frame[end].to_numpy() for frame in (x, y) for end in ("low", "high")), [1.0]])
    low, high = float(np.nanmin(ends)), float(np.nanmax(ends))
    room = max(0.05 * (high - low), 0.005)
    return low - room, high + room


def _row_numbers(means: pd.DataFrame, sets: list[str]) -> np.ndarray:
    """The row of each mean in a panel that lists `sets` from top to bottom."""
    return np.array([sets.index(name) for name in means["set"]], dtype=float)
