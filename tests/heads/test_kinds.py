"""Every kind of head: rewards, gradients, ablations and files are those of its formula, written down in plain torch."""

import json
import re
import shutil
import warnings
from dataclasses import replace

import pytest
import torch
import transformers
from all_replicas import ALL
from gated_replicas import GATED
from kind_checks import COLUMNS, measure
from linear_replicas import LAYERED, PLAIN
from native_families import make_native
from replica_reference import Reference
from replicas import HEADER, make_pairs
from safetensors.torch import load_file, save_file
from tiny_models import grid

from rmtension import NeuronSet, PreferencePairs, RewardHead
from rmtension.errors import DataError, ModelError, RMTensionWarning
from rmtension.passes._probes import find_probes
from rmtension.repair import Edit

KINDS = {replica.kind: replica for replica in ALL}
# The fast lane has a head of layers, one that reads the prompt, and one that reads several tokens.
KEPT = ("MLP v_head", "objectives, gated by the prompt", "steps with an MLP")
# The layers of Llama and Gemma-2 compute their norms in float32 in any model: rewards and gradients in float64 differ
# by its rounding, where packed texts or gradients of margins reach a norm in another order.
LIMITS = {torch.float32: 3e-5, torch.float64: 5e-6}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """kind -> folder of its replica, made when it is asked for."""
    made = {}

    def folder_of(kind):
        if kind not in made:
            made[kind] = KINDS[kind].make(tmp_path_factory.mktemp("kind") / "replica")
        return made[kind]

    return folder_of


@pytest.mark.parametrize("dtype", grid([torch.float64, torch.float32]))
@pytest.mark.parametrize("kind", grid(KINDS, keep=KEPT))
def test_every_kind_equals_its_formula(kind, dtype, tmp_path):
    found = measure(KINDS[kind], tmp_path / "replica", dtype)
    assert set(found) == set(COLUMNS)
    numbers = {column: value for column, value in found.items() if not isinstance(value, str)}
    assert all(value <= LIMITS[dtype] for value in numbers.values()), found
    refused = {"distributions over bins"}
    assert (len(numbers) < len(found)) == (kind in refused), found


@pytest.mark.grid
@pytest.mark.parametrize(
    ("kind", "changed"),
    [
        ("MLP v_head", lambda t: t | {"v_head.summary.0.bias": t["v_head.summary.0.bias"] + 0.1}),
        ("normalised score head (reward)", lambda t: t | {"normalizer.mean": t["normalizer.mean"] + 0.1}),
        ("quantiles, gated by the prompt", lambda t: t | {"gating.layers.5.running_mean": torch.ones(16)}),
        ("attributes with learned weights", lambda t: t | {"score.weight": t["score.weight"].flip(0)}),
        ("log-ratio of two language models", lambda t: {"lm_head.weight": 1.01 * t["lm_head.weight"]}),
        ("steps with an MLP", lambda t: t | {"score.0.bias": t["score.0.bias"] + 0.1}),
        ("encoder", lambda t: t | {"pooler.dense.bias": t["pooler.dense.bias"] + 0.1}),
        ("encoder with a norm, mean of tokens", lambda t: t | {"head.norm.weight": torch.ones(32)}),
    ],
)
def test_a_reference_with_another_head_is_told_apart(kind, changed, folders):
    """The comparison would notice a part of the formula that was left out."""
    replica, folder = KINDS[kind], folders(kind)
    reference = Reference(replica, folder, torch.float64)
    reference.head = {name: tensor.double() for name, tensor in changed(reference.head).items()}
    pairs = make_pairs(replica)
    texts = [(pair.prompt, pair.chosen) for pair in pairs]
    head = RewardHead.from_pretrained(folder, dtype=torch.float64, **replica.open_options(folder))
    assert float((head.score_pairs(pairs).chosen - reference.rewards(texts)).abs().max()) > 1e-4


@pytest.mark.grid
@pytest.mark.parametrize("kind", [*KEPT[:2], "attributes with learned weights", "output projection, mean"])
def test_heads_of_all_shapes_pass_the_checks(kind, folders):
    replica = KINDS[kind]
    head = RewardHead.from_pretrained(folders(kind))
    assert head.check(make_pairs(replica))["passed"].all()
    same = [{"prompt": pair.prompt, "chosen": pair.chosen, "rejected": pair.chosen} for pair in make_pairs(replica)]
    assert not head.score_pairs(PreferencePairs.from_records(same)).margin.any(), "equal responses, equal rewards"


