"""A study as text: tables for a terminal, and a Markdown page with pictures."""

import html
import re
from collections.abc import Iterator, Sequence

import pandas as pd

from rmtension.report._figures import NO_FIGURES, Pictures
from rmtension.report._tables import SECTIONS, Section, readable_tables
from rmtension.study._model_output import output_label
from rmtension.study._result import StudyResult


def to_text(result: StudyResult) -> str:
    """The settings of a study and its readable tables as aligned text; long tables are named by their file.

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


def to_markdown(result: StudyResult, pictures: Pictures) -> str:
    """The Markdown page of a study, with links to its pictures in the same folder."""
    readable = readable_tables(result)
    settings = "\n".join(f"- {escaped(note)}" for note in [*notes(result), *([NO_FIGURES] if pictures is None else [])])
    parts = ["# A study of helpful, harmless and mixed reward models", settings]
    for section in _present(result):
        parts.append(f"## {section.title}")
        if section.note:
            parts.append(section.note)
        drawn = () if pictures is None else pictures.get(section.table, ())
        parts += [f"![{escaped(picture.caption)}]({picture.name})" for picture in drawn]
        table = readable.get(section.title)
        parts.append(elsewhere(result, section) if table is None else _markdown(table))
    return "\n\n".join(parts) + "\n"


def notes(result: StudyResult) -> list[str]:
    """The settings of a study: families, pairs, neurons, ablations and intervals, as sentences."""
    options, summary = result.summary["options"], result.summary
    families, several = pd.DataFrame(summary["families"]), result.n_seeds > 1
    lines = []
    for name, part in families.groupby("family", sort=False):
        seeds = ", ".join(str(seed) for seed in part["seed"])
        lines.append(f"Family {name}: seeds {seeds}; {'with' if part['base'].all() else 'without'} the base model.")
        outputs = next(entry.get("outputs") for entry in summary["families"] if entry["family"] == name)
        if outputs:
            named = ", ".join(f"{output_label(output)!r} for {model}" for model, output in outputs.items())
            lines.append(f"The models of family {name} are outputs of one model, with the same activations: {named}.")
    for name, part in summary["pairs"].items():
        cut = "an unknown number of" if part["prompts_cut"] is None else part["prompts_cut"]
        behaviour = f"; accuracies are of {part['behaviour']} pairs, which include these" if "behaviour" in part else ""
        lines.append(
            f"Pairs, {name}: {part['scoring']} score neurons, {part['evaluating']} others evaluate "
            f"({part['identical_responses']} with identical responses, {cut} prompts cut){behaviour}."
        )
    lines += [
        f"Neurons: top {100 * options['fraction']:g}% by {', '.join(options['scores'])} (ranked by "
        f"{options['rank_by']}) at {options['site']}, {options['positions']} tokens, rule '{options['cut_rule']}'.",
        f"Ablation: {options['replacement']}, at all tokens; {options['n_draws']} random sets for every control, "
        f"{options['n_subsamples']} subsamples; causal sets by {options['scores'][0]}.",
        f"Accuracy: a tie counts {options['tie_value']:g}. Intervals: {100 * options['level']:g}%, bootstrap over "
        "prompts" + ("; for means over seeds, widened by their spread. Counts: range over seeds." if several else "."),
        f"Analyses: {', '.join(options['analyses'])}. rmtension {summary['version']}, seed {options['seed']}.",
    ]
    return lines


def elsewhere(result: StudyResult, section: Section) -> str:
    """The sentence that replaces a table which is too long for the page."""
    n = len(result.tables[section.table])
    return f"{n} rows, in `{section.table}.csv`, which `StudyResult.save` writes." if n else "No rows."


def escaped(text: str) -> str:
    """Text of the data escaped for Markdown, so that it contains no markup, HTML, link or end of a table cell."""
    return re.sub(r"([\\`*_|~$]|(?<=\])\()", r"\\\1", html.escape(text, quote=False))


# -- parts -------------------------------------------------------------------------------------------------------------


def _present(result: StudyResult) -> Iterator[Section]:
    return (section for section in SECTIONS if section.table in result.tables)


def _markdown(table: pd.DataFrame) -> str:
    def line(cells: Sequence[object]) -> str:
        # A line break would end the row.
        return f"| {' | '.join(escaped(' '.join(str(cell).split())) for cell in cells)} |"

    rows = [line(list(row)) for row in table.itertuples(index=False, name=None)]
    return "\n".join([line(list(table.columns)), line(["---"] * table.shape[1]), *rows])
