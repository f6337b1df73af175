"""Conflict within one model: which neurons push the margins of two groups of pairs the same way, or opposite ways."""

from collections.abc import Mapping

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool, Float
from scipy import stats
from torch import Tensor

from rmtension._arguments import require_arguments
from rmtension.errors import DataError, OptionError
from rmtension.evaluation._intervals import Estimate, adjusted_p_values, check_level, percentile_interval
from rmtension.neurons._conflict_report import ConflictReport, Null, classified, columns, have_columns
from rmtension.neurons._pair_attributions import PairAttributions
from rmtension.neurons._prompt_cells import PromptCells
from rmtension.store._provenance import METHOD_FIELDS

_NEURONS_AT_A_TIME = 8192


def contributions(scores: PairAttributions) -> Float[Tensor, "pair layer neuron"]:
    """What every neuron adds to every margin; a positive contribution raises it. May share memory with `scores`.

    Attribution patching scores the change when the neuron is ablated, which is the negative of this; `Provenance.sign`
    says so. Raises `OptionError` for scores whose sign is not known.
    """
    where, values = scores.provenance, scores.values  # noqa: PD011 - a tensor
    if where.sign is None:
        raise OptionError(
            f"scores: expected scores whose sign says whether a neuron raises the margin, got sign None in their "
            f"provenance (method {where.label!r}). Use NeuronAttribution(...).per_pair, or set what a positive score "
            "means: dataclasses.replace(provenance, sign=1) if it supports the margin, sign=-1 if it opposes it."
        )
    return values if where.sign > 0 else -values


def conflict(
    first: PairAttributions,
    second: PairAttributions,
    *,
    names: tuple[str, str] = ("helpful", "harmless"),
    min_share: float = 0.05,
    level: float = 0.95,
    seed: int = 0,
) -> ConflictReport:
    """Compare what the neurons of one model do to two margins, called `names`. No model pass.

    The margins are those of two groups of pairs, or those of two outputs of the model, on the same or on other pairs.

    A neuron counts for a group if its q-value is at most `1 - level` and the magnitude of its mean contribution is
    at least `min_share` of the group's largest. `min_share` matters because with many prompts even tiny
    contributions have small q-values; at the default, twenty neurons at the limit add up to the largest.

    Standard errors treat pairs of one prompt together (the linearised variance of a ratio of sums, Cochran 1977).
    p-values are Student's t over prompts; q-values are Benjamini and Hochberg's over all neurons of the group. The
    interval and both null distributions use 1,000 draws of prompts each; a prompt in both groups is drawn for both
    at once. Memory: a copy of the scores, 100 kB per prompt, and 8 bytes per pair of prompts.

    Raises `ProvenanceError` unless the model (up to its output), site, positions and method agree, `DataError` for
    fewer than two prompts, scores that are not finite, and means that are all 0.

    Examples:
        >>> from rmtension import PreferencePairs
        >>> from rmtension.store import Provenance
        >>> rows = [{"prompt": prompt, "chosen": "yes", "rejected": "no"} for prompt in "abcd"]
        >>> pairs = PreferencePairs.from_records(rows)
        >>> where = Provenance("toy", "0f", "mlp", "all", "direct_effect", "float32", "", 4, 64, "0", sign=1)
        >>> helpful = PairAttributions(torch.tensor([[[3.0, 4.0, 0.0]]] * 4), pairs, where)
        >>> harmless = PairAttributions(torch.tensor([[[3.0, -4.0, 0.0]]] * 4), pairs, where)
        >>> report = conflict(helpful, harmless)
        >>> print(report.cosine, list(report.sets["helpful up, harmless down"]))
        -0.280 [-0.280, -0.280] [(0, 1)]
    """
    require_arguments("conflict(first, second)", first=(first, PairAttributions), second=(second, PairAttributions))
    if len(names) != 2 or not have_columns(names):
        raise OptionError(
            f"names: expected two names whose columns differ from each other and from 'layer', 'neuron' and 'class', "
            f"got {names}."
        )
    if not 0 <= min_share < 1:
        raise OptionError(f"min_share: expected a share of the largest contribution in [0, 1), got {min_share}.")
    check_level(level)
    is_one_body = first.provenance.has_same_neurons(second.provenance)
    same = ("architecture", *(() if is_one_body else ("model",)), "site", "positions", *METHOD_FIELDS, "sign")
    first.provenance.require_same(second.provenance, same, what="conflict")
    both = dict(zip(names, (first, second), strict=True))
    table, cells = _summarised(both)
    generator = np.random.default_rng(seed)
    observed = float(cells.between(np.ones((1, len(cells.prompt))))[0])
    resamples, coin = cells.between(cells.resampled(generator)), cells.between(cells.flipped(generator))
    shuffle = np.abs(cells.reassigned(generator, flipped=observed < 0))
    low, high = percentile_interval((resamples - resamples.mean()) * cells.stretch + observed, level)
    # The tolerance counts cosines that are equal up to rounding as extreme.
    extreme = np.abs(coin) >= abs(observed) - 1e-9, shuffle <= abs(observed) + 1e-9
    halves = [cells.halves(generator, is_member) for is_member in cells.of]
    n = len(first) + len(second)
    return ConflictReport(
        table=classified(table, names, min_share, level),
        cosine=Estimate(observed, max(low, -1.0), min(high, 1.0), n, len(cells.kind), level),
        chance={"coin": _null(coin, extreme[0], level), "shuffle": _null(shuffle, extreme[1], level)},
        reliability={name: float(draws.mean()) for name, draws in zip(both, halves, strict=True)},
        n_pairs={name: len(scores) for name, scores in both.items()},
        n_prompts={name: len(scores.pairs.prompts) for name, scores in both.items()},
        min_share=min_share,
        provenance={name: scores.provenance for name, scores in both.items()},
    )


