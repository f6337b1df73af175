"""Tokenizers without an unknown token, with a few words, or without special tokens: no raw error; a check that runs."""

import pytest
import torch
import transformers
from tiny_models import grid
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from rmtension import PreferencePairs, RewardHead
from rmtension.errors import DataError
from rmtension.synthetic.check_matrix import make_classifier

WORDS = {word: number for number, word in enumerate(("yes", "no", "help", "<pad>"))}
VOCABULARIES = {
    "WordLevel": models.WordLevel(WORDS),
    "BPE": models.BPE(vocab={"n": 0, "o": 1, "no": 2, "<pad>": 3}, merges=[("n", "o")]),
    "Unigram": models.Unigram([("n", -3.0), ("o", -3.0), ("no", -1.0), ("<pad>", 0.0)]),
    "WordPiece": models.WordPiece(WORDS),
}


def wrapped(model, **special):
    raw = Tokenizer(model)
    raw.pre_tokenizer = pre_tokenizers.Whitespace()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=raw, **special)


def opened(tokenizer, family="gpt2", **options):
    classifier = make_classifier(family, max(8, len(tokenizer)))
    classifier.config.pad_token_id = 3
    return RewardHead.from_classifier(classifier, tokenizer=tokenizer, **options)


@pytest.mark.parametrize("name", grid(VOCABULARIES, keep=["WordLevel", "BPE"]))
def test_texts_outside_the_vocabulary_are_named(name):
    """Known texts are scored, others named in an error whose advice works; the check draws ids."""
    head = opened(wrapped(VOCABULARIES[name], pad_token="<pad>"), "llama" if name == "BPE" else "gpt2")
    assert head.score(["no", "no no"]).isfinite().all()
    message = (
        r"cannot encode 'no \?\?'.*Leave the text out" if name != "BPE" else r"text 1 has no token: nothing of it is in"
    )
    with pytest.raises(DataError, match=message):
        head.score(["no", "??" if name == "BPE" else "no ??"])
    rows = [{"prompt": "no", "chosen": "no", "rejected": "??"}]
    with pytest.raises(DataError, match=r"cannot encode|has no token"):
        head.score_pairs(PreferencePairs.from_records(rows))
    table = head.check()
    assert table["passed"].all()
    assert "tokens" in set(table["check"])
    known = wrapped(models.WordLevel(WORDS | {"[UNK]": 4}, unk_token="[UNK]"), unk_token="[UNK]", pad_token="<pad>")
    assert opened(known).score(["no ??"]).isfinite().all()


@pytest.mark.parametrize("max_length", grid([1, 2]))
def test_a_tiny_max_length_passes_the_check(max_length):
    tokenizer = wrapped(models.WordLevel(WORDS | {"[UNK]": 4}, unk_token="[UNK]"), unk_token="[UNK]", pad_token="<pad>")
    assert opened(tokenizer, max_length=max_length).check()["passed"].all()


def test_a_length_with_room_only_for_special_tokens_is_refused():
    """Every text would get the reward of its BOS token."""
    tokenizer = wrapped(
        models.WordLevel(WORDS | {"[UNK]": 4, "<s>": 5}, unk_token="[UNK]"), pad_token="<pad>", bos_token="<s>"
    )
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 5)]
    )
    head = opened(tokenizer, max_length=1)
    rows = [{"prompt": "yes", "chosen": "no", "rejected": "help"}]
    for run in (
        lambda: head.score(["no"], truncate=True),
        lambda: opened(tokenizer, max_length=1, truncate_response=True).score_pairs(PreferencePairs.from_records(rows)),
    ):
        with pytest.raises(DataError, match=r"max_length: expected more than 1.*No token of the text would be left"):
            run()
    assert head.check()["passed"].all()
    assert opened(tokenizer, max_length=2).score(["no", "help"]).unique().numel() == 2


@pytest.mark.parametrize("size", [1, 2, 3])
def test_tiny_vocabularies_pass_the_check(size):
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=16, vocab_size=size, num_labels=1
    )
    config.pad_token_id = config.bos_token_id = config.eos_token_id = 0
    classifier = transformers.LlamaForSequenceClassification(config).eval()
    table = RewardHead.from_classifier(classifier).check()
    assert table["passed"].all()
    assert ("last token" in set(table["check"])) == (size == 3)


def test_inactive_relu_neurons_pass_the_check_and_dead_hooks_fail(monkeypatch):
    """Zeroing what is 0 changes nothing, which says nothing about the hook."""
    from own_models import make_own

    model = make_own("native", act_fn="relu")
    with torch.no_grad():
        for block in model.blocks:
            getattr(block.mlp, "in").original_component.bias.fill_(-100.0)
    head = RewardHead(model, weight=[1.0] * 16)
    table = head.check().set_index("check")
    assert table.loc["zeroing, mlp", "n"] == 0
    assert table.loc["zeroing, attn_head", "n"] > 0
