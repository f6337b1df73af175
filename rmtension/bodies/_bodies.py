"""The transformer of a reward model, up to the final norm: how it runs, and where its neurons are."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import cached_property, partial
from itertools import chain
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from rmtension._sites import SITES, find_site
from rmtension.bodies._experts import ExpertPoint, expert_point
from rmtension.bodies._gate_search import GATE_ROWS, find_gates
from rmtension.bodies._hooked_transformer_body import HookedTransformerBody
from rmtension.bodies._hooks import HookSite, InstalledHooks, count_foreign_hooks, has_own_hooks, modules_of
from rmtension.bodies._native_body import NativeBody
from rmtension.bodies._native_run import find_last_mlp, measure_packing, probe_batch, run_base, stream_difference
from rmtension.bodies._native_weights import has_adapters, refuse_packed_weights, refuse_recomputed
from rmtension.bodies._norms import read_norm
from rmtension.bodies._projections import Projection
from rmtension.bodies._prompt_runs import PromptRuns
from rmtension.bodies._rope import RopeByText
from rmtension.bodies._run_modes import eager_eval, unwrapped
from rmtension.data._token_places import TokenPlaces
from rmtension.data._tokens import TokenBatch
from rmtension.errors import ModelError

# Largest difference of a bridge, relative to the residual stream; 1e-3 in other dtypes. Half precision rounds every
# step of attention to 3 or 2 digits.
_BRIDGE_TOLERANCE = {torch.float16: 0.05, torch.bfloat16: 0.2}


class BridgeBody:
    """A TransformerBridge, with or without transformers' own modules.

    A bridge computes attention step by step, so that every intermediate has a hook. `native` is a copy of its base
    model that shares all parameters and buffers; it is faster, and computes exactly the rewards of transformers. The
    copy runs as long as only this library has hooks. If the user hooks the bridge, the bridge runs instead, so that
    those hooks take effect.
    """

    # Whether a linear head reads the first token of a text, as in encoders.
    reads_first = False

    def __init__(self, bridge: nn.Module, native: nn.Module | None = None, names: dict[int, str] | None = None) -> None:
        self.bridge = bridge
        self.module: nn.Module = self._base() if native is None else native
        self.native = native
        self._names = names or {}
        self.projection_names = {} if native is None else _projection_names(bridge, self._names)
        self._bridge_error = 0.0 if native is None else self._compare()
        # Counted after the first run, in which a bridge installs its own hooks.
        self._foreign = count_foreign_hooks(bridge)
        self._foreign_native = 0 if native is None else count_foreign_hooks(native)
        cfg: Any = bridge.cfg
        self._rope = RopeByText(self.modules(), self._run_all, int(cfg.n_ctx))
        self._pack_up_to = 0 if native is None else measure_packing(native, self.n_embeddings, self._rope.same_up_to)
        self._last_mlp = None
        # How prompts run before the rows of a batch; None where only a bridge runs.
        self.prompt_runs: PromptRuns | None = None
        if native is not None:
            self.prompt_runs = PromptRuns(native, int(cfg.n_layers), self.n_embeddings)
            last = int(cfg.n_layers) - 1
            path = self.projection_names.get(("mlp", last))
            self._last_mlp = find_last_mlp(native, path, self.block(last), self.n_embeddings)

    @property
    def cfg(self) -> Any:
        """TransformerLens' config: n_layers, n_heads, d_model, n_ctx, ..."""
        bridge: Any = self.bridge
        return bridge.cfg

    @property
    def config(self) -> Any:
        """Transformers' config of the model; None for a model of `boot_native`."""
        return getattr(self.bridge.original_model, "config", None)

    @property
    def final_norm_folded(self) -> bool:
        """Whether compatibility mode moved the final norm's gain into the unembedding."""
        bridge: Any = self.bridge
        if not getattr(bridge, "compatibility_mode", False) or not hasattr(bridge, "ln_final"):
            return False
        norm = read_norm(bridge.ln_final.original_component, int(bridge.cfg.d_model))
        return norm.divides and norm.is_plain

    @property
    def model(self) -> nn.Module:
        """The hooked model that users see as `head.model`."""
        return self.bridge

    @property
    def runs_native(self) -> bool:
        """Whether transformers' own modules run: they exist, and only this library hooked the bridge."""
        return self.native is not None and count_foreign_hooks(self.bridge) == self._foreign

    @property
    def stable_up_to(self) -> int | None:
        """The longest text beside which the others of its batch keep their positions; None if they always keep them."""
        return None

    @property
    def pack_up_to(self) -> int:
        """The longest row that two texts may share; 0 if texts may not share rows."""
        return self._pack_up_to if self.runs_native else 0

    def last_mlp_only_at(self, batch: TokenBatch, places: TokenPlaces) -> AbstractContextManager[TokenPlaces | None]:
        """`LastMLP.only_at` if the model can run that way, otherwise a context that does nothing."""
        if self._last_mlp is None or not self.runs_native:
            return nullcontext(None)
        return self._last_mlp.only_at(batch, places)

    @property
    def is_hooked(self) -> bool:
        """Whether the model has hooks, of the user or of this library."""
        on_native = 0 if self.native is None else count_foreign_hooks(self.native)
        is_foreign = count_foreign_hooks(self.bridge) != self._foreign or on_native != self._foreign_native
        return is_foreign or has_own_hooks(self.modules())

    def residual(self, batch: TokenBatch) -> Float[Tensor, "row token d_model"]:
        """The residual stream after the final norm's gain; no vocabulary projection."""
        runs_native = self.native is not None and self.runs_native
        if not runs_native:
            self.require_faithful()
        with self._rope.for_texts(batch):
            return run_base(self.native if runs_native else self._base(), batch)

    def require_faithful(self) -> None:
        """Raise `ModelError` if the bridge does not compute what transformers' modules compute."""
        if not self._bridge_error <= _BRIDGE_TOLERANCE.get(next(self.module.parameters()).dtype, 1e-3):
            remedy = (
                "Merge the adapter before you open the model (peft: model.merge_and_unload())"
                if has_adapters(self.module)
                else "Remove your hooks from head.model and use head.hooks(site, visit)"
            )
            raise ModelError(
                f"model: the TransformerBridge of {type(self.module).__name__} is off by {self._bridge_error:.1e} of "
                f"its residual stream, so hooks on it would see another model. {remedy}; everything else runs "
                "transformers' own modules and is exact."
            )

    def hook_sites(self, site: str, layer: int) -> list[HookSite]:
        """The hook sites of the activation of `site` in `layer`, in the bridge and in transformers' modules."""
        if site == "expert":
            return [HookSite(point, "output", (site, layer)) for point in self.experts[layer]]
        hook_sites = self._gates[layer] if find_site(site).factor_of else self._projected(site, layer)
        return [replace(hook_site, place=(site, layer)) for hook_site in hook_sites]

    def projection(self, site: str, layer: int) -> Projection:
        """The map from the neurons of `site` in `layer` into the residual stream, in the model that runs."""
        if self.native is not None:
            return Projection.of(self.native.get_submodule(self.projection_names[site, layer]))
        point = find_site(site).hook_point(self.bridge, layer)
        owner: Any = _owners_of_inputs(self.bridge)[id(point)]
        inside = Projection.of(owner.original_component)
        # Some bridges with processed weights use the weight of the projection without calling the module.
        return replace(inside, read=HookSite(point, "output"))

    def _projected(self, site: str, layer: int) -> list[HookSite]:
        """The input of the output projection of `site`, on the bridge and in `native`."""
        module = find_site(site).hook_point(self.bridge, layer)
        point = HookSite(module, "output")
        if self.native is None:
            if id(module) not in _owners_of_inputs(self.bridge):
                raise ModelError(
                    f"site {site!r}: the bridge's hook point in layer {layer} is the output of a whole block, not the "
                    "input of a projection (a mixture of experts has one projection per expert). Use site 'expert', or "
                    "'attn_head'."
                )
            return [point]
        name = self.projection_names.get((site, layer))
        if name is None:
            raise ModelError(
                f"site {site!r}: layer {layer} of {type(self.native).__name__} has no single output projection "
                "(a mixture of experts has one projection per expert). Use site 'expert', or 'attn_head'."
            )
        return [point, HookSite(self.native.get_submodule(name), "input")]

    @cached_property
    def experts(self) -> list[list[ExpertPoint]]:
        """The hook points of `expert` in every layer: in the native modules, if they exist, and in the bridge."""
        blocks: Any = self.bridge.blocks
        native = [] if self.native is None else [[self.block(layer) for layer in range(len(blocks))]]
        with eager_eval(modules_of(self.module, self.bridge)):
            return [
                [expert_point(block, layer) for block in both]
                for layer, both in enumerate(zip(*native, blocks, strict=True))
            ]

    @cached_property
    def _gates(self) -> list[list[HookSite]]:
        """The hook sites of `mlp_gate` in every layer, searched separately in the bridge and in the native modules."""
        bridge: Any = self.bridge
        bases = [self._base()] if self.native is None else [self._base(), self.native]
        inputs = zip(*(self._projected("mlp_gate", layer) for layer in range(int(bridge.cfg.n_layers))), strict=True)
        batch = probe_batch(min(4, self.n_embeddings), next(self.module.parameters()).device, GATE_ROWS)
        with eager_eval(self.modules()):
            gates = [
                find_gates(partial(run_base, base, batch), base.modules(), hook_sites)
                for base, hook_sites in zip(bases, inputs, strict=True)
            ]
        return [list(hook_sites) for hook_sites in zip(*gates, strict=True)]

    @property
    def n_embeddings(self) -> int:
        """Rows of the embedding: token ids lie below."""
        bridge: Any = self.bridge
        source: Any = bridge.original_model if self.native is None else self.native
        return int(source.get_input_embeddings().weight.shape[0])

    @property
    def final_norm(self) -> nn.Module:
        """The norm whose output the head multiplies, in the modules that run while the bridge is not hooked."""
        bridge: Any = self.bridge
        if not hasattr(bridge, "ln_final"):
            raise ModelError(
                f"model: TransformerLens finds no final norm in {type(self.module).__name__}, without which a reward "
                "cannot be split. Use a method that does not split the reward, such as attribution_patching."
            )
        norm: nn.Module = bridge.ln_final
        name = self._names.get(id(bridge.ln_final.original_component))
        return norm if self.native is None or name is None else self.native.get_submodule(name)

    def block(self, layer: int) -> nn.Module:
        """The module whose input is the residual stream before `layer`."""
        bridge: Any = self.bridge
        block: nn.Module = bridge.blocks[layer]
        name = self._names.get(id(getattr(block, "original_component", None)))
        return block if self.native is None or name is None else self.native.get_submodule(name)

    def modules(self) -> Iterator[nn.Module]:
        """Every module that may run. A bridge does not list transformers' model among its submodules."""
        bridge: Any = self.bridge
        # Hook points that no module has as a submodule, if they were needed so far.
        points: list[list[ExpertPoint]] = vars(self).get("experts", [])
        return chain(modules_of(self.module, bridge, bridge.original_model), chain.from_iterable(points))

    def _base(self) -> nn.Module:
        bridge: Any = self.bridge
        base: nn.Module = bridge.original_model.base_model
        return base

    def _run_all(self) -> None:
        """Run every base model that may run, on one token."""
        batch = probe_batch(1, next(self.module.parameters()).device)
        with torch.no_grad(), eager_eval(self.modules()):
            for base in [self._base()] if self.native is None else [self._base(), self.native]:
                run_base(base, batch)

    def _compare(self) -> float:
        """How far the bridge is from transformers' modules on a few tokens, relative to the residual stream."""
        parameter = next(self.module.parameters())
        batch = probe_batch(min(12, self.n_embeddings), parameter.device)
        with torch.no_grad(), eager_eval(self.modules()):
            expected, output = (run_base(base, batch).double() for base in (self.module, self._base()))
        return stream_difference(output, expected)


