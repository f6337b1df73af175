"""Files of pairs: format and compression are found in the content; errors name the file, the line and the column."""

import ast
import csv
import gzip
import io
import json
import re
import sys

import pandas as pd
import pyarrow
import pyarrow.parquet
import pytest
import zstandard
from tiny_models import make_pairs, unchecked

from rmtension import PreferencePair, PreferencePairs
from rmtension.cli._command_line import main
from rmtension.data._data_files import file_rows
from rmtension.data._sources import source_rows
from rmtension.errors import DataError, OptionError, RMTensionWarning

ROWS = [
    {"prompt": "2+2?", "chosen": "4", "rejected": "5", "subset": "sums", "id": "0"},
    {"prompt": 'say "a,\nb";\tplease', "chosen": "é, “b”\r\n", "rejected": "NA", "subset": "NA", "id": "1"},
    {"prompt": "so", "chosen": "nan", "rejected": "None", "subset": "", "id": "2"},
]
PAIRS = PreferencePairs.from_records(ROWS)
GOOD = ROWS[0]


def table(rows, delimiter=",", **options):
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, fieldnames=list(rows[0]), delimiter=delimiter, **options)
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue().encode()


def parquet(rows):
    content = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), content)
    return content.getvalue()


FORMATS = {
    "jsonl": lambda rows: "".join(json.dumps(row) + "\n" for row in rows).encode(),
    "json": lambda rows: json.dumps(rows, indent=1).encode(),
    "csv": table,
    "tsv": lambda rows: table(rows, "\t"),
    "csv with semicolons": lambda rows: b"\xef\xbb\xbf" + table(rows, ";", quoting=csv.QUOTE_ALL),
    "parquet": parquet,
}
PACKED = {"plain": bytes, "gz": gzip.compress, "zst": zstandard.compress}


def write(path, content):
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


@pytest.mark.parametrize("packed", PACKED)
@pytest.mark.parametrize("kind", FORMATS)
def test_the_format_is_read_from_the_content(tmp_path, kind, packed):
    content = PACKED[packed](FORMATS[kind](ROWS))
    for name in ("pairs", "pairs.txt", "pairs.jsonl", "pairs.csv", "pairs.parquet", "pairs.json.gz", "pairs.tsv.zst"):
        path = write(tmp_path / name, content)
        assert PreferencePairs.read(path) == PreferencePairs.from_jsonl(str(path)) == PAIRS
        assert list(PreferencePairs.iter_jsonl(path)) == list(PAIRS)
    assert [pair.subset for pair in PAIRS] == ["sums", "NA", None]
    assert (PAIRS[1].rejected, PAIRS[2].chosen, PAIRS[2].rejected) == ("NA", "nan", "None"), "texts, and not missing"


@pytest.mark.parametrize("kind", FORMATS)
def test_columns_and_labels_are_read_from_every_format(tmp_path, kind):
    rows = [
        {"q": row["prompt"], "good": row["chosen"], "rejected": row["rejected"], "kind": "k", "objective": "x"}
        for row in ROWS
    ]
    path = write(tmp_path / "pairs", FORMATS[kind](rows))
    columns = {"prompt": "q", "chosen": "good", "subset": "kind", "objective": None}
    pairs = PreferencePairs.read(path, columns=columns)
    assert [(pair.prompt, pair.chosen, pair.rejected) for pair in pairs] == [
        (pair.prompt, pair.chosen, pair.rejected) for pair in PAIRS
    ]
    assert (pairs.subsets, pairs.objectives) == (["k"], [])
    labelled = PreferencePairs.read(path, columns={"prompt": "q", "chosen": "good"}, objective="helpful", subset="s")
    assert (labelled.objectives, labelled.subsets) == (["helpful"], ["s"])
    frame = PreferencePairs.from_frame(pd.DataFrame(rows), columns=columns)
    assert frame == PreferencePairs.from_records(rows, columns=columns) == pairs
    assert PreferencePairs.from_dataset(rows, columns=columns) == pairs


