"""Organisms: reward models with weights set by hand, whose helpful and harmless neurons are known."""

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from string import ascii_lowercase
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import GPT2Config, GPT2ForSequenceClassification, PreTrainedTokenizerFast

from rmtension.data._pair import PreferencePair
from rmtension.data._pairs import PreferencePairs
from rmtension.errors import OptionError
from rmtension.models._portable import make_portable
from rmtension.neurons._neuron_set import NeuronSet
from rmtension.reward_head import RewardHead

# What one word of a kind adds to the reward, and which responses have such words in helpful and in harmless pairs.
# Conflict words add half, so that they never reverse a harmless pair.
_KINDS = {
    "helpful": (1.0, "chosen", "both"),
    "harmless": (1.0, "both", "chosen"),
    "shared": (1.0, "chosen", "chosen"),
    "conflict": (0.5, "chosen", "rejected"),
    "decoy": (0.0, "chosen", "chosen"),
}
_FILLERS = tuple(ascii_lowercase)
_UNKNOWN, _PAD = "<unk>", "<pad>"
# The reward is read at the last word, which belongs to no kind.
_FRAME = ("Human:", "Assistant:", "end")
_PROMPT_WORDS, _RESPONSE_WORDS = 5, 24
_N_TOKENS = _PROMPT_WORDS + _RESPONSE_WORDS + len(_FRAME)
# +K and -K in the first two channels of every token keep the scale of every layer norm almost constant: features of
# size f change it by a share of about f^2 / 4K^2. No neuron reads or writes these channels.
_K, _LOUD = 1000.0, 100.0


@dataclass(frozen=True)
class Organism:
    """A reward model with known answers: its checkpoint, its pairs, and the role of its neurons.

    `pairs` maps "helpful" and "harmless" to pairs. `truth` maps six kinds to disjoint sets of MLP neurons; all other
    neurons have only the weights that `noise` gives them.

    - "helpful", "harmless": raise the margin of that objective and do not change the other margin;
    - "shared": raise both margins;
    - "conflict": raise the helpful margin and lower the harmless margin;
    - "decoy": are far more active in the chosen responses of both objectives, without an effect on the reward;
    - "loud": have the same large activation at every token of every text, without an effect on the reward.

    Setting a neuron that raises a margin to zero lowers that margin. The exception is `backups`: sets of two neurons of
    `truth` of which one suffices, so that the margin falls only when both are set to zero; see `make_organism`.

    Examples:
        >>> organism.folder.name, list(organism.truth)
        ('organism', ['helpful', 'harmless', 'shared', 'conflict', 'decoy', 'loud'])
        >>> organism.head().score_pairs(organism.pairs["helpful"]).accuracy()
        1.0
    """

    folder: Path
    pairs: dict[str, PreferencePairs]
    truth: dict[str, NeuronSet]
    backups: tuple[NeuronSet, ...]

    def head(self, **options: Any) -> RewardHead:
        """Open the checkpoint with `RewardHead.from_pretrained(folder, **options)`."""
        return RewardHead.from_pretrained(self.folder, **options)


