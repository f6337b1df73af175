"""The table of `ablation_effects`: every number equals one that is computed with plain contexts."""

from itertools import pairwise

import numpy as np
import pytest
import torch
from tiny_models import grid, unchecked

from rmtension import (
    AblationContext,
    ActivationCollector,
    Mean,
    NeuronSet,
    PreferencePairs,
    RewardHead,
    Zero,
    ablation_effects,
)
from rmtension.errors import OptionError, RMTensionWarning
from rmtension.evaluation import change
from rmtension.neurons._matched_sets import matched_sets
from rmtension.plots import effects_by_group

GROUPS = ("short", "long")
# The last pair of `labelled` has no label.
pytestmark = pytest.mark.filterwarnings("ignore:by. 1 of 24 pairs have no label")


def set_of(model, *indices):
    shape = (model.n_layers, model.n_neurons("mlp"))
    return NeuronSet.from_indices(indices, shape=shape, site="mlp", architecture=model.architecture)


@pytest.fixture(scope="module")
def model(checkpoints):
    return RewardHead.from_pretrained(checkpoints["gpt2"], dtype=torch.float64)


@pytest.fixture(scope="module")
def labelled(pairs):
    """The pairs with a label that is no field, and one without a label."""
    rows = [pair.to_dict() | {"size": GROUPS[n % 2]} for n, pair in enumerate(pairs)]
    rows[-1].pop("size")
    return PreferencePairs.from_records(rows)


@pytest.fixture(scope="module")
def chosen(model):
    return set_of(model, (0, 1), (0, 5), (1, 2))


@pytest.mark.parametrize("name", grid(["mean", "zero"]))
def test_effects_equal_those_of_contexts(model, labelled, chosen, name):
    """The change of each group with its interval, and the mean and spread of the changes under each random set."""
    replacement = Zero() if name == "zero" else Mean(ActivationCollector(model).collect(labelled))
    table = ablation_effects(model, chosen, labelled, replacement, by="size", n_draws=3, progress=False)
    before = model.score_pairs(labelled)
    ablated = []
    for neurons in (chosen, *matched_sets(chosen, 3)):
        with AblationContext(model, neurons, replacement):
            ablated.append(model.score_pairs(labelled))
    rows = {"all pairs": list(range(24)), "short": list(range(0, 24, 2)), "long": list(range(1, 23, 2))}
    assert list(dict.fromkeys(table["group"])) == list(rows)
    for row in table.to_dict("records"):
        members = rows[row["group"]]
        changes = [change(after.take(members), before.take(members), quantity=row["quantity"]) for after in ablated]
        values = [estimate.value for estimate in changes]
        assert row["n"] == len(members)
        assert row["size"] == 3
        assert row["effect"] == pytest.approx(values[0], abs=1e-9)
        assert (row["low"], row["high"]) == pytest.approx((changes[0].low, changes[0].high), abs=1e-9)
        assert row["random_effect"] == pytest.approx(np.mean(values[1:]), abs=1e-9)
        assert row["random_sd"] == pytest.approx(np.std(values[1:], ddof=1), abs=1e-9)
        assert row["beyond_random"] == pytest.approx(values[0] - np.mean(values[1:]), abs=1e-9)
        assert row["after"] - row["before"] == pytest.approx(row["effect"], abs=1e-9)
    assert table.query("quantity == 'margin'")["effect"].abs().min() > 1e-3


def test_several_sets_have_controls_of_their_own(model, labelled, chosen):
    other = set_of(model, (1, 7))
    together = ablation_effects(model, {"a": chosen, "b": other}, labelled, by="size", n_draws=2, progress=False)
    for name, neurons in (("a", chosen), ("b", other)):
        alone = ablation_effects(model, neurons, labelled, by="size", n_draws=2, progress=False)
        part = together[together["set"] == name].reset_index(drop=True)
        assert np.allclose(part.select_dtypes("number"), alone.select_dtypes("number"), atol=1e-9, equal_nan=True)


def test_neurons_that_write_nothing_have_no_effect(model, labelled):
    """The negative control: an empty set changes nothing, and neither do its random sets."""
    table = ablation_effects(model, set_of(model), labelled, by="size", n_draws=2, progress=False)
    assert (table[["effect", "random_effect", "beyond_random"]] == 0).all(axis=None)


def test_groups_are_the_objectives_unless_named(model, pairs, chosen):
    """Without several objectives or subsets there are no groups; a function or one label per pair give any."""
    table = ablation_effects(model, chosen, pairs, n_draws=0, progress=False)
    assert set(table["group"]) == {"all pairs", "helpful", "harmless"}
    unlabelled = PreferencePairs.from_records(
        [{"prompt": pair.prompt, "chosen": pair.chosen, "rejected": pair.rejected} for pair in pairs]
    )
    alone = ablation_effects(model, chosen, unlabelled, n_draws=0, progress=False)
    assert list(alone["group"]) == ["all pairs"] * 2
    assert alone[["random_effect", "beyond_low"]].isna().all(axis=None)
    halves = [n < 12 for n in range(24)]
    by_label = ablation_effects(model, chosen, pairs, by=halves, n_draws=0, progress=False)
    first = {pair.id for pair in pairs[:12]}
    by_function = ablation_effects(model, chosen, pairs, by=lambda pair: pair.id in first, n_draws=0, progress=False)
    assert by_label.equals(by_function)
    assert list(dict.fromkeys(by_label["group"])) == ["all pairs", "True", "False"]


