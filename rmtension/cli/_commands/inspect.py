"""`rmtension inspect`: open one reward model, and write one page about it."""

import sys
from argparse import ArgumentParser, Namespace
from pathlib import Path
from typing import Any

from rmtension.cli._commands.model_options import add_model_options, open_model, read_output, refuse_swapped
from rmtension.cli._commands.outcome import Outcome
from rmtension.cli._commands.pair_options import add_group_options, add_pair_options, read_group_pairs
from rmtension.cli._commands.quiet import quiet_libraries
from rmtension.errors import StorageError

HELP = "inspect one reward model: its neurons, their conflict and their ablation, per group of pairs"
EXAMPLES = """examples:
  rmtension inspect ./my-reward-model pairs.csv --by category
  rmtension inspect ./my-reward-model pairs.csv --by category --budget 20min --out inspection
  rmtension inspect ./my-reward-model pairs.csv --output helpfulness --outputs safety
  rmtension inspect ./my-reward-model pairs.jsonl --plan         print what would run, and how long it takes

PAIRS is a file as for `rmtension score`. --by names the column with the groups: objectives, categories, subsets. The
plan is printed first; its times come from one timed batch. --budget chooses how many pairs, random sets and neurons
are used. The same command resumes after an interruption.
"""


def add_options(parser: ArgumentParser) -> None:
    """The options of the command."""
    add_model_options(parser)
    parser.add_argument("pairs", metavar="PAIRS", type=Path, help="a file of pairs, as score reads it")
    add_pair_options(parser)
    add_group_options(parser, has_by=True)
    parser.add_argument(
        "--outputs",
        nargs="+",
        metavar="OUTPUT",
        help="other outputs, or all, to compare with --output on the same pairs",
    )
    parser.add_argument("--budget", metavar="TIME", help="the longest time the run may take, for example 90s or 20min")
    parser.add_argument(
        "--fraction", type=float, default=0.02, metavar="SHARE", help="share of neurons per top set (default: 0.02)"
    )
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="seed of every random choice (default: 0)")
    parser.add_argument("--truncate-response", action="store_true", help="cut responses longer than the context")
    parser.add_argument("--plan", action="store_true", help="print the plan and stop")
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("inspection"),
        metavar="FOLDER",
        help="folder of the page (default: inspection)",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace an inspection in the folder")


def run(options: Namespace) -> Outcome:
    """Make the plan, run it and write the page."""
    refuse_swapped(options)
    if (options.out / "inspection.json").exists() and not (options.overwrite or options.plan):
        raise StorageError(f"--out: {options.out} holds an inspection. Name another folder, or pass --overwrite.")
    with quiet_libraries(options):
        return _run(options)


def _run(options: Namespace) -> Outcome:
    from rmtension.report import write_report
    from rmtension.study._inspection import ModelInspector

    pairs = read_group_pairs(options)
    inspector = ModelInspector(
        open_model(options),
        pairs,
        by=options.by,
        fraction=options.fraction,
        outputs=_outputs(options.outputs),
        budget=options.budget,
        seed=options.seed,
    )
    if options.plan:
        return Outcome(repr(inspector.plan), inspector.plan.to_dict())
    if not options.quiet:
        sys.stderr.write(f"{inspector.plan}\n")
    inspection = inspector.run(folder=options.out, progress=not options.quiet)
    inspection.save(options.out, overwrite=True)
    page = write_report(inspection, options.out)
    data: dict[str, Any] = {"summary": dict(inspection.summary), "page": page}
    lines = [
        *inspection.findings(),
        f"Page: {page}",
        f"Open it: {sys.executable} -m webbrowser {page.resolve().as_uri()}",
    ]
    return Outcome("\n".join(lines), data)


def _outputs(given: list[str] | None) -> list[object] | str | None:
    """The argument `outputs`: numbers as int."""
    if given is None or given == ["all"]:
        return None if given is None else "all"
    return list(map(read_output, given))
