"""Scores of neurons: values, standard errors, top sets, and their variation over prompts."""

import math
import warnings
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from einops import einsum
from jaxtyping import Bool, Float, Int
from torch import Tensor

from rmtension._arguments import require_choice
from rmtension._repr_html import N_ROWS, html_table
from rmtension._sites import all_neuron_columns
from rmtension.errors import OptionError, RMTensionWarning
from rmtension.neurons._neuron_set import NeuronSet
from rmtension.neurons._signs import effect_sign, ranked, with_direction
from rmtension.store._provenance import Provenance
from rmtension.store._storage import read_result, write_result

# The number of blocks into which prompts are divided, by a hash of their text, in every result that keeps blocks.
N_BLOCKS = 32
_TENSORS = ("values", "stderr", "without_block", "completeness_gap")


@dataclass(frozen=True, eq=False, repr=False)
class NeuronScores:
    """One score per neuron with its standard error (NaN where it is undefined) and its provenance.

    `without_block[b]` holds the scores computed without the prompts of block b (`block_of`), from which a bootstrap
    over prompts is computed; its size does not grow with their number. It is None if a method keeps no blocks.
    `completeness_gap` belongs to integrated gradients: the mean over pairs of the difference between the sum of each
    layer's scores and the change of the margin that it should equal. `provenance.sign` says what a positive score
    means; see `top`.

    Examples:
        >>> scores.values.shape, scores.n
        (torch.Size([2, 24]), 24)
        >>> scores.to_frame().nlargest(2, "score").round(2)
            layer  neuron  score  stderr direction
        0       0       0   1.12    0.19  supports
        32      1       8   1.04    0.19  supports
    """

    values: Float[Tensor, "layer neuron"]
    stderr: Float[Tensor, "layer neuron"]
    provenance: Provenance
    without_block: Float[Tensor, "block layer neuron"] | None = None
    completeness_gap: Float[Tensor, "layer"] | None = None

    def __post_init__(self) -> None:
        for name in _TENSORS:
            given = getattr(self, name)
            object.__setattr__(self, name, None if given is None else given.detach().cpu().clone())

    def __repr__(self) -> str:
        layers, neurons = self.values.shape
        where, known = self.provenance, self.values[self.values.isfinite()]
        span = f"from {known.min():.3g} to {known.max():.3g}" if len(known) else "all NaN or infinite"
        some = "" if len(known) == self.values.numel() else f", {len(known)} of them scored"
        return (
            f"NeuronScores({where.label}: {layers} x {neurons} {where.site} neurons{some}, {span}; "
            f"{where.n_pairs} pairs, {where.positions} tokens, {where.architecture})"
        )

    def _repr_html_(self) -> str:
        """A table of the neurons with the largest |score|, and their standard errors over pairs."""
        frame = self.to_frame()
        largest = frame.loc[frame["score"].abs().sort_values(ascending=False, kind="stable").index[:N_ROWS]]
        return html_table(f"{self!r}; largest |score|:", largest, n_of=len(frame))

    @property
    def n(self) -> int:
        """The number of pairs behind every score."""
        return self.provenance.n_pairs

    def top(
        self,
        fraction: float | None = None,
        *,
        k: int | None = None,
        rank_by: str = "magnitude",
        rank_within: str = "model",
        cut_rule: str = "exact",
    ) -> NeuronSet:
        """The `ceil(fraction * N)` neurons (or exactly `k`) that score highest.

        - `rank_by="magnitude"` ranks by |score|.
        - `rank_by="supports"` takes the neurons that raise the margin most, according to their scores: the margin falls
          without them. `"opposes"` takes those that lower it most. Both have the same meaning for every method, because
          `provenance.sign` says whether its positive scores support the margin. They raise `OptionError` for scores
          without a direction (magnitudes and frequencies of activations, `aggregate="absolute"`). With
          `mean_difference`, which does not use the reward, they take the neurons that are more active in the chosen
          (or in the rejected) responses; these are candidates, whether or not the reward depends on them.
        - `rank_by="score"` ranks the signed scores, as the published code ranks mean activations. It raises
          `OptionError` if a positive score opposes the margin.

        `rank_within="model"` ranks all layers jointly, `"layer"` ranks each layer by itself, and `k` then counts
        neurons per layer. Equal scores are taken in the order of (layer, neuron); if the cut falls between equal
        scores, the choice is arbitrary and a `RMTensionWarning` is shown. There is also a warning if fewer neurons
        support (or oppose) the margin than are taken.

        `cut_rule="percentile"` takes every neuron at or above the percentile, as the code of arXiv 2606.13209 does.
        With ties at the percentile it takes more neurons, possibly all of them.

        Examples:
            >>> scores.top(0.05), len(scores.top(k=6, rank_by="supports"))
            (NeuronSet(3 of 48 mlp neurons of gpt2-2x24-heads2x12-d24), 6)
        """
        require_choice("rank_within", rank_within, ("model", "layer"))
        require_choice("cut_rule", cut_rule, ("exact", "percentile"))
        if (fraction is None) == (k is None):
            raise OptionError(
                f"top: expected exactly one of fraction and k, got fraction={fraction} and k={k}. For example "
                "top(0.05) or top(k=50)."
            )
        if fraction is not None and not 0 < fraction <= 1:
            count = f" To take {fraction} neurons, call top(k={fraction})." if isinstance(fraction, int) else ""
            raise OptionError(f"fraction: expected a number in (0, 1], got {fraction}.{count}")
        order = ranked(self.values.double(), rank_by, self.provenance)
        if order.isnan().any():
            raise OptionError(
                f"top: {int(order.isnan().sum())} of {order.numel()} scores are NaN and cannot be ranked. If a sample "
                "of neurons was measured, the others are NaN: measure all. Otherwise score in float32, or look for "
                "overflow in the model."
            )
        parts = [order.flatten()] if rank_within == "model" else list(order)
        if cut_rule == "percentile":
            if fraction is None:
                raise OptionError("cut_rule: 'percentile' needs fraction, got k. Pass fraction, or cut_rule='exact'.")
            masks = [part >= np.percentile(part.numpy(), 100 * (1 - fraction)) for part in parts]
        else:
            masks = [_exact_top(part, fraction, k) for part in parts]
        mask = torch.cat(masks).view_as(self.values)
        if rank_by in ("supports", "opposes") and not mask.all() and (others := int((order[mask] <= 0).sum())):
            warnings.warn(
                f"top: only {int((order > 0).sum())} of {order.numel()} neurons have a score that {rank_by} the "
                f"margin, so {others} of the {int(mask.sum())} neurons taken do not. Take fewer.",
                RMTensionWarning,
                stacklevel=2,
            )
        return NeuronSet(mask, self.provenance.site, self.provenance.architecture)

    def as_effects(self) -> Float[Tensor, "layer neuron"]:
        """The change of the margin that the scores predict when each neuron is ablated; negative if it supports it.

        Scores without a direction (`provenance.sign` is None) predict magnitudes and are returned unchanged.

        Examples:
            >>> scores.as_effects().equal(-scores.values)
            True
        """
        return self.values * effect_sign(self.provenance)

    def resampled(self, counts: Float[Tensor, "resample block"]) -> Float[Tensor, "resample layer neuron"]:
        """The scores on resamples of the prompts in which block b occurs `counts[r, b]` times; rows sum to `N_BLOCKS`.

        Exact for means over blocks of equal size; otherwise correct to first order (the infinitesimal jackknife).
        """
        without = self.require_blocks()
        n = len(without)
        influence = (n - 1) * (self.values - without)
        return (
            self.values
            + einsum(counts - 1, influence, "resample block, block layer neuron -> resample layer neuron") / n
        )

    def require_blocks(self) -> Float[Tensor, "block layer neuron"]:
        """`without_block`; raises `OptionError` for scores without blocks."""
        if self.without_block is None:
            raise OptionError(
                f"scores: those of method {self.provenance.label!r} keep no blocks of prompts, so they cannot be "
                "resampled. Score again with NeuronAttribution(...).score."
            )
        return self.without_block

    def to_frame(self) -> pd.DataFrame:
        """One row per neuron: layer, neuron, score, stderr, and its direction.

        `direction` says whether the neuron "supports" the margin, "opposes" it, or does "neither" (0 or NaN). Scores
        without a direction have no such column. At the site `expert` there are columns for the neuron's expert and its
        index in the expert.
        """
        where, shape = self.provenance, self.values.shape
        frame = pd.DataFrame(
            {
                **all_neuron_columns(where.site, where.architecture, (shape[0], shape[1])),
                "score": self.values.flatten().numpy(),
                "stderr": self.stderr.flatten().numpy(),
            }
        )
        return with_direction(frame, self.values, self.provenance)

    def save(self, path: str | Path) -> None:
        """Write scores and provenance to one safetensors file."""
        write_result(
            path,
            "NeuronScores",
            {name: tensor for name in _TENSORS if (tensor := getattr(self, name)) is not None},
            {"provenance": self.provenance.to_dict()},
        )

    @classmethod
    def load(cls, path: str | Path) -> "NeuronScores":
        """Read what `save` wrote."""
        tensors, values = read_result(
            path,
            "NeuronScores",
            tensors={"values": "float layer neuron", "stderr": "float layer neuron"},
            optional={"without_block": "float block layer neuron", "completeness_gap": "float layer"},
            values={"provenance": dict},
        )
        provenance = Provenance.from_dict(values["provenance"])
        optional = {name: tensors.get(name) for name in _TENSORS[2:]}
        return cls(tensors["values"], tensors["stderr"], provenance, **optional)


