"""Swapped and mistaken arguments say so, and name what was meant."""

import json
import shlex
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
from tiny_models import unchecked

from rmtension import AblationContext, NeuronAttribution, NeuronSet, RewardHead, SharedNeuronAnalyzer, StudyOptions
from rmtension._arguments import nearest, require_choice
from rmtension._sites import find_site
from rmtension.cli._command_line import main, parser
from rmtension.cli._commands.advice import with_flags
from rmtension.errors import ModelError, OptionError
from rmtension.neurons._conflict import conflict
from rmtension.study._config import make_config


class TestNames:
    @pytest.mark.parametrize(
        ("wrong", "meant"),
        [
            ({"analyses": ("accurracy",)}, "accuracy"),
            ({"analyses": ("overlap", "cross-objective")}, "cross_objective"),
            ({"scores": ("gradient_x_activations",)}, "gradient_x_activation"),
            ({"replacement": "zeros"}, "zero"),
            ({"rank_by": "support"}, "supports"),
            ({"site": "mpl"}, "mlp"),
            ({"fractoin": 0.1}, "fraction"),
        ],
    )
    def test_study_options_name_the_nearest(self, wrong, meant, tmp_path):
        for make in (lambda: StudyOptions.of("corrected", **wrong), lambda: self.config(wrong, tmp_path)):
            with pytest.raises(OptionError, match=rf" Did you mean '{meant}'\?"):
                make()

    def config(self, options, folder):
        values = {"models": {"helpful": "a", "harmless": "b", "mixed": "c"}, "pairs": "none"}
        analyses = {"analyses": list(options["analyses"])} if "analyses" in options else {"options": options}
        return make_config(values | analyses, folder=folder, where="study.yaml")

    def test_other_lists_of_choices_name_the_nearest(self, head, tmp_path):
        with pytest.raises(OptionError, match="Did you mean 'paper'"):
            StudyOptions.of("papers")
        with pytest.raises(OptionError, match=r"method: .* Did you mean 'direct_effect'\?"):
            NeuronAttribution(head, method="direct_effects")
        with pytest.raises(OptionError, match=r"unknown key 'pair'; .* Did you mean 'pairs'\?"):
            make_config({"pair": 1}, folder=tmp_path, where="study.yaml")
        with pytest.raises(OptionError, match=r"site: .*, got 'nonsense'\.$"):
            find_site("nonsense")

    def test_the_command_line_names_the_nearest(self, capsys, tmp_path):
        """The study's and the demo's, before anything is written."""
        assert main(["demo", "--out", str(tmp_path / "out"), "--analyses", "accurracy"]) == 2
        assert (
            "analyses: no analysis is called 'accurracy'. Did you mean 'accuracy'? The analyses are accuracy, "
            in capsys.readouterr().err
        )
        assert not (tmp_path / "out").exists()
        models = [f"--{name}={tmp_path}" for name in ("helpful", "harmless", "mixed")]
        assert main(["study", *models, "--pairs", "none.jsonl", "--set", "n_drawss=3"]) == 2
        assert "Did you mean 'n_draws'?" in capsys.readouterr().err
        for words, meant in (("chek", "check"), ("score a b --dtype bfloat", "bfloat16")):
            with pytest.raises(SystemExit):
                main(words.split())
            assert f"Did you mean '{meant}'?" in capsys.readouterr().err

    def test_the_mistake_is_where_it_was_made(self, tmp_path, capsys):
        """In the file or on the command line, which may also mend the file."""
        file = tmp_path / "s.yaml"
        for text, words, message in (
            (
                "",
                "--analyses overlp",
                "command line: analyses: no analysis is called 'overlp'. Did you mean 'overlap'?",
            ),
            ("", "--set n_drws=4", "command line: options: unknown key 'n_drws'"),
            ("options: {n_drws: 4}", "--set n_draws=4", "s.yaml: options: unknown key 'n_drws'"),
            ("analyses: [deph]", "--analyses overlp", "command line: analyses: no analysis is called 'overlp'"),
            ("analyses: [overlp]", "--rules paper", "s.yaml: analyses: no analysis is called 'overlp'"),
            ("analyses: [overlp]", "--analyses overlap", "s.yaml: pairs: expected a file of pairs"),
            ("", "--columns promt=q", "error: --columns: expected fields of a pair as keys"),
        ):
            file.write_text("models: {helpful: a, harmless: b, mixed: c}\npairs: none.jsonl\n" + text)
            assert main(["study", str(file), *words.split()]) == 2
            assert message in capsys.readouterr().err

    def test_only_similar_choices_are_suggested(self):
        assert nearest("accurracy", ["depth", "accuracy"]) == " Did you mean 'accuracy'?"
        assert nearest("xyz", ["depth"]) == nearest(3, ["depth"]) == nearest("depth", ["depth"]) == ""
        require_choice("x", "a", ["a"])
        with pytest.raises(OptionError, match=r"x: expected one of \['a'\], got 3\.$"):
            require_choice("x", 3, ["a"])


