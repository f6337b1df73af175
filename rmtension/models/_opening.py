"""Makes a `RewardModel` from a checkpoint, a saved model or a model in memory, and checks it."""

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar, Unpack, cast

import torch
from torch import nn

from rmtension.bodies._bodies import Body, find_body
from rmtension.bodies._bridges import wrap
from rmtension.bodies._native_run import run_base, stream_difference, stream_tolerance
from rmtension.bodies._norms import read_norm
from rmtension.bodies._run_modes import eager_eval
from rmtension.data._encoding import EncodedText
from rmtension.data._tokens import TokenBatch
from rmtension.errors import ModelError, OptionError
from rmtension.heads._head import Head
from rmtension.heads._heads import read_head
from rmtension.heads._log_ratio_head import LogRatioHead, require_same_tokens
from rmtension.heads._outputs import choose_outputs
from rmtension.heads._process_head import ProcessHead
from rmtension.models._checkpoint import Checkpoint
from rmtension.models._checkpoint_names import require_name
from rmtension.models._checkpoints import open_checkpoint
from rmtension.models._head_files import from_head_file
from rmtension.models._lens_models import read_model
from rmtension.models._loading import LoadOptions
from rmtension.models._reward_model import RewardModel
from rmtension.models._run_options import RunOptions, run_options_of
from rmtension.models._streamed_weights import StreamedWeights

# The options of a model that its reference is opened with too.
_OF_REFERENCE = ("dtype", "device", "device_map", "n_devices", "weight_memory", "trust_remote_code")
# The class to make: `RewardHead`, or the class of the model that the new model is made from.
_Model = TypeVar("_Model", bound=RewardModel)


def open_model(
    kind: type[_Model],
    opened: Checkpoint,
    *,
    model_class: str = "TransformerBridge",
    process_weights: bool = False,
    **options: Unpack[RunOptions],
) -> _Model:
    """Make a model of the class `kind` from a checkpoint that transformers loaded.

    Raises `ModelError` if a converted model gives another reward than transformers on a short text, and for a model
    whose attention is not causal.
    """
    source: LoadOptions = {} if opened.source is None else opened.source.options
    opened = replace(opened, head=with_reference(opened.head, opened.tokenizer, source))
    code = opened.trust_remote_code
    body = wrap(
        opened.name,
        opened.base,
        opened.tokenizer,
        model_class=model_class,
        process_weights=process_weights,
        trust_remote_code=code,
    )
    weight_memory, streamed = source.get("weight_memory"), None
    if weight_memory is not None:
        streamed = StreamedWeights([body.block(layer) for layer in range(int(body.cfg.n_layers))], weight_memory)
    norm: nn.Module | None = None
    if body.final_norm_folded:
        # transformers' norm, from an unprocessed bridge.
        norm = wrap(opened.name, opened.base, None, trust_remote_code=code).final_norm
    head = head_on(body, opened.head, final_norm=norm)
    options = within_reference(body, head, options)
    model = _make(kind, body, head, opened.choice, opened.tokenizer, opened.pad_token_id, options, opened)
    model.streamed = streamed
    if body.native is None:
        _require_same_rewards(model, opened)
        if opened.source is not None:
            model.checkpoint = replace(opened, base=None)
    require_hidden_padding(model)
    return model


def open_saved_model(kind: type[_Model], folder: Path, head: object, output: object, options: LoadOptions) -> _Model:
    """Open a model that `_lens_models` wrote; `head`, unless it is None, replaces the saved head."""
    run_options = run_options_of(options)
    unknown = sorted(set(options) - {"dtype", "device", "tokenizer"} - set(run_options))
    if unknown:
        raise OptionError(
            f"from_pretrained: {folder} holds a model of a TransformerLens class, for which the options are dtype, "
            f"device, tokenizer, head and output; got {unknown}. Leave them out."
        )
    device = torch.device(options.get("device") or ("cuda" if torch.cuda.is_available() else "cpu"))
    saved = read_model(folder, options.get("dtype", torch.float32), device)
    body = find_body(saved.model)
    tokenizer = saved.tokenizer if options.get("tokenizer") is None else options["tokenizer"]
    read = saved.head if head is None else read_head(from_head_file(head), _width(body))
    choice = choose_outputs(output, read, "head")
    return _make(kind, body, read, choice, tokenizer, saved.pad_token_id, run_options)


