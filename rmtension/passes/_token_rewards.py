"""Rewards that are read at several tokens, computed from the logits of transformers' own model, for `check`."""

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from rmtension.bodies._native_run import let_run_in_float64
from rmtension.bodies._run_modes import eager_eval
from rmtension.data._encoding import EncodedText
from rmtension.heads._log_ratio_head import LogRatioHead
from rmtension.heads._outputs import pick
from rmtension.heads._process_head import ProcessHead
from rmtension.models._classifiers import reload_classifier
from rmtension.models._reward_model import RewardModel
from rmtension.passes._scoring import one_text


@torch.no_grad()
def rewards_of_tokens(head: RewardModel, texts: Sequence[EncodedText], model: Any) -> Float[Tensor, "text"] | None:
    """The rewards of texts from the logits of `model`, one text at a time; None for heads that read other values."""
    if isinstance(head.head, LogRatioHead):
        return _log_ratios(head, head.head, texts, model)
    if isinstance(head.head, ProcessHead):
        return _of_steps(head, head.head, texts, model)
    return None


def _log_ratios(
    head: RewardModel, ratio: LogRatioHead, texts: Sequence[EncodedText], model: Any
) -> Float[Tensor, "text"]:
    """By the log-softmax of the logits before each token of the response, for the model and for its reference."""
    sums, counts = _log_likelihoods(head, texts, model)
    reference = ratio.opened_reference
    if reference is not None:
        again = reload_classifier(reference)
        if again is None:  # it is in memory only
            of_reference = torch.cat([ratio.reference_likelihoods(one_text(head, text)).cpu() for text in texts])
        else:
            of_reference, _ = _log_likelihoods(head, texts, again)
        sums = sums - of_reference.to(sums)
    return ratio.beta * (sums / counts if ratio.average else sums)


def _log_likelihoods(
    head: RewardModel, texts: Sequence[EncodedText], model: Any
) -> tuple[Float[Tensor, "text"], Float[Tensor, "text"]]:
    """The log-likelihood of each response, and the number of its tokens that follow another token."""
    let_run_in_float64(model)
    device = next(model.parameters()).device
    sums, counts = [], []
    with eager_eval(model.modules()):
        for text in texts:
            ids = torch.tensor(text.ids, device=device)
            logits = model(input_ids=ids[None], use_cache=False).logits[0].to(head.reward_dtype)
            each = logits[:-1].log_softmax(dim=1).gather(1, ids[1:, None].to(logits.device))
            chosen = each[max(1, text.response_start) - 1 :]
            sums.append(chosen.sum().cpu())
            counts.append(len(chosen))
    return torch.stack(sums), torch.tensor(counts, dtype=head.reward_dtype)


def _of_steps(
    head: RewardModel, process: ProcessHead, texts: Sequence[EncodedText], model: Any
) -> Float[Tensor, "text"]:
    """The rewards from the token classifier's logits at the markers of each text."""
    choice = head.require_choice()
    rewards = []
    with eager_eval(model.modules()):
        for text in texts:
            batch = one_text(head, text)
            places = process.tokens(batch)
            logits = batch.gather(places, model(input_ids=batch.input_ids).logits).to(head.reward_dtype)
            rewards.append(pick(process.combined(logits, places, 1)[0], choice))
    return torch.stack(rewards).cpu()
