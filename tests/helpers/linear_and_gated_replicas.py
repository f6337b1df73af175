"""Replicas of the kinds that read a head from the last token, or from a prompt's header too."""

import torch
from replicas import Replica
from torch.nn import functional

D = 32
_CLASSIFIER = {"architectures": ["LlamaForSequenceClassification"]}
_CODE = {"auto_map": {"AutoModelForSequenceClassification": "modeling_custom.Model"}}


def _linear(name, bias=True):
    def forward(states, ids, tensors, config):
        value = tensors[f"{name}.weight"] @ states[-1]
        return value + tensors[f"{name}.bias"] if bias else value

    return forward


def _row(name, rows=1, bias=True):
    def make(draw):
        return {f"{name}.weight": draw(rows, D)} | ({f"{name}.bias": draw(rows)} if bias else {})

    return make


def _mlp(name, first=0, second=2):
    def forward(states, ids, tensors, config):
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


def _beaver(states, ids, tensors, config):
    score = tensors["score_head.weight"] @ states[-1] + tensors["score_head.bias"]
    deviation = tensors["normalizer.var"].sqrt() + 1e-8
    if config["score_type"] == "reward":
        return (score - tensors["normalizer.mean"]) / deviation
    return score / deviation


def _beaver_tensors(draw):
    count = {"normalizer.count": torch.tensor([7])}
    return _row("score_head")(draw) | {"normalizer.mean": draw(1), "normalizer.var": draw(1).square() + 0.5} | count


def _mean_pooled(states, ids, tensors, config):
    return tensors["out_proj.weight"] @ states.mean(0) + tensors["out_proj.bias"]


def _standardised(states, ids, tensors, config):
    return (tensors["value_head.weight"] @ states[-1] - config["mean"]) / config["std"]


def _header_start(ids, pattern):
    """The start of the last occurrence of the pattern."""
    return max(i for i in range(len(ids)) if ids[i : i + len(pattern)] == pattern)


_LLAMA_HEADER = [128009, 128006, 78191, 128007, 271]
_GEMMA_HEADER = [107, 108, 106, 2516, 108]


def _armorm(states, ids, tensors, config):
    rewards = tensors["regression_layer.weight"] @ states[-1]
    x = states[_header_start(ids, _LLAMA_HEADER)]
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


def _qrm_v1(states, ids, tensors, config):
    n, m = config["num_objectives"], config["num_quantiles"]
    quantiles = (tensors["regression_layer.weight"] @ states[-1]).reshape(n, m)
    rewards = quantiles.mean(1) @ tensors["reward_transform_matrix"]
    x = _quantile_gate(states[_header_start(ids, _LLAMA_HEADER)], tensors, (0, 3, 6), (2, 5, 8), 9)
    gate = torch.softmax(x / config["gating_temperature"], 0) * tensors["gating.logit_scale"]
    return torch.cat([(gate * rewards).sum()[None], rewards])


def _qrm_v2(states, ids, tensors, config):
    quantiles = (tensors["regression_layer.weight"] @ states[-1]).reshape(5, 19)
    rewards = quantiles.mean(1)
    x = _quantile_gate(states[_header_start(ids, _GEMMA_HEADER)], tensors, (0, 4, 8), (2, 6, 10), 11)
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


def _urm(states, ids, tensors, config):
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


def _ldl(states, ids, tensors, config):
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


def _token_logit(*tokens):
    def forward(states, ids, tensors, config):
        logits = tensors["lm_head.weight"] @ states[-1]
        first, *second = tokens
        return (logits[first] - logits[second[0]] if second else logits[first])[None]

    return forward


def _capped(states, ids, tensors, config):
    cap = config["final_logit_softcapping"]
    logits = torch.tanh(tensors["lm_head.weight"] @ states[-1] / cap) * cap
    return (logits[40] - logits[41])[None]


_FIXED = torch.tensor([0.3, 0.74, 0.46, 0.47, -0.33], dtype=torch.float64)


def _nothing(draw):
    return {}


