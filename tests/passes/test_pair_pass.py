"""A pass over pairs: any iterable, in chunks, with the responses to a prompt in the same row."""

import gzip
import json
from itertools import count

import pytest
import torch
from tiny_models import Batches, batches_of, make_pairs

from rmtension import (
    AblationContext,
    ActivationCollector,
    Mean,
    NeuronAttribution,
    NeuronSet,
    PreferencePairs,
    Resample,
    RewardHead,
)
from rmtension.attribution._single_effects import single_neuron_effects
from rmtension.data._pair import PreferencePair
from rmtension.errors import DataError
from rmtension.passes._collect_profiles import collect_profiles
from rmtension.passes._pair_pass import run_pass


@pytest.fixture(scope="module")
def head(checkpoints):
    return RewardHead.from_pretrained(checkpoints["gpt2"], dtype=torch.float64)


@pytest.fixture
def three_at_a_time(monkeypatch):
    monkeypatch.setattr("rmtension.passes._pair_pass._PAIRS_PER_CHUNK", 3)


def one_neuron(head):
    mask = torch.zeros(head.n_layers, head.n_neurons("mlp"), dtype=torch.bool)
    mask[1, 3] = True
    return NeuronSet(mask, "mlp", head.architecture)


def everything(head, pairs):
    """The results of all calls that take an iterable of pairs; `pairs` makes the iterable."""
    neurons = one_neuron(head)
    return {
        "statistics": (result := ActivationCollector(head).collect(pairs())).mean,
        "statistics from": result.provenance,
        "profile": (result := collect_profiles(head, pairs(), positions=("response",))["mlp", "response"]).sums,
        "profile from": result.provenance,
        "attribution": (result := NeuronAttribution(head, method="gradient_x_activation").score(pairs())).values,
        "attribution stderr": result.stderr,
        "attribution blocks": result.without_block,
        "attribution from": result.provenance,
        "gap": NeuronAttribution(head, method="integrated_gradients", steps=2).score(pairs()).completeness_gap,
        "effects": (result := single_neuron_effects(head, pairs(), neurons=neurons)).values[neurons.mask],
        "effects from": result.provenance,
        "rewards": (result := head.score_pairs(pairs())).chosen,
        "rewards from": result.provenance,
        "per pair": NeuronAttribution(head, method="gradient_x_activation").per_pair(pairs()).values,
    }


def same(results, expected):
    return all(
        torch.allclose(results[name], value, atol=1e-12, equal_nan=True)
        if isinstance(value, torch.Tensor)
        else results[name] == value
        for name, value in expected.items()
    )


@pytest.fixture(scope="module")
def whole(head, pairs):
    """The results for `PreferencePairs` in a single chunk."""
    return everything(head, lambda: pairs[:10])


def test_a_generator_equals_a_list(head, pairs, whole, three_at_a_time):
    """Values to 1e-12 in float64, and all fields of provenance."""
    assert same(everything(head, lambda: (pair for pair in pairs[:10])), whole)
    assert not same(everything(head, lambda: iter(pairs[:9])), whole)


def test_chunk_size_changes_nothing(head, pairs, whole, monkeypatch):
    monkeypatch.setattr("rmtension.passes._pair_pass._PAIRS_PER_CHUNK", 4)
    assert same(everything(head, lambda: pairs[:10]), whole)


def test_an_iterable_is_read_lazily(head, pairs, three_at_a_time):
    """The iterable may be endless."""
    n_read = count(1)
    n_taken = 0

    def endless():
        nonlocal n_taken
        for n_taken in n_read:
            yield pairs[n_taken % len(pairs)]

    class UpToHundred(Batches):
        def observe(self, batch):
            assert n_taken <= max(batch.indices) + 3
            if max(batch.indices) >= 100:
                raise EOFError
            return []

    with pytest.raises(EOFError):
        run_pass(head, endless(), UpToHundred())
    assert 100 < n_taken <= 105


def test_errors_number_pairs_from_the_first(head, pairs, three_at_a_time):
    broken = [*pairs[:4], PreferencePair("Q", "yes", "  ")]
    collector = ActivationCollector(head).update(pairs[:2])
    before = collector.compute()
    with pytest.raises(DataError, match="pair 4 "):
        collector.update(iter(broken))
    assert torch.equal(collector.compute().mean, before.mean), "a failed update changes nothing"
    assert collector.compute().provenance == before.provenance
    with pytest.raises(DataError, match="expected PreferencePair, got dict at position 3"):
        ActivationCollector(head).collect(iter([*pairs[:3], {"prompt": "Q"}]))


@pytest.mark.parametrize(
    "run", [collect_profiles, lambda head, pairs: NeuronAttribution(head, "mean_difference").score(pairs)]
)
def test_an_empty_iterable_is_refused(head, run):
    for empty in ([], iter([])):
        with pytest.raises(DataError, match="pairs: expected at least one preference pair, got none"):
            run(head, empty)


def test_jsonl_is_read_one_line_at_a_time(pairs, tmp_path):
    path = tmp_path / "pairs.jsonl.gz"
    pairs.to_jsonl(path)
    assert list(PreferencePairs.iter_jsonl(path)) == list(pairs)
    labelled = PreferencePairs.iter_jsonl(path, objective="helpful")
    assert {pair.objective for pair in labelled} == {"helpful"}
    with gzip.open(path, "ab") as file:
        file.write(json.dumps({"prompt": "Q", "chosen": "yes", "rejected": ""}).encode())
    lines = PreferencePairs.iter_jsonl(path)
    assert next(lines) == pairs[0], "the broken line is not read yet"
    with pytest.raises(DataError, match="field 'rejected' is empty"):
        list(lines)


