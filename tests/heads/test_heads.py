"""Heads: in every form of checkpoints and users, the reward is transformers' hidden state times the weight."""

import json

import numpy as np
import pytest
import torch
import transformers
from reference import DEVICE
from rewritten_files import with_tensors
from safetensors.torch import load_file
from tiny_models import grid, make_config, make_tokenizer, save_classifier

from rmtension import RewardHead
from rmtension.bodies._norms import read_norm
from rmtension.errors import DataError, ModelError, OptionError, RMTensionWarning
from rmtension.heads._heads import read_head
from rmtension.heads._outputs import choose_outputs


@pytest.fixture(scope="module")
def language_model(tmp_path_factory, tokenizer):
    folder = tmp_path_factory.mktemp("lm")
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(make_config("llama", len(tokenizer))).eval()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


REMOTE = """
import torch, transformers
from transformers.models.llama import modeling_llama as llama

class TheirConfig(transformers.LlamaConfig):
    model_type = "theirs"

class LlamaModel(llama.LlamaModel):
    config_class = TheirConfig

class LlamaForCausalLM(llama.LlamaForCausalLM):
    config_class = TheirConfig

class LlamaForSequenceClassification(llama.LlamaForSequenceClassification):
    config_class = TheirConfig

    def __init__(self, config):
        llama.LlamaPreTrainedModel.__init__(self, config)
        self.num_labels = config.num_labels
        self.model = LlamaModel(config)
        self.score = torch.nn.Linear(config.hidden_size, 1, bias=False)
        self.post_init()
"""


def hidden_rewards(folder, texts, weight, bias):
    """The base model's own last hidden state at the last token of each text, times the weight."""
    base = transformers.AutoModel.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    with torch.no_grad():
        states = [base(**tokenizer(text, return_tensors="pt")).last_hidden_state[0, -1] for text in texts]
    return torch.stack(states) @ weight + bias


@pytest.mark.parametrize("n_shards", grid([1, 3]))
@pytest.mark.parametrize(
    "name", grid(["v_head.summary", "v_head", "value_head", "score"], keep=["v_head.summary", "score"])
)
def test_the_value_head_of_a_language_model_is_read(language_model, tmp_path, ragged_texts, name, n_shards):
    """trl saves `v_head.summary.weight` [1, d_model] and its bias in the files of the language model."""
    weight, bias = torch.randn(1, 32, generator=torch.Generator().manual_seed(0)), torch.tensor([0.7])
    folder = with_tensors(language_model, tmp_path, {f"{name}.weight": weight, f"{name}.bias": bias}, n_shards=n_shards)
    head = RewardHead.from_pretrained(folder)
    texts = ragged_texts[:16]
    expected = hidden_rewards(folder, texts, weight[0], 0.7)
    assert torch.allclose(head.score(texts), expected, atol=1e-5)
    assert not torch.allclose(hidden_rewards(folder, texts, weight[0], 0.0), expected, atol=1e-2)
    assert head.check()["passed"].all()


@pytest.mark.parametrize("wrong", ["../elsewhere/model.safetensors", "/etc/passwd", "sub/model.safetensors", 3, None])
def test_an_index_with_a_file_outside_the_checkpoint_is_refused(language_model, tmp_path, wrong):
    """Also where there is a file: nothing outside the checkpoint is read for it."""
    head = {"score.weight": torch.ones(1, 32)}
    elsewhere = with_tensors(language_model, tmp_path / "elsewhere", head)
    folder = with_tensors(language_model, tmp_path / "model", head, n_shards=2)
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"]["score.weight"] = wrong
    path.write_text(json.dumps(index))
    assert (elsewhere / "model.safetensors").exists()
    with pytest.raises(ModelError, match=r"its index names a file outside the checkpoint|damaged or incomplete"):
        RewardHead.from_pretrained(folder)


