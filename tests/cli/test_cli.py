"""The command line: what it prints against what the library gives, its exit statuses, and what it says of bad input."""

import gzip
import json
import re
import shutil
import subprocess
import sys
import warnings
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest
import torch
import transformers
from matplotlib.figure import Figure
from tiny_models import make_pairs, save_classifier

from rmtension import PreferencePairs, RewardHead, StudyResult
from rmtension.cli._command_line import main
from rmtension.cli._commands.quiet import quiet_libraries
from rmtension.errors import DataError, ModelError, OptionError, RMTensionWarning
from rmtension.evaluation._metrics import accuracy, mean_margin
from rmtension.heads import LogRatioHead
from rmtension.study._config import make_config, read_yaml


@pytest.fixture(scope="module")
def model(checkpoints):
    return checkpoints["gpt2"]


@pytest.fixture
def files(tmp_path, pairs, monkeypatch):
    """A folder to be in, with pairs as a file, and with what is no file of pairs."""
    monkeypatch.chdir(tmp_path)
    pairs.to_jsonl("pairs.jsonl")
    lines = Path("pairs.jsonl").read_text().splitlines()
    bad = [lines[0], '{"prompt": "p", "chosen": "a"}', lines[1], "no JSON"]
    Path("bad.jsonl").write_text("\n".join(bad))
    Path("one.jsonl").write_text(lines[0])
    Path("empty.jsonl").write_text("\n")
    Path("cut.jsonl.gz").write_bytes(gzip.compress("\n".join(lines).encode())[:-20])
    Path("there.jsonl").write_text("something")
    return tmp_path


def run(capsys, *words):
    """Status, stdout and stderr of a command."""
    status = main([str(word) for word in words])
    captured = capsys.readouterr()
    assert "Traceback" not in captured.err
    return status, captured.out, captured.err


