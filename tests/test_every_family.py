"""What is run once, left out, run from the middle or counted on, family by family: numbers are those of the whole.

In float64; norms that stay in float32 differ by 1e-7 between batches of any kind: a margin's gradient they round once,
those of two rewards twice.
"""

import pytest
import torch
from ablated_singly import one_by_one, some_sets
from all_families import DENSE
from kept_memory import kept_bytes
from packed_pairs import n_packed, pairs_of_all_kinds
from tiny_models import batches_of, grid, make_pairs, make_tokenizer

from rmtension import NeuronAttribution, RewardHead
from rmtension.data._budget import tokens_that_fit
from rmtension.interventions._sweep import score_without
from rmtension.synthetic.check_matrix import FAMILIES as MATRIX
from rmtension.synthetic.check_matrix import make_classifier

# Their positions are not an argument, or are counted from a mask of one row.
ALONE = {"bloom", "mpt"}
# Their MLP adds what it is given to its output itself, or has no module of its own.
WHOLE = {"bloom", "mpt", "opt"}


@pytest.fixture(scope="module", params=grid(DENSE))
def family(request):
    return request.param


@pytest.fixture(scope="module")
def head(family, tmp_path_factory):
    """Windows of attention are longer than the rows here; `data/test_packing.py` has short ones."""
    folder = tmp_path_factory.mktemp("model")
    tokenizer = make_tokenizer(folder)
    changes = {name: 64 for name in ("sliding_window", "window_size") if name in MATRIX[family]}
    make_classifier(family, len(tokenizer) + 8, **changes).save_pretrained(folder)
    return RewardHead.from_pretrained(folder, dtype=torch.float64)


@pytest.fixture(scope="module")
def few():
    return pairs_of_all_kinds()


@pytest.fixture(scope="module")
def numbers(head, few):
    """Margins and scores as they are computed."""
    return margins_and_scores(head, few)


def margins_and_scores(head, pairs):
    return head.score_pairs(pairs).margin, NeuronAttribution(head, method="gradient_x_activation").score(pairs).values


def same(values, expected):
    return all(torch.allclose(value, other, atol=1e-6, rtol=0) for value, other in zip(values, expected, strict=True))


def test_packing_changes_no_result(head, few, numbers, family, monkeypatch):
    assert (n_packed(head, few) == 0) == (family in ALONE)
    assert float(numbers[1].abs().max()) > 1e-3
    monkeypatch.setattr("rmtension.bodies._bodies.BridgeBody.pack_up_to", 0)
    assert n_packed(head, few) == 0
    assert same(numbers, margins_and_scores(head, few))


def test_skipping_tokens_of_the_last_mlp_changes_no_result(head, few, numbers, family, monkeypatch):
    assert (head.body._last_mlp is None) == (family in WHOLE)
    assert float(numbers[1][-1].abs().max()) > 1e-3, "the last layer has scores"
    monkeypatch.setattr(head.body, "_last_mlp", None)
    assert same(numbers, margins_and_scores(head, few))


def test_sweeps_equal_ablations_of_single_sets(head, few):
    sets = some_sets(head)[:3]
    scored, expected = score_without(head, few, sets), one_by_one(head, few, sets)
    assert same([rewards.margin for rewards in scored], [rewards.margin for rewards in expected])
    assert not same([scored[0].margin], [head.score_pairs(few).margin])


def test_no_family_stores_more_than_the_budget_counts(head):
    """Nor so little that much of the memory would lie idle."""
    batch = max(batches_of(head, make_pairs(12), sharing="pair"), key=lambda batch: batch.input_ids.numel())
    n_tokens = batch.input_ids.numel()
    n_bytes = kept_bytes(head, batch)
    shape = {"n_layers": head.n_layers, "d_model": head.d_model, "d_mlp": head.n_neurons("mlp"), "itemsize": 8}
    counted_on = 2**40 / 2 / tokens_that_fit(2**40, **shape)
    assert n_bytes / n_tokens <= counted_on <= 5 * n_bytes / n_tokens
