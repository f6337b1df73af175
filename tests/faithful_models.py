"""How well each method predicts true ablations, on trained models.

    rmtension demo --seeds 3 --out runs                      # trains helpful, harmless and mixed models, three seeds
    python tests/faithful_models.py --models runs/models --out runs/faithfulness
    python tests/faithful_models.py --model my-mixed-rm --pairs a.jsonl.gz b.jsonl.gz --out runs/faithfulness

Of the embedded world, every model is measured on test pairs of its own objective, the mixed one on both. For mean and
zero ablation of every MLP neuron and every head, each method is compared with the true effect; top sets of growing
size follow for mean ablation of MLP neurons. Tables go to `--out` as CSV files, one a model, ablation and site; what is
there is not computed again.
"""

import argparse
import time
from pathlib import Path

import pandas as pd

from rmtension import ActivationCollector, NeuronAttribution, NeuronScores, PreferencePairs, RewardHead
from rmtension.attribution import score_together
from rmtension.encoding import encode_pairs
from rmtension.faithfulness import faithfulness
from rmtension.world import preference_world

OBJECTIVES = ("helpful", "harmless")


def all_scores(head: RewardHead, pairs: PreferencePairs, reference, site: str, steps: int) -> dict[str, NeuronScores]:
    """Every method's scores; `reference` is "zero" or statistics."""
    asked = {
        "attribution_patching": {"method": "attribution_patching", "reference": reference},
        "gradient_x_activation": {"method": "gradient_x_activation"},
        "integrated_gradients": {"method": "integrated_gradients", "reference": reference, "steps": steps},
        "direct_effect": {"method": "direct_effect"},
        "mean_difference": {"method": "mean_difference"},
        "attribution_patching, absolute": {
            "method": "attribution_patching",
            "reference": reference,
            "aggregate": "absolute",
        },
        "attribution_patching, graddrop": {
            "method": "attribution_patching",
            "reference": reference,
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
        for mode in ("mean", "zero"):
            path = out / f"{name} {site} {mode}.csv"
            if path.exists():
                continue
            start = time.monotonic()
            statistics = ActivationCollector(head, site=site).collect(pairs) if mode == "mean" else None
            scores = all_scores(head, pairs, statistics or "zero", site, steps)
            found = faithfulness(
                head,
                scores,
                pairs,
                mode=mode,
                reference=statistics,
                set_fractions=fractions if (site, mode) == ("mlp", "mean") else (),
                n_random=4,
                progress=progress,
            )
            found.sets.to_csv(out / f"{name} {site} {mode} sets.csv", index=False)
            labels = {"model": name, "site": site, "mode": mode, "n_pairs": len(pairs)}
            found.summary.assign(**labels).to_csv(path, index=False)
            gap = float(scores["integrated_gradients"].completeness_gap.max())
            print(f"{name}, {site}, {mode}: {time.monotonic() - start:.0f} s, largest completeness gap {gap:.1e}")
            print(found, flush=True)


def take(pairs: PreferencePairs, n: int, head: RewardHead) -> PreferencePairs:
    """`n` of the pairs that fit the context whole, in an order that has nothing to do with that of the file."""
    encoded = encode_pairs(head.tokenizer, pairs, max_length=10**9)
    fits = [
        pair
        for pair, *texts in zip(pairs, encoded.chosen, encoded.rejected, strict=True)
        if max(map(len, texts)) <= head.max_length
    ]
    return PreferencePairs(sorted(fits, key=lambda pair: pair.digest())[:n])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", type=Path, help="folder of seed-N/{helpful,harmless,mixed}, from `rmtension demo`")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--model", type=Path, help="one reward model, measured on --pairs")
    parser.add_argument("--pairs", type=Path, nargs="*", default=[])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--n-pairs", type=int, default=96)
    parser.add_argument("--steps", type=int, default=8, help="nodes of integrated gradients")
    parser.add_argument("--fractions", type=float, nargs="*", default=[0.01, 0.05, 0.2], help="sizes of ablated sets")
    parser.add_argument("--progress", action="store_true")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    settings = {"steps": options.steps, "fractions": options.fractions, "progress": options.progress}
    if options.models is not None:
        for seed in range(options.seeds):
            test = preference_world(seed).test
            for name in (*OBJECTIVES, "mixed"):
                parts = [name] if name in OBJECTIVES else list(OBJECTIVES)
                each = options.n_pairs // len(parts)
                pairs = PreferencePairs(pair for part in parts for pair in list(test[part])[:each])
                measure(f"{name} {seed}", options.models / f"seed-{seed}" / name, pairs, options.out, **settings)
    if options.model is not None:
        head = RewardHead.from_pretrained(options.model)
        each = options.n_pairs // len(options.pairs)
        files = [PreferencePairs.from_jsonl(path, on_invalid="skip") for path in options.pairs]
        pairs = PreferencePairs(pair for file in files for pair in take(file, each, head))
        measure(options.model.name + " real", options.model, pairs, options.out, **settings)
    paths = sorted(path for path in options.out.glob("*.csv") if not path.stem.endswith("sets"))
    table = pd.concat([pd.read_csv(path) for path in paths])
    table["family"] = table["model"].str.contains("real").map({True: "real pairs", False: "embedded world"})
    columns = ["spearman", "sign_agreement", "top_precision", "slope"]
    grouped = table.groupby(["family", "site", "mode", "method"])[columns]
    print(grouped.agg(["mean", "min", "max"]).round(3).to_string())


if __name__ == "__main__":
    main()
