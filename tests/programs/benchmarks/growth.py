"""How time and memory grow: `python tests/programs/benchmarks/growth.py --pairs hh_harmless_test.jsonl.gz`.

Each case runs in its own process. It opens a GPT-2-shaped model of width 192, collects statistics of all MLP neurons,
scores them by gradient x activation, and prints seconds and the largest resident memory. Exponents are slopes of log
time on log tokens, and on log layers, by least squares.
"""

import argparse
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import numpy as np


def case(path: Path, n: int, layers: int) -> None:
    """Run one case and print: tokens, seconds, megabytes."""
    import transformers

    from rmtension import ActivationCollector, NeuronAttribution, PreferencePairs, RewardHead
    from rmtension.training._train_tokenizer import train_tokenizer

    pairs = PreferencePairs.from_jsonl(path, on_invalid="skip")
    tokenizer = train_tokenizer([pair.text("chosen") for pair in pairs[:500]], 4096, max_length=1024)
    config = transformers.GPT2Config(
        vocab_size=len(tokenizer), n_embd=192, n_layer=layers, n_head=4, num_labels=1, pad_token_id=1
    )
    config.bos_token_id = config.eos_token_id = 0
    with tempfile.TemporaryDirectory() as folder:
        transformers.AutoModelForSequenceClassification.from_config(config).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        head = RewardHead.from_pretrained(folder)
    head.score_pairs(pairs[:8])
    pairs = pairs.sample(n, seed=0)
    start = time.perf_counter()
    ActivationCollector(head).collect(pairs)
    NeuronAttribution(head, method="gradient_x_activation").score(pairs)
    seconds = time.perf_counter() - start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(head.encode(pairs).n_tokens, seconds, peak)


def run(path: Path, n: int, layers: int) -> tuple[float, float, float]:
    command = [sys.executable, __file__, "--pairs", str(path), "--case", str(n), str(layers)]
    ran = subprocess.run(command, capture_output=True, text=True, check=True)
    tokens, seconds, peak = map(float, ran.stdout.split()[-3:])
    return tokens, seconds, peak


def exponent(x: list[float], y: list[float]) -> float:
    return float(np.polyfit(np.log(x), np.log(y), 1)[0])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=Path, required=True)
    parser.add_argument("--n", type=int, nargs="+", default=[200, 250, 500, 1000, 2000])
    parser.add_argument("--layers", type=int, nargs="+", default=[2, 4, 8])
    parser.add_argument("--case", type=int, nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.case:
        case(options.pairs, *options.case)
        return
    print("| pairs | layers | tokens | seconds | peak memory, MB |\n|---|---|---|---|---|")
    rows = {}
    for n, layers in [
        *((n, options.layers[0]) for n in options.n),
        *((options.n[0], layers) for layers in options.layers[1:]),
    ]:
        rows[n, layers] = run(options.pairs, n, layers)
        tokens, seconds, peak = rows[n, layers]
        print(f"| {n} | {layers} | {tokens:,.0f} | {seconds:.1f} | {peak:.0f} |", flush=True)
    by_n = [rows[n, options.layers[0]] for n in options.n]
    by_layers = [rows[options.n[0], layers] for layers in options.layers]
    print(f"\ntime ~ tokens^{exponent([r[0] for r in by_n], [r[1] for r in by_n]):.2f}")
    print(f"time ~ layers^{exponent(options.layers, [r[1] for r in by_layers]):.2f}")
    print(f"peak memory, {options.n[-1]} pairs over {options.n[0]}: {by_n[-1][2] / by_n[0][2] - 1:+.1%}")


if __name__ == "__main__":
    main()
