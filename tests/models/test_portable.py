"""Exported folders have what transformers 4 reads, and transformers 5 reads them as before.

What transformers 4 reads was found by running it: `make exports` (tests/programs/other_major.py).
"""

import json
import re
import warnings

import pytest
import torch
import transformers
from other_major import ROPES, TEMPLATE, rotary, tokenized, tokenizers
from reference import transformers_rewards
from tiny_models import WORDS, make_config, save_classifier

from rmtension import RewardHead
from rmtension.errors import RMTensionWarning
from rmtension.models._portable import make_portable
from rmtension.synthetic.check_matrix import _SIZES, FAMILIES
from rmtension.training._trainer_run import save_model

ROTARY = [family for family in FAMILIES if rotary(family, "theta")]


def config_of(family, **changes):
    wanted = {"vocab_size": 300, "num_labels": 1} | _SIZES | FAMILIES[family] | changes
    known = {key: value for key, value in wanted.items() if value is not None}
    return transformers.AutoConfig.for_model(family.partition(",")[0], **known)


def completed(config, folder):
    """The JSON that `make_portable` leaves of a config, and what it says of transformers 4."""
    config.save_pretrained(folder)
    differences = make_portable(folder, None)
    return json.loads((folder / "config.json").read_text()), differences


PLAIN = {"rope_type": "default", "rope_theta": 5e5}
LINEAR = {"rope_type": "linear", "factor": 4.0, "rope_theta": 5e5}
GEMMA = {"full_attention": LINEAR, "sliding_attention": {"rope_type": "default", "rope_theta": 300.0}}
LONG = {"rope_type": "longrope", "short_factor": [1.0] * 4, "long_factor": [2.0] * 4, "rope_theta": 5e5}
READ = [
    ("llama", PLAIN, {"rope_theta": 5e5, "rope_scaling": None}),
    ("llama", LINEAR, {"rope_theta": 5e5, "rope_scaling": {"rope_type": "linear", "factor": 4.0}}),
    (
        "gpt_neox",
        PLAIN | {"partial_rotary_factor": 0.5},
        {"rotary_emb_base": 5e5, "rotary_pct": 0.5, "rope_scaling": None},
    ),
    (
        "stablelm",
        PLAIN | {"partial_rotary_factor": 0.5},
        {"rope_theta": 5e5, "partial_rotary_factor": 0.5},
    ),
    (
        "gemma3_text",
        GEMMA,
        {
            "rope_theta": 5e5,
            "rope_local_base_freq": 300.0,
            "rope_scaling": {"rope_type": "linear", "factor": 4.0},
        },
    ),
    (
        "phi3",
        LONG | {"original_max_position_embeddings": 24},
        {
            "original_max_position_embeddings": 24,
            "rope_scaling": {"type": "longrope", "short_factor": [1.0] * 4, "long_factor": [2.0] * 4},
        },
    ),
    # GPT-OSS scales where its config says nothing.
    ("gpt_oss", PLAIN, {"rope_theta": 5e5, "rope_scaling": None}),
    ("qwen3_moe", PLAIN, {"num_experts": 4, "rope_theta": 5e5}),
]


@pytest.mark.parametrize(("family", "rope", "read"), READ, ids=[f"{case[0]}-{n}" for n, case in enumerate(READ)])
def test_the_config_has_the_names_of_transformers_4(family, rope, read, tmp_path):
    changes = {"original_max_position_embeddings": 24} if family == "phi3" else {}
    config = config_of(family, rope_parameters=json.loads(json.dumps(rope)), **changes)
    config.save_pretrained(tmp_path)
    before = json.loads((tmp_path / "config.json").read_text())
    assert not set(read) & set(before) - {"original_max_position_embeddings"}, "transformers 5 writes none of them"
    after, differences = completed(config, tmp_path)
    assert {name: after[name] for name in read} == read
    assert differences == []


@pytest.mark.parametrize("family", ROTARY)
def test_transformers_5_reads_the_completed_config_as_before(family, tmp_path):
    """Every family and every way of scaling; it prefers `rope_scaling` to `rope_parameters`."""
    made = 0
    for name in ROPES:
        changes = rotary(family, name)
        if changes is None:
            continue
        config = config_of(family, **changes)
        completed(config, tmp_path)
        again = transformers.AutoConfig.from_pretrained(tmp_path)
        ropes = [json.loads(json.dumps(config_read.rope_parameters)) for config_read in (config, again)]
        for rope in ropes:
            for part in (rope, *rope.values()):
                if isinstance(part, dict):
                    part.pop("type", None)
        assert ropes[0] == ropes[1], name
        made += 1
    assert made >= 3


