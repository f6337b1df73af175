"""The page of one inspected model: its answer, its sections, and texts of the data that stay text."""

import re

import pytest

from rmtension import RewardHead
from rmtension.report import write_report
from rmtension.study import ModelInspection, inspect_model
from rmtension.synthetic import make_organism

pytestmark = pytest.mark.grid  # whole programs

ODD = "<script>alert(1)</script>"


@pytest.fixture(scope="module")
def inspection(tmp_path_factory):
    organism = make_organism(tmp_path_factory.mktemp("organism") / "model", n_pairs=24)
    pairs = organism.pairs["helpful"] + organism.pairs["harmless"]
    head = RewardHead.from_pretrained(organism.folder)
    labels = [ODD if pair.objective == "helpful" else "harmless" for pair in pairs]
    return inspect_model(head, pairs, by=labels, fraction=0.03, progress=False)


@pytest.fixture(scope="module")
def page(inspection, tmp_path_factory):
    return write_report(inspection, tmp_path_factory.mktemp("page")).read_text(encoding="utf-8")


def visible(page):
    return re.sub(r"<(style|script).*?</\1>", "", page, flags=re.DOTALL)


def test_the_page_opens_with_the_findings(page, inspection):
    """Checks that fail come before them, as a warning."""
    sentences = inspection.findings()
    text = visible(page).replace("&lt;", "<").replace("&gt;", ">").replace("&#39;", "'")
    positions = [text.index(sentence) for sentence in sentences[:3]]
    assert positions == sorted(positions)
    assert positions[0] < text.index("Groups of pairs</h2>")


def test_every_section_is_there(page):
    for title in (
        "Groups of pairs",
        "Support and conflict",
        "How far the scores can be trusted",
        "Checks of this model",
        "Pairs and times",
        "Single neurons",
        "Provenance",
    ):
        assert f">{title}</h2>" in page


def test_names_of_groups_stay_text(page):
    assert ODD not in visible(page)
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in page


def test_the_page_loads_nothing(page):
    assert "default-src &#39;none&#39;" in page or "default-src 'none'" in page
    assert not re.search(r"(src|href)=\"(https?:)?//", page)


def test_a_failed_check_leads_the_page(inspection, tmp_path):
    checks = inspection.to_frame("checks").assign(passed=True)
    checks.loc[2, "passed"] = False
    failed = ModelInspection(
        dict(inspection.tables) | {"checks": checks}, inspection.scores, inspection.maps, None, None, inspection.summary
    )
    page = write_report(failed, tmp_path).read_text(encoding="utf-8")
    text = visible(page)
    assert text.index("checks of this model did not pass") < text.index("Ablating the ")
    assert "Single neurons" not in page


def test_a_saved_inspection_gives_the_same_page(inspection, page, tmp_path):
    """Figures are drawn again from the saved tables; the text is equal."""
    loaded = ModelInspection.load(inspection.save(tmp_path / "saved"))
    again = write_report(loaded, tmp_path / "page").read_text(encoding="utf-8")

    def text(html):
        return re.sub(r"data:image/png;base64,[^\"]*", "", visible(html))

    assert text(again) == text(page)
