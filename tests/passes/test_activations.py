"""The activation collector: options, counts, merging, donors and errors."""

import pytest
import torch
from tiny_models import make_pairs
from tqdm.auto import tqdm

from rmtension import (
    AblationContext,
    ActivationCollector,
    ActivationSample,
    ActivationStatistics,
    Mean,
    NeuronSet,
    PreferencePairs,
    RewardHead,
)
from rmtension.errors import DataError, OptionError, ProvenanceError


@pytest.fixture(scope="module")
def pairs():
    return make_pairs(6)


def long_pair(n_words):
    """A pair whose rejected response has `n_words` words of one token each."""
    row = {"prompt": "\n\nHuman: help\n\nAssistant:", "chosen": " sure", "rejected": " please" * n_words}
    return PreferencePairs.from_records([row])


def test_provenance_counts_pairs_and_tokens(head, pairs):
    """Provenance after updates and merges equals that of one pass."""
    whole = ActivationCollector(head, positions="response").collect(pairs).provenance
    parts = ActivationCollector(head, positions="response").update(pairs[:2]).update(pairs[2:3])
    rest = ActivationCollector(head, positions="response").update(pairs[3:])
    merged = parts.merge(rest).compute().provenance
    assert merged == whole
    assert (whole.n_pairs, whole.data, whole.site) == (6, pairs.digest[:16], "mlp")
    assert (whole.positions, whole.method, whole.model) == ("response", "statistics", head.fingerprint)
    encoded = head.encode(pairs)
    texts = [*encoded.chosen, *encoded.rejected]
    assert whole.n_tokens == sum(len(text) - text.response_start for text in texts)
    assert rest.compute().provenance.n_pairs == 3, "the merged collector is not changed"


def test_collectors_of_different_runs_do_not_merge(head, pairs, checkpoints):
    collector = ActivationCollector(head)
    with pytest.raises(DataError, match=r"^compute: nothing was collected yet. Call update\(pairs\) with at least one"):
        collector.compute()
    with pytest.raises(OptionError, match="merge: expected another collector, got the same one"):
        collector.merge(collector)
    with pytest.raises(OptionError, match="site: expected one of"):
        ActivationCollector(head, site="mlp_out")
    for other in (ActivationCollector(head, positions="last"), ActivationCollector(head, site="attn_head")):
        with pytest.raises(ProvenanceError, match=r"^merge: (positions|site) differs"):
            collector.merge(other.update(pairs))
    mine = RewardHead.from_pretrained(checkpoints["gpt2"])
    collector = ActivationCollector(mine).update(pairs)
    before = collector.compute()
    with torch.no_grad():
        mine.body.native.h[0].mlp.c_fc.weight += 0.1
    with pytest.raises(ProvenanceError, match=r"^update: the model's weights changed since the last reset. Call reset"):
        collector.update(pairs)
    after = collector.compute()
    assert after.provenance.model == before.provenance.model != mine.fingerprint
    neurons = NeuronSet.from_indices(
        [(0, 0)], shape=(mine.n_layers, mine.n_neurons("mlp")), site="mlp", architecture=mine.architecture
    )
    with pytest.raises(ProvenanceError, match="replacement"):
        AblationContext(mine, neurons, Mean(after))
    assert collector.reset().update(pairs).compute().provenance.model == mine.fingerprint


def test_long_responses_are_refused_or_cut(head, checkpoints):
    """By every call that reads pairs; responses are not cut by default."""
    cutting = RewardHead.from_pretrained(checkpoints["gpt2"], truncate_response=True)
    calls = {
        "collect": lambda head: ActivationCollector(head).collect(long_pair(200)),
        "update": lambda head: ActivationCollector(head).update(long_pair(200)).compute(),
        "sample": lambda head: ActivationCollector(head).sample(long_pair(200), n=3),
    }
    for call in calls.values():
        with pytest.raises(DataError, match=r"a response has 20. tokens"):
            call(head)
        assert call(cutting).provenance.n_pairs == 1


def test_progress_is_shown_when_asked_for(head, pairs, monkeypatch):
    bars = []

    def bar(**options):
        bars.append((options["desc"], options["total"], options["progress"]))
        return tqdm(disable=True)

    monkeypatch.setattr("rmtension.passes._pair_pass.progress_bar", bar)
    for call in (ActivationCollector(head).collect, ActivationCollector(head).update):
        call(pairs)
        call(pairs, progress=True)
    assert bars == [("collect", 6, None), ("collect", 6, True)] * 2


