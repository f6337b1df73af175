"""The readable tables of a study: their order on the page, their columns, and the format of their numbers."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd

from rmtension.plots._rows import Rows, count
from rmtension.plots._top_sets import split_ceiling
from rmtension.study._result import StudyResult

# The page names the files of longer tables instead of printing them.
_MOST_ROWS = 60


@dataclass(frozen=True)
class _Number:
    """One column of a readable table: a number with format `form`, and its interval if `ends` are given.

    `how` combines several seeds: their mean ("mean"), the mean with the lowest and highest value ("range"), the largest
    value ("max"), or a range of counts ("count").
    """

    heading: str
    column: str
    ends: tuple[str, str] | None = None
    form: str = ".3f"
    how: str = "mean"


@dataclass(frozen=True)
class Section:
    """One table of a study on the page: its title, the columns that identify rows, its numbers, and a note."""

    title: str
    table: str
    keys: dict[str, str]
    numbers: tuple[_Number, ...] = ()
    note: str = ""


_N = _Number("n", "n", how="count")
_SIZE = _Number("neurons", "size", how="count")
_ENDS = ("low", "high")
# In the order of the page. Tables without numbers are too long to print; the page names their files.
SECTIONS = (
    Section(
        "Accuracy", "accuracy", {"model": "model", "objective": "evaluated on", "measure": "measure"},
        (_Number("value [interval]", "value", _ENDS), _N),
        "'refusing' is the accuracy on pairs where refusing is right, 'responding' on those where responding is "
        "right, and 'balanced' their mean: a model that always refuses gets 1, 0 and 0.5. 'margin' is in the model's "
        "reward units; 'length only' prefers the longer response.",
    ),
    Section(
        "Accuracy by subset", "subsets", {"model": "model", "objective": "evaluated on", "subset": "subset"},
        (
            _Number("accuracy [interval]", "accuracy", _ENDS), _Number("chance", "chance"),
            _Number("margin [interval]", "margin", ("margin_low", "margin_high")), _N,
        ),
    ),
    Section(
        "Mixed model minus specialists", "comparisons",
        {"first": "model", "second": "minus", "objective": "evaluated on", "subset": "subset"},
        (
            _Number("difference in accuracy [interval]", "difference", _ENDS, "+.3f"),
            _Number("q", "q_value", form=".2g", how="max"), _N,
        ),
        "Paired by item. q is the p-value adjusted for the number of comparisons; the largest of several seeds.",
    ),
    Section(
        "Transferability", "transferability", {"objective": "evaluated on", "quantity": "quantity"},
        (_Number("value [interval]", "value", _ENDS), _N),
        "T is the share of items that the mixed model ranks correctly, among those that a specialist ranks correctly; "
        "'beyond accuracy' is T minus the mixed model's accuracy.",
    ),
    Section(
        "Confidence", "confidence",
        {"model": "model", "objective": "evaluated on", "pairs": "pairs", "quantity": "quantity"},
        (_Number("value [interval]", "value", _ENDS), _N),
        "Rewards of two models can be compared only in units of their spread.",
    ),
    Section("Rewards", "rewards", {}),
    Section("Scores of all neurons", "neurons", {}),
    Section(
        "Top sets", "sets", {"score": "score", "model": "model"},
        (
            _SIZE, _Number("score at the cut", "cut", form=".3g", how="range"),
            _Number("neurons tied at the cut", "n_tied", how="count"), _Number("pairs", "n_pairs", how="count"),
        ),
    ),
    Section(
        "Stability of top sets", "stability", {"score": "score", "model": "model", "changed": "changed"},
        (
            _SIZE, _Number("share that comes back", "share", form=".2f", how="range"),
            _Number("by chance in each layer", "chance", form=".2f"),
        ),
        "How much of a top set is also in the top set of the other half of the prompts (mean of 20 splits), of as many "
        "new prompts (expected), by another score, at other tokens, with another replacement, or in another seed.",
    ),
    Section(
        "Depth", "depth", {"score": "score", "set": "set"},
        (
            _SIZE, *(_Number(third, third, form=".2f", how="range") for third in ("early", "middle", "late")),
        ),
        "Share of every set in each third of the layers; 'all neurons' is the share by chance.",
    ),
    Section(
        "Overlap of top sets", "overlap",
        {"score": "score", "kind": "kind", "a": "set", "b": "and", "without_base": "without the base's top set"},
        (
            _Number("neurons in the first", "size_a", how="count"),
            _Number("neurons in the second", "size_b", how="count"),
            _Number("neurons in both", "intersection", how="count"),
            _Number("Jaccard [interval]", "jaccard", ("jaccard_low", "jaccard_high")),
            _Number("by chance", "expected_jaccard"),
            _Number("by chance in each layer", "layer_expected_jaccard"),
            _Number("beyond chance in each layer [interval]", "beyond_chance", ("beyond_low", "beyond_high"), "+.3f"),
        ),
        "Chance is computed over the whole model and in each layer. Rows without the base's top set are the floor: its "
        "neurons are left out of both sets and of chance. Rows of kind 'seeds' are the ceiling: they compare two seeds "
        "of one objective; they are means over pairs of seeds, with intervals over prompts only.",
    ),
    Section("Ablation curves", "curves", {}),
    Section(
        "Effect of a model's own top set on every subset", "cross_objective",
        {"model": "model", "score": "score", "objective": "evaluated on", "subset": "subset"},
        (
            _Number("before", "before"), _Number("change in accuracy [interval]", "change", _ENDS, "+.3f"),
            _Number("chance", "chance"), _N,
        ),
    ),
    Section(
        "Drift to chance", "drift", {"model": "model", "score": "score"},
        (
            _Number("slope", "slope", form="+.2f", how="range"), _Number("r", "r", form="+.2f", how="range"),
            _Number("slope, split", "split_slope", form="+.2f", how="range"),
            _Number("r, split", "split_r", form="+.2f", how="range"), _Number("subsets", "n", how="count"),
        ),
        note="Regression of the changes in accuracy per subset (the table before this one) on the accuracy before "
        "ablation minus chance: a slope of -1 with r = -1 means that every subset ended at chance. With small subsets, "
        "noise alone gives negative slopes; 'split' takes the two values from different prompts.",
    ),
    Section(
        "Effect of sets on the mixed model", "ablation",
        {"set": "without", "objective": "evaluated on", "quantity": "quantity", "control": "random sets by"},
        (
            _SIZE, _Number("mean magnitude of the set", "set_magnitude", form=".3f", how="range"),
            _Number("mean magnitude of random sets", "random_magnitude", form=".3f", how="range"),
            _Number("before", "before"), _Number("change [interval]", "effect", _ENDS, "+.3f"),
            _Number("change by random sets", "random_effect", form="+.3f"),
            _Number("sd of random sets", "random_sd"),
            _Number("beyond random [interval]", "beyond_random", ("beyond_low", "beyond_high"), "+.3f"), _N,
        ),
        "Random sets contain no neuron of the specialists' top sets. They have the same number of neurons in every "
        "layer ('layer'), or also the nearest magnitudes that are left ('magnitude'): compare both columns of means.",
    ),
    Section(
        "Effect at equal size", "equal_size",
        {"set": "set", "objective": "evaluated on", "quantity": "quantity", "against": "against"},
        (
            _SIZE, _Number("change [interval]", "effect", _ENDS, "+.4f"),
            _Number("per neuron", "per_neuron", form="+.1e"),
            _Number("minus 'against' [interval]", "difference", ("difference_low", "difference_high"), "+.4f"),
            _N,
        ),
        "Random subsamples of every set, of the size of the smallest set.",
    ),
    Section(
        "What is retained", "collapse", {"set": "without", "quantity": "quantity"},
        (
            _SIZE,
            *(
                _Number(f"{name} [interval]", f"retained_{name}", (f"retained_{name}_low", f"retained_{name}_high"))
                for name in ("helpful", "harmless")
            ),
            _Number("helpful - harmless [interval]", "difference", ("difference_low", "difference_high"), "+.3f"),
        ),
        "The share of each objective's margin, or of its accuracy above chance, that is left: 1 is the whole model, 0 "
        "is chance. If both objectives keep equal shares, the model drifts to chance; if only one falls, it collapses.",
    ),
    Section(
        "Transferability without the sets", "ablated_transferability",
        {"set": "without", "objective": "evaluated on", "quantity": "quantity"},
        (_SIZE, _Number("value [interval]", "value", _ENDS), _N),
        "T of the mixed model, and T minus its accuracy.",
    ),
)  # fmt: skip


def readable_tables(result: StudyResult) -> dict[str, pd.DataFrame]:
    """The readable tables of `result` by title, with intervals, n and controls; means over seeds.

    Tables without rows and tables that are too long are left out.
    """
    tables = {}
    for section in SECTIONS:
        parts = _parts(result, section) if section.table in result.tables and section.numbers else []
        if parts and max(map(len, parts)) <= _MOST_ROWS:
            tables[section.title] = pd.concat(parts, ignore_index=True)
    return tables


def families_of(result: StudyResult) -> list[str]:
    """The names of the families, in order."""
    return list(dict.fromkeys(str(family["family"]) for family in result.summary["families"]))


def rows_of_family(result: StudyResult, table: str, family: str) -> pd.DataFrame:
    """The rows of a family, compared as text because a CSV file turns a family called "7" into a number."""
    frame = result.tables[table]
    return frame[frame["family"].astype(str) == family]


def _parts(result: StudyResult, section: Section) -> list[pd.DataFrame]:
    """The table of a section as text, one part per family with rows."""
    families = families_of(result)
    parts = []
    for family in families:
        if rows_of_family(result, section.table, family).empty:
            continue
        columns = [name for number in section.numbers for name in (number.column, *(number.ends or ()))]
        rows = Rows.of(result, section.table, (*section.keys, *columns), family=family)
        split = split_ceiling(rows) if section.table == "overlap" else [rows]
        part = pd.concat([_readable(part, section) for part in split], ignore_index=True)
        if len(split) > 1:
            # Put ceilings next to the rows of the same score, in the order of the scores.
            part = part.sort_values("score", key=lambda names: pd.factorize(names)[0], kind="stable")
        if len(families) > 1:
            part.insert(0, "family", family)
        parts.append(part)
    return parts


def _readable(rows: Rows, section: Section) -> pd.DataFrame:
    keys = list(section.keys)
    groups = rows.frame.groupby(keys, sort=False, dropna=False)
    columns: dict[str, Sequence[object]] = {}
    names = groups.size().reset_index()
    for key, heading in section.keys.items():
        words = {"True": "yes", "False": ""} if key == "without_base" else {}
        columns[heading] = [words.get(str(name), str(name)) for name in names[key]]
    for number in section.numbers:
        if number.ends is not None:
            columns[number.heading] = _estimates(rows, keys, number)
        else:
            columns[number.heading] = [_number(part, number) for _, part in groups[number.column]]
    return pd.DataFrame(columns)


def _estimates(rows: Rows, keys: list[str], number: _Number) -> list[str]:
    assert number.ends is not None
    means = rows.means(keys, number.column, *number.ends)
    cells = []
    for value, low, high in zip(means["value"], means["low"], means["high"], strict=True):
        interval = "" if pd.isna(low) or pd.isna(high) else f" [{low:{number.form}}, {high:{number.form}}]"
        cells.append("-" if pd.isna(value) else f"{value:{number.form}}{interval}")
    return cells


def _number(values: "pd.Series[Any]", number: _Number) -> str:
    if values.isna().all():
        return "-"
    low, high = values.min(), values.max()
    if number.how == "count":
        return count(int(low), int(high))
    if number.how == "max":
        return f"{high:{number.form}}"
    mean = f"{values.mean():{number.form}}"
    return f"{mean} ({low:{number.form}} to {high:{number.form}})" if number.how == "range" and low != high else mean
