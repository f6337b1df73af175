"""The study end to end: its tables, its files, its folder of passes, its command, and models that know nothing."""

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
import transformers
from null_control import intervals_of, shares, untrained_study
from planted import planted_run
from tiny_models import make_config, make_pairs, save_classifier

from rmtension import (
    AblationContext,
    ActivationCollector,
    Mean,
    NeuronAttribution,
    NeuronSet,
    PreferencePairs,
    RewardHead,
    StudyOptions,
    StudyResult,
    TensionStudy,
)
from rmtension.errors import OptionError, ProvenanceError, StorageError
from rmtension.evaluation import _metrics as evaluation
from rmtension.evaluation._intervals import Estimate, over_seeds
from rmtension.passes._collect_profiles import collect_profiles
from rmtension.study._family_runs import FamilyRuns, ModelFamily
from rmtension.study._options import ANALYSES
from rmtension.study._result import POOLED, TABLES

OPTIONS = StudyOptions(n_draws=2, n_subsamples=2, curve_fractions=(0.1, 1.0))
MODELS = ("helpful", "harmless", "mixed")


def save_base(folder, family, tokenizer):
    with torch.random.fork_rng():
        torch.manual_seed(9)
        transformers.AutoModelForCausalLM.from_config(make_config(family, len(tokenizer))).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def folders(tmp_path_factory, tokenizer):
    """Two seeds of three reward models and one base, all with weights of their own."""
    made = [
        {
            name: save_classifier(tmp_path_factory.mktemp(name), "gpt2", tokenizer, seed=10 * seed + number)
            for number, name in enumerate(MODELS)
        }
        for seed in (0, 1)
    ]
    base = save_base(tmp_path_factory.mktemp("base"), "gpt2", tokenizer)
    return [one | {"base": base} for one in made]


@pytest.fixture(scope="module")
def families(folders):
    return [ModelFamily(**one, name="toy", seed=seed) for seed, one in enumerate(folders)]


@pytest.fixture(scope="module")
def world():
    pairs = make_pairs(80)
    return {name: pairs.filter(objective=name) for name in ("helpful", "harmless")}


@pytest.fixture(scope="module")
def passes(tmp_path_factory):
    return tmp_path_factory.mktemp("passes")


@pytest.fixture(scope="module")
def study(families, world):
    return TensionStudy(families, world, options=OPTIONS)


@pytest.fixture(scope="module")
def result(study, passes):
    found = study.run(folder=passes, progress=False)
    assert study.n_run > 100
    return found


