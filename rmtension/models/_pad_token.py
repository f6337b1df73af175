"""The token that is skipped at the end of a text, before the token that the reward is read from."""

from pathlib import Path
from typing import Any

from rmtension.errors import ModelError


def pad_token_id(
    name: str | Path, config: Any, tokenizer: Any, pad_token: str | None, pools: bool, is_headless: bool
) -> int | None:
    """The id of the token that is skipped at the end of a text; None skips nothing."""
    configured: int | None = getattr(config.get_text_config(), "pad_token_id", None)
    if pad_token is not None:
        token_id = None if tokenizer is None else tokenizer.get_vocab().get(pad_token)
        if token_id is None:
            raise ModelError(
                f"pad_token: {pad_token!r} is not in the vocabulary of {name}. Pass a token of tokenizer.get_vocab()."
            )
        if pools and configured not in (None, token_id):
            raise ModelError(
                f"pad_token: {pad_token!r} is token {token_id}, but transformers skips token {configured}, the "
                f"pad_token_id in the config of {name}. Leave pad_token out, or change the config."
            )
        return int(token_id)
    if not pools:
        # A value head or a token's logit is read at the last token, whichever it is. A model without a reward skips
        # pad tokens, so that its last token is that of the reward models it is compared with.
        return configured if is_headless else None
    if configured is None and tokenizer is not None and tokenizer.pad_token_id is None:
        raise ModelError(
            f"{name}: neither its config nor its tokenizer has a pad token, but transformers reads the reward at the "
            f"last token that is not a pad token. Pass it: pad_token={tokenizer.eos_token or '<a token>'!r}."
        )
    return configured
