"""Cached runs of a model: rewards, profiles, attributions and means, each run once and kept on disk."""

import hashlib
import json
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any, Protocol, TypeVar, runtime_checkable

import torch

from rmtension.attribution._neuron_attribution import NeuronAttribution
from rmtension.data._pairs import PreferencePairs
from rmtension.distributed import current
from rmtension.errors import OptionError
from rmtension.evaluation._pair_rewards import PairRewards
from rmtension.interventions._replacement import Replacement
from rmtension.interventions._replacements import Zero
from rmtension.interventions._sweep import score_without
from rmtension.neurons._neuron_scores import NeuronScores
from rmtension.neurons._neuron_set import NeuronSet
from rmtension.passes._activation_collector import ActivationCollector
from rmtension.passes._activation_profile import ActivationProfile
from rmtension.passes._activation_statistics import ActivationStatistics
from rmtension.passes._collect_profiles import collect_profiles
from rmtension.reward_head import RewardHead
from rmtension.store._provenance import Provenance, digest_of
from rmtension.store._storage import read_result, write_result
from rmtension.store._work_folder import remembered
from rmtension.study._model_output import ModelOutput, OpenCheckpoints


@runtime_checkable
class _Result(Protocol):
    @property
    def provenance(self) -> Provenance: ...

    def save(self, path: str | Path) -> None: ...


_R = TypeVar("_R", bound=_Result)


