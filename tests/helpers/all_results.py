"""An example of every result that can be saved."""

import torch

from rmtension import ActivationStatistics, NeuronScores, NeuronSet, PairRewards, PreferencePairs
from rmtension.attribution._faithfulness_result import Faithfulness
from rmtension.neurons._conflict import conflict
from rmtension.neurons._pair_attributions import PairAttributions
from rmtension.neurons._shared_neurons import SharedNeuronAnalyzer
from rmtension.passes._activation_profile import ActivationProfile
from rmtension.passes._activation_sample import ActivationSample
from rmtension.store._provenance import Provenance

WHERE = Provenance("toy", "0f", "mlp", "all", "direct_effect", "float32", "00", 4, 64, "0", skipped=("pair-1",), sign=1)


PAIRS = PreferencePairs.from_records([{"prompt": letter, "chosen": "yes", "rejected": "no"} for letter in "abcd"])


def results():
    """One result of every kind that is saved as one file."""
    numbers = torch.Generator().manual_seed(0)
    values = torch.randn(2, 3, dtype=torch.float64, generator=numbers)
    scores = NeuronScores(values, values.abs(), WHERE, torch.stack([values] * 32), values[:, 0])
    pair_scores = PairAttributions(torch.randn(4, 2, 3, generator=numbers), PAIRS, WHERE)
    import pandas as pd

    from rmtension.neurons._score_agreement import MEASURES

    summary = {name + end: [0.5] for name in MEASURES for end in ("", "_low", "_high")}
    return [
        NeuronSet(values > 0, "mlp", "toy"),
        scores,
        ActivationStatistics(values, values, values, values, values, WHERE),
        ActivationSample(torch.randn(5, 2, 3, generator=numbers), torch.arange(5), WHERE),
        ActivationProfile(torch.ones(5, 2, 32, 2, 3).double(), torch.ones(2, 32).double(), "", WHERE),
        pair_scores,
        PairRewards(values.view(-1)[:4], values.view(-1)[:4] - 1, PAIRS, WHERE, 1, 0),
        SharedNeuronAnalyzer({"a": scores, "b": scores}, base=scores).analyze(fraction=0.5),
        conflict(pair_scores, pair_scores),
        Faithfulness(
            pd.DataFrame({"method": ["m"], "n": [2], **summary}),
            pd.DataFrame({"layer": [0, 1], "neuron": [0, 0], "effect": [0.1, 0.2]}),
            pd.DataFrame(),
            WHERE,
            0.95,
        ),
    ]
