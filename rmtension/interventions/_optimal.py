"""The constants that change the margins least: the strongest replacement by constants."""

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from rmtension._arguments import require_arguments
from rmtension._progress import progress_bar
from rmtension.bodies._run_modes import frozen
from rmtension.data._packing import prompt_batches
from rmtension.data._pairs import PreferencePairs
from rmtension.data._tokens import TokenBatch, margins
from rmtension.errors import DataError, OptionError
from rmtension.interventions._ablation import AblationContext
from rmtension.interventions._check_replacement import check_replacement
from rmtension.interventions._replacement import Columns
from rmtension.interventions._replacements import Constant, Mean
from rmtension.interventions._sweep import score_without
from rmtension.models._reward_model import RewardModel
from rmtension.neurons._neuron_set import NeuronSet
from rmtension.store._provenance import Provenance, digest_of
from rmtension.store._storage import read_result, write_result

_PAIRS_PER_STEP = 8
# The learning rate of Adam, in root mean squares of each activation; it falls to 0 along a half cosine.
_RATE = 0.1


@dataclass(frozen=True, eq=False, repr=False)
class Optimal(Constant):
    """Replace activations by the constants that change the margins least: optimal ablation of one set of neurons.

    `Optimal.fit` finds them. With zero or the mean, an ablated set can cost more than its information, because no text
    has such activations; the best constants leave only the cost that no constant avoids (Li and Janson 2024,
    arXiv 2409.09951). Outside of `neurons` the constants are means.

    `loss` is the mean squared change of the margin on the fitted pairs, and `loss_of_mean` that of the means at which
    the fit began; `loss` is never larger.

    Examples:
        >>> optimal = Optimal.fit(head, pairs["helpful"], neurons, Mean(means), steps=20)
        >>> bool(optimal.loss < optimal.loss_of_mean)
        True
        >>> with AblationContext(head, neurons, optimal):
        ...     head.score_pairs(pairs["helpful"]).accuracy() >= 0.5
        True
    """

    constants: Float[Tensor, "layer channel"]
    neurons: NeuronSet
    loss: float
    loss_of_mean: float
    provenance: Provenance
    name: ClassVar[str] = "optimal"

    @classmethod
    def fit(
        cls,
        head: RewardModel,
        pairs: PreferencePairs,
        neurons: NeuronSet,
        start: Mean,
        *,
        steps: int = 200,
        seed: int = 0,
        progress: bool | None = None,
    ) -> "Optimal":
        """Find the constants of all neurons of a set together, by gradient descent from their means.

        Every step runs 8 pairs forward and backward: `steps` = 200 costs as much as 1,600 pairs do. Three passes over
        all pairs compare the losses before and after. The result is for ablation at all tokens.

        Raises `ProvenanceError` for a set or means of another model, `DataError` without pairs, and `OptionError` for
        other arguments and a model that skips pairs (`on_nonfinite="skip"`).

        Examples:
            >>> Optimal.fit(head, pairs["helpful"], neurons, Mean(means), steps=5)
            Optimal(2 of 48 mlp neurons of gpt2-2x24-heads2x12-d24)
        """
        require_arguments(
            "Optimal.fit(head, pairs, neurons, start)", head=(head, RewardModel), pairs=(pairs, PreferencePairs),
            neurons=(neurons, NeuronSet), start=(start, Mean),
        )  # fmt: skip
        head.require_all_pairs()
        check_replacement(start, head, neurons.site)
        if type(steps) is not int or steps < 1:
            raise OptionError(f"steps: expected a whole number from 1, got {steps!r}.")
        if not len(pairs):
            raise DataError("pairs: expected at least one preference pair, got none.")
        if not len(neurons):
            raise OptionError("neurons: expected at least one neuron, got an empty set.")
        wanted = _margins(head, pairs, neurons)
        tried = _Tried(start)
        with torch.inference_mode(False), AblationContext(head, neurons, tried):
            before = _loss(head, pairs, neurons, wanted)
            _descend(head, pairs, wanted, tried, steps, seed, progress)
            after = _loss(head, pairs, neurons, wanted)
        constants = tried.all_constants().detach() if after < before else start.statistics.channel_mean
        provenance = head.provenance(
            pairs.digest, len(pairs), start.source.n_tokens, site=neurons.site, positions="all", method=cls.name
        )
        return cls(constants.double().cpu(), neurons, min(before, after), before, provenance)

    @property
    def key(self) -> str:
        """The name and a digest of the constants."""
        return f"{self.name} {digest_of(self.constants)}"

    @property
    def source(self) -> Provenance:
        """Where the constants were fitted."""
        return self.provenance

    def constant(self, layer: int) -> Float[Tensor, "channel"]:
        """The constant of every channel of a layer, in float64."""
        return self.constants[layer]

    def __repr__(self) -> str:
        return f"Optimal{repr(self.neurons).removeprefix('NeuronSet')}"

    def save(self, path: str | Path) -> None:
        """Write the constants and the set to one safetensors file."""
        values = {
            "neurons": self.neurons.to_dict(),
            "loss": self.loss,
            "loss_of_mean": self.loss_of_mean,
            "provenance": self.provenance.to_dict(),
        }
        write_result(path, "Optimal", {"constants": self.constants}, values)

    @classmethod
    def load(cls, path: str | Path) -> "Optimal":
        """Read what `save` wrote."""
        expected = {"neurons": dict, "loss": float, "loss_of_mean": float, "provenance": dict}
        tensors, values = read_result(path, "Optimal", tensors={"constants": "float layer channel"}, values=expected)
        neurons, provenance = NeuronSet.from_dict(values["neurons"]), Provenance.from_dict(values["provenance"])
        return cls(tensors["constants"], neurons, values["loss"], values["loss_of_mean"], provenance)


