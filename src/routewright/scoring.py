"""From estimates to verdicts: what every router costs and is worth, beside the controls, with paired intervals.

The rules of the comparison, in one place:

- A router's settings (cost weights) are swept on dev and *chosen* on dev; what is reported is test.
- Two settings are reported. `balanced`: the best dev reward at the stated cost weight. `parity`: the cheapest setting
  whose dev quality reaches that of the best single model on dev. Between them runs the router's curve: the settings
  on the upper concave hull of its dev points, joined by straight lines, because a random mix of two settings
  reaches the line between them. Below its cheapest setting the curve runs on to the cheapest model.
- A content-free control never reads the prompt. The best of them at a given cost is the upper concave hull of the
  always-one-model points of the test prompts themselves (which can only flatter the control).
- Every number is a function of means over prompts, computed on the data and on the same bootstrap resamples for all,
  so differences are paired. Resamples are of groups: near-duplicates are drawn together. Arrays named `samples` are
  (1 + B, ...): row 0 is the data, rows 1.. are the resamples.
- An interval against a content-free mix is never narrower than chance: the spread that the same calls would show if
  they were dealt out over the prompts at random (`metrics.chance_sd`). Where a router moves a handful of prompts and
  all of them go well, every resample agrees, and the percentile interval alone would call luck a gain.
- Several seeds are several divisions of the prompts (`View`). Statistics are averaged over the views, which share the
  resamples. Intervals stand for another draw of prompts; the deviation between seeds is reported beside them.

Money is USD; costs include the router's own overhead.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from statistics import NormalDist
from typing import Any

import numpy as np

from routewright import metrics
from routewright.decide import cost_weights, expected_cost, sweep, two_model_score
from routewright.errors import UserError
from routewright.outcomes import OutcomeTable
from routewright.stats import Resampler, interval, verdict

POINTS = ("balanced", "parity")
LEDGER = ("view", "router", "point", "prompt_id", "model", "estimate", "quality", "cost_usd", "overhead_usd",
          "cost_weight")
MOST_TASKS = 40  # tasks with a row of their own; the rest share one


@dataclass(frozen=True)
class View:
    """One division of the prompts: row numbers of the whole table for each split."""

    name: str
    seed: int
    train: np.ndarray
    dev: np.ndarray
    test: np.ndarray


@dataclass
class Estimates:
    """What one router predicts in one view. Columns are places in the table's models.

    estimate     (N, K) predicted quality, of dev and of test
    fixed        (N,) places in `columns` where the router decides by itself and has no settings
    overhead     (N,) USD the router itself costs
    """

    columns: np.ndarray
    dev: np.ndarray
    test: np.ndarray
    dev_overhead: np.ndarray
    test_overhead: np.ndarray
    dev_fixed: np.ndarray | None = None
    test_fixed: np.ndarray | None = None


@dataclass
class Contestant:
    """A router or content control: its estimates by place of the view."""

    name: str
    kind: str
    is_control: bool
    estimates: dict[int, Estimates]
    facts: dict[str, Any] = field(default_factory=dict)  # what the report tells about it: options, folder, training
    whole: np.ndarray | None = None  # (N of the whole table, M) where nothing was learnt from the cache
    scored: tuple[int, ...] = ()  # the views its own scores are averaged over; () for all it has estimates in

    @property
    def views(self) -> list[int]:
        return list(self.scored or self.estimates)


@dataclass
class Rules:
    """How the comparison is made. `reward` is a reward.Reward."""

    reward: Any
    n_settings: int = 101
    n_resamples: int = 1000
    level: float = 0.95
    seed: int = 0


# ---------------------------------------------------------------- resampled means

class Board:
    """Collects columns of values over test prompts, and resamples all of them at once.

    `groups` names the group of each prompt of the whole table. A resample draws groups, because prompts of one group
    are near-duplicates and no separate evidence.
    """

    def __init__(self, views: Sequence[View], rules: Rules, groups: Sequence[Any]) -> None:
        units: dict[Any, int] = {}
        for row in np.unique(np.concatenate([v.test for v in views])):
            units.setdefault(groups[row], len(units))
        self.at = [np.array([units[groups[row]] for row in v.test]) for v in views]
        self.resampler = Resampler(len(units), rules.n_resamples, rules.seed)
        self._tops: list[tuple[int, np.ndarray]] = []
        self._bottoms: list[tuple[int, np.ndarray]] = [(i, np.ones(len(v.test))) for i, v in enumerate(views)]
        self._pairs: list[tuple[int, int]] = []
        self._samples: np.ndarray | None = None

    def mask(self, view: int, mask: np.ndarray) -> int:
        """A subset of the view's test prompts, to be handed to `add`."""
        self._bottoms.append((view, mask.astype(float)))
        return len(self._bottoms) - 1

    def add(self, view: int, values: np.ndarray, mask: int | None = None) -> int:
        """A column of values (N of the view's test prompts,); its mean will be `board[handle]`."""
        bottom = view if mask is None else mask
        self._pairs.append((len(self._tops), bottom))
        self._tops.append((view, values if mask is None else values * self._bottoms[mask][1]))
        return len(self._pairs) - 1

    def solve(self) -> None:
        """Mean of every column on the data (row 0) and on every resample."""
        columns = [*self._bottoms, *self._tops]
        matrix = np.empty((self.resampler.n, len(columns)))
        for c, (view, values) in enumerate(columns):
            matrix[:, c] = np.bincount(self.at[view], weights=values, minlength=self.resampler.n)
        means = np.concatenate([matrix.mean(axis=0)[None], self.resampler.means(matrix)])
        bottoms, tops = means[:, :len(self._bottoms)], means[:, len(self._bottoms):]
        index = np.array([b for _, b in self._pairs])
        with np.errstate(invalid="ignore", divide="ignore"):
            self._samples = np.where(bottoms[:, index] > 0, tops / bottoms[:, index], np.nan)
        for at, (_, bottom) in enumerate(self._pairs):  # the data's own means to the last bit
            view, values = self._tops[at]
            self._samples[0, at] = values.sum() / self._bottoms[bottom][1].sum()

    def __getitem__(self, handle: int | Sequence[int]) -> np.ndarray:
        """(1 + B,) samples of one handle, (1 + B, K) of several."""
        return self._samples[:, handle]


