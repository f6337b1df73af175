"""A transformers classifier of a model in memory, if its weights alone compute the reward."""

import copy
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from rmtension.bodies._hooks import eager_eval, own_hooks_paused
from rmtension.bodies._native_run import probe_batch, run_base, stream_difference, stream_tolerance
from rmtension.bodies._native_weights import plain_copy
from rmtension.data._tokens import TokenBatch
from rmtension.errors import ModelError
from rmtension.heads._encoder_heads import PooledHead
from rmtension.heads._head import LinearHead
from rmtension.models._checkpoint import Checkpoint
from rmtension.models._checkpoints import reload_model
from rmtension.models._reward_model import RewardModel

# The parameters that saving sets.
_SCORE = {"score.weight", "score.bias"}


def build_classifier(head: RewardModel) -> Any:
    """A classifier of transformers around the model of `head`.

    It shares the weights; where some have adapters or are parametrised, it gets copies. Raises `ModelError` where the
    weights alone do not compute what the model does.
    """
    from transformers import AutoModelForSequenceClassification

    checkpoint, base = current_checkpoint(head, "build_classifier")
    base = plain_copy(base)
    require_same_stream(head, nullcontext(), partial(run_eagerly, base), "save_pretrained")
    if isinstance(head.head, PooledHead):
        return head.head.classifier_with(base)
    config: Any = copy.deepcopy(base.config)
    rows, _, names = rows_to_save(head)
    config.num_labels = len(rows)
    if len(rows) > 1:
        config.id2label = dict(enumerate(names))
        config.label2id = {name: number for number, name in enumerate(names)}
    config.get_text_config().pad_token_id = head.pad_token_id
    try:
        with torch.device("meta"), torch.random.fork_rng(devices=[]):
            build: Any = AutoModelForSequenceClassification.from_config
            classifier = build(config, trust_remote_code=checkpoint.trust_remote_code)
    except ValueError as error:
        raise ModelError(f"{checkpoint.name}: transformers has no sequence classifier for it ({error}).") from error
    expected = set(classifier.state_dict())
    setattr(classifier, classifier.base_model_prefix, base)
    classifier.score = nn.Linear(head.d_model, len(rows), bias=False, device="meta")
    classifier.score.weight = nn.Parameter(rows.to(head.dtype, copy=True), requires_grad=False)
    other = sorted((set(classifier.state_dict()) ^ expected) - _SCORE)
    if other:
        raise ModelError(
            f"{checkpoint.name}: expected the weights of a {type(classifier).__name__}, but only one of the two has "
            f"{other[:3]}. Modules inside the model were replaced or wrapped; undo that, then save."
        )
    return classifier


def rows_to_save(
    head: RewardModel,
) -> tuple[Float[Tensor, "output d_model"], Float[Tensor, "output"], Sequence[str]]:
    """The rows of a score layer and their biases: those of the chosen output, or of all, with names, without a choice.

    Raises `ModelError` for a head that is not linear, which no classifier of transformers computes.
    """
    linear = head.head
    if head.choice is None and isinstance(linear, LinearHead):
        return linear.weight, linear.bias, linear.outputs
    if head.weight is None and linear is not None:
        raise ModelError(
            f"save_pretrained: transformers has no class for the head {type(linear).__name__}, and this head was "
            "not read from the files of the checkpoint, which could be written again. Save the body with "
            "head.body.native.save_pretrained(folder), and pass the head again when you open it: head=..."
        )
    return head.require_weight()[None], torch.tensor([head.bias], dtype=torch.float64), ()


def reload_classifier(head: RewardModel) -> Any:
    """The transformers model that computes the reward, from the source of `head`; None if there is no such model."""
    checkpoint = head.checkpoint
    if checkpoint is None or (checkpoint.source is not None and (checkpoint.logits is None or head.weighted_sums)):
        return None  # transformers computes no sums of outputs
    if checkpoint.source is None or checkpoint.logits is None:
        return build_classifier(head) if checkpoint.pools and head.weight is not None else None
    model = reload_model(checkpoint.source, checkpoint.logits, head.dtype)
    config = model.config.get_text_config()
    if config.pad_token_id is None:
        config.pad_token_id = head.pad_token_id
    return model if checkpoint.source.options.get("device_map") else model.to(head.device)


def current_checkpoint(head: RewardModel, what: str) -> tuple[Checkpoint, nn.Module]:
    """The checkpoint with the current weight of `head`, which may have changed, and its base model."""
    head.require_same_head()
    checkpoint = head.checkpoint
    if checkpoint is None or checkpoint.base is None or head.body.native is None:
        raise ModelError(
            f"{what}: expected weights of transformers, but this model has weights that TransformerLens converted. "
            "Open the checkpoint with RewardHead.from_pretrained or from_classifier, without model_class and "
            "process_weights."
        )
    updated = replace(
        checkpoint,
        head=head.head,
        choice=head.choice,
        pad_token_id=head.pad_token_id,
        tokenizer=head.tokenizer,
    )
    return updated, checkpoint.base


def require_same_stream(
    head: RewardModel,
    inside: AbstractContextManager[object],
    run: Callable[[TokenBatch], Float[Tensor, "row token d_model"]],
    what: str,
) -> None:
    """Raise `ModelError` unless `run` gives the residual stream of the model `inside` a context, on a probe text.

    Contexts that are entered now are ignored. Hooks of the user are not: the copy lacks them, so they raise the error.
    """
    batch = probe_batch(min(12, head.max_length, head.body.n_embeddings), head.device)
    with torch.no_grad():
        with own_hooks_paused(head.body.modules()), inside:
            expected = head.residual(batch).double()
        actual = run(batch).double()
    difference = stream_difference(actual, expected)
    if not difference <= stream_tolerance(head.dtype):
        raise ModelError(
            f"{what}: the weights alone do not compute what the model computes: on a probe text their residual stream "
            f"is off by {difference:.1e} of its size. Hooks, and a forward that was replaced on a module, are not in "
            "the weights; remove them first (`handle.remove()`, `del module.forward`), or use AblationContext, which "
            "does not edit weights."
        )


def run_eagerly(base: nn.Module, batch: TokenBatch) -> Float[Tensor, "row token d_model"]:
    """The residual stream of transformers' own modules."""
    with eager_eval(base.modules()):
        return run_base(base, batch)
