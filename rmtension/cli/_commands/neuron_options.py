"""Options of the commands about neurons: what replaces activations, which neurons are the top ones, and their files."""

from argparse import ArgumentParser, Namespace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rmtension.errors import DataError, OptionError, StorageError

if TYPE_CHECKING:
    from rmtension.data._pairs import PreferencePairs
    from rmtension.interventions._replacement import Replacement
    from rmtension.neurons._neuron_scores import NeuronScores
    from rmtension.neurons._neuron_set import NeuronSet
    from rmtension.reward_head import RewardHead

DEFAULT_FRACTION = 0.05
POSITIONS = ("all", "response", "last")
RANKINGS = ("magnitude", "supports", "opposes")


def add_replacement_options(parser: ArgumentParser, *, default: str) -> None:
    """Add what replaces the activations, and where."""
    parser.add_argument(
        "--replacement",
        choices=("zero", "mean"),
        default=default,
        help="what replaces an activation: zero, or its mean over the pairs (default: %(default)s)",
    )
    parser.add_argument("--positions", choices=POSITIONS, default="all", help="the tokens that count (default: all)")
    parser.add_argument(
        "--work", type=Path, metavar="FOLDER", help="keep finished parts here, to resume after an interruption"
    )


def add_top_options(parser: ArgumentParser) -> None:
    """Add which of the scored neurons are the top set."""
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--fraction", type=float, metavar="F", help=f"share of all neurons (default: {DEFAULT_FRACTION})")
    size.add_argument("--k", type=int, metavar="N", help="or the number of neurons")
    parser.add_argument(
        "--rank-by",
        choices=RANKINGS,
        default="magnitude",
        help="the largest scores, or those that support or oppose the margin most (default: %(default)s)",
    )


def check_top_options(options: Namespace) -> None:
    """Raise `OptionError` for a size that no model has, before a model is opened."""
    if options.fraction is not None and not 0 < options.fraction <= 1:
        raise OptionError(f"--fraction: expected a number in (0, 1], got {options.fraction}.")
    if options.k is not None and options.k < 1:
        raise OptionError(f"--k: expected 1 neuron or more, got {options.k}.")


def top_neurons(scores: "NeuronScores", options: Namespace) -> "NeuronSet":
    """The top set that the options name."""
    fraction = DEFAULT_FRACTION if options.fraction is None and options.k is None else options.fraction
    return scores.top(fraction, k=options.k, rank_by=options.rank_by)


def make_replacement(options: Namespace, head: "RewardHead", pairs: "PreferencePairs", site: str) -> "Replacement":
    """`Zero()`, or `Mean` of the statistics of these pairs, which takes a forward pass over them."""
    from rmtension.interventions._replacements import Mean, Zero
    from rmtension.passes._activation_collector import ActivationCollector

    if options.replacement == "zero":
        return Zero()
    collector = ActivationCollector(head, site=site, positions=options.positions)
    return Mean(collector.collect(pairs, work=work_folder(options, "means"), progress=not options.quiet))


def work_folder(options: Namespace, step: str) -> Path | None:
    """The folder of one step in that of `--work`."""
    return None if options.work is None else options.work / step


def read_neurons(options: Namespace) -> "NeuronSet | list[tuple[str, int, int]]":
    """The neurons of `--neurons`: a set, the top of scores, or the rows (site, layer, neuron) of a CSV file."""
    from rmtension.neurons._neuron_scores import NeuronScores
    from rmtension.neurons._neuron_set import NeuronSet
    from rmtension.store._storage import kind_of

    path: Path = options.neurons
    is_table = path.suffix == ".csv"
    kind = "CSV" if is_table else kind_of(path)
    if kind == "NeuronScores":
        return top_neurons(NeuronScores.load(path), options)
    if options.fraction is not None or options.k is not None or options.rank_by != "magnitude":
        raise OptionError(
            f"--fraction, --k, --rank-by: these choose among scores, but {path} holds a set of neurons. Leave them out."
        )
    if is_table:
        return _read_table(path)
    if kind != "NeuronSet":
        raise StorageError(f"--neurons: {path}: expected NeuronScores or a NeuronSet, got {kind:.40}.")
    return NeuronSet.load(path)


def neurons_of(read: "NeuronSet | list[tuple[str, int, int]]", head: "RewardHead", path: Path) -> "NeuronSet":
    """The set of the neurons that were read, in this model."""
    from rmtension.neurons._neuron_set import NeuronSet

    if isinstance(read, NeuronSet):
        return read
    site = read[0][0]
    shape = (head.n_layers, head.n_neurons(site))
    try:
        indices = [(layer, neuron) for _, layer, neuron in read]
        return NeuronSet.from_indices(indices, shape=shape, site=site, architecture=head.architecture)
    except OptionError as error:
        raise DataError(f"--neurons: {path}: {str(error).removeprefix('indices: ')}") from error


def _read_table(path: Path) -> list[tuple[str, int, int]]:
    import pandas as pd

    from rmtension._sites import find_site

    try:
        table: Any = pd.read_csv(path)
    except (OSError, ValueError) as error:  # pandas' parser errors are ValueErrors
        raise DataError(f"--neurons: {path}: cannot be read as CSV ({error}).") from error
    if not {"layer", "neuron"} <= {*table.columns} or not len(table):
        raise DataError(
            f"--neurons: {path}: expected at least one row with the columns layer and neuron, got {len(table)} rows "
            f"with {list(map(str, table.columns))!s:.200}."
        )
    for name in ("layer", "neuron"):
        if not pd.api.types.is_integer_dtype(table[name]):
            raise DataError(f"--neurons: {path}: expected whole numbers in the column {name!r}.")
    sites = {str(site) for site in table["site"]} if "site" in table else {"mlp"}
    if len(sites) > 1:
        raise DataError(
            f"--neurons: {path}: expected neurons of one site, got {sorted(sites)}. Ablate them separately."
        )
    site = find_site(sites.pop()).name
    return [(site, layer, neuron) for layer, neuron in zip(table["layer"], table["neuron"].tolist(), strict=True)]
