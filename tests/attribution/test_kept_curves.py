"""Curves of kept and replaced neurons against transformers with plain hooks, in float64, and hand-set organisms."""

from itertools import pairwise

import numpy as np
import pandas as pd
import pytest
import torch
from reference import Reference
from tiny_models import make_pairs

from rmtension import ActivationCollector, Mean, NeuronAttribution, NeuronScores, RewardHead, Zero
from rmtension.attribution import KeptCurves, kept_curves, minimality
from rmtension.errors import OptionError, ProvenanceError, StorageError
from rmtension.synthetic import make_organism

FRACTIONS = (0.1, 0.5, 1.0)
CLOSE = {"atol": 1e-9, "rtol": 0}


@pytest.fixture(scope="module")
def pairs():
    return make_pairs(8)


@pytest.fixture(scope="module")
def both(checkpoints, pairs):
    """A head on whose pairs the MLP matters, the reference, and scores by two methods."""
    head = RewardHead.from_pretrained(checkpoints["gpt2"], dtype=torch.float64)
    names = ("attribution_patching", "mean_difference")
    scores = {name: NeuronAttribution(head, name).score(pairs) for name in names}
    return head, Reference(checkpoints["gpt2"]), scores


@pytest.fixture(scope="module")
def preferred(both, pairs):
    head = both[0]
    correct = head.score_pairs(pairs).correct.tolist()
    records = [
        {"prompt": pair.prompt, "chosen": (pair.chosen, pair.rejected)[not good],
         "rejected": (pair.rejected, pair.chosen)[not good]}
        for pair, good in zip(pairs, correct, strict=True)
    ]  # fmt: skip
    return type(pairs).from_records(records)


@pytest.mark.parametrize("replaced_by", ["zero", "mean"])
def test_curves_are_ratios_of_margins_with_plain_hooks(both, preferred, replaced_by):
    head, reference, scores = both
    replacement, values = Zero(), torch.zeros(head.n_layers, head.n_neurons("mlp"), dtype=torch.float64)
    if replaced_by == "mean":
        statistics = ActivationCollector(head).collect(preferred)
        replacement, values = Mean(statistics), statistics.mean
    found = kept_curves(head, preferred, scores, replacement, fractions=FRACTIONS, n_random=1, progress=False)
    every = torch.ones(head.n_layers, head.n_neurons("mlp"), dtype=torch.bool)
    whole, nothing = (float(reference.margins(preferred, mask, values).mean()) for mask in (~every, every))
    assert (found.whole, found.nothing) == pytest.approx((whole, nothing), abs=1e-9)
    table = found.curves.set_index(["ranking", "share"])
    for name, of_method in scores.items():
        heights = [0.0]
        for share in FRACTIONS:
            top = of_method.top(share).mask
            expected = {
                "faithfulness": reference.margins(preferred, ~top, values).mean(),
                "completeness": reference.margins(preferred, top, values).mean(),
            }
            for column, margin in expected.items():
                f = (float(margin) - nothing) / (whole - nothing)
                assert table.loc[(name, share), column] == pytest.approx(f, abs=1e-9)
            heights.append(table.loc[(name, share), "faithfulness"])
        # The areas of MIB: trapezoids over shares from 0, where nothing is kept.
        steps = list(zip((0.0, *FRACTIONS), heights, strict=True))
        cpr = sum((b - a) * (f + g) / 2 for (a, f), (b, g) in pairwise(steps))
        cmd = sum((b - a) * (abs(1 - f) + abs(1 - g)) / 2 for (a, f), (b, g) in pairwise(steps))
        row = found.areas.set_index("ranking").loc[name]
        assert (row["cpr"], row["cmd"]) == pytest.approx((cpr, cmd), abs=1e-9)
    assert table.loc[("random 0", 1.0), "faithfulness"] == 1.0
    assert table.loc[("random 0", 1.0), "completeness"] == 0.0


def test_intervals_resample_prompts_jointly(both, preferred):
    """The ends are those of a bootstrap over prompts, written here, of the ratio of sums."""
    head, _, scores = both
    found = kept_curves(head, preferred, scores, fractions=(0.5, 1.0), n_random=0, level=0.9, progress=False)
    top = scores["mean_difference"].top(0.5)
    every = top | ~top
    columns = []
    for neurons in (~every, every, ~top):
        ablated = head.with_ablation(neurons) if len(neurons) else head
        columns.append(ablated.score_pairs(preferred).margin.double().numpy())
    columns = np.stack(columns, axis=1)
    draws = np.random.default_rng(3).integers(len(columns), size=(20_000, len(columns)))
    whole, nothing, kept = columns[draws].sum(axis=1).T
    low, high = np.quantile((kept - nothing) / (whole - nothing), [0.05, 0.95])
    row = found.curves.set_index(["ranking", "share"]).loc[("mean_difference", 0.5)]
    spread = high - low
    assert abs(row["faithfulness_low"] - low) < 0.1 * spread
    assert abs(row["faithfulness_high"] - high) < 0.1 * spread


