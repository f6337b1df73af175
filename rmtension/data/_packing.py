"""Batches of pairs in which a shared prompt runs once: a packed row is [shared prefix, rest of a, rest of b, ...].

A mask keeps each rest from attending to the others, and every token keeps the position that it has in its own text, so
that each text is computed as in a row of its own. The two responses of a pair follow one prompt (73% of the tokens in
HH-harmless); in best-of-n, the responses of all pairs of an item do.
"""

from collections.abc import Callable, Iterator, Sequence
from itertools import accumulate
from typing import Literal

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from rmtension.data._encoding import EncodedPairs, EncodedText
from rmtension.data._length_buckets import length_buckets
from rmtension.data._packed_rows import PackedGroup, Row, packed_groups, row_of
from rmtension.data._prompts import PromptRun, Prompts
from rmtension.data._token_places import READ_LAST, ReadAt
from rmtension.data._tokens import TokenBatch, token_types_of

# Which texts share a row: none (one text per row, in order); those of one pair, so that a row's gradient belongs to
# that pair; those of one pair, in a row that begins after their prompt (`Prompts`); or those of one prompt.
Sharing = Literal["none", "pair", "after prompt", "prompt"]
# Prompts that are kept may have this many times the tokens of a batch: they are kept as keys and values alone.
_TIMES_KEPT = 4
# How many batches of training are sorted by length together.
_BATCHES_PER_WINDOW = 8


