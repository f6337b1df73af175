"""How each attribution method scores neurons in one batch: a value per token, weighted and summed over the text."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from einops import einsum, reduce
from jaxtyping import Float
from torch import Tensor

from rmtension.batch_run import BatchRun
from rmtension.errors import ModelError
from rmtension.replacing import Reference, step_to
from rmtension.sites import neuron_activations
from rmtension.tokens import margins


@dataclass(frozen=True)
class Asked:
    """What a method is asked for: where, at which tokens, and its options."""

    site: str
    positions: str
    reference: Reference = "zero"
    steps: int = 32


# The value of every token and neuron of one layer, and the weight of every token: a pair's score is their product
# summed over the tokens of its rows. Rejected texts have their minus sign in one of the two.
ByToken = tuple[Float[Tensor, "row token neuron"], Float[Tensor, "row token"]]


# The same, and for methods that have one how far each pair's scores are from adding up (the completeness gap).
Found = tuple[ByToken, Float[Tensor, "pair"] | None]


def mean_activation(run: BatchRun, asked: Asked, layer: int) -> Found:
    """a(t), each token weighted by one over the number of selected ones of its text."""
    # Half precision would lose the sum, not only its last digits.
    activation = run.activations[asked.site, layer].to(run.head.reward_dtype)
    values = neuron_activations(activation, asked.site, run.head.n_neurons(asked.site))
    select = run.batch.select(asked.positions).to(values)
    return (values, run.batch.by_token(_signed(select / select.sum(dim=1, keepdim=True)))), None


def gradient_x_activation(run: BatchRun, asked: Asked, layer: int) -> Found:
    """a(t) dM/da(t)."""
    place = asked.site, layer
    products = run.activations[place].to(run.head.reward_dtype) * run.gradients[place]
    return _neurons(run, asked, products), None


def attribution_patching(run: BatchRun, asked: Asked, layer: int) -> Found:
    """(a_ref(t) - a(t)) dM/da(t)."""
    place = asked.site, layer
    return _neurons(run, asked, _step(run, asked, layer, run.activations[place]) * run.gradients[place]), None


def direct_effect(run: BatchRun, asked: Asked, layer: int) -> Found:
    """What the neuron adds to the reward through the residual stream, all at the token the reward is read from."""
    assert run.direct is not None
    if asked.site not in run.direct.neurons:
        raise ModelError(
            f"direct_effect: the neurons of site {asked.site!r} are those of 'mlp', and write what those write. Use "
            "site 'mlp'."
        )
    values = _signed(run.direct.neurons[asked.site][:, layer])
    batch = run.batch
    by_token = values.new_zeros(*batch.input_ids.shape, values.shape[1])
    by_token.index_put_((batch.rows.cpu(), batch.last.cpu()), values, accumulate=True)
    return (by_token, batch.touched("last").to(values)), None


def integrated_gradients(run: BatchRun, asked: Asked, layer: int) -> Found:
    """(a(t) - a_ref(t)) times the mean of dM/da(t) on the straight path from a_ref to a, and the gap.

    All neurons of the layer move together. The mean is taken at `steps` Gauss-Legendre nodes. The gap is how far the
    sum over tokens and neurons is from the margin minus that at a_ref.
    """
    replay, site = run.replay, asked.site
    step = _step(run, asked, layer, replay.activations[site, layer])
    nodes, weights = _gauss_legendre(asked.steps)
    mean = torch.zeros_like(step)
    start = replay.activations[site, layer] + step.to(run.head.dtype)
    for node, weight in zip(nodes, weights, strict=True):
        leaf = (start - node * step.to(start)).requires_grad_(True)
        with torch.enable_grad():
            rewards = _with_activation(run, site, layer, leaf)
            (gradient,) = torch.autograd.grad(margins(rewards).sum(), leaf)
        mean += weight * gradient.to(mean)
    with torch.no_grad():
        change = margins(replay.rewards - _with_activation(run, site, layer, start))
    values, ones = _neurons(run, asked, -step * mean)
    in_rows = einsum(values, ones, "row token neuron, row token -> row")
    return (values, ones), run.batch.by_pair(in_rows) - change.to(in_rows.device)


def dropped_patching(run: BatchRun, asked: Asked, layer: int) -> list[ByToken]:
    """`attribution_patching` without what flows through each other layer's block, one after the other."""
    step = _step(run, asked, layer, run.activations[asked.site, layer])
    others = (gradients for number, gradients in enumerate(run.dropped) if number != layer)
    return [_neurons(run, asked, step * gradients[asked.site, layer]) for gradients in others]


