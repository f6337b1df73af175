"""Curves, matrix, equal sizes and collapse where every ablation is known in closed form, and on a real model."""

import shutil
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
import transformers
from drawn_scores import provenance
from reference import transformers_rewards
from scipy import stats
from tiny_models import make_pairs

from rmtension import AblationContext, Mean, NeuronScores, NeuronSet, PairRewards, PreferencePairs, RewardHead
from rmtension.errors import OptionError, RMTensionWarning
from rmtension.evaluation._metrics import accuracy, change
from rmtension.neurons._matched_sets import draw_seed
from rmtension.study._causality import Ablations, ablation_matrix, equal_size_effects
from rmtension.study._collapse_and_drift import collapse, drift, effects_by_subset, split_drift
from rmtension.study._curves import ablation_curves
from rmtension.study._model_runs import ModelRuns

SHAPE = (3, 40)


class LinearRuns(ModelRuns):
    """Replaces `ModelRuns`: the reward is the sum of what each neuron adds, so that ablating takes it away."""

    def __init__(self, pairs, seed=0, weights=None):
        rng = np.random.default_rng(seed)
        self.weights = torch.from_numpy(rng.normal(size=SHAPE)) if weights is None else weights
        self.features = {
            (pair.prompt, text): torch.from_numpy(rng.normal(size=SHAPE))
            for part in pairs.values()
            for pair in part
            for text in (pair.chosen, pair.rejected)
        }
        self.n_run = 0

    def prepare(self, pairs, sets, *, replacement):
        """Nothing to run together."""

    def rewards(self, pairs, *, without=None, replacement=None):
        self.n_run += 1
        left = self.weights if without is None else self.weights * ~without.mask
        chosen, rejected = (
            torch.stack([(self.features[pair.prompt, getattr(pair, side)] * left).sum() for pair in pairs])
            for side in ("chosen", "rejected")
        )
        return PairRewards(chosen, rejected, pairs, provenance())

    def contributions(self, pairs):
        """What each neuron adds to every margin: [pair, layer, neuron]."""
        return torch.stack(
            [
                (self.features[pair.prompt, pair.chosen] - self.features[pair.prompt, pair.rejected]) * self.weights
                for pair in pairs
            ]
        )


def neuron_set(*indices):
    return NeuronSet.from_indices(indices, shape=SHAPE, site="mlp", architecture="toy")


@pytest.fixture(scope="module")
def pairs():
    made = make_pairs(120)
    return {name: made.filter(objective=name) for name in ("helpful", "harmless")}


@pytest.fixture
def runs(pairs):
    return LinearRuns(pairs)


@pytest.fixture
def ablations(runs, pairs):
    return Ablations(runs, pairs)


SETS = {
    "large": neuron_set(*((0, n) for n in range(8)), *((1, n) for n in range(4))),
    "small": neuron_set((0, 20), (1, 21), (2, 22), (2, 23)),
}


