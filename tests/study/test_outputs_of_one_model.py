"""Outputs of one model in the place of models: studies, inspections, and the neurons that an organism was given."""

import html
import json
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from rmtension import PreferencePairs, RewardHead, StudyOptions, TensionStudy
from rmtension.attribution import NeuronAttribution
from rmtension.cli import main
from rmtension.errors import OptionError, ProvenanceError
from rmtension.evaluation._intervals import Estimate
from rmtension.neurons import SharedNeuronAnalyzer, conflict
from rmtension.report import study_neurons, write_report
from rmtension.study import ModelInspection, ModelOutput, inspect_model
from rmtension.study._config import make_config
from rmtension.study._inspection_outputs import chosen_outputs, correlation
from rmtension.study._model_output import OpenCheckpoints
from rmtension.synthetic import make_two_output_organism

sys.path.append(str(Path(__file__).parents[1] / "programs"))

from two_outputs import one_run

SMALL = {"depth": 2, "width": 24, "per_kind": 2, "n_pairs": 48}
OBJECTIVES = ("helpful", "harmless")
SUM = {"helpful": 1.0, "harmless": 1.0}
FEW = StudyOptions(
    n_draws=2, n_subsamples=2, curve_fractions=(0.125,), fraction=0.125, analyses=("scores", "causality")
)


@pytest.fixture(scope="module")
def organism(tmp_path_factory):
    return make_two_output_organism(tmp_path_factory.mktemp("two"), **SMALL)


@pytest.fixture(scope="module")
def model(organism):
    return organism.head(output="all", max_length=64)


@pytest.fixture(scope="module")
def outputs(model):
    return {**{name: model.output(name) for name in OBJECTIVES}, "mixed": model.output(SUM)}


@pytest.fixture(scope="module")
def lazy(organism):
    """The same outputs of the folder."""
    return {
        name: ModelOutput(organism.folder, output)
        for name, output in zip((*OBJECTIVES, "mixed"), (*OBJECTIVES, SUM), strict=True)
    }


@pytest.fixture(scope="module")
def pairs_file(organism, tmp_path_factory):
    path = tmp_path_factory.mktemp("pairs") / "both.jsonl"
    rows = [pair.to_dict() for part in organism.pairs.values() for pair in part]
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


# -- the organism ------------------------------------------------------------------------------------------------------


def test_each_output_adds_what_the_table_says(organism, model):
    adds = {"helpful": (1, 0), "harmless": (0, 1), "shared": (1, 1), "conflict": (0.5, -0.5), "decoy": (0, 0)}
    frame = "\n\nHuman: a b c d e\n\nAssistant: {} end"
    filler = "f " * 22
    texts = [frame.format(f"{filler}{kind}-1 {kind}-0") for kind in adds]
    rewards = torch.stack([model.output(name).score(texts) for name in OBJECTIVES], dim=1)
    empty = torch.stack([model.output(name).score([frame.format(f"{filler}f f")]) for name in OBJECTIVES], dim=1)
    assert torch.allclose(rewards - empty, 2 * torch.tensor(list(adds.values())), atol=0.01)
    for name, part in organism.pairs.items():
        assert model.output(name).score_pairs(part).accuracy() == 1.0


def test_shared_specific_and_conflicting_neurons_are_found_in_one_model(tmp_path):
    runs = one_run(tmp_path, 0, **SMALL)
    for found in ("two outputs, own pairs", "two outputs, all pairs"):
        assert runs[found] == dict.fromkeys(("shared", "conflict", "helpful", "harmless"), 1.0)
    for control in ("one output for both", "outputs swapped", "random sets"):
        assert runs[control]["conflict"] == 0.0, control
        assert runs[control]["harmless"] == 0.0, control


