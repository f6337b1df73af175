"""Figures of confidence: centred rewards, and margins on all pairs and on pairs that all models rank correctly."""

from itertools import product
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from rmtension.errors import OptionError
from rmtension.plots._drawing import Canvas, colours, name_rows, readable, row_height, series
from rmtension.plots._rows import Rows, Source, sized

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_UNITS = {
    "margin": "mean margin (each model's own reward units)",
    "margin_in_spreads": "mean margin (standard deviations of the model's rewards)",
    "probability": "mean probability of the chosen response by the model's own margin",
}
_RESPONSES = ("chosen", "rejected")
_PAIRS = ("all", "all models correct")
_BINS = 30


def confidence(
    table: Source,
    ax: "Axes | None" = None,
    *,
    quantity: str = "margin_in_spreads",
    family: str | None = None,
    level: float | None = None,
) -> "Figure":
    """Mean margins on all pairs, and on the pairs that all models rank correctly. Draws `StudyResult.confidence`.

    `quantity` is "margin_in_spreads" (comparable between models), "margin" or "probability".

    Examples:
        >>> from rmtension import StudyOptions, TensionStudy
        >>> models = dict.fromkeys(("helpful", "harmless", "mixed"), head)
        >>> result = TensionStudy(models, pairs, options=StudyOptions(analyses=("confidence",))).run(progress=False)
        >>> confidence(result).axes[0].get_xlabel()
        "mean margin (standard deviations of the model's rewards)"
    """
    columns = ("model", "objective", "pairs", "quantity", "value", "low", "high")
    rows = Rows.of(table, "confidence", columns, family=family, level=level).where(quantity=quantity)
    means = rows.means(("model", "objective", "pairs"))
    groups = means[["objective", "pairs"]].drop_duplicates()
    canvas = Canvas.of(ax, height=row_height(len(groups), means["model"].nunique()))
    axes = canvas.panels[0]
    shown = series(axes, means, ("objective", "pairs"), "model")
    names = zip(shown["objective"], shown["pairs"].replace("all", "all pairs"), shown["n"], strict=True)
    name_rows(axes, [sized(f"{objective}: {pairs}", n) for objective, pairs, n in names])
    axes.axvline(0.5 if quantity == "probability" else 0, color="black", linewidth=0.8)
    axes.set_xlabel(_UNITS.get(quantity, readable(quantity)))
    return canvas.finish(rows.title("Margins of the models by objective and pairs"))


def distributions(
    table: Source,
    ax: "Axes | None" = None,
    *,
    model: str | None = None,
    objective: str | None = None,
    pairs: str = "all",
    family: str | None = None,
) -> "Figure":
    """Histograms of the centred rewards of chosen and rejected responses, with one panel per model and objective.

    Draws `StudyResult.rewards`. `pairs` is "all" or "all models correct". Filled bars show all seeds together, lines
    single seeds. An `ax` holds one panel: select it with `model` and `objective`.

    Examples:
        >>> from rmtension.evaluation import centred_rewards
        >>> table = centred_rewards({"mixed": scored}).assign(objective="helpful")
        >>> distributions(table).axes[0].get_title()
        'mixed on helpful (n = 24)'
    """
    if pairs not in _PAIRS:
        raise OptionError(f"pairs: expected one of {list(_PAIRS)}, got {pairs!r}.")
    columns = ("model", "objective", "chosen", "rejected", *(["all_correct"] if pairs != "all" else []))
    rows = Rows.of(table, "rewards", columns, family=family).where(model=model, objective=objective)
    frame = rows.frame if pairs == "all" else rows.frame[rows.frame["all_correct"].astype(bool)]
    if frame.empty:
        raise OptionError(
            "pairs: expected at least one pair that all models rank correctly, got none. Use pairs='all'."
        )
    models, objectives = rows.names("model"), rows.names("objective")
    shown = list(product(objectives, models))
    canvas = Canvas.of(ax, len(shown), height=2.2, columns=len(models), choose="model= and objective=")
    names = []
    for number, (axes, (on, name)) in enumerate(zip(canvas.panels, shown, strict=True)):
        # One scale per model, because each model has its own reward units.
        whole = rows.frame.loc[rows.frame["model"] == name, list(_RESPONSES)].to_numpy()
        part = frame[(frame["model"] == name) & (frame["objective"] == on)]
        _histograms(axes, part, np.linspace(whole.min(), whole.max() + 1e-9, _BINS + 1))
        axes.axvline(0, color="black", linewidth=0.7, linestyle=":")
        if canvas.left(number):
            axes.set_ylabel("share of responses")
        if canvas.bottom(number):
            axes.set_xlabel("centred reward (model's units)")
        sizes = part.groupby("seed").size()
        names.append(sized(f"{name} on {on}", (int(sizes.min()), int(sizes.max())) if len(sizes) else (0, 0)))
    what = "all pairs" if pairs == "all" else "pairs that all models rank correctly"
    title = rows.title(
        f"Centred rewards of chosen and rejected responses, {what}",
        seeds="filled: {} seeds together; lines: single seeds",
        intervals="",
    )
    return canvas.finish(title, names)


def _histograms(axes: "Axes", frame: pd.DataFrame, edges: np.ndarray) -> None:
    """Draw the shares of chosen and rejected responses per bin, and outlines per seed if there are several."""
    seeds = [part for _, part in frame.groupby("seed")]
    for kind in _RESPONSES:
        parts = [frame, *(seeds if len(seeds) > 1 else [])]
        for number, rewards in enumerate(part[kind].to_numpy() for part in parts if len(part)):
            style: dict[str, Any] = (
                {"histtype": "step", "linewidth": 0.7, "label": f"_{kind} of a seed"}
                if number
                else {"alpha": 0.55, "label": kind}
            )
            shares = np.full(len(rewards), 1 / len(rewards))
            axes.hist(rewards, bins=edges, weights=shares, color=colours([])[kind], **style)  # type: ignore[arg-type]
