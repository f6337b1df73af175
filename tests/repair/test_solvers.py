"""The convex fits against solvers of SciPy and autograd that share nothing with them."""

import numpy as np
import pytest
import torch

from rmtension.errors import OptionError
from rmtension.repair._solvers import Margins, fit_bounded, fit_newton


def drawn(n=60, k=12, seed=0):
    rng = np.random.default_rng(seed)
    return Margins(rng.normal(size=(n, k)), rng.normal(size=n), rng.random(n) / n)


def metric_of(x):
    return x.T @ x / len(x) + 1e-3 * np.eye(x.shape[1])


@pytest.mark.parametrize("ridge", [1e-6, 1e-2, 1.0])
def test_newton_is_the_minimum_that_autograd_finds(ridge):
    margins = drawn()
    metric = metric_of(margins.features)
    found = fit_newton(margins, ridge, metric)
    x, offset, weights, penalty = (
        torch.from_numpy(value) for value in (margins.features, margins.offset, margins.weights, metric)
    )

    def objective(v):
        return (weights * torch.nn.functional.softplus(-(offset + x @ v))).sum() + ridge * v @ penalty @ v

    v = torch.from_numpy(found)
    gradient = torch.autograd.functional.jacobian(objective, v)
    assert gradient.abs().max() < 1e-9
    # Newton's method by autograd from another place comes to the same point.
    other = torch.full_like(v, 0.1)
    for _ in range(40):
        slope = torch.autograd.functional.jacobian(objective, other)
        other = other - torch.linalg.solve(torch.autograd.functional.hessian(objective, other), slope)
    assert torch.allclose(v, other, rtol=0, atol=1e-6)
    # Negative control: another ridge has another minimum.
    assert not np.allclose(fit_newton(margins, 3 * ridge, metric), found, rtol=0, atol=1e-6)


def test_newton_orders_pairs_that_can_be_ordered():
    """Separable pairs, where a whole Newton step from 0 would be too long."""
    margins = drawn(n=10, k=12, seed=1)
    found = fit_newton(margins, 1e-9, np.eye(12))
    assert (margins.at(found) > 0).all()
    with pytest.raises(OptionError, match="ridge: expected a positive number, got 0"):
        fit_newton(margins, 0.0, np.eye(12))


@pytest.mark.parametrize("ridge", [0.0, 1e-3, 1e-2, 1.0])
def test_bounded_fits_are_the_minimum_of_another_solver(ridge):
    margins = drawn(n=40, k=6, seed=2)
    found = fit_bounded(margins, ridge=ridge, bound=0.3)

    x, offset, weights = (torch.from_numpy(value) for value in (margins.features, margins.offset, margins.weights))

    def objective(v):
        return (weights * torch.nn.functional.softplus(-(offset + x @ v))).sum() + ridge * v @ v

    # Newton's method by autograd, on the parameters that their bounds do not hold, cut off at the bounds.
    other = torch.zeros(6, dtype=torch.float64)
    for _ in range(60):
        slope = torch.autograd.functional.jacobian(objective, other)
        free = ~((other.abs() >= 0.3) & (other * slope < 0))
        step = torch.zeros_like(other)
        hessian = torch.autograd.functional.hessian(objective, other)
        step[free] = torch.linalg.solve(hessian[free][:, free], slope[free])
        while objective((other - step).clamp(-0.3, 0.3)) > objective(other) + 1e-15:
            step = step / 2
        other = (other - step).clamp(-0.3, 0.3)
    assert np.allclose(found, other, rtol=0, atol=1e-6)
    # Negative control: another ridge has another minimum.
    assert not np.allclose(fit_bounded(margins, ridge=3 * ridge + 1e-3, bound=0.3), other, rtol=0, atol=1e-6)
    assert (np.abs(found) <= 0.3).all()
    at_bound = np.isclose(np.abs(found), 0.3)
    assert at_bound.any() == (ridge < 1), "without a strong penalty some are at the bound, and with it none"
