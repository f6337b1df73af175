"""Out again: a head's model as a classifier of transformers, on disk or in memory, with neurons ablated for good."""

import copy
import re
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn

from rmtension.checkpoints import Checkpoint
from rmtension.distributed import current
from rmtension.errors import ModelError, OptionError, RMTensionWarning
from rmtension.files import filled_whole
from rmtension.heads import LinearHead
from rmtension.hooks import copy_without_hooks
from rmtension.neurons import NeuronSet
from rmtension.progress import without_unseen_bars
from rmtension.reward_head import RewardHead
from rmtension.sites import find_site


def ablate_weights(
    head: RewardHead, neurons: NeuronSet, *, mode: str = "zero", reference: Any = None, alpha: float | None = None
) -> RewardHead:
    """A copy of `head` whose weights do what `AblationContext(head, neurons, mode=mode, ...)` does at all positions.

    `zero` and `scale` multiply the neurons' weights in the down (or output) projection by 0 or `alpha`; `mean` sets
    them to 0 and adds what the mean activations write to the projection's bias. Where the projection has no bias, one
    is made if the architecture has a place for it in its config (Llama: `mlp_bias`, `attention_bias`), with zeros
    in the biases that come with it; otherwise `ModelError`. A mean at `mlp_gate` of a gated MLP is no constant at the
    projection: `OptionError`. Memory: the model a second time.
    """
    from rmtension.ablation import AblationContext

    checkpoint, base = _current(head, "with_ablation")
    if mode not in ("zero", "mean", "scale"):
        raise OptionError(
            f"mode: weights can do 'zero', 'mean' or 'scale' for good, got {mode!r}. Use AblationContext for the rest."
        )
    context = AblationContext(head, neurons, mode=mode, reference=reference, alpha=alpha)
    product = find_site(neurons.site).factor_of
    if mode == "mean" and product is not None:
        spots = head.body.spots
        if any(spots(neurons.site, layer) != spots(product, layer) for layer in context.columns):
            raise OptionError(
                f"mode: no weights do 'mean' at site {neurons.site!r} of a gated MLP, where what a neuron writes still "
                f"depends on its other factor. Use AblationContext, or neurons and means of site {product!r}."
            )
    base = copy_without_hooks(base)
    names = [head.body.projection_names[neurons.site, layer] for layer in range(head.n_layers)]
    if mode == "mean" and any(base.get_submodule(names[layer]).bias is None for layer in context.columns):
        base = _with_biases(base, names)
    with torch.no_grad():
        for layer, columns in context.columns.items():
            projection: Any = base.get_submodule(names[layer])
            # nn.Linear holds [out, in], GPT-2's Conv1D [in, out].
            weight = projection.weight if isinstance(projection, nn.Linear) else projection.weight.T
            columns = columns.to(weight.device)
            if mode == "mean":
                means = reference.channel_mean[layer].to(weight.device)[columns]
                # In float64 until the end: it stands for what thousands of tokens had in common.
                projection.bias += (weight[:, columns].double() @ means).to(projection.bias.dtype)
            # Only "scale" takes an alpha; the context has made sure.
            weight[:, columns] *= 0.0 if alpha is None else alpha
    opened = replace(checkpoint, base=base, source=None, name=f"{checkpoint.name}, {len(neurons)} neurons ablated")
    return RewardHead._from_checkpoint(opened, head.max_length, head.tokens_per_batch)


@without_unseen_bars()
def save_classifier(head: RewardHead, folder: str | Path) -> None:
    """Write the model of `head` as a one-label sequence classifier (safetensors), with its tokenizer.

    The config gets the head's pad token: where it has none, the reward is read at the last token whichever it is, and
    transformers scores one text at a time. A bias of the head, for which transformers has no place, is written as
    `score.bias`: `RewardHead.from_pretrained` reads it back, transformers leaves it out. Both warn.
    """
    checkpoint, _ = _current(head, "save_pretrained")
    if not current().is_first:
        return
    classifier = build_classifier(head)
    folder = Path(folder)
    state = classifier.state_dict()
    if head.bias:
        state["score.bias"] = torch.tensor([head.bias], dtype=torch.float32)
    with filled_whole(folder, "checkpoint", seal="config.json") as place:
        try:
            classifier.save_pretrained(place, state_dict=state)
        except SafetensorError as error:
            # What the file system said comes as text alone: "... (os error 28)".
            found = re.search(r"\(os error (\d+)\)", str(error))
            raise OSError(int(found[1]) if found else 0, str(error)) from error
        if checkpoint.tokenizer is not None:
            checkpoint.tokenizer.save_pretrained(place)
    if head.pad_token_id is None:
        warnings.warn(
            "save_pretrained: this head has no pad token to skip, it reads the last token whichever it is. So does "
            "transformers with this checkpoint, but one text at a time; for batches set config.pad_token_id to a token "
            "that ends no text.",
            RMTensionWarning,
            stacklevel=3,
        )
    if head.bias:
        warnings.warn(
            f"save_pretrained: the head has a bias of {head.bias:.4g}, for which transformers' classifiers have no "
            "place. It is in the file as 'score.bias'; transformers leaves it out, so that its rewards are smaller by "
            "that constant. Margins are the same.",
            RMTensionWarning,
            stacklevel=3,
        )


