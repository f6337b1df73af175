"""The preference world against its own docstring: splits, balances, and the one comparison that is in conflict."""

import re
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch
from tiny_models import grid

from rmtension.data._pairs import PreferencePairs
from rmtension.errors import OptionError
from rmtension.synthetic._world import PreferenceWorld, preference_world
from rmtension.training._train_tokenizer import train_tokenizer

SEEDS = (0, 1, 247)
PEOPLE = re.compile(
    r"my neighbour|my boss|my landlord|my cousin|a classmate|a colleague|a stranger|a tourist|the mayor|the postman|"
    r"my old teacher|a bus driver|my flatmate|a shop assistant|the new manager|my rival"
)
FIERCE = re.compile(
    r"\b(crush|beat|burn|squash|smash|slap|kill|terminate|freeze|attack|hack|trap|shoot|blow up|hit|punch)\b"
)
# A topic is what is left of a question without its template and circumstance.
CIRCUMSTANCE = re.compile(r"( today| this weekend| on my own| without much money| for the first time)?[.?].*$")
TEMPLATE = re.compile(
    r"^(How do I|How can I|What is the best way to|Tell me how to|Please explain how to|I want to|Can you help me|"
    r"Give me a plan to|What do I need to|Show me the steps to) "
)


@pytest.fixture(scope="module", params=grid(SEEDS))
def world(request):
    return preference_world(request.param)


def topic(prompt):
    question = prompt.removeprefix("\n\nHuman: ").removesuffix("\n\nAssistant:")
    assert TEMPLATE.search(question)
    assert CIRCUMSTANCE.search(question)
    return CIRCUMSTANCE.sub("", TEMPLATE.sub("", question))


def is_harmful(prompt):
    """The rule of the docstring, restated on the text: a fierce action that meets a person."""
    return bool(PEOPLE.search(prompt)) and bool(FIERCE.search(prompt))


def response_type(text):
    if re.search(r"I am sorry, I cannot|I will not assist|I must decline", text):
        return "R"
    details = r"First list what|Set aside|Prepare|small steps|Check the result|Write down|the easy part|Repeat it"
    return "I" if re.search(details, text) else "V"


def splits(world):
    return [(split, pairs) for split in (world.train, world.test) for pairs in split.values()]


def conflicts(world):
    """Comparisons (prompt and two responses) that the two objectives judge differently, with both subsets.

    Also how many comparisons both of them judge alike.
    """
    found, agreed = [], 0
    for split in (world.train, world.test):
        judged = {(p.prompt, frozenset((p.chosen, p.rejected))): p for p in split["helpful"]}
        for pair in split["harmless"]:
            other = judged.get((pair.prompt, frozenset((pair.chosen, pair.rejected))))
            if other is not None:
                agreed += pair.chosen == other.chosen
                if pair.chosen != other.chosen:
                    found.append((other.subset, pair.subset))
    return found, agreed


def longer_counts(pairs, length=len):
    """(chosen longer, rejected longer, equal)."""
    gaps = [length(pair.chosen) - length(pair.rejected) for pair in pairs]
    return sum(gap > 0 for gap in gaps), sum(gap < 0 for gap in gaps), sum(gap == 0 for gap in gaps)


# -- splits ------------------------------------------------------------------------------------------------------------


def test_no_prompt_and_no_topic_is_in_both_splits(world):
    train = {prompt for pairs in world.train.values() for prompt in pairs.prompts}
    test = {prompt for pairs in world.test.values() for prompt in pairs.prompts}
    assert not train & test
    assert not set(map(topic, train)) & set(map(topic, test))
    assert len(test) == len(world.test["helpful"]) == len(world.test["harmless"]) >= 300
    assert train | test == set(world.kinds)


def test_every_action_and_every_object_of_the_test_occurs_in_training(world):
    def words(split):
        return set(" ".join(topic(prompt) for pairs in split.values() for prompt in pairs.prompts).split())

    assert words(world.test) <= words(world.train)


def test_base_model_texts_are_training_texts(world):
    assert not any(text.startswith(prompt) for text in world.texts for prompt in world.test["helpful"].prompts[:40])
    assert len(set(world.texts)) == len(world.texts) > len(world.train["helpful"])


# -- judgements --------------------------------------------------------------------------------------------------------


def test_every_pair_follows_the_table_of_the_docstring(world):
    table = {
        ("helpful", False): {("I", "V"): "informative", ("I", "R"): "compliance", ("V", "R"): "compliance"},
        ("helpful", True): {("I", "V"): "informative", ("I", "R"): "conflict"},
        ("harmless", False): {("I", "R"): "should_respond", ("V", "R"): "should_respond"},
        ("harmless", True): {("R", "I"): "should_refuse", ("R", "V"): "should_refuse"},
    }
    for _, pairs in splits(world):
        seen = set()
        for pair in pairs:
            harmful = is_harmful(pair.prompt)
            assert harmful == (world.kinds[pair.prompt] == "harmful")
            sides = (response_type(pair.chosen), response_type(pair.rejected))
            assert table[pair.objective, harmful][sides] == pair.subset
            seen.add((harmful, sides))
        assert len(seen) == sum(len(rows) for (name, _), rows in table.items() if name == pairs.objectives[0])


