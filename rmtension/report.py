"""A study as text: tables for a terminal, and a page of Markdown with pictures."""

import html
import importlib.util
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from rmtension import plots
from rmtension.distributed import current
from rmtension.files import filled_whole
from rmtension.readable import SECTIONS, Section, families_of, readable_tables, rows_of_family
from rmtension.study_result import StudyResult

PAGE = "report.md"
NO_FIGURES = 'No figures: matplotlib is not installed. `pip install "rmtension[viz]"`, then `rmtension report`.'
# Table -> file name, function and arguments of its figures.
_FIGURES: dict[str, tuple[tuple[str, Callable[..., Any], dict[str, str]], ...]] = {
    "accuracy": (("accuracy", plots.accuracy, {}), ("refuse_respond", plots.refuse_respond, {})),
    "subsets": (("radar", plots.radar, {}),),
    "comparisons": (("comparisons", plots.comparisons, {}),),
    "transferability": (("transferability", plots.transferability, {}),),
    "confidence": (("confidence", plots.confidence, {}),),
    "rewards": (("distributions", plots.distributions, {}),),
    "depth": (("depth", plots.depth, {}),),
    "overlap": (("overlap", plots.overlap, {}),),
    "curves": (
        ("curves_accuracy", plots.curves, {"quantity": "accuracy"}),
        ("curves_margin", plots.curves, {"quantity": "margin_change"}),
    ),
    "ablation": (
        ("matrix_margin", plots.matrix, {"quantity": "margin"}),
        ("matrix_accuracy", plots.matrix, {"quantity": "accuracy"}),
    ),
    "equal_size": (("equal_size", plots.equal_size, {}),),
    "collapse": (("collapse", plots.collapse, {}),),
}


def to_text(result: StudyResult) -> str:
    """What was done, and the readable tables as aligned text; long tables are named.

    Examples:
        >>> from rmtension import StudyOptions, TensionStudy
        >>> models = dict.fromkeys(("helpful", "harmless", "mixed"), head)
        >>> study = TensionStudy(models, pairs, options=StudyOptions(analyses=("accuracy",)))
        >>> print(to_text(study.run(progress=False)).splitlines()[0])
        Family models: seeds 0; without the base model.
    """
    readable = readable_tables(result)
    parts = ["\n".join(notes(result))]
    for section in _present(result):
        table = readable.get(section.title)
        shown = elsewhere(result, section) if table is None else table.to_string(index=False)
        parts.append("\n".join(line for line in (section.title, section.note, shown) if line))
    return "\n\n".join(parts)


def write_report(result: StudyResult, folder: str | Path) -> Path:
    """Write `report.md` and a PNG for every figure that the study has tables for into `folder`; returns the page.

    Without matplotlib the page has the tables alone, and says so.
    """
    folder = Path(folder)
    if not current().is_first:
        return folder / PAGE
    readable = readable_tables(result)
    can_draw = can_draw_figures()
    done = "\n".join(f"- {escaped(one)}" for one in [*notes(result), *([] if can_draw else [NO_FIGURES])])
    parts = ["# A study of helpful, harmless and mixed reward models", done]
    with filled_whole(folder, "report", seal=PAGE) as place:
        for section in _present(result):
            parts.append(f"## {section.title}")
            if section.note:
                parts.append(section.note)
            for name, caption, figure in figures_of(result, section) if can_draw else ():
                figure.savefig(place / name, dpi=144)
                parts.append(f"![{escaped(caption)}]({name})")
            table = readable.get(section.title)
            parts.append(elsewhere(result, section) if table is None else _markdown(table))
        (place / PAGE).write_text("\n\n".join(parts) + "\n", encoding="utf-8")
    return folder / PAGE


