"""Replicas of the kinds that have no reward of one text, or none that a rule knows."""

from replicas import D, Replica, linear

REFUSED = [
    Replica(
        "vector of a preference",
        "GPM (general preference models)",
        linear("value_head", bias=False),
        lambda draw: {"value_head.weight": draw(6, D), "prompt_head.weight": draw(3, D)},
        fields={"architectures": ["GPM"]},
    ),
    Replica(
        "head that no rule knows",
        "",
        linear("mix", bias=False),
        lambda draw: {"mix.first.w": draw(16, D), "mix.second.w": draw(1, 16)},
        fields={"architectures": ["MixModel"]},
    ),
    Replica(
        "joint encoder of two responses",
        "PairRM, Better-PairRM",
        linear("head_layer.1"),
        lambda draw: {"head_layer.1.weight": draw(D, 2 * D), "head_layer.4.weight": draw(1, D)},
        body="deberta-v2",
        prefix="pretrained_model.",
        fields={
            "architectures": ["DebertaV2PairRM"],
            "source_prefix_id": 5,
            "cand1_prefix_id": 6,
            "cand2_prefix_id": 7,
        },
    ),
    Replica(
        "encoder-decoder",
        "SteamSHP-flan-t5-large, -xl",
        linear("lm_head", bias=False),
        lambda draw: {},
        body="t5",
        prefix="",
        fields={"architectures": ["T5ForConditionalGeneration"], "tie_word_embeddings": False},
        unembedding=True,
        options={"output": ("Yes", "No")},
    ),
]
