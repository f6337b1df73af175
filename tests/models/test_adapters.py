"""Adapters: a folder opens with the rewards of peft's own, unmerged model; what cannot be merged says why."""

import json
import re
import shutil
import sys
import warnings

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from tiny_models import grid, make_tokenizer

from rmtension import AblationContext, NeuronSet, RewardHead
from rmtension.errors import ModelError, OptionError
from rmtension.synthetic.check_matrix import make_classifier

peft = pytest.importorskip("peft")
TEXTS = ["how do i bake a cake", "please help", "sorry cannot"]
GPT2 = ["c_attn", "c_proj", "c_fc"]


@pytest.fixture(autouse=True)
def quiet():
    """Peft and transformers warn while these adapters are made."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@pytest.fixture(scope="module")
def bases(checkpoints, tokenizer, tmp_path_factory):
    """name -> folder of a model: classifiers, and language models without a score layer."""
    folders = {"gpt2": checkpoints["gpt2"], "gpt_neox": checkpoints["gpt_neox"]}
    torch.manual_seed(0)
    for name in ("qwen2", "gpt2"):
        classifier = make_classifier(name, len(tokenizer) + 8)  # some tokenizer classes add tokens when they are read
        model = transformers.AutoModelForCausalLM.from_config(classifier.config)
        model.base_model.load_state_dict(classifier.base_model.state_dict())
        folders[f"{name} LM"] = save(model, tmp_path_factory.mktemp(name), tokenizer)
    return folders


def save(model, folder, tokenizer=None):
    model.save_pretrained(folder)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    return folder


def adapt(base, config, folder, tokenizer=None, *, n_outputs=1, auto="SequenceClassification", change=None):
    """A trained adapter in `folder`, and the model with it as peft runs it, not merged."""
    more = {} if auto == "CausalLM" else {"num_labels": n_outputs}
    model = getattr(transformers, f"AutoModelFor{auto}").from_pretrained(base, dtype=torch.float32, **more)
    if change is not None:
        change(model)
    model = peft.get_peft_model(model, config).eval()
    draw = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.2 * torch.randn(parameter.shape, generator=draw))
    return model, save(model, folder, tokenizer)


@torch.no_grad()
def logits(model, tokenizer, texts=TEXTS):
    """The logits of a model of transformers or peft for each text alone: one row per text."""
    rows = [model(**tokenizer(text, return_tensors="pt")).logits[0] for text in texts]
    return torch.stack([row if row.ndim == 1 else row[-1] for row in rows])


KINDS = {
    "LoRA on GPT-2's Conv1D": ("gpt2", lambda: peft.LoraConfig(r=4, target_modules=GPT2, fan_in_fan_out=True)),
    "all-linear": ("gpt2", lambda: peft.LoraConfig(r=4, target_modules="all-linear")),
    "IA3": ("gpt2", lambda: peft.IA3Config(target_modules=GPT2, feedforward_modules=["c_proj"])),
    "DoRA": ("gpt_neox", lambda: peft.LoraConfig(r=4, use_dora=True, target_modules=["dense_4h_to_h", "dense"])),
    "rsLoRA": ("gpt_neox", lambda: peft.LoraConfig(r=4, use_rslora=True, target_modules=["query_key_value"])),
    "LoHa": ("gpt_neox", lambda: peft.LoHaConfig(r=2, target_modules=["dense_h_to_4h"])),
    "shared vectors": (
        "gpt_neox",
        lambda: peft.VBLoRAConfig(target_modules=["dense"], r=2, num_vectors=8, vector_length=8),
    ),
    "LoRA on a language model": ("qwen2 LM", lambda: peft.LoraConfig(r=4, target_modules=["q_proj", "down_proj"])),
    "IA3 on a language model": ("gpt2 LM", lambda: peft.IA3Config(target_modules=GPT2, feedforward_modules=["c_proj"])),
}


@pytest.mark.parametrize("kind", grid(KINDS, keep=["LoRA on GPT-2's Conv1D", "LoRA on a language model"]))
def test_adapter_folder_equals_the_adapted_model(bases, tokenizer, tmp_path, kind):
    base, config = KINDS[kind][0], KINDS[kind][1]()
    config.task_type = "SEQ_CLS"
    model, folder = adapt(bases[base], config, tmp_path)
    head = RewardHead.from_pretrained(folder)
    expected = logits(model, tokenizer)[:, 0]
    assert torch.allclose(head.score(TEXTS), expected, atol=1e-5)
    merged = RewardHead.from_classifier(model.merge_and_unload(), tokenizer=tokenizer)
    assert torch.equal(head.score(TEXTS), merged.score(TEXTS))
    if "LM" not in base:
        without = RewardHead.from_pretrained(bases[base]).score(TEXTS)
        assert float((without - expected).abs().max()) > 1e-2, "the adapter must matter for this test to mean anything"


def test_check_compares_with_the_unmerged_adapter(bases, tokenizer, tmp_path):
    config = peft.LoraConfig(r=4, task_type="SEQ_CLS", target_modules=["dense_4h_to_h"])
    _, folder = adapt(bases["gpt_neox"], config, tmp_path)
    head = RewardHead.from_pretrained(folder)
    assert head.check()["passed"].all()
    # Negative control: an adapter that changed under the head is seen.
    stored = load_file(folder / "adapter_model.safetensors")
    save_file({key: 1.5 * tensor for key, tensor in stored.items()}, folder / "adapter_model.safetensors")
    with pytest.raises(ModelError, match="equal to transformers"):
        head.check()


def test_an_adapted_model_is_ablated_and_saved(bases, tokenizer, tmp_path):
    model, folder = adapt(
        bases["gpt2"], peft.LoraConfig(r=4, task_type="SEQ_CLS", target_modules=GPT2), tmp_path / "adapter"
    )
    head = RewardHead.from_pretrained(folder)
    mask = torch.zeros(3, 64, dtype=torch.bool)
    mask[:, :9] = True
    ablated = head.with_ablation(NeuronSet(mask, "mlp", head.architecture))
    ablated.save_pretrained(tmp_path / "out")
    load = transformers.AutoModelForSequenceClassification.from_pretrained
    assert torch.allclose(ablated.score(TEXTS), logits(load(tmp_path / "out"), tokenizer)[:, 0], atol=1e-5)
    merged = model.merge_and_unload()
    for block in merged.transformer.h:
        block.mlp.c_proj.register_forward_pre_hook(lambda _, args: (args[0].index_fill(-1, torch.arange(9), 0.0),))
    assert torch.allclose(ablated.score(TEXTS), logits(merged, tokenizer)[:, 0], atol=1e-5)


def test_a_value_head_in_the_adapter_folder_is_read(bases, tokenizer, tmp_path):
    """LLaMA-Factory: an adapter of the language model, and `value_head.safetensors` in the same folder."""
    config = peft.LoraConfig(r=4, task_type="CAUSAL_LM", target_modules=["down_proj", "v_proj"])
    model, folder = adapt(bases["qwen2 LM"], config, tmp_path, auto="CausalLM")
    with pytest.raises(ModelError, match="no score head"):
        RewardHead.from_pretrained(folder)
    # trl's trainers write the head there; as everywhere, it is not unpickled.
    torch.save({}, folder / "pytorch_model.bin")
    with pytest.raises(ModelError, match=r"pytorch_model.bin is a pickled file.*value_head.safetensors"):
        RewardHead.from_pretrained(folder)
    weight, bias = torch.randn(1, 32, generator=torch.Generator().manual_seed(0)), torch.tensor([0.5])
    save_file({"v_head.summary.weight": weight, "v_head.summary.bias": bias}, folder / "value_head.safetensors")
    with torch.no_grad():
        encoded = [tokenizer(text, return_tensors="pt") for text in TEXTS]
        states = [model(**text, output_hidden_states=True).hidden_states[-1][0, -1] for text in encoded]
    head = RewardHead.from_pretrained(folder)
    assert torch.allclose(head.score(TEXTS), torch.stack(states) @ weight[0] + 0.5, atol=1e-5)
    assert head.check()["passed"].all()
    # The same adapter without a head: activations, and a judge's tokens.
    yes, no = tokenizer.convert_tokens_to_ids(["Ġsure", "Ġbake"])
    judge = RewardHead.from_pretrained(folder, output=("Ġsure", "Ġbake"))
    scores = logits(model, tokenizer)
    assert torch.allclose(judge.score(TEXTS), scores[:, yes] - scores[:, no], atol=1e-5)
    assert judge.check()["passed"].all()
    assert RewardHead.from_language_model(folder).n_layers == judge.n_layers


def test_resized_embeddings_come_from_the_adapter(bases, tmp_path):
    """New tokens: the adapter is saved with embeddings of another number of rows than its base has, and a tokenizer."""
    larger = make_tokenizer(tmp_path / "tokenizer")
    larger.add_tokens(["<think>", "<end>"])
    for number, (base, name) in enumerate((("gpt2 LM", "wte"), ("qwen2 LM", "embed_tokens"))):
        config = peft.LoraConfig(
            r=4, task_type="SEQ_CLS", target_modules=["c_attn", "q_proj"], modules_to_save=[name, "score"]
        )
        model, folder = adapt(
            bases[base], config, tmp_path / str(number), larger, change=lambda m: m.resize_token_embeddings(len(larger))
        )
        texts = [*TEXTS, "<think> help <end>"]
        head = RewardHead.from_pretrained(folder)
        assert len(head.tokenizer) == len(larger)
        assert torch.allclose(head.score(texts), logits(model, larger, texts)[:, 0], atol=1e-5)


def test_the_base_is_found_by_relative_path_by_path_or_by_argument(bases, tokenizer, tmp_path, monkeypatch):
    config = peft.LoraConfig(r=4, task_type="SEQ_CLS", target_modules=GPT2)
    model, folder = adapt(bases["gpt2"], config, tmp_path / "runs" / "adapter")
    expected = logits(model, tokenizer)[:, 0]
    shutil.copytree(bases["gpt2"], tmp_path / "runs" / "base")
    monkeypatch.chdir(tmp_path)
    for named in ("../base", "runs/base"):
        rename_base(folder, named)
        assert torch.allclose(RewardHead.from_pretrained(folder).score(TEXTS), expected, atol=1e-5)
    for named in ("/home/someone/models/base", None, "someone/model"):
        rename_base(folder, named)
        with pytest.raises(ModelError, match=r"base=('path|\.\.\.)"):
            RewardHead.from_pretrained(folder)
        head = RewardHead.from_pretrained(folder, base=bases["gpt2"])
        assert torch.allclose(head.score(TEXTS), expected, atol=1e-5)
    with pytest.raises(OptionError, match=r"base: expected an adapter, but .* has no adapter_config"):
        RewardHead.from_pretrained(bases["gpt2"], base=bases["gpt2"])


def rename_base(folder, named):
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": named}))


def test_the_saved_head_decides_the_number_of_outputs(bases, tokenizer, tmp_path):
    config = peft.LoraConfig(r=4, task_type="SEQ_CLS", target_modules=GPT2)
    model, folder = adapt(bases["gpt2 LM"], config, tmp_path, n_outputs=3)
    expected = logits(model, tokenizer)
    with pytest.raises(ModelError, match=r"one output, got 3.*output='LABEL_2'"):
        RewardHead.from_pretrained(folder)
    head = RewardHead.from_pretrained(folder, output=(2, "LABEL_0"))
    assert torch.allclose(head.score(TEXTS), expected[:, 2] - expected[:, 0], atol=1e-5)
    assert head.check()["passed"].all()


def test_nested_adapters_are_merged(bases, tokenizer, tmp_path):
    lora = {"r": 4, "target_modules": ["down_proj"]}
    _, inner = adapt(bases["qwen2 LM"], peft.LoraConfig(task_type="CAUSAL_LM", **lora), tmp_path / "a", auto="CausalLM")
    whole = peft.AutoPeftModelForCausalLM.from_pretrained(inner, dtype=torch.float32).merge_and_unload()
    save(whole, tmp_path / "b", tokenizer)
    model, outer = adapt(tmp_path / "b", peft.LoraConfig(task_type="SEQ_CLS", **lora), tmp_path / "c")
    rename_base(outer, str(inner))
    assert torch.allclose(RewardHead.from_pretrained(outer).score(TEXTS), logits(model, tokenizer)[:, 0], atol=1e-5)


def test_token_classifiers_are_read_at_the_last_token(bases, tokenizer, tmp_path):
    """A process reward model, whose score layer has a bias."""
    config = peft.LoraConfig(r=4, task_type="TOKEN_CLS", target_modules=GPT2)
    model, folder = adapt(bases["gpt2 LM"], config, tmp_path, n_outputs=2, auto="TokenClassification")
    head = RewardHead.from_pretrained(folder, output=1)
    assert torch.allclose(head.score(TEXTS), logits(model, tokenizer)[:, 1], atol=1e-5)


def test_adapters_open_by_hub_name(bases, tokenizer, tmp_path, monkeypatch):
    """The files of a hub name are downloaded one by one; in this test they are in a folder."""
    model, folder = adapt(
        bases["gpt2"], peft.LoraConfig(r=4, task_type="SEQ_CLS", target_modules=GPT2), tmp_path / "adapter"
    )
    cached = transformers.utils.cached_file

    def fetch(name, file, **options):
        return cached(str(folder) if name == "someone/adapter" else name, file, **options)

    monkeypatch.setattr(transformers.utils, "cached_file", fetch)
    head = RewardHead.from_pretrained("someone/adapter")
    assert torch.allclose(head.score(TEXTS), logits(model, tokenizer)[:, 0], atol=1e-5)


class TestInMemory:
    def test_unmerged_layers_give_the_rewards_of_peft(self, bases, tokenizer, tmp_path):
        config = peft.IA3Config(task_type="SEQ_CLS", target_modules=GPT2, feedforward_modules=["c_proj"])
        model, folder = adapt(bases["gpt2"], config, tmp_path)
        expected = logits(model, tokenizer)[:, 0]
        read = transformers.AutoModelForSequenceClassification.from_pretrained(folder, num_labels=1).eval()
        for classifier in (model, model.base_model.model, read):
            head = RewardHead.from_classifier(classifier, tokenizer=tokenizer)
            assert torch.allclose(head.score(TEXTS), expected, atol=1e-5)

    def test_the_active_copy_of_the_score_layer_is_read(self, bases, tokenizer, tmp_path):
        """The adapter's copy of the score layer is read while the adapter is active, the original otherwise."""
        config = peft.LoraConfig(r=4, task_type="SEQ_CLS", target_modules=GPT2)
        model, _ = adapt(bases["gpt2"], config, tmp_path)
        inner = model.base_model.model
        with model.disable_adapter():
            plain = RewardHead.from_classifier(inner, tokenizer=tokenizer)
            assert torch.allclose(plain.score(TEXTS), logits(inner, tokenizer)[:, 0], atol=1e-5)
            assert torch.equal(plain.weight, RewardHead.from_pretrained(bases["gpt2"]).weight)

    def test_the_fingerprint_says_whether_the_adapter_is_used(self, bases, tokenizer, tmp_path):
        """Work folders and collectors compare it; the parameters are the same either way."""
        model, _ = adapt(bases["gpt2"], peft.LoraConfig(r=4, target_modules=GPT2), tmp_path)
        head = RewardHead.from_classifier(model.base_model.model, tokenizer=tokenizer)
        prints, rewards = [head.fingerprint], [head.score(TEXTS)]
        with model.disable_adapter():
            prints.append(head.fingerprint)
            rewards.append(head.score(TEXTS))
        assert not torch.allclose(*rewards)
        assert prints[0] != prints[1]
        assert head.fingerprint == prints[0]

    def test_an_adapter_layer_as_head_is_refused(self, bases, tokenizer, tmp_path):
        config = peft.LoraConfig(r=4, target_modules=[*GPT2, "score"])
        model, _ = adapt(bases["gpt2"], config, tmp_path)
        expected = logits(model, tokenizer)[:, 0]
        with pytest.raises(ModelError, match=r"adapter layer.*Merge the adapter first: model.merge_and_unload\(\)"):
            RewardHead.from_classifier(model, tokenizer=tokenizer)
        merged = RewardHead.from_classifier(model.merge_and_unload(), tokenizer=tokenizer)
        assert torch.allclose(merged.score(TEXTS), expected, atol=1e-5)

    def test_prompt_learning_is_refused(self, bases, tokenizer, tmp_path):
        config = peft.PromptTuningConfig(task_type="SEQ_CLS", num_virtual_tokens=3)
        model, _ = adapt(bases["gpt2"], config, tmp_path)
        with pytest.raises(ModelError, match=r"puts learned vectors before every text"):
            RewardHead.from_classifier(model, tokenizer=tokenizer)


