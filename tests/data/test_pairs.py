"""Loading says what is wrong and where; splits share no prompt; nothing changes on the way through a file."""

import gzip
import json

import pytest

from rmtension import PreferencePair, PreferencePairs
from rmtension.data._pair import join_prompt
from rmtension.errors import DataError, OptionError

GOOD = {"prompt": "Q", "chosen": "yes", "rejected": "no"}


def write(path, *lines, opener=open):
    with opener(path, "wb") as file:
        file.write(b"\n".join(line if isinstance(line, bytes) else json.dumps(line).encode() for line in lines))
    return path


@pytest.mark.parametrize("name", ["pairs.jsonl", "pairs.jsonl.gz"])
def test_written_pairs_are_read_back_equal(tmp_path, name):
    pairs = PreferencePairs.from_records(
        [GOOD | {"objective": "helpful", "subset": "s", "id": "7"}, GOOD | {"chosen": "käse \u2028 😀"}]
    )
    pairs.to_jsonl(tmp_path / name)
    loaded = PreferencePairs.from_jsonl(tmp_path / name)
    assert loaded == pairs
    assert loaded.digest == pairs.digest
    first = (tmp_path / name).read_bytes()
    pairs.to_jsonl(tmp_path / name)
    assert (tmp_path / name).read_bytes() == first


def test_gzip_is_recognised_without_its_suffix_and_blank_lines_are_skipped(tmp_path):
    path = write(tmp_path / "pairs", GOOD, b"", b"  ", b"\xef\xbb\xbf" + json.dumps(GOOD).encode(), opener=gzip.open)
    assert len(PreferencePairs.from_jsonl(path, objective="harmless")) == 2
    assert PreferencePairs.from_jsonl(path, objective="harmless").objectives == ["harmless"]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (
            {"prompt": "Q", "chosen": "yes"},
            r"line 2: field 'rejected' is missing; fields present: \['chosen', 'prompt'\]",
        ),
        ({"chosen": "yes", "rejected": "no"}, "line 2: field 'prompt' is missing"),
        (GOOD | {"chosen": " \n"}, "line 2: field 'chosen' is empty"),
        (GOOD | {"rejected": ""}, "line 2: field 'rejected' is empty"),
        (GOOD | {"chosen": 1}, "line 2: field 'chosen' should be text or messages, got int"),
        (GOOD | {"prompt": None}, "line 2: field 'prompt' should be text or messages, got NoneType"),
        ([1, 2], "line 2: expected a JSON object .* got list"),
        (b'{"prompt": ', "line 2: not valid JSON"),
        (b'{"prompt": "\xff"}', "line 2: not valid UTF-8 at byte 12"),
    ],
)
def test_bad_lines_are_named(tmp_path, line, message):
    path = write(tmp_path / "pairs.jsonl", GOOD, line, GOOD)
    with pytest.raises(DataError, match=message) as caught:
        PreferencePairs.from_jsonl(path)
    assert str(path) in str(caught.value)
    pairs = PreferencePairs.from_jsonl(path, on_invalid="skip")
    assert len(pairs) == 2
    assert sum(pairs.skipped.values()) == 1
    assert "1 skipped" in repr(pairs)


def test_damaged_and_absent_files_are_refused(tmp_path):
    whole = gzip.compress(json.dumps(GOOD).encode() * 100)
    (tmp_path / "cut.jsonl.gz").write_bytes(whole[:-20])
    with pytest.raises(DataError, match="damaged or cut short"):
        PreferencePairs.from_jsonl(tmp_path / "cut.jsonl.gz")
    with pytest.raises(DataError, match="cannot be read"):
        PreferencePairs.from_jsonl(tmp_path / "nothing.jsonl")


def test_invalid_records_are_refused():
    with pytest.raises(DataError, match="record 1: field 'chosen' is empty"):
        PreferencePairs.from_records([GOOD, GOOD | {"chosen": ""}])
    with pytest.raises(DataError, match=r"pair 0 \(id .*\): field 'rejected' is empty"):
        PreferencePairs([PreferencePair("Q", "yes", "")])
    with pytest.raises(OptionError, match="on_invalid"):
        PreferencePairs.from_records([GOOD], on_invalid="drop")


def test_identical_responses_are_kept_and_counted():
    pairs = PreferencePairs.from_records([GOOD, GOOD | {"rejected": "yes"}])
    assert (len(pairs), pairs.n_ties) == (2, 1)
    assert "1 ties" in repr(pairs)


def test_transcripts_are_split_at_the_last_shared_turn():
    shared = "\n\nHuman: hi\n\nAssistant: hello\n\nHuman: how?\n\nAssistant:"
    pairs = PreferencePairs.from_records([{"chosen": shared + " well", "rejected": shared + " badly"}])
    pair = pairs[0]
    assert (pair.prompt, pair.chosen, pair.rejected) == (shared, "well", "badly")
    assert join_prompt(pair.prompt, pair.chosen) == shared + " well"


def test_from_hub_reads_a_local_folder_offline(tmp_path):
    """The hub's own loader, on files: HF_HUB_OFFLINE=1 is set for the whole suite."""
    folder = tmp_path / "data"
    folder.mkdir()
    shared = "\n\nHuman: hi\n\nAssistant:"
    write(folder / "test.jsonl", {"chosen": shared + " a", "rejected": shared + " b"})
    pairs = PreferencePairs.from_hub(str(tmp_path), data_dir="data", split="test", objective="harmless")
    assert [(pair.prompt, pair.chosen, pair.objective) for pair in pairs] == [(shared, "a", "harmless")]
    with pytest.raises(DataError, match="could not load"):
        PreferencePairs.from_hub(str(tmp_path), split="train")


class TestSplit:
    pairs = PreferencePairs.from_records([GOOD | {"prompt": f"Q{i // 3}", "chosen": f"yes {i}"} for i in range(60)])

    def test_no_prompt_is_on_both_sides(self):
        train, test = self.pairs.split(0.25, seed=1)
        assert not set(train.prompts) & set(test.prompts)
        assert len(test.prompts) == 5
        assert sorted([*train, *test], key=lambda pair: pair.chosen) == sorted(self.pairs, key=lambda pair: pair.chosen)

    def test_depends_on_the_seed_and_not_on_order(self):
        _, test = self.pairs.split(0.25, seed=1)
        _, same = self.pairs[::-1].split(0.25, seed=1)
        _, other = self.pairs.split(0.25, seed=2)
        assert set(test.prompts) == set(same.prompts) != set(other.prompts)

    @pytest.mark.parametrize("fraction", [0.0, 1.0, 1e-6, -1.0])
    def test_a_fraction_that_leaves_a_side_empty_is_refused(self, fraction):
        with pytest.raises(OptionError, match="test_fraction"):
            self.pairs.split(fraction)

    def test_digests_add_up(self):
        train, test = self.pairs.split(0.5)
        total = (int(train.digest, 16) + int(test.digest, 16)) % 2**256
        assert f"{total:064x}" == self.pairs.digest == self.pairs[::-1].digest
        assert self.pairs[1:].digest != self.pairs.digest
