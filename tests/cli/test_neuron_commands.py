"""`rmtension attribute` and `ablate`: their numbers against the library's, their files, and their errors."""

import json
import shutil
from pathlib import Path

import pandas as pd
import pytest
import torch

from rmtension import (
    ActivationCollector,
    Mean,
    NeuronAttribution,
    NeuronScores,
    NeuronSet,
    PreferencePairs,
    RewardHead,
    ablation_effects,
)
from rmtension.cli._command_line import main
from rmtension.errors import OptionError
from rmtension.synthetic import make_organism

COLUMNS = ("--columns", "prompt=question", "chosen=good", "rejected=bad")
MAPPED = {"prompt": "question", "chosen": "good", "rejected": "bad"}


@pytest.fixture(scope="module")
def organism(tmp_path_factory):
    """A model whose neurons are known, and its pairs as CSV with columns of other names and a category."""
    folder = tmp_path_factory.mktemp("organism")
    made = make_organism(folder / "model", depth=2, width=24, per_kind=2, n_pairs=12)
    both = (made.pairs["helpful"] + made.pairs["harmless"]).to_frame()
    names = {column: field for field, column in MAPPED.items()}
    frame = both.rename(columns={field: column for column, field in names.items()} | {"objective": "category"})
    frame[[*names, "category"]].to_csv(folder / "pairs.csv", index=False)
    return made, folder


@pytest.fixture
def here(organism, tmp_path, monkeypatch):
    """A folder to be in, with the model and the pairs."""
    monkeypatch.chdir(tmp_path)
    shutil.copy(organism[1] / "pairs.csv", "pairs.csv")
    Path("model").symlink_to(organism[1] / "model")
    return organism[0]


@pytest.fixture
def scored(here):
    """Scores in a file, as the library computes them."""
    head = RewardHead.from_pretrained("model")
    scores = NeuronAttribution(head, "gradient_x_activation").score(PreferencePairs.read("pairs.csv", columns=MAPPED))
    scores.save("scores.safetensors")
    return scores


def run(capsys, *words):
    """Status, stdout and stderr of a command."""
    status = main([str(word) for word in words])
    captured = capsys.readouterr()
    assert "Traceback" not in captured.err
    return status, captured.out, captured.err


def files():
    return {path.name for path in Path().iterdir()}


class TestAttribute:
    @pytest.mark.parametrize("options", [(), ("--replacement", "mean")])
    def test_defaults_are_those_of_neuron_attribution(self, options, here, capsys):
        head, pairs = RewardHead.from_pretrained("model"), PreferencePairs.read("pairs.csv", columns=MAPPED)
        means = {"replacement": Mean(ActivationCollector(head).collect(pairs))} if options else {}
        expected = NeuronAttribution(head, "attribution_patching", **means).score(pairs)
        status, out, err = run(capsys, "attribute", "model", "pairs.csv", *COLUMNS, "--k", 8, *options)
        assert (status, err) == (0, "")
        written = NeuronScores.load("scores.safetensors")
        pd.testing.assert_frame_equal(written.to_frame(), expected.to_frame(), check_exact=True)
        assert written.provenance == expected.provenance
        assert expected.to_frame()["score"].nunique() > 6, "equal scores would show nothing"

        table = pd.read_csv("scores.csv")
        assert set(zip(table["layer"], table["neuron"], strict=True)) == set(expected.top(k=8))
        assert table["score"].abs().is_monotonic_decreasing
        # The strongest are printed, in that order and with their standard errors.
        lines = out.splitlines()
        for line, row in zip(lines[2:10], table.itertuples(), strict=True):
            shown = [f"L{row.layer}", f"N{row.neuron}", f"{row.score:#.3g}", f"{row.stderr:#.2g}", row.direction]
            assert line.split() == shown
        assert lines[10] == "Scores written to scores.safetensors, the 8 top neurons to scores.csv."

    def test_the_neurons_of_one_label_are_those_made_for_it(self, here, capsys):
        words = (
            "attribute",
            "model",
            "pairs.csv",
            *COLUMNS,
            "--method",
            "gradient_x_activation",
            "--rank-by",
            "supports",
        )
        tops = {}
        for name in ("helpful", "harmless"):
            only = ("--only", f"category={name}", "--out", f"{name}.safetensors", "--k", 4, "--json")
            found = json.loads(run(capsys, *words, *only)[1])
            assert (found["n"], found["n_top"]) == (12, 4)
            tops[name] = {(row["layer"], row["neuron"]) for row in found["top"]}
            assert found["provenance"]["n_pairs"] == 12
        assert tops["harmless"] == set(here.truth["harmless"] | here.truth["shared"])
        assert tops["helpful"] != tops["harmless"]
        assert tops["helpful"] <= set(here.truth["helpful"] | here.truth["shared"] | here.truth["conflict"])

    def test_a_work_folder_resumes(self, here, capsys):
        words = ("attribute", "model", "pairs.csv", *COLUMNS, "--work", "work", "--overwrite", "--json")
        words += ("--replacement", "mean")
        assert run(capsys, *words) == run(capsys, *words)
        assert {"means", "scores"} <= {path.name for path in Path("work").iterdir()}


