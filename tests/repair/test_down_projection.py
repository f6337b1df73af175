"""The edit of a down projection: its least squares, its slopes, and the model that is written."""

import numpy as np
import pytest
import torch

from rmtension.repair._choice import best_candidate
from rmtension.repair._down_projection import (
    added_to_projection,
    edit_down_projection,
    projection_inputs,
    solve_projection,
)


def test_the_change_is_the_least_squares_solution_of_numpy():
    """Stacked rows with square roots of the weights: texts to change, texts to keep, and the ridge."""
    draw = torch.Generator().manual_seed(0)
    inputs, slopes, kept = (
        torch.randn(*shape, generator=draw, dtype=torch.float64) for shape in ((9, 5), (9, 4), (7, 5))
    )
    wanted = torch.randn(9, generator=draw, dtype=torch.float64)
    found = solve_projection(inputs, slopes, wanted, kept, weight=0.3, ridge=0.02)
    target = slopes * (wanted / (slopes**2).sum(1))[:, None]
    size = float((inputs**2).mean())
    rows = torch.cat([inputs / 3, (0.3 / 7) ** 0.5 * kept, (0.02 * size) ** 0.5 * torch.eye(5, dtype=torch.float64)])
    goals = torch.cat([target / 3, torch.zeros(12, 4, dtype=torch.float64)])
    expected, *_ = np.linalg.lstsq(rows.numpy(), goals.numpy(), rcond=None)
    assert found.T.numpy() == pytest.approx(expected, abs=1e-10)
    other = solve_projection(inputs, slopes, wanted, kept, weight=0.0, ridge=0.02)
    assert not torch.allclose(found, other, atol=1e-3)
    # Without a penalty and with more channels than texts, the first-order change is the one wanted.
    free = solve_projection(inputs[:4], slopes[:4], wanted[:4], kept, weight=0.0, ridge=1e-12)
    assert torch.allclose(torch.einsum("td,dc,tc->t", slopes[:4], free, inputs[:4]), wanted[:4], rtol=0, atol=1e-8)


def test_slopes_predict_what_a_small_change_does(exact, pairs):
    few = pairs.fit["harmless"][:5]
    layer = exact.n_layers - 1
    found = projection_inputs(exact, few, [0, layer])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.autograd, "grad", None)
        forward = projection_inputs(exact, few, [0, layer], slopes=False)
    assert torch.allclose(forward.inputs, found.inputs, rtol=0, atol=1e-12)
    assert forward.slopes.numel() == 0
    shape = exact.d_model, exact.n_channels("mlp")
    change = torch.randn(*shape, generator=torch.Generator().manual_seed(1)).double()
    rewards = []
    for sign in (1, -1):
        with added_to_projection(exact, layer, sign * 1e-5 * change):
            scored = exact.score_pairs(few)
        rewards.append(torch.cat([scored.chosen, scored.rejected]).double())
    # In the last block only the token that is read counts: nothing after it moves tokens.
    predicted = torch.einsum("td,dc,tc->t", found.slopes[1], change, found.inputs[1])
    assert torch.allclose(predicted, (rewards[0] - rewards[1]) / 2e-5, rtol=1e-6, atol=1e-6)
    chosen, rejected = predicted.chunk(2)
    assert torch.allclose(found.predicted_margins(1, change), found.margins + chosen - rejected, rtol=1e-12, atol=0)
    assert torch.allclose(found.margins, exact.score_pairs(few).margin.double(), rtol=0, atol=1e-12)


def test_the_edit_mends_the_model_that_is_written(damaged, pairs):
    edit, table = edit_down_projection(damaged, pairs, layers=[damaged.n_layers - 1], progress=False)
    assert len(table) == 12, "4 steps x 3 weights, all of which are run"
    one, first = edit_down_projection(damaged, pairs, layers=[damaged.n_layers - 1], n_tried=1, progress=False)
    # The one with the least predicted loss, which is the least of all.
    assert first["harmless_loss"].iloc[0] + first["helpful_loss"].iloc[0] == pytest.approx(
        (table["harmless_loss"] + table["helpful_loss"]).min(), rel=0.05
    )
    assert one.n_numbers == edit.n_numbers
    (layer,) = edit.added
    edited = edit.apply(damaged)
    development = pairs.development["harmless"]
    with added_to_projection(damaged, layer, edit.added[layer]):
        inside = damaged.score_pairs(development).margin
    assert torch.allclose(edited.score_pairs(development).margin, inside, rtol=0, atol=1e-4)
    assert edited.score_pairs(development).accuracy() == pytest.approx(
        table.loc[best_candidate(pairs, table), "harmless_accuracy"], abs=1e-12
    )
    before, after = (model.score_pairs(pairs.test["harmless"]).accuracy() for model in (damaged, edited))
    assert before < 0.3
    assert after > 0.8
    assert edited.score_pairs(pairs.test["helpful"]).accuracy() > 0.97
