"""The result of `faithfulness`: agreement of scores with true effects, per method, per neuron and per set."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from rmtension.errors import StorageError
from rmtension.evaluation._intervals import with_interval
from rmtension.neurons._score_agreement import MEASURES
from rmtension.store._provenance import Provenance
from rmtension.store._records import read_table, written_tables
from rmtension.store._storage import read_result, write_result


@dataclass(frozen=True, eq=False)
class Faithfulness:
    """How well the scores of each method agree with the true effects of ablation; `faithfulness` returns it.

    `summary` has one row per method: `n` neurons compared and, each with its interval (`_low`, `_high`),

    - `spearman`: rank correlation of predicted and true effects of single neurons;
    - `sign_agreement`: among neurons where neither effect is 0, the share whose true effect has the predicted sign;
    - `top_precision`: among the `top` neurons (10%) with the largest predicted magnitude, the share that is also among
      the `top` with the largest true magnitude; chance gives `top / n`;
    - `slope`: least-squares slope of the true effect on the predicted effect; 1 if predictions have the right size.

    Scores without a direction (`aggregate="absolute"`, magnitudes of activations) are compared with magnitudes, and
    have no sign agreement.

    `neurons` has one row per ablated neuron: layer, neuron, its true effect and standard error, and one column of
    predicted effects per method. `sets` has one row per method and fraction: `size`, the `predicted` effect of ablating
    these neurons together (the sum of their predicted effects), the true `effect` with `low` and `high` over prompts,
    and the `random` control: mean, smallest and largest effect of `n_random` random sets of equal size. `match` is
    "layer" if the random sets have the same number of neurons in every layer, "model" if only the total is the same,
    because the set takes more than half of some layer.

    Examples:
        >>> from rmtension.attribution import faithfulness
        >>> result = faithfulness(head, pairs["helpful"], scores, set_fractions=(0.1,), n_random=2, progress=False)
        >>> print(str(result).splitlines()[0])
        Faithfulness to the effect of ablation to zero (24 pairs, 0.95 intervals)
        >>> result.sets[["method", "size", "predicted", "effect", "random"]].round(2)
                          method  size  predicted  effect  random
        0  gradient_x_activation     5      -4.73   -4.73   -0.21
        >>> result.save("faithfulness.safetensors")
        >>> Faithfulness.load("faithfulness.safetensors").summary.equals(result.summary)
        True
    """

    summary: pd.DataFrame
    neurons: pd.DataFrame
    sets: pd.DataFrame
    provenance: Provenance
    level: float

    def to_frame(self) -> pd.DataFrame:
        """The table `summary`."""
        return self.summary

    def __repr__(self) -> str:
        lines = [
            f"Faithfulness to the {self.provenance.label} ({self.provenance.n_pairs} pairs, {self.level:g} intervals)"
        ]
        for row in self.summary.to_dict("records"):
            parts = [f"{name} {with_interval(row[name], row[f'{name}_low'], row[f'{name}_high'])}" for name in MEASURES]
            lines.append(f"  {row['method']} (n = {row['n']}): {', '.join(parts)}")
        return "\n".join(lines)

    def save(self, path: str | Path) -> None:
        """Write the three tables and the provenance to one safetensors file."""
        columns = {name: torch.from_numpy(column.to_numpy(copy=True)) for name, column in self.neurons.items()}
        values: dict[str, Any] = {
            **written_tables(summary=self.summary, sets=self.sets),
            "columns": list(columns),
            "provenance": self.provenance.to_dict(),
            "level": self.level,
        }
        write_result(path, "Faithfulness", {str(name): column for name, column in columns.items()}, values)

    @classmethod
    def load(cls, path: str | Path) -> "Faithfulness":
        """Read a file that `save` wrote; raises `StorageError` if it is missing, damaged or of another kind."""
        path = Path(path)
        expected = {"summary": dict, "sets": dict, "columns": list, "provenance": dict, "level": float}
        tensors, values = read_result(path, "Faithfulness", tensors={"*": "any neuron"}, values=expected)
        names = values["columns"]
        if not all(isinstance(name, str) for name in names) or sorted(names) != sorted(tensors):
            raise StorageError(f"{path}: damaged: its columns differ from the names it lists. Save the result again.")
        neurons = pd.DataFrame({name: tensors[name].numpy() for name in names})
        shown = ["method", "n", *(name + end for name in MEASURES for end in ("", "_low", "_high"))]
        summary, sets = read_table(path, values["summary"], shown), read_table(path, values["sets"], ["method"])
        return cls(summary, neurons, sets, Provenance.from_dict(values["provenance"]), values["level"])
