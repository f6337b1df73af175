"""Forward hooks that come off again, whatever happens, and that are known to have fired."""

import copy
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from itertools import chain
from typing import Any, Literal

import torch
from torch import Tensor, nn

from rmtension.errors import ModelError, OptionError

# What a hook gets and may return in its place.
Hook = Callable[[Tensor], Tensor | None]
# The same for a whole call: the module, its positional and named arguments, and what it gave.
CallVisit = Callable[[nn.Module, tuple[Any, ...], dict[str, Any], Any], Any]
# What a module is called with: positional and named arguments.
Call = tuple[tuple[Any, ...], dict[str, Any]]


@dataclass(frozen=True)
class HookSite:
    """A tensor inside a running model: the output of a module, or its first input.

    `place` is the (site, layer) of its activation; None where nothing depends on the hook. A model may have several
    hook sites for one activation, of which one fires in each run.
    """

    module: nn.Module
    side: Literal["input", "output"]
    place: tuple[str, int] | None = field(default=None, compare=False)


class InstalledHooks:
    """Context manager: installs all hooks or none, removes them in reverse order, refuses to be entered twice.

    Plain PyTorch hooks, also on TransformerLens' hook points, so that `model.reset_hooks()` does not remove them and
    they leave no trace in the model's own lists. `any_tokens` says that the visits do not mind which tokens they see.
    """

    def __init__(self, hooks: Sequence[tuple[HookSite, Hook]], *, any_tokens: bool = False) -> None:
        self._hooks = tuple(hooks)
        self._any_tokens = any_tokens
        self._installed: ExitStack | None = None

    def __enter__(self) -> "InstalledHooks":
        if self._installed is not None:
            raise OptionError("hooks: this context is already entered. Leave it first, or make a second one.")
        # ExitStack undoes what was registered when a later registration fails, and goes on when one removal fails.
        with ExitStack() as stack:
            for hook_site, visit in self._hooks:
                stack.callback(_install(hook_site, visit, self._any_tokens))
            self._installed = stack.pop_all()
        return self

    def __exit__(self, *exception: object) -> None:
        installed, self._installed = self._installed, None
        if installed is not None:
            installed.close()


@contextmanager
def eager_eval(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Every module in eval mode and run eagerly, and afterwards each in the mode it had.

    Compiled code does not call hooks that were registered after it was compiled, so `torch.compile` is set aside.
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
            "that hooks would not fire. Open the model before torch.compile, or install torch 2.6 or newer."
        )
    stance: AbstractContextManager[None] = set_stance("force_eager")
    return stance


class AllSeen(Exception):  # noqa: N818 - no error
    """Raised by a hook to end a run whose rest nobody asked for."""


@contextmanager
def all_fire(modules: Iterable[nn.Module], layers: range | None = None) -> Iterator[None]:
    """After a run, also one that `AllSeen` ended, raise `ModelError` if a place of this library's hooks did not fire.

    `layers` are those that the run goes through; all by default.
    """
    counts: dict[tuple[str, int], list[tuple[_SpotHook, int]]] = {}
    for module in modules:
        for hook in _forward_hooks_of(module):
            if isinstance(hook, _SpotHook) and hook.place and (layers is None or hook.place[1] in layers):
                counts.setdefault(hook.place, []).append((hook, hook.n_fired))
    ended = None
    try:
        yield
    except AllSeen as error:
        ended = error
    for (site, layer), before in counts.items():
        if not any(hook.n_fired > n for hook, n in before):
            raise ModelError(
                f"hooks: the hook at site {site!r} of layer {layer} did not fire, so nothing was read or changed: "
                "the model does not call the module that the hook is on. Restore the module's own forward (`del "
                "module.forward` where it was replaced on the instance), undo wrappers inside the model, and open it "
                "again."
            )
    if ended is not None:
        raise ended


@contextmanager
def frozen(modules: Iterable[nn.Module]) -> Iterator[None]:
    """No parameter asks for a gradient, so that nothing is kept for one; afterwards each asks as it did."""
    asking = [parameter for module in modules for parameter in module.parameters(recurse=False)]
    asking = [parameter for parameter in asking if parameter.requires_grad]
    for parameter in asking:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in asking:
            parameter.requires_grad_(True)


def copy_without_hooks(model: nn.Module, memo: dict[int, Any] | None = None) -> nn.Module:
    """`copy.deepcopy` of a model without any hook of its modules: they belong to the original, and may not copy."""
    kept = []
    try:
        for module in model.modules():
            for name in _HOOK_DICTS:
                kept.append((module, name, getattr(module, name)))
                setattr(module, name, OrderedDict())
        return copy.deepcopy(model, memo)
    finally:
        for module, name, hooks in kept:
            setattr(module, name, hooks)


@contextmanager
def own_hooks_paused(modules: Iterable[nn.Module]) -> Iterator[None]:
    """While it is entered, hooks of this library that are on `modules` now do nothing; those of the user run."""
    found = [hook for module in modules for hook in _forward_hooks_of(module) if isinstance(hook, _SpotHook)]
    for hook in found:
        hook.n_pauses += 1
    try:
        yield
    finally:
        for hook in found:
            hook.n_pauses -= 1


