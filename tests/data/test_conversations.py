"""Conversations in every shape that data sets have them: the rewards are transformers' own of the rendered messages."""

import json

import datasets
import pandas as pd
import pytest
import torch
import transformers
from tiny_models import grid, make_pairs, make_tokenizer, save_classifier

from rmtension import ActivationCollector, NeuronAttribution, PreferencePairs, RewardHead
from rmtension.cli._command_line import main
from rmtension.data._chat import Message
from rmtension.data._encoding import encode_pairs
from rmtension.errors import DataError, RMTensionWarning
from rmtension.evaluation._length import length_baseline

TEMPLATE = (
    "{% if tools %}[tools] {{ tools | tojson }}\n{% endif %}"
    "{% for m in messages %}[{{ m.role }}{{ ' ' + m.name if m.name }}] {{ m.content }}"
    "{% if m.reasoning_content %}<think>{{ m.reasoning_content }}</think>{% endif %}"
    "{% for call in m.tool_calls or [] %}<call>{{ call.function | tojson }}</call>{% endfor %}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}[assistant] {% endif %}"
)
TOOLS = [{"type": "function", "function": {"name": "cake", "parameters": {"type": "object", "properties": {}}}}]


def user(text, **fields):
    return {"role": "user", "content": text, **fields}


def assistant(text, **fields):
    return {"role": "assistant", "content": text, **fields}


def call(**arguments):
    return assistant(None, tool_calls=[{"type": "function", "function": {"name": "cake", "arguments": arguments}}])


@pytest.fixture(scope="module", params=grid(["gpt2", "llama"]))
def model(request, tmp_path_factory):
    """A head, and the reward that transformers gives to messages."""
    folder = tmp_path_factory.mktemp(request.param)
    tokenizer = make_tokenizer(folder)
    tokenizer.chat_template = TEMPLATE
    sizes = {"n_positions": 400} if request.param == "gpt2" else {"max_position_embeddings": 400}
    save_classifier(folder, request.param, tokenizer, **sizes)
    head = RewardHead.from_pretrained(folder)
    plain = transformers.AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32).eval()

    def reward(messages, **more):
        ids = tokenizer.apply_chat_template(messages, tokenize=True, return_dict=True, return_tensors="pt", **more)
        with torch.no_grad():
            return float(plain(**ids).logits[0, 0])

    return head, reward


@pytest.fixture
def rewards_equal(model):
    """Checks that a row gives the rewards of these conversations, read from dicts, a data set, a frame and a file."""
    head, reward = model

    def check(row, chosen, rejected, folder=None, **more):
        expected = [reward(chosen, **more), reward(rejected, **more)]
        pairs = PreferencePairs.from_records([row])
        sources = [
            pairs,
            PreferencePairs.from_dataset([row]),
            PreferencePairs.from_dataset(datasets.Dataset.from_list([row])),
            PreferencePairs.from_frame(pd.DataFrame([row])),
            PreferencePairs.from_dataset(pairs.to_dataset()),
        ]
        for loaded in sources:
            assert loaded == pairs
        scored = head.score_pairs(pairs)
        assert [float(scored.chosen[0]), float(scored.rejected[0])] == pytest.approx(expected, abs=1e-5)
        return pairs

    return check


TALK = [{"role": "system", "content": "please"}, user("how"), assistant("first"), user("do i bake")]
GOOD, BAD = assistant("with a cake"), assistant("cannot")
SHAREGPT = {"system": "system", "user": "human", "assistant": "gpt"}


def sharegpt(messages):
    return [{"from": SHAREGPT[message["role"]], "value": message["content"]} for message in messages]


def parts(message):
    half = len(message["content"]) // 2
    texts = (message["content"][:half], message["content"][half:])
    return message | {"content": [{"type": "text", "text": text} for text in texts]}


