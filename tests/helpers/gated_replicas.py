"""Replicas of the kinds with several objectives: weighted by a gate, by fixed numbers, or not at all."""

import torch
from replicas import CODE, D, Replica, linear, row
from safetensors.torch import load_file
from torch.nn import functional


def _header_start(ids, pattern):
    """The start of the last occurrence of the pattern."""
    return max(i for i in range(len(ids)) if ids[i : i + len(pattern)] == pattern)


_LLAMA_HEADER = [128009, 128006, 78191, 128007, 271]
_GEMMA_HEADER = [107, 108, 106, 2516, 108]


def _armorm(states, text, tensors, config):
    rewards = tensors["regression_layer.weight"] @ states[-1]
    x = states[_header_start(text.ids, _LLAMA_HEADER)]
    for number in range(3):
        x = functional.relu(tensors[f"gating.layers.{number}.weight"] @ x + tensors[f"gating.layers.{number}.bias"])
    x = tensors["gating.layers.3.weight"] @ x + tensors["gating.layers.3.bias"]
    gate = torch.softmax(x / config["gating_temperature"], 0) * tensors["gating.logit_scale"][0]
    score = (gate * (rewards @ tensors["reward_transform_matrix"])).sum()
    return torch.cat([score[None], rewards])


def _armorm_tensors(draw):
    sizes = [(16, D), (16, 16), (16, 16), (19, 16)]
    gate = {f"gating.layers.{n}.weight": draw(*size) for n, size in enumerate(sizes)}
    gate |= {f"gating.layers.{n}.bias": draw(size[0]) for n, size in enumerate(sizes)}
    return gate | {
        "regression_layer.weight": draw(19, D),
        "reward_transform_matrix": torch.eye(19) + 0.2 * draw(19, 19),
        "gating.logit_scale": torch.tensor([1.3]),
    }


def _batch_norm(x, tensors, name):
    mean, variance = tensors[f"{name}.running_mean"], tensors[f"{name}.running_var"]
    return (x - mean) / (variance + 1e-5).sqrt() * tensors[f"{name}.weight"] + tensors[f"{name}.bias"]


def _quantile_gate(x, tensors, linear, norms, last):
    for number, norm in zip(linear, norms, strict=True):
        x = _batch_norm((tensors[f"gating.layers.{number}.weight"] @ x).clamp(min=0), tensors, f"gating.layers.{norm}")
    return tensors[f"gating.layers.{last}.weight"] @ x + tensors[f"gating.layers.{last}.bias"]


def _qrm_v1(states, text, tensors, config):
    n, m = config["num_objectives"], config["num_quantiles"]
    quantiles = (tensors["regression_layer.weight"] @ states[-1]).reshape(n, m)
    rewards = quantiles.mean(1) @ tensors["reward_transform_matrix"]
    x = _quantile_gate(states[_header_start(text.ids, _LLAMA_HEADER)], tensors, (0, 3, 6), (2, 5, 8), 9)
    gate = torch.softmax(x / config["gating_temperature"], 0) * tensors["gating.logit_scale"]
    return torch.cat([(gate * rewards).sum()[None], rewards])


def _qrm_v2(states, text, tensors, config):
    quantiles = (tensors["regression_layer.weight"] @ states[-1]).reshape(5, 19)
    rewards = quantiles.mean(1)
    x = _quantile_gate(states[_header_start(text.ids, _GEMMA_HEADER)], tensors, (0, 4, 8), (2, 6, 10), 11)
    gate = torch.softmax(x, 0) * tensors["gating.logit_scale"]
    return torch.cat([(gate * rewards).sum()[None], rewards])


def _qrm_tensors(n_objectives, n_quantiles, linear, norms, last, matrix):
    def make(draw):
        tensors = {"regression_layer.weight": draw(n_objectives * n_quantiles, D)}
        for number, norm in zip(linear, norms, strict=True):
            tensors[f"gating.layers.{number}.weight"] = draw(16, D if number == 0 else 16)
            name = f"gating.layers.{norm}"
            tensors |= {f"{name}.weight": 1 + 0.3 * draw(16), f"{name}.bias": draw(16)}
            tensors |= {f"{name}.running_mean": draw(16), f"{name}.running_var": draw(16).square() + 0.5}
            tensors[f"{name}.num_batches_tracked"] = torch.tensor(9)
        tensors |= {f"gating.layers.{last}.weight": draw(n_objectives, 16)}
        tensors |= {f"gating.layers.{last}.bias": draw(n_objectives), "gating.logit_scale": torch.tensor([0.8])}
        return tensors | ({"reward_transform_matrix": draw(n_objectives, n_objectives)} if matrix else {})

    return make


