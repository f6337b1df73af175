"""Batches of tokens: texts in rows, the tokens that belong to each, and sums over them."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, fields, replace
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from rmtension._sites import check_positions
from rmtension.data._encoding import EncodedText
from rmtension.data._prompts import Prompts
from rmtension.data._token_places import READ_LAST, ReadAt, TokenPlaces, first_of_each


@dataclass(frozen=True)
class TokenBatch:
    """Texts as right-padded rows of tokens: one row per text, or one row for several texts that share a prefix.

    For every text, `mask` marks its tokens among the columns of its row, and `response` those of its response; `last`
    is the column that its reward is read from, `keys` a hash of its prompt, and `indices` its index in the list that
    was batched. In a batch of pairs, the chosen texts come first, then the rejected ones. `row_index` is the row that
    a text is in; if it is None, text i is row i. `position_ids` are set if rows are packed: each token's position in
    its own text. `token_types` are set for texts of two segments: 0 for the prompt, 1 for the response. `prompts` are
    set if the columns begin after a prompt that runs first; no other field counts its tokens.
    """

    input_ids: Int[Tensor, "row token"]
    mask: Bool[Tensor, "text token"]
    response: Bool[Tensor, "text token"]
    last: Int[Tensor, "text"]
    keys: Int[Tensor, "text"]
    indices: tuple[int, ...]
    row_index: Int[Tensor, "text"] | None = None
    position_ids: Int[Tensor, "row token"] | None = None
    token_types: Int[Tensor, "row token"] | None = None
    prompts: Prompts | None = None

    @classmethod
    def from_texts(
        cls,
        texts: Sequence[EncodedText],
        indices: Sequence[int],
        *,
        read_at: ReadAt = READ_LAST,
        device: torch.device | str,
    ) -> "TokenBatch":
        """Pad `texts` on the right."""
        width = max(map(len, texts))
        # Any id works for padding; 0 is in every vocabulary, while a config's pad token may not be.
        input_ids = torch.tensor([[*text.ids, *[0] * (width - len(text))] for text in texts])
        lengths = torch.tensor([len(text) for text in texts])
        starts = torch.tensor([text.response_start for text in texts])
        columns = torch.arange(width)
        mask = columns < lengths[:, None]
        response = mask & (columns >= starts[:, None])
        batch = cls(
            input_ids=input_ids,
            mask=mask,
            response=response,
            last=read_at.columns(input_ids, mask),
            keys=torch.tensor([text.key for text in texts]),
            indices=tuple(indices),
            token_types=token_types_of(texts, response),
        )
        return batch.to(device)

    @classmethod
    def from_rows(
        cls, input_ids: Int[Tensor, "text token"], mask: Bool[Tensor, "text token"], *, read_at: ReadAt = READ_LAST
    ) -> "TokenBatch":
        """A batch of given rows of tokens, one text per row; all tokens of a text count as its response."""
        return cls(
            input_ids=input_ids,
            mask=mask,
            response=mask,
            last=read_at.columns(input_ids, mask),
            keys=torch.arange(len(input_ids), device=input_ids.device),
            indices=tuple(range(len(input_ids))),
        )

    def to(self, device: torch.device | str) -> "TokenBatch":
        """The same batch on `device`; tensors in pinned memory are copied while the device works."""
        is_cpu = torch.device(device).type == "cpu"
        return self._mapped(lambda tensor: tensor.to(device, non_blocking=not is_cpu and tensor.is_pinned()))

    def pinned(self) -> "TokenBatch":
        """The same batch in pinned memory, if there is a GPU to copy it to."""
        return self._mapped(Tensor.pin_memory) if torch.cuda.is_available() else self

    def with_prompts(self, prompts: Prompts | None) -> "TokenBatch":
        """The same batch after other `prompts`."""
        return replace(self, prompts=prompts)

    @property
    def n_pairs(self) -> int:
        """The number of pairs in a batch of pairs."""
        return len(self.indices) // 2

    @cached_property
    def rows(self) -> Int[Tensor, "text"]:
        """The row that each text is in."""
        return torch.arange(len(self.last), device=self.last.device) if self.row_index is None else self.row_index

    @cached_property
    def row_keys(self) -> Int[Tensor, "row"]:
        """The hash of each row's prompt: texts in one row have the same prompt."""
        keys = torch.zeros(len(self.input_ids), dtype=self.keys.dtype, device=self.keys.device)
        keys[self.rows] = self.keys
        return keys

    def gather_last(self, values: Float[Tensor, "row token *rest"]) -> Float[Tensor, "text *rest"]:
        """`values` at the token that each text's reward is read from, on the device of `values`."""
        return self.gather(self.last_places, values)

    @cached_property
    def last_places(self) -> TokenPlaces:
        """The token that each text's reward is read from, in the order of the texts."""
        return TokenPlaces(torch.arange(len(self.last), device=self.last.device), self.rows, self.last)

    @cached_property
    def same_in_row(self) -> Int[Tensor, "text"] | None:
        """For every text the first one that shares its row and all its tokens; None if no two texts are the same."""
        return self._same(self.rows)

    @cached_property
    def same_in_pair(self) -> Int[Tensor, "text"] | None:
        """For every text the first one of its pair with the same tokens; None if no pair has equal responses."""
        return self._same(torch.tensor(self.indices, device=self.rows.device))

    def _mapped(self, change: Callable[[Tensor], Tensor]) -> "TokenBatch":
        """The same batch with every tensor changed, such as moved to a device."""
        changed: dict[str, Any] = {
            field.name: change(value)
            for field in fields(self)
            if isinstance(value := getattr(self, field.name), Tensor)
        }
        return replace(self, **changed, prompts=None if self.prompts is None else self.prompts.mapped(change))

    def _same(self, groups: Int[Tensor, "text"]) -> Int[Tensor, "text"] | None:
        ids = torch.where(self.mask, self.input_ids[self.rows], -1)
        codes = torch.cat([groups[:, None], ids, self.response.long()], dim=1)
        first, which = first_of_each(codes)
        return None if len(first) == len(codes) else first[which]

    def places(self, selected: Bool[Tensor, "text token"]) -> TokenPlaces:
        """The tokens that `selected` marks, text by text, in the order of the tokens."""
        texts, columns = selected.nonzero(as_tuple=True)
        return TokenPlaces(texts, self.rows[texts], columns)

    def before(self, selected: Bool[Tensor, "text token"]) -> TokenPlaces:
        """The token before each token that `selected` marks, in the same text; the first token of a text has none."""
        columns = torch.arange(self.mask.shape[1], device=self.mask.device)
        latest = torch.where(self.mask, columns, -1).cummax(dim=1).values
        earlier = torch.cat([torch.full_like(latest[:, :1], -1), latest[:, :-1]], dim=1)
        texts, at = (selected & (earlier >= 0)).nonzero(as_tuple=True)
        return TokenPlaces(texts, self.rows[texts], earlier[texts, at])

    def last_of(self, selected: Bool[Tensor, "text token"]) -> TokenPlaces:
        """The last token that `selected` marks in each text; its column is -1 in a text without one."""
        columns = torch.arange(selected.shape[1], device=selected.device)
        at = torch.where(selected, columns, -1).amax(dim=1)
        return TokenPlaces(torch.arange(len(at), device=at.device), self.rows, at)

    def gather(self, places: TokenPlaces, values: Float[Tensor, "row token *rest"]) -> Float[Tensor, "place *rest"]:
        """`values` at some tokens, on the device of `values`."""
        # In a model split over several devices, the residual stream ends on the last device.
        return values[places.rows.to(values.device), places.columns.to(values.device)]

    def scatter(
        self, places: TokenPlaces, values: Float[Tensor, "place channel"]
    ) -> Float[Tensor, "row token channel"]:
        """The inverse of `gather` for distinct places: zeros at all other tokens."""
        indices = places.rows.to(values.device), places.columns.to(values.device)
        return values.new_zeros(*self.input_ids.shape, values.shape[1]).index_put(indices, values)

    def scatter_to_rows(self, per_text: Float[Tensor, "text token"]) -> Float[Tensor, "row slot token"]:
        """The values of the texts in each row, one slot per text; zeros in slots that a row does not use."""
        if self.row_index is None:
            return per_text[:, None]
        rows, slots = self.rows.to(per_text.device), self._slots.to(per_text.device)
        per_row = per_text.new_zeros(len(self.input_ids), self._n_slots, per_text.shape[1])
        per_row[rows, slots] = per_text
        return per_row

    def sum_over_texts(self, per_text: Float[Tensor, "text token"]) -> Float[Tensor, "row token"]:
        """The sum over all texts that a token belongs to."""
        return self.scatter_to_rows(per_text).sum(1)

    def sum_per_text(
        self, weights: Float[Tensor, "text token"], values: Float[Tensor, "row token channel"]
    ) -> Float[Tensor, "text channel"]:
        """For each text, the weighted sum of `values` over its tokens."""
        sums = self.scatter_to_rows(weights.to(values)) @ values
        return sums[self.rows.to(sums.device), self._slots.to(sums.device)]

    def sum_per_pair(self, of_rows: Float[Tensor, "row *rest"]) -> Float[Tensor, "pair *rest"]:
        """The sum over the rows of each pair; no row may hold texts of two pairs."""
        n_pairs = self.n_pairs
        owners = torch.empty(len(of_rows), dtype=torch.long, device=of_rows.device)
        owners[self.rows.to(of_rows.device)] = torch.arange(2 * n_pairs, device=of_rows.device) % n_pairs
        return of_rows.new_zeros(n_pairs, *of_rows.shape[1:]).index_add_(0, owners, of_rows)

    def position_mask(self, positions: str) -> Bool[Tensor, "row token"]:
        """The tokens that `positions` selects in any text of the row."""
        return self.sum_over_texts(self.select(positions).float()) > 0

    @cached_property
    def _slots(self) -> Int[Tensor, "text"]:
        """Each text's number among the texts of its row."""
        same = self.rows[:, None] == torch.arange(len(self.input_ids), device=self.rows.device)
        return (same.long().cumsum(0) - 1).gather(1, self.rows[:, None])[:, 0]

    @cached_property
    def _n_slots(self) -> int:
        """The largest number of texts in one row."""
        return int(self._slots.max()) + 1

    def select(self, positions: str) -> Bool[Tensor, "text token"]:
        """The tokens of each text that `positions` selects: `all`, those of the `response`, or the `last` one."""
        check_positions(positions)
        if positions == "all":
            return self.mask
        if positions == "response":
            return self.response
        return torch.arange(self.mask.shape[1], device=self.mask.device) == self.last[:, None]


def margins(of_texts: Float[Tensor, "text *rest"]) -> Float[Tensor, "pair *rest"]:
    """Chosen minus rejected, for a batch of pairs: the first half of its texts are the chosen ones."""
    chosen, rejected = of_texts.chunk(2)
    return chosen - rejected


def token_types_of(
    texts: Sequence[EncodedText], response: Bool[Tensor, "text token"]
) -> Int[Tensor, "text token"] | None:
    """The token types of texts, one per row: 1 in the response of a text of two segments; None if no text has types."""
    has_types = torch.tensor([text.has_types for text in texts])
    return (response & has_types[:, None]).long() if has_types.any() else None


_RUNNING: ContextVar[TokenBatch | None] = ContextVar("rmtension_running_batch", default=None)


@contextmanager
def running(batch: TokenBatch) -> Iterator[None]:
    """Make `batch` available to hooks that select tokens, while a model runs on it."""
    token = _RUNNING.set(batch)
    try:
        yield
    finally:
        _RUNNING.reset(token)


def running_batch() -> TokenBatch | None:
    """The batch that a reward model is currently running on in this thread, or None."""
    return _RUNNING.get()