def test_objectives_disagree_on_the_conflict_and_nowhere_else(world):
    found, agreed = conflicts(world)
    assert set(found) == {("conflict", "should_refuse")}
    # Every pair of the subset is judged by harmlessness too: the disagreement is in the data, not inferred.
    assert len(found) == sum(len(split["helpful"].filter(subset="conflict")) for split in (world.train, world.test))
    assert agreed > 0


def test_the_conflict_check_sees_a_broken_world():
    world = preference_world(0, n_train=48, n_test=48)
    swapped = PreferencePairs(
        pair.swapped() if pair.subset == "should_respond" else pair for pair in world.train["harmless"]
    )
    found, _ = conflicts(replace(world, train={**world.train, "harmless": swapped}))
    assert ("compliance", "should_respond") in found


def test_spotting_rules_score_what_the_docstring_says(world):
    def accuracy(refuse):
        """Of a judge that prefers the refusal wherever `refuse(prompt)`."""
        pairs = world.test["harmless"]
        return np.mean([(response_type(p.chosen) == "R") == bool(refuse(p.prompt)) for p in pairs])

    assert accuracy(lambda prompt: True) == accuracy(lambda prompt: False) == 0.5
    assert accuracy(FIERCE.search) == pytest.approx(5 / 6)
    assert accuracy(PEOPLE.search) == pytest.approx(5 / 6)
    assert accuracy(is_harmful) == 1.0


# -- length ------------------------------------------------------------------------------------------------------------


def test_chosen_is_longer_in_exactly_half_of_every_subset_and_kind(world):
    for _, pairs in splits(world):
        for subset in pairs.subsets:
            part = pairs.filter(subset=subset)
            for kind in ("harmful", "ambiguous", "person", "thing"):
                of_kind = [pair for pair in part if world.kinds[pair.prompt] == kind]
                assert longer_counts(of_kind) == (len(of_kind) / 2, len(of_kind) / 2, 0)


def test_length_in_tokens_is_balanced_too(world):
    tokenizer = train_tokenizer(world.texts, 1024)

    def n_tokens(text):
        return len(tokenizer(text)["input_ids"])

    for _, pairs in splits(world):
        for subset in pairs.subsets:
            part = pairs.filter(subset=subset)
            longer, shorter, equal = longer_counts(part, n_tokens)
            assert abs(longer - shorter) <= 0.06 * len(part)
            assert equal <= 0.03 * len(part)


def test_no_length_is_typical_of_the_chosen_response(world):
    # Half of the signs could still hide a preference for medium lengths: compare the distributions as well. A
    # two-sample Kolmogorov-Smirnov distance above 1.95 * sqrt(2 / n) would have p < 0.001.
    for _, pairs in splits(world):
        for subset in pairs.subsets:
            part = pairs.filter(subset=subset)
            chosen, rejected = (np.sort([len(getattr(p, side)) for p in part]) for side in ("chosen", "rejected"))
            grid = np.union1d(chosen, rejected)
            distance = np.abs(
                np.searchsorted(chosen, grid, "right") - np.searchsorted(rejected, grid, "right")
            ).max() / len(part)
            assert distance < 1.95 * np.sqrt(2 / len(part))


def test_the_length_check_sees_an_unbalanced_world(world):
    padded = PreferencePairs(replace(pair, chosen=pair.chosen + " word" * 40) for pair in world.test["helpful"])
    assert longer_counts(padded)[0] == len(padded)


# -- numbers and seeds -------------------------------------------------------------------------------------------------


def test_counts_of_the_smallest_world():
    world = preference_world(3, n_train=48, n_test=96)
    assert Counter(world.kinds.values()) == {"harmful": 72, "ambiguous": 24, "person": 24, "thing": 24}
    assert Counter(p.subset for p in world.train["helpful"]) == {"informative": 24, "compliance": 12, "conflict": 12}
    assert Counter(p.subset for p in world.train["harmless"]) == {"should_refuse": 24, "should_respond": 24}
    ids = [pair.id for _, pairs in splits(world) for pair in pairs]
    assert len(set(ids)) == len(ids)
    prompts = world.train["helpful"].prompts
    assert all(prompt.startswith("\n\nHuman: ") and prompt.endswith("\n\nAssistant:") for prompt in prompts)


def test_the_seed_decides_everything_and_touches_no_global_state():
    first = preference_world(5, n_train=48, n_test=48)
    assert isinstance(first, PreferenceWorld)
    np.random.seed(1)  # noqa: NPY002
    # Python's own generator is left out: the shape checker of this suite draws from it.
    before = np.random.get_state()[1].tolist(), torch.get_rng_state()  # noqa: NPY002
    assert preference_world(5, n_train=48, n_test=48) == first
    assert np.random.get_state()[1].tolist() == before[0]  # noqa: NPY002
    assert torch.equal(torch.get_rng_state(), before[1])
    other = preference_world(6, n_train=48, n_test=48)
    assert len(set(first.train["helpful"].prompts) & set(other.train["helpful"].prompts)) < 10


@pytest.mark.parametrize("n", [0, -48, 47, 7728])
def test_unbalanced_and_too_large_counts_are_refused(n):
    with pytest.raises(OptionError, match="n_test: expected a multiple of 48 from 48 to 7680"):
        preference_world(0, n_train=48, n_test=n)
