"""A head with one more output, which is a weighted sum of its outputs."""

import math
from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from rmtension.data._token_places import TokenPlaces
from rmtension.data._tokens import TokenBatch
from rmtension.errors import OptionError
from rmtension.heads._head import Head, LinearHead, WrappedHead
from rmtension.heads._outputs import choose_outputs


def with_weighted_sum(head: Head, weights: Mapping[Any, Any]) -> tuple[Head, int]:
    """The head with the sum of its outputs times `weights` as its last output, and the number of that output.

    The sum of a linear head is one row more. Raises `OptionError` for outputs that the head does not have, and for
    weights that are no numbers or all 0.
    """
    terms: dict[int, float] = {}
    for output, weight in weights.items():
        if isinstance(weight, bool) or not isinstance(weight, int | float) or not math.isfinite(weight):
            raise OptionError(f"output: expected a number as the weight of {output!r}, got {weight!r:.80}.")
        if isinstance(output, tuple | list):
            raise OptionError(f"output: expected a name or an index for every weight, got the pair {output!r:.80}.")
        (number,) = choose_outputs(output, head, "output") or ()
        if number in terms:
            raise OptionError(f"output: output {head.outputs[number]!r} has two weights. Pass one weight per output.")
        terms[number] = float(weight)
    if not any(terms.values()):
        raise OptionError(
            f"output: expected weights of outputs that are not all 0, got {dict(weights)!r:.80}. Pass one weight per "
            f"output, for example {{{head.outputs[0]!r}: 1.0}}."
        )
    label = sum_label({head.outputs[number]: weight for number, weight in terms.items()})
    if label in head.outputs:
        number = list(head.outputs).index(label)
        if terms != {number: 1.0} and not _is_sum(head, number, terms):
            raise OptionError(
                f"output: the head has another output called {label!r}, which is not this sum. Give the outputs other "
                "names: LinearHead(weight, bias, names)."
            )
        return head, number
    if not isinstance(head, LinearHead):
        return _WeightedSum(head, terms, label), len(head.outputs)
    rows, row, bias = _row(head, terms)
    biases = torch.cat([head.bias, torch.tensor([bias], dtype=head.bias.dtype)])
    return LinearHead(torch.cat([rows, row[None]]), biases, [*head.outputs, label]), len(head.outputs)


def _row(head: LinearHead, terms: Mapping[int, float]) -> tuple[Tensor, Tensor, float]:
    """All rows of a linear head, and the row and the bias of a weighted sum."""
    rows = head.weight.to(torch.promote_types(head.weight.dtype, torch.float32))
    row = torch.stack([weight * rows[number] for number, weight in terms.items()]).sum(dim=0)
    return rows, row, float(sum(weight * float(head.bias[number]) for number, weight in terms.items()))


def _is_sum(head: Head, number: int, terms: Mapping[int, float]) -> bool:
    """Whether an output is the weighted sum of some others, which was added before."""
    if isinstance(head, LinearHead):
        rows, row, bias = _row(head, terms)
        return torch.equal(rows[number], row) and float(head.bias[number]) == bias
    while isinstance(head, _WeightedSum):
        if len(head.outputs) - 1 == number:
            return head.terms == terms
        inner = head.head
        assert isinstance(inner, Head)
        head = inner
    return False


class _WeightedSum(WrappedHead):
    """Any head with a weighted sum of its outputs as one more output."""

    def __init__(self, head: Head, terms: Mapping[int, float], label: str) -> None:
        super().__init__(head)
        self.terms = dict(terms)
        self.outputs = (*head.outputs, label)

    def read(
        self, last: Float[Tensor, "text d_model"], prompt_last: Float[Tensor, "text d_model"] | None = None
    ) -> Float[Tensor, "text output"]:
        """The outputs of the head, and the sum."""
        return self._and_sum(self.head.read(last, prompt_last))

    def read_tokens(
        self, states: Float[Tensor, "token d_model"], places: TokenPlaces, batch: TokenBatch
    ) -> Float[Tensor, "text output"]:
        """The outputs of the head, and the sum."""
        return self._and_sum(self.head.read_tokens(states, places, batch))

    @property
    def settings(self) -> Mapping[str, object]:
        """The settings of the head, and the weights."""
        return {**super().settings, "weights": self.terms}

    def _and_sum(self, outputs: Float[Tensor, "text output"]) -> Float[Tensor, "text output+1"]:
        terms = [weight * outputs[:, number] for number, weight in self.terms.items()]
        return torch.cat([outputs, torch.stack(terms).sum(dim=0)[:, None]], dim=1)


def sum_label(weights: Mapping[str, float]) -> str:
    """The sum as text: "helpful - 0.5 verbose"."""
    text = ""
    for name, weight in weights.items():
        sign = "-" if weight < 0 else "+"
        factor = "" if abs(weight) == 1 else f"{abs(weight):.17g} "
        text += f"{f' {sign} ' if text else sign.replace('+', '')}{factor}{name}"
    return text
