"""Conflict within one model: closed forms, SciPy, PyTorch, every possible draw, and simulated data with known truth."""

from dataclasses import replace
from itertools import combinations, product

import numpy as np
import pytest
import torch
from matplotlib.colors import same_color
from matplotlib.figure import Figure
from scipy import stats

from rmtension import PreferencePairs, plots
from rmtension.errors import DataError, OptionError, ProvenanceError
from rmtension.evaluation._intervals import variance_of_mean
from rmtension.neurons import _conflict, _prompt_cells
from rmtension.neurons._conflict import conflict, contributions
from rmtension.neurons._conflict_report import ConflictReport, classes
from rmtension.neurons._pair_attributions import PairAttributions
from rmtension.store._provenance import Provenance

OBJECTIVES = ("helpful", "harmless")
CLASSES = classes(OBJECTIVES)

WHERE = Provenance("toy", "0f", "mlp", "all", "gradient_x_activation", "float64", "", 0, 0, "0", sign=1)


def scores_of(values, prompts=None, *, layers=1, method="gradient_x_activation"):
    """Scores with these rows, of these prompts; without, each has its own, and both objectives have the same ones."""
    values = torch.as_tensor(np.asarray(values), dtype=torch.float64)
    neurons = values.shape[1] // layers
    prompts = range(len(values)) if prompts is None else prompts
    rows = [{"prompt": f"{name}", "chosen": f"yes {n}", "rejected": "no"} for n, name in enumerate(prompts)]
    where = replace(WHERE, method=method, n_pairs=len(values))
    return PairAttributions(values.reshape(len(values), layers, neurons), PreferencePairs.from_records(rows), where)


def simulated(rng, mean, n, on, *, noise=1.0, layers=1):
    """Scores of `n` prompts of this objective alone, around `mean`."""
    values = mean + noise * rng.standard_normal((n, len(mean)))
    return scores_of(values, [f"{on} {number}" for number in range(n)], layers=layers)


