"""How many tokens run together: what memory holds, measured on what the models keep."""

import pytest
import torch
from conftest import make_pairs
from test_families import DENSE

from rmtension import NeuronAttribution, RewardHead
from rmtension.batch_run import BatchRun
from rmtension.budget import enough_tokens, free_bytes, tokens_that_fit
from rmtension.stream import PairStream

CPU = torch.device("cpu")


def kept_bytes(head, batch):
    """What autograd keeps of a run for its gradients, storage by storage, and the gradients themselves."""
    weights = {tensor.untyped_storage().data_ptr() for tensor in head.body.module.parameters()}
    kept = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        run = BatchRun(head, batch, ["mlp"], gradients=True)
    gradients = {one.data_ptr(): one.untyped_storage() for one in run.gradients.values()}
    return sum(storage.nbytes() for storage in [*kept.values(), *gradients.values()])


@pytest.mark.parametrize("family", DENSE)
def test_no_family_keeps_more_than_is_counted_on(dense, family):
    """Nor so little that much of the memory would lie idle."""
    head = dense(family)
    (batch,) = head.stream(make_pairs(12), sharing="pair")
    n_tokens = batch.input_ids.numel()
    n_bytes = kept_bytes(head, batch)
    shape = {"n_layers": head.n_layers, "d_model": head.d_model, "d_mlp": head.n_neurons("mlp"), "itemsize": 8}
    # Twice what it keeps, of which half may be taken.
    assert n_tokens / 5 < tokens_that_fit(2 * n_bytes, **shape) or n_tokens < 5 * 256
    counted_on = 8 * head.n_layers * (12 * head.d_model + 6 * head.n_neurons("mlp"))
    assert n_bytes / n_tokens <= counted_on <= 5 * n_bytes / n_tokens


def test_by_hand():
    shape = {"n_layers": 2, "d_model": 10, "d_mlp": 40, "itemsize": 2}
    assert tokens_that_fit(2 * 1440 * 1000, **shape) == 1000
    assert tokens_that_fit(0, **shape) == 256
    assert (enough_tokens(CPU), enough_tokens(torch.device("meta"))) == (4096, 32768)


def test_free_memory(monkeypatch):
    """Under what the machine has; shared by the processes on it; what a batch system leaves."""
    free = free_bytes(CPU)
    block = torch.ones(2**27)  # 512 MB
    assert 2**28 < free - free_bytes(CPU) < 2**31 or free < 2**30
    del block
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert free_bytes(CPU) < free / 3
    monkeypatch.delenv("LOCAL_WORLD_SIZE")
    monkeypatch.setattr("rmtension.budget._left_of_limit", lambda: 1000)
    assert free_bytes(CPU) == 1000
    monkeypatch.setattr("rmtension.budget._available", lambda: None)
    monkeypatch.setattr("rmtension.budget._left_of_limit", lambda: None)
    assert free_bytes(CPU) is None


def test_little_memory_makes_small_batches(checkpoints, pairs, monkeypatch):
    """Where something of every layer is kept first of all; the result is the same; who says a number gets it."""
    head = RewardHead.from_pretrained(checkpoints["gpt2"], dtype=torch.float64)

    def longest(head, *, keeps_layers):
        batches = PairStream(head, pairs, keeps_layers=keeps_layers)
        return max(batch.input_ids.numel() for batch in batches)

    whole = longest(head, keeps_layers=True)
    assert whole == longest(head, keeps_layers=False) > 256
    scores = NeuronAttribution(head, method="gradient_x_activation").score(pairs)
    per_layer = 8 * (12 * head.d_model + 6 * head.n_neurons("mlp"))
    monkeypatch.setattr("rmtension.reward_head.free_bytes", lambda device: 2 * per_layer * 600)
    assert longest(head, keeps_layers=True) <= 256
    assert 256 < longest(head, keeps_layers=False) <= 600
    again = NeuronAttribution(head, method="gradient_x_activation").score(pairs)
    assert torch.allclose(again.values, scores.values, atol=1e-12)
    said = RewardHead.from_pretrained(checkpoints["gpt2"], tokens_per_batch=4096)
    assert longest(said, keeps_layers=True) == whole
