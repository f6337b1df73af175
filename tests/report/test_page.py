"""The page for studies and models: the answer comes first, all text is escaped, tables are folded and become cards."""

import base64
import hashlib
import re

import numpy as np
import pandas as pd
import pytest
from hand_made import hand_made_study

from rmtension import StudyResult
from rmtension.report._answer import answer_note, answer_sentences
from rmtension.report._figures import Picture
from rmtension.report._html import study_page
from rmtension.report._main_findings import findings, unconcluded
from rmtension.report._page import (
    Answer,
    Dashboards,
    Folded,
    Page,
    PageSection,
    Reproduction,
    read_part,
    render_page,
    render_part,
)

HOSTILE = "</style><script>alert(1)</script><img src=x onerror=alert(2)>"
# Words that a sentence of the answer must not use: the reader judges.
VERDICTS = ("significant", "prove", "success", "confirm", "clearly", "fail", "unfortunately", "robust")


@pytest.fixture(scope="module")
def whole():
    """A page with every part, and a hostile text in every place."""
    picture = Picture(f"{HOSTILE}.png", HOSTILE, HOSTILE, b"png", (8.0, 4.0))
    table = pd.DataFrame({f"a {HOSTILE}": [HOSTILE, "x"], "b": [1, 2]})
    return Page(
        HOSTILE,
        Answer([HOSTILE, "second"], picture, HOSTILE, table, HOSTILE, [Folded(HOSTILE, [HOSTILE])]),
        [
            PageSection(HOSTILE, HOSTILE, [HOSTILE], [picture], table),
            PageSection(HOSTILE, table=table.iloc[:1], is_open=True),
        ],
        question=HOSTILE,
        warnings=[HOSTILE],
        dashboards=Dashboards("<p>made elsewhere</p>", style="p { margin: 0; }", script='"use strict";'),
        provenance=Reproduction(HOSTILE, HOSTILE, HOSTILE, table),
    )


def test_no_text_becomes_markup(whole):
    text = render_page(whole)
    assert "<script>alert" not in text
    assert "<img src=x" not in text
    assert text.count("&lt;script&gt;alert(1)") >= 15
    # The negative control: the HTML of dashboards is written as it is.
    assert "<p>made elsewhere</p>" in text


def test_the_policy_allows_the_scripts_and_styles_of_the_page_by_their_hashes(whole):
    text = render_page(whole)
    policy = re.search(r'Content-Security-Policy" content="([^"]*)"', text)[1].replace("&#39;", "'")
    for kind, tag in (("script", "script"), ("style", "style")):
        found = re.findall(rf"<{tag}>(.*?)</{tag}>", text, re.DOTALL)
        hashes = [base64.b64encode(hashlib.sha256(one.encode()).digest()).decode() for one in found]
        assert len(hashes) == 2
        assert re.search(rf"{kind}-src ([^;]*)", policy)[1].split() == [f"'sha256-{one}'" for one in hashes]
    assert policy.startswith("default-src 'none'; img-src data:; ")
    assert not re.search(r"\son\w+=|\sstyle=|https?://", re.sub(r"&lt;.*?&gt;", "", text.partition("<body>")[2]))


def test_the_answer_comes_before_everything_else(whole):
    body = render_page(whole).partition('<div class="page">')[2]
    order = ['class="warnings"', 'class="sentences"', "<img", '<details class="fold">', '<h2 id="s1', 'id="dashboards"']
    places = [body.index(part) for part in [*order, 'id="provenance"']]
    assert places == sorted(places)


def test_every_entry_of_the_contents_has_its_section(whole):
    text = render_page(whole)
    targets = re.findall(r'<li><a href="#([^"]+)">', text)
    ids = re.findall(r'<h2 id="([^"]+)">', text)
    assert targets == ids
    assert len(set(ids)) == len(ids) == 5, "sections of one title have their own ids"


def test_tables_are_folded_and_every_cell_has_the_name_of_its_column(whole):
    text = render_page(whole)
    assert text.count('<details class="fold" open>') == 1, "only the section that is open"
    assert text.count('<details class="fold">') == 5
    assert len(re.findall(r'<td role="cell" data-label="b">', text)) == 4 + 2 + 1
    # On a phone the names are shown from these attributes.
    assert "content: attr(data-label)" in read_part("page.css")