# -- several responses to one prompt -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def best_of():
    """Two items of one chosen and three rejected responses, two pairs of a third prompt, and a pair by itself."""
    prompts = [pair.prompt for pair in make_pairs(4)]
    records = [
        {"prompt": prompts[item], "chosen": "bake a cake", "rejected": rejected, "item": str(item)}
        for item in (0, 1)
        for rejected in ("bake a python", "help", "sorry i can not")
    ]
    records += [{"prompt": prompts[2], "chosen": response, "rejected": "help"} for response in ("the bread", "help")]
    records += [{"prompt": prompts[3], "chosen": "sure", "rejected": "sorry"}]
    return PreferencePairs.from_records(records)


def n_tokens_run(head, pairs, sharing="prompt"):
    return sum(int((batch.position_mask("all")).sum()) for batch in batches_of(head, pairs, sharing=sharing))


def test_a_shared_prompt_runs_once(head, best_of):
    """The prompt and the chosen response of an item run once; the tokens of a row are counted by hand."""
    encoded = head.encode(best_of)
    by_hand = 0
    for numbers in ([0, 1, 2], [3, 4, 5], [6, 7], [8]):
        texts = {text.ids for number in numbers for text in (encoded.chosen[number], encoded.rejected[number])}
        most = min(len(ids) - 1 for ids in texts)
        shared = next((n for n in range(most) if len({ids[n] for ids in texts}) > 1), most)
        by_hand += shared + sum(len(ids) - shared for ids in texts)
    assert n_tokens_run(head, best_of) == by_hand
    assert n_tokens_run(head, best_of, "pair") > 1.5 * by_hand
    assert n_tokens_run(head, best_of, "none") == encoded.n_tokens
    (batch,) = batches_of(head, best_of)
    assert len(batch.input_ids) == 4


def test_sharing_a_prompt_changes_no_number(checkpoints, best_of, monkeypatch):
    """Every number equals that of texts that run alone, to 1e-12 in float64."""

    def numbers(head):
        scored = head.score_pairs(best_of)
        statistics = ActivationCollector(head, positions="response").collect(best_of)
        sample = ActivationCollector(head).sample(best_of, n=8)
        profile = collect_profiles(head, best_of, positions=("response",))["mlp", "response"]
        neurons = one_neuron(head)
        values = [scored.chosen, scored.rejected, statistics.mean, statistics.frequency, profile.sums, profile.weights]
        values += [single_neuron_effects(head, best_of, neurons=neurons).values[neurons.mask]]
        for positions in ("all", "response", "last"):
            for replacement in (Mean(statistics), Resample(sample)):
                with AblationContext(head, neurons, replacement, positions=positions):
                    values.append(head.score_pairs(best_of).margin)
        return values

    for family in ("gpt2", "llama"):
        head = RewardHead.from_pretrained(checkpoints[family], dtype=torch.float64)
        shared = numbers(head)
        with monkeypatch.context() as patched:
            patched.setattr("rmtension.bodies._bodies.BridgeBody.pack_up_to", 0)
            alone = numbers(head)
        room = 1e-12 if family == "gpt2" else 1e-6  # Llama's norms are float32 in every model
        assert all(
            torch.allclose(together, single, atol=room, rtol=0) for together, single in zip(shared, alone, strict=True)
        )
        assert not torch.allclose(shared[0], shared[1])
        assert shared[0][7] == shared[1][7], "one text on both sides is one text"


def test_rows_of_many_pairs_respect_the_length_limit(head, best_of, monkeypatch):
    monkeypatch.setattr("rmtension.passes._pair_pass._GROUP_AT_LEAST", 45)
    monkeypatch.setattr("rmtension.passes._pair_pass._WIDTHS", 0)
    whole = head.score_pairs(best_of)
    several = []
    for batch in batches_of(head, best_of):
        several += torch.bincount(batch.rows, minlength=len(batch.input_ids)).tolist()
        if batch.position_ids is not None and len(batch.indices) > 2 * len(batch.input_ids):
            assert batch.input_ids.shape[1] <= 45
    assert max(several) > 2
    assert sum(several) == 2 * len(best_of)
    monkeypatch.setattr("rmtension.passes._pair_pass._GROUP_AT_LEAST", 0)
    assert torch.allclose(head.score_pairs(best_of).margin, whole.margin, atol=1e-12)


def test_prompts_cut_differently_share_no_row(checkpoints):
    """A single repeated word: tokens of the prompt in one text are at positions of the response in the other."""
    head = RewardHead.from_pretrained(checkpoints["gpt2"], dtype=torch.float64, max_length=40)
    prompt = " ".join(["cake"] * 60)
    records = [
        {"prompt": prompt, "chosen": " ".join(["cake"] * n + ["bread"]), "rejected": " ".join(["cake"] * n + ["help"])}
        for n in (4, 10)
    ]
    both = PreferencePairs.from_records(records)
    neurons = one_neuron(head)
    with AblationContext(head, neurons, positions="response"):
        together = head.score_pairs(both).margin
        alone = torch.cat([head.score_pairs(both[number : number + 1]).margin for number in range(2)])
    assert torch.allclose(together, alone, atol=1e-12)


def test_a_gradient_belongs_to_a_single_pair(head, best_of):
    """Pairs of one prompt share no row for gradients, so every pair gets the scores that it gets alone."""
    attribution = NeuronAttribution(head, method="gradient_x_activation")
    together = attribution.per_pair(best_of).values
    for number in range(len(best_of)):
        assert torch.allclose(
            attribution.per_pair(best_of[number : number + 1]).values[0], together[number], atol=1e-12
        )
    assert together[7].abs().max() == 0, "identical responses have a gradient of exactly 0"
    assert float(together[0].abs().max()) > 1e-3
