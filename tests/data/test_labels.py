"""Labels: the other columns of a source, which results can be grouped by."""

import pandas as pd
import pytest

from rmtension import PreferencePair, PreferencePairs
from rmtension.data._groups import group_rows, named_groups
from rmtension.errors import DataError, OptionError, RMTensionWarning

ROW = {"prompt": "Q", "chosen": "yes", "rejected": "no"}
OTHER = {"category": "law", "year": 2024, "checked": True, "share": 0.5, "note": "x" * 200, "empty": "", "none": None}
KEPT = {"category": "law", "year": "2024", "checked": "True", "share": "0.5"}


def test_short_texts_and_numbers_are_kept():
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
    with pytest.warns(RMTensionWarning, match="2 of 5 pairs have no label"):
        assert group_rows(pairs, labels) == {"b": [0, 3], "a": [2]}


def test_nan_is_no_label():
    pairs = PreferencePairs.from_records([ROW | {"prompt": str(n)} for n in range(3)])
    with pytest.warns(RMTensionWarning, match="1 of 3 pairs have no label"):
        assert group_rows(pairs, pd.Series(["a", float("nan"), "a"])) == {"a": [0, 2]}


@pytest.mark.parametrize("labels", [{"tools": "x"}, {"system": "x"}, {"chosen": "x"}])
def test_labels_that_cannot_be_read_back_are_refused(labels):
    with pytest.raises(DataError, match="labels: expected texts by name"):
        PreferencePair("Q", "a", "b", labels=labels)


def test_a_pair_has_its_own_labels():
    given = {"kind": "law"}
    pair = PreferencePair("Q", "a", "b", labels=given)
    given["kind"] = "art"
    assert pair.labels["kind"] == "law"


def test_the_name_of_all_pairs_is_no_label():
    pairs = PreferencePairs.from_records([ROW | {"prompt": str(n)} for n in range(2)])
    with pytest.raises(OptionError, match="by: expected other labels than 'all pairs'"):
        group_rows(pairs, ["all pairs", "b"])


def test_items_of_several_subsets_are_not_divided_by_default():
    rows = [ROW | {"item": "i", "chosen": text, "subset": text} for text in ("one", "two")]
    assert named_groups(PreferencePairs.from_records(rows), None) == {}


def test_an_item_in_two_groups_is_refused():
    pairs = PreferencePairs.from_records([ROW | {"item": "i", "chosen": text, "kind": text} for text in ("one", "two")])
    with pytest.raises(DataError, match="item 'i' have different labels \\(one, two\\)"):
        group_rows(pairs, "kind")
