"""Pictures of how well scores predict ablation: neuron by neuron, and for sets of growing size."""

from collections.abc import Sequence
from math import ceil, floor, log10
from textwrap import wrap
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from rmtension.attribution._effect_prediction import Faithfulness
from rmtension.errors import OptionError
from rmtension.evaluation._intervals import with_interval
from rmtension.plots._drawing import GREY, Canvas, readable
from rmtension.plots._rows import count, sized

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_BLUE = "#0072B2"
# Magnitudes of more than two decades, without the tenth that is next to nothing, get symmetric-log axes.
_DECADES, _NEXT_TO_NOTHING = 2, 0.1
_LAYERS_IN_LEGEND = 7
# Inches, by number of panels: one or two are wider than three in a row.
_HEIGHT = {1: 4.4, 2: 3.4}


def faithfulness_scatter(
    result: Faithfulness, ax: "Axes | None" = None, *, methods: str | Sequence[str] | None = None
) -> "Figure":
    """Predicted against true effect of taking out each neuron, a panel a method, coloured by layer.

    From `attribution.faithfulness`. An effect below 0 is that of a neuron that supports the margin. Scores without a
    direction are drawn against magnitudes of true effects, as they are compared. `methods` chooses panels, and their
    order; `ax` holds one.
    """
    shown = _chosen(result, methods)
    canvas = Canvas.of(ax, len(shown), height=_HEIGHT.get(len(shown), 2.7), choose="methods=")
    summary = result.summary.set_index("method").to_dict("index")
    signed = [_signed(result, method) for method in shown]
    # In order of layers, the last would hide the others.
    neurons = result.neurons.sample(frac=1, random_state=0)
    linear = _linear_within(neurons[["effect", *shown]].to_numpy())
    note = "" if linear is None else f"\nboth symmetric log beyond $\\pm10^{{{round(log10(linear))}}}$"
    palette = _by_layer(neurons["layer"])
    names = []
    for number, (axes, method) in enumerate(zip(canvas.panels, shown, strict=True)):
        what, true = ("effect", neurons["effect"]) if signed[number] else ("|effect|", neurons["effect"].abs())
        color = [palette[layer] for layer in neurons["layer"]]
        # Tens of thousands of points: pixels, also in a vector file.
        axes.scatter(neurons[method], true, s=9, c=color, linewidths=0, alpha=0.6, rasterized=True)
        for layer in _some(list(palette)):
            axes.plot([], [], "o", markersize=4.5, color=palette[layer], label=f"layer {layer}")
        _scales(axes, linear)
        # Labels once for panels in a row or column, unless these show different things.
        if canvas.left(number) or signed[number - 1] != signed[number]:
            axes.set_ylabel(f"true {what} (reward units){note}")
        if canvas.bottom(number) or signed[number + canvas.columns] != signed[number]:
            axes.set_xlabel(f"predicted {what} (reward units)")
        row = summary[method]
        ends = row["spearman_low"], row["spearman_high"]
        interval = f"Spearman {with_interval(row['spearman'], *ends, form='.2f')}"
        names.append(_name(method, (row["n"], row["n"]), 29 * 3 // min(len(shown), 3), interval))
    title = _title(result, "Predicted and true effects of taking out single neurons")
    return canvas.finish(f"{title}\nBelow 0: the neuron supports the margin; above 0: it opposes the margin", names)


def faithfulness_sets(
    result: Faithfulness, ax: "Axes | None" = None, *, methods: str | Sequence[str] | None = None
) -> "Figure":
    """The true effect of ablating a method's top sets, against their size, a panel a method.

    From `attribution.faithfulness`. Beside it the sum of the effects predicted for the single neurons, and random sets
    of equal size: their mean, and a band from the smallest to the largest effect. Magnitudes, of scores without a
    direction, are summed either way. `methods` chooses panels, and their order; `ax` holds one.
    """
    if result.sets.empty:
        raise OptionError(
            "result: expected sets, and none were ablated. Run faithfulness with a replacement other than "
            "OtherResponse(), and shares of all neurons such as set_fractions=(0.01, 0.1)."
        )
    shown = _chosen(result, methods)
    canvas = Canvas.of(
        ax, len(shown), height=_HEIGHT.get(len(shown), 2.5), share_x=True, share_y=True, choose="methods="
    )
    sizes = np.array(sorted(set(result.sets["size"])))
    ticks = _apart(sizes, np.log(sizes), 0.15 * float(np.ptp(np.log(sizes))))
    names = []
    for number, (axes, method) in enumerate(zip(canvas.panels, shown, strict=True)):
        mine = result.sets[result.sets["method"] == method].sort_values("size")
        signed = _signed(result, method)
        _sets(axes, mine, (1,) if signed else (1, -1))
        axes.axhline(0, color="black", linewidth=0.8, zorder=1)
        axes.grid(color="#E8E8E8", linewidth=0.6)
        axes.set_axisbelow(True)
        axes.set_xscale("log")
        axes.set_xlim(sizes.min() / 1.25, sizes.max() * 1.25)
        axes.set_xticks(ticks, [f"{size:g}" for size in ticks])
        axes.set_xticks([], minor=True)
        if canvas.left(number):
            axes.set_ylabel("effect on the mean margin\n(reward units)")
        if canvas.bottom(number):
            axes.set_xlabel("neurons ablated together")
        n = (int(mine["n"].min()), int(mine["n"].max()))
        names.append(
            _name(method, n, 32 * 3 // min(len(shown), 3), "" if signed else "no direction: ± sum of magnitudes")
        )
    return canvas.finish(_title(result, "Effect of ablating top sets"), names)


def _sets(axes: "Axes", mine: pd.DataFrame, signs: tuple[int, ...]) -> None:
    """One method's sets with intervals, sums of predictions times each of `signs`, and random sets."""
    size = mine["size"].to_numpy()
    drawn = mine[mine["n_random"] > 0]
    if len(drawn):
        draws = count(int(drawn["n_random"].min()), int(drawn["n_random"].max()))
        label = f"random sets: mean, smallest and largest of {draws}"
        axes.fill_between(
            drawn["size"], drawn["random_min"], drawn["random_max"], color=GREY, alpha=0.35, linewidth=0, label=label
        )
        axes.plot(drawn["size"], drawn["random"], color=GREY, linewidth=1.2, label="_random")
        # Of a single size a band and a line are nothing.
        span = np.stack([drawn["random"] - drawn["random_min"], drawn["random_max"] - drawn["random"]]).clip(min=0)
        axes.errorbar(
            drawn["size"], drawn["random"], yerr=span, fmt="s", markersize=3, color=GREY, elinewidth=1, capsize=0,
            label="_random ranges",
        )  # fmt: skip
    for sign in signs:
        axes.plot(
            size, sign * mine["predicted"], "--x", color=_BLUE, linewidth=1.3, markersize=5,
            label="sum of predicted effects" if sign == 1 else "_turned",
        )  # fmt: skip
    effect, low, high = (mine[one].to_numpy() for one in ("effect", "low", "high"))
    axes.errorbar(
        size, effect, yerr=np.stack([effect - low, high - effect]).clip(min=0), marker="o", markersize=4, color=_BLUE,
        capsize=2.5, linewidth=1.4, elinewidth=1.1, label="true effect", zorder=3,
    )  # fmt: skip


def _chosen(result: Faithfulness, methods: str | Sequence[str] | None) -> list[str]:
    """The methods to show, each once."""
    known = [str(method) for method in result.summary["method"]]
    chosen = known if methods is None else [methods] if isinstance(methods, str) else list(dict.fromkeys(methods))
    wrong = [method for method in chosen if method not in known]
    if wrong or not chosen:
        raise OptionError(f"methods: expected some of {known}, got {wrong or chosen}.")
    return chosen


def _signed(result: Faithfulness, method: str) -> bool:
    """Whether a method's scores were compared with effects, not with their magnitudes."""
    return bool(result.summary.set_index("method")["sign_agreement"].notna()[method])


def _title(result: Faithfulness, what: str) -> str:
    where = result.provenance
    return (
        f"{what}: {readable(where.site)}\n"
        f"{where.label[:1].upper()}{readable(where.label)[1:]}, {where.n_pairs} pairs; "
        f"{100 * result.level:g}% intervals over prompts"
    )


def _name(method: str, n: tuple[int, int], wide: int, more: str) -> str:
    """A panel's title, in lines of `wide` characters, so that they fit above it."""
    # The number stays whole.
    lines = wrap(sized(readable(method), n).replace(" = ", "\xa0=\xa0"), wide)
    return "\n".join([*(line.replace("\xa0", " ") for line in lines), *([more] if more else [])])


def _linear_within(values: np.ndarray) -> float | None:
    """Where symmetric-log axes are linear, a power of ten; None where linear axes show all values well."""
    sizes = np.abs(values[values != 0])
    if not sizes.size:
        return None
    small = float(np.quantile(sizes, _NEXT_TO_NOTHING))
    return float(10.0 ** ceil(log10(small))) if sizes.max() > 10**_DECADES * small else None


def _scales(axes: "Axes", linear: float | None) -> None:
    """The same scale both ways, and the line on which predictions are right."""
    if linear is not None:
        axes.set_xscale("symlog", linthresh=linear)
        axes.set_yscale("symlog", linthresh=linear)
    (left, right), (low, high) = axes.get_xlim(), axes.get_ylim()
    if linear is not None:
        axes.set_xticks(_powers(axes.xaxis.get_transform(), left, right, linear, 0.2))
        axes.set_yticks(_powers(axes.yaxis.get_transform(), low, high, linear, 0.08))
        axes.set_xticks([], minor=True)
        axes.set_yticks([], minor=True)
    else:
        axes.locator_params(axis="x", nbins=5)
    ends = min(left, low), max(right, high)
    axes.plot(ends, ends, color="black", linewidth=0.9, linestyle="--", zorder=3, label="predicted = true")
    axes.set(xlim=(left, right), ylim=(low, high))
    axes.grid(color="#EAEAEA", linewidth=0.6)
    axes.set_axisbelow(True)


def _powers(transform: Any, low: float, high: float, linear: float, apart: float) -> list[float]:
    """Zero and powers of ten either way, at least a share of the scale apart."""
    first, last = round(log10(linear)), floor(log10(max(-low, high)))
    powers = np.array([0.0, *(10.0**power for power in range(min(first, last), last + 1))])
    places = transform.transform(powers)
    kept = _apart(powers, places, apart * float(np.ptp(transform.transform(np.array([low, high])))))
    return [each for each in sorted({*kept, *(-power for power in kept)}) if low <= each <= high]


def _apart(values: np.ndarray, places: np.ndarray, least: float) -> list[float]:
    """The first of ascending values, and each that stands this far or further from the one kept before."""
    kept = [0]
    for number in range(1, len(values)):
        if places[number] - places[kept[-1]] >= least:
            kept.append(number)
    return [float(values[number]) for number in kept]


def _by_layer(layers: pd.Series) -> dict[int, Any]:
    """A colour for every layer, from early to late."""
    from matplotlib import colormaps

    each = sorted({int(layer) for layer in layers})
    # Told apart with any colour vision; its end is too pale on white.
    return dict(zip(each, colormaps["viridis"](np.linspace(0, 0.85, len(each))), strict=True))


def _some(layers: list[int]) -> list[int]:
    """Layers for the legend, evenly from the first to the last."""
    places = np.linspace(0, len(layers) - 1, min(len(layers), _LAYERS_IN_LEGEND)).round().astype(int)
    return [layers[place] for place in places]
