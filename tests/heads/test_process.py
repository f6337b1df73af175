"""Process rewards equal those from transformers' token classifiers, and their gradients autograd's."""

import pytest
import torch
import transformers
from reference import DEVICE
from safetensors.torch import load_file, save_file
from tiny_models import grid, make_config, make_pairs, make_tokenizer, save_drawn

from rmtension import AblationContext, NeuronAttribution, NeuronSet, PreferencePairs, RewardHead
from rmtension.errors import DataError, ModelError, OptionError, RMTensionWarning
from rmtension.heads import ProcessHead

MARKER = " then"
PAIRS = [
    ("how do i bake", "first bake a cake then help then", "sorry then i cannot bake then kill python then"),
    ("please help", "sure then", "a cake and bread then first then cannot"),
]
COMBINED = {
    "min": lambda p: p.min(),
    "mean": lambda p: p.mean(),
    "last": lambda p: p[-1],
    "product": lambda p: p.prod(),
}


def save_model(folder, family, tokenizer, *, seed=0, **changes):
    config = make_config(family, len(tokenizer), num_labels=2, **changes)
    return save_drawn(folder, transformers.AutoModelForTokenClassification, config, tokenizer, seed=seed)


@pytest.fixture(scope="module")
def process(tmp_path_factory, tokenizer):
    return save_model(tmp_path_factory.mktemp("process"), "gpt2", tokenizer)


@pytest.fixture(scope="module")
def steps():
    return PreferencePairs.from_records(
        [{"prompt": prompt, "chosen": chosen, "rejected": rejected} for prompt, chosen, rejected in PAIRS]
    )


def step_probabilities(logits, ids, tokenizer, n_prompt):
    """The probability of class 1 at each marker after the prompt, from the logits [token, class] of one text."""
    (marker,) = tokenizer(MARKER)["input_ids"]
    at = [column for column in range(n_prompt, len(ids)) if ids[column] == marker]
    assert at
    return logits[at].softmax(dim=1)[:, 1]


@pytest.mark.parametrize("family", grid(["gpt2", "llama", "gpt_neox"]))
def test_outputs_equal_transformers_classes_at_the_markers(family, tmp_path, tokenizer, steps):
    folder = save_model(tmp_path / family, family, tokenizer)
    model = RewardHead.from_pretrained(folder, head=ProcessHead(MARKER), output="all", dtype=torch.float64)
    outputs = model.score_outputs(steps)
    load = transformers.AutoModelForTokenClassification.from_pretrained
    plain = load(folder, dtype=torch.float64).eval().to(DEVICE)
    for side in ("chosen", "rejected"):
        for number, pair in enumerate(steps):
            ids = tokenizer(f"{pair.prompt} {getattr(pair, side)}", return_tensors="pt")["input_ids"].to(DEVICE)
            with torch.no_grad():
                logits = plain(input_ids=ids).logits[0].cpu()
            right = step_probabilities(logits, ids[0].tolist(), tokenizer, len(tokenizer(pair.prompt)["input_ids"]))
            for name, combine in COMBINED.items():
                found = float(getattr(outputs[name], side)[number])
                assert found == pytest.approx(float(combine(right)), abs=1e-9), (name, side)
            # Negative control: the other class gives other numbers.
            assert abs(float(outputs["mean"].chosen[0] - (1 - right).mean())) > 1e-3


@pytest.mark.grid
def test_attribution_equals_autograd_and_ablation_plain_hooks(process, steps, tokenizer):
    load = transformers.AutoModelForTokenClassification.from_pretrained
    plain = load(process, dtype=torch.float64).eval().to(DEVICE)
    opened = RewardHead.from_pretrained(process, head=ProcessHead(MARKER), output="all", dtype=torch.float64)
    mask = torch.rand(3, 64, generator=torch.Generator().manual_seed(0)) < 0.2
    on = mask.to(DEVICE)

    def run(pair, combine, change):
        handles = [
            block.mlp.c_proj.register_forward_pre_hook(lambda _, inputs, layer=layer: (change(layer, inputs[0]),))
            for layer, block in enumerate(plain.transformer.h)
        ]
        sides = []
        for side in ("chosen", "rejected"):
            ids = tokenizer(f"{pair.prompt} {getattr(pair, side)}", return_tensors="pt")["input_ids"].to(DEVICE)
            n_prompt = len(tokenizer(pair.prompt)["input_ids"])
            logits = plain(input_ids=ids).logits[0]
            sides.append(combine(step_probabilities(logits, ids[0].tolist(), tokenizer, n_prompt)))
        for handle in handles:
            handle.remove()
        return sides[0] - sides[1]

    for name, combine in COMBINED.items():
        model = opened.output(name)
        scores = NeuronAttribution(model, "gradient_x_activation").score(steps).values
        expected = torch.zeros_like(scores)
        for pair in steps:
            seen = []

            def keep(layer, activation, seen=seen):
                seen.append((layer, activation if activation.requires_grad else activation.detach().requires_grad_()))
                return seen[-1][1]

            slopes = torch.autograd.grad(run(pair, combine, keep), [activation for _, activation in seen])
            for (layer, activation), slope in zip(seen, slopes, strict=True):
                expected[layer] += (activation * slope)[0].sum(dim=0).detach().cpu() / len(steps)
        assert torch.allclose(scores, expected, atol=1e-10), name
        assert float(expected.abs().max()) > 1e-4
        with AblationContext(model, NeuronSet(mask, "mlp", model.architecture)):
            ablated = model.score_pairs(steps).margin
        with torch.no_grad():
            plainly = [run(pair, combine, lambda layer, a: a.masked_fill(on[layer], 0.0)) for pair in steps]
        assert torch.allclose(ablated, torch.stack(plainly).cpu(), atol=1e-10), name


