"""The ten analyses of a family of reward models, by the names that `StudyOptions.analyses` selects them by."""

from collections.abc import Callable

from rmtension.study._ablation_tables import causality, cross_objective, curves
from rmtension.study._behaviour_tables import accuracy, confidence, transferability
from rmtension.study._family_runs import FamilyRuns
from rmtension.study._neuron_tables import depth, overlap, scores, sets
from rmtension.study._result import Tables

# In the paper's order. Each analysis takes a `FamilyRuns` and returns tables by name.
ANALYSES: dict[str, Callable[[FamilyRuns], Tables]] = {
    "accuracy": accuracy,
    "transferability": transferability,
    "confidence": confidence,
    "scores": scores,
    "sets": sets,
    "depth": depth,
    "overlap": overlap,
    "curves": curves,
    "cross_objective": cross_objective,
    "causality": causality,
}
