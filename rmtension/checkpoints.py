"""Opening a reward model's checkpoint: transformers loads it, safetensors only, and its scalar head stays with it."""

import json
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypedDict

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from rmtension.errors import ModelError, OptionError, RMTensionWarning
from rmtension.heads import LinearHead, head_keys, read_head
from rmtension.progress import without_unseen_bars

_DRAWN = "which transformers would draw at random"


class LoadOptions(TypedDict, total=False):
    """How `RewardHead.from_pretrained` and `from_language_model` load a checkpoint.

    Attributes:
        dtype: float32 by default; with half precision the head's product stays in float32.
        device: the first GPU if there is one, otherwise the CPU.
        device_map: passed to transformers (needs accelerate): a model larger than a device, layer by layer; instead of
            `device`. Weights on disk or on the meta device are refused.
        n_devices: spread the model over this many GPUs; short for a balanced `device_map`.
        revision: of a hub name.
        tokenizer: used in place of the checkpoint's own.
        pad_token: which token transformers skips at the end of a text, where neither config nor tokenizer says so.
        trust_remote_code: False; True runs code that comes with the checkpoint.
    """

    dtype: torch.dtype
    device: torch.device | str | None
    device_map: str | dict[str, Any] | None
    n_devices: int | None
    revision: str | None
    tokenizer: Any
    pad_token: str | None
    trust_remote_code: bool


@dataclass(frozen=True)
class Source:
    """Where a checkpoint was read from, and how, to read it again; `head` is what the user gave in place of its own."""

    name: str
    head: object
    options: LoadOptions


@dataclass(frozen=True)
class Checkpoint:
    """A base model of transformers with what a reward head needs; `head` is None where only activations are wanted.

    `is_classifier` says whether transformers itself makes the reward of it: from `source`, or from the live model.
    `base` is None once a conversion has taken its place and it can be read again.
    """

    base: nn.Module | None
    head: LinearHead | None
    tokenizer: Any
    pad_token_id: int | None
    name: str
    is_classifier: bool
    source: Source | None

    @property
    def trust_remote_code(self) -> bool:
        """Whether code that came with the checkpoint may run."""
        return self.source is not None and self.source.options.get("trust_remote_code", False)


def open_checkpoint(name: str | Path, *, reward: bool, head: object = None, options: LoadOptions) -> Checkpoint:
    """Load `name` (a folder, or a hub name) with transformers; raises `ModelError` for what is no reward model.

    With `reward` and no `head` it must be a sequence classifier with one output, or a language model saved with a
    value head; `head` is taken in place of any that the checkpoint has. Memory: the weights once.
    """
    from transformers import AutoConfig, AutoModel, AutoModelForSequenceClassification

    unknown = sorted(set(options) - set(LoadOptions.__annotations__))
    if unknown:
        raise OptionError(
            f"from_pretrained: unknown options {unknown}; expected {sorted(LoadOptions.__annotations__)}."
        )
    is_path = isinstance(name, Path) or Path(name).is_absolute() or name.startswith((".", "~"))
    if is_path and not Path(name).is_dir():
        raise ModelError(f"name_or_path: expected the folder of a checkpoint or a hub name, and {name} is no folder.")
    revision = options.get("revision")
    origin: dict[str, Any] = {"revision": revision, "trust_remote_code": options.get("trust_remote_code", False)}
    placement, device = _placement(options)
    config = _load("config", name, AutoConfig.from_pretrained, **origin)
    _refuse_quantised(name, config)
    architectures = config.architectures or []
    is_classifier = reward and head is None and any(a.endswith("ForSequenceClassification") for a in architectures)
    stored = _stored_heads(name, revision)
    if is_classifier:
        _require_one_output(name, config, stored)
    elif reward and head is None and not stored:
        raise ModelError(
            f"{name}: expected a checkpoint of a sequence classifier, got {architectures}: it has no score head. A "
            "language model is not a reward model; give it one with head=(weight, bias), or read its activations alone "
            "with RewardHead.from_language_model."
        )
    loader = AutoModelForSequenceClassification if is_classifier else AutoModel
    loaded, info = _load(
        "weights",
        name,
        loader.from_pretrained,
        dtype=options.get("dtype", torch.float32),
        use_safetensors=True,
        output_loading_info=True,
        **origin,
        **placement,
    )
    missing = sorted(info["missing_keys"])
    if missing:
        raise ModelError(
            f"{name}: the checkpoint lacks {missing[:4]}{' and more' if len(missing) > 4 else ''}, {_DRAWN}. Name the "
            "checkpoint that holds them; where it is the score head, train one "
            "(rmtension.training.train_reward_model)."
        )
    loaded = (loaded if placement else loaded.to(device)).eval().requires_grad_(False)
    _refuse_offloaded(name, loaded)
    found: LinearHead | None = None
    if is_classifier:
        found = _score_head(name, loaded, stored)
    elif reward:
        found = read_head(stored if head is None else head)
    base = loaded.base_model if is_classifier else loaded
    tokenizer = options.get("tokenizer")
    tokenizer = tokenizer if tokenizer is not None else _load_tokenizer(name, origin)
    pad_token_id = _pad_token_id(name, base.config, tokenizer, options.get("pad_token"), is_classifier, found is None)
    source = Source(str(name), head, options)
    return Checkpoint(base, found, tokenizer, pad_token_id, str(name), is_classifier, source)


