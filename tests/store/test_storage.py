"""Result files from anywhere: what does not fit is refused by name, before tensors are read."""

import json

import pytest
import torch
from all_results import results
from safetensors import safe_open
from safetensors.torch import save_file

from rmtension import (
    NeuronSet,
    PreferencePairs,
    SharedNeuronReport,
    StudyResult,
)
from rmtension.attribution._faithfulness_result import Faithfulness
from rmtension.errors import RMTensionError, StorageError
from rmtension.neurons._conflict_report import ConflictReport
from rmtension.store._provenance import Provenance
from rmtension.store._storage import FORMAT, kind_of, read_result, write_result


@pytest.fixture(params=results(), ids=lambda result: type(result).__name__)
def result(request):
    return request.param


@pytest.fixture
def saved(result, tmp_path):
    path = tmp_path / "result.safetensors"
    result.save(path)
    return path


def parts(path):
    """Tensors and header of a file."""
    with safe_open(path, framework="pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}, json.loads(file.metadata()["rmtension"])  # noqa: SIM118


def write(path, tensors, header):
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path, {"rmtension": json.dumps(header)})


def same(first, other):
    if isinstance(first, torch.Tensor):
        return torch.equal(first, other)
    if hasattr(first, "equals"):
        return first.equals(other) or list(first) == list(other) == []
    if isinstance(first, dict):
        return first.keys() == other.keys() and all(same(value, other[name]) for name, value in first.items())
    if isinstance(first, float):
        return first == other or (first != first and other != other)
    if isinstance(first, NeuronSet | PreferencePairs | tuple | str | int | type(None) | Provenance):
        return first == other
    return vars(first).keys() == vars(other).keys() and all(
        same(vars(first)[name], vars(other)[name]) for name in vars(first)
    )


def test_what_is_saved_loads_again(result, saved):
    loaded = type(result).load(saved)
    assert all(same(value, vars(loaded)[name]) for name, value in vars(result).items())


def test_the_kind_is_read_without_the_rest(result, saved, tmp_path):
    assert kind_of(saved) == type(result).__name__
    other = tmp_path / "other.safetensors"
    save_file({"mask": torch.ones(2)}, other)
    with pytest.raises(StorageError, match="not a result of rmtension"):
        kind_of(other)
    with pytest.raises(StorageError, match="there is no such file"):
        kind_of(tmp_path / "none")


def test_the_same_result_has_the_same_bytes(result, saved, tmp_path):
    result.save(tmp_path / "again")
    type(result).load(saved).save(tmp_path / "loaded")
    assert saved.read_bytes() == (tmp_path / "again").read_bytes() == (tmp_path / "loaded").read_bytes()


def test_every_part_is_required(result, saved):
    """Without any tensor or value, or with another: an error of this library that names the file or the field."""
    tensors, header = parts(saved)
    optional = {"without_block", "completeness_gap", "base", "skipped"}
    for name in tensors.keys() - optional:
        write(saved, {key: value for key, value in tensors.items() if key != name}, header)
        with pytest.raises(StorageError):
            type(result).load(saved)
    for name in header.keys() - {"format"}:
        for wrong in ({key: value for key, value in header.items() if key != name}, header | {name: [None]}):
            write(saved, tensors, wrong)
            with pytest.raises(RMTensionError):
                type(result).load(saved)
    write(saved, tensors | {"more": torch.zeros(1)}, header)
    if not isinstance(result, Faithfulness):
        with pytest.raises(StorageError, match="'more' does not belong there"):
            type(result).load(saved)


def test_every_tensor_has_its_dtype_and_shape(result, saved):
    tensors, header = parts(saved)
    for name, tensor in tensors.items():
        for wrong in (tensor[:0, ...][None], tensor.to(torch.int8), tensor.to(torch.uint8)):
            write(saved, tensors | {name: wrong}, header)
            with pytest.raises(StorageError, match=f"damaged: {name!r} should be"):
                type(result).load(saved)


