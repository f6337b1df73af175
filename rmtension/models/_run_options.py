"""Options that are set when a model is opened: how long texts may be, and what to do with texts that cannot be run."""

from collections.abc import Mapping
from typing import Literal, TypedDict

from rmtension._arguments import nearest, require_choice
from rmtension.errors import OptionError

ON_NONFINITE = ("raise", "skip")


class RunOptions(TypedDict, total=False):
    """Options of every constructor of `RewardHead`, passed as keywords: how the model runs texts.

    Attributes:
        max_length: the largest number of tokens per text; by default, and at most, the model's context. A prompt that
            is too long is cut from the left, and the result counts such texts.
        tokens_per_batch: how many tokens run together: by default 4,096 on a CPU and 32,768 on other devices, or fewer
            if activations would take more than half of the free memory (`docs/performance.md`).
        truncate_response: what to do with a response that does not fit into `max_length` by itself. False (the default)
            raises `DataError`; True cuts its end, and the result counts such texts.
        on_nonfinite: what to do with a pair that produces NaN or infinity. "raise" (the default) raises `ModelError`
            with the pair's id and the layer or weight that produced it; "skip" leaves the pair out of the result, whose
            provenance has its id.
        two_segments: how pairs are encoded. False (the default): prompt and response are one text. True: they are the
            two segments of an encoder, `tokenizer(prompt, response)`, as for OpenAssistant's DeBERTa reward models:
            [CLS] prompt [SEP] response [SEP]. A text for `score` is one segment.

    Examples:
        >>> options: RunOptions = {"max_length": 32, "truncate_response": True}
        >>> RewardHead.from_pretrained("organism", **options).run_options
        {'max_length': 32, ..., 'truncate_response': True, 'on_nonfinite': 'raise', 'two_segments': False}
    """

    max_length: int | None
    tokens_per_batch: int | None
    truncate_response: bool
    on_nonfinite: Literal["raise", "skip"]
    two_segments: bool


def usable_length(max_length: int | None, *, context: int, stable_up_to: int | None) -> int:
    """The largest number of tokens per text; raises `OptionError` if `max_length` is more than the model can run.

    A model with `stable_up_to` would give longer texts one reward in a batch and another alone.
    """
    if max_length is not None and not 0 < max_length <= context:
        raise OptionError(f"max_length: expected 1 to {context} (the model's context), got {max_length}.")
    usable = max_length or context
    if stable_up_to is not None and usable > stable_up_to:
        raise OptionError(
            f"max_length: expected at most {stable_up_to}, got {usable}: a longer text changes the rotary positions of "
            "its whole batch (use_dynamic_ntk_rope), so the other texts of the batch would get other rewards than "
            f"alone. Pass max_length={stable_up_to}."
        )
    return usable


def check_run_options(options: Mapping[str, object]) -> None:
    """Raise `OptionError` for an unknown option, or a value that no model allows."""
    known = sorted(RunOptions.__annotations__)
    for name in options:
        if name not in known:
            raise OptionError(f"options: expected some of {known}, got {name!r}.{nearest(name, known)}")
    tokens = options.get("tokens_per_batch")
    if tokens is not None and not (isinstance(tokens, int) and tokens >= 1):
        raise OptionError(f"tokens_per_batch: expected a positive number, got {tokens!r}.")
    for name in ("truncate_response", "two_segments"):
        if not isinstance(options.get(name, False), bool):
            raise OptionError(f"{name}: expected True or False, got {options[name]!r}.")
    require_choice("on_nonfinite", options.get("on_nonfinite", "raise"), ON_NONFINITE)


def run_options_of(options: Mapping[str, object]) -> RunOptions:
    """The `RunOptions` among some options; raises `OptionError` for a value that no model allows."""
    run_options = {name: options[name] for name in RunOptions.__annotations__ if name in options}
    check_run_options(run_options)
    return run_options  # type: ignore[return-value]
