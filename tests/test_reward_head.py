"""Rewards are transformers' own, in any batch and padding; the model comes back as it was; bad checkpoints say why."""

import pytest
import torch
import transformers
from model_states import snapshot
from reference import transformers_rewards
from tiny_models import CONTEXT, EOS, FAMILIES, grid, make_tokenizer, save_classifier

from rmtension import NeuronSet, PreferencePairs, RewardHead
from rmtension.errors import DataError, ModelError, OptionError


@pytest.mark.parametrize("family", grid(FAMILIES))
def test_rewards_equal_transformers(checkpoints, ragged_texts, family, record_property):
    expected = transformers_rewards(checkpoints[family], ragged_texts)
    head = RewardHead.from_pretrained(checkpoints[family])
    tokenizer = head.tokenizer
    results = {
        "one at a time": torch.cat([head.score([text]) for text in ragged_texts]),
        "batches": head.score(ragged_texts),
    }
    for side in ("left", "right"):
        tokens = tokenizer(ragged_texts, return_tensors="pt", padding=True, padding_side=side)
        results[f"{side} padding"] = head.score_tokens(tokens["input_ids"], tokens["attention_mask"])
    assert expected.std() > 0.05, "the rewards must differ for this test to mean anything"
    for how, rewards in results.items():
        difference = float((rewards - expected).abs().max())
        print(f"{family}, {how}: max |difference| to transformers over {len(ragged_texts)} texts = {difference:.1e}")
        assert difference <= 1e-5, how
    # Negative control: the check above rejects a reward read one token too early.
    tokens = [tokenizer(text)["input_ids"][:-1] for text in ragged_texts]
    early = torch.cat([head.score_tokens(torch.tensor([ids or [0]])) for ids in tokens])
    assert float((early - expected).abs().max()) > 1e-2


@pytest.mark.parametrize("family", grid(FAMILIES))
def test_float64_is_exact(checkpoints, ragged_texts, family):
    """In float64 only the order of sums differs, so 1e-12 leaves three digits to spare."""
    expected = transformers_rewards(checkpoints[family], ragged_texts, dtype=torch.float64)
    rewards = RewardHead.from_pretrained(checkpoints[family], dtype=torch.float64).score(ragged_texts)
    assert float((rewards - expected).abs().max()) < 1e-12


def test_pad_equal_to_eos_is_read_where_transformers_reads(tmp_path):
    """With pad == eos transformers skips a text's own final eos, and so does the head, in batches too."""
    tokenizer = make_tokenizer(tmp_path, pad=EOS)
    save_classifier(tmp_path, "gpt2", tokenizer, pad_token_id=0)
    texts = [f"bake a cake{EOS}", f"sorry{EOS}{EOS}", "please help", EOS]
    expected = transformers_rewards(tmp_path, texts)
    rewards = RewardHead.from_pretrained(tmp_path).score(texts)
    assert torch.allclose(rewards, expected, atol=1e-6)
    without = RewardHead.from_pretrained(tmp_path).score(["bake a cake"])
    assert torch.allclose(rewards[0], without[0], atol=1e-6)


def test_a_distinct_pad_token_reads_the_eos(checkpoints):
    """Negative control of the test above: where pad and eos differ, a final eos is the token that is read."""
    head = RewardHead.from_pretrained(checkpoints["gpt2"])
    texts = [f"bake a cake{EOS}", "bake a cake"]
    rewards = head.score(texts)
    assert torch.allclose(rewards, transformers_rewards(checkpoints["gpt2"], texts), atol=1e-6)
    assert abs(float(rewards[0] - rewards[1])) > 1e-3


def test_a_bias_is_added_and_a_matrix_weight_accepted(head, ragged_texts):
    weight = head.weight[None] * 2
    doubled = RewardHead(head.model, (weight, 3.0), tokenizer=head.tokenizer, pad_token_id=head.pad_token_id)
    assert torch.allclose(doubled.score(ragged_texts), 2 * head.score(ragged_texts) + 3, atol=1e-5)


