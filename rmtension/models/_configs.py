"""Configs of checkpoints, including those whose model type names the checkpoint's own code around a standard body."""

import json
import re
from typing import Any

from rmtension.models._head_files import CheckpointFiles
from rmtension.models._internlm2 import is_internlm2, llama_fields

# What own classes append to the model type of their body: gpt_neox_reward_model, qwen2_rm.
_SUFFIX = re.compile(r"[-_](rm|reward|reward_model|rewardmodel|for_reward)$")


def stored_fields(files: CheckpointFiles) -> dict[str, Any]:
    """The fields of config.json, also those that transformers drops, such as a temperature; empty without that file."""
    path = files.find("config.json")
    if path is None:
        return {}
    try:
        fields: Any = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        return {}  # transformers reports it
    return fields if isinstance(fields, dict) else {}


def standard_config(files: CheckpointFiles) -> Any:
    """The config of the standard body of a model type that transformers does not know; None if there is no such body.

    The fields that own code added are kept. Own code is not run.
    """
    from transformers import CONFIG_MAPPING, AutoConfig

    fields = stored_fields(files)
    model_type = fields.get("model_type")
    if not isinstance(model_type, str) or model_type in CONFIG_MAPPING:
        return None
    if is_internlm2(fields):
        return AutoConfig.for_model("llama", **llama_fields(fields))
    body = _SUFFIX.sub("", model_type)
    if body not in CONFIG_MAPPING:
        return None
    return AutoConfig.for_model(body, **{key: value for key, value in fields.items() if key != "model_type"})