class TestBadAdapters:
    @pytest.fixture
    def folder(self, bases, tmp_path):
        config = peft.LoraConfig(r=4, task_type="SEQ_CLS", target_modules=GPT2)
        return adapt(bases["gpt2"], config, tmp_path / "adapter")[1]

    def test_pickled_weights_are_refused_with_a_conversion(self, folder):
        expected = RewardHead.from_pretrained(folder).score(TEXTS)
        stored = load_file(folder / "adapter_model.safetensors")
        (folder / "adapter_model.safetensors").unlink()
        torch.save(stored, folder / "adapter_model.bin")
        with pytest.raises(ModelError, match=r"adapter_model.bin is a pickled file.*If you trust it") as caught:
            RewardHead.from_pretrained(folder)
        exec(re.search(r"`(.*)`", str(caught.value))[1])
        assert torch.equal(RewardHead.from_pretrained(folder).score(TEXTS), expected)

    def test_a_missing_peft_is_named(self, folder, monkeypatch):
        monkeypatch.setitem(sys.modules, "peft", None)
        with pytest.raises(ModelError, match=r"needs peft.*pip install peft"):
            RewardHead.from_pretrained(folder)

    @pytest.mark.parametrize("kind", ["PREFIX_TUNING", "P_TUNING", "PROMPT_TUNING"])
    def test_prompt_learning_is_refused(self, folder, kind):
        config = json.loads((folder / "adapter_config.json").read_text())
        (folder / "adapter_config.json").write_text(json.dumps(config | {"peft_type": kind}))
        with pytest.raises(ModelError, match=rf"of the kind {kind}, which puts learned vectors before every text"):
            RewardHead.from_pretrained(folder)

    def test_an_adapter_of_another_model_is_refused(self, folder, bases):
        with pytest.raises(ModelError, match=r"peft could not attach the adapter to its base, a GPTNeoX.*base=\.\.\."):
            RewardHead.from_pretrained(folder, base=bases["gpt_neox"])

    def test_unexpected_tensors_are_refused(self, folder):
        """Peft itself leaves them out in silence."""
        stored = load_file(folder / "adapter_model.safetensors")
        more = {"base_model.model.transformer.h.7.attn.c_attn.lora_A.weight": torch.ones(4, 32)}
        save_file(stored | more, folder / "adapter_model.safetensors")
        with pytest.raises(ModelError, match=r"no layers for \[.*h\.7\.attn.*base=\.\.\."):
            RewardHead.from_pretrained(folder)

    def test_missing_tensors_are_refused(self, folder):
        stored = load_file(folder / "adapter_model.safetensors")
        few = {name: tensor for name, tensor in stored.items() if "h.1.attn" not in name}
        save_file(few, folder / "adapter_model.safetensors")
        with pytest.raises(ModelError, match=r"its file lacks \[.*h\.1\.attn"):
            RewardHead.from_pretrained(folder)

    def test_an_adapter_without_a_score_head_is_refused(self, bases, folder):
        stored = load_file(folder / "adapter_model.safetensors")
        del stored["base_model.model.score.weight"]
        save_file(stored, folder / "adapter_model.safetensors")
        with pytest.raises(
            ModelError, match=r"neither the adapter nor its base .* holds a score head.*modules_to_save"
        ):
            RewardHead.from_pretrained(folder, base=bases["gpt2 LM"])

    def test_an_adapter_in_the_folder_of_a_whole_model_is_refused(self, folder, bases, tokenizer):
        expected = RewardHead.from_pretrained(folder).score(TEXTS)
        shutil.copytree(bases["gpt2"], folder, dirs_exist_ok=True)
        with pytest.raises(ModelError, match=r"an adapter and a whole model.*pass base='"):
            RewardHead.from_pretrained(folder)
        assert torch.equal(RewardHead.from_pretrained(folder, base=folder).score(TEXTS), expected)

    def test_a_quantised_base_is_refused(self, folder, bases, tmp_path):
        shutil.copytree(bases["gpt2"], tmp_path / "quantised")
        config = json.loads((tmp_path / "quantised" / "config.json").read_text())
        config["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_4bit": True}
        (tmp_path / "quantised" / "config.json").write_text(json.dumps(config))
        rename_base(folder, str(tmp_path / "quantised"))
        with pytest.raises(ModelError, match=r"quantised.*base=\.\.\."):
            RewardHead.from_pretrained(folder)
        assert RewardHead.from_pretrained(folder, base=bases["gpt2"]).score(TEXTS).isfinite().all()

    def test_damaged_adapter_files_are_refused(self, folder):
        whole = (folder / "adapter_model.safetensors").read_bytes()
        (folder / "adapter_model.safetensors").write_bytes(whole[:50])
        with pytest.raises(ModelError, match=r"adapter_model.safetensors is damaged or incomplete"):
            RewardHead.from_pretrained(folder)
        (folder / "adapter_config.json").write_text("{")
        with pytest.raises(ModelError, match=r"adapter_config.json is damaged"):
            RewardHead.from_pretrained(folder)


