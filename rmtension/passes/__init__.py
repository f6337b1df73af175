"""Passes over pairs: one statistic per class, summed batch by batch, resumed and divided over processes."""

from rmtension.passes._activations import ActivationCollector, ActivationSample, ActivationStatistics
from rmtension.passes._pair_pass import run_pass
from rmtension.passes._pair_statistic import PairStatistic
from rmtension.passes._profiles import ActivationProfile, collect_profiles, selectivity

__all__ = [
    "ActivationCollector",
    "ActivationProfile",
    "ActivationSample",
    "ActivationStatistics",
    "PairStatistic",
    "collect_profiles",
    "run_pass",
    "selectivity",
]
