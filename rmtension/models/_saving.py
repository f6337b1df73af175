"""Saving a model: in the format it was read from, as a sequence classifier, or as a model of TransformerLens."""

import warnings
from pathlib import Path
from typing import Any

import torch

from rmtension.distributed import current
from rmtension.errors import ModelError, RMTensionWarning
from rmtension.heads._encoder_heads import PooledHead
from rmtension.heads._head import WrappedHead
from rmtension.heads._log_ratio_head import LogRatioHead
from rmtension.heads._process_head import ProcessHead
from rmtension.models._checkpoint import Checkpoint
from rmtension.models._checkpoint_folder import checkpoint_folder, require_no_adapter, write_checkpoint
from rmtension.models._classifiers import (
    build_classifier,
    current_checkpoint,
    plain_base,
    rows_to_save,
)
from rmtension.models._lens_models import is_own_model, write_model
from rmtension.models._own_format import OwnFormat, same_tensors
from rmtension.models._reward_model import RewardModel
from rmtension.models._token_models import save_token_model


def save_model(head: RewardModel, folder: str | Path) -> None:
    """Write the model of `head` with its tokenizer, in safetensors files; `RewardHead.from_pretrained` opens them.

    A head that came with its checkpoint, and that is no score layer of a classifier, is written as it was read, so that
    the checkpoint's own code reads it too; other linear heads are written as a sequence classifier. For a model of a
    TransformerLens class, which transformers cannot load, `_lens_models` writes the weights, the config and the head.
    """
    if is_own_model(head.body):
        if current().is_first:
            if head.require_choice() and head.weight is None:
                raise ModelError(
                    f"save_pretrained: a model of a TransformerLens class is written with one linear row, but this "
                    f"head is a {type(head.head).__name__}. Open the checkpoint without model_class, then save it."
                )
            row = head.require_weight(), head.bias
            write_model(head.body, row, head.pad_token_id, head.tokenizer, Path(folder))
        return
    checkpoint, _ = current_checkpoint(head, "save_pretrained")
    if not current().is_first:
        return
    folder = Path(folder)
    require_no_adapter(folder)
    own = _unchanged_format(head)
    if own is not None:
        _save_in_own_format(head, own, checkpoint.tokenizer, folder)
    elif isinstance(head.head, LogRatioHead | ProcessHead):
        save_token_model(head, folder)
    else:
        _save_classifier(head, checkpoint, folder)


def _unchanged_format(head: RewardModel) -> OwnFormat | None:
    """The format that the model was read from; None if that is a classifier's, or if the head has changed since."""
    own = None if head.checkpoint is None else head.checkpoint.own
    if own is None or own.head is None or head.head is None:
        return None
    return own if same_tensors(head.head, own.head) else None


def _save_in_own_format(head: RewardModel, own: OwnFormat, tokenizer: Any, folder: Path) -> None:
    base = plain_base(head, "save_pretrained")
    with checkpoint_folder(folder) as temporary:
        own.write(base, temporary, head.dtype)
        if tokenizer is not None:
            tokenizer.save_pretrained(temporary)
    outputs = head.require_head().outputs
    chosen = None if head.choice is None else [outputs[number] for number in head.choice]
    if head.checkpoint is not None and head.checkpoint.reads_tokens:
        warnings.warn(
            "save_pretrained: the model was saved as a language model, whose files do not say which logits are the "
            "reward. Open it again with the output=... that it was opened with.",
            RMTensionWarning,
            stacklevel=4,
        )
        return
    default = head.require_head().default or (outputs[0] if len(outputs) == 1 else None)
    if chosen is not None and chosen != [default]:
        inner = head.require_head()
        while isinstance(inner, WrappedHead):
            inner = inner.head
        marker = f"head=ProcessHead({inner.marker!r}), " if isinstance(inner, ProcessHead) else ""
        sums = dict(zip(outputs[len(outputs) - len(head.weighted_sums) :], head.weighted_sums, strict=True))
        again = f"{marker}output={chosen[0] if len(chosen) == 1 else tuple(chosen)!r}"
        if sums.keys() & set(chosen):  # sums exist in memory only
            calls = [f".output({dict(sums[name])!r})" for name in chosen if name in sums]
            again = f"{marker}output='all', and call {' and '.join(calls)}"
        warnings.warn(
            f"save_pretrained: all outputs of the head were saved, and the reward here is {chosen}. Open the model "
            f"again with {again}.",
            RMTensionWarning,
            stacklevel=4,
        )


def _save_classifier(head: RewardModel, checkpoint: Checkpoint, folder: Path) -> None:
    """Write the model as a sequence classifier of transformers.

    The config gets the head's pad token. Warns if there is no pad token, because transformers then scores one text at a
    time; if the head has a bias, which is written as `score.bias` and which transformers ignores; and if transformers 4
    computes other rewards, because of how the model scales rotary angles.
    """
    classifier = build_classifier(head)
    state = classifier.state_dict()
    # The modules of an encoder's head have their biases among them.
    biases = torch.zeros(1) if isinstance(head.head, PooledHead) else rows_to_save(head)[1]
    if biases.any():
        state["score.bias"] = biases.float()
    write_checkpoint(classifier, state, checkpoint.tokenizer, folder)
    if head.pad_token_id is None:
        warnings.warn(
            "save_pretrained: the checkpoint has no pad token, because this head reads the last token of every text. "
            "So transformers scores one text at a time. To score batches, set config.pad_token_id to a token that no "
            "text ends with.",
            RMTensionWarning,
            stacklevel=4,
        )
    if biases.any():
        constants = ", ".join(f"{float(bias):.4g}" for bias in biases[:3])
        warnings.warn(
            f"save_pretrained: the head has a bias of {constants}, which transformers' classifiers ignore. It is "
            "saved as 'score.bias'; without it, the rewards of transformers are smaller by that constant, and margins "
            "are the same.",
            RMTensionWarning,
            stacklevel=4,
        )
