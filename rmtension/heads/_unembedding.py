"""Next-token logits of a language model as a reward: rows of its unembedding, compared with the model's output."""

from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from rmtension.bodies._hooks import eager_eval
from rmtension.bodies._native_run import probe_batch, run_base
from rmtension.errors import ModelError, OptionError
from rmtension.heads._head import Head, LinearHead

# The difference of logits and unembedding that rounding explains, relative to the largest logit.
_TOLERANCE = {torch.float16: 2e-2, torch.bfloat16: 5e-2}


class CappedLogits(Head):
    """A token's logit cap * tanh(logit / cap) as the reward, or the first token's minus the second's (Gemma-2).

    Args:
        linear: the logits before the cap.
        cap: the largest size of a logit.
    """

    def __init__(self, linear: LinearHead, cap: float) -> None:
        super().__init__()
        self.linear, self.cap = linear, cap

    @property
    def settings(self) -> Mapping[str, object]:
        """The cap."""
        return {"cap": self.cap}

    def read(
        self, last: Float[Tensor, "text d_model"], prompt_last: Float[Tensor, "text d_model"] | None = None
    ) -> Float[Tensor, "text output"]:
        """The capped logit, or the difference of two."""
        first, *second = (self.cap * torch.tanh(self.linear.read(last) / self.cap)).unbind(1)
        return (first - second[0] if second else first)[:, None]


def token_head(name: str, model: Any, rows: tuple[int, ...]) -> Head:
    """The head whose reward is the logit of a token after the text, or the first token's logit minus the second's.

    Some families multiply their logits by a constant, which is measured on a short text and included in the head, and
    some cap them. Raises `ModelError` for logits that are computed in another way.
    """
    unembedding = model.get_output_embeddings()
    if max(rows) >= len(unembedding.weight):
        raise OptionError(f"output: expected token ids below {len(unembedding.weight)}, got {list(rows)}.")
    cap: float | None = getattr(model.config.get_text_config(), "final_logit_softcapping", None)
    batch = probe_batch(min(12, len(unembedding.weight)), unembedding.weight.device)
    with torch.no_grad(), eager_eval(model.modules()):
        plain = unembedding(run_base(model.base_model, batch).to(unembedding.weight))[0].double()
        logits = model(input_ids=batch.input_ids, use_cache=False).logits[0].to(plain)
    tolerance = _TOLERANCE.get(unembedding.weight.dtype, 1e-5)
    scale = 1.0
    if cap is None:
        scale = float((plain * logits).sum() / plain.square().sum())
        scale = 1.0 if abs(scale - 1) <= tolerance else scale
    expected = scale * plain if cap is None else cap * torch.tanh(plain / cap)
    off = float((logits - expected).abs().max()) / float(logits.abs().max())
    if not off <= tolerance:
        weight = "RewardHead.from_language_model(...).body.native.get_input_embeddings().weight"
        raise ModelError(
            f"{name}: its logits are computed in another way than as an unembedding times the hidden state. To read "
            "the unembedding's rows, pass head=(weight[yes] - weight[no], 0), where yes and no are token ids and "
            f"weight is the unembedding (if it is tied to the embedding: {weight})."
        )
    bias = getattr(unembedding, "bias", None)
    both = LinearHead(unembedding.weight[list(rows)], 0.0 if bias is None else bias[list(rows)])
    if cap is not None:
        return CappedLogits(both, float(cap))
    row, constant = both.row(range(len(rows)))
    return LinearHead(scale * row, scale * constant)
