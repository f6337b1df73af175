"""Figures of a study's tables. Every function returns a matplotlib `Figure`, and draws into `ax` if it is given.

The first argument is a `StudyResult` or one of its tables. In a table that you make yourself, the columns `family` and
`seed` may be missing. Several seeds are averaged, with the intervals of `evaluation.over_seeds`; single seeds are drawn
faintly. `family` selects one of several families. `level` is the level of the intervals in a table without a column
`level` (default 0.95). A given `ax` holds one panel; the arguments of a figure with several panels select it.
`conflict_scatter` takes a `ConflictReport` instead, `faithfulness_scatter` and `faithfulness_sets` take a
`Faithfulness`, `effects_by_group` takes the table of `ablation_effects`, and `closed_share`, `repair_checks` and
`repair_path` take parts of a `RepairReport`. The functions need matplotlib (`pip install matplotlib`). Pyplot
neither shows the figures nor keeps them open.
"""

from rmtension.plots._ablations import collapse, curves, equal_size, matrix
from rmtension.plots._behaviour import accuracy, comparisons, radar, refuse_respond, transferability
from rmtension.plots._conflict import conflict_scatter
from rmtension.plots._faithfulness import faithfulness_scatter, faithfulness_sets
from rmtension.plots._group_effects import effects_by_group
from rmtension.plots._histograms import confidence, distributions
from rmtension.plots._repair import closed_share, repair_checks, repair_path
from rmtension.plots._top_sets import depth, overlap

__all__ = [
    "accuracy",
    "closed_share",
    "collapse",
    "comparisons",
    "confidence",
    "conflict_scatter",
    "curves",
    "depth",
    "distributions",
    "effects_by_group",
    "equal_size",
    "faithfulness_scatter",
    "faithfulness_sets",
    "matrix",
    "overlap",
    "radar",
    "refuse_respond",
    "repair_checks",
    "repair_path",
    "transferability",
]
