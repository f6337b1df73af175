"""Check that an argument is a replacement, and that its activations are of the same model and site."""

from torch import Tensor

from rmtension.errors import OptionError, ProvenanceError
from rmtension.interventions._replacement import Replacement
from rmtension.interventions._replacements import Scale
from rmtension.models._reward_model import RewardModel
from rmtension.passes._activation_sample import ActivationSample
from rmtension.passes._activation_statistics import ActivationStatistics

# What is often passed instead of a replacement, and the replacement to suggest.
_MEANT = {
    "zero": "Zero()",
    "mean": "Mean(statistics)",
    "median": "Median(sample)",
    "optimal": "Optimal.fit(head, pairs, neurons, Mean(statistics))",
    "resample": "Resample(sample)",
    "scale": "Scale(alpha)",
    "other": "OtherResponse()",
    "other_response": "OtherResponse()",
}


def check_replacement(replacement: object, head: RewardModel, site: str) -> None:
    """Raise `OptionError` for what is not a replacement, `ProvenanceError` for activations of another model or site."""
    if not isinstance(replacement, Replacement):
        got = repr(replacement) if isinstance(replacement, str | type) else type(replacement).__name__
        raise OptionError(
            f"replacement: expected a replacement such as Zero(), got {got:.80}. Write {_meant(replacement)}."
        )
    if isinstance(replacement, Scale) and isinstance(replacement.alpha, Tensor):
        _check_factors(replacement.alpha, head, site)
    if (source := replacement.source) is None:
        return
    # Activations do not depend on the output: those of one output replace those of another.
    is_same = source.model == head.fingerprint if source.body is None else source.body == head.body_fingerprint
    if not is_same:
        raise ProvenanceError(
            f"replacement: its activations are those of model {source.model}, expected those of the ablated model "
            f"{head.fingerprint}. Collect them with ActivationCollector(head)."
        )
    if source.site != site:
        raise ProvenanceError(
            f"replacement: its activations are those of site {source.site!r}, the neurons are of {site!r}. Collect "
            f"them with ActivationCollector(head, site={site!r})."
        )


def _check_factors(alpha: Tensor, head: RewardModel, site: str) -> None:
    shape = (head.n_layers, head.n_neurons(site))
    if head.n_channels(site) != shape[1]:
        raise OptionError(f"alpha: a neuron of site {site!r} has several channels. Use one number, such as Scale(0.5).")
    if tuple(alpha.shape) != shape:
        raise OptionError(
            f"alpha: expected a number, or one factor per neuron of site {site!r}, of shape {shape}, got "
            f"{tuple(alpha.shape)}."
        )


def _meant(given: object) -> str:
    if isinstance(given, ActivationStatistics):
        return _MEANT["mean"]
    if isinstance(given, ActivationSample):
        return _MEANT["resample"]
    # A name, or a class that was passed without being called.
    return _MEANT.get(str(getattr(given, "name", given)), "Zero(), Mean(statistics), Resample(sample) or Scale(alpha)")