@pytest.mark.grid
@pytest.mark.parametrize("seed", range(3))
def test_they_are_found_in_larger_and_noisy_organisms(tmp_path, seed):
    runs = one_run(tmp_path, seed, noise=0.01, superposition=0.05)
    assert min(runs["two outputs, own pairs"].values()) == 1.0
    assert max(runs["random sets"].values()) < 0.5


def test_the_analyzer_takes_outputs_in_the_place_of_models(organism, outputs):
    scores = {
        name: NeuronAttribution(outputs[name], "gradient_x_activation").score(organism.pairs[name])
        for name in OBJECTIVES
    }
    report = SharedNeuronAnalyzer(scores).analyze(fraction=0.125)
    truth = organism.truth
    assert report.shared == truth["shared"] | truth["conflict"]
    assert report.specific == {name: truth[name] for name in OBJECTIVES}
    assert {where.output for where in report.provenance.values()} == set(OBJECTIVES)
    assert len({where.body for where in report.provenance.values()}) == 1


def test_conflict_of_two_models_is_still_refused(organism, model, tmp_path):
    other = make_two_output_organism(tmp_path, **SMALL, seed=1).head(output="harmless")
    scores = [
        NeuronAttribution(each, "gradient_x_activation").per_pair(organism.pairs["helpful"])
        for each in (model.output("helpful"), other)
    ]
    with pytest.raises(ProvenanceError, match="model differs"):
        conflict(*scores)


# -- studies -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def result(outputs, organism):
    return TensionStudy(outputs, organism.pairs, options=FEW).run(progress=False)


@pytest.mark.grid
def test_a_study_of_outputs_equals_that_of_three_models_of_one_row(organism, outputs, result, tmp_path):
    separate = {}
    for name, output in outputs.items():
        output.save_pretrained(tmp_path / name)
        separate[name] = RewardHead.from_pretrained(tmp_path / name)
        assert len(separate[name].outputs) == 1
    reading = replace(FEW, scores=("attribution_patching",))
    expected = TensionStudy(separate, organism.pairs, options=reading).run(progress=False)
    assert result.tables.keys() == expected.tables.keys()
    for name, table in result.tables.items():
        assert table.equals(expected.tables[name]), name


@pytest.mark.grid
def test_a_study_finds_the_planted_sets(organism, result):
    table = result.neurons
    truth = organism.truth
    mask = torch.tensor(table["in_shared"].to_numpy(dtype=bool)).view(2, 24)
    assert torch.equal(mask, (truth["shared"] | truth["conflict"]).mask)
    effects = result.tables["ablation"].query("control == 'layer' and quantity == 'margin'")
    beyond = {(row.set, row.objective): (row.beyond_low, row.beyond_high) for row in effects.itertuples()}
    for name, other in zip(OBJECTIVES, reversed(OBJECTIVES), strict=True):
        assert beyond[f"{name} only", name][1] < -0.1
        assert max(map(abs, beyond[f"{name} only", other])) < 0.01


@pytest.mark.grid
def test_a_checkpoint_is_opened_once_for_its_outputs(lazy, organism, result, tmp_path, monkeypatch):
    opened = []
    open_model = ModelOutput.open
    monkeypatch.setattr(ModelOutput, "open", lambda self: opened.append(self.output) or open_model(self))
    study = TensionStudy(lazy, organism.pairs, options=FEW)
    from_folder = study.run(folder=tmp_path, progress=False)
    assert len(opened) == 1
    for name, table in from_folder.tables.items():
        assert table.equals(result.tables[name]), name
    again = TensionStudy(lazy, organism.pairs, options=FEW)
    again.run(folder=tmp_path, progress=False)
    assert (again.n_run, again.n_read) == (0, study.n_run)
    swapped = {**lazy, "helpful": lazy["harmless"], "harmless": lazy["helpful"]}
    heads = OpenCheckpoints()
    assert heads.head(swapped["helpful"]).output_name == "harmless"
    assert study_neurons(study, n=1, progress=False).neurons


