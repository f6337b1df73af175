"""A reward model that runs: residual stream, rewards, hooks on its neurons, and what identifies it.

`rmtension.RewardHead` adds opening, scoring and saving. Everything that runs a model (passes, ablation, attribution)
takes this class.
"""

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, suppress
from functools import partial
from importlib.metadata import version
from typing import Any, Unpack

import torch
from jaxtyping import Float
from torch import Tensor

from rmtension._sites import find_site
from rmtension.bodies._bodies import Body
from rmtension.bodies._hooks import AllSeen, InstalledHooks, all_fire, count_foreign_hooks, has_own_hooks, is_placed
from rmtension.bodies._native_weights import adapters_in_use
from rmtension.bodies._run_modes import eager_eval
from rmtension.bodies._site_widths import measure_sites
from rmtension.data._budget import enough_tokens, free_bytes, tokens_that_fit
from rmtension.data._encoding import EncodedPairs, EncodedText
from rmtension.data._pairs import PreferencePairs
from rmtension.data._segments import pair_encoder
from rmtension.data._token_places import ReadAt, TokenPlaces
from rmtension.data._tokens import TokenBatch, running
from rmtension.distributed import current
from rmtension.errors import DataError, ModelError, OptionError
from rmtension.heads._head import Head
from rmtension.heads._readout import Readout
from rmtension.models._checkpoint import Checkpoint
from rmtension.models._run_options import RunOptions, check_run_options, usable_length
from rmtension.models._streamed_weights import StreamedWeights
from rmtension.store._provenance import Provenance, digest_of_tokenizer, fingerprint


