"""Predicted effects of sets: their parts against NumPy and single calls, and their errors on a model that saturates."""

import numpy as np
import pandas as pd
import pytest
import torch
from scipy import stats
from tiny_models import make_pairs, unchecked

from rmtension import ActivationCollector, Mean, NeuronAttribution, OtherResponse, RewardHead, Zero
from rmtension.attribution import SetEffects, predict_set_effects
from rmtension.attribution._ratio_process import RatioProcess, _most_likely
from rmtension.attribution._set_effects import _chosen, _drawn_pairs, _halves, _power, _quantile
from rmtension.attribution._set_sums import SetSums
from rmtension.errors import OptionError, ProvenanceError, StorageError
from rmtension.interventions import score_without


@pytest.fixture(scope="module")
def pairs():
    return make_pairs(24)


@pytest.fixture(scope="module")
def head(checkpoints):
    return RewardHead.from_pretrained(checkpoints["gpt2"], dtype=torch.float64)


@pytest.fixture(scope="module")
def sets(head, pairs):
    """Top sets of two methods, random ones of the same sizes, and one empty set."""
    rankings = {name: NeuronAttribution(head, name).score(pairs) for name in ("attribution_patching", "relp")}
    found = {
        f"{name} {rank_by} {share}": scores.top(share, rank_by=rank_by)
        for name, scores in rankings.items()
        for rank_by in ("supports", "opposes")
        for share in (0.02, 0.05, 0.1, 0.2)
    }
    found |= {f"random {name}": top.matched_random(match="model") for name, top in list(found.items())[:6]}
    some = next(iter(found.values()))
    return found | {"empty": some - some}


@pytest.fixture(scope="module")
def predicted(head, pairs, sets):
    return predict_set_effects(head, pairs, sets, passes=12, progress=False)


@pytest.fixture(scope="module")
def truth(head, pairs, sets):
    whole = head.score_pairs(pairs).margin
    return np.array([float((part.margin - whole).mean()) for part in score_without(head, pairs, list(sets.values()))])


def test_sums_of_single_scores_are_those_of_the_attributions(head, pairs, sets, predicted):
    for name in ("attribution_patching", "relp"):
        scores = NeuronAttribution(head, name).score(pairs).as_effects()
        expected = [float(scores[neurons.mask].sum()) for neurons in sets.values()]
        assert predicted.table[name].to_numpy() == pytest.approx(np.array(expected), abs=1e-9)
    assert predicted.table["size"].tolist() == [len(neurons) for neurons in sets.values()]


def test_predictions_follow_the_true_effects(predicted, truth):
    """Better than either sum; the interval covers; and what the result says of itself is about what it does."""
    found = predicted.table["predicted"].to_numpy()
    errors = {
        name: np.abs(predicted.table[name].to_numpy() - truth).mean()
        for name in ("predicted", "attribution_patching", "relp")
    }
    assert errors["predicted"] < 0.6 * min(errors["attribution_patching"], errors["relp"])
    assert stats.spearmanr(found, truth).statistic > 0.95
    covered = (predicted.table["low"].to_numpy() <= truth) & (truth <= predicted.table["high"].to_numpy())
    assert covered.mean() >= 0.9
    assert predicted.spearman > 0.9
    assert 0.7 < predicted.slope < 1.4
    assert found[-1] == pytest.approx(0, abs=1e-12), "the empty set changes nothing"


def test_true_ablations_stay_within_the_passes(head, pairs, sets, monkeypatch):
    seen = []

    def counted(head, some, *rest, **options):
        seen.append(len(some))
        return score_without(head, some, *rest, **options)

    monkeypatch.setattr("rmtension.attribution._set_effects.score_without", counted)
    result = predict_set_effects(head, pairs, sets, passes=5, progress=False)
    assert sum(seen) <= 5 * len(pairs)
    assert len(seen) == len(result.checked) == 20
    assert set(seen) == {6}


