"""The main numbers of a study, each beside its interval, its control and its n; and what they leave open."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from rmtension.errors import OptionError
from rmtension.evaluation._intervals import with_interval
from rmtension.plots._rows import Rows, count
from rmtension.report._tables import families_of
from rmtension.study._result import StudyResult


@dataclass(frozen=True)
class Finding:
    """One number: what it answers, what it is compared with, and the value that would mean no difference."""

    family: str
    question: str
    quantity: str
    value: float
    low: float
    high: float
    control: str
    n: str
    none: float = 0.0

    @property
    def is_open(self) -> bool:
        """Whether the interval leaves the direction open; so does one that there is not."""
        return not (self.low > self.none or self.high < self.none)

    @property
    def estimate(self) -> str:
        """The number with its interval."""
        return with_interval(self.value, self.low, self.high, form="+.3f" if self.none == 0 else ".3f")


def findings(result: StudyResult) -> list[Finding]:
    """What a study of any of the analyses below has found, in the order of the page."""
    return [one for family in families_of(result) for one in _of_family(result, family)]


def unconcluded(result: StudyResult, found: list[Finding]) -> list[str]:
    """What the study cannot say, one sentence each."""
    several = len(families_of(result)) > 1
    lines = [
        f"{f'{one.family}: ' if several else ''}{one.question} {one.quantity}: {one.estimate}, n = {one.n}. The "
        f"interval does not leave out {one.none:g}, so that these pairs do not tell the direction."
        for one in found
        if one.is_open
    ]
    if result.n_seeds == 1:
        lines.append("One seed: intervals are over prompts. How much another training would change is not in them.")
    if not all(one["base"] for one in result.summary["families"]):
        lines.append("Without the base model: overlap that the models have from their base is not told apart.")
    left = [name for name in _ANALYSES if name not in result.summary["options"]["analyses"]]
    if left:
        lines.append(f"Not asked: {', '.join(left)}.")
    if "accuracy" in result.tables and "refusing" not in set(result.tables["accuracy"]["measure"]):
        lines.append("No pair is labelled as one to refuse or to respond to: refusing is not told from ranking.")
    lines.append(
        "What a neuron means: scores and ablations say what it does on these pairs, in this model. Sets of two models "
        "compare neuron by neuron only where both come from one base."
    )
    return lines


# -- parts -------------------------------------------------------------------------------------------------------------

_ANALYSES = ("accuracy", "transferability", "confidence", "overlap", "curves", "causality")


def _of_family(result: StudyResult, family: str) -> Iterator[Finding]:
    def one(
        question: str, quantity: str, table: str, where: dict[str, Any], columns: tuple[str, str, str], *extra: str
    ) -> tuple[dict[str, Any], Any] | None:
        row = _row(result, family, table, where, columns, extra)
        if row is None:
            return None
        given = {"family": family, "question": question, "quantity": quantity, "n": _n(row)}
        return given | {"value": row["value"], "low": row["low"], "high": row["high"]}, row

    for objective in ("helpful", "harmless"):
        where = {"first": "mixed", "second": objective, "objective": objective, "subset": "all"}
        question = f"Does mixed training cost accuracy on {objective} pairs?"
        found = one(
            question, f"accuracy of mixed minus {objective}-only", "comparisons", where, ("difference", "low", "high")
        )
        if found:
            yield Finding(**found[0], control="the specialist, on the same pairs")
    for objective in ("helpful", "harmless"):
        where = {"model": "mixed", "objective": objective, "measure": "accuracy, length matched"}
        found = one(
            f"Does the mixed model rank {objective} pairs of similar length?",
            "accuracy on pairs matched in length", "accuracy", where, ("value", "low", "high"),
        )  # fmt: skip
        if found:
            alone = _row(
                result, family, "accuracy",
                {"model": "length only", "objective": objective, "measure": "accuracy"}, ("value", "low", "high"), (),
            )  # fmt: skip
            control = "chance, 0.5" + ("" if alone is None else f"; the longer response alone: {alone['value']:.3f}")
            yield Finding(**found[0], control=control, none=0.5)
    for score in result.summary["options"]["scores"]:
        where = {"score": score, "kind": "models", "a": "helpful", "b": "harmless", "without_base": "False"}
        found = one(
            "Do the helpful and the harmless model share neurons?", f"Jaccard of top sets by {score} beyond chance",
            "overlap", where, ("beyond_chance", "beyond_low", "beyond_high"), "jaccard", "layer_expected_jaccard",
            "size_a", "size_b", "n_neurons",
        )  # fmt: skip
        if found:
            row = found[1]
            control = f"chance in each layer, {row['layer_expected_jaccard']:.3f}; Jaccard {row['jaccard']:.3f}"
            n = f"{row['size_a']:.0f} and {row['size_b']:.0f} of {row['n_neurons']:.0f} neurons"
            yield Finding(**found[0] | {"n": n}, control=control)
    for objective in ("helpful", "harmless"):
        for control in ("layer", "magnitude"):
            where = {"set": "shared", "objective": objective, "quantity": "margin", "control": control}
            found = one(
                f"Do shared neurons carry the {objective} margin?", f"change of the margin beyond random ({control})",
                "ablation", where, ("beyond_random", "beyond_low", "beyond_high"), "random_effect", "effect",
            )  # fmt: skip
            if found:
                row = found[1]
                yield Finding(
                    **found[0], control=f"without them {row['effect']:+.3f}, random sets {row['random_effect']:+.3f}"
                )
    where = {"set": "shared", "quantity": "margin"}
    found = one(
        "Does taking them out cost one objective more?", "retained share of the margin, helpful - harmless",
        "collapse", where, ("difference", "difference_low", "difference_high"), "retained_helpful", "retained_harmless",
    )  # fmt: skip
    if found:
        row = found[1]
        control = f"retained: helpful {row['retained_helpful']:.3f}, harmless {row['retained_harmless']:.3f}"
        n = " and ".join(str(part["evaluating"]) for part in result.summary["pairs"].values())
        yield Finding(**found[0] | {"n": n}, control=control)


def _row(
    result: StudyResult,
    family: str,
    table: str,
    where: dict[str, Any],
    columns: tuple[str, str, str],
    extra: tuple[str, ...],
) -> Any:
    """The mean over seeds of the one row that `where` names; None where the study has none."""
    if table not in result.tables:
        return None
    try:
        rows = Rows.of(result, table, (*where, *columns, *extra), family=family).where(**where)
    except OptionError:
        return None
    return rows.means(list(where), *columns, extra=extra).iloc[0]


def _n(row: Any) -> str:
    return "-" if row.get("n") is None else count(*row["n"])
