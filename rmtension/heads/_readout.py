"""What a model reads its reward with: a head, and which of the head's outputs is the reward."""

import copy
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from rmtension._sites import check_positions
from rmtension.data._token_places import TokenPlaces
from rmtension.data._tokens import TokenBatch
from rmtension.errors import ModelError, OptionError
from rmtension.heads._head import Head, LinearHead, tensors_of
from rmtension.heads._outputs import pick


class Readout:
    """The part of a `RewardModel` that reads the reward from the residual stream after the final norm.

    The head is copied, to the model's device, in the dtype of rewards. For an output of a linear head, or the
    difference of two, `weight` and `bias` are the row that is read; for other heads `weight` is None.
    """

    def __init__(
        self, head: Head | None, choice: tuple[int, ...] | None, *, device: torch.device, dtype: torch.dtype
    ) -> None:
        self.head = None if head is None else _own_copy(head, device, dtype)
        self._reward_dtype = dtype
        self._choose(choice)

    # -- which output --------------------------------------------------------------------------------------------------

    @property
    def output_name(self) -> str | None:
        """The name of the output that is the reward; None if the head has one output, or none was chosen."""
        if self.head is None or self.choice is None or len(self.head.outputs) == 1:
            return None
        return " - ".join(self.head.outputs[number] for number in self.choice)

    @property
    def identity(self) -> tuple[list[Tensor], object]:
        """The tensors and everything else that the reward depends on besides the residual stream."""
        head = self.head
        if head is None or self.weight is not None:
            return ([] if self.weight is None else [self.weight]), self.bias
        tensors = [*tensors_of(head), *head.shared_tensors]
        return tensors, f"{type(head).__name__} {self.choice} {list(head.outputs)} {sorted(head.settings.items())}"

    def require_head(self) -> Head:
        """The head; raises `ModelError` for a model without a reward."""
        if self.head is None:
            raise ModelError(
                "This model was opened as a language model and has no reward. Open a reward model with "
                "RewardHead.from_pretrained."
            )
        return self.head

    def require_choice(self) -> tuple[int, ...]:
        """The number of the output that is the reward, or two for a difference; `ModelError` if none is chosen."""
        head = self.require_head()
        if self.choice is None:
            names = list(head.outputs)
            raise ModelError(
                f"This model has {len(names)} outputs and none was chosen as the reward. Choose one with "
                f"head.output({names[0]!r}), score all with head.score_outputs(pairs); the outputs are {names[:20]}."
            )
        return self.choice

    def require_positions(self, positions: str) -> None:
        """Raise `OptionError` for positions at which no activation changes the reward, or that do not exist."""
        check_positions(positions)
        head = self.head
        if positions == "last" and head is not None and not head.reads_last:
            raise OptionError(
                f"positions: a {type(head).__name__} reads the tokens before those of the response, so activations at "
                "the last token do not change the reward. Use positions='all', or 'response' for the tokens of the "
                "response, the last of which does not count."
            )

    def require_weight(self) -> Float[Tensor, "d_model"]:
        """The row of a linear head; raises `ModelError` for a head without a reward, or one that is not linear."""
        self.require_choice()
        if self.weight is None:
            raise ModelError(
                f"This needs a linear head, whose reward is weight @ h + bias; the head is a "
                f"{type(self.head).__name__}. Use a method that runs the whole head, such as attribution_patching."
            )
        return self.weight

    # -- reading -------------------------------------------------------------------------------------------------------

    def read_places(
        self, states: Float[Tensor, "token d_model"], places: TokenPlaces, batch: TokenBatch
    ) -> Float[Tensor, "text"]:
        """The rewards of a batch from the residual stream after the final norm, at the tokens that the head reads."""
        if self.weight is not None:
            return self.read(states)
        return pick(self.read_outputs(states, places, batch), self.require_choice())

    def read_outputs(
        self, states: Float[Tensor, "token d_model"], places: TokenPlaces, batch: TokenBatch
    ) -> Float[Tensor, "text output"]:
        """All outputs of a batch's texts from the residual stream at the tokens that the head reads."""
        head = self.require_head()
        outputs = self._checked(head.read_tokens(states.to(self._reward_dtype), places, batch), len(batch.last))
        # A matrix product may round equal rows differently, and identical responses would get different rewards. Texts
        # of one row share their tokens, and so their gradients; those of two rows do not.
        for same in (batch.same_in_row, None if torch.is_grad_enabled() else batch.same_in_pair):
            outputs = outputs if same is None else outputs[same.to(outputs.device)]
        return outputs

    def read(self, last: Float[Tensor, "text d_model"]) -> Float[Tensor, "text"]:
        """The rewards from the residual stream after the final norm at the last token, of any number of texts.

        Raises `ModelError` for a head that reads other tokens too.
        """
        exact = last.to(self._reward_dtype)
        if self.weight is not None:
            # A matrix product may round equal rows differently, and identical responses would get different rewards.
            return (exact * self.weight.to(exact)).sum(dim=-1) + self.bias
        if not self.require_head().reads_last_only:
            raise ModelError(
                f"read: a {type(self.head).__name__} reads more than the last token of a text. Use head.score_pairs, "
                "or head.forward on a batch."
            )
        return pick(self._checked(self.require_head().read(exact, None), len(last)), self.require_choice())

    # -- inside --------------------------------------------------------------------------------------------------------

    def _checked(self, outputs: Any, n_texts: int) -> Float[Tensor, "text output"]:
        """What a head returned, if it is one number per text and output; raises `ModelError` otherwise."""
        names = list(self.require_head().outputs)
        if not isinstance(outputs, Tensor) or tuple(outputs.shape) != (n_texts, len(names)):
            got = f"shape {tuple(outputs.shape)}" if isinstance(outputs, Tensor) else f"a {type(outputs).__name__}"
            raise ModelError(
                f"head: expected {type(self.head).__name__} to return one number for each of {n_texts} texts and "
                f"{len(names)} outputs {names[:12]}, a tensor of shape ({n_texts}, {len(names)}), got {got}. Return "
                "values[:, None] for a single output, and name every output in `outputs`."
            )
        checked: Tensor = outputs
        return checked

    def _choose(self, choice: tuple[int, ...] | None) -> None:
        """Make one output, or the difference of two, the reward."""
        self.choice = choice
        self.weight: Float[Tensor, "d_model"] | None = None
        self.bias = 0.0
        if isinstance(self.head, LinearHead) and choice is not None:
            self.weight, self.bias = self.head.row(choice)


def _own_copy(head: Head, device: torch.device, dtype: torch.dtype) -> Head:
    """A head on `device`, in the dtype of rewards, without gradients."""
    own = copy.deepcopy(head).eval().requires_grad_(False)
    if isinstance(own, LinearHead) and own.weight.dtype != torch.float64:
        return own.to(device)
    # Arrays and lists come in float64, which some devices do not support and rewards do not need.
    return own.to(device, dtype)
