"""A reward model with hooks: a scalar head on a TransformerBridge or a HookedTransformer."""

from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Unpack

import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from rmtension.data._encoding import TextOrChat
from rmtension.data._pair import PreferencePair
from rmtension.data._pairs import PreferencePairs
from rmtension.evaluation._pair_rewards import PairRewards
from rmtension.interventions._export import ablate_weights
from rmtension.interventions._lens_hooks import LensHook, fwd_hooks
from rmtension.interventions._replacements import Replacement, Zero
from rmtension.models._bodies import find_body
from rmtension.models._bridges import check_model_class
from rmtension.models._checkpoint_names import require_name
from rmtension.models._checkpoints import checkpoint_of, open_checkpoint
from rmtension.models._classifiers import save_classifier
from rmtension.models._hooks import copy_without_hooks
from rmtension.models._lens_models import is_saved_model
from rmtension.models._loading import LoadOptions
from rmtension.models._opening import head_on, open_model, open_saved_model, require_hidden_padding
from rmtension.models._reward_model import RewardModel
from rmtension.models._run_options import RunOptions, check_run_options, run_options_of
from rmtension.neurons._neuron_set import NeuronSet
from rmtension.passes._pair_pass import run_pass
from rmtension.passes._rewards_of_pairs import RewardsOfPairs
from rmtension.passes._scoring import score_texts, score_tokens
from rmtension.passes._selfcheck import check_head

__all__ = ["RewardHead"]


