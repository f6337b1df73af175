"""Rotary embeddings that depend on the longest text of a batch, computed for each text as if it ran alone.

A model with longrope has two sets of frequencies, and uses the second set for the whole batch if any row is longer than
the context it was pretrained with. The reward of a short text would then depend on the other texts of its batch.
"""

import inspect
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor, nn

from rmtension.bodies._hooks import copy_without_hooks, on_calls
from rmtension.data._tokens import TokenBatch


class RopeByText:
    """The rotary modules of a base model of transformers whose output depends on the largest position in a batch.

    `same_up_to` is the longest row for which the output does not depend on it; texts up to that length may share a row.

    Args:
        modules: the modules that may run.
        run: runs the model once, on any text; the arguments of the modules are then tried with other positions.
        context: the number of tokens of the longest text.
    """

    def __init__(self, modules: Iterable[nn.Module], run: Callable[[], object], context: int) -> None:
        candidates = [module for module in modules if any("inv_freq" in name for name in module._buffers)]
        limits: dict[nn.Module, int] = {}

        def measure(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], _output: object) -> None:
            limits[module] = min(_same_up_to(module, args, kwargs, context), limits.get(module, context))

        if candidates:
            with on_calls(candidates, measure):
                run()
        self._modules = [module for module, limit in limits.items() if limit < context]
        self.same_up_to = min(limits.values(), default=context)

    @contextmanager
    def for_texts(self, batch: TokenBatch) -> Iterator[None]:
        """While the model runs on `batch`, every row gets the embeddings that it would get alone."""
        lengths = batch.input_ids.new_zeros(len(batch.input_ids))
        lengths[batch.rows] = batch.mask.sum(dim=1)
        # All packed rows are at most `same_up_to` long.
        is_same = int(lengths.max()) <= self.same_up_to or bool((lengths == lengths[0]).all())
        if is_same or batch.position_ids is not None:
            yield
            return
        with on_calls(self._modules, partial(self._by_row, lengths)):
            yield

    def _by_row(
        self, lengths: Int[Tensor, "row"], module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> Any:
        """The module's output if it is called separately for the rows of each length."""
        call = inspect.signature(module.forward).bind(*args, **kwargs)
        positions = call.arguments["position_ids"]
        parts = output if isinstance(output, tuple) else (output,)
        merged = [part.expand(len(lengths), *part.shape[1:]).clone() for part in parts]
        same = lengths.clamp(min=self.same_up_to)
        for length in sorted(set(same.tolist())):
            rows = (same == length).nonzero()[:, 0]
            width = int(lengths[rows].max())
            call.arguments["position_ids"] = positions[..., :1, :width]
            alone = module.forward(*call.args, **call.kwargs)
            for whole, part in zip(merged, alone if isinstance(alone, tuple) else (alone,), strict=True):
                whole[rows.to(whole.device), :width] = part
        return tuple(merged) if isinstance(output, tuple) else merged[0]


def _same_up_to(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], context: int) -> int:
    """The longest row, of at most `context` tokens, in which position 1 is embedded as in a row of two tokens."""
    call = inspect.signature(module.forward).bind(*args, **kwargs)
    positions = call.arguments.get("position_ids")
    if not isinstance(positions, Tensor) or context < 3:
        return context
    # A copy, because a call changes the frequencies that are stored in the module.
    trial: Any = copy_without_hooks(module)

    def embedded(last: int) -> Tensor:
        # A model for text and images has three positions per token, which are equal in a text.
        call.arguments["position_ids"] = positions.new_tensor([1, last]).expand(*positions.shape[:-2], 1, 2)
        output = trial.forward(*call.args, **call.kwargs)
        return torch.stack([part[0, 0] for part in (output if isinstance(output, tuple) else (output,))])

    short = embedded(1)
    if torch.equal(embedded(context - 1), short):
        return context
    low, high = 2, context
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if torch.equal(embedded(middle - 1), short) else (low, middle)
    return low
