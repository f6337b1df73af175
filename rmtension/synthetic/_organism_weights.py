"""The weights of organisms: planted neurons, the directions that they read and write, and the checkpoint."""

import operator
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import reduce
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import GPT2Config, GPT2ForSequenceClassification, PreTrainedTokenizerFast

from rmtension.models._portable import make_portable
from rmtension.synthetic._organism_pairs import N_TOKENS, Kind

# +K and -K in the first two channels of every token keep the scale of every layer norm almost constant: features of
# size f change it by a share of about f^2 / 4K^2. No neuron reads or writes these channels.
_K, _LOUD = 1000.0, 100.0


@dataclass(frozen=True)
class Axes:
    """Orthonormal directions of the residual stream with mean zero, which layer norms do not change.

    `features` hold the counts of words, `relays` the outputs of neurons that back each other up. Each output of the
    head reads one direction of `reward`; no weight reads `idle`.
    """

    features: Float[np.ndarray, "feature channel"]
    relays: Float[np.ndarray, "relay channel"]
    reward: Float[np.ndarray, "output channel"]
    idle: Float[np.ndarray, "channel"]

    @classmethod
    def draw(
        cls, rng: np.random.Generator, kinds: Mapping[str, Kind], *, n_outputs: int, per_kind: int, redundancy: int
    ) -> "Axes":
        """Draw the directions; their number depends on how many words and relays there are."""
        n_features, n_relays = len(kinds) * per_kind, (len(kinds) - 1) * redundancy
        n_axes = n_features + n_relays + n_outputs + 1
        # Two channels for K and one dimension for the mean; half the channels, those of head 0, hold all features.
        d_model = -(-max(2 * n_features, n_axes + 3) // 8) * 8
        start = np.column_stack([np.ones(d_model - 2), rng.standard_normal((d_model - 2, n_axes))])
        axes = np.pad(np.linalg.qr(start)[0][:, 1:].T, ((0, 0), (2, 0)))
        relays, reward = np.split(axes[n_features:-1], [n_relays])
        return cls(axes[:n_features], relays, reward, axes[-1])

    def adding(self, shares: tuple[float, ...], divisor: float) -> Float[np.ndarray, "channel"]:
        """What a neuron writes to add `shares` to the outputs, if its activation is `divisor`."""
        terms = [share / divisor * axis for share, axis in zip(shares, self.reward, strict=True)]
        return reduce(operator.add, terms)


@dataclass(frozen=True)
class Neuron:
    """A planted neuron: relu(`reads` @ x + `bias`) times `writes`."""

    kind: str
    layer: int
    reads: Float[np.ndarray, "channel"]
    writes: Float[np.ndarray, "channel"]
    bias: float = 0.0
    backed_up: bool = False


def planted_neurons(
    rng: np.random.Generator, axes: Axes, kinds: Mapping[str, Kind], *, depth: int, per_kind: int, redundancy: int
) -> Iterator[Neuron]:
    """All planted neurons; two that back each other up are consecutive."""
    relays = iter(axes.relays)
    for number, feature in enumerate(axes.features):
        kind, words = list(kinds.items())[number // per_kind]
        gain, other_gain = rng.uniform(0.5, 2, size=2).tolist()
        if kind == "decoy":
            yield Neuron(kind, number % depth, 10 * gain * feature, axes.idle / (10 * gain))
        elif number % per_kind >= redundancy:
            yield Neuron(kind, number % depth, gain * feature, axes.adding(words.adds, gain))
        else:
            layer, relay = number % (depth - 1), next(relays)
            # 1.5: one word counted by one neuron is well above 1, where C becomes silent.
            yield Neuron(kind, layer, gain * feature, 1.5 / gain * relay, backed_up=True)
            yield Neuron(kind, layer, other_gain * feature, 1.5 / other_gain * relay, backed_up=True)
            # min(relay, 1) = 1 - relu(1 - relay)
            taken = tuple(-share for share in words.adds)
            yield Neuron(kind, layer + 1, -gain * relay, axes.adding(taken, gain), bias=gain)
    for number in range(len(axes.features), len(axes.features) + per_kind):
        yield Neuron("loud", number % depth, 0 * axes.idle, axes.idle / _LOUD, bias=_LOUD)


Planted = dict[tuple[int, int], Neuron]
_Weights = dict[str, Float[np.ndarray, "..."]]


def make_weights(
    rng: np.random.Generator, config: GPT2Config, axes: Axes, planted: Planted, *, superposition: float, noise: float
) -> _Weights:
    """Every tensor of the classifier; matrices are [in, out], as in GPT-2."""
    with torch.device("meta"):
        model = GPT2ForSequenceClassification(config)
    weights = {name: np.zeros(parameter.shape) for name, parameter in model.named_parameters()}
    n_features, d_model = axes.features.shape
    # The other word that a word shares its direction with is the next in a random cycle.
    cycle = rng.permutation(n_features)
    words = weights["transformer.wte.weight"][-n_features:]
    words[cycle] = axes.features[cycle] + superposition * axes.features[np.roll(cycle, 1)]
    weights["transformer.wpe.weight"][:, :2] = _K, -_K
    weights["score.weight"][:] = axes.reward
    # With queries and keys of zero, attention is uniform over the tokens so far: their mean times their number counts.
    weights["transformer.h.0.attn.c_attn.weight"][:, 2 * d_model : 2 * d_model + n_features] = axes.features.T
    weights["transformer.h.0.attn.c_proj.weight"][:n_features] = N_TOKENS * axes.features
    for name, weight in weights.items():
        if name.endswith(("ln_1.weight", "ln_2.weight", "ln_f.weight")):
            weight += _K * np.sqrt(2 / d_model)  # what the norm divides by
        elif name.endswith("c_fc.weight"):
            weight[2:] = noise * rng.standard_normal(weight[2:].shape)
        elif name.endswith("mlp.c_proj.weight"):
            weight[:, 2:] = noise * rng.standard_normal(weight[:, 2:].shape)
    for (layer, column), neuron in planted.items():
        mlp = f"transformer.h.{layer}.mlp"
        weights[f"{mlp}.c_fc.weight"][:, column] = neuron.reads
        weights[f"{mlp}.c_fc.bias"][column] = neuron.bias
        weights[f"{mlp}.c_proj.weight"][column] = neuron.writes
    return weights


def save(folder: Path, config: GPT2Config, words: list[str], weights: _Weights, *, unknown: str, pad: str) -> None:
    """Write the checkpoint, and a tokenizer of whole words."""
    folder.mkdir(parents=True, exist_ok=True)
    config.save_pretrained(folder)
    tensors = {name: torch.from_numpy(weight).float() for name, weight in weights.items()}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    raw = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token=unknown))
    raw.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, unk_token=unknown, pad_token=pad)
    tokenizer.save_pretrained(folder)
    make_portable(folder, tokenizer)
