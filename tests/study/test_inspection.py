"""Inspection of one model: its tables equal the library's single calls, and its plan keeps to the budget."""

import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch
from tiny_models import grid

from rmtension import (
    ActivationCollector,
    Mean,
    NeuronAttribution,
    PreferencePairs,
    RewardHead,
    ablation_effects,
)
from rmtension.errors import OptionError, StorageError
from rmtension.evaluation import accuracy, length_baseline, mean_margin
from rmtension.report import write_report
from rmtension.store._work_folder import claim
from rmtension.study import (
    InspectionPlan,
    ModelInspection,
    ModelInspector,
    _inspection,
    inspect_model,
)
from rmtension.study._inspection_findings import _number
from rmtension.study._inspection_plan import choose_plan, parse_budget
from rmtension.study._inspection_run import _top
from rmtension.study._speed import Speed, duration, measure_speed
from rmtension.synthetic import make_organism


@pytest.fixture(scope="module")
def organism(tmp_path_factory):
    return make_organism(tmp_path_factory.mktemp("organism") / "model", n_pairs=24)


@pytest.fixture(scope="module")
def model(organism):
    return RewardHead.from_pretrained(organism.folder, dtype=torch.float64)


@pytest.fixture(scope="module")
def both(organism):
    return organism.pairs["helpful"] + organism.pairs["harmless"]


@pytest.fixture(scope="module")
def inspector(model, both):
    return ModelInspector(model, both, by="objective", fraction=0.06)


@pytest.fixture(scope="module")
def inspection(inspector):
    return inspector.run(progress=False)


@pytest.fixture(scope="module")
def halves(inspector):
    """The pairs that score neurons and those that measure effects, by group."""
    return inspector._halves(inspector._used(inspector.plan))


