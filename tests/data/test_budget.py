"""How many tokens run together: what memory holds, measured on what the models keep."""

import os
from pathlib import Path

import pytest
import torch
from tiny_models import batches_of

from rmtension import NeuronAttribution, RewardHead
from rmtension.data._budget import enough_tokens, free_bytes, tokens_that_fit

CPU = torch.device("cpu")


def test_tokens_that_fit_equal_the_count_by_hand():
    shape = {"n_layers": 2, "d_model": 10, "d_mlp": 40, "itemsize": 2}
    assert tokens_that_fit(2 * 1440 * 1000, **shape) == 1000
    assert tokens_that_fit(0, **shape) == 256
    assert (enough_tokens(CPU), enough_tokens(torch.device("meta"))) == (4096, 32768)


def test_free_memory_is_what_the_system_reports(monkeypatch):
    """Some, and no more than the machine has; shared by the processes on it; what a batch system leaves."""
    free = free_bytes(CPU)
    assert 2**20 < free < os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert free_bytes(CPU) < free / 2
    monkeypatch.delenv("LOCAL_WORLD_SIZE")
    monkeypatch.setattr("rmtension.data._budget._ROOT", Path("/nowhere"))
    assert free_bytes(CPU) is None
    assert free_bytes(torch.device("meta")) is None


@pytest.mark.parametrize("version", [1, 2])
def test_the_tightest_limit_of_the_control_groups_counts(tmp_path, monkeypatch, version):
    """The tightest of the group and those around it; a file that the system keeps at hand is no memory taken."""
    monkeypatch.setattr("rmtension.data._budget._ROOT", tmp_path)
    controllers, names = {
        1: ("memory", ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")),
        2: ("", ("memory.max", "memory.current", "inactive_file")),
    }[version]
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/meminfo").write_text("MemTotal: 900 kB\nMemAvailable: 800 kB\n")
    (tmp_path / "proc/self/cgroup").write_text(f"3:cpu,cpuacct:/job\n{version - 2}:{controllers}:/job/step\n")

    def limit(path, most, used, cached):
        folder = tmp_path / "sys/fs/cgroup" / controllers / path
        folder.mkdir(parents=True, exist_ok=True)
        for name, value in zip(names[:2], (most, used), strict=True):
            (folder / name).write_text(f"{value}\n")
        (folder / "memory.stat").write_text(f"anon 1\n{names[2]} {cached}\n")

    assert free_bytes(CPU) == 800 * 1024
    limit("job", 500_000, 200_000, 50_000)
    assert free_bytes(CPU) == 350_000
    limit("job/step", "max" if version == 2 else 2**63 - 4096, 200_000, 0)
    assert free_bytes(CPU) == 350_000
    limit("job/step", 100_000, 90_000, 0)
    assert free_bytes(CPU) == 10_000
    limit(".", 9_000, 10_000, 0)
    assert free_bytes(CPU) == 0


def test_little_memory_makes_small_batches(checkpoints, pairs, monkeypatch):
    """Where something of every layer is kept first of all; the result is the same; who says a number gets it."""
    head = RewardHead.from_pretrained(checkpoints["gpt2"], dtype=torch.float64)

    def longest(head, *, keeps_layers):
        batches = batches_of(head, pairs, keeps_layers=keeps_layers)
        return max(batch.input_ids.numel() for batch in batches)

    whole = longest(head, keeps_layers=True)
    assert whole == longest(head, keeps_layers=False) > 256
    scores = NeuronAttribution(head, method="gradient_x_activation").score(pairs)
    per_layer = 8 * (12 * head.d_model + 6 * head.n_neurons("mlp"))
    monkeypatch.setattr("rmtension.models._reward_model.free_bytes", lambda device: 2 * per_layer * 600)
    assert longest(head, keeps_layers=True) <= 256
    assert 256 < longest(head, keeps_layers=False) <= 600
    again = NeuronAttribution(head, method="gradient_x_activation").score(pairs)
    assert torch.allclose(again.values, scores.values, atol=1e-12)
    limited = RewardHead.from_pretrained(checkpoints["gpt2"], tokens_per_batch=4096)
    assert longest(limited, keeps_layers=True) == whole