class _Tried(Constant):
    """Constants that move: the means plus, in root mean squares of each activation, `moves`."""

    name: ClassVar[str] = "tried"

    def __init__(self, start: Mean) -> None:
        statistics = start.statistics
        n_layers, n_channels = statistics.channel_mean.shape
        per_neuron = n_channels // statistics.rms.shape[1]
        # A neuron's activation is the norm of its channels.
        sizes = statistics.rms.double().repeat_interleave(per_neuron, dim=1) / per_neuron**0.5
        self._start, self._source = statistics.channel_mean.double(), start.source
        self._sizes = sizes.clamp(min=1e-6 * float(sizes.max()))
        self.moves = torch.zeros(n_layers, n_channels, dtype=torch.float64, requires_grad=True)

    @property
    def source(self) -> Provenance:
        """Where the means come from."""
        return self._source

    def constant(self, layer: int) -> Float[Tensor, "channel"]:
        """The constants of a layer, with the gradient of `moves`."""
        return self.all_constants()[layer]

    def all_constants(self) -> Float[Tensor, "layer channel"]:
        """The constants of all layers."""
        constants: Tensor = self._start + self._sizes * self.moves
        return constants

    def values(
        self, layer: int, columns: Columns, activation: Float[Tensor, "*token channel"], batch: TokenBatch | None
    ) -> Float[Tensor, "*token channel"]:
        """The constants at every token."""
        chosen = columns.cpu() if isinstance(columns, Tensor) else columns
        return self.constant(layer)[chosen].to(activation).expand_as(activation)


def _descend(
    head: RewardModel,
    pairs: PreferencePairs,
    wanted: Float[Tensor, "pair"],
    tried: _Tried,
    steps: int,
    seed: int,
    progress: bool | None,
) -> None:
    """`steps` steps of Adam on the squared change of the margins."""
    optimizer = torch.optim.Adam([tried.moves], lr=_RATE, betas=(0.9, 0.95))
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    encoded = head.encode(pairs)
    queue: list[TokenBatch] = []
    with progress_bar(progress=progress, total=steps, desc="optimal constants", unit="step") as bar:
        for step in range(steps):
            if not queue:
                queue = prompt_batches(
                    encoded, pairs_per_batch=_PAIRS_PER_STEP, read_at=head.read_at, pack_up_to=head.body.pack_up_to,
                    seed=seed + step,
                )  # fmt: skip
            batch = queue.pop().to(head.device)
            targets = wanted[list(batch.indices[: batch.n_pairs])]
            with torch.enable_grad(), frozen(head.body.modules()):
                changed = margins(head.forward(batch)).double().cpu() - targets
                (tried.moves.grad,) = torch.autograd.grad(changed.square().mean(), [tried.moves])
            optimizer.step()
            schedule.step()
            bar.update()


def _loss(head: RewardModel, pairs: PreferencePairs, neurons: NeuronSet, wanted: Float[Tensor, "pair"]) -> float:
    return float((_margins(head, pairs, neurons) - wanted).square().mean())


def _margins(head: RewardModel, pairs: PreferencePairs, neurons: NeuronSet) -> Float[Tensor, "pair"]:
    """The margins as the model is now, hooks included."""
    (rewards,) = score_without(head, pairs, [neurons - neurons], progress=False)
    return rewards.margin.double()
