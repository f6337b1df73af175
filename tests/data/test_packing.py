"""Packed pairs: the numbers are those of each text alone, and rows stay what they should be.

In float64 to 1e-9, families with float32 norms to 1e-7 for gradients (`close_to`). All families: `test_every_family`.
"""

import pytest
import torch
import transformers
from all_families import EXPERTS
from packed_pairs import n_packed, pairs_of_all_kinds
from tiny_models import batches_of, close_to, grid, save_classifier

from rmtension import (
    AblationContext,
    ActivationCollector,
    Mean,
    NeuronAttribution,
    NeuronSet,
    Resample,
    RewardHead,
    Zero,
)
from rmtension.attribution._single_effects import single_neuron_effects
from rmtension.bodies._native_run import measure_packing, windows_of
from rmtension.data._encoding import EncodedPairs, EncodedText
from rmtension.data._packing import attention_mask, pair_batches
from rmtension.data._token_places import ReadAt
from rmtension.passes._collect_profiles import collect_profiles
from rmtension.synthetic.check_matrix import make_classifier


@pytest.fixture(scope="module")
def few():
    return pairs_of_all_kinds()


@pytest.fixture
def alone(monkeypatch):
    """From when it is called, nothing is packed."""

    def use():
        for body in ("BridgeBody", "HookedTransformerBody"):
            monkeypatch.setattr(f"rmtension.bodies._bodies.{body}.pack_up_to", 0)

    return use


def numbers(head, pairs):
    """One of everything that runs over pairs."""
    scored = head.score_pairs(pairs)
    results = {"chosen": scored.chosen, "rejected": scored.rejected}
    for positions in ("all", "response", "last"):
        statistics = ActivationCollector(head, positions=positions).collect(pairs)
        for name in ("mean", "abs_mean", "rms", "frequency"):
            results[f"{name} {positions}"] = getattr(statistics, name)
        for method in ("mean_difference", "gradient_x_activation"):
            results[f"{method} {positions}"] = (
                NeuronAttribution(head, method=method, positions=positions).score(pairs).values
            )
        sample = ActivationCollector(head).sample(pairs, n=8)
        neurons = NeuronSet.from_indices(
            [(0, 3), (1, 5), (2, 7)], shape=tuple(statistics.mean.shape), site="mlp", architecture=head.architecture
        )
        for replacement in (Zero(), Mean(statistics), Resample(sample)):
            with AblationContext(head, neurons, replacement, positions=positions):
                results[f"{replacement.name} {positions}"] = head.score_pairs(pairs).margin
        effects = single_neuron_effects(head, pairs, neurons=neurons, positions=positions)
        results[f"effects {positions}"] = effects.values[neurons.mask]
        results[f"n {positions}"] = torch.tensor([statistics.n_tokens, effects.provenance.n_tokens])
    for site in ("mlp", "attn_head"):
        profile = collect_profiles(head, pairs, sites=(site,), positions=("response",))[site, "response"]
        results[f"profile {site}"] = profile.scores("magnitude").values
        for method in ("integrated_gradients", "direct_effect"):
            options = {"steps": 2} if method == "integrated_gradients" else {}
            results[f"{method} {site}"] = (
                NeuronAttribution(head, method=method, site=site, **options).score(pairs).values
            )
    return results


@pytest.mark.parametrize("family", grid(["gpt2", "llama", "gpt_neox"]))
def test_packing_changes_no_result_over_pairs(checkpoints, few, alone, family):
    head = RewardHead.from_pretrained(checkpoints[family], dtype=torch.float64)
    assert n_packed(head, few) == len(few) - few.n_ties, "a tie is one text"
    packed = numbers(head, few)
    alone()
    assert n_packed(head, few) == 0
    for name, expected in numbers(head, few).items():
        assert torch.allclose(packed[name], expected, **close_to(head)), name
        assert packed[name].dtype == expected.dtype
    # Negative control: the other pairs' numbers are others.
    others = NeuronAttribution(head, method="gradient_x_activation").score(few[:4]).values
    assert not torch.allclose(packed["gradient_x_activation all"], others)


