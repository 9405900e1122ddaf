"""Answers from recorded outcomes: the same contract as a live backend, at no cost and with equal results every time.

A call is found by the text of the prompt (and its context), the model and the sample number. The sampling parameters
are those of the recording; what is asked for here cannot change them.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path

from routewright.backends.base import Backend, Sampling
from routewright.errors import UserError
from routewright.outcomes import read_outcomes
from routewright.schema import Outcome, Prompt
from routewright.textfiles import nearest


class ReplayBackend(Backend):
    """Recorded outcomes as a backend. The identity and reference of an answer are those of the prompt that asks."""

    def __init__(self, outcomes: Iterable[Outcome], source: str = "the cache") -> None:
        self.source = source
        self._found: dict[tuple[str, str, str, int], Outcome] = {}
        for outcome in outcomes:
            key = (outcome.prompt, outcome.context, outcome.model_name, outcome.sample)
            # Two prompt ids may share a text; their recordings are two draws of one call, so the first one stands.
            self._found.setdefault(key, outcome)
        self._models = sorted({key[2] for key in self._found})

    @classmethod
    def load(cls, path: str | Path) -> ReplayBackend:
        return cls(read_outcomes(path), str(path))

    def call_many(self, model_name: str, prompts: Sequence[Prompt], sampling: Sampling,
                  sample: int = 0) -> list[Outcome]:
        """Recorded outcomes without their grades. Raises UserError naming the first call that was never recorded."""
        if model_name not in self._models:
            raise UserError(f"{self.source}: model {model_name!r} was never recorded"
                            f"{nearest(model_name, self._models)}; recorded: {', '.join(self._models) or 'none'}")
        answers = []
        for prompt in prompts:
            found = self._found.get((prompt.prompt, prompt.context, model_name, sample))
            if found is None:
                raise UserError(f"{self.source}: no recorded answer of {model_name!r} to prompt {prompt.prompt_id!r} "
                                f"({prompt.prompt[:40]!r}), sample {sample}; record it with build_cache.py")
            answers.append(replace(
                found, prompt_id=prompt.prompt_id, task=prompt.task, group=prompt.group, split=prompt.split,
                reference=prompt.reference, is_correct=None, quality=None, grader=""))
        return answers
