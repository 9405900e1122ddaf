"""From estimates to decisions: the one place where predicted quality and cost become a choice of model.

The rule is argmax over the pool of `estimate - cost_weight * expected cost`. The cost weight is in quality per
dollar: at 0 the best estimate wins, and the larger it is, the cheaper the choice. A router may only use what it can
know before any call, so the cost in the rule is the expected one (see `expected_cost`); scores count the recorded cost.

Sweeping all cost weights traces the cost-quality curve. `sweep_scores` and `sweep_intervals` do so without ever
holding the (T, N) table of decisions, so a million prompts x 20 models x 101 settings with 1,000 resamples fit in
little more than the estimates themselves.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from routewright.errors import UserError
from routewright.pool import price_per_call
from routewright.stats import BLOCK, Resampler, compiled, interval

if TYPE_CHECKING:
    from routewright.outcomes import OutcomeTable

SMALL_SWEEP = 30_000_000  # N x M x T up to which plain numpy is quicker than importing numba
LANES = 32  # resamples side by side in the sweep kernel: one block's counts (256 KB) stay in the second-level cache
SAMPLE_FOR_WEIGHTS = 50_000  # prompts looked at to place the grid of cost weights


def expected_cost(train: OutcomeTable, prompts_table: OutcomeTable) -> np.ndarray:
    """Dollars a router may expect each model to cost on each prompt, before any call. Returns (N, M) float64.

    This prompt's own input tokens and the model's mean output tokens on the training prompts, at the pool's prices of
    `prompts_table`. Where a cache recorded money but no tokens, it is the model's mean recorded cost in training.
    """
    if train.models != prompts_table.models:
        raise UserError(f"expected cost needs the same models in the same order; the training outcomes have "
                        f"{', '.join(train.models)}, these have {', '.join(prompts_table.models)}")
    out = np.empty(prompts_table.quality.shape)
    for j, name in enumerate(prompts_table.models):
        model = prompts_table.pool[name]
        output_tokens = float(np.mean(train.output_tokens[:, j]))
        known = np.any(train.input_tokens[:, j] > 0) or output_tokens > 0
        if known:
            inputs = np.asarray(prompts_table.input_tokens[:, j], dtype=float)
            missing = inputs <= 0
            if missing.any():
                inputs = np.where(missing, np.mean(train.input_tokens[:, j]), inputs)
            out[:, j] = price_per_call(model, inputs, output_tokens)
        else:
            out[:, j] = np.mean(train.cost[:, j])
    return out


def choose(estimate: np.ndarray, expected_cost: np.ndarray, cost_weight: float) -> np.ndarray:
    """Column of the model with the largest `estimate - cost_weight * expected_cost`. Returns (N,) int64.

    Ties go to the cheaper model, then to the better estimate, then to the first column. A cost weight of inf means
    the cheapest model.

    Args:
        estimate: (N, M) predicted quality
        expected_cost: (N, M) or (M,) USD per answer
        cost_weight: quality per USD, 0 or more
    """
    estimate, cost = _checked(estimate, expected_cost)
    _check_weights(np.array([cost_weight]))
    return _choose(estimate, cost, float(cost_weight))


def cost_weights(estimate: np.ndarray, expected_cost: np.ndarray, n: int = 101) -> np.ndarray:
    """Ascending grid of at most `n` cost weights that spreads the settings over the whole curve. Returns (T,).

    Every prompt changes model at a few cost weights. The grid holds 0 (best estimate), quantiles of those, and one
    finite weight at which every prompt takes its cheapest model. Fewer than `n` come back where there are few
    distinct change points.
    """
    if n < 2:
        raise UserError(f"a sweep needs at least 2 cost weights; got {n}")
    estimate, cost = _checked(estimate, expected_cost)
    if len(estimate) > SAMPLE_FOR_WEIGHTS:
        rows = np.linspace(0, len(estimate) - 1, SAMPLE_FOR_WEIGHTS).astype(np.int64)
        estimate, cost = estimate[rows], cost[rows] if len(cost) > 1 else cost
    points = change_points(estimate, cost)
    if not len(points):
        return np.array([0.0, 1.0])
    gaps = np.diff(np.sort(cost, axis=1), axis=1)
    smallest = gaps[gaps > 1e-9 * max(float(cost.max()), 1e-300)].min(initial=np.inf)
    span = float(np.ptp(estimate)) or 1.0
    most = max(10.0 * span / smallest if np.isfinite(smallest) else 0.0, 2.0 * float(points.max()))
    # A setting between two change points is as good as one on them and safe from rounding.
    inner = np.quantile(points, (np.arange(n - 2) + 0.5) / max(n - 2, 1)) if n > 2 else np.empty(0)
    return np.unique(np.concatenate([[0.0], inner, [most]]))


def change_points(estimate: np.ndarray, expected_cost: np.ndarray) -> np.ndarray:
    """All cost weights at which the choice of some prompt changes, sorted. Returns (K,), K <= N * (M - 1)."""
    estimate, cost = _checked(estimate, expected_cost)
    cost = np.broadcast_to(cost, estimate.shape)
    current = _choose(estimate, cost, 0.0)
    found = []
    while len(current):
        rows = np.arange(len(current))
        saved = cost[rows, current][:, None] - cost
        lost = estimate[rows, current][:, None] - estimate
        with np.errstate(divide="ignore", invalid="ignore"):
            weight = np.where(saved > 0, np.maximum(lost, 0.0) / saved, np.inf)
        at = weight.min(axis=1)
        moving = np.isfinite(at)
        estimate, cost, weight, at = estimate[moving], cost[moving], weight[moving], at[moving]
        found.append(at)
        # Of the models that meet at this weight, the cheapest is the next choice.
        current = np.where(weight <= at[:, None] * (1 + 1e-12), cost, np.inf).argmin(axis=1)
    return np.sort(np.concatenate(found)) if found else np.empty(0)


def two_model_score(estimate: np.ndarray, cheap: int = 0, strong: int = 1) -> np.ndarray:
    """P(the cheap model suffices) from estimates (N, M): 0.5 * (1 + cheap - strong), in [0, 1]. Returns (N,)."""
    estimate = np.asarray(estimate, dtype=float)
    return np.clip(0.5 * (1.0 + estimate[:, cheap] - estimate[:, strong]), 0.0, 1.0)


def choose_by_threshold(score: np.ndarray, threshold: float) -> np.ndarray:
    """(N,) bool, true where the strong model is called: the score, P(cheap suffices), is below the threshold."""
    return np.asarray(score) < threshold


def sweep(estimate: np.ndarray, expected_cost: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Decisions at every cost weight. Returns (T, N) columns, int8 for pools of at most 127 models, else int16."""
    estimate, cost = _checked(estimate, expected_cost)
    weights = _check_weights(weights)
    out = np.empty((len(weights), len(estimate)), _index_type(estimate.shape[1]))
    for start, stop, chosen in _decisions(estimate, cost, weights):
        out[:, start:stop] = chosen.T
    return out


