"""A reward model with hooks: a scalar head on a TransformerBridge or a HookedTransformer."""

import copy
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Unpack

import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from rmtension.bodies._bodies import find_body
from rmtension.bodies._bridges import check_model_class
from rmtension.bodies._hooks import copy_without_hooks
from rmtension.data._encoding import TextOrChat
from rmtension.data._pair import PreferencePair
from rmtension.data._pairs import PreferencePairs
from rmtension.errors import OptionError
from rmtension.evaluation._pair_rewards import PairRewards
from rmtension.heads._outputs import choose_outputs
from rmtension.heads._weighted_sum import with_weighted_sum
from rmtension.interventions._export import ablate_weights
from rmtension.interventions._lens_hooks import LensHook, fwd_hooks
from rmtension.interventions._replacement import Replacement
from rmtension.interventions._replacements import Zero
from rmtension.models._checkpoint_names import require_name
from rmtension.models._checkpoints import open_checkpoint
from rmtension.models._checkpoints_in_memory import checkpoint_of
from rmtension.models._lens_models import is_saved_model
from rmtension.models._loading import LoadOptions
from rmtension.models._opening import (
    bound_head,
    head_on,
    open_model,
    open_saved_model,
    require_hidden_padding,
    within_reference,
)
from rmtension.models._reward_model import RewardModel
from rmtension.models._run_options import RunOptions, check_run_options, run_options_of
from rmtension.models._saving import save_model
from rmtension.neurons._neuron_set import NeuronSet
from rmtension.passes._pair_pass import run_pass
from rmtension.passes._rewards_of_pairs import RewardsOfPairs
from rmtension.passes._scoring import score_texts, score_tokens
from rmtension.passes._selfcheck import check_head

__all__ = ["RewardHead"]


