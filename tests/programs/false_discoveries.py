"""How many of the neurons that `conflict` counts have no effect, where it is known which have none.

    python tests/programs/false_discoveries.py --organisms 5 --draws 40

Organisms have planted neurons. The contributions of all others get a random sign for each prompt, the same for all of
them, so that their true mean is 0 and they stay as correlated as they were. q-values then promise that at most
1 - `level` of the neurons that count are such neurons, in the mean over draws. `--shared 0` gives every neuron signs of
its own.
"""

import argparse
import tempfile
from pathlib import Path

import pandas as pd
import torch

from rmtension import NeuronAttribution
from rmtension.neurons import PairAttributions, conflict
from rmtension.synthetic import make_organism

LEVELS = (0.8, 0.9, 0.95, 0.99)


def with_nulls(scores: PairAttributions, planted: torch.Tensor, shared: bool, seed: int) -> PairAttributions:
    """The same, with a random sign per prompt for every neuron that is not planted."""
    generator = torch.Generator().manual_seed(seed)
    prompts = {prompt: number for number, prompt in enumerate(dict.fromkeys(pair.prompt for pair in scores.pairs))}
    of_pairs = torch.tensor([prompts[pair.prompt] for pair in scores.pairs])
    shape = (len(prompts), *(1, 1)) if shared else (len(prompts), *planted.shape)
    values = scores.values  # noqa: PD011 - a tensor
    signs = torch.randint(2, shape, generator=generator)[of_pairs] * 2.0 - 1
    return PairAttributions(torch.where(planted, values, values * signs), scores.pairs, scores.provenance)


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
            planted = torch.stack([neurons.mask for neurons in organism.truth.values()]).any(dim=0)
            scores = [
                NeuronAttribution(head, "gradient_x_activation").per_pair(part) for part in organism.pairs.values()
            ]
            for draw in range(options.draws):
                nulls = [
                    with_nulls(part, planted, bool(options.shared), 1000 * draw + k) for k, part in enumerate(scores)
                ]
                table = conflict(*nulls, names=tuple(organism.pairs), min_share=0, seed=draw).table
                for name in organism.pairs:
                    q_values = table[f"{name}_q_value"].to_numpy()
                    for level in LEVELS:
                        counts = q_values <= 1 - level
                        false = int((counts & ~planted.flatten().numpy()).sum())
                        rows.append({"level": level, "share": false / max(1, counts.sum()), "counted": counts.sum()})
    table = pd.DataFrame(rows).groupby("level")["share"].agg(["mean", "sem", "size"])
    table.insert(0, "stated at most", [1 - level for level in table.index])
    table["counted"] = pd.DataFrame(rows).groupby("level")["counted"].mean()
    print(f"{int(planted.sum())} of {planted.numel()} neurons are planted")
    print(table.round(4).to_string())


if __name__ == "__main__":
    main()
