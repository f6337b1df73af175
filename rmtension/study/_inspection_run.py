"""The steps of an inspection, in order, each timed."""

import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from importlib.metadata import version
from itertools import combinations, islice
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from rmtension._progress import progress_bar
from rmtension.attribution._faithfulness import faithfulness
from rmtension.attribution._faithfulness_result import Faithfulness
from rmtension.attribution._make_dashboards import neuron_dashboards
from rmtension.attribution._neuron_attribution import NeuronAttribution
from rmtension.attribution._neuron_dashboards import NeuronDashboards
from rmtension.data._groups import ALL
from rmtension.data._pairs import PreferencePairs
from rmtension.errors import CheckError
from rmtension.interventions._ablation_effects import ablation_effects
from rmtension.interventions._replacements import Mean
from rmtension.neurons._conflict import conflict
from rmtension.neurons._conflict_report import ConflictReport, have_columns
from rmtension.neurons._neuron_scores import NeuronScores, top_size
from rmtension.neurons._neuron_set import NeuronSet
from rmtension.neurons._pair_attributions import PairAttributions
from rmtension.passes._activation_collector import ActivationCollector
from rmtension.passes._running_scores import RunningScores
from rmtension.reward_head import RewardHead
from rmtension.study._family_runs import joined
from rmtension.study._inspection_outputs import OutputComparison, compare_outputs
from rmtension.study._inspection_plan import FAITHFUL_FRACTIONS, FAITHFUL_RANDOM, InspectionPlan
from rmtension.study._inspection_result import ModelInspection
from rmtension.study._inspection_tables import groups_table, maps_table, neuron_table

SITE = "mlp"
METHOD = "attribution_patching"
LEVEL = 0.95
SHARED = "shared by two or more"
# With more groups, only the largest are compared with each other.
_MOST_MAPPED = 6

Groups = Mapping[str, PreferencePairs]


