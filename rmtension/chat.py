"""Chat messages: reading them, rendering them with a tokenizer's template, and making them from plain transcripts."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import Any, NamedTuple

from rmtension.errors import DataError, ModelError

_TURN = re.compile(r"\n\n(Human|Assistant):")
_ROLES = {"Human": "user", "Assistant": "assistant"}


class Message(NamedTuple):
    """One turn of a conversation; `role` is what the chat template knows: "system", "user" or "assistant"."""

    role: str
    content: str


Chat = tuple[Message, ...]


@dataclass(frozen=True)
class RenderedText:
    """A text as the tokenizer gets it, the character its response starts at, and whether special tokens are in it."""

    text: str
    response_start: int
    is_chat: bool


def read_chat(messages: Sequence[Any], where: str) -> Chat:
    """Messages as a `Chat`; raises `DataError` naming `where` and the message that is none.

    Examples:
        >>> read_chat([{"role": "user", "content": "hi"}], "record 0")
        (Message(role='user', content='hi'),)
    """
    chat = []
    for number, message in enumerate(messages):
        fields = message._asdict() if isinstance(message, Message) else message
        if not isinstance(fields, Mapping) or not all(isinstance(fields.get(name), str) for name in Message._fields):
            raise DataError(
                f"{where}: message {number} should be a dict with text under 'role' and 'content', got "
                f"{str(message)[:80]}. Only messages of plain text can be scored."
            )
        chat.append(Message(fields["role"], fields["content"]))
    if not chat:
        raise DataError(f"{where}: expected at least one message, got an empty list.")
    return tuple(chat)


def is_messages(value: object) -> bool:
    """Whether `value` looks like a list of messages rather than a text."""
    return isinstance(value, list | tuple)


def prompt_text(prompt: str | Chat) -> str:
    """One text for each prompt, to sort and to hash by; for a chat it is not what a model reads."""
    return prompt if isinstance(prompt, str) else "".join(f"<|{role}|>{content}" for role, content in prompt)


def split_turns(transcript: str) -> Chat:
    r"""The messages of a plain transcript whose turns begin with `\n\nHuman:` and `\n\nAssistant:`.

    A last turn without text, where the response would go, is left out. Raises `DataError` for any other text.

    Examples:
        >>> split_turns("\n\nHuman: hi\n\nAssistant: hello\n\nHuman: bye\n\nAssistant:")[1:]
        (Message(role='assistant', content='hello'), Message(role='user', content='bye'))
    """
    lead, *turns = _TURN.split(transcript)
    if lead.strip() or not turns:
        raise DataError(
            "transcript: expected turns that begin with '\\n\\nHuman:' and '\\n\\nAssistant:', got "
            f"{transcript[:60]!r}. Give the messages themselves as a list of dicts."
        )
    messages = [Message(_ROLES[name], text.strip()) for name, text in zip(turns[::2], turns[1::2], strict=True)]
    return tuple(messages if messages[-1].content else messages[:-1])


def render(tokenizer: Any, chat: Chat, response: str | None = None) -> RenderedText:
    """The text of a chat by the tokenizer's template, with `response` as the assistant's last message if given.

    The response starts where the rendered text leaves the prompt's own rendering with its generation prompt.
    """
    full = _apply(tokenizer, chat if response is None else (*chat, Message("assistant", response)))
    if response is None:
        return RenderedText(full, 0, is_chat=True)
    prompt = _apply(tokenizer, chat, add_generation_prompt=True)
    shared = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(prompt, full, strict=False)))
    return RenderedText(full, shared, is_chat=True)


def _apply(tokenizer: Any, chat: Chat, **options: bool) -> str:
    if getattr(tokenizer, "chat_template", None) is None:
        raise ModelError(
            "tokenizer: it has no chat template, so that messages have no text. Set tokenizer.chat_template to the one "
            "that the reward model was trained with, or pass plain texts."
        )
    try:
        rendered = tokenizer.apply_chat_template([message._asdict() for message in chat], tokenize=False, **options)
    except Exception as error:  # a template is a program of the model's authors; it raises what it likes
        raise DataError(f"messages: the chat template refused them ({type(error).__name__}: {error}).") from error
    assert isinstance(rendered, str)
    return rendered
