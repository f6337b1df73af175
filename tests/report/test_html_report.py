"""The page of a study: numbers are those of its tables, texts are text, nothing is loaded, nothing else runs."""

import base64
import hashlib
import json
import re
from html.parser import HTMLParser

import numpy as np
import pytest
import torch
from hand_made import MODELS, hand_made_study
from tiny_models import make_pairs

from rmtension import NeuronSet, PreferencePairs, StudyResult
from rmtension.attribution import NeuronDashboards, neuron_dashboards
from rmtension.attribution._dashboard_words import number, number_with_interval, shown_token
from rmtension.report._answer import answer_sentences
from rmtension.report._every_format import write_report
from rmtension.report._figures import draw_pictures
from rmtension.report._finding import Finding
from rmtension.report._html import to_html
from rmtension.report._main_findings import findings, unconcluded
from rmtension.report._text import to_markdown

pytestmark = pytest.mark.grid  # whole programs

HOSTILE = "</script><script>alert(1)</script><img src=x onerror=alert(2)> &amp; \u2028 ]]>"


class Page(HTMLParser):
    """The elements of a page with their attributes, its tables, and the text of scripts and styles."""

    def __init__(self, text):
        super().__init__(convert_charrefs=True)
        self.elements, self.within, self.cells, self.rows = [], [], None, []
        self.text = {}
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        if tag in ("script", "style", "code"):
            self.within.append(tag)
        if tag == "tr":
            self.cells = []
        if tag in ("td", "th") and self.cells is not None:
            self.cells.append("")

    def handle_endtag(self, tag):
        if self.within and self.within[-1] == tag:
            self.within.pop()
        if tag == "tr":
            self.rows.append(self.cells)
            self.cells = None

    def handle_data(self, data):
        if self.within:
            self.text.setdefault(self.within[-1], []).append(data)
        elif self.cells:
            self.cells[-1] += data

    def of(self, tag):
        return [attributes for name, attributes in self.elements if name == tag]


@pytest.fixture(scope="module")
def result():
    study = hand_made_study()
    summary = {
        "version": "0.1.0",
        "options": {
            "analyses": ["accuracy", "overlap"], "scores": ["mean_difference"], "fraction": 0.1, "rank_by": "magnitude",
            "site": "mlp", "positions": "response", "cut_rule": "exact", "replacement": "mean", "n_draws": 8,
            "n_subsamples": 8, "tie_value": 0.5, "level": 0.95, "seed": 0,
        },
        "families": [{"family": HOSTILE, "seed": seed, "base": True} for seed in range(3)],
        "models": {f"{HOSTILE} 0": {"mixed": {"architecture": "toy", "model": "0123", "dtype": "float32"}}},
        "pairs": {
            name: {"scoring": 10, "evaluating": 12, "identical_responses": 0, "prompts_cut": None, "digest": "ab"}
            for name in ("helpful", "harmless")
        },
    }  # fmt: skip
    tables = {name: frame.assign(family=HOSTILE) for name, frame in study.tables.items()}
    return StudyResult(tables=tables, summary=summary)


@pytest.fixture
def bare(monkeypatch):
    """Draw no figures, to save time."""
    monkeypatch.setattr("rmtension.report._figures.can_draw_figures", lambda: False)


@pytest.fixture(scope="module")
def neurons(head):
    rows = [
        pair.to_dict() | {"chosen": pair.chosen + HOSTILE, "id": f"{HOSTILE}{number}"}
        for number, pair in enumerate(make_pairs(12))
    ]
    pairs = PreferencePairs.from_records(rows)
    mask = torch.zeros(3, 64, dtype=torch.bool)
    mask[0, 7] = mask[2, 5] = mask[2, 9] = True
    some = NeuronSet(mask, "mlp", head.architecture)
    return neuron_dashboards(head, some, {"helpful": pairs, "harmless": pairs[:8]}, n_examples=2)


