"""Diagnosis and receipts: counts by hand, controls, files, and what is refused."""

import numpy as np
import pandas as pd
import pytest
import torch

from rmtension import PreferencePairs
from rmtension.errors import OptionError, StorageError
from rmtension.repair._ceiling import SpecialistEnsemble, closed_share
from rmtension.repair._diagnose import diagnose
from rmtension.repair._receipt import RepairReport, best_of_several
from rmtension.repair._repair import repair
from rmtension.repair._splits import shuffled_labels


@pytest.fixture(scope="module")
def mended(damaged, pairs):
    return repair(damaged, pairs, "head refit", progress=False)


def test_a_closed_share_is_a_ratio_of_accuracies(pairs):
    part = pairs.test["harmless"]
    n = len(part)
    before, after, ceiling = (torch.full((n,), -1.0, dtype=torch.float64) for _ in range(3))
    ceiling[: n // 2] = 1
    after[: n // 4] = 1
    share = closed_share(part, before, after, ceiling)
    assert share.value == pytest.approx((n // 4) / (n // 2))
    assert share.low < share.value < share.high
    assert closed_share(part, before, ceiling, ceiling).low == 1.0
    assert closed_share(part, before, -ceiling.abs(), ceiling).value == 0.0
    assert np.isnan(closed_share(part, before, after, before).value), "no gap"


def test_an_ensemble_is_the_sum_of_scaled_rewards(head, damaged, pairs):
    ensemble = SpecialistEnsemble({"harmless": head, "helpful": damaged}, pairs)
    part, both = pairs.test["harmless"], pairs.fit["harmless"] + pairs.fit["helpful"]
    expected = sum(
        model.score_pairs(part).margin.double() / model.score_pairs(both).margin.double().std()
        for model in (head, damaged)
    )
    assert torch.allclose(ensemble.margins(part), expected, rtol=1e-6, atol=1e-6)
    with pytest.raises(OptionError, match="specialists: expected a model for"):
        SpecialistEnsemble({"harmless": head}, pairs)


def test_a_diagnosis_predicts_before_anything_is_edited(head, damaged, pairs):
    found = diagnose(damaged, pairs, specialists={"harmless": head, "helpful": head}, progress=False)
    development = pairs.development["harmless"]
    assert found.before.value == damaged.score_pairs(development).accuracy()
    assert found.gap.value == pytest.approx(
        found.ceiling.value - damaged.score_pairs(development).accuracy(), abs=1e-12
    )
    assert found.is_present
    assert found.has_gap
    assert found.predicted.value > 0.9
    assert "holds what harmless needs" in repr(found)


def test_what_is_whole_is_not_mended(head, pairs):
    found = diagnose(head, pairs, specialists={"harmless": head, "helpful": head}, progress=False)
    assert not found.has_gap
    with pytest.raises(OptionError, match=r"nothing to repair is shown(.|\n)*interval of the gap includes 0"):
        repair(head, pairs, specialists={"harmless": head, "helpful": head}, progress=False)


def test_a_receipt_is_measured_on_the_written_model(damaged, pairs, mended):
    edit, report = mended
    edited = edit.apply(damaged)
    checks = report.checks.set_index("quantity")
    for name in ("harmless", "helpful"):
        for model, column in ((damaged, "before"), (edited, "after")):
            scored = model.score_pairs(pairs.test[name])
            assert checks.loc[f"{name} accuracy", column] == pytest.approx(scored.accuracy(), abs=1e-12)
            assert checks.loc[f"{name} margin", column] == pytest.approx(float(scored.margin.double().mean()), rel=1e-6)
    assert report.closed.value > 0.9
    assert report.controls["control"].tolist() == ["shuffled labels"]
    assert "closed share of the gap" in repr(report)


@pytest.mark.grid
def test_random_neurons_close_little(damaged, pairs):
    _, report = repair(damaged, pairs, "gains", n_random=3, progress=False)
    random = report.controls.query("control == 'random neurons'")
    assert len(random) == 3
    assert (random["closed"] < report.closed.low).all()


def test_reports_are_files(mended, tmp_path):
    _, report = mended
    report.save(tmp_path / "report.json")
    loaded = RepairReport.load(tmp_path / "report.json")
    pd.testing.assert_frame_equal(loaded.checks, report.checks)
    pd.testing.assert_frame_equal(loaded.controls, report.controls)
    assert loaded.closed == report.closed
    (tmp_path / "other.json").write_text("{}")
    with pytest.raises(StorageError, match=r"expected a file that RepairReport\.save wrote"):
        RepairReport.load(tmp_path / "other.json")


def test_the_best_of_several_is_the_response_that_is_never_rejected():
    rows = [("p", "a", "b"), ("p", "a", "c"), ("q", "a", "b"), ("r", "a", "b"), ("r", "b", "c")]
    pairs = PreferencePairs.from_records(
        [{"prompt": prompt, "chosen": chosen, "rejected": rejected} for prompt, chosen, rejected in rows]
    )
    # Before, p's best is a and r's best is b; after, p's best is c and r's best is a. q has two responses only.
    before = torch.tensor([[3.0, 3, 0, 1, 2], [1, 2, 0, 2, 0]])
    after = torch.tensor([[1.0, 1, 0, 2, 1], [0, 2, 0, 1, 0]])
    (was, now), kept = best_of_several(pairs, before, after)
    assert [pair.prompt for pair in kept] == ["p", "r"]
    assert was.tolist() == [1, 0]
    assert now.tolist() == [0, 1]


def test_shuffled_labels_exchange_half(pairs):
    part = pairs.fit["harmless"]
    shuffled = shuffled_labels(part, 0)
    exchanged = [now.chosen == was.rejected for now, was in zip(shuffled, part, strict=True)]
    assert sum(exchanged) == len(part) // 2
    assert shuffled_labels(part, 0) == shuffled != shuffled_labels(part, 1)
