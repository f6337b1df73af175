"""An output of a checkpoint, named before it is opened, and checkpoints that are opened once for several outputs."""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rmtension.heads._weighted_sum import sum_label
from rmtension.reward_head import RewardHead
from rmtension.store._provenance import digest_of_folder


@dataclass(frozen=True)
class ModelOutput:
    """One output of a checkpoint, for a study that opens its models when they are needed.

    Outputs of one checkpoint take the places of a study's models; the checkpoint is opened once for all of them. With
    a model that is open already, use `RewardHead.output`.

    Args:
        model: the folder or hub name of a checkpoint.
        output: what `RewardHead.output` accepts: a name or an index, a pair for a difference, or weights by output.

    Examples:
        >>> from rmtension.study import ModelOutput
        >>> from rmtension.synthetic import make_two_output_organism
        >>> folder = make_two_output_organism("two", depth=2, width=24, per_kind=2, n_pairs=8).folder
        >>> ModelOutput(folder, {"helpful": 1.0, "harmless": 1.0}).open().output_name
        'helpful + harmless'
    """

    model: str | Path
    output: Any

    def open(self) -> RewardHead:
        """Open the checkpoint with this output as its reward."""
        if isinstance(self.output, Mapping):
            return RewardHead.from_pretrained(self.model, output="all").output(self.output)
        return RewardHead.from_pretrained(self.model, output=self.output)

    @property
    def key(self) -> str:
        """The output as a part of a key."""
        return json.dumps(list(self.output.items()) if isinstance(self.output, Mapping) else self.output, default=str)


class OpenCheckpoints:
    """Checkpoints that are open, so that their outputs share the weights."""

    def __init__(self) -> None:
        self._heads: dict[str, RewardHead] = {}
        self._digests: dict[str, str] = {}

    def head(self, wanted: ModelOutput) -> RewardHead:
        """The model with an output; opened only if no other output of it is."""
        opened = self._heads.get(str(wanted.model))
        if opened is not None:
            return opened.output(wanted.output)
        head = wanted.open()
        # The outputs of a language model are the tokens that it was opened with.
        if head.checkpoint is None or not head.checkpoint.reads_tokens:
            self._heads[str(wanted.model)] = head
        return head

    def digest(self, folder: str | Path) -> str:
        """The digest of a checkpoint's files, which are read once."""
        if str(folder) not in self._digests:
            self._digests[str(folder)] = digest_of_folder(Path(folder))
        return self._digests[str(folder)]

    def close(self) -> None:
        """Release the models."""
        self._heads.clear()


def share_one_body(models: Iterable[object]) -> bool:
    """Whether two of the models are different outputs of one model, so that they have the same activations."""
    seen: dict[object, set[object]] = {}
    for model in models:
        if isinstance(model, ModelOutput):
            seen.setdefault(str(model.model), set()).add(model.key)
        elif isinstance(model, RewardHead):
            seen.setdefault(id(model.body.module), set()).add((model.choice, tuple(model.outputs)))
    return any(len(outputs) > 1 for outputs in seen.values())


def outputs_of(models: Mapping[str, object]) -> dict[str, Any] | None:
    """What `RewardHead.output` was given, by the models' names; None unless two are outputs of one model."""
    if not share_one_body(models.values()):
        return None
    return {name: _output_of(model) for name, model in models.items()}


def output_label(output: Any) -> str:
    """An output of `outputs_of` as text."""
    if isinstance(output, Mapping):
        return sum_label(output)
    return " - ".join(map(str, output)) if isinstance(output, list) else str(output)


def _output_of(model: object) -> Any:
    """The output as values of JSON; None for a model that was not opened with one."""
    if isinstance(model, RewardHead) and model.choice is not None:
        names = [model.outputs[number] for number in model.choice]
        sums = {sum_label(weights): dict(weights) for weights in model.weighted_sums}
        return names if len(names) > 1 else sums.get(names[0], names[0])
    if not isinstance(model, ModelOutput):
        return None
    if isinstance(model.output, Mapping):
        return {str(name): weight for name, weight in model.output.items()}
    return list(model.output) if isinstance(model.output, tuple) else model.output
