"""The whole comparison of reward models in one object: ten analyses over seeds and base models."""

import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from importlib.metadata import version
from itertools import combinations
from pathlib import Path
from typing import Any

import pandas as pd

from rmtension._progress import progress_bar
from rmtension.data._pairs import PreferencePairs
from rmtension.distributed import current
from rmtension.errors import OptionError, ProvenanceError
from rmtension.reward_head import RewardHead
from rmtension.store._work_folder import claim, locked, unclaim
from rmtension.study._analyses import ANALYSES
from rmtension.study._family_runs import MODELS, OBJECTIVES, FamilyRuns, ModelFamily, joined
from rmtension.study._model_output import ModelOutput
from rmtension.study._neuron_tables import overlap_with
from rmtension.study._options import BEHAVIOUR, StudyOptions, is_contrastive
from rmtension.study._result import StudyResult
from rmtension.study._stability import stability_with
from rmtension.study._study_cost import n_ablations, n_sets_ablated, study_cost

# The scores of a study of outputs of one model, unless others are named.
SCORES_OF_OUTPUTS = ("attribution_patching",)


class TensionStudy:
    """A study of helpful, harmless and mixed reward models on preference pairs of both objectives.

    Args:
        models: a `ModelFamily`, or a list of them for several seeds or base models. A mapping of "helpful", "harmless"
            and "mixed" to models makes one family. All models of a family must have the same architecture. They may be
            outputs of one model (`RewardHead.output`, `ModelOutput`): neurons are then scored by attribution patching
            unless `options` name other scores that read the reward, because activations do not differ.
        pairs: "helpful" and "harmless" -> pairs that no model was trained on.
        base: the language model that the models were trained from, for a mapping of models.
        scoring_pairs: the pairs that neurons are scored on. By default `pairs` are split by prompt: one half scores
            neurons, the other evaluates models and ablations, so that no effect is measured on the pairs that selected
            its neurons.
        options: see `StudyOptions`; default: the options of `rules`.
        rules: "corrected", or "paper" for the published rules.

    Raises `OptionError` for arguments that do not fit together, `ProvenanceError` (in `run`) for models that do not.

    Examples:
        >>> options = StudyOptions(analyses=("accuracy", "transferability"))
        >>> study = TensionStudy(dict.fromkeys(("helpful", "harmless", "mixed"), head), pairs, options=options)
        >>> result = study.run(progress=False)
        >>> list(result.tables)
        ['accuracy', 'subsets', 'comparisons', 'transferability']
    """

    def __init__(
        self,
        models: ModelFamily | Sequence[ModelFamily] | Mapping[str, RewardHead | ModelOutput | str | Path],
        pairs: Mapping[str, PreferencePairs],
        *,
        base: RewardHead | str | Path | None = None,
        scoring_pairs: Mapping[str, PreferencePairs] | None = None,
        options: StudyOptions | None = None,
        rules: str | None = None,
    ) -> None:
        if options is not None and rules is not None:
            raise OptionError("rules: expected options or rules, got both. Use StudyOptions.of(rules, ...).")
        self.options = options or StudyOptions.of(rules or "corrected")
        self.families = _families(models, base)
        self._are_halved = scoring_pairs is None
        _require_names("pairs", pairs, OBJECTIVES)
        if scoring_pairs is None:
            self.scoring, self.evaluating = _halves(pairs, self.options.seed)
        else:
            _require_names("scoring_pairs", scoring_pairs, OBJECTIVES)
            self.scoring = {name: scoring_pairs[name] for name in OBJECTIVES}
            self.evaluating = {name: pairs[name] for name in OBJECTIVES}
        both = set(joined(self.scoring).prompts) & set(joined(self.evaluating).prompts)
        if both:
            raise OptionError(
                f"scoring_pairs: {len(both)} prompts are in `pairs` too, so effects would be measured on pairs that "
                "selected the neurons. Divide the pairs with PreferencePairs.split."
            )
        for name, part in self.evaluating.items():
            if "all" in part.subsets:
                raise OptionError(
                    f"pairs: the {name} pairs have a subset 'all', which is the name of the rows of all pairs in the "
                    "tables. Give it another name."
                )
        if any(family.outputs is not None for family in self.families):
            self.options = _options_of_outputs(self.options)
        for family in self.families:
            if family.base is None and self.options.needs_base:
                # Without a base there is no change to score; the other scores need none.
                left = tuple(score for score in self.options.scores if score != "change")
                if not left:
                    raise OptionError("scores: 'change' compares with a base model, and base is None. Pass base=...")
                self.options = replace(self.options, scores=left)

    def run(
        self, *, folder: str | Path | None = None, overwrite: bool = False, progress: bool | None = None
    ) -> StudyResult:
        """Run the analyses of `options.analyses`.

        With a `folder`, every pass over a model is kept in `folder/runs`, and unfinished passes are saved every half
        minute. Running again, with other analyses, more families or after an interruption, runs only the passes that
        are missing, and gives the same numbers. With `overwrite`, the passes that are kept there are deleted first.
        Afterwards `n_run` and `n_read` count the passes over a data set that were run and those that were read from the
        folder. Raises `StorageError` if another process works in the folder, or if the folder belongs to a study of
        other pairs or, under the same name and seed, other models.

        Cost: see `cost`.
        """
        if folder is None:
            return self._run(None, progress)
        folder = Path(folder)
        with locked(folder):
            if overwrite:
                unclaim(folder)
                if current().is_first:
                    shutil.rmtree(folder / "runs", ignore_errors=True)
                current().all_have(True)  # no process goes on before the folder is empty
            result = self._run(folder / "runs", progress)
            if current().is_first:
                # Work folders of runs that were killed after they finished but before their results were kept.
                for left in (folder / "runs").glob("*.work"):
                    shutil.rmtree(left, ignore_errors=True)
        return result

    def cost(self) -> pd.DataFrame:
        """The passes that each analysis takes at most, over all families; nothing is run.

        One row per analysis. `forward` and `gradient` (a forward and a backward pass) count passes over both texts of
        all scoring pairs, `rewards` and `ablations` passes over those of all evaluation pairs; a shared prompt runs
        once. What several analyses read is counted in the first. Sets that are equal to others, or empty, do not run.

        Examples:
            >>> study = TensionStudy(dict.fromkeys(("helpful", "harmless", "mixed"), head), pairs)
            >>> study.cost().set_index("analysis").loc[["accuracy", "causality"], ["rewards", "ablations"]]
                       rewards  ablations
            analysis
            accuracy       3.0        0.0
            causality      0.0      100.0
        """
        costs = (study_cost(self.options, has_base=family.base is not None) for family in self.families)
        return pd.concat(costs).groupby("analysis", sort=False, as_index=False).sum()

    # -- parts -----------------------------------------------------------------------------------------------------

    def _run(self, kept: Path | None, progress: bool | None) -> StudyResult:
        options = self.options
        parts: dict[str, list[pd.DataFrame]] = {}
        provenance: dict[str, Any] = {}
        cut: dict[str, int] = {}
        with progress_bar(progress=progress, total=self._n_steps(), desc="study") as bar:
            members = [
                FamilyRuns(family, self.scoring, self.evaluating, options=options, folder=kept, advance=bar.update)
                for family in self.families
            ]
            _require_one_base_each(members)
            if kept is not None:
                claim(kept.parent, self._inputs(members), optional=None)  # seeds and bases can be added
            for member in members:
                family = member.family
                for analysis in options.analyses:
                    bar.set_description(f"study: {family.name} {family.seed}, {analysis}")
                    for table, frame in ANALYSES[analysis](member).items():
                        parts.setdefault(table, []).append(_labelled(frame, family))
                provenance[f"{family.name} {family.seed}"] = member.provenance()
                for name, n_cut in member.prompts_cut().items():
                    cut[name] = max(n_cut, cut.get(name, 0))
                member.close()
            if "overlap" in options.analyses:
                parts["overlap"] += self._between_seeds(members, overlap_with)
            if "sets" in options.analyses:
                parts["stability"] += self._between_seeds(members, stability_with)
        self.n_run = sum(member.n_run for member in members)
        self.n_read = sum(member.n_read for member in members)
        tables = {table: pd.concat(frames, ignore_index=True) for table, frames in parts.items()}
        return StudyResult(tables=tables, summary=self._summary(provenance, cut))

    def _inputs(self, members: Sequence[FamilyRuns]) -> dict[str, str]:
        """The inputs that a study's folder belongs to; not the options, because every pass is named by its own."""
        models = {
            f"{name} model of {member.family.name} {member.family.seed}": runs.key
            for member in members
            for name, runs in member.runs.items()
        }
        sides = {"scoring": self.scoring, "evaluation": self.evaluating}
        pairs = {
            f"{name} {side} pairs": part.ordered_digest for side, both in sides.items() for name, part in both.items()
        }
        return models | pairs

    def _n_steps(self) -> int:
        """The number of evaluations that the progress bar counts: those that run, and those that are read again."""
        n_steps = 0
        for family in self.families:
            has_base = family.base is not None
            again = {"curves": len(MODELS), "cross_objective": len(MODELS) * len(self.options.scores)}
            again["causality"] = 3 + n_sets_ablated(has_base=has_base)
            for analysis in self.options.analyses:
                n_steps += n_ablations(analysis, self.options, has_base=has_base) + again.get(analysis, 0)
        return n_steps

    def _between_seeds(
        self, members: Sequence[FamilyRuns], compare: Callable[[FamilyRuns, FamilyRuns], pd.DataFrame]
    ) -> list[pd.DataFrame]:
        """Comparisons of one objective's top sets between two seeds of a family."""
        return [
            _labelled(compare(first, second), first.family)
            for first, second in combinations(members, 2)
            if first.family.name == second.family.name
        ]

    def _summary(self, provenance: Mapping[str, Any], cut: Mapping[str, int]) -> dict[str, Any]:
        return {
            "version": version("rmtension"),
            "options": asdict(self.options),
            "families": [
                {
                    "family": family.name,
                    "seed": family.seed,
                    "base": family.base is not None,
                    **({} if family.outputs is None else {"outputs": family.outputs}),
                }
                for family in self.families
            ],
            "models": provenance,
            "halved": self._are_halved,
            "pairs": {
                name: {
                    "scoring": len(self.scoring[name]),
                    "evaluating": len(self.evaluating[name]),
                    "identical_responses": self.evaluating[name].n_ties,
                    # The largest number of any base, whose context is the shortest; None if no rewards were computed.
                    "prompts_cut": cut.get(name),
                    "digest": self.evaluating[name].digest,
                }
                for name in OBJECTIVES
            },
        }