class TestMatrix:
    def test_effects_are_what_the_neurons_add(self, ablations, runs, pairs):
        table = ablation_matrix(ablations, SETS, n_draws=3).set_index(["set", "objective", "quantity"])
        for name, neurons in SETS.items():
            for objective, part in pairs.items():
                added = runs.contributions(part)
                row = table.loc[(name, objective, "margin")]
                lost = added[:, neurons.mask].sum(1)
                assert row["effect"] == pytest.approx(-float(lost.mean()))
                assert row["per_neuron"] == pytest.approx(row["effect"] / len(neurons))
                assert row["before"] == pytest.approx(float(added.sum((1, 2)).mean()))
                assert row["after"] == pytest.approx(row["before"] + row["effect"])
                draws = [neurons.matched_random(seed=draw_seed(0, d, "layer", neurons.mask)) for d in range(3)]
                random = [-float(added[:, draw.mask].sum(1).mean()) for draw in draws]
                assert row["random_effect"] == pytest.approx(np.mean(random))
                assert row["random_sd"] == pytest.approx(np.std(random, ddof=1))
                assert row["beyond_random"] == pytest.approx(row["effect"] - np.mean(random))
                assert row["beyond_low"] < row["beyond_random"] < row["beyond_high"]
                right = table.loc[(name, objective, "accuracy")]
                now = (added.sum((1, 2)) - lost > 0).double().mean()
                assert right["after"] == pytest.approx(float(now))

    def test_magnitude_matched_controls(self, ablations):
        magnitude = torch.rand(SHAPE, generator=torch.Generator().manual_seed(0)).double()
        table = ablation_matrix(ablations, SETS, n_draws=2, magnitude=magnitude)
        assert table["control"].value_counts().to_dict() == {"layer": 8, "magnitude": 8}
        by_control = table.groupby("control")
        for control in ("layer", "magnitude"):
            row = by_control.get_group(control).iloc[0]
            options = {"magnitude": magnitude} if control == "magnitude" else {}
            seeds = [draw_seed(0, draw, control, SETS["large"].mask) for draw in range(2)]
            draws = [SETS["large"].matched_random(seed=seed, match=control, **options) for seed in seeds]
            assert row["set_magnitude"] == pytest.approx(float(magnitude[SETS["large"].mask].mean()))
            found = np.mean([float(magnitude[draw.mask].mean()) for draw in draws])
            assert row["random_magnitude"] == pytest.approx(found)

    def test_sets_too_large_to_match_have_no_control(self, ablations):
        everything = {"most": NeuronSet(torch.rand(SHAPE) < 0.9, "mlp", "toy")}
        with pytest.warns(RMTensionWarning, match="No matched random sets"):
            table = ablation_matrix(ablations, everything)
        assert (table["n_draws"] == 0).all()
        assert table["beyond_random"].isna().all()
        assert table["effect"].notna().all()
        with pytest.raises(OptionError, match="n_draws"):
            ablation_matrix(ablations, SETS, n_draws=1)

    def test_controls_of_sets_alike_in_size_are_not_the_same(self, ablations):
        """Two sets with as many neurons in every layer: equal seeds drew equal controls for both."""
        one, other = (neuron_set(*((layer, n) for layer in range(3) for n in range(k, k + 6))) for k in (0, 10))
        effects = ablation_matrix(ablations, {"one": one, "other": other}, n_draws=4, exclude=one | other)
        effects = effects.query("quantity == 'margin' and objective == 'helpful'").set_index("set")["random_effect"]
        assert effects["one"] != pytest.approx(effects["other"], abs=1e-3)
        assert draw_seed(0, 0, "layer", one.mask) == draw_seed(0, 0, "layer", one.mask)
        assert len({draw_seed(s, d, p, one.mask) for s in (0, 1) for d in (0, 1) for p in ("layer", "magnitude")}) == 8


