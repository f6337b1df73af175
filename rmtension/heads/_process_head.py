"""Process rewards: a score of every step of a response, read at the tokens that end the steps."""

import copy
from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from rmtension.bodies._norms import NormLayer
from rmtension.data._encoding import EncodedText
from rmtension.data._token_places import TokenPlaces
from rmtension.data._tokens import TokenBatch
from rmtension.errors import DataError, ModelError, OptionError
from rmtension.heads._head import Head
from rmtension.heads._outputs import choose_rows
from rmtension.heads._patterns import find_pattern, has_pattern


class ProcessHead(Head):
    """The reward of a process reward model: the probabilities that a response's steps are right, combined.

    The model reads each step of the response at the marker that ends it. The probability of a step is the softmax of
    the class `label` among the classes of the step's head, or the sigmoid of a single number. The outputs are ways to
    combine the steps of a text: "min", "mean", "last" and "product".

    Pass it as `head` when a checkpoint is opened, and say which output is the reward. Only markers in the response
    count; in a text without a prompt, those of the whole text. A response without a marker raises `DataError`.

    Args:
        marker: the text that ends each step, for example "<extra_0>" for Qwen2.5-Math-PRM or the `step_separator` of
            TRL. It is read at its last token. In a text it must be encoded as the same tokens as by itself.
        step: the head of a step: anything that the argument `head` accepts; None for the checkpoint's own: that of a
            `...ForTokenClassification`, or linear layers with ReLU called score.0, score.2.
        label: the class that means a right step, by name or index, if there are several.

    Examples:
        >>> from transformers import AutoConfig, AutoModelForTokenClassification
        >>> config = AutoConfig.from_pretrained("organism", num_labels=2)
        >>> AutoModelForTokenClassification.from_config(config).save_pretrained("process")
        >>> options = {"head": ProcessHead("end"), "tokenizer": head.tokenizer}
        >>> model = RewardHead.from_pretrained("process", output="min", **options)
        >>> model.outputs
        ['min', 'mean', 'last', 'product']
        >>> rewards = model.score(["Human: a Assistant: helpful-0 end helpful-1 end"])
        >>> bool((rewards > 0) & (rewards < 1))
        True
    """

    outputs = ("min", "mean", "last", "product")

    def __init__(self, marker: str, step: object = None, *, label: int | str = 1) -> None:
        super().__init__()
        if not isinstance(marker, str) or not marker:
            raise OptionError(f"marker: expected the text that ends each step, got {marker!r}.")
        self.marker = marker
        self.step: Any = step
        self.label = label
        self.marker_ids: tuple[int, ...] = ()
        self._hidden: frozenset[int] = frozenset()

    def on(self, step: Head, tokenizer: Any) -> "ProcessHead":
        """This head with the head of a step, and the marker as tokens of a tokenizer."""
        own = copy.deepcopy(self)
        if len(step.outputs) > 1:
            names = dict(enumerate(step.outputs))
            try:
                (own.label,) = choose_rows(self.label, len(names), names, "label")
            except OptionError as error:
                raise OptionError(f"label: {str(error).removeprefix('output: ')}") from error
        own.step = step
        own.marker_ids = _marker_ids(self.marker, tokenizer)
        own._hidden = _merged_tokens(self.marker, own.marker_ids, tokenizer)
        return own

    # -- what a head says of itself --------------------------------------------------------------------------------

    @property
    def expression(self) -> str:
        """The head with its marker."""
        return f"ProcessHead({self.marker!r})"

    @property
    def uses_prompt(self) -> bool:
        """True: only markers in the response count."""
        return True

    @property
    def reads_at(self) -> str:
        """The reward is read at the markers in the response."""
        return "markers"

    @property
    def ending(self) -> str:
        """The marker."""
        return self.marker

    @property
    def ending_ids(self) -> tuple[int, ...]:
        """The ids of the marker."""
        return self.marker_ids

    @property
    def settings(self) -> Mapping[str, object]:
        """The marker's tokens and the class of right steps."""
        return {"marker": self.marker_ids, "label": self.label, **self._step.settings}

    def after_folding(self, norm: NormLayer) -> "ProcessHead":
        """The head whose step head applies the gain and the bias of the final norm first."""
        own = copy.deepcopy(self)
        own.step = self._step.after_folding(norm)
        return own

    def require_text(self, text: EncodedText, what: str) -> None:
        """Raise `DataError`, which names the text, for a response without a marker."""
        merged = [number for number in text.ids[text.response_start :] if number in self._hidden]
        if merged:
            raise DataError(
                f"{what}: the tokenizer joins the marker {self.marker!r} with the text around it: it is inside of "
                f"token {merged[0]}, not the marker's own token {self.marker_ids[-1]}, so the step that it ends "
                "would be missed. Separate the marker from the text, for example by a space, as in training."
            )
        if not has_pattern(text.ids, self.marker_ids, ends_from=text.response_start):
            raise DataError(
                f"{what}: expected at least one marker {self.marker!r} in the response, which ends a step, got none. "
                f"Put {self.marker!r} after each step, as in training, or pass the marker that the model was trained "
                "with: head=ProcessHead(marker)."
            )

    # -- reading ---------------------------------------------------------------------------------------------------

    def tokens(self, batch: TokenBatch) -> TokenPlaces:
        """The last token of each marker in the response of each text."""
        at = batch.response & find_pattern(self.marker_ids, batch, at_end=True)
        missing = (~at.any(dim=1)).nonzero()[:, 0].tolist()
        if missing:
            raise DataError(
                f"texts: text {batch.indices[missing[0]]} has no marker {self.marker!r} in its response. Put "
                f"{self.marker!r} after each step."
            )
        return batch.places(at)

    def read_tokens(
        self, states: Float[Tensor, "token d_model"], places: TokenPlaces, batch: TokenBatch
    ) -> Float[Tensor, "text output"]:
        """The combined probabilities of each text's steps."""
        return self.combined(self._step.read(states, None), places, len(batch.last))

    def combined(
        self, values: Float[Tensor, "token value"], places: TokenPlaces, n_texts: int
    ) -> Float[Tensor, "text output"]:
        """The outputs of texts from what the step's head gives at each marker."""
        if values.shape[1] == 1:
            logs = torch.nn.functional.logsigmoid(values[:, 0])
        else:
            logs = values.log_softmax(dim=1)[:, int(self.label)]
        counts = places.counts(n_texts).to(logs.device)
        # Beyond the steps of a text: log 1, which changes neither the smallest nor the product.
        table = places.table(logs, n_texts)
        real = torch.arange(table.shape[1], device=table.device) < counts[:, None]
        mean = (table.exp() * real).sum(dim=1) / counts
        last = table.gather(1, counts[:, None] - 1)[:, 0].exp()
        return torch.stack([table.amin(dim=1).exp(), mean, last, table.sum(dim=1).exp()], dim=1)

    @property
    def _step(self) -> Head:
        if not isinstance(self.step, Head) or not self.marker_ids:
            raise ModelError(
                "head: a ProcessHead gets its step head and the tokens of its marker when a checkpoint is opened. Use "
                "RewardHead.from_pretrained(folder, head=ProcessHead(marker), output='min')."
            )
        return self.step


