"""Running a base model of transformers on a batch, and finding out what of it need not run."""

import re
from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from rmtension.data._encoding import EncodedPairs, EncodedText
from rmtension.data._packing import attention_mask, pack
from rmtension.data._tokens import TokenBatch
from rmtension.models._hooks import eager_eval
from rmtension.models._last_block import LastMLP

# A packed row may be off by so much of the residual stream, or by so many times what a mask alone changes, which has to
# be rounding too. Wrong positions are off by percents; half precision rounds every step of attention to 3 or 2 digits,
# in deep models often.
_PACKING_TOLERANCE = {torch.float16: 0.003, torch.bfloat16: 0.02}
_TIMES_ROUNDING = 4
# Tokens shared, of one rest and of the other, of the pair that is packed to see whether that works.
_PROBE = (12, 10, 6)
# How configs name the number of tokens that attention looks back, in all layers or in some; not counts of layers.
_WINDOW = re.compile(r"^(?!.*(layers|pattern)).*(window|chunk|local_attention)")
# A mask grows with the square of a row: one of so many tokens has 64 MB in float32.
_LONGEST = 4096


def probe_batch(n_tokens: int, device: torch.device, n_texts: int = 1) -> TokenBatch:
    """A text of the first `n_tokens` ids, `n_texts` times."""
    ids = torch.arange(n_tokens, device=device).repeat(n_texts, 1)
    real = torch.ones_like(ids, dtype=torch.bool)
    return TokenBatch(ids, real, real, ids[:, -1], ids[:, 0], tuple(range(n_texts)))


def run_base(base: Any, batch: TokenBatch) -> Float[Tensor, "row token d_model"]:
    """The last hidden state of a base model of transformers, bridged or not."""
    # No attention mask: behind a causal mask nothing sees the padding on the right. With one, padding further away than
    # a sliding window sees nothing at all; Gemma-2 in float64 makes NaN of it, and 0 * NaN then reaches every token.
    more = {}
    if batch.position_ids is not None:
        mask = attention_mask(batch, next(base.parameters()).dtype)
        more = {"attention_mask": mask, "position_ids": batch.position_ids}
    output: Tensor = base(input_ids=batch.input_ids, use_cache=False, **more)[0]
    return output


def let_run_in_float64(model: Any) -> None:
    """Have a model in float64 run its experts one by one: transformers' kernel for all at once knows no float64."""
    grouped = getattr(getattr(model, "config", None), "_experts_implementation", None) == "grouped_mm"
    if grouped and next(model.parameters()).dtype == torch.float64:
        model.set_experts_implementation("eager")


def measure_packing(base: Any, n_embeddings: int, context: int) -> int:
    """The longest packed row that `base` computes as it computes texts alone; 0 where it does not. Decided by trying.

    Windows are no part of the mask, and some families take columns for positions in one: rows stay within them.
    """
    config = base.config.get_text_config()
    # Flash attention takes the lengths of texts, and reads a mask of two dimensions as if it were those.
    if "flash" in str(getattr(config, "_attn_implementation", "")):
        return 0
    longest = min([context, _LONGEST, *windows_of(config)])
    parameter = next(base.parameters())
    ids = [number % n_embeddings for number in range(sum(_PROBE))]
    n_shared, n_one, _ = _PROBE
    rests = ids[n_shared : n_shared + n_one], ids[n_shared + n_one :]
    texts = [EncodedText((*ids[:n_shared], *rest), n_shared, 0) for rest in rests]
    alone = TokenBatch.from_texts(texts, (0, 0), pad_token_id=None, device=parameter.device)
    packed = pack(EncodedPairs((texts[0],), (texts[1],), 0, 0), None).to(parameter.device)
    if packed.input_ids.shape[1] > longest:
        return 0
    try:
        with torch.no_grad(), eager_eval(base.modules()):
            columns = torch.arange(alone.input_ids.shape[1], device=parameter.device)
            masked = replace(alone, position_ids=columns.expand_as(alone.input_ids))
            # Of a model over several devices the stream comes out on the last one.
            expected, rounded, found = (run_base(base, batch).double().cpu() for batch in (alone, masked, packed))
    except Exception:  # whatever a family that takes no such mask runs into
        return 0
    mask = alone.mask.cpu()
    right = expected[mask]
    rounding = _furthest(rounded[mask], right)
    off = _furthest(torch.cat([found[0, side] for side in packed.mask.cpu()]), right)
    tolerance = _PACKING_TOLERANCE.get(parameter.dtype, 1e-5)
    # A mask that is misread moves both: only what is small enough to be rounding excuses the packed row.
    return (
        longest if rounding <= _TIMES_ROUNDING * tolerance and off <= max(tolerance, _TIMES_ROUNDING * rounding) else 0
    )


def find_last_mlp(base: Any, path: str | None, block: nn.Module, n_embeddings: int) -> LastMLP | None:
    """The module that the last block's projection at `path` is in, if it works token by token; decided by trying."""
    parent = None if path is None else base.get_submodule(path.rpartition(".")[0])
    if parent is None or parent is block or parent not in list(block.modules()):
        return None
    parameter = next(base.parameters())
    ids = [number % n_embeddings for number in range(sum(_PROBE))]
    texts = [EncodedText(tuple(some), 0, 0) for some in (ids[: _PROBE[0]], ids[_PROBE[0] :])]
    batch = TokenBatch.from_texts(texts, (0, 1), pad_token_id=None, device=parameter.device)
    found = LastMLP(parent)
    try:
        with torch.no_grad(), eager_eval(base.modules()):
            expected = batch.gather_last(run_base(base, batch)).double().cpu()
            with found.at_last_tokens(batch):
                output = batch.gather_last(run_base(base, batch)).double().cpu()
    except Exception:  # whatever an MLP that is called in another way runs into
        return None
    tolerance = _PACKING_TOLERANCE.get(parameter.dtype, 1e-5)
    return found if _furthest(output, expected) <= tolerance else None


def windows_of(config: Any) -> list[int]:
    """The positive numbers in a config that are named like a window of attention."""
    return [
        value for name, value in config.to_dict().items() if type(value) is int and value > 0 and _WINDOW.search(name)
    ]


def _furthest(found: Float[Tensor, "token d_model"], expected: Float[Tensor, "token d_model"]) -> float:
    """How far the furthest token is off in its middle channel, relative to the channel; a few channels may be huge."""
    size = expected.abs().mean(dim=0).clamp(min=torch.finfo(expected.dtype).tiny)
    return float(((found - expected).abs() / size).median(dim=1).values.max())
