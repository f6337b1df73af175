"""The page and the text of a study: what it has, in order, and nothing else."""

import html
import re

import numpy as np
import pandas as pd
import pytest
from hand_made import SETS, expected, hand_made, hand_made_study
from markdown_it import MarkdownIt
from matplotlib.figure import Figure

from rmtension import StudyResult
from rmtension.errors import OptionError, StorageError
from rmtension.report._every_format import write_report
from rmtension.report._figures import draw_pictures
from rmtension.report._tables import SECTIONS, readable_tables
from rmtension.report._text import notes, to_markdown, to_text
from rmtension.study._result import TABLES

# Table -> files of its figures.
FIGURES = {
    "accuracy": ["accuracy", "refuse_respond"],
    "subsets": ["radar"],
    "comparisons": ["comparisons"],
    "transferability": ["transferability"],
    "confidence": ["confidence"],
    "rewards": ["distributions"],
    "depth": ["depth"],
    "overlap": ["overlap"],
    "curves": ["curves_accuracy", "curves_margin"],
    "ablation": ["matrix_margin", "matrix_accuracy"],
    "equal_size": ["equal_size"],
    "collapse": ["collapse"],
}


@pytest.fixture(scope="module")
def study():
    return hand_made_study()


@pytest.fixture
def fast(monkeypatch):
    """Draw figures without rendering them, to save time."""

    monkeypatch.setattr(Figure, "savefig", lambda self, file, **options: None)


def only(study, *tables):
    return StudyResult({name: study.tables[name] for name in tables}, study.summary)


def headings(page):
    return [line[3:] for line in page.splitlines() if line.startswith("## ")]


def markdown(result):
    return to_markdown(result, draw_pictures(result))


def pictures(result):
    drawn = draw_pictures(result)
    return sorted(picture.name.removesuffix(".png") for of_table in drawn.values() for picture in of_table)


def test_every_table_of_a_study_has_a_section():
    assert sorted(section.table for section in SECTIONS) == sorted(TABLES)


def test_the_page_of_a_study_has_all_sections_and_figures(study, tmp_path, fast):
    assert write_report(study, tmp_path) == tmp_path / "report.html"
    text = (tmp_path / "report.md").read_text()
    assert headings(text) == [section.title for section in SECTIONS]
    names = sorted(path.stem for path in tmp_path.glob("*.png"))
    assert names == sorted(name for names in FIGURES.values() for name in names)
    for name in names:
        assert text.count(f"]({name}.png)") == 1
    for line in notes(study):
        assert f"- {line}" in text


@pytest.mark.parametrize("table", TABLES)
def test_a_study_of_one_table_has_only_its_section(study, table, fast):
    text = markdown(only(study, table))
    (section,) = [section for section in SECTIONS if section.table == table]
    assert headings(text) == [section.title]
    assert pictures(only(study, table)) == sorted(FIGURES.get(table, []))
    text_page = to_text(only(study, table))
    for other in SECTIONS:
        assert (f"\n{other.title}\n" in text_page) == (other is section)


