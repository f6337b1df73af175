"""Pairs whose texts share a prefix in every way."""

from tiny_models import batches_of, make_pairs

from rmtension import (
    PreferencePairs,
)


def pairs_of_all_kinds():
    """Pairs that share nothing but the prompt, one that shares a start, one prefix of the other, two alike."""
    pairs = list(make_pairs(4))
    prompt = pairs[0].prompt
    more = [("help a cake", "help a python"), ("the bread", "the bread and cake"), ("sure", "sure")]
    records = [{"prompt": prompt, "chosen": one, "rejected": other} for one, other in more]
    return PreferencePairs([*pairs, *PreferencePairs.from_records(records)])


def n_packed(head, pairs):
    return sum(batch.n_pairs for batch in batches_of(head, pairs, sharing="pair") if batch.position_ids is not None)
