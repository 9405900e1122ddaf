"""Intervals: one paired bootstrap over prompts for everything that is reported.

A resample draws N prompts out of N with replacement. The counts of every resample come from a counter-based
generator keyed by (seed, resample, block of prompts), so that two calls with the same (n, n_resamples, seed) see
the same resamples, in any process, without storing them: every router, metric and control is judged on the same
draws, and the difference of two columns has an interval of its own.

How the means are computed: prompts go through in blocks of 8,192. The draws are split over the blocks by an exact
multinomial, counted inside a block, and multiplied with the block's values. Values are rounded to a fixed-point grid
on which all sums are whole numbers below 2**53, so a sum does not depend on the order of summation, on the BLAS or
on the number of threads. The grid costs at most n * largest * 2**-52 of a value (1e-10 of the largest at a
million prompts). Memory is O(n_resamples * (K + 8192)), whatever N.

Intervals are percentile intervals. Two-model threshold curves over outcomes with few distinct values have a shortcut
whose cost does not grow with N: see `curve_intervals`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from routewright.errors import UserError

BLOCK = 8192  # prompts a block: a resample's counts (uint8) stay in the first-level cache; 2**13, see _count_draws
SLICE = 1024  # prompts a matrix product: n_resamples x SLICE float64 counts stay near the core
SMALL = 4_000_000  # draws up to which plain numpy is quicker than importing numba
KEPT = 64 * 2**20  # bytes of counts a Resampler keeps between calls

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)  # splitmix64 (Steele, Lea, Flood 2014): increment and the two multipliers
_MIX1 = np.uint64(0xBF58476D1CE4E5B9)
_MIX2 = np.uint64(0x94D049BB133111EB)
_S30, _S27, _S31, _S32 = np.uint64(30), np.uint64(27), np.uint64(31), np.uint64(32)
_S3, _S16, _S48 = np.uint64(3), np.uint64(16), np.uint64(48)
_LOW16, _LOW32 = np.uint64(0xFFFF), np.uint64(0xFFFFFFFF)


@functools.cache
def compiled(function: Callable) -> Callable:
    """The numba form of a module-level function, compiled on first use and cached on disk where that is possible."""
    import numba

    try:
        return numba.njit(cache=True, nogil=True)(function)
    except RuntimeError:  # no writable place for the cache: compile in memory, once a process
        return numba.njit(nogil=True)(function)


def interval(samples: np.ndarray, level: float = 0.95) -> tuple[Any, Any]:
    """Percentile interval over axis 0 of `samples` (B,) or (B, K). Returns (lo, hi), floats or (K,) arrays.

    Resamples in which a ratio was undefined (nan) are left out; nan where all of them were.
    """
    samples = np.asarray(samples, dtype=float)
    tail = (1.0 - level) / 2.0
    if np.isnan(samples).any():
        import warnings

        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)  # all-nan columns answer nan
            lo, hi = np.nanquantile(samples, [tail, 1.0 - tail], axis=0)
    else:
        lo, hi = np.quantile(samples, [tail, 1.0 - tail], axis=0)
    return (float(lo), float(hi)) if samples.ndim == 1 else (lo, hi)


def verdict(lo: float, hi: float) -> str:
    """What the interval of a difference (router minus control) says: "beats", "ties" or "loses"."""
    return "beats" if lo > 0 else "loses" if hi < 0 else "ties"


@dataclass(frozen=True)
class Interval:
    """A value with its percentile interval."""

    value: float
    lo: float
    hi: float

    @property
    def verdict(self) -> str:
        """For a difference: "beats", "ties" or "loses"."""
        return verdict(self.lo, self.hi)

    def as_row(self) -> dict[str, float]:
        return {"value": self.value, "lo": self.lo, "hi": self.hi}


class Resampler:
    """`n_resamples` bootstrap resamples of `n` prompts, the same ones at every call.

    Resample b of seed s is the same whatever `n_resamples` is, so a smaller run is a prefix of a larger one.
    """

    def __init__(self, n: int, n_resamples: int = 1000, seed: int = 0):
        if n < 1 or n_resamples < 1:
            raise UserError(f"a bootstrap needs at least one prompt and one resample; got {n} and {n_resamples}")
        self.n, self.n_resamples, self.seed = int(n), int(n_resamples), int(seed)
        self._kept: list[np.ndarray] | None = None
        self._draws: np.ndarray | None = None

    def counts(self) -> Iterator[tuple[int, int, np.ndarray]]:
        """Yields (start, stop, counts (n_resamples, stop - start) uint8): how often each prompt was drawn.

        The array may be overwritten by the next step; copy what is to be kept.
        """
        bounds = [(a, min(a + BLOCK, self.n)) for a in range(0, self.n, BLOCK)]
        if self._kept is not None:
            yield from ((a, b, kept) for (a, b), kept in zip(bounds, self._kept, strict=True))
            return
        keep = [] if self.n * self.n_resamples <= KEPT else None
        buffer = None if keep is not None else np.empty((self.n_resamples, BLOCK), np.uint8)
        for block, (start, stop) in enumerate(bounds):
            out = np.empty((self.n_resamples, stop - start), np.uint8) if buffer is None else (
                buffer if stop - start == BLOCK else np.empty((self.n_resamples, stop - start), np.uint8))
            self.fill(block, 0, self.n_resamples, out)
            if keep is not None:
                keep.append(out)
            yield start, stop, out
        self._kept = keep

    def fill(self, block: int, first: int, last: int, out: np.ndarray) -> None:
        """Counts of resamples first..last-1 for one block of prompts into `out` (last - first, size of block)."""
        draws, states = self.keys(block)
        kernel = _count_draws_numpy if self.n * self.n_resamples <= SMALL else compiled(_count_draws)
        kernel(states[first:last], draws[first:last], out)

    def keys(self, block: int) -> tuple[np.ndarray, np.ndarray]:
        """(draws, states) of one block: how many draws fall in it and where its generator starts, per resample."""
        draws = np.ascontiguousarray(self._draws_per_block()[:, block])
        resample = np.arange(1, self.n_resamples + 1, dtype=np.uint64)
        with np.errstate(over="ignore"):  # 64-bit arithmetic wraps on purpose
            seed = _mix(np.uint64(self.seed % 2**64) + _GOLDEN)
            return draws, _mix(seed ^ _mix(resample * _GOLDEN + np.uint64(block) * _MIX2))

    def means(self, values: np.ndarray) -> np.ndarray:
        """Mean of each column of `values` (N,) or (N, K) on every resample. Returns (B,) or (B, K) float64."""
        values = np.asarray(values)
        columns = values.reshape(len(values), -1)
        if len(columns) != self.n:
            raise UserError(f"these resamples are over {self.n} prompts, but the values have {len(columns)} rows")
        largest = np.maximum(columns.max(axis=0), -columns.min(axis=0).astype(float)).astype(float)
        if not np.isfinite(largest).all():
            column = int(np.flatnonzero(~np.isfinite(largest))[0])
            raise UserError(f"column {column} of the values holds nan or inf; use ratio_means with a mask instead")
        means = self.stream(lambda start, stop: columns[start:stop], largest)
        return means[:, 0] if values.ndim == 1 else means

    def stream(self, block: Callable[[int, int], np.ndarray], largest: np.ndarray) -> np.ndarray:
        """`means` of values that are made block by block, for tables too large to hold.

        Args:
            block: (start, stop) -> (stop - start, K) values; called once for each block, in order
            largest: (K,) bound on the absolute value of each column
        Returns:
            (B, K) float64
        """
        scale = _grid(self.n, np.asarray(largest, dtype=float))
        total = np.zeros((self.n_resamples, len(scale)))
        product = np.empty_like(total)
        for start, stop, counts in self.counts():
            whole = np.rint(np.multiply(block(start, stop), scale, dtype=float))
            for a in range(0, stop - start, SLICE):
                part = slice(a, min(a + SLICE, stop - start))
                total += np.matmul(counts[:, part].astype(float), whole[part], out=product)
        return total / (scale * self.n)

    def ratio_means(self, values: np.ndarray, mask: np.ndarray) -> np.ndarray:
        """Mean over the prompts where `mask` holds (a subset, or non-negative weights), on every resample.

        `mask` is (N,) or the shape of `values`. A resample without any such prompt gives nan. Values under a zero
        mask may be nan.
        """
        values, mask = np.asarray(values, dtype=float), np.asarray(mask, dtype=float)
        columns = values.reshape(len(values), -1)
        weight = mask.reshape(len(mask), -1)
        weighted = np.where(weight > 0, columns, 0.0) * weight
        both = self.means(np.concatenate([weighted, weight], axis=1))
        top, bottom = both[:, :columns.shape[1]], both[:, columns.shape[1]:]
        with np.errstate(invalid="ignore", divide="ignore"):
            ratio = np.where(bottom > 0, top / bottom, np.nan)
        return ratio[:, 0] if values.ndim == 1 else ratio

    def mean_interval(self, values: np.ndarray, level: float = 0.95) -> Interval:
        """Mean of (N,) values with its interval."""
        return Interval(float(np.mean(values)), *interval(self.means(values), level))

    def paired_difference(self, a: np.ndarray, b: np.ndarray, level: float = 0.95) -> Interval:
        """Mean of a - b, both (N,) over the same prompts, with the interval of the paired bootstrap."""
        return self.mean_interval(np.asarray(a, dtype=float) - np.asarray(b, dtype=float), level)

    def _draws_per_block(self) -> np.ndarray:
        """(B, blocks) int64: the exact multinomial split of the N draws over the blocks."""
        if self._draws is None:
            sizes = np.diff(np.append(np.arange(0, self.n, BLOCK), self.n))
            if len(sizes) == 1:
                self._draws = np.full((self.n_resamples, 1), self.n, np.int64)
            else:
                rng = np.random.default_rng([self.seed % 2**64, self.n])
                self._draws = rng.multinomial(self.n, sizes / self.n, size=self.n_resamples)
        return self._draws


def resample_means(values: np.ndarray, n_resamples: int = 1000, seed: int = 0,
                   weights_mask: np.ndarray | None = None) -> np.ndarray:
    """Means of the columns of `values` (N,) or (N, K) on one set of paired resamples. Returns (B,) or (B, K).

    `weights_mask` (N,) or (N, K) limits each mean to some prompts, or weighs them; see `Resampler.ratio_means`.
    """
    values = np.asarray(values)
    resampler = Resampler(len(values), n_resamples, seed)
    return resampler.means(values) if weights_mask is None else resampler.ratio_means(values, weights_mask)


@dataclass(frozen=True)
class SeedSummary:
    """A quantity over training seeds. The interval is over prompts, with the mean over seeds as the statistic;
    `seed_sd` is the standard deviation between the seeds (n - 1), nan for one seed."""

    value: float
    lo: float
    hi: float
    seed_sd: float
    per_seed: tuple[float, ...]

    @property
    def verdict(self) -> str:
        return verdict(self.lo, self.hi)


def over_seeds(values: np.ndarray, resampler: Resampler, level: float = 0.95) -> SeedSummary:
    """Summary of `values` (S, N): one row a seed, the same prompts in the same order in each.

    All seeds share the prompt resamples, so prompt noise and seed noise are told apart rather than added.
    """
    values = np.asarray(values, dtype=float)
    per_seed = values.mean(axis=1)
    lo, hi = interval(resampler.means(values.mean(axis=0)), level)
    sd = float(per_seed.std(ddof=1)) if len(per_seed) > 1 else float("nan")
    return SeedSummary(float(per_seed.mean()), lo, hi, sd, tuple(float(v) for v in per_seed))


# ---- threshold curves of a two-model pool ------------------------------------------------------------------------


@dataclass(frozen=True)
class CurveIntervals:
    """A threshold curve with pointwise intervals; all arrays (T,), shares and qualities in [0, 1].

    `apgr` is None where the strong model is not better than the cheap one. `apgr_undefined` is the share of resamples
    in which that was so; they are left out of its interval.
    """

    thresholds: np.ndarray
    strong_share: np.ndarray
    strong_share_lo: np.ndarray
    strong_share_hi: np.ndarray
    quality: np.ndarray
    quality_lo: np.ndarray
    quality_hi: np.ndarray
    apgr: Interval | None
    apgr_undefined: float
    method: str  # "classes" (exact, independent of N) or "resamples"


def curve_intervals(score: np.ndarray, cheap_quality: np.ndarray, strong_quality: np.ndarray,
                    thresholds: np.ndarray | int = 101, n_resamples: int = 1000, seed: int = 0,
                    level: float = 0.95, max_classes: int = 64) -> CurveIntervals:
    """Quality over the share of strong calls for every threshold, with intervals.

    A prompt goes to the strong model where its score, P(cheap suffices), is below the threshold. All that a resample
    can change is how many prompts fall in each cell (bin between two thresholds x pair of outcomes). For 0/1 outcomes
    there are four pairs, so the cell counts are one multinomial draw: exactly the bootstrap, at a cost that
    does not depend on N. With more than `max_classes` distinct pairs the prompts themselves are resampled.

    Args:
        score: (N,) in [0, 1], higher = the cheap model is enough
        cheap_quality, strong_quality: (N,)
        thresholds: ascending grid, or how many to place at quantiles of the score (both ends included)
    """
    score = np.asarray(score, dtype=float)
    pair = np.stack([np.asarray(cheap_quality, dtype=float), np.asarray(strong_quality, dtype=float)], axis=1)
    grid = _threshold_grid(score, thresholds)
    bins = np.searchsorted(grid, score, side="right")  # strong at setting j where bins <= j
    classes, member = _outcome_classes(pair, max_classes)
    n, t = len(score), len(grid)
    if classes is not None:
        cells = np.bincount(bins * len(classes) + member, minlength=(t + 1) * len(classes))
        drawn = np.random.default_rng([seed % 2**64, n]).multinomial(n, cells / n, size=n_resamples)
        table = np.concatenate([cells[None], drawn]).reshape(n_resamples + 1, t + 1, len(classes))
        share, low, high = table.sum(axis=2), table @ classes[:, 0], table @ classes[:, 1]
        method, whole = "classes", float(n)
    else:
        columns = _bin_columns(bins, pair, t)
        stacked = Resampler(n, n_resamples, seed).means(columns)
        stacked = np.concatenate([columns.mean(axis=0)[None], stacked]).reshape(n_resamples + 1, 3, t + 1)
        share, low, high = stacked[:, 0], stacked[:, 1], stacked[:, 2]
        method, whole = "resamples", 1.0
    share, quality = _curve_from_bins(share, low, high, whole)
    apgr, undefined = _apgr_interval(share, quality, low.sum(axis=1) / whole, high.sum(axis=1) / whole, level)
    share_lo, share_hi = interval(share[1:], level)
    quality_lo, quality_hi = interval(quality[1:], level)
    return CurveIntervals(grid, share[0], share_lo, share_hi, quality[0], quality_lo, quality_hi, apgr, undefined,
                          method)


def _threshold_grid(score: np.ndarray, thresholds: np.ndarray | int) -> np.ndarray:
    if not np.isscalar(thresholds):
        grid = np.asarray(thresholds, dtype=float)
        if (np.diff(grid) < 0).any():
            raise UserError("thresholds must be in ascending order; sort them")
        return grid
    if thresholds < 2:
        raise UserError(f"a threshold curve needs at least 2 thresholds; got {thresholds}")
    inner = np.quantile(score, np.linspace(0.0, 1.0, int(thresholds) - 1))
    return np.append(inner, np.nextafter(inner[-1], np.inf))  # from no strong call to nothing but strong calls


def _outcome_classes(pair: np.ndarray, max_classes: int) -> tuple[np.ndarray | None, np.ndarray | None]:
    """Distinct rows of (N, 2) and each row's class; (None, None) where there are too many."""
    if ((pair == 0) | (pair == 1)).all():
        binary = np.array([[0.0, 0.0], [0.0, 1.0], [1.0, 0.0], [1.0, 1.0]])
        return binary, (pair[:, 0] * 2 + pair[:, 1]).astype(np.int64)
    if len(np.unique(pair[:, 0])) * len(np.unique(pair[:, 1])) > max_classes**2:
        return None, None
    classes, member = np.unique(pair, axis=0, return_inverse=True)
    return (classes, member.reshape(-1)) if len(classes) <= max_classes else (None, None)