def checkpoint_of(classifier: Any, tokenizer: Any, pad_token: str | None) -> Checkpoint:
    """The same for a classifier of transformers that is in memory; its modules and weights are used as they are."""
    name = type(classifier).__name__
    if not name.endswith("ForSequenceClassification"):
        raise ModelError(
            f"model: expected a ...ForSequenceClassification of transformers, got {name}. Hooked models go to "
            "RewardHead(model, weight=...)."
        )
    _refuse_quantised(name, classifier.config)
    _refuse_offloaded(name, classifier)
    _require_one_output(name, classifier.config, {})
    head = _score_head(name, classifier, {})
    base = classifier.base_model
    pad_token_id = _pad_token_id(name, base.config, tokenizer, pad_token, is_classifier=True, is_headless=False)
    return Checkpoint(base, head, tokenizer, pad_token_id, name, is_classifier=True, source=None)


def _load(what: str, name: str | Path, load: Any, **options: Any) -> Any:
    try:
        # Loading draws initial weights before it reads them; the user's random numbers stay as they were.
        with torch.random.fork_rng(devices=[]), without_unseen_bars():
            return load(str(name), **options)
    except (OSError, ValueError, KeyError, RuntimeError, ImportError, AssertionError, SafetensorError) as error:
        raise ModelError(f"{name}: transformers could not load the {what}: {error}") from error


def _placement(options: LoadOptions) -> tuple[dict[str, Any], torch.device]:
    """Transformers' arguments for a model over several devices (empty for one), and the one device."""
    device_map, n_devices = options.get("device_map"), options.get("n_devices")
    if sum(value is not None for value in (options.get("device"), device_map, n_devices)) > 1:
        raise OptionError("device, device_map, n_devices: expected at most one of the three.")
    try:
        device = torch.device(options.get("device") or ("cuda" if torch.cuda.is_available() else "cpu"))
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise OptionError(f"device: {options.get('device')!r} is none of this machine's ({error}).") from error
    if device_map is not None:
        return {"device_map": device_map}, device
    if n_devices is None or n_devices == 1:
        return {}, device
    available = torch.cuda.device_count()
    if not 1 <= n_devices <= available:
        raise OptionError(f"n_devices: expected 1 to {available}, the GPUs of this machine, got {n_devices}.")
    memory = {number: torch.cuda.mem_get_info(number)[0] for number in range(n_devices)}
    return {"device_map": "balanced", "max_memory": memory}, device


def _refuse_quantised(name: str | Path, config: Any) -> None:
    if getattr(config, "quantization_config", None) is not None:
        raise ModelError(
            f"{name}: its weights are quantised, so that neurons have no exact weights to read or to ablate. Open the "
            "checkpoint it was made from, with dtype=torch.bfloat16 if memory is short."
        )


def _refuse_offloaded(name: str | Path, model: nn.Module) -> None:
    if any(parameter.is_meta for parameter in model.parameters()):
        raise ModelError(
            f"{name}: some weights are not in memory (device_map put them on disk or on the meta device). Use more "
            "devices, or dtype=torch.bfloat16."
        )


def _require_one_output(name: str | Path, config: Any, stored: Mapping[str, Any]) -> None:
    if config.num_labels != 1:
        raise ModelError(
            f"{name}: expected a score head with one output, got {config.num_labels}. Load the reward model that was "
            "trained with num_labels=1, or pass head= the row that you mean."
        )
    width = getattr(config.get_text_config(), "hidden_size", None)
    shape = tuple(stored["score.weight"].shape) if "score.weight" in stored else (1, width)
    if shape != (1, width):
        raise ModelError(
            f"{name}: expected a score head of shape (1, {width}), the width of the model, got {shape}. Its head and "
            "its body do not belong together; load the checkpoint they were saved in, or pass head=."
        )


