"""The package as users meet it: a cheap import, names, floors."""

import importlib
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import jaxtyping
import pytest
import release
import signatures
import torch
from beartype.roar import BeartypeCallHintParamViolation
from import_graph import FLOORS, circles, floors, not_downward, read_graph

import rmtension
from rmtension._sites import find_site

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize(
    "code", ["import rmtension; rmtension.PreferencePairs", "from rmtension.cli import main; main(['--version'])"]
)
def test_import_is_cheap(code):
    """So are the command's help and version: `rmtension --help` answers within a second."""
    heavy = {"torch", "transformers", "transformer_lens", "matplotlib", "trl", "datasets", "scipy"}
    look = f"import atexit, sys; atexit.register(lambda: print(sorted(set(sys.modules) & {heavy})))\n{code}"
    ran = subprocess.run([sys.executable, "-c", look], capture_output=True, text=True, check=True)
    assert ran.stdout.splitlines()[-1] == "[]"


@pytest.mark.typed
def test_the_suite_checks_types_and_shapes():
    """Of functions with shapes in their annotations, and of those without."""
    with pytest.raises(jaxtyping.TypeCheckError, match="layer neuron"):
        rmtension.NeuronSet(torch.zeros(3, dtype=torch.bool), "mlp", "toy")
    with pytest.raises(BeartypeCallHintParamViolation, match="3"):
        find_site(3)


