"""Pairs whose texts share prefixes of different lengths."""

from tiny_models import batches_of, make_pairs

from rmtension import PreferencePairs


def pairs_of_all_kinds():
    """Responses that share only the prompt, that begin alike, one that is a prefix of the other, and equal ones."""
    pairs = list(make_pairs(4))
    prompt = pairs[0].prompt
    more = [("help a cake", "help a python"), ("the bread", "the bread and cake"), ("sure", "sure")]
    records = [{"prompt": prompt, "chosen": chosen, "rejected": rejected} for chosen, rejected in more]
    return PreferencePairs([*pairs, *PreferencePairs.from_records(records)])


def n_packed(head, pairs):
    return sum(batch.n_pairs for batch in batches_of(head, pairs, sharing="pair") if batch.position_ids is not None)
