"""The direct path: what the embedding, every block and every neuron add to the reward through the residual stream.

With the scale of the final norm frozen at its value, the reward is linear in the residual stream, and the residual
stream is the sum of what was written to it. The parts below sum to the reward exactly. A neuron's part does not include
its effect through later blocks.
"""

from dataclasses import dataclass, replace
from functools import partial

import torch
from einops import reduce
from jaxtyping import Float
from torch import Tensor, nn

from rmtension._sites import find_site
from rmtension.bodies._experts import ExpertPoint
from rmtension.bodies._hooks import Hook, HookSite, InstalledHooks
from rmtension.bodies._norms import NormLayer, is_norm, read_norm
from rmtension.bodies._projections import Projection
from rmtension.data._tokens import TokenBatch
from rmtension.errors import ModelError
from rmtension.models._reward_model import RewardModel


@dataclass(frozen=True, eq=False)
class DirectContributions:
    """The parts of the reward of each text: `embedding + blocks.sum(1) + constant` is the reward.

    `constant` is what the biases of the final norm and of the head add. The parts are exact for a linear head. Another
    head is replaced by its gradient at the tokens that it reads, so its parts are first-order effects, and `constant`
    includes what the gradient leaves. `neurons` maps each site to the parts of its
    neurons, and `biases` has the parts of the biases of their output projections: in every layer, both sum to `blocks`.
    `mlp_gate` is left out, because its neurons are those of `mlp`. A site that some layers lack is not in `neurons`,
    nor is `expert` if the layers add more than their experts write (shared experts); only `blocks` has that part.

    Examples:
        >>> from rmtension.models import direct_contributions
        >>> from rmtension.data._tokens import TokenBatch
        >>> tokens = head.tokenizer(["Human: a Assistant: helpful-0 end"], return_tensors="pt")
        >>> batch = TokenBatch.from_rows(tokens["input_ids"], tokens["attention_mask"].bool())
        >>> parts = direct_contributions(head, batch)
        >>> parts.blocks.shape, parts.neurons["mlp"].shape
        (torch.Size([1, 2]), torch.Size([1, 2, 24]))
        >>> bool((parts.reward - head.rewards(batch)).abs() < 1e-4)
        True
    """

    embedding: Float[Tensor, "text"]
    blocks: Float[Tensor, "text layer"]
    constant: Float[Tensor, "text"]
    neurons: dict[str, Float[Tensor, "text layer neuron"]]
    biases: Float[Tensor, "text layer"]

    @property
    def reward(self) -> Float[Tensor, "text"]:
        """The sum of all parts."""
        return self.embedding + self.blocks.sum(dim=1) + self.constant


def direct_contributions(head: RewardModel, batch: TokenBatch) -> DirectContributions:
    """Split the rewards of a batch into direct contributions of the embedding, blocks and neurons, on the CPU.

    This is direct logit attribution with the reward head in place of the unembedding. Raises `ModelError` for a model
    without a reward, and for a model whose final norm is unknown. Cost: one forward pass, and one product with each
    projection.

    Examples:
        >>> from rmtension.data._tokens import TokenBatch
        >>> tokens = head.tokenizer(["Human: a Assistant: helpful-0 end"], return_tensors="pt")
        >>> batch = TokenBatch.from_rows(tokens["input_ids"], tokens["attention_mask"].bool())
        >>> parts = direct_contributions(head, batch)
        >>> layer, neuron = divmod(int(parts.neurons["mlp"][0].argmax()), head.n_neurons("mlp"))
        >>> bool(neurons.mask[layer, neuron])  # the neuron that adds most is one of the helpfulness neurons
        True
    """
    paths = DirectPaths(head, batch)
    with InstalledHooks(paths.hooks), torch.no_grad():
        head.residual(batch)
    return paths.contributions()


def _projections(head: RewardModel) -> dict[str, list[Projection]]:
    """Site -> the projection of every layer, in the modules that run."""
    if head.body.native is not None and not head.body.runs_native:
        raise ModelError(
            "direct_contributions: head.model has hooks that this library did not install, so the bridge runs instead "
            "of transformers' modules, whose activations are needed here. Remove those hooks first."
        )
    # The neurons of a factor are those of the product, and go through its projection.
    sites = [site for site in head.sites if find_site(site).factor_of is None and site != "expert"]
    return {site: [head.body.projection(site, layer) for layer in range(head.n_layers)] for site in sites}


