"""How much top sets overlap, compared with chance, and in which layers they lie."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import combinations

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from scipy import stats
from torch import Tensor

from rmtension.evaluation._intervals import check_level, percentile_interval
from rmtension.neurons._neuron_scores import N_BLOCKS, NeuronScores, top_size
from rmtension.neurons._neuron_set import NeuronSet
from rmtension.neurons._signs import ranked

_BASE = "base model"  # names of models in a study have no spaces
# Scores held in memory at a time while resampling.
_RESAMPLED_AT_A_TIME = 4_000_000
_THIRDS = ("early", "middle", "late")


@dataclass(frozen=True)
class Overlap:
    """How much two sets of neurons overlap, compared with chance.

    `jaccard` is |A & B| / |A | B|, `coefficient` is |A & B| / min(|A|, |B|). Under chance, B is a random set of its
    size among `n_neurons`, so |A & B| is hypergeometric: `expected_jaccard` is the expected Jaccard index, and
    `p_value` the probability of an intersection at least as large. Top sets concentrate in some layers of every model,
    trained or not, and overlap for that reason alone. `layer_expected_jaccard` and `layer_p_value` are therefore
    computed for a B that is random within each layer, with its number of neurons per layer. `beyond_chance` is the
    Jaccard index minus `layer_expected_jaccard`; its interval, `beyond_low` to `beyond_high`, covers 0 if the
    intersection lies within the central `level` (95%) of this distribution (mid-p, because counts are discrete).

    Examples:
        >>> overlap = Overlap.of(neurons, neurons)
        >>> overlap.intersection == len(neurons), overlap.jaccard, overlap.beyond_low > 0
        (True, 1.0, True)
    """

    size_a: int
    size_b: int
    intersection: int
    n_neurons: int
    jaccard: float
    coefficient: float
    expected_jaccard: float
    p_value: float
    layer_expected_jaccard: float
    layer_p_value: float
    beyond_chance: float
    beyond_low: float
    beyond_high: float

    @classmethod
    def of(cls, a: NeuronSet, b: NeuronSet, *, exclude: NeuronSet | None = None, level: float = 0.95) -> "Overlap":
        """The overlap of `a` and `b`, after removing the neurons of `exclude` from both sets and from all neurons.

        The Jaccard index and coefficient of empty sets are NaN (undefined), not 0.

        Examples:
            >>> a, b = scores.top(k=6), organism.truth["helpful"] | organism.truth["decoy"]
            >>> overlap = Overlap.of(a, b)
            >>> overlap.intersection, overlap.jaccard, round(overlap.expected_jaccard, 3)
            (2, 0.25, 0.058)
        """
        free = torch.ones_like(a.mask) if exclude is None else ~exclude.mask
        if exclude is not None:
            a, b = a - exclude, b - exclude
        common, union, smaller = len(a & b), len(a | b), min(len(a), len(b))
        sizes = np.array([free.sum(1).tolist(), a.n_per_layer, b.n_per_layer])
        total = int(sizes[0].sum())
        anywhere = _chance(sizes.sum(axis=1, keepdims=True))
        by_layer = _chance(sizes)
        hits = np.arange(smaller + 1)
        jaccards = hits / np.maximum(len(a) + len(b) - hits, 1)
        expected = float(by_layer @ jaccards) if union else np.nan
        jaccard = common / union if union else np.nan
        low, high = np.interp(_central_hits(by_layer, level), hits, jaccards) if union else (np.nan, np.nan)
        return cls(
            size_a=len(a),
            size_b=len(b),
            intersection=common,
            n_neurons=total,
            jaccard=jaccard,
            coefficient=common / smaller if smaller else np.nan,
            expected_jaccard=float(anywhere @ jaccards) if union else np.nan,
            p_value=float(anywhere[common:].sum()),
            layer_expected_jaccard=expected,
            layer_p_value=float(by_layer[common:].sum()),
            beyond_chance=jaccard - expected,
            beyond_low=jaccard - float(high),
            beyond_high=jaccard - float(low),
        )


def _chance(sizes: Int[np.ndarray, "3 layer"]) -> Float[np.ndarray, "size"]:
    """Probability of every intersection size from 0 to the smaller set's; rows: neurons, |A|, |B| in each layer."""
    whole = np.ones(1)
    for total, size_a, size_b in sizes.T.tolist():
        if not total:  # all of the layer is excluded; SciPy has no distribution for it
            continue
        hits = np.arange(min(size_a, size_b) + 1)
        whole = np.convolve(whole, stats.hypergeom(total, size_a, size_b).pmf(hits))
    padded = np.zeros(int(min(sizes[1].sum(), sizes[2].sum())) + 1)
    padded[: len(whole)] = whole
    return padded


def _central_hits(probabilities: Float[np.ndarray, "size"], level: float) -> Float[np.ndarray, "2"]:
    """The ends of the central `level` of a count, interpolated between the steps of its mid-distribution function."""
    middle = np.cumsum(probabilities) - probabilities / 2
    steps = np.flatnonzero(probabilities > 0)
    ends: Float[np.ndarray, "2"] = np.interp([(1 - level) / 2, (1 + level) / 2], middle[steps], steps)
    return ends


