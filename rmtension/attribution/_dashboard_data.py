"""What the dashboards of some neurons consist of: tables, and texts with activations."""

from dataclasses import dataclass
from typing import Any

import pandas as pd

from rmtension._sites import neuron_name


@dataclass(frozen=True)
class ActiveText:
    """Part of one text as tokens, with a neuron's activation at each token.

    `first` is the index of the first token shown, of `n_tokens` in all; the response begins at token `response_start`.
    `peak` is the index, among the shown tokens, of the most active token of those that scores are computed at, and
    `special` has the indices of special tokens, such as an end-of-text token.
    """

    tokens: tuple[str, ...]
    activations: tuple[float, ...]
    special: tuple[int, ...]
    first: int
    peak: int
    response_start: int
    n_tokens: int


@dataclass(frozen=True)
class NeuronExample:
    """One pair on which a neuron is very active."""

    layer: int
    neuron: int
    group: str
    pair: str
    chosen: ActiveText
    rejected: ActiveText


@dataclass(frozen=True, eq=False, repr=False)
class DashboardData:
    """The contents of `NeuronDashboards`, which documents them."""

    table: pd.DataFrame
    scatter: pd.DataFrame
    distribution: pd.DataFrame
    correlated: pd.DataFrame
    tokens: pd.DataFrame
    descriptions: pd.DataFrame
    examples: tuple[NeuronExample, ...]
    about: dict[str, Any]

    @property
    def groups(self) -> tuple[str, ...]:
        """The names of the groups of pairs, in order."""
        return tuple(self.about["pairs"])

    @property
    def neurons(self) -> list[tuple[int, int]]:
        """The neurons asked for as (layer, neuron), without the random controls."""
        rows = self.table[self.table["set"] == "asked for"]
        return list(zip(rows["layer"].tolist(), rows["neuron"].tolist(), strict=True))

    def of(self, name: str, layer: int, neuron: int) -> pd.DataFrame:
        """The rows of one neuron in the table called `name`."""
        frame: pd.DataFrame = getattr(self, name)
        return frame[(frame["layer"] == layer) & (frame["neuron"] == neuron)]


def name_in(data: DashboardData, layer: int, neuron: int) -> str:
    """The name of a neuron on the page, such as "L2 N48"."""
    return neuron_name(data.about["site"], layer, neuron, data.about["architecture"])
