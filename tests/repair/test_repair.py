"""Diagnosis and receipts: counts by hand, controls, files, and what is refused."""

import json
from dataclasses import replace

import numpy as np
import pandas as pd
import peft
import pytest
import torch
from own_models import make_own
from scipy.stats import binomtest
from transformers import AutoModelForSequenceClassification

from rmtension import PreferencePairs, RewardHead
from rmtension.errors import CheckError, DataError, ModelError, OptionError, StorageError
from rmtension.evaluation import Estimate
from rmtension.repair._ceiling import SpecialistEnsemble, closed_share
from rmtension.repair._choice import change_of_accuracy
from rmtension.repair._diagnose import diagnose
from rmtension.repair._edit import Edit
from rmtension.repair._features import SplitStates
from rmtension.repair._receipt import RepairReport, best_of_several
from rmtension.repair._repair import METHODS, Repair, _require_editable, repair
from rmtension.repair._splits import RepairPairs, shuffled_labels


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
    assert found.ceiling_of == "specialists"
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


def test_a_report_without_an_edit_says_which_condition_failed(mended):
    """Three candidates by hand: two gain beyond chance, and the second of these is nearer to sparing helpful."""
    path = pd.DataFrame(
        {
            "harmless_change": [0.20, 0.12, 0.25],
            "harmless_low": [0.10, 0.01, -0.02],
            "helpful_change": [-0.04, -0.06, 0.0],
            "helpful_low": [-0.15, -0.11, 0.0],
            "closed": 0.5,
            "allowed": [False, False, True],
        }
    )
    report = replace(mended.report, path=path, edit={**mended.report.edit, "made": False}, most_lost=0.05)
    said = report.findings()[0]
    assert "of 3 candidates, 2 improved harmless beyond chance" in said
    assert "changes harmless by +0.120 (at least +0.010), and helpful by -0.060 (at least -0.110" in said
    assert "-0.050 is allowed" in said
    assert "More helpful pairs" not in said, "it loses more than is allowed"
    said = replace(report, path=path.drop(1), most_lost=0.1).findings()[0]
    assert said.endswith("-0.100 is allowed). More helpful pairs would narrow this bound.")
    said = replace(report, path=path[2:]).findings()[0]
    assert said.endswith(
        "of 1 candidate, none improved harmless beyond chance on development pairs. The largest gain "
        "is +0.250 (at least -0.020)."
    )


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
    # If all are equally good, one of p's three responses is never rejected, and one of r's.
    (tied, _), _ = best_of_several(pairs, torch.zeros(2, 5), after)
    assert tied.tolist() == pytest.approx([1 / 3, 1 / 3])


def test_shuffled_labels_exchange_half(pairs):
    part = pairs.fit["harmless"]
    shuffled = shuffled_labels(part, 0)
    exchanged = [now.chosen == was.rejected for now, was in zip(shuffled, part, strict=True)]
    assert sum(exchanged) == len(part) // 2
    assert shuffled_labels(part, 0) == shuffled != shuffled_labels(part, 1)


def test_states_of_shuffled_labels_are_those_of_a_run_of_the_shuffled_pairs(damaged, pairs):
    known = SplitStates.of(damaged, pairs)
    derived, run = known.shuffled("harmless", 3), SplitStates.of(damaged, pairs.shuffled(3))
    for ours, theirs, before in ((derived.fit, run.fit, known.fit), (derived.development, run.development, None)):
        for name in ("harmless", "helpful"):
            assert torch.equal(ours[name].difference, theirs[name].difference)
            assert torch.equal(ours[name].margin, theirs[name].margin)
        if before is not None:
            assert not torch.equal(ours["harmless"].margin, before["harmless"].margin)
            assert torch.equal(ours["helpful"].margin, before["helpful"].margin)


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


