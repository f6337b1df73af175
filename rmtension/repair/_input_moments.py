"""Second moments of what linear maps read: which directions of their inputs some pairs use, and how much."""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from rmtension.bodies._hooks import HookSite, InstalledHooks
from rmtension.data._pairs import PreferencePairs
from rmtension.data._tokens import TokenBatch
from rmtension.errors import ModelError
from rmtension.models._reward_model import RewardModel
from rmtension.passes._pair_pass import run_pass
from rmtension.passes._pair_statistic import PairStatistic
from rmtension.passes._pass_record import PassRecord


class _InputMoments(PairStatistic[dict[str, Tensor]]):
    """Sums over the selected tokens of x x', for the inputs x of every map."""

    name = "input moments"

    def __init__(
        self,
        model: RewardModel,
        maps: Mapping[str, nn.Module],
        positions: str,
        columns: Mapping[str, Int[Tensor, "chosen"]],
    ) -> None:
        self._model, self._maps, self._positions, self._columns = model, maps, positions, columns
        sizes = {
            name: len(columns[name]) if name in columns else matrix_of(module).shape[1] for name, module in maps.items()
        }
        self._sums = {name: torch.zeros(size, size, dtype=torch.float64) for name, size in sizes.items()}

    @property
    def settings(self) -> Mapping[str, Any]:
        """The maps, their chosen inputs, and the tokens."""
        chosen = {name: columns.tolist() for name, columns in self._columns.items()}
        return {"maps": list(self._maps), "columns": chosen, "positions": self._positions}

    @property
    def state(self) -> Mapping[str, Tensor]:
        """The sums so far."""
        return self._sums

    @torch.no_grad()
    def observe(self, batch: TokenBatch) -> list[Tensor]:
        """One forward pass."""
        # A token of a shared prefix counts once for each text of its row that selects it.
        weights = batch.sum_over_texts(batch.select(self._positions).double()).flatten()
        used = weights.nonzero()[:, 0]
        sums: dict[str, Tensor] = {}

        def add(name: str, module: nn.Module, inputs: Tensor) -> None:
            if name in sums or inputs.numel() != len(weights) * matrix_of(module).shape[1]:
                raise ModelError(
                    f"names: {name} does not read every token exactly once: it is a shared layer or an expert, so its "
                    "inputs cannot be assigned to tokens. Leave it out."
                )
            # Rows without weight are dropped, not multiplied by 0, because padding may hold infinities.
            rows = inputs.detach().reshape(len(weights), -1)[used.to(inputs.device)]
            if name in self._columns:
                rows = rows[:, self._columns[name].to(rows.device)]
            rows = rows.double()
            sums[name] = (rows * weights[used].to(rows.device)[:, None]).T @ rows

        sites = [(HookSite(module, "input"), partial(add, name, module)) for name, module in self._maps.items()]
        with InstalledHooks(sites):
            self._model.residual(batch)
        silent = [name for name in self._maps if name not in sums]
        if silent:
            raise ModelError(f"names: {silent[:4]} did not run, so they read nothing. Leave them out.")
        return [sums[name].cpu() for name in self._maps]

    def update(self, batch: TokenBatch, observed: list[Tensor]) -> None:
        """Add the sums of a batch."""
        for total, of_batch in zip(self._sums.values(), observed, strict=True):
            total += of_batch

    def compute(self, record: PassRecord) -> dict[str, Tensor]:
        """The means over tokens."""
        record.require_pairs()
        n_tokens = record.n_tokens(self._positions)
        return {name: total / n_tokens for name, total in self._sums.items()}


def input_moments(
    head: RewardModel,
    pairs: PreferencePairs,
    names: Sequence[str],
    *,
    positions: str = "all",
    columns: Mapping[str, Int[Tensor, "chosen"]] | None = None,
    progress: bool | None = None,
) -> dict[str, Float[Tensor, "input input"]]:
    """The mean over tokens of x x', in float64, where x is what a linear map reads; uncentred.

    `names` are those of Linear or Conv1D modules in `head.body.native`. The tokens are those that `positions` selects
    in both texts of every pair; a prompt counts for both. `columns` keeps some inputs of a map only, by its name.

    Cost: one forward pass, and tokens x inputs^2 operations per map. Memory: inputs^2 x 8 bytes per map. Raises
    `ModelError` for a model that does not run as transformers' own modules, and for modules that are not linear maps of
    every token.
    """
    native = head.body.native
    if native is None or not head.body.runs_native:
        raise ModelError(
            "head: the inputs of linear maps are read in transformers' own modules, which do not run in this model: "
            "TransformerLens converted it, or its bridge has hooks. Open it with RewardHead.from_pretrained or "
            "from_classifier, without model_class and process_weights, and remove hooks from head.model."
        )
    maps = {name: native.get_submodule(name) for name in names}
    wrong = [f"{name} ({type(module).__name__})" for name, module in maps.items() if not is_linear_map(module)]
    if wrong:
        raise ModelError(
            f"names: expected Linear or Conv1D modules, got {', '.join(wrong[:4])}. Merge adapters first "
            "(peft: model.merge_and_unload()); other modules are no linear maps."
        )
    return run_pass(head, pairs, _InputMoments(head, maps, positions, columns or {}), progress=progress)


def is_linear_map(module: nn.Module) -> bool:
    """Whether a module is a matrix that multiplies its input: `nn.Linear`, or GPT-2's `Conv1D`."""
    return isinstance(module, nn.Linear | Conv1D)


def linear_maps(base: nn.Module) -> dict[str, nn.Module]:
    """All linear maps in a model, by name."""
    return {name: module for name, module in base.named_modules() if is_linear_map(module)}


def matrix_of(module: Any) -> Float[Tensor, "output input"]:
    """The weight of a linear map, or a view of it."""
    # nn.Linear holds [out, in], GPT-2's Conv1D [in, out].
    weight: Tensor = module.weight if isinstance(module, nn.Linear) else module.weight.T
    return weight