@pytest.mark.parametrize("family", grid(["mistral", "gemma2", "starcoder2"]))
def test_packed_rows_are_no_longer_than_the_attention_window(tmp_path, plain_tokenizer, few, alone, family):
    """A row may not be longer than what attention looks back: the mask would have to know."""
    make_classifier(family, len(plain_tokenizer) + 8, sliding_window=45).save_pretrained(tmp_path)
    plain_tokenizer.save_pretrained(tmp_path)
    head = RewardHead.from_pretrained(tmp_path, dtype=torch.float64)
    assert head.body.pack_up_to == 45
    assert 0 < n_packed(head, few) < len(few)
    packed = head.score_pairs(few).margin
    alone()
    assert torch.allclose(packed, head.score_pairs(few).margin, atol=1e-6, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_packing_changes_results_by_no_more_than_rounding(checkpoints, few, alone, dtype):
    head = RewardHead.from_pretrained(checkpoints["llama"], dtype=dtype)
    assert n_packed(head, few) == len(few) - few.n_ties, "a tie is one text"
    packed = head.score_pairs(few).margin
    alone()
    room = 1e-5 if dtype == torch.float32 else 0.05
    assert torch.allclose(packed, head.score_pairs(few).margin, atol=room, rtol=0)


@pytest.mark.parametrize("family", grid(["gpt2", "llama", "gpt_neox"]))
@pytest.mark.parametrize("dtype", grid([torch.float32, torch.bfloat16]))
def test_a_family_that_runs_wrong_is_not_packed(checkpoints, monkeypatch, family, dtype):
    """The probe sees positions that are ignored, and a mask that is ignored, empty, weak, or makes NaN."""
    from rmtension.bodies import _native_run as plain_run

    right = plain_run.run_base

    def changed(name, change):
        def run(base, batch):
            def call(**arguments):
                if name in arguments:
                    arguments[name] = change(arguments[name])
                return base(**arguments)

            call.parameters = base.parameters
            return right(call, batch)

        return run

    for name, change in [
        ("position_ids", lambda _: None),
        ("attention_mask", lambda _: None),
        ("attention_mask", torch.zeros_like),
        ("attention_mask", lambda mask: (mask != 0).to(mask.dtype) * -1),
        ("attention_mask", lambda mask: mask * torch.nan),
    ]:
        with monkeypatch.context() as patched:
            patched.setattr(plain_run, "run_base", changed(name, change))
            assert RewardHead.from_pretrained(checkpoints[family], dtype=dtype).body.pack_up_to == 0
    assert RewardHead.from_pretrained(checkpoints[family], dtype=dtype).body.pack_up_to == 96


def test_hooks_of_the_user_run_unpacked(checkpoints, few):
    head = RewardHead.from_pretrained(checkpoints["gpt2"])
    shapes = []
    with head.model.hooks(fwd_hooks=[("blocks.0.mlp.hook_post", lambda value, hook: shapes.append(value.shape[0]))]):
        head.score_pairs(few)
    assert sum(shapes) == 2 * len(few) - few.n_ties, "a tie is one text"


@pytest.mark.lens
@pytest.mark.parametrize("family", grid(["gpt2", "llama", "gpt_neox"]))
def test_hooks_of_the_bridge_itself_do_not_count_as_the_users(checkpoints, few, family):
    """A bridge that ran once keeps hooks of its own: pairs are packed as before, until the user hooks it."""
    head = RewardHead.from_pretrained(checkpoints[family])
    before = head.score_pairs(few).margin
    _, cache = head.model.run_with_cache(torch.tensor([[5, 6, 7]], device=head.device))
    assert "blocks.0.mlp.hook_post" in cache
    assert n_packed(head, few) > 0
    assert torch.equal(head.score_pairs(few).margin, before)
    for add in (
        lambda: head.model.add_hook("blocks.0.mlp.hook_post", lambda value, hook: value),
        lambda: head.model.blocks[1].hook_resid_pre.add_hook(lambda value, hook: value),
        lambda: head.model.blocks[0].mlp.register_forward_hook(lambda *_: None),
    ):
        add()
        assert n_packed(head, few) == 0
        head.model.reset_hooks()


def texts(*ids, start=0):
    return tuple(EncodedText(tuple(row), start, 0) for row in ids)


def test_packed_rows_equal_rows_written_by_hand():
    """By hand: [shared, rest, rest], with everything that belongs to each text."""
    (batch,) = pair_batches(
        EncodedPairs(texts([5, 6, 1], [5, 6, 7, 8], start=2), texts([5, 6, 1, 1], [5, 6, 9], start=2), 0, 0),
        tokens_per_batch=100,
        read_at=ReadAt(1),
        device="cpu",
        pack_up_to=50,
    )
    assert batch.indices == (0, 1, 0, 1)
    # The first pair's texts end in pad tokens and are read at 6, which is therefore not shared.
    assert batch.input_ids.tolist() == [[5, 6, 1, 6, 1, 1], [5, 6, 7, 8, 9, 0]]
    assert batch.position_ids[0].tolist() == [0, 1, 2, 1, 2, 3]
    assert batch.position_ids[1, :5].tolist() == [0, 1, 2, 3, 2]
    assert batch.last.tolist() == [1, 3, 3, 4]
    assert batch.mask.int().tolist() == [
        [1, 1, 1, 0, 0, 0],
        [1, 1, 1, 1, 0, 0],
        [1, 0, 0, 1, 1, 1],
        [1, 1, 0, 0, 1, 0],
    ]
    assert batch.response.int().tolist() == [
        [0, 0, 1, 0, 0, 0],
        [0, 0, 1, 1, 0, 0],
        [0, 0, 0, 0, 1, 1],
        [0, 0, 0, 0, 1, 0],
    ]
    assert batch.position_mask("all").int().tolist() == [[1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 0]]
    assert batch.sum_over_texts(batch.mask.float()).tolist() == [[2, 1, 1, 1, 1, 1], [2, 2, 1, 1, 1, 0]]
    values = torch.arange(12.0).reshape(2, 6, 1)
    assert batch.gather_last(values)[:, 0].tolist() == [1, 9, 3, 10]
    assert batch.sum_per_text(batch.mask.float(), values)[:, 0].tolist() == [3, 30, 12, 23]
    sees = (attention_mask(batch, torch.float32)[:, 0] == 0).int()
    assert sees[1].tolist() == [
        [1, 0, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0],
        [1, 1, 1, 0, 0, 0],
        [1, 1, 1, 1, 0, 0],
        [1, 1, 0, 0, 1, 0],
        [0, 0, 0, 0, 0, 1],
    ]
    assert sees[0, 3].tolist() == [1, 0, 0, 1, 0, 0]


def test_a_swapped_pair_makes_the_same_row(checkpoints, few):
    head = RewardHead.from_pretrained(checkpoints["gpt2"])
    few = few[:-1]  # of the last pair both texts are the same
    batches = [batches_of(head, each)[0] for each in (few, few.swapped())]
    assert torch.equal(batches[0].input_ids, batches[1].input_ids)
    half = len(few)
    for name in ("mask", "response", "last"):
        values, turned = (getattr(batch, name) for batch in batches)
        assert torch.equal(values, turned.roll(half, 0))
        assert not torch.equal(values, turned)
    for method in ("mean_difference", "gradient_x_activation"):
        scores, turned = (NeuronAttribution(head, method=method).per_pair(each).values for each in (few, few.swapped()))
        assert torch.equal(scores, -turned), "to the last digit, in float32"


def test_a_text_and_the_same_text_with_token_0_are_two_texts():
    """Padding is 0 as well, and does not make them one."""
    rows = []
    for first, other in ([[5, 6, 7], [5, 6, 7, 0]], [[5, 6, 7, 0], [5, 6, 7]]):
        pairs = EncodedPairs(texts(first), texts(other), 0, 0)
        batches = pair_batches(pairs, tokens_per_batch=99, device="cpu", pack_up_to=50)
        rows += [batch.input_ids.tolist() for batch in batches]
    assert rows[0] == rows[1] == [[5, 6, 7, 7, 0]]


def test_windows_are_read_under_every_name_of_configs():
    """Whatever a config calls them; counts of layers and windows that are switched off are none."""
    make = transformers.AutoConfig.for_model
    assert windows_of(make("mistral", sliding_window=16)) == [16]
    assert windows_of(make("gpt_neo", window_size=32)) == [32]
    assert windows_of(make("qwen2", max_window_layers=28)) == []
    assert windows_of(make("qwen2_moe")) == []
    assert windows_of(make("llama")) == windows_of(make("gpt2")) == []


def test_flash_attention_is_never_packed(checkpoints, monkeypatch):
    """It would read the mask as lengths; on a GPU that ends the process."""
    head = RewardHead.from_pretrained(checkpoints["llama"])
    base, where = head.body.native, (head.body.n_embeddings, 96)
    assert measure_packing(base, *where) == 96
    monkeypatch.setattr(base.config, "_attn_implementation_internal", "flash_attention_2")
    assert base.config._attn_implementation == "flash_attention_2"
    assert measure_packing(base, *where) == 0


def test_pairs_are_packed_only_where_that_saves_tokens():
    long, other = list(range(10, 30)), list(range(40, 60))
    short = [90, 91, 92]
    pairs = EncodedPairs(texts(long, [1, 2, 3], long, long), texts(other, [1, 2, 4], [*long, 5], short), 0, 0)

    def packed(limit):
        batches = pair_batches(pairs, tokens_per_batch=500, device="cpu", pack_up_to=limit)
        return {index: batch.position_ids is not None for batch in batches for index in batch.indices}

    # Nothing in common; enough; enough, but too long a row; nothing in common, but of different lengths.
    assert packed(100) == {0: False, 1: True, 2: True, 3: True}
    assert packed(20) == {0: False, 1: True, 2: False, 3: False}
    assert packed(0) == dict.fromkeys(range(4), False)


def test_batches_keep_the_token_budget_with_padding():
    """Rows times columns, padding counted."""
    pairs = EncodedPairs(texts(*[[1] * 8 + [2]] * 10), texts(*[[1] * 8 + [3]] * 10), 0, 0)
    batches = list(pair_batches(pairs, tokens_per_batch=40, device="cpu", pack_up_to=50))
    assert [batch.input_ids.shape for batch in batches] == [(4, 10), (4, 10), (2, 10)]


def test_packing_changes_no_result_of_experts(tmp_path, plain_tokenizer, few, alone):
    """A mixture of experts picks them token by token: rewards, statistics, scores and ablations of their neurons."""
    make_classifier(EXPERTS[0], len(plain_tokenizer) + 8).save_pretrained(tmp_path)
    plain_tokenizer.save_pretrained(tmp_path)
    head = RewardHead.from_pretrained(tmp_path)
    mask = torch.rand(3, head.n_neurons("expert"), generator=torch.Generator().manual_seed(0)) < 0.3
    ablation = AblationContext(head, NeuronSet(mask, "expert", head.architecture), positions="response")

    def numbers():
        patching = NeuronAttribution(head, "attribution_patching", site="expert", positions="response")
        with ablation:
            ablated = head.score_pairs(few).margin
        statistics = ActivationCollector(head, site="expert").collect(few)
        return [head.score_pairs(few).margin, ablated, patching.score(few).values, statistics.mean]

    packed = numbers()
    alone()
    for value, expected in zip(packed, numbers(), strict=True):
        assert torch.allclose(value.double(), expected.double(), atol=1e-5, rtol=0)
    assert (packed[0] - packed[1]).abs().max() > 1e-3


def test_packed_rows_fit_the_context(tmp_path, plain_tokenizer, few):
    folder = save_classifier(tmp_path, "gpt2", plain_tokenizer, n_positions=50)
    head = RewardHead.from_pretrained(folder)
    assert head.body.pack_up_to == 50
    assert 0 < n_packed(head, few) < len(few)
