"""Batches of texts of similar length, so that little of them is padding."""

from collections.abc import Iterator, Sequence

import torch

from rmtension.data._encoding import EncodedText
from rmtension.data._token_places import READ_LAST, ReadAt
from rmtension.data._tokens import TokenBatch
from rmtension.errors import OptionError

# A batch with an eighth of the largest size is nearly as fast per token. Once a batch has that size, a text whose row
# would be more than a tenth padding begins a new batch.
_ENOUGH, _MOST_PADDING = 0.125, 0.1


def length_buckets(lengths: Sequence[int], tokens_per_batch: int) -> list[list[int]]:
    """Group indices by similar length, so that each padded group has at most `tokens_per_batch` tokens.

    A text longer than that forms a group by itself. A group that is large enough to be fast takes no text whose row
    would be more than a tenth padding. The longest texts come first, so that a batch that does not fit in memory fails
    at once and not after an hour.
    """
    if tokens_per_batch < 1:
        raise OptionError(f"tokens_per_batch: expected a positive number, got {tokens_per_batch}.")
    groups: list[list[int]] = []
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        if groups:
            group, width = groups[-1], lengths[groups[-1][0]]
            has_room = (len(group) + 1) * width <= tokens_per_batch
            is_small = len(group) * width < _ENOUGH * tokens_per_batch
            if has_room and (is_small or lengths[index] >= (1 - _MOST_PADDING) * width):
                group.append(index)
                continue
        groups.append([index])
    return groups


def text_batches(
    texts: Sequence[EncodedText], *, tokens_per_batch: int, read_at: ReadAt = READ_LAST, device: torch.device | str
) -> Iterator[TokenBatch]:
    """Batches of texts of similar length; `indices` index `texts`."""
    for indices in length_buckets([len(text) for text in texts], tokens_per_batch):
        batch = [texts[index] for index in indices]
        yield TokenBatch.from_texts(batch, indices, read_at=read_at, device=device)
