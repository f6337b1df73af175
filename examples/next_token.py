"""Which neurons make a language model choose "is" or "are": a curve of faithfulness against the neurons kept.

    python examples/next_token.py --out next-token

Trains a GPT-2-shaped language model on generated sentences such as "The key to the cabinets is old.", in which the noun
before the verb often has the other number than the subject. The pairs ask for the verb after beginnings with
combinations of nouns that are not in the training text. Neurons are ranked by attribution patching on one half of the
pairs. On the other half, all neurons but the top k are replaced by their means, and the faithfulness of k is
(m_k - m_0) / (m_all - m_0), where m_k is the mean margin: 0 if every neuron is replaced, 1 if none is. Random rankings
are drawn for comparison. Everything runs offline, on one CPU core in about a minute.
"""

import argparse
import os
import random
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import numpy as np
import pandas as pd
import torch
import transformers

from rmtension import ActivationCollector, Mean, NeuronAttribution, NeuronSet, PreferencePairs, RewardHead
from rmtension.evaluation import accuracy
from rmtension.heads import LogRatioHead
from rmtension.interventions import score_without
from rmtension.training import train_base_model, train_tokenizer

NOUNS = [
    *("key", "cabinet", "picture", "author", "window", "garden", "letter", "doctor", "car", "bridge", "river", "shop"),
    *("teacher", "book", "paper", "friend"),
]
LINKS = ["to", "near", "behind", "beside"]
ADJECTIVES = ["old", "new", "small", "red", "quiet", "famous"]
PLURAL = {False: "", True: "s"}
VERB = {False: "is", True: "are"}


def beginning(draw: random.Random, held_out: bool) -> tuple[str, bool]:
    """The beginning of a sentence, and whether its subject is plural; a fifth of the pairs of nouns are held out."""
    while True:
        first, second = draw.sample(range(len(NOUNS)), 2)
        if ((first + second) % 5 == 0) == held_out:
            break
    is_plural, other = draw.random() < 0.5, draw.random() < 0.5
    subject, noun = NOUNS[first] + PLURAL[is_plural], NOUNS[second] + PLURAL[other]
    return f"The {subject} {draw.choice(LINKS)} the {noun}", is_plural


def sentences(n: int, seed: int) -> list[str]:
    """Sentences to train the language model on."""
    draw = random.Random(seed)  # noqa: S311 - no secrets
    made = (beginning(draw, held_out=False) for _ in range(n))
    return [f"{text} {VERB[is_plural]} {draw.choice(ADJECTIVES)}." for text, is_plural in made]


def agreement_pairs(n: int, seed: int) -> PreferencePairs:
    """Pairs that prefer the verb that agrees with the subject, each beginning once."""
    draw = random.Random(seed)  # noqa: S311
    rows: dict[str, dict[str, str]] = {}
    while len(rows) < n:
        text, is_plural = beginning(draw, held_out=True)
        verbs = {"chosen": VERB[is_plural], "rejected": VERB[not is_plural]}
        rows[text] = {"prompt": text, **verbs, "subset": "plural" if is_plural else "singular"}
    return PreferencePairs.from_records(list(rows.values()))


def kept_sets(ranking: torch.Tensor, sizes: list[int], head: RewardHead) -> list[NeuronSet]:
    """For each size, the neurons to replace so that only the first ones of a ranking are kept."""
    sets = []
    for size in sizes:
        replaced = torch.ones(ranking.numel(), dtype=torch.bool)
        replaced[ranking[:size]] = False
        sets.append(NeuronSet(replaced.view(head.n_layers, -1), "mlp", head.architecture))
    return sets


def faithfulness(margins: torch.Tensor, seed: int = 0) -> pd.DataFrame:
    """(m_k - m_0) / (m_all - m_0) from margins [size, pair] for sizes 0 to all, with a 95% bootstrap over pairs."""
    values = margins.double().numpy()
    draws = np.random.default_rng(seed).integers(values.shape[1], size=(2000, values.shape[1]))
    means = np.concatenate([values.mean(axis=1)[:, None], values[:, draws].mean(axis=2)], axis=1)
    shares = (means - means[0]) / (means[-1] - means[0])
    low, high = np.quantile(shares[:, 1:], [0.025, 0.975], axis=1)
    return pd.DataFrame({"faithfulness": shares[:, 0], "low": low, "high": high})


