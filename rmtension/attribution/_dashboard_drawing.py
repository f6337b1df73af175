"""Neuron dashboards in the form that the template draws: a table, a scatter, and a card per neuron."""

import json
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
from markupsafe import Markup

from rmtension.attribution._dashboard_data import DashboardData, name_in
from rmtension.attribution._dashboard_words import number, number_with_interval, page_text, reading, shown_token

_WIDTH, _HEIGHT, _LEFT, _TOP, _RIGHT, _BOTTOM = 640, 480, 70, 12, 628, 430
_CHART_WIDTH, _CHART_HEIGHT = 300, 120


def section_values(data: DashboardData) -> dict[str, Any]:
    """The values of the template's section on single neurons."""
    asked, random = (data.table[data.table["set"] == name] for name in ("asked for", "random"))
    rows = [_row(data, row) for _, row in asked.iterrows()]
    for row, before, after in zip(rows, [None, *rows[:-1]], [*rows[1:], None], strict=True):
        row["before"], row["after"] = before, after
    described = len(data.descriptions) > 0
    columns = [
        *(f"score, {name}" for name in data.groups),
        *(f"effect, {name}" for name in data.groups),
        "direct weight",
    ]
    n_random = len(random)
    return {
        "what": _what(data),
        "control": _control(data),
        "layers": sorted({layer for layer, _ in data.neurons}),
        "columns": ["neuron", *columns, *(["description's AUROC"] if described else [])],
        "rows": rows,
        "random_columns": ["neuron", *columns],
        "random": [{"name": _name(data, row), "cells": _cells(data, row)[0]} for _, row in random.iterrows()],
        "group_columns": [
            "pairs",
            "score",
            "effect",
            f"effects of {n_random} random neurons",
            "n pairs",
        ],
        "scatter": _scatter(data),
        "scatter_open": True,
        "has_examples": bool(data.examples),
        "no_tokens": data.about["no_tokens"],
        "reading": reading(data),
        "texts": _texts(data),
    }


def _name(data: DashboardData, row: "pd.Series[Any]") -> str:
    return name_in(data, int(row["layer"]), int(row["neuron"]))


def _direction(data: DashboardData) -> str:
    """What a neuron with a positive score does to the margin."""
    return "supports" if data.about["sign"] > 0 else "opposes"


def _id(layer: int, neuron: int) -> str:
    return f"neuron-{layer}-{neuron}"


def _what(data: DashboardData) -> str:
    about = data.about
    pairs = ", ".join(f"{n} {name}" for name, n in about["pairs"].items())
    return (
        f"Score: {about['method']} at {about['positions']} tokens. The margin is the reward of chosen minus that of "
        f"rejected; a neuron with a positive score {_direction(data)} it. Effect: change of the mean margin "
        "when the neuron alone is set to zero, negative where the neuron supports the margin, with its "
        f"{100 * about['level']:g}% interval over prompts. Pairs: {pairs}."
    )


def _control(data: DashboardData) -> str:
    """The effects of the neurons asked for, compared with those of random neurons."""
    parts = []
    for name in data.groups:
        sizes = data.table[f"{name}_effect"].abs().groupby(data.table["set"])
        shown = [
            f"{row['count']:.0f} {label}: median {row['median']:.2g}, largest {row['max']:.2g}"
            for label, row in sizes.agg(["count", "median", "max"]).iterrows()
        ]
        parts.append(f"{name} ({'; '.join(shown)})")
    return f"Size of the effects, compared with random neurons of the same layers: {', '.join(parts)}."


def _cells(data: DashboardData, row: "pd.Series[Any]") -> tuple[list[dict[str, Any]], bool]:
    """The cells of a neuron in the table, and whether the interval of an effect excludes 0."""
    cells, beyond = [], False
    for name in data.groups:
        score = row[f"{name}_score"]
        cells.append({"value": score, "text": number(score)})
    for name in data.groups:
        effect, low, high = (row[f"{name}_{end}"] for end in ("effect", "effect_low", "effect_high"))
        cells.append({"value": effect, "text": number_with_interval(effect, low, high)})
        beyond = beyond or low > 0 or high < 0
    weight = row["direct_weight"]
    cells.append({"value": weight, "text": "—" if math.isnan(weight) else number(weight)})
    return cells, beyond


