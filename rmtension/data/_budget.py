"""How many tokens run in one batch: no more than make it faster per token, and no more than fit in memory."""

import os
from pathlib import Path

import torch

# Larger batches than these are not faster.
_ENOUGH_ON_CPU, _ENOUGH_ELSEWHERE = 4096, 32768
# Smaller batches are slow; a model that cannot hold even these needs another device.
_FEWEST = 256
# The share of the free memory that activations may take.
_SHARE = 0.5
# Numbers that one layer stores per token for its gradient, in widths of the residual stream and of the MLP: more than
# any family in the suite stores (`tests/test_every_family.py`).
_WIDTHS, _MLP_WIDTHS = 12, 6
_ROOT = Path("/")


def enough_tokens(device: torch.device) -> int:
    """The number of tokens per batch beyond which a larger batch is not faster."""
    return _ENOUGH_ON_CPU if device.type == "cpu" else _ENOUGH_ELSEWHERE


def tokens_that_fit(n_bytes: int, *, n_layers: int, d_model: int, d_mlp: int, itemsize: int) -> int:
    """How many tokens' activations of `n_layers` layers fit into half of `n_bytes`, at least 256.

    Examples:
        >>> tokens_that_fit(8 * 2**30, n_layers=12, d_model=768, d_mlp=3072, itemsize=4)
        3236
    """
    per_token = itemsize * n_layers * (_WIDTHS * d_model + _MLP_WIDTHS * d_mlp)
    return max(_FEWEST, int(_SHARE * n_bytes) // per_token)


def free_bytes(device: torch.device) -> int | None:
    """The bytes that are free on a device; None where the system does not report them.

    Processes that a launcher started on one machine get equal shares of its memory. Where a container or a batch
    system limits memory, the rest of that limit counts.
    """
    if device.type == "cuda":
        # What PyTorch has reserved and does not use is free as well.
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(torch.cuda.mem_get_info(device)[0]) + unused
    if device.type != "cpu":
        return None
    known = [n_bytes for n_bytes in (_available(), _left_of_limit()) if n_bytes is not None]
    return min(known) // int(os.environ.get("LOCAL_WORLD_SIZE", 1)) if known else None


def _available() -> int | None:
    try:
        lines = (_ROOT / "proc/meminfo").read_text(encoding="ascii").splitlines()
    except OSError:
        return None
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable:")), None)


def _left_of_limit() -> int | None:
    """The bytes that this process's control group, and every group above it, may still take."""
    try:
        groups = (_ROOT / "proc/self/cgroup").read_text(encoding="utf-8").splitlines()
    except OSError:
        return None
    left = []
    for line in groups:
        _, controllers, path = line.split(":", 2)
        if controllers not in ("", "memory"):
            continue
        # Version 2 has one tree of groups, version 1 one for memory.
        top = _ROOT / "sys/fs/cgroup" / controllers
        group = top / path.strip("/")
        left += [_left_of_group(folder) for folder in (group, *group.parents) if folder.is_relative_to(top)]
    known = [n_bytes for n_bytes in left if n_bytes is not None]
    return min(known) if known else None


def _left_of_group(folder: Path) -> int | None:
    """One group's limit minus what its processes use; the system's file cache does not count as used."""
    for limit, used, cached in (
        ("memory.max", "memory.current", "inactive_file"),
        ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
    ):
        try:
            statistics = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
            taken = int((folder / used).read_text()) - int(statistics.get(cached, 0))
            return max(0, int((folder / limit).read_text()) - taken)
        except (OSError, ValueError):  # no such file, or "max"
            continue
    return None
