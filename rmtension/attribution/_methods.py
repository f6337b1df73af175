"""How each attribution method scores the neurons in one batch: one value per token, weighted and summed over tokens."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache, partial

import numpy as np
import torch
from einops import einsum, reduce
from jaxtyping import Float
from torch import Tensor

from rmtension._sites import neuron_activations
from rmtension.attribution._batch_run import BatchRun
from rmtension.data._tokens import margins
from rmtension.errors import ModelError
from rmtension.interventions._replacement import Replacement


@dataclass(frozen=True)
class MethodArgs:
    """The site and tokens that a method scores, and its options."""

    site: str
    positions: str
    replacement: Replacement
    steps: int = 32


# The value of every token and neuron of one layer, and the weight of every token. A pair's score is their product
# summed over the tokens of its rows; one of the two carries the minus sign of rejected texts.
TokenValues = tuple[Float[Tensor, "row token neuron"], Float[Tensor, "row token"]]


# The values, and the completeness gap of each pair for methods that have one: how far its scores are from adding up.
MethodResult = tuple[TokenValues, Float[Tensor, "pair"] | None]


def mean_activation(run: BatchRun, args: MethodArgs, layer: int) -> MethodResult:
    """a(t), each token weighted by 1 / (number of selected tokens of its text)."""
    # A sum in half precision would be wrong in its first digits.
    activation = run.activations[args.site, layer].to(run.head.reward_dtype)
    values = neuron_activations(activation, args.site, run.head.n_neurons(args.site))
    select = run.batch.select(args.positions).to(values)
    return (values, run.batch.sum_over_texts(_signed(select / select.sum(dim=1, keepdim=True)))), None


def gradient_x_activation(run: BatchRun, args: MethodArgs, layer: int) -> MethodResult:
    """a(t) dM/da(t)."""
    key = args.site, layer
    products = run.activations[key].to(run.head.reward_dtype) * run.gradients[key]
    return _neurons(run, args, products), None


def attribution_patching(run: BatchRun, args: MethodArgs, layer: int) -> MethodResult:
    """(a_ref(t) - a(t)) dM/da(t)."""
    key = args.site, layer
    return _neurons(run, args, _step(run, args, layer, run.activations[key]) * run.gradients[key]), None


def relp(run: BatchRun, args: MethodArgs, layer: int, *, fixed_attention: bool) -> MethodResult:
    """(a_ref(t) - a(t)) times the coefficient of a(t) in the margin by the rules of RelP."""
    key = args.site, layer
    step = _step(run, args, layer, run.activations[key])
    return _neurons(run, args, step * run.relevances[fixed_attention][key]), None


def direct_effect(run: BatchRun, args: MethodArgs, layer: int) -> MethodResult:
    """What the neuron adds to the reward through the residual stream, at the token that the reward is read from."""
    assert run.direct is not None
    if args.site == "expert" and args.site not in run.direct.neurons:
        raise ModelError(
            "direct_effect: cannot score site 'expert' of this model: its layers add more to the residual stream than "
            "their experts and attention write, such as shared experts, or a norm behind both. Use "
            "gradient_x_activation, attribution_patching or single_neuron_effects."
        )
    if args.site not in run.direct.neurons:
        raise ModelError(
            f"direct_effect: cannot score site {args.site!r}: its neurons are those of 'mlp' and write to the residual "
            "stream there. Use site='mlp'."
        )
    values = _signed(run.direct.neurons[args.site][:, layer])
    batch = run.batch
    by_token = values.new_zeros(*batch.input_ids.shape, values.shape[1])
    by_token.index_put_((batch.rows.cpu(), batch.last.cpu()), values, accumulate=True)
    return (by_token, batch.position_mask("last").to(values)), None


def integrated_gradients(run: BatchRun, args: MethodArgs, layer: int) -> MethodResult:
    """(a(t) - a_ref(t)) times the mean of dM/da(t) on the straight path from a_ref to a, and the completeness gap.

    All neurons of the layer move together. The mean is taken at `steps` Gauss-Legendre nodes. The gap is the sum of the
    scores over tokens and neurons minus (the margin at a - the margin at a_ref).
    """
    replay, site = run.replay, args.site
    step = _step(run, args, layer, replay.activations[site, layer])
    nodes, weights = _gauss_legendre(args.steps)
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
    values, ones = _neurons(run, args, -step * mean)
    in_rows = einsum(values, ones, "row token neuron, row token -> row")
    return (values, ones), run.batch.sum_per_pair(in_rows) - change.to(in_rows.device)


def dropped_patching(run: BatchRun, args: MethodArgs, layer: int) -> list[TokenValues]:
    """`attribution_patching` without the gradient through one other layer's block, for each other layer in turn."""
    step = _step(run, args, layer, run.activations[args.site, layer])
    others = (gradients for number, gradients in enumerate(run.dropped) if number != layer)
    return [_neurons(run, args, step * gradients[args.site, layer]) for gradients in others]


def _step(
    run: BatchRun, args: MethodArgs, layer: int, activation: Float[Tensor, "row token channel"]
) -> Float[Tensor, "row token channel"]:
    select = run.batch.position_mask(args.positions).to(activation.device)
    return args.replacement.step(layer, activation.to(run.head.reward_dtype), select, run.batch)


def _neurons(run: BatchRun, args: MethodArgs, channels: Float[Tensor, "row token channel"]) -> TokenValues:
    """The values summed over the channels of each neuron; every selected token has weight 1."""
    values = channels
    if run.head.n_neurons(args.site) < channels.shape[-1]:
        shape = "row token (neuron channel) -> row token neuron"
        values = reduce(channels, shape, "sum", neuron=run.head.n_neurons(args.site))
    return values, run.batch.position_mask(args.positions).to(values)


