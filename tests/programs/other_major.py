"""Whether transformers 4 reads this library's exports as transformers 5 does (`make exports`).

    .venv/bin/python tests/programs/other_major.py write FOLDER                # transformers 5: exports and rewards
    .venv-tf4/bin/python tests/programs/other_major.py compare FOLDER          # transformers 4.57: rewards and tokens
    .venv-rewardbench/bin/python tests/programs/other_major.py compare FOLDER  # the version that RewardBench pins

It exits with 1 if a reward differs by more than 1e-5, or a token differs, without a warning on export. The row
`control` is a Llama without the fields that this library adds for transformers 4: there the comparison has to fail.
"""

import argparse
import copy
import json
import os
import shutil
import sys
import warnings
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"

import torch
import transformers

TOLERANCE = 1e-5
BASE = 500000.0
_LENGTHS = {"original_max_position_embeddings": 24, "factor": 4.0}  # of 96
# Values of `rope_parameters`. The texts have up to 60 tokens.
ROPES = {
    "as made": {},
    "theta": {"rope_type": "default"},
    "linear": {"rope_type": "linear", "factor": 4.0},
    "dynamic": {"rope_type": "dynamic", "factor": 2.0},
    "yarn": {"rope_type": "yarn", "beta_fast": 16.0, **_LENGTHS},
    "llama3": {"rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0, **_LENGTHS},
    "longrope": {
        "rope_type": "longrope",
        "short_factor": [1.0, 1.5, 2.0, 2.5],
        "long_factor": [2.0, 3.0, 4.0, 5.0],
        "original_max_position_embeddings": 24,
    },
}
COLUMNS = [*ROPES, "ablated"]
UNKNOWN = "no classifier"
# Families that rotate a part of each head; here half of its 8 channels, which are two frequencies.
_PARTIAL = {"gpt_neox", "stablelm", "qwen3_next", "glm", "glm4", "nemotron", "phi"}
_CHANGES = {"deepseek_v3": {"num_key_value_heads": 4}, "mixtral": {"head_dim": 8}}
TEMPLATE = "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}<|endoftext|>{% endfor %}"
CHAT = [{"role": "user", "content": "How do I bake bread?"}, {"role": "assistant", "content": " Mix, wait, bake."}]


# -- transformers 5: exports, and the rewards that they give -----------------------------------------------------------


def write(folder):
    from rmtension.synthetic._world import preference_world
    from rmtension.synthetic.check_matrix import FAMILIES, ragged_texts
    from rmtension.training._train_tokenizer import train_tokenizer

    world = preference_world(seed=0, n_train=48, n_test=48)
    tokenizer = train_tokenizer(world.texts, vocab_size=320)
    texts = ragged_texts(tokenizer, 60)[:12]
    rows = []
    for family in FAMILIES:
        for rope in ROPES:
            rows += write_family(folder, family, rope, tokenizer, texts)
        print(family, flush=True)
    rows.append(control(folder, next(row for row in rows if (row["family"], row["cell"]) == ("llama", "theta"))))
    expected = {"families": rows, "tokenizers": write_tokenizers(folder, world.texts, texts)}
    (folder / "expected.json").write_text(json.dumps(expected))


def rotary(family, name):
    """Changes to the config of `family` for the rope `name`; None if the family does not have this rope."""
    config = transformers.AutoConfig.for_model(family.partition(",")[0])
    changes = dict(_CHANGES.get(family, {}))
    if name == "as made":
        return changes
    if not hasattr(config, "rope_parameters") or family in ("ministral3", "modernbert-decoder", "bert"):
        return None  # Ministral-3 also scales the queries, with its own parameters
    if family == "phi3" and name not in ("theta", "longrope"):
        return None
    rope = copy.deepcopy(ROPES[name]) | {"rope_theta": BASE}
    if family in _PARTIAL:
        rope["partial_rotary_factor"] = 0.5
    for factors in ("short_factor", "long_factor"):
        if factors in rope:
            rope[factors] = rope[factors][: 2 if family in _PARTIAL or family == "deepseek_v3" else 4]
    if name == "dynamic":
        changes["max_position_embeddings"] = 32
    if name == "longrope" and family == "phi3":
        changes["original_max_position_embeddings"] = 24
    if family in ("gemma3_text", "olmo3"):
        if name == "longrope":
            return None
        window = {"rope_type": "default", "rope_theta": 300.0 if family == "gemma3_text" else BASE}
        rope = {"full_attention": rope, "sliding_attention": window}
    return changes | {"rope_parameters": rope}


def write_family(folder, family, name, tokenizer, texts):
    from rmtension import RewardHead
    from rmtension.errors import ModelError
    from rmtension.synthetic.check_matrix import make_classifier

    changes = rotary(family, name)
    if changes is None:
        return []
    model = make_classifier(family, len(tokenizer) + 8, **changes)
    try:
        head = RewardHead.from_classifier(model, tokenizer=tokenizer)
    except ModelError:
        return []  # the reason is in docs/families_measured.md
    heads = {name: head}
    if name == ("theta" if rotary(family, "theta") else "as made") and head.sites:
        heads["ablated"] = head.with_ablation(some_neurons(head))
    return [one_row(folder, family, cell, opened, texts) for cell, opened in heads.items()]


def some_neurons(head):
    from rmtension import NeuronSet

    site = "mlp" if "mlp" in head.sites else "attn_head"
    mask = torch.rand(head.n_layers, head.n_neurons(site), generator=torch.Generator().manual_seed(0)) < 0.4
    return NeuronSet(mask, site, head.architecture)


def one_row(folder, family, cell, head, texts):
    checkpoint = folder / f"{family}--{cell}".replace(", ", "-").replace(" ", "-")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        head.save_pretrained(checkpoint)
    messages = [str(entry.message) for entry in caught if "transformers 4" in str(entry.message)]
    tokenizer = transformers.AutoTokenizer.from_pretrained(checkpoint)
    ids = [tokenizer(text)["input_ids"] for text in texts]
    loaded = rewards(checkpoint, ids)
    head.max_length = 96  # texts exceed the context of dynamic ropes, and this library would cut them
    inside = [float(head.score_tokens(torch.tensor([row]))[0]) for row in ids]
    off = max(abs(first - second) for first, second in zip(loaded, inside, strict=True))
    assert off <= TOLERANCE * max(1.0, *map(abs, loaded)), f"{checkpoint}: transformers 5 itself differs by {off:.1e}"
    row = {"family": family, "cell": cell, "folder": checkpoint.name, "texts": texts}
    return row | {"ids": ids, "rewards": loaded, "warnings": messages}


def control(folder, row):
    """The same export without the names of transformers 4, as transformers 5 writes it: the comparison must fail."""
    checkpoint = folder / "control"
    shutil.copytree(folder / row["folder"], checkpoint)
    config = json.loads((checkpoint / "config.json").read_text())
    for name in ("rope_theta", "rope_scaling"):
        del config[name]
    (checkpoint / "config.json").write_text(json.dumps(config))
    return row | {"family": "control", "folder": "control"}


def rewards(checkpoint, ids):
    """Rewards by transformers, one text at a time."""
    model = transformers.AutoModelForSequenceClassification.from_pretrained(checkpoint, torch_dtype=torch.float32)
    model.eval()
    with torch.no_grad():
        return [float(model(torch.tensor([row])).logits[0, 0]) for row in ids]


def write_tokenizers(folder, corpus, texts):
    """Write tokenizers of several kinds with one model, and the tokens that transformers 5 gives with each."""
    from rmtension import RewardHead
    from rmtension.synthetic.check_matrix import make_classifier

    rows = []
    for name, tokenizer in tokenizers(corpus).items():
        head = RewardHead.from_classifier(make_classifier("qwen3", 400), tokenizer=tokenizer)
        head.save_pretrained(folder / name.replace(" ", "-"))
        inside = [tokenizer(text)["input_ids"] for text in texts]
        again = transformers.AutoTokenizer.from_pretrained(folder / name.replace(" ", "-"))
        row = {"name": name, "folder": name.replace(" ", "-"), "texts": texts} | tokenized(again, texts)
        assert row["ids"] == inside, f"{name}: transformers 5 itself gives other tokens"
        rows.append(row)
    return rows


def tokenizers(corpus):
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    from rmtension.training._train_tokenizer import train_tokenizer

    bos = train_tokenizer(corpus, 320)
    bos.add_special_tokens({"bos_token": "<s>", "additional_special_tokens": ["<|user|>", "<|assistant|>"]})
    bos.add_tokens([AddedToken("breadmaker", lstrip=True)])
    pair = (bos.bos_token, bos.bos_token_id)
    bos.backend_tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[pair])
    bos.chat_template, bos.padding_side, bos.truncation_side = TEMPLATE, "left", "left"

    space = train_tokenizer(corpus, 320)
    space.backend_tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    space.chat_template = {"default": TEMPLATE, "tool_use": "tools " + TEMPLATE}

    metaspace = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=False))
    metaspace.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always", split=False)
    metaspace.decoder = decoders.Metaspace()
    special = ["<unk>", "<s>", "</s>", "<pad>"]
    metaspace.train_from_iterator(
        corpus, trainers.BpeTrainer(vocab_size=320, special_tokens=special, show_progress=False)
    )
    model = json.loads(metaspace.to_str())["model"]
    merges = [tuple(merge) for merge in model["merges"]]
    named = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
    llama = transformers.LlamaTokenizer(vocab=model["vocab"], merges=merges, add_bos_token=False, **named)

    byte_level = json.loads(train_tokenizer(corpus, 320).backend_tokenizer.to_str())["model"]
    merges = [tuple(merge) for merge in byte_level["merges"]]
    gpt2 = transformers.GPT2Tokenizer(vocab=byte_level["vocab"], merges=merges, pad_token="<|pad|>")
    return {
        "generic": train_tokenizer(corpus, 320),
        "bos and added tokens": bos,
        "prefix space": space,
        "LlamaTokenizer": llama,
        "GPT2Tokenizer": gpt2,
    }


