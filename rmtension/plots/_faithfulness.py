"""Figures of how well scores predict the effects of ablation: single neurons, and sets of growing size."""

from collections.abc import Sequence
from math import ceil, floor, log10
from textwrap import wrap
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from rmtension.attribution._faithfulness_result import Faithfulness
from rmtension.errors import OptionError
from rmtension.evaluation._intervals import with_interval
from rmtension.plots._drawing import GREY, Canvas, readable
from rmtension.plots._rows import count, sized

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_BLUE = "#0072B2"
# Effects whose magnitudes span more than two decades, without the smallest tenth, get symmetric-log axes.
_DECADES, _NEXT_TO_NOTHING = 2, 0.1
_LAYERS_IN_LEGEND = 7
# Height in inches by number of panels: one or two panels are wider than three in a row.
_HEIGHT = {1: 4.4, 2: 3.4}


def faithfulness_scatter(
    result: Faithfulness, ax: "Axes | None" = None, *, methods: str | Sequence[str] | None = None
) -> "Figure":
    """The true effect of ablating each neuron against the predicted effect, with one panel per method.

    Draws the result of `attribution.faithfulness`, coloured by layer. A neuron with an effect below 0 supports the
    margin. Scores without a sign are drawn against magnitudes of true effects. `methods` selects the panels and their
    order; an `ax` holds one panel.

    Examples:
        >>> from rmtension.attribution import faithfulness
        >>> result = faithfulness(head, pairs["helpful"], scores, set_fractions=(), progress=False)
        >>> print(faithfulness_scatter(result).axes[0].get_title())
        gradient x activation (n = 48)
        Spearman 1.00 [1.00, 1.00]
    """
    shown = _chosen(result, methods)
    canvas = Canvas.of(ax, len(shown), height=_HEIGHT.get(len(shown), 2.7), choose="methods=")
    summary = result.summary.set_index("method").to_dict("index")
    signed = [_signed(result, method) for method in shown]
    # Shuffled, because in the order of layers the last layer would hide the others.
    neurons = result.neurons.sample(frac=1, random_state=0)
    linear = _linear_within(neurons[["effect", *shown]].to_numpy())
    note = "" if linear is None else f"\nboth symmetric log beyond $\\pm10^{{{round(log10(linear))}}}$"
    palette = _by_layer(neurons["layer"])
    names = []
    for number, (axes, method) in enumerate(zip(canvas.panels, shown, strict=True)):
        what, true = ("effect", neurons["effect"]) if signed[number] else ("|effect|", neurons["effect"].abs())
        color = [palette[layer] for layer in neurons["layer"]]
        # There can be tens of thousands of points, so they are drawn as pixels even in a vector file.
        axes.scatter(neurons[method], true, s=9, c=color, linewidths=0, alpha=0.6, rasterized=True)
        for layer in _some(list(palette)):
            axes.plot([], [], "o", markersize=4.5, color=palette[layer], label=f"layer {layer}")
        _scales(axes, linear)
        # Panels in a row or column share a label, unless they show different quantities.
        if canvas.left(number) or signed[number - 1] != signed[number]:
            axes.set_ylabel(f"true {what} (reward units){note}")
        if canvas.bottom(number) or signed[number + canvas.columns] != signed[number]:
            axes.set_xlabel(f"predicted {what} (reward units)")
        row = summary[method]
        ends = row["spearman_low"], row["spearman_high"]
        interval = f"Spearman {with_interval(row['spearman'], *ends, form='.2f')}"
        names.append(_name(method, (row["n"], row["n"]), 29 * 3 // min(len(shown), 3), interval))
    title = _title(result, "Predicted and true effects of ablating single neurons")
    return canvas.finish(f"{title}\nBelow 0: the neuron supports the margin; above 0: it opposes the margin", names)


def faithfulness_sets(
    result: Faithfulness, ax: "Axes | None" = None, *, methods: str | Sequence[str] | None = None
) -> "Figure":
    """The true effect of ablating a method's top sets against their size, with one panel per method.

    Draws the result of `attribution.faithfulness`, with the sum of the effects predicted for the single neurons, and
    with random sets of equal size: their mean, and a band from the smallest to the largest effect. The magnitudes of
    scores without a sign are summed and drawn with both signs. `methods` selects the panels and their order; an `ax`
    holds one panel. Raises `OptionError` if no sets were ablated.

    Examples:
        >>> from rmtension.attribution import faithfulness
        >>> sizes = {"set_fractions": (0.05, 0.1), "n_random": 2}
        >>> result = faithfulness(head, pairs["helpful"], scores, **sizes, progress=False)
        >>> print(faithfulness_sets(result).axes[0].get_xlabel())
        neurons ablated together
    """
    if result.sets.empty:
        raise OptionError(
            "result: expected sets, but none were ablated. Run faithfulness with a replacement other than "
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
        part = result.sets[result.sets["method"] == method].sort_values("size")
        signed = _signed(result, method)
        _sets(axes, part, (1,) if signed else (1, -1))
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
        n = (int(part["n"].min()), int(part["n"].max()))
        names.append(
            _name(method, n, 32 * 3 // min(len(shown), 3), "" if signed else "no direction: ± sum of magnitudes")
        )
    return canvas.finish(_title(result, "Effect of ablating top sets"), names)


def _sets(axes: "Axes", part: pd.DataFrame, signs: tuple[int, ...]) -> None:
    """Draw the sets of one method with intervals, sums of predictions times each of `signs`, and random sets."""
    size = part["size"].to_numpy()
    drawn = part[part["n_random"] > 0]
    if len(drawn):
        draws = count(int(drawn["n_random"].min()), int(drawn["n_random"].max()))
        label = f"random sets: mean, smallest and largest of {draws}"
        axes.fill_between(
            drawn["size"], drawn["random_min"], drawn["random_max"], color=GREY, alpha=0.35, linewidth=0, label=label
        )
        axes.plot(drawn["size"], drawn["random"], color=GREY, linewidth=1.2, label="_random")
        # For a single size a band and a line are invisible, so draw a bar too.
        span = np.stack([drawn["random"] - drawn["random_min"], drawn["random_max"] - drawn["random"]]).clip(min=0)
        axes.errorbar(
            drawn["size"], drawn["random"], yerr=span, fmt="s", markersize=3, color=GREY, elinewidth=1, capsize=0,
            label="_random ranges",
        )  # fmt: skip
    for sign in signs:
        axes.plot(
            size, sign * part["predicted"], "--x", color=_BLUE, linewidth=1.3, markersize=5,
            label="sum of predicted effects" if sign == 1 else "_turned",
        )  # fmt: skip
    effect, low, high = (part[name].to_numpy() for name in ("effect", "low", "high"))
    axes.errorbar(
        size, effect, yerr=np.stack([effect - low, high - effect]).clip(min=0), marker="o", markersize=4, color=_BLUE,
        capsize=2.5, linewidth=1.4, elinewidth=1.1, label="true effect", zorder=3,
    )  # fmt: skip


def _chosen(result: Faithfulness, methods: str | Sequence[str] | None) -> list[str]:
    """The methods to show, without repetition."""
    known = [str(method) for method in result.summary["method"]]
    chosen = known if methods is None else [methods] if isinstance(methods, str) else list(dict.fromkeys(methods))
    wrong = [method for method in chosen if method not in known]
    if wrong or not chosen:
        raise OptionError(f"methods: expected some of {known}, got {wrong or chosen}.")
    return chosen


def _signed(result: Faithfulness, method: str) -> bool:
    """Whether the scores of a method have a sign, and so were compared with effects instead of magnitudes."""
    return bool(result.summary.set_index("method")["sign_agreement"].notna()[method])


def _title(result: Faithfulness, what: str) -> str:
    where = result.provenance
    return (
        f"{what}: {readable(where.site)}\n"
        f"{where.label[:1].upper()}{readable(where.label)[1:]}, {where.n_pairs} pairs; "
        f"{100 * result.level:g}% intervals over prompts"
    )


def _name(method: str, n: tuple[int, int], wide: int, more: str) -> str:
    """The title of a panel, in lines of at most `wide` characters that fit above it."""
    # Keep "n = 48" on one line.
    lines = wrap(sized(readable(method), n).replace(" = ", "\xa0=\xa0"), wide)
    return "\n".join([*(line.replace("\xa0", " ") for line in lines), *([more] if more else [])])


def _linear_within(values: np.ndarray) -> float | None:
    """The linear range of symmetric-log axes, a power of ten; None if linear axes show all values well."""
    sizes = np.abs(values[values != 0])
    if not sizes.size:
        return None
    small = float(np.quantile(sizes, _NEXT_TO_NOTHING))
    return float(10.0 ** ceil(log10(small))) if sizes.max() > 10**_DECADES * small else None


def _scales(axes: "Axes", linear: float | None) -> None:
    """Set the same scale on both axes, and draw the line of exact predictions."""
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
    """Zero and positive and negative powers of ten, at least a share `apart` of the scale apart."""
    first, last = round(log10(linear)), floor(log10(max(-low, high)))
    powers = np.array([0.0, *(10.0**power for power in range(min(first, last), last + 1))])
    positions = transform.transform(powers)
    kept = _apart(powers, positions, apart * float(np.ptp(transform.transform(np.array([low, high])))))
    return [power for power in sorted({*kept, *(-power for power in kept)}) if low <= power <= high]


def _apart(values: np.ndarray, positions: np.ndarray, least: float) -> list[float]:
    """The first of ascending values, and each value at least `least` above the position of the last kept value."""
    kept = [0]
    for number in range(1, len(values)):
        if positions[number] - positions[kept[-1]] >= least:
            kept.append(number)
    return [float(values[number]) for number in kept]


def _by_layer(layers: pd.Series) -> dict[int, Any]:
    """A colour per layer, from early to late."""
    from matplotlib import colormaps

    each = sorted({int(layer) for layer in layers})
    # Viridis works for any colour vision; its end is left out because it is too pale on white.
    return dict(zip(each, colormaps["viridis"](np.linspace(0, 0.85, len(each))), strict=True))


def _some(layers: list[int]) -> list[int]:
    """Layers for the legend, evenly spaced from the first to the last."""
    indices = np.linspace(0, len(layers) - 1, min(len(layers), _LAYERS_IN_LEGEND)).round().astype(int)
    return [layers[index] for index in indices]
