"""Picture of what one model's neurons do to the margins of both objectives."""

from typing import TYPE_CHECKING, Any

from scipy import stats

from rmtension.neurons._conflict_report import CLASSES, OBJECTIVES, ConflictReport
from rmtension.plots._drawing import GREY, Canvas, readable

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Colour: with each other, against each other, or one objective alone. Direction: where the marker points.
_LOOKS = {
    "both up": ("#009E73", "^"),
    "both down": ("#009E73", "v"),
    "helpful up, harmless down": ("#CC79A7", "s"),
    "helpful down, harmless up": ("#CC79A7", "D"),
    "helpful only up": ("#0072B2", ">"),
    "helpful only down": ("#0072B2", "<"),
    "harmless only up": ("#D55E00", "^"),
    "harmless only down": ("#D55E00", "v"),
    "none": (GREY, "o"),
}


def conflict_scatter(report: ConflictReport, ax: "Axes | None" = None) -> "Figure":
    """Every neuron's contribution to helpful margins against that to harmless ones. From `neurons.conflict`.

    To the right and up: neurons that support the margins.

    Colours and markers: classes, with their numbers of neurons. Neurons of a class other than "none" have intervals at
    the report's level: Student's, over prompts.
    """
    canvas = Canvas.of(ax, height=4.6)
    axes = canvas.panels[0]
    reach = {
        one: stats.t.ppf((1 + report.cosine.level) / 2, report.n_prompts[one] - 1) * report.table[f"{one}_stderr"]
        for one in OBJECTIVES
    }
    counts = report.counts()
    for name in CLASSES.values():
        mine = report.table["class"] == name
        if not mine.any():
            continue
        color, marker = _LOOKS[name]
        x, y = (report.table.loc[mine, one].to_numpy() for one in OBJECTIVES)
        style: dict[str, Any] = {"linestyle": "", "marker": marker, "color": color, "label": f"{name} ({counts[name]})"}
        if name == "none":
            # Tens of thousands of points: pixels, also in a vector file.
            axes.errorbar(x, y, markersize=2.5, alpha=0.5, markeredgewidth=0, zorder=1, rasterized=True, **style)
        else:
            x_reach, y_reach = (reach[one][mine].to_numpy() for one in OBJECTIVES)
            axes.errorbar(x, y, xerr=x_reach, yerr=y_reach, markersize=5, elinewidth=0.7, zorder=3, **style)
    for line in (axes.axhline, axes.axvline):
        line(0, color="black", linewidth=0.8, zorder=2)
    x_label, y_label = (
        f"mean contribution to {one} margins (supports them \N{RIGHTWARDS ARROW})\n"
        f"(reward units; {report.n_pairs[one]} pairs of {report.n_prompts[one]} prompts)"
        for one in OBJECTIVES
    )
    axes.set(xlabel=x_label, ylabel=y_label)
    where, cosine = report.provenance["helpful"], report.cosine
    title = (
        f"Contributions to helpful and harmless margins: {readable(where.site)}, {readable(where.label)}\n"
        f"Cosine {cosine}; {100 * cosine.level:g}% intervals over prompts"
    )
    return canvas.finish(title)
