"""Pages that show what they print: their blocks run in order, and print what stands below them."""

import contextlib
import io
import re
from decimal import Decimal
from pathlib import Path

import pytest

DOCS = Path(__file__).parents[1] / "docs"
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
DECIMAL = re.compile(r"(-?\d+\.\d+)")


def examples(page):
    """(line, code, what it is said to print) for every python block; it prints what the text block right below says."""
    # Commands of a shell take minutes, and print nothing here.
    fences = [fence for fence in FENCE.finditer(page) if fence[1] != "sh"]
    assert {fence[1] for fence in fences} <= {"python", "text"}
    found = []
    for before, fence in zip([None, *fences], fences, strict=False):
        if fence[1] == "python":
            found.append([page.count("\n", 0, fence.start(2)), fence[2], ""])
        else:
            assert before is not None, "a text block stands before all python blocks"
            between = page[before.end() : fence.start()]
            assert before[1] == "python", "a text block follows another"
            assert not between.strip(), "a text block has no python block right above"
            found[-1][2] = fence[2]
    return [tuple(one) for one in found]


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


def run(page, name):
    """Run the page's blocks in one namespace; (line, printed, stated) of those that print something else."""
    names = {}
    wrong = []
    for line, code, stated in examples(page):
        with contextlib.redirect_stdout(io.StringIO()) as printed:
            # Line breaks first, so that a traceback names the page's line.
            exec(compile("\n" * line + code, name, "exec"), names)
        if not same(printed.getvalue(), stated):
            wrong.append((line, printed.getvalue(), stated))
    return wrong


def test_blocks_of_the_attribution_page_print_what_it_says(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    page = DOCS / "attribution.md"
    assert len(examples(page.read_text())) >= 10
    assert run(page.read_text(), str(page)) == []
    assert (tmp_path / "conflict.png").stat().st_size > 10_000


@pytest.mark.parametrize(
    ("name", "n"), [("scaling.md", 2), ("long_runs.md", 4), ("command_line.md", 6), ("fit_in.md", 4)]
)
def test_blocks_of_shorter_pages_print_what_they_say(name, n, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    page = DOCS / name
    assert len(examples(page.read_text())) == n
    assert run(page.read_text(), str(page)) == []


PAGE = """# A page

```python
n = 3
```

Then

```python
print("mean", f"{n / 8:.2f} [-0.10, 0.80], n = {n}")
print("second line")
```

```text
mean 0.38 [-0.10, 0.80], n = 3
second line
```

```python
print(f"{1 / n:.3f}")
```

```text
0.333
```
"""


def test_a_page_that_is_right():
    assert [line for line, _, _ in examples(PAGE)] == [3, 9, 19]
    assert run(PAGE, "page") == []
    # One in the last place, and spaces behind a line, as tables of pandas have.
    assert run(PAGE.replace("0.38", "0.37").replace("second line\n`", "second line  \n`"), "page") == []


@pytest.mark.parametrize(
    ("old", "new", "line"),
    [
        ("mean 0.38", "mean 0.36", 9),
        ("mean 0.38", "mean 0.4", 9),
        ("mean 0.38", "mean -0.38", 9),
        ("0.80], n = 3\n", "0.80], n = 4\n", 9),
        ("mean 0.38", "median 0.38", 9),
        ("mean 0.38", "mean  0.38", 9),
        ("\nsecond line\n", "\n", 9),
        ("second line\n`", "second line\n3\n`", 9),
        ("0.333", "0.335", 19),
        ("n = 3\n```", "n = 3\nprint(n)\n```", 3),
        ("```text\n0.333\n```", "", 19),
    ],
)
def test_a_page_that_is_wrong(old, new, line):
    assert PAGE.count(old) == 1
    assert [found for found, _, _ in run(PAGE.replace(old, new), "page")][-1:] == [line]


def test_a_changed_number_of_the_attribution_page_is_seen():
    """Every decimal that the page says is printed, moved by two in its last place."""
    stated = [text for _, _, text in examples((DOCS / "attribution.md").read_text())]
    moved = 0
    for text in stated:
        for number in DECIMAL.finditer(text):
            more = Decimal(number[1]) + Decimal(2).scaleb(Decimal(number[1]).as_tuple().exponent)
            assert not same(text, f"{text[: number.start()]}{more}{text[number.end() :]}")
            moved += 1
    assert moved > 100


@pytest.mark.parametrize(
    "page", ["```text\n1\n```\n", "```python\n1\n```\nand\n```text\n```\n", "```bash\nls\n```\n", "```text\n```\n" * 2]
)
def test_a_page_whose_blocks_stand_elsewhere_is_refused(page):
    with pytest.raises(AssertionError):
        examples(page)


def test_a_block_that_raises_names_the_line_of_the_page():
    with pytest.raises(ZeroDivisionError) as caught:
        run(PAGE.replace("n = 3\n```", "n = 3\n1 / 0\n```"), "page")
    assert (str(caught.traceback[-1].path), caught.traceback[-1].lineno) == ("page", 4)
