"""Directions taken out of the reward row: against projections of the states, and what they cannot do."""

import pytest
import torch

from rmtension.errors import DataError
from rmtension.repair._directions import remove_subspace, shape_reward, wrong_directions
from rmtension.repair._edit import reward_row
from rmtension.repair._features import ReadStates, read_states


def test_shaping_is_the_projection_of_the_states(damaged, pairs):
    """h - alpha (u @ h) u, then the old row, gives the rewards of the new row."""

    def letters(pair, side):
        return float(len(getattr(pair, side).split("a")))

    def first_letter(pair):
        return float(len(pair.chosen.split("a")) - len(pair.rejected.split("a")))

    _, table = shape_reward(damaged, pairs, letters, alphas=(0.5, 1.0), progress=False)
    parts = [(pairs.fit[name], read_states(damaged, pairs.fit[name])) for name in ("harmless", "helpful")]
    moved = [
        states.difference * torch.tensor([first_letter(pair) for pair in part], dtype=torch.float64).sign()[:, None]
        for part, states in parts
    ]
    u = torch.cat(moved).mean(0)
    u = u / u.norm()
    row = damaged.weight.double()
    for alpha, accuracy in zip((0.5, 1.0), table["harmless_accuracy"], strict=True):
        d = read_states(damaged, pairs.development["harmless"]).difference
        projected = d - alpha * (d @ u)[:, None] * u
        assert float(((projected @ row) > 0).double().mean()) == pytest.approx(accuracy, abs=1e-12)


def test_a_feature_that_no_pair_has_is_refused(damaged, pairs):
    with pytest.raises(DataError, match=r"feature: .* equally much of it"):
        shape_reward(damaged, pairs, lambda pair, side: 0.0, progress=False)


def test_directions_of_wrong_pairs_are_orthonormal_and_by_subset():
    draw = torch.Generator().manual_seed(0)
    difference = torch.randn(12, 5, generator=draw, dtype=torch.float64)
    margin = torch.tensor([-1.0, -1, -1, 1, -1, -1, -1, -1, -1, -1, 1, 1], dtype=torch.float64)
    subsets = ["a"] * 4 + ["b"] * 4 + ["c"] * 2 + ["d"] * 2
    basis = wrong_directions(ReadStates(difference, margin), subsets)
    assert basis.shape == (2, 5), "c has two wrong pairs, d none"
    assert torch.allclose(basis @ basis.T, torch.eye(2, dtype=torch.float64), atol=1e-12)
    for rows in ([0, 1, 2], [4, 5, 6, 7]):
        mean = difference[rows].mean(0)
        assert torch.allclose(basis.T @ (basis @ mean), mean, atol=1e-12), "in the span"
    assert len(wrong_directions(ReadStates(difference, margin.abs()), subsets)) == 0


def test_removing_the_subspace_leaves_nothing_of_it_in_the_row(damaged, head, pairs):
    edit, table = remove_subspace(damaged, pairs, alphas=(1.0, 2.0), progress=False)
    assert len(table) == 2
    part = pairs.fit["harmless"]
    basis = wrong_directions(read_states(damaged, part), [pair.subset for pair in part])
    if edit is not None:
        linear, number = reward_row(edit.apply(damaged))
        alpha = table.loc[table["harmless_change"].idxmax(), "alpha"]
        left = basis @ linear.weight[number].double()
        assert torch.allclose(left, (1 - alpha) * basis @ damaged.weight.double(), atol=1e-4)
    with pytest.raises(DataError, match="no subset of the harmless fit pairs"):
        remove_subspace(head, pairs, progress=False)
