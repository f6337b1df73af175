"""Finding the head of a checkpoint: what is loaded for it, and how it is read from the model and its files."""

import re
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from rmtension.bodies._native_weights import active_head
from rmtension.errors import ModelError, RMTensionWarning
from rmtension.heads._computed_heads import LayeredHead
from rmtension.heads._encoder_heads import encoder_head
from rmtension.heads._head import Head, LinearHead
from rmtension.heads._head_kinds import KnownHead, known_head
from rmtension.heads._head_tensors import HeadTensors
from rmtension.heads._heads import read_head
from rmtension.heads._layers import Layers
from rmtension.heads._log_ratio_head import LogRatioHead
from rmtension.heads._outputs import ALL, choose_rows, choose_tokens
from rmtension.heads._process_head import ProcessHead
from rmtension.heads._unembedding import token_head
from rmtension.heads._unknown_heads import unknown_head
from rmtension.models._checkpoint import CLASSIFIER, CLASSIFIES_TOKENS, LANGUAGE_MODEL, Logits, score_layer
from rmtension.models._configs import stored_fields
from rmtension.models._head_files import (
    StoredHeads,
    from_head_file,
    pickled_head,
    refuse_pickled_parts,
    separate_head,
    stored_heads,
)
from rmtension.models._loading import CheckpointLocation, load_tokenizer

TOKENS = "TOKEN_CLS"  # peft's name of the task
# The head of a classifier of transformers that is no decoder.
_IS_CLASSIFIER = re.compile(r"classifier\.").match


@dataclass(frozen=True)
class HeadPlan:
    """How the head of a checkpoint is read: the class of transformers to load, and what is done with the model then.

    `skips_pad` says that the reward is read where transformers' classifiers read it. `needs_logits` says that the head
    needs the whole class, not the text model inside.
    """

    auto_class: str
    read: Callable[[Any], tuple[Head, Logits | None]]
    tokenizer: Any
    skips_pad: bool
    needs_logits: bool = True


def plan_head(name: str, location: CheckpointLocation, head: object, output: object, tokenizer: Any) -> HeadPlan:
    """Decide how the head of a checkpoint is read, before its weights are.

    `head` is the head that the user passed. If it is None, the checkpoint must be a sequence classifier, a language
    model with a value head in its folder, a model whose head a rule knows, or a language model with `output` tokens.
    Raises `ModelError` for anything else.
    """
    config = location.config
    stored = stored_heads(location.weights, width_of(config))
    classifies, is_labelled = is_classifier(location, stored), _is_labelled(location)
    given = from_head_file(head)
    known: KnownHead | None = None
    if given is None and not location.adapters:
        refuse_pickled_parts(location.files)
        known = known_head(stored.outside, stored_fields(location.weights))
    elif isinstance(given, Mapping):
        known = known_head(HeadTensors.of(given), stored_fields(location.weights))
    given = given if known is None else known.head
    if (classifies or location.task == TOKENS) and (location.adapters or given is None):
        set_outputs(location, stored)
    names: Mapping[int, str] = config.id2label
    auto_class = class_to_load(location, stored)
    if isinstance(given, LogRatioHead):
        log_ratio = given
        if classifies or is_labelled:
            raise ModelError(
                f"{name}: expected a causal language model for a LogRatioHead, got {config.architectures}. Leave out "
                "head=... to use the checkpoint's own head, or open the language model it was trained from."
            )
        return HeadPlan(
            LANGUAGE_MODEL, lambda model: (log_ratio.on(name, model), Logits(LANGUAGE_MODEL)), tokenizer, False
        )
    if isinstance(given, ProcessHead):
        process = given
        tokenizer = load_tokenizer(location) if tokenizer is None else tokenizer
        logits = Logits(CLASSIFIES_TOKENS) if is_labelled and process.step is None else None
        return HeadPlan(
            CLASSIFIES_TOKENS if logits else auto_class,
            lambda model: (process.on(_step_head(process, location, stored, model), tokenizer), logits),
            tokenizer,
            False,
            needs_logits=logits is not None,
        )
    if given is not None:
        # A head that the user passed is read where the checkpoint's own class reads it.
        skips_pad = known.skips_pad if known is not None and head is None else classifies
        return HeadPlan(
            auto_class,
            lambda _model: (read_head(given, width_of(config), names), None),
            tokenizer,
            skips_pad,
            needs_logits=classifies,
        )
    if classifies:
        if output != ALL and ("score.weight" in stored.linear or location.n_saved_outputs is not None):
            choose_rows(output, len(names), names, name)  # raises before the weights are read
        return HeadPlan(
            CLASSIFIER, lambda model: (score_head(name, model, stored), Logits(CLASSIFIER)), tokenizer, True
        )
    value = _value_head(location, stored)
    if output is not None and not is_labelled and (value is None or _has_text(output)):
        if _is_own_class(location, stored) and (output == ALL or not _has_text(output)):
            raise ModelError(_no_head(location, stored))  # a number of an unknown head, and no token
        tokenizer = load_tokenizer(location) if tokenizer is None else tokenizer
        tokens = choose_tokens(output, tokenizer)
        return HeadPlan(
            LANGUAGE_MODEL,
            lambda model: (token_head(name, model, tokens), Logits(LANGUAGE_MODEL, tokens)),
            tokenizer,
            False,
        )
    if value is None and location.task != TOKENS:
        raise ModelError(_no_head(location, stored))
    return HeadPlan(
        auto_class,
        lambda model: (read_head(score_layer(model) if value is None else value, width_of(config), names), None),
        tokenizer,
        False,
        needs_logits=False,
    )


