"""Reads a row of data as a preference pair: which column holds which field, and the formats of rows.

Files, data sets, frames and dicts are all read here. `RowReader` picks the fields of a row, and their types determine
the format:

- texts: prompt and responses;
- two texts without a prompt: HH transcripts, or texts with a common beginning;
- a prompt (messages or text) and responses of one or more messages;
- whole conversations, with or without a separate prompt: the messages that they share are the pair's prompt.

In every source, a text that is the JSON of messages is read as messages.
"""

import warnings
from collections.abc import Iterable, Mapping
from difflib import get_close_matches
from numbers import Number
from typing import Any

from rmtension._arguments import nearest
from rmtension.data._chat import is_messages, is_transcript, parse_messages, read_chat, split_turns
from rmtension.data._conversations import after_prompt, require_contained, shared_messages
from rmtension.data._data_files import parse_json
from rmtension.data._pair import (
    PAIR_FIELDS,
    PreferencePair,
    can_be_label,
    is_missing,
    join_prompt,
    require_responses,
    split_transcripts,
)
from rmtension.data._row_values import label, other_label, tools_text, with_system
from rmtension.errors import DataError, OptionError, RMTensionWarning

SIDES = ("chosen", "rejected")
# The fields of a pair, and the text of a system message, which becomes a part of the prompt.
FIELDS = (*PAIR_FIELDS, "system")
_LABELS = ("objective", "subset", "id", "item")
# ShareGPT's name for the messages before the responses.
_CONVERSATIONS = "conversations"


