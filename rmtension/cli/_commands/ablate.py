"""`rmtension ablate`: what ablating neurons changes in each group of pairs, compared with random sets."""

import importlib.util
from argparse import ArgumentParser, Namespace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rmtension.cli._commands.model_options import add_model_options, add_run_options, open_model, refuse_swapped
from rmtension.cli._commands.neuron_options import (
    add_replacement_options,
    add_top_options,
    check_top_options,
    make_replacement,
    neurons_of,
    read_neurons,
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
from rmtension.errors import OptionError, StorageError

if TYPE_CHECKING:
    import pandas as pd

ARGUMENTS = {"n_draws": "draws"}
HELP = "show what changes without some neurons"
_FIGURES = (".svg", ".pdf", ".png")
EXAMPLES = """examples:
  rmtension ablate ./my-reward-model pairs.csv --neurons scores.safetensors --fraction 0.05 --by category
  rmtension ablate ./my-reward-model pairs.csv --neurons scores.csv --by category --figure effects.svg --table all.csv
  rmtension ablate ./my-reward-model pairs.csv --neurons scores.safetensors --replacement mean --save ./ablated

PAIRS is read as `rmtension score` reads it. --neurons is a file of scores (of `rmtension attribute`), of which the top
set is ablated; a saved NeuronSet; or a CSV file with the columns layer and neuron. Prints the accuracy and the margin
of every group with and without the neurons, and the same change for random sets of as many neurons in every layer.
Intervals are bootstrap intervals over prompts, at 95%. --save writes the model without the neurons as a checkpoint.
"""


def add_options(parser: ArgumentParser) -> None:
    """The options of the command."""
    add_model_options(parser)
    parser.add_argument("pairs", metavar="PAIRS", type=Path, help="a file of pairs, as score reads it")
    parser.add_argument("--neurons", metavar="FILE", type=Path, required=True, help="the neurons; formats are below")
    add_pair_options(parser)
    add_group_options(parser, has_by=True)
    add_run_options(parser, nonfinite=None)
    add_top_options(parser)
    add_replacement_options(parser, default="zero")
    parser.add_argument("--draws", type=int, default=8, metavar="N", help="number of random sets; 0: no control (8)")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="seed of random sets and intervals (0)")
    parser.add_argument("--table", type=Path, metavar="FILE.csv", help="write the whole table there")
    parser.add_argument("--figure", type=Path, metavar="FILE.svg", help="draw the effects there: .svg, .pdf or .png")
    parser.add_argument("--save", type=Path, metavar="FOLDER", help="write the ablated model there")
    parser.add_argument("--overwrite", action="store_true", help="replace existing files")


def run(options: Namespace) -> Outcome:
    """Ablate the neurons, and write what is asked for."""
    refuse_swapped(options)
    check_top_options(options)
    _check_outputs(options)
    if options.draws < 0 or options.draws == 1:
        raise OptionError(
            f"--draws: expected at least 2 random sets, to measure their spread, or 0, got {options.draws}."
        )
    with quiet_libraries(options):
        return _run(options)


def _check_outputs(options: Namespace) -> None:
    for name in ("table", "figure", "save"):
        path: Path | None = getattr(options, name)
        if path is None:
            continue
        refuse_inputs(options, name, (path,))
        if path.exists() and not options.overwrite:
            raise StorageError(f"--{name}: {path} exists already. Name another, or pass --overwrite.")
        if path.is_dir() != (name == "save") and path.exists():
            raise StorageError(f"--{name}: {path} is {'a folder' if path.is_dir() else 'a file'}. Name another.")
    if options.figure is not None:
        if options.figure.suffix not in _FIGURES:
            raise OptionError(f"--figure: expected a name that ends in {', '.join(_FIGURES)}, got {options.figure}.")
        if importlib.util.find_spec("matplotlib") is None:
            raise OptionError("--figure: needs matplotlib. Install it with `pip install matplotlib`.")
    if options.save is not None and options.positions != "all":
        raise OptionError(
            f"--save, --positions: a saved model is ablated at all tokens, got {options.positions!r}. Leave out one."
        )


