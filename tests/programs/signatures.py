"""The table of all public signatures: `docs/api/signatures.md`.

    python tests/programs/signatures.py [--write]

prints the table, or writes the page. `tests/test_package.py` checks that the page is current, that every public name is
in the reference and has an example, and that no call takes too many keyword-only parameters.

A public name is in `rmtension.__all__`, or in the `__all__` of a package or module whose name has no underscore. Its
path is the shortest one.
"""

import argparse
import dataclasses
import importlib
import inspect
import typing
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "api" / "signatures.md"
HEADER = """# All signatures

Every public call by package, with its parameters and their defaults. A class name is its constructor. `**LoadOptions`
and `**RunOptions` are the keywords that [these classes](models.md) list. `python tests/programs/signatures.py --write`
makes this page.
"""
KINDS = inspect.Parameter


@dataclass(frozen=True)
class Call:
    """One public function, constructor or method, by its path below `rmtension`."""

    path: str
    parameters: tuple[inspect.Parameter, ...]
    # The typed dictionary that lists the keywords of `**options`.
    options: str | None = None
    # A typed dictionary is listed with its keys, and is not a call.
    is_dictionary: bool = False

    @property
    def keyword_only(self) -> list[inspect.Parameter]:
        """The parameters after the star."""
        return [parameter for parameter in self.parameters if parameter.kind is KINDS.KEYWORD_ONLY]

    @property
    def row(self) -> str:
        """The line of the table."""
        after_star = (KINDS.KEYWORD_ONLY, KINDS.VAR_KEYWORD)
        before = [parameter for parameter in self.parameters if parameter.kind not in after_star]
        first = [_text(parameter) for parameter in before]
        if n_positional := sum(parameter.kind is KINDS.POSITIONAL_ONLY for parameter in before):
            first.insert(n_positional, "/")
        last = [_text(parameter) for parameter in self.keyword_only]
        stars = [parameter for parameter in self.parameters if parameter.kind is KINDS.VAR_KEYWORD]
        last += [f"**{self.options or parameter.name}" for parameter in stars]
        return f"| `{self.path}` | {_code(first)} | {_code(last)} |"


def modules() -> dict[str, ModuleType]:
    """Every public package and module by its path below `rmtension`, which is "" itself; each has an `__all__`."""
    by_path = {"": importlib.import_module("rmtension")}
    for path in sorted((ROOT / "rmtension").rglob("*.py")):
        parts = path.relative_to(ROOT / "rmtension").with_suffix("").parts
        name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        if name and not any(part.startswith("_") for part in name.split(".")):
            by_path[name] = importlib.import_module(f"rmtension.{name}")
    return by_path


def public_names() -> dict[str, tuple[str, Any]]:
    """The shortest path of every public name below `rmtension` -> (the package or module it belongs to, the object)."""
    by_path: dict[str, tuple[str, Any]] = {}
    for module, loaded in modules().items():
        for name in loaded.__all__:
            value = getattr(loaded, name)
            if name == "__version__" or isinstance(value, ModuleType):
                continue
            is_at_top = name in by_path and by_path[name][1] is value
            by_path[name if is_at_top else f"{module}.{name}".lstrip(".")] = (module, value)
    return by_path


def calls() -> dict[str, list[Call]]:
    """Package or module -> its public calls, classes followed by their methods."""
    names = public_names()
    classes = [value for _, value in names.values() if inspect.isclass(value)]
    by_module: dict[str, list[Call]] = {}
    for path, (module, value) in sorted(names.items(), key=lambda item: (item[1][0], _order(item[0]))):
        if inspect.isclass(value):
            by_module.setdefault(module, []).extend(_calls_of(path, value, classes))
        elif callable(value):
            by_module.setdefault(module, []).append(_call(path, value))
    return by_module


def _calls_of(path: str, owner: type, classes: list[type]) -> Iterator[Call]:
    if typing.is_typeddict(owner):
        keys = tuple(KINDS(name, KINDS.KEYWORD_ONLY) for name in owner.__annotations__)
        yield Call(path, keys, is_dictionary=True)
        return
    if "__init__" in {name for base in _own(owner, classes) for name in vars(base)}:
        yield _call(path, owner)
    seen: set[str] = set()
    for base in _own(owner, classes):
        for name, member in vars(base).items():
            function = member.__func__ if isinstance(member, classmethod | staticmethod) else member
            if name.startswith("_") or name in seen or not inspect.isfunction(function):
                continue
            seen.add(name)
            yield _call(f"{path}.{name}", getattr(owner, name), is_method=inspect.isfunction(member))


def _own(owner: type, classes: list[type]) -> list[type]:
    """The class, and its bases in this library that are not listed by themselves."""
    return [
        base
        for base in owner.__mro__
        if base is owner or (base.__module__.startswith("rmtension") and base not in classes)
    ]


def _call(path: str, function: Any, *, is_method: bool = False) -> Call:
    parameters = tuple(inspect.signature(function).parameters.values())[is_method:]
    star = [parameter for parameter in parameters if parameter.kind is KINDS.VAR_KEYWORD]
    inside = typing.get_args(star[0].annotation) if star else ()
    return Call(path, parameters, getattr(inside[0], "__name__", None) if inside else None)


def _order(path: str) -> tuple[bool, str]:
    return not path.rpartition(".")[2][0].isupper(), path.rpartition(".")[2]


def _text(parameter: inspect.Parameter) -> str:
    stars = {KINDS.VAR_POSITIONAL: "*", KINDS.VAR_KEYWORD: "**"}.get(parameter.kind, "")
    default = parameter.default
    if default is KINDS.empty:
        return f"{stars}{parameter.name}"
    if type(default).__name__ == "_HAS_DEFAULT_FACTORY_CLASS":
        return f"{parameter.name}=..."
    if callable(default) and not inspect.isclass(default) and not dataclasses.is_dataclass(default):
        return f"{parameter.name}=<function>"
    return f"{parameter.name}={default!r}"


def _code(texts: list[str]) -> str:
    return f"`{', '.join(texts)}`" if texts else ""


def page() -> str:
    """The text of `docs/api/signatures.md`."""
    parts = [HEADER]
    for module, some in calls().items():
        parts.append(f"## `rmtension{'.' * bool(module)}{module}`\n")
        rows = "\n".join(call.row for call in some)
        parts.append(f"| call | positional or keyword | keyword-only |\n|---|---|---|\n{rows}\n")
    return "\n".join(parts)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help=f"write {PAGE.relative_to(ROOT)}")
    if parser.parse_args().write:
        PAGE.write_text(page(), encoding="utf-8")
    else:
        print(page())
    print(f"{len(public_names())} public names, {sum(map(len, calls().values()))} calls")
