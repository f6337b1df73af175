"""Training on two objectives whose gradients are kept from undoing each other (PCGrad, Yu et al. 2020)."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import logsigmoid

from rmtension.data._tokens import TokenBatch
from rmtension.training._reward_trainer import RewardTrainer


class SurgeryTrainer(RewardTrainer):
    """Trains on batches of which the first half are pairs of one objective and the second half are of another one."""

    def compute_loss(self, model: Any, inputs: Mapping[str, TokenBatch], *_: Any, **__: Any) -> Float[Tensor, ""]:
        """The sum of both losses; its gradient is the sum of both gradients after `without_conflict`."""
        losses = [-logsigmoid(part).mean() for part in self.margins(inputs["batch"]).chunk(2)]
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        first, second = (torch.autograd.grad(loss, trained, retain_graph=True) for loss in losses)
        wanted = without_conflict(first, second)
        # A number with this gradient, which replaces that of the loss.
        pull = torch.stack([(parameter * g).sum() for parameter, g in zip(trained, wanted, strict=True)]).sum()
        return torch.stack(losses).sum().detach() + pull - pull.detach()


def without_conflict(
    first: Sequence[Float[Tensor, "..."]], second: Sequence[Float[Tensor, "..."]]
) -> list[Float[Tensor, "..."]]:
    """The sum of two gradients; if they point against each other, each without its part along the other."""
    dot, *sizes = (
        torch.stack([(a * b).sum() for a, b in zip(one, other, strict=True)]).sum()
        for one, other in ((first, second), (first, first), (second, second))
    )
    if dot >= 0:
        return [a + b for a, b in zip(first, second, strict=True)]
    return [a - dot / sizes[1] * b + b - dot / sizes[0] * a for a, b in zip(first, second, strict=True)]
