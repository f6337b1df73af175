"""The site `expert`: what its hooks see and change, that nothing is left of them, and which models are refused."""

import accelerate
import peft
import pytest
import torch
import transformers
from expert_reference import ExpertReference
from tiny_models import grid

from rmtension import AblationContext, ActivationCollector, NeuronSet, RewardHead, Scale
from rmtension.bodies import _experts
from rmtension.errors import ModelError, OptionError
from rmtension.synthetic.check_matrix import make_classifier

SMALL = {"num_hidden_layers": 2, "intermediate_size": 24}
FAMILIES = ["mixtral", "qwen2_moe", "qwen3_moe", "gpt_oss"]
TEXTS = ["Human: a Assistant: sure", "Human: why b Assistant: no such thing is known", "a"]


def save(folder, family, tokenizer, **changes):
    make_classifier(family, len(tokenizer) + 8, **SMALL, **changes).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module", params=grid(FAMILIES))
def folder(request, tmp_path_factory, plain_tokenizer):
    return save(tmp_path_factory.mktemp(request.param), request.param, plain_tokenizer)


@pytest.fixture(scope="module")
def head(folder):
    return RewardHead.from_pretrained(folder, dtype=torch.float64)


@pytest.fixture(scope="module")
def reference(folder):
    return ExpertReference(folder)


def ids_of(reference, text):
    return reference.tokenizer(text, return_tensors="pt")["input_ids"]


def modules_of_experts(head):
    return [module for module in head.body.modules() if _experts.is_experts(module)]


def seen_by(head, text):
    """What hooks see of one text, [layer, token, neuron]."""
    seen = {}
    with head.hooks("expert", lambda layer, values: seen.setdefault(layer, values.detach().clone())):
        head.score([text])
    return torch.stack([seen[layer].reshape(-1, head.n_neurons("expert")) for layer in range(head.n_layers)])


def test_hooks_see_and_replace_the_neurons_of_a_dense_computation(head, reference):
    """Float64, but some norms are float32 in every dtype: 1e-6."""
    assert head.n_neurons("expert") == reference.n_experts * reference.d_expert
    random = torch.Generator().manual_seed(0)
    factors = torch.rand(head.n_layers, head.n_neurons("expert"), generator=random, dtype=torch.float64)
    for text in TEXTS:
        ids = ids_of(reference, text)
        with torch.no_grad():
            plain = reference.reward(ids)
            with reference.hooked("expert", lambda layer, values: None):
                assert torch.allclose(reference.reward(ids), plain, atol=1e-6), "the reference is transformers"
            with reference.hooked("expert", lambda layer, values: 0.3 + values * factors[layer]):
                changed = reference.reward(ids)
        assert torch.allclose(head.score([text]), plain[None], atol=1e-6)
        expected = reference.activations("expert", ids)
        assert torch.allclose(seen_by(head, text), expected, atol=1e-6)
        with head.hooks("expert", lambda layer, values: 0.3 + values * factors[layer]):
            assert torch.allclose(head.score([text]), changed[None], atol=1e-6)
        assert (changed - plain).abs() > 1e-3
        # Negative control: neurons of the next expert.
        assert not torch.allclose(expected.roll(reference.d_expert, 2), expected)


def test_a_reference_without_routing_weights_is_another_model(folder, reference):
    """Negative control of the reference."""
    wrong = ExpertReference(folder, weighted=False)
    ids = ids_of(reference, TEXTS[1])
    with torch.no_grad(), wrong.hooked("expert", lambda layer, values: None):
        assert (wrong.reward(ids) - reference.reward(ids)).abs() > 1e-3


def test_an_expert_that_is_not_routed_to_is_zero_and_cannot_be_written(head, reference):
    text = TEXTS[1]
    ids = ids_of(reference, text)
    reference.activations("expert", ids)
    with reference.hooked("expert", lambda layer, values: None), torch.no_grad():
        reference.reward(ids)
    off = torch.stack([~reference.routed[layer].cpu() for layer in range(head.n_layers)]).repeat_interleave(
        reference.d_expert, 2
    )
    assert 0.2 < off.double().mean() < 0.8
    assert not seen_by(head, text)[off].any()
    plain = head.score([text])

    def write(layer, values):
        return torch.where(off[layer].view(values.shape), 1e3, values)

    with head.hooks("expert", write):
        assert torch.equal(head.score([text]), plain)
    # Negative control: the same where tokens are routed.
    with head.hooks("expert", lambda layer, values: torch.where(off[layer].view(values.shape), values, 1e3)):
        assert (head.score([text]) - plain).abs() > 1e-3


