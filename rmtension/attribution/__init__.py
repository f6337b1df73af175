"""Score every neuron for its part in the reward margin, and compare the scores with the effects of ablation."""

from rmtension.attribution._examine import examine
from rmtension.attribution._faithfulness import faithfulness, sample_neurons
from rmtension.attribution._faithfulness_result import Faithfulness
from rmtension.attribution._neuron_attribution import NeuronAttribution, score_together
from rmtension.attribution._neuron_pages import NeuronPages
from rmtension.attribution._single_effects import single_neuron_effects

__all__ = [
    "Faithfulness",
    "NeuronAttribution",
    "NeuronPages",
    "examine",
    "faithfulness",
    "sample_neurons",
    "score_together",
    "single_neuron_effects",
]
