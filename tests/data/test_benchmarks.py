"""Every loader on rows of its benchmark's own format: files, folders, the hub's loader offline, and damaged rows."""

import gzip
import itertools
import json
import os
import random
from pathlib import Path

import pytest
import torch
from drawn_scores import provenance

from rmtension import PairRewards, PreferencePair, PreferencePairs
from rmtension.data import benchmarks, subtasks
from rmtension.data._chat import Message
from rmtension.errors import DataError, OptionError
from rmtension.evaluation import _metrics as evaluation

# The requests of the rows below, as plain HH transcripts.
ASKED = "\n\nHuman: ask\n\nAssistant:"


def rb(number, subset="math-prm", **changes):
    return {"id": number, "prompt": "ask", "chosen": "a", "rejected": "b", "subset": subset} | changes


def rb2(number, subset="Focus", chosen=("a",), rejected=("b", "c", "d"), **changes):
    row = {"id": str(number), "prompt": "ask", "chosen": list(chosen), "rejected": list(rejected), "subset": subset}
    return row | changes


def rm(number, domain="chat", **changes):
    styles = ("short", "long", "# long")
    sides = {side: [f"{side} {style}" for style in styles] for side in ("chosen", "rejected")}
    return {"id": number, "prompt": "ask", "domain": domain} | sides | changes


def rmb(uid, category="Harmlessness/S1", **changes):
    row = {
        "pair_uid": uid,
        "conversation_input": [{"role": "user", "content": "ask", "language": "English"}],
        "chosen": {"llm_name": "m", "answer": "a"},
        "reject": {"llm_name": "n", "answer": "b"},
        "category_path": f"Pairwise_set/{category}",
    }
    return row | changes


def rmb_bon(uid, losers=("b", "c"), category="Helpfulness/Open QA/Factual", **changes):
    row = rmb(uid, category) | {"bon_uid": uid, "bon_best": {"answer": "a"}, "category_path": f"BoN_set/{category}"}
    row["loser_list"] = [{"answer": text} for text in losers]
    return {name: row[name] for name in row if name not in ("pair_uid", "chosen", "reject")} | changes


def hh(number):
    shared = f"\n\nHuman: hi {number}\n\nAssistant: yes?\n\nHuman: how?\n\nAssistant:"
    return {"chosen": f"{shared} well {number}", "rejected": f"{shared} badly"}


