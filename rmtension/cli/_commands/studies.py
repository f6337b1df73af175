"""The outcome of the commands that run studies."""

from collections.abc import Mapping
from pathlib import Path

from rmtension.cli._commands.outcome import Outcome
from rmtension.report._every_format import HTML, MARKDOWN
from rmtension.report._text import notes, to_text
from rmtension.study._result import StudyResult


def study_outcome(result: StudyResult, out: Path, seconds: Mapping[str, float], *, n_run: int, n_read: int) -> Outcome:
    """The readable tables and the paths of all files; `seconds` maps steps to their durations."""
    took = ", ".join(f"{name} {duration:.0f} s" for name, duration in seconds.items())
    written = f"Written to {out}: {took}; {n_run} passes over models run, {n_read} read from {out / 'runs'}."
    data = {
        "out": out,
        "report": out / HTML,
        "markdown": out / MARKDOWN,
        "tables": {name: out / f"{name}.csv" for name in result.tables},
        "notes": notes(result),
        "seconds": dict(seconds),
        "n_run": n_run,
        "n_read": n_read,
    }
    return Outcome(f"{to_text(result)}\n\n{written}", data)
