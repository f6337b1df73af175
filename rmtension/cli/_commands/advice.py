"""Error messages for the command line: its flags in place of the library's arguments, and the nearest choice."""

import ast
import re
import shlex
from argparse import ArgumentParser, Namespace
from collections.abc import Mapping
from typing import Any, NoReturn

from rmtension._arguments import nearest

# name=value in the middle of a message; the value is written as in Python, or as "...".
_ARGUMENT = re.compile(
    r"\b([a-z]\w*)=(\{[^}]*\}|\([^)]*\)|\[[^\]]*\]|\"[^\"]*\"|'[^']*'|torch\.\w+|-?\d+\.\d+|\w+|\.\.\.)"
)
# What a message begins with: the arguments that are wrong.
_SUBJECT = re.compile(r"([a-z]\w*(?:, [a-z]\w*)*)(?=: )")
_OPEN_CALL = re.compile(r"\w\([^()]*\Z")
# Arguments of the library that every command with MODEL sets by it.
_OF_MODELS = {"name_or_path": "model"}
_CHOICE = re.compile(r"invalid choice: '(.*?)' \(choose from (.*)\)")


class Parser(ArgumentParser):
    """A parser whose errors suggest the nearest choice."""

    def error(self, message: str) -> NoReturn:
        """Exit with the message and, for a mistyped command or value, the nearest valid one."""
        wrong = _CHOICE.search(message)
        super().error(message + (nearest(wrong[1], re.findall(r"[\w.-]+", wrong[2])) if wrong else ""))


def flags_of(parser: ArgumentParser, arguments: Mapping[str, str | None]) -> dict[str, str]:
    """The flag, or the capital name of a positional argument, of every argument of the library.

    An option sets the argument of its own name. `arguments` maps further arguments to the options that set them, and to
    None an argument that the flag of the same name does not set.

    Examples:
        >>> parser = ArgumentParser(add_help=False)
        >>> _ = parser.add_argument("--draws"), parser.add_argument("pairs", metavar="PAIRS")
        >>> flags_of(parser, {"n_draws": "draws"})
        {'draws': '--draws', 'pairs': 'PAIRS', 'n_draws': '--draws'}
    """
    own = {
        action.dest: action.option_strings[-1] if action.option_strings else str(action.metavar)
        for action in parser._actions
    }
    others = {name: own[option] for name, option in (_OF_MODELS | dict(arguments)).items() if option in own}
    return {name: flag for name, flag in (own | others).items() if arguments.get(name, "") is not None}


def with_flags(message: str, options: Namespace) -> str:
    """The message with the command's flags in place of the arguments of the library that it names.

    Arguments that the command has no flag for are left as they are. A call that the message shows is left whole; the
    flags for its arguments follow at the end.

    Examples:
        >>> options = Namespace(flags={"by": "--by", "output": "--output"})
        >>> with_flags("by: no pair has a label 'kind'.", options)
        "--by: no pair has a label 'kind'."
        >>> with_flags("Pass output=(1, 0), or head=...", options)
        'Pass --output 1 --output 0, or head=...'
        >>> with_flags("Call open(path, output=2).", options)
        'Call open(path, output=2). (On the command line: --output 2)'
    """
    flags: Mapping[str, str] = options.flags
    if subject := _SUBJECT.match(message):
        named = ", ".join(flags.get(name, name) for name in subject[0].split(", "))
        message = named + message[subject.end() :]
    of_calls: dict[str, None] = {}

    def replace(found: re.Match[str]) -> str:
        flag = flags.get(found[1], "")
        if not flag.startswith("-"):
            return found[0]
        written = _with_value(flag, found[1], found[2])
        if not _OPEN_CALL.search(message[: found.start()]):
            return written
        of_calls[written] = None
        return found[0]

    changed = _ARGUMENT.sub(replace, message)
    return f"{changed} (On the command line: {', or '.join(of_calls)})" if of_calls else changed


def _with_value(flag: str, name: str, text: str) -> str:
    try:
        value = ast.literal_eval(text)
    except (ValueError, SyntaxError):
        value = text.removeprefix("torch.") if text.startswith("torch.") else ...
    if value is True:
        return flag
    if isinstance(value, dict):
        columns = (f"{field}={'' if column is None else _word(column, 'COLUMN')}" for field, column in value.items())
        return " ".join([flag, *map(shlex.quote, columns)])
    values = value if isinstance(value, tuple | list) else (value,)
    return " ".join(f"{flag} {shlex.quote(_word(part, name.upper()))}" for part in values)


def _word(value: Any, what: str) -> str:
    return what if value is ... else str(value)
