"""Training: reward models, and the base model they start from, in one call (extra `train`)."""

from rmtension.training._family import train_family, train_seeds
from rmtension.training._family_trainings import FamilySettings
from rmtension.training._hold_ablated import HoldAblated
from rmtension.training._train_base_model import train_base_model
from rmtension.training._train_reward_model import train_reward_model
from rmtension.training._train_tokenizer import train_tokenizer

__all__ = [
    "FamilySettings",
    "HoldAblated",
    "train_base_model",
    "train_family",
    "train_reward_model",
    "train_seeds",
    "train_tokenizer",
]