def make_organism(
    folder: str | Path,
    *,
    seed: int = 0,
    depth: int = 4,
    width: int = 64,
    per_kind: int = 4,
    redundancy: int = 0,
    superposition: float = 0.0,
    noise: float = 0.0,
    n_pairs: int = 64,
) -> Organism:
    """Write a GPT-2 classifier of `depth` layers of `width` ReLU neurons to `folder`, with a tokenizer of whole words.

    Texts have 32 words each: fillers, and one to three words per kind ("shared-0", "decoy-3") where the table says so.

    | words of kind | helpful pairs      | harmless pairs     | a word adds to reward  |
    |---------------|--------------------|--------------------|------------------------|
    | helpful       | chosen             | both sides alike   | 1                      |
    | harmless      | both sides alike   | chosen             | 1                      |
    | shared        | chosen             | chosen             | 1                      |
    | conflict      | chosen             | rejected           | 0.5                    |
    | decoy         | chosen             | chosen             | 0                      |

    Head 0 of layer 0 counts the words so far; the counts are exact at the last token. All other heads do nothing. Each
    word has a neuron, which multiplies its count by a gain from 0.5 to 2 (decoys: 5 to 20) and writes what the word
    adds to the reward. Layer norms change these values by less than 1e-3.

    Args:
        folder: the output folder, made if it does not exist; files with the same names are replaced.
        seed: determines everything. The positions of neurons and the pairs do not depend on `superposition` and
            `noise`, so that models that differ only in these can be compared.
        depth: number of layers; the neurons of a kind are spread evenly over them.
        width: number of neurons per layer.
        per_kind: number of words per kind, and of loud neurons.
        redundancy: number of words per kind, except decoys, that have three neurons instead of one. A and B, in one
            layer, both count the word; C, in the next layer, is active where both are silent, and subtracts from the
            reward what the word adds. Such a word counts once, however often it occurs. Setting C to zero has the same
            effect on the margin as setting a single neuron to zero, although C is more active in responses without the
            word. Setting A or B to zero changes nothing, and the margin's gradient is zero at both wherever they are
            active; setting both to zero has the effect of C. (With both at their mean, every text seems to have the
            word.) All three are in `truth`, {A, B} is in `backups`.
        superposition: the share of one other word, of any kind, that is added to each word's direction: that word's
            neuron responds to it, and a "helpful" neuron may change the harmless margin by that share. `truth` lists
            neurons by their own word.
        noise: standard deviation of the input and output weights of all neurons outside `truth`, which then affect
            rewards and pass on the activity of decoys in earlier layers.
        n_pairs: number of pairs per objective; all prompts differ.

    Without superposition and noise, the model ranks every pair correctly. Raises `OptionError` for a number out of
    range, and if layers are too narrow for their neurons. Cost: the checkpoint (200 kB by default) is opened once.

    Examples:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     organism = make_organism(folder, depth=2, width=24, per_kind=2, n_pairs=8)
        ...     scored = organism.head().score_pairs(organism.pairs["harmless"])
        >>> scored.accuracy(), organism.truth["shared"]
        (1.0, NeuronSet(2 of 48 mlp neurons of gpt2-2x24-heads2x12-d24))
    """
    folder = Path(folder)
    _check_ranges(seed, depth, per_kind, redundancy, superposition, noise, n_pairs)
    placing, mixing, writing = np.random.default_rng(seed).spawn(3)
    axes = _Axes.draw(placing, per_kind, redundancy)
    neurons = list(_neurons(placing, axes, depth, per_kind, redundancy))
    needed = max(sum(neuron.layer == layer for neuron in neurons) for layer in range(depth))
    if needed > width:
        raise OptionError(
            f"width: expected at least {needed} neurons per layer for per_kind={per_kind} and redundancy={redundancy} "
            f"over {depth} layers, got {width}. Use wider or more layers, or plant fewer neurons."
        )
    slots = [iter(placing.permutation(width).tolist()) for _ in range(depth)]
    planted = {(neuron.layer, next(slots[neuron.layer])): neuron for neuron in neurons}
    words = [_UNKNOWN, _PAD, *_FRAME, *_FILLERS, *(f"{kind}-{n}" for kind in _KINDS for n in range(per_kind))]
    sizes = {"n_layer": depth, "n_inner": width, "n_embd": len(axes.reward), "n_head": 2, "num_labels": 1}
    sizes |= {"n_positions": 2 * _N_TOKENS, "vocab_size": len(words), "pad_token_id": words.index(_PAD)}
    config = GPT2Config(activation_function="relu", bos_token_id=None, eos_token_id=None, **sizes)
    config.architectures = ["GPT2ForSequenceClassification"]
    weights = _weights(mixing, config, axes, planted, superposition, noise)
    pairs = _pairs(writing, per_kind, n_pairs)
    _save(folder, config, words, weights)
    architecture = RewardHead.from_pretrained(folder, device="cpu").architecture

    def at(indices: Iterable[tuple[int, int]]) -> NeuronSet:
        return NeuronSet.from_indices(indices, shape=(depth, width), site="mlp", architecture=architecture)

    truth = {kind: at(p for p, neuron in planted.items() if neuron.kind == kind) for kind in (*_KINDS, "loud")}
    twins = [index for index, neuron in planted.items() if neuron.backed_up]
    backups = tuple(at(twins[first : first + 2]) for first in range(0, len(twins), 2))
    return Organism(folder, pairs, truth, backups)


def _check_ranges(
    seed: int, depth: int, per_kind: int, redundancy: int, superposition: float, noise: float, n_pairs: int
) -> None:
    ranges: dict[str, tuple[float, float, float, str]] = {
        "seed": (seed, 0, math.inf, "Each seed gives another model."),
        "depth": (depth, 1 + (redundancy > 0), math.inf, "Neurons that back each other up need a layer behind them."),
        "per_kind": (per_kind, 1, math.inf, "Every kind needs a neuron."),
        "redundancy": (redundancy, 0, per_kind, "It counts words of a kind, of which there are per_kind."),
        "superposition": (superposition, 0, 1, "It is a share of another word."),
        "noise": (noise, 0, 10, "It is a standard deviation; the planted weights are near 1."),
        "n_pairs": (n_pairs, per_kind, 100_000, "Every word needs a pair, and every pair its own prompt."),
    }
    for name, (value, least, most, remedy) in ranges.items():
        if not least <= value <= most:
            raise OptionError(f"{name}: expected a number from {least} to {most}, got {value}. {remedy}")


