"""Work folders: a run that was interrupted anywhere ends with the same bits; other runs and processes are refused."""

import json
import shutil
from contextlib import suppress

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny_models import grid, make_pairs, save_classifier

from rmtension import AblationContext, ActivationCollector, NeuronAttribution, NeuronSet, RewardHead
from rmtension.attribution._single_effects import single_neuron_effects
from rmtension.errors import ModelError, OptionError, StorageError
from rmtension.interventions._sweep import score_without
from rmtension.passes import _pair_pass as pair_pass
from rmtension.passes._collect_profiles import collect_profiles
from rmtension.store._work_folder import claim, locked
from rmtension.study._model_runs import ModelRuns


@pytest.fixture(scope="module")
def head(checkpoints):
    return RewardHead.from_pretrained(checkpoints["gpt2"], tokens_per_batch=120)


@pytest.fixture(scope="module")
def base(tmp_path_factory, tokenizer):
    folder = save_classifier(tmp_path_factory.mktemp("base"), "gpt2", tokenizer, seed=1)
    return RewardHead.from_pretrained(folder, tokens_per_batch=120)


@pytest.fixture(scope="module")
def pairs():
    return make_pairs(13)


@pytest.fixture(autouse=True)
def often(monkeypatch):
    """Progress is kept after every batch, and few pairs are in memory together, so that a run has several parts."""
    monkeypatch.setattr("rmtension.store._work_folder.EVERY", 0.0)
    monkeypatch.setattr("rmtension.store._work_folder._SHARE", float("inf"))
    monkeypatch.setattr("rmtension.passes._pair_pass._PAIRS_PER_CHUNK", 5)


def sets(head):
    masks = torch.zeros(3, head.n_layers, head.n_neurons("mlp"), dtype=torch.bool)
    masks[0, 0, 3] = masks[1, 1, :5] = masks[2, 2, 7] = True
    return [NeuronSet(mask, "mlp", head.architecture) for mask in masks]


def scores(result):
    return [
        part
        for part in (result.values, result.stderr, result.without_block, result.completeness_gap)
        if part is not None
    ]


def collected(head, pairs, base, work):
    statistics = ActivationCollector(head, positions="response").collect(pairs, work=work)
    return [
        statistics.mean,
        statistics.abs_mean,
        statistics.rms,
        statistics.frequency,
        statistics.channel_mean,
        statistics.provenance,
    ]


def rewarded(head, pairs, base, work):
    scored = head.score_pairs(pairs, work=work)
    return [scored.chosen, scored.rejected, scored.provenance, scored.n_prompts_cut]


def scored(head, pairs, base, work):
    attributed = NeuronAttribution(head, method="gradient_x_activation", aggregate="absolute").score(pairs, work=work)
    return [*scores(attributed), attributed.provenance]


def integrated(head, pairs, base, work):
    attributed = NeuronAttribution(head, method="integrated_gradients", steps=2).score(pairs, work=work)
    return [*scores(attributed), attributed.provenance]


def pair_by_pair(head, pairs, base, work):
    attributions = NeuronAttribution(head, method="direct_effect").per_pair(pairs, work=work)
    return [attributions.values, attributions.provenance]


def profiled(head, pairs, base, work):
    profiles = collect_profiles(
        head, pairs, base=base, sites=["mlp", "attn_head"], positions=["all", "last"], work=work
    )
    return [part for profile in profiles.values() for part in (profile.sums, profile.weights, profile.provenance)]


def swept(head, pairs, base, work):
    return [scored.margin for scored in score_without(head, pairs, sets(head), work=work)]


def alone(head, pairs, base, work):
    effects = single_neuron_effects(head, pairs, neurons=sets(head)[1], work=work)
    return [*scores(effects), effects.provenance]


RUNS = [collected, rewarded, scored, integrated, pair_by_pair, profiled, swept, alone]


def equal(first, other):
    if isinstance(first, torch.Tensor):
        return torch.equal(first.isnan(), other.isnan()) and torch.equal(first.nan_to_num(), other.nan_to_num())
    return first == other


def die_at(monkeypatch, number):
    """The process is interrupted after it has added the batch of that number, before that is kept."""
    added, add = 0, pair_pass._Pass._update

    def dying(*arguments):
        nonlocal added
        add(*arguments)
        added += 1
        if added == number:
            raise KeyboardInterrupt

    monkeypatch.setattr(pair_pass._Pass, "_update", dying)


