"""Makes checkpoints that transformers 5 wrote readable by transformers 4.

transformers 5 saves all rotary parameters in `rope_parameters`, which transformers 4 silently ignores; other
fields and tokenizer classes were renamed. The older names are those of the configuration classes of 4.57.6 and 4.51.0;
`tests/programs/other_major.py` compares the rewards that both majors give.
"""

import json
import shutil
import warnings
from pathlib import Path
from typing import Any

from rmtension.errors import RMTensionWarning

# Model type -> the name in transformers 5 and in 4.
_ROPE_NAMES = {"gpt_neox": {"rope_theta": "rotary_emb_base", "partial_rotary_factor": "rotary_pct"}}
_RENAMED = {"qwen3_moe": {"num_local_experts": "num_experts"}}
# Model type -> the values that transformers 4 uses, whatever the config says.
_FIXED = {"gpt_oss": {"swiglu_alpha": 1.702, "swiglu_limit": 7.0}}
_SCALED = {"linear", "dynamic", "yarn", "longrope", "llama3"}
# In `rope_parameters`, and not in the `rope_scaling` of transformers 4.
_UNSCALED = {"rope_theta", "partial_rotary_factor", "rope_type", "type"}
# The parameter that a model type requires for a method in transformers 4, but not in 5.
_REQUIRED = {("hunyuan_v1_dense", "dynamic"): "alpha", ("deepseek_v3", "longrope"): "factor"}
# Entries that describe how a tokenizer was loaded, not the tokenizer.
_LOADING = {"backend", "files_loaded", "is_local", "local_files_only", "trust_remote_code"}


def make_portable(folder: Path, tokenizer: Any) -> list[str]:
    """Complete `config.json` and `tokenizer_config.json` of a checkpoint that transformers 5 wrote to `folder`.

    Returns what transformers 4 still computes differently, for `warn_of`.
    """
    path = folder / "config.json"
    config = _read(path)
    differences = _complete(config)
    _write(path, config)
    path, backend = folder / "tokenizer_config.json", folder / "tokenizer.json"
    # A tokenizer without tokenizer.json is implemented in Python, and both major versions find its class.
    if path.is_file() and backend.is_file():
        _write(path, _tokenizer_config(_read(path), tokenizer, _read(backend)))
        # The templates are now in the config, where every version reads them.
        (folder / "chat_template.jinja").unlink(missing_ok=True)
        shutil.rmtree(folder / "additional_chat_templates", ignore_errors=True)
    return differences


def warn_of(differences: list[str], what: str) -> None:
    """Warn the user, who called the function `what`, of the differences that `make_portable` returned."""
    if differences:
        warnings.warn(
            f"{what}: transformers 4 computes other rewards with this checkpoint, or cannot load it, because of "
            f"{'; '.join(differences)}. Load it with transformers 5 (RewardBench pins 4.51).",
            RMTensionWarning,
            stacklevel=4,
        )


def _complete(config: dict[str, Any]) -> list[str]:
    """Add the names of transformers 4 to a config, and to the configs inside it."""
    kind = config.get("model_type", "")
    differences = [text for value in config.values() if isinstance(value, dict) for text in _complete(value)]
    if config.get("dtype") is not None:
        config["torch_dtype"] = config["dtype"]
    for new, old in _RENAMED.get(kind, {}).items():
        config[old] = config[new]
    for name, fixed in _FIXED.get(kind, {}).items():
        if config.get(name, fixed) != fixed:
            differences.append(f"{name}={config[name]} ({kind} takes {fixed} there)")
    rope = config.get("rope_parameters")
    if not rope:
        return differences
    by_layer = any(isinstance(value, dict) for value in rope.values())
    return differences + (_complete_layers(config, rope) if by_layer else _complete_rope(config, rope))


def _complete_rope(config: dict[str, Any], rope: dict[str, Any]) -> list[str]:
    """Rotary parameters that all layers share. transformers 5 prefers `rope_scaling`, so that must be complete."""
    kind = config.get("model_type", "")
    for name in ("rope_theta", "partial_rotary_factor"):
        if name in rope:
            config[_ROPE_NAMES.get(kind, {}).get(name, name)] = rope[name]
    method = rope.get("rope_type", "default")
    scaling = {name: value for name, value in rope.items() if name not in _UNSCALED}
    # null means "not scaled" also for GPT-OSS, whose class scales by default.
    config["rope_scaling"] = None if method == "default" else {"rope_type": method, **scaling}
    if method == "default":
        return []
    scaled = f"rope_parameters of type {method!r}"
    if method == "longrope":
        config["original_max_position_embeddings"] = scaling["original_max_position_embeddings"]
    factors = {name: scaling[name] for name in ("short_factor", "long_factor") if name in scaling}
    if kind == "phi3" and set(scaling) == {*factors, "original_max_position_embeddings"}:
        config["rope_scaling"] = {"type": method, **factors}  # its class refuses any other key
        return []
    if method not in _SCALED or kind in ("nemotron", "phi3"):
        return [f"{scaled} ({kind} does not read them there)"]
    required = _REQUIRED.get((kind, method))
    if required is not None and required not in scaling:
        return [f"{scaled} without {required!r} ({kind} requires it there)"]
    decides = method == "yarn" or (method == "longrope" and scaling.get("attention_factor") is None)
    if decides and scaling.get("factor") is not None:
        ratio = config["max_position_embeddings"] / scaling["original_max_position_embeddings"]
        if scaling["factor"] != ratio:
            lengths = "max_position_embeddings / original_max_position_embeddings"
            return [f"{scaled} with factor={scaling['factor']} (4.51 takes {lengths}, {ratio:g})"]
    return []


def _complete_layers(config: dict[str, Any], layers: dict[str, Any]) -> list[str]:
    """Rotary parameters by type of layer: in transformers 4 only Gemma-3 has a separate base for windows."""
    names = sorted(layers)
    full, *others = [layers[name] or {} for name in names]
    if all(other.get("rope_type") == "default" for other in others):
        if config.get("model_type", "").startswith("gemma3") and names == ["full_attention", "sliding_attention"]:
            config["rope_local_base_freq"] = others[0]["rope_theta"]
            return _complete_rope(config, full)
        if all(other == full for other in others):
            return _complete_rope(config, full)
    return [f"rope_parameters by type of layer ({', '.join(names)})"]


def _tokenizer_config(config: dict[str, Any], tokenizer: Any, backend: dict[str, Any]) -> dict[str, Any]:
    """The config of a tokenizer that both major versions read from `tokenizer.json` unchanged."""
    config = {name: value for name, value in config.items() if name not in _LOADING}
    # Model-specific classes add special tokens to a text, whatever tokenizer.json says.
    config["tokenizer_class"] = "PreTrainedTokenizerFast"
    if isinstance(config.get("extra_special_tokens"), list):
        config["additional_special_tokens"] = config.pop("extra_special_tokens")
    templates = getattr(tokenizer, "chat_template", None)
    if isinstance(templates, dict):
        templates = [{"name": name, "template": template} for name, template in templates.items()]
    if templates:
        config["chat_template"] = templates
    # Defaults of the classes. With token_type_ids, transformers 4's default, GPT-2 adds the embedding of token 0.
    for name in ("model_input_names", "padding_side", "truncation_side", "clean_up_tokenization_spaces"):
        config[name] = getattr(tokenizer, name)
    # transformers 4 writes this value into the backend, and uses False if the config has no value.
    space = (backend.get("pre_tokenizer") or {}).get("add_prefix_space")
    return config if space is None else config | {"add_prefix_space": space}


def _read(path: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return content


def _write(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")
