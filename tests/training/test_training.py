"""Training: what the seed governs, what is read, what a folder holds, what is refused. Tiny models, few steps."""

import logging
import random
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file
from tiny_models import grid, make_config, make_pairs, make_tokenizer, put_bos_first
from trained_folders import CONTEXT, record, tiny_tokenizer, weights

from rmtension import _progress as progress
from rmtension.cli._command_line import main
from rmtension.data._encoding import encode_pairs
from rmtension.data._pair import join_prompt
from rmtension.data._pairs import PreferencePairs
from rmtension.errors import DataError, ModelError, OptionError, StorageError
from rmtension.store._provenance import TRAINING_RECORD
from rmtension.synthetic._world import preference_world
from rmtension.training._family import train_family, train_seeds
from rmtension.training._family_trainings import FamilySettings
from rmtension.training._reward_trainer import RewardTrainer
from rmtension.training._select_pairs import select_pairs
from rmtension.training._train_base_model import train_base_model
from rmtension.training._train_reward_model import train_reward_model
from rmtension.training._train_tokenizer import train_tokenizer
from rmtension.training._trainer_run import arguments, isolated


@pytest.fixture(scope="module")
def world():
    return preference_world(0, n_train=48, n_test=48)


@pytest.fixture(scope="module")
def bpe(world):
    return tiny_tokenizer(world)


def gpt2_config(n_tokens, **changes):
    sizes = {"n_positions": CONTEXT, "n_embd": 16, "n_layer": 1, "n_head": 2, "bos_token_id": 0, "eos_token_id": 0}
    return transformers.GPT2Config(**{"vocab_size": n_tokens, **sizes, **changes})


@pytest.fixture(scope="module")
def base(tmp_path_factory, world, bpe):
    """Folder of a one-layer language model with dropout 0.1, trained for three steps."""
    folder = tmp_path_factory.mktemp("training") / "base"
    done = train_base_model(world.texts, gpt2_config(len(bpe)), bpe, folder, max_steps=3, batch_size=4, progress=False)
    assert sum(value.numel() for value in load_file(done / "model.safetensors").values()) < 12_000
    return done


def quick(pairs, base, folder, **options):
    return train_reward_model(pairs, base, folder, **{"max_steps": 2, "batch_size": 4, "progress": False, **options})


def identical(first, second):
    return set(first) == set(second) and all(torch.equal(first[name], second[name]) for name in first)


@pytest.fixture
def orders(monkeypatch):
    """The chosen texts of every training batch, in order."""
    seen = []
    compute = RewardTrainer.compute_loss

    def recording(self, model, inputs, *args, **kwargs):
        batch = inputs["batch"]
        rows = batch.input_ids[batch.rows]
        seen.append([tuple(rows[text][batch.mask[text]].tolist()) for text in range(batch.n_pairs)])
        return compute(self, model, inputs, *args, **kwargs)

    monkeypatch.setattr(RewardTrainer, "compute_loss", recording)
    return seen


# -- seed --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dropout", grid([False, True], keep=[True]))
def test_the_same_seed_gives_the_same_weights_whatever_the_callers_random_state(dropout, world, base, tmp_path):
    torch.manual_seed(1)
    first = weights(quick(world.train["helpful"], base, tmp_path / "a", seed=3, dropout=dropout))
    torch.manual_seed(2)
    np.random.seed(7)  # noqa: NPY002
    random.seed(7)
    again = weights(quick(world.train["helpful"], base, tmp_path / "b", seed=3, dropout=dropout))
    assert identical(first, again)
    # Negative control: dropout has an effect, so that the equality above is not for want of it.
    other = quick(world.train["helpful"], base, tmp_path / "c", seed=3, dropout=not dropout)
    assert not identical(first, weights(other))


def test_another_seed_gives_another_order(world, base, tmp_path, orders):
    runs = []
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        orders.clear()
        quick(world.train["helpful"], base, tmp_path / name, seed=seed, max_steps=3)
        runs.append(orders[:3])
    first, again, other = runs
    assert len(first) == 3
    assert first == again != other


