"""The default scores: properties that must hold for any outcomes, and closed forms."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from routewright import decide, metrics
from routewright.errors import UserError

settings.register_profile("steady", deadline=None)  # a busy machine must not fail a property
settings.load_profile("steady")

QUARTERS = st.integers(0, 4).map(lambda k: k / 4)  # coarse values, so that ties are common


def points(low=1, high=25):
    return st.integers(low, high).flatmap(lambda n: st.tuples(
        hnp.arrays(float, n, elements=st.integers(0, 12).map(float)), hnp.arrays(float, n, elements=QUARTERS)))


def tables(models=3):
    return st.integers(1, 30).flatmap(lambda n: st.tuples(*[
        hnp.arrays(float, (n, models), elements=QUARTERS) for _ in range(3)]))


class TestPlane:
    @given(points())
    def test_frontier_is_what_nothing_beats(self, data):
        cost, quality = data
        kept = metrics.frontier(cost, quality)
        assert np.all(np.diff(cost[kept]) > 0) and np.all(np.diff(quality[kept]) > 0)
        for i in range(len(cost)):
            beaten = ((cost <= cost[i]) & (quality >= quality[i]) & ((cost < cost[i]) | (quality > quality[i]))).any()
            same_kept = ((cost[kept] == cost[i]) & (quality[kept] == quality[i])).any()
            assert beaten != same_kept

    @given(points())
    def test_hull_is_above_every_point_and_concave(self, data):
        cost, quality = data
        kept = metrics.hull(cost, quality)
        assert set(kept) <= set(metrics.frontier(cost, quality))
        slopes = np.diff(quality[kept]) / np.diff(cost[kept])
        assert np.all(slopes > 0) and np.all(np.diff(slopes) < 0)
        assert np.all(metrics.mix_quality(cost, cost, quality) >= quality - 1e-12)

    @given(points(2))
    def test_mix_weights_reach_the_hull(self, data):
        cost, quality = data
        at = float(np.mean([cost.min(), cost.max()]))
        share = metrics.mix_weights(at, cost, quality)
        assert share.sum() == pytest.approx(1) and (share >= 0).all() and share @ cost <= at + 1e-9
        assert share @ quality == pytest.approx(float(metrics.mix_quality(at, cost, quality)))

    def test_below_the_cheapest_is_nothing(self):
        assert np.isnan(metrics.mix_quality(0.5, [1, 2], [0.5, 0.9]))
        assert metrics.mix_quality(9.0, [1, 2], [0.5, 0.9]) == 0.9
        assert metrics.mix_quality(1.5, [1, 2], [0.5, 0.9]) == pytest.approx(0.7)

    def test_aiq(self):
        assert metrics.aiq([1, 3], [0.4, 0.8], (1, 3)) == pytest.approx(0.6)
        assert metrics.aiq([2], [0.8], (1, 3)) == pytest.approx(0.4)  # nothing reached below 2
        assert metrics.aiq([2], [0.8], (1, 3), anchor=(1, 0.4)) == pytest.approx((0.6 + 0.8) / 2)
        assert metrics.aiq([5], [0.8], (1, 3)) == 0.0
        assert metrics.aiq([0.5], [0.8], (1, 3)) == pytest.approx(0.8)
        assert metrics.aiq([1], [0.8], (1, 1)) is None
        assert metrics.pool_range([[1, 4], [3, 2]]) == (2.0, 3.0)

    @given(points(), points())
    def test_aiq_never_depends_on_another_router_and_grows_with_settings(self, one, other):
        alone = metrics.aiq(*one, (1.0, 9.0))
        joined = metrics.aiq(np.append(one[0], other[0]), np.append(one[1], other[1]), (1.0, 9.0))
        assert 0 <= alone <= joined + 1e-12 <= 1 + 1e-12

    def test_nan_is_refused(self):
        with pytest.raises(UserError, match="nan or inf"):
            metrics.frontier([1, np.nan], [0.1, 0.2])


class TestThresholdCurve:
    def test_perfect_inverted_and_constant_router(self):
        weak, strong = np.repeat([0.0, 1.0], [30, 70]), np.ones(100)
        perfect = metrics.threshold_curve(weak, weak, strong)
        assert metrics.apgr(perfect) == pytest.approx(1 - 0.3 / 2)
        assert metrics.cpt(perfect, 1.0) == pytest.approx(0.3) and metrics.cpt(perfect, 0.5) == pytest.approx(0.15)
        inverted = metrics.threshold_curve(1 - weak, weak, strong)
        assert metrics.apgr(inverted) == pytest.approx(0.3 / 2)
        assert metrics.cpt(inverted, 0.5) == pytest.approx(0.85)
        constant = metrics.threshold_curve(np.full(100, 0.5), weak, strong)
        assert metrics.apgr(constant) == pytest.approx(0.5)
        assert metrics.cpt(constant, 0.2) == pytest.approx(0.2)

    def test_random_router_is_a_half(self):
        rng = np.random.default_rng(1)
        weak, strong = (rng.random(4000) < 0.6) + 0.0, (rng.random(4000) < 0.85) + 0.0
        found = [metrics.apgr(metrics.threshold_curve(rng.random(4000), weak, strong)) for _ in range(40)]
        assert np.mean(found) == pytest.approx(0.5, abs=0.02)

    def test_equal_models_have_no_gap(self):
        curve = metrics.threshold_curve(np.arange(4.0), np.ones(4), np.ones(4))
        assert metrics.apgr(curve) is None and metrics.cpt(curve, 0.5) is None and metrics.pgr(0.5, 1, 1) is None

    @given(tables(2))
    def test_each_point_is_what_the_threshold_gives(self, data):
        score, quality = data[0][:, 0], data[1]
        curve = metrics.threshold_curve(score, quality[:, 0], quality[:, 1])
        assert len(curve.thresholds) == len(np.unique(score)) + 1
        for threshold, share, reached in zip(curve.thresholds, curve.strong_share, curve.quality, strict=True):
            strong = decide.choose_by_threshold(score, threshold)
            assert share == pytest.approx(strong.mean())
            assert reached == pytest.approx(np.where(strong, quality[:, 1], quality[:, 0]).mean())

    @given(tables(2), st.floats(0.01, 1))
    def test_cpt_share_reaches_its_target_and_a_dip_cannot_hurt(self, data, wanted):
        score, quality = data[0][:, 0], data[1]
        curve = metrics.threshold_curve(score, quality[:, 0], quality[:, 1])
        share = metrics.cpt(curve, wanted)
        if curve.strong <= curve.cheap:
            assert share is None
            return
        assert 0 <= share <= 1
        reached = metrics.quality_at_share(curve, share)
        assert reached >= curve.cheap + wanted * (curve.strong - curve.cheap) - 1e-9
        assert metrics.cpt(curve, wanted / 2) <= share + 1e-12


class TestOracle:
    @given(tables(3), st.randoms(use_true_random=False))
    def test_no_router_beats_the_oracle(self, data, random):
        quality, cost, _ = data
        best = metrics.oracle(quality, cost)
        other = np.array([random.randrange(3) for _ in quality])
        got, ideal = metrics.picked(quality, other), metrics.picked(quality, best)
        assert np.all(ideal >= got)
        tie = ideal == got
        assert np.all(metrics.picked(cost, best)[tie] <= metrics.picked(cost, other)[tie])

    @given(tables(3), st.sampled_from([0.0, 0.5, 3.0]))
    def test_regret_is_zero_only_for_the_reward_oracle(self, data, weight):
        quality, cost, estimate = data
        reward = quality - weight * cost
        assert np.all(metrics.regret(reward, metrics.reward_oracle(reward, cost)) == 0)
        assert np.all(metrics.regret(reward, decide.choose(estimate, cost, weight)) >= 0)

    def test_the_oracle_pays_where_nobody_is_right(self):
        assert metrics.oracle([[0, 0, 0.0]], [[3, 1, 2]]).tolist() == [1]

    def test_chance_is_the_spread_of_all_permutations(self):
        random = np.random.default_rng(0)
        quality = random.random((5, 3))
        decision = np.array([0, 2, 2, 1, 0])
        means = [metrics.picked(quality, decision[list(p)]).mean() for p in itertools.permutations(range(5))]
        assert metrics.chance_sd(quality, np.eye(3)[decision]) == pytest.approx(np.std(means), abs=1e-12)
        assert metrics.chance_sd(quality, np.eye(3)[np.zeros(5, int)]) == 0.0  # one model for all: nothing to deal out
        assert metrics.chance_sd(quality[:1], np.eye(3)[:1]) == 0.0

    def test_shuffled(self):
        quality = np.array([[1, 0], [0, 1.0]])
        assert metrics.shuffled_quality(quality, [0, 1]).tolist() == [0.5, 0.5]
        with pytest.raises(UserError, match="3 decisions do not fit 2"):
            metrics.picked(quality, [0, 1, 1])


class TestCalibration:
    @given(st.lists(st.tuples(st.booleans(), QUARTERS), min_size=1, max_size=40))
    def test_auroc_is_the_pair_count(self, rows):
        labels, scores = np.array([r[0] for r in rows]), np.array([r[1] for r in rows])
        up, down = scores[labels], scores[~labels]
        found = metrics.auroc(labels, scores)
        if not len(up) or not len(down):
            assert found is None and metrics.youden(labels, scores) is None
            return
        pairs = (up[:, None] > down).mean() + 0.5 * (up[:, None] == down).mean()
        assert found == pytest.approx(pairs)
        assert metrics.auroc(labels, -scores) == pytest.approx(1 - pairs)

    def test_labels_and_scores_cannot_be_swapped_unnoticed(self):
        with pytest.raises(UserError, match="labels must be 0 or 1"):
            metrics.auroc(np.array([0.2, 0.7]), np.array([0, 1]))

    def test_youden_against_brute_force(self):
        rng = np.random.default_rng(0)
        labels = rng.random(200) < 0.4
        scores = np.round(labels * 0.3 + rng.random(200), 1)
        threshold, accuracy = metrics.youden(labels, scores)
        gain = {t: (scores[labels] >= t).mean() - (scores[~labels] >= t).mean() for t in np.unique(scores)}
        assert gain[threshold] == pytest.approx(max(gain.values()))
        assert accuracy == pytest.approx(((scores >= threshold) == labels).mean())

    def test_brier_and_ece(self):
        assert metrics.brier([0.5, 1.0], [1, 1]) == 0.125
        rng = np.random.default_rng(0)
        p = rng.random(50_000)
        assert metrics.ece(p, rng.random(50_000) < p) < 0.02
        assert metrics.ece(np.full(10, 0.9), np.repeat([0, 1], 5)) == pytest.approx(0.4)
        diagram = metrics.reliability(p, p, bins=10)
        assert len(diagram.count) == 10 and diagram.ece == pytest.approx(0) and np.ptp(diagram.count) <= 1

    @given(st.lists(st.tuples(QUARTERS, QUARTERS), min_size=1, max_size=30), st.integers(1, 12))
    def test_equal_estimates_stay_together(self, rows, bins):
        estimate, quality = np.array(rows).T
        diagram = metrics.reliability(estimate, quality, bins)
        assert diagram.count.sum() == len(rows) and np.all(np.diff(diagram.estimate) > 0) and 0 <= diagram.ece <= 1


class TestCollapse:
    def test_one_model(self):
        found = metrics.collapse(np.zeros(50, int), 3)
        assert found.collapsed and found.top_share == 1 and found.entropy == 0 and found.mutual_information is None

    def test_table_in_disguise(self):
        decision = np.tile([0, 1, 2, 3], 25)
        found = metrics.collapse(decision, 4, np.array(list("abcd") * 25))
        assert found.entropy == pytest.approx(2) and found.entropy_share == pytest.approx(1)
        assert found.mutual_information == pytest.approx(2) and not found.collapsed

    def test_chance_level_of_the_information(self):
        rng = np.random.default_rng(0)
        found = [metrics.collapse(rng.integers(3, size=2000), 3, rng.integers(5, size=2000)) for _ in range(60)]
        assert np.mean([f.mutual_information for f in found]) == pytest.approx(found[0].chance, rel=0.25)

