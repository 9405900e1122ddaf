"""Rewards: what one answer is worth, given its quality and what it cost. Every trainer and every regret uses these.

    binary   R = correct * (K - cost_weight * cost)
    capped   R = quality * (K - min(cost_weight * cost, cost_max))          xRouter
    linear   R = quality - cost_weight * cost
    a2c      R = quality - w_token * min(tokens / token_budget, 1) - w_strong * strong - w_retry * retries / max_retry

Units: quality and correct in [0, 1], cost in USD of the whole answer (all its calls), so `cost_weight` is reward per
USD; tokens, retries and strong calls are counts. Under binary and capped a wrong answer earns 0 whatever it cost, and
under capped a right one never less than K - cost_max: cheapness pays only among right answers. All functions take
numbers or arrays that broadcast.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import Any

import numpy as np

from routewright.errors import UserError
from routewright.textfiles import check_keys, nearest

KINDS = ("binary", "capped", "linear", "a2c")


@dataclass(frozen=True)
class Reward:
    """One reward with its settings. Build it with `Reward.named(...)` or directly; both check every number."""

    kind: str = "linear"
    cost_weight: float = 1.0  # reward per USD; the lambda of xRouter
    K: float = 1.0  # what a right answer for nothing earns, in binary and capped
    cost_max: float = math.inf  # capped: the largest cost penalty, in reward
    w_token: float = 0.01  # a2c: penalty of a spent token budget
    w_strong: float = 0.7  # a2c: penalty of a call of the strong model
    w_retry: float = 0.2  # a2c: penalty of max_retry retries
    token_budget: float = 512  # a2c: tokens at which the token penalty is full
    max_retry: float = 2  # a2c: retries at which the retry penalty is full

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise UserError(f"reward kind {self.kind!r} is not one of {', '.join(KINDS)}"
                            f"{nearest(str(self.kind), KINDS)}")
        for entry in fields(self)[1:]:
            value = getattr(self, entry.name)
            number = isinstance(value, (int, float)) and not isinstance(value, bool)
            if not number or math.isnan(value) or value < 0 or (math.isinf(value) and entry.name != "cost_max"):
                raise UserError(f"reward {entry.name} must be a number, 0 or more; got {value!r}")
        if self.token_budget == 0 or self.max_retry == 0:
            raise UserError("reward token_budget and max_retry divide, so they must be above 0")

    @classmethod
    def named(cls, name: str, **settings: Any) -> Reward:
        """A preset, with single settings replaced: `Reward.named("capped", cost_weight=5)`. Raises UserError."""
        if name not in PRESETS:
            raise UserError(f"unknown reward {name!r}{nearest(str(name), PRESETS)}; known: {', '.join(PRESETS)}")
        names = [f.name for f in fields(cls) if f.name != "kind"]
        check_keys(settings, (), names, f"reward {name}")
        return cls(**{**{f.name: getattr(PRESETS[name], f.name) for f in fields(cls)}, **settings})

    def of(self, quality: Any, cost: Any = 0.0, *, correct: Any = None, tokens: Any = 0, strong: Any = 0,
           retries: Any = 0) -> np.ndarray:
        """The reward, in the shape the arguments broadcast to.

        `correct` defaults to quality >= 1 (binary only); `tokens`, `strong` (calls of the strong model) and `retries`
        are read by a2c only. Raises ValueError for a quality outside [0, 1], a negative or a NaN cost.
        """
        quality, cost = np.asarray(quality, np.float64), np.asarray(cost, np.float64)
        if not ((quality >= 0) & (quality <= 1)).all():
            raise ValueError("quality must lie in [0, 1]")
        if not (cost >= 0).all():
            raise ValueError("cost must be 0 or more USD")
        if self.kind == "linear":
            return quality - self.cost_weight * cost
        if self.kind == "binary":
            right = quality >= 1 if correct is None else np.asarray(correct, bool)
            return np.where(right, self.K - self.cost_weight * cost, 0.0)
        if self.kind == "capped":
            return quality * (self.K - np.minimum(self.cost_weight * cost, self.cost_max))
        used = np.minimum(np.asarray(tokens, np.float64) / self.token_budget, 1.0)
        return (quality - self.w_token * used - self.w_strong * np.asarray(strong, np.float64)
                - self.w_retry * np.asarray(retries, np.float64) / self.max_retry)


PRESETS: dict[str, Reward] = {
    "binary": Reward("binary", cost_weight=1.0),
    "capped": Reward("capped", cost_weight=3.0, cost_max=0.8),
    "linear": Reward("linear", cost_weight=1.0),
    "a2c": Reward("a2c"),  # A2C-SQuAD, RoutingConfig
    "offline_dpo": Reward("binary", cost_weight=0.1),  # K 1, lambda .1, no cap
    "xrouter_code": Reward("capped", cost_weight=3.0, cost_max=0.8),  # async_dapo.py and its scripts
    "xrouter_readme": Reward("capped", cost_weight=2.0, cost_max=0.6),  # what its README says instead
}