def test_a_bridge_with_a_passed_weight_scores_hidden_states(tmp_path, tokenizer, ragged_texts):
    """A bridge that the user booted, with a weight of the user's: that weight on transformers' hidden state."""
    from tiny_models import make_config
    from transformer_lens.model_bridge import TransformerBridge

    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(make_config("llama", len(tokenizer))).eval()
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    bridge = TransformerBridge.boot_transformers(str(tmp_path), device="cpu", dtype=torch.float32)
    weight = torch.randn(32)
    rewards = RewardHead(bridge, weight=weight, tokenizer=tokenizer).score(ragged_texts)
    with torch.no_grad():
        expected = [
            model.base_model(**tokenizer(text, return_tensors="pt")).last_hidden_state[0, -1] @ weight
            for text in ragged_texts
        ]
    assert torch.allclose(rewards, torch.stack(expected), atol=1e-5)


def test_scoring_leaves_the_model_as_it_was(checkpoints, pairs):
    """Hooks, parameters, requires_grad and training mode; the head runs in eval mode although the model trains."""
    head = RewardHead.from_pretrained(checkpoints["gpt2"])
    expected = head.score_pairs(pairs).margin
    head.body.module.train()
    for parameter in list(head.model.parameters())[:3]:
        parameter.requires_grad_(True)
    before = snapshot(head)
    assert torch.equal(head.score_pairs(pairs).margin, expected)
    assert snapshot(head) == before
    # With a hook of the user's on it the bridge runs instead: in eval mode too, without its dropout.
    head.model.train()
    with head.model.hooks(fwd_hooks=[("blocks.0.mlp.hook_post", lambda activation, hook: activation)]):
        hooked = [head.score_pairs(pairs).margin for _ in range(2)]
    assert torch.equal(hooked[0], hooked[1])
    assert torch.allclose(hooked[0], expected, atol=1e-5)
    assert head.model.training


def test_identical_responses_tie_and_are_counted(head):
    made = PreferencePairs.from_records(
        [
            {"prompt": "help", "chosen": "sure", "rejected": "sure"},
            {"prompt": "help", "chosen": "sure", "rejected": "cannot"},
        ]
    )
    scored = head.score_pairs(made)
    assert made.n_ties == 1
    assert scored.tied.tolist() == [True, False]
    assert scored.accuracy() == pytest.approx((0.5 + float(scored.correct[1])) / 2)
    assert scored.accuracy(tie_value=0.0) == pytest.approx(float(scored.correct[1]) / 2)


def test_swapping_flips_margins_and_order_does_not_matter(exact_head, pairs):
    scored = exact_head.score_pairs(pairs)
    swapped = exact_head.score_pairs(pairs.swapped())
    assert torch.allclose(swapped.margin, -scored.margin, atol=1e-12)
    backwards = exact_head.score_pairs(pairs[::-1])
    assert torch.allclose(backwards.margin.flip(0), scored.margin, atol=1e-12)


def test_scored_pairs_load_as_saved(head, pairs, tmp_path):
    from rmtension import PairRewards

    scored = head.score_pairs(pairs)
    scored.save(tmp_path / "scored.safetensors")
    loaded = PairRewards.load(tmp_path / "scored.safetensors")
    assert torch.equal(loaded.margin, scored.margin)
    assert loaded.pairs == scored.pairs
    assert loaded.provenance == scored.provenance
    assert loaded.to_frame().equals(scored.to_frame())


def test_fingerprint_follows_the_weights(checkpoints, tmp_path, tokenizer):
    first, same = (RewardHead.from_pretrained(checkpoints["gpt2"]) for _ in range(2))
    assert first.fingerprint == same.fingerprint
    other = RewardHead.from_pretrained(save_classifier(tmp_path, "gpt2", tokenizer, seed=1))
    assert other.fingerprint != first.fingerprint
    assert other.architecture == first.architecture == "gpt2-3x64-heads4x8-d32"
    with torch.no_grad():
        next(same.model.original_model.base_model.parameters()).view(-1)[0] += 1e-3
    assert same.fingerprint != first.fingerprint


