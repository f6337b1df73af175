"""The whole comparison of three reward models in one object."""

import json
import warnings
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import pandas as pd
from tqdm.auto import tqdm

from rmtension import evaluation
from rmtension.ablation import AblationContext
from rmtension.activations import ActivationCollector, ActivationStatistics
from rmtension.attribution import METHODS, NEEDS_REWARD, NeuronAttribution
from rmtension.errors import OptionError, ProvenanceError, RMTensionWarning, StorageError
from rmtension.neurons import NeuronScores, NeuronSet
from rmtension.pairs import PreferencePairs
from rmtension.reward_head import RewardHead
from rmtension.scored import ScoredPairs
from rmtension.shared import SharedNeuronAnalyzer, SharedNeuronReport
from rmtension.sites import check_positions, find_site

OBJECTIVES = ("helpful", "harmless")
MODELS = (*OBJECTIVES, "mixed")
TABLES = ("accuracy", "overlap", "depth", "ablation", "neurons")
_SUMMARY = "summary.json"


@dataclass(frozen=True)
class StudyOptions:
    """What a study does, and with which numbers.

    `fraction` of the neurons make a top set, ranked `by` |score| or signed score of `method` at `site` and
    `positions`. Sets are ablated with `mode` ("zero" or "mean") at all tokens and compared with `n_draws` random sets,
    matched in size layer by layer. `seed` governs the division of the pairs, the random sets and the bootstrap.
    """

    fraction: float = 0.10
    method: str = "mean_difference"
    site: str = "mlp"
    positions: str = "response"
    by: str = "absolute"
    mode: str = "mean"
    n_draws: int = 8
    level: float = 0.95
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 < self.fraction <= 1:
            raise OptionError(f"fraction: expected a number in (0, 1], got {self.fraction}.")
        if self.mode not in ("zero", "mean"):
            raise OptionError(f"mode: expected 'zero' or 'mean', got {self.mode!r}.")
        if self.by not in ("absolute", "value"):
            raise OptionError(f"by: expected 'absolute' or 'value', got {self.by!r}.")
        if self.method not in METHODS:
            raise OptionError(f"method: expected one of {sorted(METHODS)}, got {self.method!r}.")
        if not 0 < self.level < 1:
            raise OptionError(f"level: expected a number in (0, 1), got {self.level}.")
        find_site(self.site)
        check_positions(self.positions)
        if self.n_draws < 2:
            raise OptionError(f"n_draws: expected at least 2 random sets to know their spread, got {self.n_draws}.")


