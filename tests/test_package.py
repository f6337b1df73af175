"""The package as users meet it: a cheap import, names, the README's block, docstring examples."""

import doctest
import importlib
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
    {"preference_format"},
    {"pairs", "neuron_scores"},
    {"pair_scores", "token_scores"},
    {"benchmarks", "intervals", "length"},
    {"encoding", "scored", "tokens", "controls", "overlap", "work"},
    {"packing", "last_block", "budget", "sums", "plain_run", "body", "checkpoints", "wrapping"},
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
    {"analyses", "study_result"},
    {"study", "world", "organisms", "trainer_run"},
    {"training"},
    {"family"},
    {"plots", "readable", "report", "check_matrix", "study_config"},
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


@pytest.mark.parametrize("name", MODULES)
def test_docstring_examples(name):
    results = doctest.testmod(importlib.import_module(f"rmtension.{name}"))
    assert results.failed == 0


def test_docstring_examples_exist():
    finder = doctest.DocTestFinder()
    modules = [importlib.import_module(f"rmtension.{name}") for name in MODULES]
    assert sum(bool(test.examples) for module in modules for test in finder.find(module)) >= 5


def test_readme_block_runs(capsys):
    (block,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    exec(compile(block, "README.md", "exec"), {})
    printed = capsys.readouterr().out
    assert re.search(r"Jaccard \d\.\d{3}, by chance 0\.05\d", printed)
    assert printed.count("ScoredPairs(n=48") == 2


def test_blocks_of_the_families_page_run(tmp_path, monkeypatch):
    """With a small model that has a chat template, and the names that the page takes for granted."""
    import torch
    from conftest import make_pairs, make_tokenizer, save_classifier

    monkeypatch.chdir(tmp_path)
    tokenizer = make_tokenizer(tmp_path / "tokenizer")
    tokenizer.chat_template = "{% for m in messages %}<{{ m.role }}> {{ m.content }} {% endfor %}"
    head = rmtension.RewardHead.from_pretrained(save_classifier(tmp_path / "model", "gpt2", tokenizer))
    pairs = make_pairs(4)
    tokens = tokenizer(["bake a cake", "help"], return_tensors="pt", padding=True)
    mask = torch.zeros(3, 64, dtype=torch.bool)
    mask[0, :5] = True
    names = {
        "head": head,
        "PreferencePairs": rmtension.PreferencePairs,
        "rows": [pair.to_dict() for pair in pairs],
        "input_ids": tokens["input_ids"],
        "attention_mask": tokens["attention_mask"],
        "neurons": rmtension.NeuronSet(mask, "mlp", head.architecture),
        "means": rmtension.ActivationCollector(head, site="mlp").collect(pairs),
    }
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "families.md").read_text(), re.DOTALL)
    assert len(blocks) == 2
    for block in blocks:
        exec(compile(block, "docs/families.md", "exec"), names)
    assert names["pruned"].score(["help"]) is not None
    assert rmtension.RewardHead.from_pretrained("folder").score(["help"]).equal(names["pruned"].score(["help"]))