@pytest.mark.grid
@pytest.mark.parametrize("is_chat", [True, False])
@pytest.mark.parametrize("kind", [KEPT[1], "quantiles, second version"])
def test_checks_without_pairs_use_texts_that_the_head_can_read(kind, is_chat, folders):
    """Heads that need a header get chats, or, without a template, drawn tokens that end with the header."""
    replica = KINDS[kind]
    head = RewardHead.from_pretrained(folders(kind))
    tokenizer, header = head.tokenizer, HEADER[replica.body]
    if is_chat:
        tokenizer.chat_template = (
            "{% for message in messages %}{% if message.role == 'assistant' %} "
            + header
            + " {% endif %} w1 {{ message.content }}{% endfor %}"
        )
    probes = find_probes(head, None)
    ending = tokenizer(f"{header} {'w1 No.' if is_chat else ''}")["input_ids"]
    assert len(probes) == 6
    assert any(probe.ids[-len(ending) :] == ending for probe in probes)
    assert all(probe.text is None for probe in probes)
    table = head.check().set_index("check")
    assert table["passed"].all()
    assert {"equal to transformers", "padding", "zeroing, mlp"} <= set(table.index)


class TestUnknownHeads:
    @pytest.mark.grid
    def test_the_error_lists_tensors_and_its_code_runs(self, tmp_path):
        tensors = {"mix.first.w": (16, 32), "mix.second.w": (1, 16)}
        replica = replace(PLAIN[2], tensors=lambda draw: {name: draw(*shape) for name, shape in tensors.items()})
        folder = replica.make(tmp_path / "replica")
        expected = r"tensors mix.first.w \[16, 32\], mix.second.w \[1, 16\]"
        with pytest.raises(ModelError, match=expected) as caught:
            RewardHead.from_pretrained(folder)
        code = re.search(r"(import torch.*)\nTo read", str(caught.value), re.DOTALL)[1]
        names = {}
        exec(code, names)
        head = names["head"]
        row = load_file(folder / "model.safetensors")["mix.first.w"][0]
        reference = Reference(PLAIN[2], folder, torch.float32)
        reference.replica = replace(PLAIN[2], forward=lambda states, *_: row @ states[-1])
        pairs = make_pairs(PLAIN[2])
        texts = [(pair.prompt, pair.chosen) for pair in pairs]
        assert torch.allclose(head.score_pairs(pairs).chosen, reference.rewards(texts), atol=1e-5)
        with pytest.raises(ModelError, match=r"no class for the head OwnHead.*pass the head again"):
            head.save_pretrained(folder.parent / "saved")

    @pytest.mark.grid
    def test_a_process_reward_model_is_no_head_of_one_token(self, tmp_path):
        fields = {"architectures": ["Qwen2ForProcessRewardModel"]}
        folder = replace(LAYERED[2], fields=fields).make(tmp_path / "replica")
        with pytest.raises(ModelError):
            RewardHead.from_pretrained(folder)

    @pytest.mark.grid
    def test_a_vector_of_preferences_is_refused(self, tmp_path):
        replica = replace(
            PLAIN[2], tensors=lambda draw: {"value_head.weight": draw(6, 32), "prompt_head.weight": draw(3, 32)}
        )
        with pytest.raises(ModelError, match="a single text has no reward"):
            RewardHead.from_pretrained(replica.make(tmp_path / "replica"))

    @pytest.mark.grid
    def test_pickled_parts_are_refused_with_a_conversion(self, tmp_path):
        """LDL keeps its head in two files of torch, and untrained tensors of the same names in the model's files."""
        replica = next(replica for replica in GATED if replica.passed)
        folder = replica.make(tmp_path / "replica")
        head = load_file(folder / "passed_head.safetensors")
        state = load_file(folder / "model.safetensors") | {k: torch.randn_like(v) for k, v in head.items()}
        save_file(state, folder / "model.safetensors", {"format": "pt"})
        for part in ("regression_layer", "gating_layer"):
            own = {k.removeprefix(f"{part}."): v for k, v in head.items() if k.startswith(f"{part}.")}
            torch.save(own, folder / f"{part}.pt")
        with pytest.raises(ModelError, match=r"pickled files.*convert them once: `import") as caught:
            RewardHead.from_pretrained(folder)
        exec(re.search(r"`(.*)`", str(caught.value))[1])
        again = RewardHead.from_pretrained(
            folder, **eval(f"dict({re.search(r'head=.*safetensors.', str(caught.value))[0]})")
        )
        texts = [pair.text("chosen") for pair in make_pairs(replica)]
        expected = RewardHead.from_pretrained(folder, head=folder / "passed_head.safetensors")
        assert torch.equal(again.score(texts), expected.score(texts))


