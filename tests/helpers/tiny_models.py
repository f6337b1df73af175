"""Tiny reward models, built in memory, saved as real checkpoints; a tokenizer; texts and pairs."""

import os

# Set before transformers is imported, so that no test contacts a hub.
os.environ["HF_HUB_OFFLINE"] = "1"
# Set before torch is imported: if a test uses two threads while other workers keep all cores busy, threads that wait by
# spinning take the cores from the threads that they wait for.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import random
from functools import partial
from types import MethodType

import pytest
import torch
import transformers
import type_checks  # noqa: F401 - imported before rmtension
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from rmtension import PreferencePairs
from rmtension.passes._pair_pass import run_pass
from rmtension.passes._pair_statistic import PairStatistic

transformers.utils.logging.disable_progress_bar()
# Two threads on models this small spend their time waiting for each other, and equal bits are only promised at one
# number of threads, whatever OMP_NUM_THREADS says.
torch.set_num_threads(1)
# No test is about power failures, and otherwise every written file would wait for the disk.
os.fsync = lambda descriptor: None

EOS, PAD = "<eos>", "<pad>"
CONTEXT = 96
WORDS = [
    *("how", "do", "i", "bake", "kill", "a", "python", "process", "cake", "bread"),
    *("please", "sorry", "help", "cannot", "sure", "first", "then", "the", "with", "and"),
]
FAMILIES = ("gpt2", "llama", "gpt_neox")


def grid(values, *, keep=None, unpack=False):
    """Values of one parameter of a test or fixture, of which `keep` (default: the first) are tested in the fast lane.

    The others have the marker `grid`: `make test` leaves them out, `make test-all` and `.ci/run` run all. With
    `unpack`, each value is a tuple that holds the values of several parameters.
    """
    values = list(values)
    kept = values[:1] if keep is None else list(keep)
    assert all(value in values for value in kept), "the fast lane keeps some of the values"
    rows = [value if unpack else (value,) for value in values]
    return [
        pytest.param(*row, marks=[] if value in kept else pytest.mark.grid)
        for value, row in zip(values, rows, strict=True)
    ]


def put_bos_first(tokenizer):
    """Change a tokenizer so that it adds its BOS token to every text."""
    bos = (tokenizer.bos_token, tokenizer.bos_token_id)
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{bos[0]} $A", special_tokens=[bos]
    )
    return tokenizer


def make_tokenizer(folder, *, pad=PAD, bos=None):
    """A byte-level BPE tokenizer over a few English words, saved and loaded again."""
    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=[EOS, PAD],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    raw.train_from_iterator([" " + " ".join(WORDS)] * 4, trainer)
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=raw, eos_token=EOS, pad_token=pad, bos_token=bos)
    fast.save_pretrained(folder)
    return transformers.AutoTokenizer.from_pretrained(folder)


def make_config(family, vocab_size, **changes):
    """A three-layer config of `family` whose MLP has 48 neurons (GPT-2: 64) and whose attention has 4 heads."""
    common = {"num_labels": 1, "pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 0, "vocab_size": vocab_size}
    if family == "gpt2":
        sizes = {"n_positions": CONTEXT, "n_embd": 32, "n_layer": 3, "n_head": 4, "n_inner": 64}
        return transformers.GPT2Config(**common | sizes | changes)
    sizes = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "max_position_embeddings": CONTEXT,
    }
    if family == "llama":
        return transformers.LlamaConfig(**common | sizes | {"num_key_value_heads": 2} | changes)
    return transformers.GPTNeoXConfig(**common | sizes | changes)


def save_classifier(folder, family, tokenizer, *, seed=0, **changes):
    """A sequence classifier with drawn weights, saved with its tokenizer."""
    config = make_config(family, len(tokenizer), **changes)
    return save_drawn(folder, transformers.AutoModelForSequenceClassification, config, tokenizer, seed=seed)


def save_drawn(folder, auto_class, config, tokenizer, *, seed=0):
    """A model with weights large enough that its outputs differ visibly, saved with its tokenizer."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = auto_class.from_config(config)
        for parameter in model.parameters():
            # With the default initialisation (0.02) a model is nearly linear; a test needs curvature.
            parameter.data += 0.1 * torch.randn_like(parameter)
    model.eval().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def close_to(head):
    """The tolerance of sums of float64 gradients: 1e-9, but 1e-7 for Llama.

    Llama's norms are float32 in every model. In a packed pair they round the gradient of the margin; in two separate
    texts, they round the gradient of each reward.
    """
    return {"atol": 1e-7 if "llama" in head.architecture else 1e-9, "rtol": 0.0}


def make_pairs(n, *, seed=0, longest=12):
    draw = random.Random(seed)

    def words():
        return " ".join(draw.choices(WORDS, k=draw.randint(1, longest)))

    rows = [
        {
            "prompt": f"\n\nHuman: {words()} {number}\n\nAssistant:",
            "chosen": words() + " a",
            "rejected": words() + " b",
            "objective": "helpful" if number % 2 else "harmless",
            "subset": ("should_refuse", "informative", "should_respond", "compliance")[number % 4],
        }
        for number in range(n)
    ]
    return PreferencePairs.from_records(rows)


def unchecked(function):
    """A function without the suite's type checker, to test its own errors about wrong types."""
    if isinstance(function, MethodType):
        return partial(unchecked(function.__func__), function.__self__)
    is_checked = "jaxtyping" in function.__code__.co_filename or "beartype" in function.__code__.co_filename
    return function.__wrapped__ if is_checked else function


class Batches(PairStatistic):
    """Collects the batches of a pass without running the model."""

    name, state = "batches", {}

    def __init__(self, sharing="prompt", keeps_layers=False):
        self.sharing, self.keeps_layers, self.batches = sharing, keeps_layers, []

    def observe(self, batch):
        return []

    def update(self, batch, observed):
        self.batches.append(batch)

    def compute(self, record):
        return self.batches


def batches_of(head, pairs, **options):
    """The batches that a run over pairs makes."""
    return run_pass(head, pairs, Batches(**options))
