"""Exporting a model: as a classifier of transformers, in memory or on disk, with what its weights alone compute."""

import copy
import re
import warnings
from collections.abc import Callable
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
from rmtension.models._heads import LinearHead
from rmtension.models._hooks import eager_eval, own_hooks_paused
from rmtension.models._lens_models import CONFIG_FILE, is_own_model, write_model
from rmtension.models._native_run import probe_batch, run_base
from rmtension.models._native_weights import plain_copy
from rmtension.models._portable import make_portable, warn_of
from rmtension.models._reward_model import RewardModel
from rmtension.store._files import filled_whole

# What `save_classifier` sets by itself.
_SCORE = {"score.weight", "score.bias"}
# Files of a checkpoint that was there before, which would be read in place of what is written now.
_OTHERS = (
    *("model.safetensors", "model.safetensors.index.json"),
    *("chat_template.jinja", "special_tokens_map.json", "added_tokens.json"),
)


def save_classifier(head: RewardModel, folder: str | Path) -> None:
    """Write the model of `head` as a one-label sequence classifier (safetensors), with its tokenizer.

    A model of TransformerLens' own has no class of transformers: `_lens_models` writes its weights, its config
    and the head, which `RewardHead.from_pretrained` opens.

    The config gets the head's pad token: where it has none, the reward is read at the last token whichever it is, and
    transformers scores one text at a time. A bias of the head, for which transformers has no place, is written as
    `score.bias`: `RewardHead.from_pretrained` reads it back, transformers leaves it out. The folder is read by
    transformers 4 as by 5, but for a few ways of scaling rotary angles. All three warn.
    """
    if is_own_model(head.body):
        if current().is_first:
            linear = LinearHead(head.require_weight(), head.bias)
            write_model(head.body, linear, head.pad_token_id, head.tokenizer, Path(folder))
        return
    checkpoint, _ = current_checkpoint(head, "save_pretrained")
    if not current().is_first:
        return
    folder = Path(folder)
    if (folder / "adapter_config.json").exists():
        raise ModelError(
            f"folder: {folder} holds an adapter (adapter_config.json), which transformers would put on the model that "
            "is written there. Name another folder."
        )
    classifier = build_classifier(head)
    state = classifier.state_dict()
    if head.bias:
        state["score.bias"] = torch.tensor([head.bias], dtype=torch.float32)
    with filled_whole(folder, "checkpoint", seal="config.json", replaced=(*_OTHERS, CONFIG_FILE)) as place:
        try:
            with without_unseen_bars():
                classifier.save_pretrained(place, state_dict=state)
        except SafetensorError as error:
            # What the file system said comes as text alone: "... (os error 28)".
            found = re.search(r"\(os error (\d+)\)", str(error))
            raise OSError(int(found[1]) if found else 0, str(error)) from error
        if checkpoint.tokenizer is not None:
            checkpoint.tokenizer.save_pretrained(place)
        differences = make_portable(place, checkpoint.tokenizer)
    warn_of(differences, "save_pretrained")
    if head.pad_token_id is None:
        warnings.warn(
            "save_pretrained: this head reads the last token of every text, and the checkpoint has no pad token, so "
            "that transformers scores it one text at a time. To score batches, set config.pad_token_id to a token that "
            "no text ends with.",
            RMTensionWarning,
            stacklevel=3,
        )
    if head.bias:
        warnings.warn(
            f"save_pretrained: the head has a bias of {head.bias:.4g}, for which transformers' classifiers have no "
            "place. It is in the file as 'score.bias'; transformers leaves it out, so that its rewards are smaller by "
            "that constant. Margins are the same.",
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
    config: Any = copy.deepcopy(base.config)
    config.num_labels = 1
    config.get_text_config().pad_token_id = head.pad_token_id
    try:
        with torch.device("meta"), torch.random.fork_rng(devices=[]):
            build: Any = AutoModelForSequenceClassification.from_config
            classifier = build(config, trust_remote_code=checkpoint.trust_remote_code)
    except ValueError as error:
        raise ModelError(f"{checkpoint.name}: transformers has no sequence classifier for it ({error}).") from error
    expected = set(classifier.state_dict())
    setattr(classifier, classifier.base_model_prefix, base)
    classifier.score = nn.Linear(head.d_model, 1, bias=False, device="meta")
    classifier.score.weight = nn.Parameter(head.require_weight()[None].to(head.dtype, copy=True), requires_grad=False)
    other = sorted((set(classifier.state_dict()) ^ expected) - _SCORE)
    if other:
        raise ModelError(
            f"{checkpoint.name}: its weights are not those of a {type(classifier).__name__}; only one of the two has "
            f"{other[:3]}. Modules inside the model were replaced or wrapped; undo that, then save."
        )
    return classifier


def reload_classifier(head: RewardModel) -> Any:
    """The model of transformers that makes the reward, from where `head` came; None where transformers has none."""
    checkpoint = head.checkpoint
    if checkpoint is None or (checkpoint.source is not None and checkpoint.logits is None):
        return None
    if checkpoint.source is None or checkpoint.logits is None:
        return build_classifier(head) if checkpoint.pools else None
    model = reload_model(checkpoint.source, checkpoint.logits, head.dtype)
    config = model.config.get_text_config()
    if config.pad_token_id is None:
        config.pad_token_id = head.pad_token_id
    return model if checkpoint.source.options.get("device_map") else model.to(head.device)


def current_checkpoint(head: RewardModel, what: str) -> tuple[Checkpoint, nn.Module]:
    """The checkpoint with what `head` is today (its weight may have been changed since), and its base model."""
    checkpoint = head.checkpoint
    if checkpoint is None or checkpoint.base is None or head.body.native is None:
        raise ModelError(
            f"{what}: this head's weights are TransformerLens' conversion, not transformers' own. Open the checkpoint "
            "with RewardHead.from_pretrained or from_classifier, without model_class and process_weights."
        )
    today = replace(
        checkpoint,
        head=LinearHead(head.require_weight(), head.bias),
        pad_token_id=head.pad_token_id,
        tokenizer=head.tokenizer,
    )
    return today, checkpoint.base


def require_same_stream(
    head: RewardModel,
    inside: AbstractContextManager[object],
    run: Callable[[TokenBatch], Float[Tensor, "row token d_model"]],
    what: str,
) -> None:
    """Raise `ModelError` unless `run`, on a probe text, gives the residual stream of the model `inside` a context.

    A copy has nothing of contexts that are entered now. It has no hooks of the user either, but those count.
    """
    batch = probe_batch(min(12, head.max_length, head.body.n_embeddings), head.device)
    with torch.no_grad():
        with own_hooks_paused(head.body.modules()), inside:
            expected = head.residual(batch).double()
        found = run(batch).double()
    difference = float((found - expected).abs().max() / expected.abs().max().clamp(min=1e-12))
    # Rounding of the stream; half precision rounds every layer to 3 or 2 digits, in another order after an edit.
    tolerance = {torch.float16: 0.05, torch.bfloat16: 0.2}.get(head.dtype, 1e-4)
    if not difference <= tolerance:
        raise ModelError(
            f"{what}: the weights alone do not compute what the model does: on a probe text their residual stream is "
            f"off by {difference:.1e} of its size. Hooks, and a forward that was replaced on a module, are not in the "
            "weights; remove them first (`handle.remove()`, `del module.forward`), or use AblationContext, which needs "
            "no weights."
        )


def run_eagerly(base: nn.Module, batch: TokenBatch) -> Float[Tensor, "row token d_model"]:
    """The residual stream of transformers' own modules."""
    with eager_eval(base.modules()):
        return run_base(base, batch)
