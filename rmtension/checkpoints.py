"""Opening a checkpoint: transformers loads it, a TransformerBridge gives its hooks, the reward head stays with it."""

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from rmtension.body import BridgeBody
from rmtension.errors import ModelError


@dataclass(frozen=True)
class OpenedCheckpoint:
    """A body with what a reward head needs; `weight` is None for a language model."""

    body: BridgeBody
    weight: Float[Tensor, "d_model"] | None
    bias: float
    tokenizer: Any
    pad_token_id: int | None


def open_checkpoint(
    name: str | Path,
    *,
    reward: bool,
    dtype: torch.dtype,
    device: torch.device | str,
    revision: str | None,
    tokenizer: Any,
    pad_token: str | None,
    trust_remote_code: bool,
) -> OpenedCheckpoint:
    """Load `name` (a folder, or a hub name) with transformers and wrap it; safetensors only.

    With `reward` it must be a sequence classifier with one output whose head is in the file, otherwise `ModelError`;
    without, its head (if any) is left out. Memory: the weights once, with no vocabulary projection beyond the
    embeddings.
    """
    from transformers import AutoConfig, AutoModel, AutoModelForSequenceClassification

    source: dict[str, Any] = {"revision": revision, "trust_remote_code": trust_remote_code}
    config = _load("config", name, AutoConfig.from_pretrained, **source)
    if reward:
        _require_classifier(name, config)
    loader = AutoModelForSequenceClassification if reward else AutoModel
    loaded, info = _load(
        "weights", name, loader.from_pretrained, dtype=dtype, use_safetensors=True, output_loading_info=True, **source
    )
    missing = sorted(info["missing_keys"])
    if missing:
        raise ModelError(
            f"{name}: the checkpoint lacks {missing[:4]}{' and more' if len(missing) > 4 else ''}, which transformers "
            "would draw at random. Name the checkpoint that holds them; where it is the score head, train "
            "one (rmtension.training.train_reward_model)."
        )
    loaded = loaded.to(device).eval().requires_grad_(False)
    weight, bias = _score_head(name, loaded) if reward else (None, 0.0)
    tokenizer = tokenizer if tokenizer is not None else _load_tokenizer(name, source)
    pad_token_id = getattr(loaded.config, "pad_token_id", None)
    if reward or pad_token is not None:
        pad_token_id = _pad_token_id(name, loaded.config, tokenizer, pad_token)
    body = _bridge(name, loaded.base_model if reward else loaded, tokenizer, dtype, device, trust_remote_code)
    return OpenedCheckpoint(body, weight, bias, tokenizer, pad_token_id)


def _load(what: str, name: str | Path, load: Any, **options: Any) -> Any:
    try:
        return load(str(name), **options)
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise ModelError(f"{name}: transformers could not load the {what}: {error}") from error


def _require_classifier(name: str | Path, config: Any) -> None:
    architectures = config.architectures or []
    if not any(architecture.endswith("ForSequenceClassification") for architecture in architectures):
        raise ModelError(
            f"{name}: expected a checkpoint of a sequence classifier, got {architectures}: it has no score head. A "
            "language model is not a reward model; to read its activations alone use RewardHead.from_language_model."
        )
    if config.num_labels != 1:
        raise ModelError(
            f"{name}: expected a score head with one output, got {config.num_labels}. Load the reward model that was "
            "trained with num_labels=1, or pass RewardHead(model, weight=...) the row you mean."
        )


def _score_head(name: str | Path, classifier: Any) -> tuple[Tensor, float]:
    score = getattr(classifier, "score", None)
    if not isinstance(score, nn.Linear) or score.out_features != 1:
        raise ModelError(
            f"{name}: expected a linear layer called 'score' with one output, got {score}. Pass its weight to "
            "RewardHead(model, weight=...) yourself."
        )
    return score.weight[0].detach().clone(), 0.0 if score.bias is None else float(score.bias)


def _load_tokenizer(name: str | Path, source: dict[str, Any]) -> Any:
    from transformers import AutoTokenizer

    try:
        return _load("tokenizer", name, AutoTokenizer.from_pretrained, **source)
    except ModelError as error:
        raise ModelError(f"{error} Pass tokenizer=... if it lies elsewhere.") from error


def _pad_token_id(name: str | Path, config: Any, tokenizer: Any, pad_token: str | None) -> int | None:
    """The id that transformers skips at the end of a text (None: it skips none)."""
    if pad_token is not None:
        token_id = tokenizer.get_vocab().get(pad_token)
        if token_id is None:
            raise ModelError(f"pad_token: {pad_token!r} is not in the vocabulary of {name}. Name a token that is.")
        return int(token_id)
    if getattr(config, "pad_token_id", None) is None and tokenizer.pad_token_id is None:
        raise ModelError(
            f"{name}: neither its config nor its tokenizer has a pad token, and transformers reads the reward at the "
            "last token that is not one. Say which it is: from_pretrained(..., pad_token="
            f"{tokenizer.eos_token or '<a token of the vocabulary>'!r})."
        )
    return getattr(config, "pad_token_id", None)


def _bridge(
    name: str | Path,
    plain: Any,
    tokenizer: Any,
    dtype: torch.dtype,
    device: torch.device | str,
    trust_remote_code: bool,
) -> BridgeBody:
    """A TransformerBridge on a twin of `plain` that shares its tensors.

    TransformerLens boots causal language models only, and puts its components in the place of the model's modules. It
    gets the twin in a shell on the meta device, whose vocabulary projection, which nothing here runs, is tied to the
    embeddings or an expanded zero.
    """
    from transformer_lens.model_bridge import TransformerBridge
    from transformers import AutoModelForCausalLM

    shared = {id(tensor): tensor for tensor in [*plain.parameters(), *plain.buffers()]}
    twin = copy.deepcopy(plain, shared)
    names = {id(module): path for path, module in twin.named_modules()}
    try:
        with torch.device("meta"):
            build: Any = AutoModelForCausalLM.from_config
            shell = build(twin.config, trust_remote_code=trust_remote_code)
        setattr(shell, shell.base_model_prefix, twin)
        shell.tie_weights()
        unembedding = shell.get_output_embeddings()
        if unembedding.weight.is_meta:
            zero = torch.zeros((), dtype=dtype, device=device).expand(unembedding.weight.shape)
            unembedding.weight = nn.Parameter(zero, requires_grad=False)
        # TransformerLens re-reads a tokenizer that has a BOS token from disk to make it prepend one. It gets a copy
        # without; the reward model's own tokenizer stays as it is.
        spare = copy.deepcopy(tokenizer)
        spare.bos_token = None
        bridge: nn.Module = TransformerBridge.boot_transformers(
            str(name), hf_model=shell.eval(), dtype=dtype, device=device, tokenizer=spare
        )
    except Exception as error:  # the adapters of TransformerLens fail in as many ways as there are architectures
        raise ModelError(
            f"{name}: TransformerLens could not wrap a {type(plain).__name__} ({type(error).__name__}: {error}). Its "
            "architecture may not be supported; RewardHead(model, weight=...) takes a hooked model of your own."
        ) from error
    return BridgeBody(bridge, plain, names)