SHAPES = {
    "prompt and texts": {"prompt": TALK, "chosen": "with a cake", "rejected": "cannot"},
    "prompt and lists of one message": {"prompt": TALK, "chosen": [GOOD], "rejected": [BAD]},
    "prompt and single messages": {"prompt": TALK, "chosen": GOOD, "rejected": BAD},
    "whole conversations": {"chosen": [*TALK, GOOD], "rejected": [*TALK, BAD]},
    "whole, with their prompt": {"prompt": TALK, "chosen": [*TALK, GOOD], "rejected": [*TALK, BAD]},
    "whole, with the last question": {"prompt": TALK[-1:], "chosen": [*TALK, GOOD], "rejected": [*TALK, BAD]},
    "whole, with a text prompt": {"prompt": " do i  bake\n", "chosen": [*TALK, GOOD], "rejected": [*TALK, BAD]},
    "whole, with a prompt that is missing": {"prompt": None, "chosen": [*TALK, GOOD], "rejected": [*TALK, BAD]},
    "ShareGPT": {"conversations": sharegpt(TALK), "chosen": sharegpt([GOOD])[0], "rejected": sharegpt([BAD])[0]},
    "ShareGPT, whole": {"chosen": sharegpt([*TALK, GOOD]), "rejected": sharegpt([*TALK, BAD])},
    "ShareGPT and a system column": {
        "system": "please",
        "conversations": sharegpt(TALK[1:]),
        "chosen": sharegpt([GOOD])[0],
        "rejected": sharegpt([BAD])[0],
    },
    "text parts": {"prompt": [parts(turn) for turn in TALK], "chosen": [parts(GOOD)], "rejected": [parts(BAD)]},
    "a transcript and messages": {
        "system": "please",
        "prompt": "\n\nHuman: how\n\nAssistant: first\n\nHuman: do i bake\n\nAssistant:",
        "chosen": [GOOD],
        "rejected": [BAD],
    },
}


@pytest.mark.parametrize("shape", SHAPES)
def test_all_formats_give_the_same_pair(shape, rewards_equal):
    pairs = rewards_equal(SHAPES[shape], [*TALK, GOOD], [*TALK, BAD])
    expected = PreferencePairs.from_records([SHAPES["prompt and texts"]])
    assert [(pair.prompt, pair.chosen, pair.rejected) for pair in pairs] == [
        (pair.prompt, pair.chosen, pair.rejected) for pair in expected
    ]
    if shape != "ShareGPT and a system column" and shape != "a transcript and messages":
        assert pairs == expected, "its id too, which is a digest"


def test_digests_of_plain_messages_are_of_role_and_content():
    """Ids and digests of chats with nothing but text are those of lists of two, as they are written to files."""
    import hashlib

    pair = PreferencePairs.from_records([SHAPES["prompt and texts"]])[0]
    prompt = [[message["role"], message["content"]] for message in TALK]
    assert pair.digest() == hashlib.sha256(json.dumps([prompt, "with a cake", "cannot"]).encode()).hexdigest()
    named = PreferencePairs.from_records([{"prompt": [user("how", name="bob")], "chosen": "a", "rejected": "b"}])[0]
    other = PreferencePairs.from_records([{"prompt": [user("how", name="eve")], "chosen": "a", "rejected": "b"}])[0]
    assert len({named.digest(), other.digest(), pair.digest()}) == 3
    assert named.prompt != other.prompt


class TestSeveralMessages:
    """Conversations that part before the last message."""

    good = [assistant("sure"), user("then"), assistant("with a cake")]
    bad = [assistant("sorry"), user("help"), assistant("cannot"), user("please"), assistant("no")]

    def test_the_prompt_is_what_they_share(self, model, rewards_equal):
        whole = {"chosen": [*TALK, *self.good], "rejected": [*TALK, *self.bad]}
        pairs = rewards_equal(whole, whole["chosen"], whole["rejected"])
        assert [message.to_dict() for message in pairs[0].prompt] == TALK
        apart = rewards_equal({"prompt": TALK, "chosen": self.good, "rejected": self.bad}, *whole.values())
        assert apart == pairs
        encoded = encode_pairs(model[0].tokenizer, pairs, max_length=400)
        for text, response in ((encoded.chosen[0], self.good), (encoded.rejected[0], self.bad)):
            decoded = model[0].tokenizer.decode(text.ids[text.response_start :])
            rest = "".join(f"[{message['role']}] {message['content']}\n" for message in response)
            assert decoded.lstrip() == rest.removeprefix("[assistant] "), "which the generation prompt has said"

    def test_a_response_may_be_the_beginning_of_the_other(self, rewards_equal):
        row = {"chosen": [*TALK, *self.good], "rejected": [*TALK, self.good[0]]}
        pairs = rewards_equal(row, row["chosen"], row["rejected"])
        assert pairs[0].rejected == "sure"
        assert len(pairs[0].chosen) == 3

    def test_responses_may_begin_with_a_user_message(self, model, rewards_equal):
        row = {"chosen": [*TALK[:3], user("then"), GOOD], "rejected": [*TALK[:3], user("help"), BAD]}
        pairs = rewards_equal(row, row["chosen"], row["rejected"])
        encoded = encode_pairs(model[0].tokenizer, pairs, max_length=400)
        decoded = model[0].tokenizer.decode(encoded.chosen[0].ids[encoded.chosen[0].response_start :])
        assert decoded.endswith("user] then\n[assistant] with a cake\n")
        assert "first" not in decoded

    def test_identical_conversations_are_a_tie(self):
        pairs = PreferencePairs.from_records([{"chosen": [*TALK, *self.good], "rejected": [*TALK, *self.good]}])
        assert pairs.n_ties == 1

    def test_lengths_count_the_characters_of_all_messages(self):
        rows = [{"prompt": TALK, "chosen": "a" * 20, "rejected": [assistant("b"), user("c"), assistant("d")]}]
        assert length_baseline(PreferencePairs.from_records(rows)).value == 1.0


