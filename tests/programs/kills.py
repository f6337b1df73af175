"""Whether runs that are killed at random moments and started again give the same bytes as an uninterrupted run.

    python tests/programs/kills.py --trials 50 [--runs collect study] [--seed 0]

Each trial starts a run in its own process, kills it (SIGKILL) after a random share of the time that an uninterrupted
run takes, starts it again and kills it again at a second random moment, and then lets it end. Results, and the names of
all remaining files, are compared with those of the uninterrupted run. Progress is saved every twentieth of a second
here, so that a run of seconds has as many moments to resume from as a run of hours.
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
    """Start a process that calls `run` and ends. It begins at once, because everything is already imported."""
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
    """Whether a process ends within `seconds`."""
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        if os.waitpid(child, os.WNOHANG)[0]:
            return True
        time.sleep(0.002)
    return False


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def is_progress(name: str) -> bool:
    """Whether a file belongs to a work folder, whose content may depend on the time of writing."""
    return ".lock" in name or Path(name).name.startswith("progress-")


def try_run(name: str, models: dict[str, Path], trials: int, draw: random.Random) -> int:
    """Print how many trials ended like the uninterrupted run, and return how many trials and files differ."""
    with tempfile.TemporaryDirectory() as root:

        def out(number: object) -> Path:
            return Path(root) / str(number)

        before = time.monotonic()
        child = start(lambda: RUNS[name](models, out("whole")))
        assert os.waitpid(child, 0)[1] == 0
        seconds = time.monotonic() - before
        expected = files(out("whole"))
        whole = {file: content for file, content in expected.items() if not is_progress(file)}
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
                n_begun += any("progress-" in file or file.startswith("runs/") for file in files(folder))
            child = start(lambda folder=folder: RUNS[name](models, folder))
            status = os.waitpid(child, 0)[1]
            written = files(folder)
            results = {file: content for file, content in written.items() if not is_progress(file)}
            differing = [file for file in whole | results if whole.get(file) != results.get(file)]
            left = sorted(set(written) - set(expected))
            same = status == 0 and not differing
            n_same += same
            n_left += len(left)
            if not same or left:
                print(f"  trial {trial}: status {status}, other content: {differing}, left: {left}")
        print(
            f"{name}: {trials} trials of {seconds:.1f} s, {n_killed} kills, {n_begun} of them after a save; "
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
        # A fork has only one thread: threads that libraries start at the first run would be missing in a child.
        draw = random.Random(options.seed)
        return 1 if sum(try_run(name, models, options.trials, draw) for name in options.runs) else 0


if __name__ == "__main__":
    sys.exit(main())