class TestColumnsThatAreWrong:
    rows = [{"question": "q", "chosen": "a", "rejected": "b"}, {"question": "q", "chosen": "a", "rejected": "c"}]

    @pytest.mark.parametrize("kind", FORMATS)
    def test_a_column_that_is_missing_is_an_error_that_lists_them(self, tmp_path, kind):
        path = write(tmp_path / "pairs", FORMATS[kind](self.rows))
        message = r"'qestion'.*\['chosen', 'question', 'rejected'\]"
        with pytest.raises(DataError, match=rf"pairs.*{message}"):
            PreferencePairs.read(path, columns={"prompt": "qestion"})
        # Also where rows are skipped, and for a label, which a row may lack.
        for columns in ({"prompt": "qestion"}, {"prompt": "question", "subset": "qestion"}):
            with pytest.raises(OptionError, match=rf"columns: expected the columns \[{message}"):
                PreferencePairs.read(path, columns=columns, on_invalid="skip")
        # What the error says to do.
        assert len(PreferencePairs.read(path, columns={"prompt": "question"})) == 2

    @pytest.mark.parametrize(
        ("row", "columns"),
        [
            ({"prompt": "q", "Chosen ": "a", "rejected": "b"}, {}),
            ({"prompt": "q", "chosen_response": "a", "rejected": "b"}, {}),
            ({"prompt": "q", "Good Answer ": "a", "rejected": "b"}, {"chosen": "Good Answer"}),
            ({"prompt": "q", "Good Answer": "a", "rejected": "b"}, {"chosen": "good answr"}),
        ],
    )
    def test_the_error_names_the_nearest_column_and_the_advice_works(self, row, columns, tmp_path):
        path = write(tmp_path / "pairs.csv", table([row]))
        with pytest.raises(DataError, match="If it is in another column, name it: columns=") as error:
            PreferencePairs.read(path, columns=columns)
        advice = ast.literal_eval(str(error.value).partition("name it: columns=")[2].removesuffix("."))
        assert PreferencePairs.read(path, columns=columns | advice)[0].chosen == "a"
        if columns:
            with pytest.raises(
                OptionError, match=re.escape(f"expected the columns {list(columns.values())}, which no row has")
            ) as error:
                PreferencePairs.read(path, columns=columns, on_invalid="skip")
            assert f"columns={advice}" in str(error.value)

    def test_a_row_with_no_other_column_gets_no_advice_on_columns(self):
        with pytest.raises(DataError, match=r"fields present: \['prompt', 'rejected'\]\.$"):
            PreferencePairs.from_records([{"prompt": "q", "rejected": "b"}])

    def test_a_label_may_be_missing_in_some_rows(self, tmp_path):
        path = write(tmp_path / "pairs.jsonl", FORMATS["jsonl"]([GOOD, GOOD | {"kind": "k"}]))
        assert [pair.subset for pair in PreferencePairs.read(path, columns={"subset": "kind"})] == [None, "k"]

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            (
                {"columns": {"question": "prompt"}},
                r"expected fields of .*, got 'question'. Write columns=\{field: column\}: \{'prompt': 'question'\}\.$",
            ),
            (
                {"columns": {"promt": "question"}},
                r"expected fields of a pair as keys.*, got 'promt'. Did you mean 'prompt'\?$",
            ),
            (
                {"columns": {"x": "question"}},
                r"expected fields of a pair as keys, one of \['prompt', .*got 'x'.* for example",
            ),
            (
                {"columns": {"objective": "kind"}, "objective": "helpful"},
                "objective: expected either objective=... or a column",
            ),
        ],
    )
    def test_wrong_fields_of_columns_are_refused(self, options, message):
        with pytest.raises(OptionError, match=message):
            PreferencePairs.from_records(self.rows, **options)


