"""Chat messages: reading them, rendering them with a tokenizer's template, and making them from plain prompts."""

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import takewhile
from typing import Any

import numpy as np

from rmtension.errors import DataError, ModelError

_TURN = re.compile(r"\n\n(Human|Assistant):")
_FIRST_TURN = re.compile(rf"\s*{_TURN.pattern}")
_ROLES = {"Human": "user", "Assistant": "assistant"}
# ShareGPT's names of who speaks.
_SHAREGPT_ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "assistant": "assistant",
    "system": "system",
    "tool": "tool",
    "observation": "tool",
}


@dataclass(frozen=True, repr=False)
class Message:
    """One turn of a conversation: its role, its text, and in `more` every other field, which chat templates may read.

    `role` is what the chat template knows: "system", "user", "assistant", "tool". `content` is None where the data
    have null there, as messages do that only call tools. `more` is JSON text ("" where there is no other field), so
    that messages are hashable; the order of its keys is kept, because templates write it out.

    Examples:
        >>> message = Message("user", "hi", '{"name": "bob"}')
        >>> message.to_dict()
        {'role': 'user', 'content': 'hi', 'name': 'bob'}
    """

    role: str
    content: str | None
    more: str = ""

    def __repr__(self) -> str:
        more = f", more={self.more!r}" if self.more else ""
        return f"Message(role={self.role!r}, content={self.content!r}{more})"

    def to_dict(self) -> dict[str, Any]:
        """The message as a chat template gets it."""
        return {"role": self.role, "content": self.content, **(json.loads(self.more) if self.more else {})}

    def to_list(self) -> list[str | None]:
        """What a digest is made of: role, content, and the other fields where there are any."""
        return [self.role, self.content, *([self.more] if self.more else [])]


Chat = tuple[Message, ...]


@dataclass(frozen=True)
class RenderedText:
    """A text as the tokenizer gets it, the character its response starts at, and whether special tokens are in it."""

    text: str
    response_start: int
    is_chat: bool


# -- reading -----------------------------------------------------------------------------------------------------------


def read_chat(messages: Any, where: str) -> Chat:
    """A list of messages, or a single one, as a `Chat`; raises `DataError` naming `where` and the message.

    A message is a dict with `role` and `content`, or ShareGPT's `from` and `value`. The content is text, or a list of
    text parts, which are joined. All other fields are kept, less those that are None.

    Examples:
        >>> read_chat([{"role": "user", "content": "hi"}], "record 0")
        (Message(role='user', content='hi'),)
        >>> read_chat({"from": "gpt", "value": "hello"}, "record 0")
        (Message(role='assistant', content='hello'),)
    """
    listed = [messages] if isinstance(messages, Mapping | Message) else messages
    chat = tuple(_read_message(message, f"{where}: message {number}") for number, message in enumerate(listed))
    if not chat:
        raise DataError(f"{where}: expected at least one message, got an empty list.")
    return chat


def is_messages(value: object) -> bool:
    """Whether `value` looks like a list of messages, or a single one, rather than a text."""
    if isinstance(value, Mapping):
        return "role" in value or {"from", "value"} <= set(value)
    return isinstance(value, list | tuple | np.ndarray | Message)


def parse_messages(value: Any, where: str) -> Any:
    """The messages that a text holds as JSON, a list of them or one; any other value as it is.

    Tables have no other way to hold messages. Raises `DataError` naming `where` for messages as Python prints them.

    Examples:
        >>> parse_messages('[{"role": "user", "content": "hi"}]', "row 0")
        [{'role': 'user', 'content': 'hi'}]
        >>> parse_messages('{"answer": 4}', "row 0")
        '{"answer": 4}'
    """
    if not isinstance(value, str) or not (text := value.lstrip()).startswith(("[", "{")):
        return value
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        if text.startswith(("[{'", "{'")) and any(name in text for name in ("'role':", "'from':")):
            raise DataError(
                f"{where} has messages as Python prints them ({text[:40]!r}). Write them as JSON (json.dumps), or the "
                "table as JSON lines or Parquet."
            ) from None
        return value
    listed = found if isinstance(found, list) else [found]
    return found if listed and all(isinstance(one, dict) and _has_message(set(one)) for one in listed) else value


def _has_message(keys: set[str]) -> bool:
    return {"from", "value"} <= keys or ("role" in keys and bool(keys & {"content", "tool_calls", "function_call"}))


def json_text(value: Any, where: str) -> str:
    """JSON of fields that a chat template reads, keys in their order; raises `DataError` for what JSON cannot hold."""
    try:
        return json.dumps(value, ensure_ascii=False, allow_nan=False, default=_to_plain)
    except (TypeError, ValueError, RecursionError) as error:
        raise DataError(f"{where}: expected values that JSON can hold ({error}). Convert them to text.") from error


def _to_plain(value: Any) -> Any:
    # What pandas and Arrow have in the place of lists and numbers.
    if isinstance(value, np.ndarray | np.generic):
        return value.tolist()
    raise TypeError(f"{type(value).__name__} is not a JSON value")


def _read_message(message: Any, where: str) -> Message:
    if isinstance(message, Message):
        return message
    if not isinstance(message, Mapping):
        raise _no_message(message, where)
    # Arrow gives every message of a column the fields of all others, as None.
    fields = {str(name): value for name, value in message.items() if value is not None or name == "content"}
    if "role" not in fields and {"from", "value"} <= set(fields):
        speaker = fields.pop("from")
        if not isinstance(speaker, str) or speaker not in _SHAREGPT_ROLES:
            raise DataError(f"{where}: 'from' should be one of {list(_SHAREGPT_ROLES)}, got {speaker!r:.80}.")
        fields = {"role": _SHAREGPT_ROLES[speaker], "content": fields.pop("value"), **fields}
    calls_tools = bool(fields.get("tool_calls") or fields.get("function_call"))
    role, content = fields.pop("role", None), fields.pop("content", "" if calls_tools else None)
    if isinstance(content, list | tuple | np.ndarray):
        content = _joined(content, message, where)
    if not isinstance(role, str) or not (isinstance(content, str) or (content is None and calls_tools)):
        raise _no_message(message, where)
    return Message(role, content, json_text(fields, where) if fields else "")


