"""Keeping the libraries underneath from talking between the lines of a command."""

import logging
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from tqdm.auto import tqdm

from rmtension.errors import RMTensionWarning


@contextmanager
def quiet_libraries() -> Iterator[None]:
    """Only warnings of this library are shown, a line each on stderr; afterwards everything is as it was."""
    import transformers

    level = logging.root.manager.disable
    verbosity, bars = transformers.logging.get_verbosity(), transformers.logging.is_progress_bar_enabled()
    try:
        logging.disable(logging.WARNING)
        transformers.logging.set_verbosity_error()
        transformers.logging.disable_progress_bar()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            warnings.filterwarnings("default", category=RMTensionWarning)
            warnings.showwarning = _show
            yield
    finally:
        logging.disable(level)
        transformers.logging.set_verbosity(verbosity)
        if bars:
            transformers.logging.enable_progress_bar()


def _show(message: Warning | str, *_: Any, **__: Any) -> None:
    # Above a progress bar, not through it.
    tqdm.write(f"rmtension: warning: {message}", file=sys.stderr)
