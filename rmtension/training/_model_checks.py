"""Checks before a training: the tokenizer has a pad token, its tokens have embeddings, and texts fit the context."""

from typing import Any

from rmtension.errors import ModelError, OptionError

_LONGEST = 1024  # tokens, unless the caller or the model's context sets another limit; as in the paper


def require_pad_token(tokenizer: Any) -> None:
    if tokenizer.pad_token_id is None:
        raise ModelError(
            "tokenizer: expected a pad token, got None. The token that the reward is read from depends on it "
            "(transformers skips trailing pad tokens). Set tokenizer.pad_token, best to a token that no text contains, "
            "and pass tokenizer=..."
        )


def require_vocabulary(model: Any, tokenizer: Any) -> None:
    n_rows = model.get_input_embeddings().weight.shape[0]
    if len(tokenizer) > n_rows:
        raise ModelError(
            f"tokenizer: it has {len(tokenizer)} tokens, but the model's embedding has {n_rows} rows. Use the model's "
            "own tokenizer, or resize the embedding first."
        )


def longest_text(config: Any, max_length: int | None) -> int:
    """The largest number of tokens per text."""
    context = getattr(config.get_text_config(), "max_position_embeddings", None)
    limit = max_length if max_length is not None else min(_LONGEST, context or _LONGEST)
    if limit < 1 or limit > (context or limit):
        raise OptionError(f"max_length: expected 1 to {context} (the model's context), got {limit}.")
    return int(limit)
