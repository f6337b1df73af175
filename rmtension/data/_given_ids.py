"""Token ids that a user gives with a mask: checked, and moved to the left of their rows."""

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from rmtension.errors import DataError, OptionError


def check_ids(
    input_ids: Int[Tensor, "text token"], mask: Bool[Tensor, "..."], *, max_length: int, n_embeddings: int
) -> None:
    """Raise `OptionError` for a mask that does not fit or rows too long, `DataError` for ids outside the embedding."""
    if input_ids.ndim != 2 or not input_ids.numel():
        raise OptionError(
            f"input_ids: expected one row of token ids per text, got shape {tuple(input_ids.shape)}. Pass a single "
            "text as input_ids[None]."
        )
    if mask.shape != input_ids.shape or not mask.any(dim=1).all():
        raise OptionError(
            f"attention_mask: expected the shape of input_ids {tuple(input_ids.shape)} and at least one real token "
            f"per row, got shape {tuple(mask.shape)} and {int(mask.any(dim=-1).sum())} rows with real tokens. Pass the "
            "mask that the tokenizer returned with the ids."
        )
    longest = int(mask.sum(dim=1).max())
    if longest > max_length:
        raise OptionError(
            f"input_ids: expected at most {max_length} tokens per row (the model's context), got {longest}. Truncate "
            "the rows."
        )
    real = input_ids[mask]
    if not 0 <= int(real.min()) <= int(real.max()) < n_embeddings:
        raise DataError(
            f"input_ids: expected ids from 0 to {n_embeddings - 1}, got {int(real.min())} to {int(real.max())}. Encode "
            "with this model's own tokenizer."
        )


def compact(
    input_ids: Int[Tensor, "text token"], mask: Bool[Tensor, "text token"]
) -> tuple[Int[Tensor, "text kept"], Bool[Tensor, "text kept"]]:
    """Move every row's real tokens to the left, in order, and drop the columns that no row uses.

    With a causal mask, real tokens do not attend to padding on their right, and positions count from 0. The same text
    then gets the same reward however it was padded, also with absolute positions.
    """
    order = torch.argsort((~mask).to(torch.int8), dim=1, stable=True)[:, : int(mask.sum(dim=1).max())]
    return input_ids.gather(1, order), mask.gather(1, order)
