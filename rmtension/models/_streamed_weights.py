"""Weights that stay in a checkpoint's files, and are in memory only while their block runs."""

import ctypes
import mmap
import sys
from collections.abc import Iterator, Sequence
from functools import partial
from itertools import accumulate
from pathlib import Path
from typing import Any

from torch import nn

from rmtension.bodies._hooks import install_for_good
from rmtension.errors import ModelError, OptionError

# What Linux is told about a range of memory that is mapped from a file: it will be read soon; it may leave memory.
_WILL_NEED, _PAGE_OUT = 3, 21
_MAPS = Path("/proc/self/maps")

# First address and the address after the last.
_Range = tuple[int, int]


class StreamedWeights:
    """Leaves the weights of some blocks in their file, except while one of them runs.

    transformers maps the weights of a safetensors file into memory if they are not converted, and the system reads them
    when they are used. Before a block runs, the weights of the next block are requested, and those of the block before
    leave memory; in a backward pass the other way round. The numbers are the same, because nothing is copied. Weights
    that were changed in place are no longer those of the file, and stay in memory.

    Args:
        blocks: the model's blocks.
        n_bytes: how much of the blocks' weights may stay in memory; the blocks that do not fit are streamed.

    Attributes:
        total: the bytes of all blocks.
        streamed: the bytes of the blocks that are streamed.
    """

    def __init__(self, blocks: Sequence[nn.Module], n_bytes: int) -> None:
        if not sys.platform.startswith("linux"):
            raise OptionError(f"weight_memory: only Linux can stream weights, got {sys.platform}. Leave it out.")
        mapped = list(_mapped_files())
        ranges = [_ranges_of(block) for block in blocks]
        if not all(
            any(low <= first and last <= high for low, high in mapped) for each in ranges for first, last in each
        ):
            raise ModelError(
                "weight_memory: some weights are not read from the checkpoint's files as they are, because their dtype "
                "or their layout is converted. Pass the dtype of the files (dtype=torch.bfloat16 for most large "
                "models); a model whose layout transformers converts (a mixture of experts) cannot be streamed."
            )
        sizes = [sum(parameter.nbytes for parameter in block.parameters()) for block in blocks]
        self.total = sum(sizes)
        # The lowest blocks stay, as many as fit. The block that runs and the next one are in memory besides.
        self._kept = sum(up_to <= n_bytes for up_to in accumulate(sizes))
        self.streamed = sum(sizes[self._kept :])
        self._ranges = ranges
        self._madvise: Any = ctypes.CDLL(None).madvise
        self._madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
        for number, block in enumerate(blocks):
            install_for_good(block, partial(self._forward, number), partial(self._after_forward, number))

    def __repr__(self) -> str:
        return f"{self.streamed / 1e6:,.1f} of {self.total / 1e6:,.1f} MB of weights in files"

    def move(self, leaving: int, coming: int) -> None:
        """Let the weights of one block leave memory, and request those of another.

        The block after the last is the first, and the one before the first the last. Blocks that stay in memory are
        left alone, and a single block never leaves.
        """
        n_blocks = len(self._ranges)
        leaving, coming = leaving % n_blocks, coming % n_blocks
        if leaving != coming:
            self._advise(leaving, _PAGE_OUT)
        self._advise(coming, _WILL_NEED)

    # -- inside --------------------------------------------------------------------------------------------------------

    def _forward(self, number: int) -> None:
        self.move(leaving=number - 1, coming=number + 1)

    def _after_forward(self, number: int, output: Any) -> None:
        """Prepare for the backward pass, in which the gradient of a block's output comes before the block runs."""
        state = output[0] if isinstance(output, tuple) else output
        if state.requires_grad:
            state.register_hook(lambda _: self.move(leaving=number + 1, coming=number - 1))

    def _advise(self, number: int, advice: int) -> None:
        if number >= self._kept:
            for first, last in self._ranges[number]:
                # An unknown advice returns an error and changes nothing: results are right without it, but slower.
                self._madvise(first, last - first, advice)


def _mapped_files() -> Iterator[_Range]:
    """The ranges of memory that are mapped from files."""
    for line in _MAPS.read_text().splitlines():
        # Range, permissions, offset, device, inode, path.
        fields = line.split(maxsplit=5)
        if len(fields) == 6 and fields[5].startswith("/") and not fields[5].startswith(("/dev/", "/memfd:")):
            first, last = fields[0].split("-")
            yield int(first, 16), int(last, 16)


def _ranges_of(block: nn.Module) -> list[_Range]:
    """The ranges of the parameters of a block, from the beginning of a page on; those that touch are one."""
    ranges: list[_Range] = []
    for begin, last in sorted((p.data_ptr(), p.data_ptr() + p.nbytes) for p in block.parameters() if p.numel()):
        first = begin - begin % mmap.PAGESIZE
        if ranges and first <= ranges[-1][1]:
            ranges[-1] = (ranges[-1][0], max(last, ranges[-1][1]))
        else:
            ranges.append((first, last))
    return ranges
