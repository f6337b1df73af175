"""One preference pair: its fields, the text a reward model reads, and how it is made from a record."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import takewhile
from typing import Any

from rmtension.chat import Chat, Message, is_messages, prompt_text, read_chat
from rmtension.errors import DataError

_ASSISTANT = "\n\nAssistant:"


@dataclass(frozen=True)
class PreferencePair:
    """One prompt with the response that was preferred and the one that was not.

    The prompt is plain text, or a chat (a tuple of messages) that each model renders with its own template.
    `objective` says what the preference rewards (for example "helpful" or "harmless"), `subset` is a finer label,
    `id` names the pair in messages and tables. Pairs with the same `item` are judged together (best-of-n: the item is
    right when every one of its pairs is); without one a pair is judged by itself.

    Examples:
        >>> pair = PreferencePair("2 + 2?", "4", "5", objective="helpful")
        >>> pair.text("chosen"), pair.is_tie, pair.swapped().chosen
        ('2 + 2? 4', False, '5')
    """

    prompt: str | Chat
    chosen: str
    rejected: str
    objective: str | None = None
    subset: str | None = None
    id: str = ""
    item: str | None = None

    def __post_init__(self) -> None:
        if not self.id:
            object.__setattr__(self, "id", self.digest()[:16])

    @property
    def is_tie(self) -> bool:
        """Whether chosen and rejected are the same text, so that no reward model can tell them apart."""
        return self.chosen == self.rejected

    def digest(self) -> str:
        """SHA-256 over prompt, chosen and rejected, in hexadecimal."""
        return hashlib.sha256(json.dumps([self.prompt, self.chosen, self.rejected]).encode()).hexdigest()

    def text(self, side: str) -> str:
        """The plain text of one side, "chosen" or "rejected"; raises `DataError` for a chat, which has none."""
        if not isinstance(self.prompt, str):
            raise DataError(
                f"pair {self.id!r}: its prompt is a chat, whose text depends on a model's template. Use a pair with a "
                "plain prompt here."
            )
        return join_prompt(self.prompt, getattr(self, side))

    def swapped(self) -> "PreferencePair":
        """The same pair with the preference turned round."""
        return replace(self, chosen=self.rejected, rejected=self.chosen)

    def to_dict(self) -> dict[str, Any]:
        """A plain dict with the field names of the JSON-lines format; messages are dicts."""
        fields = {name: getattr(self, name) for name in self.__dataclass_fields__}
        if not isinstance(self.prompt, str):
            fields["prompt"] = [message._asdict() for message in self.prompt]
        return fields


def join_prompt(prompt: str, response: str) -> str:
    """The text that a reward model reads: one space between prompt and response unless whitespace is there already.

    Examples:
        >>> join_prompt("Human: hi Assistant:", "hello")
        'Human: hi Assistant: hello'
    """
    gap = prompt and response and not prompt[-1].isspace() and not response[0].isspace()
    return f"{prompt} {response}" if gap else prompt + response


def split_transcripts(chosen: str, rejected: str) -> tuple[str, str, str]:
    r"""Prompt and the two responses of a pair of HH transcripts: the prompt ends at the last shared `\n\nAssistant:`.

    Examples:
        >>> split_transcripts("\n\nHuman: hi\n\nAssistant: a", "\n\nHuman: hi\n\nAssistant: b")
        ('\n\nHuman: hi\n\nAssistant:', 'a', 'b')
    """
    shared = "".join(one for one, _ in takewhile(lambda two: two[0] == two[1], zip(chosen, rejected, strict=False)))
    end = shared.rfind(_ASSISTANT)
    if end < 0:
        raise DataError(
            f"chosen, rejected: expected transcripts that share a prompt ending in {_ASSISTANT!r}, got two texts that "
            "share none. Give each pair a field 'prompt'."
        )
    end += len(_ASSISTANT)
    return chosen[:end], chosen[end:].removeprefix(" "), rejected[end:].removeprefix(" ")


def require_responses(pair: PreferencePair, where: str) -> None:
    """Raise `DataError` unless the prompt is a text or a chat and both responses are texts with something in them."""
    is_chat = isinstance(pair.prompt, tuple) and all(isinstance(message, Message) for message in pair.prompt)
    if not isinstance(pair.prompt, str) and not (is_chat and pair.prompt):
        raise DataError(
            f"{where}: field 'prompt' should be text or messages, got {type(pair.prompt).__name__}. "
            "PreferencePairs.from_records reads messages from dicts."
        )
    for field in ("chosen", "rejected"):
        response = getattr(pair, field)
        if not isinstance(response, str):
            raise DataError(f"{where}: field {field!r} should be text, got {type(response).__name__}.")
        if not response.strip():
            raise DataError(
                f"{where}: field {field!r} is empty; a reward model needs a response to score. Remove the pair, or "
                'load with on_invalid="skip".'
            )
    for field in PreferencePair.__dataclass_fields__:
        value = getattr(pair, field)
        text = prompt_text(value) if field == "prompt" else value or ""
        try:
            text.encode()
        except UnicodeEncodeError as error:
            # JSON can escape half a character; no tokenizer takes it, and no file.
            raise DataError(
                f"{where}: field {field!r} has half of a surrogate pair, which is no character. Correct the text, or "
                'load with on_invalid="skip".'
            ) from error


def to_pair(record: Any, where: str, labels: Mapping[str, str]) -> PreferencePair:
    """The pair of one record, `labels` over its own; raises `DataError` naming `where` and the field."""
    if not isinstance(record, Mapping):
        raise DataError(
            f"{where}: expected a JSON object with 'prompt', 'chosen' and 'rejected', got {type(record).__name__}."
        )
    for field in ("chosen", "rejected"):
        if field not in record:
            raise DataError(f"{where}: field {field!r} is missing; fields present: {sorted(map(str, record))}.")
    fields: dict[str, Any] = {**record, **labels}
    if any(is_messages(fields.get(name)) for name in ("prompt", "chosen", "rejected")):
        fields |= _from_messages(fields, where)
    for field in ("prompt", "chosen", "rejected"):
        # By now a chat is a tuple of messages, and only a prompt may be one.
        is_chat = field == "prompt" and isinstance(fields.get(field), tuple)
        if field in fields and not isinstance(fields[field], str) and not is_chat:
            raise DataError(f"{where}: field {field!r} should be text or messages, got {type(fields[field]).__name__}.")
    if "prompt" not in fields:
        try:
            fields["prompt"], fields["chosen"], fields["rejected"] = split_transcripts(
                fields["chosen"], fields["rejected"]
            )
        except DataError as error:
            raise DataError(f"{where}: field 'prompt' is missing. {error}") from error
    labelled = ("objective", "subset", "item")
    optional = {name: None if fields.get(name) is None else str(fields[name]) for name in labelled}
    pair = PreferencePair(
        fields["prompt"], fields["chosen"], fields["rejected"], id=str(fields.get("id") or ""), **optional
    )
    require_responses(pair, where)
    return pair


def _from_messages(fields: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Prompt and responses of a record that has messages in some fields.

    With a prompt, a response is text or one message of the assistant. Without, `chosen` and `rejected` are whole
    conversations that differ in their last message only.
    """
    chats = {
        name: read_chat(fields[name], f"{where}: field {name!r}")
        for name in ("prompt", "chosen", "rejected")
        if is_messages(fields.get(name))
    }
    prompt: Any = chats.get("prompt", fields.get("prompt"))
    if prompt is None and {"chosen", "rejected"} <= set(chats):
        prompt = chats["chosen"][:-1]
        if not prompt or chats["rejected"][:-1] != prompt:
            raise DataError(
                f"{where}: field 'prompt' is missing, and the messages of 'chosen' and 'rejected' differ in more than "
                "the last one. Give the record a 'prompt' with the messages before the responses."
            )
        chats = {name: chats[name][-1:] for name in ("chosen", "rejected")}
    responses = {}
    for name in ("chosen", "rejected"):
        responses[name] = fields[name]
        if name in chats:
            if isinstance(prompt, str) or len(chats[name]) != 1 or chats[name][0].role != "assistant":
                raise DataError(
                    f"{where}: field {name!r} should be one message of the assistant after a prompt of messages, got "
                    f"the roles {[message.role for message in chats[name]]}."
                )
            responses[name] = chats[name][0].content
    return responses if prompt is None else {"prompt": prompt, **responses}
