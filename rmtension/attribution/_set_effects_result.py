"""The result of `predict_set_effects`: predicted effects of sets, and how well sets that were ablated are predicted."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from scipy import stats

from rmtension.store._provenance import Provenance
from rmtension.store._records import read_table, written_tables
from rmtension.store._storage import read_result, write_result


@dataclass(frozen=True, eq=False)
class SetEffects:
    """The predicted effects of ablating sets, which `predict_set_effects` returns.

    `table` has one row per set: its `size`, the `predicted` change of the mean margin over the pairs, with an interval,
    `low` and `high`, and the sums of the single predictions: `attribution_patching` and `relp`.

    The intervals come from the sets that were truly ablated: each was predicted from the others, and the errors, which
    may grow with the scores of a set, are as large for a new set as for these (cross-conformal prediction, Vovk 2015).
    They include what ablating on a few pairs adds to the error, so they tend to be wide.

    `checked` has one row per truly ablated set: how many `pairs` it ran, the `effect` on them, and the effect on them
    `predicted` from the other sets.
    `spearman` and `slope` compare both columns: the rank correlation, and the least-squares slope of effects on
    predictions, which is 1 if predictions have the right size.

    Examples:
        >>> from rmtension.attribution import predict_set_effects
        >>> sets = {"top 2": scores.top(k=2), "top 8": scores.top(k=8), "top 12": scores.top(k=12)}
        >>> predicted = predict_set_effects(head, pairs["helpful"], sets, passes=12, progress=False)
        >>> list(predicted.table.columns)
        ['set', 'size', 'predicted', 'low', 'high', 'attribution_patching', 'relp']
        >>> predicted.save("effects.safetensors")
        >>> SetEffects.load("effects.safetensors").table.equals(predicted.table)
        True
    """

    table: pd.DataFrame
    checked: pd.DataFrame
    provenance: Provenance
    level: float

    @property
    def spearman(self) -> float:
        """The rank correlation of effects with predictions, over the truly ablated sets."""
        return float(stats.spearmanr(self.checked["predicted"], self.checked["effect"]).statistic)

    @property
    def slope(self) -> float:
        """The least-squares slope of effects on predictions, over the truly ablated sets."""
        return float(np.polyfit(self.checked["predicted"], self.checked["effect"], 1)[0])

    def to_frame(self) -> pd.DataFrame:
        """The table `table`."""
        return self.table

    def __repr__(self) -> str:
        return (
            f"SetEffects(of {len(self.table)} sets; {len(self.checked)} ablated on a few pairs: Spearman "
            f"{self.spearman:.2f}, slope {self.slope:.2f})"
        )

    def save(self, path: str | Path) -> None:
        """Write both tables and the provenance to one safetensors file."""
        values: dict[str, Any] = {
            **written_tables(table=self.table, checked=self.checked),
            "provenance": self.provenance.to_dict(),
            "level": self.level,
        }
        write_result(path, "SetEffects", {}, values)

    @classmethod
    def load(cls, path: str | Path) -> "SetEffects":
        """Read a file that `save` wrote; raises `StorageError` if it is missing, damaged or of another kind."""
        path = Path(path)
        expected = {"table": dict, "checked": dict, "provenance": dict, "level": float}
        _, values = read_result(path, "SetEffects", tensors={}, values=expected)
        tables = {name: read_table(path, values[name], ["set"]) for name in ("table", "checked")}
        return cls(**tables, provenance=Provenance.from_dict(values["provenance"]), level=values["level"])
