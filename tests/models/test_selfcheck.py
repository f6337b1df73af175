"""`check()` passes on right heads and rejects wrong ones: each test below is a mistake that other tools make."""

import pytest
import torch
from tiny_models import EOS, FAMILIES, grid, make_pairs, make_tokenizer, put_bos_first, save_classifier

import rmtension.passes._scoring
from rmtension import PreferencePairs, RewardHead
from rmtension.bodies._bodies import BridgeBody
from rmtension.data._encoding import EncodedText
from rmtension.data._token_places import ReadAt
from rmtension.data._tokens import TokenBatch
from rmtension.errors import CheckError, DataError

ALWAYS = {
    *("tokens", "equal to transformers", "bridge", "batch equals single", "padding", "last token"),
    *("hooks, mlp", "zeroing, mlp", "hooks, mlp_gate", "zeroing, mlp_gate", "hooks, attn_head", "zeroing, attn_head"),
    *("direct contributions", "layers"),
}


def failed(head, *arguments, **options):
    with pytest.raises(CheckError, match=r"check: \d+ of \d+ failed") as caught:
        head.check(*arguments, **options)
    table = caught.value.table
    names = set(table.loc[~table["passed"], "check"])
    assert all(name in str(caught.value) for name in names)
    return names


@pytest.mark.parametrize(
    "dtype", grid([torch.float64, torch.float32, torch.bfloat16, torch.float16], keep=[torch.float32, torch.float16])
)
@pytest.mark.parametrize("family", grid(FAMILIES))
def test_right_heads_pass(checkpoints, family, dtype, pairs):
    head = RewardHead.from_pretrained(checkpoints[family], dtype=dtype)
    table = head.check()
    assert set(table["check"]) == ALWAYS
    assert table["passed"].all()
    assert head.check(pairs)["n"].max() >= 16


def test_a_head_without_checkpoint_or_tokenizer_has_fewer_rows(head):
    bare = RewardHead(head.model, weight=head.weight, pad_token_id=head.pad_token_id)
    assert set(bare.check()["check"]) == ALWAYS - {"tokens", "equal to transformers", "bridge"}


def test_a_reference_of_the_user_is_compared(checkpoints):
    import transformers

    load = transformers.AutoModelForSequenceClassification.from_pretrained
    classifier = load(checkpoints["llama"], dtype=torch.float32)
    classifier.train()
    head = RewardHead.from_pretrained(checkpoints["llama"])
    assert head.check(reference=classifier)["passed"].all()
    assert classifier.training
    with torch.no_grad():
        classifier.score.weight[0, 0] += 0.1
    assert failed(head, reference=classifier) == {"equal to transformers"}


def test_norm_gain_left_out_is_rejected(head, monkeypatch):
    """Reading `ln_final.hook_normalized`, which is where the gain has not been applied yet."""
    residual = BridgeBody.residual
    norm = head.body.native.ln_f

    def without_gain(body, batch):
        return (residual(body, batch) - norm.bias) / norm.weight

    monkeypatch.setattr(BridgeBody, "residual", without_gain)
    assert {"equal to transformers", "direct contributions"} <= failed(head)


def test_another_last_token_is_rejected(head, monkeypatch):
    """Reading one token early, as code does that takes `mask.sum(1) - 2`, or position -1 of a padded batch."""

    columns = ReadAt.columns

    def early(read_at, input_ids, mask):
        return (columns(read_at, input_ids, mask) - 1).clamp(min=0)

    monkeypatch.setattr(ReadAt, "columns", early)
    assert {"equal to transformers", "last token"} <= failed(head)


def test_the_last_column_is_rejected(head, monkeypatch):
    """Reading column -1 whatever the padding."""

    def column(read_at, input_ids, mask):
        return torch.full((len(input_ids),), input_ids.shape[1] - 1)

    monkeypatch.setattr(ReadAt, "columns", column)
    assert "batch equals single" in failed(head)


def test_double_bos_is_rejected(tmp_path, monkeypatch):
    """TransformerLens prepends a BOS token to texts that already have one."""
    tokenizer = put_bos_first(make_tokenizer(tmp_path, bos=EOS))
    save_classifier(tmp_path, "gpt2", tokenizer)
    head = RewardHead.from_pretrained(tmp_path)
    assert head.tokenizer("cake")["input_ids"][0] == head.tokenizer.bos_token_id
    assert head.check()["passed"].all()
    encode = rmtension.passes._scoring.encode_texts

    def twice(tokenizer, texts, **options):
        encoded = encode(tokenizer, texts, **options)
        return [EncodedText((tokenizer.bos_token_id, *text.ids), text.response_start, text.key) for text in encoded]

    monkeypatch.setattr(rmtension.passes._scoring, "encode_texts", twice)
    assert "equal to transformers" in failed(head)
    # Without transformers to compare with, the ids tell.
    head.checkpoint = None
    monkeypatch.setattr("rmtension.passes._probes.encode_texts", twice)
    assert "tokens" in failed(head)


