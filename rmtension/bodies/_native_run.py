"""Runs a base model of transformers on a batch, and tests which parts of it may be skipped or shared."""

import re
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import DynamicCache

from rmtension.bodies._last_block import LastMLP
from rmtension.bodies._run_modes import eager_eval, unwrapped
from rmtension.data._encoding import EncodedPairs, EncodedText
from rmtension.data._packing import attention_mask, pack
from rmtension.data._prompts import KeysAndValues
from rmtension.data._tokens import TokenBatch

# The largest difference of a packed row, relative to the residual stream, or as a multiple of the rounding that a mask
# alone causes. Wrong positions are off by percents; half precision rounds every step of attention to 3 or 2 digits,
# many times in deep models.
_PACKING_TOLERANCE = {torch.float16: 0.003, torch.bfloat16: 0.02}
TIMES_ROUNDING = 4
# The lengths of the probe pair that is packed in a trial run: shared prefix, rest of each text.
_PROBE = (12, 10, 6)
# How configs name the window of attention in all layers or in some, excluding names of layer counts.
_WINDOW = re.compile(r"^(?!.*(layers|pattern)).*(window|chunk|local_attention)")
# The difference of two residual streams that rounding explains, relative to their size: half precision rounds every
# layer to 3 or 2 digits, and a conversion or an edit changes the order of the operations. 1e-4 in other dtypes.
_STREAM_TOLERANCE = {torch.float16: 0.05, torch.bfloat16: 0.2}
# A mask grows with the square of a row: for this many tokens it has 64 MB in float32.
_LONGEST = 4096


def probe_batch(n_tokens: int, device: torch.device, n_texts: int = 1) -> TokenBatch:
    """A text of the first `n_tokens` ids, `n_texts` times."""
    ids = torch.arange(n_tokens, device=device).repeat(n_texts, 1)
    real = torch.ones_like(ids, dtype=torch.bool)
    return TokenBatch(ids, real, real, ids[:, -1], ids[:, 0], tuple(range(n_texts)))


def probe_pairs(n_embeddings: int, n_pairs: int = 2) -> EncodedPairs:
    """Pairs for trial runs, whose prompts differ in length."""
    ids = [number % n_embeddings for number in range(sum(_PROBE))]
    n_shared, n_one, _ = _PROBE
    rests = ids[n_shared : n_shared + n_one], ids[n_shared + n_one :]
    sides = [
        tuple(EncodedText((*ids[first:n_shared], *rest), n_shared - first, first) for first in range(n_pairs))
        for rest in rests
    ]
    return EncodedPairs(sides[0], sides[1], 0, 0)


def packing_tolerance(dtype: torch.dtype) -> float:
    """The largest `furthest` of a packed row that rounding in a model of this dtype explains."""
    return _PACKING_TOLERANCE.get(dtype, 1e-5)


class _AfterPrompts(DynamicCache):  # type: ignore[misc]
    """The keys and values of a batch's prompts, which its tokens attend to, followed by their own."""

    def __init__(self, states: Sequence[KeysAndValues]) -> None:
        super().__init__()
        self._states = states

    def update(self, keys: Tensor, values: Tensor, layer: int, *args: Any, **more: Any) -> tuple[Tensor, Tensor]:
        before = self._states[layer]
        return torch.cat([before[0], keys], dim=-2), torch.cat([before[1], values], dim=-2)

    def get_seq_length(self, layer: int = 0) -> int:
        return self._states[layer][0].shape[-2]


def run_base(
    base: Any, batch: TokenBatch, *, hides_padding: bool = False, cache: DynamicCache | None = None
) -> Float[Tensor, "row token d_model"]:
    """The last hidden state of a base model of transformers, bridged or not.

    `hides_padding` passes a mask that hides padding from attention, which a model with bidirectional attention needs.
    The model adds its keys and values to `cache`, in which those of the batch's prompts come first.
    """
    if batch.prompts is not None:
        assert batch.prompts.states is not None
        cache = _AfterPrompts(batch.prompts.states)
    # No attention mask: with causal attention no token sees the padding on its right. With a mask, padding beyond a
    # sliding window sees nothing, which is NaN in Gemma-2 in float64, and 0 * NaN then reaches every token.
    more: dict[str, Any] = {}
    if batch.position_ids is not None:
        mask = attention_mask(batch, next(base.parameters()).dtype)
        more = {"attention_mask": mask, "position_ids": batch.position_ids}
    elif hides_padding:
        more = {"attention_mask": batch.position_mask("all").long()}
    more |= type_inputs(base, batch)
    if cache is not None:
        more["past_key_values"] = cache
    output: Tensor = base(input_ids=batch.input_ids, use_cache=cache is not None, **more)[0]
    return output


