"""`dtype=torch.float64` opens any model, and computes what transformers computes in float64."""

import pytest
import torch
import transformers
from own_models import HAS_HOOKED_TRANSFORMER
from tiny_models import grid

from rmtension import AblationContext, NeuronAttribution, NeuronSet, RewardHead
from rmtension.synthetic.check_matrix import make_classifier

pytestmark = pytest.mark.lens
WAYS = [{}, {"process_weights": True}]
if HAS_HOOKED_TRANSFORMER:
    WAYS += [{"model_class": "HookedTransformer"}]


@pytest.mark.parametrize("options", WAYS, ids=str)
@pytest.mark.parametrize("family", grid(["mixtral", "qwen2", "gpt_neo"]))
def test_a_float32_classifier_opens_in_float64(family, options, tokenizer, ragged_texts):
    """A mixture of experts has a kernel without float64, and weight processing adds biases in float32.

    1e-6: norms are float32 in every model, and folded biases were rounded.
    """
    classifier = make_classifier(family, len(tokenizer) + 8).float()
    reference = make_classifier(family, len(tokenizer) + 8).float()
    reference.load_state_dict(classifier.state_dict())
    if hasattr(reference.config, "num_local_experts"):
        reference.set_experts_implementation("eager")
    reference = reference.double()
    head = RewardHead.from_classifier(classifier, tokenizer=tokenizer, dtype=torch.float64, **options)
    assert head.dtype == head.weight.to(head.dtype).dtype == torch.float64
    ids = [tokenizer(text, return_tensors="pt")["input_ids"] for text in ragged_texts[:6]]
    with torch.no_grad():
        expected = torch.cat([reference(input_ids=row, use_cache=False).logits[0] for row in ids])
    assert torch.allclose(head.score(ragged_texts[:6]), expected, atol=1e-6)
    assert head.check()["passed"].all()
    # The user's model is what it was.
    assert {parameter.dtype for parameter in classifier.parameters()} == {torch.float32}
    assert (classifier(input_ids=ids[0], use_cache=False).logits[0, 0] - expected[0]).abs() < 1e-3


def test_a_folder_opens_in_float64(tokenizer, tmp_path, pairs):
    """Experts again: forward, backward and ablation."""
    make_classifier("qwen3_moe", len(tokenizer) + 8).float().save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    head = RewardHead.from_pretrained(tmp_path, dtype=torch.float64)
    assert head.check()["passed"].all()
    scores = NeuronAttribution(head, method="gradient_x_activation", site="attn_head").score(pairs[:2])
    assert scores.values.dtype == torch.float64
    with AblationContext(head, NeuronSet(scores.values > 0, "attn_head", head.architecture)):
        assert head.score_pairs(pairs[:2]).margin.isfinite().all()
    assert transformers.AutoConfig.from_pretrained(tmp_path).num_labels == 1


def test_float32_gradients_may_differ_at_a_kink():
    """A ReLU whose input is 0 but for rounding: its gradient is 0 in one dtype and 1 in the other."""
    parts = torch.tensor([1.0, 2.0**-30, -1.0], dtype=torch.float64)
    slopes = {}
    for dtype in (torch.float32, torch.float64):
        x = parts.to(dtype).requires_grad_(True)
        torch.relu(x[0] + x[1] + x[2]).backward()
        slopes[dtype] = float(x.grad[0])
    assert slopes == {torch.float32: 0.0, torch.float64: 1.0}