def with_checkpoint(model: _Model, changed: Checkpoint) -> _Model:
    """Open another checkpoint with the options of `model`."""
    opened = open_model(type(model), changed, **model.run_options)
    if changed.head is model.head:
        opened.weighted_sums = model.weighted_sums
    return opened


def with_lens_model(model: _Model, changed: nn.Module, *, head: Head | None = None) -> _Model:
    """Put the head (or another one), tokenizer and options of `model` on another TransformerLens model of its shape."""
    body = find_body(changed)
    return _make(
        type(model), body, head or model.head, model.choice, model.tokenizer, model.pad_token_id, model.run_options
    )


def head_on(body: Body, weight: object, *, final_norm: nn.Module | None = None) -> Head | None:
    """Read the head of a body from `weight`; None for None.

    If weight processing folded the final norm's gain into the unembedding, the gain of `final_norm` is folded into the
    head.
    """
    if weight is None:
        return None
    width = _width(body)
    head = read_head(from_head_file(weight), width)
    if not body.final_norm_folded:
        return head
    if final_norm is None:
        raise ModelError(
            "model: weight processing folded the gain of its final norm into its unembedding, so its residual stream "
            "lacks the gain. Pass the norm of the model before processing as final_norm=..., or load the model without "
            "processing (HookedTransformer.from_pretrained_no_processing). If the model never had a gain "
            "(normalization_type 'LNPre' or 'RMSPre' from the start), pass final_norm=model.ln_final."
        )
    return head.after_folding(read_norm(final_norm, width))