@pytest.mark.parametrize(
    "run", grid(RUNS, keep=[run for run in RUNS if run is not integrated]), ids=lambda run: run.__name__
)
@pytest.mark.parametrize("lazily", grid([False, True]), ids=["a list", "an iterator"])
def test_interrupted_at_every_batch_it_ends_the_same(run, lazily, head, base, pairs, tmp_path, monkeypatch):
    """Each attempt dies after two batches, the second of which was not kept."""
    if lazily and run in (rewarded, pair_by_pair, swept):
        pytest.skip("keeps a row for every pair, so that it makes a list of them anyway")
    given = iter if lazily else lambda pairs: pairs
    expected = run(head, given(pairs), base, None)
    interrupted = 0
    for _ in range(50):
        with monkeypatch.context() as patch:
            die_at(patch, 2)
            try:
                resumed = run(head, given(pairs), base, tmp_path / "work")
                break
            except KeyboardInterrupt:
                interrupted += 1
    assert interrupted >= 3
    assert all(equal(*both) for both in zip(resumed, expected, strict=True))
    assert sorted(path.name for path in (tmp_path / "work").iterdir() if path.suffix) == [
        "inputs.json",
        "progress-0.safetensors",
    ]
    # What has ended is not run again, and gives the same.
    with monkeypatch.context() as patch:
        die_at(patch, 1)
        again = run(head, given(pairs), base, tmp_path / "work")
    assert all(equal(*both) for both in zip(again, expected, strict=True))


@pytest.fixture
def begun(head, base, pairs, tmp_path, monkeypatch):
    """A work folder of an interrupted collecting run."""
    with monkeypatch.context() as patch:
        die_at(patch, 4)
        with pytest.raises(KeyboardInterrupt):
            collected(head, pairs, base, tmp_path / "work")
    return tmp_path / "work"


def test_a_folder_of_another_run_is_refused_by_name_of_what_differs(begun, head, base, pairs, tmp_path):
    before = {path: path.read_bytes() for path in begun.iterdir()}
    other = RewardHead.from_pretrained(
        save_classifier(tmp_path / "other", "gpt2", head.tokenizer, seed=3), tokens_per_batch=120
    )
    shorter = RewardHead(head.model, weight=head.weight, tokenizer=head.tokenizer, pad_token_id=1, tokens_per_batch=60)
    skipping = RewardHead(
        head.model, weight=head.weight, tokenizer=head.tokenizer, pad_token_id=1, tokens_per_batch=120,
        on_nonfinite="skip",
    )  # fmt: skip
    cases = {
        "model": lambda: collected(other, pairs, base, begun),
        "positions": lambda: ActivationCollector(head).collect(pairs, work=begun),
        "on_nonfinite": lambda: collected(skipping, pairs, base, begun),
        "tokens_per_batch": lambda: collected(shorter, pairs, base, begun),
        "statistic": lambda: rewarded(head, pairs, base, begun),
        "pairs": lambda: collected(head, pairs[::-1], base, begun),
    }
    for name, run in cases.items():
        with pytest.raises(StorageError, match=rf"a run with other settings: .*{name}=.* there, .* now"):
            run()
    with suppress(KeyError):
        del before[begun / ".lock-0"]
    assert all(path.read_bytes() == content for path, content in before.items())
    assert equal(*(collected(head, pairs, base, work)[0] for work in (begun, None)))


@pytest.mark.parametrize("change", ["shorter", "longer", "another", "another order"])
@pytest.mark.parametrize("finished", grid([False, True]), ids=["interrupted", "finished"])
def test_an_iterator_of_other_pairs_is_refused_where_they_differ(change, finished, begun, head, base, pairs):
    if finished:
        collected(head, pairs, base, begun)
    begun_with = json.loads((begun / "inputs.json").read_text())
    # As if it had been begun with an iterator, whose pairs are only known as they come.
    del begun_with["pairs"]
    (begun / "inputs.json").write_text(json.dumps(begun_with))
    others = {
        "shorter": pairs[:4],
        "longer": pairs + make_pairs(2, seed=5) if finished else make_pairs(2, seed=5) + pairs,
        "another": make_pairs(1, seed=5) + pairs[1:],
        "another order": pairs[1:2] + pairs[0:1] + pairs[2:],
    }[change]
    with pytest.raises(StorageError, match="this folder belongs to a run over other pairs"):
        collected(head, iter(others), base, begun)
    assert equal(*(collected(head, iter(pairs), base, work)[0] for work in (begun, None)))