def _null(draws: Float[np.ndarray, "draw"], extreme: Bool[np.ndarray, "draw"], level: float) -> Null:
    return Null(float(draws.mean()), *percentile_interval(draws, level), float(extreme.sum() + 1) / (len(draws) + 1))


def _summarised(both: Mapping[str, PairAttributions]) -> tuple[pd.DataFrame, PromptCells]:
    """The table without classes, and the cells."""
    values = {name: contributions(scores) for name, scores in both.items()}
    for name, scores in both.items():
        if len(scores.pairs.prompts) < 2:
            raise DataError(f"{name}: expected pairs of at least two prompts, got {len(scores.pairs.prompts)}.")
        if n_bad := int((~values[name].isfinite()).flatten(1).any(1).sum()):
            raise DataError(
                f"{name}: the scores of {n_bad} of {len(scores)} pairs are NaN or infinite. Score in float32, or look "
                "for overflow in the model."
            )
        if not scores.mean().any():
            raise DataError(
                f"{name}: the mean contribution of every neuron is 0, so the cosine is undefined. Check the pairs and "
                "the method."
            )
    keys = [(name, pair.prompt) for name, scores in both.items() for pair in scores.pairs]
    cells = {key: cell for cell, key in enumerate(dict.fromkeys(keys))}
    prompts = {prompt: index for index, prompt in enumerate(dict.fromkeys(prompt for _, prompt in cells))}
    owner = torch.tensor([cells[key] for key in keys])
    of = torch.tensor([[float(objective == name) for objective, _ in cells] for name in both], dtype=torch.float64)
    sizes, n_prompts = torch.bincount(owner).double(), of.sum(1, keepdim=True)
    n_pairs = of @ sizes[:, None]
    gram = torch.zeros(len(cells), len(cells), dtype=torch.float64)
    means, variances = [], []
    for part in torch.split(torch.cat(list(values.values())).flatten(1), _NEURONS_AT_A_TIME, dim=1):
        sums = torch.zeros(len(cells), part.shape[1], dtype=torch.float64).index_add_(0, owner, part.double())
        gram += sums @ sums.T
        means.append(of @ sums / n_pairs)
        residuals = sums - sizes[:, None] * (of.T @ means[-1])
        variances.append(of @ residuals.square() / n_pairs**2 * n_prompts / (n_prompts - 1))
    mean, stderr = torch.cat(means, dim=1), torch.cat(variances, dim=1).sqrt()
    # A neuron that contributes nothing on any pair has the statistic 0 / 0; its p-value is 1.
    p_value = np.nan_to_num(2 * stats.t.sf((mean / stderr).abs().numpy(), (n_prompts - 1).numpy()), nan=1.0)
    q_value = np.array([adjusted_p_values(row) for row in p_value.tolist()])
    indices = np.indices(tuple(next(iter(values.values())).shape[1:])).reshape(2, -1)
    numbers = np.stack([mean.numpy(), stderr.numpy(), p_value, q_value], axis=1).reshape(-1, mean.shape[1])
    lengths = of.T @ mean.norm(dim=1)
    inner = (gram / torch.outer(lengths, lengths)).numpy()
    table = pd.DataFrame(dict(zip(columns(tuple(both)), [*indices, *numbers], strict=True)))
    return table, PromptCells(inner, np.array([prompts[prompt] for _, prompt in cells]), of.numpy())
