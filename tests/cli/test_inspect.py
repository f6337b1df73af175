"""`rmtension inspect`: the plan, the page, and errors that name flags."""

import csv
import json

import pytest

from rmtension.cli import main
from rmtension.synthetic import make_organism


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("inputs")
    organism = make_organism(folder / "model", n_pairs=24)
    rows = [(p.prompt, p.chosen, p.rejected, f"about {p.objective}") for part in organism.pairs.values() for p in part]
    with (folder / "pairs.csv").open("w", newline="") as file:
        csv.writer(file).writerows([("prompt", "chosen", "rejected", "category"), *rows])
    return str(folder / "model"), str(folder / "pairs.csv")


@pytest.mark.grid  # a whole program
def test_the_page_and_the_findings_are_written(inputs, tmp_path, capsys):
    out = tmp_path / "inspection"
    assert main(["inspect", *inputs, "--by", "category", "--fraction", "0.03", "--out", str(out)]) == 0
    printed, plan = capsys.readouterr()
    assert "Inspection of 48 pairs in 2 groups" in plan
    assert "Ablating the " in printed
    assert f"Page: {out / 'report.html'}" in printed
    assert (out / "effects.csv").exists()
    assert not (out / "work").exists()
    assert main(["inspect", *inputs, "--by", "category", "--out", str(out)]) == 2
    assert "--out" in capsys.readouterr().err


def test_the_plan_alone_runs_nothing(inputs, tmp_path, capsys):
    out = tmp_path / "inspection"
    assert main(["inspect", *inputs, "--by", "category", "--plan", "--json", "--out", str(out)]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["pairs"] == {"about helpful": 24, "about harmless": 24}
    assert not out.exists()


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (["--by", "categori"], "Did you mean 'category'"),
        (["--budget", "soon"], "budget: expected seconds or a text such as '90s'"),
        (["--budget", "0.001"], "the smallest inspection of these pairs takes about"),
        (["--fraction", "2"], "fraction: expected a share"),
        (["--columns", "prompt=question"], "question"),
    ],
)
def test_wrong_options_are_refused_before_anything_is_written(inputs, tmp_path, capsys, flags, expected):
    out = tmp_path / "inspection"
    assert main(["inspect", *inputs, "--by", "category", "--out", str(out), *flags]) == 2
    assert expected in capsys.readouterr().err
    assert not out.exists()
