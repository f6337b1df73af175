"""What three reward models trained from one base, and their base, are run for in a study."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rmtension.data._pairs import PreferencePairs
from rmtension.errors import ProvenanceError
from rmtension.evaluation._pair_rewards import PairRewards
from rmtension.interventions._replacements import Mean, Replacement, Zero
from rmtension.neurons._neuron_scores import NeuronScores, top_size
from rmtension.neurons._neuron_set import NeuronSet
from rmtension.passes._profiles import SCORES as ACTIVATION_SCORES
from rmtension.passes._profiles import ActivationProfile, selectivity
from rmtension.reward_head import RewardHead
from rmtension.study._causality import Ablations, Advance
from rmtension.study._model_runs import ModelRuns
from rmtension.study._options import StudyOptions, base_has, is_contrastive

OBJECTIVES = ("helpful", "harmless")
MODELS = (*OBJECTIVES, "mixed")


@dataclass(frozen=True)
class ModelFamily:
    """Three reward models trained from one base: heads, or checkpoints that are opened when their turn comes.

    Families of one `name` are seeds of each other: same base, same data, another `seed`.

    Examples:
        >>> family = ModelFamily(helpful="helpful-rm", harmless="harmless-rm", mixed="mixed-rm", base="base", seed=1)
        >>> family.name, family.seed
        ('models', 1)
    """

    helpful: RewardHead | str | Path
    harmless: RewardHead | str | Path
    mixed: RewardHead | str | Path
    base: RewardHead | str | Path | None = None
    name: str = "models"
    seed: int = 0


class FamilyRuns:
    """The models of one family, run through `ModelRuns`: only what no analysis has run, nothing that `folder` holds.

    Args:
        family: the models.
        scoring: "helpful" and "harmless" -> pairs that neurons are scored on.
        evaluating: the same for rewards and ablations; no prompt of `scoring`.
        options: see `StudyOptions`.
        folder: where passes are kept.
        advance: called after every evaluation of a model, for progress bars.
    """

    def __init__(
        self,
        family: ModelFamily,
        scoring: Mapping[str, PreferencePairs],
        evaluating: Mapping[str, PreferencePairs],
        *,
        options: StudyOptions | None = None,
        folder: Path | None = None,
        advance: Advance = lambda: None,
    ) -> None:
        self.family = family
        self.options = options or StudyOptions()
        self.scoring, self.evaluating = dict(scoring), dict(evaluating)
        self._advance = advance
        # One folder for all: files are named by what they depend on, the model first of all.
        self.runs = {
            name: ModelRuns(model, folder=folder, reward=name != "base")
            for name in (*MODELS, "base")
            if (model := getattr(family, name)) is not None
        }
        self._architecture: str | None = None
        self._scores: dict[tuple[str, str], NeuronScores] = {}

    @property
    def n_run(self) -> int:
        """Passes over a data set that were run."""
        return sum(runs.n_run for runs in self.runs.values())

    @property
    def n_read(self) -> int:
        """Passes that the folder had."""
        return sum(runs.n_read for runs in self.runs.values())

    def close(self) -> None:
        """Let go of the open models and of what they were run for, but for the scores that other seeds ask for."""
        wanted = set(self.options.scores)
        self._scores = {key: scores for key, scores in self._scores.items() if key[0] in wanted}
        for runs in self.runs.values():
            runs.close()

    def rewards(self, model: str, objective: str) -> PairRewards:
        """A model's rewards of an objective's evaluation pairs."""
        return self.runs[model].rewards(self.evaluating[objective])

    def scores_of(self, score: str, model: str) -> NeuronScores:
        """One score of every neuron of a model.

        Scores that set chosen against rejected are taken on the model's own objective (on both for the mixed model and
        the base); activation scores on both objectives' pairs, so that two models' sets differ by the models and not
        by their data.
        """
        if (score, model) not in self._scores:
            self._scores[score, model] = self._score(score, model)
        return self._scores[score, model]

    def _score(self, score: str, model: str) -> NeuronScores:
        own = [model] if model in OBJECTIVES and is_contrastive(score) else list(OBJECTIVES)
        if score == "selectivity":
            return selectivity(self.profiles(model))
        if score in ACTIVATION_SCORES:
            profiles = self.profiles(model)
            first, *others = (profiles[name] for name in own)
            return sum(others, start=first).scores(score)
        pairs = joined({name: self.scoring[name] for name in own})
        options = self.options
        return self.runs[model].attribution(pairs, method=score, site=options.site, positions=options.positions)

    def profiles(self, model: str) -> dict[str, ActivationProfile]:
        """A model's profile on each objective's scoring pairs, beside the base where there is one."""
        options = self.options
        found = {
            name: self.runs[model].profile(
                part,
                site=options.site,
                positions=options.positions,
                base=self.runs.get("base") if model != "base" else None,
                pool_tokens=options.pool_tokens,
            )
            for name, part in self.scoring.items()
        }
        architecture = found["helpful"].provenance.architecture
        self._architecture = self._architecture or architecture
        if architecture != self._architecture:
            raise ProvenanceError(
                f"models: architecture differs: {model!r} is {architecture}, the others are {self._architecture}. A "
                "study compares models trained from one base."
            )
        return found

    def ablated_sets(self) -> dict[str, NeuronSet]:
        """The sets of the causal analyses, by the first score: each specialist's own, shared, the base's top set."""
        score = self.options.scores[0]
        base = self.base_scores(score)
        return self.shared_sets(score) | ({} if base is None else {"base top": self.top(base)})

    def shared_sets(self, score: str) -> dict[str, NeuronSet]:
        """What each specialist's top set has alone, and what both have."""
        helpful, harmless = (self.top(self.scores_of(score, name)) for name in OBJECTIVES)
        return {
            "helpful only": helpful - harmless,
            "harmless only": harmless - helpful,
            "shared": helpful & harmless,
        }

    def top(self, scores: NeuronScores) -> NeuronSet:
        """The top set by the options' rule."""
        options = self.options
        if scores.provenance.method == "selectivity":
            # Neurons that are not eligible all score 0: a set is filled up to the last that is.
            size = top_size(options.fraction, scores.values.numel())
            return scores.top(k=max(1, min(size, int((scores.values != 0).sum()))))
        return scores.top(
            options.fraction, rank_by=options.rank_by, rank_within=options.rank_within, cut_rule=options.cut_rule
        )

    def ablations(self, model: str) -> Ablations:
        """A model with the evaluation pairs, ablated as the options say."""
        options = self.options
        replacement: Replacement = Zero()
        if options.replacement == "mean":
            replacement = Mean(self.runs[model].statistics(joined(self.scoring), site=options.site))
        return Ablations(
            self.runs[model],
            self.evaluating,
            replacement=replacement,
            tie_value=options.tie_value,
            level=options.level,
            seed=options.seed,
            advance=self._advance,
        )

    def prompts_cut(self) -> dict[str, int]:
        """How many evaluation pairs of each objective lost prompt tokens, where a model was asked for their rewards."""
        return {
            name: known.n_prompts_cut
            for name, pairs in self.evaluating.items()
            if (known := self.runs["mixed"].known_rewards(pairs)) is not None
        }

    def provenance(self) -> dict[str, dict[str, Any]]:
        """Where the first result of every model that was run came from."""
        found = {name: runs.provenance for name, runs in self.runs.items()}
        return {name: one.to_dict() for name, one in found.items() if one is not None}

    def base_scores(self, score: str) -> NeuronScores | None:
        """The base's scores; None without a base, or where it has no such score."""
        return self.scores_of(score, "base") if "base" in self.models_with(score) else None

    def models_with(self, score: str) -> Sequence[str]:
        """The models that have a score, in a fixed order."""
        return [name for name in self.runs if name != "base" or base_has(score)]

    @property
    def judging(self) -> dict[str, Any]:
        """How accuracies are judged: ties, level and seed."""
        return {"tie_value": self.options.tie_value, "level": self.options.level, "seed": self.options.seed}


def joined(pairs: Mapping[str, PreferencePairs]) -> PreferencePairs:
    """The pairs of all objectives, one after the other."""
    first, *others = pairs.values()
    return sum(others, start=first)
