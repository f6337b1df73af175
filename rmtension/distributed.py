"""Several processes that share the work on one set of pairs: `torchrun --nproc-per-node 2 script.py`.

Inside `sharded()` every process reads all pairs, runs the model on its share of the batches, and has the whole result
in the end: sums and rewards are added up. Outside, or with one process, nothing is divided.
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
    """Which of how many processes this is; `group` is what they talk through, None for one alone."""

    rank: int = 0
    size: int = 1
    group: Any = None

    @property
    def is_first(self) -> bool:
        """Whether this process shows progress and writes files."""
        return self.rank == 0

    def takes(self, number: int) -> bool:
        """Whether batch `number` of all batches is this process's."""
        return number % self.size == self.rank

    def add_up(self, *tensors: "Tensor") -> None:
        """Each tensor, on the CPU, becomes its sum over all processes, in place."""
        if self.size == 1:
            return
        import torch.distributed as dist

        for tensor in tensors:
            # Numbers of half precision, which other processes have as zeros, stay what they are.
            exact = tensor.float() if tensor.is_floating_point() and tensor.itemsize < 4 else tensor
            self._talk(lambda exact=exact: dist.all_reduce(exact, group=self.group))
            if exact is not tensor:
                tensor.copy_(exact)

    def least(self, number: int) -> int:
        """The smallest of all processes' numbers."""
        if self.size == 1:
            return number
        import torch
        import torch.distributed as dist

        least = torch.tensor([number])
        self._talk(lambda: dist.all_reduce(least, dist.ReduceOp.MIN, group=self.group))
        return int(least)

    def all_have(self, value: bool) -> bool:
        """Whether `value` is true in every process."""
        if self.size == 1:
            return value
        import torch

        have = torch.tensor([int(value)])
        self.add_up(have)
        return int(have) == self.size

    def texts(self, mine: str) -> list[str]:
        """Every process's text, in the order of their ranks."""
        if self.size == 1:
            return [mine]
        import torch

        given = mine.encode()
        lengths = torch.zeros(self.size, dtype=torch.long)
        lengths[self.rank] = len(given)
        self.add_up(lengths)
        ends = lengths.cumsum(0).tolist()
        letters = torch.zeros(ends[-1], dtype=torch.long)
        letters[ends[self.rank] - len(given) : ends[self.rank]] = torch.tensor(list(given), dtype=torch.long)
        self.add_up(letters)
        everything = bytes(letters.tolist())
        return [everything[end - n : end].decode() for end, n in zip(ends, lengths.tolist(), strict=True)]

    def require_same(self, what: str, value: str) -> None:
        """Raise `ShardError` in every process unless `value` is the same in all."""
        if self.size == 1:
            return
        import torch
        import torch.distributed as dist

        mine = torch.tensor([int.from_bytes(hashlib.blake2b(value.encode(), digest_size=7).digest())])
        found = [torch.empty_like(mine) for _ in range(self.size)]
        self._talk(lambda: dist.all_gather(found, mine, group=self.group))
        differing = [rank for rank, one in enumerate(found) if not torch.equal(one, found[0])]
        if differing:
            raise ShardError(
                f"sharded: process {differing[0]} has another {what} than process 0. Give every process the same "
                "pairs, in the same order, and the same models: inside sharded() they are divided here."
            )

    def _talk(self, exchange: Any) -> None:
        try:
            exchange()
        except RuntimeError as error:
            raise ShardError(
                f"sharded: process {self.rank} lost another one ({str(error).splitlines()[0]}). Its own output says "
                "why; if it was only slow, give sharded a longer timeout. No result was made here."
            ) from error


_WHOLE = Shard()
_SHARD: ContextVar[Shard] = ContextVar("rmtension_shard", default=_WHOLE)


def current() -> Shard:
    """This process's share; the whole outside `sharded`."""
    return _SHARD.get()


@contextmanager
def sharded(*, timeout: float = 86_400.0) -> Iterator[Shard]:
    """While it is entered, everything that runs over pairs is divided over the processes that were started together.

    `torchrun` and `accelerate launch` start them; without one of these there is one process, and nothing changes. All
    of them have to make the same calls with the same pairs and models, and all get the same results: those of one
    process, but for the order in which float64 sums are added up. Results are written (`save`) by the
    first process only; the others may read them after leaving.

    Where `torch.distributed` is not started yet, it is, for as long as the process lives, and every process gets the
    GPU of its local rank, if there are GPUs: open models inside. What is exchanged, sums and rewards, is on the CPU and
    goes through gloo.

    Args:
        timeout: seconds after which a process that waits for a slower one raises `ShardError`. By default a day: one
            that has ended is noticed at once.

    Raises `ShardError` in every process that is left when another ends, and where pairs or models differ.

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
        raise OptionError("sharded: already entered. Leave it first; one context serves any number of calls.")
    if not dist.is_available():
        yield current()
        return
    if not dist.is_initialized() and int(os.environ.get("WORLD_SIZE", 1)) > 1:
        if torch.cuda.is_available():
            torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)) % torch.cuda.device_count())
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo", timeout=timedelta(seconds=timeout)
        )
        # Not on leaving: started again, torch finds what the first time left in the launcher's store, and fails.
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
        # Ends the connections, so that processes that wait for one that failed are told at once.
        if dist.is_initialized():
            dist.destroy_process_group(group)


def _end() -> None:
    import torch.distributed as dist

    if dist.is_initialized():
        dist.destroy_process_group()
