"""A hook of the documentation's build: adds every notebook of `examples/` as a page with its saved outputs.

Nothing is run. Cells of text become the page's text, cells of code become blocks, tables stay tables, and pictures
become files. Links between notebooks, and from notebooks to pages, are changed to lead to pages.
"""

import base64
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

_FOLDER = "notebooks"


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages and pictures of all notebooks, and the notebooks themselves to download."""
    for path in sorted((Path(config.config_file_path).parent / "examples").glob("*.ipynb")):
        text, pictures = page_of(json.loads(path.read_text(encoding="utf-8")), path.stem)
        files.append(File.generated(config, f"{_FOLDER}/{path.stem}.md", content=text))
        files.append(File.generated(config, f"{_FOLDER}/{path.name}", abs_src_path=str(path)))
        for name, png in pictures.items():
            files.append(File.generated(config, f"{_FOLDER}/{name}", content=png))
    return files


def page_of(notebook: Mapping[str, Any], name: str) -> tuple[str, dict[str, bytes]]:
    """The Markdown of a notebook, and its pictures by file name."""
    parts: list[str] = []
    pictures: dict[str, bytes] = {}
    for cell in notebook["cells"]:
        source = _text(cell["source"])
        if cell["cell_type"] == "markdown":
            parts.append(_with_links_to_pages(source))
            if len(parts) == 1:
                parts.append(f"*A notebook, shown with its saved outputs: [download it]({name}.ipynb).*")
        elif cell["cell_type"] == "code":
            parts.append(_block("python", source))
            for output in cell["outputs"]:
                shown = _output(output, f"{name}-{len(pictures) + 1}.png", pictures)
                parts += [shown] if shown else []
    return "\n\n".join(parts) + "\n", pictures


def _output(output: Mapping[str, Any], picture: str, pictures: dict[str, bytes]) -> str:
    data = output.get("data", {})
    if "image/png" in data:
        pictures[picture] = base64.b64decode(_text(data["image/png"]))
        return f"![Figure that this cell draws]({picture})"
    if "text/html" in data:
        return _table(_text(data["text/html"]))
    text = _text(output.get("text", "") or data.get("text/plain", ""))
    return _block("text", text) if text.strip() else ""


def _table(html: str) -> str:
    """A table without the styles of pandas, so that the theme's apply, and without blank lines, which would end it."""
    plain = re.sub(r"<style.*?</style>", "", html, flags=re.DOTALL)
    plain = re.sub(r'<table border="\d" class="dataframe">', "<table>", plain)
    plain = re.sub(r'<tr style="[^"]*">', "<tr>", plain)
    return "\n".join(line.strip() for line in plain.splitlines() if line.strip())


def _block(kind: str, text: str) -> str:
    """A fenced block; the fence is longer than any in the text."""
    fence = "`" * max(3, 1 + max((len(run) for run in re.findall(r"`+", text)), default=0))
    end = "\n"
    return f"{fence}{kind}\n{text.rstrip(end)}\n{fence}"


def _with_links_to_pages(markdown: str) -> str:
    changed = re.sub(r"\]\((?!https?:)(\w+)\.ipynb", r"](\1.md", markdown)
    return re.sub(r"\]\(\.\./docs/", "](../", changed)


def _text(parts: str | list[str]) -> str:
    return parts if isinstance(parts, str) else "".join(parts)
