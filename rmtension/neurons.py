"""Sets of neurons and scores of neurons."""

import math
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from rmtension.errors import OptionError, ProvenanceError, RMTensionWarning
from rmtension.provenance import Provenance
from rmtension.storage import read_result, write_result


@dataclass(frozen=True, eq=False)
class NeuronSet:
    """Some neurons of one site of a model: a mask over (layer, neuron), with the algebra of sets.

    `architecture` and `site` say which neurons the mask indexes; sets combine only when both agree.

    >>> a = NeuronSet.from_indices([(0, 1), (1, 0)], shape=(2, 3), site="mlp", architecture="toy")
    >>> b = NeuronSet.from_indices([(0, 1)], shape=(2, 3), site="mlp", architecture="toy")
    >>> len(a), list(a & b), len(a - b), (0, 1) in a
    (2, [(0, 1)], 1, True)
    """

    mask: Bool[Tensor, "layer neuron"]
    site: str
    architecture: str

    def __post_init__(self) -> None:
        # A set shares no memory with the tensor it was made from, which its owner may go on changing.
        object.__setattr__(self, "mask", self.mask.detach().cpu().clone())

    @classmethod
    def from_indices(
        cls, indices: Iterable[tuple[int, int]], *, shape: tuple[int, int], site: str, architecture: str
    ) -> "NeuronSet":
        """The set of the (layer, neuron) pairs `indices`; raises `OptionError` for one outside `shape`."""
        mask = torch.zeros(shape, dtype=torch.bool)
        for layer, neuron in indices:
            if not (0 <= layer < shape[0] and 0 <= neuron < shape[1]):
                raise OptionError(
                    f"indices: ({layer}, {neuron}) is outside a model with {shape[0]} layers of {shape[1]} neurons."
                )
            mask[layer, neuron] = True
        return cls(mask, site, architecture)

    # -- as a set --------------------------------------------------------------------------------------------------

    def __len__(self) -> int:
        return int(self.mask.sum())

    def __iter__(self) -> Iterator[tuple[int, int]]:
        return iter([(layer, neuron) for layer, neuron in self.mask.nonzero().tolist()])

    def __contains__(self, item: object) -> bool:
        if not (isinstance(item, tuple) and len(item) == 2):
            return False
        layer, neuron = item
        return 0 <= layer < self.mask.shape[0] and 0 <= neuron < self.mask.shape[1] and bool(self.mask[layer, neuron])

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, NeuronSet):
            return NotImplemented
        same_place = (self.site, self.architecture) == (other.site, other.architecture)
        return same_place and torch.equal(self.mask, other.mask)

    def __hash__(self) -> int:
        return hash((self.site, self.architecture, tuple(self)))

    def __and__(self, other: "NeuronSet") -> "NeuronSet":
        return self._with(self.mask & self._aligned(other))

    def __or__(self, other: "NeuronSet") -> "NeuronSet":
        return self._with(self.mask | self._aligned(other))

    def __sub__(self, other: "NeuronSet") -> "NeuronSet":
        return self._with(self.mask & ~self._aligned(other))

    def __xor__(self, other: "NeuronSet") -> "NeuronSet":
        return self._with(self.mask ^ self._aligned(other))

    def __invert__(self) -> "NeuronSet":
        return self._with(~self.mask)

    def __repr__(self) -> str:
        return f"NeuronSet({len(self)} of {self.mask.numel()} {self.site} neurons of {self.architecture})"

    @property
    def n_per_layer(self) -> list[int]:
        """How many neurons of each layer are in the set."""
        return [int(n) for n in self.mask.sum(dim=1)]

    # -- controls --------------------------------------------------------------------------------------------------

    def matched_random(self, *, seed: int, match: str = "layer", exclude: "NeuronSet | None" = None) -> "NeuronSet":
        """A random set of the same size, disjoint from this one: the control for ablating it.

        `match="layer"` draws as many neurons in every layer as the set has there; `"model"` only as many in all.
        Neurons in `exclude` are left out as well. Raises `OptionError` when too few are left to draw from.
        """
        if match not in ("layer", "model"):
            raise OptionError(f"match: expected 'layer' or 'model', got {match!r}.")
        free = ~self.mask if exclude is None else ~self.mask & ~self._aligned(exclude)
        generator = np.random.default_rng(seed)
        mask = torch.zeros_like(self.mask)
        layers = range(self.mask.shape[0])
        for rows in [[layer] for layer in layers] if match == "layer" else [list(layers)]:
            wanted = int(self.mask[rows].sum())
            candidates = [(row, int(neuron)) for row in rows for neuron in free[row].nonzero()]
            if wanted > len(candidates):
                raise OptionError(
                    f"matched_random: {wanted} neurons wanted in layers {rows}, only {len(candidates)} are outside the "
                    'set. Use a smaller set, match="model", or a smaller `exclude`.'
                )
            for index in generator.choice(len(candidates), size=wanted, replace=False):
                mask[candidates[index]] = True
        return self._with(mask)

    # -- out -------------------------------------------------------------------------------------------------------

    def to_frame(self) -> pd.DataFrame:
        """One row a neuron of the set: layer, neuron."""
        return pd.DataFrame(list(self), columns=["layer", "neuron"])

    def save(self, path: str | Path) -> None:
        """Write the set to one safetensors file."""
        write_result(path, "NeuronSet", {"mask": self.mask}, {"site": self.site, "architecture": self.architecture})

    @classmethod
    def load(cls, path: str | Path) -> "NeuronSet":
        """Read what `save` wrote."""
        tensors, values = read_result(path, "NeuronSet")
        return cls(tensors["mask"], values["site"], values["architecture"])

    def _with(self, mask: Bool[Tensor, "layer neuron"]) -> "NeuronSet":
        return NeuronSet(mask, self.site, self.architecture)

    def _aligned(self, other: "NeuronSet") -> Bool[Tensor, "layer neuron"]:
        for name in ("site", "architecture"):
            mine, theirs = getattr(self, name), getattr(other, name)
            if mine != theirs:
                raise ProvenanceError(f"NeuronSet: {name} differs: {mine!r} here, {theirs!r} there.")
        return other.mask


