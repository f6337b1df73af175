"""Replacements of activations, computed with transformers and plain hooks, one text at a time."""

import torch

from rmtension import ActivationCollector, Mean, OtherResponse, Resample, Scale, Zero
from rmtension.data._length_buckets import text_batches
from rmtension.interventions._donors import draw_donors

NAMES = ("zero", "mean", "resample", "scale", "other_response")
ALPHA = -0.5


def replacement_of(head, site, pairs, name):
    """The library's replacement with this name, made from the pairs."""
    collector = ActivationCollector(head, site=site)
    return {
        "zero": Zero,
        "mean": lambda: Mean(collector.collect(pairs)),
        "resample": lambda: Resample(collector.sample(pairs, n=20, seed=1), seed=5),
        "scale": lambda: Scale(ALPHA),
        "other_response": OtherResponse,
    }[name]()


def sides(reference, pairs):
    """(ids, prompt length) of the chosen and the rejected text of every pair."""
    return [[reference.tokens(pair, side) for side in ("chosen", "rejected")] for pair in pairs]


def targets_of(head, reference, site, pairs, positions, replacement):
    """The replacement [layer, token, channel] for both texts of every pair; one token if all tokens get the same."""
    texts = sides(reference, pairs)
    runs = [[reference.activations(site, ids) for ids, _ in pair] for pair in texts]
    if replacement.name == "zero":
        return [[torch.zeros_like(run[:, :1]) for run in pair] for pair in runs]
    if replacement.name == "mean":
        means = torch.cat([run for pair in runs for run in pair], dim=1).mean(1, keepdim=True)
        return [[means] * 2 for _ in runs]
    if replacement.name == "scale":
        return [[ALPHA * run for run in pair] for pair in runs]
    if replacement.name == "resample":
        donors, encoded = reference_donors(reference, site, pairs, replacement.sample), head.encode(pairs)
        drawn = [
            [donors_of(head, text, replacement) for text in pair]
            for pair in zip(encoded.chosen, encoded.rejected, strict=True)
        ]
        return [[donors[numbers].transpose(0, 1) for numbers in pair] for pair in drawn]
    targets = []
    for pair, both in zip(runs, texts, strict=True):
        means = [
            run[:, reference.selected(run.shape[1], n_prompt, positions)].mean(1, keepdim=True)
            for run, (_, n_prompt) in zip(pair, both, strict=True)
        ]
        targets.append(means[::-1])
    return targets


def reference_donors(reference, site, pairs, sample):
    """The reference's activations at the tokens of the sample, [donor, layer, channel]."""
    everything = torch.cat(
        [reference.activations(site, ids) for pair in sides(reference, pairs) for ids, _ in pair], dim=1
    )
    donors = []
    for donor in sample.values:
        distance = (everything - donor[:, None]).abs().amax(dim=(0, 2))
        assert float(distance.min()) < 1e-9, "a donor has to be a token of the reference pairs"
        donors.append(everything[:, int(distance.argmin())])
    return torch.stack(donors)


def donors_of(head, text, replacement):
    """The donor of every token of one encoded text, drawn for this text alone."""
    batches = text_batches([text], tokens_per_batch=4096, read_at=head.read_at, device="cpu")
    return draw_donors(next(iter(batches)), replacement.sample.keys, replacement.seed)[0]
