"""Skipping tokens in the last block changes no number, and is off if hooks need all tokens."""

import contextlib

import pytest
import torch
import transformers
from all_families import EXPERTS
from tiny_models import batches_of, grid, make_pairs

from rmtension import (
    AblationContext,
    ActivationCollector,
    Mean,
    NeuronAttribution,
    NeuronSet,
    OtherResponse,
    PreferencePairs,
    Resample,
    RewardHead,
    Zero,
)
from rmtension.bodies._run_modes import eager_eval
from rmtension.bodies._site_widths import measure_sites
from rmtension.errors import OptionError
from rmtension.passes._collect_profiles import collect_profiles
from rmtension.synthetic.check_matrix import make_classifier


@pytest.fixture(scope="module")
def few():
    """Pairs of several prompts, and one whose responses are the same."""
    pairs = make_pairs(4)
    tie = {"prompt": pairs[0].prompt, "chosen": "sure", "rejected": "sure"}
    return PreferencePairs([*pairs, *PreferencePairs.from_records([tie])])


def tokens_through(head, run):
    """How many tokens the last block's MLP saw in `run`."""
    seen = []
    module = head.body._last_mlp._module
    with counted(module, lambda values: seen.append(values.shape[:-1].numel())):
        run()
    return sum(seen)


@contextlib.contextmanager
def counted(module, see):
    """Not with a hook: a hook of somebody else's keeps everything running."""
    forward = module.forward

    def counting(values, *args, **kwargs):
        see(values)
        return forward(values, *args, **kwargs)

    module.forward = counting
    try:
        yield
    finally:
        del module.forward


def numbers(head, pairs):
    statistics = ActivationCollector(head).collect(pairs)
    results = {"rewards": head.score_pairs(pairs).margin, "texts": head.score([pair.text("chosen") for pair in pairs])}
    for site in head.sites:
        for method, replacement in [
            ("gradient_x_activation", Zero()),
            ("attribution_patching", Zero()),
            ("attribution_patching", OtherResponse()),
        ]:
            for positions in ("all", "last"):
                scores = NeuronAttribution(head, method, site=site, replacement=replacement, positions=positions)
                results[site, method, replacement, positions] = scores.score(pairs).values
    patching = NeuronAttribution(head, method="attribution_patching", replacement=Mean(statistics))
    return results | {"patching to the mean": patching.score(pairs).values}


@pytest.mark.parametrize("family", grid(["gpt2", "llama"]))
def test_skipping_tokens_of_the_last_mlp_changes_no_reward(checkpoints, few, family):
    head = RewardHead.from_pretrained(checkpoints[family], dtype=torch.float64)
    n_last = tokens_through(head, lambda: head.score_pairs(few))
    assert n_last == 2 * len(few) - 1  # the texts of one pair are equal and share a token
    gradients = NeuronAttribution(head, method="gradient_x_activation")
    assert tokens_through(head, lambda: gradients.score(few)) == 2 * len(few) - 1
    less = numbers(head, few)
    head.body._last_mlp = None
    for name, expected in numbers(head, few).items():
        assert torch.allclose(less[name], expected, atol=1e-9 if family == "gpt2" else 1e-6, rtol=0), name
    assert gradients.per_pair(few[-1:]).values.abs().max() == 0, "identical responses: exactly nothing"


def test_hooks_in_the_last_block_see_all_tokens(checkpoints, few):
    """An ablation in the last layer, at the tokens it names; a visit; the user's own hooks."""
    head = RewardHead.from_pretrained(checkpoints["gpt2"], dtype=torch.float64)
    mask = torch.zeros(head.n_layers, head.n_neurons("mlp"), dtype=torch.bool)
    mask[-1, :9] = True
    neurons = NeuronSet(mask, "mlp", head.architecture)
    texts = [pair.text("chosen") for pair in few]
    sample = ActivationCollector(head).sample(few, n=6)
    ablations = [
        AblationContext(head, neurons, Resample(sample)),
        AblationContext(head, neurons, positions="response"),
    ]

    def margins():
        results = []
        for ablation in ablations:
            with ablation:
                assert tokens_through(head, lambda: head.score_pairs(few)) > 2 * len(few)
                results += [head.score_pairs(few).margin, head.score(texts)]
                results += [NeuronAttribution(head, method="gradient_x_activation").score(few).values]
        return results

    less, mlp = margins(), head.body._last_mlp
    shapes = []
    with head.hooks("mlp", lambda layer, activation: shapes.append(activation.shape[:2].numel())):
        head.score_pairs(few)
    assert len(set(shapes)) == 1
    head.body._last_mlp = None
    expected = []
    for ablation in ablations:
        with ablation:
            expected += [head.score_pairs(few).margin, head.score(texts)]
            expected += [NeuronAttribution(head, method="gradient_x_activation").score(few).values]
    head.body._last_mlp = mlp
    assert all(torch.allclose(value, other, atol=1e-12) for value, other in zip(less, expected, strict=True))


