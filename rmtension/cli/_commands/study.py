"""`rmtension study`: run the analyses of the paper on your own reward models and pairs."""

import time
from argparse import ArgumentParser, Namespace
from pathlib import Path
from typing import Any

from rmtension.cli._commands.model_options import read_output
from rmtension.cli._commands.outcome import Outcome
from rmtension.cli._commands.pair_options import add_pair_options, read_columns
from rmtension.cli._commands.quiet import quiet_libraries
from rmtension.errors import OptionError

# --base is the model that the others were trained from, not the base of an adapter. The objectives are names in
# messages about --outputs too.
ARGUMENTS = {"base": None, "helpful": None, "harmless": None, "mixed": None}
HELP = "study helpful, harmless and mixed reward models"
EXAMPLES = """examples:
  rmtension study study.yaml
  rmtension study study.yaml --analyses accuracy overlap --set fraction=0.05 --out less
  rmtension study --helpful ./helpful --harmless ./harmless --mixed ./mixed --base ./base --pairs pairs.jsonl.gz
  rmtension study --model ./rm --outputs helpful=helpfulness harmless=safety --pairs pairs.jsonl.gz

study.yaml (relative paths are relative to this file; only models and pairs are required):
  models:                            # folders of checkpoints, or hub names
    helpful: models/helpful
    harmless: models/harmless
    mixed: models/mixed
    base: models/base                # optional: the model they were trained from
  pairs:                             # not used in training: a file or a list of files, in the formats of `score`
    helpful: helpful.jsonl.gz
    harmless: [one.jsonl, two.jsonl]
  columns: {}                        # the column of a field, for example {prompt: question}
  chat: false                        # true: read plain prompts with the models' chat template
  rules: corrected                   # or paper
  analyses: [accuracy, overlap]      # default: all ten
  options: {fraction: 0.05}          # fields of StudyOptions
  out: study                         # default

Several seeds or bases: `models` as a list of such mappings, each with a `seed`, and a `name` for each base. One file
for both objectives: `pairs: both.jsonl`, whose rows have "objective": "helpful" or "harmless". `scoring_pairs` (like
pairs) are pairs to score neurons on; without them one half of the prompts scores neurons, and the other evaluates.
`on_invalid: skip` leaves out invalid rows.

Outputs of one model: {model: ./rm, output: helpfulness} in the place of a folder; an output is a name, a number, a list
of two for their difference, or a mapping of outputs to weights. With --outputs, the output for mixed is the sum of the
other two unless it is named: mixed=OUTPUT. Neurons are then scored by attribution patching.

Writes into --out: every pass over a model (runs), one CSV file per table, figures if matplotlib is installed,
report.md, and report.html, which needs no other file. After an interruption the same command resumes, and runs only
missing passes.
"""


def add_options(parser: ArgumentParser) -> None:
    """The options of the command."""
    parser.add_argument("config", metavar="CONFIG.yaml", type=Path, nargs="?", help="the study, as below; or use flags")
    for name in ("helpful", "harmless", "mixed", "base"):
        parser.add_argument(f"--{name}", metavar="MODEL", help=f"the {name} model")
    parser.add_argument("--model", metavar="MODEL", help="or one model with several outputs, for --outputs")
    parser.add_argument(
        "--outputs", nargs="+", metavar="NAME=OUTPUT", help="its outputs: helpful=OUTPUT harmless=OUTPUT [mixed=OUTPUT]"
    )
    parser.add_argument("--pairs", nargs="+", metavar="FILE", help='files of pairs with the field "objective"')
    parser.add_argument("--helpful-pairs", nargs="+", metavar="FILE", help="or files of helpful pairs")
    parser.add_argument("--harmless-pairs", nargs="+", metavar="FILE", help="and files of harmless pairs")
    add_pair_options(parser)
    parser.add_argument("--on-invalid", choices=("raise", "skip"), help="invalid rows: stop, or skip and count")
    parser.add_argument("--rules", help="corrected (default), or paper for the published rules")
    parser.add_argument("--analyses", nargs="+", metavar="NAME", help="analyses to run (default: all ten)")
    parser.add_argument("--set", nargs="+", metavar="NAME=VALUE", default=[], help="fields of StudyOptions")
    parser.add_argument(
        "--neurons", type=int, default=16, metavar="N", help="neurons of the mixed model with a page (default: 16)"
    )
    parser.add_argument("--out", help="output folder (default: study)")


