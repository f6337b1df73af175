"""A model of transformers without a TransformerBridge: transformers' own modules run, with hooks on its projections."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import cached_property, partial
from itertools import chain
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from rmtension._sites import find_site
from rmtension.bodies._experts import ExpertPoint, expert_point
from rmtension.bodies._gate_search import GATE_ROWS, find_gates
from rmtension.bodies._hooks import HookSite, count_foreign_hooks, has_own_hooks, modules_of
from rmtension.bodies._native_run import find_last_mlp, measure_packing, probe_batch, run_base
from rmtension.bodies._native_sites import find_native_sites
from rmtension.bodies._projections import Projection
from rmtension.bodies._prompt_runs import PromptRuns
from rmtension.bodies._rope import RopeByText
from rmtension.bodies._run_modes import eager_eval, unwrapped
from rmtension.data._token_places import TokenPlaces
from rmtension.data._tokens import TokenBatch
from rmtension.errors import ModelError

# How configs name the number of tokens that a text may have.
_CONTEXTS = ("max_position_embeddings", "n_positions", "max_sequence_length", "max_seq_len", "seq_length")
# The context of a model whose config does not limit it.
_NO_LIMIT = 2048


@dataclass(frozen=True)
class NativeConfig:
    """The sizes of a model, by the names that TransformerLens' configs use."""

    n_layers: int
    n_heads: int
    d_model: int
    n_ctx: int
    attn_only: bool = False


