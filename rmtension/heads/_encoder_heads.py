"""Heads of several modules that transformers' classifiers have after their base model, as encoders do."""

import copy
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from rmtension.bodies._hooks import copy_without_hooks
from rmtension.bodies._native_run import probe_batch, run_base, stream_difference, stream_tolerance
from rmtension.bodies._run_modes import eager_eval, unwrapped
from rmtension.data._token_places import TokenPlaces
from rmtension.data._tokens import TokenBatch
from rmtension.errors import ModelError
from rmtension.heads._head import Head

# What a classifier reads: the state of one token; the mean of the states of all tokens; or all tokens one by one, whose
# outputs it averages (EuroBERT calls this late pooling).
Pooling = Literal["first", "last", "mean", "late"]
_PROBE_TOKENS = 6


class PooledHead(Head):
    """Runs a transformers classifier's own forward on given states, in place of those of its base model.

    DeBERTa has a pooler, an activation function and a linear map; BERT a pooler inside its base model; RoBERTa and
    ELECTRA two linear maps; ModernBERT a linear map, an activation function, a norm and a linear map. All of them are
    run as transformers runs them, with copies of their parameters. Make one with `encoder_head`, which compares it with
    the classifier.

    Attributes:
        outputs: the names of the classifier's labels, or "reward" for one.
        pooling: which states the head reads.
    """

    def __init__(self, classifier: Any) -> None:
        super().__init__()
        base = classifier.base_model
        states = _States(
            copy_without_hooks(base.pooler) if isinstance(getattr(base, "pooler", None), nn.Module) else None
        )
        # The copy has `states` where the classifier has its base model, which is neither copied nor run.
        self.layers = copy_without_hooks(classifier, {id(base): states}).eval().requires_grad_(False)
        n_outputs = int(classifier.config.num_labels)
        names = [str(classifier.config.id2label.get(number, number)) for number in range(n_outputs)]
        self.outputs = ("reward",) if n_outputs == 1 else tuple(names)
        self.pooling: Pooling = _pooling_of(self._logits, classifier.config.get_text_config().hidden_size, self.layers)
        self.reads_first = self.pooling == "first"

    @property
    def reads_last_only(self) -> bool:
        """Whether the head reads one token, the first or the last."""
        return self.pooling in ("first", "last")

    @property
    def reads_at(self) -> str:
        """The token that the head reads, or "all"."""
        return self.pooling if self.reads_last_only else "all"

    def tensors_of(self, classifier: Any) -> dict[str, Tensor]:
        """The tensors of a classifier of this kind that the head has copies of, by their names in the head."""
        return {f"layers.{name}": classifier.get_parameter(name) for name, _ in self.layers.named_parameters()}

    def read(
        self, last: Float[Tensor, "text d_model"], prompt_last: Float[Tensor, "text d_model"] | None = None
    ) -> Float[Tensor, "text output"]:
        """The outputs for the state of the token that is read, or for the mean state of all tokens."""
        return self._logits(last[:, None])

    def tokens(self, batch: TokenBatch) -> TokenPlaces:
        """The places of the tokens that are read: one per text, or all of them."""
        return batch.last_places if self.pooling in ("first", "last") else batch.places(batch.mask)

    def read_tokens(
        self, states: Float[Tensor, "token d_model"], places: TokenPlaces, batch: TokenBatch
    ) -> Float[Tensor, "text output"]:
        """The outputs of a batch's texts for the states at the tokens that `tokens` returned."""
        if self.pooling in ("first", "last"):
            return self.read(states)
        if self.pooling == "mean":
            return self.read(places.means(states, len(batch.last)))
        return places.means(self.read(states), len(batch.last))

    def classifier_with(self, base: nn.Module) -> Any:
        """The transformers classifier of these modules and `base`, which it shares; the modules are copied.

        The config is a copy of `base.config`, to which an ablation may have added biases, with the classifier's labels.
        """
        classifier: Any = copy_without_hooks(self.layers)
        config: Any = copy.deepcopy(base.config)
        config.id2label, config.label2id = classifier.config.id2label, classifier.config.label2id
        config.architectures = classifier.config.architectures
        classifier.config = config
        setattr(classifier, classifier.base_model_prefix, base)
        return classifier

    def _logits(self, states: Float[Tensor, "text token d_model"]) -> Float[Tensor, "text output"]:
        mask = torch.ones(states.shape[:2], dtype=torch.long, device=states.device)
        logits: Tensor = self.layers(inputs_embeds=states, attention_mask=mask, return_dict=True).logits
        return logits


