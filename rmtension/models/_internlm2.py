"""InternLM2, which transformers has no class for: a Llama with other names, and with queries, keys and values in one.

Its matrix `wqkv` has, for every group of heads that share keys and values, the rows of the group's queries, then those
of its key and of its value.
"""

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from rmtension.errors import ModelError

# The name in InternLM2 -> in Llama. The packed matrix is handled apart.
_NAMES = {
    "tok_embeddings": "embed_tokens",
    "attention.wo": "self_attn.o_proj",
    "attention_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "feed_forward.w1": "mlp.gate_proj",
    "feed_forward.w3": "mlp.up_proj",
    "feed_forward.w2": "mlp.down_proj",
}
_PACKED, _PARTS = "attention.wqkv.", ("q_proj", "k_proj", "v_proj")


def is_internlm2(fields: Mapping[str, Any]) -> bool:
    """Whether a config.json is that of InternLM2."""
    return fields.get("model_type") == "internlm2"


def llama_fields(fields: Mapping[str, Any]) -> dict[str, Any]:
    """The config of the Llama that computes the same."""
    dropped = ("model_type", "bias", "attn_implementation", "auto_map")
    kept = {key: value for key, value in fields.items() if key not in dropped}
    return {**kept, "attention_bias": bool(fields.get("bias", False))}


def to_llama(body: Mapping[str, Tensor], config: Any) -> dict[str, Tensor]:
    """The body's tensors with the names of Llama, and the packed matrix in three parts. Shares memory where it can."""
    groups, per_group, width = _shape(config)
    state: dict[str, Tensor] = {}
    for name, tensor in body.items():
        if _PACKED not in name:
            state[_renamed(name, _NAMES)] = tensor
            continue
        packed = tensor.reshape(groups, per_group + 2, width, *tensor.shape[1:])
        of_parts = packed[:, :per_group], packed[:, per_group], packed[:, per_group + 1]
        for part, rows in zip(_PARTS, of_parts, strict=True):
            state[name.replace(_PACKED, f"self_attn.{part}.")] = rows.reshape(-1, *tensor.shape[1:]).contiguous()
    return state


def from_llama(state: Mapping[str, Tensor], config: Any) -> dict[str, Tensor]:
    """The inverse of `to_llama`; raises `ModelError` for biases that InternLM2 does not have."""
    groups, _, width = _shape(config)
    back = {llama: own for own, llama in _NAMES.items()}
    biases = [name for name in state if re.search(r"mlp\.\w+\.bias$", name)]
    if biases:
        raise ModelError(
            f"save_pretrained: InternLM2 has no place for {biases[0]}, which an ablation by Mean added. Ablate with "
            "Zero() or Scale(alpha), or use AblationContext."
        )
    body: dict[str, Tensor] = {}
    for name, tensor in state.items():
        if not any(f".{part}." in name for part in _PARTS):
            body[_renamed(name, back)] = tensor
        elif ".q_proj." in name:
            parts = [state[name.replace("q_proj", part)] for part in _PARTS]
            rows = [part.reshape(groups, -1, width, *part.shape[1:]) for part in parts]
            body[name.replace("self_attn.q_proj.", _PACKED)] = torch.cat(rows, dim=1).reshape(-1, *tensor.shape[1:])
    return body


def _renamed(name: str, names: Mapping[str, str]) -> str:
    for old, new in names.items():
        if re.search(rf"(^|\.){re.escape(old)}\.", name):
            return name.replace(f"{old}.", f"{new}.")
    return name


def _shape(config: Any) -> tuple[int, int, int]:
    """Groups of heads, heads per group, and the width of a head."""
    groups, heads = int(config.num_key_value_heads), int(config.num_attention_heads)
    return groups, heads // groups, int(config.hidden_size) // heads