class InspectionRun:
    """One run: `result` runs all steps and returns what they found.

    Args:
        head: the model.
        plan: how much runs.
        used: the pairs by group.
        halves: the pairs that neurons are scored on, and those that effects are measured on, by group; only groups that
            are large enough.
        fraction: the share of neurons in every top set.
        outputs: the inspected output and those to compare it with, by name; None for no comparison.
        seed: seed of every random choice.
        work: a folder that keeps the work of every pass.
        progress: show progress bars.
    """

    def __init__(
        self,
        head: RewardHead,
        plan: InspectionPlan,
        used: Groups,
        halves: tuple[Groups, Groups],
        *,
        fraction: float,
        outputs: Mapping[str, RewardHead] | None,
        seed: int,
        work: Path | None,
        progress: bool | None,
    ) -> None:
        self._head, self._plan, self._fraction, self._seed = head, plan, fraction, seed
        self._used, (self._scoring, self._evaluating) = used, halves
        self._outputs = outputs
        self._work, self._progress = work, progress
        self._seconds: dict[str, float] = {}

    def result(self, *, asked: Mapping[str, Any]) -> ModelInspection:
        """Run all steps; `asked` has what the user asked for and the summary keeps: `by` and `budget`."""
        n_steps = 7 + (self._outputs is not None)
        with progress_bar(progress=self._progress, total=n_steps, desc="inspect", unit="step") as bar:

            def step(name: str, run: Callable[[], Any]) -> Any:
                bar.set_description(f"inspect: {name}")
                start = time.perf_counter()
                outcome = run()
                self._seconds[name] = time.perf_counter() - start
                bar.update()
                return outcome

            checks = step("checks", self._check)
            groups = step("rewards", self._rewards)
            replacement = step("means", self._means)
            scores, maps = step("attribution", lambda: self._attribution(replacement))
            comparison = None
            if (outputs := self._outputs) is not None:
                comparison = step("outputs", lambda: self._compared(outputs, replacement))
            sets = {name: _top(of_group, self._fraction) for name, of_group in scores.items()}
            effects = step("ablations", lambda: self._ablations(sets | _shared(sets), replacement))
            agreement: Faithfulness = step("faithfulness", lambda: self._faithfulness(replacement))
            dashboards = step("neurons", lambda: self._dashboards(scores))
        tables = {
            "groups": groups,
            "neurons": neuron_table(scores, sets),
            "maps": maps_table(maps),
            "effects": effects,
            "faithfulness": agreement.summary,
            "faithfulness_sets": agreement.sets,
            "checks": checks,
        }
        if comparison is None:
            return ModelInspection(tables, scores, maps, agreement, dashboards, {**self._summary(), **asked})
        summary = {**self._summary(), **asked, "outputs": list(self._outputs or ())}
        tables |= comparison.tables
        return ModelInspection(tables, scores, maps, agreement, dashboards, summary, comparison.maps)

    # -- steps ---------------------------------------------------------------------------------------------------------

    def _check(self) -> pd.DataFrame:
        try:
            return self._head.check(_few_of_each(self._used, 8))
        except CheckError as error:
            return error.table

    def _rewards(self) -> pd.DataFrame:
        scored = self._head.score_pairs(joined(self._used), work=self._folder("rewards"), progress=self._progress)
        rewards, start = {}, 0
        for name, part in self._used.items():
            rewards[name] = scored.take(list(range(start, start + len(part))))
            start += len(part)
        small = [name for name in self._used if name not in self._scoring]
        notes = dict.fromkeys(small, "too few prompts to score neurons on one half and measure effects on the other")
        return groups_table(rewards, notes, level=LEVEL, seed=self._seed)

    def _means(self) -> Mean:
        collector = ActivationCollector(self._head, site=SITE)
        return Mean(collector.collect(joined(self._scoring), work=self._folder("means"), progress=self._progress))

    def _attribution(self, replacement: Mean) -> tuple[dict[str, NeuronScores], dict[tuple[str, str], ConflictReport]]:
        attribution = NeuronAttribution(self._head, METHOD, replacement=replacement, site=SITE)
        by_pair = attribution.per_pair(joined(self._scoring), work=self._folder("attribution"), progress=self._progress)
        keys = torch.tensor([text.key for text in self._head.encode(by_pair.pairs).chosen])
        # Pairs that are skipped because they produce NaN or infinity have no row.
        row_of = {id(pair): row for row, pair in enumerate(by_pair.pairs)}
        scores: dict[str, NeuronScores] = {}
        of_group: dict[str, PairAttributions] = {}
        for name, part in self._scoring.items():
            rows = [row_of[id(pair)] for pair in part if id(pair) in row_of]
            of_group[name] = by_pair.take(rows)
            running = RunningScores(self._head.n_layers, self._head.n_neurons(SITE))
            running.update(of_group[name].values.double(), keys[rows])  # noqa: PD011 - a tensor
            scores[name] = running.compute(replace(by_pair.provenance, data=part.digest, n_pairs=len(rows)))
        return scores, self._maps(of_group)

    def _maps(self, of_group: Mapping[str, PairAttributions]) -> dict[tuple[str, str], ConflictReport]:
        largest = sorted(of_group, key=lambda name: -len(of_group[name]))[:_MOST_MAPPED]
        maps = {}
        for first, second in combinations([name for name in of_group if name in largest], 2):
            names = (first, second) if have_columns((first, second)) else (f"group {first}", f"second group {second}")
            if not all(of_group[name].mean().any() for name in (first, second)):
                continue  # every score is 0, so that there is no direction to compare
            maps[names] = conflict(of_group[first], of_group[second], names=names, level=LEVEL, seed=self._seed)
        return maps

    def _compared(self, outputs: Mapping[str, RewardHead], replacement: Mean) -> OutputComparison:
        return compare_outputs(
            outputs,
            self._used,
            joined(self._scoring),
            replacement,
            method=METHOD,
            site=SITE,
            level=LEVEL,
            seed=self._seed,
            work=self._folder("outputs"),
            progress=self._progress,
        )

    def _ablations(self, sets: Mapping[str, NeuronSet], replacement: Mean) -> pd.DataFrame:
        return ablation_effects(
            self._head,
            sets,
            joined(self._evaluating),
            replacement,
            by=None if list(self._evaluating) == [ALL] else _labels(self._evaluating),
            n_draws=self._plan.n_draws,
            level=LEVEL,
            seed=self._seed,
            work=self._folder("ablations"),
            progress=self._progress,
        )

    def _faithfulness(self, replacement: Mean) -> Faithfulness:
        few = joined(self._evaluating).sample(self._plan.n_faithful_pairs, seed=self._seed)
        attribution = NeuronAttribution(self._head, METHOD, replacement=replacement, site=SITE)
        return faithfulness(
            self._head,
            few,
            attribution.score(few, progress=self._progress),
            replacement,
            sample=self._plan.n_neurons,
            set_fractions=FAITHFUL_FRACTIONS,
            n_random=FAITHFUL_RANDOM,
            level=LEVEL,
            seed=self._seed,
            progress=self._progress,
        )

    def _dashboards(self, scores: Mapping[str, NeuronScores]) -> NeuronDashboards:
        neurons = _strongest(scores, self._plan.n_dashboards, self._head.architecture)
        return neuron_dashboards(self._head, neurons, self._evaluating, seed=self._seed, progress=self._progress)

    # -- inside --------------------------------------------------------------------------------------------------------

    def _summary(self) -> dict[str, Any]:
        head = self._head
        return {
            "version": version("rmtension"),
            "architecture": head.architecture,
            "model": head.fingerprint,
            **({} if head.output_name is None else {"output": head.output_name}),
            **_head_passed(head),
            "dtype": str(head.dtype).removeprefix("torch."),
            "site": SITE,
            "method": METHOD,
            "replacement": "mean",
            "fraction": self._fraction,
            "level": LEVEL,
            "seed": self._seed,
            "digest": joined(self._used).digest,
            "scoring": {name: len(part) for name, part in self._scoring.items()},
            "evaluating": {name: len(part) for name, part in self._evaluating.items()},
            "plan": self._plan.to_dict(),
            "seconds": dict(self._seconds),
        }

    def _folder(self, step: str) -> Path | None:
        return None if self._work is None else self._work / step


