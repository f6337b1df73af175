"""Next-token logits of a language model as a reward: rows of its unembedding, compared with the model's output."""

from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from rmtension.errors import OptionError
from rmtension.heads._head import Head, LinearHead
from rmtension.heads._vocabulary import read_unembedding


class CappedLogits(Head):
    """A token's logit cap * tanh(logit / cap) as the reward, or the first token's minus the second's (Gemma-2).

    Args:
        linear: the logits before the cap.
        cap: the largest size of a logit.
    """

    def __init__(self, linear: LinearHead, cap: float) -> None:
        super().__init__()
        self.linear, self.cap = linear, cap

    @property
    def settings(self) -> Mapping[str, object]:
        """The cap."""
        return {"cap": self.cap}

    def read(
        self, last: Float[Tensor, "text d_model"], prompt_last: Float[Tensor, "text d_model"] | None = None
    ) -> Float[Tensor, "text output"]:
        """The capped logit, or the difference of two."""
        first, *second = (self.cap * torch.tanh(self.linear.read(last) / self.cap)).unbind(1)
        return (first - second[0] if second else first)[:, None]


def token_head(name: str, model: Any, rows: tuple[int, ...]) -> Head:
    """The head whose reward is the logit of a token after the text, or the first token's logit minus the second's.

    Some families multiply their logits by a constant, which is measured on a short text and included in the head, and
    some cap them. Raises `ModelError` for logits that are computed in another way.
    """
    weight = "RewardHead.from_language_model(...).body.native.get_input_embeddings().weight"
    found = read_unembedding(
        name,
        model,
        "To read the unembedding's rows, pass head=(weight[yes] - weight[no], 0), where yes and no are token ids and "
        f"weight is the unembedding (if it is tied to the embedding: {weight}).",
    )
    if max(rows) >= len(found.weight):
        raise OptionError(f"output: expected token ids below {len(found.weight)}, got {list(rows)}.")
    both = LinearHead(found.weight[list(rows)], 0.0 if found.bias is None else found.bias[list(rows)])
    if found.cap is not None:
        return CappedLogits(LinearHead(found.scale * both.weight, found.scale * both.bias), float(found.cap))
    row, constant = both.row(range(len(rows)))
    return LinearHead(found.scale * row, found.scale * constant)