def _bin_columns(bins: np.ndarray, pair: np.ndarray, t: int) -> np.ndarray:
    columns = np.zeros((len(bins), 3, t + 1))
    rows = np.arange(len(bins))
    columns[rows, 0, bins], columns[rows, 1, bins], columns[rows, 2, bins] = 1.0, pair[:, 0], pair[:, 1]
    return columns.reshape(len(bins), -1)


def _curve_from_bins(share: np.ndarray, low: np.ndarray, high: np.ndarray,
                     whole: float) -> tuple[np.ndarray, np.ndarray]:
    """(B, T + 1) sums by bin over `whole` prompts -> (B, T) strong share and quality at each threshold."""
    strong = np.cumsum(high, axis=1)[:, :-1]
    cheap = low.sum(axis=1, keepdims=True) - np.cumsum(low, axis=1)[:, :-1]
    return np.cumsum(share, axis=1)[:, :-1] / whole, (strong + cheap) / whole


def _apgr_interval(share: np.ndarray, quality: np.ndarray, low: np.ndarray, high: np.ndarray,
                   level: float) -> tuple[Interval | None, float]:
    """Row 0 is the data itself, the others are resamples. Ends are completed with the always-one-model points."""
    x = np.concatenate([np.zeros((len(share), 1)), share, np.ones((len(share), 1))], axis=1)
    y = np.concatenate([low[:, None], quality, high[:, None]], axis=1)
    with np.errstate(invalid="ignore", divide="ignore"):
        apgr = np.where(high > low, (np.trapezoid(y, x, axis=1) - low) / (high - low), np.nan)
    undefined = float(np.isnan(apgr[1:]).mean())
    if np.isnan(apgr[0]):
        return None, undefined
    return Interval(float(apgr[0]), *interval(apgr[1:], level)), undefined


