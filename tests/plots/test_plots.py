"""Figures show the numbers of the tables, which are computed again here, and refuse what they cannot draw."""

import subprocess
import sys

import numpy as np
import pandas as pd
import pytest
from hand_made import FRACTIONS, MODELS, OBJECTIVES, SCORES, SETS, SUBSETS, expected, hand_made
from matplotlib.collections import LineCollection
from matplotlib.colors import same_color
from matplotlib.container import BarContainer, ErrorbarContainer
from matplotlib.figure import Figure

from rmtension import StudyResult, plots
from rmtension.errors import OptionError
from rmtension.plots._drawing import colours
from rmtension.study._result import POOLED


@pytest.fixture(scope="module")
def study():
    return hand_made()


@pytest.fixture(scope="module")
def single():
    return hand_made(seeds=(0,))


# Every figure, with the arguments that select one panel, and a column that it needs.
DRAWN = {
    "accuracy": (plots.accuracy, {}, "measure"),
    "radar": (plots.radar, {}, "chance"),
    "refuse_respond": (plots.refuse_respond, {}, "high"),
    "comparisons": (plots.comparisons, {}, "difference"),
    "transferability": (plots.transferability, {}, "quantity"),
    "confidence": (plots.confidence, {}, "pairs"),
    "distributions": (plots.distributions, {"model": "mixed", "objective": "helpful"}, "chosen"),
    "depth": (plots.depth, {"score": "change"}, "late"),
    "overlap": (plots.overlap, {"score": "change"}, "layer_expected_jaccard"),
    "curves": (plots.curves, {"model": "mixed", "objective": "helpful"}, "before"),
    "matrix": (plots.matrix, {"objective": "harmless"}, "random_sd"),
    "equal_size": (plots.equal_size, {}, "size"),
    "collapse": (plots.collapse, {}, "retained_harmless_low"),
}
TABLE_OF = {"radar": "subsets", "refuse_respond": "accuracy", "distributions": "rewards", "matrix": "ablation"}


def table_of(study, name):
    return study.tables[TABLE_OF.get(name, name)]


def shown(axes, upright=False):
    """(value, low, high, row) of every dot with an interval, by the name of its series in the legend."""
    estimates = {}
    for container in axes.containers:
        if isinstance(container, ErrorbarContainer):
            line, _, bars = container.lines
            values, rows = (line.get_ydata(), line.get_xdata()) if upright else (line.get_xdata(), line.get_ydata())
            # A dot without an interval has a segment without points.
            segments = [
                segment[:, int(upright)] if len(segment) else [np.nan, np.nan]
                for segment in bars[int(upright)].get_segments()
            ]
            estimates[container.get_label()] = np.column_stack([values, np.array(segments), rows]).astype(float)
    return estimates


def faint(axes):
    """The points of single seeds, along the horizontal."""
    return sorted(x for line in axes.get_lines() if line.get_label() == "_seeds" for x in line.get_xdata())


def row_names(axes):
    return [label.get_text() for label in axes.get_yticklabels()]


