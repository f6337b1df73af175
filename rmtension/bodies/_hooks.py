"""Forward hooks that are always removed again, and that are checked to have fired."""

import copy
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from itertools import chain
from typing import Any, Literal

from torch import Tensor, nn

from rmtension.errors import ModelError, OptionError

# A function of a tensor that may return a replacement.
Hook = Callable[[Tensor], Tensor | None]
# The same for a whole call: the module, its positional and keyword arguments, and its output.
CallVisit = Callable[[nn.Module, tuple[Any, ...], dict[str, Any], Any], Any]
# The positional and keyword arguments of a call.
Call = tuple[tuple[Any, ...], dict[str, Any]]


@dataclass(frozen=True)
class HookSite:
    """A tensor inside a running model: the output of a module, or its first input.

    `place` is the (site, layer) of its activation; None if the hook need not fire. A model may have several hook sites
    for the same activation, of which one fires in each run.
    """

    module: nn.Module
    side: Literal["input", "output"]
    place: tuple[str, int] | None = field(default=None, compare=False)


class InstalledHooks:
    """Context manager that installs all hooks or none, and removes them in reverse order.

    They are PyTorch hooks, also on TransformerLens' hook points, so `model.reset_hooks()` does not remove them, and the
    model's own lists do not contain them. `any_tokens` says that the hooks accept any subset of tokens. Raises
    `OptionError` if it is entered twice.
    """

    def __init__(self, hooks: Sequence[tuple[HookSite, Hook]], *, any_tokens: bool = False) -> None:
        self._hooks = tuple(hooks)
        self._any_tokens = any_tokens
        self._installed: ExitStack | None = None

    def __enter__(self) -> "InstalledHooks":
        if self._installed is not None:
            raise OptionError("hooks: this context is already entered. Leave it first, or create a second context.")
        # ExitStack removes registered hooks if a later registration fails, and continues if a removal fails.
        with ExitStack() as stack:
            for hook_site, visit in self._hooks:
                stack.callback(_install(hook_site, visit, self._any_tokens))
            self._installed = stack.pop_all()
        return self

    def __exit__(self, *exception: object) -> None:
        installed, self._installed = self._installed, None
        if installed is not None:
            installed.close()


class AllSeen(Exception):  # noqa: N818 - no error
    """Raised by a hook to end a run whose rest is not needed."""


@contextmanager
def all_fire(modules: Iterable[nn.Module], layers: range | None = None) -> Iterator[None]:
    """Raise `ModelError` after a run if a hook of this library did not fire, also if `AllSeen` ended the run.

    `layers` are the layers that the run goes through; all by default.
    """
    counts: dict[tuple[str, int], list[tuple[_SiteHook, int]]] = {}
    for module in modules:
        for hook in _forward_hooks_of(module):
            if isinstance(hook, _SiteHook) and hook.place and (layers is None or hook.place[1] in layers):
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
                "the model does not call the hooked module. If the module's forward was replaced, restore it (`del "
                "module.forward`); undo wrappers inside the model, and open it again."
            )
    if ended is not None:
        raise ended


def copy_without_hooks(model: nn.Module, memo: dict[int, Any] | None = None) -> nn.Module:
    """`copy.deepcopy` of a model without the hooks of its modules, which may not be copyable."""
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
    """Pause the hooks that this library has on `modules` now; hooks of the user still run."""
    own_hooks = [hook for module in modules for hook in _forward_hooks_of(module) if isinstance(hook, _SiteHook)]
    for hook in own_hooks:
        hook.n_pauses += 1
    try:
        yield
    finally:
        for hook in own_hooks:
            hook.n_pauses -= 1


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


class _PermanentHook:
    """Stays on its module from opening on, changes nothing, and counts neither as ours nor as the user's."""

    def __init__(self, visit: Callable[[Any], None]) -> None:
        self._visit = visit

    def __call__(self, _module: nn.Module, _inputs: tuple[Any, ...], output: Any = None) -> None:
        self._visit(output)


def install_for_good(module: nn.Module, before: Callable[[], None], after: Callable[[Any], None]) -> None:
    """Call `before()` before every run of a module, and `after(output)` after it; neither may change anything."""
    module.register_forward_pre_hook(_PermanentHook(lambda _: before()))
    module.register_forward_hook(_PermanentHook(after))


def has_permanent_hooks(model: nn.Module) -> bool:
    """Whether `install_for_good` was called for one of the modules of `model`."""
    return any(isinstance(hook, _PermanentHook) for module in modules_of(model) for hook in _forward_hooks_of(module))


