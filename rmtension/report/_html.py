"""A study as one HTML page: its answer, figures, tables, single neurons and provenance."""

import json
from collections.abc import Sequence
from typing import Any

import pandas as pd

from rmtension.attribution._dashboard_page import neuron_section, page_part
from rmtension.attribution._neuron_dashboards import NeuronDashboards
from rmtension.report._answer import answer_note, answer_sentences
from rmtension.report._figures import NO_FIGURES, Picture, Pictures
from rmtension.report._finding import Finding
from rmtension.report._main_findings import findings, unconcluded
from rmtension.report._page import (
    Answer,
    Dashboards,
    Folded,
    Page,
    PageSection,
    Reproduction,
    render_page,
)
from rmtension.report._tables import SECTIONS, Section, readable_tables
from rmtension.report._text import elsewhere, notes
from rmtension.study._result import StudyResult

_TITLE = "A study of helpful, harmless and mixed reward models"
_QUESTION = (
    "Which neurons drive judgments of helpfulness and harmlessness, which are shared, and what is lost without them?"
)
# The number of sentences that a page opens with; the command line prints all.
_N_SENTENCES = 3
# Table -> the figure of the page's answer. The first that the study has is shown at the top.
_LEADING = {"ablation": "matrix_margin", "comparisons": "comparisons", "overlap": "overlap", "accuracy": "accuracy"}


def to_html(result: StudyResult, pictures: Pictures, *, neurons: NeuronDashboards | None = None) -> str:
    """The text of the page."""
    return render_page(study_page(result, pictures, neurons=neurons))


def study_page(result: StudyResult, pictures: Pictures, *, neurons: NeuronDashboards | None = None) -> Page:
    """All that the page of a study shows."""
    readable = readable_tables(result)
    leading = _leading_picture(pictures)
    parts = [part for part in SECTIONS if part.table in result.tables]
    return Page(
        _TITLE,
        _answer(result, leading),
        [
            *(_section(result, part, readable, pictures, leading) for part in parts),
            PageSection("Data and models", lines=notes(result)),
        ],
        question=_QUESTION,
        dashboards=None if neurons is None else dashboards_section(neurons),
        provenance=Reproduction(
            "This code writes the report again. Replace the names with those of your checkpoints and pairs; the "
            "fingerprints and digests below identify the models and pairs of this report.",
            _code(result, neurons),
            json.dumps(result.summary, indent=2),
            _models(result),
        ),
    )


# -- parts -------------------------------------------------------------------------------------------------------------


def _leading_picture(pictures: Pictures) -> Picture | None:
    """The figure at the top; of several families, that of the first."""
    for table, name in _LEADING.items():
        found = [picture for picture in (pictures or {}).get(table, ()) if picture.name.startswith(name)]
        if found:
            return found[0]
    return None


def _answer(result: StudyResult, leading: Picture | None) -> Answer:
    listed = findings(result)
    sentences = answer_sentences(result)[:_N_SENTENCES]
    return Answer(
        sentences or ["This study has tables without a summary; see the sections below."],
        leading,
        note=answer_note(result),
        table=_glance(listed, several=len({finding.family for finding in listed}) > 1) if listed else None,
        table_summary=f"All {len(listed)} comparisons, with intervals, controls and sample sizes",
        folds=[Folded(_undecided(listed), unconcluded(result, listed))],
    )


def _undecided(listed: Sequence[Finding]) -> str:
    n_open = sum(finding.is_open for finding in listed)
    if not n_open:
        return "What these data do not say"
    return f"Not decided by these data: {n_open} of {len(listed)} comparisons, and the limits of the study"


def dashboards_section(neurons: NeuronDashboards) -> Dashboards:
    """The section of single neurons."""
    return Dashboards(neuron_section(neurons), style=page_part("neurons.css"), script=page_part("neurons.js"))


