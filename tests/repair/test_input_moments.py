"""Second moments of inputs against plain transformers, one text at a time."""

import pytest
import torch
from tiny_models import batches_of, grid, make_pairs
from transformers import AutoModelForSequenceClassification

from rmtension import RewardHead
from rmtension.errors import ModelError
from rmtension.repair._input_moments import input_moments, linear_maps

PAIRS = make_pairs(6)


def by_hand(folder, head, pairs, names, selected):
    """Hooks of PyTorch on transformers' classifier, in float64; each text runs alone, without padding."""
    model = AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float64).eval()
    sums, n_tokens = dict.fromkeys(names, 0.0), 0

    def add(name, first):
        def hook(_module, inputs):
            x = inputs[0].reshape(-1, inputs[0].shape[-1])[first:]
            sums[name] = sums[name] + x.T @ x

        return hook

    encoded = head.encode(pairs)
    for text in (*encoded.chosen, *encoded.rejected):
        first = {"all": 0, "response": text.response_start, "last": len(text) - 1}[selected]
        n_tokens += len(text) - first
        handles = [model.base_model.get_submodule(name).register_forward_pre_hook(add(name, first)) for name in names]
        with torch.no_grad():
            model(torch.tensor([text.ids]))
        for handle in handles:
            handle.remove()
    return {name: total / n_tokens for name, total in sums.items()}


def close(found, expected, tolerance=1e-9):
    """Batches and packing change the order of sums in float64, which is less than 1e-9 of a moment's largest entry."""
    return all(
        torch.allclose(found[name], expected[name], rtol=0, atol=tolerance * float(expected[name].abs().max()))
        for name in found
    )


@pytest.mark.parametrize(
    ("family", "positions"),
    grid(
        [("gpt2", "all"), ("llama", "response"), ("gpt2", "last"), ("llama", "all")],
        keep=[("gpt2", "all"), ("llama", "response")],
        unpack=True,
    ),
)
def test_moments_are_those_of_plain_transformers(family, positions, checkpoints):
    head = RewardHead.from_pretrained(checkpoints[family], dtype=torch.float64)
    names = list(linear_maps(head.checkpoint.base))
    assert len(names) == {"gpt2": 3 * 4, "llama": 3 * 7}[family]
    found = input_moments(head, PAIRS, names, positions=positions, progress=False)
    assert list(found) == names
    # Llama's norms compute in float32 in every model.
    tolerance = 1e-6 if family == "llama" else 1e-9
    assert close(found, by_hand(checkpoints[family], head, PAIRS, names, positions), tolerance)
    # Negative control: other tokens have other moments.
    other = {"all": "response", "response": "all", "last": "all"}[positions]
    assert not close(found, by_hand(checkpoints[family], head, PAIRS, names, other), tolerance=1e-2)


def test_shared_prompts_count_for_both_texts_and_padding_for_none(organism, pairs):
    """An organism's prompts are shared by both texts of a pair, which are packed into one row."""
    head = organism.head(dtype=torch.float64)
    few = pairs.fit["helpful"][:4]
    assert any(batch.position_ids is not None for batch in batches_of(head, few)), "rows are packed"
    names = [f"h.{layer}.mlp.{name}" for layer in range(4) for name in ("c_fc", "c_proj")]
    found = input_moments(head, few, names, progress=False)
    assert close(found, by_hand(organism.folder, head, few, names, "all"))


def test_columns_are_a_part_of_the_whole(head):
    names = ["h.0.mlp.c_proj", "h.1.mlp.c_fc"]
    columns = torch.tensor([5, 0, 17])
    whole = input_moments(head, PAIRS, names, progress=False)
    part = input_moments(head, PAIRS, names, columns={names[0]: columns}, progress=False)
    assert torch.allclose(part[names[0]], whole[names[0]][columns][:, columns], rtol=1e-12, atol=0)
    assert torch.equal(part[names[1]], whole[names[1]])


def test_what_is_no_linear_map_is_refused(head, checkpoints):
    with pytest.raises(ModelError, match=r"expected Linear or Conv1D modules, got h\.0\.mlp \(GPT2MLP\)"):
        input_moments(head, PAIRS, ["h.0.mlp"])
    handle = head.model.register_forward_hook(lambda *_: None)
    try:
        with pytest.raises(ModelError, match="transformers' own modules, which do not run in this model"):
            input_moments(head, PAIRS, ["h.0.mlp.c_fc"])
    finally:
        handle.remove()
    converted = RewardHead.from_pretrained(checkpoints["gpt2"], process_weights=True)
    with pytest.raises(ModelError, match="transformers' own modules, which do not run in this model"):
        input_moments(converted, PAIRS, ["h.0.mlp.c_fc"])


def test_maps_that_do_not_read_every_token_once_are_refused(organism, pairs):
    head = organism.head()
    native = head.body.native
    native.unused = torch.nn.Linear(3, 3)
    with pytest.raises(ModelError, match=r"\['unused'\] did not run"):
        input_moments(head, pairs.fit["helpful"][:2], ["h.0.mlp.c_fc", "unused"])
    native.h[1].mlp.c_fc = native.h[0].mlp.c_fc
    with pytest.raises(ModelError, match=r"h\.0\.mlp\.c_fc does not read every token exactly once"):
        input_moments(head, pairs.fit["helpful"][:2], ["h.0.mlp.c_fc"])
