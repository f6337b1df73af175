"""The paper's study from training to report, in stages that are kept on disk."""

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import pandas as pd

from rmtension.attribution._make_dashboards import describe_dashboards
from rmtension.attribution._neuron_dashboards import NeuronDashboards
from rmtension.replication._faithful import Faithful, measure_faithfulness
from rmtension.replication._plan import analyses_of_neurons, plan_stages, plan_text, sampled
from rmtension.replication._prepare import PreparedPairs, prepare_base, prepare_pairs
from rmtension.replication._recipe import Recipe
from rmtension.replication._stages import Clock
from rmtension.replication._trained_layers import overlap_of_trained_layers
from rmtension.report._every_format import write_report
from rmtension.report._neurons_of_study import study_neurons
from rmtension.reward_head import RewardHead
from rmtension.store._files import write_text
from rmtension.store._provenance import TRAINING_RECORD
from rmtension.store._work_folder import claim, locked
from rmtension.study._family_runs import MODELS, ModelFamily
from rmtension.study._options import BEHAVIOUR
from rmtension.study._result import StudyResult
from rmtension.study._tension_study import TensionStudy
from rmtension.training._family import train_seeds


@dataclass(frozen=True)
class Replication:
    """What `replicate` found; everything is in its folder too.

    - `corrected` and `paper`: the study by the corrected and by the published rules (None if it was left out).
    - `pairs`: what was read, left out and kept; `models`: how each reward model was trained.
    - `faithfulness`: how well each method predicts true effects; None if it was left out.
    - `overlap_trained`: overlaps of top sets within the trained layers, if training left the lower layers as they were,
      because in the lower ones all models have the same activations (see `overlap_of_trained_layers`).
    - `stages`: the seconds of every stage, over all runs, and the passes over models that this run ran and read.

    Examples:
        >>> Replication.__match_args__
        ('corrected', 'paper', 'pairs', 'models', 'faithfulness', 'overlap_trained', 'stages')
    """

    corrected: StudyResult
    paper: StudyResult | None
    pairs: pd.DataFrame
    models: pd.DataFrame
    faithfulness: Faithful | None
    overlap_trained: pd.DataFrame | None
    stages: pd.DataFrame