def test_a_second_process_is_refused(begun, head, base, pairs):
    with locked(begun), pytest.raises(StorageError, match="another process works in this folder"):
        collected(head, pairs, base, begun)
    collected(head, pairs, base, begun)


def test_an_error_releases_the_folder(head, base, pairs, tmp_path, monkeypatch):
    """Also while the traceback is kept, as a notebook keeps it."""
    with monkeypatch.context() as patch:
        patch.setattr(head, "observe", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError) as kept:
            collected(head, pairs, base, tmp_path)
    assert kept.traceback
    collected(head, pairs, base, tmp_path)


def test_a_hooked_model_is_refused(head, base, pairs, tmp_path):
    with AblationContext(head, sets(head)[0]), pytest.raises(OptionError, match="work: the model has hooks"):
        collected(head, pairs, base, tmp_path / "work")
    assert not (tmp_path / "work").exists()


def test_what_a_killed_process_was_writing_is_removed(begun, head, base, pairs):
    left = begun / ".progress-0.safetensors.123-456.partial"
    left.write_bytes(b"half")
    collected(head, pairs, base, begun)
    assert not left.exists()


def test_damaged_progress_is_an_error(begun, head, base, pairs):
    path = begun / "progress-0.safetensors"
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(StorageError, match="damaged"):
        collected(head, pairs, base, begun)
    (begun / "inputs.json").write_text("[")
    with pytest.raises(StorageError, match=r"inputs.json: damaged"):
        collected(head, pairs, base, begun)


