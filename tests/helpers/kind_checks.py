"""Compares a replica of a kind with its reference: reward, gradient, ablation, permanent ablation and reload."""

import tempfile
import warnings
from pathlib import Path

import torch
from replica_reference import Reference
from replicas import Replica, make_pairs

from rmtension import AblationContext, NeuronAttribution, NeuronSet, RewardHead
from rmtension.errors import RMTensionError, RMTensionWarning

COLUMNS = ("reward", "all outputs", "gradient", "ablation", "permanent ablation", "saved and reloaded")


def measure(replica: Replica, folder: Path, dtype: torch.dtype) -> dict[str, float | str]:
    """The largest |difference| per column, or the reason of a refusal."""
    replica.make(folder)
    reference = Reference(replica, folder, dtype)
    head = RewardHead.from_pretrained(folder, dtype=dtype, **replica.open_options(folder))
    pairs = make_pairs(replica)
    texts = [(pair.prompt, getattr(pair, side)) for side in ("chosen", "rejected") for pair in pairs]
    pairs = pairs.as_chat() if replica.template else pairs
    expected = reference.rewards(texts)
    found: dict[str, float | str] = {"reward": _off(_rewards(head, pairs), expected)}
    with torch.no_grad():
        outputs = torch.stack([reference.outputs(parts) for parts in texts])
    scored = head.score_outputs(pairs)
    found["all outputs"] = _off(torch.stack([torch.cat([r.chosen, r.rejected]) for r in scored.values()], 1), outputs)
    values = NeuronAttribution(head, "gradient_x_activation", site=replica.site).score(pairs).values
    by_text = torch.stack([reference.contributions(parts) for parts in texts])
    found["gradient"] = _off(values, (by_text[: len(pairs)] - by_text[len(pairs) :]).mean(0))
    mask = torch.rand(values.shape, generator=torch.Generator().manual_seed(1)) < 0.2
    neurons = NeuronSet(mask, replica.site, head.architecture)
    without = reference.rewards_without(texts, mask)
    assert _off(without, expected) > 1e-2, "the ablation changes rewards"
    with AblationContext(head, neurons):
        found["ablation"] = _off(_rewards(head, pairs), without)
    ablated = head.with_ablation(neurons)
    found["permanent ablation"] = _off(_rewards(ablated, pairs), without)
    saved = folder.parent / f"{folder.name}-saved"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RMTensionWarning)
        try:
            ablated.save_pretrained(saved)
        except RMTensionError as error:
            return found | {"saved and reloaded": str(error).partition(", and this head")[0]}
    options = replica.open_options(folder) if replica.reopened is None else replica.reopened
    again = RewardHead.from_pretrained(saved, dtype=dtype, **options)
    differences = [_off(_rewards(again, pairs), without)]
    if not replica.as_classifier:
        # Its own loader, on the new files: the names of the tensors and the config are those of the original.
        differences.append(_off(Reference(replica, saved, dtype, head_from=folder).rewards(texts), without))
    return found | {"saved and reloaded": max(differences)}


def measure_in(replica: Replica, dtype: torch.dtype) -> dict[str, float | str]:
    """`measure` in a temporary folder."""
    with tempfile.TemporaryDirectory() as folder:
        return measure(replica, Path(folder) / "replica", dtype)


def _rewards(head: RewardHead, pairs) -> torch.Tensor:
    scored = head.score_pairs(pairs)
    return torch.cat([scored.chosen, scored.rejected])


def _off(actual: torch.Tensor, expected: torch.Tensor) -> float:
    assert actual.shape == expected.shape, (actual.shape, expected.shape)
    return float((actual.double() - expected.double()).abs().max())
