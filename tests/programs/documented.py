"""Finds and counts the code of the documentation: blocks of pages, examples of docstrings, commands, notebook cells.

    python tests/programs/documented.py

prints how many there are and which are not run. `tests/test_docs.py` and `tests/test_docstrings.py` run them.
"""

import ast
import contextlib
import doctest
import io
import json
import re
import shlex
import signal
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path

ROOT = Path(__file__).parents[2]
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
# The line above a block that cannot run here; it says what the block needs.
NOT_RUN = re.compile(r"<!-- not run: (.+?) -->\n\Z")
DECIMAL = re.compile(r"(-?\d+\.\d+)")
# Kinds of blocks that readers see and nothing runs.
SHOWN = {"sh", "json", "toml", "yaml"}
PARSER = doctest.DocTestParser()


@dataclass(frozen=True)
class Block:
    """A Python block: the line above its first line, its code, and the output stated in the text block below."""

    line: int
    code: str
    stated: str
    not_run: str | None = None


def pages():
    """All pages of the documentation, the README first."""
    return [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]


def blocks(page):
    """The Python blocks of a page's text; a text block states the output of the block directly above."""
    python_blocks, before = [], None
    for fence in FENCE.finditer(page):
        kind = fence[1]
        assert kind in {"python", "text", *SHOWN}, f"a block of kind {kind!r}"
        if kind == "python":
            reason = NOT_RUN.search(page[: fence.start()])
            python_blocks.append(Block(page.count("\n", 0, fence.start(2)), fence[2], "", reason and reason[1]))
        elif kind == "text":
            assert before is not None, "a text block comes before all other blocks"
            assert before[1] != "text", "a text block follows another"
            assert not page[before.end() : fence.start()].strip(), "a text block has no block directly above"
            if before[1] == "python":
                last = python_blocks.pop()
                python_blocks.append(Block(last.line, last.code, fence[2], last.not_run))
        before = fence
    return python_blocks


def same(printed, stated):
    """Whether two texts are equal, except for spaces at the end of a line and 1 in the last place of a decimal.

    Another machine adds float32 numbers in another order, which may change the last place after rounding.
    """
    first, second = (DECIMAL.split("\n".join(map(str.rstrip, text.splitlines()))) for text in (printed, stated))
    return first[::2] == second[::2] and all(map(_close, first[1::2], second[1::2]))


def _close(first, second):
    first, second = Decimal(first), Decimal(second)
    places = first.as_tuple().exponent
    return places == second.as_tuple().exponent and abs(first - second) <= Decimal(1).scaleb(places)


def run(page, name, names=None):
    """Run the page's blocks in one namespace; return (line, printed, stated) of those whose output is another."""
    names = {} if names is None else names
    wrong = []
    for block in blocks(page):
        if block.not_run:
            # The block is not run, but has to be Python.
            compile(block.code, name, "exec")
            continue
        with contextlib.redirect_stdout(io.StringIO()) as printed:
            # The line breaks make a traceback name the page's line.
            exec(compile("\n" * block.line + block.code, name, "exec"), names)
        if not same(printed.getvalue(), block.stated):
            wrong.append((block.line, printed.getvalue(), block.stated))
    return wrong


@contextlib.contextmanager
def limited(seconds, what, error=TimeoutError):
    """Raise `error` in the block if it takes longer."""

    def late(_number, _frame):
        raise error(f"{what} takes longer than {seconds} s")

    before = signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def docstrings():
    """(module, name, docstring, line) of all objects in the package that have examples, private objects too.

    Docstrings are read from the files, because a decorator hides a function from `doctest.DocTestFinder`.
    """
    for path in sorted((ROOT / "rmtension").rglob("*.py")):
        module = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        yield from _with_examples(ast.parse(path.read_text()), module, "")


def _with_examples(node, module, name):
    text = ast.get_docstring(node, clean=False)
    if text and PARSER.get_examples(text):
        yield module, name, text, node.body[0].lineno
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.ClassDef | ast.FunctionDef):
            yield from _with_examples(child, module, f"{name}.{child.name}".lstrip("."))


def commands(page):
    """(line, words) of every command in the shell blocks of a page; a backslash joins a line to the next."""
    for fence in FENCE.finditer(page):
        if fence[1] != "sh":
            continue
        line = page.count("\n", 0, fence.start(2))
        for command in re.findall(r"(?:.*\\\n)*.*\n", fence[2]):
            line += 1
            words = shlex.split(command.replace("\\\n", " "), comments=True)
            if words:
                yield line, words
            line += command.count("\n") - 1


def cells():
    """(notebook, number of code cells) of every notebook."""
    for path in sorted({*ROOT.glob("examples/**/*.ipynb"), *ROOT.glob("docs/**/*.ipynb")}):
        yield path, sum(cell["cell_type"] == "code" for cell in json.loads(path.read_text())["cells"])


def counted():
    """How many examples of each kind there are, and (page, line, reason) of every block that is not run."""
    by_page = {page.relative_to(ROOT).as_posix(): blocks(page.read_text()) for page in pages()}
    left = [(name, block.line, block.not_run) for name, some in by_page.items() for block in some if block.not_run]
    examples = [len(PARSER.get_examples(text)) for _, _, text, _ in docstrings()]
    numbers = {
        "blocks": sum(map(len, by_page.values())),
        "blocks not run": len(left),
        "pages with blocks": sum(map(bool, by_page.values())),
        "docstrings with examples": len(examples),
        "docstring examples": sum(examples),
        "commands": sum(len(list(commands(page.read_text()))) for page in pages()),
        "notebook cells": sum(number for _, number in cells()),
    }
    return numbers, left


if __name__ == "__main__":
    for kind, number in counted()[0].items():
        print(f"{number:5} {kind}")
    for page, line, reason in counted()[1]:
        print(f"not run: {page}, line {line}: {reason}")
