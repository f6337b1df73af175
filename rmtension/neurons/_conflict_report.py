"""Conflict within one model: which neurons push helpful and harmless margins the same way, and which opposite ways."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool, Float, Int
from scipy import stats
from torch import Tensor

from rmtension._arguments import require_arguments
from rmtension.errors import DataError, OptionError, StorageError
from rmtension.evaluation._intervals import Estimate, adjusted_p_values, check_level, percentile_interval
from rmtension.neurons._neuron_set import NeuronSet
from rmtension.neurons._pair_attributions import PairAttributions
from rmtension.store._provenance import METHOD_FIELDS, Provenance
from rmtension.store._records import read_numbers, read_record
from rmtension.store._storage import read_result, write_result

OBJECTIVES = ("helpful", "harmless")
# Signs of a neuron's contributions to helpful and harmless margins -> its class; 0 where it does not count.
CLASSES = {
    (1, 1): "both up", (-1, -1): "both down",
    (1, -1): "helpful up, harmless down", (-1, 1): "helpful down, harmless up",
    (1, 0): "helpful only up", (-1, 0): "helpful only down",
    (0, 1): "harmless only up", (0, -1): "harmless only down", (0, 0): "none",
}  # fmt: skip
_NUMBERS = ("", "_stderr", "_p_value", "_q_value")
_COLUMNS = ("layer", "neuron", *(one + number for one in OBJECTIVES for number in _NUMBERS))
_N_DRAWS = 1000
_NEURONS_AT_A_TIME = 8192


@dataclass(frozen=True)
class Null:
    """The null distribution of a cosine: mean and central `level` of its draws, and the observed cosine's p-value.

    The observed cosine counts as one of the draws, so that no p-value is 0 (Phipson and Smyth 2010).
    """

    mean: float
    low: float
    high: float
    p_value: float

    def __str__(self) -> str:
        return f"{self.mean:.3f} [{self.low:.3f}, {self.high:.3f}], p = {self.p_value:.3f}"


@dataclass(frozen=True, eq=False, repr=False)
class ConflictReport:
    """What the neurons of one model do to helpful and to harmless margins.

    `table` has one row per neuron: layer, neuron, for each objective the mean contribution, its standard error over
    prompts, p- and q-value (`helpful`, `helpful_stderr`, `helpful_p_value`, `helpful_q_value`), and `class`.

    `cosine` is the cosine between the two vectors of mean contributions, with a bootstrap interval over prompts.
    Resampling adds noise, which shrinks cosines and their spread. Resamples are therefore shifted so that their mean is
    the observed cosine, and stretched by the square root of the factor by which noise lengthens the vectors (simulated
    95% intervals cover 94% to 98%; without the stretch, 87% to 94%). Noise also keeps a cosine below 1: `reliability`
    is the cosine of an objective with itself, from random halves of its prompts, averaged over divisions. `chance`
    holds two null distributions:

    - "coin", of the cosine: each prompt's pairs are sign-flipped at random, with one sign for all its pairs in both
      objectives. The mean is near 0 if no prompt is in both objectives. The p-value is the share of draws whose
      |cosine| is at least as large as the observed one.
    - "shuffle", of |cosine|: prompts are randomly reassigned between the objectives, as if both used the same neurons.
      Each objective is scaled by the length of its mean vector, and harmless is sign-flipped first if the cosine is
      negative, because opposite vectors would cancel in the mixture. The p-value is the share of draws whose |cosine|
      is at most as large as the observed one.

    Examples:
        >>> attribution = NeuronAttribution(head, "direct_effect")
        >>> report = conflict(*(attribution.per_pair(pairs[name]) for name in ("helpful", "harmless")))
        >>> report.counts()["both up"], report.to_frame().shape
        (2, (48, 11))
    """

    table: pd.DataFrame
    cosine: Estimate
    chance: dict[str, Null]
    reliability: dict[str, float]
    n_pairs: dict[str, int]
    n_prompts: dict[str, int]
    min_share: float
    provenance: dict[str, Provenance]

    @property
    def sets(self) -> dict[str, NeuronSet]:
        """Class -> its neurons; every neuron is in exactly one class."""
        where = self.provenance["helpful"]
        shape = (self.table[["layer", "neuron"]].max() + 1).tolist()
        masks = {name: torch.tensor((self.table["class"] == name).to_numpy()).view(*shape) for name in self.counts()}
        return {name: NeuronSet(mask, where.site, where.architecture) for name, mask in masks.items()}

    def counts(self) -> dict[str, int]:
        """Class -> its number of neurons."""
        counts = self.table["class"].value_counts()
        return {name: int(counts.get(name, 0)) for name in CLASSES.values()}

    def to_frame(self) -> pd.DataFrame:
        """A copy of `table`."""
        return self.table.copy()

    def save(self, path: str | Path) -> None:
        """Write the report to one safetensors file."""
        values = asdict(self)
        del values["table"]
        tensors = {name: torch.tensor(self.table[name].to_numpy()) for name in _COLUMNS}
        write_result(path, "ConflictReport", tensors, values)

    @classmethod
    def load(cls, path: str | Path) -> "ConflictReport":
        """Read what `save` wrote; the classes are computed again."""
        path = Path(path)
        shapes = {name: "int neuron" if name in ("layer", "neuron") else "float neuron" for name in _COLUMNS}
        objects = ("cosine", "chance", "reliability", "n_pairs", "n_prompts", "provenance")
        tensors, values = read_result(
            path, "ConflictReport", tensors=shapes, values=dict.fromkeys(objects, dict) | {"min_share": float}
        )
        table = pd.DataFrame({name: tensors[name].numpy() for name in _COLUMNS})
        places = table[["layer", "neuron"]].to_numpy()
        layers, neurons = (places.max(0) + 1).tolist() if len(places) else (0, 0)
        # The product is compared first, because a number in a file may be arbitrarily large.
        if layers * neurons != len(places) or not (places == np.indices((layers, neurons)).reshape(2, -1).T).all():
            raise StorageError(
                f"{path}: damaged: expected one row per neuron, ordered by layer and neuron. Save the result again."
            )
        cosine = read_record(path, Estimate, values["cosine"])
        return cls(
            table=_classified(table, values["min_share"], cosine.level),
            cosine=cosine,
            chance={name: read_record(path, Null, values["chance"].get(name)) for name in ("coin", "shuffle")},
            reliability=read_numbers(path, float, values["reliability"], OBJECTIVES),
            n_pairs=read_numbers(path, int, values["n_pairs"], OBJECTIVES),
            n_prompts=read_numbers(path, int, values["n_prompts"], OBJECTIVES),
            min_share=values["min_share"],
            provenance={name: Provenance.from_dict(values["provenance"].get(name)) for name in OBJECTIVES},
        )

    def __repr__(self) -> str:
        where, level = self.provenance["helpful"], self.cosine.level
        sizes = [f"{self.n_pairs[one]} {one} pairs of {self.n_prompts[one]} prompts" for one in OBJECTIVES]
        return "\n".join([
            f"ConflictReport: {len(self.table)} {where.site} neurons of {where.architecture}, {where.label}",
            f"{', '.join(sizes)}; positions {where.positions}",
            f"neurons by class (q at most {1 - level:.3g}, at least {self.min_share:g} of the largest contribution):",
            *(f"  {name:<26}{n:>8}" for name, n in self.counts().items()),
            f"cosine of mean contributions  {self.cosine} (level {level:g}, over prompts)",
            f"  random signs per prompt     {self.chance['coin']}",
            f"  |cosine|, prompts shuffled  {self.chance['shuffle']}",
            *(f"  {one + ', two halves':<28}{self.reliability[one]:.3f}" for one in OBJECTIVES),
        ])  # fmt: skip


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
    helpful: PairAttributions,
    harmless: PairAttributions,
    *,
    min_share: float = 0.05,
    level: float = 0.95,
    seed: int = 0,
) -> ConflictReport:
    """Compare what the neurons of one model do to helpful and to harmless margins. No model pass.

    A neuron counts for an objective if its q-value is at most `1 - level` and the magnitude of its mean contribution is
    at least `min_share` of the objective's largest. `min_share` matters because with many prompts even tiny
    contributions have small q-values; at the default, twenty neurons at the limit add up to the largest.

    Standard errors treat pairs of one prompt together (the linearised variance of a ratio of sums, Cochran 1977).
    p-values are Student's t over prompts; q-values are Benjamini and Hochberg's over all neurons of the objective. The
    interval and both null distributions use 1,000 draws of prompts each; a prompt in both objectives is drawn for both
    at once. Memory: a copy of the scores, 100 kB per prompt, and 8 bytes per pair of prompts.

    Raises `ProvenanceError` unless model, site, positions and method agree, `DataError` for fewer than two prompts,
    scores that are not finite, and means that are all 0.

    Examples:
        >>> from rmtension import PreferencePairs
        >>> rows = [{"prompt": prompt, "chosen": "yes", "rejected": "no"} for prompt in "abcd"]
        >>> pairs = PreferencePairs.from_records(rows)
        >>> where = Provenance("toy", "0f", "mlp", "all", "direct_effect", "float32", "", 4, 64, "0", sign=1)
        >>> helpful = PairAttributions(torch.tensor([[[3.0, 4.0, 0.0]]] * 4), pairs, where)
        >>> harmless = PairAttributions(torch.tensor([[[3.0, -4.0, 0.0]]] * 4), pairs, where)
        >>> report = conflict(helpful, harmless)
        >>> print(report.cosine, list(report.sets["helpful up, harmless down"]))
        -0.280 [-0.280, -0.280] [(0, 1)]
    """
    for name, scores in (("helpful", helpful), ("harmless", harmless)):
        require_arguments("conflict(helpful, harmless)", **{name: (scores, PairAttributions)})
    if not 0 <= min_share < 1:
        raise OptionError(f"min_share: expected a share of the largest contribution in [0, 1), got {min_share}.")
    check_level(level)
    same = ("architecture", "model", "site", "positions", *METHOD_FIELDS, "sign")
    helpful.provenance.require_same(harmless.provenance, same, what="conflict")
    both = dict(zip(OBJECTIVES, (helpful, harmless), strict=True))
    table, cells = _summarised(both)
    generator = np.random.default_rng(seed)
    observed = float(cells.between(np.ones((1, len(cells.prompt))))[0])
    resamples, coin = cells.between(cells.resampled(generator)), cells.between(cells.flipped(generator))
    shuffle = np.abs(cells.reassigned(generator, flipped=observed < 0))
    low, high = percentile_interval((resamples - resamples.mean()) * cells.stretch + observed, level)
    # The tolerance counts cosines that are equal up to rounding as extreme.
    extreme = np.abs(coin) >= abs(observed) - 1e-9, shuffle <= abs(observed) + 1e-9
    halves = [cells.halves(generator, is_member) for is_member in cells.of]
    n = len(helpful) + len(harmless)
    return ConflictReport(
        table=_classified(table, min_share, level),
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


def _classified(table: pd.DataFrame, min_share: float, level: float) -> pd.DataFrame:
    """The table with the class of every neuron."""
    signs = []
    for one in OBJECTIVES:
        size = table[one].abs()
        counts = (table[f"{one}_q_value"] <= 1 - level) & (size >= min_share * size.max())
        signs.append((np.sign(table[one]) * counts).astype(int))
    return table.assign(**{"class": [CLASSES[pair] for pair in zip(*signs, strict=True)]})


@dataclass(frozen=True, eq=False)
class _Cells:
    """Inner products between cells. A cell is the sum over a prompt's pairs of one objective, in units of its mean.

    Every draw weights the cells, and the cosine of two weighted sums needs only quadratic forms of these inner
    products, so no draw touches the scores of neurons.
    """

    gram: Float[np.ndarray, "cell cell"]
    prompt: Int[np.ndarray, "cell"]
    of: Float[np.ndarray, "2 cell"]  # row 0 is 1 for cells of helpful pairs, row 1 for cells of harmless pairs

    @property
    def kind(self) -> Int[np.ndarray, "prompt"]:
        """The kind of every prompt: 1 if it has only helpful pairs, 2 only harmless ones, 3 both."""
        return np.bincount(self.prompt, weights=np.array([1, 2]) @ self.of).astype(np.int64)

    @property
    def stretch(self) -> float:
        """The square root of the factor by which resampling lengthens the two vectors: variances of cells add up."""
        squares = ((self.of @ self.gram) * self.of).sum(1)
        factors = 1 + self.of @ np.diag(self.gram) / squares - 1 / self.of.sum(1)
        return float(factors.prod() ** 0.25)

    def cosines(
        self, first: Float[np.ndarray, "draw cell"], second: Float[np.ndarray, "draw cell"]
    ) -> Float[np.ndarray, "draw"]:
        """The cosine of two weighted sums in every draw; 0 if one of the sums is 0 up to rounding."""
        sides = np.stack([first, second])
        along = sides @ self.gram
        squares = (along * sides).sum(2)
        longest = np.abs(sides) @ np.sqrt(np.diag(self.gram))
        lengths = np.sqrt(np.where(squares > 1e-14 * longest**2, squares, np.inf))
        cosines: Float[np.ndarray, "draw"] = np.clip((along[0] * second).sum(1) / lengths[0] / lengths[1], -1, 1)
        return cosines

    def between(self, weights: Float[np.ndarray, "draw cell"]) -> Float[np.ndarray, "draw"]:
        """The cosines between the objectives."""
        return self.cosines(weights * self.of[0], weights * self.of[1])

    def resampled(self, generator: np.random.Generator) -> Float[np.ndarray, "draw cell"]:
        """Weights of prompts drawn with replacement, separately from each kind of prompts."""
        counts = np.zeros((_N_DRAWS, len(self.kind)))
        for kind in np.unique(self.kind):
            members = np.flatnonzero(self.kind == kind)
            counts[:, members] = generator.multinomial(len(members), np.full(len(members), 1 / len(members)), _N_DRAWS)
        return counts[:, self.prompt]

    def flipped(self, generator: np.random.Generator) -> Float[np.ndarray, "draw cell"]:
        """Weights of prompts whose pairs are sign-flipped at random, one sign per prompt."""
        return generator.choice([-1.0, 1.0], (_N_DRAWS, len(self.kind)))[:, self.prompt]

    def reassigned(self, generator: np.random.Generator, *, flipped: bool) -> Float[np.ndarray, "draw"]:
        """Cosines with prompts randomly reassigned, keeping the objectives' sizes; prompts in both swap at random."""
        first = np.abs(self.of[0] - generator.integers(2, size=(_N_DRAWS, len(self.kind)))[:, self.prompt])
        single = self.kind[self.prompt] < 3
        first[:, single] = generator.permuted(np.tile(self.of[0, single], (_N_DRAWS, 1)), axis=1)
        signs = self.of[0] - self.of[1] if flipped else np.ones(len(single))
        return self.cosines(first * signs, (1 - first) * signs)

    def halves(self, generator: np.random.Generator, is_member: Float[np.ndarray, "cell"]) -> Float[np.ndarray, "draw"]:
        """Cosines between random halves of one objective's prompts; an odd prompt is in the second half."""
        first = np.zeros((_N_DRAWS, len(is_member)))
        half = np.arange(is_member.sum()) < is_member.sum() // 2
        first[:, is_member > 0] = generator.permuted(np.tile(half, (_N_DRAWS, 1)), axis=1)
        return self.cosines(first, is_member - first)


def _summarised(both: Mapping[str, PairAttributions]) -> tuple[pd.DataFrame, _Cells]:
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
    prompts = {prompt: place for place, prompt in enumerate(dict.fromkeys(prompt for _, prompt in cells))}
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
    places = np.indices(tuple(values["helpful"].shape[1:])).reshape(2, -1)
    numbers = np.stack([mean.numpy(), stderr.numpy(), p_value, q_value], axis=1).reshape(-1, mean.shape[1])
    lengths = of.T @ mean.norm(dim=1)
    inner = (gram / torch.outer(lengths, lengths)).numpy()
    table = pd.DataFrame(dict(zip(_COLUMNS, [*places, *numbers], strict=True)))
    return table, _Cells(inner, np.array([prompts[prompt] for _, prompt in cells]), of.numpy())
