"""One page for studies and for single models: an answer, sections, dashboards and provenance, in one HTML file."""

import base64
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.resources import files
from typing import Any

import pandas as pd

from rmtension.attribution._dashboard_page import policy_hash, template_of
from rmtension.report._figures import Picture

# The size of figures on the page, in pixels per inch.
_SHOWN = 110


@dataclass(frozen=True)
class Folded:
    """Lines behind one visible line, `summary`."""

    summary: str
    lines: Sequence[str]


@dataclass(frozen=True)
class Answer:
    """What a page opens with: two or three sentences with their numbers, and the figure that shows them.

    `note` says what all sentences have in common, such as the level of the intervals. `table` has the numbers behind
    the sentences, folded under `table_summary`. `folds` are further folded lines, such as what was not decided.
    """

    sentences: Sequence[str]
    picture: Picture | None = None
    note: str = ""
    table: pd.DataFrame | None = None
    table_summary: str = "The numbers behind these sentences"
    folds: Sequence[Folded] = ()


@dataclass(frozen=True, eq=False)
class PageSection:
    """One section: a note, lines, pictures, and a table that is folded under them unless `is_open`."""

    title: str
    note: str = ""
    lines: Sequence[str] = ()
    pictures: Sequence[Picture] = ()
    table: pd.DataFrame | None = None
    is_open: bool = False


@dataclass(frozen=True)
class Dashboards:
    """A section that was rendered elsewhere: its HTML, in which all texts are escaped, with its style and script."""

    html: str
    style: str = ""
    script: str = ""
    title: str = "Single neurons"


@dataclass(frozen=True, eq=False)
class Reproduction:
    """How to make the page again: code, the models with their fingerprints, and all options as JSON."""

    text: str
    code: str
    options: str
    models: pd.DataFrame | None = None


@dataclass(frozen=True, eq=False)
class Page:
    """All that a page shows, from top to bottom. Every text may come from the data: it is escaped.

    `question` is one line under the title. `warnings` come before the answer, for example checks of the model that
    failed.
    """

    title: str
    answer: Answer
    sections: Sequence[PageSection] = ()
    question: str = ""
    warnings: Sequence[str] = ()
    dashboards: Dashboards | None = None
    provenance: Reproduction | None = None


def render_page(page: Page) -> str:
    """The text of one HTML file that contains all that it shows, loads nothing, and runs only its own scripts.

    Tables are folded under their figures, and become one card per row on a phone. The contents are at the side of a
    wide window. A Content-Security-Policy allows the page's styles and scripts by their hashes, and nothing else.
    Cells of tables are shown as `str` gives them, so format numbers before.

    Examples:
        >>> import pandas as pd
        >>> from rmtension.report._page import Answer, Page, PageSection, render_page
        >>> table = pd.DataFrame({"group": ["<helpful>"], "accuracy": ["0.91 [0.86, 0.95]"]})
        >>> answer = Answer(["Without these 16 neurons the margin falls from 4.80 to 0.98."])
        >>> html = render_page(Page("Model A", answer, [PageSection("Accuracy", table=table)]))
        >>> "&lt;helpful&gt;" in html, "http" in html.partition("<body>")[2]
        (True, False)
    """
    parts = page.dashboards
    styles = [read_part("page.css"), *([parts.style] if parts is not None and parts.style else [])]
    scripts = [read_part("page.js"), *([parts.script] if parts is not None and parts.script else [])]
    policy = "default-src 'none'; img-src data:; style-src {}; script-src {}; base-uri 'none'; form-action 'none'"
    sections = list(_sections(page.sections))
    contents = [{"id": "answer", "title": "Answer"}]
    contents += [{"id": section["id"], "title": section["title"]} for section in sections]
    contents += [{"id": "dashboards", "title": parts.title}] if parts is not None else []
    contents += [{"id": "provenance", "title": "Provenance"}] if page.provenance is not None else []
    return render_part(
        "page.html",
        title=page.title,
        question=page.question,
        warnings=page.warnings,
        policy=policy.format(*(" ".join(f"'{policy_hash(text)}'" for text in texts) for texts in (styles, scripts))),
        styles=styles,
        scripts=scripts,
        contents=contents,
        answer=_answer(page.answer),
        sections=sections,
        dashboards=parts,
        provenance=None if page.provenance is None else _provenance(page.provenance),
    )


def rounded(frame: pd.DataFrame) -> pd.DataFrame:
    """A table of texts, with three digits of every float."""
    rows = [
        {name: f"{cell:.3g}" if isinstance(cell, float) else str(cell) for name, cell in row.items()}
        for row in frame.to_dict("records")
    ]
    return pd.DataFrame(rows)


def render_part(name: str, **values: Any) -> str:
    """The text of one template of the folder `page`, with all values escaped."""
    return template_of(read_part(name)).render(**values)


def read_part(name: str) -> str:
    """The text of one file of the folder `page`."""
    return (files("rmtension.report") / "page" / name).read_text(encoding="utf-8")


# -- parts -------------------------------------------------------------------------------------------------------------


def _answer(answer: Answer) -> dict[str, Any]:
    return {
        "sentences": answer.sentences,
        "note": answer.note,
        "figure": None if answer.picture is None else _figure(answer.picture),
        "table": _frame(answer.table),
        "table_summary": answer.table_summary,
        "folds": answer.folds,
    }


def _sections(sections: Sequence[PageSection]) -> Iterator[dict[str, Any]]:
    for number, section in enumerate(sections, start=1):
        slug = re.sub(r"[^a-z0-9]+", "-", section.title.lower()).strip("-")
        rows = 0 if section.table is None else len(section.table)
        yield {
            # The number distinguishes titles that differ only in other characters.
            "id": f"s{number}-{slug}",
            "title": section.title,
            "note": section.note,
            "lines": section.lines,
            "figures": [_figure(picture) for picture in section.pictures],
            "table": _frame(section.table),
            "summary": f"Table: {section.title} ({rows} row{'' if rows == 1 else 's'})",
            "open": section.is_open,
        }


def _provenance(provenance: Reproduction) -> dict[str, Any]:
    return {
        "text": provenance.text,
        "code": provenance.code,
        "options": provenance.options,
        "table": _frame(provenance.models),
    }


def _frame(frame: pd.DataFrame | None) -> dict[str, Any] | None:
    if frame is None:
        return None
    rows = [[str(cell) for cell in row] for row in frame.to_numpy().tolist()]
    return {"columns": [str(column) for column in frame.columns], "rows": rows}


def _figure(picture: Picture) -> dict[str, Any]:
    width, height = (round(_SHOWN * inches) for inches in picture.inches)
    png = base64.b64encode(picture.png).decode()
    alt = f"{picture.caption}. {picture.rest}".strip()
    return {"png": png, "width": width, "height": height, "alt": alt, "caption": picture.caption}
