"""No call changes the model: hooks, parameters, flags, modes and outputs are the same after it, however it ends.

Which calls these are is found by looking: every context manager of the package, and everything public that takes a
model, has to be in one of the lists below, so that a new one cannot be forgotten.
"""

import ast
import contextlib
import importlib
import inspect
import pkgutil
import threading
import typing
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import pytest
import torch
from tiny_models import grid, make_pairs, save_classifier

import rmtension
from rmtension import AblationContext, ActivationCollector, Mean, NeuronAttribution, NeuronSet, RewardHead, TensionStudy
from rmtension.attribution._batch_run import BatchRun, _BlockGates
from rmtension.attribution._faithfulness import faithfulness
from rmtension.attribution._kept_curves import kept_curves, minimality
from rmtension.attribution._make_dashboards import describe_dashboards, neuron_dashboards
from rmtension.attribution._relevance import RelevanceRules
from rmtension.attribution._set_effects import predict_set_effects
from rmtension.attribution._single_effects import single_neuron_effects
from rmtension.bodies._hooks import (
    HookSite,
    InstalledHooks,
    all_fire,
    around_calls,
    copy_without_hooks,
    on_calls,
    own_hooks_paused,
    recorded_calls,
)
from rmtension.bodies._native_body import NativeBody
from rmtension.bodies._native_sites import attends_both_ways, find_native_sites
from rmtension.bodies._native_weights import plain_copy
from rmtension.bodies._run_modes import eager_eval, frozen
from rmtension.bodies._site_widths import measure_sites
from rmtension.bodies._text_models import text_model
from rmtension.data._token_places import ReadAt
from rmtension.data._tokens import TokenBatch, running, running_batch
from rmtension.distributed import current, sharded
from rmtension.errors import OptionError, RMTensionError
from rmtension.interventions._optimal import Optimal
from rmtension.interventions._sweep import score_without
from rmtension.models._classifiers import build_classifier
from rmtension.models._direct_path import direct_contributions
from rmtension.models._direct_weights import direct_weights
from rmtension.models._opening import require_hidden_padding
from rmtension.models._replay import Replay
from rmtension.passes._collect_profiles import collect_profiles
from rmtension.passes._nonfinite import require_finite, where_not_finite
from rmtension.passes._pair_pass import run_pass
from rmtension.passes._rewards_of_pairs import RewardsOfPairs
from rmtension.repair._down_projection import added_to_projection, edit_down_projection
from rmtension.repair._edit import Edit
from rmtension.repair._fine_tune import fine_tune_neurons
from rmtension.repair._gains import fit_gains
from rmtension.repair._input_moments import input_moments
from rmtension.repair._medians import set_to_medians
from rmtension.repair._refit import refit_head
from rmtension.repair._regmean import merge_specialists
from rmtension.repair._splits import RepairPairs
from rmtension.study._model_runs import ModelRuns
from rmtension.study._options import StudyOptions
from rmtension.training._trainer_run import isolated

PACKAGE = Path(rmtension.__file__).parent


@dataclass
class Setup:
    """A model in a state that is easy to disturb, and what calls on it need."""

    head: RewardHead
    base: RewardHead
    pairs: rmtension.PreferencePairs
    batch: TokenBatch
    neurons: NeuronSet
    others: NeuronSet
    folder: Path

    @property
    def statistics(self):
        return ActivationCollector(self.head).collect(self.pairs)

    @property
    def mlp(self):
        return self.head.body.native.get_submodule(self.head.body.projection_names["mlp", 1])


def preferred(setup):
    """Pairs turned so that the MLPs raise every margin: otherwise their effects cancel."""
    pairs, every = make_pairs(12, seed=1), setup.neurons | ~setup.neurons
    raised = setup.head.score_pairs(pairs).margin > setup.head.with_ablation(every).score_pairs(pairs).margin
    rows = [
        {"prompt": pair.prompt, "chosen": pair.chosen if good else pair.rejected,
         "rejected": pair.rejected if good else pair.chosen}
        for pair, good in zip(pairs, raised.tolist(), strict=True)
    ]  # fmt: skip
    return rmtension.PreferencePairs.from_records(rows)


def to_repair():
    """Pairs of two objectives in three splits."""
    pairs = {"helpful": make_pairs(12, seed=3), "harmless": make_pairs(12, seed=4)}
    return RepairPairs.split(pairs, weak="helpful", strong="harmless", most_lost=0.9)


def untouched(_module, _inputs, _output):
    """A user's hook."""


def make_setup(folder, checkpoint, other):
    head, base = RewardHead.from_pretrained(checkpoint), RewardHead.from_pretrained(other)
    pairs = make_pairs(4, seed=1)
    encoded = head.encode(pairs)
    batch = TokenBatch.from_texts([*encoded.chosen, *encoded.rejected], range(8), read_at=ReadAt(1), device=head.device)
    masks = torch.zeros(2, head.n_layers, head.n_neurons("mlp"), dtype=torch.bool)
    masks[0, 1, 3] = masks[1, 2, 4] = True
    sets = [NeuronSet(mask, "mlp", head.architecture) for mask in masks]
    # Some modules train, some parameters ask for gradients and have one.
    head.body.native.h[0].train()
    for parameter in head.body.native.h[1].parameters():
        parameter.requires_grad_(True)
        parameter.grad = torch.ones_like(parameter)
    return Setup(head, base, pairs, batch, *sets, folder)


@pytest.fixture(scope="module")
def opened(checkpoints, tmp_path_factory, other_checkpoint):
    """One model for all tests, since none may change it."""
    return make_setup(tmp_path_factory.mktemp("setup"), checkpoints["gpt2"], other_checkpoint)


@pytest.fixture
def spoiled(checkpoints, tmp_path, other_checkpoint):
    """A model for tests that change it."""
    return make_setup(tmp_path, checkpoints["gpt2"], other_checkpoint)


@pytest.fixture
def setup(opened, tmp_path):
    return replace(opened, folder=tmp_path)


@pytest.fixture(scope="module")
def other_checkpoint(tmp_path_factory, tokenizer):
    return save_classifier(tmp_path_factory.mktemp("other"), "gpt2", tokenizer, seed=1)


HOOKS = [name for name in vars(torch.nn.Module()) if "hooks" in name]


