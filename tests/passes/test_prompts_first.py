"""Gradients at the response: prompts run first, without gradients; scores are those of texts alone, in float64."""

from collections import Counter
from dataclasses import replace

import pytest
import torch
from packed_pairs import pairs_of_all_kinds
from tiny_models import batches_of, close_to, grid, make_pairs

from rmtension import AblationContext, Mean, NeuronAttribution, PreferencePairs, RewardHead, Zero
from rmtension.attribution import score_together
from rmtension.attribution._batch_run import BatchRun
from rmtension.bodies import _prompt_runs
from rmtension.heads import Head
from rmtension.passes import ActivationCollector

FAMILIES = ("gpt2", "llama", "gpt_neox")


@pytest.fixture(scope="module", params=grid(FAMILIES))
def head(request, checkpoints):
    return RewardHead.from_pretrained(checkpoints[request.param], dtype=torch.float64)


@pytest.fixture(scope="module")
def few():
    return pairs_of_all_kinds()


@pytest.fixture
def rows_run(monkeypatch):
    """The shapes of the batches that were differentiated, and whether their prompts ran first."""
    seen = []
    run = BatchRun._run

    def counted(self, **options):
        seen.append((*self.batch.input_ids.shape, self.batch.prompts is not None))
        return run(self, **options)

    monkeypatch.setattr(BatchRun, "_run", counted)
    return seen


def attributions(head, pairs, positions):
    """Every method that runs backward once, at all sites that it has, with constants in place of activations."""
    mean = Mean(ActivationCollector(head).collect(pairs))
    site = {"positions": positions}
    return [
        NeuronAttribution(head, "gradient_x_activation", **site),
        NeuronAttribution(head, "gradient_x_activation", site="attn_head", **site),
        NeuronAttribution(head, "attribution_patching", replacement=mean, **site),
        NeuronAttribution(head, "attribution_patching", aggregate="absolute", replacement=mean, graddrop=True, **site),
        NeuronAttribution(head, "relp", replacement=mean, **site),
        NeuronAttribution(head, "direct_effect", **site),
        NeuronAttribution(head, "mean_difference", **site),
    ]


def scores_of(head, pairs, positions):
    return [scores.values for scores in score_together(attributions(head, pairs, positions), pairs)]


@pytest.mark.parametrize("positions", ["response", "last"])
def test_scores_are_those_of_texts_alone(head, few, positions, rows_run, monkeypatch):
    first = scores_of(head, few, positions)
    assert any(prompts for *_, prompts in rows_run)
    monkeypatch.setattr("rmtension.bodies._bodies.BridgeBody.pack_up_to", 0)
    rows_run.clear()
    alone = scores_of(head, few, positions)
    assert not any(prompts for *_, prompts in rows_run)
    for values, expected in zip(first, alone, strict=True):
        assert float(expected.abs().max()) > 1e-4
        assert torch.allclose(values, expected, **close_to(head))


def test_scores_of_all_tokens_need_the_prompt(head, few, rows_run):
    """Negative control: at all tokens prompts count, and are differentiated."""
    options = {"method": "gradient_x_activation"}
    everywhere = NeuronAttribution(head, positions="all", **options).score(few).values
    assert not any(prompts for *_, prompts in rows_run)
    assert not torch.allclose(everywhere, NeuronAttribution(head, positions="response", **options).score(few).values)
    assert any(prompts for *_, prompts in rows_run)


def test_nothing_before_the_response_is_differentiated(head, few, rows_run):
    NeuronAttribution(head, "gradient_x_activation", positions="response").score(few)
    encoded = head.encode(few)
    longest = max(
        len(chosen) + len(rejected) - chosen.response_start - rejected.response_start
        for chosen, rejected in zip(encoded.chosen, encoded.rejected, strict=True)
    )
    after = [width for _, width, prompts in rows_run if prompts]
    assert after
    assert max(after) <= longest


