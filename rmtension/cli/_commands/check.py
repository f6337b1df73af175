"""`rmtension check`: check that rewards and hooks of your model agree with transformers."""

from argparse import ArgumentParser, Namespace
from pathlib import Path

from rmtension.cli._commands.model_options import add_model_options, open_model
from rmtension.cli._commands.outcome import Outcome
from rmtension.cli._commands.pair_options import add_pair_options, read_pairs
from rmtension.cli._commands.quiet import quiet_libraries
from rmtension.errors import CheckError

HELP = "check that rewards and hooks of a model agree with transformers"
EXAMPLES = """examples:
  rmtension check ./my-reward-model
  rmtension check ./my-reward-model --pairs pairs.jsonl   use the first eight of your own pairs
  rmtension check ./my-reward-model --json && echo passed

The exit status is 1 if a check did not pass. The table has one row per check: the number of texts, the largest
difference or the number of wrong texts, and the limit. The checkpoint is loaded a second time, which takes twice the
model's memory.
"""


def add_options(parser: ArgumentParser) -> None:
    """The options of the command."""
    add_model_options(parser)
    parser.add_argument(
        "--pairs", type=Path, metavar="FILE", help="pairs, as score reads them (default: built-in texts)"
    )
    add_pair_options(parser)


def run(options: Namespace) -> Outcome:
    """Run every check that applies."""
    with quiet_libraries(options):
        pairs = None if options.pairs is None else read_pairs(options.pairs, options)
        try:
            table = open_model(options).check(pairs)
        except CheckError as error:
            table = error.table
    n_failed = int((~table["passed"]).sum())
    shown = table.assign(
        value=table["value"].map("{:.2g}".format),
        limit=table["limit"].map("{:.2g}".format),
        passed=table["passed"].map({True: "yes", False: "NO"}),
        # Align text to the left; pandas aligns it to the right.
        **{name: table[name].str.ljust(int(table[name].str.len().max())) for name in ("check", "note")},
    )
    done = "All checks passed" if not n_failed else f"{n_failed} of {len(table)} checks did not pass"
    data = {"model": options.model, "passed": not n_failed, "checks": table.to_dict(orient="records")}
    return Outcome(f"{shown.to_string(index=False, justify='left')}\n{done}.", data, status=int(n_failed > 0))
