"""Pictures of a study's tables. Every function returns the Figure, draws into `ax` if given one, and shows nothing.

The first argument is a `StudyResult`, or one of its tables, which may also be made by hand: columns `family` and `seed`
may be missing then. Several seeds are averaged, with the intervals of `intervals.over_seeds`, and shown faintly one by
one. `family` chooses among several; `level` is that of the intervals in a bare table (0.95 unless the table says).
Figures of several panels draw one of them into a given `ax`, chosen by the arguments. `conflict_scatter` takes a
`ConflictReport` instead, `faithfulness_scatter` and `faithfulness_sets` a `Faithfulness`.
"""

from rmtension.plots._ablations import collapse, curves, equal_size, matrix
from rmtension.plots._behaviour import accuracy, comparisons, radar, refuse_respond, transferability
from rmtension.plots._conflict import conflict_scatter
from rmtension.plots._faithfulness import faithfulness_scatter, faithfulness_sets
from rmtension.plots._histograms import confidence, distributions
from rmtension.plots._top_sets import depth, overlap

__all__ = [
    "accuracy",
    "collapse",
    "comparisons",
    "confidence",
    "conflict_scatter",
    "curves",
    "depth",
    "distributions",
    "equal_size",
    "faithfulness_scatter",
    "faithfulness_sets",
    "matrix",
    "overlap",
    "radar",
    "refuse_respond",
    "transferability",
]
