"""Single neurons: scores on both objectives, effects of ablation, and top-activating texts."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from scipy import stats
from torch import Tensor

from rmtension._arguments import require_arguments
from rmtension._sites import neuron_activations
from rmtension.attribution._methods import METHODS
from rmtension.attribution._neuron_attribution import NeuronAttribution
from rmtension.attribution._neuron_pages_json import pages_to_json, read_pages
from rmtension.attribution._single_effects import single_neuron_effects
from rmtension.data._encoding import EncodedText
from rmtension.data._pairs import PreferencePairs
from rmtension.data._tokens import TokenBatch
from rmtension.errors import OptionError
from rmtension.interventions._ablation import check_set
from rmtension.models._reward_model import RewardModel
from rmtension.neurons._neuron_scores import NeuronScores, block_of, jackknife_stderr
from rmtension.neurons._neuron_set import NeuronSet
from rmtension.passes._pair_pass import run_pass
from rmtension.passes._pair_statistic import PairStatistic
from rmtension.passes._pass_record import PassRecord
from rmtension.store._files import write_text

# A scatter with more points than these is no clearer.
_MOST_POINTS = 5000
# How many tokens of a text an example shows, and how many of them come before the largest activation.
_SHOWN, _BEFORE = 160, 120
_BINS = 24
_PLACE = ("layer", "neuron")


@dataclass(frozen=True)
class ActiveText:
    """Part of one text as tokens, with a neuron's activation at each token.

    `first` is the index of the first token shown, of `n_tokens` in all; the response begins at token `response_start`.
    """

    tokens: tuple[str, ...]
    activations: tuple[float, ...]
    first: int
    response_start: int
    n_tokens: int


@dataclass(frozen=True)
class NeuronExample:
    """One pair on which a neuron is very active."""

    layer: int
    neuron: int
    objective: str
    pair: str
    chosen: ActiveText
    rejected: ActiveText


@dataclass(frozen=True, eq=False, repr=False)
class NeuronPages:
    """Scores, effects and top-activating texts of some neurons of one model; `examine` returns it.

    `table` has one row per examined neuron (`set` is "asked for") and one per random control neuron ("random"), with
    columns `<objective>_score`, `_score_stderr`, `_effect`, `_effect_low`, `_effect_high` and `_n`. `scatter` has the
    scores of all neurons, or of a random part of them. `distribution` is a histogram of each neuron's largest
    activation (in magnitude) per text. `examples` holds the pairs with the largest activation. `about` names the model,
    site, pairs and method; `about["sign"]` tells what a positive score means (`Provenance.sign`).

    Examples:
        >>> pages = examine(head, pairs, neurons, n_examples=1, progress=False)
        >>> pages
        NeuronPages(2 mlp neurons of gpt2-2x24-heads2x12-d24; 24 helpful, 24 harmless)
        >>> pages.to_frame()[["set", "layer", "helpful_effect"]].round(1)
                 set  layer  helpful_effect
        0  asked for      0            -1.0
        1  asked for      1            -1.0
        2     random      0            -0.6
        3     random      1             0.0
        >>> pages.save("neurons.json")
        >>> NeuronPages.load("neurons.json").neurons == pages.neurons
        True
    """

    table: pd.DataFrame
    scatter: pd.DataFrame
    distribution: pd.DataFrame
    examples: tuple[NeuronExample, ...]
    about: dict[str, Any]

    @property
    def objectives(self) -> tuple[str, ...]:
        """The names of the objectives, in order."""
        return tuple(self.about["pairs"])

    @property
    def neurons(self) -> list[tuple[int, int]]:
        """The examined neurons as (layer, neuron), without the random controls."""
        rows = self.table[self.table["set"] == "asked for"]
        return list(zip(rows["layer"].tolist(), rows["neuron"].tolist(), strict=True))

    def __repr__(self) -> str:
        pairs = ", ".join(f"{n} {name}" for name, n in self.about["pairs"].items())
        return f"NeuronPages({len(self.neurons)} {self.about['site']} neurons of {self.about['architecture']}; {pairs})"

    def to_frame(self) -> pd.DataFrame:
        """A copy of `table`."""
        return self.table.copy()

    def save(self, path: str | Path) -> None:
        """Write everything to one JSON file."""
        frames = {name: getattr(self, name) for name in ("table", "scatter", "distribution")}
        write_text(
            Path(path), pages_to_json(frames, [asdict(one) for one in self.examples], self.about), "neuron pages"
        )

    @classmethod
    def load(cls, path: str | Path) -> "NeuronPages":
        """Read a file that `save` wrote; raises `StorageError` for any other file."""
        frames, examples, about = read_pages(Path(path))
        made = (
            NeuronExample(**one | {side: ActiveText(**one[side]) for side in ("chosen", "rejected")})
            for one in examples
        )
        return cls(**frames, examples=tuple(made), about=about)


def examine(
    head: RewardModel,
    pairs: Mapping[str, PreferencePairs],
    neurons: NeuronSet,
    *,
    method: str = "gradient_x_activation",
    positions: str = "all",
    n_examples: int = 4,
    n_random: int | None = None,
    level: float = 0.95,
    seed: int = 0,
    progress: bool | None = None,
) -> NeuronPages:
    """Examine single neurons of a model on the pairs of each objective.

    Scores are those of `NeuronAttribution(head, method, positions=positions)`. An effect is the mean change of the
    margin when the neuron alone is set to zero at all tokens (`single_neuron_effects`); its interval is a jackknife
    over blocks of prompts with Student's t. The control is `n_random` other neurons, in the same proportion of layers
    (default: as many as `neurons`, or as many as are left). Examples are the pairs with the largest activation, in
    magnitude, at a token of `positions` in either response; the activation of an attention head is its norm.

    Cost per objective: a forward and a backward pass for the scores, a forward pass for activations, the cost of
    `single_neuron_effects` for all these neurons, and a pass over the few pairs that are shown.

    Raises `OptionError` for an empty set or an objective without pairs, `ProvenanceError` for a set of another model.

    Examples:
        >>> from rmtension.attribution import examine
        >>> pages = examine(head, pairs, neurons, n_examples=1)
        >>> len(pages.neurons), len(pages.table), len(pages.examples)
        (2, 4, 4)
    """
    require_arguments(
        "examine(head, pairs, neurons)", head=(head, RewardModel), pairs=(pairs, Mapping), neurons=(neurons, NeuronSet)
    )
    if not len(neurons):
        raise OptionError("neurons: expected a set with at least one neuron, got an empty set. Use NeuronScores.top.")
    if not pairs or not all(len(some) for some in pairs.values()):
        raise OptionError("pairs: expected a mapping of objectives to PreferencePairs with at least one pair each.")
    if n_examples < 0:
        raise OptionError(f"n_examples: expected 0 or more pairs per neuron and objective, got {n_examples}.")
    check_set(head, neurons)
    random = _control(neurons, len(neurons) if n_random is None else n_random, seed)
    table = _places(neurons, "asked for")
    if len(random):
        table = pd.concat([table, _places(random, "random")], ignore_index=True)
    places = pd.MultiIndex.from_frame(table[[*_PLACE]])
    scores: dict[str, pd.DataFrame] = {}
    counts: list[pd.DataFrame] = []
    examples: list[NeuronExample] = []
    for objective, some in pairs.items():
        attribution = NeuronAttribution(head, method, site=neurons.site, positions=positions)
        scores[objective] = found = attribution.score(some, progress=progress).to_frame().set_index(list(_PLACE))
        effects = single_neuron_effects(head, some, site=neurons.site, neurons=neurons | random, progress=progress)
        effect = effects.to_frame().set_index(list(_PLACE))["score"].loc[places].to_numpy()
        statistic = _LargestActivations(head, len(some), neurons, positions)
        largest, n_blocks = run_pass(head, some, statistic, progress=progress)
        half = _half_width(effects, n_blocks, level)[
            tuple(torch.from_numpy(table[[*_PLACE]].to_numpy().T.copy()))
        ].numpy()
        table[f"{objective}_score"] = found["score"].loc[places].to_numpy()
        table[f"{objective}_score_stderr"] = found["stderr"].loc[places].to_numpy()
        table[f"{objective}_effect"] = effect
        table[f"{objective}_effect_low"], table[f"{objective}_effect_high"] = effect - half, effect + half
        table[f"{objective}_n"] = len(some)
        counts.append(_counted(neurons, objective, largest))
        examples += _examples(head, some, neurons, objective, largest, n_examples)
    about = {
        "model": head.fingerprint,
        "architecture": head.architecture,
        "site": neurons.site,
        "positions": positions,
        "method": method,
        "sign": METHODS[method].sign,
        "level": level,
        "seed": seed,
        "n_neurons": neurons.mask.numel(),
        "pairs": {name: len(some) for name, some in pairs.items()},
        "digests": {name: some.digest for name, some in pairs.items()},
    }
    distribution = pd.concat(counts, ignore_index=True)
    return NeuronPages(table, _points(scores, neurons, seed), distribution, tuple(examples), about)


# -- parts -------------------------------------------------------------------------------------------------------------


def _control(neurons: NeuronSet, n: int, seed: int) -> NeuronSet:
    """About `n` other neurons, in each layer in proportion to `neurons`, or as many as the layer has left."""
    rng = np.random.default_rng(seed)
    mask = torch.zeros_like(neurons.mask)
    for layer, taken in enumerate(neurons.mask):
        free = (~taken).nonzero()[:, 0].numpy()
        wanted = min(len(free), round(n * int(taken.sum()) / len(neurons)))
        mask[layer, torch.from_numpy(rng.choice(free, size=wanted, replace=False))] = True
    return NeuronSet(mask, neurons.site, neurons.architecture)


def _places(neurons: NeuronSet, name: str) -> pd.DataFrame:
    frame = neurons.to_frame()
    frame.insert(0, "set", name)
    return frame


def _half_width(effects: NeuronScores, n_blocks: int, level: float) -> Float[Tensor, "layer neuron"]:
    """Half the width of the interval around each effect; NaN if the pairs have a single block."""
    factor = float(stats.t.ppf((1 + level) / 2, n_blocks - 1)) if n_blocks > 1 else float("nan")
    return factor * jackknife_stderr(effects.require_blocks())


def _points(scores: Mapping[str, pd.DataFrame], neurons: NeuronSet, seed: int) -> pd.DataFrame:
    """The scores of all neurons, or of the set and a random part of the others."""
    n = neurons.mask.numel()
    shown = neurons.mask.flatten().clone()
    shown[torch.from_numpy(np.random.default_rng(seed).permutation(n)[:_MOST_POINTS])] = True
    columns = {objective: found["score"] for objective, found in scores.items()}
    return pd.DataFrame(columns)[shown.numpy()].reset_index()


@torch.no_grad()
def _activations(head: RewardModel, batch: TokenBatch, neurons: NeuronSet) -> Float[Tensor, "row token wanted"]:
    """The activations of the set's neurons, in its order."""
    wanted = [columns.nonzero()[:, 0].tolist() for columns in neurons.mask]
    layers: dict[int, Tensor] = {}

    def visit(site: str, layer: int, channels: Tensor) -> None:
        if wanted[layer]:
            values = neuron_activations(channels, site, head.n_neurons(site))[..., wanted[layer]]
            layers[layer] = values.to(head.device, head.reward_dtype)

    head.observe(batch, [neurons.site], visit)
    return torch.cat([layers[layer] for layer in sorted(layers)], dim=2)


