"""`rmtension report`: write the report and figures of a saved study again."""

from argparse import ArgumentParser, Namespace
from pathlib import Path

from rmtension.cli._commands.outcome import Outcome
from rmtension.errors import RMTensionError, StorageError

HELP = "write the page and figures of a saved study again"
EXAMPLES = """examples:
  rmtension report study          report.html, report.md and the figures, from the tables in the folder

No model is opened or run.
"""


def add_options(parser: ArgumentParser) -> None:
    """The options of the command."""
    parser.add_argument("folder", metavar="FOLDER", type=Path, help="the folder of a saved study")


def run(options: Namespace) -> Outcome:
    """Read the tables and write the report."""
    from rmtension.attribution._neuron_dashboards import NeuronDashboards
    from rmtension.report._every_format import MARKDOWN, NEURONS, write_report
    from rmtension.report._text import notes
    from rmtension.study._result import StudyResult

    result = StudyResult.load(options.folder)
    try:
        saved = options.folder / NEURONS
        neurons = NeuronDashboards.load(saved) if saved.exists() else None
        html, settings = write_report(result, options.folder, neurons=neurons), notes(result)
    except RMTensionError:
        raise
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        raise StorageError(
            f"{options.folder}: expected the tables of a study, got other tables ({type(error).__name__}: {error}). "
            "Run the study again; its passes are kept."
        ) from error
    page = options.folder / MARKDOWN
    data = {
        "folder": options.folder,
        "report": html,
        "markdown": page,
        "tables": list(result.tables),
        "notes": settings,
    }
    return Outcome("\n".join([*settings, f"Written to {html} and {page}."]), data)
