"""How many of the neurons that `conflict` counts have no effect, where it is known which have none.

    python tests/programs/false_discoveries.py --organisms 5 --draws 40

Organisms have planted neurons, 12 of which have an effect on the margins of an objective. The contributions of all
others get a random sign for each prompt, the same for all of them, so that their true mean is 0 and they stay as
correlated as they were. q-values up to q then promise that a share of at most q of the neurons that count are such
neurons, in the mean over draws. `--shared 0` gives every neuron signs of its own.
"""

import argparse
import tempfile
from pathlib import Path

import pandas as pd
import torch

from rmtension import NeuronAttribution
from rmtension.neurons import PairAttributions, conflict
from rmtension.synthetic import make_organism

LIMITS = (0.2, 0.1, 0.05, 0.01)


def with_nulls(scores: PairAttributions, kept: torch.Tensor, shared: bool, seed: int) -> PairAttributions:
    """The same, with a random sign per prompt for every neuron that is not kept."""
    generator = torch.Generator().manual_seed(seed)
    prompts = {prompt: number for number, prompt in enumerate(dict.fromkeys(pair.prompt for pair in scores.pairs))}
    of_pairs = torch.tensor([prompts[pair.prompt] for pair in scores.pairs])
    shape = (len(prompts), *(1, 1)) if shared else (len(prompts), *kept.shape)
    signs = torch.randint(2, shape, generator=generator)[of_pairs] * 2.0 - 1
    values = scores.values  # noqa: PD011 - a tensor
    return PairAttributions(torch.where(kept, values, values * signs), scores.pairs, scores.provenance)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--organisms", type=int, default=5)
    parser.add_argument("--draws", type=int, default=40)
    parser.add_argument("--shared", type=int, default=1)
    options = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for number in range(options.organisms):
            organism = make_organism(Path(folder) / f"{number}", noise=0.03, n_pairs=120, seed=number)
            head = organism.head()
            # Words of the other objective are in both responses of a pair, and what decoys write is not read.
            effective = {
                name: (organism.truth[name] | organism.truth["shared"] | organism.truth["conflict"]).mask
                for name in organism.pairs
            }
            scores = {
                name: NeuronAttribution(head, "gradient_x_activation").per_pair(part)
                for name, part in organism.pairs.items()
            }
            for draw in range(options.draws):
                nulls = [
                    with_nulls(part, effective[name], bool(options.shared), 10_000 * number + 10 * draw + k)
                    for k, (name, part) in enumerate(scores.items())
                ]
                table = conflict(*nulls, names=tuple(scores), min_share=0, seed=draw).table
                for name, mask in effective.items():
                    q_values = table[f"{name}_q_value"].to_numpy()
                    for limit in LIMITS:
                        counts = q_values <= limit
                        false = int((counts & ~mask.flatten().numpy()).sum())
                        about = {"q up to": limit, "organism and draw": f"{number} {draw}"}
                        rows.append({**about, "share": false / max(1, counts.sum()), "counted": counts.sum()})
    # Both objectives of a draw share its organism, so that a draw counts once.
    draws = pd.DataFrame(rows).groupby(["q up to", "organism and draw"])[["share", "counted"]].mean()
    table = draws.groupby("q up to")["share"].agg(["mean", "sem", "size"])
    table["counted"] = draws.groupby("q up to")["counted"].mean()
    print(f"{int(mask.sum())} of {mask.numel()} neurons have an effect on each objective")
    print(table.round(4).to_string())


if __name__ == "__main__":
    main()