def hull_quality(cost: np.ndarray, quality: np.ndarray, at: np.ndarray) -> np.ndarray:
    """Height of the upper concave hull of M points at the costs `at`, row by row.

    Points may be wasted (a dearer, worse model never lowers the hull). Left of every point the hull is the quality of
    the cheapest one, which nothing content-free can reach for that little: the control is flattered, never the router.

    Args:
        cost, quality: (R, M)
        at: (R, G)
    Returns:
        (R, G)
    """
    r, m = cost.shape
    rows = np.arange(r)
    height = np.repeat(quality[rows, cost.argmin(axis=1)][:, None], at.shape[1], axis=1)
    for i in range(m):
        height = np.where(at >= cost[:, i:i + 1], np.maximum(height, quality[:, i:i + 1]), height)
        for j in range(m):
            if i == j:
                continue
            left, right = cost[:, i:i + 1], cost[:, j:j + 1]
            inside = (left < right) & (at >= left) & (at <= right)
            if not inside.any():
                continue
            with np.errstate(invalid="ignore", divide="ignore"):
                line = quality[:, i:i + 1] + (quality[:, j:j + 1] - quality[:, i:i + 1]) * (at - left) / (right - left)
            height = np.where(inside, np.maximum(height, line), height)
    return height


def line_quality(cost: np.ndarray, quality: np.ndarray, at: np.ndarray) -> np.ndarray:
    """Linear interpolation row by row: np.interp for (R, K) points at (R, G) costs. Returns (R, G).

    Points are sorted by cost; outside of them the line is flat.
    """
    order = np.argsort(cost, axis=1, kind="stable")
    x, y = np.take_along_axis(cost, order, axis=1), np.take_along_axis(quality, order, axis=1)
    right = np.zeros(at.shape, np.int64)
    for k in range(x.shape[1]):
        right += x[:, k:k + 1] <= at
    left = np.clip(right - 1, 0, x.shape[1] - 1)
    right = np.clip(right, 0, x.shape[1] - 1)
    x0, x1 = np.take_along_axis(x, left, axis=1), np.take_along_axis(x, right, axis=1)
    y0, y1 = np.take_along_axis(y, left, axis=1), np.take_along_axis(y, right, axis=1)
    with np.errstate(invalid="ignore", divide="ignore"):
        inside = (x1 > x0) & (at > x0) & (at < x1)
        return np.where(inside, y0 + (y1 - y0) * (at - x0) / (x1 - x0), np.where(at < x0, y[:, :1], y0))


# ---------------------------------------------------------------- settings, chosen on dev

@dataclass
class Swept:
    """A contestant's settings in one view, and which of them dev chose."""

    weights: np.ndarray  # (T,)
    dev_quality: np.ndarray  # (T,)
    dev_cost: np.ndarray  # (T,)
    dev_reward: np.ndarray  # (T,)
    decisions: np.ndarray  # (T, N test) places in the table's models
    frontier: np.ndarray  # places of the settings on dev's hull, cheap to dear
    chosen: dict[str, int]  # place of the balanced and the parity setting
    reached: bool  # whether any setting reached the best single model's dev quality


def best_single(table: OutcomeTable) -> int:
    """Column of the model with the best mean quality; the cheaper of two equals."""
    quality, cost = table.quality.mean(axis=0), table.cost.mean(axis=0)
    return int(np.lexsort((cost, -quality))[0])


