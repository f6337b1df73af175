"""The rewards of preference pairs."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import pandas as pd
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from rmtension._repr_html import N_ROWS, html_table
from rmtension.data._pairs import PreferencePairs
from rmtension.errors import StorageError
from rmtension.evaluation._intervals import bootstrap_mean, bootstrap_share
from rmtension.store._provenance import Provenance
from rmtension.store._records import read_objects
from rmtension.store._storage import read_result, write_result


@dataclass(frozen=True, eq=False)
class PairRewards:
    """The rewards of the chosen and the rejected response of every pair, in the order of `pairs`.

    `n_prompts_cut` and `n_responses_cut` count pairs that lost prompt tokens on the left, or response tokens on the
    right, to fit the context.

    Examples:
        >>> scored
        PairRewards(n=24, accuracy=1.000, ties=0)
        >>> scored.margin.equal(scored.chosen - scored.rejected), scored.accuracy()
        (True, 1.0)
        >>> scored.to_frame().columns.tolist()
        ['id', 'objective', 'subset', 'chosen', 'rejected', 'margin', 'correct', 'tied']
    """

    chosen: Float[Tensor, "pair"]
    rejected: Float[Tensor, "pair"]
    pairs: PreferencePairs
    provenance: Provenance
    n_prompts_cut: int = 0
    n_responses_cut: int = 0

    def __len__(self) -> int:
        return len(self.pairs)

    @property
    def margin(self) -> Float[Tensor, "pair"]:
        """The margin of every pair, r(chosen) - r(rejected)."""
        return self.chosen - self.rejected

    @property
    def correct(self) -> Bool[Tensor, "pair"]:
        """Whether the chosen response got the higher reward; False for a tie."""
        return self.margin > 0

    @property
    def tied(self) -> Bool[Tensor, "pair"]:
        """Whether both responses got the same reward."""
        return self.margin == 0

    def take(self, rows: Sequence[int]) -> "PairRewards":
        """The rewards of the pairs with the indices `rows`; the counts of cut pairs stay those of all pairs."""
        index = torch.tensor(rows, dtype=torch.long)
        pairs = PreferencePairs(self.pairs[row] for row in rows)
        return replace(self, chosen=self.chosen[index], rejected=self.rejected[index], pairs=pairs)

    def filter(self, *, objective: str | None = None, subset: str | Iterable[str] | None = None) -> "PairRewards":
        """The rewards of the pairs of one objective and of one or several subsets."""
        return self.take(self.pairs.places(objective=objective, subset=subset))

    def by_item(self) -> "PairRewards":
        """One entry per item: the lowest reward of its chosen and the highest reward of its rejected responses.

        An item of several pairs (best-of-n) is ranked correctly if all its pairs are, that is, if this entry is.
        """
        if self.pairs.by_item is self.pairs:
            return self
        items = self.pairs.items
        chosen = torch.stack([self.chosen[rows].min() for rows in items])
        rejected = torch.stack([self.rejected[rows].max() for rows in items])
        return replace(self, chosen=chosen, rejected=rejected, pairs=self.pairs.by_item)

    def accuracy(self, *, tie_value: float = 0.5) -> float:
        """Share of items ranked correctly; a tie counts `tie_value` (0 is the strict rule). NaN without pairs.

        `rmtension.evaluation.accuracy` returns the same number with an interval.
        """
        items = self.by_item()
        return float((items.correct.double() + tie_value * items.tied.double()).mean())

    def to_frame(self) -> pd.DataFrame:
        """One row per pair: id, objective, subset, chosen, rejected, margin, correct, tied."""
        frame = self.pairs.to_frame()[["id", "objective", "subset"]]
        columns = ("chosen", "rejected", "margin", "correct", "tied")
        return frame.assign(**{name: getattr(self, name).numpy() for name in columns})

    def __repr__(self) -> str:
        ties = int(self.tied.sum())
        return f"PairRewards(n={len(self)}, accuracy={self.accuracy():.3f}, ties={ties})"

    def _repr_html_(self) -> str:
        """A table of the first pairs, below accuracy and mean margin with 95% intervals over prompts."""
        if not len(self):
            return html_table("PairRewards: no pairs", self.to_frame())
        items = self.by_item()
        right = bootstrap_share(items.correct.double() + 0.5 * items.tied.double(), items.pairs)
        margin = bootstrap_mean(items.margin, items.pairs)
        caption = (
            f"PairRewards: {len(self):,} pairs of {right.n_prompts:,} prompts; accuracy {right}, mean margin {margin} "
            f"(95% intervals over prompts), {int(self.tied.sum()):,} ties"
        )
        return html_table(caption, self.take(range(min(N_ROWS, len(self)))).to_frame(), n_of=len(self))

    def save(self, path: str | Path) -> None:
        """Write rewards, pairs and provenance to one safetensors file."""
        values = {
            "pairs": [pair.to_dict() for pair in self.pairs],
            "provenance": self.provenance.to_dict(),
            "n_prompts_cut": self.n_prompts_cut,
            "n_responses_cut": self.n_responses_cut,
        }
        write_result(path, "PairRewards", {"chosen": self.chosen, "rejected": self.rejected}, values)

    @classmethod
    def load(cls, path: str | Path) -> "PairRewards":
        """Read what `save` wrote."""
        tensors, values = read_result(
            path,
            "PairRewards",
            tensors={"chosen": "float pair", "rejected": "float pair"},
            values={"pairs": list, "provenance": dict, "n_prompts_cut": int, "n_responses_cut": int},
        )
        pairs = PreferencePairs.from_records(read_objects(Path(path), values["pairs"]))
        if len(pairs) != len(tensors["chosen"]):
            raise StorageError(
                f"{path}: damaged: it has rewards of {len(tensors['chosen'])} pairs, but {len(pairs)} pairs. Save the "
                "result again."
            )
        provenance = Provenance.from_dict(values["provenance"])
        cut = values["n_prompts_cut"], values["n_responses_cut"]
        return cls(tensors["chosen"], tensors["rejected"], pairs, provenance, *cut)