class RewardHead(RewardModel):
    """A reward model with hooks: it scores texts and preference pairs, and its neurons can be read and ablated.

    With a linear head, the reward of a text is `weight @ h + bias`, where h is the residual stream after the final norm
    at the last token. The model is not changed: it runs in eval mode, and every module gets its earlier mode back
    afterwards.

    Args:
        model: a `TransformerBridge` or `HookedTransformer`.
        weight: the linear head: `d_model` numbers (a tensor, an array or a list), a matrix with one row per output, a
            (weight, bias) pair, an `nn.Linear`, or a state dict with such a layer; or any other `Head`. None opens a
            language model without a reward, for its activations.
        output: which output of the head is the reward, if it has several: a name or an index, a pair (a, b) for output
            a minus output b, or "all" to choose later with `output`.
        final_norm: the final norm before weight processing. Required if TransformerLens folded its gain into the
            unembedding (a `HookedTransformer` with default processing, a bridge in compatibility mode): the gain is
            then folded into the head. Such a model raises `ModelError` without it.
        tokenizer: required to score texts. The model's own tokenizer is not used, because TransformerLens makes it
            prepend a BOS token.
        pad_token_id: tokens with this id are skipped at the end of a text, as in transformers' classifiers; None skips
            nothing.
        **options: `max_length`, `tokens_per_batch`, `truncate_response`, `on_nonfinite` and `two_segments`; see
            `rmtension.models.RunOptions`. All constructors take them, and they become attributes of the head.

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
        head = head_on(body, bound_head(body, weight, tokenizer), final_norm=final_norm)
        choice = None if head is None else choose_outputs(output, head, "weight")
        options = within_reference(body, head, options)
        super().__init__(body, head, choice=choice, tokenizer=tokenizer, pad_token_id=pad_token_id, **options)
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
        """Open a reward model from a folder or the Hugging Face hub, from safetensors files, in float32 by default.

        The reward of a sequence classifier is read where transformers reads it: at the last token that is not
        `config.pad_token_id`, also if you pass `head`. The reward of a language model is read at its last token; it
        comes from a value head (in the model's files or in `value_head.safetensors` in the same folder) or from
        next-token logits (`output`). A peft adapter is merged into its base model, and the head that was saved with it
        is used.

        Args:
            name_or_path: a folder or a hub name. A missing path raises an error before the hub is contacted,
                unless `revision` says that it is a hub name.
            head: replaces the checkpoint's head: anything that `weight` accepts above, or the path of a safetensors
                file. `LogRatioHead(reference, beta=...)` reads the language model's own log-probabilities (DPO), and
                `ProcessHead(marker)` the checkpoint's classes at the end of each step.
            output: which output is the reward, if there are several: an index, a name in `config.id2label`, or for a
                language model a token (`"ĠYes"` or `" Yes"`). A pair is a difference: `output=("ĠYes", "ĠNo")`.
            model_class: "TransformerBridge", or "HookedTransformer" (TransformerLens 3.x), which converts the weights.
            process_weights: True folds and centres the weights as TransformerLens does.
            **options: see `rmtension.models.LoadOptions`, for example `device`, `dtype` or `max_length`.

        Converted and processed models are compared with transformers on a short text, and raise `ModelError` if their
        rewards differ. A folder that `save_pretrained` wrote for a `HookedTransformer` or a `boot_native` bridge opens
        as that model; the only options are then `dtype`, `device`, `tokenizer`, `head` and `output`.

        Raises `ModelError` for a checkpoint without a head, for several outputs without `output`, for quantised
        weights, for a classifier without a pad token (pass `pad_token`), and for an adapter whose base model is not
        found (pass `base`).

        Examples:
            >>> opened = RewardHead.from_pretrained("organism", max_length=32)
            >>> opened.n_layers, opened.n_neurons("mlp"), opened.sites
            (2, 24, ['attn_head', 'mlp', 'mlp_gate'])
        """
        check_model_class(model_class)
        require_name(name_or_path)
        if is_saved_model(name_or_path):
            if process_weights:
                raise OptionError(
                    f"process_weights: {name_or_path} holds a model of a TransformerLens class, with the weights that "
                    "it was saved with. Leave it out."
                )
            return open_saved_model(cls, Path(name_or_path).expanduser(), head, output, options)
        if options.get("weight_memory") is not None and (model_class != "TransformerBridge" or process_weights):
            raise OptionError(
                "weight_memory: converted or processed weights are copies in memory. Leave out model_class and "
                "process_weights, or weight_memory."
            )
        run_options = run_options_of(options)
        opened = open_checkpoint(name_or_path, reward=True, head=head, output=output, options=options)
        return open_model(cls, opened, model_class=model_class, process_weights=process_weights, **run_options)

    @classmethod
    def from_language_model(cls, name_or_path: str | Path, **options: Unpack[LoadOptions]) -> "RewardHead":
        """Open any checkpoint for its activations only, for example the base model of a reward model.

        Activation statistics and mean-difference scores work; `score` raises `ModelError`, because there is no reward.

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
        """Open a transformers classifier that is in memory, for example after training.

        The weights are shared, not copied, so further training changes the rewards; a `HookedTransformer`, processed
        weights and another `dtype` are copies. The score layer is always copied: if it is trained further, scoring
        raises `ModelError` and asks to open the model again. A `PeftModel` runs with its adapter layers unmerged.
        `head`, `output`, `model_class` and `process_weights` are those of `from_pretrained`; with a `LogRatioHead` the
        model is a causal language model, with a `ProcessHead` a token classifier.

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

    # -- outputs ---------------------------------------------------------------------------------------------------

    @property
    def outputs(self) -> list[str]:
        """The names of the head's outputs, for example the labels of a classifier.

        Examples:
            >>> head.outputs
            ['reward']
        """
        return list(self.require_head().outputs)

    def output(self, output: object) -> "RewardHead":
        """The same model with another output as its reward; weights are shared, nothing is copied.

        `output` is the name or the index of an output, a pair (a, b) for output a minus output b, or a mapping from
        outputs to weights for their weighted sum. Every function that takes a model takes the result, so two outputs of
        one model can be compared as two models are (`docs/outputs.md`).

        Raises `OptionError` for an output that the head does not have, with the nearest name.

        Examples:
            >>> from rmtension.heads import LinearHead
            >>> rows = torch.stack([head.weight, -head.weight])
            >>> both = LinearHead(rows, names=["helpfulness", "harm"])
            >>> model = RewardHead(head.model, both, output="all", tokenizer=head.tokenizer)
            >>> model.output("helpfulness").score_pairs(pairs["helpful"]).accuracy()
            1.0
            >>> model.output(("harm", "helpfulness")).score_pairs(pairs["helpful"]).accuracy()
            0.0
            >>> model.output({"helpfulness": 1.0, "harm": -0.5}).outputs
            ['helpfulness', 'harm', 'helpfulness - 0.5 harm']
        """
        other = copy.copy(self)
        other._fingerprint = None
        if isinstance(output, Mapping):
            other.head, number = with_weighted_sum(self.require_head(), output)
            names = self.outputs
            terms = {name if isinstance(name, str) else names[name]: weight for name, weight in output.items()}
            if len(other.require_head().outputs) > len(names):  # a sum of one output with weight 1 adds none
                other.weighted_sums = (*self.weighted_sums, terms)
            choice: tuple[int, ...] | None = (number,)
        else:
            choice = choose_outputs(output, self.require_head(), "output")
        other._choose(choice)
        if self.checkpoint is not None:
            other.checkpoint = replace(self.checkpoint, choice=choice)
        return other

    # -- scoring ---------------------------------------------------------------------------------------------------

    def score(
        self, texts: Sequence[TextOrChat], *, truncate: bool = False, progress: bool | None = None
    ) -> Float[Tensor, "text"]:
        """The reward of every text, in the order of `texts`, on the CPU. Cost: one forward pass per text.

        A text is a string, or a list of chat messages, which the tokenizer's chat template renders. A text that does
        not fit into the context raises `DataError`, or is cut from the left with `truncate=True`.

        Examples:
            >>> responses = ["helpful-0 helpful-1", "helpful-0", ""]
            >>> rewards = head.score([f"Human: a Assistant: {response} end" for response in responses])
            >>> rewards.round().tolist()
            [11.0, 6.0, 0.0]
        """
        return score_texts(self, texts, truncate=truncate, progress=progress)

    def score_pairs(
        self,
        pairs: Iterable[PreferencePair],
        *,
        work: str | Path | None = None,
        progress: bool | None = None,
    ) -> PairRewards:
        """The rewards of both responses of every pair. Cost: one pass over all texts; a shared prompt runs once.

        Identical responses get identical rewards. If a text is too long for the context, its prompt is cut from the
        left, and the result counts such texts. A response that does not fit raises `DataError`, or is cut if the model
        was opened with `truncate_response=True`. A reward that is NaN or infinite raises `ModelError` with the pair's
        id and the likely cause; if the model was opened with `on_nonfinite="skip"` such pairs are skipped, and their
        ids are in the result's provenance. `work` and `progress` are those of `run_pass`.

        Examples:
            >>> rewards = head.score_pairs(pairs["helpful"])
            >>> rewards, rewards.chosen.shape
            (PairRewards(n=24, accuracy=1.000, ties=0), torch.Size([24]))
        """
        self.require_choice()
        pairs = pairs if isinstance(pairs, PreferencePairs) else PreferencePairs(pairs)
        statistic = RewardsOfPairs(self, pairs, lambda batch: [self.rewards(batch)])
        (scored,) = run_pass(self, pairs, statistic, work=work, progress=progress)
        return scored

    def score_outputs(
        self,
        pairs: Iterable[PreferencePair],
        *,
        work: str | Path | None = None,
        progress: bool | None = None,
    ) -> dict[str, PairRewards]:
        """The rewards of both responses of every pair by each output of the head, by the output's name.

        Cost: that of `score_pairs`, for all outputs together. `work` and `progress` are those of `run_pass`.

        Examples:
            >>> from rmtension.heads import LinearHead
            >>> rows = torch.stack([head.weight, -head.weight])
            >>> both = LinearHead(rows, names=["helpfulness", "harm"])
            >>> model = RewardHead(head.model, both, output="all", tokenizer=head.tokenizer)
            >>> {name: rewards.accuracy() for name, rewards in model.score_outputs(pairs["helpful"]).items()}
            {'helpfulness': 1.0, 'harm': 0.0}
        """
        names = list(self.require_head().outputs)
        if len(set(names)) < len(names):
            raise OptionError(
                f"outputs: expected outputs with different names, got {names[:12]}. Score them one by one: "
                "head.output(0).score_pairs(pairs)."
            )
        pairs = pairs if isinstance(pairs, PreferencePairs) else PreferencePairs(pairs)
        statistic = RewardsOfPairs(self, pairs, lambda batch: list(self.all_outputs(batch).unbind(1)), n=len(names))
        scored = run_pass(self, pairs, statistic, work=work, progress=progress)
        outputs = {}
        for number, (name, rewards) in enumerate(zip(names, scored, strict=True)):
            of_output = self.output(number)
            provenance = replace(rewards.provenance, model=of_output.fingerprint, output=of_output.output_name)
            outputs[name] = replace(rewards, provenance=provenance)
        return outputs

    def score_tokens(
        self, input_ids: Int[Tensor, "text token"], attention_mask: Tensor | None = None
    ) -> Float[Tensor, "text"]:
        """The reward of every row of token ids. `attention_mask` is 0 at padding, which may be on either side.

        Examples:
            >>> text = "Human: a Assistant: shared-0 shared-1 end"
            >>> tokens = head.tokenizer([text], return_tensors="pt")
            >>> head.score_tokens(tokens["input_ids"], tokens["attention_mask"]).equal(head.score([text]))
            True
        """
        return score_tokens(self, input_ids, attention_mask)

    # -- checking, ablating, saving --------------------------------------------------------------------------------

    def check(self, pairs: PreferencePairs | None = None, *, reference: Any = None) -> pd.DataFrame:
        """Check on this model that rewards and hooks are right: one row per check; see `docs/families.md`.

        Raises `CheckError` if a check fails; its `table` has the same rows. `reference` is a transformers classifier to
        compare with; by default the checkpoint is loaded again. Cost: about 30 forward passes over at most 16 texts,
        and one for every site and layer.

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
        """A copy of the model with the neurons ablated in its weights, permanently and at all positions.

        It computes what the model computes inside an `AblationContext`. `replacement` is `Zero()` (the default),
        `Mean(statistics)` or another constant (`Median`, `Optimal`), or `Scale(alpha)`; others raise `OptionError`.
        Memory: the model a second time.

        Examples:
            >>> without = head.with_ablation(organism.truth["harmless"])
            >>> with AblationContext(head, organism.truth["harmless"]):
            ...     inside = head.score_pairs(pairs["harmless"])
            >>> bool((without.score_pairs(pairs["harmless"]).margin - inside.margin).abs().max() < 1e-4)
            True
        """
        return ablate_weights(self, neurons, replacement)

    def fwd_hooks(self, neurons: NeuronSet, replacement: Replacement = Zero()) -> list[LensHook]:
        """The same ablation as hooks for `head.model.run_with_hooks(ids, fwd_hooks=...)`; see `docs/fit_in.md`.

        `replacement` is one that `with_ablation` takes; others raise `OptionError`.

        Examples:
            >>> [name for name, _ in head.fwd_hooks(neurons)]
            ['blocks.0.mlp.hook_post', 'blocks.1.mlp.hook_post']
        """
        return fwd_hooks(self, neurons, replacement)

    def save_pretrained(self, folder: str | Path) -> None:
        """Write a checkpoint of the kind that the model was read from, with the tokenizer.

        A classifier, a head that you passed and the logits of tokens are written as a classifier that
        `AutoModelForSequenceClassification` loads; a checkpoint with its own class is written with its own names,
        config and code, which is copied and not run. A checkpoint that is already in the folder is replaced. A
        `HookedTransformer` or a `boot_native` bridge, for which transformers has no class, is written as its state
        dict, config and head. `from_pretrained` opens all of them.

        Examples:
            >>> head.with_ablation(neurons).save_pretrained("without-helpful")
            >>> RewardHead.from_pretrained("without-helpful").score_pairs(pairs["harmless"]).accuracy()
            1.0
        """
        save_model(self, folder)
