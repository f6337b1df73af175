"""Loading with transformers: options, devices, what is refused, and models with their adapters merged."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn

from rmtension._arguments import nearest
from rmtension._progress import without_unseen_bars
from rmtension.errors import ModelError, OptionError
from rmtension.models._adapters import Adapter, find_adapters, merge_adapters, put_on
from rmtension.models._checkpoint_names import find_local
from rmtension.models._head_files import CheckpointFiles
from rmtension.models._run_options import RunOptions


class LoadOptions(RunOptions, total=False):
    """How a checkpoint is loaded, by `RewardHead.from_pretrained` and `from_language_model`, and how it then runs.

    Attributes:
        base: of an adapter: the folder or hub name of the model it was trained on, in place of the one it names.
        dtype: float32 by default; with half precision the head's product stays in float32.
        device: the first GPU if there is one, otherwise the CPU.
        device_map: passed to transformers (needs accelerate): a model larger than a device, layer by layer; instead of
            `device`. Weights on disk or on the meta device are refused.
        n_devices: spread the model over this many GPUs; short for a balanced `device_map`.
        revision: of a hub name. A name that has one is not looked for on this machine first.
        tokenizer: used in place of the checkpoint's own.
        pad_token: which token transformers skips at the end of a text, where neither config nor tokenizer says so.
        trust_remote_code: False; True runs code that comes with the checkpoint.
    """

    base: str | Path | None
    dtype: torch.dtype
    device: torch.device | str | None
    device_map: str | dict[str, Any] | None
    n_devices: int | None
    revision: str | None
    tokenizer: Any
    pad_token: str | None
    trust_remote_code: bool


@dataclass(frozen=True)
class CheckpointLocation:
    """A checkpoint's files, those of the model with its weights (another's, for an adapter), and the adapters on it."""

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
        """What the outermost adapter was trained for; None without adapters, or where its config does not say."""
        return self.adapters[-1].task if self.adapters else None

    @property
    def n_saved_outputs(self) -> int | None:
        """The rows of the score head that was saved with the outermost adapter; None without one."""
        return self.adapters[-1].n_outputs if self.adapters else None

    def is_for(self, kind: str) -> bool:
        """Whether the model was saved as a class whose name ends so, for example ForSequenceClassification."""
        return any(name.endswith(kind) for name in self.config.architectures or [])


def find_checkpoint(name: str | Path, options: LoadOptions, *, local_files_only: bool = False) -> CheckpointLocation:
    """Where the checkpoint `name` is, and its config; raises `OptionError` for unknown options."""
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
        config = load("config", weights.name, AutoConfig.from_pretrained, **_origin(weights, options))
    except ModelError as error:
        if adapters:
            raise ModelError(
                f"base: the base model of {name}, an adapter: {error} Say where it is: base=..."
            ) from error
        raise
    refuse_quantised(weights.name, config, is_base=bool(adapters))
    return CheckpointLocation(files, weights, tuple(adapters), config, options)


def load_model(place: CheckpointLocation, auto_class: str, *, merge: bool = True) -> Any:
    """The model of transformers at `place`, in eval mode and frozen; adapters merged into its weights or put on it.

    Raises `ModelError` for weights that neither the checkpoint nor its adapters hold.
    """
    import transformers

    placement, device = placement_of(place.options)
    saved = {name for adapter in place.adapters for name in adapter.shapes}
    loaded, info = load(
        "weights",
        place.weights.name,
        getattr(transformers, auto_class).from_pretrained,
        config=place.config,
        dtype=place.options.get("dtype", torch.float32),
        use_safetensors=True,
        output_loading_info=True,
        ignore_mismatched_sizes=bool(saved),
        **place.origin,
        **placement,
    )
    mismatched = {key if isinstance(key, str) else key[0] for key in info["mismatched_keys"]}
    missing = sorted((set(info["missing_keys"]) | mismatched) - saved)
    if missing:
        raise ModelError(
            f"{place.files.name}: the checkpoint lacks {missing[:4]}{' and more' if len(missing) > 4 else ''}, which "
            "transformers would draw at random. Name the checkpoint that holds them"
            + (
                "; where it is the score head, say where it is: head=..., or train one "
                "(rmtension.training.train_reward_model)."
                if missing == ["score.weight"]
                else "."
            )
        )
    loaded = (loaded if placement else loaded.to(device)).eval().requires_grad_(False)
    refuse_offloaded(place.files.name, loaded)
    with torch.random.fork_rng(devices=[]):
        if merge:
            return merge_adapters(loaded, place.adapters).eval().requires_grad_(False)
        return put_all_on(loaded, place.adapters)


def put_all_on(model: Any, adapters: Sequence[Adapter]) -> Any:
    """The model with all adapters but the last one merged, and that one on it as peft runs it; without any, itself."""
    if not adapters:
        return model
    return put_on(merge_adapters(model, adapters[:-1]), adapters[-1])


def load_tokenizer(place: CheckpointLocation) -> Any:
    """The tokenizer beside the checkpoint, or for an adapter without one its base model's."""
    from transformers import AutoTokenizer

    own = any(place.files.find(file) is not None for file in ("tokenizer_config.json", "tokenizer.json"))
    files = place.files if own or not place.adapters else place.weights
    try:
        return load("tokenizer", files.name, AutoTokenizer.from_pretrained, **_origin(files, place.options))
    except ModelError as error:
        raise ModelError(f"{error} Pass tokenizer=... if it lies elsewhere.") from error


def load(what: str, name: str | Path, function: Any, **options: Any) -> Any:
    """`function(name, **options)` of transformers; whatever it raises becomes a `ModelError`."""
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


def refuse_quantised(name: str | Path, config: Any, *, is_base: bool = False) -> None:
    """Raise `ModelError` for a model whose config says that its weights are quantised."""
    if getattr(config, "quantization_config", None) is not None:
        raise ModelError(
            f"{name}: its weights are quantised, so that neurons have no exact weights to read or to ablate. Open the "
            "checkpoint it was made from, with dtype=torch.bfloat16 if memory is short"
            + (": base=..., of the adapter that was trained on it." if is_base else ".")
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
