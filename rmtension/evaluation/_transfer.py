"""Transferability: how much of what single-objective models rank correctly a mixed model ranks correctly too."""

from dataclasses import dataclass

import numpy as np
import torch

from rmtension.errors import DataError
from rmtension.evaluation._intervals import Estimate, exact_ends, percentile_interval, prompts_with, resampled_sums
from rmtension.evaluation._metrics import correctness
from rmtension.evaluation._pair_rewards import PairRewards


@dataclass(frozen=True)
class Transferability:
    """The share of the single-objective models' correct items that a mixed model ranks correctly too.

    `value` is T = |C_mixed & (C_helpful | C_harmless)| / |C_helpful | C_harmless|, where C is the set of items that a
    model ranks correctly. T is the mixed model's accuracy on the items that another model ranks correctly, and follows
    its accuracy on all items (r = .98 over the paper's 150 cells). Therefore `accuracy` is its accuracy on all items,
    and `beyond_accuracy` is T minus `accuracy`. `jaccard_helpful` and `jaccard_harmless` are
    |C_mixed & C_o| / |C_mixed | C_o|. `n_union` is the size of the union. Values are NaN, not 0, if a union is empty.

    Examples:
        >>> print(transferability(mixed=scored, helpful=scored, harmless=scored).value)
        1.000 [0.858, 1.000]
    """

    value: Estimate
    accuracy: Estimate
    beyond_accuracy: Estimate
    jaccard_helpful: Estimate
    jaccard_harmless: Estimate
    n_union: int


def transferability(
    mixed: PairRewards, helpful: PairRewards, harmless: PairRewards, *, level: float = 0.95, seed: int = 0
) -> Transferability:
    """Transferability of a mixed model, with bootstrap intervals over prompts (arXiv 2606.13209). No model pass.

    All three models must be scored on the same pairs in the same order; otherwise `DataError`. An item counts as
    correct by the strict rule (a tie does not), because a set cannot hold half an item.

    Examples:
        >>> with AblationContext(head, organism.truth["shared"]):
        ...     mixed = head.score_pairs(pairs["harmless"])
        >>> transfer = transferability(mixed, helpful=mixed, harmless=head.score_pairs(pairs["harmless"]))
        >>> round(transfer.value.value, 3), transfer.n_union
        (0.792, 24)
    """
    if not mixed.pairs == helpful.pairs == harmless.pairs:
        raise DataError(
            "transferability: expected rewards of the same pairs in the same order from all three models. Score all "
            "of them on the same pairs."
        )
    if not len(mixed):
        raise DataError("transferability: expected at least one pair, got 0.")
    of_mixed, of_helpful, of_harmless = (correctness(scored, tie_value=0.0) for scored in (mixed, helpful, harmless))
    either = torch.maximum(of_helpful, of_harmless)
    columns = [of_mixed * either, either, of_mixed, torch.ones_like(either)]
    for of_single in (of_helpful, of_harmless):
        columns += [of_mixed * of_single, torch.maximum(of_mixed, of_single)]
    table = torch.stack(columns, dim=1)
    items = mixed.by_item().pairs
    resamples = resampled_sums(table, items, seed=seed)
    whole = table.sum(dim=0, keepdim=True).numpy()

    def estimate(*ratios: tuple[int, int, int]) -> Estimate:
        """The sum of signed ratios of columns, each given as (sign, numerator, denominator)."""

        def value(sums: np.ndarray) -> np.ndarray:
            with np.errstate(invalid="ignore", divide="ignore"):
                return sum((sign * sums[:, a] / sums[:, b] for sign, a, b in ratios), start=np.zeros(len(sums)))

        low, high = percentile_interval(value(resamples), level)
        observed, n_prompts = float(value(whole)[0]), len(items.prompts)
        if n_prompts == 1:
            low = high = np.nan
        elif len(ratios) == 1 and observed in (0.0, 1.0):
            # All counted items agree, so the bootstrap has no spread: Clopper and Pearson's, with prompts as trials.
            low, high = exact_ends(observed, int(prompts_with(table[:, ratios[0][2]], items)), level)
        return Estimate(observed, low, high, len(items), n_prompts, level)

    return Transferability(
        value=estimate((1, 0, 1)),
        accuracy=estimate((1, 2, 3)),
        beyond_accuracy=estimate((1, 0, 1), (-1, 2, 3)),
        jaccard_helpful=estimate((1, 4, 5)),
        jaccard_harmless=estimate((1, 6, 7)),
        n_union=int(either.sum()),
    )