def _urm(states, text, tensors, config):
    y = tensors["score.weight"] @ states[-1]
    x = states[-1]
    for number in (0, 2):
        x = functional.selu(tensors[f"weights.fc.{number}.weight"] @ x + tensors[f"weights.fc.{number}.bias"])
    weights = tensors["weights.fc.4.weight"] @ x + tensors["weights.fc.4.bias"]
    means = y.reshape(5, 2)[:, 0]
    return torch.cat([(weights * means).sum()[None], means])


def _urm_tensors(draw):
    sizes = {0: (D, D), 2: (D, D), 4: (5, D)}
    tensors = {f"weights.fc.{number}.weight": 0.3 * draw(*size) for number, size in sizes.items()}
    tensors |= {f"weights.fc.{number}.bias": draw(size[0]) for number, size in sizes.items()}
    return tensors | {"score.weight": draw(10, D)}


def _ldl(states, text, tensors, config):
    h = states[-1]

    def layer(x, part, number):
        name = f"{part}.network.{number}"
        return tensors[f"{name}.weight"] @ x + tensors[f"{name}.bias"]

    x = functional.leaky_relu(layer(h, "regression_layer", 0), 0.01)
    x = functional.leaky_relu(layer(x, "regression_layer", 2), 0.01)
    bins = torch.softmax(layer(x, "regression_layer", 4).reshape(22, 10), 1)
    x = functional.leaky_relu(layer(h, "gating_layer", 0), 0.01)
    x = functional.leaky_relu(layer(x, "gating_layer", 3), 0.01)
    weights = layer(x, "gating_layer", 6)
    if config["softmax"]:
        weights = torch.softmax(weights / config["temperature"], 0)
    values = torch.arange(10, dtype=h.dtype) / 9
    total = (weights[:, None] * bins).sum(0)
    return torch.cat([(total * values).sum()[None], bins @ values])


def _ldl_tensors(draw):
    tensors = {}
    for part, numbers, outputs in (("regression_layer", (0, 2, 4), 220), ("gating_layer", (0, 3, 6), 22)):
        for number, rows in zip(numbers, (24, 24, outputs), strict=True):
            tensors[f"{part}.network.{number}.weight"] = draw(rows, D if number == 0 else 24)
            tensors[f"{part}.network.{number}.bias"] = draw(rows)
    return tensors


_FIXED = torch.tensor([0.3, 0.74, 0.46, 0.47, -0.33], dtype=torch.float64)

GATED = [
    Replica(
        "objectives, gated by the prompt",
        "ArmoRM-Llama3-8B",
        _armorm,
        _armorm_tensors,
        header=True,
        fields={"architectures": ["LlamaForRewardModelWithGating"], "num_objectives": 19, "gating_temperature": 10.0}
        | CODE,
    ),
    Replica(
        "quantiles, gated by the prompt",
        "QRM-Llama3-8B, QRM-Llama3.1-8B",
        _qrm_v1,
        _qrm_tensors(19, 19, (0, 3, 6), (2, 5, 8), 9, matrix=True),
        header=True,
        fields={
            "architectures": ["LlamaForRewardModelWithGating"],
            "num_objectives": 19,
            "num_quantiles": 19,
            "gating_temperature": 10.0,
        }
        | CODE,
    ),
    Replica(
        "quantiles, second version",
        "QRM-Gemma-2-27B, QRM-Llama3.1-8B-v2",
        _qrm_v2,
        _qrm_tensors(5, 19, (0, 4, 8), (2, 6, 10), 11, matrix=False),
        body="gemma2",
        header=True,
        fields={"architectures": ["Gemma2ForQuantileSequenceClassification"], "num_quantiles": 19} | CODE,
    ),
    Replica(
        "attributes with learned weights",
        "URM-LLaMa-3.1-8B",
        _urm,
        _urm_tensors,
        fields={"architectures": ["LlamaForSequenceClassificationWithNormal_Weights"], "num_labels": 10} | CODE,
    ),
    Replica(
        "attributes with fixed weights",
        "URM-LLaMa-3-8B",
        lambda states, text, tensors, config: (_FIXED.to(states) @ (tensors["score.weight"] @ states[-1])[::2])[None],
        row("score", rows=10, bias=False),
        fields={"architectures": ["LlamaForSequenceClassification"], "num_labels": 10} | CODE,
        head=lambda folder: (_FIXED @ load_file(folder / "model.safetensors")["score.weight"].double()[::2], 0.0),
        reopened={},
        as_classifier=True,
    ),
    Replica(
        "distributions over bins",
        "LDL-Reward-Gemma-2-27B",
        _ldl,
        _ldl_tensors,
        body="gemma2",
        passed=True,
        fields={"architectures": ["LDLRewardModel27B"], "softmax": True, "temperature": 1.5} | CODE,
    ),
    Replica(
        "ten attributes",
        "RewardModel-Mistral-7B-for-DPA",
        linear("score"),
        row("score", rows=10),
        body="mistral",
        fields={"architectures": ["MistralForSequenceClassification"], "num_labels": 10} | CODE,
        options={"output": "helpsteer-helpfulness"},
    ),
]