class TestScore:
    def test_equals_the_library_to_the_last_digit(self, files, model, pairs, capsys):
        expected = RewardHead.from_pretrained(model).score_pairs(pairs)
        status, out, err = run(capsys, "score", model, "pairs.jsonl", "--out", "rewards.jsonl")
        assert (status, err) == (0, "")
        rows = [json.loads(line) for line in Path("rewards.jsonl").read_text().splitlines()]
        assert [row["id"] for row in rows] == [pair.id for pair in pairs]
        for name, values in (
            ("reward_chosen", expected.chosen),
            ("reward_rejected", expected.rejected),
            ("margin", expected.margin),
        ):
            assert [row[name] for row in rows] == values.tolist()
            assert len(set(values.tolist())) > 12, "rewards that are all equal would show nothing"
        lines = out.splitlines()
        assert lines[0] == "24 pairs scored."
        for line, part in zip(
            lines[2:],
            (expected, *(expected.filter(objective=objective) for objective in ("harmless", "helpful"))),
            strict=False,
        ):
            assert line.split()[1] == str(len(part))
            assert line.index(str(accuracy(part))) < line.index(str(mean_margin(part)))
        assert lines[-1] == "Rewards written to rewards.jsonl."

    def test_an_objective_may_be_named_all(self, files, model, pairs, capsys):
        (pairs[:6] + PreferencePairs(replace(pair, objective="all") for pair in pairs[6:8])).to_jsonl("named.jsonl")
        summary = json.loads(run(capsys, "score", model, "named.jsonl", "--json")[1])
        assert (summary["n"], summary["by_objective"]["all"]["n"]) == (8, 2)

    def test_json_output_is_the_only_text_on_stdout(self, files, model, pairs, capsys):
        expected = RewardHead.from_pretrained(model, dtype=torch.float64, max_length=64).score_pairs(pairs)
        words = ("score", model, "pairs.jsonl", "--json", "--quiet", "--dtype", "float64", "--max-length", 64)
        status, out, _ = run(capsys, *words, "--out", "rewards.jsonl.gz")
        summary = json.loads(out)
        assert status == 0
        assert summary["accuracy"] == accuracy(expected).to_dict()
        assert (
            summary["by_objective"]["helpful"]["margin"] == mean_margin(expected.filter(objective="helpful")).to_dict()
        )
        assert summary["provenance"] == json.loads(json.dumps(expected.provenance.to_dict()))
        lines = gzip.decompress(Path(summary["out"]).read_bytes()).decode().splitlines()
        assert json.loads(lines[-1])["margin"] == expected.margin[-1].item()

    def test_skipped_rows_are_counted(self, files, model, capsys):
        status, out, _ = run(capsys, "score", model, "bad.jsonl", "--on-invalid", "skip")
        assert status == 0
        assert out.startswith("2 pairs scored, 2 skipped.\n  1 skipped: field 'rejected' is missing")
        summary = json.loads(run(capsys, "score", model, "bad.jsonl", "--on-invalid", "skip", "--json")[1])
        assert (summary["n"], sorted(summary["skipped"].values())) == (2, [1, 1])

    def test_one_prompt_has_no_interval(self, files, model, capsys):
        PreferencePairs(make_pairs(1)).to_jsonl("one.jsonl")
        summary = json.loads(run(capsys, "score", model, "one.jsonl", "--json")[1])
        assert summary["margin"]["low"] is None, "JSON has no NaN"

    def test_pairs_with_infinite_rewards_stop_or_are_skipped(self, files, tokenizer, capsys):
        folder = save_classifier(files / "broken", "gpt2", tokenizer)
        broken = transformers.AutoModelForSequenceClassification.from_pretrained(folder)
        word = tokenizer(" kill")["input_ids"][0]
        with torch.no_grad():
            broken.transformer.wte.weight[word] = torch.inf
        broken.save_pretrained(folder)
        rows = [{"prompt": "how", "chosen": chosen, "rejected": "bake", "id": chosen} for chosen in ("sure", "a kill")]
        PreferencePairs.from_records(rows).to_jsonl("two.jsonl")
        status, out, err = run(capsys, "score", folder, "two.jsonl")
        assert (status, out) == (2, "")
        assert "'a kill'" in err
        status, out, err = run(capsys, "score", folder, "two.jsonl", "--on-nonfinite", "skip")
        assert status == 0
        assert out.startswith("1 pair scored, 1 without finite rewards.")
        assert err.startswith("rmtension: warning: ")

    def test_a_work_folder_resumes_and_refuses_other_pairs(self, files, model, capsys):
        words = ("score", model, "pairs.jsonl", "--json", "--work", "work")
        first, again = run(capsys, *words), run(capsys, *words)
        assert first == again
        make_pairs(3).to_jsonl("other.jsonl")
        status, _, err = run(capsys, "score", model, "other.jsonl", "--work", "work")
        assert status == 2
        assert "a run with other settings" in err

    @pytest.mark.parametrize(
        ("words", "message"),
        [
            (["MODEL", "bad.jsonl"], "bad.jsonl, line 2: field 'rejected' is missing"),
            (["MODEL", "cut.jsonl.gz"], "damaged or cut short"),
            (["MODEL", "empty.jsonl"], "expected at least one preference pair, got none"),
            (["MODEL", "none.jsonl"], "none.jsonl: cannot be read"),
            (["MODEL", "."], "cannot be read"),
            (["./none", "pairs.jsonl"], "there is no folder ./none"),
            ([".", "pairs.jsonl"], "no config.json and no adapter_config.json"),
            (["MODEL", "pairs.jsonl", "--out", "there.jsonl"], "there.jsonl exists already"),
            (["MODEL", "pairs.jsonl", "--out", ".", "--overwrite"], "is a folder"),
            (["MODEL", "pairs.jsonl", "--out", "there.jsonl/x"], "could not be written"),
            (["MODEL", "pairs.jsonl", "--max-length", "97"], "error: --max-length: expected 1 to 96"),
            (["MODEL", "pairs.jsonl", "--device", "abacus"], "error: --device: 'abacus' is not available"),
            (
                ["MODEL", "pairs.jsonl", "--pad-token", "<none>"],
                "error: --pad-token: '<none>' is not in the vocabulary",
            ),
        ],
    )
    def test_wrong_options_and_files_return_status_2(self, words, message, files, model, capsys):
        status, out, err = run(capsys, "score", *(model if word == "MODEL" else word for word in words))
        assert (status, out) == (2, "")
        assert err.startswith("rmtension: error: ")
        assert message in err
        assert Path("there.jsonl").read_text() == "something"

    def test_overwrite_replaces_the_file(self, files, model, capsys):
        assert run(capsys, "score", model, "pairs.jsonl", "--out", "there.jsonl", "--overwrite")[0] == 0
        assert len(Path("there.jsonl").read_text().splitlines()) == 24

    def test_the_process_returns_the_status_and_keeps_stdout_free(self, files, model):
        """With a missing file, because opening a model takes long."""
        words = [sys.executable, "-m", "rmtension.cli", "score", str(model), "none.jsonl", "--json"]
        ran = subprocess.run(words, capture_output=True, text=True)
        assert (ran.returncode, ran.stdout) == (2, "")
        assert ran.stderr.startswith("rmtension: error: none.jsonl: cannot be read")
        assert ran.stderr.count("\n") == 1


