"""Encodes plain texts and chats as token ids: special tokens, where the response begins, truncation."""

import hashlib
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from weakref import WeakSet

from rmtension.data._chat import Chat, Message, RenderedText, is_messages, prompt_text, read_chat, render
from rmtension.data._pair import PreferencePair
from rmtension.data._pairs import PreferencePairs
from rmtension.errors import DataError, ModelError, OptionError, RMTensionWarning

# Texts per call of the tokenizer: with offsets, its output takes ten times the memory of the ids.
AT_A_TIME = 64
# Tokenizers for which the warning about plain prompts was already shown.
_WARNED: WeakSet[Any] = WeakSet()
# A text for `RewardHead.score`: the text itself, or the messages of a chat.
TextOrChat = str | Sequence[Mapping[str, Any]] | Chat


@dataclass(frozen=True)
class EncodedText:
    """Token ids of one text, the index of its first response token, and a hash of its prompt (`key`).

    `has_types` says that the response has the token type 1, as the second segment of an encoder, and the prompt 0.
    """

    ids: tuple[int, ...]
    response_start: int
    key: int
    has_types: bool = False

    def __len__(self) -> int:
        return len(self.ids)


@dataclass(frozen=True)
class EncodedPairs:
    """The two texts of every pair, and how many pairs lost tokens of the prompt or of a response."""

    chosen: tuple[EncodedText, ...]
    rejected: tuple[EncodedText, ...]
    n_prompts_cut: int
    n_responses_cut: int

    def __len__(self) -> int:
        return len(self.chosen)

    @property
    def n_tokens(self) -> int:
        """Tokens in all texts."""
        return sum(map(len, self.chosen)) + sum(map(len, self.rejected))

    @property
    def n_response_tokens(self) -> int:
        """Tokens in all responses."""
        return sum(len(text) - text.response_start for text in (*self.chosen, *self.rejected))


def encode_texts(tokenizer: Any, texts: Sequence[Any], *, max_length: int, truncate: bool = False) -> list[EncodedText]:
    """Encode whole texts with the tokenizer's special tokens, and chats with those of their template.

    A text longer than `max_length` tokens raises `DataError`; `truncate=True` cuts it from the left instead, because
    the reward is read at the end. The whole text counts as response.
    """
    encoded = []
    rendered = [_render(tokenizer, text, f"texts: text {number}") for number, text in enumerate(texts)]
    parts = _parts(tokenizer, rendered)
    for number, (text, (lead, _, response)) in enumerate(zip(rendered, parts, strict=True)):
        length = len(lead) + len(response)
        if length > max_length and not truncate:
            raise DataError(
                f"texts: text {number} has {length} tokens, the context holds {max_length}. Score it as a "
                "PreferencePair so that only its prompt is cut, or pass truncate=True to drop its first tokens."
            )
        _require_room(lead, max_length)
        kept = response[max(0, length - max_length) :]
        encoded.append(EncodedText(tuple(lead + kept), len(lead), key_of(text.text)))
    return encoded


def encode_pairs(
    tokenizer: Any, pairs: PreferencePairs, *, max_length: int, truncate_response: bool = False
) -> EncodedPairs:
    """Encode both texts of every pair: `join_prompt(prompt, response)`, or the chat by the tokenizer's template.

    Plain prompts for a tokenizer with a chat template give one warning per tokenizer.

    A token belongs to the response when it ends after the prompt's last character. A pair that does not fit loses
    prompt tokens from the left, equally on both sides, so that both responses still follow the same prompt. A
    response that does not fit by itself raises `DataError`; `truncate_response=True` cuts its end instead. Both kinds
    of cut are counted.

    Examples:
        >>> encoded = encode_pairs(head.tokenizer, pairs["helpful"], max_length=64)
        >>> len(encoded.chosen), encoded.n_prompts_cut
        (24, 0)
    """
    require_tokenizer(tokenizer)
    _warn_of_texts(tokenizer, pairs)
    rendered = [_render_side(tokenizer, pair, side) for pair in pairs for side in ("chosen", "rejected")]
    parts = _parts(
        tokenizer,
        rendered,
        lambda number: f"pair {pairs[number // 2].id!r}: its {('chosen', 'rejected')[number % 2]} text",
    )
    chosen: list[EncodedText] = []
    rejected: list[EncodedText] = []
    n_prompts_cut = n_responses_cut = 0
    for pair, sides in zip(pairs, zip(parts[::2], parts[1::2], strict=True), strict=True):
        longest = max(len(lead) + len(response) for lead, _, response in sides)
        if longest > max_length and not truncate_response:
            raise DataError(
                f"pair {pair.id!r}: a response has {longest} tokens, the context holds {max_length}. Remove the pair, "
                "or pass truncate_response=True to cut the response's end."
            )
        _require_room(sides[0][0], max_length)
        room = max(0, max_length - longest)
        n_responses_cut += longest > max_length
        n_prompts_cut += any(len(prompt) > room for _, prompt, _ in sides)
        for side, (lead, prompt, response) in zip((chosen, rejected), sides, strict=True):
            before = lead + prompt[max(0, len(prompt) - room) :]
            after = response[: max_length - len(lead)]
            side.append(
                EncodedText(tuple(before + after), len(before), key_of(prompt_text(pair.prompt) + (pair.tools or "")))
            )
    return EncodedPairs(tuple(chosen), tuple(rejected), n_prompts_cut, n_responses_cut)


def _render_side(tokenizer: Any, pair: PreferencePair, side: str) -> RenderedText:
    if isinstance(pair.prompt, str):
        return RenderedText(pair.text(side), len(pair.prompt), is_chat=False)
    return render(tokenizer, pair.prompt, getattr(pair, side), tools=pair.tools)