class TestBadCheckpoints:
    def test_a_language_model_without_a_head_is_refused(self, tmp_path, tokenizer):
        from tiny_models import make_config

        transformers.AutoModelForCausalLM.from_config(make_config("gpt2", len(tokenizer))).save_pretrained(tmp_path)
        tokenizer.save_pretrained(tmp_path)
        with pytest.raises(ModelError, match=r"GPT2LMHeadModel.*no score head.*from_language_model"):
            RewardHead.from_pretrained(tmp_path)
        base = RewardHead.from_language_model(tmp_path)
        with pytest.raises(ModelError, match="has no reward"):
            base.score(["help"])

    def test_two_outputs_without_a_choice_are_refused(self, tmp_path, tokenizer):
        save_classifier(tmp_path, "gpt2", tokenizer, num_labels=2)
        with pytest.raises(ModelError, match="one output, got 2"):
            RewardHead.from_pretrained(tmp_path)

    def test_a_missing_score_head_is_refused(self, tmp_path, tokenizer):
        from safetensors.torch import load_file, save_file

        save_classifier(tmp_path, "llama", tokenizer)
        weights = load_file(tmp_path / "model.safetensors")
        del weights["score.weight"]
        save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
        with pytest.raises(ModelError, match=r"lacks \['score.weight'\]"):
            RewardHead.from_pretrained(tmp_path)

    def test_a_missing_pad_token_is_refused(self, tmp_path):
        tokenizer = make_tokenizer(tmp_path, pad=None)
        save_classifier(tmp_path, "gpt2", tokenizer, pad_token_id=None)
        assert RewardHead.from_language_model(tmp_path).pad_token_id is None, "nothing is read, so nothing is asked"
        with pytest.raises(ModelError, match=r"pad token.*pad_token='<eos>'"):
            RewardHead.from_pretrained(tmp_path)
        with pytest.raises(ModelError, match="not in the vocabulary"):
            RewardHead.from_pretrained(tmp_path, pad_token="<nothing>")
        head = RewardHead.from_pretrained(tmp_path, pad_token=EOS)
        texts = ["bake a cake", "sorry"]
        assert torch.allclose(head.score(texts), transformers_rewards(tmp_path, texts), atol=1e-6)

    def test_a_missing_checkpoint_is_refused(self, tmp_path):
        with pytest.raises(ModelError, match="expected the folder of a checkpoint or a hub name"):
            RewardHead.from_pretrained(tmp_path / "nothing")

    def test_an_unhooked_model_is_refused(self):
        with pytest.raises(ModelError, match=r"TransformerBridge or a HookedTransformer, got Linear"):
            RewardHead(torch.nn.Linear(2, 2), weight=torch.ones(2))

    def test_a_weight_of_another_width_is_refused(self, head):
        with pytest.raises(ModelError, match=r"weight: expected a head with one output, got 2"):
            RewardHead(head.model, weight=torch.ones(2, 32))

    def test_nonfinite_rewards_are_refused(self, head):
        broken = RewardHead(head.model, weight=head.weight * float("nan"), tokenizer=head.tokenizer)
        with pytest.raises(ModelError, match=r"text 0 got the reward nan: .* weights in the reward head"):
            broken.score(["help"])


class TestRunOptions:
    """Run options: every constructor takes them, and copies of a head keep them."""

    SAID = {
        "max_length": 40,
        "tokens_per_batch": 100,
        "truncate_response": True,
        "on_nonfinite": "skip",
        "two_segments": True,
    }

    def of(self, head):
        return {name: getattr(head, name) for name in self.SAID}

    def test_every_constructor_takes_run_options(self, checkpoints, tokenizer, head, tmp_path):
        classifier = transformers.AutoModelForSequenceClassification.from_pretrained(checkpoints["gpt2"])
        opened = [
            RewardHead(head.model, head.weight, tokenizer=tokenizer, **self.SAID),
            RewardHead.from_pretrained(checkpoints["gpt2"], **self.SAID),
            RewardHead.from_language_model(checkpoints["gpt2"], **self.SAID),
            RewardHead.from_classifier(classifier, tokenizer=tokenizer, **self.SAID),
        ]
        some = NeuronSet.from_indices([(0, 1)], shape=(3, 64), site="mlp", architecture=head.architecture)
        opened.append(opened[1].with_ablation(some))
        assert [self.of(head) for head in opened] == [self.SAID] * len(opened)

    def test_run_options_have_their_defaults(self, head):
        defaults = {
            "tokens_per_batch": None,
            "truncate_response": False,
            "on_nonfinite": "raise",
            "two_segments": False,
        }
        assert self.of(head) == {"max_length": CONTEXT, **defaults}

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"on_nonfinite": "skp"}, "on_nonfinite: .* Did you mean 'skip'"),
            ({"truncate_response": 1}, "truncate_response: expected True or False, got 1"),
            ({"tokens_per_batch": 0}, "tokens_per_batch: expected a positive number, got 0"),
            ({"max_length": 0}, rf"max_length: expected 1 to {CONTEXT}"),
            ({"max_lenght": 3}, "'max_lenght'.* Did you mean 'max_length'"),
        ],
    )
    def test_wrong_run_options_are_refused(self, options, message, checkpoints, head):
        for call in (
            lambda: RewardHead(head.model, head.weight, **options),
            lambda: RewardHead.from_pretrained(checkpoints["gpt2"], **options),
            lambda: RewardHead.from_language_model(checkpoints["gpt2"], **options),
        ):
            with pytest.raises(OptionError, match=message):
                call()


