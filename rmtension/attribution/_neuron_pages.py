"""Neuron pages: scores of single neurons on every objective, effects of ablation, and top-activating texts."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from rmtension.attribution._neuron_pages_json import pages_to_json, read_pages
from rmtension.store._files import write_text


@dataclass(frozen=True)
class ActiveText:
    """Part of one text as tokens, with a neuron's activation at each token.

    `first` is the index of the first token shown, of `n_tokens` in all; the response begins at token `response_start`.
    """

    tokens: tuple[str, ...]
    activations: tuple[float, ...]
    first: int
    response_start: int
    n_tokens: int


@dataclass(frozen=True)
class NeuronExample:
    """One pair on which a neuron is very active."""

    layer: int
    neuron: int
    objective: str
    pair: str
    chosen: ActiveText
    rejected: ActiveText


@dataclass(frozen=True, eq=False, repr=False)
class NeuronPages:
    """Scores, effects and top-activating texts of some neurons of one model; `examine` returns it.

    `table` has one row per examined neuron (`set` is "asked for") and one per random control neuron ("random"), with
    columns `<objective>_score`, `_score_stderr`, `_effect`, `_effect_low`, `_effect_high` and `_n`. `scatter` has the
    scores of all neurons, or of a random part of them. `distribution` is a histogram of each neuron's largest
    activation (in magnitude) per text. `examples` holds the pairs with the largest activation. `about` names the model,
    site, pairs and method; `about["sign"]` tells what a positive score means (`Provenance.sign`).

    Examples:
        >>> from rmtension.attribution import examine
        >>> pages = examine(head, pairs, neurons, n_examples=1, progress=False)
        >>> pages
        NeuronPages(2 mlp neurons of gpt2-2x24-heads2x12-d24; 24 helpful, 24 harmless)
        >>> pages.to_frame()[["set", "layer", "helpful_effect"]].round(1)
                 set  layer  helpful_effect
        0  asked for      0            -1.0
        1  asked for      1            -1.0
        2     random      0            -0.6
        3     random      1             0.0
        >>> pages.save("neurons.json")
        >>> NeuronPages.load("neurons.json").neurons == pages.neurons
        True
    """

    table: pd.DataFrame
    scatter: pd.DataFrame
    distribution: pd.DataFrame
    examples: tuple[NeuronExample, ...]
    about: dict[str, Any]

    @property
    def objectives(self) -> tuple[str, ...]:
        """The names of the objectives, in order."""
        return tuple(self.about["pairs"])

    @property
    def neurons(self) -> list[tuple[int, int]]:
        """The examined neurons as (layer, neuron), without the random controls."""
        rows = self.table[self.table["set"] == "asked for"]
        return list(zip(rows["layer"].tolist(), rows["neuron"].tolist(), strict=True))

    def __repr__(self) -> str:
        pairs = ", ".join(f"{n} {name}" for name, n in self.about["pairs"].items())
        return f"NeuronPages({len(self.neurons)} {self.about['site']} neurons of {self.about['architecture']}; {pairs})"

    def to_frame(self) -> pd.DataFrame:
        """A copy of `table`."""
        return self.table.copy()

    def save(self, path: str | Path) -> None:
        """Write everything to one JSON file."""
        frames = {name: getattr(self, name) for name in ("table", "scatter", "distribution")}
        write_text(
            Path(path),
            pages_to_json(frames, [asdict(example) for example in self.examples], self.about),
            "neuron pages",
        )

    @classmethod
    def load(cls, path: str | Path) -> "NeuronPages":
        """Read a file that `save` wrote; raises `StorageError` for any other file."""
        frames, examples, about = read_pages(Path(path))
        read = (
            NeuronExample(**fields | {side: ActiveText(**fields[side]) for side in ("chosen", "rejected")})
            for fields in examples
        )
        return cls(**frames, examples=tuple(read), about=about)