class TestEqualSize:
    def test_subsamples_of_the_larger_and_the_smaller_whole(self, ablations, runs, pairs):
        table = equal_size_effects(ablations, SETS, against="small", n_subsamples=5)
        assert (table["size"] == 4).all()
        rows = table.set_index(["set", "objective", "quantity"])
        added = runs.contributions(pairs["helpful"])
        seeds = [draw_seed(0, draw, "subsample", SETS["large"].mask) for draw in range(5)]
        draws = [SETS["large"].subsample(4, seed=seed) for seed in seeds]
        effects = [-float(added[:, draw.mask].sum(1).mean()) for draw in draws]
        large, small = (rows.loc[(name, "helpful", "margin")] for name in SETS)
        assert large["effect"] == pytest.approx(np.mean(effects))
        assert small["effect"] == pytest.approx(-float(added[:, SETS["small"].mask].sum(1).mean()))
        assert large["difference"] == pytest.approx(large["effect"] - small["effect"])
        assert small["difference"] == small["difference_low"] == small["difference_high"] == 0
        assert (large["n_subsamples"], small["n_subsamples"]) == (5, 1)
        half = stats.t.ppf(0.975, 4) * np.std(effects, ddof=1) / np.sqrt(5)
        assert large["effect"] - large["low"] >= half

    def test_sets_of_one_kind_do_not_differ_per_neuron(self, pairs):
        """Two random sets of 60 and 6 neurons: in total they differ, at equal size 90% or more intervals hold 0."""
        covered = total = 0
        for seed in range(20):
            runs = LinearRuns(pairs, seed=seed, weights=torch.ones(SHAPE).double())
            for pair in pairs["helpful"]:
                runs.features[pair.prompt, pair.chosen] = runs.features[pair.prompt, pair.chosen] + 0.5
            order = np.random.default_rng(seed).permutation(120)
            flat = torch.zeros(2, 120, dtype=torch.bool)
            flat[0, order[:60]] = True
            flat[1, order[60:66]] = True
            sets = {n: NeuronSet(m.view(SHAPE), "mlp", "toy") for n, m in zip(("big", "little"), flat, strict=True)}
            only = Ablations(runs, {"helpful": pairs["helpful"]}, seed=seed)
            before = only.rewards()["helpful"]
            big, little = (float(change(only.rewards(one)["helpful"], before, quantity="margin").value) for one in
                           sets.values())  # fmt: skip
            total += big < 5 * little
            row = equal_size_effects(only, sets, against="little", n_subsamples=6).query("quantity == 'margin'")
            row = row.set_index("set").loc["big"]
            covered += row["difference_low"] <= 0 <= row["difference_high"]
        assert total >= 18
        assert covered >= 18

    def test_empty_sets(self, ablations):
        empty = neuron_set()
        assert equal_size_effects(ablations, {"a": empty, **SETS}, against="a").empty
        kept = equal_size_effects(ablations, {"a": empty, **SETS}, against="small", n_subsamples=2)
        assert set(kept["set"]) == {"large", "small"}
        with pytest.raises(OptionError, match="against"):
            equal_size_effects(ablations, SETS, against="none")


class TestCurves:
    def test_points_are_those_of_the_sets(self, ablations, runs, pairs):
        values = torch.from_numpy(np.random.default_rng(1).normal(size=SHAPE))
        scores = {"mine": NeuronScores(values, torch.ones_like(values), provenance())}
        table = ablation_curves(ablations, scores, (0.05, 0.5, 1.0), n_draws=2)
        assert table.groupby("score")["draw"].nunique().to_dict() == {"mine": 1, "random": 2}
        for fraction in (0.05, 0.5):
            kept = runs.contributions(pairs["harmless"])[:, ~scores["mine"].top(fraction).mask].sum(1)
            row = table.query("score == 'mine' and fraction == @fraction and objective == 'harmless'").iloc[0]
            before = float((runs.contributions(pairs["harmless"]).sum((1, 2)) > 0).double().mean())
            now = float((kept > 0).double().mean())
            assert row["accuracy"] == pytest.approx(now)
            assert row["drop"] == pytest.approx(1 - now / before)
            assert row["normalised"] == pytest.approx((now - 0.5) / (before - 0.5))
            assert row["margin"] == pytest.approx(float(kept.mean()))
        everything = table.query("fraction == 1.0")
        assert (everything["accuracy"] == 0.5).all(), "all rewards tie"
        assert (everything["normalised"] == 0).all()
        sizes = table.query("score == 'random' and objective == 'helpful'").groupby("draw")["size"].apply(list)
        assert sizes.tolist() == [[6, 60, 120]] * 2

    def test_published_rules(self, runs, pairs):
        """Ties are wrong, shares are clamped, tied scores select everything."""
        strict = Ablations(runs, pairs, tie_value=0.0)
        tied = torch.zeros(SHAPE).double()
        scores = {"tied": NeuronScores(tied, tied, provenance())}
        table = ablation_curves(strict, scores, (0.1,), cut_rule="percentile", clamp=True, n_draws=0)
        assert (table["size"] == 120).all()
        assert (table["accuracy"] == 0).all()
        assert table["normalised"].between(0, 1).all()
        free = ablation_curves(strict, scores, (0.1,), cut_rule="percentile", n_draws=0)
        assert not free["normalised"].between(0, 1).all()


