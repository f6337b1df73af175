"""Diagnosis and receipts: counts by hand, controls, files, and what is refused."""

import numpy as np
import pandas as pd
import pytest
import torch

from rmtension import PreferencePairs, RewardHead
from rmtension.errors import CheckError, OptionError, StorageError
from rmtension.repair._ceiling import SpecialistEnsemble, closed_share
from rmtension.repair._diagnose import diagnose
from rmtension.repair._edit import Edit
from rmtension.repair._receipt import RepairReport, best_of_several
from rmtension.repair._repair import METHODS, Repair, repair
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
    report = mended.report
    edited = mended.edit.apply(damaged)
    checks = report.checks.set_index("quantity")
    for name in ("harmless", "helpful"):
        for model, column in ((damaged, "before"), (edited, "after")):
            scored = model.score_pairs(pairs.test[name])
            assert checks.loc[f"{name} accuracy", column] == pytest.approx(scored.accuracy(), abs=1e-12)
            assert checks.loc[f"{name} margin", column] == pytest.approx(float(scored.margin.double().mean()), rel=1e-6)
    assert report.closed.value > 0.9
    controls = report.controls.set_index("control")
    assert controls.index.tolist() == ["shuffled labels", "gains of as many neurons"]
    assert controls.loc["shuffled labels", "closed"] == 0
    assert controls.loc["shuffled labels", "numbers"] == 0
    assert report.diagnosis.predicted.value > 0.9
    assert "closes 1.000 [1.000, 1.000] of the gap" in repr(report)


@pytest.mark.grid
def test_random_neurons_close_little(damaged, pairs):
    report = repair(damaged, pairs, "gains", n_random=3, progress=False).report
    random = report.controls.query("control == 'random neurons'")
    assert len(random) == 3
    assert (random["closed"] < report.closed.low).all()


def test_reports_are_files(mended, tmp_path):
    report = mended.report
    report.save(tmp_path / "report.json")
    loaded = RepairReport.load(tmp_path / "report.json")
    for table in ("checks", "path", "controls"):
        pd.testing.assert_frame_equal(loaded.to_frame(table), report.to_frame(table))
    assert (loaded.closed, loaded.diagnosis) == (report.closed, report.diagnosis)
    with pytest.raises(OptionError, match="table: expected"):
        report.to_frame("gap")
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


def test_a_repaired_checkpoint_has_its_edit_and_report_beside_it(damaged, pairs, mended, tmp_path):
    mended.save_pretrained(tmp_path / "mended")
    few = pairs.test["harmless"][:8]
    edited = mended.head.score_pairs(few).margin
    reopened = RewardHead.from_pretrained(tmp_path / "mended").score_pairs(few).margin
    from_edit = Edit.load(tmp_path / "mended" / "repair.safetensors").apply(damaged).score_pairs(few).margin
    for margins in (reopened, from_edit):
        assert torch.allclose(margins, edited, rtol=1e-5, atol=1e-5)
    assert RepairReport.load(tmp_path / "mended" / "repair.json").closed == mended.report.closed
    assert (edited - damaged.score_pairs(few).margin).abs().max() > 1e-2


def test_what_cannot_be_repaired_is_refused(damaged, head, pairs, monkeypatch):
    with pytest.raises(OptionError, match="method: expected"):
        repair(damaged, pairs, "magic")
    with pytest.raises(OptionError, match="specialists: 'distilled ensemble' needs a model for each objective"):
        repair(damaged, pairs, "distilled ensemble")
    with pytest.raises(OptionError, match=r"counts: .head refit. has no such option\. It has shares, ridges"):
        repair(damaged, pairs, "head refit", counts=[1])
    with pytest.raises(OptionError, match=r"weak, strong: expected two of \['harmless', 'helpful'\]"):
        repair(damaged, dict(pairs.fit), weak="harmless")

    def fail(*_):
        raise CheckError("bridge", pd.DataFrame())

    monkeypatch.setattr(RewardHead, "check", fail)
    with pytest.raises(CheckError):
        repair(damaged, pairs, "head refit", progress=False)


def test_no_edit_is_no_checkpoint(damaged, pairs, mended, tmp_path):
    with pytest.raises(OptionError, match="there is no repaired model to save"):
        Repair(damaged, None, mended.report).save_pretrained(tmp_path / "none")
    assert not (tmp_path / "none").exists()


@pytest.mark.grid
@pytest.mark.parametrize("method", METHODS)
def test_every_method_runs_on_the_same_test(method, head, damaged, pairs):
    specialists = {"harmless": head, "helpful": head}
    found = repair(damaged, pairs, method, specialists=specialists, n_random=1, progress=False)
    report = found.report
    assert (found.edit is None) == (not report.edit["made"])
    assert {"closed", "allowed"} <= {*report.path.columns}
    assert "shuffled labels" in set(report.controls["control"])
    assert ("head refit" in set(report.controls["control"])) == (method != "head refit")
    if method in ("head refit", "gains", "down projection", "distilled ensemble", "merged specialists"):
        assert report.closed.value > 0.8
    strong = report.checks.set_index("quantity").loc["helpful accuracy", "change"]
    assert strong > -0.03
