"""Benchmark of the rulers: how long an evaluation with intervals takes, beside the plain ways to do it.

    OMP_NUM_THREADS=1 python tests/benchmarks/bench_evaluation.py --n 100000 --n 1000000

Everything is CPU time of one process on one thread, medians over interleaved rounds (ours, theirs, ours, ...), on data
drawn from a fixed seed. Compilation is done before the clock starts and printed on its own line. Peak memory is the
`ru_maxrss` of a fresh process that does nothing else. Parts (`--part`, default all):

evaluate   N prompts x 20 models x 101 cost weights, 1,000 paired resamples of quality and cost of every setting
           (`decide.sweep_intervals`). Beside it the **bare numpy pass**: for the same 101 settings one argmax over the
           same 20 columns of `estimate - weight * expected cost`, the gather of the chosen quality and cost, and their
           means; no intervals, in blocks of 1,024 prompts, which is the quickest plain numpy found. Beside both, the
           memory bound: one read of the same four float64 arrays.
intervals  1,000-resample paired intervals of 20 routers, quality and cost (40 columns; `stats.Resampler.means`),
           against a numpy gather (`values[rng.integers(n, size=n)].mean(axis=0)`, few resamples timed, scaled up) and,
           up to 100,000 prompts, scipy.stats.bootstrap per column (scaled up likewise).
curve      threshold curve of a two-model pool with 0/1 outcomes, 101 thresholds, 1,000 resamples, interval of APGR
           (`stats.curve_intervals`), against sorted outcomes with bincount weights (few resamples timed, scaled up).
loop       RouteLLM's way (10 random-router repetitions x 11 thresholds over 14,037 rows, Python `sum` over the answers
           and `Counter` over an array of model names, as its benchmarks do) against `metrics.compat.routellm` on the
           same scores, and against all 14,038 thresholds (`threshold_curve`).
agree      interval end points of all methods on the same data, within 3 Monte-Carlo standard errors of each other
           (a wider bound for the largest of many end points: the normal quantile at the same overall risk).
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "src"))

from routewright import decide, metrics, stats  # noqa: E402

MODELS, SETTINGS, RESAMPLES = 20, 101, 1000
PARTS = ("evaluate", "intervals", "curve", "loop", "agree")


def pool_world(n: int, seed: int = 0) -> tuple[np.ndarray, ...]:
    """estimate, expected cost, quality (0/1), cost: (n, 20) float64. Estimates inform, prices span 1:1000."""
    rng = np.random.default_rng(seed)
    skill, price = np.linspace(0.3, 0.9, MODELS), np.geomspace(1e-5, 1e-2, MODELS)
    estimate = rng.normal(0, 0.2, (n, MODELS))
    estimate += skill
    np.clip(estimate, 0, 1, out=estimate)
    quality = (rng.random((n, MODELS)) < 0.1 + 0.7 * estimate).astype(float)
    cost = rng.lognormal(0, 0.5, (n, MODELS))
    cost *= price
    return estimate, price * (0.5 + rng.random((n, 1))), quality, cost


def two_model_world(n: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """score = P(cheap suffices), cheap and strong 0/1 outcomes, all (n,)."""
    rng = np.random.default_rng(seed)
    easy = rng.random(n)
    score = np.clip(easy + rng.normal(0, 0.3, n), 0, 1)
    return score, (rng.random(n) < easy).astype(float), (rng.random(n) < 0.4 + 0.6 * easy).astype(float)


def cpu(function: Callable, *args) -> float:
    began = time.process_time()
    function(*args)
    return time.process_time() - began


def interleave(rounds: int, **runs: Callable[[], None]) -> dict[str, float]:
    """Median CPU seconds of each, taken in turn so that a busy machine touches all alike."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            times[name].append(cpu(run))
    return {name: statistics.median(found) for name, found in times.items()}


def bare_numpy_pass(estimate, expected, quality, cost, weights, block: int = 1024) -> tuple[np.ndarray, np.ndarray]:
    """Mean quality and cost of each setting; see the module's docstring."""
    total = np.zeros((2, len(weights)))
    for start in range(0, len(estimate), block):
        part = slice(start, start + block)
        e, c, q, paid = estimate[part], expected[part], quality[part], cost[part]
        rows = np.arange(len(e))
        for k, weight in enumerate(weights):
            chosen = (e - weight * c).argmax(axis=1)
            total[0, k] += q[rows, chosen].sum()
            total[1, k] += paid[rows, chosen].sum()
    return total[0] / len(estimate), total[1] / len(estimate)


