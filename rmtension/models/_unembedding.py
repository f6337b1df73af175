"""A language model's next-token logits as a reward: rows of its unembedding, measured against its own output."""

from typing import Any

import torch

from rmtension.errors import ModelError
from rmtension.models._heads import LinearHead
from rmtension.models._hooks import eager_eval
from rmtension.models._native_run import probe_batch, run_base
from rmtension.models._outputs import pick

# How far the logits of a language model may be from its unembedding, relative to the largest.
_TOLERANCE = {torch.float16: 2e-2, torch.bfloat16: 5e-2}


def token_head(name: str, model: Any, rows: tuple[int, ...]) -> LinearHead:
    """The head whose reward is the logit of one token after the text, or the first token's minus the second's.

    Some families multiply their logits by a constant, which is measured on one short text and taken over. Raises
    `ModelError` for logits that are no linear function of the hidden state.
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
            f"{name}: its logits are {reason}, so that a logit is no linear function of the hidden state. What it "
            "is before that is read with head=(weight[yes] - weight[no], 0): yes and no are the numbers of the tokens, "
            f"weight the unembedding, where it is tied {weight}."
        )
    bias = getattr(unembedding, "bias", None)
    constant = 0.0 if bias is None else scale * float(pick(bias.detach(), rows))
    return LinearHead(scale * pick(unembedding.weight.detach(), rows), constant)