def test_a_newer_version_says_so(result, saved):
    tensors, header = parts(saved)
    for newer in (FORMAT + 1, "2.0", None):
        write(saved, tensors, header | {"format": newer})
        with pytest.raises(StorageError, match=r"written by a newer version of rmtension \(format .*Upgrade"):
            type(result).load(saved)


def test_other_kinds_and_other_files_are_refused(result, saved, tmp_path):
    tensors, header = parts(saved)
    write(saved, tensors, header | {"kind": "Other"})
    with pytest.raises(StorageError, match=r", got a Other\. Load it with the class"):
        type(result).load(saved)
    save_file(tensors, saved)
    with pytest.raises(StorageError, match="its header has no entry"):
        type(result).load(saved)
    for header_text in ("[", "[]", "[" * 100_000, "1", '"text"', "null", "{}"):
        save_file(tensors, saved, {"rmtension": header_text})
        with pytest.raises(StorageError):
            type(result).load(saved)
    for content in (b"", b"\x00" * 8, b"\xff" * 16, b"\x80\x04]\x94.", (1 << 62).to_bytes(8, "little") + b"{}"):
        saved.write_bytes(content)
        with pytest.raises(StorageError, match="damaged"):
            type(result).load(saved)
    with pytest.raises(StorageError):
        type(result).load(tmp_path / "missing")
    with pytest.raises(StorageError):
        type(result).load(tmp_path)


def test_truncated_files_are_refused(result, saved):
    content = saved.read_bytes()
    for end in range(0, len(content), max(1, len(content) // 40)):
        saved.write_bytes(content[:end])
        with pytest.raises(StorageError):
            type(result).load(saved)


def test_indices_of_neurons_in_a_conflict_report_are_bounded(tmp_path):
    """A file that names neuron 2^62 must not make anybody count to it."""
    report = next(result for result in results() if isinstance(result, ConflictReport))
    report.save(tmp_path / "result")
    tensors, header = parts(tmp_path / "result")
    tensors["neuron"][-1] = 1 << 62
    write(tmp_path / "result", tensors, header)
    with pytest.raises(StorageError, match="expected one row per neuron"):
        ConflictReport.load(tmp_path / "result")


def test_names_in_a_shared_report(tmp_path):
    report = next(result for result in results() if isinstance(result, SharedNeuronReport))
    report.save(tmp_path / "result")
    tensors, header = parts(tmp_path / "result")
    for names in ([], ["a"], ["a", "c"], ["a", "b", "b"], [1, 2]):
        write(tmp_path / "result", tensors, header | {"names": names})
        with pytest.raises(StorageError, match="its sets differ from the names it lists"):
            SharedNeuronReport.load(tmp_path / "result")


def test_a_study_reads_only_its_own_tables(tmp_path):
    """Names in its summary cannot lead out of the folder."""
    (tmp_path / "secret.csv").write_text("a\n1\n")
    folder = tmp_path / "study"
    folder.mkdir()
    (folder / "summary.json").write_text(json.dumps({"tables": ["../secret", "accuracy"]}))
    (folder / "accuracy.csv").write_text("family,seed\nworld,0\n")
    assert list(StudyResult.load(folder).tables) == ["accuracy"]
    for content in ("[]", "{}", '{"tables": 1}', "[" * 100_000, "\xff"):
        (folder / "summary.json").write_text(content)
        with pytest.raises(StorageError, match="has no finished study"):
            StudyResult.load(folder)


def test_numbers_of_one_name_are_one_length(tmp_path):
    write_result(tmp_path / "r", "Toy", {"a": torch.zeros(2, 3), "b": torch.zeros(3)}, {})
    spec = {"a": "float row column", "b": "float column"}
    assert read_result(tmp_path / "r", "Toy", tensors=spec, values={})[0]["a"].shape == (2, 3)
    with pytest.raises(StorageError, match=r"'b' should be 'float row', got F32 \[3\]"):
        read_result(tmp_path / "r", "Toy", tensors=spec | {"b": "float row"}, values={})
