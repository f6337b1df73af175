"""What a training leaves in its folder, and the tokenizer of tiny bases."""

import json

from safetensors.torch import load_file

from rmtension.store._provenance import TRAINING_RECORD
from rmtension.training._train_tokenizer import train_tokenizer

CONTEXT = 160


def tiny_tokenizer(world):
    """A tokenizer of 320 tokens for the texts of an embedded world."""
    return train_tokenizer(world.texts, 320, max_length=CONTEXT)


def weights(folder):
    """The weights of a trained model by name."""
    return load_file(folder / "model.safetensors")


def record(folder):
    """The record of a training."""
    return json.loads((folder / TRAINING_RECORD).read_text())
