"""The package as users meet it: a cheap import, names, floors."""

import pkgutil
import re
import subprocess
import sys
from pathlib import Path

import pytest

import rmtension

ROOT = Path(__file__).parents[1]
MODULES = sorted(module.name for module in pkgutil.iter_modules(rmtension.__path__))
# Floors of the design: a module imports only from floors below its own.
FLOORS = [
    {"errors", "sites", "subtasks", "hooks", "norms", "provenance", "gates", "distributed"},
    {"files", "header"},
    {"storage"},
    {"chat", "heads", "neurons", "pair", "reading"},
    {"pairs", "neuron_scores"},
    {"pair_scores", "token_scores"},
    {"benchmarks", "intervals", "length"},
    {"encoding", "scored", "tokens", "controls", "overlap", "work"},
    {"packing", "last_block", "budget", "sums", "plain_run", "body", "checkpoints", "wrapping"},
    {"site_widths"},
    {"hooked_model"},
    # A head reaches from its methods to the modules that prove, decompose and export it, and these to ablation.
    {"reward_head", "stream", "nonfinite", "direct", "selfcheck", "activations", "ablation", "export", "replacing"},
    {"running_scores"},
    {"replay"},
    {"writes", "batch_run"},
    {"methods"},
    {"attribution", "evaluation", "profiles", "single_effects", "sweep", "agreement"},
    {"faithfulness"},
    {"shared", "transferability", "confidence", "conflict", "runs", "study_options"},
    {"causality"},
    {"curves", "collapse", "family_runs"},
    {"analyses", "study_result"},
    {"study", "world", "organisms", "trainer_run"},
    {"training"},
    {"family"},
    {"plots", "readable", "report", "check_matrix"},
    {"demo"},
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
