"""Whether a built site can be read without a network.

    python tests/programs/built_site.py site

exits with 1 and names every page that would fetch a script, a style sheet, a font or a picture from another site.
"""

import re
import sys
from html.parser import HTMLParser
from pathlib import Path

# What a browser fetches without a click.
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
        self.addresses = []

    def handle_starttag(self, tag, attrs):
        known = dict(attrs)
        address = known.get(LOADED.get(tag, "")) or ""
        if re.match(r"(https?:)?//", address) and known.get("rel") not in NOT_FETCHED:
            self.addresses.append(address)


def fetched(text, *, style=False):
    """The addresses on other machines that a page, or a style sheet, loads from."""
    if style:
        return re.findall(r"url\(\s*[\"']?((?:https?:)?//[^)\"']+)|@import\s+[\"']((?:https?:)?//[^\"']+)", text)
    page = Loads()
    page.feed(text)
    return page.addresses


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    pages, styles = sorted(folder.rglob("*.html")), sorted(folder.rglob("*.css"))
    wrong = [(path, address) for path in pages for address in fetched(path.read_text())]
    wrong += [(path, address) for path in styles for address in fetched(path.read_text(), style=True)]
    for path, address in wrong:
        print(f"{path} loads {address}")
    if not pages:
        wrong.append("no page")
    print(f"{len(pages)} pages and {len(styles)} style sheets; {len(wrong)} loads from other sites")
    sys.exit(bool(wrong))
