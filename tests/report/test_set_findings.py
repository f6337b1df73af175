"""Directions of ablated sets are adjusted for the number of questions, as p-values are by Holm's procedure."""

import numpy as np
import pandas as pd
import pytest
from hand_made import hand_made
from scipy import stats

from rmtension import StudyResult
from rmtension.report._main_findings import unconcluded
from rmtension.report._mean_row import mean_row
from rmtension.report._set_findings import set_findings

N_DRAWS = 8
SETS, OBJECTIVES, CONTROLS = ("mixed top", "shared"), ("helpful", "harmless"), ("layer", "magnitude")


def study_of(t_values, gap, n_draws=N_DRAWS):
    """A study of one seed whose sets have these t values by set, objective and control, and whose gap this z value."""
    study = hand_made(seeds=(0,))
    half = stats.t.ppf(0.975, n_draws - 1)
    row = study.tables["ablation"].iloc[0]
    rows = [
        {**row, "set": name, "objective": objective, "control": control, "quantity": "margin", "size": 7,
         "n_draws": n_draws, "beyond_random": t, "beyond_low": t - half, "beyond_high": t + half}
        for (name, objective, control), t in zip(cells(), t_values, strict=True)
    ]  # fmt: skip
    half = stats.norm.ppf(0.975)
    collapse = {"set": "shared", "quantity": "margin", "difference": gap, "size": 7}
    collapse |= {"difference_low": gap - half, "difference_high": gap + half}
    frame = pd.DataFrame([{**study.tables["collapse"].iloc[0], **collapse}])
    return StudyResult({**study.tables, "ablation": pd.DataFrame(rows), "collapse": frame}, study.summary)


def cells():
    return [(name, objective, control) for name in SETS for objective in OBJECTIVES for control in CONTROLS]


def directions_by_holm(t_values, gap, n_draws=N_DRAWS):
    """By question, its side of 0 or 0: the larger p-value of both controls, in Holm's step-down procedure at 5%."""
    p_values, sides = [], []
    for pair in np.reshape(t_values, (4, 2)):
        agree = np.sign(pair[0]) == np.sign(pair[1])
        p_values.append(2 * stats.t.sf(np.abs(pair).min(), n_draws - 1) if agree else 1.0)
        sides.append(int(np.sign(pair[0])))
    p_values.append(2 * stats.norm.sf(abs(gap)))
    sides.append(int(np.sign(gap)))
    found = [0] * 5
    for rank, number in enumerate(np.argsort(p_values)):
        if p_values[number] > 0.05 / (5 - rank):
            break
        found[number] = sides[number]
    return found


def side(finding):
    return 0 if finding.is_open else 1 if finding.direction.startswith("above") else -1


def test_directions_are_those_of_holms_procedure():
    rng = np.random.default_rng(0)
    n_decided = set()
    for _ in range(40):
        t_values = np.repeat(rng.normal(scale=4, size=4), 2) + rng.normal(scale=0.5, size=8)
        gap = rng.normal(scale=2)
        found = list(set_findings(study_of(t_values, gap), "tiny"))
        assert len(found) == 9
        expected = directions_by_holm(t_values, gap)
        n_decided.add(sum(map(abs, expected)))
        assert [side(one) for one in found] == [*np.repeat(expected[:4], 2), expected[4]]
    assert len(n_decided) >= 4, "few and many questions are decided"


def test_one_direction_of_five_questions_needs_more_than_its_own_interval():
    """A negative control: the interval alone excludes 0, and among five questions it is no direction."""
    t_values = [2.5, 2.6, *[0.1] * 6]
    study = study_of(t_values, 0.1)
    found = list(set_findings(study, "tiny"))
    assert found[0].low > 0
    assert [one.direction for one in found[:2]] == ["not decided: above 0 before adjusting for 5 questions"] * 2
    assert sum("5 questions about ablated sets ask for does not" in line for line in unconcluded(study, found)) == 2
    # The same interval is a direction once the other questions are decided.
    decided = list(set_findings(study_of([2.5, 2.6, *[9.0] * 6], 9.0), "tiny"))
    assert [one.direction for one in decided] == ["above 0"] * 9


def test_sets_without_neurons_are_no_questions():
    study = study_of([3.2] * 8, 0.0)
    ablation = study.tables["ablation"]
    ablation.loc[ablation["set"] == "shared", "size"] = 0
    study.tables["collapse"]["size"] = 0
    found = list(set_findings(study, "tiny"))
    assert [one.n_questions for one in found] == [2] * 4
    assert {one.direction for one in found} == {"above 0"}
    assert {one.direction for one in set_findings(study_of([3.2] * 8, 0.0), "tiny")} != {"above 0"}


def test_a_table_without_the_number_of_draws_has_that_of_the_options():
    """A negative control: with the normal distribution, the same intervals would give directions."""
    study = study_of([3.2] * 8, 0.0)
    bare = study.tables["ablation"].drop(columns="n_draws")
    found = list(set_findings(StudyResult({**study.tables, "ablation": bare}, study.summary), "tiny"))
    assert [one.direction for one in found] == [one.direction for one in set_findings(study, "tiny")]
    options = study.summary["options"] | {"n_draws": 10_000}
    many = StudyResult({**study.tables, "ablation": bare}, study.summary | {"options": options})
    assert "above 0" in {one.direction for one in set_findings(many, "tiny")}


@pytest.mark.parametrize("level", [0.99, 0.9])
def test_an_interval_at_another_level_is_students(level):
    study = study_of([3.0] * 8, 1.0)
    where = {"set": "shared", "objective": "helpful", "quantity": "margin", "control": "layer"}
    row = mean_row(study, "tiny", "ablation", where, ("beyond_random", "beyond_low", "beyond_high"), (), level=level)
    assert (row["low"], row["high"]) == pytest.approx(stats.t.interval(level, N_DRAWS - 1, loc=3.0))


def test_several_seeds_widen_with_students_quantile_of_the_seeds():
    """Both half widths grow: the mean of those of the draws, and Student's for three seeds."""
    study = hand_made()
    table = study.tables["ablation"].assign(n_draws=N_DRAWS)
    study = StudyResult({**study.tables, "ablation": table}, study.summary)
    where = {"set": "shared", "objective": "helpful", "quantity": "margin", "control": "layer"}
    part = table[(table[list(where)] == pd.Series(where)).all(axis=1)]
    row = mean_row(study, "tiny", "ablation", where, ("beyond_random", "beyond_low", "beyond_high"), (), level=0.99)
    values = part["beyond_random"]
    wider = stats.t.ppf(0.995, N_DRAWS - 1) / stats.t.ppf(0.975, N_DRAWS - 1)
    seeds = stats.t.ppf(0.995, 2) * values.std(ddof=1) / np.sqrt(3)
    half = wider * (values - part["beyond_low"]).mean()
    assert row["low"] == pytest.approx(values.mean() - np.hypot(half, seeds))
