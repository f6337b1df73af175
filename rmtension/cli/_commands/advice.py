"""Advice in error messages for the command line: flags for arguments of the library, and the nearest choice."""

import ast
import re
import shlex
from argparse import ArgumentParser, Namespace
from typing import Any, NoReturn

from rmtension._arguments import nearest

_ARGUMENTS = (
    *("output", "columns", "base", "pad_token", "max_length", "revision", "dtype"),
    *("truncate_response", "on_invalid", "on_nonfinite", "chat"),
)
_ADVICE = re.compile(rf"\b({'|'.join(_ARGUMENTS)})=(\{{[^}}]*\}}|\([^)]*\)|\"[^\"]*\"|'[^']*'|torch\.\w+|\w+|\.\.\.)")
_CHOICE = re.compile(r"invalid choice: '(.*?)' \(choose from (.*)\)")


class Parser(ArgumentParser):
    """A parser whose errors suggest the nearest choice."""

    def error(self, message: str) -> NoReturn:
        """Exit with the message and, for a mistyped command or value, the nearest valid one."""
        wrong = _CHOICE.search(message)
        super().error(message + (nearest(wrong[1], re.findall(r"[\w.-]+", wrong[2])) if wrong else ""))


def with_flags(message: str, options: Namespace) -> str:
    """The message, followed by the command's flags for the arguments that it names.

    Examples:
        >>> with_flags("Say output=(1, 0).", Namespace(command="score", output=None))
        'Say output=(1, 0). (On the command line: --output 1 --output 0)'
    """
    # In `study`, --base is the model that the others were trained from, not the base of an adapter.
    known = set(vars(options)) - ({"base"} if options.command == "study" else set())
    flags = dict.fromkeys(_flag(*match) for match in _ADVICE.findall(message) if match[0] in known)
    return f"{message} (On the command line: {', or '.join(flags)})" if flags else message


def _flag(name: str, text: str) -> str:
    flag = "--" + name.replace("_", "-")
    try:
        value = ast.literal_eval(text)
    except (ValueError, SyntaxError):
        value = text.removeprefix("torch.") if text.startswith("torch.") else ...
    if value is True:
        return flag
    if isinstance(value, dict):
        columns = (f"{field}={'' if column is None else _word(column, 'COLUMN')}" for field, column in value.items())
        return " ".join([flag, *map(shlex.quote, columns)])
    values = value if isinstance(value, tuple) else (value,)
    return " ".join(f"{flag} {shlex.quote(_word(part, name.upper()))}" for part in values)


def _word(value: Any, what: str) -> str:
    return what if value is ... else str(value)