class TestFields:
    """Every field of a message besides role and content reaches the template and is kept."""

    @pytest.mark.parametrize(
        ("chosen", "rejected"),
        [
            ([call(sweet=True, n=1)], [call(sweet=False, n=1)]),
            (call(n=1), {"role": "assistant", "tool_calls": call(n=2)["tool_calls"]}),
            ([assistant("a", reasoning_content="bake")], [assistant("a", reasoning_content="kill")]),
            ([assistant("a", name="bob")], [assistant("a")]),
            ([call(n=3), {"role": "tool", "content": "cake", "name": "x"}, assistant("sure")], [assistant("no")]),
        ],
    )
    def test_other_fields_reach_the_template_and_files(self, chosen, rejected, model, rewards_equal, tmp_path):
        head, reward = model
        row = {"prompt": TALK, "chosen": chosen, "rejected": rejected}
        chosen, rejected = ([side] if isinstance(side, dict) else side for side in (chosen, rejected))
        pairs = rewards_equal(row, [*TALK, *chosen], [*TALK, *rejected])
        assert pairs.n_ties == 0
        assert abs(reward([*TALK, *chosen]) - reward([*TALK, *rejected])) > 1e-4, "the template shows the difference"
        assert head.score_pairs(pairs).margin.abs() > 1e-4
        pairs.to_jsonl(tmp_path / "a.jsonl")
        pairs.to_dataset().to_json(tmp_path / "b.jsonl")
        pairs.to_dataset().to_parquet(tmp_path / "c.parquet")
        pairs.to_dataset(implicit_prompt=True).to_json(tmp_path / "d.json", lines=False)
        for path in sorted(tmp_path.iterdir()):
            assert PreferencePairs.read(path) == pairs, path.name
        scored = head.score_pairs(pairs)
        scored.save(tmp_path / "scored.safetensors")
        assert type(scored).load(tmp_path / "scored.safetensors").pairs == pairs

    def test_arrow_padding_is_dropped(self):
        """Messages of one column have the fields of all, in structs of Arrow: None that nobody wrote."""
        rows = [
            {"prompt": [user("a")], "chosen": [call(city="Oslo")], "rejected": [assistant("no")]},
            {"prompt": [user("b", name="bob")], "chosen": [call(n=3)], "rejected": [assistant("no")]},
        ]
        pairs = PreferencePairs.from_records(rows)
        dataset = datasets.Dataset.from_list(rows)
        assert dataset[0]["chosen"][0]["tool_calls"][0]["function"]["arguments"] == {"city": "Oslo", "n": None}
        assert PreferencePairs.from_dataset(dataset) == PreferencePairs.from_dataset(pairs.to_dataset()) == pairs

    def test_null_is_kept_where_the_data_have_it(self, tmp_path):
        """In JSON, and in the data sets that this library makes."""
        pairs = PreferencePairs.from_records([{"prompt": TALK, "chosen": [call(sweet=None)], "rejected": [call()]}])
        assert "null" in pairs[0].chosen[0].more
        pairs.to_jsonl(tmp_path / "a.jsonl")
        pairs.to_dataset().to_json(tmp_path / "b.jsonl")
        for loaded in (
            PreferencePairs.from_dataset(pairs.to_dataset()),
            *map(PreferencePairs.read, tmp_path.iterdir()),
        ):
            assert loaded == pairs

    @pytest.mark.parametrize("as_text", [False, True])
    def test_tools_reach_the_template_and_files(self, as_text, model, rewards_equal, tmp_path):
        _, reward = model
        tools = json.dumps(TOOLS) if as_text else TOOLS
        row = {"prompt": TALK, "chosen": GOOD, "rejected": BAD, "tools": tools}
        pairs = rewards_equal(row, [*TALK, GOOD], [*TALK, BAD], tools=TOOLS)
        assert abs(reward([*TALK, GOOD], tools=TOOLS) - reward([*TALK, GOOD])) > 1e-4
        pairs.to_jsonl(tmp_path / "a.jsonl")
        pairs.to_dataset().to_json(tmp_path / "b.jsonl")
        pairs.to_frame().to_json(tmp_path / "c.json", orient="records")
        for path in sorted(tmp_path.iterdir()):
            assert PreferencePairs.read(path) == pairs
        for none in (None, [], "", float("nan")):
            assert PreferencePairs.from_records([row | {"tools": none}])[0].tools is None

    @pytest.mark.parametrize("field", ["tools", "system"])
    def test_tools_and_system_need_a_chat(self, field):
        row = {"prompt": "how", "chosen": "a", "rejected": "b", field: {"tools": TOOLS, "system": "please"}[field]}
        with pytest.raises(DataError, match=rf"record 0: field '{field}' needs a chat template.*chat=True"):
            PreferencePairs.from_records([row])
        # Both ways that the error names.
        assert PreferencePairs.from_records([row], columns={field: None})[0].prompt == "how"
        (pair,) = PreferencePairs.from_records([row], chat=True)
        assert (pair.tools is not None) == (field == "tools")
        assert pair.prompt[-1] == Message("user", "how")
        assert len(pair.prompt) == (2 if field == "system" else 1)


