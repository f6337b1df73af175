"""Opening the checkpoint of a reward model: transformers loads it from safetensors, and its scalar head is kept."""

import re
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rmtension.errors import ModelError, RMTensionWarning
from rmtension.models._adapters import active_head, inside_peft
from rmtension.models._configs import stored_fields
from rmtension.models._encoder_heads import PooledHead, encoder_head
from rmtension.models._head import Head, LinearHead
from rmtension.models._head_files import (
    HeadTensors,
    StoredHeads,
    pickled_head,
    read_head_file,
    refuse_pickled_parts,
    separate_head,
    stored_heads,
    stored_tensor,
)
from rmtension.models._head_kinds import KnownHead, known_head
from rmtension.models._heads import read_head
from rmtension.models._hooks import unwrapped
from rmtension.models._loading import (
    CheckpointLocation,
    LoadOptions,
    find_checkpoint,
    load_model,
    load_tokenizer,
    placement_of,
    refuse_offloaded,
    refuse_quantised,
)
from rmtension.models._log_ratio_head import LogRatioHead
from rmtension.models._models_in_memory import head_in_memory
from rmtension.models._native_weights import refuse_packed_weights
from rmtension.models._outputs import ALL, choose_outputs, choose_rows, choose_tokens
from rmtension.models._own_format import OwnFormat
from rmtension.models._process_head import ProcessHead, StepLayers
from rmtension.models._unembedding import token_head
from rmtension.models._unknown_heads import unknown_head

_CLASSIFIER, _LANGUAGE_MODEL = "AutoModelForSequenceClassification", "AutoModelForCausalLM"
_CLASSIFIES_TOKENS = "AutoModelForTokenClassification"
_TOKENS = "TOKEN_CLS"  # peft's name of the task
# The head of a classifier of transformers, and of one that is no decoder.
_IS_SCORE = re.compile(r"(score|classifier)\.").match
_IS_CLASSIFIER = re.compile(r"classifier\.").match


@dataclass(frozen=True)
class Source:
    """Where a checkpoint was read from, and how, to read it again; `head` is the head that the user passed, or None."""

    name: str
    head: object
    output: object
    options: LoadOptions


@dataclass(frozen=True)
class Logits:
    """The reward as logits of a transformers class: that of one row, of the first minus the second, or not chosen."""

    auto_class: str
    rows: tuple[int, ...] | None


@dataclass(frozen=True)
class Checkpoint:
    """A base model of transformers with what a reward head needs; `head` is None for activations only.

    `choice` is the number of the output that is the reward, two numbers for a difference, or None for no choice.
    `pools` says that the reward is read where transformers' classifiers read it. `logits` says which logits of
    transformers the reward is; None if transformers does not compute it. `base` is None if it was converted, and can be
    read again from `source`. `classifier` is the model in memory whose score layer `head` was read from.
    `own` is the format of the checkpoint if its head is no score layer of a classifier.
    """

    base: nn.Module | None
    head: Head | None
    choice: tuple[int, ...] | None
    tokenizer: Any
    pad_token_id: int | None
    name: str
    pools: bool
    logits: Logits | None
    source: Source | None
    classifier: Any = None
    own: OwnFormat | None = None

    def require_same_head(self) -> None:
        """Raise `ModelError` if the score layer of the model in memory has changed since the model was opened."""
        if self.classifier is None or self.head is None or self.logits is None:
            return
        read = dict(self.head.named_parameters()) | dict(self.head.named_buffers())
        if isinstance(self.head, LinearHead):
            read["bias"] = self.head.bias
        if any(
            not torch.equal(tensor.to(read[name]), read[name].view_as(tensor))
            for name, tensor in self.live_head.items()
        ):
            raise ModelError(
                f"{self.name}: its score layer changed after the model was opened (it was trained, or another adapter "
                "was activated), but the head is a copy of the old score layer. Open the model again with "
                "RewardHead.from_classifier."
            )

    @property
    def live_head(self) -> dict[str, Tensor]:
        """The tensors of the model in memory that the head has copies of, by their names in the head."""
        if self.classifier is None or self.logits is None:
            return {}
        if isinstance(self.head, PooledHead):
            return self.head.tensors_of(self.classifier)
        return dict(active_head(self.classifier.score).named_parameters())

    @property
    def reads_tokens(self) -> bool:
        """Whether the reward is a language model's logits of the next token."""
        return self.logits is not None and self.logits.auto_class == _LANGUAGE_MODEL

    @property
    def trust_remote_code(self) -> bool:
        """Whether code that came with the checkpoint may run."""
        return self.source is not None and self.source.options.get("trust_remote_code", False)


