"""Fixtures of the suite."""

# First: it says what has to be said before torch and transformers are imported.
from tiny_models import FAMILIES, WORDS, grid, make_pairs, make_tokenizer, save_classifier

# isort: split
import gc
import random

import pytest
import torch
from reference import Reference

from rmtension import RewardHead


def pytest_collection_finish():
    """What was imported and collected stays: it need not be looked through whenever a training run collects garbage."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory):
    return make_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory, tokenizer):
    """family -> folder of a reward model."""
    return {f: save_classifier(tmp_path_factory.mktemp(f), f, tokenizer) for f in FAMILIES}


@pytest.fixture(scope="session")
def ragged_texts():
    """64 texts of 1 to 60 words, seeded."""
    draw = random.Random(0)
    texts = [" ".join(draw.choices(WORDS, k=draw.randint(1, 60))) for _ in range(64)]
    assert len(set(map(len, texts))) > 30
    return texts


@pytest.fixture(scope="session")
def pairs():
    """24 pairs of ragged lengths with prompts of their own."""
    made = make_pairs(24)
    assert len(made.prompts) == 24
    return made


@pytest.fixture(scope="session", params=grid(FAMILIES))
def exact_head(request, checkpoints):
    """A head in float64, of every family in turn."""
    return RewardHead.from_pretrained(checkpoints[request.param], dtype=torch.float64)


@pytest.fixture(scope="module", params=grid(FAMILIES))
def both(request, checkpoints):
    """The head under test and the reference, of every family."""
    folder = checkpoints[request.param]
    return RewardHead.from_pretrained(folder, dtype=torch.float64), Reference(folder)


@pytest.fixture(scope="module")
def plain_tokenizer(tmp_path_factory):
    return make_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="session")
def head(checkpoints):
    """A GPT-2-shaped head in float32."""
    return RewardHead.from_pretrained(checkpoints["gpt2"])
