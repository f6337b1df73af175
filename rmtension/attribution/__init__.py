"""Score every neuron for its part in the reward margin, and compare the scores with the effects of ablation."""

from rmtension.attribution._faithfulness import faithfulness, sample_neurons
from rmtension.attribution._faithfulness_result import Faithfulness
from rmtension.attribution._kept_curves import KeptCurves, kept_curves, minimality
from rmtension.attribution._make_dashboards import describe_dashboards, neuron_dashboards
from rmtension.attribution._neuron_attribution import NeuronAttribution, score_together
from rmtension.attribution._neuron_dashboards import NeuronDashboards
from rmtension.attribution._set_effects import predict_set_effects
from rmtension.attribution._set_effects_result import SetEffects
from rmtension.attribution._single_effects import single_neuron_effects

__all__ = [
    "Faithfulness",
    "KeptCurves",
    "NeuronAttribution",
    "NeuronDashboards",
    "SetEffects",
    "describe_dashboards",
    "faithfulness",
    "kept_curves",
    "minimality",
    "neuron_dashboards",
    "predict_set_effects",
    "sample_neurons",
    "score_together",
    "single_neuron_effects",
]