def test_every_form_of_a_passed_head_gives_the_same_rewards(language_model, ragged_texts):
    generator = torch.Generator().manual_seed(1)
    weight, bias = torch.randn(32, generator=generator), 0.25
    linear = torch.nn.Linear(32, 1)
    linear.weight.data, linear.bias.data = weight[None].clone(), torch.tensor([bias])
    expected = hidden_rewards(language_model, ragged_texts[:8], weight, bias)
    given = [
        (weight, bias),
        (weight[None], torch.tensor([bias])),
        linear,
        linear.state_dict(),
        {
            "model.norm.weight": torch.ones(32),
            "reward_head.weight": weight[None],
            "reward_head.bias": torch.tensor(bias),
        },
    ]
    for head_given in given:
        head = RewardHead.from_pretrained(language_model, head=head_given)
        assert torch.allclose(head.score(ragged_texts[:8]), expected, atol=1e-5)
    # Replacing the head of a classifier, and the same through the constructor.
    live = RewardHead(head.model, (weight, 0.25), tokenizer=head.tokenizer)
    assert torch.allclose(live.score(ragged_texts[:8]), expected, atol=1e-5)
    linear.weight.data.zero_()
    assert float(head.weight.abs().sum()) > 0, "the head is a copy"


def test_a_passed_head_replaces_two_labels(tmp_path, tokenizer, ragged_texts):
    save_classifier(tmp_path, "gpt2", tokenizer, num_labels=2)
    row = load_file(tmp_path / "model.safetensors")["score.weight"][1]
    head = RewardHead.from_pretrained(tmp_path, head=row)
    classifier = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path, dtype=torch.float32).eval()
    with torch.no_grad():
        expected = [classifier(**tokenizer(t, return_tensors="pt")).logits[0, 1] for t in ragged_texts[:8]]
    assert torch.allclose(head.score(ragged_texts[:8]), torch.stack(expected), atol=1e-5)


def test_a_score_bias_that_transformers_ignores_is_added(checkpoints, tmp_path, ragged_texts):
    folder = with_tensors(checkpoints["llama"], tmp_path, {"score.bias": torch.tensor([2.5])})
    with pytest.warns(RMTensionWarning, match=r"score.bias of 2.5.*margins are equal"):
        head = RewardHead.from_pretrained(folder)
    without = RewardHead.from_pretrained(checkpoints["llama"])
    assert torch.allclose(head.score(ragged_texts), without.score(ragged_texts) + 2.5, atol=1e-5)
    assert head.check()["passed"].all()


def test_a_classifier_in_memory_scores_as_its_folder(checkpoints, tokenizer, ragged_texts):
    classifier = transformers.AutoModelForSequenceClassification.from_pretrained(
        checkpoints["llama"], dtype=torch.float32
    )
    classifier.train().to(DEVICE)
    before = [(p.data_ptr(), p._version, p.requires_grad) for p in classifier.parameters()]
    modes = [module.training for module in classifier.modules()]
    head = RewardHead.from_classifier(classifier, tokenizer=tokenizer)
    expected = RewardHead.from_pretrained(checkpoints["llama"]).score(ragged_texts)
    assert torch.equal(head.score(ragged_texts), expected)
    assert head.check()["passed"].all()
    assert [(p.data_ptr(), p._version, p.requires_grad) for p in classifier.parameters()] == before
    assert [module.training for module in classifier.modules()] == modes
    # The body is shared: what a trainer changes, the head scores.
    with torch.no_grad():
        classifier.model.layers[1].mlp.down_proj.weight.mul_(2)
    assert not torch.allclose(head.score(ragged_texts), expected, atol=1e-4)
    with pytest.raises(ModelError, match=r"ForSequenceClassification of transformers, got Linear"):
        RewardHead.from_classifier(torch.nn.Linear(2, 1))


def test_a_pad_token_outside_the_vocabulary_is_refused(tmp_path, tokenizer, ragged_texts):
    """Old Llama configs say -1: it is never met, and it is never given to the embedding."""
    folder = save_classifier(tmp_path, "gpt2", tokenizer, pad_token_id=-1)
    head = RewardHead.from_pretrained(folder)
    assert torch.allclose(head.score(ragged_texts), torch.cat([head.score([t]) for t in ragged_texts]), atol=1e-5)


