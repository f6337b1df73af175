"""The table of docs/kinds.md: `python tests/programs/kinds.py --write`.

For every kind of reward model there is a replica, a tiny model with the names, shapes and config of the published ones,
and the kind's forward pass, written in plain torch from its description. The table shows the largest |difference|
between rmtension and that reference over 12 texts: rewards, all outputs, gradients against autograd, ablations against
plain hooks, permanent ablations, and what is left after saving and opening again. Returns 1 if a number exceeds its
limit, or if a kind that should open is refused.

To add a kind, add a `Replica` and list it in `all_replicas.ALL`; to count it, name it in `SHARES`.
"""

import argparse
import sys
import tempfile
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "tests" / "helpers"))

import tiny_models  # noqa: E402, F401 - sets what must be set before torch is imported

# isort: split
import torch  # noqa: E402
import transformers  # noqa: E402
from all_replicas import ALL, REFUSED  # noqa: E402
from kind_checks import COLUMNS, measure_in  # noqa: E402
from replicas import Replica  # noqa: E402

from rmtension import RewardHead  # noqa: E402
from rmtension.errors import RMTensionError  # noqa: E402

LIMITS = {torch.float32: 1e-4, torch.float64: 1e-5}
PAGE = ROOT / "docs" / "kinds.md"
BEGIN, END = "<!-- begin: python tests/programs/kinds.py --write -->", "<!-- end -->"


@dataclass(frozen=True)
class Share:
    """A kind of RewardBench's list: how many models, how many of them open, by which replicas, and what does not open.

    `opens` counts only if every replica named here is in `all_replicas.ALL` and passes.
    """

    kind: str
    n: int
    opens: int
    replicas: tuple[str, ...]
    note: str = ""


# `scripts/configs/eval_configs.yaml` of allenai/reward-bench at this commit, the newest that was available on the date.
COMMIT, DATE = "5822f16d", "28 November 2026"
SHARES = (
    Share(
        "log-ratio of two language models (DPO)",
        48,
        48,
        ("log-ratio of two language models", "log-likelihood, averaged"),
    ),
    Share("classifier with one output", 38, 38, ("classifier, one output",), "pickled files must be converted once"),
    Share(
        "linear value head",
        10,
        10,
        (
            *("linear head of an own class", "body under another name", "output projection, last token"),
            *("mean of rows", "body in another layout", "token appended to a chat"),
        ),
        "pickled files must be converted once; the tokenizer of internlm2 must be passed",
    ),
    Share(
        "several outputs, gated or weighted",
        9,
        9,
        (
            *("objectives, gated by the prompt", "quantiles, gated by the prompt", "quantiles, second version"),
            *("attributes with learned weights", "attributes with fixed weights", "distributions over bins"),
            "ten attributes",
        ),
        "LDL's head and pickled files must be converted once",
    ),
    Share("head of several layers", 6, 6, ("MLP v_head", "MLP score of a classifier", "MLP score")),
    Share("score head of Beaver", 4, 4, ("score head", "normalised score head (cost)")),
    Share(
        "logits of tokens",
        3,
        1,
        ("logits of two tokens",),
        "SteamSHP (2): an encoder-decoder that reads both responses together",
    ),
    Share("joint encoder of two responses", 2, 0, (), "a single text has no reward"),
    Share("encoder", 1, 1, ("encoder",)),
    Share("text model inside a vision-language model", 1, 1, ("vision-language model, text only",)),
)
assert sum(share.n for share in SHARES) == 122


def table(replicas: Sequence[Replica]) -> tuple[list[str], set[str]]:
    """The lines of the table, and the kinds that passed."""
    lines = [f"| kind | published models | {' | '.join(COLUMNS)} |", f"|---|---|{'---|' * len(COLUMNS)}"]
    reasons: dict[str, int] = {}
    passed = set()
    for replica in replicas:
        found = {dtype: measure_in(replica, dtype) for dtype in LIMITS}
        cells = []
        for column in COLUMNS:
            values = [by_column[column] for by_column in found.values()]
            if isinstance(values[0], str):
                cells.append(f"({reasons.setdefault(values[0], len(reasons) + 1)})")
            else:
                cells.append(" / ".join(f"{value:.1e}" for value in values))
        lines.append(f"| {replica.kind} | {replica.models} | {' | '.join(cells)} |")
        print(lines[-1], flush=True)
        numbers = [(dtype, v) for dtype, row in found.items() for v in row.values() if not isinstance(v, str)]
        if all(value <= LIMITS[dtype] for dtype, value in numbers):
            passed.add(replica.kind)
    return [*lines, "", *(f"({number}) {reason}  " for reason, number in reasons.items())], passed


def refusals(replicas: Sequence[Replica]) -> list[str]:
    """The lines of the table of kinds that are refused, with the first sentence of the error."""
    lines = ["| kind | models | error |", "|---|---|---|"]
    for replica in replicas:
        with tempfile.TemporaryDirectory() as temporary:
            folder = replica.make(Path(temporary) / "replica")
            try:
                RewardHead.from_pretrained(folder, **replica.open_options(folder))
                raise AssertionError(f"{replica.kind} should be refused")
            except RMTensionError as error:
                reason = str(error).replace(f"{folder}: ", "").partition("\n")[0]
        lines.append(f"| {replica.kind} | {replica.models} | {reason.partition('. ')[0].removesuffix('.')} |")
    return lines


def shares(passed: set[str]) -> list[str]:
    """The lines of the table of RewardBench's list."""
    lines = ["| kind | models in the list | open here | what does not |", "|---|---|---|---|"]
    total = 0
    for share in SHARES:
        missing = [name for name in share.replicas if name not in passed]
        opens = 0 if missing else share.opens
        total += opens
        note = share.note if not missing else f"no replica yet: {', '.join(missing)}"
        lines.append(f"| {share.kind} | {share.n} | {opens} | {note} |")
    return [*lines, f"| all | {sum(share.n for share in SHARES)} | {total} | |"]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="write the tables into docs/kinds.md")
    parser.add_argument("--kinds", nargs="+", metavar="KIND", help="only these kinds")
    options = parser.parse_args(arguments)
    warnings.simplefilter("ignore")
    transformers.utils.logging.set_verbosity_error()
    chosen = [replica for replica in ALL if not options.kinds or replica.kind in options.kinds]
    versions = ", ".join(f"{name} {version(name)}" for name in ("transformer-lens", "transformers", "torch"))
    lines, passed = table(chosen)
    if options.write:
        text = PAGE.read_text(encoding="utf-8")
        before, _, rest = text.partition(BEGIN)
        body = [
            BEGIN,
            "",
            f"Largest |difference|, float32 / float64; {len(chosen)} kinds; {versions}.",
            "",
            *lines,
            "",
            "### What is refused",
            "",
            *refusals(REFUSED),
            "",
            "### Share of RewardBench's list",
            "",
            f"The models of `eval_configs.yaml` of RewardBench (commit {COMMIT}, {DATE}), by kind. A model counts as "
            "open if the replica of its kind passes; the models themselves were not run.",
            "",
            *shares(passed),
            "",
            END,
        ]
        PAGE.write_text(before + "\n".join(body) + rest.partition(END)[2], encoding="utf-8")
    failed = [replica.kind for replica in chosen if replica.kind not in passed]
    print(f"{len(passed)} kinds within their limits; not: {failed}")
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