class TestCheck:
    def test_a_sound_model_passes(self, files, model, capsys):
        status, out, err = run(capsys, "check", model, "--pairs", "pairs.jsonl", "--json")
        result = json.loads(out)
        assert (status, err, result["passed"]) == (0, "", True)
        assert {"tokens", "equal to transformers", "hooks, mlp"} <= {check["check"] for check in result["checks"]}
        assert all(check["passed"] and check["value"] <= check["limit"] for check in result["checks"])

    def test_a_failed_check_returns_status_1(self, files, model, checkpoints, tokenizer, capsys, monkeypatch):
        """The checkpoint that transformers reads again is another."""
        other = save_classifier(files / "other", "gpt2", tokenizer, seed=1)
        other = transformers.AutoModelForSequenceClassification.from_pretrained(other)
        monkeypatch.setattr("rmtension.passes._selfcheck.reload_classifier", lambda head: other)
        status, out, _ = run(capsys, "check", model)
        assert status == 1
        lines = out.splitlines()
        assert [line.split("  ")[0] for line in lines if " NO " in line] == ["equal to transformers"]
        assert lines[-1] == f"1 of {len(lines) - 2} checks did not pass."

    def test_a_missing_model_returns_status_2(self, files, capsys):
        assert run(capsys, "check", "./none")[0] == 2


# -- studies -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def study(files, tokenizer, tmp_path):
    """A folder with models, pairs and a configuration of a study."""
    for number, name in enumerate(("helpful", "harmless", "mixed")):
        save_classifier(tmp_path / "models" / name, "gpt2", tokenizer, seed=number)
    both = make_pairs(16)
    both.to_jsonl("both.jsonl")
    for name in both.objectives:
        both.filter(objective=name).to_jsonl(f"{name}.jsonl")
    Path("study.yaml").write_text(
        """
models: {helpful: models/helpful, harmless: ./models/harmless, mixed: models/mixed}
pairs:
  helpful: helpful.jsonl
  harmless: [harmless.jsonl]
analyses: [transferability]
options: {scores: [mean_difference], fraction: 0.2}
out: result
"""
    )
    return tmp_path