class TestAblate:
    def test_equals_ablation_effects(self, scored, capsys):
        head, pairs = RewardHead.from_pretrained("model"), PreferencePairs.read("pairs.csv", columns=MAPPED)
        expected = ablation_effects(head, scored.top(k=4), pairs, by="category", n_draws=3, seed=2)
        words = ("--neurons", "scores.safetensors", "--k", 4, "--by", "category", "--draws", 3, "--seed", 2)
        status, out, err = run(capsys, "ablate", "model", "pairs.csv", *COLUMNS, *words, "--table", "effects.csv")
        assert (status, err) == (0, "")
        pd.testing.assert_frame_equal(pd.read_csv("effects.csv"), expected)
        margins = expected[expected["quantity"] == "margin"].set_index("group")
        assert margins.loc["helpful", "effect"] < -1, "an effect of zero would show nothing"
        block = out.partition("\nmargin\n")[2].splitlines()
        assert [line.split()[0] for line in block[1:4]] == ["all", "helpful", "harmless"]
        for line, group in zip(block[2:4], ("helpful", "harmless"), strict=True):
            row = margins.loc[group]
            for name in ("before", "after", "effect", "low", "high", "random_effect", "random_sd"):
                assert f"{0.0 if abs(row[name]) < 5e-4 else row[name]:.3f}" in line

    def test_every_file_of_neurons_gives_the_same_table(self, scored, capsys):
        top = scored.top(fraction=0.1)
        top.save("set.safetensors")
        top.to_frame().to_csv("list.csv", index=False)
        words = ("ablate", "model", "pairs.csv", *COLUMNS, "--draws", 0, "--json", "--neurons")
        found = [
            json.loads(run(capsys, *words, *file)[1])
            for file in (("scores.safetensors", "--fraction", 0.1), ("set.safetensors",), ("list.csv",))
        ]
        assert found[0] == found[1] == found[2]
        assert NeuronSet.from_dict(found[0]["neurons"]) == top
        # Another file, another table.
        (~top).save("other.safetensors")
        assert json.loads(run(capsys, *words, "other.safetensors")[1])["effects"] != found[0]["effects"]

    def test_means_are_those_of_the_pairs_and_the_saved_model_has_them(self, scored, capsys):
        head, pairs = RewardHead.from_pretrained("model"), PreferencePairs.read("pairs.csv", columns=MAPPED)
        means = Mean(ActivationCollector(head).collect(pairs))
        expected = ablation_effects(head, scored.top(k=4), pairs, means, n_draws=0)
        words = ("--neurons", "scores.safetensors", "--k", 4, "--replacement", "mean", "--draws", 0)
        outputs = ("--figure", "effects.svg", "--save", "ablated")
        status, out, _ = run(capsys, "ablate", "model", "pairs.csv", *COLUMNS, *words, *outputs)
        assert status == 0
        assert "random" not in out
        assert out.endswith("\nWritten: figure to effects.svg, ablated model to ablated.\n")
        assert Path("effects.svg").read_text().startswith("<?xml")
        after = RewardHead.from_pretrained("ablated").score_pairs(pairs).margin.double().mean().item()
        row = expected[expected["quantity"] == "margin"].iloc[0]
        assert after == pytest.approx(row["after"], abs=1e-4)
        assert abs(after - row["before"]) > 0.5, "without an effect, an unchanged checkpoint would pass"

    def test_only_and_by_choose_pairs(self, scored, capsys):
        words = ("ablate", "model", "pairs.csv", *COLUMNS, "--neurons", "scores.safetensors", "--draws", 0, "--json")
        found = json.loads(run(capsys, *words, "--only", "category=harmless")[1])
        assert (found["n_pairs"], {row["group"] for row in found["effects"]}) == (12, {"all pairs"})


SHORT = {
    "ABLATE": "ablate model pairs.csv COLUMNS --neurons scores.safetensors",
    "ATTRIBUTE": "attribute model pairs.csv COLUMNS --out",
    "COLUMNS": " ".join(COLUMNS),
}