def test_another_seed_gives_another_head_of_the_stated_spread(world, bpe, tmp_path):
    # A learning rate of 0 leaves the head as it was drawn.
    config = gpt2_config(len(bpe), n_embd=1024, n_layer=1)
    options = {"tokenizer": bpe, "learning_rate": 0.0, "max_steps": 1, "batch_size": 1}
    folders = [quick(world.train["helpful"], config, tmp_path / str(seed), seed=seed, **options) for seed in range(2)]
    heads = [weights(folder)["score.weight"] for folder in folders]
    assert heads[0].shape == (1, 1024)
    # The standard error of a standard deviation of 1024 normal draws is 0.02 / sqrt(2048) = 0.00044; four of them.
    assert all(head.std().item() == pytest.approx(0.02, abs=0.0018) for head in heads)
    assert abs(torch.corrcoef(torch.cat(heads))[0, 1].item()) < 0.15


def test_another_seed_drops_other_activations(world, base, tmp_path):
    dropped = {}
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        masks = []

        def note(module, inputs, output, masks=masks):
            if isinstance(module, torch.nn.Dropout) and module.training and output.ndim == 3:
                masks.append((output == 0).flatten()[:256].tolist())

        handle = torch.nn.modules.module.register_module_forward_hook(note)
        try:
            quick(world.train["helpful"], base, tmp_path / name, seed=seed, dropout=True, max_steps=1)
        finally:
            handle.remove()
        dropped[name] = masks[:3]
    assert len(dropped["a"]) == 3
    assert dropped["a"] == dropped["b"] != dropped["c"]


def test_the_callers_random_states_and_settings_are_restored(world, base, tmp_path):
    def states():
        return (
            torch.get_rng_state().tolist(),
            np.random.get_state()[1].tolist(),  # noqa: NPY002
            transformers.logging.get_verbosity(),
            transformers.logging.is_progress_bar_enabled(),
        )

    before = states()
    quick(world.train["helpful"], base, tmp_path / "a", seed=11)
    assert states() == before
    with pytest.raises(OptionError):
        quick(world.train["helpful"], base, tmp_path / "b", seed=11, trainer_options={"no_such_field": 1})
    assert states() == before
    # Python's generator is drawn from by this suite's shape checker, so it is looked at from inside.
    state = random.getstate()
    with isolated(5):
        random.random()
    assert random.getstate() == state


# -- data --------------------------------------------------------------------------------------------------------------


def test_training_reads_the_tokens_that_scoring_reads(world, base, bpe, tmp_path, orders):
    pairs = world.train["harmless"]
    quick(pairs, base, tmp_path / "a", max_steps=None, epochs=1.0)
    encoded = encode_pairs(bpe, pairs, max_length=CONTEXT)
    assert sorted(ids for batch in orders for ids in batch) == sorted(text.ids for text in encoded.chosen)


def test_long_pairs_are_cut_from_the_left_and_none_is_dropped(world, base, tmp_path, orders):
    pairs = PreferencePairs.from_records(
        {"prompt": "far away " * 90 + pair.prompt, "chosen": pair.chosen, "rejected": pair.rejected}
        for pair in world.train["helpful"]
    )
    done = quick(pairs, base, tmp_path / "a", max_steps=None, epochs=1.0)
    lengths = [len(ids) for batch in orders for ids in batch]
    assert len(lengths) == len(pairs)
    assert max(lengths) == CONTEXT
    assert record(done)["n_prompts_cut"] == len(pairs)
    with pytest.raises(DataError, match="a response has"):
        quick(pairs, base, tmp_path / "b", max_length=12)
    assert record(quick(pairs, base, tmp_path / "b", max_length=12, truncate_response=True))["n_responses_cut"] > 0


