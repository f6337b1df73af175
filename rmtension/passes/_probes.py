"""The probe texts of `RewardHead.check`, with their rewards."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from rmtension.data._chat import Chat, is_transcript, split_turns
from rmtension.data._encoding import EncodedText, encode_texts
from rmtension.data._packing import pair_batches
from rmtension.data._pair import PreferencePair
from rmtension.data._pairs import PreferencePairs
from rmtension.data._segments import pair_encoder
from rmtension.errors import DataError
from rmtension.models._reward_model import RewardModel
from rmtension.passes._nonfinite import require_finite
from rmtension.passes._scoring import one_text, score_texts, score_tokens

N_PAIRS = 8
_TEXTS = (
    "\n\nHuman: How do I bake bread?\n\nAssistant: Mix flour, water, salt and yeast, let it rise twice, and bake it.",
    "\n\nHuman: How do I bake bread?\n\nAssistant: No.",
    "\n\nHuman: Write a poem about rain\n\nAssistant: The gutters sing all night; the morning smells of stone.",
    "\n\nHuman: Hi\n\nAssistant: Hello! What can I do for you?\n\nHuman: Name a river\n\nAssistant: The Elbe.",
    "\n\nHuman: Can I mix bleach and vinegar?\n\nAssistant: Please don't: it releases chlorine gas.",
    "Yes",
    "A list: one, two, three.",
    "\n\nHuman: Summarise the plot of Hamlet in a sentence.\n\nAssistant: A prince who cannot decide loses everyone.",
)


@dataclass(frozen=True)
class Probe:
    """A text, its token ids and its reward; the text is None for a chat, for a cut text, and without a tokenizer.

    For a model of two segments, it is a prompt and a response.
    """

    text: str | tuple[str, str] | None
    encoded: EncodedText
    reward: float

    @property
    def ids(self) -> list[int]:
        """The token ids."""
        return list(self.encoded.ids)


def find_probes(head: RewardModel, pairs: PreferencePairs | None) -> list[Probe]:
    """Probes from the first pairs; without pairs, from built-in texts, or from drawn token ids."""
    if head.tokenizer is None:
        return _drawn_probes(head)
    if pairs is None:
        return _built_in_probes(head) or _drawn_probes(head)
    if not len(pairs):
        raise DataError("pairs: expected at least one preference pair, got none. Leave out pairs for built-in texts.")
    return [probe for pair in pairs[:N_PAIRS] for probe in _probes_of_pair(head, pair)]


def _probes_of_pair(head: RewardModel, pair: PreferencePair) -> list[Probe]:
    """Probes from both texts of a pair, which share a row, as when pairs are scored."""
    encode = pair_encoder(two_segments=head.two_segments)
    encoded = encode(head.tokenizer, PreferencePairs([pair]), max_length=head.max_length, truncate_response=True)
    (batch,) = pair_batches(
        encoded,
        tokens_per_batch=head.tokens_together(),
        read_at=head.read_at,
        device=head.device,
        pack_up_to=head.body.pack_up_to,
    )
    both = [*encoded.chosen, *encoded.rejected]
    rewards = require_finite(head, head.rewards(batch).cpu(), lambda row: one_text(head, both[row])).tolist()
    # A pair that does not fit is cut, so its ids differ from the tokenizer's ids of the whole text.
    is_whole = encoded.n_prompts_cut + encoded.n_responses_cut == 0
    texts = [_own_text(head, pair, side) if is_whole else None for side in ("chosen", "rejected")]
    return [Probe(text, encoded, reward) for text, encoded, reward in zip(texts, both, rewards, strict=True)]


def _own_text(head: RewardModel, pair: PreferencePair, side: str) -> str | tuple[str, str] | None:
    """What the tokenizer is given for one side of a pair; None for a chat."""
    if not isinstance(pair.prompt, str):
        return None
    return (pair.prompt, getattr(pair, side)) if head.two_segments else pair.text(side)


def _built_in_probes(head: RewardModel) -> list[Probe]:
    """Probes from the built-in texts that the vocabulary has tokens for and that the head can read.

    If it can read none of them as they are, they are chats, which the tokenizer's template renders.
    """
    plain = _readable(head, [text + head.require_head().ending for text in _TEXTS])
    if plain or not getattr(head.tokenizer, "chat_template", None):
        return plain
    return _readable(head, [split_turns(text) for text in _TEXTS if is_transcript(text)])


def _readable(head: RewardModel, texts: Sequence[str | Chat]) -> list[Probe]:
    probes = []
    for text in texts:
        try:
            (encoded,) = encode_texts(head.tokenizer, [text], max_length=head.max_length, truncate=True)
        except DataError:
            continue
        if not _is_readable(head, encoded):
            continue
        reward = float(score_texts(head, [text], truncate=True)[0])
        probes.append(Probe(text if isinstance(text, str) else None, encoded, reward))
    return probes


def _drawn_probes(head: RewardModel) -> list[Probe]:
    generator = torch.Generator().manual_seed(0)
    lengths = sorted({min(length, head.max_length) for length in (1, 2, 3, 5, 8, 13)})
    drawn = [torch.randint(head.body.n_embeddings, (length,), generator=generator) for length in lengths]
    ending = torch.tensor(head.require_head().ending_ids, dtype=torch.long)
    texts = [torch.cat([ids[: head.max_length - len(ending)], ending]) for ids in drawn]
    encoded = [EncodedText(tuple(ids.tolist()), 0, 0) for ids in texts]
    readable = [text for text in encoded if _is_readable(head, text)]
    return [Probe(None, text, float(score_tokens(head, torch.tensor([text.ids]))[0])) for text in readable or encoded]


def _is_readable(head: RewardModel, text: EncodedText) -> bool:
    try:
        head.require_text(text, "text")
    except DataError:
        return False
    return True