def test_checked_effects_are_true_effects(head, pairs, sets, predicted):
    """The effects of the sets that were ablated, on their few pairs, are those of permanent ablations."""
    few = _drawn_pairs(len(pairs), len(predicted.checked), seed=0)
    rows = [row for row, name in enumerate(predicted.checked["set"]) if name in sets]
    assert len(rows) > 5
    for row in rows[:5]:
        some = type(pairs)([pairs[number] for number in few[row].tolist()])
        ablated = head.with_ablation(sets[predicted.checked["set"][row]])
        change = ablated.score_pairs(some).margin - head.score_pairs(some).margin
        assert predicted.checked["effect"][row] == pytest.approx(float(change.mean()), abs=1e-9)


@pytest.mark.parametrize("positions", ["response"])
def test_other_replacements_and_positions(head, pairs, sets, positions):
    mean = Mean(ActivationCollector(head).collect(pairs))
    result = predict_set_effects(head, pairs, sets, mean, positions=positions, passes=12, progress=False)
    whole = head.score_pairs(pairs).margin
    parts = score_without(head, pairs, list(sets.values()), mean, positions=positions)
    truth = [float((part.margin - whole).mean()) for part in parts]
    assert stats.spearmanr(result.table["predicted"], truth).statistic > 0.9
    assert result.provenance.positions == positions
    assert result.provenance.replacement == "mean"


class TestParts:
    def test_the_process_is_that_of_the_textbook(self):
        """Posterior means by the formula with a matrix inverse, at settings found by a grid over the likelihood."""
        generator = np.random.default_rng(0)
        points, new = generator.standard_normal((40, 2)), generator.standard_normal((5, 2))
        values = np.sin(points[:, 0]) + 0.5 * points[:, 1] + 0.1 * generator.standard_normal(40)
        process = RatioProcess.fit(points, values)
        length, smooth, linear, noise = np.exp(process.settings.numpy())

        def kernel(first, second):
            distance = ((first[:, None] - second[None]) ** 2).mean(axis=-1)
            return 1 + smooth * np.exp(-distance / (2 * length**2)) + linear * (first @ second.T) / 2

        covariance = kernel(points, points) + (noise + 1e-6) * np.eye(40)
        expected = kernel(new, points) @ np.linalg.inv(covariance) @ values
        assert process.predict(new) == pytest.approx(expected, abs=1e-8)
        truth = np.sin(new[:, 0]) + 0.5 * new[:, 1]
        assert np.abs(process.predict(new) - truth).max() < 0.4
        # The likelihood, with its prior, is not larger next to the settings that were found.
        best = _penalised(points, values, process.settings.numpy())
        for direction in np.eye(4):
            for sign in (-0.3, 0.3):
                assert _penalised(points, values, process.settings.numpy() + sign * direction) <= best + 1e-3
        assert torch.equal(_most_likely(torch.from_numpy(points), torch.from_numpy(values)), process.settings)

    def test_halves_are_drawn_when_there_are_few_sets(self, sets):
        few = dict(list(sets.items())[:3])
        halves = _halves(few, 8, seed=0)
        assert len(few) + len(halves) >= 8
        for half, whole in zip(halves[:3], few.values(), strict=True):
            assert not (half - whole)
            assert len(half) == len(whole) // 2
        assert _halves(sets, 8, seed=0) == []

    def test_sets_are_chosen_far_apart_and_at_random(self, predicted):
        """Two clusters and an outlier: half of the choice covers them all; with few candidates some are repeated."""
        sizes = np.concatenate([np.full(20, 1.0), np.full(20, 1.1), [50.0]])
        signed = np.stack([np.tile(sizes, (4, 1)), np.tile(sizes[::-1], (4, 1))])
        sums = SetSums(signed, np.abs(signed), np.ones(4), predicted.provenance)
        for seed in range(5):
            assert 40 in _chosen(sums, np.arange(41), 8, seed)
        assert len(set(_chosen(sums, np.arange(41), 8, 0).tolist())) == 8
        assert sorted(_chosen(sums, np.arange(3), 7, 0).tolist()).count(0) >= 2

    def test_errors_that_grow_with_the_scores(self):
        scales = np.geomspace(0.01, 10, 30)
        assert _power(0.3 * scales, scales) == pytest.approx(1, abs=0.05)
        assert _power(np.full(30, 0.2), scales) == pytest.approx(0, abs=0.05)
        assert _power(0.1 * scales**0.5, scales) == pytest.approx(0.5, abs=0.05)
        assert _power(np.ones(3), np.ones(3)) == 0

    def test_pairs_are_used_equally_often(self):
        rows = _drawn_pairs(31, 45, seed=1)
        assert rows.shape == (45, 6)
        assert all(len(set(row)) == 6 for row in rows.tolist())
        counts = np.bincount(rows.ravel(), minlength=31)
        assert counts.max() - counts.min() <= 3

    def test_a_quantile_leaves_room_for_the_next_set(self):
        errors = np.arange(1.0, 20.0)
        assert _quantile(errors, 0.95) == 19.0, "19 of 20 equally likely places of the next error are below"
        assert _quantile(errors, 0.5) == 10.0