class TestPromptsInOtherColumns:
    """Words that two responses happen to share are not the prompt where another column may hold it."""

    sides = {"chosen": "The sky is blue", "rejected": "The sky is red"}

    @pytest.mark.parametrize("name", ["question", "instruction", "input", "post"])
    def test_columns_that_may_hold_the_prompt_are_named(self, name, tmp_path):
        row = self.sides | {name: "What colour?", "score": 3, "id": 1}
        path = write(tmp_path / "pairs.csv", table([row]))
        for read in (
            lambda **options: PreferencePairs.from_records([row], **options),
            lambda **options: PreferencePairs.from_dataset([row], **options),
            lambda **options: PreferencePairs.from_frame(pd.DataFrame([row]), **options),
        ):
            with pytest.raises(DataError, match=rf"0: field 'prompt' is missing.*\['{name}'\].*'prompt': '{name}'"):
                read()
            # The advice works, both parts of it.
            assert read(columns={"prompt": name})[0].prompt == "What colour?"
            assert read(columns={"prompt": None})[0].prompt == "The sky is"
        with pytest.raises(DataError, match=r"line 2: field 'prompt' is missing"):
            PreferencePairs.read(path)

    def test_shared_words_are_the_prompt_where_nothing_else_is(self):
        assert PreferencePairs.from_records([self.sides | {"score": 3, "id": 1}])[0].prompt == "The sky is"
        hh = {side: f"\n\nHuman: hi\n\nAssistant: {side}" for side in ("chosen", "rejected")} | {"source": "hh"}
        assert PreferencePairs.from_records([hh])[0].prompt == "\n\nHuman: hi\n\nAssistant:"

    def test_transcripts_with_a_prompt_are_split(self):
        prompt = "\n\nHuman: hi\n\nAssistant:"
        whole = {"prompt": prompt, "chosen": f"{prompt} a", "rejected": f"{prompt} b"}
        (pair,) = PreferencePairs.from_records([whole])
        assert (pair.prompt, pair.text("chosen")) == (prompt, f"{prompt} a")
        with pytest.raises(DataError, match=r"field 'prompt' \('other'\) is not in the turns"):
            PreferencePairs.from_records([whole | {"prompt": "other"}])

    def test_whole_texts_with_a_prompt_warn(self):
        rows = [{"prompt": "two words", "chosen": "two words a", "rejected": "two words b"}, GOOD]
        with pytest.warns(RMTensionWarning, match=r"in 1 of 2 pairs both responses begin with the prompt's text"):
            PreferencePairs.from_records(rows)
        assert PreferencePairs.from_records(rows[:1], columns={"prompt": None})[0].text("chosen") == "two words a"


class TestOtherInputs:
    """A source that another method reads: the error names that method, and it works."""

    row = {"prompt": "q", "chosen": "a", "rejected": "b"}
    frame = pd.DataFrame([row])

    @pytest.mark.parametrize(
        ("read", "source", "message"),
        [
            (PreferencePairs.read, frame, "from_frame(frame)"),
            (PreferencePairs.read, row, "from_records([row])"),
            (PreferencePairs.from_records, frame, "from_frame(frame)"),
            (PreferencePairs.from_records, row, "from_records([row])"),
            (PreferencePairs.from_records, "a.csv", "read(path)"),
            (PreferencePairs.from_frame, [row], "dicts with PreferencePairs.from_records"),
            (PreferencePairs.from_frame, "a.csv", "read(path)"),
            (PreferencePairs([]).__init__, frame, "from_frame(frame)"),
            (PreferencePairs([]).__init__, "a.csv", "read(path)"),
        ],
    )
    def test_wrong_sources_are_refused_with_the_right_method(self, read, source, message):
        with pytest.raises((OptionError, DataError), match=re.escape(message)):
            unchecked(read)(source)

    def test_a_data_set_is_read_only_by_its_own_method(self):
        datasets = pytest.importorskip("datasets")
        dataset = datasets.Dataset.from_list([self.row])
        for read in (PreferencePairs.read, PreferencePairs.from_frame):
            with pytest.raises(OptionError, match=r"from_dataset\(dataset\)"):
                unchecked(read)(dataset)
        assert PreferencePairs.from_dataset(dataset) == PreferencePairs.from_frame(self.frame)
        assert PreferencePairs.from_frame(self.frame) == PreferencePairs.from_records([self.row])


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a", "a.csv"])
def test_a_table_with_other_columns_is_a_table_whatever_its_name(tmp_path, name):
    path = write(tmp_path / name, table([{"question": "Q", "better": "a", "worse": "b"}]))
    with pytest.raises(
        DataError, match=r"field 'chosen' is missing; fields present: \['better', 'question', 'worse'\]"
    ):
        PreferencePairs.read(path)
    columns = {"prompt": "question", "chosen": "better", "rejected": "worse"}
    assert len(PreferencePairs.read(path, columns=columns)) == 1


def test_json_lines_with_a_first_line_that_is_damaged_stay_json_lines(tmp_path):
    path = write(tmp_path / "a", b'"prompt": "a", "chosen\n' + FORMATS["jsonl"](ROWS))
    with pytest.raises(DataError, match="line 1: not valid JSON"):
        PreferencePairs.read(path)
    assert len(PreferencePairs.read(path, on_invalid="skip")) == 3
    with pytest.raises(DataError, match="line 1: not valid JSON"):
        PreferencePairs.read(write(path, '"prompt": "a", "chosen'))