PLAIN = [
    Replica(
        "classifier, one output",
        "Skywork-Reward, Tulu-3-RM, FsfairX, GRM-*-rewardmodel-ft",
        _linear("score", bias=False),
        _row("score", bias=False),
        fields=_CLASSIFIER | {"num_labels": 1},
        as_classifier=True,
    ),
    Replica(
        "classifier, several outputs",
        "two-label classifiers",
        _linear("score", bias=False),
        _row("score", rows=3, bias=False),
        fields=_CLASSIFIER | {"num_labels": 3, "id2label": {"0": "bad", "1": "fair", "2": "good"}},
        options={"output": ("good", "bad")},
        chosen=(2, 0),
        reopened={},
        as_classifier=True,
    ),
    Replica(
        "trl value head",
        "trl's AutoModelForCausalLMWithValueHead",
        _linear("v_head.summary"),
        _row("v_head.summary"),
        fields={"architectures": ["LlamaForCausalLM"]},
        unembedding=True,
    ),
    Replica(
        "separate value head",
        "LLaMA-Factory",
        _linear("v_head.summary"),
        _row("v_head.summary"),
        fields={"architectures": ["LlamaForCausalLM"]},
        unembedding=True,
        separate="value_head.safetensors",
    ),
    Replica(
        "linear head of an own class",
        "UltraRM, Eurus-RM",
        _linear("regression_head", bias=False),
        _row("regression_head", bias=False),
        body="mistral",
        fields={"architectures": ["EurusRewardModel"]} | _CODE,
    ),
    Replica(
        "body under another name",
        "Starling-RM-34B",
        _linear("v_head", bias=False),
        _row("v_head", bias=False),
        fields=_CLASSIFIER,
        prefix="transformer.",
    ),
    Replica(
        "score head",
        "beaver-*-reward",
        _linear("score_head"),
        _row("score_head"),
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
        _linear("out_proj"),
        _row("out_proj"),
        body="gpt_neox",
        prefix="gpt_neox.",
        fields={"model_type": "gpt_neox_reward_model", "architectures": ["GPTNeoXRewardModel"], "pooling": "last"},
    ),
    Replica(
        "output projection, mean",
        "GPTNeoXRewardModel with pooling 'mean'",
        _mean_pooled,
        _row("out_proj"),
        body="gpt_neox",
        prefix="gpt_neox.",
        fields={"model_type": "gpt_neox_reward_model", "architectures": ["GPTNeoXRewardModel"], "pooling": "mean"},
    ),
    Replica(
        "mean of rows",
        "Ziya-LLaMA-7B-Reward",
        lambda states, ids, tensors, config: (tensors["value_head.weight"] @ states[-1]).mean()[None],
        _row("value_head", rows=4, bias=False),
        fields={"architectures": ["LlamaRewardModel"]} | _CODE,
    ),
    Replica(
        "standardised value head",
        "OpenRLHF with normalize_reward",
        _standardised,
        _row("value_head", bias=False),
        fields={"normalize_reward": True, "mean": 0.7, "std": 1.9, "architectures": ["LlamaForCausalLM"]},
    ),
]
LAYERED = [
    Replica(
        "MLP v_head",
        "GRM-*-sftreg",
        _mlp("v_head.summary"),
        _two_layers("v_head.summary", 48),
        fields={"architectures": ["GRewardModel"], "vhead_layer_type": "mlp", "vhead_num_neurons": 48} | _CODE,
    ),
    Replica(
        "MLP score of a classifier",
        "INF-ORM-Llama3.1-70B",
        _mlp("score"),
        _two_layers("score", D),
        fields={"architectures": ["INFORMForSequenceClassification"], "num_labels": 1} | _CODE,
    ),
    Replica(
        "MLP score",
        "Qwen2.5-Math-RM-72B, WorldPM-72B",
        _mlp("score"),
        _two_layers("score", D),
        body="qwen2",
        fields={"model_type": "qwen2_rm", "architectures": ["Qwen2ForRewardModel"]} | _CODE,
        unembedding=True,
    ),
]
GATED = [
    Replica(
        "objectives, gated by the prompt",
        "ArmoRM-Llama3-8B",
        _armorm,
        _armorm_tensors,
        header=True,
        fields={"architectures": ["LlamaForRewardModelWithGating"], "num_objectives": 19, "gating_temperature": 10.0}
        | _CODE,
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
        | _CODE,
    ),
    Replica(
        "quantiles, second version",
        "QRM-Gemma-2-27B, QRM-Llama3.1-8B-v2",
        _qrm_v2,
        _qrm_tensors(5, 19, (0, 4, 8), (2, 6, 10), 11, matrix=False),
        body="gemma2",
        header=True,
        fields={"architectures": ["Gemma2ForQuantileSequenceClassification"], "num_quantiles": 19} | _CODE,
    ),
    Replica(
        "attributes with learned weights",
        "URM-LLaMa-3.1-8B",
        _urm,
        _urm_tensors,
        fields={"architectures": ["LlamaForSequenceClassificationWithNormal_Weights"], "num_labels": 10} | _CODE,
    ),
    Replica(
        "attributes with fixed weights",
        "URM-LLaMa-3-8B",
        lambda states, ids, tensors, config: (_FIXED.to(states) @ (tensors["score.weight"] @ states[-1])[::2])[None],
        _row("score", rows=10, bias=False),
        fields={"architectures": ["LlamaForSequenceClassification"], "num_labels": 10} | _CODE,
        head=lambda tensors: (_FIXED @ tensors["score.weight"].double()[::2], 0.0),
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
        fields={"architectures": ["LDLRewardModel27B"], "softmax": True, "temperature": 1.5} | _CODE,
    ),
    Replica(
        "ten attributes",
        "RewardModel-Mistral-7B-for-DPA",
        _linear("score"),
        _row("score", rows=10),
        body="mistral",
        fields={"architectures": ["MistralForSequenceClassification"], "num_labels": 10} | _CODE,
        options={"output": "helpsteer-helpfulness"},
    ),
]
TOKENS = [
    Replica(
        "logit of one token",
        "Llama-3.1-Nemotron-70B-Reward-HF",
        _token_logit(0),
        _nothing,
        fields={"architectures": ["LlamaForCausalLM"]},
        unembedding=True,
        options={"output": 0},
        reopened={},
        as_classifier=True,
    ),
    Replica(
        "capped logits of two tokens",
        "judges with a Gemma-2 body",
        _capped,
        _nothing,
        body="gemma2",
        fields={
            "architectures": ["Gemma2ForCausalLM"],
            "final_logit_softcapping": 3.0,
            "tie_word_embeddings": False,
        },
        unembedding=True,
        options={"output": ("Yes", "No")},
    ),
    Replica(
        "logits of two tokens",
        "yes/no judges, pair-preference-model-LLaMA3-8B",
        _token_logit(40, 41),
        _nothing,
        fields={"architectures": ["LlamaForCausalLM"]},
        unembedding=True,
        options={"output": ("Yes", "No")},
        reopened={},
        as_classifier=True,
    ),
]
ALL = [*PLAIN, *LAYERED, *GATED, *TOKENS]
assert len({replica.kind for replica in ALL}) == len(ALL)
