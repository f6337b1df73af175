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
    """One message of a conversation.

    `role` is a role that the chat template knows: "system", "user", "assistant", "tool". `content` is the text; it is
    None where the data have null, as in messages that only call tools. `more` holds all other fields, which chat
    templates may read, as JSON text ("" if there are no others), so that messages are hashable. The order of its keys
    is kept, because templates print it.

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
        """The message as a dict, as chat templates expect it."""
        return {"role": self.role, "content": self.content, **(json.loads(self.more) if self.more else {})}

    def to_list(self) -> list[str | None]:
        """Role, content, and the other fields if there are any: the input of a digest."""
        return [self.role, self.content, *([self.more] if self.more else [])]


Chat = tuple[Message, ...]


@dataclass(frozen=True)
class RenderedText:
    """A text for the tokenizer, the index of its response's first character, and whether it has special tokens."""

    text: str
    response_start: int
    is_chat: bool


# -- reading -----------------------------------------------------------------------------------------------------------


def read_chat(messages: Any, where: str) -> Chat:
    """Read a list of messages, or a single message, as a `Chat`; raises `DataError` naming `where` and the message.

    A message is a dict with `role` and `content`, or ShareGPT's `from` and `value`. The content is text, or a list of
    text parts, which are joined. All other fields are kept, except those that are None.

    Examples:
        >>> read_chat([{"role": "user", "content": "hi"}], "record 0")
        (Message(role='user', content='hi'),)
        >>> read_chat({"from": "gpt", "value": "hello"}, "record 0")
        (Message(role='assistant', content='hello'),)
    """
    listed = [messages] if isinstance(messages, Mapping | Message) else messages
    chat = tuple(_read_message(message, f"{where}: message {number}") for number, message in enumerate(listed))
    if not chat:
        raise DataError(f"{where}: expected at least one message, got an empty list. Add a message.")
    return chat


def is_messages(value: object) -> bool:
    """Whether `value` looks like a list of messages, or a single one, rather than a text."""
    if isinstance(value, Mapping):
        return "role" in value or {"from", "value"} <= set(value)
    return isinstance(value, list | tuple | np.ndarray | Message)


def parse_messages(value: Any, where: str) -> Any:
    """Parse a text that is the JSON of a message or of a list of messages; return any other value unchanged.

    Tables such as CSV can hold messages only as JSON. Raises `DataError` naming `where` for messages printed by Python
    (with single quotes), which are not JSON.

    Examples:
        >>> parse_messages('[{"role": "user", "content": "hi"}]', "row 0")
        [{'role': 'user', 'content': 'hi'}]
        >>> parse_messages('{"answer": 4}', "row 0")
        '{"answer": 4}'
    """
    if not isinstance(value, str) or not (text := value.lstrip()).startswith(("[", "{")):
        return value
    try:
        parsed = json.loads(text)
    except (ValueError, RecursionError):
        if text.startswith(("[{'", "{'")) and any(name in text for name in ("'role':", "'from':")):
            raise DataError(
                f"{where}: expected messages as JSON, got messages printed by Python ({text[:40]!r}). Write them with "
                "json.dumps, or write the table as JSON lines or Parquet."
            ) from None
        return value
    messages = parsed if isinstance(parsed, list) else [parsed]
    are_messages = messages and all(isinstance(message, dict) and _has_message(set(message)) for message in messages)
    return parsed if are_messages else value


def _has_message(keys: set[str]) -> bool:
    return {"from", "value"} <= keys or ("role" in keys and bool(keys & {"content", "tool_calls", "function_call"}))


def json_text(value: Any, where: str) -> str:
    """The JSON text of fields for a chat template, in their order; raises `DataError` if JSON cannot hold them."""
    try:
        return json.dumps(value, ensure_ascii=False, allow_nan=False, default=_to_plain)
    except (TypeError, ValueError, RecursionError) as error:
        raise DataError(f"{where}: expected values that JSON can hold ({error}). Convert them to text.") from error


def _to_plain(value: Any) -> Any:
    # pandas and Arrow have arrays and NumPy scalars instead of lists and numbers.
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
            raise DataError(
                f"{where}: 'from' should be one of {list(_SHAREGPT_ROLES)}, got {speaker!r:.80}. Rename the speaker."
            )
        fields = {"role": _SHAREGPT_ROLES[speaker], "content": fields.pop("value"), **fields}
    calls_tools = bool(fields.get("tool_calls") or fields.get("function_call"))
    role, content = fields.pop("role", None), fields.pop("content", "" if calls_tools else None)
    if isinstance(content, list | tuple | np.ndarray):
        content = _joined(content, message, where)
    if not isinstance(role, str) or not (isinstance(content, str) or (content is None and calls_tools)):
        raise _no_message(message, where)
    return Message(role, content, json_text(fields, where) if fields else "")


