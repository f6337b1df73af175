"""What a reward head is: the outputs that it computes from the residual stream, and the tokens at which it reads it."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from rmtension.bodies._norms import NormLayer
from rmtension.data._encoding import EncodedText
from rmtension.data._token_places import TokenPlaces
from rmtension.data._tokens import TokenBatch
from rmtension.errors import DataError, ModelError

# Attributes of a head that say what its outputs are called, or belong to PyTorch.
_NO_SETTINGS = {"outputs", "default", "training", "dump_patches", "call_super_init"}


class Head(nn.Module):
    """Computes the outputs of a reward model from its residual stream after the final norm.

    A subclass defines `read`, which gets the stream at the last token of each text and, with `reads_prompt`, at the
    last token of its prompt. A head that reads other tokens defines `tokens` and `read_tokens` instead. Both must be
    differentiable, and treat every text by itself. Parameters and buffers are copied, moved to the model's device and
    converted to the dtype of rewards when a model is opened with the head.

    Attributes:
        outputs: the names of the outputs, in order.
        default: the output that is the reward if the user chooses none; None if the user must choose. A single output
            needs no choice.
        reads_prompt: whether `read` gets the stream at the prompt's last token.
        reads_first: whether the token that `read` calls `last` is the first one of a text. None, the default, follows
            the model: the first token ([CLS]) of an encoder, the last of a model with causal attention.

    Examples:
        >>> class Squared(Head):
        ...     def read(self, last, prompt_last):
        ...         return last.square().sum(dim=1, keepdim=True)
        >>> squared = RewardHead(head.model, Squared(), tokenizer=head.tokenizer)
        >>> squared.score(["Human: a Assistant: helpful-0 end"]).shape
        torch.Size([1])
    """

    outputs: Sequence[str] = ("reward",)
    default: str | None = None
    reads_prompt: bool = False
    reads_first: bool | None = None

    def read(
        self, last: Float[Tensor, "text d_model"], prompt_last: Float[Tensor, "text d_model"] | None
    ) -> Float[Tensor, "text output"]:
        """The outputs of texts whose residual stream is `last` at the last token and `prompt_last` at the prompt's."""
        raise NotImplementedError(f"{type(self).__name__} must define read(last, prompt_last).")

    def tokens(self, batch: TokenBatch) -> TokenPlaces:
        """The tokens that the head reads: the last one of each text, then, with `reads_prompt`, the prompts' last."""
        if not self.reads_prompt:
            return batch.last_places
        return batch.last_places.and_also(prompt_places(batch))

    def read_tokens(
        self, states: Float[Tensor, "token d_model"], places: TokenPlaces, batch: TokenBatch
    ) -> Float[Tensor, "text output"]:
        """The outputs of a batch's texts from the residual stream at the tokens that `tokens` returned."""
        n_texts = len(batch.last)
        return self.read(states[:n_texts], states[n_texts:] if self.reads_prompt else None)

    @property
    def needs_prompt(self) -> bool:
        """Whether the head must be told where the prompt ends, so that it cannot read a text by itself."""
        return self.reads_prompt and type(self).tokens is Head.tokens

    @property
    def uses_prompt(self) -> bool:
        """Whether the outputs depend on where the prompt ends."""
        return self.needs_prompt

    @property
    def settings(self) -> Mapping[str, object]:
        """What the outputs depend on besides tensors, for example a factor; a part of the model's fingerprint.

        By default, the attributes that are numbers, text, or lists of these.
        """
        kinds = type(self).__mro__[: -len(Head.__mro__)]
        given = {name: value for kind in reversed(kinds) for name, value in vars(kind).items()} | vars(self)
        return {
            name: value
            for name, value in given.items()
            if name not in _NO_SETTINGS and not name.startswith("__") and _is_setting(value)
        }

    @property
    def expression(self) -> str:
        """How the head is written in code, on pages that say how they were made; "..." for what is not known."""
        return f"{type(self).__name__}(...)"

    @property
    def shared_tensors(self) -> Sequence[Tensor]:
        """The tensors that the head shares with the model, so that it is copied without them."""
        return ()

    @property
    def reads_at(self) -> str:
        """Where the reward is read, for a result's provenance: "last", "response", or another word of the head's."""
        return "last"

    @property
    def reads_last(self) -> bool:
        """Whether the stream at the last token of a text may change the outputs."""
        return True

    @property
    def ending(self) -> str:
        """What a text must end with so that the head can read it, for probe texts."""
        return ""

    @property
    def ending_ids(self) -> tuple[int, ...]:
        """The ids that a text must end with so that the head can read it, for probe texts of drawn ids."""
        return ()

    def require_text(self, text: EncodedText, what: str) -> None:
        """Raise `DataError`, which begins with `what`, for a text that the head cannot read."""

    @property
    def reads_last_only(self) -> bool:
        """Whether the outputs depend on the residual stream at the last token only, as `read` without a prompt does."""
        same = type(self).tokens is Head.tokens and type(self).read_tokens is Head.read_tokens
        return same and not self.reads_prompt

    def after_folding(self, norm: NormLayer) -> "Head":
        """The head for a final norm without its gain and bias, which the head then applies first."""
        return _AfterGain(self, norm)


