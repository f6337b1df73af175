"""Loading with transformers: options, devices, unsupported weights, and models with their adapters merged."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from rmtension._arguments import nearest
from rmtension._progress import without_unseen_bars
from rmtension.errors import ModelError, OptionError
from rmtension.heads._head_tensors import body_prefix
from rmtension.models._adapters import Adapter, find_adapters, merge_adapters, put_on
from rmtension.models._checkpoint_names import find_local
from rmtension.models._configs import standard_config, stored_fields
from rmtension.models._head_files import CheckpointFiles, read_body, weight_files
from rmtension.models._internlm2 import is_internlm2, to_llama
from rmtension.models._run_options import RunOptions


class LoadOptions(RunOptions, total=False):
    """Options of `RewardHead.from_pretrained` and `from_language_model`: how to load a checkpoint and how to run it.

    They are passed as keywords. `max_length`, `tokens_per_batch`, `truncate_response`, `on_nonfinite` and
    `two_segments` are described in `RunOptions`.

    Attributes:
        base: for an adapter: the folder or hub name of its base model, if its config names a wrong one.
        dtype: float32 by default. In half precision the product with the head is still computed in float32.
        device: by default the first GPU if there is one, otherwise the CPU.
        device_map: passed to transformers instead of `device` (needs accelerate), to spread a model over devices layer
            by layer. Weights on disk or on the meta device raise `ModelError`.
        n_devices: spread the model over this many GPUs; a shorthand for a balanced `device_map`.
        weight_memory: for a model that is larger than the memory of a CPU: how many bytes of the blocks' weights may
            stay in memory. The other blocks are read from the checkpoint's files each time they run. This needs Linux,
            and the `dtype` of the files (`docs/large_models.md`).
        revision: the revision of a hub name. With it, a name that is no folder here is taken to be a hub name.
        tokenizer: replaces the checkpoint's tokenizer.
        pad_token: the token that transformers skips at the end of a text, if neither config nor tokenizer names one.
        trust_remote_code: False by default; True runs code that comes with the checkpoint.

    Examples:
        >>> options: LoadOptions = {"dtype": torch.float64, "device": "cpu", "max_length": 32}
        >>> RewardHead.from_pretrained("organism", **options)
        RewardHead(gpt2-2x24-heads2x12-d24, torch.float64, cpu)
    """

    base: str | Path | None
    dtype: torch.dtype
    device: torch.device | str | None
    device_map: str | dict[str, Any] | None
    n_devices: int | None
    weight_memory: int | None
    revision: str | None
    tokenizer: Any
    pad_token: str | None
    trust_remote_code: bool


@dataclass(frozen=True)
class CheckpointLocation:
    """The files of a checkpoint, the files with the model's weights (its base's, for an adapter), and its adapters."""

    files: CheckpointFiles
    weights: CheckpointFiles
    adapters: tuple[Adapter, ...]
    config: Any
    options: LoadOptions

    @property
    def origin(self) -> dict[str, Any]:
        """Transformers' arguments that say which version is read, and whether its code may run."""
        return _origin(self.weights, self.options)

    @property
    def task(self) -> str | None:
        """The task that the outermost adapter was trained for; None without adapters, or if its config has no task."""
        return self.adapters[-1].task if self.adapters else None

    @property
    def n_saved_outputs(self) -> int | None:
        """The rows of the score head that was saved with the outermost adapter; None without one."""
        return self.adapters[-1].n_outputs if self.adapters else None

    def is_for(self, kind: str) -> bool:
        """Whether the model was saved as a class whose name ends with `kind`, such as ForSequenceClassification."""
        return any(name.endswith(kind) for name in self.config.architectures or [])


def find_checkpoint(name: str | Path, options: LoadOptions, *, local_files_only: bool = False) -> CheckpointLocation:
    """Find the checkpoint `name` and read its config; raises `OptionError` for unknown options."""
    from transformers import AutoConfig

    unknown = sorted(set(options) - set(LoadOptions.__annotations__))
    if unknown:
        raise OptionError(
            f"from_pretrained: unknown options {unknown}; expected {sorted(LoadOptions.__annotations__)}."
            f"{nearest(unknown[0], LoadOptions.__annotations__)}"
        )
    revision = options.get("revision")
    files = CheckpointFiles(find_local(name, revision), revision, local_files_only)
    adapters, weights = find_adapters(files, options.get("base"))
    try:
        own_code = options.get("trust_remote_code", False)
        config = None if own_code else load("config", weights.name, lambda _: standard_config(weights))
        if config is None:
            config = load("config", weights.name, AutoConfig.from_pretrained, **_origin(weights, options))
    except ModelError as error:
        if adapters:
            raise ModelError(
                f"base: {name} is an adapter, and its base model could not be read: {error} Pass the base model's "
                "folder: base='path/to/base'."
            ) from error
        raise
    refuse_quantised(weights.name, config, is_base=bool(adapters))
    return CheckpointLocation(files, weights, tuple(adapters), config, options)