class TestCollapse:
    def test_one_objective_falls(self, pairs):
        """Neurons of layer 0 serve helpful pairs, those of layer 1 harmless ones."""
        runs = LinearRuns(pairs, weights=torch.ones(SHAPE).double())
        for objective, layer in (("helpful", 0), ("harmless", 1)):
            for pair in pairs[objective]:
                for text, sign in ((pair.chosen, 1), (pair.rejected, -1)):
                    feature = torch.zeros(SHAPE).double()
                    feature[layer] = sign * 0.1
                    runs.features[pair.prompt, text] = feature
        rows = collapse(Ablations(runs, pairs), {"first": neuron_set(*((0, n) for n in range(40)))})
        for row in (rows.iloc[0], rows.iloc[1]):
            assert (row["retained_helpful"], row["retained_harmless"]) == pytest.approx((0, 1), abs=1e-12)
            assert row["difference"] == pytest.approx(-1)
            assert row["difference_high"] < 0
        assert rows["spread_helpful"].tolist() == pytest.approx([0, 0], abs=1e-12)

    def test_everything_drifts(self, ablations, pairs):
        """Random neurons at random: the margins of both objectives shrink alike, and the difference holds 0."""
        half = NeuronSet(torch.rand(SHAPE, generator=torch.Generator().manual_seed(1)) < 0.5, "mlp", "toy")
        row = collapse(ablations, {"half": half}).set_index("quantity").loc["margin"]
        assert row["retained_helpful"] < 0.8
        assert row["retained_harmless"] < 0.8
        assert row["difference_low"] <= 0 <= row["difference_high"]
        before, after = (ablations.rewards(one)["helpful"].margin for one in (None, half))
        # The slope through the origin, by NumPy's least squares
        slope = np.linalg.lstsq(before[:, None].numpy(), after.numpy(), rcond=None)[0][0]
        assert row["retained_helpful"] == pytest.approx(slope)

    def test_no_share_of_an_accuracy_at_chance(self, pairs):
        runs = LinearRuns(pairs)
        part = {"helpful": pairs["helpful"], "harmless": pairs["harmless"].swapped() + pairs["harmless"]}
        for pair in part["harmless"]:
            runs.features.setdefault((pair.prompt, pair.chosen), torch.zeros(SHAPE).double())
        row = collapse(Ablations(runs, part), {"a": SETS["small"]}).set_index("quantity").loc["accuracy"]
        assert np.isnan(row["retained_harmless"])
        assert np.isnan(row["difference"])
        with pytest.raises(OptionError, match="two objectives"):
            collapse(Ablations(runs, {"helpful": pairs["helpful"]}), SETS)


class CoinRuns(ModelRuns):
    """Random rewards, drawn anew for every set; or by the subset before an ablation and at random after it."""

    def __init__(self, seed, drifting=False):
        self.seed, self.drifting = seed, drifting

    def prepare(self, pairs, sets, *, replacement):
        """Nothing to run together."""

    def rewards(self, pairs, *, without=None, replacement=None):
        rng = np.random.default_rng([self.seed, 0 if without is None else 1])
        chance = np.full(len(pairs), 0.5)
        if self.drifting and without is None:
            chance = np.array([0.1 + 0.8 * int(pair.subset[1:]) / 23 for pair in pairs])
        margin = torch.from_numpy(np.where(rng.random(len(pairs)) < chance, 1.0, -1.0))
        return PairRewards(margin, torch.zeros_like(margin), pairs, provenance())