class TestEveryFigure:
    @pytest.mark.parametrize("name", DRAWN)
    def test_draws_into_a_given_axis_and_returns_its_figure(self, study, single, name):
        draw, panel, _ = DRAWN[name]
        for source in (study, table_of(single, name).drop(columns=["family", "seed"])):
            figure = Figure()
            axis = figure.add_subplot(projection="polar" if name == "radar" else None)
            assert draw(source, axis, **panel) is figure
            assert figure.axes == [axis]
            assert axis.has_data()
            assert axis.get_title()
        own = draw(study)
        assert isinstance(own, Figure)
        assert own.get_suptitle()
        assert own.get_figwidth() == 8
        # A notebook shows the figure as a picture, even without pyplot.
        assert own._repr_png_().startswith(b"\x89PNG")

    @pytest.mark.parametrize("name", DRAWN)
    def test_missing_columns_and_empty_tables_are_refused(self, study, name):
        draw, panel, column = DRAWN[name]
        table = table_of(study, name)
        with pytest.raises(OptionError, match=rf"table: expected columns .*'{column}'"):
            draw(table.drop(columns=column), **panel)
        with pytest.raises(OptionError, match="got none"):
            draw(table.iloc[:0], **panel)
        with pytest.raises(OptionError, match="table: expected one of"):
            draw(StudyResult({}, study.summary), **panel)

    @pytest.mark.parametrize("name", DRAWN)
    def test_one_of_several_families_must_be_selected(self, study, name):
        draw, panel, _ = DRAWN[name]
        table = table_of(study, name)
        both = pd.concat([table.assign(family=7), table])
        with pytest.raises(OptionError, match=r"family: .* Select one with family"):
            draw(both, **panel)
        with pytest.raises(OptionError, match=r"family: expected one of \['7', 'tiny'\], got 'other'"):
            draw(both, family="other", **panel)
        axis = Figure().add_subplot(projection="polar" if name == "radar" else None)
        draw(both, axis, family="7", **panel)
        assert axis.get_title().startswith("7: ")

    @pytest.mark.parametrize("name", [name for name, (_, panel, _) in DRAWN.items() if panel])
    def test_an_axis_holds_one_panel(self, study, name):
        draw, panel, _ = DRAWN[name]
        with pytest.raises(OptionError, match=f"ax: an axis holds one panel.*{next(iter(panel))}="):
            draw(study, Figure().add_subplot())
        wrong = {next(iter(panel)): "nothing"}
        with pytest.raises(OptionError, match=r"expected one of .* got 'nothing'"):
            draw(study, **wrong)

    def test_titles_say_the_level_and_the_seeds(self, study, single):
        assert "Mean of 3 seeds, single seeds faint; 95% intervals" in plots.accuracy(study).get_suptitle()
        assert plots.accuracy(single).get_suptitle().endswith("\n95% intervals")
        at_90 = hand_made(level=0.9)
        assert "90% intervals" in plots.comparisons(at_90).get_suptitle()
        assert "90% intervals" in plots.accuracy(at_90.accuracy).get_suptitle(), "this table has its own level"
        assert "80% intervals" in plots.comparisons(study.comparisons, level=0.8).get_suptitle()
        with pytest.raises(OptionError, match=r"level: the intervals of this table are at 0.95, got 0.9"):
            plots.comparisons(study, level=0.9)
        with pytest.raises(OptionError, match="level"):
            plots.comparisons(study.comparisons, level=2.0)

    def test_axes_of_the_wrong_projection_are_refused(self, study):
        with pytest.raises(OptionError, match="ax: expected a polar axis"):
            plots.radar(study, Figure().add_subplot())
        with pytest.raises(OptionError, match="ax: expected an axis with straight coordinates"):
            plots.accuracy(study, Figure().add_subplot(projection="polar"))

    def test_figures_average_over_seeds_as_the_study_does(self, study):
        """`Rows.means` and `StudyResult.over_seeds` implement the same rule."""
        from rmtension.plots._rows import Rows

        for table in ("accuracy", "subsets", "comparisons", "confidence", "curves", "ablation"):
            keys, (columns, *_) = POOLED[table]
            means = Rows.of(study, table, ()).means(keys, *columns)
            pooled = study.over_seeds(table)
            assert means[["value", "low", "high"]].to_numpy() == pytest.approx(pooled[list(columns)].to_numpy())
            assert means[list(keys)].equals(pooled[list(keys)])

    def test_figures_can_be_saved(self, study, tmp_path):
        for name in ("radar", "transferability"):
            DRAWN[name][0](study).savefig(tmp_path / f"{name}.png", dpi=50)
            assert (tmp_path / f"{name}.png").stat().st_size > 5000

    @pytest.mark.grid
    def test_plots_import_no_matplotlib_and_refuse_paths(self):
        """In a process without the type checks of the suite."""
        code = "import sys, rmtension.plots as p; assert 'matplotlib' not in sys.modules; p.accuracy('folder')"
        ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        assert "OptionError: table: expected a StudyResult or its table 'accuracy', got str" in ran.stderr

    def test_every_name_has_its_own_colour(self):
        names = ["helpful", "other", "third"]
        palette = colours(names)
        assert palette["helpful"] == colours([])["helpful"]
        assert len({palette[name] for name in names}) == 3


