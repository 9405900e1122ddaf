"""The numbers that published systems print, with their conventions, so that results can be laid beside theirs.

Each section names its origin. Traps are kept where the origin's figure depends on them, and named in the docstring;
`sound` holds the form without the trap. Two departures are made everywhere: where an origin crashes, a sentence says
why, and where it prints 0 for a quantity that does not exist, None is returned.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from routewright.errors import UserError
from routewright.metrics import sound

# ---- RouteLLM (routellm/evals/evaluate.py, benchmarks.py) ----------------------------------------------------------


@dataclass(frozen=True)
class RouteLLMScores:
    """RouteLLM's results. `strong_percent` and `accuracy` are the points of its curve in %, sorted by strong share;
    `cpt` maps 20, 50, 80 to % strong calls, `auc` is in % accuracy, `apgr` and `optimal` are shares."""

    strong_percent: np.ndarray
    accuracy: np.ndarray
    thresholds: np.ndarray
    cpt: dict[int, float]
    auc: float
    apgr: float
    weak_accuracy: float
    strong_accuracy: float
    monotone: bool  # False: the curve dips, and RouteLLM's CPT values (np.interp on a falling y) mean nothing


def routellm(strong_win_rate: np.ndarray, weak_quality: np.ndarray, strong_quality: np.ndarray,
             n_results: int = 10) -> RouteLLMScores:
    """RouteLLM's evaluation of one router.

    `n_results` + 1 thresholds at equal quantiles of the score; strong if score >= threshold, for the last one
    score > threshold, so that both ends are on the curve.

    Args:
        strong_win_rate: (N,) higher = the strong model is needed (the opposite of `decide.two_model_score`)
        weak_quality, strong_quality: (N,) 0/1, or judge scores
    Raises:
        UserError: the quantiles are not distinct (a near-constant score), where RouteLLM crashes in `qcut`
    """
    score = np.asarray(strong_win_rate, dtype=float)
    weak, strong = np.asarray(weak_quality, dtype=float), np.asarray(strong_quality, dtype=float)
    if not len(score) == len(weak) == len(strong) or not len(score):
        raise UserError("RouteLLM's metrics need one score, weak and strong quality for each prompt; got "
                        f"{len(score)}, {len(weak)} and {len(strong)}")
    if np.isnan(score).any():
        place = int(np.flatnonzero(np.isnan(score))[0])
        raise UserError(f"the score of prompt {place} is nan; a threshold needs numbers")
    order = np.argsort(score)
    ranked = score[order]
    places = np.linspace(0.0, 1.0, n_results + 1)
    inexact = n_results * places != np.arange(n_results + 1)
    places[inexact] = np.nextafter(places[inexact], 1.0)  # as pandas.qcut rounds, so that edges agree bit for bit
    edges = np.quantile(ranked, places)
    if (np.diff(edges) <= 0).any():
        raise UserError(f"RouteLLM's {n_results + 1} thresholds are quantiles of the score, and only "
                        f"{len(np.unique(edges))} of them differ (the score is nearly constant); "
                        "use metrics.sound.threshold_curve, which takes every distinct score")
    # Prompts from `first` on go to the strong model: score >= edge, for the last edge score > edge.
    first = np.searchsorted(ranked, edges, side="left")
    first[-1] = np.searchsorted(ranked, edges[-1], side="right")
    first = first[::-1]  # sorted by strong share
    gained = np.concatenate([[0.0], np.cumsum((strong - weak)[order][::-1])])
    x = 100.0 * ((len(score) - first) / len(score))
    y = 100.0 * ((weak.sum() + gained[len(score) - first]) / len(score))
    low, high = 100.0 * weak.mean(), 100.0 * strong.mean()
    auc, apgr = _routellm_area(x, y, low, high)
    cpt = {p: float(np.interp(p / 100 * (high - low) + low, y, x)) for p in (20, 50, 80)}
    return RouteLLMScores(x, y, edges[::-1], cpt, auc, apgr, low, high, bool((np.diff(y) >= 0).all()))


def routellm_optimal(weak_quality: np.ndarray, strong_quality: np.ndarray, strong_fraction: float) -> float:
    """RouteLLM's "optimal" curve for 0/1 outcomes: accuracy when `strong_fraction` of the prompts may go to strong."""
    weak, strong = np.asarray(weak_quality) > 0.5, np.asarray(strong_quality) > 0.5
    return float((weak.sum() + min(strong_fraction * len(weak), (~weak & strong).sum())) / len(weak))