class TestStudy:
    @pytest.mark.grid  # a whole program
    def test_a_file_and_flags_give_the_same_study_and_report(self, study, capsys, monkeypatch):
        # Drawn but not rendered: that is most of the time, and no part of what is tested.
        def save(figure, to, **_):
            to.write_bytes(b"drawn") if isinstance(to, Path) else to.write(b"drawn")

        monkeypatch.setattr(Figure, "savefig", save)
        elsewhere = study / "elsewhere"
        elsewhere.mkdir()
        monkeypatch.chdir(elsewhere)
        status, out, err = run(capsys, "study", "../study.yaml", "--quiet", "--json")
        first = json.loads(out)
        assert (status, err) == (0, "")
        assert first["n_run"] > 0
        assert Path(first["out"]).resolve() == study / "result", "relative to the file"
        assert list(first["tables"]) == ["transferability"]
        assert all(Path(path).is_file() for path in (*first["tables"].values(), first["report"]))
        assert (study / "result" / "transferability.png").read_bytes() == b"drawn"

        # Again: nothing is run. Other analyses: only what they need.
        again = json.loads(run(capsys, "study", "../study.yaml", "--json")[1])
        assert (again["n_run"], again["n_read"] > 0) == (0, True)

        # The same by flags, elsewhere: the same tables.
        monkeypatch.chdir(study)
        models = [word for name in ("helpful", "harmless", "mixed") for word in (f"--{name}", f"models/{name}")]
        words = [
            "--analyses",
            "transferability",
            "--set",
            "scores=[mean_difference]",
            "fraction=0.2",
            "--out",
            "flags",
        ]
        status, out, _ = run(capsys, "study", *models, "--pairs", "both.jsonl", *words)
        assert status == 0
        assert "Transferability\n" in out
        assert out.splitlines()[-1].startswith("Written to flags: study ")
        for name in first["tables"]:
            assert (study / "flags" / f"{name}.csv").read_bytes() == (study / "result" / f"{name}.csv").read_bytes()
        assert StudyResult.load("flags").summary["options"]["fraction"] == 0.2

        # The page again, from the tables alone.
        page = Path("flags/report.md").read_bytes()
        Path("flags/report.md").unlink()
        shutil.rmtree("models")
        status, out, _ = run(capsys, "report", "flags", "--json")
        assert status == 0
        assert json.loads(out)["markdown"] == "flags/report.md"
        # Figures are not rendered here; the single neurons that were kept are in the page.
        assert 'id="neurons"' in Path(json.loads(out)["report"]).read_text()
        assert Path("flags/report.md").read_bytes() == page

        # Without matplotlib: the tables alone, and it says so.
        monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
        assert run(capsys, "report", "flags")[0] == 0
        text = Path("flags/report.md").read_text()
        assert "matplotlib is not installed" in text
        assert ".png" not in text

        Path("flags/transferability.csv").write_text("family,seed\nmodels,0\n")
        status, _, err = run(capsys, "report", "flags")
        assert status == 2
        assert "are not among ['family', 'seed']" in err
        Path("flags/summary.json").write_text('{"tables": []}')
        status, _, err = run(capsys, "report", "flags")
        assert status == 2
        assert "flags: expected the tables of a study" in err

    def test_flags_override_the_file(self, study):
        from rmtension.cli._commands.study import _config

        options = _parsed("study", "study.yaml", "--set", "fraction=0.3", "--rules", "paper", "--out", "x")
        config = _config(options)
        assert (config.options.fraction, config.options.scores) == (0.3, ("mean_difference",))
        assert config.options.replacement == "zero", "the paper's"
        assert config.out == study / "x"

    @pytest.mark.parametrize(
        ("words", "message"),
        [
            (["none.yaml"], "none.yaml: cannot be read"),
            ([], "expected a YAML file, or --helpful"),
            (["--helpful", "models/helpful", "--pairs", "both.jsonl"], "the key 'harmless' is missing"),
            (["study.yaml", "--pairs", "both.jsonl"], "--pairs: not with a file (study.yaml). Name pairs in the file"),
            (["study.yaml", "--set", "fraction"], "expected NAME=VALUE"),
            (["study.yaml", "--set", "fraction=[1"], "is not valid YAML"),
            (["study.yaml", "--set", "fractoin=1"], "command line: options: unknown key 'fractoin'"),
            (["study.yaml", "--analyses", "all"], "command line: analyses: no analysis is called 'all'. The"),
            (["study.yaml", "--rules", "mine"], "rules: expected one of"),
            (["study.yaml", "--out", "there.jsonl"], "cannot serve as a work folder"),
            (["--pairs", "both.jsonl", "--helpful-pairs", "both.jsonl"], "got both"),
        ],
    )
    def test_wrong_flags_and_configs_return_status_2(self, words, message, study, capsys):
        status, out, err = run(capsys, "study", *words)
        assert (status, out) == (2, "")
        assert message in err

    def test_a_folder_without_a_study_has_no_report(self, files, capsys):
        status, _, err = run(capsys, "report", "none")
        assert (status, err) == (
            2,
            "rmtension: error: none has no finished study (summary.json is missing). Run the study first.\n",
        )


def _parsed(*words):
    from rmtension.cli._command_line import parser

    return parser().parse_args(words)