class TestDots:
    """Figures of estimates in rows: dots, intervals and single seeds are compared with the formula."""

    @pytest.mark.parametrize("seeds", [(0,), (0, 1, 2)])
    def test_accuracy_draws_the_means_over_seeds(self, seeds):
        study = hand_made(seeds)
        (axes,) = plots.accuracy(study).axes
        table = study.accuracy.query("measure != 'margin'")
        names = row_names(axes)
        series = shown(axes)
        assert list(series) == [*MODELS, "length only"]
        assert sum(map(len, series.values())) == len(table) / len(seeds)
        for (model, on, measure), interval in expected(table, ("model", "objective", "measure"), share=True).items():
            row = names.index(f"{on}: {measure} (n = 90)")
            (dot,) = [dot for dot in series[model] if round(dot[3]) == row]
            assert dot[:3] == pytest.approx(interval)
        assert faint(axes) == pytest.approx(sorted(table["value"]) if len(seeds) > 1 else [])

    def test_a_table_of_margins_alone_has_no_accuracy(self, study):
        with pytest.raises(OptionError, match="margin"):
            plots.accuracy(study.accuracy.query("measure == 'margin'"))

    def test_comparisons_draw_the_differences(self, study):
        (axes,) = plots.comparisons(study).axes
        series = shown(axes)
        names = row_names(axes)
        table = study.comparisons
        for (second, on, subset), interval in expected(table, ("second", "objective", "subset"), "difference").items():
            row = names.index(f"{on}: {subset.replace('_', ' ')} (n = 45)")
            (dot,) = [dot for dot in series[f"mixed - {second}"] if round(dot[3]) == row]
            assert dot[:3] == pytest.approx(interval)
        assert faint(axes) == pytest.approx(sorted(table["difference"]))
        (axes,) = plots.comparisons(study, objective="harmless").axes
        assert len(row_names(axes)) == 3

    def test_names_with_dollar_signs_are_drawn_as_they_are(self, study):
        """matplotlib reads what is between two of them as a formula, and some formulas are errors."""
        name = "costs $5_{ or $6"
        table = study.comparisons.assign(subset=name, family=name)
        figure = plots.comparisons(pd.concat([table, table.assign(family="other")]), family=name)
        figure.canvas.draw()
        assert r"costs \$5" in figure.get_suptitle()
        assert all(r"costs \$5" in label.get_text() for label in figure.axes[0].get_yticklabels())

    def test_a_subset_called_none_survives_a_csv(self, study, tmp_path):
        table = study.comparisons.replace("chat", "None")
        table.to_csv(tmp_path / "table.csv", index=False)
        (axes,) = plots.comparisons(pd.read_csv(tmp_path / "table.csv")).axes
        assert "helpful: None (n = 45)" in row_names(axes)

    def test_transferability_draws_all_quantities(self, study):
        (axes,) = plots.transferability(study).axes
        series = shown(axes)
        assert row_names(axes)[:3] == ["transferability T", "accuracy of mixed", "T - accuracy"]
        for on in OBJECTIVES:
            part = study.transferability.query("objective == @on")
            estimates = [
                *expected(part.query("quantity != 'beyond accuracy'"), ("quantity",), share=True).values(),
                *expected(part.query("quantity == 'beyond accuracy'"), ("quantity",)).values(),
            ]
            estimates.insert(2, estimates.pop())
            assert series[f"on {on} pairs (n = 90)"][:, :3] == pytest.approx(np.array(estimates))

    @pytest.mark.parametrize("quantity", ["margin", "margin_in_spreads", "probability"])
    def test_confidence_draws_every_model(self, study, quantity):
        (axes,) = plots.confidence(study, quantity=quantity).axes
        table = study.confidence.query("quantity == @quantity")
        names = row_names(axes)
        assert "helpful: all models correct (n = 50-52)" in names
        assert "harmless: all pairs (n = 90)" in names
        for model in MODELS:
            part, share = table.query("model == @model"), quantity == "probability"
            estimates = list(expected(part, ("objective", "pairs"), share=share).values())
            assert shown(axes)[model][:, :3] == pytest.approx(np.array(estimates))
        with pytest.raises(OptionError, match="quantity: expected one of"):
            plots.confidence(study, quantity="reward")

    def test_confidence_is_drawn_if_no_pair_is_left(self, single):
        table = single.confidence.copy()
        table.loc[table["pairs"] != "all", ["value", "low", "high"]] = np.nan
        table.loc[table["pairs"] != "all", "n"] = 0
        (axes,) = plots.confidence(table).axes
        assert "helpful: all models correct (n = 0)" in row_names(axes)

    def test_equal_size_is_per_neuron(self, study):
        (axes,) = plots.equal_size(study, quantity="accuracy").axes
        table = study.equal_size.query("quantity == 'accuracy'").copy()
        for column in ("effect", "low", "high"):
            table[column] *= 1000 / table["size"]
        for on in OBJECTIVES:
            estimates = list(expected(table.query("objective == @on"), ("set",), "effect").values())
            assert shown(axes)[f"on {on} pairs (n = 90)"][:, :3] == pytest.approx(np.array(estimates))
        assert "7-9 neurons of each set" in plots.equal_size(study).get_suptitle()

    @pytest.mark.parametrize("quantity", ["margin", "accuracy"])
    def test_the_matrix_draws_effects_and_both_controls(self, study, quantity):
        figure = plots.matrix(study, quantity=quantity)
        table = study.ablation.query("quantity == @quantity")
        for on, axes in zip(OBJECTIVES, figure.axes, strict=True):
            assert axes.get_title() == f"{on} pairs (n = 90)"
            part = table.query("objective == @on")
            series = shown(axes)
            effects = part.query("control == 'layer'")
            assert series[f"set on {on}"][:, :3] == pytest.approx(
                np.array(list(expected(effects, ("set",), "effect").values()))
            )
            for control, label in (("layer", "random, by layer"), ("magnitude", "random, by layer and magnitude")):
                random = part[part["control"] == control].groupby("set", sort=False)
                mean = random[["random_effect", "random_sd"]].mean()
                estimates = np.column_stack(
                    [mean["random_effect"] + sign * 2 * mean["random_sd"] for sign in (0, -1, 1)]
                )
                assert series[label][:, :3] == pytest.approx(estimates)
        assert row_names(figure.axes[0])[0] == "helpful only\n(30-32)"
        with pytest.raises(OptionError, match="quantity: expected one of"):
            plots.matrix(study, quantity="reward")

    def test_sets_without_a_control_keep_their_effects(self, single):
        """Columns of the control are NaN where no matched random sets exist."""
        table = single.ablation.copy()
        table.loc[table["set"] == "shared", ["random_effect", "random_sd"]] = np.nan
        series = shown(plots.matrix(table).axes[0])
        assert np.isfinite(series["set on helpful"]).all()
        assert np.isnan(series["random, by layer"][2, 0])


