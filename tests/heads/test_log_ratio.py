"""Log-likelihood ratios equal those from transformers' own logits, their gradients autograd's, in little memory."""

import copy
from types import SimpleNamespace

import pytest
import torch
import transformers
from reference import DEVICE
from tiny_models import EOS, grid, make_config, make_pairs, make_tokenizer, put_bos_first, save_drawn

from rmtension import AblationContext, Mean, NeuronAttribution, NeuronSet, PreferencePairs, RewardHead
from rmtension.attribution._single_effects import single_neuron_effects
from rmtension.errors import DataError, ModelError, OptionError, RMTensionWarning
from rmtension.heads import LogRatioHead
from rmtension.heads import _log_ratio_head as module
from rmtension.heads import _vocabulary as vocabulary
from rmtension.heads._vocabulary import Unembedding, log_probs
from rmtension.interventions import score_without

# Families whose logits are scaled, capped, have a bias, or come from a tied or an untied unembedding.
SCALED = {
    "gemma2": (transformers.Gemma2Config, {"head_dim": 8, "final_logit_softcapping": 3.0}),
    "cohere": (transformers.CohereConfig, {"logit_scale": 0.25}),
    "granite": (transformers.GraniteConfig, {"logits_scaling": 4.0}),
    "phi": (transformers.PhiConfig, {}),
    "olmo2": (transformers.Olmo2Config, {"tie_word_embeddings": True}),
    "mistral": (transformers.MistralConfig, {"sliding_window": None}),
}


def save_model(folder, family, tokenizer, *, seed=0, **changes):
    """A causal language model with weights that make its probabilities differ visibly."""
    if family in SCALED:
        kind, more = SCALED[family]
        sizes = {
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 96,
            "vocab_size": len(tokenizer),
            "pad_token_id": 1,
            "bos_token_id": 0,
            "eos_token_id": 0,
        }
        config = kind(**sizes | more | changes)
    else:
        config = make_config(family, len(tokenizer), **changes)
    return save_drawn(folder, transformers.AutoModelForCausalLM, config, tokenizer, seed=seed)


@pytest.fixture(scope="module")
def policy(tmp_path_factory, tokenizer):
    return save_model(tmp_path_factory.mktemp("policy"), "gpt2", tokenizer)


@pytest.fixture(scope="module")
def reference(tmp_path_factory, tokenizer):
    """Of another family, width and depth, with the same tokenizer."""
    folder = tmp_path_factory.mktemp("reference")
    return save_model(folder, "llama", tokenizer, seed=1, hidden_size=16, num_hidden_layers=2)


