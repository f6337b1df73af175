"""Options of the commands that read a file of pairs."""

from argparse import ArgumentParser, Namespace
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from rmtension.errors import OptionError

if TYPE_CHECKING:
    from rmtension.data._pairs import PreferencePairs


def add_pair_options(parser: ArgumentParser) -> None:
    """Add the options for columns and for plain prompts."""
    parser.add_argument(
        "--columns",
        nargs="+",
        metavar="FIELD=COLUMN",
        default=[],
        help="the column of a field, for example prompt=question; prompt= if no column has it",
    )
    parser.add_argument(
        "--chat", action="store_true", help="read plain prompts with the chat template, as a message of the user"
    )


def read_columns(words: Iterable[str]) -> dict[str, str | None]:
    """Convert the words of `--columns` to the argument `columns` of `PreferencePairs.read`.

    Examples:
        >>> read_columns(["prompt=question", "objective="])
        {'prompt': 'question', 'objective': None}
    """
    columns: dict[str, str | None] = {}
    for word in words:
        field, equals, column = word.partition("=")
        if not equals:
            raise OptionError(f"--columns: expected FIELD=COLUMN, for example prompt=question, got {word[:80]!r}.")
        columns[field] = column or None
    return columns


def read_pairs(path: Path, options: Namespace, *, on_invalid: str = "raise") -> "PreferencePairs":
    """Read the pairs of a file with the options; errors are those of `PreferencePairs.read`."""
    from rmtension.data._pairs import PreferencePairs

    columns = read_columns(options.columns)
    return PreferencePairs.read(path, columns=columns, chat=options.chat, on_invalid=on_invalid)
