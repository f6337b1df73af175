"""How much memory hooks keep."""

import torch

from rmtension.attribution._batch_run import BatchRun


def kept_bytes(head, batch):
    """The storages that autograd keeps of a run for its gradients, and the gradients themselves."""
    weights = {tensor.untyped_storage().data_ptr() for tensor in head.body.module.parameters()}
    kept = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        run = BatchRun(head, batch, ["mlp"], gradients=True)
    gradients = {one.data_ptr(): one.untyped_storage() for one in run.gradients.values()}
    return sum(storage.nbytes() for storage in [*kept.values(), *gradients.values()])
