"""Scores accumulated batch by batch: means, standard errors and block sums, in memory that does not grow with pairs."""

from collections.abc import Callable

import torch
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor

from rmtension.neurons._neuron_scores import N_BLOCKS, NeuronScores, block_of
from rmtension.store._provenance import Provenance


class RunningScores:
    """Mean and squared deviations of a value per pair and neuron, and its sums per block of prompts, in float64.

    Batches are merged as in Chan, Golub and LeVeque (1983), which avoids cancellation.
    """

    def __init__(self, layers: int, neurons: int, *, gap: bool = False) -> None:
        self._n = torch.zeros((), dtype=torch.long)
        self._gap = torch.zeros(layers, dtype=torch.float64) if gap else None
        self._mean, self._deviations = torch.zeros(2, layers, neurons, dtype=torch.float64)
        self._blocks = torch.zeros(N_BLOCKS, layers, neurons, dtype=torch.float64)
        self._block_sizes = torch.zeros(N_BLOCKS, dtype=torch.float64)

    @property
    def has_gap(self) -> bool:
        """Whether `update` takes gaps."""
        return self._gap is not None

    @property
    def state(self) -> dict[str, Tensor]:
        """The tensors that `update` changes, by name."""
        gap = {} if self._gap is None else {"gap": self._gap}
        blocks = {"blocks": self._blocks, "block_sizes": self._block_sizes}
        return {"n": self._n, "mean": self._mean, "deviations": self._deviations, **blocks, **gap}

    def update(
        self,
        values: Float[Tensor, "pair layer neuron"],
        keys: Int[Tensor, "pair"],
        gap: Float[Tensor, "pair layer"] | None = None,
    ) -> None:
        """Add a batch of pairs; `keys` identify their prompts, `gap` is how far their scores are from completeness."""
        if self._gap is not None and gap is not None:
            self._gap += gap.sum(0).cpu()
        before = int(self._n)
        n = before + len(values)
        # Summed on the device of the values, so that the transfer to the CPU does not grow with the number of pairs.
        mean = values.mean(0)
        deviations = (values - mean).square().sum(0).cpu()
        step = mean.cpu() - self._mean
        self._deviations += deviations + step.square() * (before * len(values) / n)
        self._mean += step * (len(values) / n)
        self._n += len(values)
        owners = block_of(keys.cpu())
        blocks = values.new_zeros(self._blocks.shape).index_add_(0, owners.to(values.device), values)
        self._blocks += blocks.cpu()
        self._block_sizes += torch.bincount(owners, minlength=N_BLOCKS)

    def merge_processes(self, add_up: Callable[..., None]) -> None:
        """Combine the sums of several processes; `add_up` replaces tensors, in place, by their sums over processes."""
        before = int(self._n)
        mean = self._mean * before
        add_up(self._n, mean, self._blocks, self._block_sizes, *([] if self._gap is None else [self._gap]))
        mean /= int(self._n)
        self._deviations += before * (self._mean - mean).square()
        add_up(self._deviations)
        self._mean = mean

    def compute(self, provenance: Provenance) -> NeuronScores:
        """The scores of everything that was added."""
        n = int(self._n)
        undefined = torch.full_like(self._mean, torch.nan)
        stderr = undefined if n < 2 else (self._deviations / (n - 1) / n).sqrt()
        # NaN if one block holds all pairs, because nothing is left without it.
        left = rearrange(n - self._block_sizes, "block -> block 1 1")
        without = (self._blocks.sum(0) - self._blocks) / left
        gap = None if self._gap is None else self._gap / n
        return NeuronScores(self._mean, stderr, provenance, without, gap)
