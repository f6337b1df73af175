"""One preference pair: its fields, and the text that a reward model reads."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from itertools import takewhile
from typing import Any

import pandas as pd

from rmtension.data._chat import Chat, Message, parse_messages, prompt_chat, prompt_text
from rmtension.errors import DataError

_ASSISTANT = "\n\nAssistant:"


@dataclass(frozen=True)
class PreferencePair:
    """One prompt with a chosen (preferred) and a rejected response.

    The prompt is plain text, or a chat (a tuple of messages) that each model renders with its own template. After a
    chat, a response is the text of one message of the assistant, or a tuple of messages: several, or one with further
    fields such as tool calls. `tools` is the JSON text of the tools that are passed to the template.

    `objective` says what the preference rewards (for example "helpful" or "harmless"), `subset` is a finer label,
    `id` identifies the pair in error messages and tables (by default the first 16 digits of `digest`). Pairs with the
    same `item` are judged together (best-of-n: an item is ranked correctly if all of its pairs are); a pair without an
    item is judged by itself. An empty label becomes None. `labels` holds further labels by name, for example those of
    other columns of a file; results can be grouped by them.

    Pairs that a model reads identically are equal: a response does not store the space that `join_prompt` inserts
    after a text prompt, and a chat response of a single text message is stored as its text.

    Examples:
        >>> pair = PreferencePair("2 + 2?", "4", "5", objective="helpful")
        >>> pair.text("chosen"), pair.is_tie, pair.swapped().chosen
        ('2 + 2? 4', False, '5')
        >>> pair == PreferencePair("2 + 2?", " 4", " 5", objective="helpful")
        True
    """

    prompt: str | Chat
    chosen: str | Chat
    rejected: str | Chat
    objective: str | None = None
    subset: str | None = None
    id: str = ""
    item: str | None = None
    tools: str | None = field(default=None, repr=False)
    labels: Mapping[str, str] = field(default_factory=dict, compare=False, repr=False)

    def __post_init__(self) -> None:
        for name in ("chosen", "rejected"):
            object.__setattr__(self, name, _canonical(self.prompt, getattr(self, name)))
        for name in ("objective", "subset", "item", "tools"):
            object.__setattr__(self, name, getattr(self, name) or None)
        if not self.id:
            object.__setattr__(self, "id", self.digest()[:16])
        for name, label in self.labels.items():
            if not isinstance(name, str) or not isinstance(label, str) or not can_be_label(name):
                raise DataError(
                    f"labels: expected texts by name, with other names than the fields of a pair, got {name!r:.80}: "
                    f"{label!r:.80}. Rename the label, or give its value as text."
                )
        object.__setattr__(self, "labels", dict(self.labels))

    @property
    def is_tie(self) -> bool:
        """Whether chosen and rejected are the same response, so that every reward model scores them equally."""
        return self.chosen == self.rejected

    @property
    def is_chat(self) -> bool:
        """Whether the pair is read with a model's chat template."""
        return not isinstance(self.prompt, str)

    def digest(self) -> str:
        """SHA-256 over prompt, chosen, rejected, and tools if there are any, in hexadecimal."""
        parts = [_listed(self.prompt), _listed(self.chosen), _listed(self.rejected)]
        parts += [self.tools] if self.tools else []
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()

    def text(self, side: str) -> str:
        """The plain text of one side, "chosen" or "rejected"; raises `DataError` for a chat, which has no such text."""
        response = getattr(self, side)
        if not isinstance(self.prompt, str) or not isinstance(response, str):
            raise DataError(
                f"pair {self.id!r}: its prompt is a chat, whose text depends on a model's template. Use a pair with a "
                "plain prompt here."
            )
        return join_prompt(self.prompt, response)

    def swapped(self) -> "PreferencePair":
        """The same pair with chosen and rejected swapped."""
        return replace(self, chosen=self.rejected, rejected=self.chosen)

    def as_chat(self) -> "PreferencePair":
        """The same pair with its plain prompt as messages; see `PreferencePairs.as_chat`."""
        if not isinstance(self.prompt, str):
            return self
        chat = prompt_chat(self.prompt, f"pair {self.id!r}")
        responses = {name: getattr(self, name).strip() for name in ("chosen", "rejected")}
        return replace(self, prompt=chat, **responses)

    def to_dict(self) -> dict[str, Any]:
        """A plain dict with the field names of the JSON-lines format; messages become dicts; `tools` only if set.

        Each label is an entry of its own. Raises `DataError` for a plain text that would be read back as messages.
        """
        fields = {name: getattr(self, name) for name in self.__dataclass_fields__}
        for name in ("prompt", "chosen", "rejected"):
            if isinstance(fields[name], str) and _reads_as_messages(fields[name]):
                if not self.is_chat:
                    raise DataError(
                        f"pair {self.id!r}: field {name!r} is a plain text that happens to be the JSON of messages, "
                        "and would be read back as messages. Convert the pair to messages first: pair.as_chat() or "
                        "pairs.as_chat()."
                    )
                fields[name] = (Message("assistant", fields[name]),)
            if isinstance(fields[name], tuple):
                fields[name] = [message.to_dict() for message in fields[name]]
        tools, labels = fields.pop("tools"), fields.pop("labels")
        fields |= labels
        return fields if tools is None else {**fields, "tools": json.loads(tools)}


