"""What an inspection of one reward model found: tables, scores, maps of every two groups, and dashboards."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd

from rmtension._repr_html import html_table
from rmtension.attribution._faithfulness_result import Faithfulness
from rmtension.attribution._neuron_dashboards import NeuronDashboards
from rmtension.distributed import current
from rmtension.errors import OptionError, StorageError
from rmtension.neurons._conflict_report import ConflictReport
from rmtension.neurons._neuron_scores import NeuronScores
from rmtension.store._files import filled_whole
from rmtension.study._inspection_findings import findings, undecided

_SUMMARY, _AGREEMENT, _DASHBOARDS = "inspection.json", "faithfulness.safetensors", "dashboards.json"
# Labels are text, also "1" and "True".
_TEXTS = dict.fromkeys(
    ("set", "group", "output", "first", "second", "measure", "quantity", "note", "check", "method"), str
)
TABLES = (
    "groups",
    "neurons",
    "maps",
    "faithfulness",
    "faithfulness_sets",
    "effects",
    "checks",
    "outputs",
    "output_maps",
)


@dataclass(frozen=True, eq=False, repr=False)
class ModelInspection:
    """The result of `inspect_model`.

    `tables` holds data frames by name:

    - `groups`: accuracy, margin, the accuracy of preferring the longer response, and refusing and responding where
      subsets are labelled, per group, with intervals; `note` says what a group is too small for;
    - `neurons`: the score of every neuron for every group, with standard errors, and whether it is in its top set;
    - `maps`: the cosine of every two groups' attributions with its null distributions, and how many neurons support or
      oppose both, or one against the other;
    - `effects`: the table of `ablation_effects` for every group's top set and the neurons shared by several;
    - `faithfulness`, `faithfulness_sets`: how far the scores predict true ablations of this model;
    - `checks`: whether rewards and hooks are right on this model (`RewardHead.check`);
    - `outputs`, `output_maps`, if outputs are compared: per output and group, accuracy, margin, and the correlation of
      its margins with those of the inspected output; and for every two outputs what `maps` has for groups, on the same
      pairs.

    `scores` has the scores of every group, `maps` a `ConflictReport` per pair of groups, `output_maps` one per two
    outputs, `agreement` the `Faithfulness`
    of the scores, `dashboards` the neurons that matter. `summary` names the model, the pairs, the settings, and the
    predicted and measured time of every step.

    Examples:
        >>> inspection = inspect_model(head, pairs["helpful"] + pairs["harmless"], by="objective", progress=False)
        >>> inspection
        ModelInspection(gpt2-2x24-heads2x12-d24; 24 helpful, 24 harmless pairs; 7 tables)
        >>> inspection.save("inspection").name
        'inspection'
        >>> ModelInspection.load("inspection").to_frame("effects").shape == inspection.to_frame("effects").shape
        True
    """

    tables: Mapping[str, pd.DataFrame]
    scores: Mapping[str, NeuronScores]
    maps: Mapping[tuple[str, str], ConflictReport]
    agreement: Faithfulness | None
    dashboards: NeuronDashboards | None
    summary: Mapping[str, Any]
    output_maps: Mapping[tuple[str, str], ConflictReport] = field(default_factory=dict)

    def to_frame(self, table: str = "effects") -> pd.DataFrame:
        """A copy of one table; raises `OptionError` for a table that this inspection does not have."""
        if table not in self.tables:
            raise OptionError(f"table: expected one of {list(self.tables)}, got {table!r}.")
        return self.tables[table].copy()

    def findings(self) -> list[str]:
        """The answer in sentences, with intervals and controls; a model whose checks fail comes first."""
        return findings(self.tables)

    def undecided(self) -> list[str]:
        """What these pairs do not show, in sentences."""
        return undecided(self.tables)

    def __repr__(self) -> str:
        sizes = ", ".join(f"{n:,} {name}" for name, n in self.summary["plan"]["pairs"].items())
        return f"ModelInspection({self.summary['architecture']}; {sizes} pairs; {len(self.tables)} tables)"

    def _repr_html_(self) -> str:
        return html_table(repr(self), self.tables["groups"])

    def save(self, folder: str | Path, *, overwrite: bool = False) -> Path:
        """Write one CSV file per table, one file per result, and `inspection.json`; returns the folder.

        Raises `StorageError` for a folder that holds an inspection unless `overwrite` is True.
        """
        folder = Path(folder)
        if not current().is_first:
            return folder
        if (folder / _SUMMARY).exists() and not overwrite:
            raise StorageError(f"{folder} holds an inspection. Use another folder, or pass overwrite=True.")
        with filled_whole(folder, "inspection", seal=_SUMMARY, replaced=[f"{name}.csv" for name in TABLES]) as filling:
            for name, frame in self.tables.items():
                frame.to_csv(filling / f"{name}.csv", index=False)
            for number, scores in enumerate(self.scores.values()):
                scores.save(filling / f"scores-{number}.safetensors")
            for number, report in enumerate(self.maps.values()):
                report.save(filling / f"map-{number}.safetensors")
            for number, report in enumerate(self.output_maps.values()):
                report.save(filling / f"output-map-{number}.safetensors")
            if self.agreement is not None:
                self.agreement.save(filling / _AGREEMENT)
            if self.dashboards is not None:
                self.dashboards.save(filling / _DASHBOARDS)
            listed = {
                "tables": list(self.tables),
                "scores": list(self.scores),
                "maps": [list(names) for names in self.maps],
                "output_maps": [list(names) for names in self.output_maps],
                "agreement": self.agreement is not None,
                "dashboards": self.dashboards is not None,
            }
            text = json.dumps({"summary": dict(self.summary), **listed}, indent=2)
            (filling / _SUMMARY).write_text(text + "\n", encoding="utf-8")
        return folder

    @classmethod
    def load(cls, folder: str | Path) -> "ModelInspection":
        """Read a folder that `save` wrote; raises `StorageError` if it holds no finished inspection."""
        folder = Path(folder)
        try:
            listed = json.loads((folder / _SUMMARY).read_text(encoding="utf-8"))
            tables = {
                name: pd.read_csv(folder / f"{name}.csv", keep_default_na=False, na_values=[""], dtype=_TEXTS)
                for name in TABLES
                if name in listed["tables"]
            }
            tables["groups"]["note"] = tables["groups"]["note"].astype(object).fillna("")
            scores = {
                name: NeuronScores.load(folder / f"scores-{number}.safetensors")
                for number, name in enumerate(listed["scores"])
            }
            maps = {
                (first, second): ConflictReport.load(folder / f"map-{number}.safetensors")
                for number, (first, second) in enumerate(listed["maps"])
            }
            output_maps = {
                (first, second): ConflictReport.load(folder / f"output-map-{number}.safetensors")
                for number, (first, second) in enumerate(listed["output_maps"])
            }
            agreement = Faithfulness.load(folder / _AGREEMENT) if listed["agreement"] else None
            dashboards = NeuronDashboards.load(folder / _DASHBOARDS) if listed["dashboards"] else None
            return cls(tables, scores, maps, agreement, dashboards, listed["summary"], output_maps)
        except StorageError:
            raise
        except (OSError, ValueError, KeyError, AttributeError, TypeError, RecursionError) as error:
            raise StorageError(f"{folder} has no finished inspection ({error}). Run inspect_model first.") from error
