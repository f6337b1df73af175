"""A miniature of the recipe: a tiny base, an embedded world's pairs, all stages, a second run, an interruption."""

import numpy as np
import pandas as pd
import pytest
import torch
from drawn_scores import scores_of
from replication_place import make_place
from scipy import stats
from trained_folders import record

from rmtension.attribution import NeuronDashboards
from rmtension.errors import DataError, OptionError, StorageError
from rmtension.replication import Recipe, _plan, plan_replication, read_recipe, replicate
from rmtension.replication._faithful import _agreement, _planned_sets
from rmtension.replication._stages import STAGES

pytestmark = pytest.mark.grid  # a whole program

RECIPE = """
base: base
pairs: {helpful: [helpful.jsonl], harmless: harmless.jsonl}
seeds: [0]
max_length: 160
test_share: 0.5
validation_share: 0.1
training: {epochs: 1, learning_rate: 1e-3, batch_size: 12, trained_layers: 1, balance_length: true}
study: {n_draws: 2, n_subsamples: 2, curve_fractions: [0.1], scores: [mean_difference, change]}
paper: {n_draws: 2, n_subsamples: 2, curve_fractions: [0.1]}
n_scoring: 12
n_evaluating: 20
n_single: 8
n_faithful: 4
n_sets: 12
n_neurons: 6
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a recipe, its base and its pairs."""
    folder = tmp_path_factory.mktemp("replication")
    make_place(folder, RECIPE)
    return folder


@pytest.fixture(scope="module")
def done(place):
    stages = []
    # Reports without figures, which take longer than all else; tests/report looks after them.
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("rmtension.report._every_format.draw_pictures", lambda _: None)
        found = replicate(read_recipe(place / "recipe.yaml"), place / "out", progress=False, on_stage=stages.append)
    return found, stages


def test_all_stages_run_and_leave_their_results(place, done):
    found, stages = done
    assert [line.split(": ")[1] for line in stages if line.startswith("stage")] == list(STAGES)
    assert len(found.models) == 3
    assert {"accuracy", "overlap", "curves", "ablation", "equal_size"} <= set(found.corrected.tables)
    assert found.corrected.summary["options"]["replacement"] == "mean"
    assert found.paper.summary["options"]["replacement"] == "zero"
    assert (found.faithfulness.single["n"] == 8).all()
    assert len(found.faithfulness.sets) == 12
    for name in ("corrected/report.html", "published/report.html", "models.csv", "pairs.csv", "stages.csv"):
        assert (place / "out" / name).is_file()
    # Accuracies use all test pairs, ablations a sample of those that did not score neurons.
    counts = found.pairs.set_index(["objective", "what"])["pairs"]
    accuracy = found.corrected.accuracy.query("measure == 'accuracy' and model == 'mixed'")
    for name in ("helpful", "harmless"):
        n_test = counts[name, "scoring"] + counts[name, "evaluation"]
        assert (accuracy.query(f"objective == '{name}'")["n"] == n_test).all()
        assert found.corrected.summary["pairs"][name]["evaluating"] == 20
        assert found.corrected.summary["pairs"][name]["behaviour"] == n_test
    for result, tie_value in ((found.corrected, 0.5), (found.paper, 0.0)):
        assert result.summary["options"]["tie_value"] == tie_value
        assert {"accuracy", "transferability", "causality"} <= set(result.summary["options"]["analyses"])
    assert "scoring_pairs = {" in (place / "out" / "corrected" / "report.html").read_text()


def test_a_second_run_reads_everything_and_runs_nothing(place, done, monkeypatch):
    found, _ = done
    # Drawing the figures again takes most of the time, and they are drawn from the tables that are compared here.
    monkeypatch.setattr("rmtension.replication._replicate.write_report", lambda *_, **__: None)
    again = replicate(read_recipe(place / "recipe.yaml"), place / "out", progress=False)
    assert again.stages["run"].sum() == 0
    assert again.stages["read"].sum() > 0
    for name, frame in found.corrected.tables.items():
        pd.testing.assert_frame_equal(again.corrected.tables[name], frame)
    pd.testing.assert_frame_equal(again.faithfulness.sets, found.faithfulness.sets)


def test_neurons_may_be_described_later(place, done, monkeypatch):
    """Neurons of this model fire everywhere, so that no description can be scored; test_describe.py has others."""
    monkeypatch.setattr("rmtension.replication._replicate.write_report", lambda *_, **__: None)
    recipe = read_recipe(place / "recipe.yaml")
    assert NeuronDashboards.load(place / "out" / "neurons" / "seed-0.json").descriptions.empty
    replicate(recipe, place / "out", describe=lambda question: "no", progress=False)
    described = NeuronDashboards.load(place / "out" / "neurons" / "seed-0.json").descriptions
    assert described["reason"].str.startswith("too few texts").all()
    assert len(described) == recipe.n_neurons


def test_a_folder_belongs_to_one_recipe(place, done):
    with pytest.raises(StorageError, match="max_length='160' there, '150' now"):
        replicate(read_recipe(place / "recipe.yaml", {"max_length": 150}), place / "out", progress=False)


def test_more_seeds_belong_to_the_same_folder(place, done):
    recipe = read_recipe(place / "recipe.yaml", {"seeds": [0, 1]})
    plan = plan_replication(recipe, place / "out").set_index(["stage", "what"])
    assert ("models", "2 x mixed") in plan.index, "planned anew"


