"""The contract of a backend: prompts in, ungraded outcomes out, in the same order.

A backend measures (text, tokens, seconds, log-probabilities) and judges nothing: grading is another ruler's job,
dollars are derived from tokens by the pool. A call that fails is an outcome with `error` set; an exception means that
nothing can be called at all (unknown model, missing weights).
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from routewright.errors import UserError
from routewright.schema import Outcome, Prompt


@dataclass(frozen=True, slots=True)
class Sampling:
    """How an answer is drawn. Temperature 0 is greedy; `seed` fixes what a backend can fix."""

    temperature: float = 0.0
    top_p: float = 1.0
    max_new_tokens: int = 128
    seed: int = 0

    def __post_init__(self) -> None:
        if not (math.isfinite(self.temperature) and self.temperature >= 0):
            raise UserError(f"temperature must be 0 (greedy) or more; got {self.temperature!r}")
        if not 0 < self.top_p <= 1:
            raise UserError(f"top_p must lie in (0, 1]; got {self.top_p!r}")
        if self.max_new_tokens < 1:
            raise UserError(f"max_new_tokens must be at least 1; got {self.max_new_tokens!r}")


class Backend(ABC):
    """Where answers come from."""

    @abstractmethod
    def call_many(self, model_name: str, prompts: Sequence[Prompt], sampling: Sampling,
                  sample: int = 0) -> list[Outcome]:
        """One ungraded outcome per prompt, in the order of `prompts`. `sample` tells repeats of a call apart.

        Raises UserError for a model or call that the backend does not have, MissingSetup for missing weights.
        """

    def call(self, model_name: str, prompt: Prompt, sampling: Sampling, sample: int = 0) -> Outcome:
        """The outcome of one prompt."""
        return self.call_many(model_name, [prompt], sampling, sample)[0]

    def identity(self, model_name: str) -> str:
        """Names what answers, beyond the pool's name for it: it changes when the weights or the version change."""
        return model_name


def outcome_of(prompt: Prompt, model_name: str, sample: int, **measured: Any) -> Outcome:
    """An ungraded outcome that carries the prompt's identity and what was measured."""
    return Outcome(prompt.prompt_id, prompt.prompt, model_name, task=prompt.task, group=prompt.group,
                   split=prompt.split, context=prompt.context, reference=prompt.reference, sample=sample, **measured)


def message_of(prompt: Prompt) -> str:
    """What a model is asked: the context, where there is one, and then the prompt."""
    return f"{prompt.context.strip()}\n\n{prompt.prompt.strip()}" if prompt.context.strip() else prompt.prompt.strip()
