"""The report on conflict within one model: a class per neuron, a cosine between objectives, and its controls."""

from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from rmtension.errors import StorageError
from rmtension.evaluation._intervals import Estimate
from rmtension.neurons._neuron_set import NeuronSet
from rmtension.store._provenance import Provenance
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
COLUMNS = ("layer", "neuron", *(objective + number for objective in OBJECTIVES for number in _NUMBERS))


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
    the observed cosine, and stretched by the geometric mean of the factors by which noise lengthens the two vectors
    (simulated 95% intervals cover 94% to 98%; without the stretch, 87% to 94%). Noise also keeps a cosine below 1:
    `reliability` is the cosine of an objective with itself, from random halves of its prompts, averaged over divisions.
    `chance` holds two null distributions:

    - "coin", of the cosine: each prompt's pairs are sign-flipped at random, with one sign for all its pairs in both
      objectives. The mean is near 0 if no prompt is in both objectives. The p-value is the share of draws whose
      |cosine| is at least as large as the observed one.
    - "shuffle", of |cosine|: prompts are randomly reassigned between the objectives, as if both used the same neurons.
      Each objective is scaled by the length of its mean vector, and harmless is sign-flipped first if the cosine is
      negative, because opposite vectors would cancel in the mixture. The p-value is the share of draws whose |cosine|
      is at most as large as the observed one.

    Examples:
        >>> from rmtension.neurons import conflict
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
        tensors = {name: torch.tensor(self.table[name].to_numpy()) for name in COLUMNS}
        write_result(path, "ConflictReport", tensors, values)

    @classmethod
    def load(cls, path: str | Path) -> "ConflictReport":
        """Read what `save` wrote; the classes are computed again."""
        path = Path(path)
        shapes = {name: "int neuron" if name in ("layer", "neuron") else "float neuron" for name in COLUMNS}
        objects = ("cosine", "chance", "reliability", "n_pairs", "n_prompts", "provenance")
        tensors, values = read_result(
            path, "ConflictReport", tensors=shapes, values=dict.fromkeys(objects, dict) | {"min_share": float}
        )
        table = pd.DataFrame({name: tensors[name].numpy() for name in COLUMNS})
        indices = table[["layer", "neuron"]].to_numpy()
        layers, neurons = (indices.max(0) + 1).tolist() if len(indices) else (0, 0)
        # The product is compared first, because a number in a file may be arbitrarily large.
        if layers * neurons != len(indices) or not (indices == np.indices((layers, neurons)).reshape(2, -1).T).all():
            raise StorageError(
                f"{path}: damaged: expected one row per neuron, ordered by layer and neuron. Save the result again."
            )
        cosine = read_record(path, Estimate, values["cosine"])
        return cls(
            table=classified(table, values["min_share"], cosine.level),
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
        sizes = [f"{self.n_pairs[name]} {name} pairs of {self.n_prompts[name]} prompts" for name in OBJECTIVES]
        return "\n".join([
            f"ConflictReport: {len(self.table)} {where.site} neurons of {where.architecture}, {where.label}",
            f"{', '.join(sizes)}; positions {where.positions}",
            f"neurons by class (q at most {1 - level:.3g}, at least {self.min_share:g} of the largest contribution):",
            *(f"  {name:<26}{n:>8}" for name, n in self.counts().items()),
            f"cosine of mean contributions  {self.cosine} (level {level:g}, over prompts)",
            f"  random signs per prompt     {self.chance['coin']}",
            f"  |cosine|, prompts shuffled  {self.chance['shuffle']}",
            *(f"  {name + ', two halves':<28}{self.reliability[name]:.3f}" for name in OBJECTIVES),
        ])  # fmt: skip


def classified(table: pd.DataFrame, min_share: float, level: float) -> pd.DataFrame:
    """The table with the class of every neuron."""
    signs = []
    for objective in OBJECTIVES:
        size = table[objective].abs()
        counts = (table[f"{objective}_q_value"] <= 1 - level) & (size >= min_share * size.max())
        signs.append((np.sign(table[objective]) * counts).astype(int))
    return table.assign(**{"class": [CLASSES[pair] for pair in zip(*signs, strict=True)]})