@pytest.mark.parametrize(
    ("shares", "n_pairs", "counts"),
    [
        ({"helpful": 0.5, "harmless": 0.5}, None, (48, 48)),
        ({"helpful": 0.25, "harmless": 0.75}, None, (16, 48)),
        ({"helpful": 0.1, "harmless": 0.9}, 30, (3, 27)),
        ({"helpful": 1 / 3, "harmless": 2 / 3}, 10, (3, 7)),
    ],
)
def test_proportions_hold_exactly_to_rounding(world, shares, n_pairs, counts):
    mixed = select_pairs(world.train, proportions=shares, n_pairs=n_pairs, seed=4)
    assert (len(mixed.filter(objective="helpful")), len(mixed.filter(objective="harmless"))) == counts
    assert len({pair.id for pair in mixed}) == len(mixed)
    # The labels of one set of pairs serve as well as a dict.
    together = world.train["helpful"] + world.train["harmless"]
    assert select_pairs(together, proportions=shares, n_pairs=n_pairs, seed=4) == mixed


def test_one_objective_is_that_objective(world):
    assert select_pairs(world.train, objective="harmless") == world.train["harmless"]
    assert select_pairs(world.train["helpful"]) == world.train["helpful"]
    assert len(select_pairs(world.train, objective="helpful", n_pairs=7, seed=1)) == 7
    drawn = [select_pairs(world.train, objective="helpful", n_pairs=7, seed=seed) for seed in (1, 1, 2)]
    assert drawn[0] == drawn[1] != drawn[2]


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({}, OptionError, "Pass objective"),
        ({"objective": "helpful", "proportions": {"helpful": 1.0}}, OptionError, "got both"),
        ({"objective": "honest"}, OptionError, r"expected some of .*got \['honest'\]"),
        ({"proportions": {"helpful": 0.5, "honest": 0.5}}, OptionError, r"expected some of .*got \['honest'\]"),
        ({"proportions": {"helpful": 0.5, "harmless": 0.6}}, OptionError, "sum to 1"),
        ({"proportions": {"helpful": 0.0, "harmless": 1.0}}, OptionError, "positive"),
        ({"proportions": {}}, OptionError, "positive"),
        ({"proportions": {"helpful": 0.5, "harmless": 0.5}, "n_pairs": 97}, DataError, "1 to 96"),
        ({"objective": "helpful", "n_pairs": 49}, DataError, "which is 48, got 49"),
    ],
)
def test_invalid_selections_are_refused(world, options, error, message):
    with pytest.raises(error, match=message):
        select_pairs(world.train, **options)


# -- validation --------------------------------------------------------------------------------------------------------


def test_validation_keeps_the_best_checkpoint(world, base, tmp_path):
    train, held_out = world.train["helpful"].split(0.25, seed=0)
    # Steps this large make the loss go up and down. Under a constant rate, a run of k steps ends where a longer one
    # passes after k steps, so that the runs without validation say what the best must be.
    options = {"learning_rate": 0.3, "trainer_options": {"lr_scheduler_type": "constant"}}
    done = quick(train, base, tmp_path / "best", validation=held_out, max_steps=4, eval_steps=1, **options)
    plain = [quick(train, base, tmp_path / str(k), max_steps=k, **options) for k in range(1, 5)]
    losses = [loss(folder, held_out) for folder in plain]
    assert max(losses) > 1.01 * min(losses)
    assert identical(weights(done), weights(plain[int(np.argmin(losses))]))
    result = record(done)["result"]
    assert result["best_step"] == int(np.argmin(losses)) + 1
    noted = [entry["validation loss"] for entry in result["history"] if "validation loss" in entry]
    assert noted == pytest.approx(losses, rel=1e-4)
    assert record(done)["n_validation_pairs"] == len(held_out)
    assert not list(tmp_path.glob("**/checkpoint-*"))


