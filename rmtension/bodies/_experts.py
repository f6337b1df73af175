"""Neurons of a mixture of experts: a hook point on what every expert computes for the tokens that are routed to it."""

import inspect
import weakref
from collections.abc import Callable
from typing import Any

import torch
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional

from rmtension.bodies._native_run import stream_difference, stream_tolerance
from rmtension.errors import ModelError

# The tokens of the trial run that compares the computation with that of transformers.
_N_TRIAL = 8


class ExpertPoint(nn.Module):
    """The hook point on the neurons of one module of experts: its hooks see [token, expert * index].

    transformers computes all experts of a layer in one module, which holds their weights as 3D parameters; the neurons,
    the input of the down projections, are tensors inside its `forward`. While this point has hooks, `forward` is
    replaced by `routed`, which computes the same and calls the hooks; without hooks, the module is as it was.

    An expert computes nothing for a token that is not routed to it. Its neurons are 0 there, and what a hook writes
    there is not read: it changes nothing, and its gradient is 0.

    Memory: while hooks run, one tensor [token, expert * index].
    """

    def __init__(self, experts: nn.Module) -> None:
        super().__init__()
        # No submodule, and no reference that keeps the model alive.
        self._owner: weakref.ref[Any] = weakref.ref(experts)
        down: Tensor = experts.get_parameter("down_proj")
        self._is_transposed = bool(getattr(experts, "is_transposed", False))
        self.n_experts = int(down.shape[0])
        self.d_expert = int(down.shape[1] if self._is_transposed else down.shape[2])
        # The routing weight of every expert for every token, 0 if it is not routed there, while hooks run.
        self.routing: Float[Tensor, "token expert"] | None = None
        self._restore: Callable[[], None] | None = None

    @property
    def experts(self) -> Any:
        """The module of experts."""
        return self._owner()

    def forward(self, neurons: Float[Tensor, "token neuron"]) -> Float[Tensor, "token neuron"]:
        """The neurons; forward hooks on this module may replace them."""
        return neurons

    def register_forward_hook(self, *args: Any, **kwargs: Any) -> Any:
        """Add a hook, as `nn.Module` does, and replace the `forward` of the experts until the last hook is removed."""
        if self._restore is None:
            self._restore = self._replace()
        return _Handle(self, super().register_forward_hook(*args, **kwargs))

    def restore(self) -> None:
        """Undo the replacement if no hook is left."""
        if self._restore is not None and not self._forward_hooks:
            self._restore()
            self._restore = None

    def routed(self, *args: Any, **kwargs: Any) -> Float[Tensor, "*token d_model"]:
        """What the module of experts computes, with the hooks of this point.

        The arguments are those of transformers: the hidden states, the experts of each token and their routing weights.
        """
        experts = self.experts
        hidden, index, weights = _bound(experts, args, kwargs)
        tokens = hidden.reshape(-1, hidden.shape[-1])
        index, weights = (values.reshape(len(tokens), -1) for values in (index, weights))
        neurons, rows, parts = [tokens.new_zeros(0, self.d_expert)], [index.new_zeros(0, dtype=torch.long)], []
        for expert in index.unique().tolist():
            if expert >= self.n_experts:
                continue  # where experts are split over processes, those of other processes have this number
            token, slot = (index == expert).nonzero(as_tuple=True)
            neurons.append(self._neurons(experts, expert, tokens[token]))
            rows.append(token * self.n_experts + expert)
            parts.append((expert, token, slot))
        routed_rows = torch.cat(rows)
        every = weights.new_zeros(len(tokens) * self.n_experts)
        given = [weights[token, slot] for _, token, slot in parts]
        self.routing = (
            every.index_copy(0, routed_rows, torch.cat([every[:0], *given])).view(-1, self.n_experts).detach()
        )
        try:
            seen = self._hooked(len(tokens), torch.cat(neurons), routed_rows)
        finally:
            self.routing = None
        output = torch.zeros_like(tokens)
        for (expert, token, slot), values in zip(parts, torch.split(seen, [len(row) for row in rows[1:]]), strict=True):
            written = self._written(experts, expert, values) * weights[token, slot, None]
            output = output.index_add(0, token, written.to(output.dtype))
        return output.reshape(hidden.shape)

    def write(
        self, neurons: Float[Tensor, "token neuron"], routing: Float[Tensor, "token expert"]
    ) -> Float[Tensor, "token d_model"]:
        """What the experts write for given neurons and routing weights."""
        by_expert = rearrange(neurons, "token (expert index) -> expert token index", expert=self.n_experts)
        written = [self._written(self.experts, expert, values) for expert, values in enumerate(by_expert)]
        return torch.einsum("etd,te->td", torch.stack(written), routing.to(neurons))

    # -- inside --------------------------------------------------------------------------------------------------------

    def _hooked(
        self, n_tokens: int, neurons: Float[Tensor, "routed index"], rows: Int[Tensor, "routed"]
    ) -> Float[Tensor, "routed index"]:
        """The neurons after the hooks, which see them in one row per token, with 0 for experts not routed to."""
        every = neurons.new_zeros(n_tokens * self.n_experts, self.d_expert).index_copy(0, rows, neurons)
        after: Tensor = self(rearrange(every, "(token expert) index -> token (expert index)", token=n_tokens))
        return after.reshape(-1, self.d_expert)[rows]

    def _neurons(self, experts: Any, expert: int, tokens: Tensor) -> Tensor:
        """act(gate) * up of one expert, or act(up) without a gate."""
        gated = hasattr(experts, "gate_up_proj")
        inside = self._project(experts, "gate_up_proj" if gated else "up_proj", expert, tokens)
        if not gated:
            act: Tensor = experts.act_fn(inside)
            return act
        if hasattr(experts, "_apply_gate"):
            product: Tensor = experts._apply_gate(inside)
            return product
        gate, up = inside.chunk(2, dim=-1)
        act = experts.act_fn(gate)
        return act * up

    def _written(self, experts: Any, expert: int, neurons: Tensor) -> Tensor:
        """The output of one expert, before its routing weight."""
        written = self._project(experts, "down_proj", expert, neurons)
        if getattr(experts, "has_post_expert_norm", False):
            written = experts.post_expert_norm(written)
        return written

    def _project(self, experts: Any, name: str, expert: int, values: Tensor) -> Tensor:
        # By attribute, because adapters of peft compute the weights while the module runs.
        weight, bias = getattr(experts, name)[expert], getattr(experts, f"{name}_bias", None)
        weight = weight.T if self._is_transposed else weight
        return functional.linear(values, weight, None if bias is None else bias[expert])

    def _replace(self) -> Callable[[], None]:
        """Replace the module's `forward`; returns the function that restores it."""
        experts = self.experts
        if hasattr(experts, "_hf_hook"):  # accelerate wraps `forward`, and moves weights before it calls the original
            kept = experts._old_forward
            experts._old_forward = self.routed
            return lambda: setattr(experts, "_old_forward", kept)
        if "forward" in vars(experts):
            raise ModelError(
                f"site 'expert': the forward of a {type(experts).__name__} was replaced, so hooks cannot see its "
                "neurons. Restore it (`del module.forward`) first."
            )
        experts.forward = self.routed
        return lambda: delattr(experts, "forward")


