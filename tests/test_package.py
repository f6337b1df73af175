"""The package as users meet it: a cheap import, names, floors."""

import pkgutil
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import jaxtyping
import pytest
import release
import torch
from beartype.roar import BeartypeCallHintParamViolation

import rmtension
from rmtension.sites import find_site

ROOT = Path(__file__).parents[1]
MODULES = sorted(module.name for module in pkgutil.iter_modules(rmtension.__path__))
# Floors of the design: a module imports only from floors below its own.
FLOORS = [
    {
        *("arguments", "distributed", "errors", "gates", "hooks", "norms", "packed", "progress", "provenance"),
        *("repr_html", "signs", "sites", "subtasks"),
    },
    {"files", "header", "outputs", "local_names", "data_files"},
    {"neuron_json"},
    {"storage"},
    {"chat", "heads", "neurons", "pair", "portable", "reading"},
    {"preference_format", "conversations"},
    {"rows"},
    {"pairs", "neuron_scores"},
    {"pair_scores", "token_scores"},
    {"benchmarks", "intervals", "length"},
    {"encoding", "scored", "tokens", "controls", "overlap", "work"},
    {"stored_heads"},
    {"adapters"},
    {
        "plain_weights",
        "projections",
        "packing",
        "last_block",
        "rope",
        "budget",
        "sums",
        "plain_run",
        "loading",
        "unembedding",
    },
    {"checkpoints", "hooked_transformer_body"},
    {"body"},
    {"wrapping"},
    {"lens_models"},
    {"site_widths"},
    {"hooked_model"},
    # A head reaches from its methods to the modules that prove, decompose and export it, and these to ablation.
    {
        "reward_head",
        "stream",
        "nonfinite",
        "direct",
        "selfcheck",
        "activations",
        "ablation",
        "export",
        "holding",
        "replacing",
        "lens_hooks",
    },
    {"running_scores"},
    {"replay"},
    {"writes", "batch_run"},
    {"methods"},
    {"attribution", "evaluation", "profiles", "single_effects", "sweep", "agreement"},
    {"faithfulness"},
    {"shared", "transferability", "confidence", "conflict", "runs", "study_options"},
    {"causality"},
    {"curves", "collapse", "family_runs"},
    # A result reaches from its `report` to what draws one.
    {
        "analyses",
        "study_result",
        "plots",
        "readable",
        "report",
        "findings",
        "neuron_pages",
        "neuron_drawing",
        "html_report",
    },
    {"study", "world", "organisms", "trainer_run"},
    {"training"},
    {"family"},
    {"check_matrix", "study_config", "study_neurons"},
    {"demo"},
    {"commands"},
    {"cli"},
]


@pytest.mark.parametrize(
    "code", ["import rmtension; rmtension.PreferencePairs", "from rmtension.cli import main; main(['--version'])"]
)
def test_import_is_cheap(code):
    """So are the command's help and version: `rmtension --help` answers within a second."""
    heavy = {"torch", "transformers", "transformer_lens", "matplotlib", "trl", "datasets", "scipy"}
    look = f"import atexit, sys; atexit.register(lambda: print(sorted(set(sys.modules) & {heavy})))\n{code}"
    ran = subprocess.run([sys.executable, "-c", look], capture_output=True, text=True, check=True)
    assert ran.stdout.splitlines()[-1] == "[]"


def test_the_suite_checks_types_and_shapes():
    """Of functions with shapes in their annotations, and of those without."""
    with pytest.raises(jaxtyping.TypeCheckError, match="layer neuron"):
        rmtension.NeuronSet(torch.zeros(3, dtype=torch.bool), "mlp", "toy")
    with pytest.raises(BeartypeCallHintParamViolation, match="3"):
        find_site(3)


def test_names():
    assert len(rmtension.__all__) <= 20
    assert rmtension.__all__ == sorted(rmtension.__all__)
    for name in rmtension.__all__:
        assert getattr(rmtension, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'Nothing'"):
        _ = rmtension.Nothing
    assert (ROOT / "rmtension" / "py.typed").exists()


def test_every_module_is_on_a_floor_and_imports_only_from_its_own_or_below():
    placed = {module: floor for floor, modules in enumerate(FLOORS) for module in modules}
    assert sorted(placed) == MODULES
    for module, floor in placed.items():
        files = [*(ROOT / "rmtension").glob(f"{module}.py"), *(ROOT / "rmtension" / module).glob("*.py")]
        text = "\n".join(path.read_text() for path in files)
        for imported in re.findall(r"^\s*from rmtension(?:\.(\w+))?(?:\.\w+)* import (.+)$", text, re.MULTILINE):
            names = [imported[0]] if imported[0] else re.findall(r"\w+", imported[1])
            for name in names:
                assert placed.get(name, 0) <= floor, f"{module} imports {name} from above"


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
    """Each `make` of `.ci/run`, in its order; among them the whole suite."""
    steps = re.findall(r"^make .+$", (ROOT / ".ci" / "run").read_text(), re.MULTILINE)
    assert "make test-all" in steps
    assert re.search(r"^test-all:.*\n\t\S+ -m pytest \$\(WORKERS\)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    workflow = (ROOT / ".github" / "workflows" / "ci.yml").read_text()
    assert len(steps) >= 6
    assert re.findall(r"^      - run: (make .+)$", workflow, re.MULTILINE) == steps