def test_prompts_run_once_for_several_batches(checkpoints, few, monkeypatch):
    head = RewardHead.from_pretrained(checkpoints["gpt2"], dtype=torch.float64, tokens_per_batch=32)
    assert head.runs_prompts_first  # the trial run, before runs are counted
    run = _prompt_runs.PromptRuns._run_bucket
    seen = []

    def counted(self, device, texts):
        seen.extend(texts)
        return run(self, device, texts)

    monkeypatch.setattr(_prompt_runs.PromptRuns, "_run_bucket", counted)
    attribution = NeuronAttribution(head, "gradient_x_activation", positions="response")
    scores = attribution.score(few).values
    ran = Counter(seen)
    batches = [batch for batch in batches_of(head, few, sharing="after prompt") if batch.prompts is not None]
    assert len({id(batch.prompts.run) for batch in batches}) < len(batches)
    runs = {id(batch.prompts.run): batch.prompts.run for batch in batches}.values()
    assert ran == Counter(text for run in runs for text in run.texts)
    whole = RewardHead.from_pretrained(checkpoints["gpt2"], dtype=torch.float64)
    assert torch.allclose(
        scores, NeuronAttribution(whole, "gradient_x_activation", positions="response").score(few).values, atol=1e-9
    )


def test_prompts_hold_keys_and_values_alone(head, few):
    """Not the joint projection that they are views of in GPT-2 and GPT-NeoX, whose queries would stay in memory."""
    prompts = next(
        batch.prompts for batch in batches_of(head, few, sharing="after prompt") if batch.prompts is not None
    )
    head.body.prompt_runs.run(prompts)
    states = [part for bucket in prompts.run.states for layer in bucket for part in layer]
    assert len(states) == 2 * head.n_layers * len(prompts.run.buckets)
    assert all(part.untyped_storage().nbytes() == part.nbytes for part in states)


def test_a_repeated_prompt_runs_once(head):
    prompt = make_pairs(1)[0].prompt
    responses = [("help a cake", "help a python"), ("the bread", "cake and bread"), ("sure", "sure a cake")]
    pairs = PreferencePairs.from_records(
        [{"prompt": prompt, "chosen": chosen, "rejected": rejected} for chosen, rejected in responses]
    )
    (batch,) = batches_of(head, pairs, sharing="after prompt")
    assert batch.prompts is not None
    assert [len(batch.input_ids), len(batch.prompts.run.texts)] == [3, 1]
    attribution = NeuronAttribution(head, "gradient_x_activation", positions="response")
    together = attribution.score(pairs).values
    singly = torch.stack([attribution.score(pairs[number : number + 1]).values for number in range(3)])
    assert torch.allclose(together, singly.mean(0), **close_to(head))


@pytest.mark.parametrize("tokens", [16, 64, 10_000])
def test_batches_of_any_size_hold_every_pair_once(checkpoints, few, tokens):
    head = RewardHead.from_pretrained(checkpoints["gpt2"], dtype=torch.float64, tokens_per_batch=tokens)
    batches = batches_of(head, few, sharing="after prompt")
    assert sorted(index for batch in batches for index in batch.indices[: batch.n_pairs]) == list(range(len(few)))
    for batch in batches:
        if batch.prompts is not None:
            assert len(batch.input_ids) == 1 or batch.input_ids.numel() <= tokens
            assert batch.prompts.mask.numel() <= max(4 * tokens, batch.prompts.mask.shape[1])


def test_texts_of_batches_are_those_of_the_pairs(checkpoints, few):
    """Prompt and row together hold the ids, positions and response of every text."""
    head = RewardHead.from_pretrained(checkpoints["gpt2"])
    encoded = head.encode(few)
    for batch in batches_of(head, few, sharing="after prompt"):
        indices = batch.indices[: batch.n_pairs]
        sides = [side[index] for side in (encoded.chosen, encoded.rejected) for index in indices]
        for number, text in enumerate(sides):
            row = int(batch.rows[number])
            before = batch.prompts.run.texts[int(batch.prompts.of_row[row])].ids if batch.prompts else ()
            own = batch.mask[number]
            assert (*before, *batch.input_ids[row][own].tolist()) == text.ids
            response = batch.response[number][own].tolist()
            assert response == [place >= text.response_start for place in range(len(before), len(text))]
            if batch.position_ids is not None:
                assert batch.position_ids[row][own].tolist() == list(range(len(before), len(text)))
            assert int(own.nonzero().max()) == int(batch.last[number])


