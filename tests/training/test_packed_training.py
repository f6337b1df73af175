"""Training on packed batches: equal to TRL's trainer, frozen layers, resumption, length weights, several at a time."""

from dataclasses import fields, replace

import pytest
import torch
import transformers
from datasets import Dataset
from safetensors.torch import load_file
from tiny_models import grid
from torch.nn.functional import logsigmoid
from trained_folders import CONTEXT, record, tiny_tokenizer, weights

from rmtension.data._encoding import encode_pairs
from rmtension.data._packing import pair_collator, prompt_batches
from rmtension.data._pairs import PreferencePairs
from rmtension.errors import OptionError, StorageError
from rmtension.evaluation._length import length_weights
from rmtension.store._provenance import TRAINING_RECORD, digest_of_folder
from rmtension.synthetic._world import preference_world
from rmtension.training import _train_reward_model
from rmtension.training._family import train_seeds
from rmtension.training._family_trainings import FamilySettings
from rmtension.training._train_reward_model import train_reward_model

# Plain gradient steps, whose result is as exact as the gradients: Adam divides by their size, and turns a difference in
# the last digit of a small gradient into a whole step.
SGD = {"optim": "sgd", "lr_scheduler_type": "constant"}


@pytest.fixture(scope="module")
def world():
    return preference_world(0, n_train=48, n_test=48)


@pytest.fixture(scope="module")
def bpe(world):
    return tiny_tokenizer(world)


def save_base(folder, kind, tokenizer):
    """A base of three layers with random weights."""
    torch.manual_seed(0)
    ids = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": tokenizer.pad_token_id}
    if kind == "gpt2":
        sizes = {"n_positions": CONTEXT, "n_embd": 16, "n_layer": 3, "n_head": 2}
        config = transformers.GPT2Config(vocab_size=len(tokenizer), **sizes, **ids)
    else:
        sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2}
        config = transformers.LlamaConfig(vocab_size=len(tokenizer), max_position_embeddings=CONTEXT, **sizes, **ids)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def bases(tmp_path_factory, bpe):
    root = tmp_path_factory.mktemp("bases")
    return {kind: save_base(root / kind, kind, bpe) for kind in ("gpt2", "llama")}


@pytest.fixture(scope="module")
def pairs(world):
    """Pairs of which three share each prompt, and responses occur in several."""
    prompts = {pair.prompt: pair for pair in world.train["helpful"]}
    records = []
    for number, pair in enumerate(list(prompts.values())[:8]):
        responses = [pair.chosen, pair.rejected, pair.chosen + " really", pair.rejected + " not"]
        if number % 3 == 0:  # so that the longer response is chosen in some pairs and rejected in others
            responses = [responses[i] + " at all" * (i % 2) for i in (1, 0, 3, 2)]
        for chosen, rejected in ((0, 1), (0, 3), (2, 1)):
            records.append({"prompt": pair.prompt, "chosen": responses[chosen], "rejected": responses[rejected]})
    return PreferencePairs.from_records(records)


def train(pairs, base, folder, **options):
    settings = {"progress": False, "learning_rate": 0.1, "batch_size": 8, "trainer_options": SGD}
    return train_reward_model(pairs, base, folder, **{**settings, **options})


def furthest(first, second):
    assert set(first) == set(second)
    return max((first[name] - second[name]).abs().max().item() for name in first)


def train_plainly(pairs, base, tokenizer, *, n_steps, trained=None, weights=None, lr=0.1):
    """Gradient steps on all pairs at once, by transformers and autograd alone, a text at a time."""
    model = transformers.AutoModelForSequenceClassification.from_pretrained(base, num_labels=1)
    model.config.pad_token_id = tokenizer.pad_token_id
    generator = torch.Generator().manual_seed(0)
    model.score.weight.data = torch.randn(model.score.weight.shape, generator=generator) * 0.02
    model.double().eval()
    if trained is not None:
        names = ("layers", "h")
        blocks = next(getattr(model.base_model, name) for name in names if hasattr(model.base_model, name))
        for module in (model.get_input_embeddings(), *blocks[: len(blocks) - trained]):
            module.requires_grad_(False)
        if hasattr(model.base_model, "wpe"):
            model.base_model.wpe.requires_grad_(False)
    free = [parameter for parameter in model.parameters() if parameter.requires_grad]
    encoded = encode_pairs(tokenizer, pairs, max_length=CONTEXT)
    for _ in range(n_steps):
        margins = torch.stack(
            [
                model(torch.tensor([one.ids])).logits[0, 0] - model(torch.tensor([two.ids])).logits[0, 0]
                for one, two in zip(encoded.chosen, encoded.rejected, strict=True)
            ]
        )
        factors = torch.ones_like(margins) if weights is None else weights
        gradients = torch.autograd.grad(-(factors * logsigmoid(margins)).mean(), free)
        # transformers' Trainer clips the norm of the gradient to 1.
        norm = torch.sqrt(sum((gradient**2).sum() for gradient in gradients))
        for parameter, gradient in zip(free, gradients, strict=True):
            parameter.data -= lr * gradient * min(1.0, 1.0 / norm.item())
    return {name: value.float() for name, value in model.state_dict().items() if "lm_head" not in name}


