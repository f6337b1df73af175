"""Exporting models with heads that read several tokens, as the class of transformers that computes their logits."""

import warnings
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn

from rmtension.distributed import current
from rmtension.errors import ModelError, RMTensionWarning
from rmtension.heads._head import LinearHead
from rmtension.heads._log_ratio_head import LogRatioHead
from rmtension.heads._process_head import ProcessHead
from rmtension.models._checkpoint import score_layer
from rmtension.models._checkpoint_folder import write_checkpoint
from rmtension.models._classifiers import current_checkpoint, model_around, name_labels, require_weights
from rmtension.models._reward_model import RewardModel


def save_token_model(head: RewardModel, folder: str | Path) -> None:
    """Write the model as a causal language model (`LogRatioHead`) or a token classifier (`ProcessHead`).

    The tokenizer is written too; a reference is not, which a warning says. Raises `ModelError` where transformers has
    no class with such a head.
    """
    checkpoint, _ = current_checkpoint(head, "save_pretrained")
    if not current().is_first:
        return
    model = build_language_model(head) if isinstance(head.head, LogRatioHead) else build_token_classifier(head)
    write_checkpoint(model, model.state_dict(), checkpoint.tokenizer, Path(folder))
    if isinstance(head.head, LogRatioHead) and head.head.opened_reference is not None:
        warnings.warn(
            "save_pretrained: the folder holds the policy, as a causal language model, without its reference. Open it "
            f"with head=LogRatioHead(reference, beta={head.head.beta:g}).",
            RMTensionWarning,
            stacklevel=3,
        )


def build_language_model(head: RewardModel) -> Any:
    """The causal language model of transformers whose log-probabilities are the reward; it shares the weights."""
    assert isinstance(head.head, LogRatioHead)
    assert head.head.unembedding is not None
    model, expected = model_around(head, "CausalLM", lambda config: None)
    unembedding, layer = head.head.unembedding, model.get_output_embeddings()
    if model.config.get_text_config().tie_word_embeddings:
        model.tie_weights()
    else:
        layer.weight = nn.Parameter(unembedding.weight.detach(), requires_grad=False)
    if unembedding.bias is not None:
        layer.bias = nn.Parameter(unembedding.bias.detach(), requires_grad=False)
    return require_weights(model, expected)


def build_token_classifier(head: RewardModel) -> Any:
    """The token classifier of transformers whose classes at the markers are the reward; it shares the weights."""
    assert isinstance(head.head, ProcessHead)
    step = head.head.step
    if not isinstance(step, LinearHead):
        raise ModelError(
            f"save_pretrained: transformers has no token classifier whose head is a {type(step).__name__}. Save the "
            "base model with head.checkpoint.base.save_pretrained(folder), and keep the head's tensors."
        )
    model, expected = model_around(head, "TokenClassification", partial(name_labels, names=step.outputs))
    layer = score_layer(model)
    if not isinstance(layer, nn.Linear):
        raise ModelError(f"save_pretrained: {type(model).__name__} has no linear layer 'score' or 'classifier'.")
    bias: Any = layer.bias
    if bias is None and step.bias.any():
        raise ModelError(f"save_pretrained: the head has a bias, but {type(model).__name__} has none.")
    layer.weight = nn.Parameter(step.weight.detach().to(head.dtype, copy=True), requires_grad=False)
    if bias is not None:
        layer.bias = nn.Parameter(step.bias.to(head.device, head.dtype), requires_grad=False)
    return require_weights(model, expected)