@pytest.mark.grid
def test_the_report_says_that_the_models_are_outputs(result, tmp_path):
    assert result.summary["families"][0]["outputs"] == {"helpful": "helpful", "harmless": "harmless", "mixed": SUM}
    write_report(result, tmp_path)
    page = (tmp_path / "report.md").read_text()
    assert "outputs of one model" in page
    assert "helpful + harmless" in page
    assert f'ModelOutput("model-0", {SUM})' in html.unescape((tmp_path / "report.html").read_text())


def test_scores_that_read_activations_only_are_refused(outputs, organism, model):
    assert TensionStudy(outputs, organism.pairs).options.scores == ("attribution_patching",)
    for options in (StudyOptions(scores=("attribution_patching", "magnitude")), StudyOptions.of("paper")):
        with pytest.raises(OptionError, match=r"scores=\('attribution_patching',\)"):
            TensionStudy(outputs, organism.pairs, options=options)
    means = StudyOptions(scores=("mean_difference",))
    assert TensionStudy(outputs, organism.pairs, options=means).options == means
    TensionStudy(outputs, organism.pairs, options=StudyOptions.of("paper", analyses=("accuracy",)))
    one = dict.fromkeys(outputs, model.output("helpful"))
    assert TensionStudy(one, organism.pairs).options.scores == ("mean_difference", "magnitude")


def test_outputs_in_a_yaml_file(organism, pairs_file, tmp_path):
    models = {name: {"model": str(organism.folder), "output": name} for name in OBJECTIVES}
    for mixed, output in ((SUM, SUM), (["helpful", 1], ("helpful", 1)), (0, 0)):
        entry = {"model": str(organism.folder), "output": mixed}
        values = {"models": {**models, "mixed": entry}, "pairs": str(pairs_file)}
        config = make_config(values, folder=tmp_path, where="study.yaml")
        assert config.families[0].mixed == ModelOutput(organism.folder, output)
    for wrong, message in (
        ({"model": str(organism.folder)}, r"mixed: the key 'output' is missing"),
        ({"model": str(organism.folder), "output": 1.5}, r"mixed.output: expected the name or number"),
        ({"model": str(organism.folder), "output": {}}, r"mixed.output: expected the name or number"),
        ({"model": str(organism.folder), "outputs": 1}, r"unknown key 'outputs'"),
    ):
        with pytest.raises(OptionError, match=message):
            make_config(values | {"models": {**models, "mixed": wrong}}, folder=tmp_path, where="study.yaml")
    with pytest.raises(OptionError, match=r"base: expected text"):
        make_config(values | {"models": {**models, "mixed": entry, "base": entry}}, folder=tmp_path, where="a")


@pytest.mark.grid
def test_outputs_on_the_command_line(organism, pairs_file, tmp_path, capsys):
    command = ["study", "--model", str(organism.folder), "--pairs", str(pairs_file), "--neurons", "0", "--quiet"]
    rest = ["--analyses", "accuracy", "--out", str(tmp_path / "out")]
    assert main([*command, "--outputs", "helpful=helpful", "harmless=1", *rest]) == 0
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert summary["families"][0]["outputs"] == {"helpful": "helpful", "harmless": 1, "mixed": {"helpful": 1, "1": 1}}
    capsys.readouterr()
    for flags, message in (
        (["--outputs", "helpful=helpful"], "no output is named for 'harmless'"),
        (["--outputs", "kind=helpful"], "expected helpful=OUTPUT, harmless=OUTPUT"),
        ([], "expected --outputs too"),
        (["--helpful", "./a", "--outputs", "helpful=helpful"], "expected --model with --outputs"),
    ):
        assert main([*command, *flags, *rest]) == 2
        assert message in capsys.readouterr().err


# -- inspections -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def inspection(outputs, organism):
    pairs = organism.pairs["helpful"] + organism.pairs["harmless"]
    return inspect_model(
        outputs["helpful"], pairs, by="objective", fraction=0.125, outputs=["harmless"], progress=False
    )