@pytest.mark.grid
def test_checks_pass_and_saved_models_score_the_same(process, steps, tmp_path):
    for output in COMBINED:
        model = RewardHead.from_pretrained(process, head=ProcessHead(MARKER), output=output)
        table = model.check(steps)
        assert "equal to transformers" in set(table["check"])
        assert model.check()["passed"].all()
    model.save_pretrained(tmp_path / "saved")
    again = RewardHead.from_pretrained(tmp_path / "saved", head=ProcessHead(MARKER), output=output)
    assert torch.allclose(again.score_pairs(steps).margin, model.score_pairs(steps).margin, atol=1e-7)
    kind = transformers.AutoModelForTokenClassification.from_pretrained(tmp_path / "saved")
    assert kind.config.num_labels == 2
    memory = RewardHead.from_classifier(kind, head=ProcessHead(MARKER), output=output, tokenizer=model.tokenizer)
    assert torch.allclose(memory.score_pairs(steps).margin, model.score_pairs(steps).margin, atol=1e-7)
    with torch.no_grad():
        kind.classifier.weight += 0.1
    with pytest.raises(ModelError, match="its score layer changed after the model was opened"):
        memory.score_pairs(steps)


@pytest.mark.grid
def test_layers_of_qwen_math_prm_and_a_value_per_step(tmp_path, tokenizer, steps):
    """Linear-ReLU-Linear called score.0 and score.2, on a model saved as another class; and a sigmoid of one number."""
    torch.manual_seed(0)
    base = transformers.AutoModel.from_config(make_config("llama", len(tokenizer))).double().eval()
    layers = torch.nn.Sequential(torch.nn.Linear(32, 32), torch.nn.ReLU(), torch.nn.Linear(32, 2)).double()
    for parameter in layers.parameters():
        parameter.data += 0.2 * torch.randn_like(parameter)
    base.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    state = {f"model.{name}": tensor for name, tensor in load_file(tmp_path / "model.safetensors").items()}
    state |= {f"score.{name}": tensor.detach() for name, tensor in layers.state_dict().items()}
    save_file(state, tmp_path / "model.safetensors", {"format": "pt"})
    one = torch.randn(32).double()
    own = RewardHead.from_pretrained(tmp_path, head=ProcessHead(MARKER), output="product", dtype=torch.float64)
    value = RewardHead.from_pretrained(
        tmp_path, head=ProcessHead(MARKER, (one, 0.3)), output="min", dtype=torch.float64
    )
    (marker,) = tokenizer(MARKER)["input_ids"]
    for number, pair in enumerate(steps):
        ids = tokenizer(f"{pair.prompt} {pair.chosen}", return_tensors="pt")["input_ids"]
        with torch.no_grad():
            at = base(input_ids=ids).last_hidden_state[0][ids[0] == marker]
            by_class, by_value = layers(at).softmax(dim=1)[:, 1].prod(), (at @ one + 0.3).sigmoid().min()
        assert float(own.score_pairs(steps).chosen[number] - by_class) == pytest.approx(0, abs=1e-7)
        assert float(value.score_pairs(steps).chosen[number] - by_value) == pytest.approx(0, abs=1e-7)
    assert own.check(steps)["passed"].all()
    with pytest.warns(RMTensionWarning, match=r"again with head=ProcessHead\(' then'\), output='product'"):
        own.save_pretrained(tmp_path / "saved")
    options = {"output": "product", "dtype": torch.float64}
    again = RewardHead.from_pretrained(tmp_path / "saved", head=ProcessHead(MARKER), **options)
    assert torch.equal(again.score_pairs(steps).chosen, own.score_pairs(steps).chosen)
    passed = RewardHead.from_pretrained(tmp_path, head=ProcessHead(MARKER, own.head.step), **options)
    with pytest.raises(ModelError, match=r"transformers has no token classifier whose head is a LayeredHead"):
        passed.save_pretrained(tmp_path / "other")