def _joined(parts: Iterable[Any], message: Any, where: str) -> str:
    """The text of content that comes in parts; raises `DataError` for a part that is not text."""
    for part in parts:
        if not isinstance(part, Mapping):
            raise _no_message(message, where)
        if part.get("type") != "text" or not isinstance(part.get("text"), str):
            raise DataError(
                f"{where}: its content has a part of type {part.get('type')!r:.40}. Only text can be scored: remove "
                "such pairs."
            )
    return "".join(part["text"] for part in parts)


def _no_message(message: Any, where: str) -> DataError:
    return DataError(
        f"{where} should be a dict with text under 'role' and 'content' (or 'from' and 'value'), got "
        f"{str(message)[:80]}. Only messages of plain text can be scored."
    )


# -- plain prompts -----------------------------------------------------------------------------------------------------


def prompt_text(prompt: str | Chat) -> str:
    """One text per prompt, for sorting and hashing; for a chat it is not the text that a model reads."""
    if isinstance(prompt, str):
        return prompt
    return "".join(f"<|{message.role}|>{message.content}{message.more}" for message in prompt)


def n_characters(response: str | Chat) -> int:
    """The number of characters of a response, over all its messages."""
    return len(response) if isinstance(response, str) else sum(len(message.content or "") for message in response)


def is_transcript(text: str) -> bool:
    r"""Whether a text begins with a turn of an HH transcript, `\n\nHuman:` or `\n\nAssistant:`."""
    return _FIRST_TURN.match(text) is not None


def split_turns(transcript: str) -> Chat:
    r"""Split a plain transcript, whose turns begin with `\n\nHuman:` and `\n\nAssistant:`, into messages.

    An empty last turn, where the response would go, is dropped. Raises `DataError` for any other text.

    Examples:
        >>> split_turns("\n\nHuman: hi\n\nAssistant: hello\n\nHuman: bye\n\nAssistant:")[1:]
        (Message(role='assistant', content='hello'), Message(role='user', content='bye'))
    """
    if not is_transcript(transcript):
        raise DataError(
            "transcript: expected turns that begin with '\\n\\nHuman:' and '\\n\\nAssistant:', got "
            f"{transcript[:60]!r}. Pass the messages as a list of dicts."
        )
    _, *turns = _TURN.split(transcript)
    messages = [Message(_ROLES[name], text.strip()) for name, text in zip(turns[::2], turns[1::2], strict=True)]
    return tuple(messages if messages[-1].content else messages[:-1])


def prompt_chat(prompt: str, where: str) -> Chat:
    r"""Turn a plain prompt into messages: those of an HH transcript, or one user message with the whole text.

    Raises `DataError` for a prompt without text, and for a transcript that ends inside a turn of the assistant.

    Examples:
        >>> prompt_chat("2 + 2?", "pair 0")
        (Message(role='user', content='2 + 2?'),)
    """
    if not prompt.strip():
        raise DataError(f"{where}: its prompt is empty, so it cannot become a user message. Give the pair a prompt.")
    if not is_transcript(prompt):
        return (Message("user", prompt),)
    chat = split_turns(prompt)
    if not chat or chat[-1].role != "user":
        text = chat[-1].content or "" if chat else ""
        raise DataError(
            f"{where}: its prompt ends inside a turn of the assistant ({text[:40]!r}), so the response would not be a "
            "message by itself. Move that text to the responses."
        )
    return chat


# -- rendering ---------------------------------------------------------------------------------------------------------


def render(tokenizer: Any, chat: Chat, response: str | Chat | None = None, *, tools: str | None = None) -> RenderedText:
    """Render a chat, followed by the messages of `response` if given, with the tokenizer's chat template.

    A response that is a text is one message of the assistant. The response starts where the whole rendering first
    differs from the rendering of the prompt alone, which ends in the generation prompt if the assistant speaks next.
    `tools` is JSON text.
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
            "tokenizer: it has no chat template to render messages with. Set tokenizer.chat_template to the template "
            "that the reward model was trained with, or pass plain texts."
        )
    messages = [message.to_dict() for message in chat]
    try:
        rendered = tokenizer.apply_chat_template(
            messages, tools=json.loads(tools) if tools else None, tokenize=False, **options
        )
    except Exception as error:  # a template is a program by the model's authors and may raise anything
        raise DataError(
            f"messages: the chat template refused them ({type(error).__name__}: {error}). Correct their roles and "
            "order, or the template."
        ) from error
    assert isinstance(rendered, str)
    return rendered
