"""The donors of resample ablation: which token of another prompt each token takes its activations from."""

import torch
from jaxtyping import Int
from torch import Tensor

from rmtension.data._tokens import TokenBatch
from rmtension.errors import DataError


def draw_donors(batch: TokenBatch, donor_keys: Int[Tensor, "donor"], seed: int) -> Int[Tensor, "row token"]:
    """Draw a donor for every token, from another prompt than its own.

    The draw is a hash of (seed, prompt, position in the text), not a random stream, so that it does not depend on the
    batch.
    """
    donors = torch.empty_like(batch.input_ids)
    text_positions = torch.arange(batch.input_ids.shape[1], device=donors.device).expand_as(donors)
    if batch.position_ids is not None:
        text_positions = batch.position_ids
    start = _mix(torch.tensor(seed))
    for row, key in enumerate(batch.row_keys.tolist()):
        others = (donor_keys != key).nonzero()[:, 0].to(donors.device)
        if not len(others):
            raise DataError(
                "replacement: all donors of Resample come from the prompt that is scored, and a text needs donors from "
                "other prompts. Draw the sample from more prompts."
            )
        positions = text_positions[row]
        donors[row] = others[_mix(_mix(positions) ^ _mix(start ^ key).to(positions)) % len(others)]
    return donors


def _mix(numbers: Int[Tensor, "*shape"]) -> Int[Tensor, "*shape"]:
    """Hash integers to [0, 2^31) with the 32-bit finaliser of MurmurHash3."""
    low = 0xFFFFFFFF
    mixed = (numbers ^ (numbers >> 32)) & low
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
        mixed = ((mixed ^ (mixed >> shift)) * factor) & low
    return (mixed ^ (mixed >> 16)) >> 1
