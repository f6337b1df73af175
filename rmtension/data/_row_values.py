"""Values of a row beside the prompt and the responses: labels, tools and a system message."""

import re
from collections.abc import Mapping
from dataclasses import replace
from numbers import Number
from typing import Any

from rmtension.data._chat import Message, json_text
from rmtension.data._data_files import parse_json
from rmtension.data._pair import PreferencePair, is_missing
from rmtension.errors import DataError

# Longer texts, such as a second response, are content and not labels.
_LONGEST_LABEL = 80
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]")
_SKIP = 'Correct the row, or load with on_invalid="skip".'


def label(value: Any) -> str | None:
    """A label as text; None for a missing one."""
    if value is None or (isinstance(value, str) and not value):
        return None
    # In pandas, a column of whole numbers with missing values is a column of floats.
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    return str(value)


def other_label(value: Any) -> str | None:
    """A label of a column that is no field: a short text on one line, a number, or true or false."""
    if isinstance(value, str):
        return value if 0 < len(value) <= _LONGEST_LABEL and not _CONTROL.search(value) else None
    return label(value) if isinstance(value, Number) and not is_missing(value) else None


def tools_text(value: Any, where: str) -> str | None:
    """Tools as JSON text; data sets hold them as lists of schemas, or as JSON."""
    if isinstance(value, str):
        value = parse_json(value.encode("utf-8", "surrogatepass"), f"{where}: field 'tools'", _SKIP) if value else None
    if value is None or (hasattr(value, "__len__") and not len(value)):
        return None
    if isinstance(value, str | int | float | Mapping):
        raise DataError(f"{where}: field 'tools' should be a list of tools, got {type(value).__name__}. {_SKIP}")
    return json_text(list(value), f"{where}: field 'tools'")


def with_system(pair: PreferencePair, system: Any, where: str) -> PreferencePair:
    """The pair with a column's system message in front; raises `DataError` for tools or system with a plain prompt."""
    is_given = isinstance(system, str) and bool(system.strip())
    if not pair.is_chat:
        for name, is_set in (("tools", pair.tools is not None), ("system", is_given)):
            if is_set:
                raise DataError(
                    f"{where}: field {name!r} needs a chat template, but this prompt is plain text. Load with "
                    f"chat=True, or do not read the field: columns={{{name!r}: None}}."
                )
        return pair
    if not is_given:
        return pair
    own = [message.content for message in pair.prompt if isinstance(message, Message) and message.role == "system"]
    if own and own != [system]:
        raise DataError(
            f"{where}: field 'system' ({system[:60]!r}) differs from the conversation's own system message "
            f"({str(own[0])[:60]!r}). Correct one of them, or do not read the field: columns={{'system': None}}."
        )
    if own:
        return pair
    return replace(pair, prompt=(Message("system", system), *pair.prompt))