def _score_head(name: str | Path, classifier: Any, stored: Mapping[str, Any]) -> LinearHead:
    score = getattr(classifier, "score", None)
    if not isinstance(score, nn.Linear) or score.out_features != 1:
        raise ModelError(
            f"{name}: expected a linear layer called 'score' with one output on the last token, got {score}. "
            f"{type(classifier).__name__} computes its reward in another way, which this library does not follow."
        )
    head = read_head(score)
    if getattr(score, "bias", None) is None and "score.bias" in stored:
        constant = float(stored["score.bias"])
        warnings.warn(
            f"{name}: the checkpoint has a score.bias of {constant:.4g}, for which transformers has no place. It is "
            "added here: rewards differ from transformers' by this constant, margins do not.",
            RMTensionWarning,
            stacklevel=4,
        )
        head = LinearHead(head.weight, constant)
    return head


def _stored_heads(name: str | Path, revision: str | None) -> dict[str, Any]:
    """Those tensors of the checkpoint's safetensors files that look like a scalar head; nothing else is read.

    Raises `ModelError` where there are no such files. (transformers would go and ask the hub to convert others.)
    """
    from transformers.utils import cached_file

    def find(file: str) -> str | None:
        try:
            found: str | None = cached_file(str(name), file, revision=revision)
        except OSError:
            return None
        return found

    index, single = find("model.safetensors.index.json"), find("model.safetensors")
    try:
        if index is not None:
            files = json.loads(Path(index).read_text(encoding="utf-8"))["weight_map"]
            outside = [file for file in files.values() if Path(file).name != file]
            if outside:
                raise ModelError(f"{name}: its index names a file outside the checkpoint: {outside[0]!r}.")
            paths = [find(file) for file in sorted({files[key] for key in head_keys(files)})]
        elif single is not None:
            paths = [single]
        else:
            raise ModelError(
                f"{name}: it has no model.safetensors, and pickled weights are not read. Convert them: load them with "
                "transformers where you trust them, and save_pretrained."
            )
        tensors: dict[str, Any] = {}
        for path in filter(None, paths):
            with safe_open(path, framework="pt") as opened:
                tensors |= {key: opened.get_tensor(key) for key in head_keys(opened.keys())}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError, SafetensorError) as error:
        if isinstance(error, ModelError):
            raise
        raise ModelError(
            f"{name}: its safetensors files are damaged or cut short ({error}). Fetch them again."
        ) from error
    return tensors


def _load_tokenizer(name: str | Path, origin: dict[str, Any]) -> Any:
    from transformers import AutoTokenizer

    try:
        return _load("tokenizer", name, AutoTokenizer.from_pretrained, **origin)
    except ModelError as error:
        raise ModelError(f"{error} Pass tokenizer=... if it lies elsewhere.") from error


def _pad_token_id(
    name: str | Path, config: Any, tokenizer: Any, pad_token: str | None, is_classifier: bool, is_headless: bool
) -> int | None:
    """The id that transformers skips at the end of a text (None: it skips none)."""
    configured: int | None = getattr(config.get_text_config(), "pad_token_id", None)
    if pad_token is not None:
        token_id = None if tokenizer is None else tokenizer.get_vocab().get(pad_token)
        if token_id is None:
            raise ModelError(f"pad_token: {pad_token!r} is not in the vocabulary of {name}. Name a token that is.")
        if is_classifier and configured not in (None, token_id):
            raise ModelError(
                f"pad_token: {pad_token!r} is token {token_id}, and the config of {name} says {configured}, which is "
                "what transformers skips. Leave pad_token out, or change the config."
            )
        return int(token_id)
    if not is_classifier:
        # A head of another kind is read at the last token, whichever it is; a model without one, to be compared with
        # reward models, has its last token where they have it.
        return configured if is_headless else None
    if configured is None and tokenizer is not None and tokenizer.pad_token_id is None:
        raise ModelError(
            f"{name}: neither its config nor its tokenizer has a pad token, and transformers reads the reward at the "
            f"last token that is not one. Say which it is: pad_token={tokenizer.eos_token or '<a token>'!r}."
        )
    return configured