class TestTables:
    def test_groups_have_the_accuracy_margin_and_length_baseline_of_single_calls(self, model, both, inspection):
        table = inspection.to_frame("groups").set_index(["group", "measure"])
        for name in ("helpful", "harmless"):
            scored = model.score_pairs(both.filter(objective=name))
            expected = {
                "accuracy": accuracy(scored),
                "margin": mean_margin(scored),
                "longer response": length_baseline(scored.pairs),
            }
            for measure, estimate in expected.items():
                row = table.loc[name, measure]
                assert (row["value"], row["low"], row["high"], row["n"]) == pytest.approx(
                    (estimate.value, estimate.low, estimate.high, estimate.n), abs=1e-9
                )

    def test_scores_and_standard_errors_are_those_of_attribution_on_the_scoring_half(self, model, halves, inspection):
        groups = [halves[0][name] for name in ("helpful", "harmless")]
        means = Mean(ActivationCollector(model).collect(groups[0] + groups[1]))
        attribution = NeuronAttribution(model, "attribution_patching", replacement=means)
        for name, part in zip(("helpful", "harmless"), groups, strict=True):
            expected = attribution.score(part)
            found = inspection.scores[name]
            assert torch.allclose(found.values, expected.values, atol=1e-9)
            assert torch.allclose(found.stderr, expected.stderr, atol=1e-9)
            assert found.provenance.n_pairs == len(part)

    def test_effects_are_those_of_ablation_effects_on_the_other_half(self, model, halves, inspection):
        joined, ordered = (half["helpful"] + half["harmless"] for half in halves)
        sets = {name: _top(scores, 0.06) for name, scores in inspection.scores.items()}
        means = Mean(ActivationCollector(model).collect(joined))
        expected = ablation_effects(model, sets, ordered, means, by="objective", n_draws=8, progress=False)
        found = inspection.to_frame("effects")
        found = found[found["set"].isin(sets)].reset_index(drop=True)
        assert list(found["group"]) == list(expected["group"])
        numbers = expected.select_dtypes("number").columns
        assert np.allclose(found[numbers], expected[numbers], atol=1e-9, equal_nan=True)

    @pytest.mark.parametrize("seed", grid(range(5)))
    def test_halves_share_no_prompt_and_are_even_in_every_group(self, model, both, seed):
        """Also in a small group, and for a prompt of two groups."""
        labels = ["small" if row < 9 else "large" for row in range(len(both))]
        twice = both + PreferencePairs(replace(pair, id="", chosen=f"{pair.chosen} end") for pair in both[:9])
        inspector = ModelInspector(model, twice, by=[*labels, *["copy"] * 9], seed=seed)
        scoring, evaluating = inspector._halves(inspector._used(inspector.plan))
        prompts = [{pair.prompt for part in side.values() for pair in part} for side in (scoring, evaluating)]
        assert not prompts[0] & prompts[1]
        assert list(scoring) == ["small", "large", "copy"]
        for name in scoring:
            assert abs(len(scoring[name].prompts) - len(evaluating[name].prompts)) <= 1

    def test_items_are_used_whole(self, both):
        """An item of which the budget left out some pairs would be easier."""
        items = PreferencePairs(
            replace(pair, prompt=both[row // 3 * 3].prompt, item=f"item {row // 3}", id="")
            for row, pair in enumerate(both)
        )
        used = _inspection._sampled(items, 10, seed=0)
        assert {len(rows) for rows in used.items} == {3}
        assert len(used) == 12

    def test_the_top_sets_hold_planted_neurons_and_random_sets_do_less(self, organism, inspection):
        """Helpfulness neurons support helpful pairs only: their ablation leaves the other margin as it is."""
        effects = inspection.to_frame("effects")
        margins = effects[effects["quantity"] == "margin"].set_index(["set", "group"])
        top = _top(inspection.scores["helpful"], 0.06)
        planted = organism.truth["helpful"] | organism.truth["shared"]
        assert len(top & planted) == len(planted)
        own = margins.loc["helpful", "helpful"]
        assert own["effect"] < own["random_effect"] - 0.5

    def test_one_group_needs_no_map(self, model, organism):
        alone = inspect_model(model, organism.pairs["helpful"], fraction=0.06, budget=600, progress=False)
        assert list(alone.scores) == ["all pairs"]
        assert alone.to_frame("maps").empty
        assert set(alone.to_frame("effects")["set"]) == {"all pairs"}


class TestGroups:
    def test_a_group_with_one_pair_is_evaluated_and_said_to_be_too_small(self, model, both):
        labels = ["alone" if row == 0 else "rest" for row in range(len(both))]
        result = inspect_model(model, both, by=labels, budget=600, progress=False)
        assert list(result.scores) == ["rest"]
        notes = result.to_frame("groups").drop_duplicates("group").set_index("group")["note"]
        assert "too few prompts" in notes["alone"]
        assert notes["rest"] == ""
        assert any(sentence.startswith("alone (1 pair") for sentence in result.undecided())

    def test_groups_that_are_all_too_small_are_refused(self, model, both):
        labels = [str(row) for row in range(len(both))]
        with pytest.raises(OptionError, match="by: no group has at least 4 prompts in either half"):
            ModelInspector(model, both, by=labels)

    @pytest.mark.parametrize(
        ("options", "expected"),
        [
            ({"by": "objektive"}, "by: no pair has a label 'objektive'. Did you mean 'objective'"),
            ({"fraction": 0.0}, "fraction: expected a share of the neurons"),
            ({"budget": "soon"}, "budget: expected seconds or a text such as '90s'"),
            ({"budget": 1e-6}, "budget: the smallest inspection of these pairs takes about"),
        ],
    )
    def test_wrong_arguments_name_a_next_step(self, model, both, options, expected):
        with pytest.raises(OptionError, match=expected):
            ModelInspector(model, both, **options)

    def test_no_pairs_are_refused(self, model):
        with pytest.raises(OptionError, match="pairs: expected at least one pair"):
            ModelInspector(model, PreferencePairs([]))


class TestPlan:
    SPEED = Speed(forward=1e-4, gradient=3e-4, ablation=6e-5, neuron=2e-5, fixed=0.01)

    def plan(self, both, budget, most_pairs=10**6):
        groups = {name: both.filter(objective=name) for name in ("helpful", "harmless")}
        return choose_plan(self.SPEED, groups, budget=budget, n_all_neurons=96, most_pairs=most_pairs)

    def test_a_smaller_budget_gives_a_smaller_inspection_that_fits(self, both):
        whole = self.plan(both, None)
        least = self.plan(both, None, most_pairs=0)
        plans = [self.plan(both, share * whole.seconds) for share in (1.0, 0.8, 0.6)]
        assert [plan.seconds for plan in plans] == sorted((plan.seconds for plan in plans), reverse=True)
        assert plans[0].seconds == whole.seconds
        for plan, share in zip(plans, (1.0, 0.8, 0.6), strict=True):
            assert plan.seconds <= share * whole.seconds
            assert plan.n_draws >= 2
        assert sum(least.pairs.values()) == 48, "all 24 pairs per group"

    def test_an_impossible_budget_says_the_least(self, both):
        with pytest.raises(OptionError, match=r"Give at least (\d+) seconds") as error:
            self.plan(both, 0.01)
        least = int(str(error.value).rpartition("Give at least ")[2].split()[0])
        assert self.plan(both, least).seconds <= least

    def test_the_plan_prints_its_steps_and_times(self, inspector):
        text = repr(inspector.plan)
        assert text.startswith("Inspection of 48 pairs in 2 groups, about ")
        assert [line.split()[0] for line in text.splitlines()[1:]] == list(inspector.plan.to_frame()["step"])
        assert isinstance(inspector.plan, InspectionPlan)

    @pytest.mark.parametrize(
        ("text", "seconds"), [("90s", 90), ("20min", 1200), ("1.5h", 5400), ("7 m", 420), (30, 30), ("45", 45)]
    )
    def test_budgets_are_read(self, text, seconds):
        assert parse_budget(text) == seconds

    def test_durations_are_readable(self):
        assert [duration(seconds) for seconds in (0.34, 42, 120, 7200)] == ["0.34 s", "42 s", "2 min", "2.0 h"]

    def test_every_speed_is_measured(self, model, both):
        speed = measure_speed(model, both[:8], site="mlp", fraction=0.02, seed=0)
        assert all(0 < getattr(speed, name) < 1 for name in ("forward", "gradient", "ablation", "neuron", "fixed"))


class TestResult:
    def test_a_saved_inspection_loads_equal(self, inspection, tmp_path):
        folder = inspection.save(tmp_path / "saved")
        loaded = ModelInspection.load(folder)
        assert loaded.findings() == inspection.findings()
        assert loaded.undecided() == inspection.undecided()
        assert list(loaded.maps) == list(inspection.maps)
        assert torch.equal(loaded.scores["helpful"].values, inspection.scores["helpful"].values)
        with pytest.raises(StorageError, match="holds an inspection"):
            inspection.save(folder)
        inspection.save(folder, overwrite=True)

    @pytest.mark.parametrize("names", grid([("True", "False"), ("1", "2"), ("<b>", "a/b $x$ _y")]))
    def test_any_labels_survive_saving(self, model, both, names, tmp_path):
        """Also those that a CSV reader takes for numbers; the figures of the page are drawn."""
        labels = [names[row % 2] for row in range(len(both))]
        result = inspect_model(model, both, by=labels, progress=False)
        loaded = ModelInspection.load(result.save(tmp_path / "saved"))
        assert loaded.findings() == result.findings()
        assert loaded.undecided() == result.undecided()
        assert write_report(loaded, tmp_path / "page").stat().st_size > 10_000

    def test_a_folder_of_another_run_is_refused(self, model, both, inspector, tmp_path):
        (tmp_path / "work").mkdir()
        claim(tmp_path / "work", inspector._inputs())
        other = ModelInspector(model, both, by="objective", fraction=0.1)
        with pytest.raises(StorageError, match="fraction"):
            other.run(folder=tmp_path)

    def test_another_folder_is_refused(self, tmp_path):
        with pytest.raises(StorageError, match="has no finished inspection"):
            ModelInspection.load(tmp_path)

    @pytest.mark.grid
    def test_an_interrupted_run_resumes_with_the_same_numbers(
        self, model, both, inspector, inspection, tmp_path, monkeypatch
    ):
        """Stopped in the faithfulness step: the passes before are not run again."""

        def stop(*_, **__):
            raise KeyboardInterrupt

        with monkeypatch.context() as patch:
            patch.setattr("rmtension.study._inspection_run.faithfulness", stop)
            with pytest.raises(KeyboardInterrupt):
                inspector.run(folder=tmp_path, progress=False)
        kept = sorted(path.name for path in (tmp_path / "work").iterdir())
        assert kept == ["ablations", "attribution", "inputs.json", "means", "plan.json", "rewards"]
        # A later call that times the model anew, and would choose another plan, follows the first one.
        again = ModelInspector(model, both, by="objective", fraction=0.06)
        again.plan = replace(again.plan, n_draws=2)
        resumed = again.run(folder=tmp_path, progress=False)
        assert resumed.findings() == inspection.findings()
        assert not (tmp_path / "work").exists()

    def test_failed_checks_come_first(self, inspection):
        checks = inspection.to_frame("checks").assign(passed=True)
        tables = dict(inspection.tables) | {"checks": checks}
        right = ModelInspection(tables, inspection.scores, inspection.maps, None, None, inspection.summary)
        checks.loc[1, "passed"] = False
        assert right.findings()[0].startswith("1 of ")
        checks["passed"] = True
        assert right.findings()[0].startswith("Ablating the ")

    def test_sentences_hold_the_numbers_of_the_tables(self, inspection):
        effects = inspection.to_frame("effects").query("quantity == 'margin'").set_index(["set", "group"])
        row = effects.loc["helpful", "helpful"]
        (sentence,) = [text for text in inspection.findings() if " most support helpful changes" in text]
        scale = abs(row["before"])
        for name in ("before", "after"):
            assert _number(row[name], scale) in sentence
        shown = [_number(row[name], scale, sign=True) for name in ("effect", "low", "high", "random_effect")]
        assert f"{shown[0]} [{shown[1]}, {shown[2]}]" in sentence
        assert shown[3] in sentence

    @pytest.mark.parametrize(
        ("value", "scale", "text"),
        [(1e-9, 3.0, "0.00"), (-0.004, 0.05, "-0.0040"), (4.8, 4.8, "+4.80"), (120.4, 300.0, "+120")],
    )
    def test_rounding_noise_is_shown_as_zero(self, value, scale, text):
        assert _number(value, scale, sign=True) == text

    def test_every_two_groups_have_a_map(self, inspection):
        assert list(inspection.maps) == list(itertools.combinations(("helpful", "harmless"), 2))
        row = inspection.to_frame("maps").iloc[0]
        report = inspection.maps["helpful", "harmless"]
        assert row["cosine"] == report.cosine.value
        assert row["support_both"] == report.counts()["both up"]