class TestConfig:
    def values(self, study):
        return read_yaml(study / "study.yaml")

    def test_configs_may_have_several_families_and_one_file_of_pairs(self, study):
        models = self.values(study)["models"]
        values = self.values(study) | {
            "models": [models, models | {"seed": 1, "base": "org/base"}],
            "pairs": "both.jsonl",
            "scoring_pairs": ["both.jsonl", "both.jsonl"],
        }
        config = make_config(values, folder=study, where="here")
        assert [(family.seed, family.base) for family in config.families] == [(0, None), (1, "org/base")]
        assert config.families[0].helpful == study / "models" / "helpful"
        assert {name: len(part) for name, part in config.pairs.items()} == {"helpful": 8, "harmless": 8}
        assert {name: len(part) for name, part in config.scoring_pairs.items()} == {"helpful": 16, "harmless": 16}

    def test_pairs_are_read_as_preferencepairs_read(self, study):
        rows = [{"q": pair.prompt, "chosen": pair.chosen, "rejected": pair.rejected} for pair in make_pairs(8)]
        pd.DataFrame(rows).to_csv(study / "pairs.csv", index=False)
        values = self.values(study) | {
            "pairs": {"helpful": "pairs.csv", "harmless": ["pairs.csv"]},
            "columns": {"prompt": "q", "id": None},
            "chat": True,
        }
        helpful = make_config(values, folder=study, where="here").pairs["helpful"]
        assert [pair.prompt for pair in helpful] == [pair.prompt for pair in make_pairs(8).as_chat()]
        assert helpful.objectives == ["helpful"]

    @pytest.mark.parametrize(
        ("change", "error", "message"),
        [
            ({"modles": 1}, OptionError, "here: unknown key 'modles'; expected some of ['models'"),
            ({1: 1}, OptionError, "here: unknown key 1"),
            ({"models": None}, OptionError, "here: the key 'models' is missing"),
            ({"models": []}, OptionError, "here: models: expected a mapping of"),
            ({"models": ["x"]}, OptionError, "here: models[0]: expected a mapping with some of the keys"),
            ({"models": {"helpful": "a", "harmless": "b"}}, OptionError, "models: the key 'mixed' is missing"),
            ({"models": {"helpful": ["a"]}}, OptionError, "models: the key 'harmless' is missing"),
            ({"models.mixed": 3}, OptionError, "here: models.mixed: expected text, got 3"),
            ({"models.mixed": "models/none/x"}, ModelError, "here: models.mixed: expected the folder"),
            ({"models.mixed": "./none"}, ModelError, "here: models.mixed: expected the folder"),
            ({"models.mixed": "both.jsonl"}, ModelError, "is no folder"),
            ({"models.seed": "1"}, OptionError, "here: models.seed: expected a whole number, got '1'"),
            ({"models.seed": True}, OptionError, "here: models.seed: expected a whole number"),
            ({"pairs": {"helpful": "helpful.jsonl"}}, OptionError, "here: pairs: the key 'harmless' is missing"),
            ({"pairs": []}, OptionError, "here: pairs: expected a file or a list of files"),
            ({"pairs": ["both.jsonl", "none"]}, DataError, "here: pairs[1]: expected a file of pairs, got"),
            ({"pairs": "helpful.jsonl"}, DataError, "here: pairs: expected the field 'objective' of every pair"),
            ({"pairs": "bad.jsonl"}, DataError, "here: pairs: "),
            ({"pairs": {"helpful": "one.jsonl", "harmless": "one.jsonl"}}, OptionError, "1 prompt cannot be split"),
            ({"pairs.harmless": "empty.jsonl"}, OptionError, "too few prompts of 'harmless'"),
            (
                {"columns": {"question": "prompt"}},
                OptionError,
                "here: columns: unknown key 'question'; expected some of ['pro",
            ),
            ({"columns": {"prompt": 3}}, OptionError, "here: columns.prompt: expected text, got 3"),
            ({"chat": "yes"}, OptionError, "here: chat: expected true or false, got 'yes'"),
            ({"on_invalid": "ignore"}, OptionError, "here: pairs.helpful: on_invalid: expected 'raise' or 'skip'"),
            ({"options": 3}, OptionError, "here: options: expected a mapping"),
            ({"options": {"analyses": ["sets"]}}, OptionError, "here: options: unknown key 'analyses'"),
            ({"options": {"n_draws": 1}}, OptionError, "here: n_draws: expected at least 2"),
            ({"rules": ["paper"]}, OptionError, "here: rules: expected text, got list"),
            ({"out": False}, OptionError, "here: out: expected text, got False"),
        ],
    )
    def test_errors_name_the_key(self, change, error, message, study):
        values = self.values(study)
        for key, value in change.items():
            outer, _, inner = str(key).partition(".")
            if inner:
                values[outer][inner] = value
            else:
                values[key] = value
        with pytest.raises(error) as caught:
            make_config(values, folder=study, where="here").study()
        assert message in str(caught.value)

    @pytest.mark.parametrize(
        "text", ["a: [", "!!python/object/apply:os.system [ls]", "a: 2024-13-45", "\x00", "[" * 1500]
    )
    def test_invalid_yaml_is_refused(self, text, tmp_path):
        path = tmp_path / "study.yaml"
        path.write_text(text)
        with pytest.raises(DataError, match="not valid YAML"):
            read_yaml(path)
        path.write_bytes(b"\xff\xfe\xff")
        with pytest.raises(DataError, match="not valid YAML"):
            read_yaml(path)
        path.write_text("- models")
        with pytest.raises(OptionError, match="expected a mapping"):
            read_yaml(path)


