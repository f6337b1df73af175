"""The hook that turns notebooks into pages of the site: nothing of a notebook is lost, and text stays text."""

import importlib.util
import json
import re

import pytest
from documented import ROOT

HAS_MKDOCS = importlib.util.find_spec("mkdocs") is not None
pytestmark = pytest.mark.skipif(not HAS_MKDOCS, reason="needs the extra 'docs'")
NOTEBOOKS = sorted((ROOT / "examples").glob("*.ipynb"))
PNG = "iVBORw0KGgo="


@pytest.fixture(scope="module")
def hook():
    spec = importlib.util.spec_from_file_location("notebook_pages", ROOT / "docs" / "notebook_pages.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def joined(parts):
    return parts if isinstance(parts, str) else "".join(parts)


def code(*outputs):
    return {"cell_type": "code", "source": ["x = 1\n", "x"], "outputs": list(outputs)}


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_every_cell_and_output_is_on_the_page(path, hook):
    notebook = json.loads(path.read_text())
    page, pictures = hook.page_of(notebook, path.stem)
    codes = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    on_page = re.findall(r"^```python\n(.*?)\n```$", page, re.DOTALL | re.MULTILINE)
    assert on_page == [joined(cell["source"]) for cell in codes]
    outputs = [output.get("data", {}) for cell in codes for output in cell["outputs"]]
    assert len(pictures) == sum("image/png" in data for data in outputs)
    assert all(f"]({name})" in page and png.startswith(b"\x89PNG") for name, png in pictures.items())
    shown = [data for data in outputs if "text/html" in data and "image/png" not in data]
    assert page.count("<table>") == sum(joined(data["text/html"]).count("<table") for data in shown)
    assert "<style" not in page
    assert ".ipynb)" not in page.replace(f"{path.stem}.ipynb)", "")


def test_links_lead_to_pages(hook):
    cell = {"cell_type": "markdown", "source": "[a](tension.ipynb) [b](../docs/pairs.md#x) [c](https://a.test/b.ipynb)"}
    page, _ = hook.page_of({"cells": [cell]}, "here")
    assert page.startswith("[a](tension.md) [b](../pairs.md#x) [c](https://a.test/b.ipynb)\n")


def test_outputs_are_shown_as_what_they_are(hook):
    picture = {"data": {"image/png": PNG, "text/plain": "<Figure>"}}
    table = {"data": {"text/html": '<table border="1" class="dataframe">\n\n<tr style="x"><td>1</td></tr></table>'}}
    text = {"output_type": "stream", "text": ["a <b>\n", "```\n"]}
    page, pictures = hook.page_of({"cells": [code(picture), code(table), code(text), code()]}, "here")
    assert pictures == {"here-1.png": b"\x89PNG\r\n\x1a\n"[:8]}
    assert "![Figure that this cell draws](here-1.png)" in page
    assert "<table>\n<tr><td>1</td></tr></table>" in page
    # The fence is longer than the text's own: markup in a text cannot leave its block.
    assert "````text\na <b>\n```\n````" in page
    assert page.count("```python") == 4