def _glance(listed: Sequence[Finding], *, several: bool) -> pd.DataFrame:
    columns = ["question", "number", "value [interval]", "compared with", "n", "direction"]
    rows = [
        [finding.question, finding.quantity, finding.estimate, finding.control, finding.n, finding.direction]
        for finding in listed
    ]
    frame = pd.DataFrame(rows, columns=columns)
    if several:
        frame.insert(0, "family", [finding.family for finding in listed])
    return frame


def _section(
    result: StudyResult,
    section: Section,
    readable: dict[str, pd.DataFrame],
    pictures: Pictures,
    leading: Picture | None,
) -> PageSection:
    table = readable.get(section.title)
    drawn = [] if pictures is None else [one for one in pictures.get(section.table, ()) if one is not leading]
    at_top = leading is not None and leading in (pictures or {}).get(section.table, ())
    notes_of = (
        section.note,
        f"The figure \u201c{leading.caption}\u201d is at the top of the page."
        if at_top and leading is not None
        else "",
        NO_FIGURES if pictures is None else "",
        "" if table is not None else elsewhere(result, section),
    )
    return PageSection(section.title, note=" ".join(filter(None, notes_of)), pictures=drawn, table=table)


def _models(result: StudyResult) -> pd.DataFrame:
    columns = ("architecture", "model", "dtype")
    rows = [
        [family, name, *(model[column] for column in columns)]
        for family, models in result.summary["models"].items()
        for name, model in models.items()
    ]
    return pd.DataFrame(rows, columns=["family and seed", "model", "architecture", "fingerprint", "dtype"])


def _code(result: StudyResult, neurons: NeuronDashboards | None) -> str:
    """The code that makes this report again, with placeholders for the names of files."""
    options = ",\n".join(f"    {name}={_literal(value)}" for name, value in result.summary["options"].items())
    families = []
    for family in result.summary["families"]:
        name, seed = family["family"], family["seed"]
        paths = [f'"{model}-{seed}"' for model in ("helpful", "harmless", "mixed")]
        if outputs := family.get("outputs"):
            paths = [f'ModelOutput("model-{seed}", {output!r})' for output in outputs.values()]
        paths.append('"base"' if family["base"] else "None")
        families.append(f"    ModelFamily({', '.join(paths)}, name={name!r}, seed={seed}),")
    has_outputs = any(family.get("outputs") for family in result.summary["families"])
    is_halved = result.summary.get("halved", True)
    pairs, scoring = [], []
    for name, part in result.summary["pairs"].items():
        n = f"{part['scoring']} + {part['evaluating']}" if is_halved else part["evaluating"]
        pairs.append(f'    "{name}": PreferencePairs.read("{name}.jsonl"),  # {n} pairs')
        scoring.append(f'    "{name}": PreferencePairs.read("{name}-scoring.jsonl"),  # {part["scoring"]} pairs')
    given = "" if is_halved else ", scoring_pairs=scoring_pairs"
    lines = [
        f"# rmtension {result.summary['version']}",
        "from rmtension import PreferencePairs, StudyOptions, TensionStudy",
        f"from rmtension.study import ModelFamily{', ModelOutput' if has_outputs else ''}",
        "from rmtension.report import write_report",
        "",
        "families = [",
        *families,
        "]",
        "pairs = {",
        *pairs,
        "}",
        *([] if is_halved else ["scoring_pairs = {", *scoring, "}"]),
        f"options = StudyOptions(\n{options},\n)",
        f"study = TensionStudy(families, pairs{given}, options=options)",
        'result = study.run(folder="study")',
        'result.save("study", overwrite=True)',
    ]
    if neurons is not None:
        lines += [
            "from rmtension.report import study_neurons",
            "",
            f"dashboards = study_neurons(study, n={len(neurons.neurons)})",
        ]
    lines.append(f'write_report(result, "study"{", neurons=dashboards" if neurons is not None else ""})')
    return "\n".join(lines)


def _literal(value: Any) -> str:
    return repr(tuple(value)) if isinstance(value, list) else repr(value)
