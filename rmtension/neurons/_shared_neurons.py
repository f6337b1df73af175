"""Which neurons several models share, compared with chance and with their base model."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from itertools import combinations
from pathlib import Path

import pandas as pd

from rmtension._arguments import require_arguments
from rmtension._repr_html import html_table
from rmtension.errors import OptionError, StorageError
from rmtension.neurons._neuron_scores import NeuronScores
from rmtension.neurons._neuron_set import NeuronSet
from rmtension.neurons._overlap import Overlap, depth_thirds
from rmtension.store._provenance import METHOD_FIELDS, Provenance
from rmtension.store._storage import read_result, write_result


@dataclass(frozen=True, eq=False)
class SharedNeuronReport:
    """The top sets of several models and how they overlap.

    `sets` holds each model's top set, `shared` the neurons in all of them, `specific[name]` those in that set only.
    `overlap[a, b]` compares two sets; `beyond_base[a, b]` does so after removing the base model's top set from both.

    Examples:
        >>> report = SharedNeuronAnalyzer({"one": scores, "other": scores}).analyze(fraction=0.125)
        >>> report.jaccard, round(report.expected_jaccard, 3), f"{report.p_value:.1g}"
        (1.0, 0.072, '8e-08')
    """

    sets: dict[str, NeuronSet]
    shared: NeuronSet
    specific: dict[str, NeuronSet]
    overlap: dict[tuple[str, str], Overlap]
    beyond_base: dict[tuple[str, str], Overlap]
    base: NeuronSet | None
    fraction: float
    rank_by: str
    provenance: dict[str, Provenance]

    @classmethod
    def of(
        cls,
        sets: Mapping[str, NeuronSet],
        base: NeuronSet | None,
        *,
        fraction: float,
        rank_by: str,
        provenance: Mapping[str, Provenance],
    ) -> "SharedNeuronReport":
        """Compare `sets` with one another, and beyond `base`."""
        shared = next(iter(sets.values()))
        specific = {}
        for name, neurons in sets.items():
            shared = shared & neurons
            for other, others in sets.items():
                neurons = neurons if other == name else neurons - others
            specific[name] = neurons
        names = list(combinations(sets, 2))
        return cls(
            sets=dict(sets),
            shared=shared,
            specific=specific,
            overlap={(a, b): Overlap.of(sets[a], sets[b]) for a, b in names},
            beyond_base={} if base is None else {(a, b): Overlap.of(sets[a], sets[b], exclude=base) for a, b in names},
            base=base,
            fraction=fraction,
            rank_by=rank_by,
            provenance=dict(provenance),
        )

    @property
    def jaccard(self) -> float:
        """The Jaccard index of the two sets; with more than two sets, use `overlap[a, b]`."""
        return self._only().jaccard

    @property
    def coefficient(self) -> float:
        """The overlap coefficient of the two sets."""
        return self._only().coefficient

    @property
    def expected_jaccard(self) -> float:
        """The Jaccard index of the two sets that is expected by chance."""
        return self._only().expected_jaccard

    @property
    def p_value(self) -> float:
        """The probability of an intersection at least as large by chance."""
        return self._only().p_value

    def to_frame(self) -> pd.DataFrame:
        """One row per comparison; if a base was given, also one without the base model's top set."""
        rows = [
            {"a": a, "b": b, "without_base": without, **asdict(overlap)}
            for without, table in ((False, self.overlap), (True, self.beyond_base))
            for (a, b), overlap in table.items()
        ]
        return pd.DataFrame(rows)

    def __repr__(self) -> str:
        lines = [self._title()]
        for (a, b), overlap in self.overlap.items():
            lines.append(f"  {a} / {b}: {_in_words(overlap)}")
            if (a, b) in self.beyond_base:
                lines.append(f"    without the base's top set: {_in_words(self.beyond_base[a, b])}")
        return "\n".join(lines)

    def _title(self) -> str:
        names = ", ".join(map(str, self.sets))
        return (
            f"SharedNeuronReport(top {self.fraction:.3g} by {self.rank_by} of {names}; {len(self.shared)} neurons in "
            "all of them)"
        )

    def _repr_html_(self) -> str:
        """One row per comparison: sizes, and the Jaccard index with its chance levels, overall and within layers."""
        return html_table(self._title(), self.to_frame()[_SHOWN])

    def depth(self) -> pd.DataFrame:
        """One row per set: its size and its share in each third of the layers; `all neurons` is for comparison."""
        everything = next(iter(self.sets.values()))
        named = {
            **self.sets,
            **{f"{name} only": neurons for name, neurons in self.specific.items()},
            "shared": self.shared,
            **({"base": self.base} if self.base is not None else {}),
            "all neurons": everything | ~everything,
        }
        return pd.DataFrame([{"set": name, "size": len(s), **depth_thirds(s)} for name, s in named.items()])

    def save(self, path: str | Path) -> None:
        """Write the sets and their provenance to one safetensors file."""
        masks = {f"set/{name}": neurons.mask for name, neurons in self.sets.items()}
        first = next(iter(self.sets.values()))
        values = {
            "names": list(self.sets),
            "site": first.site,
            "architecture": first.architecture,
            "fraction": self.fraction,
            "rank_by": self.rank_by,
            "provenance": {name: provenance.to_dict() for name, provenance in self.provenance.items()},
        }
        write_result(
            path, "SharedNeuronReport", masks | ({"base": self.base.mask} if self.base is not None else {}), values
        )

    @classmethod
    def load(cls, path: str | Path) -> "SharedNeuronReport":
        """Read what `save` wrote; the comparisons are computed again from the sets."""
        tensors, values = read_result(
            path,
            "SharedNeuronReport",
            tensors={"set/*": "bool layer neuron"},
            optional={"base": "bool layer neuron"},
            values={
                "names": list,
                "site": str,
                "architecture": str,
                "fraction": float,
                "rank_by": str,
                "provenance": dict,
            },
        )
        names = values["names"]
        if not names or sorted(tensors.keys() - {"base"}) != sorted(f"set/{name}" for name in names):
            raise StorageError(f"{path}: damaged: its sets differ from the names it lists. Save the result again.")
        where = (values["site"], values["architecture"])
        return cls.of(
            {name: NeuronSet(tensors[f"set/{name}"], *where) for name in names},
            NeuronSet(tensors["base"], *where) if "base" in tensors else None,
            fraction=values["fraction"],
            rank_by=values["rank_by"],
            provenance={name: Provenance.from_dict(values["provenance"].get(name)) for name in names},
        )

    def _only(self) -> Overlap:
        if len(self.overlap) != 1:
            raise OptionError(
                f"report: expected a report with one comparison, got {len(self.overlap)}. Choose one of "
                f"overlap{list(self.overlap)}."
            )
        return next(iter(self.overlap.values()))