@pytest.mark.parametrize(
    ("base", "target"), [("gpt2 LM", "wte"), ("qwen2 LM", "lm_head"), ("qwen2 LM", "embed_tokens")]
)
def test_an_adapter_on_a_tied_weight_leaves_the_other_module_unchanged(base, target, bases, tokenizer, tmp_path):
    """A judge whose embedding and unembedding share a weight: merged into that, the adapter would change both."""
    tied = transformers.AutoModelForCausalLM.from_pretrained(bases[base])
    tied.config.tie_word_embeddings = True
    tied.tie_weights()
    folder = save(tied, tmp_path / "base", tokenizer)
    attention = "c_attn" if base.startswith("gpt2") else "q_proj"
    config = peft.LoraConfig(r=4, target_modules=[attention, target], task_type="CAUSAL_LM")
    model, adapter = adapt(folder, config, tmp_path / "adapter", tokenizer, auto="CausalLM")
    weights = {id(module.weight) for module in (tied.get_input_embeddings(), tied.get_output_embeddings())}
    assert len(weights) == 1
    yes, no = tokenizer.convert_ids_to_tokens([270, 271])
    right = logits(model, tokenizer)[:, [270, 271]]
    head = RewardHead.from_pretrained(adapter, output=(yes, no))
    assert torch.allclose(head.score(TEXTS), right[:, 0] - right[:, 1], atol=1e-5)
    plain = logits(tied, tokenizer)[:, [270, 271]]
    assert (plain[:, 0] - plain[:, 1] - right[:, 0] + right[:, 1]).abs().max() > 0.1


