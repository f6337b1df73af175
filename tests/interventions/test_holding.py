"""With the callback, ablated neurons stay ablated during training; without it, they come back."""

from types import SimpleNamespace

import pytest
import torch
from tiny_models import make_pairs

from rmtension import AblationContext, ActivationCollector, Mean, NeuronSet, RewardHead, Zero
from rmtension.errors import ModelError, OptionError, ProvenanceError
from rmtension.models._classifiers import build_classifier
from rmtension.training._hold_ablated import HoldAblated

PAIRS = make_pairs(8)
TEXTS = [pair.text("chosen") for pair in PAIRS]


def some_neurons(head, site, indices=((0, 1), (2, 0))):
    mask = torch.zeros(head.n_layers, head.n_neurons(site), dtype=torch.bool)
    for index in indices:
        mask[index] = True
    return NeuronSet(mask, site, head.architecture)


def train(model, tokenizer, folder, callbacks):
    """Three steps of AdamW with weight decay; the trainer's model."""
    from datasets import Dataset
    from trl import RewardConfig, RewardTrainer

    rows = Dataset.from_list([{"prompt": p.prompt, "chosen": p.chosen, "rejected": p.rejected} for p in PAIRS])
    quiet = {"report_to": "none", "disable_tqdm": True, "logging_strategy": "no", "save_strategy": "no"}
    options = {"max_steps": 3, "per_device_train_batch_size": 4, "learning_rate": 1e-2, "weight_decay": 0.1}
    options |= {"use_cpu": True, "bf16": False, "activation_checkpointing": False, "max_grad_norm": 0.5}
    trainer = RewardTrainer(
        model=str(model),
        args=RewardConfig(output_dir=str(folder), **options, **quiet),
        train_dataset=rows,
        processing_class=tokenizer,
        callbacks=callbacks,
    )
    trainer.train()
    return trainer.model


def columns(model, head, neurons):
    """The weights with which the neurons write to the residual stream of `model`."""
    weights = []
    for layer, channels in AblationContext(head, neurons).columns.items():
        name = head.body.projection_names[neurons.site, layer]
        weight = model.base_model.get_submodule(name).weight
        weights.append(weight[channels] if "gpt2" in head.architecture else weight[:, channels])
    return torch.cat([weight.flatten() for weight in weights])


@pytest.mark.parametrize(
    ("family", "site", "kind"),
    [pytest.param("gpt2", "attn_head", Zero, marks=pytest.mark.grid), ("llama", "mlp", Mean)],
)
def test_held_neurons_write_nothing_after_training_and_others_come_back(family, site, kind, checkpoints, tmp_path):
    head = RewardHead.from_pretrained(checkpoints[family])
    neurons = some_neurons(head, site)
    replacement = Mean(ActivationCollector(head, site=site).collect(PAIRS)) if kind is Mean else Zero()
    head.with_ablation(neurons, replacement).save_pretrained(tmp_path / "start")
    start = RewardHead.from_pretrained(tmp_path / "start")

    def effect(model):
        live = RewardHead.from_classifier(model, tokenizer=head.tokenizer)
        rewards = live.score(TEXTS)
        with AblationContext(live, neurons):
            return (live.score(TEXTS) - rewards).abs().max(), rewards

    free = train(tmp_path / "start", head.tokenizer, tmp_path / "free", [])
    assert (columns(free, head, neurons) != 0).all(), "an optimiser regrows all of them"
    assert effect(free)[0] > 1e-3
    held = train(tmp_path / "start", head.tokenizer, tmp_path / "held", [HoldAblated(neurons)])
    assert (columns(held, head, neurons) == 0).all()
    gone, rewards = effect(held)
    assert gone == 0
    assert not torch.allclose(rewards, start.score(TEXTS), atol=1e-2), "the rest was trained"
    assert not any(parameter._backward_hooks for parameter in held.parameters())
    if kind is Mean:
        name = f"{head.body.projection_names[site, 0]}.bias"
        before = start.checkpoint.base.get_parameter(name)
        assert not torch.equal(held.base_model.get_parameter(name), before), "what the means write is trained"
    held.save_pretrained(tmp_path / "saved")
    head.tokenizer.save_pretrained(tmp_path / "saved")
    again = RewardHead.from_pretrained(tmp_path / "saved")
    assert (columns(SimpleNamespace(base_model=again.checkpoint.base), head, neurons) == 0).all()


def begin(callback, model, tokenizer):
    callback.on_train_begin(None, None, None, model=model, processing_class=tokenizer)


def test_gradients_are_those_of_a_model_without_the_neurons(checkpoints, tokenizer):
    """No gradient in the columns, all others untouched; a step that moves the columns is undone."""
    head = RewardHead.from_pretrained(checkpoints["gpt2"])
    sets = some_neurons(head, "mlp"), some_neurons(head, "attn_head")
    model = build_classifier(head.with_ablation(sets[0]).with_ablation(sets[1])).requires_grad_(True)
    ids = torch.tensor([tokenizer(TEXTS[0])["input_ids"]])

    def gradients():
        model.zero_grad()
        model(ids).logits.sum().backward()
        return {name: value.grad.clone() for name, value in model.named_parameters() if value.grad is not None}

    before = gradients()
    callback = HoldAblated(*sets)
    begin(callback, model, tokenizer)
    inside = gradients()
    changed = {name for name in before if not torch.equal(before[name], inside[name])}
    assert changed == {f"transformer.h.{layer}.{part}.c_proj.weight" for layer in (0, 2) for part in ("attn", "mlp")}
    weight = model.transformer.h[0].mlp.c_proj.weight
    assert (inside["transformer.h.0.mlp.c_proj.weight"][1] == 0).all()
    with torch.no_grad():
        weight += 1
    kept = weight[2].clone()
    callback.on_optimizer_step()
    assert (weight[1] == 0).all()
    assert torch.equal(weight[2], kept)
    callback.on_train_end()
    assert not any(parameter._backward_hooks for parameter in model.parameters())


def test_refused_models_name_the_reason(checkpoints, tokenizer):
    head = RewardHead.from_pretrained(checkpoints["llama"])
    neurons = some_neurons(head, "mlp")
    with pytest.raises(OptionError, match="neurons: expected one NeuronSet or several"):
        HoldAblated()
    with pytest.raises(OptionError, match=r"not 0, so HoldAblated cannot hold them.*with_ablation\(neurons\) wrote"):
        begin(HoldAblated(neurons), build_classifier(head), tokenizer)
    other = RewardHead.from_pretrained(checkpoints["gpt2"])
    with pytest.raises(ProvenanceError):
        begin(HoldAblated(neurons), build_classifier(other), tokenizer)
    # Weight norm: the matrix is made anew from parameters of other names at every pass.
    model = build_classifier(head.with_ablation(neurons))
    torch.nn.utils.parametrizations.weight_norm(model.model.layers[2].mlp.down_proj)
    with pytest.raises(ModelError, match=r"not through one matrix of weights. Merge adapters"):
        begin(HoldAblated(neurons), model, tokenizer)
    # The advice: a checkpoint with the ablation.
    begin(HoldAblated(neurons), build_classifier(head.with_ablation(neurons)), tokenizer)