# The fields of a pair that are part of the JSON-lines format; each label is an entry of its own.
PAIR_FIELDS = tuple(name for name in PreferencePair.__dataclass_fields__ if name != "labels")
# Names with a meaning of their own when a row is read.
_RESERVED = (*PAIR_FIELDS, "labels", "system", "conversations")


def can_be_label(name: str) -> bool:
    """Whether a label can have this name: no field of a pair, no other column with a meaning of its own."""
    return name not in _RESERVED and not name.startswith("__")


def is_missing(value: Any) -> bool:
    """Whether a value is None, or the NaN, NaT or NA that pandas has instead."""
    return value is None or (pd.api.types.is_scalar(value) and bool(pd.isna(value)))


def join_prompt(prompt: str, response: str) -> str:
    """Join prompt and response as reward models read them: with one space between, unless there is whitespace already.

    Examples:
        >>> join_prompt("Human: hi Assistant:", "hello")
        'Human: hi Assistant: hello'
    """
    gap = prompt and response and not prompt[-1].isspace() and not response[0].isspace()
    return f"{prompt} {response}" if gap else prompt + response


def split_transcripts(chosen: str, rejected: str) -> tuple[str, str, str]:
    r"""Split a pair of HH transcripts into prompt, chosen and rejected, at the last shared `\n\nAssistant:`.

    Raises `DataError` if they share no such prompt.

    Examples:
        >>> split_transcripts("\n\nHuman: hi\n\nAssistant: a", "\n\nHuman: hi\n\nAssistant: b")
        ('\n\nHuman: hi\n\nAssistant:', 'a', 'b')
    """
    equal = takewhile(lambda both: both[0] == both[1], zip(chosen, rejected, strict=False))
    shared = "".join(character for character, _ in equal)
    end = shared.rfind(_ASSISTANT)
    if end < 0:
        raise DataError(
            f"chosen, rejected: expected transcripts that share a prompt ending in {_ASSISTANT!r}, got two texts "
            "without such a prompt. Correct the row, or load with on_invalid='skip'."
        )
    end += len(_ASSISTANT)
    return chosen[:end], chosen[end:].removeprefix(" "), rejected[end:].removeprefix(" ")


def require_responses(pair: PreferencePair, where: str) -> None:
    """Raise `DataError` unless the prompt is a text or a chat, and the responses fit it and are not empty."""
    if not isinstance(pair.prompt, str) and not _is_chat(pair.prompt):
        raise DataError(
            f"{where}: field 'prompt' should be text or a tuple of Message, got {type(pair.prompt).__name__}. "
            "PreferencePairs.from_records reads messages from dicts."
        )
    for name in ("chosen", "rejected"):
        response = getattr(pair, name)
        if not isinstance(response, str) and not (pair.is_chat and _is_chat(response)):
            expected = "text or messages" if pair.is_chat else "text, as the prompt is"
            raise DataError(f"{where}: field {name!r} should be {expected}, got {type(response).__name__}.")
        if not isinstance(response, str) and response[-1].role != "assistant":
            raise DataError(
                f"{where}: field {name!r} should end in a message of the assistant, got the roles "
                f"{[message.role for message in response]}."
            )
        messages = [response] if isinstance(response, str) else [f"{m.content or ''}{m.more}" for m in response]
        if not "".join(messages).strip():
            raise DataError(
                f"{where}: field {name!r} is empty; a reward model needs a response to score. Remove the pair, or "
                'load with on_invalid="skip".'
            )
    for name in PAIR_FIELDS:
        value = getattr(pair, name)
        text = prompt_text(value) if name in ("prompt", "chosen", "rejected") else value or ""
        try:
            text.encode()
        except UnicodeEncodeError as error:
            # JSON can escape half a character, which neither a tokenizer nor a file in UTF-8 accepts.
            raise DataError(
                f"{where}: field {name!r} has half of a surrogate pair, which is not a character. Correct the text, "
                'or load with on_invalid="skip".'
            ) from error


def _is_chat(value: object) -> bool:
    return isinstance(value, tuple) and bool(value) and all(isinstance(message, Message) for message in value)


def _canonical(prompt: Any, response: Any) -> Any:
    """The response without the space that `join_prompt` inserts; a single message that has only text as that text."""
    if isinstance(response, str):
        shorter = response.removeprefix(" ")
        is_put_back = isinstance(prompt, str) and shorter and join_prompt(prompt, shorter) == prompt + response
        return shorter if is_put_back else response
    if _is_chat(response) and len(response) == 1 and response[0].role == "assistant" and not response[0].more:
        return response[0].content
    return response


def _reads_as_messages(text: str) -> bool:
    try:
        return not isinstance(parse_messages(text, ""), str)
    except DataError:
        return True


def _listed(value: Any) -> Any:
    return [message.to_list() for message in value] if _is_chat(value) else value