# -- the same as TRL and as autograd -----------------------------------------------------------------------------------


@pytest.mark.parametrize("shared", [False, True])
def test_packed_training_equals_the_trainer_of_trl(shared, pairs, bases, bpe, tmp_path):
    from trl import RewardConfig, RewardTrainer

    ours = weights(
        train(pairs, bases["llama"], tmp_path / "ours", max_steps=3, batch_size=len(pairs), share_prompts=shared)
    )
    encoded = encode_pairs(bpe, pairs, max_length=CONTEXT)
    model = transformers.AutoModelForSequenceClassification.from_pretrained(bases["llama"], num_labels=1)
    generator = torch.Generator().manual_seed(0)
    model.score.weight.data = torch.randn(model.score.weight.shape, generator=generator) * 0.02
    sides = {"chosen_ids": encoded.chosen, "rejected_ids": encoded.rejected}
    table = Dataset.from_dict({name: [list(text.ids) for text in texts] for name, texts in sides.items()})
    known = {field.name for field in fields(RewardConfig)}
    # transformers 5 renamed it, and warns of the old name.
    checkpointing = "activation_checkpointing" if "activation_checkpointing" in known else "gradient_checkpointing"
    config = RewardConfig(
        output_dir=str(tmp_path / "trl"),
        per_device_train_batch_size=len(pairs),
        max_steps=3,
        learning_rate=0.1,
        max_length=None,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
        bf16=False,
        use_cpu=True,
        **{checkpointing: False},
        **SGD,
    )
    trainer = RewardTrainer(model=model, args=config, train_dataset=table, processing_class=bpe)
    trainer.train()
    theirs = dict(trainer.model.state_dict())
    # Float32, three steps of size 0.1: the last digits of gradients that are added in another order.
    assert furthest(ours, theirs) < 2e-6
    # Negative control: the steps moved the weights a thousand times as far.
    start = load_file(bases["llama"] / "model.safetensors")
    assert max((theirs[name] - start[name]).abs().max().item() for name in start if name in theirs) > 2e-3


@pytest.mark.parametrize("kind", grid(["gpt2", "llama"], keep=["llama"]))
@pytest.mark.parametrize(("kept", "shared"), [("memory", True), ("memory", False), ("files", True)])
def test_frozen_layers_stay_and_the_others_learn_as_with_all_layers_running(
    kind, kept, shared, pairs, bases, bpe, tmp_path
):
    streams = {} if kept == "memory" else {"streams": tmp_path / "streams"}
    options = {"max_steps": 2, "batch_size": len(pairs), "trained_layers": 1, "share_prompts": shared, **streams}
    ours = weights(train(pairs, bases[kind], tmp_path / "ours", **options))
    expected = train_plainly(pairs, bases[kind], bpe, n_steps=2, trained=1)
    assert furthest(ours, expected) < 2e-6
    start = load_file(bases[kind] / "model.safetensors")
    moved = {name for name in ours if name in start and not torch.equal(ours[name], start[name])}
    assert moved
    assert all(".2." in name or name.endswith(("norm.weight", "ln_f.weight", "ln_f.bias")) for name in moved)
    # Negative control: training all layers gives other weights.
    assert furthest(ours, train_plainly(pairs, bases[kind], bpe, n_steps=2)) > 1e-4


def test_streams_in_a_folder_are_computed_once_for_several_models(pairs, bases, tmp_path, monkeypatch):
    from rmtension.training import _frozen_layers

    runs = []
    run = _frozen_layers.FrozenLayers._run_lower
    monkeypatch.setattr(
        _frozen_layers.FrozenLayers, "_run_lower", lambda self, batch: runs.append(1) or run(self, batch)
    )
    options = {"max_steps": 1, "trained_layers": 2, "streams": tmp_path / "streams"}
    train(pairs, bases["llama"], tmp_path / "one", **options, seed=0)
    assert runs
    runs.clear()
    # Another seed puts the prompts into other batches; rows are kept by their tokens.
    train(pairs, bases["llama"], tmp_path / "two", **options, seed=1)
    assert not runs