def test_a_page_of_an_answer_alone_is_complete():
    text = render_page(Page("Title", Answer(["One sentence."])))
    assert re.findall(r"<h2 id=\"(\w+)\"", text) == ["answer"]
    for part in ("<table", "<img", 'class="warnings"', "provenance", "dashboards"):
        assert part not in text.partition("<body>")[2]


def test_an_unknown_value_of_a_part_is_an_error():
    with pytest.raises(Exception, match="undefined"):
        render_part("page.html")


# -- the answer of a study ---------------------------------------------------------------------------------------------


def with_own_top(study, **values):
    """The study with the rows of "harmless only" as the mixed model's own top set."""
    tables = dict(study.tables)
    for name in ("ablation", "collapse"):
        rows = (
            tables[name]
            .query("set == 'harmless only'")
            .assign(set="mixed top", **(values if name == "ablation" else {}))
        )
        tables[name] = pd.concat([tables[name], rows], ignore_index=True)
    return StudyResult(tables, study.summary)


@pytest.fixture(scope="module")
def study():
    found = hand_made_study()
    one = {name: frame[frame["seed"] == 0] if "seed" in frame else frame for name, frame in found.tables.items()}
    return with_own_top(StudyResult(one, found.summary | {"families": found.summary["families"][:1]}))


def numbers(text):
    return [float(number) for number in re.findall(r"[+-]?\d+\.\d+", text)]


def test_sentences_have_the_numbers_of_the_tables(study):
    own, shared, cost, *_ = answer_sentences(study)
    for name, sentence in (("mixed top", own), ("shared", shared)):
        rows = study.ablation.query(f"set == '{name}' and quantity == 'margin' and control == 'layer'")
        rows = rows.set_index("objective")
        expected = []
        for objective in ("helpful", "harmless"):
            row = rows.loc[objective]
            expected += [row["before"], row["before"] + row["effect"]] if name == "mixed top" else [row["effect"]]
        expected += rows["random_effect"].loc[["helpful", "harmless"]].tolist()
        for objective in ("helpful", "harmless"):
            expected += rows.loc[objective, ["beyond_random", "beyond_low", "beyond_high"]].tolist()
        np.testing.assert_allclose(numbers(sentence), expected, atol=0.0051)
        assert f"{rows['size'].iloc[0]} neurons" in sentence
    row = study.comparisons.query("second == 'helpful' and objective == 'helpful' and subset == 'all'").iloc[0]
    np.testing.assert_allclose(numbers(cost)[2:5], 100 * row[["difference", "low", "high"]].astype(float), atol=0.051)


@pytest.mark.parametrize(
    ("low", "high", "said"),
    [(-0.1, 0.1, "; both intervals contain 0)."), (0.1, 0.2, "])."), (0.0, 0.1, "; both intervals contain 0).")],
)
def test_the_sentences_say_when_an_effect_is_not_beyond_random(low, high, said):
    ends = {"beyond_random": (low + high) / 2, "beyond_low": low, "beyond_high": high}
    result = with_own_top(hand_made_study(), **ends)
    result = StudyResult(
        {name: frame.query("seed == 0") if "seed" in frame else frame for name, frame in result.tables.items()},
        result.summary | {"families": result.summary["families"][:1]},
    )
    assert answer_sentences(result)[0].endswith(said)


def test_an_interval_of_one_objective_that_contains_0_is_named(study):
    table = study.ablation.copy()
    chosen = table["set"].eq("mixed top") & table["quantity"].eq("margin")
    for objective, ends in (("helpful", (0.1, 0.2)), ("harmless", (-0.1, 0.2))):
        rows = chosen & table["objective"].eq(objective)
        table.loc[rows, ["beyond_random", "beyond_low", "beyond_high"]] = (0.15, *ends)
    sentence = answer_sentences(StudyResult(study.tables | {"ablation": table}, study.summary))[0]
    assert sentence.endswith("; the harmless interval contains 0).")
    table.loc[chosen & table["control"].eq("magnitude"), ["beyond_random", "beyond_low"]] = (0.05, -0.1)
    sentence = answer_sentences(StudyResult(study.tables | {"ablation": table}, study.summary))[0]
    of_set = table[table["set"].eq("mixed top") & table["control"].eq("magnitude")]
    means = "{random_magnitude:.3g}, the set's {set_magnitude:.3g}".format(**of_set.iloc[0])
    assert (
        f"; the harmless interval contains 0; beyond random sets of the nearest magnitudes (mean {means}), the change "
        "is +0.05 " in sentence
    )
    assert sentence.endswith(" on helpful pairs).")


