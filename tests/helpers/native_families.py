"""Tiny classifiers of families that TransformerLens does not wrap."""

import torch
import transformers

_SIZES = {
    "num_labels": 1, "pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 0, "hidden_size": 32, "num_hidden_layers": 3,
    "num_attention_heads": 4, "intermediate_size": 48, "max_position_embeddings": 96,
}  # fmt: skip
_GROUPED = {"num_key_value_heads": 2}
# Model type -> what its config needs beyond `_SIZES`.
CAUSAL = {
    "helium": _GROUPED | {"head_dim": 8},
    "persimmon": {},
    "diffllama": _GROUPED,
    "ministral": _GROUPED | {"head_dim": 8},
    "biogpt": {},
}
ENCODERS = {
    "deberta-v2": {
        "relative_attention": True, "pos_att_type": ["p2c", "c2p"], "position_buckets": 8, "share_att_key": True,
        "position_biased_input": False, "type_vocab_size": 0, "pooler_hidden_size": 32, "norm_rel_ebd": "layer_norm",
        "pooler_hidden_act": "gelu",
    },
    # A window of 8 tokens, shorter than the texts.
    "modernbert": {"local_attention": 8, "cls_token_id": 0, "sep_token_id": 0},
    "bert": {},
    "roberta": {},
    "electra": {"embedding_size": 16},
    "distilbert": {"dim": 32, "hidden_dim": 48, "n_layers": 3, "n_heads": 4},
    "eurobert": _GROUPED,
}  # fmt: skip


def make_native(family, vocab_size, *, seed=0, **changes):
    """A one-label classifier in memory, with weights large enough that rewards differ visibly."""
    sizes = _SIZES | {"vocab_size": vocab_size} | (CAUSAL | ENCODERS)[family] | changes
    config = transformers.AutoConfig.for_model(family, **sizes)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = transformers.AutoModelForSequenceClassification.from_config(config)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                size = 0.1 if name.startswith(model.base_model_prefix) else 0.5
                parameter += size * torch.randn_like(parameter)
    return model.eval()