def test_frames_have_one_row_per_neuron(head, pairs):
    statistics = ActivationCollector(head).collect(pairs)
    frame = statistics.to_frame()
    assert list(frame) == ["layer", "neuron", "mean", "abs_mean", "rms", "frequency"]
    assert len(frame) == head.n_layers * head.n_neurons("mlp")
    row = frame.set_index(["layer", "neuron"]).loc[(1, 5)]
    assert row["rms"] == statistics.rms[1, 5]
    assert row["frequency"] == statistics.frequency[1, 5]
    assert statistics.n_tokens == statistics.provenance.n_tokens


@pytest.mark.parametrize("positions", ["all", "response", "last"])
def test_donors_are_selected_tokens(positions, head, pairs):
    """If as many donors are asked for as there are selected tokens, the donors are all of them."""
    encoded = head.encode(pairs)
    texts = [*encoded.chosen, *encoded.rejected]
    n_each = {"all": len, "response": lambda text: len(text) - text.response_start, "last": lambda _: 1}[positions]
    n = sum(map(n_each, texts))
    sample = ActivationCollector(head, positions=positions).sample(pairs, n=10_000)
    assert len(sample) == n == sample.provenance.n_tokens
    assert torch.bincount(sample.keys.unique(return_inverse=True)[1]).sum() == n
    # The mean over donors is that of the statistics, which use the same tokens.
    statistics = ActivationCollector(head, positions=positions).collect(pairs)
    torch.testing.assert_close(sample.values.double().mean(0), statistics.mean, atol=1e-5, rtol=1e-5)
    where = sample.provenance
    assert (where.n_pairs, where.data, where.positions, where.method) == (6, pairs.digest[:16], positions, "sample")


def test_draws_are_seeded(head, pairs):
    collector = ActivationCollector(head)
    sample = collector.sample(pairs)
    assert len(sample) == len(collector.sample(pairs, n=256, seed=0)) == 256
    assert sample.digest == collector.sample(pairs, n=256, seed=0).digest
    assert sample.digest != collector.sample(pairs, seed=1).digest
    assert len(collector.sample(pairs, n=1)) == 1
    with pytest.raises(OptionError, match=r"^n: expected a positive number of donors, got 0\.$"):
        collector.sample(pairs, n=0)
    with pytest.raises(DataError, match=r"^pairs: expected at least one preference pair to draw donors from, got none"):
        collector.sample(PreferencePairs([]))


def test_digests_differ_between_references(head, pairs):
    means, sample = ActivationCollector(head).collect(pairs), ActivationCollector(head).sample(pairs, n=5)
    others = ActivationCollector(head).collect(pairs[:3]), ActivationCollector(head).sample(pairs[:3], n=5)
    assert len({means.digest, sample.digest, *(other.digest for other in others)}) == 4
    assert means.digest == ActivationCollector(head).collect(pairs).digest


def test_collector_merge_equals_one_pass(exact_head):
    """For parts in another order, an empty part and a part of one pair; to 1e-12, the rounding of float64."""
    pairs = make_pairs(17, seed=4)
    whole = ActivationCollector(exact_head).collect(pairs)
    parts = [pairs[5:16], pairs[:0], pairs[16:17], pairs[:5]]
    merged = ActivationCollector(exact_head)
    for part in parts:
        merged.merge(ActivationCollector(exact_head).update(part))
    updated = ActivationCollector(exact_head)
    for part in parts:
        updated.update(part)
    for other in (merged.compute(), updated.compute()):
        assert other.provenance == whole.provenance
        for name in ("mean", "abs_mean", "rms", "frequency", "channel_mean"):
            assert torch.allclose(getattr(other, name), getattr(whole, name), atol=1e-12, rtol=0)


def test_results_share_no_memory_with_the_collector(head, pairs):
    collector = ActivationCollector(head)
    first = collector.collect(pairs[:4])
    before = first.mean.clone()
    collector.update(pairs)
    assert torch.equal(first.mean, before)


def test_statistics_and_samples_load_as_saved(head, pairs, tmp_path):
    collector = ActivationCollector(head, site="attn_head")
    statistics, sample = collector.collect(pairs), collector.sample(pairs, n=7)
    statistics.save(tmp_path / "statistics.safetensors")
    sample.save(tmp_path / "sample.safetensors")
    assert ActivationStatistics.load(tmp_path / "statistics.safetensors").to_frame().equals(statistics.to_frame())
    loaded = ActivationSample.load(tmp_path / "sample.safetensors")
    assert torch.equal(loaded.values, sample.values)
    assert loaded.provenance == sample.provenance
    assert len(loaded) == 7