def _options_of_outputs(options: StudyOptions) -> StudyOptions:
    """The options for outputs of one model, whose activations are the same: scores that read the reward."""
    if options.scores == StudyOptions.scores:
        return replace(options, scores=SCORES_OF_OUTPUTS)
    blind = [score for score in options.scores if not is_contrastive(score)]
    if blind and not set(options.analyses) <= set(BEHAVIOUR):
        raise OptionError(
            f"scores: the models are outputs of one model, whose activations are the same, so that {blind[0]!r} would "
            f"compare a model with itself. Use scores that read the reward, for example scores={SCORES_OF_OUTPUTS}."
        )
    return options


def _require_one_base_each(members: Sequence[FamilyRuns]) -> None:
    """Raise `ProvenanceError` if families of one name, which count as seeds, come from different bases."""
    keys: dict[str, str] = {}
    for member in members:
        name, base = member.family.name, member.runs.get("base")
        key = "none" if base is None else base.key
        if keys.setdefault(name, key) != key:
            raise ProvenanceError(
                f"models: families called {name!r} have different bases, but families of one name are compared as "
                "seeds. Give the families of each base their own name: ModelFamily(..., name=...)."
            )


def _labelled(frame: pd.DataFrame, family: ModelFamily) -> pd.DataFrame:
    """The table with columns for the family and the seed in front."""
    frame = frame.copy()
    frame.insert(0, "family", family.name)
    frame.insert(1, "seed", family.seed)
    return frame


