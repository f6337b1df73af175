"""Several processes compute what one computes, and end together when one of them dies."""

import os
import re
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from rmtension import PairRewards, RewardHead
from rmtension.distributed import current, sharded
from rmtension.errors import OptionError

SCRIPT = Path(__file__).parent / "programs" / "shards.py"


@pytest.fixture
def arguments(checkpoints, pairs, tmp_path):
    """The script's: model, pairs, folder for results."""
    pairs.to_jsonl(tmp_path / "pairs.jsonl")
    return [str(checkpoints["gpt2"]), str(tmp_path / "pairs.jsonl"), str(tmp_path / "out")]


def torchrun(*arguments):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(SCRIPT)]
    return subprocess.run([*command, *arguments], capture_output=True, text=True, timeout=240)


@pytest.mark.grid
def test_two_processes_compute_what_one_does(arguments, pairs):
    """To 1e-9, also in float32: the batches are the same, and what is added up is float64. Others are refused."""
    ran = torchrun(*arguments)
    assert ran.returncode == 0, ran.stderr
    differences = [float(difference) for difference in re.findall(r"largest relative difference (\S+),", ran.stdout)]
    assert len(differences) == 4
    assert max(differences) <= 1e-9, ran.stdout
    assert ran.stdout.count("resumed: True") == 4, ran.stdout
    assert ran.stdout.count("sharded: process 1 has another list of pairs than process 0") == 8
    for dtype in ("float64", "float32"):
        shares = [int(count) for count in re.findall(rf"{dtype}: process . of 2 ran (\d+) of", ran.stdout)]
        assert sum(shares) == len(pairs)
        assert min(shares) > len(pairs) // 4, "each has its share"
        scored = PairRewards.load(Path(arguments[2], f"{dtype}.safetensors"))
        head = RewardHead.from_pretrained(arguments[0], dtype=getattr(torch, dtype), tokens_per_batch=200)
        # A GPU that two processes share adds up in another order.
        tolerance = 0.0 if head.device.type == "cpu" else 10 * torch.finfo(getattr(torch, dtype)).eps
        assert torch.allclose(scored.margin, head.score_pairs(pairs).margin, atol=tolerance, rtol=tolerance)


@pytest.mark.grid
def test_torchrun_ends_all_when_one_dies(arguments):
    start = time.monotonic()
    ran = torchrun(*arguments, "--die", "1")
    assert time.monotonic() - start < 120
    assert ran.returncode != 0
    assert "ran" not in ran.stdout
    assert not Path(arguments[2]).exists(), "no result, whole or partial"


@pytest.mark.grid
def test_remaining_processes_raise_a_shard_error(arguments):
    """Without anybody who watches the processes, as srun starts them; the first dies, at which the others met."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    environment = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": "2"}
    dead, left = (
        subprocess.Popen(
            [sys.executable, str(SCRIPT), *arguments, "--die", "0"],
            env=os.environ | environment | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    )
    out, err = left.communicate(timeout=120)
    dead.communicate(timeout=120)
    assert dead.returncode == -9
    assert left.returncode == 1
    assert "ShardError: sharded: process 1 lost another process" in err
    assert "ran" not in out
    assert not Path(arguments[2]).exists()


def test_a_single_process_divides_nothing(monkeypatch):
    """In a plain python, under a launcher that starts one process, and outside the context."""
    for size in (None, "1"):
        if size is not None:
            monkeypatch.setenv("WORLD_SIZE", size)
        with sharded() as shard:
            assert (shard.rank, shard.size, shard.is_first) == (0, 1, True)
            assert [number for number in range(5) if shard.takes(number)] == [0, 1, 2, 3, 4]
            assert shard.all_have(True)
            assert not shard.all_have(False)
    assert current().size == 1
    assert not torch.distributed.is_initialized()
    with pytest.raises(OptionError, match="timeout: expected a positive number of seconds, got 0"):
        sharded(timeout=0.0).__enter__()
