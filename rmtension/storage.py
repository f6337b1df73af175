"""Results on disk: one safetensors file, with everything that is not a tensor as JSON in its header."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from rmtension.distributed import current
from rmtension.errors import StorageError

_HEADER = "rmtension"


def write_result(path: str | Path, kind: str, tensors: Mapping[str, Tensor], values: Mapping[str, Any]) -> None:
    """Write a result of `kind` to `path`, all of it or nothing: a failed write leaves the old file as it was.

    Of several processes that share the work, the first one writes.
    """
    if not current().is_first:
        return
    path = Path(path)
    partial = path.with_name(f"{path.name}.partial")
    header = {_HEADER: json.dumps({"kind": kind, **values}, sort_keys=True)}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, partial, header)
        partial.replace(path)
    except (OSError, SafetensorError) as error:
        partial.unlink(missing_ok=True)
        raise StorageError(f"{path}: the {kind} could not be written ({error}).") from error


def read_result(path: str | Path, kind: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and values of a result of `kind`; raises `StorageError` when the file is none, or of another kind."""
    try:
        with safe_open(path, framework="pt") as file:
            header = json.loads((file.metadata() or {})[_HEADER])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
    except (OSError, SafetensorError, KeyError, ValueError) as error:
        raise StorageError(f"{path}: not a result of rmtension, or damaged ({error}).") from error
    if not isinstance(header, dict) or header.pop("kind", None) != kind:
        raise StorageError(
            f"{path}: expected a {kind}, found another kind of result. Load it with the class that saved it."
        )
    return tensors, header
