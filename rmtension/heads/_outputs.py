"""Selects the output that is the reward: one output of the head, or the difference of two."""

import difflib
import operator
from collections.abc import Mapping, Sequence
from typing import Any

from jaxtyping import Float
from torch import Tensor

from rmtension._arguments import nearest
from rmtension.errors import ModelError, OptionError
from rmtension.heads._head import Head

_SHOWN = 12
# What `output` is to open a head with several outputs without choosing one.
ALL = "all"


def choose_outputs(output: object, head: Head, what: str) -> tuple[int, ...] | None:
    """The outputs of a head that `output` selects, as `choose_rows` does; None takes the head's default if it has one.

    Returns None for "all" if there are several, so that one is chosen later.
    """
    names = dict(enumerate(head.outputs))
    if output is None and head.default is not None:
        output = head.default
    if output == ALL and ALL not in head.outputs:
        return (0,) if len(names) == 1 else None
    return choose_rows(output, len(names), names, what)


def choose_rows(output: object, n_rows: int, names: Mapping[int, str] | None, what: str) -> tuple[int, ...]:
    """The rows that `output` selects: one row, or two rows if the reward is the first minus the second.

    `output` is an index, one of `names` (a classifier's `id2label`), a pair of these, or None for the only row. Raises
    `ModelError` for several rows without `output`, `OptionError` for a row that does not exist.
    """
    if output is None:
        if n_rows == 1:
            return (0,)
        shown = {row: repr(name) for row, name in (names or {}).items() if not name.isdigit()}
        last, first = shown.get(n_rows - 1, n_rows - 1), shown.get(0, 0)
        raise ModelError(
            f"{what}: expected a head with one output, got {n_rows}: {_listed(n_rows, names)}. Pass the output that is "
            f"the reward: output={last}, or output=({last}, {first}) for a difference of two; output='all' opens the "
            "model without choosing."
        )
    return _one_or_two(output, lambda row: _row(row, n_rows, names))


def choose_tokens(output: object, tokenizer: Any) -> tuple[int, ...]:
    """The same for a language model, whose outputs are tokens: `output` is a token, or a pair of tokens.

    A token is a token id, an entry of the vocabulary ("ĠYes"), or a text that the tokenizer encodes as a single token
    (" Yes"). Raises `OptionError` for anything else, with the tokens that the text is split into, and similar entries.
    """
    if tokenizer is None:
        raise OptionError("output: expected a model with a tokenizer, which finds the tokens. Pass tokenizer=...")
    return _one_or_two(output, lambda token: _token(token, tokenizer))


def pick(outputs: Float[Tensor, "*text output"], choice: Sequence[int]) -> Float[Tensor, "*text"]:
    """The chosen output of each text, or the first of two minus the second."""
    first: Tensor = outputs[..., choice[0]]
    return first if len(choice) == 1 else first - outputs[..., choice[1]]


def _one_or_two(output: object, find: Any) -> tuple[int, ...]:
    if isinstance(output, Mapping):
        raise OptionError(
            f"output: expected an output or a pair of outputs, got weights, {output!r:.80}. Open the model with "
            "output='all', then choose the weighted sum with head.output({...})."
        )
    if not isinstance(output, tuple | list):
        return (find(output),)
    if len(output) != 2:
        raise OptionError(f"output: expected an output or a pair of outputs, got {len(output)}: {output!r:.80}.")
    rows = tuple(find(row) for row in output)
    if rows[0] == rows[1]:
        raise OptionError(
            f"output: expected a pair of different outputs, got {output!r}, for which every reward would be 0."
        )
    return rows


def _row(output: object, n_rows: int, names: Mapping[int, str] | None) -> int:
    if isinstance(output, str):
        rows = [row for row, name in (names or {}).items() if name == output]
        if len(rows) == 1:
            return rows[0]
        problem = "more than one output has this name" if rows else "no output has this name"
        known = (names or {}).values()
        raise OptionError(
            f"output: {output!r}: {problem}. Expected one of {_listed(n_rows, names)}.{nearest(output, known)}"
        )
    try:
        row = operator.index(output)  # type: ignore[arg-type]
    except TypeError:
        row = -1
    if isinstance(output, bool) or not 0 <= row < n_rows:
        raise OptionError(f"output: expected one of {_listed(n_rows, names)}, got {output!r}.")
    return row


def _listed(n_rows: int, names: Mapping[int, str] | None) -> str:
    if n_rows == 1:
        return "0 (there is one output)"
    if not names:
        return f"0 to {n_rows - 1}"
    shown = ", ".join(f"{row} {names[row]!r}" for row in sorted(names)[:_SHOWN])
    return f"0 to {n_rows - 1} ({shown}{', ...' if n_rows > _SHOWN else ''})"


def _token(token: object, tokenizer: Any) -> int:
    if isinstance(token, int) and not isinstance(token, bool) and token >= 0:
        return token  # `token_head` compares it with the size of the vocabulary
    if not isinstance(token, str):
        raise OptionError(
            "output: the outputs of a language model are tokens; expected a token as text or a token id, got "
            f"{token!r}."
        )
    vocabulary: dict[str, int] = tokenizer.get_vocab()
    if token in vocabulary:
        return vocabulary[token]
    ids = tokenizer.encode(token, add_special_tokens=False)
    if len(ids) == 1 and ids[0] != tokenizer.unk_token_id and tokenizer.decode(ids).strip() == token.strip():
        return int(ids[0])
    text = token.replace("Ġ", " ").replace("▁", " ")  # as entries write a space
    pieces = tokenizer.convert_ids_to_tokens(tokenizer.encode(text, add_special_tokens=False))
    close = _close(token, vocabulary)
    raise OptionError(
        f"output: expected a single token, but the tokenizer splits {token!r} into {pieces}. "
        + (f"Similar tokens of its vocabulary are {close}." if close else "Pass one of tokenizer.get_vocab().")
    )


def _close(token: str, vocabulary: Sequence[str] | Mapping[str, int]) -> list[str]:
    """Entries that differ only in the mark of a space or in case, then entries with a similar spelling."""

    def bare(entry: str) -> str:
        return entry.lstrip("Ġ▁ ").strip().casefold()

    same = [entry for entry in vocabulary if bare(entry) == bare(token)]
    spelled = {bare(entry): entry for entry in vocabulary}
    near = [spelled[entry] for entry in difflib.get_close_matches(bare(token), list(spelled), n=4)]
    return list(dict.fromkeys([*sorted(same), *near]))[:6]