def _in_words(overlap: Overlap) -> str:
    """The Jaccard index with its chance levels, overall and within layers, as text."""
    if not overlap.size_a + overlap.size_b:
        return "both sets are empty"
    return (
        f"Jaccard {overlap.jaccard:.3f}, by chance {overlap.expected_jaccard:.3f} (p = {overlap.p_value:.2g}), within "
        f"layers {overlap.layer_expected_jaccard:.3f} (p = {overlap.layer_p_value:.2g})"
    )


# The columns that a notebook shows.
_SHOWN = [
    *("a", "b", "without_base", "size_a", "size_b", "intersection", "jaccard", "expected_jaccard", "p_value"),
    *("layer_expected_jaccard", "layer_p_value"),
]


class SharedNeuronAnalyzer:
    """Compares the top neurons of several models.

    Args:
        scores: name -> scores, at least two, of models with the same architecture, scored at one site and at the same
            positions by one method; otherwise `ProvenanceError`.
        base: scores of the model that all of them were trained from. Its own top neurons are inherited by the trained
            models, so an overlap that is not larger than this is no evidence that training made them share neurons.

    Examples:
        >>> attribution = NeuronAttribution(head, "gradient_x_activation")
        >>> by_objective = {name: attribution.score(part) for name, part in pairs.items()}
        >>> report = SharedNeuronAnalyzer(by_objective).analyze(fraction=0.125)
        >>> report.shared == organism.truth["shared"] | organism.truth["conflict"]
        True
    """

    def __init__(self, scores: Mapping[str, NeuronScores], *, base: NeuronScores | None = None) -> None:
        call = 'SharedNeuronAnalyzer({"name": scores, "other name": scores})'
        require_arguments(call, scores=(scores, Mapping))
        for name, each in [*scores.items(), *([("base", base)] if base is not None else [])]:
            require_arguments(call, **{f"scores of {name!r}": (each, NeuronScores)})
        if len(scores) < 2:
            raise OptionError(f"scores: expected at least two models to compare, got {len(scores)}. Call {call}.")
        first, *others = scores.values()
        for other in [*others, *([base] if base is not None else [])]:
            first.provenance.require_same(
                other.provenance, ("architecture", "site", "positions", *METHOD_FIELDS), what="SharedNeuronAnalyzer"
            )
        self.scores = dict(scores)
        self.base = base

    def analyze(self, *, fraction: float = 0.10, rank_by: str = "magnitude") -> SharedNeuronReport:
        """Take each model's top `fraction` of neurons and compare them. No model pass."""
        sets = {name: scores.top(fraction, rank_by=rank_by) for name, scores in self.scores.items()}
        base = None if self.base is None else self.base.top(fraction, rank_by=rank_by)
        provenance = {name: scores.provenance for name, scores in self.scores.items()}
        return SharedNeuronReport.of(sets, base, fraction=fraction, rank_by=rank_by, provenance=provenance)
