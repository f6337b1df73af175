"""The command `rmtension`."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from rmtension import __version__
from rmtension.errors import RMTensionError

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
    demo.add_argument("--analyses", nargs="+", metavar="NAME", help="some of the ten (default: all)")
    demo.add_argument("--overwrite", action="store_true", help="train anew and run anew what is already in the folder")
    demo.add_argument("--quiet", action="store_true", help="no progress bars")
    options = parser.parse_args(arguments)
    # Imported here: torch and all that is needed take seconds to load, and `rmtension --help` does without.
    from rmtension.demo import run_demo

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


if __name__ == "__main__":
    sys.exit(main())
