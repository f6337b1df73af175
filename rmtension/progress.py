"""Progress bars: drawn where somebody can see one, and nowhere else."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from tqdm.auto import tqdm

from rmtension.distributed import current


def is_watched() -> bool:
    """Whether stderr is a terminal, or this runs in a notebook."""
    interactive = sys.modules.get("IPython")
    shell = None if interactive is None else interactive.get_ipython()
    in_notebook = shell is not None and "IPKernelApp" in shell.config
    return in_notebook or (sys.stderr is not None and sys.stderr.isatty())


def shows_bars(progress: bool) -> bool:
    """Whether a call with this `progress` draws a bar: where one was asked for and is watched, in the first process."""
    return progress and current().is_first and is_watched()


def progress_bar(iterable: Any = None, *, progress: bool, **options: Any) -> Any:
    """A bar of `tqdm.auto`, which takes `options`; silent where `shows_bars` says so."""
    return tqdm(iterable, disable=not shows_bars(progress), **options)


@contextmanager
def without_unseen_bars() -> Iterator[None]:
    """Where nobody watches, no bars of transformers (and of the hub) either."""
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