def replicate(
    recipe: Recipe,
    out: str | Path,
    *,
    describe: Callable[[str], str] | None = None,
    progress: bool | None = None,
    on_stage: Callable[[str], object] | None = None,
    on_log: Callable[[str, str], object] | None = None,
) -> Replication:
    """Run a recipe: base, pairs, reward models, ten analyses by both rules, faithfulness, neurons, report.

    The plan, with times, comes first; `plan_replication` stops there. Every model and every pass is kept in `out`: a
    second run reads them and runs nothing, and after an interruption, or with more seeds, only what is missing runs.
    `describe` describes the neurons (see `describe_dashboards`). `on_stage` is called with a line when a stage begins,
    `on_log` with a model's name and a line about its losses. Raises `StorageError` if `out` belongs to another recipe;
    other errors are those of the stages.

    Examples:
        >>> from rmtension.study import StudyOptions
        >>> from rmtension.training import FamilySettings
        >>> for name, some in pairs.items():
        ...     some.to_jsonl(f"{name}.jsonl")
        >>> recipe = Recipe(
        ...     "organism",
        ...     {"helpful": ("helpful.jsonl",), "harmless": ("harmless.jsonl",)},
        ...     seeds=(0,),
        ...     test_share=0.5,
        ...     validation_share=0.1,
        ...     training=FamilySettings(max_length=64, reward_epochs=1.0),
        ...     study=StudyOptions(analyses=("accuracy", "depth"), scores=("mean_difference",)),
        ...     paper=None,
        ...     n_single=0,
        ...     n_neurons=0,
        ... )
        >>> list(replicate(recipe, "replication", progress=False).models["model"])
        ['helpful', 'harmless', 'mixed']
    """
    out = Path(out)
    tell = on_stage or (lambda line: None)
    with locked(out):
        claim(out, _inputs(recipe))
        clock = Clock(out / "stages.json", tell)
        base, pairs, plan = _prepared(recipe, out, clock)
        tell(plan_text(plan))
        with clock.stage("models"):
            families = train_seeds(
                pairs.parts["train"],
                out / "models",
                recipe.seeds,
                base=base,
                settings=recipe.training,
                validation=pairs.parts["validation"],
                name=Path(recipe.base).stem,
                jobs=recipe.jobs,
                progress=progress,
                on_stage=tell,
                on_log=on_log,
            )
        by_rules = {"corrected": recipe.study, **({} if recipe.paper is None else {"published": recipe.paper})}
        behaviour: dict[str, StudyResult] = {}
        with clock.stage("behaviour") as passes:
            for rules, options in by_rules.items():
                study = TensionStudy(
                    families,
                    pairs.test,
                    scoring_pairs=pairs.parts["validation"],
                    options=replace(options, analyses=BEHAVIOUR),
                )
                behaviour[rules] = _run(study, out / "behaviour", passes, progress)
        studies: dict[str, StudyResult] = {}
        for rules, options in by_rules.items():
            with clock.stage(f"{rules} rules") as passes:
                study = TensionStudy(
                    families,
                    sampled(pairs.parts["evaluation"], recipe.n_evaluating),
                    scoring_pairs=sampled(pairs.parts["scoring"], recipe.n_scoring),
                    options=replace(options, analyses=analyses_of_neurons(options)),
                )
                found = _run(study, out / "study", passes, progress)
                studies[rules] = _joined(behaviour[rules], found)
                studies[rules].save(out / rules, overwrite=True)
                if rules == "corrected":
                    main = study
        first = f"seed-{recipe.seeds[0]}"
        faithful = None
        if recipe.n_single:
            with clock.stage("faithfulness") as passes:
                some = sampled(pairs.parts["evaluation"], recipe.n_faithful)
                faithful = measure_faithfulness(
                    families[0].mixed, some, recipe, out / "faithfulness" / first, passes=passes, progress=progress
                )
        neurons = None
        if recipe.n_neurons:
            with clock.stage("neurons"):
                kept = out / "neurons" / f"{first}.json"
                if not kept.exists():
                    study_neurons(main, n=recipe.n_neurons, work=out / "neurons" / first, progress=progress).save(kept)
                neurons = NeuronDashboards.load(kept)
                if describe is not None:
                    head = RewardHead.from_pretrained(str(families[0].mixed))
                    neurons = describe_dashboards(neurons, head, main.evaluating, describe, progress=progress)
                    neurons.save(kept)
        with clock.stage("report"):
            models = _trained(families)
            for rules, result in studies.items():
                write_report(result, out / rules, neurons=neurons if rules == "corrected" else None)
            overlap = _overlap_trained(studies["corrected"], recipe)
            if overlap is not None:
                overlap.to_csv(out / "overlap_trained.csv", index=False)
            pairs.counts.to_csv(out / "pairs.csv", index=False)
            models.to_csv(out / "models.csv", index=False)
        stages = clock.table()
        stages.to_csv(out / "stages.csv", index=False)
    return Replication(studies["corrected"], studies.get("published"), pairs.counts, models, faithful, overlap, stages)


def plan_replication(
    recipe: Recipe, out: str | Path, *, on_stage: Callable[[str], object] | None = None
) -> pd.DataFrame:
    """What `replicate` runs, with times: base and pairs are prepared, and a batch of pairs is timed.

    One row per stage and analysis, with its passes, the tokens of one pass, and the predicted seconds on this machine;
    passes with gradients and of training count as the forward passes that take as long. The plan is kept in `out`.

    Examples:
        >>> for name, some in pairs.items():
        ...     some.to_jsonl(f"{name}.jsonl")
        >>> files = {"helpful": ("helpful.jsonl",), "harmless": ("harmless.jsonl",)}
        >>> recipe = Recipe("organism", files, seeds=(0,), test_share=0.5, validation_share=0.1, paper=None)
        >>> plan = plan_replication(recipe, "planned")
        >>> list(plan.columns)
        ['stage', 'what', 'passes', 'tokens', 'seconds']
        >>> list(plan["stage"].unique())
        ['models', 'behaviour', 'corrected rules', 'faithfulness', 'neurons']
    """
    out = Path(out)
    with locked(out):
        claim(out, _inputs(recipe))
        return _prepared(recipe, out, Clock(out / "stages.json", on_stage or (lambda line: None)))[2]


