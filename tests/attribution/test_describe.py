"""Descriptions are scored: a planted organism, SciPy's Mann-Whitney U, and answers that cannot be read."""

import re
import runpy
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import stats

from rmtension import PreferencePairs
from rmtension.attribution import NeuronDashboards, describe_dashboards, neuron_dashboards
from rmtension.attribution._describe import SHOWN, auroc, read_answer
from rmtension.errors import DataError, ProvenanceError
from rmtension.synthetic import make_organism

KINDS = ("helpful", "harmless", "shared", "conflict", "decoy")


@pytest.fixture(scope="module")
def organism(tmp_path_factory):
    return make_organism(tmp_path_factory.mktemp("organism"), noise=0.03, n_pairs=120)


class Knowing:
    """A fake language model: it describes a neuron by the word that all shown texts share, and looks for it."""

    def __init__(self, reply=lambda is_there: "10" if is_there else "0"):
        self.reply, self.described, self.asked = reply, [], []

    def __call__(self, prompt):
        if "have in common" in prompt:
            self.described.append(prompt)
            texts = re.findall(r"Text \d+:\n(.*?)(?=\n\nText \d+:|\n\nWhat do these)", prompt, re.DOTALL)
            words = [set(re.findall(r"[a-z]+-\d", text)) for text in texts]
            return f"texts with the word {sorted(set.intersection(*words))[0]}"
        self.asked.append(prompt)
        word = re.search(r"texts with the word (\S+)", prompt)[1]
        return self.reply(word in text_of(prompt).split())


def text_of(prompt):
    return prompt.split("--- the text begins\n")[1].split("\n--- the text ends")[0]


def described(head, neurons, pairs, model):
    """Dashboards without examples, with the descriptions of a model."""
    plain = neuron_dashboards(head, neurons, pairs, n_examples=0, progress=False)
    assert not len(plain.descriptions)
    found = describe_dashboards(plain, head, pairs, model, progress=False)
    assert found.table is plain.table
    return found


@pytest.fixture(scope="module")
def planted(organism):
    neurons = organism.truth["helpful"]
    for kind in KINDS[1:]:
        neurons = neurons | organism.truth[kind]
    model = Knowing()
    head = organism.head()
    return described(head, neurons, organism.pairs, model), model


def test_a_planted_neurons_true_description_scores_above_a_shuffled_one(planted):
    dashboards, _ = planted
    table = dashboards.descriptions
    assert len(table) == 20
    assert (table["auroc"] > 0.9).all()
    assert (table["low"] > 0.9).all()
    # Words occur together, so that another neuron's description is not exactly at 0.5.
    assert abs(table["shuffled"].mean() - 0.5) < 0.1
    assert ((table["shuffled_low"] < table["shuffled"]) & (table["shuffled"] < table["shuffled_high"])).all()
    assert (table["shuffled"] < table["low"]).all()
    assert (table["n_active"] == 20).all()
    assert (table["n_inactive"] == 20).all()
    assert table["description"].nunique() == 20


def test_other_pairs_than_those_of_the_dashboards_are_refused(planted, organism):
    dashboards, _ = planted
    fewer = {name: part[1:] for name, part in organism.pairs.items()}
    with pytest.raises(ProvenanceError, match="pairs: the dashboards are of"):
        describe_dashboards(dashboards, organism.head(), fewer, Knowing(), progress=False)


def test_the_reader_of_the_examples_scores_what_a_person_wrote(planted, organism):
    """The word of each neuron as a regular expression; of one neuron, nothing was written."""
    dashboards, _ = planted
    path = Path(__file__).parents[2] / "examples" / "replication" / "describe.py"
    written = {
        f"L{row.layer} N{row.neuron}": {"fires on": "a word", "finds": re.escape(row.description.split()[-1])}
        for row in dashboards.descriptions.itertuples()
    }
    left_out, *_ = written
    del written[left_out]
    reader = runpy.run_path(str(path))["Reader"](written)
    table = describe_dashboards(dashboards, organism.head(), organism.pairs, reader, progress=False).descriptions
    assert len(reader.shown) == 20
    first = table["description"] == f"{left_out}: not described"
    assert first.sum() == 1
    assert table["auroc"][first].item() == 0.5
    assert (table["auroc"][~first] > 0.9).all()


def test_shown_texts_are_held_out_and_the_rest_is_balanced(planted, organism):
    dashboards, model = planted
    head = organism.head()
    assert len(model.asked) == 20 * 2 * 40
    prompts = {}
    for pairs in organism.pairs.values():
        for pair in pairs:
            for side in ("chosen", "rejected"):
                prompts[head.tokenizer.decode(head.tokenizer(pair.text(side))["input_ids"])] = pair.prompt
    for number, (prompt, (layer, neuron)) in enumerate(zip(model.described, dashboards.neurons, strict=True)):
        shown = re.findall(r"Text \d+:\n(.*?)(?=\n\nText \d+:|\n\nWhat do these)", prompt, re.DOTALL)
        assert len(shown) == SHOWN
        assert all("<<" in text and text.count("<<") == text.count(">>") for text in shown)
        plain = [text.replace("<<", "").replace(">>", "") for text in shown]
        asked = [text_of(one) for one in model.asked[number * 80 : number * 80 + 40]]
        assert len(set(asked)) == 40
        assert not {prompts[text] for text in plain} & {prompts[text] for text in asked}
        # The word of the neuron is in the 20 active texts and in none of the others.
        word = dashboards.of("descriptions", layer, neuron)["description"].iloc[0].split()[-1]
        assert [word in text.split() for text in asked] == [True] * 20 + [False] * 20


