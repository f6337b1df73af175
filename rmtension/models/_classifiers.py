"""A transformers classifier of a model in memory, if its weights alone compute the reward."""

import copy
from collections.abc import Callable, Collection, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from rmtension.bodies._hooks import own_hooks_paused
from rmtension.bodies._native_run import probe_batch, run_base, stream_difference, stream_tolerance
from rmtension.bodies._native_weights import plain_copy
from rmtension.bodies._run_modes import eager_eval
from rmtension.data._tokens import TokenBatch
from rmtension.errors import ModelError
from rmtension.heads._encoder_heads import PooledHead
from rmtension.heads._head import LinearHead
from rmtension.models._checkpoint import Checkpoint
from rmtension.models._checkpoints import reload_model
from rmtension.models._reward_model import RewardModel

# The parameters that saving sets.
_SCORE = {"score.weight", "score.bias"}


def build_classifier(head: RewardModel) -> Any:
    """A classifier of transformers around the model of `head`.

    It shares the weights; where some have adapters or are parametrised, it gets copies. Raises `ModelError` where the
    weights alone do not compute what the model does.
    """
    if isinstance(head.head, PooledHead):
        classifier = head.head.classifier_with(plain_base(head, "build_classifier"))
        with torch.device("meta"), torch.random.fork_rng(devices=[]):
            same_class = type(classifier)(classifier.config)
        return require_weights(classifier, set(same_class.state_dict()))
    rows, _, names = rows_to_save(head)

    def configure(config: Any) -> None:
        config.num_labels = len(rows)
        if len(rows) > 1:
            name_labels(config, names)
        config.get_text_config().pad_token_id = head.pad_token_id

    classifier, expected = model_around(head, "SequenceClassification", configure)
    classifier.score = nn.Linear(head.d_model, len(rows), bias=False, device="meta")
    classifier.score.weight = nn.Parameter(rows.to(head.dtype, copy=True), requires_grad=False)
    return require_weights(classifier, expected, besides=_SCORE)


def model_around(head: RewardModel, kind: str, configure: Callable[[Any], None]) -> tuple[Any, set[str]]:
    """A model of transformers for `kind` around the base model of `head`, and the names that its weights should have.

    `configure` changes a copy of the config. The weights outside the base model are on the meta device. Raises
    `ModelError` where transformers has no such model, and where the weights alone do not compute what the model does.
    """
    import transformers

    base: Any = plain_base(head, "save_pretrained")
    config = copy.deepcopy(base.config)
    configure(config)
    assert head.checkpoint is not None
    auto_class = getattr(transformers, f"AutoModelFor{kind}")
    try:
        with torch.device("meta"), torch.random.fork_rng(devices=[]):
            model = auto_class.from_config(config, trust_remote_code=head.checkpoint.trust_remote_code).eval()
    except ValueError as error:
        raise ModelError(f"{head.checkpoint.name}: transformers has no ...For{kind} for it ({error}).") from error
    expected = set(model.state_dict())
    setattr(model, model.base_model_prefix, base)
    return model, expected


def require_weights(model: Any, expected: set[str], *, besides: Collection[str] = ()) -> Any:
    """`model`, if it has the weights that its class should have, except `besides`, and all of them have values."""
    state = model.state_dict()
    missing = {name for name, tensor in state.items() if tensor.is_meta} | (set(state) ^ expected) - set(besides)
    if missing:
        raise ModelError(
            f"save_pretrained: expected the weights of a {type(model).__name__}, but {sorted(missing)[:3]} are missing "
            "or its class does not have them. Modules inside the model were replaced or wrapped; undo that, then save."
        )
    return model


def name_labels(config: Any, names: Sequence[str]) -> None:
    """Write the names of a classifier's outputs into its config."""
    config.id2label = dict(enumerate(names))
    config.label2id = {name: number for number, name in enumerate(names)}


