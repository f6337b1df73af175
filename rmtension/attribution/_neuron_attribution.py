"""Attribution: how much every neuron contributes to the margin between chosen and rejected responses."""

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import torch

from rmtension._arguments import require_arguments, require_choice
from rmtension._progress import progress_bar
from rmtension._sites import check_positions, find_site
from rmtension.attribution._batch_scores import BatchScorer, run_batch
from rmtension.attribution._methods import METHODS
from rmtension.attribution._score_statistics import MeanScores, ScoresOfPairs
from rmtension.data._encoding import EncodedText
from rmtension.data._pair import PreferencePair
from rmtension.data._pairs import PreferencePairs
from rmtension.data._tokens import TokenBatch
from rmtension.errors import DataError, OptionError
from rmtension.interventions._check_replacement import check_replacement
from rmtension.interventions._replacement import Replacement
from rmtension.interventions._replacements import Zero
from rmtension.models._reward_model import RewardModel
from rmtension.neurons._neuron_scores import NeuronScores
from rmtension.neurons._pair_attributions import PairAttributions
from rmtension.neurons._token_scores import TokenScores
from rmtension.passes._pair_pass import run_pass
from rmtension.store._provenance import method_label


class NeuronAttribution:
    """Scores every neuron of a model over preference pairs.

    Methods, for one pair with margin M = r(chosen) - r(rejected) and the selected tokens t of both texts. L is the
    number of layers. A pass runs both texts of every pair; a pass through one block counts as 1 / L of a pass. With
    positions "response" or "last", backward passes leave out the prompt where the model allows it
    (`docs/performance.md`).

    - `mean_difference`: mean_t a(chosen) - mean_t a(rejected). 1 forward pass; needs no reward. Shows what differs, not
      what matters.
    - `gradient_x_activation`: sum_t a(t) dM/da(t), to first order what the neuron contributes to the margin.
      1 forward and 1 backward pass.
    - `attribution_patching`: sum_t (a_ref(t) - a(t)) dM/da(t), to first order the change of the margin when the
      activation is replaced by a_ref, as an `AblationContext` with the same `replacement` does (Nanda 2023; Syed, Rager
      and Conmy 2023). 1 forward and 1 backward pass.
    - `attribution_patching` with `graddrop=True`: for each other layer, the magnitude of the score without the gradient
      through what that layer's block adds; the mean over those layers. Direct and indirect effects then do not cancel
      (AtP*, Kramar et al. 2024, section 3.1.2). 1 forward and L backward passes; needs `aggregate="absolute"`.
    - `relp`: sum_t (a_ref(t) - a(t)) c(t), where c is the gradient of M with three rules: a norm's denominator is
      constant, act(z) is z times the constant act(z) / z, and each factor of a gated product gets half of the gradient
      (RelP, Jafari et al. 2025). It finds sets that keep the margin, and predicts single ones poorly (`docs/sets.md`).
      `relp_fixed_attention` also holds attention patterns constant. 1 forward and 1 backward pass of its own. Needs
      transformers' own modules.
    - `integrated_gradients`: sum_t (a(t) - a_ref(t)) times the mean of dM/da(t) on the straight path from a_ref to a,
      all neurons of a layer moving together (Sundararajan, Taly and Yan 2017), at `steps` Gauss-Legendre nodes. A
      layer's scores add up to M minus the margin with the whole layer replaced, up to `completeness_gap`.
      1 + (steps + 1) (L + 1) / 2 forward and steps (L + 1) / 2 backward passes, where blocks run one by one. Where a
      norm follows the projection (Gemma-2, OLMo-2), zero is a singular point of that norm: use `Mean(statistics)`.
    - `direct_effect`: what the neuron adds to the margin through the residual stream without later blocks, at the
      unchanged scale of the final norm (`rmtension.models.direct_contributions`). Exact for a linear head, of first
      order for others. 1 forward pass. Only the tokens that the head reads count, whatever `positions` says.

    Signs: a score of `attribution_patching` or `relp` is a change (positive: the margin grows without the neuron, which
    opposes it); a score of any other method is a contribution (positive: the neuron supports the margin).
    `Provenance.sign` of the result tells which, and `top(rank_by="supports")` has the same meaning for all methods. A
    positive `mean_difference` means that the neuron is more active in the chosen responses. This counts as support
    although the method does not read the reward: a neuron that no layer reads, or that lowers the reward, can have a
    positive score. `faithfulness` measures how often. For `mean_difference` the activation of an attention head is the
    norm of its output; the other methods sum products over its channels. Scores are means over pairs with their
    standard errors, in float64. Swapping chosen and rejected flips the sign of signed scores; adding a constant to the
    reward changes none.

    A gradient jumps where the input of a ReLU is 0 up to rounding, as in models whose weights are round numbers; there,
    float32 and float64 may give different scores. To check, open the model with `dtype=torch.float64`.

    Args:
        head: the model to score.
        method: one of the above.
        site: "mlp", "mlp_gate", "attn_head" or "expert".
        positions: "all", "response" or "last": the tokens that scores average, sum over, or replace activations at.
        aggregate: "signed" averages the values of the pairs, "absolute" their magnitudes.
        replacement: what replaces activations in `attribution_patching`, `relp` and `integrated_gradients`: `Zero()`,
            `Mean(statistics)`, `Median(sample)`, an `Optimal`, `Resample(sample)`, `Scale(alpha)` or `OtherResponse()`.
        steps: number of nodes of integrated gradients.
        graddrop: see above.

    Examples:
        >>> patching = NeuronAttribution(head, "attribution_patching", positions="response")
        >>> truth = organism.truth
        >>> patching.score(pairs["helpful"]).top(k=6) == truth["helpful"] | truth["shared"] | truth["conflict"]
        True
    """

    def __init__(
        self,
        head: RewardModel,
        method: str,
        *,
        replacement: Replacement = Zero(),
        site: str = "mlp",
        positions: str = "all",
        aggregate: str = "signed",
        steps: int = 32,
        graddrop: bool = False,
    ) -> None:
        require_arguments("NeuronAttribution(head, method)", head=(head, RewardModel), method=(method, str))
        require_choice("method", method, sorted(METHODS))
        if aggregate not in ("signed", "absolute"):
            raise OptionError(f"aggregate: expected 'signed' or 'absolute', got {aggregate!r}.")
        check_positions(positions)
        self.site = find_site(site).name
        self._method = METHODS[method]
        if replacement != Zero() and not self._method.needs_replacement:
            raise OptionError(f"replacement: method {method!r} replaces nothing. Leave out the argument replacement.")
        check_replacement(replacement, head, self.site)
        head.n_neurons(self.site)  # raises where the model has no such site
        if steps < 1:
            raise OptionError(f"steps: expected a positive number of nodes, got {steps}.")
        if self._method.needs_reward:
            head.require_choice()
            head.require_positions(positions)
        if graddrop and (self._method.by_layer_dropped is None or aggregate != "absolute"):
            droppable = [name for name, known in METHODS.items() if known.by_layer_dropped is not None]
            raise OptionError(
                "graddrop: it averages magnitudes of attribution patching. Use it with "
                f"method={droppable[0]!r} and aggregate='absolute', got {method!r} and {aggregate!r}."
            )
        if graddrop and head.n_layers < 2:
            raise OptionError(
                "graddrop: it leaves out one other layer at a time, and this model has a single layer. Pass "
                "graddrop=False."
            )
        self.head = head
        self.method = method
        self.positions = positions
        self.aggregate = aggregate
        self.replacement = replacement
        self.steps = steps
        self.graddrop = graddrop

    def score(
        self,
        pairs: Iterable[PreferencePair],
        *,
        work: str | Path | None = None,
        progress: bool | None = None,
    ) -> NeuronScores:
        """Score every neuron, as means over the pairs.

        Memory: one batch's activations and 32 x `layers x neurons` sums, whatever the number of pairs. A score that is
        NaN or infinite raises `ModelError` with the layer and the pair's id. If the model was opened with
        `on_nonfinite="skip"`, such pairs are skipped and their ids are in the result's provenance. `work` and
        `progress` are those of `run_pass`.

        Examples:
            >>> difference = NeuronAttribution(head, "mean_difference", positions="response").score(pairs["helpful"])
            >>> difference.top(k=2) - organism.truth["decoy"]  # the neurons that differ most do nothing
            NeuronSet(0 of 48 mlp neurons of gpt2-2x24-heads2x12-d24)
        """
        (scores,) = score_together([self], pairs, work=work, progress=progress)
        return scores

    @torch.inference_mode(False)  # tensors made in inference mode cannot be differentiated
    def per_pair(
        self,
        pairs: Iterable[PreferencePair],
        *,
        work: str | Path | None = None,
        progress: bool | None = None,
    ) -> PairAttributions:
        """The signed scores of every pair, whatever `aggregate` says. Memory: `pairs x layers x neurons` numbers.

        Pairs that are skipped (see `score`) have no row. `work` and `progress` are those of `run_pass`.

        Examples:
            >>> by_pair = NeuronAttribution(head, "direct_effect").per_pair(pairs["helpful"])
            >>> by_pair.values.shape
            torch.Size([24, 2, 24])
        """
        if self.graddrop:
            raise OptionError("per_pair: GradDrop has no signed scores. Use an attribution without graddrop=True.")
        pairs = pairs if isinstance(pairs, PreferencePairs) else PreferencePairs(pairs)
        return run_pass(self.head, pairs, ScoresOfPairs(self._scorer, pairs), work=work, progress=progress)

    def per_token(self, pairs: Iterable[PreferencePair], *, progress: bool | None = None) -> Iterator[TokenScores]:
        """Iterate over the pairs in order and give each pair's scores per token, with the tokenizer's token strings.

        Examples:
            >>> first = next(NeuronAttribution(head, "mean_difference").per_token(pairs["helpful"]))
            >>> len(first.chosen_tokens), first.chosen.shape
            (32, torch.Size([32, 2, 24]))
        """
        if self.graddrop:
            raise OptionError("per_token: GradDrop has no signed scores. Use an attribution without graddrop=True.")
        pairs = pairs if isinstance(pairs, PreferencePairs) else PreferencePairs(pairs)
        if not len(pairs):
            raise DataError("pairs: expected at least one preference pair, got none.")
        encoded = self.head.encode(pairs)
        both = progress_bar(
            zip(pairs, encoded.chosen, encoded.rejected, strict=True),
            progress=progress,
            total=len(pairs),
            desc=self.method,
            unit="pair",
        )
        return (self._by_token(pair, texts) for pair, *texts in both)

    @torch.inference_mode(False)
    def _by_token(self, pair: PreferencePair, texts: list[EncodedText]) -> TokenScores:
        batch = TokenBatch.from_texts(texts, (0, 0), read_at=self.head.read_at, device=self.head.device)
        scorer = self._scorer
        values = scorer.of_tokens(run_batch([scorer], batch)).cpu()
        # The values of rejected texts carry the minus sign of the pair's score; this removes it.
        chosen, rejected = (sign * values[row, : len(texts[row])] for row, sign in enumerate((1, -1)))
        tokens = [tuple(self.head.tokenizer.convert_ids_to_tokens(list(text.ids))) for text in texts]
        return TokenScores(pair.id, tokens[0], tokens[1], chosen, rejected, self._method.sign)

    @property
    def _scorer(self) -> BatchScorer:
        """What scores the batches, with the settings of this attribution."""
        return BatchScorer(
            self.head,
            self._method,
            self.site,
            self.positions,
            self.aggregate,
            self.replacement,
            self.steps,
            self.graddrop,
        )

    def __repr__(self) -> str:
        how = method_label(**self._scorer.method_fields(self.aggregate))
        return f"NeuronAttribution({how}, {self.site} at {self.positions} tokens, {self.head!r})"


@torch.inference_mode(False)
def score_together(
    attributions: Sequence[NeuronAttribution],
    pairs: Iterable[PreferencePair],
    *,
    work: str | Path | None = None,
    progress: bool | None = None,
) -> list[NeuronScores]:
    """Score the same pairs with several attributions of one model in shared passes; results are in their order.

    Cost: for all first-order methods, sites, positions and replacements together 1 forward pass, and 1 backward pass if
    any of them needs gradients; plus L backward passes for GradDrop, a forward and a backward pass for RelP, and the
    passes of every integrated gradients.
    `work` and `progress` are those of `run_pass`. Raises `OptionError` for an empty list and for attributions of
    different models.

    Examples:
        >>> attributions = [NeuronAttribution(head, name) for name in ("mean_difference", "gradient_x_activation")]
        >>> [scores.provenance.method for scores in score_together(attributions, pairs["helpful"])]
        ['mean_difference', 'gradient_x_activation']
    """
    if not attributions or any(attribution.head is not attributions[0].head for attribution in attributions):
        raise OptionError("attributions: expected at least one NeuronAttribution, all of the same head.")
    statistic = MeanScores([attribution._scorer for attribution in attributions])
    return run_pass(attributions[0].head, pairs, statistic, work=work, progress=progress)
