"""Collect activation profiles at several sites and positions in one pass over preference pairs."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from rmtension._arguments import require_arguments
from rmtension._sites import check_positions, find_site, neuron_activations
from rmtension.data._pair import PreferencePair
from rmtension.data._tokens import TokenBatch
from rmtension.errors import DataError, ProvenanceError
from rmtension.models._reward_model import RewardModel
from rmtension.neurons._neuron_scores import N_BLOCKS, block_of
from rmtension.passes._activation_profile import STATISTICS, ActivationProfile
from rmtension.passes._pair_pass import run_pass
from rmtension.passes._pair_statistic import PairStatistic
from rmtension.passes._pass_record import PassRecord


def collect_profiles(
    head: RewardModel,
    pairs: Iterable[PreferencePair],
    *,
    sites: Sequence[str] = ("mlp",),
    positions: Sequence[str] = ("all",),
    base: RewardModel | None = None,
    pool_tokens: bool = False,
    work: str | Path | None = None,
    progress: bool | None = None,
) -> dict[tuple[str, str], ActivationProfile]:
    """Activation profiles at several sites and positions, as a dict by (site, positions), from one pass over `pairs`.

    Every text has weight 1, whatever its length; with `pool_tokens` every token has. With a `base` model of the same
    architecture, which runs on the same tokens, the change of every neuron is collected too. `work` and `progress` are
    those of `run_pass`.

    Cost: one pass over the pairs, and one of the base model. Memory: the activations of one batch (of all layers with a
    base model), 5 sums per neuron and text of the batch, and 5 x 2 x 32 sums per neuron for any number of pairs.

    Examples:
        >>> profiles = collect_profiles(head, pairs["helpful"], positions=("response", "last"))
        >>> sorted(profiles)
        [('mlp', 'last'), ('mlp', 'response')]
        >>> profiles["mlp", "response"].scores("frequency")
        NeuronScores(frequency: 2 x 24 mlp neurons, from 0 to 1; 24 pairs, response tokens, gpt2-2x24-heads2x12-d24)
    """
    require_arguments("collect_profiles(head, pairs)", head=(head, RewardModel), pairs=(pairs, Iterable))
    for selected in positions:
        check_positions(selected)
    keys: list[tuple[str, str]] = [
        (find_site(site).name, selected) for site in dict.fromkeys(sites) for selected in dict.fromkeys(positions)
    ]
    if not keys:
        raise DataError(f"sites, positions: expected at least one of each, got {list(sites)} and {list(positions)}.")
    if base is not None and base.architecture != head.architecture:
        raise ProvenanceError(
            f"base: expected a model of {head.architecture}, got {base.architecture}. Pass the model that head was "
            "trained from: the change is a difference between the same neuron of both."
        )
    return run_pass(head, pairs, _ProfileSums(head, keys, base, pool_tokens), work=work, progress=progress)


_Key = tuple[str, str]  # site and positions


class _ProfileSums(PairStatistic[dict[_Key, ActivationProfile]]):
    """The sums of the profiles at the sites and positions in `keys`."""

    name = "profile"
    layer_dim = 2

    def __init__(self, head: RewardModel, keys: Sequence[_Key], base: RewardModel | None, pool_tokens: bool) -> None:
        self._head = head
        self._keys = keys
        self._base = base
        self._pool_tokens = pool_tokens
        self._sums = {
            (site, positions): torch.zeros(
                len(STATISTICS), 2, N_BLOCKS, head.n_layers, head.n_neurons(site), dtype=torch.float64
            )
            for site, positions in keys
        }
        self._weights = {key: torch.zeros(2, N_BLOCKS, dtype=torch.float64) for key in keys}
        both_share = base is None or base.body.pack_up_to >= head.body.pack_up_to
        self.sharing = "prompt" if both_share else "none"
        self.keeps_layers = base is not None

    @property
    def settings(self) -> Mapping[str, Any]:
        return {
            "sites and positions": self._keys,
            "base": None if self._base is None else self._base.fingerprint,
            "pool_tokens": self._pool_tokens,
        }

    @property
    def state(self) -> Mapping[str, Tensor]:
        return {
            f"{site}/{positions}/{name}": tensors[site, positions]
            for site, positions in self._keys
            for name, tensors in (("sums", self._sums), ("weights", self._weights))
        }

    def observe(self, batch: TokenBatch) -> list[Tensor]:
        """For each key, the sums over the tokens of every text, [statistic, text, layer, neuron]."""
        head = self._head
        sites = list(dict.fromkeys(site for site, _ in self._keys))
        before = {} if self._base is None else _activations(self._base, batch, sites)
        token_weights, sums = {}, {}
        for site, positions in self._keys:
            select = batch.select(positions)
            lengths = 1 if self._pool_tokens else select.sum(dim=1)[:, None]
            token_weights[site, positions] = select.double() / lengths
            shape = (len(STATISTICS), len(select), head.n_layers, head.n_neurons(site))
            sums[site, positions] = torch.zeros(shape, dtype=head.reward_dtype)

        def sum_layer(site: str, layer: int, activation: Tensor) -> None:
            for number, values in enumerate(_statistics(head, site, activation, before.get((site, layer)))):
                for key, weights in token_weights.items():
                    if key[0] == site:
                        sums[key][number, :, layer] = batch.sum_per_text(weights.to(values), values).cpu()

        head.observe(batch, sites, sum_layer)
        return list(sums.values())

    def update(self, batch: TokenBatch, observed: list[Tensor]) -> None:
        # Sums go to row side * N_BLOCKS + block: the first half of a batch are chosen responses.
        cells = torch.arange(len(batch.indices)) // batch.n_pairs * N_BLOCKS + block_of(batch.keys.cpu())
        for key, of_texts in zip(self._keys, observed, strict=True):
            lengths = batch.select(key[1]).sum(dim=1).cpu().double()
            text_weights = lengths if self._pool_tokens else torch.ones_like(lengths)
            self._weights[key].view(-1).index_add_(0, cells, text_weights)
            self._sums[key].flatten(1, 2).index_add_(1, cells, of_texts.double())

    def compute(self, record: PassRecord) -> dict[_Key, ActivationProfile]:
        record.require_pairs()
        base = "" if self._base is None else self._base.fingerprint
        profiles = {}
        for site, positions in self._keys:
            provenance = record.provenance(self._head, site=site, positions=positions, method="profile")
            provenance = replace(provenance, pool_tokens=self._pool_tokens)
            sums, weights = self._sums[site, positions], self._weights[site, positions]
            profiles[site, positions] = ActivationProfile(sums, weights, base, provenance)
        return profiles


def _statistics(
    head: RewardModel,
    site: str,
    activation: Float[Tensor, "row token channel"],
    before: Float[Tensor, "row token channel"] | None,
) -> Iterator[Float[Tensor, "row token neuron"]]:
    """The value of each of `STATISTICS` at every token of one layer; `before` is the base model's activation."""
    channels = activation.to(head.reward_dtype)
    values = neuron_activations(channels, site, head.n_neurons(site))
    yield from (values, values.abs(), values.square(), (values > 0).to(values))
    if before is not None:
        yield neuron_activations(channels - before.to(channels), site, head.n_neurons(site)).square()


def _activations(
    head: RewardModel, batch: TokenBatch, sites: Sequence[str]
) -> dict[tuple[str, int], Float[Tensor, "row token _"]]:
    """The activations of all layers at some sites, by (site, layer), from one forward pass."""
    activations: dict[tuple[str, int], Tensor] = {}

    def keep(site: str, layer: int, activation: Tensor) -> None:
        activations[site, layer] = activation

    head.observe(batch, sites, keep)
    return activations
