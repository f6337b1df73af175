"""Figures of faithfulness: every mark stands where the frames say, and what cannot be drawn is refused."""

import gc
import weakref
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from matplotlib import pyplot
from matplotlib.colors import same_color, to_rgba
from matplotlib.container import ErrorbarContainer
from matplotlib.figure import Figure

from rmtension import plots
from rmtension.attribution._faithfulness_result import Faithfulness
from rmtension.errors import OptionError
from rmtension.store._provenance import Provenance

METHODS = ("attribution patching", "direct_effect", "mean difference", "activation, absolute")
UNSIGNED = METHODS[-1]
N_LAYERS, WIDTH = 4, 15


def hand_made(*, decades=1, methods=METHODS, level=0.95, fractions=(0.05, 0.1, 0.3), n_random=3, layers=N_LAYERS):
    """A result with numbers from a generator, of magnitudes that span so many decades."""
    rng = np.random.default_rng(3)
    n = layers * WIDTH

    def effects():
        return rng.choice([-1, 1], n) * 0.02 * 10 ** rng.uniform(-decades, 0, n)

    neurons = pd.DataFrame(
        {"layer": np.repeat(range(layers), WIDTH), "neuron": np.tile(range(WIDTH), layers), "effect": effects()}
    )
    neurons["stderr"] = 0.001
    summary, sets = [], []
    for method in methods:
        neurons[method] = np.abs(effects()) if method == UNSIGNED else effects()
        row = {"method": method, "n": n, "top": 6}
        for name in ("spearman", "sign_agreement", "top_precision", "slope"):
            value = np.nan if name == "sign_agreement" and method == UNSIGNED else rng.uniform(-0.5, 0.5)
            row |= {
                name: value,
                f"{name}_low": value - rng.uniform(0, 0.4),
                f"{name}_high": value + rng.uniform(0, 0.4),
            }
        summary.append(row)
        for fraction in fractions:
            random = rng.normal(size=n_random) if n_random else [np.nan]
            row = {"method": method, "fraction": fraction, "size": round(fraction * 1000), "predicted": rng.normal()}
            row |= {"effect": rng.normal(), "n": 24, "random": np.mean(random), "n_random": n_random, "match": "layer"}
            row |= {"low": row["effect"] - rng.uniform(), "high": row["effect"] + rng.uniform()}
            sets.append(row | {"random_min": min(random), "random_max": max(random)})
    how = {"method": "effect of ablation", "replacement": "mean"}
    provenance = Provenance(
        "toy", "m", "mlp", "all", dtype="float64", data="a", n_pairs=24, n_tokens=640, version="0", **how
    )
    return Faithfulness(pd.DataFrame(summary), neurons, pd.DataFrame(sets), provenance, level)


def panels(figure):
    return [axes for axes in figure.axes if axes.get_visible()]


def labelled(axes):
    return {line.get_label(): line for line in axes.get_lines()}


def in_order(points):
    return points[np.lexsort(points.T)]


