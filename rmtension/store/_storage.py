"""Results on disk: one safetensors file per result, with all values that are not tensors as JSON in its header.

Files may come from an untrusted source: the header is compared with what a result of its kind must have before any
tensor is read, and nothing in it is executed. safetensors itself refuses headers of more than 100 MB and tensors that
do not fill the file exactly.
"""

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from rmtension.distributed import current
from rmtension.errors import StorageError
from rmtension.store._files import written_whole

# The format that this version writes; files of a higher format are refused.
FORMAT = 1
_HEADER = "rmtension"
_DTYPES = {
    "float": ("F64", "F32", "BF16", "F16"),
    "int": ("I64",),
    "bool": ("BOOL",),
    "any": ("F64", "F32", "BF16", "F16", "I64", "BOOL"),
}


def write_result(path: str | Path, kind: str, tensors: Mapping[str, Tensor], values: Mapping[str, Any]) -> None:
    """Write a result of `kind` to `path`, completely or not at all: a failed write does not change the old file.

    Inside `sharded()` only the first process writes.
    """
    if current().is_first:
        write_tensors(Path(path), kind, tensors, values)


def write_tensors(path: Path, kind: str, tensors: Mapping[str, Tensor], values: Mapping[str, Any]) -> None:
    """The same as `write_result`, but every process writes."""
    # Only the top level is sorted: chat templates print the keys of messages in their order.
    header = {_HEADER: json.dumps(dict(sorted({"kind": kind, "format": FORMAT, **values}.items())))}
    with written_whole(path, kind) as partial:
        # Not with safetensors' own writer, which leaves a temporary file if the process is killed.
        partial.write_bytes(save(_without_aliases(tensors), header))


def read_result(
    path: str | Path,
    kind: str,
    *,
    tensors: Mapping[str, str],
    values: Mapping[str, type],
    optional: Mapping[str, str] | None = None,
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read tensors and values of a result of `kind`.

    `tensors` maps each required name to a specification such as "float layer neuron": the kind of number ("float",
    "int", "bool", "any") and a name per dimension. A dimension has the same length in the whole file; a digit is a
    fixed length, and "_" any length. A name may contain a star. The tensors in `optional` may be present, and no
    others. `values` maps each other value to its type.

    Raises `StorageError` if the file is missing, damaged, of another kind, or written by a newer version.
    """
    path = Path(path)
    with _opened(path) as file:
        header = _header(path, kind, (file.metadata() or {}).get(_HEADER))
        for name, expected in values.items():
            value = header.get(name)
            # JSON does not distinguish integers from floats: 1 may mean 1.0.
            fits = isinstance(value, expected) or (expected is float and isinstance(value, int))
            if not fits or (isinstance(value, bool) and expected is not bool):
                raise StorageError(
                    f"{path}: damaged: {name!r} should be {expected.__name__}, got {type(value).__name__}. "
                    "Compute and save the result again."
                )
        names = list(file.keys())
        slices = {name: file.get_slice(name) for name in names}
        shapes = {name: (str(part.get_dtype()), list(part.get_shape())) for name, part in slices.items()}
        _check_shapes(path, shapes, tensors, optional or {})
        return {name: file.get_tensor(name) for name in names}, header


def kind_of(path: str | Path) -> str:
    """The kind of a saved result, such as "NeuronScores"; raises `StorageError` if the file is not a result.

    Examples:
        >>> scores.save("scores.safetensors")
        >>> kind_of("scores.safetensors")
        'NeuronScores'
    """
    path = Path(path)
    with _opened(path) as file:
        return _read_header(path, (file.metadata() or {}).get(_HEADER))[0]


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    """An open safetensors file; raises `StorageError` if it is missing or damaged."""
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except FileNotFoundError as error:
        raise StorageError(f"{path}: there is no such file. Check the path.") from error
    except (OSError, SafetensorError) as error:
        if isinstance(error, StorageError):
            raise
        raise StorageError(f"{path}: not a saved result of rmtension, or damaged ({error}). Check the path.") from error


def _without_aliases(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors on the CPU; none of them share memory, as safetensors requires."""
    copies: dict[str, Tensor] = {}
    addresses: set[int] = set()
    for name, tensor in tensors.items():
        on_cpu = tensor.detach().cpu().contiguous()
        address = on_cpu.untyped_storage().data_ptr()
        copies[name] = on_cpu.clone() if address in addresses else on_cpu
        addresses.add(address)
    return copies


def _header(path: Path, kind: str, text: str | None) -> dict[str, Any]:
    written_kind, header = _read_header(path, text)
    if written_kind != kind:
        raise StorageError(
            f"{path}: expected a {kind}, got a {written_kind:.40}. Load it with the class that saved it."
        )
    return header


def _read_header(path: Path, text: str | None) -> tuple[str, dict[str, Any]]:
    """The kind of a result and the other values of its header."""
    if text is None:
        raise StorageError(f"{path}: not a result of rmtension: its header has no entry {_HEADER!r}.")
    try:
        header = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise StorageError(f"{path}: not a saved result of rmtension, or damaged ({error}). Check the path.") from error
    if not isinstance(header, dict):
        raise StorageError(f"{path}: not a result of rmtension, or damaged (its header is not an object).")
    written = header.pop("format", FORMAT)
    if not isinstance(written, int) or written > FORMAT:
        raise StorageError(
            f"{path}: written by a newer version of rmtension (format {written!r}; this one reads up to {FORMAT}). "
            "Upgrade: pip install -U rmtension."
        )
    return str(header.pop("kind", None)), header


def _check_shapes(
    path: Path, shapes: Mapping[str, tuple[str, list[int]]], wanted: Mapping[str, str], optional: Mapping[str, str]
) -> None:
    missing = [name for name in wanted if "*" not in name and name not in shapes]
    lengths: dict[str, int] = {}
    wrong = [f"{name!r} is missing" for name in missing]
    for name, (dtype, shape) in shapes.items():
        specs = [spec for pattern, spec in {**wanted, **optional}.items() if fnmatchcase(name, pattern)]
        if not specs:
            wrong.append(f"{name!r} does not belong there")
            continue
        numbers, *dims = specs[0].split()
        fits = dtype in _DTYPES[numbers] and len(shape) == len(dims)
        for dim, length in zip(dims, shape, strict=False):
            if dim != "_":
                fits = fits and length == (int(dim) if dim.isdigit() else lengths.setdefault(dim, length))
        if not fits:
            wrong.append(f"{name!r} should be {specs[0]!r}, got {dtype} {shape}")
    if wrong:
        raise StorageError(f"{path}: damaged: {'; '.join(wrong[:3])}. Compute and save the result again.")