def notes(result: StudyResult) -> list[str]:
    """What was done: families, pairs, neurons, ablations, intervals; one sentence or two each."""
    options, summary = result.summary["options"], result.summary
    families, several = pd.DataFrame(summary["families"]), result.n_seeds > 1
    found = []
    for name, part in families.groupby("family", sort=False):
        seeds = ", ".join(str(seed) for seed in part["seed"])
        found.append(f"Family {name}: seeds {seeds}; {'with' if part['base'].all() else 'without'} the base model.")
    for name, part in summary["pairs"].items():
        cut = "it is not known how many" if part["prompts_cut"] is None else part["prompts_cut"]
        found.append(
            f"Pairs, {name}: {part['scoring']} score neurons, {part['evaluating']} others evaluate "
            f"({part['identical_responses']} with identical responses, {cut} prompts cut)."
        )
    found += [
        f"Neurons: top {100 * options['fraction']:g}% by {', '.join(options['scores'])} (ranked by {options['by']}) at "
        f"{options['site']}, {options['positions']} tokens, rule '{options['top_rule']}'.",
        f"Ablation: {options['replacement']}, at all tokens; {options['n_draws']} random sets for every control, "
        f"{options['n_subsamples']} subsamples; causal sets by {options['scores'][0]}.",
        f"Accuracy: a tie counts {options['tie']:g}. Intervals: {100 * options['level']:g}%, bootstrap over prompts"
        + ("; of means over seeds, widened by the spread between them. Counts: range over seeds." if several else "."),
        f"Analyses: {', '.join(options['analyses'])}. rmtension {summary['version']}, seed {options['seed']}.",
    ]
    return found


# -- parts -------------------------------------------------------------------------------------------------------------


def _present(result: StudyResult) -> Iterator[Section]:
    return (section for section in SECTIONS if section.table in result.tables)


def can_draw_figures() -> bool:
    """Whether matplotlib is installed."""
    return importlib.util.find_spec("matplotlib") is not None


def elsewhere(result: StudyResult, section: Section) -> str:
    """What a page says where a table is too long for it."""
    n = len(result.tables[section.table])
    return f"{n} rows: `{section.table}.csv`, as `StudyResult.save` writes it." if n else "No rows."


def figures_of(result: StudyResult, section: Section) -> Iterator[tuple[str, str, Any]]:
    """File name, caption and figure of everything that can be drawn of a section's table."""
    families = families_of(result)
    for place, family in enumerate(families):
        frame = rows_of_family(result, section.table, family)
        for name, draw, options in _FIGURES.get(section.table, ()):
            if _can_draw(name, frame):
                # The number keeps families apart whose names differ only in what a file name cannot hold.
                suffix = f"-{place + 1}-{re.sub(r'[^A-Za-z0-9_.-]+', '-', family)}" if len(families) > 1 else ""
                figure = draw(result, family=family, **options)
                caption = figure.get_suptitle().split("\n")[0]
                yield f"{name}{suffix}.png", re.sub(r"[\[\]]", "", caption), figure


def _can_draw(figure: str, frame: pd.DataFrame) -> bool:
    """Whether the rows are enough for a figure: some need more than one row."""
    if figure == "radar":
        return len(frame[["objective", "subset"]].drop_duplicates()) >= 3
    if figure == "refuse_respond":
        return {"refusing", "responding"} <= set(frame["measure"])
    return len(frame) > 0


def escaped(text: str) -> str:
    """Text of data as Markdown shows it: nothing in it is markup, HTML, a link, or the end of a table's cell."""
    return re.sub(r"([\\`*_|~$]|(?<=\])\()", r"\\\1", html.escape(text, quote=False))


def _markdown(table: pd.DataFrame) -> str:
    def line(cells: Sequence[object]) -> str:
        # A line break would end the table.
        return f"| {' | '.join(escaped(' '.join(str(cell).split())) for cell in cells)} |"

    rows = [line(list(row)) for row in table.itertuples(index=False, name=None)]
    return "\n".join([line(list(table.columns)), line(["---"] * table.shape[1]), *rows])
