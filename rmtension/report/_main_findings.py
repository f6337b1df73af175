"""The main numbers of a study, each with its interval, control and n; and the questions they leave open."""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import pandas as pd

from rmtension.errors import OptionError
from rmtension.evaluation._intervals import with_interval
from rmtension.plots._rows import Rows, count
from rmtension.report._tables import families_of
from rmtension.study._result import StudyResult


@dataclass(frozen=True)
class Finding:
    """One number of a study with its question, interval and control; `none` is the value of no difference.

    `other` is the interval against a second control, if the study drew one. A direction has to hold against both.
    """

    family: str
    question: str
    quantity: str
    value: float
    low: float
    high: float
    control: str
    n: str
    none: float = 0.0
    identical: bool = False
    other: tuple[float, float] | None = None

    @property
    def is_same(self) -> bool:
        """Whether nothing can differ: two models are identical, or the difference is exactly none in every pair."""
        return self.identical or bool(self.value == self.low == self.high == self.none)

    @property
    def is_open(self) -> bool:
        """Whether the direction is open: an interval contains the value of no difference, or there is no interval."""
        return not self.is_same and (self._side == 0 or self.is_contested)

    @property
    def is_contested(self) -> bool:
        """Whether the interval excludes no difference, and the one against the second control does not agree."""
        return self._side != 0 and self.other is not None and side_of(*self.other, self.none) != self._side

    @property
    def direction(self) -> str:
        """Which side of no difference the interval is on, in words."""
        if self.identical:
            return "identical models, the same rewards"
        if self.is_same:
            return "no difference in any pair"
        if self._side == 0:
            return "not decided"
        side = f"{'above' if self._side > 0 else 'below'} {self.none:g}"
        return f"not decided: {side} by this control only" if self.is_contested else side

    @property
    def estimate(self) -> str:
        """The number with its interval."""
        return with_interval(self.value, self.low, self.high, form="+.3f" if self.none == 0 else ".3f")

    @property
    def _side(self) -> int:
        return side_of(self.low, self.high, self.none)


def side_of(low: float, high: float, none: float = 0.0) -> int:
    """1 for an interval above the value of no difference, -1 for one below it, 0 for one that contains it or NaN."""
    return int(low > none) - int(high < none)


def findings(result: StudyResult) -> list[Finding]:
    """The main numbers of a study, each with its question, interval, control and n, in the order of the report.

    Only analyses that the study ran have findings. Several seeds are averaged per family.

    Examples:
        >>> from rmtension import StudyOptions, TensionStudy
        >>> models = dict.fromkeys(("helpful", "harmless", "mixed"), head)
        >>> study = TensionStudy(models, pairs, options=StudyOptions(analyses=("accuracy",)))
        >>> first = findings(study.run(progress=False))[0]
        >>> first.question, first.n, first.direction
        ('Does mixed training cost accuracy on helpful pairs?', '12', 'identical models, the same rewards')
    """
    return [finding for family in families_of(result) for finding in _of_family(result, family)]


def unconcluded(result: StudyResult, listed: list[Finding]) -> list[str]:
    """The questions that the study leaves open, and its limits, as sentences."""
    several = len(families_of(result)) > 1
    lines = [
        f"{f'{finding.family}: ' if several else ''}{finding.question} {finding.quantity}: {finding.estimate}, "
        f"n = {finding.n}. "
        + (
            f"The interval excludes {finding.none:g}, but the interval against the other control does not."
            if finding.is_contested
            else f"The interval does not exclude {finding.none:g}."
        )
        for finding in listed
        if finding.is_open
    ]
    if result.n_seeds == 1:
        lines.append(
            "There is one seed: the intervals are over prompts, and do not include the differences between trainings."
        )
    if not all(family["base"] for family in result.summary["families"]):
        lines.append("There is no base model, so overlap from the base cannot be told from overlap by training.")
    lines += _without_control(result)
    left = [name for name in _ANALYSES if name not in result.summary["options"]["analyses"]]
    if left:
        lines.append(f"These analyses were not run: {', '.join(left)}.")
    if "accuracy" in result.tables and "refusing" not in set(result.tables["accuracy"]["measure"]):
        lines.append(
            "No subset is named as one to refuse or to respond to, so refusing more often cannot be told from ranking "
            "better."
        )
    lines.append(
        "Scores and ablations show what a neuron does on these pairs in this model, not what it means. Sets of two "
        "models can be compared neuron by neuron only if both models come from the same base."
    )
    return lines


