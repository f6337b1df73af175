"""How much memory a run keeps for gradients."""

import torch

from rmtension.attribution._batch_run import BatchRun


def kept_bytes(head, batch):
    """Bytes of what autograd keeps of a run for its gradients, and of the gradients themselves."""
    weights = {tensor.untyped_storage().data_ptr() for tensor in head.body.module.parameters()}
    kept = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        run = BatchRun(head, batch, ["mlp"], gradients=True)
    gradients = {gradient.data_ptr(): gradient.untyped_storage() for gradient in run.gradients.values()}
    return sum(storage.nbytes() for storage in [*kept.values(), *gradients.values()])
