"""Training: reward models, and the base model they start from, in one call with TRL (extra `train`)."""

from rmtension.data._encoding import encode_pairs
from rmtension.training._family import FamilySettings, train_family, train_seeds
from rmtension.training._hold_ablated import HoldAblated
from rmtension.training._trainer_run import digest_of_texts, is_finished
from rmtension.training._training import select_pairs, train_base_model, train_reward_model, train_tokenizer

__all__ = [
    "FamilySettings",
    "HoldAblated",
    "digest_of_texts",
    "encode_pairs",
    "is_finished",
    "select_pairs",
    "train_base_model",
    "train_family",
    "train_reward_model",
    "train_seeds",
    "train_tokenizer",
]
