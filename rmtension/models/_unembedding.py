"""Next-token logits of a language model as a reward: rows of its unembedding, compared with the model's output."""

from typing import Any

import torch

from rmtension.errors import ModelError
from rmtension.models._head import LinearHead
from rmtension.models._hooks import eager_eval
from rmtension.models._native_run import probe_batch, run_base

# The difference of logits and unembedding that rounding explains, relative to the largest logit.
_TOLERANCE = {torch.float16: 2e-2, torch.bfloat16: 5e-2}


def token_head(name: str, model: Any, rows: tuple[int, ...]) -> LinearHead:
    """The head whose reward is the logit of a token after the text, or the first token's logit minus the second's.

    Some families multiply their logits by a constant, which is measured on a short text and included in the head.
    Raises `ModelError` for logits that are not a linear function of the hidden state.
    """
    unembedding = model.get_output_embeddings()
    cap = getattr(model.config.get_text_config(), "final_logit_softcapping", None)
    batch = probe_batch(min(12, len(unembedding.weight)), unembedding.weight.device)
    with torch.no_grad(), eager_eval(model.modules()):
        plain = unembedding(run_base(model.base_model, batch).to(unembedding.weight))[0].double()
        logits = model(input_ids=batch.input_ids, use_cache=False).logits[0].to(plain)
    scale = float((plain * logits).sum() / plain.square().sum())
    tolerance = _TOLERANCE.get(unembedding.weight.dtype, 1e-5)
    scale = 1.0 if abs(scale - 1) <= tolerance else scale
    off = float((logits - scale * plain).abs().max()) / float(logits.abs().max())
    if cap is not None or not off <= tolerance:
        reason = f"capped (final_logit_softcapping={cap})" if cap is not None else "computed in another way"
        weight = "RewardHead.from_language_model(...).body.native.get_input_embeddings().weight"
        raise ModelError(
            f"{name}: its logits are {reason}, so a logit is not a linear function of the hidden state. To read the "
            "logits before that, pass head=(weight[yes] - weight[no], 0), where yes and no are token ids and weight is "
            f"the unembedding (if it is tied to the embedding: {weight})."
        )
    bias = getattr(unembedding, "bias", None)
    both = LinearHead(unembedding.weight[list(rows)], 0.0 if bias is None else bias[list(rows)])
    row, constant = both.row(range(len(rows)))
    return LinearHead(scale * row, scale * constant)
