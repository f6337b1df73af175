"""Neuron pages in the form that the template draws: a scatter, a table, and a page per neuron."""

import json
import math
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
import pandas as pd

from rmtension.attribution._neuron_pages import NeuronPages

_WIDTH, _HEIGHT, _LEFT, _TOP, _RIGHT, _BOTTOM = 640, 480, 70, 12, 628, 430
_CHART_WIDTH, _CHART_HEIGHT = 300, 120


def neuron_section(pages: NeuronPages) -> dict[str, Any]:
    """The values of the template's section on single neurons."""
    asked = pages.table[pages.table["set"] == "asked for"]
    layers = sorted({layer for layer, _ in pages.neurons})
    about = pages.about
    what = (
        f"{len(asked)} {about['site']} neurons of the model with fingerprint {about['model']}. Scores: "
        f"{about['method']}, {about['positions']} tokens, in units of the margin; a neuron with a positive score "
        f"{_direction(pages)} the margin. Effects: change of the mean margin when the neuron alone is set to zero, "
        f"negative where it supports the margin, with {100 * about['level']:g}% intervals over blocks of prompts; "
        + ", ".join(f"{n} {name} pairs" for name, n in about["pairs"].items())
        + ". Even without any effect, about one 95% interval in twenty excludes 0."
    )
    return {
        "what": what,
        "control": _control(pages),
        "scatter": _scatter(pages),
        "layers": layers,
        "columns": ["neuron", *(f"{what}, {name}" for what in ("score", "effect") for name in pages.objectives)],
        "rows": [_row(pages, row) for _, row in asked.iterrows()],
        "texts_note": "Texts come from the data and may be offensive; they are shown when you open them. Orange "
        "tokens have a positive activation and blue tokens a negative one; the strength of the colour is its magnitude "
        "divided by the largest in the pair. The prompt is grey.",
        "texts": _texts(pages),
    }


def _direction(pages: NeuronPages) -> str:
    """What a neuron with a positive score does to the margin."""
    return "supports" if pages.about["sign"] > 0 else "opposes"


def _id(layer: int, neuron: int) -> str:
    return f"neuron-{layer}-{neuron}"


def _control(pages: NeuronPages) -> str:
    """The effects of the examined neurons compared with those of random neurons."""
    parts = []
    for name in pages.objectives:
        sizes = pages.table[f"{name}_effect"].abs().groupby(pages.table["set"])
        known = sizes.agg(["count", "median", "max"])
        shown = [
            f"{row['count']:.0f} {label}: median {row['median']:.3g}, largest {row['max']:.3g}"
            for label, row in known.iterrows()
        ]
        parts.append(f"{name} ({'; '.join(shown)})")
    return (
        "Control: the magnitudes of the effects of the neurons asked for, and of random neurons in the same layers: "
        f"{', '.join(parts)}."
    )


def _row(pages: NeuronPages, row: "pd.Series[Any]") -> dict[str, Any]:
    layer, neuron = int(row["layer"]), int(row["neuron"])
    cells, lines, beyond = [], [], False
    for name in pages.objectives:
        cells.append({"value": row[f"{name}_score"], "text": f"{row[f'{name}_score']:+.4f}"})
    for name in pages.objectives:
        effect, low, high = (row[f"{name}_{end}"] for end in ("effect", "effect_low", "effect_high"))
        text = f"{effect:+.4f}" if math.isnan(low) else f"{effect:+.4f} [{low:+.4f}, {high:+.4f}]"
        cells.append({"value": effect, "text": text})
        beyond = beyond or low > 0 or high < 0
        lines.append(
            f"{name}: score {row[f'{name}_score']:+.4f} (standard error {row[f'{name}_score_stderr']:.4f}), effect of "
            f"ablating it {text}, n = {row[f'{name}_n']} pairs"
        )
    return {
        "id": _id(layer, neuron),
        "name": f"{layer}.{neuron}",
        "layer": layer,
        "neuron": neuron,
        # Sort by layer, then by neuron.
        "order": layer * 1_000_000 + neuron,
        "beyond": "yes" if beyond else "no",
        "cells": cells,
        "lines": lines,
        "charts": [_chart(pages, layer, neuron, name) for name in pages.objectives],
    }


def _texts(pages: NeuronPages) -> str:
    """The examples as JSON that is safe inside an HTML element, which no text can end."""
    examples: dict[str, list[dict[str, Any]]] = {}
    for example in pages.examples:
        examples.setdefault(f"{example.layer}.{example.neuron}", []).append(asdict(example))
    return json.dumps(examples, separators=(",", ":")).replace("&", "\\u0026").replace("<", "\\u003c")