class TestPlanes:
    def test_refuse_respond_draws_both_accuracies(self, study):
        (axes,) = plots.refuse_respond(study).axes
        table = study.accuracy.query("objective == 'harmless'")
        for model in MODELS:
            across, up = (
                expected(table.query("model == @model and measure == @measure"), ("model",), share=True)[model,]
                for measure in ("responding", "refusing")
            )
            assert shown(axes)[model][0, :3] == pytest.approx(across)
            assert shown(axes, upright=True)[model][0, :3] == pytest.approx(up)
        assert faint(axes) == pytest.approx(sorted(table.query("measure == 'responding'")["value"]))
        (line,) = [line for line in axes.get_lines() if line.get_label() == "all requests alike"]
        assert line.get_xydata().sum(axis=1) == pytest.approx([1, 1]), "refusing and responding add up to 1"
        table = study.accuracy.query("measure != 'refusing'")
        with pytest.raises(OptionError, match="expected the measures 'refusing' and 'responding'"):
            plots.refuse_respond(table)

    def test_refuse_respond_has_a_panel_per_objective(self, study):
        both = pd.concat([study.accuracy, study.accuracy.query("objective == 'harmless'").assign(objective="other")])
        assert len(plots.refuse_respond(both).axes) == 2
        with pytest.raises(OptionError, match="objective="):
            plots.refuse_respond(both, Figure().add_subplot())

    @pytest.mark.parametrize("quantity", ["margin", "accuracy"])
    def test_collapse_draws_the_retained_shares(self, study, quantity):
        (axes,) = plots.collapse(study, quantity=quantity).axes
        table = study.collapse.query("quantity == @quantity")
        for name, size in SETS.items():
            part = table.query("set == @name")
            ends = {on: [f"retained_{on}{end}" for end in ("", "_low", "_high")] for on in OBJECTIVES}
            label = f"without {name} ({size}-{size + 2})"
            assert shown(axes)[label][0, :3] == pytest.approx(expected(part, ("set",), *ends["harmless"])[name,])
            up = shown(axes, upright=True)[label][0, :3]
            assert up == pytest.approx(expected(part, ("set",), *ends["helpful"])[name,])
        (low, high), (bottom, top) = axes.get_xlim(), axes.get_ylim()
        assert (low, high) == (bottom, top)
        assert low < table[["retained_helpful_low", "retained_harmless_low"]].to_numpy().min()
        assert high > 1, "the whole model is in view"

    def test_undefined_retained_shares_leave_finite_axes(self, single):
        table = single.collapse.copy()
        table.loc[:, [column for column in table if column.startswith("retained")]] = np.nan
        (axes,) = plots.collapse(table).axes
        assert np.isfinite(axes.get_xlim()).all()


