"""Planted damage: which neurons, by how much, and that undoing it gives the whole model back."""

import torch

from rmtension import AblationContext, NeuronAttribution, Scale
from rmtension.synthetic import make_organism, plant_damage


def test_damage_is_undone_by_the_inverse_factor(tmp_path):
    organism = make_organism(tmp_path / "model", noise=0.05, n_pairs=48)
    head, pairs = organism.head(), organism.pairs
    damaged = plant_damage(head, pairs["harmless"], n=6, factor=-2.0, spare=pairs["helpful"])
    whole, broken = (model.score_pairs(pairs["harmless"]) for model in (head, damaged.head))
    assert broken.accuracy() < whole.accuracy() - 0.3
    assert damaged.head.score_pairs(pairs["helpful"]).accuracy() > 0.95
    with AblationContext(damaged.head, damaged.neurons, Scale(1 / damaged.factor)):
        back = damaged.head.score_pairs(pairs["harmless"])
    assert torch.allclose(back.margin, whole.margin, rtol=1e-5, atol=1e-5)
    # The neurons are those with the largest harmless minus absolute helpful contributions.
    by_pair = {
        name: NeuronAttribution(head, "gradient_x_activation").per_pair(part).mean() for name, part in pairs.items()
    }
    order = (by_pair["harmless"] - by_pair["helpful"].abs()).flatten()
    assert set(order.topk(6).indices.tolist()) == set(damaged.neurons.mask.flatten().nonzero()[:, 0].tolist())
    assert len(damaged.neurons & organism.truth["harmless"]) == 4