@pytest.fixture(scope="module")
def page(result, neurons):
    """The page, with figures at low resolution to save time."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("rmtension.report._figures._DPI", 40)
        return to_html(result, draw_pictures(result), neurons=neurons)


def test_the_page_loads_nothing_and_runs_only_its_own_script(page):
    parsed = Page(page)
    (policy,) = (attributes["content"] for attributes in parsed.of("meta") if attributes.get("http-equiv"))
    assert policy.startswith("default-src 'none'; img-src data:;")
    data, *scripts = parsed.of("script")
    assert (data, scripts) == ({"type": "application/json", "id": "neuron-texts"}, [{}, {}])
    # The policy has the hashes of the page's own scripts and styles, and nothing else.
    for kind, texts in (("script", parsed.text["script"][1:]), ("style", parsed.text["style"])):
        digests = [base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() for text in texts]
        assert len(digests) == 2
        allowed = re.search(rf"{kind}-src ([^;]*)", policy)[1].split()
        assert allowed == [f"'sha256-{digest}'" for digest in digests]
    for tag, attributes in parsed.elements:
        assert not [name for name in attributes if name.startswith("on") or name == "style"], tag
        for name in ("src", "href", "action", "data", "srcset"):
            assert attributes.get(name, "#").startswith(("#", "data:image/png;base64,")), (tag, attributes[name])
    assert not parsed.of("link")
    assert not re.search(r"@import|url\(", "".join(parsed.text["style"]))
    assert len(parsed.of("img")) >= 10, "the page has the figures, and no image from the data"
    assert all(len(attributes["alt"]) > 20 for attributes in parsed.of("img"))
    assert len(page) < 5_000_000


def test_texts_of_the_data_never_become_markup(page, neurons):
    examples = json.loads(Page(page).text["script"][0])
    assert {name: len(of_neuron) for name, of_neuron in examples.items()} == {"L0 N7": 4, "L2 N5": 4, "L2 N9": 4}
    for example in neurons.examples:
        (kept,) = (
            shown
            for shown in examples[f"L{example.layer} N{example.neuron}"]
            if (shown["group"], shown["pair"]) == (example.group, example.pair)
        )
        assert "".join(example.chosen.tokens).endswith(HOSTILE)
        assert kept["chosen"]["tokens"] == [shown_token(token) for token in example.chosen.tokens]
        assert tuple(kept["chosen"]["activations"]) == example.chosen.activations
    assert "alert(1)</script>" not in page
    assert "<img src=x onerror=alert(2)>" in "".join(Page(page).text["code"]), "the text itself is shown"


def test_every_neuron_has_a_row_a_point_and_a_page(page, neurons):
    parsed = Page(page)
    rows = {cells[0]: cells for cells in parsed.rows if re.fullmatch(r"L\d+ N\d+", cells[0])}
    asked = neurons.table[neurons.table["set"] == "asked for"]
    assert list(rows)[:3] == ["L0 N7", "L2 N5", "L2 N9"]
    for _, row in asked.iterrows():
        cells = rows[f"L{row['layer']} N{row['neuron']}"]
        assert cells[1:3] == [number(row[f"{name}_score"]) for name in ("helpful", "harmless")]
        assert cells[3:5] == [
            number_with_interval(*(row[f"{name}_{end}"] for end in ("effect", "effect_low", "effect_high")))
            for name in ("helpful", "harmless")
        ]
        assert cells[5] == number(row["direct_weight"])
    # Every examined neuron has a page, and a link to it in the table and in the scatter.
    pages = [attributes["id"] for attributes in parsed.of("article")]
    links = {attributes["href"] for attributes in parsed.of("a") if attributes["href"].startswith("#neuron-")}
    assert pages == ["neuron-0-7", "neuron-2-5", "neuron-2-9"]
    assert links == {f"#{page_id}" for page_id in pages}


def test_the_scatter_is_to_scale(page, neurons):
    parsed = Page(page)
    circles = [(float(attributes["cx"]), float(attributes["cy"])) for attributes in parsed.of("circle")]
    frame = neurons.scatter.set_index(["layer", "neuron"])
    points = frame.loc[neurons.neurons][["helpful_score", "harmless_score"]].to_numpy()
    for axis, pixels in enumerate(zip(*circles, strict=True)):
        slope, start = np.polyfit(points[:, axis], pixels, 1)
        np.testing.assert_allclose(slope * points[:, axis] + start, pixels, atol=0.1)
        assert (slope > 0) == (axis == 0), "upwards is less in a picture's rows"
    (cloud,) = (attributes["d"] for attributes in parsed.of("path") if attributes["class"] == "cloud")
    assert cloud.count("M") == len(frame) == 3 * 64


def test_a_page_without_neurons_and_figures_is_complete(result, bare):
    text = to_html(result, draw_pictures(result))
    parsed = Page(text)
    assert len(parsed.of("script")) == 1
    assert text.count("sha256-") == 2
    assert not parsed.of("article")
    assert not parsed.of("img")
    assert "No figures: matplotlib is not installed" in text


def test_findings_are_the_tables_numbers(result, page):
    listed = findings(result)
    assert len(listed) == 7
    pooled = result.over_seeds("comparisons")
    for finding in listed[:2]:
        objective = finding.quantity.split()[-1].removesuffix("-only")
        same = {"first": "mixed", "second": objective, "objective": objective, "subset": "all"}
        (row,) = (row for _, row in pooled.iterrows() if all(row[name] == value for name, value in same.items()))
        assert (finding.value, finding.low, finding.high) == pytest.approx((row["difference"], row["low"], row["high"]))
    beyond = [finding for finding in listed if "beyond random (layer)" in finding.quantity]
    pooled = result.over_seeds("ablation")
    for finding, objective in zip(beyond, ("helpful", "harmless"), strict=True):
        rows = pooled[(pooled["set"] == "shared") & (pooled["objective"] == objective)]
        (row,) = (row for _, row in rows.iterrows() if (row["quantity"], row["control"]) == ("margin", "layer"))
        assert (finding.value, finding.low) == pytest.approx((row["beyond_random"], row["beyond_low"]))
    directions = ("not decided", "above 0", "below 0", "above 0.5", "below 0.5")
    shown = [cells for cells in Page(page).rows if cells[-1] in directions or cells[-1].startswith("not decided")]
    assert [cells[2] for cells in shown] == [finding.estimate for finding in listed]


@pytest.mark.parametrize(
    ("low", "high", "none", "is_open"),
    [(0.1, 0.2, 0.0, False), (-0.2, -0.1, 0.0, False), (-0.1, 0.1, 0.0, True), (0.0, 0.1, 0.0, True),
     (0.4, 0.6, 0.5, True), (0.51, 0.6, 0.5, False), (float("nan"), float("nan"), 0.0, True)],
)  # fmt: skip
def test_a_finding_is_open_if_its_interval_contains_no_difference(low, high, none, is_open):
    finding = Finding("f", "q", "x", 0.15, low, high, "c", "9", none)
    assert finding.is_open == is_open
    assert (finding.direction == "not decided") == is_open


@pytest.mark.parametrize(
    ("other", "direction"),
    [((0.01, 0.3), "above 0"), ((-0.1, 0.3), "not decided: above 0 by this control only"),
     ((-0.3, -0.1), "not decided: above 0 by this control only"), (None, "above 0"),
     ((float("nan"), float("nan")), "not decided: above 0 by this control only")],
)  # fmt: skip
def test_a_direction_holds_against_both_controls(other, direction):
    finding = Finding("f", "q", "x", 0.15, 0.1, 0.2, "c", "9", other=other)
    assert finding.direction == direction
    assert finding.is_open == direction.startswith("not decided")
    # An interval that contains 0 is open, whatever the other control says.
    around = Finding("f", "q", "x", 0.15, -0.1, 0.2, "c", "9", other=other)
    assert (around.direction, around.is_contested) == ("not decided", False)


def test_the_controls_of_an_ablation_are_compared_with_each_other(result):
    """The rows by layer and by magnitude of one set and objective carry each other's intervals."""
    ablation = result.tables["ablation"]
    by_magnitude = ablation["control"].eq("magnitude")
    assert by_magnitude.any()
    table = ablation.assign(beyond_random=0.15, beyond_low=0.1, beyond_high=0.2)
    table.loc[by_magnitude, "beyond_low"] = -0.1
    alone = {name: frame[frame["seed"] == 0] for name, frame in (result.tables | {"ablation": table}).items()}
    study = StudyResult(alone, result.summary | {"families": [{"family": HOSTILE, "seed": 0, "base": False}]})
    listed = findings(study)
    sides = {one.quantity: one.direction for one in listed if "beyond random" in one.quantity}
    assert sides == {
        "change of the margin beyond random (layer)": "not decided: above 0 by this control only",
        "change of the margin beyond random (magnitude)": "not decided",
    }
    contested = [one for one in listed if one.is_contested]
    assert contested
    lines = unconcluded(study, listed)
    assert sum("but the one against the other control is not on the same side" in line for line in lines) == len(
        contested
    )


