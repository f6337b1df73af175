"""The demonstration: a base and reward models trained offline on an embedded world, and studied."""

import logging
import os
import time
import warnings
from collections.abc import Sequence
from pathlib import Path

import transformers

from rmtension.errors import OptionError, RMTensionWarning
from rmtension.report import to_text, write_report
from rmtension.study import TensionStudy
from rmtension.study_options import StudyOptions
from rmtension.study_result import StudyResult
from rmtension.world import preference_world


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
    from rmtension.family import train_seeds  # TRL talks while it loads

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
    warnings.filterwarnings("ignore")
    warnings.filterwarnings("default", category=RMTensionWarning)
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    logging.disable(logging.WARNING)