def loss(folder, pairs):
    """Mean of -log sigmoid(margin), with transformers alone, a text at a time."""
    model = transformers.AutoModelForSequenceClassification.from_pretrained(folder)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    rewards = []
    with torch.no_grad():
        for pair in pairs:
            for text in (join_prompt(pair.prompt, pair.chosen), join_prompt(pair.prompt, pair.rejected)):
                rewards.append(model(**tokenizer(text, return_tensors="pt")).logits.item())
    margins = torch.tensor(rewards, dtype=torch.float64).view(-1, 2) @ torch.tensor([1.0, -1.0], dtype=torch.float64)
    return -torch.nn.functional.logsigmoid(margins).mean().item()


def test_a_validation_prompt_may_not_be_a_training_prompt(world, base, tmp_path):
    with pytest.raises(DataError, match="1 of its prompts are training prompts"):
        quick(world.train["helpful"], base, tmp_path / "a", validation=world.train["harmless"][:1])
    assert not list(tmp_path.iterdir())


# -- trained models ---------------------------------------------------------------------------------------------------


def test_the_folder_holds_only_a_reward_model(world, base, bpe, tmp_path):
    done = quick(world.train["helpful"], base, tmp_path / "rm", seed=9)
    assert {path.name for path in done.iterdir()} == {
        "config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
        TRAINING_RECORD,
    }
    assert [path.name for path in tmp_path.iterdir()] == ["rm"]
    model, info = transformers.AutoModelForSequenceClassification.from_pretrained(done, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert (model.config.num_labels, model.config.pad_token_id) == (1, bpe.pad_token_id)
    assert {value.dtype for value in weights(done).values()} == {torch.float32}
    tokenizer = transformers.AutoTokenizer.from_pretrained(done)
    assert [tokenizer(text)["input_ids"] for text in world.texts] == [bpe(text)["input_ids"] for text in world.texts]
    noted = record(done)
    assert noted["options"]["seed"] == 9
    assert noted["options"]["max_length"] == CONTEXT
    assert noted["data"] == world.train["helpful"].digest
    assert noted["n_pairs"] == len(world.train["helpful"])
    assert torch.__version__.startswith(noted["versions"]["torch"].partition("+")[0])


def test_training_is_quiet_unless_asked_and_watched(world, base, tmp_path, capfd, caplog, monkeypatch):
    with caplog.at_level(logging.WARNING):
        quick(world.train["helpful"], base, tmp_path / "a")
    assert capfd.readouterr() == ("", "")
    assert not [entry for entry in caplog.records if entry.name.startswith(("transformers", "trl"))]
    # Where stderr is no terminal, asking is not enough.
    quick(world.train["helpful"], base, tmp_path / "b", progress=True)
    assert capfd.readouterr() == ("", "")
    monkeypatch.setattr(progress, "is_watched", lambda: True)
    quick(world.train["helpful"], base, tmp_path / "c", progress=True)
    out, err = capfd.readouterr()
    assert out == ""
    assert "2/2" in err


def test_computing_in_bfloat16_leaves_weights_in_float32(world, base, tmp_path):
    done = quick(world.train["helpful"], base, tmp_path / "a", dtype=torch.bfloat16)
    full = quick(world.train["helpful"], base, tmp_path / "b")
    assert {value.dtype for value in weights(done).values()} == {torch.float32}
    assert not identical(weights(done), weights(full))
    with pytest.raises(OptionError, match="dtype"):
        quick(world.train["helpful"], base, tmp_path / "c", dtype=torch.float16)


def test_a_model_learns_a_rule_that_one_token_tells(bpe, tmp_path):
    pairs = PreferencePairs.from_records(
        {"prompt": f"Question {number}?", "chosen": f"yes {number % 7}", "rejected": f"no {number % 5}"}
        for number in range(64)
    )
    train, test = pairs.split(0.25)
    done = quick(train, gpt2_config(len(bpe)), tmp_path / "a", tokenizer=bpe, max_steps=40, learning_rate=1e-2)
    # log 2 is the loss of a model that knows nothing.
    assert loss(done, test) < 0.1
    assert loss(done, test.swapped()) > 2


# -- what is refused ---------------------------------------------------------------------------------------------------


def test_a_folder_in_use_is_kept(world, base, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    for overwrite in (False, True):
        with pytest.raises(StorageError, match=r"is not empty|not written by rmtension"):
            quick(world.train["helpful"], base, tmp_path, overwrite=overwrite)
    done = quick(world.train["helpful"], base, tmp_path / "rm", seed=1)
    with pytest.raises(StorageError, match="overwrite=True"):
        quick(world.train["helpful"], base, done, seed=2)
    assert record(done)["options"]["seed"] == 1
    # A run that fails leaves the earlier one in place.
    with pytest.raises(DataError):
        quick(world.train["helpful"], base, done, seed=2, max_length=5, overwrite=True)
    assert record(done)["options"]["seed"] == 1
    quick(world.train["helpful"], base, done, seed=2, overwrite=True)
    assert record(done)["options"]["seed"] == 2
    assert sorted(path.name for path in tmp_path.iterdir()) == ["notes.txt", "rm"]


def test_a_tokenizer_without_a_pad_token_is_refused(world, base, tmp_path):
    tokenizer = transformers.AutoTokenizer.from_pretrained(base)
    tokenizer.pad_token = None
    with pytest.raises(ModelError, match=r"Set tokenizer\.pad_token"):
        quick(world.train["helpful"], base, tmp_path / "a", tokenizer=tokenizer)
    with pytest.raises(ModelError, match=r"Set tokenizer\.pad_token"):
        train_base_model(world.texts, gpt2_config(400), tokenizer, tmp_path / "a")


def test_bases_that_do_not_fit_are_refused(world, base, bpe, tmp_path):
    pairs = world.train["helpful"]
    with pytest.raises(OptionError, match="tokenizer: required"):
        quick(pairs, gpt2_config(len(bpe)), tmp_path / "a")
    with pytest.raises(ModelError, match="embedding has 300 rows"):
        quick(pairs, gpt2_config(300), tmp_path / "a", tokenizer=bpe)
    with pytest.raises(ModelError, match="could not load"):
        quick(pairs, tmp_path / "nowhere", tmp_path / "a")
    with pytest.raises(OptionError, match="max_length: expected 1 to 160"):
        quick(pairs, base, tmp_path / "a", max_length=161)
    with pytest.raises(OptionError, match=r"seed.* set by other arguments"):
        quick(pairs, base, tmp_path / "a", trainer_options={"seed": 1})
    bert = transformers.BertConfig(
        vocab_size=400, hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8
    )
    with pytest.raises(ModelError, match="a linear layer 'score'"):
        quick(pairs, bert, tmp_path / "a", tokenizer=bpe)
    assert not list(tmp_path.iterdir())


def test_the_head_of_a_classifier_is_replaced(world, base, bpe, tmp_path):
    config = gpt2_config(len(bpe), num_labels=3, pad_token_id=bpe.pad_token_id)
    transformers.GPT2ForSequenceClassification(config).save_pretrained(tmp_path / "three")
    bpe.save_pretrained(tmp_path / "three")
    done = quick(world.train["helpful"], tmp_path / "three", tmp_path / "a", learning_rate=0.0)
    kept, start = weights(done), weights(tmp_path / "three")
    assert kept.pop("score.weight").shape == (1, 16)
    assert start.pop("score.weight").shape == (3, 16)
    assert identical(kept, start)


def test_a_checkpoint_that_lacks_weights_is_refused(world, base, bpe, tmp_path):
    from safetensors.torch import save_file

    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        (tmp_path / "broken").mkdir(exist_ok=True)
        (tmp_path / "broken" / name).write_bytes((base / name).read_bytes())
    partial = {name: value for name, value in weights(base).items() if "mlp.c_fc.weight" not in name}
    save_file(partial, tmp_path / "broken" / "model.safetensors", {"format": "pt"})
    with pytest.raises(ModelError, match=r"lacks weights .*mlp\.c_fc\.weight"):
        quick(world.train["helpful"], tmp_path / "broken", tmp_path / "a")


def test_a_missing_extra_is_named(monkeypatch, world, base, tmp_path):
    monkeypatch.setitem(sys.modules, "accelerate", None)
    with pytest.raises(ModelError, match="pip install accelerate"):
        quick(world.train["helpful"], base, tmp_path / "a")


def test_a_missing_extra_is_named_before_anything_is_trained(monkeypatch, world, tmp_path, capsys):
    """The base would not need it."""
    monkeypatch.setitem(sys.modules, "accelerate", None)
    with pytest.raises(ModelError, match=r"needs the package 'accelerate'\. Run `pip install accelerate`"):
        train_family(world.train, tmp_path / "family")
    assert main(["demo", "--out", str(tmp_path / "demo"), "--quiet"]) == 2
    assert capsys.readouterr().err.startswith("rmtension: error: training: needs the package 'accelerate'.")
    assert list(tmp_path.iterdir()) == []


# -- base model, tokenizer, family -------------------------------------------------------------------------------------


def test_base_model_is_seeded_and_reads_long_texts_in_pieces(world, bpe, tmp_path):
    text = " ".join(world.texts[:6])
    n_pieces = -(-(len(bpe(text, verbose=False)["input_ids"]) + 1) // CONTEXT)
    assert n_pieces > 2
    options = {"batch_size": 1, "progress": False, "learning_rate": 1e-3}
    config = gpt2_config(len(bpe))
    done = [
        train_base_model([text], config, bpe, tmp_path / str(i), seed=seed, **options)
        for i, seed in enumerate((0, 0, 1))
    ]
    assert record(done[0])["result"]["n_steps"] == n_pieces
    first, again, other = map(weights, done)
    assert identical(first, again)
    assert not identical(first, other)
    assert (config.pad_token_id, config.num_labels) == (None, 2)  # the caller's config is left alone
    model = transformers.AutoModelForCausalLM.from_pretrained(done[0])
    assert model.config.pad_token_id == bpe.pad_token_id
    with pytest.raises(DataError, match="texts"):
        train_base_model([], config, bpe, tmp_path / "empty")


def test_resume_keeps_a_base_that_is_trained(world, bpe, base):
    config, options = gpt2_config(len(bpe)), {"max_steps": 3, "batch_size": 4, "progress": False}
    written = (base / TRAINING_RECORD).stat().st_mtime_ns
    assert train_base_model(world.texts, config, bpe, base, **options, resume=True) == base
    assert (base / TRAINING_RECORD).stat().st_mtime_ns == written
    for changed in ({"max_steps": 4}, {"seed": 1}, {"max_length": 100}):
        with pytest.raises(StorageError, match=f"trained with {next(iter(changed))}="):
            train_base_model(world.texts, config, bpe, base, **(options | changed), resume=True)
    with pytest.raises(StorageError, match="trained with data="):
        train_base_model(world.texts[1:], config, bpe, base, **options, resume=True)
    with pytest.raises(StorageError, match="trained with config="):
        train_base_model(world.texts, gpt2_config(len(bpe), n_layer=2), bpe, base, **options, resume=True)
    with pytest.raises(StorageError, match="is not empty"):
        train_base_model(world.texts, config, bpe, base, **options)


@pytest.mark.grid
def test_tokenizer_is_the_same_in_another_process(world):
    code = (
        "from rmtension.synthetic import preference_world as w; from rmtension.training import train_tokenizer as t;"
        "print(t(w(0, n_train=48, n_test=48).texts, 320).backend_tokenizer.to_str())"
    )
    # Another process hashes strings differently, which is what an unordered merge would depend on.
    other = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True, text=True).stdout
    assert train_tokenizer(world.texts, 320).backend_tokenizer.to_str() == other.strip()


def test_tokenizer_loses_nothing(world):
    tokenizer = train_tokenizer(world.texts, 320)
    assert len(tokenizer) == 320
    assert tokenizer.pad_token_id != tokenizer.eos_token_id
    odd = "Grüße, 世界!\n\n\tline  two \x07"
    assert tokenizer.decode(tokenizer(odd)["input_ids"]) == odd
    with pytest.raises(OptionError, match="at least 258"):
        train_tokenizer(world.texts, 257)
    with pytest.raises(OptionError, match="another token than eos"):
        train_tokenizer(world.texts, 300, pad_token="<|endoftext|>")


def test_family_has_four_models_with_one_start(world, tmp_path):
    settings = FamilySettings(
        n_layer=2, d_model=16, n_head=2, vocab_size=320, max_length=CONTEXT, base_epochs=0.1, reward_epochs=0.5
    )
    family = train_family(world.train, tmp_path, settings=settings, seed=2, progress=False)
    assert list(family) == ["base", "helpful", "harmless", "mixed"]
    assert record(family["mixed"])["n_pairs"] == 96
    models = {name: weights(folder) for name, folder in family.items()}
    assert models["helpful"]["transformer.h.0.mlp.c_fc.weight"].shape == (16, 64)
    assert "transformer.h.1.mlp.c_fc.weight" in models["base"]
    # A given base is used, not trained again, and gives the same reward models.
    rest = train_family(world.train, tmp_path / "more", base=family["base"], settings=settings, seed=2, progress=False)
    assert rest["base"] == family["base"]
    assert all(identical(models[name], weights(rest[name])) for name in ("helpful", "harmless", "mixed"))
    with pytest.raises(StorageError, match="base is not empty"):
        train_family(world.train, tmp_path, settings=settings)


def test_a_resumed_family_keeps_only_models_of_the_same_run(world, tmp_path):
    """Other sizes of the base, another base by its name, and other validation pairs."""
    settings = FamilySettings(
        n_layer=1, d_model=16, n_head=2, vocab_size=320, max_length=CONTEXT, base_epochs=0.1, reward_epochs=0.1
    )
    parts = {name: part.split(0.25, seed=0) for name, part in world.train.items()}
    data, held_out = ({name: part[number] for name, part in parts.items()} for number in (0, 1))
    common = {"settings": settings, "validation": held_out, "progress": False, "resume": True}
    (tmp_path / "streams").mkdir()  # of the user
    train_family(data, tmp_path, **common)
    stages = []
    train_family(data, tmp_path, **common, on_stage=stages.append)
    assert not stages
    assert (tmp_path / "streams").is_dir()
    some = {name: part[:2] for name, part in held_out.items()}
    for changed, named in (
        ({"settings": replace(settings, d_model=32)}, "config"),
        ({"settings": replace(settings, vocab_size=310)}, "config"),
        ({"settings": replace(settings, base_batch_size=4)}, "batch_size"),
        ({"validation": some}, "validation"),
        ({"base": "someone/another-base"}, "base"),
    ):
        with pytest.raises(StorageError, match=f"expected a model trained with {named}="):
            train_family(data, tmp_path, **common | changed)


def test_stages_are_named_before_every_training(world, tmp_path, monkeypatch):
    lines = []
    monkeypatch.setattr(
        "rmtension.training._family_trainings._train_family_base", lambda *_: lines.append("base trained")
    )
    monkeypatch.setattr("rmtension.training._side_by_side.train_reward_model", lambda *_, **__: lines.append("trained"))
    train_seeds(world.train, tmp_path, [4, 7], on_stage=lines.append)
    models = ("helpful", "harmless", "mixed")
    told = [f"training reward model {number} of 6: {models[(number - 1) % 3]}" for number in range(1, 7)]
    seeds = [f"{line}, seed {seed}" for line, seed in zip(told, (4, 4, 4, 7, 7, 7), strict=True)]
    expected = ["training the base model, seed 4", "base trained"]
    assert lines == expected + [line for stage in seeds for line in (stage, "trained")]
    lines.clear()
    train_seeds(world.train, tmp_path / "one", [0], on_stage=lines.append)
    assert [line for line in lines if "of" in line][1] == "training reward model 2 of 3: harmless"
    assert train_seeds(world.train, tmp_path / "none", []) == []


def test_family_needs_objectives_and_sizes_that_fit(world, tmp_path):
    with pytest.raises(OptionError, match="two objectives"):
        train_family({"helpful": world.train["helpful"]}, tmp_path)
    with pytest.raises(OptionError, match="none called"):
        train_family({"base": world.train["helpful"], "harmless": world.train["harmless"]}, tmp_path)
    with pytest.raises(OptionError, match="n_head a divisor"):
        FamilySettings(d_model=10, n_head=4)


TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}<{{ m.role }}> {{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


class TestTokensOfTRL:
    """The tokens of TRL's own `RewardTrainer` on our data sets equal those that scoring reads."""

    @pytest.fixture
    def ids_of_trl(self, tokenizer, tmp_path):
        import trl

        model = transformers.GPT2ForSequenceClassification(make_config("gpt2", len(tokenizer)))

        def make(dataset, processing_class):
            common = {"report_to": "none", "use_cpu": True, "disable_tqdm": True}
            config = arguments(trl.RewardConfig, None, output_dir=str(tmp_path), max_length=None, **common)
            with isolated(0):
                trainer = trl.RewardTrainer(model, config, train_dataset=dataset, processing_class=processing_class)
            return [[list(ids) for ids in trainer.train_dataset[name]] for name in ("chosen_ids", "rejected_ids")]

        return make

    @staticmethod
    def ids_of_ours(pairs, processing_class):
        encoded = encode_pairs(processing_class, pairs, max_length=CONTEXT)
        return [[list(text.ids) for text in side] for side in (encoded.chosen, encoded.rejected)]

    @pytest.mark.parametrize("bos", [False, True])
    def test_texts_differ_by_the_eos_that_trl_appends(self, bos, ids_of_trl, tokenizer, tmp_path):
        if bos:
            tokenizer = put_bos_first(make_tokenizer(tmp_path / "bos", bos="<eos>"))
        pairs = make_pairs(6)
        ours = self.ids_of_ours(pairs, tokenizer)
        assert all((ids[0] == tokenizer.bos_token_id) == bos for ids in ours[0])
        for implicit_prompt in (False, True):
            theirs = ids_of_trl(pairs.to_dataset(implicit_prompt=implicit_prompt), tokenizer)
            assert [[ids[-1] for ids in side] for side in theirs] == [[tokenizer.eos_token_id] * 6] * 2
            assert [[ids[:-1] for ids in side] for side in theirs] == ours
        # So that pairs whose responses have it are read alike.
        ended = PreferencePairs(
            replace(pair, chosen=pair.chosen + tokenizer.eos_token, rejected=pair.rejected + tokenizer.eos_token)
            for pair in pairs
        )
        assert ids_of_trl(pairs.to_dataset(), tokenizer) == self.ids_of_ours(ended, tokenizer)
        # A control: without the space between prompt and response, which `to_dataset` writes, texts are others.
        unspaced = pairs.to_dataset().map(lambda row: {"chosen": row["chosen"].lstrip()})
        assert ids_of_trl(unspaced, tokenizer)[0] != theirs[0]

    def test_chats_are_encoded_as_trl_encodes_them(self, ids_of_trl, tmp_path):
        tokenizer = make_tokenizer(tmp_path / "chat", bos="<eos>")
        tokenizer.chat_template = TEMPLATE
        pairs = make_pairs(6).as_chat()
        ours = self.ids_of_ours(pairs, tokenizer)
        assert all(ids[0] == tokenizer.bos_token_id != ids[1] for ids in ours[0])
        for implicit_prompt in (False, True):
            assert ids_of_trl(pairs.to_dataset(implicit_prompt=implicit_prompt), tokenizer) == ours
