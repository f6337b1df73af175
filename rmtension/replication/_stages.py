"""The stages of a replication, and the seconds and passes that each took."""

import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pandas as pd

from rmtension.store._files import write_text

STAGES = (
    "base",
    "pairs",
    "plan",
    "models",
    "behaviour",
    "corrected rules",
    "published rules",
    "faithfulness",
    "neurons",
    "report",
)


class Clock:
    """The seconds of every stage, kept over interruptions, and the passes of this run."""

    def __init__(self, path: Path, tell: Callable[[str], object]) -> None:
        self._path, self._tell = path, tell
        self._seconds: dict[str, float] = json.loads(path.read_text()) if path.exists() else {}
        self._passes: dict[str, dict[str, int]] = {}

    @contextmanager
    def stage(self, name: str) -> Iterator[dict[str, int]]:
        """Time a stage; what it writes into the dict ("run", "read") is counted for it."""
        self._tell(f"stage {STAGES.index(name) + 1} of {len(STAGES)}: {name}")
        start = time.monotonic()
        passes = self._passes.setdefault(name, {"run": 0, "read": 0})
        try:
            yield passes
        finally:
            self._seconds[name] = self._seconds.get(name, 0.0) + time.monotonic() - start
            write_text(self._path, json.dumps(self._seconds, indent=2) + "\n", "stages")

    def table(self) -> pd.DataFrame:
        """One row per stage."""
        return pd.DataFrame(
            [
                {"stage": name, "seconds": round(self._seconds[name], 1), **passes}
                for name, passes in self._passes.items()
            ]
        )
