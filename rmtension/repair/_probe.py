"""The ceiling without specialists: a reward row that serves the weak objective nearly alone."""

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import logsigmoid

from rmtension.data._pairs import PreferencePairs
from rmtension.evaluation._intervals import mcnemar_p_value
from rmtension.repair._features import ReadStates
from rmtension.repair._refit import refit_row

# The weight of the weak objective, and the penalties that are tried.
_SHARE = 0.99
_RIDGES = (1e-3, 1e-2, 1e-1, 1.0, 10.0)
_MOST_FOLDS = 5
_ALPHA = 0.05


def fit_probe(weak: ReadStates, strong: ReadStates, pairs: PreferencePairs) -> Float[Tensor, "d_model"]:
    """What to add to the row so that it serves the weak objective nearly alone, from the fit pairs; `pairs` are weak.

    The penalty is the one that orders most held-out weak pairs, over up to five folds of prompts; of several the one
    with the least loss on them. The change is 0 unless it orders more of them than the row does, by a one-sided test at
    5%: with fewer pairs than the state has dimensions, a row that orders all of them may order new ones worse than
    before. Cost: a fit for every fold and penalty, no pass.
    """
    prompts = {prompt: number for number, prompt in enumerate(dict.fromkeys(pair.prompt for pair in pairs))}
    n_folds = min(_MOST_FOLDS, len(prompts))
    fold_of = torch.tensor([prompts[pair.prompt] % n_folds for pair in pairs])
    unchanged = torch.zeros(weak.difference.shape[1], dtype=torch.float64)
    if n_folds < 2:
        return unchanged
    margins = {ridge: _held_out(weak, strong, fold_of, ridge) for ridge in _RIDGES}
    best = max(margins, key=lambda ridge: _quality(margins[ridge]))
    return _fit(weak, strong, best) if _is_better(margins[best], weak.margin) else unchanged


def _held_out(
    weak: ReadStates, strong: ReadStates, fold_of: Int[Tensor, "pair"], ridge: float
) -> Float[Tensor, "pair"]:
    """The margins of the weak pairs, each with the row that was fitted without its fold."""
    margins = torch.empty_like(weak.margin)
    for fold in range(int(fold_of.max()) + 1):
        held = fold_of == fold
        change = _fit(ReadStates(weak.difference[~held], weak.margin[~held]), strong, ridge)
        margins[held] = weak.margin[held] + weak.difference[held] @ change
    return margins


def _fit(weak: ReadStates, strong: ReadStates, ridge: float) -> Float[Tensor, "d_model"]:
    return refit_row(weak, strong, share=_SHARE, ridge=ridge)


def _quality(margins: Float[Tensor, "pair"]) -> tuple[int, float]:
    """How many pairs are ordered rightly, and the negative loss."""
    return int((margins > 0).sum()), float(logsigmoid(margins).sum())


def _is_better(after: Float[Tensor, "pair"], before: Float[Tensor, "pair"]) -> bool:
    """Whether more pairs become right than wrong, by an exact one-sided test at 5%: half of the two-sided p-value."""
    gained, lost = (int(changed.sum()) for changed in ((after > 0) & (before <= 0), (after <= 0) & (before > 0)))
    return gained > lost and mcnemar_p_value(gained, lost) / 2 < _ALPHA
