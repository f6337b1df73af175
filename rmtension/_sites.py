"""Where a neuron is read and written, and at which tokens."""

from dataclasses import dataclass
from typing import Any, Literal, get_args

from einops import reduce
from jaxtyping import Float
from torch import Tensor, nn

from rmtension._arguments import require_choice
from rmtension.errors import ModelError, OptionError

SiteName = Literal["mlp", "mlp_gate", "attn_head"]
Positions = Literal["all", "response", "last"]


@dataclass(frozen=True)
class Site:
    """A place in every layer that holds one activation per neuron.

    `hook` is TransformerLens' name, below a block, of the input of the projection that the neurons go through. A neuron
    of the `mlp` site is one column of the input of the down projection; a neuron of the `attn_head` site is one head,
    `d_head` columns of the input of the output projection. A column is called a channel.

    The neurons of `mlp_gate` are those of `mlp`, and go through the same projection. A gated MLP multiplies two numbers
    for each, act(gate) * up: the site is the first of them, and `factor_of` names their product. Where nothing is
    multiplied, both are the same place.

    Examples:
        >>> find_site("mlp").hook_name(3)
        'blocks.3.mlp.hook_post'
    """

    name: SiteName
    hook: str
    factor_of: SiteName | None = None

    def hook_name(self, layer: int) -> str:
        """TransformerLens' name of the hook point on the projection's input in `layer`."""
        return f"blocks.{layer}.{self.hook}"

    def hook_point(self, model: Any, layer: int) -> nn.Module:
        """The hook point on the projection's input in `layer`; raises `ModelError` where the model has none."""
        name = self.hook_name(layer)
        if name in model.hook_dict:
            point: nn.Module = model.hook_dict[name]
            return point
        why = f"this model has no hook point {name!r}."
        if self.hook.startswith("mlp"):
            if getattr(model.cfg, "attn_only", False):
                why = "this model has attention alone (attn_only) and no MLP. Use site 'attn_head'."
            elif getattr(model.cfg, "num_experts", None):
                why = f"this model has no hook point {name!r}, because a mixture of experts has one for each expert."
        raise ModelError(f"site {self.name!r}: {why}")


SITES: dict[str, Site] = {
    "mlp": Site("mlp", "mlp.hook_post"),
    "mlp_gate": Site("mlp_gate", "mlp.hook_post", factor_of="mlp"),
    "attn_head": Site("attn_head", "attn.hook_z"),
}


def find_site(name: str) -> Site:
    """The site called `name`; raises `OptionError` with the known names otherwise."""
    require_choice("site", name, sorted(SITES))
    return SITES[name]


def check_positions(positions: str) -> None:
    """Raise `OptionError` unless `positions` is a known token selection."""
    if positions not in get_args(Positions):
        raise OptionError(
            f"positions: expected one of {list(get_args(Positions))}, got {positions!r}. 'all' are all real tokens, "
            "'response' those of the response, 'last' the one the reward is read from."
        )


def neuron_activations(
    channels: Float[Tensor, "row token channel"], site: str, n_neurons: int
) -> Float[Tensor, "row token neuron"]:
    """One number per neuron: the L2 norm of a head's channels for `attn_head`, the channel itself otherwise."""
    if find_site(site).name != "attn_head":
        return channels
    squares = reduce(channels.square(), "row token (head d_head) -> row token head", "sum", head=n_neurons)
    return squares.sqrt()
