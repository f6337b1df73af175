"""Neurons that are huge at a few tokens and near 0 at all others, which a mean misrepresents."""

import warnings

import torch

from rmtension.errors import RMTensionWarning
from rmtension.passes._activation_statistics import ActivationStatistics

# Neurons that a mean misrepresents: it is more than this many times the root mean square of the median active neuron,
# and comes from less than this share of the tokens.
_SPIKE_SIZES, _SPIKE_SHARE = 30, 0.05


def warn_of_spikes(statistics: ActivationStatistics) -> None:
    """Warn of neurons whose mean is made by a few tokens and is far above what activations are."""
    mean, rms = statistics.mean.double(), statistics.rms.double()
    if statistics.channel_mean.shape != mean.shape:
        return  # the norms of attention heads are not what is written
    # An activation that is the same at a share of the tokens, and 0 at the others, has this share as (mean / rms)^2.
    active = rms[rms > 0]
    if not len(active):
        return
    typical = active.median()
    spikes = (mean.abs() > _SPIKE_SIZES * typical) & (mean.square() < _SPIKE_SHARE * rms.square())
    if spikes.any():
        first = int(torch.where(spikes, mean.abs(), -1.0).argmax())
        layer, neuron = divmod(first, mean.shape[1])
        warnings.warn(
            f"Mean: {int(spikes.sum())} of {mean.numel()} neurons are huge at a few tokens and near 0 at all others, "
            f"such as L{layer} N{neuron} (mean {mean[layer, neuron]:.3g}, root mean square {rms[layer, neuron]:.3g}; "
            f"the median neuron's is {typical:.3g}). Replacing them by their means adds a large constant at "
            "almost all tokens. If they are in your set, use Median(sample) or Zero().",
            RMTensionWarning,
            stacklevel=4,
        )