@pytest.mark.parametrize(
    ("family", "changes", "words"),
    [
        ("nemotron", {"rope_parameters": LINEAR}, "type 'linear' .nemotron does not read them there"),
        (
            "phi3",
            {"rope_parameters": LONG | {"factor": 3.0}, "original_max_position_embeddings": 24},
            "type 'longrope' .phi3 does not read",
        ),
        (
            "hunyuan_v1_dense",
            {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 5e5}},
            "without 'alpha'",
        ),
        ("deepseek_v3", {"rope_parameters": LONG | {"original_max_position_embeddings": 24}}, "without 'factor'"),
        (
            "llama",
            {"rope_parameters": ROPES["yarn"] | {"rope_theta": 5e5, "factor": 8.0}},
            r"factor=8.0 .4.51 takes max_position_embeddings / original_max_position_embeddings, 4\)",
        ),
        ("gpt_oss", {"swiglu_limit": 5.0, "rope_parameters": PLAIN}, "swiglu_limit=5.0 .gpt_oss takes 7.0 there"),
        (
            "olmo3",
            {"rope_parameters": GEMMA},
            r"by type of layer .full_attention, sliding_attention\)",
        ),
        (
            "gemma3_text",
            {"rope_parameters": GEMMA | {"sliding_attention": LINEAR}},
            r"by type of layer .full_attention, sliding_attention\)",
        ),
    ],
)
def test_what_transformers_4_cannot_read_is_named(family, changes, words, tmp_path):
    _, (warning,) = completed(config_of(family, **json.loads(json.dumps(changes))), tmp_path)
    assert re.search(words, warning), warning


def test_saving_warns_of_what_transformers_4_cannot_read(tmp_path, tokenizer):
    from rmtension.synthetic.check_matrix import make_classifier

    head = RewardHead.from_classifier(make_classifier("nemotron", 330, rope_parameters=LINEAR), tokenizer=tokenizer)
    with pytest.warns(RMTensionWarning, match=r"save_pretrained: transformers 4 computes other rewards.*nemotron"):
        head.save_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("family", "rope"),
    [("llama", ROPES["yarn"] | {"rope_theta": 5e5}), ("gpt_neox", PLAIN | {"partial_rotary_factor": 1.0})],
)
def test_exports_give_the_same_rewards_in_transformers_5(family, rope, tmp_path, tokenizer, ragged_texts):
    save_classifier(tmp_path / "model", family, tokenizer, rope_parameters=rope)
    head = RewardHead.from_pretrained(tmp_path / "model")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        head.save_pretrained(tmp_path / "out")
    texts = ragged_texts[:6]
    expected = transformers_rewards(tmp_path / "model", texts)
    assert torch.equal(transformers_rewards(tmp_path / "out", texts), expected)
    again = RewardHead.from_pretrained(tmp_path / "out")
    assert torch.allclose(again.score(texts), expected, atol=1e-5)
    # Negative control: without its base the model gives other rewards.
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    names = ("rope_parameters", "rope_scaling", "rope_theta", "rotary_emb_base")
    (tmp_path / "out" / "config.json").write_text(json.dumps({k: v for k, v in config.items() if k not in names}))
    assert not torch.allclose(transformers_rewards(tmp_path / "out", texts), expected, atol=1e-2)


TEXTS = [" ".join(WORDS), "how do i bake bread", " please  help\n"]
KINDS = tokenizers([" ".join(WORDS)] * 4)


@pytest.mark.parametrize("kind", list(KINDS))
def test_tokenizers_have_a_class_that_transformers_4_knows(kind, tmp_path):
    make_config("llama", 400).save_pretrained(tmp_path)
    tokenizer = KINDS[kind]
    tokenizer.save_pretrained(tmp_path)
    make_portable(tmp_path, tokenizer)
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    assert config["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert config["model_input_names"] == ["input_ids", "attention_mask"]
    assert not {"backend", "is_local", "local_files_only"} & set(config)
    # transformers 4 takes a list there for a dict, and fails.
    assert not isinstance(config.get("extra_special_tokens"), list)
    if kind == "bos and added tokens":
        assert config["additional_special_tokens"] == ["<|user|>", "<|assistant|>"]
        assert config["chat_template"] == TEMPLATE
    if kind == "prefix space":
        assert config["add_prefix_space"] is True
    assert not list(tmp_path.glob("*chat_template*"))
    # transformers 5, for another family too, whose own class it would take.
    again = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert tokenized(again, TEXTS) == tokenized(tokenizer, TEXTS)
    assert again.chat_template == tokenizer.chat_template


def test_an_export_replaces_the_template_of_what_was_there(checkpoints, tmp_path):
    head = RewardHead.from_pretrained(checkpoints["gpt2"])
    tmp_path.joinpath("chat_template.jinja").write_text("old")
    head.save_pretrained(tmp_path)
    assert transformers.AutoTokenizer.from_pretrained(tmp_path).chat_template is None
    head.tokenizer.chat_template = TEMPLATE
    head.save_pretrained(tmp_path)
    assert transformers.AutoTokenizer.from_pretrained(tmp_path).chat_template == TEMPLATE


def test_trained_models_are_read_by_both_too(tokenizer, tmp_path):
    config = make_config("llama", len(tokenizer), rope_parameters=PLAIN)
    save_model(tmp_path, transformers.AutoModelForSequenceClassification.from_config(config), tokenizer)
    assert json.loads((tmp_path / "config.json").read_text())["rope_theta"] == 5e5
    assert json.loads((tmp_path / "tokenizer_config.json").read_text())["tokenizer_class"] == "PreTrainedTokenizerFast"