class TestTables:
    def test_empty_cells_are_missing_labels_and_empty_responses(self, tmp_path):
        path = write(tmp_path / "a.csv", "prompt,chosen,rejected,subset,id\nQ,a,b,,\nQ,a,,s,1\n,a,b,s,2\n")
        with pytest.raises(DataError, match=r"a.csv, line 3: field 'rejected' is empty"):
            PreferencePairs.read(path)
        pairs = PreferencePairs.read(path, on_invalid="skip")
        assert [(pair.prompt, pair.subset) for pair in pairs] == [("Q", None), ("", "s")]
        assert pairs[0].id == pairs[0].digest()[:16]
        assert sum(pairs.skipped.values()) == 1

    def test_lines_count_through_quoted_line_breaks_and_blank_lines(self, tmp_path):
        path = write(tmp_path / "a.csv", 'prompt,chosen,rejected\n"Q\n\nR",a,b\n\nQ,a,b,c\nQ,a\nQ,a,b\n')
        with pytest.raises(DataError, match=r"a.csv, line 6: expected 3 fields as in the first line, got 4.*in quotes"):
            PreferencePairs.read(path)
        pairs = PreferencePairs.read(path, on_invalid="skip")
        assert [pair.prompt for pair in pairs] == ["Q\n\nR", "Q"]
        assert sum(pairs.skipped.values()) == 2

    def test_long_fields_leave_the_limit_of_the_process(self, tmp_path):
        before, long = csv.field_size_limit(), "x" * 300_000
        path = write(tmp_path / "a.csv", table([GOOD | {"chosen": long}]))
        assert PreferencePairs.read(path)[0].chosen == long
        assert csv.field_size_limit() == before

    @pytest.mark.parametrize(
        ("content", "message"),
        [
            ('prompt,chosen,rejected\nQ,a,b\nQ,"a,b\n', "a.csv, line 3: not valid CSV .*unexpected end of data"),
            ('prompt,chosen,rejected\nQ,"a" b,c\n', "a.csv, line 2: not valid CSV"),
            (
                "prompt,chosen,chosen,rejected\n",
                r"a.csv: expected unique column names, got \['chosen'\] more than once",
            ),
            (b"prompt,chosen,rejected\nQ,a,\xff\n", "a.csv, line 2: not valid UTF-8"),
            ("text\nhello\n", r"line 2: field 'chosen' is missing; fields present: \['text'\]"),
            ("prompt,chosen,rejected\rQ,a,b\r", "not valid CSV"),
        ],
    )
    def test_a_damaged_table_is_refused(self, tmp_path, content, message):
        with pytest.raises(DataError, match=message):
            PreferencePairs.read(write(tmp_path / "a.csv", content))

    def test_tables_that_pandas_writes_are_read_back_equal(self, tmp_path):
        pairs = make_pairs(6)
        pairs.to_frame().to_csv(tmp_path / "a.csv", index=False)
        pairs.to_frame().to_csv(tmp_path / "b", sep="\t")
        pairs.to_frame().to_parquet(tmp_path / "c.parquet")
        pairs.to_frame().to_json(tmp_path / "d", orient="records")
        for path in sorted(tmp_path.iterdir()):
            assert PreferencePairs.read(path) == pairs, path.name


