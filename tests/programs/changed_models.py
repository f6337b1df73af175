"""Whether this library is exact on models that users changed, or refuses them with an error.

    python tests/programs/changed_models.py

prints a table with one row per way of changing a model and one column per operation. The right values are those of the
changed model itself, run by transformers one text at a time, with plain PyTorch hooks on its projections.
tests/models/test_changed_models.py checks every cell.
"""

import contextlib
import sys
import tempfile
import types
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import peft
import torch
import transformers

sys.path.append(str(Path(__file__).parents[1] / "helpers"))

from tiny_models import make_config, make_pairs, make_tokenizer
from torch import nn
from torch.nn.utils import parametrizations, prune

from rmtension import AblationContext, ActivationCollector, NeuronAttribution, NeuronSet, RewardHead
from rmtension.errors import RMTensionError

PAIRS = make_pairs(4, longest=6)
TEXTS = [pair.text(side) for side in ("chosen", "rejected") for pair in PAIRS]
OPERATIONS = ("score", "collect", "sample", "attribute", "ablate", "permanent ablation", "save")
# float32 sums in another order.
LIMIT = 2e-5


# -- ways of changing a model ------------------------------------------------------------------------------------------


def blocks_of(model):
    return model.transformer.h if hasattr(model, "transformer") else model.model.layers


def down(model, block):
    return block.mlp.c_proj if hasattr(model, "transformer") else block.mlp.down_proj


def each(change: Callable[[Any, Any], None]) -> Callable[[Any], Any]:
    """The same change in every block."""

    def apply(model):
        for block in blocks_of(model):
            change(model, block)
        return model

    return apply


def compiled(module):
    return torch.compile(module, backend="eager")  # a backend that needs no compiler


def compile_in_place(module):
    module.compile(backend="eager")


def wrap_blocks(model):
    layers = blocks_of(model)
    for number, block in enumerate(layers):
        layers[number] = compiled(block)
    return model


def wrap_mlps(model):
    for block in blocks_of(model):
        block.mlp = compiled(block.mlp)
    return model


def wrap_base(model):
    setattr(model, model.base_model_prefix, compiled(model.base_model))
    return model


def compile_base(model):
    compile_in_place(model.base_model)
    return model


def compile_whole(model):
    compile_in_place(model)
    return model


def compile_forward(model, block):
    block.mlp.forward = compiled(block.mlp.forward)


def replace_forward(model, block):
    """Another forward that still calls the projection as a module, as fused kernels have."""
    original = type(block.mlp).forward
    block.mlp.forward = types.MethodType(lambda self, x: 2 * original(self, x), block.mlp)


def inline_mlp(model, block):
    """A forward that computes the whole MLP from its weights, so that no module inside it runs."""
    mlp = block.mlp

    def llama(self, x):
        linear = nn.functional.linear
        return linear(
            self.act_fn(linear(x, self.gate_proj.weight)) * linear(x, self.up_proj.weight), self.down_proj.weight
        )

    def gpt2(self, x):
        hidden = self.act(x @ self.c_fc.weight + self.c_fc.bias)
        return hidden @ self.c_proj.weight + self.c_proj.bias

    mlp.forward = types.MethodType(gpt2 if hasattr(model, "transformer") else llama, mlp)


def adapter(config: Callable[[list[str], list[str]], Any]) -> Callable[[Any], Any]:
    """Adapter layers inside the model, on attention and on the down projection, with weights that have an effect."""

    def apply(model):
        is_gpt2 = hasattr(model, "transformer")
        targets = ["c_attn", "c_proj"] if is_gpt2 else ["q_proj", "o_proj", "down_proj"]
        feedforward = ["mlp.c_proj"] if is_gpt2 else ["down_proj"]
        with torch.random.fork_rng():
            torch.manual_seed(1)
            peft.inject_adapter_in_model(config(targets, feedforward), model)
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_" in name or "ia3_" in name:
                    parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
        return model.eval()

    return apply


def lora(targets, _feedforward, **more):
    is_gpt2 = "c_attn" in targets
    return peft.LoraConfig(r=4, target_modules=targets, fan_in_fan_out=is_gpt2, **more)


def dora(targets, feedforward):
    return lora(targets, feedforward, use_dora=True)


def ia3(targets, feedforward):
    feedforward = [name for name in targets if name in ("down_proj", "c_proj")]
    return peft.IA3Config(target_modules=targets, feedforward_modules=feedforward, fan_in_fan_out="c_attn" in targets)


def parametrised(model, block):
    parametrizations.weight_norm(down(model, block))
    down(model, block).parametrizations.weight.original0.data.mul_(1.5)


def weight_normed(model, block):
    nn.utils.weight_norm(down(model, block))


def spectral_normed(model, block):
    nn.utils.spectral_norm(down(model, block))


def pruned(model, block):
    prune.random_unstructured(down(model, block), "weight", 0.3)


