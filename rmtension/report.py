"""A study as text: tables for a terminal, and a page of Markdown with pictures."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd

from rmtension import plots
from rmtension.errors import StorageError
from rmtension.study import StudyResult

_FIGURES: dict[str, tuple[Callable[..., Any], str, dict[str, str]]] = {
    "accuracy": (plots.accuracy, "accuracy", {}),
    "overlap": (plots.overlap, "overlap", {}),
    "depth": (plots.depth, "depth", {}),
    "ablation_margin": (plots.ablation, "ablation", {"quantity": "margin"}),
    "ablation_accuracy": (plots.ablation, "ablation", {"quantity": "accuracy"}),
}


def readable_tables(result: StudyResult) -> dict[str, pd.DataFrame]:
    """The tables of `result` by title, every number written beside its interval, its n or its control."""
    return {
        "Accuracy": _accuracy(result.accuracy),
        "Overlap of top neurons": _overlap(result.overlap),
        "Depth": _depth(result.depth),
        "Effect of ablation on the mixed model": _ablation(result.ablation),
    }


def to_text(result: StudyResult) -> str:
    """The readable tables as aligned text."""
    parts = [f"{title}\n{table.to_string(index=False)}" for title, table in readable_tables(result).items()]
    return "\n\n".join([*parts, _notes(result)])


def write_report(result: StudyResult, folder: str | Path) -> Path:
    """Write `report.md` and its figures (PNG) into `folder`; returns the page's path."""
    folder = Path(folder)
    parts = ["# A study of three reward models", _notes(result)]
    pictures = iter(_FIGURES)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, (draw, table, options) in _FIGURES.items():
            draw(result.to_frame(table), **options).savefig(folder / f"{name}.png", dpi=144)
        for title, frame in readable_tables(result).items():
            parts += [f"## {title}", _markdown(frame)]
            parts += [f"![{title}]({next(pictures)}.png)"]
        parts += [f"![Effect of ablation on accuracy]({name}.png)" for name in pictures]
        page = folder / "report.md"
        page.write_text("\n\n".join(parts) + "\n", encoding="utf-8")
    except OSError as error:
        raise StorageError(f"{folder}: the report could not be written ({error}).") from error
    return page


def _accuracy(table: pd.DataFrame) -> pd.DataFrame:
    rows = [
        {
            "model": row.model,
            "evaluated on": row.objective,
            "measure": row.measure,
            "value [interval]": f"{row.value:.3f} [{row.low:.3f}, {row.high:.3f}]",
            "n": row.n,
        }
        for row in table.itertuples()
    ]
    return pd.DataFrame(rows)


def _overlap(table: pd.DataFrame) -> pd.DataFrame:
    rows = [
        {
            "sets": f"{row.a} / {row.b}",
            "without base's": "yes" if row.without_base else "",
            "sizes": f"{row.size_a}, {row.size_b}",
            "shared": row.intersection,
            "Jaccard": f"{row.jaccard:.3f}",
            "by chance": f"{row.expected_jaccard:.3f}",
            "by chance in each layer": f"{row.layer_expected_jaccard:.3f}",
            "overlap coefficient": f"{row.coefficient:.3f}",
            "p": f"{row.p_value:.2g}",
            "p in each layer": f"{row.layer_p_value:.2g}",
        }
        for row in table.itertuples()
    ]
    return pd.DataFrame(rows)


def _depth(table: pd.DataFrame) -> pd.DataFrame:
    thirds = {third: table[third].map("{:.2f}".format) for third in ("early", "middle", "late")}
    return table.assign(**thirds)


def _ablation(table: pd.DataFrame) -> pd.DataFrame:
    rows = [
        {
            "without": f"{row.set} ({row.size})",
            "evaluated on": row.objective,
            "quantity": row.quantity,
            "before": f"{row.before:.3f}",
            "change [interval]": f"{row.effect:+.3f} [{row.low:+.3f}, {row.high:+.3f}]",
            "per neuron": f"{row.per_neuron:+.1e}",
            "random": f"{row.random_effect:+.3f}",
            "beyond random [interval]": f"{row.beyond_random:+.3f} [{row.beyond_low:+.3f}, {row.beyond_high:+.3f}]",
            "n": row.n,
        }
        for row in table.itertuples()
    ]
    return pd.DataFrame(rows)


def _notes(result: StudyResult) -> str:
    options, pairs = result.summary["options"], result.summary["pairs"]
    counts = "; ".join(
        f"{name}: {part['scoring']} pairs score neurons, {part['evaluating']} others evaluate "
        f"({part['identical_responses']} with identical responses, {part['prompts_cut']} prompts cut)"
        for name, part in pairs.items()
    )
    share, level = 100 * options["fraction"], 100 * options["level"]
    return (
        f"Top sets: {share:g}% of the neurons by {options['by']} {options['method']} at {options['site']}, "
        f"{options['positions']} tokens. Ablation: {options['mode']}, all tokens, against {options['n_draws']} random "
        f"sets of the same size in every layer, outside both objectives' top sets. {counts}. Intervals: {level:g}%, "
        "bootstrap over prompts; 'beyond random' adds the spread between random sets. rmtension "
        f"{result.summary['version']}, seed {options['seed']}."
    )


def _markdown(table: pd.DataFrame) -> str:
    def line(cells: list[str]) -> str:
        return f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"

    rows = [[str(cell) for cell in row] for row in table.itertuples(index=False)]
    return "\n".join(
        [line([str(column) for column in table.columns]), line(["---"] * table.shape[1]), *map(line, rows)]
    )
