"""The head of a model in memory whose class is not transformers' own: read by rules, and compared with its logits."""

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from rmtension.bodies._native_run import run_base
from rmtension.bodies._run_modes import eager_eval
from rmtension.data._tokens import TokenBatch
from rmtension.errors import DataError, ModelError
from rmtension.heads._head import Head
from rmtension.heads._head_kinds import KnownHead, known_head
from rmtension.heads._head_tensors import HeadTensors, names_outside
from rmtension.heads._heads import is_numbered, read_head
from rmtension.heads._unknown_heads import unknown_head

# Half precision rounds every layer to 3 or 2 digits.
_TOLERANCE = {torch.float16: 2e-2, torch.bfloat16: 5e-2}
_PROBE = 12


def head_in_memory(model: Any) -> KnownHead | None:
    """The head of `model`, whose body is `model.base_model`; None if it has none besides a linear layer `score`.

    Runs the model once on a short text. Raises `ModelError` for a head that no rule knows, and for one whose output is
    not among the model's logits.
    """
    known = read_in_memory(model)
    if known is not None:
        _require_logits(type(model).__name__, model, known.head)
    return known


def read_in_memory(model: Any) -> KnownHead | None:
    """The same without the comparison, so that nothing runs; hooks may be installed on the model."""
    prefix = getattr(model, "base_model_prefix", "")
    if getattr(model, "base_model", model) is model or not prefix:
        return None
    state: Mapping[str, Tensor] = model.state_dict()
    outside = names_outside([name for name in state if not name.startswith(f"{prefix}.")])
    if all(part.startswith("score.") and not is_numbered(part) for part in outside):
        return None
    tensors = HeadTensors.of({name: state[name] for name in outside})
    name = type(model).__name__
    known = known_head(tensors, {**model.config.to_dict(), **vars(model.config), "architectures": [name]})
    width: int = model.config.get_text_config().hidden_size
    if known is None:
        try:
            known = KnownHead(read_head({name: state[name] for name in outside}, width))
        except ModelError as error:
            raise ModelError(unknown_head(name, tensors, width)) from error
    return known


def _require_logits(name: str, model: Any, head: Head) -> None:
    """Compare the head's first output with the model's own logits on a short text, if the model returns logits."""
    parameter = next(model.parameters())
    n_embeddings = len(model.get_input_embeddings().weight)
    ids = [*range(min(_PROBE, n_embeddings)), *head.ending_ids, *range(min(3, n_embeddings))]
    rows = torch.tensor([ids], device=parameter.device)
    batch = TokenBatch.from_rows(rows, torch.ones_like(rows, dtype=torch.bool))
    own = copy.deepcopy(head).to(parameter.device, torch.float32)
    try:
        with torch.no_grad(), eager_eval(model.modules()):
            places = own.tokens(batch)
            states = batch.gather(places, run_base(model.base_model, batch))
            outputs = own.read_tokens(states.float(), places, batch)[0].double()
            given = model(input_ids=rows, attention_mask=torch.ones_like(rows))
    except (DataError, IndexError) as error:
        raise ModelError(f"{name}: its head could not be compared with its logits ({error}). Pass head=...") from error
    logits = _logits(given)
    if logits is None or logits.numel() not in (1, len(outputs), len(ids)):
        return
    logits = logits.double().flatten()
    expected = logits[-1:] if logits.numel() == len(ids) else logits
    off = float((outputs[: len(expected)] - expected).abs().max())
    limit = _TOLERANCE.get(parameter.dtype, 1e-4) * max(1.0, float(expected.abs().max()))
    if not off <= limit:
        raise ModelError(
            f"{name}: for a short text, the head read from its tensors gives {outputs[: len(expected)].tolist()[:4]}, "
            f"the model itself {expected.tolist()[:4]}, so its code computes something else. Define the head and pass "
            "it: head=OwnHead(), a subclass of rmtension.heads.Head."
        )


def _logits(given: Any) -> Tensor | None:
    """The logits among what a model returned, or the scores of its text."""
    for name in ("logits", "end_scores", "score"):
        value = getattr(given, name, None)
        if isinstance(value, Tensor):
            return value
    if isinstance(given, Tensor):
        return given
    return given[0] if isinstance(given, tuple) and given and isinstance(given[0], Tensor) else None