class LinearHead(Head):
    """The linear map from the last residual stream h to outputs: output = weight @ h + bias.

    Args:
        weight: one row per output; a vector is a single row.
        bias: one number per output.
        names: the names of the outputs; by default "reward" for one output, "0", "1", ... for several.

    Examples:
        >>> linear = LinearHead(torch.ones(head.d_model), bias=0.5)
        >>> RewardHead(head.model, linear, tokenizer=head.tokenizer).bias
        0.5
        >>> LinearHead(torch.ones(2, head.d_model), names=["helpfulness", "safety"]).outputs
        ('helpfulness', 'safety')
    """

    weight: Float[Tensor, "output d_model"]
    bias: Float[Tensor, "output"]

    def __init__(
        self, weight: Float[Tensor, "*output d_model"], bias: Any = 0.0, names: Sequence[str] | None = None
    ) -> None:
        super().__init__()
        rows = weight.detach()
        rows = rows[None] if rows.ndim == 1 else rows
        constants = torch.as_tensor(bias, dtype=torch.float64).detach().flatten()
        if len(constants) not in (1, len(rows)) or (names is not None and len(names) != len(rows)):
            raise ModelError(
                f"LinearHead: expected one bias and one name for each of {len(rows)} rows of the weight, got "
                f"{len(constants)} biases and the names {names if names is None else list(names)}."
            )
        constants = constants.expand(len(rows))
        self.register_buffer("weight", rows.clone())
        # No buffer, which `to` would round: biases are added in float64 precision.
        self.bias = constants.clone()
        if names is None:
            names = ("reward",) if len(rows) == 1 else [str(number) for number in range(len(rows))]
        self.outputs = tuple(map(str, names))

    def read(
        self, last: Float[Tensor, "text d_model"], prompt_last: Float[Tensor, "text d_model"] | None = None
    ) -> Float[Tensor, "text output"]:
        """The outputs, by one sum per output: a matrix product may round equal texts differently."""
        exact = self.weight.to(last)
        columns = [(last * row).sum(dim=-1) + float(bias) for row, bias in zip(exact, self.bias, strict=True)]
        return torch.stack(columns, dim=-1)

    def row(self, chosen: Sequence[int] = (0,)) -> tuple[Float[Tensor, "d_model"], float]:
        """The weight and the bias of one output, or of the difference of two."""
        if len(chosen) == 1:
            return self.weight[chosen[0]], float(self.bias[chosen[0]])
        first, second = self.weight[list(chosen)].to(torch.promote_types(self.weight.dtype, torch.float32))
        return first - second, float(self.bias[chosen[0]] - self.bias[chosen[1]])

    def after_folding(self, norm: NormLayer) -> "LinearHead":
        """The head for a final norm without its gain and bias: both are folded into the head."""
        dtype = torch.promote_types(self.weight.dtype, torch.float32)
        weight, gain, bias = (t.to(self.weight.device, dtype) for t in (self.weight, norm.gain, norm.bias))
        return LinearHead(weight * gain, self.bias + (weight @ bias).double(), self.outputs)


