"""A hooked transformer with its tokenizer: how it runs, and where its neurons are."""

import hashlib
import json
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack, suppress
from functools import cached_property, partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from rmtension.body import Body
from rmtension.budget import enough_tokens, free_bytes, tokens_that_fit
from rmtension.distributed import current
from rmtension.encoding import EncodedPairs, EncodedText, encode_pairs
from rmtension.errors import ModelError, OptionError
from rmtension.hooks import AllSeen, InstalledHooks, all_fire, count_foreign_hooks, eager_eval, has_own_hooks, is_placed
from rmtension.pairs import PreferencePairs
from rmtension.site_widths import measure_sites
from rmtension.sites import find_site
from rmtension.tokens import TokenBatch, running

# How far rounding may put a text in a batch from the same text alone, relative to its residual stream.
_PADDING_TOLERANCE = {torch.float16: 0.05, torch.bfloat16: 0.2}


class HookedModel:
    """What `RewardHead` is without a reward: a body that runs, in eval mode whatever mode it is in, and its neurons."""

    def __init__(
        self,
        body: Body,
        *,
        tokenizer: Any,
        pad_token_id: int | None,
        max_length: int | None,
        tokens_per_batch: int | None,
    ) -> None:
        self.truncate_response, self.on_nonfinite = False, "raise"  # MERGE: options of opening
        self.model = body.model
        self.tokenizer = tokenizer
        self.pad_token_id = pad_token_id
        self.body = body
        parameter = next(self.body.module.parameters())
        self.device, self.dtype = parameter.device, parameter.dtype
        cfg: Any = self.model.cfg
        self.n_layers, self.n_heads, self.d_model = int(cfg.n_layers), int(cfg.n_heads), int(cfg.d_model)
        context = int(cfg.n_ctx)
        if max_length is not None and not 0 < max_length <= context:
            raise OptionError(f"max_length: expected 1 to {context} (the model's context), got {max_length}.")
        self.max_length = max_length or context
        stable = body.stable_up_to
        if stable is not None and self.max_length > stable:
            raise OptionError(
                f"max_length: expected at most {stable}, got {self.max_length}: one longer text changes the rotary "
                "positions of its whole batch (use_dynamic_ntk_rope), so that a text would get another reward in "
                f"company. Pass max_length={stable}."
            )
        if tokens_per_batch is not None and tokens_per_batch < 1:
            raise OptionError(f"tokens_per_batch: expected a positive number, got {tokens_per_batch}.")
        self.tokens_per_batch = tokens_per_batch
        if tokenizer is not None and len(tokenizer) > self.body.n_embeddings:
            raise ModelError(
                f"tokenizer: it has {len(tokenizer)} tokens, the model's embedding has {self.body.n_embeddings} rows. "
                "Pass the tokenizer that the model was trained with; where tokens were added since, call "
                "model.resize_token_embeddings(len(tokenizer)) and save the model."
            )
        with eager_eval(self.body.modules()):
            self._widths, self._missing, self._runs_once = measure_sites(self.body, self.n_layers, self.device)

    @torch.no_grad()
    def require_hidden_padding(self) -> None:
        """Raise `ModelError` where a short text beside a longer one is not what it is alone. Cost: two short runs."""
        longest = min(6, self.max_length)
        ids = [number % self.body.n_embeddings for number in range(longest)]
        texts = [EncodedText(tuple(ids[:length]), 0, 0) for length in (max(1, longest // 2), longest)]
        streams = []
        for some in (texts[:1], texts):
            batch = TokenBatch.from_texts(some, range(len(some)), pad_token_id=None, device=self.device)
            streams.append(batch.at_last(self.residual(batch))[0].double())
        off = float((streams[1] - streams[0]).abs().max() / streams[0].abs().max().clamp(min=1e-12))
        if off > _PADDING_TOLERANCE.get(self.dtype, 1e-4):
            raise ModelError(
                f"model: padding behind a text changes its residual stream by {off:.1e} of its size, so a text would "
                f"get another reward in a batch than alone. The attention of this {type(self.body.module).__name__} is "
                "not causal, as in an encoder; this library reads models with causal attention."
            )

    def residual(self, batch: TokenBatch) -> Float[Tensor, "row token d_model"]:
        """Run the blocks and the final norm, not the vocabulary projection, with every hook firing."""
        modules = list(self.body.modules())
        with running(batch), eager_eval(modules), all_fire(modules):
            return self.body.residual(batch)

    @torch.no_grad()
    def look(self, batch: TokenBatch, sites: Sequence[str], visit: Callable[[str, int, Tensor], None]) -> None:
        """Run a batch as far as `visit(site, layer, activation)` has seen the activations of some sites in all layers.

        Activations are [row, token, channel]. Where the model runs through transformers' own modules and nobody else
        looks, nothing above the last of them is computed.
        """
        body = self.body
        left = set(sites)
        # Nobody else looks, and accelerate has nothing to put back.
        may_stop = self._runs_once and body.runs_plain and not has_own_hooks(body.modules())
        may_stop = may_stop and not count_foreign_hooks(body.module) and not is_placed(body.modules())

        def look(site: str, layer: int, activation: Tensor) -> None:
            visit(site, layer, activation.reshape(*batch.input_ids.shape, -1))
            if layer == self.n_layers - 1:
                left.discard(site)
                if may_stop and not left:
                    raise AllSeen

        with ExitStack() as hooks, suppress(AllSeen):
            for site in left.copy():
                hooks.enter_context(self.hooks(site, partial(look, site)))
            self.residual(batch)

    def encode(self, pairs: PreferencePairs) -> EncodedPairs:
        """Tokens of both texts of every pair, within `max_length`."""
        return encode_pairs(self.tokenizer, pairs, max_length=self.max_length, truncate_response=self.truncate_response)

    def tokens_together(self, *, keeps_layers: bool = False) -> int:
        """How many tokens run together: what the user said, or what pays off and fits into memory.

        `keeps_layers` says that something of every layer is kept, for gradients or to run again. The same in all
        processes that share the work.
        """
        if self.tokens_per_batch is not None:
            return self.tokens_per_batch
        enough, free = enough_tokens(self.device), free_bytes(self.device)
        if free is not None:
            fitting = tokens_that_fit(
                free,
                n_layers=self.n_layers if keeps_layers else 1,
                d_model=self.d_model,
                d_mlp=self._widths.get("mlp", 4 * self.d_model),
                itemsize=self.dtype.itemsize,
            )
            enough = min(enough, fitting)
        return current().least(enough)

    @cached_property
    def setup_digest(self) -> str:
        """32 hexadecimal digits over what the model computes with beside its weights: tokenizer, config and limits."""
        backend = getattr(self.tokenizer, "backend_tokenizer", None)
        config = getattr(getattr(self.model, "original_model", None), "config", None)
        parts = [
            str(self.dtype),
            self.device.type,
            self.max_length,
            self.pad_token_id,
            None if backend is None else backend.to_str(),
            str(getattr(self.tokenizer, "chat_template", None)),
            str(self.model.cfg) if config is None else config.to_json_string(),
        ]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:32]

    @property
    def sites(self) -> list[str]:
        """The sites that this model has in every layer; a mixture of experts has no `mlp`."""
        return sorted(self._widths)

    def n_neurons(self, site: str) -> int:
        """Neurons per layer at `site`: hidden units of the MLP, or attention heads."""
        channels = self.n_channels(site)
        return self.n_heads if site == "attn_head" else channels

    def n_channels(self, site: str) -> int:
        """Columns per layer at `site`: one a neuron for `mlp` and `mlp_gate`, `d_head` a head for `attn_head`."""
        if find_site(site).name in self._missing:
            raise self._missing[site]
        return self._widths[site]

    def hooks(
        self,
        site: str,
        visit: Callable[[int, Tensor], Tensor | None],
        layers: Iterable[int] | None = None,
        *,
        any_tokens: bool = False,
    ) -> InstalledHooks:
        """A context in which `visit(layer, activation)` sees, and may replace, the activation at `site`.

        The activation is what the projection below reads (for `mlp_gate` the factor act(gate) of it): [row, token,
        channel], or with the first two flattened, or with the last split into heads, as the model's family has it. A
        row is a text, or several that share a prefix (`rmtension.packing`). With `any_tokens` the visit takes whatever
        tokens there are: in the last block those that rewards are read from may be all.
        """
        self.n_channels(site)  # raises where the model has no such site
        chosen = range(self.n_layers) if layers is None else layers
        return InstalledHooks(
            [(spot, partial(visit, layer)) for layer in chosen for spot in self.body.spots(site, layer)],
            any_tokens=any_tokens,
        )

    @property
    def reward_dtype(self) -> torch.dtype:
        """What rewards and sums are computed in: float32, or float64 for a model in float64."""
        return torch.float64 if self.dtype == torch.float64 else torch.float32

    @property
    def architecture(self) -> str:
        """Family, layers and widths: what makes neuron (l, j) of two models the same place."""
        cfg: Any = self.model.cfg
        config = getattr(getattr(self.model, "original_model", None), "config", None)
        family = getattr(config, "model_type", None) or str(getattr(cfg, "original_architecture", "") or "transformer")
        for suffix in ("lmheadmodel", "forcausallm", "_"):
            family = family.lower().replace(suffix, "")
        mlp, heads = (self._widths.get(site, 0) for site in ("mlp", "attn_head"))
        return f"{family}-{self.n_layers}x{mlp}-heads{self.n_heads}x{heads // self.n_heads}-d{self.d_model}"
