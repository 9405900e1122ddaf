"""The nouns: prompt, model, outcome, call, decision, episode.

Everything the project passes between stages is one of these. They hold what was measured; prices live in the
pool and dollars are derived from both (see `pool.Pool.cost`).
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any


@dataclass(frozen=True, slots=True)
class Prompt:
    """What a router sees of one request, and the gold answer that it must never see.

    `group` ties near-duplicates so that they never straddle a split; it defaults to the prompt's own id.
    `split` is "train", "dev", "test" or "" (not yet assigned).
    """

    prompt_id: str
    prompt: str
    task: str = ""
    group: str = ""
    split: str = ""
    context: str = ""
    reference: Any = None


@dataclass(frozen=True, slots=True)
class ModelSpec:
    """A member of the pool. Prices are USD per million tokens; limits are tokens."""

    name: str
    price_input: float
    price_output: float
    price_cached: float | None = None
    price_reasoning: float | None = None  # None: billed at the output price
    litellm_id: str | None = None
    path: str | None = None  # a local weights folder, for the `local` backend
    context_window: int | None = None
    max_output_tokens: int | None = None
    tiers: tuple[str, ...] = ()
    capabilities: tuple[str, ...] = ()
    description: str = ""


@dataclass(frozen=True, slots=True)
class TokenUsage:
    """Tokens of one call. `reasoning` is counted beside `output`, `cached` is the cached part of `input`.

    `estimated` is true where the source recorded no tokens and they were derived from characters.
    """

    input: int = 0
    output: int = 0
    reasoning: int = 0
    cached: int = 0
    estimated: bool = False


@dataclass(slots=True)
class Outcome:
    """One call of one model on one prompt: a line of the outcome cache.

    `sample` is 0 for the greedy call, 1.. for retries and repeats. A failed call is an outcome too, with
    `error` set and quality 0. `cost_usd` is filled only where the source recorded money; else dollars are
    derived from `token_usage` and the pool's prices.
    """

    prompt_id: str
    prompt: str
    model_name: str
    response: str = ""
    is_correct: bool | None = None
    quality: float | None = None
    token_usage: TokenUsage = field(default_factory=TokenUsage)
    task: str = ""
    group: str = ""
    split: str = ""
    context: str = ""
    reference: Any = None
    sample: int = 0
    finish_reason: str = ""
    error: str = ""
    grader: str = ""
    cost_usd: float | None = None
    latency_s: float | None = None
    logprob_mean: float | None = None
    logprob_min: float | None = None

    def as_row(self) -> dict[str, Any]:
        """The JSON object of this outcome. Fields that hold nothing are left out, to keep the cache small."""
        keep = {"prompt_id", "prompt", "model_name", "response", "is_correct", "quality"}
        row = {}
        for name in OUTCOME_FIELDS:  # not dataclasses.asdict: its deep copies take most of the time of loading a cache
            value = getattr(self, name)
            if name in keep or (value is not None and value != "" and name != "token_usage"):
                row[name] = value
        if not self.sample:
            del row["sample"]
        usage = {name: getattr(self.token_usage, name) for name in USAGE_FIELDS}
        row["token_usage"] = {name: value for name, value in usage.items() if value}
        return row

    @property
    def as_prompt(self) -> Prompt:
        return Prompt(self.prompt_id, self.prompt, self.task, self.group or self.prompt_id, self.split,
                      self.context, self.reference)


OUTCOME_FIELDS = tuple(f.name for f in fields(Outcome))
USAGE_FIELDS = tuple(f.name for f in fields(TokenUsage))


@dataclass(frozen=True, slots=True)
class Call:
    """One call inside an episode."""

    model_name: str
    cost_usd: float
    latency_s: float
    outcome: Outcome | None = None


@dataclass(frozen=True, slots=True)
class Decision:
    """What a router decided for one prompt: the model, the estimates it rests on, and the setting used."""

    prompt_id: str
    model_name: str
    estimates: tuple[float, ...]
    setting: float
    overhead_usd: float = 0.0
    overhead_s: float = 0.0


@dataclass(slots=True)
class Episode:
    """What a policy did for one prompt: its calls, the answer it gave and its own overhead."""

    prompt_id: str
    calls: list[Call] = field(default_factory=list)
    answer: str = ""
    quality: float = 0.0
    overhead_usd: float = 0.0
    overhead_s: float = 0.0

    @property
    def cost_usd(self) -> float:
        return sum(call.cost_usd for call in self.calls) + self.overhead_usd