# -- inside ------------------------------------------------------------------------------------------------------------


def _prepared(recipe: Recipe, out: Path, clock: Clock) -> tuple[Path, PreparedPairs, pd.DataFrame]:
    """The base, the pairs, and the plan."""
    with clock.stage("base"):
        base = prepare_base(recipe.base, out / "base")
    with clock.stage("pairs"):
        from transformers import AutoTokenizer

        pairs = prepare_pairs(recipe, AutoTokenizer.from_pretrained(base))
    with clock.stage("plan"):
        kept = out / f"plan-{len(recipe.seeds)}-seeds.csv"
        if not kept.exists():
            write_text(kept, plan_stages(recipe, pairs, base).to_csv(index=False), "plan")
    return base, pairs, pd.read_csv(kept)


def _inputs(recipe: Recipe) -> dict[str, Any]:
    """What the kept models and passes depend on; not which seeds there are, nor how many are trained at a time."""
    values = asdict(recipe)
    del values["jobs"], values["seeds"]
    return {name: str(value) for name, value in values.items()}


def _run(study: TensionStudy, folder: Path, passes: dict[str, int], progress: bool | None) -> StudyResult:
    """Run a study in its folder, and count its passes."""
    result = study.run(folder=folder, progress=progress)
    passes["run"] += study.n_run
    passes["read"] += study.n_read
    return result


def _joined(behaviour: StudyResult, of_neurons: StudyResult) -> StudyResult:
    """One result of two studies with the same options: behaviour on all test pairs, neurons on some of them."""
    summary = of_neurons.summary
    options = {**summary["options"], "analyses": [*BEHAVIOUR, *summary["options"]["analyses"]]}
    counts = {
        name: {**part, "behaviour": behaviour.summary["pairs"][name]["evaluating"]}
        for name, part in summary["pairs"].items()
    }
    summary = {**summary, "options": options, "pairs": counts}
    return StudyResult({**behaviour.tables, **of_neurons.tables}, summary)


def _overlap_trained(result: StudyResult, recipe: Recipe) -> pd.DataFrame | None:
    """The overlaps within the trained layers; None if all are trained, or neurons were not scored."""
    n_trained, neurons = recipe.training.reward_trained_layers, result.tables.get("neurons")
    if n_trained is None or neurons is None:
        return None
    first = int(neurons["layer"].max()) + 1 - n_trained
    return overlap_of_trained_layers(neurons, recipe.study, first) if first > 0 else None


def _trained(families: list[ModelFamily]) -> pd.DataFrame:
    """How every reward model was trained, from the record in its folder."""
    rows = []
    for family in families:
        for name in MODELS:
            record = json.loads((Path(str(getattr(family, name))) / TRAINING_RECORD).read_text(encoding="utf-8"))
            result = record["result"]
            evaluated = {entry["step"]: entry for entry in result["history"] if "validation loss" in entry}
            best: dict[str, Any] = evaluated.get(result["best_step"], {})
            rows.append(
                {
                    "model": name,
                    "seed": family.seed,
                    "pairs": record["n_pairs"],
                    "tokens": record["n_tokens"],
                    "tokens run per epoch": record["n_tokens_run"],
                    "steps": result["n_steps"],
                    "best step": best.get("step"),
                    "validation loss": best.get("validation loss"),
                    "validation accuracy": best.get("validation accuracy"),
                    "digest": record["data"],
                }
            )
    return pd.DataFrame(rows)