class TestSwapped:
    @pytest.mark.grid
    def test_every_call_recognises_swapped_arguments(self, checkpoints):
        """In a process without the suite's type checker, as users call."""
        code = f"""
            import torch
            from rmtension import *
            from rmtension.neurons import conflict
            from rmtension import RMTensionError
            from rmtension.attribution import faithfulness
            from rmtension.attribution import neuron_dashboards
            from rmtension.passes import collect_profiles
            from rmtension.attribution import single_neuron_effects
            from rmtension.interventions import score_without

            head = RewardHead.from_pretrained({str(checkpoints["gpt2"])!r})
            pairs = PreferencePairs([PreferencePair("how", " do a", " do b")])
            scores = NeuronAttribution(head, "gradient_x_activation").score(pairs)
            neurons, both = scores.top(k=1), {{"helpful": pairs, "harmless": pairs}}
            for call in (
                lambda: AblationContext(neurons, head),
                lambda: NeuronAttribution("gradient_x_activation", head),
                lambda: single_neuron_effects(pairs, head),
                lambda: collect_profiles(pairs, head),
                lambda: faithfulness(pairs, head, scores),
                lambda: neuron_dashboards(head, pairs, neurons),
                lambda: AblationContext(head, scores),
                lambda: head.with_ablation(neurons.mask),
                lambda: score_without(head, pairs, both),
                lambda: ActivationCollector(pairs),
                lambda: SharedNeuronAnalyzer(both),
                lambda: SharedNeuronAnalyzer([scores, scores]),
                lambda: conflict(scores, scores),
                lambda: head.score(pairs),
                lambda: head.score(list(pairs)),
                lambda: head.score(both),
                lambda: head.score_pairs(["text"]),
                lambda: head.score_pairs(both),
                lambda: next(NeuronAttribution(head, "mean_difference").per_token(["text"])),
            ):
                try:
                    call()
                    print("nothing was raised")
                except RMTensionError as error:
                    print(error)
        """
        ran = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True)
        assert ran.returncode == 0, ran.stderr
        swapped = (
            *(
                "AblationContext(head, neurons)",
                "NeuronAttribution(head, method)",
                "single_neuron_effects(head, pairs)",
            ),
            *(
                "collect_profiles(head, pairs)",
                "faithfulness(head, pairs, scores)",
                "neuron_dashboards(head, neurons, pairs)",
            ),
        )
        lines = ran.stdout.splitlines()
        for line, call in zip(lines, swapped, strict=False):
            assert ": they are swapped: " in line
            assert line.endswith(f" Call {call}.")
        mistaken = (
            "neurons: expected NeuronSet, got NeuronScores. Take a set of them with scores.top(0.05).",
            "neurons: expected NeuronSet, got Tensor. Make a set with NeuronSet(mask, site, head.architecture).",
            "neurons: expected NeuronSet, got str. Call AblationContext(head, neurons).",
            "head: expected RewardHead, got PreferencePairs. Call ActivationCollector(head), then collect(pairs).",
            "scores of 'helpful': expected NeuronScores, got PreferencePairs. NeuronAttribution(...).score(pairs)",
            "scores: expected Mapping, got list. Call SharedNeuronAnalyzer({",
            "first: expected PairAttributions, got NeuronScores. NeuronAttribution(...).per_pair(pairs) gives",
            "texts: expected a list of texts, got PreferencePairs. Score preference pairs with score_pairs(pairs)",
            "texts: expected a list of texts, got a list of PreferencePair. Score preference pairs with ",
            "texts: expected a list of texts, got dict. Score preference pairs with score_pairs(pairs)",
            "pairs: expected PreferencePair, got str at position 0. For dicts use PreferencePairs.from_records; to ",
            "pairs: expected preference pairs, got a mapping of ['helpful', 'harmless']. Choose the pairs under",
            "pairs: expected PreferencePair, got str at position 0.",
        )
        assert len(lines) == len(swapped) + len(mistaken)
        for line, begins in zip(lines[len(swapped) :], mistaken, strict=True):
            assert line.startswith(begins)

    def test_the_advice_of_the_message_works(self, head, pairs):
        """What the messages above say to do instead."""
        attribution = NeuronAttribution(head, "gradient_x_activation")
        scores = attribution.score(pairs)
        top = scores.top(0.05)
        AblationContext(head, top)
        AblationContext(head, NeuronSet(top.mask, "mlp", head.architecture))
        SharedNeuronAnalyzer({"name": scores, "other name": scores})
        assert conflict(attribution.per_pair(pairs), attribution.per_pair(pairs)).cosine.value == pytest.approx(1)
        assert len(head.score_pairs({"helpful": pairs}["helpful"])) == len(pairs)
        assert head.score(["how do i"]).shape == (1,)

    def test_the_command_line_recognises_swapped_arguments(self, checkpoints, pairs, capsys, tmp_path):
        file, model = tmp_path / "pairs.jsonl", checkpoints["gpt2"]
        pairs[:2].to_jsonl(file)
        assert main(["score", str(file), str(model)]) == 2
        error = capsys.readouterr().err
        assert f"MODEL, PAIRS: they are swapped: {file} is a file" in error
        advised = error.partition("Run `rmtension ")[2].partition("`")[0].split()
        assert advised == ["score", str(model), str(file)]
        assert main(advised) == 0

    def test_pairs_in_place_of_a_model_are_recognised(self, checkpoints, pairs, capsys, tmp_path, head):
        file, model = tmp_path / "pairs.jsonl", str(checkpoints["gpt2"])
        pairs[:2].to_jsonl(file)
        for words in (["check", str(file)], ["score", str(file), str(file)]):
            assert main(words) == 2
            error = capsys.readouterr().err
            assert f"MODEL: {file} is a file; MODEL is the folder of a checkpoint" in error
            advised = error.split("`rmtension ")[1].split("`")[0].split()
            assert main([model if word == "FOLDER" else word for word in advised]) == 0
            capsys.readouterr()
        for name in (head.model, 3):
            for method in (RewardHead.from_pretrained, RewardHead.from_language_model):
                with pytest.raises(OptionError, match=r"name_or_path: .*RewardHead\.from_classifier\(model, tokenizer"):
                    unchecked(method)(name)
        with pytest.raises(ModelError, match=r"got the file .* is read with PreferencePairs\.read"):
            RewardHead.from_pretrained(file)