def block_of(keys: Int[Tensor, "text"]) -> Int[Tensor, "text"]:
    """The block of every text, from the hash of its prompt: a prompt is in the same block in every data set."""
    return keys % N_BLOCKS


def jackknife_stderr(without_block: Float[Tensor, "block layer neuron"]) -> Float[Tensor, "layer neuron"]:
    """Standard error from scores that leave out one block of prompts each (Tukey 1958).

    Blocks without a prompt count too, which makes it a little too large: by 5% if 8 of the 32 blocks have prompts.
    """
    n = len(without_block)
    return (without_block.var(dim=0, unbiased=False) * (n - 1)).sqrt()


def top_size(fraction: float, total: int) -> int:
    """How many of `total` neurons a top set of `fraction` holds: `ceil(fraction * total)`."""
    # Minus 1e-9 because 0.1 * 70 is 7.000000000000001 in floating point, whose ceiling is 8.
    return math.ceil(fraction * total - 1e-9)


def _exact_top(scores: Float[Tensor, "candidate"], fraction: float | None, k: int | None) -> Bool[Tensor, "candidate"]:
    total = len(scores)
    size = top_size(fraction, total) if fraction is not None else k
    assert size is not None
    if not 0 < size <= total:
        raise OptionError(f"k: expected 1 to {total} neurons, got {size}.")
    order = torch.argsort(scores, descending=True, stable=True)
    if size < total and scores[order[size - 1]] == scores[order[size]]:
        n_tied = int((scores == scores[order[size - 1]]).sum())
        warnings.warn(
            f"top: the cut at {size} of {total} neurons falls inside a tie of {n_tied} equal scores; the first by "
            "(layer, neuron) are taken.",
            RMTensionWarning,
            stacklevel=4,
        )
    mask = torch.zeros(total, dtype=torch.bool)
    mask[order[:size]] = True
    return mask
