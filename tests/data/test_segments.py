"""Prompt and response as two segments: the tokenizer's own ids and types, cuts that keep special tokens, errors."""

import pytest
import torch
from native_families import make_native
from tiny_models import EOS, PAD, grid, make_pairs, make_tokenizer
from tokenizers import normalizers, processors

from rmtension import PreferencePairs, RewardHead
from rmtension.data._packing import pair_batches
from rmtension.data._segments import encode_segments
from rmtension.data._token_places import ReadAt
from rmtension.errors import DataError, ModelError
from rmtension.passes._probes import find_probes

# Like BERT's and like RoBERTa's tokenizer; `<pad>` stands for the separator, `<eos>` for [CLS].
PAIRED = {
    "bert": (f"{EOS} $A {PAD}", f"{EOS} $A {PAD} $B:1 {PAD}:1"),
    "roberta": (f"{EOS} $A {PAD}", f"{EOS} $A {PAD} {PAD} $B {PAD}"),
}


def segmented(folder, like):
    tokenizer = make_tokenizer(folder)
    single, pair = PAIRED[like]
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=single, pair=pair, special_tokens=[(EOS, 0), (PAD, 1)]
    )
    return tokenizer


@pytest.mark.parametrize("like", PAIRED)
def test_ids_and_types_are_the_tokenizers_own(like, tmp_path):
    tokenizer, pairs = segmented(tmp_path, like), make_pairs(5)
    encoded = encode_segments(tokenizer, pairs, max_length=96)
    assert (encoded.n_prompts_cut, encoded.n_responses_cut) == (0, 0)
    (batch,) = pair_batches(encoded, tokens_per_batch=9999, read_at=ReadAt(first=True), device="cpu")
    assert (batch.token_types is not None) == (like == "bert")
    texts = {"chosen": encoded.chosen, "rejected": encoded.rejected}
    sides = [(side, number) for side in texts for number in batch.indices[:5]]
    for (side, number), row, mask in zip(sides, batch.rows, batch.mask, strict=True):
        pair, text = pairs[number], texts[side][number]
        own = tokenizer(pair.prompt, getattr(pair, side), return_token_type_ids=True)
        assert list(text.ids) == own["input_ids"] == batch.input_ids[row][mask].tolist()
        # The response begins behind the separator; its last token is the separator at the end.
        assert tokenizer.decode(text.ids[text.response_start : -1]) == getattr(pair, side)
        if batch.token_types is not None:
            assert batch.token_types[row][mask].tolist() == own["token_type_ids"]
            assert not batch.token_types[row][~mask].any()
    assert batch.last.tolist() == [0] * 10


def test_cuts_keep_special_tokens(tmp_path):
    tokenizer = segmented(tmp_path, "roberta")
    pairs = PreferencePairs.from_records(
        [{"prompt": "how do i bake bread", "chosen": "please", "rejected": "sorry sure"}]
    )
    whole = encode_segments(tokenizer, pairs, max_length=96)
    n_prompt = whole.chosen[0].response_start - 3
    longest = max(len(text) for text in (*whole.chosen, *whole.rejected))
    cut = encode_segments(tokenizer, pairs, max_length=longest - 2)
    assert (cut.n_prompts_cut, cut.n_responses_cut) == (1, 0)
    for side, full in ((cut.chosen, whole.chosen), (cut.rejected, whole.rejected)):
        # Two tokens of the prompt are lost on both sides, at its beginning.
        assert side[0].ids == (full[0].ids[0], *full[0].ids[3:])
    shortest = longest - n_prompt - 1
    with pytest.raises(DataError, match=rf"a response has {longest - n_prompt} tokens.*truncate_response=True"):
        encode_segments(tokenizer, pairs, max_length=shortest)
    cut = encode_segments(tokenizer, pairs, max_length=shortest, truncate_response=True)
    assert cut.n_responses_cut == 1
    assert cut.rejected[0].ids == (0, 1, 1, *whole.rejected[0].ids[n_prompt + 3 : -2], 1)
    with pytest.raises(DataError, match=r"expected more than 4, the number of special tokens"):
        encode_segments(tokenizer, pairs, max_length=4, truncate_response=True)
    without = PreferencePairs.from_records([{"prompt": "", "chosen": "please", "rejected": "sorry"}])
    assert encode_segments(tokenizer, without, max_length=9).chosen[0].ids == tuple(
        tokenizer("", "please")["input_ids"]
    )


def test_what_has_no_two_segments(tmp_path, tokenizer):
    with pytest.raises(ModelError, match=r"it puts no token between prompt and response.*without two_segments"):
        encode_segments(tokenizer, make_pairs(1), max_length=96)
    paired = segmented(tmp_path, "bert")
    chats = make_pairs(1).as_chat()
    with pytest.raises(DataError, match=r"two_segments needs a plain prompt.*its prompt is a chat"):
        encode_segments(paired, chats, max_length=96)
    paired.backend_tokenizer.normalizer = normalizers.Replace("?", "")
    empty = PreferencePairs.from_records([{"prompt": "how", "chosen": "please", "rejected": "??"}])
    with pytest.raises(DataError, match=r"has no token. Give the pair a response"):
        encode_segments(paired, empty, max_length=96)


@pytest.mark.parametrize(
    ("family", "like"),
    grid(
        [("bert", "bert"), ("deberta-v2", "bert"), ("modernbert", "bert"), ("roberta", "roberta")], keep=[], unpack=True
    ),
)
def test_rewards_of_pairs_equal_the_classifier_of_two_segments(family, like, tmp_path):
    """In one padded batch; BERT's token types change the rewards."""
    tokenizer = segmented(tmp_path, like)
    classifier = make_native(family, len(tokenizer)).double()
    classifier.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    model = RewardHead.from_pretrained(tmp_path, dtype=torch.float64, two_segments=True)
    pairs = make_pairs(4)
    (batch,) = pair_batches(model.encode(pairs), tokens_per_batch=9999, read_at=model.read_at, device="cpu")
    with torch.no_grad():
        rewards = model.forward(batch)
        sides = [pairs[number].chosen for number in batch.indices[:4]] + [
            pairs[number].rejected for number in batch.indices[:4]
        ]
        inputs = [
            tokenizer(pairs[number].prompt, response, return_tensors="pt", return_token_type_ids=family != "roberta")
            for number, response in zip(batch.indices, sides, strict=True)
        ]
        expected = torch.stack([classifier(**one).logits[0, 0] for one in inputs])
        assert torch.allclose(rewards, expected, atol=1e-6, rtol=0)
        untyped = torch.stack([classifier(input_ids=one["input_ids"]).logits[0, 0] for one in inputs])
        assert torch.allclose(untyped, expected, atol=1e-6, rtol=0) == (family != "bert")
    # A text by itself is one segment.
    assert model.encode(pairs).chosen[0].has_types == (like == "bert")
    # The checks run on the pairs as they are scored, against the classifier on prompts and responses.
    scored = model.score_pairs(pairs)
    sides = torch.stack([scored.chosen, scored.rejected], dim=1).flatten()
    assert torch.allclose(torch.tensor([probe.reward for probe in find_probes(model, pairs)]), sides.float(), atol=1e-6)
    table = model.check(pairs).set_index("check")
    assert table.loc["equal to transformers", "n"] == 8
    assert ("padding" in table.index) == (like != "bert")
