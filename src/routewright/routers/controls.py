"""Controls: the yardsticks every router is held against at matched cost.

Content-free controls (`always`, `random_mix`, `fixed_split`, `shuffled`) know nothing of the prompt: a router that
does not beat them has learnt nothing that pays. `length` and `group_table` look at cheap facts of the prompt (how
long it is, which task it belongs to), and `oracle` looks at the outcomes themselves.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Self

import numpy as np

from routewright.errors import UserError
from routewright.routers.base import Router, from_entry, shaped
from routewright.schema import Prompt
from routewright.textfiles import nearest

if TYPE_CHECKING:
    from routewright.outcomes import OutcomeTable
    from routewright.pool import Pool

LONGEST = 2000  # characters at which the length router is sure; the scale of the golden RouteLLM figures


def prompt_draws(prompts: Sequence[Prompt], seed: int, columns: int = 1) -> np.ndarray:
    """Uniform numbers in [0, 1), (N, columns), that depend on the prompt's id and the seed only, not on row order."""
    blocks = -(-columns // 4)  # a sha256 digest holds four 64-bit numbers
    raw = b"".join(hashlib.sha256(f"{seed}\x1f{block}\x1f{p.prompt_id}\x1f{p.prompt}".encode()).digest()
                   for p in prompts for block in range(blocks))
    return (np.frombuffer(raw, dtype="<u8").reshape(len(prompts), 4 * blocks)[:, :columns] >> 11) / 2.0**53


def _one_hot(index: np.ndarray, columns: int) -> np.ndarray:
    return np.eye(columns)[index]


@dataclass(kw_only=True)
class _Control(Router):
    needs_training: ClassVar[bool] = False
    is_control: ClassVar[bool] = True

    def _place(self, model: str) -> int:
        if model not in self.models:
            raise UserError(f"router {self.name!r}: model {model!r} is not in the pool{nearest(model, self.models)}; "
                            f"it has: {', '.join(self.models)}")
        return self.models.index(model)


@dataclass(kw_only=True)
class AlwaysRouter(_Control):
    """The same model for every prompt. `model` is a name, or `cheapest` / `dearest` by the pool's price order."""

    kind: ClassVar[str] = "always"
    content_free: ClassVar[bool] = True

    model: str = "dearest"

    def __post_init__(self) -> None:
        self.name = self.name or f"always {self.model}"

    def bind(self, models: Sequence[str], pool: Pool | None) -> Self:
        super().bind(models, pool)
        self._index()
        return self

    def decide(self, prompts: Sequence[Prompt]) -> np.ndarray:
        return np.full(len(prompts), self._index())

    def _index(self) -> int:
        if self.model in ("cheapest", "dearest") and self.model not in self.models and self.pool is not None:
            return self._place(self.pool.by_price()[0 if self.model == "cheapest" else -1])
        return self._place(self.model)

    def _estimate(self, prompts: Sequence[Prompt]) -> np.ndarray:
        return _one_hot(self.decide(prompts), len(self.models))


@dataclass(kw_only=True)
class RandomMixRouter(_Control):
    """A random model per prompt, at given shares ({model: share}).

    Without shares the estimates are uniform noise: swept over cost weights or thresholds they trace every mix.
    """

    kind: ClassVar[str] = "random_mix"
    content_free: ClassVar[bool] = True

    shares: dict | None = None
    seed: int = 0

    def bind(self, models: Sequence[str], pool: Pool | None) -> Self:
        super().bind(models, pool)
        self._shares()
        return self

    def decide(self, prompts: Sequence[Prompt]) -> np.ndarray | None:
        shares = self._shares()
        return None if shares is None else _draw(shares, prompts, self.seed)

    def _shares(self) -> np.ndarray | None:
        if self.shares is None:
            return None
        shares = np.zeros(len(self.models))
        for model, share in self.shares.items():
            if isinstance(share, bool) or not isinstance(share, (int, float)) or not share >= 0:
                raise UserError(f"router {self.name!r}: the share of {model!r} must be a number of 0 or more; "
                                f"got {share!r}")
            shares[self._place(str(model))] = share
        if shares.sum() <= 0:
            raise UserError(f"router {self.name!r}: the shares add up to 0; give at least one model a share")
        return shares / shares.sum()

    def _estimate(self, prompts: Sequence[Prompt]) -> np.ndarray:
        chosen = self.decide(prompts)
        if chosen is None:
            return prompt_draws(prompts, self.seed, len(self.models))
        return _one_hot(chosen, len(self.models))


def _draw(shares: np.ndarray, prompts: Sequence[Prompt], seed: int) -> np.ndarray:
    edges = np.cumsum(shares)
    return np.minimum(np.searchsorted(edges, prompt_draws(prompts, seed)[:, 0], side="right"), len(shares) - 1)


@dataclass(kw_only=True)
class FixedSplitRouter(_Control):
    """The best fixed split: which share of the prompts each model gets, chosen on dev, blind to the prompt.

    `budget` is the mean USD per prompt the split may spend: the optimum is then one model or a mix of two. Without it,
    quality - cost_weight * cost is maximised, whose optimum is a single model. Estimates are the dev means of each
    model, the same for every prompt.
    """

    kind: ClassVar[str] = "fixed_split"
    content_free: ClassVar[bool] = True
    needs_training: ClassVar[bool] = True

    budget: float | None = None
    cost_weight: float = 0.0
    seed: int = 0
    shares: np.ndarray | None = field(default=None, init=False)
    means: np.ndarray | None = field(default=None, init=False)

    def decide(self, prompts: Sequence[Prompt]) -> np.ndarray:
        assert self.shares is not None
        return _draw(self.shares, prompts, self.seed)

    def _fit(self, train: OutcomeTable, dev: OutcomeTable | None, seed: int) -> None:
        table = train if dev is None else dev
        self.means, cost = table.quality.mean(axis=0), table.cost.mean(axis=0)
        if self.budget is not None:
            from routewright.metrics import mix_weights

            self.shares = mix_weights(self.budget, cost, self.means)
        else:
            self.shares = _one_hot(np.argmax(self.means - self.cost_weight * cost), len(self.models))

    def _estimate(self, prompts: Sequence[Prompt]) -> np.ndarray:
        return np.tile(self.means, (len(prompts), 1))

    def _state(self) -> dict[str, np.ndarray]:
        return {"shares": self.shares, "means": self.means}

    def _set_state(self, state: dict[str, np.ndarray]) -> None:
        self.shares, self.means = (shaped(state, key, len(self.models)) for key in ("shares", "means"))


@dataclass(kw_only=True)
class ShuffledRouter(_Control):
    """Another router's estimates, dealt out to the wrong prompts: the same calls and spend, nothing of the content.

    `of` is a router, a YAML entry of one, or a router folder.
    """

    kind: ClassVar[str] = "shuffled"
    content_free: ClassVar[bool] = True
    needs_training: ClassVar[bool] = True

    of: Any = None
    seed: int = 0
    inner: Router | None = field(default=None, init=False, repr=False)

    def __post_init__(self) -> None:
        if self.of is None:
            raise UserError("router kind shuffled needs `of`: the router whose decisions are shuffled")
        if isinstance(self.of, Router):
            self.inner, self.of = self.of, {"kind": self.of.kind, **self.of.options}
        else:
            self.inner = from_entry({"path": self.of} if isinstance(self.of, str) else self.of, "shuffled: of")
        self.name = self.name or f"shuffled {self.inner.name}"
        if self.inner.models:
            self.bind(self.inner.models, self.inner.pool)

    def decide(self, prompts: Sequence[Prompt]) -> np.ndarray | None:
        decided = self.inner.decide(prompts)
        return None if decided is None else decided[self._order(len(prompts))]

    def save(self, folder: Any) -> Any:
        raise UserError("a shuffled router is made at evaluation time and is not saved; save the router it shuffles")

    def _fit(self, train: OutcomeTable, dev: OutcomeTable | None, seed: int) -> None:
        if not self.inner.models or tuple(self.inner.models) != self.models:
            self.inner.fit(train, dev, seed)

    def _order(self, n: int) -> np.ndarray:
        return np.random.default_rng([self.seed, n]).permutation(n)

    def _estimate(self, prompts: Sequence[Prompt]) -> np.ndarray:
        return self.inner.estimate(prompts)[self._order(len(prompts))]


@dataclass(kw_only=True)
class OracleRouter(_Control):
    """Knows the outcomes: the ceiling. Evaluation shows it the table it will be scored on (`see`)."""

    kind: ClassVar[str] = "oracle"
    needs_outcomes: ClassVar[bool] = True

    known: dict[str, np.ndarray] = field(default_factory=dict, init=False, repr=False)

    def see(self, table: OutcomeTable) -> None:
        if not self.models:
            self.bind(table.models, table.pool)
        columns = [table.models.index(name) for name in self.models]
        self.known = {p.prompt_id: table.quality[row, columns] for row, p in enumerate(table.prompts)}

    def _estimate(self, prompts: Sequence[Prompt]) -> np.ndarray:
        unseen = [p.prompt_id for p in prompts if p.prompt_id not in self.known]
        if unseen:
            raise UserError(f"router {self.name!r}: the oracle was not shown the outcomes of prompt {unseen[0]!r} "
                            f"({len(unseen)} such); only an evaluation on recorded outcomes can use it")
        return np.array([self.known[p.prompt_id] for p in prompts])


@dataclass(kw_only=True)
class LengthRouter(_Control):
    """Longer prompts go to dearer models. Nothing is fitted.

    s = min(characters, 2000) / 2000; the estimate of a model is 1 - s * (1 - its place in the price order), the
    cheapest standing at 0 and the dearest at 1. With two models 1 - s is P(cheap suffices).
    """

    kind: ClassVar[str] = "length"

    def _estimate(self, prompts: Sequence[Prompt]) -> np.ndarray:
        if self.pool is None:
            raise UserError(f"router {self.name!r}: length needs prices to order the models; give it a pool")
        order = self.pool.by_price()
        place = np.array([order.index(name) / max(len(order) - 1, 1) for name in self.models])
        size = np.array([min(len(p.prompt), LONGEST) / LONGEST for p in prompts])
        return 1.0 - size[:, None] * (1.0 - place[None, :])


@dataclass(kw_only=True)
class GroupTableRouter(_Control):
    """The mean quality of each model on the prompt's task (or group), from the train split.

    Means are shrunk to the model's global mean as if `shrinkage` further prompts of that task had scored it, so
    that a task seen twice is not taken at its word. A task never seen gets the global mean.
    """

    kind: ClassVar[str] = "group_table"
    needs_training: ClassVar[bool] = True

    by: str = "task"
    shrinkage: float = 10.0
    table: dict[str, list[float]] = field(default_factory=dict, init=False, repr=False)
    overall: list[float] = field(default_factory=list, init=False, repr=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.by not in ("task", "group"):
            raise UserError(f"router {self.name!r}: by must be task or group; got {self.by!r}")
        if self.shrinkage < 0:
            raise UserError(f"router {self.name!r}: shrinkage must be 0 or more prompts; got {self.shrinkage}")

    def _fit(self, train: OutcomeTable, dev: OutcomeTable | None, seed: int) -> None:
        overall = train.quality_mean.mean(axis=0)
        keys = np.array([getattr(p, self.by) for p in train.prompts])
        self.table = {}
        for key in np.unique(keys):
            rows = train.quality_mean[keys == key]
            mean = (rows.sum(axis=0) + self.shrinkage * overall) / (len(rows) + self.shrinkage)
            self.table[str(key)] = mean.tolist()
        self.overall = overall.tolist()

    def _estimate(self, prompts: Sequence[Prompt]) -> np.ndarray:
        return np.array([self.table.get(getattr(p, self.by), self.overall) for p in prompts])

    def _state(self) -> dict[str, np.ndarray]:
        return {"overall": np.array(self.overall), "table": np.array([self.table[k] for k in sorted(self.table)])}

    def _set_state(self, state: dict[str, np.ndarray]) -> None:
        self.overall = shaped(state, "overall", len(self.models)).tolist()
        rows = shaped(state, "table", None, len(self.models)).tolist()
        self.table = dict(zip(self.card.get("groups", []), rows, strict=True))

    def as_card(self) -> dict[str, Any]:
        return {**super().as_card(), "groups": sorted(self.table)}