class TestRadar:
    def test_polygons_and_bands_are_accuracies_with_intervals(self, study):
        (axes,) = plots.radar(study).axes
        lines = {line.get_label(): line.get_ydata() for line in axes.get_lines()}
        order = [(on, subset) for on in OBJECTIVES for subset in SUBSETS[on]]
        bands = [collection for collection in axes.collections if len(collection.get_paths())]
        for model, band in zip(MODELS, bands, strict=True):
            part = study.subsets.query("model == @model")
            estimates = expected(part, ("objective", "subset"), "accuracy", share=True)
            values = [estimates[spoke][0] for spoke in order]
            assert lines[model] == pytest.approx([*values, values[0]])
            corners = band.get_paths()[0].vertices[:, 1]
            for end in (1, 2):
                for spoke in order:
                    assert np.isclose(corners, estimates[spoke][end]).any()
        assert set(lines["chance"]) == {0.5}
        names = [text.get_text() for text in axes.texts]
        assert names == [subset.replace("_", " ") for _, subset in order]

    def test_subsets_are_grouped_by_objective_in_any_row_order(self, study):
        mixed_up = {"chat": 0, "should_refuse": 1, "maths": 2, "should_respond": 3}
        table = study.subsets.sort_values("subset", key=lambda names: names.map(mixed_up))
        (axes,) = plots.radar(table).axes
        names = [text.get_text() for text in axes.texts]
        sides = [next(on for on in OBJECTIVES if name.replace(" ", "_") in SUBSETS[on]) for name in names]
        assert sides in (sorted(sides), sorted(sides, reverse=True))

    def test_fewer_than_three_subsets_are_refused(self, study):
        with pytest.raises(OptionError, match="at least 3 subsets"):
            plots.radar(study, objective="helpful")