CHANGES = {
    "a text instead of a number": lambda position: position.update(chunk_start="3"),
    "one field less": lambda position: position.pop("order"),
    "one field more": lambda position: position.update(nothing=1),
    "a number instead of a truth value": lambda position: position.update(is_finished=1),
    "a skipped pair with a number": lambda position: position.update(skipped_pairs=[[0, "id"]]),
    "pairs that are not a list": lambda position: position.update(skipped_pairs="pairs"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_progress_that_was_changed_by_hand_is_an_error(change, begun, head, base, pairs):
    path = begun / "progress-0.safetensors"
    with safe_open(path, "pt") as file:
        header = json.loads(file.metadata()["rmtension"])
    CHANGES[change](header["place"])
    save_file(load_file(path), path, metadata={"rmtension": json.dumps(header)})
    with pytest.raises(StorageError, match=r"was edited after it was saved .*(PassRecord|skipped pair)"):
        collected(head, pairs, base, begun)


def test_a_folder_that_cannot_be_created_is_refused(head, base, pairs, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="cannot serve as a work folder"):
        collected(head, pairs, base, tmp_path / "file" / "work")


def test_progress_is_kept_at_intervals(head, base, pairs, tmp_path, monkeypatch):
    """Not after every batch, and only where that takes a small share of the time."""
    saved = []
    monkeypatch.setattr("rmtension.store._work_folder.EVERY", 1e9)
    monkeypatch.setattr("rmtension.store._work_folder.write_tensors", lambda *_: saved.append(1))
    collected(head, pairs, base, tmp_path)
    assert len(saved) == 1


def test_claims_compare_every_name_that_is_not_optional(tmp_path):
    claim(tmp_path, {"a": 1, "b": (2, 3)})
    claim(tmp_path, {"b": [2, 3]}, optional=("a",))
    claim(tmp_path, {"b": [2, 3], "c": 4}, optional=None)
    for inputs, listed in (
        ({"a": 1, "b": 5}, r"b=\[2, 3\] there, 5 now"),
        ({"a": 1}, r"b=\[2, 3\] there, nothing now"),
        ({"a": 1, "b": [2, 3], "c": None}, "c=nothing there, None now"),
    ):
        with pytest.raises(StorageError, match=listed):
            claim(tmp_path, inputs)


def test_rewards_and_ablated_rewards_never_share_a_work_folder(head, pairs, tmp_path):
    """Both are `RewardsOfPairs` with a state of one shape; the settings that only one has tell them apart."""
    first = NeuronSet.from_indices(
        [(0, 0)], shape=(head.n_layers, head.n_neurons("mlp")), site="mlp", architecture=head.architecture
    )
    head.score_pairs(pairs, work=tmp_path / "plain")
    with pytest.raises(StorageError, match="sets=nothing there"):
        score_without(head, pairs, [first], work=tmp_path / "plain")
    score_without(head, pairs, [first], work=tmp_path / "ablated")
    with pytest.raises(StorageError, match="nothing now"):
        head.score_pairs(pairs, work=tmp_path / "ablated")


def test_a_work_folder_knows_the_template_and_the_limit_of_now(checkpoints, pairs, tmp_path):
    """Also if they change while the model is open."""
    head = RewardHead.from_pretrained(checkpoints["gpt2"])
    head.score_pairs(pairs, work=tmp_path)
    for name, owner, value in (("max_length", head, 9), ("chat_template", head.tokenizer, "{{ messages }}")):
        before = getattr(owner, name)
        setattr(owner, name, value)
        with pytest.raises(StorageError, match="tokenizer and config="):
            head.score_pairs(pairs, work=tmp_path)
        setattr(owner, name, before)
    head.score_pairs(pairs, work=tmp_path)


def test_how_the_last_call_cut_its_texts_is_no_setting(checkpoints, pairs, tmp_path):
    """A tokenizer that was saved after a call with truncation keeps that; the next call replaces it."""
    folder = shutil.copytree(checkpoints["gpt2"], tmp_path / "model")
    tokenizer = RewardHead.from_pretrained(folder).tokenizer
    tokenizer(["w1 w2"], truncation=True, max_length=5, padding="max_length")
    tokenizer.save_pretrained(folder)
    assert json.loads((folder / "tokenizer.json").read_text())["truncation"]
    head = RewardHead.from_pretrained(folder)
    first = head.score_pairs(pairs, work=tmp_path / "work")
    assert torch.equal(head.score_pairs(pairs, work=tmp_path / "work").margin, first.margin)
    assert torch.equal(first.margin, RewardHead.from_pretrained(checkpoints["gpt2"]).score_pairs(pairs).margin)


def test_a_failed_update_changes_nothing(head, pairs, monkeypatch):
    """Also one that is interrupted between two batches, and a merge that is refused."""
    collector = ActivationCollector(head).update(pairs[:5])
    before = collector.compute()
    for dying in (KeyboardInterrupt, ModelError("bad")):
        with monkeypatch.context() as patch:
            observe, n = head.observe, iter(range(3))

            def broken(*arguments, observe=observe, n=n, dying=dying):
                if next(n, None) is None:
                    raise dying
                observe(*arguments)

            patch.setattr(head, "observe", broken)
            with pytest.raises((KeyboardInterrupt, ModelError)):
                collector.update(pairs)
    after = collector.compute()
    assert after.provenance == before.provenance
    assert all(torch.equal(getattr(after, name), getattr(before, name)) for name in ("mean", "rms", "channel_mean"))


def test_a_sweep_that_is_interrupted_between_two_results_ends_as_it_was_begun(head, pairs, tmp_path, monkeypatch):
    """Sets that run in another company have other last digits: those that are left must not run by themselves."""
    expected = ModelRuns(head, folder=tmp_path / "whole")
    expected.prepare(pairs, sets(head))
    keep, n_kept = ModelRuns._keep, 0

    def dying(*arguments):
        nonlocal n_kept
        keep(*arguments)
        n_kept += 1
        if n_kept == 1:
            raise KeyboardInterrupt

    monkeypatch.setattr(ModelRuns, "_keep", dying)
    with pytest.raises(KeyboardInterrupt):
        ModelRuns(head, folder=tmp_path / "runs").prepare(pairs, sets(head))
    swept = []
    monkeypatch.setattr(
        "rmtension.study._model_runs.score_without", lambda *a, **k: swept.append(len(a[2])) or score_without(*a, **k)
    )
    ModelRuns(head, folder=tmp_path / "runs").prepare(pairs, sets(head))
    assert swept == [3]
    whole, resumed = (
        {path.name: path.read_bytes() for path in (tmp_path / folder).iterdir()} for folder in ("whole", "runs")
    )
    assert whole == resumed
    # What is known already does not run again when more is asked for.
    ModelRuns(head, folder=tmp_path / "runs").prepare(pairs, [*sets(head), sets(head)[0] | sets(head)[1]])
    assert swept == [3, 1]
