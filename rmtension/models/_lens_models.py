"""Models of TransformerLens classes (a HookedTransformer, a boot_native bridge): copying, writing and reading them."""

import json
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypeGuard

import torch
from jaxtyping import Float
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from rmtension.bodies._bodies import BootNativeBody, BridgeBody, find_body
from rmtension.bodies._bridges import check_model_class
from rmtension.bodies._hooked_transformer_body import HookedTransformerBody
from rmtension.bodies._native_run import probe_batch, stream_difference, stream_tolerance
from rmtension.bodies._run_modes import eager_eval
from rmtension.errors import ModelError
from rmtension.heads._head import Head, LinearHead
from rmtension.store._files import filled_whole

CONFIG_FILE = "transformer_lens.json"
WEIGHTS_FILE = "transformer_lens.safetensors"
# Entries of a config that depend on the machine or the session, not on the model.
_NOT_KEPT = ("device", "dtype", "n_devices", "seed", "tokenizer_name", "trust_remote_code")
_HEAD = "reward_head.weight"


@dataclass(frozen=True)
class SavedModel:
    """A model that was read from a folder, with its head; `tokenizer` is None if it was saved without a tokenizer."""

    model: nn.Module
    head: Head
    pad_token_id: int | None
    tokenizer: Any


def is_own_model(body: object) -> TypeGuard[HookedTransformerBody | BootNativeBody]:
    """Whether the body's model is of a TransformerLens class, without modules of transformers."""
    return isinstance(body, HookedTransformerBody | BootNativeBody)


def is_saved_model(name: str | Path) -> bool:
    """Whether `write_model` wrote this folder."""
    return (Path(name).expanduser() / CONFIG_FILE).is_file()


def copy_model(body: HookedTransformerBody | BridgeBody) -> nn.Module:
    """Build the model again from its config, with copies of its weights and without its hooks.

    The copy is compared with the model on a few tokens. Raises `ModelError` if they differ, because the config does not
    describe the model (a subclass by the user, a bridge with processed weights).
    """
    parameter = next(body.module.parameters())
    built = _build(_class_of(body), _config_of(body.model), _state_of(body.model), parameter.dtype, parameter.device)
    model: Any = body.model
    for key in ("device", "seed", "tokenizer_name", "trust_remote_code"):
        setattr(built.cfg, key, getattr(model.cfg, key, None))
    built.tokenizer = model.tokenizer
    copy: nn.Module = built
    off = stream_difference(_stream(find_body(copy)), _stream(body))
    if not off <= stream_tolerance(parameter.dtype):
        raise ModelError(
            f"model: a {type(model).__name__} built from the same config and weights computes another residual stream "
            f"(off by {off:.1e} of its size), so it can be neither copied nor saved. Use AblationContext instead of "
            "with_ablation, and save the model's state dict yourself."
        )
    return copy


def write_model(
    body: HookedTransformerBody | BridgeBody,
    row: tuple[Float[Tensor, "d_model"], float],
    pad_token_id: int | None,
    tokenizer: Any,
    folder: Path,
) -> None:
    """Write config, weights, head and tokenizer, which `read_model` reads."""
    model: Any = body.model
    tensors = {f"model.{name}": tensor for name, tensor in _state_of(model).items()}
    tensors[_HEAD], bias = row
    about = {
        "class": _class_of(body),
        "transformer_lens": version("transformer-lens"),
        "rmtension": version("rmtension"),
        "dtype": str(next(body.module.parameters()).dtype).removeprefix("torch."),
        "config": _config_of(model),
        "bias": bias,
        "pad_token_id": pad_token_id,
        # The model's residual stream on a few tokens, which is compared when the model is read.
        "probe": _stream(body).flatten().tolist(),
    }
    with filled_whole(folder, "model", seal=CONFIG_FILE, replaced=("config.json",)) as temporary:
        # Copies, because safetensors refuses tensors that share memory.
        copies = {name: tensor.detach().cpu().clone().contiguous() for name, tensor in tensors.items()}
        save_file(copies, temporary / WEIGHTS_FILE)
        (temporary / CONFIG_FILE).write_text(json.dumps(about, indent=1), encoding="utf-8")
        if tokenizer is not None:
            tokenizer.save_pretrained(temporary)


