"""What single neurons write: direct weights on the reward, and the tokens whose logits they promote and suppress."""

from collections.abc import Sequence

import pandas as pd
from jaxtyping import Float
from numpy import ndarray

from rmtension.data._pairs import PreferencePairs
from rmtension.data._tokens import TokenBatch
from rmtension.models._direct_weights import ROUNDING, direct_weights, token_weights, unembedding
from rmtension.models._reward_model import RewardModel

# Tokens listed of each kind.
_N_TOKENS = 5


def written(
    head: RewardModel, pair: PreferencePairs, site: str, wanted: Sequence[tuple[int, int]]
) -> tuple[Float[ndarray, "wanted"], pd.DataFrame, dict[str, str]]:
    """The direct weight of every neuron, the tokens of each, and the reasons (`no_weights`, `no_tokens`) or "".

    `pair` is any pair, on which the weights are compared with direct contributions. Cost: one forward pass over it.
    """
    encoded = head.encode(pair)
    texts = [*encoded.chosen, *encoded.rejected]
    batch = TokenBatch.from_texts(texts, (0, 0), read_at=head.read_at, device=head.device)
    weights = direct_weights(head, batch, site, wanted)
    rows = unembedding(head)
    reasons = {"no_weights": weights.reason, "no_tokens": weights.reason}
    listed: list[tuple[int, int, str, str, float]] = []
    if rows is None:
        reasons["no_tokens"] = "this model has no unembedding: it is no language model, and its embeddings are not tied"
    elif weights.read is not None:
        rows = rows[: len(head.tokenizer)]
        sizes = weights.read.norm(dim=1) * float(rows.norm(dim=1).max())
        # Smaller weights are rounding: the neuron writes at right angles to every row.
        thresholds = ROUNDING * sizes
        for (layer, neuron), threshold, of_neuron in zip(
            wanted, thresholds, token_weights(weights.read, rows), strict=True
        ):
            order = of_neuron.argsort(descending=True, stable=True)
            for kind, sign, ids in (("promoted", 1, order), ("suppressed", -1, order.flip(0))):
                for token in ids[:_N_TOKENS].tolist():
                    if not sign * of_neuron[token] > threshold:
                        break
                    text = head.tokenizer.decode([token], clean_up_tokenization_spaces=False)
                    listed.append((layer, neuron, kind, text, float(of_neuron[token])))
    frame = pd.DataFrame(listed, columns=["layer", "neuron", "kind", "token", "weight"])
    return weights.on_reward.numpy(), frame, reasons
