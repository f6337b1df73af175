"""Models whose weights are plain matrices, which can be edited permanently and saved by transformers."""

from typing import Any, cast

from torch import Tensor, nn
from torch.nn.utils import parametrize

from rmtension.bodies._hooks import copy_without_hooks, has_permanent_hooks
from rmtension.bodies._run_modes import unwrapped
from rmtension.errors import ModelError

# Packages whose layers hold packed or quantised weights, by the module that defines the layer's class.
_QUANTISERS = (
    "torch.ao.nn.quantized",
    "torch.ao.nn.intrinsic.quantized",
    "torch.nn.quantized",
    "torchao",
    "bitsandbytes",
    "optimum.quanto",
    "quanto",
    "hqq",
    "awq",
    "auto_gptq",
    "gptqmodel",
    "aqlm",
    "eetq",
    "compressed_tensors",
)


def refuse_packed_weights(name: str, model: nn.Module) -> None:
    """Raise `ModelError` for a model in memory whose weights are quantised or packed."""
    for path, module in model.named_modules():
        packed = type(module).__module__.startswith(_QUANTISERS)
        wrong = next(
            (key for key, tensor in module.named_parameters(recurse=False) if not _is_plain_tensor(tensor)), None
        )
        if packed or wrong is not None:
            tensor = None if wrong is None else module.get_parameter(wrong)
            kind = (
                type(module).__name__ if tensor is None else f"{wrong} is a {type(tensor).__name__} of {tensor.dtype}"
            )
            raise ModelError(
                f"{name}: {path or 'the model'} holds quantised or packed weights ({kind}), so neurons have no exact "
                "weights to read or to ablate. Open the model without quantisation, with dtype=torch.bfloat16 if "
                "memory is short."
            )


def refuse_recomputed(name: str, model: nn.Module) -> None:
    """Raise `ModelError` for a weight that a hook computes before each run and that is not a parameter."""
    for path, module in model.named_modules():
        for key, value in vars(module).items():
            if isinstance(value, Tensor) and {f"{key}_orig", f"{key}_g"} & set(module._parameters):
                raise ModelError(
                    f"{name}: a hook computes {key!r} of {path} from other parameters before each run (weight_norm, "
                    "spectral_norm or pruning). Make it a plain parameter, then open the model: "
                    f"torch.nn.utils.remove_weight_norm(module), torch.nn.utils.remove_spectral_norm(module) or "
                    f"torch.nn.utils.prune.remove(module, {key!r})."
                )


def has_adapters(model: nn.Module) -> bool:
    """Whether the model contains an adapter layer of peft, or a module that peft wrapped."""
    return any(map(_is_of_peft, model.modules()))


def adapters_in_use(model: nn.Module) -> list[str]:
    """Which of its adapters every layer of peft uses now, in the order of the layers; empty without adapters."""
    layers: list[Any] = [layer for layer in model.modules() if _is_of_peft(layer) and hasattr(layer, "active_adapters")]
    return [f"{list(layer.active_adapters)}, disabled: {layer.disable_adapters}" for layer in layers]


def plain_copy(model: nn.Module, *, share: bool = True) -> nn.Module:
    """A copy of `model` that computes what its parameters and classes alone compute, as a saved checkpoint would.

    It has no hooks, no compiled modules and no replaced forward methods. It shares the parameters of `model`, unless
    `share` is False, or some parameters have adapters, which are merged, or parametrisations: then it copies all of
    them. Raises `ModelError` for adapters that cannot be merged.
    """
    if not share and has_permanent_hooks(model):  # which only streamed blocks have
        raise ModelError(
            "model: a copy needs all weights in memory, and those of this model are in files. Open it without "
            "weight_memory on a larger machine, or use AblationContext, which needs no copy."
        )
    merges = not share or has_adapters(model) or any(map(parametrize.is_parametrized, model.modules()))
    shared = {} if merges else {id(tensor): tensor for tensor in [*model.parameters(), *model.buffers()]}
    return _plain("", copy_without_hooks(model, shared))


def _plain(path: str, module: Any) -> nn.Module:
    """The plain version of `module`, which is at `path` of a copied model."""
    plain: Any = unwrapped(module)
    plain = _merged(path, plain) if _is_of_peft(plain) else plain
    if not hasattr(plain, "_hf_hook"):  # by which accelerate moves tensors between devices
        vars(plain).pop("forward", None)
    if parametrize.is_parametrized(plain):
        _bake(plain)
    for key, child in plain.named_children():
        new = _plain(f"{path}.{key}" if path else key, child)
        if new is not child:
            setattr(plain, key, new)
    result: nn.Module = plain
    return result


def _bake(module: Any) -> None:
    """Turn what parametrisations compute into parameters. torch's own removal edits a class that copies share."""
    values = {key: getattr(module, key).detach() for key in module.parametrizations}
    own_class = parametrize.type_before_parametrizations(module)
    del module.parametrizations
    module.__class__ = own_class
    for key, value in values.items():
        module.register_parameter(key, nn.Parameter(value, requires_grad=False))


def _merged(path: str, layer: Any) -> nn.Module:
    """The module that computes what a layer of peft computes."""
    try:
        trained = active_head(layer)
        if trained is not layer:  # a whole module that was trained in place of the original one
            return cast(nn.Module, trained)
        inner = getattr(layer, "base_layer", None)
        if _is_of_peft(inner):  # a layer inside this one: peft has one for each adapted parameter of a module
            _merged(path, inner)
        if layer.disable_adapters:
            layer.unmerge()
        else:
            layer.merge(safe_merge=True)
        merged: nn.Module = layer.get_base_layer()
    except Exception as error:  # every kind of adapter raises its own errors
        raise ModelError(
            f"model: the adapter layer {path!r} ({type(layer).__name__}) cannot be merged into one weight "
            f"({type(error).__name__}: {error}). Use AblationContext, which needs no merged weights; where peft can "
            "merge the adapter, call model.merge_and_unload() before the model is opened."
        ) from error
    return merged


def _is_of_peft(module: nn.Module | None) -> bool:
    """Whether this is an adapter layer, or a module that peft wrapped."""
    return type(module).__module__.startswith("peft.")


def _is_plain_tensor(tensor: Tensor) -> bool:
    """Floating point of at least 16 bits, and no subclass that unpacks itself (torchao's)."""
    is_known = type(tensor) in (Tensor, nn.Parameter) and type(tensor.data) is Tensor
    return is_known and tensor.dtype.is_floating_point and tensor.dtype.itemsize >= 2


def active_head(module: Any) -> Any:
    """The layer that runs, if peft keeps trained copies of a head next to the original; else the layer itself."""
    copies = getattr(module, "modules_to_save", None)
    if not isinstance(copies, nn.ModuleDict):
        return module
    active = list(module.active_adapters)
    if module.disable_adapters or any(name not in copies for name in active):
        return module.original_module
    return copies[active[0]]
