"""Numbers, tokens and explanations as the page of neuron dashboards shows them."""

import math
from typing import Any

from rmtension.attribution._dashboard_data import ActiveText, DashboardData

# The tokens shown before and after the most active one, and the length up to which a text is not folded.
_BEFORE, _AFTER, _WHOLE = 24, 16, 56
_MARKS = {" ": "\N{MIDDLE DOT}", "\n": "\N{RETURN SYMBOL}\n", "\t": "\N{RIGHTWARDS ARROW TO BAR}"}
# For a token that is the beginning of a character: the character belongs to the token that completes it.
_PART = "\N{WHITE SMALL SQUARE}"


def number(value: float, *, form: str = "+.3g") -> str:
    """A number with three significant digits and its sign.

    Examples:
        >>> number(-0.643219), number(0.0), number(1234.5)
        ('-0.643', '0', '+1.23e+03')
    """
    return "0" if value == 0 else f"{value:{form}}"


def number_with_interval(value: float, low: float, high: float, *, form: str = "", plus: str = "+") -> str:
    """A number and its interval, to two significant digits of half the interval's width, or in the format `form`.

    Examples:
        >>> number_with_interval(-0.643219, -0.71873, -0.567)
        '-0.643 [-0.719, -0.567]'
        >>> number_with_interval(0.91, 0.8, 1.0, form=".2f", plus="")
        '0.91 [0.80, 1.00]'
    """
    if math.isnan(low) or math.isnan(high):
        return number(value, form=f"{plus}{form or '.3g'}")
    if not form:
        half = (high - low) / 2
        decimals = 1 - math.floor(math.log10(half)) if half > 0 else -1
        form = f".{decimals}f" if 0 <= decimals <= 6 else ".3g"
    return f"{value:{plus}{form}} [{low:{plus}{form}}, {high:{plus}{form}}]"


def shown_token(token: str) -> str:
    r"""A token with visible white space; characters that are invisible, or look like a mark, as escapes.

    Examples:
        >>> shown_token(" the"), shown_token("\n\n"), shown_token("\u200b"), shown_token("")
        ('·the', '⏎\n⏎\n', '\\u200b', '▫')
    """
    return "".join(map(_shown_character, token)) or _PART


def page_text(text: ActiveText) -> dict[str, Any]:
    """A text for the page's script; `window` is the range of tokens around the most active one that is not folded."""
    n = len(text.tokens)
    window = (0, n) if n <= _WHOLE else (max(0, text.peak - _BEFORE), min(n, text.peak + _AFTER + 1))
    return {
        "tokens": [shown_token(token) for token in text.tokens],
        "activations": text.activations,
        "special": text.special,
        "first": text.first,
        "peak": text.peak,
        "window": window,
        "response_start": text.response_start,
        "n_tokens": text.n_tokens,
    }


def reading(data: DashboardData) -> list[str]:
    """How to read the page, a line per quantity."""
    about = data.about
    lines = [
        f"Each effect of these {len(data.neurons)} neurons on the {len(data.groups)} groups has its own interval: "
        f"without any effect, about {100 * (1 - about['level']):.0f} in 100 of these intervals exclude 0.",
        "Direct weight: the neuron's output column after the gain of the final norm (minus its mean for a layer norm), "
        "times the row of the reward head. Activation x weight / sigma is the neuron's direct contribution to the "
        "reward at the token that the reward is read from, where sigma is what the final norm divides by. Effects "
        "through later blocks are not part of it; the effect of ablating the neuron includes them.",
        f"Correlation: Pearson's, between activations at all {about['n_tokens']} tokens of both texts of all pairs.",
        "Texts come from the data and may be offensive. They were chosen because activations are extreme there, and "
        "say nothing about other texts. \N{MIDDLE DOT} is a space, \N{RETURN SYMBOL} a line break, "
        "\N{RIGHTWARDS ARROW TO BAR} a tab, a box a special token, and \N{WHITE SMALL SQUARE} a part of a character; "
        "the prompt is grey. The strength of a colour is the activation divided by the neuron's largest on this page.",
    ]
    if not about["no_tokens"]:
        lines.append(
            "Promoted and suppressed tokens: the output column after the gain of the final norm, times the unembedding "
            "row of the token, relative to the mean over the vocabulary."
        )
    if len(data.descriptions):
        lines.append(
            "Descriptions were written by the callable that was passed as `describe`, from texts on which the neuron "
            "is most active. AUROC: the probability that its answer whether the description applies is larger for a "
            "held-out text on which the neuron is active than for one on which it is not (0.5: no better than chance), "
            f"with its {100 * about['level']:g}% bootstrap interval over texts."
        )
    return lines


def _shown_character(character: str) -> str:
    if character in _MARKS:
        return _MARKS[character]
    is_mark = any(character == mark[0] for mark in (*_MARKS.values(), _PART))
    if is_mark or not character.isprintable():
        code = ord(character)
        return f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"
    return character