class TestBySubset:
    def test_subsets_are_judged_apart(self, ablations, pairs):
        table = effects_by_subset(ablations, SETS["large"])
        assert table["n"].sum() == 120
        row = table.query("subset == 'should_refuse'").iloc[0]
        part = pairs["harmless"].filter(subset="should_refuse")
        one, other = (ablations.runs.rewards(part, without=s) for s in (SETS["large"], None))
        assert row["before"] == accuracy(other).value
        assert row["change"] == pytest.approx(change(one, other).value)

    def test_drift_is_the_regression_on_what_was_above_chance(self):
        before = np.array([0.9, 0.8, 0.6, 0.3])
        table = pd.DataFrame({"before": before, "chance": 0.5, "change": -(before - 0.5)})
        assert drift(table) == pytest.approx({"slope": -1, "r": -1, "n": 4})
        table["change"] = [-0.1, 0.05, -0.02, 0.01]
        found = stats.linregress(before - 0.5, table["change"])
        assert drift(table)["slope"] == pytest.approx(found.slope)
        assert np.isnan(drift(table.iloc[:2])["slope"])

    @pytest.mark.grid
    def test_noise_gives_a_drift_but_no_split_drift(self):
        """Coin-flip rewards, before and after: nothing falls anywhere, and the naive slope is about -1."""
        made = make_pairs(600)
        subsets = [replace(pair, subset=f"s{n % 24}", objective="x") for n, pair in enumerate(made)]
        part = {"x": PreferencePairs(subsets)}
        naive, split = [], []
        for seed in range(8):
            runs = CoinRuns(seed)
            effects = effects_by_subset(Ablations(runs, part), SETS["large"])
            naive.append(drift(effects)["slope"])
            split.append(split_drift(Ablations(runs, part), SETS["large"])["split_slope"])
        assert np.mean(naive) == pytest.approx(-1, abs=0.2)
        # 8 means of slopes with standard error about 0.2 each
        assert np.mean(split) == pytest.approx(0, abs=0.25)

    def test_split_sees_a_real_drift(self):
        """Accuracies of 24 subsets from .1 to .9 that all end at a coin: a slope near -1 both ways."""
        made = make_pairs(1200)
        part = {"x": PreferencePairs(replace(pair, subset=f"s{n % 24}") for n, pair in enumerate(made))}
        found = split_drift(Ablations(CoinRuns(0, drifting=True), part), SETS["large"])
        assert found["split_slope"] == pytest.approx(-1, abs=0.25)
        assert found["split_r"] < -0.7


@pytest.fixture(scope="module")
def few():
    return {"helpful": make_pairs(8)}


