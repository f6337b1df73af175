"""Reward models as they run: loading, heads, hooks, exact batches, and the direct path to the reward."""

from rmtension.models._direct_path import DirectContributions, direct_contributions
from rmtension.models._loading import LoadOptions
from rmtension.models._reward_model import RewardModel
from rmtension.models._run_options import RunOptions

__all__ = [
    "DirectContributions",
    "LoadOptions",
    "RewardModel",
    "RunOptions",
    "direct_contributions",
]