def test_an_interrupted_table_is_resumed(model, labelled, chosen, tmp_path):
    first = ablation_effects(model, chosen, labelled, by="size", n_draws=2, work=tmp_path / "work", progress=False)
    assert ablation_effects(model, chosen, labelled, by="size", n_draws=2, progress=False).equals(first)


def test_too_few_neurons_for_a_control_warn(model, labelled, chosen):
    everything = chosen | ~chosen
    with pytest.warns(RMTensionWarning, match="No matched random sets"):
        table = ablation_effects(model, everything, labelled, by="size", n_draws=2, progress=False)
    assert table["beyond_random"].isna().all()


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (
            {"by": "sise"},
            r"no pair has a label 'sise'\. Did you mean 'size'\? Labels of these pairs: 'objective'",
        ),
        ({"by": ["a"]}, "by: expected one label per pair \\(24\\), got 1"),
        ({"by": lambda pair: None}, "by: no pair has a label"),
        ({"seed": -1}, "seed: expected a whole number from 0 on, got -1"),
        ({"n_draws": 1}, "n_draws: expected at least 2 random sets, to measure their spread, or 0, got 1"),
    ],
)
def test_wrong_arguments_name_a_next_step(model, labelled, chosen, options, expected):
    with pytest.raises(OptionError, match=expected):
        ablation_effects(model, chosen, labelled, **options)


def test_no_pairs_are_refused(model, chosen):
    with pytest.raises(OptionError, match="pairs: expected at least one pair"):
        ablation_effects(model, chosen, PreferencePairs([]))


class TestFigure:
    def test_marks_are_the_rows_of_the_table(self, model, labelled, chosen):
        table = ablation_effects(model, {"top": chosen}, labelled, by="size", n_draws=2, progress=False)
        figure = effects_by_group(table)
        for axes, quantity in zip(figure.axes, ("accuracy", "margin"), strict=True):
            rows = table[table["quantity"] == quantity]
            (marks,) = [box for box in axes.containers if hasattr(box, "lines") and box.get_label().startswith("top")]
            assert np.allclose(marks.lines[0].get_xdata(), rows["effect"])
            bars = [patch for patch in axes.patches if patch.get_width() and patch.get_alpha() == 0.35]
            assert np.allclose([bar.get_x() + bar.get_width() / 2 for bar in bars], rows["random_effect"])
        assert [text.get_text() for text in figure.axes[0].get_yticklabels()] == [
            "all pairs  (n = 24)", "short  (n = 12)", "long  (n = 11)"
        ]  # fmt: skip
        assert "Effect of ablating 3 neurons (top)" in figure.get_suptitle()

    def test_rounding_noise_is_not_magnified(self, model, labelled, chosen):
        table = ablation_effects(model, chosen, labelled, by="size", n_draws=0, progress=False)
        table[["effect", "low", "high"]] = 1e-12
        figure = effects_by_group(table, quantity="margin")
        left, right = figure.axes[0].get_xlim()
        assert right - left > 1e-3 * table["before"].abs().max()

    def test_any_number_of_groups_has_room(self, model, pairs, chosen):
        table = ablation_effects(model, chosen, pairs, by=list(range(24)), n_draws=0, progress=False)
        figure = effects_by_group(table, quantity="margin")
        figure.draw_without_rendering()
        boxes = [text.get_window_extent() for text in figure.axes[0].get_yticklabels()]
        assert all(upper.y0 > lower.y1 for upper, lower in pairwise(boxes))

    def test_another_table_is_refused(self, model, labelled, chosen):
        table = ablation_effects(model, chosen, labelled, by="size", n_draws=0, progress=False)
        with pytest.raises(OptionError, match=r"table: expected the table of rmtension\.ablation_effects"):
            effects_by_group(table.drop(columns="random_sd"))
        with pytest.raises(OptionError, match="quantity: expected 'accuracy' or 'margin', got 'reward'"):
            effects_by_group(table, quantity="reward")


def test_skipped_pairs_are_in_no_group(checkpoints, pairs):
    """A pair that produces NaN is left out of the groups as it is of the rewards."""
    model = RewardHead.from_pretrained(checkpoints["gpt2"], on_nonfinite="skip")
    labels = [GROUPS[row % 2] for row in range(24)]
    # A word of a few pairs; where it is read, the model gives NaN.
    texts = [{*model.tokenizer(pair.text("chosen"))["input_ids"]} for pair in pairs]
    token = min(set().union(*texts), key=lambda token: (sum(token in text for text in texts), token))
    embedding = model.body.native.get_input_embeddings().weight
    with torch.no_grad():
        embedding[token] = torch.nan
    with pytest.warns(RMTensionWarning, match="skipped"):
        table = ablation_effects(model, set_of(model, (0, 1)), pairs, by=labels, n_draws=0, progress=False)
    with pytest.warns(RMTensionWarning, match="skipped"):
        kept = model.score_pairs(pairs)
    ids = {pair.id for pair in kept.pairs}
    expected = {group: sum(pair.id in ids for pair in pairs[n::2]) for n, group in enumerate(GROUPS)}
    assert 0 < len(ids) < 24
    sizes = table[table["quantity"] == "margin"].set_index("group")["n"].to_dict()
    assert sizes == {"all pairs": len(ids), **expected}


@pytest.mark.parametrize("neurons", [{}, {"a": [(0, 1)]}])
def test_other_things_than_sets_are_refused(model, pairs, neurons):
    with pytest.raises(OptionError, match="neurons"):
        unchecked(ablation_effects)(model, neurons, pairs)
