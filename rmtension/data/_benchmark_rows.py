"""Reads rows of public preference benchmarks as pairs, each in the benchmark's own format."""

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from itertools import count
from typing import Any

from rmtension.data._chat import Chat, Message, read_chat
from rmtension.data._pair import PreferencePair, require_responses, split_transcripts
from rmtension.data._row_reader import RowReader
from rmtension.data._sources import read_field, read_object
from rmtension.data.subtasks import GROUPS
from rmtension.errors import DataError, OptionError

# RM-Bench's files of a single domain name the prompt's source instead of the domain. Its files contain alpacaeval and
# refusals-dangerous; the other names are RewardBench's, for the sources that RM-Bench's paper lists.
_RM_BENCH_DOMAINS = {
    "alpacaeval": "chat",
    "hep": "code",
    "math": "math",
    "refusals": "safety-refuse",
    "donotanswer": "safety-refuse",
    "xstest-should-refuse": "safety-refuse",
    "xstest-should-respond": "safety-response",
}
_RMB_OBJECTIVES = {"Helpfulness": "helpful", "Harmlessness": "harmless"}

# The ending of the pair's id, the chosen and the rejected response.
Side = tuple[str, str, str]
# Reads the pairs of a row; the second argument says where the row is, for error messages.
Read = Callable[[Any, str], list[PreferencePair]]


def transcript_reader(name: str, split: str, *, chat: bool) -> Read:
    """Reads rows of HH-RLHF: two transcripts that differ in the last turn. The id of a row is its number."""
    subtask = next(subtask for subtask in GROUPS if subtask.subset == f"hh-rlhf/{name}")
    numbers, reader = count(1), RowReader(chat=chat)

    def read(raw: Any, where: str) -> list[PreferencePair]:
        number, row = next(numbers), read_object(raw, where)
        try:
            sides = split_transcripts(*(read_field(row, side, str, where) for side in ("chosen", "rejected")))
        except DataError as error:
            raise DataError(str(error) if str(error).startswith(where) else f"{where}: {error}") from error
        record = dict(zip(("prompt", "chosen", "rejected"), sides, strict=True))
        labels = {"objective": subtask.objective, "subset": subtask.subset, "id": f"hh-rlhf-{name}-{split}-{number}"}
        return [reader.read(record | labels, where)]

    return read


def request_reader(
    benchmark: str,
    sides: Callable[[Mapping[str, Any], str], list[Side]],
    *,
    drop: str | Iterable[str],
    chat: bool,
    one_item: bool = False,
) -> Read:
    """Reads rows whose prompt is one request; `sides` returns (ending of the id, chosen, rejected) per pair."""
    subtasks = {subtask.name: subtask for subtask in GROUPS if subtask.benchmark == benchmark}
    dropped = {drop} if isinstance(drop, str) else set(drop)
    if dropped - set(subtasks):
        raise OptionError(f"drop: expected some of {list(subtasks)}, got {sorted(dropped - set(subtasks))}.")
    sources = _RM_BENCH_DOMAINS if benchmark == "rm-bench" else {}
    unique = _Unique()

    def read(raw: Any, where: str) -> list[PreferencePair]:
        row = read_object(raw, where)
        field = "domain" if "domain" in row else "subset"
        value = read_field(row, field, str, where)
        name = next((domain for start, domain in sources.items() if f"{value}-".startswith(f"{start}-")), value)
        if name not in subtasks:
            raise DataError(
                f"{where}: field {field!r} should be one of {[*subtasks, *sources]}, got {value[:40]!r}. Check that "
                f"the file belongs to {benchmark}."
            )
        if name in dropped:
            return []
        prompt = _prompt((Message("user", read_field(row, "prompt", str, where)),), where, chat=chat)
        row_id = unique(f"{benchmark}-{read_field(row, 'id', int | str, where)}")
        item = row_id if one_item else None
        labels = {"objective": subtasks[name].objective, "subset": subtasks[name].subset, "item": item}
        return [
            _pair(where, chosen, rejected, prompt=prompt, id=row_id + ending, **labels)
            for ending, chosen, rejected in sides(row, where)
        ]

    return read