def test_without_a_pad_token_the_last_token_is_read(tmp_path, tokenizer):
    """Then transformers reads the last token, one text at a time, and so does the head."""
    folder = save_classifier(tmp_path, "gpt2", tokenizer, pad_token_id=None)
    classifier = transformers.AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32).eval()
    head = RewardHead.from_classifier(classifier)
    ids = torch.tensor([[5, 9, 1, 0]])
    with torch.no_grad():
        expected = classifier(input_ids=ids).logits[:, 0]
    assert torch.allclose(head.score_tokens(ids), expected, atol=1e-6)
    assert head.check()["passed"].all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_keeps_the_heads_product_in_float32(checkpoints, ragged_texts, dtype):
    """The last hidden state is transformers' own in half precision; from there on everything is float32."""
    head = RewardHead.from_pretrained(checkpoints["gpt2"], dtype=dtype)
    texts = ragged_texts[:8]
    base = transformers.AutoModel.from_pretrained(checkpoints["gpt2"], dtype=dtype).eval().to(head.device)
    with torch.no_grad():
        encoded = [head.tokenizer(text, return_tensors="pt").to(head.device) for text in texts]
        states = [base(**text).last_hidden_state[0, -1].float() for text in encoded]
    rewards = torch.cat([head.score([text]) for text in texts])
    assert rewards.dtype == torch.float32
    assert torch.allclose(rewards, (torch.stack(states) @ head.weight.float()).cpu(), atol=1e-6)


def test_loading_changes_no_global_setting(checkpoints):
    def switches():
        return (
            torch.get_default_dtype(),
            torch.is_grad_enabled(),
            torch.backends.cuda.matmul.allow_tf32,
            torch.get_float32_matmul_precision(),
            torch.are_deterministic_algorithms_enabled(),
            torch.get_num_threads(),
        )

    before = switches()
    state = torch.random.get_rng_state()
    RewardHead.from_pretrained(checkpoints["gpt_neox"], dtype=torch.bfloat16).score(["help"])
    assert switches() == before
    assert torch.equal(torch.random.get_rng_state(), state)


def test_a_device_map_changes_no_reward(checkpoints, ragged_texts):
    head = RewardHead.from_pretrained(checkpoints["gpt2"])
    device, expected = head.device, head.score(ragged_texts)
    for device_map in ("auto", {"": "cpu"}):
        head = RewardHead.from_pretrained(checkpoints["gpt2"], device_map=device_map)
        assert torch.allclose(head.score(ragged_texts), expected, atol=0.0 if head.device == device else 1e-5)
    with pytest.raises(OptionError, match="at most one of the three"):
        RewardHead.from_pretrained(checkpoints["gpt2"], device_map="auto", device="cpu")
    with pytest.raises(OptionError, match=rf"n_devices: expected 1 to {max(1, torch.cuda.device_count())}"):
        RewardHead.from_pretrained(checkpoints["gpt2"], n_devices=99)