class TestTables:
    def test_ten_analyses_give_every_table(self, result):
        assert set(result.tables) == set(TABLES)
        assert len(ANALYSES) == 10
        for name, frame in result.tables.items():
            assert frame.columns[:2].tolist() == ["family", "seed"], name
            assert set(frame["family"]) == {"toy"}
            assert len(frame), name
            if name != "overlap":
                assert set(frame["seed"]) == {0, 1}, name

    def test_behaviour_is_that_of_the_modules(self, result, study, folders):
        mixed, helpful = (RewardHead.from_pretrained(folders[1][name]) for name in ("mixed", "helpful"))
        pairs = study.evaluating["harmless"]
        scored, other = mixed.score_pairs(pairs), helpful.score_pairs(pairs)
        table = result.accuracy.set_index(["seed", "model", "objective", "measure"])
        assert table.loc[(1, "mixed", "harmless", "accuracy"), "value"] == evaluation.accuracy(scored).value
        refusing = len(pairs.filter(subset="should_refuse"))
        assert table.loc[(1, "mixed", "harmless", "refusing"), "n"] == refusing
        assert (1, "mixed", "helpful", "refusing") not in table.index
        found = result.comparisons.query("seed == 1 and second == 'helpful' and objective == 'harmless'")
        assert set(found["subset"]) == {"all", "should_refuse", "should_respond"}
        whole = found.query("subset == 'all'").iloc[0]
        assert whole["difference"] == pytest.approx(scored.accuracy() - other.accuracy())
        adjusted = result.comparisons.query("subset != 'all'")
        assert (adjusted["q_value"] >= adjusted["p_value"] - 1e-12).all()
        assert result.comparisons.query("subset == 'all'")["q_value"].isna().all()
        macro = table.loc[(1, "mixed", "harmless", "accuracy, mean of subsets"), "value"]
        assert macro == pytest.approx(evaluation.by_subset(scored)["accuracy"].mean())

    def test_neurons_are_those_of_the_modules(self, result, study, folders):
        mixed, base = (
            RewardHead.from_pretrained(folders[0]["mixed"]),
            RewardHead.from_language_model(folders[0]["base"]),
        )
        everything = study.scoring["helpful"] + study.scoring["harmless"]
        profile = collect_profiles(mixed, everything, base=base)["mlp", "all"]
        neurons = result.neurons.query("seed == 0")
        for score in ("magnitude", "change", "mean_difference"):
            expected = profile.scores(score).values.flatten().numpy()  # noqa: PD011 - tensors
            assert neurons[f"{score}_mixed"].to_numpy() == pytest.approx(expected, abs=1e-6)
        assert "change_base" not in neurons
        assert "selectivity_base" in neurons
        helpful = collect_profiles(RewardHead.from_pretrained(folders[0]["helpful"]), study.scoring["helpful"])
        expected = helpful["mlp", "all"].scores("mean_difference").values.flatten().numpy()  # noqa: PD011 - tensors
        assert neurons["mean_difference_helpful"].to_numpy() == pytest.approx(expected, abs=1e-6), "its own objective"
        sizes = result.sets.query("seed == 0 and score == 'mean_difference'").set_index("model")["size"]
        assert sizes.tolist() == [20] * 4
        assert neurons["in_shared"].sum() + neurons["in_helpful_only"].sum() == 20

    def test_causes_are_those_of_the_context(self, result, study, folders):
        mixed = RewardHead.from_pretrained(folders[0]["mixed"])
        mask = torch.tensor(result.neurons.query("seed == 0")["in_helpful_only"].to_numpy(dtype=bool)).view(3, 64)
        helpful_only = NeuronSet(mask, "mlp", mixed.architecture)
        reference = ActivationCollector(mixed).collect(study.scoring["helpful"] + study.scoring["harmless"])
        pairs = study.evaluating["harmless"]
        before = mixed.score_pairs(pairs)
        with AblationContext(mixed, helpful_only, Mean(reference)):
            after = mixed.score_pairs(pairs)
        rows = result.ablation.query("seed == 0").set_index(["set", "objective", "quantity", "control"])
        row = rows.loc[("helpful only", "harmless", "margin", "layer")]
        assert row["effect"] == pytest.approx(float((after.margin - before.margin).double().mean()), abs=1e-6)
        assert row["size"] == len(helpful_only)
        assert set(rows.reset_index()["set"]) == {"helpful only", "harmless only", "shared", "mixed top", "base top"}
        table = result.ablated_transferability.query("seed == 0 and objective == 'harmless'")
        whole = result.transferability.query("seed == 0 and objective == 'harmless'").set_index("quantity")["value"]
        nothing = table.query("set == 'nothing'").set_index("quantity")["value"]
        assert nothing["transferability"] == whole["transferability"]
        assert set(table["set"]) == {"nothing", "helpful only", "harmless only", "shared", "mixed top", "base top"}
        own = result.cross_objective.query("seed == 0 and model == 'mixed' and score == 'magnitude'")
        assert set(own["subset"]) == {"informative", "compliance", "should_refuse", "should_respond"}

    def test_seeds_are_compared_with_each_other(self, result):
        """The ceiling: one objective's top sets of two seeds, with and without the base's."""
        rows = result.overlap.query("kind == 'seeds' and score == 'magnitude'")
        assert rows["a"].tolist() == [f"{name} (seed 0)" for name in MODELS for _ in range(2)]
        assert rows["without_base"].tolist() == [False, True] * 3
        three = result.overlap.query("kind == 'three-way' and score == 'magnitude' and seed == 0")
        assert three["size_b"].tolist()[0] == 20
        assert len(result.overlap.query("kind == 'models' and score == 'change' and seed == 0")) == 3, "no base change"

    def test_over_seeds_agrees_with_hand_computation(self, result):
        pooled = result.over_seeds("accuracy").set_index(["model", "objective", "measure"])
        rows = result.accuracy.query("model == 'mixed' and objective == 'helpful' and measure == 'margin'")
        row = pooled.loc[("mixed", "helpful", "margin")]
        items = Estimate(rows["value"].mean(), rows["low"].mean(), rows["high"].mean(), 0, 0)
        expected = over_seeds(items, rows["value"].tolist())
        assert (row["value"], row["low"], row["high"]) == pytest.approx((expected.value, expected.low, expected.high))
        assert (row["n_seeds"], row["min"]) == (2, rows["value"].min())
        for name in POOLED:
            frame = result.over_seeds(name)
            assert (frame["n_seeds"] <= 2).all()
        shares_of = result.over_seeds("accuracy").query("measure != 'margin'")
        assert shares_of["low"].min() >= 0
        assert shares_of["high"].max() <= 1, "no accuracy above 1"
        three = result.over_seeds("overlap").query("kind == 'three-way'")
        assert three[["jaccard_low", "jaccard_high"]].isna().all(axis=None), "no interval is made up"
        with pytest.raises(OptionError, match="table: expected one of"):
            result.over_seeds("neurons")

    def test_random_controls_differ_between_draws(self, result):
        margins = result.curves.query("score == 'random' and fraction == 0.1 and seed == 0 and model == 'mixed'")
        assert margins.groupby("objective")["margin"].nunique().tolist() == [3, 3]


