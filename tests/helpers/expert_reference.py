"""Neurons of experts without this library: every expert computes every token, and a mask keeps those routed to it.

transformers computes each expert only for its tokens; this reference shares no step with that, nor with the library.
"""

import types
from contextlib import contextmanager

import torch
from reference import DEVICE, Reference


class ExpertReference(Reference):
    """A classifier whose experts are computed densely; the site `expert` is [1, token, expert * index]."""

    def __init__(self, folder, dtype=torch.float64, *, weighted=True):
        super().__init__(folder, dtype)
        self.model.set_experts_implementation("eager")  # the other kernels have no float64
        self.weighted = weighted
        self.experts = [block.mlp.experts for block in self.blocks]
        self.n_experts = self.experts[0].num_experts
        self.d_expert = self.experts[0].down_proj.numel() // self.n_experts // self.model.config.hidden_size
        self.routed, self.share = {}, {}

    @contextmanager
    def hooked(self, site, function):
        if site != "expert":
            with super().hooked(site, function):
                yield
            return
        for layer, experts in enumerate(self.experts):
            experts.forward = types.MethodType(self._dense(layer, function), experts)
        try:
            yield
        finally:
            for experts in self.experts:
                del experts.forward

    def per_neuron(self, channels, site, how):
        return channels if site == "expert" else super().per_neuron(channels, site, how)

    def _dense(self, layer, function):
        def forward(experts, hidden, index, weights):
            share = hidden.new_zeros(len(hidden), experts.num_experts).scatter(1, index, weights.to(hidden))
            routed = torch.zeros_like(share).scatter(1, index, torch.ones_like(share))
            if type(experts).__name__ == "GptOssExperts":
                inside = torch.einsum("td,edi->tei", hidden, experts.gate_up_proj) + experts.gate_up_proj_bias
                gate, up = inside[..., 0::2].clamp(max=experts.limit), inside[..., 1::2]
                neurons = (up.clamp(-experts.limit, experts.limit) + 1) * gate * torch.sigmoid(experts.alpha * gate)
                down, bias = experts.down_proj, experts.down_proj_bias
            else:
                inside = torch.einsum("td,eid->tei", hidden, experts.gate_up_proj)
                half = inside.shape[-1] // 2
                neurons = torch.nn.functional.silu(inside[..., :half]) * inside[..., half:]
                down, bias = experts.down_proj.transpose(1, 2), 0.0
            neurons = neurons * routed[..., None]
            self.routed[layer], self.share[layer] = routed.bool(), share.detach()
            changed = function(layer, neurons.flatten(1)[None].cpu())
            if changed is not None:
                neurons = changed[0].to(DEVICE).view(neurons.shape)
            written = torch.einsum("tei,eid->ted", neurons, down) + bias
            return (written * (share if self.weighted else routed)[..., None]).sum(dim=1)

        return forward