class _LargestActivations(PairStatistic[tuple[Tensor, int]]):
    """Each neuron's activation of largest magnitude in both texts of every pair.

    Computes these activations, [pair, 2, neuron], and the number of blocks of prompts in the pairs.
    """

    name = "activations"

    def __init__(self, head: RewardModel, n_pairs: int, neurons: NeuronSet, positions: str) -> None:
        self._head = head
        self._neurons = neurons
        self._positions = positions
        self._largest = torch.zeros(n_pairs, 2, len(neurons), dtype=head.reward_dtype)
        self._keys = torch.zeros(n_pairs, dtype=torch.long)

    @property
    def state(self) -> Mapping[str, Tensor]:
        return {"largest": self._largest, "keys": self._keys}

    def observe(self, batch: TokenBatch) -> list[Tensor]:
        of_texts = _activations(self._head, batch, self._neurons)[batch.rows]
        select = batch.select(self._positions)[..., None]
        peak = of_texts.abs().masked_fill(~select, -1).argmax(dim=1, keepdim=True)
        return [of_texts.gather(1, peak)[:, 0]]

    def update(self, batch: TokenBatch, observed: list[Tensor]) -> None:
        numbers = list(batch.indices[: batch.n_pairs])
        self._largest[numbers] = observed[0].cpu().view(2, batch.n_pairs, -1).transpose(0, 1)
        self._keys[numbers] = batch.keys[: batch.n_pairs].cpu()

    def compute(self, record: PassRecord) -> tuple[Tensor, int]:
        return self._largest, len(set(block_of(self._keys).tolist()))


