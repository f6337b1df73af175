"""Adapters of peft: a folder with `adapter_config.json`, the model it was trained on, and the two merged into one."""

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
# What peft puts before the name that a parameter has in the model.
_PREFIX = "base_model.model."
# Of embeddings with added tokens it writes all that it holds: the trained ones under their own name, and twice again.
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
    """An adapter in `files`, with the shapes of its tensors by the names they have in the model."""

    files: CheckpointFiles
    folder: Path
    task: str | None
    shapes: Mapping[str, tuple[int, ...]]

    @property
    def n_outputs(self) -> int | None:
        """The rows of the score head that was saved with it; None without one."""
        names = ("score.weight", "classifier.weight") if self.task == "TOKEN_CLS" else ("score.weight",)
        return next((self.shapes[name][0] for name in names if name in self.shapes), None)


def find_adapters(files: CheckpointFiles, base: str | Path | None) -> tuple[list[Adapter], CheckpointFiles]:
    """The adapters of a checkpoint, innermost first, and the files of the model they belong on.

    A checkpoint without any is that model itself. `base` takes the place of the model that the adapter's config names.
    Raises `ModelError` for a kind of adapter that is no change of weights, pickled weights, or a base that is not here.
    """
    adapters: list[Adapter] = []
    found = _read(files)
    if found is None and base is not None:
        raise OptionError(f"base: {files.name} is no adapter, it has no {_CONFIG}. Leave base out.")
    while found is not None:
        adapter, config = found
        adapters.insert(0, adapter)
        if base is None and files.find("config.json") is not None and _has_weights(files):
            raise ModelError(
                f"{files.name}: it has an adapter and a whole model, and nothing says whether the adapter is merged "
                f"into the model already. If it is not, say base={files.name!r}; if it is, name a folder without "
                f"{_CONFIG}."
            )
        files = _base(files, config, base)
        base = None
        if any(Path(files.name).resolve() == Path(other.files.name).resolve() for other in adapters):
            break  # the adapter lies in its base's own folder
        found = _read(files)
    return adapters, files


def merge_adapters(model: Any, adapters: Sequence[Adapter]) -> Any:
    """`model` with the adapters merged into its weights, as `merge_and_unload()` of peft does it."""
    for adapter in adapters:
        unmerged = put_on(model, adapter)
        _untie(unmerged)
        try:
            with _quiet():
                model = unmerged.merge_and_unload(safe_merge=True)
        except (ValueError, AttributeError, NotImplementedError, RuntimeError) as error:
            raise ModelError(
                f"{adapter.files.name}: peft could not merge the adapter into its base: {error}. Load it unmerged with "
                "peft's PeftModel.from_pretrained(classifier, folder), and open that with RewardHead.from_classifier."
            ) from error
    return model


