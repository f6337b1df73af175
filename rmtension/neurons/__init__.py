"""Scores and sets of neurons: top sets, overlap beyond chance, neurons that models share, conflict within one model."""

from rmtension.neurons._conflict import conflict
from rmtension.neurons._conflict_report import ConflictReport
from rmtension.neurons._neuron_scores import NeuronScores
from rmtension.neurons._neuron_set import NeuronSet
from rmtension.neurons._overlap import Overlap, depth_thirds, jaccard_intervals
from rmtension.neurons._pair_attributions import PairAttributions
from rmtension.neurons._replication import replication_across_seeds, replication_probability
from rmtension.neurons._shared_neurons import SharedNeuronAnalyzer, SharedNeuronReport
from rmtension.neurons._token_scores import TokenScores

__all__ = [
    "ConflictReport",
    "NeuronScores",
    "NeuronSet",
    "Overlap",
    "PairAttributions",
    "SharedNeuronAnalyzer",
    "SharedNeuronReport",
    "TokenScores",
    "conflict",
    "depth_thirds",
    "jaccard_intervals",
    "replication_across_seeds",
    "replication_probability",
]
