"""Prompts that run before the rows of some batches, without gradients: the rows then begin after them."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from rmtension.data._encoding import EncodedText

# The keys and the values of one layer, each [text or row, head, token, channel]. Layers may differ in their heads.
_States = Float[Tensor, "_ _ _ _"]
KeysAndValues = tuple[_States, _States]


@dataclass(eq=False)
class PromptRun:
    """The distinct prompts of several batches, which run together when the first of these batches runs.

    `buckets` are the indices of `texts` that run in one batch. `states` are the keys and values of every layer for each
    bucket, padded on the right, once the prompts ran.
    """

    texts: tuple[EncodedText, ...]
    buckets: tuple[tuple[int, ...], ...]
    states: list[Sequence[KeysAndValues]] = field(default_factory=list)

    @cached_property
    def index(self) -> dict[tuple[int, ...], int]:
        """The ids of every prompt -> its index in `texts`."""
        return {text.ids: number for number, text in enumerate(self.texts)}


@dataclass(frozen=True)
class Prompts:
    """The prompts of a batch's rows: `of_row` are their indices in `run.texts`, `lengths` the numbers of their tokens.

    `states` are the keys and values of every layer, padded on the right, once the prompts ran.
    """

    run: PromptRun
    of_row: Int[Tensor, "row"]
    lengths: Int[Tensor, "row"]
    states: tuple[KeysAndValues, ...] | None = None

    @property
    def mask(self) -> Bool[Tensor, "row token"]:
        """Which columns hold tokens of each row's prompt; the other columns are padding."""
        return torch.arange(int(self.lengths.max()), device=self.lengths.device) < self.lengths[:, None]

    def mapped(self, change: Callable[[Tensor], Tensor]) -> "Prompts":
        """The same prompts with `change` applied to `of_row` and `lengths`, such as a move to a device."""
        return replace(self, of_row=change(self.of_row), lengths=change(self.lengths))

    def ready(self, run_bucket: Callable[[Sequence[EncodedText]], Sequence[KeysAndValues]]) -> "Prompts":
        """The prompts with their states; those that did not run yet are run by `run_bucket`."""
        run = self.run
        if not run.states:
            run.states = [run_bucket([run.texts[index] for index in bucket]) for bucket in run.buckets]
        layers = [
            (self._of_rows([keys for keys, _ in layer]), self._of_rows([values for _, values in layer]))
            for layer in zip(*run.states, strict=True)
        ]
        return replace(self, states=tuple(layers))

    def _of_rows(self, of_buckets: Sequence[_States]) -> Float[Tensor, "row head token channel"]:
        """The keys or the values of each row's prompt."""
        first = of_buckets[0]
        longest = int(self.lengths.max())
        whole = first.new_zeros(len(self.of_row), first.shape[1], longest, first.shape[3])
        for bucket, states in zip(self.run.buckets, of_buckets, strict=True):
            indices = torch.tensor(bucket, device=self.of_row.device)
            rows, which = (index.to(whole.device) for index in torch.where(self.of_row[:, None] == indices))
            width = min(states.shape[2], longest)
            whole[rows, :, :width] = states[which, :, :width]
        return whole
