"""Refit of the reward row, choices on development pairs, and edits as files and copies."""

import numpy as np
import pandas as pd
import pytest
import torch
import transformers
from torch.nn.functional import softplus

from rmtension import PreferencePairs
from rmtension.errors import DataError, OptionError, ProvenanceError, StorageError
from rmtension.evaluation._intervals import bootstrap_mean
from rmtension.repair._choice import Candidate, _bounds_of_all, best_candidate, compare_candidates
from rmtension.repair._distil import distil_ensemble, distilled_row
from rmtension.repair._edit import Edit
from rmtension.repair._features import read_states
from rmtension.repair._refit import SHARES, refit_head, refit_row
from rmtension.repair._row_edits import RIDGES
from rmtension.repair._splits import RepairPairs, contradictory_pairs

# -- splits ------------------------------------------------------------------------------------------------------------


def test_splits_share_no_prompt_and_lose_no_pair(organism, pairs):
    for name, part in organism.pairs.items():
        kept = [pair for split in (pairs.fit, pairs.development, pairs.test) for pair in split[name]]
        assert len(kept) == len(part)
        assert {pair.digest() for pair in kept} == {pair.digest() for pair in part}
    with pytest.raises(OptionError, match=r"test: \d+ of its prompts are in fit too"):
        RepairPairs("harmless", "helpful", pairs.fit, pairs.development, pairs.fit, pairs.contradictory, 0.05)


def test_contradictory_pairs_are_kept_apart():
    def made(rows):
        return PreferencePairs.from_records(
            [{"prompt": prompt, "chosen": chosen, "rejected": rejected} for prompt, chosen, rejected in rows]
        )

    weak = made([("p", "a", "b"), ("q", "a", "b"), ("r", "c", "c"), *[(f"w{i}", "x", "y") for i in range(9)]])
    strong = made([("p", "b", "a"), ("q", "a", "b"), ("r", "c", "c"), *[(f"s{i}", "x", "y") for i in range(9)]])
    apart = contradictory_pairs(weak, strong)
    assert [[pair.prompt for pair in part] for part in apart] == [["p"], ["p"]]
    split = RepairPairs.split({"a": weak, "b": strong}, weak="a", strong="b", most_lost=0.9)
    assert [len(split.contradictory[name]) for name in ("a", "b")] == [1, 1]
    left = [pair.prompt for part in (split.fit, split.development, split.test) for pair in part["a"]]
    assert "p" not in left
    assert len(left) == 11


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"weak": "harm", "strong": "helpful"}, OptionError, "weak, strong: expected two of"),
        ({"weak": "helpful", "strong": "helpful"}, OptionError, "weak, strong: expected two of"),
        ({"weak": "harmless", "strong": "helpful", "shares": (0.5, 0.5)}, OptionError, "three positive numbers"),
        (
            {"weak": "harmless", "strong": "helpful", "shares": (0.996, 0.002, 0.002)},
            DataError,
            "prompts are too few for splits",
        ),
    ],
)
def test_wrong_splits_are_refused(options, error, message, organism):
    few = {name: part[:30] for name, part in organism.pairs.items()}
    with pytest.raises(error, match=message):
        RepairPairs.split(few, **options)


# -- refit -------------------------------------------------------------------------------------------------------------


def test_states_are_those_that_the_row_reads(damaged, pairs):
    part = pairs.fit["helpful"]
    states = read_states(damaged, part)
    assert torch.allclose(states.difference @ damaged.weight.double(), states.margin, rtol=0, atol=1e-4)
    assert torch.equal(
        states.margin, damaged.score_pairs(part).chosen.double() - damaged.score_pairs(part).rejected.double()
    )


def test_a_refit_row_has_no_gradient_left(damaged, pairs):
    weak, strong = (read_states(damaged, pairs.fit[name]) for name in ("harmless", "helpful"))
    move = refit_row(weak, strong, share=0.7, ridge=1e-3).requires_grad_(True)
    both = torch.cat([weak.difference, strong.difference])
    metric = both.T @ both / len(both)
    metric = metric + 1e-3 * metric.diagonal().mean() * torch.eye(len(metric), dtype=torch.float64)
    losses = [softplus(-(part.margin + part.difference @ move)).mean() for part in (weak, strong)]
    (gradient,) = torch.autograd.grad(0.7 * losses[0] + 0.3 * losses[1] + 1e-3 * move @ metric @ move, move)
    assert gradient.abs().max() < 1e-8