def _marker_ids(marker: str, tokenizer: Any) -> tuple[int, ...]:
    """The tokens of the marker by itself, without the mark of a word's beginning that some tokenizers put first."""
    if tokenizer is None:
        raise OptionError("marker: expected a model with a tokenizer, which encodes the marker. Pass tokenizer=...")
    ids = list(tokenizer.encode(marker, add_special_tokens=False))
    if not ids or tokenizer.unk_token_id in ids:
        raise OptionError(
            f"marker: the tokenizer has no tokens for {marker!r}. Pass the marker that the model was trained with."
        )
    while len(ids) > 1 and tokenizer.decode(ids[1:]) == marker:
        ids = ids[1:]
    return tuple(ids)


def _merged_tokens(marker: str, ids: tuple[int, ...], tokenizer: Any) -> frozenset[int]:
    """The tokens that contain the whole marker and more; none if the marker is a token that nothing is joined to."""
    if len(ids) == 1 and ids[0] in tokenizer.get_added_vocab().values():
        return frozenset()
    everything = sorted(tokenizer.get_vocab().values())
    texts = tokenizer.batch_decode([[number] for number in everything], clean_up_tokenization_spaces=False)
    return frozenset(
        number for number, text in zip(everything, texts, strict=True) if marker in text and number not in ids
    )
