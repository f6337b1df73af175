"""The command `rmtension`."""

import argparse
import logging
import os
import sys
import time
import warnings
from collections.abc import Sequence
from pathlib import Path

from rmtension import __version__
from rmtension.errors import OptionError, RMTensionError, RMTensionWarning
from rmtension.report import to_text, write_report
from rmtension.study import TensionStudy
from rmtension.study_options import ANALYSES, StudyOptions
from rmtension.study_result import StudyResult

_EXAMPLES = """examples:
  rmtension demo                       a base and three reward models on an embedded world, in about two minutes
  rmtension demo --seeds 3 --out runs  three seeds from one base
  rmtension demo --seeds 3 --out runs --analyses overlap depth   again, from what is in the folder
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
    demo.add_argument("--rules", default="corrected", help="corrected (the default), or paper for the published ones")
    demo.add_argument("--analyses", nargs="+", metavar="NAME", help=f"some of: {' '.join(ANALYSES)} (default: all)")
    demo.add_argument("--overwrite", action="store_true", help="train anew and run anew what is already in the folder")
    demo.add_argument("--quiet", action="store_true", help="no progress bars")
    options = parser.parse_args(arguments)
    try:
        run_demo(
            options.out,
            seeds=options.seeds,
            rules=options.rules,
            analyses=options.analyses,
            overwrite=options.overwrite,
            progress=not options.quiet,
        )
    except RMTensionError as error:
        print(f"rmtension: {error}", file=sys.stderr)
        return 2
    return 0


def run_demo(
    out: Path,
    *,
    seeds: int = 1,
    rules: str = "corrected",
    analyses: Sequence[str] | None = None,
    overwrite: bool = False,
    progress: bool = True,
) -> StudyResult:
    """Train a base and three reward models per seed, study them, print the tables, and write everything below `out`.

    Models and passes over models that an earlier run left in `out` are used again, unless `overwrite`.
    """
    if seeds < 1:
        raise OptionError(f"--seeds: expected a positive number, got {seeds}.")
    options = StudyOptions.of(rules, **({} if analyses is None else {"analyses": tuple(analyses)}))
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    _quieten()
    # Imported here: TRL takes seconds to load, and `rmtension --help` does without.
    from rmtension.family import train_seeds
    from rmtension.world import preference_world

    start = time.monotonic()
    world = preference_world(0)
    families = train_seeds(
        world.train, out / "models", range(seeds), name="world", progress=progress, overwrite=overwrite
    )
    trained = time.monotonic() - start
    study = TensionStudy(families, world.test, options=options)
    result = study.run(folder=out, progress=progress)
    result.save(out, overwrite=True)
    write_report(result, out)
    print(to_text(result))
    print(
        f"\nWritten to {out}: models {trained:.0f} s, study {time.monotonic() - start - trained:.0f} s; "
        f"{study.n_run} passes over models run, {study.n_read} read from {out / 'runs'}."
    )
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
