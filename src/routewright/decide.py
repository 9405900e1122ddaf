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
    n, m = estimate.shape
    t = len(weights)
    sums = np.zeros((2, t))
    calls = np.zeros((t, m), np.int64)
    tally = compiled(_tally) if n * m * t > SMALL_SWEEP else _tally_numpy
    for start, stop, chosen in _decisions(estimate, expected, weights):
        tally(chosen, quality[start:stop], cost[start:stop], sums, calls)
    return SweepScores(weights, sums[0] / n, sums[1] / n, calls / n)


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
    n, m = estimate.shape
    t, b = len(weights), resampler.n_resamples
    if resampler.n != n:
        raise UserError(f"these resamples are over {resampler.n} prompts, but the estimates have {n} rows")
    largest = np.array([np.abs(quality).max(), np.abs(cost).max()])
    scale = np.ldexp(1.0, np.clip(50 - np.frexp(n * np.maximum(largest, 1e-300))[1], -1000, 1000))
    point, calls = np.zeros((2, t), np.float64), np.zeros((t, m), np.int64)
    samples = np.zeros((-(-b // LANES), t, 2, LANES))
    fast = n * b > 2_000_000 or n * m * t > SMALL_SWEEP
    tally = compiled(_tally) if fast else _tally_numpy
    for (start, stop, chosen), (_, _, counts) in zip(_decisions(estimate, expected, weights), resampler.counts(),
                                                     strict=True):
        tally(chosen, quality[start:stop], cost[start:stop], point, calls)
        changes = _changes(chosen, np.rint(quality[start:stop] * scale[0]), np.rint(cost[start:stop] * scale[1]))
        if fast:
            compiled(_weigh_changes)(counts, *changes, samples)
        else:
            _weigh_changes_numpy(counts, *changes, samples)
    total = np.cumsum(samples, axis=1).transpose(2, 0, 3, 1).reshape(2, -1, t)[:, :b] / (scale[:, None, None] * n)
    q_lo, q_hi = interval(total[0], level)
    c_lo, c_hi = interval(total[1], level)
    return SweepIntervals(weights, point[0] / n, point[1] / n, calls / n, total[0], total[1], q_lo, q_hi, c_lo, c_hi)


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
    """`_choose` for all weights at once. Run through `compiled`: the inner loop over weights is vector code."""
    t = len(weights)
    best, paid, worth = np.empty(t), np.empty(t), np.empty(t)
    which = np.empty(t, np.int64)
    shared = cost.shape[0] == 1
    for i in range(estimate.shape[0]):
        row = 0 if shared else i
        for k in range(t):
            best[k] = -np.inf
            paid[k] = np.inf
            worth[k] = -np.inf
            which[k] = 0
        for j in range(estimate.shape[1]):
            e, c = estimate[i, j], cost[row, j]
            for k in range(t):
                value = e - weights[k] * c
                tie = (value == best[k]) & ((c < paid[k]) | ((c == paid[k]) & (e > worth[k])))
                better = (value > best[k]) | tie
                best[k] = value if better else best[k]
                paid[k] = c if better else paid[k]
                worth[k] = e if better else worth[k]
                which[k] = j if better else which[k]
        for k in range(t):
            chosen[i, k] = which[k]


def _tally(chosen: np.ndarray, quality: np.ndarray, cost: np.ndarray, sums: np.ndarray, calls: np.ndarray) -> None:
    """Adds one block's quality and cost to `sums` (2, T) and its calls to `calls` (T, M)."""
    n, t = chosen.shape
    part = np.zeros((2, t))  # block sums first, so that rounding does not grow with the number of prompts
    for i in range(n):
        for k in range(t):
            j = chosen[i, k]
            part[0, k] += quality[i, j]
            part[1, k] += cost[i, j]
            calls[k, j] += 1
    for k in range(t):
        sums[0, k] += part[0, k]
        sums[1, k] += part[1, k]


def _tally_numpy(chosen: np.ndarray, quality: np.ndarray, cost: np.ndarray, sums: np.ndarray,
                 calls: np.ndarray) -> None:
    sums[0] += np.take_along_axis(quality, chosen, axis=1).sum(axis=0, dtype=float)
    sums[1] += np.take_along_axis(cost, chosen, axis=1).sum(axis=0, dtype=float)
    for k in range(chosen.shape[1]):
        calls[k] += np.bincount(chosen[:, k], minlength=calls.shape[1])


# ---- the bootstrap of a sweep --------------------------------------------------------------------------------------


def _changes(chosen: np.ndarray, quality: np.ndarray,
             cost: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """What changes from one setting to the next, for one block of prompts, ordered by setting.

    Returns (first (T + 1,), row (C,), quality change (C,), cost change (C,), where first[k]:first[k + 1] are the
    changes at setting k; everything is a change at setting 0.
    """
    n, t = chosen.shape
    changed = np.ones((t, n), bool)
    turned = np.ascontiguousarray(chosen.T)
    np.not_equal(turned[1:], turned[:-1], out=changed[1:])
    flat = np.flatnonzero(changed)
    setting, row = np.divmod(flat, n)
    now = turned.reshape(-1)[flat]
    dq, dc = quality[row, now], cost[row, now]
    later = flat >= n
    before = turned.reshape(-1)[flat[later] - n]
    dq[later] -= quality[row[later], before]
    dc[later] -= cost[row[later], before]
    return np.searchsorted(setting, np.arange(t + 1)), row, dq, dc


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