class NativeBody:
    """A base model of transformers, causal or bidirectional (an encoder), that TransformerLens does not wrap.

    `head.model` is transformers' own module. The projections are found by `find_native_sites`, which proves them. A
    text in a batch gets the same states as alone: padding is hidden by causal attention, or, unless `is_causal`, by the
    attention mask.

    Raises `ModelError` if neither an MLP nor an attention projection is found.
    """

    runs_native = True
    final_norm_folded = False
    stable_up_to: int | None = None

    def __init__(self, base: nn.Module, *, is_causal: bool = True, reason: str = "") -> None:
        self.module: nn.Module = base
        self.model: nn.Module = base
        self.native: nn.Module = base
        self.is_causal = is_causal
        # A linear head reads the first token of an encoder's text.
        self.reads_first = not is_causal
        # Why there is no TransformerBridge.
        self.reason = reason
        sites = find_native_sites(base)
        self._sites = sites
        self.projection_names = sites.projections
        if not sites.projections:
            raise ModelError(
                f"model: neither the MLP nor attention of {type(unwrapped(base)).__name__} has an output projection "
                f"that hooks reach: {'; '.join(f'{site}: {why}' for site, why in sites.missing.items())}."
            )
        self.cfg = NativeConfig(len(sites.blocks), sites.n_heads, sites.d_model, _context_of(base))
        self._foreign = count_foreign_hooks(base)
        self._rope = RopeByText(self.modules(), self._run_one, self.cfg.n_ctx)
        self._pack_up_to = measure_packing(base, self.n_embeddings, self._rope.same_up_to) if self.is_causal else 0
        # How prompts run before the rows of a batch.
        self.prompt_runs: PromptRuns | None = PromptRuns(base, self.cfg.n_layers, self.n_embeddings)
        last = self.cfg.n_layers - 1
        path = self.projection_names.get(("mlp", last))
        self._last_mlp = find_last_mlp(
            base, path, self.block(last), self.n_embeddings, hides_padding=not self.is_causal
        )

    @property
    def config(self) -> Any:
        """Transformers' config of the model."""
        return unwrapped(self.module).config

    @property
    def pack_up_to(self) -> int:
        """The longest row that two texts may share; 0 if texts may not share rows, as in an encoder."""
        return self._pack_up_to

    def last_mlp_only_at(self, batch: TokenBatch, places: TokenPlaces) -> AbstractContextManager[TokenPlaces | None]:
        """`LastMLP.only_at` if the model can run that way, otherwise a context that does nothing."""
        return nullcontext(None) if self._last_mlp is None else self._last_mlp.only_at(batch, places)

    @property
    def is_hooked(self) -> bool:
        """Whether the model has hooks, of the user or of this library."""
        return count_foreign_hooks(self.module) != self._foreign or has_own_hooks(self.modules())

    def residual(self, batch: TokenBatch) -> Float[Tensor, "row token d_model"]:
        """The last hidden state of the model."""
        with self._rope.for_texts(batch):
            return run_base(self.module, batch, hides_padding=not self.is_causal)

    def hook_sites(self, site: str, layer: int) -> list[HookSite]:
        """The hook site of the activation of `site` in `layer`."""
        if site == "expert":
            return [HookSite(point, "output", (site, layer)) for point in self.experts[layer]]
        hook_site = self._gates[layer] if find_site(site).factor_of else self._projected(site, layer)
        return [replace(hook_site, place=(site, layer))]

    def projection(self, site: str, layer: int) -> Projection:
        """The map from the neurons of `site` in `layer` into the residual stream."""
        return Projection.of(self._projected(site, layer).module)

    @property
    def n_embeddings(self) -> int:
        """Rows of the embedding: token ids lie below."""
        model: Any = self.module
        return int(model.get_input_embeddings().weight.shape[0])

    @property
    def final_norm(self) -> nn.Module:
        """The norm between the last block and the output of the model."""
        if self._sites.final_norm is None:
            raise ModelError(
                f"model: {type(unwrapped(self.module)).__name__} has {self._sites.missing['final norm']}, so its "
                "reward cannot be split into what its parts add. Use a method that does not split the reward, such as "
                "attribution_patching."
            )
        return self.module.get_submodule(self._sites.final_norm)

    def block(self, layer: int) -> nn.Module:
        """The module whose input is the residual stream before `layer`."""
        return self.module.get_submodule(self._sites.blocks[layer])

    @cached_property
    def experts(self) -> list[list[ExpertPoint]]:
        """The hook point of `expert` in every layer."""
        with eager_eval(self.module.modules()):
            return [[expert_point(self.block(layer), layer)] for layer in range(self.cfg.n_layers)]

    def modules(self) -> Iterator[nn.Module]:
        """Every module that may run."""
        # Hook points that no module has as a submodule, if they were needed so far.
        points: list[list[ExpertPoint]] = vars(self).get("experts", [])
        return chain(modules_of(self.module), chain.from_iterable(points))

    # -- inside ----------------------------------------------------------------------------------------------------

    def _projected(self, site: str, layer: int) -> HookSite:
        name = self.projection_names.get((site, layer))
        if name is None:
            raise ModelError(
                f"site {site!r}: this {type(unwrapped(self.module)).__name__} has no output projection that every "
                f"neuron goes through: {self._sites.missing[site]}. Use another site (experts: 'expert')."
            )
        return HookSite(self.module.get_submodule(name), "input")

    @cached_property
    def _gates(self) -> list[HookSite]:
        """The hook site of `mlp_gate` in every layer."""
        inputs = [self._projected("mlp", layer) for layer in range(self.cfg.n_layers)]
        batch = probe_batch(min(4, self.n_embeddings), next(self.module.parameters()).device, GATE_ROWS)
        with eager_eval(self.modules()):
            return find_gates(partial(run_base, self.module, batch), self.module.modules(), inputs)

    def _run_one(self) -> None:
        """Run the model on one token."""
        batch = probe_batch(1, next(self.module.parameters()).device)
        with torch.no_grad(), eager_eval(self.modules()):
            run_base(self.module, batch)


def _context_of(base: Any) -> int:
    """The number of tokens that a text may have."""
    config = unwrapped(base).config.get_text_config()
    sizes = [getattr(config, name, None) for name in _CONTEXTS]
    context = next((size for size in sizes if isinstance(size, int) and size > 0), _NO_LIMIT)
    of_tokens = base.get_input_embeddings()
    for module in base.modules():
        # RoBERTa numbers positions from padding_idx + 1 on, so the first padding_idx + 1 rows of its table hold none.
        is_table = isinstance(module, nn.Embedding) and module.num_embeddings == context and module is not of_tokens
        if is_table and module.padding_idx is not None:
            return context - int(module.padding_idx) - 1
    return context
