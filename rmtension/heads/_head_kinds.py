"""Rules that read a head from the tensors of a checkpoint, by their names and shapes and its config, without its code.

The formulas are those of the published models that each rule names. Heads that are one linear map of the last token are
read by `_heads`.
"""

import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from rmtension.errors import ModelError, RMTensionWarning
from rmtension.heads._computed_heads import (
    ExpectedBins,
    LayeredHead,
    MeanHead,
    PromptWeightedHead,
    WeightedHead,
    Weights,
)
from rmtension.heads._head import Head, LinearHead
from rmtension.heads._head_tensors import HeadTensors
from rmtension.heads._layers import Layers

_HELPSTEER = ("helpfulness", "correctness", "coherence", "complexity", "verbosity")
# The objectives of the published models, whose configs do not name them, by their number.
_ARMORM = (
    *(f"helpsteer-{name}" for name in _HELPSTEER),
    *(f"ultrafeedback-{name}" for name in ("overall_score", "instruction_following")),
    *(f"ultrafeedback-{name}" for name in ("truthfulness", "honesty", "helpfulness")),
    *("beavertails-is_safe", "prometheus-score", "argilla-overall_quality", "argilla-judge_lm"),
    *(f"code-{name}" for name in ("complexity", "style", "explanation", "instruction-following", "readability")),
)
_DPA = (
    *(f"helpsteer-{name}" for name in _HELPSTEER),
    *(f"ultrafeedback-{name}" for name in ("overall_score", "instruction_following", "truthfulness")),
    *(f"ultrafeedback-{name}" for name in ("honesty", "helpfulness")),
)
# The header of an assistant turn at which ArmoRM and QRM read the prompt, by model type.
_HEADERS = {"llama": (128009, 128006, 78191, 128007, 271), "gemma2": (107, 108, 106, 2516, 108)}
# Names of numbered layers whose published code has a ReLU after all linear layers but the last.
_RELU = ("v_head.summary.", "score.")
_NUMBERED = re.compile(r"(.+\.)\d+\.(weight|bias)$")
_LDL = ("regression_layer.network.", "gating_layer.network.")


# The fields of config.json.
Fields = Mapping[str, Any]


@dataclass(frozen=True)
class KnownHead:
    """A head that a rule read; `skips_pad` says that its code reads the last token that is no pad token."""

    head: Head
    skips_pad: bool = False


def known_head(tensors: HeadTensors, fields: Fields) -> KnownHead | None:
    """The head that the rules read from the tensors outside a body; None if no rule knows it.

    Raises `ModelError` for a head whose outputs are no rewards of single texts.
    """
    for rule in _RULES:
        found = rule(tensors, fields)
        if found is not None:
            return found
    return None


def _gated(tensors: HeadTensors, fields: Fields) -> KnownHead | None:
    """ArmoRM and QRM: objectives of the last token, times weights that a softmax computes from the prompt."""
    if "regression_layer.weight" not in tensors.shapes or "gating.layers.0.weight" not in tensors.shapes:
        return None
    gate = Layers(tensors.under("gating.layers."), torch.relu, "gating.layers")
    tensor = tensors.read(
        {"regression_layer.weight", "reward_transform_matrix", "gating.logit_scale"} & set(tensors.shapes)
    )
    rows = tensor["regression_layer.weight"].double()
    n_objectives = gate.n_outputs
    if len(rows) % n_objectives:
        raise ModelError(
            f"regression_layer.weight: expected the same number of rows for each of the {n_objectives} outputs of the "
            f"gate, got {len(rows)} rows. Open a checkpoint whose head is complete."
        )
    # The reward of an objective is the mean of its quantiles (QRM), of which ArmoRM has one.
    rows = rows.reshape(n_objectives, -1, rows.shape[1])
    n_quantiles, rows = rows.shape[1], rows.mean(dim=1)
    matrix = tensor.get("reward_transform_matrix")
    transform = None
    if matrix is not None and n_quantiles > 1:
        rows = matrix.double().T @ rows  # QRM reports the transformed objectives
    elif matrix is not None:
        transform = matrix.double()  # ArmoRM reports them before
    temperature = fields.get("gating_temperature") or (1.0 if matrix is None else 10.0)
    weights = Weights(gate, temperature=float(temperature), scale=tensor.get("gating.logit_scale"), transform=transform)
    pattern = _HEADERS.get(_model_type(fields))
    if pattern is None:
        raise ModelError(
            f"head: its weights are read at the header of an assistant turn, and the token ids of this header are "
            f"known for {sorted(_HEADERS)}, not for {_model_type(fields)!r}. Pass a Head with a `tokens` method."
        )
    names = _names(n_objectives, fields)
    return KnownHead(PromptWeightedHead(_rows(rows), weights, names, pattern), skips_pad=True)


