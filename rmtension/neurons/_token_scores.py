"""Scores of neurons per token, for one pair."""

from dataclasses import dataclass

import pandas as pd
from jaxtyping import Float
from torch import Tensor

from rmtension.neurons._signs import directions


@dataclass(frozen=True, eq=False, repr=False)
class TokenScores:
    """What each token of the two texts of a pair adds to every neuron's score.

    The sum over tokens of `chosen`, minus that of `rejected`, is the pair's score; `sign` says what a positive score
    means (`Provenance.sign`). Memory: tokens of both texts x layers x neurons.

    Examples:
        >>> first = next(NeuronAttribution(head, "mean_difference").per_token(pairs["helpful"]))
        >>> first.to_frame(layer=0, neuron=0).columns.tolist()
        ['side', 'position', 'token', 'score', 'direction']
    """

    id: str
    chosen_tokens: tuple[str, ...]
    rejected_tokens: tuple[str, ...]
    chosen: Float[Tensor, "chosen layer neuron"]
    rejected: Float[Tensor, "rejected layer neuron"]
    sign: int

    def to_frame(self, layer: int, neuron: int) -> pd.DataFrame:
        """The scores of one neuron, one row per token of both texts: side, position, token, score, direction.

        `direction` says whether the neuron "supports" or "opposes" the margin at the token, or "neither"; raising the
        reward of the rejected text lowers the margin.
        """
        sides = {
            "chosen": (self.chosen_tokens, self.chosen[:, layer, neuron], self.sign),
            "rejected": (self.rejected_tokens, self.rejected[:, layer, neuron], -self.sign),
        }
        parts = [
            pd.DataFrame(
                {
                    "side": side,
                    "position": range(len(tokens)),
                    "token": tokens,
                    "score": values,
                    "direction": directions(values, sign),
                }
            )
            for side, (tokens, values, sign) in sides.items()
        ]
        return pd.concat(parts, ignore_index=True)

    def __repr__(self) -> str:
        (chosen, layers, neurons), rejected = self.chosen.shape, len(self.rejected)
        return f"TokenScores({self.id!r}: {chosen} chosen and {rejected} rejected tokens, {layers} x {neurons} neurons)"
