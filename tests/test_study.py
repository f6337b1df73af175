"""The study end to end: its tables, its files, its command, and what it says about models that know nothing."""

import json

import numpy as np
import pandas as pd
import pytest
import torch
import transformers
from conftest import make_config, make_pairs, save_classifier
from null_control import coverage, untrained_study

from rmtension import AblationContext, RewardHead, StudyOptions, StudyResult, TensionStudy, cli, evaluation, plots
from rmtension.errors import OptionError, ProvenanceError, RMTensionWarning, StorageError
from rmtension.report import to_text, write_report
from rmtension.study import TABLES

OPTIONS = StudyOptions(n_draws=2)


@pytest.fixture(scope="module")
def folders(tmp_path_factory, tokenizer):
    """Three reward models and a base, all with weights of their own."""
    made = {}
    for seed, name in enumerate(("helpful", "harmless", "mixed")):
        made[name] = save_classifier(tmp_path_factory.mktemp(name), "gpt2", tokenizer, seed=seed)
    made["base"] = tmp_path_factory.mktemp("base")
    with torch.random.fork_rng():
        torch.manual_seed(9)
        base = transformers.AutoModelForCausalLM.from_config(make_config("gpt2", len(tokenizer)))
    base.save_pretrained(made["base"])
    tokenizer.save_pretrained(made["base"])
    return made


@pytest.fixture(scope="module")
def world():
    pairs = make_pairs(80)
    return {name: pairs.filter(objective=name) for name in ("helpful", "harmless")}


def study_of(folders, world, **changes):
    models = {name: folders[name] for name in ("helpful", "harmless", "mixed")}
    return TensionStudy(models, world, **{"base": folders["base"], "options": OPTIONS} | changes)


@pytest.fixture(scope="module")
def result(folders, world):
    return study_of(folders, world).run(progress=False)


def test_numbers_are_those_of_the_parts(result, folders, world):
    """One cell of each table, computed again from the modules."""
    study = study_of(folders, world)
    mixed = RewardHead.from_pretrained(folders["mixed"])
    pairs = study.evaluating["harmless"]
    before = mixed.score_pairs(pairs)
    accuracy = result.accuracy.set_index(["model", "objective", "measure"])
    assert accuracy.loc[("mixed", "harmless", "accuracy"), "value"] == evaluation.accuracy(before).value
    assert accuracy.loc[("mixed", "harmless", "refusing"), "n"] == len(pairs.filter(subset="should_refuse"))
    assert ("mixed", "helpful", "refusing") not in accuracy.index
    neurons = result.neurons
    assert len(neurons) == 3 * 64
    assert neurons["in_shared"].sum() + neurons["in_helpful_only"].sum() == 20
    from rmtension import ActivationCollector, NeuronSet

    mask = torch.tensor(neurons["in_helpful_only"].to_numpy()).view(3, 64)
    helpful_only = NeuronSet(mask, "mlp", mixed.architecture)
    reference = ActivationCollector(mixed).collect(study.scoring["helpful"] + study.scoring["harmless"])
    with AblationContext(mixed, helpful_only, mode="mean", reference=reference):
        after = mixed.score_pairs(pairs)
    row = result.ablation.set_index(["set", "objective", "quantity"]).loc[("helpful only", "harmless", "margin")]
    assert row["effect"] == pytest.approx(float((after.margin - before.margin).double().mean()), abs=1e-6)
    assert row["per_neuron"] == pytest.approx(row["effect"] / len(helpful_only))
    assert row["after"] == pytest.approx(row["before"] + row["effect"], abs=1e-6)
    assert row["beyond_random"] == pytest.approx(row["effect"] - row["random_effect"], abs=1e-6)


def test_no_effect_is_measured_on_pairs_that_chose_neurons(folders, world):
    study = study_of(folders, world)
    for name in world:
        assert not set(study.scoring[name].prompts) & set(study.evaluating[name].prompts)
        assert len(study.scoring[name]) + len(study.evaluating[name]) == len(world[name])
    with pytest.raises(OptionError, match="prompts are in `pairs` too"):
        study_of(folders, world, scoring_pairs=world)


def test_sets_too_large_to_match_have_no_control(folders, world):
    """Nothing is lost: the effects stand, the columns of the control are NaN."""
    options = StudyOptions(n_draws=2, fraction=0.9)
    with pytest.warns(RMTensionWarning, match="No matched random sets"):
        found = study_of(folders, world, options=options).run(progress=False).ablation
    assert (found["n_draws"] == 0).any()
    assert found.loc[found["n_draws"] == 0, "beyond_random"].isna().all()
    assert found["effect"].notna().all()


def test_the_same_study_gives_the_same_tables(result, folders, world):
    again = study_of(folders, world).run(progress=False)
    for table in TABLES:
        pd.testing.assert_frame_equal(again.to_frame(table), result.to_frame(table), rtol=1e-6)