class TestDamage:
    @pytest.mark.parametrize("kind", FORMATS)
    @pytest.mark.parametrize("packed", ["gz", "zst"])
    def test_a_file_that_is_cut_short_is_an_error_and_not_a_shorter_file(self, tmp_path, kind, packed):
        whole = PACKED[packed](FORMATS[kind]([GOOD | {"id": str(number)} for number in range(200)]))
        path = write(tmp_path / f"pairs.{packed}", whole[:-9])
        for on_invalid in ("raise", "skip"):
            with pytest.raises(DataError, match=rf"pairs.{packed}: the compressed data is damaged or cut short"):
                PreferencePairs.read(path, on_invalid=on_invalid)

    def test_parquet_that_is_cut_short_is_refused(self, tmp_path):
        with pytest.raises(DataError, match=r"a.parquet: the Parquet data is damaged"):
            PreferencePairs.read(write(tmp_path / "a.parquet", parquet(ROWS)[:-9]))

    def test_zstd_frames_are_joined_and_damaged_zstd_is_refused(self, tmp_path):
        lines = FORMATS["jsonl"](ROWS).splitlines(keepends=True)
        path = write(tmp_path / "a", b"".join(zstandard.compress(line) for line in lines))
        assert PreferencePairs.read(path) == PAIRS
        with pytest.raises(DataError, match="damaged or cut short"):
            PreferencePairs.read(write(tmp_path / "b", b"\x28\xb5\x2f\xfd" + b"x" * 50))

    @pytest.mark.parametrize(
        ("content", "message"),
        [
            (b"BZh91AY", "expected JSON lines, a JSON array, CSV, TSV or Parquet .*, got bzip2"),
            (b"PK\x03\x04...", "got a zip archive or an Excel sheet"),
            (b"ARROW1..", "got Arrow"),
            ("prompt,chosen,rejected\nQ,a,b".encode("utf-16"), "not valid UTF-8.*Re-encode"),
            (
                '{"data":\n [{"prompt": "Q"}]}',
                r"expected one JSON object per row, got a single one with the keys \['data'\]",
            ),
            ('{"chosen": ["a"],\n "rejected": ["b"]}', "expected one JSON object per row"),
            ('[{"prompt": "a", ', "not valid JSON .*Expected one JSON array"),
            ('{"prompt": "a", ', "line 1: not valid JSON"),
            ("hello\n", "line 1: not valid JSON"),
        ],
    )
    def test_files_of_other_formats_are_refused(self, tmp_path, content, message):
        with pytest.raises(DataError, match=rf"a: .*{message}|a, {message}|a, line 1: {message}"):
            PreferencePairs.read(write(tmp_path / "a", content))

    def test_one_object_over_several_lines_is_a_row(self, tmp_path):
        assert PreferencePairs.read(write(tmp_path / "a", json.dumps(GOOD, indent=2)))[0] == PAIRS[0]

    @pytest.mark.parametrize(
        ("package", "kind", "packed"), [("pyarrow", "parquet", "plain"), ("zstandard", "csv", "zst")]
    )
    def test_a_missing_package_is_named(self, tmp_path, monkeypatch, package, kind, packed):
        path = write(tmp_path / "a", PACKED[packed](FORMATS[kind](ROWS)))
        monkeypatch.setitem(sys.modules, package, None)
        with pytest.raises(
            DataError, match=rf"a: .*needs the package '{package}'. Install it with `pip install {package}`"
        ):
            PreferencePairs.read(path)

    def test_a_missing_file_is_refused_and_an_empty_one_has_no_pairs(self, tmp_path):
        for path in (tmp_path / "none.csv", tmp_path):
            with pytest.raises(DataError, match="cannot be read"):
                PreferencePairs.read(path)
        assert len(PreferencePairs.read(write(tmp_path / "empty", b"\xef\xbb\xbf\n\n"))) == 0
        assert list(file_rows(write(tmp_path / "header.csv", "prompt,chosen,rejected\n"))) == []