def state_of(head):
    """Everything of a model, and around it, that a call could leave changed."""
    modules = {id(part): part for root in (head.model, *head.body.modules()) for part in root.modules()}
    tensors = {
        id(tensor): tensor
        for module in modules.values()
        for tensor in (*module.parameters(False), *module.buffers(False))
    }
    return {
        "hooks": {
            (key, name): [(number, id(hook)) for number, hook in vars(module)[name].items()]
            for key, module in modules.items()
            for name in HOOKS
            if isinstance(vars(module).get(name), dict)
        },
        "modules": {key: sorted(vars(module)) for key, module in modules.items()},
        "modes": {key: module.training for key, module in modules.items()},
        "asks": {key: tensor.requires_grad for key, tensor in tensors.items()},
        "gradients": {
            key: None if tensor.grad is None else tensor.grad.sum().item() for key, tensor in tensors.items()
        },
        "values": {
            key: (tensor.data_ptr(), tensor._version, tensor.double().sum().item()) for key, tensor in tensors.items()
        },
        "head": (head.weight.sum().item(), head.bias, head.tokens_per_batch, head.max_length),
        "around": (torch.is_grad_enabled(), torch.is_inference_mode_enabled(), running_batch(), current().size),
        "random": torch.get_rng_state().sum().item(),
        "rewards": head.score(["help me", "how do i bake a cake"]).tolist(),
    }


def require_same(before, after):
    for name, value in before.items():
        assert after[name] == value, f"{name} changed"


@contextmanager
def unchanged(head):
    before = state_of(head)
    try:
        yield
    finally:
        require_same(before, state_of(head))


# -- faults --------------------------------------------------------------------------------------------------------


class Fault(Exception):  # noqa: N818 - not an error
    """What the test throws into a run."""


@contextmanager
def failing(what, number, error):
    """The call of that number of modules, or of registrations of hooks, raises. Yields how many there were."""
    seen = [0]

    def count():
        seen[0] += 1
        if seen[0] == number:
            raise error

    if what == "forward":
        handle = torch.nn.modules.module.register_module_forward_pre_hook(lambda *_: count())
        try:
            yield seen
        finally:
            handle.remove()
        return
    with pytest.MonkeyPatch.context() as patch:
        for name in ("register_forward_hook", "register_forward_pre_hook"):
            register = getattr(torch.nn.Module, name)

            def counted(*arguments, register=register, **options):
                count()
                return register(*arguments, **options)

            patch.setattr(torch.nn.Module, name, counted)
        yield seen


