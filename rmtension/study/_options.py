"""Options of a study: the corrected rules, and the rules of the published code."""

from dataclasses import dataclass, fields, replace
from typing import Any

from rmtension._arguments import nearest, require_choice
from rmtension._sites import check_positions, find_site
from rmtension.attribution._methods import METHODS
from rmtension.errors import OptionError
from rmtension.evaluation._intervals import check_level
from rmtension.evaluation._metrics import REFUSE_SUBSETS, RESPOND_SUBSETS
from rmtension.interventions._replacements import Mean, Zero
from rmtension.neurons._neuron_set import check_seed
from rmtension.neurons._signs import RANK_BY, check_rank_by
from rmtension.passes._activation_profile import SCORES as ACTIVATION_SCORES

ANALYSES = (
    "accuracy", "transferability", "confidence", "scores", "sets", "depth", "overlap", "curves", "cross_objective",
    "causality",
)  # fmt: skip
# Those that need no scores of neurons.
BEHAVIOUR = ("accuracy", "transferability", "confidence")
SCORES = (*ACTIVATION_SCORES, "selectivity", *(method for method in METHODS if method not in ACTIVATION_SCORES))


@dataclass(frozen=True)
class StudyOptions:
    """Options of a study. The defaults are the corrected rules; `StudyOptions.of("paper")` gives the published rules.

    - `analyses`: which of the ten analyses to run (`ANALYSES`).
    - `scores`: the scores that rank neurons; the causal analyses ablate the sets of the first.
    - `fraction`: the share of neurons in a top set at `site` and `positions`. `rank_within` is "model" or "layer";
      `rank_by` is "magnitude", "supports", "opposes" or "score" (see `NeuronScores.top`; "supports" and "opposes" need
      `scores` that all have a sign); `cut_rule` is "exact", or "percentile", which includes ties. `pool_tokens` weights
      every token equally instead of every text.
    - `replacement`: "zero" or "mean" replaces the activations of ablated sets, at all tokens.
    - `curve_fractions`: the set sizes of the ablation curves; `n_draws`: the number of random sets per control;
      `n_subsamples`: the number of subsamples that compare sets at equal size.
    - `tie_value`: the value of a tie in accuracies; `clamp`: keep drops and normalised accuracies within [0, 1].
    - `refuse` and `respond`: the subsets in which refusing and responding is right.
    - `level`: the level of all intervals; `seed`: the seed of the split of the pairs, the random sets, the subsamples
      and the bootstrap.

    Raises `OptionError` for an invalid value.

    Examples:
        >>> StudyOptions(n_draws=2).replacement, StudyOptions.of("paper").replacement
        ('mean', 'zero')
    """

    analyses: tuple[str, ...] = ANALYSES
    scores: tuple[str, ...] = ("mean_difference", "magnitude", "change")
    fraction: float = 0.10
    rank_by: str = "magnitude"
    site: str = "mlp"
    positions: str = "all"
    rank_within: str = "model"
    cut_rule: str = "exact"
    pool_tokens: bool = False
    replacement: str = "mean"
    curve_fractions: tuple[float, ...] = (0.02, 0.05, 0.10, 0.20, 0.30, 1.0)
    n_draws: int = 8
    n_subsamples: int = 8
    tie_value: float = 0.5
    clamp: bool = False
    refuse: tuple[str, ...] = REFUSE_SUBSETS
    respond: tuple[str, ...] = RESPOND_SUBSETS
    level: float = 0.95
    seed: int = 0

    @classmethod
    def of(cls, rules: str, **changes: Any) -> "StudyOptions":
        """The options of the "corrected" or "paper" rules, with `changes` to trace a difference between the two.

        The "paper" rules: neurons at `mlp_gate`, all tokens pooled, ranked by signed magnitude, then by change;
        percentile sets; zero ablation at 2, 4, ..., 30 and 100%; ties count as wrong; shares clamped to [0, 1].

        Examples:
            >>> StudyOptions.of("paper", replacement="mean").site
            'mlp_gate'
        """
        require_choice("rules", rules, _RULES)
        unknown = [name for name in changes if name not in cls.__dataclass_fields__]
        if unknown:
            known = list(cls.__dataclass_fields__)
            raise OptionError(f"{unknown[0]}: unknown option; expected some of {known}.{nearest(unknown[0], known)}")
        return replace(_RULES[rules](), **changes)

    def __post_init__(self) -> None:
        for field in fields(self):
            _check_type(field.name, getattr(self, field.name), str(field.type))
        _check_names("analyses", self.analyses, ANALYSES)
        _check_names("scores", self.scores, SCORES)
        for name in ("fraction", "curve_fractions"):
            given = getattr(self, name)
            for fraction in given if name == "curve_fractions" else (given,):
                if not 0 < fraction <= 1:  # also refuses NaN
                    raise OptionError(f"{name}: expected a number in (0, 1], got {fraction}.")
        for name, choices in (
            ("rank_by", RANK_BY),
            ("replacement", (Zero.name, Mean.name)),
            ("rank_within", ("model", "layer")),
            ("cut_rule", ("exact", "percentile")),
        ):
            require_choice(name, getattr(self, name), choices)
        for score in self.scores:
            check_rank_by(self.rank_by, sign_of(score), repr(score))
        check_level(self.level)
        find_site(self.site)
        check_positions(self.positions)
        if self.n_draws < 2:
            raise OptionError(f"n_draws: expected at least 2 random sets, to measure their spread, got {self.n_draws}.")
        if self.n_subsamples < 2:
            raise OptionError(f"n_subsamples: expected at least 2, got {self.n_subsamples}.")
        check_seed(self.seed)
        if not 0 <= self.tie_value <= 1:
            raise OptionError(f"tie_value: expected a number in [0, 1], got {self.tie_value}.")

    @property
    def needs_base(self) -> bool:
        """Whether any score compares a model with its base."""
        return "change" in self.scores


