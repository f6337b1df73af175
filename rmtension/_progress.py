"""Progress bars, drawn only in a terminal or a notebook."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from tqdm.auto import tqdm

from rmtension.distributed import current

# With progress=None, a bar appears after this many seconds.
_DELAY = 2.0


def is_watched() -> bool:
    """Whether stderr is a terminal, or this runs in a notebook."""
    interactive = sys.modules.get("IPython")
    shell = None if interactive is None else interactive.get_ipython()
    in_notebook = shell is not None and "IPKernelApp" in shell.config
    return in_notebook or (sys.stderr is not None and sys.stderr.isatty())


def shows_bars(progress: bool | None) -> bool:
    """Whether a call with this `progress` may draw a bar: only in the first process, in a terminal or a notebook."""
    return progress is not False and current().is_first and is_watched()


def progress_bar(iterable: Any = None, *, progress: bool | None, **options: Any) -> Any:
    """A bar of `tqdm.auto`; `options` are passed to it.

    `progress=True` draws it at once, None only after two seconds, False never.
    """
    delay = _DELAY if progress is None else 0.0
    return tqdm(iterable, disable=not shows_bars(progress), delay=delay, **options)


@contextmanager
def without_unseen_bars() -> Iterator[None]:
    """Disable the bars of transformers (and of the hub) outside a terminal or a notebook."""
    from transformers.utils import logging

    was_enabled = logging.is_progress_bar_enabled()
    if not was_enabled or is_watched():
        yield
        return
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.enable_progress_bar()