def pair_batches(
    pairs: EncodedPairs,
    *,
    tokens_per_batch: int,
    read_at: ReadAt = READ_LAST,
    device: torch.device | str,
    pack_up_to: int = 0,
    group_up_to: int = 0,
    sharing: Sharing = "pair",
    prompts_together: bool = True,
) -> Iterator[TokenBatch]:
    """Batches that hold both texts of each pair: the chosen ones, then the rejected ones; `indices` index `pairs`.

    With `sharing="after prompt"`, rows begin after their prompts where that saves gradients; with `prompts_together`,
    the prompts of several batches run together, which is for callers that run all batches.
    Every index occurs twice in a batch, so that per-pair results never wait for another batch. Texts that share a
    prefix, or differ in length, are packed into one row if that saves tokens and padding and the row then has at most
    `pack_up_to` tokens, or `group_up_to` for more than one pair; 0 packs nothing.
    """
    if sharing == "none":
        lengths = [max(map(len, both)) for both in zip(pairs.chosen, pairs.rejected, strict=True)]
        for indices in length_buckets(lengths, max(1, tokens_per_batch // 2)):
            texts = [side[index] for side in (pairs.chosen, pairs.rejected) for index in indices]
            yield TokenBatch.from_texts(texts, indices * 2, read_at=read_at, device=device)
        return
    groups = list(packed_groups(pairs, sharing == "prompt", read_at, pack_up_to, min(group_up_to, pack_up_to)))
    after = [group for group in groups if sharing == "after prompt" and group.n_prompt]
    if after:
        yield from _batches_after(pairs, after, read_at, device, tokens_per_batch, prompts_together)
        groups = [group for group in groups if not group.n_prompt]
    for is_packed in (False, True):
        some = [group for group in groups if group.is_packed == is_packed]
        # A pair that is not packed takes two rows.
        budget = tokens_per_batch if is_packed else max(1, tokens_per_batch // 2)
        for numbers in length_buckets([group.width for group in some], budget):
            yield _batch(pairs, [some[number] for number in numbers], read_at).to(device)


def prompt_batches(
    pairs: EncodedPairs, *, pairs_per_batch: int, read_at: ReadAt = READ_LAST, pack_up_to: int = 0, seed: int = 0
) -> list[TokenBatch]:
    """Batches for training: up to `pairs_per_batch` pairs each, those of one prompt together, of similar lengths.

    `seed` determines which prompts share a batch. Rows are packed as in `pair_batches` with `sharing="prompt"`.
    """
    groups = list(packed_groups(pairs, True, read_at, pack_up_to, pack_up_to, pairs_per_batch))
    shuffled = [groups[number] for number in np.random.default_rng(seed).permutation(len(groups))]
    window = np.cumsum([len(group.indices) for group in shuffled]) // (pairs_per_batch * _BATCHES_PER_WINDOW)
    # Sorted by length within windows: rows of a batch need little padding, and its prompts still depend on the seed.
    ordered = sorted(zip(window.tolist(), shuffled, strict=True), key=lambda entry: (entry[0], entry[1].width))
    batches: list[list[PackedGroup]] = []
    room = 0
    for _, group in ordered:
        if len(group.indices) > room:
            batches.append([])
            room = pairs_per_batch
        batches[-1].append(group)
        room -= len(group.indices)
    return [_batch(pairs, some, read_at) for some in batches]


def pair_collator(
    pairs: EncodedPairs, *, read_at: ReadAt = READ_LAST, pack_up_to: int = 0
) -> Callable[[Sequence[int]], TokenBatch]:
    """A function from the indices of any pairs to a batch of them, each pair packed as in `pair_batches`."""
    groups = list(packed_groups(pairs, False, read_at, pack_up_to, 0))
    return lambda indices: _batch(pairs, [groups[index] for index in indices], read_at)


def pack(pairs: EncodedPairs, read_at: ReadAt = READ_LAST, *, after_prompts: bool = False) -> TokenBatch:
    """Pack every pair into one row, whether or not that saves tokens; `after_prompts`: rows begin after prompts."""
    groups = [
        PackedGroup((index,), (row_of(texts, read_at),))
        for index, texts in enumerate(zip(pairs.chosen, pairs.rejected, strict=True))
    ]
    rows = [row for group in groups for row in group.rows]
    return _batch(pairs, groups, read_at, _prompt_run(rows, pairs.n_tokens) if after_prompts else None)


def attention_mask(batch: TokenBatch, dtype: torch.dtype) -> Float[Tensor, "row 1 query key"]:
    """The additive mask: 0 where a query may attend (itself and earlier tokens of its text), else the lowest number."""
    texts = batch.scatter_to_rows(batch.mask.float())
    together = texts.transpose(1, 2) @ texts > 0
    n_tokens = texts.shape[-1]
    # Padding attends to itself: a softmax over no key is NaN.
    itself = torch.eye(n_tokens, dtype=torch.bool, device=texts.device)
    visible = together.tril() | itself
    if batch.prompts is not None:
        prompt = batch.prompts.mask[:, None].expand(-1, n_tokens, -1)
        visible = torch.cat([prompt, visible], dim=2)
    lowest = torch.finfo(dtype).min
    return torch.zeros(visible.shape, dtype=dtype, device=texts.device).masked_fill(~visible, lowest)[:, None]


# -- inside ------------------------------------------------------------------------------------------------------------


def _divided(groups: list[PackedGroup], most: int) -> Iterator[list[PackedGroup]]:
    """The groups of one batch, in halves until their padded prompts have at most `most` tokens."""
    if len(groups) > 1 and len(groups) * max(group.n_prompt for group in groups) > most:
        middle = len(groups) // 2
        # By length, so that the halves need less padding.
        ordered = sorted(groups, key=lambda group: -group.n_prompt)
        yield from _divided(ordered[:middle], most)
        yield from _divided(ordered[middle:], most)
    else:
        yield groups


def _batches_after(
    pairs: EncodedPairs,
    groups: Sequence[PackedGroup],
    read_at: ReadAt,
    device: torch.device | str,
    tokens_per_batch: int,
    prompts_together: bool,
) -> Iterator[TokenBatch]:
    """Batches of rows that begin after their prompts; the prompts of several batches run together."""
    most = _TIMES_KEPT * tokens_per_batch
    widths = [group.width - group.n_prompt for group in groups]
    batches = [
        some
        for numbers in length_buckets(widths, tokens_per_batch)
        for some in _divided([groups[number] for number in numbers], most)
    ]
    while batches:
        room, together = most, 0
        while together < len(batches):
            room -= sum(group.n_prompt for group in batches[together])
            if together and (room < 0 or not prompts_together):
                break
            together += 1
        run = _prompt_run(
            [row for some in batches[:together] for group in some for row in group.rows], tokens_per_batch
        )
        for some in batches[:together]:
            yield _batch(pairs, some, read_at, run).to(device)
        del batches[:together]


def _prompt_run(rows: Sequence[Row], tokens_per_batch: int) -> PromptRun:
    """The prompts of packed rows, each distinct one once."""
    distinct = list(dict.fromkeys(row.prompt for row in rows))
    buckets = length_buckets(list(map(len, distinct)), tokens_per_batch)
    return PromptRun(tuple(EncodedText(ids, len(ids), 0) for ids in distinct), tuple(map(tuple, buckets)))


def _batch(
    pairs: EncodedPairs, groups: Sequence[PackedGroup], read_at: ReadAt, run: PromptRun | None = None
) -> TokenBatch:
    """The pairs of some groups as one batch; the row of each text determines the columns of its tokens.

    With `run`, in which their prompts are, the rows begin after their prompts.
    """
    rows = [row for group in groups for row in group.rows]
    prompts = None
    if run is not None:
        of_row = torch.tensor([run.index[row.prompt] for row in rows])
        prompts = Prompts(run, of_row, torch.tensor([row.n_prompt for row in rows]))
    # How many columns of each row come before those of the batch.
    before = torch.zeros(len(rows), dtype=torch.long) if prompts is None else prompts.lengths
    width = max(row.length - int(n) for row, n in zip(rows, before, strict=True))
    input_ids, position_ids = torch.zeros(2, len(rows), width, dtype=torch.long)
    # (group, text) -> its row, and the column at which the tokens after the shared prefix begin.
    row_and_start: dict[tuple[int, EncodedText], tuple[int, int]] = {}
    number = 0
    for owner, group in enumerate(groups):
        for row in group.rows:
            n_before = int(before[number])
            shared, rests = row.texts[0].ids[: row.n_shared], [text.ids[row.n_shared :] for text in row.texts]
            ids = [*shared, *(token for rest in rests for token in rest)][n_before:]
            positions = [*range(row.n_shared), *(row.n_shared + i for rest in rests for i in range(len(rest)))]
            input_ids[number, : len(ids)] = torch.tensor(ids)
            position_ids[number, : len(ids)] = torch.tensor(positions[n_before:])
            starts = accumulate(map(len, rests), initial=row.n_shared)
            row_and_start |= {(owner, text): (number, start) for text, start in zip(row.texts, starts, strict=False)}
            number += 1
    sides = [
        (owner, side[index])
        for side in (pairs.chosen, pairs.rejected)
        for owner, group in enumerate(groups)
        for index in group.indices
    ]
    texts = [text for _, text in sides]
    row_index, starts_at = torch.tensor([row_and_start[owner_and_text] for owner_and_text in sides]).unbind(1)
    n_shared = torch.tensor([row.n_shared for row in rows])[row_index]
    lengths = torch.tensor([len(text) for text in texts])
    columns = torch.arange(width) + before[row_index][:, None]
    # By how many columns a text's own tokens are shifted, and the position in the text of every column.
    shift = (starts_at - n_shared)[:, None]
    position = torch.where(columns < n_shared[:, None], columns, columns - shift)
    own = (columns >= starts_at[:, None]) & (position < lengths[:, None])
    mask = (columns < n_shared[:, None]) | own
    response = mask & (position >= torch.tensor([text.response_start for text in texts])[:, None])
    of_texts = token_types_of(texts, response)
    token_types = None
    if of_texts is not None:  # such texts have a row of their own: encoders do not pack
        token_types = torch.zeros_like(input_ids)
        token_types[row_index] = of_texts
    last = torch.tensor([read_at.index(text.ids) for text in texts])
    return TokenBatch(
        input_ids=input_ids,
        mask=mask,
        response=response,
        # The last token is never in the shared prefix.
        last=last + shift[:, 0] - before[row_index],
        keys=torch.tensor([text.key for text in texts]),
        indices=tuple(index for group in groups for index in group.indices) * 2,
        row_index=row_index,
        position_ids=position_ids if any(group.is_packed for group in groups) else None,
        token_types=token_types,
        prompts=prompts,
    )
