"""The replacements: what activations of neurons are replaced by, in ablation, attribution and export."""

import math
from abc import abstractmethod
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar

import numpy as np
import torch
from einops import rearrange, repeat
from jaxtyping import Bool, Float
from torch import Tensor

from rmtension.data._tokens import TokenBatch
from rmtension.errors import OptionError
from rmtension.interventions._donors import draw_donors
from rmtension.interventions._replacement import Columns, Replacement, SingleTextReplacement
from rmtension.interventions._spikes import warn_of_spikes
from rmtension.neurons._neuron_set import check_seed
from rmtension.passes._activation_sample import ActivationSample
from rmtension.passes._activation_statistics import ActivationStatistics
from rmtension.store._provenance import Provenance, digest_of


@dataclass(frozen=True)
class Zero(SingleTextReplacement):
    """Replace activations by 0: a_ref(t) = 0.

    Examples:
        >>> with AblationContext(head, neurons, Zero()):  # the default: AblationContext(head, neurons)
        ...     inside = head.score_pairs(pairs["helpful"]).margin.mean()
        >>> bool(inside < scored.margin.mean())
        True
    """

    name: ClassVar[str] = "zero"

    def factor(self, layer: int, columns: Columns) -> float:
        """0, because no part of the activation remains."""
        return 0.0

    def values(
        self, layer: int, columns: Columns, activation: Float[Tensor, "*token channel"], batch: TokenBatch | None
    ) -> Float[Tensor, "*token channel"]:
        """Zeros."""
        return torch.zeros_like(activation)


class Constant(SingleTextReplacement):
    """Replace activations by one constant per channel and layer, whatever the text."""

    @abstractmethod
    def constant(self, layer: int) -> Float[Tensor, "channel"]:
        """The constant of every channel of a layer, in float64."""

    def factor(self, layer: int, columns: Columns) -> float:
        """0, because no part of the activation remains."""
        return 0.0

    def values(
        self, layer: int, columns: Columns, activation: Float[Tensor, "*token channel"], batch: TokenBatch | None
    ) -> Float[Tensor, "*token channel"]:
        """The same constants at every token."""
        return self.constant(layer).to(activation)[columns].expand_as(activation)


@dataclass(frozen=True)
class Mean(Constant):
    """Replace activations by means: a_ref(t) is the mean of each channel in `statistics`.

    The statistics must be collected from the same model at the same site. If a neuron is huge at a few tokens, such as
    the first of a text, and near 0 at all others, its mean is a value that it has at no token. Replacing the neuron by
    it adds a constant at almost all tokens, which can cost the whole margin (`docs/replication.md`). For such neurons
    there is an `RMTensionWarning`; replace them by `Median(sample)` or `Zero()`.

    Examples:
        >>> with AblationContext(head, neurons, Mean(means)):
        ...     inside = head.score_pairs(pairs["helpful"]).margin.mean()
        >>> bool(inside < scored.margin.mean())
        True
    """

    statistics: ActivationStatistics
    name: ClassVar[str] = "mean"

    def __post_init__(self) -> None:
        _require_collected("Mean", "statistics", self.statistics, ActivationStatistics, "collect(pairs)")
        warn_of_spikes(self.statistics)

    @property
    def key(self) -> str:
        """The name and a digest of the means."""
        return f"{self.name} {self.statistics.digest}"

    @property
    def source(self) -> Provenance:
        """The provenance of the statistics."""
        return self.statistics.provenance

    def constant(self, layer: int) -> Float[Tensor, "channel"]:
        """The mean of every channel of a layer, in float64."""
        return self.statistics.channel_mean[layer]


