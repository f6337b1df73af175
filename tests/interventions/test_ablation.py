"""Life cycle of an ablation, what resampling draws, and every wrong argument."""

import pytest
import torch
from model_states import snapshot
from scipy import stats
from tiny_models import save_classifier, unchecked

from rmtension import (
    AblationContext,
    ActivationCollector,
    Mean,
    NeuronAttribution,
    NeuronSet,
    OtherResponse,
    RewardHead,
    Scale,
    Zero,
)
from rmtension.data._encoding import EncodedText
from rmtension.data._token_places import ReadAt
from rmtension.data._tokens import TokenBatch
from rmtension.errors import DataError, OptionError, ProvenanceError
from rmtension.interventions._donors import draw_donors


def neurons_of(head, site="mlp", share=0.5, seed=0):
    mask = torch.rand(head.n_layers, head.n_neurons(site), generator=torch.Generator().manual_seed(seed)) < share
    return NeuronSet(mask, site, head.architecture)


def test_the_model_is_restored_after_leaving_and_after_an_exception(head, pairs):
    before, margin = snapshot(head), head.score_pairs(pairs).margin
    with AblationContext(head, neurons_of(head)):
        inside = head.score_pairs(pairs).margin
        assert snapshot(head) != before
    assert not torch.allclose(inside, margin)
    assert snapshot(head) == before
    with pytest.raises(KeyboardInterrupt), AblationContext(head, neurons_of(head)):
        raise KeyboardInterrupt
    assert snapshot(head) == before
    assert torch.equal(head.score_pairs(pairs).margin, margin)


def test_exception_inside_a_collector_or_an_attribution_leaves_no_hook(head, pairs, monkeypatch):
    before = snapshot(head)
    collector = ActivationCollector(head).update(pairs[:4])
    expected = collector.compute()

    def fail(*_):
        raise RuntimeError("stopped")

    monkeypatch.setattr("rmtension.passes._activation_collector.weighted_sums", fail)
    with pytest.raises(RuntimeError, match="stopped"):
        collector.update(pairs)
    monkeypatch.undo()
    assert snapshot(head) == before
    assert torch.equal(collector.compute().mean, expected.mean)
    monkeypatch.setattr("rmtension.attribution._methods.neuron_activations", fail)
    with pytest.raises(RuntimeError, match="stopped"):
        NeuronAttribution(head, "mean_difference").score(pairs)
    assert snapshot(head) == before


def test_failed_entry_installs_nothing(head, monkeypatch):
    before = snapshot(head)
    context = AblationContext(head, neurons_of(head))
    last = head.body.hook_sites("mlp", 2)[-1].module

    def refuse(*_, **__):
        raise RuntimeError("no more hooks")

    monkeypatch.setattr(last, "register_forward_pre_hook", refuse)
    with pytest.raises(RuntimeError, match="no more hooks"):
        context.__enter__()
    monkeypatch.undo()
    assert snapshot(head) == before
    with context:
        pass


def test_reentry_is_refused_and_contexts_nest(head, pairs):
    first, second = neurons_of(head, seed=1), neurons_of(head, seed=2)
    context = AblationContext(head, first)
    with context, pytest.raises(OptionError, match="already entered"):
        context.__enter__()
    with AblationContext(head, first), AblationContext(head, second):
        nested = head.score_pairs(pairs).margin
    with AblationContext(head, first | second):
        together = head.score_pairs(pairs).margin
    assert torch.allclose(nested, together, atol=1e-6)


def test_the_bridge_itself_is_ablated_too(head):
    """Users run `head.model` with TransformerLens' own calls: an ablation holds there as well."""
    ids = torch.arange(2, 12, device=head.device)[None]
    plain = head.model.original_model.base_model(input_ids=ids)[0]
    with AblationContext(head, neurons_of(head)):
        ablated = head.model.original_model.base_model(input_ids=ids)[0]
        assert torch.allclose((ablated[:, -1] @ head.weight).cpu(), head.score_tokens(ids), atol=1e-5)
    assert not torch.allclose(plain, ablated, atol=1e-3)


def test_user_hooks_on_the_bridge_take_effect(head, pairs):
    """A hook that the user adds through TransformerLens changes what the head scores, and an ablation composes."""
    scored = head.score_pairs(pairs).margin
    everything = NeuronSet(torch.ones(3, head.n_neurons("mlp"), dtype=torch.bool), "mlp", head.architecture)
    layer = everything.mask.clone()
    layer[1:] = False
    with head.model.hooks(fwd_hooks=[("blocks.0.mlp.hook_post", lambda activation, hook: activation * 0)]):
        hooked = head.score_pairs(pairs).margin
        with AblationContext(head, everything):
            both = head.score_pairs(pairs).margin
    with AblationContext(head, NeuronSet(layer, "mlp", head.architecture)):
        ablated = head.score_pairs(pairs).margin
    with AblationContext(head, everything):
        all_ablated = head.score_pairs(pairs).margin
    assert not torch.allclose(hooked, scored, atol=1e-3)
    assert torch.allclose(hooked, ablated, atol=1e-5)
    assert torch.allclose(both, all_ablated, atol=1e-5)
    assert torch.equal(head.score_pairs(pairs).margin, scored)


def test_scale_one_and_empty_set_change_nothing(exact_head, pairs):
    expected = exact_head.score_pairs(pairs).margin
    empty = NeuronSet(torch.zeros(3, exact_head.n_neurons("mlp"), dtype=torch.bool), "mlp", exact_head.architecture)
    for neurons, replacement in ((neurons_of(exact_head), Scale(1.0)), (empty, Zero())):
        with AblationContext(exact_head, neurons, replacement):
            assert torch.equal(exact_head.score_pairs(pairs).margin, expected)


