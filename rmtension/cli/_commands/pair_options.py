"""Options of the commands that read a file of pairs: its columns, its groups, and which pairs to use."""

from argparse import ArgumentParser, Namespace
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from rmtension._arguments import nearest
from rmtension.errors import DataError, OptionError, StorageError

if TYPE_CHECKING:
    from rmtension.data._pairs import PreferencePairs

# An error lists at most this many labels.
_N_LISTED = 12


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


def add_group_options(parser: ArgumentParser, *, has_by: bool) -> None:
    """Add `--only`, `--on-invalid` and, for a command that reports results by group, `--by`."""
    if has_by:
        parser.add_argument("--by", metavar="COLUMN", help="group the pairs by this column, or by objective or subset")
    parser.add_argument(
        "--only", metavar="COLUMN=LABEL", help="use only pairs with this label, for example objective=helpful"
    )
    parser.add_argument(
        "--on-invalid", choices=("raise", "skip"), default="raise", help="invalid rows: stop, or skip and count"
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


def read_group_pairs(options: Namespace) -> "PreferencePairs":
    """Read the pairs that `--only` selects; raises `DataError` if there are none.

    A label in no pair, of `--only` or `--by`, raises `OptionError` here, before a model is opened.
    """
    from rmtension.data._groups import group_rows
    from rmtension.data._pairs import PreferencePairs

    pairs = read_pairs(options.pairs, options, on_invalid=options.on_invalid)
    if not len(pairs):
        raise DataError(f"{options.pairs}: expected at least one preference pair, got none{_left_out(pairs.skipped)}.")
    if options.only is not None:
        column, equals, label = options.only.partition("=")
        if not equals:
            raise OptionError(
                f"--only: expected COLUMN=LABEL, for example objective=helpful, got {options.only!r:.80}."
            )
        try:
            groups = group_rows(pairs, column)
        except OptionError as error:
            raise OptionError(f"--only: {str(error).removeprefix('by: ')}") from error
        if label not in groups:
            listed = ", ".join(f"{name!r}" for name in list(groups)[:_N_LISTED])
            more = "" if len(groups) <= _N_LISTED else f" and {len(groups) - _N_LISTED} more"
            raise OptionError(
                f"--only: no pair has the label {label!r:.80} in {column!r}.{nearest(label, groups)} Its labels are "
                f"{listed}{more}."
            )
        pairs = PreferencePairs((pairs[row] for row in groups[label]), pairs.skipped)
    if getattr(options, "by", None) is not None:
        group_rows(pairs, options.by)
    return pairs


def refuse_inputs(options: Namespace, flag: str, outputs: Iterable[Path]) -> None:
    """Raise `StorageError` if an output of a flag is a file or folder that the command reads."""
    given = (getattr(options, name, None) for name in ("pairs", "neurons", "model"))
    inputs = {Path(path).resolve() for path in given if path is not None}
    for path in outputs:
        if path.resolve() in inputs:
            raise StorageError(f"--{flag}: {path} is read by this command and would be replaced. Name another.")


def skipped_lines(skipped: Mapping[str, int]) -> list[str]:
    """One line per reason for which rows were skipped."""
    return [f"  {n} skipped: {reason}" for reason, n in skipped.items()]


def _left_out(skipped: Mapping[str, int]) -> str:
    return "".join(f"; {n} skipped: {reason.rstrip('.')}" for reason, n in skipped.items())
