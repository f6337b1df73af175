"""Convex fits of the Bradley-Terry loss in a few numbers: by Newton's method, and by L-BFGS within bounds."""

from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float
from scipy import linalg, optimize
from scipy.special import expit, log_expit

from rmtension.errors import OptionError

# Newton's method stops when the gradient is this small compared with its size at 0.
_TOLERANCE, _MOST_STEPS = 1e-10, 100
# What L-BFGS is run to: its own defaults end at a relative accuracy of about 1e-4.
_LBFGS = {"maxiter": 5000, "maxfun": 50000, "ftol": 1e-15, "gtol": 1e-9, "maxcor": 30}


@dataclass(frozen=True)
class Margins:
    """Pairs whose margins are linear in some parameters v: offset + features @ v, and a weight for each pair."""

    features: Float[np.ndarray, "pair parameter"]
    offset: Float[np.ndarray, "pair"]
    weights: Float[np.ndarray, "pair"]

    def at(self, values: Float[np.ndarray, "parameter"]) -> Float[np.ndarray, "pair"]:
        """The margins with these parameters."""
        margins: Float[np.ndarray, "pair"] = self.offset + self.features @ values
        return margins

    def loss(self, values: Float[np.ndarray, "parameter"]) -> float:
        """The weighted sum of log(1 + exp(-margin))."""
        return float(-(self.weights * log_expit(self.at(values))).sum())


def fit_newton(
    margins: Margins, ridge: float, metric: Float[np.ndarray, "parameter parameter"]
) -> Float[np.ndarray, "parameter"]:
    """The v with the least loss + ridge v' metric v, by Newton's method with halved steps.

    Raises `OptionError` unless `ridge` is positive: without it, pairs that can all be ordered have no minimum.
    """
    if not ridge > 0:
        raise OptionError(f"ridge: expected a positive number, got {ridge}.")
    x, weights = margins.features, margins.weights
    penalty = 2 * ridge * metric
    values = np.zeros(x.shape[1])

    def objective(at: Float[np.ndarray, "parameter"]) -> float:
        return margins.loss(at) + 0.5 * float(at @ penalty @ at)

    smallest = np.inf
    for _ in range(_MOST_STEPS):
        falls = expit(-margins.at(values))
        gradient = penalty @ values - x.T @ (weights * falls)
        size = float(np.abs(gradient).max())
        smallest = min(smallest, _TOLERANCE * size) if smallest == np.inf else smallest
        if size <= smallest:
            break
        curvature = (x * (weights * falls * (1 - falls))[:, None]).T @ x + penalty
        step = linalg.solve(curvature, -gradient, assume_a="pos")
        share, now = 1.0, objective(values)
        while objective(values + share * step) > now + 1e-4 * share * float(gradient @ step) and share > 1e-8:
            share /= 2
        values = values + share * step
        if float(np.abs(share * step).max()) <= 1e-14 * (1 + float(np.abs(values).max())):
            break
    return values


def fit_bounded(margins: Margins, *, ridge: float, bound: float) -> Float[np.ndarray, "parameter"]:
    """The v with the least loss + ridge |v|^2 and |v_j| <= bound, by L-BFGS-B."""
    x = margins.features

    def objective(values: Float[np.ndarray, "parameter"]) -> tuple[float, Float[np.ndarray, "parameter"]]:
        slope = 2 * ridge * values - x.T @ (margins.weights * expit(-margins.at(values)))
        return margins.loss(values) + ridge * float(values @ values), slope

    start, bounds = np.zeros(x.shape[1]), [(-bound, bound)] * x.shape[1]
    solver: Any = optimize.minimize
    values: Float[np.ndarray, "parameter"] = solver(
        objective, start, jac=True, method="L-BFGS-B", bounds=bounds, options=_LBFGS
    ).x
    return values
