"""A sequence of preference pairs: its validation, its prompts and items, its digests, and the choice of pairs."""

import hashlib
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar, overload

import numpy as np
import pandas as pd

from rmtension.data._chat import Chat, prompt_text
from rmtension.data._pair import PreferencePair, require_responses
from rmtension.errors import DataError, OptionError

# The class whose method is called: `PreferencePairs` for users.
Pairs = TypeVar("Pairs", bound="PairSequence")


class PairSequence(Sequence[PreferencePair]):
    """The base class of `PreferencePairs`: an immutable sequence of pairs that knows no source and no format."""

    def __init__(
        self, pairs: Iterable[PreferencePair], skipped: Mapping[str, int] | None = None, *, first: int = 0
    ) -> None:
        if isinstance(pairs, Mapping):
            raise DataError(
                f"pairs: expected preference pairs, got a mapping of {list(pairs)!r:.80}. Choose the pairs under one "
                "key: pairs[key]."
            )
        if isinstance(pairs, str | Path | pd.DataFrame) or not isinstance(pairs, Iterable):
            raise DataError(f"pairs: expected preference pairs, got {type(pairs).__name__}. {entrance(pairs)}")
        self._pairs = tuple(pairs)
        self.skipped: dict[str, int] = dict(skipped or {})
        for number, pair in enumerate(self._pairs, start=first):
            if not isinstance(pair, PreferencePair):
                raise DataError(
                    f"pairs: expected PreferencePair, got {type(pair).__name__} at position {number}. For dicts use "
                    "PreferencePairs.from_records; to score texts that are not pairs, use RewardHead.score."
                )
            require_responses(pair, f"pair {number} (id {pair.id!r})")

    # -- a sequence ------------------------------------------------------------------------------------------------

    def __len__(self) -> int:
        return len(self._pairs)

    @overload
    def __getitem__(self, index: int) -> PreferencePair: ...
    @overload
    def __getitem__(self: Pairs, index: slice) -> Pairs: ...
    def __getitem__(self, index: int | slice) -> Any:
        return type(self)(self._pairs[index]) if isinstance(index, slice) else self._pairs[index]

    def __iter__(self) -> Iterator[PreferencePair]:
        return iter(self._pairs)

    def __add__(self: Pairs, other: Pairs) -> Pairs:
        return type(self)(self._pairs + other._pairs, Counter(self.skipped) + Counter(other.skipped))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, PairSequence) and self._pairs == other._pairs

    def __hash__(self) -> int:
        return hash(self._pairs)

    def __repr__(self) -> str:
        parts = [f"{len(self)} pairs", f"{len(self.prompts)} prompts"]
        parts += [f"objectives {self.objectives}"] if self.objectives else []
        parts += [f"{self.n_ties} ties"] if self.n_ties else []
        parts += [f"{sum(self.skipped.values())} skipped"] if self.skipped else []
        return f"{type(self).__name__}({', '.join(parts)})"

    @property
    def prompts(self) -> list[str | Chat]:
        """The distinct prompts, in order of first appearance."""
        return list(self._prompts)

    @cached_property
    def _prompts(self) -> tuple[str | Chat, ...]:
        return tuple(dict.fromkeys(pair.prompt for pair in self._pairs))

    @property
    def objectives(self) -> list[str]:
        """The distinct objectives that are set, sorted."""
        return sorted({pair.objective for pair in self._pairs if pair.objective is not None})

    @property
    def subsets(self) -> list[str]:
        """The distinct subsets that are set, sorted."""
        return sorted({pair.subset for pair in self._pairs if pair.subset is not None})

    @property
    def items(self) -> list[list[int]]:
        """The indices of each item's pairs, in order of first appearance; a pair without an item forms its own.

        An item has one prompt: the same name with another prompt is another item.
        """
        return [list(indices) for indices in self._items]

    @cached_property
    def _items(self) -> tuple[tuple[int, ...], ...]:
        items: dict[object, list[int]] = {}
        for index, pair in enumerate(self._pairs):
            items.setdefault(index if pair.item is None else (pair.prompt, pair.item), []).append(index)
        return tuple(map(tuple, items.values()))

    @property
    def n_ties(self) -> int:
        """How many pairs have identical chosen and rejected responses."""
        return sum(pair.is_tie for pair in self._pairs)

    @cached_property
    def digest(self) -> str:
        """64 hexadecimal digits that do not depend on the order: the sum of the pairs' SHA-256 digests modulo 2^256.

        It is a sum so that the digests of parts add up to the digest of the whole.
        """
        return f"{sum(int(pair.digest(), 16) for pair in self._pairs) % 2**256:064x}"

    @cached_property
    def ordered_digest(self) -> str:
        """64 hexadecimal digits that depend on the order, for results that are stored row by row."""
        return hashlib.sha256("".join(pair.digest() for pair in self._pairs).encode()).hexdigest()

    # -- choosing --------------------------------------------------------------------------------------------------

    def filter(self: Pairs, *, objective: str | None = None, subset: str | Iterable[str] | None = None) -> Pairs:
        """Select the pairs of one objective and of one or several subsets.

        Examples:
            >>> both = PreferencePairs([*pairs["helpful"], *pairs["harmless"]])
            >>> len(both), len(both.filter(objective="harmless"))
            (48, 24)
        """
        return type(self)(self._pairs[index] for index in self.places(objective=objective, subset=subset))

    def places(self, *, objective: str | None = None, subset: str | Iterable[str] | None = None) -> list[int]:
        """The indices of the pairs that `filter` keeps.

        Examples:
            >>> pairs["helpful"].places(objective="harmless")
            []
        """
        wanted = {subset} if isinstance(subset, str) else None if subset is None else set(subset)
        return [
            index
            for index, pair in enumerate(self._pairs)
            if (objective is None or pair.objective == objective) and (wanted is None or pair.subset in wanted)
        ]

    def split(self: Pairs, test_fraction: float, *, seed: int = 0) -> tuple[Pairs, Pairs]:
        """Split into train and test pairs by prompt, so that no prompt is on both sides; the order is kept.

        `test_fraction` is a share of the prompts, in (0, 1). The split depends only on the prompts and `seed`. Raises
        `OptionError` if one side would be empty.

        Examples:
            >>> train, test = pairs["helpful"].split(0.25, seed=0)
            >>> len(train), len(test), set(train.prompts) & set(test.prompts)
            (18, 6, set())
        """
        if not 0 < test_fraction < 1:
            raise OptionError(f"test_fraction: expected a number in (0, 1), got {test_fraction}.")
        prompts = sorted(set(self.prompts), key=prompt_text)
        n_test = round(test_fraction * len(prompts))
        if not 0 < n_test < len(prompts):
            raise OptionError(
                f"test_fraction: {test_fraction} of {len(prompts)} distinct prompts leaves one side empty. Use more "
                "prompts or another fraction."
            )
        order = np.random.default_rng(seed).permutation(len(prompts))
        test = {prompts[i] for i in order[:n_test]}
        return (
            type(self)(pair for pair in self._pairs if pair.prompt not in test),
            type(self)(pair for pair in self._pairs if pair.prompt in test),
        )

    def sample(self: Pairs, n: int, *, seed: int = 0) -> Pairs:
        """Draw `n` pairs without replacement, in their original order; all pairs if there are at most `n`.

        Examples:
            >>> len(pairs["helpful"].sample(5, seed=0))
            5
        """
        if n < 1:
            raise OptionError(f"n: expected a positive number of pairs, got {n}.")
        chosen = np.sort(np.random.default_rng(seed).permutation(len(self))[:n])
        return type(self)(self._pairs[i] for i in chosen)

    def swapped(self: Pairs) -> Pairs:
        """Swap chosen and rejected in every pair: signed scores and margins change their sign.

        Examples:
            >>> head.score_pairs(pairs["helpful"].swapped()).accuracy()
            0.0
        """
        return type(self)(pair.swapped() for pair in self._pairs)

    def as_chat(self: Pairs) -> Pairs:
        r"""Convert plain prompts to messages, for reward models with a chat template.

        An HH transcript becomes the messages of its turns, any other text one user message; chats do not change.
        Loading with `chat=True` does the same. Raises `DataError` for an empty prompt, and for a transcript that ends
        inside a turn of the assistant.

        Examples:
            >>> row = {"prompt": "\n\nHuman: 2 + 2?\n\nAssistant:", "chosen": "4", "rejected": "5"}
            >>> PreferencePairs.from_records([row, row | {"prompt": "2 + 2?"}]).as_chat().prompts
            [(Message(role='user', content='2 + 2?'),)]
        """
        return type(self)(pair.as_chat() for pair in self._pairs)


def entrance(source: object) -> str:
    """A sentence for error messages: which method reads a source of this type."""
    kinds: tuple[tuple[bool, str], ...] = (
        (isinstance(source, pd.DataFrame), "Read a pandas.DataFrame with PreferencePairs.from_frame(frame)."),
        (isinstance(source, str | Path), "Read a file with PreferencePairs.read(path)."),
        (hasattr(source, "features"), "Read a datasets.Dataset with PreferencePairs.from_dataset(dataset)."),
        (isinstance(source, Mapping), "Read a single row with PreferencePairs.from_records([row])."),
    )
    others = "Read a file with PreferencePairs.read, and dicts with PreferencePairs.from_records."
    return next((advice for fits, advice in kinds if fits), others)