class TestAll:
    def test_every_command_has_examples_and_help(self, capsys):
        for command in ("demo", "study", "score", "attribute", "ablate", "check", "report"):
            with pytest.raises(SystemExit, match="0"):
                main([command, "--help"])
            text = capsys.readouterr().out
            for part in ("examples:", f"rmtension {command}", "--json", "--quiet"):
                assert part in text

    def test_the_yaml_of_the_help_is_valid(self, study, tokenizer):
        """The YAML that `rmtension study --help` shows, read as a file."""
        from rmtension.cli._commands.study import EXAMPLES

        block = EXAMPLES.partition("are required):\n")[2].partition("\n\nSeveral")[0]
        path = study / "shown.yaml"
        path.write_text("\n".join(line.removeprefix("  ") for line in block.splitlines()))
        save_classifier(study / "models" / "base", "gpt2", tokenizer)
        for name in ("helpful.jsonl.gz", "one.jsonl", "two.jsonl"):
            make_pairs(4).to_jsonl(study / name)
        config = make_config(read_yaml(path), folder=study, where="shown")
        assert config.families[0].base == study / "models" / "base"
        assert len(config.pairs["harmless"]) == 8
        assert config.options.analyses == ("accuracy", "overlap")

    def test_demo_names_the_files_that_it_wrote(self, files, capsys, monkeypatch):
        from hand_made import hand_made

        from rmtension.cli._demo import DemoRun

        whole = hand_made()
        result = StudyResult({"accuracy": whole.accuracy}, whole.summary)
        seen = {}

        def stub(out, *, on_stage, **options):
            seen.update(options, out=out)
            on_stage("training reward model 2 of 3: harmless")
            print("from a library")
            return DemoRun(result, 1.0, 2.0, 5, 6)

        monkeypatch.setattr("rmtension.cli._demo.run_demo", stub)
        status, out, err = run(capsys, "demo", "--seeds", "2", "--out", "x", "--quiet")
        assert status == 0
        assert err == "from a library\n"
        assert "from a library" not in out
        written, report, command = out.splitlines()[-3:]
        assert written == "Written to x: models 1 s, study 2 s; 5 passes over models run, 6 read from x/runs."
        page = Path("x/report.html").resolve()
        assert report == f"Report: {page}"
        assert command.startswith("Open it: ")
        assert command.endswith(f" -m webbrowser -t {page.as_uri()}")
        assert (seen["seeds"], seen["progress"], str(seen["out"])) == (2, False, "x")
        assert json.loads(run(capsys, "demo", "--json")[1])["seconds"] == {"models": 1.0, "study": 2.0}
        assert "training reward model 2 of 3: harmless\n" in run(capsys, "demo")[2], "stages are named"

    @pytest.mark.grid  # a whole program
    def test_demo_prints_findings_and_tables_if_asked(self, files, capsys, monkeypatch):
        from hand_made import hand_made_study

        from rmtension.cli._demo import DemoRun
        from rmtension.report._answer import answer_sentences

        result = hand_made_study()
        monkeypatch.setattr("rmtension.cli._demo.run_demo", lambda *_, **__: DemoRun(result, 1.0, 2.0, 5, 6))
        short, long = (run(capsys, "demo", "--quiet", *more)[1] for more in ([], ["--verbose"]))
        sentences = answer_sentences(result)
        assert short.splitlines()[: len(sentences)] == [f"- {sentence}" for sentence in sentences]
        assert len(sentences) >= 3
        assert len(short.splitlines()) <= 10
        for heading in ("Overlap of top sets", "What is retained"):
            assert heading in long
            assert heading not in short
        assert json.loads(run(capsys, "demo", "--json", "--quiet")[1])["findings"] == sentences

    def test_an_interruption_returns_status_130(self, files, model, capsys, monkeypatch):
        def interrupt(*_, **__):
            raise KeyboardInterrupt

        monkeypatch.setattr(RewardHead, "score_pairs", interrupt)
        assert run(capsys, "score", model, "pairs.jsonl") == (130, "", "rmtension: interrupted\n")

    def test_messages_of_libraries_are_restored_afterwards(self, capsys):
        before = (transformers.logging.get_verbosity(), transformers.logging.is_progress_bar_enabled())
        transformers.logging.set_verbosity_warning()
        transformers.logging.enable_progress_bar()
        try:
            with suppress(KeyError), quiet_libraries():
                warnings.warn("theirs", UserWarning, stacklevel=1)
                warnings.warn("ours", RMTensionWarning, stacklevel=1)
                transformers.logging.get_logger("transformers").warning("theirs")
                raise KeyError
            assert capsys.readouterr().err == "rmtension: warning: ours\n"
            assert transformers.logging.get_verbosity() == transformers.logging.WARNING
            assert transformers.logging.is_progress_bar_enabled()
            with pytest.warns(UserWarning, match="theirs"):
                warnings.warn("theirs", UserWarning, stacklevel=1)
        finally:
            transformers.logging.set_verbosity(before[0])
            if not before[1]:
                transformers.logging.disable_progress_bar()

    def test_a_warning_is_shown_once_per_command(self, capsys):
        """Python shows it again wherever code in between enters `catch_warnings`, as PyTorch and SciPy do."""
        for _ in range(2):
            with quiet_libraries():
                for text in ("twice", "twice", "another"):
                    with warnings.catch_warnings():
                        warnings.simplefilter("ignore", DeprecationWarning)
                    warnings.warn(text, RMTensionWarning, stacklevel=1)
            assert capsys.readouterr().err == "rmtension: warning: twice\nrmtension: warning: another\n"