def test_results_survive_the_disk_and_are_not_overwritten(result, tmp_path):
    result.save(tmp_path / "study")
    loaded = StudyResult.load(tmp_path / "study")
    for table in TABLES:
        pd.testing.assert_frame_equal(loaded.to_frame(table), result.to_frame(table), check_dtype=False)
    assert loaded.summary == json.loads(json.dumps(result.summary))
    with pytest.raises(StorageError, match="already holds a study"):
        result.save(tmp_path / "study")
    result.save(tmp_path / "study", overwrite=True)
    with pytest.raises(StorageError, match="no whole study here"):
        StudyResult.load(tmp_path)
    with pytest.raises(OptionError, match="table"):
        result.to_frame("nothing")


def test_report_holds_every_table_and_figure(result, tmp_path):
    page = write_report(result, tmp_path).read_text()
    figures = sorted(path.name for path in tmp_path.glob("*.png"))
    assert figures == ["ablation_accuracy.png", "ablation_margin.png", "accuracy.png", "depth.png", "overlap.png"]
    assert all(f"({name})" in page for name in figures)
    assert page.count("## ") == 4
    text = to_text(result)
    for column in ("beyond random [interval]", "by chance", "value [interval]", "late"):
        assert column in text
        assert column in page


def test_figures_draw_into_a_given_axis(result):
    from matplotlib.figure import Figure

    for draw, table in (
        (plots.accuracy, "accuracy"),
        (plots.overlap, "overlap"),
        (plots.depth, "depth"),
        (plots.ablation, "ablation"),
    ):
        figure = Figure()
        axis = figure.add_subplot()
        assert draw(result.to_frame(table), axis) is figure
        assert axis.has_data()
        assert draw(result.to_frame(table)) is not figure
    with pytest.raises(OptionError, match="quantity"):
        plots.ablation(result.ablation, quantity="reward")


def test_wrong_arguments(folders, world, tmp_path, tokenizer):
    with pytest.raises(OptionError, match=r"models: expected exactly \['helpful', 'harmless', 'mixed'\]"):
        TensionStudy({"helpful": folders["helpful"]}, world)
    with pytest.raises(OptionError, match="pairs: expected exactly"):
        study_of(folders, {"helpful": world["helpful"]})
    for wrong in (
        {"fraction": 0.0},
        {"fraction": 1.5},
        {"mode": "resample"},
        {"n_draws": 1},
        {"by": "size"},
        {"level": 1.0},
    ):
        with pytest.raises(OptionError, match=next(iter(wrong))):
            StudyOptions(**wrong)
    with pytest.raises(OptionError, match="a base model has no reward"):
        study_of(folders, world, options=StudyOptions(method="gradient_x_activation"))
    other = save_classifier(tmp_path, "llama", tokenizer)
    with pytest.raises(ProvenanceError, match=r"architecture differs: 'mixed' is llama"):
        study_of({**folders, "mixed": other}, world).run(progress=False)


def test_untrained_models_show_nothing(tmp_path):
    """Negative control, a small part of `tests/null_control.py` (docs/controls.md has the whole).

    Three studies: 9 comparisons of sets and 36 ablation intervals, which are not independent of each other. The bounds
    leave room for that and still fail if intervals ignored the spread between random sets, or sets shared neurons.
    """
    results = [untrained_study(seed, tmp_path / str(seed), n_test=96, n_draws=5) for seed in range(3)]
    found = coverage(results)
    assert found["beyond random covers 0"] >= 0.85
    assert found["mean Jaccard"] == pytest.approx(found["expected by chance in each layer"], abs=0.02)
    assert found["p in each layer <= 0.05"] <= 3 / 9


def test_shuffled_labels_are_a_coin(tmp_path):
    """With labels turned by a coin, every accuracy is binomial: 3 models on 2 sets of pairs, 4 times."""
    results = [untrained_study(seed, tmp_path / str(seed), shuffle=True, n_test=96, n_draws=2) for seed in range(4)]
    accuracy = pd.concat([one.accuracy for one in results]).query("measure == 'accuracy' and model != 'length only'")
    covered = (accuracy["low"] <= 0.5) & (accuracy["high"] >= 0.5)
    assert len(covered) == 24
    assert covered.mean() >= 0.75


class TestCommand:
    def test_refuses_a_folder_with_a_study_before_any_work(self, result, tmp_path, capsys):
        result.save(tmp_path)
        assert cli.main(["demo", "--out", str(tmp_path)]) == 2
        assert "already holds a study" in capsys.readouterr().err

    def test_number_of_seeds(self, tmp_path, capsys):
        assert cli.main(["demo", "--out", str(tmp_path), "--seeds", "0"]) == 2
        assert "--seeds" in capsys.readouterr().err

    def test_version(self, capsys):
        with pytest.raises(SystemExit, match="0"):
            cli.main(["--version"])
        assert capsys.readouterr().out.startswith("rmtension 0.")

    def test_over_seeds(self, result):
        table = cli.over_seeds([result.accuracy, result.accuracy.assign(value=result.accuracy["value"] + 0.5)])
        first = result.accuracy.iloc[0]
        row = table.iloc[0]
        assert (row["model"], row["measure"]) == (first["model"], first["measure"])
        assert row["mean"] == pytest.approx(first["value"] + 0.25, abs=1e-3)
        assert np.isclose(row["max"] - row["min"], 0.5, atol=2e-3)
        assert row["n_seeds"] == 2
