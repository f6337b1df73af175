"""What an edit did on test pairs, with its controls: the receipt that is saved beside a mended checkpoint."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from rmtension.data._pairs import PreferencePairs
from rmtension.data._refusals import SHOULD_REFUSE, SHOULD_RESPOND
from rmtension.errors import DataError, StorageError
from rmtension.evaluation._intervals import Estimate, bootstrap_mean, with_interval
from rmtension.evaluation._length import length_matched_places
from rmtension.repair._ceiling import closed_share
from rmtension.repair._choice import MOST_LOST, correct
from rmtension.repair._edit import Edit
from rmtension.repair._splits import RepairPairs
from rmtension.store._files import write_text


@dataclass(frozen=True)
class RepairReport:
    """What an edit did on test pairs that neither its fit nor any choice has seen.

    - `edit`: what it is, and of how many numbers.
    - `closed`: the share of the weak objective's gap that it closed; `predicted`: what the diagnosis predicted.
    - `checks`: one row per quantity, before and after: accuracy and margin of both objectives, refusing and responding
      where labelled, accuracy on pairs matched in length, and the choice of the best of several responses; with the
      change and its interval. `spared` says that the lower end of the change is at least -1 point.
    - `controls`: one row per control, fitted by the same procedure: its closed share, and the strong objective's
      change.

    Examples:
        >>> RepairReport.__match_args__
        ('weak', 'strong', 'edit', 'closed', 'predicted', 'checks', 'controls')
    """

    weak: str
    strong: str
    edit: Mapping[str, Any]
    closed: Estimate
    predicted: Estimate
    checks: pd.DataFrame
    controls: pd.DataFrame

    def __repr__(self) -> str:
        (strong,) = self.checks[self.checks["quantity"] == f"{self.strong} accuracy"].to_dict("records")
        lines = [
            f"Repair of {self.weak} by {self.edit['kind']} ({self.edit['numbers']:,} numbers), on test pairs:",
            f"  closed share of the gap: {self.closed} (predicted {self.predicted})",
            f"  {self.strong} accuracy: {strong['before']:.3f} to {strong['after']:.3f}, change "
            f"{with_interval(strong['change'], strong['low'], strong['high'])}",
        ]
        for kind, part in self.controls.groupby("control", sort=False):
            lines.append(f"  control, {kind} ({len(part)}): closed share {part['closed'].mean():.3f}")
        return "\n".join(lines)

    def to_frame(self) -> pd.DataFrame:
        """A copy of `checks`."""
        return self.checks.copy()

    def save(self, path: str | Path) -> None:
        """Write the report to one JSON file."""
        values = {
            "kind": "RepairReport",
            "weak": self.weak,
            "strong": self.strong,
            "edit": dict(self.edit),
            "closed": asdict(self.closed),
            "predicted": asdict(self.predicted),
            "checks": self.checks.to_dict("records"),
            "controls": self.controls.to_dict("records"),
        }
        write_text(Path(path), json.dumps(values, indent=2) + "\n", "repair report")

    @classmethod
    def load(cls, path: str | Path) -> "RepairReport":
        """Read a file that `save` wrote; raises `StorageError` for any other file."""
        try:
            values = json.loads(Path(path).read_text(encoding="utf-8"))
            if values["kind"] != "RepairReport":
                raise KeyError("kind")
            return cls(
                values["weak"],
                values["strong"],
                values["edit"],
                Estimate(**values["closed"]),
                Estimate(**values["predicted"]),
                pd.DataFrame(values["checks"]),
                pd.DataFrame(values["controls"]),
            )
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise StorageError(f"{path}: expected a file that RepairReport.save wrote ({error!r:.80}).") from error


Margins = Mapping[str, Float[Tensor, "pair"]]


def check_table(
    pairs: RepairPairs,
    before: Margins,
    after: Margins,
    rewards: tuple[Mapping[str, Float[Tensor, "2 pair"]], Mapping[str, Float[Tensor, "2 pair"]]],
    *,
    level: float = 0.95,
    seed: int = 0,
) -> pd.DataFrame:
    """The rows of `RepairReport.checks`, from the test pairs' margins and rewards before and after the edit."""
    rows = []

    def add(name: str, part: PreferencePairs, was: Tensor, now: Tensor) -> None:
        change = bootstrap_mean(now - was, part, level=level, seed=seed)
        rows.append(
            {
                "quantity": name,
                "before": float(was.mean()),
                "after": float(now.mean()),
                "change": change.value,
                "low": change.low,
                "high": change.high,
                "spared": change.low >= -MOST_LOST,
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
    """For every prompt with three responses or more: whether the response with the highest reward is never rejected.

    Returned before and after the edit, with one pair of each prompt. A check that a bias was not moved elsewhere: an
    edit can order pairs better and still choose worse among many responses.
    """
    seen: dict[object, list[tuple[str, bool, Tensor]]] = {}
    firsts: dict[object, int] = {}
    for number, pair in enumerate(part):
        firsts.setdefault(pair.prompt, number)
        for side, text in enumerate((pair.text("chosen"), pair.text("rejected"))):
            rewards = torch.stack([before[side, number], after[side, number]])
            seen.setdefault(pair.prompt, []).append((text, side == 0, rewards))
    results, kept = [], []
    for prompt, texts in seen.items():
        rejected = {text for text, is_chosen, _ in texts if not is_chosen}
        distinct = {text: rewards for text, _, rewards in texts}
        if len(distinct) < 3:
            continue
        names = list(distinct)
        highest = torch.stack(list(distinct.values())).argmax(dim=0).tolist()
        results.append([float(names[place] not in rejected) for place in highest])
        kept.append(part[firsts[prompt]])
    values = torch.tensor(results, dtype=torch.float64).reshape(-1, 2)
    return (values[:, 0], values[:, 1]), PreferencePairs(kept)


def control_row(
    pairs: RepairPairs, control: str, before: Margins, after: Margins, ceiling: Float[Tensor, "pair"], edit: Edit | None
) -> dict[str, Any]:
    """One row of `RepairReport.controls`."""
    share = closed_share(pairs.test[pairs.weak], before[pairs.weak], after[pairs.weak], ceiling)
    strong = correct(after[pairs.strong]) - correct(before[pairs.strong])
    return {
        "control": control,
        "closed": share.value,
        "strong_change": float(strong.mean()),
        "numbers": 0 if edit is None else edit.n_numbers,
    }