@dataclass(frozen=True)
class Median(Constant):
    """Replace activations by medians: a_ref(t) is the median of each channel over the tokens of `sample`.

    A median is one of the sampled activations, the lower of two in the middle. Unlike a mean it is not moved by a few
    tokens with huge activations, such as the first token of a text.

    Examples:
        >>> sample = ActivationCollector(head).sample(pairs["helpful"], n=64)
        >>> with AblationContext(head, neurons, Median(sample)):
        ...     inside = head.score_pairs(pairs["helpful"]).margin.mean()
        >>> bool(inside < scored.margin.mean())
        True
    """

    sample: ActivationSample
    name: ClassVar[str] = "median"

    def __post_init__(self) -> None:
        _require_collected("Median", "sample", self.sample, ActivationSample, "sample(pairs)")

    @property
    def key(self) -> str:
        """The name and a digest of the sample."""
        return f"{self.name} {self.sample.digest}"

    @property
    def source(self) -> Provenance:
        """The provenance of the sample."""
        return self.sample.provenance

    def constant(self, layer: int) -> Float[Tensor, "channel"]:
        """The median of every channel of a layer, in float64."""
        return self._medians[layer]

    @cached_property
    def _medians(self) -> Float[Tensor, "layer channel"]:
        return self.sample.values.double().median(dim=0).values


@dataclass(frozen=True)
class Resample(SingleTextReplacement):
    """Replace activations by those of other prompts: a_ref(t) is the activation at a token drawn from `sample`.

    The donor of a token is drawn by a hash of (seed, prompt, position in the text). So all layers get the same donor,
    texts of the same prompt get the same donors at equal positions, and the batch makes no difference.

    Examples:
        >>> donors = ActivationCollector(head).sample(pairs["harmless"], n=16, seed=0)
        >>> with AblationContext(head, neurons, Resample(donors, seed=1)):
        ...     head.score_pairs(pairs["helpful"])
        PairRewards(n=24, accuracy=1.000, ties=0)
    """

    sample: ActivationSample
    seed: int = 0
    name: ClassVar[str] = "resample"

    def __post_init__(self) -> None:
        _require_collected("Resample", "sample", self.sample, ActivationSample, "sample(pairs)")
        check_seed(self.seed)

    @property
    def key(self) -> str:
        """The name, the seed and a digest of the donors."""
        return f"{self.name} {self.seed} {self.sample.digest}"

    @property
    def source(self) -> Provenance:
        """The provenance of the sample."""
        return self.sample.provenance

    def values(
        self, layer: int, columns: Columns, activation: Float[Tensor, "*token channel"], batch: TokenBatch | None
    ) -> Float[Tensor, "*token channel"]:
        """The activation of each token's donor."""
        assert batch is not None
        donors = draw_donors(batch, self.sample.keys, self.seed).reshape(activation.shape[:-1])
        return self.sample.values[donors.cpu(), layer].to(activation)[..., columns]


