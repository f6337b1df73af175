"""Kinds of checkpoints that have no reward of one text, or none that is read from one residual stream."""

from typing import Any

from rmtension.errors import ModelError

# Entries of the config of encoders that read both responses in one text (LLM-Blender's PairRM).
_JOINT = ("cand1_prefix_id", "cand2_prefix_id")


def refuse_other_kinds(name: str, config: Any) -> None:
    """Raise `ModelError` for a joint encoder of pairs and for an encoder-decoder."""
    kinds = " and ".join(config.architectures or [type(config).__name__])
    if any("PairRM" in kind for kind in config.architectures or []) or all(hasattr(config, key) for key in _JOINT):
        raise ModelError(
            f"{name}: expected a model that gives one response a reward, got {kinds}, which reads both responses of a "
            "pair in one text and outputs which of them is better. So a response has no reward of its own, and the "
            "order of the two changes the output. Open a reward model that scores one response at a time."
        )
    if getattr(config, "is_encoder_decoder", False):
        raise ModelError(
            f"{name}: expected a decoder or an encoder, got {kinds}, which has both. It reads the text in the encoder "
            "and computes its output in the decoder, on another residual stream. Open a reward model with one stack of "
            "layers, such as a ...ForSequenceClassification of Llama, Qwen or DeBERTa."
        )
