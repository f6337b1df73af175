"""Figures of top sets: their depth in the model, and their overlap."""

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from rmtension.plots._drawing import Canvas, colours, dots, name_rows, readable
from rmtension.plots._rows import Rows, Source, count

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_THIRDS = ("early", "middle", "late")
_SEED = r" \(seed .*\)$"
_LOOKS = {False: ("#0072B2", "o", "top sets"), True: ("#D55E00", "s", "without the base's own top set")}


def depth(table: Source, ax: "Axes | None" = None, *, score: str | None = None, family: str | None = None) -> "Figure":
    """The share of every set in the early, middle and late third of the layers, with one panel per score.

    Draws `StudyResult.depth`. The number to the right of a bar is the number of neurons, or its range over seeds. Dots
    show where single seeds divide the bars. An `ax` holds one panel: select it with `score`.

    Examples:
        >>> from rmtension.neurons import depth_thirds
        >>> sets = {"helpful": neurons, "shared": organism.truth["shared"]}
        >>> rows = [{"score": "true", "set": name, "size": len(top), **depth_thirds(top)} for name, top in sets.items()]
        >>> [label.get_text() for label in depth(pd.DataFrame(rows)).axes[0].get_yticklabels()]
        ['helpful', 'shared']
    """
    rows = Rows.of(table, "depth", ("score", "set", "size", *_THIRDS), family=family).where(score=score)
    scores, sets = rows.names("score"), rows.names("set")
    canvas = Canvas.of(ax, len(scores), height=0.9 + 0.24 * len(sets), share_x=True, share_y=True, choose="score=")
    for number, (axes, by_score) in enumerate(zip(canvas.panels, scores, strict=True)):
        frame = rows.where(score=by_score).frame
        shares = frame.groupby(["set", "seed"], sort=False)[list(_THIRDS)].mean()
        mean = shares.groupby(level="set", sort=False).mean().reindex(sets)
        left = np.zeros(len(sets))
        for third in _THIRDS:
            width = mean[third].to_numpy()
            axes.barh(range(len(sets)), width, left=left, height=0.72, color=colours([])[third], label=third)
            left = left + np.nan_to_num(width)
        if rows.n_seeds > 1:
            ends = shares[["early", "middle"]].cumsum(axis=1)
            for row, name in enumerate(sets):
                if name in ends.index.get_level_values("set"):
                    divided = ends.loc[[name]].to_numpy().ravel()
                    axes.plot(divided, np.full(len(divided), row), ".", color="black", markersize=3, label="_seeds")
        sizes = frame.groupby("set")["size"].agg(["min", "max"]).astype(int)
        for row, name in enumerate(sets):
            words = count(*sizes.loc[name]) if name in sizes.index else "none"
            axes.text(1.03, row, words, va="center", fontsize=7.5, clip_on=False)
        axes.set_yticks(range(len(sets)), sets)
        axes.tick_params(axis="y", length=0)
        axes.set(xlim=(0, 1), ylim=(len(sets) - 0.5, -0.5))
        axes.set_xticks([0, 0.5, 1], ["0", "0.5", "1"])
        if canvas.bottom(number):
            axes.set_xlabel("share of the set")
    marks = ["numbers: neurons"] + (["dots: single seeds"] if rows.n_seeds > 1 else [])
    title = rows.title("Top sets by third of the model's layers", *marks, seeds="mean of {} seeds", intervals="")
    return canvas.finish(title, [readable(name) for name in scores], legend="third of the layers")


