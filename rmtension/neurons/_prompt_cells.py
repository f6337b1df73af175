"""Inner products of the contributions to margins, by prompt and group, and every draw of prompts that uses them."""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int

_N_DRAWS = 1000


@dataclass(frozen=True, eq=False)
class PromptCells:
    """Inner products between cells: sums over a prompt's pairs of one group, divided by the length of the group's mean.

    Every draw weights the cells, and the cosine of two weighted sums needs only quadratic forms of these inner
    products, so no draw touches the scores of neurons.
    """

    gram: Float[np.ndarray, "cell cell"]
    prompt: Int[np.ndarray, "cell"]
    of: Float[np.ndarray, "2 cell"]  # row 0 is 1 for cells of the first group, row 1 for cells of the second

    @property
    def kind(self) -> Int[np.ndarray, "prompt"]:
        """The kind of every prompt: 1 if it has only pairs of the first group, 2 only of the second, 3 both."""
        return np.bincount(self.prompt, weights=np.array([1, 2]) @ self.of).astype(np.int64)

    @property
    def stretch(self) -> float:
        """The geometric mean of the factors by which resampling lengthens the two vectors; variances of cells add."""
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