def _weighted(tensors: HeadTensors, fields: Fields) -> KnownHead | None:
    """URM: ten outputs, of which every second one is a mean, and weights of the same token without a softmax."""
    shape = tensors.shapes.get("score.weight")
    if shape is None or "weights.fc.0.weight" not in tensors.shapes:
        return None
    weights = Weights(Layers(tensors.under("weights.fc."), functional.selu, "weights.fc"))
    rows = tensors.read(["score.weight"])["score.weight"][::2]
    if len(rows) != weights.layers.n_outputs:
        raise ModelError(
            "score.weight: expected two rows, a mean and a spread, for each output of weights.fc, got "
            f"shape {shape}. Open a checkpoint whose head is complete."
        )
    return KnownHead(WeightedHead(_rows(rows), weights, _names(len(rows), fields)), skips_pad=True)


def _distributions(tensors: HeadTensors, fields: Fields) -> KnownHead | None:
    """LDL: a distribution over bins from 0 to 1 per objective, and weights of the same token."""
    if not all(f"{part}0.weight" in tensors.shapes for part in _LDL):
        return None
    bins, gate = (Layers(tensors.under(part), functional.leaky_relu, part[:-1]) for part in _LDL)
    n_objectives = gate.n_outputs
    n_bins = bins.n_outputs // n_objectives
    objectives = ExpectedBins(bins, n_objectives, torch.linspace(0, 1, n_bins, dtype=torch.float64))
    temperature = float(fields.get("temperature") or 1.0)
    weights = Weights(gate, temperature=temperature if fields.get("softmax", False) else None)
    return KnownHead(WeightedHead(objectives, weights, _names(n_objectives, fields)), skips_pad=True)


def _layered(tensors: HeadTensors, fields: Fields) -> KnownHead | None:
    """GRM, INF-ORM, WorldPM, Qwen2.5-Math-RM: Linear-ReLU-...-Linear."""
    if _reads_steps(fields):
        return None
    prefixes = {match[1] for name in tensors.shapes if (match := _NUMBERED.match(name))}
    known = [prefix for prefix in _RELU if prefix in prefixes]
    if len(known or prefixes) != 1:
        return None
    prefix = (known or sorted(prefixes))[0]
    try:
        layers = Layers(tensors.under(prefix), torch.relu, prefix[:-1])
    except ModelError:
        return None
    if not known:
        warnings.warn(
            f"head: {prefix}* was read as linear layers with a ReLU between them, because the checkpoint does not say "
            "which activation its code has. For another one, define the head and pass it: head=OwnHead().",
            RMTensionWarning,
            stacklevel=5,
        )
    names = ("reward",) if layers.n_outputs == 1 else _names(layers.n_outputs, fields)
    return KnownHead(LayeredHead(layers, names), skips_pad=prefix == "score." and _is_classifier(fields))


def _normalised(tensors: HeadTensors, fields: Fields) -> KnownHead | None:
    """Beaver: a score head whose score is divided by its running standard deviation if the config says so."""
    if "score_head.weight" not in tensors.shapes or not fields.get("do_normalize", False):
        return None
    kind = fields.get("score_type", "reward")
    state = tensors.under("normalizer.")
    if kind not in ("reward", "cost") or not {"mean", "var"} <= set(state):
        return None
    head = tensors.under("score_head.")
    deviation = state["var"].double().sqrt() + 1e-8
    mean = state["mean"].double() if kind == "reward" else torch.zeros_like(deviation)
    bias = head.get("bias", torch.zeros(len(head["weight"]))).double()
    return KnownHead(LinearHead(head["weight"].double() / deviation[:, None], (bias - mean) / deviation))


