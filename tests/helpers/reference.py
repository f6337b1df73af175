"""The same numbers computed without this library: transformers, plain PyTorch hooks on its modules, and autograd.

Each text runs alone, unpadded, in float64. This module does not import rmtension. Models run on the device that the
library uses, because norms and rotary angles are computed in float32 at any dtype, and their last digits differ on a
GPU. Arguments and results are on the CPU.
"""

from contextlib import contextmanager

import torch
import transformers

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


class Reference:
    """A sequence classifier of transformers with hooks on the inputs of its down and output projections."""

    def __init__(self, folder, dtype=torch.float64):
        load = transformers.AutoModelForSequenceClassification.from_pretrained
        self.model = load(folder, dtype=dtype).eval().to(DEVICE)
        self.tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
        base = self.model.base_model
        base = getattr(base, "decoder", base)
        self.blocks = next(getattr(base, name) for name in ("h", "layers", "blocks") if hasattr(base, name))
        self.n_heads = self.model.config.num_attention_heads
        self._known = {}

    def projection(self, site, layer):
        """The module whose input is the activation of `site`."""
        block = self.blocks[layer]
        names = {
            "mlp": (
                *("mlp.c_proj", "mlp.down_proj", "mlp.dense_4h_to_h", "mlp.fc_out", "mlp.fc2", "fc2"),
                "ffn.down_proj",
            ),
            "attn_head": (
                *("attn.c_proj", "self_attn.o_proj", "attention.dense", "self_attn.out_proj", "self_attn.dense"),
                *("attn.attention.out_proj", "attn.out_proj", "self_attention.dense"),
            ),
        }[site]
        for name in names:
            module = block
            for part in name.split("."):
                module = getattr(module, part, None)
                if module is None:
                    break
            if module is not None:
                return module
        raise AssertionError(f"no projection of {site} in {type(block).__name__}")

    @contextmanager
    def hooked(self, site, function):
        """`function(layer, activation)` sees, and may replace, the activation [1, token, channel] of every layer."""

        def hook(layer):
            def pre_hook(_module, inputs):
                changed = function(layer, inputs[0].cpu())
                return None if changed is None else (changed.to(DEVICE), *inputs[1:])

            return pre_hook

        handles = [
            self.projection(site, layer).register_forward_pre_hook(hook(layer)) for layer in range(len(self.blocks))
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def tokens(self, pair, side):
        """The ids of one text, and how many of its first tokens belong to the prompt."""
        text = f"{pair.prompt} {getattr(pair, side)}"
        ids = self.tokenizer(text, return_tensors="pt")["input_ids"]
        prompt = self.tokenizer(pair.prompt)["input_ids"]
        assert ids[0, : len(prompt)].tolist() == prompt, "the prompt must be a prefix in tokens for this reference"
        return ids, len(prompt)

    def reward(self, ids):
        return self.model(input_ids=ids.to(DEVICE)).logits[0, 0].cpu()

    def margins(self, pairs, mask, values):
        """The margin of every pair when the MLP neurons in `mask` [layer, neuron] have `values` at every token."""

        def put(layer, activation):
            return torch.where(mask[layer], values[layer], activation)

        with self.hooked("mlp", put):
            rewards = [[self.reward(self.tokens(pair, side)[0]) for side in ("chosen", "rejected")] for pair in pairs]
        return torch.stack([chosen - rejected for chosen, rejected in rewards]).detach()

    def activations(self, site, ids, *, gradients=False, unused=False):
        """Activations [layer, token, channel], and dr/da with `gradients`. With `unused`, a layer may not affect r (0).

        Activations of the bare model are kept, because many tests read the same texts at different positions.
        """
        if unused:  # the model has hooks of the caller
            return self._run(site, ids, gradients, unused)
        key = site, tuple(ids[0].tolist()), gradients
        if key not in self._known:
            self._known[key] = self._run(site, ids, gradients, unused)
        return self._known[key]

    def _run(self, site, ids, gradients, unused):
        seen = {}

        def keep(layer, activation):
            seen[layer] = activation if activation.requires_grad else activation.detach().requires_grad_()
            return seen[layer]

        with self.hooked(site, keep):
            reward = self.reward(ids)
        values = torch.stack([seen[layer].detach()[0] for layer in sorted(seen)])
        if not gradients:
            return values
        slopes = torch.autograd.grad(
            reward, [seen[layer] for layer in sorted(seen)], allow_unused=unused, materialize_grads=unused
        )
        return values, torch.stack([slope[0] for slope in slopes])

    def selected(self, n_tokens, n_prompt, positions):
        """Token indices by name."""
        return {
            "all": list(range(n_tokens)),
            "response": list(range(n_prompt, n_tokens)),
            "last": [n_tokens - 1],
        }[positions]

    def per_neuron(self, channels, site, how):
        """[layer, channel] or [layer, token, channel] to one number per neuron: a head's norm, or its sum."""
        if site == "mlp":
            return channels
        heads = channels.unflatten(-1, (self.n_heads, -1))
        return heads.norm(dim=-1) if how == "norm" else heads.sum(dim=-1)


def transformers_rewards(folder, texts, *, dtype=torch.float32):
    """Rewards of texts one at a time and unpadded, which batching must not change."""
    model = transformers.AutoModelForSequenceClassification.from_pretrained(folder, dtype=dtype).eval().to(DEVICE)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    with torch.no_grad():
        return torch.stack(
            [model(**tokenizer(text, return_tensors="pt").to(DEVICE)).logits[0, 0] for text in texts]
        ).cpu()


@contextmanager
def kept_inputs(modules):
    """The first inputs of some modules in a run, in order, as nodes of the graph that starts at the first of them."""
    kept = []

    def keep(_module, inputs):
        value = inputs[0]
        kept.append(value if value.requires_grad else value.detach().requires_grad_())
        return (kept[-1], *inputs[1:])

    handles = [module.register_forward_pre_hook(keep) for module in modules]
    try:
        yield kept
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def zeroed_inputs(modules, columns):
    """Set some columns of the first inputs of modules to 0; `columns` has a row per module."""
    handles = [
        module.register_forward_pre_hook(lambda _, inputs, own=own: (torch.where(own, 0.0, inputs[0]), *inputs[1:]))
        for module, own in zip(modules, columns, strict=True)
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