def test_invalid_options_of_frozen_layers_are_refused(pairs, bases, tmp_path):
    with pytest.raises(OptionError, match="trained_layers: expected 1 to 3"):
        train(pairs, bases["llama"], tmp_path / "a", trained_layers=4)
    with pytest.raises(OptionError, match="streams"):
        train(pairs, bases["llama"], tmp_path / "a", streams=tmp_path / "streams")
    with pytest.raises(OptionError, match="patience"):
        train(pairs, bases["llama"], tmp_path / "a", patience=2)
    assert not list(tmp_path.iterdir())


# -- batches -----------------------------------------------------------------------------------------------------------


def test_a_batch_has_the_pairs_of_whole_prompts_and_at_most_as_many_as_asked(pairs, bpe):
    encoded = encode_pairs(bpe, pairs, max_length=CONTEXT)
    batches = prompt_batches(encoded, pairs_per_batch=7, pack_up_to=4 * CONTEXT)
    assert sorted(index for batch in batches for index in batch.indices[: batch.n_pairs]) == list(range(len(pairs)))
    for batch in batches:
        assert batch.n_pairs <= 7
        prompts = [pairs[index].prompt for index in batch.indices[: batch.n_pairs]]
        assert all(prompts.count(prompt) == 3 for prompt in prompts)
        assert len(batch.input_ids) == len(set(prompts))
    # Four distinct responses in three pairs: a prompt and each response run once.
    texts = [text for side in (encoded.chosen, encoded.rejected) for text in side]
    n_run = sum(int(batch.position_mask("all").sum()) for batch in batches)
    assert n_run < 0.5 * sum(map(len, texts))


def test_the_seed_determines_which_prompts_share_a_batch(world, bpe):
    encoded = encode_pairs(bpe, world.train["helpful"], max_length=CONTEXT)
    first, again, other = (
        {frozenset(batch.indices) for batch in prompt_batches(encoded, pairs_per_batch=2, seed=seed)}
        for seed in (0, 0, 1)
    )
    assert first == again != other


def test_batches_have_prompts_of_similar_length(world, bpe):
    encoded = encode_pairs(bpe, world.train["helpful"], max_length=CONTEXT)
    batches = prompt_batches(encoded, pairs_per_batch=4)
    n_columns = sum(batch.input_ids.numel() for batch in batches)
    # Prompts in the order of the pairs, four at a time.
    collate = pair_collator(encoded)
    plain = [collate(range(start, min(start + 4, len(encoded)))) for start in range(0, len(encoded), 4)]
    assert n_columns < 0.95 * sum(batch.input_ids.numel() for batch in plain)


# -- length ------------------------------------------------------------------------------------------------------------


def test_length_weights_make_the_longer_response_worth_nothing():
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(3, 60, (400, 2), generator=generator)
    # The longer response is chosen in three of four pairs.
    first = torch.where(torch.rand(400, generator=generator) < 0.75, lengths.amax(1), lengths.amin(1))
    second = lengths.sum(1) - first
    pairs = PreferencePairs.from_records(
        {"prompt": f"{row}", "chosen": "a" * int(one), "rejected": "b" * int(two)}
        for row, (one, two) in enumerate(zip(first, second, strict=True))
        if one != two
    )
    given = length_weights(pairs, most=100.0)
    longer = torch.tensor([len(pair.chosen) > len(pair.rejected) for pair in pairs]).double()
    assert longer.mean() > 0.7
    # A bin with one kind only keeps its weights; the largest ratios here have both.
    assert (given @ longer / given.sum()).item() == pytest.approx(0.5, abs=1e-9)
    assert given.mean().item() == pytest.approx(1.0)
    capped = length_weights(pairs, most=1.2)
    assert capped.max() / capped.min() <= 1.2 / 0.5
    with pytest.raises(OptionError, match="n_bins"):
        length_weights(pairs, n_bins=0)


def test_balanced_training_weights_the_loss(pairs, bases, bpe, tmp_path):
    folder = train(pairs, bases["llama"], tmp_path / "a", max_steps=2, batch_size=len(pairs), balance_length=True)
    given = length_weights(pairs)
    assert given.std() > 0.1
    expected = train_plainly(pairs, bases["llama"], bpe, n_steps=2, weights=given)
    assert furthest(weights(folder), expected) < 2e-6
    assert furthest(weights(folder), train_plainly(pairs, bases["llama"], bpe, n_steps=2)) > 1e-5