class DirectPaths:
    """Records a run of `batch` and computes its direct paths: install `hooks`, run, then call `contributions`.

    Keeps inputs and outputs of modules at the tokens that the head reads, in the dtype of rewards.
    """

    def __init__(self, head: RewardModel, batch: TokenBatch) -> None:
        head.require_same_head()
        self._head = head
        self._batch = batch
        self._inside = _projections(head)
        self._places = head.require_head().tokens(batch)
        self._routing: dict[HookSite, Float[Tensor, "token expert"]] = {}
        if "expert" in head.sites:
            self._inside["expert"] = [self._of_experts(points[0]) for points in head.body.experts]
        self.seen: dict[HookSite, Float[Tensor, "token channel"]] = {}

    @property
    def hooks(self) -> list[tuple[HookSite, Hook]]:
        """The hooks to install for the run."""
        body = self._head.body
        blocks = [body.block(layer) for layer in range(self._head.n_layers)]
        norms = [module for block in blocks for module in block.modules() if is_norm(module)]
        # Streams and projections must be recorded; some norms of a block may not run for every text.
        hook_sites = [HookSite(block, "input", ("residual stream", layer)) for layer, block in enumerate(blocks)]
        hook_sites += [
            HookSite(body.final_norm, side, ("residual stream", len(blocks))) for side in ("input", "output")
        ]
        hook_sites += [HookSite(norm, side) for norm in norms for side in ("input", "output")]
        for site, layers in self._inside.items():
            for layer, projection in enumerate(layers):
                hook_sites += [replace(projection.read, place=(site, layer)), projection.written]
        return [(hook_site, partial(self._keep, hook_site)) for hook_site in dict.fromkeys(hook_sites)]

    @property
    def final_norm_seen(self) -> tuple[Float[Tensor, "token d_model"], Float[Tensor, "token d_model"]]:
        """The input and the output of the final norm in the run that was recorded."""
        norm = self._head.body.final_norm
        return self.seen[HookSite(norm, "input")], self.seen[HookSite(norm, "output")]

    @torch.no_grad()
    def contributions(self) -> DirectContributions:
        """The parts of the rewards of the run that was recorded."""
        head, body = self._head, self._head.body
        last_in, last_out = self.final_norm_seen
        norm = read_norm(body.final_norm, head.d_model).to(last_in)
        slope, constant = self._slope(last_out, norm)
        direction = norm.pull_back(slope, norm.sigma(last_in, last_out))
        stream = [self.seen[HookSite(body.block(layer), "input")] for layer in range(head.n_layers)] + [last_in]
        parts = self._per_text(
            torch.stack([(state.to(direction) * direction).sum(dim=-1) for state in stream], dim=1)
        ).cpu()
        # Where the stream is nearly orthogonal to the direction, the parts are smaller than the rounding of their sums.
        products = max(float((state.to(direction) * direction).norm(dim=-1).max()) for state in stream)
        rounding = 8 * torch.finfo(head.dtype).eps * products
        neurons: dict[str, list[Tensor]] = {site: [] for site in self._inside}
        biases = torch.zeros(len(parts), head.n_layers, dtype=last_in.dtype)
        bias_of = {site: torch.zeros_like(biases) for site in self._inside}
        for site, projections in self._inside.items():
            for layer, projection in enumerate(projections):
                per_channel, bias = self._through(projection, body.block(layer), direction)
                shape = "token (neuron channel) -> token neuron"
                per_neuron = reduce(per_channel, shape, "sum", neuron=head.n_neurons(site))
                neurons[site].append(self._per_text(per_neuron).cpu())
                bias_of[site][:, layer] = self._per_text(bias).cpu()
        blocks = parts.diff(dim=1)
        inside = sum((torch.stack(layers, dim=1).sum(dim=2) for layers in neurons.values()), torch.zeros_like(biases))
        inside = sum(bias_of.values(), inside)
        is_whole = set(neurons) == written_by(head)
        if is_whole and "expert" not in neurons:
            self._require_close("what its neurons write", inside, blocks, "its blocks add", parts, rounding)
        elif "expert" in neurons and not (is_whole and self._off(inside, blocks, parts, rounding) is None):
            del neurons["expert"], bias_of["expert"]
        biases = sum(bias_of.values(), biases)
        return DirectContributions(
            embedding=parts[:, 0],
            blocks=blocks,
            constant=constant.cpu(),
            neurons={site: torch.stack(layers, dim=1) for site, layers in neurons.items()},
            biases=biases,
        )

    def _slope(
        self, states: Float[Tensor, "token d_model"], norm: NormLayer
    ) -> tuple[Float[Tensor, "token d_model"], Float[Tensor, "text"]]:
        """The gradient of the rewards at the tokens that the head reads, and what it leaves of the rewards."""
        head = self._head
        if head.weight is not None:
            weight = head.weight.to(states)
            return weight.expand_as(states), (weight @ norm.bias + head.bias).expand(len(states))
        with torch.enable_grad():
            inputs = states.detach().clone().requires_grad_(True)
            rewards = head.read_places(inputs, self._places, self._batch)
            (slope,) = torch.autograd.grad(rewards.sum(), inputs)
        explained = self._per_text(((states - norm.bias) * slope).sum(dim=-1))
        return slope, rewards.detach() - explained

    def _per_text(self, values: Float[Tensor, "token *rest"]) -> Float[Tensor, "text *rest"]:
        """The sum over the tokens of each text."""
        if self._head.weight is not None:
            return values
        texts = self._places.texts.to(values.device)
        return values.new_zeros(len(self._batch.last), *values.shape[1:]).index_add(0, texts, values)

    def _keep(self, hook_site: HookSite, value: Tensor) -> None:
        n_rows, n_tokens = self._batch.input_ids.shape
        if value.numel() % (n_rows * n_tokens) or value.shape[0] not in (n_rows, n_rows * n_tokens):
            return  # a norm of single heads, which is not on the residual stream
        if isinstance(hook_site.module, ExpertPoint) and hook_site.module.routing is not None:
            routing = hook_site.module.routing.reshape(n_rows, n_tokens, -1)
            self._routing[hook_site] = self._batch.gather(self._places, routing)
        rows = value.detach().reshape(n_rows, n_tokens, -1)
        self.seen[hook_site] = self._batch.gather(self._places, rows).to(self._head.reward_dtype)

    def _of_experts(self, point: ExpertPoint) -> Projection:
        """The map from the neurons of experts to the residual stream, with the routing weights of the recorded run."""
        read, written = HookSite(point, "output"), HookSite(point.experts, "output")
        dtype = next(point.experts.parameters()).dtype
        return Projection(read, written, lambda channels: point.write(channels, self._routing[read]), dtype)

    def _off(
        self, computed: Tensor, expected: Tensor, summed: Tensor | None = None, rounding: float = 0.0
    ) -> Tensor | None:
        """How far two parts of the reward are from being equal; None if rounding explains the difference."""
        # Rounding grows with the size of the summands (norms may be float32 in a float64 model); an unknown factor is
        # off by a share of the sum.
        share = max(1e-4, torch.finfo(self._head.dtype).eps ** 0.5)
        lost, size = (computed - expected).abs().max(), expected.abs().max()
        return None if lost <= share * (size if summed is None else summed.abs().max()) + rounding else lost

    def _require_close(
        self,
        name: str,
        computed: Tensor,
        expected: Tensor,
        expected_name: str,
        summed: Tensor | None = None,
        rounding: float = 0.0,
    ) -> None:
        lost = self._off(computed, expected, summed, rounding)
        if lost is not None:
            size = expected.abs().max()
            raise ModelError(
                f"direct path of {self._head.architecture}: {name} is not what {expected_name} (off by "
                f"{float(lost):.2g}, of {float(size):.2g}), so this architecture scales or normalises it in an unknown "
                "way. Use attribution_patching or integrated_gradients."
            )

    def _through(
        self, projection: Projection, block: nn.Module, direction: Float[Tensor, "token d_model"]
    ) -> tuple[Float[Tensor, "token channel"], Float[Tensor, "token"]]:
        """What every input of `projection` adds along `direction`, and what its bias adds.

        Some families (Gemma-2, OLMo-2) apply a norm to the output of the projection before they add it to the stream.
        It is the first norm whose input is the projection's output, and its scale is frozen like that of the final one.
        """
        activation = self.seen[projection.read]
        computed = projection.apply(activation.to(projection.dtype)).to(activation)
        written = self.seen.get(projection.written, computed)
        # Otherwise a part that the weights do not compute would be taken for the bias.
        self._require_close("what the weights make of its neurons", computed, written, "comes out of the projection")
        room = 0.0 if written is not computed else 32 * torch.finfo(projection.dtype).eps * float(computed.abs().max())
        constant = torch.zeros_like(direction[:, 0]).to(written)
        direction = direction.to(written)
        for module in block.modules():
            came_in = self.seen.get(HookSite(module, "input")) if is_norm(module) else None
            if came_in is None or came_in.shape != written.shape:
                continue
            if (came_in - written).abs().max() <= room:
                norm = read_norm(module, written.shape[-1]).to(written)
                constant = (direction * norm.bias).sum(dim=-1)
                direction = norm.pull_back(direction, norm.sigma(written, self.seen[HookSite(module, "output")]))
                break  # a bridge wraps transformers' norm in its own: count it once
        with torch.enable_grad():
            inputs = activation.to(projection.dtype, copy=True).requires_grad_(True)
            # The gradient of a linear map is its transpose, however its module stores the weights.
            (slope,) = torch.autograd.grad((projection.apply(inputs).to(written) * direction).sum(), inputs)
        per_channel = activation * slope.to(activation)
        return per_channel, constant + (written * direction).sum(dim=-1) - per_channel.sum(dim=-1)


def written_by(head: RewardModel) -> set[str]:
    """The sites whose neurons and biases together write all that a block adds: attention, and the MLP if present."""
    if getattr(head.body.cfg, "attn_only", False):
        return {"attn_head"}
    # A mixture of experts may have a shared MLP besides.
    return {"attn_head", *({"mlp", "expert"}.intersection(head.sites) or {"mlp"})}
