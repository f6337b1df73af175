"""Heads other than one row, read at the last token, at the prompt's last token or at all tokens of the response.

The reference runs transformers' own modules on one text at a time and computes each head in plain torch.
"""

import pytest
import torch
import transformers
from tiny_models import grid, make_pairs

from rmtension import AblationContext, NeuronAttribution, NeuronSet, RewardHead
from rmtension.attribution import single_neuron_effects
from rmtension.data._tokens import TokenBatch
from rmtension.errors import ModelError, OptionError
from rmtension.heads import Head, LinearHead
from rmtension.interventions import score_without
from rmtension.models import direct_contributions

D = 32
# float64: sums of some hundred products. Llama's norm computes in float32 in every dtype.
CLOSE = {"gpt2": 1e-9, "llama": 1e-6}


def _matrix(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) / shape[-1] ** 0.5


class Curved(Head):
    """Two outputs of an MLP with one hidden layer."""

    outputs = ("depth", "height")

    def __init__(self):
        super().__init__()
        self.first, self.second = torch.nn.Parameter(_matrix(1, 12, D)), torch.nn.Parameter(_matrix(2, 2, 12))

    def read(self, last, prompt_last):
        return torch.tanh(last @ self.first.T) @ self.second.T


class Gated(Head):
    """Two objectives, weighted by a gate that reads the prompt; the weighted sum is the default."""

    outputs = ("score", "help", "harm")
    default = "score"
    reads_prompt = True

    def __init__(self):
        super().__init__()
        self.rows, self.gate = torch.nn.Parameter(_matrix(3, 2, D)), torch.nn.Parameter(_matrix(4, 2, D))

    def read(self, last, prompt_last):
        each = last @ self.rows.T
        weights = torch.softmax(prompt_last @ self.gate.T, dim=1)
        return torch.cat([(each * weights).sum(1, keepdim=True), each], dim=1)


class ResponseSum(Head):
    """The sum over the response of a curved function of each token."""

    def __init__(self):
        super().__init__()
        self.row = torch.nn.Parameter(_matrix(5, D))

    uses_prompt = True

    def tokens(self, batch):
        return batch.places(batch.response)

    def read_tokens(self, states, places, batch):
        values = torch.tanh(states @ self.row)
        return values.new_zeros(len(batch.last)).index_add(0, places.texts.to(values.device), values)[:, None]


HEADS = {"curved": Curved, "gated": Gated, "sum": ResponseSum}


def reference(kind, states, start):
    """All outputs of one text, from its states [token, d_model] and the index of its first response token."""
    if kind == "curved":
        head = Curved()
        return torch.tanh(head.first @ states[-1]) @ head.second.T
    if kind == "gated":
        head = Gated()
        each, weights = head.rows @ states[-1], torch.softmax(head.gate @ states[start - 1], dim=0)
        return torch.cat([(each * weights).sum()[None], each])
    return torch.tanh(states[start:] @ ResponseSum().row).sum()[None]


class Plain:
    """The rewards of a folder's model by transformers' modules alone, with plain hooks."""

    def __init__(self, folder, kind, output=0):
        self.base = transformers.AutoModel.from_pretrained(folder, dtype=torch.float64).eval().requires_grad_(False)
        self.kind, self.output = kind, output
        blocks = self.base.h if hasattr(self.base, "h") else self.base.layers
        self.projections = [getattr(block.mlp, "down_proj", None) or block.mlp.c_proj for block in blocks]

    def reward(self, text):
        states = self.base(input_ids=torch.tensor([text.ids]), use_cache=False)[0][0]
        return reference(self.kind, states, text.response_start)[self.output]

    def gradient_times_activation(self, text):
        """[layer, neuron], summed over all tokens of the text."""
        kept = []

        def keep(_module, inputs):
            kept.append(inputs[0].detach().requires_grad_(True) if not inputs[0].requires_grad else inputs[0])
            return (kept[-1],)

        handles = [projection.register_forward_pre_hook(keep) for projection in self.projections]
        gradients = torch.autograd.grad(self.reward(text), kept, allow_unused=True, materialize_grads=True)
        for handle in handles:
            handle.remove()
        return torch.stack([(a * g)[0].sum(0) for a, g in zip(kept, gradients, strict=True)])

    def without(self, text, neurons):
        """The reward with the neurons' activations set to 0."""

        def zero(mask):
            return lambda _module, inputs: (inputs[0].masked_fill(mask, 0.0),)

        handles = [
            projection.register_forward_pre_hook(zero(mask))
            for projection, mask in zip(self.projections, neurons.mask, strict=True)
        ]
        reward = self.reward(text)
        for handle in handles:
            handle.remove()
        return reward


