"""What a training leaves in its folder, and the tokenizer of tiny bases."""

import json

from safetensors.torch import load_file

from rmtension.training._train_tokenizer import train_tokenizer
from rmtension.training._trainer_run import RECORD_NAME

CONTEXT = 160


def tiny_tokenizer(world):
    """A tokenizer of 320 tokens for the texts of an embedded world."""
    return train_tokenizer(world.texts, 320, max_length=CONTEXT)


def weights(folder):
    """The weights of a trained model by name."""
    return load_file(folder / "model.safetensors")


def record(folder):
    """The record of a training."""
    return json.loads((folder / RECORD_NAME).read_text())
