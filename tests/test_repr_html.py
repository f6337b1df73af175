"""Results in a notebook: tables of their own values, with every text escaped, and no colours."""

import re
from dataclasses import replace
from html import unescape

import numpy as np
import pandas as pd
import pytest
import torch

from rmtension import (
    ActivationCollector,
    NeuronAttribution,
    NeuronSet,
    PreferencePairs,
    RewardHead,
    SharedNeuronAnalyzer,
    StudyResult,
)
from rmtension._repr_html import N_ROWS, html_table
from rmtension.evaluation import _metrics as evaluation

EVIL = "<script>alert('&')</script>"


def parsed(html):
    """(caption, columns, rows of texts) of what `_repr_html_` gives."""
    caption = unescape(re.search(r"<p>(.*?)</p>", html, re.DOTALL)[1])
    columns = [unescape(name) for name in re.findall(r"<th>(.*?)</th>", html)]
    rows = [
        [unescape(cell) for cell in re.findall(r"<td>(.*?)</td>", row)]
        for row in re.findall(r"<tr>(<td>.*?)</tr>", html)
    ]
    return caption, columns, rows


def same_values(html, frame):
    """Whether the table has these rows: numbers to four digits, texts exactly."""
    _, columns, rows = parsed(html)
    assert columns == list(frame.columns)
    assert len(rows) == len(frame)
    for row, expected in zip(rows, frame.astype(object).itertuples(index=False), strict=True):
        for cell, value in zip(row, expected, strict=True):
            if value is None or (isinstance(value, float) and np.isnan(value)):
                assert cell == ""
            elif isinstance(value, float):
                assert float(cell) == pytest.approx(value, rel=1e-3, abs=1e-12)
            else:
                assert cell == str(value)


@pytest.fixture(scope="module")
def evil_pairs(pairs):
    """The pairs, with ids, objectives and subsets that a browser would run."""
    rows = [pair.to_dict() for pair in pairs]
    made = [row | {"id": f"{EVIL}{n}", "objective": EVIL, "subset": f'"{EVIL}"'} for n, row in enumerate(rows)]
    return PreferencePairs.from_records(made)


@pytest.fixture(scope="module")
def scored(head, evil_pairs):
    return head.score_pairs(evil_pairs)


@pytest.fixture(scope="module")
def scores(head, evil_pairs):
    return NeuronAttribution(head, method="gradient_x_activation").score(evil_pairs)


def shown(scored, scores, head, pairs):
    """Everything that has a table, with a text in it that has to be escaped wherever there is a place for one."""
    evil = replace(scores.provenance, architecture=EVIL, site=EVIL, method=EVIL, positions=EVIL)
    stats = ActivationCollector(head).collect(pairs)
    frame = pd.DataFrame({"family": [EVIL], "seed": [0], EVIL: [EVIL]})
    summary = {"families": [{"family": EVIL, "seed": 0}], "pairs": {EVIL: {"evaluating": 24}}}
    return {
        "PairRewards": scored,
        "NeuronScores": replace(scores, provenance=evil),
        "ActivationStatistics": replace(stats, provenance=replace(stats.provenance, architecture=EVIL)),
        "NeuronSet": NeuronSet(scores.top(k=9).mask, EVIL, EVIL),
        "SharedNeuronReport": SharedNeuronAnalyzer({EVIL: scores, "other": scores}).analyze(fraction=0.1),
        "StudyResult": StudyResult(tables={EVIL: frame}, summary=summary),
    }


def test_texts_are_escaped_and_nothing_has_a_colour(scored, scores, head, evil_pairs):
    for name, result in shown(scored, scores, head, evil_pairs).items():
        html = result._repr_html_()
        assert "<script" not in html, name
        assert "&lt;script&gt;" in html, name
        assert set(re.findall(r"</?(\w+)", html)) <= {"div", "p", "table", "thead", "tbody", "tr", "th", "td"}
        assert not re.search(r"<\w+ ", html), f"{name}: attributes, which might be styles"
        assert len(html) < 5000
        assert parsed(html)[0].startswith(name)


def test_missing_escapes_are_detected(scored):
    html = scored._repr_html_().replace("&lt;", "<")
    assert "<script" in html


def test_scored_pairs_show_their_first_rows_and_accuracy(scored):
    html = scored._repr_html_()
    same_values(html, scored.to_frame()[:N_ROWS])
    caption = parsed(html)[0]
    assert f"accuracy {evaluation.accuracy(scored)}, mean margin {evaluation.mean_margin(scored)}" in caption
    assert f"{len(scored)} pairs of {len(scored.pairs.prompts)} prompts" in caption
    assert f"{N_ROWS} of {len(scored)} rows" in html
    assert "no pairs" in scored.take([])._repr_html_()