class BootNativeBody(BridgeBody):
    """A bridge made by `TransformerBridge.boot_native`: a TransformerLens model without any module of transformers."""

    @property
    def n_embeddings(self) -> int:
        """Rows of the embedding: token ids lie below."""
        bridge: Any = self.bridge
        return int(bridge.cfg.d_vocab)

    def residual(self, batch: TokenBatch) -> Float[Tensor, "row token d_model"]:
        """The residual stream after the final norm, or the stream itself if the model has no norm."""
        captured: list[Tensor] = []
        base = self._base()
        # Without a mask, attention that is not causal would see the padding.
        more = {} if base.cfg.attention_dir == "causal" else {"attention_mask": batch.position_mask("all")}
        with InstalledHooks([(HookSite(self.final_norm, "output"), captured.append)]):
            base(input_ids=batch.input_ids, **more)
        return captured[0]

    def hook_sites(self, site: str, layer: int) -> list[HookSite]:
        """The hook point of `site` in `layer`."""
        bridge: Any = self.bridge
        inside: Any = getattr(bridge.blocks[layer], "mlp", None)
        if find_site(site).factor_of and (bridge.cfg.gated_mlp or hasattr(inside, "ln")):
            raise ModelError(
                f"site {site!r}: a model of boot_native computes the input of the down projection of layer {layer} "
                "in a way that hooks cannot change. Use site 'mlp', where Zero() and Scale(alpha) do the same."
            )
        return [replace(hook_site, place=(site, layer)) for hook_site in self._projected(site, layer)]

    def weights(
        self, site: str, layer: int
    ) -> tuple[Float[Tensor, "channel d_model"], Float[Tensor, "d_model"] | None]:
        """The weight and the bias of the output projection of `site` in `layer`: views of the parameters."""
        module: Any = self.projection(site, layer).written.module
        return module.weight.T, module.bias

    def _base(self) -> Any:
        bridge: Any = self.bridge
        return bridge.original_model


