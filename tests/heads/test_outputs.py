"""One output of several, or a difference of two: transformers' own logits at its own token, however it is opened."""

import json
import re

import pytest
import torch
import transformers
from rewritten_files import with_tensors
from safetensors.torch import load_file, save_file
from tiny_models import EOS, grid, make_config, make_tokenizer, save_classifier

from rmtension import AblationContext, NeuronSet, RewardHead
from rmtension.errors import CheckError, ModelError, OptionError, RMTensionWarning
from rmtension.heads._heads import read_head
from rmtension.heads._outputs import choose_rows
from rmtension.synthetic.check_matrix import make_classifier

TEXTS = ["how do i bake a cake", f"please help{EOS}", f"sorry{EOS}{EOS}"]
NAMES = {0: "harmless", 1: "honest", 2: "helpful"}


@pytest.fixture(scope="module")
def padded_with_eos(tmp_path_factory):
    """A tokenizer whose pad token ends texts too: what is read depends on following transformers' rule."""
    return make_tokenizer(tmp_path_factory.mktemp("tokenizer"), pad=EOS)


@pytest.fixture(scope="module", params=grid(["gpt2", "gpt_neox"]))
def folder(request, padded_with_eos, tmp_path_factory):
    """A classifier with three named outputs."""
    where = tmp_path_factory.mktemp(request.param)
    return save_classifier(where, request.param, padded_with_eos, pad_token_id=0, id2label=NAMES, num_labels=3)