def open_checkpoint(
    name: str | Path, *, reward: bool, head: object = None, output: object = None, options: LoadOptions
) -> Checkpoint:
    """Load `name` (a folder or a hub name) with transformers; raises `ModelError` for what is no reward model.

    With `reward` and without `head` it must be a sequence classifier, a language model with a value head in its folder,
    or a language model with `output` tokens. `head` replaces any head of the checkpoint. An adapter is merged into its
    base. Memory: the weights once.
    """
    location = find_checkpoint(name, options)
    placement_of(options)  # raises for a wrong device before anything is read
    is_labelled = location.task == _TOKENS or location.is_for("ForTokenClassification")
    stored = stored_heads(location.weights, _width(location.config))
    classifies = _is_classifier(location, stored)
    given = read_head_file(head) if isinstance(head, str | Path) else head
    known: KnownHead | None = None
    if reward and given is None and not location.adapters:
        refuse_pickled_parts(location.files)
        known = known_head(stored.outside, stored_fields(location.weights))
    elif reward and isinstance(given, Mapping):
        known = known_head(HeadTensors.of(given), stored_fields(location.weights))
    given = given if known is None else known.head
    if (classifies or location.task == _TOKENS) and (location.adapters or (reward and given is None)):
        _set_outputs(location, stored)
    names: Mapping[int, str] = location.config.id2label
    tokenizer = options.get("tokenizer")
    auto_class = _auto_class(location, classifies)
    tokens: tuple[int, ...] = ()
    if reward and isinstance(given, LogRatioHead):
        if classifies or is_labelled:
            raise ModelError(
                f"{name}: expected a causal language model for a LogRatioHead, got {location.config.architectures}. "
                "Leave out head=... to use the checkpoint's own head, or open the language model it was trained from."
            )
        auto_class = _LANGUAGE_MODEL
    elif reward and isinstance(given, ProcessHead):
        auto_class = _CLASSIFIES_TOKENS if is_labelled and given.step is None else auto_class
    elif reward and given is None and classifies:
        auto_class = _CLASSIFIER
        if output != ALL and ("score.weight" in stored.linear or location.n_saved_outputs is not None):
            choose_rows(output, len(names), names, str(name))  # raises before the weights are read
    elif reward and given is None:
        given = _value_head(location, stored)
        if output is not None and not is_labelled and (given is None or _has_text(output)):
            tokenizer = load_tokenizer(location) if tokenizer is None else tokenizer
            auto_class, tokens = _LANGUAGE_MODEL, choose_tokens(output, tokenizer)
        elif given is None and location.task != _TOKENS:
            raise ModelError(_no_head(location, stored))
    model = load_model(location, auto_class)
    base = model.base_model
    read: Head | None = None
    logits: Logits | None = None
    choice: tuple[int, ...] | None = None
    if reward and isinstance(given, LogRatioHead):
        read, choice, logits = given.on(str(name), model), (0,), Logits(_LANGUAGE_MODEL, None)
    elif reward and isinstance(given, ProcessHead):
        tokenizer = load_tokenizer(location) if tokenizer is None else tokenizer
        read = given.on(_step_head(given, location, stored, model), tokenizer)
        choice = choose_outputs(output, read, str(name))
        logits = Logits(_CLASSIFIES_TOKENS, None) if auto_class == _CLASSIFIES_TOKENS else None
    elif tokens:
        read, choice, logits = token_head(str(name), model, tokens), (0,), Logits(_LANGUAGE_MODEL, tokens)
    elif reward and given is None and classifies:
        read = _score_head(str(name), model, stored)
        choice = choose_outputs(output, read, str(name))
        logits = Logits(_CLASSIFIER, choice)
    elif reward:
        layer = getattr(model, "score", None) or getattr(model, "classifier", None)
        read = read_head(layer if given is None else given, _width(base.config), names)
        choice = choose_outputs(output, read, "head")
    tokenizer = load_tokenizer(location) if tokenizer is None else tokenizer
    # A head that the user passed is read where the checkpoint's own class reads it.
    pools = reward and (known.skips_pad if known is not None and head is None else classifies)
    pad_token_id = _pad_token_id(name, base.config, tokenizer, options.get("pad_token"), pools, read is None)
    source = Source(str(name), head, output, options)
    own: OwnFormat | None = None
    # A language model's logits are saved as rows of a classifier, if they are linear.
    keeps_format = logits is None or (bool(tokens) and not isinstance(read, LinearHead))
    if reward and head is None and keeps_format and not location.adapters:
        own = OwnFormat.of(location.files, location.config, separate_head(location.files))
    return Checkpoint(base, read, choice, tokenizer, pad_token_id, str(name), pools, logits, source, own=own)