def test_nothing_is_left_of_the_hooks(head):
    experts = modules_of_experts(head)
    plain = head.score(TEXTS)

    def fail(layer, values):
        raise RuntimeError("in a hook")

    with head.hooks("expert", fail):
        assert any("forward" in vars(module) for module in experts)
        with pytest.raises(RuntimeError, match="in a hook"):
            head.score(TEXTS)
    assert not any("forward" in vars(module) for module in experts)
    # Contexts that end in the order in which they began.
    first, second = (head.hooks("expert", lambda layer, values: 0.5 * values) for _ in range(2))
    first.__enter__()
    once = head.score(TEXTS)
    second.__enter__()
    twice = head.score(TEXTS)
    first.__exit__()
    assert torch.equal(head.score(TEXTS), once)
    second.__exit__()
    assert not any("forward" in vars(module) for module in experts)
    assert torch.equal(head.score(TEXTS), plain)
    assert len({float(rewards[0]) for rewards in (plain, once, twice)}) == 3


def test_a_replaced_forward_is_refused(head):
    module = modules_of_experts(head)[0]
    module.forward = type(module).forward.__get__(module)
    try:
        with pytest.raises(ModelError, match=r"forward of a .*Experts was replaced.*del module.forward"):
            head.hooks("expert", lambda layer, values: None).__enter__()
    finally:
        del module.forward
    assert head.score(TEXTS).isfinite().all()


@pytest.mark.grid
def test_the_bridge_shows_the_same_neurons(head):
    """With a hook of the user's, the bridge runs; it computes softmax in float32."""
    name = "blocks.0.hook_resid_pre" if "blocks.0.hook_resid_pre" in head.model.hook_dict else "embed.hook_out"
    half = AblationContext(head, NeuronSet(torch.rand(2, head.n_neurons("expert")) < 0.5, "expert", head.architecture))
    seen = seen_by(head, TEXTS[1])
    with half:
        ablated = head.score(TEXTS)
    with head.model.hooks(fwd_hooks=[(name, lambda value, hook: value)]):
        assert not head.body.runs_native
        assert torch.allclose(seen_by(head, TEXTS[1]), seen, atol=1e-5)
        with half:
            assert torch.allclose(head.score(TEXTS), ablated, atol=1e-5)
    assert (ablated - head.score(TEXTS)).abs().max() > 1e-3


@pytest.mark.grid
def test_half_precision_and_check(folder):
    for dtype in (torch.float32, torch.bfloat16):
        head = RewardHead.from_pretrained(folder, dtype=dtype)
        plain = head.score(TEXTS)
        with head.hooks("expert", lambda layer, values: None):
            assert torch.allclose(head.score(TEXTS), plain, atol=1e-6 if dtype == torch.float32 else 0.02)
        table = head.check().set_index("check")
        assert table["passed"].all()
        assert {"hooks, expert", "zeroing, expert"} <= set(table.index)


def test_two_heads_on_one_model(plain_tokenizer):
    """They share modules, so the hooks of both run, and each context removes only its own."""
    classifier = make_classifier("mixtral", len(plain_tokenizer), **SMALL)
    heads = [RewardHead.from_classifier(classifier, tokenizer=plain_tokenizer) for _ in range(2)]
    neurons = NeuronSet(torch.ones(2, 96, dtype=torch.bool), "expert", heads[0].architecture)
    plain = heads[0].score(TEXTS)
    with AblationContext(heads[1], neurons, Scale(0.25)):
        quarter = heads[0].score(TEXTS)
    first, second = (AblationContext(head, neurons, Scale(0.5)) for head in heads)
    with first:
        half = heads[1].score(TEXTS)
        with second:
            assert torch.equal(heads[0].score(TEXTS), quarter)
        assert torch.equal(heads[1].score(TEXTS), half)
    assert torch.equal(heads[1].score(TEXTS), plain)
    assert len({float(rewards[0]) for rewards in (plain, half, quarter)}) == 3


