"""The linear map from the neurons of a site to the residual stream."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from rmtension.bodies._hooks import HookSite


@dataclass(frozen=True, eq=False)
class Projection:
    """The output projection of a site: `apply` maps [*, channel] to [*, d_model], in `dtype`, without calling hooks.

    `read` is the hook site of its input, `written` that of its output with bias, if the module runs.
    """

    read: HookSite
    written: HookSite
    apply: Callable[[Tensor], Tensor]
    dtype: torch.dtype

    @classmethod
    def of(cls, module: nn.Module) -> "Projection":
        """The projection of a linear module."""
        # `forward`, because hooks on the module, such as an ablation's, must not apply twice.
        dtype = next(module.parameters()).dtype
        return cls(HookSite(module, "input"), HookSite(module, "output"), module.forward, dtype)