@pytest.fixture(scope="module", params=grid(["llama", "gpt2"]))
def family(request):
    return request.param


@pytest.fixture(scope="module", params=list(HEADS))
def opened(request, checkpoints, family):
    folder, kind = checkpoints[family], request.param
    output = "depth" if kind == "curved" else None
    head = RewardHead.from_pretrained(folder, head=HEADS[kind](), output=output, dtype=torch.float64)
    pairs = make_pairs(4)
    return head, Plain(folder, kind), head.encode(pairs), pairs, CLOSE[family]


def of_pairs(encoded, function):
    both = zip(encoded.chosen, encoded.rejected, strict=True)
    return torch.stack([(function(chosen) - function(rejected)).detach() for chosen, rejected in both])


def drawn(head, seed, n=20):
    generator = torch.Generator().manual_seed(seed)
    mask = torch.zeros(head.n_layers, head.n_neurons("mlp"), dtype=torch.bool)
    mask.view(-1)[torch.randperm(mask.numel(), generator=generator)[:n]] = True
    return NeuronSet(mask, "mlp", head.architecture)


def test_rewards_equal_the_reference(opened):
    head, plain, encoded, pairs, close = opened
    expected = of_pairs(encoded, plain.reward)
    assert head.body.pack_up_to > 0  # the pairs share rows
    assert (head.score_pairs(pairs).margin - expected).abs().max() < close
    assert expected.abs().min() > 1e-3


def test_scores_are_gradients_of_the_whole_head(opened):
    head, plain, encoded, pairs, close = opened
    scores = NeuronAttribution(head, "gradient_x_activation").score(pairs)
    expected = of_pairs(encoded, plain.gradient_times_activation).mean(0)
    assert (scores.values - expected).abs().max() < close
    assert expected[-1].abs().max() > 1e-4  # the last block too, whose MLP runs only where the head reads


def test_ablations_equal_plain_hooks(opened):
    head, plain, encoded, pairs, close = opened
    sets = [drawn(head, seed) for seed in (0, 1)]
    expected = [of_pairs(encoded, lambda text, some=some: plain.without(text, some)) for some in sets]
    for some, margins, swept in zip(sets, expected, score_without(head, pairs, sets), strict=True):
        with AblationContext(head, some):
            inside = head.score_pairs(pairs).margin
        assert (inside - margins).abs().max() < close
        assert (swept.margin - margins).abs().max() < close
        assert (head.with_ablation(some).score_pairs(pairs).margin - margins).abs().max() < close
    assert (expected[0] - of_pairs(encoded, plain.reward)).abs().max() > 1e-3


def test_single_effects_equal_plain_hooks(opened):
    head, plain, encoded, pairs, close = opened
    some = drawn(head, 2, n=6)
    effects = single_neuron_effects(head, pairs, neurons=some)
    base = of_pairs(encoded, plain.reward)
    for layer, neuron in some:
        mask = torch.zeros_like(some.mask)
        mask[layer, neuron] = True
        alone = NeuronSet(mask, "mlp", head.architecture)
        change = of_pairs(encoded, lambda text, one=alone: plain.without(text, one)) - base
        assert abs(float(effects.values[layer, neuron]) - float(change.mean())) < close


def test_direct_parts_are_first_order_and_sum_to_the_reward(opened):
    """Of a neuron in the last block: its activation times the gradient with the final norm's scale held fixed."""
    head, plain, encoded, _, close = opened
    text = encoded.chosen[0]
    batch = TokenBatch.from_texts([text], [0], read_at=head.read_at, device="cpu")
    parts = direct_contributions(head, batch)
    assert (parts.reward - plain.reward(text)).abs() < close
    norm = plain.base.norm if hasattr(plain.base, "norm") else plain.base.ln_f
    kept = []

    def hold(_module, inputs, output):
        x = inputs[0]
        centred = x - x.mean(-1, keepdim=True) if hasattr(norm, "bias") else x
        bias = norm.bias if hasattr(norm, "bias") else 0.0
        sigma = (norm.weight * centred).norm(dim=-1, keepdim=True) / (output - bias).norm(dim=-1, keepdim=True)
        return norm.weight * centred / sigma.detach() + bias

    def keep(_module, inputs):
        kept.append(inputs[0].detach().requires_grad_(True))
        return (kept[-1],)

    handles = [norm.register_forward_hook(hold), plain.projections[-1].register_forward_pre_hook(keep)]
    (gradient,) = torch.autograd.grad(plain.reward(text), kept)
    for handle in handles:
        handle.remove()
    assert (parts.neurons["mlp"][0, -1] - (kept[0] * gradient)[0].sum(0)).abs().max() < close


