"""The rewards of a model that TRL trained by DPO equal those that TRL logs; attributions and ablations are exact."""

import pytest
import torch
import transformers
from reference import DEVICE
from tiny_models import make_config, make_pairs

from rmtension import AblationContext, NeuronAttribution, NeuronSet, PreferencePairs, RewardHead
from rmtension.heads import LogRatioHead

pytestmark = [pytest.mark.grid, pytest.mark.filterwarnings("ignore")]
BETA = 0.1


@pytest.fixture(scope="module")
def trained(tmp_path_factory, tokenizer):
    """The folders of policy and reference, the pairs with the end-of-text token, and TRL's rewards of each pair."""
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer

    folder = tmp_path_factory.mktemp("dpo")
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(make_config("llama", len(tokenizer)))
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    model.save_pretrained(folder / "reference")
    tokenizer.save_pretrained(folder / "reference")
    pairs = make_pairs(8)
    rows = [{"prompt": p.prompt, "chosen": f" {p.chosen}", "rejected": f" {p.rejected}"} for p in pairs]
    options = DPOConfig(
        output_dir=str(folder / "run"),
        beta=BETA,
        learning_rate=5e-3,
        max_steps=6,
        per_device_train_batch_size=4,
        per_device_eval_batch_size=1,
        report_to=[],
        use_cpu=DEVICE.type == "cpu",
        save_strategy="no",
        disable_tqdm=True,
        bf16=False,
        gradient_checkpointing=False,
    )
    trainer = DPOTrainer(
        model=model,
        ref_model=transformers.AutoModelForCausalLM.from_pretrained(folder / "reference"),
        args=options,
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
    )
    trainer.train()
    logged = [trainer.evaluate(Dataset.from_list([row])) for row in rows]
    trainer.save_model(str(folder / "policy"))
    names = ("eval_rewards/chosen", "eval_rewards/rejected", "eval_rewards/margins")
    # TRL adds the end-of-text token to every response.
    ended = PreferencePairs.from_records(
        [
            {"prompt": p.prompt, "chosen": p.chosen + tokenizer.eos_token, "rejected": p.rejected + tokenizer.eos_token}
            for p in pairs
        ]
    )
    return folder, ended, pairs, torch.tensor([[values[name] for name in names] for values in logged])


def test_rewards_equal_those_that_trl_logs(trained, record_property):
    folder, ended, pairs, logged = trained
    model = RewardHead.from_pretrained(folder / "policy", head=LogRatioHead(folder / "reference", beta=BETA))
    scored = model.score_pairs(ended)
    own = torch.stack([scored.chosen, scored.rejected, scored.margin], dim=1)
    difference = float((own - logged).abs().max())
    print(f"max |difference| to TRL's rewards of {len(ended)} pairs: {difference:.1e}")
    assert float(logged[:, 2].abs().min()) > 0.05, "training must have moved the policy"
    assert difference < 1e-4
    # Negative control: without the end-of-text token that TRL adds, the rewards are others.
    other = model.score_pairs(pairs)
    assert float((other.chosen - logged[:, 0]).abs().max()) > 1e-3
    assert model.check(ended)["passed"].all()


def test_attribution_and_ablation_of_the_trained_policy(trained):
    """Gradients against autograd of transformers' model with plain hooks, an ablation against the same hooks."""
    folder, ended, *_ = trained
    model = RewardHead.from_pretrained(
        folder / "policy", head=LogRatioHead(folder / "reference", beta=BETA), dtype=torch.float64
    )
    load = transformers.AutoModelForCausalLM.from_pretrained
    policy, reference = (load(folder / name, dtype=torch.float64).eval().to(DEVICE) for name in ("policy", "reference"))
    scores = NeuronAttribution(model, "gradient_x_activation").score(ended)
    mask = torch.rand(scores.values.shape, generator=torch.Generator().manual_seed(1)) < 0.25
    before = model.score_pairs(ended)
    with AblationContext(model, NeuronSet(mask, "mlp", model.architecture)):
        ablated = model.score_pairs(ended)

    def likelihood(network, ids, first):
        logits = network(input_ids=ids).logits[0, first - 1 : -1]
        return logits.log_softmax(dim=1).gather(1, ids[0, first:, None]).sum()

    def margin(pair, change):
        handles = [
            layer.mlp.down_proj.register_forward_pre_hook(lambda _, inputs, n=n: (change(n, inputs[0]),))
            for n, layer in enumerate(policy.model.layers)
        ]
        sides = []
        for side in ("chosen", "rejected"):
            text = f"{pair.prompt} {getattr(pair, side)}"
            ids = model.tokenizer(text, return_tensors="pt")["input_ids"].to(DEVICE)
            first = len(model.tokenizer(pair.prompt)["input_ids"])
            with torch.no_grad():
                subtracted = likelihood(reference, ids, first)
            sides.append(BETA * (likelihood(policy, ids, first) - subtracted))
        for handle in handles:
            handle.remove()
        return sides[0] - sides[1]

    expected, on = torch.zeros_like(scores.values), mask.to(DEVICE)
    for number, pair in enumerate(ended):
        seen = []

        def keep(layer, activation, seen=seen):
            seen.append((layer, activation if activation.requires_grad else activation.detach().requires_grad_()))
            return seen[-1][1]

        slopes = torch.autograd.grad(margin(pair, keep), [activation for _, activation in seen])
        for (layer, activation), slope in zip(seen, slopes, strict=True):
            expected[layer] += (activation * slope)[0].sum(dim=0).detach().cpu() / len(ended)
        with torch.no_grad():
            plain, without = margin(pair, lambda _, a: a), margin(pair, lambda n, a: a.masked_fill(on[n], 0.0))
        assert float(before.margin[number] - plain) == pytest.approx(0, abs=1e-7)
        assert float(ablated.margin[number] - without) == pytest.approx(0, abs=1e-7)
        assert abs(float(without - plain)) > 1e-4
    # Llama's norms are float32 in every model.
    assert torch.allclose(scores.values, expected, atol=1e-7)
    print(f"max |difference| of attributions: {float((scores.values - expected).abs().max()):.1e}")