def class_to_load(location: CheckpointLocation, stored: StoredHeads) -> str:
    """The class whose parameters have the names of the adapter's parameters; without adapters, the bare model."""
    if not location.adapters or location.task == "FEATURE_EXTRACTION":
        return "AutoModel"
    if location.task == TOKENS:
        return CLASSIFIES_TOKENS
    return CLASSIFIER if is_classifier(location, stored) else LANGUAGE_MODEL


def is_classifier(location: CheckpointLocation, stored: StoredHeads) -> bool:
    """Whether transformers reads the checkpoint as a sequence classifier, and so chooses the token to read."""
    if location.task == TOKENS:
        return False
    if (
        stored.linear
        and not location.adapters
        and not any(name.startswith(("score.", "classifier.")) for name in stored.linear)
    ):
        return False  # an own class, whatever its name (Starling's v_head)
    return (
        location.is_for("ForSequenceClassification")
        or location.task == "SEQ_CLS"
        or location.n_saved_outputs is not None
    )


def _is_labelled(location: CheckpointLocation) -> bool:
    """Whether the checkpoint is one of a token classifier."""
    return location.task == TOKENS or location.is_for("ForTokenClassification")


def set_outputs(location: CheckpointLocation, stored: StoredHeads) -> None:
    """Set the config's number of labels to the number of rows of the stored score head."""
    config, width = location.config, width_of(location.config)
    score = stored.linear.get("score.weight")
    if location.n_saved_outputs is not None:
        config.num_labels = location.n_saved_outputs
    elif score is not None:
        shape = tuple(score.shape)
        if len(shape) != 2 or shape[1] != width:
            raise ModelError(
                f"{location.files.name}: expected a score head of shape ({config.num_labels}, {width}), one row of the "
                f"model's width per output, got {shape}. Open a checkpoint whose head was trained with its model, or "
                "pass head=..."
            )
        config.num_labels = shape[0]
    elif location.adapters:
        raise ModelError(
            f"{location.files.name}: neither the adapter nor its base model holds a score head. Train the adapter with "
            "task_type='SEQ_CLS' or modules_to_save=['score'], so that it is saved with one."
        )
    elif stored.layers or (stored.outside.shapes and not any(map(_IS_CLASSIFIER, stored.outside.shapes))):
        raise ModelError(_no_head(location, stored))


