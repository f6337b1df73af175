"""Options of the commands that open one reward model."""

from argparse import ArgumentParser, Namespace
from pathlib import Path
from typing import TYPE_CHECKING

from rmtension.errors import OptionError

if TYPE_CHECKING:
    from rmtension.reward_head import RewardHead

_DTYPES = ("float32", "float64", "bfloat16", "float16")


def add_model_options(parser: ArgumentParser) -> None:
    """Add the model and the options that open it."""
    parser.add_argument("model", metavar="MODEL", help="folder of a reward model's checkpoint, or its name on the hub")
    parser.add_argument("--device", help="for example cpu or cuda:1 (default: the first GPU, or the CPU)")
    parser.add_argument(
        "--dtype", choices=_DTYPES, default="float32", help="dtype of the weights (default: %(default)s)"
    )
    parser.add_argument(
        "--weight-memory",
        type=float,
        metavar="GB",
        help="for a model larger than memory: gigabytes of weights that may stay in it; others stay in the files",
    )
    parser.add_argument("--max-length", type=int, metavar="N", help="tokens per text (default: the model's context)")
    parser.add_argument("--revision", help="hub revision (branch, tag or commit)")
    parser.add_argument("--base", metavar="MODEL", help="for an adapter: the model it was trained on")
    parser.add_argument(
        "--output",
        action="append",
        metavar="OUTPUT",
        help="number or name of the output that is the reward; given twice, the reward is the first minus the second",
    )
    parser.add_argument("--pad-token", metavar="TOKEN", help="pad token, if the checkpoint names none")
    parser.add_argument(
        "--two-segments", action="store_true", help="encode prompt and response as two segments, as some encoders need"
    )
    parser.add_argument(
        "--reference", metavar="MODEL", help="MODEL was trained by DPO from this reference: score log-ratios"
    )
    parser.add_argument(
        "--log-likelihood", action="store_true", help="score the log-likelihood of responses under a language model"
    )
    parser.add_argument("--beta", type=float, help="factor of --reference or --log-likelihood (default: 1)")
    parser.add_argument("--average", action="store_true", help="divide the log-ratio by the number of response tokens")
    parser.add_argument(
        "--marker", metavar="TOKEN", help="MODEL scores steps, which end with this token; choose --output, such as min"
    )


def add_run_options(parser: ArgumentParser, *, nonfinite: str | None) -> None:
    """Add what happens to responses that do not fit and, if the command skips such pairs, to `nonfinite` numbers."""
    parser.add_argument("--truncate-response", action="store_true", help="cut responses longer than the context")
    if nonfinite is not None:
        parser.add_argument(
            "--on-nonfinite",
            choices=("raise", "skip"),
            default="raise",
            help=f"NaN or infinite {nonfinite}: stop, or skip and count",
        )


def refuse_swapped(options: Namespace) -> None:
    """Raise `OptionError` if the file of pairs is named before the model."""
    if Path(options.model).is_file() and not options.pairs.is_file():
        raise OptionError(
            f"MODEL, PAIRS: they are swapped: {options.model} is a file, but a model is a folder or a hub name. Run "
            f"`rmtension {options.command} {options.pairs} {options.model}`."
        )


def open_model(options: Namespace) -> "RewardHead":
    """Open the head that the options name; errors are those of `RewardHead.from_pretrained`."""
    if Path(options.model).is_file():
        pairs = "the second argument" if options.flags["pairs"] == "PAIRS" else "--pairs"
        raise OptionError(
            f"MODEL: {options.model} is a file; MODEL is the folder of a checkpoint, or a hub name. A file of pairs "
            f"goes to {pairs}: `{_example(options)}`."
        )
    import torch

    from rmtension.reward_head import RewardHead

    return RewardHead.from_pretrained(
        options.model,
        head=_head(options),
        two_segments=options.two_segments,
        output=_output(options.output),
        max_length=options.max_length,
        # Some commands do not have these options.
        truncate_response=getattr(options, "truncate_response", False),
        on_nonfinite=getattr(options, "on_nonfinite", "raise"),
        dtype=getattr(torch, options.dtype),
        device=options.device,
        weight_memory=None if options.weight_memory is None else int(1e9 * options.weight_memory),
        base=options.base,
        revision=options.revision,
        pad_token=options.pad_token,
    )


def _head(options: Namespace) -> object:
    """The argument `head` of `from_pretrained`: a head that reads several tokens, or None for the checkpoint's own."""
    from rmtension.heads import LogRatioHead, ProcessHead

    kinds = {"--reference": options.reference, "--log-likelihood": options.log_likelihood, "--marker": options.marker}
    given = [flag for flag, value in kinds.items() if value]
    if len(given) > 1:
        raise OptionError(f"{given[1]}: expected one of {list(kinds)}, got {' and '.join(given)}. Leave one out.")
    if given in ([], ["--marker"]):
        for flag, value in (("--beta", options.beta), ("--average", options.average or None)):
            if value is not None:
                raise OptionError(f"{flag}: it belongs to --reference or --log-likelihood. Pass one of them too.")
        return ProcessHead(options.marker) if given else None
    beta = 1.0 if options.beta is None else options.beta
    return LogRatioHead(options.reference, beta=beta, average=options.average)


def _example(options: Namespace) -> str:
    flag = "" if options.flags["pairs"] == "PAIRS" else "--pairs "
    return f"rmtension {options.command} FOLDER {flag}{options.model}"


def _output(given: list[str] | None) -> object:
    """The argument `output` of `from_pretrained`: one output or a pair, with numbers as int."""
    outputs = list(map(read_output, given or []))
    return outputs[0] if len(outputs) == 1 else outputs or None


def read_output(text: str) -> int | str:
    """An output as a user writes it: its number, or its name."""
    return int(text) if text.isdecimal() else text
