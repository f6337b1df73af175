"""Export: the ablated weights compute what an ablation context computes, and transformers gives the same scores."""

import threading

import pytest
import torch
import transformers
from reference import transformers_rewards
from safetensors.torch import load_file
from tiny_models import PAD, grid, make_pairs, save_classifier

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
from rmtension.errors import ModelError, OptionError, RMTensionWarning, StorageError
from rmtension.synthetic.check_matrix import make_classifier

CASES = {
    "gpt2": {},
    "llama": {},
    "llama with biases": {"mlp_bias": True, "attention_bias": True},
    "gpt_neox": {},
    "gemma2": {},
    "olmo2": {},
    "opt": {},
    "qwen3": {},
}


@pytest.fixture
def folder(request, tmp_path, tokenizer):
    family = request.param.partition(" ")[0]
    make_classifier(family, len(tokenizer) + 8, **CASES[request.param]).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    return tmp_path


def random_set(head, site, seed=0):
    shape = (head.n_layers, head.n_neurons(site))
    mask = torch.rand(shape, generator=torch.Generator().manual_seed(seed)) < 0.4
    # One layer without any: folding must pass over it.
    mask[1] = False
    return NeuronSet(mask, site, head.architecture)


def texts_of(pairs):
    return [pair.text(side) for pair in pairs for side in ("chosen", "rejected")]


@pytest.mark.parametrize("site", grid(["mlp", "attn_head"]))
@pytest.mark.parametrize("folder", grid(CASES), indirect=True)
def test_ablated_weights_equal_the_context(folder, site, tmp_path_factory):
    head = RewardHead.from_pretrained(folder)
    pairs = make_pairs(6)
    texts = texts_of(pairs)
    before = head.score(texts)
    fingerprint = head.fingerprint
    neurons = random_set(head, site)
    means = ActivationCollector(head, site=site).collect(pairs)
    for replacement in (Zero(), Scale(0.5), Mean(means)):
        with AblationContext(head, neurons, replacement):
            expected = head.score(texts)
        assert not torch.allclose(expected, before, atol=1e-3), "the ablation must do something"
        config = head.checkpoint.base.config
        has_bias = head.body.native.get_submodule(head.body.projection_names[site, 0]).bias is not None
        flag = {"mlp": "mlp_bias", "attn_head": "attention_bias"}[site]
        if isinstance(replacement, Mean) and not has_bias and not hasattr(config, flag):
            with pytest.raises(ModelError, match=r"have no bias, and its config cannot add one"):
                head.with_ablation(neurons, replacement)
            continue
        pruned = head.with_ablation(neurons, replacement)
        assert torch.allclose(pruned.score(texts), expected, atol=1e-5)
        out = tmp_path_factory.mktemp("out")
        pruned.save_pretrained(out)
        assert torch.allclose(transformers_rewards(out, texts), expected, atol=1e-5)
        reopened = RewardHead.from_pretrained(out)
        assert torch.allclose(reopened.score(texts), expected, atol=1e-5)
        assert pruned.check()["passed"].all()
    assert torch.equal(head.score(texts), before)
    assert head.fingerprint == fingerprint, "the model is a copy; the original stays as it was"


def test_ablated_columns_are_exactly_zero_in_the_file(checkpoints, tmp_path):
    """Folding puts exact zeros into the columns of the ablated neurons, and touches no other tensor."""
    head = RewardHead.from_pretrained(checkpoints["gpt2"])
    neurons = random_set(head, "mlp")
    head.with_ablation(neurons).save_pretrained(tmp_path)
    old, new = (load_file(path / "model.safetensors") for path in (checkpoints["gpt2"], tmp_path))
    assert set(old) == set(new)
    changed = {name for name in old if not torch.equal(old[name], new[name])}
    assert changed == {f"transformer.h.{layer}.mlp.c_proj.weight" for layer in (0, 2)}
    for layer in (0, 2):
        weight = new[f"transformer.h.{layer}.mlp.c_proj.weight"]
        assert (weight == 0).all(dim=1).equal(neurons.mask[layer])


def test_round_trip_through_trl(tmp_path, tokenizer):
    """One step of TRL's RewardTrainer, then a head, a permanent ablation, and back to transformers and to TRL."""
    from datasets import Dataset
    from trl import RewardConfig, RewardTrainer

    start = save_classifier(tmp_path / "start", "llama", tokenizer)
    pairs = make_pairs(8)
    rows = Dataset.from_list(
        [{"prompt": p.prompt, "chosen": " " + p.chosen, "rejected": " " + p.rejected} for p in pairs]
    )

    def trainer(model, folder):
        config = RewardConfig(
            output_dir=str(folder),
            max_steps=1,
            per_device_train_batch_size=4,
            report_to="none",
            use_cpu=True,
            learning_rate=1e-2,
            disable_tqdm=True,
            activation_checkpointing=False,
            bf16=False,
            logging_strategy="no",
        )
        return RewardTrainer(model=str(model), args=config, train_dataset=rows, processing_class=tokenizer)

    first = trainer(start, tmp_path / "run")
    first.train()
    first.save_model(tmp_path / "trained")
    texts = texts_of(pairs)
    live = RewardHead.from_classifier(first.model, tokenizer=tokenizer)
    head = RewardHead.from_pretrained(tmp_path / "trained")
    assert torch.allclose(live.score(texts), head.score(texts), atol=1e-5)
    assert not torch.allclose(transformers_rewards(start, texts), head.score(texts), atol=1e-3), "a step was made"
    neurons = random_set(head, "mlp")
    with AblationContext(head, neurons):
        inside = head.score(texts)
    folded = head.with_ablation(neurons)
    folded.save_pretrained(tmp_path / "ablated")
    reloaded = transformers_rewards(tmp_path / "ablated", texts)
    worst = max(float((folded.score(texts) - inside).abs().max()), float((reloaded - inside).abs().max()))
    print(f"context, fold and reload: max |difference| {worst:.1e}")
    assert worst <= 1e-5
    assert not torch.allclose(inside, head.score(texts), atol=1e-3)
    trainer(tmp_path / "ablated", tmp_path / "again").train()
    # RewardBench's runner scores with this pipeline.
    pipeline = transformers.pipeline("text-classification", model=str(tmp_path / "ablated"), device="cpu")
    scored = pipeline(texts, function_to_apply="none", batch_size=4)
    assert torch.allclose(torch.tensor([row["score"] for row in scored]), inside, atol=1e-5)


