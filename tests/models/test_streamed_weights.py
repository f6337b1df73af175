"""Models whose weights stay in their files: the same numbers, and what is asked of the system."""

import sys

import peft
import pytest
import torch
from tiny_models import FAMILIES, grid, make_pairs, save_classifier
from transformers import AutoModelForSequenceClassification

from rmtension import AblationContext, ActivationCollector, NeuronAttribution, RewardHead, Zero
from rmtension.errors import ModelError, OptionError

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="only Linux can stream weights")
PAGE_OUT, WILL_NEED = 21, 3


@pytest.fixture(scope="module", params=grid(FAMILIES))
def folder(request, checkpoints):
    return checkpoints[request.param]


@pytest.fixture
def streamed(checkpoints):
    """A model of three blocks, all of them streamed, and the advices that it gives: (advice, block)."""
    head = RewardHead.from_pretrained(checkpoints["llama"], weight_memory=0)
    weights, advices = head.streamed, []
    first_of = {ranges[0][0]: block for block, ranges in enumerate(weights._ranges)}

    def madvise(first, n_bytes, advice):
        assert n_bytes > 0
        if first in first_of:
            advices.append((advice, first_of[first]))

    weights._madvise = madvise
    return head, advices


def test_nothing_changes_by_a_bit(folder, pairs):
    resident, streamed = RewardHead.from_pretrained(folder), RewardHead.from_pretrained(folder, weight_memory=0)
    assert streamed.streamed.streamed == streamed.streamed.total > 0
    assert torch.equal(resident.score_pairs(pairs).margin, streamed.score_pairs(pairs).margin)
    one, other = (ActivationCollector(head).collect(pairs) for head in (resident, streamed))
    assert torch.equal(one.mean, other.mean)
    assert torch.equal(one.rms, other.rms)
    for method, options in (("gradient_x_activation", {}), ("integrated_gradients", {"steps": 3})):
        one, other = (NeuronAttribution(head, method, **options).score(pairs) for head in (resident, streamed))
        assert torch.equal(one.values, other.values)
    scores = []
    for head in (resident, streamed):
        with AblationContext(head, one.top(k=5), Zero()):
            scores.append(head.score_pairs(pairs).margin)
    assert torch.equal(*scores)
    assert resident.fingerprint == streamed.fingerprint
    assert "MB of weights in files" in repr(streamed)
    assert "files" not in repr(resident)
    streamed.check()


def test_blocks_come_one_ahead_and_leave_one_behind(streamed, pairs):
    head, advices = streamed
    head.score(["please help"])
    assert advices == [(PAGE_OUT, 2), (WILL_NEED, 1), (PAGE_OUT, 0), (WILL_NEED, 2), (PAGE_OUT, 1), (WILL_NEED, 0)]
    advices.clear()
    NeuronAttribution(head, "gradient_x_activation").score(pairs[:1])
    # Forward to the last block; then backward, where the block above leaves and the one below comes.
    assert advices[:6] == [(PAGE_OUT, 2), (WILL_NEED, 1), (PAGE_OUT, 0), (WILL_NEED, 2), (PAGE_OUT, 1), (WILL_NEED, 0)]
    assert advices[6:] == [(PAGE_OUT, 0), (WILL_NEED, 1), (PAGE_OUT, 2), (WILL_NEED, 0), (PAGE_OUT, 1), (WILL_NEED, 2)]


def test_the_blocks_that_fit_stay(checkpoints):
    size = RewardHead.from_pretrained(checkpoints["llama"], weight_memory=0).streamed.total // 3
    head = RewardHead.from_pretrained(checkpoints["llama"], weight_memory=2 * size)
    assert head.streamed.streamed == size
    calls = []
    head.streamed._madvise = lambda first, n_bytes, advice: calls.append(first)
    head.score(["please help"])
    # The last block comes before it runs, and leaves before the first.
    assert set(calls) == {first for first, _ in head.streamed._ranges[2]}
    everything = RewardHead.from_pretrained(checkpoints["llama"], weight_memory=10**9)
    assert everything.streamed.streamed == 0


def test_weights_that_were_changed_stay_changed(checkpoints, pairs):
    margins = []
    for more in ({}, {"weight_memory": 0}):
        head = RewardHead.from_pretrained(checkpoints["llama"], **more)
        with torch.no_grad():
            for parameter in head.body.block(1).parameters():
                parameter *= 1.5
        head.score_pairs(pairs)
        margins.append(head.score_pairs(pairs).margin)
    assert torch.equal(*margins)
    plain = RewardHead.from_pretrained(checkpoints["llama"]).score_pairs(pairs).margin
    assert not torch.allclose(plain, margins[0])


def test_half_precision_is_streamed_from_a_half_precision_file(checkpoints, tmp_path, pairs):
    RewardHead.from_pretrained(checkpoints["llama"], dtype=torch.bfloat16).save_pretrained(tmp_path)
    margins = [
        RewardHead.from_pretrained(tmp_path, dtype=torch.bfloat16, **more).score_pairs(pairs).margin
        for more in ({}, {"weight_memory": 0})
    ]
    assert torch.equal(*margins)


def test_refusals(checkpoints, tmp_path, tokenizer):
    folder = checkpoints["gpt2"]
    with pytest.raises(ModelError, match=r"weight_memory: some weights are not read .* Pass the dtype of the files"):
        RewardHead.from_pretrained(folder, weight_memory=0, dtype=torch.float64)
    for wrong in (-1, 1.5, "4GB"):
        with pytest.raises(OptionError, match="weight_memory: expected a number of bytes"):
            RewardHead.from_pretrained(folder, weight_memory=wrong)
    with pytest.raises(OptionError, match="weight_memory: it is for a model on the CPU"):
        RewardHead.from_pretrained(folder, weight_memory=0, device_map="cpu")
    with pytest.raises(OptionError, match="converted or processed weights"):
        RewardHead.from_pretrained(folder, weight_memory=0, process_weights=True)
    head = RewardHead.from_pretrained(folder, weight_memory=0)
    scores = NeuronAttribution(head, "direct_effect").score(make_pairs(1))
    with pytest.raises(ModelError, match="a copy needs all weights in memory"):
        head.with_ablation(scores.top(k=2))


@pytest.mark.filterwarnings("ignore::FutureWarning")  # of transformers, when peft makes the adapter
def test_adapters_are_refused(checkpoints, tmp_path, tokenizer):
    classifier = AutoModelForSequenceClassification.from_pretrained(checkpoints["gpt2"])
    adapted = peft.get_peft_model(
        classifier, peft.LoraConfig(task_type="SEQ_CLS", target_modules=["c_attn"], fan_in_fan_out=True)
    )
    adapted.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(OptionError, match="weight_memory: the weights of an adapter's base"):
        RewardHead.from_pretrained(tmp_path, weight_memory=0, base=save_classifier(tmp_path / "b", "gpt2", tokenizer))