class RowReader:
    """Reads the rows of one source as pairs.

    `columns` maps a field of the pair to its column, or to None if no column holds it; other fields are read from the
    columns of the same names. Other columns with short texts, numbers or true and false become `labels`.
    `objective` and `subset` are set in every pair. `chat=True` converts plain prompts to messages. After the last
    row, `finish` raises `OptionError` if a named column was in no row.
    """

    def __init__(
        self,
        columns: Mapping[str, str | None] | None = None,
        *,
        objective: str | None = None,
        subset: str | None = None,
        chat: bool = False,
    ) -> None:
        given = dict(columns or {})
        self._labels = {
            name: value for name, value in (("objective", objective), ("subset", subset)) if value is not None
        }
        for name in given:
            if name not in FIELDS:
                swapped = f" Write columns={{field: column}}: {{{given[name]!r}: {name!r}}}."
                raise OptionError(
                    f"columns: expected fields of a pair as keys, one of {list(FIELDS)}, got {name!r}."
                    + (swapped if given[name] in FIELDS else nearest(name, FIELDS) or _EXAMPLE)
                )
            if name in self._labels:
                raise OptionError(
                    f"{name}: expected either {name}=... or a column for it in columns, got both. Pass one of them."
                )
        self._named = {name: column for name, column in given.items() if column is not None}
        self._columns: dict[str, str] = {name: name for name in FIELDS if name not in given} | self._named
        self._chat = chat
        self._present: list[str] = []
        self._absent = set(self._named.values())
        self._n_texts = self._n_doubled = 0

    @property
    def sides(self) -> tuple[str, ...]:
        """The columns of the responses, which the header of a table must have."""
        return tuple(self._columns.get(name, name) for name in SIDES)

    def __call__(self, row: Any, where: str) -> list[PreferencePair]:
        """The pair of a row (a mapping, or a line of JSON); raises `DataError` naming `where` and the field."""
        return [self.read(row, where)]

    def read(self, row: Any, where: str) -> PreferencePair:
        """The pair of a row."""
        if isinstance(row, DataError):
            raise row
        row = parse_json(row, where) if isinstance(row, bytes) else row
        if not isinstance(row, Mapping):
            raise DataError(
                f"{where}: expected a JSON object with 'prompt', 'chosen' and 'rejected', got {type(row).__name__}."
            )
        self._present = self._present or sorted(map(str, row))
        self._absent.difference_update(row)
        fields = self._fields(row, where)
        prompt, chosen, rejected = self._sides(fields, row, where)
        labels = {name: label(fields.get(name)) for name in _LABELS} | self._labels
        tools = tools_text(fields.get("tools"), where)
        pair = PreferencePair(
            prompt,
            chosen,
            rejected,
            objective=labels["objective"],
            subset=labels["subset"],
            id=labels["id"] or "",
            item=labels["item"],
            tools=tools,
            labels=self._other_labels(row),
        )
        if self._chat and not pair.is_chat:
            try:
                pair = pair.as_chat()
            except DataError as error:
                raise DataError(f"{where}: {error}") from error
        pair = with_system(pair, fields.get("system"), where)
        require_responses(pair, where)
        return pair

    def finish(self) -> None:
        """Check the whole source: an error for a column that no row had, a warning for prompts that are read twice."""
        if self._present and self._absent:
            hints = (
                self._other_column(name, self._present) for name in self._named if self._named[name] in self._absent
            )
            raise OptionError(
                f"columns: expected the columns {sorted(self._absent)}, which no row has; the first row has "
                f"{self._present}." + "".join(hints)
            )
        if self._n_doubled:
            warnings.warn(
                f"prompt: in {self._n_doubled} of {self._n_texts} pairs both responses begin with the prompt's text, "
                "which is then read twice. If the responses are whole texts, do not read the prompt's column: "
                "columns={'prompt': None}.",
                RMTensionWarning,
                stacklevel=4,
            )

    # -- parts ---------------------------------------------------------------------------------------------------------

    def _fields(self, row: Mapping[str, Any], where: str) -> dict[str, Any]:
        """The fields that the row has, without missing labels and without a prompt that no column holds."""
        fields = {name: row[column] for name, column in self._columns.items() if column in row}
        if "prompt" not in fields and "prompt" not in self._named:
            before = parse_messages(row.get(_CONVERSATIONS), f"{where}: field {_CONVERSATIONS!r}")
            fields |= {"prompt": before} if is_messages(before) else {}
        for name in ("prompt", *SIDES):
            if name in fields or (name == "prompt" and name not in self._named):
                continue
            if name in self._named:
                missing = f"the column {self._named[name]!r} of the field {name!r} is missing"
            else:
                missing = f"field {name!r} is missing"
            message = f"{where}: {missing}; fields present: {sorted(map(str, row))}."
            raise DataError(message + self._other_column(name, map(str, row)))
        return {name: value for name, value in fields.items() if name in ("prompt", *SIDES) or not is_missing(value)}

    def _other_labels(self, row: Mapping[str, Any]) -> dict[str, str]:
        """The labels in columns that hold no field of the pair."""
        used = set(self._columns.values())
        others = {str(name): value for name, value in row.items() if name not in used}
        return {
            name: text
            for name, value in others.items()
            if can_be_label(name) and (text := other_label(value)) is not None
        }

    def _other_column(self, field: str, present: Iterable[str]) -> str:
        """A sentence that suggests a column for a field whose own is missing: the one with the nearest name."""
        plain = {name.strip().lower(): name for name in present if name not in self._columns.values()}
        if not plain:
            return ""
        wanted = self._columns[field].strip().lower()
        near = get_close_matches(wanted, plain, n=1) or [name for name in plain if wanted in name]
        column = repr(plain[near[0]]) if near else "..."
        return f" If it is in another column, name it: columns={{{field!r}: {column}}}."

    def _sides(self, fields: dict[str, Any], row: Mapping[str, Any], where: str) -> tuple[Any, Any, Any]:
        """Prompt, chosen and rejected of a row in any of the formats."""
        given: dict[str, Any] = {}
        for name in ("prompt", *SIDES):
            if name in fields:
                where_field = f"{where}: field {name!r}"
                value = parse_messages(fields[name], where_field)
                given[name] = read_chat(value, where_field) if is_messages(value) else value
        has_chats = any(isinstance(value, tuple) for value in given.values())
        if is_missing(given.get("prompt")) and (has_chats or _are_transcripts(given)):
            given.pop("prompt", None)
        for name, value in given.items():
            if not isinstance(value, str | tuple):
                is_number = isinstance(value, Number) and not is_missing(value)
                column = self._columns.get(name, name)
                raise DataError(
                    f"{where}: field {name!r} should be text or messages, got {type(value).__name__}."
                    + (f" Convert the column to text: frame.astype({{{column!r}: 'string'}})." if is_number else "")
                )
        chosen, rejected = given["chosen"], given["rejected"]
        if "prompt" not in given:
            if isinstance(chosen, tuple) and isinstance(rejected, tuple):
                prompt = shared_messages(chosen, rejected)
                if prompt:
                    return prompt, chosen[len(prompt) :], rejected[len(prompt) :]
                raise DataError(f"{where}: field 'prompt' is missing, and {_NOT_WHOLE}{self._advice(row)}")
            if has_chats:
                raise DataError(
                    f"{where}: field 'prompt' is missing, and only one of 'chosen' and 'rejected' has messages."
                    f"{self._advice(row)}"
                )
            return self._split(chosen, rejected, row, where)
        if not has_chats and _are_transcripts(given):
            shared, chosen, rejected = split_transcripts(chosen, rejected)
            require_contained(split_turns(shared), given["prompt"], where)
            return shared, chosen, rejected
        if not has_chats:
            self._n_texts += 1
            self._n_doubled += len(given["prompt"].split()) > 1 and all(
                side.startswith(given["prompt"]) for side in (chosen, rejected)
            )
            return given["prompt"], chosen, rejected
        return after_prompt(given["prompt"], chosen, rejected, where)

    def _split(self, chosen: str, rejected: str, row: Mapping[str, Any], where: str) -> tuple[str, str, str]:
        """Split two texts into prompt and responses, at the last shared turn of the assistant or the last shared space.

        Words are not cut: the prompt is the common beginning up to its last space. A common beginning is not used as
        the prompt if another column may hold the prompt, or if it would have to be a message.
        """
        try:
            return split_transcripts(chosen, rejected)
        except DataError:
            pass
        # The user said that no column holds the prompt: columns={"prompt": None}.
        candidates = self._candidates(row) if "prompt" in self._columns else []
        if candidates or self._chat:
            why = "" if candidates else " A chat needs messages, and a common beginning of two texts is not a message."
            raise DataError(f"{where}: field 'prompt' is missing.{why}{self._advice(row)}")
        prompt, *parts = _split_words(chosen, rejected)
        if not prompt.strip():
            raise DataError(
                f"{where}: field 'prompt' is missing, and 'chosen' and 'rejected' have no common beginning that could "
                f"be the prompt.{self._advice(row)}"
            )
        return prompt, parts[0], parts[1]

    def _candidates(self, row: Mapping[str, Any]) -> list[str]:
        """The columns that may hold the prompt: those with text or messages that no other field uses."""
        used = set(self._columns.values())
        return [
            str(name)
            for name, value in row.items()
            if name not in used
            and not str(name).startswith("__")
            and (is_messages(value) or (isinstance(value, str) and value.strip()))
        ]

    def _advice(self, row: Mapping[str, Any]) -> str:
        candidates = self._candidates(row)
        if not candidates:
            return f" Name the column that holds it, columns={{'prompt': ...}}; the row has {sorted(map(str, row))}."
        advice = (
            f" If the prompt is in one of the columns {candidates}, name it: columns={{'prompt': {candidates[0]!r}}}."
        )
        sides = (parse_messages(row.get(self._columns.get(name, name)), "") for name in SIDES)
        is_text = all(isinstance(side, str) for side in sides)
        return advice + (" If it is the beginning of both responses: columns={'prompt': None}." if is_text else "")


_EXAMPLE = ' columns maps a field to the column that it is in, for example {"prompt": "question"}.'
_NOT_WHOLE = "'chosen' and 'rejected' have no common first messages that could be the prompt."


def _are_transcripts(given: Mapping[str, Any]) -> bool:
    return all(isinstance(given[name], str) and is_transcript(given[name]) for name in SIDES)


def _split_words(chosen: str, rejected: str) -> tuple[str, str, str]:
    # At least one word is left for each response.
    shortest = min(len(chosen.rstrip()), len(rejected.rstrip()))
    shared = next((i for i in range(shortest) if chosen[i] != rejected[i]), shortest - 1)
    end = next((i for i in range(shared, 0, -1) if chosen[i - 1].isspace()), 0)
    prompt = chosen[:end]
    parts = chosen[end:], rejected[end:]
    if all(join_prompt(prompt[:-1], part) == prompt + part for part in parts):
        prompt = prompt[:-1]  # `join_prompt` inserts this space again
    return prompt, *parts
