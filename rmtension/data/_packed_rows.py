"""Which texts share a row: the rows of pairs, and the groups of pairs that must run in one batch."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from rmtension.data._encoding import EncodedPairs, EncodedText
from rmtension.data._token_places import ReadAt

# If packing saves a smaller share of the tokens, the masked attention between the rests costs more than it saves.
_LEAST_SAVED = 0.1


@dataclass(frozen=True)
class Row:
    """The texts of one row: one text, or several that follow their shared prefix of `n_shared` tokens."""

    texts: tuple[EncodedText, ...]
    n_shared: int

    @property
    def n_prompt(self) -> int:
        """How many of the shared tokens come before the first response."""
        return min(self.n_shared, *(text.response_start for text in self.texts))

    @property
    def prompt(self) -> tuple[int, ...]:
        """The shared tokens before the first response."""
        return self.texts[0].ids[: self.n_prompt]

    @property
    def length(self) -> int:
        """The tokens of the row."""
        return sum(map(len, self.texts)) - (len(self.texts) - 1) * self.n_shared

    @property
    def saves(self) -> bool:
        """Whether one row has fewer tokens than a padded row per text."""
        return self.length <= (1 - _LEAST_SAVED) * len(self.texts) * max(map(len, self.texts))


@dataclass(frozen=True)
class PackedGroup:
    """Pairs that must run in one batch, by their indices, and the rows that hold their texts."""

    indices: tuple[int, ...]
    rows: tuple[Row, ...]

    @property
    def is_packed(self) -> bool:
        """Whether texts share a row."""
        return any(len(row.texts) > 1 for row in self.rows)

    @property
    def width(self) -> int:
        """The tokens of the longest row."""
        return max(row.length for row in self.rows)

    @property
    def n_prompt(self) -> int:
        """The tokens of the prompt of a packed row; 0 if it is too short to run by itself."""
        row = self.rows[0]
        return row.n_prompt if self.is_packed and row.n_prompt >= _LEAST_SAVED * row.length else 0


def packed_groups(
    pairs: EncodedPairs, by_prompt: bool, read_at: ReadAt, pack_up_to: int, group_up_to: int, most: int | None = None
) -> Iterator[PackedGroup]:
    """The pairs in groups: those of one prompt, `most` at most, or one each."""
    both = list(zip(pairs.chosen, pairs.rejected, strict=True))
    groups: dict[object, list[int]] = {}
    for index, (chosen, _) in enumerate(both):
        # A prompt that was cut differently counts as another prompt: a token may be in one and not in the other.
        group = (chosen.key, chosen.response_start) if by_prompt and group_up_to else index
        groups.setdefault(group, []).append(index)
    for indices in groups.values():
        taken: list[int] = []
        row: Row | None = None
        for index in indices:
            longer = row_of([*(row.texts if row else ()), *both[index]], read_at)
            if row is not None and (longer.length > group_up_to or len(taken) == most):
                yield from _packed_or_alone(both, taken, row, read_at, pack_up_to)
                taken, longer = [], row_of(both[index], read_at)
            taken, row = [*taken, index], longer
        assert row is not None
        yield from _packed_or_alone(both, taken, row, read_at, pack_up_to)


def row_of(texts: Sequence[EncodedText], read_at: ReadAt) -> Row:
    """The distinct texts as one row.

    Their order depends on the texts alone: a pair with chosen and rejected swapped gives the same row, so its scores
    change their sign exactly.
    """
    distinct = sorted(set(texts), key=lambda text: (text.ids, text.response_start))
    if len(distinct) == 1:
        return Row(tuple(distinct), 0)
    # The token that a reward is read from is never shared, so that an edit of it affects one text only.
    most = min(read_at.index(text.ids) for text in distinct)
    # In sorted order, the prefix that the first and the last text share is shared by all.
    columns = zip(distinct[0].ids[:most], distinct[-1].ids[:most], strict=True)
    return Row(tuple(distinct), next((column for column, (a, b) in enumerate(columns) if a != b), most))


# -- inside ------------------------------------------------------------------------------------------------------------


def _packed_or_alone(
    both: Sequence[tuple[EncodedText, EncodedText]],
    indices: Sequence[int],
    row: Row,
    read_at: ReadAt,
    pack_up_to: int,
) -> Iterator[PackedGroup]:
    """One packed row if that saves tokens; otherwise one row per pair, and if that saves nothing, one row per text."""
    if len(row.texts) == 1 or (row.length <= pack_up_to and row.saves):
        yield PackedGroup(tuple(indices), (row,))
    elif len(indices) > 1:
        for index in indices:
            yield from _packed_or_alone(both, [index], row_of(both[index], read_at), read_at, pack_up_to)
    else:
        yield PackedGroup(tuple(indices), tuple(Row((text,), 0) for text in row.texts))