# The transformer of a reward model: `module` owns the parameters, `residual` runs it, `hook_sites` finds its neurons.
Body = BridgeBody | HookedTransformerBody | NativeBody


def find_body(model: nn.Module) -> Body:
    """The body of a TransformerBridge or HookedTransformer; raises `ModelError` for anything else."""
    model = unwrapped(model)
    refuse_packed_weights("model", model)
    refuse_recomputed("model", model)
    lens = {kind.__name__ for kind in type(model).__mro__ if kind.__module__.startswith("transformer_lens.")}
    if "HookedTransformer" in lens:
        return HookedTransformerBody(model)
    if "TransformerBridge" in lens:
        base: Any = model.original_model
        if type(base).__name__ == "NativeModel":
            return BootNativeBody(model)
        if hasattr(base, "base_model"):
            return BridgeBody(model)
        raise ModelError(
            f"model: expected a bridge around a model of transformers or made by TransformerBridge.boot_native, got a "
            f"bridge around a {type(base).__name__}. Build it with TransformerBridge.boot_transformers or boot_native."
        )
    if lens & {"HookedEncoder", "HookedEncoderDecoder", "HookedAudioEncoder"}:
        raise ModelError(
            f"model: expected a decoder (a TransformerBridge or a HookedTransformer), got a {type(model).__name__}, "
            "which has no final residual stream at the last token, where rewards are read. Open an encoder's "
            "checkpoint with RewardHead.from_pretrained."
        )
    raise ModelError(
        f"model: expected a TransformerBridge or a HookedTransformer, got {type(model).__name__}. Open a checkpoint "
        "with RewardHead.from_pretrained, and a transformers classifier with RewardHead.from_classifier."
    )


def _projection_names(bridge: Any, names: dict[int, str]) -> dict[tuple[str, int], str]:
    """(site, layer) -> the name of the transformers module whose input is the bridge's hook point.

    `names` maps the id of each module of the bridged copy to its name, taken before bridging. Sites without a single
    output projection are left out.
    """
    owners = _owners_of_inputs(bridge)
    module_names = {}
    for site in SITES:
        for layer in range(int(bridge.cfg.n_layers)):
            point = bridge.hook_dict.get(find_site(site).hook_name(layer))
            name = names.get(id(getattr(owners.get(id(point)), "original_component", None)))
            if name is not None:
                module_names[site, layer] = name
    return module_names


def _owners_of_inputs(bridge: Any) -> dict[int, nn.Module]:
    """Id of a hook point on an input -> the bridge component whose input it is."""
    return {
        id(module.hook_in): module
        for module in bridge.modules()
        if isinstance(getattr(module, "hook_in", None), nn.Module)
    }