class TestFlags:
    """Errors of the library name arguments; the command line names flags in their place, and they are taken."""

    @pytest.mark.parametrize(
        ("message", "told"),
        [
            ("Say output=3, or output=(3, 0).", "Say --output 3, or --output 3 --output 0."),
            ("Say output=('ĠYes', 'No')", "Say --output 'ĠYes' --output No"),
            ("columns={'prompt': 'User Query'}", "--columns 'prompt=User Query'"),
            ("columns={'prompt': None}", "--columns prompt="),
            ("columns={'prompt': ...}", "--columns prompt=COLUMN"),
            ("Say where: base=...", "Say where: --base BASE"),
            ("base='/a b'", "--base '/a b'"),
            ('load with on_invalid="skip".', "load with --on-invalid skip."),
            ("dtype=torch.bfloat16, chat=True", "--dtype bfloat16, --chat"),
            ("pad_token='<pad>'", "--pad-token '<pad>'"),
            ("max_length=12 (now max_length=2)", "--max-length 12 (now --max-length 2)"),
            ("max_length: expected 1", "--max-length: expected 1"),
            ("pairs: expected some", "PAIRS: expected some"),
            ("max_length, dtype: they differ", "--max-length, --dtype: they differ"),
            # What the command has no flag for, and what only looks like an argument.
            ("process_weights=True, fraction=0.5", "process_weights=True, fraction=0.5"),
            ("here: dtype: no flag", "here: dtype: no flag"),
            ("The chat: a text", "The chat: a text"),
            ("Call f(x, dtype=3).", "Call f(x, dtype=3). (On the command line: --dtype 3)"),
        ],
    )
    def test_messages_name_the_flags_of_arguments(self, message, told):
        assert with_flags(message, parser().parse_args(["score", "MODEL", "PAIRS"])) == told

    def test_the_flags_are_taken(self):
        for flags in ("--output 3 --output 0", "--columns 'prompt=User Query'", "--columns prompt=", "--base '/a b'"):
            parser().parse_args(["score", "MODEL", "PAIRS", *shlex.split(flags)])

    def test_a_command_without_the_flag_says_nothing(self):
        for words in (["report", "folder"], ["study", "s.yaml"]):
            assert with_flags("base=...", parser().parse_args(words)) == "base=..."

    def test_an_option_with_another_name_stands_for_the_argument(self):
        options = parser().parse_args(["ablate", "M", "P", "--neurons", "N"])
        assert with_flags("n_draws: expected 2, or n_draws=0", options) == "--draws: expected 2, or --draws 0"

    def test_the_advice_of_the_message_works(self, checkpoints, pairs, capsys, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        rows = [{"User Query": pair.prompt, "chosen": pair.chosen, "rejected": pair.rejected} for pair in pairs[:2]]
        Path("pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        words = ["score", str(checkpoints["gpt2"]), "pairs.jsonl"]
        assert main([*words, "--chat"]) == 2
        error = capsys.readouterr().err
        assert "name it: --columns 'prompt=User Query'." in error
        assert main([*words, *shlex.split("--columns 'prompt=User Query'")]) == 0
