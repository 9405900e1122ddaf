"""The forms this project reports by default: frontier, hull, AIQ, PGR / APGR / CPT, regret, calibration, collapse.

Three rules separate them from `compat`. A number never depends on which other routers are compared: cost ranges are
fixed by the pool. A curve is taken from every setting that exists, not from a handful. A quantity that the data do not
define (one class only, an empty band, models equally good) is None, never 0.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from routewright.errors import UserError

# ---- settings in the cost-quality plane ----------------------------------------------------------------------------


def frontier(cost: np.ndarray, quality: np.ndarray) -> np.ndarray:
    """Indices of the settings that no other setting beats: none costs no more and is better, or is as good for less.

    Sorted by cost, so quality rises strictly along them. Of settings with equal cost and quality the first stands.
    """
    cost, quality = _plane(cost, quality)
    order = np.lexsort((np.arange(len(cost)), -quality, cost))
    best = np.maximum.accumulate(quality[order])
    rises = np.concatenate([[True], best[1:] > best[:-1]])
    return order[rises]


def hull(cost: np.ndarray, quality: np.ndarray) -> np.ndarray:
    """Indices of the vertices of the upper concave envelope, from the cheapest setting to the best, sorted by cost.

    A random mix of two neighbouring vertices reaches every point between them, so no setting below this line earns its
    place. Quality rises and the slope falls strictly along the vertices.
    """
    cost, quality = _plane(cost, quality)
    kept: list[int] = []
    for index in frontier(cost, quality):
        while len(kept) > 1 and _not_above(cost, quality, kept[-2], kept[-1], index):
            kept.pop()
        kept.append(int(index))
    return np.array(kept, dtype=np.int64)


def mix_quality(at_cost: np.ndarray | float, cost: np.ndarray, quality: np.ndarray) -> np.ndarray:
    """Best mean quality that random mixes of the given settings reach for `at_cost` dollars a prompt.

    With the always-one-model points as settings this is the content-free control at matched cost. nan below the
    cheapest setting (nothing reaches it); beyond the best setting its quality stays.
    """
    cost, quality = _plane(cost, quality)
    vertices = hull(cost, quality)
    return np.interp(np.asarray(at_cost, dtype=float), cost[vertices], quality[vertices], left=np.nan)


def mix_weights(at_cost: float, cost: np.ndarray, quality: np.ndarray) -> np.ndarray:
    """Shares (len(cost),) of the random mix behind `mix_quality`; below the cheapest setting, all of it."""
    cost, quality = _plane(cost, quality)
    vertices = hull(cost, quality)
    share = np.zeros(len(cost))
    right = int(np.searchsorted(cost[vertices], at_cost, side="right"))
    if right == 0 or right == len(vertices):
        share[vertices[max(right - 1, 0)]] = 1.0
        return share
    a, b = vertices[right - 1], vertices[right]
    share[b] = (at_cost - cost[a]) / (cost[b] - cost[a])
    share[a] = 1.0 - share[b]
    return share


def pool_range(cost: np.ndarray) -> tuple[float, float]:
    """Cost range of a pool: mean cost of the cheapest and of the dearest always-one-model, from cost (N, M)."""
    means = np.asarray(cost, dtype=float).mean(axis=0)
    return float(means.min()), float(means.max())


def aiq(cost: np.ndarray, quality: np.ndarray, cost_range: tuple[float, float],
        anchor: tuple[float, float] | None = None) -> float | None:
    """Mean of the non-decreasing hull of the settings over `cost_range`: the area under it divided by its width.

    Left of the router's cheapest setting the area counts 0; right of its best one the quality stays. `anchor` (cost,
    quality) adds the point that anybody can reach, usually the cheapest always-one-model, so that a router whose
    cheapest setting costs a shade more than that model loses only what it fails to earn.

    None where the range is empty (all models cost the same).
    """
    low, high = cost_range
    if not high > low:
        return None
    cost, quality = _plane(cost, quality)
    if anchor is not None:
        cost, quality = np.append(cost, anchor[0]), np.append(quality, anchor[1])
    vertices = hull(cost, quality)
    x, y = cost[vertices], quality[vertices]
    inside = x[(x > low) & (x < high)]
    grid = np.concatenate([[max(low, min(x[0], high))], inside[inside > x[0]], [high]])
    if x[0] >= high:
        return 0.0
    return float(np.trapezoid(np.interp(grid, x, y), grid) / (high - low))


def _plane(cost: np.ndarray, quality: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    cost, quality = np.asarray(cost, dtype=float).reshape(-1), np.asarray(quality, dtype=float).reshape(-1)
    if len(cost) != len(quality) or not len(cost):
        raise UserError(f"settings need one cost and one quality each; got {len(cost)} and {len(quality)}")
    if not (np.isfinite(cost).all() and np.isfinite(quality).all()):
        raise UserError("a setting has a cost or quality of nan or inf; leave such settings out")
    return cost, quality


def _not_above(x: np.ndarray, y: np.ndarray, a: int, b: int, c: int) -> bool:
    """Whether b lies on or below the line from a to c (a, b, c in ascending x)."""
    return (y[b] - y[a]) * (x[c] - x[a]) <= (y[c] - y[a]) * (x[b] - x[a])


# ---- two-model pools: every distinct threshold ---------------------------------------------------------------------


@dataclass(frozen=True)
class ThresholdCurve:
    """Quality over the share of strong calls, from none to all; all arrays (T + 1,).

    `thresholds[k]` reaches point k: strong where score < threshold. Between neighbours a random split of the tied
    prompts reaches the straight line.
    """

    thresholds: np.ndarray
    strong_share: np.ndarray
    quality: np.ndarray

    @property
    def cheap(self) -> float:
        return float(self.quality[0])

    @property
    def strong(self) -> float:
        return float(self.quality[-1])


def threshold_curve(score: np.ndarray, cheap_quality: np.ndarray, strong_quality: np.ndarray) -> ThresholdCurve:
    """The curve over every distinct threshold: one sort and two running sums.

    Args:
        score: (N,) P(cheap suffices); the lowest scores go to the strong model first
        cheap_quality, strong_quality: (N,)
    """
    score = np.asarray(score, dtype=float)
    if np.isnan(score).any():
        place = int(np.flatnonzero(np.isnan(score))[0])
        raise UserError(f"the score of prompt {place} is nan; a threshold needs numbers")
    cheap, strong = np.asarray(cheap_quality, dtype=float), np.asarray(strong_quality, dtype=float)
    order = np.argsort(score)  # the order among ties does not matter: they move together
    ranked = score[order]
    ends = np.append(np.flatnonzero(ranked[1:] != ranked[:-1]) + 1, len(ranked))
    gained = np.cumsum((strong - cheap)[order])[ends - 1]
    quality = (cheap.sum() + np.concatenate([[0.0], gained])) / len(score)
    quality[-1] = strong.mean()
    share = np.concatenate([[0.0], ends / len(score)])
    thresholds = np.append(ranked[np.concatenate([[0], ends[:-1]])], np.nextafter(ranked[-1], np.inf))
    return ThresholdCurve(thresholds, share, quality)


def pgr(quality: np.ndarray | float, cheap: float, strong: float) -> np.ndarray | float | None:
    """Performance gap recovered: (quality - cheap) / (strong - cheap). None where strong is not better than cheap."""
    return (quality - cheap) / (strong - cheap) if strong > cheap else None


def apgr(curve: ThresholdCurve) -> float | None:
    """Mean PGR over all shares of strong calls: the area under the full curve. 0.5 for a random router.

    None where the strong model is not better.
    """
    return pgr(float(np.trapezoid(curve.quality, curve.strong_share)), curve.cheap, curve.strong)


def cpt(curve: ThresholdCurve, recovered: float) -> float | None:
    """Smallest share of strong calls, in [0, 1], at which `recovered` (0..1) of the gap is closed.

    The first crossing of the full curve, so that a later dip cannot make the answer meaningless. None where the strong
    model is not better.
    """
    if not curve.strong > curve.cheap:
        return None
    target = curve.cheap + recovered * (curve.strong - curve.cheap)
    k = int(np.argmax(curve.quality >= min(target, curve.strong)))
    if k == 0:
        return 0.0
    x0, x1, y0, y1 = *curve.strong_share[k - 1:k + 1], *curve.quality[k - 1:k + 1]
    return float(x0 + (target - y0) / (y1 - y0) * (x1 - x0))


def quality_at_share(curve: ThresholdCurve, strong_share: float | np.ndarray) -> float | np.ndarray:
    """Quality at a share of strong calls, ties split at random."""
    return np.interp(strong_share, curve.strong_share, curve.quality)


# ---- oracle and regret -----------------------------------------------------------------------------------------------


def oracle(quality: np.ndarray, cost: np.ndarray) -> np.ndarray:
    """Column of the best quality on each prompt, the cheapest of those where several tie. Returns (N,) int64.

    Where no model is right it is therefore the cheapest model, at its true cost.
    """
    quality, cost = np.asarray(quality, dtype=float), np.asarray(cost, dtype=float)
    best = quality == quality.max(axis=1, keepdims=True)
    return np.where(best, cost, np.inf).argmin(axis=1)


def reward_oracle(reward: np.ndarray, cost: np.ndarray) -> np.ndarray:
    """Column of the largest reward (N, M) on each prompt, the cheapest of those where several tie."""
    return oracle(reward, cost)


def regret(reward: np.ndarray, decision: np.ndarray) -> np.ndarray:
    """Reward given up on each prompt against the best model for it: (N,) of 0 or more. Its mean is the regret."""
    reward = np.asarray(reward, dtype=float)
    return reward.max(axis=1) - picked(reward, decision)


def picked(values: np.ndarray, decision: np.ndarray) -> np.ndarray:
    """The chosen column of `values` (N, M) for each prompt, (N,)."""
    values, decision = np.asarray(values), np.asarray(decision, dtype=np.int64)
    if decision.shape != (len(values),):
        raise UserError(f"{len(decision)} decisions do not fit {len(values)} prompts")
    return np.take_along_axis(values, decision[:, None], axis=1)[:, 0]


def shuffled_quality(quality: np.ndarray, decision: np.ndarray) -> np.ndarray:
    """Expected quality of each prompt had the decisions been shuffled over the prompts, (N,): its row's mean under the
    calls per model. The control that keeps the mix of calls and removes everything known about the prompt."""
    quality = np.asarray(quality, dtype=float)
    share = np.bincount(np.asarray(decision, dtype=np.int64), minlength=quality.shape[1]) / len(quality)
    return quality @ share


def chance_sd(quality: np.ndarray, calls: np.ndarray) -> float:
    """Standard deviation of the mean quality had the decisions been dealt out over the prompts at random.

    The permutation variance of Hoeffding (1951). A router that reads nothing stands this far from the random mix of
    its own calls by luck alone, however few prompts it moves.

    Args:
        quality: (N, M)
        calls: (N, M) 1 for the model called on a prompt; for a weighted sum of settings, the weighted sum of these
    """
    q, c = (np.asarray(values, dtype=float) - np.mean(values, axis=0) for values in (quality, calls))
    n = len(q)
    # The (N, N) table of "prompt i with the decision of prompt j" is q @ c.T: its square sum needs M x M numbers only.
    return float(np.sqrt(max(((q.T @ q) * (c.T @ c)).sum(), 0.0) / (n * n * (n - 1)))) if n > 1 else 0.0


# ---- calibration -----------------------------------------------------------------------------------------------------


def auroc(labels: np.ndarray, scores: np.ndarray) -> float | None:
    """Probability that a positive scores above a negative, ties counted half. None where there is one class only.

    Args:
        labels: (N,) 0/1 or bool; scores: (N,)
    """
    positive = _labels(labels)
    scores = np.asarray(scores, dtype=float)
    if np.isnan(scores).any():
        raise UserError("AUROC: a score is nan; give a number for each prompt")
    n_positive = int(positive.sum())
    n_negative = len(positive) - n_positive
    if n_positive == 0 or n_negative == 0:
        return None
    _, member, count = np.unique(scores, return_inverse=True, return_counts=True)
    rank = np.cumsum(count) - (count - 1) / 2.0  # mean rank of each group of ties, from 1
    area = rank[member.reshape(-1)][positive].sum() - n_positive * (n_positive + 1) / 2.0
    return float(area / (n_positive * n_negative))


def youden(labels: np.ndarray, scores: np.ndarray) -> tuple[float, float] | None:
    """(threshold, accuracy) where TPR - FPR is largest, positive = score >= threshold; the highest such threshold.

    Fit it on dev and report on test. None where there is one class only.
    """
    positive = _labels(labels)
    scores = np.asarray(scores, dtype=float)
    n_positive = int(positive.sum())
    n_negative = len(positive) - n_positive
    if n_positive == 0 or n_negative == 0:
        return None
    order = np.argsort(-scores, kind="stable")
    ranked, hits = scores[order], positive[order]
    ends = np.append(np.flatnonzero(ranked[1:] != ranked[:-1]), len(ranked) - 1)
    true, false = np.cumsum(hits)[ends], np.cumsum(~hits)[ends]
    best = int(np.argmax(true / n_positive - false / n_negative))
    return float(ranked[ends[best]]), float((true[best] + n_negative - false[best]) / len(positive))


def brier(estimate: np.ndarray, quality: np.ndarray) -> float:
    """Mean squared difference between predicted and recorded quality. Lower is better."""
    return float(np.mean((np.asarray(estimate, dtype=float) - np.asarray(quality, dtype=float)) ** 2))


@dataclass(frozen=True)
class Reliability:
    """Bins of equal mass by estimate: mean estimate, mean quality, prompts, each (bins,)."""

    estimate: np.ndarray
    quality: np.ndarray
    count: np.ndarray

    @property
    def ece(self) -> float:
        """Expected calibration error: mean absolute gap over the prompts."""
        return float(np.average(np.abs(self.estimate - self.quality), weights=self.count))


def reliability(estimate: np.ndarray, quality: np.ndarray, bins: int = 10) -> Reliability:
    """Reliability diagram in `bins` groups of equal size; equal estimates never straddle two groups."""
    estimate, quality = np.asarray(estimate, dtype=float).reshape(-1), np.asarray(quality, dtype=float).reshape(-1)
    if not len(estimate) or len(estimate) != len(quality):
        raise UserError(f"calibration needs one estimate for each quality; got {len(estimate)} and {len(quality)}")
    order = np.argsort(estimate, kind="stable")
    ranked = estimate[order]
    position = np.searchsorted(ranked, ranked, side="left")  # ties share the place of their first
    member = np.minimum(position * bins // len(ranked), bins - 1)
    count = np.bincount(member, minlength=bins)
    mean = [np.bincount(member, weights=v, minlength=bins) for v in (ranked, quality[order])]
    filled = count > 0
    return Reliability(mean[0][filled] / count[filled], mean[1][filled] / count[filled], count[filled])


def ece(estimate: np.ndarray, quality: np.ndarray, bins: int = 10) -> float:
    """Expected calibration error over equal-mass bins."""
    return reliability(estimate, quality, bins).ece


def _labels(labels: np.ndarray) -> np.ndarray:
    labels = np.asarray(labels)
    if labels.dtype != bool and not np.isin(labels, (0, 1)).all():
        raise UserError("labels must be 0 or 1; threshold the quality first")
    return labels.astype(bool)


# ---- collapse --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Collapse:
    """Whether a router still chooses. `entropy` and `mutual_information` are in bits.

    `mutual_information` between decision and prompt group is raw; `chance` is what shuffled decisions would show on
    average by the usual (rows - 1)(columns - 1) / 2N correction, so only the excess counts.
    """

    top_model: int
    top_share: float
    entropy: float
    entropy_share: float | None  # entropy / log2(models); None for a pool of one
    mutual_information: float | None
    chance: float | None

    @property
    def collapsed(self) -> bool:
        """98 % or more of the calls go to one model (the case reported for Router-R1)."""
        return self.top_share >= 0.98


def collapse(decision: np.ndarray, n_models: int, groups: np.ndarray | None = None) -> Collapse:
    """How the calls spread over the models, and how much the prompt's group (task, subject) says about the decision."""
    decision = np.asarray(decision, dtype=np.int64)
    if not len(decision):
        raise UserError("collapse needs at least one decision")
    share = np.bincount(decision, minlength=n_models) / len(decision)
    entropy = _entropy(share)
    information = chance = None
    if groups is not None:
        _, member = np.unique(np.asarray(groups), return_inverse=True)
        joint = np.bincount(member.reshape(-1) * n_models + decision) / len(decision)
        by_group = np.bincount(member.reshape(-1)) / len(decision)
        information = max(entropy + _entropy(by_group) - _entropy(joint), 0.0)
        chance = ((share > 0).sum() - 1) * (len(by_group) - 1) / (2 * len(decision) * np.log(2))
    return Collapse(int(share.argmax()), float(share.max()), entropy,
                    entropy / float(np.log2(n_models)) if n_models > 1 else None,
                    information, None if chance is None else float(chance))


def _entropy(share: np.ndarray) -> float:
    share = share[share > 0]
    return float(max(-(share * np.log2(share)).sum(), 0.0))
