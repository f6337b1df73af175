"""The replacement of every token's activation, computed with transformers and plain hooks, one text at a time."""

import torch

from rmtension import ActivationCollector, Mean, OtherResponse, Resample, Scale, Zero
from rmtension.data._tokens import text_batches
from rmtension.interventions._donors import draw_donors

NAMES = ("zero", "mean", "resample", "scale", "other_response")
ALPHA = -0.5


def replacement_of(head, site, pairs, name):
    """The library's replacement of that name, made from the pairs."""
    collector = ActivationCollector(head, site=site)
    return {
        "zero": Zero,
        "mean": lambda: Mean(collector.collect(pairs)),
        "resample": lambda: Resample(collector.sample(pairs, n=20, seed=1), seed=5),
        "scale": lambda: Scale(ALPHA),
        "other_response": OtherResponse,
    }[name]()


def sides(reference, pairs):
    """(ids, prompt length) of chosen and rejected, pair by pair."""
    return [[reference.tokens(pair, side) for side in ("chosen", "rejected")] for pair in pairs]


def targets_of(head, reference, site, pairs, positions, replacement):
    """[layer, token, channel] for chosen and rejected, pair by pair; one token where it is the same for all."""
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
        return [[donors[one].transpose(0, 1) for one in pair] for pair in drawn]
    found = []
    for pair, both in zip(runs, texts, strict=True):
        means = [
            run[:, reference.selected(run.shape[1], n_prompt, positions)].mean(1, keepdim=True)
            for run, (_, n_prompt) in zip(pair, both, strict=True)
        ]
        found.append(means[::-1])
    return found


def reference_donors(reference, site, pairs, sample):
    """The sample's activations found again among the reference's own, token by token: [donor, layer, channel]."""
    everything = torch.cat(
        [reference.activations(site, ids) for pair in sides(reference, pairs) for ids, _ in pair], dim=1
    )
    found = []
    for donor in sample.values:
        distance = (everything - donor[:, None]).abs().amax(dim=(0, 2))
        assert float(distance.min()) < 1e-9, "a donor is no token of the reference pairs"
        found.append(everything[:, int(distance.argmin())])
    return torch.stack(found)


def donors_of(head, text, replacement):
    """Donor of every token of one encoded text, drawn for that text alone."""
    batches = text_batches([text], tokens_per_batch=4096, pad_token_id=head.pad_token_id, device="cpu")
    return draw_donors(next(iter(batches)), replacement.sample.keys, replacement.seed)[0]