def run(options: Namespace) -> Outcome:
    """Read the configuration, run the study, and write the results."""
    with quiet_libraries(options):
        from rmtension.cli._commands.studies import study_outcome
        from rmtension.report._every_format import write_report
        from rmtension.report._neurons_of_study import study_neurons

        config = _config(options)
        if options.neurons < 0:
            raise OptionError(f"--neurons: expected 0 or more, got {options.neurons}.")
        start = time.monotonic()
        study = config.study()
        result = study.run(folder=config.out, progress=not options.quiet)
        result.save(config.out, overwrite=True)
        pages = study_neurons(study, n=options.neurons, progress=not options.quiet) if options.neurons else None
        write_report(result, config.out, neurons=pages)
    took = {"study": time.monotonic() - start}
    return study_outcome(result, config.out, took, n_run=study.n_run, n_read=study.n_read)


def _config(options: Namespace) -> Any:
    from rmtension.data._row_reader import RowReader
    from rmtension.study._config import make_config, read_options, read_yaml

    values = _from_flags(options)
    RowReader(values.get("columns"))
    if options.config is None:
        if "models" not in values:
            raise OptionError(
                "study: expected a YAML file, or --helpful, --harmless and --mixed, or --model and --outputs. See "
                "--help."
            )
        return make_config(values, folder=Path(), where="command line")
    written = read_yaml(options.config)
    for name, flags in (("models", "--helpful, --harmless, --mixed, --base, --model, --outputs"), ("pairs", "--pairs")):
        if name in values:
            raise OptionError(
                f"{flags}: not with a file ({options.config}). Name {name} in the file, or pass flags only."
            )
    if "options" in values and isinstance(written.get("options"), dict):
        values["options"] = written["options"] | values["options"]
    if "out" in values:
        # Paths of the command line are relative to the current folder.
        values["out"] = str(Path(values["out"]).absolute())
    # If the file alone does not have the mistake, the command line has it.
    if _mistake(written | values) != _mistake(written):
        read_options(written | values, "command line")
    return make_config(written | values, folder=options.config.parent, where=str(options.config))


def _mistake(values: dict[str, Any]) -> str:
    """The error message of invalid options; "" for valid ones."""
    from rmtension.study._config import read_options

    try:
        read_options(values, "")
    except OptionError as error:
        return str(error)
    return ""


def _from_flags(options: Namespace) -> dict[str, Any]:
    """The values of the flags, in the form of the YAML file."""
    models = {name: getattr(options, name) for name in ("helpful", "harmless", "mixed", "base")}
    models = {name: model for name, model in models.items() if model is not None}
    if options.model is not None or options.outputs is not None:
        models |= _outputs(options, models)
    named = {"helpful": options.helpful_pairs, "harmless": options.harmless_pairs}
    named = {name: files for name, files in named.items() if files is not None}
    if named and options.pairs is not None:
        raise OptionError("--pairs: expected --pairs, or --helpful-pairs and --harmless-pairs, got both.")
    values = {
        "models": models,
        "pairs": named or options.pairs,
        "columns": read_columns(options.columns),
        "chat": options.chat,
        "on_invalid": options.on_invalid,
        "rules": options.rules,
        "analyses": options.analyses,
        "options": dict(map(_setting, options.set)),
        "out": options.out,
    }
    return {name: value for name, value in values.items() if value}


def _outputs(options: Namespace, models: dict[str, Any]) -> dict[str, Any]:
    """The models of a family that are outputs of --model."""
    named = [name for name in ("helpful", "harmless", "mixed") if name in models]
    if named:
        raise OptionError(f"--{named[0]}: expected --model with --outputs, or three models, got both.")
    if options.model is None or options.outputs is None:
        missing, given = ("--model", "--outputs") if options.model is None else ("--outputs", "--model")
        raise OptionError(
            f"{given}: expected {missing} too, for example --model ./rm --outputs helpful=helpfulness harmless=safety."
        )
    outputs: dict[str, Any] = {}
    for text in options.outputs:
        name, _, output = text.partition("=")
        if name not in ("helpful", "harmless", "mixed") or not output or name in outputs:
            raise OptionError(
                f"--outputs: expected helpful=OUTPUT, harmless=OUTPUT and optionally mixed=OUTPUT, got {text[:80]!r}."
            )
        outputs[name] = read_output(output)
    for name in ("helpful", "harmless"):
        if name not in outputs:
            raise OptionError(f"--outputs: no output is named for {name!r}. Add it, or pass three models.")
    outputs.setdefault("mixed", {outputs["helpful"]: 1.0, outputs["harmless"]: 1.0})
    return {name: {"model": options.model, "output": output} for name, output in outputs.items()}


def _setting(text: str) -> tuple[str, Any]:
    """Divide NAME=VALUE; the value is read as YAML."""
    import yaml

    name, equals, value = text.partition("=")
    try:
        if equals:
            return name, yaml.safe_load(value)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise OptionError(f"--set: {text[:80]!r} is not valid YAML ({' '.join(str(error).split())}).") from error
    raise OptionError(f"--set: expected NAME=VALUE, for example fraction=0.05, got {text[:80]!r}.")