def test_hooks_see_prompts_as_before(head, few, rows_run):
    """Inside an ablation nothing runs apart: its hooks decide at which tokens they act."""
    neurons = NeuronAttribution(head, "gradient_x_activation").score(few).top(k=3)
    attribution = NeuronAttribution(head, "gradient_x_activation", positions="response")
    rows_run.clear()
    with AblationContext(head, neurons, Zero()):
        ablated = attribution.score(few).values
    assert not any(prompts for *_, prompts in rows_run)
    assert float(ablated[neurons.mask].abs().max()) == 0
    assert float(attribution.score(few).values[neurons.mask].abs().min()) > 0


def test_a_head_that_reads_the_prompt_runs_whole_rows(head, few, rows_run):
    class Difference(Head):
        reads_prompt = True

        def read(self, last, prompt_last):
            return (last - prompt_last).sum(dim=1, keepdim=True)

    other = RewardHead(head.model, Difference(), tokenizer=head.tokenizer)
    scores = NeuronAttribution(other, "gradient_x_activation", positions="response").score(few)
    assert float(scores.values.abs().max()) > 0
    assert not any(prompts for *_, prompts in rows_run)


def test_a_model_that_misreads_what_it_kept_runs_whole_rows(checkpoints, few, monkeypatch, rows_run):
    """The trial run sees keys that were lost, and positions that begin at 0."""
    expected = scores_of(RewardHead.from_pretrained(checkpoints["gpt2"], dtype=torch.float64), few[:3], "response")
    right = _prompt_runs.run_base

    def without_positions(base, batch, **options):
        return right(base, batch if batch.prompts is None else _at_zero(batch), **options)

    def without_values(base, batch, **options):
        return right(base, batch if batch.prompts is None else _emptied(batch), **options)

    for wrong in (without_positions, without_values):
        with monkeypatch.context() as patched:
            patched.setattr(_prompt_runs, "run_base", wrong)
            head = RewardHead.from_pretrained(checkpoints["gpt2"], dtype=torch.float64)
            assert not head.runs_prompts_first
        rows_run.clear()
        for values, other in zip(scores_of(head, few[:3], "response"), expected, strict=True):
            assert torch.allclose(values, other, **close_to(head))
        assert not any(prompts for *_, prompts in rows_run)


def _at_zero(batch):
    return replace(batch, position_ids=batch.position_ids - batch.prompts.lengths[:, None])


def _emptied(batch):
    states = tuple((keys, torch.zeros_like(values)) for keys, values in batch.prompts.states)
    return batch.with_prompts(replace(batch.prompts, states=states))


def test_a_pair_without_finite_scores_is_left_out(checkpoints):
    """The pairs of its batch run again by themselves, after their prompts too."""
    head = RewardHead.from_pretrained(checkpoints["gpt2"], dtype=torch.float64, on_nonfinite="skip")
    attribution = NeuronAttribution(head, "gradient_x_activation", positions="response")
    prompt = "\n\nHuman: the bread\n\nAssistant:"
    responses = [("help a cake", "the bread"), ("python", "bread and cake"), ("sure", "a cake")]
    pairs = PreferencePairs.from_records(
        [{"prompt": prompt, "chosen": chosen, "rejected": rejected} for chosen, rejected in responses]
    )
    kept = PreferencePairs([pairs[0], pairs[2]])
    expected = attribution.score(kept).values
    weight = head.body.native.get_input_embeddings().weight
    (token,) = set(head.tokenizer("a python")["input_ids"]) - set(head.tokenizer("a")["input_ids"])
    with torch.no_grad():
        weight[token] = torch.nan
    with pytest.warns(match="1 of 3 pairs produced NaN"):
        scores = attribution.score(pairs)
    assert torch.allclose(scores.values, expected, **close_to(head))