def test_a_refit_mends_what_the_states_still_hold(damaged, pairs):
    """On test pairs, which neither the fit nor the choice has seen."""
    edit, dial = refit_head(damaged, pairs, progress=False)
    assert len(dial) == len(SHARES) * len(RIDGES)
    edited = edit.apply(damaged)
    before, after = (
        {name: model.score_pairs(pairs.test[name]).accuracy() for name in ("harmless", "helpful")}
        for model in (damaged, edited)
    )
    assert before["harmless"] < 0.7
    assert after["harmless"] > 0.85
    assert after["helpful"] > before["helpful"] - 0.03
    # The development pairs' predicted accuracy is what the edited model has.
    chosen = dial.loc[best_candidate(pairs, dial)]
    real = edited.score_pairs(pairs.development["harmless"]).accuracy()
    assert chosen["harmless_accuracy"] == pytest.approx(real, abs=1e-12)


def test_a_candidate_that_hurts_the_strong_objective_is_not_taken(pairs):
    n_weak, n_strong = (len(pairs.development[name]) for name in ("harmless", "helpful"))
    before = {"harmless": -torch.ones(n_weak).double(), "helpful": torch.ones(n_strong).double()}
    hurting = before["helpful"].clone()
    hurting[: n_strong // 4] = -1
    better = before["harmless"].clone()
    better[: n_weak // 3] = 1
    candidates = [
        Candidate({"name": "nothing"}, before),
        Candidate({"name": "hurts"}, {"harmless": -before["harmless"], "helpful": hurting}),
        Candidate({"name": "spares"}, {"harmless": better, "helpful": before["helpful"]}),
    ]
    table = compare_candidates(pairs, before, candidates)
    assert table["allowed"].tolist() == [True, False, True]
    # No pair is lost: the bound is that of Clopper and Pearson, 1 - .05^(1 / n).
    n = len(pairs.development["helpful"].prompts)
    assert table["helpful_low"].iloc[2] == pytest.approx(0.05 ** (1 / n) - 1)
    assert best_candidate(pairs, table) == 2
    assert best_candidate(pairs, table[:2]) is None, "no gain, or not allowed"
    assert table["harmless_change"].tolist() == pytest.approx([0, 1, (n_weak // 3) / n_weak])


def test_bounds_hold_for_all_candidates_together():
    """Of changes that are coin tosses, the best of thirty has a bound above 0 in about 5% of data sets, not in most."""
    rng = np.random.default_rng(0)
    part = PreferencePairs.from_records(
        [{"prompt": f"p{number}", "chosen": "a", "rejected": "b"} for number in range(120)]
    )
    alone = together = 0
    for seed in range(60):
        changes = torch.from_numpy(rng.choice([-1.0, 0.0, 1.0], p=[0.15, 0.7, 0.15], size=(30, 120)))
        bounds = _bounds_of_all(changes, part, seed)
        together += bool((bounds > 0).any())
        alone += any(bootstrap_mean(row, part, level=0.9, seed=seed).low > 0 for row in changes)
    # 60 draws of 5%: 3 on average, and more than 8 in 1 of 200 runs.
    assert together <= 8
    assert alone > 30, "bounds of single candidates do not hold for the best of many"
    (single,) = _bounds_of_all(changes[:1], part, 0)
    assert single == pytest.approx(bootstrap_mean(changes[0], part, level=0.9, seed=0).low, abs=0.01)


def test_the_smallest_of_equally_good_candidates_is_taken(pairs):
    rows = [(1, 0.10, 0.05), (3, 0.29, 0.2), (8, 0.30, 0.2), (30, 0.31, 0.2), (2, 0.30, -0.1)]
    table = pd.DataFrame(
        [
            {"numbers": n, "harmless_change": gain, "harmless_low": low, "harmless_loss": 1.0, "harmless_error": 0.03,
             "allowed": True}
            for n, gain, low in rows
        ]
    )  # fmt: skip
    assert best_candidate(pairs, table) == 1
    assert best_candidate(pairs, table.assign(harmless_error=0.0)) == 3
    assert best_candidate(pairs, table.assign(harmless_low=-1.0)) is None


# -- edits -------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def edit(damaged):
    draw = torch.Generator().manual_seed(0)
    shape = (damaged.n_layers, damaged.n_neurons("mlp"))
    gains = torch.ones(shape, dtype=torch.float64)
    gains[0, :5] = torch.linspace(0.5, 1.7, 5, dtype=torch.float64)
    added = {1: 0.01 * torch.randn(damaged.d_model, shape[1], generator=draw, dtype=torch.float64)}
    row = 0.1 * torch.randn(damaged.d_model, generator=draw, dtype=torch.float64)
    return Edit("drawn", damaged.fingerprint, damaged.architecture, row=row, gains=gains, added=added)


def test_an_edit_is_what_plain_weights_compute(damaged, edit, pairs, tmp_path):
    """In transformers, from the saved checkpoint, against weights that were edited by hand."""
    few = pairs.test["helpful"][:6]
    before = damaged.score_pairs(few)
    edited = edit.apply(damaged)
    assert torch.equal(damaged.score_pairs(few).chosen, before.chosen), "the model itself is as it was"
    edited.save_pretrained(tmp_path / "edited")
    plain = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "edited")
    damaged.save_pretrained(tmp_path / "damaged")
    by_hand = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "damaged")
    with torch.no_grad():
        # GPT-2's projections hold [in, out].
        by_hand.transformer.h[0].mlp.c_proj.weight *= edit.gains[0, :, None]
        by_hand.transformer.h[1].mlp.c_proj.weight += edit.added[1].T
        by_hand.score.weight += edit.row
    texts = [pair.text("chosen") for pair in few]
    for text, reward in zip(texts, edited.score_pairs(few).chosen.tolist(), strict=True):
        ids = torch.tensor([damaged.tokenizer(text)["input_ids"]])
        for model in (plain, by_hand):
            assert model(ids).logits.item() == pytest.approx(reward, rel=1e-6, abs=1e-5)
    assert (edited.score_pairs(few).chosen - before.chosen).abs().max() > 1e-2


def test_an_edit_is_a_file_for_one_model(damaged, head, edit, tmp_path):
    edit.save(tmp_path / "edit.safetensors")
    loaded = Edit.load(tmp_path / "edit.safetensors")
    assert torch.equal(loaded.row, edit.row)
    assert torch.equal(loaded.gains, edit.gains)
    assert torch.equal(loaded.added[1], edit.added[1])
    assert loaded.n_numbers == edit.n_numbers == damaged.d_model * (1 + damaged.n_neurons("mlp")) + 5
    with pytest.raises(ProvenanceError, match="edit: it is for model"):
        loaded.apply(head)
    with pytest.raises(ProvenanceError, match="edit: it is for model"):
        loaded.apply(loaded.apply(damaged))
    (tmp_path / "other.safetensors").write_bytes(b"")
    with pytest.raises(StorageError):
        Edit.load(tmp_path / "other.safetensors")


def test_an_edit_adds_to_parameters_by_name(damaged, pairs, tmp_path):
    """In a file and in plain weights; a name that the checkpoint does not have is refused."""
    draw = torch.Generator().manual_seed(1)
    width = damaged.n_neurons("mlp")
    parameters = {
        "h.0.mlp.c_fc.weight": 0.05 * torch.randn(damaged.d_model, width, generator=draw, dtype=torch.float64),
        "h.1.mlp.c_fc.bias": 0.05 * torch.randn(width, generator=draw, dtype=torch.float64),
    }
    edit = Edit("drawn", damaged.fingerprint, damaged.architecture, parameters=parameters)
    edit.save(tmp_path / "edit.safetensors")
    loaded = Edit.load(tmp_path / "edit.safetensors")
    assert edit.n_numbers == loaded.n_numbers == damaged.d_model * width + width
    edited = loaded.apply(damaged)
    damaged.save_pretrained(tmp_path / "damaged")
    by_hand = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "damaged")
    with torch.no_grad():
        for name, added in parameters.items():
            by_hand.transformer.get_parameter(name).add_(added)
    few = pairs.test["helpful"][:6]
    for pair, reward in zip(few, edited.score_pairs(few).chosen.tolist(), strict=True):
        ids = torch.tensor([damaged.tokenizer(pair.text("chosen"))["input_ids"]])
        assert by_hand(ids).logits.item() == pytest.approx(reward, rel=1e-6, abs=1e-5)
    assert (edited.score_pairs(few).chosen - damaged.score_pairs(few).chosen).abs().max() > 1e-3
    with pytest.raises(OptionError, match="parameters: 'nothing' of the shape"):
        Edit("no", damaged.fingerprint, damaged.architecture, parameters={"nothing": torch.zeros(1)}).apply(damaged)


# -- distilled ensembles -----------------------------------------------------------------------------------------------


def test_a_distilled_row_is_the_ridge_regression_of_numpy():
    draw = torch.Generator().manual_seed(0)
    features = torch.randn(20, 6, generator=draw, dtype=torch.float64)
    change = torch.randn(20, generator=draw, dtype=torch.float64)
    found = distilled_row(features, change, 0.1)
    size = float(features.square().mean())
    rows = torch.cat([features / 20**0.5, (0.1 * size) ** 0.5 * torch.eye(6, dtype=torch.float64)])
    expected, *_ = np.linalg.lstsq(rows.numpy(), np.concatenate([change.numpy() / 20**0.5, np.zeros(6)]), rcond=None)
    assert found.numpy() == pytest.approx(expected, abs=1e-10)


def test_a_distilled_ensemble_mends(head, damaged, pairs):
    edit, table = distil_ensemble(damaged, pairs, {"harmless": head, "helpful": head}, progress=False)
    assert len(table) == 5
    edited = edit.apply(damaged)
    assert damaged.score_pairs(pairs.test["harmless"]).accuracy() < 0.3
    assert edited.score_pairs(pairs.test["harmless"]).accuracy() > 0.9
    assert edited.score_pairs(pairs.test["helpful"]).accuracy() > 0.97