@pytest.mark.parametrize("family", grid(["gpt2", "llama"]))
def test_left_padding_without_positions_is_rejected(checkpoints, family, monkeypatch):
    """Running left-padded rows as they come: GPT-2 counts positions from the padding, and attends to it.

    On the CPU: rows so long have positions beyond the embedding's, an error there, and the end of the process on a GPU.
    """
    head = RewardHead.from_pretrained(checkpoints[family], device="cpu")
    monkeypatch.setattr(rmtension.passes._scoring, "compact", lambda input_ids, mask: (input_ids, mask))
    assert failed(head) == {"padding"}


def test_a_hook_that_misses_a_layer_is_rejected(head, monkeypatch):
    spots = BridgeBody.hook_sites

    def all_but_one(body, site, layer):
        return spots(body, site, 0 if layer == 1 else layer)

    monkeypatch.setattr(BridgeBody, "hook_sites", all_but_one)
    assert {"hooks, mlp", "hooks, mlp_gate", "hooks, attn_head"} <= failed(head)


def test_a_site_that_does_nothing_is_noticed(head, monkeypatch):
    """Hooks at a place whose output nobody reads."""
    dead = torch.nn.Identity()
    residual = BridgeBody.residual

    def also_dead(body, batch):
        for layer in range(3):
            dead(torch.full((1, 1, 64), float(layer)))
        return residual(body, batch)

    spot = type(head.body.hook_sites("mlp", 0)[0])
    monkeypatch.setattr(BridgeBody, "residual", also_dead)
    monkeypatch.setattr(BridgeBody, "hook_sites", lambda body, site, layer: [spot(dead, "output")])
    assert {"zeroing, mlp", "zeroing, mlp_gate", "zeroing, attn_head"} <= failed(head)


def test_changed_weights_are_noticed(checkpoints):
    """The checkpoint is read again: a model that drifted from it no longer equals it."""
    head = RewardHead.from_pretrained(checkpoints["llama"])
    with torch.no_grad():
        head.body.native.layers[0].mlp.down_proj.weight.mul_(1.5)
    assert failed(head) == {"equal to transformers"}


def test_changed_weights_under_a_passed_head_are_noticed(checkpoints):
    head = RewardHead.from_pretrained(checkpoints["llama"], head=torch.linspace(-1, 1, 32))
    assert head.check(make_pairs(3))["passed"].all()
    with torch.no_grad():
        head.body.native.layers[0].mlp.down_proj.weight.mul_(1.5)
    assert failed(head) == {"equal to transformers"}


def test_hooks_in_each_others_layers_are_rejected(head, monkeypatch):
    spots = BridgeBody.hook_sites
    monkeypatch.setattr(BridgeBody, "hook_sites", lambda body, site, layer: spots(body, site, [1, 0, 2][layer]))
    assert failed(head) == {"hooks, mlp", "hooks, mlp_gate", "hooks, attn_head"}


def test_pairs_that_are_cut_are_checked_too(head):
    """One response is long: the prompt is cut on both sides, although the other text would fit by itself."""
    prompt = "please help " * 30
    rows = [{"prompt": prompt, "chosen": "sure " * 40, "rejected": "sorry"}]
    pairs = PreferencePairs.from_records(rows)
    encoded = head.encode(pairs)
    assert encoded.n_prompts_cut == 1
    assert len(head.tokenizer(pairs[0].text("rejected"))["input_ids"]) <= head.max_length
    assert head.check(pairs)["passed"].all()


def test_a_check_without_pairs_is_refused(head, pairs):
    with pytest.raises(DataError, match="at least one preference pair"):
        head.check(pairs[:0])


def test_pairs_of_chats_are_checked_too(tmp_path):
    tokenizer = make_tokenizer(tmp_path)
    tokenizer.chat_template = "{% for m in messages %}<{{ m.role }}> {{ m.content }} {% endfor %}"
    save_classifier(tmp_path, "gpt2", tokenizer)
    head = RewardHead.from_pretrained(tmp_path)
    table = head.check(make_pairs(4).as_chat())
    assert table["passed"].all()
    assert set(table.loc[table["check"] == "tokens", "n"]) == {8}


def test_batches_are_made_as_before():
    """The mistakes above are made by replacing functions; this one keeps the names they replace in use."""
    batch = TokenBatch.from_texts([EncodedText((3, 4), 0, 0)], [0], device="cpu")
    assert batch.last.tolist() == [1]
    assert torch.equal(batch.last, ReadAt().columns(batch.input_ids, batch.mask))
    assert callable(rmtension.passes._scoring.compact)