def top_of(values, size=20):
    """The indices of the largest magnitudes."""
    return set(np.argsort(-np.abs(np.asarray(values)), kind="stable")[:size].tolist())


def row_of(result, **where):
    table = result.stability
    for name, value in where.items():
        table = table[table[name] == value]
    (row,) = table.to_dict("records")
    return row


class TestStability:
    """Counted again with NumPy from the scores of all neurons."""

    def test_every_score_and_model_has_its_rows(self, result):
        changed = set(
            result.stability.query("score == 'mean_difference' and model == 'mixed' and seed == 0")["changed"]
        )
        assert changed == {
            *("half of the prompts", "new prompts (expected)", "positions: response"),
            *("score: magnitude", "score: change", "seed: 1"),
        }
        assert (result.stability["size"] == 20).all()
        shares = result.stability["share"]
        assert shares.between(0, 1).all()
        assert shares.nunique() > 5

    def test_another_score_is_counted_by_hand(self, result):
        neurons = result.neurons.query("seed == 1")
        for model in MODELS:
            one, other = (top_of(neurons[f"{score}_{model}"].to_numpy()) for score in ("mean_difference", "magnitude"))
            row = row_of(result, seed=1, score="mean_difference", model=model, changed="score: magnitude")
            assert row["share"] == len(one & other) / 20
            layers = neurons["layer"].to_numpy()
            n = [[sum(layers[index] == layer for index in some) for some in (one, other)] for layer in range(3)]
            assert row["chance"] == pytest.approx(sum(a * b / 64 for a, b in n) / 20)

    def test_another_seed_is_counted_by_hand(self, result):
        for model in MODELS:
            one, other = (top_of(result.neurons.query(f"seed == {seed}")[f"change_{model}"]) for seed in (0, 1))
            row = row_of(result, seed=0, score="change", model=model, changed="seed: 1")
            assert row["share"] == len(one & other) / 20

    def test_other_positions_are_those_of_a_profile(self, result, study, folders):
        head = RewardHead.from_pretrained(folders[0]["mixed"])
        parts = [
            collect_profiles(head, pairs, positions=("response",))["mlp", "response"]
            for pairs in study.scoring.values()
        ]
        scores = (parts[0] + parts[1]).scores("mean_difference")
        at_response = top_of(scores.to_frame()["score"])
        neurons = result.neurons.query("seed == 0")
        row = row_of(result, seed=0, score="mean_difference", model="mixed", changed="positions: response")
        assert row["share"] == len(at_response & top_of(neurons["mean_difference_mixed"].to_numpy())) / 20