class TestScatter:
    @pytest.mark.parametrize("decades", [1, 4])
    def test_every_neuron_is_a_dot_in_the_colour_of_its_layer(self, decades):
        result = hand_made(decades=decades)
        figure = plots.faithfulness_scatter(result)
        assert len(panels(figure)) == len(METHODS)
        for method, axes in zip(METHODS, panels(figure), strict=True):
            (dots,) = axes.collections
            true = result.neurons["effect"].abs() if method == UNSIGNED else result.neurons["effect"]
            expected = np.column_stack([result.neurons[method], true])
            drawn = np.asarray(dots.get_offsets())
            assert in_order(drawn) == pytest.approx(in_order(expected), abs=0)
            marks = labelled(axes)
            layers = dict(zip(map(tuple, expected), result.neurons["layer"], strict=True))
            for dot, colour in zip(drawn, dots.get_facecolors(), strict=True):
                assert same_color(colour[:3], to_rgba(marks[f"layer {layers[tuple(dot)]}"].get_color())[:3])
            line = marks["predicted = true"]
            assert line.get_xdata() == pytest.approx(line.get_ydata())
            assert line.get_linestyle() == "--"
            # All dots are in view, and the line crosses the whole panel.
            (left, right), (low, high) = axes.get_xlim(), axes.get_ylim()
            assert left < drawn[:, 0].min() < drawn[:, 0].max() < right
            assert low < drawn[:, 1].min() < drawn[:, 1].max() < high
            assert min(line.get_xdata()) == min(left, low)
            assert max(line.get_xdata()) == max(right, high)

    def test_titles_have_measures_and_settings(self):
        result = hand_made(level=0.9)
        figure = plots.faithfulness_scatter(result)
        for row, axes in zip(result.summary.to_dict("records"), panels(figure), strict=True):
            text = " ".join(axes.get_title().split("\n"))
            interval = f"{row['spearman']:.2f} [{row['spearman_low']:.2f}, {row['spearman_high']:.2f}]"
            assert text == f"{row['method'].replace('_', ' ')} (n = 60) Spearman {interval}"
            assert max(map(len, axes.get_title().split("\n"))) <= 30
        first, second, third = figure.get_suptitle().split("\n")
        assert first == "Predicted and true effects of ablating single neurons: mlp"
        assert second == "Effect of ablation to mean, 24 pairs; 90% intervals over prompts"
        assert third == "Below 0: the neuron supports the margin; above 0: it opposes the margin"
        shown = [text.get_text() for text in figure.legends[0].get_texts()]
        assert shown == [*(f"layer {layer}" for layer in range(N_LAYERS)), "predicted = true"]

    def test_scales_are_logarithmic_if_magnitudes_span_decades(self):
        """Axes are symmetric-logarithmic if magnitudes span decades, and the label says so."""
        narrow, wide = (panels(plots.faithfulness_scatter(hand_made(decades=decades))) for decades in (1, 4))
        for axes in narrow:
            assert axes.get_xscale() == axes.get_yscale() == "linear"
        assert narrow[0].get_ylabel() == "true effect (reward units)"
        for axes in wide:
            assert axes.get_xscale() == axes.get_yscale() == "symlog"
            assert axes.xaxis.get_transform().linthresh == axes.yaxis.get_transform().linthresh == 1e-5
            for ticks, (low, high) in ((axes.get_xticks(), axes.get_xlim()), (axes.get_yticks(), axes.get_ylim())):
                assert (0 in ticks) == (low <= 0)
                assert len(ticks) >= 3
                assert ((ticks >= low) & (ticks <= high)).all()
        assert wide[0].get_ylabel() == "true effect (reward units)\nboth symmetric log beyond $\\pm10^{-5}$"
        assert len(wide[0].get_xticks()) < len(wide[0].get_yticks())

    def test_panels_of_different_quantities_have_their_own_labels(self):
        """The second row has unsigned scores below signed scores, so both have labels."""
        axes = panels(plots.faithfulness_scatter(hand_made()))
        assert [panel.get_xlabel() for panel in axes] == [
            "predicted effect (reward units)",
            "predicted effect (reward units)",
            "predicted effect (reward units)",
            "predicted |effect| (reward units)",
        ]
        effects = ["true effect (reward units)", "", "", "true |effect| (reward units)"]
        assert [panel.get_ylabel() for panel in axes] == effects
        last_two = panels(plots.faithfulness_scatter(hand_made(), methods=METHODS[2:]))
        assert [panel.get_ylabel() for panel in last_two] == [effects[0], effects[3]]

    def test_the_legend_of_a_deep_model_has_seven_layers(self):
        (axes,) = panels(plots.faithfulness_scatter(hand_made(layers=32, methods=METHODS[:1])))
        names = [name for name in labelled(axes) if name.startswith("layer")]
        assert (names[0], names[-1], len(names)) == ("layer 0", "layer 31", 7)
        assert len(np.unique(axes.collections[0].get_facecolors(), axis=0)) == 32

    @pytest.mark.parametrize("size", [0.0, 1e-9])
    def test_predictions_near_0_are_drawn_with_ticks(self, size, tmp_path):
        result = hand_made(decades=4)
        result.neurons[METHODS[0]] = size * np.sign(result.neurons[METHODS[0]])
        figure = plots.faithfulness_scatter(result)
        ticks = panels(figure)[0].get_xticks()
        assert 0 in ticks
        assert len(ticks) > 1
        figure.savefig(tmp_path / "flat.png", dpi=40)