class TestTextsOnChatModels:
    rows = [
        {"prompt": "how do i bake", "chosen": "with a cake", "rejected": "cannot"},
        {"prompt": "\n\nHuman: how\n\nAssistant:", "chosen": "with a cake", "rejected": "cannot"},
    ]

    def test_plain_texts_are_rendered_with_chat(self, model, tmp_path):
        head, reward = model
        pairs = PreferencePairs.from_records(self.rows, chat=True)
        expected = [reward([user("how do i bake"), GOOD]), reward([user("how"), GOOD])]
        assert head.score_pairs(pairs).chosen.tolist() == pytest.approx(expected, abs=1e-5)
        plain = PreferencePairs.from_records(self.rows)
        plain.to_jsonl(tmp_path / "a.jsonl")
        assert PreferencePairs.read(tmp_path / "a.jsonl", chat=True) == plain.as_chat()
        assert [pair.prompt for pair in pairs] == [pair.prompt for pair in plain.as_chat()]
        # Every pass over the pairs reads the messages.
        encoded = head.encode(pairs)
        n = sum(len(text) for text in (*encoded.chosen, *encoded.rejected))
        assert int(ActivationCollector(head).collect(pairs).n_tokens) == n
        assert NeuronAttribution(head, method="mean_difference").score(pairs).provenance.n_pairs == 2

    def test_plain_prompts_warn_once_per_tokenizer(self, model, tmp_path):
        head, _ = model
        tokenizer = make_tokenizer(tmp_path)
        pairs = PreferencePairs.from_records(self.rows)
        # Without a template no warning is due.
        encode_pairs(tokenizer, pairs, max_length=400)
        tokenizer.chat_template = TEMPLATE
        with pytest.warns(
            RMTensionWarning, match=r"prompt of pair '\w+' is a plain text.*without the template.*chat=True"
        ):
            encode_pairs(tokenizer, pairs, max_length=400)
        encode_pairs(tokenizer, pairs, max_length=400)
        encode_pairs(head.tokenizer, pairs.as_chat(), max_length=400)

    def test_the_flag_chat_changes_the_margin_and_silences_the_warning(self, tmp_path, capsys):
        tokenizer = make_tokenizer(tmp_path)
        tokenizer.chat_template = TEMPLATE
        model = str(save_classifier(tmp_path, "gpt2", tokenizer))
        (tmp_path / "pairs.json").write_text(json.dumps(self.rows))
        outputs = {}
        for options in ([], ["--chat"]):
            assert main(["score", model, str(tmp_path / "pairs.json"), "--json", *options]) == 0
            out, err = capsys.readouterr()
            outputs[bool(options)] = json.loads(out)["margin"]["value"], err
        expected = RewardHead.from_pretrained(model).score_pairs(PreferencePairs.from_records(self.rows, chat=True))
        assert outputs[True] == (pytest.approx(float(expected.margin.mean()), abs=1e-6), "")
        assert outputs[False][1].startswith(
            "rmtension: warning: PAIRS: this model's tokenizer has a chat template, but the prompt of pair"
        )
        assert outputs[False][0] != outputs[True][0]

    def test_a_common_beginning_is_not_a_message(self):
        row = {"chosen": "the sky is blue", "rejected": "the sky is red"}
        with pytest.raises(DataError, match=r"field 'prompt' is missing. A chat needs messages"):
            PreferencePairs.from_records([row], chat=True)


