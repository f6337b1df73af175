"""Whether random, cut and changed inputs end in a documented error or a right result.

    python tests/programs/fuzz.py --n 50000 --seed 0 [--surface jsonl ...] [--keep FOLDER]

Four surfaces get `--n` inputs each: the JSON-lines reader, the loaders of all ten kinds of result, `NeuronSet` (made
from indices, and drawn from), and options (`StudyOptions`, the command line). An input fails if it raises an error from
outside this library, takes longer than five seconds, or is read as a value that is not the same after it is written and
read again. Memory is bounded per surface. Inputs that fail are written to `--keep`. `tests/test_fuzz.py` runs the
inputs that failed before, and a few of each surface.
"""

import argparse
import gzip
import io
import json
import random
import resource
import struct
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import torch
from documented import limited

from rmtension import NeuronSet, PreferencePairs
from rmtension.errors import RMTensionError
from rmtension.study._options import StudyOptions

sys.path.append(str(Path(__file__).parents[1] / "helpers"))


SECONDS = 5
WORDS = [b'"prompt"', b'"chosen"', b'"rejected"', b'"item"', b'"role"', b'"content"', b"null", b"true", b"NaN"]
WORDS += [b"1e999", b"-1", b"9" * 400, b"[", b"]", b"{", b"}", b"[[[[[[[[", b'{"a":' * 50, b",", b":", b'"', b"\\ud800"]
WORDS += [
    b"\\u0000",
    b"\x00",
    b"\xff",
    b"\xed\xa0\x80",
    b"\xef\xbb\xbf",
    b"\n",
    b"\r\n",
    b"\x1f\x8b",
    b"\xe2\x80\xa8",
    b" " * 40,
]
LINES = [
    b'{"prompt": "\\n\\nHuman: hi\\n\\nAssistant:", "chosen": " yes", "rejected": " no", "objective": "helpful"}',
    b'{"prompt": [{"role": "user", "content": "hi"}], "chosen": "a", "rejected": "b", "id": 7, "item": "x"}',
    b'{"chosen": "\\n\\nHuman: q\\n\\nAssistant: a", "rejected": "\\n\\nHuman: q\\n\\nAssistant: b"}',
    b'{"chosen": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}], '
    b'"rejected": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "b"}]}',
]


class TooLong(BaseException):  # not an Exception, so that no reader takes it for an error of a file
    """An input takes longer than the limit."""


# -- making inputs --------------------------------------------------------------------------------------------------


def changed(draw: random.Random, content: bytes) -> bytes:
    """The content after one to four random changes."""
    for _ in range(draw.randint(1, 4)):
        place = draw.randint(0, len(content))
        end = min(len(content), place + draw.choice([1, 1, 2, 8, 64]))
        kind = draw.randrange(7)
        if kind == 0:
            content = content[:place]
        elif kind == 1:
            content = content[:place] + content[end:]
        elif kind == 2:
            content = content[:place] + draw.choice(WORDS) + content[end:]
        elif kind == 3:
            content = content[:place] + draw.choice(WORDS) + content[place:]
        elif kind == 4:
            content = content[:place] + content[place:end] * draw.randint(2, 20) + content[end:]
        elif kind == 5:
            content = content[:place] + draw.randbytes(end - place) + content[end:]
        elif content[place:end]:
            content = content[:place] + bytes([content[place] ^ (1 << draw.randrange(8))]) + content[place + 1 :]
    return content


def any_value(draw: random.Random, depth: int = 0) -> Any:
    """A random JSON value."""
    plain = [None, True, False, 0, 1, -1, 2**63, -(2**63), 10**30, 0.5, -0.0, 1e308, float("nan"), float("inf"), ""]
    plain += ["mlp", "all", "absolute", "exact", "\x00", "\ud800", "x" * 300, "../../etc/passwd", "<script>", "1"]
    if depth < 3 and draw.random() < 0.3:
        parts = [any_value(draw, depth + 1) for _ in range(draw.randint(0, 3))]
        return parts if draw.random() < 0.5 else {str(any_value(draw, 3)): part for part in parts}
    return draw.choice(plain)


