"""Ablations: what a neuron is replaced by, while a model runs, for many sets at once, and permanently."""

from rmtension.interventions._ablation import AblationContext
from rmtension.interventions._ablation_effects import ablation_effects
from rmtension.interventions._optimal import Optimal
from rmtension.interventions._replacements import Mean, Median, OtherResponse, Resample, Scale, Zero
from rmtension.interventions._sweep import score_without

__all__ = [
    "AblationContext",
    "Mean",
    "Median",
    "Optimal",
    "OtherResponse",
    "Resample",
    "Scale",
    "Zero",
    "ablation_effects",
    "score_without",
]
