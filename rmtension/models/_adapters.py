"""Adapters of peft: finding an adapter and its base model, and merging them."""

import json
import re
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import nn

from rmtension.errors import ModelError, OptionError
from rmtension.models._checkpoint_names import find_local
from rmtension.models._head_files import CheckpointFiles, refused_pickle

_CONFIG, _WEIGHTS, _PICKLED = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"
# The prefix that peft adds to the name of a parameter.
_PREFIX = "base_model.model."
# For embeddings with added tokens, peft saves the trained weight under its own name, and two copies under these.
_COPY = re.compile(r"\.(modules_to_save|original_module)(?=\.weight$)")
_NO_WEIGHTS = {
    **dict.fromkeys(
        ("PROMPT_TUNING", "MULTITASK_PROMPT_TUNING", "P_TUNING", "PREFIX_TUNING", "CPT", "CARTRIDGE"),
        "puts learned vectors before every text",
    ),
    "ADAPTION_PROMPT": "adds learned vectors to the attention",
    "XLORA": "mixes several adapters anew for every text",
    "POLY": "mixes several adapters by the task of a text",
}
_TASKS = ("SEQ_CLS", "CAUSAL_LM", "TOKEN_CLS", "FEATURE_EXTRACTION")


@dataclass(frozen=True)
class Adapter:
    """An adapter, with the shapes of its tensors by their names in the model."""

    files: CheckpointFiles
    folder: Path
    task: str | None
    shapes: Mapping[str, tuple[int, ...]]

    @property
    def n_outputs(self) -> int | None:
        """The number of rows of the score head that was saved with it; None without a score head."""
        names = ("score.weight", "classifier.weight") if self.task == "TOKEN_CLS" else ("score.weight",)
        return next((self.shapes[name][0] for name in names if name in self.shapes), None)


def find_adapters(files: CheckpointFiles, base: str | Path | None) -> tuple[list[Adapter], CheckpointFiles]:
    """The adapters of a checkpoint, innermost first, and the files of their base model.

    For a checkpoint without adapters, the base model is the checkpoint itself. `base` replaces the base model that the
    adapter's config names. Raises `ModelError` for adapters that do not change weights, pickled weights, and a base
    model that is not found.
    """
    adapters: list[Adapter] = []
    read = _read(files)
    if read is None and base is not None:
        raise OptionError(f"base: expected an adapter, but {files.name} has no {_CONFIG}. Leave base out.")
    while read is not None:
        adapter, config = read
        adapters.insert(0, adapter)
        if base is None and files.find("config.json") is not None and _has_weights(files):
            raise ModelError(
                f"{files.name}: this folder has an adapter and a whole model, and it is unclear whether the adapter is "
                f"already merged into the model. If it is not, pass base={files.name!r}; if it is, open a folder "
                f"without {_CONFIG}."
            )
        files = _base(files, config, base)
        base = None
        if any(Path(files.name).resolve() == Path(other.files.name).resolve() for other in adapters):
            break  # the adapter is in the folder of its base model
        read = _read(files)
    return adapters, files


def merge_adapters(model: Any, adapters: Sequence[Adapter]) -> Any:
    """`model` with the adapters merged into its weights by peft's `merge_and_unload()`."""
    for adapter in adapters:
        unmerged = put_on(model, adapter)
        _untie(unmerged)
        try:
            with _quiet():
                model = unmerged.merge_and_unload(safe_merge=True)
        except (ValueError, AttributeError, NotImplementedError, RuntimeError) as error:
            raise ModelError(
                f"{adapter.files.name}: peft could not merge the adapter into its base: {error}. Load it unmerged with "
                "peft's PeftModel.from_pretrained(classifier, folder), and open the result with "
                "RewardHead.from_classifier."
            ) from error
    return model


def _untie(unmerged: Any) -> None:
    """Copy weights that several modules share, if one of the modules has an adapter layer.

    An adapter on a tied unembedding changes only the unembedding; merged into the shared weight, it would change the
    embedding too.
    """
    sharing: dict[int, list[tuple[str, Any]]] = {}
    for path, module in unmerged.named_modules():
        weight = module._parameters.get("weight")
        if weight is not None:
            sharing.setdefault(id(weight), []).append((path, module))
    for modules in sharing.values():
        if len(modules) > 1 and any(path.endswith(".base_layer") for path, _ in modules):
            for _, module in modules[1:]:
                module.weight = nn.Parameter(module.weight.detach().clone(), requires_grad=False)
            unmerged.get_base_model().config.tie_word_embeddings = False


def put_on(model: Any, adapter: Adapter) -> Any:
    """A `PeftModel` of `model` with the adapter attached, not merged; raises `ModelError` if they do not fit."""
    peft = import_peft(adapter.files.name)
    _resize_embeddings(model, adapter)
    name = adapter.files.name
    try:
        with _quiet():
            config = peft.PeftConfig.from_pretrained(str(adapter.folder))
            if adapter.task == "CAUSAL_LM":
                config.task_type = None  # without a task, the adapter also fits the base of a classifier
            unmerged = peft.PeftModel.from_pretrained(model, str(adapter.folder), config=config, torch_device="cpu")
            tensors = peft.utils.load_peft_weights(str(adapter.folder), device="cpu")
            result = peft.set_peft_model_state_dict(unmerged, tensors)
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RuntimeError, ImportError) as error:
        raise ModelError(
            f"{name}: peft could not attach the adapter to its base, a {type(model).__name__} ({type(error).__name__}: "
            f"{' '.join(str(error).split())[:300]}). If it was trained on another model, pass that model: base=..."
        ) from error
    unexpected = [key for key in result.unexpected_keys if not (_COPY.search(key) and _COPY.sub("", key) in tensors)]
    if unexpected:
        raise ModelError(
            f"{name}: the base, a {type(model).__name__}, has no layers for {sorted(unexpected)[:3]} of the "
            "adapter. Pass the model that the adapter was trained on: base=..."
        )
    missing = _own_missing(result.missing_keys, unmerged)
    if missing:
        raise ModelError(
            f"{name}: its file lacks {sorted(missing)[:3]}, which the adapter has according to its config. Download "
            "or save it again."
        )
    return unmerged.eval()


