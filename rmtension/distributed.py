"""Divides the work on one set of pairs among several processes: `torchrun --nproc-per-node 2 script.py`.

Inside `sharded()` every process reads all pairs, runs the model on its share of the batches, and ends with the complete
result, because sums and rewards are added up over processes. Outside, or with one process, nothing is divided.
"""

import atexit
import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from rmtension.errors import OptionError, ShardError

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["sharded"]


@dataclass(frozen=True)
class Shard:
    """The rank of this process among `size` processes; `group` is their process group, None for a single process.

    Examples:
        >>> shard = Shard(rank=1, size=4)
        >>> shard.is_first, [number for number in range(8) if shard.takes(number)]
        (False, [1, 5])
    """

    rank: int = 0
    size: int = 1
    group: Any = None

    @property
    def is_first(self) -> bool:
        """Whether this is the first process, which shows progress and writes files."""
        return self.rank == 0

    def takes(self, number: int) -> bool:
        """Whether this process runs batch `number` of all batches."""
        return number % self.size == self.rank

    def add_up(self, *tensors: "Tensor") -> None:
        """Replace each tensor (on the CPU) in place by its sum over all processes."""
        if self.size == 1:
            return
        import torch.distributed as dist

        for tensor in tensors:
            # Exact in half precision too: only one process has a value that is not zero.
            exact = tensor.float() if tensor.is_floating_point() and tensor.itemsize < 4 else tensor
            self._exchange(lambda exact=exact: dist.all_reduce(exact, group=self.group))
            if exact is not tensor:
                tensor.copy_(exact)

    def least(self, number: int) -> int:
        """The smallest `number` of all processes."""
        if self.size == 1:
            return number
        import torch
        import torch.distributed as dist

        least = torch.tensor([number])
        self._exchange(lambda: dist.all_reduce(least, dist.ReduceOp.MIN, group=self.group))
        return int(least)

    def all_have(self, value: bool) -> bool:
        """Whether `value` is true in every process."""
        if self.size == 1:
            return value
        import torch

        have = torch.tensor([int(value)])
        self.add_up(have)
        return int(have) == self.size

    def texts(self, text: str) -> list[str]:
        """The `text` of every process, in the order of their ranks."""
        if self.size == 1:
            return [text]
        import torch

        encoded = text.encode()
        lengths = torch.zeros(self.size, dtype=torch.long)
        lengths[self.rank] = len(encoded)
        self.add_up(lengths)
        ends = lengths.cumsum(0).tolist()
        letters = torch.zeros(ends[-1], dtype=torch.long)
        letters[ends[self.rank] - len(encoded) : ends[self.rank]] = torch.tensor(list(encoded), dtype=torch.long)
        self.add_up(letters)
        all_bytes = bytes(letters.tolist())
        return [all_bytes[end - n : end].decode() for end, n in zip(ends, lengths.tolist(), strict=True)]

    def require_same(self, what: str, value: str) -> None:
        """Raise `ShardError` in every process unless `value` is the same in all of them; `what` names it."""
        if self.size == 1:
            return
        import torch
        import torch.distributed as dist

        digest = torch.tensor([int.from_bytes(hashlib.blake2b(value.encode(), digest_size=7).digest())])
        digests = [torch.empty_like(digest) for _ in range(self.size)]
        self._exchange(lambda: dist.all_gather(digests, digest, group=self.group))
        differing = [rank for rank, other in enumerate(digests) if not torch.equal(other, digests[0])]
        if differing:
            raise ShardError(
                f"sharded: process {differing[0]} has another {what} than process 0. Pass the same pairs, in the same "
                "order, and the same models in every process: sharded() divides the pairs itself."
            )

    def _exchange(self, communicate: Any) -> None:
        try:
            communicate()
        except RuntimeError as error:
            raise ShardError(
                f"sharded: process {self.rank} lost another process ({str(error).splitlines()[0]}), so there is no "
                "result. The output of that process says why it ended; if it was only slow, pass sharded a longer "
                "timeout."
            ) from error


_WHOLE = Shard()
_SHARD: ContextVar[Shard] = ContextVar("rmtension_shard", default=_WHOLE)


def current() -> Shard:
    """The share of this process inside `sharded()`; outside, the share of a single process.

    Examples:
        >>> current().rank, current().size, current().is_first
        (0, 1, True)
    """
    return _SHARD.get()


@contextmanager
def sharded(*, timeout: float = 86_400.0) -> Iterator[Shard]:
    """Divide every run over pairs inside the context among the processes that were started together.

    `torchrun` and `accelerate launch` start several processes; without them there is a single process and nothing
    changes. All processes must make the same calls with the same pairs and models. All get the same results, which
    equal those of a single process up to the order in which float64 sums are added. Only the first process writes
    results (`save`); the others may read them after leaving the context.

    If `torch.distributed` is not initialised, it is initialised until the process ends, and each process gets the GPU
    of its local rank, if there are GPUs: open models inside the context. The exchanged sums and rewards are on the CPU
    and use gloo.

    Args:
        timeout: seconds after which a process that waits for a slower one raises `ShardError`; a day by default. A
            process that has ended is noticed at once.

    Raises `ShardError` in all remaining processes when one ends, and if pairs or models differ between processes.

    Examples:
        >>> with sharded() as shard:
        ...     shard.rank, shard.size
        (0, 1)
    """
    import torch
    import torch.distributed as dist

    if timeout <= 0:
        raise OptionError(f"timeout: expected a positive number of seconds, got {timeout}.")
    if current().size > 1:
        raise OptionError("sharded: already entered. Leave it first; one context works for any number of calls.")
    if not dist.is_available():
        yield current()
        return
    if not dist.is_initialized() and int(os.environ.get("WORLD_SIZE", 1)) > 1:
        if torch.cuda.is_available():
            torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)) % torch.cuda.device_count())
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo", timeout=timedelta(seconds=timeout)
        )
        # At exit and not on leaving: a second initialisation would find the first one's keys in the launcher's store
        # and fail.
        atexit.register(_end)
    if not dist.is_initialized() or dist.get_world_size() == 1:
        yield current()
        return
    group = dist.new_group(backend="gloo", timeout=timedelta(seconds=timeout))
    token = _SHARD.set(Shard(dist.get_rank(), dist.get_world_size(), group))
    try:
        yield current()
    finally:
        _SHARD.reset(token)
        # Closes the connections, so that processes waiting for a failed one notice it at once.
        if dist.is_initialized():
            dist.destroy_process_group(group)


def _end() -> None:
    import torch.distributed as dist

    if dist.is_initialized():
        dist.destroy_process_group()
