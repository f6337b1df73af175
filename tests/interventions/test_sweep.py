"""Many ablations at once: each gives what it gives by itself, and runs no more than it has to."""

import pytest
import torch
from ablated_singly import one_by_one, some_sets
from tiny_models import batches_of, grid, make_pairs

from rmtension import (
    AblationContext,
    ActivationCollector,
    Mean,
    NeuronSet,
    OtherResponse,
    Resample,
    RewardHead,
    Scale,
    Zero,
)
from rmtension.errors import DataError, OptionError, ProvenanceError
from rmtension.interventions._sweep import score_without
from rmtension.study._model_runs import ModelRuns


@pytest.mark.parametrize("site", grid(["mlp", "attn_head"]))
@pytest.mark.parametrize("family", grid(["gpt2", "llama", "gpt_neox"]))
def test_a_sweep_equals_single_ablations(checkpoints, few, family, site):
    """In float64 to 1e-9 (1e-6 where norms are float32 in every model)."""
    head = RewardHead.from_pretrained(checkpoints[family], dtype=torch.float64)
    sets = some_sets(head, site)
    collector = ActivationCollector(head, site=site)
    replacements = [
        Zero(),
        Mean(collector.collect(few)),
        Resample(collector.sample(few, n=8), seed=3),
        Scale(-0.5),
    ]
    room = 1e-6 if family == "llama" else 1e-9
    for positions in ("all", "response", "last"):
        for replacement in replacements if positions == "all" else replacements[1:3]:
            expected = one_by_one(head, few, sets, replacement, positions=positions)
            rewards = score_without(head, few, sets, replacement, positions=positions)
            for swept, single in zip(rewards, expected, strict=True):
                assert torch.allclose(swept.chosen, single.chosen, atol=room, rtol=0)
                assert torch.allclose(swept.rejected, single.rejected, atol=room, rtol=0)
                assert swept.provenance == single.provenance
            assert float((rewards[0].margin - rewards[-1].margin).abs().max()) > 1e-3
    assert torch.allclose(rewards[-1].margin, head.score_pairs(few).margin, atol=room, rtol=0)


@pytest.fixture(scope="module")
def few():
    return make_pairs(6)


def n_blocks(head, run):
    """How often each block runs."""
    counts = [0] * head.n_layers
    handles = []
    for layer in range(head.n_layers):

        def count(*_, layer=layer):
            counts[layer] += 1

        handles.append(head.body.block(layer).register_forward_hook(count))
    try:
        run()
    finally:
        for handle in handles:
            handle.remove()
    return counts


def test_cost_is_as_documented(checkpoints, few):
    """Calls of blocks for a batch: a whole run, a test of each lowest layer, and the layers above it."""
    head = RewardHead.from_pretrained(checkpoints["gpt2"])
    whole, middle, _, last, empty = some_sets(head)
    assert len(batches_of(head, few)) == 1

    def cost(*sets):
        return n_blocks(head, lambda: score_without(head, few, sets))

    assert cost() == [0, 0, 0]
    assert cost(empty) == cost(empty, empty) == cost(whole) == [1, 1, 1]
    # The block that all sets begin in runs twice more: without ablation, and to test whether it can be left out.
    assert cost(whole, whole, whole) == [3, 3, 3]
    assert cost(whole, middle) == [2, 2, 2]
    assert cost(last, last) == [1, 1, 3]
    assert cost(whole, empty, last) == [3, 3, 3]
    # The MLP of a head's own block runs again, because it follows the head.
    whole, middle, *_ = some_sets(head, "attn_head")
    assert cost(whole, middle) == [3, 2, 2]


def test_models_without_replay_run_as_a_whole(checkpoints, few):
    head = RewardHead.from_pretrained(checkpoints["gpt2"], dtype=torch.float64)
    sets = some_sets(head)
    plain = score_without(head, few, sets)
    with head.model.hooks(fwd_hooks=[("blocks.1.hook_resid_mid", lambda value, hook: value)]):
        bridged = score_without(head, few, sets)
    for swept, single in zip(bridged, plain, strict=True):
        assert torch.allclose(swept.margin, single.margin, atol=1e-5)  # the bridge's attention is rounded to float32


def test_a_sweep_adds_to_an_ablation_around_it(checkpoints, few):
    """Neurons that are ablated already stay ablated, at the same tokens."""
    head = RewardHead.from_pretrained(checkpoints["gpt2"], dtype=torch.float64)
    whole, middle, _, last, _ = some_sets(head)
    statistics = ActivationCollector(head).collect(few)
    outer = AblationContext(head, middle, Mean(statistics), positions="response")
    with outer:
        rewards = score_without(head, few, [whole, last, last])
        expected = one_by_one(head, few, [whole, last, last])
    for swept, single in zip(rewards, expected, strict=True):
        assert torch.allclose(swept.margin, single.margin, atol=1e-9)
    assert not torch.allclose(rewards[1].margin, score_without(head, few, [last])[0].margin)


def test_a_sweep_in_half_precision_agrees_to_rounding(checkpoints, few):
    head = RewardHead.from_pretrained(checkpoints["llama"], dtype=torch.bfloat16)
    sets = some_sets(head)
    for swept, single in zip(score_without(head, few, sets), one_by_one(head, few, sets), strict=True):
        assert torch.allclose(swept.margin, single.margin, atol=0.05)


def test_wrong_arguments_are_refused(checkpoints, few):
    head = RewardHead.from_pretrained(checkpoints["gpt2"])
    sets = some_sets(head)
    with pytest.raises(OptionError, match=r"sets: expected sets of the same site, got \['attn_head', 'mlp'\]"):
        score_without(head, few, [*sets, *some_sets(head, "attn_head")])
    with pytest.raises(ProvenanceError):
        score_without(head, few, [NeuronSet(sets[0].mask, "mlp", "another")])
    with pytest.raises(OptionError, match=r"replacement: OtherResponse\(\) needs both texts"):
        score_without(head, few, sets, OtherResponse())
    assert score_without(head, few, []) == []
    sample = ActivationCollector(head).sample(few[:1], n=3)
    with pytest.raises(DataError, match="all donors of Resample come from the prompt"):
        score_without(head, few[:1], sets[:1], Resample(sample))
    assert not head.body.is_hooked


def test_study_runs_reuse_results_of_a_sweep(checkpoints, few, tmp_path):
    """Each set runs once, alone or in a sweep, in this process or an earlier one."""
    head = RewardHead.from_pretrained(checkpoints["gpt2"], dtype=torch.float64)
    sets = some_sets(head)
    runs = ModelRuns(head, folder=tmp_path)
    first = runs.rewards(few, without=sets[1])
    assert runs.n_run == 1
    runs.prepare(few, sets)
    assert runs.n_run == 4, "an empty set needs no run of its own"
    rewards = [runs.rewards(few, without=neurons) for neurons in sets]
    assert (runs.n_run, runs.n_read) == (5, 0)
    assert torch.equal(rewards[1].chosen, first.chosen)
    assert torch.equal(rewards[-1].chosen, runs.rewards(few).chosen), "an empty set changes nothing"
    for swept, single in zip(rewards, one_by_one(head, few, sets), strict=True):
        assert torch.allclose(swept.margin, single.margin, atol=1e-9)
    again = ModelRuns(head, folder=tmp_path)
    again.prepare(few, sets)
    assert [again.rewards(few, without=neurons).chosen.tolist() for neurons in sets] == [
        swept.chosen.tolist() for swept in rewards
    ]
    assert (again.n_run, again.n_read) == (0, 5)
