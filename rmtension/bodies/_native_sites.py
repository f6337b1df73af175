"""Finds the blocks, the projections and the final norm of a base model of transformers, and proves them by short runs.

Names are not trusted. Candidates come from the module structure and from shapes; three runs on a few tokens then show
that they are what they seem:

1. Every module is watched: the blocks run once each, the input of a block is the output of the block before, and the
   final norm maps the output of the last block to the output of the model.
2. Every block gets the same stream in all rows, but another first token in the second row. A projection of attention is
   the first one whose input changes at the last token: what comes before attention works token by token.
3. In one row the input of the attention's projection is replaced at one token, in another row that of the MLP's. The
   output of the block must change at that token, and at no other.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from rmtension.bodies._hooks import Hook, HookSite, InstalledHooks, on_calls
from rmtension.bodies._native_run import probe_batch, run_base
from rmtension.bodies._run_modes import eager_eval, plain_path, unwrapped
from rmtension.data._tokens import TokenBatch
from rmtension.errors import ModelError

# How configs name the width of the MLP.
_MLP_WIDTHS = ("intermediate_size", "ffn_dim", "n_inner", "ffn_hidden_size", "d_ff", "dff", "hidden_dim")
_PROBE_TOKENS = 5
# The token whose activations are replaced: neither the first nor the last.
_TOKEN = 2
# The size of the replacement: large enough that half precision does not round away what it adds to the stream.
_REPLACED = 8.0


@dataclass(frozen=True)
class NativeSites:
    """What `find_native_sites` found: the paths of all modules are those of `base.named_modules()`.

    `missing` says for a site without projections, and for "final norm", why it was left out.
    """

    blocks: tuple[str, ...]
    projections: dict[tuple[str, int], str]
    final_norm: str | None
    d_model: int
    n_heads: int
    missing: dict[str, str] = field(default_factory=dict)


def attends_both_ways(base: nn.Module) -> bool:
    """Whether the state of the first token depends on a later token, as in an encoder.

    The gradient of the first state is exactly 0 at later tokens behind a causal mask, in every dtype. Cost: a run on a
    few tokens, with its backward pass.
    """
    model: Any = base
    kept: list[Tensor] = []

    def keep(embeddings: Tensor) -> Tensor:
        kept.append(embeddings.detach().requires_grad_())
        return kept[0]

    try:
        embedding: nn.Module = model.get_input_embeddings()
        batch = probe_batch(min(4, len(model.get_input_embeddings().weight)), next(base.parameters()).device)
        with eager_eval(base.modules()), InstalledHooks([(HookSite(embedding, "output"), keep)]), torch.enable_grad():
            first = run_base(base, batch)[0, 0]
            # Random, because the states of a norm without a gain sum to a constant.
            weights = torch.randn(len(first), generator=torch.Generator().manual_seed(0)).to(first)
            (gradient,) = torch.autograd.grad((first * weights).sum(), kept)
    except Exception:  # what does not run, or has no gradient, is left to the checks that follow
        return False
    # Where the model overflows, the gradient is NaN everywhere and says nothing.
    later = gradient[0, 1:]
    return bool(later.isfinite().all() and later.ne(0).any())


def find_native_sites(base: nn.Module) -> NativeSites:
    """The blocks and the output projections of the MLP and of attention in every block of `base`.

    Cost: three runs on a few tokens. Raises `ModelError` for a model whose blocks cannot be found.
    """
    config = unwrapped(base).config.get_text_config()
    device = next(base.parameters()).device
    batch = probe_batch(min(_PROBE_TOKENS, config.vocab_size), device, n_texts=4)
    with torch.no_grad(), eager_eval(base.modules()):
        run = partial(run_base, base, batch)
        seen = _watch(base, run)
        blocks = _find_blocks(base, config, seen)
        width = seen.inputs[blocks[0][1]].shape[-1]
        heads = getattr(config, "num_attention_heads", None)
        n_heads = heads if isinstance(heads, int) and heads > 0 else 1
        search = _SiteSearch(blocks, batch, width, n_heads if isinstance(heads, int) else 0, config, seen)
        projections, missing = search.find(run)
    names = {id(module): plain_path(path) for path, module in base.named_modules()}
    final_norm = _find_final_norm(base, blocks, seen)
    if final_norm is None:
        missing["final norm"] = (
            "no norm between its last block and its output (in many encoders, each block normalises its own output)"
        )
    return NativeSites(
        blocks=tuple(path for path, _ in blocks),
        projections={place: names[id(module)] for place, module in projections.items()},
        final_norm=final_norm,
        d_model=width,
        n_heads=n_heads,
        missing=missing,
    )


@dataclass
class _Seen:
    """The calls of a run: the order in which modules finished, their first inputs and their outputs."""

    order: list[nn.Module] = field(default_factory=list)
    inputs: dict[nn.Module, Tensor] = field(default_factory=dict)
    outputs: dict[nn.Module, Tensor] = field(default_factory=dict)
    result: Tensor | None = None


def _watch(base: nn.Module, run: Callable[[], Tensor]) -> _Seen:
    seen = _Seen()

    def note(module: nn.Module, args: tuple[Any, ...], _kwargs: dict[str, Any], output: Any) -> None:
        seen.order.append(module)
        first = output[0] if isinstance(output, tuple) and output else output
        if args and isinstance(args[0], Tensor) and isinstance(first, Tensor):
            seen.inputs[module], seen.outputs[module] = args[0], first

    with on_calls([module for module in base.modules() if module is not base], note):
        seen.result = run()
    return seen


def block_lists(base: nn.Module, n_layers: int | None) -> Iterator[tuple[str, nn.ModuleList]]:
    """The path and modules of every list of `n_layers` modules, one of which holds the blocks."""
    for path, modules in base.named_modules():
        if isinstance(modules, nn.ModuleList) and len(modules) == n_layers:
            yield path, modules


def _find_blocks(base: nn.Module, config: Any, seen: _Seen) -> list[tuple[str, nn.Module]]:
    """The path and module of every block: a list of as many modules as the config has layers, run one after another."""
    n_layers = getattr(config, "num_hidden_layers", None)
    reasons = []
    for path, modules in block_lists(base, n_layers):
        why = _why_no_chain(list(modules), seen)
        if why is None:
            where = plain_path(path)
            return [(f"{where}.{number}", block) for number, block in enumerate(modules)]
        reasons.append(f"{path}: {why}")
    raise ModelError(
        f"model: {type(base).__name__} has no list of {n_layers} blocks that run one after another on the residual "
        f"stream{' (' + '; '.join(reasons) + ')' if reasons else ''}."
    )


def _why_no_chain(blocks: Sequence[nn.Module], seen: _Seen) -> str | None:
    """Why these modules are not the blocks of the model; None if they are."""
    before: Tensor | None = None
    for number, block in enumerate(blocks):
        if seen.order.count(block) != 1:
            return f"block {number} runs {seen.order.count(block)} times"
        if block not in seen.inputs:
            return f"block {number} does not get the stream as its first argument"
        stream, after = seen.inputs[block], seen.outputs[block]
        if stream.ndim != 3 or stream.shape != after.shape or stream.shape[:2] != (4, stream.shape[1]):
            return f"block {number} maps {tuple(stream.shape)} to {tuple(after.shape)}"
        if before is not None and not torch.equal(before, stream):
            return f"the input of block {number} is not the output of block {number - 1}"
        before = after
    return None


def _find_final_norm(base: nn.Module, blocks: Sequence[tuple[str, nn.Module]], seen: _Seen) -> str | None:
    """The path of the module that maps the output of the last block to the output of the model."""
    after = seen.outputs[blocks[-1][1]]
    assert seen.result is not None
    result = seen.result
    inside = {id(module) for _, block in blocks for module in block.modules()}
    for path, module in base.named_modules():
        if id(module) in inside or module not in seen.inputs or seen.order.count(module) != 1:
            continue
        ends = torch.equal(seen.outputs[module], result) and not torch.equal(after, result)
        if ends and torch.equal(seen.inputs[module], after):
            return plain_path(str(path))
    return None


class _SiteSearch:
    """Runs 2 and 3: which linear modules of every block are the projections of attention and of the MLP."""

    def __init__(
        self,
        blocks: Sequence[tuple[str, nn.Module]],
        batch: TokenBatch,
        width: int,
        n_heads: int,
        config: Any,
        seen: _Seen,
    ) -> None:
        self._blocks = [block for _, block in blocks]
        self._shape = tuple(batch.input_ids.shape)
        self._width = width
        self._n_heads = n_heads
        named = [getattr(config, name, None) for name in _MLP_WIDTHS]
        self._mlp_widths = {size for size in named if isinstance(size, int)} or {4 * width}
        self._seen = seen
        # Layer -> the linear maps onto the stream, in the order in which they finish; the ids of those that get what
        # attention gathered from other tokens.
        self._linear = [list(_linear_onto(block, width, seen)) for block in self._blocks]
        self._mixing: list[set[int]] = [set() for _ in self._blocks]
        self._streams: dict[int, Tensor] = {}

    def find(self, run: Callable[[], Tensor]) -> tuple[dict[tuple[str, int], nn.Module], dict[str, str]]:
        """The projections of the sites that every block has, and why the other sites were left out."""
        with InstalledHooks([*self._same_streams(other_first=True), *self._watch_mixing()]):
            run()
        chosen: dict[tuple[str, int], nn.Module] = {}
        missing: dict[str, str] = {}
        for site, choose in (("mlp", self._mlp_of), ("attn_head", self._attention_of)):
            found = [choose(layer) for layer in range(len(self._blocks))]
            wrong = next((layer for layer, module in enumerate(found) if isinstance(module, str)), None)
            if wrong is None:
                chosen |= {(site, layer): module for layer, module in enumerate(found)}  # type: ignore[misc]
            else:
                missing[site] = f"layer {wrong} has {found[wrong]}"
        for site, why in self._unproved(chosen, run).items():
            missing[site] = why
            chosen = {place: module for place, module in chosen.items() if place[0] != site}
        return chosen, missing

    def _mlp_of(self, layer: int) -> nn.Module | str:
        wanted = [module for module, size in self._linear[layer] if size in self._mlp_widths]
        # With an MLP as wide as attention, the projection of the MLP comes after that of attention.
        if len(wanted) > 1 and self._mlp_widths & {self._width}:
            wanted = wanted[-1:]
        if len(wanted) != 1:
            sizes = sorted({size for _, size in self._linear[layer]})
            return (
                f"{len(wanted)} linear maps from the {sorted(self._mlp_widths)} neurons of an MLP to the stream, where "
                f"exactly one was expected (there are maps from {sizes} to {self._width}; a mixture of experts has one "
                "per expert)"
            )
        return wanted[0]

    def _attention_of(self, layer: int) -> nn.Module | str:
        mlp = self._mlp_of(layer)
        for module, size in self._linear[layer]:
            if id(module) in self._mixing[layer] and module is not mlp:
                if self._n_heads and size % self._n_heads == 0:
                    return module
                return f"an attention whose {size} channels are not split into {self._n_heads} heads"
        return "no linear map of what attention gathered from other tokens to the stream"

    def _unproved(self, chosen: dict[tuple[str, int], nn.Module], run: Callable[[], Tensor]) -> dict[str, str]:
        """Site -> why its projections are not what they seem, by replacing their inputs at one token."""
        rows = {"attn_head": 1, "mlp": 2}
        problems: dict[str, str] = {}
        outputs: dict[int, Tensor] = {}

        def replace(row: int, value: Tensor) -> Tensor:
            rows_of = value.reshape(*self._shape, value.shape[-1]).clone()
            draw = torch.randn(value.shape[-1], generator=torch.Generator().manual_seed(row))
            rows_of[row, _TOKEN] = _REPLACED * draw.to(value)
            return rows_of.reshape(value.shape)

        def check(layer: int, block_output: Any) -> None:
            outputs[layer] = block_output[0] if isinstance(block_output, tuple) else block_output

        hooks: list[tuple[HookSite, Hook]] = self._same_streams(other_first=False)
        hooks += [(HookSite(module, "input"), partial(replace, rows[site])) for (site, _), module in chosen.items()]
        hooks += [(HookSite(block, "output"), partial(check, layer)) for layer, block in enumerate(self._blocks)]
        with InstalledHooks(hooks):
            run()
        for site, layer in chosen:
            before, after = outputs[layer][0], outputs[layer][rows[site]]
            size = float(before.abs().max()) or 1.0
            moved = (after - before).abs().amax(dim=-1)
            others = moved[[token for token in range(len(moved)) if token != _TOKEN]]
            room = 16 * torch.finfo(before.dtype).eps * size
            if float(others.max()) > room:
                problems[site] = f"what its projection in layer {layer} adds to one token changes other tokens"
            elif not moved[_TOKEN] > 0:
                problems[site] = f"its projection in layer {layer} adds nothing to the residual stream"
        return problems

    def _same_streams(self, *, other_first: bool) -> list[tuple[HookSite, Hook]]:
        """Hooks that give every block the same stream in all rows; with another first token in row 1 if asked."""

        def same(layer: int, stream: Tensor) -> Tensor:
            rows = stream[:1].expand_as(stream).clone()
            if other_first:
                draw = torch.randn(rows.shape[-1], generator=torch.Generator().manual_seed(layer)).to(rows)
                rows[1, 0] = draw * rows[0].std()
            return rows

        return [(HookSite(block, "input"), partial(same, layer)) for layer, block in enumerate(self._blocks)]

    def _watch_mixing(self) -> Iterator[tuple[HookSite, Hook]]:
        """Hooks that note whether the input of a linear map at the last token depends on the first token."""

        def note(layer: int, module: nn.Module, value: Tensor) -> None:
            rows = value.reshape(*self._shape, value.shape[-1])
            difference = float((rows[1, -1] - rows[0, -1]).abs().max())
            if difference > 8 * torch.finfo(rows.dtype).eps * float(rows[0, -1].abs().max()):
                self._mixing[layer].add(id(module))

        for layer, linear in enumerate(self._linear):
            for module, _ in linear:
                yield HookSite(module, "input"), partial(note, layer, module)


def _linear_onto(block: nn.Module, width: int, seen: _Seen) -> Iterator[tuple[nn.Module, int]]:
    """The linear maps from any width onto the stream that run once in a block on all tokens, and their input widths."""
    own = {id(module) for module in block.modules()}
    n_tokens = seen.inputs[block].shape[0] * seen.inputs[block].shape[1]
    listed = [module for module in seen.order if id(module) in own and module is not block]
    # An adapter layer of peft contains the layer that it adapts.
    inner = {id(part) for module in listed if _sizes(module) for part in module.modules() if part is not module}
    for module in listed:
        sizes = _sizes(module)
        if sizes is None or id(module) in inner or sizes[1] != width or module not in seen.inputs:
            continue
        if listed.count(module) == 1 and seen.inputs[module].numel() == n_tokens * sizes[0]:
            yield module, sizes[0]


def _sizes(module: Any) -> tuple[int, int] | None:
    """The widths of the input and output of a linear module (also Conv1D); None for other modules."""
    for names in (("in_features", "out_features"), ("nx", "nf")):
        inside, outside = (getattr(module, name, None) for name in names)
        if isinstance(inside, int) and isinstance(outside, int):
            return inside, outside
    return None