def _step(
    run: BatchRun, asked: Asked, layer: int, activation: Float[Tensor, "row token channel"]
) -> Float[Tensor, "row token channel"]:
    select = run.batch.touched(asked.positions).to(activation.device)
    return step_to(asked.reference, layer, activation.to(run.head.reward_dtype), select)


def _neurons(run: BatchRun, asked: Asked, channels: Float[Tensor, "row token channel"]) -> ByToken:
    """Summed over the channels of each neuron, every selected token counting 1."""
    values = channels
    if run.head.n_neurons(asked.site) < channels.shape[-1]:
        shape = "row token (neuron channel) -> row token neuron"
        values = reduce(channels, shape, "sum", neuron=run.head.n_neurons(asked.site))
    return values, run.batch.touched(asked.positions).to(values)


def _signed(of_texts: Float[Tensor, "text rest"]) -> Float[Tensor, "text rest"]:
    """With a minus for rejected texts, the second half of a batch."""
    chosen, rejected = of_texts.chunk(2)
    return torch.cat([chosen, -rejected])


def _with_activation(
    run: BatchRun, site: str, layer: int, activation: Float[Tensor, "row token channel"]
) -> Float[Tensor, "text"]:
    """The rewards when the layer's site has `activation`."""

    def put(_layer: int, found: Tensor) -> Tensor:
        return activation.reshape(found.shape)

    with run.head.hooks(site, put, [layer]):
        return run.replay.rewards_from(layer)


@lru_cache(maxsize=8)
def _gauss_legendre(steps: int) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Nodes and weights on [0, 1]."""
    nodes, weights = np.polynomial.legendre.leggauss(steps)
    return tuple((nodes + 1) / 2), tuple(weights / 2)


@dataclass(frozen=True, kw_only=True)
class Method:
    """One way of scoring neurons: what it computes, what that needs, and what a positive score says.

    - `by_layer`: the scores of one batch, layer by layer.
    - `sign`: 1 where a positive score supports the margin, -1 where it opposes the margin (`Provenance.sign`).
    - `needs_reward`: it looks at the reward, which a language model does not have.
    - `needs_gradients`: of the margin, at every activation.
    - `takes_reference`: it replaces activations by something.
    - `one_run`: all such methods share one run of the model. The others run it again along a path of their own, and
      have a completeness gap.
    """

    by_layer: Callable[[BatchRun, Asked, int], Found]
    sign: int
    needs_reward: bool
    needs_gradients: bool
    takes_reference: bool
    one_run: bool


# Nothing has a default: a new method says all of it.
METHODS: dict[str, Method] = {
    # More active in the chosen responses: in favour of them, as far as activations alone can say.
    "mean_difference": Method(
        by_layer=mean_activation,
        sign=1,
        needs_reward=False,
        needs_gradients=False,
        takes_reference=False,
        one_run=True,
    ),
    # Contributions.
    "gradient_x_activation": Method(
        by_layer=gradient_x_activation,
        sign=1,
        needs_reward=True,
        needs_gradients=True,
        takes_reference=False,
        one_run=True,
    ),
    # A change: without a neuron that supports the margin, it falls.
    "attribution_patching": Method(
        by_layer=attribution_patching,
        sign=-1,
        needs_reward=True,
        needs_gradients=True,
        takes_reference=True,
        one_run=True,
    ),
    "direct_effect": Method(
        by_layer=direct_effect,
        sign=1,
        needs_reward=True,
        needs_gradients=False,
        takes_reference=False,
        one_run=True,
    ),
    "integrated_gradients": Method(
        by_layer=integrated_gradients,
        sign=1,
        needs_reward=True,
        needs_gradients=False,  # it takes its own, on the path
        takes_reference=True,
        one_run=False,
    ),
}
