"""The state of a model, to compare it before and after a call."""

import torch


def snapshot(head):
    """Everything a call could change: parameters, flags, modes and hooks of every module."""
    modules = list(head.body.module.modules()) + list(head.model.modules())
    return {
        "parameters": [(p.data_ptr(), p._version, p.requires_grad) for p in head.model.parameters()],
        "training": [module.training for module in modules],
        "hooks": [(len(module._forward_hooks), len(module._forward_pre_hooks)) for module in modules],
        "grad mode": torch.is_grad_enabled(),
    }
