"""The page of a repair: its findings, its figures and its tables, and names that stay text."""

import re
from dataclasses import replace

import pytest

from rmtension import Scale
from rmtension.repair import RepairReport, repair
from rmtension.report import write_report
from rmtension.synthetic import make_organism

pytestmark = pytest.mark.grid  # whole programs

ODD = "<script>alert(1)</script>"


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    organism = make_organism(tmp_path_factory.mktemp("organism") / "model", noise=0.05, n_pairs=120)
    damaged = organism.head().with_ablation(organism.truth["harmless"], Scale(-1.0))
    pairs = {ODD: organism.pairs["harmless"], "helpful": organism.pairs["helpful"]}
    return repair(damaged, pairs, "head refit", weak=ODD, strong="helpful", most_lost=0.1, progress=False).report


def visible(page):
    return re.sub(r"<(style|script).*?</\1>", "", page, flags=re.DOTALL)


def test_the_page_shows_findings_sections_and_code(report, tmp_path):
    page = write_report(report, tmp_path).read_text(encoding="utf-8")
    text = visible(page)
    for title in ("What the edit changed", "What was known before", "Every candidate", "Provenance"):
        assert f">{title}</h2>" in page
    assert ODD not in text
    closed = f"{report.closed.value:.3f} [{report.closed.low:.3f}, {report.closed.high:.3f}]"
    assert closed in text
    assert "shuffled labels" in text
    assert page.count("data:image/png") == 2, "no path where all candidates have as many numbers"
    assert "repair(head, pairs, &#39;head refit&#39;" in text


def test_the_page_says_that_nothing_was_edited(report, tmp_path):
    none = replace(report, edit={"kind": "gains", "numbers": 0, "made": False})
    text = visible(write_report(none, tmp_path).read_text(encoding="utf-8"))
    assert "Nothing was edited: of " in text


def test_the_page_of_a_loaded_report_is_the_same(report, tmp_path):
    report.save(tmp_path / "repair.json")
    pages = [
        write_report(of, tmp_path / "page").read_bytes() for of in (report, RepairReport.load(tmp_path / "repair.json"))
    ]
    assert pages[0] == pages[1]
