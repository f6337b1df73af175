"""The examples run: as a user runs them, on files of a few pairs."""

import os
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest

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
