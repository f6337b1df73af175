"""The notebooks: every cell runs, and what was kept of an earlier run is whole, small and of these cells."""

import ast
import base64
import copy
import json
import re

import matplotlib
import pytest
from documented import ROOT, cells, limited
from tiny_models import grid

SECONDS = 60  # for a notebook, on a machine that does other things too; the longest takes 8
LARGEST = 250_000
NAMES = ("quickstart.ipynb", "shared_neurons.ipynb", "tension.ipynb", "faithfulness.ipynb", "export.ipynb")
ABSOLUTE = re.compile(r"""(?<![\w.:/<])(?:/(?:home|root|tmp|work|Users|usr|opt|mnt|var|private|srv)/|[A-Z]:\\)""")
PNG = b"\x89PNG\r\n\x1a\n"


def code_cells(notebook):
    return [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]


def read(name):
    return json.loads((ROOT / "examples" / name).read_text())


def text_of(parts):
    """Text of a cell or an output, which nbformat keeps as a text or as lines."""
    return parts if isinstance(parts, str) else "".join(parts)


def run(notebook, name):
    """Run the code cells in order in one namespace; what each shows as HTML or PNG at its end, as Jupyter would ask."""
    names = {"__name__": "__main__"}
    shown = []
    for number, cell in enumerate(code_cells(notebook)):
        tree = ast.parse(text_of(cell["source"]), f"{name}[{number}]")
        last = tree.body.pop() if tree.body and isinstance(tree.body[-1], ast.Expr) else None
        exec(compile(tree, f"{name}[{number}]", "exec"), names)
        value = None if last is None else eval(compile(ast.Expression(last.value), f"{name}[{number}]", "eval"), names)
        ways = {"text/html": "_repr_html_", "image/png": "_repr_png_"}
        shown.append({kind: getattr(value, way)() for kind, way in ways.items() if hasattr(value, way)})
    return shown


def kept(cell, kind):
    """The first output of that kind that was kept, or None."""
    shown = [output["data"][kind] for output in cell["outputs"] if kind in output.get("data", {})]
    return text_of(shown[0]) if shown else None


def heads(html):
    """The headers of a table's columns and rows, which are the same on every machine."""
    return None if html is None else re.findall(r"<th>(.*?)</th>", html)


def faults(notebook, size=0):
    """What is wrong with what a notebook keeps."""
    faults = [f"{size} bytes"] if size > LARGEST else []
    codes = code_cells(notebook)
    if [cell["execution_count"] for cell in codes] != list(range(1, len(codes) + 1)):
        faults.append("not run once from top to bottom")
    outputs = [output for cell in codes for output in cell["outputs"]]
    kinds = {kind for output in outputs for kind in output.get("data", {})}
    if "text/html" not in kinds:
        faults.append("no table kept")
    for output in outputs:
        if output["output_type"] == "error" or output.get("name") == "stderr":
            faults.append("an error, or a text that was none of the results")
    texts = [
        *(text_of(cell["source"]) for cell in notebook["cells"]),
        *(text_of(output.get("text", "")) for output in outputs),
        *(text_of(part) for entry in outputs for kind, part in entry.get("data", {}).items() if kind != "image/png"),
        json.dumps(notebook["metadata"]),
    ]
    faults += [f"an absolute path: {text[:40]}" for text in texts if ABSOLUTE.search(text)]
    for output in outputs:
        picture = output.get("data", {}).get("image/png")
        if picture and not base64.b64decode(text_of(picture)).startswith(PNG):
            faults.append("a damaged picture")
    return faults


def test_every_notebook_is_listed():
    assert sorted(path.name for path, _ in cells()) == sorted(NAMES)


@pytest.mark.parametrize("name", grid(NAMES))
def test_every_cell_runs_and_shows_what_was_kept(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    notebook = read(name)
    with limited(SECONDS, name), matplotlib.rc_context():
        matplotlib.use("agg")
        from matplotlib import pyplot as plt

        shown = run(notebook, name)
        plt.close("all")
    for cell, output in zip(code_cells(notebook), shown, strict=True):
        # Tables of other columns or rows, or none, would have been kept of other cells.
        assert heads(output.get("text/html")) == heads(kept(cell, "text/html"))
        if "image/png" in output:
            assert output["image/png"].startswith(PNG)
            assert kept(cell, "image/png")


@pytest.mark.parametrize("name", NAMES)
def test_kept_outputs_have_no_faults(name):
    notebook = read(name)
    assert faults(notebook, (ROOT / "examples" / name).stat().st_size) == []
    # Text between the cells explains the numbers, and the notebook begins with its title.
    assert text_of(notebook["cells"][0]["source"]).startswith("# ")
    words = [cell for cell in notebook["cells"] if cell["cell_type"] == "markdown"]
    assert len(words) >= 4


@pytest.mark.parametrize("name", NAMES)
def test_links_lead_somewhere(name):
    text = "\n".join(text_of(cell["source"]) for cell in read(name)["cells"] if cell["cell_type"] == "markdown")
    for link in re.findall(r"\]\((?!https?:)([^)#]+)", text):
        assert (ROOT / "examples" / link).exists(), link


def broken(change):
    notebook = copy.deepcopy(read("quickstart.ipynb"))
    change(notebook, next(cell for cell in code_cells(notebook) if kept(cell, "image/png")))
    return notebook


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        (lambda book, cell: cell.update(execution_count=None), "not run"),
        (lambda book, cell: cell["outputs"].append({"output_type": "error", "ename": "ValueError"}), "an error"),
        (
            lambda book, cell: cell["outputs"].append({"output_type": "stream", "name": "stderr", "text": "x"}),
            "an error",
        ),
        (lambda book, cell: cell.update(source=["open('/home/me/x')"]), "an absolute path"),
        (lambda book, cell: book["metadata"].update(path="C:\\Users"), "an absolute path"),
        (lambda book, cell: cell["outputs"][0]["data"].update({"image/png": "YWJj"}), "a damaged picture"),
        (lambda book, cell: [cell.update(outputs=[]) for cell in code_cells(book)], "no table kept"),
    ],
)
def test_a_fault_is_seen(change, fault):
    (reported,) = faults(broken(change))
    assert reported.startswith(fault)


def test_a_large_notebook_and_a_raising_cell_are_seen():
    assert faults(read("quickstart.ipynb"), LARGEST + 1) == [f"{LARGEST + 1} bytes"]
    raising = {"cells": [{"cell_type": "code", "source": ["x = 1\n", "x / 0"]}]}
    with pytest.raises(ZeroDivisionError):
        run(raising, "raising")