def jaccard_intervals(
    scores: Mapping[str, NeuronScores],
    *,
    fraction: float,
    rank_by: str = "magnitude",
    rank_within: str = "model",
    cut_rule: str = "exact",
    base: NeuronScores | None = None,
    level: float = 0.95,
    n_resamples: int = 500,
    seed: int = 0,
) -> dict[tuple[str, str], tuple[float, float]]:
    """Intervals over prompts for the Jaccard index of every pair of top sets. No model pass.

    Blocks of prompts are resampled, and the neurons of all models are ranked again in every resample. Resampling adds
    noise, which lowers the overlap, so the resamples are shifted to have the observed value as their mean; ends are
    clipped to [0, 1]. If `base` is given, its top set, resampled as well, is removed from both sets. Ends are NaN if
    all prompts of a model are in one block, because nothing is then known about other prompts.

    Examples:
        >>> harmless = NeuronAttribution(head, "gradient_x_activation").score(pairs["harmless"])
        >>> intervals = jaccard_intervals({"helpful": scores, "harmless": harmless}, fraction=0.125)
        >>> [round(end, 2) for end in intervals["helpful", "harmless"]]
        [0.5, 0.5]
    """
    check_level(level)
    named = dict(scores) | ({} if base is None else {_BASE: base})
    first, *others = named.values()
    for other in others:
        first.provenance.require_same(other.provenance, ("architecture", "site"), what="jaccard_intervals")
    if any(each.without_block is not None and bool(each.without_block.isnan().any()) for each in named.values()):
        return dict.fromkeys(combinations(scores, 2), (math.nan, math.nan))
    counts = np.random.default_rng(seed).multinomial(N_BLOCKS, np.full(N_BLOCKS, 1 / N_BLOCKS), size=n_resamples)
    # Row 0 is the observed data, with every block once.
    draws = torch.from_numpy(np.vstack([np.ones((1, N_BLOCKS)), counts])).double()
    jaccards: dict[tuple[str, str], list[Tensor]] = {pair: [] for pair in combinations(scores, 2)}
    is_defined = dict.fromkeys(jaccards, True)
    n_neurons = next(iter(scores.values())).values.numel()
    for part in torch.split(draws, max(1, _RESAMPLED_AT_A_TIME // n_neurons)):
        tops = {
            name: resampled_tops(each, part, fraction, rank_by, rank_within, cut_rule) for name, each in named.items()
        }
        for (a, b), values in jaccards.items():
            top_a, top_b = tops[a], tops[b]
            if base is not None:
                top_a, top_b = top_a & ~tops[_BASE], top_b & ~tops[_BASE]
            # The Jaccard index of an empty union is undefined; 0 / 1 keeps the quantiles defined.
            union = (top_a | top_b).sum(1)
            values.append((top_a & top_b).sum(1).double() / union.clamp(min=1))
            is_defined[a, b] &= len(values) > 1 or bool(union[0])
    intervals = {}
    for pair, values in jaccards.items():
        if not is_defined[pair]:
            intervals[pair] = (math.nan, math.nan)
            continue
        observed, resamples = float(torch.cat(values)[0]), torch.cat(values)[1:].numpy()
        low, high = percentile_interval(resamples - resamples.mean() + observed, level)
        intervals[pair] = (max(0.0, low), min(1.0, high))
    return intervals


def resampled_tops(
    scores: NeuronScores,
    counts: Float[Tensor, "resample block"],
    fraction: float,
    rank_by: str,
    rank_within: str,
    cut_rule: str,
) -> Bool[Tensor, "resample index"]:
    """The top set in every resample; ties are broken by (layer, neuron), without a warning."""
    values = ranked(scores.resampled(counts), rank_by, scores.provenance)
    values = values if rank_within == "layer" else values.flatten(1)
    if cut_rule == "percentile":
        cuts = np.percentile(values.numpy(), 100 * (1 - fraction), axis=-1, keepdims=True)
        return (values >= torch.from_numpy(cuts)).flatten(1)
    size = top_size(fraction, values.shape[-1])
    mask = torch.zeros(values.shape, dtype=torch.bool)
    order = torch.argsort(values, dim=-1, descending=True, stable=True)[..., :size]
    return mask.scatter_(-1, order, torch.ones(order.shape, dtype=torch.bool)).flatten(1)


def depth_thirds(neurons: NeuronSet) -> dict[str, float]:
    """The shares of the set in the early, middle and late third of the model's layers (NaN for an empty set).

    Layer l of L layers belongs to third floor(3 l / L).

    Examples:
        >>> depth_thirds(neurons)
        {'early': 0.5, 'middle': 0.5, 'late': 0.0}
    """
    layers = neurons.mask.shape[0]
    counts = dict.fromkeys(_THIRDS, 0)
    for layer, n in enumerate(neurons.n_per_layer):
        counts[_THIRDS[3 * layer // layers]] += n
    return {third: n / len(neurons) if len(neurons) else np.nan for third, n in counts.items()}
