"""Heads in the safetensors files of a checkpoint: in the model's own files, or in a separate one. Never pickled."""

import json
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors import safe_open
from torch import Tensor

from rmtension.errors import ModelError
from rmtension.heads._head_tensors import HeadTensors, body_prefix, damage_named, names_outside
from rmtension.heads._heads import is_linear_head, is_numbered, layered_heads
from rmtension.models._checkpoint_names import contents

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
    """`linear`: the tensors of linear heads by their names. `layers`: names of tensors of heads of several layers.

    `outside`: all tensors outside the body and the unembedding.
    """

    linear: dict[str, Tensor]
    layers: tuple[str, ...] = ()
    outside: HeadTensors = field(default_factory=lambda: HeadTensors({}, {}))


def stored_heads(files: CheckpointFiles, width: int | None) -> StoredHeads:
    """Read the heads in a model's safetensors files; other tensors are not read.

    Raises `ModelError` if there are no safetensors files. (transformers would ask the hub to convert pickled ones.)
    """
    with damage_named(files.name):
        weight_map = weight_files(files)
        # A head is not a numbered layer, so shards with numbered layers only need not be opened.
        outer = {name: file for name, file in weight_map.items() if not is_numbered(name)}
        linear = _linear_heads(files, outer, width)
        return StoredHeads(linear, tuple(layered_heads(weight_map)), outside_body(files, weight_map))


def weight_files(files: CheckpointFiles) -> Mapping[str, str]:
    """The file of every tensor of a model, by the tensor's name; raises `ModelError` without safetensors files."""
    index, single = files.find("model.safetensors.index.json"), files.find("model.safetensors")
    with damage_named(files.name):
        if index is not None:
            weight_map: Mapping[str, str] = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
            outside = [file for file in weight_map.values() if Path(file).name != file]
            if outside:
                raise ModelError(
                    f"{files.name}: its index names a file outside the checkpoint: {outside[0]!r}. Download it again."
                )
            return weight_map
        if single is not None:
            with safe_open(single, framework="pt") as opened:
                return dict.fromkeys(opened.keys(), single.name)
    raise ModelError(
        f"{files.name}: expected model.safetensors; pickled weights are not read. If you trust them, load them "
        f"with transformers and convert them with save_pretrained.{contents(files.name)}"
    )


def outside_body(files: CheckpointFiles, weight_map: Mapping[str, str], *, unembedding: bool = False) -> HeadTensors:
    """The tensors outside the body, and with `unembedding` its unembedding too. Only their shapes are read."""
    return _shapes_of(files, weight_map, names_outside(weight_map, unembedding=unembedding))


def all_tensors(files: CheckpointFiles, weight_map: Mapping[str, str]) -> HeadTensors:
    """All tensors of a checkpoint. Only their shapes are read."""
    return _shapes_of(files, weight_map, sorted(weight_map))


def _shapes_of(files: CheckpointFiles, weight_map: Mapping[str, str], names: list[str]) -> HeadTensors:
    paths = {file: path for file in {weight_map[name] for name in names} if (path := files.find(file)) is not None}
    shapes: dict[str, tuple[int, ...]] = {}
    for file, path in paths.items():
        with damage_named(files.name), safe_open(path, framework="pt") as opened:
            shapes |= {name: tuple(opened.get_slice(name).get_shape()) for name in names if weight_map[name] == file}
    return HeadTensors(shapes, {name: paths[weight_map[name]] for name in shapes})


def read_body(files: CheckpointFiles) -> dict[str, Tensor]:
    """The tensors of the body by their names without its prefix. Memory: the weights once."""
    weight_map = weight_files(files)
    prefix = body_prefix(weight_map)
    outside = set(names_outside(weight_map, unembedding=True))
    body: dict[str, Tensor] = {}
    for file in sorted(set(weight_map.values())):
        path = files.find(file)
        with damage_named(files.name), safe_open(str(path), framework="pt") as opened:
            for name in opened.keys():  # noqa: SIM118 - it is no mapping
                if name not in outside:
                    body[name.removeprefix(prefix)] = opened.get_tensor(name)
    return body


def stored_tensor(files: CheckpointFiles, names: tuple[str, ...]) -> Tensor | None:
    """The first tensor with one of these names in a model's safetensors files; None if there is none."""
    index, single = files.find("model.safetensors.index.json"), files.find("model.safetensors")
    with damage_named(files.name):
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
    return {} if path is None else _read_head_file(path)


def from_head_file(given: object) -> Any:
    """The tensors of a head that was given as the path of a safetensors file; anything else as it is."""
    return _read_head_file(given) if isinstance(given, str | Path) else given


def _read_head_file(path: str | Path) -> dict[str, Tensor]:
    """All tensors of a safetensors file; raises `ModelError` for a pickled file, and says how to convert it."""
    path = Path(path).expanduser()
    if not path.is_file():
        raise ModelError(
            f"head: expected the path of a safetensors file, but there is no file {path}. Check the path, or pass the "
            "tensors themselves."
        )
    if path.suffix != ".safetensors":
        raise ModelError(f"head: {refused_pickle(path)} Then pass head={str(path.with_suffix('.safetensors'))!r}.")
    with damage_named(path), safe_open(path, framework="pt") as opened:
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


def refuse_pickled_parts(files: CheckpointFiles) -> None:
    """Raise `ModelError` for a head in two pickled files (LDL), with the line of Python that converts them.

    The model's own files may hold untrained tensors of the same names.
    """
    parts = ("regression_layer", "gating_layer")
    paths = [files.find(f"{part}.pt") for part in parts]
    if None in paths:
        return
    folder = Path(files.name) if Path(files.name).is_dir() else Path()
    target = str(folder / "own_head.safetensors")
    loaded = ", ".join(f"({part!r}, {str(path)!r})" for part, path in zip(parts, paths, strict=True))
    raise ModelError(
        f"{files.name}: its head is in pickled files, {parts[0]}.pt and {parts[1]}.pt, which can run code, so they are "
        "not read. If you trust them, convert them once: `import torch; from safetensors.torch import save_file; "
        "save_file({f'{part}.{name}': tensor for part, file in [" + loaded + "] for name, tensor in "
        f"torch.load(file, weights_only=True).items()}}, {target!r})`. Then pass head={target!r}."
    )


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
