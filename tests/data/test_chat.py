"""Chats: the ids are the template's own, BOS stands once, the response is what the assistant said last."""

import pytest
import torch
import transformers
from tiny_models import EOS, make_pairs, make_tokenizer, put_bos_first, save_classifier

from rmtension import PreferencePairs, RewardHead
from rmtension.data._chat import Message, split_turns
from rmtension.data._encoding import encode_pairs, encode_texts
from rmtension.errors import DataError, ModelError, OptionError, RMTensionWarning

TEMPLATES = {
    "with bos": (
        "{{ bos_token }}{% for m in messages %}[{{ m.role }}] {{ m.content }}{{ eos_token }}\n{% endfor %}"
        "{% if add_generation_prompt %}[assistant] {% endif %}"
    ),
    "without": (
        "{% for m in messages %}<{{ m.role }}>\n{{ m.content }}</s>\n{% endfor %}"
        "{% if add_generation_prompt %}<assistant>\n{% endif %}"
    ),
    # Llama-2 style: no generation prompt of its own.
    "plain": (
        "{% for m in messages %}{% if m.role == 'user' %}Q {{ m.content }} A{% else %} {{ m.content }} {% endif %}"
        "{% endfor %}"
    ),
}
MESSAGES = [{"role": "user", "content": "how do i bake bread"}, {"role": "assistant", "content": "with a cake"}]


@pytest.fixture(params=TEMPLATES)
def chat_tokenizer(request, tmp_path):
    """A tokenizer that puts BOS before every text by itself, with a chat template that may do it as well."""
    tokenizer = put_bos_first(make_tokenizer(tmp_path, bos=EOS))
    tokenizer.chat_template = TEMPLATES[request.param]
    return tokenizer


def test_ids_are_the_templates_own(chat_tokenizer):
    (encoded,) = encode_texts(chat_tokenizer, [MESSAGES], max_length=500)
    own = chat_tokenizer.apply_chat_template(MESSAGES, tokenize=True)["input_ids"]
    assert list(encoded.ids) == own
    # Negative control: tokenising the rendered text with special tokens would put BOS there once more.
    rendered = chat_tokenizer.apply_chat_template(MESSAGES, tokenize=False)
    assert chat_tokenizer(rendered)["input_ids"] == [chat_tokenizer.bos_token_id, *own]


def test_bos_is_never_doubled(chat_tokenizer):
    bos = chat_tokenizer.bos_token_id
    plain, explicit = encode_texts(chat_tokenizer, ["bake a cake", f"{EOS}bake a cake"], max_length=500)
    assert plain.ids == explicit.ids
    assert plain.ids[0] == bos != plain.ids[1]
    pair = PreferencePairs.from_records([{"prompt": f"{EOS}bake a", "chosen": "cake", "rejected": "bread"}])
    with pytest.warns(RMTensionWarning, match="chat=True"):
        encoded = encode_pairs(chat_tokenizer, pair, max_length=500)
    assert encoded.chosen[0].ids == plain.ids
    assert chat_tokenizer.decode(encoded.chosen[0].ids[encoded.chosen[0].response_start :]).strip() == "cake"


def test_the_response_is_the_last_message(chat_tokenizer):
    pairs = PreferencePairs.from_records([{"prompt": MESSAGES[:1], "chosen": "with a cake", "rejected": "cannot"}])
    encoded = encode_pairs(chat_tokenizer, pairs, max_length=500)
    for text, response in ((encoded.chosen[0], "with a cake"), (encoded.rejected[0], "cannot")):
        tail = chat_tokenizer.decode(text.ids[text.response_start :])
        assert tail.strip().startswith(response)
        assert "bread" not in tail
    # Cut to a context that holds the response only: the prompt goes, the lead stays.
    n = len(encoded.chosen[0].ids) - encoded.chosen[0].response_start
    short = encode_pairs(chat_tokenizer, pairs, max_length=n + 4)
    assert short.n_prompts_cut == 1
    assert short.chosen[0].ids[-n:] == encoded.chosen[0].ids[-n:]


def test_rewards_of_chats_equal_transformers(tmp_path, chat_tokenizer):
    save_classifier(tmp_path, "gpt2", chat_tokenizer)
    head = RewardHead.from_pretrained(tmp_path)
    model = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path, dtype=torch.float32).eval()
    chats = [MESSAGES, [*MESSAGES, {"role": "user", "content": "sorry"}, {"role": "assistant", "content": "sure"}]]
    expected = []
    for chat in chats:
        ids = head.tokenizer.apply_chat_template(chat, tokenize=True, return_tensors="pt")["input_ids"]
        with torch.no_grad():
            expected.append(model(ids).logits[0, 0])
    assert torch.allclose(head.score(chats), torch.stack(expected), atol=1e-5)
    pairs = PreferencePairs.from_records(
        [{"chosen": chats[0], "rejected": [chats[0][0], {"role": "assistant", "content": "no"}]}]
    )
    assert torch.allclose(head.score_pairs(pairs).chosen[0], expected[0], atol=1e-5)
    assert head.check(pairs)["passed"].all()


