"""The ceiling without specialists: a reward row that serves the weak objective nearly alone."""

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn.functional import logsigmoid

from rmtension.data._pairs import PreferencePairs
from rmtension.repair._features import ReadStates
from rmtension.repair._refit import refit_row

# The weight of the weak objective, and the penalties that are tried.
_SHARE = 0.99
_RIDGES = (1e-3, 1e-2, 1e-1, 1.0, 10.0)
_MOST_FOLDS = 5


def fit_probe(weak: ReadStates, strong: ReadStates, pairs: PreferencePairs) -> Float[Tensor, "d_model"]:
    """What to add to the row so that it serves the weak objective nearly alone, from the fit pairs; `pairs` are weak.

    The penalty is the one with the least loss on held-out weak pairs, over up to five folds of prompts. If no change
    lowers that loss, the change is 0: with fewer pairs than the state has dimensions, a row that orders all of them may
    order new ones worse than before. Cost: a fit for every fold and penalty, no pass.
    """
    prompts = {prompt: number for number, prompt in enumerate(dict.fromkeys(pair.prompt for pair in pairs))}
    n_folds = min(_MOST_FOLDS, len(prompts))
    fold_of = torch.tensor([prompts[pair.prompt] % n_folds for pair in pairs])
    unchanged = torch.zeros(weak.difference.shape[1], dtype=torch.float64)
    if n_folds < 2:
        return unchanged
    losses = {
        ridge: sum(
            _loss(_rows(weak, fold_of == fold), _fit(_rows(weak, fold_of != fold), strong, ridge))
            for fold in range(n_folds)
        )
        for ridge in _RIDGES
    }
    best = min(losses, key=losses.__getitem__)
    return _fit(weak, strong, best) if losses[best] < _loss(weak, unchanged) else unchanged


def _fit(weak: ReadStates, strong: ReadStates, ridge: float) -> Float[Tensor, "d_model"]:
    return refit_row(weak, strong, share=_SHARE, ridge=ridge)


def _rows(states: ReadStates, chosen: Bool[Tensor, "pair"]) -> ReadStates:
    return ReadStates(states.difference[chosen], states.margin[chosen])


def _loss(states: ReadStates, change: Float[Tensor, "d_model"]) -> float:
    """The sum of log(1 + exp(-margin)) with a change of the row."""
    return -float(logsigmoid(states.margin + states.difference @ change).sum())