def import_peft(name: str) -> Any:
    """Import peft; raises `ModelError` with the install command if it is missing."""
    try:
        import peft
    except ImportError as error:
        raise ModelError(
            f"{name}: this is an adapter, which needs peft to be read. Install it: pip install peft."
        ) from error
    return peft


def inside_peft(model: Any) -> Any:
    """The model of transformers inside a `PeftModel`, with its adapter layers; other models are returned unchanged."""
    inside = getattr(model, "base_model", None)
    if not hasattr(model, "peft_config") or not hasattr(model, "get_base_model"):
        return model
    if getattr(getattr(model, "active_peft_config", None), "is_prompt_learning", False) or inside is None:
        raise ModelError(
            f"model: this {type(model).__name__} puts learned vectors before every text, which is not a change of "
            "weights, so its rewards cannot be computed here. Use an adapter that changes weights, such as LoRA."
        )
    return model.get_base_model()


def _read(files: CheckpointFiles) -> tuple[Adapter, Mapping[str, Any]] | None:
    path = files.find(_CONFIG)
    if path is None:
        return None
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        kind = str(config["peft_type"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ModelError(f"{files.name}: its {_CONFIG} is damaged ({error}). Download it again.") from error
    if kind in _NO_WEIGHTS:
        raise ModelError(
            f"{files.name}: its adapter is of the kind {kind}, which {_NO_WEIGHTS[kind]}. That is not a change of "
            "weights, so it cannot be merged. Use LoRA, DoRA, IA3 or another kind with merge_and_unload()."
        )
    task = config.get("task_type")
    if task not in (None, *_TASKS):
        raise ModelError(
            f"{files.name}: expected an adapter for one of the tasks {list(_TASKS)}, got {task}. Open another adapter."
        )
    weights = files.find(_WEIGHTS)
    if weights is None:
        pickled = files.find(_PICKLED)
        if pickled is None:
            raise ModelError(f"{files.name}: it has no {_WEIGHTS}. Download or save the adapter again.")
        raise ModelError(f"{files.name}: {refused_pickle(_shown(files, pickled))}")
    try:
        with safe_open(weights, framework="pt") as opened:
            stored = {key: tuple(opened.get_slice(key).get_shape()) for key in opened.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise ModelError(
            f"{files.name}: its {_WEIGHTS} is damaged or incomplete ({error}). Download it again."
        ) from error
    shapes = {key.removeprefix(_PREFIX): shape for key, shape in stored.items()}
    if task is None and str((config.get("auto_mapping") or {}).get("base_model_class")).endswith("TokenClassification"):
        task = "TOKEN_CLS"
    return Adapter(files, weights.parent, task, shapes), config


def _base(files: CheckpointFiles, config: Mapping[str, Any], given: str | Path | None) -> CheckpointFiles:
    """The files of an adapter's base model: `given`, or the model that its config names."""
    named = given if given is not None else config.get("base_model_name_or_path")
    if not named:
        raise ModelError(
            f"{files.name}: its {_CONFIG} names no base model. Pass the model that it was trained on: base=..."
        )
    if given is None:
        relative = Path(files.name) / str(named)
        named = str(relative) if Path(files.name).is_dir() and relative.is_dir() else str(named)
    revision = config.get("revision") if given is None else None
    try:
        return CheckpointFiles(find_local(named, revision), revision, files.local_files_only)
    except ModelError as error:
        raise ModelError(
            f"base: {files.name} is an adapter of {str(named)!r}, which was not found ({error}). Pass the folder of "
            "the base model: base='path/to/base'."
        ) from error


def _has_weights(files: CheckpointFiles) -> bool:
    return any(files.find(file) is not None for file in ("model.safetensors", "model.safetensors.index.json"))


def _shown(files: CheckpointFiles, path: Path) -> Path:
    return Path(files.name) / path.name if Path(files.name).is_dir() else path


def _resize_embeddings(model: Any, adapter: Adapter) -> None:
    """Give the model as many embeddings as were saved with the adapter, which may have added tokens."""
    embedding = model.get_input_embeddings()
    (name,) = [name for name, module in model.named_modules() if module is embedding]
    saved = next(
        (adapter.shapes[key] for key in (f"{name}.weight", f"{name}.base_layer.weight") if key in adapter.shapes), None
    )
    if saved is not None and saved[0] != len(embedding.weight):
        model.resize_token_embeddings(saved[0], mean_resizing=False)


def _own_missing(keys: Sequence[str], unmerged: Any) -> list[str]:
    """The adapter's parameters that its file lacks, except those that share memory with a parameter that it has."""
    from peft.mapping import PEFT_TYPE_TO_PREFIX_MAPPING

    prefix = PEFT_TYPE_TO_PREFIX_MAPPING.get(unmerged.active_peft_config.peft_type, "")
    state = unmerged.state_dict()
    read = {state[key].data_ptr() for key in state.keys() - set(keys)}
    own = [key for key in keys if prefix and prefix in key and ".default" in key and key in state]
    return [key for key in own if state[key].data_ptr() not in read]


def _quiet() -> Any:
    """Silence peft's warnings about what is checked here."""
    return warnings.catch_warnings(action="ignore")