def test_a_computation_that_differs_is_refused_on_opening(plain_tokenizer, monkeypatch):
    """Experts that scale their output in a way the library does not know."""
    kind = type(make_classifier("mixtral", 64, **SMALL).model.layers[0].mlp.experts)
    forward = kind.forward
    monkeypatch.setattr(kind, "forward", lambda self, *args: 1.01 * forward(self, *args))
    head = RewardHead.from_classifier(
        make_classifier("mixtral", len(plain_tokenizer), **SMALL), tokenizer=plain_tokenizer
    )
    assert head.sites == ["attn_head"]
    with pytest.raises(ModelError, match=r"MixtralExperts\) compute something else.*off by 9\.9e-03.*'attn_head'"):
        head.n_neurons("expert")


def test_what_the_site_cannot_do_says_so(head, plain_tokenizer):
    neurons = NeuronSet(torch.ones(2, head.n_neurons("expert"), dtype=torch.bool), "expert", head.architecture)
    with pytest.raises(OptionError, match="no hook point on the neurons of experts"):
        head.fwd_hooks(neurons)
    for site in ("mlp", "mlp_gate"):
        with pytest.raises(ModelError, match=r"mixture of experts.*Use site 'expert'"):
            head.n_neurons(site)
    dense = RewardHead.from_classifier(make_classifier("gpt2", len(plain_tokenizer)), tokenizer=plain_tokenizer)
    with pytest.raises(ModelError, match=r"layer 0 is no mixture of experts.*Use site 'mlp'"):
        dense.n_neurons("expert")


@pytest.mark.grid
def test_a_language_model_with_a_head_of_its_own(tmp_path, plain_tokenizer):
    """OLMoE, for which transformers has no sequence classifier."""
    config = transformers.OlmoeConfig(
        vocab_size=len(plain_tokenizer), hidden_size=32, num_hidden_layers=2, num_attention_heads=4, pad_token_id=1,
        intermediate_size=24, num_experts=4, num_experts_per_tok=2, max_position_embeddings=96,
    )  # fmt: skip
    transformers.OlmoeForCausalLM(config).save_pretrained(tmp_path)
    plain_tokenizer.save_pretrained(tmp_path)
    weight = torch.randn(32, generator=torch.Generator().manual_seed(0))
    head = RewardHead.from_pretrained(tmp_path, head=weight, dtype=torch.float64)
    assert head.architecture == "olmoe-2x4x24-heads4x8-d32"
    assert head.check()["passed"].all()
    neurons = NeuronSet(torch.rand(2, 96) < 0.5, "expert", head.architecture)
    with AblationContext(head, neurons):
        ablated = head.score(TEXTS)
    assert torch.allclose(head.with_ablation(neurons).score(TEXTS), ablated, atol=1e-12)
    assert (ablated - head.score(TEXTS)).abs().max() > 1e-3


@pytest.mark.grid
@pytest.mark.parametrize(
    ("family", "match"),
    [
        ("deepseek_v3", "layer 0 is no mixture of experts, and this site needs experts in every layer"),
        ("jetmoe", "experts of layer 0 are of a kind that this library cannot split"),
    ],
)
def test_other_mixtures_are_refused(family, match, plain_tokenizer):
    head = RewardHead.from_classifier(make_classifier(family, len(plain_tokenizer)), tokenizer=plain_tokenizer)
    assert "expert" not in head.sites
    with pytest.raises(ModelError, match=match):
        ActivationCollector(head, site="expert")


def test_experts_of_transformers_4_are_named():
    """There, every expert is a module of its own."""
    block = torch.nn.Module()
    block.experts = torch.nn.ModuleList([torch.nn.Linear(2, 2)])
    with pytest.raises(ModelError, match=r"layer 3 are single modules, as in transformers 4.*Install transformers 5"):
        _experts.expert_point(block, 3)