@pytest.mark.grid
def test_a_text_without_a_header_is_refused(folders):
    head = RewardHead.from_pretrained(folders(KEPT[1]))
    with pytest.raises(DataError, match=r"header of the last assistant turn.*pairs.as_chat\(\)"):
        head.score(["w1 w2"])
    assert head.outputs[:2] == ["score", "helpsteer-helpfulness"]
    assert len(head.outputs) == 20


@pytest.mark.grid
def test_the_temperature_is_a_part_of_the_fingerprint(folders, tmp_path):
    folder = folders(KEPT[1])
    other = shutil.copytree(folder, tmp_path / "other")
    fields = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(fields | {"gating_temperature": 2.0}))
    assert RewardHead.from_pretrained(folder).fingerprint != RewardHead.from_pretrained(other).fingerprint


class TestSaving:
    @pytest.mark.grid
    def test_config_and_code_stay_as_they_were(self, folders, tmp_path):
        folder = shutil.copytree(folders("MLP v_head"), tmp_path / "model")
        (folder / "modeling_custom.py").write_text("raise SystemExit('never run')")
        head = RewardHead.from_pretrained(folder, dtype=torch.bfloat16)
        head.save_pretrained(tmp_path / "saved")
        assert (tmp_path / "saved" / "modeling_custom.py").read_text() == "raise SystemExit('never run')"
        before, after = (json.loads((f / "config.json").read_text()) for f in (folder, tmp_path / "saved"))
        assert after == before | {"dtype": "bfloat16"}
        old, new = (load_file(f / "model.safetensors") for f in (folder, tmp_path / "saved"))
        assert old.keys() == new.keys()
        assert torch.equal(old["v_head.summary.0.weight"], new["v_head.summary.0.weight"])
        assert torch.equal(old["model.norm.weight"].bfloat16(), new["model.norm.weight"])

    @pytest.mark.grid
    def test_an_output_that_was_chosen_must_be_chosen_again(self, folders, tmp_path):
        head = RewardHead.from_pretrained(folders(KEPT[1]), output="code-style")
        with pytest.warns(RMTensionWarning, match=r"Open the model again with output='code-style'"):
            head.save_pretrained(tmp_path / "saved")
        again = RewardHead.from_pretrained(tmp_path / "saved", output="code-style")
        pairs = make_pairs(KINDS[KEPT[1]])
        assert torch.equal(again.score_pairs(pairs).margin, head.score_pairs(pairs).margin)

    @pytest.mark.grid
    def test_a_weighted_sum_of_outputs_must_be_made_again(self, folders, tmp_path):
        weights = {"code-style": 1.0, "code-complexity": -0.5}
        head = RewardHead.from_pretrained(folders(KEPT[1]), output="all").output(weights)
        every = torch.zeros(head.n_layers, head.n_neurons("mlp"), dtype=torch.bool)
        for saved in (head, head.with_ablation(NeuronSet(every, "mlp", head.architecture))):
            with pytest.warns(RMTensionWarning) as warned:
                saved.save_pretrained(tmp_path / "saved")
            assert f"output='all', and call .output({weights})" in str(warned[0].message)
        single = head.output({"code-style": 1.0}).output("code-complexity")
        assert single.weighted_sums == head.weighted_sums, "the sum of one output is that output"
        again = RewardHead.from_pretrained(tmp_path / "saved", output="all").output(weights)
        pairs = make_pairs(KINDS[KEPT[1]])
        assert torch.equal(again.score_pairs(pairs).margin, head.score_pairs(pairs).margin)

    @pytest.mark.parametrize(
        "kind", grid(["quantiles, second version", "normalised score head (reward)", "mean of rows"])
    )
    def test_a_model_that_was_only_opened_is_saved_as_it_was_read(self, kind, folders, tmp_path):
        """Heads are computed in float64 and run in float32, and are the same head still."""
        pairs, options = make_pairs(KINDS[kind]), KINDS[kind].open_options(folders(kind))
        head = RewardHead.from_pretrained(folders(kind), **options)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RMTensionWarning)
            head.save_pretrained(tmp_path / "saved")
        fields = [json.loads((folder / "config.json").read_text()) for folder in (folders(kind), tmp_path / "saved")]
        assert fields[0]["architectures"] == fields[1]["architectures"]
        again = RewardHead.from_pretrained(tmp_path / "saved", **options)
        assert torch.equal(again.score_pairs(pairs).margin, head.score_pairs(pairs).margin)

    @pytest.mark.parametrize("kind", grid(["trl value head", "separate value head", "body under another name"]))
    def test_an_edited_row_is_saved_and_not_the_one_that_was_read(self, kind, folders, tmp_path):
        pairs, options = make_pairs(KINDS[kind]), KINDS[kind].open_options(folders(kind))
        head = RewardHead.from_pretrained(folders(kind), **options)
        change = torch.linspace(-1, 1, head.d_model, dtype=torch.float64)
        edited = Edit("row", head.fingerprint, head.architecture, row=change).apply(head)
        expected = edited.score_pairs(pairs)
        assert (expected.margin - head.score_pairs(pairs).margin).abs().max() > 1e-2
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RMTensionWarning)
            edited.save_pretrained(tmp_path / "saved")  # as a classifier, some with a bias
            again = RewardHead.from_pretrained(tmp_path / "saved").score_pairs(pairs)
        assert (again.margin - expected.margin).abs().max() < 1e-5

    @pytest.mark.grid
    def test_the_original_files_are_needed(self, folders, tmp_path):
        folder = shutil.copytree(folders("trl value head"), tmp_path / "model")
        head = RewardHead.from_pretrained(folder)
        before = head.score(["w1 w2"])
        head.save_pretrained(folder)  # over itself
        assert torch.equal(RewardHead.from_pretrained(folder).score(["w1 w2"]), before)
        shutil.rmtree(folder)
        with pytest.raises(ModelError, match="files that the model was read from are needed"):
            head.save_pretrained(tmp_path / "saved")


