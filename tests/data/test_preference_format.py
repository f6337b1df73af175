"""Preference pairs as data sets of the Hugging Face library, in TRL's formats: there and back, and what is refused."""

import sys

import datasets
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import make_pairs, unchecked

from rmtension import PreferencePair, PreferencePairs
from rmtension.data._row_reader import RowReader
from rmtension.errors import DataError, OptionError


def texts_of(pairs):
    return [(pair.text("chosen"), pair.text("rejected")) for pair in pairs]


CHAT = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Colour of the sky?"}]


def answer(text):
    return [{"role": "assistant", "content": text}]


class TestThereAndBack:
    @pytest.mark.parametrize("implicit_prompt", [False, True])
    @pytest.mark.parametrize("is_chat", [False, True])
    def test_pairs_survive_a_data_set(self, implicit_prompt, is_chat):
        pairs = make_pairs(12)
        pairs = pairs.as_chat() if is_chat else pairs
        dataset = pairs.to_dataset(implicit_prompt=implicit_prompt)
        assert isinstance(dataset, datasets.Dataset)
        assert ("prompt" in dataset.column_names) == (not implicit_prompt)
        assert "item" not in dataset.column_names, "no pair has one"
        loaded = PreferencePairs.from_dataset(dataset)
        assert loaded == pairs
        assert PreferencePairs.from_dataset(dataset.to_iterable_dataset()) == pairs

    def test_missing_labels_come_from_arguments_and_digests(self):
        dataset = make_pairs(3).to_dataset().remove_columns(["id", "objective"])
        loaded = PreferencePairs.from_dataset(dataset, objective="harmless")
        assert loaded.objectives == ["harmless"]
        assert loaded[0].id == loaded[0].digest()[:16]

    def test_a_label_of_some_pairs_survives_a_data_set(self):
        rows = [
            {"prompt": "Q", "chosen": "a", "rejected": "b", "item": "one"},
            {"prompt": "R", "chosen": "a", "rejected": "b", "subset": "s"},
        ]
        pairs = PreferencePairs.from_records(rows)
        assert PreferencePairs.from_dataset(pairs.to_dataset()) == pairs

    def test_no_pairs_give_an_empty_data_set(self):
        assert len(PreferencePairs.from_dataset(PreferencePairs([]).to_dataset())) == 0

    @settings(max_examples=150, deadline=None)
    @given(st.data())
    def test_the_text_is_the_same_whatever_the_spaces(self, data):
        """Of rows as TRL has them, `prompt + response`, and of what comes back of them."""
        draw = st.text(" \nab", min_size=1, max_size=5)
        prompt = data.draw(st.text(" \nab", max_size=5))
        chosen, rejected = (data.draw(draw.filter(str.strip)) for _ in range(2))
        pair = PreferencePair(prompt, chosen, rejected)
        for implicit in (False, True):
            row = dict(to_row(pair, implicit))
            whole = tuple(row.get("prompt", "") + row[name] for name in ("chosen", "rejected"))
            assert whole == (pair.text("chosen"), pair.text("rejected"))
            if implicit and not _begin_alike(*whole):
                continue
            back = RowReader().read(row, "row")
            assert (back.text("chosen"), back.text("rejected")) == whole
            if not implicit:
                assert back == pair


def to_row(pair, implicit):
    from rmtension.data._preference_format import to_rows

    return to_rows([pair], implicit_prompt=implicit)[0]


def _begin_alike(chosen, rejected):
    """Whether a word and white space are in front of both, found in another way than by the code."""
    for end in range(min(len(chosen), len(rejected)), 0, -1):
        head = chosen[:end]
        if rejected.startswith(head) and head[-1].isspace() and head.strip():
            return bool(chosen[end:].strip()) and bool(rejected[end:].strip())
    return False


