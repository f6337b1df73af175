"""Fine-tune chosen neurons on the weak objective, in directions that the strong objective does not use."""

import copy
import math
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import pandas as pd
import torch
from torch import Tensor, nn
from transformers import TrainerCallback

from rmtension.data._packing import pair_collator
from rmtension.data._pairs import PreferencePairs
from rmtension.data._tokens import TokenBatch
from rmtension.errors import ModelError, OptionError
from rmtension.models._classifiers import build_classifier
from rmtension.neurons._neuron_set import NeuronSet
from rmtension.repair._choice import Candidate, best_candidate, compare_candidates
from rmtension.repair._edit import SITE, Edit
from rmtension.repair._features import margins_of
from rmtension.repair._gains import GainFitter
from rmtension.repair._splits import RepairPairs
from rmtension.repair._train_only_neurons import TAU, TrainOnlyNeurons
from rmtension.reward_head import RewardHead
from rmtension.training._train_reward_model import remove_dropout
from rmtension.training._trainer_run import arguments, isolated, require_package, run_trainer, schedule

STEPS = (25, 50, 100, 200)


def fine_tune_neurons(
    head: RewardHead,
    pairs: RepairPairs,
    neurons: NeuronSet | None = None,
    *,
    fraction: float = 0.05,
    protect: bool | Literal["gradients"] = True,
    steps: Sequence[int] = STEPS,
    learning_rate: float = 1e-4,
    batch_size: int = 16,
    tau: float = TAU,
    seed: int = 0,
    progress: bool | None = None,
) -> tuple[Edit | None, pd.DataFrame]:
    """The best state of a training of some MLP neurons, as an edit of `head`, and a table with a row per `steps`.

    Without `neurons`, they are the `fraction` of all whose gain changes the loss of both objectives fastest.

    The neurons' rows and columns of the MLP's matrices are trained with AdamW at a constant rate, and nothing else (see
    `TrainOnlyNeurons`). `protect` is how the strong objective is spared:

    - True: steps on weak fit pairs, whose changes are projected onto directions that the inputs in strong fit pairs do
      not have: those with less than `tau` of the largest eigenvalue of the inputs' second moment, in units of each
      input's root mean square.
    - "gradients": each step takes `batch_size` pairs of each objective; where their gradients point against each other,
      each loses its part along the other (PCGrad).
    - False: the same steps on the mean loss of both.

    Gradients are clipped at the norm 1, as transformers does by default.

    Cost: a forward and a backward pass over the pairs of max(steps) steps, twice with both objectives; a forward pass
    over the strong fit pairs if they are protected; and a copy of the model with a forward pass over the development
    pairs for each of `steps`; without `neurons`, the gradients of all gains too. `head` is not changed. Raises
    `OptionError` and `ModelError` as `TrainOnlyNeurons` does, and `ModelError` for a reward that is no row of a linear
    head.
    """
    require_package("accelerate")
    if protect not in (True, False, "gradients"):
        raise OptionError(f"protect: expected True, False or 'gradients', got {protect!r}.")
    if not steps or min(steps) < 1:
        raise OptionError(f"steps: expected numbers of steps from 1, got {list(steps)}.")
    if neurons is None:
        if not 0 < fraction <= 1:
            raise OptionError(f"fraction: expected a share of the neurons above 0, up to 1, got {fraction}.")
        count = math.ceil(fraction * head.n_layers * head.n_neurons(SITE))
        neurons = GainFitter(head, pairs, progress=progress).strongest(0.5, count)
    keep = pairs.fit[pairs.strong] if protect is True else None
    trained = TrainOnlyNeurons(neurons, keep=keep, tau=tau, progress=progress, **head.run_options)
    snapshots = _Snapshots(trained, steps)
    with isolated(seed), tempfile.TemporaryDirectory() as scratch:
        trainer = _trainer(
            head,
            pairs,
            protect,
            [trained, snapshots],
            schedule(Path(scratch), seed, 1.0, max(steps), learning_rate, 0, batch_size, progress),
        )
        run_trainer(trainer)
    edits = [
        Edit("fine-tuned neurons", head.fingerprint, head.architecture, parameters=snapshots.taken[n]) for n in steps
    ]
    candidates = [
        Candidate({"steps": n}, margins_of(edit.apply(head), pairs.development, progress=progress))
        for n, edit in zip(steps, edits, strict=True)
    ]
    table = compare_candidates(pairs, margins_of(head, pairs.development, progress=progress), candidates)
    best = best_candidate(pairs, table)
    return None if best is None else edits[best], table


# -- inside ------------------------------------------------------------------------------------------------------------


class _Snapshots(TrainerCallback):  # type: ignore[misc]
    """Keeps what the training has changed after some numbers of steps."""

    def __init__(self, trained: TrainOnlyNeurons, steps: Sequence[int]) -> None:
        self._trained, self._steps = trained, frozenset(steps)
        self.taken: dict[int, dict[str, Tensor]] = {}

    def on_step_end(self, _args: Any, state: Any, _control: Any, **_: Any) -> None:
        """Keep the changes, if this is one of the steps."""
        if state.global_step in self._steps:
            changes = self._trained.changes()
            self.taken[state.global_step] = {name: change for name, change in changes.items() if change.any()}


def _trainer(
    head: RewardHead,
    pairs: RepairPairs,
    protect: bool | str,
    callbacks: Sequence[TrainerCallback],
    options: dict[str, Any],
) -> Any:
    """A trainer of a copy of the model, on weak fit pairs, or on as many of both objectives in each batch."""
    from transformers import TrainingArguments

    from rmtension.repair._gradient_surgery import SurgeryTrainer
    from rmtension.training._reward_trainer import RewardTrainer

    parts = [pairs.fit[name] for name in ((pairs.weak,) if protect is True else (pairs.weak, pairs.strong))]
    data = sum(parts, start=PreferencePairs([]))
    pack = pair_collator(head.encode(data), read_at=head.read_at, pack_up_to=head.body.pack_up_to)

    def collate(items: Sequence[int]) -> TokenBatch:
        weak = [item % len(parts[0]) for item in items]
        strong = [len(parts[0]) + item % len(part) for part in parts[1:] for item in items]
        return pack([*weak, *strong])

    return (SurgeryTrainer if protect == "gradients" else RewardTrainer)(
        _trainable_copy(head),
        arguments(
            TrainingArguments,
            None,
            **options,
            save_strategy="no",
            lr_scheduler_type="constant",
            use_cpu=head.device.type == "cpu",
        ),
        n_items=max(map(len, parts)),
        collate=collate,
        weights=torch.ones(len(data), dtype=torch.float64),
        processing_class=head.tokenizer,
        callbacks=list(callbacks),
    )


def _trainable_copy(head: RewardHead) -> nn.Module:
    """A classifier with weights of its own, in float32 at least, without dropout."""
    built = build_classifier(head)
    if not isinstance(getattr(built, "score", None), nn.Linear):
        raise ModelError(
            f"head: fine-tuning needs a reward that is a row of a linear head, got {type(head.head).__name__}."
        )
    classifier: nn.Module = copy.deepcopy(built).to(torch.promote_types(head.dtype, torch.float32))
    remove_dropout(classifier)
    return classifier.requires_grad_(True)