class MixingMLP(torch.nn.Module):
    """Looks at other tokens."""

    def __init__(self, mlp):
        super().__init__()
        self.c_fc, self.c_proj, self.act = mlp.c_fc, mlp.c_proj, mlp.act

    def forward(self, values):
        return self.c_proj(self.act(self.c_fc(values.cumsum(1))))


def test_an_mlp_that_mixes_tokens_runs_on_all_tokens(plain_tokenizer):
    config = transformers.GPT2Config(
        vocab_size=len(plain_tokenizer), n_embd=16, n_layer=2, n_head=2, n_positions=64, num_labels=1, pad_token_id=1
    )
    classifier = transformers.GPT2ForSequenceClassification(config)
    assert RewardHead.from_classifier(classifier, tokenizer=plain_tokenizer).body._last_mlp is not None
    classifier.transformer.h[-1].mlp = MixingMLP(classifier.transformer.h[-1].mlp)
    assert RewardHead.from_classifier(classifier, tokenizer=plain_tokenizer).body._last_mlp is None


def test_experts_run_on_all_tokens(tmp_path, plain_tokenizer):
    make_classifier(EXPERTS[0], len(plain_tokenizer) + 8).save_pretrained(tmp_path)
    plain_tokenizer.save_pretrained(tmp_path)
    assert RewardHead.from_pretrained(tmp_path).body._last_mlp is None


@pytest.mark.parametrize("sites", [["mlp"], ["attn_head"], ["attn_head", "mlp_gate"]])
def test_statistics_stop_after_the_last_visit(checkpoints, few, sites):
    """Nothing above the last projection's input runs: not the projection of an MLP, nor the final norm."""
    head = RewardHead.from_pretrained(checkpoints["llama"], dtype=torch.float64)
    ran = []
    last = head.body.block(head.n_layers - 1)
    stack = contextlib.ExitStack()
    for name, module in {"norm": head.body.final_norm, "down": last.mlp.down_proj, "up": last.mlp.up_proj}.items():
        stack.enter_context(counted(module, lambda _, name=name: ran.append(name)))
    profiles = collect_profiles(head, few, sites=sites, positions=["all"])
    assert set(ran) == ({"up"} if sites == ["mlp"] else set())
    values = [profiles[site, "all"].sums for site in sites]
    # Where somebody else looks, everything runs.
    seen = []
    with head.hooks("mlp", lambda layer, activation: seen.append(layer)):
        profiles = collect_profiles(head, few, sites=sites, positions=["all"])
    assert set(ran) >= {"norm", "down"}
    assert set(seen) == set(range(head.n_layers))
    assert all(torch.equal(value, profiles[site, "all"].sums) for value, site in zip(values, sites, strict=True))
    stack.close()


class Looped(torch.nn.ModuleList):
    """Goes through its blocks again and again."""

    def __iter__(self):
        for _ in range(2):
            yield from self._modules.values()


def test_blocks_that_run_more_than_once_do_not_stop_early(checkpoints, few, plain_tokenizer):
    classifier = transformers.AutoModelForSequenceClassification.from_pretrained(checkpoints["gpt2"])
    plain = RewardHead.from_classifier(classifier, tokenizer=plain_tokenizer)
    assert plain._runs_once
    looped = RewardHead.from_classifier(classifier, tokenizer=plain_tokenizer)
    looped.body.native.h = Looped(list(looped.body.native.h))
    with eager_eval(looped.body.modules()):
        _, _, looped._runs_once = measure_sites(looped.body, looped.n_layers, looped.device)
    assert not looped._runs_once
    means = [ActivationCollector(looped).collect(few).mean]
    with looped.hooks("mlp", lambda layer, activation: None):
        means.append(ActivationCollector(looped).collect(few).mean)
    assert torch.equal(*means)