class WrappedHead(Head):
    """A head around another one: it reads the same tokens, and changes what the other one computes."""

    def __init__(self, head: Head) -> None:
        super().__init__()
        self.head = head
        self.outputs, self.default = head.outputs, head.default
        self.reads_prompt, self.reads_first = head.reads_prompt, head.reads_first

    def tokens(self, batch: TokenBatch) -> TokenPlaces:
        """The tokens that the head reads."""
        return self.head.tokens(batch)

    def require_text(self, text: EncodedText, what: str) -> None:
        """Raise `DataError`, which begins with `what`, for a text that the head cannot read."""
        self.head.require_text(text, what)

    @property
    def settings(self) -> Mapping[str, object]:
        """The settings of the head, and its class."""
        return {**self.head.settings, "around": type(self.head).__name__}

    @property
    def needs_prompt(self) -> bool:
        """Whether the inner head must be told where the prompt ends."""
        return self.head.needs_prompt

    @property
    def uses_prompt(self) -> bool:
        """Whether the outputs of the inner head depend on where the prompt ends."""
        return self.head.uses_prompt

    @property
    def shared_tensors(self) -> Sequence[Tensor]:
        """The tensors that the inner head shares with the model."""
        return self.head.shared_tensors

    @property
    def reads_at(self) -> str:
        """Where the inner head reads the reward."""
        return self.head.reads_at

    @property
    def reads_last(self) -> bool:
        """Whether the last token may change the outputs of the inner head."""
        return self.head.reads_last

    @property
    def reads_last_only(self) -> bool:
        """Whether the inner head reads the last token only."""
        return self.head.reads_last_only

    @property
    def ending(self) -> str:
        """What the inner head needs at the end of a text."""
        return self.head.ending

    @property
    def ending_ids(self) -> tuple[int, ...]:
        """The ids that the inner head needs at the end of a text."""
        return self.head.ending_ids


class _AfterGain(WrappedHead):
    """A head that applies the gain and the bias of the final norm before it reads."""

    def __init__(self, head: Head, norm: NormLayer) -> None:
        super().__init__(head)
        self.register_buffer("gain", norm.gain.clone())
        self.register_buffer("shift", norm.bias.clone())

    def read(
        self, last: Float[Tensor, "text d_model"], prompt_last: Float[Tensor, "text d_model"] | None = None
    ) -> Float[Tensor, "text output"]:
        """The outputs of the head for the stream with gain and bias."""
        return self.head.read(self._whole(last), None if prompt_last is None else self._whole(prompt_last))

    def read_tokens(
        self, states: Float[Tensor, "token d_model"], places: TokenPlaces, batch: TokenBatch
    ) -> Float[Tensor, "text output"]:
        """The outputs of the head for the stream with gain and bias."""
        return self.head.read_tokens(self._whole(states), places, batch)

    def _whole(self, states: Float[Tensor, "token d_model"]) -> Float[Tensor, "token d_model"]:
        gain, shift = self.get_buffer("gain"), self.get_buffer("shift")
        return states * gain.to(states) + shift.to(states)


def tensors_of(head: nn.Module) -> list[Tensor]:
    """The tensors that a head's outputs depend on: parameters, buffers, and the biases of its linear heads."""
    biases = [module.bias for module in head.modules() if isinstance(module, LinearHead)]
    return [*head.parameters(), *head.buffers(), *biases]


def _is_setting(value: object) -> bool:
    if isinstance(value, tuple | list):
        return all(map(_is_setting, value))
    return value is None or isinstance(value, bool | int | float | str)


def prompt_places(batch: TokenBatch) -> TokenPlaces:
    """The last token before the response of each text; raises `DataError` for a text without a prompt."""
    places = batch.last_of(batch.mask & ~batch.response)
    if bool((places.columns < 0).any()):
        raise DataError(
            "texts: this head reads the last token of the prompt, and a text by itself has no prompt; nor has a pair "
            "whose response leaves no room for it. Score preference pairs that fit into the context: "
            "head.score_pairs(pairs)."
        )
    return places
