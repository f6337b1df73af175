"""Log-probabilities of tokens under a language model, from its residual stream, with few logits in memory at once."""

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable

from rmtension.bodies._native_run import probe_batch, run_base
from rmtension.bodies._run_modes import eager_eval
from rmtension.errors import ModelError

# The difference of logits that rounding explains, relative to the largest logit; 1e-5 in other dtypes.
_TOLERANCE = {torch.float16: 2e-2, torch.bfloat16: 5e-2}
# Logits that are held at once: those of so many tokens for so many entries of the vocabulary.
_TOKENS, _ENTRIES = 512, 8192


class Unembedding:
    """How a language model computes its logits: `cap * tanh(scale * (weight @ h + bias) / cap)`, or without the cap.

    `layer` is the model's own module, so that changes of its weights take effect. Copies of an `Unembedding` share it.
    """

    def __init__(self, layer: Any, scale: float = 1.0, cap: float | None = None) -> None:
        self._layer, self.scale, self.cap = layer, scale, cap

    @property
    def weight(self) -> Float[Tensor, "entry d_model"]:
        """The rows of the unembedding."""
        weight: Tensor = self._layer.weight
        return weight

    @property
    def bias(self) -> Float[Tensor, "entry"] | None:
        """Its biases, if it has some."""
        bias: Tensor | None = getattr(self._layer, "bias", None)
        return bias

    def __deepcopy__(self, _memo: object) -> "Unembedding":
        return self

    @property
    def tensors(self) -> list[Tensor]:
        """The tensors, for fingerprints."""
        return [self.weight] if self.bias is None else [self.weight, self.bias]

    def logits(self, states: Float[Tensor, "token d_model"], entries: slice) -> Float[Tensor, "token entry"]:
        """The logits of some entries of the vocabulary, in the dtype of `states`."""
        plain = states @ self.weight[entries].to(states).T
        if self.bias is not None:
            plain = plain + self.bias[entries].to(states)
        return self.bounded(self.scale * plain)

    def bounded(self, logits: Tensor) -> Tensor:
        """The logits within the cap, if there is one."""
        return logits if self.cap is None else self.cap * torch.tanh(logits / self.cap)


def read_unembedding(name: str, model: Any, remedy: str) -> Unembedding:
    """The unembedding of a language model of transformers.

    Some families multiply or cap their logits. The factor is measured on a short text, and the result is compared with
    the model's own logits there. Raises `ModelError`, which ends with `remedy`, if they differ. Cost: two short passes.
    """
    layer = model.get_output_embeddings()
    if layer is None:
        raise ModelError(
            f"{name}: {type(model).__name__} has no unembedding, so tokens have no probabilities. Open a causal "
            "language model (...ForCausalLM)."
        )
    weight = layer.weight
    cap = getattr(model.config.get_text_config(), "final_logit_softcapping", None)
    batch = probe_batch(min(12, len(weight)), weight.device)
    with torch.no_grad(), eager_eval(model.modules()):
        states = run_base(model.base_model, batch)[0].to(weight.device)
        exact = states.to(torch.promote_types(states.dtype, torch.float32))
        logits = model(input_ids=batch.input_ids, use_cache=False).logits[0].to(exact)
        plain = Unembedding(layer).logits(exact, slice(None))
    tolerance = _TOLERANCE.get(weight.dtype, 1e-5)
    before = logits if cap is None else cap * torch.atanh((logits / cap).clamp(-1 + 1e-6, 1 - 1e-6))
    scale = float((plain * before).double().sum() / plain.double().square().sum())
    scale = 1.0 if abs(scale - 1) <= tolerance else scale
    found = Unembedding(layer, scale, cap)
    off = float((found.bounded(scale * plain) - logits).abs().max()) / max(float(logits.abs().max()), 1e-12)
    if not off <= tolerance:
        raise ModelError(
            f"{name}: expected logits that are a product with the unembedding, perhaps scaled or capped, but those of "
            f"{type(model).__name__} differ from that by {off:.1e} of their size. {remedy}"
        )
    return found


def log_probs(
    states: Float[Tensor, "token d_model"], unembedding: Unembedding, targets: Int[Tensor, "token"]
) -> Float[Tensor, "token"]:
    """The log-probability of each token's target, differentiable by `states`, in their dtype.

    Cost: the vocabulary projection of these tokens, and again in the backward pass. Memory: logits of at most 512
    tokens for 8192 entries of the vocabulary, and that part of the unembedding in the dtype of `states`.
    """
    result: Tensor = _LogProbs.apply(states, unembedding, targets)  # type: ignore[no-untyped-call]
    return result


class _LogProbs(torch.autograd.Function):
    """`log_probs`, with the logits computed again in the backward pass."""

    @staticmethod
    def forward(ctx: Any, states: Tensor, unembedding: Unembedding, targets: Tensor) -> Tensor:
        """The log-probabilities; keeps the states and one number per token."""
        moved, targets = states.to(unembedding.weight.device), targets.to(unembedding.weight.device)
        totals, chosen = moved.new_zeros(len(moved)), moved.new_zeros(len(moved))
        for rows in _blocks(len(moved), _TOKENS):
            sums = []
            for entries in _blocks(len(unembedding.weight), _ENTRIES):
                logits = unembedding.logits(moved[rows], entries)
                sums.append(logits.logsumexp(dim=1))
                inside, at = _inside(targets[rows], entries)
                chosen[rows] += torch.where(inside, logits.gather(1, at[:, None])[:, 0], 0.0)
            totals[rows] = torch.stack(sums).logsumexp(dim=0)
        ctx.save_for_backward(states, targets, totals)
        ctx.unembedding = unembedding
        return (chosen - totals).to(states.device)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        """The gradient: d log p(y) / d logits = one_hot(y) - p, through the cap and the product."""
        states, targets, totals = ctx.saved_tensors
        unembedding: Unembedding = ctx.unembedding
        moved, gradient = states.to(unembedding.weight.device), gradient.to(totals)
        result = torch.zeros_like(moved)
        for rows in _blocks(len(moved), _TOKENS):
            for entries in _blocks(len(unembedding.weight), _ENTRIES):
                logits = unembedding.logits(moved[rows], entries)
                slope = -(logits - totals[rows, None]).exp()
                inside, at = _inside(targets[rows], entries)
                slope.scatter_add_(1, at[:, None], inside[:, None].to(slope))
                if unembedding.cap is not None:
                    slope = slope * (1 - (logits / unembedding.cap).square())
                slope = slope * (unembedding.scale * gradient[rows, None])
                result[rows] += slope @ unembedding.weight[entries].to(slope)
        return result.to(states.device), None, None


def _blocks(n: int, size: int) -> list[slice]:
    return [slice(start, min(start + size, n)) for start in range(0, n, size)]


def _inside(targets: Tensor, entries: slice) -> tuple[Tensor, Tensor]:
    """Which targets are among `entries`, and their number there (0 for the others)."""
    inside = (targets >= entries.start) & (targets < entries.stop)
    return inside, torch.where(inside, targets - entries.start, 0)