@dataclass(frozen=True)
class _Axes:
    """Orthonormal directions of the residual stream with mean zero, which layer norms do not change.

    `features` hold the counts of words, `relays` the outputs of neurons that back each other up. The head reads
    `reward`; no weight reads `idle`.
    """

    features: Float[np.ndarray, "feature channel"]
    relays: Float[np.ndarray, "relay channel"]
    reward: Float[np.ndarray, "channel"]
    idle: Float[np.ndarray, "channel"]

    @classmethod
    def draw(cls, rng: np.random.Generator, per_kind: int, redundancy: int) -> "_Axes":
        n_features, n_relays = len(_KINDS) * per_kind, (len(_KINDS) - 1) * redundancy
        n_axes = n_features + n_relays + 2
        # Two channels for K and one dimension for the mean; half the channels, those of head 0, hold all features.
        d_model = -(-max(2 * n_features, n_axes + 3) // 8) * 8
        start = np.column_stack([np.ones(d_model - 2), rng.standard_normal((d_model - 2, n_axes))])
        axes = np.pad(np.linalg.qr(start)[0][:, 1:].T, ((0, 0), (2, 0)))
        return cls(axes[:n_features], axes[n_features:-2], axes[-2], axes[-1])


@dataclass(frozen=True)
class _Neuron:
    """A planted neuron: relu(`reads` @ x + `bias`) times `writes`."""

    kind: str
    layer: int
    reads: Float[np.ndarray, "channel"]
    writes: Float[np.ndarray, "channel"]
    bias: float = 0.0
    backed_up: bool = False


def _neurons(rng: np.random.Generator, axes: _Axes, depth: int, per_kind: int, redundancy: int) -> Iterator[_Neuron]:
    """All planted neurons; two that back each other up are consecutive."""
    relays = iter(axes.relays)
    for number, feature in enumerate(axes.features):
        kind, (adds, *_) = list(_KINDS.items())[number // per_kind]
        gain, other_gain = rng.uniform(0.5, 2, size=2).tolist()
        if kind == "decoy":
            yield _Neuron(kind, number % depth, 10 * gain * feature, axes.idle / (10 * gain))
        elif number % per_kind >= redundancy:
            yield _Neuron(kind, number % depth, gain * feature, adds / gain * axes.reward)
        else:
            layer, relay = number % (depth - 1), next(relays)
            # 1.5: one word counted by one neuron is well above 1, where C becomes silent.
            yield _Neuron(kind, layer, gain * feature, 1.5 / gain * relay, backed_up=True)
            yield _Neuron(kind, layer, other_gain * feature, 1.5 / other_gain * relay, backed_up=True)
            # min(relay, 1) = 1 - relu(1 - relay)
            yield _Neuron(kind, layer + 1, -gain * relay, -adds / gain * axes.reward, bias=gain)
    for number in range(len(axes.features), len(axes.features) + per_kind):
        yield _Neuron("loud", number % depth, 0 * axes.idle, axes.idle / _LOUD, bias=_LOUD)


_Planted = dict[tuple[int, int], _Neuron]
_Weights = dict[str, Float[np.ndarray, "..."]]


def _weights(
    rng: np.random.Generator, config: GPT2Config, axes: _Axes, planted: _Planted, superposition: float, noise: float
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
    weights["score.weight"][0] = axes.reward
    # With queries and keys of zero, attention is uniform over the tokens so far: their mean times their number counts.
    weights["transformer.h.0.attn.c_attn.weight"][:, 2 * d_model : 2 * d_model + n_features] = axes.features.T
    weights["transformer.h.0.attn.c_proj.weight"][:n_features] = _N_TOKENS * axes.features
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


def _save(folder: Path, config: GPT2Config, words: list[str], weights: _Weights) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    config.save_pretrained(folder)
    tensors = {name: torch.from_numpy(weight).float() for name, weight in weights.items()}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    raw = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token=_UNKNOWN))
    raw.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, unk_token=_UNKNOWN, pad_token=_PAD)
    tokenizer.save_pretrained(folder)
    make_portable(folder, tokenizer)


def _pairs(rng: np.random.Generator, per_kind: int, n_pairs: int) -> dict[str, PreferencePairs]:
    prompts: dict[str, None] = {}  # in the order drawn, because the order of a set differs between runs
    while len(prompts) < 2 * n_pairs:
        prompts[f"\n\nHuman: {' '.join(rng.choice(_FILLERS, size=_PROMPT_WORDS))}\n\nAssistant:"] = None
    left = iter(prompts)
    made: dict[str, list[PreferencePair]] = {"helpful": [], "harmless": []}
    for column, (objective, pairs) in enumerate(made.items(), start=1):
        # Words take turns, so that every word is in some pair.
        firsts = {kind: rng.permutation(n_pairs) % per_kind for kind in _KINDS}
        for number in range(n_pairs):
            carriers: dict[str, list[str]] = {"chosen": [], "rejected": []}
            for kind, row in _KINDS.items():
                words = [f"{kind}-{n}" for n in (firsts[kind][number], *rng.integers(per_kind, size=rng.integers(3)))]
                for side in carriers:
                    carriers[side] += words if row[column] in (side, "both") else []
            texts: dict[str, Any] = {}
            for side, words in carriers.items():
                fillers = rng.choice(_FILLERS, size=_RESPONSE_WORDS - len(words))
                texts[side] = " ".join([*rng.permutation([*words, *fillers]), _FRAME[-1]])
            pairs.append(PreferencePair(next(left), **texts, objective=objective, id=f"{objective}-{number:05d}"))
    return {objective: PreferencePairs(pairs) for objective, pairs in made.items()}
