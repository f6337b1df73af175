"""Descriptions of neurons by a callable of the user's, each scored on texts that the callable did not see."""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Float
from scipy import stats
from torch import Tensor

from rmtension._progress import progress_bar
from rmtension._sites import neuron_name
from rmtension.attribution._dashboard_data import ActiveText
from rmtension.attribution._top_texts import active_texts, token_pieces
from rmtension.data._pairs import PreferencePairs
from rmtension.errors import DataError
from rmtension.evaluation._intervals import N_BOOTSTRAP, percentile_interval
from rmtension.models._reward_model import RewardModel
from rmtension.neurons._neuron_set import NeuronSet

# A neuron is active on a text if its largest activation has the sign of its largest on all texts, and at least this
# share of its size.
ACTIVE = 0.25
# Texts in the first prompt; held-out texts of each kind, at most and at least.
SHOWN, _MOST, _LEAST = 8, 20, 5

_DESCRIBE = """These texts are those on which neuron {name} of a reward model is most active. The tokens on which it \
is active are between << and >>.

{texts}

What do these tokens, or the texts around them, have in common? Answer with one sentence and nothing else."""
_APPLIES = """A neuron of a reward model is said to be active on texts of this description:
{description}

--- the text begins
{text}
--- the text ends

Does the description apply to this text? Answer with one number from 0 (it does not) to 10 (it does), or with yes or \
no, and nothing else."""

_COLUMNS = (
    *("layer", "neuron", "description", "reason", "auroc", "low", "high"),
    *("shuffled", "shuffled_low", "shuffled_high", "n_active", "n_inactive"),
)
Describe = Callable[[str], str]


@dataclass(frozen=True)
class _Text:
    """One distinct text, the pair that it is from, and the hash of its prompt."""

    group: str
    row: int
    side: int
    key: int
    ids: tuple[int, ...]


@dataclass(frozen=True)
class _Task:
    """What is shown of one neuron and what is held out."""

    prompt: str
    held_out: list[str]
    active: list[bool]


def no_descriptions() -> pd.DataFrame:
    """The table of descriptions before there are any."""
    return pd.DataFrame({name: pd.Series(dtype=object) for name in _COLUMNS})


def describe_neurons(
    head: RewardModel,
    groups: Mapping[str, PreferencePairs],
    neurons: NeuronSet,
    largest: Mapping[str, Float[Tensor, "pair 2 wanted"]],
    describe: Describe,
    *,
    positions: str,
    level: float,
    seed: int,
    progress: bool | None,
) -> pd.DataFrame:
    """One row per neuron of the set: a description with its AUROC and that of another neuron's, or a reason."""
    texts, values = _distinct(head, groups, largest)
    tasks: dict[int, _Task | str] = {
        column: _task(head, groups, neurons, column, texts, values[:, column], positions, seed)
        for column in range(len(neurons))
    }
    ready = {column: task for column, task in tasks.items() if isinstance(task, _Task)}
    total = sum(1 + len(task.held_out) * (2 if len(ready) > 1 else 1) for task in ready.values())
    names = [neuron_name(neurons.site, layer, neuron, neurons.architecture) for layer, neuron in neurons]
    with progress_bar(progress=progress, total=total, desc="describe", unit="answer") as bar:
        descriptions = {}
        for column, task in ready.items():
            descriptions[column] = _described(describe, task.prompt, names[column])
            bar.update(1)
        others = _another(list(ready), seed)
        rows = []
        for column, (layer, neuron) in enumerate(neurons):
            found = tasks[column]
            row: dict[str, Any] = dict.fromkeys(_COLUMNS, np.nan)
            row |= {"layer": layer, "neuron": neuron, "description": "", "reason": "", "n_active": 0, "n_inactive": 0}
            if isinstance(found, str):
                row["reason"] = found
                rows.append(row)
                continue
            row["description"] = descriptions[column]
            row["n_active"], row["n_inactive"] = sum(found.active), len(found.active) - sum(found.active)
            for name, given in (("auroc", column), ("shuffled", others.get(column))):
                if given is None:
                    continue
                answers = [
                    read_answer(describe(_APPLIES.format(description=descriptions[given], text=text)), names[column])
                    for text in found.held_out
                ]
                bar.update(len(answers))
                low, high = ("low", "high") if name == "auroc" else ("shuffled_low", "shuffled_high")
                row[name], row[low], row[high] = auroc(answers, found.active, level=level, seed=seed)
            rows.append(row)
    return pd.DataFrame(rows, columns=list(_COLUMNS))


def auroc(answers: Sequence[float], active: Sequence[bool], *, level: float, seed: int) -> tuple[float, float, float]:
    """The probability that an active text has a larger answer than an inactive one, ties half, with its interval.

    The interval is a percentile bootstrap over texts, active and inactive ones drawn separately, because their numbers
    are given. If all answers are right its width is 0: the number of texts says how much that shows.
    """
    scores, are_active = np.asarray(answers, dtype=float), np.asarray(active, dtype=bool)
    up, down = scores[are_active], scores[~are_active]
    wins = (up[:, None] > down).astype(float) + 0.5 * (up[:, None] == down)
    ranks = stats.rankdata(scores)
    value = (ranks[are_active].sum() - len(up) * (len(up) + 1) / 2) / (len(up) * len(down))
    rng = np.random.default_rng(seed)
    of_up, of_down = (rng.multinomial(len(part), np.full(len(part), 1 / len(part)), N_BOOTSTRAP) for part in (up, down))
    resamples = ((of_up @ wins) * of_down).sum(axis=1) / (len(up) * len(down))
    return float(value), *percentile_interval(resamples, level)


