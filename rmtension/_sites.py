"""Sites (where in a layer neurons are read and written) and positions (at which tokens)."""

import re
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
from einops import reduce
from jaxtyping import Float, Int
from torch import Tensor, nn

from rmtension._arguments import require_choice
from rmtension.errors import ModelError, OptionError

SiteName = Literal["mlp", "mlp_gate", "attn_head", "expert"]
Positions = Literal["all", "response", "last"]


@dataclass(frozen=True)
class Site:
    """A point in every layer at which each neuron has an activation.

    `hook` is TransformerLens' name, within a block, of the input of the projection that reads the neurons. A neuron of
    the site `mlp` is one column of the down projection's input; a neuron of the site `attn_head` is one head, `d_head`
    columns of the output projection's input. A column is called a channel.

    The neurons of `mlp_gate` are those of `mlp`, read by the same projection. A gated MLP computes act(gate) * up for
    each neuron: the site `mlp_gate` is the first factor, and `factor_of` names the site of the product. In an MLP
    without a gate, both sites are the same.

    A neuron of the site `expert` is a hidden unit of one expert in a mixture of experts; neuron `expert * d_expert +
    index` is unit `index` of `expert`. TransformerLens has no hook point there, so its `hook` exists in no model.

    Examples:
        >>> site = find_site("mlp_gate")
        >>> site.hook_name(3), site.factor_of
        ('blocks.3.mlp.hook_post', 'mlp')
    """

    name: SiteName
    hook: str
    factor_of: SiteName | None = None

    def hook_name(self, layer: int) -> str:
        """TransformerLens' name of the hook point on the projection's input in `layer`."""
        return f"blocks.{layer}.{self.hook}"

    def hook_point(self, model: Any, layer: int) -> nn.Module:
        """The hook point on the projection's input in `layer`; raises `ModelError` if the model does not have it."""
        name = self.hook_name(layer)
        n_experts = getattr(model.cfg, "num_experts", None)
        if self.name == "expert":
            why = "has no hook point on the neurons of its experts" if n_experts else "is no mixture of experts"
            raise ModelError(
                f"site 'expert': this model of a TransformerLens class {why}. Use site 'attn_head', or open a "
                "checkpoint of transformers with RewardHead.from_pretrained."
            )
        if name in model.hook_dict:
            point: nn.Module = model.hook_dict[name]
            return point
        why = f"this model has no hook point {name!r}."
        if self.hook.startswith("mlp"):
            if getattr(model.cfg, "attn_only", False):
                why = "this model has only attention (attn_only) and no MLP. Use site 'attn_head'."
            elif n_experts:
                why = (
                    f"this model has no hook point {name!r}, because a mixture of experts has one per expert. Use site "
                    "'attn_head', or open a checkpoint of transformers (RewardHead.from_pretrained), which has site "
                    "'expert'."
                )
        raise ModelError(f"site {self.name!r}: {why}")


SITES: dict[str, Site] = {
    "mlp": Site("mlp", "mlp.hook_post"),
    "mlp_gate": Site("mlp_gate", "mlp.hook_post", factor_of="mlp"),
    "attn_head": Site("attn_head", "attn.hook_z"),
    "expert": Site("expert", "mlp.experts"),
}


# The part of `RewardModel.architecture` that has layers, experts per layer and neurons per expert.
_EXPERTS = re.compile(r"-\d+x(\d+)x(\d+)-")


def neuron_columns(
    site: str, architecture: str, layer: Int[np.ndarray, "neuron"], neuron: Int[np.ndarray, "neuron"]
) -> dict[str, Int[np.ndarray, "neuron"]]:
    """The columns of a table that say which neurons its rows are; at the site `expert` also expert and index in it.

    Examples:
        >>> neuron_columns("expert", "mixtral-2x4x16-heads4x8-d32", np.array([0, 1]), np.array([3, 35]))
        {'layer': array([0, 1]), 'neuron': array([ 3, 35]), 'expert': array([0, 2]), 'index': array([3, 3])}
        >>> neuron_columns("mlp", "gpt2-2x24-heads2x12-d24", np.array([1]), np.array([3]))
        {'layer': array([1]), 'neuron': array([3])}
    """
    columns = {"layer": layer, "neuron": neuron}
    shape = _EXPERTS.search(architecture) if site == "expert" else None
    if shape is not None:
        columns["expert"], columns["index"] = np.divmod(neuron, int(shape[2]))
    return columns


def all_neuron_columns(site: str, architecture: str, shape: tuple[int, int]) -> dict[str, Int[np.ndarray, "neuron"]]:
    """`neuron_columns` of all neurons of a model with `shape` (layers, neurons per layer), in order.

    Examples:
        >>> all_neuron_columns("mlp", "gpt2-2x2-heads2x12-d24", (2, 2))
        {'layer': array([0, 0, 1, 1]), 'neuron': array([0, 1, 0, 1])}
    """
    layers, neurons = shape
    return neuron_columns(
        site, architecture, np.repeat(np.arange(layers), neurons), np.tile(np.arange(neurons), layers)
    )


def neuron_name(site: str, layer: int, neuron: int, architecture: str) -> str:
    """The name of a neuron: "L2 N48", "L2 H3" for an attention head, "L2 E5 N48" for neuron 48 of expert 5.

    Examples:
        >>> neuron_name("expert", 1, 35, "mixtral-2x4x16-heads4x8-d32")
        'L1 E2 N3'
    """
    place = neuron_columns(site, architecture, np.array([layer]), np.array([neuron]))
    if "expert" in place:
        return f"L{layer} E{place['expert'][0]} N{place['index'][0]}"
    return f"L{layer} {'H' if site == 'attn_head' else 'N'}{neuron}"


def find_site(name: str) -> Site:
    """The site called `name`; raises `OptionError` with the known names otherwise.

    Examples:
        >>> find_site("attn_head").hook_name(0)
        'blocks.0.attn.hook_z'
    """
    require_choice("site", name, sorted(SITES))
    return SITES[name]


def check_positions(positions: str) -> None:
    """Raise `OptionError` unless `positions` is "all", "response" or "last".

    Examples:
        >>> check_positions("response")
    """
    if positions not in get_args(Positions):
        raise OptionError(
            f"positions: expected one of {list(get_args(Positions))}, got {positions!r}. 'all' selects all real "
            "tokens, 'response' those of the response, 'last' the token that the reward is read from."
        )


def neuron_activations(
    channels: Float[Tensor, "row token channel"], site: str, n_neurons: int
) -> Float[Tensor, "row token neuron"]:
    """The activation of each neuron: the L2 norm of a head's channels for `attn_head`, otherwise the channel itself.

    Examples:
        >>> import torch
        >>> neuron_activations(torch.tensor([[[3.0, 4.0, 0.0, 1.0]]]), "attn_head", n_neurons=2)
        tensor([[[5., 1.]]])
    """
    if find_site(site).name != "attn_head":
        return channels
    squares = reduce(channels.square(), "row token (head d_head) -> row token head", "sum", head=n_neurons)
    return squares.sqrt()
