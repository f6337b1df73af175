"""The part of a reward model that runs, up to the final norm, and where its neurons are in it."""

from collections.abc import Iterator
from typing import Any

from jaxtyping import Float
from torch import Tensor, nn

from rmtension.errors import ModelError
from rmtension.hooks import InstalledHooks, Spot, count_foreign_hooks
from rmtension.sites import SITES, find_site
from rmtension.tokens import TokenBatch


class BridgeBody:
    """A TransformerBridge, with or without transformers' own modules beside it.

    A bridge computes attention step by step, so that every intermediate has a hook. `plain`, a twin of its base model
    that shares all parameters and buffers, computes what transformers computes: the rewards of the checkpoint to the
    last digit, faster. The twin runs while only this library has hooks; as soon as the user hooks the bridge, the
    bridge runs, so that those hooks count.
    """

    def __init__(self, bridge: nn.Module, plain: nn.Module | None = None, names: dict[int, str] | None = None) -> None:
        self.bridge = bridge
        self.module: nn.Module = self._base() if plain is None else plain
        self._plain = plain
        self._foreign = count_foreign_hooks(bridge)
        self._projections = {} if plain is None else _projections(bridge, plain, names or {})

    def residual(self, batch: TokenBatch) -> Float[Tensor, "text token d_model"]:
        """The residual stream after the final norm's gain; no vocabulary projection."""
        alone = self._plain is not None and count_foreign_hooks(self.bridge) == self._foreign
        base: Any = self._plain if alone else self._base()
        output: Tensor = base(input_ids=batch.input_ids, attention_mask=batch.mask.long(), use_cache=False)[0]
        return output

    def spots(self, site: str, layer: int) -> list[Spot]:
        """Every place where the activation of `site` in `layer` passes, whichever way the model runs."""
        point = _hook_point(self.bridge, site, layer)
        projection = self._projections.get((site, layer))
        return [Spot(point, "output")] + ([] if projection is None else [Spot(projection, "input")])

    def modules(self) -> Iterator[nn.Module]:
        """Every module that may run. A bridge keeps transformers' model outside its own list."""
        bridge: Any = self.bridge
        roots = [self.module, bridge, bridge.original_model]
        return iter({id(module): module for root in roots for module in root.modules()}.values())

    def _base(self) -> nn.Module:
        bridge: Any = self.bridge
        base: nn.Module = bridge.original_model.base_model
        return base


class HookedTransformerBody:
    """A HookedTransformer (TransformerLens 3.x)."""

    def __init__(self, model: nn.Module) -> None:
        cfg: Any = model.cfg
        if str(getattr(cfg, "normalization_type", "")).endswith("Pre"):
            raise ModelError(
                "model: the final norm of this HookedTransformer was folded into its unembedding, so that its residual "
                "stream lacks the norm's gain. Load it with HookedTransformer.from_pretrained_no_processing."
            )
        self.module = model

    def modules(self) -> Iterator[nn.Module]:
        """Every module that may run."""
        return self.module.modules()

    def residual(self, batch: TokenBatch) -> Float[Tensor, "text token d_model"]:
        """The residual stream after the final norm's gain; no unembedding."""
        captured: list[Tensor] = []
        model: Any = self.module
        with InstalledHooks([(Spot(model.ln_final, "output"), captured.append)]):
            # return_type=None leaves out the unembedding.
            model(batch.input_ids, attention_mask=batch.mask.long(), return_type=None)
        return captured[0]

    def spots(self, site: str, layer: int) -> list[Spot]:
        """The hook point of `site` in `layer`."""
        return [Spot(_hook_point(self.module, site, layer), "output")]


# What `RewardHead` asks of a model: `module` owns the parameters that run, `residual` runs it, `spots` finds neurons.
Body = BridgeBody | HookedTransformerBody


def find_body(model: nn.Module) -> Body:
    """The body of a model that the user hooked; raises `ModelError` for anything else."""
    if hasattr(model, "original_model"):
        return BridgeBody(model)
    if hasattr(model, "hook_dict") and hasattr(model, "cfg") and hasattr(model, "ln_final"):
        return HookedTransformerBody(model)
    raise ModelError(
        f"model: expected a TransformerBridge or a HookedTransformer, got {type(model).__name__}. Checkpoints are "
        "opened with RewardHead.from_pretrained."
    )


def _hook_point(model: Any, site: str, layer: int) -> nn.Module:
    name = find_site(site).hook_name(layer)
    if name not in model.hook_dict:
        raise ModelError(f"site {site!r}: this model has no hook point {name!r}.")
    point: nn.Module = model.hook_dict[name]
    return point


def _projections(bridge: Any, plain: nn.Module, names: dict[int, str]) -> dict[tuple[str, int], nn.Module]:
    """(site, layer) -> the module of `plain` whose input the bridge's hook point shows.

    `names` maps the id of each module of the bridged twin to its name, taken before bridging.
    """
    owners = {
        id(module.hook_in): module
        for module in bridge.modules()
        if isinstance(getattr(module, "hook_in", None), nn.Module)
    }
    found = {}
    for site in SITES:
        for layer in range(int(bridge.cfg.n_layers)):
            owner = owners.get(id(_hook_point(bridge, site, layer)))
            name = names.get(id(getattr(owner, "original_component", None)))
            if name is None:
                raise ModelError(
                    f"site {site!r}: layer {layer} has no projection of its own in {type(plain).__name__}."
                )
            found[site, layer] = plain.get_submodule(name)
    return found
