"""The sites that a model has, and their widths, measured in a run on one token."""

from functools import partial

import torch
from torch import Tensor

from rmtension._sites import SITES
from rmtension.bodies._bodies import Body
from rmtension.bodies._hooks import Hook, HookSite, InstalledHooks
from rmtension.bodies._native_run import probe_batch
from rmtension.errors import ModelError


def measure_sites(
    body: Body, n_layers: int, device: torch.device
) -> tuple[dict[str, int], dict[str, ModelError], bool]:
    """The channels per layer of every site, the error for every missing site, and whether every layer runs once.

    The widths are measured in a run on one token, because some configs do not contain them (OPT).
    """
    shapes: dict[tuple[str, int], int] = {}
    missing: dict[str, ModelError] = {}
    hooks: list[tuple[HookSite, Hook]] = []
    projected = [name for name, site in SITES.items() if site.factor_of is None]

    runs_once = True

    def record(site: str, layer: int, activation: Tensor) -> None:
        nonlocal runs_once
        runs_once &= (site, layer) not in shapes
        shapes[site, layer] = activation.numel()

    for name in projected:
        try:
            hook_sites = [
                (hook_site, partial(record, name, layer))
                for layer in range(n_layers)
                for hook_site in body.hook_sites(name, layer)
            ]
        except ModelError as error:
            missing[name] = error
        else:
            hooks += hook_sites
    try:
        with InstalledHooks(hooks), torch.no_grad():
            body.residual(probe_batch(1, device))
    except Exception as error:  # a wrong conversion may raise anything
        raise ModelError(
            f"model: this {type(body.module).__name__} does not run ({type(error).__name__}: {error}). If you opened "
            "it with process_weights or as a HookedTransformer, try dtype=torch.float32, or open it without them."
        ) from error
    width_of = {}
    for name in set(projected) - set(missing):
        widths = {shapes.get((name, layer)) for layer in range(n_layers)}
        silent = [layer for layer in range(n_layers) if (name, layer) not in shapes]
        if silent:
            missing[name] = ModelError(
                f"site {name!r}: hooks on the projection of layer {silent[0]} do not fire, because the model does not "
                "call it as a module. If a module's forward was replaced, restore it (`del module.forward`), and open "
                "the model again."
            )
        elif len(widths) > 1:
            missing[name] = ModelError(
                f"site {name!r}: expected the same width in all {n_layers} layers, got {widths}. Use another site."
            )
        else:
            width_of[name] = shapes[name, 0]
    # Last, because finding these sites runs the model, and it is now known that the model runs.
    for name, site in SITES.items():
        if site.factor_of in missing:
            missing[name] = ModelError(
                f"site {name!r} has the neurons of {site.factor_of!r}. {missing[site.factor_of]}"
            )
        elif site.factor_of is not None:
            try:
                _ = [body.hook_sites(name, layer) for layer in range(n_layers)]
                width_of[name] = width_of[site.factor_of]
            except ModelError as error:
                missing[name] = error
    return width_of, missing, runs_once
