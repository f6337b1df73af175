"""Runs that are killed at random moments and started again: are the results those of one that is not, byte by byte?

    python tests/programs/kills.py --trials 50 [--runs collect study] [--seed 0]

Each trial starts a run in a process of its own, kills it (SIGKILL) after a random share of the time that an
uninterrupted run takes, and again if it should still run at a second random moment, then lets it end. Results, and the
names of all files that are left, are compared with those of the uninterrupted run. Progress is kept every twentieth of
a second here, so that a run of seconds has as many moments to resume from as one of hours has.
"""

import argparse
import os
import random
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path

import torch

sys.path.append(str(Path(__file__).parents[1] / "helpers"))

from tiny_models import make_pairs, make_tokenizer, save_classifier

import rmtension.store._work_folder
from rmtension import ActivationCollector, RewardHead, TensionStudy
from rmtension.study._family_runs import ModelFamily
from rmtension.study._options import StudyOptions

rmtension.store._work_folder.EVERY, rmtension.store._work_folder._SHARE = 0.05, float("inf")


def collect(models: dict[str, Path], out: Path) -> None:
    head = RewardHead.from_pretrained(models["helpful"], tokens_per_batch=300)
    ActivationCollector(head).collect(make_pairs(3000), work=out / "work").save(out / "statistics.safetensors")


def study(models: dict[str, Path], out: Path) -> None:
    pairs = {"helpful": make_pairs(40, seed=1), "harmless": make_pairs(40, seed=2)}
    options = StudyOptions(n_draws=2, n_subsamples=2, curve_fractions=(0.1, 0.5))
    result = TensionStudy(ModelFamily(**models, name="toy"), pairs, options=options).run(folder=out, progress=False)
    result.save(out / "result", overwrite=True)


RUNS: dict[str, Callable[[dict[str, Path], Path], None]] = {"collect": collect, "study": study}


def start(run: Callable[[], None]) -> int:
    """A process that does `run` and ends; everything is imported already, so that it begins at once."""
    child = os.fork()
    if child:
        return child
    status = 1
    try:
        run()
        status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(status)


def ended(child: int, seconds: float) -> bool:
    """Whether a process ends by itself within some time."""
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        if os.waitpid(child, os.WNOHANG)[0]:
            return True
        time.sleep(0.002)
    return False


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def is_progress(name: str) -> bool:
    """What belongs to a work folder, and may hold when it was written."""
    return ".lock" in name or Path(name).name.startswith("progress-")


def try_run(name: str, models: dict[str, Path], trials: int, draw: random.Random) -> int:
    """Print how many trials ended as the uninterrupted run did; returns how many did not."""
    with tempfile.TemporaryDirectory() as place:

        def out(number: object) -> Path:
            return Path(place) / str(number)

        before = time.monotonic()
        child = start(lambda: RUNS[name](models, out("whole")))
        assert os.waitpid(child, 0)[1] == 0
        seconds = time.monotonic() - before
        expected = files(out("whole"))
        whole = {one: content for one, content in expected.items() if not is_progress(one)}
        n_killed = n_begun = n_same = n_left = 0
        for trial in range(trials):
            folder = out(trial)
            for _ in range(2):
                child = start(lambda folder=folder: RUNS[name](models, folder))
                if ended(child, draw.random() * seconds):
                    continue
                os.kill(child, signal.SIGKILL)
                os.waitpid(child, 0)
                n_killed += 1
                n_begun += any("progress-" in one or one.startswith("runs/") for one in files(folder))
            child = start(lambda folder=folder: RUNS[name](models, folder))
            status = os.waitpid(child, 0)[1]
            found = files(folder)
            results = {one: content for one, content in found.items() if not is_progress(one)}
            differing = [one for one in whole | results if whole.get(one) != results.get(one)]
            left = sorted(set(found) - set(expected))
            same = status == 0 and not differing
            n_same += same
            n_left += len(left)
            if not same or left:
                print(f"  trial {trial}: status {status}, other content: {differing}, left: {left}")
        print(
            f"{name}: {trials} trials of {seconds:.1f} s, {n_killed} kills, {n_begun} of them with something kept; "
            f"{n_same} of {trials} ended with the same bytes; {n_left} stray files",
            flush=True,
        )
    return trials - n_same + n_left


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=50)
    parser.add_argument("--runs", nargs="+", choices=RUNS, default=list(RUNS))
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        tokenizer = make_tokenizer(Path(folder) / "tokenizer")
        models = {
            name: save_classifier(Path(folder) / name, "gpt2", tokenizer, seed=seed)
            for seed, name in enumerate(("helpful", "harmless", "mixed", "base"))
        }
        # Threads of libraries that start at the first run would not come along into a child.
        draw = random.Random(options.seed)
        return 1 if sum(try_run(name, models, options.trials, draw) for name in options.runs) else 0


if __name__ == "__main__":
    sys.exit(main())