@dataclass(frozen=True)
class SweepScores:
    """What each cost weight reaches: mean quality (T,), mean USD per prompt (T,), share of calls per model (T, M)."""

    weights: np.ndarray
    quality: np.ndarray
    cost: np.ndarray
    share: np.ndarray


@dataclass(frozen=True)
class SweepIntervals(SweepScores):
    """SweepScores with the paired resamples (B, T) behind them and 95 % intervals (T,) at `level`."""

    quality_samples: np.ndarray
    cost_samples: np.ndarray
    quality_lo: np.ndarray
    quality_hi: np.ndarray
    cost_lo: np.ndarray
    cost_hi: np.ndarray


def sweep_scores(estimate: np.ndarray, expected_cost: np.ndarray, quality: np.ndarray, cost: np.ndarray,
                 weights: np.ndarray) -> SweepScores:
    """Mean quality, cost and calls of every setting in one pass over the prompts.

    Args:
        estimate: (N, M) predicted quality; expected_cost: (N, M) or (M,) USD, both known before the call
        quality, cost: (N, M) as recorded
        weights: (T,) cost weights
    """
    estimate, expected, quality, cost, weights = _tables(estimate, expected_cost, quality, cost, weights)
    walk = _Walk(quality, cost, weights)
    for start, stop, chosen in _decisions(estimate, expected, weights):
        walk.changes(start, stop, chosen)
    return SweepScores(weights, *walk.scores())


def sweep_values(estimate: np.ndarray, expected_cost: np.ndarray, quality: np.ndarray, cost: np.ndarray,
                 weights: np.ndarray, rows: slice | np.ndarray = slice(None)) -> tuple[np.ndarray, np.ndarray]:
    """Quality and cost of every prompt at every setting, for the prompts in `rows`. Returns two (T, R) float32."""
    shared = np.ndim(expected_cost) == 1
    estimate, expected, quality, cost, weights = _tables(
        estimate[rows], expected_cost if shared else expected_cost[rows], quality[rows], cost[rows], weights)
    out = np.empty((2, len(weights), len(estimate)), np.float32)
    for start, stop, chosen in _decisions(estimate, expected, weights):
        out[0, :, start:stop] = np.take_along_axis(quality[start:stop], chosen, axis=1).T
        out[1, :, start:stop] = np.take_along_axis(cost[start:stop], chosen, axis=1).T
    return out[0], out[1]


