"""Whether a built site can be read without a network: what its pages load, and from where.

    python tests/programs/built_site.py site

ends with 1 and names every page that would fetch a script, a style sheet, a font or a picture from elsewhere.
"""

import re
import sys
from html.parser import HTMLParser
from pathlib import Path

# What a browser fetches by itself; links that a reader follows are no such thing.
LOADED = {
    "script": "src",
    "img": "src",
    "iframe": "src",
    "source": "src",
    "video": "src",
    "audio": "src",
    "link": "href",
}
NOT_FETCHED = {"canonical", "prev", "next", "edit", "alternate"}


class Loads(HTMLParser):
    """Collects what a page loads from another machine."""

    def __init__(self):
        super().__init__()
        self.found = []

    def handle_starttag(self, tag, attrs):
        known = dict(attrs)
        address = known.get(LOADED.get(tag, "")) or ""
        if re.match(r"(https?:)?//", address) and known.get("rel") not in NOT_FETCHED:
            self.found.append(address)


def fetched(text, *, style=False):
    """The addresses on other machines that a page, or a style sheet, loads from."""
    if style:
        return re.findall(r"url\(\s*[\"']?((?:https?:)?//[^)\"']+)|@import\s+[\"']((?:https?:)?//[^\"']+)", text)
    page = Loads()
    page.feed(text)
    return page.found


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    pages, styles = sorted(folder.rglob("*.html")), sorted(folder.rglob("*.css"))
    wrong = [(path, one) for path in pages for one in fetched(path.read_text())]
    wrong += [(path, one) for path in styles for one in fetched(path.read_text(), style=True)]
    for path, one in wrong:
        print(f"{path} loads {one}")
    if not pages:
        wrong.append("no page")
    print(f"{len(pages)} pages and {len(styles)} style sheets; {len(wrong)} load from elsewhere")
    sys.exit(bool(wrong))