def sweep_settings(train: OutcomeTable, dev: OutcomeTable, test: OutcomeTable, est: Estimates, rules: Rules,
                   expected: tuple[np.ndarray, np.ndarray] | None = None) -> Swept:
    """Sweep a contestant's cost weights on dev, choose there, and decide for the test prompts."""
    columns = est.columns
    if est.dev_fixed is not None:
        weights = np.array([0.0])
        dev_picks, test_picks = columns[est.dev_fixed][None], columns[est.test_fixed][None]
    else:
        dev_expected, test_expected = expected or (expected_cost(train, dev), expected_cost(train, test))
        weights = cost_weights(est.dev, dev_expected[:, columns], rules.n_settings)
        dev_picks = columns[sweep(est.dev, dev_expected[:, columns], weights)]
        test_picks = columns[sweep(est.test, test_expected[:, columns], weights)]
    rows = np.arange(dev.n)
    quality, cost, reward = (np.empty(len(weights)) for _ in range(3))
    for t, picks in enumerate(dev_picks):
        spent = dev.cost[rows, picks] + est.dev_overhead
        gained = dev.quality[rows, picks]
        quality[t], cost[t] = gained.mean(), spent.mean()
        reward[t] = rules.reward.of(gained, spent).mean()
    needed = dev.quality[:, best_single(dev)].mean()
    reached = quality >= needed - 1e-12
    balanced = int(np.lexsort((cost, -reward))[0])
    parity = int(np.lexsort((cost, -quality))[0])
    if reached.any():
        candidates = np.flatnonzero(reached)
        parity = int(candidates[np.lexsort((-quality[candidates], cost[candidates]))[0]])
    return Swept(weights, quality, cost, reward, test_picks, metrics.hull(cost, quality),
                 {"balanced": balanced, "parity": parity}, bool(reached.any()))


def indifference_weight(table: OutcomeTable) -> float:
    """The cost weight at which the cheapest and the best single model earn the same reward, quality per USD.

    Every mix of those two earns that reward too, so whatever a router gains there it gains by reading prompts. Three
    significant digits. Where the cheapest model is also the best, a tenth of a point of quality per mean cost.
    """
    quality, cost = table.quality.mean(axis=0), table.cost.mean(axis=0)
    best, cheap = best_single(table), int(cost.argmin())
    gain, price = quality[best] - quality[cheap], cost[best] - cost[cheap]
    weight = gain / price if gain > 0 and price > 0 else 0.1 / max(float(cost.mean()), 1e-12)
    return float(f"{weight:.3g}")


# ---------------------------------------------------------------- the comparison

@dataclass
class Comparison:
    """The scores as plain JSON values, and the arrays behind tables and examples."""

    results: dict[str, Any]
    decisions: dict[str, np.ndarray]  # columns of decisions.parquet
    swept: dict[tuple[str, int], Swept]


class _Place:
    """Handles of one contestant in one view."""

    def __init__(self) -> None:
        self.points: dict[str, dict[str, int]] = {}
        self.frontier_quality: list[int] = []
        self.frontier_cost: list[int] = []
        self.tasks: dict[str, tuple[int, int]] = {}


def compare(table: OutcomeTable, views: Sequence[View], contestants: Sequence[Contestant], rules: Rules) -> Comparison:
    """Score every contestant in every view it has estimates for, and set it beside the controls."""
    if table.m < 2:
        raise UserError(f"the pool has one model ({table.models[0]}), so there is nothing to route; record two or more")
    board = Board(views, rules, [p.group or p.prompt_id for p in table.prompts])
    splits = [(table.rows(v.train), table.rows(v.dev), table.rows(v.test)) for v in views]
    expected = [(expected_cost(train, dev), expected_cost(train, test)) for train, dev, test in splits]
    world = [_add_world(board, i, test, dev, rules) for i, (_, dev, test) in enumerate(splits)]
    tasks = _task_names(table, views)
    masks = [_add_tasks(board, i, splits[i], tasks) for i in range(len(views))]
    swept: dict[tuple[str, int], Swept] = {}
    places: dict[tuple[str, int], _Place] = {}
    for contestant in contestants:
        for i, est in contestant.estimates.items():
            run = sweep_settings(*splits[i], est, rules, expected[i])
            swept[contestant.name, i] = run
            places[contestant.name, i] = _add_contestant(board, i, splits[i][2], est, run, masks[i], rules)
    board.solve()
    grid = _cost_grid(board, world)
    score = _Scorer(table, views, splits, contestants, rules, board, world, grid, swept, places, masks, tasks)
    results = score.results()
    _check(board, world, places)
    return Comparison(results, score.decisions(), swept)


def _add_world(board: Board, view: int, test: OutcomeTable, dev: OutcomeTable, rules: Rules) -> dict[str, Any]:
    """Columns that every contestant of a view is set beside: each model always, and the oracles."""
    rewards = np.stack([rules.reward.of(test.quality[:, j], test.cost[:, j]) for j in range(test.m)], axis=1)
    rows = np.arange(test.n)
    # Two oracles: the best reward (what regret is measured against), and the cheapest of the best answers.
    by_reward, by_quality = metrics.reward_oracle(rewards, test.cost), metrics.oracle(test.quality, test.cost)
    return {
        "quality": [board.add(view, test.quality[:, j]) for j in range(test.m)],
        "cost": [board.add(view, test.cost[:, j]) for j in range(test.m)],
        "reward": [board.add(view, rewards[:, j]) for j in range(test.m)],
        "oracle": {"quality": board.add(view, test.quality[rows, by_quality]),
                   "cost": board.add(view, test.cost[rows, by_quality]),
                   "reward": board.add(view, rewards[rows, by_reward]), "picks": by_quality},
        "best": best_single(dev), "dev_quality": dev.quality.mean(axis=0), "dev_cost": dev.cost.mean(axis=0),
    }