def test_identical_models_are_not_an_open_question():
    """Their difference is 0 with a zero width, which contains 0 but leaves nothing to decide."""
    same = Finding("f", "q", "x", 0.0, 0.0, 0.0, "c", "9", identical=True)
    assert (same.is_open, same.direction) == (False, "identical models, the same rewards")
    exact = Finding("f", "q", "x", 0.0, 0.0, 0.0, "c", "9")
    assert (exact.is_open, exact.direction) == (False, "no difference in any pair")
    # Other models whose difference is 0 on average are not the same.
    assert Finding("f", "q", "x", 0.0, -0.1, 0.1, "c", "9").direction == "not decided"


def test_a_study_of_one_model_three_times_says_so(result, bare):
    one = {"architecture": "toy", "model": "01", "dtype": "float32"}
    models = {f"{HOSTILE} {seed}": dict.fromkeys(MODELS, one) for seed in range(3)}
    rows = result.tables["comparisons"].assign(difference=0.0, low=0.0, high=0.0)
    same = StudyResult(result.tables | {"comparisons": rows}, result.summary | {"models": models})
    text = to_html(same, None)
    assert sum(cells[-1] == "identical models, the same rewards" for cells in Page(text).rows) == 2
    assert "are the same model, so all three give the same rewards" in " ".join(answer_sentences(same))
    # One seed with another mixed model is enough to compare.
    other = models | {f"{HOSTILE} 1": models[f"{HOSTILE} 1"] | {"mixed": one | {"model": "02"}}}
    assert "the same rewards" not in to_html(StudyResult(same.tables, same.summary | {"models": other}), None)


