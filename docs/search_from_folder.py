"""A hook of the documentation's build: search in pages that are opened from a folder, without a server.

Browsers neither fetch files nor start workers there. The index is written as a script too, which the theme then loads,
and `js/search_from_folder.js`, which runs the theme's worker in a frame, is loaded before the theme.
"""

import re
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.plugins import event_priority

_THEME = re.compile(r'<script src="([^"]*)assets/javascripts/bundle')


def on_post_page(output: str, **_: Any) -> str:
    """Load the script before the theme's."""
    theme = _THEME.search(output)
    if theme is None:
        raise ValueError("the theme's script was not found: compare docs/search_from_folder.py with the theme's pages")
    script = f'<script src="{theme[1]}js/search_from_folder.js"></script>\n      '
    return output[: theme.start()] + script + output[theme.start() :]


@event_priority(-100)  # after the search plugin has written the index
def on_post_build(config: MkDocsConfig) -> None:
    """Write the index as a script."""
    index = Path(config.site_dir) / "search" / "search_index.json"
    script = f"var __index = {index.read_text(encoding='utf-8')};\n"
    index.with_suffix(".js").write_text(script, encoding="utf-8")