def _joined(parts: Iterable[Any], message: Any, where: str) -> str:
    """The text of content that comes in parts; raises `DataError` for a part that is no text."""
    for part in parts:
        if not isinstance(part, Mapping):
            raise _no_message(message, where)
        if part.get("type") != "text" or not isinstance(part.get("text"), str):
            raise DataError(
                f"{where}: its content has a part of type {part.get('type')!r:.40}. Only text can be scored: leave "
                "such pairs out."
            )
    return "".join(part["text"] for part in parts)


def _no_message(message: Any, where: str) -> DataError:
    return DataError(
        f"{where} should be a dict with text under 'role' and 'content' (or 'from' and 'value'), got "
        f"{str(message)[:80]}. Only messages of plain text can be scored."
    )


# -- plain prompts -----------------------------------------------------------------------------------------------------


def prompt_text(prompt: str | Chat) -> str:
    """One text for each prompt, to sort and to hash by; for a chat it is not what a model reads."""
    if isinstance(prompt, str):
        return prompt
    return "".join(f"<|{one.role}|>{one.content}{one.more}" for one in prompt)


def n_characters(response: str | Chat) -> int:
    """How long a response is: the characters of its text, or of the texts of its messages."""
    return len(response) if isinstance(response, str) else sum(len(one.content or "") for one in response)


def is_transcript(text: str) -> bool:
    r"""Whether a text begins with a turn of an HH transcript, `\n\nHuman:` or `\n\nAssistant:`."""
    return _FIRST_TURN.match(text) is not None


def split_turns(transcript: str) -> Chat:
    r"""The messages of a plain transcript whose turns begin with `\n\nHuman:` and `\n\nAssistant:`.

    A last turn without text, where the response would go, is left out. Raises `DataError` for any other text.

    Examples:
        >>> split_turns("\n\nHuman: hi\n\nAssistant: hello\n\nHuman: bye\n\nAssistant:")[1:]
        (Message(role='assistant', content='hello'), Message(role='user', content='bye'))
    """
    if not is_transcript(transcript):
        raise DataError(
            "transcript: expected turns that begin with '\\n\\nHuman:' and '\\n\\nAssistant:', got "
            f"{transcript[:60]!r}. Give the messages themselves as a list of dicts."
        )
    _, *turns = _TURN.split(transcript)
    messages = [Message(_ROLES[name], text.strip()) for name, text in zip(turns[::2], turns[1::2], strict=True)]
    return tuple(messages if messages[-1].content else messages[:-1])


def prompt_chat(prompt: str, where: str) -> Chat:
    r"""The messages of a plain prompt: those of an HH transcript, or one message of the user with the whole text.

    Raises `DataError` for a prompt without text, and for a transcript that ends inside a turn of the assistant.

    Examples:
        >>> prompt_chat("2 + 2?", "pair 0")
        (Message(role='user', content='2 + 2?'),)
    """
    if not prompt.strip():
        raise DataError(f"{where}: its prompt is empty, which makes no message of the user. Give the pair a prompt.")
    if not is_transcript(prompt):
        return (Message("user", prompt),)
    chat = split_turns(prompt)
    if not chat or chat[-1].role != "user":
        said = chat[-1].content or "" if chat else ""
        raise DataError(
            f"{where}: its prompt ends inside a turn of the assistant ({said[:40]!r}): the response would be no "
            "message of its own. Move that text to the responses."
        )
    return chat


# -- rendering ---------------------------------------------------------------------------------------------------------


def render(tokenizer: Any, chat: Chat, response: str | Chat | None = None, *, tools: str | None = None) -> RenderedText:
    """The text of a chat by the tokenizer's template, with the messages of `response` behind it if given.

    A response that is a text is one message of the assistant. The response starts where the rendered text leaves the
    prompt's own rendering, which ends in the generation prompt if the assistant speaks next. `tools` is JSON text.
    """
    if response is None:
        return RenderedText(_apply(tokenizer, chat, tools), 0, is_chat=True)
    answer = (Message("assistant", response),) if isinstance(response, str) else response
    full = _apply(tokenizer, (*chat, *answer), tools)
    prompt = _apply(tokenizer, chat, tools, add_generation_prompt=answer[0].role == "assistant")
    shared = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(prompt, full, strict=False)))
    return RenderedText(full, shared, is_chat=True)


def _apply(tokenizer: Any, chat: Chat, tools: str | None, **options: bool) -> str:
    if getattr(tokenizer, "chat_template", None) is None:
        raise ModelError(
            "tokenizer: it has no chat template, so that messages have no text. Set tokenizer.chat_template to the one "
            "that the reward model was trained with, or pass plain texts."
        )
    messages = [message.to_dict() for message in chat]
    try:
        rendered = tokenizer.apply_chat_template(
            messages, tools=json.loads(tools) if tools else None, tokenize=False, **options
        )
    except Exception as error:  # a template is a program of the model's authors; it raises what it likes
        raise DataError(f"messages: the chat template refused them ({type(error).__name__}: {error}).") from error
    assert isinstance(rendered, str)
    return rendered
