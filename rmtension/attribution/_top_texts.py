"""The top-activating texts of single neurons: largest activations, their histograms, and the texts with activations."""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from rmtension._sites import neuron_activations
from rmtension.attribution._dashboard_data import ActiveText, NeuronExample
from rmtension.data._encoding import EncodedText
from rmtension.data._pairs import PreferencePairs
from rmtension.data._tokens import TokenBatch
from rmtension.models._reward_model import RewardModel
from rmtension.neurons._neuron_scores import block_of
from rmtension.neurons._neuron_set import NeuronSet
from rmtension.passes._pair_statistic import PairStatistic
from rmtension.passes._pass_record import PassRecord
from rmtension.store._provenance import digest_of

# How many tokens of a text an example shows, and how many of them come before the largest activation.
_SHOWN, _BEFORE = 160, 120
_BINS = 24


@torch.no_grad()
def _activations(head: RewardModel, batch: TokenBatch, neurons: NeuronSet) -> Float[Tensor, "row token wanted"]:
    """The activations of the set's neurons, in its order."""
    wanted = [columns.nonzero()[:, 0].tolist() for columns in neurons.mask]
    layers: dict[int, Tensor] = {}

    def visit(site: str, layer: int, channels: Tensor) -> None:
        if wanted[layer]:
            values = neuron_activations(channels, site, head.n_neurons(site))[..., wanted[layer]]
            layers[layer] = values.to(head.device, head.reward_dtype)

    head.observe(batch, [neurons.site], visit)
    return torch.cat([layers[layer] for layer in sorted(layers)], dim=2)


class LargestActivations(PairStatistic[tuple[Tensor, int, list[int]]]):
    """Each neuron's activation of largest magnitude in both texts of every pair.

    Computes these activations, [pair, 2, neuron], the number of blocks of prompts, and the indices of the pairs: those
    that were not skipped because they produce NaN or infinity.
    """

    name = "activations"

    def __init__(self, head: RewardModel, n_pairs: int, neurons: NeuronSet, positions: str) -> None:
        self._head = head
        self._neurons = neurons
        self._positions = positions
        self._largest = torch.zeros(n_pairs, 2, len(neurons), dtype=head.reward_dtype)
        self._keys = torch.zeros(n_pairs, dtype=torch.long)

    @property
    def settings(self) -> Mapping[str, Any]:
        """The set and the positions."""
        neurons = self._neurons
        return {"site": neurons.site, "neurons": digest_of(neurons.mask), "positions": self._positions}

    @property
    def state(self) -> Mapping[str, Tensor]:
        """The largest activations and the keys of the prompts, per pair."""
        return {"largest": self._largest, "keys": self._keys}

    def observe(self, batch: TokenBatch) -> list[Tensor]:
        """The largest activations of the batch's texts, [text, neuron]."""
        of_texts = _activations(self._head, batch, self._neurons)[batch.rows]
        select = batch.select(self._positions)[..., None]
        peak = of_texts.abs().masked_fill(~select, -1).argmax(dim=1, keepdim=True)
        return [of_texts.gather(1, peak)[:, 0]]

    def update(self, batch: TokenBatch, observed: list[Tensor]) -> None:
        """Store the activations at the indices of their pairs."""
        numbers = list(batch.indices[: batch.n_pairs])
        self._largest[numbers] = observed[0].cpu().view(2, batch.n_pairs, -1).transpose(0, 1)
        self._keys[numbers] = batch.keys[: batch.n_pairs].cpu()

    def compute(self, record: PassRecord) -> tuple[Tensor, int, list[int]]:
        """The largest activations of the pairs that were kept, the number of blocks, and the pairs' indices."""
        record.require_pairs()
        kept = record.kept(len(self._largest))
        return self._largest[kept], len(set(block_of(self._keys[kept]).tolist())), kept