def _row(data: DashboardData, row: "pd.Series[Any]") -> dict[str, Any]:
    layer, neuron = int(row["layer"]), int(row["neuron"])
    cells, beyond = _cells(data, row)
    described = data.of("descriptions", layer, neuron)
    description = None
    if len(described):
        given = described.iloc[0]
        auroc = number_with_interval(given["auroc"], given["low"], given["high"], form=".2f", plus="")
        cells.append({"value": given["auroc"], "text": auroc if given["description"] else "—"})
        description = _description(given)
    random = data.table[data.table["set"] == "random"]
    groups = []
    for name in data.groups:
        effect = number_with_interval(*(row[f"{name}_{end}"] for end in ("effect", "effect_low", "effect_high")))
        others = random[f"{name}_effect"]
        between = f"{number(others.min())} to {number(others.max())}" if len(others) else "no neuron is left"
        score = f"{number(row[f'{name}_score'])} (s.e. {row[f'{name}_score_stderr']:.2g})"
        groups.append({"name": name, "cells": [score, effect, between, f"{row[f'{name}_n']:.0f}"]})
    tokens = data.of("tokens", layer, neuron)
    return {
        "id": _id(layer, neuron),
        "name": _name(data, row),
        "layer": layer,
        # Sort by layer, then by neuron.
        "order": layer * 1_000_000 + neuron,
        "beyond": "yes" if beyond else "no",
        "cells": cells,
        "description": description,
        "groups": groups,
        "weight": _weight(data, row),
        "promoted": _chips(tokens[tokens["kind"] == "promoted"]),
        "suppressed": _chips(tokens[tokens["kind"] == "suppressed"]),
        "correlated": _correlated(data, layer, neuron),
        "charts": [_chart(data, layer, neuron, name) for name in data.groups],
    }


def _description(given: "pd.Series[Any]") -> dict[str, str]:
    if not given["description"]:
        return {"text": "", "score": f"No description: {given['reason']}."}
    auroc, shuffled = (
        number_with_interval(*(given[name] for name in names), form=".2f", plus="")
        for names in (("auroc", "low", "high"), ("shuffled", "shuffled_low", "shuffled_high"))
    )
    control = "no other neuron has a description" if math.isnan(given["shuffled"]) else f"another neuron's: {shuffled}"
    return {
        "text": given["description"],
        "score": f"AUROC {auroc} on held-out texts ({given['n_active']:.0f} active, {given['n_inactive']:.0f} not); "
        f"{control}.",
    }


def _weight(data: DashboardData, row: "pd.Series[Any]") -> str:
    if math.isnan(row["direct_weight"]):
        return f"none: {data.about['no_weights']}"
    others = data.table.loc[data.table["set"] == "random", "direct_weight"]
    between = f" (random neurons: {number(others.min())} to {number(others.max())})" if len(others) else ""
    return f"{number(row['direct_weight'])}{between}"


def _chips(tokens: pd.DataFrame) -> list[dict[str, Any]]:
    return [
        {"text": shown_token(token), "weight": number(weight), "special": False}
        for token, weight in zip(tokens["token"], tokens["weight"], strict=True)
    ]


def _correlated(data: DashboardData, layer: int, neuron: int) -> list[dict[str, str]]:
    rows = data.of("correlated", layer, neuron)
    asked = set(data.neurons)
    return [
        {
            "name": name_in(data, int(other), int(index)),
            "id": _id(int(other), int(index)) if (other, index) in asked else "",
            "text": f"{value:+.2f}",
        }
        for other, index, value in zip(rows["other_layer"], rows["other_neuron"], rows["correlation"], strict=True)
    ]


def _texts(data: DashboardData) -> Markup:
    """The examples as JSON that is safe inside an HTML element, which no text can end."""
    examples: dict[str, list[dict[str, Any]]] = {}
    for example in data.examples:
        name = name_in(data, example.layer, example.neuron)
        sides = {side: page_text(getattr(example, side)) for side in ("chosen", "rejected")}
        examples.setdefault(name, []).append({"group": example.group, "pair": example.pair, **sides})
    text = json.dumps(examples, separators=(",", ":"))
    return Markup(text.replace("&", "\\u0026").replace("<", "\\u003c"))  # noqa: S704 - JSON without < and &