class TestMessagesAsText:
    """A text that is the JSON of messages is these messages, in every source."""

    user, good, bad = (
        {"role": role, "content": text} for role, text in (("user", "Q"), ("assistant", "A"), ("assistant", "B"))
    )
    rows = (
        {"prompt": [user], "chosen": "A", "rejected": "B"},
        {"prompt": user, "chosen": good, "rejected": [bad]},
        {"chosen": [user, good], "rejected": [user, bad]},
        {"conversations": [{"from": "human", "value": "Q"}], "chosen": {"from": "gpt", "value": "A"}, "rejected": "B"},
        {"prompt": [user], "chosen": [{"role": "assistant", "tool_calls": [{"name": "f"}]}], "rejected": "B"},
    )

    def entrances(self, row, folder):
        """The pair of a row by every entrance, first as it is."""
        for kind in FORMATS:
            yield PreferencePairs.read(write(folder / "pairs", FORMATS[kind]([row])))
        yield PreferencePairs.from_records([row])
        yield PreferencePairs.from_dataset([row])
        yield PreferencePairs.from_frame(pd.DataFrame([row]))
        yield PreferencePairs.from_frame(pd.read_csv(write(folder / "pairs.csv", table([row]))))

    @pytest.mark.parametrize("indent", [None, 2])
    @pytest.mark.parametrize("row", rows, ids=lambda row: next(iter(row)))
    def test_every_reader_reads_messages_as_text(self, row, indent, tmp_path):
        as_text = {
            name: value if isinstance(value, str) else json.dumps(value, indent=indent) for name, value in row.items()
        }
        (expected,) = PreferencePairs.from_records([row])
        assert expected.is_chat
        assert all(tuple(pairs) == (expected,) for pairs in self.entrances(as_text, tmp_path))

    def test_other_json_is_a_text(self, tmp_path):
        row = {"prompt": '[{"a": 1}] is?', "chosen": '[{"a": 1}]', "rejected": '{"role": 1}'}
        for (pair,) in self.entrances(row, tmp_path):
            assert (pair.prompt, pair.chosen, pair.rejected) == tuple(row.values())

    def test_messages_as_python_prints_them_are_refused(self, tmp_path):
        row = self.rows[0] | {"prompt": str(self.rows[0]["prompt"])}
        with pytest.raises(
            DataError,
            match=r"line 2: field 'prompt': expected messages as JSON, got messages printed by Python.*json\.dumps",
        ):
            PreferencePairs.read(write(tmp_path / "a.csv", table([row])))
        with pytest.raises(
            DataError, match=r"row 0: field 'prompt': expected messages as JSON, got messages printed by Python"
        ):
            PreferencePairs.from_frame(pd.DataFrame([row]))

    @pytest.mark.parametrize("answer", [json.dumps([user]), str([user])])
    def test_an_answer_that_looks_like_messages_stays_an_answer(self, answer, tmp_path):
        """As the content of a message it is a text, and is written and read back as one."""
        row = {"prompt": [self.user], "chosen": [{"role": "assistant", "content": answer}], "rejected": "B"}
        pairs = PreferencePairs.from_records([row])
        assert pairs[0].chosen == answer
        pairs.to_jsonl(tmp_path / "pairs.jsonl")
        assert PreferencePairs.read(tmp_path / "pairs.jsonl") == PreferencePairs.from_frame(pairs.to_frame()) == pairs
        # A plain pair has no place for the difference: it is refused, and the advice works.
        plain = PreferencePairs([PreferencePair("Q", answer, "B")])
        with pytest.raises(DataError, match=r"field 'chosen' is a plain text.*pairs\.as_chat\(\)"):
            plain.to_jsonl(tmp_path / "plain.jsonl")
        assert not (tmp_path / "plain.jsonl").exists()
        plain.as_chat().to_jsonl(tmp_path / "plain.jsonl")
        assert PreferencePairs.read(tmp_path / "plain.jsonl")[0].chosen == answer


class TestFrames:
    def test_missing_values_of_pandas_are_missing_labels(self):
        frame = pd.DataFrame({"prompt": "Q", "chosen": "a", "rejected": ["b", "c", "d"], "id": [0, None, 2]})
        frame["subset"], frame["item"], frame["objective"] = [pd.NA, "s", None], pd.NaT, ["x", float("nan"), "y"]
        pairs = PreferencePairs.from_frame(frame)
        assert [pair.subset for pair in pairs] == [None, "s", None]
        assert [pair.objective for pair in pairs] == ["x", None, "y"]
        assert {pair.item for pair in pairs} == {None}
        assert [pair.id for pair in pairs] == ["0", pairs[1].digest()[:16], "2"]

    def test_invalid_frames_are_refused(self):
        frame = pd.DataFrame([GOOD, GOOD | {"chosen": float("nan")}])
        with pytest.raises(DataError, match="row 1: field 'chosen' should be text or messages, got float"):
            PreferencePairs.from_frame(frame)
        assert sum(PreferencePairs.from_frame(frame, on_invalid="skip").skipped.values()) == 1
        frame.columns = ["chosen", *frame.columns[1:]]
        with pytest.raises(DataError, match="unique column names"):
            PreferencePairs.from_frame(frame)

    @pytest.mark.parametrize("numbers", [[4, 5], [4, None], [4, "five"]])
    def test_numbers_become_texts_as_the_error_says(self, numbers):
        frame = pd.DataFrame({"q": "2 + 2?", "better": numbers, "rejected": "6"})
        columns = {"prompt": "q", "chosen": "better"}
        with pytest.raises(DataError, match=r"'chosen' should be text or .*, got (int|float)\.") as error:
            PreferencePairs.from_frame(frame, columns=columns)
        advice = str(error.value).partition("Convert the column to text: ")[2].removesuffix(".")
        frame = eval(advice, {"frame": frame})
        read = PreferencePairs.from_frame(frame, columns=columns, on_invalid="skip")
        assert len(read) == 2 - numbers.count(None), "what is missing stays missing"
        assert float(read[0].chosen) == 4

    def test_frames_are_read_back_equal(self):
        for pairs in (make_pairs(4), make_pairs(4).as_chat()):
            assert PreferencePairs.from_frame(pairs.to_frame()) == pairs


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.jsonl.zst"])
def test_written_files_are_read_back_equal(tmp_path, name):
    pairs = make_pairs(5) + PreferencePairs.from_records([GOOD | {"chosen": " 4", "rejected": "  5", "subset": ""}])
    pairs.to_jsonl(tmp_path / name)
    assert PreferencePairs.read(tmp_path / name) == pairs
    magic = {"jsonl": b"{", "gz": b"\x1f\x8b", "zst": b"\x28\xb5\x2f\xfd"}[name.split(".")[-1]]
    assert (tmp_path / name).read_bytes().startswith(magic)


