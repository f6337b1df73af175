"""Organisms against their docstrings: what every neuron does is found again by taking it out."""

from collections import Counter
from dataclasses import replace
from itertools import combinations

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file

from rmtension import AblationContext, ActivationCollector, Mean, NeuronAttribution, NeuronSet, RewardHead
from rmtension.errors import OptionError
from rmtension.synthetic._organisms import make_organism

OBJECTIVES = ("helpful", "harmless")
SMALL = {"depth": 3, "width": 24, "per_kind": 2, "n_pairs": 24}
# The docstring's table, restated: what one word adds, and what taking its neuron out does to the two margins.
ADDS = {"helpful": 1.0, "harmless": 1.0, "shared": 1.0, "conflict": 0.5, "decoy": 0.0}
SIGNS = {
    "helpful": (-1, 0), "harmless": (0, -1), "shared": (-1, -1), "conflict": (-1, 1), "decoy": (0, 0), "loud": (0, 0)
}  # fmt: skip


def opened(folder, **options):
    organism = make_organism(folder, **SMALL | options)
    return organism, organism.head(dtype=torch.float64)


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    return opened(tmp_path_factory.mktemp("plain"))


@pytest.fixture(scope="module")
def redundant(tmp_path_factory):
    """The words of number 0 reach the reward through three neurons, those of number 1 through one."""
    return opened(tmp_path_factory.mktemp("redundant"), redundancy=1)


@pytest.fixture(scope="module")
def plain_effects(plain):
    return all_effects(*plain)


def neuron_set(head, *places):
    shape = (head.n_layers, head.n_neurons("mlp"))
    return NeuronSet.from_indices(places, shape=shape, site="mlp", architecture=head.architecture)


def mean_margins(organism, head):
    scored = head.score_pairs(organism.pairs["helpful"] + organism.pairs["harmless"])
    return torch.stack([scored.filter(objective=objective).margin.mean() for objective in OBJECTIVES])


def effect(organism, head, neurons, **options):
    """What ablating `neurons` does to the mean helpful and the mean harmless margin."""
    with AblationContext(head, neurons, **options):
        ablated = mean_margins(organism, head)
    return ablated - mean_margins(organism, head)


def all_effects(organism, head):
    """place -> effect, for every single neuron."""
    intact = mean_margins(organism, head)
    effects = {}
    for place in np.ndindex(head.n_layers, head.n_neurons("mlp")):
        with AblationContext(head, neuron_set(head, place)):
            effects[place] = mean_margins(organism, head) - intact
    return effects


def misjudged(effects, margins, truth, silent=()):
    """Places whose effect is not what `truth` says: under 1% of the margin where 0 is due, over 5% with its sign."""
    wrong = []
    for place, change in effects.items():
        kinds = [kind for kind, neurons in truth.items() if place in neurons]
        signs = SIGNS[kinds[0]] if kinds and place not in silent else (0, 0)
        for sign, share in zip(signs, change / margins, strict=True):
            if abs(share) > 0.01 if sign == 0 else sign * share < 0.05:
                wrong.append(place)
    return sorted(set(wrong))


def counted(text, *, once=()):
    """The reward that the docstring promises; the words in `once` count at most once, and cost it where they lack."""
    counts = Counter(text.split())
    reward = 0.0
    for kind, adds in ADDS.items():
        for number in range(SMALL["per_kind"]):
            word = f"{kind}-{number}"
            reward += adds * (min(counts[word], 1) - 1 if word in once else counts[word])
    return reward


def last_activations(head, texts):
    """[text, layer, neuron] at the last token of texts of equal length."""
    found = {}
    with head.hooks("mlp", lambda layer, seen: found.update({layer: seen.reshape(len(texts), -1, seen.shape[-1])})):
        head.score(texts)
    return torch.stack([found[layer][:, -1].cpu() for layer in range(head.n_layers)], dim=1)


