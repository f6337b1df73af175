"""What arguments are taken for: messages that name the nearest choice, and that arguments are swapped."""

from collections.abc import Iterable
from difflib import get_close_matches

from rmtension.errors import OptionError

# Wanted and given type -> how to get the one from the other.
_MAKE = {
    ("NeuronSet", "NeuronScores"): "Take a set of them with scores.top(0.05).",
    ("NeuronSet", "Tensor"): "Make a set with NeuronSet(mask, site, head.architecture).",
    ("NeuronScores", "PairAttributions"): "NeuronAttribution(...).score(pairs) gives scores of neurons.",
    ("NeuronScores", "PreferencePairs"): "NeuronAttribution(...).score(pairs) gives scores of neurons.",
    ("PairAttributions", "NeuronScores"): "NeuronAttribution(...).per_pair(pairs) gives scores by pair.",
}

# Class -> the class by which users have it.
_PUBLIC = {"RewardModel": "RewardHead"}


def nearest(given: object, choices: Iterable[object]) -> str:
    """A sentence that names the choice most like what was given, with a space before it; empty if none is like it."""
    known = [str(choice) for choice in choices]
    found = get_close_matches(str(given), known, n=1) if isinstance(given, str) else []
    return f" Did you mean {found[0]!r}?" if found and found[0] != given else ""


def require_choice(name: str, value: object, choices: Iterable[str]) -> None:
    """Raise `OptionError` that names the nearest unless a value is one of the choices."""
    known = list(choices)
    if not isinstance(value, str) or value not in known:
        raise OptionError(f"{name}: expected one of {known}, got {value!r:.80}.{nearest(value, known)}")


def require_arguments(call: str, **given: tuple[object, type]) -> None:
    """Raise `OptionError` unless every argument is of its type; `call` says how it is called, for the message.

    Where an argument is of the type that another one should have, the message says that they are swapped.
    """
    for name, (value, wanted) in given.items():
        if isinstance(value, wanted):
            continue
        got = type(value).__name__
        expected = _PUBLIC.get(wanted.__name__, wanted.__name__)
        for other, (theirs, _) in given.items():
            if other != name and isinstance(theirs, wanted):
                raise OptionError(
                    f"{name}, {other}: they are swapped: {name} should be a {expected}, and {other} is one. "
                    f"Call {call}."
                )
        make = _MAKE.get((expected, got), f"Call {call}.")
        raise OptionError(f"{name}: expected {expected}, got {got}. {make}")
