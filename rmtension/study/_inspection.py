"""One reward model, opened: accuracy, neurons, conflict, faithfulness and ablations per group of pairs."""

import hashlib
import json
import shutil
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from rmtension._arguments import require_arguments
from rmtension.data._chat import Chat, prompt_text
from rmtension.data._groups import ALL, GroupBy, named_groups
from rmtension.data._pairs import PreferencePairs
from rmtension.errors import OptionError, StorageError
from rmtension.reward_head import RewardHead
from rmtension.store._files import write_text
from rmtension.store._work_folder import claim, locked
from rmtension.study._family_runs import joined
from rmtension.study._inspection_outputs import chosen_outputs
from rmtension.study._inspection_plan import InspectionPlan, choose_plan, parse_budget
from rmtension.study._inspection_result import ModelInspection
from rmtension.study._inspection_run import SHARED, SITE, InspectionRun
from rmtension.study._speed import measure_speed

# A group with fewer prompts in either half is evaluated, but its neurons are not scored.
FEWEST_PROMPTS = 4
# Scores per pair and neuron that are kept in memory, in bytes.
_MOST_BYTES = 2 << 30
_PLAN = "plan.json"


class ModelInspector:
    """An inspection of one reward model: a plan first, then the run.

    Args:
        head: the model.
        pairs: the pairs, which the model was not trained on.
        by: the groups: "objective", "subset" or another label of the pairs, one label per pair, or a function from a
            pair to its label; default: as in `ablation_effects`.
        fraction: the share of neurons in every group's top set.
        outputs: other outputs of the model, or "all", to compare with the chosen output: how they rank the pairs, and
            which neurons they share or fight over.
        budget: the time that the timing and the run may take, in seconds or as "20min"; it chooses how many pairs,
            random sets and neurons are used. Opening the model and writing the page are not counted. Default: as much
            as is useful.
        seed: seed of every random choice.

    Making it times a few batches, which takes seconds. Raises `OptionError` for a budget that is too short, an unknown
    label, a model that skips pairs (`on_nonfinite="skip"`), or if no group has at least four prompts in either half.

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
        outputs: Sequence[object] | str | None = None,
        budget: int | float | str | None = None,
        seed: int = 0,
    ) -> None:
        require_arguments("inspect_model(head, pairs)", head=(head, RewardHead), pairs=(pairs, PreferencePairs))
        head.require_choice()
        head.require_all_pairs()
        if not 0 < fraction <= 0.5:
            raise OptionError(f"fraction: expected a share of the neurons in (0, 0.5], got {fraction}.")
        seconds = parse_budget(budget)
        if not len(pairs):
            raise OptionError("pairs: expected at least one pair, got none.")
        rows = named_groups(pairs, by) or {ALL: list(range(len(pairs)))}
        if SHARED in rows:
            raise OptionError(f"by: expected other labels than {SHARED!r}, which names a set. Rename this label.")
        self.head, self.fraction, self.seed = head, fraction, seed
        self._outputs = None if outputs is None else chosen_outputs(head, outputs)
        n_outputs = 0 if self._outputs is None else len(self._outputs)
        self._groups = {name: PreferencePairs(pairs[row] for row in members) for name, members in rows.items()}
        self._asked = {"by": by if by is None or isinstance(by, str) else "custom", "budget": budget}
        self._require_large(self._groups)
        n_all = head.n_layers * head.n_neurons(SITE)
        start = time.perf_counter()
        speed = measure_speed(head, joined(self._groups), site=SITE, fraction=fraction, seed=seed)
        self.plan: InspectionPlan = choose_plan(
            speed,
            self._groups,
            budget=seconds,
            spent=time.perf_counter() - start,
            n_all_neurons=n_all,
            n_outputs=n_outputs,
            most_pairs=2 * _MOST_BYTES // (n_all * head.reward_dtype.itemsize * (1 + n_outputs)),
        )
        self._require_large(self._used(self.plan))

    def run(self, *, folder: str | Path | None = None, progress: bool | None = None) -> ModelInspection:
        """Run the plan.

        With a `folder`, its `work` keeps the plan and the work of the passes over rewards, means, attribution and
        ablations until the run ends, so that the same call resumes after an interruption, by the plan of the first
        call. The result is not saved: call `save`. Raises `StorageError` if another process works in the folder, or if
        it belongs to a run with other settings.

        Cost: what the plan says.
        """
        if folder is None:
            return self._run(None, progress)
        folder = Path(folder)
        with locked(folder):
            work = folder / "work"
            work.mkdir(exist_ok=True)
            claim(work, self._inputs())
            self.plan = _kept_plan(work / _PLAN, self.plan)
            result = self._run(work, progress)
            shutil.rmtree(work, ignore_errors=True)
        return result

    # -- parts ---------------------------------------------------------------------------------------------------------

    def _run(self, work: Path | None, progress: bool | None) -> ModelInspection:
        used = self._used(self.plan)
        run = InspectionRun(
            self.head,
            self.plan,
            used,
            self._halves(used),
            fraction=self.fraction,
            outputs=self._outputs,
            seed=self.seed,
            work=work,
            progress=progress,
        )
        return run.result(asked=self._asked)

    def _inputs(self) -> dict[str, Any]:
        digests = {name: part.ordered_digest for name, part in self._groups.items()}
        return {
            "model": f"{self.head.fingerprint}-{self.head.setup_digest}",
            "pairs": hashlib.sha256(json.dumps(digests).encode()).hexdigest(),
            "fraction": self.fraction,
            "seed": self.seed,
            "budget": str(self._asked["budget"]),
            "outputs": None if self._outputs is None else list(self._outputs),
        }

    def _used(self, plan: InspectionPlan) -> dict[str, PreferencePairs]:
        """The pairs of the plan: a random part of every group's items."""
        return {name: _sampled(part, plan.pairs[name], self.seed) for name, part in self._groups.items()}

    def _halves(
        self, used: Mapping[str, PreferencePairs]
    ) -> tuple[dict[str, PreferencePairs], dict[str, PreferencePairs]]:
        """The pairs that score neurons and those that measure effects, of every group with enough prompts in both."""
        held = _held_prompts(used, self.seed)
        sides = {
            name: tuple(
                PreferencePairs(pair for pair in part if held[pair.prompt] == is_held) for is_held in (False, True)
            )
            for name, part in used.items()
        }
        large = [name for name, parts in sides.items() if min(len(half.prompts) for half in parts) >= FEWEST_PROMPTS]
        return {name: sides[name][0] for name in large}, {name: sides[name][1] for name in large}

    def _require_large(self, groups: Mapping[str, PreferencePairs]) -> None:
        if not self._halves(groups)[0]:
            sizes = ", ".join(f"{name!r}: {len(part.prompts)}" for name, part in list(groups.items())[:12])
            raise OptionError(
                f"by: no group has at least {FEWEST_PROMPTS} prompts in either half ({sizes}), to score neurons on one "
                "and to measure effects on the other. Use larger groups or more pairs."
            )