def test_records_in_trls_formats_are_the_same_pair():
    prompt, good, bad = MESSAGES[:1], {"role": "assistant", "content": "yes"}, {"role": "assistant", "content": "no"}
    records = [
        {"prompt": prompt, "chosen": [good], "rejected": [bad]},
        {"prompt": prompt, "chosen": "yes", "rejected": "no"},
        {"chosen": [*prompt, good], "rejected": [*prompt, bad]},
    ]
    pairs = PreferencePairs.from_records(records)
    assert len({pair.digest() for pair in pairs}) == 1
    assert pairs[0].prompt == (Message("user", "how do i bake bread"),)
    assert (pairs[0].chosen, pairs[0].rejected) == ("yes", "no")
    assert len(pairs.prompts) == 1


def test_chat_pairs_survive_the_disk(tmp_path, chat_tokenizer):
    pairs = make_pairs(6).as_chat()
    pairs.to_jsonl(tmp_path / "pairs.jsonl")
    assert PreferencePairs.from_jsonl(tmp_path / "pairs.jsonl") == pairs
    save_classifier(tmp_path, "gpt2", chat_tokenizer)
    scored = RewardHead.from_pretrained(tmp_path).score_pairs(pairs)
    scored.save(tmp_path / "scored.safetensors")
    assert type(scored).load(tmp_path / "scored.safetensors").pairs == pairs
    train, test = pairs.split(0.5, seed=0)
    assert not set(train.prompts) & set(test.prompts)
    assert len(train) + len(test) == 6


def test_transcripts_become_chats():
    text = "\n\nHuman: hi\n\nAssistant: hello there\n\nHuman: bye\n\nAssistant:"
    assert split_turns(text) == (Message("user", "hi"), Message("assistant", "hello there"), Message("user", "bye"))
    pairs = PreferencePairs.from_records([{"prompt": text, "chosen": " see you", "rejected": "no", "id": "7"}])
    chat = pairs.as_chat()[0]
    assert (chat.prompt, chat.chosen, chat.id) == (split_turns(text), "see you", "7")
    assert pairs.as_chat().as_chat() == pairs.as_chat()


class TestBadChats:
    def test_a_tokenizer_without_a_template_is_refused(self, tmp_path):
        with pytest.raises(ModelError, match=r"no chat template.*tokenizer.chat_template"):
            encode_texts(make_tokenizer(tmp_path), [MESSAGES], max_length=100)

    def test_an_error_in_the_template_becomes_a_data_error(self, tmp_path):
        tokenizer = make_tokenizer(tmp_path)
        tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}"
        with pytest.raises(DataError, match=r"refused them.*roles must alternate"):
            encode_texts(tokenizer, [MESSAGES], max_length=100)

    def test_invalid_messages_are_refused(self, chat_tokenizer):
        with pytest.raises(DataError, match=r"text 0: message 0 should be a dict with text.*got \{'role': 'user'\}"):
            encode_texts(chat_tokenizer, [[{"role": "user"}]], max_length=100)
        with pytest.raises(DataError, match=r"text 0: expected at least one message"):
            encode_texts(chat_tokenizer, [[]], max_length=100)

    @pytest.mark.parametrize(
        ("record", "message"),
        [
            (
                {"chosen": MESSAGES, "rejected": MESSAGES[1:]},
                r"record 0: field 'prompt' is missing.*have no common first messages",
            ),
            (
                {"prompt": MESSAGES[:1], "chosen": MESSAGES, "rejected": "no"},
                r"'chosen' should be one or more messages.*'user'",
            ),
            ({"prompt": "hi", "chosen": MESSAGES, "rejected": "no"}, r"'chosen' should be one or more messages"),
            (
                {"prompt": MESSAGES[:1], "chosen": MESSAGES[:1] * 2, "rejected": MESSAGES[:1] * 3},
                "end in a message of the",
            ),
            (
                {"prompt": [{"role": "user", "content": ["x"]}], "chosen": "a", "rejected": "b"},
                r"message 0 should be a",
            ),
        ],
    )
    def test_invalid_records_are_refused(self, record, message):
        with pytest.raises(DataError, match=message):
            PreferencePairs.from_records([record])

    def test_invalid_transcripts_are_refused(self):
        with pytest.raises(DataError, match=r"transcript: expected turns.*got 'hello"):
            split_turns("hello")
        with pytest.raises(DataError, match=r"its prompt is empty"):
            PreferencePairs.from_records([{"prompt": " ", "chosen": "a", "rejected": "b"}]).as_chat()
        begun = "\n\nHuman: hi\n\nAssistant: Sure, "
        with pytest.raises(DataError, match=r"ends inside a turn of the assistant \('Sure,'\)"):
            PreferencePairs.from_records([{"prompt": begun, "chosen": "a", "rejected": "b"}]).as_chat()

    def test_a_chat_has_no_plain_text(self):
        with pytest.raises(DataError, match="its prompt is a chat"):
            make_pairs(1).as_chat()[0].text("chosen")

    def test_a_single_chat_in_place_of_a_list_is_refused(self, chat_tokenizer):
        with pytest.raises(OptionError, match=r"score\(\[messages\]\)"):
            encode_texts(chat_tokenizer, MESSAGES, max_length=100)