@pytest.mark.grid
def test_answers_that_say_nothing_score_a_half(organism):
    draw = np.random.default_rng(0)
    neurons = organism.truth["helpful"]
    for reply, spread in ((lambda _: "5", 0.0), (lambda _: str(draw.integers(11)), 0.35)):
        table = described(organism.head(), neurons, organism.pairs, Knowing(reply)).descriptions
        assert (abs(table["auroc"] - 0.5) <= spread).all()
    assert ((table["low"] < 0.5) & (table["high"] > 0.5)).sum() >= 3


def test_auroc_is_mann_whitneys_u_over_the_number_of_pairs():
    draw = np.random.default_rng(1)
    for n, m in ((5, 9), (20, 20), (7, 5)):
        answers = draw.integers(0, 6, size=n + m).astype(float)  # with ties
        active = draw.permutation([True] * n + [False] * m)
        value, low, high = auroc(answers.tolist(), active.tolist(), level=0.95, seed=0)
        u = stats.mannwhitneyu(answers[active], answers[~active]).statistic
        assert value == pytest.approx(u / (n * m), abs=1e-12)
        assert low < value < high
        # The bootstrap, drawn one by one.
        rng = np.random.default_rng(5)
        resamples = [
            stats.mannwhitneyu(rng.choice(answers[active], n), rng.choice(answers[~active], m)).statistic / (n * m)
            for _ in range(1000)
        ]
        assert [low, high] == pytest.approx(np.quantile(resamples, [0.025, 0.975]), abs=0.04)
    assert auroc([1.0, 2.0, 3.0, 4.0], [False, False, True, True], level=0.95, seed=0) == (1.0, 1.0, 1.0)
    assert auroc([1.0, 2.0, 3.0, 4.0], [True, True, False, False], level=0.95, seed=0)[0] == 0.0


@pytest.mark.parametrize(
    ("answer", "number"), [("7", 7), (" 10. ", 10), ("0", 0), ("2.5", 2.5), ("Yes", 10), ("no.", 0)]
)
def test_answers_are_read(answer, number):
    assert read_answer(answer, "L0 N1") == number


@pytest.mark.parametrize("answer", ["", "maybe", "11", "-1", "7/10", "I think 7", "yes and no", None, 7, "nan", "1e1"])
def test_other_answers_are_refused_with_the_neurons_name(answer):
    with pytest.raises(DataError, match=r"L0 N1 applies to a text, got " + re.escape(repr(answer))):
        read_answer(answer, "L0 N1")


@pytest.mark.grid
def test_an_unreadable_answer_names_the_neuron(organism):
    def unclear(prompt):
        return "a word" if "have in common" in prompt else "It depends."

    neurons = organism.truth["helpful"]
    layer, neuron = next(iter(neurons))
    with pytest.raises(DataError, match=rf"L{layer} N{neuron} applies to a text, got 'It depends\.'"):
        described(organism.head(), neurons, organism.pairs, unclear)
    with pytest.raises(DataError, match=rf"a description of L{layer} N{neuron} as text, got ''"):
        described(organism.head(), neurons, organism.pairs, lambda _: "")


def test_too_few_texts_give_a_reason_and_no_description(organism, tmp_path):
    def unasked(prompt):
        raise AssertionError("nothing is asked")

    few = {name: pairs[:3] for name, pairs in organism.pairs.items()}
    neurons = organism.truth["helpful"] | organism.truth["loud"]
    dashboards = described(organism.head(), neurons, few, unasked)
    table = dashboards.descriptions
    assert (table["description"] == "").all()
    assert table["auroc"].isna().all()
    assert table["reason"].str.contains("too few texts|no activation").all()
    assert "No description: " in dashboards._repr_html_()
    dashboards.save(tmp_path / "neurons.json")
    read = NeuronDashboards.load(tmp_path / "neurons.json").descriptions
    assert read["reason"].tolist() == table["reason"].tolist()
    assert read["auroc"].isna().all()


def test_a_single_description_has_no_shuffled_control(organism):
    neurons = organism.truth["helpful"]
    only = type(neurons).from_indices(
        list(neurons)[:1], shape=tuple(neurons.mask.shape), site="mlp", architecture=neurons.architecture
    )
    dashboards = described(organism.head(), only, organism.pairs, Knowing())
    assert dashboards.descriptions["auroc"].tolist() == [1.0]
    assert dashboards.descriptions["shuffled"].isna().all()
    assert "no other neuron has a description" in dashboards._repr_html_()


def test_one_pair_is_enough_for_dashboards(organism):
    one = PreferencePairs(organism.pairs["helpful"][:1])
    dashboards = neuron_dashboards(organism.head(), organism.truth["helpful"], {"x": one}, progress=False)
    assert dashboards.table["x_effect_low"].isna().all()
    assert torch.tensor(dashboards.table["x_effect"]).isfinite().all()
    assert "L" in dashboards._repr_html_()
