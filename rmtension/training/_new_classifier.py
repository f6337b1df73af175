"""A reward model before its training: a language model with a new reward head."""

import copy
from pathlib import Path
from typing import Any

import torch
from torch import nn

from rmtension.errors import ModelError, OptionError
from rmtension.training._model_checks import require_pad_token, require_vocabulary

_HEAD_STD = 0.02  # standard deviation of the weights of a new reward head, as in the paper


def new_classifier(base: Any, tokenizer: Any = None, *, seed: int) -> tuple[Any, Any]:
    """A sequence classifier in float32 with one new output, and its tokenizer."""
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    if isinstance(base, (str, Path)):
        try:
            tokenizer = tokenizer if tokenizer is not None else AutoTokenizer.from_pretrained(str(base))
            model, info = AutoModelForSequenceClassification.from_pretrained(
                str(base),
                num_labels=1,
                dtype=torch.float32,
                use_safetensors=True,
                ignore_mismatched_sizes=True,  # for a head with several outputs; any other mismatch raises below
                output_loading_info=True,
            )
        except (OSError, KeyError, ValueError, RuntimeError) as error:
            raise ModelError(f"base: transformers could not load {base}: {error}. Check the path.") from error
        odd = {*info["missing_keys"], *(entry[0] for entry in info["mismatched_keys"])} - {"score.weight", "score.bias"}
        if odd:
            raise ModelError(
                f"base: {base} lacks weights of {type(model).__name__}, or has other shapes: {sorted(odd)[:4]}. Use a "
                "complete checkpoint."
            )
    else:
        if tokenizer is None:
            raise OptionError("tokenizer: required if base is a config, got None. train_tokenizer makes a small one.")
        config = copy.deepcopy(base)
        config.num_labels = 1
        model = AutoModelForSequenceClassification.from_config(config, dtype=torch.float32)
    require_pad_token(tokenizer)
    require_vocabulary(model, tokenizer)
    model.config.get_text_config().pad_token_id = tokenizer.pad_token_id
    _draw_head(model, seed)
    return model, tokenizer


def _draw_head(model: Any, seed: int) -> None:
    head = getattr(model, "score", None)
    if not isinstance(head, nn.Linear) or head.out_features != 1:
        raise ModelError(
            f"base: expected a classifier with a linear layer 'score' with one output, got {type(model).__name__} with "
            f"{head}. Use a causal language model."
        )
    # With its own generator, the head depends on the seed and not on how many numbers loading has drawn.
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        head.weight.copy_(torch.randn(head.weight.shape, generator=generator) * _HEAD_STD)
        if head.bias is not None:
            head.bias.zero_()