class TestDepthAndOverlap:
    def test_depth_stacks_the_thirds(self, study):
        figure = plots.depth(study)
        for score, axes in zip(SCORES, figure.axes, strict=True):
            assert axes.get_title() == score
            mean = study.depth.query("score == @score").groupby("set", sort=False)[["early", "middle", "late"]].mean()
            bars = {
                container.get_label(): container for container in axes.containers if isinstance(container, BarContainer)
            }
            left = np.zeros(len(mean))
            for third in ("early", "middle", "late"):
                assert [bar.get_width() for bar in bars[third]] == pytest.approx(mean[third].tolist())
                assert [bar.get_x() for bar in bars[third]] == pytest.approx(left)
                left += mean[third].to_numpy()
            assert [text.get_text() for text in axes.texts] == ["40-42"] * len(mean)
            divided = study.depth.query("score == @score")
            assert faint(axes) == pytest.approx(sorted([*divided["early"], *(divided["early"] + divided["middle"])]))
        assert row_names(figure.axes[0]) == [*MODELS, "shared"]

    def test_a_set_that_a_score_lacks_has_no_size(self, single):
        table = single.depth.query("score != 'change' or set != 'shared'")
        texts = [text.get_text() for text in plots.depth(table).axes[1].texts]
        assert texts == ["40", "40", "40", "none"]

    def test_overlap_draws_indices_ceilings_and_stars(self, study):
        figure = plots.overlap(study)
        for score, axes in zip(SCORES, figure.axes, strict=True):
            table = study.overlap[study.overlap["score"] == score]
            names = row_names(figure.axes[0])
            assert names[:3] == ["helpful / harmless", "helpful / mixed", "helpful or\nharmless / mixed"]
            series = shown(axes)
            ticks = [
                collection.get_segments()[0]
                for collection in axes.collections
                if isinstance(collection, LineCollection)
            ]
            assert ticks
            stars = {round(float(text.xy[1]), 2) for text in axes.texts}
            for without, label in ((False, "top sets"), (True, "without the base's own top set")):
                dots = {round(dot[3] + (-0.19 if without else 0.19)): dot for dot in series[label]}
                for (a, b), part in table.query("without_base == @without and kind != 'seeds'").groupby(["a", "b"]):
                    row = names.index(f"{a} / {b}".replace(" or ", " or\n"))
                    (interval,) = expected(part, ("a",), "jaccard", "jaccard_low", "jaccard_high", share=True).values()
                    assert dots[row][:3] == pytest.approx(interval, nan_ok=True)
                    (beyond,) = expected(part, ("a",), "beyond_chance", "beyond_low", "beyond_high").values()
                    starred = round(float(dots[row][3]), 2) in stars
                    assert starred == (beyond[1] > 0 or beyond[2] < 0)
                ceiling = table.query("without_base == @without and kind == 'seeds'")
                for model in MODELS:
                    part = ceiling[ceiling["a"].str.startswith(f"{model} ")]
                    assert len(part) == 3, "pairs of three seeds"
                    dot = dots[names.index(f"{model}, 2 seeds")]
                    assert dot[:3] == pytest.approx(part[["jaccard", "jaccard_low", "jaccard_high"]].mean().to_numpy())
            assert faint(axes) == pytest.approx(sorted(table["jaccard"]))

    def test_overlap_draws_chance_with_its_range(self, single):
        """Ticks show the mean of chance within layers, and bars its range, from the interval beyond chance."""
        table = single.overlap.query("kind == 'models' and score == 'magnitude' and not without_base")
        (axes,) = plots.overlap(table).axes
        lines = [collection for collection in axes.collections if isinstance(collection, LineCollection)]
        (bands,) = [np.array(line.get_segments()) for line in lines if line.get_label() == "chance within layers (95%)"]
        (ticks,) = [np.array(line.get_segments()) for line in lines if same_color(line.get_color()[0], "black")]
        assert bands[:, 0, 0] == pytest.approx((table["jaccard"] - table["beyond_high"]).tolist())
        assert bands[:, 1, 0] == pytest.approx((table["jaccard"] - table["beyond_low"]).tolist())
        assert ticks[:, 0, 0] == pytest.approx(table["layer_expected_jaccard"].tolist())

    def test_ceilings_can_be_drawn_alone(self, study):
        (axes,) = plots.overlap(study.overlap.query("kind == 'seeds'"), score="change").axes
        assert row_names(axes) == [f"{model}, 2 seeds" for model in MODELS]


