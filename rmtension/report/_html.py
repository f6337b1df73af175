"""A study as one HTML file that loads nothing: findings, figures, tables, single neurons and provenance."""

import base64
import json
from importlib.resources import files
from typing import Any

import jinja2
import pandas as pd

from rmtension.attribution._dashboard_page import neuron_section, page_part, policy_hash
from rmtension.attribution._neuron_dashboards import NeuronDashboards
from rmtension.report._figures import NO_FIGURES, Picture, Pictures
from rmtension.report._main_findings import findings, unconcluded
from rmtension.report._tables import SECTIONS, Section, readable_tables
from rmtension.report._text import elsewhere, notes
from rmtension.study._result import StudyResult

# The size of figures on the page, in pixels per inch.
_SHOWN = 110
_TITLE = "A study of helpful, harmless and mixed reward models"
_QUESTION = (
    "Which neurons of reward models drive judgments of helpfulness and harmlessness, which are shared, and what does "
    "each objective lose when they are ablated?"
)


def to_html(result: StudyResult, pictures: Pictures, *, neurons: NeuronDashboards | None = None) -> str:
    """The text of the page."""
    here = files("rmtension.report") / "page"
    style, page = ((here / f"report.{end}").read_text(encoding="utf-8") for end in ("css", "html"))
    style, script = page_part("neurons.css") + style, page_part("neurons.js")
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
    listed = findings(result)
    readable = readable_tables(result)
    level = result.summary["options"]["level"]
    return environment.from_string(page).render(
        title=_TITLE,
        question=_QUESTION,
        style=style,
        script=script,
        style_hash=policy_hash(style),
        script_hash=policy_hash(script),
        reading=f"Every number has a {100 * level:g}% interval, a control and a sample size n. If the interval "
        "contains the value of no difference, the data do not show a direction, which is then called open.",
        glance=_frame(_glance(listed, several=len({finding.family for finding in listed}) > 1)),
        unconcluded=unconcluded(result, listed),
        notes=notes(result),
        sections=[_section(result, part, readable, pictures) for part in SECTIONS if part.table in result.tables],
        neurons=None if neurons is None else neuron_section(neurons),
        code=_code(result, neurons),
        models=_frame(_models(result)),
        summary=json.dumps(result.summary, indent=2),
    )


# -- parts -------------------------------------------------------------------------------------------------------------


def _frame(frame: pd.DataFrame) -> dict[str, Any]:
    return {"columns": list(frame.columns), "rows": [[str(cell) for cell in row] for row in frame.to_numpy().tolist()]}


def _glance(listed: list[Any], *, several: bool) -> pd.DataFrame:
    columns = ["question", "number", "value [interval]", "compared with", "n", "direction"]
    rows = [
        [
            finding.question,
            finding.quantity,
            finding.estimate,
            finding.control,
            finding.n,
            "open" if finding.is_open else _side(finding),
        ]
        for finding in listed
    ]
    frame = pd.DataFrame(rows, columns=columns)
    if several:
        frame.insert(0, "family", [finding.family for finding in listed])
    return frame


def _side(finding: Any) -> str:
    return f"{'above' if finding.low > finding.none else 'below'} {finding.none:g}"


def _section(
    result: StudyResult, section: Section, readable: dict[str, pd.DataFrame], pictures: Pictures
) -> dict[str, Any]:
    table = readable.get(section.title)
    return {
        "title": section.title,
        "note": " ".join(filter(None, (section.note, NO_FIGURES if pictures is None else ""))),
        "figures": [] if pictures is None else [_figure(picture) for picture in pictures.get(section.table, ())],
        "table": None if table is None else _frame(table),
        "elsewhere": elsewhere(result, section),
    }


def _figure(picture: Picture) -> dict[str, Any]:
    width, height = (round(_SHOWN * inches) for inches in picture.inches)
    png = base64.b64encode(picture.png).decode()
    alt = f"{picture.caption}. {picture.rest} The table below has its numbers."
    return {"png": png, "width": width, "height": height, "alt": alt, "caption": picture.caption}


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
        paths = [f'"helpful-{seed}", "harmless-{seed}", "mixed-{seed}"', '"base"' if family["base"] else "None"]
        families.append(f"    ModelFamily({', '.join(paths)}, name={name!r}, seed={seed}),")
    pairs = [
        f'    "{name}": PreferencePairs.read("{name}.jsonl"),  # {part["scoring"]} + {part["evaluating"]} pairs'
        for name, part in result.summary["pairs"].items()
    ]
    lines = [
        f"# pip install rmtension=={result.summary['version']}",
        "from rmtension import PreferencePairs, StudyOptions, TensionStudy",
        "from rmtension.study import ModelFamily",
        "from rmtension.report import write_report",
        "",
        "families = [",
        *families,
        "]",
        "pairs = {",
        *pairs,
        "}",
        f"options = StudyOptions(\n{options},\n)",
        "study = TensionStudy(families, pairs, options=options)",
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
