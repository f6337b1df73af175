"""Hooked versions of a transformers model: a bridge, a bridge with processed weights, or a HookedTransformer."""

import copy
import subprocess
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from typing import Any

import torch
from torch import nn

from rmtension.bodies._bodies import Body, BridgeBody
from rmtension.bodies._hooked_transformer_body import HookedTransformerBody
from rmtension.bodies._hooks import copy_without_hooks
from rmtension.bodies._native_body import NativeBody
from rmtension.bodies._native_run import let_run_in_float64
from rmtension.bodies._native_sites import attends_both_ways
from rmtension.bodies._native_weights import has_adapters, refuse_packed_weights, refuse_recomputed
from rmtension.bodies._run_modes import plain_path
from rmtension.errors import ModelError, OptionError

MODEL_CLASSES = ("TransformerBridge", "HookedTransformer")


def wrap(
    name: str,
    plain: Any,
    tokenizer: Any,
    *,
    model_class: str = "TransformerBridge",
    process_weights: bool = False,
    trust_remote_code: bool = False,
) -> Body:
    """A hooked model of `plain`, a base model of transformers.

    A TransformerBridge without processing shares every tensor with `plain`, which is not changed; the other kinds copy
    the weights. If TransformerLens cannot wrap the architecture, or it is an encoder, transformers' own modules run
    alone. Raises `ModelError` if their sites are not found either, or for an architecture that TransformerLens should
    convert and cannot.
    """
    check_model_class(model_class)
    refuse_packed_weights(name, plain)
    refuse_recomputed(name, plain)
    let_run_in_float64(plain)
    converts = model_class != "TransformerBridge" or process_weights
    if attends_both_ways(plain):
        if converts:
            raise ModelError(
                f"{name}: expected causal attention for model_class and process_weights, but {type(plain).__name__} "
                "attends in both directions, as an encoder does. Open it without model_class and process_weights."
            )
        return NativeBody(plain, is_causal=False, reason="it is an encoder, which attends in both directions")
    try:
        # Building a model draws initial weights; the user's random state stays as it was.
        with torch.random.fork_rng(devices=[]):
            return _wrap(name, plain, tokenizer, model_class, process_weights, trust_remote_code)
    except Exception as error:  # every adapter of TransformerLens fails with its own errors
        reason = (
            f"{name}: TransformerLens {version('transformer-lens')} could not wrap a {type(plain).__name__} as a "
            f"{model_class}{' with processed weights' if process_weights else ''} ({type(error).__name__}: "
            f"{' '.join(str(error).split())[:300]})"
        )
        remedy = (
            "Merge its adapter first (peft: model.merge_and_unload())."
            if has_adapters(plain)
            else "docs/families_measured.md lists the families that work; RewardHead(model, weight) accepts a model "
            "that you hooked yourself."
        )
        if converts:
            raise ModelError(f"{reason}. {remedy}") from error
        try:
            return NativeBody(plain, reason=reason.removeprefix(f"{name}: "))
        except Exception as native_error:  # modules that do not run may raise anything
            why = str(native_error).removeprefix("model: ").removesuffix(".")
            raise ModelError(f"{reason}, and transformers' modules alone cannot be used: {why}. {remedy}") from error


def _wrap(
    name: str, plain: Any, tokenizer: Any, model_class: str, process_weights: bool, trust_remote_code: bool
) -> Body:
    if model_class == "HookedTransformer":
        return HookedTransformerBody(_hooked_transformer(plain, process_weights, trust_remote_code))
    if process_weights:
        bridge = _boot(name, copy_without_hooks(plain), tokenizer, trust_remote_code, writable=True)
        bridge.enable_compatibility_mode(disable_warnings=True)
        if next(plain.parameters()).dtype == torch.float64:
            # TransformerLens 3.9 adds missing biases in float32.
            bridge.original_model.to(torch.float64)
        return BridgeBody(bridge)
    twin = copy_without_hooks(plain, {id(tensor): tensor for tensor in [*plain.parameters(), *plain.buffers()]})
    # A compiled module finds its submodules without the name that torch.compile puts between them.
    names = {id(module): plain_path(path) for path, module in twin.named_modules()}
    return BridgeBody(_boot(name, twin, tokenizer, trust_remote_code), plain, names)


def check_model_class(model_class: str) -> None:
    """Raise `OptionError` for an unknown class, `ModelError` if the installed TransformerLens lacks it."""
    if model_class not in MODEL_CLASSES:
        raise OptionError(f"model_class: expected one of {list(MODEL_CLASSES)}, got {model_class!r}.")
    installed = version("transformer-lens")
    if model_class == "HookedTransformer" and int(installed.split(".")[0]) >= 4:
        raise ModelError(
            f"model_class: HookedTransformer needs transformer-lens 3, got version {installed}, which removed it. "
            "Install 'transformer-lens<4', or leave model_class out: a TransformerBridge has the same hook names."
        )