class TestBadTexts:
    def test_a_single_string_is_refused(self, head):
        with pytest.raises(OptionError, match="Put it in a list"):
            head.score("help")

    def test_too_long_texts_are_refused_or_cut(self, head):
        text = " ".join(["cake"] * (CONTEXT + 40))
        with pytest.raises(DataError, match=rf"text 0 has \d+ tokens, the context holds {CONTEXT}"):
            head.score([text])
        ids = head.tokenizer(text)["input_ids"][-CONTEXT:]
        assert torch.allclose(head.score([text], truncate=True), head.score_tokens(torch.tensor([ids])), atol=1e-6)

    def test_scoring_without_a_tokenizer_is_refused(self, head):
        with pytest.raises(ModelError, match="tokenizer"):
            RewardHead(head.model, weight=head.weight).score(["help"])

    def test_max_length_beyond_the_context_is_refused(self, head):
        with pytest.raises(OptionError, match="max_length"):
            RewardHead(head.model, weight=head.weight, max_length=CONTEXT + 1)

    def test_too_many_tokens_are_refused(self, head):
        with pytest.raises(
            OptionError, match=rf"input_ids: expected at most {CONTEXT} tokens per row .*got {CONTEXT + 1}"
        ):
            head.score_tokens(torch.ones(1, CONTEXT + 1, dtype=torch.long))

    def test_a_mask_with_an_empty_row_is_refused(self, head):
        with pytest.raises(OptionError, match="attention_mask"):
            head.score_tokens(torch.ones(2, 3, dtype=torch.long), torch.tensor([[1, 1, 1], [0, 0, 0]]))


def test_a_head_that_changed_in_memory_is_not_scored_with_its_old_copy(checkpoints, tokenizer, ragged_texts):
    """The body is shared and the head is a copy: after a training step they would not match."""
    load = transformers.AutoModelForSequenceClassification.from_pretrained
    model = load(checkpoints["llama"], dtype=torch.float32)
    head = RewardHead.from_classifier(model, tokenizer=tokenizer)
    before = head.score(ragged_texts[:4])
    some = NeuronSet.from_indices([(0, 1)], shape=(3, 48), site="mlp", architecture=head.architecture)
    ablated = head.with_ablation(some)
    model.score.requires_grad_(True)
    optimizer = torch.optim.AdamW(model.score.parameters(), lr=0.1)
    model(**tokenizer(ragged_texts[0], return_tensors="pt")).logits.sum().backward()
    optimizer.step()
    for call in (lambda: head.score(ragged_texts[:4]), head.check):
        with pytest.raises(ModelError, match=r"score layer changed.*RewardHead.from_classifier"):
            call()
    again = RewardHead.from_classifier(model, tokenizer=tokenizer).score(ragged_texts[:4])
    with torch.no_grad():
        right = [model(**tokenizer(text, return_tensors="pt")).logits[0, 0] for text in ragged_texts[:4]]
    assert torch.allclose(again, torch.stack(right), atol=1e-5)
    assert (again - before).abs().min() > 1e-3
    assert ablated.score(ragged_texts[:4]).isfinite().all()  # a copy of its own