class _States(nn.Module):
    """Stands where a classifier has its base model, and returns the states that it is given."""

    def __init__(self, pooler: nn.Module | None) -> None:
        super().__init__()
        self.pooler = pooler

    def forward(self, *_args: Any, inputs_embeds: Tensor, **_options: Any) -> Any:
        from transformers.modeling_outputs import BaseModelOutputWithPoolingAndCrossAttentions

        pooled = None if self.pooler is None else self.pooler(inputs_embeds)
        return BaseModelOutputWithPoolingAndCrossAttentions(last_hidden_state=inputs_embeds, pooler_output=pooled)


def encoder_head(name: str, classifier: Any) -> PooledHead:
    """The head of a transformers classifier whose reward is more than a linear map of one state.

    The head is compared with the classifier's own logits on a short text. Cost: two short runs. Raises `ModelError` if
    they differ, or if the classifier reads its tokens in another way.
    """
    classifier = unwrapped(classifier)
    kind = type(classifier).__name__
    refused = (
        f"{name}: {kind} computes its reward in a way that is not supported"
        " ({}). To read activations only, use RewardHead.from_language_model."
    )
    base: Any = classifier.base_model
    parameter = next(base.parameters())
    try:
        head = PooledHead(classifier)
        with torch.no_grad(), eager_eval(classifier.modules()):
            batch = probe_batch(min(_PROBE_TOKENS, len(base.get_input_embeddings().weight)), parameter.device)
            expected = classifier(input_ids=batch.input_ids, attention_mask=torch.ones_like(batch.input_ids)).logits
            states = run_base(base, batch)
            at = {"first": states[:, 0], "last": states[:, -1], "mean": states.mean(dim=1), "late": states[0]}
            actual = head.read(at[head.pooling]).mean(dim=0, keepdim=True)
    except ModelError as error:
        raise ModelError(refused.format(error)) from error
    except Exception as error:  # the forward of a classifier may raise anything for states without tokens
        raise ModelError(refused.format(f"{type(error).__name__}: {error}")) from error
    off = stream_difference(actual, expected) if actual.shape == expected.shape else float("inf")
    if not off <= stream_tolerance(parameter.dtype):
        raise ModelError(
            refused.format(f"its modules after the base model give logits that are off by {off:.1e} of their size")
        )
    return head


def _pooling_of(logits: Any, width: int, layers: nn.Module) -> Pooling:
    """Which of several states the logits depend on, by their gradient; raises `ModelError` for other dependences."""
    parameter = next(layers.parameters())
    draw = torch.randn(1, 4, width, generator=torch.Generator().manual_seed(0), dtype=torch.float32)
    states = draw.to(parameter).requires_grad_()
    with torch.enable_grad():
        outputs = logits(states)
        (gradient,) = torch.autograd.grad(outputs.square().sum(), states)
    used = gradient[0].ne(0).any(dim=1).tolist()
    if used == [True, False, False, False]:
        return "first"
    if used == [False, False, False, True]:
        return "last"
    if all(used):
        with torch.no_grad():
            candidates: dict[Pooling, Tensor] = {
                "mean": logits(states.mean(dim=1, keepdim=True)),
                "late": logits(states[0, :, None]).mean(dim=0, keepdim=True),
            }
        for pooling, expected in candidates.items():
            if stream_difference(expected, outputs.detach()) <= stream_tolerance(parameter.dtype):
                return pooling
    raise ModelError(f"it reads {sum(used)} of 4 tokens, neither one token nor the mean of all")
