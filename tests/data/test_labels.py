"""Labels: the other columns of a source, which results can be grouped by."""

import pytest

from rmtension import PreferencePairs
from rmtension.data._groups import group_rows
from rmtension.errors import DataError

ROW = {"prompt": "Q", "chosen": "yes", "rejected": "no"}
OTHER = {"category": "law", "year": 2024, "checked": True, "share": 0.5, "note": "x" * 200, "empty": "", "none": None}
KEPT = {"category": "law", "year": "2024", "checked": "True"}


def test_short_texts_and_whole_numbers_are_kept():
    (pair,) = PreferencePairs.from_records([ROW | OTHER])
    assert dict(pair.labels) == KEPT


def test_columns_of_fields_are_no_labels():
    columns = {"prompt": "question", "subset": "category"}
    (pair,) = PreferencePairs.from_records(
        [{"question": "Q", "chosen": "a", "rejected": "b", "category": "law", "x": 1}], columns=columns
    )
    assert pair.subset == "law"
    assert dict(pair.labels) == {"x": "1"}


@pytest.mark.parametrize("ending", ["csv", "jsonl", "parquet"])
def test_labels_survive_files(tmp_path, ending):
    pairs = PreferencePairs.from_records([ROW | {"category": "law"}, ROW | {"chosen": "sure", "category": "art"}])
    path = tmp_path / f"pairs.{ending}"
    if ending == "jsonl":
        pairs.to_jsonl(path)
    else:
        frame = pairs.to_frame()
        assert list(frame["category"]) == ["law", "art"]
        frame.to_csv(path, index=False) if ending == "csv" else frame.to_parquet(path)
    assert [pair.labels["category"] for pair in PreferencePairs.read(path)] == ["law", "art"]


def test_labels_change_neither_equality_nor_digests():
    """They are about the pair and no part of what a model reads."""
    plain, labelled = (PreferencePairs.from_records([ROW | more]) for more in ({}, OTHER))
    assert plain == labelled
    assert plain.digest == labelled.digest
    assert hash(plain[0]) == hash(labelled[0])


def test_labels_stay_with_swapped_and_sampled_pairs():
    pairs = PreferencePairs.from_records([ROW | {"prompt": str(n), "category": str(n % 3)} for n in range(9)])
    for changed in (pairs.swapped(), pairs.as_chat(), pairs.sample(5), pairs.split(0.5)[0]):
        assert all(pair.labels["category"] in {"0", "1", "2"} for pair in changed)


def test_groups_are_in_order_of_appearance_without_unlabelled_pairs():
    labels = ["b", None, "a", "b", ""]
    pairs = PreferencePairs.from_records([ROW | {"prompt": str(n)} for n in range(5)])
    assert group_rows(pairs, labels) == {"b": [0, 3], "a": [2]}


def test_an_item_in_two_groups_is_refused():
    pairs = PreferencePairs.from_records([ROW | {"item": "i", "chosen": text, "kind": text} for text in ("one", "two")])
    with pytest.raises(DataError, match="item 'i' have different labels \\(one, two\\)"):
        group_rows(pairs, "kind")
