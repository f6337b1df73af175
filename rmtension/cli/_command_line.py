"""The command `rmtension`: study, score and check reward models from a shell."""

import json
import sys
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from collections.abc import Sequence
from contextlib import redirect_stdout
from importlib.metadata import version

from rmtension.cli._commands import check, demo, report, score, study
from rmtension.cli._commands.advice import Parser, with_flags
from rmtension.cli._commands.outcome import Outcome, plain
from rmtension.errors import RMTensionError

_COMMANDS = {"demo": demo, "study": study, "score": score, "check": check, "report": report}
_EPILOG = """examples:
  rmtension demo                                     everything, on models that it trains, in about two minutes
  rmtension study study.yaml                         the same analyses of your own models and pairs
  rmtension score ./my-reward-model pairs.jsonl      rewards and accuracy
  rmtension check ./my-reward-model                  is the model read as transformers reads it?
  rmtension report study                             the page of a saved study again
  rmtension COMMAND --help                           options, formats and more examples

exit status: 0; 1 where a check did not pass; 2 where an option or a file cannot be used as it is, with the reason on
stderr. Progress and warnings go to stderr, results to stdout; --json makes them one JSON object.
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status: 0, 1 for a check that failed, 2 for an error that the message explains.

    argparse's own errors, and --help, end with `SystemExit`.
    """
    options = parser().parse_args(arguments)
    try:
        # What libraries print is not the command's answer.
        with redirect_stdout(sys.stderr):
            outcome: Outcome = _COMMANDS[options.command].run(options)
    except RMTensionError as error:
        print(f"rmtension: error: {with_flags(str(error), options)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("rmtension: interrupted", file=sys.stderr)
        return 130
    print(json.dumps(plain(outcome.data), indent=2, allow_nan=False) if options.json else outcome.text)
    return outcome.status


def parser() -> ArgumentParser:
    """The parser of all commands."""
    made = Parser(prog="rmtension", description=__doc__, epilog=_EPILOG, formatter_class=RawDescriptionHelpFormatter)
    made.add_argument("--version", action="version", version=f"rmtension {version('rmtension')}")
    commands = made.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, module in _COMMANDS.items():
        command = commands.add_parser(
            name,
            help=module.HELP,
            description=module.__doc__,
            epilog=module.EXAMPLES,
            formatter_class=RawDescriptionHelpFormatter,
        )
        module.add_options(command)
        command.add_argument("--json", action="store_true", help="the result as one JSON object on stdout")
        command.add_argument("--quiet", action="store_true", help="no progress bars")
    return made
