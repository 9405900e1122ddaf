"""Decisions: ties, ends of the sweep, and one answer from the plain, the vectorised and the compiled path."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from routewright import decide, metrics, stats
from routewright.errors import UserError
from routewright.outcomes import OutcomeTable
from routewright.pool import Pool
from routewright.schema import ModelSpec, Outcome, TokenUsage

settings.register_profile("steady", deadline=None)  # a busy machine must not fail a property
settings.load_profile("steady")

QUARTERS = st.integers(0, 4).map(lambda k: k / 4)
COSTS = st.integers(0, 6).map(float)


@st.composite
def tables(draw, most_models=5):
    n, m = draw(st.integers(1, 12)), draw(st.integers(1, most_models))
    shared = draw(st.booleans())
    return (draw(hnp.arrays(float, (n, m), elements=QUARTERS)),
            draw(hnp.arrays(float, (m,) if shared else (n, m), elements=COSTS)))


def world(n=400, m=5, seed=0):
    """estimate, expected cost, quality, cost: (n, m) each, estimates informative, costs skewed."""
    rng = np.random.default_rng(seed)
    skill, price = np.linspace(0.3, 0.9, m), np.geomspace(1e-5, 1e-2, m)
    estimate = np.clip(skill + rng.normal(0, 0.2, (n, m)), 0, 1)
    quality = (rng.random((n, m)) < 0.1 + 0.7 * estimate) + 0.0
    return estimate, price * (0.5 + rng.random((n, 1))), quality, price * rng.lognormal(0, 0.5, (n, m))


@pytest.fixture
def compiled_everywhere(monkeypatch):
    monkeypatch.setattr(decide, "SMALL_SWEEP", 0)


class TestChoose:
    @given(tables(), st.sampled_from([0.0, 0.1, 1.0, np.inf]))
    def test_by_the_letter(self, data, weight):
        estimate, cost = data
        full = np.broadcast_to(cost, estimate.shape)
        chosen = decide.choose(estimate, cost, weight)
        for i, j in enumerate(chosen):
            value = -full[i] if np.isinf(weight) else estimate[i] - weight * full[i]
            key = [(value[k], -full[i, k], estimate[i, k], -k) for k in range(estimate.shape[1])]
            assert j == max(range(len(key)), key=key.__getitem__)

    @given(tables())
    def test_weight_zero_takes_the_best_estimate_and_inf_the_cheapest(self, data):
        estimate, cost = data
        full = np.broadcast_to(cost, estimate.shape)
        assert np.array_equal(metrics.picked(estimate, decide.choose(estimate, cost, 0)), estimate.max(axis=1))
        assert np.array_equal(metrics.picked(full, decide.choose(estimate, cost, np.inf)), full.min(axis=1))

    def test_ties_go_to_the_cheaper(self):
        assert decide.choose([[0.5, 0.5, 0.5]], [3, 1, 2], 0).tolist() == [1]

    def test_refusals(self):
        with pytest.raises(UserError, match="do not fit"):
            decide.choose(np.zeros((3, 2)), np.zeros(3), 1)
        with pytest.raises(UserError, match="prompt 1, model 0 is nan"):
            decide.choose([[0.1, 0.2], [np.nan, 0.2]], [1, 2], 1)
        with pytest.raises(UserError, match="0 or more"):
            decide.choose([[0.1, 0.2]], [1, 2], -1)
        with pytest.raises(UserError, match="at least 2 cost weights"):
            decide.cost_weights([[0.1, 0.2]], [1, 2], 1)


class TestWeights:
    @given(tables(), st.integers(2, 30))
    def test_ends_and_order(self, data, n):
        estimate, cost = data
        weights = decide.cost_weights(estimate, cost, n)
        full = np.broadcast_to(cost, estimate.shape)
        assert weights[0] == 0 and np.all(np.diff(weights) > 0)
        assert len(weights) <= max(n, 2) and np.isfinite(weights).all()
        cheapest = metrics.picked(full, decide.choose(estimate, cost, weights[-1]))
        assert np.array_equal(cheapest, full.min(axis=1))

    @given(tables())
    def test_the_choice_changes_at_change_points_and_nowhere_else(self, data):
        estimate, cost = data
        points = np.unique(decide.change_points(estimate, cost))
        last = points[-1] * 2 + 1 if len(points) else 5.0
        between = np.concatenate([[0.0], (points[1:] + points[:-1]) / 2, [last]])
        inner = [decide.choose(estimate, cost, w) for w in between]
        for a, b, low, high in zip(inner, inner[1:], between, between[1:], strict=False):
            crossed = ((points > low) & (points < high)).any() or low == 0
            assert crossed or np.array_equal(a, b)

    def test_settings_are_spread(self):
        estimate, expected, quality, cost = world(2000, 8)
        scores = decide.sweep_scores(estimate, expected, quality, cost, decide.cost_weights(estimate, expected))
        assert len(scores.weights) == 101
        assert np.abs(np.diff(scores.share, axis=0)).max() < 0.12  # no leap between neighbouring settings


class TestSweep:
    @given(tables())
    def test_sweep_is_choose_at_each_weight(self, data):
        estimate, cost = data
        weights = np.append(decide.cost_weights(estimate, cost, 9), np.inf)
        decided = decide.sweep(estimate, cost, weights)
        assert decided.shape == (len(weights), len(estimate))
        for weight, row in zip(weights, decided, strict=True):
            assert np.array_equal(row, decide.choose(estimate, cost, weight))
        full = np.broadcast_to(cost, estimate.shape)
        paid = np.array([metrics.picked(full, row) for row in decided])
        assert np.all(np.diff(paid, axis=0) <= 0)  # a larger cost weight never costs more

    @pytest.mark.parametrize("shared", [False, True])
    def test_compiled_is_plain(self, monkeypatch, shared):
        rng = np.random.default_rng(0)
        estimate = np.round(rng.random((9000, 6)), 1)
        cost = np.round(rng.random(6 if shared else (9000, 6)), 1)
        weights = np.array([0, 0.5, 1.0, 2.0, 1e6, np.inf])
        plain = decide.sweep(estimate, cost, weights)
        monkeypatch.setattr(decide, "SMALL_SWEEP", 0)
        assert np.array_equal(plain, decide.sweep(estimate, cost, weights))
        assert plain.dtype == np.int8

    def test_many_models(self):
        estimate = np.eye(200)[:5]
        assert decide.sweep(estimate, np.ones(200), [0.0]).dtype == np.int16

    @pytest.mark.parametrize("small", [10**12, 0])
    def test_scores_are_means_of_values(self, monkeypatch, small):
        monkeypatch.setattr(decide, "SMALL_SWEEP", small)
        data = world(9000, 6)
        weights = decide.cost_weights(data[0], data[1], 17)
        scores = decide.sweep_scores(*data, weights)
        quality, cost = decide.sweep_values(*data, weights)
        decided = decide.sweep(data[0], data[1], weights)
        assert quality.dtype == np.float32 and quality.shape == (17, 9000)
        assert scores.quality == pytest.approx(quality.mean(axis=1, dtype=float))
        assert scores.cost == pytest.approx(cost.mean(axis=1, dtype=float), rel=1e-6)
        assert scores.share.sum(axis=1) == pytest.approx(np.ones(17))
        assert scores.share[4] == pytest.approx(np.bincount(decided[4], minlength=6) / 9000)
        some, _ = decide.sweep_values(*data, weights, rows=slice(10, 20))
        assert np.array_equal(some, quality[:, 10:20])

    @pytest.mark.parametrize("n, b, small", [(700, 45, 10**12), (9000, 70, 0), (9000, 300, 0)])
    def test_intervals_are_the_paired_bootstrap_of_the_values(self, monkeypatch, n, b, small):
        monkeypatch.setattr(decide, "SMALL_SWEEP", small)
        data = world(n, 6)
        weights = decide.cost_weights(data[0], data[1], 13)
        resampler = stats.Resampler(n, b, 3)
        found = decide.sweep_intervals(*data, weights, resampler)
        decided = decide.sweep(data[0], data[1], weights)
        for k, row in enumerate(decided):
            assert found.quality_samples[:, k] == pytest.approx(resampler.means(metrics.picked(data[2], row)), abs=1e-9)
            assert found.cost_samples[:, k] == pytest.approx(resampler.means(metrics.picked(data[3], row)), rel=1e-7)
        scores = decide.sweep_scores(*data, weights)
        assert np.array_equal(found.quality, scores.quality) and np.array_equal(found.share, scores.share)
        assert np.all(found.quality_lo <= found.quality_hi) and found.quality_samples.shape == (b, 13)

    def test_shapes_must_fit(self):
        estimate, expected, quality, cost = world(10)
        with pytest.raises(UserError, match="recorded quality has shape"):
            decide.sweep_scores(estimate, expected, quality[:9], cost, [0.0])
        with pytest.raises(UserError, match="resamples are over 9 prompts"):
            decide.sweep_intervals(estimate, expected, quality, cost, [0.0], stats.Resampler(9, 5))


class TestTwoModels:
    @given(hnp.arrays(float, (8, 2), elements=QUARTERS), st.sampled_from([0.0, 0.25, 0.5, 0.8]))
    def test_threshold_on_the_score_is_a_cost_weight(self, estimate, weight):
        """score < threshold is estimate_strong - estimate_cheap > 1 - 2 threshold: the argmax rule of two models."""
        score = decide.two_model_score(estimate)
        by_weight = decide.choose(estimate, [0.0, 1.0], weight)
        assert np.array_equal(decide.choose_by_threshold(score, 0.5 * (1 - weight)), by_weight == 1)
        assert score.min() >= 0 and score.max() <= 1

    def test_polarity(self):
        score = decide.two_model_score(np.array([[0.9, 0.1], [0.1, 0.9]]))
        assert score.tolist() == pytest.approx([0.9, 0.1])
        assert decide.choose_by_threshold(score, 0.5).tolist() == [False, True]
        assert decide.two_model_score(np.array([[0.1, 0.9]]), cheap=1, strong=0) == pytest.approx([0.9])


class TestExpectedCost:
    def table(self, usages, pool, costs=None):
        rows = [Outcome(f"p{i}", f"prompt {i}", name, "", True, 1.0, TokenUsage(*usage),
                        cost_usd=None if costs is None else costs[i])
                for i, usage in enumerate(usages) for name in pool.names]
        return OutcomeTable.from_outcomes(rows, pool)

    def test_own_input_and_mean_output(self, tiny_pool):
        train, test = self.table([(100, 10), (100, 30)], tiny_pool), self.table([(200, 999), (50, 1)], tiny_pool)
        found = decide.expected_cost(train, test)
        assert found[0] == pytest.approx([(200 * 0.1 + 20 * 0.4) / 1e6, (200 * 1.5 + 20 * 6) / 1e6])
        assert found[1] == pytest.approx([(50 * 0.1 + 20 * 0.4) / 1e6, (50 * 1.5 + 20 * 6) / 1e6])

    def test_money_without_tokens(self, tiny_pool):
        train = self.table([(0, 0), (0, 0)], tiny_pool, costs=[0.1, 0.3])
        assert decide.expected_cost(train, train) == pytest.approx(np.full((2, 2), 0.2))

    def test_other_models_are_refused(self, tiny_pool):
        one = Pool("one", (ModelSpec("cheap", 0.1, 0.4),), "2026-11-20")
        with pytest.raises(UserError, match="same models in the same order"):
            decide.expected_cost(self.table([(1, 1)], one), self.table([(1, 1)], tiny_pool))


def test_every_policy_lies_below_the_oracle_and_the_hull_of_its_own_points():
    estimate, expected, quality, cost = world(3000, 6)
    scores = decide.sweep_scores(estimate, expected, quality, cost, decide.cost_weights(estimate, expected))
    best = metrics.oracle(quality, cost)
    assert scores.quality.max() <= metrics.picked(quality, best).mean()
    assert np.all(metrics.mix_quality(scores.cost, scores.cost, scores.quality) >= scores.quality - 1e-12)