# -- parts -------------------------------------------------------------------------------------------------------------

_ANALYSES = ("accuracy", "transferability", "confidence", "overlap", "curves", "causality")


def _of_family(result: StudyResult, family: str) -> Iterator[Finding]:
    def number(
        question: str, quantity: str, table: str, where: dict[str, Any], columns: tuple[str, str, str], *extra: str
    ) -> tuple[dict[str, Any], Any] | None:
        """The fields of a finding and its row; None if the study has no such row."""
        row = mean_row(result, family, table, where, columns, extra)
        if row is None:
            return None
        given = {"family": family, "question": question, "quantity": quantity, "n": _n(row)}
        return given | {"value": row["value"], "low": row["low"], "high": row["high"]}, row

    for objective in ("helpful", "harmless"):
        where = {"first": "mixed", "second": objective, "objective": objective, "subset": "all"}
        question = f"Does mixed training cost accuracy on {objective} pairs?"
        answer = number(
            question, f"accuracy of mixed minus {objective}-only", "comparisons", where, ("difference", "low", "high")
        )
        if answer:
            models = family_fingerprints(result, family)
            same = bool(models) and all(one["mixed"] == one[objective] for one in models)
            yield Finding(**answer[0], control="the specialist, on the same pairs", identical=same)
    for objective in ("helpful", "harmless"):
        where = {"model": "mixed", "objective": objective, "measure": "accuracy, length matched"}
        answer = number(
            f"Does the mixed model rank {objective} pairs of similar length?",
            "accuracy on pairs matched in length", "accuracy", where, ("value", "low", "high"),
        )  # fmt: skip
        if answer:
            alone = mean_row(
                result, family, "accuracy",
                {"model": "length only", "objective": objective, "measure": "accuracy"}, ("value", "low", "high"), (),
            )  # fmt: skip
            control = "chance, 0.5" + ("" if alone is None else f"; the longer response alone: {alone['value']:.3f}")
            yield Finding(**answer[0], control=control, none=0.5)
    for score in result.summary["options"]["scores"]:
        where = {"score": score, "kind": "models", "a": "helpful", "b": "harmless", "without_base": "False"}
        answer = number(
            "Do the helpful and the harmless model share neurons?",
            f"Jaccard of top sets by {score.replace('_', ' ')} beyond chance",
            "overlap", where, ("beyond_chance", "beyond_low", "beyond_high"), "jaccard", "layer_expected_jaccard",
            "size_a", "size_b", "n_neurons",
        )  # fmt: skip
        if answer:
            row = answer[1]
            control = f"chance in each layer, {row['layer_expected_jaccard']:.3f}; Jaccard {row['jaccard']:.3f}"
            n = f"{row['size_a']:.0f} and {row['size_b']:.0f} of {row['n_neurons']:.0f} neurons"
            yield Finding(**answer[0] | {"n": n}, control=control)
    for name, question in (
        ("mixed top", "Do the mixed model's own top neurons carry the {} margin?"),
        ("shared", "Do shared neurons carry the {} margin?"),
    ):
        for objective in ("helpful", "harmless"):
            compared = []
            for control in ("layer", "magnitude"):
                where = {"set": name, "objective": objective, "quantity": "margin", "control": control}
                answer = number(
                    question.format(objective), f"change of the margin beyond random ({control})",
                    "ablation", where, ("beyond_random", "beyond_low", "beyond_high"), "random_effect", "effect",
                    "size",
                )  # fmt: skip
                # Without neurons, or without random sets of their size, there is nothing to compare.
                if answer and answer[1]["size"] and not math.isnan(answer[1]["random_effect"]):
                    row = answer[1]
                    text = f"without them {row['effect']:+.3f}, random sets {row['random_effect']:+.3f}"
                    compared.append(Finding(**answer[0], control=text))
            if len(compared) == 2:
                compared = [
                    replace(one, other=(other.low, other.high))
                    for one, other in zip(compared, reversed(compared), strict=True)
                ]
            yield from compared
    where = {"set": "shared", "quantity": "margin"}
    answer = number(
        "Does ablating shared neurons cost one objective more?", "retained share of the margin, helpful - harmless",
        "collapse", where, ("difference", "difference_low", "difference_high"), "retained_helpful", "retained_harmless",
        "size",
    )  # fmt: skip
    if answer and answer[1]["size"]:
        row = answer[1]
        control = f"retained: helpful {row['retained_helpful']:.3f}, harmless {row['retained_harmless']:.3f}"
        n = " and ".join(str(part["evaluating"]) for part in result.summary["pairs"].values())
        yield Finding(**answer[0] | {"n": n}, control=control)


