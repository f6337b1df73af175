"""Tokens: the response is found, truncation keeps it, batches hold every text, the last token is transformers' own."""

import pytest
import torch
from tiny_models import EOS, make_tokenizer
from tokenizers import processors

from rmtension import PreferencePairs
from rmtension.data._encoding import encode_pairs, encode_texts
from rmtension.data._given_ids import compact
from rmtension.data._length_buckets import length_buckets
from rmtension.data._packing import pair_batches
from rmtension.data._token_places import ReadAt
from rmtension.errors import DataError, OptionError


def one_pair(prompt, chosen="sure", rejected="sorry please"):
    return PreferencePairs.from_records([{"prompt": prompt, "chosen": chosen, "rejected": rejected}])


def test_response_starts_after_the_prompt(tokenizer, pairs):
    encoded = encode_pairs(tokenizer, pairs, max_length=500)
    for pair, text in zip(pairs, encoded.chosen, strict=True):
        assert tokenizer.decode(text.ids) == f"{pair.prompt} {pair.chosen}"
        assert tokenizer.decode(text.ids[text.response_start :]) == f" {pair.chosen}"
        assert len({text.key for text in encoded.chosen}) == len(pairs)


def test_special_tokens_of_the_tokenizer_stay_and_belong_to_neither(tmp_path):
    """A tokenizer that adds BOS and EOS by itself: once each, BOS before the prompt, kept when the prompt is cut."""
    tokenizer = make_tokenizer(tmp_path)
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{EOS} $A {EOS}", special_tokens=[(EOS, 0)]
    )
    made = one_pair("how do i bake a cake then", "first the bread", "sorry")
    whole = encode_pairs(tokenizer, made, max_length=500)
    assert whole.chosen[0].ids[0] == whole.chosen[0].ids[-1] == 0
    assert whole.chosen[0].ids.count(0) == 2
    cut = encode_pairs(tokenizer, made, max_length=len(whole.chosen[0]) - 3)
    assert cut.n_prompts_cut == 1
    assert cut.chosen[0].ids == (0, *whole.chosen[0].ids[4:])
    assert cut.chosen[0].response_start == whole.chosen[0].response_start - 3


def test_prompts_are_cut_equally_and_responses_kept(tokenizer):
    made = one_pair(" ".join(["cake"] * 60), "sure", " ".join(["help"] * 20))
    whole = encode_pairs(tokenizer, made, max_length=500)
    assert (whole.n_prompts_cut, whole.n_responses_cut) == (0, 0)
    cut = encode_pairs(tokenizer, made, max_length=40)
    assert (cut.n_prompts_cut, cut.n_responses_cut) == (1, 0)
    assert len(cut.rejected[0]) == 40
    assert cut.chosen[0].response_start == cut.rejected[0].response_start
    for side in ("chosen", "rejected"):
        before, after = getattr(whole, side)[0], getattr(cut, side)[0]
        assert before.ids[before.response_start :] == after.ids[after.response_start :]
        assert before.ids[-len(after) :] == after.ids


def test_a_response_that_does_not_fit_is_refused_or_cut_at_its_end(tokenizer):
    made = one_pair("bake", "sure", " ".join(["help"] * 50))
    with pytest.raises(DataError, match=r"a response has \d+ tokens, the context holds 20.*truncate_response=True"):
        encode_pairs(tokenizer, made, max_length=20)
    cut = encode_pairs(tokenizer, made, max_length=20, truncate_response=True)
    assert (cut.n_prompts_cut, cut.n_responses_cut) == (1, 1)
    assert len(cut.rejected[0]) == 20
    whole = encode_pairs(tokenizer, made, max_length=500).rejected[0]
    assert cut.rejected[0].ids == whole.ids[whole.response_start :][:20]


def test_a_whole_text_is_never_cut_silently(tokenizer):
    with pytest.raises(DataError, match="text 1 has"):
        encode_texts(tokenizer, ["cake", " ".join(["cake"] * 50)], max_length=20)
    (cut,) = encode_texts(tokenizer, [" ".join(["cake"] * 50)], max_length=20, truncate=True)
    assert cut.ids == tuple(tokenizer(" ".join(["cake"] * 50))["input_ids"][-20:])


def test_buckets_partition_and_hold_the_budget():
    lengths = torch.randint(1, 90, (500,), generator=torch.Generator().manual_seed(0)).tolist()
    buckets = length_buckets(lengths, 400)
    assert sorted(i for bucket in buckets for i in bucket) == list(range(500))
    assert all(len(bucket) * max(lengths[i] for i in bucket) <= 400 for bucket in buckets)
    padded = sum(len(bucket) * max(lengths[i] for i in bucket) for bucket in buckets)
    assert padded < 1.1 * sum(lengths), "length buckets should waste little"
    assert length_buckets([1000], 10) == [[0]]
    with pytest.raises(OptionError, match="tokens_per_batch"):
        length_buckets([1], 0)


def test_few_texts_of_many_lengths_are_hardly_padded():
    """All would fit into two batches, in which a third of the tokens would be padding."""
    lengths = list(range(10, 410, 8))
    buckets = length_buckets(lengths, 8000)
    assert sorted(i for bucket in buckets for i in bucket) == list(range(50))
    padded = sum(len(bucket) * max(lengths[i] for i in bucket) for bucket in buckets)
    assert padded < 1.12 * sum(lengths)
    # A batch too small to be fast takes what comes.
    assert length_buckets([100, 20, 10], 8000) == [[0, 1, 2]]


def test_pair_batches_hold_both_texts_of_every_pair(tokenizer, pairs):
    encoded = encode_pairs(tokenizer, pairs, max_length=500)
    seen = []
    for batch in pair_batches(encoded, tokens_per_batch=200, read_at=ReadAt(1), device="cpu"):
        half = len(batch.indices) // 2
        assert batch.indices[:half] == batch.indices[half:]
        for row, number in enumerate(batch.indices):
            text = (encoded.chosen if row < half else encoded.rejected)[number]
            assert batch.input_ids[batch.rows[row]][batch.mask[row]].tolist() == list(text.ids)
            assert int(batch.response[row].sum()) == len(text) - text.response_start
            assert batch.select("last")[row].nonzero().tolist() == [[len(text) - 1]]
        seen += batch.indices[:half]
    assert sorted(seen) == list(range(len(pairs)))


def test_the_token_that_is_read_and_compact_on_rows_written_by_hand():
    ids = torch.tensor([[5, 6, 1, 1], [1, 1, 5, 6], [5, 1, 6, 1], [1, 1, 1, 1]])
    real = torch.tensor([[1, 1, 1, 0], [0, 0, 1, 1], [1, 1, 1, 1], [1, 1, 0, 0]]).bool()
    for read_at, columns in (
        (ReadAt(1), [1, 3, 2, 0]),
        (ReadAt(), [2, 3, 3, 1]),
        (ReadAt(1, first=True), [0, 2, 0, 0]),
    ):
        assert read_at.columns(ids, real).tolist() == columns
        # The same token by its index in the text.
        texts = [row[some].tolist() for row, some in zip(ids, real, strict=True)]
        starts = real.int().argmax(dim=1).tolist()
        assert [start + read_at.index(text) for start, text in zip(starts, texts, strict=True)] == (
            columns if read_at != ReadAt(1) else [1, 3, 2, 0]
        )
    moved, mask = compact(ids, real)
    assert moved[1, :2].tolist() == [5, 6]
    assert mask.tolist() == [[1, 1, 1, 0], [1, 1, 0, 0], [1, 1, 1, 1], [1, 1, 0, 0]]