@dataclass(frozen=True, eq=False)
class NeuronScores:
    """One score per neuron with its standard error over pairs (NaN where it is undefined), and where it came from."""

    values: Float[Tensor, "layer neuron"]
    stderr: Float[Tensor, "layer neuron"]
    provenance: Provenance

    def __post_init__(self) -> None:
        object.__setattr__(self, "values", self.values.detach().cpu().clone())
        object.__setattr__(self, "stderr", self.stderr.detach().cpu().clone())

    @property
    def n(self) -> int:
        """The number of pairs behind every score."""
        return self.provenance.n_pairs

    def top(
        self,
        fraction: float | None = None,
        *,
        k: int | None = None,
        by: str = "absolute",
    ) -> NeuronSet:
        """The `ceil(fraction * N)` neurons (or exactly `k`) that score highest over all layers jointly.

        `by="absolute"` ranks by |score|, `"value"` by the signed score. Equal scores are taken in the order of (layer,
        neuron), with a `RMTensionWarning` when the cut falls between them: the choice is then arbitrary.
        """
        if (fraction is None) == (k is None):
            raise OptionError("top: expected exactly one of fraction and k.")
        if fraction is not None and not 0 < fraction <= 1:
            raise OptionError(f"fraction: expected a number in (0, 1], got {fraction}.")
        if by not in ("absolute", "value"):
            raise OptionError(f"by: expected 'absolute' or 'value', got {by!r}.")
        total = self.values.numel()
        # 1e-9: 0.1 * 70 is 7.000000000000001 in floating point, and its ceiling would be 8.
        size = math.ceil(fraction * total - 1e-9) if fraction is not None else k
        assert size is not None
        if not 0 < size <= total:
            raise OptionError(f"k: expected 1 to {total} neurons, got {size}.")
        ranked = self.values.flatten().double()
        ranked = ranked.abs() if by == "absolute" else ranked
        if ranked.isnan().any():
            raise OptionError(
                f"top: {int(ranked.isnan().sum())} of {total} scores are NaN, which nothing ranks. Score in float32, "
                "or look for overflow in the model."
            )
        order = torch.argsort(ranked, descending=True, stable=True)
        n_tied = int((ranked == ranked[order[size - 1]]).sum())
        if size < total and ranked[order[size - 1]] == ranked[order[size]]:
            warnings.warn(
                f"top: the cut at {size} of {total} neurons falls inside a tie of {n_tied} equal scores; the first by "
                "(layer, neuron) are taken.",
                RMTensionWarning,
                stacklevel=2,
            )
        mask = torch.zeros(total, dtype=torch.bool)
        mask[order[:size]] = True
        return NeuronSet(mask.view_as(self.values), self.provenance.site, self.provenance.architecture)

    def to_frame(self) -> pd.DataFrame:
        """One row a neuron: layer, neuron, score, stderr."""
        layers, neurons = self.values.shape
        return pd.DataFrame(
            {
                "layer": np.repeat(np.arange(layers), neurons),
                "neuron": np.tile(np.arange(neurons), layers),
                "score": self.values.flatten().numpy(),
                "stderr": self.stderr.flatten().numpy(),
            }
        )

    def save(self, path: str | Path) -> None:
        """Write scores and provenance to one safetensors file."""
        write_result(
            path,
            "NeuronScores",
            {"values": self.values, "stderr": self.stderr},
            {"provenance": self.provenance.to_dict()},
        )

    @classmethod
    def load(cls, path: str | Path) -> "NeuronScores":
        """Read what `save` wrote."""
        tensors, values = read_result(path, "NeuronScores")
        return cls(tensors["values"], tensors["stderr"], Provenance.from_dict(values["provenance"]))
