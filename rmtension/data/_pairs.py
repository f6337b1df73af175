"""Preference pairs: loading, validating, splitting by prompt, writing."""

import hashlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, overload

import numpy as np
import pandas as pd

from rmtension.data._chat import Chat, prompt_text
from rmtension.data._data_files import file_rows, without_padding
from rmtension.data._pair import PreferencePair, require_responses
from rmtension.data._preference_format import dataset_rows, to_dataset
from rmtension.data._row_reader import RowReader
from rmtension.data._sources import hub_rows
from rmtension.distributed import current
from rmtension.errors import DataError, OptionError
from rmtension.store._files import write_json_lines


class PreferencePairs(Sequence[PreferencePair]):
    """An immutable sequence of validated preference pairs.

    Identical chosen and rejected responses are kept and counted in `n_ties`; `skipped` counts, by reason, what a
    loader left out with `on_invalid="skip"`. Errors count pairs from `first`.

    Examples:
        >>> pairs = PreferencePairs.from_records([{"prompt": "Q", "chosen": "yes", "rejected": "no"}])
        >>> len(pairs), pairs[0].chosen, pairs.n_ties
        (1, 'yes', 0)
    """

    def __init__(
        self, pairs: Iterable[PreferencePair], skipped: Mapping[str, int] | None = None, *, first: int = 0
    ) -> None:
        if isinstance(pairs, Mapping):
            raise DataError(
                f"pairs: expected preference pairs, got a mapping of {list(pairs)!r:.80}. Choose those of one name."
            )
        if isinstance(pairs, str | Path | pd.DataFrame) or not isinstance(pairs, Iterable):
            raise DataError(f"pairs: expected preference pairs, got {type(pairs).__name__}. {entrance(pairs)}")
        self._pairs = tuple(pairs)
        self.skipped: dict[str, int] = dict(skipped or {})
        for number, pair in enumerate(self._pairs, start=first):
            if not isinstance(pair, PreferencePair):
                raise DataError(
                    f"pairs: expected PreferencePair, got {type(pair).__name__} at position {number}. For dicts use "
                    "PreferencePairs.from_records; texts that are not pairs are scored with RewardHead.score."
                )
            require_responses(pair, f"pair {number} (id {pair.id!r})")

    # -- loading ---------------------------------------------------------------------------------------------------

    @classmethod
    def read(
        cls,
        path: str | Path,
        *,
        columns: Mapping[str, str | None] | None = None,
        objective: str | None = None,
        subset: str | None = None,
        chat: bool = False,
        on_invalid: str = "raise",
    ) -> "PreferencePairs":
        r"""Pairs from a file: JSON lines, a JSON array, CSV, TSV or Parquet; plain, gzip'd or zstd'd; in UTF-8.

        The content says which, not the name. A row has `prompt`, `chosen`, `rejected`, and if you like `objective`,
        `subset`, `id`, `item`, `tools` and `system`; `columns={"prompt": "question"}` says which column a field is in,
        and `{"prompt": None}` that it is in none. `objective` and `subset` set that field in every pair. Prompts and
        responses are texts or messages: the page "Load your pairs" shows every shape. `chat=True` makes messages of
        plain prompts, for models with a chat template.

        Raises `DataError` naming the file, the line or row, and the field; `on_invalid="skip"` counts such rows in
        `skipped` instead. A column of `columns=` that no row has is such a `DataError` on the first row for prompt,
        chosen and rejected; for labels, and where rows are skipped, it is an `OptionError` after the last row. Parquet
        needs the package pyarrow, .zst needs zstandard. JSON arrays are read whole, other files row by row.

        Examples:
            >>> Path("pairs.csv").write_text('question,good,bad\n2 + 2?,4,"5, or 6"\n') > 0
            True
            >>> columns = {"prompt": "question", "chosen": "good", "rejected": "bad"}
            >>> PreferencePairs.read("pairs.csv", columns=columns)[0].rejected
            '5, or 6'
        """
        if not isinstance(path, str | Path):
            raise OptionError(f"path: expected the path of a file, got {type(path).__name__}. {entrance(path)}")
        reader = RowReader(columns, objective=objective, subset=subset, chat=chat)
        return cls._read(file_rows(Path(path).expanduser(), columns=reader.sides), reader, on_invalid)

    @classmethod
    def from_jsonl(cls, path: str | Path, **options: Any) -> "PreferencePairs":
        """`read`, by the name of the format that `to_jsonl` writes.

        Examples:
            >>> pairs["helpful"].to_jsonl("pairs.jsonl.gz")
            >>> PreferencePairs.from_jsonl("pairs.jsonl.gz") == pairs["helpful"]
            True
        """
        return cls.read(path, **options)

    @staticmethod
    def iter_jsonl(
        path: str | Path,
        *,
        columns: Mapping[str, str | None] | None = None,
        objective: str | None = None,
        subset: str | None = None,
        chat: bool = False,
    ) -> Iterator[PreferencePair]:
        """The pairs of a file one at a time, for files longer than memory; an invalid row raises.

        The options are those of `read`. Whatever sums over pairs takes them so:
        `ActivationCollector(head).collect(PreferencePairs.iter_jsonl(path))`.

        Examples:
            >>> pairs["helpful"].to_jsonl("pairs.jsonl")
            >>> ActivationCollector(head).collect(PreferencePairs.iter_jsonl("pairs.jsonl")).mean.equal(means.mean)
            True
        """
        reader = RowReader(columns, objective=objective, subset=subset, chat=chat)
        for where, row in file_rows(Path(path).expanduser(), columns=reader.sides):
            yield reader.read(row, where)
        reader.finish()

    @classmethod
    def from_records(
        cls,
        records: Iterable[Mapping[str, Any]],
        *,
        columns: Mapping[str, str | None] | None = None,
        objective: str | None = None,
        subset: str | None = None,
        chat: bool = False,
        on_invalid: str = "raise",
    ) -> "PreferencePairs":
        """Pairs from dicts, read as the rows of a file are; options and errors are those of `read`.

        Examples:
            >>> rows = [{"prompt": "2 + 2?", "chosen": "4", "rejected": "5"}, {"prompt": "2 + 3?", "chosen": "5"}]
            >>> read = PreferencePairs.from_records(rows, on_invalid="skip", objective="helpful")
            >>> len(read), read.objectives, read.skipped
            (1, ['helpful'], {"field 'rejected' is missing; fields present: ['chosen', 'prompt'].": 1})
        """
        if isinstance(records, Mapping | str | Path | pd.DataFrame) or not isinstance(records, Iterable):
            raise OptionError(f"records: expected a list of dicts, got {type(records).__name__}. {entrance(records)}")
        reader = RowReader(columns, objective=objective, subset=subset, chat=chat)
        return cls._read(((f"record {number}", one) for number, one in enumerate(records)), reader, on_invalid)

    @classmethod
    def from_frame(
        cls,
        frame: pd.DataFrame,
        *,
        columns: Mapping[str, str | None] | None = None,
        objective: str | None = None,
        subset: str | None = None,
        chat: bool = False,
        on_invalid: str = "raise",
    ) -> "PreferencePairs":
        """Pairs from a pandas frame, read as the rows of a file are; NaN, NaT and NA are missing. Rows count from 0.

        Options and errors are those of `read`.

        Examples:
            >>> PreferencePairs.from_frame(pairs["helpful"].to_frame()) == pairs["helpful"]
            True
        """
        if not isinstance(frame, pd.DataFrame):
            raise OptionError(f"frame: expected a pandas.DataFrame, got {type(frame).__name__}. {entrance(frame)}")
        if not frame.columns.is_unique:
            raise DataError(f"frame: expected columns with names of their own, got {list(map(str, frame.columns))}.")
        reader = RowReader(columns, objective=objective, subset=subset, chat=chat)
        rows = ({str(name): _of_frame(value) for name, value in row.items()} for row in frame.to_dict("records"))
        return cls._read(((f"row {number}", row) for number, row in enumerate(rows)), reader, on_invalid)

    @classmethod
    def from_hub(
        cls,
        name: str,
        *,
        split: str = "test",
        data_dir: str | None = None,
        revision: str | None = None,
        columns: Mapping[str, str | None] | None = None,
        objective: str | None = None,
        subset: str | None = None,
        chat: bool = False,
        on_invalid: str = "raise",
    ) -> "PreferencePairs":
        """Pairs from a Hugging Face data set (or a local folder of its files), read with `datasets`.

        This is the only call of this class that uses the network, and `HF_HUB_OFFLINE=1` keeps it from doing so.
        The other options and errors are those of `from_dataset`.
        """
        rows = hub_rows(name, data_dir=data_dir, split=split, revision=revision)
        return cls.from_dataset(
            rows, columns=columns, objective=objective, subset=subset, chat=chat, on_invalid=on_invalid
        )

    @classmethod
    def from_dataset(
        cls,
        dataset: Iterable[Mapping[str, Any]],
        *,
        columns: Mapping[str, str | None] | None = None,
        objective: str | None = None,
        subset: str | None = None,
        chat: bool = False,
        on_invalid: str = "raise",
    ) -> "PreferencePairs":
        """Pairs from a `datasets.Dataset` or `IterableDataset`, read as the rows of a file are; rows count from 0.

        All of TRL's preference formats are read. The text of a pair is `prompt + response` as in TRL, but with a space
        between where neither has any white space there. Options and errors are those of `read`.
        """
        reader = RowReader(columns, objective=objective, subset=subset, chat=chat)
        return cls._read(dataset_rows(dataset), reader, on_invalid)

    @classmethod
    def _read(cls, rows: Iterable[tuple[str, Any]], reader: RowReader, on_invalid: str) -> "PreferencePairs":
        pairs = cls.from_rows(rows, reader, on_invalid=on_invalid)
        reader.finish()
        return pairs

    @classmethod
    def from_rows(
        cls,
        rows: Iterable[tuple[str, Any]],
        read: Callable[[Any, str], Iterable[PreferencePair]],
        *,
        on_invalid: str = "raise",
    ) -> "PreferencePairs":
        """Pairs from rows of any format: `rows` says where each row stands, and `read(row, where)` gives its pairs.

        `on_invalid="skip"` counts a row for which `read` raises `DataError`, and leaves it out whole: an item without
        some of its pairs would be an easier one.
        """
        if on_invalid not in ("raise", "skip"):
            raise OptionError(f"on_invalid: expected 'raise' or 'skip', got {on_invalid!r}.")
        pairs: list[PreferencePair] = []
        skipped: Counter[str] = Counter()
        for where, row in rows:
            try:
                pairs += list(read(row, where))
            except DataError as error:
                if on_invalid == "raise":
                    raise
                skipped[str(error).partition(": ")[2]] += 1
        return cls(pairs, skipped)

    # -- a sequence ------------------------------------------------------------------------------------------------

    def __len__(self) -> int:
        return len(self._pairs)

    @overload
    def __getitem__(self, index: int) -> PreferencePair: ...
    @overload
    def __getitem__(self, index: slice) -> "PreferencePairs": ...
    def __getitem__(self, index: int | slice) -> "PreferencePair | PreferencePairs":
        return PreferencePairs(self._pairs[index]) if isinstance(index, slice) else self._pairs[index]

    def __iter__(self) -> Iterator[PreferencePair]:
        return iter(self._pairs)

    def __add__(self, other: "PreferencePairs") -> "PreferencePairs":
        return PreferencePairs(self._pairs + other._pairs, Counter(self.skipped) + Counter(other.skipped))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, PreferencePairs) and self._pairs == other._pairs

    def __hash__(self) -> int:
        return hash(self._pairs)

    def __repr__(self) -> str:
        parts = [f"{len(self)} pairs", f"{len(self.prompts)} prompts"]
        parts += [f"objectives {self.objectives}"] if self.objectives else []
        parts += [f"{self.n_ties} ties"] if self.n_ties else []
        parts += [f"{sum(self.skipped.values())} skipped"] if self.skipped else []
        return f"PreferencePairs({', '.join(parts)})"

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
        """The places of every item's pairs, in order of first appearance; a pair without an item is one by itself.

        An item has one prompt: the same name with another prompt is another item.
        """
        return [list(places) for places in self._items]

    @cached_property
    def by_item(self) -> "PreferencePairs":
        """The first pair of every item, which stands for the item's prompt and subset; itself where all are single."""
        if len(self._items) == len(self):
            return self
        return PreferencePairs(self._pairs[places[0]] for places in self._items)

    @cached_property
    def _items(self) -> tuple[tuple[int, ...], ...]:
        found: dict[object, list[int]] = {}
        for place, pair in enumerate(self._pairs):
            found.setdefault(place if pair.item is None else (pair.prompt, pair.item), []).append(place)
        return tuple(map(tuple, found.values()))

    @property
    def n_ties(self) -> int:
        """How many pairs have identical chosen and rejected responses."""
        return sum(pair.is_tie for pair in self._pairs)

    @cached_property
    def digest(self) -> str:
        """64 hexadecimal digits over all pairs, whatever their order: the sum of their SHA-256 digests modulo 2^256.

        A sum, so that digests of parts add up to the digest of the whole.
        """
        return f"{sum(int(pair.digest(), 16) for pair in self._pairs) % 2**256:064x}"

    @cached_property
    def ordered_digest(self) -> str:
        """64 hexadecimal digits over all pairs in their order: for results that are kept row by row."""
        return hashlib.sha256("".join(pair.digest() for pair in self._pairs).encode()).hexdigest()

    # -- choosing --------------------------------------------------------------------------------------------------

    def filter(self, *, objective: str | None = None, subset: str | Iterable[str] | None = None) -> "PreferencePairs":
        """The pairs of one objective and of one or several subsets.

        Examples:
            >>> both = PreferencePairs([*pairs["helpful"], *pairs["harmless"]])
            >>> len(both), len(both.filter(objective="harmless"))
            (48, 24)
        """
        return PreferencePairs(self._pairs[place] for place in self.places(objective=objective, subset=subset))

    def places(self, *, objective: str | None = None, subset: str | Iterable[str] | None = None) -> list[int]:
        """Where the pairs are that `filter` keeps."""
        wanted = {subset} if isinstance(subset, str) else None if subset is None else set(subset)
        return [
            place
            for place, pair in enumerate(self._pairs)
            if (objective is None or pair.objective == objective) and (wanted is None or pair.subset in wanted)
        ]

    def split(self, test_fraction: float, *, seed: int = 0) -> tuple["PreferencePairs", "PreferencePairs"]:
        """Train and test pairs, divided by prompt: no prompt is on both sides. Order is kept.

        `test_fraction` is a share of the prompts, in (0, 1). The division depends on the prompts and `seed` alone.

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
            PreferencePairs(pair for pair in self._pairs if pair.prompt not in test),
            PreferencePairs(pair for pair in self._pairs if pair.prompt in test),
        )

    def sample(self, n: int, *, seed: int = 0) -> "PreferencePairs":
        """`n` pairs drawn without replacement, in their original order; all of them when there are no more than `n`.

        Examples:
            >>> len(pairs["helpful"].sample(5, seed=0))
            5
        """
        if n < 1:
            raise OptionError(f"n: expected a positive number of pairs, got {n}.")
        chosen = np.sort(np.random.default_rng(seed).permutation(len(self))[:n])
        return PreferencePairs(self._pairs[i] for i in chosen)

    def swapped(self) -> "PreferencePairs":
        """Every preference turned round: signed scores and margins change their sign on it.

        Examples:
            >>> head.score_pairs(pairs["helpful"].swapped()).accuracy()
            0.0
        """
        return PreferencePairs(pair.swapped() for pair in self._pairs)

    def as_chat(self) -> "PreferencePairs":
        r"""The same pairs with messages in the place of plain prompts, for reward models with a chat template.

        An HH transcript becomes the messages of its turns, any other text one message of the user; chats stay as they
        are. `chat=True` at loading does the same. Raises `DataError` for an empty prompt, and for a transcript that
        ends inside a turn of the assistant.

        Examples:
            >>> row = {"prompt": "\n\nHuman: 2 + 2?\n\nAssistant:", "chosen": "4", "rejected": "5"}
            >>> PreferencePairs.from_records([row, row | {"prompt": "2 + 2?"}]).as_chat().prompts
            [(Message(role='user', content='2 + 2?'),)]
        """
        return PreferencePairs(pair.as_chat() for pair in self._pairs)

    # -- out -------------------------------------------------------------------------------------------------------

    def to_frame(self) -> pd.DataFrame:
        """One row a pair, with the field names of the JSON-lines format; `tools` only where some pair has tools."""
        names = [name for name in PreferencePair.__dataclass_fields__ if name != "tools"]
        names += ["tools"] if any(pair.tools for pair in self._pairs) else []
        return pd.DataFrame([pair.to_dict() for pair in self._pairs], columns=names)

    def to_dataset(self, *, implicit_prompt: bool = False) -> Any:
        """A `datasets.Dataset` in TRL's preference format, whose texts TRL reads as this library does.

        Plain pairs have texts, chats have messages; `implicit_prompt` leaves the prompt in front of both responses.
        `from_dataset` reads it back equal, and `read` does so from the files that the data set writes; with an
        implicit prompt, as far as the prompt can be found. Raises `DataError` for plain prompts among chats, and
        without the package `datasets`.
        """
        return to_dataset(self._pairs, implicit_prompt=implicit_prompt)

    def to_jsonl(self, path: str | Path) -> None:
        """Write JSON lines that `read` reads back equal; compressed if the name ends in `.gz` or `.zst`.

        All of it or nothing; of several processes that share the work, the first one writes.
        """
        if not current().is_first:
            return
        write_json_lines(Path(path), (pair.to_dict() for pair in self._pairs), "pairs")


def entrance(source: object) -> str:
    """A sentence that says which method reads a source."""
    kinds: tuple[tuple[bool, str], ...] = (
        (isinstance(source, pd.DataFrame), "A pandas.DataFrame goes to PreferencePairs.from_frame(frame)."),
        (isinstance(source, str | Path), "A path goes to PreferencePairs.read(path)."),
        (hasattr(source, "features"), "A datasets.Dataset goes to PreferencePairs.from_dataset(dataset)."),
        (isinstance(source, Mapping), "One row goes to PreferencePairs.from_records([row])."),
    )
    others = "A path goes to PreferencePairs.read, dicts to PreferencePairs.from_records."
    return next((said for fits, said in kinds if fits), others)


def _of_frame(value: Any) -> Any:
    # A frame of Parquet has arrays in the place of lists, with the padding of Arrow.
    return without_padding(value) if isinstance(value, np.ndarray) else value
