"""The language model inside a model for text and images (or audio), which computes the same on texts."""

from typing import Any

import torch
from torch import nn

from rmtension.bodies._native_run import probe_batch, run_base, stream_difference, stream_tolerance
from rmtension.bodies._run_modes import eager_eval, unwrapped

_PROBE_TOKENS = 12
# How configs name the token that stands for a part of an image, a video or a sound.
_KINDS = ("image", "video", "audio", "boi", "eoi", "boa", "eoa", "vision_start", "vision_end")


def text_model(base: nn.Module) -> nn.Module:
    """The language model alone of a base model for text and images; any other model as it is.

    Both run on a few tokens of text; if their states differ, the whole model is kept. Cost: two short runs.
    """
    whole: Any = unwrapped(base)
    inner = getattr(whole, "language_model", None)
    if whole.config.get_text_config() is whole.config or not isinstance(inner, nn.Module):
        return base
    device = next(inner.parameters()).device
    batch = probe_batch(
        min(_PROBE_TOKENS, *media_tokens(whole.config), whole.config.get_text_config().vocab_size), device
    )
    with torch.no_grad(), eager_eval(whole.modules()):
        expected, actual = (run_base(model, batch).double() for model in (whole, inner))
    same = stream_difference(actual, expected) <= stream_tolerance(next(inner.parameters()).dtype)
    return inner if same else base


def media_tokens(config: Any) -> frozenset[int]:
    """The ids of tokens that stand for images, videos or sounds; empty for a model of text alone."""
    names = [f"{kind}_token_{suffix}" for kind in _KINDS for suffix in ("id", "index")]
    ids = [getattr(config, name, None) for name in names] if config.get_text_config() is not config else []
    return frozenset(number for number in ids if isinstance(number, int))
