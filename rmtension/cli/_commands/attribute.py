"""`rmtension attribute`: score how much every neuron contributes to the margin between chosen and rejected."""

from argparse import ArgumentParser, Namespace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rmtension.cli._commands.model_options import add_model_options, add_run_options, open_model, refuse_swapped
from rmtension.cli._commands.neuron_options import (
    add_replacement_options,
    add_top_options,
    check_top_options,
    make_replacement,
    top_neurons,
    work_folder,
)
from rmtension.cli._commands.outcome import Outcome
from rmtension.cli._commands.pair_options import (
    add_group_options,
    add_pair_options,
    read_group_pairs,
    refuse_inputs,
    skipped_lines,
)
from rmtension.cli._commands.quiet import quiet_libraries
from rmtension.errors import StorageError

if TYPE_CHECKING:
    import pandas as pd

    from rmtension.neurons._neuron_scores import NeuronScores

HELP = "find the neurons that drive the margin"
_METHODS = (
    "attribution_patching",
    "gradient_x_activation",
    "mean_difference",
    "direct_effect",
    "integrated_gradients",
    "relp",
    "relp_fixed_attention",
)
_SITES = ("mlp", "mlp_gate", "attn_head", "expert")
_N_PRINTED = 10
EXAMPLES = """examples:
  rmtension attribute ./my-reward-model pairs.csv
  rmtension attribute ./my-reward-model pairs.csv --only category=safety --out safety.safetensors
  rmtension attribute ./my-reward-model pairs.jsonl.gz --method gradient_x_activation --fraction 0.01 --work scoring

PAIRS is read as `rmtension score` reads it. Prints the ten strongest neurons, with standard errors over pairs. --out
holds the score of every neuron; `rmtension ablate --neurons` and NeuronScores.load read it. The CSV file of the same
name holds the top set (--fraction or --k). "supports" means that the neuron raises the margin, according to its score.
--replacement is what attribution_patching, integrated_gradients and relp compare an activation with; pass the same one
to `rmtension ablate`. The mean takes one more forward pass. --site attn_head scores attention heads, --site expert the
neurons of a mixture of experts.
"""


def add_options(parser: ArgumentParser) -> None:
    """The options of the command."""
    add_model_options(parser)
    parser.add_argument("pairs", metavar="PAIRS", type=Path, help="a file of pairs, as score reads it")
    add_pair_options(parser)
    add_group_options(parser, has_by=False)
    add_run_options(parser, nonfinite="scores")
    parser.add_argument("--method", choices=_METHODS, default=_METHODS[0], help="default: %(default)s")
    add_replacement_options(parser, default="zero")
    parser.add_argument("--site", choices=_SITES, default="mlp", help="what counts as a neuron (default: mlp)")
    add_top_options(parser)
    parser.add_argument(
        "--out",
        type=Path,
        metavar="FILE.safetensors",
        default=Path("scores.safetensors"),
        help="write the scores there, and the top neurons to FILE.csv (default: %(default)s)",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace existing files")


def run(options: Namespace) -> Outcome:
    """Score the neurons and write the scores."""
    refuse_swapped(options)
    check_top_options(options)
    if options.out.suffix != ".safetensors":
        raise StorageError(f"--out: expected a name that ends in .safetensors, got {options.out}.")
    table = options.out.with_suffix(".csv")
    refuse_inputs(options, "out", (options.out, table))
    for path in (options.out, table):
        if path.exists() and not options.overwrite:
            raise StorageError(f"--out: {path} exists already. Name another file, or pass --overwrite.")
        if path.is_dir():
            raise StorageError(f"--out: {path} is a folder. Name a file.")
    with quiet_libraries(options):
        return _run(options, table)


def _run(options: Namespace, path: Path) -> Outcome:
    from rmtension.attribution._methods import METHODS
    from rmtension.attribution._neuron_attribution import NeuronAttribution
    from rmtension.store._files import write_text

    pairs = read_group_pairs(options)
    head = open_model(options)
    how = {"site": options.site, "positions": options.positions}
    if METHODS[options.method].needs_replacement:
        how["replacement"] = make_replacement(options, head, pairs, options.site)
    attribution = NeuronAttribution(head, options.method, **how)
    scores = attribution.score(pairs, work=work_folder(options, "scores"), progress=not options.quiet)
    ranked = _ranked(scores, options)
    scores.save(options.out)
    write_text(path, ranked.to_csv(index=False), "top neurons")
    data = {
        "model": options.model,
        "pairs": options.pairs,
        "only": options.only,
        "n": scores.n,
        "method": scores.provenance.label,
        "site": scores.provenance.site,
        "positions": scores.provenance.positions,
        "n_neurons": len(scores.to_frame()),
        "n_top": len(ranked),
        "top": ranked.head(_N_PRINTED).astype(object).to_dict(orient="records"),
        "skipped": dict(pairs.skipped),
        "out": options.out,
        "table": path,
        "provenance": scores.provenance.to_dict(),
    }
    return Outcome(_text(data, ranked), data)


def _ranked(scores: "NeuronScores", options: Namespace) -> "pd.DataFrame":
    """The top set, strongest first."""
    top = top_neurons(scores, options)
    frame = scores.to_frame()
    frame = frame[top.mask.flatten().numpy()]
    frame.insert(0, "site", scores.provenance.site)
    order = frame["score"].abs().sort_values(ascending=False, kind="stable").index
    return frame.loc[order]


def _text(data: dict[str, Any], ranked: "pd.DataFrame") -> str:
    from rmtension._sites import neuron_name

    shown = ranked.head(_N_PRINTED)
    columns = {
        "neuron": [
            neuron_name(data["site"], layer, neuron, data["provenance"]["architecture"])
            for layer, neuron in zip(shown["layer"], shown["neuron"], strict=True)
        ],
        "score": shown["score"].map("{:#.3g}".format).tolist(),
        "standard error": shown["stderr"].map("{:#.2g}".format).tolist(),
    }
    if "direction" in shown:
        columns["direction"] = shown["direction"].astype(str).tolist()
    import pandas as pd

    return "\n".join(
        [
            f"{data['n_neurons']:,} {data['site']} neurons scored by {data['method']} at {data['positions']} tokens of "
            f"{data['n']:,} pairs.",
            *skipped_lines(data["skipped"]),
            pd.DataFrame(columns).to_string(index=False),
            f"Scores written to {data['out']}, the {data['n_top']:,} top neurons to {data['table']}.",
        ]
    )