class TestCurves:
    @pytest.mark.parametrize("quantity", ["accuracy", "change", "drop", "normalised", "margin", "margin_change"])
    def test_lines_are_means_and_bands_are_ranges(self, study, quantity):
        (axes,) = plots.curves(study, quantity=quantity, model="mixed", objective="harmless").axes
        assert axes.get_title() == "mixed on harmless (n = 90)"
        table = study.curves.query("model == 'mixed' and objective == 'harmless'")
        lines = {line.get_label(): line for line in axes.get_lines()}
        for score, band in zip((*SCORES, "random"), axes.collections, strict=True):
            part = table.query("score == @score").groupby("fraction")[quantity]
            assert lines[score].get_xdata() == pytest.approx(FRACTIONS)
            assert lines[score].get_ydata() == pytest.approx(part.mean().tolist())
            corners = band.get_paths()[0].vertices
            for fraction, low, high in zip(FRACTIONS, part.min(), part.max(), strict=True):
                ends = corners[np.isclose(corners[:, 0], fraction), 1]
                assert (ends.min(), ends.max()) == pytest.approx((low, high))
        assert same_color(lines["random"].get_color(), "#8A8A8A")
        start = {"accuracy": table["before"].mean(), "normalised": 1.0}
        start["margin"] = (table["margin"] - table["margin_change"]).groupby(table["seed"]).mean().mean()
        assert lines["whole model"].get_ydata()[0] == pytest.approx(start.get(quantity, 0.0))

    def test_every_model_and_objective_has_a_panel(self, study):
        titles = [f"{model} on {on} (n = 90)" for on in OBJECTIVES for model in MODELS]
        assert [axes.get_title() for axes in plots.curves(study).axes] == titles

    def test_with_one_seed_only_random_draws_have_bands(self, single):
        figure = plots.curves(single, model="mixed")
        assert [len(axes.collections) for axes in figure.axes] == [1, 1]
        assert figure.get_suptitle().endswith("Band: lowest to highest draw")

    def test_unknown_quantities_are_refused(self, study):
        with pytest.raises(OptionError, match="quantity: expected one of"):
            plots.curves(study, quantity="reward")

    def test_ticks_do_not_touch(self):
        from rmtension.plots._ablations import _percentages

        axes = Figure().add_subplot()
        _percentages(axes, [*(percent / 100 for percent in range(2, 31, 2)), 1.0])
        ticks = axes.get_xticks()
        assert ticks[0] == 0.02
        assert ticks[-1] == 1.0
        assert (ticks[1:] / ticks[:-1] > 1.4).all()


class TestDistributions:
    @pytest.mark.parametrize("pairs", ["all", "all models correct"])
    def test_bars_are_shares_of_responses(self, study, pairs):
        figure = plots.distributions(study, pairs=pairs)
        table = study.rewards if pairs == "all" else study.rewards[study.rewards["all_correct"]]
        axes = figure.axes[2]
        assert axes.get_title() == f"mixed on helpful (n = {20 if pairs == 'all' else 7})"
        part = table.query("model == 'mixed' and objective == 'helpful'")
        bars = dict(zip(("chosen", "rejected"), axes.containers, strict=True))
        scale = study.rewards.query("model == 'mixed'")[["chosen", "rejected"]].to_numpy()
        for kind in ("chosen", "rejected"):
            edges = [bars[kind][0].get_x(), *(bar.get_x() + bar.get_width() for bar in bars[kind])]
            counts, _ = np.histogram(part[kind], edges)
            assert [bar.get_height() for bar in bars[kind]] == pytest.approx((counts / len(part)).tolist())
            assert sum(bar.get_height() for bar in bars[kind]) == pytest.approx(1)
            assert (edges[0], edges[-1]) == pytest.approx((scale.min(), scale.max()))
        outlines = [patch for patch in axes.patches if patch.get_label() == "_chosen of a seed"]
        assert len(outlines) == 3, "one outline per seed"

    def test_one_seed_has_no_outlines(self, single):
        axes = plots.distributions(single).axes[0]
        assert not [patch for patch in axes.patches if str(patch.get_label()).endswith("of a seed")]

    def test_wrong_pairs_are_refused(self, study):
        with pytest.raises(OptionError, match="pairs: expected one of"):
            plots.distributions(study, pairs="some")
        with pytest.raises(OptionError, match="pairs: expected at least one pair that all models rank correctly"):
            plots.distributions(study.rewards.assign(all_correct=False), pairs="all models correct")
        with pytest.raises(OptionError, match="'all_correct'"):
            plots.distributions(study.rewards.drop(columns="all_correct"), pairs="all models correct")
