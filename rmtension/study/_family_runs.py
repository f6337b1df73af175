"""A family of three reward models and their base, and the runs of these models that a study needs."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rmtension.attribution._methods import METHODS
from rmtension.data._pairs import PreferencePairs
from rmtension.errors import ProvenanceError
from rmtension.evaluation._pair_rewards import PairRewards
from rmtension.interventions._replacement import Replacement
from rmtension.interventions._replacements import Mean, Zero
from rmtension.neurons._neuron_scores import NeuronScores, top_size
from rmtension.neurons._neuron_set import NeuronSet
from rmtension.passes._activation_profile import SCORES as ACTIVATION_SCORES
from rmtension.passes._activation_profile import ActivationProfile
from rmtension.passes._selectivity import selectivity
from rmtension.reward_head import RewardHead
from rmtension.study._causality import Ablations, Advance
from rmtension.study._model_output import ModelOutput, OpenCheckpoints, outputs_of
from rmtension.study._model_runs import ModelRuns
from rmtension.study._options import StudyOptions, base_has, is_contrastive

OBJECTIVES = ("helpful", "harmless")
MODELS = (*OBJECTIVES, "mixed")


@dataclass(frozen=True)
class ModelFamily:
    """Three reward models trained from one base model: heads, or checkpoints that are opened when they are needed.

    Families with the same `name` are treated as seeds of each other: same base, same data, another `seed`. Three
    outputs of one model (`RewardHead.output`, `ModelOutput`) are a family too: see `docs/outputs.md`.

    Examples:
        >>> family = ModelFamily(helpful="helpful-rm", harmless="harmless-rm", mixed="mixed-rm", base="base", seed=1)
        >>> family.name, family.seed
        ('models', 1)
    """

    helpful: RewardHead | ModelOutput | str | Path
    harmless: RewardHead | ModelOutput | str | Path
    mixed: RewardHead | ModelOutput | str | Path
    base: RewardHead | str | Path | None = None
    name: str = "models"
    seed: int = 0

    @property
    def outputs(self) -> dict[str, Any] | None:
        """The outputs by the names of the models; None unless the models are outputs of one model."""
        return outputs_of({name: getattr(self, name) for name in MODELS})


class FamilyRuns:
    """The models of one family with their cached passes: results of earlier analyses and of `folder` are not run again.

    Args:
        family: the models.
        scoring: "helpful" and "harmless" -> the pairs that neurons are scored on.
        evaluating: "helpful" and "harmless" -> the pairs for rewards and ablations, which share no prompt with
            `scoring`.
        options: see `StudyOptions`.
        folder: the folder that keeps passes.
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
        opened = OpenCheckpoints()
        self.runs = {
            name: ModelRuns(model, folder=folder, reward=name != "base", opened=opened)
            for name in (*MODELS, "base")
            if (model := getattr(family, name)) is not None
        }
        self._architecture: str | None = None
        self._scores: dict[tuple[str, str], NeuronScores] = {}

    @property
    def n_run(self) -> int:
        """The number of passes over a data set that were run."""
        return sum(runs.n_run for runs in self.runs.values())

    @property
    def n_read(self) -> int:
        """The number of passes that were read from the folder."""
        return sum(runs.n_read for runs in self.runs.values())

    def close(self) -> None:
        """Release the open models and their results, except the scores that are compared with other seeds."""
        wanted = set(self.options.scores)
        self._scores = {key: scores for key, scores in self._scores.items() if key[0] in wanted}
        for runs in self.runs.values():
            runs.close()

    def rewards(self, model: str, objective: str) -> PairRewards:
        """A model's rewards of an objective's evaluation pairs."""
        return self.runs[model].rewards(self.evaluating[objective])

    def scores_of(self, score: str, model: str) -> NeuronScores:
        """One score of every neuron of a model.

        Scores that compare chosen with rejected responses use the pairs of the model's own objective (both objectives
        for the mixed model and the base). Activation scores use the pairs of both objectives, so that the sets of two
        models differ because of the models and not of the data.
        """
        if (score, model) not in self._scores:
            self._scores[score, model] = self.scored(score, model, self.options)
        return self._scores[score, model]

    def scored(self, score: str, model: str, options: StudyOptions) -> NeuronScores:
        """As `scores_of`, with other options; the result is not kept in memory."""
        own = [model] if model in OBJECTIVES and is_contrastive(score) else list(OBJECTIVES)
        if score == "selectivity":
            return selectivity(self.profiles(model, options))
        if score in ACTIVATION_SCORES:
            profiles = self.profiles(model, options)
            first, *others = (profiles[name] for name in own)
            return sum(others, start=first).scores(score)
        pairs = joined({name: self.scoring[name] for name in own})
        replaced = {"replacement": self.replacement(model, options)} if METHODS[score].needs_replacement else {}
        return self.runs[model].attribution(
            pairs, method=score, site=options.site, positions=options.positions, **replaced
        )

    def profiles(self, model: str, options: StudyOptions | None = None) -> dict[str, ActivationProfile]:
        """A model's activation profile on each objective's scoring pairs, compared with the base if there is one."""
        options = options or self.options
        profiles = {
            name: self.runs[model].profile(
                part,
                site=options.site,
                positions=options.positions,
                base=self.runs.get("base") if model != "base" else None,
                pool_tokens=options.pool_tokens,
            )
            for name, part in self.scoring.items()
        }
        architecture = profiles["helpful"].provenance.architecture
        self._architecture = self._architecture or architecture
        if architecture != self._architecture:
            raise ProvenanceError(
                f"models: architecture differs: {model!r} is {architecture}, the others are {self._architecture}. A "
                "study compares models trained from one base."
            )
        return profiles

    def ablated_sets(self) -> dict[str, NeuronSet]:
        """The sets of the causal analyses, by the first score.

        The neurons of each specialist alone, the shared ones, the mixed model's top set (for comparison: what ablating
        as many neurons can do), and the base's top set.
        """
        score = self.options.scores[0]
        base = self.base_scores(score)
        sets = self.shared_sets(score) | {"mixed top": self.top(self.scores_of(score, "mixed"))}
        return sets | ({} if base is None else {"base top": self.top(base)})

    def shared_sets(self, score: str) -> dict[str, NeuronSet]:
        """The neurons in only one specialist's top set, and those in both."""
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
            # Neurons that are not eligible all score 0; the set holds eligible neurons only.
            size = top_size(options.fraction, scores.values.numel())
            return scores.top(k=max(1, min(size, int((scores.values != 0).sum()))))
        return scores.top(
            options.fraction, rank_by=options.rank_by, rank_within=options.rank_within, cut_rule=options.cut_rule
        )

    def replacement(self, model: str, options: StudyOptions | None = None) -> Replacement:
        """What replaces the activations of ablated neurons, and of neurons that are scored by replacing them."""
        options = options or self.options
        if options.replacement == "mean":
            return Mean(self.runs[model].statistics(joined(self.scoring), site=options.site))
        return Zero()

    def ablations(self, model: str) -> Ablations:
        """The `Ablations` of a model on the evaluation pairs, by the options' replacement."""
        options = self.options
        return Ablations(
            self.runs[model],
            self.evaluating,
            replacement=self.replacement(model),
            tie_value=options.tie_value,
            level=options.level,
            seed=options.seed,
            advance=self._advance,
        )

    def prompts_cut(self) -> dict[str, int]:
        """How many evaluation pairs of each objective lost prompt tokens, for objectives with known rewards."""
        return {
            name: known.n_prompts_cut
            for name, pairs in self.evaluating.items()
            if (known := self.runs["mixed"].known_rewards(pairs)) is not None
        }

    def provenance(self) -> dict[str, dict[str, Any]]:
        """The provenance of the first result of every model that was run."""
        known = {name: runs.provenance for name, runs in self.runs.items()}
        return {name: provenance.to_dict() for name, provenance in known.items() if provenance is not None}

    def base_scores(self, score: str) -> NeuronScores | None:
        """The scores of the base; None without a base, or if a base model has no such score."""
        return self.scores_of(score, "base") if "base" in self.models_with(score) else None

    def models_with(self, score: str) -> Sequence[str]:
        """The models that have this score, in a fixed order."""
        return [name for name in self.runs if name != "base" or base_has(score)]

    @property
    def judging(self) -> dict[str, Any]:
        """Keyword arguments of accuracies: the value of ties, level and seed."""
        return {"tie_value": self.options.tie_value, "level": self.options.level, "seed": self.options.seed}


def joined(pairs: Mapping[str, PreferencePairs]) -> PreferencePairs:
    """The pairs of all objectives, one after the other."""
    skipped = sum((Counter(part.skipped) for part in pairs.values()), start=Counter[str]())
    return PreferencePairs((pair for part in pairs.values() for pair in part), skipped)
