"""Fine-tuning of chosen neurons: what is trained, what is kept, and what it mends."""

import copy
import random
from dataclasses import replace

import numpy as np
import pytest
import scipy.linalg
import torch
import transformers
from tiny_models import grid, make_pairs, unchecked
from torch.nn.functional import softplus

from rmtension import ActivationCollector, NeuronSet, PreferencePairs, RewardHead
from rmtension.errors import ModelError, OptionError, ProvenanceError
from rmtension.models._classifiers import build_classifier
from rmtension.repair._fine_tune import _trainer, fine_tune_neurons
from rmtension.repair._gradient_surgery import without_conflict
from rmtension.repair._input_moments import input_moments
from rmtension.repair._splits import RepairPairs
from rmtension.repair._train_only_neurons import TrainOnlyNeurons, free_directions
from rmtension.synthetic._organism_pairs import FILLERS
from rmtension.training._trainer_run import schedule

LAYERS, NEURONS = 2, 24


@pytest.fixture(scope="module")
def two_vocabularies(organism):
    """A model in float64 and pairs whose objectives have words of their own, so that strong inputs span a part.

    Attention is uniform in layer 0 and off in layer 1, positions have no embedding, and there are 8 strong words, so
    that MLPs read at most 8 + 8 + 1 directions of 64 in layer 0, and NEURONS more in layer 1.
    """
    tokenizer = organism.head().tokenizer
    config = transformers.GPT2Config(
        n_embd=64,
        n_layer=LAYERS,
        n_head=2,
        n_inner=NEURONS,
        n_positions=32,
        vocab_size=len(tokenizer),
        num_labels=1,
        pad_token_id=tokenizer.pad_token_id,
        activation_function="relu",
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = transformers.GPT2ForSequenceClassification(config).double().eval()
        with torch.no_grad():
            for name, weight in model.named_parameters():
                if "ln_" not in name:
                    weight.copy_(0.2 * torch.randn_like(weight))
            model.transformer.wpe.weight.zero_()
            model.transformer.h[0].attn.c_attn.weight[:, :128] = 0
            model.transformer.h[0].attn.c_attn.bias[:128] = 0
            model.transformer.h[1].attn.c_proj.weight.zero_()
    head = RewardHead.from_classifier(model, tokenizer=tokenizer)
    draw = random.Random(0)

    def made(words, chosen, rejected):
        def some(n):
            return " ".join(draw.choices(words, k=n))

        # The last word decides. The drawn model ranks most strong pairs rightly, and most weak pairs wrongly.
        rows = [
            {
                "prompt": f"Human: {some(9)} Assistant:",
                "chosen": f"{some(4)} {words[chosen]}",
                "rejected": f"{some(4)} {words[rejected]}",
            }
            for _ in range(120)
        ]
        return PreferencePairs.from_records(rows)

    groups = {"weak": made(FILLERS[:6], 1, 0), "strong": made(FILLERS[6:12], 1, 0)}
    return head, RepairPairs.split(groups, weak="weak", strong="strong", most_lost=0.2)


@pytest.fixture(scope="module")
def neurons(two_vocabularies):
    """Every third neuron, and those that no strong token activates, whose columns are free to change."""
    head, pairs = two_vocabularies
    mask = ActivationCollector(head).collect(pairs.fit["strong"], progress=False).abs_mean == 0
    assert mask.any(dim=1).all()
    mask[:, ::3] = True
    assert not mask.all()
    return NeuronSet(mask, "mlp", head.architecture)


def loss_of(head, part):
    return float(softplus(-head.score_pairs(part).margin.double()).mean())


def trained_by_hand(head, part, callback, *, n_steps=20, learning_rate=1e-2):
    """A training loop of PyTorch on transformers' classifier: AdamW with weight decay on all parameters."""
    model = build_classifier(head)
    ids = [
        [torch.tensor([head.tokenizer(pair.text(side))["input_ids"]]) for side in ("chosen", "rejected")]
        for pair in part[:6]
    ]
    model.requires_grad_(True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, weight_decay=0.1)
    callback.on_train_begin(None, None, None, model=model, processing_class=head.tokenizer)
    for _ in range(n_steps):
        optimizer.zero_grad()
        margins = torch.stack([(model(a).logits - model(b).logits).squeeze() for a, b in ids])
        softplus(-margins).mean().backward()
        optimizer.step()
        callback.on_optimizer_step(None, None, None, model=model)
    return model


def own_copy(head):
    """The same model with weights of its own."""
    return RewardHead.from_classifier(copy.deepcopy(build_classifier(head)), tokenizer=head.tokenizer)


def mask_of(name, neurons):
    """Which entries of a parameter of GPT-2, [in, out], belong to neurons."""
    layer, module = int(name.split(".")[2]), name.split(".")[-2]
    chosen = neurons.mask[layer]
    return chosen[None, :] if module == "c_fc" else chosen[:, None]


def test_free_directions_are_the_null_space_of_scipy():
    draw = torch.Generator().manual_seed(0)
    inputs = torch.randn(40, 5, generator=draw, dtype=torch.float64) @ torch.randn(5, 12, generator=draw).double()
    found = free_directions(inputs.T @ inputs / 40, 1e-10)
    basis = scipy.linalg.null_space(inputs.numpy())
    assert basis.shape[1] == 7
    assert found.numpy() == pytest.approx(basis @ basis.T, abs=1e-10)
    # Two inputs with correlation .98: eigenvalues 1.98, 1 and 0.02 in units of their sizes, which do not matter.
    sizes = torch.tensor([1000.0, 0.1, 3.0]).double()
    correlations = torch.tensor([[1, 0.98, 0], [0.98, 1, 0], [0, 0, 1]]).double()
    moment = correlations * torch.outer(sizes, sizes)
    for tau, n_free in ((1e-3, 0), (0.02, 1), (0.6, 2)):
        assert float(free_directions(moment, tau).trace()) == pytest.approx(n_free, abs=1e-12)
    w = free_directions(moment, 0.02)[:, 1]
    own = w.square() * moment.diagonal()
    assert float(w @ moment @ w) < 0.03 * float(own.sum()), "the inputs cancel in w"
    nothing = torch.zeros(3, 3, dtype=torch.float64)
    assert torch.equal(free_directions(nothing, 1e-5), torch.eye(3).double()), "neurons that are never active"


def test_protected_training_keeps_strong_rewards_and_lowers_the_weak_loss(two_vocabularies, neurons):
    """Exactly unused directions: what is left is the rounding of float64, 1e-16 in some dozens of sums."""
    head, pairs = two_vocabularies
    strong, weak = pairs.fit["strong"], pairs.fit["weak"]
    before, loss = head.score_pairs(strong), loss_of(head, weak)
    size = float(before.chosen.abs().max())
    changed = {}
    for name, keep in (("protected", strong), ("free", None)):
        callback = TrainOnlyNeurons(neurons, keep=keep, tau=1e-12, progress=False)
        model = trained_by_hand(own_copy(head), weak, callback)
        assert all(change.norm() > 1e-3 for change in callback.changes().values()), "rows and columns are trained"
        after = RewardHead.from_classifier(model, tokenizer=head.tokenizer)
        scored = after.score_pairs(strong)
        moved = torch.stack([scored.chosen - before.chosen, scored.rejected - before.rejected])
        changed[name] = float(moved.abs().max()) / size
        assert loss_of(after, weak) < 0.7 * loss
    assert changed["protected"] < 1e-11
    # Negative control: without the projection, the same training changes them.
    assert changed["free"] > 0.5


def test_tau_bounds_the_change_of_what_is_read(two_vocabularies, neurons):
    """With a tau that frees directions in use: the mean square of what a row's change reads is below tau x lambda."""
    head, pairs = two_vocabularies
    strong, tau = pairs.fit["strong"], 1e-2
    callback = TrainOnlyNeurons(neurons, keep=strong, tau=tau, progress=False)
    trained_by_hand(own_copy(head), pairs.fit["weak"], callback, n_steps=5)
    names = [f"h.{layer}.mlp.c_fc" for layer in range(LAYERS)]
    for name, moment in input_moments(head, strong, names, progress=False).items():
        change = callback.changes()[f"{name}.weight"]
        read, most = torch.einsum("in,ij,jn->n", change, moment, change), torch.linalg.eigvalsh(moment)[-1]
        assert (read <= tau * most * change.square().sum(dim=0) + 1e-12).all()
        assert read.max() > 1e-6, "but not zero"


def test_nothing_else_is_trained(two_vocabularies, neurons):
    head, pairs = two_vocabularies
    callback = TrainOnlyNeurons(neurons, progress=False)
    start = own_copy(head)
    before = {name: weight.detach().clone() for name, weight in build_classifier(start).named_parameters()}
    model = trained_by_hand(start, pairs.fit["weak"], callback, n_steps=3)
    maps = {f"transformer.h.{layer}.mlp.{name}.weight" for layer in range(LAYERS) for name in ("c_fc", "c_proj")}
    for name, weight in model.named_parameters():
        if name not in maps:
            assert weight.grad is None
            assert torch.equal(weight, before[name])
            continue
        chosen = mask_of(name, neurons).expand_as(weight)
        assert torch.equal(weight[~chosen], before[name][~chosen])
        assert (weight.grad[~chosen] == 0).all()
        assert (weight[chosen] != before[name][chosen]).any()
    changes = callback.changes()
    assert {f"transformer.{name}" for name in changes} == maps
    for name, change in changes.items():
        weight = model.get_parameter(f"transformer.{name}").detach()
        assert torch.equal(change, weight - before[f"transformer.{name}"])
    assert not all(weight.requires_grad for weight in model.parameters())
    callback.on_train_end()
    assert all(weight.requires_grad and not weight._backward_hooks for weight in model.parameters())
    # Negative control: the optimiser itself moves what has no gradient, and the other neurons.
    free = trained_by_hand(own_copy(head), pairs.fit["weak"], SilentCallback(), n_steps=3)
    assert all(not torch.equal(weight, before[name]) for name, weight in free.named_parameters() if "c_fc" in name)


class SilentCallback:
    def on_train_begin(self, *_, **__):
        pass

    on_optimizer_step = on_train_begin


def test_fine_tuning_mends_and_leaves_the_model_as_it_was(two_vocabularies, neurons):
    head, pairs = two_vocabularies
    own = head.checkpoint.base.requires_grad_(False)
    own.wte.weight.requires_grad_(True)
    own.h[1].train()

    def state():
        return (
            head.fingerprint,
            [weight.requires_grad for weight in own.parameters()],
            [module.training for module in own.modules()],
            # Python's generator is drawn from by this suite's shape checker; test_training.py looks at it.
            torch.get_rng_state().tolist(),
            np.random.get_state()[1].tolist(),  # noqa: NPY002
        )

    before, options = state(), {"tau": 1e-12, "steps": (5, 40), "learning_rate": 1e-2, "batch_size": 8}
    edit, table = fine_tune_neurons(head, pairs, neurons, **options, progress=False)
    assert state() == before
    assert table["steps"].tolist() == [5, 40]
    assert table["weak_loss"].is_monotonic_decreasing
    edited = edit.apply(head)
    for split in (pairs.fit, pairs.test):
        # The inputs in test pairs, which have the same words, are in the span of those in fit pairs.
        change = edited.score_pairs(split["strong"]).margin - head.score_pairs(split["strong"]).margin
        assert float(change.abs().max()) < 1e-11
    assert head.score_pairs(pairs.test["weak"]).accuracy() < 0.4
    assert edited.score_pairs(pairs.test["weak"]).accuracy() > 0.95
    for name, change in edit.parameters.items():
        assert not change[~mask_of(f"transformer.{name}", neurons).expand_as(change)].any()
    again, _ = fine_tune_neurons(head, pairs, neurons, **options, progress=False)
    for name, change in edit.parameters.items():
        assert torch.equal(again.parameters[name], change), "the seed determines everything"


@pytest.mark.parametrize("protect", grid(["gradients", False]))
def test_training_on_both_objectives_mends(protect, two_vocabularies, neurons):
    head, pairs = two_vocabularies
    options = {"steps": (40,), "learning_rate": 1e-2, "batch_size": 8}
    edit, table = fine_tune_neurons(head, pairs, neurons, protect=protect, **options, progress=False)
    edited = edit.apply(head)
    for name in ("weak", "strong"):
        assert edited.score_pairs(pairs.test[name]).accuracy() > 0.95
        # The candidate's margins are those of the written model.
        assert table[f"{name}_loss"].item() == pytest.approx(loss_of(edited, pairs.development[name]), rel=1e-9)


def test_inputs_that_span_everything_leave_nothing_to_train(damaged, organism, pairs):
    """Every word of an organism is in some helpful pair. Its constant channels of 1000 need a small tau."""
    edit, table = fine_tune_neurons(
        damaged, pairs, organism.truth["harmless"], tau=1e-12, steps=(5,), learning_rate=1e-2, progress=False
    )
    assert edit is None
    assert table["harmless_change"].item() == 0


# -- two gradients -----------------------------------------------------------------------------------------------------


def test_gradients_without_conflict_by_hand():
    def split(*numbers):
        return [torch.tensor(numbers[:1]), torch.tensor([numbers[1:]])]

    def joined(tensors):
        return torch.cat([tensor.flatten() for tensor in tensors]).tolist()

    # (1, 0) without its part along (-1, 1) is (.5, .5); (-1, 1) without its part along (1, 0) is (0, 1).
    assert joined(without_conflict(split(1.0, 0.0), split(-1.0, 1.0))) == [0.5, 1.5]
    assert joined(without_conflict(split(1.0, 0.0), split(1.0, 1.0))) == [2.0, 1.0], "no conflict: the sum"
    assert joined(without_conflict(split(1.0, 2.0), split(-1.0, -2.0))) == [0.0, 0.0]


def test_the_gradient_of_a_step_is_that_of_plain_transformers(two_vocabularies, neurons, tmp_path):
    """On strong pairs with the labels that oppose the weak ones; margins are float32 in the trainer's loss."""
    head, pairs = two_vocabularies
    opposed = {"weak": pairs.fit["weak"], "strong": PreferencePairs(pair.swapped() for pair in pairs.fit["weak"][:30])}
    config = schedule(tmp_path, 0, 1.0, 1, 1e-3, 0, 4, False)
    trainer = _trainer(head, replace(pairs, fit=opposed), "gradients", [], config)
    batch = trainer.data_collator([2, 50])["batch"]
    assert batch.indices[:4] == (2, 50, 54 + 2, 54 + 20)
    model = trainer.model.eval()
    trainer.compute_loss(model, {"batch": batch}).backward()

    weights = list(model.parameters())
    gradients = []
    for some in (opposed["weak"][2], opposed["weak"][50]), (opposed["strong"][2], opposed["strong"][20]):
        rewards = [
            [
                model(torch.tensor([head.tokenizer(pair.text(side))["input_ids"]])).logits
                for side in ("chosen", "rejected")
            ]
            for pair in some
        ]
        loss = torch.stack([softplus(-(chosen - rejected)) for chosen, rejected in rewards]).mean()
        gradients.append(torch.autograd.grad(loss, weights))
    assert sum((a * b).sum() for a, b in zip(*gradients, strict=True)) < 0
    plain = [a + b for a, b in zip(*gradients, strict=True)]
    size = max(float(gradient.abs().max()) for gradient in plain)
    for weight, expected in zip(weights, without_conflict(*gradients), strict=True):
        assert torch.allclose(weight.grad, expected, rtol=0, atol=1e-5 * size)
    # Negative control: the sum of the gradients is another one.
    assert any((weight.grad - each).abs().max() > 1e-2 * size for weight, each in zip(weights, plain, strict=True))


# -- other trainers, and what is refused -------------------------------------------------------------------------------


@pytest.mark.grid
def test_it_works_in_the_trainer_of_trl(checkpoints, tmp_path):
    """Llama's gate, up and down maps; a checkpoint on disk, weight decay and clipping of gradients."""
    from datasets import Dataset
    from trl import RewardConfig, RewardTrainer

    head, data = RewardHead.from_pretrained(checkpoints["llama"]), make_pairs(8)
    chosen = NeuronSet.from_indices([(0, 1), (0, 5), (2, 0)], shape=(3, 48), site="mlp", architecture=head.architecture)
    rows = Dataset.from_list([{"prompt": p.prompt, "chosen": p.chosen, "rejected": p.rejected} for p in data])
    quiet = {"report_to": "none", "disable_tqdm": True, "logging_strategy": "no", "save_strategy": "no"}
    options = {"max_steps": 3, "per_device_train_batch_size": 4, "learning_rate": 1e-2, "weight_decay": 0.1}
    options |= {"use_cpu": True, "bf16": False, "activation_checkpointing": False, "max_grad_norm": 0.5}
    before = dict(head.checkpoint.base.named_parameters())
    tau = 0.05
    for keep in (data[:2], None):
        trainer = RewardTrainer(
            model=str(checkpoints["llama"]),
            args=RewardConfig(output_dir=str(tmp_path / "out"), **options, **quiet),
            train_dataset=rows,
            processing_class=head.tokenizer,
            callbacks=[TrainOnlyNeurons(chosen, keep=keep, tau=tau, progress=False)],
        )
        trainer.train()
        reads = [f"layers.{layer}.mlp.{key}_proj" for layer in (0, 2) for key in ("gate", "up")]
        moments = input_moments(head, data[:2], reads, progress=False)
        within = []
        for name, weight in trainer.model.base_model.named_parameters():
            change = weight.detach() - before[name]
            layer = int(name.split(".")[1]) if name.startswith("layers") else None
            if layer not in (0, 2) or ".mlp." not in name:
                assert not change.any(), name
                continue
            mask = chosen.mask[layer][None, :] if "down" in name else chosen.mask[layer][:, None]
            assert not change[~mask.expand_as(change)].any()
            assert weight.requires_grad
            assert not weight._backward_hooks
            if "down" not in name:
                assert change.any()
                moment = moments[name.removesuffix(".weight")]
                rows_of, most = change[chosen.mask[layer]].double(), torch.linalg.eigvalsh(moment)[-1]
                read = torch.einsum("ni,ij,nj->n", rows_of, moment, rows_of)
                # float32 rounds the weights to 1e-7 of their size, less than a thousandth of a step.
                within.append(bool((read <= 1.01 * tau * most * rows_of.square().sum(dim=1)).all()))
        assert all(within) if keep is not None else not any(within)


def test_what_cannot_be_trained_is_refused(two_vocabularies, neurons, checkpoints, organism):
    head, pairs = two_vocabularies
    heads = NeuronSet(torch.ones(LAYERS, 2, dtype=torch.bool), "attn_head", head.architecture)
    for wrong in (heads, neurons - neurons):
        with pytest.raises(OptionError, match="neurons: expected at least one neuron of site 'mlp'"):
            TrainOnlyNeurons(wrong)
    with pytest.raises(OptionError, match="tau: expected a share from 0 to below 1, got 1"):
        TrainOnlyNeurons(neurons, tau=1.0)
    with pytest.raises(OptionError, match="steps: expected numbers of steps from 1"):
        fine_tune_neurons(head, pairs, neurons, steps=())
    with pytest.raises(OptionError, match="protect: expected True, False or 'gradients', got 'all'"):
        unchecked(fine_tune_neurons)(head, pairs, neurons, protect="all")

    def begin(model, chosen=neurons):
        TrainOnlyNeurons(chosen).on_train_begin(None, None, None, model=model, processing_class=head.tokenizer)

    with pytest.raises(ProvenanceError):
        begin(build_classifier(organism.head()))
    with pytest.raises(ModelError, match=r"h\.0\.mlp\.c_fc\.weight has requires_grad False"):
        begin(build_classifier(own_copy(head)).requires_grad_(False))
    model = build_classifier(own_copy(head)).requires_grad_(True)
    torch.nn.utils.parametrizations.weight_norm(model.transformer.h[0].mlp.c_fc)
    with pytest.raises(ModelError, match=r"h\.0\.mlp\.c_fc .* is not one whole matrix of weights"):
        begin(model)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    words = {"vocab_size": len(head.tokenizer), "pad_token_id": head.tokenizer.pad_token_id, "num_labels": 1}
    config = transformers.Phi3Config(**sizes, **words, max_position_embeddings=64, bos_token_id=0, eos_token_id=0)
    fused = transformers.AutoModelForSequenceClassification.from_config(config)
    architecture = RewardHead.from_classifier(fused, tokenizer=head.tokenizer).architecture
    first = NeuronSet.from_indices([(0, 0)], shape=(2, 48), site="mlp", architecture=architecture)
    with pytest.raises(ModelError, match="no Linear or Conv1D layer with one output for each of its 48 neurons"):
        begin(fused, first)
    bert = transformers.BertForSequenceClassification(transformers.BertConfig(**sizes, **words)).eval()
    encoder = RewardHead.from_classifier(bert, tokenizer=head.tokenizer)
    first = NeuronSet.from_indices([(0, 0)], shape=(2, 48), site="mlp", architecture=encoder.architecture)
    with pytest.raises(ModelError, match="fine-tuning needs a reward that is a row of a linear head"):
        fine_tune_neurons(encoder, pairs, first)
