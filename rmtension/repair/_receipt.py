"""What an edit did on test pairs, with its controls: the receipt that is saved beside a mended checkpoint."""

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from rmtension._arguments import require_choice
from rmtension.data._pairs import PreferencePairs
from rmtension.data._refusals import SHOULD_REFUSE, SHOULD_RESPOND
from rmtension.errors import DataError, StorageError
from rmtension.evaluation._intervals import Estimate, bootstrap_mean, with_interval
from rmtension.evaluation._length import length_matched_places
from rmtension.repair._choice import change_of_accuracy, correct
from rmtension.repair._diagnose import Diagnosis
from rmtension.repair._features import GroupMargins
from rmtension.repair._splits import RepairPairs
from rmtension.store._files import write_text


@dataclass(frozen=True, eq=False)
class RepairReport:
    """What an edit did on test pairs that neither its fit nor any choice has seen.

    - `diagnosis`: what was known before, with the predicted closed share.
    - `edit`: its method, how many numbers it has, and whether there is one.
    - `closed`: the share of the weak objective's gap that it closed.
    - `checks`: one row per quantity, before and after: accuracy (per pair) and margin of both objectives, refusing and
      responding where labelled, accuracy on pairs matched in length, and the choice of the best of several responses;
      with the change and its interval. `spared` says that the lower end of the change is at least -`most_lost`; it is
      None for margins, which are no shares.
    - `path`: one row per candidate that was tried, on the development pairs, with its closed share.
    - `controls`: one row per control, fitted by the same procedure: its closed share, and the strong objective's
      change.
    - `most_lost`: how much accuracy an edit may cost, by the lower end of the interval.

    Examples:
        >>> RepairReport.__match_args__
        ('diagnosis', 'edit', 'closed', 'checks', 'path', 'controls', 'most_lost')
    """

    diagnosis: Diagnosis
    edit: Mapping[str, Any]
    closed: Estimate
    checks: pd.DataFrame
    path: pd.DataFrame
    controls: pd.DataFrame
    most_lost: float = 0.01

    def __repr__(self) -> str:
        return "\n  ".join(
            [f"Repair of {self.diagnosis.weak} by {self.edit['kind']}, on test pairs:", *self.findings()]
        )

    def findings(self) -> list[str]:
        """What came out in three or four sentences, each with its interval or control."""
        weak, strong = self.diagnosis.weak, self.diagnosis.strong
        rows = {row["quantity"]: row for row in self.checks.to_dict("records")}

        def change(name: str) -> str:
            row = rows[f"{name} accuracy"]
            moved = with_interval(row["change"], row["low"], row["high"], form="+.3f")
            return f"from {row['before']:.3f} to {row['after']:.3f}, change {moved}"

        sentences = [
            f"The edit changes {self.edit['numbers']:,} {'number' if self.edit['numbers'] == 1 else 'numbers'} and "
            f"{self._closes()}"
            if self.edit["made"]
            else f"Nothing was edited: {self._why_none()}",
            f"The accuracy on {weak} goes {change(weak)}; that on {strong} {change(strong)}.",
        ]
        controls = [f"{kind} {_range(part['closed'])}" for kind, part in self.controls.groupby("control", sort=False)]
        sentences.append(f"Closed shares of the controls: {'; '.join(controls)}.")
        harmed = [name for name, row in rows.items() if not name.endswith(" margin") and not row["spared"]]
        if harmed and self.edit["made"]:
            sentences.append(
                f"The intervals do not exclude a loss of more than {100 * self.most_lost:g} points for: "
                f"{', '.join(harmed)}."
            )
        return sentences

    def _why_none(self) -> str:
        """Which condition no candidate met on the development pairs, and the numbers of the one nearest to it."""
        weak, strong = self.diagnosis.weak, self.diagnosis.strong
        better = self.path[self.path[f"{weak}_low"] > 0]
        rows, column = (self.path, f"{weak}_change") if better.empty else (better, f"{strong}_low")
        near = rows.sort_values(column, ascending=False, kind="stable").to_dict("records")[0]
        gain = f"{near[f'{weak}_change']:+.3f} (at least {near[f'{weak}_low']:+.3f})"
        n = f"{len(self.path)} candidates" if len(self.path) != 1 else "1 candidate"
        if better.empty:
            return f"of {n}, none improved {weak} beyond chance on development pairs. The largest gain is {gain}."
        change = near[f"{strong}_change"]
        more = f" More {strong} pairs would narrow this bound." if change > -self.most_lost else ""
        return (
            f"of {n}, {len(better)} improved {weak} beyond chance on development pairs, and none of these is shown to "
            f"spare {strong}. The nearest one changes {weak} by {gain}, and {strong} by {change:+.3f} (at least "
            f"{near[f'{strong}_low']:+.3f}, where {-self.most_lost:+.3f} is allowed).{more}"
        )

    def _closes(self) -> str:
        """The closed share in words."""
        if math.isnan(self.closed.value):
            return f"the test pairs show no gap ({self.closed.n_prompts} prompts), so the closed share is undefined."
        predicted = self.diagnosis.predicted
        known = "" if math.isnan(predicted.value) else f"; the diagnosis predicted {predicted}"
        wide = "" if math.isfinite(self.closed.low + self.closed.high) else " Some bootstrap resamples have no gap."
        return f"closes {self.closed} of the gap{known}.{wide}"

    def to_frame(self, table: str = "checks") -> pd.DataFrame:
        """A copy of `checks`, `path` or `controls`."""
        require_choice("table", table, _TABLES)
        frame: pd.DataFrame = getattr(self, table).copy()
        return frame

    def save(self, path: str | Path) -> None:
        """Write the report to one JSON file."""
        values: dict[str, Any] = {"kind": "RepairReport", "edit": dict(self.edit), "most_lost": self.most_lost}
        values |= {name: asdict(getattr(self, name)) for name in ("diagnosis", "closed")}
        values |= {name: getattr(self, name).to_dict("records") for name in _TABLES}
        write_text(Path(path), as_json(values) + "\n", "repair report")

    @classmethod
    def load(cls, path: str | Path) -> "RepairReport":
        """Read a file that `save` wrote; raises `StorageError` for any other file."""
        try:
            values = _with_numbers(json.loads(Path(path).read_text(encoding="utf-8")))
            if values["kind"] != "RepairReport":
                raise KeyError("kind")
            diagnosed: dict[str, Any] = {
                name: Estimate(**value) if isinstance(value, dict) else value
                for name, value in values["diagnosis"].items()
            }
            tables = {name: pd.DataFrame(values[name]) for name in _TABLES}
            lacking = [name for name, columns in _TABLES.items() if not {*columns} <= {*tables[name].columns}]
            if lacking or not all(isinstance(diagnosed[name], Estimate) for name in _ESTIMATES):
                raise ValueError(f"no {lacking[0] if lacking else 'estimates'}")
            closed = Estimate(**values["closed"])
            return cls(Diagnosis(**diagnosed), values["edit"], closed, **tables, most_lost=values["most_lost"])
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise StorageError(f"{path}: expected a file that RepairReport.save wrote ({error!r:.80}).") from error


