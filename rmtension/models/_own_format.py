"""Saving a model in the format of the checkpoint it was read from, for heads that transformers has no class for."""

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rmtension.errors import ModelError
from rmtension.heads._head import Head, tensors_of
from rmtension.heads._head_tensors import body_prefix, text_prefix
from rmtension.models._head_files import VALUE_HEAD, CheckpointFiles, all_tensors, outside_body, weight_files
from rmtension.models._internlm2 import from_llama, is_internlm2

_UNKNOWN: Any = object()


@dataclass(frozen=True)
class OwnFormat:
    """What a checkpoint consists of besides its body: the config, the head's tensors, and files of code.

    `tensors` are the head's tensors in the model's files, `separate` those in `value_head.safetensors`; `head` is the
    head that was made of them. `fields` is config.json, and `read` what transformers made of it.
    """

    files: CheckpointFiles
    fields: Mapping[str, Any]
    read: Mapping[str, Any]
    tensors: Mapping[str, Tensor]
    separate: Mapping[str, Tensor]
    head: Head | None

    @classmethod
    def of(
        cls, files: CheckpointFiles, config: Any, separate: Mapping[str, Tensor], head: Head | None
    ) -> "OwnFormat | None":
        """The format of a checkpoint; None without a config.json."""
        path = files.find("config.json")
        if path is None:
            return None
        outside = outside_body(files, weight_files(files))
        fields = json.loads(path.read_text(encoding="utf-8"))
        return cls(files, fields, config.to_dict(), outside.read(outside.shapes), separate, head)

    def write(self, base: Any, folder: Path, dtype: torch.dtype) -> None:
        """Write the body `base`, with the names that it had, the other tensors, the config and the code as they were.

        Code is copied, not run. What is not loaded is read from the original files again: the unembedding, and for a
        language model inside a model for text and images the rest of that model. Raises `ModelError` if they are no
        longer there.
        """
        from safetensors.torch import save_file

        try:
            weight_map = weight_files(self.files)
        except ModelError as error:
            raise ModelError(
                f"save_pretrained: the files that the model was read from are needed, because they hold its "
                f"unembedding and code, but they are not there any more ({error}). Restore them, then save again."
            ) from error
        inner = self._text_config(base) is not None
        prefix = text_prefix(weight_map) if inner else body_prefix(weight_map)
        state = base.state_dict()
        state = from_llama(state, base.config) if is_internlm2(self.fields) else state
        body = {f"{prefix}{name}": tensor for name, tensor in state.items()}
        others = (
            all_tensors(self.files, weight_map) if inner else outside_body(self.files, weight_map, unembedding=True)
        )
        rest = others.read(others.shapes.keys() - self.tensors.keys() - body.keys())
        base.save_pretrained(folder, state_dict={**body, **rest, **self.tensors})
        if self.separate:
            save_file(dict(self.separate), folder / VALUE_HEAD, {"format": "pt"})
        (folder / "config.json").write_text(json.dumps(self._config(base, dtype), indent=2) + "\n", encoding="utf-8")
        for path in self._code():
            shutil.copyfile(path, folder / path.name)

    def _config(self, base: Any, dtype: torch.dtype) -> dict[str, Any]:
        """The fields of config.json, with what changed since they were read, such as the biases of an ablation."""
        now, text = base.config.to_dict(), self._text_config(base)
        read = self.read if text is None else text
        changed = {key: value for key, value in now.items() if read.get(key, _UNKNOWN) != value}
        if is_internlm2(self.fields) and "attention_bias" in changed:
            changed["bias"] = changed.pop("attention_bias")
        for key in ("architectures", "transformers_version", "dtype", "torch_dtype", "model_type"):
            changed.pop(key, None)
        if text is not None and "text_config" in self.fields:
            changed = {"text_config": {**self.fields["text_config"], **changed}}
        name = str(dtype).removeprefix("torch.")
        return {**self.fields, **changed, **{key: name for key in ("dtype", "torch_dtype") if key in self.fields}}

    def _text_config(self, base: Any) -> Mapping[str, Any] | None:
        """What was read of the language model's config, if `base` is the one inside a model for text and images."""
        text: Mapping[str, Any] | None = self.read.get("text_config")
        return text if text is not None and text.get("model_type") == base.config.model_type else None

    def _code(self) -> list[Path]:
        """The files of Python in a local folder, or those that the config names."""
        folder = Path(self.files.name)
        if folder.is_dir():
            return sorted(folder.glob("*.py"))
        named = {str(name).partition("--")[2] or str(name) for name in (self.fields.get("auto_map") or {}).values()}
        found = [self.files.find(f"{name.partition('.')[0]}.py") for name in sorted(named)]
        return [path for path in found if path is not None]


def same_tensors(one: nn.Module, other: nn.Module) -> bool:
    """Whether two heads have equal tensors; in different dtypes, up to the rounding of the coarser one."""
    first, second = tensors_of(one), tensors_of(other)
    return len(first) == len(second) and all(map(_is_same, first, second))


def _is_same(one: Tensor, other: Tensor) -> bool:
    coarser = min(one.dtype, other.dtype, key=lambda dtype: dtype.itemsize)
    return torch.equal(one.cpu().to(coarser), other.cpu().to(coarser))