def test_names():
    assert len(rmtension.__all__) <= 25
    assert rmtension.__all__ == sorted(rmtension.__all__)
    for name in rmtension.__all__:
        assert getattr(rmtension, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'Nothing'"):
        _ = rmtension.Nothing
    assert (ROOT / "rmtension" / "py.typed").exists()


def test_modules_form_no_circle():
    """Strongly connected components over all imports: inside functions and under TYPE_CHECKING too."""
    assert circles(read_graph(ROOT / "rmtension").arrows) == []


def test_every_package_imports_only_from_lower_floors():
    graph = read_graph(ROOT / "rmtension")
    assert not_downward(graph.by_package().arrows, FLOORS) == []


def graph_of(folder, texts):
    """That of a package in `folder` with the given modules: path in it -> text."""
    for name, text in {"__init__": "", **texts}.items():
        path = folder / f"{name}.py"
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
    return read_graph(folder)


class TestImportGraph:
    """What the two tests above use, on small packages: every way of importing is seen, and other libraries are not."""

    @pytest.mark.parametrize(
        "line",
        [
            "import toy.b",
            "import os, toy.b as other",
            "from toy.b import name",
            "from toy import b",
            "from . import b",
            "from .b import name",
            "def late():\n    from toy.b import name",
            "if TYPE_CHECKING:\n    import toy.b",
            "class A:\n    def late(self):\n        import toy.b",
        ],
    )
    def test_a_planted_circle_is_found(self, line, tmp_path):
        graph = graph_of(tmp_path / "toy", {"a": line, "b": "from toy.c import x", "c": "import toy.a"})
        assert circles(graph.arrows) == [["a", "b", "c"]]
        graph = graph_of(tmp_path / "toy", {"a": line, "b": "from toy.c import x", "c": "import os"})
        assert circles(graph.arrows) == []
        assert floors(graph.arrows) == [["c", "toy"], ["b"], ["a"]]

    def test_other_libraries_and_names_are_no_modules(self, tmp_path):
        text = "import toyota.b\nfrom os import b\n'from toy.b import name'  # import toy.b"
        assert graph_of(tmp_path / "toy", {"a": text, "b": ""}).arrows["a"] == set()
        # A public name is imported from the package itself, which imports what it names.
        graph = graph_of(tmp_path / "toy", {"__init__": "from toy.a import Name", "a": "from toy import Name"})
        assert circles(graph.arrows) == [["a", "toy"]]

    def test_two_circles_that_do_not_meet(self):
        arrows = {"a": ["b"], "b": ["a"], "c": ["d", "a"], "d": ["e"], "e": ["c"], "f": ["c", "f"]}
        assert circles(arrows) == [["c", "d", "e"], ["a", "b"]]
        assert floors(arrows) == [["a", "b"], ["c", "d", "e"], ["f"]]

    def test_a_planted_import_from_above_is_found(self, tmp_path):
        texts = {
            "low/x": "",
            "low/y": "from toy.low.x import one",
            "side/x": "",
            "high/x": "from toy.low.y import two",
        }
        given = [["toy", "low", "side"], ["high"]]
        assert not_downward(graph_of(tmp_path / "toy", texts).by_package().arrows, given) == []
        texts["low/x"] = "def late():\n    import toy.high.x\n    import toy.side.x"
        texts["rest"] = ""
        assert not_downward(graph_of(tmp_path / "toy", texts).by_package().arrows, given) == [
            "rest is on no floor",
            "low (floor 1) imports from high (floor 2)",
            "low (floor 1) imports from side (floor 1)",
        ]

    def test_modules_are_in_the_packages_that_are_said(self, tmp_path):
        texts = {"one/a": "import toy.one.b", "one/b": "import toy.two.c", "two/c": "import toy.top", "top": ""}
        packages = graph_of(tmp_path / "toy", texts).by_package()
        assert packages.arrows == {"one": {"two"}, "two": {"top"}, "top": set(), "toy": set()}

    def test_the_program(self, tmp_path):
        graph_of(tmp_path / "rmtension", {"store": "import rmtension.errors", "errors": "import rmtension.store"})
        ran = subprocess.run(
            [sys.executable, ROOT / "tests" / "programs" / "import_graph.py", "--root", tmp_path],
            capture_output=True, text=True, check=True,
        )  # fmt: skip
        assert (
            "3 modules, 2 arrows between them, floors: 1\ncircles of modules: 1\n  of 2: errors store\n" in ran.stdout
        )


def test_the_sdist_holds_all_that_is_tracked():
    """So that its tests find what they read: every file and folder at the top of the repository."""
    tracked = subprocess.run(["git", "-C", str(ROOT), "ls-files"], capture_output=True, text=True)
    if tracked.returncode:
        pytest.skip("no checkout: this is an unpacked sdist")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    included = set(project["tool"]["hatch"]["build"]["targets"]["sdist"]["include"])
    # The last two hatchling adds by itself.
    assert {path.partition("/")[0] for path in tracked.stdout.split()} == included | {".gitignore", "pyproject.toml"}


def test_one_version_everywhere():
    found, _ = release.versions(ROOT)
    assert set(found.values()) == {rmtension.__version__}


@pytest.mark.parametrize(
    ("file", "old", "new"),
    [
        ("pyproject.toml", 'version = "0.1.0"', 'version = "0.1.1"'),
        ("CITATION.cff", "version: 0.1.0", "version: 0.1.1"),
        ("CITATION.cff", "version: 0.1.0\n", ""),
        ("CHANGELOG.md", "## 0.1.0", "## 0.1.1"),
        ("CHANGELOG.md", "(2026-01-02)", "(unreleased)"),
        ("CHANGELOG.md", "# Changelog\n", "# Changelog\n\n## 0.2.0 (2026-01-03)\n"),
    ],
)
def test_the_release_check_sees_what_differs(file, old, new, tmp_path):
    """On files that are about to be released as 0.1.0, and then with one change."""
    (tmp_path / "pyproject.toml").write_text('[project]\nversion = "0.1.0"\n')
    (tmp_path / "CITATION.cff").write_text("cff-version: 1.2.0\nversion: 0.1.0\n")
    (tmp_path / "CHANGELOG.md").write_text("# Changelog\n\n## 0.1.0 (2026-01-02)\n\nFirst.\n\n## 0.0.1 (2026-01-01)\n")
    assert release.problems(tmp_path, "v0.1.0") == []
    assert len(release.problems(tmp_path, "v0.2.0")) == 3
    text = (tmp_path / file).read_text()
    assert old in text
    (tmp_path / file).write_text(text.replace(old, new))
    (said,) = release.problems(tmp_path, "v0.1.0")
    assert file in said


def test_the_citation_has_what_the_format_requires():
    """Keys that CFF 1.2.0 requires, and the paper whose method this is."""
    citation = (ROOT / "CITATION.cff").read_text()
    for key in ("cff-version: 1.2.0", "message:", "title: rmtension", "authors:", "license: MIT", "type: software"):
        assert re.search(f"^{key}", citation, re.MULTILINE), key
    assert "https://arxiv.org/abs/2606.13209" in citation


def test_the_workflow_runs_what_the_checks_run():
    """Each `make` of `.ci/run`, in its order; among them the whole suite, every law of it with types checked."""
    steps = re.findall(r"^make .+$", (ROOT / ".ci" / "run").read_text(), re.MULTILINE)
    assert "make test-all" in steps
    whole = r"^test-all:.*\n\t\S+ -m pytest \$\(WORKERS\) -m \"not grid\"\n\t\S+ -m pytest .*\$\(WORKERS\) -m grid$"
    assert re.search(whole, (ROOT / "Makefile").read_text(), re.MULTILINE)
    workflow = (ROOT / ".github" / "workflows" / "ci.yml").read_text()
    assert len(steps) == 5
    assert {"check", "docs"} <= set(steps[1].split())
    assert re.findall(r"^      - run: (make .+)$", workflow, re.MULTILINE) == steps


ROOM_NAMES = sorted(path.parent.name for path in (ROOT / "rmtension").glob("*/__init__.py"))
# Public modules that are commands of their own: `python -m rmtension.synthetic.check_matrix`.
COMMANDS = {"check_matrix"}


@pytest.mark.parametrize("name", ROOM_NAMES)
def test_a_package_lists_its_public_names(name):
    """Sorted, at most twenty; modules that are not among them begin with an underscore."""
    public = importlib.import_module(f"rmtension.{name}").__all__
    assert public == sorted(public)
    assert len(public) <= 20
    modules = {path.stem for path in (ROOT / "rmtension" / name).glob("*.py")}
    assert {one for one in modules if not one.startswith("_")} <= {*public, *COMMANDS}


# Where a package or module has no page of its own.
PAGE_OF = {"distributed": "running", "errors": "running", "reward_head": "models", "store": "running"}


def test_every_public_name_is_in_the_reference():
    """On the page of its package, and by its shortest path."""
    names = signatures.public_names()
    found = {}
    for page in (ROOT / "docs" / "api").glob("*.md"):
        for name in re.findall(r"^::: rmtension\.([\w.]+)$", page.read_text(), re.MULTILINE):
            found[name] = page.stem
    assert set(found) <= {*names, *signatures.modules()}
    pages = {path: found.get(path, found.get(module)) for path, (module, _) in names.items()}
    rooms = {path: module.partition(".")[0] for path, (module, _) in names.items()}
    assert pages == {path: PAGE_OF.get(room, room) for path, room in rooms.items()}


def has_example(module, path, value):
    """Whether a docstring of the object or of a public method has one, or one of its public module names it."""
    holders, members = [importlib.import_module(f"rmtension.{module}")], [value]
    if isinstance(value, type):
        own = [one for one in value.__mro__ if one.__module__.startswith("rmtension")]
        members += [member for one in own for name, member in vars(one).items() if not name.startswith("_")]
    elif not callable(value):
        # A constant has the docstring of its type.
        holders, members = [*holders, *(getattr(holders[0], name) for name in holders[0].__all__)], []
    naming = re.compile(rf"^ *(?:>>>|\.\.\.) .*\b{path.rpartition('.')[2]}\b", re.MULTILINE)
    return any(">>> " in (getattr(member, "__doc__", None) or "") for member in members) or any(
        naming.search(holder.__doc__ or "") for holder in holders
    )


def test_every_public_name_has_an_example():
    """`tests/test_docstrings.py` runs them all."""
    names = signatures.public_names()
    assert not [path for path, (module, value) in names.items() if not has_example(module, path, value)]


def test_the_table_of_signatures_is_current():
    """If not: `python tests/programs/signatures.py --write`, and read what changed."""
    assert signatures.PAGE.read_text(encoding="utf-8") == signatures.page()


def test_calls_have_at_most_eight_keyword_only_parameters():
    """Apart from trainings. `StudyOptions` is a dataclass of options, and the typed dictionaries are no calls."""
    calls = [call for found in signatures.calls().values() for call in found if not call.is_dictionary]
    many = {call.path for call in calls if len(call.keyword_only) > 8}
    assert many == {f"training.train_{what}" for what in ("base_model", "reward_model", "family", "seeds")}
