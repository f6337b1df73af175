"""The examples run: as a user runs them, on files of a few pairs."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from tiny_models import make_pairs

ROOT = Path(__file__).parents[1]


@pytest.mark.grid
def test_the_real_pairs_example_runs(tmp_path):
    files = {}
    for number, name in enumerate(("helpful", "harmless")):
        files[name] = tmp_path / f"{name}.jsonl"
        make_pairs(60, seed=number).to_jsonl(files[name])
    sizes = {"layers": 2, "d-model": 16, "heads": 2, "vocab-size": 320, "max-length": 96, "train-pairs": 40}
    sizes |= {"test-pairs": 24, "base-epochs": 0.1, "reward-epochs": 0.2, "draws": 2}
    sizes |= {"subsamples": 2, "curve-fractions": 0.1}
    command = [sys.executable, str(ROOT / "examples" / "real_pairs.py"), "--out", str(tmp_path / "out")]
    for name, value in {**files, **sizes}.items():
        command += [f"--{name}", str(value)]
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    ran = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert ran.returncode == 0, ran.stderr[-2000:]
    assert " passes run, 0 read." in ran.stdout
    assert (tmp_path / "out" / "models" / "seed-0" / "mixed" / "model.safetensors").exists()
    assert (tmp_path / "out" / "report.md").exists()
    again = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert "; 0 passes run, " in again.stdout, "everything is there already"
