"""Whether RewardBench's own command scores exports as this library does (`make exports`).

    .venv/bin/python tests/programs/on_rewardbench.py write FOLDER              # models, pairs, this library's rewards
    .venv-rewardbench/bin/python tests/programs/on_rewardbench.py score FOLDER  # RewardBench, with transformers 4.51

It exits with 1 if an accuracy differs, or a reward by more than 1e-5, at one text per batch.
"""

import contextlib
import json
import os
import sys
from pathlib import Path

import torch
import transformers
from other_major import BASE, TEMPLATE, TOLERANCE, run_step, some_neurons


def write(folder):
    """Write pairs in RewardBench's format, and two reward models with and without an ablation."""
    from rmtension import ActivationCollector, Mean, RewardHead
    from rmtension.synthetic._world import preference_world
    from rmtension.synthetic.check_matrix import make_classifier
    from rmtension.training._train_tokenizer import train_tokenizer

    world = preference_world(seed=0, n_train=48, n_test=48)
    tokenizer = train_tokenizer(world.texts, vocab_size=320)
    tokenizer.chat_template = TEMPLATE
    pairs = world.test["helpful"].as_chat()
    rows = []
    for pair in pairs:
        prompt = [{"role": message.role, "content": message.content} for message in pair.prompt]
        sides = {"chosen": pair.chosen, "rejected": pair.rejected}
        rows.append({side: [*prompt, {"role": "assistant", "content": text}] for side, text in sides.items()})
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    rows = []
    for family in ("gpt2", "llama"):
        rope = {} if family == "gpt2" else {"rope_parameters": {"rope_type": "default", "rope_theta": BASE}}
        model = make_classifier(family, len(tokenizer) + 8, max_position_embeddings=512, **rope)
        head = RewardHead.from_classifier(model, tokenizer=tokenizer)
        neurons, means = some_neurons(head), ActivationCollector(head).collect(pairs)
        # For the mean, a Llama gets biases that its config did not have.
        ablated = {"zero": head.with_ablation(neurons), "mean": head.with_ablation(neurons, Mean(means))}
        for name, opened in {"whole": head, **ablated}.items():
            opened.save_pretrained(folder / "models" / f"{family}-{name}")
            scored = opened.score_pairs(pairs)
            row = {"model": f"{family}-{name}", "accuracy": scored.accuracy()}
            rows.append(row | {side: getattr(scored, side).tolist() for side in ("chosen", "rejected")})
    (folder / "expected.json").write_text(json.dumps(rows))


def score(folder):
    """Print accuracies and the largest difference of rewards from RewardBench's command; return how many differ."""
    os.environ["HF_DATASETS_CACHE"] = str((folder / "cache").resolve())
    expected = json.loads((folder / "expected.json").read_text())
    print(f"RewardBench's command, transformers {transformers.__version__}, {len(expected[0]['chosen'])} pairs.\n")
    print("| model | batch size | accuracy, library | accuracy, RewardBench | largest reward difference |")
    print("|---|---|---|---|---|")
    wrong = 0
    os.chdir(folder)
    for row in expected:
        for size in (1, 8):
            rewards, accuracy = scored_by_rewardbench(row["model"], size)
            sides = [(rewards[side], row[side]) for side in ("chosen", "rejected")]
            off = max(abs(first - second) for pair in sides for first, second in zip(*pair, strict=True))
            equal = accuracy == row["accuracy"] and off <= TOLERANCE * max(1.0, *map(abs, row["chosen"]))
            # RewardBench pads on the left and passes no positions, so GPT-2 counts them from the first pad token.
            wrong += not equal and (size == 1 or not row["model"].startswith("gpt2"))
            print(f"| {row['model']} | {size} | {row['accuracy']:.4f} | {accuracy:.4f} | {off:.1e} |", flush=True)
    return wrong


@contextlib.contextmanager
def to_a_file(name):
    """Redirect stdout and stderr of a command to a file."""
    streams = [os.dup(number) for number in (1, 2)]
    with Path(name).open("a") as file:
        try:
            for number in (1, 2):
                os.dup2(file.fileno(), number)
            yield
        finally:
            sys.stdout.flush()
            for number, stream in zip((1, 2), streams, strict=True):
                os.dup2(stream, number)
                os.close(stream)


def scored_by_rewardbench(model, batch_size):
    import rewardbench.rewardbench as command

    if not torch.cuda.is_available():
        # RewardBench's pipeline always calls .to("cuda").
        moved = transformers.BatchEncoding.to
        transformers.BatchEncoding.to = lambda self, device, **more: moved(self, "cpu", **more)
    options = {"dataset": "pairs.jsonl", "load_json": True, "not_quantized": True, "torch_dtype": "float32"}
    arguments = command.Args(model=f"models/{model}", batch_size=batch_size, output_dir="results/", **options)
    with to_a_file("rewardbench.log"):
        command.rewardbench(arguments)
    lines = Path(f"results/models/{model}_outputs.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    accuracy = json.loads(Path(f"results/models/{model}.json").read_text())["accuracy"]
    return {side: [row[f"scores_{side}"] for row in rows] for side in ("chosen", "rejected")}, accuracy


if __name__ == "__main__":
    sys.exit(run_step(__doc__, write=write, score=score))
