"""A HookedTransformer of TransformerLens 3.x: how it runs, and where its neurons are."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from rmtension._sites import find_site
from rmtension.bodies._experts import ExpertPoint
from rmtension.bodies._hooks import Hook, HookSite, InstalledHooks, count_foreign_hooks, has_own_hooks, modules_of
from rmtension.bodies._projections import Projection
from rmtension.bodies._prompt_runs import PromptRuns
from rmtension.data._token_places import TokenPlaces
from rmtension.data._tokens import TokenBatch
from rmtension.errors import ModelError


class HookedTransformerBody:
    """A HookedTransformer, built by the user or converted from transformers.

    If it has no norms (`normalization_type=None`), an identity takes the role of the final norm.
    """

    native: nn.Module | None = None
    runs_native = False
    reads_first = False
    # Transformers' config, which this model does not have.
    config: Any = None
    pack_up_to = 0
    prompt_runs: PromptRuns | None = None

    def __init__(self, model: nn.Module) -> None:
        self.module = self.model = model
        self.projection_names: dict[tuple[str, int], str] = {}
        self.experts: list[list[ExpertPoint]] = []  # this class has no site `expert`
        self._no_norm = nn.Identity()
        cfg: Any = model.cfg
        if getattr(cfg, "load_in_4bit", False):
            raise ModelError(
                "model: its weights are quantised (load_in_4bit), so neurons have no exact weights to read or to "
                "ablate. Load the model without load_in_4bit."
            )
        # The widest dtype, because `model.double()` changes all weights but not the config.
        dtypes = {parameter.dtype for parameter in model.parameters()}
        widest = max(dtypes, key=lambda dtype: dtype.itemsize)
        if dtypes | {cfg.dtype} != {widest}:
            raise ModelError(
                f"model: expected the same dtype in all weights and the config, got weights of "
                f"{' and '.join(sorted(map(str, dtypes)))} and a config of {cfg.dtype}, to which norms would round. "
                f"Convert the whole model: model.to({widest})."
            )

    @property
    def cfg(self) -> Any:
        """TransformerLens' config: n_layers, n_heads, d_model, n_ctx, ..."""
        return self.module.cfg

    @property
    def final_norm_folded(self) -> bool:
        """Whether weight processing moved the final norm's gain into the unembedding."""
        cfg: Any = self.module.cfg
        return str(getattr(cfg, "normalization_type", "")).endswith("Pre")

    @property
    def stable_up_to(self) -> int | None:
        """The longest text beside which the others of its batch keep their positions; None if they always keep them."""
        cfg: Any = self.module.cfg
        if not getattr(cfg, "use_dynamic_ntk_rope", False):
            return None
        return int(cfg.train_seq_length or cfg.n_ctx)

    @property
    def n_embeddings(self) -> int:
        """Rows of the embedding: token ids lie below."""
        cfg: Any = self.module.cfg
        return int(cfg.d_vocab)

    @property
    def final_norm(self) -> nn.Module:
        """The norm whose output the head multiplies, or an identity if the model has no norms."""
        norm: nn.Module = getattr(self.module, "ln_final", self._no_norm)
        return norm

    def block(self, layer: int) -> nn.Module:
        """The module whose input is the residual stream before `layer`."""
        model: Any = self.module
        block: nn.Module = model.blocks[layer]
        return block

    def modules(self) -> Iterator[nn.Module]:
        """Every module that may run."""
        return modules_of(self.module, self._no_norm)

    def last_mlp_only_at(self, batch: TokenBatch, places: TokenPlaces) -> AbstractContextManager[TokenPlaces | None]:
        """A context that does nothing: the whole MLP runs."""
        return nullcontext(None)

    @property
    def is_hooked(self) -> bool:
        """Whether the model has hooks, of the user or of this library."""
        return count_foreign_hooks(self.module) > 0 or has_own_hooks(self.modules())

    def residual(self, batch: TokenBatch) -> Float[Tensor, "row token d_model"]:
        """The residual stream after the final norm's gain; no unembedding."""
        captured: list[Tensor] = []
        model: Any = self.module
        has_norm = self.final_norm is not self._no_norm
        end = self.final_norm if has_norm else model.blocks[-1]
        hooks: list[tuple[HookSite, Hook]] = [(HookSite(end, "output"), captured.append)]
        with InstalledHooks(hooks + self._hiding_padding(batch)), self._fresh_alibi():
            # return_type=None skips the unembedding. Without a mask, TransformerLens guesses one from pad tokens, which
            # may be part of a text, if the tokenizer pads on the left. All ones, for the reason given in `run_base`.
            model(batch.input_ids, attention_mask=torch.ones_like(batch.input_ids), return_type=None)
        return captured[0] if has_norm else self._no_norm(captured[0])

    def hook_sites(self, site: str, layer: int) -> list[HookSite]:
        """The hook point of `site` in `layer`."""
        points: Any = self.module.hook_dict
        # A gated MLP has the first, an MLP with a norm inside the second; without them `hook_post` is act(hidden).
        more = {f"blocks.{layer}.mlp.hook_pre_linear", f"blocks.{layer}.mlp.hook_mid"} & set(points)
        if find_site(site).factor_of and more:
            raise ModelError(
                f"site {site!r}: a HookedTransformer computes the input of the down projection of layer {layer} from "
                "its activations before any hook can change them. Use site 'mlp', where Zero() and Scale(alpha) do the "
                "same, or open the model without model_class."
            )
        return [HookSite(find_site(site).hook_point(self.module, layer), "output", (site, layer))]

    def projection(self, site: str, layer: int) -> Projection:
        """The map from the neurons of `site` in `layer` into the residual stream: W_out with b_out, W_O with b_O."""
        (read,) = self.hook_sites(site, layer)
        inside: Any = self._inside(site, layer)
        weight, bias = self.weights(site, layer)
        return Projection(read, HookSite(inside, "output"), lambda channels: channels @ weight + bias, weight.dtype)

    def weights(self, site: str, layer: int) -> tuple[Float[Tensor, "channel d_model"], Float[Tensor, "d_model"]]:
        """The weight and the bias of that map: views of the parameters."""
        inside: Any = self._inside(site, layer)
        if find_site(site).name == "attn_head":
            return inside.W_O.flatten(0, 1), inside.b_O
        return inside.W_out, inside.b_out

    # -- inside ----------------------------------------------------------------------------------------------------

    def _inside(self, site: str, layer: int) -> nn.Module:
        block: Any = self.block(layer)
        inside: nn.Module = block.attn if find_site(site).name == "attn_head" else block.mlp
        return inside

    def _hiding_padding(self, batch: TokenBatch) -> list[tuple[HookSite, Hook]]:
        """Hooks that hide padding from bidirectional attention, to which TransformerLens does not apply a mask."""
        model: Any = self.module
        if model.cfg.attention_dir != "bidirectional":
            return []
        padding = ~batch.position_mask("all")[:, None, None, :]

        def hide(scores: Tensor) -> Tensor:
            return scores.masked_fill(padding.to(scores.device), -torch.inf)

        return [(HookSite(block.attn.hook_attn_scores, "output"), hide) for block in model.blocks]

    @contextmanager
    def _fresh_alibi(self) -> Iterator[None]:
        """Run without the ALiBi biases that attention cached in an earlier, longer run, and cache none of this run.

        With a causal mask, the cached biases would differ by a constant per token, so only by rounding; without one,
        they would be wrong.
        """
        model: Any = self.module
        kept = [block.attn.__dict__.get("alibi") for block in model.blocks]
        has_alibi = model.cfg.positional_embedding_type == "alibi"
        try:
            for block in model.blocks if has_alibi else ():
                block.attn.alibi = None
            yield
        finally:
            for block, biases in zip(model.blocks, kept, strict=True):
                if has_alibi:
                    block.attn.alibi = biases
