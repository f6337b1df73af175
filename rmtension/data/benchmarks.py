"""Loads public preference benchmarks as pairs; `rmtension.data.subtasks` says what each of their subtasks rewards.

Every loader reads a hub data set, or local files in the benchmark's own format without using the network. Subsets and
ids begin with the benchmark's name, so that pairs of several benchmarks can be concatenated. Pairs that are judged
together share an `item`. Two options have the same meaning in all loaders:

- `chat=False` (the default) gives prompts as plain HH transcripts, which every reward model can read and which models
  trained on HH data expect; `chat=True` gives messages, for models with a chat template. Prefer `chat=True` to a later
  `as_chat()`, which would split a request that quotes a transcript into several messages.
- `on_invalid="skip"` skips, and counts in `skipped`, every row with a field that is missing, empty or of a wrong type;
  by default such a row raises `DataError` naming the file, the row and the field. Whole rows are skipped, because an
  item with a response fewer, or a comparison of styles on other prompts, would measure something else.
"""

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from rmtension.data._benchmark_rows import Side, request_reader, rmb_reader, transcript_reader
from rmtension.data._pairs import PreferencePairs
from rmtension.data._sources import read_field, read_texts, source_rows
from rmtension.data.subtasks import CODE, GROUPS
from rmtension.errors import OptionError

__all__ = ["hh_rlhf", "reward_bench", "reward_bench_2", "rm_bench", "rmb"]

_STYLES = ("concise", "detailed", "markdown")
# Which pairs of styles each option selects, by the indices of the two styles; later styles are the richer ones.
_STYLE_PAIRS: dict[str, Callable[[int, int], bool]] = {
    "all": lambda chosen, rejected: True,
    "diagonal": lambda chosen, rejected: chosen == rejected,
    "easy": lambda chosen, rejected: chosen > rejected,
    "normal": lambda chosen, rejected: chosen == rejected,
    "hard": lambda chosen, rejected: chosen < rejected,
}


def hh_rlhf(
    source: str | Path = "Anthropic/hh-rlhf",
    split: str = "test",
    *,
    subset: str | Iterable[str] | None = None,
    chat: bool = False,
    on_invalid: str = "raise",
    revision: str | None = None,
) -> PreferencePairs:
    r"""Load HH-RLHF: the four parts helpful-base, helpful-online, helpful-rejection-sampled and harmless-base.

    `subset` names the parts to load. A local `source` is a folder with one sub-folder per part, which holds for example
    `test.jsonl.gz`; with a single `subset`, it may also be the file or folder of that part.

    Examples:
        >>> import json
        >>> folder = Path("hh-rlhf", "harmless-base")
        >>> folder.mkdir(parents=True)
        >>> row = {name: f"\n\nHuman: hi\n\nAssistant: {name}" for name in ("chosen", "rejected")}
        >>> (folder / "test.jsonl").write_text(json.dumps(row)) > 0
        True
        >>> hh_rlhf("hh-rlhf", subset="harmless-base")[0].chosen
        'chosen'
    """
    names = [subtask.name for subtask in GROUPS if subtask.benchmark == "hh-rlhf"]
    wanted = names if subset is None else [subset] if isinstance(subset, str) else list(dict.fromkeys(subset))
    if not wanted or set(wanted) - set(names):
        raise OptionError(f"subset: expected one or more of {names}, got {wanted}.")
    parts = {name: Path(source).expanduser() / name for name in names}
    is_tree = any(part.is_dir() for part in parts.values())
    if Path(source).expanduser().exists() and not is_tree and len(wanted) > 1:
        raise OptionError(
            f"subset: {source} has none of the folders {names}; expected the name of the part that it holds, got "
            f"{wanted}."
        )
    loaded = PreferencePairs([])
    for name in wanted:
        rows = source_rows(parts[name] if is_tree else source, split=split, data_dir=name, revision=revision)
        loaded += PreferencePairs.from_rows(rows, transcript_reader(name, split, chat=chat), on_invalid=on_invalid)
    return loaded


def reward_bench(
    source: str | Path = "allenai/reward-bench",
    split: str = "filtered",
    *,
    drop: str | Iterable[str] = CODE,
    chat: bool = False,
    on_invalid: str = "raise",
    revision: str | None = None,
) -> PreferencePairs:
    r"""Load RewardBench, without the subtasks in `drop` (code by default).

    Examples:
        >>> import json, tempfile
        >>> path = Path(tempfile.mkdtemp(), "rows.json")
        >>> row = {"id": 7, "prompt": "2 + 2?", "chosen": "4", "rejected": "5", "subset": "math-prm"}
        >>> path.write_text(json.dumps([row])) > 0
        True
        >>> reward_bench(path)[0]  # doctest: +NORMALIZE_WHITESPACE
        PreferencePair(prompt='\n\nHuman: 2 + 2?\n\nAssistant:', chosen='4', rejected='5', objective='helpful',
                       subset='reward-bench/math-prm', id='reward-bench-7', item=None)
    """

    def sides(row: Mapping[str, Any], where: str) -> list[Side]:
        return [("", read_field(row, "chosen", str, where), read_field(row, "rejected", str, where))]

    read = request_reader("reward-bench", sides, drop=drop, chat=chat)
    return PreferencePairs.from_rows(source_rows(source, split=split, revision=revision), read, on_invalid=on_invalid)


