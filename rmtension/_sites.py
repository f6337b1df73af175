"""Sites (where in a layer neurons are read and written) and positions (at which tokens)."""

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
    """A point in every layer at which each neuron has an activation.

    `hook` is TransformerLens' name, within a block, of the input of the projection that reads the neurons. A neuron of
    the site `mlp` is one column of the down projection's input; a neuron of the site `attn_head` is one head, `d_head`
    columns of the output projection's input. A column is called a channel.

    The neurons of `mlp_gate` are those of `mlp`, read by the same projection. A gated MLP computes act(gate) * up for
    each neuron: the site `mlp_gate` is the first factor, and `factor_of` names the site of the product. In an MLP
    without a gate, both sites are the same.

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
        if name in model.hook_dict:
            point: nn.Module = model.hook_dict[name]
            return point
        why = f"this model has no hook point {name!r}."
        if self.hook.startswith("mlp"):
            if getattr(model.cfg, "attn_only", False):
                why = "this model has only attention (attn_only) and no MLP. Use site 'attn_head'."
            elif getattr(model.cfg, "num_experts", None):
                why = (
                    f"this model has no hook point {name!r}, because a mixture of experts has one per expert. Use site "
                    "'attn_head'."
                )
        raise ModelError(f"site {self.name!r}: {why}")


SITES: dict[str, Site] = {
    "mlp": Site("mlp", "mlp.hook_post"),
    "mlp_gate": Site("mlp_gate", "mlp.hook_post", factor_of="mlp"),
    "attn_head": Site("attn_head", "attn.hook_z"),
}


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