def test_scores_show_their_highest_neurons(scores):
    frame = scores.to_frame()
    order = np.argsort(-frame["score"].abs().to_numpy(), kind="stable")[:N_ROWS]
    same_values(scores._repr_html_(), frame.iloc[order])
    assert parsed(scores._repr_html_())[0].startswith(repr(scores))
    # A missing standard error is an empty cell, and a NaN score comes last.
    values = scores.values.clone()  # noqa: PD011 - a tensor
    values[0, 0] = torch.nan
    broken = replace(scores, values=values, stderr=torch.full_like(values, torch.nan))
    _, _, rows = parsed(broken._repr_html_())
    assert [row[3] for row in rows] == [""] * N_ROWS
    assert ["0", "0"] not in [row[:2] for row in rows]


def test_statistics_show_the_most_active_neurons(head, pairs):
    stats = ActivationCollector(head).collect(pairs)
    same_values(stats._repr_html_(), stats.to_frame().nlargest(N_ROWS, "abs_mean"))
    assert f"{len(pairs)} pairs, {stats.n_tokens} tokens" in parsed(stats._repr_html_())[0]


def test_a_set_lists_its_first_neurons(scores):
    neurons = scores.top(fraction=0.5)
    _, columns, rows = parsed(neurons._repr_html_())
    assert columns == ["layer", "n", "neurons"]
    assert [int(row[1]) for row in rows] == [n for n in neurons.n_per_layer if n]
    for layer, n, listed in rows:
        listed_neurons = listed.removesuffix(", ...").split(", ")
        assert len(listed_neurons) == min(int(n), 12)
        assert listed.endswith("...") == (int(n) > 12)
        assert all((int(layer), int(neuron_text)) in neurons for neuron_text in listed_neurons)
    assert "table" not in (neurons - neurons)._repr_html_()
    deep = NeuronSet(torch.ones(40, 1, dtype=torch.bool), "mlp", "deep")
    assert "12 of 40 rows" in deep._repr_html_()


def test_an_overlap_shows_its_numbers(scores):
    other = replace(scores, values=scores.values.flip(1))  # noqa: PD011 - a tensor
    report = SharedNeuronAnalyzer({"one": scores, "other": other}, base=scores).analyze(fraction=0.1)
    html = report._repr_html_()
    same_values(html, report.to_frame()[parsed(html)[1]])
    assert f"{len(report.shared)} neurons in all" in parsed(html)[0]
    assert {"jaccard", "expected_jaccard", "p_value"} < set(parsed(html)[1])


def test_estimates_and_comparisons_show_their_intervals(scored):
    estimate = evaluation.mean_margin(scored)
    same_values(estimate._repr_html_(), pd.DataFrame([estimate.to_dict()]))
    comparison = evaluation.compare(scored, scored)
    same_values(comparison._repr_html_(), pd.DataFrame([evaluation.comparison_row(comparison)]))


def test_a_study_shows_its_tables(head, pairs):
    result = StudyResult(
        tables={"accuracy": pd.DataFrame({"family": ["toy"], "seed": [0], "value": [0.5]})}, summary={}
    )
    assert parsed(result._repr_html_())[2] == [["accuracy", "1", "family, seed, value"]]
    wide = StudyResult(tables={"neurons": pd.DataFrame({f"c{n}": [n] for n in range(40)})}, summary={})
    assert parsed(wide._repr_html_())[2][0][2].endswith("c11, ...")


def test_values_of_every_kind_are_formatted():
    frame = pd.DataFrame(
        {
            EVIL: [None, "a", pd.NA],
            "x": [np.nan, 12345.678, -0.0001],
            "n": [1, 2, 10**7],
            "b": [True, False, True],
        }
    )
    assert parsed(html_table(EVIL, frame)) == (
        EVIL,
        [EVIL, "x", "n", "b"],
        [["", "", "1", "True"], ["a", "1.235e+04", "2", "False"], ["", "-0.0001", "10000000", "True"]],
    )
    small = pd.DataFrame({"x": np.array([0.5, np.nan], dtype=np.float32)})
    assert parsed(html_table("", small))[2] == [["0.5"], [""]]


def test_a_head_has_no_html():
    """Its text says what it is."""
    assert not hasattr(RewardHead, "_repr_html_")