@pytest.fixture(scope="module")
def classifier(folder):
    return transformers.AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def language_models(tokenizer, tmp_path_factory):
    """family -> folder: tied embeddings (GPT-2, Granite, whose logits are divided), a bias (GPT-J), a cap (Gemma-2)."""
    folders = {}
    for family, changes in {
        "gpt2": {},
        "llama": {"tie_word_embeddings": False},
        "gptj": {},
        "granite": {"logits_scaling": 8.0, "num_key_value_heads": 2},
        "cohere": {"logit_scale": 0.25},
        "gemma2": {"final_logit_softcapping": 30.0},
    }.items():
        folders[family] = where = tmp_path_factory.mktemp(family)
        size = len(tokenizer) + 8  # some tokenizer classes add tokens when they are read
        if family in ("granite", "cohere"):
            common = {"pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 0, "vocab_size": size, "hidden_size": 32}
            layers = {"num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
            config = transformers.AutoConfig.for_model(family, **common | layers | changes)
        else:
            config = make_classifier(family, size, **changes).config
        torch.manual_seed(0)
        model = transformers.AutoModelForCausalLM.from_config(config)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter += 0.1 * torch.randn_like(parameter)
        model.save_pretrained(where)
        tokenizer.save_pretrained(where)
    return folders


@torch.no_grad()
def logits(model, tokenizer, texts=TEXTS):
    rows = [model(**tokenizer(text, return_tensors="pt")).logits[0] for text in texts]
    return torch.stack([row if row.ndim == 1 else row[-1] for row in rows])


def wanted(values, output):
    """The logit that `output` means, or the difference of two."""
    names = {name: row for row, name in NAMES.items()}
    rows = [names.get(row, row) for row in (output if isinstance(output, tuple | list) else [output])]
    return values[:, rows[0]] - (values[:, rows[1]] if len(rows) == 2 else 0)


class TestClassifiers:
    @pytest.mark.parametrize("output", [2, "helpful", ("helpful", "honest"), [1, "harmless"]])
    def test_rewards_equal_the_logits_of_transformers(self, folder, classifier, padded_with_eos, output):
        expected = wanted(logits(classifier, padded_with_eos), output)
        opened = RewardHead.from_pretrained(folder, output=output)
        assert torch.allclose(opened.score(TEXTS), expected, atol=1e-5)
        in_memory = RewardHead.from_classifier(classifier, tokenizer=padded_with_eos, output=output)
        assert torch.allclose(in_memory.score(TEXTS), expected, atol=1e-5)

    @pytest.mark.parametrize("how", grid(["matrix", "pair", "layer", "state dict"]))
    def test_an_output_of_a_passed_head_is_its_row(self, folder, classifier, padded_with_eos, how):
        weight, bias = classifier.score.weight, torch.tensor([1.0, 2.0, 4.0])
        layer = torch.nn.Linear(32, 3)
        layer.weight.data, layer.bias.data = weight.data, bias
        given = {"matrix": weight, "pair": (weight, bias), "layer": layer, "state dict": layer.state_dict()}[how]
        expected = wanted(
            logits(classifier, padded_with_eos) + (0 if how == "matrix" else bias), ("helpful", "harmless")
        )
        head = RewardHead.from_pretrained(folder, head=given, output=("helpful", 0))
        assert torch.allclose(head.score(TEXTS), expected, atol=1e-5)
        head = RewardHead.from_classifier(classifier, tokenizer=padded_with_eos, head=given, output=(2, 0))
        assert torch.allclose(head.score(TEXTS), expected, atol=1e-5)
        live = RewardHead(head.model, weight=given, output=(2, 0), tokenizer=padded_with_eos, pad_token_id=0)
        assert torch.allclose(live.score(TEXTS), expected, atol=1e-5)

    def test_a_passed_head_is_read_at_the_token_of_transformers(self, folder, classifier, padded_with_eos):
        """Negative control: read at the last token whichever it is, texts that end in the pad token differ."""
        head = RewardHead.from_pretrained(folder, head=classifier.score.weight[1])
        expected = logits(classifier, padded_with_eos)[:, 1]
        assert torch.allclose(head.score(TEXTS), expected, atol=1e-5)
        assert head.check()["passed"].all()
        last = RewardHead(head.model, weight=classifier.score.weight, output=1, tokenizer=padded_with_eos).score(TEXTS)
        assert torch.allclose(last[0], expected[0], atol=1e-5)
        assert float((last[1:] - expected[1:]).abs().min()) > 1e-3

    def test_check_follows_the_output(self, folder, monkeypatch):
        head = RewardHead.from_pretrained(folder, output=("helpful", "harmless"))
        assert head.check()["passed"].all()
        object.__setattr__(head.checkpoint, "choice", (2, 1))
        with pytest.raises(CheckError, match="equal to transformers"):
            head.check()

    def test_check_accepts_a_reference_model(self, folder, classifier):
        head = RewardHead.from_pretrained(folder, output="honest")
        assert head.check(reference=classifier)["passed"].all()
        given = RewardHead.from_pretrained(folder, head=classifier.score.weight[1])
        with pytest.raises(CheckError, match=r"reference: expected a model with one output.*got 3 outputs"):
            given.check(reference=classifier)

    @pytest.mark.parametrize("output", grid([1, (2, 0)], keep=[(2, 0)]))
    def test_saving_and_ablating_keep_the_chosen_output(self, folder, classifier, padded_with_eos, tmp_path, output):
        head = RewardHead.from_pretrained(folder, output=output)
        load = transformers.AutoModelForSequenceClassification.from_pretrained
        head.save_pretrained(tmp_path / "plain")
        saved = load(tmp_path / "plain", dtype=torch.float32)
        assert saved.config.num_labels == 1
        assert torch.allclose(logits(saved, padded_with_eos)[:, 0], head.score(TEXTS), atol=1e-5)
        mask = torch.zeros(head.n_layers, head.n_neurons("mlp"), dtype=torch.bool)
        mask[:, :9] = True
        ablated = head.with_ablation(NeuronSet(mask, "mlp", head.architecture))
        assert ablated.check()["passed"].all()
        ablated.save_pretrained(tmp_path / "ablated")
        rewards = logits(load(tmp_path / "ablated", dtype=torch.float32), padded_with_eos)[:, 0]
        assert torch.allclose(rewards, ablated.score(TEXTS), atol=1e-5)
        assert float((rewards - head.score(TEXTS)).abs().max()) > 1e-3

    def test_bfloat16_differences_are_not_rounded_twice(self, folder):
        head = RewardHead.from_pretrained(folder, output=(2, 0), dtype=torch.bfloat16)
        rows = load_file(folder / "model.safetensors")["score.weight"].bfloat16().float()
        assert torch.equal(head.weight.cpu(), rows[2] - rows[0])

    def test_the_stored_rows_count_and_not_the_config(self, checkpoints, padded_with_eos, tmp_path):
        """A config without `id2label` says two labels, which is transformers' default."""
        for family in ("llama", "gpt_neox"):
            folder = with_tensors(checkpoints[family], tmp_path / family, {})
            config = json.loads((folder / "config.json").read_text())
            for key in ("id2label", "label2id", "num_labels"):
                config.pop(key, None)
            (folder / "config.json").write_text(json.dumps(config))
            assert transformers.AutoConfig.from_pretrained(folder).num_labels == 2
            head = RewardHead.from_pretrained(folder)
            assert torch.equal(head.score(TEXTS), RewardHead.from_pretrained(checkpoints[family]).score(TEXTS))
            assert head.check()["passed"].all()

    @pytest.mark.parametrize("source", ["folder", "memory"])
    def test_refusals_list_all_outputs(self, folder, classifier, padded_with_eos, source):
        def opened(**options):
            if source == "folder":
                return RewardHead.from_pretrained(folder, **options)
            return RewardHead.from_classifier(classifier, tokenizer=padded_with_eos, **options)

        listed = r"0 to 2 \(0 'harmless', 1 'honest', 2 'helpful'\)"
        with pytest.raises(
            ModelError, match=rf"one output, got 3: {listed}.*output='helpful', or output=\('helpful', 'harmless'\)"
        ):
            opened()
        for wrong in (3, -1, True, 1.5, None):
            with pytest.raises(OptionError, match=rf"output: expected one of {listed}, got {wrong}"):
                opened(output=(wrong, 0) if wrong is None else wrong)
        with pytest.raises(OptionError, match=rf"output: 'LABEL_0': no output has this name.*{listed}"):
            opened(output="LABEL_0")
        with pytest.raises(OptionError, match=r"pair of different outputs, got \('helpful', 2\)"):
            opened(output=("helpful", 2))
        with pytest.raises(OptionError, match=r"output: expected an output or a pair of outputs, got 3"):
            opened(output=(0, 1, 2))

    def test_names_that_are_not_unique_are_refused(self):
        with pytest.raises(OptionError, match="'good': more than one output has this name"):
            choose_rows("good", 2, {0: "good", 1: "good"}, "model")

    def test_the_only_output_needs_no_choice(self, checkpoints):
        head = RewardHead.from_pretrained(checkpoints["gpt2"], output=0)
        assert torch.equal(head.weight, RewardHead.from_pretrained(checkpoints["gpt2"]).weight)
        with pytest.raises(OptionError, match=r"expected one of 0 \(there is one output\), got 1"):
            RewardHead.from_pretrained(checkpoints["gpt2"], output=1)


class TestTokens:
    @pytest.mark.lens
    @pytest.mark.parametrize("family", grid(["gpt2", "llama", "gptj", "granite", "cohere"]))
    def test_rewards_equal_the_logits_of_the_language_model(self, language_models, family):
        model = transformers.AutoModelForCausalLM.from_pretrained(language_models[family], dtype=torch.float32).eval()
        head = RewardHead.from_pretrained(language_models[family], output=("Ġsure", " bake"))
        sure, bake = head.tokenizer.convert_tokens_to_ids(["Ġsure", "Ġbake"])
        all_logits = logits(model, head.tokenizer)
        assert torch.allclose(head.score(TEXTS), all_logits[:, sure] - all_logits[:, bake], atol=1e-5)
        if family == "cohere":  # TransformerLens 3 has another bridge of it, whose line of the check says so
            return
        assert head.check()["passed"].all()
        single = RewardHead.from_pretrained(language_models[family], output="Ġsure")
        assert torch.allclose(single.score(TEXTS), all_logits[:, sure], atol=1e-5)
        assert single.check()["passed"].all()

    def test_capped_logits_are_a_head_that_is_not_linear(self, language_models, tmp_path):
        """Gemma-2's cap * tanh(logit / cap); the model is saved as the language model that it is."""
        folder = language_models["gemma2"]
        head = RewardHead.from_pretrained(folder, output=("Ġsure", "Ġbake"))
        model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        assert model.config.final_logit_softcapping == 30.0
        yes, no = head.tokenizer.convert_tokens_to_ids(["Ġsure", "Ġbake"])
        all_logits = logits(model, head.tokenizer)
        expected = all_logits[:, yes] - all_logits[:, no]
        assert torch.allclose(head.score(TEXTS), expected, atol=1e-5)
        assert head.check()["passed"].all()
        with pytest.warns(RMTensionWarning, match="Open it again with the output="):
            head.save_pretrained(tmp_path)
        again = RewardHead.from_pretrained(tmp_path, output=(yes, no))
        assert torch.equal(again.score(TEXTS), head.score(TEXTS))
        model.config.final_logit_softcapping = None
        uncapped = logits(model, head.tokenizer)
        assert not torch.allclose(uncapped[:, yes] - uncapped[:, no], expected, atol=1e-5)

    def test_a_token_id_is_an_output(self, language_models):
        """Nemotron's reward is the logit of token 0."""
        folder = language_models["llama"]
        head = RewardHead.from_pretrained(folder, output=0)
        model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        assert torch.allclose(head.score(TEXTS), logits(model, head.tokenizer)[:, 0], atol=1e-5)
        with pytest.raises(OptionError, match=r"expected token ids below \d+, got \[99999\]"):
            RewardHead.from_pretrained(folder, output=99999)

    def test_a_head_of_tokens_is_saved_as_a_classifier(self, language_models, tmp_path):
        head = RewardHead.from_pretrained(language_models["llama"], output=("Ġsure", "Ġbake"))
        with pytest.warns(UserWarning, match="no pad token"):
            head.save_pretrained(tmp_path)
        saved = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path, dtype=torch.float32)
        assert torch.allclose(logits(saved, head.tokenizer)[:, 0], head.score(TEXTS), atol=1e-5)
        mask = torch.zeros(head.n_layers, head.n_neurons("mlp"), dtype=torch.bool)
        mask[:, :9] = True
        neurons = NeuronSet(mask, "mlp", head.architecture)
        ablated = head.with_ablation(neurons)
        with AblationContext(head, neurons):
            inside = head.score(TEXTS)
        assert torch.allclose(ablated.score(TEXTS), inside, atol=1e-5)
        assert ablated.check()["passed"].all()

    def test_refusals_show_how_the_tokenizer_splits(self, language_models):
        folder = language_models["gpt2"]
        with pytest.raises(OptionError, match=r"splits 'cannot' into \['c', 'anno', 't'\].*'Ġcanno'"):
            RewardHead.from_pretrained(folder, output="cannot")
        with pytest.raises(
            OptionError, match=r"a single token.*splits 'bake' into \['b', 'ake'\].*Similar tokens .* are \['Ġbake'"
        ):
            RewardHead.from_pretrained(folder, output=("bake", "Ġsure"))
        with pytest.raises(
            OptionError,
            match=r"outputs of a language model are tokens; expected a token as text or a token id, got 7.5",
        ):
            RewardHead.from_pretrained(folder, output=7.5)
        with pytest.raises(OptionError, match=r"expected a pair of different outputs"):
            RewardHead.from_pretrained(folder, output=(" sure", "Ġsure"))
        with pytest.raises(ModelError, match=r"no score head.*output=\(' Yes', ' No'\)"):
            RewardHead.from_pretrained(folder)

    def test_an_unknown_word_is_no_token(self, language_models, tmp_path):
        """A tokenizer of whole words makes one token of any text: the unknown one."""
        from tokenizers import Tokenizer, models, pre_tokenizers

        raw = Tokenizer(models.WordLevel({"[UNK]": 0, "yes": 1, "no": 2}, unk_token="[UNK]"))
        raw.pre_tokenizer = pre_tokenizers.Whitespace()
        words = transformers.PreTrainedTokenizerFast(tokenizer_object=raw, unk_token="[UNK]")
        assert RewardHead.from_pretrained(language_models["gpt2"], tokenizer=words, output=("yes", "no")).bias == 0
        with pytest.raises(OptionError, match=r"a single token.*'Yes'.*Similar tokens .* are \['yes'"):
            RewardHead.from_pretrained(language_models["gpt2"], tokenizer=words, output=("Yes", "no"))


class TestStoredHeads:
    @pytest.mark.parametrize(("name", "n_shards"), [("score_head", 1), ("out_proj", 3), ("reward_model.head", 3)])
    def test_a_single_stored_row_is_read_under_any_name(self, language_models, tmp_path, name, n_shards):
        weight, bias = torch.randn(1, 32, generator=torch.Generator().manual_seed(0)), torch.tensor([0.7])
        stored = {f"{name}.weight": weight, f"{name}.bias": bias}
        folder = with_tensors(language_models["llama"], tmp_path, stored, n_shards=n_shards)
        head = RewardHead.from_pretrained(folder)
        assert torch.equal(head.weight.cpu(), weight[0])
        assert head.bias == pytest.approx(0.7)
        assert torch.equal(read_head(stored).weight, weight)

    def test_the_projections_of_a_body_are_no_heads(self, tmp_path, tokenizer):
        """OPT's attention has an `out_proj` of its own in every layer."""
        model = make_classifier("opt", len(tokenizer))
        language_model = transformers.AutoModelForCausalLM.from_config(model.config)
        language_model.save_pretrained(tmp_path)
        tokenizer.save_pretrained(tmp_path)
        with pytest.raises(ModelError, match="no score head"):
            RewardHead.from_pretrained(tmp_path)

    def test_several_stored_rows_need_a_choice(self, language_models, tokenizer, tmp_path):
        weight, bias = torch.randn(3, 32, generator=torch.Generator().manual_seed(0)), torch.tensor([1.0, 2.0, 4.0])
        stored = {"regression_layer.weight": weight, "regression_layer.bias": bias}
        folder = with_tensors(language_models["gpt2"], tmp_path, stored)
        with pytest.raises(ModelError, match=r"expected a head with one output, got 3"):
            RewardHead.from_pretrained(folder)
        head = RewardHead.from_pretrained(folder, output=(2, 0))
        assert torch.equal(head.weight.cpu(), weight[2] - weight[0])
        assert head.bias == 3.0
        assert head.check()["passed"].all()
        # The same in a separate file, for a model without a head, or with its own.
        save_file(stored, tmp_path / "regression.safetensors")
        given = RewardHead.from_pretrained(
            language_models["gpt2"], head=str(tmp_path / "regression.safetensors"), output=1
        )
        assert torch.equal(given.weight.cpu(), weight[1])
        assert given.check()["passed"].all()

    def test_a_process_reward_model_is_read_at_the_last_token(self, tokenizer, tmp_path):
        config = make_config("llama", len(tokenizer), num_labels=2, id2label={0: "bad", 1: "good"})
        torch.manual_seed(0)
        model = transformers.AutoModelForTokenClassification.from_config(config).eval()
        with torch.no_grad():
            model.score.bias += torch.randn(2)
        model.save_pretrained(tmp_path)
        tokenizer.save_pretrained(tmp_path)
        head = RewardHead.from_pretrained(tmp_path, output=("good", "bad"))
        all_logits = logits(model, tokenizer)
        assert torch.allclose(head.score(TEXTS), all_logits[:, 1] - all_logits[:, 0], atol=1e-5)

    def test_a_head_on_an_encoder_reads_the_last_token(self, tokenizer, tmp_path):
        """Its last hidden state would depend on padding behind it, which a mask hides."""
        sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
        config = transformers.BertConfig(vocab_size=len(tokenizer), max_position_embeddings=96, pad_token_id=1, **sizes)
        torch.manual_seed(0)
        encoder = transformers.BertModel(config).eval()
        encoder.save_pretrained(tmp_path / "bert")
        tokenizer.save_pretrained(tmp_path / "bert")
        folder = with_tensors(tmp_path / "bert", tmp_path / "head", {"v_head.weight": torch.ones(1, 32)})
        head = RewardHead.from_pretrained(folder)
        with torch.no_grad():
            states = [encoder(**tokenizer(text, return_tensors="pt"))[0][0, -1] for text in TEXTS]
        assert torch.allclose(head.score(TEXTS), torch.stack(states).sum(dim=1), atol=1e-5)
        with pytest.raises(ModelError, match=r"expected causal attention for model_class and process_weights"):
            RewardHead.from_pretrained(folder, process_weights=True)

    def test_two_different_heads_are_refused(self, language_models, tmp_path):
        stored = {"v_head.summary.weight": torch.ones(1, 32)}
        folder = with_tensors(language_models["gpt2"], tmp_path, stored)
        save_file(stored, folder / "value_head.safetensors")
        assert torch.equal(RewardHead.from_pretrained(folder).weight.cpu(), torch.ones(32))
        save_file({"v_head.summary.weight": torch.zeros(1, 32)}, folder / "value_head.safetensors")
        with pytest.raises(ModelError, match=r"it has two heads.*head=\.\.\. accepts the path"):
            RewardHead.from_pretrained(folder)
        head = RewardHead.from_pretrained(folder, head=folder / "value_head.safetensors")
        assert float(head.weight.abs().sum()) == 0

    def test_pickled_heads_are_refused_with_a_conversion(self, language_models, tmp_path):
        file = "value_head.bin"
        folder = with_tensors(language_models["gpt2"], tmp_path, {})
        weight = torch.randn(1, 32, generator=torch.Generator().manual_seed(0))
        torch.save({"v_head.summary.weight": weight, "v_head.summary.bias": torch.tensor([0.5])}, folder / file)
        with pytest.raises(ModelError, match=rf"{file} is a pickled file.*If you trust it, convert it once") as caught:
            RewardHead.from_pretrained(folder)
        exec(re.search(r"`(.*)`", str(caught.value))[1])
        head = RewardHead.from_pretrained(
            folder, **eval(f"dict({re.search(r'head=.*safetensors.', str(caught.value))[0]})")
        )
        assert torch.equal(head.weight.cpu(), weight[0])
        with pytest.raises(ModelError, match=rf"head: .*{file} is a pickled file.*`import torch"):
            RewardHead.from_pretrained(folder, head=folder / file)
        with pytest.raises(
            ModelError, match=r"head: expected the path of a safetensors file, but there is no file nothing"
        ):
            RewardHead.from_pretrained(folder, head="nothing")

    def test_layers_without_a_known_activation_are_read_with_a_warning(self, language_models, tmp_path):
        """Linear-ReLU-Linear is the usual head of several layers, but the file does not say that it is ReLU."""
        generator = torch.Generator().manual_seed(0)
        first, second = torch.randn(64, 32, generator=generator), torch.randn(1, 64, generator=generator)
        tensors = {"value_head.layers.0.weight": first, "value_head.layers.2.weight": second}
        folder = with_tensors(language_models["llama"], tmp_path, tensors)
        with pytest.warns(RMTensionWarning, match=r"value_head.layers.\* was read as linear layers with a ReLU"):
            head = RewardHead.from_pretrained(folder)
        states = torch.randn(3, 32, generator=generator)
        expected = torch.relu(states @ first.T) @ second.T
        assert torch.allclose(head.head.read(states, None), expected, atol=1e-5)
