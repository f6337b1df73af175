"""`rmtension replicate`: the paper's study on a base and pairs of your own, from training to report."""

import sys
from argparse import ArgumentParser, Namespace
from pathlib import Path
from typing import Any

from rmtension.cli._commands.outcome import Outcome
from rmtension.cli._commands.quiet import quiet_libraries
from rmtension.errors import OptionError

ARGUMENTS = {"base": None, "helpful": None, "harmless": None}
HELP = "train helpful, harmless and mixed reward models from a base, and study them"
EXAMPLES = """examples:
  rmtension replicate recipe.yaml --out replication --plan
  rmtension replicate recipe.yaml --out replication
  rmtension replicate recipe.yaml --base ./my-base --seeds 0 1 --jobs 2
  rmtension replicate --base ./my-base --helpful helpful.jsonl --harmless harmless.jsonl --out small --seeds 0

recipe.yaml (relative paths are relative to this file; only base and pairs are required):
  base: HuggingFaceTB/SmolLM2-135M    # a folder, a hub name, or a GGUF file
  pairs: {helpful: [a.jsonl.gz, b.jsonl.gz], harmless: c.jsonl.gz}    # files, or hub names
  seeds: [0, 247, 932]                # three reward models each
  max_length: 320                     # tokens; longer pairs are left out
  test_share: 0.2                     # of the prompts; no model is trained on them
  validation_share: 0.04              # of the prompts; select the checkpoint of a training
  training: {epochs: 1, learning_rate: 1e-4, trained_layers: 18, balance_length: true}
  study: {n_draws: 4}                 # fields of StudyOptions, corrected rules
  paper: {n_draws: 2}                 # the same for the published rules; false leaves them out
  n_scoring: 200                      # test pairs per objective that score neurons
  n_evaluating: 200                   # test pairs per objective that evaluate ablations
  n_single: 420                       # neurons ablated one by one, to test the methods
  n_neurons: 30                       # neurons with a page
  jobs: 2                             # reward models trained at a time, each with its share of the threads

Stages: base, pairs, a plan with times, reward models, accuracies, the analyses by the corrected and by the
published rules, faithfulness, neurons, report. Every model and pass is kept in --out: after an interruption, or with
more --seeds, the same command runs what is missing, and a finished run reads everything and runs nothing.
"""


def add_options(parser: ArgumentParser) -> None:
    """The options of the command."""
    parser.add_argument(
        "recipe", metavar="RECIPE.yaml", type=Path, nargs="?", help="the recipe, as below; or use flags"
    )
    parser.add_argument("--base", metavar="MODEL", help="the language model to train from")
    parser.add_argument("--helpful", nargs="+", metavar="FILE", help="files of helpful pairs")
    parser.add_argument("--harmless", nargs="+", metavar="FILE", help="files of harmless pairs")
    parser.add_argument("--seeds", nargs="+", type=int, metavar="N", help="seeds (default: those of the recipe)")
    parser.add_argument("--jobs", type=int, metavar="N", help="reward models trained at a time")
    parser.add_argument("--plan", action="store_true", help="print what would run, with times, and stop")
    parser.add_argument("--out", type=Path, default=Path("replication"), help="folder for everything (%(default)s)")


def run(options: Namespace) -> Outcome:
    """Read the recipe and run its stages."""
    from tqdm.auto import tqdm

    def tell(line: str) -> None:
        tqdm.write(line, file=sys.stderr)

    with quiet_libraries(options):
        from rmtension.replication._plan import plan_text
        from rmtension.replication._recipe import make_recipe, read_recipe
        from rmtension.replication._replicate import plan_replication, replicate
        from rmtension.report._text import to_text

        changes = _changes(options)
        if options.recipe is not None:
            recipe = read_recipe(options.recipe, changes)
        elif {"base", "pairs"} <= set(changes):
            recipe = make_recipe(changes, folder=Path(), where="command line")
        else:
            raise OptionError("replicate: expected a recipe, or --base, --helpful and --harmless. See --help.")
        if options.plan:
            plan = plan_replication(recipe, options.out, on_stage=None if options.quiet else tell)
            return Outcome(plan_text(plan), {"out": options.out, "plan": plan.to_dict("records")})
        done = replicate(
            recipe,
            options.out,
            progress=not options.quiet,
            on_stage=(lambda line: None) if options.quiet else tell,
            on_log=None if options.quiet else lambda label, line: tell(f"{label}: {line}"),
        )
    took = "\n".join(
        f"{row.stage}: {row.seconds:.0f} s, {row.run} passes run, {row.read} read" for row in done.stages.itertuples()
    )
    report = options.out / "corrected" / "report.html"
    data = {"out": options.out, "report": report, "stages": done.stages.to_dict("records")}
    return Outcome(f"{to_text(done.corrected)}\n\n{took}\nReport: {report.resolve()}", data)


def _changes(options: Namespace) -> dict[str, Any]:
    """What the flags say, as keys of a recipe; paths of the command line are relative to the current folder."""
    changes: dict[str, Any] = {}
    if options.base is not None:
        changes["base"] = _absolute(options.base)
    if (options.helpful is None) != (options.harmless is None):
        raise OptionError("--helpful, --harmless: expected both or neither.")
    if options.helpful is not None:
        named = {"helpful": options.helpful, "harmless": options.harmless}
        changes["pairs"] = {name: [_absolute(file) for file in files] for name, files in named.items()}
    for name in ("seeds", "jobs"):
        if getattr(options, name) is not None:
            changes[name] = getattr(options, name)
    return changes


def _absolute(name: str) -> str:
    """A path that exists as an absolute one; a hub name as it is."""
    return str(Path(name).absolute()) if Path(name).exists() else name