@pytest.mark.grid
def test_an_inspection_compares_outputs(organism, outputs, inspection, tmp_path):
    (report,) = inspection.output_maps.values()
    truth = organism.truth
    assert report.sets["both up"] == truth["shared"]
    assert report.sets["helpful up, harmless down"] == truth["conflict"]
    assert report.sets["helpful only up"] == truth["helpful"]
    assert report.sets["harmless only up"] == truth["harmless"]
    row = inspection.to_frame("output_maps").iloc[0]
    assert (row["support_both"], row["first_against_second"], row["first_only"], row["second_only"]) == (2, 2, 2, 2)
    table = inspection.to_frame("outputs").set_index(["output", "group", "measure"])["value"]
    for name, part in organism.pairs.items():
        margins = [outputs[output].score_pairs(part).margin.numpy() for output in OBJECTIVES]
        assert table["harmless", name, "accuracy"] == (margins[1] > 0).mean()
        assert table["harmless", name, "correlation"] == pytest.approx(np.corrcoef(*margins)[0, 1], abs=1e-6)
    assert any(sentence.startswith("Outputs helpful and harmless: 2 neurons") for sentence in inspection.findings())
    inspection.save(tmp_path / "saved")
    loaded = ModelInspection.load(tmp_path / "saved")
    assert loaded.to_frame("output_maps").equals(inspection.to_frame("output_maps"))
    assert loaded.output_maps.keys() == inspection.output_maps.keys()
    page = write_report(inspection, tmp_path / "page").read_text()
    assert "Neurons that outputs share or fight over" in page


@pytest.mark.grid
def test_an_inspection_on_the_command_line(organism, pairs_file, tmp_path):
    command = ["inspect", str(organism.folder), str(pairs_file), "--by", "objective", "--quiet"]
    out = ["--output", "helpful", "--outputs", "all", "--fraction", "0.125", "--out", str(tmp_path / "out")]
    assert main([*command, *out]) == 0
    assert (tmp_path / "out" / "output_maps.csv").exists()


def test_wrong_outputs_of_an_inspection_are_refused(outputs, organism, head, model):
    pairs = organism.pairs["helpful"]
    for wrong, message in (
        (["helpful"], "other than 'helpful'"),
        (["harmful"], "Did you mean"),
        ([], "other than 'helpful'"),
    ):
        with pytest.raises(OptionError, match=message):
            inspect_model(outputs["helpful"], pairs, outputs=wrong)
    with pytest.raises(OptionError, match="expected a list of outputs or 'all'"):
        chosen_outputs(outputs["helpful"], 3)
    with pytest.raises(OptionError, match="expected a model with several outputs"):
        inspect_model(head, pairs, outputs=["harmless"])


def test_the_correlation_of_margins_is_pearsons_with_a_bootstrap_over_prompts():
    rng = np.random.default_rng(0)
    rows = [{"prompt": f"{n // 2}", "chosen": "a", "rejected": "b", "id": str(n)} for n in range(80)]
    pairs = PreferencePairs.from_records(rows)
    first = torch.from_numpy(rng.normal(size=80) + 1e4)
    second = 0.5 * first + torch.from_numpy(rng.normal(size=80))
    estimate = correlation(first, second, pairs, level=0.95, seed=0)
    assert isinstance(estimate, Estimate)
    assert estimate.value == pytest.approx(np.corrcoef(first, second)[0, 1], abs=1e-9)
    resampled = []
    for _ in range(2000):
        drawn = np.concatenate([(2 * n, 2 * n + 1) for n in rng.integers(40, size=40)])
        resampled.append(np.corrcoef(first[drawn], second[drawn])[0, 1])
    assert (estimate.low, estimate.high) == pytest.approx(np.quantile(resampled, [0.025, 0.975]), abs=0.03)
