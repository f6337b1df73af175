"""Batches of pairs, and what their texts share run once: [shared prefix, rest of one, rest of another, ...].

A mask keeps the rests from seeing each other, and every token has the position that it has in its own text, so that
each text is computed as if it stood alone. The responses of a pair follow one prompt, 73% of the tokens in HH-harmless;
in best-of-n, those of all pairs of an item do.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from rmtension.data._encoding import EncodedPairs, EncodedText
from rmtension.data._tokens import TokenBatch, last_token, length_buckets

# Who shares a row: nobody (a text a row, in order); the texts of one pair, so that a row's gradient is that pair's; or
# those of one prompt.
Sharing = Literal["none", "pair", "prompt"]
# Below this share of tokens saved, the attention between the rests that is computed and masked costs more.
_LEAST_SAVED = 0.1


@dataclass(frozen=True)
class _Row:
    """One text, or several after the prefix that they share."""

    texts: tuple[EncodedText, ...]
    n_shared: int

    @property
    def length(self) -> int:
        return sum(map(len, self.texts)) - (len(self.texts) - 1) * self.n_shared

    @property
    def saves(self) -> bool:
        return self.length <= (1 - _LEAST_SAVED) * sum(map(len, self.texts))


@dataclass(frozen=True)
class _PackedGroup:
    """Pairs that run in one batch, by their places, and the rows that their texts are in."""

    places: tuple[int, ...]
    rows: tuple[_Row, ...]

    @property
    def is_packed(self) -> bool:
        return any(len(row.texts) > 1 for row in self.rows)

    @property
    def width(self) -> int:
        return max(row.length for row in self.rows)


def pair_batches(
    pairs: EncodedPairs,
    *,
    tokens_per_batch: int,
    pad_token_id: int | None,
    device: torch.device | str,
    pack_up_to: int = 0,
    group_up_to: int = 0,
    sharing: Sharing = "pair",
) -> Iterator[TokenBatch]:
    """Batches that hold both texts of each pair: the chosen ones, then the rejected ones; `indices` index `pairs`.

    Each place stands twice, so that per-pair results never wait for another batch. Texts that share enough are packed
    where the row then has at most `pack_up_to` tokens, or `group_up_to` for more than one pair; 0 packs none.
    """
    if sharing == "none":
        lengths = [max(map(len, both)) for both in zip(pairs.chosen, pairs.rejected, strict=True)]
        for places in length_buckets(lengths, max(1, tokens_per_batch // 2)):
            texts = [side[place] for side in (pairs.chosen, pairs.rejected) for place in places]
            yield TokenBatch.from_texts(texts, places * 2, pad_token_id=pad_token_id, device=device)
        return
    groups = list(_packed_groups(pairs, sharing == "prompt", pad_token_id, pack_up_to, min(group_up_to, pack_up_to)))
    for is_packed in (False, True):
        some = [group for group in groups if group.is_packed == is_packed]
        # Unpacked, a pair has two rows.
        budget = tokens_per_batch if is_packed else max(1, tokens_per_batch // 2)
        for numbers in length_buckets([group.width for group in some], budget):
            yield _batch(pairs, [some[number] for number in numbers], pad_token_id).to(device)


def pack(pairs: EncodedPairs, pad_token_id: int | None) -> TokenBatch:
    """Every pair as one row, whether that saves anything or not."""
    groups = [
        _PackedGroup((place,), (_row(texts, pad_token_id),))
        for place, texts in enumerate(zip(pairs.chosen, pairs.rejected, strict=True))
    ]
    return _batch(pairs, groups, pad_token_id)


def attention_mask(batch: TokenBatch, dtype: torch.dtype) -> Float[Tensor, "row 1 query key"]:
    """0 where a token may look, the lowest number elsewhere: at itself, and at what comes before it in its own text."""
    texts = batch.scatter_to_rows(batch.mask.float())
    together = texts.transpose(1, 2) @ texts > 0
    n_tokens = texts.shape[-1]
    # Padding looks at itself: a softmax over nothing is NaN.
    itself = torch.eye(n_tokens, dtype=torch.bool, device=texts.device)
    visible = together.tril() | itself
    lowest = torch.finfo(dtype).min
    return torch.zeros(visible.shape, dtype=dtype, device=texts.device).masked_fill(~visible, lowest)[:, None]


# -- inside ------------------------------------------------------------------------------------------------------------


def _packed_groups(
    pairs: EncodedPairs, by_prompt: bool, pad_token_id: int | None, pack_up_to: int, group_up_to: int
) -> Iterator[_PackedGroup]:
    both = list(zip(pairs.chosen, pairs.rejected, strict=True))
    groups: dict[object, list[int]] = {}
    for place, (chosen, _) in enumerate(both):
        # Prompts that were cut differently are different ones: a token may be the prompt's in one and not in the other.
        group = (chosen.key, chosen.response_start) if by_prompt and group_up_to else place
        groups.setdefault(group, []).append(place)
    for places in groups.values():
        taken: list[int] = []
        row: _Row | None = None
        for place in places:
            more = _row([*(row.texts if row else ()), *both[place]], pad_token_id)
            if row is not None and more.length > group_up_to:
                yield from _packed_or_alone(both, taken, row, pad_token_id, pack_up_to)
                taken, more = [], _row(both[place], pad_token_id)
            taken, row = [*taken, place], more
        assert row is not None
        yield from _packed_or_alone(both, taken, row, pad_token_id, pack_up_to)


def _packed_or_alone(
    both: Sequence[tuple[EncodedText, EncodedText]],
    places: Sequence[int],
    row: _Row,
    pad_token_id: int | None,
    pack_up_to: int,
) -> Iterator[_PackedGroup]:
    """One group of a row where that saves; otherwise the pairs by themselves, and in the end text by text."""
    if len(row.texts) == 1 or (row.length <= pack_up_to and row.saves):
        yield _PackedGroup(tuple(places), (row,))
    elif len(places) > 1:
        for place in places:
            yield from _packed_or_alone(both, [place], _row(both[place], pad_token_id), pad_token_id, pack_up_to)
    else:
        yield _PackedGroup(tuple(places), tuple(_Row((text,), 0) for text in row.texts))


def _row(texts: Sequence[EncodedText], pad_token_id: int | None) -> _Row:
    """The distinct texts as one row.

    Their order follows from the texts alone: turned round, a pair makes the same row, and its scores turn round to the
    last digit.
    """
    distinct = sorted(set(texts), key=lambda text: (text.ids, text.response_start))
    if len(distinct) == 1:
        return _Row(tuple(distinct), 0)
    # The token that a reward is read from is never shared: what is done to it is done to one text.
    most = min(_last(text, pad_token_id) for text in distinct)
    # What the first and the last in order share, all share.
    columns = zip(distinct[0].ids[:most], distinct[-1].ids[:most], strict=True)
    return _Row(tuple(distinct), next((place for place, (a, b) in enumerate(columns) if a != b), most))


def _batch(pairs: EncodedPairs, groups: Sequence[_PackedGroup], pad_token_id: int | None) -> TokenBatch:
    """The pairs of some groups: where each text's tokens are follows from the row it is in."""
    rows = [row for group in groups for row in group.rows]
    width = max(row.length for row in rows)
    input_ids, position_ids = torch.zeros(2, len(rows), width, dtype=torch.long)
    # (group, text) -> its row, and the column that its own tokens begin at.
    row_and_start: dict[tuple[int, EncodedText], tuple[int, int]] = {}
    number = 0
    for owner, group in enumerate(groups):
        for row in group.rows:
            shared, rests = row.texts[0].ids[: row.n_shared], [text.ids[row.n_shared :] for text in row.texts]
            ids = [*shared, *(one for rest in rests for one in rest)]
            places = [*range(row.n_shared), *(row.n_shared + place for rest in rests for place in range(len(rest)))]
            input_ids[number, : len(ids)] = torch.tensor(ids)
            position_ids[number, : len(ids)] = torch.tensor(places)
            starts = accumulate(map(len, rests), initial=row.n_shared)
            row_and_start |= {(owner, text): (number, start) for text, start in zip(row.texts, starts, strict=False)}
            number += 1
    sides = [
        (owner, side[place])
        for side in (pairs.chosen, pairs.rejected)
        for owner, group in enumerate(groups)
        for place in group.places
    ]
    texts = [text for _, text in sides]
    row_index, starts_at = torch.tensor([row_and_start[one] for one in sides]).unbind(1)
    n_shared = torch.tensor([row.n_shared for row in rows])[row_index]
    lengths = torch.tensor([len(text) for text in texts])
    columns = torch.arange(width)
    # What a text's own tokens are moved by, and where every column is in the text.
    moved = (starts_at - n_shared)[:, None]
    places_in = torch.where(columns < n_shared[:, None], columns, columns - moved)
    own = (columns >= starts_at[:, None]) & (places_in < lengths[:, None])
    mask = (columns < n_shared[:, None]) | own
    last = torch.tensor([_last(text, pad_token_id) for text in texts])
    return TokenBatch(
        input_ids=input_ids,
        mask=mask,
        response=mask & (places_in >= torch.tensor([text.response_start for text in texts])[:, None]),
        # Never among what is shared.
        last=last + moved[:, 0],
        keys=torch.tensor([text.key for text in texts]),
        indices=tuple(place for group in groups for place in group.places) * 2,
        row_index=row_index,
        position_ids=position_ids if any(group.is_packed for group in groups) else None,
    )


def _last(text: EncodedText, pad_token_id: int | None) -> int:
    if text.ids[-1] != pad_token_id:
        return len(text) - 1
    ids = torch.tensor([text.ids])
    return int(last_token(ids, torch.ones_like(ids, dtype=torch.bool), pad_token_id)[0])