class TestRuns:
    def test_zero_ablation_equals_transformers_without_the_rows(self, checkpoints, few, tmp_path):
        """An independent model: the checkpoint with the neurons' rows of the down projection set to 0."""
        neurons = NeuronSet(torch.rand(3, 64, generator=torch.Generator().manual_seed(0)) < 0.3, "mlp", "")
        model = transformers.AutoModelForSequenceClassification.from_pretrained(checkpoints["gpt2"])
        with torch.no_grad():
            for layer, row in enumerate(neurons.mask):
                model.transformer.h[layer].mlp.c_proj.weight[row] = 0
        model.save_pretrained(tmp_path / "without")
        transformers.AutoTokenizer.from_pretrained(checkpoints["gpt2"]).save_pretrained(tmp_path / "without")
        expected = [
            transformers_rewards(tmp_path / "without", [pair.text(side) for pair in few["helpful"]])
            for side in ("chosen", "rejected")
        ]
        runs = ModelRuns(checkpoints["gpt2"])
        neurons = NeuronSet(neurons.mask, "mlp", runs.head.architecture)
        found = Ablations(runs, few).rewards(neurons)["helpful"]
        assert torch.allclose(found.chosen, expected[0], atol=1e-5)
        assert torch.allclose(found.rejected, expected[1], atol=1e-5)
        assert not torch.allclose(found.chosen, runs.rewards(few["helpful"]).chosen, atol=1e-2)

    def test_nothing_is_run_twice(self, checkpoints, few, tmp_path, monkeypatch):
        part = few["helpful"]

        def ask(runs):
            neurons = NeuronSet(torch.rand(3, 64, generator=torch.Generator().manual_seed(0)) < 0.3, "mlp", arch)
            means = runs.statistics(part)
            return [
                runs.rewards(part).margin,
                runs.rewards(part, without=neurons).margin,
                runs.rewards(part, without=neurons, replacement=Mean(means)).margin,
                runs.profile(part, also=("attn_head",)).sums,
                runs.profile(part, site="attn_head").sums,
                runs.attribution(part, method="gradient_x_activation").stderr,
            ]

        first = ModelRuns(checkpoints["gpt2"], folder=tmp_path)
        arch = first.head.architecture
        results = ask(first)
        assert (first.n_run, first.n_read) == (6, 0)
        assert all(torch.equal(a, b) for a, b in zip(results, ask(first), strict=True))
        assert first.n_run == 6

        def refuse(*_, **__):
            raise AssertionError("a model was run, or opened")

        monkeypatch.setattr(RewardHead, "residual", refuse)
        monkeypatch.setattr(RewardHead, "from_pretrained", refuse)
        again = ModelRuns(checkpoints["gpt2"], folder=tmp_path)
        assert all(torch.equal(a, b) for a, b in zip(results, ask(again), strict=True))
        assert (again.n_run, again.n_read) == (0, 7)

    def test_different_inputs_run_again(self, checkpoints, few, tmp_path, tokenizer):
        """Other texts, order, neurons, mode or weights are other files."""
        from tiny_models import save_classifier

        part = few["helpful"]
        runs = ModelRuns(checkpoints["gpt2"], folder=tmp_path / "runs")
        runs.rewards(part)
        for number, other in enumerate((part[:4], part.swapped(), PreferencePairs(reversed(part))), start=2):
            runs.rewards(other)
            assert runs.n_run == number
        neurons = NeuronSet(torch.rand(3, 64) < 0.3, "mlp", runs.head.architecture)
        runs.rewards(part, without=neurons)
        runs.rewards(part, without=~neurons)
        runs.rewards(part, without=neurons & ~neurons)  # nothing is ablated: the rewards are there
        assert runs.n_run == 6
        # A copy: the suite's tokenizer may have been called with padding meanwhile, which is in the file that it saves.
        same = ModelRuns(shutil.copytree(checkpoints["gpt2"], tmp_path / "again"), folder=tmp_path / "runs")
        assert same.key == runs.key
        other = ModelRuns(save_classifier(tmp_path / "other", "gpt2", tokenizer, seed=3), folder=tmp_path / "runs")
        assert other.key != runs.key
        other.rewards(part)
        assert other.n_run == 1
        (tmp_path / "empty").mkdir()
        with pytest.raises(OptionError, match="expected a checkpoint in"):
            _ = ModelRuns(tmp_path / "empty").key

    def test_the_key_of_a_head_depends_on_its_content(self, checkpoints, few, tmp_path):
        """Trained further, with another tokenizer or context: another name, and no old result."""
        head = RewardHead.from_pretrained(checkpoints["gpt2"])
        runs = ModelRuns(head, folder=tmp_path)
        before, key = runs.rewards(few["helpful"]).margin, runs.key
        assert torch.equal(before, head.score_pairs(few["helpful"]).margin)
        with torch.no_grad():
            next(iter(head.body.module.parameters())).add_(0.1)
        assert runs.key != key
        after = runs.rewards(few["helpful"]).margin
        assert torch.equal(after, head.score_pairs(few["helpful"]).margin)
        assert not torch.equal(after, before)
        shorter = RewardHead.from_pretrained(checkpoints["gpt2"], max_length=64)
        assert ModelRuns(shorter).key != ModelRuns(RewardHead.from_pretrained(checkpoints["gpt2"])).key
        words = transformers.AutoTokenizer.from_pretrained(checkpoints["gpt2"])
        words.chat_template = "{{ messages }}"
        other = RewardHead.from_pretrained(checkpoints["gpt2"], tokenizer=words)
        assert ModelRuns(other).key != ModelRuns(RewardHead.from_pretrained(checkpoints["gpt2"])).key
        runs.close()
        assert runs.head is head
        runs.rewards(few["helpful"])
        assert runs.n_read == 1, "from the folder, since nothing is in memory"

    def test_results_of_a_hooked_model_are_not_cached(self, checkpoints, few):
        head = RewardHead.from_pretrained(checkpoints["gpt2"])
        runs = ModelRuns(head)
        neurons = NeuronSet(torch.ones(3, 64, dtype=torch.bool), "mlp", head.architecture)
        with AblationContext(head, neurons), pytest.raises(OptionError, match="the model has hooks"):
            runs.rewards(few["helpful"])
        handle = head.model.hook_dict["blocks.0.mlp.hook_post"].register_forward_hook(lambda *_: None)
        with pytest.raises(OptionError, match="the model has hooks"):
            runs.rewards(few["helpful"])
        handle.remove()
        assert runs.rewards(few["helpful"]).margin.shape == (8,)
