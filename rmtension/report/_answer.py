"""The answer of a study in sentences: effects with intervals and random sets, also when nothing changes."""

import math
from collections.abc import Iterator
from typing import Any

import pandas as pd

from rmtension.evaluation._intervals import with_interval
from rmtension.plots._rows import count
from rmtension.report._finding import side_of
from rmtension.report._main_findings import family_fingerprints
from rmtension.report._mean_row import mean_row, with_control
from rmtension.report._tables import families_of, rows_of_family
from rmtension.study._result import StudyResult

_OBJECTIVES = ("helpful", "harmless")
_BEYOND = ("beyond_random", "beyond_low", "beyond_high")


def answer_sentences(result: StudyResult) -> list[str]:
    """The main results of the first family as sentences, the most important first; at most five.

    Every number has its interval, and every ablation the effect of random sets of the same size. A part that the study
    did not run has no sentence.

    Examples:
        >>> from rmtension import StudyOptions, TensionStudy
        >>> models = dict.fromkeys(("helpful", "harmless", "mixed"), head)
        >>> study = TensionStudy(models, pairs, options=StudyOptions(analyses=("accuracy",)))
        >>> print(answer_sentences(study.run(progress=False))[0])
        The helpful, the harmless and the mixed model are the same model, so all three give the same rewards.
    """
    family = families_of(result)[0]
    return [text for make in (_own, _shared, _cost, _overlap, _retained) for text in make(result, family)]


def answer_note(result: StudyResult) -> str:
    """What the sentences are about: the level of the intervals, the seeds, and the family if there are several."""
    families, level = families_of(result), result.summary["options"]["level"]
    seeds = sum(str(entry["family"]) == families[0] for entry in result.summary["families"])
    over = "Intervals" if seeds == 1 else f"Means of {seeds} seeds. Intervals"
    score = str(result.summary["options"]["scores"][0]).replace("_", " ")
    sets = f"Top sets are by {score}; random sets are matched per layer."
    spread = ", with the spread between seeds" if seeds > 1 else ""
    chance = "those of overlaps beyond chance are over random sets of neurons"
    note = f"{over} are {100 * level:g}% over prompts{spread}; {chance}. {sets}"
    if "ablation" in result.tables:
        note += " These intervals are not adjusted for their number; the directions of sets in the report's table are."
    if len(families) > 1:
        note += f" The sentences and the figure are about the family {families[0]}; the table has all {len(families)}."
    return note


# -- parts -------------------------------------------------------------------------------------------------------------


def _own(result: StudyResult, family: str) -> Iterator[str]:
    rows = _effects(result, family, "mixed top")
    if rows is None:
        return
    first, second = (f"{row['before']:.2f} to {row['before'] + row['value']:.2f}" for row in rows)
    yield (
        f"Without its own top {_size(rows[0])}, the mixed model's mean margin goes from {first} on helpful pairs and "
        f"from {second} on harmless pairs; {_random(rows)}"
    )


def _shared(result: StudyResult, family: str) -> Iterator[str]:
    rows = _effects(result, family, "shared")
    if rows is None:
        return
    if rows[0]["size"][1] == 0:
        yield "No neuron is in the top sets of both specialists, so there are no shared neurons to ablate."
        return
    effects = " and ".join(f"{row['value']:+z.{_decimals(row, 'low', 'high')}f}" for row in rows)
    yield (
        f"Without the {_size(rows[0])} that the helpful and the harmless model share, the mixed model's margin "
        f"changes by {effects}; {_random(rows)}"
    )


def _cost(result: StudyResult, family: str) -> Iterator[str]:
    prints = family_fingerprints(result, family)
    if prints and all(len(set(models.values())) == 1 for models in prints):
        yield "The helpful, the harmless and the mixed model are the same model, so all three give the same rewards."
        return
    parts = []
    for objective in _OBJECTIVES:
        where = {"first": "mixed", "second": objective, "objective": objective, "subset": "all"}
        gap = mean_row(result, family, "comparisons", where, ("difference", "low", "high"), ())
        both = [
            mean_row(
                result, family, "accuracy", {"model": model, "objective": objective, "measure": "accuracy"},
                ("value", "low", "high"), (),
            )
            for model in ("mixed", objective)
        ]  # fmt: skip
        if gap is None or any(row is None for row in both):
            return
        ends = [100 * float(gap[name]) for name in ("value", "low", "high")]
        mixed, specialist = (f"{100 * float(row['value']):.1f}%" for row in both)
        parts.append(
            f"{mixed} of {count(*gap['n'])} {objective} pairs correctly and the {objective} model {specialist} "
            f"({with_interval(*ends, form='+z.1f')} points)"
        )
    yield f"The mixed model ranks {parts[0]}; it ranks {parts[1]}."