def quantised(model):
    return torch.ao.quantization.quantize_dynamic(model, {nn.Linear, transformers.pytorch_utils.Conv1D}, torch.qint8)


def packed_parameter(model, block):
    """Weights in 8 bits, as quantisers store them."""
    projection = down(model, block)
    projection.weight = nn.Parameter((100 * projection.weight.detach()).to(torch.int8), requires_grad=False)


def distributed(model):
    if not torch.distributed.is_initialized():
        store = Path(tempfile.mkdtemp()) / "store"
        torch.distributed.init_process_group("gloo", init_method=f"file://{store}", rank=0, world_size=1)
    return nn.parallel.DistributedDataParallel(model)


def checkpointing(model):
    model.gradient_checkpointing_enable()
    return model.train()


def hook_that_reads(model, block):
    block.mlp.register_forward_hook(lambda module, args, output: None)


def hook_that_changes(model, block):
    block.mlp.register_forward_hook(lambda module, args, output: 2 * output)


@dataclass(frozen=True)
class Way:
    """A change of a model.

    `is_late`: the change comes after opening. `is_another`: it changes what the model computes. `is_readable`: hooks
    see the inputs of the down projections; if they do not, every operation except plain scores has to be refused.
    """

    change: Callable[[Any], Any]
    is_late: bool = False
    is_another: bool = True
    is_readable: bool = True


def unchanged(model):
    return model


_COMPILES = {
    "model.compile()": compile_whole,
    "base.compile()": compile_base,
    "block.compile()": each(lambda model, block: compile_in_place(block)),
    "mlp.compile()": each(lambda model, block: compile_in_place(block.mlp)),
    "torch.compile(base)": wrap_base,
    "torch.compile(block)": wrap_blocks,
    "torch.compile(mlp)": wrap_mlps,
    "mlp.forward = torch.compile(mlp.forward)": each(compile_forward),
}
WAYS = {
    "unchanged": Way(unchanged, is_another=False),
    "torch.compile(model)": Way(compiled, is_another=False),
    **{name: Way(change, is_another=False) for name, change in _COMPILES.items()},
    **{f"{name}, after opening": Way(change, True, is_another=False) for name, change in _COMPILES.items()},
    "mlp.forward replaced, calls its modules": Way(each(replace_forward)),
    "mlp.forward replaced, does not call its modules": Way(each(inline_mlp), is_readable=False),
    "the same, after opening": Way(each(inline_mlp), True, is_readable=False),
    "LoRA": Way(adapter(lora)),
    "DoRA": Way(adapter(dora)),
    "IA3": Way(adapter(ia3)),
    "parametrizations.weight_norm": Way(each(parametrised)),
    "utils.weight_norm": Way(each(weight_normed)),
    "utils.spectral_norm": Way(each(spectral_normed)),
    "utils.prune": Way(each(pruned)),
    "int8, dynamic": Way(quantised, is_readable=False),
    "int8 parameters": Way(each(packed_parameter), is_readable=False),
    "DistributedDataParallel": Way(distributed, is_another=False),
    "gradient checkpointing, train mode": Way(checkpointing, is_another=False),
    "user's hook that reads": Way(each(hook_that_reads), is_another=False),
    "user's hook that changes": Way(each(hook_that_changes)),
}


# -- right values ------------------------------------------------------------------------------------------------------


