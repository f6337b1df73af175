"""Finds the module of a gated MLP that computes act(gate), by changing its output, not by its name."""

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from functools import partial

import torch
from torch import Tensor, nn

from rmtension.bodies._hooks import Hook, HookSite, InstalledHooks
from rmtension.errors import ModelError

# The rows that each text of `find_gates` has: one unchanged, and two with different replacements of an activation.
GATE_ROWS = 3
# The difference of two rows that rounding explains, relative to their norm. A wrong module is off by about 1.
_ROUNDING = {torch.float16: 0.05, torch.bfloat16: 0.05}


def find_gates(run: Callable[[], object], modules: Iterable[nn.Module], inputs: Sequence[HookSite]) -> list[HookSite]:
    """The hook site of `mlp_gate` in every layer, given the `inputs` of the down projections (the sites of `mlp`).

    The candidate is the output of the last activation function before the down projection, and it is verified: `run`
    runs `GATE_ROWS` equal texts, the output is replaced by random numbers in two of them, and the input of the
    projection must change in proportion, channel by channel. If the input equals the random numbers, the MLP has no
    gate, and the hook site is that of `mlp`.

    Cost: one run. Raises `ModelError` if no module computes act(gate).
    """
    search = _GateSearch(inputs)
    hooks: list[tuple[HookSite, Hook]] = [
        (HookSite(module, "output"), partial(search.write, module))
        for module in modules
        if is_activation_function(module)
    ]
    hooks += [(hook_site, partial(search.read, layer)) for layer, hook_site in enumerate(inputs)]
    with InstalledHooks(hooks), torch.no_grad():
        run()
    return search.gates()


class _GateSearch:
    """The hooks of `find_gates`, and what they have seen."""

    def __init__(self, inputs: Sequence[HookSite]) -> None:
        self._inputs = inputs
        self._random = torch.Generator().manual_seed(0)
        self._n_calls: Counter[nn.Module] = Counter()
        # The activation function that ran last, the values written to row 1, and the factor from row 1 to row 2.
        self._last: tuple[nn.Module, Tensor, Tensor] | None = None
        self._gates: dict[int, HookSite] = {}
        self._problems: dict[int, str] = {}

    def write(self, module: nn.Module, output: Tensor) -> Tensor | None:
        self._n_calls[module] += 1
        if output.shape[0] % GATE_ROWS:
            return None  # single tokens, on their way to experts
        rows = output.reshape(GATE_ROWS, -1, output.shape[-1]).clone()
        written = torch.randn(rows.shape[1:], generator=self._random).to(rows)
        # Powers of two, so that no dtype rounds the factor away; not all positive, so that a norm is noticed.
        factor = torch.tensor([-1.0, 0.0, 2.0])[torch.randint(3, rows.shape[2:], generator=self._random)].to(rows)
        rows[1], rows[2] = written, factor * written
        self._last = (module, written, factor)
        return rows.reshape(output.shape)

    def read(self, layer: int, value: Tensor) -> Tensor | None:
        if value.shape[0] % GATE_ROWS:
            self._problems[layer] = "its down projection does not run on all tokens"
            return None
        rows = value.reshape(GATE_ROWS, -1, value.shape[-1]).clone()
        if self._last is None:
            self._problems[layer] = "no module of its own computes the activation function"
        else:
            module, written, factor = self._last
            self._last = None
            limit = _ROUNDING.get(rows.dtype, 1e-3)
            if written.shape == rows.shape[1:] and _distance(rows[2], factor * rows[1]) <= limit:
                is_gated = not torch.equal(rows[1], written)
                self._gates[layer] = HookSite(module, "output") if is_gated else self._inputs[layer]
            else:
                self._problems[layer] = (
                    f"the output of {type(module).__name__} is not a factor of the down projection's input"
                )
        # The rest of the model gets the same text in all rows, so that the next layer's rows can be compared too.
        rows[1:] = rows[0]
        return rows.reshape(value.shape)

    def gates(self) -> list[HookSite]:
        for layer, hook_site in self._gates.items():
            if hook_site is not self._inputs[layer] and self._n_calls[hook_site.module] > 1:
                self._problems[layer] = (
                    f"its {type(hook_site.module).__name__} runs {self._n_calls[hook_site.module]} times"
                )
        for layer in range(len(self._inputs)):
            if layer not in self._gates or layer in self._problems:
                raise ModelError(
                    f"site 'mlp_gate': act(gate) of layer {layer} can be neither read nor written, because "
                    f"{self._problems.get(layer, 'its down projection does not run')}. Use site 'mlp', where Zero() "
                    "and Scale(alpha) do the same; if weights were processed or converted, open the model without "
                    "process_weights and model_class."
                )
        return [self._gates[layer] for layer in range(len(self._inputs))]


def is_activation_function(module: nn.Module) -> bool:
    """Whether `module` maps each number independently and changes it, unlike a projection, norm or hook point."""
    if next(module.children(), None) is not None or any(parameter.numel() > 1 for parameter in module.parameters()):
        return False
    numbers = torch.linspace(-4.0, 4.0, 64)[None, None].to(next(module.parameters(), torch.empty(0)))
    kept = torch.arange(64, device=numbers.device) % 3 > 0
    try:
        # `forward`, so that hooks of the user do not run.
        whole, part = (module.forward(values) for values in (numbers.clone(), numbers * kept))
    except Exception:  # a module that is not called with one tensor, or not called at all
        return False
    if not isinstance(whole, Tensor) or whole.shape != numbers.shape:
        return False
    return torch.equal(whole[..., kept], part[..., kept]) and not torch.equal(whole, numbers)


def _distance(output: Tensor, expected: Tensor) -> float:
    """The distance of two tensors relative to the norm of the second; 0 if both are 0."""
    return float((output - expected).float().norm() / expected.float().norm().clamp(min=1e-12))
