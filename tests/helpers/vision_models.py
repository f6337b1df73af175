"""Tiny models for text and images, with weights large enough that states differ visibly."""

import torch
import transformers

TOKENS = {"image_token_id": 320, "video_token_id": 321, "vision_start_token_id": 322, "vision_end_token_id": 323}
_TEXT = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 328, "max_position_embeddings": 96, "pad_token_id": 1, "bos_token_id": 0,
    "eos_token_id": 0,
}  # fmt: skip
_MROPE = {"rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 1e4}}
_SEEN = {"depth": 2, "hidden_size": 16, "num_heads": 2, "intermediate_size": 24, "out_hidden_size": 32, "patch_size": 4}
_TOWER = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
_PICTURES = {"image_size": 16, "patch_size": 4}


def _config(kind):
    if kind == "qwen2_5_vl":
        seen = _SEEN | {"window_size": 16, "fullatt_block_indexes": [1]}
        return transformers.Qwen2_5_VLConfig(text_config=_TEXT | _MROPE, vision_config=seen, **TOKENS)
    if kind == "qwen2_vl":
        seen = {"depth": 2, "embed_dim": 16, "hidden_size": 32, "num_heads": 2, "patch_size": 4, "mlp_ratio": 2}
        return transformers.Qwen2VLConfig(text_config=_TEXT | _MROPE, vision_config=seen, **TOKENS)
    if kind == "qwen3_vl":
        seen = _SEEN | {"deepstack_visual_indexes": [0]}
        return transformers.Qwen3VLConfig(text_config=_TEXT | _MROPE | {"head_dim": 8}, vision_config=seen, **TOKENS)
    if kind == "gemma3":
        media = {"mm_tokens_per_image": 4, "image_token_id": 320, "boi_token_index": 321, "eoi_token_index": 322}
        text = _TEXT | {"head_dim": 8}
        return transformers.Gemma3Config(text_config=text, vision_config=_TOWER | _PICTURES, **media)
    text, tower = transformers.LlamaConfig(**_TEXT), transformers.CLIPVisionConfig(**_TOWER, **_PICTURES)
    return transformers.LlavaConfig(text_config=text, vision_config=tower, image_token_index=320)


KINDS = ("qwen2_5_vl", "qwen2_vl", "qwen3_vl", "gemma3", "llava")


def make_vision_model(kind, auto=transformers.AutoModelForImageTextToText):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = _config(kind)
        config.num_labels = 1
        model = auto.from_config(config)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter += 0.1 * torch.randn_like(parameter)
    return model.eval()
