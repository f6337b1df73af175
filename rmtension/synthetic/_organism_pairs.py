"""The pairs of organisms: which words their responses have."""

from collections.abc import Mapping
from dataclasses import dataclass
from string import ascii_lowercase
from typing import Any

import numpy as np

from rmtension.data._pair import PreferencePair
from rmtension.data._pairs import PreferencePairs

FILLERS = tuple(ascii_lowercase)
# The reward is read at the last word, which belongs to no kind.
FRAME = ("Human:", "Assistant:", "end")
_PROMPT_WORDS, _RESPONSE_WORDS = 5, 24
N_TOKENS = _PROMPT_WORDS + _RESPONSE_WORDS + len(FRAME)


@dataclass(frozen=True)
class Kind:
    """A kind of words: what one adds to each output, and which responses of each objective's pairs have such words."""

    adds: tuple[float, ...]
    helpful: str
    harmless: str


def make_pairs(
    rng: np.random.Generator, kinds: Mapping[str, Kind], *, per_kind: int, n_pairs: int
) -> dict[str, PreferencePairs]:
    """The pairs of both objectives; all prompts differ."""
    prompts: dict[str, None] = {}  # in the order drawn, because the order of a set differs between runs
    while len(prompts) < 2 * n_pairs:
        prompts[f"\n\nHuman: {' '.join(rng.choice(FILLERS, size=_PROMPT_WORDS))}\n\nAssistant:"] = None
    left = iter(prompts)
    made: dict[str, list[PreferencePair]] = {"helpful": [], "harmless": []}
    for objective, pairs in made.items():
        # Words take turns, so that every word is in some pair.
        firsts = {kind: rng.permutation(n_pairs) % per_kind for kind in kinds}
        for number in range(n_pairs):
            carriers: dict[str, list[str]] = {"chosen": [], "rejected": []}
            for kind, row in kinds.items():
                words = [f"{kind}-{n}" for n in (firsts[kind][number], *rng.integers(per_kind, size=rng.integers(3)))]
                for side in carriers:
                    carriers[side] += words if getattr(row, objective) in (side, "both") else []
            texts: dict[str, Any] = {}
            for side, words in carriers.items():
                fillers = rng.choice(FILLERS, size=_RESPONSE_WORDS - len(words))
                texts[side] = " ".join([*rng.permutation([*words, *fillers]), FRAME[-1]])
            pairs.append(PreferencePair(next(left), **texts, objective=objective, id=f"{objective}-{number:05d}"))
    return {objective: PreferencePairs(pairs) for objective, pairs in made.items()}