def test_every_output_in_one_pass(checkpoints):
    folder, pairs = checkpoints["llama"], make_pairs(4)
    head = RewardHead.from_pretrained(folder, head=Gated(), dtype=torch.float64)
    assert head.outputs == ["score", "help", "harm"]
    scored = head.score_outputs(pairs)
    for number, name in enumerate(head.outputs):
        expected = of_pairs(head.encode(pairs), Plain(folder, "gated", number).reward)
        assert (scored[name].margin - expected).abs().max() < CLOSE["llama"]
        alone = head.output(name).score_pairs(pairs)
        assert torch.equal(alone.margin, scored[name].margin)
        assert alone.provenance == scored[name].provenance
        assert scored[name].provenance.output == name
    apart = head.output(("help", "harm"))
    assert (apart.score_pairs(pairs).margin - (scored["help"].margin - scored["harm"].margin)).abs().max() < CLOSE[
        "llama"
    ]
    prints = {each.fingerprint for each in (head, head.output("help"), head.output("harm"), apart)}
    assert len(prints) == 4
    assert head.output("score").fingerprint == head.fingerprint


def test_the_output_must_be_known(checkpoints):
    pairs = make_pairs(2)
    with pytest.raises(ModelError, match=r"one output, got 2.*'depth'.*output='all'"):
        RewardHead.from_pretrained(checkpoints["llama"], head=Curved())
    head = RewardHead.from_pretrained(checkpoints["llama"], head=Curved(), output="all")
    with pytest.raises(ModelError, match=r"2 outputs and none was chosen.*head.output\('depth'\)"):
        head.score_pairs(pairs)
    assert list(head.score_outputs(pairs)) == ["depth", "height"]
    with pytest.raises(OptionError, match=r"no output has this name.*Did you mean 'height'"):
        head.output("hight")
    with pytest.raises(ModelError, match=r"got the class Curved. Pass Curved\(...\)"):
        RewardHead.from_pretrained(checkpoints["llama"], head=Curved)


def test_a_head_must_compute_a_column_per_output(checkpoints):
    """Before the shape was compared, a head with more columns than outputs was read at its first ones."""

    class Wrong(Head):
        def read(self, last, prompt_last):
            return last[:, :2]

    head = RewardHead.from_pretrained(checkpoints["llama"], head=Wrong())
    for call in (head.score_pairs, head.score_outputs):
        with pytest.raises(
            ModelError,
            match=r"expected Wrong to return one number for each of 4 texts and 1 outputs.*got shape \(4, 2\)",
        ):
            call(make_pairs(2))


def test_a_head_that_reads_the_prompt_needs_pairs(checkpoints):
    head = RewardHead.from_pretrained(checkpoints["llama"], head=Gated())
    with pytest.raises(OptionError, match=r"Gated reads the last token of the prompt.*score_pairs"):
        head.score(["a text"])
    with pytest.raises(OptionError, match="score_pairs"):
        head.score_tokens(torch.ones(1, 4, dtype=torch.long))


def test_several_rows_are_one_row_each(checkpoints):
    """A row of several is read as the same row alone, bit for bit."""
    pairs, rows = make_pairs(4), _matrix(7, 3, D).float()
    several = RewardHead.from_pretrained(
        checkpoints["gpt2"], head=LinearHead(rows, [0.5, 0.0, -1.0], ["a", "b", "c"]), output="all"
    )
    for number, name in enumerate("abc"):
        alone = RewardHead.from_pretrained(checkpoints["gpt2"], head=(rows[number], float(several.head.bias[number])))
        one = several.output(name)
        assert torch.equal(one.score_pairs(pairs).chosen, alone.score_pairs(pairs).chosen)
        assert torch.equal(several.score_outputs(pairs)[name].chosen, alone.score_pairs(pairs).chosen)
        assert one.fingerprint == alone.fingerprint
