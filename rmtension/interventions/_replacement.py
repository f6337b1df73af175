"""What every replacement of activations has in common; `_replacements` and `_optimal` have the kinds."""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

from jaxtyping import Bool, Float, Int
from torch import Tensor

from rmtension.data._tokens import TokenBatch
from rmtension.store._provenance import Provenance

# Some channels of a layer, or `slice(None)` for all of them.
Columns = Int[Tensor, "channel"] | slice


@dataclass(frozen=True)
class Replacement(ABC):
    """What an activation a(t) is replaced by: a_ref(t).

    The kinds are `Zero`, `Mean`, `Median`, `Optimal`, `Resample`, `Scale` and `OtherResponse`.

    - `name` is the kind of replacement.
    - `shares_tokens` says whether a token that two texts share gets the same a_ref in both, so that the texts may share
      a row (`docs/performance.md`).
    """

    name: ClassVar[str]
    shares_tokens: ClassVar[bool] = True

    @property
    def label(self) -> str:
        """The name in results (`Provenance.replacement`), with the factor of `Scale`."""
        return self.name

    @property
    def key(self) -> str:
        """A text that differs whenever the values differ; work folders compare it."""
        return self.label

    @property
    def source(self) -> Provenance | None:
        """The provenance of the activations that it writes; None for a replacement without collected activations."""
        return None

    @property
    def is_affine(self) -> bool:
        """Whether a_ref(t) = `factor` a(t) + `constant`, which weights can express."""
        return self.factor(0, slice(None)) is not None

    def factor(self, layer: int, columns: Columns) -> float | Float[Tensor, "channel"] | None:
        """The f of a_ref(t) = f a(t) + `constant`, for some channels; None if a_ref depends on the token otherwise."""
        return None

    def constant(self, layer: int) -> Float[Tensor, "channel"] | None:
        """The constant of a_ref(t) = f a(t) + constant, per channel of a layer; None for 0."""
        return None

    @abstractmethod
    def step(
        self,
        layer: int,
        activation: Float[Tensor, "row token channel"],
        select: Bool[Tensor, "row token"],
        batch: TokenBatch,
    ) -> Float[Tensor, "row token channel"]:
        """a_ref(t) - a(t) at the selected tokens of a batch, 0 at the others."""


class SingleTextReplacement(Replacement):
    """A replacement whose a_ref(t) does not depend on the other response; an `AblationContext` takes only these."""

    @abstractmethod
    def values(
        self, layer: int, columns: Columns, activation: Float[Tensor, "*token channel"], batch: TokenBatch | None
    ) -> Float[Tensor, "*token channel"]:
        """a_ref(t) for some channels of a layer, given their activations at the tokens of a batch.

        An affine replacement needs no batch.
        """

    def step(
        self,
        layer: int,
        activation: Float[Tensor, "row token channel"],
        select: Bool[Tensor, "row token"],
        batch: TokenBatch,
    ) -> Float[Tensor, "row token channel"]:
        """`values` minus the activation, at the selected tokens."""
        weights = select.to(activation)
        return (self.values(layer, slice(None), activation, batch) - activation) * weights[..., None]