def train(folder: Path, n_sentences: int, epochs: float) -> None:
    """Train the tokenizer and the language model, unless the folder has them."""
    texts = sentences(n_sentences, seed=0)
    words = [*NOUNS, *(f"{noun}s" for noun in NOUNS), *LINKS, *ADJECTIVES, "the", "is", "are"]
    tokenizer = train_tokenizer(["The. " + " ".join(words)] * 50, 420)
    config = transformers.GPT2Config(
        vocab_size=len(tokenizer),
        n_positions=32,
        n_embd=64,
        n_layer=2,
        n_head=4,
        n_inner=128,
        bos_token_id=tokenizer.eos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    train_base_model(
        texts, config, tokenizer, folder, epochs=epochs, learning_rate=2e-3, batch_size=64, resume=True, progress=False
    )


def curves(head: RewardHead, pairs: PreferencePairs, sizes: list[int], n_random: int) -> pd.DataFrame:
    """The faithfulness of the ranking and of random rankings: one row per ranking and size."""
    ranked_on, evaluated = pairs[::2], pairs[1::2]
    means = Mean(ActivationCollector(head).collect(ranked_on))
    scores = NeuronAttribution(head, "attribution_patching", replacement=means).score(ranked_on)
    # A negative effect: the margin falls without the neuron.
    rankings = {"attribution patching": scores.as_effects().flatten().argsort()}
    generator = torch.Generator().manual_seed(0)
    n_neurons = head.n_layers * head.n_neurons("mlp")
    rankings |= {f"random {number}": torch.randperm(n_neurons, generator=generator) for number in range(n_random)}
    sizes = [*sizes, n_neurons]
    sets = [each for ranking in rankings.values() for each in kept_sets(ranking, sizes, head)]
    scored = score_without(head, evaluated, sets, means, progress=False)
    tables = []
    for number, name in enumerate(rankings):
        of_ranking = scored[number * len(sizes) : (number + 1) * len(sizes)]
        table = faithfulness(torch.stack([rewards.margin for rewards in of_ranking]))
        table.insert(0, "ranking", name)
        table.insert(1, "kept", sizes)
        table["margin"] = [float(rewards.margin.mean()) for rewards in of_ranking]
        table["accuracy"] = [accuracy(rewards).value for rewards in of_ranking]
        tables.append(table)
    return pd.concat(tables, ignore_index=True)


def draw_curves(table: pd.DataFrame, path: Path, n_pairs: int) -> None:
    """Draw the curves, with the interval of the ranking and the random rankings in grey."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 4.0), layout="constrained")
    axes = figure.subplots()
    chosen = table[table["ranking"] == "attribution patching"]
    randoms = [part for name, part in table.groupby("ranking", sort=False) if name != "attribution patching"]
    for number, part in enumerate(randoms):
        label = f"{len(randoms)} random rankings" if number == 0 else None
        axes.plot(part["kept"], part["faithfulness"], color="#8A8A8A", linewidth=1, label=label)
    axes.fill_between(chosen["kept"], chosen["low"], chosen["high"], color="#0072B2", alpha=0.2, linewidth=0)
    axes.plot(
        chosen["kept"], chosen["faithfulness"], "o-", color="#0072B2", markersize=3.5, label="attribution patching"
    )
    for level in (0, 1):
        axes.axhline(level, color="black", linewidth=0.8, linestyle=":")
    axes.set_xscale("symlog", linthresh=1, linscale=0.4)
    ticks = [0, *(2**power for power in range(9))]
    axes.set_xticks(ticks, [f"{tick}" for tick in ticks])
    axes.minorticks_off()
    axes.set_xlim(-0.3, 1.15 * ticks[-1])
    axes.set_xlabel(f"neurons kept, of {int(table['kept'].max())} (the others are replaced by their means)")
    axes.set_ylabel(r"faithfulness $(m_k - m_0) / (m_{all} - m_0)$")
    title = f"Agreement of subject and verb: margin with the top neurons only\n{n_pairs} pairs, band: 95% over pairs"
    axes.set_title(title, fontsize=10)
    axes.legend(frameon=False, loc="upper left")
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=160)


def main() -> None:
    """Train, rank, keep, draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("next-token"), help="folder for the model, table and figure")
    parser.add_argument("--sentences", type=int, default=20_000, help="sentences to train on")
    parser.add_argument("--epochs", type=float, default=2.0, help="times that the training text is read")
    parser.add_argument("--pairs", type=int, default=400, help="pairs; half rank neurons, half evaluate them")
    parser.add_argument("--random", type=int, default=5, help="random rankings")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    train(options.out / "model", options.sentences, options.epochs)
    head = RewardHead.from_pretrained(options.out / "model", head=LogRatioHead())
    pairs = agreement_pairs(options.pairs, seed=1)
    rewards = head.score_pairs(pairs)
    print(f"accuracy on {len(pairs)} pairs: {accuracy(rewards)}; mean margin {float(rewards.margin.mean()):.2f}")
    n_neurons = head.n_layers * head.n_neurons("mlp")
    sizes = [0, *(2**power for power in range(20) if 2**power < n_neurons)]
    table = curves(head, pairs, sizes, options.random)
    table.to_csv(options.out / "faithfulness.csv", index=False)
    draw_curves(table, options.out / "faithfulness.png", len(pairs[1::2]))
    print(table[table["ranking"] == "attribution patching"].drop(columns="ranking").round(3).to_string(index=False))
    random_ones = table[table["ranking"] != "attribution patching"].groupby("kept")["faithfulness"]
    print(random_ones.agg(["mean", "min", "max"]).round(3).add_prefix("random: ").to_string())


if __name__ == "__main__":
    main()
