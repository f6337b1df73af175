"""Tokens and batches that a thread prepares: the same, in the same order, with the same errors."""

import threading
from itertools import count

import pytest
import torch

from rmtension import ActivationCollector, NeuronAttribution, PreferencePairs, RewardHead
from rmtension.errors import DataError
from rmtension.passes import _pair_pass
from rmtension.passes._ahead import made_ahead, mapped_ahead, works_ahead


@pytest.fixture
def ahead(monkeypatch):
    """Passes prepare in a thread as for a GPU, in small chunks."""
    monkeypatch.setattr(_pair_pass, "works_ahead", lambda device: True)
    monkeypatch.setattr(_pair_pass, "_PAIRS_PER_CHUNK", 7)


def test_items_come_in_order_from_one_other_thread():
    here = threading.get_ident()
    read, made = [], []

    def items():
        for number in range(20):
            read.append(threading.get_ident())
            yield number

    def double(number):
        made.append(threading.get_ident())
        return 2 * number

    assert list(mapped_ahead(double, items(), 3)) == [2 * number for number in range(20)]
    assert set(read) == {here}
    assert len(set(made)) == 1
    assert here not in made
    assert list(made_ahead(iter("abc"), 2)) == ["a", "b", "c"]
    assert list(made_ahead([], 2)) == []
    assert list(mapped_ahead(double, [], 2)) == []


def test_no_more_than_n_are_ahead():
    started, ahead = [], mapped_ahead(lambda number: started.append(number), count(), 2)
    for n_used in range(1, 5):
        next(ahead)
        assert len(started) <= n_used + 2
    ahead.close()
    n_threads = threading.active_count()
    assert len(started) <= 7
    del ahead
    assert threading.active_count() <= n_threads


def test_an_error_comes_where_its_item_would():
    def items():
        yield 1
        yield 2
        raise DataError("pairs: the third is wrong")

    for made in (made_ahead(items(), 2), mapped_ahead(lambda number: 6 // (2 - number), [0, 1, 2], 2)):
        assert len([next(made), next(made)]) == 2
        with pytest.raises((DataError, ZeroDivisionError)):
            next(made)


def test_passes_give_the_same_bits(checkpoints, pairs, ahead, monkeypatch):
    head = RewardHead.from_pretrained(checkpoints["llama"], tokens_per_batch=128)

    def results():
        yield head.score_pairs(pairs).margin
        yield ActivationCollector(head).collect(pair for pair in pairs).mean
        yield NeuronAttribution(head, "gradient_x_activation", positions="response").score(pairs).values

    prepared = list(results())
    monkeypatch.setattr(_pair_pass, "works_ahead", works_ahead)
    assert not works_ahead(torch.device("cpu"))
    assert works_ahead(torch.device("cuda"))
    for one, other in zip(prepared, results(), strict=True):
        assert torch.equal(one, other)


def test_a_run_that_was_killed_resumes_where_it_was(checkpoints, pairs, ahead, tmp_path, monkeypatch):
    head = RewardHead.from_pretrained(checkpoints["llama"], tokens_per_batch=128)
    whole = ActivationCollector(head).collect(pairs)
    monkeypatch.setattr("rmtension.store._work_folder.EVERY", 0.0)
    monkeypatch.setattr("rmtension.store._work_folder._SHARE", 1e9)

    def interrupted():
        for number, pair in enumerate(pairs):
            if number == 15:
                raise KeyboardInterrupt
            yield pair

    with pytest.raises(KeyboardInterrupt):
        ActivationCollector(head).collect(interrupted(), work=tmp_path)
    assert (tmp_path / "progress-0.safetensors").exists()
    again = ActivationCollector(head).collect((pair for pair in pairs), work=tmp_path)
    assert torch.equal(whole.mean, again.mean)


def test_a_wrong_pair_in_a_later_chunk_is_reported(checkpoints, ahead):
    head = RewardHead.from_pretrained(checkpoints["llama"], max_length=12)
    words = " please" * 40
    longer = PreferencePairs.from_records(
        [{"prompt": "how", "chosen": "do", "rejected": "i"}] * 9 + [{"prompt": "how", "chosen": words, "rejected": "i"}]
    )
    with pytest.raises(DataError, match="response"):
        ActivationCollector(head).collect(longer)