def test_without_specialists_the_probe_is_the_ceiling(damaged, pairs):
    """What spares the strong objective is a share of it, and not 1 by definition."""
    found = diagnose(damaged, pairs, progress=False)
    assert (found.ceiling_of, found.probe.value) == ("probe", 1.0)
    assert "a probe recovers" not in repr(found)
    few = replace(pairs, development={**pairs.development, "harmless": pairs.development["harmless"][:3]})
    assert diagnose(damaged, few, progress=False).gap.low < found.gap.low


@pytest.mark.parametrize(("n", "change"), [(60, 0.0), (400, 0.0), (60, -1.0)])
def test_changes_of_accuracy_are_as_wide_as_few_losses_allow(n, change):
    part = PreferencePairs.from_records([{"prompt": f"p{i}", "chosen": "a", "rejected": "b"} for i in range(n)])
    changes = torch.zeros(n, dtype=torch.float64)
    changes[:1] = change
    estimate = change_of_accuracy(changes, part, level=0.9)
    losses = int(change < 0)
    exact = binomtest(losses, n).proportion_ci(0.9, method="exact").high
    assert estimate.value == pytest.approx(-losses / n)
    assert estimate.low == pytest.approx(-exact)
    assert estimate.high >= 0


def test_chats_are_divided_and_compared(organism, pairs):
    """Keys are the pair's own fields, whatever they are."""
    chats = {name: part.as_chat() for name, part in organism.pairs.items()}
    split = RepairPairs.split(chats, weak="harmless", strong="helpful", most_lost=0.05)
    assert len(split.fit["harmless"]) == len(pairs.fit["harmless"])
    rewards = torch.zeros(2, len(split.test["harmless"]))
    best_of_several(split.test["harmless"], rewards, rewards)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"most_lost": 0.01}, r"69 prompts of 'helpful' cannot show .* Give 299 prompts, or pass most_lost=0.043"),
        ({"most_lost": 0.0}, "No number of prompts shows a loss of exactly 0: pass most_lost=0.043"),
        ({"most_lost": -1.0}, "most_lost: expected a share"),
    ],
)
def test_too_few_strong_pairs_to_show_a_loss_are_refused(organism, options, message):
    with pytest.raises(OptionError, match=message):
        RepairPairs.split(organism.pairs, weak="harmless", strong="helpful", seed=0, **options)


def test_pairs_that_cannot_be_repaired_are_refused(organism, damaged, pairs):
    harmless = organism.pairs["harmless"]
    swapped = PreferencePairs(pair.swapped() for pair in harmless)
    with pytest.raises(DataError, match="no harmless pairs are left: of 240, 240 contradict"):
        RepairPairs.split({"harmless": harmless, "helpful": swapped}, weak="harmless", strong="helpful")
    with pytest.raises(OptionError, match="have the same pairs"):
        RepairPairs.split({"harmless": harmless, "helpful": harmless}, weak="harmless", strong="helpful")
    with pytest.raises(OptionError, match="weak, strong: the splits are made for weak 'harmless'"):
        repair(damaged, pairs, "head refit", weak="helpful", strong="harmless")


@pytest.mark.parametrize(
    ("method", "options", "message"),
    [
        ("gains", {"counts": [0]}, "counts: expected a list of numbers of neurons, from 1 to 256"),
        ("gains", {"counts": []}, "counts: expected a list"),
        ("gains", {"steps": 0}, "steps: expected a whole number"),
        ("head refit", {"shares": []}, "shares: expected weights"),
        ("head refit", {"shares": [2.0]}, "shares: expected weights"),
        ("head refit", {"ridges": [0.0]}, "ridges: expected at least one number, all above 0, got"),
        ("subspace removal", {"alphas": []}, "alphas: expected at least one number, all above 0, got"),
        ("medians", {"fractions": [-1.0]}, "fractions: expected at least one number, all above 0, up to 1, got"),
        ("head refit", {"n_random": -1}, "n_random: expected a whole number"),
        ("down projection", {"layers": [9]}, "layers: expected layers from 0 to 3"),
        ("down projection", {"n_tried": 0}, "steps, weights, n_tried: expected at least one"),
    ],
)
def test_wrong_options_are_refused(method, options, message, damaged, pairs):
    with pytest.raises(OptionError, match=message):
        repair(damaged, pairs, method, progress=False, **options)


