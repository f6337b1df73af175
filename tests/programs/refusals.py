"""What the library does on a full disk, a read-only disk, without permission, and if inputs vanish.

    python tests/programs/refusals.py

prints every message, and whether the old files are unchanged. The full disk and the read-only disk are small tmpfs
mounts, which need root; without it, the script says that it leaves them out. Permissions are tested as an ordinary
user, in a separate process if the script runs as root.
"""

import os
import subprocess
import sys
import tempfile
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch

sys.path.append(str(Path(__file__).parents[1] / "helpers"))

from tiny_models import make_pairs, make_tokenizer, save_classifier

from rmtension import ActivationCollector, NeuronSet, PreferencePairs, RewardHead, StudyResult, TensionStudy
from rmtension.errors import RMTensionError
from rmtension.report._every_format import write_report
from rmtension.study._family_runs import ModelFamily
from rmtension.study._options import StudyOptions

NOBODY = 65534


@contextmanager
def mounted(folder: Path, *options: str) -> Iterator[bool]:
    """Mount a tmpfs of two megabytes; yields False if that fails."""
    folder.mkdir(exist_ok=True)
    command = ["mount", "-t", "tmpfs", "-o", ",".join(["size=2m", *options]), "tmpfs", str(folder)]
    try:
        done = subprocess.run(command, capture_output=True).returncode == 0
    except OSError:
        done = False
    try:
        yield done
    finally:
        if done:
            subprocess.run(["umount", str(folder)], check=True)


def kept(folder: Path) -> dict[str, bytes]:
    """All files except those of a work folder, which a failed run may have written."""
    files = {str(path.relative_to(folder)): path for path in folder.rglob("*") if path.is_file()}
    return {name: path.read_bytes() for name, path in files.items() if not name.startswith("work/")}


def say(case: str, what: str, call: Callable[[], object], folder: Path) -> bool:
    """Print the message of a call; returns whether it was an error of this library and the folder is unchanged."""
    before = kept(folder)
    try:
        call()
        message, good = "no error", False
    except RMTensionError as error:
        message, good = f"{type(error).__name__}: {error}", True
    except Exception as error:
        message, good = f"ANOTHER ERROR, {type(error).__name__}: {error}", False
    same = kept(folder) == before
    print(f"{case}, {what}: {message}\n    {'unchanged' if same else 'CHANGED: ' + ', '.join(kept(folder))}")
    return good and same


def writes(
    head: RewardHead, pairs: PreferencePairs, study: StudyResult, folder: Path
) -> dict[str, Callable[[], object]]:
    """Calls that write more than fits on the small disk."""
    large = NeuronSet(torch.zeros(3000, 1000, dtype=torch.bool), "mlp", "toy")
    return {
        "a result": lambda: large.save(folder / "set.safetensors"),
        "pairs": lambda: sum([pairs] * 200, pairs).to_jsonl(folder / "pairs.jsonl"),
        "a study": lambda: study.save(folder / "study", overwrite=True),
        "a report": lambda: write_report(study, folder / "study"),
        "a model": lambda: head.save_pretrained(folder / "model"),
        "a work folder": lambda: ActivationCollector(head).collect(pairs, work=folder / "work"),
    }


def prepare(folder: Path, pairs: PreferencePairs) -> None:
    """Write the old files."""
    NeuronSet(torch.zeros(2, 3, dtype=torch.bool), "mlp", "toy").save(folder / "set.safetensors")
    pairs[:2].to_jsonl(folder / "pairs.jsonl")


def say_all(case: str, calls: Mapping[str, Callable[[], object]], folder: Path) -> bool:
    """`say` of each call; returns whether all passed."""
    good = [say(case, what, call, folder) for what, call in calls.items()]
    return all(good)


def as_nobody(call: Callable[[], bool]) -> bool:
    """Run the call in a process without root's permissions."""
    sys.stdout.flush()
    child = os.fork()
    if child:
        return os.waitpid(child, 0)[1] == 0
    status = 1
    try:
        if os.geteuid() == 0:
            os.setgid(NOBODY)
            os.setuid(NOBODY)
        status = 0 if call() else 1
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        os._exit(status)


def vanished(head: RewardHead, model: Path, folder: Path) -> dict[str, Callable[[], object]]:
    missing = folder / "missing"
    return {
        "a result": lambda: NeuronSet.load(missing),
        "pairs": lambda: PreferencePairs.from_jsonl(missing),
        "a study": lambda: StudyResult.load(missing),
        "a model": lambda: RewardHead.from_pretrained(missing),
        "the weights of a model": lambda: ((model / "model.safetensors").unlink(), RewardHead.from_pretrained(model)),
    }


def main() -> int:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        root.chmod(0o755)
        tokenizer = make_tokenizer(root / "tokenizer")
        models = {
            name: save_classifier(root / name, "gpt2", tokenizer, seed=seed, n_inner=1024)
            for seed, name in enumerate(("helpful", "harmless", "mixed"))
        }
        head, pairs = RewardHead.from_pretrained(models["helpful"]), make_pairs(40)
        both = {"helpful": pairs, "harmless": make_pairs(40, seed=2)}
        options = StudyOptions(scores=("mean_difference",), analyses=("accuracy", "overlap", "scores", "confidence"))
        study = TensionStudy(ModelFamily(**models), both, options=options).run(progress=False)
        good = []
        disk = root / "disk"
        with mounted(disk) as is_there:
            if is_there:
                prepare(disk, pairs)
                (disk / "filling").write_bytes(b"x" * (os.statvfs(disk).f_bavail * os.statvfs(disk).f_bsize - 40_000))
                good += [say("disk full", what, call, disk) for what, call in writes(head, pairs, study, disk).items()]
            else:
                print("disk full: left out, a tmpfs cannot be mounted here")
        with mounted(disk) as is_there:
            if is_there:
                prepare(disk, pairs)
                subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
                good += [say("read-only", what, call, disk) for what, call in writes(head, pairs, study, disk).items()]
            else:
                print("read-only: left out, a tmpfs cannot be mounted here")
        closed = root / "closed"
        closed.mkdir()
        prepare(closed, pairs)
        closed.chmod(0o555)
        calls = writes(head, pairs, study, closed)
        good.append(as_nobody(lambda: say_all("no permission", calls, closed)))
        good += [say("vanished", what, call, closed) for what, call in vanished(head, models["mixed"], root).items()]
    print(f"{sum(good)} of {len(good)} passed")
    return 0 if all(good) else 1


if __name__ == "__main__":
    sys.exit(main())
