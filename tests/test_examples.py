"""The examples run: as a user runs them, on files of a few pairs."""

import os
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
from tiny_models import make_pairs

ROOT = Path(__file__).parents[1]


@pytest.mark.grid
def test_the_next_token_example_runs(tmp_path):
    sizes = {"sentences": 10000, "epochs": 3, "pairs": 60, "random": 2}
    command = [sys.executable, str(ROOT / "examples" / "next_token.py"), "--out", str(tmp_path)]
    for name, value in sizes.items():
        command += [f"--{name}", str(value)]
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    ran = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert ran.returncode == 0, ran.stderr[-2000:]
    table = pd.read_csv(tmp_path / "faithfulness.csv")
    assert set(table["ranking"]) == {"attribution patching", "random 0", "random 1"}
    for _, part in table.groupby("ranking"):
        assert part["kept"].tolist() == [0, 1, 2, 4, 8, 16, 32, 64, 128, 256]
        # None kept and all kept are the two ends of the scale, whatever the ranking.
        assert part["faithfulness"].iloc[[0, -1]].tolist() == pytest.approx([0, 1])
        assert part["margin"].iloc[0] == pytest.approx(table["margin"].iloc[0], rel=1e-3)
    by_size = table.set_index(["ranking", "kept"])["faithfulness"]
    # The ranking keeps more of the margin than chance.
    assert by_size["attribution patching", 16] > max(by_size["random 0", 16], by_size["random 1", 16])
    assert (tmp_path / "faithfulness.png").stat().st_size > 10_000


@pytest.mark.grid
def test_the_real_pairs_example_runs(tmp_path):
    files = {}
    for number, name in enumerate(("helpful", "harmless")):
        files[name] = tmp_path / f"{name}.jsonl"
        make_pairs(60, seed=number).to_jsonl(files[name])
    sizes = {"layers": 2, "d-model": 16, "heads": 2, "vocab-size": 320, "max-length": 96, "train-pairs": 40}
    sizes |= {"test-pairs": 24, "base-epochs": 0.1, "reward-epochs": 1, "draws": 2}
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
