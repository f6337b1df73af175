"""The outcome of a command: text, data, and an exit status."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Outcome:
    """The result of a command: `text` for people, `data` for programs (`--json`), and the exit status, 0 or 1."""

    text: str
    data: Mapping[str, Any]
    status: int = 0


def plain(value: Any) -> Any:
    """Convert a value for JSON: NaN and infinity become None, tuples become lists, paths become text.

    Examples:
        >>> plain({"low": float("nan"), "ids": ("a",)})
        {'low': None, 'ids': ['a']}
    """
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value if value is None or isinstance(value, bool | int | str) else str(value)
