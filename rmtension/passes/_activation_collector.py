"""Collect activation statistics of every neuron over preference pairs, in one streaming pass."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from rmtension._arguments import require_arguments
from rmtension._sites import check_positions, find_site
from rmtension.data._encoding import EncodedText
from rmtension.data._length_buckets import text_batches
from rmtension.data._pair import PreferencePair
from rmtension.data._pairs import PreferencePairs
from rmtension.data._tokens import TokenBatch
from rmtension.distributed import current
from rmtension.errors import DataError, ModelError, OptionError, ProvenanceError
from rmtension.models._reward_model import RewardModel
from rmtension.passes._activation_sample import ActivationSample
from rmtension.passes._activation_statistics import ActivationStatistics
from rmtension.passes._pair_pass import run_pass
from rmtension.passes._pair_statistic import PairStatistic
from rmtension.passes._pass_record import PassRecord
from rmtension.passes._token_sums import TokenWeights, weighted_sums
from rmtension.store._provenance import Provenance


class ActivationCollector:
    """Collects activation statistics of every neuron, in a streaming pass over preference pairs.

    Any partition of the pairs over `update` and `merge`, in any order, gives the same statistics up to the rounding of
    the model's arithmetic: small chunks of activations are summed in float32 (float64 for a float64 model), and their
    sums in float64. A failed `update` changes nothing.

    Cost: a forward pass over both texts of every pair; a prefix that they share runs once (`docs/performance.md`).
    Memory: one batch, and `layers x channels` float64 sums for any number of pairs.

    Args:
        head: the model to read.
        site: "mlp", "mlp_gate", "attn_head" or "expert".
        positions: "all" real tokens, "response" tokens, or the "last" one. Padding never counts.

    Examples:
        >>> collector = ActivationCollector(head, site="mlp", positions="response")
        >>> statistics = collector.update(pairs["helpful"]).update(pairs["harmless"]).compute()
        >>> statistics.mean.shape, statistics.n_tokens
        (torch.Size([2, 24]), 2400)
        >>> parts = [ActivationCollector(head, positions="response").update(part) for part in pairs.values()]
        >>> bool((parts[0].merge(parts[1]).compute().mean - statistics.mean).abs().max() < 1e-9)
        True
    """

    def __init__(self, head: RewardModel, *, site: str = "mlp", positions: str = "all") -> None:
        require_arguments("ActivationCollector(head), then collect(pairs)", head=(head, RewardModel))
        check_positions(positions)
        self.head = head
        self.site = find_site(site).name
        self.positions = positions
        self.reset()

    def reset(self) -> "ActivationCollector":
        """Forget everything collected so far."""
        self._collected = _ActivationSums(self.head, self.site, self.positions).collected()
        self._model, self._body = self.head.fingerprint, self.head.body_fingerprint
        return self

    def update(
        self,
        pairs: Iterable[PreferencePair],
        *,
        work: str | Path | None = None,
        progress: bool | None = None,
    ) -> "ActivationCollector":
        """Add both texts of every pair; `pairs` is any iterable, and is read once.

        An activation that is NaN or infinite raises `ModelError` with the layer and the pair's id; if the model was
        opened with `on_nonfinite="skip"` such pairs are skipped, and their ids are in the result's provenance. `work`
        and `progress` are those of `run_pass`.
        """
        if self.head.fingerprint != self._model:
            raise ProvenanceError("update: the model's weights changed since the last reset. Call reset() first.")
        statistic = _ActivationSums(self.head, self.site, self.positions)
        self._collected += run_pass(self.head, pairs, statistic, work=work, progress=progress)
        return self

    def merge(self, other: "ActivationCollector") -> "ActivationCollector":
        """Add everything that another collector of the same model, site and positions has collected."""
        if other is self:
            raise OptionError("merge: expected another collector, got the same one, whose tokens would count twice.")
        self._provenance().require_same(
            other._provenance(), ("architecture", "model", "site", "positions", "dtype"), what="merge"
        )
        self._collected += other._collected
        return self

    def compute(self) -> ActivationStatistics:
        """The statistics of everything collected; raises `DataError` if nothing was collected."""
        if not self._collected.n_tokens:
            raise DataError("compute: nothing was collected yet. Call update(pairs) with at least one pair first.")
        means = {name: total / self._collected.n_tokens for name, total in self._collected.sums.items()}
        return ActivationStatistics(
            mean=means["value"],
            abs_mean=means["absolute"],
            rms=means["square"].sqrt(),
            frequency=means["positive"],
            channel_mean=means["channel"],
            provenance=self._provenance(),
        )

    def collect(
        self,
        pairs: Iterable[PreferencePair],
        *,
        work: str | Path | None = None,
        progress: bool | None = None,
    ) -> ActivationStatistics:
        """`reset`, `update` and `compute` in one call."""
        return self.reset().update(pairs, work=work, progress=progress).compute()

    def sample(self, pairs: PreferencePairs, *, n: int = 256, seed: int = 0) -> ActivationSample:
        """Draw `n` of the selected tokens of `pairs` without replacement (or all, if fewer), with their activations.

        Cost: a forward pass over the texts from which a token was drawn. Memory: `n x layers x channels` numbers.
        Raises `ModelError` for a token with NaN or infinite activations.
        """
        if n < 1:
            raise OptionError(f"n: expected a positive number of donors, got {n}.")
        if not len(pairs):
            raise DataError("pairs: expected at least one preference pair to draw donors from, got none.")
        encoded = self.head.encode(pairs)
        texts = [*encoded.chosen, *encoded.rejected]
        counts = np.array([self._n_selected(text) for text in texts])
        ends = counts.cumsum()
        drawn = np.sort(np.random.default_rng(seed).permutation(int(counts.sum()))[:n])
        owners = np.searchsorted(ends, drawn, side="right")
        offsets = drawn - (ends - counts)[owners]
        wanted: dict[int, list[tuple[int, int]]] = {}
        for donor, (owner, offset) in enumerate(zip(owners.tolist(), offsets.tolist(), strict=True)):
            wanted.setdefault(owner, []).append((donor, offset))
        values = torch.zeros(len(drawn), self.head.n_layers, self.head.n_channels(self.site), dtype=self.head.dtype)
        used = list(wanted)
        batches = text_batches(
            [texts[owner] for owner in used],
            tokens_per_batch=self.head.tokens_together(),
            read_at=self.head.read_at,
            device=self.head.device,
        )
        shard = current()
        for number, batch in enumerate(batches):
            if not shard.takes(number):
                continue
            columns_of = [row.nonzero()[:, 0].tolist() for row in batch.select(self.positions)]
            drawn_here = [
                (donor, row, columns_of[row][offset])
                for row, index in enumerate(batch.indices)
                for donor, offset in wanted[used[index]]
            ]
            donors, rows, columns = torch.tensor(drawn_here).unbind(dim=1)
            self.head.observe(batch, [self.site], partial(_keep, values, donors, rows, columns))
        keys = torch.tensor([texts[owner].key for owner in owners])
        if shard.size > 1:
            shard.require_same("list of pairs", f"{pairs.ordered_digest} {self.head.fingerprint}")
            shard.add_up(values)
        is_finite = values.isfinite().all(dim=2).all(dim=1)
        if not bool(is_finite.all()):
            pair = pairs[int(owners[int((~is_finite).nonzero()[0])]) % len(pairs)]
            raise ModelError(
                f"sample: a text of pair {pair.id!r} has NaN or infinite activations, which would make others NaN. "
                "Leave the pair out, or open the model in float32."
            )
        provenance = self.head.provenance(
            pairs.digest, len(pairs), len(drawn), site=self.site, positions=self.positions, method="sample"
        )
        return ActivationSample(values, keys, provenance)

    # -- inside ----------------------------------------------------------------------------------------------------

    def _n_selected(self, text: EncodedText) -> int:
        return {"all": len(text), "response": len(text) - text.response_start, "last": 1}[self.positions]

    def _provenance(self) -> Provenance:
        collected = self._collected
        now = self.head.provenance(
            f"{collected.digest % 2**256:064x}",
            collected.n_pairs,
            collected.n_tokens,
            site=self.site,
            positions=self.positions,
            method="statistics",
        )
        return replace(now, model=self._model, body=self._body, skipped=collected.skipped)


@dataclass(frozen=True)
class _Collected:
    """Sums over everything that was collected; replaced as a whole, so that no update is ever added in part."""

    sums: Mapping[str, Float[Tensor, "layer channel"]]
    n_tokens: int = 0
    n_pairs: int = 0
    digest: int = 0
    skipped: tuple[str, ...] = ()

    def __add__(self, other: "_Collected") -> "_Collected":
        return _Collected(
            {name: total + other.sums[name] for name, total in self.sums.items()},
            self.n_tokens + other.n_tokens,
            self.n_pairs + other.n_pairs,
            self.digest + other.digest,
            self.skipped + other.skipped,
        )


class _ActivationSums(PairStatistic[_Collected]):
    """Sums over the selected tokens: of every neuron's value, magnitude, square and sign, and of every channel."""

    name = "collect"
    layer_dim = 0

    def __init__(self, head: RewardModel, site: str, positions: str) -> None:
        self._head = head
        self._site = site
        self._positions = positions
        layers, neurons = head.n_layers, head.n_neurons(site)
        widths = dict.fromkeys(("value", "absolute", "square", "positive"), neurons)
        widths["channel"] = head.n_channels(site)
        self._sums = {name: torch.zeros(layers, width, dtype=torch.float64) for name, width in widths.items()}

    @property
    def settings(self) -> Mapping[str, Any]:
        return {"site": self._site, "positions": self._positions}

    @property
    def state(self) -> Mapping[str, Tensor]:
        return self._sums

    def observe(self, batch: TokenBatch) -> list[Tensor]:
        head, site = self._head, self._site
        # A token of a shared prefix counts once for each text of its row that selects it.
        weights = TokenWeights(batch.sum_over_texts(batch.select(self._positions).float()))
        layers: list[dict[str, Tensor]] = [{} for _ in range(head.n_layers)]

        def sum_layer(_site: str, layer: int, channels: Tensor) -> None:
            layers[layer] = weighted_sums(channels, weights, site, head.n_neurons(site))

        head.observe(batch, [site], sum_layer)
        # On a GPU all layers are started before the first is waited for.
        return [torch.stack([layer[name].cpu() for layer in layers]) for name in self._sums]

    def update(self, batch: TokenBatch, observed: list[Tensor]) -> None:
        for total, batch_sum in zip(self._sums.values(), observed, strict=True):
            total += batch_sum

    def compute(self, record: PassRecord) -> _Collected:
        skipped = tuple(record.skipped.values())
        return self.collected(record.n_tokens(self._positions), record.n_pairs, int(record.digest, 16), skipped)

    def collected(
        self, n_tokens: int = 0, n_pairs: int = 0, digest: int = 0, skipped: tuple[str, ...] = ()
    ) -> _Collected:
        return _Collected(self._sums, n_tokens, n_pairs, digest, skipped)


def _keep(
    values: Tensor, donors: Tensor, rows: Tensor, columns: Tensor, _site: str, layer: int, channels: Tensor
) -> None:
    values[donors, layer] = channels[rows.to(channels.device), columns.to(channels.device)].cpu()
