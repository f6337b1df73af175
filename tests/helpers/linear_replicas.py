"""Replicas of the kinds whose reward is a linear map or a few layers on one state, or on the mean of all."""

import torch
from replicas import CLASSIFIER, CODE, D, Replica, linear, row


def _mlp(name, first=0, second=2):
    def forward(states, text, tensors, config):
        hidden = tensors[f"{name}.{first}.weight"] @ states[-1] + tensors[f"{name}.{first}.bias"]
        return tensors[f"{name}.{second}.weight"] @ hidden.clamp(min=0) + tensors[f"{name}.{second}.bias"]

    return forward


def _two_layers(name, width, more=None):
    def make(draw):
        return {
            f"{name}.0.weight": draw(width, D),
            f"{name}.0.bias": draw(width),
            f"{name}.2.weight": draw(1, width),
            f"{name}.2.bias": draw(1),
        }

    return make


def _beaver(states, text, tensors, config):
    score = tensors["score_head.weight"] @ states[-1] + tensors["score_head.bias"]
    deviation = tensors["normalizer.var"].sqrt() + 1e-8
    if config["score_type"] == "reward":
        return (score - tensors["normalizer.mean"]) / deviation
    return score / deviation


def _beaver_tensors(draw):
    count = {"normalizer.count": torch.tensor([7])}
    return row("score_head")(draw) | {"normalizer.mean": draw(1), "normalizer.var": draw(1).square() + 0.5} | count


def _mean_pooled(states, text, tensors, config):
    return tensors["out_proj.weight"] @ states.mean(0) + tensors["out_proj.bias"]


def _standardised(states, text, tensors, config):
    return (tensors["value_head.weight"] @ states[-1] - config["mean"]) / config["std"]


PLAIN = [
    Replica(
        "classifier, one output",
        "Skywork-Reward, Tulu-3-RM, FsfairX, GRM-*-rewardmodel-ft",
        linear("score", bias=False),
        row("score", bias=False),
        fields=CLASSIFIER | {"num_labels": 1},
        as_classifier=True,
    ),
    Replica(
        "classifier, several outputs",
        "two-label classifiers",
        linear("score", bias=False),
        row("score", rows=3, bias=False),
        fields=CLASSIFIER | {"num_labels": 3, "id2label": {"0": "bad", "1": "fair", "2": "good"}},
        options={"output": ("good", "bad")},
        chosen=(2, 0),
        reopened={},
        as_classifier=True,
    ),
    Replica(
        "trl value head",
        "trl's AutoModelForCausalLMWithValueHead",
        linear("v_head.summary"),
        row("v_head.summary"),
        fields={"architectures": ["LlamaForCausalLM"]},
        unembedding=True,
    ),
    Replica(
        "separate value head",
        "LLaMA-Factory",
        linear("v_head.summary"),
        row("v_head.summary"),
        fields={"architectures": ["LlamaForCausalLM"]},
        unembedding=True,
        separate="value_head.safetensors",
    ),
    Replica(
        "linear head of an own class",
        "UltraRM, Eurus-RM",
        linear("regression_head", bias=False),
        row("regression_head", bias=False),
        body="mistral",
        fields={"architectures": ["EurusRewardModel"]} | CODE,
    ),
    Replica(
        "body under another name",
        "Starling-RM-34B",
        linear("v_head", bias=False),
        row("v_head", bias=False),
        fields=CLASSIFIER,
        prefix="transformer.",
    ),
    Replica(
        "score head",
        "beaver-*-reward",
        linear("score_head"),
        row("score_head"),
        fields={"architectures": ["LlamaForScore"], "do_normalize": False, "bias": True},
    ),
    Replica(
        "normalised score head (reward)",
        "beaver-*-reward with do_normalize",
        _beaver,
        _beaver_tensors,
        fields={"architectures": ["LlamaForScore"], "do_normalize": True, "score_type": "reward", "bias": True},
    ),
    Replica(
        "normalised score head (cost)",
        "beaver-*-cost with do_normalize",
        _beaver,
        _beaver_tensors,
        fields={"architectures": ["LlamaForScore"], "do_normalize": True, "score_type": "cost", "bias": True},
    ),
    Replica(
        "output projection, last token",
        "oasst-rm-2-pythia",
        linear("out_proj"),
        row("out_proj"),
        body="gpt_neox",
        prefix="gpt_neox.",
        fields={"model_type": "gpt_neox_reward_model", "architectures": ["GPTNeoXRewardModel"], "pooling": "last"},
    ),
    Replica(
        "output projection, mean",
        "GPTNeoXRewardModel with pooling 'mean'",
        _mean_pooled,
        row("out_proj"),
        body="gpt_neox",
        prefix="gpt_neox.",
        fields={"model_type": "gpt_neox_reward_model", "architectures": ["GPTNeoXRewardModel"], "pooling": "mean"},
    ),
    Replica(
        "mean of rows",
        "Ziya-LLaMA-7B-Reward",
        lambda states, text, tensors, config: (tensors["value_head.weight"] @ states[-1]).mean()[None],
        row("value_head", rows=4, bias=False),
        fields={"architectures": ["LlamaRewardModel"]} | CODE,
    ),
    Replica(
        "standardised value head",
        "OpenRLHF with normalize_reward",
        _standardised,
        row("value_head", bias=False),
        fields={"normalize_reward": True, "mean": 0.7, "std": 1.9, "architectures": ["LlamaForCausalLM"]},
    ),
]
LAYERED = [
    Replica(
        "MLP v_head",
        "GRM-*-sftreg",
        _mlp("v_head.summary"),
        _two_layers("v_head.summary", 48),
        fields={"architectures": ["GRewardModel"], "vhead_layer_type": "mlp", "vhead_num_neurons": 48} | CODE,
    ),
    Replica(
        "MLP score of a classifier",
        "INF-ORM-Llama3.1-70B",
        _mlp("score"),
        _two_layers("score", D),
        fields={"architectures": ["INFORMForSequenceClassification"], "num_labels": 1} | CODE,
    ),
    Replica(
        "MLP score",
        "Qwen2.5-Math-RM-72B, WorldPM-72B",
        _mlp("score"),
        _two_layers("score", D),
        body="qwen2",
        fields={"model_type": "qwen2_rm", "architectures": ["Qwen2ForRewardModel"]} | CODE,
        unembedding=True,
    ),
]