class TestErrors:
    @pytest.mark.parametrize(
        ("words", "message"),
        [
            ("ABLATE --by categry", "--by: no pair has a label 'categry'. Did you mean 'category'?"),
            ("ABLATE --only category=helpfull", "Did you mean 'helpful'? Its labels are 'helpful', 'harmless'."),
            ("ABLATE --only categories=x", "--only: no pair has a label 'categories'. Did you mean 'category'?"),
            ("ABLATE --only category", "--only: expected COLUMN=LABEL"),
            ("ABLATE --draws 1", "--draws: expected at least 2"),
            ("ABLATE --seed -1", "--seed: expected a whole number"),
            ("ABLATE --k 1000", "--k: expected 1 to 48 neurons, got 1000."),
            ("ABLATE --fraction 2", "--fraction: expected a number in (0, 1]"),
            ("ABLATE --figure x.gif", "--figure: expected a name that ends in .svg"),
            ("ABLATE --save model", "--save: model is read by this command"),
            ("ABLATE --table pairs.csv", "--table: pairs.csv is read by this command"),
            ("ABLATE --save x --positions last", "--save, --positions: a saved model"),
            ("ABLATE --max-length 8", "or pass --truncate-response"),
            ("ABLATE --neurons none.safetensors", "none.safetensors: there is no such file"),
            ("ABLATE --neurons model/model.safetensors", "not a result of rmtension"),
            ("ABLATE --neurons pairs.csv", "with the columns layer and neuron, got 24 rows"),
            ("ABLATE --neurons high.csv", "--neurons: high.csv: (0, 99) is outside a model with 2 layers of 24"),
            ("ABLATE --neurons high.csv --k 3", "but high.csv holds a set of neurons"),
            ("ablate pairs.csv model --neurons scores.safetensors", "they are swapped"),
            ("attribute model pairs.csv --out x.safetensors", "name it: --columns "),
            (
                "attribute model pairs.csv --columns prompt=qestion chosen=good rejected=bad --out x.safetensors",
                "name it: --columns prompt=question.",
            ),
            ("ATTRIBUTE x.safetensors --max-length 8", "or pass --truncate-response"),
            ("ATTRIBUTE scores.npz", "--out: expected a name that ends in .safetensors"),
            ("ATTRIBUTE scores.safetensors", "--out: scores.safetensors exists already"),
            ("attribute model empty.csv --out x.safetensors", "empty.csv: expected at least one preference pair"),
            ("attribute model header.csv --out x.safetensors", "header.csv: expected at least one preference pair"),
            ("attribute untold pairs.csv COLUMNS --out x.safetensors", "tokenizer"),
            ("ATTRIBUTE x.safetensors --method mean_diference", "Did you mean 'mean_difference'?"),
        ],
    )
    def test_bad_input_returns_status_2_and_writes_nothing(self, words, message, scored, capsys):
        Path("high.csv").write_text("layer,neuron\n0,99\n")
        Path("empty.csv").write_text("")
        Path("header.csv").write_text("prompt,chosen,rejected\n")
        shutil.copytree("model", "untold", ignore=shutil.ignore_patterns("tokenizer*", "special_tokens*"))
        before = files()
        for short, whole in SHORT.items():
            words = words.replace(short, whole)
        try:
            status, out, err = run(capsys, *words.split())
        except SystemExit as end:
            status, (out, err) = end.code, capsys.readouterr()
        assert (status, out) == (2, "")
        assert message in err
        assert files() == before

    def test_a_table_of_two_sites_is_refused(self, scored, capsys):
        Path("two.csv").write_text("site,layer,neuron\nmlp,0,1\nattn_head,0,1\n")
        status, _, err = run(capsys, "ablate", "model", "pairs.csv", *COLUMNS, "--neurons", "two.csv")
        assert status == 2
        assert "expected neurons of one site, got ['attn_head', 'mlp']" in err

    def test_the_python_call_names_its_argument(self, here):
        """The same error without the command line: flags are put in there, not in the library."""
        pairs = PreferencePairs.read("pairs.csv", columns=MAPPED)
        head = RewardHead.from_pretrained("model")
        with pytest.raises(OptionError, match=r"^by: no pair has a label 'categry'"):
            ablation_effects(head, here.truth["helpful"], pairs, by="categry")


def test_score_groups_by_a_column(here, capsys):
    found = json.loads(run(capsys, "score", "model", "pairs.csv", *COLUMNS, "--by", "category", "--json")[1])
    scored = RewardHead.from_pretrained("model").score_pairs(PreferencePairs.read("pairs.csv", columns=MAPPED))
    labels = [pair.labels["category"] for pair in scored.pairs]
    for name, part in found["by_group"].items():
        mine = scored.margin.double()[torch.tensor([label == name for label in labels])]
        assert (part["n"], part["margin"]["value"]) == (12, pytest.approx(mine.mean().item()))
    assert list(found["by_group"]) == ["helpful", "harmless"]


@pytest.mark.parametrize("suffix", ["csv.gz", "tsv", "json", "jsonl.zst", "parquet"])
def test_every_format_is_read(suffix, scored, capsys):
    """The commands share one reader: the same pairs in another format give the same numbers."""
    frame = pd.read_csv("pairs.csv")
    name = f"pairs2.{suffix}"
    if "csv" in suffix or "tsv" in suffix:
        frame.to_csv(name, index=False, sep="\t" if suffix == "tsv" else ",")
    elif suffix == "parquet":
        frame.to_parquet(name)
    else:
        frame.to_json(name, orient="records", lines="jsonl" in suffix)
    words = (*COLUMNS, "--neurons", "scores.safetensors", "--by", "category", "--draws", 0, "--json")
    first, other = (json.loads(run(capsys, "ablate", "model", file, *words)[1]) for file in ("pairs.csv", name))
    assert first.pop("pairs") != other.pop("pairs")
    assert first == other
