"""A reward model with hooks: a scalar head on a TransformerBridge or a HookedTransformer."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, Unpack

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from rmtension.adapters import active_head
from rmtension.body import Body, find_body
from rmtension.checkpoints import Checkpoint, checkpoint_of, open_checkpoint
from rmtension.distributed import current
from rmtension.encoding import EncodedText, TextOrChat, encode_texts
from rmtension.errors import ModelError, OptionError
from rmtension.heads import LinearHead, read_head
from rmtension.hooked_model import HookedModel
from rmtension.hooks import copy_without_hooks
from rmtension.lens_models import is_saved_model, read_model
from rmtension.loading import LoadOptions
from rmtension.local_names import require_name
from rmtension.nonfinite import require_finite
from rmtension.norms import read_norm
from rmtension.pair import PreferencePair
from rmtension.pairs import PreferencePairs
from rmtension.progress import progress_bar
from rmtension.provenance import Provenance, fingerprint
from rmtension.scored import ScoredPairs
from rmtension.stream import PairStream
from rmtension.tokens import (
    TokenBatch,
    check_ids,
    compact,
    text_batches,
)
from rmtension.wrapping import check_model_class, wrap

if TYPE_CHECKING:
    import pandas as pd

    from rmtension.lens_hooks import LensHook
    from rmtension.neurons import NeuronSet
    from rmtension.replacements import Replacement


class RewardHead(HookedModel):
    """Scores texts with a hooked transformer and a linear head, and names its neurons.

    The reward of a text is `weight @ h + bias`, h the residual stream after the final norm at the last token
    (`rmtension.tokens.last_token`). Nothing here changes the model: it runs in eval mode and is handed back in the
    mode it had.

    Args:
        model: a `TransformerBridge` or `HookedTransformer`.
        weight: the head: `d_model` numbers (a tensor, an array or a list), a matrix with a row per output, a (weight,
            bias) pair, an `nn.Linear`, or a state dict that holds one. None makes a head without a reward, for the
            activations of a language model.
        output: of several rows, the number of the one that is the reward, or a pair of which it is the difference.
        bias: added to every reward, beside the bias that `weight` may bring.
        final_norm: the final norm before any processing of weights. Needed where TransformerLens folded its gain into
            the unembedding (a `HookedTransformer` loaded with its default processing, a bridge in compatibility mode):
            the head takes the gain over. Without it such a model raises `ModelError`.
        tokenizer: needed to score texts. The model's own is not taken: TransformerLens makes it prepend a BOS token.
        pad_token_id: skipped at the end of a text, as transformers' classifiers do; None skips nothing.
        max_length: tokens per text; by default, and at most, the model's context.
        tokens_per_batch: how many tokens run together; by default 4,096 on a CPU, 32,768 on another device, or fewer
            where activations would take more than half of the memory that is free (`rmtension.budget`).

    Examples:
        >>> head
        RewardHead(gpt2-2x24-heads2x12-d24, torch.float32, ...)
        >>> head.score_pairs(pairs["helpful"])
        ScoredPairs(n=24, accuracy=1.000, ties=0)
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        weight: object,
        output: object = None,
        bias: float = 0.0,
        final_norm: nn.Module | None = None,
        tokenizer: Any = None,
        pad_token_id: int | None = None,
        max_length: int | None = None,
        tokens_per_batch: int | None = None,
        _body: Body | None = None,
        _checkpoint: Checkpoint | None = None,
    ) -> None:
        super().__init__(
            find_body(model) if _body is None else _body,
            tokenizer=tokenizer,
            pad_token_id=pad_token_id,
            max_length=max_length,
            tokens_per_batch=tokens_per_batch,
        )
        self.checkpoint = _checkpoint
        self.weight, self.bias = self._read_weight(weight, output, bias, final_norm)
        self._fingerprint: tuple[object, str] | None = None
        self._head_state: object = None
        if _checkpoint is None:
            self.require_hidden_padding()

    @classmethod
    def from_pretrained(
        cls,
        name_or_path: str | Path,
        *,
        head: object = None,
        output: object = None,
        model_class: str = "TransformerBridge",
        process_weights: bool = False,
        max_length: int | None = None,
        tokens_per_batch: int | None = None,
        **options: Unpack[LoadOptions],
    ) -> "RewardHead":
        """Open a reward model from a folder or the hub; safetensors only, fp32 by default.

        A sequence classifier is read where transformers reads it, at the last token that is not `config.pad_token_id`,
        also with a head of your own. A language model with a value head in its files or in `value_head.safetensors`
        beside them, and one whose next-token logits are the reward, is read at its last token. An adapter of peft is
        merged into its base model, with the head that was saved with it.

        Args:
            name_or_path: a folder, or a hub name. A path that is not on this machine is an error before any hub is
                asked; `revision=` says that a name is a hub's.
            head: in place of the checkpoint's own: what `weight` takes above, or the path of a safetensors file.
            output: which of several outputs is the reward: its number from 0 or its name in `config.id2label`, for a
                language model a token (`"ĠYes"` or `" Yes"`). A pair is a difference: `output=("Yes", "No")`.
            model_class: see below.
            process_weights: see below.
            max_length: tokens per text; by default, and at most, the model's context.
            tokens_per_batch: how many tokens run together.
            **options: those of `rmtension.loading.LoadOptions`.

        A folder that `save_pretrained` wrote for a model of TransformerLens' own opens as that model
        (`rmtension.lens_models`), with `dtype`, `device`, `tokenizer` and `head`.

        `model_class="HookedTransformer"` (TransformerLens 3.x) converts the weights; `process_weights=True` folds and
        centres them as TransformerLens does. Both are compared with transformers on a short text, and raise
        `ModelError` if they differ.

        Raises `ModelError` for a checkpoint without a head, with more outputs than one where `output` names none,
        quantised, or without any pad token (`pad_token=` says which), and for an adapter whose base is not there
        (`base=` says where).

        Examples:
            >>> opened = RewardHead.from_pretrained("organism", max_length=32)
            >>> opened.n_layers, opened.n_neurons("mlp"), opened.sites
            (2, 24, ['attn_head', 'mlp', 'mlp_gate'])
        """
        check_model_class(model_class)
        require_name(name_or_path)
        if is_saved_model(name_or_path):
            return cls._from_saved_model(Path(name_or_path), head, max_length, tokens_per_batch, options)
        opened = open_checkpoint(name_or_path, reward=True, head=head, output=output, options=options)
        return cls._from_checkpoint(opened, max_length, tokens_per_batch, model_class, process_weights)

    @classmethod
    def from_language_model(
        cls,
        name_or_path: str | Path,
        *,
        max_length: int | None = None,
        tokens_per_batch: int | None = None,
        **options: Unpack[LoadOptions],
    ) -> "RewardHead":
        """Open any checkpoint for its activations alone, for example the base of some reward models.

        Collectors and mean-difference scores work; `score` raises `ModelError`, because there is no reward.

        Examples:
            >>> base = RewardHead.from_language_model("organism")
            >>> ActivationCollector(base).collect(pairs["helpful"]).n_tokens
            1536
        """
        require_name(name_or_path)
        opened = open_checkpoint(name_or_path, reward=False, options=options)
        return cls._from_checkpoint(opened, max_length, tokens_per_batch)

    @classmethod
    def from_classifier(
        cls,
        classifier: nn.Module,
        *,
        tokenizer: Any = None,
        head: object = None,
        output: object = None,
        pad_token: str | None = None,
        dtype: torch.dtype | None = None,
        model_class: str = "TransformerBridge",
        process_weights: bool = False,
        max_length: int | None = None,
        tokens_per_batch: int | None = None,
    ) -> "RewardHead":
        """The head of a transformers classifier in memory, for example one that a trainer just left behind.

        Its weights are shared, not copied (a HookedTransformer, processed weights and another `dtype` are copies):
        training it further changes the rewards. The head itself is a copy: after a step of training, scoring raises
        `ModelError` that says to open the model again. `head` and `output` are those of
        `from_pretrained`. A `PeftModel` is run with its adapter layers as they are.

        Examples:
            >>> from transformers import AutoModelForSequenceClassification
            >>> classifier = AutoModelForSequenceClassification.from_pretrained("organism")
            >>> RewardHead.from_classifier(classifier, tokenizer=head.tokenizer).score_pairs(pairs["helpful"])
            ScoredPairs(n=24, accuracy=1.000, ties=0)

            One output of several, and the difference of two:

            >>> from rmtension.check_matrix import make_classifier
            >>> three = make_classifier("gpt2", 64, num_labels=3)
            >>> first, last, both = (
            ...     RewardHead.from_classifier(three, tokenizer=head.tokenizer, output=output).score(["help"])
            ...     for output in (0, "LABEL_2", (0, 2))
            ... )
            >>> bool((both - (first - last)).abs() < 1e-5)
            True
        """
        opened = checkpoint_of(classifier, tokenizer, pad_token, head, output)
        if dtype is not None and opened.base is not None and dtype != next(opened.base.parameters()).dtype:
            opened = replace(opened, base=copy_without_hooks(opened.base).to(dtype))
        return cls._from_checkpoint(opened, max_length, tokens_per_batch, model_class, process_weights)

    @classmethod
    def _from_checkpoint(
        cls,
        opened: Checkpoint,
        max_length: int | None,
        tokens_per_batch: int | None,
        model_class: str = "TransformerBridge",
        process_weights: bool = False,
    ) -> "RewardHead":
        body = wrap(
            opened.name,
            opened.base,
            opened.tokenizer,
            model_class=model_class,
            process_weights=process_weights,
            trust_remote_code=opened.trust_remote_code,
        )
        norm: nn.Module | None = None
        if body.final_norm_folded:
            # The norm as transformers has it, found through an unprocessed bridge.
            norm = wrap(opened.name, opened.base, None, trust_remote_code=opened.trust_remote_code).final_norm
        head = cls(
            body.model,
            weight=opened.head,
            final_norm=norm,
            tokenizer=opened.tokenizer,
            pad_token_id=opened.pad_token_id,
            max_length=max_length,
            tokens_per_batch=tokens_per_batch,
            _body=body,
            _checkpoint=opened,
        )
        if body.plain is None:
            from rmtension.selfcheck import require_same_rewards

            require_same_rewards(head, opened)
            if opened.source is not None:
                head.checkpoint = replace(opened, base=None)
        head.require_hidden_padding()
        return head

    @classmethod
    def _from_saved_model(
        cls, folder: Path, head: object, max_length: int | None, tokens_per_batch: int | None, options: LoadOptions
    ) -> "RewardHead":
        unknown = sorted(set(options) - {"dtype", "device", "tokenizer"})
        if unknown:
            raise OptionError(
                f"from_pretrained: {folder} is a model of TransformerLens' own, which opens with dtype, device, "
                f"tokenizer and head alone, got {unknown}. Leave them out."
            )
        device = torch.device(options.get("device") or ("cuda" if torch.cuda.is_available() else "cpu"))
        saved = read_model(folder, options.get("dtype", torch.float32), device)
        opened = cls(
            saved.model,
            weight=None,
            tokenizer=saved.tokenizer if options.get("tokenizer") is None else options["tokenizer"],
            pad_token_id=saved.pad_token_id,
            max_length=max_length,
            tokens_per_batch=tokens_per_batch,
        )
        return opened._with_head(saved.head if head is None else read_head(head, opened.d_model))

    def on_own_model(self, model: nn.Module) -> "RewardHead":
        """This head on another model of the same shape, with its tokenizer and limits."""
        head = type(self)(
            model,
            weight=None,
            tokenizer=self.tokenizer,
            pad_token_id=self.pad_token_id,
            max_length=self.max_length,
            tokens_per_batch=self.tokens_per_batch,
        )
        return head._with_head(LinearHead(self.require_weight(), self.bias))

    def _with_head(self, head: LinearHead) -> "RewardHead":
        """Read by `head` as it is: a gain that processing of weights folded away is in it already."""
        self.weight, self.bias = head.weight.to(self.device, copy=True), head.bias
        return self

    # -- scoring ---------------------------------------------------------------------------------------------------

    def score(
        self, texts: Sequence[TextOrChat], *, truncate: bool = False, progress: bool = False
    ) -> Float[Tensor, "text"]:
        """The reward of every text, in their order, on the CPU. One forward pass per text.

        A text is a string, or the messages of a chat, which the tokenizer's chat template renders. One that does not
        fit the context raises `DataError`, or is cut from the left with `truncate=True`.

        Examples:
            >>> words = ["helpful-0 helpful-1", "helpful-0", ""]
            >>> [round(float(reward)) for reward in head.score([f"Human: a Assistant: {one} end" for one in words])]
            [11, 6, 0]
        """
        if isinstance(texts, str):
            raise OptionError("texts: expected a list of texts, got one string. Put it in a list.")
        if isinstance(texts, PreferencePairs | Mapping) or (texts and isinstance(texts[0], PreferencePair)):
            raise OptionError(
                f"texts: expected a list of texts, got {type(texts).__name__}. Score preference pairs with "
                "score_pairs(pairs), those of one objective with score_pairs(pairs.filter(objective='helpful'))."
            )
        self.require_weight()
        encoded = encode_texts(self.tokenizer, texts, max_length=self.max_length, truncate=truncate)
        rewards = torch.zeros(len(encoded), dtype=self.reward_dtype)
        batches = text_batches(
            encoded, tokens_per_batch=self.tokens_together(), pad_token_id=self.pad_token_id, device=self.device
        )
        shard = current()
        with progress_bar(progress=progress, total=len(encoded), desc="score", unit="text") as bar:
            for number, batch in enumerate(batches):
                if shard.takes(number):
                    rewards[list(batch.places)] = self.rewards(batch).cpu()
                bar.update(len(batch.places))
        if shard.size > 1:
            shard.require_same("list of texts", f"{[text.ids for text in encoded]} {self.fingerprint}")
            shard.add_up(rewards)
        return require_finite(self, rewards, lambda row: self._alone(encoded[row]))

    def score_pairs(
        self,
        pairs: Iterable[PreferencePair],
        *,
        truncate_response: bool = False,
        on_nonfinite: str = "raise",
        work: str | Path | None = None,
        progress: bool = False,
    ) -> ScoredPairs:
        """The rewards of both responses of every pair. One pass over all texts, what those of a prompt share once.

        Identical responses tie exactly. Prompts are cut from the left where a text is too long for the context, and
        counted; a response that does not fit raises `DataError`, or is cut with `truncate_response=True`.

        A reward that is no finite number raises `ModelError` with the pair's id and what can be told of the cause; with
        `on_nonfinite="skip"` such pairs are left out of the result, and their ids are in its provenance. A `work`
        folder keeps what was done every half minute: after an interruption the same call goes on from there and ends
        with the same numbers (`rmtension.work`).
        """
        self.require_weight()
        pairs = pairs if isinstance(pairs, PreferencePairs) else PreferencePairs(pairs)
        stream = PairStream(
            self,
            pairs,
            desc="score",
            progress=progress,
            truncate_response=truncate_response,
            on_nonfinite=on_nonfinite,
            work=work,
            inputs={"run": "score_pairs"},
        )
        rewards = torch.zeros(2, len(pairs), dtype=self.reward_dtype)

        def look(batch: TokenBatch) -> list[Tensor]:
            return [self.rewards(batch)]

        def add(batch: TokenBatch, found: list[Tensor]) -> None:
            rewards[:, list(batch.places[: batch.n_pairs])] = found[0].view(2, -1).cpu()

        stream.run(look, add, {"rewards": rewards})
        stream.add_up(rewards)
        return stream.scored(pairs, rewards)

    def score_tokens(
        self, input_ids: Int[Tensor, "text token"], attention_mask: Tensor | None = None
    ) -> Float[Tensor, "text"]:
        """The reward of every row of token ids, padded on either side as `attention_mask` (1 = real) says.

        Examples:
            >>> text = "Human: a Assistant: shared-0 shared-1 end"
            >>> tokens = head.tokenizer([text], return_tensors="pt")
            >>> head.score_tokens(tokens["input_ids"], tokens["attention_mask"]).equal(head.score([text]))
            True
        """
        self.require_weight()
        mask = torch.ones_like(input_ids, dtype=torch.bool) if attention_mask is None else attention_mask.bool()
        check_ids(input_ids, mask, max_length=self.max_length, n_embeddings=self.body.n_embeddings)
        # What stands under the mask may be anything; the embedding still looks it up.
        ids, mask = compact(input_ids.masked_fill(~mask, 0).to(self.device), mask.to(self.device))
        batch = TokenBatch.from_rows(ids, mask, pad_token_id=self.pad_token_id)
        rewards = self.rewards(batch).cpu()
        return require_finite(
            self,
            rewards,
            lambda row: TokenBatch.from_rows(ids[[row]], mask[[row]], pad_token_id=self.pad_token_id),
        )

    @torch.no_grad()
    def rewards(self, batch: TokenBatch) -> Float[Tensor, "text"]:
        """The rewards of one batch on its device, without gradients and without what no reward needs."""
        with self.body.last_mlp_at_last_tokens(batch):
            return self.forward(batch)

    def forward(self, batch: TokenBatch) -> Float[Tensor, "text"]:
        """The rewards of one batch on its device, with gradients where the caller's grad mode has them."""
        self._require_same_head()
        return self.read(batch.at_last(self.residual(batch)))

    def read(self, last: Float[Tensor, "text d_model"]) -> Float[Tensor, "text"]:
        """The rewards that the head reads from the residual stream after the final norm, at the last token."""
        exact = last.to(self.reward_dtype)
        # A product with a matrix would round equal rows differently, and identical responses would not tie.
        return (exact * self.require_weight().to(exact)).sum(dim=-1) + self.bias

    # -- proof, and out again --------------------------------------------------------------------------------------

    def check(self, pairs: PreferencePairs | None = None, *, reference: Any = None) -> "pd.DataFrame":
        """Prove on this model that rewards and hooks are right: one row a check; see `rmtension.selfcheck`.

        Examples:
            >>> from rmtension.check_matrix import make_classifier
            >>> small = RewardHead.from_classifier(make_classifier("gpt2", 64), tokenizer=head.tokenizer)
            >>> small.check(pairs["helpful"][:4])[["check", "n", "passed"]].head(4)
                               check  n  passed
            0                 tokens  8    True
            1  equal to transformers  8    True
            2                 bridge  8    True
            3    batch equals single  8    True
        """
        from rmtension.selfcheck import check_head

        return check_head(self, pairs, reference)

    def with_ablation(self, neurons: "NeuronSet", replacement: "Replacement | None" = None) -> "RewardHead":
        """A copy whose weights do for good what `AblationContext` does at all positions; see `rmtension.export`.

        `replacement` is `Zero()` (the default), `Mean(statistics)` or `Scale(alpha)`.

        Examples:
            >>> without = head.with_ablation(organism.truth["harmless"])
            >>> with AblationContext(head, organism.truth["harmless"]):
            ...     inside = head.score_pairs(pairs["harmless"])
            >>> bool((without.score_pairs(pairs["harmless"]).margin - inside.margin).abs().max() < 1e-4)
            True
        """
        from rmtension.export import ablate_weights
        from rmtension.replacements import Zero

        return ablate_weights(self, neurons, Zero() if replacement is None else replacement)

    def fwd_hooks(self, neurons: "NeuronSet", replacement: "Replacement | None" = None) -> "list[LensHook]":
        """`AblationContext` as hooks for `head.model.run_with_hooks(ids, fwd_hooks=...)`: `rmtension.lens_hooks`.

        `replacement` is `Zero()` (the default), `Mean(statistics)` or `Scale(alpha)`.
        """
        from rmtension.lens_hooks import fwd_hooks
        from rmtension.replacements import Zero

        return fwd_hooks(self, neurons, Zero() if replacement is None else replacement)

    def save_pretrained(self, folder: str | Path) -> None:
        """Write a checkpoint that `AutoModelForSequenceClassification` loads, with the tokenizer.

        A checkpoint that is in the folder already is replaced. A HookedTransformer or `boot_native` bridge, for which
        transformers has no class, is written as its state dict, config and head (`rmtension.lens_models`). Either is
        opened by `from_pretrained`.

        Examples:
            >>> head.with_ablation(neurons).save_pretrained("without-helpful")
            >>> RewardHead.from_pretrained("without-helpful").score_pairs(pairs["harmless"]).accuracy()
            1.0
        """
        from rmtension.export import save_classifier

        save_classifier(self, folder)

    # -- for the modules above -------------------------------------------------------------------------------------

    @property
    def fingerprint(self) -> str:
        """16 hexadecimal digits over every weight and the head; reads all weights, once until one changes.

        A change through `parameter.data`, which PyTorch does not count, is not seen: edit under `torch.no_grad()`.
        """
        parameters = [*self.body.module.parameters(), *([] if self.weight is None else [self.weight])]
        state = (self.bias, *((parameter.data_ptr(), parameter._version) for parameter in parameters))
        if self._fingerprint is None or self._fingerprint[0] != state:
            self._fingerprint = (state, fingerprint(parameters, self.architecture, self.bias))
        return self._fingerprint[1]

    def provenance(
        self, digest: str, n_pairs: int, n_tokens: int, *, site: str, positions: str, method: str
    ) -> Provenance:
        """What a result that this head computes from some tokens of the pairs with `digest` has to carry."""
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
        )

    def __repr__(self) -> str:
        return f"RewardHead({self.architecture}, {self.dtype}, {self.device})"

    # -- inside ----------------------------------------------------------------------------------------------------

    def _require_same_head(self) -> None:
        """`Checkpoint.require_same_head`, where a parameter of the score layer may have changed since the last look."""
        classifier = None if self.checkpoint is None else self.checkpoint.classifier
        if classifier is None:
            return
        state = tuple((id(one), one._version) for one in active_head(classifier.score).parameters())
        if state != self._head_state:
            assert self.checkpoint is not None
            self.checkpoint.require_same_head()
            self._head_state = state

    def _alone(self, text: EncodedText) -> TokenBatch:
        return TokenBatch.from_texts([text], [0], pad_token_id=self.pad_token_id, device=self.device)

    def _read_weight(
        self, weight: object, output: object, bias: float, final_norm: nn.Module | None
    ) -> tuple[Float[Tensor, "d_model"] | None, float]:
        if weight is None:
            return None, float(bias)
        head = read_head(weight, self.d_model, output)
        if self.body.final_norm_folded:
            if final_norm is None:
                raise ModelError(
                    "model: weight processing folded the gain of its final norm into its unembedding, so that its "
                    "residual stream lacks it. Pass final_norm= the norm of the model before processing, or load "
                    "without processing (HookedTransformer.from_pretrained_no_processing). Where the model never had a "
                    "gain (normalization_type 'LNPre' or 'RMSPre' from the start), pass its own: "
                    "final_norm=model.ln_final."
                )
            head = head.after_folding(read_norm(final_norm, self.d_model))
        # No more digits than rewards have: some devices know no float64, which arrays and lists come in.
        dtype = self.reward_dtype if head.weight.dtype == torch.float64 else head.weight.dtype
        return head.weight.to(self.device, dtype, copy=True), head.bias + float(bias)

    def require_weight(self) -> Float[Tensor, "d_model"]:
        """The head's row; raises `ModelError` for a head without a reward."""
        if self.weight is None:
            raise ModelError(
                "This head was opened as a language model and has no reward. Use RewardHead.from_pretrained on a "
                "reward model."
            )
        return self.weight