def test_numbers_without_a_name_in_json_are_kept(mended, tmp_path):
    nan = float("nan")
    odd = replace(
        mended.report,
        closed=Estimate(nan, -float("inf"), nan, 6, 6),
        controls=mended.report.controls.assign(closed=nan),
    )
    odd.save(tmp_path / "odd.json")
    json.loads((tmp_path / "odd.json").read_text(), parse_constant=lambda name: pytest.fail(name))
    loaded = RepairReport.load(tmp_path / "odd.json")
    assert np.isnan(loaded.closed.value)
    assert loaded.closed.low == -float("inf")
    assert loaded.controls["closed"].isna().all()
    assert "the test pairs show no gap (6 prompts)" in repr(loaded)
    assert "shuffled labels unknown" in repr(loaded)
    values = json.loads((tmp_path / "odd.json").read_text())
    for name, wrong in (("diagnosis", None), ("path", None), ("checks", [{"a": 1}])):
        (tmp_path / "wrong.json").write_text(json.dumps({**values, name: wrong}))
        with pytest.raises(StorageError, match=r"expected a file that RepairReport\.save wrote"):
            RepairReport.load(tmp_path / "wrong.json")


@pytest.mark.parametrize(
    ("part", "message"),
    [
        ({"row": torch.ones(3)}, r"row: expected the shape \(40,\)"),
        ({"gains": torch.ones(2, 3)}, r"gains: expected the shape \(4, 64\)"),
        ({"added": {99: torch.ones(40, 64)}}, "added: expected layers below 4"),
    ],
)
def test_edits_of_other_shapes_are_refused(part, message, damaged):
    with pytest.raises(OptionError, match=message):
        Edit("wrong", damaged.fingerprint, damaged.architecture, **part).apply(damaged)


def test_other_heads_need_specialists(head, damaged, pairs, monkeypatch):
    """A head of another kind has no row to refit: with specialists it is diagnosed, and neurons may be edited."""

    monkeypatch.setattr("rmtension.repair._diagnose.has_reward_row", lambda head: False)
    with pytest.raises(ModelError, match="specialists: the reward of this model is not one row of a linear head"):
        diagnose(damaged, pairs, progress=False)
    found = diagnose(damaged, pairs, specialists={"harmless": head, "helpful": head}, progress=False)
    assert found.has_gap
    assert np.isnan(found.predicted.value)
    assert "no refit predicts a closed share" in repr(found)


@pytest.mark.parametrize(
    ("method", "message"),
    [
        (
            "medians",
            "medians edit: constants such as means need a bias to write to",
        ),
        (
            "fine-tuning",
            "fine-tuning edit: it changes parameters of a transformers checkpoint, and this model has none",
        ),
    ],
)
def test_what_cannot_be_edited_is_refused_before_anything_runs(method, message, pairs, monkeypatch):
    model = make_own("native", gated_mlp=True)
    head = RewardHead(model, weight=torch.ones(16, dtype=torch.float64))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    monkeypatch.setattr("rmtension.models._reward_model.RewardModel.forward", None)
    with pytest.raises(ModelError, match=message):
        repair(head, pairs, method)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


# peft calls transformers by a name that it has deprecated.
@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.* is deprecated:FutureWarning")
@pytest.mark.parametrize("method", ["fine-tuning", "merged specialists"])
def test_parameters_are_found_beside_adapters(method, checkpoints, tokenizer):
    """Of the embedding, which comes first: adapters give its weight another name."""
    config = peft.LoraConfig(r=2, target_modules=["wte"], task_type="SEQ_CLS", init_lora_weights=False)
    model = peft.get_peft_model(AutoModelForSequenceClassification.from_pretrained(checkpoints["gpt2"]), config)
    head = RewardHead.from_classifier(model.eval(), tokenizer=tokenizer)
    assert "wte.base_layer.weight" in dict(head.checkpoint.base.named_parameters())
    _require_editable(head, method)
