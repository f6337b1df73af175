"""Files and folders appear whole or not at all, whatever the file system, or the process, does."""

import os
import resource
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from tiny_models import make_pairs

from rmtension import NeuronSet
from rmtension.errors import StorageError
from rmtension.store._files import filled_whole, write_text, written_whole

NOT_ROOT = pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")


def tree(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def write_half(path, error):
    with written_whole(path, "result") as partial:
        partial.write_text("new, half of it")
        raise error


def fill_half(folder, error):
    with filled_whole(folder, "study", seal="end", replaced=["two"]) as temporary:
        (temporary / "one").write_text("new")
        raise error


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, OSError(28, "No space left on device")])
def test_a_failed_write_leaves_the_old_file(error, tmp_path):
    path = tmp_path / "result"
    write_text(path, "old", "result")
    expected = StorageError if isinstance(error, OSError) else error
    with pytest.raises(expected):
        write_half(path, error)
    assert tree(tmp_path) == {"result": b"old"}
    write_text(path, "new", "result")
    assert tree(tmp_path) == {"result": b"new"}


def test_any_name_is_written_and_folders_are_created(tmp_path):
    """Folders are made; a name may be any that the system takes."""
    write_text(tmp_path / "a" / "b" / "c", "new", "result")
    assert tree(tmp_path) == {"a/b/c": b"new"}
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match=r"file/c: the result could not be written \(.*\)\. A part of the path"):
        write_text(tmp_path / "file" / "c", "new", "result")
    with pytest.raises(StorageError, match="The path is a folder: name a file in it"):
        write_text(tmp_path / "a", "new", "result")
    with pytest.raises(StorageError, match="The name is too long"):
        write_text(tmp_path / ("x" * 255), "new", "result")


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, OSError(28, "No space left on device")])
def test_a_failed_folder_leaves_the_old_one(error, tmp_path):
    folder = tmp_path / "study"
    with filled_whole(folder, "study", seal="end") as temporary:
        for name in ("end", "one", "two"):
            (temporary / name).write_text("old")
    (folder / "mine").write_text("a user's")
    before = tree(tmp_path)
    expected = StorageError if isinstance(error, OSError) else error
    with pytest.raises(expected):
        fill_half(folder, error)
    assert tree(tmp_path) == before
    with filled_whole(folder, "study", seal="end", replaced=["two"]) as temporary:
        (temporary / "one").write_text("new")
        (temporary / "end").write_text("new")
    assert tree(tmp_path) == {"study/end": b"new", "study/one": b"new", "study/mine": b"a user's"}


def test_a_folder_is_sealed_last(tmp_path, monkeypatch):
    """A kill between two moves leaves a folder without its seal, which says that it is not whole."""
    folder, moved = tmp_path / "study", []
    replace = Path.replace

    def watched(self, target):
        moved.append(target.name)
        assert target.name == "a" or not (folder / "a").exists()
        return replace(self, target)

    for _ in range(2):
        moved.clear()
        with monkeypatch.context() as patch:
            patch.setattr(Path, "replace", watched)
            with filled_whole(folder, "study", seal="a") as temporary:
                for name in "abc":
                    (temporary / name).write_text("")
        assert moved[-1] == "a"


def limited(code, bytes_):
    """Run code in a process that may write files of so many bytes, as a full disk: later writes fail."""
    script = textwrap.dedent(code)
    return subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        text=True,
        preexec_fn=lambda: (
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN),
            resource.setrlimit(resource.RLIMIT_FSIZE, (bytes_, bytes_)),
        ),
    )


def test_a_full_disk_raises_and_leaves_the_old_files(tmp_path):
    """Of results, pairs and whole folders: one clear error, and what was there is there."""
    path = tmp_path / "set.safetensors"
    neurons = NeuronSet(torch.zeros(2, 3, dtype=torch.bool), "mlp", "toy")
    neurons.save(path)
    make_pairs(2).to_jsonl(tmp_path / "pairs.jsonl")
    before = tree(tmp_path)
    code = f"""
        import torch
        from rmtension import NeuronSet, PreferencePairs
        from rmtension.errors import StorageError
        from rmtension.store._files import filled_whole
        large = NeuronSet(torch.zeros(100, 1000, dtype=torch.bool), "mlp", "toy")
        pairs = PreferencePairs.from_jsonl(r"{tmp_path}/pairs.jsonl")
        def folder():
            with filled_whole(__import__("pathlib").Path(r"{tmp_path}/folder"), "study", seal="a") as place:
                (place / "a").write_bytes(b"x" * 50_000)
        for write in (
            lambda: large.save(r"{path}"), lambda: sum([pairs] * 100, pairs).to_jsonl(r"{tmp_path}/pairs.jsonl"), folder
        ):
            try:
                write()
                print("written")
            except StorageError as error:
                print(error)
    """
    ran = limited(code, 20_000)
    assert ran.returncode == 0, ran.stderr
    lines = ran.stdout.splitlines()
    assert len(lines) == 3, ran.stdout
    for line, what in zip(lines, ("NeuronSet", "pairs", "study"), strict=True):
        assert f"the {what} could not be written" in line
        assert "The file is too large for this file system" in line
    assert tree(tmp_path) == before


@NOT_ROOT
def test_a_folder_without_permission_is_refused(tmp_path):
    tmp_path.chmod(0o500)
    try:
        with pytest.raises(StorageError, match="Writing is not permitted there"):
            write_text(tmp_path / "result", "new", "result")
    finally:
        tmp_path.chmod(0o700)


def test_a_kill_in_the_middle_leaves_the_old_file(tmp_path):
    path = tmp_path / "result"
    write_text(path, "old", "result")
    code = f"""
        import os, pathlib, signal
        from rmtension.store._files import written_whole
        with written_whole(pathlib.Path(r"{path}"), "result") as partial:
            partial.write_text("new, half of it")
            os.kill(os.getpid(), signal.SIGKILL)
    """
    ran = subprocess.run([sys.executable, "-c", textwrap.dedent(code)])
    assert ran.returncode == -signal.SIGKILL
    assert path.read_text() == "old"