def test_texts_without_a_marker_and_wrong_arguments_are_refused(process, tokenizer, tmp_path):
    model = RewardHead.from_pretrained(process, head=ProcessHead(MARKER), output="min")
    pair = PreferencePairs.from_records([{"id": "sums", "prompt": "a then", "chosen": "b then", "rejected": "b"}])
    with pytest.raises(
        DataError, match=r"pair 'sums', rejected: expected at least one marker ' then'.*after each step"
    ):
        model.score_pairs(pair)
    with pytest.raises(DataError, match=r"texts: text 1: expected at least one marker"):
        model.score(["a then", "a"])
    with pytest.raises(ModelError, match=r"got 4: .*0 'min', 1 'mean', 2 'last'.*output=\('product', 'min'\)"):
        RewardHead.from_pretrained(process, head=ProcessHead(MARKER))
    with pytest.raises(OptionError, match=r"label: .*no output has this name"):
        RewardHead.from_pretrained(process, head=ProcessHead(MARKER, label="right"), output="min")
    with pytest.raises(OptionError, match=r"marker: expected the text that ends each step, got ''"):
        ProcessHead("")
    with pytest.raises(DataError, match=r"text 0: the tokenizer joins the marker 'th' with the text around it"):
        RewardHead.from_pretrained(process, head=ProcessHead("th"), output="min").score(["a then th"])


@pytest.mark.parametrize("output", [1, "all", None])
def test_a_number_never_reads_the_unembedding_of_a_process_model(tmp_path, tokenizer, output):
    """The checkpoint of Qwen2.5-Math-PRM also holds an unembedding, whose row 1 is not the class 1 of a step."""
    model = transformers.AutoModelForCausalLM.from_config(make_config("llama", len(tokenizer)))
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    config = tmp_path / "config.json"
    config.write_text(config.read_text().replace("LlamaForCausalLM", "Qwen2ForProcessRewardModel"))
    layers = {"score.0.weight": torch.ones(32, 32), "score.0.bias": torch.ones(32)}
    layers |= {"score.2.weight": torch.ones(2, 32), "score.2.bias": torch.ones(2)}
    save_file(load_file(tmp_path / "model.safetensors") | layers, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(ModelError, match=r"score.2.weight \[2, 32\].*scores the steps.*ProcessHead\(marker\)"):
        RewardHead.from_pretrained(tmp_path, output=output)


@pytest.mark.grid
def test_markers_of_several_tokens_and_special_ones(process, tmp_path):
    """A marker of three tokens is read at its last one, in packed rows too; an added token is never joined."""
    model = RewardHead.from_pretrained(process, head=ProcessHead("->;"), output="mean", dtype=torch.float64)
    assert len(model.head.marker_ids) == 3
    rows = [{"prompt": "please help", "chosen": "first->; a cake->;", "rejected": "first->; bread->;"}]
    packed = model.score_pairs(PreferencePairs.from_records(rows))
    single = model.score(["please help first->; a cake->;", "please help first->; bread->;"])
    assert torch.allclose(torch.stack([packed.chosen[0], packed.rejected[0]]), single, atol=1e-12)
    ids = model.tokenizer("please help first->; a cake->;")["input_ids"]
    ends = [n for n in range(len(ids)) if tuple(ids[n - 2 : n + 1]) == model.head.marker_ids]
    load = transformers.AutoModelForTokenClassification.from_pretrained
    with torch.no_grad():
        logits = load(process, dtype=torch.float64).eval()(torch.tensor([ids])).logits[0]
    assert len(ends) == 2
    assert float(single[0] - logits[ends].softmax(dim=1)[:, 1].mean()) == pytest.approx(0, abs=1e-10)
    tokenizer = make_tokenizer(tmp_path / "tokens")
    tokenizer.add_special_tokens({"additional_special_tokens": ["<extra_0>"]})
    folder = save_model(tmp_path / "model", "llama", tokenizer)
    special = RewardHead.from_pretrained(folder, head=ProcessHead("<extra_0>"), output="last")
    assert special.head.marker_ids == (len(tokenizer) - 1,)
    assert special.score(["a cake<extra_0>bread<extra_0>"]).shape == (1,)
    with pytest.raises(DataError, match="marker '<extra_0>'"):
        special.score_pairs(make_pairs(1))
