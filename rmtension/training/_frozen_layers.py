"""The lower layers that a training leaves as they are: they run once per prompt, and their states are kept."""

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from rmtension._progress import progress_bar
from rmtension.bodies._hooks import AllSeen, on_calls
from rmtension.bodies._native_run import run_base
from rmtension.bodies._native_sites import block_lists
from rmtension.bodies._run_modes import eager_eval
from rmtension.data._tokens import TokenBatch
from rmtension.errors import ModelError, OptionError
from rmtension.store._storage import read_result, write_tensors


class FrozenLayers:
    """The first layers of a base model of transformers, frozen, with the streams that they compute.

    Freezes everything but the last `n_trained` blocks and what comes after them. The stream into the lowest trained
    block is computed once for each row of tokens, in eval mode, and kept as float32: in memory, or in `folder`, which
    several trainings from the same base may share. `enter` runs the upper blocks on kept streams.

    Args:
        base: the base model, without its head.
        n_trained: the number of trained blocks.
        folder: a folder for the streams of this base and this number of layers; None keeps them in memory.
    """

    def __init__(self, base: nn.Module, n_trained: int, folder: Path | None = None) -> None:
        config: Any = base.config
        n_layers = config.get_text_config().num_hidden_layers
        if not 1 <= n_trained <= n_layers:
            raise OptionError(f"trained_layers: expected 1 to {n_layers} (all layers of this base), got {n_trained}.")
        lists = list(block_lists(base, n_layers))
        if len(lists) != 1:
            raise ModelError(
                f"trained_layers: expected one list of {n_layers} blocks in {type(base).__name__}, got {len(lists)}. "
                "Leave trained_layers out to train all layers."
            )
        blocks = list(lists[0][1])
        self._base = base
        self._lower, self._entry = blocks[: n_layers - n_trained], blocks[n_layers - n_trained]
        self._folder = folder
        self._kept: dict[str, Float[Tensor, "token d_model"]] = {}
        # What runs before the blocks gets no gradient, because the upper blocks start from kept streams.
        embeddings = [module for module in base.modules() if isinstance(module, nn.Embedding)]
        for module in [*self._lower, *embeddings] if self._lower else []:
            module.requires_grad_(False)
        # Whether a block returns its stream alone or in a tuple, as the next one expects it.
        self._in_tuple = False

    def prepare(self, batches: Sequence[TokenBatch], *, progress: bool | None = None) -> None:
        """Compute the streams that are not kept yet."""
        if not self._lower:
            return
        for batch in progress_bar(batches, progress=progress, desc="frozen layers", unit="batch"):
            names = _names(batch)
            if any(not self._has(name) for name in names):
                for row, (name, stream) in enumerate(zip(names, self._run_lower(batch), strict=True)):
                    self._keep(name, stream[: _n_tokens(batch, row)])

    @contextmanager
    def enter(self, batch: TokenBatch) -> Iterator[None]:
        """Within it, a run of the base on `batch` runs only the upper blocks, from the kept streams."""
        if not self._lower:
            yield
            return
        rows = [self._load(name) for name in _names(batch)]
        stream = torch.zeros(*batch.input_ids.shape, rows[0].shape[1])
        for row, kept in enumerate(rows):
            stream[row, : len(kept)] = kept
        parameter = next(self._entry.parameters())
        stream = stream.to(parameter.device, parameter.dtype)
        ours = (stream,) if self._in_tuple else stream
        with ExitStack() as stack:
            for block in self._lower:
                vars(block)["forward"] = lambda *_, **__: ours
                stack.callback(vars(block).pop, "forward")
            yield

    # -- inside ----------------------------------------------------------------------------------------------------

    def _run_lower(self, batch: TokenBatch) -> Float[Tensor, "row token d_model"]:
        """The stream after the last frozen block."""
        found: list[Tensor] = []

        def end(_module: nn.Module, _args: Any, _kwargs: Any, output: Any) -> None:
            self._in_tuple = isinstance(output, tuple)
            found.append(output[0] if self._in_tuple else output)
            raise AllSeen

        with (
            suppress(AllSeen),
            torch.no_grad(),
            eager_eval(self._base.modules()),
            on_calls(self._lower[-1:], end),
        ):
            run_base(self._base, batch)
        return found[0].float().cpu()

    def _has(self, name: str) -> bool:
        return name in self._kept or (self._folder is not None and (self._folder / name).exists())

    def _keep(self, name: str, stream: Float[Tensor, "token d_model"]) -> None:
        if self._folder is None:
            self._kept[name] = stream.clone()
        else:
            self._folder.mkdir(parents=True, exist_ok=True)
            write_tensors(self._folder / name, "stream", {"stream": stream}, {"in_tuple": self._in_tuple})

    def _load(self, name: str) -> Float[Tensor, "token d_model"]:
        if self._folder is None:
            return self._kept[name]
        tensors, values = read_result(
            self._folder / name, "stream", tensors={"stream": "float token d_model"}, values={"in_tuple": bool}
        )
        self._in_tuple = values["in_tuple"]
        return tensors["stream"]


def _names(batch: TokenBatch) -> list[str]:
    """A name for each row by its tokens and their positions, which also say where each text of the row begins."""
    columns = torch.arange(batch.input_ids.shape[1])
    positions = columns.expand_as(batch.input_ids) if batch.position_ids is None else batch.position_ids.cpu()
    ids = batch.input_ids.cpu()
    names = []
    for row in range(len(ids)):
        n = _n_tokens(batch, row)
        content = torch.stack([ids[row, :n], positions[row, :n]]).numpy().tobytes()
        names.append(f"stream-{hashlib.sha256(content).hexdigest()[:24]}.safetensors")
    return names


def _n_tokens(batch: TokenBatch, row: int) -> int:
    """The number of columns of a row that hold tokens of its texts."""
    used = batch.mask[batch.rows == row].any(dim=0)
    return int(used.sum())