def part_evaluate(n: int, rounds: int) -> dict:
    data = pool_world(n)
    weights = decide.cost_weights(data[0], data[1], SETTINGS)
    compile_seconds = cpu(lambda: decide.sweep_intervals(*(a[:20_000] for a in data), weights,
                                                         stats.Resampler(min(n, 20_000), 200)))
    found: dict = {}

    def ours():
        found["ours"] = decide.sweep_intervals(*data, weights, stats.Resampler(n, RESAMPLES))

    def bare():
        found["bare"] = bare_numpy_pass(*data, weights)

    times = interleave(rounds, ours=ours, bare=bare, points_only=lambda: decide.sweep_scores(*data, weights),
                       read=lambda: [a.sum() for a in data])
    assert np.allclose(found["ours"].quality, found["bare"][0]) and np.allclose(found["ours"].cost, found["bare"][1])
    alone = subprocess.run([sys.executable, __file__, "--child", "--n", str(n)], capture_output=True, check=True)
    memory = json.loads(alone.stdout)
    return {"part": "evaluate", "n": n, "settings": len(weights), "cpu_s": times, "first_call_s": compile_seconds,
            "ours_over_bare": times["ours"] / times["bare"], "points_over_bare": times["points_only"] / times["bare"],
            "ns_per_row_and_resample": times["ours"] / n / RESAMPLES * 1e9,
            "data_mb": 4 * n * MODELS * 8 / 2**20, **memory}