class RewardModel(Readout):
    """The base class of `RewardHead`: a transformer with a tokenizer, a head, and hooks on its neurons.

    The reward of a text is one output of the head, or the difference of two, for the residual stream after the final
    norm: for a linear head, `weight @ h + bias` at the last token. The model is not changed, and always runs in eval
    mode. Users open one with `RewardHead`.

    Args:
        body: the transformer, which also says where its neurons are.
        head: the head; None for a language model without a reward.
        choice: the number of the output that is the reward, or two numbers for a difference; None if none is chosen.
        tokenizer: None for a model that is only run on token ids.
        pad_token_id: tokens with this id are skipped at the end of a text; None skips nothing.
        checkpoint: the checkpoint that the model was made from; None for a model that the user built.
        **options: see `rmtension.models.RunOptions`.

    Examples:
        >>> isinstance(head, RewardModel)
        True
        >>> head.architecture, head.sites, head.n_neurons("mlp")
        ('gpt2-2x24-heads2x12-d24', ['attn_head', 'mlp', 'mlp_gate'], 24)
        >>> from rmtension.data._tokens import TokenBatch
        >>> tokens = head.tokenizer(["Human: a Assistant: helpful-0 end"], return_tensors="pt")
        >>> batch = TokenBatch.from_rows(tokens["input_ids"], tokens["attention_mask"].bool())
        >>> with head.hooks("mlp", lambda layer, activation: torch.zeros_like(activation), layers=[0]):
        ...     head.rewards(batch).shape
        torch.Size([1])
    """

    def __init__(
        self,
        body: Body,
        head: Head | None,
        *,
        choice: tuple[int, ...] | None,
        tokenizer: Any,
        pad_token_id: int | None,
        checkpoint: Checkpoint | None = None,
        **options: Unpack[RunOptions],
    ) -> None:
        self.model = body.model
        self.tokenizer = tokenizer
        self.pad_token_id = pad_token_id
        self.body = body
        self.checkpoint = checkpoint
        parameter = next(self.body.module.parameters())
        self.device, self.dtype = parameter.device, parameter.dtype
        cfg = body.cfg
        self.n_layers, self.n_heads, self.d_model = int(cfg.n_layers), int(cfg.n_heads), int(cfg.d_model)
        check_run_options(options)
        context = int(cfg.n_ctx)
        self.max_length = usable_length(options.get("max_length"), context=context, stable_up_to=body.stable_up_to)
        self.tokens_per_batch = options.get("tokens_per_batch")
        self.truncate_response = options.get("truncate_response", False)
        self.on_nonfinite = options.get("on_nonfinite", "raise")
        self.two_segments = options.get("two_segments", False)
        if tokenizer is not None and len(tokenizer) > self.body.n_embeddings:
            raise ModelError(
                f"tokenizer: it has {len(tokenizer)} tokens, the model's embedding has {self.body.n_embeddings} rows. "
                "Pass the tokenizer that the model was trained with; where tokens were added since, call "
                "model.resize_token_embeddings(len(tokenizer)) and save the model."
            )
        with eager_eval(self.body.modules()):
            self._widths, self._missing, self._runs_once = measure_sites(self.body, self.n_layers, self.device)
        super().__init__(head, choice, device=self.device, dtype=self.reward_dtype)
        # The weights that are read from the checkpoint's files while the model runs, if there are any.
        self.streamed: StreamedWeights | None = None
        self._fingerprint: tuple[object, str] | None = None
        # Shared with the other outputs of this model, so that the weights are read once.
        self._body_fingerprint: list[tuple[object, str]] = []
        self._tokenizer_digest: tuple[object, str | None] | None = None
        self._head_state: object = None
        # The weighted sums that were added to the outputs of the checkpoint's head.
        self.weighted_sums: tuple[Mapping[str, float], ...] = ()

    # -- what it is ------------------------------------------------------------------------------------------------

    @property
    def run_options(self) -> RunOptions:
        """The options that the model was opened with, to open another model in the same way."""
        return {
            "max_length": self.max_length,
            "tokens_per_batch": self.tokens_per_batch,
            "truncate_response": self.truncate_response,
            "on_nonfinite": self.on_nonfinite,
            "two_segments": self.two_segments,
        }

    @property
    def read_at(self) -> ReadAt:
        """Which token of a text the reward is read from, and `positions="last"` selects."""
        first = None if self.head is None else self.head.reads_first
        return ReadAt(self.pad_token_id, first=self.body.reads_first if first is None else first)

    @property
    def sites(self) -> list[str]:
        """The sites that the model has in every layer; a mixture of experts has `expert` in place of `mlp`."""
        return sorted(self._widths)

    def n_neurons(self, site: str) -> int:
        """Neurons per layer at `site`: hidden units of the MLP or of all experts, or attention heads."""
        channels = self.n_channels(site)
        return self.n_heads if site == "attn_head" else channels

    def n_channels(self, site: str) -> int:
        """Columns per layer at `site`: `d_head` per head for `attn_head`, one per neuron for other sites."""
        if find_site(site).name in self._missing:
            raise self._missing[site]
        return self._widths[site]

    @property
    def reward_dtype(self) -> torch.dtype:
        """The dtype of rewards and sums: float32, or float64 for a model in float64."""
        return torch.float64 if self.dtype == torch.float64 else torch.float32

    @property
    def architecture(self) -> str:
        """Family, layers and widths; neuron (l, j) of two models is comparable if their architectures are equal."""
        config = self.body.config
        family = getattr(config, "model_type", None) or str(
            getattr(self.body.cfg, "original_architecture", "") or "transformer"
        )
        for suffix in ("lmheadmodel", "forcausallm", "_"):
            family = family.lower().replace(suffix, "")
        width, heads, experts = (self._widths.get(site, 0) for site in ("mlp", "attn_head", "expert"))
        n_experts = self.body.experts[0][0].n_experts if experts else 0
        mlp = f"{n_experts}x{experts // n_experts}" + (f"-mlp{width}" if width else "") if n_experts else str(width)
        return f"{family}-{self.n_layers}x{mlp}-heads{self.n_heads}x{heads // self.n_heads}-d{self.d_model}"

    @property
    def fingerprint(self) -> str:
        """16 hexadecimal digits over every weight and the head. Reads all weights, again only after one has changed.

        A change through `parameter.data` goes unnoticed, because PyTorch does not count it: edit weights under
        `torch.no_grad()`.
        """
        (tensors, what), body = self.identity, self.body_fingerprint
        state = (what, body, _state(tensors))
        if self._fingerprint is None or self._fingerprint[0] != state:
            self._fingerprint = (state, fingerprint(tensors, body, what))
        return self._fingerprint[1]

    @property
    def body_fingerprint(self) -> str:
        """The same over the weights without the head: all outputs of a model have this in common."""
        parameters = list(self.body.module.parameters())
        about = [self.architecture, *adapters_in_use(self.body.module)]
        state = (about, _state(parameters))
        if not self._body_fingerprint or self._body_fingerprint[0][0] != state:
            self._body_fingerprint[:] = [(state, fingerprint(parameters, *about))]
        return self._body_fingerprint[0][1]

    def provenance(
        self, digest: str, n_pairs: int, n_tokens: int, *, site: str, positions: str, method: str
    ) -> Provenance:
        """The provenance of a result that this model computes from tokens of the pairs with this `digest`."""
        return Provenance(
            architecture=self.architecture,
            model=self.fingerprint,
            site=site,
            positions=positions,
            method=method,
            dtype=str(self.dtype).removeprefix("torch."),
            data=digest[:16],
            n_pairs=n_pairs,
            n_tokens=n_tokens,
            version=version("rmtension"),
            body=self.body_fingerprint,
            output=self.output_name,
        )

    @property
    def setup_digest(self) -> str:
        """32 hexadecimal digits over what rewards depend on besides the weights: tokenizer, config and limits now."""
        config = self.body.config
        parts = [
            str(self.dtype),
            self.device.type,
            self.max_length,
            self.pad_token_id,
            self.two_segments,
            self._digest_of_tokenizer(),
            str(getattr(self.tokenizer, "chat_template", None)),
            str(self.body.cfg) if config is None else config.to_json_string(),
            *(["truncate_response"] if self.truncate_response else []),
        ]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:32]

    def _digest_of_tokenizer(self) -> str | None:
        """`digest_of_tokenizer`, computed again only for another tokenizer or vocabulary."""
        backend = getattr(self.tokenizer, "backend_tokenizer", None)
        now = (id(backend), None if backend is None else backend.get_vocab_size())
        if self._tokenizer_digest is None or self._tokenizer_digest[0] != now:
            self._tokenizer_digest = (now, digest_of_tokenizer(self.tokenizer))
        return self._tokenizer_digest[1]

    def __repr__(self) -> str:
        files = "" if self.streamed is None else f", {self.streamed}"
        return f"{type(self).__name__}({self.architecture}, {self.dtype}, {self.device}{files})"

    # -- running ---------------------------------------------------------------------------------------------------

    @property
    def runs_prompts_first(self) -> bool:
        """Whether prompts can run before the rows of a batch: nothing reads or hooks them."""
        body = self.body
        if self.head is None or not self.head.reads_last_only or body.prompt_runs is None:
            return False
        return body.pack_up_to > 0 and not body.is_hooked and body.prompt_runs.works

    def after_prompts(self, batch: TokenBatch) -> TokenBatch:
        """The batch, ready to run: its prompts, if its rows begin after them, have run without gradients."""
        if batch.prompts is None:
            return batch
        runs = self.body.prompt_runs
        assert runs is not None
        with eager_eval(list(self.body.modules())):
            return batch.with_prompts(runs.run(batch.prompts))

    def residual(self, batch: TokenBatch) -> Float[Tensor, "row token d_model"]:
        """Run the blocks and the final norm, not the vocabulary projection, with every hook firing."""
        modules = list(self.body.modules())
        with running(batch), eager_eval(modules), all_fire(modules):
            return self.body.residual(batch)

    @torch.no_grad()
    def rewards(self, batch: TokenBatch) -> Float[Tensor, "text"]:
        """The rewards of one batch on its device, without gradients; the last MLP runs only where a reward is read."""
        with self.last_mlp_where_read(batch):
            return self.forward(batch)

    def forward(self, batch: TokenBatch) -> Float[Tensor, "text"]:
        """The rewards of one batch on its device, with gradients unless the caller disabled them."""
        self.require_same_head()
        places = self.require_head().tokens(batch)
        return self.read_places(batch.gather(places, self.residual(batch)), places, batch)

    @torch.no_grad()
    def all_outputs(self, batch: TokenBatch) -> Float[Tensor, "text output"]:
        """Every output of the head for the texts of a batch. Cost: that of `rewards`."""
        self.require_same_head()
        places = self.require_head().tokens(batch)
        with self.last_mlp_where_read(batch):
            states = batch.gather(places, self.residual(batch))
        return self.read_outputs(states, places, batch)

    def require_same_head(self) -> None:
        """Raise `ModelError` if the score layer of the model in memory has changed since it was copied."""
        classifier = None if self.checkpoint is None else self.checkpoint.classifier
        if classifier is None:
            return
        assert self.checkpoint is not None
        state = tuple((id(tensor), tensor._version) for tensor in self.checkpoint.live_head.values())
        if state != self._head_state:
            self.checkpoint.require_same_head()
            self._head_state = state

    def require_all_pairs(self) -> None:
        """Raise `OptionError` if the model skips pairs: results that are compared pair by pair need all of them."""
        if self.on_nonfinite == "skip":
            raise OptionError(
                "head: expected a model that raises an error for NaN and infinity, got one that skips such pairs. Open "
                'it with on_nonfinite="raise"; RewardHead.check helps to find the cause.'
            )

    def last_mlp_where_read(self, batch: TokenBatch) -> AbstractContextManager[TokenPlaces | None]:
        """A context in which the last MLP may run only at the tokens that the head reads; yields those tokens."""
        return self.body.last_mlp_only_at(batch, self.require_head().tokens(batch))

    def hooks(
        self,
        site: str,
        visit: Callable[[int, Tensor], Tensor | None],
        layers: Iterable[int] | None = None,
        *,
        any_tokens: bool = False,
    ) -> InstalledHooks:
        """A context manager in which `visit(layer, activation)` reads, and may replace, the activation at `site`.

        The activation is the input of the site's output projection (for `mlp_gate` its factor act(gate)). Its shape is
        [row, token, channel], or with the first two dimensions flattened, or with the last one split into heads,
        depending on the model's family. A row is one text, or several texts that share a prefix
        (`docs/performance.md`). With `any_tokens` the visit must accept any subset of tokens: the last block may run
        only at the tokens that rewards are read from. Raises `OptionError` for a layer that the model does not have.
        """
        self.n_channels(site)  # raises where the model has no such site
        chosen = list(range(self.n_layers) if layers is None else layers)
        if not all(0 <= layer < self.n_layers for layer in chosen):
            raise OptionError(f"layers: expected numbers from 0 to {self.n_layers - 1}, got {chosen!s:.100}.")
        return InstalledHooks(
            [(hook_site, partial(visit, layer)) for layer in chosen for hook_site in self.body.hook_sites(site, layer)],
            any_tokens=any_tokens,
        )

    @torch.no_grad()
    def observe(self, batch: TokenBatch, sites: Sequence[str], visit: Callable[[str, int, Tensor], None]) -> None:
        """Run a batch and call `visit(site, layer, activation)` for every layer of some sites.

        Activations are [row, token, channel]. The run stops after the last visit, unless other hooks on the model need
        the rest of it.
        """
        body = self.body
        left = set(sites)
        # Only if no other hook needs the rest of the run, and accelerate has no module to clean up after.
        may_stop = self._runs_once and body.runs_native and not has_own_hooks(body.modules())
        may_stop = may_stop and not count_foreign_hooks(body.module) and not is_placed(body.modules())

        def visit_layer(site: str, layer: int, activation: Tensor) -> None:
            visit(site, layer, activation.reshape(*batch.input_ids.shape, -1))
            if layer == self.n_layers - 1:
                left.discard(site)
                if may_stop and not left:
                    raise AllSeen

        with ExitStack() as hooks, suppress(AllSeen):
            for site in left.copy():
                hooks.enter_context(self.hooks(site, partial(visit_layer, site)))
            self.residual(batch)

    def encode(self, pairs: PreferencePairs) -> EncodedPairs:
        """The token ids of both texts of every pair, within `max_length`."""
        encode = pair_encoder(two_segments=self.two_segments)
        encoded = encode(self.tokenizer, pairs, max_length=self.max_length, truncate_response=self.truncate_response)
        for pair, *sides in zip(pairs, encoded.chosen, encoded.rejected, strict=True):
            for side, text in zip(("chosen", "rejected"), sides, strict=True):
                self.require_text(text, f"pair {pair.id!r}, {side}")
        return encoded

    def require_text(self, text: EncodedText, what: str) -> None:
        """Raise `DataError`, which begins with `what`, for a text that the model or its head cannot read."""
        media = frozenset() if self.checkpoint is None else self.checkpoint.media_tokens
        found = media.intersection(text.ids) if media else ()
        if found:
            raise DataError(
                f"{what}: it has the tokens {sorted(found)}, which stand for images, videos or sounds. Only the "
                "language model of this model runs, on text alone: remove the images and their tokens."
            )
        if self.head is not None:
            self.head.require_text(text, what)

    def tokens_together(self, *, keeps_layers: bool = False) -> int:
        """How many tokens to run together: `tokens_per_batch`, or as many as are efficient and fit into memory.

        `keeps_layers` says that activations of every layer are kept, for gradients or to run layers again. All
        processes that share a run get the same number.
        """
        if self.tokens_per_batch is not None:
            return self.tokens_per_batch
        enough, free = enough_tokens(self.device), free_bytes(self.device)
        if free is not None:
            fitting = tokens_that_fit(
                free,
                n_layers=self.n_layers if keeps_layers else 1,
                d_model=self.d_model,
                d_mlp=sum(self._widths.get(site, 0) for site in ("mlp", "expert")) or 4 * self.d_model,
                itemsize=self.dtype.itemsize,
            )
            enough = min(enough, fitting)
        return current().least(enough)


def _state(tensors: Sequence[Tensor]) -> tuple[object, ...]:
    """What changes when PyTorch changes one of some tensors."""
    return tuple((tensor.data_ptr(), tensor._version) for tensor in tensors)
