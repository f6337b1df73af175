"""Small models of TransformerLens classes: HookedTransformers (3.x) and bridges made by boot_native."""

import warnings
from importlib.metadata import version

import torch
from transformer_lens.config import TransformerBridgeConfig
from transformer_lens.model_bridge import TransformerBridge

HAS_HOOKED_TRANSFORMER = int(version("transformer-lens").split(".")[0]) < 4
KINDS = ("native", "hooked") if HAS_HOOKED_TRANSFORMER else ("native",)
SIZES = {
    "n_layers": 2,
    "d_model": 16,
    "n_ctx": 24,
    "d_head": 4,
    "n_heads": 4,
    "d_mlp": 20,
    "act_fn": "gelu_new",
    "d_vocab": 13,
    "device": "cpu",
    "normalization_type": "LN",
}
LENGTHS = (20, 3, 11, 7, 1)


def make_own(kind, **changes):
    """A model in float64 with weights large enough for curvature."""
    with torch.random.fork_rng(), warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        torch.manual_seed(0)
        if kind == "native":
            model = TransformerBridge.boot_native(TransformerBridgeConfig(**SIZES | changes))
        else:
            from transformer_lens import HookedTransformer, HookedTransformerConfig

            model = HookedTransformer(HookedTransformerConfig(**SIZES | changes))
        for parameter in model.parameters():
            parameter.data += 0.3 * torch.randn_like(parameter)
    model.to(torch.float64, print_details=False) if kind == "hooked" else model.to(torch.float64)
    return model.eval()


def ragged_ids(pad=0):
    """Token ids of texts of several lengths, padded on the right, and their mask."""
    ids = torch.randint(13, (len(LENGTHS), max(LENGTHS)), generator=torch.Generator().manual_seed(0))
    mask = torch.arange(max(LENGTHS)) < torch.tensor(LENGTHS)[:, None]
    return ids.masked_fill(~mask, pad), mask.long()


def alone(model, ids):
    """The logits of every text at its last token; each text runs alone."""
    with torch.no_grad():
        return torch.stack([model(row[None, :length])[0, -1] for row, length in zip(ids, LENGTHS, strict=True)])


def unembedding(kind, model):
    """The columns of the unembedding, [d_model, d_vocab], and its bias."""
    if kind == "hooked":
        return model.W_U.detach(), model.b_U.detach()
    # In TransformerLens 3.9, the native head has a trainable bias.
    head = model.unembed.original_component
    bias = torch.zeros(13, dtype=torch.float64) if head.bias is None else head.bias.detach()
    return head.weight.detach().T, bias
