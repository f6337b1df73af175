"""Figures of a repair: every mark is where the tables say."""

import numpy as np
import pandas as pd
import pytest

from rmtension import plots
from rmtension.errors import OptionError
from rmtension.evaluation import Estimate

CONTROLS = pd.DataFrame(
    {"control": ["shuffled labels", "random neurons", "random neurons", "head refit"], "closed": [0.0, 0.1, -0.2, 0.9]}
)
CHECKS = pd.DataFrame(
    [
        {"quantity": "harmless accuracy", "change": 0.3, "low": 0.2, "high": 0.4, "spared": True, "n": 60},
        {"quantity": "harmless margin", "change": 9.0, "low": 8.0, "high": 9.5, "spared": True, "n": 60},
        {"quantity": "helpful accuracy", "change": -0.01, "low": -0.03, "high": 0.0, "spared": False, "n": 70},
    ]
)
PATH = pd.DataFrame(
    {
        "share": [0.3, 0.3, 0.7, 0.7],
        "numbers": [8, 1, 1, 8],
        "closed": [0.8, 0.2, 0.3, 0.9],
        "allowed": [True, True, True, False],
    }
)


def estimate(value=0.8, low=0.7, high=0.9):
    return Estimate(value, low, high, n=60, n_prompts=60)


def test_closed_shares_are_dots_in_rows_of_their_controls():
    (axes,) = plots.closed_share(estimate(), CONTROLS).axes
    labels = [label.get_text() for label in axes.get_yticklabels()]
    assert labels == ["this edit", "shuffled labels", "random neurons (2)", "head refit"]
    edit, *controls = [line for line in axes.get_lines() if line.get_marker() == "o"]
    assert (edit.get_xdata().tolist(), edit.get_ydata().tolist()) == ([0.8], [0])
    drawn = {(x, y) for line in controls for x, y in zip(line.get_xdata(), line.get_ydata(), strict=True)}
    assert drawn == {(0.0, 1), (0.1, 2), (-0.2, 2), (0.9, 3)}
    left, right = axes.get_xlim()
    assert left < -0.2
    assert right > 1


def test_infinite_ends_reach_the_edge():
    (axes,) = plots.closed_share(estimate(low=-np.inf, high=np.inf), CONTROLS).axes
    left, right = axes.get_xlim()
    segment = axes.collections[0].get_segments()[0][:, 0]
    assert segment.tolist() == pytest.approx([left, right])


def test_changes_beyond_the_allowed_loss_are_hollow():
    (axes,) = plots.repair_checks(CHECKS, most_lost=0.02).axes
    assert [label.get_text() for label in axes.get_yticklabels()] == [
        "harmless accuracy  (n = 60)",
        "helpful accuracy  (n = 70)",
    ]
    marks = {
        round(float(line.get_xdata()[0]), 3): line.get_markerfacecolor()
        for line in axes.get_lines()
        if line.get_marker() == "o"
    }
    assert marks[-0.01] == "white"
    assert marks[0.3] != "white"
    dashed = [line for line in axes.get_lines() if line.get_linestyle() == "--"]
    assert [line.get_xdata()[0] for line in dashed] == [-0.02]


def test_the_path_is_a_line_per_weight_in_order_of_size():
    (axes,) = plots.repair_path(PATH).axes
    lines = [line for line in axes.get_lines() if len(line.get_xdata()) == 2 and line.get_marker() not in ("None", "")]
    assert [(line.get_xdata().tolist(), line.get_ydata().tolist()) for line in lines] == [
        ([1, 8], [0.2, 0.8]),
        ([1, 8], [0.3, 0.9]),
    ]
    refused = [line for line in axes.get_lines() if line.get_color() == "white" and len(line.get_xdata())]
    assert [line.get_ydata().tolist() for line in refused] == [[0.9]]
    plots.repair_path(PATH.drop(columns="share"))


@pytest.mark.parametrize(
    ("draw", "name"),
    [
        (lambda table: plots.closed_share(estimate(), table), "controls"),
        (plots.repair_checks, "checks"),
        (plots.repair_path, "path"),
    ],
)
def test_other_tables_are_refused(draw, name):
    for table in (pd.DataFrame({"a": [1]}), pd.DataFrame()):
        with pytest.raises(OptionError, match=f"{name}: expected the table of a RepairReport"):
            draw(table)
