"""Exporting a model as a transformers classifier, in memory or on disk, if its weights alone compute the reward."""

import copy
import re
import warnings
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from safetensors import SafetensorError
from torch import Tensor, nn

from rmtension._progress import without_unseen_bars
from rmtension.data._tokens import TokenBatch
from rmtension.distributed import current
from rmtension.errors import ModelError, RMTensionWarning
from rmtension.models._checkpoints import Checkpoint, reload_model
from rmtension.models._encoder_heads import PooledHead
from rmtension.models._head import LinearHead
from rmtension.models._hooks import eager_eval, own_hooks_paused
from rmtension.models._lens_models import CONFIG_FILE, is_own_model, write_model
from rmtension.models._native_run import probe_batch, run_base, stream_difference, stream_tolerance
from rmtension.models._native_weights import plain_copy
from rmtension.models._portable import make_portable, warn_of
from rmtension.models._reward_model import RewardModel
from rmtension.store._files import filled_whole

# The parameters that `save_classifier` sets.
_SCORE = {"score.weight", "score.bias"}
# Files of an earlier checkpoint in the folder, which would be read instead of the new ones.
_OTHERS = (
    *("model.safetensors", "model.safetensors.index.json"),
    *("chat_template.jinja", "special_tokens_map.json", "added_tokens.json"),
)


def save_classifier(head: RewardModel, folder: str | Path) -> None:
    """Write the model of `head` as a one-label sequence classifier (safetensors), with its tokenizer.

    For a model of a TransformerLens class, which transformers cannot load, `_lens_models` writes the weights, the
    config and the head; `RewardHead.from_pretrained` opens them.

    The config gets the head's pad token. Warns if there is no pad token, because transformers then scores one text at a
    time; if the head has a bias, which is written as `score.bias` and which transformers ignores; and if transformers 4
    computes other rewards, because of how the model scales rotary angles.
    """
    if is_own_model(head.body):
        if current().is_first:
            row = head.require_weight(), head.bias
            write_model(head.body, row, head.pad_token_id, head.tokenizer, Path(folder))
        return
    checkpoint, _ = current_checkpoint(head, "save_pretrained")
    if not current().is_first:
        return
    folder = Path(folder)
    if (folder / "adapter_config.json").exists():
        raise ModelError(
            f"folder: expected a folder without an adapter, but {folder} has an adapter_config.json, which "
            "transformers would attach to the saved model. Use another folder."
        )
    classifier = build_classifier(head)
    state = classifier.state_dict()
    biases = _biases(head)
    if biases.any():
        state["score.bias"] = biases.float()
    with filled_whole(folder, "checkpoint", seal="config.json", replaced=(*_OTHERS, CONFIG_FILE)) as temporary:
        try:
            with without_unseen_bars():
                classifier.save_pretrained(temporary, state_dict=state)
        except SafetensorError as error:
            # safetensors reports the error of the file system only as text: "... (os error 28)".
            code = re.search(r"\(os error (\d+)\)", str(error))
            raise OSError(int(code[1]) if code else 0, str(error)) from error
        if checkpoint.tokenizer is not None:
            checkpoint.tokenizer.save_pretrained(temporary)
        differences = make_portable(temporary, checkpoint.tokenizer)
    warn_of(differences, "save_pretrained")
    if head.pad_token_id is None:
        warnings.warn(
            "save_pretrained: the checkpoint has no pad token, because this head reads the last token of every text. "
            "So transformers scores one text at a time. To score batches, set config.pad_token_id to a token that no "
            "text ends with.",
            RMTensionWarning,
            stacklevel=3,
        )
    if biases.any():
        constants = ", ".join(f"{float(bias):.4g}" for bias in biases[:3])
        warnings.warn(
            f"save_pretrained: the head has a bias of {constants}, which transformers' classifiers ignore. It is "
            "saved as 'score.bias'; without it, the rewards of transformers are smaller by that constant, and margins "
            "are the same.",
            RMTensionWarning,
            stacklevel=3,
        )


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
    rows, names = _rows(head)
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


def _rows(head: RewardModel) -> tuple[Float[Tensor, "output d_model"], Sequence[str]]:
    """The rows of the score layer: the row of the chosen output, or without a choice those of all outputs."""
    if head.choice is None and isinstance(head.head, LinearHead):
        return head.head.weight, head.head.outputs
    return head.require_weight()[None], ()


def _biases(head: RewardModel) -> Float[Tensor, "output"]:
    if head.choice is None and isinstance(head.head, LinearHead):
        return head.head.bias
    if head.weight is None:
        return torch.zeros(1, dtype=torch.float64)
    return torch.tensor([head.bias], dtype=torch.float64)


def reload_classifier(head: RewardModel) -> Any:
    """The transformers model that computes the reward, from the source of `head`; None if there is no such model."""
    checkpoint = head.checkpoint
    if checkpoint is None or (checkpoint.source is not None and (checkpoint.logits is None or head.weighted_sums)):
        return None  # transformers computes no sums of outputs
    if checkpoint.source is None or checkpoint.logits is None:
        return build_classifier(head) if checkpoint.pools else None
    model = reload_model(checkpoint.source, checkpoint.logits, head.dtype)
    config = model.config.get_text_config()
    if config.pad_token_id is None:
        config.pad_token_id = head.pad_token_id
    return model if checkpoint.source.options.get("device_map") else model.to(head.device)


def current_checkpoint(head: RewardModel, what: str) -> tuple[Checkpoint, nn.Module]:
    """The checkpoint with the current weight of `head`, which may have changed, and its base model."""
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
