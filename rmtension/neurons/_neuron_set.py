"""Sets of neurons: set algebra, and random sets as controls."""

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
from rmtension._sites import neuron_columns, neuron_name
from rmtension.errors import OptionError, ProvenanceError
from rmtension.store._storage import read_result, write_result


@dataclass(frozen=True, eq=False)
class NeuronSet:
    """A set of neurons at one site of a model: a mask over (layer, neuron), with the operators `&`, `|`, `-`, `^`, `~`.

    `architecture` and `site` say which neurons the mask indexes; sets can be combined only if both agree, otherwise
    `ProvenanceError`.

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
        # A copy, because the caller may change the tensor that the set was made from.
        object.__setattr__(self, "mask", self.mask.detach().cpu().clone())

    @classmethod
    def from_indices(
        cls, indices: Iterable[tuple[int, int]], *, shape: tuple[int, int], site: str, architecture: str
    ) -> "NeuronSet":
        """The set of the (layer, neuron) pairs `indices`; raises `OptionError` for one outside `shape`."""
        if not _are_numbers(shape) or min(shape) < 1 or shape[0] * shape[1] > _MOST:
            raise OptionError(f"shape: expected (number of layers, neurons per layer), got {shape!r:.80}.")
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
        """One row per layer with neurons in the set: their number, and the first of them."""
        rows = []
        for layer, mask in enumerate(self.mask):
            indices = mask.nonzero()[:, 0].tolist()
            if indices:
                # Without the layer, which has its own column, and the plain number at other sites.
                names = [self._short_name(layer, index) for index in indices[:_N_LISTED]]
                listed = ", ".join(names) + (", ..." if len(indices) > _N_LISTED else "")
                rows.append({"layer": layer, "n": len(indices), "neurons": listed})
        return html_table(repr(self), pd.DataFrame(rows[:_N_LISTED]), n_of=len(rows))

    def _short_name(self, layer: int, neuron: int) -> str:
        """Expert and index ("E5 N48") at the site `expert`, otherwise the neuron's number."""
        if self.site != "expert":
            return str(neuron)
        return neuron_name(self.site, layer, neuron, self.architecture).partition(" ")[2]

    @property
    def n_per_layer(self) -> list[int]:
        """The number of neurons of each layer that are in the set."""
        return [int(n) for n in self.mask.sum(dim=1)]

    # -- controls --------------------------------------------------------------------------------------------------

    def matched_random(
        self,
        *,
        seed: int = 0,
        match: str = "layer",
        magnitude: Float[Tensor, "layer neuron"] | None = None,
        exclude: "NeuronSet | None" = None,
    ) -> "NeuronSet":
        """A random set of the same size, disjoint from this one: the control for ablating it.

        `match="layer"` draws as many neurons in every layer as the set has there. `"model"` matches only the total
        number. `"magnitude"` also draws as many per layer, each from the five free neurons whose `magnitude` (for
        example the mean absolute activation) is nearest to that of a neuron in the set. Neurons in `exclude` are never
        drawn. Raises `OptionError` if too few neurons are left to draw from.

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
                f"magnitude: expected one number per neuron with match='magnitude' and None otherwise, got "
                f"{type(magnitude).__name__} with match={match!r}."
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
                other = "" if match == "model" else ', match="model"'
                smaller = "" if exclude is None else ", or a smaller `exclude`"
                raise OptionError(
                    f"matched_random: needs {len(wanted)} neurons in layers {rows}, but only {len(candidates)} are "
                    f"outside the set{'' if exclude is None else ' and `exclude`'}. Use a smaller set{other}{smaller}."
                )
            if magnitude is None:
                drawn = generator.choice(candidates, size=len(wanted), replace=False)
            else:
                sizes = magnitude[rows].flatten().double().numpy()
                drawn = _nearest(sizes[wanted], candidates, sizes, generator)
            mask.view(-1)[torch.from_numpy(drawn) + rows[0] * n_neurons] = True
        return self._with(mask)

    def subsample(self, k: int, *, seed: int = 0) -> "NeuronSet":
        """Draw `k` of the set's neurons at random, for example to compare sets of unequal size at the smallest size.

        Examples:
            >>> len(neurons.subsample(1, seed=0) & neurons)
            1
        """
        check_seed(seed)
        if not _is_whole(k) or not 0 <= k <= len(self):
            raise OptionError(f"k: expected 0 to {len(self)} neurons (the size of the set), got {k}.")
        available = self.mask.view(-1).nonzero()[:, 0].numpy()
        mask = torch.zeros_like(self.mask)
        mask.view(-1)[torch.from_numpy(np.random.default_rng(seed).choice(available, size=k, replace=False))] = True
        return self._with(mask)

    # -- writing ---------------------------------------------------------------------------------------------------

    def to_frame(self) -> pd.DataFrame:
        """One row per neuron of the set: layer, neuron; at the site `expert` also expert and index in the expert."""
        return pd.DataFrame(neuron_columns(self.site, self.architecture, *self.mask.nonzero().numpy().T))

    def to_dict(self) -> dict[str, Any]:
        """A plain dict for JSON: site, architecture, shape, and layer -> indices; layers are texts, as JSON's keys are.

        Examples:
            >>> a = NeuronSet.from_indices([(1, 0), (1, 2)], shape=(2, 3), site="mlp", architecture="toy")
            >>> a.to_dict()
            {'site': 'mlp', 'architecture': 'toy', 'shape': [2, 3], 'neurons': {'1': [0, 2]}}
        """
        by_layer: dict[str, list[int]] = {}
        for layer, neuron in self:
            by_layer.setdefault(str(layer), []).append(neuron)
        shape = list(self.mask.shape)
        return {"site": self.site, "architecture": self.architecture, "shape": shape, "neurons": by_layer}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "NeuronSet":
        """The inverse of `to_dict`; layers may be numbers. Raises `OptionError` naming what is missing or wrong."""
        names = ("site", "architecture", "shape", "neurons")
        if not isinstance(values, Mapping) or set(values) != set(names):
            keys = sorted(map(str, values)) if isinstance(values, Mapping) else type(values).__name__
            raise OptionError(f"values: expected a dict with exactly the keys {list(names)}, got {keys!s:.80}.")
        by_layer = values["neurons"]
        if not isinstance(by_layer, Mapping) or not all(isinstance(part, list | tuple) for part in by_layer.values()):
            raise OptionError(f"neurons: expected a dict from layers to lists of indices, got {by_layer!r:.80}.")
        # `from_indices` checks the numbers.
        indices: list[Any] = [(_layer(layer), neuron) for layer, part in by_layer.items() for neuron in part]
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
            first, second = getattr(self, name), getattr(other, name)
            if first != second:
                raise ProvenanceError(
                    f"NeuronSet: {name} differs: {first!r} here, {second!r} there. Combine sets of the same {name}."
                )
        return other.mask


def _layer(key: object) -> object:
    """A layer as a number if it is given as text, because keys of JSON are texts."""
    # At most nine ASCII digits: int() would accept any number of digits, of other scripts too.
    return int(key) if isinstance(key, str) and key.isascii() and key.isdigit() and len(key) < 10 else key


# A notebook shows at most this many layers, and neurons per layer.
_N_LISTED = 12

# More neurons than any model has; a length read from a file may be arbitrarily large.
_MOST = 2**28


def check_seed(seed: object) -> None:
    """Raise `OptionError` unless `seed` is a whole number that is not negative."""
    if not _is_whole(seed) or int(seed) < 0:
        raise OptionError(f"seed: expected a whole number from 0 on, got {seed!r:.80}.")


def _is_whole(value: object) -> TypeGuard[int]:
    return isinstance(value, int | np.integer) and not isinstance(value, bool)


def _are_numbers(pair: object) -> bool:
    """Whether this is a pair of whole numbers."""
    return isinstance(pair, tuple | list) and len(pair) == 2 and all(map(_is_whole, pair))


# A neuron's control is drawn from this many neurons that are nearest in magnitude.
_N_NEAREST = 5


def _nearest(
    targets: Float[np.ndarray, "wanted"],
    candidates: Int[np.ndarray, "free"],
    sizes: Float[np.ndarray, "neuron"],
    generator: np.random.Generator,
) -> Int[np.ndarray, "wanted"]:
    """Draw, for each target in random order, one of the `_N_NEAREST` remaining candidates whose size is nearest."""
    remaining = candidates
    drawn = []
    for target in generator.permutation(targets):
        gaps = np.abs(sizes[remaining] - target)
        near = np.argsort(gaps, kind="stable")[:_N_NEAREST]
        pick = generator.choice(near)
        drawn.append(remaining[pick])
        remaining = np.delete(remaining, pick)
    return np.array(drawn, dtype=np.int64)
