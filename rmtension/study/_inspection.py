"""One reward model, opened: accuracy, neurons, conflict, faithfulness and ablations per group of pairs."""

import shutil
from pathlib import Path

from rmtension._arguments import require_arguments
from rmtension.data._groups import GroupBy
from rmtension.data._pairs import PreferencePairs
from rmtension.errors import OptionError
from rmtension.interventions._ablation_effects import grouped
from rmtension.reward_head import RewardHead
from rmtension.store._work_folder import locked
from rmtension.study._inspection_plan import InspectionPlan, choose_plan, measure_speed, parse_budget
from rmtension.study._inspection_result import ModelInspection
from rmtension.study._inspection_run import SITE, InspectionRun, joined

# A group with fewer prompts is not divided into halves, so its neurons are not scored.
FEWEST_PROMPTS = 8
# Scores per pair and neuron that are kept in memory, in bytes.
_MOST_BYTES = 2 << 30


class ModelInspector:
    """An inspection of one reward model: a plan first, then the run.

    Args:
        head: the model.
        pairs: the pairs, which the model was not trained on.
        by: the groups: "objective", "subset" or another label of the pairs, one label per pair, or a function from a
            pair to its label; default: as in `ablation_effects`.
        fraction: the share of neurons in every group's top set.
        budget: the time that the run may take, in seconds or as "20min"; it chooses how many pairs, random sets and
            neurons are used. Default: as much as is useful.
        seed: seed of every random choice.

    Making it times one batch, which takes a few seconds. Raises `OptionError` for a budget that is too short, an
    unknown label, or if no group has enough prompts.

    Examples:
        >>> from rmtension.study import ModelInspector
        >>> inspector = ModelInspector(head, pairs["helpful"] + pairs["harmless"], by="objective")
        >>> inspector.plan.pairs
        {'helpful': 24, 'harmless': 24}
    """

    def __init__(
        self,
        head: RewardHead,
        pairs: PreferencePairs,
        *,
        by: GroupBy | None = None,
        fraction: float = 0.02,
        budget: int | float | str | None = None,
        seed: int = 0,
    ) -> None:
        require_arguments("inspect_model(head, pairs)", head=(head, RewardHead), pairs=(pairs, PreferencePairs))
        head.require_weight()
        if not 0 < fraction <= 0.5:
            raise OptionError(f"fraction: expected a share of the neurons in (0, 0.5], got {fraction}.")
        seconds = parse_budget(budget)
        if not len(pairs):
            raise OptionError("pairs: expected at least one pair, got none.")
        groups = grouped(pairs, by)
        everything, *named = groups.items()
        self._groups = {name: PreferencePairs(pairs[row] for row in rows) for name, rows in (named or [everything])}
        self._large = [name for name, part in self._groups.items() if len(part.prompts) >= FEWEST_PROMPTS]
        if not self._large:
            sizes = ", ".join(f"{name!r}: {len(part.prompts)}" for name, part in self._groups.items())
            raise OptionError(
                f"by: every group has fewer than {FEWEST_PROMPTS} prompts ({sizes}), which is too few to score neurons "
                "on one half and measure effects on the other. Use larger groups or more pairs."
            )
        self.head, self.fraction, self.seed = head, fraction, seed
        n_all = head.n_layers * head.n_neurons(SITE)
        known = PreferencePairs(pair for name in self._large for pair in self._groups[name])
        speed = measure_speed(head, known, site=SITE, fraction=fraction, seed=seed)
        self.plan: InspectionPlan = choose_plan(
            speed,
            self._groups,
            budget=seconds,
            n_all_neurons=n_all,
            most_pairs=2 * _MOST_BYTES // (n_all * head.reward_dtype.itemsize),
        )

    def run(self, *, folder: str | Path | None = None, progress: bool | None = None) -> ModelInspection:
        """Run the plan.

        With a `folder`, the work of every pass is kept in `folder/work` until the run ends, so that the same call
        resumes after an interruption. The result is not saved: call `save`. Raises `StorageError` if another process
        works in the folder, or if it belongs to a run with other settings.

        Cost: what the plan says.
        """
        if folder is None:
            return self._run(None, progress)
        folder = Path(folder)
        with locked(folder):
            result = self._run(folder / "work", progress)
            shutil.rmtree(folder / "work", ignore_errors=True)
        return result

    def _run(self, work: Path | None, progress: bool | None) -> ModelInspection:
        used = {name: part.sample(self.plan.pairs[name], seed=self.seed) for name, part in self._groups.items()}
        large = {name: used[name] for name in self._large}
        held = set(joined(large).split(0.5, seed=self.seed)[1].prompts)

        def half(*, is_held: bool) -> dict[str, PreferencePairs]:
            """One side of every group; a prompt of several groups is on the same side in all of them."""
            return {
                name: PreferencePairs(pair for pair in part if (pair.prompt in held) == is_held)
                for name, part in large.items()
            }

        run = InspectionRun(
            self.head,
            self.plan,
            used,
            (half(is_held=False), half(is_held=True)),
            fraction=self.fraction,
            seed=self.seed,
            work=work,
            progress=progress,
        )
        return run.result()


def inspect_model(
    head: RewardHead,
    pairs: PreferencePairs,
    *,
    by: GroupBy | None = None,
    fraction: float = 0.02,
    budget: int | float | str | None = None,
    folder: str | Path | None = None,
    seed: int = 0,
    progress: bool | None = None,
) -> ModelInspection:
    """Open one reward model: which neurons drive its preference in each group of pairs, and what breaks without them.

    The prompts are divided into halves: one scores the neurons, the other measures effects, so that no effect is
    measured on the pairs that selected its neurons. Scores are those of attribution patching with the mean activation
    as replacement, ablations use the same mean, and all positions are ablated. Per group, the top set has the
    `fraction` of neurons that support the margin most. `ModelInspector` has the arguments, and shows the plan before it
    runs; `rmtension.report.write_report(inspection, folder)` makes one page.

    Cost: `ModelInspector(...).plan` says it.

    Examples:
        >>> inspection = inspect_model(head, pairs["helpful"] + pairs["harmless"], by="objective", progress=False)
        >>> effects = inspection.to_frame("effects").query("quantity == 'margin' and group != 'all pairs'")
        >>> effects[["set", "group", "effect"]].round(1).head(2)
               set     group  effect
        3  helpful   helpful    -0.6
        5  helpful  harmless     0.0
    """
    inspector = ModelInspector(head, pairs, by=by, fraction=fraction, budget=budget, seed=seed)
    return inspector.run(folder=folder, progress=progress)
