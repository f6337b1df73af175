"""The rules of RelP: a forward pass with the same values, whose gradient spreads relevance instead of slopes.

A gradient measures what an infinitesimal change does. RelP (Jafari et al. 2025, arXiv 2508.21258) replaces the slope of
every nonlinear step by the coefficient with which its output is a multiple of its input, as layer-wise relevance
propagation does:

- a norm's denominator is constant;
- an activation function is z times the constant act(z) / z;
- a product of two activations, as in a gated MLP, gives each factor half of the gradient;
- with `fixed_attention`, the attention pattern is constant, so that attention is a fixed weighted mean of values.

With all four, and without biases, the reward is homogeneous in the residual stream of every layer: the sum over tokens
and channels of the stream times its gradient is the reward (conservation).
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from rmtension.bodies._gate_search import is_activation_function
from rmtension.bodies._hooks import Hook, HookSite, InstalledHooks, around_calls, modules_of, on_calls
from rmtension.bodies._norms import NormLayer, is_norm, read_norm
from rmtension.bodies._run_modes import eager_eval
from rmtension.errors import ModelError
from rmtension.models._reward_model import RewardModel


class RelevanceRules:
    """Where the rules apply in a model. Raises `ModelError` if its modules do not show all of these places."""

    def __init__(self, head: RewardModel) -> None:
        body = head.body
        if not body.runs_native:
            raise ModelError(
                "relp: needs transformers' own modules, whose norms and activation functions can be hooked. Open the "
                "model without model_class and process_weights, and remove your hooks from head.model."
            )
        if "mlp" not in head.sites:
            raise ModelError(
                "relp: has no rule for a mixture of experts, whose routing is no activation function. Use "
                "attribution_patching."
            )
        self._blocks = [body.block(layer) for layer in range(head.n_layers)]
        self._norms = [module for module in modules_of(*self._blocks, body.final_norm) if is_norm(module)]
        self._activations: list[nn.Module] = []
        self._products: list[HookSite] = []
        for layer, block in enumerate(self._blocks):
            with eager_eval(modules_of(block)):
                found = [module for module in modules_of(block) if is_activation_function(module)]
            if not found:
                raise ModelError(
                    f"relp: no module of layer {layer} ({type(block).__name__}) computes the activation function, so "
                    "its rule cannot be applied. Use attribution_patching."
                )
            self._activations += [module for module in found if module not in self._activations]
            native = [site for site in body.hook_sites("mlp", layer) if site.module in set(modules_of(block))]
            gates = {(site.module, site.side) for site in body.hook_sites("mlp_gate", layer)}
            self._products += [
                HookSite(site.module, site.side) for site in native if (site.module, site.side) not in gates
            ]
        self._measured: dict[nn.Module, NormLayer] = {}

    @contextmanager
    def applied(self, *, fixed_attention: bool) -> Iterator[None]:
        """Within this context the model computes the same values, and its gradients follow the rules.

        Hooks that are installed inside see the activations behind the rules.
        """
        attention = _FixedAttention()
        with ExitStack() as stack:
            stack.enter_context(on_calls(self._norms, self._norm))
            stack.enter_context(on_calls(self._activations, _activation))
            halves: list[tuple[HookSite, Hook]] = [(product, _half) for product in self._products]
            stack.enter_context(InstalledHooks(halves, any_tokens=True))
            if fixed_attention:
                # Only inside blocks: the head may have a softmax too, over weights or bins.
                stack.enter_context(around_calls(self._blocks, attention.enter_block, attention.leave_block))
                stack.enter_context(attention)
            yield
        if fixed_attention and not attention.n_fixed:
            raise ModelError(
                "relp_fixed_attention: no attention pattern was seen, because the model computes attention neither "
                'with softmax nor with scaled_dot_product_attention. Open it with attn_implementation="sdpa", or use '
                "relp."
            )

    def _norm(self, module: nn.Module, args: tuple[Any, ...], _kwargs: dict[str, Any], output: Tensor) -> Tensor:
        """The rule of a norm: linear in its input, at the scale that it divided by."""
        inputs: Tensor = args[0]
        if module not in self._measured:
            # `forward` of the module would come back to this hook.
            self._measured[module] = read_norm(_Plain(module), inputs.shape[-1])
        layer = self._measured[module].to(inputs)
        with torch.no_grad():
            sigma = layer.sigma(inputs, output)
        return _with_gradient_of(output, layer.apply(inputs, sigma))


class _Plain(nn.Module):
    """A module without its hooks."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, inputs: Tensor) -> Any:
        """What the module computes."""
        run: Callable[..., Any] = self.module.forward
        return run(inputs)


def _activation(_module: nn.Module, args: tuple[Any, ...], _kwargs: dict[str, Any], output: Tensor) -> Tensor:
    """The rule of an activation function: its input times a constant."""
    inputs: Tensor = args[0]
    with torch.no_grad():
        ratio = torch.where(inputs == 0, torch.zeros_like(output), output / inputs)
    return _with_gradient_of(output, inputs * ratio)


def _half(product: Tensor) -> Tensor:
    """The rule of a product: half of the gradient goes to each factor, which gets the other factor as its slope."""
    return _with_gradient_of(product, 0.5 * product)


def _with_gradient_of(values: Tensor, other: Tensor) -> Tensor:
    """`values`, with the gradient of `other`."""
    return values.detach() + (other - other.detach()).to(values.dtype)


class _FixedAttention(TorchFunctionMode):
    """Makes attention patterns constant while a block runs; `n_fixed` counts them."""

    def __init__(self) -> None:
        super().__init__()
        self.n_fixed = 0
        self._is_in_block = False

    def enter_block(self) -> None:
        """A block begins."""
        self._is_in_block = True

    def leave_block(self) -> None:
        """A block has ended."""
        self._is_in_block = False

    def __torch_function__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        named = dict(kwargs or {})
        if not self._is_in_block:
            return function(*args, **named)
        if function is torch.nn.functional.scaled_dot_product_attention:
            self.n_fixed += 1
            query, key, *rest = args if len(args) > 1 else (named.pop("query"), named.pop("key"))
            return function(query.detach(), key.detach(), *rest, **named)
        result = function(*args, **named)
        if function in _SOFTMAX:
            self.n_fixed += 1
            return result.detach()
        return result


_SOFTMAX = (torch.nn.functional.softmax, torch.softmax, Tensor.softmax)