def _overlap(result: StudyResult, family: str) -> Iterator[str]:
    score = str(result.summary["options"]["scores"][0])
    where = {"score": score, "kind": "models", "a": "helpful", "b": "harmless", "without_base": "False"}
    columns, extra = ("beyond_chance", "beyond_low", "beyond_high"), ("intersection", "size_a", "size_b")
    row = mean_row(result, family, "overlap", where, columns, (*extra, "jaccard", "layer_expected_jaccard"))
    if row is None:
        return
    yield (
        f"The top sets of the helpful and the harmless model by {score.replace('_', ' ')} ({row['size_a']:.0f} and "
        f"{row['size_b']:.0f} neurons) share {row['intersection']:.0f}: Jaccard {row['jaccard']:.3f}, by chance "
        f"{row['layer_expected_jaccard']:.3f} (beyond chance: {_estimate(row, 'value', 'low', 'high')})."
    )


def _retained(result: StudyResult, family: str) -> Iterator[str]:
    where = {"set": "mixed top", "quantity": "margin"}
    columns, extra = ("difference", "difference_low", "difference_high"), ("retained_helpful", "retained_harmless")
    row = mean_row(result, family, "collapse", where, columns, extra)
    if row is None or math.isnan(row["value"]):
        return
    ends = [100 * float(row[name]) for name in ("value", "low", "high")]
    yield (
        f"Without its own top neurons the mixed model retains {100 * row['retained_helpful']:.0f}% of its helpful and "
        f"{100 * row['retained_harmless']:.0f}% of its harmless margin (difference: "
        f"{with_interval(*ends, form='+z.1f')} points)."
    )


def _effects(result: StudyResult, family: str, name: str) -> list[Any] | None:
    """The effects of ablating a set on the margin of both objectives; None if the study has none."""
    rows = []
    for objective in _OBJECTIVES:
        where = {"set": name, "objective": objective, "quantity": "margin", "control": "layer"}
        extra = ("before", "random_effect", "size")
        row = mean_row(result, family, "ablation", where, ("effect", "low", "high"), extra)
        if row is None:
            return None
        beyond = mean_row(result, family, "ablation", where, _BEYOND, ())
        means = ("set_magnitude", "random_magnitude")
        matched = mean_row(result, family, "ablation", where | {"control": "magnitude"}, _BEYOND, means)
        table = rows_of_family(result, "ablation", family)
        sizes = table.loc[table["set"] == name, "size"].astype(int)
        seeds = with_control(table[(table[list(where)] == pd.Series(where)).all(axis=1)])
        alone = int(((seeds["beyond_low"] > 0) | (seeds["beyond_high"] < 0)).sum())
        values = {end: beyond[key] for end, key in zip(_BEYOND, ("value", "low", "high"), strict=True)}
        side = side_of(beyond["low"], beyond["high"])
        drawn = matched is not None and not math.isnan(matched["value"])
        values["other"] = matched if drawn and side not in (0, side_of(matched["low"], matched["high"])) else None
        rows.append({**row, **values, "size": (min(sizes), max(sizes)), "alone": alone, "n_seeds": len(seeds)})
    return rows


def _size(row: Any) -> str:
    low, high = row["size"]
    return f"{count(low, high)} neuron{'' if high == 1 else 's'}"


def _random(rows: list[Any]) -> str:
    """What random sets did, the effect beyond them, and whether the intervals contain 0; the end of a sentence."""
    if any(math.isnan(row["random_effect"]) for row in rows):
        return "too few neurons are left for random sets of this size, so there is no control."
    first, second = (f"{row['random_effect']:+z.{_decimals(row, *_BEYOND[1:])}f}" for row in rows)
    beyond = " and ".join(_estimate(row, *_BEYOND) for row in rows)
    text = f"random sets of that size change it by {first} and {second} (beyond random: {beyond}"
    inside = [row["beyond_low"] <= 0 <= row["beyond_high"] for row in rows]
    if all(inside):
        text += "; both intervals contain 0"
    elif any(inside):
        text += f"; the {_OBJECTIVES[inside.index(True)]} interval contains 0"
    other = [
        f"{_estimate(row['other'], 'value', 'low', 'high')} on {name} pairs"
        for name, row in zip(_OBJECTIVES, rows, strict=True)
        if row["other"] is not None
    ]
    if other:
        drawn = next(row["other"] for row in rows if row["other"] is not None)
        means = f"{drawn['random_magnitude']:.3g}, the set's {drawn['set_magnitude']:.3g}"
        text += f"; beyond random sets of the nearest magnitudes (mean {means}), the change is {' and '.join(other)}"
    if rows[0]["n_seeds"] > 1:
        # With few seeds, the spread between them makes the interval of their mean wide.
        alone = f"{rows[0]['alone']} (helpful) and {rows[1]['alone']} (harmless) of {rows[0]['n_seeds']} seeds"
        text += f"; the interval beyond random of a single seed excludes 0 in {alone}"
    return f"{text})."


def _estimate(row: Any, value: str, low: str, high: str) -> str:
    return with_interval(row[value], row[low], row[high], form=f"+z.{_decimals(row, low, high)}f")


def _decimals(row: Any, low: str, high: str) -> int:
    """As many decimals as the interval is precise to, from 2 to 4."""
    half = (row[high] - row[low]) / 2
    return min(4, max(2, -math.floor(math.log10(half / 3)))) if half > 0 else 2