def _warn_of_texts(tokenizer: Any, pairs: PreferencePairs) -> None:
    """Warn, once per tokenizer with a chat template, that plain prompts are read without it."""
    if getattr(tokenizer, "chat_template", None) is None or tokenizer in _WARNED:
        return
    plain = next((pair for pair in pairs if not pair.is_chat), None)
    if plain is not None:
        _WARNED.add(tokenizer)
        # Without a count, because the pairs may be a part of those of the caller.
        warnings.warn(
            f"pairs: this model's tokenizer has a chat template, but the prompt of pair {plain.id!r} is a plain text. "
            "Such pairs are read as prompt and response, without the template. If the model was trained on chats, "
            "load them with chat=True (PreferencePairs.read(path, chat=True); --chat on the command line), or use "
            "pairs.as_chat(). This warning is shown once per model.",
            RMTensionWarning,
            stacklevel=2,
        )


def _require_room(lead: list[int], max_length: int) -> None:
    if len(lead) >= max_length:
        raise DataError(
            f"max_length: expected more than {len(lead)}, the number of special tokens that the tokenizer puts before "
            f"every text, got {max_length}. No token of the text would be left: raise max_length."
        )


def _render(tokenizer: Any, text: Any, where: str) -> RenderedText:
    if isinstance(text, str):
        return RenderedText(text, 0, is_chat=False)
    if isinstance(text, Mapping | Message) or not is_messages(text):
        raise OptionError(
            f"{where}: expected a text or a list of messages, got {type(text).__name__}. "
            "Score a single chat with score([messages])."
        )
    require_tokenizer(tokenizer)
    return render(tokenizer, read_chat(text, where))


def _parts(
    tokenizer: Any, texts: Sequence[RenderedText], name_of: Callable[[int], str] = "texts: text {}".format
) -> list[tuple[list[int], list[int], list[int]]]:
    """Every text's ids as (leading special tokens, prompt, response); errors call the texts as `name_of` does."""
    require_tokenizer(tokenizer)
    parts: list[tuple[list[int], list[int], list[int]]] = [([], [], [])] * len(texts)
    # A chat template writes all special tokens itself.
    for is_chat in (False, True):
        numbers = [number for number, text in enumerate(texts) if text.is_chat == is_chat]
        for start in range(0, len(numbers), AT_A_TIME):
            block = numbers[start : start + AT_A_TIME]
            encoded = _encoded(tokenizer, [texts[number] for number in block], is_chat)
            for number, part in zip(block, encoded, strict=True):
                if not part[2]:
                    text = texts[number]
                    why = ": it is empty. Remove it"
                    if text.text[text.response_start :].strip():
                        why = ": nothing of it is in the tokenizer's vocabulary. Remove it"
                    elif text.response_start:
                        why = " after its prompt. Give it a response"
                    raise DataError(f"{name_of(number)} has no token{why}.")
                parts[number] = part
    return parts


def _encoded(
    tokenizer: Any, texts: Sequence[RenderedText], is_chat: bool
) -> Iterator[tuple[list[int], list[int], list[int]]]:
    encoding = _tokens(tokenizer, [text.text for text in texts], is_chat)
    for row, text in enumerate(texts):
        ids = list(encoding["input_ids"][row])
        added = list(encoding["special_tokens_mask"][row])
        ends = [end for _, end in encoding["offset_mapping"][row]]
        if is_chat:
            added = [int(ids[0] == tokenizer.bos_token_id), *[0] * (len(ids) - 1)] if ids else []
        elif added[:1] == [1] and ids[:2] == [tokenizer.bos_token_id] * 2:
            # The text already begins with the BOS token that the tokenizer adds: keep only one.
            del ids[1], added[1], ends[1]
        lead = next((i for i, flag in enumerate(added) if not flag), len(ids))
        # Trailing special tokens have offset (0, 0); they come after the response has begun.
        start = next((i for i in range(lead, len(ids)) if ends[i] > text.response_start), len(ids))
        yield ids[:lead], ids[lead:start], ids[start:]


def _tokens(tokenizer: Any, texts: list[str], is_chat: bool) -> Any:
    try:
        # verbose=False: length is checked by the callers, against the model's context.
        return tokenizer(
            texts,
            add_special_tokens=not is_chat,
            return_offsets_mapping=True,
            return_special_tokens_mask=True,
            verbose=False,
        )
    except Exception as error:  # tokenizers raises a bare Exception where a vocabulary has no unknown token
        if len(texts) > 1:
            for text in texts:
                _tokens(tokenizer, [text], is_chat)
        raise DataError(
            f"texts: the tokenizer cannot encode {texts[0]!r:.60} ({error}). Leave the text out, or give the tokenizer "
            "an unknown token."
        ) from error


def require_tokenizer(tokenizer: Any) -> None:
    """Raise `ModelError` unless there is a tokenizer that maps tokens to characters."""
    if tokenizer is None:
        raise ModelError(
            "tokenizer: this reward model has no tokenizer. Pass tokenizer=... to RewardHead to score texts."
        )
    if not getattr(tokenizer, "is_fast", False):
        raise ModelError(
            f"tokenizer: expected a fast tokenizer, got {type(tokenizer).__name__}, which cannot map tokens to "
            "characters; this is needed to locate the response. Load the fast tokenizer of this model "
            "(use_fast=True)."
        )


def key_of(text: str) -> int:
    """The hash of a prompt."""
    return int.from_bytes(hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest()) >> 1