def changed_value(draw: random.Random, value: Any) -> Any:
    """The value with one of its parts replaced, left out or added."""
    if isinstance(value, dict) and value and draw.random() < 0.9:
        key = draw.choice(list(value))
        if draw.random() < 0.15:
            return {name: part for name, part in value.items() if name != key}
        return {**value, key: changed_value(draw, value[key])}
    if isinstance(value, list) and value and draw.random() < 0.7:
        place = draw.randrange(len(value))
        return [*value[:place], changed_value(draw, value[place]), *value[place + draw.randint(0, 1) :]]
    return any_value(draw)


def changed_result(draw: random.Random, content: bytes) -> bytes:
    """A safetensors file with changed bytes, a changed table of tensors, or changed metadata of this library."""
    if draw.random() < 0.3:
        return changed(draw, content)
    size = struct.unpack("<Q", content[:8])[0]
    header, rest = json.loads(content[8 : 8 + size]), content[8 + size :]
    for _ in range(draw.randint(1, 2)):
        if draw.random() < 0.6:
            ours = changed_value(draw, json.loads(header["__metadata__"]["rmtension"]))
            text = json.dumps(ours)
            header["__metadata__"]["rmtension"] = text if draw.random() < 0.9 else text[: draw.randrange(len(text) + 1)]
        else:
            header = changed_value(draw, header)
        metadata = header.get("__metadata__") if isinstance(header, dict) else None
        if not isinstance(metadata, dict) or not _is_object(metadata.get("rmtension")):
            break
    text = json.dumps(header).encode("utf-8", "surrogatepass")
    return struct.pack("<Q", draw.choice([len(text)] * 8 + [0, 2**40, 2**63])) + text + rest


def _is_object(text: object) -> bool:
    try:
        return isinstance(text, str) and isinstance(json.loads(text), dict)
    except ValueError:
        return False


# -- surfaces -------------------------------------------------------------------------------------------------------


class Jsonl:
    """The JSON-lines reader, plain and gzip'd, refusing and skipping."""

    def __init__(self, folder: Path) -> None:
        self.path, self.again = folder / "pairs.jsonl", folder / "again.jsonl"

    def make(self, draw: random.Random) -> bytes:
        lines = draw.choices(LINES, k=draw.randint(1, 3))
        if draw.random() < 0.4:
            lines[0] = json.dumps(changed_value(draw, json.loads(lines[0]))).encode()
        content = b"\n".join(lines)
        if draw.random() < 0.6:
            content = changed(draw, content) if draw.random() < 0.9 else draw.randbytes(draw.randint(0, 200))
        if draw.random() < 0.1:
            content = gzip.compress(content, 1)
            content = changed(draw, content) if draw.random() < 0.7 else content
        return content

    def read(self, content: bytes) -> None:
        self.path.write_bytes(content)
        valid = PreferencePairs.from_jsonl(self.path, on_invalid="skip")
        self.require_itself(valid)
        pairs = PreferencePairs.from_jsonl(self.path)
        assert pairs == valid
        assert list(PreferencePairs.iter_jsonl(self.path)) == list(pairs)

    def require_itself(self, pairs: PreferencePairs) -> None:
        pairs.to_jsonl(self.again)
        assert PreferencePairs.from_jsonl(self.again) == pairs


class Results:
    """The loaders of every kind of result."""

    def __init__(self, folder: Path) -> None:
        from all_results import results

        self.path = folder / "result.safetensors"
        self.seeds = {}
        for result in results():
            result.save(self.path)
            self.seeds[type(result).__name__] = (type(result), self.path.read_bytes())

    def make(self, draw: random.Random) -> bytes:
        name = draw.choice(list(self.seeds))
        return name.encode() + b"\n" + changed_result(draw, self.seeds[name][1])

    def read(self, content: bytes) -> None:
        name, _, file = content.partition(b"\n")
        kind = self.seeds[name.decode()][0]
        self.path.write_bytes(file)
        loaded = kind.load(self.path)
        assert repr(loaded)
        loaded.save(self.path)
        first = self.path.read_bytes()
        kind.load(self.path).save(self.path)
        assert self.path.read_bytes() == first


