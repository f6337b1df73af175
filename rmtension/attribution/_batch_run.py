"""One batch run once, forward and backward, for all the first-order methods that want to look at it."""

from collections.abc import Collection, Iterator
from contextlib import contextmanager, nullcontext
from functools import cached_property, partial

import torch
from jaxtyping import Float
from torch import Tensor

from rmtension.data._tokens import TokenBatch, margins
from rmtension.errors import ModelError
from rmtension.models._direct_path import DirectContributions, DirectPaths
from rmtension.models._hooks import Hook, HookSite, InstalledHooks, frozen
from rmtension.models._replay import Replay
from rmtension.models._reward_model import RewardModel

SiteLayer = tuple[str, int]  # site and layer


class BatchRun:
    """Activations of some sites in all layers, the gradient of each pair's margin to them, and direct paths.

    One forward pass; one backward pass with `gradients`, and one more for every layer with `drops`. Pairs do not
    interact, so that one backward pass of the summed margins holds every pair's own gradient.

    Args:
        head: the model.
        batch: both texts of some pairs.
        sites: what to keep activations of.
        forward: run the batch now; otherwise nothing runs before `replay` is asked for.
        gradients: keep dM/da.
        drops: keep dM/da again without what flows through each layer's block: `dropped[l]` (GradDrop).
        direct: keep the parts of direct paths.
        all_tokens: whether activations of the last block's MLP are wanted where no reward is read. Their gradient is 0
            there; without them, these activations are 0, and less runs.
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
        direct: bool = False,
        all_tokens: bool = True,
    ) -> None:
        self.head = head
        self.batch = batch
        self.sites = tuple(sites)
        self.gradients: dict[SiteLayer, Float[Tensor, "row token channel"]] = {}
        self.dropped: list[dict[SiteLayer, Float[Tensor, "row token channel"]]] = []
        self._seen: dict[SiteLayer, Tensor] = {}
        self._differentiated = gradients or drops
        self._only_last = False
        paths = DirectPaths(head, batch) if direct else None
        gates = _BlockGates(head) if drops else None
        hooks: list[tuple[HookSite, Hook]] = [
            (hook_site, partial(self._keep, site, layer))
            for site in self.sites
            for layer in range(head.n_layers)
            for hook_site in head.body.hook_sites(site, layer)
        ]
        self.activations: dict[SiteLayer, Float[Tensor, "row token channel"]] = {}
        self.direct: DirectContributions | None = None
        if not forward:
            return
        if not self._differentiated and not direct:
            head.observe(batch, self.sites, self._put)
            return
        # The caller may be under no_grad.
        with torch.set_grad_enabled(self._differentiated):
            with (
                frozen(head.body.modules()),
                nullcontext(False) if all_tokens else head.body.last_mlp_at_last_tokens(batch) as self._only_last,
                InstalledHooks(hooks + (gates.hooks if gates else [])),
                InstalledHooks(paths.hooks if paths else []),
                gates.running() if gates else nullcontext(),
            ):
                rewards = head.forward(batch) if self._differentiated else head.residual(batch)
            if gradients:
                self.gradients = self._gradients(rewards, keep_graph=drops)
            if gates is not None:
                for layer in range(head.n_layers):
                    with gates.closed(layer):
                        self.dropped.append(self._gradients(rewards, keep_graph=layer < head.n_layers - 1))
        self.direct = None if paths is None else paths.contributions()
        self.activations = {place: self._shaped(place, seen.detach()) for place, seen in self._seen.items()}
        self._seen = {}

    @cached_property
    def replay(self) -> Replay:
        """The same batch, ready to run again from any layer on; one more forward pass."""
        return Replay(self.head, self.batch, self.sites)

    def _put(self, site: str, layer: int, activation: Tensor) -> None:
        self.activations[site, layer] = activation

    def _keep(self, site: str, layer: int, activation: Tensor) -> Tensor | None:
        if not self._differentiated:
            self._seen[site, layer] = activation
            return None
        # The first place starts the graph, also where all parameters are frozen; later ones are already in it.
        self._seen[site, layer] = activation if activation.requires_grad else activation.detach().requires_grad_(True)
        return self._seen[site, layer]

    def _gradients(self, rewards: Tensor, *, keep_graph: bool) -> dict[SiteLayer, Tensor]:
        # Above a dropped block nothing of a place may be left: its gradient is 0.
        found = torch.autograd.grad(
            margins(rewards).sum(),
            list(self._seen.values()),
            retain_graph=keep_graph,
            allow_unused=True,
            materialize_grads=True,
        )
        return {place: self._shaped(place, gradient) for place, gradient in zip(self._seen, found, strict=True)}

    def _shaped(self, place: SiteLayer, values: Tensor) -> Tensor:
        site, layer = place
        if self._only_last and layer == self.head.n_layers - 1 and site != "attn_head":
            return self.batch.scatter_last(values.reshape(len(self.batch.last), -1))
        return values.reshape(*self.batch.input_ids.shape, -1)


class _BlockGates:
    """Lets no gradient through what one block adds to the residual stream; forward, nothing changes but rounding."""

    def __init__(self, head: RewardModel) -> None:
        if head.body.native is not None and not head.body.runs_native:
            raise ModelError(
                "graddrop: the bridge has hooks of yours, so that it runs in place of transformers' modules, which "
                "this looks into. Remove the hooks from head.model first."
            )
        modules = [*(head.body.block(layer) for layer in range(head.n_layers)), head.body.final_norm]
        self._closed: int | None = None
        self._before: Tensor | None = None
        self.hooks: list[tuple[HookSite, Hook]] = [
            (HookSite(module, "input"), partial(self._split, number - 1)) for number, module in enumerate(modules)
        ]

    @contextmanager
    def running(self) -> Iterator[None]:
        """For the forward pass; afterwards nothing is kept of its graph.

        The graph's hooks hold this object: together with a tensor of the graph that is a cycle no collector sees.
        """
        try:
            yield
        finally:
            self._before = None

    @contextmanager
    def closed(self, layer: int) -> Iterator[None]:
        """Backward passes in the meantime leave out what the block of `layer` adds."""
        self._closed = layer
        try:
            yield
        finally:
            self._closed = None

    def _split(self, layer: int, stream: Tensor) -> Tensor:
        """The stream after the block of `layer`, as the stream before it plus what the block added."""
        # What comes before the first block is no block's: an embedding, in some families through the final norm.
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