def reward_bench_2(
    source: str | Path = "allenai/reward-bench-2",
    split: str = "test",
    *,
    drop: str | Iterable[str] = ("Ties",),
    chat: bool = False,
    on_invalid: str = "raise",
    revision: str | None = None,
) -> PreferencePairs:
    """Load RewardBench 2, without the subtasks in `drop` (ties by default). Every row is one item.

    Each chosen response of a row is paired with each rejected one. With `drop=()`, an item of the subtask Ties is
    ranked correctly if all its chosen responses win, which is one part of RewardBench 2's own score for this subtask.

    Examples:
        >>> import json, tempfile
        >>> path = Path(tempfile.mkdtemp(), "rows.json")
        >>> row = {"id": "7", "prompt": "2 + 2?", "chosen": ["4"], "rejected": ["5", "6", "7"], "subset": "Math"}
        >>> path.write_text(json.dumps([row])) > 0
        True
        >>> loaded = reward_bench_2(path)
        >>> len(loaded), loaded.items
        (3, [[0, 1, 2]])
    """

    def sides(row: Mapping[str, Any], where: str) -> list[Side]:
        chosen, rejected = read_texts(row, "chosen", where), read_texts(row, "rejected", where)
        return [(f"-{i}-{j}", good, bad) for i, good in enumerate(chosen) for j, bad in enumerate(rejected)]

    read = request_reader("reward-bench-2", sides, drop=drop, chat=chat, one_item=True)
    return PreferencePairs.from_rows(source_rows(source, split=split, revision=revision), read, on_invalid=on_invalid)


def rm_bench(
    source: str | Path = "THU-KEG/RM-Bench",
    split: str = "train",
    *,
    styles: str = "all",
    drop: str | Iterable[str] = ("code",),
    chat: bool = False,
    on_invalid: str = "raise",
    revision: str | None = None,
) -> PreferencePairs:
    """Load RM-Bench, without the domains in `drop` (code by default): chosen and rejected responses in three styles.

    Every pair is judged by itself. `styles` selects among the nine pairs of a row: "all", "normal" or "diagonal" (same
    style), "easy" (the chosen response in the richer style) or "hard" (the reverse). Ids end in the two styles, for
    example "rm-bench-8-concise-markdown". If a folder has `total_dataset.json`, which repeats the other files, only
    that file is read.

    Examples:
        >>> import json, tempfile
        >>> path = Path(tempfile.mkdtemp(), "rows.json")
        >>> row = {"id": 8, "prompt": "2 + 2?", "chosen": ["4"] * 3, "rejected": ["5"] * 3, "domain": "math"}
        >>> path.write_text(json.dumps([row])) > 0
        True
        >>> [pair.id for pair in rm_bench(path, styles="hard")][0], len(rm_bench(path))
        ('rm-bench-8-concise-detailed', 9)
    """
    if styles not in _STYLE_PAIRS:
        raise OptionError(f"styles: expected one of {list(_STYLE_PAIRS)}, got {styles!r}.")
    style_pairs = [(i, j) for i in range(3) for j in range(3) if _STYLE_PAIRS[styles](i, j)]

    def sides(row: Mapping[str, Any], where: str) -> list[Side]:
        chosen, rejected = read_texts(row, "chosen", where, n=3), read_texts(row, "rejected", where, n=3)
        return [(f"-{_STYLES[i]}-{_STYLES[j]}", chosen[i], rejected[j]) for i, j in style_pairs]

    total = Path(source).expanduser() / "total_dataset.json"
    rows = source_rows(total if total.is_file() else source, split=split, revision=revision)
    read = request_reader("rm-bench", sides, drop=drop, chat=chat)
    return PreferencePairs.from_rows(rows, read, on_invalid=on_invalid)


def rmb(source: str | Path, *, chat: bool = False, on_invalid: str = "raise") -> PreferencePairs:
    """Load RMB from a file or folder of its repository's `RMB_dataset`; its authors have no data set on a hub.

    A row of the pairwise set is one pair; a row of the best-of-n set is an item with one pair per loser. The folder
    `Pairwise_set` or `BoN_set` as `source` loads that set only. Subsets are paths of categories, such as
    "rmb/Harmlessness/S1".

    Examples:
        >>> import json, tempfile
        >>> path = Path(tempfile.mkdtemp(), "S1.json")
        >>> row = {
        ...     "pair_uid": "a7",
        ...     "category_path": "Pairwise_set/Harmlessness/S1",
        ...     "conversation_input": [{"role": "user", "content": "hi"}],
        ...     "chosen": {"answer": "Hello!"},
        ...     "reject": {"answer": "Go away."},
        ... }
        >>> path.write_text(json.dumps([row])) > 0
        True
        >>> rmb(path)[0].id, rmb(path).subsets, rmb(path).objectives
        ('rmb-pairwise-a7', ['rmb/Harmlessness/S1'], ['harmless'])
    """
    # As a path, so that a missing file is never looked up on the hub.
    return PreferencePairs.from_rows(source_rows(Path(source)), rmb_reader(chat=chat), on_invalid=on_invalid)
