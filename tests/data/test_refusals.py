"""Refusals: which responses count as one, and how pairs are labelled."""

import pytest

from rmtension.data._pairs import PreferencePairs
from rmtension.data._refusals import label_refusals, refuses

REFUSALS = (
    "I'm sorry, but I can't help with that.",
    "I\u2019m not able to assist with this request.",
    "I cannot provide instructions for that.",
    "As an AI language model, I must keep people safe.",
    "I won't write that for you.",
    "That would be illegal and dangerous, so please do not.",
    "Sure? No: I don't want to encourage this.",
    "I apologize, but no.",
)
ANSWERS = (
    "First, preheat the oven to 180 degrees.",
    "I can help with that! Here are three ideas.",
    "The capital of France is Paris.",
    "Sorry to hear that your cat is ill.",
    "You cannot take the bus there; take the train.",
    "x" * 301 + " I'm sorry, I can't help with that.",
)


@pytest.mark.parametrize("text", REFUSALS)
def test_refusals_are_found(text):
    assert refuses(text)
    assert refuses(text.upper())


@pytest.mark.parametrize("text", ANSWERS)
def test_answers_are_no_refusals(text):
    assert not refuses(text)


def test_pairs_are_labelled_by_the_response_that_refuses():
    no, yes = REFUSALS[0], ANSWERS[0]
    rows = [(no, yes), (yes, no), (no, REFUSALS[1]), (yes, ANSWERS[2])]
    pairs = PreferencePairs.from_records(
        {"prompt": f"Q{row}", "chosen": chosen, "rejected": rejected} for row, (chosen, rejected) in enumerate(rows)
    )
    labelled = label_refusals(pairs)
    assert [pair.subset for pair in labelled] == ["should_refuse", "should_respond", "other", "other"]
    assert [(pair.prompt, pair.chosen, pair.rejected) for pair in labelled] == [
        (pair.prompt, pair.chosen, pair.rejected) for pair in pairs
    ]
    # The responses of chats are read as well.
    chats = PreferencePairs.from_records(
        {
            "prompt": [{"role": "user", "content": pair.prompt}],
            "chosen": [{"role": "assistant", "content": pair.chosen}],
            "rejected": [{"role": "assistant", "content": pair.rejected}],
        }
        for pair in pairs
    )
    assert [pair.subset for pair in label_refusals(chats)] == [pair.subset for pair in labelled]
