"""What an opened checkpoint is: a base model, its head, where both came from, and whether the head has changed."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from rmtension.bodies._native_weights import active_head
from rmtension.errors import ModelError
from rmtension.heads._encoder_heads import PooledHead
from rmtension.heads._head import Head, LinearHead
from rmtension.heads._models_in_memory import read_in_memory
from rmtension.heads._process_head import ProcessHead
from rmtension.models._loading import LoadOptions
from rmtension.models._own_format import OwnFormat, same_tensors

CLASSIFIER, LANGUAGE_MODEL = "AutoModelForSequenceClassification", "AutoModelForCausalLM"
CLASSIFIES_TOKENS = "AutoModelForTokenClassification"


@dataclass(frozen=True)
class Source:
    """Where a checkpoint was read from, and how, to read it again; `head` is the head that the user passed, or None."""

    name: str
    head: object
    output: object
    options: LoadOptions


@dataclass(frozen=True)
class Logits:
    """Which transformers class has the reward among its logits, and for a language model the tokens of these logits.

    Without `tokens`, an output of the head is the logit with that number.
    """

    auto_class: str
    tokens: tuple[int, ...] | None = None


@dataclass(frozen=True)
class Checkpoint:
    """A base model of transformers with what a reward head needs; `head` is None for activations only.

    `choice` is the number of the output that is the reward, two numbers for a difference, or None for no choice.
    `pools` says that the reward is read where transformers' classifiers read it. `logits` says which logits of
    transformers the reward is; None if transformers does not compute it. `base` is None if it was converted, and can be
    read again from `source`. `classifier` is the model in memory whose score layer `head` was read from.
    `own` is the format of the checkpoint if its head is no score layer of a classifier.
    `media_tokens` are the ids of tokens that stand for parts of images, which no text may have.
    """

    base: nn.Module | None
    head: Head | None
    choice: tuple[int, ...] | None
    tokenizer: Any
    pad_token_id: int | None
    name: str
    pools: bool
    logits: Logits | None
    source: Source | None
    classifier: Any = None
    own: OwnFormat | None = None
    media_tokens: frozenset[int] = frozenset()

    def require_same_head(self) -> None:
        """Raise `ModelError` if the head of the model in memory has changed since the model was opened."""
        if not self.live_head or self.head is None:
            return
        if self.logits is None:
            now = read_in_memory(self.classifier)
            is_same = now is not None and same_tensors(now.head, self.head)
        else:
            copied = self.head.step if isinstance(self.head, ProcessHead) else self.head
            assert isinstance(copied, Head)
            read = {**dict(copied.named_parameters()), **dict(copied.named_buffers())}
            if isinstance(copied, LinearHead):
                read["bias"] = copied.bias
            live = self.live_head.items()
            is_same = all(torch.equal(tensor.to(read[name]), read[name].view_as(tensor)) for name, tensor in live)
        if not is_same:
            raise ModelError(
                f"{self.name}: its score layer changed after the model was opened (it was trained, or another adapter "
                "was activated), but the head is a copy of the old score layer. Open the model again with "
                "RewardHead.from_classifier."
            )

    @property
    def live_head(self) -> dict[str, Tensor]:
        """The tensors of the model in memory that the head has copies of, by their names in the head.

        For a head of an own class, all tensors outside the base model, by their names in the model.
        """
        if self.classifier is None:
            return {}
        if self.logits is None:
            inside = {id(parameter) for parameter in self.classifier.base_model.parameters()}
            outside = self.classifier.named_parameters()
            return {name: parameter for name, parameter in outside if id(parameter) not in inside}
        if isinstance(self.head, PooledHead):
            return self.head.tensors_of(self.classifier)
        return dict(active_head(score_layer(self.classifier)).named_parameters())

    @property
    def logit_rows(self) -> tuple[int, ...] | None:
        """The logit that is the reward, or two for a difference; None if there is none, or none is chosen."""
        return None if self.logits is None else self.logits.tokens or self.choice

    @property
    def reads_tokens(self) -> bool:
        """Whether the reward is a language model's logits of the next token."""
        return self.logits is not None and self.logits.auto_class == LANGUAGE_MODEL

    @property
    def trust_remote_code(self) -> bool:
        """Whether code that came with the checkpoint may run."""
        return self.source is not None and self.source.options.get("trust_remote_code", False)


def score_layer(model: Any) -> Any:
    """The layer with the classes of a classifier of sequences or tokens."""
    return getattr(model, "score", None) or getattr(model, "classifier", None)
