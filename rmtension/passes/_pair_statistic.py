"""What a pass over pairs computes: one small class per quantity."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, Generic, TypeVar

from torch import Tensor

from rmtension.data._packing import Sharing
from rmtension.data._tokens import TokenBatch
from rmtension.passes._pass_record import PassRecord

Result_co = TypeVar("Result_co", covariant=True)


class PairStatistic(ABC, Generic[Result_co]):
    """A quantity that `run_pass` accumulates over pairs, batch by batch, as a metric of torchmetrics does.

    `run_pass` calls `observe` on every batch, and `update` with what it returned if all of it is finite. It handles
    batching, work folders, several processes, pairs that produce NaN or infinity, and progress bars, so a statistic
    contains none of that.

    Class attributes:
        sharing: which texts may share a row of a batch: those of one "prompt", those of one "pair" (so that the
            gradient in a row belongs to one pair), or "none" (one text per row).
        keeps_layers: whether `observe` holds something of every layer at once, which makes batches smaller.
        layer_dim: which dimension of the tensors that `observe` returns counts layers, for error messages; None for no
            dimension.

    Examples:
        >>> import torch
        >>> from rmtension.passes import run_pass
        >>> class LongestResponse(PairStatistic[int]):
        ...     def __init__(self):
        ...         self.longest = torch.zeros((), dtype=torch.long)
        ...     @property
        ...     def name(self):
        ...         return "longest"
        ...     @property
        ...     def state(self):
        ...         return {"longest": self.longest}
        ...     def observe(self, batch):
        ...         return [batch.select("response").sum(dim=1).max()]
        ...     def update(self, batch, observed):
        ...         self.longest.copy_(torch.maximum(self.longest, observed[0].cpu()))
        ...     def compute(self, record):
        ...         return int(self.longest)
        >>> run_pass(head, pairs["helpful"], LongestResponse())
        25
    """

    sharing: Sharing = "prompt"
    keeps_layers: bool = False
    layer_dim: ClassVar[int | None] = None

    @property
    @abstractmethod
    def name(self) -> str:
        """The label of the progress bar."""

    @property
    def settings(self) -> Mapping[str, Any]:
        """What the result depends on besides the model and the pairs, as JSON values; compared in a work folder."""
        return {}

    @property
    @abstractmethod
    def state(self) -> Mapping[str, Tensor]:
        """All tensors that `update` changes, in place, by name: what a work folder keeps. On the CPU."""

    @abstractmethod
    def observe(self, batch: TokenBatch) -> list[Tensor]:
        """Run the model on a batch, and return what `update` needs. Must not change the state."""

    @abstractmethod
    def update(self, batch: TokenBatch, observed: list[Tensor]) -> None:
        """Add what was observed of a batch to `state`, in place."""

    def merge_processes(self, add_up: Callable[..., None]) -> None:
        """Combine the states of several processes that each ran some batches; by default their sums.

        `add_up(*tensors)` replaces tensors, in place, by their sums over the processes.
        """
        add_up(*self.state.values())

    @abstractmethod
    def compute(self, record: PassRecord) -> Result_co:
        """The result, from `state` and from the record of the pairs that were read."""