class TestReading:
    def test_explicit_prompts_are_read_with_and_without_spaces(self):
        """The examples of TRL's documentation have the space in the responses."""
        dataset = datasets.Dataset.from_list([{"prompt": "The sky is", "chosen": " blue.", "rejected": " green."}])
        (pair,) = PreferencePairs.from_dataset(dataset)
        assert (pair.prompt, pair.chosen, pair.rejected) == ("The sky is", "blue.", "green.")
        assert pair.text("chosen") == "The sky is blue."

    @pytest.mark.parametrize(
        ("chosen", "rejected", "expected"),
        [
            ("The sky is blue.", "The sky is black.", ("The sky is", "blue.", "black.")),
            ("Q: a?\nA: yes", "Q: a?\nA: yes, sir", ("Q: a?\nA:", "yes", "yes, sir")),
            ("Q: a?\nyes", "Q: a?\nno", ("Q: a?\n", "yes", "no")),
            ("The sky  is", "The sky is", ("The sky ", " is", "is")),
            ("one two", "one two", ("one", "two", "two")),
            ("one two ", "one two  ", ("one", "two ", "two  ")),
        ],
    )
    def test_an_implicit_prompt_is_the_common_beginning_in_whole_words(self, chosen, rejected, expected):
        (pair,) = PreferencePairs.from_dataset(datasets.Dataset.from_list([{"chosen": chosen, "rejected": rejected}]))
        assert (pair.prompt, pair.chosen, pair.rejected) == expected
        assert texts_of([pair]) == [(chosen, rejected)]

    def test_explicit_and_implicit_conversations_are_the_same_pair(self):
        explicit = datasets.Dataset.from_list(
            [{"prompt": CHAT, "chosen": answer("Blue."), "rejected": answer("Green.")}]
        )
        implicit = datasets.Dataset.from_list([{"chosen": CHAT + answer("Blue."), "rejected": CHAT + answer("Green.")}])
        for dataset in (explicit, implicit):
            (pair,) = PreferencePairs.from_dataset(dataset)
            assert [message.to_dict() for message in pair.prompt] == CHAT
            assert (pair.chosen, pair.rejected) == ("Blue.", "Green.")

    def test_from_hub_reads_the_same(self, tmp_path):
        dataset = make_pairs(4).to_dataset(implicit_prompt=True).remove_columns(["subset"])
        dataset.to_json(str(tmp_path / "test.jsonl"))
        assert PreferencePairs.from_hub(str(tmp_path)) == PreferencePairs.from_dataset(dataset)


class TestErrors:
    @pytest.mark.parametrize(
        ("row", "message"),
        [
            ({"chosen": "yes", "rejected": "no"}, "row 1: field 'prompt' is missing.*have no common beginning"),
            ({"question": "Q", "chosen": "Yes it", "rejected": "No it"}, r"columns=\{'prompt': 'question'\}"),
            ({"prompt": None, "chosen": "a", "rejected": "b"}, "row 1: field 'prompt' should be text or messages"),
            ({"prompt": "Q", "chosen": "a"}, "row 1: field 'rejected' is missing"),
            ({"prompt": "Q", "chosen": " ", "rejected": "b"}, "row 1: field 'chosen' is empty"),
            ({"prompt": CHAT, "chosen": CHAT, "rejected": answer("b")}, "messages that begin with the assistant"),
            ({"chosen": CHAT + answer("a"), "rejected": CHAT[1:] + answer("b")}, "have no common first messages"),
            ("no row", "row 1: expected a JSON object"),
        ],
    )
    def test_an_invalid_row_is_named_and_can_be_skipped(self, row, message):
        good = {"prompt": "Q", "chosen": "a", "rejected": "b"}
        with pytest.raises(DataError, match=message):
            PreferencePairs.from_dataset(iter([good, row]))
        loaded = PreferencePairs.from_dataset(iter([good, row]), on_invalid="skip")
        assert (len(loaded), sum(loaded.skipped.values())) == (1, 1)

    def test_other_inputs_are_refused(self):
        splits = datasets.DatasetDict({"train": make_pairs(2).to_dataset()})
        with pytest.raises(OptionError, match=r"expected one split, got a mapping of \['train'\]"):
            unchecked(PreferencePairs.from_dataset.__func__)(PreferencePairs, splits)
        with pytest.raises(
            OptionError, match=r"columns: expected fields of a pair as keys, one of \['prompt'.*got 'items'"
        ):
            PreferencePairs.from_dataset(splits["train"], columns={"items": "id"})

    def test_texts_among_chats_are_refused(self):
        with pytest.raises(DataError, match="got both texts and chats"):
            (make_pairs(1) + make_pairs(1).as_chat()).to_dataset()

    def test_a_missing_package_is_named(self, monkeypatch):
        monkeypatch.setitem(sys.modules, "datasets", None)
        with pytest.raises(DataError, match=r"needs the package 'datasets'.*pip install datasets"):
            make_pairs(1).to_dataset()
