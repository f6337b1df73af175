"""Heads in the safetensors files of a checkpoint: in the model's own files, or in a separate one. Never pickled."""

import json
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError, safe_open
from torch import Tensor

from rmtension.errors import ModelError
from rmtension.models._checkpoint_names import contents
from rmtension.models._heads import is_linear_head, is_numbered, layered_heads

# The file in which LLaMA-Factory saves a value head separately from the model.
VALUE_HEAD = "value_head.safetensors"


@dataclass(frozen=True)
class CheckpointFiles:
    """The files of a checkpoint by name: in a folder, or on the hub, from which they are downloaded one by one."""

    name: str
    revision: str | None = None
    local_files_only: bool = False

    def find(self, file: str) -> Path | None:
        """The path of `file` on this machine; None if the checkpoint does not have it."""
        from transformers.utils import cached_file

        try:
            path: str | None = cached_file(
                self.name, file, revision=self.revision, local_files_only=self.local_files_only
            )
        except OSError:
            return None
        return None if path is None else Path(path)


@dataclass(frozen=True)
class StoredHeads:
    """`linear`: the tensors of linear heads by their names. `layers`: names of tensors of heads of several layers."""

    linear: dict[str, Tensor]
    layers: tuple[str, ...] = ()


def stored_heads(files: CheckpointFiles, width: int | None) -> StoredHeads:
    """Read the heads in a model's safetensors files; other tensors are not read.

    Raises `ModelError` if there are no safetensors files. (transformers would ask the hub to convert pickled ones.)
    """
    index, single = files.find("model.safetensors.index.json"), files.find("model.safetensors")
    with _damage_named(files.name):
        if index is not None:
            weight_map: Mapping[str, str] = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
            outside = [file for file in weight_map.values() if Path(file).name != file]
            if outside:
                raise ModelError(f"{files.name}: its index names a file outside the checkpoint: {outside[0]!r}.")
        elif single is not None:
            with safe_open(single, framework="pt") as opened:
                weight_map = dict.fromkeys(opened.keys(), single.name)
        else:
            raise ModelError(
                f"{files.name}: expected model.safetensors; pickled weights are not read. If you trust them, load them "
                f"with transformers and convert them with save_pretrained.{contents(files.name)}"
            )
        # A head is not a numbered layer, so shards with numbered layers only need not be opened.
        outer = {name: file for name, file in weight_map.items() if not is_numbered(name)}
        return StoredHeads(_linear_heads(files, outer, width), tuple(layered_heads(weight_map)))


def stored_tensor(files: CheckpointFiles, names: tuple[str, ...]) -> Tensor | None:
    """The first tensor with one of these names in a model's safetensors files; None if there is none."""
    index, single = files.find("model.safetensors.index.json"), files.find("model.safetensors")
    with _damage_named(files.name):
        weight_map: Mapping[str, str] = (
            {} if index is None else json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        )
        for name in names:
            path = (
                files.find(weight_map[name]) if Path(weight_map.get(name, "/")).name == weight_map.get(name) else single
            )
            if path is not None:
                with safe_open(path, framework="pt") as opened:
                    if name in opened.keys():  # noqa: SIM118 - it is no mapping
                        tensor: Tensor = opened.get_tensor(name)
                        return tensor
    return None


def separate_head(files: CheckpointFiles) -> dict[str, Tensor]:
    """The tensors of `value_head.safetensors` in the folder of a model; empty if there is no such file."""
    path = files.find(VALUE_HEAD)
    return {} if path is None else read_head_file(path)


def read_head_file(path: str | Path) -> dict[str, Tensor]:
    """All tensors of a safetensors file; raises `ModelError` for a pickled file, and says how to convert it."""
    path = Path(path).expanduser()
    if not path.is_file():
        raise ModelError(
            f"head: expected the path of a safetensors file, but there is no file {path}. Check the path, or pass the "
            "tensors themselves."
        )
    if path.suffix != ".safetensors":
        raise ModelError(f"head: {refused_pickle(path)} Then pass head={str(path.with_suffix('.safetensors'))!r}.")
    with _damage_named(path), safe_open(path, framework="pt") as opened:
        return {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 - it is no mapping


def pickled_head(files: CheckpointFiles, *, is_adapter: bool) -> str:
    """For a checkpoint without a head: what to do with a pickled file that may hold one; '' without such a file."""
    # For an adapter, trl saves its value head as pytorch_model.bin; for a model, that file is the whole model.
    names = ("value_head.bin", "pytorch_model.bin") if is_adapter else ("value_head.bin",)
    pickled = next((path for file in names if (path := files.find(file)) is not None), None)
    if pickled is None:
        return ""
    path = Path(files.name) / pickled.name if Path(files.name).is_dir() else pickled
    return f" {refused_pickle(path, VALUE_HEAD)} Then open it again, with head={str(path.with_name(VALUE_HEAD))!r}."


def refused_pickle(path: Path, target: str | None = None) -> str:
    """Why a pickled file is not read, and the line of Python that converts one."""
    converted = path.with_name(target) if target else path.with_suffix(".safetensors")
    return (
        f"{path} is a pickled file, which can run code, so it is not read. If you trust it, convert it once: "
        "`import torch; from safetensors.torch import save_file; "
        f'save_file(torch.load({str(path)!r}, weights_only=True), {str(converted)!r}, {{"format": "pt"}})`.'
    )


def _linear_heads(files: CheckpointFiles, names: Mapping[str, str], width: int | None) -> dict[str, Tensor]:
    """The tensors of linear heads among `names`, which maps the name of a tensor to its file."""
    tensors: dict[str, Tensor] = {}
    with ExitStack() as stack:
        paths = {file: path for file in set(names.values()) if (path := files.find(file)) is not None}
        opened = {file: stack.enter_context(safe_open(path, framework="pt")) for file, path in paths.items()}
        held = {name: opened[file] for name, file in names.items() if file in opened}
        shapes = {name: tuple(file.get_slice(name).get_shape()) for name, file in held.items()}
        heads = {name for name, shape in shapes.items() if is_linear_head(name, shape, width)}
        biases = {name.removesuffix("weight") + "bias" for name in heads} & set(held)
        for name in sorted(heads | biases):
            tensors[name] = held[name].get_tensor(name)
    return tensors


@contextmanager
def _damage_named(name: str | Path) -> Iterator[None]:
    try:
        yield
    except ModelError:
        raise
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError, SafetensorError) as error:
        raise ModelError(
            f"{name}: its safetensors files are damaged or incomplete ({error}). Download them again."
        ) from error
