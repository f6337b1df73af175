"""The command `rmtension`: score reward models, find and ablate their neurons, and study them, from a shell."""

import json
import sys
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from collections.abc import Sequence
from contextlib import redirect_stdout
from importlib.metadata import version

from rmtension.cli._commands import ablate, attribute, check, demo, inspect, replicate, report, score, study
from rmtension.cli._commands.advice import Parser, flags_of, with_flags
from rmtension.cli._commands.outcome import Outcome, plain
from rmtension.errors import RMTensionError

_COMMANDS = {
    "demo": demo,
    "inspect": inspect,
    "score": score,
    "attribute": attribute,
    "ablate": ablate,
    "check": check,
    "study": study,
    "replicate": replicate,
    "report": report,
}
_EPILOG = """examples:
  rmtension demo                                     train small models and study them, in about two minutes
  rmtension inspect ./my-reward-model pairs.csv --by category    one model: its neurons and a page
  rmtension score ./my-reward-model pairs.csv        rewards and accuracy
  rmtension attribute ./my-reward-model pairs.csv    the neurons that drive the margin
  rmtension ablate ./my-reward-model pairs.csv --neurons scores.safetensors   what changes without them
  rmtension check ./my-reward-model                  check that rewards agree with transformers
  rmtension study study.yaml                         compare helpful, harmless and mixed models
  rmtension replicate recipe.yaml                    train such models from a base first
  rmtension report study                             write the report of a saved study again
  rmtension COMMAND --help                           options, formats and more examples

exit status: 0 on success; 1 if a check did not pass; 2 if an option or a file cannot be used (stderr gives the reason).
Progress and warnings go to stderr, results to stdout; --json prints the result as one JSON object.
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command of `rmtension` and return its exit status.

    `arguments` are the words after `rmtension`; by default those of the process. The status is 0 on success, 1 if a
    check failed, 2 after an error message on stderr, 130 after an interruption. Errors of argparse and --help raise
    `SystemExit`.

    Examples:
        >>> from rmtension.cli import main
        >>> pairs["helpful"].to_jsonl("helpful.jsonl")
        >>> status = main(["score", "organism", "helpful.jsonl", "--quiet"])  # doctest: +ELLIPSIS
        24 pairs scored...
        >>> status
        0
    """
    options = parser().parse_args(arguments)
    try:
        # Output of libraries goes to stderr, because stdout is for the result.
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
    command_line = Parser(
        prog="rmtension", description=__doc__, epilog=_EPILOG, formatter_class=RawDescriptionHelpFormatter
    )
    command_line.add_argument("--version", action="version", version=f"rmtension {version('rmtension')}")
    commands = command_line.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, module in _COMMANDS.items():
        command = commands.add_parser(
            name,
            help=module.HELP,
            description=module.__doc__,
            epilog=module.EXAMPLES,
            formatter_class=RawDescriptionHelpFormatter,
        )
        module.add_options(command)
        command.set_defaults(flags=flags_of(command, getattr(module, "ARGUMENTS", {})))
        command.add_argument("--json", action="store_true", help="print the result as one JSON object on stdout")
        command.add_argument("--quiet", action="store_true", help="show no progress bars")
    return command_line
