"""How well rewards rank preference pairs, with intervals: accuracy, margins, comparisons, and the effect of length."""

from rmtension.evaluation._centred_margins import centred_rewards, confidence
from rmtension.evaluation._intervals import Estimate, bootstrap_mean
from rmtension.evaluation._length import length_baseline, length_matched, length_weights
from rmtension.evaluation._metrics import (
    Comparison,
    accuracy,
    balance,
    by_subset,
    change,
    compare,
    compare_by_subset,
    macro_accuracy,
    mean_margin,
)
from rmtension.evaluation._pair_rewards import PairRewards
from rmtension.evaluation._transfer import Transferability, transferability

__all__ = [
    "Comparison",
    "Estimate",
    "PairRewards",
    "Transferability",
    "accuracy",
    "balance",
    "bootstrap_mean",
    "by_subset",
    "centred_rewards",
    "change",
    "compare",
    "compare_by_subset",
    "confidence",
    "length_baseline",
    "length_matched",
    "length_weights",
    "macro_accuracy",
    "mean_margin",
    "transferability",
]