class RewardHead(RewardModel):
    """Scores texts with a hooked transformer and a linear head, and names its neurons.

    The reward of a text is `weight @ h + bias`, h the residual stream after the final norm at the last token.
    Nothing here changes the model: it runs in eval mode and is handed back in the
    mode it had.

    Args:
        model: a `TransformerBridge` or `HookedTransformer`.
        weight: the head: `d_model` numbers (a tensor, an array or a list), a matrix with a row per output, a (weight,
            bias) pair, an `nn.Linear`, or a state dict that holds one. None makes a head without a reward, for the
            activations of a language model.
        output: of several rows, the number of the one that is the reward, or a pair of which it is the difference.
        final_norm: the final norm before any processing of weights. Needed where TransformerLens folded its gain into
            the unembedding (a `HookedTransformer` loaded with its default processing, a bridge in compatibility mode):
            the head takes the gain over. Without it such a model raises `ModelError`.
        tokenizer: needed to score texts. The model's own is not taken: TransformerLens makes it prepend a BOS token.
        pad_token_id: skipped at the end of a text, as transformers' classifiers do; None skips nothing.
        **options: `max_length`, `tokens_per_batch`, `truncate_response` and `on_nonfinite`, as
            `rmtension.models.RunOptions` describes them. Every way of opening a model takes them, and they become
            attributes of the head.

    Examples:
        >>> head
        RewardHead(gpt2-2x24-heads2x12-d24, torch.float32, ...)
        >>> head.score_pairs(pairs["helpful"])
        PairRewards(n=24, accuracy=1.000, ties=0)
        >>> shorter = RewardHead(head.model, (head.weight, 0.5), tokenizer=head.tokenizer, max_length=16)
        >>> shorter.max_length, shorter.truncate_response, shorter.on_nonfinite
        (16, False, 'raise')
    """

    def __init__(
        self,
        model: nn.Module,
        weight: object,
        *,
        output: object = None,
        final_norm: nn.Module | None = None,
        tokenizer: Any = None,
        pad_token_id: int | None = None,
        **options: Unpack[RunOptions],
    ) -> None:
        check_run_options(options)
        body = find_body(model)
        head = head_on(body, weight, output=output, final_norm=final_norm)
        super().__init__(body, head, tokenizer=tokenizer, pad_token_id=pad_token_id, **options)
        require_hidden_padding(self)

    @classmethod
    def from_pretrained(
        cls,
        name_or_path: str | Path,
        *,
        head: object = None,
        output: object = None,
        model_class: str = "TransformerBridge",
        process_weights: bool = False,
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
            **options: `rmtension.models.LoadOptions`, among them `max_length`, `truncate_response` and `on_nonfinite`.

        A folder that `save_pretrained` wrote for a model of TransformerLens' own opens as that model,
        with `dtype`, `device`, `tokenizer` and `head`.

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
            return open_saved_model(cls, Path(name_or_path), head, options)
        run_options = run_options_of(options)
        opened = open_checkpoint(name_or_path, reward=True, head=head, output=output, options=options)
        return open_model(cls, opened, model_class=model_class, process_weights=process_weights, **run_options)

    @classmethod
    def from_language_model(cls, name_or_path: str | Path, **options: Unpack[LoadOptions]) -> "RewardHead":
        """Open any checkpoint for its activations alone, for example the base of some reward models.

        Collectors and mean-difference scores work; `score` raises `ModelError`, because there is no reward.

        Examples:
            >>> base = RewardHead.from_language_model("organism")
            >>> ActivationCollector(base).collect(pairs["helpful"]).n_tokens
            1536
        """
        require_name(name_or_path)
        run_options = run_options_of(options)
        return open_model(cls, open_checkpoint(name_or_path, reward=False, options=options), **run_options)

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
        **options: Unpack[RunOptions],
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
            PairRewards(n=24, accuracy=1.000, ties=0)

            One output of several, and the difference of two:

            >>> from rmtension.synthetic.check_matrix import make_classifier
            >>> three = make_classifier("gpt2", 64, num_labels=3)
            >>> first, last, both = (
            ...     RewardHead.from_classifier(three, tokenizer=head.tokenizer, output=output).score(["help"])
            ...     for output in (0, "LABEL_2", (0, 2))
            ... )
            >>> bool((both - (first - last)).abs() < 1e-5)
            True
        """
        check_run_options(options)
        opened = checkpoint_of(classifier, tokenizer, pad_token, head, output)
        if dtype is not None and opened.base is not None and dtype != next(opened.base.parameters()).dtype:
            opened = replace(opened, base=copy_without_hooks(opened.base).to(dtype))
        return open_model(cls, opened, model_class=model_class, process_weights=process_weights, **options)

    # -- scoring ---------------------------------------------------------------------------------------------------

    def score(
        self, texts: Sequence[TextOrChat], *, truncate: bool = False, progress: bool | None = None
    ) -> Float[Tensor, "text"]:
        """The reward of every text, in their order, on the CPU. One forward pass per text.

        A text is a string, or the messages of a chat, which the tokenizer's chat template renders. One that does not
        fit the context raises `DataError`, or is cut from the left with `truncate=True`.

        Examples:
            >>> words = ["helpful-0 helpful-1", "helpful-0", ""]
            >>> [round(float(reward)) for reward in head.score([f"Human: a Assistant: {one} end" for one in words])]
            [11, 6, 0]
        """
        return score_texts(self, texts, truncate=truncate, progress=progress)

    def score_pairs(
        self,
        pairs: Iterable[PreferencePair],
        *,
        work: str | Path | None = None,
        progress: bool | None = None,
    ) -> PairRewards:
        """The rewards of both responses of every pair. One pass over all texts; a shared prompt runs once.

        Identical responses tie exactly. Prompts are cut from the left where a text is too long for the context, and
        counted. A response that does not fit raises `DataError`, or is cut if the model was opened with
        `truncate_response=True`. A reward that is NaN or infinite raises `ModelError` with the pair's id and the likely
        cause; if the model was opened with `on_nonfinite="skip"` such pairs are skipped, and their ids are in the
        result's provenance. `work` and `progress` are those of `run_pass`.
        """
        self.require_weight()
        pairs = pairs if isinstance(pairs, PreferencePairs) else PreferencePairs(pairs)
        statistic = RewardsOfPairs(self, pairs, lambda batch: [self.rewards(batch)])
        (scored,) = run_pass(self, pairs, statistic, work=work, progress=progress)
        return scored

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
        return score_tokens(self, input_ids, attention_mask)

    # -- checking, ablating, saving --------------------------------------------------------------------------------

    def check(self, pairs: PreferencePairs | None = None, *, reference: Any = None) -> pd.DataFrame:
        """Prove on this model that rewards and hooks are right: one row a check; see `docs/guarantees.md`.

        Examples:
            >>> from rmtension.synthetic.check_matrix import make_classifier
            >>> small = RewardHead.from_classifier(make_classifier("gpt2", 64), tokenizer=head.tokenizer)
            >>> small.check(pairs["helpful"][:4])[["check", "n", "passed"]].head(4)
                               check  n  passed
            0                 tokens  8    True
            1  equal to transformers  8    True
            2                 bridge  8    True
            3    batch equals single  8    True
        """
        return check_head(self, pairs, reference)

    def with_ablation(self, neurons: NeuronSet, replacement: Replacement = Zero()) -> "RewardHead":
        """A copy whose weights do for good what `AblationContext` does at all positions.

        `replacement` is `Zero()` (the default), `Mean(statistics)` or `Scale(alpha)`.

        Examples:
            >>> without = head.with_ablation(organism.truth["harmless"])
            >>> with AblationContext(head, organism.truth["harmless"]):
            ...     inside = head.score_pairs(pairs["harmless"])
            >>> bool((without.score_pairs(pairs["harmless"]).margin - inside.margin).abs().max() < 1e-4)
            True
        """
        return ablate_weights(self, neurons, replacement)

    def fwd_hooks(self, neurons: NeuronSet, replacement: Replacement = Zero()) -> list[LensHook]:
        """`AblationContext` as hooks for `head.model.run_with_hooks(ids, fwd_hooks=...)`: `docs/fit_in.md`.

        `replacement` is `Zero()` (the default), `Mean(statistics)` or `Scale(alpha)`.
        """
        return fwd_hooks(self, neurons, replacement)

    def save_pretrained(self, folder: str | Path) -> None:
        """Write a checkpoint that `AutoModelForSequenceClassification` loads, with the tokenizer.

        A checkpoint that is in the folder already is replaced. A HookedTransformer or `boot_native` bridge, for which
        transformers has no class, is written as its state dict, config and head. Either is
        opened by `from_pretrained`.

        Examples:
            >>> head.with_ablation(neurons).save_pretrained("without-helpful")
            >>> RewardHead.from_pretrained("without-helpful").score_pairs(pairs["harmless"]).accuracy()
            1.0
        """
        save_classifier(self, folder)
