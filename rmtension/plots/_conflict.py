"""Figure of the contributions of one model's neurons to the margins of two groups of pairs."""

from typing import TYPE_CHECKING, Any

from scipy import stats

from rmtension.neurons._conflict_report import ConflictReport, classes
from rmtension.plots._drawing import GREY, Canvas, as_text, readable

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# The colour tells whether a neuron moves both margins in the same direction, both in opposite directions, or only one;
# the marker points in the direction of the effect.
_LOOKS = {
    (1, 1): ("#009E73", "^"),
    (-1, -1): ("#009E73", "v"),
    (1, -1): ("#CC79A7", "s"),
    (-1, 1): ("#CC79A7", "D"),
    (1, 0): ("#0072B2", ">"),
    (-1, 0): ("#0072B2", "<"),
    (0, 1): ("#D55E00", "^"),
    (0, -1): ("#D55E00", "v"),
    (0, 0): (GREY, "o"),
}


def conflict_scatter(report: ConflictReport, ax: "Axes | None" = None) -> "Figure":
    """The contribution of every neuron to the margins of the second group against that to the margins of the first.

    Draws the `ConflictReport` of `neurons.conflict`. Neurons to the right and at the top support the margins. Colours
    and markers show the classes, with their numbers of neurons. Neurons of a class other than "none" have Student's
    intervals over prompts at the report's level.

    Examples:
        >>> from rmtension.neurons import conflict
        >>> attribution = NeuronAttribution(head, "gradient_x_activation")
        >>> report = conflict(*(attribution.per_pair(pairs[name]) for name in ("helpful", "harmless")))
        >>> print(conflict_scatter(report).get_suptitle().splitlines()[0])
        Contributions to helpful and harmless margins: mlp, gradient x activation
    """
    canvas = Canvas.of(ax, height=4.6)
    axes = canvas.panels[0]
    reach = {
        name: stats.t.ppf((1 + report.cosine.level) / 2, report.n_prompts[name] - 1) * report.table[f"{name}_stderr"]
        for name in report.names
    }
    counts = report.counts()
    for signs, name in classes(report.names).items():
        in_class = report.table["class"] == name
        if not in_class.any():
            continue
        color, marker = _LOOKS[signs]
        x, y = (report.table.loc[in_class, on].to_numpy() for on in report.names)
        style: dict[str, Any] = {
            "linestyle": "",
            "marker": marker,
            "color": color,
            "label": as_text(f"{name} ({counts[name]})"),
        }
        if name == "none":
            # There can be tens of thousands of points, so they are drawn as pixels even in a vector file.
            axes.errorbar(x, y, markersize=2.5, alpha=0.5, markeredgewidth=0, zorder=1, rasterized=True, **style)
        else:
            x_reach, y_reach = (reach[on][in_class].to_numpy() for on in report.names)
            axes.errorbar(x, y, xerr=x_reach, yerr=y_reach, markersize=5, elinewidth=0.7, zorder=3, **style)
    for line in (axes.axhline, axes.axvline):
        line(0, color="black", linewidth=0.8, zorder=2)
    x_label, y_label = (
        f"mean contribution to {as_text(on)} margins (supports them \N{RIGHTWARDS ARROW})\n"
        f"(reward units; {report.n_pairs[on]} pairs of {report.n_prompts[on]} prompts)"
        for on in report.names
    )
    axes.set(xlabel=x_label, ylabel=y_label)
    where, cosine = report.provenance[report.names[0]], report.cosine
    names = as_text(" and ".join(report.names))
    title = (
        f"Contributions to {names} margins: {readable(where.site)}, {readable(where.label)}\n"
        f"Cosine {cosine}; {100 * cosine.level:g}% intervals over prompts"
    )
    return canvas.finish(title)