def _task_names(table: OutcomeTable, views: Sequence[View]) -> list[str]:
    """The tasks of the test prompts, the most frequent first; at most MOST_TASKS."""
    names, counts = np.unique([table.prompts[i].task for v in views for i in v.test], return_counts=True)
    order = np.lexsort((names, -counts))
    return [str(names[i]) for i in order][:MOST_TASKS]


def _add_tasks(board: Board, view: int, split: tuple[OutcomeTable, ...], tasks: list[str]) -> dict[str, Any]:
    """Per task: the mask, how many prompts, and the best single model's quality and cost on it."""
    _, dev, test = split
    own = np.array([p.task for p in test.prompts])
    best = best_single(dev)
    named = {name: own == name for name in tasks}
    rest = ~np.isin(own, tasks)
    if rest.any():
        named["(other tasks)"] = rest
    found = {}
    for name, mask in named.items():
        if mask.any():
            handle = board.mask(view, mask)
            found[name] = {"mask": handle, "n": int(mask.sum()),
                           "quality": board.add(view, test.quality[:, best], handle),
                           "cost": board.add(view, test.cost[:, best], handle)}
    return found


def _add_contestant(board: Board, view: int, test: OutcomeTable, est: Estimates, run: Swept, masks: Mapping[str, Any],
                    rules: Rules) -> _Place:
    place = _Place()
    rows = np.arange(test.n)
    for point in POINTS:
        picks = run.decisions[run.chosen[point]]
        quality, cost = test.quality[rows, picks], test.cost[rows, picks] + est.test_overhead
        place.points[point] = {"quality": board.add(view, quality), "cost": board.add(view, cost),
                               "reward": board.add(view, rules.reward.of(quality, cost))}
        if point == "balanced":
            place.tasks = {name: (board.add(view, quality, task["mask"]), board.add(view, cost, task["mask"]))
                           for name, task in masks.items()}
    for setting in run.frontier:
        picks = run.decisions[setting]
        place.frontier_quality.append(board.add(view, test.quality[rows, picks]))
        place.frontier_cost.append(board.add(view, test.cost[rows, picks] + est.test_overhead))
    return place


def _cost_grid(board: Board, world: list[dict[str, Any]]) -> np.ndarray:
    """(G,) costs from the cheapest to the dearest always-one-model, fixed by the pool and not by who is compared."""
    ends = np.array([[board[w["cost"]][0].min(), board[w["cost"]][0].max()] for w in world]).mean(axis=0)
    low, high = float(ends[0]), float(ends[1])
    if not high > low:
        return np.array([low, low + max(low, 1e-12)])
    own = np.mean([board[w["cost"]][0] for w in world], axis=0)  # the hull bends there
    parts = [np.linspace(low, high, 41), np.clip(own, low, high)]
    return np.unique(np.concatenate([*parts, np.geomspace(low, high, 21)] if low > 0 else parts))