def _without_control(result: StudyResult) -> Iterator[str]:
    """A sentence for every set of the findings that is empty, or of whose size no random sets could be drawn."""
    if "ablation" not in result.tables:
        return
    rows = result.tables["ablation"]
    rows = rows[rows["set"].isin(["mixed top", "shared"]) & (rows["quantity"] == "margin")]
    for (name, family), part in rows.groupby(["set", "family"], sort=False):
        about = f"{family}: " if len(families_of(result)) > 1 else ""
        if not part["size"].any():
            yield f"{about}The set '{name}' has no neurons, so nothing was ablated."
            continue
        for control, of_control in part.groupby("control", sort=False):
            failed = of_control[of_control["random_effect"].isna() & (of_control["size"] > 0)]
            if len(failed):
                seeds = sorted(set(failed["seed"]))
                yield (
                    f"{about}For the set '{name}' of seed {', '.join(map(str, seeds))}, too few other neurons are left "
                    f"in its layers for random sets ({control}), so its effect has no such control there."
                )


def mean_row(
    result: StudyResult,
    family: str,
    table: str,
    where: dict[str, Any],
    columns: tuple[str, str, str],
    extra: tuple[str, ...],
) -> Any:
    """The mean over seeds of the row that `where` selects; None if the study has no such row.

    Seeds without a control are left out if others have one, so that all numbers of the row are of the same seeds.
    """
    if table not in result.tables:
        return None
    try:
        rows = Rows.of(result, table, (*where, *columns, *extra), family=family).where(**where)
    except OptionError:
        return None
    rows = replace(rows, frame=with_control(rows.frame))
    return rows.means(list(where), *columns, extra=extra).iloc[0]


def with_control(rows: pd.DataFrame) -> pd.DataFrame:
    """The rows whose random sets could be drawn; all of them if that is true of none, or if they have no such sets."""
    if "random_effect" not in rows or rows["random_effect"].isna().all():
        return rows
    return rows[rows["random_effect"].notna()]


def family_fingerprints(result: StudyResult, family: str) -> list[dict[str, str]]:
    """The fingerprints of the three reward models of every seed that recorded all three."""
    found = []
    for entry in result.summary["families"]:
        known = result.summary.get("models", {}).get(f"{entry['family']} {entry['seed']}", {})
        if str(entry["family"]) == family and {"helpful", "harmless", "mixed"} <= set(known):
            found.append({name: known[name]["model"] for name in ("helpful", "harmless", "mixed")})
    return found


def _n(row: Any) -> str:
    return "-" if row.get("n") is None else count(*row["n"])