def _families(
    models: ModelFamily | Sequence[ModelFamily] | Mapping[str, RewardHead | ModelOutput | str | Path],
    base: RewardHead | str | Path | None,
) -> list[ModelFamily]:
    if isinstance(models, Mapping):
        _require_names("models", models, MODELS)
        return [ModelFamily(models["helpful"], models["harmless"], models["mixed"], base)]
    families = [models] if isinstance(models, ModelFamily) else list(models)
    if not families or not all(isinstance(family, ModelFamily) for family in families):
        raise OptionError("models: expected a ModelFamily, a list of them, or a mapping of names to models.")
    if base is not None:
        raise OptionError("base: each ModelFamily has its own base. Pass ModelFamily(..., base=...).")
    labels = [(family.name, family.seed) for family in families]
    if len(set(labels)) < len(labels):
        raise OptionError(f"models: expected families that differ in name or seed, got {labels}.")
    return families


def _halves(
    pairs: Mapping[str, PreferencePairs], seed: int
) -> tuple[dict[str, PreferencePairs], dict[str, PreferencePairs]]:
    """Split both objectives together, so that a prompt of both is on the same side for both."""
    prompts = joined(pairs).prompts
    if len(prompts) < 2:
        raise OptionError(
            f"pairs: pairs of {len(prompts)} prompt{'' if len(prompts) == 1 else 's'} cannot be split into halves. "
            "Pass pairs of more prompts, or scoring_pairs (also a key of the YAML file)."
        )
    held = set(joined(pairs).split(0.5, seed=seed)[1].prompts)
    sides = [
        {name: PreferencePairs(pair for pair in pairs[name] if (pair.prompt in held) == side) for name in OBJECTIVES}
        for side in (False, True)
    ]
    for side in sides:
        for name, part in side.items():
            if not len(part):
                raise OptionError(
                    f"pairs: too few prompts of {name!r} to split into halves. Give more pairs, or scoring_pairs."
                )
    return sides[0], sides[1]


def _require_names(what: str, given: Mapping[str, object], names: tuple[str, ...]) -> None:
    if set(given) != set(names):
        raise OptionError(f"{what}: expected exactly {list(names)}, got {sorted(given)}.")