def places(n):
    """Where among n calls to fail: first, last, and between."""
    return sorted({1, 2, n // 2, n - 1, n} & set(range(1, n + 1)))


def require_unchanged_however_it_ends(head, call):
    """Run a call to its end, then with an error thrown in at many places: each time the model is what it was."""
    before = state_of(head)
    with failing("forward", 0, Fault()) as n_calls, failing("register", 0, Fault()) as n_hooks:
        call()
    require_same(before, state_of(head))
    for what, n in (("forward", n_calls[0]), ("register", n_hooks[0])):
        for number, error in [(call_number, Fault()) for call_number in places(n)] + [
            (max(1, n // 3), KeyboardInterrupt())
        ] * (n > 0):
            with failing(what, number, error), suppress(Fault, KeyboardInterrupt, RMTensionError):
                call()
            require_same(before, state_of(head))
    return n_calls[0], n_hooks[0]


# -- everything public that takes a model -----------------------------------------------------------------------------


def in_eval(setup, call):
    """For what leaves the mode to its caller."""
    with eager_eval(setup.head.body.modules()):
        return call()


CALLS = {
    "interventions._ablation.AblationContext.__init__": lambda s: AblationContext(s.head, s.neurons),
    "passes._activation_collector.ActivationCollector.update": lambda s: ActivationCollector(s.head).update(s.pairs),
    "passes._activation_collector.ActivationCollector.collect": lambda s: ActivationCollector(
        s.head, site="attn_head"
    ).collect(s.pairs),
    "passes._activation_collector.ActivationCollector.sample": lambda s: ActivationCollector(s.head).sample(
        s.pairs, n=5
    ),
    "attribution._neuron_attribution.NeuronAttribution.score": lambda s: NeuronAttribution(
        s.head, method="attribution_patching", graddrop=True, aggregate="absolute"
    ).score(s.pairs),
    "models._reward_model.RewardModel.after_prompts": lambda s: NeuronAttribution(
        s.head, method="gradient_x_activation", positions="response"
    ).score(s.pairs),
    "attribution._neuron_attribution.NeuronAttribution.per_pair": lambda s: NeuronAttribution(
        s.head, method="integrated_gradients", steps=2
    ).per_pair(s.pairs),
    "attribution._neuron_attribution.NeuronAttribution.per_token": lambda s: list(
        NeuronAttribution(s.head, method="gradient_x_activation").per_token(s.pairs[:2])
    ),
    "attribution._batch_run.BatchRun.__init__": lambda s: BatchRun(
        s.head, s.batch, ["mlp"], gradients=True, drops=True, direct=True
    ),
    "attribution._batch_run.BatchRun.replay": lambda s: BatchRun(
        s.head, s.batch, ["mlp"], forward=False
    ).replay.rewards_from(1),
    "bodies._native_sites.attends_both_ways": lambda s: attends_both_ways(s.head.body.module),
    "bodies._native_sites.find_native_sites": lambda s: find_native_sites(s.head.body.module),
    "bodies._text_models.text_model": lambda s: text_model(s.head.body.module),
    "bodies._native_body.NativeBody.__init__": lambda s: NativeBody(s.head.body.module),
    "bodies._native_body.NativeBody.residual": lambda s: in_eval(
        s, lambda: NativeBody(s.head.body.module).residual(s.batch)
    ),
    "bodies._bodies.BridgeBody.residual": lambda s: in_eval(s, lambda: s.head.body.residual(s.batch)),
    "models._direct_path.direct_contributions": lambda s: direct_contributions(s.head, s.batch),
    "models._direct_weights.direct_weights": lambda s: direct_weights(s.head, s.batch, "mlp", [(0, 1)]),
    "models._classifiers.build_classifier": lambda s: build_classifier(s.head),
    "models._saving.save_model": lambda s: s.head.save_pretrained(s.folder / "saved"),
    "attribution._kept_curves.kept_curves": lambda s: kept_curves(
        s.head, preferred(s), NeuronAttribution(s.head, "relp").score(s.pairs), fractions=(0.5, 1.0), n_random=0
    ),
    "attribution._kept_curves.minimality": lambda s: minimality(s.head, preferred(s), s.neurons | s.others, parts=2),
    "attribution._set_effects.predict_set_effects": lambda s: predict_set_effects(
        s.head, make_pairs(8, seed=1), {"both": s.neurons | s.others}, passes=9, level=0.9
    ),
    "interventions._optimal.Optimal.fit": lambda s: Optimal.fit(
        s.head, s.pairs, s.neurons, Mean(s.statistics), steps=2
    ),
    "attribution._faithfulness.faithfulness": lambda s: faithfulness(
        s.head,
        s.pairs,
        NeuronAttribution(s.head, method="direct_effect").score(s.pairs),
        sample=3,
        set_fractions=(0.1,),
        n_random=1,
    ),
    "bodies._gate_search.find_gates": lambda s: s.head.body.hook_sites("mlp_gate", 0),
    "models._reward_model.RewardModel.observe": lambda s: s.head.observe(
        s.batch, ["mlp", "attn_head"], lambda *_: None
    ),
    "models._reward_model.RewardModel.residual": lambda s: s.head.residual(s.batch),
    "bodies._hooks.copy_without_hooks": lambda s: copy_without_hooks(s.head.body.native),
    # What a bridge's own run leaves is TransformerLens'.
    "interventions._lens_hooks.fwd_hooks": lambda s: s.head.fwd_hooks(s.neurons, Mean(s.statistics)),
    "attribution._make_dashboards.describe_dashboards": lambda s: describe_dashboards(
        neuron_dashboards(s.head, s.neurons.subsample(1, seed=0), s.pairs[:2], n_examples=0),
        s.head,
        s.pairs[:2],
        lambda prompt: "5",
    ),
    "attribution._make_dashboards.neuron_dashboards": lambda s: neuron_dashboards(
        s.head, s.neurons.subsample(1, seed=0), {"helpful": s.pairs[:2]}, n_examples=1
    ),
    "passes._nonfinite.require_finite": lambda s: require_finite(s.head, torch.zeros(3), lambda row: s.batch),
    "passes._nonfinite.where_not_finite": lambda s: where_not_finite(
        s.head, s.batch, [torch.tensor([torch.inf])], None
    ),
    "models._opening.require_hidden_padding": lambda s: require_hidden_padding(s.head),
    "bodies._native_weights.plain_copy": lambda s: plain_copy(s.head.body.native),
    "passes._collect_profiles.collect_profiles": lambda s: collect_profiles(s.head, s.pairs, base=s.base),
    "models._replay.Replay.__init__": lambda s: Replay(s.head, s.batch, ["mlp"]),
    "models._replay.Replay.base": lambda s: Replay(s.head, s.batch).base,
    "models._replay.Replay.rewards_from": lambda s: Replay(s.head, s.batch).rewards_from(1),
    "models._replay.Replay.run_block": lambda s: (replay := Replay(s.head, s.batch)).run_block(1, replay.stream(1)),
    "reward_head.RewardHead.__init__": lambda s: RewardHead(s.head.model, weight=s.head.weight),
    "models._reward_model.RewardModel.forward": lambda s: s.head.forward(s.batch),
    "models._reward_model.RewardModel.rewards": lambda s: s.head.rewards(s.batch),
    "passes._pair_pass.run_pass": lambda s: run_pass(
        s.head, s.pairs, RewardsOfPairs(s.head, s.pairs, lambda batch: [s.head.rewards(batch)])
    ),
    "reward_head.RewardHead.score": lambda s: s.head.score(["help", "sorry"]),
    "reward_head.RewardHead.score_pairs": lambda s: s.head.score_pairs(s.pairs, work=s.folder / "work"),
    "reward_head.RewardHead.score_outputs": lambda s: s.head.score_outputs(s.pairs),
    "reward_head.RewardHead.score_tokens": lambda s: s.head.score_tokens(s.batch.input_ids),
    "reward_head.RewardHead.with_ablation": lambda s: s.head.with_ablation(s.neurons, Mean(s.statistics)),
    "study._model_runs.ModelRuns.attribution": lambda s: ModelRuns(s.head).attribution(s.pairs, method="direct_effect"),
    "study._model_runs.ModelRuns.prepare": lambda s: ModelRuns(s.head).prepare(s.pairs, [s.neurons, s.others]),
    "study._model_runs.ModelRuns.profile": lambda s: ModelRuns(s.head, folder=s.folder / "runs").profile(s.pairs),
    "study._model_runs.ModelRuns.rewards": lambda s: ModelRuns(s.head).rewards(s.pairs, without=s.neurons),
    "study._model_runs.ModelRuns.statistics": lambda s: ModelRuns(s.head).statistics(s.pairs),
    "passes._selfcheck.check_head": lambda s: s.head.check(s.pairs[:2]),
    "attribution._single_effects.single_neuron_effects": lambda s: single_neuron_effects(
        s.head, s.pairs, neurons=s.neurons
    ),
    "bodies._site_widths.measure_sites": lambda s: in_eval(
        s, lambda: measure_sites(s.head.body, s.head.n_layers, s.head.device)
    ),
    "study._tension_study.TensionStudy.run": lambda s: TensionStudy(
        {"helpful": s.head, "harmless": s.base, "mixed": s.base},
        {"helpful": make_pairs(8, seed=3), "harmless": make_pairs(8, seed=4)},
        options=StudyOptions(analyses=("overlap",), scores=("mean_difference",)),
    ).run(progress=False),
    "repair._edit.Edit.apply": lambda s: Edit(
        "drawn", s.head.fingerprint, s.head.architecture, row=torch.ones(s.head.d_model)
    ).apply(s.head),
    "repair._refit.refit_head": lambda s: refit_head(s.head, to_repair(), shares=(0.5,), ridges=(1e-3,)),
    "repair._down_projection.edit_down_projection": lambda s: edit_down_projection(
        s.head, to_repair(), layers=[1], steps=(1.0,), weights=(1.0,)
    ),
    "repair._input_moments.input_moments": lambda s: input_moments(
        s.head, s.pairs, [s.head.body.projection_names["mlp", 1]]
    ),
    "repair._regmean.merge_specialists": lambda s: merge_specialists(
        s.head, to_repair(), {"helpful": s.head, "harmless": s.base}, shrink=(0.9,)
    ),
    "repair._fine_tune.fine_tune_neurons": lambda s: fine_tune_neurons(s.head, to_repair(), steps=(1,)),
    "repair._medians.set_to_medians": lambda s: set_to_medians(s.head, to_repair(), fractions=(0.1,)),
    "repair._gains.fit_gains": lambda s: fit_gains(s.head, to_repair(), counts=(2,), shares=(0.5,)),
    "interventions._sweep.score_without": lambda s: score_without(
        s.head, s.pairs, [s.neurons, s.others, s.neurons | s.others]
    ),
}
# The same calls under other names.
THE_SAME = {
    "bodies._prompt_runs.PromptRuns.run": "models._reward_model.RewardModel.after_prompts",
    "bodies._prompt_runs.PromptRuns.works": "models._reward_model.RewardModel.after_prompts",
    "models._reward_model.RewardModel.runs_prompts_first": "models._reward_model.RewardModel.after_prompts",
    "attribution._batch_scores.BatchScorer.rules": "attribution._kept_curves.kept_curves",
    "attribution._relevance.RelevanceRules.__init__": "attribution._kept_curves.kept_curves",
    "bodies._gate_search.is_activation_function": "attribution._kept_curves.kept_curves",
    "attribution._ablated_sets.ablate_sets": "attribution._faithfulness.faithfulness",
    "attribution._batch_scores.BatchScorer.of_pairs": "attribution._neuron_attribution.NeuronAttribution.score",
    "attribution._batch_scores.BatchScorer.of_tokens": "attribution._neuron_attribution.NeuronAttribution.per_token",
    "attribution._batch_scores.BatchScorer.signed_of_pairs": (
        "attribution._neuron_attribution.NeuronAttribution.per_pair"
    ),
    "attribution._top_texts.LargestActivations.observe": "attribution._make_dashboards.neuron_dashboards",
    "attribution._set_sums.SumsOverSets.observe": "attribution._set_effects.predict_set_effects",
    "attribution._describe.describe_neurons": "attribution._make_dashboards.describe_dashboards",
    "attribution._written.written": "attribution._make_dashboards.neuron_dashboards",
    "interventions._ablation_effects.ablation_effects": "interventions._sweep.score_without",
    "attribution._correlated.CorrelationSums.observe": "attribution._make_dashboards.neuron_dashboards",
    "attribution._top_texts.active_texts": "attribution._make_dashboards.neuron_dashboards",
    "attribution._top_texts.find_examples": "attribution._make_dashboards.neuron_dashboards",
    **dict.fromkeys(
        (
            "study._inspection.ModelInspector.run",
            "study._inspection.inspect_model",
            "study._inspection_run.InspectionRun.result",
            "study._inspection_outputs.compare_outputs",
        ),
        "attribution._faithfulness.faithfulness",
    ),
    **dict.fromkeys(
        ("study._inspection.ModelInspector.__init__", "study._speed.measure_speed"),
        "attribution._single_effects.single_neuron_effects",
    ),
    "cli._commands.neuron_options.make_replacement": "passes._activation_collector.ActivationCollector.collect",
    "interventions._export.ablate_weights": "reward_head.RewardHead.with_ablation",
    **dict.fromkeys(
        (
            "interventions._projection_change.projection_names",
            "interventions._projection_change.change_projections",
            "interventions._projection_change.change_own_projections",
        ),
        "reward_head.RewardHead.with_ablation",
    ),
    "interventions._edit_weights.edit_weights": "repair._edit.Edit.apply",
    "repair._down_projection.projection_inputs": "repair._down_projection.edit_down_projection",
    "repair._distil.distil_ensemble": "repair._refit.refit_head",
    "synthetic._damage.plant_damage": "reward_head.RewardHead.with_ablation",
    "repair._directions.shape_reward": "repair._refit.refit_head",
    "repair._directions.remove_subspace": "repair._refit.refit_head",
    "repair._diagnose.diagnose": "repair._refit.refit_head",
    "repair._ceiling.SpecialistEnsemble.__init__": "repair._refit.refit_head",
    "repair._ceiling.SpecialistEnsemble.margins": "repair._refit.refit_head",
    "repair._repair.repair": "repair._gains.fit_gains",
    "repair._gains.GainFitter.__init__": "repair._gains.fit_gains",
    "repair._gains.GainFitter.fit": "repair._gains.fit_gains",
    "repair._gains.GainFitter.path": "repair._gains.fit_gains",
    "repair._features.margins_of": "repair._gains.fit_gains",
    "repair._features.SplitStates.of": "repair._refit.refit_head",
    "repair._row_edits.best_row": "repair._refit.refit_head",
    **{
        f"repair._diagnose.Evidence.{name}": "repair._refit.refit_head"
        for name in ("__init__", "gather", "ceiling", "diagnosis")
    },
    "repair._gains.GainFitter.ranking": "repair._gains.fit_gains",
    "repair._gains.GainFitter.strongest": "repair._gains.fit_gains",
    "repair._edit.has_reward_row": "repair._edit.Edit.apply",
    "repair._input_moments.is_linear_map": "repair._input_moments.input_moments",
    "repair._input_moments.linear_maps": "repair._regmean.merge_specialists",
    "repair._regmean.Specialist.__init__": "repair._regmean.merge_specialists",
    "repair._regmean.Specialist.read": "repair._regmean.merge_specialists",
    "training._train_reward_model.remove_dropout": "repair._fine_tune.fine_tune_neurons",
    "repair._controls.control_table": "repair._gains.fit_gains",
    "repair._repair.Repair.__init__": "repair._refit.refit_head",
    "repair._repair.Repair.save_pretrained": "repair._edit.Edit.apply",
    "repair._edit.reward_row": "repair._edit.Edit.apply",
    "repair._edit.with_added": "repair._edit.Edit.apply",
    "repair._features.read_states": "repair._refit.refit_head",
    "models._classifiers.reload_classifier": "passes._selfcheck.check_head",
    "reward_head.RewardHead.fwd_hooks": "interventions._lens_hooks.fwd_hooks",
    "reward_head.RewardHead.check": "passes._selfcheck.check_head",
    "reward_head.RewardHead.save_pretrained": "models._saving.save_model",
    "passes._scoring.score_texts": "reward_head.RewardHead.score",
    "models._reward_model.RewardModel.all_outputs": "reward_head.RewardHead.score_outputs",
    "passes._scoring.score_tokens": "reward_head.RewardHead.score_tokens",
    "passes._probes.find_probes": "passes._selfcheck.check_head",
    **{
        f"models._token_models.{name}": "models._saving.save_model"
        for name in ("build_language_model", "build_token_classifier", "save_token_model")
    },
    **{
        f"models._classifiers.{name}": "models._classifiers.build_classifier" for name in ("model_around", "plain_base")
    },
    "interventions._expert_weights.ablate_experts": "reward_head.RewardHead.with_ablation",
    "bodies._experts.ExpertPoint.register_forward_hook": "passes._activation_collector.ActivationCollector.collect",
    "passes._token_rewards.rewards_of_tokens": "passes._selfcheck.check_head",
    "models._classifiers.current_checkpoint": "models._saving.save_model",
    "models._classifiers.require_same_stream": "models._classifiers.build_classifier",
    "models._classifiers.run_eagerly": "models._classifiers.build_classifier",
}
# What opens or builds a model of its own, or looks at one without running it: nothing of a user's could be changed.
OWN_MODEL = [
    "bodies._hooks.install_for_good",
    "models._streamed_weights.StreamedWeights.__init__",
    "synthetic._damage.DamagedModel.__init__",
    "training._frozen_layers.FrozenLayers.__init__",
    "training._frozen_layers.FrozenLayers.prepare",
    "bodies._bodies.BridgeBody.experts",
    "bodies._native_body.NativeBody.experts",
    "bodies._experts.ExpertPoint.__init__",
    "bodies._experts.expert_point",
    "models._opening.bound_head",
    "models._opening.within_reference",
    "bodies._bodies.BridgeBody.__init__",
    "bodies._bodies.find_body",
    "models._reward_model.RewardModel.__init__",
    "bodies._last_block.LastMLP.__init__",
    "bodies._native_run.find_last_mlp",
    "bodies._rope.RopeByText.__init__",
    "reward_head.RewardHead.from_classifier",
    "reward_head.RewardHead.from_language_model",
    "reward_head.RewardHead.from_pretrained",
    "models._opening.with_checkpoint",
    "models._opening.with_lens_model",
    "models._opening.head_on",
    "bodies._bodies.BootNativeBody.residual",
    "bodies._hooked_transformer_body.HookedTransformerBody.__init__",
    "bodies._hooked_transformer_body.HookedTransformerBody.residual",
    "models._lens_models.SavedModel.__init__",
    "models._lens_models.copy_model",
    "models._lens_models.write_model",
    "models._checkpoint.Checkpoint.__init__",
    "heads._computed_heads.PromptWeightedHead.__init__",
    "heads._computed_heads.WeightedHead.__init__",
    "heads._encoder_heads.PooledHead.classifier_with",
]
ONLY_LOOKS = [
    "bodies._prompt_runs.PromptRuns.__init__",
    "bodies._native_sites.block_lists",
    "heads._head.tensors_of",
    "models._reward_model.RewardModel.require_all_pairs",
    "models._reward_model.RewardModel.require_same_head",
    "interventions._expert_weights.expert_names",
    *(f"bodies._experts.ExpertPoint.{name}" for name in ("experts", "forward", "restore", "routed", "write")),
    "bodies._experts.is_experts",
    "models._reward_model.RewardModel.body_fingerprint",
    "study._family_runs.ModelFamily.outputs",
    "study._inspection_outputs.chosen_outputs",
    "models._reward_model.RewardModel.require_text",
    "models._classifiers.rows_to_save",
    *(
        f"heads._computed_heads.PromptWeightedHead.{name}"
        for name in ("ending_ids", "read_tokens", "require_text", "settings", "tokens")
    ),
    *(f"heads._computed_heads.WeightedHead.{name}" for name in ("read", "settings")),
    "models._own_format.same_tensors",
    "models._checkpoint.Checkpoint.live_head",
    "models._checkpoint.Checkpoint.logit_rows",
    "bodies._bodies.BridgeBody.cfg",
    "bodies._bodies.BridgeBody.config",
    "bodies._hooked_transformer_body.HookedTransformerBody.cfg",
    *(
        f"bodies._native_body.NativeBody.{name}"
        for name in (
            *("block", "config", "final_norm", "hook_sites", "is_hooked", "last_mlp_only_at", "modules"),
            *("n_embeddings", "pack_up_to", "projection"),
        )
    ),
    "models._reward_model.RewardModel.read_at",
    "attribution._batch_scores.BatchScorer.__init__",
    "attribution._batch_scores.BatchScorer.method_fields",
    "attribution._batch_scores.BatchScorer.provenance",
    "attribution._batch_scores.BatchScorer.settings",
    *(
        f"attribution._correlated.CorrelationSums.{name}"
        for name in ("__init__", "compute", "settings", "state", "update")
    ),
    *(f"attribution._set_sums.SumsOverSets.{name}" for name in ("__init__", "compute", "settings", "state", "update")),
    "attribution._top_texts.LargestActivations.__init__",
    "attribution._top_texts.LargestActivations.compute",
    "attribution._top_texts.LargestActivations.settings",
    "attribution._top_texts.LargestActivations.state",
    "attribution._top_texts.LargestActivations.update",
    "cli._commands.neuron_options.neurons_of",
    "interventions._ablation.check_set",
    "study._inspection_run.InspectionRun.__init__",
    "bodies._bodies.BridgeBody.projection",
    "bodies._bodies.BridgeBody.stable_up_to",
    "models._direct_path.DirectPaths.final_norm_seen",
    "models._direct_weights.unembedding",
    "bodies._bodies.BootNativeBody.n_embeddings",
    "bodies._bodies.BootNativeBody.hook_sites",
    "bodies._bodies.BootNativeBody.weights",
    "models._direct_path.written_by",
    "bodies._hooked_transformer_body.HookedTransformerBody.projection",
    "bodies._hooked_transformer_body.HookedTransformerBody.stable_up_to",
    "bodies._hooked_transformer_body.HookedTransformerBody.weights",
    "bodies._projections.Projection.of",
    "models._checkpoint.Checkpoint.require_same_head",
    "bodies._native_weights.adapters_in_use",
    "bodies._native_weights.has_adapters",
    "bodies._native_weights.refuse_packed_weights",
    "bodies._native_weights.refuse_recomputed",
    "interventions._ablation.AblationContext.ablated",
    "bodies._norms.is_norm",
    "passes._activation_collector.ActivationCollector.__init__",
    "passes._activation_collector.ActivationCollector.compute",
    "passes._activation_collector.ActivationCollector.merge",
    "passes._activation_collector.ActivationCollector.reset",
    "attribution._neuron_attribution.NeuronAttribution.__init__",
    "bodies._bodies.BridgeBody.block",
    "bodies._bodies.BridgeBody.final_norm",
    "bodies._bodies.BridgeBody.final_norm_folded",
    "bodies._bodies.BridgeBody.is_hooked",
    "bodies._bodies.BridgeBody.last_mlp_only_at",
    "bodies._bodies.BridgeBody.model",
    "bodies._bodies.BridgeBody.modules",
    "bodies._bodies.BridgeBody.n_embeddings",
    "bodies._bodies.BridgeBody.pack_up_to",
    "bodies._bodies.BridgeBody.require_faithful",
    "bodies._bodies.BridgeBody.runs_native",
    "bodies._bodies.BridgeBody.hook_sites",
    "models._checkpoint.Checkpoint.reads_tokens",
    "models._checkpoint.Checkpoint.trust_remote_code",
    "models._direct_path.DirectPaths.__init__",
    "models._direct_path.DirectPaths.contributions",
    "models._direct_path.DirectPaths.hooks",
    "attribution._faithfulness.sample_neurons",
    "study._family_runs.ModelFamily.__init__",
    "models._loading.refuse_offloaded",
    "models._reward_model.RewardModel.architecture",
    "models._reward_model.RewardModel.run_options",
    "passes._scoring.one_text",
    "models._reward_model.RewardModel.encode",
    "models._reward_model.RewardModel.hooks",
    "models._reward_model.RewardModel.n_channels",
    "models._reward_model.RewardModel.n_neurons",
    "models._reward_model.RewardModel.reward_dtype",
    "models._reward_model.RewardModel.setup_digest",
    "models._reward_model.RewardModel.sites",
    "models._reward_model.RewardModel.tokens_together",
    "bodies._hooked_transformer_body.HookedTransformerBody.block",
    "bodies._hooked_transformer_body.HookedTransformerBody.final_norm",
    "bodies._hooked_transformer_body.HookedTransformerBody.final_norm_folded",
    "bodies._hooked_transformer_body.HookedTransformerBody.is_hooked",
    "bodies._hooked_transformer_body.HookedTransformerBody.last_mlp_only_at",
    "bodies._hooked_transformer_body.HookedTransformerBody.modules",
    "bodies._hooked_transformer_body.HookedTransformerBody.n_embeddings",
    "bodies._hooked_transformer_body.HookedTransformerBody.hook_sites",
    "bodies._hooks.HookSite.__init__",
    "bodies._hooks.count_foreign_hooks",
    "bodies._hooks.has_own_hooks",
    "bodies._hooks.is_placed",
    "bodies._hooks.has_permanent_hooks",
    "models._streamed_weights.StreamedWeights.move",
    "bodies._hooks.modules_of",
    "bodies._norms.read_norm",
    "passes._rewards_of_pairs.RewardsOfPairs.__init__",
    "passes._rewards_of_pairs.RewardsOfPairs.compute",
    "passes._rewards_of_pairs.RewardsOfPairs.name",
    "passes._rewards_of_pairs.RewardsOfPairs.observe",
    "passes._rewards_of_pairs.RewardsOfPairs.settings",
    "passes._rewards_of_pairs.RewardsOfPairs.state",
    "passes._rewards_of_pairs.RewardsOfPairs.update",
    "passes._pass_record.PassRecord.provenance",
    "interventions._check_replacement.check_replacement",
    "models._replay.Replay.places",
    "models._replay.Replay.read",
    "models._replay.Replay.read_many",
    "models._replay.Replay.stream",
    "models._reward_model.RewardModel.fingerprint",
    "models._reward_model.RewardModel.provenance",
    "models._reward_model.RewardModel.last_mlp_where_read",
    "reward_head.RewardHead.output",
    "reward_head.RewardHead.outputs",
    "study._model_runs.ModelRuns.__init__",
    "study._model_runs.ModelRuns.close",
    "study._model_runs.ModelRuns.head",
    "study._model_runs.ModelRuns.key",
    "study._model_runs.ModelRuns.known_rewards",
    "study._model_runs.ModelRuns.provenance",
    "study._tension_study.TensionStudy.__init__",
    "study._tension_study.TensionStudy.cost",
]

MODEL_TYPES = ("RewardHead", "RewardModel", "BridgeBody", "HookedTransformerBody", "nn.modules.module.Module")


def takes_a_model(function):
    with suppress(NameError, TypeError):
        return is_for_a_model(typing.get_type_hints(function))
    return is_for_a_model(getattr(function, "__annotations__", {}))


def is_for_a_model(hints):
    """Whether an argument is a model; of a type variable its bound says so."""
    hinted = [str(getattr(hint, "__bound__", hint)) for name, hint in hints.items() if name != "return"]
    return any(kind in hint for hint in hinted for kind in MODEL_TYPES)


def modules():
    for module_info in pkgutil.walk_packages(rmtension.__path__, "rmtension."):
        yield module_info.name.removeprefix("rmtension."), importlib.import_module(module_info.name)


def plain_function(value):
    if isinstance(value, classmethod | staticmethod):
        return value.__func__
    return value.fget if isinstance(value, property) else getattr(value, "func", value)


def public_calls():
    """Every public function that takes a model, and every public method of what is one or was made from one."""
    for name, module in modules():
        for key, value in vars(module).items():
            if getattr(value, "__module__", None) != module.__name__ or key.startswith("_"):
                continue
            if not inspect.isclass(value):
                if callable(value) and not is_context_manager(value) and takes_a_model(value):
                    yield f"{name}.{key}"
                continue
            holds = key in MODEL_TYPES or takes_a_model(value.__init__)
            for method, member in vars(value).items():
                function = plain_function(member)
                is_public = method == "__init__" or not method.startswith("_")
                is_call = callable(function) and is_public and not is_context_manager(function)
                if is_call and (holds or takes_a_model(function)):
                    yield f"{name}.{key}.{method}"


def is_context_manager(function):
    """Whether `contextlib.contextmanager` made it; the suite's type checker may have wrapped it once more."""
    while function is not None:
        if getattr(getattr(function, "__code__", None), "co_filename", "") == contextlib.__file__:
            return True
        function = getattr(function, "__wrapped__", None)
    return False


def context_managers():
    """Every class that can be entered, and every generator that is a context manager, public or not."""
    for name, module in modules():
        for key, value in vars(module).items():
            if getattr(value, "__module__", None) != module.__name__:
                continue
            if inspect.isclass(value):
                if hasattr(value, "__enter__"):
                    yield f"{name}.{key}"
                for method, member in vars(value).items():
                    function = plain_function(member)
                    if callable(function) and is_context_manager(function):
                        yield f"{name}.{key}.{method}"
            elif callable(value) and is_context_manager(value):
                yield f"{name}.{key}"


def test_every_call_that_takes_a_model_is_in_a_list():
    listed = [*CALLS, *THE_SAME, *OWN_MODEL, *ONLY_LOOKS]
    assert set(THE_SAME.values()) <= set(CALLS)
    assert len(set(listed)) == len(listed)
    assert sorted(public_calls()) == sorted(listed)


# Those that take seconds each of the dozen times that the test runs them.
LONG = [
    "attribution._kept_curves.kept_curves",
    "attribution._kept_curves.minimality",
    "attribution._make_dashboards.describe_dashboards",
    "attribution._set_effects.predict_set_effects",
    "passes._selfcheck.check_head",
    "repair._edit.Edit.apply",
    "repair._fine_tune.fine_tune_neurons",
    "repair._gains.fit_gains",
    "repair._medians.set_to_medians",
    "repair._regmean.merge_specialists",
    "reward_head.RewardHead.with_ablation",
    "study._tension_study.TensionStudy.run",
]


@pytest.mark.parametrize("name", grid(CALLS, keep=CALLS.keys() - LONG))
def test_calls_leave_the_model_as_it_was(name, setup):
    require_unchanged_however_it_ends(setup.head, partial(CALLS[name], setup))


@pytest.mark.parametrize("name", ONLY_LOOKS)
def test_what_only_looks_installs_nothing(name):
    """Read from the test's own code: it names nothing that changes a model."""
    known = dict(modules())
    module = max((entry for entry in known if name.startswith(f"{entry}.")), key=len)
    member = known[module]
    for part in name.removeprefix(f"{module}.").split("."):
        member = inspect.getattr_static(member, part) if inspect.isclass(member) else getattr(member, part)
    function = plain_function(member)
    if not hasattr(function, "__code__"):
        return
    named = set(inspect.unwrap(function).__code__.co_names)
    changing = {"eager_eval", "frozen", "recorded_calls", "register_forward_hook", "register_forward_pre_hook"}
    assert not named & (changing | {"requires_grad_", "residual", "__enter__"})


# -- context managers -------------------------------------------------------------------------------------------------


def spot(s):
    return HookSite(s.mlp, "input")


# Those that touch a model.
CONTEXTS = {
    "repair._down_projection.added_to_projection": lambda s: added_to_projection(
        s.head, 1, torch.ones(s.head.d_model, s.head.n_channels("mlp")).double()
    ),
    "interventions._ablation.AblationContext": lambda s: AblationContext(s.head, s.neurons),
    "attribution._batch_run._BlockGates.closed": lambda s: _BlockGates(s.head).closed(1),
    "attribution._relevance.RelevanceRules.applied": lambda s: RelevanceRules(s.head).applied(fixed_attention=False),
    "attribution._batch_run._BlockGates.running": lambda s: _BlockGates(s.head).running(),
    "bodies._hooks.all_fire": lambda s: all_fire(s.head.body.modules()),
    "bodies._hooks.around_calls": lambda s: around_calls([s.mlp, s.head.body.block(0)], lambda: None, lambda: None),
    "bodies._hooks.on_calls": lambda s: on_calls([s.mlp, s.head.body.block(0)], lambda *_: None),
    "bodies._hooks.own_hooks_paused": lambda s: own_hooks_paused(s.head.body.modules()),
    "bodies._rope.RopeByText.for_texts": lambda s: s.head.body._rope.for_texts(s.batch),
    "bodies._hooks.InstalledHooks": lambda s: InstalledHooks([(spot(s), lambda _: None)] * 3),
    "bodies._run_modes.frozen": lambda s: frozen(s.head.body.modules()),
    "bodies._run_modes.eager_eval": lambda s: eager_eval(s.head.body.modules()),
    "bodies._hooks.recorded_calls": lambda s: recorded_calls([s.mlp, s.head.body.block(0)]),
    "bodies._last_block.LastMLP.only_at": lambda s: s.head.body.last_mlp_only_at(s.batch, s.batch.last_places),
    "data._tokens.running": lambda s: running(s.batch),
}
# Those that do not, with the tests that look after them.
ELSEWHERE = {
    "attribution._relevance._FixedAttention": "test_relp",
    "cli._commands.quiet.quiet_libraries": "test_cli",
    "distributed.sharded": "test_distributed",
    "store._files.filled_whole": "test_files",
    "store._compression._ZstdFile": "test_reading",
    "store._storage._opened": "test_storage",
    "bodies._hooked_transformer_body.HookedTransformerBody._fresh_alibi": "test_hooked_transformer",
    "store._files.written_whole": "test_files",
    "_progress.without_unseen_bars": "test_progress",
    "study._model_runs.ModelRuns._work": "test_work",
    "bodies._bridges._without_installing": "test_text_models",
    "heads._head_tensors.damage_named": "test_heads",
    "models._checkpoint_folder.checkpoint_folder": "test_files",
    "replication._stages.Clock.stage": "test_replication",
    "training._frozen_layers.FrozenLayers.enter": "test_packed_training",
    "training._trainer_run.isolated": "test_training",
    "training._trainer_run.new_folder": "test_training",
    "store._work_folder.locked": "test_work",
}
ENTERED_ONCE = (AblationContext, InstalledHooks)


def test_every_context_manager_is_in_a_list():
    assert sorted(context_managers()) == sorted([*CONTEXTS, *ELSEWHERE])
    for file in ELSEWHERE.values():
        assert list(Path(__file__).parent.rglob(f"{file}.py"))


def require_life_cycle(make, setup):
    """Everything that a context manager on a model can be put through leaves the model as it was."""
    head = setup.head
    with unchanged(head), make(setup):
        pass
    for error in (Fault(), KeyboardInterrupt(), GeneratorExit()):
        with unchanged(head), suppress(Fault, KeyboardInterrupt, GeneratorExit), make(setup):
            raise error
    # Entering fails half-way: whatever it had installed is gone.
    with unchanged(head), failing("register", 0, Fault()) as n_hooks, make(setup):
        pass
    for number in range(1, n_hooks[0] + 1):
        with unchanged(head), failing("register", number, Fault()), pytest.raises(Fault), make(setup):
            pytest.fail("it should not have been entered")
    # Nested, and overlapping: the first to be entered is left first.
    with unchanged(head), make(setup), make(setup):
        pass
    with unchanged(head):
        first, second = make(setup), make(setup)
        first.__enter__()
        second.__enter__()
        first.__exit__(None, None, None)
        second.__exit__(None, None, None)

    def abandoned():
        with make(setup):
            yield 1
            yield 2

    with unchanged(head):
        generator = abandoned()
        next(generator)
        generator.close()
    with unchanged(head):
        generator = abandoned()
        next(generator)
        del generator


@pytest.mark.parametrize("name", CONTEXTS)
def test_contexts_leave_the_model_as_it_was(name, setup):
    if name == "data._tokens.running":
        # A context variable is given back in the order of taking: overlapping is refused by Python itself.
        with unchanged(setup.head), running(setup.batch), running(setup.batch):
            assert running_batch() is setup.batch
        with unchanged(setup.head), suppress(Fault), running(setup.batch):
            raise Fault
        return
    require_life_cycle(CONTEXTS[name], setup)


@pytest.mark.parametrize("name", CONTEXTS)
def test_a_context_is_not_entered_twice(name, setup):
    context = CONTEXTS[name](setup)
    if not isinstance(context, ENTERED_ONCE):
        # contextlib's own: a generator runs once.
        with context:
            pass
        with pytest.raises((RuntimeError, AttributeError)), context:
            pass
        return
    with unchanged(setup.head):
        with context, pytest.raises(OptionError, match="already entered"), context:
            pass
        with context:
            pass


class Leaking:
    """Like `AblationContext`, but an exception inside leaves its hook."""

    def __init__(self, setup):
        self.module = setup.mlp

    def __enter__(self):
        self.handle = self.module.register_forward_pre_hook(lambda *_: None)

    def __exit__(self, kind, *_):
        if kind is None:
            self.handle.remove()


class LeavingTheMode(Leaking):
    """Puts a module in eval mode, and back into training, whatever it was."""

    def __enter__(self):
        self.module.eval()

    def __exit__(self, *_):
        self.module.train()


class HalfEntered(Leaking):
    """Installs two hooks, the first of which stays when the second cannot be."""

    def __enter__(self):
        self.handles = [self.module.register_forward_pre_hook(lambda *_: None) for _ in range(2)]

    def __exit__(self, *_):
        for handle in self.handles:
            handle.remove()


@pytest.mark.parametrize("leaking", [Leaking, LeavingTheMode, HalfEntered])
def test_a_leaking_manager_is_found_out(leaking, spoiled):
    with pytest.raises(AssertionError, match=r"(hooks|modes) changed"):
        require_life_cycle(leaking, spoiled)


def test_a_leaking_call_is_found_out(spoiled):
    def leaky():
        handle = spoiled.mlp.register_forward_pre_hook(lambda *_: None)
        spoiled.head.score(["help"])
        handle.remove()

    with pytest.raises(AssertionError, match="hooks changed"):
        require_unchanged_however_it_ends(spoiled.head, leaky)


def test_only_these_modules_touch_hooks_and_flags():
    """Whoever installs a hook, or changes a mode or a flag, goes through `_hooks` or `_run_modes` of `bodies`."""
    touching = set()
    for path in sorted(PACKAGE.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            is_call = isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)
            if is_call and node.func.attr in ("register_forward_hook", "register_forward_pre_hook", "train"):
                touching.add((path.stem, node.func.attr))
            targets = node.targets if isinstance(node, ast.Assign) else []
            touching |= {
                (path.stem, target.attr)
                for target in targets
                if getattr(target, "attr", "") in ("training", "requires_grad")
            }
    assert touching == {
        ("_experts", "register_forward_hook"),  # its own, with which it replaces the forward of the experts
        ("_hooks", "register_forward_hook"),
        ("_hooks", "register_forward_pre_hook"),
        ("_run_modes", "training"),
        # The trainer's method, on a model that was made for it.
        ("_trainer_run", "train"),
    }


def test_a_hook_of_the_users_stays_and_counts(setup):
    handle = setup.head.model.blocks[1].mlp.hook_out.register_forward_hook(untouched)
    with unchanged(setup.head):
        for name in ("reward_head.RewardHead.score", "passes._activation_collector.ActivationCollector.sample"):
            CALLS[name](setup)
    handle.remove()


def test_two_threads_with_two_models_do_not_disturb_each_other(checkpoints, other_checkpoint, tmp_path):
    """Each gets what it gets alone, while the other ablates and collects."""
    setups = [make_setup(tmp_path / "a", checkpoints["gpt2"], other_checkpoint)]
    setups.append(make_setup(tmp_path / "b", other_checkpoint, checkpoints["gpt2"]))

    def work(setup):
        with AblationContext(setup.head, setup.neurons):
            without = setup.head.score_pairs(setup.pairs).margin
        statistics = ActivationCollector(setup.head, positions="last").collect(setup.pairs)
        scores = NeuronAttribution(setup.head, method="gradient_x_activation", positions="last").score(setup.pairs)
        return [without, statistics.mean, scores.values]

    alone = [work(setup) for setup in setups]
    results = {}

    def repeat(number):
        results[number] = [work(setups[number]) for _ in range(5)]

    with unchanged(setups[0].head), unchanged(setups[1].head):
        threads = [threading.Thread(target=repeat, args=(number,)) for number in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    for number, expected in enumerate(alone):
        assert len(results[number]) == 5
        for statistics in results[number]:
            assert all(map(torch.equal, statistics, expected))


def test_sharded_alone_changes_nothing(setup):
    with unchanged(setup.head), sharded():
        setup.head.score_pairs(setup.pairs)
    with unchanged(setup.head), suppress(Fault), sharded():
        raise Fault


def test_a_trainer_gives_random_states_back():
    before = torch.get_rng_state()
    with suppress(Fault), isolated(0):
        torch.randn(3)
        raise Fault
    assert torch.equal(torch.get_rng_state(), before)
