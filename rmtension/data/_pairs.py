"""Preference pairs from files, data sets, frames and dicts, and back into them."""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from rmtension.data._data_files import file_rows, without_padding
from rmtension.data._pair import PreferencePair
from rmtension.data._pair_sequence import PairSequence, entrance
from rmtension.data._preference_format import dataset_rows, to_dataset
from rmtension.data._row_reader import RowReader
from rmtension.data._sources import hub_rows
from rmtension.distributed import current
from rmtension.errors import DataError, OptionError
from rmtension.store._files import write_json_lines


class PreferencePairs(PairSequence):
    """An immutable sequence of validated preference pairs.

    Pairs with identical chosen and rejected responses are kept and counted in `n_ties`. `skipped` maps each reason to
    the number of rows that a loader skipped with `on_invalid="skip"`. Error messages number the pairs from `first`.

    Raises `DataError` for anything that is not a valid pair.

    Examples:
        >>> pairs = PreferencePairs.from_records([{"prompt": "Q", "chosen": "yes", "rejected": "no"}])
        >>> len(pairs), pairs[0].chosen, pairs.n_ties
        (1, 'yes', 0)
    """

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
        r"""Read pairs from a file in UTF-8: JSON lines, a JSON array, CSV, TSV or Parquet; plain, gzip'd or zstd'd.

        The format is determined from the content, not from the name. A row has `prompt`, `chosen` and `rejected`, and
        optionally `objective`, `subset`, `id`, `item`, `tools` and `system`. `columns={"prompt": "question"}` maps a
        field to its column, and `{"prompt": None}` says that no column holds it. `objective` and `subset` set that
        field in every pair. Prompts and responses are texts or messages; the page "Load your pairs" shows every
        format. `chat=True` converts plain prompts to messages, for models with a chat template.

        Raises `DataError` naming the file, the line or row, and the field; `on_invalid="skip"` skips such rows and
        counts them in `skipped`. If no row has a column that `columns` names, the first row raises `DataError` for
        prompt, chosen and rejected. For labels, and if rows are skipped, there is an `OptionError` after the last row.
        Parquet needs the package pyarrow, .zst needs zstandard. JSON arrays are read whole, other files row by row.

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
        """The same as `read`, named after the format that `to_jsonl` writes.

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
        """Yield the pairs of a file one at a time, for files that do not fit in memory; an invalid row raises.

        The options are those of `read`. Every call that sums over pairs accepts such an iterator:
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
        """Read pairs from dicts, like the rows of a file; options and errors are those of `read`.

        Examples:
            >>> rows = [{"prompt": "2 + 2?", "chosen": "4", "rejected": "5"}, {"prompt": "2 + 3?", "chosen": "5"}]
            >>> read = PreferencePairs.from_records(rows, on_invalid="skip", objective="helpful")
            >>> len(read), read.objectives, read.skipped
            (1, ['helpful'], {"field 'rejected' is missing; fields present: ['chosen', 'prompt'].": 1})
        """
        if isinstance(records, Mapping | str | Path | pd.DataFrame) or not isinstance(records, Iterable):
            raise OptionError(f"records: expected a list of dicts, got {type(records).__name__}. {entrance(records)}")
        reader = RowReader(columns, objective=objective, subset=subset, chat=chat)
        return cls._read(((f"record {number}", record) for number, record in enumerate(records)), reader, on_invalid)

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
        """Read pairs from a pandas frame, like the rows of a file; NaN, NaT and NA count as missing.

        Options and errors are those of `read`; error messages number the rows from 0.

        Examples:
            >>> PreferencePairs.from_frame(pairs["helpful"].to_frame()) == pairs["helpful"]
            True
        """
        if not isinstance(frame, pd.DataFrame):
            raise OptionError(f"frame: expected a pandas.DataFrame, got {type(frame).__name__}. {entrance(frame)}")
        if not frame.columns.is_unique:
            raise DataError(
                f"frame: expected unique column names, got {list(map(str, frame.columns))}. Rename the repeated ones."
            )
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
        """Read pairs from a Hugging Face data set (or a local folder of its files) with `datasets`.

        This is the only method of this class that uses the network; `HF_HUB_OFFLINE=1` prevents it. The other options
        and errors are those of `from_dataset`.

        Examples:
            >>> import tempfile
            >>> folder = Path(tempfile.mkdtemp())
            >>> pairs["helpful"].to_jsonl(folder / "test.jsonl")
            >>> PreferencePairs.from_hub(str(folder), split="test") == pairs["helpful"]
            True
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
        """Read pairs from a `datasets.Dataset` or `IterableDataset`, in any of TRL's preference formats.

        The text of a pair is `prompt + response` as in TRL, but with a space between them if there is no white space.
        Options and errors are those of `read`; error messages number the rows from 0.

        Examples:
            >>> PreferencePairs.from_dataset(pairs["helpful"].to_dataset()) == pairs["helpful"]
            True
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
        """Read pairs from rows of any format: `rows` yields (where, row), and `read(row, where)` returns its pairs.

        `on_invalid="skip"` skips and counts a row for which `read` raises `DataError`. It skips the whole row, because
        an item without some of its pairs would be easier.

        Examples:
            >>> rows = [("line 1", "2 + 2?|4|5"), ("line 2", "2 + 3?|5|4")]
            >>> len(PreferencePairs.from_rows(rows, lambda row, where: [PreferencePair(*row.split("|"))]))
            2
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

    # -- one pair per item -----------------------------------------------------------------------------------------

    @cached_property
    def by_item(self) -> "PreferencePairs":
        """The first pair of every item, which represents its prompt and subset; `self` if every item has one pair."""
        if len(self._items) == len(self):
            return self
        return PreferencePairs(self._pairs[indices[0]] for indices in self._items)

    # -- writing ---------------------------------------------------------------------------------------------------

    def to_frame(self) -> pd.DataFrame:
        """One row per pair, with the field names of the JSON-lines format; `tools` only if some pair has tools.

        Each label of the pairs is a column of its own.
        """
        names = [name for name in PreferencePair.__dataclass_fields__ if name not in ("tools", "labels")]
        names += ["tools"] if any(pair.tools for pair in self._pairs) else []
        names += dict.fromkeys(label for pair in self._pairs for label in pair.labels if label not in names)
        return pd.DataFrame([pair.to_dict() for pair in self._pairs], columns=names)

    def to_dataset(self, *, implicit_prompt: bool = False) -> Any:
        """Convert to a `datasets.Dataset` in TRL's preference format, from which TRL builds the same texts.

        Plain pairs become texts, chats become messages; `implicit_prompt=True` repeats the prompt in both responses.
        `from_dataset` reads equal pairs back, and so does `read` from files that the data set writes; with an implicit
        prompt, as far as the prompt can be recovered. Raises `DataError` for plain prompts among chats, and without
        the package `datasets`.

        Examples:
            >>> pairs["helpful"].to_dataset(implicit_prompt=True).column_names
            ['chosen', 'rejected', 'id', 'objective']
        """
        return to_dataset(self._pairs, implicit_prompt=implicit_prompt)

    def to_jsonl(self, path: str | Path) -> None:
        """Write JSON lines, from which `read` gives equal pairs; compressed if the name ends in `.gz` or `.zst`.

        The file is written completely or not at all. Inside `sharded()` only the first process writes.
        """
        if not current().is_first:
            return
        write_json_lines(Path(path), (pair.to_dict() for pair in self._pairs), "pairs")


def _of_frame(value: Any) -> Any:
    # A frame read from Parquet has arrays instead of lists, with Arrow's padding.
    return without_padding(value) if isinstance(value, np.ndarray) else value
