"""Which token of another prompt each token takes its activations from, in resample ablation."""

import torch
from jaxtyping import Int
from torch import Tensor

from rmtension.data._tokens import TokenBatch
from rmtension.errors import DataError


def draw_donors(batch: TokenBatch, donor_keys: Int[Tensor, "donor"], seed: int) -> Int[Tensor, "row token"]:
    """Which donor every token takes its activations from: one with another prompt than its own.

    The draw is a hash of (seed, prompt, place in the text), not a random stream, so that it does not depend on the
    batch.
    """
    donors = torch.empty_like(batch.input_ids)
    places = torch.arange(batch.input_ids.shape[1], device=donors.device).expand_as(donors)
    if batch.position_ids is not None:
        places = batch.position_ids
    start = _mix(torch.tensor(seed))
    for row, key in enumerate(batch.row_keys.tolist()):
        others = (donor_keys != key).nonzero()[:, 0].to(donors.device)
        if not len(others):
            raise DataError(
                "replacement: all donors of Resample come from the prompt that is scored. Draw the sample from more "
                "prompts."
            )
        donors[row] = others[_mix(_mix(places[row]) ^ _mix(start ^ key).to(places)) % len(others)]
    return donors


def _mix(numbers: Int[Tensor, "*shape"]) -> Int[Tensor, "*shape"]:
    """Spread integers over [0, 2^31): the finaliser of MurmurHash3, 32 bits wide."""
    low = 0xFFFFFFFF
    mixed = (numbers ^ (numbers >> 32)) & low
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
        mixed = ((mixed ^ (mixed >> shift)) * factor) & low
    return (mixed ^ (mixed >> 16)) >> 1
