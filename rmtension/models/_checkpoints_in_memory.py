"""The checkpoint of a model of transformers that is in memory: its modules and weights are shared, not copied."""

import copy
from typing import Any

from rmtension.bodies._native_weights import active_head, refuse_packed_weights
from rmtension.bodies._run_modes import unwrapped
from rmtension.errors import ModelError
from rmtension.heads._head import Head
from rmtension.heads._head_kinds import KnownHead
from rmtension.heads._heads import read_head
from rmtension.heads._log_ratio_head import LogRatioHead
from rmtension.heads._models_in_memory import head_in_memory
from rmtension.heads._outputs import choose_outputs
from rmtension.heads._process_head import ProcessHead
from rmtension.models._adapters import inside_peft
from rmtension.models._checkpoint import (
    CLASSIFIER,
    CLASSIFIES_TOKENS,
    LANGUAGE_MODEL,
    Checkpoint,
    Logits,
    score_layer,
)
from rmtension.models._checkpoint_heads import score_head, width_of
from rmtension.models._head_files import StoredHeads, from_head_file
from rmtension.models._loading import refuse_offloaded, refuse_quantised
from rmtension.models._pad_token import pad_token_id
from rmtension.models._refused_kinds import refuse_other_kinds


def checkpoint_of(
    classifier: Any, tokenizer: Any, pad_token: str | None, head: object = None, output: object = None
) -> Checkpoint:
    """The checkpoint of a transformers classifier in memory, with its modules and weights, which are not copied."""
    classifier = inside_peft(unwrapped(classifier))
    name = type(classifier).__name__
    if isinstance(head, LogRatioHead | ProcessHead):
        return _with_token_head(name, classifier, tokenizer, head, output)
    is_standard = name.endswith("ForSequenceClassification")
    known: KnownHead | None = None
    if head is None and not type(classifier).__module__.startswith("transformers."):
        known = head_in_memory(classifier)
    if known is None and not is_standard and (head is None or not hasattr(classifier, "base_model")):
        raise ModelError(
            f"model: expected a ...ForSequenceClassification of transformers, got {name}. Open a language model with "
            "head=LogRatioHead(...), a token classifier with head=ProcessHead(marker), and a hooked model with "
            "RewardHead(model, weight)."
        )
    refuse_packed_weights(name, classifier)
    refuse_quantised(name, classifier.config)
    refuse_other_kinds(name, classifier.config)
    refuse_offloaded(name, classifier)
    logits: Logits | None = None
    if known is not None:
        read = copy.deepcopy(known.head)  # its tensors are the model's, whose later changes must be noticed
        choice = choose_outputs(output, read, name)
    elif head is None:
        read = score_head(name, classifier, StoredHeads({}))
        choice = choose_outputs(output, read, name)
        logits = Logits(CLASSIFIER)
    else:
        given = from_head_file(head)
        read = read_head(given, width_of(classifier.config), classifier.config.id2label)
        choice = choose_outputs(output, read, "head")
    base = unwrapped(classifier.base_model)
    pools = is_standard if known is None else known.skips_pad
    pad = pad_token_id(name, base.config, tokenizer, pad_token, pools, is_headless=False)
    live = classifier if head is None else None
    return Checkpoint(base, read, choice, tokenizer, pad, name, pools, logits, source=None, classifier=live)


def _with_token_head(
    name: str, model: Any, tokenizer: Any, head: LogRatioHead | ProcessHead, output: object
) -> Checkpoint:
    """The checkpoint of a language model or token classifier in memory, for a head that reads several tokens."""
    refuse_packed_weights(name, model)
    refuse_quantised(name, model.config)
    refuse_offloaded(name, model)
    base = unwrapped(model.base_model)
    if isinstance(head, LogRatioHead):
        own: Head = head.on(name, model)
        logits: Logits | None = Logits(LANGUAGE_MODEL)
    else:
        step = head.step if head.step is not None else active_head(score_layer(model))
        own, logits = head.on(read_head(step, width_of(model.config), model.config.id2label), tokenizer), None
        if head.step is None and name.endswith("ForTokenClassification"):
            logits = Logits(CLASSIFIES_TOKENS)
    choice = choose_outputs(output, own, name)
    live = model if isinstance(own, ProcessHead) and logits is not None else None
    return Checkpoint(base, own, choice, tokenizer, None, name, False, logits, source=None, classifier=live)