class Neurons:
    """Sets of neurons from random indices, and random draws from them."""

    def __init__(self, folder: Path) -> None:
        pass

    def make(self, draw: random.Random) -> bytes:
        call = {
            "indices": [[draw.randrange(4), draw.randrange(6)] for _ in range(draw.randint(0, 5))],
            "shape": [draw.choice([1, 3, 4]), draw.choice([1, 6])],
            "site": "mlp",
            "architecture": "toy",
            "draw": {"seed": draw.choice([0, 7]), "match": draw.choice(["layer", "model"])},
            "k": draw.randint(0, 4),
        }
        return json.dumps(changed_value(draw, call) if draw.random() < 0.9 else call).encode()

    def read(self, content: bytes) -> None:
        call = json.loads(content)
        if not isinstance(call, dict):
            return
        known = {"indices": [], "shape": [3, 6], "site": "mlp", "architecture": "toy", "draw": {}, "k": 1} | call
        shape = tuple(known["shape"]) if isinstance(known["shape"], list) else known["shape"]
        neurons = NeuronSet.from_indices(
            known["indices"], shape=shape, site=known["site"], architecture=known["architecture"]
        )
        assert len(neurons) == len({(int(a), int(b)) for a, b in known["indices"]})
        assert not neurons & ~neurons
        assert len(neurons | ~neurons) == neurons.mask.numel()
        options = known["draw"] if isinstance(known["draw"], dict) else {}
        options = {key: value for key, value in options.items() if key in ("seed", "match")}
        drawn = neurons.matched_random(**{"seed": 0} | options)
        assert len(drawn) == len(neurons)
        assert not drawn & neurons
        assert len(neurons.subsample(known["k"], seed=0)) == known["k"]


class Options:
    """The options of a study, and the command line."""

    def __init__(self, folder: Path) -> None:
        self.ran: list[dict[str, Any]] = []

    def make(self, draw: random.Random) -> bytes:
        if draw.random() < 0.5:
            words = [
                "demo",
                "--seeds",
                "--out",
                "--rules",
                "--analyses",
                "--overwrite",
                "--quiet",
                "--version",
                "--json",
            ]
            words += [
                "--help",
                "corrected",
                "paper",
                "overlap",
                "depth",
                "0",
                "1",
                "-1",
                "x",
                "",
                "\x00",
                "9" * 5000,
                "--",
                "-q",
            ]
            return json.dumps({"arguments": draw.choices(words, k=draw.randint(0, 6))}).encode()
        names = [*StudyOptions.__dataclass_fields__, "other", ""]
        options = {}
        for _ in range(draw.randint(1, 3)):
            name = draw.choice(names)
            own = json.loads(json.dumps(getattr(StudyOptions(), name, 0)))
            options[name] = changed_value(draw, own) if draw.random() < 0.8 else own
        return json.dumps({"rules": draw.choice(["corrected", "paper", any_value(draw)]), "options": options}).encode()

    def read(self, content: bytes) -> None:
        call = json.loads(content)
        if "arguments" in call:
            self.command(call["arguments"])
            return
        options = {key: tuple(value) if isinstance(value, list) else value for key, value in call["options"].items()}
        made = StudyOptions.of(call["rules"], **options)
        assert StudyOptions(**{key: getattr(made, key) for key in StudyOptions.__dataclass_fields__}) == made

    def command(self, arguments: list[str]) -> None:
        """Run the command line, with a demonstration that does nothing."""
        from rmtension.cli._command_line import main
        from rmtension.cli._commands import demo
        from rmtension.cli._commands.outcome import Outcome

        run, demo.run = demo.run, lambda options: self.ran.append(options) or Outcome("", {})
        try:
            with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()) as stderr:
                try:
                    status = main(arguments)
                except SystemExit as end:
                    status = end.code
        finally:
            demo.run = run
        assert status == 0 or (status == 2 and "error:" in stderr.getvalue())


SURFACES: dict[str, Callable[[Path], Any]] = {
    "jsonl": Jsonl,
    "results": Results,
    "neurons": Neurons,
    "options": Options,
}


