"""Heads that are no linear map of the last residual stream: layers, weighted objectives, means over tokens."""

from collections.abc import Mapping, Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn

from rmtension.data._encoding import EncodedText
from rmtension.data._token_places import TokenPlaces
from rmtension.data._tokens import TokenBatch
from rmtension.errors import DataError
from rmtension.heads._head import Head, LinearHead
from rmtension.heads._layers import Layers
from rmtension.heads._patterns import find_pattern, has_pattern

# The name of the output that combines the objectives.
SCORE = "score"


class LayeredHead(Head):
    """Outputs of several layers on the last residual stream, for example Linear-ReLU-Linear."""

    def __init__(self, layers: Layers, names: Sequence[str]) -> None:
        super().__init__()
        self.layers = layers
        self.outputs = tuple(names)

    @property
    def settings(self) -> Mapping[str, object]:
        """The name of the activation."""
        return {"activation": getattr(self.layers.activation, "__name__", "")}

    def read(
        self, last: Float[Tensor, "text d_model"], prompt_last: Float[Tensor, "text d_model"] | None = None
    ) -> Float[Tensor, "text output"]:
        """The outputs of the last layer."""
        outputs: Tensor = self.layers(last)
        return outputs


class Weights(nn.Module):
    """The weights of objectives: layers, then optionally softmax(x / temperature), a factor and a matrix."""

    scale: Tensor | None
    transform: Float[Tensor, "objective weight"] | None

    def __init__(
        self,
        layers: Layers,
        *,
        temperature: float | None = None,
        scale: Tensor | None = None,
        transform: Float[Tensor, "objective weight"] | None = None,
    ) -> None:
        super().__init__()
        self.layers, self.temperature = layers, temperature
        self.register_buffer("scale", None if scale is None else scale.detach().clone())
        self.register_buffer("transform", None if transform is None else transform.detach().clone())

    def forward(self, states: Float[Tensor, "text d_model"]) -> Float[Tensor, "text objective"]:
        weights: Tensor = self.layers(states)
        if self.temperature is not None:
            weights = torch.softmax(weights / self.temperature, dim=1)
        if self.scale is not None:
            weights = weights * self.scale
        return weights if self.transform is None else weights @ self.transform.T


class ExpectedBins(nn.Module):
    """The expected value of distributions over bins: layers give the logits of every objective's bins."""

    values: Float[Tensor, "bin"]

    def __init__(self, layers: Layers, n_objectives: int, values: Float[Tensor, "bin"]) -> None:
        super().__init__()
        self.layers, self.n_objectives = layers, n_objectives
        self.register_buffer("values", values)

    def forward(self, states: Float[Tensor, "text d_model"]) -> Float[Tensor, "text objective"]:
        logits = self.layers(states).unflatten(1, (self.n_objectives, -1))
        return torch.softmax(logits, dim=2) @ self.values


class WeightedHead(Head):
    """A score that is the sum of objectives times weights, both read at the last token; the objectives are outputs too.

    Args:
        objectives: computes the objectives from the residual stream.
        weights: computes their weights from the residual stream.
        names: the names of the objectives.
    """

    default = SCORE

    def __init__(self, objectives: nn.Module, weights: Weights, names: Sequence[str]) -> None:
        super().__init__()
        self.objectives, self.weights = objectives, weights
        self.outputs = (SCORE, *names)

    @property
    def settings(self) -> Mapping[str, object]:
        """The temperature of the weights."""
        return {"temperature": self.weights.temperature}

    def read(
        self, last: Float[Tensor, "text d_model"], prompt_last: Float[Tensor, "text d_model"] | None = None
    ) -> Float[Tensor, "text output"]:
        """The score, then the objectives; the weights are read from `prompt_last` where it is given."""
        objectives = self.objectives(last)
        weights = self.weights(last if prompt_last is None else prompt_last)
        return torch.cat([(weights * objectives).sum(dim=1, keepdim=True), objectives], dim=1)


class PromptWeightedHead(WeightedHead):
    """The same with weights that are read where the last assistant turn begins, so that they depend on the prompt only.

    Args:
        pattern: the token ids that begin an assistant turn; weights are read at the first of them.
    """

    def __init__(self, objectives: nn.Module, weights: Weights, names: Sequence[str], pattern: Sequence[int]) -> None:
        super().__init__(objectives, weights, names)
        self.pattern = tuple(pattern)

    @property
    def settings(self) -> Mapping[str, object]:
        """The temperature of the weights, and the pattern."""
        return {**super().settings, "pattern": self.pattern}

    @property
    def ending_ids(self) -> tuple[int, ...]:
        """The header of an assistant turn."""
        return self.pattern

    def require_text(self, text: EncodedText, what: str) -> None:
        """Raise `DataError`, which names the text, for a text without the header of an assistant turn."""
        if not has_pattern(text.ids, self.pattern):
            raise self._no_header(what)

    def tokens(self, batch: TokenBatch) -> TokenPlaces:
        """The last token of every text, then the first token of the last pattern in every text."""
        headers = batch.last_of(find_pattern(self.pattern, batch, at_end=False))
        missing = (headers.columns < 0).nonzero()[:, 0].tolist()
        if missing:
            raise self._no_header(f"texts: text {batch.indices[missing[0]]}")
        return batch.last_places.and_also(headers)

    def read_tokens(
        self, states: Float[Tensor, "token d_model"], places: TokenPlaces, batch: TokenBatch
    ) -> Float[Tensor, "text output"]:
        """The outputs, from the residual stream at the tokens of `tokens`."""
        n_texts = len(batch.last)
        return self.read(states[:n_texts], states[n_texts:])

    def _no_header(self, what: str) -> DataError:
        return DataError(
            f"{what}: this model weighs its objectives at the header of the last assistant turn, the token ids "
            f"{list(self.pattern)}, and the text has no such header. Score chats, which the tokenizer's template "
            "renders: pairs.as_chat(), or lists of messages."
        )


class MeanHead(Head):
    """A linear head on the mean of the residual stream over all tokens of a text."""

    def __init__(self, linear: LinearHead) -> None:
        super().__init__()
        self.linear = linear
        self.outputs = linear.outputs

    @property
    def reads_at(self) -> str:
        """The reward is read at all tokens."""
        return "all"

    def tokens(self, batch: TokenBatch) -> TokenPlaces:
        """All tokens of every text."""
        return batch.places(batch.mask)

    def read_tokens(
        self, states: Float[Tensor, "token d_model"], places: TokenPlaces, batch: TokenBatch
    ) -> Float[Tensor, "text output"]:
        """The outputs from the means."""
        return self.linear.read(places.means(states, len(batch.last)))
