"""The linear map from the neurons of a site into the residual stream, wherever a model keeps it."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from rmtension.models._hooks import HookSite


@dataclass(frozen=True, eq=False)
class Projection:
    """`apply` is the map, bias included: [*, channel] -> [*, d_model], in `dtype` and without any hook.

    Activations come in at `read`; what they write comes out at `written`, bias included, where that runs at all.
    """

    read: HookSite
    written: HookSite
    apply: Callable[[Tensor], Tensor]
    dtype: torch.dtype

    @classmethod
    def of(cls, module: nn.Module) -> "Projection":
        """Of a module that is nothing but the projection."""
        # `forward`, because an ablation's hook on the module has already changed the activation once.
        dtype = next(module.parameters()).dtype
        return cls(HookSite(module, "input"), HookSite(module, "output"), module.forward, dtype)