@dataclass(frozen=True, eq=False)
class Scale(SingleTextReplacement):
    """Multiply activations by a factor: a_ref(t) = alpha a(t).

    `alpha` is a number, or one factor for every neuron of the site, Float[layer neuron], of which those of the ablated
    set are used.

    Examples:
        >>> halved = head.with_ablation(neurons, Scale(0.5))
        >>> bool(halved.score_pairs(pairs["helpful"]).margin.mean() < scored.margin.mean())
        True
        >>> gains = torch.ones(head.n_layers, head.n_neurons("mlp"))
        >>> same = head.with_ablation(neurons, Scale(gains)).score_pairs(pairs["helpful"])
        >>> bool((same.margin == scored.margin).all())
        True
    """

    alpha: float | Float[Tensor, "layer neuron"]
    name: ClassVar[str] = "scale"

    def __post_init__(self) -> None:
        given: object = self.alpha
        if isinstance(given, Tensor) and given.ndim:
            wrong = None
            if given.ndim != 2:
                wrong = f"a tensor of shape {tuple(given.shape)}"
            elif not given.is_floating_point():
                wrong = f"{given.dtype}; call .float() on it"
            elif not bool(given.isfinite().all()):
                wrong = "values that are not finite"
            if wrong is not None:
                raise OptionError(
                    f"alpha: expected a finite number, or finite factors of shape [layer, neuron], got {wrong}."
                )
            # A copy, because the caller may change the tensor.
            object.__setattr__(self, "alpha", given.detach().cpu().clone())
            return
        if (
            not isinstance(given, int | float | np.integer | np.floating)
            or isinstance(given, bool)
            or not math.isfinite(given)
        ):
            raise OptionError(f"alpha: expected a finite number such as Scale(0.5), got {self.alpha!r:.80}.")
        object.__setattr__(self, "alpha", float(given))

    def __repr__(self) -> str:
        given = self.alpha
        return f"Scale({given!r})" if isinstance(given, float) else f"Scale(factors of {given.numel()} neurons)"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Scale) and self.key == other.key

    def __hash__(self) -> int:
        return hash(self.key)

    @property
    def label(self) -> str:
        """The name and the factor: "scale 0.5", or "scale by neuron"."""
        return f"{self.name} {'by neuron' if isinstance(self.alpha, Tensor) else repr(self.alpha)}"

    @property
    def key(self) -> str:
        """The label, and for factors of neurons a digest of them."""
        return f"{self.label} {digest_of(self.alpha)}" if isinstance(self.alpha, Tensor) else self.label

    def factor(self, layer: int, columns: Columns) -> float | Float[Tensor, "channel"]:
        """The alpha of a_ref(t) = alpha a(t), of some channels."""
        if not isinstance(self.alpha, Tensor):
            return self.alpha
        return self.alpha[layer][columns.cpu() if isinstance(columns, Tensor) else columns]

    def values(
        self, layer: int, columns: Columns, activation: Float[Tensor, "*token channel"], batch: TokenBatch | None
    ) -> Float[Tensor, "*token channel"]:
        """The activation times alpha."""
        factor = self.factor(layer, columns)
        return activation * (factor.to(activation) if isinstance(factor, Tensor) else factor)

    def step(
        self,
        layer: int,
        activation: Float[Tensor, "row token channel"],
        select: Bool[Tensor, "row token"],
        batch: TokenBatch,
    ) -> Float[Tensor, "row token channel"]:
        """(alpha - 1) a(t), which is accurate also if alpha is near 1."""
        change = self.factor(layer, slice(None)) - 1
        moved = activation * (change.to(activation) if isinstance(change, Tensor) else change)
        return moved * select.to(activation)[..., None]


@dataclass(frozen=True)
class OtherResponse(Replacement):
    """Replace activations by those of the other response: a_ref(t) is their mean over its selected tokens.

    `NeuronAttribution` and `single_neuron_effects` accept it. `AblationContext` does not, because the activations of
    the other response are unknown while a text runs.

    Examples:
        >>> patching = NeuronAttribution(head, "attribution_patching", replacement=OtherResponse())
        >>> patching.score(pairs["helpful"]).provenance.replacement
        'other_response'
    """

    name: ClassVar[str] = "other_response"
    shares_tokens: ClassVar[bool] = False

    def step(
        self,
        layer: int,
        activation: Float[Tensor, "row token channel"],
        select: Bool[Tensor, "row token"],
        batch: TokenBatch,
    ) -> Float[Tensor, "row token channel"]:
        """The step to the mean of the other text, in a batch of pairs with one text per row."""
        weights = select.to(activation)
        share = weights / weights.sum(dim=1, keepdim=True)
        means = torch.einsum("xt,xtc->xc", share, activation)
        # The first half of a batch of pairs are the chosen texts, the second the rejected ones.
        other = rearrange(means, "(side pair) channel -> side pair channel", side=2).flip(0)
        target = repeat(other, "side pair channel -> (side pair) token channel", token=activation.shape[1])
        return (target - activation) * weights[..., None]


def _require_collected(owner: str, name: str, given: object, wanted: type, call: str) -> None:
    """Raise `OptionError` unless the argument of a replacement is a result of `ActivationCollector`."""
    if not isinstance(given, wanted):
        raise OptionError(
            f"{name}: {owner} expected {wanted.__name__}, got {type(given).__name__}. Use "
            f"ActivationCollector(head, site=...).{call}."
        )
