"""RelP against an implementation written from its rules alone, in float64; its conservation property.

Tolerance 1e-9 of the largest score. Norms of transformers' Llama and Gemma-2, and Gemma-2's softmax, compute in float32
at any dtype; here they compute in float64, because rounding there would hide differences up to 1e-7.
"""

from types import SimpleNamespace

import pytest
import torch
import transformers
from all_replicas import ALL
from plain_relp import RULES, PlainRelp
from replicas import make_pairs as pairs_of
from tiny_models import grid, make_config, make_pairs, make_tokenizer, save_drawn

from rmtension import Mean, NeuronAttribution, RewardHead
from rmtension.attribution._neuron_attribution import score_together
from rmtension.attribution._relevance import RelevanceRules
from rmtension.bodies._hooks import HookSite, InstalledHooks
from rmtension.data._tokens import TokenBatch
from rmtension.errors import ModelError
from rmtension.passes import ActivationCollector

FAMILIES = ("gpt2", "llama", "gemma2")
METHODS = {"relp": RULES[:3], "relp_fixed_attention": RULES}


def config_of(family, vocab_size):
    """A small config; Gemma-2 has norms behind its MLP and attention, soft caps and wide heads."""
    if family != "gemma2":
        return make_config(family, vocab_size)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4}
    sizes |= {"num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 96, "vocab_size": vocab_size}
    sizes |= {"num_labels": 1, "pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 0, "query_pre_attn_scalar": 8}
    return transformers.Gemma2Config(**sizes, attn_implementation="eager")


def rms_norm(module, x):
    """An RMS norm in the dtype of its input."""
    eps = getattr(module, "variance_epsilon", None) or module.eps
    gain = 1 + module.weight if "Gemma" in type(module).__name__ else module.weight
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * gain


@pytest.fixture(scope="module", autouse=True)
def everything_in_float64():
    with pytest.MonkeyPatch.context() as patch:
        for name in ("llama.modeling_llama.LlamaRMSNorm", "gemma2.modeling_gemma2.Gemma2RMSNorm"):
            patch.setattr(f"transformers.models.{name}.forward", rms_norm)
        own = {"softmax": lambda scores, dim, dtype=None: torch.nn.functional.softmax(scores, dim)}
        functional = SimpleNamespace(**vars(torch.nn.functional) | own)
        of_gemma = SimpleNamespace(**vars(torch.nn) | {"functional": functional})
        patch.setattr("transformers.models.gemma2.modeling_gemma2.nn", of_gemma)
        yield


@pytest.fixture(scope="module", params=grid(FAMILIES, keep=FAMILIES))
def both(request, tmp_path_factory):
    """The head, and the model that the plain implementation reads."""
    folder = tmp_path_factory.mktemp(request.param)
    tokenizer = make_tokenizer(folder)
    auto = transformers.AutoModelForSequenceClassification
    save_drawn(folder, auto, config_of(request.param, len(tokenizer)), tokenizer)
    return RewardHead.from_pretrained(folder, dtype=torch.float64), auto.from_pretrained(folder, dtype=torch.float64)


@pytest.fixture(scope="module")
def pairs():
    return make_pairs(3)


def coefficients(head, model, pair, site, rules):
    """Activations and coefficients of both texts, [layer, token, channel], the rejected one with a minus sign."""
    for sign, side in ((1, "chosen"), (-1, "rejected")):
        ids = torch.tensor(head.tokenizer(pair.text(side))["input_ids"])
        plain = PlainRelp(model, ids, rules)
        values = torch.stack([plain.leaves[site, layer].detach() for layer in range(head.n_layers)])
        yield values, sign * torch.stack([plain.coefficient(site, layer) for layer in range(head.n_layers)])


def expected(head, model, pairs, site, rules, reference=0.0):
    """(a_ref - a) dM/da of every pair, [pair, layer, neuron]."""
    scores = []
    for pair in pairs:
        products = sum(
            ((reference - values) * slopes).sum(dim=1)
            for values, slopes in coefficients(head, model, pair, site, rules)
        )
        scores.append(products.unflatten(-1, (head.n_neurons(site), -1)).sum(-1))
    return torch.stack(scores)


def sites_of(head):
    return [site for site in ("mlp", "mlp_gate", "attn_head") if site != "mlp_gate" or "gpt2" not in head.architecture]


@pytest.mark.parametrize("method", METHODS)
def test_scores_are_those_of_the_rules(both, pairs, method):
    head, model = both
    for site in sites_of(head):
        scores = NeuronAttribution(head, method, site=site).per_pair(pairs).values
        wanted = expected(head, model, pairs, site, METHODS[method])
        assert (scores - wanted).abs().max() <= 1e-9 * wanted.abs().max(), site


@pytest.mark.parametrize("rule", RULES)
def test_every_rule_matters(both, pairs, rule):
    """Without any one of the rules, the plain implementation computes other scores.

    GPT-2's MLP has no gate: there is no product to halve, and that rule changes nothing.
    """
    head, model = both
    scores = NeuronAttribution(head, "relp_fixed_attention").per_pair(pairs).values
    without = expected(head, model, pairs, "mlp", [other for other in RULES if other != rule])
    difference = (scores - without).abs().max() / scores.abs().max()
    if rule == "half" and "gpt2" in head.architecture:
        assert difference <= 1e-9
    else:
        assert difference > 1e-2


def test_replacement_by_the_mean(both, pairs):
    head, model = both
    statistics = ActivationCollector(head).collect(pairs)
    scores = NeuronAttribution(head, "relp", replacement=Mean(statistics)).per_pair(pairs).values
    wanted = expected(head, model, pairs, "mlp", METHODS["relp"], reference=statistics.mean[:, None])
    assert (scores - wanted).abs().max() <= 1e-9 * wanted.abs().max()


def without_biases(head):
    """Set all biases of a model to 0, except that of the head, which has none."""
    with torch.no_grad():
        for name, parameter in head.body.module.named_parameters():
            if name.endswith("bias"):
                parameter.zero_()
    return head


def relevance_of_streams(head, pairs, *, fixed_attention, apply=True):
    """The reward of the first chosen text, and the sum of stream x coefficient before every block."""
    batch = TokenBatch.from_texts(head.encode(pairs).chosen[:1], (0,), device=head.device)
    streams = []

    def keep(stream):
        streams.append(stream if stream.requires_grad else stream.detach().requires_grad_())
        return streams[-1]

    hooks = [(HookSite(head.body.block(layer), "input"), keep) for layer in range(head.n_layers)]
    with torch.enable_grad(), InstalledHooks(hooks):
        if apply:
            with RelevanceRules(head).applied(fixed_attention=fixed_attention):
                rewards = head.forward(batch)
        else:
            rewards = head.forward(batch)
    slopes = torch.autograd.grad(rewards.sum(), streams)
    sums = [float((stream * slope).detach().sum()) for stream, slope in zip(streams, slopes, strict=True)]
    return float(rewards.detach().sum()), torch.tensor(sums, dtype=torch.float64)


def test_relevance_is_conserved(tmp_path, pairs):
    """Without biases and with all four rules, stream x coefficient sums to the reward in every layer."""
    for family in FAMILIES:
        tokenizer = make_tokenizer(tmp_path / family)
        auto = transformers.AutoModelForSequenceClassification
        save_drawn(tmp_path / family, auto, config_of(family, len(tokenizer)), tokenizer)
        head = without_biases(RewardHead.from_pretrained(tmp_path / family, dtype=torch.float64))
        reward, sums = relevance_of_streams(head, pairs, fixed_attention=True)
        assert (sums - reward).abs().max() < 1e-9 * abs(reward), family
        # Gradients are not conserved, nor is relevance that flows through the attention pattern.
        for others in ({"fixed_attention": False}, {"fixed_attention": True, "apply": False}):
            _, sums = relevance_of_streams(head, pairs, **others)
            assert (sums - reward).abs().max() > 1e-2 * abs(reward), (family, others)


def test_rewards_stay_the_same_and_rules_end(both, pairs):
    head, _ = both
    before = head.score_pairs(pairs).margin
    rules = RelevanceRules(head)
    for fixed in (False, True):
        with rules.applied(fixed_attention=fixed):
            assert (head.score_pairs(pairs).margin - before).abs().max() < 1e-12
    assert torch.equal(head.score_pairs(pairs).margin, before)
    patching = NeuronAttribution(head, "attribution_patching")
    alone = patching.score(pairs).values
    together = score_together([NeuronAttribution(head, "relp"), patching], pairs)
    assert torch.equal(together[1].values, alone), "the rules do not reach other methods of the same pass"


@pytest.mark.parametrize("kind", grid(["attributes with learned weights", "distributions over bins"]))
def test_fixed_attention_leaves_the_head_alone(kind, tmp_path):
    """Heads with a softmax over weights or bins: the MLP of the last layer, above all attention, scores as by relp."""
    replica = next(replica for replica in ALL if replica.kind == kind)
    folder = replica.make(tmp_path / "replica")
    head = RewardHead.from_pretrained(folder, dtype=torch.float64, **replica.open_options(folder))
    relp, fixed = (NeuronAttribution(head, method).per_pair(pairs_of(replica)).values for method in METHODS)
    scale = relp.abs().max()
    assert (relp[:, -1] - fixed[:, -1]).abs().max() <= 1e-12 * scale
    assert (relp[:, 0] - fixed[:, 0]).abs().max() > 1e-3 * scale, "below, the rule of attention matters"


@pytest.mark.lens
def test_models_without_transformers_modules_are_refused(checkpoints):
    head = RewardHead.from_pretrained(checkpoints["gpt2"], process_weights=True)
    with pytest.raises(ModelError, match="relp: needs transformers' own modules"):
        NeuronAttribution(head, "relp").score(make_pairs(2))
