"""Whether memory, files, hooks or threads remain after many cycles in one process.

    python tests/programs/soak.py --cycles 2000 [--seconds 3600] [--one-tokenizer]

Every cycle opens a checkpoint, scores, attributes and ablates, saves results and reads them again, and drops all
objects. Memory (resident, after a collection), open files, hooks on all modules in memory, and threads are printed
after every tenth of the cycles. The end is compared with the first tenth, which fills caches. A tokenizer of
`tokenizers` 0.23 that is loaded, used and dropped leaves about ten kilobytes, with transformers alone. With
`--one-tokenizer`, all cycles share one tokenizer, and the rest of the growth is this library's.
"""

import argparse
import gc
import os
import sys
import tempfile
import threading
import time
import warnings
from pathlib import Path

import torch
import transformers

sys.path.append(str(Path(__file__).parents[1] / "helpers"))

from tiny_models import make_pairs, make_tokenizer, save_classifier

from rmtension import (
    AblationContext,
    ActivationCollector,
    Mean,
    NeuronAttribution,
    NeuronScores,
    PairRewards,
    RewardHead,
)
from rmtension.interventions._sweep import score_without
from rmtension.passes._collect_profiles import collect_profiles


def cycle(model: Path, pairs, folder: Path, tokenizer=None) -> None:
    if tokenizer is None:
        head = RewardHead.from_pretrained(model)
    else:
        classifier = transformers.AutoModelForSequenceClassification.from_pretrained(model)
        head = RewardHead.from_classifier(classifier.eval(), tokenizer=tokenizer)
    head.score_pairs(pairs, work=folder / "work").save(folder / "rewards")
    assert PairRewards.load(folder / "rewards").accuracy() >= 0
    statistics = ActivationCollector(head).collect(pairs)
    scores = NeuronAttribution(head, method="gradient_x_activation").score(pairs)
    scores.save(folder / "scores")
    top = NeuronScores.load(folder / "scores").top(0.1)
    with AblationContext(head, top, Mean(statistics)):
        head.score_pairs(pairs)
    score_without(head, pairs, [top, ~top])
    collect_profiles(head, pairs)
    head.with_ablation(top).save_pretrained(folder / "ablated")
    try:
        with AblationContext(head, top):
            raise KeyboardInterrupt
    except KeyboardInterrupt:
        pass


def n_hooks() -> int:
    """The number of hooks on all modules in memory."""
    return sum(
        len(hooks)
        for module in gc.get_objects()
        if isinstance(module, torch.nn.Module)
        for hooks in (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks)
    )


def measure() -> dict[str, float]:
    gc.collect()
    resident = int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20
    files = len(list(Path("/proc/self/fd").iterdir()))
    return {"MB": resident, "open files": files, "hooks": n_hooks(), "threads": threading.active_count()}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cycles", type=int, default=2000)
    parser.add_argument("--seconds", type=float, default=3600, help="the longest time")
    parser.add_argument("--one-tokenizer", action="store_true", help="load the tokenizer once for all cycles")
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    start, first, n = time.monotonic(), None, 0
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model = save_classifier(folder / "model", "gpt2", make_tokenizer(folder / "tokenizer"))
        pairs = make_pairs(8)
        tokenizer = transformers.AutoTokenizer.from_pretrained(model) if options.one_tokenizer else None
        while n < options.cycles and time.monotonic() - start < options.seconds:
            cycle(model, pairs, folder / "out", tokenizer)
            n += 1
            if n % max(1, options.cycles // 10) == 0:
                now = measure()
                first = first or now
                print(f"{n} cycles, {time.monotonic() - start:.0f} s: {now}", flush=True)
    end = measure()
    first = first or end
    grown = end["MB"] / first["MB"] - 1
    seconds = time.monotonic() - start
    print(f"{n} cycles in {seconds:.0f} s: memory {grown:+.1%} after the first tenth, {first} -> {end}")
    same = all(end[name] <= first[name] for name in ("open files", "hooks", "threads"))
    return 0 if grown <= 0.05 and same else 1


if __name__ == "__main__":
    sys.exit(main())
