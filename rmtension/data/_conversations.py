"""Where the prompt of a preference pair ends in conversations, with a prompt beside them or without."""

from collections.abc import Iterable
from itertools import takewhile
from typing import Any

from rmtension.data._chat import Chat, Message, is_transcript, prompt_chat, split_turns
from rmtension.errors import DataError


def shared_messages(chosen: Chat, rejected: Chat) -> Chat:
    """The messages that two conversations begin with, less one where nothing would be left for a response."""
    most = min(len(chosen), len(rejected)) - 1
    return tuple(one for one, _ in takewhile(lambda two: two[0] == two[1], zip(chosen[:most], rejected, strict=False)))


def after_prompt(prompt: str | Chat, chosen: Any, rejected: Any, where: str) -> tuple[Chat, Any, Any]:
    """Prompt and responses of a row with a prompt and with messages in some field.

    Raises `DataError` naming `where` for a prompt that whole conversations do not contain, and for a response that
    goes on with the user after a prompt that ends with the user.
    """
    if isinstance(chosen, tuple) and isinstance(rejected, tuple) and _are_whole(prompt, chosen, rejected):
        shared = shared_messages(chosen, rejected)
        require_contained(shared, prompt, where)
        return shared, chosen[len(shared) :], rejected[len(shared) :]
    messages = prompt_chat(prompt, where) if isinstance(prompt, str) else prompt
    for name, response in (("chosen", chosen), ("rejected", rejected)):
        if isinstance(response, tuple) and messages[-1].role == "user" and response[0].role in ("user", "system"):
            raise DataError(
                f"{where}: field {name!r} should be one message of the assistant or several after the field 'prompt', "
                f"or both whole conversations, got the roles {[message.role for message in response]} behind a "
                "message of the user."
            )
        if isinstance(response, str) and is_transcript(response):
            raise DataError(
                f"{where}: field {name!r} is a whole transcript of 'Human:' and 'Assistant:' turns behind a 'prompt' "
                "of messages, so the question would be read twice. Read the transcripts alone: columns={'prompt': "
                "None}."
            )
    return messages, chosen, rejected


def _are_whole(prompt: str | Chat, chosen: Chat, rejected: Chat) -> bool:
    """Whether the responses have the prompt in front: both begin with it, or both with one message of a user."""
    if not isinstance(prompt, str) and all(_begins(side, prompt) for side in (chosen, rejected)):
        return True
    return chosen[0] == rejected[0] and (
        chosen[0].role != "assistant" or _contains(shared_messages(chosen, rejected), prompt)
    )


def _begins(chat: Chat, prompt: Chat) -> bool:
    return len(chat) > len(prompt) and _said(chat[: len(prompt)]) == _said(prompt)


def require_contained(shared: Chat, prompt: str | Chat, where: str) -> None:
    """Raise `DataError` unless a prompt is a part of the messages that two conversations share."""
    if not _contains(shared, prompt):
        said = prompt if isinstance(prompt, str) else " ".join(message.content or "" for message in prompt)
        raise DataError(
            f"{where}: field 'prompt' ({said[:60]!r}) is not in the turns that 'chosen' and 'rejected' share. Correct "
            "it, or read the conversations alone: columns={'prompt': None}."
        )


def _contains(shared: Chat, prompt: str | Chat) -> bool:
    """Whether a prompt is a part of the messages that conversations share, whatever its white space."""
    if isinstance(prompt, str):
        parts = split_turns(prompt) if is_transcript(prompt) else (Message("user", prompt),)
        whole = _words(message.content for message in shared)
        return all(_words([part.content]) in whole for part in parts)
    said, wanted = _said(shared), _said(prompt)
    return any(said[start : start + len(wanted)] == wanted for start in range(len(said) - len(wanted) + 1))


def _said(chat: Chat) -> list[tuple[str, str | None]]:
    return [(message.role, message.content) for message in chat]


def _words(texts: Iterable[str | None]) -> str:
    return " ".join(word for text in texts for word in (text or "").split())