def routellm_random(weak_quality: np.ndarray, strong_quality: np.ndarray, n_results: int = 10,
                    repetitions: int = 10, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """RouteLLM's random router: `repetitions` curves of uniform scores, averaged where the strong share is equal.

    Returns (strong %, accuracy %), sorted by strong share.
    """
    rng = random.Random(seed)
    points: dict[float, list[float]] = {}
    for _ in range(repetitions):
        curve = routellm(np.array([rng.uniform(0, 1) for _ in weak_quality]), weak_quality, strong_quality, n_results)
        for x, y in zip(curve.strong_percent, curve.accuracy, strict=True):
            points.setdefault(float(x), []).append(float(y))
    shares = sorted(points)
    return np.array(shares), np.array([np.mean(points[x]) for x in shares])


def routellm_threshold(strong_win_rate: np.ndarray, strong_fraction: float) -> float:
    """RouteLLM's calibration: the score's quantile at 1 - strong_fraction, rounded to the 5 digits it prints."""
    return round(float(np.quantile(np.asarray(strong_win_rate, dtype=float), 1.0 - strong_fraction)), 5)


def _routellm_area(x: np.ndarray, y: np.ndarray, low: float, high: float) -> tuple[float, float]:
    """(AUC in %, APGR); APGR is nan where both models are equally good."""
    auc = float(np.trapezoid(y, x / 100.0))
    width = (x[-1] - x[0]) / 100.0
    gap = (high - low) * width
    return auc, (auc - low * width) / gap if gap else float("nan")


# ---- RouterArena (llm_evaluation/run.py, router_evaluation/compute_scores.py) --------------------------------------


def routerarena_score(cost_per_1k: float, accuracy: float, beta: float = 0.1, cost_min: float = 0.0044,
                      cost_max: float = 200.0) -> float:
    """RouterArena's score from USD per 1,000 queries and accuracy in [0, 1].

    S = (1 + beta) A C / (beta A + C), C = log2 position of the cost between `cost_max` (0) and `cost_min` (1), clamped.
    """
    cost = min(max(cost_per_1k, cost_min), cost_max)
    c = (np.log2(cost_max) - np.log2(cost)) / (np.log2(cost_max) - np.log2(cost_min))
    bottom = beta * accuracy + c
    return float((1 + beta) * accuracy * c / bottom) if bottom > 0 else 0.0


def routerarena_cost_per_1k(cost: np.ndarray) -> float:
    """USD per 1,000 queries as RouterArena sums it: costs of 0 or less add nothing but stay in the denominator."""
    cost = np.asarray(cost, dtype=float)
    return float(cost[cost > 0].sum() / len(cost) * 1000)


def routerarena_accuracy(correct: np.ndarray, failed: np.ndarray | None = None, before_pr118: bool = False) -> float:
    """Mean correctness. Failed generations count 0; before PR #118 (2026-05-29) they were left out of the mean."""
    correct = np.asarray(correct, dtype=float)
    if failed is None:
        return float(correct.mean())
    failed = np.asarray(failed, dtype=bool)
    return float(correct[~failed].mean()) if before_pr118 else float(np.where(failed, 0.0, correct).mean())


def routerarena_robustness(decision: Sequence, noised_decision: Sequence) -> float | None:
    """1 - flips / matched: share of prompts whose model stays the same on the noised prompt. None entries are
    unmatched and left out; None where nothing matched."""
    pairs = [(a, b) for a, b in zip(decision, noised_decision, strict=True) if a is not None and b is not None]
    return 1.0 - sum(a != b for a, b in pairs) / len(pairs) if pairs else None


@dataclass(frozen=True)
class Optimality:
    """RouterArena's optimality. `selection` share of prompts on the optimal model, `cost` optimal cost / router cost,
    `accuracy` router accuracy / oracle accuracy over prompts that some model gets right. None where undefined."""

    selection: float | None
    cost: float | None
    accuracy: float | None


def routerarena_optimality(correct: np.ndarray, cost: np.ndarray, decision: np.ndarray,
                           before_pr97: bool = False) -> Optimality:
    """Compares decisions with the cheapest model of accuracy >= 1 on each prompt; without the prompts none gets right.

    `before_pr97` also leaves out the prompts on which the router was wrong, as the code did until 2026-05-20, which
    makes `accuracy` 1 by construction (issue #95).
    """
    right = np.asarray(correct, dtype=float) >= 1.0
    cost = np.asarray(cost, dtype=float)
    got = sound.picked(right, decision)
    rows = right.any(axis=1) & (got if before_pr97 else True)
    if not rows.any():
        return Optimality(None, None, None)
    best = np.where(right, cost, np.inf).argmin(axis=1)
    optimal, paid = sound.picked(cost, best)[rows].sum(), sound.picked(cost, decision)[rows].sum()
    return Optimality(float((best == decision)[rows].mean()), float(optimal / paid) if paid > 0 else None,
                      float(got[rows].mean()))


# ---- RouterBench (evaluation/AIQ.py, routers/) ---------------------------------------------------------------------


def routerbench_ndch(cost: np.ndarray, quality: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """RouterBench's non-decreasing hull, as (cost, quality): an upper envelope at the given costs, not a minimal hull.

    Every inner point is raised to the best chord above it, the first point is kept, the last one only where it is not
    below the end of the hull, and one pass deletes points that fall below their predecessor. O(N**3), as in the origin.
    """
    order = np.argsort(np.asarray(cost, dtype=float), kind="stable")
    x, y = np.asarray(cost, dtype=float)[order], np.asarray(quality, dtype=float)[order]
    hull_x, hull_y = [x[0]], [y[0]]
    for k in range(1, len(x) - 1):
        best = y[k]
        for i in range(len(x)):
            for j in range(i + 1, len(x)):
                if x[i] < x[k] < x[j]:
                    best = max(best, y[i] + (y[j] - y[i]) * (x[k] - x[i]) / (x[j] - x[i]))
        hull_x.append(x[k])
        hull_y.append(best)
    if len(x) > 1 and y[-1] >= hull_y[-1]:
        hull_x.append(x[-1])
        hull_y.append(y[-1])
    keep = [0]
    keep += [k for k in range(1, len(hull_y)) if hull_y[k] >= hull_y[k - 1]]
    return np.array(hull_x)[keep], np.array(hull_y)[keep]


def routerbench_aiq(curves: Mapping[str, tuple[np.ndarray, np.ndarray]]) -> dict[str, float]:
    """AIQ of each named (cost, quality) curve: area under its hull, extended flat to the largest cost, over that cost.

    The largest cost is taken over all curves given, and nothing is added left of a curve's own start, so every value
    depends on who else is compared. `sound.aiq` does not.
    """
    hulls = {name: routerbench_ndch(*curve) for name, curve in curves.items()}
    most = max(float(np.max(cost)) for cost, _ in curves.values())
    return {name: float(np.trapezoid(np.append(y, y[-1]), np.append(x, most)) / most) for name, (x, y) in hulls.items()}


def routerbench_oracle_cost(correct: np.ndarray, cost: np.ndarray) -> float:
    """Mean cost of the cheapest right model; 0 for a prompt that no model gets right (the origin's convention)."""
    right = np.asarray(correct, dtype=float) > 0
    cheapest = np.where(right, np.asarray(cost, dtype=float), np.inf).min(axis=1)
    return float(np.where(right.any(axis=1), cheapest, 0.0).mean())


ROUTERBENCH_WTP = np.logspace(-10, 9, 32)  # willingness to pay: 32 values from 1e-10 to 1e9


# ---- LLMRouterBench (baselines/aggregators.py; gains from the prose of its README) ---------------------------------
# Its ParetoDist is left out: the normalisation is published nowhere.


@dataclass(frozen=True)
class Aggregates:
    """Accuracy of the reference policies, over datasets (each counts once) and over samples."""

    by_dataset: dict[str, dict[str, float]]
    dataset_mean: dict[str, float]
    sample_mean: dict[str, float]


def llmrouterbench_aggregates(quality: np.ndarray, cost: np.ndarray, datasets: Sequence[str],
                              seed: int = 0) -> Aggregates:
    """Oracle, random, best single and best-per-dataset ("max_expert") as LLMRouterBench computes them.

    Oracle accuracy is the share of questions on which any model scores above 0, so partial credit counts as right;
    oracle cost is the cheapest right model, else the cheapest of all. Max-expert is picked on the data it is scored on.
    """
    quality, cost = np.asarray(quality, dtype=float), np.asarray(cost, dtype=float)
    names = np.asarray(datasets)
    rng = random.Random(seed)
    draw = np.array([rng.randrange(quality.shape[1]) for _ in names])
    right = quality > 0
    cheapest = np.where(right.any(axis=1), np.where(right, cost, np.inf).min(axis=1), cost.min(axis=1))
    columns = {"oracle": right.any(axis=1).astype(float), "oracle_cost": cheapest,
               "random": sound.picked(quality, draw), "random_cost": sound.picked(cost, draw),
               "best_single": quality[:, quality.mean(axis=0).argmax()]}
    expert = np.empty(len(names))
    for name in np.unique(names):
        rows = names == name
        expert[rows] = quality[rows][:, quality[rows].mean(axis=0).argmax()]
    columns["max_expert"] = expert
    by_dataset = {str(name): {key: float(v[names == name].mean()) for key, v in columns.items()}
                  for name in dict.fromkeys(names.tolist())}
    return Aggregates(by_dataset,
                      {key: float(np.mean([d[key] for d in by_dataset.values()])) for key in columns},
                      {key: float(v.mean()) for key, v in columns.items()})


def gain(accuracy: Sequence[float], reference: Sequence[float]) -> float:
    """Gain@R (reference = random) or Gain@B (best single): mean over datasets of (accuracy - reference) / reference."""
    accuracy, reference = np.asarray(accuracy, dtype=float), np.asarray(reference, dtype=float)
    return float(np.mean((accuracy - reference) / reference))


def gap_to_oracle(accuracy: Sequence[float], oracle: Sequence[float]) -> float:
    """Gap@O: mean over datasets of (oracle - accuracy) / oracle."""
    accuracy, oracle = np.asarray(accuracy, dtype=float), np.asarray(oracle, dtype=float)
    return float(np.mean((oracle - accuracy) / oracle))


def perf_gain(accuracy: np.ndarray, best_single: float) -> float:
    """PerfGain: the best accuracy over a router's configurations, relative to the best single model, minus 1."""
    return float(np.max(accuracy) / best_single - 1.0)


def cost_save(accuracy: np.ndarray, cost: np.ndarray, best_single: float, best_single_cost: float) -> float | None:
    """CostSave: 1 - cost / cost of the best single model, at the cheapest configuration that is at least as accurate.
    None where no configuration is."""
    reached = np.asarray(accuracy, dtype=float) >= best_single
    if not reached.any():
        return None
    return float(1.0 - np.asarray(cost, dtype=float)[reached].min() / best_single_cost)


# ---- Router-R1 (verl/trainer/main_ppo.py) --------------------------------------------------------------------------


def router_r1_reward(f1: float, raw_cost: float, recent_costs: Sequence[float], cost_coe: float = 0.0,
                     format_ok: bool = True) -> float:
    """Router-R1's reward of one answer.

    -1 for a broken format, 0 for F1 = 0, else (1 - c) F1 + c * cost reward. The cost reward is 1 minus the clipped
    position of sqrt(cost) between the 5 % and 95 % quantiles of the square roots of the last 1,000 costs: a moving
    scale, so one price earns different rewards at different times; one half where they are all equal (the origin
    divides by zero). `raw_cost` counts completion tokens only in the origin.
    """
    if not format_ok:
        return -1.0
    if f1 == 0:
        return 0.0
    roots = np.sqrt(np.asarray(list(recent_costs)[-1000:] or [raw_cost], dtype=float))
    low, high = np.quantile(roots, [0.05, 0.95])
    position = (np.sqrt(raw_cost) - low) / (high - low) if high > low else 0.5
    return float(f1 * (1.0 - cost_coe) + cost_coe * (1.0 - min(max(position, 0.0), 1.0)))


# ---- RouterEval (router/) ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class RouterEvalScores:
    """mu = mean score of the chosen model; v_b = mu / best single; e_p = mean entropy (bits) of the prediction."""

    mu: float
    v_b: float | None
    e_p: float


def routereval(quality: np.ndarray, probability: np.ndarray) -> RouterEvalScores:
    """RouterEval's three numbers from recorded quality (N, M) and the router's distribution over models (N, M)."""
    quality, p = np.asarray(quality, dtype=float), np.asarray(probability, dtype=float)
    mu = float(sound.picked(quality, p.argmax(axis=1)).mean())
    best = float(quality.mean(axis=0).max())
    logs = np.log2(p, where=p > 0, out=np.zeros_like(p))
    return RouterEvalScores(mu, mu / best if best > 0 else None, float(-(p * logs).sum(axis=1).mean()))


def routereval_mix(quality: np.ndarray, oracle_share: float, repetitions: int = 1000, seed: int = 0) -> float:
    """r_o(p): mean score when a prompt gets its best model with probability `oracle_share`, else a random one."""
    quality = np.asarray(quality, dtype=float)
    n, m = quality.shape
    rng = np.random.default_rng(seed)
    best = quality.max(axis=1)
    total = 0.0
    for _ in range(repetitions):
        drawn = quality[np.arange(n), rng.integers(m, size=n)]
        total += np.where(rng.random(n) < oracle_share, best, drawn).mean()
    return float(total / repetitions)


# ---- Frontier-CS (research/problems/llm_router/evaluator.py) -------------------------------------------------------


def frontier_cs_score(correct: np.ndarray, cost: np.ndarray, decision: np.ndarray,
                      cost_weight: float = 150.0) -> float | None:
    """100 (accuracy - 150 mean cost) / (oracle accuracy - 150 oracle cost).

    Prompts that no model gets right count 0 in cost as well as correctness. None where the oracle's value is not
    above 0.
    """
    right, cost = np.asarray(correct, dtype=float) > 0, np.asarray(cost, dtype=float)
    solvable = right.any(axis=1)
    value = sound.picked(right, decision).astype(float) - cost_weight * sound.picked(cost, decision)
    cheapest = np.where(right, cost, np.inf).min(axis=1)
    best = np.where(solvable, 1.0 - cost_weight * np.where(solvable, cheapest, 0.0), 0.0).mean()
    return float(100.0 * np.where(solvable, value, 0.0).mean() / best) if best > 0 else None


# ---- CoBench / RouterXBench ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class CoBenchScores:
    """CoBench's metrics. Where a band holds no point of the curve the origin prints 0; here it is None.

    `auroc` and `youden_threshold` judge the score as P(the weak model is right); one class only gives 0.5 in the
    origin, None here. The Youden threshold is fitted on the data given, so give it dev.
    """

    auroc: float | None
    youden_threshold: float | None
    youden_accuracy: float | None
    call_rate: np.ndarray  # (101,)
    accuracy: np.ndarray  # (101,)
    lpm: float | None
    mpm: float | None
    hcr: float | None


def cobench(score: np.ndarray, weak_quality: np.ndarray, strong_quality: np.ndarray,
            label: np.ndarray | None = None, low_band: tuple[float, float] = (0.0, 0.1),
            recovery_band: tuple[float, float] = (0.91, 0.92)) -> CoBenchScores:
    """CoBench's judgement of one router on one weak / strong pair.

    Args:
        score: (N,) higher = the weak model is likely right; the lowest are sent to the strong model first
        weak_quality, strong_quality: (N,)
        label: (N,) 0/1 for AUROC; default: the weak model is right (for chat tasks: judged no worse than strong)
        low_band: call rates over which LPM averages (the origin's config.yaml uses 0.25-0.3)
        recovery_band: shares of the weak-strong gap that HCR and MPM look at (config.yaml uses 0.85-0.95)
    """
    score = np.asarray(score, dtype=float)
    weak, strong = np.asarray(weak_quality, dtype=float), np.asarray(strong_quality, dtype=float)
    if not len(score) == len(weak) == len(strong):
        raise UserError(f"CoBench metrics need one score, weak and strong quality for each prompt; got {len(score)}, "
                        f"{len(weak)} and {len(strong)}")
    label = weak >= 0.5 if label is None else np.asarray(label)
    rate, accuracy = call_rate_curve(score, weak, strong)
    low, mid, high = _cobench_bands(rate, accuracy, float(weak.mean()), float(strong.mean()), low_band, recovery_band)
    youden = sound.youden(label, score)
    return CoBenchScores(sound.auroc(label, score), youden[0] if youden else None, youden[1] if youden else None,
                         rate, accuracy, low, mid, high)


def call_rate_curve(score: np.ndarray, weak_quality: np.ndarray,
                    strong_quality: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(call rate, accuracy), 101 points: at rate r the int(r * N) lowest-scored prompts get the strong result."""
    order = np.argsort(np.asarray(score, dtype=float), kind="stable")
    weak, strong = np.asarray(weak_quality, dtype=float), np.asarray(strong_quality, dtype=float)
    gained = np.concatenate([[0.0], np.cumsum((strong - weak)[order])])
    rate = np.arange(101) / 100.0
    return rate, (weak.sum() + gained[(rate * len(order)).astype(np.int64)]) / len(order)


def _cobench_bands(rate: np.ndarray, accuracy: np.ndarray, weak: float, strong: float, low_band: tuple[float, float],
                   recovery_band: tuple[float, float]) -> tuple[float | None, float | None, float | None]:
    """(LPM, MPM, HCR)."""
    close = 1e-9  # call rates are hundredths; a bound of 0.3 must not lose the point 0.30
    low = (rate >= low_band[0] - close) & (rate <= low_band[1] + close)
    bounds = [weak + share * (strong - weak) for share in recovery_band]
    inside = (accuracy >= bounds[0] - 1e-12) & (accuracy <= bounds[1] + 1e-12)
    lpm = float(accuracy[low].mean()) if low.any() else None
    hcr = float(1.0 - rate[inside].mean()) if inside.any() else None
    if not low.any():
        return None, None, hcr
    between = (accuracy > accuracy[low][-1] + 1e-12) & (accuracy < bounds[0] - 1e-12)
    return lpm, float(accuracy[between].mean()) if between.any() else None, hcr


# ---- xRouter -------------------------------------------------------------------------------------------------------


def xrouter_reward(quality: np.ndarray, cost: np.ndarray) -> np.ndarray:
    """xRouter's reward, quality * (1 - min(3 cost, 0.8)), with the defaults of its code; see `reward.PRESETS`."""
    from routewright.reward import Reward

    return Reward.named("xrouter_code").of(quality, cost)