def load_model(location: CheckpointLocation, auto_class: str, *, merge: bool = True) -> Any:
    """Load the model of transformers at `location`, in eval mode and frozen, with its adapters merged or attached.

    Raises `ModelError` for weights that neither the checkpoint nor its adapters hold.
    """
    import transformers

    placement, device = placement_of(location.options)
    if location.adapters and location.options.get("weight_memory") is not None:
        raise OptionError(
            "weight_memory: the weights of an adapter's base model change in memory. Open it once without "
            "weight_memory, write the merged model with save_pretrained, and open that."
        )
    own_body = _converted(location)
    saved = {name for adapter in location.adapters for name in adapter.shapes}
    loaded, info = load(
        "weights",
        location.weights.name,
        _loader(getattr(transformers, auto_class), location.config, from_memory=own_body is not None),
        state_dict=own_body,
        config=location.config,
        dtype=location.options.get("dtype", torch.float32),
        use_safetensors=True,
        key_mapping=None if own_body is not None else _renamed(location, auto_class),
        output_loading_info=True,
        ignore_mismatched_sizes=bool(saved),
        **location.origin,
        **placement,
    )
    mismatched = {key if isinstance(key, str) else key[0] for key in info["mismatched_keys"]}
    missing = sorted((set(info["missing_keys"]) | mismatched) - saved)
    if auto_class == "AutoModel" and missing and all(name.startswith("pooler.") for name in missing):
        # Classifiers such as RoBERTa's have no pooler; the bare model has one, which no residual stream depends on.
        loaded.pooler, missing = None, []
    if missing:
        raise ModelError(
            f"{location.files.name}: the checkpoint lacks {missing[:4]}{' and more' if len(missing) > 4 else ''}, "
            "which transformers would draw at random. Open the checkpoint that holds them"
            + (
                "; if the score head is in another file, pass head='path/to/head.safetensors', or train one with "
                "rmtension.training.train_reward_model."
                if missing == ["score.weight"]
                else "."
            )
        )
    loaded = (loaded if placement else loaded.to(device)).eval().requires_grad_(False)
    refuse_offloaded(location.files.name, loaded)
    with torch.random.fork_rng(devices=[]):
        if merge:
            return merge_adapters(loaded, location.adapters).eval().requires_grad_(False)
        return put_all_on(loaded, location.adapters)


def _renamed(location: CheckpointLocation, auto_class: str) -> dict[str, str] | None:
    """What to rename in the names of a body that was saved under another name than its class has (Starling)."""
    import transformers

    # transformers renames the parts of models for text and images by itself.
    if location.adapters or location.config.get_text_config() is not location.config:
        return None
    prefix = body_prefix(weight_files(location.weights))
    kind: Any = getattr(transformers, auto_class)._model_mapping.get(type(location.config), None)
    own = getattr(kind, "base_model_prefix", "")
    if not prefix or not own or prefix == f"{own}.":
        return None
    return {f"^{re.escape(prefix)}": f"{own}."}


def _loader(auto_class: Any, config: Any, *, from_memory: bool) -> Any:
    """`from_pretrained` of an auto class; with `from_memory`, that of the config's own class for a `state_dict`."""
    if not from_memory:
        return auto_class.from_pretrained
    kind: Any = auto_class._model_mapping[type(config)]

    def load_from_memory(_name: str, **options: Any) -> Any:
        return kind.from_pretrained(None, **options)

    return load_from_memory


def _converted(location: CheckpointLocation) -> dict[str, Tensor] | None:
    """The body's tensors for transformers' own class, if they were saved in the layout of another class; or None."""
    if location.options.get("trust_remote_code", False) or not is_internlm2(stored_fields(location.weights)):
        return None
    if location.adapters:
        raise ModelError(f"{location.files.name}: adapters of InternLM2 are not supported. Merge the adapter first.")
    return to_llama(read_body(location.weights), location.config)


