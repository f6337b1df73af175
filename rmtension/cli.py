"""The command `rmtension`."""

import argparse
import json
import logging
import os
import sys
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from rmtension import __version__
from rmtension.errors import OptionError, RMTensionError, RMTensionWarning
from rmtension.report import to_text, write_report
from rmtension.study import StudyOptions, StudyResult, TensionStudy, require_no_study

_EXAMPLES = """examples:
  rmtension demo                       a base and three reward models on an embedded world, in about two minutes
  rmtension demo --seeds 3 --out runs  the same for the seeds 0, 1 and 2
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status: 0, or 2 for an error that the message explains."""
    parser = argparse.ArgumentParser(
        prog="rmtension", description=__doc__, epilog=_EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--version", action="version", version=f"rmtension {__version__}")
    commands = parser.add_subparsers(dest="command", required=True)
    demo = commands.add_parser("demo", help="train small models offline and study them")
    demo.add_argument("--seeds", type=int, default=1, metavar="N", help="how many seeds, from 0 (default: 1)")
    demo.add_argument("--out", type=Path, default=Path("rmtension-demo"), help="folder for everything (%(default)s)")
    demo.add_argument("--overwrite", action="store_true", help="replace a study that is already in the folder")
    demo.add_argument("--quiet", action="store_true", help="no progress bars")
    options = parser.parse_args(arguments)
    try:
        run_demo(options.out, seeds=options.seeds, overwrite=options.overwrite, progress=not options.quiet)
    except RMTensionError as error:
        print(f"rmtension: {error}", file=sys.stderr)
        return 2
    return 0


def run_demo(out: Path, *, seeds: int = 1, overwrite: bool = False, progress: bool = True) -> list[StudyResult]:
    """Train and study the models of every seed, print the tables, and write them below `out`."""
    if seeds < 1:
        raise OptionError(f"--seeds: expected a positive number, got {seeds}.")
    require_no_study(out, overwrite=overwrite)
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    _quieten()
    start = time.monotonic()
    results = []
    for seed in range(seeds):
        folder = out if seeds == 1 else out / f"seed-{seed}"
        result = _study_seed(folder, seed, overwrite=overwrite, progress=progress)
        print(f"\n== seed {seed} ==\n\n{to_text(result)}")
        results.append(result)
    if seeds > 1:
        table = over_seeds([result.accuracy for result in results])
        out.mkdir(parents=True, exist_ok=True)
        table.to_csv(out / "accuracy_over_seeds.csv", index=False)
        summaries = {"seeds": [result.summary for result in results]}
        (out / "summary.json").write_text(json.dumps(summaries, indent=2) + "\n", encoding="utf-8")
        print(f"\n== {seeds} seeds ==\n\n{table.to_string(index=False)}")
    print(f"\nWritten to {out} in {time.monotonic() - start:.0f} s.")
    return results


def over_seeds(tables: Sequence[pd.DataFrame]) -> pd.DataFrame:
    """Mean, smallest and largest value over seeds of every row of the accuracy tables."""
    keys = ["model", "objective", "measure"]
    grouped = pd.concat(tables).groupby(keys, sort=False)["value"]
    columns: dict[str, Any] = {"mean": "mean", "min": "min", "max": "max", "n_seeds": "count"}
    table: pd.DataFrame = grouped.agg(**columns).round(3).reset_index()
    return table


def _study_seed(folder: Path, seed: int, *, overwrite: bool, progress: bool) -> StudyResult:
    # Imported here: TRL takes seconds to load, and `rmtension --help` does without.
    from rmtension.family import train_family
    from rmtension.organisms import preference_world

    world = preference_world(seed)
    models = train_family(world.train, folder / "models", seed=seed, progress=progress, overwrite=overwrite)
    study = TensionStudy(
        {name: path for name, path in models.items() if name != "base"},
        world.test,
        base=models["base"],
        options=StudyOptions(seed=seed),
    )
    result = study.run(progress=progress)
    result.save(folder, overwrite=overwrite)
    write_report(result, folder)
    return result


def _quieten() -> None:
    """Keep the libraries underneath from talking between the progress bars."""
    import transformers

    warnings.filterwarnings("ignore")
    warnings.filterwarnings("default", category=RMTensionWarning)
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    logging.disable(logging.WARNING)


if __name__ == "__main__":
    sys.exit(main())