class _Scorer:
    """Turns solved columns into results. One instance a comparison."""

    def __init__(self, table: OutcomeTable, views: Sequence[View], splits: Sequence[tuple[OutcomeTable, ...]],
                 contestants: Sequence[Contestant], rules: Rules, board: Board, world: list[dict[str, Any]],
                 grid: np.ndarray, swept: dict, places: dict, masks: list, tasks: list[str]) -> None:
        self.table, self.views, self.splits, self.contestants = table, views, splits, contestants
        self.rules, self.board, self.world, self.grid = rules, board, world, grid
        self.swept, self.places, self.masks, self.tasks = swept, places, masks, tasks
        self.hulls = [self._hull(i, np.broadcast_to(grid, (1 + rules.n_resamples, len(grid))))
                      for i in range(len(views))]

    # ------------------------------------------------------------ small parts

    def _hull(self, view: int, at: np.ndarray) -> np.ndarray:
        return hull_quality(self.board[self.world[view]["cost"]], self.board[self.world[view]["quality"]], at)

    def _curve(self, name: str, view: int, at: np.ndarray) -> np.ndarray:
        """Quality of a contestant's curve at costs (1 + B, G)."""
        return line_quality(*self._curve_points(name, view), at)

    def _curve_points(self, name: str, view: int) -> tuple[np.ndarray, np.ndarray]:
        """(cost, quality), each (1 + B, K): the cheapest model where it is cheaper, and the settings on dev's hull."""
        place, world, run = self.places[name, view], self.world[view], self.swept[name, view]
        cost, quality = self.board[place.frontier_cost], self.board[place.frontier_quality]
        cheapest = int(world["dev_cost"].argmin())
        if world["dev_cost"][cheapest] < run.dev_cost[run.frontier].min():
            cost = np.column_stack([self.board[world["cost"][cheapest]], cost])
            quality = np.column_stack([self.board[world["quality"][cheapest]], quality])
        return cost, quality

    def _area(self, heights: np.ndarray) -> np.ndarray:
        """AIQ: mean height over the cost range. (1 + B, G) -> (1 + B,)."""
        return np.trapezoid(heights, self.grid, axis=1) / (self.grid[-1] - self.grid[0])

    def _chance(self, name: str, settings: Mapping[int, Mapping[int, float]]) -> float:
        """`metrics.chance_sd` of the mean over views of a weighted sum of the qualities of settings.

        `settings` is view -> {setting: weight}. As in the resamples, near-duplicates count as one, and a prompt that
        stands in the test split of several views is one prompt.
        """
        units = self.board.resampler.n
        calls, quality, count = np.zeros((units, self.table.m)), np.zeros((units, self.table.m)), np.zeros((units, 1))
        for view, weights in settings.items():
            test, run, at = self.splits[view][2], self.swept[name, view], self.board.at[view]
            own = np.zeros(test.quality.shape)
            for setting, weight in weights.items():
                own[np.arange(test.n), run.decisions[setting]] += weight
            np.add.at(calls, at, (own - own.mean(axis=0)) / (test.n * len(settings)))
            np.add.at(quality, at, test.quality)
            np.add.at(count, at, 1.0)
        seen = count[:, 0] > 0
        return metrics.chance_sd(quality[seen] / count[seen], calls[seen] * seen.sum())

    def _area_weights(self, name: str, view: int) -> dict[int, float]:
        """Setting -> its weight in the AIQ: the area is a weighted sum of the qualities along the curve."""
        cost, _ = self._curve_points(name, view)
        k = cost.shape[1]
        at = np.broadcast_to(self.grid, (k, len(self.grid)))
        weights = self._area(line_quality(np.repeat(cost[:1], k, axis=0), np.eye(k), at))
        frontier = self.swept[name, view].frontier.tolist()
        return dict(zip(frontier, weights[-len(frontier):].tolist(), strict=True))  # the cheapest model comes first

    def say(self, by_view: Sequence[np.ndarray], judged: bool = False, chance: float = 0.0) -> dict[str, Any]:
        """{value, lo, hi} of the mean over views, the deviation between seeds, and the verdict of a difference.

        The interval reaches at least as far as that of a normal quantity with the deviation `chance`.
        """
        samples = np.mean(by_view, axis=0)
        lo, hi = interval(samples[1:], self.rules.level)
        if chance:
            reach = NormalDist().inv_cdf(0.5 + self.rules.level / 2) * chance
            lo, hi = min(lo, samples[0] - reach), max(hi, samples[0] + reach)
        said = {"value": clean(samples[0]), "lo": clean(lo), "hi": clean(hi)}
        if len(by_view) > 1:
            said["seed_sd"] = clean(np.std([s[0] for s in by_view], ddof=1))
        if judged:
            said["verdict"] = None if said["lo"] is None else verdict(lo, hi)
        return said

    def _mean(self, handles: Sequence[int], judged: bool = False, scale: float = 1.0) -> dict[str, Any]:
        return self.say([self.board[h] * scale for h in handles], judged)

    # ------------------------------------------------------------ the whole

    def results(self) -> dict[str, Any]:
        return {"order": {"models": list(self.table.models), "routers": [c.name for c in self.contestants]},
                "models": self._models(), "oracle": self._oracle(), "mix": self._mix(),
                "grid": [clean(c) for c in self.grid],
                "best_single": self._best_single(), "level": self.rules.level, "n_resamples": self.rules.n_resamples,
                "groups_resampled": self.board.resampler.n,
                "views": [{"name": v.name, "seed": v.seed, "train": len(v.train), "dev": len(v.dev),
                           "test": len(v.test)}
                          for v in self.views],
                "tasks": self._tasks(),
                "routers": {c.name: self._contestant(c) for c in self.contestants}}

    def _best_single(self) -> str:
        names = [self.table.models[w["best"]] for w in self.world]
        return max(sorted(set(names), key=self.table.models.index), key=names.count)

    def _models(self) -> dict[str, Any]:
        found = {}
        for j, name in enumerate(self.table.models):
            spec = self.table.pool[name]
            found[name] = {"quality": self._mean([w["quality"][j] for w in self.world]),
                           "cost_per_1k": self._mean([w["cost"][j] for w in self.world], scale=1000),
                           "reward": self._mean([w["reward"][j] for w in self.world]),
                           "price_input": spec.price_input, "price_output": spec.price_output}
        return found

    def _oracle(self) -> dict[str, Any]:
        oracle = [w["oracle"] for w in self.world]
        shares = np.mean([np.bincount(o["picks"], minlength=self.table.m) / len(o["picks"]) for o in oracle], axis=0)
        return {"quality": self._mean([o["quality"] for o in oracle]),
                "cost_per_1k": self._mean([o["cost"] for o in oracle], scale=1000),
                "reward": self._mean([o["reward"] for o in oracle]),
                "shares": dict(zip(self.table.models, map(clean, shares), strict=True))}

    def _mix(self) -> dict[str, Any]:
        """The best content-free control over the cost range."""
        heights = np.mean(self.hulls, axis=0)
        lo, hi = interval(heights[1:], self.rules.level)
        return {"aiq": self.say([self._area(h) for h in self.hulls]), "quality": [clean(q) for q in heights[0]],
                "lo": [clean(q) for q in lo], "hi": [clean(q) for q in hi]}

    def _tasks(self) -> dict[str, Any]:
        found = {}
        for name in dict.fromkeys(n for m in self.masks for n in m):
            here = [m[name] for m in self.masks if name in m]
            found[name] = {"n": sum(t["n"] for t in here),
                           "best_single_quality": self._mean([t["quality"] for t in here]),
                           "best_single_cost_per_1k": self._mean([t["cost"] for t in here], scale=1000)}
        return found

    def _contestant(self, contestant: Contestant) -> dict[str, Any]:
        at = contestant.views
        heights = [self._curve(contestant.name, i, np.broadcast_to(self.grid, self.hulls[i].shape)) for i in at]
        areas = [self._area(h) for h in heights]
        band = np.mean(heights, axis=0)
        lo, hi = interval(band[1:], self.rules.level)
        points = {point: self._point(contestant, point) for point in POINTS}
        area_chance = self._chance(contestant.name, {i: self._area_weights(contestant.name, i) for i in at})
        return {
            "kind": contestant.kind, "control": contestant.is_control, "facts": contestant.facts,
            "views": [self.views[i].name for i in at],
            "verdict": points["balanced"]["versus_mix"]["verdict"],
            "points": points,
            "aiq": self.say(areas),
            "aiq_versus_mix": self.say([a - self._area(self.hulls[i]) for a, i in zip(areas, at, strict=True)],
                                       judged=True, chance=area_chance),
            "curve": {"quality": [clean(q) for q in band[0]], "lo": [clean(q) for q in lo],
                      "hi": [clean(q) for q in hi]},
            "settings": self._settings(contestant.name, at[0]),
            "parity_reached_on_dev": [self.swept[contestant.name, i].reached for i in at],
            "tasks": self._contestant_tasks(contestant.name, at),
            "calibration": self._calibration(contestant, at),
            "two_model": self._two_model(contestant, at),
        }

    def _point(self, contestant: Contestant, point: str) -> dict[str, Any]:
        name, at = contestant.name, contestant.views
        handles = [self.places[name, i].points[point] for i in at]
        quality, cost = [self.board[h["quality"]] for h in handles], [self.board[h["cost"]] for h in handles]
        reward = [self.board[h["reward"]] for h in handles]
        best = [self.world[i]["best"] for i in at]
        best_quality = [self.board[self.world[i]["quality"][b]] for i, b in zip(at, best, strict=True)]
        best_cost = [self.board[self.world[i]["cost"][b]] for i, b in zip(at, best, strict=True)]
        mix = [self._hull(i, c[:, None])[:, 0] for i, c in zip(at, cost, strict=True)]
        with np.errstate(invalid="ignore", divide="ignore"):
            ratio = [c / b for c, b in zip(cost, best_cost, strict=True)]
        oracle = [self.board[self.world[i]["oracle"]["reward"]] for i in at]
        shares = [self._shares(name, i, point) for i in at]
        chance = self._chance(name, {i: {self.swept[name, i].chosen[point]: 1.0} for i in at})
        said = {
            "quality": self.say(quality), "cost_per_1k": self.say([c * 1000 for c in cost]),
            "reward": self.say(reward), "regret": self.say([o - r for o, r in zip(oracle, reward, strict=True)]),
            "cost_ratio": self.say(ratio),
            "quality_difference": self.say([q - b for q, b in zip(quality, best_quality, strict=True)], judged=True),
            "versus_mix": self.say([q - m for q, m in zip(quality, mix, strict=True)], judged=True, chance=chance),
            "dev_cost_ratio": clean(np.mean([self._dev_ratio(name, i, point) for i in at])),
            "dev_quality_difference": clean(np.mean([self._dev_gap(name, i, point) for i in at])),
            "dev_reward": clean(np.mean([self._dev_reward(name, i, point) for i in at])),
            "mix_quality": clean(np.mean([m[0] for m in mix])),
            "cost_weight": [clean(self.swept[name, i].weights[self.swept[name, i].chosen[point]]) for i in at],
            "shares": dict(zip(self.table.models, map(clean, np.mean(shares, axis=0)), strict=True)),
            "controls": self._controls(contestant, quality, cost, shares, chance),
        }
        return {**said, **self._usage(contestant, point), **self._collapse(contestant, point),
                "arena": clean(metrics.arena_score(said["cost_per_1k"]["value"], said["quality"]["value"]))}

    def _dev_ratio(self, name: str, view: int, point: str) -> float:
        """Cost over the best single model's on dev: what may be looked at when one router is to be picked."""
        run, world = self.swept[name, view], self.world[view]
        return run.dev_cost[run.chosen[point]] / max(world["dev_cost"][world["best"]], 1e-300)

    def _dev_gap(self, name: str, view: int, point: str) -> float:
        """Quality minus the best single model's on dev."""
        run, world = self.swept[name, view], self.world[view]
        return run.dev_quality[run.chosen[point]] - world["dev_quality"][world["best"]]

    def _dev_reward(self, name: str, view: int, point: str) -> float:
        run = self.swept[name, view]
        return run.dev_reward[run.chosen[point]]

    def _shares(self, name: str, view: int, point: str) -> np.ndarray:
        run = self.swept[name, view]
        picks = run.decisions[run.chosen[point]]
        return np.bincount(picks, minlength=self.table.m) / len(picks)

    def _controls(self, contestant: Contestant, quality: list, cost: list, shares: list,
                  chance: float) -> dict[str, Any]:
        """Quality of each control at this router's cost, and the paired difference router minus control.

        Two of them read no prompt. "shuffled": the router's own calls, dealt out at random. "fixed split": the mix of
        models that was best on dev, in the shares that cost as much on test.
        """
        at = contestant.views
        found: dict[str, list[np.ndarray]] = {"shuffled": [], "fixed split": []}
        for i, c, share in zip(at, cost, shares, strict=True):
            world_quality = self.board[self.world[i]["quality"]]
            found["shuffled"].append(world_quality @ share)
            found["fixed split"].append(world_quality @ metrics.mix_weights(
                float(c[0]), self.board[self.world[i]["cost"]][0], self.world[i]["dev_quality"]))
        reads_nothing = set(found)
        for other in self.contestants:
            yardstick = (other.is_control or other.kind == "knn") and other.name != contestant.name
            if yardstick and all(i in other.estimates for i in at):
                found[other.name] = [self._curve(other.name, i, c[:, None])[:, 0]
                                     for i, c in zip(at, cost, strict=True)]
        said = {}
        for name, control in found.items():
            said[name] = {"quality": clean(np.mean([c[0] for c in control])),
                          **self.say([q - c for q, c in zip(quality, control, strict=True)], judged=True,
                                     chance=chance if name in reads_nothing else 0.0)}
        return said

    def _usage(self, contestant: Contestant, point: str) -> dict[str, Any]:
        """Tokens, latency and overhead per prompt; None where nobody recorded them."""
        tokens, latency, overhead = [], [], []
        for i in contestant.views:
            est, test, run = contestant.estimates[i], self.splits[i][2], self.swept[contestant.name, i]
            rows, picks = np.arange(test.n), run.decisions[run.chosen[point]]
            tokens.append((test.input_tokens[rows, picks] + test.output_tokens[rows, picks]).mean())
            latency.append(test.latency[rows, picks].mean())
            overhead.append(est.test_overhead.mean())
        return {"tokens": clean(np.mean(tokens)) if self.table.input_tokens.any() or self.table.output_tokens.any()
                else None,
                "latency_s": clean(np.mean(latency)), "overhead_per_1k": clean(np.mean(overhead) * 1000)}

    def _collapse(self, contestant: Contestant, point: str) -> dict[str, Any]:
        """Signs of a router that reads nothing: one model for (nearly) all, or a table of tasks in disguise."""
        found = []
        for i in contestant.views:
            test, run = self.splits[i][2], self.swept[contestant.name, i]
            found.append(metrics.collapse(run.decisions[run.chosen[point]], self.table.m,
                                          [p.task for p in test.prompts]))
        return {"largest_share": clean(np.mean([c.top_share for c in found])),
                "entropy_bits": clean(np.mean([c.entropy for c in found])),
                "task_information_bits": clean(np.mean([c.mutual_information for c in found])),
                "task_information_by_chance": clean(np.mean([c.chance for c in found]))}

    def _settings(self, name: str, view: int) -> dict[str, Any]:
        """The sweep of one view: what dev saw and what test gave, for the hover of the plot and the shares chart."""
        run, test = self.swept[name, view], self.splits[view][2]
        est = next(c for c in self.contestants if c.name == name).estimates[view]
        rows = np.arange(test.n)
        quality, cost, shares = [], [], []
        for picks in run.decisions:
            quality.append(clean(test.quality[rows, picks].mean()))
            cost.append(clean((test.cost[rows, picks] + est.test_overhead).mean() * 1000))
            shares.append([clean(s) for s in np.bincount(picks, minlength=test.m) / test.n])
        return {"cost_weight": [clean(w) for w in run.weights], "dev_quality": [clean(q) for q in run.dev_quality],
                "dev_cost_per_1k": [clean(c * 1000) for c in run.dev_cost], "test_quality": quality,
                "test_cost_per_1k": cost, "shares": shares, "frontier": [int(f) for f in run.frontier]}

    def _contestant_tasks(self, name: str, at: list[int]) -> dict[str, Any]:
        found = {}
        for task in dict.fromkeys(n for i in at for n in self.masks[i]):
            here = [i for i in at if task in self.masks[i]]
            quality = [self.board[self.places[name, i].tasks[task][0]] for i in here]
            best = [self.board[self.masks[i][task]["quality"]] for i in here]
            found[task] = {"n": sum(self.masks[i][task]["n"] for i in here), "quality": self.say(quality),
                           "cost_per_1k": self._mean([self.places[name, i].tasks[task][1] for i in here], scale=1000),
                           "versus_best_single": self.say([q - b for q, b in zip(quality, best, strict=True)],
                                                          judged=True)}
        return found

    def _calibration(self, contestant: Contestant, at: list[int]) -> dict[str, Any]:
        """AUROC, Brier and ECE of the predicted quality per model, and the reliability of all models pooled."""
        by_model: dict[str, dict[str, list[float | None]]] = {}
        estimates, qualities = [], []
        for i in at:
            est, test = contestant.estimates[i], self.splits[i][2]
            for k, column in enumerate(est.columns):
                estimate, quality = est.test[:, k], test.quality[:, column]
                into = by_model.setdefault(self.table.models[column], {"auroc": [], "brier": [], "ece": []})
                into["auroc"].append(metrics.auroc(quality >= 0.5, estimate))
                into["brier"].append(metrics.brier(estimate, quality))
                into["ece"].append(metrics.ece(estimate, quality))
                estimates.append(estimate)
                qualities.append(quality)
        bins = metrics.reliability(np.concatenate(estimates), np.concatenate(qualities))
        return {"models": {name: {key: mean_of(values) for key, values in scores.items()}
                           for name, scores in by_model.items()},
                "bins": [{"estimate": clean(e), "quality": clean(q), "n": int(n)}
                         for e, q, n in zip(bins.estimate, bins.quality, bins.count, strict=True)]}

    def _two_model(self, contestant: Contestant, at: list[int]) -> dict[str, Any] | None:
        """APGR and CPT over the test prompts, and over all prompts for a router that learns nothing from the cache.

        None for pools of other sizes, where they are not defined.
        """
        if self.table.m != 2 or any(contestant.estimates[i].test_fixed is not None
                                    or len(contestant.estimates[i].columns) != 2
                                    for i in at):
            return None
        parts = []
        for i in at:
            est = contestant.estimates[i]
            parts.append(two_model_scores(est.test[:, np.argsort(est.columns)], self.splits[i][2]))
        said = {key: mean_of([p[key] for p in parts]) for key in parts[0]}
        if contestant.whole is not None:
            said["all_prompts"] = two_model_scores(contestant.whole, self.table)
        return said

    def decisions(self) -> dict[str, np.ndarray]:
        """The ledger of the reported settings: one row per (view, contestant, point, prompt)."""
        parts: dict[str, list[np.ndarray]] = {key: [] for key in LEDGER}
        models = np.array(self.table.models, dtype=object)
        ids = [np.array([p.prompt_id for p in test.prompts], dtype=object) for _, _, test in self.splits]
        for contestant in self.contestants:
            for i in contestant.views:
                est, test, run = contestant.estimates[i], self.splits[i][2], self.swept[contestant.name, i]
                rows, place = np.arange(test.n), np.zeros(self.table.m, np.int64)
                place[est.columns] = np.arange(len(est.columns))
                for point in POINTS:
                    picks = run.decisions[run.chosen[point]]
                    values = (self.views[i].name, contestant.name, point, ids[i], models[picks],
                              est.test[rows, place[picks]],
                              test.quality[rows, picks], test.cost[rows, picks], est.test_overhead,
                              float(run.weights[run.chosen[point]]))
                    for key, value in zip(LEDGER, values, strict=True):
                        kind = object if isinstance(value, str) else None
                        parts[key].append(value if isinstance(value, np.ndarray)
                                          else np.full(test.n, value, dtype=kind))
        return {key: np.concatenate(values) for key, values in parts.items()}


