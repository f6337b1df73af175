"""Where tokens are: the token that a reward is read from, and any tokens of the texts of a batch."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor


@dataclass(frozen=True)
class ReadAt:
    """Which token of a text its reward is read from: the `first`, or the last that is not `pad_token_id`.

    Classifiers with causal attention read the last token, encoders the first ([CLS]). Transformers' sequence
    classifiers skip trailing pad tokens, so a text that ends in eos is read one token earlier if pad and eos are the
    same token; None skips nothing. As in transformers, a text of pad tokens only is read at its first column.
    """

    pad_token_id: int | None = None
    first: bool = False

    def columns(self, input_ids: Int[Tensor, "text token"], mask: Bool[Tensor, "text token"]) -> Int[Tensor, "text"]:
        """The column of the token that each text's reward is read from."""
        if self.first:
            return mask.int().argmax(dim=1)
        wanted = mask if self.pad_token_id is None else mask & (input_ids != self.pad_token_id)
        columns = torch.arange(mask.shape[1], device=mask.device)
        return (columns * wanted).argmax(dim=1)

    def index(self, ids: Sequence[int]) -> int:
        """The index of that token among the ids of one text."""
        if self.first:
            return 0
        return next((i for i in reversed(range(len(ids))) if ids[i] != self.pad_token_id), 0)


# The last token, whichever it is.
READ_LAST = ReadAt()


@dataclass(frozen=True)
class TokenPlaces:
    """Where some tokens of a batch's texts are: the text of each token, the row that the text is in, and the column."""

    texts: Int[Tensor, "token"]
    rows: Int[Tensor, "token"]
    columns: Int[Tensor, "token"]

    def __len__(self) -> int:
        return len(self.texts)

    def and_also(self, other: "TokenPlaces") -> "TokenPlaces":
        """These tokens, then those of `other`."""
        return TokenPlaces(
            torch.cat([self.texts, other.texts]),
            torch.cat([self.rows, other.rows]),
            torch.cat([self.columns, other.columns]),
        )

    @property
    def distinct(self) -> "TokenPlaces":
        """Every token once, with the first of the texts that share it."""
        first, _ = first_of_each(torch.stack([self.rows, self.columns], dim=1))
        if len(first) == len(self):
            return self
        first = first.sort().values
        return TokenPlaces(self.texts[first], self.rows[first], self.columns[first])

    def counts(self, n_texts: int) -> Int[Tensor, "text"]:
        """How many of the tokens are in each text."""
        return torch.bincount(self.texts, minlength=n_texts)

    def table(self, values: Float[Tensor, "token"], n_texts: int) -> Float[Tensor, "text slot"]:
        """One row of values per text, for tokens in the order of their texts; 0 where a text has no more tokens."""
        texts, counts = self.texts.to(values.device), self.counts(n_texts).to(values.device)
        slots = torch.arange(len(texts), device=texts.device) - (counts.cumsum(0) - counts)[texts]
        width = int(counts.max()) if len(texts) else 1
        return values.new_zeros(n_texts, width).index_put((texts, slots), values)

    def means(self, values: Float[Tensor, "token channel"], n_texts: int) -> Float[Tensor, "text channel"]:
        """The mean of the values over the tokens of each text."""
        sums = values.new_zeros(n_texts, values.shape[1]).index_add(0, self.texts.to(values.device), values)
        return sums / self.counts(n_texts).to(values)[:, None]


def first_of_each(rows: Int[Tensor, "n column"]) -> tuple[Int[Tensor, "distinct"], Int[Tensor, "n"]]:
    """The first index of each distinct row, and for every row the number of the distinct row that it equals."""
    distinct, which = torch.unique(rows, dim=0, return_inverse=True)
    numbers = torch.arange(len(rows), device=rows.device)
    first = numbers.new_full((len(distinct),), len(rows)).scatter_reduce(0, which, numbers, "amin")
    return first, which