@pytest.mark.parametrize("is_chat", [False, True])
def test_data_sets_written_as_files_are_read_back_equal(tmp_path, is_chat):
    pairs = make_pairs(5).as_chat() if is_chat else make_pairs(5)
    dataset = pairs.to_dataset()
    dataset.to_json(tmp_path / "a.jsonl")
    dataset.to_parquet(tmp_path / "b.parquet")
    dataset.to_json(tmp_path / "c.json", lines=False)
    for path in sorted(tmp_path.iterdir()):
        assert PreferencePairs.read(path) == pairs


class TestCommand:
    def test_the_command_reads_tables_with_named_columns(self, tmp_path, checkpoints, capsys):
        rows = [{"q": pair.prompt, "good": pair.chosen, "bad": pair.rejected} for pair in make_pairs(3)]
        path = write(tmp_path / "pairs.tsv.gz", gzip.compress(table(rows, "\t")))
        model = str(checkpoints["gpt2"])
        assert main(["score", model, str(path), "--columns", "prompt=q", "chosen=good", "rejected=bad", "--json"]) == 0
        table_margin = json.loads(capsys.readouterr().out)["margin"]
        make_pairs(3).to_jsonl(tmp_path / "pairs.jsonl")
        assert main(["score", model, str(tmp_path / "pairs.jsonl"), "--json"]) == 0
        assert json.loads(capsys.readouterr().out)["margin"] == table_margin
        for word, message in (("prompt", "expected FIELD=COLUMN"), ("question=q", "expected fields of a pair")):
            assert main(["score", model, str(path), "--columns", word]) == 2
            assert message in capsys.readouterr().err

    def test_one_pair_has_no_interval_and_says_so(self, tmp_path, checkpoints, capsys):
        path = write(tmp_path / "one.csv", table([GOOD | {"prompt": "do"}]))
        assert main(["score", str(checkpoints["gpt2"]), str(path)]) == 0
        out = capsys.readouterr().out
        assert "nan" not in out
        assert "(no interval: one prompt)" in out


def test_a_quote_in_an_unquoted_tsv_does_not_swallow_the_next_row(tmp_path):
    path = tmp_path / "pairs.tsv"
    path.write_text('prompt\tchosen\trejected\nq1\tA\t"open\nq2\tB\t5"\n')
    with pytest.raises(DataError, match=r"pairs\.tsv, line 2.*another whole line of 3 fields"):
        PreferencePairs.read(path)
    path.write_text('prompt\tchosen\trejected\nq1\tA\t"two\nlines ""quoted"""\nq2\tB\t5\n')
    assert [pair.rejected for pair in PreferencePairs.read(path)] == ['two\nlines "quoted"', "5"]


def test_a_file_beside_its_compressed_copy_is_refused(tmp_path):
    """Its rows would count twice."""
    row = json.dumps({"chosen": "\n\nHuman: a\n\nAssistant: b", "rejected": "\n\nHuman: a\n\nAssistant: c"}) + "\n"
    (tmp_path / "test.jsonl").write_text(row)
    (tmp_path / "test.jsonl.gz").write_bytes(gzip.compress(row.encode()))
    with pytest.raises(DataError, match=r"test.jsonl and test.jsonl.gz are one file, compressed and not"):
        list(source_rows(tmp_path, split="test"))
    assert len(list(source_rows(tmp_path / "test.jsonl.gz"))) == 1