def _range(values: pd.Series) -> str:
    """The mean of several values and their range, or the one value."""
    if values.isna().all():
        return "unknown"
    if len(values) == 1:
        return f"{values.iloc[0]:.3f}"
    return f"{values.mean():.3f}, from {values.min():.3f} to {values.max():.3f}"


# The tables, with columns that each has.
_TABLES = {
    "checks": ("quantity", "before", "after", "change", "low", "high", "spared", "n"),
    "path": ("closed", "allowed"),
    "controls": ("control", "closed", "strong_change", "numbers"),
}
_ESTIMATES = ("before", "ceiling", "gap", "probe", "predicted")


def as_json(values: Any) -> str:
    """JSON text; numbers that JSON has no name for, NaN and infinities, become texts."""

    def plain(value: Any) -> Any:
        if isinstance(value, Mapping):
            return {name: plain(item) for name, item in value.items()}
        if isinstance(value, list | tuple):
            return [plain(item) for item in value]
        return str(value) if isinstance(value, float) and not math.isfinite(value) else value

    return json.dumps(plain(values), indent=2, allow_nan=False)


def _with_numbers(value: Any) -> Any:
    """What `as_json` wrote as texts, as numbers again."""
    if isinstance(value, dict):
        return {name: _with_numbers(item) for name, item in value.items()}
    if isinstance(value, list):
        return [_with_numbers(item) for item in value]
    return float(value) if value in ("nan", "inf", "-inf") else value