def _standardised(tensors: HeadTensors, fields: Fields) -> KnownHead | None:
    """OpenRLHF: a linear head, less a mean and divided by a standard deviation if the config says so."""
    name = next((name for name in ("value_head", "score") if f"{name}.weight" in tensors.shapes), None)
    mean, deviation = (fields.get(key) for key in ("mean", "std"))
    if name is None or not fields.get("normalize_reward", False) or mean is None or not deviation:
        return None
    weight = tensors.read([f"{name}.weight"])[f"{name}.weight"].double()
    return KnownHead(LinearHead(weight / deviation, -mean / deviation))


def _averaged(tensors: HeadTensors, fields: Fields) -> KnownHead | None:
    """Ziya: the mean of the head's rows, one for each device that the model was trained on."""
    n_rows, *_ = tensors.shapes.get("value_head.weight", (1,))
    is_ziya = "LlamaRewardModel" in (fields.get("architectures") or []) and n_rows == fields.get(
        "model_parallel_size", 4
    )
    if n_rows == 1 or not is_ziya:
        return None
    weight = tensors.read(["value_head.weight"])["value_head.weight"]
    return KnownHead(LinearHead(weight.double().mean(dim=0)))


def _pooled(tensors: HeadTensors, fields: Fields) -> KnownHead | None:
    """OpenAssistant's GPT-NeoX with pooling "mean": a linear map of the mean over all tokens."""
    if "out_proj.weight" not in tensors.shapes or fields.get("pooling", "last") != "mean":
        return None
    head = tensors.under("out_proj.")
    return KnownHead(MeanHead(LinearHead(head["weight"], head.get("bias", 0.0))))


def _attributes(tensors: HeadTensors, fields: Fields) -> KnownHead | None:
    """RewardModel-Mistral-7B-for-DPA: ten attributes of a Mistral, whose config does not name them."""
    shape = tensors.shapes.get("score.weight")
    has_code = "AutoModelForSequenceClassification" in (fields.get("auto_map") or {})
    if shape is None or shape[0] != len(_DPA) or _model_type(fields) != "mistral" or not has_code:
        return None
    head = tensors.under("score.")
    return KnownHead(LinearHead(head["weight"], head.get("bias", 0.0), _DPA), skips_pad=True)


def _preference_vector(tensors: HeadTensors, fields: Fields) -> KnownHead | None:
    """General preference models embed a response; only two embeddings give a preference."""
    if "prompt_head.weight" in tensors.shapes and "value_head.weight" in tensors.shapes:
        raise ModelError(
            "head: value_head and prompt_head give every response a vector, and a preference is a product of two "
            "vectors, so a single text has no reward. Open a reward model that scores single texts."
        )
    return None


_Rule = Callable[[HeadTensors, Fields], KnownHead | None]
_RULES: Sequence[_Rule] = (
    *(_preference_vector, _gated, _weighted, _distributions, _normalised, _standardised, _averaged, _pooled),
    *(_attributes, _layered),
)


def _rows(rows: Tensor) -> Layers:
    return Layers({"0.weight": rows})


def _names(number: int, fields: Fields) -> tuple[str, ...]:
    """The names of objectives: those of the config, of the published models, or numbers."""
    named: Mapping[int, str] = {int(key): str(name) for key, name in (fields.get("id2label") or {}).items()}
    if len(named) == number and not all(name.startswith("LABEL_") for name in named.values()):
        return tuple(named[key] for key in sorted(named))
    published = {len(names): names for names in (_ARMORM, _HELPSTEER)}
    return published.get(number, tuple(map(str, range(number))))


def _model_type(fields: Fields) -> str:
    text: Mapping[str, Any] = fields.get("text_config") or fields
    return str(text.get("model_type") or "")


def _is_classifier(fields: Fields) -> bool:
    return any(name.endswith("ForSequenceClassification") for name in fields.get("architectures") or [])


def _reads_steps(fields: Fields) -> bool:
    """Whether this is a process reward model, which reads a reward at several tokens."""
    return any(re.search(r"Process|Prm|PRM", name) for name in fields.get("architectures") or [])