def unwrapped(model: Any) -> Any:
    """The module inside `torch.compile(module)` and (distributed) data parallelism, which share its parameters."""
    while True:
        inner = getattr(model, "_orig_mod", None)
        if type(model).__name__ in ("DistributedDataParallel", "DataParallel"):
            inner = model.module
        if not isinstance(inner, nn.Module):
            return model
        model = inner


_HOOK_DICTS = (
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_backward_hooks",
    "_backward_pre_hooks",
)


class _OurHook:
    """A hook of this library, told apart from a user's by its type."""

    any_tokens = False


class _SpotHook(_OurHook):
    """Sees the tensor of a hook site, and may replace it; counts how often it fired."""

    def __init__(self, hook_site: HookSite, visit: Hook, any_tokens: bool) -> None:
        self._visit = visit
        self._side = hook_site.side
        self.place = hook_site.place
        self.any_tokens = any_tokens
        self.n_fired = self.n_pauses = 0

    def __call__(self, _module: nn.Module, inputs: tuple[Any, ...], output: Any = None) -> Any:
        self.n_fired += 1
        if self.n_pauses:
            return None
        if self._side == "output":
            return self._visit(output)
        changed = self._visit(inputs[0])
        return None if changed is None else (changed, *inputs[1:])


class _Recorder(_OurHook):
    """Keeps what its module was called with."""

    def __init__(self, calls: dict[nn.Module, Call]) -> None:
        self._calls = calls

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: Any = None) -> None:
        self._calls[module] = (args, dict(kwargs))


@contextmanager
def recorded_calls(modules: Iterable[nn.Module]) -> Iterator[dict[nn.Module, Call]]:
    """Module -> the positional and named arguments of its last call in the meantime."""
    calls: dict[nn.Module, Call] = {}
    with ExitStack() as stack:
        for module in modules:
            handle = module.register_forward_pre_hook(_Recorder(calls), with_kwargs=True)
            stack.callback(handle.remove)
        yield calls


class _CallHook(_OurHook):
    """Sees a whole call of its module, and may replace what it gave."""

    def __init__(self, visit: CallVisit) -> None:
        self._visit = visit

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: Any = None, output: Any = None) -> Any:
        return self._visit(module, args, kwargs, output)


@contextmanager
def on_calls(modules: Iterable[nn.Module], visit: CallVisit) -> Iterator[None]:
    """While it is entered, `visit(module, args, kwargs, output)` sees every call, and may return another output."""
    with ExitStack() as stack:
        for module in modules:
            stack.callback(module.register_forward_hook(_CallHook(visit), with_kwargs=True).remove)
        yield


def _install(hook_site: HookSite, visit: Hook, any_tokens: bool) -> Callable[[], None]:
    hook = _SpotHook(hook_site, visit, any_tokens)
    if hook_site.side == "output":
        return hook_site.module.register_forward_hook(hook).remove
    return hook_site.module.register_forward_pre_hook(hook).remove


def modules_of(*roots: nn.Module) -> Iterator[nn.Module]:
    """Every module of several models once, in the order of `nn.Module.modules`.

    That makes a name for each at every depth, three times the work; and every forward pass asks.
    """
    waiting = list(reversed(roots))
    found: dict[int, nn.Module] = {}
    while waiting:
        module = waiting.pop()
        if id(module) not in found:
            found[id(module)] = module
            waiting += [child for child in reversed(module._modules.values()) if child is not None]
    return iter(found.values())


def has_own_hooks(modules: Iterable[nn.Module], *, minding_tokens: bool = False) -> bool:
    """Whether this library has a hook on one of `modules` at this moment, or one that minds which tokens it sees."""
    return any(
        isinstance(hook, _OurHook) and not (minding_tokens and hook.any_tokens)
        for module in modules
        for hook in _forward_hooks_of(module)
    )


def _forward_hooks_of(module: nn.Module) -> Iterator[object]:
    return chain(module._forward_hooks.values(), module._forward_pre_hooks.values())


def is_placed(modules: Iterable[nn.Module]) -> bool:
    """Whether accelerate moves tensors between devices around modules, and has to see each of them end."""
    return any(hasattr(module, "_hf_hook") for module in modules)


def count_foreign_hooks(model: nn.Module) -> int:
    """How many hooks of all kinds are on `model` and its submodules that a user put there."""
    return sum(
        not (isinstance(hook, _OurHook) or _is_wiring(hook))
        for module in modules_of(model)
        for hooks in (
            module._forward_hooks,
            module._forward_pre_hooks,
            module._backward_hooks,
            module._backward_pre_hooks,
        )
        for hook in hooks.values()
    )


def _is_wiring(hook: object) -> bool:
    """Whether a bridge or transformers put a hook there for itself, when it first ran, for good.

    What a user adds to a hook point is wrapped in a function of `transformer_lens.hook_points`.
    """
    module = str(getattr(hook, "__module__", ""))
    is_lens = module.startswith("transformer_lens.") and not module.startswith("transformer_lens.hook_points")
    return is_lens or module.startswith("transformers.")