def _counted(neurons: NeuronSet, objective: str, largest: Float[Tensor, "pair 2 wanted"]) -> pd.DataFrame:
    """Histograms of each neuron's largest activation per text, by side."""
    parts = []
    for (layer, neuron), column in zip(neurons, largest.double().unbind(2), strict=True):
        edges = np.histogram_bin_edges(column.numpy(), bins=_BINS)
        for side, values in zip(("chosen", "rejected"), column.T, strict=True):
            n = np.histogram(values.numpy(), bins=edges)[0]
            place = {"layer": layer, "neuron": neuron, "objective": objective, "side": side}
            parts.append(pd.DataFrame({**place, "low": edges[:-1], "high": edges[1:], "texts": n}))
    return pd.concat(parts, ignore_index=True)


def _examples(
    head: RewardModel,
    pairs: PreferencePairs,
    neurons: NeuronSet,
    objective: str,
    largest: Float[Tensor, "pair 2 wanted"],
    n: int,
) -> Iterable[NeuronExample]:
    """The `n` pairs with the largest activation of every neuron; each pair runs once, for all neurons that show it."""
    order = largest.abs().amax(dim=1).argsort(dim=0, descending=True, stable=True)[:n]
    shown: dict[int, list[int]] = {}
    for column in range(len(neurons)):
        for index in order[:, column].tolist():
            shown.setdefault(index, []).append(column)
    places = list(neurons)
    examples: dict[tuple[int, int], NeuronExample] = {}
    for index, columns in shown.items():
        encoded = head.encode(pairs[index : index + 1])
        texts = [*encoded.chosen, *encoded.rejected]
        batch = TokenBatch.from_texts(texts, (0, 0), pad_token_id=head.pad_token_id, device=head.device)
        activations = _activations(head, batch, neurons).cpu()
        pieces = [_pieces(head.tokenizer, text.ids) for text in texts]
        for column in columns:
            sides = [
                _active_text(text, piece, values[: len(text), column])
                for text, piece, values in zip(texts, pieces, activations, strict=True)
            ]
            layer, neuron = places[column]
            examples[column, index] = NeuronExample(layer, neuron, objective, pairs[index].id, sides[0], sides[1])
    return [examples[column, index] for column in range(len(neurons)) for index in order[:, column].tolist()]


def _pieces(tokenizer: Any, ids: Sequence[int]) -> list[str]:
    """The piece of text that each token adds; together they are the decoded text.

    A character that takes several tokens belongs to the last of them.
    """
    decode = partial(tokenizer.decode, clean_up_tokenization_spaces=False)
    pieces, done = [], ""
    for end in range(1, len(ids) + 1):
        text = decode(list(ids[:end]))
        if text.endswith("\N{REPLACEMENT CHARACTER}") and end < len(ids):
            pieces.append("")
            continue
        pieces.append(text[len(done) :])
        done = text
    return pieces


def _active_text(text: EncodedText, pieces: list[str], values: Float[Tensor, "token"]) -> ActiveText:
    peak = int(values.abs().argmax())
    first = max(0, min(peak - _BEFORE, len(text) - _SHOWN))
    shown = slice(first, first + _SHOWN)
    rounded = tuple(float(f"{value:.4g}") for value in values[shown].tolist())
    return ActiveText(tuple(pieces[shown]), rounded, first, text.response_start, len(text))