class TestSets:
    def test_sets_show_effects_sums_and_random_sets(self):
        result = hand_made()
        figure = plots.faithfulness_sets(result)
        assert len(panels(figure)) == len(METHODS)
        for method, axes in zip(METHODS, panels(figure), strict=True):
            of_method = result.sets[result.sets["method"] == method]
            drawn, ranges = sorted(
                (container for container in axes.containers if isinstance(container, ErrorbarContainer)),
                key=lambda container: container.get_label() == "_random ranges",
            )
            assert np.array(ranges.lines[2][0].get_segments())[:, :, 1] == pytest.approx(
                of_method[["random_min", "random_max"]].to_numpy()
            )
            line, _, (bars,) = drawn.lines
            assert np.array(line.get_data()) == pytest.approx(of_method[["size", "effect"]].to_numpy().T)
            ends = np.array(bars.get_segments())
            assert ends[:, :, 1] == pytest.approx(of_method[["low", "high"]].to_numpy())
            assert (ends[:, :, 0] == of_method[["size"]].to_numpy()).all()
            marks = labelled(axes)
            dashed = marks["sum of predicted effects"]
            assert np.array(dashed.get_data()) == pytest.approx(of_method[["size", "predicted"]].to_numpy().T)
            assert dashed.get_linestyle() == "--"
            assert same_color(dashed.get_color(), line.get_color())
            # Scores without a sign are drawn with both signs.
            assert ("_turned" in marks) == (method == UNSIGNED)
            assert ("no direction: ± sum of magnitudes" in axes.get_title()) == (method == UNSIGNED)
            if method == UNSIGNED:
                assert marks["_turned"].get_ydata() == pytest.approx(-of_method["predicted"].to_numpy())
            assert np.array(marks["_random"].get_data()) == pytest.approx(of_method[["size", "random"]].to_numpy().T)
            band = next(
                collection for collection in axes.collections if str(collection.get_label()).startswith("random sets")
            )
            assert band.get_label() == "random sets: mean, smallest and largest of 3"
            assert same_color(band.get_facecolor()[0][:3], marks["_random"].get_color())
            corners = band.get_paths()[0].vertices
            for row in of_method.to_dict("records"):
                at = corners[corners[:, 0] == row["size"], 1]
                assert (at.min(), at.max()) == pytest.approx((row["random_min"], row["random_max"]))
            assert axes.get_xscale() == "log"
            assert axes.get_xticks().tolist() == [50, 100, 300]
            # The first panel has no tick labels, because there is a panel below it.
            names = [label.get_text() for label in axes.get_xticklabels()]
            assert names == ([] if method == METHODS[0] else ["50", "100", "300"])
            assert "(n = 24)" in axes.get_title()
        first, second = figure.get_suptitle().split("\n")
        assert first == "Effect of ablating top sets: mlp"
        assert second == "Effect of ablation to mean, 24 pairs; 95% intervals over prompts"

    def test_figures_without_random_sets_have_no_legend_of_them(self):
        figure = plots.faithfulness_sets(hand_made(n_random=0))
        shown = [text.get_text() for text in figure.legends[0].get_texts()]
        assert sorted(shown) == ["sum of predicted effects", "true effect"]

    def test_tick_labels_do_not_touch(self):
        figure = plots.faithfulness_sets(hand_made(fractions=np.linspace(0.01, 1, 40)))
        ticks = panels(figure)[0].get_xticks()
        assert ticks[0] == 10
        assert (ticks[1:] / ticks[:-1] >= 100**0.149).all()

    def test_sets_of_a_single_size_are_drawn(self, tmp_path):
        figure = plots.faithfulness_sets(hand_made(fractions=(0.1,)))
        assert panels(figure)[0].get_xticks().tolist() == [100]
        figure.savefig(tmp_path / "one.png", dpi=40)

    def test_results_without_sets_are_refused(self):
        result = replace(hand_made(), sets=pd.DataFrame())
        with pytest.raises(OptionError, match=r"result: expected sets.*other than OtherResponse\(\).*set_fractions="):
            plots.faithfulness_sets(result)
        assert panels(plots.faithfulness_scatter(result)), "neurons need no sets"


@pytest.mark.parametrize("draw", [plots.faithfulness_scatter, plots.faithfulness_sets])
class TestBoth:
    def test_methods_select_panels_and_their_order(self, draw):
        result = hand_made()
        chosen = [METHODS[2], METHODS[0], METHODS[2]]
        titles = [axes.get_title().split(" (")[0] for axes in panels(draw(result, methods=chosen))]
        assert titles == [METHODS[2], METHODS[0]]
        assert len(panels(draw(result, methods=METHODS[0]))) == 1
        for wrong in ("probe", ["probe", METHODS[0]]):
            with pytest.raises(
                OptionError, match=r"methods: expected some of \['attribution.*absolute'\], got \['prob"
            ):
                draw(result, methods=wrong)
        with pytest.raises(OptionError, match=r"methods: expected some of .* got \[\]"):
            draw(result, methods=[])

    def test_a_given_axis_gets_one_panel(self, draw):
        figure = Figure()
        axis = figure.add_subplot()
        assert draw(hand_made(), axis, methods=METHODS[0]) is figure
        assert figure.axes == [axis]
        assert axis.get_title()
        with pytest.raises(
            OptionError, match=r"ax: an axis holds one panel, and this figure has 4\. Select a panel with methods="
        ):
            draw(hand_made(), Figure().add_subplot())
        with pytest.raises(OptionError, match="ax: expected an axis with straight coordinates"):
            draw(hand_made(), Figure().add_subplot(projection="polar"), methods=METHODS[0])

    def test_figures_are_saved_and_pyplot_stays_closed(self, draw, tmp_path):
        result = hand_made(decades=4)
        before = {name: getattr(result, name).copy() for name in ("summary", "neurons", "sets")}
        figure = draw(result)
        for name in ("figure.png", "figure.pdf"):
            figure.savefig(tmp_path / name, dpi=50)
            assert (tmp_path / name).stat().st_size > 5000
        assert all(getattr(result, name).equals(frame) for name, frame in before.items())
        assert pyplot.get_fignums() == []
        gone = weakref.ref(figure)
        del figure
        gc.collect()
        assert gone() is None

    def test_loaded_results_draw_the_same_figure(self, draw, tmp_path):
        """A missing sign agreement, which marks scores without a sign, stays missing."""
        hand_made().save(tmp_path / "result.safetensors")
        back = Faithfulness.load(tmp_path / "result.safetensors")
        titles = [[axes.get_title() for axes in panels(draw(result))] for result in (back, hand_made())]
        assert titles[0] == titles[1]
        assert [axes.get_ylabel() for axes in panels(draw(back))][-1] in (
            "true |effect| (reward units)",
            "effect on the mean margin\n(reward units)",
        )
