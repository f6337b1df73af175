"""Runs the upper layers of a model again, from a layer on, without running the layers below."""

from collections.abc import Sequence
from functools import cached_property, partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from rmtension.bodies._hooks import Call, Hook, HookSite, InstalledHooks, all_fire, recorded_calls
from rmtension.bodies._run_modes import eager_eval
from rmtension.data._token_places import TokenPlaces
from rmtension.data._tokens import TokenBatch, running
from rmtension.errors import ModelError
from rmtension.models._reward_model import RewardModel


class Replay:
    """A batch that a model has run, with the residual streams needed to run its upper layers again.

    Cost: one forward pass; `rewards_from(layer)` then costs the blocks from `layer` on and the final norm, with their
    hooks. Memory: the residual stream before every block, and the activations of `sites`.

    Only transformers' own modules can run one by one. `is_partial` is False if other modules run (a HookedTransformer,
    a bridge that the user hooked), if a block runs more than once, if blocks exchange values through a shared argument
    (Gemma-4's keys and values), or if there is no final norm. Then `rewards_from` runs the whole model, and accepts no
    other stream.

    Args:
        head: the model.
        batch: the texts.
        sites: the sites whose activations are kept in `activations[site, layer]`, [row, token, channel].
    """

    def __init__(self, head: RewardModel, batch: TokenBatch, sites: Sequence[str] = ()) -> None:
        self.head = head
        self.batch = batch
        self.is_partial = head.body.runs_native
        self.activations: dict[tuple[str, int], Float[Tensor, "row token channel"]] = {}
        self._streams: dict[int, Tensor] = {}
        self._blocks: list[nn.Module] = []
        n_runs = [0] * head.n_layers
        hooks: list[tuple[HookSite, Hook]] = [
            (hook_site, partial(self._keep, site, layer))
            for site in sites
            for layer in range(head.n_layers)
            for hook_site in head.body.hook_sites(site, layer)
        ]
        try:
            final_norm = head.body.final_norm if self.is_partial else None
        except ModelError:  # there is none that is known, so nothing can be read from a stream
            self.is_partial, final_norm = False, None
        if final_norm is not None:
            self._blocks = [head.body.block(layer) for layer in range(head.n_layers)]
            stream = [*self._blocks, final_norm]
            hooks += [
                (HookSite(module, "input"), partial(self._keep_stream, number, n_runs))
                for number, module in enumerate(stream)
            ]
        with InstalledHooks(hooks), recorded_calls(self._blocks) as calls, torch.no_grad():
            self.rewards: Float[Tensor, "text"] = head.forward(batch)
        # A block that runs twice per text cannot be replayed by running it once.
        self.is_partial = self.is_partial and n_runs == [1] * head.n_layers
        self._calls: list[Call] = [calls[block] for block in self._blocks]
        # Values that blocks exchange besides the stream would come from another run.
        self.is_partial = self.is_partial and all(_is_fixed((args, *named.values())) for args, named in self._calls)

    def stream(self, layer: int) -> Float[Tensor, "row token d_model"]:
        """The residual stream before the block of `layer`, or before the final norm at `n_layers`."""
        self._require_partial()
        return self._streams[layer]

    def rewards_from(
        self, layer: int, stream: Float[Tensor, "row token d_model"] | None = None
    ) -> Float[Tensor, "text"]:
        """The rewards when the blocks from `layer` on run on `stream`, by default the stream of the recorded run.

        They have gradients unless the caller disabled them.
        """
        if not self.is_partial and stream is None:
            return self.head.forward(self.batch)
        state = self.stream(layer) if stream is None else stream
        body = self.head.body
        modules, layers = list(body.modules()), range(layer, self.head.n_layers)
        with (
            running(self.batch),
            eager_eval(modules),
            all_fire(modules, layers),
            self.head.last_mlp_where_read(self.batch),
        ):
            for number in layers:
                state = self._run_block(number, state)
            return self.read(self.batch.gather(self.places, state))

    @cached_property
    def base(self) -> Float[Tensor, "text"]:
        """The rewards of the recorded run as `rewards_from` computes them, from whatever layer, to the bit.

        Cost: the last block, once; the whole model if it does not run block by block.
        """
        return self.rewards_from(self.head.n_layers - 1)

    def run_block(self, layer: int, stream: Float[Tensor, "row token d_model"]) -> Float[Tensor, "row token d_model"]:
        """The output of the block of `layer` for the input `stream`."""
        self._require_partial()
        modules = list(self.head.body.modules())
        with running(self.batch), eager_eval(modules), all_fire(modules, range(layer, layer + 1)):
            return self._run_block(layer, stream)

    @property
    def places(self) -> TokenPlaces:
        """The tokens that the head reads."""
        return self.head.require_head().tokens(self.batch)

    def read(self, states: Float[Tensor, "token d_model"]) -> Float[Tensor, "text"]:
        """The rewards from the residual stream after the last block, at `places`: final norm and head."""
        self._require_partial()
        return self.head.read_places(self.head.body.final_norm(states[:, None])[:, 0], self.places, self.batch)

    def read_many(self, states: Float[Tensor, "n token d_model"]) -> Float[Tensor, "n text"]:
        """`read` of several streams; all at once if the head reads the last token only."""
        self._require_partial()
        if not self.head.require_head().reads_last_only:
            return torch.stack([self.read(each) for each in states])
        flat = self.head.body.final_norm(states.flatten(0, 1)[:, None])[:, 0]
        return self.head.read(flat).view(len(states), -1)

    # -- inside ----------------------------------------------------------------------------------------------------

    def _run_block(self, layer: int, stream: Tensor) -> Tensor:
        args, kwargs = self._calls[layer]
        output: Any = self._blocks[layer](stream, *args[1:], **kwargs)
        result: Tensor = output[0] if isinstance(output, tuple) else output
        return result

    def _require_partial(self) -> None:
        if not self.is_partial:
            raise ModelError(
                "replay: only transformers' own modules run one by one. Open the model without model_class and "
                "process_weights, and remove your hooks from head.model."
            )

    def _keep(self, site: str, layer: int, activation: Tensor) -> None:
        self.activations[site, layer] = activation.detach().reshape(*self.batch.input_ids.shape, -1)

    def _keep_stream(self, number: int, n_runs: list[int], stream: Tensor) -> None:
        # If it runs several times, the last one counts: some families also run the final norm on the embedding.
        self._streams[number] = stream.detach()
        if number < len(n_runs):
            n_runs[number] += 1


def _is_fixed(value: object) -> bool:
    """Whether an argument is a value that a block cannot change in place to pass something on."""
    if isinstance(value, tuple):
        return all(map(_is_fixed, value))
    return value is None or isinstance(value, (Tensor, bool, int, float, str, torch.dtype))