def type_inputs(model: Any, batch: TokenBatch) -> dict[str, Tensor]:
    """The token types of a batch as an argument of `model`.

    None are given to a model that adds no embedding of them: BERT does, RoBERTa, DeBERTa-v3 and ModernBERT do not.
    """
    has_types = getattr(unwrapped(model).config, "type_vocab_size", 0) > 1
    return {"token_type_ids": batch.token_types} if batch.token_types is not None and has_types else {}


def stream_difference(actual: Float[Tensor, "*rest"], expected: Float[Tensor, "*rest"]) -> float:
    """The largest difference of two residual streams, relative to the largest value of `expected`."""
    return float((actual - expected).abs().max() / expected.abs().max().clamp(min=1e-12))


def stream_tolerance(dtype: torch.dtype) -> float:
    """The largest `stream_difference` that rounding in a model of this dtype explains."""
    return _STREAM_TOLERANCE.get(dtype, 1e-4)


def let_run_in_float64(model: Any) -> None:
    """Make a float64 model run its experts one by one, because transformers' grouped kernel has no float64."""
    grouped = getattr(getattr(model, "config", None), "_experts_implementation", None) == "grouped_mm"
    if grouped and next(model.parameters()).dtype == torch.float64:
        model.set_experts_implementation("eager")


def measure_packing(base: Any, n_embeddings: int, context: int) -> int:
    """The longest packed row for which `base` computes the same as for texts alone, or 0; determined by a trial run.

    Rows are not longer than attention windows, because the mask does not contain windows, and some families measure
    them in columns instead of positions.
    """
    config = base.config.get_text_config()
    # Flash attention expects the lengths of texts, and misreads a two-dimensional mask as lengths.
    if "flash" in str(getattr(config, "_attn_implementation", "")):
        return 0
    longest = min([context, _LONGEST, *windows_of(config)])
    parameter = next(base.parameters())
    pairs = probe_pairs(n_embeddings, 1)
    alone = TokenBatch.from_texts([*pairs.chosen, *pairs.rejected], (0, 0), device=parameter.device)
    packed = pack(pairs).to(parameter.device)
    if packed.input_ids.shape[1] > longest:
        return 0
    try:
        with torch.no_grad(), eager_eval(base.modules()):
            columns = torch.arange(alone.input_ids.shape[1], device=parameter.device)
            masked = replace(alone, position_ids=columns.expand_as(alone.input_ids))
            # If the model is spread over several devices, the stream is on the last of them.
            expected, rounded, shared = (run_base(base, batch).double().cpu() for batch in (alone, masked, packed))
    except Exception:  # a family that does not support such a mask may raise anything
        return 0
    mask = alone.mask.cpu()
    reference = expected[mask]
    rounding = furthest(rounded[mask], reference)
    off = furthest(torch.cat([shared[0, side] for side in packed.mask.cpu()]), reference)
    tolerance = packing_tolerance(parameter.dtype)
    # A misread mask changes both runs, so the difference of the masked run must be small enough to be rounding.
    return longest if rounding <= TIMES_ROUNDING * tolerance and off <= max(tolerance, TIMES_ROUNDING * rounding) else 0


def find_last_mlp(
    base: Any, path: str | None, block: nn.Module, n_embeddings: int, *, hides_padding: bool = False
) -> LastMLP | None:
    """The module that contains the last block's projection at `path`, if a trial run shows it works token by token."""
    parent = None if path is None else base.get_submodule(path.rpartition(".")[0])
    if parent is None or parent is block or parent not in list(block.modules()):
        return None
    parameter = next(base.parameters())
    ids = [number % n_embeddings for number in range(sum(_PROBE))]
    texts = [EncodedText(tuple(some), 0, 0) for some in (ids[: _PROBE[0]], ids[_PROBE[0] :])]
    batch = TokenBatch.from_texts(texts, (0, 1), device=parameter.device)
    last_mlp = LastMLP(parent, base)
    try:
        with torch.no_grad(), eager_eval(base.modules()):
            expected = batch.gather_last(run_base(base, batch, hides_padding=hides_padding)).double().cpu()
            with last_mlp.only_at(batch, batch.last_places) as tokens:
                if tokens is None:  # the user has hooks: no token was skipped, so there is nothing to compare
                    return None
                output = batch.gather_last(run_base(base, batch, hides_padding=hides_padding)).double().cpu()
    except Exception:  # an MLP that is called in another way may raise anything
        return None
    tolerance = packing_tolerance(parameter.dtype)
    return last_mlp if furthest(output, expected) <= tolerance else None


def windows_of(config: Any) -> list[int]:
    """The positive numbers in a config whose names are those of an attention window."""
    return [
        value for name, value in config.to_dict().items() if type(value) is int and value > 0 and _WINDOW.search(name)
    ]


def furthest(actual: Float[Tensor, "token d_model"], expected: Float[Tensor, "token d_model"]) -> float:
    """The largest error of a token: its median relative error over channels, whose sizes may differ widely."""
    size = expected.abs().mean(dim=0).clamp(min=torch.finfo(expected.dtype).tiny)
    return float(((actual - expected).abs() / size).median(dim=1).values.max())
