"""The demonstration: train a base and reward models offline on an embedded world, and study them."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from rmtension.errors import OptionError
from rmtension.report._every_format import write_report
from rmtension.report._neurons_of_study import study_neurons
from rmtension.study._options import StudyOptions
from rmtension.study._result import StudyResult
from rmtension.study._tension_study import TensionStudy
from rmtension.synthetic._world import preference_world


@dataclass(frozen=True)
class DemoRun:
    """The study's result, the seconds of training and of the study, and the numbers of passes run and read."""

    result: StudyResult
    training_s: float
    study_s: float
    n_run: int
    n_read: int


def run_demo(
    out: Path,
    *,
    seeds: int = 1,
    rules: str = "corrected",
    analyses: Sequence[str] | None = None,
    neurons: int = 16,
    overwrite: bool = False,
    progress: bool | None = None,
    on_stage: Callable[[str], object] = lambda line: None,
) -> DemoRun:
    """Train a base and three reward models per seed, study them, and write everything below `out`.

    Models and passes of an earlier run in `out` are used again unless `overwrite` is True. `report.html` gets pages of
    `neurons` neurons of the first mixed model; 0 leaves them out. `on_stage` is called with a line before every stage.
    """
    if seeds < 1:
        raise OptionError(f"--seeds: expected 1 or more, got {seeds}.")
    if neurons < 0:
        raise OptionError(f"--neurons: expected 0 or more, got {neurons}.")
    options = StudyOptions.of(rules, **({} if analyses is None else {"analyses": tuple(analyses)}))
    from rmtension.training._family import train_seeds

    start = time.monotonic()
    world = preference_world(0)
    families = train_seeds(
        world.train,
        out / "models",
        range(seeds),
        name="world",
        progress=progress,
        overwrite=overwrite,
        on_stage=on_stage,
    )
    trained = time.monotonic()
    study = TensionStudy(families, world.test, options=options)
    on_stage(f"running {len(options.analyses)} analyses on {sum(map(len, study.evaluating.values()))} test pairs")
    result = study.run(folder=out, overwrite=overwrite, progress=progress)
    result.save(out, overwrite=True)
    pages = None
    if neurons:
        on_stage(f"ablating {neurons} neurons of the mixed model, one at a time")
        pages = study_neurons(study, n=neurons, progress=progress)
    on_stage("writing the report")
    write_report(result, out, neurons=pages)
    return DemoRun(result, trained - start, time.monotonic() - trained, study.n_run, study.n_read)
