"""Results on disk: one safetensors file, with everything that is not a tensor as JSON in its header.

A file may come from anywhere: what its header says is compared with what a result of its kind has before any tensor is
read, and nothing in it is executed. safetensors itself refuses headers of more than 100 MB and tensors that do not fill
the file exactly.
"""

import json
from collections.abc import Mapping
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from rmtension.distributed import current
from rmtension.errors import StorageError
from rmtension.store._files import written_whole

# Of what this version writes; files of a higher one are refused.
FORMAT = 1
_HEADER = "rmtension"
_DTYPES = {
    "float": ("F64", "F32", "BF16", "F16"),
    "int": ("I64",),
    "bool": ("BOOL",),
    "any": ("F64", "F32", "BF16", "F16", "I64", "BOOL"),
}


def write_result(path: str | Path, kind: str, tensors: Mapping[str, Tensor], values: Mapping[str, Any]) -> None:
    """Write a result of `kind` to `path`, all of it or nothing: a failed write leaves the old file as it was.

    Of several processes that share the work, the first one writes.
    """
    if current().is_first:
        write_tensors(Path(path), kind, tensors, values)


def write_tensors(path: Path, kind: str, tensors: Mapping[str, Tensor], values: Mapping[str, Any]) -> None:
    """The same in every process."""
    # Sorted at the top only: messages of pairs have keys in an order that chat templates write out.
    header = {_HEADER: json.dumps(dict(sorted({"kind": kind, "format": FORMAT, **values}.items())))}
    with written_whole(path, kind) as partial:
        # Not by safetensors' own writing, whose temporary file nobody would find after a kill.
        partial.write_bytes(save(_apart(tensors), header))


def read_result(
    path: str | Path,
    kind: str,
    *,
    tensors: Mapping[str, str],
    values: Mapping[str, type],
    optional: Mapping[str, str] | None = None,
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and values of a result of `kind`.

    `tensors` says what must be there: name -> "float layer neuron", the kind of number ("float", "int", "bool", "any")
    and a name for every dimension; one name is one length in the whole file, and a number is that length. A name may
    have a star. `optional` may be there, and nothing else. `values` gives the type of every other value.

    Raises `StorageError` for a file that is none, is damaged, of another kind, or written by a newer version.
    """
    path = Path(path)
    try:
        with safe_open(path, framework="pt") as file:
            header = _header(path, kind, (file.metadata() or {}).get(_HEADER))
            for name, expected in values.items():
                found = header.get(name)
                # JSON has no integers of its own: 1 may stand for 1.0.
                fits = isinstance(found, expected) or (expected is float and isinstance(found, int))
                if not fits or (isinstance(found, bool) and expected is not bool):
                    raise StorageError(
                        f"{path}: damaged: {name!r} should be {expected.__name__}, found {type(found).__name__}. "
                        "Save the result again."
                    )
            names = list(file.keys())
            slices = {name: file.get_slice(name) for name in names}
            shapes = {name: (str(one.get_dtype()), list(one.get_shape())) for name, one in slices.items()}
            _check_shapes(path, shapes, tensors, optional or {})
            return {name: file.get_tensor(name) for name in names}, header
    except FileNotFoundError as error:
        raise StorageError(f"{path}: there is no such file.") from error
    except (OSError, SafetensorError) as error:
        if isinstance(error, StorageError):
            raise
        raise StorageError(f"{path}: not a result of rmtension, or damaged ({error}).") from error


def _apart(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors on the CPU, each in memory of its own, which safetensors asks for."""
    found: dict[str, Tensor] = {}
    places: set[int] = set()
    for name, tensor in tensors.items():
        there = tensor.detach().cpu().contiguous()
        place = there.untyped_storage().data_ptr()
        found[name] = there.clone() if place in places else there
        places.add(place)
    return found


def _header(path: Path, kind: str, text: str | None) -> dict[str, Any]:
    if text is None:
        raise StorageError(f"{path}: not a result of rmtension: its header does not say so.")
    try:
        header = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise StorageError(f"{path}: not a result of rmtension, or damaged ({error}).") from error
    if not isinstance(header, dict):
        raise StorageError(f"{path}: not a result of rmtension, or damaged (its header is no object).")
    written = header.pop("format", FORMAT)
    if not isinstance(written, int) or written > FORMAT:
        raise StorageError(
            f"{path}: written by a newer version of rmtension (format {written!r}; this one reads up to {FORMAT}). "
            "Upgrade: pip install -U rmtension."
        )
    if header.pop("kind", None) != kind:
        raise StorageError(
            f"{path}: expected a {kind}, found another kind of result. Load it with the class that saved it."
        )
    return header


def _check_shapes(
    path: Path, found: Mapping[str, tuple[str, list[int]]], wanted: Mapping[str, str], optional: Mapping[str, str]
) -> None:
    missing = [name for name in wanted if "*" not in name and name not in found]
    lengths: dict[str, int] = {}
    wrong = [f"{name!r} is missing" for name in missing]
    for name, (dtype, shape) in found.items():
        specs = [spec for pattern, spec in {**wanted, **optional}.items() if fnmatchcase(name, pattern)]
        if not specs:
            wrong.append(f"{name!r} does not belong there")
            continue
        numbers, *dims = specs[0].split()
        fits = dtype in _DTYPES[numbers] and len(shape) == len(dims)
        for dim, length in zip(dims, shape, strict=False):
            fits = fits and length == (int(dim) if dim.isdigit() else lengths.setdefault(dim, length))
        if not fits:
            wrong.append(f"{name!r} should be {specs[0]!r}, found {dtype} {shape}")
    if wrong:
        raise StorageError(f"{path}: damaged: {'; '.join(wrong[:3])}. Save the result again.")