def put_all_on(model: Any, adapters: Sequence[Adapter]) -> Any:
    """The model with all adapters merged except the last, which is attached as peft runs it; no adapters: the model."""
    if not adapters:
        return model
    return put_on(merge_adapters(model, adapters[:-1]), adapters[-1])


def load_tokenizer(location: CheckpointLocation) -> Any:
    """The tokenizer of the checkpoint, or that of the base model for an adapter without a tokenizer."""
    from transformers import AutoTokenizer

    own = any(location.files.find(file) is not None for file in ("tokenizer_config.json", "tokenizer.json"))
    files = location.files if own or not location.adapters else location.weights
    try:
        return load("tokenizer", files.name, AutoTokenizer.from_pretrained, **_origin(files, location.options))
    except ModelError as error:
        raise ModelError(f"{error} If the tokenizer is elsewhere, load it and pass tokenizer=...") from error


def load(what: str, name: str | Path, function: Any, **options: Any) -> Any:
    """Call `function(name, **options)` of transformers; errors of a broken checkpoint become a `ModelError`."""
    try:
        # Loading draws initial weights before it reads them; the user's random numbers stay as they were.
        with torch.random.fork_rng(devices=[]), without_unseen_bars():
            return function(str(name), **options)
    except (OSError, ValueError, KeyError, RuntimeError, ImportError, AssertionError, SafetensorError) as error:
        raise ModelError(f"{name}: transformers could not load the {what}: {error}") from error


def placement_of(options: LoadOptions) -> tuple[dict[str, Any], torch.device]:
    """Transformers' arguments for a model over several devices (empty for one), and the one device."""
    device_map, n_devices = options.get("device_map"), options.get("n_devices")
    if sum(value is not None for value in (options.get("device"), device_map, n_devices)) > 1:
        given = [name for name in ("device", "device_map", "n_devices") if options.get(name) is not None]
        raise OptionError(f"device, device_map, n_devices: expected at most one of the three, got {given}.")
    try:
        device = torch.device(options.get("device") or ("cuda" if torch.cuda.is_available() else "cpu"))
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise OptionError(
            f"device: {options.get('device')!r} is not available on this machine ({error}). Leave device out to use "
            "the first GPU, or the CPU if there is none."
        ) from error
    n_bytes: object = options.get("weight_memory")
    if n_bytes is not None and not (isinstance(n_bytes, int) and n_bytes >= 0):
        raise OptionError(f"weight_memory: expected a number of bytes, such as 4_000_000_000, got {n_bytes!r}.")
    if n_bytes is not None and (device.type != "cpu" or device_map is not None or n_devices):
        where = next(
            (f"{name}={value!r}" for name, value in (("device_map", device_map), ("n_devices", n_devices)) if value),
            device,
        )
        raise OptionError(f"weight_memory: it is for a model on the CPU, got {where}. Pass device='cpu' alone.")
    if device_map is not None:
        return {"device_map": device_map}, device
    if n_devices is None or n_devices == 1:
        return {}, device
    available = torch.cuda.device_count()
    if not 1 <= n_devices <= available:
        raise OptionError(f"n_devices: expected 1 to {max(1, available)} ({available} GPUs here), got {n_devices}.")
    memory = {number: torch.cuda.mem_get_info(number)[0] for number in range(n_devices)}
    return {"device_map": "balanced", "max_memory": memory}, device


def refuse_quantised(name: str | Path, config: Any, *, is_base: bool = False) -> None:
    """Raise `ModelError` for a model whose config says that its weights are quantised."""
    if getattr(config, "quantization_config", None) is not None:
        raise ModelError(
            f"{name}: its weights are quantised, so neurons have no exact weights to read or to ablate. Open the "
            "checkpoint it was quantised from, with dtype=torch.bfloat16 if memory is short"
            + (", by passing it as base=... of the adapter." if is_base else ".")
        )


def refuse_offloaded(name: str | Path, model: nn.Module) -> None:
    """Raise `ModelError` for a model with weights on the meta device."""
    if any(parameter.is_meta for parameter in model.parameters()):
        raise ModelError(
            f"{name}: some weights are not in memory (device_map put them on disk or on the meta device). Use more "
            "devices, or dtype=torch.bfloat16."
        )


def _origin(files: CheckpointFiles, options: LoadOptions) -> dict[str, Any]:
    more = {"local_files_only": True} if files.local_files_only else {}
    return {"revision": files.revision, "trust_remote_code": options.get("trust_remote_code", False), **more}