def test_writing_a_report_again_gives_the_same_bytes(study, tmp_path):
    """Figures too do not depend on when or where they are drawn."""
    small = only(study, "transferability", "drift")
    for name in ("one", "two"):
        write_report(small, tmp_path / name)
    for name in ("report.html", "report.md", "transferability.png"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()


class TestReadableTables:
    def test_estimates_are_means_over_seeds_with_intervals(self, study):
        table = readable_tables(only(study, "comparisons"))["Mixed model minus specialists"]
        raw = study.comparisons.query("second == 'helpful' and objective == 'harmless' and subset == 'all'")
        ((value, low, high),) = expected(raw, ("subset",), "difference").values()
        row = table.query("minus == 'helpful' and `evaluated on` == 'harmless' and subset == 'all'").iloc[0]
        assert row["difference in accuracy [interval]"] == f"{value:+.3f} [{low:+.3f}, {high:+.3f}]"
        assert row["q"] == f"{raw['q_value'].max():.2g}"
        assert row["n"] == "45"

    def test_estimates_of_one_seed_are_those_of_the_table(self):
        single = hand_made(seeds=(4,))
        first = single.accuracy.iloc[0]
        row = readable_tables(only(single, "accuracy"))["Accuracy"].iloc[0]
        low, high = np.clip([first["low"], first["high"]], 0, 1)
        assert row["value [interval]"] == f"{first['value']:.3f} [{low:.3f}, {high:.3f}]"

    def test_effects_are_shown_with_their_controls(self, study):
        table = readable_tables(only(study, "ablation"))["Effect of sets on the mixed model"]
        assert len(table) == len(SETS) * 2 * 2 * 2
        raw = study.ablation.query("set == 'shared' and objective == 'helpful' and quantity == 'margin'")
        raw = raw.query("control == 'magnitude'")
        row = table.query("without == 'shared' and `evaluated on` == 'helpful' and quantity == 'margin'").iloc[1]
        assert row["random sets by"] == "magnitude"
        assert row["neurons"] == "7-9"
        assert row["change by random sets"] == f"{raw['random_effect'].mean():+.3f}"
        ((value, low, high),) = expected(raw, ("set",), "beyond_random", "beyond_low", "beyond_high").values()
        assert row["beyond random [interval]"] == f"{value:+.3f} [{low:+.3f}, {high:+.3f}]"

    def test_overlap_is_shown_with_its_floor_and_ceiling(self, study):
        table = readable_tables(only(study, "overlap"))["Overlap of top sets"]
        ceiling = table.query(
            "score == 'change' and kind == 'seeds' and set == 'mixed' and `without the base's top set` == 'yes'"
        )
        raw = study.overlap.query("score == 'change' and kind == 'seeds' and without_base")
        raw = raw[raw["a"].str.startswith("mixed")]
        value, low, high = raw[["jaccard", "jaccard_low", "jaccard_high"]].mean().clip(0, 1)
        assert ceiling["Jaccard [interval]"].tolist() == [f"{value:.3f} [{low:.3f}, {high:.3f}]"]
        either = table.query("kind == 'three-way'")["Jaccard [interval]"]
        assert not either.str.contains(r"\[").any(), "three-way indices have no interval"
        assert table["score"].tolist() == sorted(table["score"], key=["magnitude", "change"].index)

    def test_numbers_without_intervals_show_their_range(self, study):
        table = readable_tables(only(study, "drift", "sets"))
        assert table["Drift to chance"]["slope"].tolist() == ["-0.10 (-0.20 to -0.00)"] * 3
        assert table["Drift to chance"]["r"].tolist() == ["-"] * 3
        assert table["Top sets"]["score at the cut"].tolist() == ["0.25"] * 3

    def test_long_tables_are_replaced_by_their_file_name(self, study, fast):
        long = only(study, "neurons", "rewards", "curves")
        page, text = markdown(long), to_text(long)
        for name in long.tables:
            line = f"{len(study.tables[name])} rows, in `{name}.csv`, which `StudyResult.save` writes."
            assert line in page
            assert line in text
        many = pd.concat([study.subsets.assign(subset=study.subsets["subset"] + str(copy)) for copy in range(6)])
        result = StudyResult({"subsets": many}, study.summary)
        assert not readable_tables(result)
        assert f"{len(many)} rows, in `subsets.csv`" in to_text(result)

    def test_tables_without_rows_say_so(self, study):
        """For example, effects at equal size if the sets share no neuron."""
        result = StudyResult({"equal_size": study.equal_size.iloc[:0]}, study.summary)
        assert "No rows." in markdown(result)
        assert pictures(result) == []
        assert "No rows." in to_text(result)

    def test_a_table_without_a_column_is_refused(self, study, tmp_path):
        result = StudyResult({"drift": study.drift.drop(columns="slope")}, study.summary)
        with pytest.raises(OptionError, match=r"StudyResult.drift; \['slope'\]"):
            to_text(result)


def test_figures_that_need_more_than_a_row_are_left_out(study, fast):
    tables = {
        "accuracy": study.accuracy.query("measure != 'refusing'"),
        "subsets": study.subsets.query("objective == 'helpful'"),
    }
    assert pictures(StudyResult(tables, study.summary)) == ["accuracy"]


def test_pipes_and_line_breaks_stay_in_their_cells(study, fast):
    table = study.transferability.replace("transferability", "T | of\nboth")
    page = markdown(StudyResult({"transferability": table}, study.summary))
    rows = [line for line in page.splitlines() if line.startswith("|")]
    assert len(rows) == 2 + 2 * 5
    assert sum(r"T \| of both" in row for row in rows) == 2
    assert {row.replace(r"\|", "").count("|") for row in rows} == {5}


def test_every_family_has_its_own_figures(study, fast):
    """The file names of the families' figures differ, even if the names differ only in punctuation."""
    names = ["org/one", "org one", "[two]"]
    tables = {
        name: pd.concat([study.tables[name].assign(family=family) for family in names])
        for name in ("comparisons", "equal_size", "curves")
    }
    # The second family has no rows at equal size.
    tables["equal_size"] = tables["equal_size"].query("family != 'org one'")
    families = [{"family": family, "seed": seed, "base": family != "[two]"} for family in names for seed in range(3)]
    result = StudyResult(tables, study.summary | {"families": families})
    page = markdown(result)
    suffixes = ("-1-org-one", "-2-org-one", "-3--two-")
    figures = ("comparisons", "curves_accuracy", "curves_margin")
    drawn = [f"{figure}{suffix}" for figure in figures for suffix in suffixes]
    assert pictures(result) == sorted([*drawn, "equal_size-1-org-one", "equal_size-3--two-"])
    assert "![two: Accuracy of the mixed model minus that of a specialist](comparisons-3--two-.png)" in page
    table = readable_tables(result)["Mixed model minus specialists"]
    assert table["family"].value_counts().tolist() == [12, 12, 12]
    assert len(readable_tables(only(study, "comparisons"))["Mixed model minus specialists"]) == 12
    settings = notes(result)
    assert settings[1] == "Family org one: seeds 0, 1, 2; with the base model."
    assert settings[2] == "Family [two]: seeds 0, 1, 2; without the base model."


def test_notes_name_the_settings(study):
    settings = "\n".join(notes(study))
    assert (
        "Pairs, harmless: 90 score neurons, 90 others evaluate (0 with identical responses, 0 prompts cut)." in settings
    )
    assert "top 10% by magnitude, change (ranked by magnitude) at mlp, response tokens, rule 'exact'" in settings
    assert "Intervals: 95%, bootstrap over prompts; for means over seeds, widened" in settings
    assert to_text(only(study, "drift")).startswith(notes(study)[0])
    assert "widened" not in "\n".join(notes(hand_made(seeds=(0,))))


def test_a_folder_that_cannot_be_written_is_refused(study, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="could not be written"):
        write_report(only(study, "drift"), tmp_path / "file")


@pytest.mark.parametrize(
    "text",
    [
        *("<script>alert(1)</script>", "a | b", "[x](http://e)", "![x](http://e/i.png)"),
        *("`c`", "*b* __u__ ~~s~~", "$x$", "&lt;", "\\"),
    ],
)
def test_text_of_the_data_is_escaped(text, study, fast):
    """Names of subsets and families come from files. The rendered page shows them as they are."""
    tables = {"comparisons": study.tables["comparisons"].assign(family=text, subset=text)}
    families = [{"family": text, "seed": seed, "base": True} for seed in range(3)]
    page = markdown(StudyResult(tables, study.summary | {"families": families}))
    rendered = MarkdownIt("commonmark").enable(["table", "strikethrough"]).render(page)
    assert "<script" not in rendered
    assert "http://e" not in re.sub(r">[^<]*<", "><", rendered), "a link, or an image from elsewhere"
    assert html.unescape(re.sub(r"<[^>]+>", "", rendered)).count(text) >= 2
    cells = re.findall(r"<td[^>]*>(.*?)</td>", rendered)
    assert text in {html.unescape(re.sub(r"<[^>]+>", "", cell)) for cell in cells}
