"""How much of what single-objective models rank correctly a mixed model ranks correctly too."""

from dataclasses import dataclass

import numpy as np
import torch

from rmtension.errors import DataError
from rmtension.evaluation._intervals import Estimate, exact_ends, percentile_interval, prompts_with, resampled_sums
from rmtension.evaluation._metrics import correctness
from rmtension.evaluation._pair_rewards import PairRewards


@dataclass(frozen=True)
class Transferability:
    """T = |C_mixed & (C_helpful | C_harmless)| / |C_helpful | C_harmless|, C the items a model ranks correctly.

    Over the paper's 150 cells T follows the mixed model's accuracy (r = .98), because T is its accuracy on the items
    that another model ranks correctly: `accuracy` is its accuracy on all, `beyond_accuracy` T minus that.
    `jaccard_helpful` and `jaccard_harmless` are |C_mixed & C_o| / |C_mixed | C_o|. Values are NaN where a union is
    empty: undefined, not 0.
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
    """Compare three models on the same pairs, with bootstrap intervals over prompts (arXiv 2606.13209, section 2 here).

    An item counts as correct by the strict rule (a tie is not), because sets have no half members.

    Examples:
        >>> with AblationContext(head, organism.truth["shared"]):
        ...     mixed = head.score_pairs(pairs["harmless"])
        >>> found = transferability(mixed, helpful=mixed, harmless=head.score_pairs(pairs["harmless"]))
        >>> round(found.value.value, 3), found.n_union
        (0.792, 24)
    """
    if not mixed.pairs == helpful.pairs == harmless.pairs:
        raise DataError("transferability: expected rewards of the same pairs in the same order from all three models.")
    if not len(mixed):
        raise DataError("transferability: expected at least one pair, got none.")
    of_mixed, of_helpful, of_harmless = (correctness(one, tie_value=0.0) for one in (mixed, helpful, harmless))
    either = torch.maximum(of_helpful, of_harmless)
    columns = [of_mixed * either, either, of_mixed, torch.ones_like(either)]
    for other in (of_helpful, of_harmless):
        columns += [of_mixed * other, torch.maximum(of_mixed, other)]
    table = torch.stack(columns, dim=1)
    items = mixed.by_item().pairs
    resamples = resampled_sums(table, items, seed=seed)
    whole = table.sum(dim=0, keepdim=True).numpy()

    def estimate(*ratios: tuple[int, int, int]) -> Estimate:
        """The sum of signed ratios of columns: (sign, numerator, denominator)."""

        def value(sums: np.ndarray) -> np.ndarray:
            with np.errstate(invalid="ignore", divide="ignore"):
                return sum((sign * sums[:, a] / sums[:, b] for sign, a, b in ratios), start=np.zeros(len(sums)))

        low, high = percentile_interval(value(resamples), level)
        observed, n_prompts = float(value(whole)[0]), len(items.prompts)
        if n_prompts == 1:
            low = high = np.nan
        elif len(ratios) == 1 and observed in (0.0, 1.0):
            # All of what is counted agrees, so that the bootstrap has no spread; prompts are the trials.
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