def _penalised(points, values, settings):
    """The log likelihood plus the log prior, by SciPy's multivariate normal."""
    length, smooth, linear, noise = np.exp(settings)
    distance = ((points[:, None] - points[None]) ** 2).mean(axis=-1)
    covariance = 1 + smooth * np.exp(-distance / (2 * length**2)) + linear * (points @ points.T) / points.shape[1]
    covariance += (noise + 1e-6) * np.eye(len(points))
    likelihood = stats.multivariate_normal(cov=covariance).logpdf(values)
    prior = stats.norm([0, -0.7, -0.7, -1.2], [1.4, 2.8, 2.8, 2.8]).logpdf(settings).sum()
    return likelihood + prior


def test_a_saved_result_loads_equal_and_repeats(head, pairs, sets, predicted, tmp_path):
    again = predict_set_effects(head, pairs, sets, passes=12, progress=False)
    pd.testing.assert_frame_equal(again.table, predicted.table)
    predicted.save(tmp_path / "effects.safetensors")
    loaded = SetEffects.load(tmp_path / "effects.safetensors")
    pd.testing.assert_frame_equal(loaded.table, predicted.table)
    pd.testing.assert_frame_equal(loaded.checked, predicted.checked)
    assert loaded.provenance == predicted.provenance
    assert "Spearman" in repr(loaded)
    next(iter(sets.values())).save(tmp_path / "set.safetensors")
    with pytest.raises(StorageError, match="SetEffects"):
        SetEffects.load(tmp_path / "set.safetensors")


def test_wrong_arguments(head, pairs, sets, checkpoints):
    with pytest.raises(OptionError, match="allow 8 true ablations"):
        predict_set_effects(head, pairs, sets, passes=2)
    with pytest.raises(
        OptionError, match=r"allow 16 true ablations of 6 pairs, expected at least 19 for intervals at 95%"
    ):
        predict_set_effects(head, pairs[:24], sets, passes=4)
    with pytest.raises(OptionError, match="got one that skips such pairs"):
        predict_set_effects(
            RewardHead.from_pretrained(checkpoints["gpt2"], on_nonfinite="skip"), pairs, sets, passes=12
        )
    with pytest.raises(OptionError, match="at least one set"):
        predict_set_effects(head, pairs, {})
    with pytest.raises(OptionError, match="all of them are empty"):
        predict_set_effects(head, pairs, {"empty": sets["empty"]}, passes=12)
    with pytest.raises(OptionError, match="needs both texts"):
        unchecked(predict_set_effects)(head, pairs, sets, OtherResponse(), passes=12)
    other = RewardHead.from_pretrained(checkpoints["llama"])
    with pytest.raises(ProvenanceError):
        predict_set_effects(other, pairs, sets, Zero())