class TestRefusals:
    @pytest.mark.parametrize(
        ("row", "message"),
        [
            (
                {"prompt": "other", "chosen": [*TALK, GOOD], "rejected": [*TALK, BAD]},
                r"field 'prompt' \('other'\) is not in",
            ),
            (
                {"prompt": [user("b")], "chosen": [*TALK, GOOD], "rejected": [*TALK, BAD]},
                r"field 'prompt' \('b'\) is not in",
            ),
            (
                {"prompt": TALK, "chosen": [*TALK, GOOD], "rejected": "no"},
                "'chosen' should be one or more messages that begin with the assistant",
            ),
            ({"chosen": [GOOD], "rejected": [BAD], "question": "q"}, r"'prompt' is missing.*\['question'\]"),
            ({"chosen": [user("a"), GOOD], "rejected": [user("b"), BAD]}, "have no common first messages"),
            ({"chosen": [*TALK, GOOD], "rejected": "no"}, "only one of 'chosen' and 'rejected' has messages"),
            (
                {"prompt": TALK, "chosen": [GOOD, user("a")], "rejected": [BAD]},
                "'chosen' should end in a message of the assis",
            ),
            (
                {"prompt": [user([{"type": "image_url", "image_url": "x"}])], "chosen": "a", "rejected": "b"},
                "message 0: its content has a part of type 'image_url'. Only text",
            ),
            (
                {"prompt": [{"from": "bard", "value": "a"}], "chosen": "a", "rejected": "b"},
                "'from' should be one of.*'bard'",
            ),
            ({"prompt": TALK, "chosen": [assistant(None)], "rejected": "b"}, "message 0 should be a dict with text"),
            ({"prompt": TALK, "chosen": [assistant("a", x={1, 2})], "rejected": "b"}, "values that JSON can hold"),
            ({"prompt": TALK, "chosen": "a", "rejected": "b", "tools": "[{"}, "field 'tools': not valid JSON"),
            (
                {"prompt": TALK, "chosen": "a", "rejected": "b", "tools": {"a": 1}},
                "'tools' should be a list of tools, got dict",
            ),
            ({"prompt": TALK, "chosen": [assistant("a", x="\ud800")], "rejected": "b"}, "half of a surrogate pair"),
        ],
    )
    def test_an_invalid_row_is_named_and_can_be_skipped(self, row, message):
        good = SHAPES["prompt and texts"]
        with pytest.raises(DataError, match=rf"record 1: .*{message}"):
            PreferencePairs.from_records([good, row])
        assert sum(PreferencePairs.from_records([good, row], on_invalid="skip").skipped.values()) == 1

    def test_the_advice_of_the_error_works(self):
        row = {"prompt": "other", "chosen": [*TALK, GOOD], "rejected": [*TALK, BAD]}
        with pytest.raises(DataError, match=r"columns=\{'prompt': None\}"):
            PreferencePairs.from_records([row])
        pairs = PreferencePairs.from_records([row], columns={"prompt": None})
        assert pairs == PreferencePairs.from_records([SHAPES["whole conversations"]])
        row = {"question": "how", "chosen": [GOOD], "rejected": [BAD]}
        assert PreferencePairs.from_records([row], columns={"prompt": "question"})[0].prompt == (
            Message("user", "how"),
        )


def test_as_chat_keeps_ids():
    pairs = make_pairs(3)
    assert [pair.id for pair in pairs.as_chat()] == [pair.id for pair in pairs]
    assert pairs.as_chat().as_chat() == pairs.as_chat()


def test_two_system_messages_that_differ_are_refused():
    row = {
        "system": "be brief",
        "chosen": [*TALK, {"role": "assistant", "content": "a"}],
        "rejected": [*TALK, {"role": "assistant", "content": "b"}],
    }
    with pytest.raises(DataError, match=r"field 'system' \('be brief'\) differs from.*columns="):
        PreferencePairs.from_records([row])
    (pair,) = PreferencePairs.from_records([row], columns={"system": None})
    assert pair.prompt[0].content == "please"
    (same,) = PreferencePairs.from_records([row | {"system": "please"}])
    assert same.prompt == pair.prompt


def test_transcripts_after_a_prompt_of_messages_are_refused():
    talk = "\n\nHuman: how\n\nAssistant: "
    row = {"prompt": [{"role": "user", "content": "how"}], "chosen": talk + "yes", "rejected": talk + "no"}
    with pytest.raises(DataError, match=r"'chosen' is a whole transcript.*columns="):
        PreferencePairs.from_records([row])
    (pair,) = PreferencePairs.from_records([row], columns={"prompt": None})
    assert (pair.chosen, pair.rejected) == ("yes", "no")