def single_word_texts():
    """word -> a text of the organisms' length with that word and fillers."""
    words = [f"{kind}-{number}" for kind in ADDS for number in range(SMALL["per_kind"])]
    return {word: f"\n\nHuman: a b c d e\n\nAssistant: {'f ' * 10}{word} {'g ' * 13}end" for word in words}


# -- the checkpoint ----------------------------------------------------------------------------------------------------


def test_the_checkpoint_is_one_of_plain_transformers(plain):
    organism, head = plain
    files = {path.name for path in organism.folder.iterdir()}
    assert files == {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"}
    model = transformers.AutoModelForSequenceClassification.from_pretrained(organism.folder, dtype=torch.float64)
    tokenizer = transformers.AutoTokenizer.from_pretrained(organism.folder)
    # Of unequal length, so that padding is read over.
    texts = [pair.text("chosen") for pair in organism.pairs["helpful"]] + ["helpful-0 end", "shared-1 a b end"]
    tokens = tokenizer(texts, padding=True, return_tensors="pt")
    assert tokenizer.unk_token_id not in tokens["input_ids"]
    with torch.no_grad():
        rewards = model.eval()(**tokens).logits[:, 0]
        model.score.weight *= 1.01
        others = model(**tokens).logits[:, 0]
    torch.testing.assert_close(head.score(texts), rewards, rtol=0, atol=1e-6)
    assert (others - rewards).abs().max() > 1e-2


def test_every_way_of_opening_gives_the_same_rewards(plain):
    organism, head = plain
    texts = [pair.text("rejected") for pair in organism.pairs["harmless"]]
    rewards = head.score(texts).float()
    # Float32 keeps 7 digits, of sums near 10.
    torch.testing.assert_close(organism.head().score(texts), rewards, rtol=0, atol=1e-4)
    # Folding and centring leave a model as it is whose writes have mean zero; float32 again.
    processed = organism.head(process_weights=True)
    torch.testing.assert_close(processed.score(texts), rewards, rtol=0, atol=1e-3)
    # Bfloat16 keeps 3 digits, enough for every answer: the large constant has channels of its own.
    rounded = organism.head(dtype=torch.bfloat16)
    torch.testing.assert_close(rounded.score(texts), rewards, rtol=0, atol=0.3)


def test_architecture_and_head_agree(plain):
    organism, head = plain
    assert isinstance(head, RewardHead)
    assert {neurons.architecture for neurons in organism.truth.values()} == {head.architecture}
    assert {neurons.site for neurons in organism.truth.values()} == {"mlp"}


# -- the pairs ---------------------------------------------------------------------------------------------------------


def test_pairs(plain):
    organism, _ = plain
    assert list(organism.pairs) == list(OBJECTIVES)
    pairs = [pair for objective in OBJECTIVES for pair in organism.pairs[objective]]
    assert all(len(pair.text(side).split()) == 32 for pair in pairs for side in ("chosen", "rejected"))
    for unique in ("prompt", "id", "chosen", "rejected"):
        assert len({getattr(pair, unique) for pair in pairs}) == len(pairs) == 48
    assert {pair.objective for pair in organism.pairs["harmless"]} == {"harmless"}
    # Kinds stand where the table says, one to three times, and as often on both sides where it says alike.
    for pair in pairs:
        chosen, rejected = (
            Counter(word.split("-")[0] for word in text.split() if "-" in word) for text in (pair.chosen, pair.rejected)
        )
        other = "harmless" if pair.objective == "helpful" else "helpful"
        assert chosen[other] == rejected[other]
        conflict = (chosen, rejected) if pair.objective == "helpful" else (rejected, chosen)
        assert not conflict[1]["conflict"]
        assert all(not rejected[kind] for kind in (pair.objective, "shared", "decoy"))
        counts = [chosen[other], conflict[0]["conflict"], *(chosen[kind] for kind in (pair.objective, "shared"))]
        assert all(1 <= count <= 3 for count in counts)


@pytest.mark.parametrize("redundancy", [0, 1])
def test_rewards_follow_from_the_words(plain, redundant, redundancy):
    organism, head = (plain, redundant)[redundancy]
    once = [f"{kind}-0" for kind in ADDS if kind != "decoy"] if redundancy else []
    texts = [pair.text(side) for pairs in organism.pairs.values() for pair in pairs for side in ("chosen", "rejected")]
    promised = torch.tensor([counted(text, once=once) for text in texts], dtype=torch.float64)
    # 1e-3: what layer norms take off a sum of up to 9.
    torch.testing.assert_close(head.score(texts), promised, rtol=0, atol=1e-3)
    # Words taken for others are seen.
    wrong = torch.tensor([counted(text.replace("conflict", "shared"), once=once) for text in texts])
    assert (wrong - head.score(texts)).abs().max() > 0.4
    for pairs in organism.pairs.values():
        assert head.score_pairs(pairs).accuracy() == 1.0
        assert head.score_pairs(pairs.swapped()).accuracy() == 0.0


# -- the truth, by brute force -----------------------------------------------------------------------------------------


def test_ablating_every_neuron_recovers_the_truth(plain, plain_effects):
    organism, head = plain
    truth, margins = organism.truth, mean_margins(organism, head)
    assert list(truth) == list(SIGNS)
    assert [len(neurons) for neurons in truth.values()] == [2] * 6
    assert not any(len(one & other) for one, other in combinations(truth.values(), 2))
    assert organism.backups == ()
    assert len(plain_effects) == 72
    assert misjudged(plain_effects, margins, truth) == []
    # The check refuses a wrong truth, kind by kind.
    for one, other in [("helpful", "harmless"), ("shared", "conflict"), ("decoy", "shared"), ("loud", "helpful")]:
        swapped = truth | {one: truth[other], other: truth[one]}
        assert set(misjudged(plain_effects, margins, swapped)) == set(truth[one]) | set(truth[other])


def test_effects_have_their_closed_form(plain, plain_effects):
    """Minus the mean difference of last activations, times what the neuron writes along the head."""
    organism, head = plain
    weights = {name: weight.double() for name, weight in load_file(organism.folder / "model.safetensors").items()}
    outputs = torch.stack(
        [weights[f"transformer.h.{layer}.mlp.c_proj.weight"] @ weights["score.weight"][0] for layer in range(3)]
    )
    attribution = NeuronAttribution(head, method="mean_difference", positions="last")
    expected = -outputs * torch.stack([attribution.score(organism.pairs[name]).values for name in OBJECTIVES])
    errors = torch.stack([(found - expected[:, *place]).abs().max() for place, found in plain_effects.items()])
    assert errors.max() < 0.01 * expected.abs().max()
    carriers = expected[:, organism.truth["shared"].mask]
    assert carriers.max() < -0.2
    # Gradients say the same of neurons that reach the reward linearly.
    gradients = NeuronAttribution(head, method="gradient_x_activation")
    for row, name in enumerate(OBJECTIVES):
        values = gradients.score(organism.pairs[name]).values
        torch.testing.assert_close(values, -expected[row], rtol=0, atol=1e-3)


def test_decoys_are_loud_and_idle(plain):
    organism, head = plain
    both = organism.pairs["helpful"] + organism.pairs["harmless"]
    sizes = ActivationCollector(head, site="mlp").collect(both).abs_mean
    carriers = organism.truth["helpful"] | organism.truth["harmless"] | organism.truth["shared"]
    largest = sizes[carriers.mask].max()
    differences = [
        NeuronAttribution(head, "mean_difference", positions="last").score(organism.pairs[objective]).values
        for objective in OBJECTIVES
    ]
    decoy, loud = organism.truth["decoy"], organism.truth["loud"]
    assert sizes[decoy.mask].min() > largest
    assert sizes[loud.mask].min() > largest
    for values in differences:
        assert values[decoy.mask].min() > 2 * values[carriers.mask].max()
        assert values[loud.mask].abs().max() < 1e-9
    margins = mean_margins(organism, head)
    assert (effect(organism, head, decoy | loud) / margins).abs().max() < 1e-3
    # Half the carriers do what so many decoys do not.
    assert (effect(organism, head, organism.truth["shared"]) / margins).max() < -0.2


# -- redundancy --------------------------------------------------------------------------------------------------------


@pytest.mark.grid
def test_backup_neurons_matter_only_together(redundant):
    organism, head = redundant
    truth, margins = organism.truth, mean_margins(organism, head)
    assert [len(neurons) for neurons in truth.values()] == [4, 4, 4, 4, 2, 2]
    assert [len(pair) for pair in organism.backups] == [2] * 4
    silent = [place for pair in organism.backups for place in pair]
    effects = all_effects(organism, head)
    # Everything that is no backup, the third neuron among it, moves the margins as its kind says; a backup alone, none.
    assert misjudged(effects, margins, truth, silent) == []
    assert misjudged(effects, margins, truth) == sorted(silent)
    gradients = [
        NeuronAttribution(head, method="gradient_x_activation").score(organism.pairs[name]).values
        for name in OBJECTIVES
    ]
    for kind, pair in zip(list(SIGNS)[:4], organism.backups, strict=True):
        assert len(pair & truth[kind]) == 2
        (layer,) = {layer for layer, _ in pair}
        together = effect(organism, head, pair)
        for sign, share in zip(SIGNS[kind], together / margins, strict=True):
            assert sign * share > 0.05 if sign else abs(share) < 0.01
        # The third neuron is the one of its kind, a layer later, that does alone what both do.
        thirds = [p for p in truth[kind] - pair if p[0] == layer + 1 and (effects[p] - together).abs().max() < 1e-3]
        assert len(thirds) == 1
        for values in gradients:
            # Not 0: layer norms divide by a scale that everything is a little part of.
            assert values[pair.mask].abs().max() < 1e-4
        assert max(abs(values[thirds[0]]) for values in gradients) > 0.2


def test_a_mean_in_place_of_a_backup_finds_the_word_everywhere(redundant):
    organism, head = redundant
    reference = ActivationCollector(head, site="mlp").collect(organism.pairs["helpful"])
    (first, _) = organism.backups[0]
    alone = neuron_set(head, first)
    assert abs(effect(organism, head, alone)[0]) < 1e-3
    assert effect(organism, head, alone, replacement=Mean(reference))[0] < -0.1


# -- superposition and noise -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("share", [0.0, 0.3])
def test_superposition_is_the_share_of_a_second_neuron(tmp_path, plain, share):
    organism, head = opened(tmp_path, superposition=share) if share else plain
    carriers = torch.stack([neurons.mask for kind, neurons in organism.truth.items() if kind != "loud"]).any(0)
    answers = last_activations(head, list(single_word_texts().values()))[:, carriers]
    assert answers.shape == (10, 10)
    # In units of what each neuron answers to its own word.
    answers = answers / answers.max(dim=0).values
    answers[answers.abs() < 1e-4] = 0
    per_word = answers.sort(dim=1).values
    torch.testing.assert_close(per_word[:, -1], torch.ones(10, dtype=torch.float64), rtol=0, atol=1e-4)
    torch.testing.assert_close(per_word[:, -2], torch.full((10,), share, dtype=torch.float64), rtol=0, atol=1e-4)
    assert not per_word[:, :-2].any()
    # The second neurons are all different: every neuron answers to one other word.
    assert (answers > 0).sum(dim=0).tolist() == [2 if share else 1] * 10


def test_superposition_moves_the_other_margin(tmp_path, plain):
    organism, head = plain
    crossed, other_head = opened(tmp_path, superposition=0.3)
    assert (crossed.pairs, crossed.truth) == (organism.pairs, organism.truth)

    def leaks(organism, head):
        return [
            abs(effect(organism, head, neuron_set(head, place))[1 - row])
            for row, kind in enumerate(OBJECTIVES)
            for place in organism.truth[kind]
        ]

    assert max(leaks(organism, head)) < 1e-3
    assert max(leaks(crossed, other_head)) > 0.1


def test_noise_reaches_the_reward_through_all_other_neurons(tmp_path, plain):
    organism, head = plain
    noisy, noisy_head = opened(tmp_path, noise=0.05)
    assert (noisy.pairs, noisy.truth) == (organism.pairs, organism.truth)
    others = ~torch.stack([neurons.mask for neurons in organism.truth.values()]).any(0)
    places = others.nonzero().tolist()[::10]
    assert len(places) == 6
    for place in places:
        assert not effect(organism, head, neuron_set(head, tuple(place))).any()
    moved = [effect(noisy, noisy_head, neuron_set(noisy_head, tuple(place))).abs().max() for place in places]
    # A neuron that draws weights below its threshold stays silent.
    assert sum(change > 1e-6 for change in moved) >= 3
    assert max(moved) < 0.1


# -- seeds and errors --------------------------------------------------------------------------------------------------


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_the_seed_decides_every_byte_and_touches_no_global_state(tmp_path):
    options = SMALL | {"noise": 0.1, "superposition": 0.2, "redundancy": 1}
    np.random.seed(1)  # noqa: NPY002
    before = np.random.get_state()[1].tolist(), torch.get_rng_state()  # noqa: NPY002
    first = make_organism(tmp_path / "first", seed=3, **options)
    assert np.random.get_state()[1].tolist() == before[0]  # noqa: NPY002
    assert torch.equal(torch.get_rng_state(), before[1])
    again = make_organism(str(tmp_path / "again"), seed=3, **options)
    assert contents(first.folder) == contents(again.folder)
    assert replace(again, folder=first.folder) == first
    other = make_organism(tmp_path / "other", seed=4, **options)
    assert contents(other.folder)["model.safetensors"] != contents(first.folder)["model.safetensors"]
    assert other.truth["shared"] != first.truth["shared"]
    assert not set(other.pairs["helpful"].prompts) & set(first.pairs["helpful"].prompts)


def test_kinds_are_spread_evenly_over_the_default_depth(tmp_path):
    organism = make_organism(tmp_path, n_pairs=4)
    assert [neurons.n_per_layer for neurons in organism.truth.values()] == [[1] * 4] * 6


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("seed", {"seed": -1}),
        ("depth", {"depth": 0}),
        ("depth", {"depth": 1, "redundancy": 1}),
        ("width", {"width": 0}),
        ("per_kind", {"per_kind": 0}),
        ("redundancy", {"redundancy": 3}),
        ("redundancy", {"redundancy": -1}),
        ("superposition", {"superposition": 1.1}),
        ("superposition", {"superposition": float("nan")}),
        ("noise", {"noise": -0.1}),
        ("n_pairs", {"n_pairs": 1}),
    ],
)
def test_numbers_out_of_range_are_refused_before_anything_is_written(tmp_path, name, options):
    with pytest.raises(OptionError, match=f"^{name}: expected .*, got "):
        make_organism(tmp_path / "none", **SMALL | options)
    assert not (tmp_path / "none").exists()


def test_the_least_width_is_named_and_enough(tmp_path):
    with pytest.raises(OptionError, match="width: expected at least 4 neurons per layer for per_kind=2"):
        make_organism(tmp_path, **SMALL | {"width": 3})
    organism, head = opened(tmp_path, width=4)
    assert sum(map(len, organism.truth.values())) == head.n_layers * head.n_neurons("mlp") == 12