class _SiteHook(_OurHook):
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
    """Keeps the arguments of its module's last call."""

    def __init__(self, calls: dict[nn.Module, Call]) -> None:
        self._calls = calls

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: Any = None) -> None:
        self._calls[module] = (args, dict(kwargs))


@contextmanager
def recorded_calls(modules: Iterable[nn.Module]) -> Iterator[dict[nn.Module, Call]]:
    """Record calls: a dict from each module to the positional and keyword arguments of its last call."""
    calls: dict[nn.Module, Call] = {}
    with ExitStack() as stack:
        for module in modules:
            handle = module.register_forward_pre_hook(_Recorder(calls), with_kwargs=True)
            stack.callback(handle.remove)
        yield calls


class _CallHook(_OurHook):
    """Sees a whole call of its module, and may replace the output."""

    def __init__(self, visit: CallVisit) -> None:
        self._visit = visit

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: Any = None, output: Any = None) -> Any:
        return self._visit(module, args, kwargs, output)


class _Mark(_OurHook):
    """Says that a call begins or ends."""

    def __init__(self, mark: Callable[[], None]) -> None:
        self._mark = mark

    def __call__(self, _module: nn.Module, _inputs: tuple[Any, ...], _output: Any = None) -> None:
        self._mark()


@contextmanager
def on_calls(modules: Iterable[nn.Module], visit: CallVisit) -> Iterator[None]:
    """Call `visit(module, args, kwargs, output)` in every call of the modules; it may return another output."""
    with ExitStack() as stack:
        for module in modules:
            stack.callback(module.register_forward_hook(_CallHook(visit), with_kwargs=True).remove)
        yield


@contextmanager
def around_calls(modules: Iterable[nn.Module], before: Callable[[], None], after: Callable[[], None]) -> Iterator[None]:
    """Call `before()` and `after()` around every call of the modules."""
    with ExitStack() as stack:
        for module in modules:
            stack.callback(module.register_forward_pre_hook(_Mark(before)).remove)
            stack.callback(module.register_forward_hook(_Mark(after)).remove)
        yield


def _install(hook_site: HookSite, visit: Hook, any_tokens: bool) -> Callable[[], None]:
    hook = _SiteHook(hook_site, visit, any_tokens)
    if hook_site.side == "output":
        return hook_site.module.register_forward_hook(hook).remove
    return hook_site.module.register_forward_pre_hook(hook).remove


def modules_of(*roots: nn.Module) -> Iterator[nn.Module]:
    """Every module of several models once, in the order of `nn.Module.modules`.

    Every forward pass needs this; `nn.Module.modules` also builds names, which takes three times as long.
    """
    waiting = list(reversed(roots))
    listed: dict[int, nn.Module] = {}
    while waiting:
        module = waiting.pop()
        if id(module) not in listed:
            listed[id(module)] = module
            if children := module._modules:
                waiting += [child for child in reversed(children.values()) if child is not None]
    return iter(listed.values())


def has_own_hooks(modules: Iterable[nn.Module], *, minding_tokens: bool = False) -> bool:
    """Whether this library has a hook on one of `modules`; with `minding_tokens`, one that needs all tokens."""
    return any(
        isinstance(hook, _OurHook) and not (minding_tokens and hook.any_tokens)
        for module in modules
        for hook in _forward_hooks_of(module)
    )


def _forward_hooks_of(module: nn.Module) -> Iterator[object]:
    return chain(module._forward_hooks.values(), module._forward_pre_hooks.values())


def is_placed(modules: Iterable[nn.Module]) -> bool:
    """Whether accelerate moves tensors between devices around modules, which requires that every module finishes."""
    return any(hasattr(module, "_hf_hook") for module in modules)


def count_foreign_hooks(model: nn.Module) -> int:
    """The number of hooks, of any kind, that the user installed on `model` and its submodules."""
    return sum(
        not (isinstance(hook, _OurHook) or _is_wiring(hook))
        for module in modules_of(model)
        for hooks in (
            module._forward_hooks,
            module._forward_pre_hooks,
            module._backward_hooks,
            module._backward_pre_hooks,
        )
        if hooks  # nearly all are empty, and this is faster
        for hook in hooks.values()
    )


def _is_wiring(hook: object) -> bool:
    """Whether a hook is permanent, or part of a bridge or of transformers, which install it in the first run.

    A hook that the user adds to a hook point is wrapped in a function of `transformer_lens.hook_points`.
    """
    if isinstance(hook, _PermanentHook):
        return True
    module = str(getattr(hook, "__module__", ""))
    is_lens = module.startswith("transformer_lens.") and not module.startswith("transformer_lens.hook_points")
    return is_lens or module.startswith("transformers.")
