"""Passes over pairs: one statistic per class, summed batch by batch, resumed and divided over processes."""

from rmtension.passes._activation_collector import ActivationCollector
from rmtension.passes._activation_profile import ActivationProfile
from rmtension.passes._activation_sample import ActivationSample
from rmtension.passes._activation_statistics import ActivationStatistics
from rmtension.passes._collect_profiles import collect_profiles
from rmtension.passes._pair_pass import run_pass
from rmtension.passes._pair_statistic import PairStatistic
from rmtension.passes._selectivity import selectivity

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