def read_answer(answer: object, name: str) -> float:
    """The number of an answer: 0 to 10, or yes (10) and no (0); raises `DataError` for anything else."""
    text = answer.strip().rstrip(".").lower() if isinstance(answer, str) else ""
    if text in ("yes", "no"):
        return 10.0 if text == "yes" else 0.0
    if re.fullmatch(r"\d{1,2}(\.\d+)?", text) and float(text) <= 10:
        return float(text)
    raise DataError(
        f"describe: expected a number from 0 to 10, yes or no, and nothing else, as the answer whether a description "
        f"of {name} applies to a text, got {answer!r:.200}. Let the callable return only the answer."
    )


# -- parts -------------------------------------------------------------------------------------------------------------


def _distinct(
    head: RewardModel, groups: Mapping[str, PreferencePairs], largest: Mapping[str, Float[Tensor, "pair 2 wanted"]]
) -> tuple[list[_Text], Float[np.ndarray, "text wanted"]]:
    """The distinct texts of all groups, and every neuron's largest activation on them."""
    texts: dict[tuple[int, ...], _Text] = {}
    values = []
    for group, pairs in groups.items():
        encoded = head.encode(pairs)
        for side, of_side in enumerate((encoded.chosen, encoded.rejected)):
            for row, text in enumerate(of_side):
                if text.ids not in texts:
                    texts[text.ids] = _Text(group, row, side, text.key, text.ids)
                    values.append(largest[group][row, side].double().numpy())
    return list(texts.values()), np.stack(values)


def _task(
    head: RewardModel,
    groups: Mapping[str, PreferencePairs],
    neurons: NeuronSet,
    column: int,
    texts: list[_Text],
    values: Float[np.ndarray, "text"],
    positions: str,
    seed: int,
) -> _Task | str:
    """The texts to show and to hold out for one neuron, or the reason why there are too few."""
    sign = 1.0 if values[np.abs(values).argmax()] >= 0 else -1.0
    sizes = sign * values
    threshold = ACTIVE * sizes.max()
    if threshold <= 0:
        return "it has no activation on these texts"
    active = sizes >= threshold
    # One text per prompt is shown, of at most half of the prompts with an active text: the other half is held out.
    best: dict[int, int] = {}
    for number in np.argsort(-sizes, kind="stable")[: int(active.sum())].tolist():
        best.setdefault(texts[number].key, number)
    shown = list(best.values())[: min(SHOWN, len(best) // 2)]
    keys = {texts[number].key for number in shown}
    free = np.array([text.key not in keys for text in texts])
    rows = [np.flatnonzero(free & active), np.flatnonzero(free & ~active)]
    n = min(_MOST, *map(len, rows))
    if not shown or n < _LEAST:
        return (
            f"too few texts to score a description: {len(rows[0])} texts on which it is active and {len(rows[1])} on "
            f"which it is not are left besides those shown, and a score needs {_LEAST} of each"
        )
    rng = np.random.default_rng([seed, column])
    drawn = [number for kind in rows for number in sorted(rng.choice(kind, size=n, replace=False).tolist())]
    parts = []
    for number in shown:
        text = texts[number]
        pairs = groups[text.group][text.row : text.row + 1]
        ((chosen, rejected),) = active_texts(head, pairs, neurons, positions, [column])
        parts.append(_marked((chosen, rejected)[text.side], sign, threshold))
    name = neuron_name(neurons.site, *list(neurons)[column], neurons.architecture)
    prompt = _DESCRIBE.format(
        name=name, texts="\n\n".join(f"Text {number}:\n{part}" for number, part in enumerate(parts, 1))
    )
    held_out = ["".join(token_pieces(head.tokenizer, texts[number].ids)) for number in drawn]
    return _Task(prompt, held_out, [True] * n + [False] * n)


def _marked(text: ActiveText, sign: float, threshold: float) -> str:
    """A text with << and >> around its active tokens, and dots where it is cut."""
    parts = ["... "] if text.first else []
    inside = False
    for token, activation in zip(text.tokens, text.activations, strict=True):
        # Activations of a text are rounded to four digits.
        is_active = sign * activation >= threshold * (1 - 1e-3)
        if is_active != inside:
            parts.append("<<" if is_active else ">>")
        inside = is_active
        parts.append(token)
    parts += [">>"] if inside else []
    parts += [" ..."] if text.first + len(text.tokens) < text.n_tokens else []
    return "".join(parts)


def _described(describe: Describe, prompt: str, name: str) -> str:
    answer: object = describe(prompt)
    if not isinstance(answer, str) or not answer.strip():
        raise DataError(
            f"describe: expected a description of {name} as text, got {answer!r:.200}. Pass a callable that takes a "
            "prompt and returns the answer of a language model."
        )
    return answer.strip()


def _another(columns: list[int], seed: int) -> dict[int, int]:
    """For each column, another one, drawn so that none keeps its own; empty for a single column."""
    if len(columns) < 2:
        return {}
    order = np.random.default_rng(seed).permutation(columns).tolist()
    return dict(zip(order, [*order[1:], order[0]], strict=True))
