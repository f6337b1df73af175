"""Computes items in a thread, ahead of their use."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import repeat, takewhile
from typing import TypeVar, cast

import torch

_In = TypeVar("_In")
_Out = TypeVar("_Out")
_END = object()


def works_ahead(device: torch.device) -> bool:
    """Whether tokens and batches are prepared in a thread: a CPU has nothing else to do meanwhile."""
    return device.type != "cpu"


def mapped_ahead(function: Callable[[_In], _Out], items: Iterable[_In], n: int) -> Iterator[_Out]:
    """`map(function, items)`, of which a thread computes up to `n` items while the caller uses the one before.

    The items themselves are read in the caller's thread. An error is raised where its item would be. When the caller
    stops early, the thread ends after the item that it is computing.
    """
    waiting: deque[Future[_Out]] = deque()
    with ThreadPoolExecutor(max_workers=1) as pool:
        try:
            for item in items:
                waiting.append(pool.submit(function, item))
                if len(waiting) > n:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for left in waiting:
                left.cancel()


def made_ahead(items: Iterable[_Out], n: int) -> Iterator[_Out]:
    """The items in their order; a thread takes up to `n` from `items` while the caller uses the one before."""
    source = iter(items)
    taken: Iterator[object] = mapped_ahead(lambda _: next(source, _END), repeat(None), n)
    return cast("Iterator[_Out]", takewhile(lambda item: item is not _END, taken))