# Surface -> inputs that raised an error from outside this library, hung, or were read as another value.
ONCE_FAILED: dict[str, list[bytes]] = {
    "jsonl": [
        b'{"prompt": "p", "chosen": "a", "rejected": "b", "id": ' + b"9" * 5000 + b"}",
        b"[" * 100_000,
        b'{"a":' * 20_000,
        b'{"prompt": "p", "chosen": "\\ud800", "rejected": "b"}',
        b'{"prompt": [{"role": "\\udfff", "content": "c"}], "chosen": "a", "rejected": "b"}',
        b'{"prompt": "p", "chosen": "a", "rejected": "b", "subset": "\\ud800"}',
    ],
    "results": [],
    "neurons": [
        json.dumps(call).encode()
        for call in (
            {"indices": [[0.5, 1]]},
            {"indices": 3},
            {"indices": [[0]]},
            {"shape": [2**62, 2**62]},
            {"shape": [0, 3]},
            {"draw": {"seed": -1}},
            {"draw": {"seed": None}},
            {"k": True},
            {"site": None},
        )
    ],
    "options": [
        json.dumps({"rules": rules, "options": options}).encode()
        for rules, options in (
            ("corrected", {"fraction": "a half"}),
            ("corrected", {"seed": -1}),
            ("corrected", {"n_draws": 2.5}),
            ("corrected", {"refuse": "harm"}),
            ("corrected", {"other": 1}),
            ([], {}),
        )
    ],
}


# -- running --------------------------------------------------------------------------------------------------------


def outcome(surface: Any, content: bytes) -> str:
    """ "read", or the name of the library's error; other errors are raised."""
    with warnings.catch_warnings(), limited(SECONDS, "an input", TooLong):
        warnings.simplefilter("ignore")
        try:
            surface.read(content)
        except RMTensionError as error:
            return type(error).__name__
    return "read"


def fuzz(name: str, n: int, seed: int, keep: Path | None = None) -> tuple[Counter[str], list[bytes]]:
    """How often `n` inputs had each outcome, and the inputs that failed."""
    draw = random.Random(f"{name} {seed}")
    counts: Counter[str] = Counter()
    failed = []
    with tempfile.TemporaryDirectory() as folder:
        surface = SURFACES[name](Path(folder))
        for _ in range(n):
            content = surface.make(draw)
            try:
                counts[outcome(surface, content)] += 1
            except (Exception, TooLong) as error:
                kind = f"FAILED {type(error).__name__}"
                counts[kind] += 1
                failed.append(content)
                if keep is not None and counts[kind] <= 20:
                    keep.mkdir(parents=True, exist_ok=True)
                    (keep / f"{name}-{seed}-{len(failed)}").write_bytes(content)
                    print(f"  {kind}: {error!s:.200}", flush=True)
    return counts, failed


def run_again(names: list[str]) -> int:
    """Print and return how many of the inputs that failed before fail now."""
    bad = []
    with tempfile.TemporaryDirectory() as folder:
        for name in names:
            surface = SURFACES[name](Path(folder))
            for content in ONCE_FAILED[name]:
                try:
                    # All these inputs are invalid.
                    if outcome(surface, content) == "read":
                        bad.append(content)
                except (Exception, TooLong) as error:
                    print(f"  {name}: {error!r:.200}")
                    bad.append(content)
    print(f"inputs that failed before and fail now: {len(bad)} {bad}")
    return len(bad)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--n", type=int, default=50_000, help="inputs per surface")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--surface", nargs="+", choices=SURFACES, default=list(SURFACES))
    parser.add_argument("--keep", type=Path, help="folder for inputs that fail")
    options = parser.parse_args()
    torch.set_num_threads(1)
    failed = run_again(options.surface)
    for name in options.surface:
        start, before = time.monotonic(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        counts, bad = fuzz(name, options.n, options.seed, options.keep)
        grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
        seconds = time.monotonic() - start
        print(f"{name}: {counts.total()} inputs in {seconds:.0f} s, memory +{grown:.0f} MB", flush=True)
        for kind, n in counts.most_common():
            print(f"  {n:>7} {kind}")
        failed += len(bad) + (grown > 500)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
