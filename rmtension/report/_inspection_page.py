"""The page of one inspected model: what ablation changes first, then groups, conflict, faithfulness and neurons."""

import json
import math
from collections.abc import Iterator, Mapping
from typing import Any

import pandas as pd

from rmtension import plots
from rmtension.data._groups import ALL
from rmtension.evaluation._intervals import with_interval
from rmtension.report._figures import NO_FIGURES, Picture, as_picture, can_draw_figures
from rmtension.report._html import dashboards_section
from rmtension.report._page import Answer, Folded, Page, PageSection, Reproduction, rounded
from rmtension.study._inspection_findings import own_effects
from rmtension.study._inspection_result import ModelInspection
from rmtension.study._speed import duration

_N_SENTENCES = 3
# The figure at the top shows the sets with the largest effects.
_MOST_SETS = 4
_AGAINST = ("first_against_second", "second_against_first")
_MEASURES = ("accuracy", "margin", "longer response", "refusing", "responding", "balanced")


def inspection_page(inspection: ModelInspection) -> Page:
    """All that the page of an inspection shows."""
    summary = inspection.summary
    sentences = inspection.findings()
    failed = sentences[:1] if not inspection.tables["checks"]["passed"].astype(bool).all() else []
    sentences = sentences[len(failed) :]
    undecided = inspection.undecided()
    return Page(
        f"One reward model: {summary['architecture']}{_read_by(summary)}",
        Answer(
            sentences[:_N_SENTENCES],
            _leading_picture(inspection),
            note=_note(summary),
            table=_effects(inspection.to_frame("effects")),
            table_summary="The effect of every set on every group, with intervals and random sets",
            folds=[
                *([Folded("More findings", sentences[_N_SENTENCES:])] if sentences[_N_SENTENCES:] else []),
                Folded("What these pairs do not decide, and limits", undecided),
            ],
        ),
        list(_sections(inspection)),
        question="Which neurons make this model prefer what it prefers, and what happens without them?",
        warnings=failed,
        dashboards=None if inspection.dashboards is None else dashboards_section(inspection.dashboards),
        provenance=Reproduction(
            "This code writes such a page again. Replace the names with those of your checkpoint and pairs; the "
            "fingerprint and digest below identify the model and pairs of this page.",
            _code(inspection),
            json.dumps(dict(summary), indent=2),
        ),
    )


def _note(summary: Mapping[str, Any]) -> str:
    return (
        f"Intervals are {100 * summary['level']:g}% over prompts. A top set is the {100 * summary['fraction']:g}% of "
        "neurons that support a group's margin most, scored on one half of the prompts; effects are measured on the "
        "other half. Ablated neurons are replaced by their mean activation."
    )


# -- parts -------------------------------------------------------------------------------------------------------------


def _leading_picture(inspection: ModelInspection) -> Picture | None:
    if not can_draw_figures():
        return None
    effects = inspection.to_frame("effects")
    sets = own_effects(effects)["set"].tolist()[:_MOST_SETS]
    shown = effects[effects["set"].isin(sets)]
    if not len(shown):
        return None
    groups = shown["group"].unique()
    # Without groups there is one row, which needs no second name.
    named = shown[shown["group"] != ALL] if len(groups) > 1 else shown
    size = shown["size"].max()
    n_sets = len(own_effects(effects))
    which = (
        "each group's top set"
        if len(sets) == n_sets
        else f"{len(sets)} of {n_sets} groups' top sets, those with the largest effects"
    )
    title = (
        f"Effect of ablating {which} (at most {size:,} neurons)\n"
        "Mean change of the margin with its interval; grey: random sets of the same size per layer"
    )
    figure = plots.effects_by_group(named, quantity="margin", title=title)
    return as_picture(figure, "effects.png")