def overlap(
    table: Source,
    ax: "Axes | None" = None,
    *,
    score: str | None = None,
    family: str | None = None,
    level: float | None = None,
) -> "Figure":
    """The Jaccard index of every two top sets, compared with chance, floor and ceiling, with one panel per score.

    Draws `StudyResult.overlap`. Black ticks on grey bars show the mean and the central 95% of chance within layers.
    Squares leave out the base model's own top set (the floor). Rows "2 seeds" compare one objective between two seeds
    (the ceiling): single pairs of seeds are faint, and the interval is the mean of their intervals over prompts. A star
    marks indices whose 95% interval beyond chance excludes 0. An `ax` holds one panel: select it with `score`.

    Examples:
        >>> from rmtension import StudyOptions, TensionStudy
        >>> options = StudyOptions(analyses=("overlap",), scores=("magnitude",))
        >>> study = TensionStudy(dict.fromkeys(("helpful", "harmless", "mixed"), head), pairs, options=options)
        >>> print(overlap(study.run(progress=False)).get_suptitle())
        Overlap of top sets
        95% intervals; *: 95% interval beyond chance excludes 0
    """
    columns = (
        *("score", "kind", "a", "b", "without_base", "jaccard", "jaccard_low", "jaccard_high"),
        *("layer_expected_jaccard", "beyond_chance", "beyond_low", "beyond_high"),
    )
    rows = Rows.of(table, "overlap", columns, family=family, level=level).where(score=score)
    scores = rows.names("score")
    tables = {name: _compared(rows.where(score=name)) for name in scores}
    names = list(dict.fromkeys(name for frame in tables.values() for name in frame["name"]))
    canvas = Canvas.of(ax, len(scores), height=1.0 + 0.42 * len(names), share_x=True, share_y=True, choose="score=")
    for number, (axes, by_score) in enumerate(zip(canvas.panels, scores, strict=True)):
        name_rows(axes, names)
        both = bool(tables[by_score]["without_base"].any())
        for without, part in tables[by_score].groupby("without_base"):
            y = np.array([names.index(name) for name in part["name"]], dtype=float)
            if both:
                y += 0.19 if without else -0.19
            color, marker, label = _LOOKS[bool(without)]
            band: dict[str, Any] = {"color": "#C4C4C4", "linewidth": 7, "zorder": 1}
            axes.hlines(
                y,
                part["chance_low"],
                part["chance_high"],
                **band,
                label=f"chance within layers ({100 * rows.level:g}%)",
            )
            axes.vlines(part["chance"], y - 0.13, y + 0.13, color="black", linewidth=1.2, zorder=2)
            dots(axes, part, y, color=color, marker=marker, label=label)
            _star(axes, part, y)
        if canvas.bottom(number):
            axes.set_xlabel("Jaccard index")
    for axes in canvas.panels:
        axes.margins(x=0.1)
        axes.set_xlim(left=0)
    title = rows.title("Overlap of top sets", f"*: {100 * rows.level:g}% interval beyond chance excludes 0")
    return canvas.finish(title, [readable(name) for name in scores])


def _star(axes: "Axes", means: pd.DataFrame, y: np.ndarray) -> None:
    """Draw a star to the right of every row whose interval beyond chance excludes 0."""
    beyond = ((means["beyond_low"] > 0) | (means["beyond_high"] < 0)).to_numpy()
    ends = means[["value", "high", "chance_high"]].max(axis=1).to_numpy()
    ends = np.maximum(ends, [max(each) for each in means["each"]])
    style: dict[str, Any] = {"textcoords": "offset points", "va": "center", "fontsize": 11, "annotation_clip": False}
    for end, height in zip(ends[beyond], y[beyond], strict=True):
        axes.annotate("*", (end, height), xytext=(4, -2.5), **style)


def split_ceiling(rows: Rows) -> list[Rows]:
    """Divide an overlap table into rows that compare models of one seed and rows that compare two seeds of a model.

    In the second part, every pair of seeds counts as one seed. Pairs of seeds are not independent, so no spread between
    them is estimated: values and ends of intervals are plain means.
    """
    between = rows.frame["kind"] == "seeds"
    ceiling = rows.frame[between]
    named = {side: ceiling[side].str.replace(_SEED, "", regex=True) for side in ("a", "b")}
    ceiling = ceiling.assign(seed=ceiling["a"] + ceiling["b"], **named)
    parts = [replace(rows, frame=rows.frame[~between]), replace(rows, frame=ceiling, plain=True)]
    return [part for part in parts if len(part.frame)]


def _compared(rows: Rows) -> pd.DataFrame:
    """One row per comparison: the Jaccard index with its interval, and that of chance."""
    keys = ("kind", "a", "b", "without_base")
    chance = ("layer_expected_jaccard", "chance_low", "chance_high")
    parts = []
    for part in split_ceiling(rows):
        frame = part.frame
        ends = {
            "chance_low": frame["jaccard"] - frame["beyond_high"],
            "chance_high": frame["jaccard"] - frame["beyond_low"],
        }
        known = replace(part, frame=frame.assign(**ends))
        means = known.means(keys, "jaccard", "jaccard_low", "jaccard_high", extra=chance)
        beyond = known.means(keys, "beyond_chance", "beyond_low", "beyond_high")
        parts.append(means.assign(beyond_low=beyond["low"], beyond_high=beyond["high"]))
    whole = pd.concat(parts, ignore_index=True).rename(columns={"layer_expected_jaccard": "chance"})
    names = [
        f"{a}, 2 seeds" if kind == "seeds" else f"{a} / {b}".replace(" or ", " or\n")
        for kind, a, b in zip(whole["kind"], whole["a"], whole["b"], strict=True)
    ]
    return whole.assign(name=names)
