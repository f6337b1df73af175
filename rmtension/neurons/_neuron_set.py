"""Sets of neurons: their algebra, and random sets to compare them with."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeGuard

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from rmtension._repr_html import html_table
from rmtension.errors import OptionError, ProvenanceError
from rmtension.store._storage import read_result, write_result


@dataclass(frozen=True, eq=False)
class NeuronSet:
    """Some neurons of one site of a model: a mask over (layer, neuron), with the algebra of sets.

    `architecture` and `site` say which neurons the mask indexes; sets combine only when both agree.

    Examples:
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
        if not _are_numbers(shape) or min(shape) < 1 or shape[0] * shape[1] > _MOST:
            raise OptionError(f"shape: expected the numbers of layers and of neurons a layer, got {shape!r:.80}.")
        for name, text in (("site", site), ("architecture", architecture)):
            if not isinstance(text, str):
                raise OptionError(f"{name}: expected a text, got {text!r:.80}.")
        given = list(indices) if isinstance(indices, Iterable) else None
        if given is None or not all(map(_are_numbers, given)):
            raise OptionError(f"indices: expected (layer, neuron) pairs of whole numbers, got {indices!r:.80}.")
        mask = torch.zeros(shape, dtype=torch.bool)
        for layer, neuron in given:
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

    def _repr_html_(self) -> str:
        """One row per layer that has some: how many, and the first of them."""
        rows = []
        for layer, mask in enumerate(self.mask):
            found = mask.nonzero()[:, 0].tolist()
            if found:
                listed = ", ".join(map(str, found[:_N_LISTED])) + (", ..." if len(found) > _N_LISTED else "")
                rows.append({"layer": layer, "n": len(found), "neurons": listed})
        return html_table(repr(self), pd.DataFrame(rows[:_N_LISTED]), n_of=len(rows))

    @property
    def n_per_layer(self) -> list[int]:
        """How many neurons of each layer are in the set."""
        return [int(n) for n in self.mask.sum(dim=1)]

    # -- controls --------------------------------------------------------------------------------------------------

    def matched_random(
        self,
        *,
        seed: int,
        match: str = "layer",
        magnitude: Float[Tensor, "layer neuron"] | None = None,
        exclude: "NeuronSet | None" = None,
    ) -> "NeuronSet":
        """A random set of the same size, disjoint from this one: the control for ablating it.

        `match="layer"` draws as many neurons in every layer as the set has there; `"model"` only as many in all;
        `"magnitude"` as many in every layer, each among the free neurons whose `magnitude` (for example the mean
        absolute activation) is nearest to that of one of the set. Neurons in `exclude` are left out as well. Raises
        `OptionError` when too few are left to draw from.

        Examples:
            >>> control = neurons.matched_random(seed=0, exclude=organism.truth["shared"])
            >>> control.n_per_layer == neurons.n_per_layer, len(control & neurons)
            (True, 0)
        """
        check_seed(seed)
        if match not in ("layer", "model", "magnitude"):
            raise OptionError(f"match: expected 'layer', 'model' or 'magnitude', got {match!r}.")
        if (match == "magnitude") != (magnitude is not None):
            raise OptionError(
                f"magnitude: expected one number per neuron with match='magnitude' and nothing otherwise, got "
                f"{type(magnitude).__name__} with {match!r}."
            )
        if magnitude is not None and magnitude.shape != self.mask.shape:
            raise OptionError(
                f"magnitude: expected shape {tuple(self.mask.shape)}, one number per neuron, got "
                f"{tuple(magnitude.shape)}."
            )
        free = ~self.mask if exclude is None else ~self.mask & ~self._aligned(exclude)
        generator = np.random.default_rng(seed)
        mask = torch.zeros_like(self.mask)
        n_layers, n_neurons = self.mask.shape
        for rows in [list(range(n_layers))] if match == "model" else [[layer] for layer in range(n_layers)]:
            wanted = self.mask[rows].flatten().nonzero()[:, 0].numpy()
            candidates = free[rows].flatten().nonzero()[:, 0].numpy()
            if len(wanted) > len(candidates):
                raise OptionError(
                    f"matched_random: {len(wanted)} neurons wanted in layers {rows}, only {len(candidates)} are "
                    'outside the set. Use a smaller set, match="model", or a smaller `exclude`.'
                )
            if magnitude is None:
                drawn = generator.choice(candidates, size=len(wanted), replace=False)
            else:
                sizes = magnitude[rows].flatten().double().numpy()
                drawn = _nearest(sizes[wanted], candidates, sizes, generator)
            mask.view(-1)[torch.from_numpy(drawn) + rows[0] * n_neurons] = True
        return self._with(mask)

    def subsample(self, k: int, *, seed: int) -> "NeuronSet":
        """`k` of the set's neurons drawn at random: sets of unequal size are compared at the size of the smallest.

        Examples:
            >>> len(neurons.subsample(1, seed=0) & neurons)
            1
        """
        check_seed(seed)
        if not _is_whole(k) or not 0 <= k <= len(self):
            raise OptionError(f"k: expected 0 to {len(self)} neurons (the set has so many), got {k}.")
        places = self.mask.view(-1).nonzero()[:, 0].numpy()
        mask = torch.zeros_like(self.mask)
        mask.view(-1)[torch.from_numpy(np.random.default_rng(seed).choice(places, size=k, replace=False))] = True
        return self._with(mask)

    # -- out -------------------------------------------------------------------------------------------------------

    def to_frame(self) -> pd.DataFrame:
        """One row per neuron of the set: layer, neuron."""
        return pd.DataFrame(list(self), columns=["layer", "neuron"])

    def to_dict(self) -> dict[str, Any]:
        """A plain dict, for JSON: site, architecture, shape, and layer -> indices, the layers as text like JSON's keys.

        Examples:
            >>> a = NeuronSet.from_indices([(1, 0), (1, 2)], shape=(2, 3), site="mlp", architecture="toy")
            >>> a.to_dict()
            {'site': 'mlp', 'architecture': 'toy', 'shape': [2, 3], 'neurons': {'1': [0, 2]}}
        """
        found: dict[str, list[int]] = {}
        for layer, neuron in self:
            found.setdefault(str(layer), []).append(neuron)
        shape = list(self.mask.shape)
        return {"site": self.site, "architecture": self.architecture, "shape": shape, "neurons": found}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "NeuronSet":
        """The inverse of `to_dict`; layers may be numbers. Raises `OptionError` naming what is missing or wrong."""
        names = ("site", "architecture", "shape", "neurons")
        if not isinstance(values, Mapping) or set(values) != set(names):
            keys = sorted(map(str, values)) if isinstance(values, Mapping) else type(values).__name__
            raise OptionError(f"values: expected a dict with exactly the keys {list(names)}, got {keys!s:.80}.")
        by_layer = values["neurons"]
        if not isinstance(by_layer, Mapping) or not all(isinstance(one, list | tuple) for one in by_layer.values()):
            raise OptionError(f"neurons: expected a dict of layers to lists of indices, got {by_layer!r:.80}.")
        # `from_indices` looks at what they are.
        indices: list[Any] = [(_layer(layer), neuron) for layer, some in by_layer.items() for neuron in some]
        shape = values["shape"]
        shape = tuple(shape) if isinstance(shape, list) else shape
        return cls.from_indices(indices, shape=shape, site=values["site"], architecture=values["architecture"])

    def save(self, path: str | Path) -> None:
        """Write the set to one safetensors file."""
        write_result(path, "NeuronSet", {"mask": self.mask}, {"site": self.site, "architecture": self.architecture})

    @classmethod
    def load(cls, path: str | Path) -> "NeuronSet":
        """Read what `save` wrote."""
        tensors, values = read_result(
            path, "NeuronSet", tensors={"mask": "bool layer neuron"}, values={"site": str, "architecture": str}
        )
        return cls(tensors["mask"], values["site"], values["architecture"])

    def _with(self, mask: Bool[Tensor, "layer neuron"]) -> "NeuronSet":
        return NeuronSet(mask, self.site, self.architecture)

    def _aligned(self, other: "NeuronSet") -> Bool[Tensor, "layer neuron"]:
        for name in ("site", "architecture"):
            mine, theirs = getattr(self, name), getattr(other, name)
            if mine != theirs:
                raise ProvenanceError(f"NeuronSet: {name} differs: {mine!r} here, {theirs!r} there.")
        return other.mask