def save(path, rows):
    """JSON lines or an array by the file's name, gzip'd if it ends in .gz."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = "\n".join(map(json.dumps, rows)) if ".jsonl" in path.name else json.dumps(rows, indent=1)
    path.write_bytes(gzip.compress(lines.encode()) if path.suffix == ".gz" else lines.encode())
    return path


# -- the table -------------------------------------------------------------------------------------------------------


def test_groups_count_as_in_the_study():
    dropped = {"reward-bench-2/Ties", "rm-bench/code"}
    kept = [
        subtask
        for subtask in subtasks.GROUPS
        if subtask.benchmark != "hh-rlhf" and subtask.subset not in dropped and not subtask.name.startswith("hep-")
    ]
    assert sum(subtask.objective == "helpful" for subtask in kept) == 18
    assert [sum(subtask.right == right for subtask in kept) for right in ("refuse", "respond")] == [6, 2]
    assert all((subtask.right is None) == (subtask.objective == "helpful") for subtask in kept)
    names = [subtask.subset for subtask in subtasks.GROUPS]
    assert len(set(names)) == len(names)


def test_a_model_that_always_refuses_wins_only_refusing_subtasks(tmp_path):
    """It wins every subtask that rewards refusing, over three benchmarks, and no other."""
    loaded = benchmarks.reward_bench(
        save(tmp_path / "a.json", [rb(1, "donotanswer"), rb(2, "xstest-should-respond"), rb(3)])
    )
    loaded += benchmarks.reward_bench_2(save(tmp_path / "b.json", [rb2(1, "Safety")]))
    rows = [rm(1, "safety-refuse"), rm(2, "safety-response")]
    loaded += benchmarks.rm_bench(save(tmp_path / "c.json", rows), styles="diagonal")
    rewards = torch.tensor([1.0 if pair.subset in subtasks.REFUSE_SUBSETS else -1.0 for pair in loaded])
    scored = PairRewards(rewards, torch.zeros_like(rewards), loaded, provenance())
    parts = evaluation.balance(scored, refuse=subtasks.REFUSE_SUBSETS, respond=subtasks.RESPOND_SUBSETS)
    assert [parts[name].value for name in ("refusing", "responding", "balanced")] == [1.0, 0.0, 0.5]
    assert loaded.objectives == ["harmless", "helpful"]


# -- files -----------------------------------------------------------------------------------------------------------

FILES = ("rows.json", "rows.jsonl", "rows.jsonl.gz", "rows.json.gz", "sub/filtered.json")


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("as_folder", [False, True])
def test_reward_bench_reads_files_and_folders_alike(tmp_path, name, as_folder):
    rows = [rb(7), rb(8, "hep-go"), rb(9, "xstest-should-refuse", chosen=" käse \u2028 ")]
    path = save(tmp_path / name, rows)
    save(tmp_path / ".cache" / "rows.json", [rb(1)])
    save(tmp_path / "raw.jsonl", [rb(2)])
    pairs = benchmarks.reward_bench(tmp_path if as_folder else str(path))
    labels = ("helpful", "reward-bench/math-prm", "reward-bench-7")
    assert pairs[0] == PreferencePair(ASKED, "a", "b", *labels)
    assert [pair.id for pair in pairs] == ["reward-bench-7", "reward-bench-9"]
    assert (pairs[1].text("chosen"), pairs[1].objective) == (f"{ASKED} käse \u2028 ", "harmless")
    assert {pair.item for pair in pairs} == {None}
    assert benchmarks.reward_bench(path, drop=()).subsets[0] == "reward-bench/hep-go"
    assert [pair.id for pair in benchmarks.reward_bench(path, drop="math-prm")] == ["reward-bench-8", "reward-bench-9"]


def test_a_byte_order_mark_and_blank_lines_are_ignored(tmp_path):
    (tmp_path / "a.json").write_bytes(b"\xef\xbb\xbf [\n" + json.dumps(rb(1)).encode() + b"\n\n]")
    (tmp_path / "b.jsonl").write_bytes(b"\xef\xbb\xbf" + json.dumps(rb(1)).encode() + b"\n\n")
    assert benchmarks.reward_bench(tmp_path / "a.json") == benchmarks.reward_bench(tmp_path / "b.jsonl")


def test_parquet_and_folders_of_it_are_read_by_datasets_offline(tmp_path):
    assert os.environ["HF_HUB_OFFLINE"] == "1"
    datasets = pytest.importorskip("datasets")
    rows = [rb2(1), rb2(2, "Ties", chosen=("a", "b"))]
    file = tmp_path / "data" / "test-00000-of-00001.parquet"
    file.parent.mkdir()
    datasets.Dataset.from_list(rows).to_parquet(file)
    expected = benchmarks.reward_bench_2(save(tmp_path / "other" / "rows.json", rows))
    assert benchmarks.reward_bench_2(file) == benchmarks.reward_bench_2(str(tmp_path / "data")) == expected
    with pytest.raises(DataError, match=r"data set .*could not load it \(split='train'\)"):
        benchmarks.reward_bench_2(tmp_path / "data", "train")


def test_names_go_to_the_hub_and_paths_never(tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets")
    asked = []
    rows = {"allenai/reward-bench": [rb(1)], "allenai/reward-bench-2": [rb2(1)], "THU-KEG/RM-Bench": [rm(1)]}

    def load_dataset(name, **options):
        asked.append((name, options["split"], options["data_dir"], options["revision"]))
        return rows.get(name, [hh(0), hh(1)])

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert len(benchmarks.reward_bench(revision="abc")) == 1
    assert len(benchmarks.reward_bench_2()) == 3
    assert len(benchmarks.rm_bench()) == 9
    assert len(benchmarks.hh_rlhf(split="train")) == 8
    assert asked[:3] == [
        ("allenai/reward-bench", "filtered", None, "abc"),
        ("allenai/reward-bench-2", "test", None, None),
        ("THU-KEG/RM-Bench", "train", None, None),
    ]
    folders = ("helpful-base", "helpful-online", "helpful-rejection-sampled", "harmless-base")
    assert asked[3:] == [("Anthropic/hh-rlhf", "train", folder, None) for folder in folders]
    rows["allenai/reward-bench"] = [rb(1), rb(2, chosen=None)]
    with pytest.raises(
        DataError, match="allenai/reward-bench filtered, row 2: field 'chosen' should be text, got None"
    ):
        benchmarks.reward_bench()
    asked.clear()
    for source in (tmp_path / "no", str(tmp_path / "no"), "./no", "~/no/such", "no.json", "no.parquet"):
        with pytest.raises(DataError, match="does not exist"):
            benchmarks.reward_bench(source)
    with pytest.raises(DataError, match="does not exist"):
        benchmarks.rmb("Zhou/RMB")
    assert not asked


def test_offline_the_hub_says_so():
    with pytest.raises(DataError, match=r"data set 'no-one/nothing': could not load it .*split='filtered'"):
        benchmarks.reward_bench("no-one/nothing")


# -- items -----------------------------------------------------------------------------------------------------------


def test_reward_bench_2_pairs_every_chosen_with_every_rejected(tmp_path):
    rows = [rb2(5), rb2("tied:1", "Ties", chosen=("a", "b"), rejected=("c", "d")), rb2(6, "Safety", rejected=("x",))]
    path = save(tmp_path / "rows.json", rows)
    pairs = benchmarks.reward_bench_2(path)
    assert [(pair.id, pair.item) for pair in pairs] == [
        *((f"reward-bench-2-5-0-{i}", "reward-bench-2-5") for i in range(3)),
        ("reward-bench-2-6-0-0", "reward-bench-2-6"),
    ]
    assert [pair.rejected for pair in pairs] == ["b", "c", "d", "x"]
    assert [pair.objective for pair in pairs] == ["helpful"] * 3 + ["harmless"]
    ties = benchmarks.reward_bench_2(path, drop=()).filter(subset="reward-bench-2/Ties")
    assert [(pair.chosen, pair.rejected) for pair in ties] == list(itertools.product("ab", "cd"))


@pytest.mark.parametrize("loader", ["reward_bench_2", "rmb"])
def test_all_pairs_of_an_item_are_right_when_its_worst_chosen_beats_its_best_rejected(tmp_path, loader):
    draw = random.Random(0)
    rows, expected, rewards = [], {}, {}
    for number in range(200):
        chosen = [f"c{number}-{i}" for i in range(draw.randint(1, 3) if loader == "reward_bench_2" else 1)]
        rejected = [f"r{number}-{i}" for i in range(draw.randint(1, 4))]
        # Whole numbers, so that some chosen and rejected responses tie, which is not right.
        rewards |= {text: draw.randint(0, 5) + (text[0] == "c") for text in chosen + rejected}
        expected[str(number)] = min(map(rewards.get, chosen)) > max(map(rewards.get, rejected))
        is_rmb = loader == "rmb"
        best = {"bon_best": {"answer": chosen[0]}}
        rows.append(rmb_bon(str(number), rejected, **best) if is_rmb else rb2(number, "Math", chosen, rejected))
    pairs = getattr(benchmarks, loader)(save(tmp_path / "rows.json", rows))
    ends = {pair.item.rsplit("-", 1)[1] for pair in pairs}
    assert ends == set(expected)
    assert 20 < sum(expected.values()) < 180

    def judged(rule):
        groups = itertools.groupby(pairs, key=lambda pair: pair.item)
        return {
            item.rsplit("-", 1)[1]: rule(rewards[p.chosen] > rewards[p.rejected] for p in of) for item, of in groups
        }

    assert judged(all) == expected
    assert judged(any) != expected  # the rule that asks for one pair of an item is told apart


def test_repeated_ids_join_no_items(tmp_path):
    save(tmp_path / "a.json", [rb2(1), rb2(2)])
    save(tmp_path / "b.json", [rb2(1), rb2(1)])
    pairs = benchmarks.reward_bench_2(tmp_path)
    names = ("reward-bench-2-1", "reward-bench-2-2", "reward-bench-2-1~2", "reward-bench-2-1~3")
    assert [pair.item for pair in pairs[::3]] == list(names)
    assert len({pair.id for pair in pairs}) == 12


def test_item_goes_through_files_and_leaves_the_digest(tmp_path):
    pair = PreferencePair("Q", "yes", "no", item="7")
    assert pair.digest() == PreferencePair("Q", "yes", "no").digest()
    assert pair.swapped().item == "7"
    pairs = PreferencePairs([pair, PreferencePair("Q", "yes", "never")])
    pairs.to_jsonl(tmp_path / "pairs.jsonl")
    assert PreferencePairs.from_jsonl(tmp_path / "pairs.jsonl") == pairs
    assert PreferencePairs.from_records([pair.to_dict() | {"item": 7}])[0] == pair
    assert pairs.to_frame()["item"].fillna("").tolist() == ["7", ""]


# -- RM-Bench --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("styles", "expected"),
    [
        ("normal", ["concise-concise", "detailed-detailed", "markdown-markdown"]),
        ("easy", ["detailed-concise", "markdown-concise", "markdown-detailed"]),
        ("hard", ["concise-detailed", "concise-markdown", "detailed-markdown"]),
    ],
)
def test_rm_bench_styles_select_their_pairs(tmp_path, styles, expected):
    path = save(tmp_path / "rows.json", [rm("chat/8"), rm(9, "safety-response")])
    pairs = benchmarks.rm_bench(path, styles=styles)
    assert [pair.id for pair in pairs[:3]] == [f"rm-bench-chat/8-{pair}" for pair in expected]
    words = {"concise": "short", "detailed": "long", "markdown": "# long"}
    for pair in pairs:
        chosen, rejected = pair.id.split("-")[-2:]
        assert (pair.chosen, pair.rejected) == (f"chosen {words[chosen]}", f"rejected {words[rejected]}")
    assert pairs.subsets == ["rm-bench/chat", "rm-bench/safety-response"]
    everything = benchmarks.rm_bench(path)
    assert len({pair.id for pair in everything}) == len(everything) == 18
    assert {pair.item for pair in everything} == {None}
    assert list(pairs) == [pair for pair in everything if pair.id.endswith(tuple(expected))]
    if styles == "normal":
        assert benchmarks.rm_bench(path, styles="diagonal") == pairs


def test_rm_bench_sources_belong_to_their_domains(tmp_path):
    names = {
        "alpacaeval": "chat",
        "refusals-dangerous": "safety-refuse",
        "xstest-should-refuse": "safety-refuse",
        "xstest-should-respond": "safety-response",
        "math-prm": "math",
    }
    rows = [{k: v for k, v in rm(name, subset=name).items() if k != "domain"} for name in [*names, "hep-go"]]
    loaded = benchmarks.rm_bench(save(tmp_path / "rows.json", rows), styles="diagonal")
    assert [pair.subset for pair in loaded[::3]] == [f"rm-bench/{domain}" for domain in names.values()]
    save(tmp_path / "data" / "total_dataset.json", [rm(1)])
    save(tmp_path / "data" / "chat_filtered.json", [rm(1)])
    assert len(benchmarks.rm_bench(tmp_path / "data")) == 9


# -- RMB -------------------------------------------------------------------------------------------------------------


def test_rmb_reads_pairs_and_best_of_n_items(tmp_path):
    save(tmp_path / "Pairwise_set/Harmlessness/S1.json", [rmb("11"), rmb("12")])
    save(tmp_path / "BoN_set/Helpfulness/Open QA/Factual.json", [rmb_bon("11"), rmb_bon("12", losers=("x",))])
    pairs = benchmarks.rmb(tmp_path)
    assert [(pair.id, pair.item) for pair in pairs] == [
        ("rmb-bon-11-0", "rmb-bon-11"),
        ("rmb-bon-11-1", "rmb-bon-11"),
        ("rmb-bon-12-0", "rmb-bon-12"),
        ("rmb-pairwise-11", None),
        ("rmb-pairwise-12", None),
    ]
    assert (pairs[1].chosen, pairs[1].rejected) == ("a", "c")
    assert (pairs[0].objective, pairs[0].subset) == ("helpful", "rmb/Helpfulness/Open QA/Factual")
    assert (pairs[4].objective, pairs[4].subset) == ("harmless", "rmb/Harmlessness/S1")
    assert benchmarks.rmb(tmp_path / "Pairwise_set") == pairs[3:]


def test_rmb_conversations_become_transcripts_or_chats(tmp_path):
    turns = [("user", "hi"), ("assistant", "yes?"), ("user", "how?")]
    talk = [{"role": role, "content": text, "language": "English"} for role, text in turns]
    path = save(tmp_path / "rows.json", [rmb("1", conversation_input=talk)])
    (plain,), (chat,) = benchmarks.rmb(path), benchmarks.rmb(path, chat=True)
    assert plain.prompt == "\n\nHuman: hi\n\nAssistant: yes?\n\nHuman: how?\n\nAssistant:"
    assert chat.prompt == tuple(Message(*turn) for turn in turns)
    talk[0]["role"] = "system"
    save(path, [rmb("1", conversation_input=talk)])
    assert benchmarks.rmb(path, chat=True)[0].prompt[0].role == "system"
    with pytest.raises(DataError, match="row 1: an HH transcript cannot hold the role 'system'"):
        benchmarks.rmb(path)


# -- HH-RLHF ---------------------------------------------------------------------------------------------------------


def hh_tree(folder):
    names = ("helpful-base", "helpful-online", "helpful-rejection-sampled", "harmless-base")
    for n, name in enumerate(names, start=1):
        save(folder / name / "test.jsonl.gz", [hh(number) for number in range(n)])
        save(folder / name / "train.jsonl.gz", [hh(0)] * 7)
    return folder


def test_hh_rlhf_reads_the_parts_of_a_folder(tmp_path):
    pairs = benchmarks.hh_rlhf(hh_tree(tmp_path))
    assert len(pairs) == 1 + 2 + 3 + 4
    assert len({pair.id for pair in pairs}) == len(pairs)
    assert len(pairs.filter(objective="helpful")) == 6
    last = pairs[-1]
    assert (last.id, last.subset) == ("hh-rlhf-harmless-base-test-4", "hh-rlhf/harmless-base")
    assert (last.chosen, last.rejected, last.prompt[-12:]) == ("well 3", "badly", "\n\nAssistant:"[-12:])
    assert len(benchmarks.hh_rlhf(tmp_path, "train")) == 28
    assert benchmarks.hh_rlhf(tmp_path, subset=["harmless-base"]) == pairs[6:]
    file = tmp_path / "harmless-base" / "test.jsonl.gz"
    for source in (file, file.parent):
        assert benchmarks.hh_rlhf(source, subset="harmless-base") == pairs[6:]
    assert benchmarks.hh_rlhf(tmp_path, chat=True) == pairs.as_chat()


def test_incomplete_hh_rlhf_folders_are_refused(tmp_path):
    hh_tree(tmp_path)
    with pytest.raises(DataError, match=r"expected a file of the split 'validation', got \['test.jsonl.gz', 'train"):
        benchmarks.hh_rlhf(tmp_path, "validation")
    with pytest.raises(OptionError, match=r"subset: .*expected the name of the part that it holds"):
        benchmarks.hh_rlhf(tmp_path / "harmless-base")
    with pytest.raises(OptionError, match=r"subset: expected one or more of .*got \['harmless'\]"):
        benchmarks.hh_rlhf(tmp_path, subset="harmless")
    for file in (tmp_path / "helpful-online").iterdir():
        file.unlink()
    with pytest.raises(DataError, match="helpful-online: expected files ending in"):
        benchmarks.hh_rlhf(tmp_path)
    (tmp_path / "helpful-online").rmdir()
    with pytest.raises(DataError, match="helpful-online, which does not exist"):
        benchmarks.hh_rlhf(tmp_path)


def test_hh_rlhf_rows_that_are_not_chats_are_named_and_skipped(tmp_path):
    twice = "\n\nHuman: hi\n\nAssistant: yes\n\nAssistant:"
    rows = [hh(0), {"chosen": f"{twice} a", "rejected": f"{twice} b"}, {"rejected": "a"}, hh(1)]
    path = save(tmp_path / "test.jsonl", rows)
    with pytest.raises(DataError, match=r"test.jsonl, line 2: .*ends inside a turn of the assistant"):
        benchmarks.hh_rlhf(path, subset="harmless-base", chat=True)
    pairs = benchmarks.hh_rlhf(path, subset="harmless-base", chat=True, on_invalid="skip")
    # The number of a pair is that of its row, whatever was left out.
    assert [pair.id[-1] for pair in pairs] == ["1", "4"]
    assert sum(pairs.skipped.values()) == 2


# -- prompts ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("loader", ["reward_bench", "reward_bench_2", "rm_bench", "rmb"])
def test_chats_are_what_as_chat_makes_of_transcripts_unless_they_quote_one(tmp_path, loader):
    make = {"reward_bench": rb, "reward_bench_2": rb2, "rm_bench": rm, "rmb": rmb_bon}[loader]
    load = getattr(benchmarks, loader)
    path = save(tmp_path / "rows.json", [make("1")])
    plain, chat = load(path), load(path, chat=True)
    assert plain[0].prompt == ASKED
    assert chat[0].prompt == (Message("user", "ask"),)
    assert plain.as_chat() == chat
    quote = "Go on:\n\nHuman: hi\n\nAssistant: hello\n\nHuman: bye"
    talk = {"prompt": quote, "conversation_input": [{"role": "user", "content": quote}]}
    save(path, [make("1") | {key: talk[key] for key in talk if key in make("1")}])
    assert len(load(path, chat=True)[0].prompt) == 1
    assert len(load(path).as_chat()[0].prompt) == 4


# -- damage ----------------------------------------------------------------------------------------------------------


def less(row, field):
    return {name: value for name, value in row.items() if name != field}


GOOD = {"reward_bench": rb(1), "reward_bench_2": rb2(1), "rm_bench": rm(1), "rmb": rmb_bon("1"), "hh_rlhf": hh(0)}
DAMAGED = [
    ("reward_bench", less(rb(1), "rejected"), r"field 'rejected' is missing; fields present: \['chosen', 'id', "),
    ("reward_bench", rb(1, chosen=["a"]), "field 'chosen' should be text, got list"),
    ("reward_bench", rb(1, rejected=" \n"), "field 'rejected' is empty"),
    ("reward_bench", rb(1, prompt=None), "field 'prompt' should be text, got NoneType"),
    ("reward_bench", rb(1, "Poetry"), r"field 'subset' should be one of \['alpacaeval-easy', .*got 'Poetry'"),
    ("reward_bench", less(rb(1), "id"), "field 'id' is missing"),
    ("reward_bench", rb([1]), "field 'id' should be a number or text, got list"),
    ("reward_bench", [rb(1)], "expected a JSON object, got list"),
    ("reward_bench_2", rb2(1, rejected=[]), "field 'rejected' should have at least one responses, got 0"),
    ("reward_bench_2", rb2(1, chosen=["a", " "]), "field 'chosen' should have text at index 1, got an empty text"),
    ("reward_bench_2", rb2(1) | {"chosen": "a"}, "field 'chosen' should be a list, got str"),
    ("rm_bench", rm(1, rejected=["a", "b"]), "field 'rejected' should have 3 responses, got 2"),
    ("rm_bench", rm(1, chosen=["a", None, "b"]), "field 'chosen' should have text at index 1, got NoneType"),
    ("rm_bench", rm(1, "poetry"), "field 'domain' should be one of .*got 'poetry'"),
    ("rm_bench", less(rm(1), "domain"), "field 'subset' is missing"),
    ("rmb", rmb("1", reject={"llm_name": "n"}), "field 'reject': field 'answer' is missing"),
    ("rmb", rmb("1", chosen="a"), "field 'chosen' should be an object, got str"),
    ("rmb", less(rmb("1"), "chosen"), "field 'chosen' is missing"),
    ("rmb", rmb("1", reject={"answer": ""}), "field 'rejected' is empty"),
    ("rmb", less(rmb_bon("1"), "bon_best"), "field 'bon_best' is missing"),
    ("rmb", rmb_bon("1", losers=[]), "field 'loser_list' should have at least one answer, got an empty list"),
    ("rmb", rmb_bon("1", losers=["b", 3]), "field 'loser_list': field 'answer' should be text, got int"),
    ("rmb", rmb_bon("1", loser_list=["b"]), "field 'loser_list': expected a JSON object, got str"),
    ("rmb", rmb_bon("1", losers=["b", "", "c"]), "field 'rejected' is empty"),
    ("rmb", rmb_bon("1", category_path="BoN_set/S1"), r"field 'category_path' should have one of \['Helpfulness'"),
    ("rmb", rmb_bon("1", conversation_input=[]), "field 'conversation_input': expected at least one message"),
    ("rmb", rmb_bon("1", conversation_input=[{"role": "user"}]), "field 'conversation_input': message 0 should be"),
    (
        "rmb",
        rmb("1", conversation_input=[{"role": "assistant", "content": "hi"}]),
        "should end with a message of the user, got a message of 'assistant'",
    ),
    ("hh_rlhf", less(hh(0), "chosen"), "field 'chosen' is missing"),
    ("hh_rlhf", hh(0) | {"rejected": 3}, "field 'rejected' should be text, got int"),
    ("hh_rlhf", {"chosen": "a", "rejected": "b"}, "chosen, rejected: expected transcripts that share"),
]


def load_with(loader, path, **options):
    options |= {"subset": "harmless-base"} if loader == "hh_rlhf" else {}
    return getattr(benchmarks, loader)(path, **options)


@pytest.mark.parametrize(("name", "where"), [("test.json", "row 2"), ("test.jsonl", "line 2")])
@pytest.mark.parametrize(("loader", "row", "message"), DAMAGED)
def test_damaged_rows_are_named_and_skipped_whole(tmp_path, loader, row, message, name, where):
    path = save(tmp_path / name, [GOOD[loader], row, GOOD[loader]])
    with pytest.raises(DataError, match=rf"{where}: .*?{message}") as caught:
        load_with(loader, path)
    assert str(caught.value).startswith(str(path))
    pairs = load_with(loader, path, on_invalid="skip")
    assert sum(pairs.skipped.values()) == 1
    assert len(pairs) == 2 * len(load_with(loader, save(tmp_path / "good" / name, [GOOD[loader]])))


def test_a_row_that_fails_half_way_gives_no_pairs():
    def read(row, where):
        yield PreferencePair("Q", row, "no")
        if row == "bad":
            raise DataError(f"{where}: it is bad")

    pairs = PreferencePairs.from_rows([("row 1", "good"), ("row 2", "bad")], read, on_invalid="skip")
    assert [pair.chosen for pair in pairs] == ["good"]
    assert pairs.skipped == {"it is bad": 1}


def test_styles_skip_the_same_rows(tmp_path):
    path = save(tmp_path / "rows.json", [rm(1), rm(2, chosen=["", "b", "c"])])
    for styles in ("easy", "normal", "hard"):
        pairs = benchmarks.rm_bench(path, styles=styles, on_invalid="skip")
        assert (len(pairs), sum(pairs.skipped.values())) == (3, 1)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "got an empty file"),
        (b'[{"id": 1}', r"not valid JSON .*Expected one JSON array"),
        (b'[{"id": "\xff"}]', "not valid UTF-8 at byte 9"),
        (gzip.compress(b"[" + b" " * 5000 + b"]", mtime=0)[:-12], "damaged or cut short"),
    ],
)
def test_files_that_cannot_be_read_raise_whatever_is_skipped(tmp_path, content, message):
    path = tmp_path / "rows.json"
    path.write_bytes(content)
    for on_invalid in ("raise", "skip"):
        with pytest.raises(DataError, match=message) as caught:
            benchmarks.reward_bench(path, on_invalid=on_invalid)
        assert str(caught.value).startswith(str(path))


def test_a_line_that_is_not_json_is_named_and_skipped(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(rb(1)) + "\n{\n" + json.dumps(rb(2)))
    with pytest.raises(DataError, match="line 2: not valid JSON"):
        benchmarks.reward_bench(path)
    pairs = benchmarks.reward_bench(path, on_invalid="skip")
    assert (len(pairs), sum(pairs.skipped.values())) == (2, 1)


def test_options_are_checked_before_anything_is_read():
    absent = Path("no.json")
    with pytest.raises(OptionError, match=r"drop: expected some of .*got \['code'\]"):
        benchmarks.reward_bench("no-one/nothing", drop="code")
    with pytest.raises(OptionError, match=r"styles: expected one of .*got 'rich'"):
        benchmarks.rm_bench(absent, styles="rich")
    with pytest.raises(OptionError, match="on_invalid: expected 'raise' or 'skip', got 'drop'"):
        benchmarks.rmb(absent, on_invalid="drop")
    with pytest.raises(OptionError, match="subset: expected one or more of"):
        benchmarks.hh_rlhf(absent, subset=[])