# -- interruptions -----------------------------------------------------------------------------------------------------


class StopError(Exception):
    """Raised in the middle of a training."""


@pytest.mark.parametrize("validated", [False, True])
def test_an_interrupted_training_continues_with_the_same_result(validated, world, bases, tmp_path):
    data, held_out = world.train["helpful"].split(0.25, seed=0)
    options = {"epochs": 3.0, "batch_size": 4, "dropout": True, "trainer_options": None, "learning_rate": 1e-3}
    options |= {"validation": held_out, "eval_steps": 2} if validated else {}
    whole = train(data, bases["gpt2"], tmp_path / "whole", **options)
    n_steps = record(whole)["result"]["n_steps"]
    assert n_steps > 8

    def stop(line):
        if line.startswith(f"step {n_steps - 3} "):
            raise StopError

    steps = []
    with pytest.raises(StopError):
        train(data, bases["gpt2"], tmp_path / "rm", **options, work=tmp_path / "work", on_log=stop)
    assert not (tmp_path / "rm").exists()
    # What a kill in the middle of writing leaves is not read.
    (tmp_path / "work" / "checkpoint-9999").mkdir()
    done = train(data, bases["gpt2"], tmp_path / "rm", **options, work=tmp_path / "work", on_log=steps.append)
    first = int(steps[0].split()[1])
    assert 1 < first <= n_steps - 2
    assert furthest(weights(done), weights(whole)) == 0
    assert record(done)["result"]["best_step"] == record(whole)["result"]["best_step"]
    assert not (tmp_path / "work").exists()


def test_patience_counts_evaluations_before_an_interruption(world, bases, tmp_path):
    """Interrupted in the evaluation that would end the training: the checkpoint has the one before it."""
    data, held_out = world.train["helpful"].split(0.25, seed=0)
    options = {"validation": held_out, "eval_steps": 1, "max_steps": 40, "learning_rate": 30.0, "batch_size": 4}
    whole = record(train(data, bases["llama"], tmp_path / "whole", **options, patience=2))["result"]
    n_steps = whole["n_steps"]

    def stop(line):
        if line.startswith(f"step {n_steps} ") and "validation" in line:
            raise StopError

    work = tmp_path / "work"
    with pytest.raises(StopError):
        train(data, bases["llama"], tmp_path / "rm", **options, patience=2, work=work, on_log=stop)
    done = train(data, bases["llama"], tmp_path / "rm", **options, patience=2, work=work)
    again = record(done)["result"]
    assert again["best_step"] == whole["best_step"]
    assert again["n_steps"] == n_steps
    assert furthest(weights(done), weights(tmp_path / "whole")) == 0


@pytest.mark.parametrize("often", [{"eval_steps": 1, "max_steps": 40}, {"epochs": 8.0}], ids=["steps", "epochs"])
def test_a_stop_that_was_decided_before_an_interruption_stays(often, world, bases, tmp_path, monkeypatch):
    data, held_out = world.train["helpful"].split(0.25, seed=0)
    options = {"validation": held_out, "learning_rate": 30.0, "batch_size": 12, **often}
    whole = record(train(data, bases["llama"], tmp_path / "whole", **options, patience=2))["result"]
    work = tmp_path / "work"
    with monkeypatch.context() as patch:
        # Killed after the last checkpoint, before the model was written.
        patch.setattr("rmtension.training._train_reward_model.save_model", lambda *_: (_ for _ in ()).throw(StopError))
        with pytest.raises(StopError):
            train(data, bases["llama"], tmp_path / "rm", **options, patience=2, work=work)
    done = train(data, bases["llama"], tmp_path / "rm", **options, patience=2, work=work)
    assert record(done)["result"]["best_step"] == whole["best_step"]
    assert furthest(weights(done), weights(tmp_path / "whole")) == 0


def test_a_work_folder_belongs_to_one_training(world, bases, tmp_path):
    def stop(line):
        raise StopError

    pairs = world.train["helpful"]
    with pytest.raises(StopError):
        train(pairs, bases["llama"], tmp_path / "rm", work=tmp_path / "work", on_log=stop)
    with pytest.raises(StorageError, match="seed='0' there, '1' now"):
        train(pairs, bases["llama"], tmp_path / "rm", work=tmp_path / "work", seed=1)


