"""Runs prompts by themselves, and keeps the keys and values that the tokens after them attend to.

In a causal model nothing after a prompt changes it. Gradients at the response need no backward pass through the prompt.
"""

from collections.abc import Sequence
from contextlib import nullcontext, suppress
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from rmtension.bodies._hooks import AllSeen, is_placed, modules_of
from rmtension.bodies._native_run import TIMES_ROUNDING, furthest, packing_tolerance, probe_pairs, run_base
from rmtension.bodies._run_modes import eager_eval
from rmtension.data._encoding import EncodedText
from rmtension.data._packing import pack
from rmtension.data._prompts import KeysAndValues, Prompts
from rmtension.data._tokens import TokenBatch


class PromptRuns:
    """Whether a base model of transformers can run prompts first, and how it does.

    Args:
        base: the model.
        n_layers: how many layers it has.
        n_embeddings: the rows of its embedding.
    """

    def __init__(self, base: nn.Module, n_layers: int, n_embeddings: int) -> None:
        self._base = base
        self._n_layers = n_layers
        self._n_embeddings = n_embeddings

    @cached_property
    def works(self) -> bool:
        """Whether, in a trial run, tokens after a prompt get the same states if the prompt runs by itself first."""
        base = self._base
        parameter = next(base.parameters())
        pairs = probe_pairs(self._n_embeddings)
        whole, after = (pack(pairs, after_prompts=split).to(parameter.device) for split in (False, True))
        prompts = after.prompts
        assert prompts is not None
        try:
            with torch.no_grad(), eager_eval(base.modules()):
                expected = run_base(base, whole).double().cpu()
                states = run_base(base, after.with_prompts(self.run(prompts))).double().cpu()
        except Exception:  # a family that keeps other states may raise anything
            return False
        differences = []
        for text, row in enumerate(whole.rows.tolist()):
            of_text = expected[row, whole.mask[text].cpu()][int(prompts.lengths[row]) :]
            differences.append(furthest(states[row, after.mask[text].cpu()], of_text))
        # NaN is not within any tolerance.
        return all(off <= TIMES_ROUNDING * packing_tolerance(parameter.dtype) for off in differences)

    def run(self, prompts: Prompts) -> Prompts:
        """The prompts with their keys and values. Cost: a forward pass over each prompt that did not run yet."""
        return prompts.ready(partial(self._run_bucket, prompts.of_row.device))

    @torch.no_grad()
    def _run_bucket(self, device: torch.device, texts: Sequence[EncodedText]) -> list[KeysAndValues]:
        # accelerate needs every module to finish.
        last = None if is_placed(modules_of(self._base)) else self._n_layers - 1
        kept = _Kept(last)
        with nullcontext() if last is None else suppress(AllSeen):
            run_base(self._base, TokenBatch.from_texts(texts, range(len(texts)), device=device), cache=kept)
        return kept.states


class _Kept(DynamicCache):  # type: ignore[misc]
    """Keys and values as they come; the run ends after those of layer `last`.

    They are copied only if they are a part of a larger tensor, such as a joint projection, which would stay in memory.
    """

    def __init__(self, last: int | None) -> None:
        super().__init__()
        self.states: list[KeysAndValues] = []
        self._last = last

    def update(self, keys: Tensor, values: Tensor, layer: int, *args: Any, **more: Any) -> tuple[Tensor, Tensor]:
        self.states.append((_alone(keys), _alone(values)))
        if layer == self._last:
            raise AllSeen
        return keys, values


def _alone(states: Tensor) -> Tensor:
    """The states in memory of their own."""
    return states if states.untyped_storage().nbytes() == states.nbytes else states.clone()
