"""Training of a byte-level BPE tokenizer."""

from collections.abc import Sequence
from typing import Any

from rmtension.errors import OptionError


def train_tokenizer(
    texts: Sequence[str],
    vocab_size: int,
    *,
    eos_token: str = "<|endoftext|>",  # noqa: S107 - text tokens, not passwords
    pad_token: str = "<|pad|>",  # noqa: S107
    max_length: int | None = None,
) -> Any:
    """Train a byte-level BPE tokenizer on `texts`, with separate eos and pad tokens.

    `vocab_size` includes the 256 bytes, eos and pad, so it is at least 258. The same texts give the same tokenizer.
    Raises `OptionError` for a smaller vocabulary, or if eos and pad are the same token.

    Examples:
        >>> tokenizer = train_tokenizer(["hello hello"], 260)
        >>> tokenizer.decode(tokenizer("hello hello")["input_ids"])
        'hello hello'
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    if vocab_size < 258:
        raise OptionError(f"vocab_size: expected at least 258 (256 bytes, eos and pad), got {vocab_size}.")
    if eos_token == pad_token:
        raise OptionError(f"pad_token: expected another token than eos, got {pad_token!r} for both.")
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.post_processor = processors.ByteLevel(trim_offsets=False)
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[eos_token, pad_token],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    length = {} if max_length is None else {"model_max_length": max_length}
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        eos_token=eos_token,
        pad_token=pad_token,
        clean_up_tokenization_spaces=False,
        **length,
    )
