"""Silence messages of other libraries while a command runs."""

import logging
import sys
import warnings
from argparse import Namespace
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from tqdm.auto import tqdm

from rmtension.cli._commands.advice import with_flags
from rmtension.errors import RMTensionWarning


@contextmanager
def quiet_libraries(options: Namespace | None = None) -> Iterator[None]:
    """Show only warnings of this library, each once, one line each on stderr; restore all settings on exit.

    With the `options` of a command, warnings name its flags.
    """
    import transformers

    # Python's own record of what was shown is emptied whenever code inside enters `warnings.catch_warnings`.
    shown: set[str] = set()

    def show(message: Warning | str, *_: Any, **__: Any) -> None:
        text = str(message) if options is None else with_flags(str(message), options)
        if text in shown:
            return
        shown.add(text)
        # tqdm.write prints above a progress bar instead of into it.
        tqdm.write(f"rmtension: warning: {text}", file=sys.stderr)

    level = logging.root.manager.disable
    verbosity, bars = transformers.logging.get_verbosity(), transformers.logging.is_progress_bar_enabled()
    try:
        logging.disable(logging.WARNING)
        transformers.logging.set_verbosity_error()
        transformers.logging.disable_progress_bar()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            warnings.filterwarnings("default", category=RMTensionWarning)
            warnings.showwarning = show
            yield
    finally:
        logging.disable(level)
        transformers.logging.set_verbosity(verbosity)
        if bars:
            transformers.logging.enable_progress_bar()