def _few_of_each(groups: Groups, n: int) -> PreferencePairs:
    """The first pairs of every group in turn, `n` in all."""
    in_turn = (part[row] for row in range(n) for part in groups.values() if row < len(part))
    return PreferencePairs(islice(in_turn, n))


def _labels(groups: Groups) -> list[str]:
    return [name for name, part in groups.items() for _ in part]


def _top(scores: NeuronScores, fraction: float) -> NeuronSet:
    """The share of neurons that support the margin most, without neurons that do not support it."""
    n_supporting = int((scores.as_effects() < 0).sum())
    size = min(top_size(fraction, scores.stderr.numel()), n_supporting)
    top = scores.top(k=max(1, size), rank_by="supports")
    return top if size else top & ~top


def _shared(sets: Mapping[str, NeuronSet]) -> dict[str, NeuronSet]:
    """The neurons in the top sets of two groups or more, under their name; nothing if there are none."""
    counts = torch.stack([neurons.mask.long() for neurons in sets.values()]).sum(dim=0)
    shared = replace(next(iter(sets.values())), mask=counts > 1)
    return {SHARED: shared} if len(shared) else {}


def _strongest(scores: Mapping[str, NeuronScores], n: int, architecture: str) -> NeuronSet:
    """The strongest neurons of every group in turn, `n` in all."""
    effects = [of_group.as_effects() for of_group in scores.values()]
    orders = [effect.abs().flatten().argsort(descending=True, stable=True).tolist() for effect in effects]
    in_turn = (order[rank] for rank in range(len(orders[0])) for order in orders)
    chosen: dict[int, None] = {}
    for neuron in in_turn:
        if len(chosen) == n:
            break
        chosen[neuron] = None
    mask = torch.zeros(effects[0].numel(), dtype=torch.bool)
    mask[list(chosen)] = True
    return NeuronSet(mask.view(tuple(effects[0].shape)), SITE, architecture)


def _head_passed(head: RewardHead) -> dict[str, str]:
    """How a head that the checkpoint does not hold is written in code; empty for a row."""
    source = None if head.checkpoint is None else head.checkpoint.source
    if head.weight is not None or (source is not None and source.head is None):
        return {}
    return {"head": head.require_head().expression}
