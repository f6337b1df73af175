"""One forward and backward run of a batch, which all first-order attribution methods share."""

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from functools import cached_property, partial
from types import MappingProxyType

import torch
from jaxtyping import Float
from torch import Tensor

from rmtension.attribution._relevance import RelevanceRules
from rmtension.bodies._hooks import Hook, HookSite, InstalledHooks
from rmtension.bodies._run_modes import frozen
from rmtension.data._token_places import TokenPlaces
from rmtension.data._tokens import TokenBatch, margins
from rmtension.errors import ModelError
from rmtension.models._direct_path import DirectContributions, DirectPaths
from rmtension.models._replay import Replay
from rmtension.models._reward_model import RewardModel

SiteLayer = tuple[str, int]  # site and layer


class BatchRun:
    """Activations at some sites in all layers, the gradients of each pair's margin with respect to them, direct paths.

    Cost: one forward pass; with `gradients` one backward pass, with `drops` one more per layer, for each of `relevance`
    one more forward and backward pass. Pairs do not interact, so one backward pass of the summed margins gives every
    pair's own gradient.

    Args:
        head: the model.
        batch: both texts of some pairs.
        sites: the sites whose activations are kept.
        forward: run the batch now; if False, nothing runs until `replay` is used.
        gradients: keep dM/da.
        drops: for each layer l, keep dM/da without the gradient through the block of l, in `dropped[l]` (GradDrop).
        relevance: keep dM/da by the rules of RelP, in `relevances[fixed]`, for every key `fixed` of the mapping,
            which says whether attention patterns are constant.
        direct: keep the contributions along direct paths.
        all_tokens: compute the last block's MLP at all tokens. If False, it is computed only at the tokens that rewards
            are read from; at all others the activations are 0, as their gradients are in any case.
    """

    def __init__(
        self,
        head: RewardModel,
        batch: TokenBatch,
        sites: Collection[str],
        *,
        forward: bool = True,
        gradients: bool = False,
        drops: bool = False,
        relevance: Mapping[bool, RelevanceRules] = MappingProxyType({}),
        direct: bool = False,
        all_tokens: bool = True,
    ) -> None:
        self.head = head
        self.batch = batch
        self.sites = tuple(sites)
        self.gradients: dict[SiteLayer, Float[Tensor, "row token channel"]] = {}
        self.dropped: list[dict[SiteLayer, Float[Tensor, "row token channel"]]] = []
        self.relevances: dict[bool, dict[SiteLayer, Float[Tensor, "row token channel"]]] = {}
        self.rewards: Float[Tensor, "text"] | None = None  # of a run that was differentiated
        self._seen: dict[SiteLayer, Tensor] = {}
        self._only_at: TokenPlaces | None = None
        self.activations: dict[SiteLayer, Float[Tensor, "row token channel"]] = {}
        self.direct: DirectContributions | None = None
        if not forward:
            return
        for fixed, rules in relevance.items():
            with rules.applied(fixed_attention=fixed):
                rewards = self._run(differentiated=True, all_tokens=all_tokens)
            self.relevances[fixed] = self._gradients(rewards, keep_graph=False)
        if not (relevance or gradients or drops or direct):
            head.observe(batch, self.sites, self._put)
            return
        paths = DirectPaths(head, batch) if direct else None
        gates = _BlockGates(head) if drops else None
        if gradients or drops or direct:
            more = (gates.hooks if gates else []) + (paths.hooks if paths else [])
            with gates.running() if gates else nullcontext():
                rewards = self._run(differentiated=gradients or drops, all_tokens=all_tokens, hooks=more)
            if gradients:
                self.gradients = self._gradients(rewards, keep_graph=drops)
            if gates is not None:
                for layer in range(head.n_layers):
                    with gates.closed(layer):
                        self.dropped.append(self._gradients(rewards, keep_graph=layer < head.n_layers - 1))
        self.direct = None if paths is None else paths.contributions()
        self.activations = {key: self._shaped(key, seen.detach()) for key, seen in self._seen.items()}
        self._seen = {}

    def _run(
        self, *, differentiated: bool, all_tokens: bool, hooks: Sequence[tuple[HookSite, Hook]] = ()
    ) -> Float[Tensor, "text"] | Float[Tensor, "row token d_model"]:
        """Run the batch, keep its activations, and return the rewards; the residual stream if not `differentiated`."""
        head = self.head
        keep = self._keep_in_graph if differentiated else self._keep
        kept: list[tuple[HookSite, Hook]] = [
            (hook_site, partial(keep, site, layer))
            for site in self.sites
            for layer in range(head.n_layers)
            for hook_site in head.body.hook_sites(site, layer)
        ]
        # The caller may be under no_grad.
        with (
            torch.set_grad_enabled(differentiated),
            frozen(head.body.modules()),
            nullcontext() if all_tokens else head.last_mlp_where_read(self.batch) as self._only_at,
            InstalledHooks([*kept, *hooks]),
        ):
            if not differentiated:
                return head.residual(self.batch)
            rewards = head.forward(self.batch)
            self.rewards = rewards.detach()
            return rewards

    @cached_property
    def replay(self) -> Replay:
        """The same batch, ready to run again from any layer. Cost: one forward pass."""
        return Replay(self.head, self.batch, self.sites)

    def _put(self, site: str, layer: int, activation: Tensor) -> None:
        self.activations[site, layer] = activation

    def _keep(self, site: str, layer: int, activation: Tensor) -> None:
        self._seen[site, layer] = activation

    def _keep_in_graph(self, site: str, layer: int, activation: Tensor) -> Tensor:
        # The first activation starts the graph, even if all parameters are frozen; later ones are already part of it.
        self._seen[site, layer] = activation if activation.requires_grad else activation.detach().requires_grad_(True)
        return self._seen[site, layer]

    def _gradients(self, rewards: Tensor, *, keep_graph: bool) -> dict[SiteLayer, Tensor]:
        # With a block dropped, an activation may not reach the margin at all: its gradient is then 0.
        gradients = torch.autograd.grad(
            margins(rewards).sum(),
            list(self._seen.values()),
            retain_graph=keep_graph,
            allow_unused=True,
            materialize_grads=True,
        )
        return {key: self._shaped(key, gradient) for key, gradient in zip(self._seen, gradients, strict=True)}

    def _shaped(self, key: SiteLayer, values: Tensor) -> Tensor:
        site, layer = key
        if self._only_at is not None and layer == self.head.n_layers - 1 and site != "attn_head":
            return self.batch.scatter(self._only_at, values.reshape(len(self._only_at), -1))
        return values.reshape(*self.batch.input_ids.shape, -1)