def rmb_reader(*, chat: bool) -> Read:
    """Reads rows of RMB: a pair of the pairwise set, or an item of the best-of-n set."""
    unique = _Unique()

    def read(raw: Any, where: str) -> list[PreferencePair]:
        row = read_object(raw, where)
        objective, subset = _rmb_category(row, where)
        listed = read_field(row, "conversation_input", list, where)
        # The other fields of these messages describe the data set.
        messages = tuple(
            Message(message.role, message.content)
            for message in read_chat(listed, f"{where}: field 'conversation_input'")
        )
        labels = {"prompt": _prompt(messages, where, chat=chat), "objective": objective, "subset": subset}
        if "bon_best" not in row and "loser_list" not in row:
            name = unique(f"rmb-pairwise-{read_field(row, 'pair_uid', int | str, where)}")
            return [_pair(where, _answer(row, "chosen", where), _answer(row, "reject", where), id=name, **labels)]
        best, losers = _answer(row, "bon_best", where), read_field(row, "loser_list", list, where)
        if not losers:
            raise DataError(
                f"{where}: field 'loser_list' should have at least one answer, got an empty list. Correct the row, or "
                'load with on_invalid="skip".'
            )
        name = unique(f"rmb-bon-{read_field(row, 'bon_uid', int | str, where)}")
        in_losers = f"{where}: field 'loser_list'"
        answers = [read_field(read_object(loser, in_losers), "answer", str, in_losers) for loser in losers]
        return [_pair(where, best, text, id=f"{name}-{i}", item=name, **labels) for i, text in enumerate(answers)]

    return read


def _rmb_category(row: Mapping[str, Any], where: str) -> tuple[str, str]:
    """Objective and subset of a path such as "Pairwise_set/Harmlessness/S1"."""
    parts: list[str] = read_field(row, "category_path", str, where).split("/")
    for index, part in enumerate(parts):
        if part in _RMB_OBJECTIVES:
            return _RMB_OBJECTIVES[part], "/".join(["rmb", *parts[index:]])
    raise DataError(
        f"{where}: field 'category_path' should have one of {list(_RMB_OBJECTIVES)} between slashes, got "
        f"{'/'.join(parts)[:60]!r}. Check that the file belongs to RMB_dataset."
    )


# -- parts of a pair -------------------------------------------------------------------------------------------------


class _Unique:
    """Makes ids unique by appending "~2", "~3" to repeated ones, so that one `item` never joins two rows."""

    def __init__(self) -> None:
        self._seen: Counter[str] = Counter()

    def __call__(self, name: str) -> str:
        self._seen[name] += 1
        return name if self._seen[name] == 1 else f"{name}~{self._seen[name]}"


def _pair(where: str, chosen: str, rejected: str, **fields: Any) -> PreferencePair:
    pair = PreferencePair(chosen=chosen, rejected=rejected, **fields)
    require_responses(pair, where)
    return pair


def _prompt(messages: Chat, where: str, *, chat: bool) -> str | Chat:
    if messages[-1].role != "user":
        raise DataError(
            f"{where}: the conversation should end with a message of the user, got a message of "
            f'{messages[-1].role!r}. Correct the row, or load with on_invalid="skip".'
        )
    if chat:
        return messages
    speakers = {"user": "Human", "assistant": "Assistant"}
    for message in messages:
        if message.role not in speakers:
            raise DataError(f"{where}: an HH transcript cannot hold the role {message.role!r}. Load with chat=True.")
    return "".join(f"\n\n{speakers[message.role]}: {message.content}" for message in messages) + "\n\nAssistant:"


def _answer(row: Mapping[str, Any], field: str, where: str) -> str:
    """The text of one of RMB's responses."""
    answer: str = read_field(read_field(row, field, Mapping, where), "answer", str, f"{where}: field {field!r}")
    return answer
