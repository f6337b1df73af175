"""Encodes prompt and response as the two segments of an encoder: [CLS] prompt [SEP] response [SEP]."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from rmtension.data._encoding import AT_A_TIME, EncodedPairs, EncodedText, encode_pairs, key_of, require_tokenizer
from rmtension.data._pair import PreferencePair
from rmtension.data._pairs import PreferencePairs
from rmtension.errors import DataError, ModelError


@dataclass(frozen=True)
class _Segments:
    """The ids of one text, in the order of its parts; `has_types` says whether its second segment has the type 1."""

    lead: list[int]
    prompt: list[int]
    separator: list[int]
    response: list[int]
    tail: list[int]
    has_types: bool

    @property
    def n_fixed(self) -> int:
        """The tokens that are never cut."""
        return len(self.lead) + len(self.separator) + len(self.tail)


def pair_encoder(*, two_segments: bool) -> Callable[..., EncodedPairs]:
    """The function that encodes the pairs of a model: `encode_segments` or `encode_pairs`."""
    return encode_segments if two_segments else encode_pairs


def encode_segments(
    tokenizer: Any, pairs: PreferencePairs, *, max_length: int, truncate_response: bool = False
) -> EncodedPairs:
    """Encode both texts of every pair as `tokenizer(prompt, response)` does, with the separators of the tokenizer.

    The texts are cut as in `encode_pairs`, which joins prompt and response into one text; special tokens are never cut.
    If the tokenizer gives the second segment the token type 1, the model gets it. Raises `DataError` for a chat, which
    has no two segments, and `ModelError` for a tokenizer that puts nothing between two texts.
    """
    require_tokenizer(tokenizer)
    chosen: list[EncodedText] = []
    rejected: list[EncodedText] = []
    n_prompts_cut = n_responses_cut = 0
    for pair, both in zip(pairs, _both_sides(tokenizer, pairs), strict=True):
        longest = max(text.n_fixed + len(text.response) for text in both)
        if longest > max_length and not truncate_response:
            raise DataError(
                f"pair {pair.id!r}: a response has {longest} tokens, the context holds {max_length}. Remove the pair, "
                "or pass truncate_response=True to cut the response's end."
            )
        fixed = max(text.n_fixed for text in both)
        if fixed >= max_length:
            raise DataError(
                f"max_length: expected more than {fixed}, the number of special tokens that the tokenizer puts around "
                f"two texts, got {max_length}. No token of the text would be left: raise max_length."
            )
        room = max(0, max_length - longest)
        n_responses_cut += longest > max_length
        n_prompts_cut += any(len(text.prompt) > room for text in both)
        for side, text in zip((chosen, rejected), both, strict=True):
            before = text.lead + text.prompt[max(0, len(text.prompt) - room) :] + text.separator
            after = text.response[: max_length - text.n_fixed] + text.tail
            key = key_of(str(pair.prompt) + (pair.tools or ""))
            side.append(EncodedText((*before, *after), len(before), key, text.has_types))
    return EncodedPairs(tuple(chosen), tuple(rejected), n_prompts_cut, n_responses_cut)


def _both_sides(tokenizer: Any, pairs: PreferencePairs) -> Iterator[tuple[_Segments, _Segments]]:
    for start in range(0, len(pairs), AT_A_TIME):
        block = pairs[start : start + AT_A_TIME]
        sides = [(pair, _plain(pair, side)) for pair in block for side in ("chosen", "rejected")]
        encoding = _tokens(tokenizer, [pair.prompt for pair, _ in sides], [response for _, response in sides])
        texts = [
            _segments(encoding, number, f"pair {pair.id!r}: {response!r:.40}")
            for number, (pair, response) in enumerate(sides)
        ]
        yield from zip(texts[::2], texts[1::2], strict=True)


def _plain(pair: PreferencePair, side: str) -> str:
    response = getattr(pair, side)
    if not isinstance(pair.prompt, str) or not isinstance(response, str):
        raise DataError(
            f"pair {pair.id!r}: two_segments needs a plain prompt and a plain response, and its prompt is a chat. Load "
            "pairs with plain prompts, or open the model without two_segments."
        )
    return response


def _tokens(tokenizer: Any, prompts: Sequence[Any], responses: Sequence[str]) -> Any:
    try:
        return tokenizer(list(prompts), list(responses), return_token_type_ids=True, verbose=False)
    except Exception as error:  # tokenizers raises a bare Exception where a vocabulary has no unknown token
        raise DataError(
            f"pairs: the tokenizer cannot encode prompts and responses as two segments ({error}). Leave out texts with "
            "characters that it lacks, or give the tokenizer an unknown token."
        ) from error


def _segments(encoding: Any, number: int, where: str) -> _Segments:
    ids, types = list(encoding["input_ids"][number]), list(encoding["token_type_ids"][number])
    owners = encoding.sequence_ids(number)
    if 1 not in owners:
        raise DataError(f"{where} has no token. Give the pair a response, or remove it.")
    start = owners.index(1)
    end = len(owners) - owners[::-1].index(1)
    # Without a prompt, all special tokens before the response come first.
    first = owners.index(0) if 0 in owners else start
    last = start - owners[start - 1 :: -1].index(0) if 0 in owners else start
    if last == start and 0 in owners:
        raise ModelError(
            "tokenizer: expected one that separates two segments, as encoders' tokenizers do, but it puts no token "
            "between prompt and response. Open the model without two_segments."
        )
    if any(types[:start]) or len(set(types[start:])) > 1:
        raise ModelError(
            f"tokenizer: expected the token type 0 up to the separator and one type behind it, got {types[:12]}. Open "
            "the model without two_segments."
        )
    return _Segments(ids[:first], ids[first:last], ids[last:start], ids[start:end], ids[end:], bool(types[start]))
