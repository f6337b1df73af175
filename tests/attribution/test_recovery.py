"""Planted neurons are found again: every set of its kind and no decoy, by the methods that the docs recommend."""

import pytest
from recovery import KIND_OF, recovery

from rmtension.synthetic._organisms import make_organism

# docs/attribution.md says what each method is recommended for.
RECOMMENDED = ("attribution_patching to zero", "integrated_gradients to zero")
N_PAIRS = 40  # with 20, a word occurs in too few pairs for its q-value
# Integrated gradients cost most here. Fewer than the default 32 steps make the test stricter.
STEPS = 8


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    return make_organism(tmp_path_factory.mktemp("plain"), seed=3, n_pairs=N_PAIRS)


@pytest.mark.grid
def test_all_sets_are_found_and_no_decoy_enters(plain):
    """F1 is 1 if there are as many hits as found and true neurons; mean differences are the negative control."""
    rows = recovery(plain, steps=STEPS)
    for method in (*RECOMMENDED, "true single effects"):
        assert rows[method] == {"hits": 16, "found": 16, "truth": 16, "decoys": 0}
    assert rows["mean_difference"]["hits"] < 16
    assert rows["mean_difference"]["decoys"] > 0


def test_a_hit_is_a_neuron_of_the_right_kind(plain, tmp_path, monkeypatch):
    """What `recovery` counts, neuron by neuron; sets of another organism are no hits."""
    sets = {"attribution_patching to zero": {name: plain.truth[kind] for name, kind in KIND_OF.items()}}
    monkeypatch.setattr("recovery.found_sets", lambda organism: sets)
    assert recovery(plain)["attribution_patching to zero"]["hits"] == 16
    other = make_organism(tmp_path, seed=4, n_pairs=N_PAIRS)
    assert recovery(other)["attribution_patching to zero"]["hits"] < 8
    turned = dict(zip(KIND_OF, reversed([plain.truth[kind] for kind in KIND_OF.values()]), strict=True))
    monkeypatch.setattr("recovery.found_sets", lambda organism: {"turned": turned})
    assert recovery(plain)["turned"]["hits"] == 0


@pytest.mark.grid
def test_integrated_gradients_find_neurons_with_a_backup(tmp_path):
    """Methods that approximate single ablations miss neurons that back each other up; integrated gradients do not."""
    rows = recovery(make_organism(tmp_path, seed=3, redundancy=2, n_pairs=N_PAIRS), steps=STEPS)
    for method in ("attribution_patching to zero", "true single effects"):
        assert rows[method] == {"hits": 16, "found": 16, "truth": 32, "decoys": 0}
    assert rows["integrated_gradients to zero"] == {"hits": 32, "found": 32, "truth": 32, "decoys": 0}
