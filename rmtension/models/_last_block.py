"""Runs the last MLP only at the tokens that rewards are read from, because an MLP works token by token."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor, nn

from rmtension.data._tokens import TokenBatch
from rmtension.models._hooks import HookSite, InstalledHooks, count_foreign_hooks, has_own_hooks


class LastMLP:
    """The MLP of the last block, which can run only at the tokens that rewards are read from."""

    def __init__(self, module: nn.Module) -> None:
        self._module = module

    @contextmanager
    def at_last_tokens(self, batch: TokenBatch) -> Iterator[bool]:
        """Skip all other tokens while the model runs on `batch`: there the MLP adds nothing.

        Yields False, and skips nothing, if hooks inside the MLP may need all tokens.
        """
        if has_own_hooks(self._module.modules(), minding_tokens=True) or count_foreign_hooks(self._module):
            yield False
            return

        def only_last(values: Tensor) -> Tensor:
            if values.shape[:2] != batch.input_ids.shape:
                raise ValueError(f"expected {tuple(batch.input_ids.shape)} tokens, got {tuple(values.shape)}")
            return batch.gather_last(values)[:, None]

        def back(values: Tensor) -> Tensor:
            if values.shape[:2] != (len(batch.last), 1):
                raise ValueError(f"expected {len(batch.last)} tokens, got {tuple(values.shape)}")
            return batch.scatter_last(values[:, 0])

        hook_sites = [(HookSite(self._module, "input"), only_last), (HookSite(self._module, "output"), back)]
        with InstalledHooks(hook_sites):
            yield True