def _layer(key: object) -> object:
    """A layer as a number, where it is the text of one: JSON has no other keys."""
    # Nine digits: int() takes as many as a file has, and other alphabets' too.
    return int(key) if isinstance(key, str) and key.isascii() and key.isdigit() and len(key) < 10 else key


# So many layers, and neurons of each, show in a notebook.
_N_LISTED = 12

# More neurons than any model has: a length that comes from a file may be any number.
_MOST = 2**28


def check_seed(seed: object) -> None:
    """Raise `OptionError` unless `seed` is one: a whole number that is not negative."""
    if not _is_whole(seed) or int(seed) < 0:
        raise OptionError(f"seed: expected a whole number from 0 on, got {seed!r:.80}.")


def _is_whole(value: object) -> TypeGuard[int]:
    return isinstance(value, int | np.integer) and not isinstance(value, bool)


def _are_numbers(pair: object) -> bool:
    """Whether this is two whole numbers."""
    return isinstance(pair, tuple | list) and len(pair) == 2 and all(map(_is_whole, pair))


# A neuron's control is drawn among so many that are nearest in magnitude.
_N_NEAREST = 5


def _nearest(
    targets: Float[np.ndarray, "wanted"],
    candidates: Int[np.ndarray, "free"],
    sizes: Float[np.ndarray, "neuron"],
    generator: np.random.Generator,
) -> Int[np.ndarray, "wanted"]:
    """For each target, one of the `_N_NEAREST` candidates left whose size is nearest; targets in random order."""
    left = candidates
    drawn = []
    for target in generator.permutation(targets):
        gaps = np.abs(sizes[left] - target)
        near = np.argsort(gaps, kind="stable")[:_N_NEAREST]
        pick = generator.choice(near)
        drawn.append(left[pick])
        left = np.delete(left, pick)
    return np.array(drawn, dtype=np.int64)
