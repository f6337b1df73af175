"""`rmtension score`: compute the rewards of preference pairs, and the accuracy of the ranking."""

from argparse import ArgumentParser, Namespace
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rmtension.cli._commands.model_options import add_model_options, add_run_options, open_model, refuse_swapped
from rmtension.cli._commands.outcome import Outcome
from rmtension.cli._commands.pair_options import add_group_options, add_pair_options, read_group_pairs, skipped_lines
from rmtension.cli._commands.quiet import quiet_libraries
from rmtension.errors import DataError, StorageError

if TYPE_CHECKING:
    from rmtension.evaluation._pair_rewards import PairRewards

HELP = "score preference pairs with a reward model"
EXAMPLES = """examples:
  rmtension score ./my-reward-model pairs.jsonl.gz
  rmtension score ./my-reward-model pairs.csv --by category                          accuracy and margin per category
  rmtension score ./my-reward-model pairs.jsonl --out rewards.jsonl --work scoring   resumes after an interruption
  rmtension score ./my-chat-model pairs.csv --chat --columns prompt=question chosen=better rejected=worse
  rmtension score my-name/my-reward-model pairs.jsonl --dtype bfloat16 --device cuda --json > summary.json

PAIRS is a file of JSON lines, a JSON array, CSV, TSV or Parquet; plain, .gz or .zst. A row has "prompt", "chosen",
"rejected" and optionally "objective", "subset", "id", "item", "tools", "system"; --columns maps columns with other
names. Other columns with short texts are labels, by which --by groups the pairs. Prompts and responses are texts, or
messages for the model's chat template; --chat turns plain prompts into messages. Without "prompt", chosen and rejected
are whole conversations, or whole transcripts of "\\n\\nHuman:" and "\\n\\nAssistant:" turns. --out has one line per
pair: id, reward_chosen, reward_rejected, margin.
"""


def add_options(parser: ArgumentParser) -> None:
    """The options of the command."""
    add_model_options(parser)
    parser.add_argument("pairs", metavar="PAIRS", type=Path, help="a file of pairs; formats are below")
    add_pair_options(parser)
    add_group_options(parser, has_by=True)
    parser.add_argument("--out", type=Path, metavar="FILE", help="write the rewards there; compressed if .gz")
    parser.add_argument("--overwrite", action="store_true", help="replace an existing file of --out")
    add_run_options(parser, nonfinite="rewards")
    parser.add_argument(
        "--work", type=Path, metavar="FOLDER", help="keep finished parts here, to resume after an interruption"
    )


def run(options: Namespace) -> Outcome:
    """Score the pairs and write the rewards."""
    refuse_swapped(options)
    # Checked before the work starts, which can take an hour.
    if options.out is not None and options.out.exists() and not options.overwrite:
        raise StorageError(f"--out: {options.out} exists already. Name another file, or pass --overwrite.")
    if options.out is not None and options.out.is_dir():
        raise StorageError(f"--out: {options.out} is a folder. Name a file in it.")
    with quiet_libraries(options):
        return _run(options)


def _run(options: Namespace) -> Outcome:
    from rmtension.store._files import write_json_lines

    pairs = read_group_pairs(options)
    scored = open_model(options).score_pairs(pairs, work=options.work, progress=not options.quiet)
    if not len(scored):
        raise DataError(
            f"{options.pairs}: all {len(pairs)} pairs produced NaN or infinite rewards. Run "
            f"`rmtension check {options.model}`."
        )
    if options.out is not None:
        write_json_lines(options.out, _lines(scored), "rewards")
    data = _data(options, pairs.skipped, scored)
    return Outcome(_text(options, data), data)


def _lines(scored: "PairRewards") -> list[dict[str, Any]]:
    columns = (scored.chosen.tolist(), scored.rejected.tolist(), scored.margin.tolist())
    return [
        {"id": pair.id, "reward_chosen": chosen, "reward_rejected": rejected, "margin": margin}
        for pair, chosen, rejected, margin in zip(scored.pairs, *columns, strict=True)
    ]


def _judged(scored: "PairRewards") -> dict[str, Any]:
    from rmtension.evaluation._metrics import accuracy, mean_margin

    return {"n": len(scored), "accuracy": accuracy(scored).to_dict(), "margin": mean_margin(scored).to_dict()}


def _data(options: Namespace, skipped: Mapping[str, int], scored: "PairRewards") -> dict[str, Any]:
    from rmtension.data._groups import group_rows

    groups = {} if options.by is None else group_rows(scored.pairs, options.by)
    return {
        "model": options.model,
        "pairs": options.pairs,
        **_judged(scored),
        "by": options.by,
        "by_objective": {name: _judged(scored.filter(objective=name)) for name in scored.pairs.objectives},
        "by_group": {name: _judged(scored.take(rows)) for name, rows in groups.items()},
        "skipped": dict(skipped),
        "not_finite": scored.provenance.skipped,
        "n_ties": scored.pairs.n_ties,
        "n_prompts_cut": scored.n_prompts_cut,
        "n_responses_cut": scored.n_responses_cut,
        "out": options.out,
        "provenance": scored.provenance.to_dict(),
    }


def _text(options: Namespace, data: Mapping[str, Any]) -> str:
    import pandas as pd

    from rmtension.evaluation._intervals import Estimate

    lost = len(data["not_finite"])
    counts = [f"{data['n']} pair{'' if data['n'] == 1 else 's'} scored"]
    counts += [f"{sum(data['skipped'].values())} skipped"] if data["skipped"] else []
    counts += [f"{lost} without finite rewards"] if lost else []
    counts += [f"{data['n_ties']} with identical responses"] if data["n_ties"] else []
    counts += [f"{data['n_prompts_cut']} prompts cut"] if data["n_prompts_cut"] else []
    counts += [f"{data['n_responses_cut']} responses cut"] if data["n_responses_cut"] else []
    groups = data["by_objective"] if data["by"] is None else data["by_group"]
    rows = [
        {
            "pairs": name,
            "n": part["n"],
            "accuracy [95% interval]": str(Estimate(**part["accuracy"])),
            "mean margin [95% interval]": str(Estimate(**part["margin"])),
        }
        for name, part in [("all", data), *groups.items()]
    ]
    lines = [", ".join(counts) + ".", *skipped_lines(data["skipped"]), pd.DataFrame(rows).to_string(index=False)]
    return "\n".join(lines if options.out is None else [*lines, f"Rewards written to {options.out}."])
