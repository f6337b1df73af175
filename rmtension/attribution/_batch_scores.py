"""The scores of the pairs of one batch by one attribution method, with everything that they depend on."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from einops import einsum
from jaxtyping import Float
from torch import Tensor

from rmtension.attribution._batch_run import BatchRun
from rmtension.attribution._methods import Method, MethodArgs, MethodResult, TokenValues
from rmtension.attribution._relevance import RelevanceRules
from rmtension.data._packing import Sharing
from rmtension.data._tokens import TokenBatch
from rmtension.interventions._replacement import Replacement
from rmtension.models._reward_model import RewardModel
from rmtension.passes._pass_record import PassRecord
from rmtension.store._provenance import Provenance


@dataclass(frozen=True, eq=False)
class BatchScorer:
    """Scores every neuron at a site for each pair of a batch; the fields are the settings of `NeuronAttribution`."""

    head: RewardModel
    method: Method
    site: str
    positions: str
    aggregate: str
    replacement: Replacement
    steps: int
    graddrop: bool

    @cached_property
    def rules(self) -> RelevanceRules | None:
        """Where the rules of RelP apply, for a method that needs them: found once, not in every batch."""
        return None if self.method.needs_relevance is None else RelevanceRules(self.head)

    @property
    def settings(self) -> dict[str, Any]:
        """What the scores depend on besides the model and the pairs."""
        return {
            **self.method_fields(self.aggregate),
            "site": self.site,
            "positions": self.positions,
            "replacement": self.replacement.key,
        }

    def method_fields(self, aggregate: str) -> dict[str, Any]:
        """The fields of provenance that describe the method."""
        return {
            "method": self.method.name,
            "aggregate": aggregate,
            "replacement": self.replacement.label if self.method.needs_replacement else None,
            "steps": self.steps if self.method.needs_path else None,
            "graddrop": self.graddrop,
        }

    def provenance(self, record: PassRecord, aggregate: str) -> Provenance:
        """The provenance of scores by `aggregate`; magnitudes have no sign."""
        provenance = record.provenance(self.head, site=self.site, positions=self.positions, method=self.method.name)
        sign = self.method.sign if aggregate == "signed" else None
        return replace(provenance, sign=sign, **self.method_fields(aggregate))

    def of_pairs(self, run: BatchRun) -> tuple[Float[Tensor, "pair layer neuron"], Float[Tensor, "pair layer"] | None]:
        """The scores of every pair by `aggregate`, and the magnitudes of its gaps."""
        if self.graddrop:
            return self._dropped(run), None
        scores, gaps = self.signed_of_pairs(run)
        return scores.abs() if self.aggregate == "absolute" else scores, None if gaps is None else gaps.abs()

    def signed_of_pairs(
        self, run: BatchRun
    ) -> tuple[Float[Tensor, "pair layer neuron"], Float[Tensor, "pair layer"] | None]:
        """The signed scores and completeness gaps of every pair, in float64."""
        scores, gaps = [], []
        for by_token, gap in self._by_layer(run):
            scores.append(_summed(by_token, run))
            gaps += [] if gap is None else [gap.double()]
        return _stacked(scores), _stacked(gaps) if gaps else None

    def of_tokens(self, run: BatchRun) -> Float[Tensor, "row token layer neuron"]:
        """The part of every token in the signed scores; those of rejected texts carry the minus sign of the pair."""
        return torch.stack([values * weights[..., None] for (values, weights), _ in self._by_layer(run)], dim=2)

    @property
    def _args(self) -> MethodArgs:
        return MethodArgs(self.site, self.positions, self.replacement, self.steps)

    def _by_layer(self, run: BatchRun) -> Iterator[MethodResult]:
        """The method's values per token, layer by layer, with the completeness gap of integrated gradients."""
        for layer in range(self.head.n_layers):
            yield self.method.by_layer(run, self._args, layer)

    def _dropped(self, run: BatchRun) -> Float[Tensor, "pair layer neuron"]:
        """The mean over all other layers of the magnitude of the score without that layer's gradient (GradDrop)."""
        dropped = self.method.by_layer_dropped
        assert dropped is not None
        layers = []
        for layer in range(self.head.n_layers):
            magnitudes = [_summed(by_token, run).abs() for by_token in dropped(run, self._args, layer)]
            layers.append(torch.stack(magnitudes).mean(dim=0))
        return _stacked(layers)


def sharing_of(scorers: Sequence[BatchScorer]) -> Sharing:
    """Which texts may share a row; with gradients at the response alone, rows begin after their prompts."""
    if not all(scorer.replacement.shares_tokens for scorer in scorers):
        return "none"
    runs_backward = any(scorer.method.runs_backward for scorer in scorers)
    needs_prompt = any(scorer.positions == "all" or scorer.method.needs_path for scorer in scorers)
    return "after prompt" if runs_backward and not needs_prompt else "pair"


def run_batch(scorers: Sequence[BatchScorer], batch: TokenBatch) -> BatchRun:
    """Run one batch and keep what any of the scorers, which score the same model, needs."""
    first_order = [scorer for scorer in scorers if not scorer.method.needs_path]
    products = [scorer.method.needs_gradients and not scorer.graddrop for scorer in first_order]
    by_rules = {
        fixed: scorer.rules
        for scorer in first_order
        if (fixed := scorer.method.needs_relevance) is not None and scorer.rules is not None
    }
    return BatchRun(
        scorers[0].head,
        batch,
        sorted({scorer.site for scorer in scorers}),
        forward=bool(first_order),
        gradients=any(products),
        relevance=by_rules,
        drops=any(scorer.graddrop for scorer in first_order),
        direct=any(scorer.method.needs_direct_paths for scorer in first_order),
        # Products with the gradient need no activation where the gradient is 0; means over a text need all.
        all_tokens=not all(
            (product or scorer.rules is not None) and scorer.replacement.shares_tokens
            for product, scorer in zip(products, first_order, strict=True)
        ),
    )


def _summed(by_token: TokenValues, run: BatchRun) -> Float[Tensor, "pair neuron"]:
    """The score of each pair, in float64."""
    values, weights = by_token
    rows = einsum(weights, values, "row token, row token neuron -> row neuron")
    return run.batch.sum_per_pair(rows.double())


def _stacked(layers: Sequence[Float[Tensor, "pair *rest"]]) -> Float[Tensor, "pair layer *rest"]:
    """Stack all layers, on one device even if the model is spread over several."""
    return torch.stack([layer.to(layers[0].device) for layer in layers], dim=1)
