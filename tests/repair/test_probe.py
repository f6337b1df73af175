"""The ceiling by a probe, on states with a known direction: found where there are pairs enough, else left alone."""

import torch
from tiny_models import make_pairs

from rmtension.repair._features import ReadStates
from rmtension.repair._probe import fit_probe
from rmtension.repair._refit import refit_row


def drawn(n, d, seed, *, hidden=0.0):
    """States in which the row reads .5 of what orders the pairs, and `hidden` more lies in a direction it misses."""
    torch.manual_seed(seed)
    difference = torch.randn(n, d, dtype=torch.float64)
    difference[:, 0] += 0.5
    difference[:, 1] += hidden
    return ReadStates(difference, difference[:, 0].clone())


def accuracy(states, change):
    return float((states.margin + states.difference @ change > 0).double().mean())


def test_few_pairs_in_many_dimensions_are_not_overfitted():
    """100 pairs, 300 dimensions, nothing to gain: a lightly penalised row orders new pairs worse than the row does."""
    weak, strong, new = (drawn(n, 300, seed) for n, seed in ((100, 0), (100, 1), (4000, 2)))
    before = accuracy(new, torch.zeros(300, dtype=torch.float64))
    probe = fit_probe(weak, strong, make_pairs(100))
    assert accuracy(new, probe) > before - 0.02
    # Negative control: one small penalty for all.
    fixed = refit_row(weak, strong, share=0.99, ridge=1e-3)
    assert accuracy(weak, fixed) == 1.0
    assert accuracy(new, fixed) < before - 0.05


def test_a_direction_that_the_row_misses_is_found():
    weak, strong, new = (drawn(n, 20, seed, hidden=1.5) for n, seed in ((400, 0), (100, 1), (4000, 2)))
    probe = fit_probe(weak, strong, make_pairs(400))
    before = accuracy(new, torch.zeros(20, dtype=torch.float64))
    # The best linear rule has the mean of the differences as its row: accuracy Phi(|mean|), here of sqrt(.25 + 2.25).
    best = float(torch.special.ndtr(torch.tensor(2.5**0.5)))
    assert before < 0.72
    assert accuracy(new, probe) > best - 0.02


def test_pairs_of_one_prompt_share_a_fold():
    """Copies of a pair in other folds would let a row that remembers pairs win."""
    alone = make_pairs(12)
    weak, strong = drawn(12, 60, 3), drawn(50, 60, 4)
    copies = ReadStates(weak.difference.repeat(6, 1), weak.margin.repeat(6))
    many = type(alone)([pair for _ in range(6) for pair in alone])
    one, six = fit_probe(weak, strong, alone), fit_probe(copies, strong, many)
    assert torch.allclose(one, six, atol=1e-6)


def test_one_prompt_changes_nothing():
    assert not fit_probe(drawn(1, 5, 0), drawn(9, 5, 1), make_pairs(1)).any()