@torch.no_grad()
def require_hidden_padding(model: RewardModel) -> None:
    """Raise `ModelError` if padding changes a residual stream (attention is not causal). Cost: two short runs."""
    longest = min(6, model.max_length)
    ids = [number % model.body.n_embeddings for number in range(longest)]
    texts = [EncodedText(tuple(ids[:length]), 0, 0) for length in (max(1, longest // 2), longest)]
    streams = []
    for some in (texts[:1], texts):
        batch = TokenBatch.from_texts(some, range(len(some)), device=model.device)
        streams.append(batch.gather_last(model.residual(batch))[0].double())
    alone, in_a_batch = streams
    off = stream_difference(in_a_batch, alone)
    if off > stream_tolerance(model.dtype):
        raise ModelError(
            f"model: expected causal attention, but padding behind a text changes its residual stream by {off:.1e} of "
            f"its size, so a text would get another reward in a batch than alone. {type(model.body.module).__name__} "
            "attends in both directions, as an encoder does. Use a model with causal attention."
        )


def bound_head(body: Body, head: object, tokenizer: Any) -> object:
    """A head with what it needs besides the residual stream (step, marker, unembedding, reference); others as given."""
    if isinstance(head, ProcessHead) and not head.marker_ids:
        return head.on(read_head(head.step, _width(body)), tokenizer)
    if isinstance(head, LogRatioHead) and head.unembedding is None:
        model: Any = getattr(body.model, "original_model", None)
        if not hasattr(model, "get_output_embeddings"):
            raise ModelError(
                f"head: a LogRatioHead needs a language model of transformers, got a {type(body.model).__name__} "
                "without one. Use RewardHead.from_pretrained(folder, head=LogRatioHead(...))."
            )
        head = head.on(type(model).__name__, model)
    return with_reference(head, tokenizer, {}) if isinstance(head, LogRatioHead) else head


def with_reference(head: Head | None, tokenizer: Any, options: LoadOptions) -> Head | None:
    """A `LogRatioHead` with its reference opened, with some of the `options` if it is given by name; other heads."""
    if not isinstance(head, LogRatioHead) or head.reference is None:
        return head
    reference: Any = head.reference
    if isinstance(reference, str | Path):
        require_name(reference)
        same = {name: value for name, value in options.items() if name in _OF_REFERENCE}
        checkpoint = open_checkpoint(reference, reward=True, head=LogRatioHead(), options=cast(LoadOptions, same))
        reference = open_model(RewardModel, checkpoint)
    if not isinstance(reference, RewardModel) or not isinstance(reference.head, LogRatioHead):
        got = f"a {type(reference).__name__}"
        if isinstance(reference, RewardModel):
            got = (
                "a model without a head"
                if reference.head is None
                else f"a head of type {type(reference.head).__name__}"
            )
        raise ModelError(
            f"reference: expected the folder of a language model, or a model that was opened with a LogRatioHead, got "
            f"{got}. Pass RewardHead.from_pretrained('path/to/reference', head=LogRatioHead())."
        )
    require_same_tokens(tokenizer, reference.tokenizer)
    return head.compared_with(reference)


def within_reference(body: Body, head: Head | None, options: RunOptions) -> RunOptions:
    """The options with a `max_length` that the reference can run too."""
    reference = head.opened_reference if isinstance(head, LogRatioHead) else None
    if reference is None:
        return options
    own = {id(parameter) for parameter in body.module.parameters()}
    if any(id(parameter) in own for parameter in reference.body.module.parameters()):
        raise ModelError(
            "reference: expected another model than the policy, but both run the same modules in memory, so every "
            "reward would be 0, with and without an ablation. A LoRA adapter is a part of the model that it was added "
            "to: pass the folder of the model before training, head=LogRatioHead('path/to/reference')."
        )
    cfg: Any = body.model.cfg
    longest = options.get("max_length") or int(cfg.n_ctx)
    return {**options, "max_length": min(longest, reference.max_length)}


def _require_same_rewards(model: RewardModel, opened: Checkpoint) -> None:
    """Compare a converted model with transformers on a short text; raises `ModelError` if the rewards differ."""
    assert opened.head is not None
    # A prompt and a response, with what the head must find in them to read.
    needed = opened.head.ending_ids
    n = max(2, min(12, model.max_length - len(needed), model.body.n_embeddings))
    text = EncodedText((*range(n), *needed), n // 2, 0)
    batch = TokenBatch.from_texts([text], [0], device=model.device)
    base: Any = opened.base
    with torch.no_grad(), eager_eval(base.modules()):
        states = batch.gather(opened.head.tokens(batch), run_base(base, batch)).to(model.reward_dtype)
        plain = copy.deepcopy(opened.head).to(states)
        expected = plain.read_tokens(states, plain.tokens(batch), batch)[0]
        difference = float((model.all_outputs(batch)[0] - expected).abs().max())
    # Half precision rounds every layer to 3 or 2 digits, in another order after a conversion.
    size = max(1.0, float(expected.abs().max()))
    tolerance = (1e-4 if model.dtype in (torch.float32, torch.float64) else 5e-2) * size
    if not difference <= tolerance:
        raise ModelError(
            f"{opened.name}: the rewards of the converted {type(model.model).__name__} differ from transformers' by "
            f"{difference:.1e}, because TransformerLens does not convert this architecture exactly. Open it without "
            "model_class and process_weights."
        )


def _make(
    kind: type[_Model],
    body: Body,
    head: Head | None,
    choice: tuple[int, ...] | None,
    tokenizer: Any,
    pad_token_id: int | None,
    options: RunOptions,
    checkpoint: Checkpoint | None = None,
) -> _Model:
    # Not `kind(...)`, because the constructor of `RewardHead` has other arguments.
    model = kind.__new__(kind)
    RewardModel.__init__(
        model,
        body,
        head,
        choice=choice,
        tokenizer=tokenizer,
        pad_token_id=pad_token_id,
        checkpoint=checkpoint,
        **options,
    )
    if checkpoint is None:
        require_hidden_padding(model)
    return model


def _width(body: Body) -> int:
    return int(body.cfg.d_model)