def test_bars_and_loggers_can_be_replaced():
    """Progress through `tqdm.auto`, which notebooks know; loggers of the package's own name; nobody prints."""
    for path in sorted((Path(__file__).parents[2] / "rmtension").rglob("*.py")):
        text = path.read_text()
        assert "from tqdm import" not in text, path
        assert "import tqdm" not in text.replace("from tqdm.auto import tqdm", ""), path
        for call in ("logging.info(", "logging.warning(", "logging.basicConfig(", 'getLogger("rm', "getLogger()"):
            assert call not in text, path


class TestHeadsOfSeveralTokens:
    def test_a_policy_and_its_reference_score_as_in_the_library(self, files, pairs, tokenizer, capsys):
        sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
        config = transformers.LlamaConfig(vocab_size=len(tokenizer), **sizes)
        for seed, folder in enumerate(("policy", "reference")):
            torch.manual_seed(seed)
            transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder)
            tokenizer.save_pretrained(folder)
        head = RewardHead.from_pretrained("policy", head=LogRatioHead("reference", beta=0.1, average=True))
        words = ("policy", "pairs.jsonl", "--reference", "reference", "--beta", "0.1", "--average")
        status, _, err = run(capsys, "score", *words, "--out", "rewards.jsonl")
        assert (status, err) == (0, "")
        rewards = [json.loads(line) for line in Path("rewards.jsonl").read_text().splitlines()]
        assert [row["margin"] for row in rewards] == head.score_pairs(pairs).margin.tolist()
        assert max(abs(row["margin"]) for row in rewards) > 1e-4

    @pytest.mark.parametrize(
        ("words", "message"),
        [
            (("--beta", "0.1"), "--beta: it belongs to --reference or --log-likelihood"),
            (("--marker", "x", "--average"), "--average: it belongs to --reference"),
            (("--marker", "x", "--reference", "y"), "expected one of .* got --reference and --marker"),
        ],
    )
    def test_options_that_do_not_belong_together_are_refused(self, files, model, words, message, capsys):
        status, _, err = run(capsys, "score", model, "pairs.jsonl", *words)
        assert status == 2
        assert re.search(message, err)
