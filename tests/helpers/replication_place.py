"""What a miniature replication starts from: a recipe, a base with random weights, and pairs of an embedded world."""

from pathlib import Path

import torch
import transformers
from tiny_models import make_config
from trained_folders import CONTEXT, tiny_tokenizer

from rmtension.synthetic._world import preference_world


def make_place(folder: Path, recipe: str) -> Path:
    """Write `recipe.yaml`, `base`, `helpful.jsonl` and `harmless.jsonl` into a folder; returns the recipe's path."""
    world = preference_world(0, n_train=48, n_test=48)
    tokenizer = tiny_tokenizer(world)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    pad = {"pad_token_id": tokenizer.pad_token_id, "eos_token_id": 0, "num_key_value_heads": 2}
    config = make_config("llama", len(tokenizer), **sizes, **pad, max_position_embeddings=CONTEXT)
    torch.manual_seed(0)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder / "base")
    tokenizer.save_pretrained(folder / "base")
    for name in ("helpful", "harmless"):
        (world.train[name] + world.test[name]).to_jsonl(folder / f"{name}.jsonl")
    (folder / "recipe.yaml").write_text(recipe)
    return folder / "recipe.yaml"
