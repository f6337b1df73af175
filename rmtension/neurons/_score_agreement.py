"""How well two scores of the same neurons agree, with intervals over the prompts that they were computed on."""

from collections.abc import Iterator

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from scipy import stats
from torch import Tensor

from rmtension.evaluation._intervals import percentile_interval
from rmtension.neurons._neuron_scores import N_BLOCKS, NeuronScores, top_size
from rmtension.neurons._signs import effect_sign

MEASURES = ("spearman", "sign_agreement", "top_precision", "slope")
_N_RESAMPLES = 500
_RESAMPLED_AT_A_TIME = 4_000_000


def agreement(
    scores: NeuronScores,
    true_effects: NeuronScores,
    measured: Bool[Tensor, "layer neuron"],
    top: float,
    level: float,
    seed: int,
) -> dict[str, float]:
    """Each of `MEASURES` between predicted and true effects of the measured neurons, with the ends of its interval.

    Intervals describe the variation over other prompts of the same number: they weight blocks of prompts at random,
    and resample neurons within layers if not all are measured. This adds noise, which lowers agreement, so the draws
    are shifted to have the observed value as their mean; the noise of the data itself also lowers agreement and is not
    corrected.
    """
    signed = scores.provenance.sign is not None
    sign = effect_sign(scores.provenance)
    predicted, effects = (values[measured][None].numpy() for values in (scores.as_effects(), true_effects.values))
    observed = _measures(predicted, effects, top, signed)
    parts: dict[str, list[Float[np.ndarray, "resample"]]] = {name: [] for name in MEASURES}
    known = True
    for predicted, effects in _resamples(scores, true_effects, measured, seed):
        # If all prompts are in one block, nothing is known about other prompts.
        known &= bool(np.isfinite(predicted).all() and np.isfinite(effects).all())
        for name, values in _measures(sign * predicted, effects, top, signed).items():
            parts[name].append(values)
    results: dict[str, float] = {}
    for name, value in observed.items():
        resamples = np.concatenate(parts[name]) if known else np.full(1, np.nan)
        low, high = percentile_interval(resamples - resamples.mean() + value[0], level)
        least, most = {"spearman": (-1.0, 1.0), "slope": (-np.inf, np.inf)}.get(name, (0.0, 1.0))
        # For few neurons a share is discrete, and all shifted draws may lie on one side of the observed value.
        low, high = min(low, float(value[0])), max(high, float(value[0]))
        results |= {name: float(value[0]), f"{name}_low": max(low, least), f"{name}_high": min(high, most)}
    return results


def _resamples(
    scores: NeuronScores, true_effects: NeuronScores, measured: Bool[Tensor, "layer neuron"], seed: int
) -> Iterator[tuple[Float[np.ndarray, "resample index"], Float[np.ndarray, "resample index"]]]:
    """Scores and true effects of the measured neurons on resamples of the prompts; yields some resamples at a time."""
    generator = np.random.default_rng(seed)
    drawn = generator.normal(size=(2, _N_RESAMPLES, N_BLOCKS))
    drawn -= drawn.mean(axis=2, keepdims=True)
    # All weights have the same distance from equal weights, the average distance of bootstrap weights. Noise lowers
    # agreement quadratically, so weights with varying distances would add variation that other prompts do not have.
    weights = 1 + drawn * (N_BLOCKS**0.5 / np.linalg.norm(drawn, axis=2, keepdims=True))
    # If both were computed on the same prompts, they vary together.
    together = scores.provenance.data == true_effects.provenance.data
    blocks = [torch.from_numpy(weights[number]) for number in (0, 0 if together else 1)]
    layers = measured.nonzero()[:, 0].numpy()
    for rows in torch.split(torch.arange(_N_RESAMPLES), max(1, _RESAMPLED_AT_A_TIME // measured.numel())):
        values = [
            each.resampled(counts[rows])[:, measured].numpy()
            for each, counts in zip((scores, true_effects), blocks, strict=True)
        ]
        if not measured.all():
            indices = _indices_within(layers, len(rows), generator)
            values = [np.take_along_axis(each, indices, axis=1) for each in values]
        yield values[0], values[1]


def _indices_within(
    layers: Int[np.ndarray, "index"], n: int, generator: np.random.Generator
) -> Int[np.ndarray, "resample drawn"]:
    """`n` resamples of indices within layers, one index fewer than each layer has; `layers` ascends.

    One fewer, because that number of draws has the variance of the sample (McCarthy and Snowden 1985). If a layer has
    a single neuron, whose spread is unknown, all layers are treated as one.
    """
    _, starts, sizes = np.unique(layers, return_index=True, return_counts=True)
    if sizes.min() < 2:
        starts, sizes = np.array([0]), np.array([len(layers)])
    stratum = np.repeat(np.arange(len(sizes)), sizes - 1)
    return starts[stratum] + (generator.random((n, len(stratum))) * sizes[stratum]).astype(np.int64)


def _measures(
    predicted: Float[np.ndarray, "resample index"],
    effects: Float[np.ndarray, "resample index"],
    top: float,
    signed: bool,
) -> dict[str, Float[np.ndarray, "resample"]]:
    """Each of `MEASURES` in every row."""
    if not signed:
        effects = np.abs(effects)
    size = top_size(top, effects.shape[1])
    tops = [np.argsort(-np.abs(each), axis=1, kind="stable")[:, :size] for each in (predicted, effects)]
    both = np.zeros(effects.shape, dtype=np.int64)
    for each in tops:
        np.put_along_axis(both, each, np.take_along_axis(both, each, axis=1) + 1, axis=1)
    moves = (predicted != 0) & (effects != 0)
    same = ((predicted > 0) == (effects > 0)) & moves
    with np.errstate(divide="ignore", invalid="ignore"):
        return {
            "spearman": _correlation(stats.rankdata(predicted, axis=1), stats.rankdata(effects, axis=1)),
            "sign_agreement": same.sum(1) / moves.sum(1) if signed else np.full(len(effects), np.nan),
            "top_precision": (both == 2).sum(1) / size,
            "slope": _covariance(predicted, effects) / _covariance(predicted, predicted),
        }


def _covariance(
    a: Float[np.ndarray, "resample index"], b: Float[np.ndarray, "resample index"]
) -> Float[np.ndarray, "resample"]:
    covariance: Float[np.ndarray, "resample"] = (
        (a - a.mean(axis=1, keepdims=True)) * (b - b.mean(axis=1, keepdims=True))
    ).mean(axis=1)
    return covariance


def _correlation(
    a: Float[np.ndarray, "resample index"], b: Float[np.ndarray, "resample index"]
) -> Float[np.ndarray, "resample"]:
    correlation: Float[np.ndarray, "resample"] = _covariance(a, b) / np.sqrt(_covariance(a, a) * _covariance(b, b))
    return correlation
