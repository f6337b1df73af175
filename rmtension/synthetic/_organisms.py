"""Organisms: reward models with weights set by hand, whose helpful and harmless neurons are known."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from transformers import GPT2Config

from rmtension.data._pairs import PreferencePairs
from rmtension.errors import OptionError
from rmtension.neurons._neuron_set import NeuronSet
from rmtension.reward_head import RewardHead
from rmtension.synthetic._organism_pairs import FILLERS, FRAME, N_TOKENS, Kind, make_pairs
from rmtension.synthetic._organism_weights import Axes, make_weights, planted_neurons, save

# Which responses have words of a kind, and what a word adds to the reward.
# Conflict words add half, so that they never reverse a harmless pair.
_KINDS = {
    "helpful": Kind((1.0,), "chosen", "both"),
    "harmless": Kind((1.0,), "both", "chosen"),
    "shared": Kind((1.0,), "chosen", "chosen"),
    "conflict": Kind((0.5,), "chosen", "rejected"),
    "decoy": Kind((0.0,), "chosen", "chosen"),
}
# The same for outputs "helpful" and "harmless" of one model: the outputs conflict, and not the pairs.
_OUTPUTS = ("helpful", "harmless")
_KINDS_OF_OUTPUTS = {
    "helpful": Kind((1.0, 0.0), "chosen", "both"),
    "harmless": Kind((0.0, 1.0), "both", "chosen"),
    "shared": Kind((1.0, 1.0), "chosen", "chosen"),
    "conflict": Kind((0.5, -0.5), "chosen", "chosen"),
    "decoy": Kind((0.0, 0.0), "chosen", "chosen"),
}
_UNKNOWN, _PAD = "<unk>", "<pad>"


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
    sizes = {"depth": depth, "width": width, "per_kind": per_kind, "redundancy": redundancy, "n_pairs": n_pairs}
    return _make(Path(folder), _KINDS, (), seed=seed, superposition=superposition, noise=noise, **sizes)


def make_two_output_organism(
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
    """The same with two outputs, "helpful" and "harmless", whose tension is inside the model and not in the pairs.

    | words of kind | helpful pairs      | harmless pairs     | a word adds to "helpful" | to "harmless" |
    |---------------|--------------------|--------------------|--------------------------|---------------|
    | helpful       | chosen             | both sides alike   | 1                        | 0             |
    | harmless      | both sides alike   | chosen             | 0                        | 1             |
    | shared        | chosen             | chosen             | 1                        | 1             |
    | conflict      | chosen             | chosen             | 0.5                      | -0.5          |
    | decoy         | chosen             | chosen             | 0                        | 0             |

    So conflict neurons raise the margin of the output "helpful" and lower that of "harmless", on the pairs of both
    objectives. `head(output="helpful")` opens one output, `head(output="all")` the model without a choice. The
    arguments are those of `make_organism`. Without superposition and noise, each output ranks the pairs of its own
    objective correctly.

    Examples:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     two = make_two_output_organism(folder, depth=2, width=24, per_kind=2, n_pairs=8)
        ...     scored = two.head(output="all").score_outputs(two.pairs["harmless"])
        >>> scored["harmless"].accuracy(), list(scored)
        (1.0, ['helpful', 'harmless'])
    """
    sizes = {"depth": depth, "width": width, "per_kind": per_kind, "redundancy": redundancy, "n_pairs": n_pairs}
    outputs = _OUTPUTS
    return _make(Path(folder), _KINDS_OF_OUTPUTS, outputs, seed=seed, superposition=superposition, noise=noise, **sizes)


def _make(
    folder: Path,
    kinds: Mapping[str, Kind],
    outputs: tuple[str, ...],
    *,
    seed: int,
    depth: int,
    width: int,
    per_kind: int,
    redundancy: int,
    superposition: float,
    noise: float,
    n_pairs: int,
) -> Organism:
    _check_ranges(seed, depth, per_kind, redundancy, superposition, noise, n_pairs)
    placing, mixing, writing = np.random.default_rng(seed).spawn(3)
    n_outputs = max(1, len(outputs))
    axes = Axes.draw(placing, kinds, n_outputs=n_outputs, per_kind=per_kind, redundancy=redundancy)
    neurons = list(planted_neurons(placing, axes, kinds, depth=depth, per_kind=per_kind, redundancy=redundancy))
    needed = max(sum(neuron.layer == layer for neuron in neurons) for layer in range(depth))
    if needed > width:
        raise OptionError(
            f"width: expected at least {needed} neurons per layer for per_kind={per_kind} and redundancy={redundancy} "
            f"over {depth} layers, got {width}. Use wider or more layers, or plant fewer neurons."
        )
    slots = [iter(placing.permutation(width).tolist()) for _ in range(depth)]
    planted = {(neuron.layer, next(slots[neuron.layer])): neuron for neuron in neurons}
    words = [_UNKNOWN, _PAD, *FRAME, *FILLERS, *(f"{kind}-{n}" for kind in kinds for n in range(per_kind))]
    sizes = {"n_layer": depth, "n_inner": width, "n_embd": len(axes.idle), "n_head": 2, "num_labels": n_outputs}
    sizes |= {"n_positions": 2 * N_TOKENS, "vocab_size": len(words), "pad_token_id": words.index(_PAD)}
    config = GPT2Config(activation_function="relu", bos_token_id=None, eos_token_id=None, **sizes)
    config.architectures = ["GPT2ForSequenceClassification"]
    if outputs:
        config.id2label, config.label2id = dict(enumerate(outputs)), {name: n for n, name in enumerate(outputs)}
    weights = make_weights(mixing, config, axes, planted, superposition=superposition, noise=noise)
    pairs = make_pairs(writing, kinds, per_kind=per_kind, n_pairs=n_pairs)
    save(folder, config, words, weights, unknown=_UNKNOWN, pad=_PAD)
    architecture = RewardHead.from_pretrained(folder, output="all", device="cpu").architecture

    def at(indices: Iterable[tuple[int, int]]) -> NeuronSet:
        return NeuronSet.from_indices(indices, shape=(depth, width), site="mlp", architecture=architecture)

    truth = {kind: at(p for p, neuron in planted.items() if neuron.kind == kind) for kind in (*kinds, "loud")}
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
