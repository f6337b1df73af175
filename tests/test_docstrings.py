"""Examples in docstrings run, with the names that the first page of the reference makes for them."""

import doctest
import importlib
import re

import pytest
from documented import PARSER, ROOT, blocks, docstrings, limited, same
from tiny_models import grid

import rmtension

REFERENCE = ROOT / "docs" / "api"
FOUND = list(docstrings())
# Of those, whole studies, inspections and repairs.
LONG = ["replicate", "ModelInspection", "inspect_model", "Repair", "repair"]


class Checker(doctest.OutputChecker):
    """Decimals may differ by one in their last place, as on pages."""

    def check_output(self, want, got, optionflags):
        return super().check_output(want, got, optionflags) or same(got, want)


@pytest.fixture(scope="module")
def names(tmp_path_factory):
    """What the reference says examples use, made once: one small model for all of them."""
    (block,) = blocks((REFERENCE / "index.md").read_text())
    made = {name: getattr(rmtension, name) for name in rmtension.__all__}
    folder = tmp_path_factory.mktemp("docstrings")
    with pytest.MonkeyPatch.context() as patch, limited(60, "docs/api/index.md"):
        patch.chdir(folder)
        exec(compile(block.code, "docs/api/index.md", "exec"), made)
    return folder, made


def failures(module, name, text, line, names):
    """What the examples of one docstring get wrong, in doctest's words."""
    known = vars(importlib.import_module(module)) | names
    test = PARSER.get_doctest(text, dict(known), f"{module}.{name}", module, line - 1)
    reports = []
    doctest.DocTestRunner(Checker(), verbose=False, optionflags=doctest.ELLIPSIS).run(test, out=reports.append)
    return "".join(reports)


@pytest.mark.parametrize(
    ("module", "name", "text", "line"),
    grid(FOUND, keep=[entry for entry in FOUND if entry[1] not in LONG], unpack=True),
    ids=[f"{entry[0]}.{entry[1]}" for entry in FOUND],
)
def test_examples_print_what_they_show(module, name, text, line, names, monkeypatch):
    folder, made = names
    monkeypatch.chdir(folder)
    with limited(30, f"{module}.{name}"):
        assert failures(module, name, text, line, made) == ""


@pytest.mark.parametrize("wrong", [">>> 1 / 3\n0.35\n", ">>> head.n_layers\n3\n", ">>> nothing\n"])
def test_a_wrong_example_is_seen(wrong, names):
    assert "Failed example" in failures("rmtension.reward_head", "wrong", wrong, 1, names[1])
    assert (
        failures("rmtension.reward_head", "right", ">>> round(1 / 3, 3), head.n_layers\n(0.334, 2)\n", 1, names[1])
        == ""
    )


def test_examples_stand_under_their_heading():
    """Elsewhere they would be rendered as quotations."""
    for module, name, text, _ in FOUND:
        assert re.search(r"^ *Examples:\n +>>> ", text, re.MULTILINE), f"{module}.{name}"


def test_public_names_have_examples():
    with_examples = {name.partition(".")[0] for _, name, _, _ in FOUND}
    assert set(rmtension.__all__) - with_examples == {"__version__"}


def documented_names():
    pages = "\n".join(page.read_text() for page in REFERENCE.glob("*.md"))
    return re.findall(r"^::: rmtension\.([\w.]+)$", pages, re.MULTILINE)


def test_the_reference_has_what_the_readme_names():
    listed = documented_names()
    assert len(set(listed)) == len(listed), "no name is listed twice"
    assert set(rmtension.__all__) - {"__version__", "RMTensionError"} <= set(listed)
    parts = re.findall(r"^\| `(?:rmtension\.)?([\w.]+)` \|", (ROOT / "README.md").read_text(), re.MULTILINE)
    assert len(parts) >= 15
    for part in parts:
        assert any(
            path == part or path.endswith(f".{part}") or path.startswith(f"{part}.")
            for path in [*listed, "passes._collect_profiles.collect_profiles"]
        ), part


def test_every_name_of_the_reference_exists():
    for name in documented_names():
        owner, _, last = f"rmtension.{name}".rpartition(".")
        try:
            module = importlib.import_module(f"{owner}.{last}")
        except ModuleNotFoundError:
            module = getattr(importlib.import_module(owner), last)
        assert module.__doc__, name