class ModelRuns:
    """A model with a cache of its results: a repeated request does not run the model again.

    `rewards`, `profile`, `attribution` and `statistics` return the results of `RewardHead.score_pairs`,
    `collect_profiles`, `NeuronAttribution` and `ActivationCollector`. Each result is kept in memory and, with a
    `folder`, in one safetensors file. The file's name is a digest of everything that the result depends on: the model's
    weights, the texts in order, the neurons and how they are ablated, the options, the versions of this package, torch
    and transformers, and whether there is a GPU. A local checkpoint is opened only when something has to run. `n_run`
    and `n_read` count the results that were run and those that were read from the folder.

    Args:
        model: a head, the folder or hub name of a checkpoint, or a `ModelOutput`.
        folder: the folder that keeps results; None keeps them in memory only.
        reward: False for a language model, which has activations but no reward.
        opened: checkpoints that are open, which the outputs of a checkpoint share.

    Raises `OptionError` for a head that skips pairs (`on_nonfinite="skip"`), because models are
    compared pair by pair.

    Examples:
        >>> runs = ModelRuns(head)
        >>> [runs.rewards(pairs["helpful"]).accuracy() for _ in range(2)], runs.n_run
        ([1.0, 1.0], 1)
    """

    def __init__(
        self,
        model: RewardHead | ModelOutput | str | Path,
        *,
        folder: str | Path | None = None,
        reward: bool = True,
        opened: OpenCheckpoints | None = None,
    ) -> None:
        if isinstance(model, RewardHead):
            model.require_all_pairs()
        self._model = model
        self._opened = OpenCheckpoints() if opened is None else opened
        self._folder = None if folder is None else Path(folder)
        self._reward = reward
        self._head = model if isinstance(model, RewardHead) else None
        self._key: str | None = None
        self._versions = [version("rmtension"), version("torch"), version("transformers"), torch.cuda.is_available()]
        self._known: dict[str, Any] = {}
        self.n_run = self.n_read = 0

    @property
    def head(self) -> RewardHead:
        """The model, opened when it is first needed."""
        if self._head is None and isinstance(self._model, ModelOutput):
            self._head = self._opened.head(self._model)
        if self._head is None:
            open_model = RewardHead.from_pretrained if self._reward else RewardHead.from_language_model
            self._head = open_model(str(self._model))
        return self._head

    @property
    def key(self) -> str:
        """The model's content as a key: the bytes of a local checkpoint, or the weights and settings of an open head.

        Training a head further changes its key. A checkpoint given by its hub name is opened to compute the key.
        """
        model = self._model.model if isinstance(self._model, ModelOutput) else self._model
        if isinstance(model, RewardHead) or not Path(model).is_dir():
            return f"head-{self.head.fingerprint}-{self.head.setup_digest}"
        if self._key is None:
            output = f" output {self._model.key}" if isinstance(self._model, ModelOutput) else ""
            self._key = f"folder-{self._opened.digest(model)}{output}"
        return self._key

    @property
    def provenance(self) -> Provenance | None:
        """The provenance of the first result; None before there is one."""
        return next((result.provenance for result in self._known.values()), None)

    def close(self) -> None:
        """Release the open model and results in memory; results in the folder can be read again, others run again."""
        self._known.clear()
        if not isinstance(self._model, RewardHead):
            self._head = None
            self._opened.close()

    # -- results ---------------------------------------------------------------------------------------------------

    def rewards(
        self,
        pairs: PreferencePairs,
        *,
        without: NeuronSet | None = None,
        replacement: Replacement = Zero(),
    ) -> PairRewards:
        """The rewards of `pairs` by the whole model, or without some neurons."""

        def run(work: Path | None) -> _Rewards:
            if without is None or not len(without):
                return _Rewards.of(self.head.score_pairs(pairs, work=work))
            (scored,) = score_without(self.head, pairs, [without], replacement, work=work)
            return _Rewards.of(scored)

        details = [pairs.ordered_digest, _described(without, replacement)]
        return self._once("rewards", details, run, _Rewards.load).scored(pairs)

    def prepare(
        self,
        pairs: PreferencePairs,
        sets: Sequence[NeuronSet],
        *,
        replacement: Replacement = Zero(),
    ) -> None:
        """Run the ablations of several sets together, which is faster, for later calls of `rewards`."""
        named = {
            self._name("rewards", [pairs.ordered_digest, _described(neurons, replacement)]): neurons
            for neurons in sets
            if len(neurons)
        }
        missing = [name for name in named if not self._has(name)]
        if missing:
            self._require_unhooked()
            with self._work(f"sweep-{_digest_of_names(named)}") as work:
                # The last digits depend on which sets run together, so an interrupted run resumes with the same sets.
                together = missing if work is None else remembered(work, "sets", missing)
                some = [named[name] for name in together]
                rewards = score_without(self.head, pairs, some, replacement, work=work)
                for name, scored in zip(together, rewards, strict=True):
                    self.n_run += 1
                    self._keep(name, _Rewards.of(scored))

    def known_rewards(self, pairs: PreferencePairs) -> PairRewards | None:
        """The rewards of `pairs` if they are in memory, else None."""
        kept = self._known.get(self._name("rewards", [pairs.ordered_digest, None]))
        return None if kept is None else kept.scored(pairs)

    def profile(
        self,
        pairs: PreferencePairs,
        *,
        site: str = "mlp",
        positions: str = "all",
        base: "ModelRuns | None" = None,
        pool_tokens: bool = False,
        also: Sequence[str] = (),
    ) -> ActivationProfile:
        """The activation profile at one site and position; the same pass also gives those of the sites in `also`."""
        sites = list(dict.fromkeys([site, *also]))

        def details(site: str) -> list[Any]:
            return [pairs.ordered_digest, site, positions, None if base is None else base.key, pool_tokens]

        def run(work: Path | None) -> ActivationProfile:
            profiles = collect_profiles(
                self.head,
                pairs,
                sites=sites,
                positions=[positions],
                base=None if base is None else base.head,
                pool_tokens=pool_tokens,
                work=work,
            )
            for other in sites[1:]:
                self._keep(self._name("profile", details(other)), profiles[other, positions])
            return profiles[site, positions]

        return self._once("profile", details(site), run, ActivationProfile.load)

    def attribution(
        self,
        pairs: PreferencePairs,
        *,
        method: str,
        site: str = "mlp",
        positions: str = "all",
        replacement: Replacement = Zero(),
    ) -> NeuronScores:
        """The scores of a method of `NeuronAttribution`."""

        def run(work: Path | None) -> NeuronScores:
            attribution = NeuronAttribution(self.head, method, site=site, positions=positions, replacement=replacement)
            return attribution.score(pairs, work=work)

        details = [pairs.ordered_digest, method, site, positions, replacement.key]
        return self._once("attribution", details, run, NeuronScores.load)

    def statistics(self, pairs: PreferencePairs, *, site: str = "mlp") -> ActivationStatistics:
        """The mean activations over all tokens, for `Mean`."""
        return self._once(
            "statistics",
            [pairs.ordered_digest, site],
            lambda work: ActivationCollector(self.head, site=site).collect(pairs, work=work),
            ActivationStatistics.load,
        )

    # -- inside ----------------------------------------------------------------------------------------------------

    def _once(self, kind: str, details: list[Any], run: Callable[[Path | None], _R], load: Callable[[Path], _R]) -> _R:
        name = self._name(kind, details)
        if name not in self._known:
            if self._folder is not None and self._has(name):
                self._known[name] = load(self._folder / name)
                self.n_read += 1
            else:
                self._require_unhooked()
                with self._work(name) as work:
                    result = run(work)
                    self.n_run += 1
                    self._keep(name, result)
        known: _R = self._known[name]
        return known

    @contextmanager
    def _work(self, name: str) -> Iterator[Path | None]:
        """A work folder for one run, removed once its results are kept; None if nothing is kept on disk."""
        if self._folder is None:
            yield None
            return
        work = self._folder / f"{Path(name).stem}.work"
        yield work
        if current().is_first:
            shutil.rmtree(work, ignore_errors=True)

    def _has(self, name: str) -> bool:
        """Whether a result is in memory or in the folder."""
        # All processes read the file or all run the pass, because they share the work of one pass.
        return name in self._known or (self._folder is not None and current().all_have((self._folder / name).exists()))

    def _require_unhooked(self) -> None:
        if self.head.body.is_hooked:
            raise OptionError(
                "runs: the model has hooks, its own or those of an active AblationContext, and results with hooks must "
                "not be cached as the model's. Leave the context, or remove the hooks from head.model, first."
            )

    def _keep(self, name: str, result: _Result) -> None:
        if self._folder is not None:
            result.save(self._folder / name)
        self._known[name] = result

    def _name(self, kind: str, details: list[Any]) -> str:
        written = json.dumps([kind, self._versions, self.key, details])
        return f"{kind}-{hashlib.sha256(written.encode()).hexdigest()[:24]}.safetensors"