class LayeredModel(transformers.LlamaPreTrainedModel):
    """A class of the user with a head of two layers; its activation is in its code only."""

    def __init__(self, config, activation=torch.relu):
        super().__init__(config)
        self.model = transformers.LlamaModel(config)
        self.score = torch.nn.Sequential(torch.nn.Linear(32, 24), torch.nn.ReLU(), torch.nn.Linear(24, 1))
        self.activation = activation

    def forward(self, input_ids, attention_mask=None):
        states = self.model(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state[:, -1]
        logits = self.score[2](self.activation(self.score[0](states)))
        return transformers.modeling_outputs.SequenceClassifierOutput(logits=logits)


@pytest.mark.grid
def test_a_model_of_an_own_class_is_compared_with_its_logits(tokenizer):
    config = LAYERED[0].config()
    torch.manual_seed(0)
    model = LayeredModel(config).eval()
    head = RewardHead.from_classifier(model)
    ids = torch.tensor([[5, 9, 1, 7]])
    with torch.no_grad():
        assert torch.allclose(head.score_tokens(ids), model(ids).logits[:, 0], atol=1e-6)
    with pytest.raises(ModelError, match="its code computes something else"):
        RewardHead.from_classifier(LayeredModel(config, torch.tanh).eval())
    model.extra = torch.nn.Linear(3, 3)
    model.score = torch.nn.Bilinear(32, 32, 1)
    with pytest.raises(ModelError, match=r"(?s)score.weight \[1, 32, 32\].*model.state_dict\(\)"):
        RewardHead.from_classifier(model)


@pytest.mark.grid
@pytest.mark.parametrize("kind", ["own class", "encoder with a pooler"])
def test_a_head_in_memory_that_is_trained_is_noticed(kind):
    """Heads of several modules are copies. The body is not, so training it alone is followed."""
    torch.manual_seed(0)
    if kind == "own class":
        model = LayeredModel(LAYERED[0].config()).eval()
        trained = model.score[0]
    else:
        model = make_native("deberta-v2", 64)
        trained = model.pooler.dense
    ids = torch.tensor([[5, 9, 1, 7]])

    def train(module):
        optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
        model(input_ids=ids).logits.sum().backward()
        optimizer.step()
        model.zero_grad()

    def logits():
        with torch.no_grad():
            return model(input_ids=ids).logits[:, 0]

    head = RewardHead.from_classifier(model)
    before = logits()
    assert torch.allclose(head.score_tokens(ids), before, atol=1e-5)
    train(model.base_model)
    assert (logits() - before).abs() > 1e-3
    assert torch.allclose(head.score_tokens(ids), logits(), atol=1e-5)
    train(trained)
    for _ in range(2):
        with pytest.raises(ModelError, match=r"score layer changed after the model was opened.*from_classifier"):
            head.score_tokens(ids)
    assert torch.allclose(RewardHead.from_classifier(model).score_tokens(ids), logits(), atol=1e-5)
