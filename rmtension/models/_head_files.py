"""Heads in a checkpoint's safetensors files, in the model's own and in one beside them; no pickled file is read."""

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

# LLaMA-Factory's name for the value head that it keeps out of the model's own files.
VALUE_HEAD = "value_head.safetensors"


@dataclass(frozen=True)
class CheckpointFiles:
    """The files of a checkpoint by name: in a folder, or of a hub name, from where they are fetched one by one."""

    name: str
    revision: str | None = None
    local_files_only: bool = False

    def find(self, file: str) -> Path | None:
        """Where `file` is on this machine; None where the checkpoint has none."""
        from transformers.utils import cached_file

        try:
            found: str | None = cached_file(
                self.name, file, revision=self.revision, local_files_only=self.local_files_only
            )
        except OSError:
            return None
        return None if found is None else Path(found)


@dataclass(frozen=True)
class StoredHeads:
    """`linear`: the tensors of linear heads by their names. `layers`: names of tensors of heads of several layers."""

    linear: dict[str, Tensor]
    layers: tuple[str, ...] = ()


def stored_heads(files: CheckpointFiles, width: int | None) -> StoredHeads:
    """What of a model's own safetensors files looks like a head; no other tensor is read.

    Raises `ModelError` where there are no such files. (transformers would go and ask the hub to convert others.)
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
                f"{files.name}: it has no model.safetensors, and pickled weights are not read. Convert them: load them "
                f"with transformers where you trust them, and save_pretrained.{contents(files.name)}"
            )
        # A head is no layer of many: shards with nothing but layers need not be opened.
        outer = {name: file for name, file in weight_map.items() if not is_numbered(name)}
        return StoredHeads(_linear_heads(files, outer, width), tuple(layered_heads(weight_map)))


def head_beside(files: CheckpointFiles) -> dict[str, Tensor]:
    """The tensors of `value_head.safetensors` beside a model; empty where there is none."""
    path = files.find(VALUE_HEAD)
    return {} if path is None else read_head_file(path)


def read_head_file(path: str | Path) -> dict[str, Tensor]:
    """All tensors of a safetensors file; `ModelError` for a pickled one, with the way to convert it."""
    path = Path(path).expanduser()
    if not path.is_file():
        raise ModelError(f"head: expected the path of a safetensors file, and {path} is no file.")
    if path.suffix != ".safetensors":
        raise ModelError(f"head: {refused_pickle(path)} Then give head={str(path.with_suffix('.safetensors'))!r}.")
    with _damage_named(path), safe_open(path, framework="pt") as opened:
        return {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 - it is no mapping


def pickled_head(files: CheckpointFiles, *, is_adapter: bool) -> str:
    """For a checkpoint without a head: what to do with a pickled file that may hold one; '' where there is none."""
    # Beside an adapter trl keeps its value head in a file of this name; beside a model it is the model once more.
    names = ("value_head.bin", "pytorch_model.bin") if is_adapter else ("value_head.bin",)
    found = next((path for file in names if (path := files.find(file)) is not None), None)
    if found is None:
        return ""
    path = Path(files.name) / found.name if Path(files.name).is_dir() else found
    return f" {refused_pickle(path, VALUE_HEAD)} Then open it again, with head={str(path.with_name(VALUE_HEAD))!r}."


def refused_pickle(path: Path, target: str | None = None) -> str:
    """Why a pickled file is not read, and the line of Python that converts one."""
    converted = path.with_name(target) if target else path.with_suffix(".safetensors")
    return (
        f"{path} is pickled, which can run code, and is not read here. Where you trust it, convert it once: "
        "`import torch; from safetensors.torch import save_file; "
        f'save_file(torch.load({str(path)!r}, weights_only=True), {str(converted)!r}, {{"format": "pt"}})`.'
    )


def _linear_heads(files: CheckpointFiles, names: Mapping[str, str], width: int | None) -> dict[str, Tensor]:
    """The tensors of linear heads among `names`, each with the file that it is in."""
    found: dict[str, Tensor] = {}
    with ExitStack() as stack:
        paths = {file: path for file in set(names.values()) if (path := files.find(file)) is not None}
        opened = {file: stack.enter_context(safe_open(path, framework="pt")) for file, path in paths.items()}
        held = {name: opened[file] for name, file in names.items() if file in opened}
        shapes = {name: tuple(file.get_slice(name).get_shape()) for name, file in held.items()}
        heads = {name for name, shape in shapes.items() if is_linear_head(name, shape, width)}
        biases = {name.removesuffix("weight") + "bias" for name in heads} & set(held)
        for name in sorted(heads | biases):
            found[name] = held[name].get_tensor(name)
    return found


@contextmanager
def _damage_named(name: str | Path) -> Iterator[None]:
    try:
        yield
    except ModelError:
        raise
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError, SafetensorError) as error:
        raise ModelError(
            f"{name}: its safetensors files are damaged or cut short ({error}). Fetch them again."
        ) from error
