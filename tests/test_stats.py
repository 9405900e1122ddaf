"""The bootstrap: the same resamples at every call, right against closed forms and scipy, exact in its sums."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from routewright import metrics, stats
from routewright.errors import UserError

settings.register_profile("steady", deadline=None)  # a busy machine must not fail a property
settings.load_profile("steady")

PINNED = [[1, 0, 2, 2, 0, 1], [1, 0, 1, 1, 2, 1], [0, 1, 2, 2, 0, 1]]


def all_counts(resampler):
    return np.concatenate([c.copy() for _, _, c in resampler.counts()], axis=1)


class TestCounts:
    @pytest.mark.parametrize("n", [1, 2, 300, 8192, 8193, 20_000])
    def test_every_resample_draws_n(self, n):
        counts = all_counts(stats.Resampler(n, 20, 1))
        assert counts.shape == (20, n) and np.all(counts.sum(axis=1) == n)

    @pytest.mark.parametrize("n", [300, 8192, 20_000])
    def test_numba_and_numpy_draw_the_same(self, n, monkeypatch):
        plain = all_counts(stats.Resampler(n, 30, 7))
        monkeypatch.setattr(stats, "SMALL", 0)
        assert np.array_equal(plain, all_counts(stats.Resampler(n, 30, 7)))

    def test_same_key_same_resamples_and_a_prefix(self):
        one, again = all_counts(stats.Resampler(9000, 12, 3)), all_counts(stats.Resampler(9000, 12, 3))
        assert np.array_equal(one, again)
        assert np.array_equal(one[:5], all_counts(stats.Resampler(9000, 5, 3)))
        assert not np.array_equal(one, all_counts(stats.Resampler(9000, 12, 4)))

    def test_the_generator_never_moves(self):
        """These draws are part of every reported interval; a change of generator must be seen."""
        assert all_counts(stats.Resampler(6, 3, 0)).tolist() == PINNED

    def test_counts_look_like_a_multinomial(self):
        counts = all_counts(stats.Resampler(12_000, 200, 5)).astype(float)
        n = 12_000
        assert counts.var() == pytest.approx(1 - 1 / n, rel=0.01)
        shares = np.bincount(counts.astype(int).ravel(), minlength=4)[:4] / counts.size
        assert shares == pytest.approx([np.exp(-1), np.exp(-1), np.exp(-1) / 2, np.exp(-1) / 6], rel=0.01)
        # no prompt is favoured: column sums are themselves multinomial
        chi = ((counts.sum(axis=0) - 200) ** 2 / 200).sum()
        assert abs(chi - n) < 5 * np.sqrt(2 * n)
        # resamples are independent of one another, and neighbouring prompts nearly so
        assert abs(np.corrcoef(counts[0], counts[1])[0, 1]) < 0.05
        assert abs(np.mean((counts[:, 1:] - 1) * (counts[:, :-1] - 1))) < 0.01



class TestMeans:
    def test_equal_to_a_gather(self):
        rng = np.random.default_rng(0)
        values = rng.normal(size=(9000, 3)) * [1, 1e-6, 1e4]
        resampler = stats.Resampler(9000, 25, 2)
        direct = all_counts(resampler) @ values / 9000
        assert resampler.means(values) == pytest.approx(direct, rel=1e-9, abs=1e-12)
        assert np.array_equal(resampler.means(values)[:, 1], resampler.means(values[:, 1]))
        assert np.array_equal(stats.resample_means(values, 25, 2), resampler.means(values))

    def test_sums_do_not_depend_on_the_order_of_summation(self):
        rng = np.random.default_rng(0)
        values = rng.lognormal(size=(5000, 5))
        resampler = stats.Resampler(5000, 40, 0)
        wide = np.concatenate([values, rng.normal(size=(5000, 30))], axis=1)
        assert np.array_equal(resampler.means(wide)[:, :5], resampler.means(values))

    def test_equal_columns_differ_by_exactly_nothing(self):
        values = np.random.default_rng(0).random(20_000)
        means = stats.resample_means(np.stack([values, values], axis=1), 50)
        assert np.all(means[:, 0] == means[:, 1])

    @pytest.mark.parametrize("n", [200, 10_000])
    def test_standard_error_and_coverage_of_the_mean(self, n):
        values = np.random.default_rng(n).lognormal(size=n)
        means = stats.resample_means(values, 2000, 3)
        assert means.std() == pytest.approx(values.std() / np.sqrt(n), rel=0.06)
        assert means.mean() == pytest.approx(values.mean(), abs=5 * values.std() / np.sqrt(n * 2000))

    def test_interval_covers_the_truth(self):
        rng = np.random.default_rng(1)
        hits = 0
        for trial in range(200):
            lo, hi = stats.interval(stats.resample_means(rng.random(100), 200, trial))
            hits += lo <= 0.5 <= hi
        assert 0.88 <= hits / 200 <= 0.99

    def test_agrees_with_scipy(self):
        scipy_stats = pytest.importorskip("scipy.stats")
        rng = np.random.default_rng(4)
        a, b = rng.random(500) < 0.7, rng.random(500) < 0.6
        for values in (a + 0.0, rng.lognormal(size=500), a * 1.0 - b):
            theirs = scipy_stats.bootstrap((values,), np.mean, n_resamples=4000, method="percentile", vectorized=True,
                                           rng=np.random.default_rng(0)).confidence_interval
            lo, hi = stats.interval(stats.resample_means(values, 4000, 0))
            # standard error of a 2.5 % quantile from B normal draws: sqrt(p(1-p)/B)/density = 2.67 sd / sqrt(B)
            margin = 3 * np.sqrt(2) * 2.67 * values.std() / np.sqrt(500) / np.sqrt(4000)
            assert lo == pytest.approx(theirs.low, abs=margin) and hi == pytest.approx(theirs.high, abs=margin)

    def test_paired_difference_is_tighter(self):
        rng = np.random.default_rng(0)
        base = rng.random(1000)
        resampler = stats.Resampler(1000, 500)
        found = resampler.paired_difference(base + 0.01, base)
        assert found.lo == pytest.approx(0.01) and found.hi == pytest.approx(0.01) and found.verdict == "beats"
        assert resampler.paired_difference(base, base).verdict == "ties"
        assert resampler.paired_difference(base - 0.01, base).verdict == "loses"

    def test_ratio_of_a_subset(self):
        rng = np.random.default_rng(0)
        values, mask = rng.random((3000, 2)), rng.random(3000) < 0.1
        resampler = stats.Resampler(3000, 400)
        counts = all_counts(resampler)
        direct = (counts * mask) @ values / (counts * mask).sum(axis=1, keepdims=True)
        assert resampler.ratio_means(values, mask) == pytest.approx(direct)
        values[~mask] = np.nan
        assert stats.resample_means(values, 400, 0, mask) == pytest.approx(direct)
        assert np.isnan(resampler.ratio_means(values[:, 0], np.zeros(3000))).all()

    def test_refusals(self):
        resampler = stats.Resampler(3, 5)
        with pytest.raises(UserError, match="over 3 prompts, but the values have 2"):
            resampler.means(np.zeros(2))
        with pytest.raises(UserError, match="column 1 of the values holds nan"):
            resampler.means(np.array([[0, np.nan]] * 3))
        with pytest.raises(UserError, match="at least one prompt"):
            stats.Resampler(0)

    def test_booleans_and_small_floats_are_fine(self):
        assert stats.resample_means(np.ones(7, bool), 5).tolist() == [1.0] * 5
        assert stats.resample_means(np.zeros((4, 2), np.float32), 5).max() == 0
        assert stats.resample_means(np.full(5000, 1e-300), 3) == pytest.approx(1e-300)


class TestIntervals:
    def test_nan_resamples_are_left_out(self):
        lo, hi = stats.interval(np.array([[0.0, np.nan], [1.0, np.nan], [np.nan, np.nan]]))
        assert (lo[0], hi[0]) == (pytest.approx(0.025), pytest.approx(0.975)) and np.isnan([lo[1], hi[1]]).all()
        assert stats.interval(np.arange(101.0), 0.5) == (25.0, 75.0)

    def test_verdicts(self):
        bounds = (0.1, 0.2), (-0.1, 0.2), (-0.2, -0.1), (0, 0)
        assert [stats.verdict(*b) for b in bounds] == ["beats", "ties", "loses", "ties"]

    def test_seeds(self):
        rng = np.random.default_rng(0)
        prompt, effect = rng.random(800), np.array([-0.02, 0.0, 0.02])
        found = stats.over_seeds(prompt + effect[:, None], stats.Resampler(800, 500))
        assert found.seed_sd == pytest.approx(0.02) and found.value == pytest.approx(prompt.mean())
        assert (found.hi - found.lo) == pytest.approx(2 * 1.96 * prompt.std() / np.sqrt(800), rel=0.15)
        assert np.isnan(stats.over_seeds(prompt[None], stats.Resampler(800, 50)).seed_sd)


class TestCurve:
    def outcomes(self, n=3000, seed=0):
        rng = np.random.default_rng(seed)
        easy = rng.random(n)
        weak, strong = (rng.random(n) < easy) + 0.0, (rng.random(n) < 0.4 + 0.6 * easy) + 0.0
        return np.clip(easy + rng.normal(0, 0.2, n), 0, 1), weak, strong

    def test_classes_agree_with_resampling_the_prompts(self):
        score, weak, strong = self.outcomes()
        fast = stats.curve_intervals(score, weak, strong, 21, 3000)
        slow = stats.curve_intervals(score, weak, strong, 21, 3000, max_classes=0)
        assert (fast.method, slow.method) == ("classes", "classes")  # 0/1 outcomes always have four classes
        slow = stats.curve_intervals(score, weak + 1e-9 * np.arange(3000), strong, 21, 3000, seed=1)
        assert slow.method == "resamples"
        assert fast.quality == pytest.approx(slow.quality, abs=1e-5)
        margin = 3 * np.sqrt(2) * 2.67 * np.sqrt(0.25 / 3000) / np.sqrt(3000)
        for key in ("quality_lo", "quality_hi", "strong_share_lo", "strong_share_hi"):
            assert getattr(fast, key) == pytest.approx(getattr(slow, key), abs=margin), key
        assert fast.apgr.lo == pytest.approx(slow.apgr.lo, abs=0.006)
        assert fast.apgr.hi == pytest.approx(slow.apgr.hi, abs=0.006)

    def test_points_are_those_of_the_thresholds(self):
        score, weak, strong = self.outcomes(500)
        found = stats.curve_intervals(score, weak, strong, np.array([0.1, 0.4, 0.4, 0.9]), 50)
        for threshold, share, quality in zip(found.thresholds, found.strong_share, found.quality, strict=True):
            to_strong = score < threshold
            assert share == pytest.approx(to_strong.mean())
            assert quality == pytest.approx(np.where(to_strong, strong, weak).mean())

    def test_few_distinct_qualities_use_classes_too(self):
        score, weak, strong = self.outcomes(800)
        found = stats.curve_intervals(score, weak / 2, strong, 11, 100)
        assert found.method == "classes" and found.quality[0] == pytest.approx(weak.mean() / 2)
        assert found.quality[-1] == pytest.approx(strong.mean()) and found.strong_share[[0, -1]].tolist() == [0, 1]

    def test_apgr_is_that_of_the_full_curve_up_to_the_grid(self):
        score, weak, strong = self.outcomes(4000)
        exact = metrics.apgr(metrics.threshold_curve(score, weak, strong))
        found = stats.curve_intervals(score, weak, strong, 401, 200)
        assert found.apgr.value == pytest.approx(exact, abs=2e-3) and found.apgr.lo < exact < found.apgr.hi
        assert found.apgr_undefined == 0

    def test_equal_models_have_no_apgr(self):
        found = stats.curve_intervals(np.linspace(0, 1, 50), np.ones(50), np.ones(50), 5, 20)
        assert found.apgr is None and found.apgr_undefined == 1

    @given(st.integers(1, 60), st.integers(2, 9), st.integers(0, 5))
    def test_any_size_and_ties(self, n, t, seed):
        rng = np.random.default_rng(seed)
        score = rng.integers(0, 3, n) / 2
        found = stats.curve_intervals(score, rng.integers(0, 2, n), rng.integers(0, 2, n), t, 20, seed)
        assert np.all(np.diff(found.strong_share) >= 0) and np.all(found.quality_lo <= found.quality_hi)

    def test_refusals(self):
        with pytest.raises(UserError, match="ascending"):
            stats.curve_intervals(np.zeros(3), np.zeros(3), np.zeros(3), np.array([0.5, 0.1]))


def test_importing_is_light(root):
    code = ("import sys, routewright.stats, routewright.decide, routewright.metrics; "
            "print([m for m in ('numba', 'scipy', 'pandas') if m in sys.modules])")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=root,
                          env={"PYTHONPATH": "src", "PATH": "/usr/bin"})
    assert done.stdout.strip() == "[]", done.stderr


def test_a_tree_without_a_writable_cache_compiles_in_memory(monkeypatch):
    import numba

    plain = numba.njit

    def njit(*args, cache=False, **options):
        if cache:
            raise RuntimeError("cannot cache function: no locator available")
        return plain(*args, **options)

    monkeypatch.setattr(numba, "njit", njit)
    kernel = stats.compiled.__wrapped__(stats._count_draws)
    out = np.empty((1, 5), np.uint8)
    kernel(np.array([7], np.uint64), np.array([5]), out)
    assert out.sum() == 5