@pytest.fixture(scope="module")
def organism(tmp_path_factory):
    return make_organism(tmp_path_factory.mktemp("organism"), seed=1, n_pairs=24)


def test_planted_neurons_keep_everything(organism):
    """The planted neurons alone keep the whole margin and complete it; a ranking that puts them last keeps nothing."""
    head, pairs = organism.head(), organism.pairs["helpful"]
    planted = organism.truth["helpful"] | organism.truth["shared"] | organism.truth["conflict"]
    best = NeuronAttribution(head, "attribution_patching").score(pairs)
    share = len(planted) / planted.mask.numel()
    found = kept_curves(head, pairs, best, fractions=(share, 1.0), n_random=2, progress=False)
    table = found.curves.set_index(["ranking", "share"])
    name = best.provenance.label
    assert table.loc[(name, share), "faithfulness"] == pytest.approx(1, abs=0.02)
    assert table.loc[(name, share), "completeness"] == pytest.approx(0, abs=0.02)
    assert table.loc[("random 0", share), "faithfulness"] < 0.8
    assert found.areas.set_index("ranking").loc[name, "cmd"] < 0.2 * found.areas["cmd"].max()


@pytest.mark.grid
def test_minimality_is_the_loss_without_each_part(organism):
    head, pairs = organism.head(), organism.pairs["helpful"]
    planted = organism.truth["helpful"] | organism.truth["shared"] | organism.truth["conflict"]
    decoys = organism.truth["decoy"]
    table = minimality(head, pairs, planted, parts=len(planted), progress=False)
    every = planted | ~planted
    whole = head.score_pairs(pairs).margin.mean()
    nothing = head.with_ablation(every).score_pairs(pairs).margin.mean()
    kept = head.with_ablation(~planted).score_pairs(pairs).margin.mean()
    losses = []
    for place in planted:
        one = type(planted).from_indices(
            [place], shape=tuple(planted.mask.shape), site="mlp", architecture=head.architecture
        )
        margin = head.with_ablation(~(planted - one)).score_pairs(pairs).margin.mean()
        losses.append(float((kept - margin) / (whole - nothing)))
    assert sorted(table["loss"]) == pytest.approx(sorted(losses), abs=1e-4)
    assert table["f"].tolist() == pytest.approx([float((kept - nothing) / (whole - nothing))] * len(planted), abs=1e-4)
    # Neurons that do nothing can be removed without loss.
    padded = minimality(head, pairs, planted | decoys, parts=len(planted | decoys), progress=False)
    assert (padded["loss"].abs() < 1e-3).sum() >= len(decoys)
    assert table["size"].sum() == len(planted)


def test_a_saved_result_loads_equal(both, preferred, tmp_path):
    head, _, scores = both
    found = kept_curves(head, preferred, scores, fractions=(0.5, 1.0), n_random=1, progress=False)
    found.save(tmp_path / "kept.safetensors")
    loaded = KeptCurves.load(tmp_path / "kept.safetensors")
    pd.testing.assert_frame_equal(loaded.curves, found.curves)
    pd.testing.assert_frame_equal(loaded.areas, found.areas)
    assert (loaded.whole, loaded.nothing, loaded.provenance) == (found.whole, found.nothing, found.provenance)
    assert repr(loaded) == repr(found)
    assert "CPR" in repr(found)
    scores["mean_difference"].save(tmp_path / "scores.safetensors")
    with pytest.raises(StorageError, match="KeptCurves"):
        KeptCurves.load(tmp_path / "scores.safetensors")


class TestErrors:
    @pytest.mark.parametrize("fractions", [(), (0.1,), (0.5, 0.1, 1.0), (0.0, 1.0)])
    def test_shares(self, both, preferred, fractions):
        head, _, scores = both
        with pytest.raises(OptionError, match="fractions: expected shares that increase to 1"):
            kept_curves(head, preferred, scores, fractions=fractions)

    def test_no_margin(self, both, pairs):
        head, _, scores = both
        both_ways = type(pairs)([*pairs, *(pair.__class__(pair.prompt, pair.rejected, pair.chosen) for pair in pairs)])
        with pytest.raises(OptionError, match="nothing to keep"):
            kept_curves(head, both_ways, scores, progress=False)

    def test_scores_of_another_model(self, checkpoints, both, preferred, organism):
        head, _, scores = both
        other = NeuronAttribution(organism.head(), "mean_difference").score(organism.pairs["helpful"])
        with pytest.raises(ProvenanceError, match="kept_curves of other"):
            kept_curves(head, preferred, {"other": other})
        with pytest.raises(OptionError, match="at least one NeuronScores"):
            kept_curves(head, preferred, {})
        with pytest.raises(OptionError, match="names of random rankings"):
            kept_curves(head, preferred, {"random 0": scores["mean_difference"]})

    def test_parts(self, both, preferred):
        head, _, scores = both
        with pytest.raises(OptionError, match="parts: expected 1 to 3"):
            minimality(head, preferred, scores["mean_difference"].top(k=3), parts=4)
        assert isinstance(scores["mean_difference"], NeuronScores)
