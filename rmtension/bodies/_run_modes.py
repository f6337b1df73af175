"""How a model's own modules run: in eval mode and uncompiled, with frozen parameters, and without wrappers."""

from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import nn

from rmtension.errors import ModelError


@contextmanager
def eager_eval(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Put every module into eval mode and disable `torch.compile`; afterwards restore the mode of each.

    Compiled code does not call hooks that were registered after compilation.
    """
    listed = list(modules)
    training = [module for module in listed if module.training]
    for module in training:
        module.training = False
    try:
        with _eager() if any(map(_is_compiled, listed)) else nullcontext():
            yield
    finally:
        for module in training:
            module.training = True


def _is_compiled(module: nn.Module) -> bool:
    """Whether the module, or the function that it calls, went through `torch.compile`."""
    return (
        module._compiled_call_impl is not None
        or "_orig_mod" in module._modules
        or hasattr(module.forward, "_torchdynamo_orig_callable")
    )


def _eager() -> AbstractContextManager[None]:
    set_stance = getattr(torch.compiler, "set_stance", None)
    if set_stance is None:
        raise ModelError(
            f"model: some of its modules are compiled, and torch {torch.__version__} cannot run them uncompiled, so "
            "hooks would not fire. Open the model before torch.compile, or install torch 2.6 or newer."
        )
    stance: AbstractContextManager[None] = set_stance("force_eager")
    return stance


@contextmanager
def frozen(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Set `requires_grad` of all parameters to False, to save memory; afterwards restore it."""
    parameters = [parameter for module in modules for parameter in module.parameters(recurse=False)]
    trainable = [parameter for parameter in parameters if parameter.requires_grad]
    for parameter in trainable:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in trainable:
            parameter.requires_grad_(True)


def plain_path(path: str) -> str:
    """The path of a module in a compiled model as it is in the model itself."""
    return path.replace("_orig_mod.", "")


def unwrapped(model: Any) -> Any:
    """The module inside `torch.compile(module)` and wrappers of data parallelism, which share its parameters."""
    while True:
        inner = getattr(model, "_orig_mod", None)
        if type(model).__name__ in ("DistributedDataParallel", "DataParallel"):
            inner = model.module
        if not isinstance(inner, nn.Module):
            return model
        model = inner