class TestPasses:
    def test_a_second_run_with_an_added_analysis_runs_no_model(
        self, families, world, passes, result, monkeypatch, tmp_path
    ):
        """Seen by taking away everything that runs a model or opens one."""

        def refuse(*_, **__):
            raise AssertionError("a model was run, or opened")

        monkeypatch.setattr(RewardHead, "residual", refuse)
        monkeypatch.setattr(RewardHead, "from_pretrained", refuse)
        monkeypatch.setattr(RewardHead, "from_language_model", refuse)
        first = TensionStudy(families, world, options=StudyOptions(n_draws=2, analyses=("accuracy",)))
        partial = first.run(folder=passes, progress=False)
        assert set(partial.tables) == {"accuracy", "subsets", "comparisons"}
        again = TensionStudy(families, world, options=OPTIONS)
        whole = again.run(folder=passes, progress=False)
        assert again.n_run == 0
        assert again.n_read > 100
        for name, frame in whole.tables.items():
            pd.testing.assert_frame_equal(frame, result.tables[name], check_exact=True)
        # Negative control: a study of other pairs has to run them.
        swapped = {name: part.swapped() for name, part in world.items()}
        other = TensionStudy(families, swapped, options=OPTIONS)
        with pytest.raises(StorageError, match=r"a run with other settings: helpful .*pairs"):
            other.run(folder=passes, progress=False)
        shutil.copytree(passes / "runs", tmp_path / "runs")
        with pytest.raises(AssertionError, match="a model was run"):
            other.run(folder=tmp_path, progress=False)

    @pytest.mark.grid
    def test_the_same_study_gives_the_same_tables(self, families, world):
        """To the last bit, on one thread. Across numbers of threads, see test_threads.py."""
        options = replace(OPTIONS, scores=("mean_difference",), curve_fractions=(0.1,))
        first, second = (TensionStudy(families[0], world, options=options).run(progress=False).tables for _ in range(2))
        for name, frame in second.items():
            pd.testing.assert_frame_equal(frame, first[name], check_exact=True)

    @pytest.mark.grid
    def test_overwriting_runs_other_models_in_the_same_folder(self, families, folders, world, tmp_path):
        """As `rmtension demo --overwrite` does after a change of the library has changed what training gives."""
        options = StudyOptions(analyses=("accuracy",))
        first = TensionStudy(families[0], world, options=options)
        first.run(folder=tmp_path, progress=False)
        other = TensionStudy(ModelFamily(**folders[1], name="toy", seed=0), world, options=options)
        with pytest.raises(StorageError, match="a run with other settings"):
            other.run(folder=tmp_path, progress=False)
        result = other.run(folder=tmp_path, overwrite=True, progress=False)
        assert (other.n_run, other.n_read) == (6, 0)
        pd.testing.assert_frame_equal(result.accuracy, other.run(progress=False).accuracy)
        # What was overwritten is gone, and is not mistaken for the new models' passes.
        with pytest.raises(StorageError, match="a run with other settings"):
            first.run(folder=tmp_path, progress=False)

    @pytest.mark.grid
    def test_the_cost_is_what_runs(self, families, world, tmp_path):
        """Every pass over the pairs of one objective is one file."""
        options = replace(OPTIONS, scores=("attribution_patching", "magnitude"), curve_fractions=(0.07,))
        study = TensionStudy(families[0], world, options=options)
        result = study.run(folder=tmp_path, progress=False)
        cost = study.cost().set_index("analysis")
        assert cost.index.tolist() == list(ANALYSES)
        assert cost.loc["accuracy", "rewards"] == 3
        # Four profiles, of which three run the base too, and the means of three models.
        assert cost["forward"].sum() == 7 + 3
        # A specialist is scored on its own half of the pairs; `stability` has response tokens, and zeros for means.
        assert cost["gradient"].sum() == 0.5 + 0.5 + 1 + 2
        assert cost.loc["sets", "gradient"] == 2
        # The mixed model's top set is in two analyses, the smallest sets are not drawn again at equal size, and empty
        # sets do not run.
        whole = result.equal_size.query("n_subsamples == 1")["set"].nunique()
        empty = 5 - result.equal_size["set"].nunique()
        saved = 1 + whole * options.n_subsamples + empty * (1 + 2 * options.n_draws + options.n_subsamples)
        n_files = len(list((tmp_path / "runs").glob("rewards-*")))
        assert n_files == 2 * (cost["rewards"].sum() + cost["ablations"].sum() - saved)
        assert len(list((tmp_path / "runs").glob("attribution-*"))) == 3 + 2
        twice = TensionStudy(families, world, options=options).cost().set_index("analysis")
        pd.testing.assert_frame_equal(twice, 2 * cost)

    def test_scores_by_replacement_use_the_replacement_of_ablations(self, families, study):
        options = replace(OPTIONS, scores=("attribution_patching",))
        scored = {}
        for replacement in ("mean", "zero"):
            family = FamilyRuns(
                families[0], study.scoring, study.evaluating, options=replace(options, replacement=replacement)
            )
            scored[replacement] = family.scores_of("attribution_patching", "mixed").values  # noqa: PD011 - tensors
        mixed = RewardHead.from_pretrained(families[0].mixed)
        both = study.scoring["helpful"] + study.scoring["harmless"]
        means = Mean(ActivationCollector(mixed).collect(both))
        expected = NeuronAttribution(mixed, "attribution_patching", replacement=means).score(both).values  # noqa: PD011
        assert torch.allclose(scored["mean"], expected, rtol=0, atol=1e-7)
        assert not torch.allclose(scored["mean"], scored["zero"], rtol=0, atol=1e-3), "the test can tell them apart"

    def test_an_analysis_by_itself_runs_only_what_it_needs(self, families, study):
        from rmtension.study._behaviour_tables import transferability

        family = FamilyRuns(families[0], study.scoring, study.evaluating, options=OPTIONS)
        assert set(transferability(family)) == {"transferability"}
        assert family.n_run == 6