def check_table(
    pairs: RepairPairs,
    before: GroupMargins,
    after: GroupMargins,
    rewards: tuple[Mapping[str, Float[Tensor, "2 pair"]], Mapping[str, Float[Tensor, "2 pair"]]],
    *,
    level: float = 0.95,
    seed: int = 0,
) -> pd.DataFrame:
    """The rows of `RepairReport.checks`, from the test pairs' margins and rewards before and after the edit."""
    rows = []

    def add(name: str, part: PreferencePairs, was: Tensor, now: Tensor) -> None:
        is_margin = name.endswith(" margin")
        change = (bootstrap_mean if is_margin else change_of_accuracy)(now - was, part, level=level, seed=seed)
        rows.append(
            {
                "quantity": name,
                "before": float(was.mean()),
                "after": float(now.mean()),
                "change": change.value,
                "low": change.low,
                "high": change.high,
                # The allowed loss is a share of the pairs, which a change of the margin is not.
                "spared": None if is_margin else bool(change.low >= -pairs.most_lost),
                "n": change.n,
            }
        )

    for name in (pairs.weak, pairs.strong):
        part = pairs.test[name]
        right = correct(before[name]), correct(after[name])
        add(f"{name} accuracy", part, *right)
        add(f"{name} margin", part, before[name], after[name])
        groups = {
            f"{name} {what}": [i for i, pair in enumerate(part) if pair.subset == label] for what, label in _LABELS
        }
        groups[f"{name} accuracy, length matched"] = _length_matched(part)
        for group, places in groups.items():
            if places:
                chosen = PreferencePairs(part[place] for place in places)
                add(group, chosen, *(values[places] for values in right))
        best, first = best_of_several(part, *(of[name] for of in rewards))
        if len(first):
            add(f"{name} best of several", first, *best)
    return pd.DataFrame(rows)


def _length_matched(part: PreferencePairs) -> list[int]:
    """The pairs matched in length; none if no two match, or items have several pairs."""
    try:
        return length_matched_places(part)
    except DataError:
        return []


_LABELS = (("refusing", SHOULD_REFUSE), ("responding", SHOULD_RESPOND))


def best_of_several(
    part: PreferencePairs, before: Float[Tensor, "2 pair"], after: Float[Tensor, "2 pair"]
) -> tuple[tuple[Float[Tensor, "prompt"], Float[Tensor, "prompt"]], PreferencePairs]:
    """For every prompt with three responses or more: 1 if the response with the highest reward is never rejected, or 0.

    If several have the highest reward, the share of them that is never rejected. Returns the values before and after
    the edit, and one pair of each prompt. A check that a bias was not moved elsewhere: an edit can order pairs better
    and still choose worse among many responses.
    """
    seen: dict[object, list[tuple[object, bool, Tensor]]] = {}
    firsts: dict[object, int] = {}
    for number, pair in enumerate(part):
        firsts.setdefault(pair.prompt, number)
        for side, text in enumerate((pair.chosen, pair.rejected)):
            rewards = torch.stack([before[side, number], after[side, number]])
            seen.setdefault(pair.prompt, []).append((text, side == 0, rewards))
    results, kept = [], []
    for prompt, texts in seen.items():
        rejected = {text for text, is_chosen, _ in texts if not is_chosen}
        distinct = {text: rewards for text, _, rewards in texts}
        if len(distinct) < 3:
            continue
        values = torch.stack(list(distinct.values()))
        is_best = (values == values.amax(dim=0)).double()
        is_right = torch.tensor([text not in rejected for text in distinct], dtype=torch.float64)
        results.append(is_right @ is_best / is_best.sum(dim=0))
        kept.append(part[firsts[prompt]])
    values = torch.stack(results) if results else torch.zeros(0, 2, dtype=torch.float64)
    return (values[:, 0], values[:, 1]), PreferencePairs(kept)