def log_likelihoods(folder, texts, *, average=False, shift=0):
    """The sum over the response of log-softmax values of transformers' logits; `texts` are (prompt, response)."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64).eval().to(DEVICE)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    found = []
    for prompt, response in texts:
        ids = tokenizer(prompt + response, return_tensors="pt")["input_ids"]
        first = len(tokenizer(prompt)["input_ids"])
        assert ids[0, :first].tolist() == tokenizer(prompt)["input_ids"]
        with torch.no_grad():
            of_all = model(input_ids=ids.to(DEVICE)).logits[0].log_softmax(dim=-1).cpu()
        each = of_all[torch.arange(first - 1 - shift, ids.shape[1] - 1 - shift), ids[0, first:]]
        found.append(each.mean() if average else each.sum())
    return torch.stack(found)


def both(pairs, side):
    return [(pair.prompt, " " + getattr(pair, side)) for pair in pairs]


def test_log_probs_equal_log_softmax_and_their_gradients_autograds(monkeypatch):
    """In blocks of 4 tokens and 5 entries; scaled, capped and with a bias; in float64."""
    monkeypatch.setattr(vocabulary, "_TOKENS", 4)
    monkeypatch.setattr(vocabulary, "_ENTRIES", 5)
    generator = torch.Generator().manual_seed(0)
    states, weight, bias = (torch.randn(*size, generator=generator).double() for size in ((11, 6), (17, 6), (17,)))
    targets = torch.randint(17, (11,), generator=generator)
    outside = torch.randn(11, generator=generator).double()
    for scale, cap, shift in ((1.0, None, None), (0.3, None, bias), (2.0, 1.5, bias)):
        inputs = states.clone().requires_grad_()
        plain = scale * (inputs @ weight.T + (0 if shift is None else shift))
        logits = plain if cap is None else cap * torch.tanh(plain / cap)
        expected = logits.log_softmax(dim=1)[torch.arange(11), targets]
        (slope,) = torch.autograd.grad((expected * outside).sum(), inputs)
        found = log_probs(inputs, Unembedding(SimpleNamespace(weight=weight, bias=shift), scale, cap), targets)
        (own,) = torch.autograd.grad((found * outside).sum(), inputs)
        assert torch.allclose(found, expected, atol=1e-13)
        assert torch.allclose(own, slope, atol=1e-13)
        # Negative control: without the scale or the cap they differ.
        other = log_probs(inputs, Unembedding(SimpleNamespace(weight=weight, bias=shift), 1.1 * scale, None), targets)
        assert float((other - expected).detach().abs().max()) > 1e-3


@pytest.mark.parametrize("family", grid(["gpt2", "llama", "gpt_neox", *SCALED]))
@pytest.mark.parametrize("average", grid([False, True]))
def test_rewards_equal_those_from_transformers_logits(family, average, tmp_path, tokenizer, reference):
    folder = save_model(tmp_path / family, family, tokenizer)
    pairs = make_pairs(6)
    model = RewardHead.from_pretrained(
        folder, head=LogRatioHead(reference, beta=0.1, average=average), dtype=torch.float64
    )
    scored = model.score_pairs(pairs)
    for side in ("chosen", "rejected"):
        of_policy, of_reference = (log_likelihoods(f, both(pairs, side), average=average) for f in (folder, reference))
        # Norms and the cap are float32 in some families, whatever the dtype.
        expected = 0.1 * (of_policy - of_reference)
        assert torch.allclose(getattr(scored, side), expected, atol=2e-6 if family in SCALED else 1e-8), family
    # Negative control: logits of one token earlier give other numbers.
    early = 0.1 * log_likelihoods(folder, both(pairs, "rejected"), average=average, shift=1) - 0.1 * of_reference
    assert float((early - scored.rejected).abs().max()) > 1e-3
    assert scored.provenance.positions == "response"


def test_the_first_read_token_is_the_last_of_the_prompt(policy):
    """One response token: the margin is the difference of two next-token logits, whatever the normalisation."""
    pairs = PreferencePairs.from_records(
        [
            {"prompt": "first bake a", "chosen": "cake", "rejected": "python"},
            {"prompt": "how do", "chosen": "i", "rejected": "a"},
        ]
    )
    scored = RewardHead.from_pretrained(policy, head=LogRatioHead(), dtype=torch.float64).score_pairs(pairs)
    model = transformers.AutoModelForCausalLM.from_pretrained(policy, dtype=torch.float64).eval().to(DEVICE)
    tokenizer = transformers.AutoTokenizer.from_pretrained(policy)
    for number, pair in enumerate(pairs):
        ids = [tokenizer(" " + response)["input_ids"] for response in (pair.chosen, pair.rejected)]
        assert list(map(len, ids)) == [1, 1]
        with torch.no_grad():
            logits = model(**tokenizer(pair.prompt, return_tensors="pt").to(DEVICE)).logits[0, -1].cpu()
        assert float(scored.margin[number] - (logits[ids[0][0]] - logits[ids[1][0]])) == pytest.approx(0, abs=1e-10)


def test_attribution_and_ablation_equal_autograd_and_plain_hooks(policy, reference):
    pairs = make_pairs(4)
    model = RewardHead.from_pretrained(policy, head=LogRatioHead(reference, beta=0.5), dtype=torch.float64)
    scores = NeuronAttribution(model, "gradient_x_activation").score(pairs).values
    neurons = NeuronSet(
        torch.rand(scores.shape, generator=torch.Generator().manual_seed(0)) < 0.2, "mlp", model.architecture
    )
    with AblationContext(model, neurons):
        ablated = model.score_pairs(pairs)
    plain = transformers.AutoModelForCausalLM.from_pretrained(policy, dtype=torch.float64).eval().to(DEVICE)
    tokenizer, blocks = model.tokenizer, plain.transformer.h

    def run(pair, change):
        """The margin of the policy's log-likelihoods, with `change(layer, activation)` at every MLP's neurons."""
        handles = [
            block.mlp.c_proj.register_forward_pre_hook(lambda _, inputs, layer=layer: (change(layer, inputs[0]),))
            for layer, block in enumerate(blocks)
        ]
        sides = []
        for side in ("chosen", "rejected"):
            ids = tokenizer(f"{pair.prompt} {getattr(pair, side)}", return_tensors="pt")["input_ids"].to(DEVICE)
            first = len(tokenizer(pair.prompt)["input_ids"])
            chosen = plain(input_ids=ids).logits[0, first - 1 : -1].log_softmax(dim=1)
            sides.append(chosen.gather(1, ids[0, first:, None]).sum())
        for handle in handles:
            handle.remove()
        return 0.5 * (sides[0] - sides[1])

    expected = torch.zeros_like(scores)
    for pair in pairs:
        seen = []

        def keep(layer, activation, seen=seen):
            seen.append((layer, activation if activation.requires_grad else activation.detach().requires_grad_()))
            return seen[-1][1]

        margin = run(pair, keep)
        slopes = torch.autograd.grad(margin, [activation for _, activation in seen])
        for (layer, activation), slope in zip(seen, slopes, strict=True):
            expected[layer] += (activation * slope)[0].sum(dim=0).detach().cpu() / len(pairs)
    assert float(expected.abs().max()) > 1e-3
    assert torch.allclose(scores, expected, atol=1e-9)
    mask = neurons.mask.to(DEVICE)
    before = model.score_pairs(pairs)
    with torch.no_grad():
        whole = torch.stack([run(pair, lambda _, activation: activation) for pair in pairs]).cpu()
        without = torch.stack([run(pair, lambda layer, a: a.masked_fill(mask[layer], 0.0)) for pair in pairs]).cpu()
    assert torch.allclose(ablated.margin - before.margin, without - whole, atol=1e-9)
    assert float((without - whole).abs().max()) > 1e-2


@pytest.mark.grid
def test_sweeps_single_effects_and_exports_equal_the_ablation(policy, reference, tmp_path):
    pairs = make_pairs(6)
    model = RewardHead.from_pretrained(policy, head=LogRatioHead(reference), dtype=torch.float64)
    generator = torch.Generator().manual_seed(0)
    shape = (model.n_layers, model.n_neurons("mlp"))
    sets = [NeuronSet(torch.rand(shape, generator=generator) < 0.3, "mlp", model.architecture) for _ in range(2)]
    inside = []
    for neurons in sets:
        with AblationContext(model, neurons):
            inside.append(model.score_pairs(pairs).margin)
    swept = score_without(model, pairs, sets)
    for one, other in zip(swept, inside, strict=True):
        assert torch.allclose(one.margin, other, atol=1e-10)
    few = torch.zeros(shape, dtype=torch.bool)
    few[1, :3] = True
    single = single_neuron_effects(model, pairs, neurons=NeuronSet(few, "mlp", model.architecture))
    with AblationContext(model, NeuronSet(few & (torch.arange(shape[1]) == 1), "mlp", model.architecture)):
        one = model.score_pairs(pairs).margin
    effect = (one - model.score_pairs(pairs).margin).mean()
    assert float(single.values[1, 1] - effect) == pytest.approx(0, abs=1e-10)
    edited = model.with_ablation(sets[0])
    assert torch.allclose(edited.score_pairs(pairs).margin, inside[0], atol=1e-10)
    assert edited.fingerprint != model.fingerprint
    with pytest.warns(RMTensionWarning, match=r"without its reference.*LogRatioHead\(reference, beta=1\)"):
        edited.save_pretrained(tmp_path / "edited")
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "edited")
    assert type(loaded).__name__ == "GPT2LMHeadModel"
    again = RewardHead.from_pretrained(tmp_path / "edited", head=LogRatioHead(reference), dtype=torch.float64)
    assert torch.allclose(again.score_pairs(pairs).margin, inside[0], atol=1e-10)


@pytest.mark.grid
@pytest.mark.parametrize("family", ["gpt2", "llama", "gpt_neox", *SCALED])
def test_checks_pass_and_saved_models_score_the_same(family, tmp_path, tokenizer, reference):
    folder = save_model(tmp_path / "policy", family, tokenizer)
    pairs = make_pairs(4)
    model = RewardHead.from_pretrained(folder, head=LogRatioHead(reference, beta=0.3))
    table = model.check(pairs)
    assert "equal to transformers" in set(table["check"])
    assert model.check()["passed"].all()
    with pytest.warns(RMTensionWarning, match="reference"):
        model.save_pretrained(tmp_path / "saved")
    again = RewardHead.from_pretrained(tmp_path / "saved", head=LogRatioHead(reference, beta=0.3))
    assert torch.allclose(again.score_pairs(pairs).margin, model.score_pairs(pairs).margin, atol=1e-6)
    plain = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    original = transformers.AutoModelForCausalLM.from_pretrained(folder)
    ids = torch.tensor([[5, 9, 40, 7]])
    with torch.no_grad():
        assert torch.allclose(plain(ids).logits, original(ids).logits, atol=1e-6)


@pytest.mark.grid
def test_the_unembedding_is_shared_and_its_logits_stay_few(policy, reference, monkeypatch):
    model = RewardHead.from_pretrained(policy, head=LogRatioHead(reference))
    own = model.head.unembedding.weight
    assert own.data_ptr() == model.checkpoint.base.get_input_embeddings().weight.data_ptr()
    assert model.output(0).head.unembedding.weight is own
    assert copy.deepcopy(model.head).opened_reference is model.head.opened_reference
    seen = []
    plain = Unembedding.logits
    monkeypatch.setattr(vocabulary, "_ENTRIES", 50)
    monkeypatch.setattr(
        Unembedding, "logits", lambda self, states, entries: seen.append(len(states)) or plain(self, states, entries)
    )
    pairs = make_pairs(3)
    encoded = model.encode(pairs)
    NeuronAttribution(model, "attribution_patching").score(pairs)
    blocks = -(-len(own) // 50)
    # Forward and backward of the policy, forward of the reference: each token before one of the response, per block.
    assert sum(seen) <= 3 * blocks * encoded.n_response_tokens
    assert max(seen) <= encoded.n_response_tokens


@pytest.mark.grid
def test_the_reference_runs_once_per_batch_and_is_never_ablated(policy, reference, monkeypatch):
    model = RewardHead.from_pretrained(policy, head=LogRatioHead(reference), tokens_per_batch=10_000)
    other = model.head.opened_reference
    runs = []
    plain = other.body.residual
    monkeypatch.setattr(other.body, "residual", lambda batch: runs.append(1) or plain(batch))
    pairs = make_pairs(6)
    first = model.score_pairs(pairs)
    n_batches = len(runs)
    assert n_batches <= 2  # packed and not packed
    neurons = NeuronSet(torch.ones(model.n_layers, 64, dtype=torch.bool), "mlp", model.architecture)
    score_without(model, pairs, [neurons, neurons])
    NeuronAttribution(model, "integrated_gradients", steps=4).score(pairs)
    assert len(runs) <= 3 * n_batches
    assert torch.equal(model.score_pairs(pairs).margin, first.margin)
    # The fingerprint covers the reference, whose weights the reward depends on.
    before = model.fingerprint
    with torch.no_grad():
        next(other.body.module.parameters()).add_(torch.randn(1))
    assert model.fingerprint != before
    assert not torch.equal(model.score_pairs(pairs).margin, first.margin)


def test_a_reference_with_other_tokens_is_refused(policy, reference, tmp_path, tokenizer):
    swapped = make_tokenizer(tmp_path / "swapped")
    ids = dict(swapped.get_vocab())
    first, second = (swapped.convert_ids_to_tokens(number) for number in (40, 41))
    ids[first], ids[second] = ids[second], ids[first]
    other = SimpleNamespace(get_vocab=lambda: ids)
    with pytest.raises(ModelError, match=r"reference: expected.*same tokenizer.*2 of \d+ tokens.*token 40 is"):
        module.require_same_tokens(tokenizer, other)
    # A token that was added to one of the two is no difference.
    added = make_tokenizer(tmp_path / "added")
    added.add_tokens(["<extra>"])
    module.require_same_tokens(added, tokenizer)
    module.require_same_tokens(tokenizer, added)
    base = RewardHead.from_language_model(reference)
    with pytest.raises(ModelError, match=r"reference: expected the folder.*model without a head.*LogRatioHead\(\)"):
        RewardHead.from_pretrained(policy, head=LogRatioHead(base))
    wrong = LogRatioHead()
    wrong.reference = 3
    with pytest.raises(ModelError, match="got a int"):
        RewardHead.from_pretrained(policy, head=wrong)
    with pytest.raises(ModelError, match=r"no-such-folder"):
        RewardHead.from_pretrained(policy, head=LogRatioHead("./no-such-folder"))


def test_positions_that_cannot_matter_and_texts_without_a_token_are_refused(policy, checkpoints):
    model = RewardHead.from_pretrained(policy, head=LogRatioHead())
    neurons = NeuronSet(torch.ones(model.n_layers, 64, dtype=torch.bool), "mlp", model.architecture)
    for call in (
        lambda: NeuronAttribution(model, "attribution_patching", positions="last"),
        lambda: AblationContext(model, neurons, positions="last"),
        lambda: single_neuron_effects(model, make_pairs(1), positions="last"),
    ):
        with pytest.raises(OptionError, match=r"positions: a LogRatioHead reads.*positions='all'"):
            call()
    with pytest.raises(DataError, match=r"texts: text 0: it is a single token.*Put a prompt"):
        model.score(["a"])
    for beta in (0.0, -0.1, float("nan"), float("inf")):
        with pytest.raises(OptionError, match=r"beta: expected the factor of the training, a number above 0"):
            LogRatioHead(beta=beta)
    with pytest.raises(ModelError, match=r"expected a causal language model.*GPT2ForSequenceClassification"):
        RewardHead.from_pretrained(checkpoints["gpt2"], head=LogRatioHead())


@pytest.mark.grid
def test_models_in_memory_and_bridges(policy, reference, tokenizer):
    from transformer_lens.model_bridge import TransformerBridge

    pairs = make_pairs(3)
    expected = RewardHead.from_pretrained(policy, head=LogRatioHead(reference)).score_pairs(pairs).margin
    one, two = (transformers.AutoModelForCausalLM.from_pretrained(folder) for folder in (policy, reference))
    other = RewardHead.from_classifier(two, head=LogRatioHead(), tokenizer=tokenizer)
    model = RewardHead.from_classifier(one, head=LogRatioHead(other), tokenizer=tokenizer)
    assert torch.allclose(model.score_pairs(pairs).margin, expected, atol=1e-6)
    assert model.check(pairs, reference=one)["passed"].all()
    # Weights are shared: training changes the reward.
    with torch.no_grad():
        one.transformer.wte.weight[3] += 1.0
    assert not torch.allclose(model.score_pairs(pairs).margin, expected, atol=1e-3)
    bridge = TransformerBridge.boot_transformers(str(policy), device=model.device, dtype=torch.float32)
    head = RewardHead(bridge, LogRatioHead(reference), tokenizer=tokenizer)
    assert torch.allclose(head.score_pairs(pairs).margin, expected, atol=1e-5)
    for options in ({"process_weights": True}, {"model_class": "HookedTransformer"}):
        try:
            converted = RewardHead.from_pretrained(policy, head=LogRatioHead(reference), **options)
        except ModelError:  # TransformerLens 4 has no HookedTransformer
            continue
        assert torch.allclose(converted.score_pairs(pairs).margin, expected, atol=1e-4), options


@pytest.mark.grid
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_an_adapter_on_its_reference(policy, tokenizer, tmp_path):
    from peft import LoraConfig, get_peft_model

    base = transformers.AutoModelForCausalLM.from_pretrained(policy)
    config = LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["c_fc", "c_attn"], fan_in_fan_out=True)
    adapted = get_peft_model(base, config)
    for name, parameter in adapted.named_parameters():
        if "lora" in name:
            parameter.data = 0.3 * torch.randn_like(parameter)
    adapted.save_pretrained(tmp_path / "adapter")
    pairs = make_pairs(4)
    model = RewardHead.from_pretrained(
        tmp_path / "adapter", base=policy, head=LogRatioHead(policy, beta=0.1), dtype=torch.float64
    )
    merged = adapted.merge_and_unload()
    merged.save_pretrained(tmp_path / "merged")
    tokenizer.save_pretrained(tmp_path / "merged")
    expected = log_likelihoods(tmp_path / "merged", both(pairs, "chosen")) - log_likelihoods(
        policy, both(pairs, "chosen")
    )
    assert float(expected.abs().max()) > 0.1
    assert torch.allclose(model.score_pairs(pairs).chosen, 0.1 * expected, atol=1e-5)
    assert model.check(pairs)["passed"].all()


@pytest.mark.grid
def test_half_precision_and_odd_texts(policy, reference, tmp_path):
    """Log-probabilities in float32 for a bfloat16 model; BOS in front; a response that begins its text; ties."""
    pairs = PreferencePairs.from_records(
        [
            {"prompt": "how do i", "chosen": "bake a cake", "rejected": "bake a cake"},
            {"prompt": "how do i", "chosen": "bake a cake", "rejected": "bake a cake and bread"},
        ]
    )
    for dtype in (torch.float32, torch.bfloat16):
        for tokens in (1, 10_000):
            model = RewardHead.from_pretrained(
                policy, head=LogRatioHead(reference), dtype=dtype, tokens_per_batch=tokens
            )
            scored = model.score_pairs(pairs)
            assert scored.tied.tolist() == [True, False]
            assert scored.margin.dtype == torch.float32
            assert model.head.unembedding.weight.dtype == dtype
    bos = put_bos_first(make_tokenizer(tmp_path, bos=EOS))
    model = RewardHead.from_pretrained(policy, head=LogRatioHead(), tokenizer=bos, dtype=torch.float64)
    text = "how do i bake"
    plain = transformers.AutoModelForCausalLM.from_pretrained(policy, dtype=torch.float64).eval().to(DEVICE)
    ids = bos(text, return_tensors="pt")["input_ids"].to(DEVICE)
    with torch.no_grad():
        each = plain(ids).logits[0, :-1].log_softmax(dim=1).gather(1, ids[0, 1:, None])
    assert float(model.score([text])[0] - each.sum()) == pytest.approx(0, abs=1e-9)
    assert torch.allclose(model.score_tokens(ids.cpu()), model.score([text]), atol=1e-12)


@pytest.mark.grid
def test_means_of_a_model_replace_as_for_any_other(policy, reference):
    from rmtension import ActivationCollector

    pairs = make_pairs(6)
    model = RewardHead.from_pretrained(policy, head=LogRatioHead(reference), dtype=torch.float64)
    means = ActivationCollector(model).collect(pairs)
    patched = NeuronAttribution(model, "integrated_gradients", replacement=Mean(means), steps=64).score(pairs)
    everything = NeuronSet(torch.ones(patched.values.shape, dtype=torch.bool), "mlp", model.architecture)
    one_layer = NeuronSet(everything.mask & (torch.arange(3) == 1)[:, None], "mlp", model.architecture)
    before = model.score_pairs(pairs).margin.mean()
    with AblationContext(model, one_layer, Mean(means)):
        after = model.score_pairs(pairs).margin.mean()
    # Integrated gradients of a layer sum to the change of the margin when the whole layer is replaced.
    assert float(patched.values[1].sum() - (before - after)) == pytest.approx(0, abs=1e-4)


@pytest.mark.grid
def test_a_replaced_unembedding_is_followed(policy, tokenizer):
    model = transformers.AutoModelForCausalLM.from_pretrained(policy, dtype=torch.float64).eval()
    head = RewardHead.from_classifier(model, head=LogRatioHead(), tokenizer=tokenizer)
    pairs = make_pairs(3)
    before = head.score_pairs(pairs).chosen
    model.lm_head.weight = torch.nn.Parameter(2 * model.lm_head.weight.detach())
    fresh = RewardHead.from_classifier(model, head=LogRatioHead(), tokenizer=tokenizer)
    assert torch.equal(head.score_pairs(pairs).chosen, fresh.score_pairs(pairs).chosen)
    assert (before - fresh.score_pairs(pairs).chosen).abs().min() > 1