def _run(options: Namespace) -> Outcome:
    from rmtension.interventions._ablation_effects import ablation_effects
    from rmtension.plots._group_effects import effects_by_group
    from rmtension.store._files import write_text, written_whole

    read = read_neurons(options)
    pairs = read_group_pairs(options)
    head = open_model(options)
    neurons = neurons_of(read, head, options.neurons)
    replacement = make_replacement(options, head, pairs, neurons.site)
    table = ablation_effects(
        head,
        neurons,
        pairs,
        replacement,
        by=options.by,
        positions=options.positions,
        n_draws=options.draws,
        seed=options.seed,
        work=work_folder(options, "effects"),
        progress=not options.quiet,
    )
    if options.table is not None:
        write_text(options.table, table.to_csv(index=False), "table")
    if options.figure is not None:
        figure = effects_by_group(table)
        with written_whole(options.figure, "figure") as partial:
            figure.savefig(partial, format=options.figure.suffix[1:], bbox_inches="tight", dpi=200)
    if options.save is not None:
        head.with_ablation(neurons, replacement).save_pretrained(options.save)
    data = {
        "model": options.model,
        "pairs": options.pairs,
        "only": options.only,
        "by": options.by,
        "n_pairs": len(pairs),
        "n_neurons": len(neurons),
        "neurons": neurons.to_dict(),
        "replacement": options.replacement,
        "positions": options.positions,
        "draws": options.draws,
        "effects": table.drop(columns=["set", "size"]).astype(object).to_dict(orient="records"),
        "skipped": dict(pairs.skipped),
        "table": options.table,
        "figure": options.figure,
        "saved": options.save,
    }
    return Outcome(_text(data, table), data)


def _text(data: dict[str, Any], table: "pd.DataFrame") -> str:
    what = "zero" if data["replacement"] == "zero" else "their means"
    lines = [
        f"{data['n_neurons']:,} {data['neurons']['site']} neurons replaced by {what} at {data['positions']} tokens of "
        f"{data['n_pairs']:,} pairs" + _control(data["draws"], table),
        *skipped_lines(data["skipped"]),
    ]
    for quantity in ("accuracy", "margin"):
        lines += ["", quantity, _shown(table[table["quantity"] == quantity]).to_string(index=False)]
    written = [f"{name} to {data[name]}" for name in ("table", "figure") if data[name] is not None]
    written += [f"ablated model to {data['saved']}"] if data["saved"] is not None else []
    return "\n".join([*lines, *([f"\nWritten: {', '.join(written)}."] if written else [])])


def _control(n_draws: int, table: "pd.DataFrame") -> str:
    """The end of the first line: the random sets that the effects are compared with."""
    if not n_draws:
        return "."
    if table["random_effect"].isna().all():
        return ". Too few other neurons are left in their layers for random sets of that size, so there is no control."
    return f"; {n_draws} random sets of as many neurons per layer."


def _shown(rows: "pd.DataFrame") -> "pd.DataFrame":
    import pandas as pd

    def number(value: float) -> str:
        # So that rounding noise below 0 does not print as -0.000.
        return f"{0.0 if abs(value) < 5e-4 else value:.3f}"

    cells = {name: rows[name].map(number) for name in rows.columns if rows[name].dtype == float}
    columns = {
        "group": rows["group"],
        "n": rows["n"],
        "before": cells["before"],
        "after": cells["after"],
        "change [95% interval]": cells["effect"] + " [" + cells["low"] + ", " + cells["high"] + "]",
        "random sets ± sd": cells["random_effect"] + " ± " + cells["random_sd"],
    }
    if rows["random_effect"].isna().all():
        del columns["random sets ± sd"]
    return pd.DataFrame(columns)