class _BlockGates:
    """Stops the gradient through what one block adds to the residual stream; forward passes change by rounding."""

    def __init__(self, head: RewardModel) -> None:
        if head.body.native is not None and not head.body.runs_native:
            raise ModelError(
                "graddrop: hooks on head.model make the TransformerLens bridge run in place of transformers' modules, "
                "and GradDrop needs those modules. Remove the hooks from head.model first."
            )
        modules = [*(head.body.block(layer) for layer in range(head.n_layers)), head.body.final_norm]
        self._closed: int | None = None
        self._before: Tensor | None = None
        self.hooks: list[tuple[HookSite, Hook]] = [
            (HookSite(module, "input"), partial(self._split, number - 1)) for number, module in enumerate(modules)
        ]

    @contextmanager
    def running(self) -> Iterator[None]:
        """The context of the forward pass; on exit it releases the graph.

        Hooks of the graph refer to this object. If it still held a tensor of the graph, that would be a reference cycle
        that the garbage collector cannot see.
        """
        try:
            yield
        finally:
            self._before = None

    @contextmanager
    def closed(self, layer: int) -> Iterator[None]:
        """Within this context, backward passes leave out what the block of `layer` adds."""
        self._closed = layer
        try:
            yield
        finally:
            self._closed = None

    def _split(self, layer: int, stream: Tensor) -> Tensor:
        """The stream after the block of `layer`, as the stream before it plus what the block added."""
        # The stream before the first block is the embedding, which some families pass through the final norm.
        before = None if layer < 0 else self._before
        if before is not None and stream.requires_grad:
            added = stream - before
            gate = partial(self._pass, layer)
            added.register_hook(gate)  # type: ignore[no-untyped-call]
            stream = before + added
        self._before = stream
        return stream

    def _pass(self, layer: int, gradient: Tensor) -> Tensor:
        return torch.zeros_like(gradient) if self._closed == layer else gradient