def sweep_intervals(estimate: np.ndarray, expected_cost: np.ndarray, quality: np.ndarray, cost: np.ndarray,
                    weights: np.ndarray, resampler: Resampler, level: float = 0.95) -> SweepIntervals:
    """`sweep_scores` with the paired bootstrap of every setting's quality and cost, on the resamples of `resampler`.

    Equal to resampling the (N, 2T) table of `sweep_values`, but without making it: as the cost weight grows a prompt
    changes model only a few times, so only the changes are weighted and the sums over settings follow by a
    running sum. All sums are whole numbers on a fixed-point grid, as in `stats`.
    """
    estimate, expected, quality, cost, weights = _tables(estimate, expected_cost, quality, cost, weights)
    n, t, b = len(estimate), len(weights), resampler.n_resamples
    if resampler.n != n:
        raise UserError(f"these resamples are over {resampler.n} prompts, but the estimates have {n} rows")
    walk = _Walk(quality, cost, weights)
    weigh = compiled(_weigh_changes) if walk.compiled or n * b > 2_000_000 else _weigh_changes_numpy
    samples = np.zeros((-(-b // LANES), t, 2, LANES))
    for (start, stop, chosen), (_, _, counts) in zip(_decisions(estimate, expected, weights), resampler.counts(),
                                                     strict=True):
        weigh(counts, *walk.changes(start, stop, chosen), samples)
    sums = np.cumsum(samples, axis=1).transpose(2, 0, 3, 1).reshape(2, -1, t)[:, :b]
    means = sums / (walk.scale[:, None, None] * n)
    quality_lo, quality_hi = interval(means[0], level)
    cost_lo, cost_hi = interval(means[1], level)
    return SweepIntervals(weights, *walk.scores(), means[0], means[1], quality_lo, quality_hi, cost_lo, cost_hi)


# ---- checks --------------------------------------------------------------------------------------------------------


def _checked(estimate: np.ndarray, expected_cost: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Estimate (N, M) and cost (N, M) or (1, M); UserError on shapes that do not fit and on nan."""
    estimate, cost = np.asarray(estimate), np.atleast_2d(np.asarray(expected_cost))
    if estimate.ndim != 2 or cost.shape not in (estimate.shape, (1, estimate.shape[-1])):
        raise UserError(f"estimates of shape {estimate.shape} do not fit expected costs of shape "
                        f"{np.shape(expected_cost)}; they must be (N, M) and (N, M) or (M,)")
    for name, array in (("estimate", estimate), ("expected cost", cost)):
        # A sum is nan or inf exactly when some entry is (finite values of this size cannot overflow it).
        if not np.isfinite(array.sum(dtype=float)):
            row, column = np.argwhere(~np.isfinite(array))[0]
            raise UserError(f"the {name} of prompt {row}, model {column} is {array[row, column]}; "
                            "a decision needs finite numbers")
    return estimate, cost


def _check_weights(weights: np.ndarray) -> np.ndarray:
    weights = np.asarray(weights, dtype=float)
    if weights.ndim != 1 or np.isnan(weights).any() or (weights < 0).any():
        raise UserError("cost weights must be numbers of 0 or more, quality per USD")
    return weights


def _tables(estimate, expected_cost, quality, cost, weights) -> tuple[np.ndarray, ...]:
    estimate, expected = _checked(estimate, expected_cost)
    quality, cost = np.asarray(quality), np.asarray(cost)
    for name, array in (("quality", quality), ("cost", cost)):
        if array.shape != estimate.shape:
            raise UserError(f"the recorded {name} has shape {array.shape}, the estimates have {estimate.shape}")
    return estimate, expected, quality, cost, _check_weights(weights)


def _index_type(m: int) -> type:
    return np.int8 if m <= 127 else np.int16


# ---- decisions, block by block -------------------------------------------------------------------------------------


def _choose(estimate: np.ndarray, cost: np.ndarray, weight: float) -> np.ndarray:
    value = -np.broadcast_to(cost, estimate.shape) if np.isinf(weight) else estimate - weight * cost
    best = value == value.max(axis=1, keepdims=True)
    if (best.sum(axis=1) == 1).all():
        return value.argmax(axis=1)
    cheapest = np.where(best, cost, np.inf)
    cheapest = best & (cheapest == cheapest.min(axis=1, keepdims=True))
    return np.where(cheapest, estimate, -np.inf).argmax(axis=1)


def _decisions(estimate: np.ndarray, cost: np.ndarray, weights: np.ndarray):
    """Yields (start, stop, chosen (rows, T)) over blocks of prompts; `chosen` is overwritten by the next step."""
    n, m = estimate.shape
    t = len(weights)
    shared = len(cost) == 1
    kernel = compiled(_choose_all) if n * m * t > SMALL_SWEEP else None
    finite = weights[np.isfinite(weights)]
    buffer = np.empty((min(n, BLOCK), t), _index_type(m))
    for start in range(0, n, BLOCK):
        stop = min(start + BLOCK, n)
        chosen = buffer[:stop - start]
        rows = np.ascontiguousarray(estimate[start:stop], dtype=float)
        price = np.ascontiguousarray(cost if shared else cost[start:stop], dtype=float)
        if kernel is None:
            for j, weight in enumerate(weights):
                chosen[:, j] = _choose(rows, price, weight)
        else:
            kernel(rows, price, finite, chosen[:, :len(finite)])
            if len(finite) < t:
                for j in np.flatnonzero(np.isinf(weights)):
                    chosen[:, j] = _choose(rows, price, np.inf)
        yield start, stop, chosen


def _choose_all(estimate: np.ndarray, cost: np.ndarray, weights: np.ndarray, chosen: np.ndarray) -> None:
    """`_choose` for all weights at once. Run through `compiled`: the inner loop over weights is vector code.

    Models come in the order in which ties are broken, so the first of equals wins by a strict comparison, and one that
    is no better than a cheaper one can be passed over for all weights.
    """
    n, m = estimate.shape
    t = len(weights)
    order = np.arange(m)
    best, which = np.empty(t), np.empty(t, np.int64)
    shared = cost.shape[0] == 1
    for i in range(n):
        row = 0 if shared else i
        for a in range(1, m):  # insertion sort from the order of the prompt before, which is nearly right
            j = order[a]
            e, c = estimate[i, j], cost[row, j]
            b = a
            while b > 0:
                other = order[b - 1]
                e2, c2 = estimate[i, other], cost[row, other]
                if c2 < c or (c2 == c and (e2 > e or (e2 == e and other < j))):
                    break
                order[b] = other
                b -= 1
            order[b] = j
        j = order[0]
        e, c = estimate[i, j], cost[row, j]
        highest = e
        for k in range(t):
            best[k] = e - weights[k] * c
            which[k] = j
        for a in range(1, m):
            j = order[a]
            e, c = estimate[i, j], cost[row, j]
            if e <= highest:
                continue
            highest = e
            for k in range(t):
                value = e - weights[k] * c
                better = value > best[k]
                best[k] = value if better else best[k]
                which[k] = j if better else which[k]
        for k in range(t):
            chosen[i, k] = which[k]


# ---- scores and bootstrap of a sweep -------------------------------------------------------------------------------


class _Walk:
    """Turns blocks of decisions into what changes from one setting to the next, and keeps the running totals.

    Quality and cost are rounded to a grid on which all their sums are whole numbers (see `stats`).
    """

    def __init__(self, quality: np.ndarray, cost: np.ndarray, weights: np.ndarray):
        self.quality, self.cost = quality, cost
        n, m = quality.shape
        t = len(weights)
        self.compiled = n * m * t > SMALL_SWEEP
        largest = np.array([np.abs(quality).max(), np.abs(cost).max()], dtype=float)
        if not np.isfinite(largest).all():
            raise UserError("the recorded quality or cost holds nan or inf; score only prompts with complete outcomes")
        self.scale = np.ldexp(1.0, np.clip(50 - np.frexp(n * np.maximum(largest, 1e-300))[1], -1000, 1000))
        self.totals, self.calls = np.zeros((2, t)), np.zeros((t, m), np.int64)

    def changes(self, start: int, stop: int, chosen: np.ndarray) -> tuple[np.ndarray, ...]:
        """(first (T + 1,), row (C,), quality change (C,), cost change (C,)) of one block, ordered by setting.

        first[k]:first[k + 1] are the changes at setting k; at setting 0 everything is a change.
        """
        quality = np.ascontiguousarray(self.quality[start:stop], dtype=float)
        cost = np.ascontiguousarray(self.cost[start:stop], dtype=float)
        find = compiled(_changes) if self.compiled else _changes_numpy
        return find(chosen, quality, cost, self.scale, self.totals, self.calls)

    def scores(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Mean quality (T,), mean cost (T,) and share of calls (T, M)."""
        quality, cost = np.cumsum(self.totals, axis=1) / (self.scale[:, None] * len(self.quality))
        return quality, cost, np.cumsum(self.calls, axis=0) / len(self.quality)


def _changes(chosen: np.ndarray, quality: np.ndarray, cost: np.ndarray, scale: np.ndarray, totals: np.ndarray,
             calls: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """See `_Walk.changes`; adds to `totals` (2, T) and `calls` (T, M). Run through `compiled`."""
    n, t = chosen.shape
    first = np.zeros(t + 1, np.int64)
    first[1] = n
    for i in range(n):
        for k in range(1, t):
            if chosen[i, k] != chosen[i, k - 1]:
                first[k + 1] += 1
    for k in range(t):
        first[k + 1] += first[k]
    size = first[t]
    row, dq, dc = np.empty(size, np.int64), np.empty(size), np.empty(size)
    place = first[:t].copy()
    for i in range(n):
        before = -1
        q0, c0 = 0.0, 0.0
        for k in range(t):
            now = chosen[i, k]
            if now == before:
                continue
            q, c = np.rint(quality[i, now] * scale[0]), np.rint(cost[i, now] * scale[1])
            at = place[k]
            place[k] = at + 1
            row[at] = i
            dq[at] = q - q0
            dc[at] = c - c0
            totals[0, k] += q - q0
            totals[1, k] += c - c0
            calls[k, now] += 1
            if before >= 0:
                calls[k, before] -= 1
            before, q0, c0 = now, q, c
    return first, row, dq, dc


def _changes_numpy(chosen: np.ndarray, quality: np.ndarray, cost: np.ndarray, scale: np.ndarray, totals: np.ndarray,
                   calls: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    n, t = chosen.shape
    m = calls.shape[1]
    turned = np.ascontiguousarray(chosen.T).astype(np.int64)
    changed = np.ones((t, n), bool)
    np.not_equal(turned[1:], turned[:-1], out=changed[1:])
    setting, row = np.nonzero(changed)
    later = setting > 0
    now, before = turned[setting, row], turned[setting[later] - 1, row[later]]
    calls += np.bincount(setting * m + now, minlength=t * m).reshape(t, m)
    calls -= np.bincount(setting[later] * m + before, minlength=t * m).reshape(t, m)
    moves = []
    for k, values in enumerate((quality, cost)):
        whole = np.rint(values * scale[k])
        move = whole[row, now]
        move[later] -= whole[row[later], before]
        totals[k] += np.bincount(setting, weights=move, minlength=t)
        moves.append(move)
    return np.searchsorted(setting, np.arange(t + 1)), row, moves[0], moves[1]


def _weigh_changes(counts: np.ndarray, first: np.ndarray, row: np.ndarray, dq: np.ndarray, dc: np.ndarray,
                   samples: np.ndarray) -> None:
    """Adds count x change of one block to `samples` (B / LANES, T, 2, LANES). Run through `compiled`."""
    b, n = counts.shape
    turned = np.zeros((n, LANES), np.uint8)
    total_q, total_c = np.empty(LANES), np.empty(LANES)
    for chunk in range(samples.shape[0]):
        lanes = min(LANES, b - chunk * LANES)
        for j in range(lanes):
            for i in range(n):
                turned[i, j] = counts[chunk * LANES + j, i]
        for k in range(samples.shape[1]):
            for j in range(LANES):
                total_q[j] = 0.0
                total_c[j] = 0.0
            for e in range(first[k], first[k + 1]):
                i, q, c = row[e], dq[e], dc[e]
                for j in range(LANES):
                    drawn = np.float64(turned[i, j])
                    total_q[j] += drawn * q
                    total_c[j] += drawn * c
            for j in range(lanes):
                samples[chunk, k, 0, j] += total_q[j]
                samples[chunk, k, 1, j] += total_c[j]


def _weigh_changes_numpy(counts: np.ndarray, first: np.ndarray, row: np.ndarray, dq: np.ndarray, dc: np.ndarray,
                         samples: np.ndarray) -> None:
    b = len(counts)
    for k in range(samples.shape[1]):
        part = slice(first[k], first[k + 1])
        drawn = counts[:, row[part]].astype(float)
        for column, change in enumerate((dq[part], dc[part])):
            total = np.zeros(samples.shape[0] * LANES)
            total[:b] = drawn @ change
            samples[:, k, column] += total.reshape(-1, LANES)
