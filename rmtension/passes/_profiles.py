"""Activation profiles: what every neuron does on chosen and on rejected responses, and the scores of all methods."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from math import log
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from rmtension._arguments import require_arguments, require_choice
from rmtension._sites import check_positions, find_site, neuron_activations
from rmtension.data._pair import PreferencePair
from rmtension.data._tokens import TokenBatch
from rmtension.errors import DataError, OptionError, ProvenanceError
from rmtension.models._reward_model import RewardModel
from rmtension.neurons._neuron_scores import N_BLOCKS, NeuronScores, block_of, jackknife_stderr
from rmtension.passes._pair_pass import run_pass
from rmtension.passes._pair_statistic import PairStatistic
from rmtension.passes._pass_record import PassRecord
from rmtension.store._provenance import METHOD_FIELDS, Provenance
from rmtension.store._storage import read_result, write_result

_STATISTICS = ("value", "absolute", "square", "positive", "change")


@dataclass(frozen=True, kw_only=True)
class ActivationScore:
    """How an activation score follows from a statistic.

    - `statistic`: the statistic, one of those that a profile sums; `is_root`: the score is the root of its mean.
    - `contrasts`: the score is chosen minus rejected, instead of the mean of both.
    - `sign`: see `Provenance.sign`.
    """

    statistic: str
    is_root: bool
    contrasts: bool
    sign: int | None


def _of_both_sides(statistic: str, *, is_root: bool = False) -> ActivationScore:
    return ActivationScore(statistic=statistic, is_root=is_root, contrasts=False, sign=None)


SCORES = {
    "magnitude": _of_both_sides("value"),
    "abs_mean": _of_both_sides("absolute"),
    "rms": _of_both_sides("square", is_root=True),
    "frequency": _of_both_sides("positive"),
    "change": _of_both_sides("change", is_root=True),
    "mean_difference": ActivationScore(statistic="value", is_root=False, contrasts=True, sign=1),
}


@dataclass(frozen=True, eq=False)
class ActivationProfile:
    """Activation statistics of every neuron on the chosen and on the rejected texts, summed per block of prompts.

    `collect_profiles` makes profiles, and `scores` turns one into the scores of any activation method without another
    pass.

    `sums[s, side, b]` is the sum, over the texts of a side (0 chosen, 1 rejected) in block b, of a text's mean of a,
    |a|, a^2, [a > 0] and (a - a_base)^2; `weights[side, b]` is the number of texts. With `pool_tokens` both sum over
    tokens instead. The activation of an attention head is the norm of its columns; its change is the norm of their
    difference. `base` is the fingerprint of the base model that the change is measured from, or empty.

    Examples:
        >>> profile = collect_profiles(head, pairs["helpful"], positions=["response"])["mlp", "response"]
        >>> profile.sums.shape, int(profile.weights.sum())  # 24 pairs, two texts each
        (torch.Size([5, 2, 32, 2, 24]), 48)
        >>> profile.scores("mean_difference")
        NeuronScores(mean_difference: 2 x 24 mlp neurons, from ... to ...; 24 pairs, response tokens, ...)
        >>> profile.save("profile.safetensors")
        >>> ActivationProfile.load("profile.safetensors").sums.equal(profile.sums)
        True
    """

    sums: Float[Tensor, "statistic 2 block layer neuron"]
    weights: Float[Tensor, "2 block"]
    base: str
    provenance: Provenance

    def __add__(self, other: "ActivationProfile") -> "ActivationProfile":
        """The profile of both sets of pairs, for example of both objectives."""
        names = ("architecture", "model", "site", "positions", *METHOD_FIELDS, "dtype")
        self.provenance.require_same(other.provenance, names, what="ActivationProfile")
        if self.base != other.base:
            raise ProvenanceError(
                f"ActivationProfile: expected two profiles with the same base model, got {self.base!r} and "
                f"{other.base!r}. Collect both with the same base=..."
            )
        first, second = self.provenance, other.provenance
        provenance = replace(
            first,
            data=f"{first.data}+{second.data}",
            n_pairs=first.n_pairs + second.n_pairs,
            n_tokens=first.n_tokens + second.n_tokens,
        )
        return ActivationProfile(self.sums + other.sums, self.weights + other.weights, self.base, provenance)

    def scores(self, method: str) -> NeuronScores:
        """The scores of every neuron by an activation method. Cost: no model pass.

        - "magnitude": mean of a; its sign is that of the activation.
        - "abs_mean": mean of |a|.
        - "rms": root of the mean of a^2.
        - "frequency": share of tokens with a > 0.
        - "change": root of the mean of (a - a_base)^2 (arXiv 2606.13209; analysis 4 in docs/paper.md).
        - "mean_difference": mean of a on the chosen texts minus mean of a on the rejected texts, as in
          `NeuronAttribution`.

        All but the last are computed on each side and averaged; they have no direction (`provenance.sign` is None).
        Standard errors are a jackknife over blocks of prompts. Raises `OptionError` for an unknown method, and for
        "change" in a profile without a base model.
        """
        require_choice("method", method, SCORES)
        definition = SCORES[method]
        if definition.statistic == "change" and not self.base:
            raise OptionError(f"method: {method!r} needs a base model. Collect the profile with base=...")
        row = _STATISTICS.index(definition.statistic)

        def score(sides: Float[Tensor, "*part 2 layer neuron"]) -> Float[Tensor, "*part layer neuron"]:
            sides = sides.sqrt() if definition.is_root else sides
            if definition.contrasts:
                return sides[..., 0, :, :] - sides[..., 1, :, :]
            return sides.mean(dim=-3)

        whole, without = self._means(row)
        without_block = score(without)
        base = self.base if definition.statistic == "change" else None
        provenance = replace(self.provenance, method=method, base=base, sign=definition.sign)
        return NeuronScores(score(whole), jackknife_stderr(without_block), provenance, without_block)

    def _means(self, row: int) -> tuple[Float[Tensor, "2 layer neuron"], Float[Tensor, "block 2 layer neuron"]]:
        """The mean of a statistic on each side, over all blocks, and leaving out each block."""
        sums, weights = self.sums[row], self.weights
        whole = sums.sum(1) / weights.sum(1)[:, None, None]
        rest = (weights.sum(1, keepdim=True) - weights)[:, :, None, None]
        without = (sums.sum(1, keepdim=True) - sums) / rest
        return whole, without.transpose(0, 1)

    def save(self, path: str | Path) -> None:
        """Write sums, weights and provenance to one safetensors file."""
        values = {"provenance": self.provenance.to_dict(), "base": self.base}
        write_result(path, "ActivationProfile", {"sums": self.sums, "weights": self.weights}, values)

    @classmethod
    def load(cls, path: str | Path) -> "ActivationProfile":
        """Read what `save` wrote."""
        shapes = {
            "sums": f"float {len(_STATISTICS)} 2 {N_BLOCKS} layer neuron",
            "weights": f"float 2 {N_BLOCKS}",
        }
        expected = {"provenance": dict, "base": str}
        tensors, values = read_result(path, "ActivationProfile", tensors=shapes, values=expected)
        provenance = Provenance.from_dict(values["provenance"])
        return cls(tensors["sums"], tensors["weights"], values["base"], provenance)


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


def selectivity(profiles: Mapping[str, ActivationProfile], *, quantile: float = 0.95) -> NeuronScores:
    """How selectively every neuron is active for some of the objectives, from one profile per objective. No model pass.

    With P_o the activation frequency on objective o and q_o = P_o / sum P, the entropy H = -sum q log q is smallest for
    a neuron that is active on a single objective (LAPE; Tang et al. 2024). The score is log(K) - H for K objectives: 0
    for equal frequencies, at most log(K). As in LAPE, a neuron scores 0 unless one of its frequencies is above the
    `quantile` of all frequencies, because rarely active neurons look selective by chance.

    Raises `OptionError` for fewer than two profiles or a `quantile` outside [0, 1), and `ProvenanceError` for profiles
    of different models, sites or positions.

    Examples:
        >>> profiles = {
        ...     name: collect_profiles(head, part, positions=["response"])["mlp", "response"]
        ...     for name, part in pairs.items()
        ... }
        >>> selectivity(profiles).to_frame().nlargest(2, "score").round(2)
            layer  neuron  score  stderr
        29      1       5   0.02    0.01
        0       0       0   0.00    0.00
    """
    if len(profiles) < 2:
        raise OptionError(
            f"profiles: expected the profiles of at least two objectives, got {list(profiles)}. Collect one per "
            "objective with collect_profiles."
        )
    if not 0 <= quantile < 1:
        raise OptionError(f"quantile: expected a number in [0, 1), got {quantile}.")
    first, *others = profiles.values()
    for other in others:
        first.provenance.require_same(
            other.provenance, ("architecture", "model", "site", "positions", *METHOD_FIELDS), what="selectivity"
        )
    scores = [profile.scores("frequency") for profile in profiles.values()]
    frequencies = torch.stack([score.values for score in scores])
    eligible = frequencies.amax(dim=0) > np.quantile(frequencies.numpy(), quantile)
    values = _unevenness(frequencies) * eligible
    without = torch.stack([score.without_block for score in scores if score.without_block is not None])
    without_block = _unevenness(without) * eligible
    provenance = replace(
        scores[0].provenance,
        method="selectivity",
        data="+".join(profile.provenance.data for profile in profiles.values()),
        n_pairs=sum(profile.provenance.n_pairs for profile in profiles.values()),
        n_tokens=sum(profile.provenance.n_tokens for profile in profiles.values()),
    )
    return NeuronScores(values, jackknife_stderr(without_block), provenance, without_block)


def _unevenness(frequencies: Float[Tensor, "objective *rest"]) -> Float[Tensor, "*rest"]:
    """log(K) minus the entropy over the first axis; 0 where all frequencies are 0."""
    shares = frequencies / frequencies.sum(dim=0).clamp(min=torch.finfo(torch.float64).tiny)
    entropy = torch.special.entr(shares).sum(dim=0)
    return torch.where(frequencies.sum(dim=0) > 0, log(len(frequencies)) - entropy, torch.zeros_like(entropy))


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
                len(_STATISTICS), 2, N_BLOCKS, head.n_layers, head.n_neurons(site), dtype=torch.float64
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
            shape = (len(_STATISTICS), len(select), head.n_layers, head.n_neurons(site))
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
    """The value of each of `_STATISTICS` at every token of one layer; `before` is the base model's activation."""
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
