"""The main numbers of a study, each with its interval, control and n; and the questions they leave open."""

from collections.abc import Iterator
from typing import Any

from rmtension.report._finding import Finding
from rmtension.report._mean_row import mean_row, n_of
from rmtension.report._set_findings import set_findings
from rmtension.report._tables import families_of
from rmtension.study._result import StudyResult


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
        f"n = {finding.n}. " + finding.why_open
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
        given = {"family": family, "question": question, "quantity": quantity, "n": n_of(row)}
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
    yield from set_findings(result, family)


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


def family_fingerprints(result: StudyResult, family: str) -> list[dict[str, str]]:
    """The fingerprints of the three reward models of every seed that recorded all three."""
    found = []
    for entry in result.summary["families"]:
        known = result.summary.get("models", {}).get(f"{entry['family']} {entry['seed']}", {})
        if str(entry["family"]) == family and {"helpful", "harmless", "mixed"} <= set(known):
            found.append({name: known[name]["model"] for name in ("helpful", "harmless", "mixed")})
    return found
