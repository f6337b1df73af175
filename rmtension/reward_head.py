"""A reward model with hooks: a scalar head on a TransformerBridge or a HookedTransformer."""

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from tqdm.auto import tqdm

from rmtension.body import Body, find_body
from rmtension.checkpoints import OpenedCheckpoint, open_checkpoint
from rmtension.errors import ModelError, OptionError
from rmtension.hooks import InstalledHooks
from rmtension.pairs import PreferencePairs
from rmtension.provenance import Provenance
from rmtension.scored import ScoredPairs
from rmtension.sites import SITES, find_site
from rmtension.tokens import (
    DEFAULT_TOKENS_PER_BATCH,
    EncodedPairs,
    TokenBatch,
    compact,
    encode_pairs,
    encode_texts,
    last_token,
    pair_batches,
    running,
    text_batches,
)


class RewardHead:
    """Scores texts with a hooked transformer and a linear head, and names its neurons.

    The reward of a text is `weight @ h + bias`, h the residual stream after the final norm at the last token
    (`rmtension.tokens.last_token`). Nothing here changes the model: it runs in eval mode and is handed back in the
    mode it had.

    Args:
        model: a `TransformerBridge` or `HookedTransformer`. One whose final norm was folded into the unembedding
            raises `ModelError`: its residual stream is off by the norm's gain.
        weight: the head's row, `d_model` numbers (or a matrix of one row). None makes a head without a reward, for
            reading activations of a language model.
        bias: added to every reward.
        tokenizer: needed to score texts. The model's own is not taken: TransformerLens makes it prepend a BOS token.
        pad_token_id: skipped at the end of a text, as transformers' classifiers do; None skips nothing.
        max_length: tokens per text; by default, and at most, the model's context.
        tokens_per_batch: how many tokens run together; by default 4,096 on a CPU, 32,768 on another device.
        body: how the model runs, where opening a checkpoint knows better than `model` shows.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        weight: Tensor | None,
        bias: float = 0.0,
        tokenizer: Any = None,
        pad_token_id: int | None = None,
        max_length: int | None = None,
        tokens_per_batch: int | None = None,
        body: Body | None = None,
    ) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.pad_token_id = pad_token_id
        self.bias = float(bias)
        self._body = find_body(model) if body is None else body
        parameter = next(self._body.module.parameters())
        self.device, self.dtype = parameter.device, parameter.dtype
        cfg: Any = model.cfg
        self.n_layers = int(cfg.n_layers)
        self.n_heads = int(cfg.n_heads)
        context = int(cfg.n_ctx)
        if max_length is not None and not 0 < max_length <= context:
            raise OptionError(f"max_length: expected 1 to {context} (the model's context), got {max_length}.")
        self.max_length = max_length or context
        self.tokens_per_batch = tokens_per_batch or (
            DEFAULT_TOKENS_PER_BATCH if self.device.type == "cpu" else 8 * DEFAULT_TOKENS_PER_BATCH
        )
        self.weight = None if weight is None else _one_row(weight, int(cfg.d_model)).to(self.device, copy=True)
        self._widths = self._measure_sites()
        self._fingerprint: tuple[object, str] | None = None

    @classmethod
    def from_pretrained(
        cls,
        name_or_path: str | Path,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
        revision: str | None = None,
        tokenizer: Any = None,
        pad_token: str | None = None,
        max_length: int | None = None,
        tokens_per_batch: int | None = None,
        trust_remote_code: bool = False,
    ) -> "RewardHead":
        """Open a one-label sequence classifier, from a folder or the hub; safetensors only, fp32 by default.

        The reward is read where transformers reads it: at the last token that is not `config.pad_token_id`. Raises
        `ModelError` for a checkpoint without a score head, with more than one output, or without any pad token
        (`pad_token=` says which).
        """
        opened = _open(name_or_path, True, dtype, device, revision, tokenizer, pad_token, trust_remote_code)
        return cls._from_opened(opened, max_length, tokens_per_batch)

    @classmethod
    def from_language_model(
        cls,
        name_or_path: str | Path,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
        revision: str | None = None,
        tokenizer: Any = None,
        pad_token: str | None = None,
        max_length: int | None = None,
        tokens_per_batch: int | None = None,
        trust_remote_code: bool = False,
    ) -> "RewardHead":
        """Open any checkpoint for its activations alone, for example the base of some reward models.

        Collectors and mean-difference scores work; `score` raises `ModelError`, because there is no reward.
        """
        opened = _open(name_or_path, False, dtype, device, revision, tokenizer, pad_token, trust_remote_code)
        return cls._from_opened(opened, max_length, tokens_per_batch)

    @classmethod
    def _from_opened(
        cls, opened: OpenedCheckpoint, max_length: int | None, tokens_per_batch: int | None
    ) -> "RewardHead":
        return cls(
            opened.body.bridge,
            body=opened.body,
            weight=opened.weight,
            bias=opened.bias,
            tokenizer=opened.tokenizer,
            pad_token_id=opened.pad_token_id,
            max_length=max_length,
            tokens_per_batch=tokens_per_batch,
        )

    # -- scoring ---------------------------------------------------------------------------------------------------

    def score(self, texts: Sequence[str], *, truncate: bool = False, progress: bool = False) -> Float[Tensor, "text"]:
        """The reward of every text, in their order, on the CPU. One forward pass per text.

        A text that does not fit the context raises `DataError`, or is cut from the left with `truncate=True`.
        """
        if isinstance(texts, str):
            raise OptionError("texts: expected a list of texts, got one string. Put it in a list.")
        self._require_reward()
        encoded = encode_texts(self.tokenizer, texts, max_length=self.max_length, truncate=truncate)
        rewards = torch.empty(len(encoded), dtype=self.reward_dtype)
        batches = text_batches(
            encoded, tokens_per_batch=self.tokens_per_batch, pad_token_id=self.pad_token_id, device=self.device
        )
        with tqdm(total=len(encoded), desc="score", unit="text", disable=None if progress else True) as bar:
            for batch in batches:
                with torch.no_grad():
                    rewards[list(batch.rows)] = self.forward(batch).cpu()
                bar.update(len(batch.rows))
        return _require_finite(rewards)

    def score_pairs(
        self, pairs: PreferencePairs, *, truncate_response: bool = False, progress: bool = False
    ) -> ScoredPairs:
        """The rewards of both responses of every pair. Two forward passes per pair.

        Identical responses tie exactly. Prompts are cut from the left where a text is too long for the context, and
        counted; a response that does not fit raises `DataError`, or is cut with `truncate_response=True`.
        """
        self._require_reward()
        encoded = self.encode(pairs, truncate_response=truncate_response)
        chosen = torch.empty(len(encoded), dtype=self.reward_dtype)
        rejected = torch.empty_like(chosen)
        for batch in self.batches(encoded, desc="score", progress=progress):
            with torch.no_grad():
                rewards = self.forward(batch).cpu()
            half = len(batch.rows) // 2
            rows = list(batch.rows[:half])
            chosen[rows], rejected[rows] = rewards[:half], rewards[half:]
        for row, (one, other) in enumerate(zip(encoded.chosen, encoded.rejected, strict=True)):
            if one.ids == other.ids:
                rejected[row] = chosen[row]
        return ScoredPairs(
            _require_finite(chosen),
            _require_finite(rejected),
            pairs,
            self.provenance(pairs, encoded, site="residual", positions="last", method="reward"),
            encoded.n_prompts_cut,
            encoded.n_responses_cut,
        )

    def score_tokens(
        self, input_ids: Int[Tensor, "text token"], attention_mask: Tensor | None = None
    ) -> Float[Tensor, "text"]:
        """The reward of every row of token ids, padded on either side as `attention_mask` (1 = real) says."""
        self._require_reward()
        mask = torch.ones_like(input_ids, dtype=torch.bool) if attention_mask is None else attention_mask.bool()
        if mask.shape != input_ids.shape or not mask.any(dim=1).all():
            raise OptionError(
                f"attention_mask: expected the shape of input_ids {tuple(input_ids.shape)} with a real token in every "
                f"row, got {tuple(mask.shape)}."
            )
        if int(mask.sum(dim=1).max()) > self.max_length:
            raise OptionError(
                f"input_ids: a row has {int(mask.sum(dim=1).max())} tokens, the context holds {self.max_length}."
            )
        ids, mask = compact(input_ids.to(self.device), mask.to(self.device))
        batch = TokenBatch(
            ids, mask, mask, last_token(ids, mask, self.pad_token_id), torch.arange(len(ids)), tuple(range(len(ids)))
        )
        with torch.no_grad():
            return _require_finite(self.forward(batch).cpu())

    def forward(self, batch: TokenBatch) -> Float[Tensor, "text"]:
        """The rewards of one batch on its device, with gradients where the caller's grad mode has them."""
        residual = self.residual(batch)
        weight = self._require_reward().to(self.reward_dtype)
        last = residual[torch.arange(len(residual), device=residual.device), batch.last]
        return last.to(self.reward_dtype) @ weight + self.bias

    def residual(self, batch: TokenBatch) -> Float[Tensor, "text token d_model"]:
        """Run the blocks and the final norm, not the vocabulary projection, with every hook firing."""
        with running(batch), self._eval_mode():
            return self._body.residual(batch)

    # -- for the modules above -------------------------------------------------------------------------------------

    def encode(self, pairs: PreferencePairs, *, truncate_response: bool = False) -> EncodedPairs:
        """Tokens of both texts of every pair, within `max_length`."""
        return encode_pairs(self.tokenizer, pairs, max_length=self.max_length, truncate_response=truncate_response)

    def batches(self, encoded: EncodedPairs, *, desc: str, progress: bool) -> Iterator[TokenBatch]:
        """`pair_batches` for this model, with a progress bar over pairs."""
        with tqdm(total=len(encoded), desc=desc, unit="pair", disable=None if progress else True) as bar:
            for batch in pair_batches(
                encoded, tokens_per_batch=self.tokens_per_batch, pad_token_id=self.pad_token_id, device=self.device
            ):
                yield batch
                bar.update(len(batch.rows) // 2)

    def n_neurons(self, site: str) -> int:
        """Neurons per layer at `site`: hidden units of the MLP, or attention heads."""
        return self.n_heads if find_site(site).name == "attn_head" else self._widths["mlp"]

    def n_channels(self, site: str) -> int:
        """Columns per layer at `site`: one a neuron for `mlp`, `d_head` a head for `attn_head`."""
        return self._widths[find_site(site).name]

    def hooks(
        self, site: str, visit: Callable[[int, Tensor], Tensor | None], layers: Iterable[int] | None = None
    ) -> InstalledHooks:
        """A context in which `visit(layer, activation)` sees, and may replace, the activation at `site`.

        The activation is what the projection below reads: [text, token, channel], or with the first two flattened, or
        with the last split into heads, as the model's family has it.
        """
        chosen = range(self.n_layers) if layers is None else layers
        return InstalledHooks(
            [(spot, partial(visit, layer)) for layer in chosen for spot in self._body.spots(site, layer)]
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
        width = self._widths["attn_head"] // self.n_heads
        return f"{family}-{self.n_layers}x{self._widths['mlp']}-heads{self.n_heads}x{width}-d{int(cfg.d_model)}"

    @property
    def fingerprint(self) -> str:
        """16 hexadecimal digits over every weight and the head; reads all weights, once until one changes.

        A change through `parameter.data`, which PyTorch does not count, is not seen: edit under `torch.no_grad()`.
        """
        parameters = [*self._body.module.parameters(), *([] if self.weight is None else [self.weight])]
        state = (self.bias, *((parameter.data_ptr(), parameter._version) for parameter in parameters))
        if self._fingerprint is None or self._fingerprint[0] != state:
            digest = hashlib.blake2b(self.architecture.encode(), digest_size=8)
            for parameter in parameters:
                digest.update(parameter.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
            digest.update(repr(self.bias).encode())
            self._fingerprint = (state, digest.hexdigest())
        return self._fingerprint[1]

    def provenance(
        self, pairs: PreferencePairs, encoded: EncodedPairs, *, site: str, positions: str, method: str
    ) -> Provenance:
        """What a result that this head computes from `pairs` has to carry."""
        return Provenance(
            architecture=self.architecture,
            model=self.fingerprint,
            site=site,
            positions=positions,
            method=method,
            dtype=str(self.dtype).removeprefix("torch."),
            data=pairs.digest[:16],
            n_pairs=len(pairs),
            n_tokens=encoded.n_tokens,
            version=version("rmtension"),
        )

    def __repr__(self) -> str:
        return f"RewardHead({self.architecture}, {self.dtype}, {self.device})"

    # -- inside ----------------------------------------------------------------------------------------------------

    def _require_reward(self) -> Float[Tensor, "d_model"]:
        if self.weight is None:
            raise ModelError(
                "This head was opened as a language model and has no reward. Use RewardHead.from_pretrained on a "
                "reward model."
            )
        return self.weight

    def _measure_sites(self) -> dict[str, int]:
        """Channels per layer of every site, read off one token's run: configs do not always tell (OPT's does not)."""
        shapes: dict[tuple[str, int], int] = {}

        def record(site: str, layer: int, activation: Tensor) -> None:
            shapes[site, layer] = activation.numel()

        token = torch.zeros((1, 1), dtype=torch.long, device=self.device)
        real = torch.ones_like(token, dtype=torch.bool)
        batch = TokenBatch(token, real, real, token[0], token[0], (0,))
        with ExitStack() as stack, torch.no_grad():
            for site in SITES:
                stack.enter_context(self.hooks(site, partial(record, site)))
            self.residual(batch)
        for site in SITES:
            widths = {shapes.get((site, layer)) for layer in range(self.n_layers)}
            if len(widths) != 1 or None in widths:
                raise ModelError(f"site {site!r}: expected one width in all {self.n_layers} layers, got {widths}.")
        return {site: shapes[site, 0] for site in SITES}

    @contextmanager
    def _eval_mode(self) -> Iterator[None]:
        training = [module for module in self._body.modules() if module.training]
        for module in training:
            module.training = False
        try:
            yield
        finally:
            for module in training:
                module.training = True


def _open(
    name: str | Path,
    reward: bool,
    dtype: torch.dtype,
    device: torch.device | str | None,
    revision: str | None,
    tokenizer: Any,
    pad_token: str | None,
    trust_remote_code: bool,
) -> OpenedCheckpoint:
    return open_checkpoint(
        name,
        reward=reward,
        dtype=dtype,
        device=device or ("cuda" if torch.cuda.is_available() else "cpu"),
        revision=revision,
        tokenizer=tokenizer,
        pad_token=pad_token,
        trust_remote_code=trust_remote_code,
    )


def _one_row(weight: Tensor, d_model: int) -> Float[Tensor, "d_model"]:
    row = weight.detach()
    row = row[0] if row.ndim == 2 and row.shape[0] == 1 else row
    if row.shape != (d_model,):
        raise ModelError(
            f"weight: expected {d_model} numbers, one for each direction of the residual stream, got shape "
            f"{tuple(weight.shape)}. A reward head has one output."
        )
    return row


def _require_finite(rewards: Float[Tensor, "text"]) -> Float[Tensor, "text"]:
    if not torch.isfinite(rewards).all():
        row = int((~torch.isfinite(rewards)).nonzero()[0])
        raise ModelError(
            f"rewards: item {row} got {float(rewards[row])}. Check the weights, or load with dtype=torch.float32 if "
            "half precision overflows."
        )
    return rewards
