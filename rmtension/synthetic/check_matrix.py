"""`python -m rmtension.synthetic.check_matrix`: check which families of reward models open here, and how exactly.

For every family, the command makes a small classifier with random weights, saves it, and opens it in every way. The
table shows the largest |difference| between 64 rewards, of texts of different lengths, and the logits of transformers,
which scores one text at a time; or the reason why the model does not open. The result depends on the installed versions
of TransformerLens and transformers.
"""

import argparse
import logging
import re
import sys
import tempfile
import warnings
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from rmtension.errors import ModelError, RMTensionError
from rmtension.reward_head import RewardHead
from rmtension.synthetic._world import preference_world

__all__ = ["make_classifier"]

N_TEXTS = 64
TOLERANCE = 1e-4
_SIZES: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 96,
    "intermediate_size": 128,
}
_GROUPED: dict[str, Any] = {"num_key_value_heads": 2}
_EXPERTS: dict[str, Any] = {"moe_intermediate_size": 16, "num_experts": 4, "num_experts_per_tok": 2, "head_dim": 8}
# Model type -> what its config needs beyond `_SIZES`. Windows are shorter than the texts, so that they have an effect.
FAMILIES: dict[str, dict[str, Any]] = {
    "gpt2": {},
    "gpt_neox": {},
    "llama": _GROUPED,
    "llama, tied embeddings": _GROUPED | {"tie_word_embeddings": True},
    "olmo2": _GROUPED,
    "mistral": _GROUPED | {"sliding_window": 16},
    "qwen2": _GROUPED,
    "qwen3": _GROUPED | {"head_dim": 8},
    "gemma2": _GROUPED | {"head_dim": 8, "sliding_window": 16},
    "opt": {"ffn_dim": 128, "word_embed_proj_dim": 32, "intermediate_size": None},
    "phi3": _GROUPED | {"sliding_window": None},
    "gpt_neo": {
        "num_hidden_layers": None,
        "num_layers": 4,
        "attention_types": [[["global", "local"], 2]],
        "window_size": 16,
    },
    "gptj": {"rotary_dim": 4, "intermediate_size": None},
    "falcon": {"intermediate_size": None},
    "stablelm": _GROUPED,
    "arcee": _GROUPED,
    "bloom": {"intermediate_size": None, "max_position_embeddings": None},
    "exaone4": _GROUPED | {"sliding_window": 16},
    "gemma": _GROUPED | {"head_dim": 8},
    "gemma3_text": _GROUPED | {"head_dim": 8, "sliding_window": 16},
    "glm": _GROUPED | {"head_dim": 8},
    "glm4": _GROUPED | {"head_dim": 8},
    "gpt_bigcode": {},
    "hunyuan_v1_dense": _GROUPED | {"head_dim": 8},
    "ministral3": _GROUPED | {"head_dim": 8},
    "mpt": {"intermediate_size": None},
    "nemotron": _GROUPED,
    "olmo": _GROUPED,
    "olmo3": _GROUPED | {"sliding_window": 16},
    "openai-gpt": {"intermediate_size": None},
    "phi": _GROUPED,
    "seed_oss": _GROUPED | {"head_dim": 8},
    "smollm3": _GROUPED,
    "starcoder2": _GROUPED | {"sliding_window": 16},
    "deepseek_v3": {
        "q_lora_rank": 16,
        "kv_lora_rank": 16,
        "qk_rope_head_dim": 4,
        "qk_nope_head_dim": 4,
        "v_head_dim": 8,
        "n_routed_experts": 4,
        "n_group": 2,
        "topk_group": 1,
        "num_experts_per_tok": 2,
        "first_k_dense_replace": 1,
        "moe_intermediate_size": 16,
    },
    "gpt_oss": _GROUPED | {"head_dim": 8, "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 16},
    "jetmoe": {"num_key_value_heads": 2, "kv_channels": 8, "num_local_experts": 4, "num_experts_per_tok": 2},
    "mixtral": _GROUPED | {"num_local_experts": 4},
    "qwen2_moe": _GROUPED | _EXPERTS | {"shared_expert_intermediate_size": 16},
    "qwen3_moe": _GROUPED | _EXPERTS,
    "qwen3_next": _GROUPED | _EXPERTS | {"num_hidden_layers": 4, "shared_expert_intermediate_size": 16},
    "jamba": _GROUPED | {"num_hidden_layers": 8, "mamba_d_state": 4, "num_experts": 4, "use_mamba_kernels": False},
    "bert": {},
    "modernbert-decoder": {},
}
# How a family is opened: the keyword arguments of `from_pretrained`, and whether a user's hook makes the bridge run in
# place of transformers' modules.
CELLS: dict[str, tuple[dict[str, Any], bool]] = {
    "as opened": ({}, False),
    "bridge": ({}, True),
    "bridge, processed": ({"process_weights": True}, False),
    "HookedTransformer": ({"model_class": "HookedTransformer"}, False),
    "HookedTransformer, processed": ({"model_class": "HookedTransformer", "process_weights": True}, False),
}

# Families and cells that must open on every supported version; others may fail with a reason.
REQUIRED = tuple(FAMILIES)[:15]
REQUIRED_CELLS = ("as opened", "bridge", "bridge, processed")


def make_classifier(family: str, vocab_size: int, *, seed: int = 0, **changes: Any) -> Any:
    """A one-label classifier of `family` in memory, with weights large enough that rewards differ visibly.

    `changes` are keys of its config; None selects the default of the family.

    Examples:
        >>> model = make_classifier("llama", vocab_size=320, num_hidden_layers=2)
        >>> type(model).__name__, model.config.num_hidden_layers
        ('LlamaForSequenceClassification', 2)
    """
    from transformers import AutoConfig, AutoModelForSequenceClassification

    common = {"num_labels": 1, "pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 0, "vocab_size": vocab_size}
    wanted = common | _SIZES | FAMILIES[family] | changes
    config = AutoConfig.for_model(
        family.partition(",")[0], **{key: value for key, value in wanted.items() if value is not None}
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        build: Any = AutoModelForSequenceClassification.from_config
        model = build(config)
        with torch.no_grad():
            for parameter in model.parameters():
                # With the default initialisation (0.02), models are nearly linear and all gains of norms are equal.
                parameter += 0.1 * torch.randn_like(parameter)
    return model.eval()


def measure_family(family: str, tokenizer: Any, texts: Sequence[str]) -> dict[str, float | str]:
    """The largest |difference| to transformers per cell, or the reason why the model does not open."""
    from transformers import AutoModelForSequenceClassification

    with tempfile.TemporaryDirectory() as folder:
        # Some tokenizer classes add tokens when they are loaded.
        make_classifier(family, len(tokenizer) + 8).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        classifier: Any = AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32).eval()
        results: dict[str, float | str] = {}
        for cell, (options, on_bridge) in CELLS.items():
            try:
                head = RewardHead.from_pretrained(folder, **options)
                expected = _expected(classifier, head.tokenizer, texts)
                results[cell] = float((_rewards(head, texts, on_bridge) - expected).abs().max())
            except RMTensionError as error:
                results[cell] = _in_short(str(error), folder)
    return results


def _expected(classifier: Any, tokenizer: Any, texts: Sequence[str]) -> Float[Tensor, "text"]:
    with torch.no_grad():
        return torch.stack(
            [classifier(**tokenizer(text, return_tensors="pt"), use_cache=False).logits[0, 0] for text in texts]
        )


def _rewards(head: RewardHead, texts: Sequence[str], on_bridge: bool) -> Float[Tensor, "text"]:
    if not on_bridge:
        return head.score(texts)
    bridge: Any = head.model
    if not hasattr(bridge, "hook_dict"):
        raise ModelError("TransformerLens has no bridge for it, so transformers' modules run alone")
    with bridge.hooks(fwd_hooks=[(next(iter(bridge.hook_dict)), lambda value, hook: value)]):
        return head.score(texts)


def ragged_texts(tokenizer: Any, longest: int) -> list[str]:
    """64 texts of 1 to `longest` tokens, seeded."""
    draw = np.random.default_rng(0)
    words = " ".join(preference_world(seed=0, n_train=48, n_test=48).texts).split()
    texts: list[str] = []
    while len(texts) < N_TEXTS:
        text = " ".join(draw.choice(words, draw.integers(1, longest)))
        if len(tokenizer(text)["input_ids"]) <= longest:
            texts.append(text)
    return texts


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the table; returns 1 if a cell differs from transformers by more than 1e-4 or a required one fails."""
    parser = argparse.ArgumentParser(prog="python -m rmtension.synthetic.check_matrix", description=__doc__)
    parser.add_argument("--families", nargs="+", choices=list(FAMILIES), default=list(FAMILIES), metavar="FAMILY")
    parser.add_argument("--out", type=Path, help="also write the table as Markdown")
    chosen = parser.parse_args(arguments)
    _quiet()
    torch.set_num_threads(1)  # models this small run slower on several threads
    from rmtension.training._train_tokenizer import train_tokenizer

    tokenizer = train_tokenizer(preference_world(seed=0, n_train=48, n_test=48).texts, vocab_size=320)
    texts = ragged_texts(tokenizer, 60)
    versions = ", ".join(f"{name} {version(name)}" for name in ("transformer-lens", "transformers", "torch"))
    lines: list[str] = []
    reasons: dict[str, int] = {}
    wrong = 0

    def show(line: str) -> None:
        lines.append(line)
        print(line, flush=True)

    show(f"Largest |difference| to transformers over {len(texts)} texts, float32; {versions}.\n")
    show(f"| family | {' | '.join(CELLS)} |\n|---|{'---|' * len(CELLS)}")
    for family in chosen.families:
        shown = []
        results = measure_family(family, tokenizer, texts)
        for value in results.values():
            if isinstance(value, str):
                shown.append(f"({reasons.setdefault(value, len(reasons) + 1)})")
            else:
                wrong += not value <= TOLERANCE
                shown.append(f"{value:.1e}")
        wrong += family in REQUIRED and any(isinstance(results[cell], str) for cell in REQUIRED_CELLS)
        show(f"| {family} | {' | '.join(shown)} |")
    show("")
    for reason, number in reasons.items():
        show(f"({number}) {reason}  ")
    if chosen.out is not None:
        chosen.out.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return int(wrong > 0)


def _in_short(reason: str, folder: str) -> str:
    """The reason without parts that differ between families or are of no use in a table."""
    reason = reason.replace(f"{folder}: ", "").partition(" docs/families_measured.md")[0]
    reason = re.sub(r"\ba \w+ as a", "it as a", reason)
    return re.sub(r"\b\w+(ForCausalLM|LMHeadModel) is not", "the architecture is not", reason)


def _quiet() -> None:
    """Silence other libraries, whose warnings about tiny random models would hide the table."""
    from transformers.utils import logging as transformers_logging

    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()


if __name__ == "__main__":
    sys.exit(main())