def _untie(unmerged: Any) -> None:
    """Give every module a weight of its own where one of those that share it has an adapter layer.

    An adapter on a tied unembedding changes the unembedding alone; merged into the shared weight, it would change the
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
    """A `PeftModel` of `model` and an adapter that is not merged yet; raises `ModelError` where they do not fit."""
    peft = import_peft(adapter.files.name)
    _resize_embeddings(model, adapter)
    name = adapter.files.name
    try:
        with _quiet():
            config = peft.PeftConfig.from_pretrained(str(adapter.folder))
            if adapter.task == "CAUSAL_LM":
                config.task_type = None  # as one that does no more than change weights it fits a classifier too
            unmerged = peft.PeftModel.from_pretrained(model, str(adapter.folder), config=config, torch_device="cpu")
            tensors = peft.utils.load_peft_weights(str(adapter.folder), device="cpu")
            result = peft.set_peft_model_state_dict(unmerged, tensors)
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RuntimeError, ImportError) as error:
        raise ModelError(
            f"{name}: peft could not put the adapter on {type(model).__name__}, its base ({type(error).__name__}: "
            f"{' '.join(str(error).split())[:300]}). If it was trained on another model, name that one: base=..."
        ) from error
    unexpected = [key for key in result.unexpected_keys if not (_COPY.search(key) and _COPY.sub("", key) in tensors)]
    if unexpected:
        raise ModelError(
            f"{name}: the base, a {type(model).__name__}, has no place for {sorted(unexpected)[:3]} of the "
            "adapter. Name the model that it was trained on: base=..."
        )
    missing = _own_missing(result.missing_keys, unmerged)
    if missing:
        raise ModelError(
            f"{name}: its file lacks {sorted(missing)[:3]}, which its config says the adapter has. Fetch or save it "
            "again."
        )
    return unmerged.eval()


def import_peft(name: str) -> Any:
    """The module peft; `ModelError` with the way to install it."""
    try:
        import peft
    except ImportError as error:
        raise ModelError(
            f'{name}: it is an adapter, and reading one needs peft: pip install "rmtension[peft]".'
        ) from error
    return peft


def inside_peft(model: Any) -> Any:
    """The model of transformers inside a `PeftModel`, with its adapter layers; any other model as it is."""
    inside = getattr(model, "base_model", None)
    if not hasattr(model, "peft_config") or not hasattr(model, "get_base_model"):
        return model
    if getattr(getattr(model, "active_peft_config", None), "is_prompt_learning", False) or inside is None:
        raise ModelError(
            f"model: this {type(model).__name__} puts learned vectors before every text. That is no change of weights, "
            "so that neither merging nor reading the model inside it gives its rewards."
        )
    return model.get_base_model()


def active_head(module: Any) -> Any:
    """The layer that runs where peft keeps a trained copy of a head beside the first one; any other layer as it is."""
    copies = getattr(module, "modules_to_save", None)
    if not isinstance(copies, nn.ModuleDict):
        return module
    active = list(module.active_adapters)
    if module.disable_adapters or any(name not in copies for name in active):
        return module.original_module
    return copies[active[0]]


def _read(files: CheckpointFiles) -> tuple[Adapter, Mapping[str, Any]] | None:
    path = files.find(_CONFIG)
    if path is None:
        return None
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        kind = str(config["peft_type"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ModelError(f"{files.name}: its {_CONFIG} is damaged ({error}). Fetch it again.") from error
    if kind in _NO_WEIGHTS:
        raise ModelError(
            f"{files.name}: its adapter is of the kind {kind}, which {_NO_WEIGHTS[kind]}. That is no change of "
            "weights, so that it cannot be merged. LoRA, DoRA, IA3 and other kinds with merge_and_unload() can."
        )
    task = config.get("task_type")
    if task not in (None, *_TASKS):
        raise ModelError(f"{files.name}: its adapter is for the task {task}; expected one of {list(_TASKS)}.")
    weights = files.find(_WEIGHTS)
    if weights is None:
        pickled = files.find(_PICKLED)
        reason = f"it has no {_WEIGHTS}." if pickled is None else refused_pickle(_shown(files, pickled))
        raise ModelError(f"{files.name}: {reason}")
    try:
        with safe_open(weights, framework="pt") as opened:
            stored = {key: tuple(opened.get_slice(key).get_shape()) for key in opened.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise ModelError(f"{files.name}: its {_WEIGHTS} is damaged or cut short ({error}). Fetch it again.") from error
    shapes = {key.removeprefix(_PREFIX): shape for key, shape in stored.items()}
    if task is None and str((config.get("auto_mapping") or {}).get("base_model_class")).endswith("TokenClassification"):
        task = "TOKEN_CLS"
    return Adapter(files, weights.parent, task, shapes), config


def _base(files: CheckpointFiles, config: Mapping[str, Any], given: str | Path | None) -> CheckpointFiles:
    """The files of the model that an adapter belongs on: `given`, or what its config names."""
    named = given if given is not None else config.get("base_model_name_or_path")
    if not named:
        raise ModelError(f"{files.name}: its {_CONFIG} names no base model. Say which one it was trained on: base=...")
    if given is None:
        beside = Path(files.name) / str(named)
        named = str(beside) if Path(files.name).is_dir() and beside.is_dir() else str(named)
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
    """Give the model as many embeddings as were saved with the adapter, whose tokens may have been added."""
    embedding = model.get_input_embeddings()
    (name,) = [name for name, module in model.named_modules() if module is embedding]
    saved = next(
        (adapter.shapes[key] for key in (f"{name}.weight", f"{name}.base_layer.weight") if key in adapter.shapes), None
    )
    if saved is not None and saved[0] != len(embedding.weight):
        model.resize_token_embeddings(saved[0], mean_resizing=False)


def _own_missing(keys: Sequence[str], unmerged: Any) -> list[str]:
    """Of the parameters that the adapter's file had not: the adapter's, but for those that share one which it had."""
    from peft.mapping import PEFT_TYPE_TO_PREFIX_MAPPING

    prefix = PEFT_TYPE_TO_PREFIX_MAPPING.get(unmerged.active_peft_config.peft_type, "")
    state = unmerged.state_dict()
    read = {state[key].data_ptr() for key in state.keys() - set(keys)}
    own = [key for key in keys if prefix and prefix in key and ".default" in key and key in state]
    return [key for key in own if state[key].data_ptr() not in read]


def _quiet() -> Any:
    """Without the warnings of peft, about what is checked here."""
    return warnings.catch_warnings(action="ignore")