def test_heads_of_other_kinds_become_classifiers(tmp_path, tokenizer, ragged_texts):
    from tiny_models import make_config

    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(make_config("gpt2", len(tokenizer)))
    model.save_pretrained(tmp_path / "lm")
    tokenizer.save_pretrained(tmp_path / "lm")
    weight = torch.randn(32)
    plain = RewardHead.from_pretrained(tmp_path / "lm", head=weight)
    with pytest.warns(RMTensionWarning, match=r"no pad token.*one text at a time"):
        plain.save_pretrained(tmp_path / "classifier")
    # Texts that end in what the tokenizer pads with: the token that is read must not move.
    ragged_texts = [*ragged_texts, *(text + PAD for text in ragged_texts[:4])]
    expected = plain.score(ragged_texts)
    assert not torch.allclose(expected[-4:], expected[:4], atol=1e-3)
    assert torch.allclose(transformers_rewards(tmp_path / "classifier", ragged_texts), expected, atol=1e-5)
    biased = RewardHead.from_pretrained(tmp_path / "lm", head=(weight, 1.5))
    biased.pad_token_id = 0
    ragged_texts = ragged_texts[:-4]
    expected = expected[:-4]
    with pytest.warns(RMTensionWarning, match=r"bias of 1.5.*margins are the same"):
        biased.save_pretrained(tmp_path / "biased")
    assert torch.allclose(transformers_rewards(tmp_path / "biased", ragged_texts), expected, atol=1e-5)
    with pytest.warns(RMTensionWarning, match=r"score.bias of 1.5"):
        again = RewardHead.from_pretrained(tmp_path / "biased")
    assert torch.allclose(again.score(ragged_texts), expected + 1.5, atol=1e-5)


class HookThatCannotBeCopied:
    def __init__(self):
        self.lock = threading.Lock()

    def __call__(self, *_):
        return None


def test_the_copy_has_the_current_head_weight(checkpoints, tokenizer, ragged_texts):
    """Changes to the head's weight come along; a context that is entered, and the user's own hooks, do not."""
    head = RewardHead.from_pretrained(checkpoints["llama"])
    neurons, others = random_set(head, "mlp"), random_set(head, "mlp", seed=1)
    expected = head.with_ablation(neurons).score(ragged_texts)
    handle = head.body.native.register_forward_hook(HookThatCannotBeCopied())
    with AblationContext(head, others):
        inside = head.with_ablation(neurons)
    assert torch.equal(inside.score(ragged_texts), expected)
    assert not any(module._forward_pre_hooks for module in inside.body.native.modules())
    assert len(head.body.native._forward_hooks) == 1
    handle.remove()
    with torch.no_grad():
        head.weight.mul_(2)
    assert torch.allclose(head.with_ablation(neurons).score(ragged_texts), 2 * expected, atol=1e-5)


def test_export_leaves_random_numbers_alone(checkpoints, tokenizer, tmp_path):
    load = transformers.AutoModelForSequenceClassification.from_pretrained
    classifier = load(checkpoints["gpt2"], dtype=torch.float32)
    state = torch.random.get_rng_state()
    head = RewardHead.from_classifier(classifier, tokenizer=tokenizer)
    head.check()
    head.save_pretrained(tmp_path)
    head.with_ablation(random_set(head, "mlp"))
    assert torch.equal(torch.random.get_rng_state(), state)


def test_a_folder_with_an_adapter_is_left_alone(head, tmp_path):
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(ModelError, match=r"adapter_config\.json.*another folder"):
        head.save_pretrained(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["adapter_config.json"]
    head.save_pretrained(tmp_path / "another")
    assert RewardHead.from_pretrained(tmp_path / "another").fingerprint == head.fingerprint


def test_refused_exports_name_the_reason(head, pairs, tmp_path):
    neurons = random_set(head, "mlp")
    sample = ActivationCollector(head).sample(pairs, n=4)
    with pytest.raises(OptionError, match=r"replacement: expected Zero.*got Resample.*Use AblationContext"):
        head.with_ablation(neurons, Resample(sample))
    with pytest.raises(OptionError, match=r"replacement: OtherResponse\(\) needs both texts of a pair"):
        head.with_ablation(neurons, OtherResponse())
    bare = RewardHead(head.model, weight=head.weight)
    for call in (lambda: bare.save_pretrained(tmp_path), lambda: bare.with_ablation(neurons)):
        with pytest.raises(ModelError, match=r"weights that TransformerLens converted.*from_pretrained"):
            call()
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="could not be written"):
        head.save_pretrained(tmp_path / "file")
