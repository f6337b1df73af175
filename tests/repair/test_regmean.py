"""Merged specialists: the closed form against NumPy's least squares, and what merging gives back."""

import numpy as np
import pytest
import torch

from rmtension import RewardHead, Scale
from rmtension.errors import OptionError
from rmtension.repair._input_moments import linear_maps, matrix_of
from rmtension.repair._regmean import Specialist, merge_specialists, merged_map, merged_parameters

OTHERS = {"harmless": "helpful", "helpful": "harmless"}


def drawn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_a_merged_map_is_the_least_squares_solution_of_numpy():
    """min_W sum_i |X_i W' - X_i W_i'|^2 / n_i, on stacked inputs; and with shrunk off-diagonals, on stacked roots."""
    inputs, weights = [drawn(30, 6, seed=0), drawn(20, 6, seed=1)], [drawn(4, 6, seed=2), drawn(4, 6, seed=3)]
    moments = [x.T @ x / len(x) for x in inputs]

    def by_numpy(roots):
        rows = torch.cat(roots).numpy()
        goals = torch.cat([root @ weight.T for root, weight in zip(roots, weights, strict=True)]).numpy()
        return np.linalg.lstsq(rows, goals, rcond=None)[0].T

    found = merged_map(weights, moments, 1.0, ridge=0.0)
    # Normal equations of drawn inputs in float64: their condition is below 100.
    assert found.numpy() == pytest.approx(by_numpy([x / len(x) ** 0.5 for x in inputs]), abs=1e-12)
    shrunk = [0.3 * moment + 0.7 * torch.diag(moment.diagonal()) for moment in moments]
    expected = by_numpy([torch.linalg.cholesky(moment).T for moment in shrunk])
    assert merged_map(weights, moments, 0.3, ridge=0.0).numpy() == pytest.approx(expected, abs=1e-12)
    # Negative control: the mean of the weights is another map.
    assert not torch.allclose(found, torch.stack(weights).mean(0), atol=1e-2)


def test_inputs_that_do_not_overlap_keep_both_maps():
    """Where only one model has inputs, its weights are kept; where no model has, the mean is."""
    weights = [drawn(3, 6, seed=0), drawn(3, 6, seed=1)]
    inputs = [torch.zeros(9, 6, dtype=torch.float64) for _ in range(2)]
    inputs[0][:, :2], inputs[1][:, 2:4] = drawn(9, 2, seed=2), drawn(9, 2, seed=3)
    found = merged_map(weights, [x.T @ x / len(x) for x in inputs], 1.0)
    # The ridge pulls by 1e-6 of the mean of the diagonal.
    assert torch.allclose(found[:, :2], weights[0][:, :2], atol=1e-4)
    assert torch.allclose(found[:, 2:4], weights[1][:, 2:4], atol=1e-4)
    assert torch.allclose(found[:, 4:], torch.stack(weights).mean(0)[:, 4:], atol=1e-12)


def test_a_model_merged_with_itself_is_itself(head, pairs):
    """Without rounding: equal weights are their own mean, and nothing pulls."""
    parts = [Specialist.read(head, pairs, name, progress=False) for name in ("harmless", "helpful")]
    for shrink in (0.5, 1.0):
        merged = merged_parameters(parts, shrink)
        for name, parameter in parts[0].base.named_parameters():
            assert torch.equal(merged[name], parameter.double())


def test_merged_parameters_are_merged_or_averaged(head, damaged, pairs):
    parts = [
        Specialist.read(model, pairs, name, progress=False)
        for model, name in ((damaged, "harmless"), (head, "helpful"))
    ]
    merged = merged_parameters(parts, 0.9)
    mean = {
        name: (parameter.double() + parts[1].base.get_parameter(name).double()) / 2
        for name, parameter in parts[0].base.named_parameters()
    }
    assert merged.keys() == mean.keys()
    other = {name for name in mean if not torch.equal(merged[name], mean[name])}
    # Only the down projections of the damaged neurons differ; where weights are equal, their mean is their merge.
    assert other <= {f"h.{layer}.mlp.c_proj.weight" for layer in range(4)}
    assert other
    for name in other:
        module = name.removesuffix(".weight")
        expected = merged_map(
            [matrix_of(part.base.get_submodule(module)).detach() for part in parts],
            [part.moments[module] for part in parts],
            0.9,
        )
        assert torch.equal(merged[name], expected.T), "Conv1D holds [in, out]"
    assert len(linear_maps(parts[0].base)) == 16


def test_whole_specialists_mend_a_damaged_model(head, damaged, pairs):
    """Both specialists are the whole model, so the merge is the whole model, in the size of the damaged margins."""
    edit, table = merge_specialists(damaged, pairs, {"harmless": head, "helpful": head}, progress=False)
    assert table["shrink"].tolist() == [0.5, 0.9, 1.0]
    edited = edit.apply(damaged)
    for name in ("harmless", "helpful"):
        part = pairs.test[name]
        margins, whole = (model.score_pairs(part).margin.double() for model in (edited, head))
        scale = float(margins @ whole / (whole @ whole))
        # float32 rounds residual streams of about 1000 (K of the organism) to 1e-4.
        assert torch.allclose(margins, scale * whole, rtol=0, atol=1e-3)
    sizes = [
        torch.cat([model.score_pairs(part).margin for part in pairs.fit.values()]).double().square().mean().sqrt()
        for model in (edited, damaged)
    ]
    assert float(sizes[0]) == pytest.approx(float(sizes[1]), rel=1e-4)
    assert damaged.score_pairs(pairs.test["harmless"]).accuracy() < 0.3
    assert edited.score_pairs(pairs.test["harmless"]).accuracy() > 0.97
    assert edited.score_pairs(pairs.test["helpful"]).accuracy() > 0.97


def without(head, organism, objective, factor):
    return head.with_ablation(organism.truth[objective], Scale(factor))


def test_specialists_without_each_others_neurons_are_joined(head, organism, damaged, pairs):
    """The helpful specialist lacks the harmless neurons, and the other way round; the merge has both, at half size."""
    specialists = {name: without(head, organism, other, 0.0) for name, other in OTHERS.items()}
    edit, _ = merge_specialists(damaged, pairs, specialists, shrink=(0.9,), progress=False)
    edited = edit.apply(damaged)
    test = pairs.test
    assert damaged.score_pairs(test["harmless"]).accuracy() < 0.3
    assert specialists["helpful"].score_pairs(test["harmless"]).accuracy() < 0.85
    for name in OTHERS:
        assert edited.score_pairs(test[name]).accuracy() > 0.97


def test_specialists_that_oppose_each_other_are_not_taken(head, organism, damaged, pairs):
    """Each counts the other's neurons negatively, so that the merge loses helpful pairs and is not allowed."""
    specialists = {name: without(head, organism, other, -1.0) for name, other in OTHERS.items()}
    edit, table = merge_specialists(damaged, pairs, specialists, shrink=(0.5,), progress=False)
    assert edit is None
    assert table["harmless_change"].item() > 0.7
    assert table["helpful_change"].item() < -0.05


def test_what_cannot_be_merged_is_refused(head, damaged, pairs, checkpoints):
    with pytest.raises(OptionError, match="specialists: expected a model for 'harmless' and one for 'helpful'"):
        merge_specialists(damaged, pairs, {"harmless": head})
    other = RewardHead.from_pretrained(checkpoints["gpt2"])
    with pytest.raises(OptionError, match="specialists: expected weights of the shapes of gpt2-4x64"):
        merge_specialists(damaged, pairs, {"harmless": other, "helpful": head})