def _kept_plan(path: Path, plan: InspectionPlan) -> InspectionPlan:
    """The plan that an interrupted run began with; `plan` if there is none, which is then kept."""
    if not path.exists():
        write_text(path, json.dumps(plan.to_dict()), "plan")
        return plan
    try:
        return InspectionPlan.from_dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise StorageError(f"{path}: damaged ({error}). Remove the folder {path.parent} to begin again.") from error


def _sampled(pairs: PreferencePairs, n: int, seed: int) -> PreferencePairs:
    """At least `n` of the pairs in their order, in whole items, because an item without some pairs is easier."""
    items = pairs.items
    chosen: list[int] = []
    for number in np.random.default_rng(seed).permutation(len(items)):
        if len(chosen) >= n:
            break
        chosen += items[number]
    return PreferencePairs(pairs[row] for row in sorted(chosen))


def _held_prompts(groups: Mapping[str, PreferencePairs], seed: int) -> dict[str | Chat, bool]:
    """Whether each prompt is in the second half: half of every group's prompts, as far as groups share no prompts."""
    rng = np.random.default_rng(seed)
    held: dict[str | Chat, bool] = {}
    for part in sorted(groups.values(), key=lambda part: len(part.prompts)):
        prompts = sorted(set(part.prompts), key=prompt_text)
        free = [prompt for prompt in prompts if prompt not in held]
        n_wanted = len(prompts) // 2 - sum(held.get(prompt, False) for prompt in prompts)
        order = rng.permutation(len(free))
        held |= {free[number]: rank < n_wanted for rank, number in enumerate(order)}
    return held


def inspect_model(
    head: RewardHead,
    pairs: PreferencePairs,
    *,
    by: GroupBy | None = None,
    fraction: float = 0.02,
    outputs: Sequence[object] | str | None = None,
    budget: int | float | str | None = None,
    folder: str | Path | None = None,
    seed: int = 0,
    progress: bool | None = None,
) -> ModelInspection:
    """Open one reward model: which neurons drive its preference in each group of pairs, and what breaks without them.

    The prompts of every group are divided into halves: one scores the neurons, the other measures effects, so that no
    effect of a top set is measured on the pairs that selected its neurons. Scores are those of attribution patching
    with the mean activation as replacement, ablations use the same mean, and all positions are ablated. Per group, the
    top set has the `fraction` of neurons that support the margin most. The reward is the output that `head` was opened
    with; `outputs` compares others with it on the same pairs. `ModelInspector` has the arguments, and shows
    the plan before it runs; `rmtension.report.write_report(inspection, folder)` makes one page.

    Cost: `ModelInspector(...).plan` says it.

    Examples:
        >>> inspection = inspect_model(head, pairs["helpful"] + pairs["harmless"], by="objective", progress=False)
        >>> effects = inspection.to_frame("effects").query("quantity == 'margin' and group != 'all pairs'")
        >>> effects[["set", "group", "effect"]].round(1).head(2)
               set     group  effect
        3  helpful   helpful    -0.8
        5  helpful  harmless     0.0
    """
    inspector = ModelInspector(head, pairs, by=by, fraction=fraction, outputs=outputs, budget=budget, seed=seed)
    return inspector.run(folder=folder, progress=progress)
