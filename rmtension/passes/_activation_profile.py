"""Activation profiles: what every neuron does on chosen and on rejected responses, and the scores of all methods."""

from dataclasses import dataclass, replace
from pathlib import Path

from jaxtyping import Float
from torch import Tensor

from rmtension._arguments import require_choice
from rmtension.errors import OptionError, ProvenanceError
from rmtension.neurons._neuron_scores import N_BLOCKS, NeuronScores, jackknife_stderr
from rmtension.store._provenance import METHOD_FIELDS, Provenance
from rmtension.store._storage import read_result, write_result

# The statistics that a profile sums, in the order of `ActivationProfile.sums`.
STATISTICS = ("value", "absolute", "square", "positive", "change")


@dataclass(frozen=True, kw_only=True)
class ActivationScore:
    """How an activation score follows from a statistic.

    - `statistic`: the statistic, one of those that a profile sums; `is_root`: the score is the root of its mean.
    - `contrasts`: the score is chosen minus rejected, instead of the mean of both.
    - `sign`: see `Provenance.sign`.
    """

    statistic: str
    is_root: bool
    contrasts: bool
    sign: int | None


def _of_both_sides(statistic: str, *, is_root: bool = False) -> ActivationScore:
    return ActivationScore(statistic=statistic, is_root=is_root, contrasts=False, sign=None)


SCORES = {
    "magnitude": _of_both_sides("value"),
    "abs_mean": _of_both_sides("absolute"),
    "rms": _of_both_sides("square", is_root=True),
    "frequency": _of_both_sides("positive"),
    "change": _of_both_sides("change", is_root=True),
    "mean_difference": ActivationScore(statistic="value", is_root=False, contrasts=True, sign=1),
}


@dataclass(frozen=True, eq=False)
class ActivationProfile:
    """Activation statistics of every neuron on the chosen and on the rejected texts, summed per block of prompts.

    `collect_profiles` makes profiles, and `scores` turns one into the scores of any activation method without another
    pass.

    `sums[s, side, b]` is the sum, over the texts of a side (0 chosen, 1 rejected) in block b, of a text's mean of a,
    |a|, a^2, [a > 0] and (a - a_base)^2; `weights[side, b]` is the number of texts. With `pool_tokens` both sum over
    tokens instead. The activation of an attention head is the norm of its columns; its change is the norm of their
    difference. `base` is the fingerprint of the base model that the change is measured from, or empty.

    Examples:
        >>> from rmtension.passes import collect_profiles
        >>> profile = collect_profiles(head, pairs["helpful"], positions=["response"])["mlp", "response"]
        >>> profile.sums.shape, int(profile.weights.sum())  # 24 pairs, two texts each
        (torch.Size([5, 2, 32, 2, 24]), 48)
        >>> profile.scores("mean_difference")
        NeuronScores(mean_difference: 2 x 24 mlp neurons, from ... to ...; 24 pairs, response tokens, ...)
        >>> profile.save("profile.safetensors")
        >>> ActivationProfile.load("profile.safetensors").sums.equal(profile.sums)
        True
    """

    sums: Float[Tensor, "statistic 2 block layer neuron"]
    weights: Float[Tensor, "2 block"]
    base: str
    provenance: Provenance

    def __add__(self, other: "ActivationProfile") -> "ActivationProfile":
        """The profile of both sets of pairs, for example of both objectives."""
        names = ("architecture", "model", "site", "positions", *METHOD_FIELDS, "dtype")
        self.provenance.require_same(other.provenance, names, what="ActivationProfile")
        if self.base != other.base:
            raise ProvenanceError(
                f"ActivationProfile: expected two profiles with the same base model, got {self.base!r} and "
                f"{other.base!r}. Collect both with the same base=..."
            )
        first, second = self.provenance, other.provenance
        provenance = replace(
            first,
            data=f"{first.data}+{second.data}",
            n_pairs=first.n_pairs + second.n_pairs,
            n_tokens=first.n_tokens + second.n_tokens,
            skipped=(*first.skipped, *second.skipped),
        )
        return ActivationProfile(self.sums + other.sums, self.weights + other.weights, self.base, provenance)

    def scores(self, method: str) -> NeuronScores:
        """The scores of every neuron by an activation method. Cost: no model pass.

        - "magnitude": mean of a; its sign is that of the activation.
        - "abs_mean": mean of |a|.
        - "rms": root of the mean of a^2.
        - "frequency": share of tokens with a > 0.
        - "change": root of the mean of (a - a_base)^2 (arXiv 2606.13209; analysis 4 in docs/paper.md).
        - "mean_difference": mean of a on the chosen texts minus mean of a on the rejected texts, as in
          `NeuronAttribution`.

        All but the last are computed on each side and averaged; they have no direction (`provenance.sign` is None).
        Standard errors are a jackknife over blocks of prompts. Raises `OptionError` for an unknown method, and for
        "change" in a profile without a base model.
        """
        require_choice("method", method, SCORES)
        definition = SCORES[method]
        if definition.statistic == "change" and not self.base:
            raise OptionError(f"method: {method!r} needs a base model. Collect the profile with base=...")
        row = STATISTICS.index(definition.statistic)

        def score(sides: Float[Tensor, "*part 2 layer neuron"]) -> Float[Tensor, "*part layer neuron"]:
            sides = sides.sqrt() if definition.is_root else sides
            if definition.contrasts:
                return sides[..., 0, :, :] - sides[..., 1, :, :]
            return sides.mean(dim=-3)

        whole, without = self._means(row)
        without_block = score(without)
        base = self.base if definition.statistic == "change" else None
        provenance = replace(self.provenance, method=method, base=base, sign=definition.sign)
        return NeuronScores(score(whole), jackknife_stderr(without_block), provenance, without_block)

    def _means(self, row: int) -> tuple[Float[Tensor, "2 layer neuron"], Float[Tensor, "block 2 layer neuron"]]:
        """The mean of a statistic on each side, over all blocks, and leaving out each block."""
        sums, weights = self.sums[row], self.weights
        whole = sums.sum(1) / weights.sum(1)[:, None, None]
        rest = (weights.sum(1, keepdim=True) - weights)[:, :, None, None]
        without = (sums.sum(1, keepdim=True) - sums) / rest
        return whole, without.transpose(0, 1)

    def save(self, path: str | Path) -> None:
        """Write sums, weights and provenance to one safetensors file."""
        values = {"provenance": self.provenance.to_dict(), "base": self.base}
        write_result(path, "ActivationProfile", {"sums": self.sums, "weights": self.weights}, values)

    @classmethod
    def load(cls, path: str | Path) -> "ActivationProfile":
        """Read what `save` wrote."""
        shapes = {
            "sums": f"float {len(STATISTICS)} 2 {N_BLOCKS} layer neuron",
            "weights": f"float 2 {N_BLOCKS}",
        }
        expected = {"provenance": dict, "base": str}
        tensors, values = read_result(path, "ActivationProfile", tensors=shapes, values=expected)
        provenance = Provenance.from_dict(values["provenance"])
        return cls(tensors["sums"], tensors["weights"], values["base"], provenance)