def tokenized(tokenizer, texts):
    """The tokens, names and texts that a tokenizer gives."""
    batch = tokenizer(texts, padding=True, truncation=True, max_length=24)
    outputs = {
        "ids": [tokenizer(text)["input_ids"] for text in texts],
        "added": tokenizer("a breadmaker <|user|> baked<s> it")["input_ids"],
        "batch": {name: list(map(list, values)) for name, values in batch.items()},
        "special": {name: str(token) for name, token in tokenizer.special_tokens_map.items() if isinstance(token, str)},
        "sides": [tokenizer.padding_side, tokenizer.truncation_side],
        "decoded": tokenizer.decode(tokenizer(texts[0])["input_ids"], skip_special_tokens=True),
    }
    if tokenizer.chat_template:
        outputs["chat"] = tokenizer.apply_chat_template(CHAT, tokenize=False)
    return outputs


# -- transformers 4 ----------------------------------------------------------------------------------------------------


def compare(folder):
    """Print the largest |difference| by family and rope, and a table of tokenizers; return the number of failures."""
    expected = json.loads((folder / "expected.json").read_text())
    print(
        f"Largest |difference| of rewards, transformers {transformers.__version__} to 5, one text at a time, float32.\n"
    )
    print(f"| family | {' | '.join(COLUMNS)} |\n|---|{'---|' * len(COLUMNS)}")
    wrong, reasons, n = 0, {}, 0
    for family in dict.fromkeys(row["family"] for row in expected["families"]):
        cells = dict.fromkeys(COLUMNS, "")
        for row in (row for row in expected["families"] if row["family"] == family):
            if UNKNOWN in cells.values():
                cells[row["cell"]] = UNKNOWN
                continue
            cells[row["cell"]], is_wrong = difference(folder / row["folder"], row, reasons)
            wrong, n = wrong + (is_wrong != (family == "control")), n + 1
        print(f"| {family} | {' | '.join(cells.values())} |", flush=True)
    print()
    for reason, number in reasons.items():
        print(f"({number}) {reason}  ")
    print("\n| tokenizer | differs in |\n|---|---|")
    for row in expected["tokenizers"]:
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder / row["folder"])
        outputs = tokenized(tokenizer, row["texts"])
        differs = [name for name in outputs if outputs[name] != row[name]]
        wrong += bool(differs)
        print(f"| {row['name']} | {', '.join(differs) or 'nothing'} |")
    print(f"\n{wrong} wrong of {n} exports that have a classifier here and {len(expected['tokenizers'])} tokenizers")
    return wrong


