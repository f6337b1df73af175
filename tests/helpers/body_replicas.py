"""Replicas whose body is special: stored in another layout, inside another model, of experts, or of a rare family."""

import torch
from replicas import CODE, Replica, Tensors, linear, row


def internlm2_layout(body: Tensors, stored: bool) -> Tensors:
    """Llama's tensors as InternLM2 stores them, or back: two groups of two queries, a key and a value of width 8."""
    names = {"embed_tokens": "tok_embeddings", "o_proj": "wo", "gate_proj": "w1", "up_proj": "w3", "down_proj": "w2"}
    names |= {"input_layernorm": "attention_norm", "post_attention_layernorm": "ffn_norm", "norm": "norm"}
    names |= {"self_attn": "attention", "mlp": "feed_forward"}
    if not stored:
        names = {new: old for old, new in names.items()}
    result = {}
    for name, tensor in body.items():
        new = ".".join(names.get(part, part) for part in name.split("."))
        if "q_proj" in name:
            q, k, v = (body[name.replace("q_proj", f"{part}_proj")] for part in "qkv")
            groups = [torch.cat([q[16 * g : 16 * g + 16], k[8 * g : 8 * g + 8], v[8 * g : 8 * g + 8]]) for g in (0, 1)]
            result[new.replace("q_proj", "wqkv")] = torch.cat(groups)
        elif "wqkv" in name:
            first, second = tensor.chunk(2)
            for part, rows in {"q": slice(0, 16), "k": slice(16, 24), "v": slice(24, 32)}.items():
                result[new.replace("wqkv", f"{part}_proj")] = torch.cat([first[rows], second[rows]])
        elif not {"k_proj", "v_proj"} & set(name.split(".")):
            result[new] = tensor
    return result


def _inside_vision_model(body: Tensors, stored: bool) -> Tensors:
    """The tensors of Qwen2.5-VL as its checkpoints name them: model.* for the language model, visual.*; or back."""
    new, old = ("model.", "language_model.") if stored else ("language_model.", "model.")
    return {new + name.removeprefix(old) if name.startswith(old) else name: body[name] for name in body}


def _experts_apart(body: Tensors, stored: bool) -> Tensors:
    """The experts of Mixtral as its checkpoints store them, one by one; or as transformers stacks them."""
    result = {}
    for name, tensor in body.items():
        if stored and name.endswith("experts.gate_up_proj"):
            place = name.removesuffix("gate_up_proj").replace("mlp.", "block_sparse_moe.")
            for number, both in enumerate(tensor):
                result[f"{place}{number}.w1.weight"], result[f"{place}{number}.w3.weight"] = both.chunk(2)
        elif stored and name.endswith("experts.down_proj"):
            place = name.removesuffix("down_proj").replace("mlp.", "block_sparse_moe.")
            result |= {f"{place}{number}.w2.weight": each for number, each in enumerate(tensor)}
        elif stored:
            result[name.replace("mlp.", "block_sparse_moe.")] = tensor
        elif ".experts." not in name:
            result[name.replace("block_sparse_moe.", "mlp.")] = tensor
        elif name.endswith("experts.0.w1.weight"):
            place = name.removesuffix("0.w1.weight")
            count = sum(other.startswith(place) and other.endswith("w1.weight") for other in body)
            one, two, three = ([body[f"{place}{n}.w{part}.weight"] for n in range(count)] for part in (1, 2, 3))
            new = place.replace("block_sparse_moe.", "mlp.")
            result[f"{new}gate_up_proj"] = torch.cat([torch.stack(one), torch.stack(three)], 1)
            result[f"{new}down_proj"] = torch.stack(two)
    return result


BODIES = [
    Replica(
        "body in another layout",
        "internlm2-1_8b-reward, -7b, -20b",
        linear("v_head", bias=False),
        row("v_head", bias=False),
        fields={"model_type": "internlm2", "architectures": ["InternLM2ForRewardModel"], "bias": False} | CODE,
        layout=internlm2_layout,
    ),
    Replica(
        "vision-language model, text only",
        "Skywork-VL-Reward-7B",
        linear("v_head.summary"),
        row("v_head.summary"),
        body="qwen2_5_vl",
        prefix="",
        fields={"architectures": ["Qwen2_5_VLForConditionalGeneration"]},
        separate="value_head.safetensors",
        layout=_inside_vision_model,
    ),
    Replica(
        "mixture of experts",
        "classifiers of Mixtral, Qwen-MoE, GPT-OSS",
        linear("score", bias=False),
        row("score", bias=False),
        body="mixtral",
        site="expert",
        layout=_experts_apart,
        fields={"architectures": ["MixtralForSequenceClassification"], "num_labels": 1},
    ),
    Replica(
        "family without a bridge",
        "classifiers of families that TransformerLens lacks",
        linear("score", bias=False),
        row("score", bias=False),
        body="helium",
        fields={"architectures": ["HeliumForSequenceClassification"], "num_labels": 1},
    ),
    Replica(
        "token appended to a chat",
        "Athene-RM-8B, -70B",
        lambda states, text, tensors, config: tensors["v_head.weight"] @ states[text.ids.index(43)],
        row("v_head", bias=False),
        fields={"architectures": ["AtheneForSequenceClassification"]} | CODE,
        template="{% for message in messages %}<{{ message.role }}> {{ message.content }} </s> {% endfor %}<cls>",
    ),
]