class TestDonors:
    def batch(self, *lengths_and_keys):
        texts = [EncodedText(tuple(range(2, 2 + length)), 0, key) for length, key in lengths_and_keys]
        return TokenBatch.from_texts(texts, range(len(texts)), read_at=ReadAt(1), device="cpu")

    def test_donors_have_another_prompt_in_every_batch(self):
        keys = torch.tensor([7, 8, 8, 9])
        batch = self.batch((40, 7), (60, 8))
        donors = draw_donors(batch, keys, seed=3)
        assert not (keys[donors[0]] == 7).any()
        assert not (keys[donors[1]] == 8).any()
        alone = draw_donors(self.batch((40, 7)), keys, seed=3)
        assert torch.equal(alone[0], donors[0, :40])
        # The draws of neighbouring seeds are not shifted copies of each other.
        many = torch.arange(100, 1000)
        streams = [draw_donors(self.batch((90, 7)), many, seed=seed)[0] for seed in range(3)]
        for first, second in ((0, 1), (1, 2), (0, 2)):
            for shift in range(4):
                assert (streams[first][shift : 60 + shift] == streams[second][:60]).float().mean() < 0.1

    def test_equal_prefixes_get_equal_donors(self):
        """Chosen and rejected of a pair share the prompt's donors, so that it adds no noise to the margin."""
        donors = draw_donors(self.batch((30, 7), (50, 7)), torch.arange(100, 160), seed=0)
        assert torch.equal(donors[0, :30], donors[1, :30])

    def test_donors_are_drawn_uniformly(self):
        """Chi-square over 20 donors and 20,000 draws; the seed is fixed, so this is a check of the hash."""
        batch = self.batch(*[(100, 1000 + number) for number in range(200)])
        counts = torch.bincount(draw_donors(batch, torch.arange(20), seed=0).flatten(), minlength=20)
        assert stats.chisquare(counts.numpy()).pvalue > 0.01

    def test_donors_from_the_scored_prompt_alone_are_refused(self):
        with pytest.raises(DataError, match="more prompts"):
            draw_donors(self.batch((5, 7)), torch.tensor([7, 7]), seed=0)


class TestWrongArguments:
    def test_unknown_positions_are_refused(self, head):
        with pytest.raises(OptionError, match="positions"):
            AblationContext(head, neurons_of(head), positions="first")

    @pytest.mark.parametrize(
        ("make", "written"),
        [
            (lambda statistics, sample: "mean", "Mean(statistics)"),
            (lambda statistics, sample: "other", "OtherResponse()"),
            (lambda statistics, sample: "erase", "Zero(), Mean(statistics)"),
            (lambda statistics, sample: None, "Zero(), Mean(statistics)"),
            (lambda statistics, sample: statistics, "Mean(statistics)"),
            (lambda statistics, sample: sample, "Resample(sample)"),
            (lambda statistics, sample: Scale, "Scale(alpha)."),
        ],
    )
    def test_other_arguments_suggest_a_replacement(self, head, pairs, make, written):
        collector = ActivationCollector(head)
        given = make(collector.collect(pairs[:2]), collector.sample(pairs[:2], n=3))
        for call in (AblationContext.__init__, NeuronAttribution.__init__):
            last = neurons_of(head) if call is AblationContext.__init__ else "attribution_patching"
            with pytest.raises(
                OptionError, match=r"^replacement: expected a replacement such as Zero\(\), got "
            ) as raised:
                unchecked(call)(object.__new__(AblationContext), head, last, replacement=given)
            assert f"Write {written}" in str(raised.value)

    def test_other_response_is_refused(self, head):
        with pytest.raises(OptionError, match=r"replacement: OtherResponse\(\) needs both texts of a pair.*Use Zero"):
            AblationContext(head, neurons_of(head), OtherResponse())

    def test_a_set_of_another_model_is_refused(self, head):
        other = NeuronSet(torch.ones(3, 48, dtype=torch.bool), "mlp", "llama-3x48-heads4x8-d32")
        with pytest.raises(ProvenanceError, match=r"llama-3x48.*gpt2-3x64"):
            AblationContext(head, other)

    def test_a_set_of_another_site_is_refused(self, head):
        with pytest.raises(ProvenanceError, match=r"expected a mask of shape \(3, 4\) for site 'attn_head'"):
            AblationContext(head, NeuronSet(neurons_of(head).mask, "attn_head", head.architecture))

    def test_statistics_of_another_model_are_refused(self, head, pairs, tmp_path, tokenizer):
        other = RewardHead.from_pretrained(save_classifier(tmp_path, "gpt2", tokenizer, seed=3))
        statistics = ActivationCollector(other).collect(pairs[:2])
        with pytest.raises(ProvenanceError, match="replacement: its activations are those of model"):
            AblationContext(head, neurons_of(head), Mean(statistics))

    def test_statistics_of_another_site_are_refused(self, head, pairs):
        statistics = ActivationCollector(head, site="attn_head").collect(pairs[:2])
        with pytest.raises(ProvenanceError, match="site 'attn_head'"):
            AblationContext(head, neurons_of(head), Mean(statistics))

    def test_selected_positions_need_a_run_of_the_library(self, head):
        with (
            AblationContext(head, neurons_of(head), positions="last"),
            pytest.raises(OptionError, match=r"RewardHead\.score"),
        ):
            head.model.original_model.base_model(input_ids=torch.tensor([[2, 3]], device=head.device))