def test_a_users_own_pytorch_hooks_see_everything(checkpoints, few, plain_tokenizer):
    """On the modules of a classifier that the library shares."""
    classifier = transformers.AutoModelForSequenceClassification.from_pretrained(checkpoints["gpt2"])
    head = RewardHead.from_classifier(classifier, tokenizer=plain_tokenizer)
    seen = []
    mlp = classifier.transformer.h[-1].mlp
    handle = mlp.register_forward_hook(lambda module, inputs, output: seen.append(output.shape[1]))
    head.score_pairs(few)
    assert min(seen) > 1
    seen.clear()
    ActivationCollector(head).collect(few)
    assert seen
    handle.remove()
    assert tokens_through(head, lambda: head.score_pairs(few)) == 2 * len(few) - 1


@pytest.mark.parametrize("place", ["last block", "final norm", "base"])
def test_a_users_own_hooks_behind_the_mlp_see_the_whole_stream(place, checkpoints, few, plain_tokenizer):
    """At every token: the same tensors as in a run of transformers alone."""
    classifier = transformers.AutoModelForSequenceClassification.from_pretrained(checkpoints["gpt2"])
    head = RewardHead.from_classifier(classifier, tokenizer=plain_tokenizer)
    base = classifier.transformer
    module = {"last block": base.h[-1], "final norm": base.ln_f, "base": base}[place]
    seen = []
    module.register_forward_hook(
        lambda module, inputs, output: seen.append(output if torch.is_tensor(output) else output[0])
    )
    (text,) = head.encode(few[:1]).chosen
    head.score([few[0].text("chosen")])
    (streamed,) = seen
    seen.clear()
    with torch.no_grad():
        classifier(input_ids=torch.tensor([text.ids]))
    assert torch.allclose(streamed, seen[0], atol=1e-5)


def test_an_mlp_that_was_not_tried_never_skips_tokens(checkpoints, few, plain_tokenizer):
    """With a hook of the user at opening nothing can be left out, so nothing is shown about the MLP."""
    classifier = transformers.AutoModelForSequenceClassification.from_pretrained(checkpoints["gpt2"])
    handle = classifier.transformer.h[0].register_forward_hook(lambda module, inputs, output: None)
    head = RewardHead.from_classifier(classifier, tokenizer=plain_tokenizer)
    handle.remove()
    with head.last_mlp_where_read(next(iter(batches_of(head, few)))) as tokens:
        assert tokens is None


def test_a_work_folder_refuses_a_model_with_the_users_own_pytorch_hooks(checkpoints, few, plain_tokenizer, tmp_path):
    classifier = transformers.AutoModelForSequenceClassification.from_pretrained(checkpoints["gpt2"])
    head = RewardHead.from_classifier(classifier, tokenizer=plain_tokenizer)
    handle = classifier.transformer.h[0].mlp.register_forward_hook(lambda module, inputs, output: 2 * output)
    hooked = head.score_pairs(few)
    with pytest.raises(OptionError, match="a work folder cannot record what hooks do"):
        head.score_pairs(few, work=tmp_path / "work")
    handle.remove()
    assert not torch.equal(head.score_pairs(few, work=tmp_path / "work").margin, hooked.margin)


def test_nothing_is_kept_for_gradients_of_weights(checkpoints, few, plain_tokenizer):
    """Weights that a trainer left asking for gradients: they ask again afterwards, also after an error."""
    classifier = transformers.AutoModelForSequenceClassification.from_pretrained(checkpoints["gpt2"])
    head = RewardHead.from_classifier(classifier, tokenizer=plain_tokenizer)
    assert all(parameter.requires_grad for parameter in classifier.parameters())
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: saved.append(tensor.shape) or tensor, lambda x: x):
        NeuronAttribution(head, method="gradient_x_activation").score(few[:2])
    asking = len(saved)
    classifier.requires_grad_(False)
    saved.clear()
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: saved.append(tensor.shape) or tensor, lambda x: x):
        NeuronAttribution(head, method="gradient_x_activation").score(few[:2])
    assert asking == len(saved) > 0
    classifier.requires_grad_(True)

    def fail(batch):
        raise RuntimeError("half way")

    head.forward = fail
    with pytest.raises(RuntimeError, match="half way"):
        NeuronAttribution(head, method="gradient_x_activation").score(few[:2])
    assert all(parameter.requires_grad for parameter in classifier.parameters())
    assert all(parameter.grad is None for parameter in classifier.parameters())