def test_training_stops_when_the_validation_loss_does_not_fall(world, bases, tmp_path):
    # With a step this large the loss rises from the first evaluation on or wanders; 40 evaluations are possible.
    data, held_out = world.train["helpful"].split(0.25, seed=0)
    options = {"validation": held_out, "eval_steps": 1, "max_steps": 40, "learning_rate": 30.0, "batch_size": 4}
    stopped = record(train(data, bases["llama"], tmp_path / "a", **options, patience=2))["result"]
    losses = [entry["validation loss"] for entry in stopped["history"] if "validation loss" in entry]
    assert stopped["n_steps"] == len(losses) < 40
    best = losses.index(min(losses))
    assert len(losses) == best + 3
    assert stopped["best_step"] == best + 1


@pytest.mark.parametrize("select_by", ["loss", "accuracy"])
def test_the_checkpoint_that_is_kept_may_be_the_last(select_by, world, bases, tmp_path):
    """It is evaluated whether or not `eval_steps` divides the number of steps."""
    data, held_out = world.train["helpful"].split(0.25, seed=0)
    options = {"validation": held_out, "eval_steps": 3, "max_steps": 10, "learning_rate": 3e-3, "batch_size": 4}
    result = record(train(data, bases["gpt2"], tmp_path / "a", **options, select_by=select_by))["result"]
    entries = {entry["step"]: entry for entry in result["history"] if "validation loss" in entry}
    assert list(entries) == [3, 6, 9, 10]
    kept = entries[result["best_step"]]
    if select_by == "loss":
        assert kept["validation loss"] == min(entry["validation loss"] for entry in entries.values())
    else:
        assert kept["validation accuracy"] == max(entry["validation accuracy"] for entry in entries.values())


# -- several at a time -------------------------------------------------------------------------------------------------


@pytest.mark.grid  # starting processes takes long
def test_models_trained_side_by_side_are_those_trained_one_by_one(world, bases, tmp_path):
    settings = FamilySettings(max_length=CONTEXT, reward_epochs=1.0, reward_trained_layers=2, reward_batch_size=12)
    parts = {name: part.split(0.25, seed=0) for name, part in world.train.items()}
    train_pairs = {name: part[0] for name, part in parts.items()}
    validation = {name: part[1] for name, part in parts.items()}
    options = {"base": bases["llama"], "settings": settings, "validation": validation, "progress": False}
    lines, stages = [], []
    told = {"on_log": lambda label, line: lines.append((label, line)), "on_stage": stages.append}
    together = train_seeds(train_pairs, tmp_path / "together", [0], jobs=2, **options, **told)[0]
    alone = train_seeds(train_pairs, tmp_path / "alone", [0], **options)[0]
    for name in ("helpful", "harmless", "mixed"):
        # Another number of threads may change the last digits.
        assert furthest(weights(getattr(together, name)), weights(getattr(alone, name))) < 1e-6
    assert {label for label, _ in lines} == {"helpful, seed 0", "harmless, seed 0", "mixed, seed 0"}
    assert any("validation accuracy" in line for _, line in lines)
    assert len(stages) == 3
    assert not (tmp_path / "together" / "seed-0" / "streams").exists()
    stages.clear()
    train_seeds(train_pairs, tmp_path / "together", [0], jobs=2, **options, **told)
    assert not stages
    # A model of another schedule is another model, whichever field differs.
    for field, value in (("reward_trained_layers", 1), ("reward_balance_length", True), ("max_length", 150)):
        changed = {**options, "settings": replace(settings, **{field: value})}
        with pytest.raises(StorageError, match=f"expected a model trained with {field.removeprefix('reward_')}="):
            train_seeds(train_pairs, tmp_path / "together", [0], **changed)


@pytest.mark.grid  # starting processes takes long
def test_an_error_in_a_process_is_raised(world, bases, tmp_path):
    settings = FamilySettings(max_length=CONTEXT, reward_trained_layers=9)
    with pytest.raises(OptionError, match="trained_layers"):
        train_seeds(world.train, tmp_path, [0], jobs=2, base=bases["llama"], settings=settings, progress=False)


def test_private_keywords_are_not_recorded_as_options(world, bases, tmp_path):
    done = train(world.train["helpful"], bases["llama"], tmp_path / "rm", max_steps=1, on_log=lambda line: None)
    assert set(record(done)["options"]) & set(_train_reward_model._NO_OPTION) == set()


def test_the_record_of_a_training_does_not_identify_the_model(tmp_path):
    """A training that was interrupted logs other losses and gives the same model."""
    for name in ("model.safetensors", "config.json", TRAINING_RECORD):
        (tmp_path / name).write_text("1")
    before = digest_of_folder(tmp_path)
    (tmp_path / TRAINING_RECORD).write_text("2")
    assert digest_of_folder(tmp_path) == before
    (tmp_path / "config.json").write_text("2")
    assert digest_of_folder(tmp_path) != before
