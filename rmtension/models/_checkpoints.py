"""Opening a checkpoint: transformers loads it from safetensors, and its head is read."""

from pathlib import Path
from typing import Any

import torch

from rmtension.bodies._text_models import media_tokens, text_model
from rmtension.heads._head import Head, LinearHead
from rmtension.heads._outputs import choose_outputs
from rmtension.heads._process_head import ProcessHead
from rmtension.models._checkpoint import CLASSIFIER, Checkpoint, Logits, Source
from rmtension.models._checkpoint_heads import TOKENS, class_to_load, is_classifier, plan_head, set_outputs, width_of
from rmtension.models._head_files import separate_head, stored_heads
from rmtension.models._loading import (
    CheckpointLocation,
    LoadOptions,
    find_checkpoint,
    load_model,
    load_tokenizer,
    placement_of,
)
from rmtension.models._own_format import OwnFormat
from rmtension.models._pad_token import pad_token_id
from rmtension.models._refused_kinds import refuse_other_kinds


def open_checkpoint(
    name: str | Path, *, reward: bool, head: object = None, output: object = None, options: LoadOptions
) -> Checkpoint:
    """Load `name` (a folder or a hub name) with transformers; raises `ModelError` for what is no reward model.

    `head` replaces any head of the checkpoint; see `plan_head` for what is read without it. An adapter is merged into
    its base. Without `reward` no head is read. Memory: the weights once.
    """
    location = find_checkpoint(name, options)
    refuse_other_kinds(str(name), location.config)
    placement_of(options)  # raises for a wrong device before anything is read
    tokenizer = options.get("tokenizer")
    plan = plan_head(str(name), location, head, output, tokenizer) if reward else None
    model = load_model(location, _class_without_head(location) if plan is None else plan.auto_class)
    base = model.base_model
    media = media_tokens(base.config)
    if plan is None or not plan.needs_logits:
        base = text_model(base)
    read: Head | None = None
    logits: Logits | None = None
    choice: tuple[int, ...] | None = None
    if plan is not None:
        read, logits = plan.read(model)
        is_token = logits is not None and logits.tokens is not None
        choice = (0,) if is_token else choose_outputs(output, read, str(name) if head is None else "head")
        tokenizer = plan.tokenizer
    tokenizer = load_tokenizer(location) if tokenizer is None else tokenizer
    pools = plan is not None and plan.skips_pad
    pad = pad_token_id(name, base.config, tokenizer, options.get("pad_token"), pools, is_headless=read is None)
    source = Source(str(name), head, output, options)
    is_own = head is None or (isinstance(head, ProcessHead) and head.step is None)
    own = _own_format(location, read, logits) if plan is not None and is_own else None
    return Checkpoint(base, read, choice, tokenizer, pad, str(name), pools, logits, source, own=own, media_tokens=media)


def reload_model(source: Source, logits: Logits, dtype: torch.dtype) -> Any:
    """Read the transformers model whose `logits` are the reward again, with its adapter attached, not merged."""
    options: LoadOptions = {**source.options, "dtype": dtype}
    location = find_checkpoint(source.name, options, local_files_only=True)  # it was downloaded when it was opened
    if logits.auto_class == CLASSIFIER:
        set_outputs(location, stored_heads(location.weights, width_of(location.config)))
    return load_model(location, logits.auto_class, merge=False)


def _class_without_head(location: CheckpointLocation) -> str:
    stored = stored_heads(location.weights, width_of(location.config))
    if location.adapters and (is_classifier(location, stored) or location.task == TOKENS):
        set_outputs(location, stored)
    return class_to_load(location, stored)


def _own_format(location: CheckpointLocation, head: Head | None, logits: Logits | None) -> OwnFormat | None:
    """The format of a checkpoint whose head is no score layer of a classifier, to save it as it was read."""
    # A language model's logits are saved as rows of a classifier, if they are linear.
    is_token = logits is not None and logits.tokens is not None
    if location.adapters or not (logits is None or (is_token and not isinstance(head, LinearHead))):
        return None
    return OwnFormat.of(location.files, location.config, separate_head(location.files), head)
