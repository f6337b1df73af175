"""What the documentation says runs: blocks of pages, examples of docstrings, commands; found in the files, and counted.

    python tests/programs/documented.py

prints how many there are and which are not run; `tests/test_docs.py` and `tests/test_docstrings.py` run them.
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
# Right above a block that cannot run here, with what it needs.
NOT_RUN = re.compile(r"<!-- not run: (.+?) -->\n\Z")
DECIMAL = re.compile(r"(-?\d+\.\d+)")
# Blocks that are read, not run.
SHOWN = {"sh", "json", "toml", "yaml"}
PARSER = doctest.DocTestParser()


@dataclass(frozen=True)
class Block:
    """A python block: the line above its first, its code, what the text block below says it prints."""

    line: int
    code: str
    stated: str
    not_run: str | None = None


def pages():
    """Every page that is documentation, README first."""
    return [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]


def blocks(page):
    """The python blocks of a page's text; a text block says what the block right above prints."""
    found, before = [], None
    for fence in FENCE.finditer(page):
        kind = fence[1]
        assert kind in {"python", "text", *SHOWN}, f"a block of kind {kind!r}"
        if kind == "python":
            reason = NOT_RUN.search(page[: fence.start()])
            found.append(Block(page.count("\n", 0, fence.start(2)), fence[2], "", reason and reason[1]))
        elif kind == "text":
            assert before is not None, "a text block stands before all other blocks"
            assert before[1] != "text", "a text block follows another"
            assert not page[before.end() : fence.start()].strip(), "a text block has no block right above"
            if before[1] == "python":
                last = found.pop()
                found.append(Block(last.line, last.code, fence[2], last.not_run))
        before = fence
    return found


def same(printed, stated):
    """Whether two texts are equal, but that a decimal may differ by one in its last place, and in spaces behind a line.

    One in the last place: float32 sums come in another order on another machine, and what they round to may change.
    """
    one, other = (DECIMAL.split("\n".join(map(str.rstrip, text.splitlines()))) for text in (printed, stated))
    return one[::2] == other[::2] and all(map(_close, one[1::2], other[1::2]))


def _close(one, other):
    one, other = Decimal(one), Decimal(other)
    places = one.as_tuple().exponent
    return places == other.as_tuple().exponent and abs(one - other) <= Decimal(1).scaleb(places)


def run(page, name, names=None):
    """Run the page's blocks in one namespace; (line, printed, stated) of those that print something else."""
    names = {} if names is None else names
    wrong = []
    for block in blocks(page):
        if block.not_run:
            # Python at least.
            compile(block.code, name, "exec")
            continue
        with contextlib.redirect_stdout(io.StringIO()) as printed:
            # Line breaks first, so that a traceback names the page's line.
            exec(compile("\n" * block.line + block.code, name, "exec"), names)
        if not same(printed.getvalue(), block.stated):
            wrong.append((block.line, printed.getvalue(), block.stated))
    return wrong


@contextlib.contextmanager
def limited(seconds, what, error=TimeoutError):
    """Raise `error` inside when it takes longer."""

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
    """(module, name, docstring, line) of everything in the package that has examples, private or not.

    Read from the files: what wraps a function hides it from `doctest.DocTestFinder`.
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
    """(line, words) of every command in the shell blocks of a page's text; lines that end in a backslash go on."""
    for fence in FENCE.finditer(page):
        if fence[1] != "sh":
            continue
        line = page.count("\n", 0, fence.start(2))
        for one in re.findall(r"(?:.*\\\n)*.*\n", fence[2]):
            line += 1
            words = shlex.split(one.replace("\\\n", " "), comments=True)
            if words:
                yield line, words
            line += one.count("\n") - 1


def cells():
    """(notebook, number of code cells) of every notebook."""
    for path in sorted({*ROOT.glob("examples/**/*.ipynb"), *ROOT.glob("docs/**/*.ipynb")}):
        yield path, sum(cell["cell_type"] == "code" for cell in json.loads(path.read_text())["cells"])


def counted():
    """What there is: {kind: number}, and (page, line, reason) of every block that is not run."""
    found = {page.relative_to(ROOT).as_posix(): blocks(page.read_text()) for page in pages()}
    left = [(name, one.line, one.not_run) for name, all_ in found.items() for one in all_ if one.not_run]
    examples = [len(PARSER.get_examples(text)) for _, _, text, _ in docstrings()]
    numbers = {
        "blocks": sum(map(len, found.values())),
        "blocks not run": len(left),
        "pages with blocks": sum(map(bool, found.values())),
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