def count_largest(neurons: NeuronSet, group: str, largest: Float[Tensor, "pair 2 wanted"]) -> pd.DataFrame:
    """Histograms of each neuron's largest activation per text, by side."""
    parts = []
    for (layer, neuron), column in zip(neurons, largest.double().unbind(2), strict=True):
        edges = np.histogram_bin_edges(column.numpy(), bins=_BINS)
        for side, values in zip(("chosen", "rejected"), column.T, strict=True):
            n = np.histogram(values.numpy(), bins=edges)[0]
            keys = {"layer": layer, "neuron": neuron, "group": group, "side": side}
            parts.append(pd.DataFrame({**keys, "low": edges[:-1], "high": edges[1:], "texts": n}))
    return pd.concat(parts, ignore_index=True)


def find_examples(
    head: RewardModel,
    pairs: PreferencePairs,
    neurons: NeuronSet,
    group: str,
    largest: Float[Tensor, "pair 2 wanted"],
    positions: str,
    n: int,
) -> list[NeuronExample]:
    """The `n` pairs with the largest activation of every neuron; each pair runs once, for all neurons that show it."""
    order = largest.abs().amax(dim=1).argsort(dim=0, descending=True, stable=True)[:n]
    shown: dict[int, list[int]] = {}
    for column in range(len(neurons)):
        for index in order[:, column].tolist():
            shown.setdefault(index, []).append(column)
    indices = list(neurons)
    examples: dict[tuple[int, int], NeuronExample] = {}
    for index, columns in shown.items():
        both = active_texts(head, pairs[index : index + 1], neurons, positions, columns)
        for column, (chosen, rejected) in zip(columns, both, strict=True):
            layer, neuron = indices[column]
            examples[column, index] = NeuronExample(layer, neuron, group, pairs[index].id, chosen, rejected)
    return [examples[column, index] for column in range(len(neurons)) for index in order[:, column].tolist()]


def active_texts(
    head: RewardModel, pair: PreferencePairs, neurons: NeuronSet, positions: str, columns: Sequence[int]
) -> list[tuple[ActiveText, ActiveText]]:
    """The chosen and the rejected text of one pair with the activations of some neurons, by their columns in the set.

    Cost: one forward pass over the pair.
    """
    encoded = head.encode(pair)
    texts = [*encoded.chosen, *encoded.rejected]
    batch = TokenBatch.from_texts(texts, (0, 0), read_at=head.read_at, device=head.device)
    activations = _activations(head, batch, neurons).cpu()
    select = batch.select(positions).cpu()
    pieces = [token_pieces(head.tokenizer, text.ids) for text in texts]
    special = set(getattr(head.tokenizer, "all_special_ids", ()))
    found = []
    for column in columns:
        chosen, rejected = (
            _active_text(text, piece, values[: len(text), column], chosen_tokens[: len(text)], special)
            for text, piece, values, chosen_tokens in zip(texts, pieces, activations, select, strict=True)
        )
        found.append((chosen, rejected))
    return found


def token_pieces(tokenizer: Any, ids: Sequence[int]) -> list[str]:
    """The piece of text that each token adds; together they are the decoded text.

    A character that takes several tokens belongs to the last of them.
    """
    decode = partial(tokenizer.decode, clean_up_tokenization_spaces=False)
    pieces, done = [], ""
    for end in range(1, len(ids) + 1):
        text = decode(list(ids[:end]))
        if text.endswith("\N{REPLACEMENT CHARACTER}") and end < len(ids):
            pieces.append("")
            continue
        pieces.append(text[len(done) :])
        done = text
    return pieces


def _active_text(
    text: EncodedText,
    pieces: list[str],
    values: Float[Tensor, "token"],
    selected: Bool[Tensor, "token"],
    special: set[int],
) -> ActiveText:
    """The part of a text around its largest activation at a selected token."""
    peak = int(values.abs().masked_fill(~selected, -1).argmax())
    first = max(0, min(peak - _BEFORE, len(text) - _SHOWN))
    shown = slice(first, first + _SHOWN)
    rounded = tuple(float(f"{value:.4g}") for value in values[shown].tolist())
    marked = tuple(number for number, token in enumerate(text.ids[shown]) if token in special)
    return ActiveText(tuple(pieces[shown]), rounded, marked, first, peak - first, text.response_start, len(text))