@dataclass(frozen=True, eq=False)
class StudyResult:
    """The tables of a study, as data frames.

    `accuracy`: every model on every objective, with its interval; for pairs labelled so, refusing, responding and
    their mean; "length only" is the rule that prefers the longer response. `overlap`: top sets compared two by two.
    `depth`: where in the model each set lies. `ablation`: what the mixed model loses on each objective without each
    set, in total, per neuron, and beyond random sets. `neurons`: the score of every neuron in every model and the sets
    it is in. `summary`: options, versions, provenance and counts.
    """

    accuracy: pd.DataFrame
    overlap: pd.DataFrame
    depth: pd.DataFrame
    ablation: pd.DataFrame
    neurons: pd.DataFrame
    summary: dict[str, Any]

    def to_frame(self, table: str = "accuracy") -> pd.DataFrame:
        """One of the tables, by name."""
        if table not in TABLES:
            raise OptionError(f"table: expected one of {list(TABLES)}, got {table!r}.")
        frame: pd.DataFrame = getattr(self, table)
        return frame.copy()

    def save(self, folder: str | Path, *, overwrite: bool = False) -> Path:
        """Write one CSV a table and `summary.json`; refuses a folder that holds a study unless `overwrite`."""
        folder = require_no_study(folder, overwrite=overwrite)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            (folder / _SUMMARY).unlink(missing_ok=True)
            for table in TABLES:
                self.to_frame(table).to_csv(folder / f"{table}.csv", index=False)
            # Last, so that a folder with a summary holds a whole study.
            (folder / _SUMMARY).write_text(json.dumps(self.summary, indent=2) + "\n", encoding="utf-8")
        except OSError as error:
            raise StorageError(f"{folder}: the study could not be written ({error}).") from error
        return folder

    @classmethod
    def load(cls, folder: str | Path) -> "StudyResult":
        """Read what `save` wrote."""
        folder = Path(folder)
        try:
            frames = {table: pd.read_csv(folder / f"{table}.csv") for table in TABLES}
            summary = json.loads((folder / _SUMMARY).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise StorageError(f"{folder}: no whole study here ({error}).") from error
        return cls(**frames, summary=summary)


def require_no_study(folder: str | Path, *, overwrite: bool = False) -> Path:
    """`folder` as a path; raises `StorageError` when a study is in it, unless it may be overwritten."""
    folder = Path(folder)
    if (folder / _SUMMARY).exists() and not overwrite:
        raise StorageError(
            f"{folder}: already holds a study. Choose another folder, or pass overwrite=True (--overwrite)."
        )
    return folder


class TensionStudy:
    """Three reward models, pairs for both objectives, and everything that is asked of them.

    Args:
        models: "helpful", "harmless" and "mixed" -> a `RewardHead`, or a checkpoint that is opened when its turn comes.
            All three must have one architecture.
        pairs: "helpful" and "harmless" -> pairs that no model was trained on.
        base: the language model they were trained from, as a head or a checkpoint, for the overlap it accounts for.
        scoring_pairs: pairs that neurons are scored on. By default `pairs` are divided by prompt: one half scores
            neurons, the other evaluates models and ablations, so that no effect is measured on the pairs that chose
            its neurons.
        options: see `StudyOptions`.
    """

    def __init__(
        self,
        models: Mapping[str, RewardHead | str | Path],
        pairs: Mapping[str, PreferencePairs],
        *,
        base: RewardHead | str | Path | None = None,
        scoring_pairs: Mapping[str, PreferencePairs] | None = None,
        options: StudyOptions | None = None,
    ) -> None:
        _require_names("models", models, MODELS)
        _require_names("pairs", pairs, OBJECTIVES)
        self.options = options or StudyOptions()
        self.models = dict(models)
        self.base = base
        if base is not None and self.options.method in NEEDS_REWARD:
            raise OptionError(
                f"base: a base model has no reward, and {self.options.method!r} needs one. Leave the base out, or use "
                "another method."
            )
        if scoring_pairs is None:
            self.scoring, self.evaluating = _halves(pairs, self.options.seed)
        else:
            _require_names("scoring_pairs", scoring_pairs, OBJECTIVES)
            self.scoring, self.evaluating = dict(scoring_pairs), dict(pairs)
        both = set(_joined(self.scoring).prompts) & set(_joined(self.evaluating).prompts)
        if both:
            raise OptionError(
                f"scoring_pairs: {len(both)} prompts are in `pairs` too, so that effects would be measured on the "
                "pairs that chose the neurons. Use PreferencePairs.split."
            )

    def run(self, *, progress: bool = True) -> StudyResult:
        """Do it all.

        Cost: two forward passes per evaluation pair and model, two (four with gradients) per scoring pair and model,
        and on the mixed model two per evaluation pair for each of the 3 sets and 3 x `n_draws` random ones, and two per
        scoring pair for the means that `mode="mean"` writes.
        """
        options = self.options
        n_steps = len(MODELS) + (self.base is not None) + len(OBJECTIVES) * 3 * (1 + options.n_draws)
        with tqdm(total=n_steps, desc="study", unit="step", disable=None if progress else True) as bar:
            scored: dict[str, dict[str, ScoredPairs]] = {}
            scores: dict[str, NeuronScores] = {}
            base_scores = None
            everything_scoring = _joined(self.scoring)
            if self.base is not None:
                bar.set_description("study: base")
                base_scores = self._attribution(_open(self.base, reward=False)).score(everything_scoring)
                bar.update()
            for name in MODELS:
                bar.set_description(f"study: {name}")
                head = _open(self.models[name], reward=True)
                if scores and head.architecture != (expected := next(iter(scores.values())).provenance.architecture):
                    raise ProvenanceError(
                        f"models: architecture differs: {name!r} is {head.architecture}, the others are {expected}."
                    )
                scored[name] = {objective: head.score_pairs(self.evaluating[objective]) for objective in OBJECTIVES}
                scores[name] = self._attribution(head).score(self.scoring.get(name, everything_scoring))
                bar.update()
            everything = SharedNeuronAnalyzer(scores, base=base_scores).analyze(
                fraction=options.fraction, by=options.by
            )
            objectives = SharedNeuronAnalyzer({name: scores[name] for name in OBJECTIVES}, base=base_scores)
            report = objectives.analyze(fraction=options.fraction, by=options.by)
            # `head` is now the mixed model.
            ablation = self._ablate(head, report, scored["mixed"], bar)
        sets = {**{f"{name} only": report.specific[name] for name in OBJECTIVES}, "shared": report.shared}
        depth = pd.concat([everything.depth().query("set in @MODELS"), report.depth().query("set not in @MODELS")])
        return StudyResult(
            accuracy=self._accuracy(scored),
            overlap=everything.to_frame(),
            depth=depth.reset_index(drop=True),
            ablation=ablation,
            neurons=_neuron_table(scores, base_scores, sets),
            summary=self._summary(scored, {**scores, **({} if base_scores is None else {"base": base_scores})}, sets),
        )

    # -- parts -----------------------------------------------------------------------------------------------------

    def _attribution(self, head: RewardHead) -> NeuronAttribution:
        options = self.options
        return NeuronAttribution(head, method=options.method, site=options.site, positions=options.positions)

    def _accuracy(self, scored: Mapping[str, Mapping[str, ScoredPairs]]) -> pd.DataFrame:
        level, seed = self.options.level, self.options.seed
        rows: list[dict[str, Any]] = []
        for objective in OBJECTIVES:
            for model in MODELS:
                one = scored[model][objective]
                estimates = {
                    "accuracy": evaluation.accuracy(one, level=level, seed=seed),
                    **evaluation.balance(one, level=level, seed=seed),
                }
                estimates["margin"] = evaluation.mean_margin(one, level=level, seed=seed)
                rows += [
                    {"model": model, "objective": objective, "measure": measure, **estimate.to_dict()}
                    for measure, estimate in estimates.items()
                ]
            baseline = evaluation.length_baseline(self.evaluating[objective], level=level, seed=seed)
            rows.append({"model": "length only", "objective": objective, "measure": "accuracy", **baseline.to_dict()})
        return pd.DataFrame(rows)

    def _ablate(
        self, head: RewardHead, report: SharedNeuronReport, before: Mapping[str, ScoredPairs], bar: "tqdm[Any]"
    ) -> pd.DataFrame:
        options = self.options
        reference = None
        if options.mode == "mean":
            reference = ActivationCollector(head, site=options.site).collect(_joined(self.scoring))
        named = {f"{name} only": report.specific[name] for name in OBJECTIVES} | {"shared": report.shared}
        top = report.sets["helpful"] | report.sets["harmless"]
        rows = []
        for name, neurons in named.items():
            bar.set_description(f"study: without {name}")
            draws = self._random_sets(neurons, top)
            for objective in OBJECTIVES:
                pairs = self.evaluating[objective]
                after = self._without(head, neurons, reference, pairs)
                bar.update()
                controls = []
                for draw in draws:
                    controls.append(self._without(head, draw, reference, pairs))
                    bar.update()
                bar.update(options.n_draws - len(draws))
                for quantity in ("accuracy", "margin"):
                    rows.append(
                        {"set": name, "objective": objective, "quantity": quantity, "size": len(neurons)}
                        | self._effect(after, before[objective], controls, quantity, len(neurons))
                    )
        return pd.DataFrame(rows)

    def _random_sets(self, neurons: NeuronSet, exclude: NeuronSet) -> list[NeuronSet]:
        """The controls; none where some layer has too few neurons outside the top sets to match it."""
        first = self.options.seed * self.options.n_draws
        try:
            return [neurons.matched_random(seed=first + draw, exclude=exclude) for draw in range(self.options.n_draws)]
        except OptionError as error:
            warnings.warn(f"No matched random sets for {neurons!r}: {error}", RMTensionWarning, stacklevel=3)
            return []

    def _without(
        self, head: RewardHead, neurons: NeuronSet, reference: ActivationStatistics | None, pairs: PreferencePairs
    ) -> ScoredPairs:
        with AblationContext(head, neurons, mode=self.options.mode, reference=reference):
            return head.score_pairs(pairs)

    def _effect(
        self,
        after: ScoredPairs,
        before: ScoredPairs,
        controls: list[ScoredPairs],
        quantity: Literal["accuracy", "margin"],
        size: int,
    ) -> dict[str, float]:
        level, seed = self.options.level, self.options.seed
        effect = evaluation.change(after, before, quantity=quantity, level=level, seed=seed)
        level_of = evaluation.accuracy if quantity == "accuracy" else evaluation.mean_margin
        changes = [evaluation.pair_change(one, before, quantity) for one in (after, *controls)]
        control = evaluation.NO_CONTROL
        if controls:
            control = evaluation.against_random(changes[0], changes[1:], after.pairs, level=level, seed=seed)
        return {
            "before": level_of(before).value,
            "after": level_of(after).value,
            "effect": effect.value,
            "low": effect.low,
            "high": effect.high,
            "per_neuron": effect.value / size if size else float("nan"),
            "random_effect": control.random_mean,
            "random_sd": control.random_sd,
            "n_draws": control.n_draws,
            "beyond_random": control.difference,
            "beyond_low": control.low,
            "beyond_high": control.high,
            "n": effect.n,
        }

    def _summary(
        self,
        scored: Mapping[str, Mapping[str, ScoredPairs]],
        scores: Mapping[str, NeuronScores],
        sets: Mapping[str, NeuronSet],
    ) -> dict[str, Any]:
        return {
            "version": version("rmtension"),
            "options": asdict(self.options),
            "models": {name: one.provenance.to_dict() for name, one in scores.items()},
            "sizes": {name: len(neurons) for name, neurons in sets.items()},
            "pairs": {
                name: {
                    "scoring": len(self.scoring[name]),
                    "evaluating": len(self.evaluating[name]),
                    "identical_responses": self.evaluating[name].n_ties,
                    "prompts_cut": scored["mixed"][name].n_prompts_cut,
                    "digest": self.evaluating[name].digest,
                }
                for name in OBJECTIVES
            },
            "accuracy": {
                model: {objective: scored[model][objective].accuracy() for objective in OBJECTIVES} for model in MODELS
            },
        }


def _open(model: RewardHead | str | Path, *, reward: bool) -> RewardHead:
    if isinstance(model, RewardHead):
        return model
    return RewardHead.from_pretrained(model) if reward else RewardHead.from_language_model(model)


def _joined(pairs: Mapping[str, PreferencePairs]) -> PreferencePairs:
    return pairs["helpful"] + pairs["harmless"]


def _halves(
    pairs: Mapping[str, PreferencePairs], seed: int
) -> tuple[dict[str, PreferencePairs], dict[str, PreferencePairs]]:
    """Divide both objectives at once: a prompt that both have is on one side for both."""
    held = set(_joined(pairs).split(0.5, seed=seed)[1].prompts)
    sides = [
        {name: PreferencePairs(pair for pair in pairs[name] if (pair.prompt in held) == side) for name in OBJECTIVES}
        for side in (False, True)
    ]
    for side in sides:
        for name, part in side.items():
            if not len(part):
                raise OptionError(
                    f"pairs: too few prompts of {name!r} to divide in halves. Give more, or scoring_pairs."
                )
    return sides[0], sides[1]


def _require_names(what: str, given: Mapping[str, object], names: tuple[str, ...]) -> None:
    if set(given) != set(names):
        raise OptionError(f"{what}: expected exactly {list(names)}, got {sorted(given)}.")


def _neuron_table(
    scores: Mapping[str, NeuronScores], base: NeuronScores | None, sets: Mapping[str, NeuronSet]
) -> pd.DataFrame:
    named = dict(scores) | ({} if base is None else {"base": base})
    frame = next(iter(named.values())).to_frame()[["layer", "neuron"]]
    for name, one in named.items():
        frame[[f"score_{name}", f"stderr_{name}"]] = one.to_frame()[["score", "stderr"]]
    for name, neurons in sets.items():
        frame[f"in_{name.replace(' ', '_')}"] = neurons.mask.flatten().numpy()
    return frame
