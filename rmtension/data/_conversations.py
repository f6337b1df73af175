"""Where the prompt ends in a preference pair of conversations, with or without a separate prompt."""

from collections.abc import Iterable
from itertools import takewhile
from typing import Any

from rmtension.data._chat import Chat, Message, is_transcript, prompt_chat, split_turns
from rmtension.errors import DataError


def shared_messages(chosen: Chat, rejected: Chat) -> Chat:
    """The messages that two conversations share at their beginning; at least one message is left for each response."""
    most = min(len(chosen), len(rejected)) - 1
    equal = takewhile(lambda both: both[0] == both[1], zip(chosen[:most], rejected, strict=False))
    return tuple(message for message, _ in equal)


def after_prompt(prompt: str | Chat, chosen: Any, rejected: Any, where: str) -> tuple[Chat, Any, Any]:
    """Prompt and responses of a row with a prompt and with messages in some field.

    Raises `DataError` naming `where` for whole conversations that do not contain the prompt, and for a response that
    begins with the user after a prompt that ends with the user.
    """
    if isinstance(chosen, tuple) and isinstance(rejected, tuple) and _are_whole(prompt, chosen, rejected):
        shared = shared_messages(chosen, rejected)
        require_contained(shared, prompt, where)
        return shared, chosen[len(shared) :], rejected[len(shared) :]
    messages = prompt_chat(prompt, where) if isinstance(prompt, str) else prompt
    for name, response in (("chosen", chosen), ("rejected", rejected)):
        if isinstance(response, tuple) and messages[-1].role == "user" and response[0].role in ("user", "system"):
            raise DataError(
                f"{where}: field {name!r} should be one or more messages that begin with the assistant, or 'chosen' "
                f"and 'rejected' should both be whole conversations; got the roles "
                f"{[message.role for message in response]} after a prompt that ends with the user. Correct the row, "
                'or load with on_invalid="skip".'
            )
        if isinstance(response, str) and is_transcript(response):
            raise DataError(
                f"{where}: field {name!r} is a whole transcript of 'Human:' and 'Assistant:' turns after a 'prompt' "
                "of messages, so the question would be read twice. Read the transcripts alone: columns={'prompt': "
                "None}."
            )
    return messages, chosen, rejected


def _are_whole(prompt: str | Chat, chosen: Chat, rejected: Chat) -> bool:
    """Whether both responses repeat the prompt: they begin with it, or with the same message.

    If that message is the assistant's, the messages that the responses share must also contain the prompt.
    """
    if not isinstance(prompt, str) and all(_begins_with(side, prompt) for side in (chosen, rejected)):
        return True
    return chosen[0] == rejected[0] and (
        chosen[0].role != "assistant" or _contains(shared_messages(chosen, rejected), prompt)
    )


def _begins_with(chat: Chat, prompt: Chat) -> bool:
    return len(chat) > len(prompt) and _turns(chat[: len(prompt)]) == _turns(prompt)


def require_contained(shared: Chat, prompt: str | Chat, where: str) -> None:
    """Raise `DataError` unless a prompt is a part of the messages that two conversations share."""
    if not _contains(shared, prompt):
        text = prompt if isinstance(prompt, str) else " ".join(message.content or "" for message in prompt)
        raise DataError(
            f"{where}: field 'prompt' ({text[:60]!r}) is not in the turns that 'chosen' and 'rejected' share. Correct "
            "it, or read the conversations alone: columns={'prompt': None}."
        )


def _contains(shared: Chat, prompt: str | Chat) -> bool:
    """Whether a prompt is a part of the messages that conversations share, ignoring differences in white space."""
    if isinstance(prompt, str):
        parts = split_turns(prompt) if is_transcript(prompt) else (Message("user", prompt),)
        whole = _words(message.content for message in shared)
        return all(_words([part.content]) in whole for part in parts)
    turns, wanted = _turns(shared), _turns(prompt)
    return any(turns[start : start + len(wanted)] == wanted for start in range(len(turns) - len(wanted) + 1))


def _turns(chat: Chat) -> list[tuple[str, str | None]]:
    return [(message.role, message.content) for message in chat]


def _words(texts: Iterable[str | None]) -> str:
    return " ".join(word for text in texts for word in (text or "").split())