def child(n: int) -> None:
    """One evaluation and nothing else, for its peak memory and wall seconds."""
    data = pool_world(n)
    weights = decide.cost_weights(data[0], data[1], SETTINGS)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    began = time.perf_counter()
    decide.sweep_intervals(*data, weights, stats.Resampler(n, RESAMPLES))
    print(json.dumps({"wall_s": time.perf_counter() - began, "peak_before_mb": before / 1024,
                      "peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024}))


def gather(values: np.ndarray, resamples: int, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return np.stack([values[rng.integers(len(values), size=len(values))].mean(axis=0) for _ in range(resamples)])


def part_intervals(n: int, rounds: int) -> dict:
    from scipy.stats import bootstrap

    _, _, quality, cost = pool_world(n)
    values = np.concatenate([quality, cost], axis=1)
    few = max(3, min(100, 3_000_000 // n))
    stats.Resampler(20_000, 300).means(np.ones(20_000))

    def scipy_way():
        for column in range(2):  # of 40
            bootstrap((values[:, column],), np.mean, n_resamples=few, method="percentile", vectorized=True, batch=1)

    runs = {"ours": lambda: stats.interval(stats.Resampler(n, RESAMPLES).means(values)),
            "gather": lambda: gather(values, few)}
    if n <= 100_000:
        runs["scipy"] = scipy_way
    times = interleave(rounds, **runs)
    times["gather"] *= RESAMPLES / few
    if "scipy" in times:
        times["scipy"] *= RESAMPLES / few * values.shape[1] / 2
    return {"part": "intervals", "n": n, "columns": values.shape[1], "cpu_s": times, "timed_resamples_of_peers": few,
            "ns_per_row_and_resample": {k: v / n / RESAMPLES * 1e9 for k, v in times.items()},
            **{f"{peer}_over_ours": times[peer] / times["ours"] for peer in times if peer != "ours"}}


def sorted_bincount(score, weak, strong, grid, resamples: int, seed: int = 0) -> np.ndarray:
    """APGR per resample from outcomes sorted by score: counts by bincount, running sums, each threshold's point."""
    rng = np.random.default_rng(seed)
    order = np.argsort(score)
    weak, strong, n = weak[order], strong[order], len(score)
    ends = np.searchsorted(score[order], grid, side="left")
    found = np.empty(resamples)
    for b in range(resamples):
        count = np.bincount(rng.integers(n, size=n), minlength=n)
        share = np.concatenate([[0], np.cumsum(count)])[ends] / n
        low, high = count @ weak / n, count @ strong / n
        quality = low + np.concatenate([[0.0], np.cumsum(count * (strong - weak))])[ends] / n
        x, y = np.concatenate([[0.0], share, [1.0]]), np.concatenate([[low], quality, [high]])
        found[b] = (np.trapezoid(y, x) - low) / (high - low)
    return found


def part_curve(n: int, rounds: int) -> dict:
    data = two_model_world(n)
    grid = stats.curve_intervals(*data, SETTINGS, 10).thresholds
    stats.curve_intervals(*data, grid, 10)
    few = max(3, min(100, 3_000_000 // n))
    times = interleave(rounds, ours=lambda: stats.curve_intervals(*data, grid, RESAMPLES),
                       sorted_bincount=lambda: sorted_bincount(*data, grid, few))
    times["sorted_bincount"] *= RESAMPLES / few
    return {"part": "curve", "n": n, "cpu_s": times, "timed_resamples_of_peer": few,
            "peer_over_ours": times["sorted_bincount"] / times["ours"]}


def routellm_style(scores: list[np.ndarray], weak: np.ndarray, strong: np.ndarray) -> list[tuple[float, float]]:
    """RouteLLM's kind of work: per threshold an array of model names counted by Counter, and answers added by `sum`."""
    import pandas as pd

    cheap_name, strong_name = "mistralai/Mixtral-8x7B-Instruct-v0.1", "gpt-4-1106-preview"
    table = pd.DataFrame({cheap_name: weak.astype(bool), strong_name: strong.astype(bool)})
    points = []
    for score in scores:
        table["score"] = score
        edges = pd.qcut(table["score"], 10, retbins=True)[1]
        for k, edge in enumerate(edges):
            to_strong = table["score"] > edge if k == 10 else table["score"] >= edge
            calls = Counter(np.where(to_strong, strong_name, cheap_name))
            right = np.where(to_strong, table[strong_name], table[cheap_name])
            points.append((calls[strong_name] / len(table) * 100, sum(right) / len(right) * 100))
    return points


def part_loop(rounds: int) -> dict:
    rng = np.random.default_rng(0)
    _, weak, strong = two_model_world(14_037)
    scores = [rng.random(14_037) for _ in range(10)]
    found: dict = {}

    def theirs():
        found["theirs"] = routellm_style(scores, weak, strong)

    def ours():
        found["ours"] = [metrics.compat.routellm(score, weak, strong) for score in scores]

    times = interleave(rounds, routellm_style=theirs, ours_11=ours,
                       ours_all=lambda: [metrics.apgr(metrics.threshold_curve(1 - s, weak, strong)) for s in scores])
    points = sorted(pair for curve in found["ours"] for pair in zip(curve.strong_percent, curve.accuracy, strict=True))
    assert np.allclose(points, sorted(found["theirs"]))
    return {"part": "loop", "rows": 14_037, "cpu_s": times, "loop_over_11": times["routellm_style"] / times["ours_11"],
            "loop_over_all_thresholds": times["routellm_style"] / times["ours_all"]}


def part_agree(n: int = 4000, resamples: int = 4000) -> dict:
    """Largest difference of interval end points between methods, in Monte-Carlo standard errors. Must stay below 3.

    A 2.5 % quantile of B normal draws has standard error sqrt(.025 * .975 / B) / density = 2.67 sd / sqrt(B). Over
    many end points the bound is Bonferroni-widened: the mean square must be near 1, and the largest below the normal
    quantile at the same overall risk as 3 for one.
    """
    from scipy.stats import bootstrap, norm

    estimate, expected, quality, cost = pool_world(n)
    values = np.concatenate([quality, cost], axis=1)
    error = 2.67 * values.std(axis=0) / np.sqrt(n) / np.sqrt(resamples) * np.sqrt(2)
    ours = np.array(stats.interval(stats.Resampler(n, resamples).means(values)))
    peers = {"gather": np.array(stats.interval(gather(values, resamples)))}
    low_high = [bootstrap((values[:, j],), np.mean, n_resamples=resamples, method="percentile", batch=50,
                          rng=np.random.default_rng(j)).confidence_interval for j in (0, 19, 20, 39)]
    peers["scipy"] = np.array(low_high).T
    report: dict = {"part": "agree", "n": n, "resamples": resamples}
    for name, ends in peers.items():
        at = [0, 19, 20, 39] if name == "scipy" else slice(None)
        z = np.abs(ours[:, at] - ends) / error[at]
        bound = max(3.0, float(norm.isf(0.00135 / z.size)))
        report[name] = {"end_points": z.size, "largest_sigma": float(z.max()), "mean_square": float((z**2).mean()),
                        "bound": bound}
        assert z.max() < bound, (name, z.max())
    score, weak, strong = two_model_world(n)
    curve = stats.curve_intervals(score, weak, strong, SETTINGS, resamples)
    slow = sorted_bincount(score, weak, strong, curve.thresholds, resamples)
    error = 2.67 * slow.std() / np.sqrt(resamples) * np.sqrt(2)
    z = np.abs(np.array([curve.apgr.lo, curve.apgr.hi]) - stats.interval(slow)) / error
    report["curve"] = {"largest_sigma": float(z.max())}
    assert z.max() < 3.5, z
    return report


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--n", type=int, action="append", help="prompts; may stand several times (default 100000)")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--part", action="append", choices=PARTS)
    parser.add_argument("--out", help="write the results here as JSON lines")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args()
    sizes = given.n or [100_000]
    if given.child:
        child(sizes[0])
        return
    results = []
    sized = {"evaluate": part_evaluate, "intervals": part_intervals, "curve": part_curve}
    for part in given.part or PARTS:
        for n in sizes if part in sized else [0]:
            if n:
                results.append(sized[part](n, given.rounds))
            else:
                results.append(part_loop(given.rounds) if part == "loop" else part_agree())
            show(results[-1])
    if given.out:
        Path(given.out).write_text("".join(json.dumps(row) + "\n" for row in results))


def show(row: dict) -> None:
    def text(value):
        if isinstance(value, dict):
            return "{" + ", ".join(f"{k} {text(v)}" for k, v in value.items()) + "}"
        return f"{value:.4g}" if isinstance(value, float) else str(value)

    print("  ".join(f"{k} {text(v)}" if k != "part" else f"{v}:" for k, v in row.items()), flush=True)


if __name__ == "__main__":
    main()