def two_model_scores(estimate: np.ndarray, table: OutcomeTable) -> dict[str, float | None]:
    """APGR and CPT of estimates (N, 2) in the sound form and as RouteLLM prints them (`compat_*`, shares in percent).

    None where they do not exist: a strong model that is not better, or a score too constant for RouteLLM's thresholds.
    """
    cheap, strong = (table.models.index(name) for name in table.pool.by_price())
    score = two_model_score(estimate, cheap, strong)
    curve = metrics.threshold_curve(score, table.quality[:, cheap], table.quality[:, strong])
    said = {"apgr": metrics.apgr(curve), **{f"cpt{p}": metrics.cpt(curve, p / 100) for p in (20, 50, 80)}}
    said |= {"compat_apgr": None, "compat_auc": None, "compat_cpt20": None, "compat_cpt50": None, "compat_cpt80": None}
    try:
        origin = metrics.compat.routellm(1.0 - score, table.quality[:, cheap], table.quality[:, strong])
    except UserError:
        return {key: None if value is None else clean(value) for key, value in said.items()}
    said |= {"compat_apgr": origin.apgr, "compat_auc": origin.auc,
             **{f"compat_cpt{p}": v for p, v in origin.cpt.items()}}
    return {key: None if value is None else clean(value) for key, value in said.items()}


def _check(board: Board, world: list[dict[str, Any]], places: Mapping) -> None:
    """What must hold whatever the data: nobody beats the oracle, on the data or on any resample."""
    for (name, view), place in places.items():
        for handles in place.points.values():
            for key in ("quality", "reward"):
                best = board[world[view]["oracle"][key]]  # nan where a resample holds no prompt of a small view
                above = board[handles[key]] - best
                assert not (above > 1e-9 * np.maximum(1.0, np.abs(best))).any(), f"{name} beats the oracle's {key}"


def clean(value: Any) -> float | None:
    """A plain float, or None for what is not a number: JSON never holds NaN."""
    value = float(value)
    return value if np.isfinite(value) else None


def mean_of(values: Sequence[float | None]) -> float | None:
    """Mean of the numbers that exist; None where there are none."""
    kept = [v for v in values if v is not None and np.isfinite(v)]
    return clean(np.mean(kept)) if kept else None