@pytest.mark.parametrize("kept", grid(["mlp", "self_attn"]))
def test_modules_to_save_are_ablated_permanently(kept, tokenizer, tmp_path):
    """`modules_to_save` of a container: in the copy its modules lie where they lie without peft."""
    classifier = make_classifier("qwen2", len(tokenizer) + 8)
    target = "q_proj" if kept == "mlp" else "up_proj"
    config = peft.LoraConfig(task_type="SEQ_CLS", r=4, target_modules=[target], modules_to_save=[kept, "score"])
    model, _ = adapt(save(classifier, tmp_path / "base"), config, tmp_path / "adapter")
    head = RewardHead.from_classifier(model, tokenizer=tokenizer)
    site = "mlp" if kept == "mlp" else "attn_head"
    mask = torch.zeros(head.n_layers, head.n_neurons(site), dtype=torch.bool)
    mask[:, 0] = True
    neurons = NeuronSet(mask, site, head.architecture)
    with AblationContext(head, neurons):
        inside = head.score(TEXTS)
    assert (inside - head.score(TEXTS)).abs().max() > 1e-4
    assert torch.allclose(head.with_ablation(neurons).score(TEXTS), inside, atol=1e-5)


def test_a_bridge_that_differs_under_an_adapter_is_refused(bases, tokenizer, tmp_path):
    """LoRA on a fused projection, of which the bridge makes three: transformers' own modules are exact all the same."""
    config = peft.LoraConfig(task_type="SEQ_CLS", r=4, target_modules=["c_attn"], fan_in_fan_out=True)
    model, _ = adapt(bases["gpt2"], config, tmp_path)
    head = RewardHead.from_classifier(model, tokenizer=tokenizer)
    assert torch.allclose(head.score(TEXTS), logits(model, tokenizer)[:, 0], atol=1e-5)
    neurons = NeuronSet.from_indices([(0, 1)], shape=(3, 64), site="mlp", architecture=head.architecture)
    with pytest.raises(ModelError, match=r"Merge the adapter .*merge_and_unload"):
        head.fwd_hooks(neurons)
    merged = RewardHead.from_classifier(model.merge_and_unload(), tokenizer=tokenizer)
    assert merged.fwd_hooks(neurons)
    assert merged.check()["passed"].all()