def score_head(name: str, classifier: Any, stored: StoredHeads) -> Head:
    """The head of a transformers classifier."""
    score = active_head(getattr(classifier, "score", None))
    if hasattr(score, "base_layer"):
        raise ModelError(
            f"{name}: its score head is an adapter layer ({type(score).__name__}). Merge the adapter first: "
            "model.merge_and_unload()."
        )
    if not isinstance(score, nn.Linear):
        return encoder_head(name, classifier)
    head = read_head(score, names=classifier.config.id2label)
    bias = stored.linear.get("score.bias")
    if getattr(score, "bias", None) is None and bias is not None:
        assert isinstance(head, LinearHead)
        head = LinearHead(head.weight, bias.reshape(score.out_features), head.outputs)
        constant = ", ".join(f"{float(number):.4g}" for number in head.bias[:3])
        warnings.warn(
            f"{name}: the checkpoint has a score.bias of {constant}, which transformers ignores. It is added here, "
            "so rewards differ from transformers' by this constant; margins are equal.",
            RMTensionWarning,
            stacklevel=4,
        )
    return head


def width_of(config: Any) -> int | None:
    """The width of the residual stream, if the config names it."""
    width: int | None = getattr(config.get_text_config(), "hidden_size", None)
    return width


# -- inside ------------------------------------------------------------------------------------------------------------


def _value_head(location: CheckpointLocation, stored: StoredHeads) -> Mapping[str, Tensor] | None:
    """The head of a language model, from its own files or from a separate one; an adapter's head before its base's."""
    separate = separate_head(location.files)
    if location.adapters and not separate:
        separate = separate_head(location.weights)
    if location.adapters and separate:
        return separate
    linear = stored.linear
    differing = [key for key in separate.keys() & linear.keys() if not torch.equal(separate[key], linear[key])]
    if linear and separate and (differing or not separate.keys() <= linear.keys()):
        raise ModelError(
            f"{location.files.name}: it has two heads, {sorted(linear)[:2]} in the model and {sorted(separate)[:2]} in "
            "value_head.safetensors. Pass the right one: head=... accepts the path of a file, or the tensors."
        )
    return separate or linear or None


def _step_head(given: ProcessHead, location: CheckpointLocation, stored: StoredHeads, model: Any) -> Head:
    """The head of a step: the one that was passed, the token classifier's, or the one in the checkpoint's files."""
    width, names = width_of(location.config), location.config.id2label
    if given.step is not None:
        step = from_head_file(given.step)
        return read_head(step, width, names)
    layer = score_layer(model)
    if layer is not None:
        return read_head(layer, width, names)
    weights = [name for name in stored.layers if name.endswith(".weight")]
    if weights:
        prefix = weights[0].rsplit(".", 2)[0] + "."
        layers = Layers(stored.outside.under(prefix), what=prefix[:-1])
        return LayeredHead(layers, tuple(map(str, range(layers.n_outputs))))
    head = _value_head(location, stored)
    if head is None:
        raise ModelError(
            f"{location.files.name}: expected a token classifier or a head of its own for the steps, got "
            f"{location.config.architectures}. Pass it: head=ProcessHead(marker, step=(weight, bias))."
        )
    return read_head(head, width, names)


def _no_head(location: CheckpointLocation, stored: StoredHeads) -> str:
    """An error message: why the checkpoint has no reward, and what to do."""
    name = location.files.name
    pickled = pickled_head(location.files, is_adapter=bool(location.adapters))
    if pickled:
        return f"{name}: its safetensors files contain no head.{pickled}"
    if stored.outside.shapes:
        return unknown_head(name, stored.outside, width_of(location.config), has_steps=bool(stored.layers))
    return (
        f"{name}: expected a checkpoint of a sequence classifier, got {location.config.architectures}, which has no "
        "score head. Pass a head with head=(weight, bias), or the tokens whose logits are the reward with "
        "output=(' Yes', ' No'). A policy trained by DPO opens with a LogRatioHead of rmtension.heads as its "
        "head, or on the command line with --reference. To read activations only, use "
        "RewardHead.from_language_model."
    )


def _is_own_class(location: CheckpointLocation, stored: StoredHeads) -> bool:
    """Whether the checkpoint has tensors of a head that no rule knows, so that it is no plain language model."""
    is_plain = location.is_for("ForCausalLM") or location.is_for("ForConditionalGeneration")
    return bool(stored.layers) or (bool(stored.outside.shapes) and not is_plain)


def _has_text(output: object) -> bool:
    return any(isinstance(row, str) for row in (output if isinstance(output, tuple | list) else [output]))