class _Rewards:
    """Rewards without their texts, which the study already holds and would otherwise store hundreds of times."""

    def __init__(self, scored: PairRewards) -> None:
        self._scored = scored

    @classmethod
    def of(cls, scored: PairRewards) -> "_Rewards":
        return cls(replace(scored, pairs=PreferencePairs([])))

    @property
    def provenance(self) -> Provenance:
        return self._scored.provenance

    def scored(self, pairs: PreferencePairs) -> PairRewards:
        return replace(self._scored, pairs=pairs)

    def save(self, path: str | Path) -> None:
        scored = self._scored
        values = {
            "provenance": scored.provenance.to_dict(),
            "cut": [scored.n_prompts_cut, scored.n_responses_cut],
        }
        write_result(path, "Rewards", {"chosen": scored.chosen, "rejected": scored.rejected}, values)

    @classmethod
    def load(cls, path: str | Path) -> "_Rewards":
        shapes = {"chosen": "float pair", "rejected": "float pair"}
        tensors, values = read_result(path, "Rewards", tensors=shapes, values={"provenance": dict, "cut": list})
        provenance = Provenance.from_dict(values["provenance"])
        empty = PreferencePairs([])
        return cls(PairRewards(tensors["chosen"], tensors["rejected"], empty, provenance, *values["cut"]))


def _digest_of_names(names: Iterable[str]) -> str:
    return hashlib.sha256(" ".join(names).encode()).hexdigest()[:24]


def _described(without: NeuronSet | None, replacement: Replacement) -> list[Any] | None:
    """Everything that an ablation depends on; None for the whole model."""
    if without is None or not len(without):
        return None
    return [without.site, without.architecture, digest_of(without.mask), replacement.key]