@pytest.mark.grid
def test_experts_that_accelerate_wraps(folder):
    """A `device_map` wraps `forward`; the wrapper stays as it is."""
    head = RewardHead.from_pretrained(folder, dtype=torch.float32)
    neurons = NeuronSet(torch.rand(2, head.n_neurons("expert")) < 0.5, "expert", head.architecture)
    again = RewardHead.from_pretrained(folder, dtype=torch.float32)
    experts = modules_of_experts(again)
    calls = []

    class Counting(accelerate.hooks.ModelHook):
        def pre_forward(self, module, *args, **kwargs):
            calls.append(module)
            return args, kwargs

    for module in experts:
        accelerate.hooks.add_hook_to_module(module, Counting())
    kept = [module._old_forward for module in experts]
    with AblationContext(head, neurons), AblationContext(again, neurons):
        expected = head.score(TEXTS)
        assert torch.equal(again.score(TEXTS), expected)
    assert {id(module) for module in calls} <= {id(module) for module in experts}
    assert calls
    assert [module._old_forward for module in experts] == kept
    assert (head.score(TEXTS) - expected).abs().max() > 1e-3


@pytest.mark.grid
@pytest.mark.filterwarnings("ignore::FutureWarning")  # of peft
def test_adapters_on_experts(plain_tokenizer):
    """peft computes adapted parameters while their module runs, and wraps the module once for each parameter."""
    adapted = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    config = peft.LoraConfig(
        r=2, target_modules=["q_proj"], target_parameters=adapted, task_type="SEQ_CLS", init_lora_weights=False
    )
    classifier = make_classifier("mixtral", len(plain_tokenizer) + 8, **SMALL)
    model = peft.get_peft_model(classifier, config).eval()
    with torch.no_grad():
        expected = torch.stack([model(**plain_tokenizer(text, return_tensors="pt")).logits[0, 0] for text in TEXTS])
        with model.disable_adapter():
            before = model(**plain_tokenizer(TEXTS[0], return_tensors="pt")).logits[0, 0]
    assert (expected[0] - before).abs() > 1e-2
    head = RewardHead.from_classifier(model, tokenizer=plain_tokenizer)
    with head.hooks("expert", lambda layer, values: None):
        assert torch.allclose(head.score(TEXTS), expected, atol=1e-5)
    neurons = NeuronSet(torch.rand(2, 96) < 0.5, "expert", head.architecture)
    with AblationContext(head, neurons):
        ablated = head.score(TEXTS)
    assert torch.allclose(head.with_ablation(neurons).score(TEXTS), ablated, atol=1e-5)
    assert (ablated - expected).abs().max() > 1e-3


@pytest.mark.grid
@pytest.mark.parametrize(
    ("family", "architecture"),
    [
        ("phimoe", "phimoe-2x4x24-heads4x8-d32"),
        # Its layers have a shared MLP besides, which is the site `mlp`.
        ("hunyuan_v1_moe", "hunyuanv1moe-2x4x24-mlp24-heads4x8-d32"),
    ],
)
def test_families_without_a_bridge(family, architecture, plain_tokenizer):
    config = transformers.AutoConfig.for_model(
        family, vocab_size=len(plain_tokenizer), hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, intermediate_size=24, num_labels=1, pad_token_id=1, bos_token_id=0,
        eos_token_id=0, max_position_embeddings=96, num_experts=4, num_local_experts=4, num_experts_per_tok=2,
    )  # fmt: skip
    torch.manual_seed(0)
    classifier = transformers.AutoModelForSequenceClassification.from_config(config).eval()
    with torch.no_grad():
        for parameter in classifier.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
        rows = [plain_tokenizer(text, return_tensors="pt")["input_ids"] for text in TEXTS]
        expected = torch.stack([classifier(input_ids=row, use_cache=False).logits[0, 0] for row in rows])
    head = RewardHead.from_classifier(classifier, tokenizer=plain_tokenizer)
    assert head.architecture == architecture
    with head.hooks("expert", lambda layer, values: None):
        assert torch.allclose(head.score(TEXTS), expected, atol=1e-5)
    table = head.check()
    assert {"layers", "hooks, expert"} <= set(table["check"])
    neurons = NeuronSet(torch.rand(2, 96) < 0.5, "expert", head.architecture)
    assert list(neurons.to_frame().columns) == ["layer", "neuron", "expert", "index"]
    with AblationContext(head, neurons):
        ablated = head.score(TEXTS)
    assert torch.allclose(head.with_ablation(neurons).score(TEXTS), ablated, atol=1e-5)
    assert (ablated - expected).abs().max() > 1e-3