def test_several_seeds_are_counted_one_by_one():
    """The mean over seeds has a wide interval if they differ, also if every seed alone excludes 0."""
    result = with_own_top(hand_made_study())
    table = result.ablation.copy()
    for seed, helpful, harmless in ((0, -3.0, 0.1), (1, -1.8, -2.0), (2, -0.5, 0.1)):
        for objective, value in (("helpful", helpful), ("harmless", harmless)):
            rows = table["set"].eq("mixed top") & table["seed"].eq(seed) & table["objective"].eq(objective)
            table.loc[rows, ["beyond_random", "beyond_low", "beyond_high"]] = (value, value - 0.2, value + 0.2)
    sentence = answer_sentences(StudyResult(result.tables | {"ablation": table}, result.summary))[0]
    assert sentence.endswith(
        "; both intervals contain 0; the interval beyond random of a single seed excludes 0 in 3 (helpful) and "
        "1 (harmless) of 3 seeds)."
    )


def test_a_set_without_control_or_without_neurons_is_said(study):
    table = study.ablation.copy()
    table.loc[table["set"] == "mixed top", "random_effect"] = np.nan
    table.loc[table["set"] == "shared", "size"] = 0
    own, shared, *_ = answer_sentences(StudyResult(study.tables | {"ablation": table}, study.summary))
    assert own.endswith("too few neurons are left for random sets of this size, so there is no control.")
    assert shared == "No neuron is in the top sets of both specialists, so there are no shared neurons to ablate."


def test_numbers_are_of_the_seeds_that_have_random_sets():
    """The set of seed 1 fills a layer: all numbers of the sentence are of seeds 0 and 2, and the page says so."""
    result = with_own_top(hand_made_study())
    table = result.ablation.copy()
    rows = table["set"].eq("mixed top") & table["seed"].eq(1)
    table.loc[rows, ["random_effect", "beyond_random", "beyond_low", "beyond_high"]] = np.nan
    failed = StudyResult(result.tables | {"ablation": table}, result.summary)
    others = StudyResult(result.tables | {"ablation": table[~rows]}, result.summary)
    assert answer_sentences(failed)[0] == answer_sentences(others)[0] != answer_sentences(result)[0]
    assert [str(one) for one in findings(failed)] == [str(one) for one in findings(others)]
    said = [line for line in unconcluded(failed, findings(failed)) if "'mixed top' of seed 1, too few other" in line]
    assert len(said) == table["control"].nunique()


def test_nothing_is_found_about_an_empty_set_or_without_a_control(study):
    table = study.ablation.copy()
    table.loc[table["set"] == "mixed top", ["random_effect", "beyond_random", "beyond_low", "beyond_high"]] = np.nan
    table.loc[table["set"] == "shared", "size"] = 0
    collapse = study.collapse.assign(size=study.collapse["size"].where(study.collapse["set"] != "shared", 0))
    result = StudyResult(study.tables | {"ablation": table, "collapse": collapse}, study.summary)
    listed = findings(result)
    assert not [one for one in listed if "margin" in one.quantity]
    assert [one for one in findings(study) if "margin" in one.quantity]
    lines = " ".join(unconcluded(result, listed))
    assert "The set 'shared' has no neurons, so nothing was ablated." in lines
    assert "nan" not in lines


def test_sentences_use_no_verdict_words_and_no_negative_zero(study):
    text = " ".join([*answer_sentences(study), answer_note(study)]).lower()
    assert not [word for word in VERDICTS if word in text]
    assert not re.search(r"-0\.0+\b", text)


def test_a_study_of_one_table_has_the_sentences_of_its_table(study):
    only = {name: StudyResult({name: study.tables[name]}, study.summary) for name in ("overlap", "collapse", "depth")}
    assert [len(answer_sentences(result)) for result in only.values()] == [1, 1, 0]
    assert "share" in answer_sentences(only["overlap"])[0]
    page = study_page(only["depth"], None)
    assert len(page.answer.sentences) == 1
    assert page.answer.table is None


def test_several_families_are_said(study):
    tables = {name: pd.concat([frame, frame.assign(family="other")]) for name, frame in study.tables.items()}
    families = [{"family": family, "seed": 0, "base": True} for family in ("tiny", "other")]
    result = StudyResult(tables, study.summary | {"families": families})
    assert answer_sentences(result) == answer_sentences(study)
    assert "are about the family tiny; the table has all 2" in answer_note(result)
    assert "family" not in answer_note(study)