def _boot(name: str, base: Any, tokenizer: Any, trust_remote_code: bool, *, writable: bool = False) -> Any:
    """A TransformerBridge that uses the modules of `base`; `writable` if its weights will be processed."""
    from transformer_lens.model_bridge import TransformerBridge

    parameter = next(base.parameters())
    with _without_installing():
        return TransformerBridge.boot_transformers(
            name,
            hf_model=_language_model(base, trust_remote_code, writable=writable),
            dtype=parameter.dtype,
            device=parameter.device,
            tokenizer=_spare(tokenizer),
        )


@contextmanager
def _without_installing() -> Iterator[None]:
    """Keep TransformerLens from running `pip install torchvision`, which it does for a model that reads images.

    TransformerLens goes on without the package. It needs it for images, which are not used here.
    """

    def refuse(*_: Any, **__: Any) -> None:
        raise OSError("no package is installed while a model is opened")

    module: Any = subprocess
    original = module.check_call
    module.check_call = refuse
    try:
        yield
    finally:
        module.check_call = original


def _spare(tokenizer: Any) -> Any:
    """A tokenizer for TransformerLens only, so that it neither downloads one nor changes the reward model's tokenizer.

    Without a tokenizer, TransformerLens searches for one by the model's name. A tokenizer with a BOS token is loaded
    again by it, with that token before every text. If the user's tokenizer cannot encode a short text, TransformerLens
    gets an empty tokenizer.
    """
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast

    spare = copy.deepcopy(tokenizer)
    if spare is not None:
        spare.bos_token = None
    if not _encodes(spare, "a"):
        empty = Tokenizer(WordLevel({"<unk>": 0}, unk_token="<unk>"))  # noqa: S106 - a token, no password
        return PreTrainedTokenizerFast(tokenizer_object=empty, unk_token="<unk>", eos_token="<unk>", pad_token="<unk>")  # noqa: S106
    return spare


def _encodes(tokenizer: Any, text: str) -> bool:
    """Whether a tokenizer can encode a text; a tokenizer without an unknown token may fail."""
    try:
        return tokenizer is not None and tokenizer.encode(text) is not None
    except Exception:  # tokenizers raises no narrower class
        return False


def _language_model(base: Any, trust_remote_code: bool, *, writable: bool) -> Any:
    """`base` inside a causal language model, the only kind of model that TransformerLens accepts.

    The language model is made on the meta device. Its vocabulary projection never runs; it is tied to the embeddings,
    or zero: a single number expanded to a matrix, unless it has to be `writable`.
    """
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        build: Any = AutoModelForCausalLM.from_config
        shell = build(copy.deepcopy(base.config), trust_remote_code=trust_remote_code)
    # TransformerLens chooses its adapter by this name, which differs in a classifier's config.
    shell.config.architectures = [type(shell).__name__]
    setattr(shell, shell.base_model_prefix, base)
    shell.tie_weights()
    parameter = next(base.parameters())
    for module in shell.modules():
        for key, weight in list(module.named_parameters(recurse=False)):
            if weight.is_meta:
                shape = weight.shape if writable else ()
                zero = torch.zeros(shape, dtype=parameter.dtype, device=parameter.device).expand(weight.shape)
                setattr(module, key, nn.Parameter(zero, requires_grad=False))
    return shell.eval()


def _hooked_transformer(plain: Any, process_weights: bool, trust_remote_code: bool) -> nn.Module:
    """A HookedTransformer with the weights of `plain`, by TransformerLens' own conversion."""
    from transformer_lens import HookedTransformer, loading_from_pretrained

    shell = _language_model(copy_without_hooks(plain), trust_remote_code, writable=True)
    parameter = next(plain.parameters())
    steps = dict.fromkeys(("fold_ln", "center_writing_weights", "center_unembed", "fold_value_biases"), process_weights)
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # the caller asked for this class by name
        config = copy.deepcopy(shell.config)
        # TransformerLens reads names that configs had before transformers 5.
        for key, value in (getattr(config, "rope_parameters", None) or {}).items():
            if not hasattr(config, key):
                setattr(config, key, value)
        context = getattr(config, "max_position_embeddings", None)
        if config.model_type == "gpt2":
            config.n_ctx = context
        config.save_pretrained(folder)
        cfg = loading_from_pretrained.get_pretrained_model_config(
            folder, fold_ln=process_weights, device=str(parameter.device), dtype=parameter.dtype
        )
        state = loading_from_pretrained.get_pretrained_state_dict(folder, cfg, hf_model=shell, dtype=parameter.dtype)
        cfg.tokenizer_name = None
        cfg.n_ctx = min(cfg.n_ctx, context or cfg.n_ctx)
        # TransformerLens makes experts in float32, whatever the config says.
        model = HookedTransformer(cfg, None, move_to_device=False).to(parameter.dtype, print_details=False)
    model.load_and_process_state_dict(state, **steps)
    hooked: nn.Module = model.to(parameter.device, print_details=False).eval().requires_grad_(False)
    return hooked
