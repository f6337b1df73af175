"""Finding a sequence of token ids in texts, whose tokens need not be next to each other in a packed row."""

from collections.abc import Sequence

import torch
from jaxtyping import Bool
from torch import Tensor

from rmtension.data._given_ids import compact
from rmtension.data._tokens import TokenBatch


def has_pattern(ids: Sequence[int], pattern: Sequence[int], *, ends_from: int = 0) -> bool:
    """Whether a text contains `pattern` with its last token at index `ends_from` or later."""
    n, wanted = len(pattern), tuple(pattern)
    ends = range(max(ends_from, n - 1), len(ids))
    return any(ids[end] == wanted[-1] and tuple(ids[end - n + 1 : end + 1]) == wanted for end in ends)


def find_pattern(pattern: Sequence[int], batch: TokenBatch, *, at_end: bool) -> Bool[Tensor, "text token"]:
    """The columns of the first or, with `at_end`, the last token of every occurrence of `pattern` in each text."""
    ids, mask = compact(batch.input_ids[batch.rows], batch.mask)
    # The columns of each text's tokens, in the order of its tokens.
    columns = torch.argsort((~batch.mask).to(torch.int8), dim=1, stable=True)
    marked, n = torch.zeros_like(batch.mask), len(pattern)
    if ids.shape[1] < n:
        return marked
    wanted = torch.tensor(pattern, device=ids.device)
    found = (ids.unfold(1, n, 1) == wanted).all(dim=2) & mask.unfold(1, n, 1).all(dim=2)
    texts, starts = found.nonzero(as_tuple=True)
    marked[texts, columns[texts, starts + (n - 1 if at_end else 0)]] = True
    return marked