def sign_of(score: str) -> int | None:
    """The meaning of a positive score: see `Provenance.sign`."""
    if score in METHODS:
        return METHODS[score].sign
    return ACTIVATION_SCORES[score].sign if score in ACTIVATION_SCORES else None


def is_contrastive(score: str) -> bool:
    """Whether a score compares chosen with rejected responses, and so belongs to the objective of its pairs."""
    return score in METHODS


def base_has(score: str) -> bool:
    """Whether a base model, which has no reward and is not compared with itself, has this score."""
    return score != "change" and not (score in METHODS and METHODS[score].needs_reward)


def _paper() -> StudyOptions:
    return StudyOptions(
        scores=("magnitude", "change"),
        rank_by="score",
        site="mlp_gate",
        positions="all",
        cut_rule="percentile",
        pool_tokens=True,
        replacement="zero",
        curve_fractions=(*(percent / 100 for percent in range(2, 31, 2)), 1.0),
        tie_value=0.0,
        clamp=True,
    )


_RULES = {"corrected": StudyOptions, "paper": _paper}


def _check_type(name: str, value: object, wanted: str) -> None:
    """Raise `OptionError` unless a value has the type of the option's annotation."""
    kinds: dict[str, tuple[type, ...]] = {"str": (str,), "float": (float, int), "int": (int,), "bool": (bool,)}
    kind = next(kind for kind in kinds if kind in wanted)
    is_list = wanted.startswith("tuple")
    parts = value if is_list and isinstance(value, tuple) else (value,)
    fits = isinstance(value, tuple) == is_list
    if not fits or any(
        not isinstance(part, kinds[kind]) or (isinstance(part, bool) and kind != "bool") for part in parts
    ):
        raise OptionError(f"{name}: expected {f'a tuple of {kind}' if is_list else kind}, got {value!r:.80}.")


def _check_names(name: str, given: tuple[str, ...], choices: tuple[str, ...]) -> None:
    if not isinstance(given, tuple) or not given:
        raise OptionError(f"{name}: expected a tuple of some of {list(choices)}, got {given!r}.")
    for name_given in given:
        if name_given not in choices:
            kind = {"analyses": "analysis"}.get(name, name.removesuffix("s"))
            known = ", ".join(choices)
            raise OptionError(
                f"{name}: no {kind} is called {name_given!r}.{nearest(name_given, choices)} The {name} are {known}."
            )
