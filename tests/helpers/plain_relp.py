"""RelP written from its rules, step by step, for GPT-2-, Llama- and Gemma-2-shaped models: no hooks, no rmtension.

`plain_relp(model, ids, n_last)` computes the reward of one text with every rule as an explicit formula, and the
coefficients of the down projection's input (`mlp`), of act(gate) (`mlp_gate`) and of the output projection's input
(`attn_head`) in the reward. Each rule can be left out.
"""

import math

import torch
from torch.nn.functional import gelu, silu

RULES = ("norm", "activation", "half", "attention")


class PlainRelp:
    """The reward of one text and the coefficients of its activations, by the rules in `rules`."""

    def __init__(self, model, ids, rules=RULES[:3]):
        self.model, self.rules = model, rules
        self.config = model.config
        self.leaves = {}
        self.streams = []
        base = model.base_model
        x = self.embed(base, ids)
        blocks = base.h if hasattr(base, "h") else base.layers
        for layer, block in enumerate(blocks):
            x = x.detach().requires_grad_(True) if layer == 0 else x
            x.retain_grad()
            self.streams.append(x)
            x = self.block(base, block, layer, x)
        final = base.ln_f if hasattr(base, "ln_f") else base.norm
        x = self.norm(final, x)
        self.reward = (x[-1] @ model.score.weight[0]).sum()
        self.reward.backward()

    def embed(self, base, ids):
        """Embeddings of the tokens, and of their positions in GPT-2."""
        with torch.no_grad():
            if hasattr(base, "wte"):
                return base.wte.weight[ids] + base.wpe.weight[: len(ids)]
            return base.embed_tokens(ids)  # Gemma multiplies by a constant in float32

    @property
    def is_gemma(self):
        """Whether the model is Gemma-2-shaped."""
        return self.config.model_type == "gemma2"

    def keep(self, site, layer, value):
        """Remember an activation whose gradient is wanted."""
        value.retain_grad()
        self.leaves[site, layer] = value
        return value

    def coefficient(self, site, layer):
        """dM/da by the rules."""
        return self.leaves[site, layer].grad

    def norm(self, module, x):
        """Layer norm with bias for GPT-2, RMS norm otherwise; Gemma's gain is 1 + weight."""
        if isinstance(module, torch.nn.LayerNorm):
            centred = x - x.mean(-1, keepdim=True)
            size = (centred.square().mean(-1, keepdim=True) + module.eps).sqrt()
            gain, bias = module.weight, module.bias
        else:
            centred = x
            eps = getattr(module, "variance_epsilon", None) or module.eps
            size = (x.square().mean(-1, keepdim=True) + eps).sqrt()
            gain, bias = (1 + module.weight if self.is_gemma else module.weight), 0
        if "norm" in self.rules:
            size = size.detach()
        return centred / size * gain + bias

    def act(self, z):
        """The activation function of the config."""
        kind = getattr(self.config, "activation_function", None) or getattr(self.config, "hidden_act", None)
        kind = getattr(self.config, "hidden_activation", None) or kind
        value = silu(z) if kind == "silu" else gelu(z, approximate="tanh")
        return z * (value / z).detach() if "activation" in self.rules else value

    def product(self, gate, up):
        """act(gate) * up, with half of the gradient for each factor."""
        value = gate * up
        return 0.5 * value + 0.5 * value.detach() if "half" in self.rules else value

    def attend(self, query, key, value, scale, cap=None):
        """Causal attention, [head, token, channel]."""
        scores = query @ key.transpose(1, 2) * scale
        scores = torch.tanh(scores / cap) * cap if cap else scores
        hidden = torch.ones_like(scores, dtype=torch.bool).triu(1)
        pattern = scores.masked_fill(hidden, -torch.inf).softmax(-1)
        pattern = pattern.detach() if "attention" in self.rules else pattern
        return pattern @ value

    def block(self, base, block, layer, x):
        """One block, of either kind."""
        if hasattr(block, "attn"):
            heads = self.config.n_head
            fused = self.norm(block.ln_1, x) @ block.attn.c_attn.weight + block.attn.c_attn.bias
            query, key, value = (
                part.unflatten(-1, (heads, -1)).transpose(0, 1) for part in fused.split(x.shape[-1], dim=-1)
            )
            mixed = self.attend(query, key, value, 1 / math.sqrt(query.shape[-1])).transpose(0, 1).flatten(1)
            mixed = self.keep("attn_head", layer, mixed)
            x = x + mixed @ block.attn.c_proj.weight + block.attn.c_proj.bias
            hidden = self.norm(block.ln_2, x) @ block.mlp.c_fc.weight + block.mlp.c_fc.bias
            hidden = self.keep("mlp", layer, self.act(hidden))
            return x + hidden @ block.mlp.c_proj.weight + block.mlp.c_proj.bias
        attention, heads = block.self_attn, self.config.num_attention_heads
        normed = self.norm(block.input_layernorm, x)
        query, key, value = (
            (normed @ part.weight.T).unflatten(-1, (-1, attention.head_dim)).transpose(0, 1)
            for part in (attention.q_proj, attention.k_proj, attention.v_proj)
        )
        cos, sin = (part[0].detach() for part in base.rotary_emb(x[None], torch.arange(len(x))[None]))
        query, key = (part * cos + _half_turned(part) * sin for part in (query, key))
        key, value = (part.repeat_interleave(heads // len(part), dim=0) for part in (key, value))
        scale, cap = attention.scaling, getattr(self.config, "attn_logit_softcapping", None)
        mixed = self.attend(query, key, value, scale, cap).transpose(0, 1).flatten(1)
        mixed = self.keep("attn_head", layer, mixed)
        added = mixed @ attention.o_proj.weight.T
        x = x + (self.norm(block.post_attention_layernorm, added) if self.is_gemma else added)
        normed = self.norm(block.pre_feedforward_layernorm if self.is_gemma else block.post_attention_layernorm, x)
        gate = self.keep("mlp_gate", layer, self.act(normed @ block.mlp.gate_proj.weight.T))
        hidden = self.keep("mlp", layer, self.product(gate, normed @ block.mlp.up_proj.weight.T))
        added = hidden @ block.mlp.down_proj.weight.T
        return x + (self.norm(block.post_feedforward_layernorm, added) if self.is_gemma else added)


def _half_turned(x):
    first, second = x.chunk(2, dim=-1)
    return torch.cat([-second, first], dim=-1)
