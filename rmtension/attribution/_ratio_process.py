"""Gaussian-process regression: a linear and a smooth part, with settings by maximum likelihood."""

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from scipy.optimize import minimize
from torch import Tensor

# Logarithms of length scale, smooth variance, linear variance and noise variance: prior mean and standard deviation.
_PRIOR_MEAN = (0.0, -0.7, -0.7, -1.2)
_PRIOR_SPREAD = (1.4, 2.8, 2.8, 2.8)
_BOUND = 6.0
_JITTER = 1e-6
_STEPS = 40


@dataclass(frozen=True, eq=False)
class RatioProcess:
    """A function of a few features, learned from noisy values; features have mean 0 and standard deviation 1.

    The kernel is constant + smooth (squared exponential over all features) + linear, and noise is the same everywhere
    (Rasmussen and Williams 2006, chapters 2 and 5).
    """

    inputs: Float[Tensor, "point feature"]
    settings: Float[Tensor, "4"]
    weights: Float[Tensor, "point"]

    @classmethod
    def fit(
        cls,
        inputs: Float[np.ndarray, "point feature"],
        values: Float[np.ndarray, "point"],
        *,
        like: "RatioProcess | None" = None,
    ) -> "RatioProcess":
        """Learn the values; the settings are those of `like`, or the most likely ones under a wide prior."""
        points, targets = torch.from_numpy(inputs).double(), torch.from_numpy(values).double()
        settings = _most_likely(points, targets) if like is None else like.settings
        factor = torch.linalg.cholesky(_covariance(points, settings))
        return cls(points, settings, torch.cholesky_solve(targets[:, None], factor)[:, 0])

    def predict(self, inputs: Float[np.ndarray, "point feature"]) -> Float[np.ndarray, "point"]:
        """The expected value at each point."""
        values: Float[np.ndarray, "point"] = (
            _kernel(torch.from_numpy(inputs).double(), self.inputs, self.settings) @ self.weights
        ).numpy()
        return values


def _most_likely(points: Float[Tensor, "point feature"], targets: Float[Tensor, "point"]) -> Float[Tensor, "4"]:
    mean, spread = (torch.tensor(values, dtype=torch.float64) for values in (_PRIOR_MEAN, _PRIOR_SPREAD))

    def loss(values: Float[np.ndarray, "4"]) -> tuple[float, Float[np.ndarray, "4"]]:
        settings = torch.from_numpy(values).requires_grad_()
        with torch.enable_grad():
            factor = torch.linalg.cholesky(_covariance(points, settings))
            weights = torch.cholesky_solve(targets[:, None], factor)[:, 0]
            likelihood = -0.5 * targets @ weights - factor.diagonal().log().sum()
            total = ((settings - mean) / spread).square().sum() / 2 - likelihood
        (slope,) = torch.autograd.grad(total, settings)
        return float(total.detach()), slope.numpy()

    found = minimize(
        loss, mean.numpy(), jac=True, method="L-BFGS-B", bounds=[(-_BOUND, _BOUND)] * 4, options={"maxiter": _STEPS}
    )
    return torch.from_numpy(found.x)


def _covariance(points: Float[Tensor, "point feature"], settings: Float[Tensor, "4"]) -> Float[Tensor, "point point"]:
    noise = settings[3].exp() + _JITTER
    return _kernel(points, points, settings) + noise * torch.eye(len(points), dtype=points.dtype)


def _kernel(
    first: Float[Tensor, "first feature"], second: Float[Tensor, "second feature"], settings: Float[Tensor, "4"]
) -> Float[Tensor, "first second"]:
    length, smooth, linear = settings[:3].exp()
    products = first @ second.T / first.shape[1]
    norms = [points.square().mean(dim=1) for points in (first, second)]
    distances = (norms[0][:, None] + norms[1] - 2 * products).clamp(min=0)
    covariance: Tensor = 1 + smooth * (-distances / (2 * length**2)).exp() + linear * products
    return covariance