def plain_base(head: RewardModel, what: str) -> Any:
    """The base model of `head` as its weights alone compute it: shared, or copied where some are parametrised."""
    _, base = current_checkpoint(head, what)
    plain = plain_copy(base)
    require_same_stream(head, nullcontext(), partial(run_eagerly, plain), "save_pretrained")
    return plain


def rows_to_save(
    head: RewardModel,
) -> tuple[Float[Tensor, "output d_model"], Float[Tensor, "output"], Sequence[str]]:
    """The rows and biases of a score layer: the chosen output's or, if none is chosen, those of all, with their names.

    Raises `ModelError` for a head that is not linear, which no classifier of transformers computes.
    """
    linear = head.head
    if head.choice is None and isinstance(linear, LinearHead):
        return linear.weight, linear.bias, linear.outputs
    if head.weight is None and linear is not None:
        raise ModelError(
            f"save_pretrained: transformers has no class for the head {type(linear).__name__}, and this head was "
            "not read from the files of the checkpoint, which could be written again. Save the body with "
            "head.body.native.save_pretrained(folder), and pass the head again when you open it: head=..."
        )
    return head.require_weight()[None], torch.tensor([head.bias], dtype=torch.float64), ()


def reload_classifier(head: RewardModel) -> Any:
    """The transformers model that computes the reward, from the source of `head`; None if there is no such model."""
    checkpoint = head.checkpoint
    if checkpoint is None or (checkpoint.source is not None and (checkpoint.logits is None or head.weighted_sums)):
        return None  # transformers computes no sums of outputs
    if checkpoint.source is None or checkpoint.logits is None:
        return build_classifier(head) if checkpoint.pools and head.weight is not None else None
    model = reload_model(checkpoint.source, checkpoint.logits, head.dtype)
    config = model.config.get_text_config()
    if config.pad_token_id is None:
        config.pad_token_id = head.pad_token_id
    return model if checkpoint.source.options.get("device_map") else model.to(head.device)


def current_checkpoint(head: RewardModel, what: str) -> tuple[Checkpoint, nn.Module]:
    """The checkpoint with the current weight of `head`, which may have changed, and its base model."""
    head.require_same_head()
    checkpoint = head.checkpoint
    if checkpoint is None or checkpoint.base is None or head.body.native is None:
        raise ModelError(
            f"{what}: expected weights of transformers, but this model has weights that TransformerLens converted. "
            "Open the checkpoint with RewardHead.from_pretrained or from_classifier, without model_class and "
            "process_weights."
        )
    updated = replace(
        checkpoint,
        head=head.head,
        choice=head.choice,
        pad_token_id=head.pad_token_id,
        tokenizer=head.tokenizer,
    )
    return updated, checkpoint.base


def require_same_stream(
    head: RewardModel,
    inside: AbstractContextManager[object],
    run: Callable[[TokenBatch], Float[Tensor, "row token d_model"]],
    what: str,
) -> None:
    """Raise `ModelError` unless `run` gives the residual stream of the model `inside` a context, on a probe text.

    Contexts that are entered now are ignored. Hooks of the user are not: the copy lacks them, so they raise the error.
    """
    batch = probe_batch(min(12, head.max_length, head.body.n_embeddings), head.device)
    with torch.no_grad():
        with own_hooks_paused(head.body.modules()), inside:
            expected = head.residual(batch).double()
        actual = run(batch).double()
    difference = stream_difference(actual, expected)
    if not difference <= stream_tolerance(head.dtype):
        raise ModelError(
            f"{what}: the weights alone do not compute what the model computes: on a probe text their residual stream "
            f"is off by {difference:.1e} of its size. Hooks, and a forward that was replaced on a module, are not in "
            "the weights; remove them first (`handle.remove()`, `del module.forward`), or use AblationContext, which "
            "does not edit weights."
        )


def run_eagerly(base: nn.Module, batch: TokenBatch) -> Float[Tensor, "row token d_model"]:
    """The residual stream of transformers' own modules."""
    with eager_eval(base.modules()):
        return run_base(base, batch)