def difference(checkpoint, row, reasons):
    """A cell of the table, and whether it is wrong without a warning."""
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(checkpoint)
        tokens = [tokenizer(text)["input_ids"] for text in row["texts"]] == row["ids"]
        loaded = rewards(checkpoint, row["ids"])
    except (ValueError, KeyError) as error:
        if any(words in str(error) for words in ("does not recognize", "Unrecognized configuration class")):
            return UNKNOWN, False
        reason = f"refused; on export: {warned(row)}"
        return f"({reasons.setdefault(reason, len(reasons) + 1)})", not row["warnings"]
    off = max(abs(first - second) for first, second in zip(loaded, row["rewards"], strict=True))
    good = tokens and off <= TOLERANCE * max(1.0, *map(abs, loaded))
    mark = f" ({reasons.setdefault(f'on export: {warned(row)}', len(reasons) + 1)})" if row["warnings"] else ""
    return f"{off:.1e}{'' if tokens else ', other tokens'}{mark}", not (good or row["warnings"])


def warned(row):
    return "; ".join(row["warnings"]).partition(": ")[2] or "no warning"


def run_step(description, **steps):
    """Run the step that the command line names on its folder; returns 1 if the step reports failures."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("step", choices=steps)
    parser.add_argument("folder", type=Path)
    chosen = parser.parse_args()
    warnings.simplefilter("ignore")
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    torch.set_num_threads(1)
    chosen.folder.mkdir(parents=True, exist_ok=True)
    return int(bool(steps[chosen.step](chosen.folder)))


if __name__ == "__main__":
    sys.exit(run_step(__doc__, write=write, compare=compare))
