"""A model whose harmless objective was damaged, and pairs to mend it with."""

import pytest
import torch

from rmtension import RewardHead, Scale
from rmtension.repair._splits import RepairPairs
from rmtension.synthetic import make_organism


@pytest.fixture(scope="package")
def organism(tmp_path_factory):
    return make_organism(tmp_path_factory.mktemp("organism") / "model", noise=0.05, n_pairs=240)


@pytest.fixture(scope="package")
def head(organism):
    return organism.head()


@pytest.fixture(scope="package")
def pairs(organism):
    """The weak objective is the harmless one, once its neurons are damaged."""
    return RepairPairs.split(organism.pairs, weak="harmless", strong="helpful", most_lost=0.05, seed=0)


@pytest.fixture(scope="package")
def damaged(head, organism, tmp_path_factory):
    """The neurons of the harmless objective count negatively, in a checkpoint of its own."""
    folder = tmp_path_factory.mktemp("damaged")
    head.with_ablation(organism.truth["harmless"], Scale(-1.0)).save_pretrained(folder)
    return RewardHead.from_pretrained(folder)


@pytest.fixture(scope="package")
def exact(damaged):
    """The damaged model in float64, for differences of rewards."""
    return RewardHead.from_pretrained(damaged.checkpoint.source.name, dtype=torch.float64)