def reload_model(source: Source, logits: Logits, dtype: torch.dtype) -> Any:
    """Read the transformers model whose `logits` are the reward again, with its adapter attached, not merged."""
    options: LoadOptions = {**source.options, "dtype": dtype}
    location = find_checkpoint(source.name, options, local_files_only=True)  # it was downloaded when it was opened
    if logits.auto_class == _CLASSIFIER:
        _set_outputs(location, stored_heads(location.weights, _width(location.config)))
    return load_model(location, logits.auto_class, merge=False)


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
    refuse_offloaded(name, classifier)
    logits: Logits | None = None
    if known is not None:
        read = known.head
        choice = choose_outputs(output, read, name)
    elif head is None:
        read = _score_head(name, classifier, StoredHeads({}))
        choice = choose_outputs(output, read, name)
        logits = Logits(_CLASSIFIER, choice)
    else:
        given = read_head_file(head) if isinstance(head, str | Path) else head
        read = read_head(given, _width(classifier.config), classifier.config.id2label)
        choice = choose_outputs(output, read, "head")
    base = unwrapped(classifier.base_model)
    pools = is_standard if known is None else known.skips_pad
    pad_token_id = _pad_token_id(name, base.config, tokenizer, pad_token, pools, is_headless=False)
    live = classifier if head is None and known is None else None
    return Checkpoint(base, read, choice, tokenizer, pad_token_id, name, pools, logits, source=None, classifier=live)


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
        logits: Logits | None = Logits(_LANGUAGE_MODEL, None)
    else:
        layer = getattr(model, "score", None) or getattr(model, "classifier", None)
        step = head.step if head.step is not None else active_head(layer)
        own, logits = head.on(read_head(step, _width(model.config), model.config.id2label), tokenizer), None
        if head.step is None and name.endswith("ForTokenClassification"):
            logits = Logits(_CLASSIFIES_TOKENS, None)
    choice = choose_outputs(output, own, name)
    return Checkpoint(base, own, choice, tokenizer, None, name, False, logits, source=None)


def _is_classifier(location: CheckpointLocation, stored: StoredHeads) -> bool:
    """Whether transformers reads the checkpoint as a sequence classifier, and so chooses the token to read."""
    if location.task == _TOKENS:
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


def _auto_class(location: CheckpointLocation, classifies: bool) -> str:
    """The class whose parameters have the names of the adapter's parameters; without adapters, the bare model."""
    if not location.adapters or location.task == "FEATURE_EXTRACTION":
        return "AutoModel"
    if location.task == _TOKENS:
        return _CLASSIFIES_TOKENS
    return _CLASSIFIER if classifies else _LANGUAGE_MODEL


def _set_outputs(location: CheckpointLocation, stored: StoredHeads) -> None:
    """Set the config's number of labels to the number of rows of the stored score head."""
    config, width = location.config, _width(location.config)
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
    width, names = _width(location.config), location.config.id2label
    if given.step is not None:
        step = read_head_file(given.step) if isinstance(given.step, str | Path) else given.step
        return read_head(step, width, names)
    layer = getattr(model, "score", None) or getattr(model, "classifier", None)
    if layer is not None:
        return read_head(layer, width, names)
    weights = [name for name in stored.layers if name.endswith(".weight")]
    if weights:
        by_number = sorted(weights, key=lambda name: int(name.split(".")[-2]))
        found = [
            (stored_tensor(location.weights, (name,)), stored_tensor(location.weights, (name[:-6] + "bias",)))
            for name in by_number
        ]
        return StepLayers([(weight, bias) for weight, bias in found if weight is not None])
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
        return unknown_head(name, stored.outside, _width(location.config))
    return (
        f"{name}: expected a checkpoint of a sequence classifier, got {location.config.architectures}, which has no "
        "score head. Pass a head with head=(weight, bias), or the tokens whose logits are the reward with "
        "output=(' Yes', ' No'); to read activations only, use RewardHead.from_language_model."
    )


def _score_head(name: str, classifier: Any, stored: StoredHeads) -> Head:
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


def _width(config: Any) -> int | None:
    width: int | None = getattr(config.get_text_config(), "hidden_size", None)
    return width


def _has_text(output: object) -> bool:
    return any(isinstance(row, str) for row in (output if isinstance(output, tuple | list) else [output]))


def _pad_token_id(
    name: str | Path, config: Any, tokenizer: Any, pad_token: str | None, pools: bool, is_headless: bool
) -> int | None:
    """The id of the token that is skipped at the end of a text; None skips nothing."""
    configured: int | None = getattr(config.get_text_config(), "pad_token_id", None)
    if pad_token is not None:
        token_id = None if tokenizer is None else tokenizer.get_vocab().get(pad_token)
        if token_id is None:
            raise ModelError(
                f"pad_token: {pad_token!r} is not in the vocabulary of {name}. Pass a token of tokenizer.get_vocab()."
            )
        if pools and configured not in (None, token_id):
            raise ModelError(
                f"pad_token: {pad_token!r} is token {token_id}, but transformers skips token {configured}, the "
                f"pad_token_id in the config of {name}. Leave pad_token out, or change the config."
            )
        return int(token_id)
    if not pools:
        # A value head or a token's logit is read at the last token, whichever it is. A model without a reward skips
        # pad tokens, so that its last token is that of the reward models it is compared with.
        return configured if is_headless else None
    if configured is None and tokenizer is not None and tokenizer.pad_token_id is None:
        raise ModelError(
            f"{name}: neither its config nor its tokenizer has a pad token, but transformers reads the reward at the "
            f"last token that is not a pad token. Pass it: pad_token={tokenizer.eos_token or '<a token>'!r}."
        )
    return configured
