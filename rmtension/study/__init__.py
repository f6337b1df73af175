"""Studies: one reward model inspected, and the ten analyses of the paper over seeds and base models, as tables."""

from rmtension.study._causality import Ablations, ablation_matrix, equal_size_effects
from rmtension.study._collapse_and_drift import collapse
from rmtension.study._curves import ablation_curves
from rmtension.study._family_runs import ModelFamily
from rmtension.study._inspection import ModelInspector, inspect_model
from rmtension.study._inspection_plan import InspectionPlan
from rmtension.study._inspection_result import ModelInspection
from rmtension.study._model_output import ModelOutput
from rmtension.study._model_runs import ModelRuns
from rmtension.study._options import StudyOptions
from rmtension.study._result import StudyResult
from rmtension.study._tension_study import TensionStudy

__all__ = [
    "Ablations",
    "InspectionPlan",
    "ModelFamily",
    "ModelInspection",
    "ModelInspector",
    "ModelOutput",
    "ModelRuns",
    "StudyOptions",
    "StudyResult",
    "TensionStudy",
    "ablation_curves",
    "ablation_matrix",
    "collapse",
    "equal_size_effects",
    "inspect_model",
]