def _scatter(data: DashboardData) -> dict[str, Any]:
    """All neurons by their scores on the first two groups; a single group is drawn against the layer."""
    across, up = (*data.groups, "layer")[:2]
    scatter = data.scatter
    x_values = scatter[f"{across}_score"]
    y_values = scatter[f"{up}_score"] if len(data.groups) > 1 else scatter["layer"]
    x_axis, y_axis = _axis(x_values, _LEFT, _RIGHT), _axis(y_values, _BOTTOM, _TOP)
    cloud = [f"M{x_axis['at'](x):.1f} {y_axis['at'](y):.1f}h0" for x, y in zip(x_values, y_values, strict=True)]
    points = []
    points_of_all = zip(scatter["layer"], scatter["neuron"], x_values, y_values, strict=True)
    at = {(layer, neuron): (x, y) for layer, neuron, x, y in points_of_all}
    for layer, neuron in data.neurons:
        x, y = at[layer, neuron]
        label = f"{name_in(data, layer, neuron)}: {across} {number(x)}"
        label += f", {up} {number(y)}" if len(data.groups) > 1 else ""
        points.append(
            {"id": _id(layer, neuron), "label": label, "x": f"{x_axis['at'](x):.1f}", "y": f"{y_axis['at'](y):.1f}"}
        )
    n, total = len(scatter), data.about["n_neurons"]
    shown = f"all {total}" if n == total else f"a random {n} of {total}"
    toward = f"{_direction(data)} the margin \N{RIGHTWARDS ARROW}"
    zero_x, zero_y = x_axis["at"](0.0), y_axis["at"](0.0)
    return {
        "width": _WIDTH, "height": _HEIGHT, "left": _LEFT, "right": _RIGHT, "bottom": _BOTTOM,
        "middle": (_TOP + _BOTTOM) / 2,
        "x_ticks": x_axis["ticks"], "y_ticks": y_axis["ticks"],
        "zero": f"M{zero_x:.1f} {_TOP}V{_BOTTOM}M{_LEFT} {zero_y:.1f}H{_RIGHT}",
        "axes": f"M{_LEFT} {_TOP}V{_BOTTOM}H{_RIGHT}",
        "x_label": f"score on {across} ({toward})",
        "y_label": f"score on {up} ({toward})" if len(data.groups) > 1 else up,
        "cloud": "".join(cloud), "points": points,
        "label": f"{data.about['method']} of neurons on {across} and {up}",
        "caption": f"Scores of {shown} neurons. Large points have a card: select one to open it.",
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


def _chart(data: DashboardData, layer: int, neuron: int, group: str) -> dict[str, Any]:
    """A histogram of texts by the neuron's largest activation: chosen upwards, rejected downwards."""
    rows = data.of("distribution", layer, neuron)
    rows = rows[rows["group"] == group]
    most, middle = max(1, int(rows["texts"].max())), (_CHART_HEIGHT - 16) / 2
    low, high = float(rows["low"].min()), float(rows["high"].max())
    bars = {"positive": "", "negative": "", "either": ""}
    counts = []
    for side, sign in (("chosen", -1), ("rejected", 1)):
        part = rows[rows["side"] == side]
        counts.append(f"{int(part['texts'].sum())} {side}")
        width = _CHART_WIDTH / max(1, len(part))
        for place, (start, end, n) in enumerate(zip(part["low"], part["high"], part["texts"], strict=True)):
            if n:
                kind = "positive" if start >= 0 else "negative" if end <= 0 else "either"
                up = sign * n / most * (middle - 2)
                bars[kind] += f"M{place * width:.1f} {middle:.1f}h{width - 1:.1f}v{up:.1f}h{1 - width:.1f}z"
    return {
        "width": _CHART_WIDTH + 60,
        "height": _CHART_HEIGHT,
        "label_at": _CHART_WIDTH + 6,
        **bars,
        "axis": f"M0 {middle:.1f}H{_CHART_WIDTH}",
        "ticks": _ends(low, high),
        "caption": f"{group}: texts by largest activation ({' and '.join(counts)}; the tallest bar is {most})",
    }


def _ends(low: float, high: float) -> Sequence[dict[str, Any]]:
    return [
        {"at": 0, "text": f"{low:.3g}", "anchor": "start"},
        {"at": _CHART_WIDTH, "text": f"{high:.3g}", "anchor": "end"},
    ]