def fresh(family: str, tokenizer: Any) -> Any:
    """A classifier whose weights are so large that it is far from linear and all rewards differ."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = transformers.AutoModelForSequenceClassification.from_config(make_config(family, len(tokenizer)))
        for parameter in model.parameters():
            parameter.data += 0.1 * torch.randn_like(parameter)
    return model.eval()


@contextlib.contextmanager
def hooked(model, see):
    """`see(layer, input)` gets the input of every down projection; a tensor that it returns replaces the input."""
    with contextlib.ExitStack() as stack:
        for layer, block in enumerate(blocks_of(model)):
            handle = down(model, block).register_forward_pre_hook(
                lambda _module, args, layer=layer: None if (new := see(layer, args[0])) is None else (new, *args[1:])
            )
            stack.callback(handle.remove)
        yield


def rewards(model: Any, tokenizer: Any) -> torch.Tensor:
    return torch.stack([model(**tokenizer(text, return_tensors="pt")).logits[0, 0] for text in TEXTS])


def right_values(model: Any, tokenizer: Any) -> dict[str, torch.Tensor]:
    """What transformers and plain hooks compute on a model, and under "mask" the neurons that are ablated."""
    n_layers, n_pairs = len(blocks_of(model)), len(PAIRS)
    activations: list[list[torch.Tensor]] = [[] for _ in range(n_layers)]
    with hooked(model, lambda layer, value: activations[layer].append(value)):
        scored = rewards(model, tokenizer)
    margin = (scored[:n_pairs] - scored[n_pairs:]).sum() / n_pairs
    gradients = torch.autograd.grad(margin, [activation for layer in activations for activation in layer])
    by_layer = [gradients[layer * len(TEXTS) : (layer + 1) * len(TEXTS)] for layer in range(n_layers)]
    attributed = torch.stack(
        [
            sum((value[0] * gradient[0]).sum(0) for value, gradient in zip(*layer, strict=True)).detach()
            for layer in zip(activations, by_layer, strict=True)
        ]
    )
    mask = torch.zeros_like(attributed, dtype=torch.bool)
    mask.view(-1)[attributed.abs().flatten().argsort(descending=True)[:12]] = True
    with torch.no_grad(), hooked(model, lambda layer, value: value.masked_fill(mask[layer], 0.0)):
        without = rewards(model, tokenizer)
    means = torch.stack([torch.cat([text[0] for text in layer]).mean(0).detach() for layer in activations])
    right = {"score": scored.detach(), "attribute": attributed, "mask": mask}
    right |= dict.fromkeys(("collect", "sample"), means)
    return right | dict.fromkeys(("ablate", "permanent ablation", "save"), without)


# -- what the library computes -----------------------------------------------------------------------------------------


def operate(head: RewardHead, operation: str, mask: torch.Tensor, tokenizer: Any) -> torch.Tensor:
    neurons = NeuronSet(mask, "mlp", head.architecture)
    if operation == "score":
        return head.score(TEXTS)
    if operation == "collect":
        return ActivationCollector(head).collect(PAIRS).mean
    if operation == "sample":  # the sample holds all tokens, so its mean is theirs
        return ActivationCollector(head).sample(PAIRS, n=100_000).values.double().mean(0)
    if operation == "attribute":
        return NeuronAttribution(head, method="gradient_x_activation").score(PAIRS).values
    if operation == "ablate":
        with AblationContext(head, neurons):
            return head.score(TEXTS)
    ablated = head.with_ablation(neurons)
    if operation == "permanent ablation":
        return ablated.score(TEXTS)
    with tempfile.TemporaryDirectory() as folder:
        ablated.save_pretrained(Path(folder) / "saved")
        load = transformers.AutoModelForSequenceClassification.from_pretrained
        with torch.no_grad():
            return rewards(load(Path(folder) / "saved", dtype=torch.float32).eval(), tokenizer)


@dataclass(frozen=True)
class Outcome:
    """The largest difference from the right values, or the message of the refusal."""

    difference: float | None
    refusal: str | None

    @property
    def is_right(self) -> bool:
        """Whether the outcome is exact or a refusal."""
        return self.refusal is not None or (self.difference is not None and self.difference <= LIMIT)


def outcomes(way: Way, family: str, tokenizer: Any) -> dict[str, Outcome]:
    """The outcome of every operation, in order, on one head of a model that was changed in this way."""
    torch._dynamo.reset()
    try:
        return _outcomes(way, family, tokenizer)
    finally:
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()


def _outcomes(way: Way, family: str, tokenizer: Any) -> dict[str, Outcome]:
    changes = way.is_another and way.is_readable
    right = right_values(way.change(fresh(family, tokenizer)) if changes else fresh(family, tokenizer), tokenizer)
    model = fresh(family, tokenizer)
    try:
        if way.is_late:
            head = RewardHead.from_classifier(model, tokenizer=tokenizer)
            way.change(model)
        else:
            head = RewardHead.from_classifier(way.change(model), tokenizer=tokenizer)
    except RMTensionError as error:
        return dict.fromkeys(OPERATIONS, Outcome(None, str(error)))
    by_operation = {}
    for operation in OPERATIONS:
        try:
            values = operate(head, operation, right["mask"], tokenizer)
            by_operation[operation] = Outcome(float((values - right[operation]).abs().max()), None)
        except RMTensionError as error:
            by_operation[operation] = Outcome(None, str(error))
    return by_operation


def main() -> None:
    """Print the table for the families that the command line names, by default a Llama and a GPT-2."""
    families = sys.argv[1:] or ["llama", "gpt2"]
    refusals: dict[str, int] = {}
    n_wrong = 0
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        tokenizer = make_tokenizer(folder)
        for family in families:
            print(f"\n## {family}\n\n| way | {' | '.join(OPERATIONS)} |\n|---|{'---|' * len(OPERATIONS)}")
            for name, way in WAYS.items():
                row = outcomes(way, family, tokenizer).values()
                n_wrong += sum(not outcome.is_right for outcome in row)
                cells = [
                    f"{outcome.difference:.0e}"
                    if outcome.refusal is None
                    else f"refused ({refusals.setdefault(outcome.refusal, len(refusals) + 1)})"
                    for outcome in row
                ]
                print(f"| {name} | {' | '.join(cells)} |", flush=True)
    print(*(f"\n({number}) {message}" for message, number in refusals.items()), sep="\n")
    print(f"\n{n_wrong} cells are wrong: neither within {LIMIT:.0e} of the right values nor refused")
    sys.exit(n_wrong > 0)


if __name__ == "__main__":
    main()