@pytest.mark.parametrize("width", [8, 9])
@pytest.mark.parametrize("kind", ["LayerNorm", "RMSNorm", "Gemma2RMSNorm"])
def test_norms_equal_their_formula_or_are_refused(kind, width):
    """Gain and bias from outside, whichever way a family stores them (Gemma's gain is 1 + weight)."""
    from transformers.models.gemma2.modeling_gemma2 import Gemma2RMSNorm

    norm = {"LayerNorm": torch.nn.LayerNorm, "RMSNorm": torch.nn.RMSNorm, "Gemma2RMSNorm": Gemma2RMSNorm}[kind](width)
    norm = norm.double()
    for parameter in norm.parameters():
        parameter.data = torch.randn(width, generator=torch.Generator().manual_seed(0)).double()
    layer = read_norm(norm, width)
    # Gemma's norm computes in float32 whatever its dtype; the others are limited by epsilon over the probe's square.
    atol = 1e-6 if kind == "Gemma2RMSNorm" else 1e-9
    assert torch.allclose(layer.gain, norm.weight + (kind == "Gemma2RMSNorm"), atol=atol)
    assert torch.allclose(
        layer.bias, getattr(norm, "bias", None) if kind == "LayerNorm" else 0 * norm.weight, atol=atol
    )
    assert layer.centred == (kind == "LayerNorm")
    x = torch.randn(5, width, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    y = norm(x).detach()
    sigma = layer.sigma(x, y)
    expected = (x.var(dim=1, unbiased=False) if layer.centred else x.square().mean(1)).add(norm_eps(norm)).sqrt()
    assert torch.allclose(sigma, expected, rtol=1e-5)
    assert torch.allclose(layer.apply(x, sigma), y, atol=1e-5)
    direction = torch.randn(5, width, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    pulled = (layer.pull_back(direction, sigma) * x).sum(1)
    assert torch.allclose(pulled, (direction * (y - layer.bias)).sum(1), atol=1e-5)
    assert not layer.is_plain
    assert read_norm(torch.nn.LayerNorm(width), width).is_plain
    with pytest.raises(ModelError, match=r"norm: expected a layer norm or an RMS norm, got Tanh"):
        read_norm(torch.nn.Tanh(), width)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("kind", [torch.nn.LayerNorm, torch.nn.RMSNorm])
def test_norms_in_half_precision_do_not_overflow(kind, dtype):
    """Streams of some hundreds, whose squares are above float16's 65,504."""
    width = 64
    norm = kind(width).to(dtype)
    norm.weight.data = 1 + torch.rand(width, generator=torch.Generator().manual_seed(0)).to(dtype)
    layer = read_norm(norm, width)
    room = 8 * torch.finfo(dtype).eps
    assert layer.gain.dtype == dtype
    assert torch.allclose(layer.gain, norm.weight, rtol=room)
    x = (300 * torch.randn(5, width, generator=torch.Generator().manual_seed(1))).to(dtype)
    sigma = layer.sigma(x, norm(x))
    wide = x.double() - (x.double().mean(1, keepdim=True) if layer.centred else 0)
    assert torch.allclose(sigma.double(), wide.square().mean(1).sqrt(), rtol=room)


def norm_eps(norm):
    eps = norm.eps
    return torch.finfo(torch.float64).eps if eps is None else eps


class TestBadHeads:
    def test_a_weight_of_another_width_is_refused(self, language_model):
        with pytest.raises(ModelError, match=r"expected 32 numbers.*got 31.*trained with this model"):
            RewardHead.from_pretrained(language_model, head=torch.ones(31))

    def test_a_stored_head_of_another_width_is_refused(self, checkpoints, tmp_path):
        folder = with_tensors(checkpoints["llama"], tmp_path, {"score.weight": torch.ones(1, 64)})
        with pytest.raises(ModelError, match=r"score head of shape \(1, 32\).*got \(1, 64\)"):
            RewardHead.from_pretrained(folder)

    def test_several_rows_without_output_are_refused(self):
        with pytest.raises(
            ModelError,
            match=r"weight: expected a head with one output, got 2.*output=1, or output=\(1, 0\)",
        ):
            choose_outputs(None, read_head(torch.ones(2, 4)), "weight")

    def test_invalid_biases_are_refused(self):
        with pytest.raises(ModelError, match=r"bias: expected one number, got shape \(2,\)"):
            read_head((torch.ones(4), torch.ones(2)))
        with pytest.raises(ModelError, match=r"bias: expected one number, got 'a'"):
            read_head((torch.ones(4), "a"))

    def test_heads_of_other_types_are_refused(self):
        with pytest.raises(ModelError, match=r"head: expected a weight.*got str"):
            read_head("score")
        with pytest.raises(ModelError, match=r"weight: expected a tensor, an array or a list of numbers, got str"):
            read_head(("score", 0.0))

    def test_a_state_dict_without_one_weight_is_refused(self):
        with pytest.raises(ModelError, match=r"expected one weight called score.*got \[\]"):
            read_head({"lm_head.weight": torch.ones(3, 4)})
        with pytest.raises(ModelError, match=r"got \['score.weight', 'v_head.weight'\]"):
            read_head({"score.weight": torch.ones(1, 4), "v_head.weight": torch.ones(1, 4)})

    def test_a_checkpoint_without_a_head_is_refused(self, language_model):
        with pytest.raises(ModelError, match=r"LlamaForCausalLM.*no score head.*head=\(weight, bias\).*LogRatioHead"):
            RewardHead.from_pretrained(language_model)


class TestBadCheckpoints:
    def test_quantised_checkpoints_are_refused(self, checkpoints, tmp_path):
        folder = with_tensors(checkpoints["gpt2"], tmp_path, {})
        config = json.loads((folder / "config.json").read_text())
        config["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_8bit": True}
        (folder / "config.json").write_text(json.dumps(config))
        with pytest.raises(ModelError, match=r"quantised.*dtype=torch.bfloat16"):
            RewardHead.from_pretrained(folder)

    def test_a_tokenizer_with_more_tokens_than_the_embedding_is_refused(self, checkpoints, tmp_path):
        larger = make_tokenizer(tmp_path)
        larger.add_tokens(["<more>", "<and more>"])
        with pytest.raises(ModelError, match=r"tokenizer: it has 322 tokens.*has 320 rows.*resize_token_embeddings"):
            RewardHead.from_pretrained(checkpoints["gpt2"], tokenizer=larger)

    def test_pickled_weights_are_refused(self, checkpoints, tmp_path):
        folder = with_tensors(checkpoints["gpt2"], tmp_path, {})
        (folder / "model.safetensors").unlink()
        torch.save({}, folder / "pytorch_model.bin")
        with pytest.raises(ModelError, match=r"expected model.safetensors; pickled weights are not read"):
            RewardHead.from_pretrained(folder)

    def test_code_in_a_checkpoint_is_not_run(self, checkpoints, tmp_path):
        folder = with_tensors(checkpoints["gpt2"], tmp_path / "remote", {})
        config = json.loads((folder / "config.json").read_text())
        config |= {"model_type": "of_their_own", "auto_map": {"AutoConfig": "theirs.TheirConfig"}}
        (folder / "config.json").write_text(json.dumps(config))
        (folder / "theirs.py").write_text(f"open({str(tmp_path / 'was_here')!r}, 'w')")
        with pytest.raises(ModelError, match=r"(?s)could not load the config.*trust_remote_code"):
            RewardHead.from_pretrained(folder)
        assert not (tmp_path / "was_here").exists()

    def test_damaged_checkpoints_are_refused(self, checkpoints, tmp_path):
        folder = with_tensors(checkpoints["gpt2"], tmp_path, {})
        whole = (folder / "model.safetensors").read_bytes()
        for cut in (4, 100, len(whole) - 10):
            (folder / "model.safetensors").write_bytes(whole[:cut])
            with pytest.raises(ModelError, match=r"safetensors files are damaged or incomplete"):
                RewardHead.from_pretrained(folder)
        (folder / "model.safetensors.index.json").write_text('{"weight_map": ')
        with pytest.raises(ModelError, match=r"damaged or incomplete"):
            RewardHead.from_pretrained(folder)

    def test_unknown_options_are_refused(self, checkpoints):
        with pytest.raises(OptionError, match=r"unknown options \['torch_dtype'\]; expected \['base', 'device', "):
            RewardHead.from_pretrained(checkpoints["gpt2"], torch_dtype=torch.bfloat16)
        with pytest.raises(OptionError, match=r"device: 'gpu' is not available on this machine"):
            RewardHead.from_pretrained(checkpoints["gpt2"], device="gpu")

    def test_a_pad_token_that_differs_from_the_config_is_refused(self, checkpoints):
        with pytest.raises(ModelError, match=r"pad_token: '<eos>' is token 0, but transformers skips token 1"):
            RewardHead.from_pretrained(checkpoints["gpt2"], pad_token="<eos>")

    def test_trust_remote_code_runs_the_code_of_a_checkpoint(self, checkpoints, tmp_path, monkeypatch, ragged_texts):
        """A model type of its own whose classes are Llama's; transformers copies the code to a cache, here a folder."""
        monkeypatch.setattr(transformers.dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "cache"))
        monkeypatch.syspath_prepend(tmp_path / "cache")
        folder = with_tensors(checkpoints["llama"], tmp_path / "remote", {})
        names = {"AutoConfig": "TheirConfig", "AutoModel": "LlamaModel", "AutoModelForCausalLM": "LlamaForCausalLM"}
        names["AutoModelForSequenceClassification"] = "LlamaForSequenceClassification"
        config = json.loads((folder / "config.json").read_text())
        config |= {"model_type": "theirs", "auto_map": {auto: f"theirs.{name}" for auto, name in names.items()}}
        (folder / "config.json").write_text(json.dumps(config))
        (folder / "theirs.py").write_text(REMOTE)
        head = RewardHead.from_pretrained(folder, trust_remote_code=True)
        assert head.architecture.startswith("theirs-")
        expected = RewardHead.from_pretrained(checkpoints["llama"]).score(ragged_texts)
        assert torch.equal(head.score(ragged_texts), expected)
        assert head.check()["passed"].all()

    def test_unknown_model_classes_are_refused(self, checkpoints):
        with pytest.raises(OptionError, match=r"model_class: expected one of.*got 'Bridge'"):
            RewardHead.from_pretrained(checkpoints["gpt2"], model_class="Bridge")


class TestBadInput:
    def test_token_ids_out_of_range_are_refused(self, head):
        with pytest.raises(DataError, match=r"ids from 0 to 319, got 5 to 320"):
            head.score_tokens(torch.tensor([[5, 320]]))
        with pytest.raises(DataError, match=r"got -1 to 5"):
            head.score_tokens(torch.tensor([[5, -1]]))
        # Under the mask anything may stand: -100 is common.
        masked = head.score_tokens(torch.tensor([[-100, 5]]), torch.tensor([[0, 1]]))
        assert torch.equal(masked, head.score_tokens(torch.tensor([[5]])))

    def test_a_batch_without_rows_is_refused(self, head):
        with pytest.raises(OptionError, match=r"one row of token ids per text, got shape \(0, 3\)"):
            head.score_tokens(torch.ones(0, 3, dtype=torch.long))

    def test_an_empty_text_is_refused(self, head):
        with pytest.raises(DataError, match=r"text 1 has no token: it is empty"):
            head.score(["help", ""])


def test_arrays_and_lists_are_weights(head, ragged_texts):
    """In every shape that a tensor may have, with the rewards of the tensor."""
    weight = head.weight.double()
    expected = RewardHead(head.model, (weight, 0.5), tokenizer=head.tokenizer).score(ragged_texts[:4])
    rows = weight.numpy()
    for given in (
        (rows, 0.5),
        (rows[None].astype(np.float32), np.array([0.5])),
        (rows.tolist(), 0.5),
        [[rows.tolist()], 0.5],
        {"score.weight": rows[None], "score.bias": [0.5]},
    ):
        opened = RewardHead(head.model, weight=given, tokenizer=head.tokenizer)
        assert torch.allclose(opened.score(ragged_texts[:4]), expected, atol=1e-6)
        assert opened.weight.dtype == torch.float32
    for given in (rows, rows.tolist(), [rows.tolist()], tuple(rows.tolist())):
        opened = RewardHead(head.model, given, tokenizer=head.tokenizer)
        assert torch.allclose(opened.score(ragged_texts[:4]), expected - 0.5, atol=1e-6)
    assert read_head([1, 2]).weight.tolist() == [[1.0, 2.0]]  # two numbers are no (weight, bias) pair


@pytest.mark.parametrize("given", [["a", "b"], ["a"] * 32, np.array([None] * 32), [[1.0, 2.0], [3.0, 4.0]]])
def test_weights_that_are_not_numbers_are_refused(given):
    with pytest.raises(ModelError, match=r"weight.*: expected"):
        read_head(given, 32)