def _sections(inspection: ModelInspection) -> Iterator[PageSection]:
    drawn = can_draw_figures()
    without = "" if drawn else NO_FIGURES
    groups = inspection.to_frame("groups")
    yield PageSection(
        "Groups of pairs",
        "How well the model ranks each group, compared with preferring the longer response.",
        table=_groups(groups),
        is_open=len(groups["group"].unique()) <= _MOST_SETS,
    )
    if inspection.maps:
        maps = inspection.to_frame("maps")
        strongest = maps.iloc[int(maps["cosine"].abs().to_numpy().argmax())]
        report = inspection.maps[strongest["first"], strongest["second"]]
        yield PageSection(
            "Support and conflict",
            "What every neuron does to the margins of two groups: in the upper right it supports both, in the lower "
            "left it opposes both, elsewhere it supports one against the other. The figure shows the two groups whose "
            f"attributions are most alike or most opposed. {without}".strip(),
            pictures=[as_picture(plots.conflict_scatter(report), "conflict.png")] if drawn else [],
            table=_maps(maps),
        )
    yield from _outputs(inspection, drawn=drawn)
    if (agreement := inspection.agreement) is not None:
        yield PageSection(
            "How far the scores can be trusted",
            "Scores predict the effect of an ablation; the figure compares them with true ablations of random "
            f"neurons. For sets of neurons the error is often larger. {without}".strip(),
            pictures=[as_picture(plots.faithfulness_scatter(agreement), "faithfulness.png")] if drawn else [],
            table=_trust(inspection),
        )
    yield PageSection(
        "Checks of this model",
        "Whether rewards and hooks are right on this model. The documentation explains each check ('Check your own "
        "model').",
        table=rounded(inspection.to_frame("checks")),
    )
    yield PageSection(
        "Pairs and times",
        lines=_pairs(inspection),
        table=_times(inspection),
        note="Times: what the plan predicted, and what this run took.",
    )


def _outputs(inspection: ModelInspection, *, drawn: bool) -> Iterator[PageSection]:
    if "outputs" not in inspection.tables:
        return
    inspected = inspection.summary["output"]
    yield PageSection(
        "Outputs of this model",
        f"How each output ranks each group, and how its margins correlate with those of {inspected!r}, which the rest "
        "of this page is about.",
        table=_ranked(inspection.to_frame("outputs")),
    )
    if not inspection.output_maps:
        return
    maps = inspection.to_frame("output_maps")
    most = maps.iloc[int(maps[list(_AGAINST)].sum(axis=1).to_numpy().argmax())]
    report = inspection.output_maps[most["first"], most["second"]]
    table = _maps(maps).rename(columns={"groups": "outputs"})
    for side, column in (("first", "for the first only"), ("second", "for the second only")):
        table[column] = maps[f"{side}_only"].astype(str)
    yield PageSection(
        "Neurons that outputs share or fight over",
        "What every neuron does to the margins by two outputs, on the same pairs: in the upper right it supports both, "
        "in the lower left it opposes both, elsewhere it supports one against the other. The figure shows the two "
        f"outputs with the most neurons that support one against the other. {'' if drawn else NO_FIGURES}".strip(),
        pictures=[as_picture(plots.conflict_scatter(report), "outputs.png")] if drawn else [],
        table=table,
    )


def _ranked(outputs: pd.DataFrame) -> pd.DataFrame:
    rows = []
    for (output, group), part in outputs.groupby(["output", "group"], sort=False):
        measures = {row["measure"]: row for row in part.to_dict("records")}
        row: dict[str, Any] = {"output": output, "group": group, "n": str(measures["accuracy"]["n"])}
        for measure, estimate in measures.items():
            row[measure] = with_interval(*(estimate[end] for end in ("value", "low", "high")), form=".3g")
        rows.append(row)
    return pd.DataFrame(rows).fillna("")


def _groups(groups: pd.DataFrame) -> pd.DataFrame:
    rows = []
    for name in groups["group"].drop_duplicates():
        measures = {row["measure"]: row for row in groups[groups["group"] == name].to_dict("records")}
        row: dict[str, Any] = {"group": name, "n": str(measures["accuracy"]["n"])}
        row |= {
            measure: with_interval(*(measures[measure][end] for end in ("value", "low", "high")))
            for measure in _MEASURES
            if measure in measures
        }
        rows.append(row | {"note": measures["accuracy"]["note"]})
    frame = pd.DataFrame(rows).fillna("")
    return frame if frame["note"].astype(bool).any() else frame.drop(columns="note")


def _effects(effects: pd.DataFrame) -> pd.DataFrame:
    rows = [
        {
            "set": f"{row['set']} ({row['size']:,})",
            "group": row["group"],
            "of": row["quantity"],
            "before": f"{row['before']:.3g}",
            "after": f"{row['after']:.3g}",
            "effect": with_interval(row["effect"], row["low"], row["high"], form="+.3g"),
            "random sets": _text(row["random_effect"]),
            "beyond random": with_interval(row["beyond_random"], row["beyond_low"], row["beyond_high"], form="+.3g"),
            "n": str(row["n"]),
        }
        for row in effects.to_dict("records")
    ]
    return pd.DataFrame(rows)