@pytest.mark.grid
def test_block_of_the_paper_page_runs(folders, world, passes, result, monkeypatch, capsys):
    """With these families, whose passes are in the folder."""
    monkeypatch.chdir(passes.parent)
    page = (Path(__file__).parents[2] / "docs" / "paper.md").read_text()
    (block,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    block = block.replace('folder="out"', f'folder="{passes.name}"')
    exec(compile(block, "docs/paper.md", "exec"), {"folders": folders, "pairs": world})
    assert capsys.readouterr().out.splitlines()[-1].startswith("0 "), "the same passes as the study's"


class TestRules:
    def test_published_rules_are_options(self):
        paper = StudyOptions.of("paper")
        assert (paper.site, paper.positions, paper.cut_rule, paper.tie_value) == ("mlp_gate", "all", "percentile", 0.0)
        assert (paper.pool_tokens, paper.clamp, paper.rank_by, paper.replacement) == (True, True, "score", "zero")
        assert len(paper.curve_fractions) == 16
        assert StudyOptions.of("corrected") == StudyOptions()
        assert StudyOptions.of("paper", tie_value=0.5).tie_value == 0.5, "one rule at a time"
        with pytest.raises(OptionError, match="rules: expected one of"):
            StudyOptions.of("published")

    @pytest.mark.grid
    def test_a_difference_can_be_traced(self, tmp_path, tokenizer, world):
        """A gated model by the published rules, computed again from the raw classifier: pooled signed gate means."""
        models = {n: save_classifier(tmp_path / n, "llama", tokenizer, seed=s) for s, n in enumerate(MODELS)}
        base = save_base(tmp_path / "base", "llama", tokenizer)
        options = StudyOptions.of("paper", analyses=("scores", "sets", "accuracy"))
        study = TensionStudy(models, world, base=base, options=options)
        table = study.run(progress=False)
        raw = transformers.AutoModelForSequenceClassification.from_pretrained(models["mixed"]).eval()
        kept = {}
        for number, layer in enumerate(raw.model.layers):
            layer.mlp.act_fn.register_forward_hook(
                lambda _, inputs, output, number=number: kept.__setitem__(number, output[0])
            )
        sums, counts = torch.zeros(2, 3, 48).double(), torch.zeros(2)
        for pair in study.scoring["helpful"] + study.scoring["harmless"]:
            for side, name in enumerate(("chosen", "rejected")):
                ids = tokenizer(pair.text(name), return_tensors="pt")["input_ids"]
                with torch.no_grad():
                    raw(input_ids=ids)
                sums[side] += torch.stack([kept[layer].double().sum(0) for layer in range(3)])
                counts[side] += ids.shape[1]
        expected = (sums / counts[:, None, None]).mean(0)
        found = table.neurons["magnitude_mixed"].to_numpy()
        assert found == pytest.approx(expected.flatten().numpy(), abs=1e-6)
        top = found >= np.percentile(found, 90)
        size = table.sets.query("model == 'mixed' and score == 'magnitude'")["size"].item()
        assert size == top.sum()
        # Negative control: by the corrected rules the same models have other scores.
        other = TensionStudy(models, world, base=base, options=StudyOptions(analyses=("scores",))).run(progress=False)
        assert not np.allclose(other.neurons["magnitude_mixed"], found, atol=1e-3)


class TestResult:
    def test_names_that_look_like_numbers_stay_names(self, result, tmp_path):
        tables = {"subsets": result.subsets.assign(family="01", subset="1.10")}
        families = [family | {"family": "01"} for family in result.summary["families"]]
        StudyResult(tables, result.summary | {"families": families}).save(tmp_path)
        loaded = StudyResult.load(tmp_path)
        assert set(loaded.subsets["family"]) == {"01"}
        assert set(loaded.subsets["subset"]) == {"1.10"}

    def test_saved_studies_load_equal_and_are_not_overwritten(self, result, tmp_path):
        result.save(tmp_path / "study")
        loaded = StudyResult.load(tmp_path / "study")
        for table in TABLES:
            pd.testing.assert_frame_equal(loaded.to_frame(table), result.to_frame(table), check_dtype=False)
        assert loaded.summary == json.loads(json.dumps(result.summary))
        assert (tmp_path / "study" / "ablation_over_seeds.csv").exists()
        few = StudyResult({"sets": result.sets}, result.summary)
        few.save(tmp_path / "few")
        few.save(tmp_path / "study2")
        result.save(tmp_path / "study2", overwrite=True)
        few.save(tmp_path / "study2", overwrite=True)
        assert [path.name for path in (tmp_path / "study2").glob("*.csv")] == ["sets.csv"], "nothing stale is left"
        with pytest.raises(StorageError, match="already holds a study"):
            result.save(tmp_path / "study")
        (tmp_path / "study" / "neurons.json").write_text("{}")
        result.save(tmp_path / "study", overwrite=True)
        assert (tmp_path / "study" / "neurons.json").exists(), "of the same study"
        other = StudyResult(result.tables, result.summary | {"version": "another"})
        other.save(tmp_path / "study", overwrite=True)
        assert not (tmp_path / "study" / "neurons.json").exists(), "neurons of another study"
        with pytest.raises(StorageError, match="has no finished study"):
            StudyResult.load(tmp_path)
        with pytest.raises(OptionError, match="table"):
            result.to_frame("nothing")
        with pytest.raises(AttributeError, match="this study has"):
            _ = result.nothing

    @pytest.mark.grid
    def test_report_and_figures_of_every_table(self, result, tmp_path):
        from rmtension.report._every_format import write_report
        from rmtension.report._text import to_text

        write_report(result, tmp_path)
        page = (tmp_path / "report.md").read_text()
        figures = sorted(path.name for path in tmp_path.glob("*.png"))
        assert len(figures) >= 10
        assert all(f"({name})" in page for name in figures)
        assert "beyond random" in to_text(result)


class TestArguments:
    def test_no_effect_is_measured_on_pairs_that_chose_neurons(self, study, families, world):
        for name in world:
            assert not set(study.scoring[name].prompts) & set(study.evaluating[name].prompts)
            assert len(study.scoring[name]) + len(study.evaluating[name]) == len(world[name])
        with pytest.raises(OptionError, match="prompts are in `pairs` too"):
            TensionStudy(families, world, scoring_pairs=world)

    def test_wrong_options(self):
        for wrong in (
            {"fraction": 0.0},
            {"fraction": 1.5},
            {"curve_fractions": (0.0,)},
            {"replacement": "resample"},
            {"n_draws": 1},
            {"n_subsamples": 1},
            {"rank_by": "size"},
            {"level": 1.0},
            {"tie_value": 2.0},
            {"cut_rule": "all"},
            {"analyses": ("everything",)},
            {"scores": ()},
        ):
            with pytest.raises(OptionError, match=next(iter(wrong))):
                StudyOptions(**wrong)

    def test_wrong_models(self, folders, families, world, tmp_path, tokenizer):
        models = {name: folders[0][name] for name in MODELS}
        with pytest.raises(OptionError, match=r"models: expected exactly \['helpful', 'harmless', 'mixed'\]"):
            TensionStudy({"helpful": folders[0]["helpful"]}, world)
        with pytest.raises(OptionError, match="pairs: expected exactly"):
            TensionStudy(models, {"helpful": world["helpful"]})
        with pytest.raises(OptionError, match="options or rules"):
            TensionStudy(models, world, options=OPTIONS, rules="paper")
        with pytest.raises(OptionError, match="differ in name or seed"):
            TensionStudy([families[0], families[0]], world)
        other_base = [families[0], replace(families[1], base=folders[0]["mixed"])]
        with pytest.raises(ProvenanceError, match="families called 'toy' have different bases"):
            TensionStudy(other_base, world, options=OPTIONS).run(progress=False)
        with pytest.raises(OptionError, match="each ModelFamily has its own"):
            TensionStudy(families, world, base=folders[0]["base"])
        with pytest.raises(OptionError, match="'change' compares with a base"):
            TensionStudy(models, world, options=StudyOptions(scores=("change",)))
        other = save_classifier(tmp_path, "llama", tokenizer)
        with pytest.raises(ProvenanceError, match=r"architecture differs: 'helpful' is gpt2"):
            TensionStudy({**models, "mixed": other}, world, options=OPTIONS).run(progress=False)

    def test_without_a_base_there_is_no_change_and_no_floor(self, folders, world):
        models = {name: folders[0][name] for name in MODELS}
        options = StudyOptions(analyses=("overlap", "sets"), scores=("magnitude", "change"))
        study = TensionStudy(models, world, options=options)
        assert study.options.scores == ("magnitude",)
        found = study.run(progress=False)
        assert not found.overlap["without_base"].any()
        assert set(found.sets["model"]) == set(MODELS)

    def test_gradients_have_no_base(self, folders, world):
        options = StudyOptions(analyses=("overlap", "depth"), scores=("gradient_x_activation",))
        models = {name: folders[0][name] for name in MODELS}
        found = TensionStudy(models, world, base=folders[0]["base"], options=options).run(progress=False)
        assert not found.overlap["without_base"].any()
        assert found.overlap["jaccard_low"].notna().sum() == 3


def test_a_subset_may_not_have_the_name_of_all_pairs(world, families):
    named = {name: PreferencePairs(replace(pair, subset="all") for pair in part) for name, part in world.items()}
    with pytest.raises(OptionError, match="the helpful pairs have a subset 'all'"):
        TensionStudy(families, named)


def test_models_that_skip_pairs_are_refused(world, families):
    """The pairs of all models are compared one by one."""
    head = RewardHead.from_pretrained(families[0].mixed, on_nonfinite="skip")
    with pytest.raises(OptionError, match="got one that skips such pairs"):
        TensionStudy(dict.fromkeys(("helpful", "harmless", "mixed"), head), world, options=OPTIONS).run(progress=False)


@pytest.mark.grid
def test_where_there_is_nothing_to_find():
    """A small part of `tests/programs/null_control.py` (docs/controls.md has the whole): 2 studies with random labels.

    The bounds leave room for few and dependent intervals, and fail if one kind excluded 0 in most cases.
    """
    studies = [untrained_study(seed, shuffle=True, n_test=48, n_draws=4) for seed in range(2)]
    intervals = pd.concat([intervals_of(study).assign(study=seed) for seed, study in enumerate(studies)])
    found = shares(intervals)["excludes 0"]
    assert found["accuracy differences"] <= 0.4
    assert found["overlap beyond chance"] <= 0.4
    assert found["shared beyond random, margin"] <= 0.4
    assert abs(intervals["jaccard_beyond_chance"].mean()) < 0.02


@pytest.mark.grid
def test_a_planted_shared_set_is_found(tokenizer):
    """One run of `tests/programs/planted.py` (docs/controls.md has 100)."""
    row = planted_run(0, tokenizer)
    assert row["precision"] >= 0.7
    assert row["recall"] >= 0.4
    for name in ("known", "found"):
        assert row[f"{name} helpful both"]
        assert row[f"{name} harmless both"]


class TestCommand:
    def test_wrong_arguments_before_any_work(self, tmp_path, capsys):
        from rmtension.cli import _command_line as cli

        for wrong in (["--seeds", "0"], ["--rules", "mine"], ["--analyses", "all"]):
            assert cli.main(["demo", "--out", str(tmp_path), *wrong]) == 2
            assert wrong[0].strip("-") in capsys.readouterr().err
        assert not list(tmp_path.iterdir())

    def test_version(self, capsys):
        from rmtension.cli import _command_line as cli

        with pytest.raises(SystemExit, match="0"):
            cli.main(["--version"])
        assert capsys.readouterr().out.startswith("rmtension 0.")