class _Handle:
    """What `register_forward_hook` returns: removes the hook, and the replacement after the last one."""

    def __init__(self, point: ExpertPoint, handle: Any) -> None:
        self._point = point
        self._handle = handle

    def remove(self) -> None:
        self._handle.remove()
        self._point.restore()


# One point per module, so that the hooks of several models that share modules run one after another.
_POINTS: "weakref.WeakKeyDictionary[nn.Module, ExpertPoint]" = weakref.WeakKeyDictionary()


def expert_point(block: nn.Module, layer: int) -> ExpertPoint:
    """The hook point on the experts of a block, compared with transformers' computation on a few random tokens.

    Raises `ModelError` for a block without experts, or with experts of a kind that this library cannot split.
    """
    found = [module for module in block.modules() if is_experts(module)]
    if len(found) != 1:
        raise ModelError(f"site 'expert': {_reason(block, layer, len(found))}")
    experts = found[0]
    if experts not in _POINTS:
        point = ExpertPoint(experts)
        _require_same(point, experts, layer)
        _POINTS[experts] = point
    return _POINTS[experts]


def is_experts(module: nn.Module) -> bool:
    """Whether a module holds the weights of several experts as 3D parameters, as transformers 5 does."""
    parameters = module._parameters
    inside = parameters.get("gate_up_proj", parameters.get("up_proj"))
    down = parameters.get("down_proj")
    return inside is not None and down is not None and inside.ndim == down.ndim == 3


def _reason(block: nn.Module, layer: int, n_found: int) -> str:
    if n_found > 1:
        return f"layer {layer} has {n_found} modules of experts, expected one. Use site 'attn_head'."
    if any(isinstance(child, nn.ModuleList) and "expert" in name for name, child in block.named_modules()):
        return (
            f"the experts of layer {layer} are single modules, as in transformers 4, which get tokens without "
            "their places in the text. Install transformers 5, or use site 'attn_head'."
        )
    if any("expert" in name for name, _ in block.named_modules()) or any(
        "expert" in type(module).__name__.lower() for module in block.modules()
    ):
        return f"the experts of layer {layer} are of a kind that this library cannot split. Use site 'attn_head'."
    return (
        f"layer {layer} is no mixture of experts, and this site needs experts in every layer. Use site 'mlp' in a "
        "dense model, and 'attn_head' in a model with layers of both kinds."
    )


@torch.no_grad()
def _require_same(point: ExpertPoint, experts: Any, layer: int) -> None:
    """Raise `ModelError` unless `routed` computes what the module computes, on random tokens, experts and weights."""
    inside = experts._parameters.get("gate_up_proj", experts._parameters.get("up_proj"))
    d_model = inside.shape[1] if getattr(experts, "is_transposed", False) else inside.shape[2]
    random = torch.Generator().manual_seed(0)
    hidden = torch.randn(_N_TRIAL, d_model, generator=random).to(inside)
    top = torch.rand(_N_TRIAL, point.n_experts, generator=random).topk(min(2, point.n_experts))
    weights, index = top.values.to(inside), top.indices.to(inside.device)
    try:
        expected = experts.forward(hidden, index, weights)
        handle = point.register_forward_hook(lambda module, inputs, output: None)
        try:
            actual = experts.forward(hidden, index, weights)
        finally:
            handle.remove()
        off = stream_difference(actual.double(), expected.double())
    except ModelError:
        raise
    except Exception as error:  # a module that is called in another way may raise anything
        raise ModelError(
            f"site 'expert': the experts of layer {layer} ({type(experts).__name__}) are called in a way that this "
            f"library does not know ({type(error).__name__}: {error}). Use site 'attn_head'."
        ) from error
    if not off <= stream_tolerance(inside.dtype):
        raise ModelError(
            f"site 'expert': the experts of layer {layer} ({type(experts).__name__}) compute something else than "
            f"down(act(gate) * up) of the experts that each token is routed to (off by {off:.1e}). Use site "
            "'attn_head'."
        )


def _bound(experts: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Any]:
    """The three arguments of a call, in the order of the module's own `forward`."""
    if not kwargs:
        return list(args)
    _, *values = inspect.signature(type(experts).forward).bind(experts, *args, **kwargs).args
    return values