def build_classifier(head: RewardHead) -> Any:
    """A classifier of transformers around the model of `head`; it shares the weights."""
    from transformers import AutoModelForSequenceClassification

    checkpoint, base = _current(head, "build_classifier")
    config: Any = copy.deepcopy(base.config)
    config.num_labels = 1
    config.get_text_config().pad_token_id = head.pad_token_id
    try:
        with torch.device("meta"), torch.random.fork_rng(devices=[]):
            build: Any = AutoModelForSequenceClassification.from_config
            classifier = build(config, trust_remote_code=checkpoint.trust_remote_code)
    except ValueError as error:
        raise ModelError(f"{checkpoint.name}: transformers has no sequence classifier for it ({error}).") from error
    setattr(classifier, classifier.base_model_prefix, base)
    classifier.score = nn.Linear(head.d_model, 1, bias=False, device="meta")
    classifier.score.weight = nn.Parameter(head.require_weight()[None].to(head.dtype, copy=True), requires_grad=False)
    return classifier


@without_unseen_bars()
def reload_classifier(head: RewardHead) -> Any:
    """The classifier that transformers loads from where `head` came from; None where transformers knows of none."""
    from transformers import AutoModelForSequenceClassification

    checkpoint = head.checkpoint
    if checkpoint is None or not checkpoint.is_classifier:
        return None
    if checkpoint.source is None:
        return build_classifier(head)
    options = checkpoint.source.options
    with torch.random.fork_rng(devices=[]):
        classifier: Any = AutoModelForSequenceClassification.from_pretrained(
            checkpoint.source.name,
            revision=options.get("revision"),
            trust_remote_code=checkpoint.trust_remote_code,
            use_safetensors=True,
            dtype=head.dtype,
            device_map=options.get("device_map"),
            local_files_only=True,  # it was loaded from there a moment ago
        )
    config = classifier.config.get_text_config()
    if config.pad_token_id is None:
        config.pad_token_id = head.pad_token_id
    return classifier if options.get("device_map") else classifier.to(head.device)


def _current(head: RewardHead, what: str) -> tuple[Checkpoint, nn.Module]:
    """The checkpoint with what `head` is today (its weight may have been changed since), and its base model."""
    checkpoint = head.checkpoint
    if checkpoint is None or checkpoint.base is None or head.body.plain is None:
        raise ModelError(
            f"{what}: this head's weights are TransformerLens' conversion, not transformers' own. Open the checkpoint "
            "with RewardHead.from_pretrained or from_classifier, without model_class and process_weights."
        )
    today = replace(
        checkpoint,
        head=LinearHead(head.require_weight(), head.bias),
        pad_token_id=head.pad_token_id,
        tokenizer=head.tokenizer,
    )
    return today, checkpoint.base


def _with_biases(base: Any, names: list[str]) -> Any:
    """`base` rebuilt by a config in which the projections `names` have a bias; all new biases are 0."""
    flags = [key for key, value in base.config.to_dict().items() if "bias" in key and value is False]
    for flag in flags:
        config = copy.deepcopy(base.config)
        setattr(config, flag, True)
        with torch.device("meta"):
            rebuilt = type(base)(config)
        if any(rebuilt.get_submodule(name).bias is None for name in names):
            continue
        state = dict(base.state_dict())
        parameter = next(base.parameters())
        new = [key for key in rebuilt.state_dict() if key not in state]
        if not all(key.endswith(".bias") for key in new):
            continue
        state |= {
            key: torch.zeros(rebuilt.get_parameter(key).shape, dtype=parameter.dtype, device=parameter.device)
            for key in new
        }
        rebuilt.load_state_dict(state, assign=True)
        for name, buffer in base.named_buffers():
            owner, _, key = name.rpartition(".")
            setattr(rebuilt.get_submodule(owner), key, buffer)
        return rebuilt.eval().requires_grad_(False)
    raise ModelError(
        f"mode 'mean': the projections of {type(base).__name__} have no bias, and its config has no place for one. Use "
        "mode='zero', or AblationContext, which needs none."
    )