def test_no_prompt_is_in_two_splits(place, done):
    noted = record(place / "out" / "models" / "seed-0" / "mixed")
    counts = done[0].pairs.set_index(["objective", "what"])["pairs"]
    assert noted["n_pairs"] == 2 * min(counts["helpful", "train"], counts["harmless", "train"])
    assert noted["n_validation_pairs"] == counts["helpful", "validation"] + counts["harmless", "validation"]


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"seed": 1}, OptionError, "unknown key 'seed'.*seeds"),
        ({"pairs": {"helpful": "a.jsonl"}}, OptionError, "helpful.*harmless"),
        ({"training": {"epoch": 1}}, OptionError, "unknown key 'epoch'.*epochs"),
        ({"training": {"dtype": "int8"}}, OptionError, "dtype: expected one of"),
        ({"study": {"fractions": 0.1}}, OptionError, "unknown key 'fractions'"),
        ({"seeds": [1, 1]}, OptionError, "different numbers"),
        ({"test_share": 1.0}, OptionError, "between 0 and 1"),
        ({"n_evaluating": 0}, OptionError, "at least 1"),
        ({"base": None}, OptionError, "'base' is missing"),
        ({"seeds": 0}, OptionError, "seeds: expected a list of whole numbers, got 0"),
        ({"test_share": "0.2"}, OptionError, "test_share: expected a number, got '0.2'"),
        ({"jobs": 1.5}, OptionError, "jobs: expected a whole number, got 1.5"),
    ],
)
def test_wrong_recipes_are_refused(change, error, message, place):
    with pytest.raises(error, match=message):
        read_recipe(place / "recipe.yaml", change)


def test_missing_files_are_named(place, tmp_path):
    recipe = read_recipe(place / "recipe.yaml", {"pairs": {"helpful": "nothing.jsonl", "harmless": "b.jsonl"}})
    with pytest.raises(DataError, match=r"nothing\.jsonl, which does not exist"):
        replicate(recipe, tmp_path / "out", progress=False)


def test_agreement_over_sets_is_that_of_scipy():
    generator = np.random.default_rng(0)
    effect = generator.normal(size=30).round(1)  # with ties
    table = pd.DataFrame({"set": "", "size": 1, "effect": effect, "good": effect + generator.normal(size=30) / 4})
    table["same"] = 1.0
    good, same = _agreement(table, 0.95).to_dict("records")
    assert good["spearman"] == pytest.approx(stats.spearmanr(table["good"], effect).statistic, abs=1e-12)
    assert good["slope"] == pytest.approx(stats.linregress(table["good"], effect).slope, abs=1e-12)
    assert good["spearman_low"] < good["spearman"] < good["spearman_high"]
    # The standard error of a slope, by SciPy: the interval has about 4 of them.
    width = good["slope_high"] - good["slope_low"]
    assert width == pytest.approx(4 * stats.linregress(table["good"], effect).stderr, rel=0.4)
    assert np.isnan(same["spearman"])
    assert np.isnan(same["slope"])


def test_overlap_of_trained_layers_leaves_the_others_out(done):
    """Against sets made by pandas; below the trained layer, all models' sets by activations agree."""
    found, _ = done
    table = found.overlap_trained.set_index(["score", "a", "b", "without_base"])
    upper = found.corrected.neurons.query("layer == 1")
    tops = {
        model: set(upper[f"mean_difference_{model}"].abs().nlargest(3).index)  # 10% of 24, rounded up
        for model in ("helpful", "mixed", "base")
    }
    for without in (False, True):
        a, b = (tops[name] - (tops["base"] if without else set()) for name in ("helpful", "mixed"))
        expected = len(a & b) / len(a | b) if a | b else np.nan
        value = table.loc[("mean_difference", "helpful", "mixed", without), "jaccard"]
        assert value == pytest.approx(expected, nan_ok=True)
    lower = found.corrected.neurons.query("layer == 0")
    assert (lower["magnitude_helpful"] == lower["magnitude_mixed"]).all(), "the lower layer is the same"
    assert not (upper["magnitude_helpful"] == upper["magnitude_mixed"]).all()


def test_the_plan_comes_before_anything_is_trained(place, done, tmp_path):
    recipe = read_recipe(place / "recipe.yaml")
    plan = plan_replication(recipe, tmp_path / "out")
    assert not (tmp_path / "out" / "models").exists()
    assert (plan[["passes", "tokens"]] > 0).all(axis=None)
    assert plan["seconds"].sum() > 0
    size = plan.set_index(["stage", "what"])
    # One layer of two is trained: a pass through the other one, and one epoch.
    assert size.loc[("models", "1 x helpful"), "passes"] == pytest.approx(0.5 + 0.5 * _plan._TRAINING, abs=0.06)
    found, stages = done
    ablations = found.corrected.summary["options"]
    assert ablations["n_draws"] == 2
    assert any(line.startswith("Plan: about") for line in stages), "told before the trainings"
    # A second call reads it: the times are those of the first.
    pd.testing.assert_frame_equal(plan_replication(recipe, tmp_path / "out"), plan)


def test_sets_of_all_sizes_are_tried():
    drawn = torch.Generator().manual_seed(0)
    names = ("attribution_patching", "gradient_x_activation", "mean_difference")
    scores = {name: scores_of(torch.randn(4, 500, generator=drawn)) for name in names}
    for n in (10, 20, 60):
        sets = _planned_sets(scores, n)
        assert len(sets) == n
        assert {round(len(part) / 2000, 2) for part in sets.values()} == {0.01, 0.02, 0.05, 0.1, 0.2}


def test_a_recipe_needs_few_words():
    assert Recipe("base", {"helpful": ("a.jsonl",), "harmless": ("b.jsonl",)}).seeds == (0, 247, 932)