def _scatter(pages: NeuronPages) -> dict[str, Any]:
    """All neurons by their scores on the first two objectives; a single objective is drawn against the layer."""
    across, up = (*pages.objectives, "layer")[:2]
    scatter = pages.scatter
    x_axis, y_axis = _axis(scatter[across], _LEFT, _RIGHT), _axis(scatter[up], _BOTTOM, _TOP)
    cloud = [
        f"M{x_axis['at'](x):.1f} {y_axis['at'](y):.1f}h0" for x, y in zip(scatter[across], scatter[up], strict=True)
    ]
    points = []
    points_of_all = zip(scatter["layer"], scatter["neuron"], scatter[across], scatter[up], strict=True)
    at = {(layer, neuron): (x, y) for layer, neuron, x, y in points_of_all}
    for layer, neuron in pages.neurons:
        x, y = at[layer, neuron]
        label = f"layer {layer}, neuron {neuron}: {across} {x:+.4f}, {up} {y:+.4f}"
        points.append(
            {"id": _id(layer, neuron), "label": label, "x": f"{x_axis['at'](x):.1f}", "y": f"{y_axis['at'](y):.1f}"}
        )
    n, total = len(scatter), pages.about["n_neurons"]
    shown = f"all {total}" if n == total else f"a random {n} of {total}"
    toward = f"{_direction(pages)} the margin \N{RIGHTWARDS ARROW}"
    zero_x, zero_y = x_axis["at"](0.0), y_axis["at"](0.0)
    return {
        "width": _WIDTH, "height": _HEIGHT, "left": _LEFT, "right": _RIGHT, "bottom": _BOTTOM,
        "middle": (_TOP + _BOTTOM) / 2,
        "x_ticks": x_axis["ticks"], "y_ticks": y_axis["ticks"],
        "zero": f"M{zero_x:.1f} {_TOP}V{_BOTTOM}M{_LEFT} {zero_y:.1f}H{_RIGHT}",
        "axes": f"M{_LEFT} {_TOP}V{_BOTTOM}H{_RIGHT}",
        "x_label": f"score on {across} pairs ({toward})",
        "y_label": f"score on {up} pairs ({toward})" if up != "layer" else up,
        "cloud": "".join(cloud), "points": points,
        "label": f"{pages.about['method']} of neurons on {across} and {up} pairs",
        "caption": f"Scores of {shown} neurons. Orange neurons have a page: select one to open it.",
    }  # fmt: skip


def _axis(values: "pd.Series[Any]", start: int, end: int) -> dict[str, Any]:
    """The map from values to pixels between two ends, and the ticks; the axis always includes 0."""
    low, high = min(0.0, float(values.min())), max(0.0, float(values.max()))
    room = 0.05 * (high - low) or 1.0
    low, high = low - room, high + room

    def at(value: Any) -> float:
        return float(start + (value - low) / (high - low) * (end - start))

    step = _round_step((high - low) / 6)
    numbers = np.arange(math.ceil(low / step), math.floor(high / step) + 1) * step
    return {"at": at, "ticks": [{"at": round(at(number), 1), "text": f"{number:.3g}"} for number in numbers]}


def _round_step(step: float) -> float:
    """1, 2 or 5 times a power of ten, at least `step`."""
    power = 10.0 ** math.floor(math.log10(step))
    return next(times * power for times in (1, 2, 5, 10) if times * power >= step)


def _chart(pages: NeuronPages, layer: int, neuron: int, objective: str) -> dict[str, Any]:
    """A histogram of texts by the neuron's largest activation: chosen upwards, rejected downwards."""
    rows = pages.distribution
    rows = rows[(rows["layer"] == layer) & (rows["neuron"] == neuron) & (rows["objective"] == objective)]
    sides = {side: rows[rows["side"] == side] for side in ("chosen", "rejected")}
    most, middle = max(1, int(rows["texts"].max())), (_CHART_HEIGHT - 16) / 2
    low, high = float(rows["low"].min()), float(rows["high"].max())
    bars: dict[str, str] = {}
    for side, part in sides.items():
        sign = -1 if side == "chosen" else 1
        width = _CHART_WIDTH / max(1, len(part))
        bars[side] = "".join(
            f"M{number * width:.1f} {middle:.1f}h{width - 1:.1f}v{sign * n / most * (middle - 2):.1f}h{1 - width:.1f}z"
            for number, n in enumerate(part["texts"].tolist())
            if n
        )
    counts = " and ".join(f"{int(part['texts'].sum())} {side}" for side, part in sides.items())
    return {
        "width": _CHART_WIDTH,
        "height": _CHART_HEIGHT,
        **bars,
        "axis": f"M0 {middle:.1f}H{_CHART_WIDTH}",
        "ticks": _ends(low, high),
        "caption": f"{objective} pairs: texts by largest activation, {counts}; the tallest bar is {most}",
    }


def _ends(low: float, high: float) -> Sequence[dict[str, Any]]:
    return [
        {"at": 0, "text": f"{low:.3g}", "anchor": "start"},
        {"at": _CHART_WIDTH, "text": f"{high:.3g}", "anchor": "end"},
    ]
