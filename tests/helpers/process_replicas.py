"""Replicas of process reward models, which score the steps of a response at the markers that end them."""

import torch
from replicas import CODE, D, Replica, Tensors, Text, row

from rmtension.heads import ProcessHead

_EXTRA, _NEW_LINE = 42, 271


def _combined(right: torch.Tensor) -> torch.Tensor:
    """The four outputs from the probability that each step is right."""
    return torch.stack([right.min(), right.sum() / len(right), right[-1], right.log().sum().exp()])


def _steps(states: torch.Tensor, text: Text, marker: int) -> torch.Tensor:
    """The states at the markers of the response [step, d_model]."""
    return states[[at for at in range(text.first, len(text.ids)) if text.ids[at] == marker]]


def _token_classes(states, text, tensors, config):
    logits = _steps(states, text, _NEW_LINE) @ tensors["score.weight"].T + tensors["score.bias"]
    odds = (logits[:, 1] - logits[:, 0]).exp()
    return _combined(odds / (1 + odds))


def _layered_classes(states, text, tensors, config):
    hidden = (_steps(states, text, _EXTRA) @ tensors["score.0.weight"].T + tensors["score.0.bias"]).clamp(min=0)
    logits = hidden @ tensors["score.2.weight"].T + tensors["score.2.bias"]
    return _combined(torch.softmax(logits, 1)[:, 1])


def _one_number(states, text, tensors, config):
    value = _steps(states, text, _NEW_LINE) @ tensors["v_head.summary.weight"][0] + tensors["v_head.summary.bias"]
    return _combined(1 / (1 + (-value).exp()))


def _two_layers(draw) -> Tensors:
    # Small, so that probabilities differ from 0 and 1.
    sizes = {"0": (D, D), "2": (2, D)}
    weights = {f"score.{number}.weight": 0.3 * draw(*size) for number, size in sizes.items()}
    return weights | {f"score.{number}.bias": 0.3 * draw(size[0]) for number, size in sizes.items()}


PROCESS = [
    Replica(
        "steps of a token classifier",
        "trl's process reward models",
        _token_classes,
        row("score", rows=2),
        fields={"architectures": ["LlamaForTokenClassification"], "num_labels": 2},
        head=lambda folder: ProcessHead("NL"),
        options={"output": "min"},
        marker="NL",
    ),
    Replica(
        "steps with an MLP",
        "Qwen2.5-Math-PRM-7B, -72B",
        _layered_classes,
        _two_layers,
        body="qwen2",
        fields={"architectures": ["Qwen2ForProcessRewardModel"], "num_labels": 2} | CODE,
        head=lambda folder: ProcessHead("<extra_0>"),
        options={"output": "product"},
        chosen=(3,),
        marker="<extra_0>",
    ),
    Replica(
        "steps with one number each",
        "Skywork-o1-Open-PRM-Qwen-2.5",
        _one_number,
        row("v_head.summary"),
        body="qwen2",
        fields={"architectures": ["Qwen2ForPrmModel"]} | CODE,
        head=lambda folder: ProcessHead("NL"),
        options={"output": "mean"},
        chosen=(1,),
        marker="NL",
    ),
]