# ---- the generator -------------------------------------------------------------------------------------------------


def _mix(z: np.ndarray) -> np.ndarray:
    """The splitmix64 finaliser on uint64 arrays."""
    z = (z ^ (z >> _S30)) * _MIX1
    z = (z ^ (z >> _S27)) * _MIX2
    return z ^ (z >> _S31)


def _grid(n: int, largest: np.ndarray) -> np.ndarray:
    """Powers of two by which values are multiplied so that n of the largest stay below 2**52."""
    exponent = np.frexp(n * largest)[1]
    return np.where(largest > 0, np.ldexp(1.0, np.clip(52 - exponent, -1000, 1000)), 1.0)


def _count_draws(states: np.ndarray, draws: np.ndarray, out: np.ndarray) -> None:
    """Draws for each resample (row) of one block of prompts, counted into `out` (B, m) uint8.

    A full block takes four 13-bit positions from each 64-bit word, exactly uniform. Another block takes two
    positions from 32 bits each, uniform to m / 2**32. Run through `compiled`; `_count_draws_numpy` must agree with it.
    """
    size = out.shape[1]
    m = np.uint64(size)
    for b in range(out.shape[0]):
        row = out[b]
        row[:] = 0
        state = states[b]
        left = draws[b]
        while left > 0:
            state = state + _GOLDEN
            z = state
            z = (z ^ (z >> _S30)) * _MIX1
            z = (z ^ (z >> _S27)) * _MIX2
            z = z ^ (z >> _S31)
            if size == BLOCK:
                row[(z & _LOW16) >> _S3] += 1
                if left > 3:
                    row[((z >> _S16) & _LOW16) >> _S3] += 1
                    row[((z >> _S32) & _LOW16) >> _S3] += 1
                    row[(z >> _S48) >> _S3] += 1
                else:
                    if left > 1:
                        row[((z >> _S16) & _LOW16) >> _S3] += 1
                    if left > 2:
                        row[((z >> _S32) & _LOW16) >> _S3] += 1
                left -= 4
            else:
                row[((z & _LOW32) * m) >> _S32] += 1
                if left > 1:
                    row[((z >> _S32) * m) >> _S32] += 1
                left -= 2


def _count_draws_numpy(states: np.ndarray, draws: np.ndarray, out: np.ndarray) -> None:
    """The same counts as `_count_draws` without numba, for small work."""
    m = out.shape[1]
    shifts = np.array([0, 16, 32, 48] if m == BLOCK else [0, 32], np.uint64)
    per_word = len(shifts)
    with np.errstate(over="ignore"):  # 64-bit arithmetic wraps on purpose
        for b in range(len(out)):
            words = -(-int(draws[b]) // per_word)
            z = _mix(states[b] + np.arange(1, words + 1, dtype=np.uint64) * _GOLDEN)
            piece = z[:, None] >> shifts
            where = (piece & _LOW16) >> _S3 if m == BLOCK else ((piece & _LOW32) * np.uint64(m)) >> _S32
            out[b] = np.bincount(where.reshape(-1)[:draws[b]].astype(np.int64), minlength=m)