def noisy():
    """Two layers of 20 neurons; prompts with two and three pairs; 5 prompts of the 15 and 10 are in both objectives."""
    rng = np.random.default_rng(3)
    means = np.zeros((2, 40))
    means[0, :4], means[1, 2:6] = [3, -3, 2, -2], [2, 2, -3, 3]
    values = means[:, None] + rng.standard_normal((2, 30, 40))
    owners = [n // 2 for n in range(30)], [n // 3 + 10 for n in range(30)]
    return [scores_of(rows, prompts, layers=2) for rows, prompts in zip(values, owners, strict=True)]


def lengthened(scores):
    """By how much resampling prompts lengthens the mean, from the prompts' sums and the variance between them."""
    sums = np.array(
        [
            scores.values[[n for n, pair in enumerate(scores.pairs) if pair.prompt == prompt]].sum(0).flatten().numpy()
            for prompt in scores.pairs.prompts
        ]
    )
    length = sums.sum(0) @ sums.sum(0)
    return np.sqrt((length + len(sums) * sums.var(axis=0).sum()) / length)


def cosine(a, b):
    return float(a @ b / np.sqrt((a @ a) * (b @ b)))


class TestWithoutNoise:
    MEANS = {
        "both up": (2.0, 1.0),
        "both down": (-1.0, -3.0),
        "helpful up, harmless down": (1.5, -1.0),
        "helpful down, harmless up": (-1.0, 2.0),
        "helpful only up": (1.0, 0.0),
        "helpful only down": (-1.0, 0.001),
        "harmless only up": (0.0, 1.0),
        "harmless only down": (0.001, -1.0),
        "none": (0.001, -0.001),
    }

    def report(self, **options):
        means = np.array(list(self.MEANS.values()))
        return conflict(*(scores_of(np.tile(column, (6, 1)), layers=3) for column in means.T), **options)

    def test_planted_contributions_have_their_classes(self):
        report = self.report()
        assert report.table["class"].tolist() == list(self.MEANS) == list(CLASSES.values())
        assert report.counts() == dict.fromkeys(self.MEANS, 1)
        expected_sets = {name: [divmod(index, 3)] for index, name in enumerate(self.MEANS)}
        assert {name: list(neurons) for name, neurons in report.sets.items()} == expected_sets
        assert all((neurons.site, neurons.architecture) == ("mlp", "toy") for neurons in report.sets.values())
        assert report.table[["layer", "neuron"]].to_numpy().tolist() == [list(divmod(index, 3)) for index in range(9)]
        assert report.table[list(OBJECTIVES)].to_numpy() == pytest.approx(np.array(list(self.MEANS.values())))

    def test_min_share_is_relative_to_the_objectives_largest_contribution(self):
        """The largest are 2 and 3, so that a floor of 0.6 is at 1.2 and at 1.8."""
        alone = ["helpful only up", "harmless only down", "helpful only up", "harmless only up", *["none"] * 5]
        assert self.report(min_share=0.6).table["class"].tolist() == alone
        everything = self.report(min_share=0.0).table["class"].tolist()
        assert everything[5:] == [
            "helpful down, harmless up", "harmless only up", "helpful up, harmless down", "helpful up, harmless down"
        ]  # fmt: skip
        assert everything[4] == "helpful only up", "a neuron that does nothing counts nowhere"

    def test_cosine_and_reliability_are_exact(self):
        report = self.report()
        expected = cosine(*np.array(list(self.MEANS.values())).T)
        assert [report.cosine.value, report.cosine.low, report.cosine.high] == pytest.approx([expected] * 3)
        assert report.reliability == pytest.approx({"helpful": 1.0, "harmless": 1.0})
        assert (report.n_pairs, report.n_prompts) == ({"helpful": 6, "harmless": 6},) * 2
        assert (report.cosine.n, report.cosine.n_prompts) == (12, 6), "the prompts are the same"

    def test_a_sum_of_zeros_has_no_direction(self):
        """Two prompts that a coin turns against each other: cosines are 0 or as observed, never what rounding gives."""
        report = conflict(scores_of([[0.1, 0.3]] * 2, "ab"), scores_of([[0.1, 0.3]] * 2, "cd"))
        assert report.chance["coin"].mean == pytest.approx(0, abs=0.1)
        assert (report.chance["coin"].low, report.chance["coin"].high) == pytest.approx((-1, 1))
        # A quarter of the draws turn neither objective's prompts against each other.
        assert report.chance["coin"].p_value == pytest.approx(0.25, abs=0.06)


class TestNames:
    def test_any_two_names_give_the_same_numbers(self, tmp_path):
        """In the table, the classes and the file; a name of one group has no meaning of its own."""
        report, renamed = conflict(*noisy()), conflict(*noisy(), names=("law", "art"))
        for old, new in (("helpful", "law"), ("harmless", "art")):
            assert renamed.table[f"{new}_q_value"].equals(report.table[f"{old}_q_value"])
            assert renamed.n_pairs[new] == report.n_pairs[old]
        assert renamed.counts()["law up, art down"] == report.counts()["helpful up, harmless down"]
        assert renamed.cosine == report.cosine
        renamed.save(tmp_path / "report.safetensors")
        loaded = ConflictReport.load(tmp_path / "report.safetensors")
        assert loaded.table.equals(renamed.table)
        assert loaded.names == ("law", "art")

    @pytest.mark.parametrize("names", [("a", "a"), ("layer", "b"), ("a", "a_stderr"), ("class", "b")])
    def test_names_that_are_no_two_columns_are_refused(self, names):
        with pytest.raises(OptionError, match="names: expected two names whose columns differ"):
            conflict(*noisy(), names=names)


class TestTable:
    def test_is_scipys_where_every_pair_has_its_own_prompt(self):
        rng = np.random.default_rng(0)
        values = rng.gamma(1.0, size=(2, 12, 8)) - 0.8
        table = conflict(*(scores_of(rows, layers=2) for rows in values)).table
        for name, rows in zip(OBJECTIVES, values, strict=True):
            expected = stats.ttest_1samp(rows, 0)
            assert table[name].to_numpy() == pytest.approx(rows.mean(0))
            assert table[f"{name}_stderr"].to_numpy() == pytest.approx(stats.sem(rows))
            assert table[f"{name}_p_value"].to_numpy() == pytest.approx(expected.pvalue)
            q_value = stats.false_discovery_control(expected.pvalue)
            assert table[f"{name}_q_value"].to_numpy() == pytest.approx(q_value)

    def test_pairs_of_one_prompt_count_together(self):
        """Deviations from the mean 4 sum to -5, 0 and 5 over prompts: variance (25 + 0 + 25) / 4^2 * 3 / 2."""
        rows = np.array([[1.0], [2.0], [4.0], [9.0]])
        table = conflict(scores_of(rows, "aabc"), scores_of(rows)).table
        assert table["helpful_stderr"].item() == pytest.approx(np.sqrt(50 / 16 * 3 / 2))
        assert table["harmless_stderr"].item() == pytest.approx(stats.sem(rows[:, 0]))
        t = 4 / np.sqrt(50 / 16 * 3 / 2)
        assert table["helpful_p_value"].item() == pytest.approx(2 * stats.t.sf(t, 2))

    def test_is_the_librarys_variance_of_a_mean(self):
        both = noisy()
        table = conflict(*both).table
        for name, scores in zip(OBJECTIVES, both, strict=True):
            expected = [variance_of_mean(column, scores.pairs) for column in scores.values.flatten(1).T]
            assert table[f"{name}_stderr"].to_numpy() ** 2 == pytest.approx(np.array(expected))

    def test_classes_follow_from_its_numbers(self):
        table = conflict(*noisy(), level=0.9, min_share=0.2).table
        signs = []
        for name in OBJECTIVES:
            size = table[name].abs()
            signs.append(np.sign(table[name]) * (table[f"{name}_q_value"] <= 0.1) * (size >= 0.2 * size.max()))
        assert table["class"].tolist() == [CLASSES[pair_of_signs] for pair_of_signs in zip(*signs, strict=True)]
        assert table["class"].nunique() == 7

    @pytest.mark.parametrize("piece", [1, 7, 40])
    def test_the_size_of_chunks_changes_nothing(self, monkeypatch, piece):
        whole = conflict(*noisy())
        monkeypatch.setattr(_conflict, "_NEURONS_AT_A_TIME", piece)
        report = conflict(*noisy())
        numbers = whole.table.columns[:-1]
        assert report.table[numbers].to_numpy() == pytest.approx(whole.table[numbers].to_numpy())
        assert (report.cosine.low, report.chance["coin"].high) == pytest.approx(
            (whole.cosine.low, whole.chance["coin"].high)
        )


class TestDraws:
    """Every cosine against vectors that are summed pair by pair, with the weights that were drawn."""

    KINDS = ("observed", "bootstrap", "coin", "shuffle", "helpful", "harmless")

    @pytest.fixture
    def drawn(self, monkeypatch):
        """Kind -> weights of the two sides and cosines, what a cell sums to, and the report."""
        calls = []
        given = _prompt_cells.PromptCells.cosines

        def kept(cells, first, second):
            calls.append((first, second, given(cells, first, second)))
            return calls[-1][2]

        monkeypatch.setattr(_prompt_cells.PromptCells, "cosines", kept)
        both = noisy()
        report = conflict(*both)
        names, sums = [], []
        for on, scores in zip(OBJECTIVES, both, strict=True):
            length = float(scores.mean().norm())
            for prompt in scores.pairs.prompts:
                mine = [n for n, pair in enumerate(scores.pairs) if pair.prompt == prompt]
                names.append((on, prompt))
                sums.append(scores.values[mine].sum(0).flatten().numpy() / length)
        return dict(zip(self.KINDS, calls, strict=True)), names, np.array(sums), report

    def test_cosines_are_those_of_the_weighted_sums(self, drawn):
        calls, _, sums, _ = drawn
        for kind, (first, second, cosines) in calls.items():
            assert len(cosines) == (1 if kind == "observed" else 1000)
            loop = [
                torch.nn.functional.cosine_similarity(torch.from_numpy(a @ sums), torch.from_numpy(b @ sums), dim=0)
                for a, b in zip(first, second, strict=True)
            ]
            assert cosines == pytest.approx(np.array([float(draw) for draw in loop]), abs=1e-10)

    def test_the_report_summarises_the_draws(self, drawn):
        calls, _, _, report = drawn
        cosines_of = {kind: cosines for kind, (_, _, cosines) in calls.items()}
        observed = cosines_of["observed"][0]
        assert report.cosine.value == observed
        table = torch.tensor(report.table[list(OBJECTIVES)].to_numpy())
        assert observed == pytest.approx(float(torch.nn.functional.cosine_similarity(*table.T, dim=0)))
        helpful, harmless = noisy()
        stretch = np.sqrt(np.prod([lengthened(scores) for scores in (helpful, harmless)]))
        shifted = (cosines_of["bootstrap"] - cosines_of["bootstrap"].mean()) * stretch + observed
        assert (report.cosine.low, report.cosine.high) == pytest.approx(tuple(np.quantile(shifted, [0.025, 0.975])))
        sizes = np.abs(cosines_of["shuffle"])
        as_large = {"coin": np.abs(cosines_of["coin"]) >= abs(observed), "shuffle": sizes <= abs(observed)}
        for name, draws in (("coin", cosines_of["coin"]), ("shuffle", sizes)):
            null = report.chance[name]
            assert (null.mean, null.low, null.high) == pytest.approx(
                (draws.mean(), *np.quantile(draws, [0.025, 0.975]))
            )
            assert null.p_value == pytest.approx((as_large[name].sum() + 1) / 1001)
        assert report.reliability == pytest.approx({on: cosines_of[on].mean() for on in OBJECTIVES})

    def test_draws_keep_prompts_whole(self, drawn):
        calls, names, _, _ = drawn
        helpful = np.array([on == "helpful" for on, _ in names])
        prompts = [prompt for _, prompt in names]
        both = [prompt for prompt in dict.fromkeys(prompts) if prompts.count(prompt) == 2]
        pairs = [[index for index, owner in enumerate(prompts) if owner == prompt] for prompt in both]
        assert len(both) == 5
        shared = np.isin(prompts, both)
        for kind in ("bootstrap", "coin"):
            first, second, _ = calls[kind]
            assert not first[:, ~helpful].any()
            assert not second[:, helpful].any()
            for helpful_cell, harmless_cell in pairs:
                assert (first[:, helpful_cell] == second[:, harmless_cell]).all(), "a prompt of both is drawn for both"
        first, second, _ = calls["bootstrap"]
        for side, mine in ((first, helpful), (second, ~helpful)):
            for members in (mine & shared, mine & ~shared):
                assert (side[:, members].sum(1) == members.sum()).all()
                assert side[:, members].mean(0) == pytest.approx(1, abs=5 / np.sqrt(1000))
        coin = calls["coin"][0][:, helpful]
        assert set(np.unique(coin)) == {-1, 1}
        assert np.abs(coin.mean(0)).max() < 5 / np.sqrt(1000)
        first, second = (np.abs(side) for side in calls["shuffle"][:2])
        assert (first + second == 1).all()
        assert set(np.unique(first)) == {0, 1}
        assert (first[:, ~shared].sum(1) == (helpful & ~shared).sum()).all()
        assert first[:, ~shared].mean(0) == pytest.approx(10 / 15, abs=5 * 0.5 / np.sqrt(1000))
        for helpful_cell, harmless_cell in pairs:
            assert (first[:, helpful_cell] + first[:, harmless_cell] == 1).all()
            assert first[:, helpful_cell].mean() == pytest.approx(0.5, abs=5 * 0.5 / np.sqrt(1000))
        for kind, mine, half in (("helpful", helpful, 7), ("harmless", ~helpful, 5)):
            first, second, _ = calls[kind]
            assert (first + second == mine).all()
            assert (first.sum(1) == half).all()

    def test_nulls_are_those_of_every_possible_draw(self):
        rng = np.random.default_rng(5)
        a, b = (rng.standard_normal((n, 6)) + 2.0 * np.eye(6)[on] for n, on in ((4, 0), (3, 0)))
        report = conflict(scores_of(a, "abcd"), scores_of(b, "efg"))
        observed = cosine(a.sum(0), b.sum(0))
        assert report.cosine.value == pytest.approx(observed)
        assert observed > 0
        coins = [cosine(np.array(signs[:4]) @ a, np.array(signs[4:]) @ b) for signs in product([-1.0, 1.0], repeat=7)]
        rows = np.concatenate([a / np.linalg.norm(a.mean(0)), b / np.linalg.norm(b.mean(0))])
        total = rows.sum(0)
        deals = [rows[list(mine)].sum(0) for mine in combinations(range(7), 4)]
        dealt = np.abs([cosine(mine, total - mine) for mine in deals])
        as_large = np.abs(coins) >= observed - 1e-9, dealt <= observed + 1e-9
        for name, exact, beyond in zip(("coin", "shuffle"), (np.array(coins), dealt), as_large, strict=True):
            null, share = report.chance[name], beyond.mean()
            assert null.mean == pytest.approx(exact.mean(), abs=4 * exact.std() / np.sqrt(1000))
            assert null.p_value == pytest.approx(share, abs=4 * np.sqrt(share * (1 - share) / 1000) + 0.001)


class TestSimulated:
    """Data whose truth is known; 200 draws each, because there are many of them."""

    @pytest.fixture(autouse=True)
    def fewer_draws(self, monkeypatch):
        monkeypatch.setattr(_prompt_cells, "_N_DRAWS", 200)

    @pytest.mark.grid
    @pytest.mark.parametrize(("neurons", "noise"), [(60, 1.0), (300, 2.0)])
    def test_intervals_cover_what_other_prompts_give(self, neurons, noise):
        """95% nominal; 200 data sets have a standard error of 1.5%. Resamples that are only shifted cover less."""
        rng = np.random.default_rng(11)
        means = np.zeros((2, neurons))
        means[0, :6], means[1, 3:9] = 1.0, 1.0
        values, shifted = [], []
        for _ in range(200):
            both = {on: simulated(rng, mean, 25, on, noise=noise) for on, mean in zip(OBJECTIVES, means, strict=True)}
            values.append(conflict(*both.values()).cosine)
            _, cells = _conflict._summarised(both)
            ends = np.quantile(cells.between(cells.resampled(rng)), [0.025, 0.975])
            middle = cells.between(cells.resampled(rng)).mean()
            shifted.append(ends - middle + values[-1].value)
        truth = np.mean([value.value for value in values])
        assert 0.93 <= np.mean([value.low <= truth <= value.high for value in values]) <= 0.995
        assert np.mean([low <= truth <= high for low, high in shifted]) < 0.93, "which the bound above would find"

    @pytest.mark.grid
    def test_random_signs_find_nothing_in_noise(self):
        """Its p-values are uniform where nothing is there."""
        rng = np.random.default_rng(12)
        reports = [conflict(*(simulated(rng, np.zeros(50), 15, on) for on in OBJECTIVES)) for _ in range(200)]
        p_values = [report.chance["coin"].p_value for report in reports]
        assert stats.kstest(p_values, "uniform").pvalue > 0.01
        assert np.mean([sum(list(report.counts().values())[:-1]) > 0 for report in reports]) < 0.2

    @pytest.mark.grid
    def test_shuffling_finds_nothing_in_two_halves_of_one_objective(self):
        rng = np.random.default_rng(13)
        mean = np.repeat([1.0, 0.0], [5, 45])
        reports = [conflict(*(simulated(rng, mean, 15, on) for on in OBJECTIVES)) for _ in range(200)]
        p_values = [report.chance["shuffle"].p_value for report in reports]
        assert stats.kstest(p_values, "uniform").pvalue > 0.01
        assert max(report.chance["coin"].p_value for report in reports) < 0.02

    def test_planted_neurons_are_found(self):
        rng = np.random.default_rng(14)
        means = np.zeros((2, 400))
        means[0, :30] = np.repeat([1.0, -1.0, 1.0], 10)
        means[1, :40] = np.repeat([-1.0, 1.0, 0.0, -1.0], 10)
        both = [simulated(rng, mean, 60, on, layers=4) for on, mean in zip(OBJECTIVES, means, strict=True)]
        report = conflict(*both, min_share=0.3)
        planted = {
            "helpful up, harmless down": range(10),
            "helpful down, harmless up": range(10, 20),
            "helpful only up": range(20, 30),
            "harmless only down": range(30, 40),
        }
        for name, neurons in planted.items():
            assert {(0, neuron) for neuron in neurons} <= set(report.sets[name])
        assert report.counts()["none"] >= 350
        assert report.cosine.high < 0
        assert report.chance["coin"].p_value == pytest.approx(1 / 201)
        assert report.chance["shuffle"].p_value == pytest.approx(1 / 201)

    def test_opposite_vectors_are_one_set_of_neurons(self):
        """The cosine is near -1, as far from 0 as noise allows: a plain mixture of the two would cancel."""
        rng = np.random.default_rng(15)
        mean = np.repeat([2.0, 0.0], [5, 45])
        both = [simulated(rng, sign * mean, 20, on) for on, sign in zip(OBJECTIVES, (1, -1), strict=True)]
        report = conflict(*both)
        assert report.cosine.value < -0.8
        assert report.chance["shuffle"].low < -report.cosine.value < report.chance["shuffle"].high
        assert report.chance["shuffle"].p_value > 0.02

    def test_prompts_of_both_objectives_have_one_sign(self):
        """The same pairs twice have a cosine of 1 whatever they are, and so has the null."""
        scores = scores_of(np.random.default_rng(16).standard_normal((10, 30)))
        report = conflict(scores, scores)
        assert report.cosine.value == pytest.approx(1)
        assert report.cosine.low == pytest.approx(1)
        assert report.chance["coin"].low == pytest.approx(1)
        assert report.chance["coin"].p_value == 1


class TestSymmetries:
    def test_swapping_the_objectives_transposes_the_table(self):
        helpful, harmless = noisy()
        first, other = conflict(helpful, harmless), conflict(harmless, helpful)
        for number in ("", "_stderr", "_p_value", "_q_value"):
            for a, b in (OBJECTIVES, OBJECTIVES[::-1]):
                assert first.table[a + number].to_numpy() == pytest.approx(other.table[b + number].to_numpy())
        turned = {name: CLASSES[signs[::-1]] for signs, name in CLASSES.items()}
        assert other.table["class"].tolist() == [turned[name] for name in first.table["class"]]
        assert first.cosine.value == pytest.approx(other.cosine.value)

    def test_flipping_one_objective_flips_the_cosine(self):
        helpful, harmless = noisy()
        report = conflict(helpful, harmless)
        other = conflict(helpful, replace(harmless, values=-harmless.values))
        ends = (-other.cosine.value, -other.cosine.high, -other.cosine.low)
        assert (report.cosine.value, report.cosine.low, report.cosine.high) == pytest.approx(ends)
        turned = {name: CLASSES[a, -b] for (a, b), name in CLASSES.items()}
        assert other.table["class"].tolist() == [turned[name] for name in report.table["class"]]
        assert other.chance["shuffle"].mean == pytest.approx(report.chance["shuffle"].mean)
        assert other.chance["coin"].p_value == report.chance["coin"].p_value

    def test_scale_changes_nothing_but_the_contributions(self):
        helpful, harmless = noisy()
        report = conflict(helpful, harmless)
        other = conflict(helpful, replace(harmless, values=1000 * harmless.values))
        assert other.table["class"].tolist() == report.table["class"].tolist()
        assert other.table["harmless"].to_numpy() == pytest.approx(1000 * report.table["harmless"].to_numpy())
        for name, null in report.chance.items():
            assert [other.chance[name].mean, other.chance[name].low] == pytest.approx([null.mean, null.low])
        assert other.reliability == pytest.approx(report.reliability)

    def test_the_seed_decides_the_draws(self):
        first, same, other = (conflict(*noisy(), seed=seed) for seed in (0, 0, 1))
        assert repr(first) == repr(same)
        assert first.cosine.low != other.cosine.low
        assert first.cosine.low == pytest.approx(other.cosine.low, abs=0.05)


class TestSigns:
    def test_contributions_of_supporting_scores_are_unchanged(self):
        """Whatever the method is called: the provenance says what its sign means."""
        scores = scores_of([[1.0, -2.0], [3.0, 4.0]], method="attribution_patching of one's own")
        assert contributions(scores).equal(scores.values)

    def test_effects_of_ablation_are_sign_flipped(self):
        patched = [replace(scores, values=-scores.values, provenance=replace(scores.provenance)) for scores in noisy()]
        method = "attribution_patching to mean"
        patched = [replace(scores, provenance=replace(scores.provenance, method=method, sign=-1)) for scores in patched]
        assert contributions(patched[0]).equal(-patched[0].values)
        assert conflict(*patched).table.equals(conflict(*noisy()).table)

    def test_scores_without_a_known_sign_are_refused(self):
        """And with the sign that the message asks for, they are compared."""
        unsigned = [replace(scores, provenance=replace(scores.provenance, sign=None)) for scores in noisy()]
        with pytest.raises(
            OptionError, match=r"got sign None in their provenance.* Use .*dataclasses.replace\(provenance, sign=1\)"
        ):
            conflict(*unsigned)
        signed = [replace(scores, provenance=replace(scores.provenance, sign=1)) for scores in unsigned]
        assert conflict(*signed).table.equals(conflict(*noisy()).table)
        with pytest.raises(ProvenanceError, match="conflict: sign differs: 1 here, None there"):
            conflict(signed[0], unsigned[1])


class TestErrors:
    @pytest.mark.parametrize("min_share", [-0.1, 1.0, float("nan")])
    def test_an_invalid_min_share_is_refused(self, min_share):
        with pytest.raises(OptionError, match=r"min_share: expected a share .* in \[0, 1\)"):
            conflict(*noisy(), min_share=min_share)

    def test_an_invalid_level_is_refused(self):
        with pytest.raises(OptionError, match="level"):
            conflict(*noisy(), level=1.0)

    @pytest.mark.parametrize("name", ["architecture", "model", "site", "positions", "method"])
    def test_other_models_and_methods_are_refused(self, name):
        helpful, harmless = noisy()
        other = replace(harmless, provenance=replace(harmless.provenance, **{name: "another"}))
        with pytest.raises(ProvenanceError, match=f"conflict: {name} differs"):
            conflict(helpful, other)

    @pytest.mark.parametrize("value", [float("nan"), float("inf")])
    def test_nan_and_infinite_scores_are_refused(self, value):
        helpful, harmless = noisy()
        harmless.values[[3, 5], 1, 2] = value
        with pytest.raises(DataError, match="harmless: the scores of 2 of 30 pairs are NaN or infinite"):
            conflict(helpful, harmless)

    @pytest.mark.parametrize("n", [0, 3])
    def test_fewer_than_two_prompts_are_refused(self, n):
        few = scores_of(np.ones((n, 40)), "aaa"[:n], layers=2)
        with pytest.raises(DataError, match=rf"helpful: expected pairs of at least two prompts, got {min(n, 1)}"):
            conflict(few, noisy()[1])

    def test_means_of_zero_are_refused(self):
        with pytest.raises(DataError, match="helpful: the mean contribution of every neuron is 0"):
            conflict(scores_of([[1.0], [-1.0]]), scores_of([[1.0], [1.0]]))

    def test_scores_are_not_changed(self):
        helpful, harmless = noisy()
        conflict(helpful, harmless)
        assert all(now.values.equal(was.values) for now, was in zip((helpful, harmless), noisy(), strict=True))


class TestReport:
    def test_a_loaded_report_equals_the_saved_one(self, tmp_path):
        report = conflict(*noisy(), min_share=0.2, level=0.9)
        report.save(tmp_path / "conflict.safetensors")
        loaded = ConflictReport.load(tmp_path / "conflict.safetensors")
        assert loaded.table.equals(report.table)
        assert list(loaded.table.columns) == list(report.table.columns)
        for name in ("cosine", "chance", "reliability", "n_pairs", "n_prompts", "min_share", "provenance"):
            assert getattr(loaded, name) == getattr(report, name)
        assert repr(loaded) == repr(report)
        assert loaded.sets == report.sets

    def test_prints_counts_cosine_nulls_and_sizes(self):
        report = conflict(*noisy())
        text = str(report)
        assert "40 mlp neurons of toy, gradient_x_activation" in text
        assert "30 helpful pairs of 15 prompts, 30 harmless pairs of 10 prompts" in text
        for shown in (report.cosine, *report.chance.values()):
            assert str(shown) in text
        for name, n in report.counts().items():
            assert f"  {name:<26}{n:>8}\n" in text
        assert max(map(len, text.split("\n"))) <= 100

    def test_frame_is_a_copy(self):
        report = conflict(*noisy())
        frame = report.to_frame()
        frame["helpful"] = 0.0
        assert report.table["helpful"].any()


class TestFigure:
    def test_the_plot_shows_points_intervals_and_a_legend(self):
        report = conflict(*noisy(), level=0.9)
        figure = plots.conflict_scatter(report)
        (axes,) = figure.axes
        counts = {name: n for name, n in report.counts().items() if n}
        assert [text.get_text() for text in figure.legends[0].get_texts()] == [f"{k} ({n})" for k, n in counts.items()]
        for name, drawn in zip(counts, axes.containers, strict=True):
            line, _, bars = drawn.lines
            mine = report.table[report.table["class"] == name]
            assert np.array(line.get_data()) == pytest.approx(mine[list(OBJECTIVES)].to_numpy().T)
            if name == "none":
                assert not bars
                assert same_color(line.get_color(), "#8A8A8A")
                continue
            for on, direction, df in zip(OBJECTIVES, (0, 1), (14, 9), strict=True):
                ends = np.array(bars[direction].get_segments())[:, :, direction]
                half = stats.t.ppf(0.95, df) * mine[f"{on}_stderr"].to_numpy()
                expected = np.stack([mine[on] - half, mine[on] + half], axis=1)
                assert ends == pytest.approx(expected)
        zeros = [line.get_xydata().tolist() for line in axes.get_lines() if line.get_label().startswith("_child")]
        assert [[0, 0], [1, 0]] in zeros
        assert [[0, 0], [0, 1]] in zeros
        assert (
            axes.get_xlabel()
            == "mean contribution to helpful margins (supports them →)\n(reward units; 30 pairs of 15 prompts)"
        )
        assert (
            axes.get_ylabel()
            == "mean contribution to harmless margins (supports them →)\n(reward units; 30 pairs of 10 prompts)"
        )
        first, second = figure.get_suptitle().split("\n")
        assert first == "Contributions to helpful and harmless margins: mlp, gradient x activation"
        assert second == f"Cosine {report.cosine}; 90% intervals over prompts"

    def test_a_given_axis_is_drawn_on_and_a_file_is_written(self, tmp_path):
        figure = Figure()
        axis = figure.add_subplot()
        assert plots.conflict_scatter(conflict(*noisy()), axis) is figure
        assert figure.axes == [axis]
        assert axis.get_title()
        figure.savefig(tmp_path / "conflict.pdf")
        assert (tmp_path / "conflict.pdf").stat().st_size > 5000
        with pytest.raises(OptionError, match="ax: expected an axis with straight coordinates"):
            plots.conflict_scatter(conflict(*noisy()), Figure().add_subplot(projection="polar"))
