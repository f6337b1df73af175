"""Rewards of texts and of token ids, without pairs."""

from collections.abc import Mapping, Sequence
from itertools import compress

import torch
from jaxtyping import Float, Int
from torch import Tensor

from rmtension._progress import progress_bar
from rmtension.data._encoding import EncodedText, TextOrChat, encode_texts
from rmtension.data._given_ids import check_ids, compact
from rmtension.data._length_buckets import text_batches
from rmtension.data._pair import PreferencePair
from rmtension.data._pairs import PreferencePairs
from rmtension.data._tokens import TokenBatch
from rmtension.distributed import current
from rmtension.errors import OptionError
from rmtension.models._reward_model import RewardModel
from rmtension.passes._nonfinite import require_finite


def score_texts(
    model: RewardModel, texts: Sequence[TextOrChat], *, truncate: bool = False, progress: bool | None = None
) -> Float[Tensor, "text"]:
    """The reward of every text, in the order of `texts`, on the CPU. Cost: one forward pass per text."""
    if isinstance(texts, str):
        raise OptionError("texts: expected a list of texts, got one string. Put it in a list: score([text]).")
    if isinstance(texts, PreferencePairs | Mapping) or (texts and isinstance(texts[0], PreferencePair)):
        given = type(texts).__name__ if isinstance(texts, PreferencePairs | Mapping) else "a list of PreferencePair"
        raise OptionError(
            f"texts: expected a list of texts, got {given}. Score preference pairs with score_pairs(pairs); from a "
            "mapping of pairs, choose those of one key: score_pairs(pairs['helpful'])."
        )
    model.require_choice()
    _require_no_prompt(model)
    encoded = encode_texts(model.tokenizer, texts, max_length=model.max_length, truncate=truncate)
    for number, text in enumerate(encoded):
        model.require_text(text, f"texts: text {number}")
    rewards = torch.zeros(len(encoded), dtype=model.reward_dtype)
    batches = text_batches(
        encoded, tokens_per_batch=model.tokens_together(), read_at=model.read_at, device=model.device
    )
    shard = current()
    with progress_bar(progress=progress, total=len(encoded), desc="score", unit="text") as bar:
        for number, batch in enumerate(batches):
            if shard.takes(number):
                rewards[list(batch.indices)] = model.rewards(batch).cpu()
            bar.update(len(batch.indices))
    if shard.size > 1:
        shard.require_same("list of texts", f"{[text.ids for text in encoded]} {model.fingerprint}")
        shard.add_up(rewards)
    return require_finite(model, rewards, lambda row: one_text(model, encoded[row]))


def score_tokens(
    model: RewardModel, input_ids: Int[Tensor, "text token"], attention_mask: Tensor | None = None
) -> Float[Tensor, "text"]:
    """The reward of every row of token ids. `attention_mask` is 0 at padding, which may be on either side."""
    model.require_choice()
    _require_no_prompt(model)
    mask = torch.ones_like(input_ids, dtype=torch.bool) if attention_mask is None else attention_mask.bool()
    check_ids(input_ids, mask, max_length=model.max_length, n_embeddings=model.body.n_embeddings)
    for number, (row, real) in enumerate(zip(input_ids.tolist(), mask.tolist(), strict=True)):
        model.require_text(EncodedText(tuple(compress(row, real)), 0, 0), f"input_ids: row {number}")
    # Masked positions may hold any id, and the embedding still looks them up.
    ids, mask = compact(input_ids.masked_fill(~mask, 0).to(model.device), mask.to(model.device))

    def batch_of(ids: Int[Tensor, "text token"], mask: Tensor) -> TokenBatch:
        return TokenBatch.from_rows(ids, mask, read_at=model.read_at)

    rewards = model.rewards(batch_of(ids, mask)).cpu()
    return require_finite(model, rewards, lambda row: batch_of(ids[[row]], mask[[row]]))


def _require_no_prompt(model: RewardModel) -> None:
    if model.require_head().needs_prompt:
        raise OptionError(
            f"texts: a {type(model.head).__name__} reads the last token of the prompt, and a text by itself does not "
            "say where its prompt ends. Use preference pairs: head.score_pairs(pairs), head.check(pairs)."
        )


def one_text(model: RewardModel, text: EncodedText) -> TokenBatch:
    """A batch of one text."""
    return TokenBatch.from_texts([text], [0], read_at=model.read_at, device=model.device)
