"""How well each method predicts true ablations, on trained models.

    rmtension demo --seeds 3 --out runs                      # trains helpful, harmless and mixed models, three seeds
    python tests/programs/faithful_models.py --models runs/models --out runs/faithfulness
    python tests/programs/faithful_models.py --model my-mixed-rm --pairs a.jsonl.gz b.jsonl.gz --out runs/faithfulness

Models of the embedded world are measured on test pairs of their own objective, the mixed model on pairs of both. For
mean and zero ablation of every MLP neuron and every head, each method is compared with the true effect; for mean
ablation of MLP neurons, also for top sets of growing size. `--out` gets one CSV file and one `Faithfulness` file per
model, ablation and site. A file that exists is not computed again.
"""

import argparse
import time
from collections.abc import Iterator
from pathlib import Path

import pandas as pd

from rmtension import ActivationCollector, Mean, NeuronAttribution, NeuronScores, PreferencePairs, RewardHead, Zero
from rmtension.attribution._faithfulness import faithfulness
from rmtension.attribution._neuron_attribution import score_together
from rmtension.data._encoding import encode_pairs
from rmtension.interventions._replacement import Replacement
from rmtension.synthetic._world import preference_world

OBJECTIVES = ("helpful", "harmless")


def all_scores(
    head: RewardHead, pairs: PreferencePairs, replacement: Replacement, site: str, steps: int
) -> dict[str, NeuronScores]:
    """The scores of every method."""
    asked = {
        "attribution_patching": {"method": "attribution_patching", "replacement": replacement},
        "gradient_x_activation": {"method": "gradient_x_activation"},
        "integrated_gradients": {"method": "integrated_gradients", "replacement": replacement, "steps": steps},
        "direct_effect": {"method": "direct_effect"},
        "mean_difference": {"method": "mean_difference"},
        "attribution_patching, absolute": {
            "method": "attribution_patching",
            "replacement": replacement,
            "aggregate": "absolute",
        },
        "attribution_patching, graddrop": {
            "method": "attribution_patching",
            "replacement": replacement,
            "aggregate": "absolute",
            "graddrop": True,
        },
    }
    attributions = [NeuronAttribution(head, site=site, **options) for options in asked.values()]
    return dict(zip(asked, score_together(attributions, pairs), strict=True))


def measure(
    name: str, folder: Path, pairs: PreferencePairs, out: Path, *, steps: int, fractions: list[float], progress: bool
) -> None:
    """The tables of one model."""
    head = RewardHead.from_pretrained(folder)
    for site in ("mlp", "attn_head"):
        for kind in (Mean, Zero):
            path = out / f"{name} {site} {kind.name}.csv"
            if path.exists():
                continue
            start = time.monotonic()
            replacement = Mean(ActivationCollector(head, site=site).collect(pairs)) if kind is Mean else Zero()
            scores = all_scores(head, pairs, replacement, site, steps)
            report = faithfulness(
                head,
                pairs,
                scores,
                replacement=replacement,
                set_fractions=fractions if (site, kind) == ("mlp", Mean) else (),
                n_random=4,
                progress=progress,
            )
            report.save(out / f"{name} {site} {kind.name}.safetensors")
            if len(report.sets):
                report.sets.to_csv(out / f"{name} {site} {kind.name} sets.csv", index=False)
            labels = {"model": name, "site": site, "replacement": kind.name, "n_pairs": len(pairs)}
            report.summary.assign(**labels).to_csv(path, index=False)
            gap = float(scores["integrated_gradients"].completeness_gap.max())
            print(f"{name}, {site}, {kind.name}: {time.monotonic() - start:.0f} s, largest completeness gap {gap:.1e}")
            print(report, flush=True)


def take(pairs: PreferencePairs, n: int, head: RewardHead) -> PreferencePairs:
    """`n` of the pairs that fit the context without cuts, in the order of their digests."""
    encoded = encode_pairs(head.tokenizer, pairs, max_length=10**9)
    fits = [
        pair
        for pair, *texts in zip(pairs, encoded.chosen, encoded.rejected, strict=True)
        if max(map(len, texts)) <= head.max_length
    ]
    return PreferencePairs(sorted(fits, key=lambda pair: pair.digest())[:n])


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `measured_models`."""
    parser.add_argument("--models", type=Path, help="folder of seed-N/{helpful,harmless,mixed}, from `rmtension demo`")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--model", type=Path, help="one reward model, measured on --pairs")
    parser.add_argument("--pairs", type=Path, nargs="*", default=[])
    parser.add_argument("--n-pairs", type=int, default=96)


def measured_models(options: argparse.Namespace) -> Iterator[tuple[str, Path, PreferencePairs]]:
    """The name and folder of each model to measure, and the pairs to measure it on."""
    if options.models is not None:
        test = preference_world(0).test  # as the demo trains all its seeds on the training pairs of world 0
        for seed in range(options.seeds):
            for name in (*OBJECTIVES, "mixed"):
                parts = [name] if name in OBJECTIVES else list(OBJECTIVES)
                each = options.n_pairs // len(parts)
                pairs = PreferencePairs(pair for part in parts for pair in list(test[part])[:each])
                yield f"{name} {seed}", options.models / f"seed-{seed}" / name, pairs
    if options.model is not None:
        head = RewardHead.from_pretrained(options.model)
        each = options.n_pairs // len(options.pairs)
        files = [PreferencePairs.from_jsonl(path, on_invalid="skip") for path in options.pairs]
        pairs = PreferencePairs(pair for file in files for pair in take(file, each, head))
        yield f"{options.model.name} real", options.model, pairs


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_model_arguments(parser)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=32, help="nodes of integrated gradients")
    parser.add_argument("--fractions", type=float, nargs="*", default=[0.01, 0.05, 0.2], help="sizes of ablated sets")
    parser.add_argument("--progress", action="store_true")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    settings = {"steps": options.steps, "fractions": options.fractions, "progress": options.progress}
    for name, folder, pairs in measured_models(options):
        measure(name, folder, pairs, options.out, **settings)
    paths = sorted(path for path in options.out.glob("*.csv") if not path.stem.endswith("sets"))
    print_tables(pd.concat([pd.read_csv(path) for path in paths]))


def print_tables(table: pd.DataFrame) -> None:
    """Print Markdown tables: the intervals of one model, or the mean and range over several models."""
    names = ["spearman", "sign_agreement", "top_precision", "slope"]
    for (site, replacement), part in table.groupby(["site", "replacement"]):
        models = part["model"].unique()
        print(
            f"\n{site}, {replacement}: {len(models)} models, {part['n'].min()} neurons, "
            f"{part['n_pairs'].min()} pairs per model\n"
        )
        print(f"| method | {' | '.join(names)} |\n|---|{'---|' * len(names)}")
        for method, rows in part.groupby("method", sort=False):
            low, high = ("_low", "_high") if len(models) == 1 else ("", "")
            cells = [
                f"{rows[name].mean():.3f} [{rows[name + low].min():.3f}, {rows[name + high].max():.3f}]"
                if rows[name].notna().all()
                else "none"
                for name in names
            ]
            print(f"| `{method}` | {' | '.join(cells)} |")
        best = part.groupby("method")["spearman"].mean().idxmax()
        print(f"\n`{best}`, Spearman model by model:\n")
        for row in part[part["method"] == best].to_dict("records"):
            print(f"- {row['model']}: {row['spearman']:.4f} [{row['spearman_low']:.4f}, {row['spearman_high']:.4f}]")


if __name__ == "__main__":
    main()