def test_open_questions_are_listed(result):
    listed = findings(result)
    lines = unconcluded(result, listed)
    words = ("does not exclude", "against the other control", "questions about ablated sets", "no interval")
    questions = [line for line in lines if any(some in line for some in words)]
    assert len(questions) == sum(finding.is_open for finding in listed)
    assert any(line.startswith("These analyses were not run: transferability") for line in lines)
    one_seed = StudyResult(
        tables={name: frame[frame["seed"] == 0] for name, frame in result.tables.items()},
        summary=result.summary | {"families": [{"family": HOSTILE, "seed": 0, "base": False}]},
    )
    lines = unconcluded(one_seed, findings(one_seed))
    assert any(line.startswith("There is one seed") for line in lines)
    assert any(line.startswith("There is no base model") for line in lines)
    assert not any(
        line.startswith(("There is one seed", "There is no base model")) for line in unconcluded(result, listed)
    )


def test_the_code_of_the_page_compiles(result, page):
    """The code on the page compiles, and its options are those of the study."""
    code = "".join(Page(page).text["code"]).partition('{\n  "')[0]
    names = {}
    line = next(part for part in code.split("\n\n") if "options = " in part)
    options = line[line.index("options = StudyOptions(") : line.index("study = ")]
    compile(code, "code", "exec")
    exec(options, {"StudyOptions": lambda **given: names.update(given)})
    assert {name: list(value) if isinstance(value, tuple) else value for name, value in names.items()} == (
        result.summary["options"]
    )


def test_a_report_is_written_whole_or_not_at_all(result, neurons, bare, tmp_path):
    """A later report has neurons only if it gets them as an argument."""
    path = write_report(result, tmp_path, neurons=neurons)
    assert path == tmp_path / "report.html"
    assert path.read_text() == to_html(result, None, neurons=neurons)
    assert (tmp_path / "report.md").read_text() == to_markdown(result, None)
    kept = NeuronDashboards.load(tmp_path / "neurons.json")
    write_report(result, tmp_path / "again", neurons=kept)
    assert (tmp_path / "again" / "report.html").read_text() == path.read_text()
    write_report(result, tmp_path / "again")
    assert sorted(path.name for path in (tmp_path / "again").iterdir()) == ["report.html", "report.md"]
