"""Score and collect with a model that is larger than a memory limit, by streaming its weights (Linux, root).

    python tests/programs/larger_than_memory.py --gigabytes 5 --limit 2.5

It writes a Llama-shaped classifier with random weights, and runs it three times, each in a process of its own: in
memory; within a limit, with `weight_memory`; and within the same limit without. The limit is a control group's, and
counts what is cached of files. It prints the time and the peak memory of each, and exits with 1 if a number of the
streamed run differs from the run in memory by a bit.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1] / "helpers"))

import torch
import transformers
from safetensors.torch import load_file, save_file

# Where Linux keeps the limits, the file of a limit and that of the peak; version 1 has a tree of its own for memory.
_V1 = Path("/sys/fs/cgroup/memory"), "memory.limit_in_bytes", "memory.max_usage_in_bytes"
_V2 = Path("/sys/fs/cgroup"), "memory.max", "memory.peak"
_D_MODEL, _D_MLP = 2048, 5632


def write(folder, n_bytes):
    """Write the model and pairs; returns the bytes of the weights."""
    from tiny_models import make_pairs, make_tokenizer

    tokenizer = make_tokenizer(folder)
    per_layer = 4 * (4 * _D_MODEL**2 + 3 * _D_MODEL * _D_MLP)
    config = transformers.LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=_D_MODEL,
        intermediate_size=_D_MLP,
        num_hidden_layers=round(n_bytes / per_layer),
        num_attention_heads=16,
        num_key_value_heads=16,
        max_position_embeddings=512,
        num_labels=1,
        pad_token_id=1,
    )
    torch.manual_seed(0)
    model = transformers.AutoModelForSequenceClassification.from_config(config)
    model.save_pretrained(folder)
    make_pairs(6, longest=24).to_jsonl(folder / "pairs.jsonl")
    return sum(parameter.nbytes for parameter in model.parameters())


def run(folder, out, weight_memory):
    """Score, collect and attribute, and write what came out."""
    from rmtension import ActivationCollector, NeuronAttribution, PreferencePairs, RewardHead

    started = time.perf_counter()
    head = RewardHead.from_pretrained(folder, weight_memory=weight_memory, tokens_per_batch=128)
    opened = time.perf_counter()
    pairs = PreferencePairs.read(folder / "pairs.jsonl")
    results = {"margin": head.score_pairs(pairs).margin}
    scored = time.perf_counter()
    statistics = ActivationCollector(head).collect(pairs)
    results |= {name: getattr(statistics, name) for name in ("mean", "abs_mean", "rms", "frequency")}
    collected = time.perf_counter()
    results["scores"] = NeuronAttribution(head, "gradient_x_activation").score(pairs).values
    ended = time.perf_counter()
    save_file({name: tensor.contiguous() for name, tensor in results.items()}, out)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    times = [opened - started, scored - opened, collected - scored, ended - collected]
    print(json.dumps({"head": repr(head), "times": times, "peak": 1024 * peak}))


def measured(folder, out, limit, weight_memory):
    """Run in a process within `limit` bytes; returns what it printed, with the peak of its control group."""
    top, limit_file, peak_file = _V1 if _V1[0].is_dir() else _V2
    group = top / f"larger-than-memory-{os.getpid()}"
    group.mkdir()
    try:
        if limit is not None:
            (group / limit_file).write_text(str(limit))

        def enter():
            (group / "cgroup.procs").write_text(str(os.getpid()))

        command = [sys.executable, __file__, "--run", folder, "--out", out]
        command += [] if weight_memory is None else ["--weight-memory", str(weight_memory)]
        # Pages that another process has read into the cache would count for that process.
        Path("/proc/sys/vm/drop_caches").write_text("1")
        done = subprocess.run(command, preexec_fn=enter, capture_output=True, text=True, check=False)
        if done.returncode:
            return {"error": f"exit status {done.returncode}: {done.stderr.strip()[-200:]}"}
        return json.loads(done.stdout.splitlines()[-1]) | {"group": int((group / peak_file).read_text())}
    finally:
        group.rmdir()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=5.0)
    parser.add_argument("--limit", type=float, default=2.5, help="in gigabytes")
    parser.add_argument("--run", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--weight-memory", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.run:
        return run(options.run, options.out, options.weight_memory)
    limit = int(options.limit * 1e9)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        n_bytes = write(folder, options.gigabytes * 1e9)
        os.sync()
        print(f"{n_bytes / 1e9:.2f} GB of float32 weights; limit {options.limit} GB\n")
        print("| run | open, s | score | collect | gradient x activation | peak of process, GB | of control group |")
        print("|---|---|---|---|---|---|---|")
        rows = {
            "in memory": (None, None),
            "streamed, within the limit": (limit, 0),
            "not streamed, within the limit": (limit, None),
        }
        found = {}
        for what, (most, weight_memory) in rows.items():
            out = folder / f"{len(found)}.safetensors"
            row = measured(folder, out, most, weight_memory)
            if "error" in row:
                print(f"| {what} | {row['error']} |")
                continue
            found[what] = load_file(out)
            times = " | ".join(f"{each:.1f}" for each in row["times"])
            print(f"| {what} | {times} | {row['peak'] / 1e9:.2f} | {row['group'] / 1e9:.2f} |", flush=True)
        resident = found["in memory"]
        equal = {
            what: all(torch.equal(tensor, resident[name]) for name, tensor in each.items())
            for what, each in found.items()
        }
        print(f"\nEqual to the run in memory, bit for bit: {equal}")
        return 0 if equal.get("streamed, within the limit") else 1


if __name__ == "__main__":
    sys.exit(main())
