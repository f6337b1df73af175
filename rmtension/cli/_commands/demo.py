"""`rmtension demo`: train a base and reward models offline on an embedded world, and study them."""

import os
import shlex
import shutil
import sys
from argparse import ArgumentParser, Namespace
from pathlib import Path

from rmtension.cli._commands.outcome import Outcome
from rmtension.cli._commands.quiet import quiet_libraries

HELP = "train small models offline and study them"
EXAMPLES = """examples:
  rmtension demo                       a base and three reward models on an embedded world, in two to three minutes
  rmtension demo --seeds 3 --out runs  three seeds from one base
  rmtension demo --seeds 3 --out runs --analyses overlap depth   reuse the models and passes in the folder

Prints the main findings, and with --verbose all tables. Writes below --out: models, every pass over a model (runs),
one CSV file per table, the figures, report.md, and report.html, which needs no other file.
"""


def add_options(parser: ArgumentParser) -> None:
    """The options of the command."""
    parser.add_argument("--seeds", type=int, default=1, metavar="N", help="number of seeds, from 0 (default: 1)")
    parser.add_argument("--out", type=Path, default=Path("rmtension-demo"), help="folder for everything (%(default)s)")
    parser.add_argument("--rules", default="corrected", help="corrected (default), or paper for the published rules")
    parser.add_argument("--analyses", nargs="+", metavar="NAME", help="analyses to run (default: all ten)")
    parser.add_argument("--neurons", type=int, default=16, metavar="N", help="neurons with a page (default: 16)")
    parser.add_argument("--verbose", action="store_true", help="print all tables")
    parser.add_argument("--overwrite", action="store_true", help="train and run again what is already in the folder")


def run(options: Namespace) -> Outcome:
    """Train the models, study them, and write the report."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    from tqdm.auto import tqdm

    from rmtension.cli._commands.studies import study_outcome
    from rmtension.cli._demo import run_demo
    from rmtension.report._answer import answer_note, answer_sentences

    def tell(line: str) -> None:
        # tqdm.write prints above a progress bar instead of into it.
        tqdm.write(line, file=sys.stderr)

    with quiet_libraries():
        done = run_demo(
            options.out,
            seeds=options.seeds,
            rules=options.rules,
            analyses=options.analyses,
            neurons=options.neurons,
            overwrite=options.overwrite,
            progress=not options.quiet,
            on_stage=(lambda line: None) if options.quiet else tell,
        )
    took = {"models": done.training_s, "study": done.study_s}
    whole = study_outcome(done.result, options.out, took, n_run=done.n_run, n_read=done.n_read)
    sentences = answer_sentences(done.result)
    report = Path(whole.data["report"]).resolve()
    opening = f"Report: {report}\nOpen it: {_opener()} -m webbrowser -t {report.as_uri()}"
    found = "\n".join([*(f"- {sentence}" for sentence in sentences), answer_note(done.result)])
    text = whole.text if options.verbose else whole.text.rpartition("\n\n")[2]
    return Outcome(f"{found}\n\n{text}\n{opening}", {**whole.data, "findings": sentences})


def _opener() -> str:
    """The Python that opens a page from the shell: the short name where the shell knows it."""
    return "python" if shutil.which("python") else shlex.quote(sys.executable)