def _signed(of_texts: Float[Tensor, "text rest"]) -> Float[Tensor, "text rest"]:
    """The values with the sign of rejected texts, the second half of a batch, flipped."""
    chosen, rejected = of_texts.chunk(2)
    return torch.cat([chosen, -rejected])


def _with_activation(
    run: BatchRun, site: str, layer: int, activation: Float[Tensor, "row token channel"]
) -> Float[Tensor, "text"]:
    """The rewards when the layer's site has `activation`."""

    def put(_layer: int, current: Tensor) -> Tensor:
        return activation.reshape(current.shape)

    with run.head.hooks(site, put, [layer]):
        return run.replay.rewards_from(layer)


@lru_cache(maxsize=8)
def _gauss_legendre(steps: int) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Gauss-Legendre nodes and weights on [0, 1]."""
    nodes, weights = np.polynomial.legendre.leggauss(steps)
    return tuple((nodes + 1) / 2), tuple(weights / 2)


@dataclass(frozen=True, kw_only=True)
class Method:
    """One attribution method: what it computes, what it needs, and what a positive score means.

    - `name`: the name that users pass as `method`.
    - `by_layer`: computes the scores of one batch at one layer.
    - `by_layer_dropped`: the same without the gradient through each other layer's block; None for methods without a
      GradDrop variant.
    - `sign`: 1 if a neuron with a positive score supports the margin, -1 if it opposes the margin (`Provenance.sign`).
    - `cost`: the cost in passes over both texts of every pair, for a model of L layers.
    - `needs_reward`: the method reads the reward, which a language model does not have.
    - `needs_gradients`: the method needs the gradient of the margin with respect to every activation.
    - `needs_relevance`: which coefficients of RelP the method needs: False for those without constant attention
      patterns, True for those with them, None for no coefficients.
    - `needs_direct_paths`: the method needs what every neuron writes into the residual stream
      (`rmtension.models.direct_contributions`).
    - `needs_replacement`: the method replaces activations.
    - `needs_path`: the method runs the model again at `steps` nodes on the path from a_ref to a, and has a completeness
      gap. All other methods share one run of the model.
    """

    name: str
    by_layer: Callable[[BatchRun, MethodArgs, int], MethodResult]
    by_layer_dropped: Callable[[BatchRun, MethodArgs, int], list[TokenValues]] | None
    sign: int
    cost: str
    needs_reward: bool
    needs_gradients: bool
    needs_relevance: bool | None
    needs_direct_paths: bool
    needs_replacement: bool
    needs_path: bool

    @property
    def runs_backward(self) -> bool:
        """Whether it needs backward passes."""
        return self.needs_gradients or self.needs_relevance is not None or self.needs_path


# No field has a default, so that a new method states all of them.
_TABLE = (
    Method(
        name="mean_difference",
        by_layer=mean_activation,
        by_layer_dropped=None,
        sign=1,  # more active in the chosen responses: counted as support, though activations alone cannot show it
        cost="1 forward pass",
        needs_reward=False,
        needs_gradients=False,
        needs_relevance=None,
        needs_direct_paths=False,
        needs_replacement=False,
        needs_path=False,
    ),
    Method(
        name="gradient_x_activation",
        by_layer=gradient_x_activation,
        by_layer_dropped=None,
        sign=1,
        cost="1 forward and 1 backward pass",
        needs_reward=True,
        needs_gradients=True,
        needs_relevance=None,
        needs_direct_paths=False,
        needs_replacement=False,
        needs_path=False,
    ),
    Method(
        name="attribution_patching",
        by_layer=attribution_patching,
        by_layer_dropped=dropped_patching,
        sign=-1,  # a change of the margin, which falls when a neuron that supports it is ablated
        cost="1 forward and 1 backward pass; with GradDrop, 1 forward and L backward passes",
        needs_reward=True,
        needs_gradients=True,
        needs_relevance=None,
        needs_direct_paths=False,
        needs_replacement=True,
        needs_path=False,
    ),
    *(
        Method(
            name=name,
            by_layer=partial(relp, fixed_attention=fixed),
            by_layer_dropped=None,
            sign=-1,
            cost="1 forward and 1 backward pass of its own",
            needs_reward=True,
            needs_gradients=False,
            needs_relevance=fixed,
            needs_direct_paths=False,
            needs_replacement=True,
            needs_path=False,
        )
        for name, fixed in (("relp", False), ("relp_fixed_attention", True))
    ),
    Method(
        name="direct_effect",
        by_layer=direct_effect,
        by_layer_dropped=None,
        sign=1,
        cost="1 forward pass",
        needs_reward=True,
        needs_gradients=False,
        needs_relevance=None,
        needs_direct_paths=True,
        needs_replacement=False,
        needs_path=False,
    ),
    Method(
        name="integrated_gradients",
        by_layer=integrated_gradients,
        by_layer_dropped=None,
        sign=1,
        cost="1 + (steps + 1) (L + 1) / 2 forward and steps (L + 1) / 2 backward passes",
        needs_reward=True,
        needs_gradients=False,  # it computes its own gradients on the path
        needs_relevance=None,
        needs_direct_paths=False,
        needs_replacement=True,
        needs_path=True,
    ),
)
METHODS: dict[str, Method] = {method.name: method for method in _TABLE}
