"""Runs the last MLP only at the tokens that rewards are read from, because an MLP works token by token."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor, nn

from rmtension.bodies._hooks import HookSite, InstalledHooks, count_foreign_hooks, has_own_hooks
from rmtension.data._token_places import TokenPlaces
from rmtension.data._tokens import TokenBatch


class LastMLP:
    """The MLP of the last block, which can run only at the tokens that rewards are read from."""

    def __init__(self, module: nn.Module, base: nn.Module) -> None:
        self._module = module
        self._base = base

    @contextmanager
    def only_at(self, batch: TokenBatch, places: TokenPlaces) -> Iterator[TokenPlaces | None]:
        """Skip all other tokens while the model runs on `batch`: there the MLP adds nothing.

        Yields the tokens at which it runs, each once. Yields None, and skips nothing, if hooks inside the MLP may need
        all tokens, or if the user has hooks anywhere in the model, which may see the stream behind the MLP.
        """
        if has_own_hooks(self._module.modules(), minding_tokens=True) or count_foreign_hooks(self._base):
            yield None
            return
        # A token that two texts share would get its gradient twice.
        distinct = places.distinct

        def only_these(values: Tensor) -> Tensor:
            if values.shape[:2] != batch.input_ids.shape:
                raise ValueError(f"expected {tuple(batch.input_ids.shape)} tokens, got {tuple(values.shape)}")
            return batch.gather(distinct, values)[:, None]

        def back(values: Tensor) -> Tensor:
            if values.shape[:2] != (len(distinct), 1):
                raise ValueError(f"expected {len(distinct)} tokens, got {tuple(values.shape)}")
            return batch.scatter(distinct, values[:, 0])

        hook_sites = [(HookSite(self._module, "input"), only_these), (HookSite(self._module, "output"), back)]
        with InstalledHooks(hook_sites):
            yield distinct