def _maps(maps: pd.DataFrame) -> pd.DataFrame:
    rows = [
        {
            "groups": f"{row['first']} and {row['second']}",
            "cosine": with_interval(row["cosine"], row["low"], row["high"], form=".2f"),
            "with random signs": f"{row['random_signs_low']:.2f} to {row['random_signs_high']:.2f}",
            "cosine if both used the same neurons": f"at least {row['same_neurons_low']:.2f}",
            "support both": str(row["support_both"]),
            "oppose both": str(row["oppose_both"]),
            "support the first against the second": str(row["first_against_second"]),
            "support the second against the first": str(row["second_against_first"]),
        }
        for row in maps.to_dict("records")
    ]
    return pd.DataFrame(rows)


def _trust(inspection: ModelInspection) -> pd.DataFrame:
    sets = inspection.to_frame("faithfulness_sets")
    rows = [
        {
            "top set": f"{100 * row['fraction']:g}% ({row['size']:,} neurons)",
            "predicted change of the margin": _text(row["predicted"]),
            "true change": with_interval(row["effect"], row["low"], row["high"], form="+.3g"),
            "random sets": _text(row["random"]),
        }
        for row in sets.to_dict("records")
    ]
    return pd.DataFrame(rows)


def _pairs(inspection: ModelInspection) -> list[str]:
    summary = inspection.summary
    available = summary["plan"]["available"]
    return [
        f"{name}: {summary['scoring'].get(name, 0):,} pairs score neurons, {summary['evaluating'].get(name, 0):,} "
        f"measure effects; {used:,} of {available[name]:,} pairs were used."
        for name, used in summary["plan"]["pairs"].items()
    ]


def _times(inspection: ModelInspection) -> pd.DataFrame:
    measured = inspection.summary["seconds"]
    rows = [
        {
            "step": step["step"],
            "what": step["what"],
            "passes": f"{step['passes']:.1f}",
            "predicted": duration(step["seconds"]),
            "measured": duration(measured[step["step"]]) if step["step"] in measured else "",
        }
        for step in inspection.summary["plan"]["steps"]
    ]
    return pd.DataFrame(rows)


def _text(value: float) -> str:
    return "" if math.isnan(value) else f"{value + 0.0:+.3g}"


def _by(by: str | None) -> str:
    return "labels" if by == "custom" else repr(by)


def _opened_with(summary: Mapping[str, Any]) -> str:
    head = f", head={summary['head']}" if "head" in summary else ""
    return head + (f", output={summary['output']!r}" if "output" in summary else "")


def _read_by(summary: Mapping[str, Any]) -> str:
    """The output or the head that the reward is read with, if the model has several or it was passed."""
    output = f", output {summary['output']}" if "output" in summary else ""
    return output + (f", {summary['head']}" if "head" in summary else "")


def _compared_with(summary: Mapping[str, Any]) -> str:
    return f", outputs={summary['outputs'][1:]!r}" if "outputs" in summary else ""


def _imported(head: str) -> str:
    name = head.partition("(")[0]
    known = name in ("LogRatioHead", "ProcessHead")
    return f"from rmtension.heads import {name}" if known else f"# {name}: the head that was passed"


def _code(inspection: ModelInspection) -> str:
    summary = inspection.summary
    return "\n".join(
        [
            f"# rmtension {summary['version']}",
            "from rmtension import PreferencePairs, RewardHead",
            *([_imported(summary["head"])] if "head" in summary else []),
            "from rmtension.report import write_report",
            "from rmtension.study import inspect_model",
            "",
            f'head = RewardHead.from_pretrained("model"{_opened_with(summary)})',
            'pairs = PreferencePairs.read("pairs.csv")',
            f"options = { {name: summary[name] for name in ('fraction', 'seed', 'budget')} }",
            f"inspection = inspect_model(head, pairs, by={_by(summary['by'])}{_compared_with(summary)}, **options)",
            'inspection.save("inspection")',
            'write_report(inspection, "inspection")',
        ]
    )
