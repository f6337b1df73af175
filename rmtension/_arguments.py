"""Checks of arguments: messages that suggest the nearest choice, and that recognise swapped arguments."""

from collections.abc import Iterable
from difflib import get_close_matches

from rmtension.errors import OptionError

# (expected type, given type) -> how to make the first from the second.
_MAKE = {
    ("NeuronSet", "NeuronScores"): "Take a set of them with scores.top(0.05).",
    ("NeuronSet", "Tensor"): "Make a set with NeuronSet(mask, site, head.architecture).",
    ("NeuronScores", "PairAttributions"): "NeuronAttribution(...).score(pairs) gives scores of neurons.",
    ("NeuronScores", "PreferencePairs"): "NeuronAttribution(...).score(pairs) gives scores of neurons.",
    ("PairAttributions", "NeuronScores"): "NeuronAttribution(...).per_pair(pairs) gives scores by pair.",
}

# Class -> the public class that users know.
_PUBLIC = {"RewardModel": "RewardHead"}


def nearest(given: object, choices: Iterable[object]) -> str:
    """A sentence, with a space before it, that suggests the choice most similar to `given`; empty without one."""
    known = [str(choice) for choice in choices]
    matches = get_close_matches(str(given), known, n=1) if isinstance(given, str) else []
    return f" Did you mean {matches[0]!r}?" if matches and matches[0] != given else ""


def require_choice(name: str, value: object, choices: Iterable[str]) -> None:
    """Raise `OptionError` that suggests the nearest choice unless a value is one of the choices."""
    known = list(choices)
    if not isinstance(value, str) or value not in known:
        raise OptionError(f"{name}: expected one of {known}, got {value!r:.80}.{nearest(value, known)}")


def require_arguments(call: str, **given: tuple[object, type]) -> None:
    """Raise `OptionError` unless every argument has its type; `call` shows the right call in the message.

    If an argument has the type that another should have, the message says that they are swapped.
    """
    for name, (value, wanted) in given.items():
        if isinstance(value, wanted):
            continue
        got = type(value).__name__
        expected = _PUBLIC.get(wanted.__name__, wanted.__name__)
        for other, (other_value, other_wanted) in given.items():
            if isinstance(other_value, wanted) and isinstance(value, other_wanted) and other_wanted is not wanted:
                raise OptionError(
                    f"{name}, {other}: they are swapped: {name} should be a {expected}, but {other} is a {expected}. "
                    f"Call {call}."
                )
        make = _MAKE.get((expected, got), f"Call {call}.")
        raise OptionError(f"{name}: expected {expected}, got {got}. {make}")