def read_model(folder: Path, dtype: torch.dtype, device: torch.device) -> SavedModel:
    """Read the model that `write_model` wrote, in `dtype` on `device`.

    Raises `ModelError` for damaged files, a class that the installed TransformerLens lacks, and a model that does not
    compute what it computed when it was written.
    """
    try:
        about = json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8"))
        tensors = load_file(folder / WEIGHTS_FILE)
        weight = tensors.pop(_HEAD)
        state = {name.removeprefix("model."): tensor for name, tensor in tensors.items()}
        written = getattr(torch, about["dtype"])
        expected = torch.tensor(about["probe"], dtype=torch.float64)
        model = _build(about["class"], about["config"], state, dtype, device)
        head = LinearHead(weight, float(about["bias"]))
        saved = SavedModel(model, head, about["pad_token_id"], _read_tokenizer(folder))
    except ModelError:
        raise
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RuntimeError, SafetensorError) as error:
        raise ModelError(
            f"{folder}: its {CONFIG_FILE} and {WEIGHTS_FILE} are damaged, or do not belong together "
            f"({type(error).__name__}: {error}). Save the model again."
        ) from error
    actual = _stream(find_body(model)).flatten()
    off = stream_difference(actual, expected)
    if not off <= max(stream_tolerance(dtype), stream_tolerance(written)):
        raise ModelError(
            f"{folder}: the model computes another residual stream than when it was saved (off by {off:.1e} of its "
            f"size). It was saved with transformer-lens {about['transformer_lens']}, and the installed version is "
            f"{version('transformer-lens')}: install the former, or save the model again."
        )
    return saved


# -- inside --------------------------------------------------------------------------------------------------------


def _read_tokenizer(folder: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(str(folder)) if (folder / "tokenizer_config.json").is_file() else None


def _class_of(body: object) -> str:
    return "HookedTransformer" if isinstance(body, HookedTransformerBody) else "TransformerBridge.boot_native"


def _config_of(model: Any) -> dict[str, Any]:
    """The config as JSON values; raises `ModelError` if it holds other values."""
    values = {key: value for key, value in model.cfg.to_dict().items() if key not in _NOT_KEPT}
    try:
        kept: dict[str, Any] = json.loads(json.dumps(values, default=lambda number: number.item()))
    except (TypeError, ValueError, AttributeError) as error:
        raise ModelError(
            f"model: its config holds values that cannot be saved as JSON ({error}). Remove them from model.cfg."
        ) from error
    return kept


def _state_of(model: Any) -> dict[str, Tensor]:
    # A bridge has its own names, which differ from the paths of its modules.
    state: dict[str, Tensor] = model.state_dict()
    return state


def _build(
    name: str, config: Mapping[str, Any], state: Mapping[str, Tensor], dtype: torch.dtype, device: torch.device
) -> Any:
    """A model of TransformerLens with the weights of `state`, in eval mode; the user's random state is unchanged."""
    # Without initial weights nothing is drawn, and without a seed nothing is seeded.
    values = dict(config) | {"dtype": dtype, "device": str(device), "init_weights": False}
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        if name == "HookedTransformer":
            model = _hooked_transformer(values, state)
        elif name == "TransformerBridge.boot_native":
            from transformer_lens.config import TransformerBridgeConfig
            from transformer_lens.model_bridge import TransformerBridge

            model = TransformerBridge.boot_native(TransformerBridgeConfig.from_dict(values), device=device, dtype=dtype)
            model.load_state_dict(state)
        else:
            raise ModelError(
                f"{CONFIG_FILE}: expected the class HookedTransformer or TransformerBridge.boot_native, got {name!r}. "
                "Save the model again with this version of rmtension."
            )
    model.cfg.init_weights = config["init_weights"]
    return model.eval().requires_grad_(False)


def _hooked_transformer(values: dict[str, Any], state: Mapping[str, Tensor]) -> Any:
    check_model_class("HookedTransformer")
    from transformer_lens import HookedTransformer, HookedTransformerConfig

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # the saved model has this class
        built: Any = HookedTransformer(HookedTransformerConfig.from_dict(values), None, move_to_device=False)
    # TransformerLens makes experts in float32, whatever the config says.
    model = built.to(values["dtype"], print_details=False)
    buffers = dict(model.named_buffers())
    result = model.load_state_dict({name: state[name] for name in state if name not in buffers}, strict=False)
    missing = sorted(set(result.missing_keys) - set(buffers))
    if missing or result.unexpected_keys:
        raise ValueError(f"missing {missing[:3]}, unexpected {result.unexpected_keys[:3]}")
    for name in buffers.keys() & state.keys():
        # Buffers of rotary positions grow with use, so their shapes may differ.
        owner, _, key = name.rpartition(".")
        kept = state[name].clone()
        setattr(model.get_submodule(owner), key, kept.to(values["dtype"]) if kept.is_floating_point() else kept)
    return model.to(values["device"], print_details=False)


@torch.no_grad()
def _stream(body: Any) -> Float[Tensor, "d_model"]:
    """The residual stream at the last of a few tokens, in float64."""
    batch = probe_batch(min(6, body.n_embeddings, int(body.model.cfg.n_ctx)), next(body.module.parameters()).device)
    with eager_eval(body.modules()):
        last: Tensor = body.residual(batch)[0, -1].double().cpu()
    return last
