"""What every backend promises: the local one and its recording are asked the same and must answer the same."""

from __future__ import annotations

from dataclasses import replace

import pytest

from routewright.backends.base import Sampling
from routewright.errors import UserError
from routewright.outcomes import outcome_from_row

CALLS = [(name, sample, Sampling(0.7 if sample else 0.0)) for name in ("cheap", "strong") for sample in (0, 1)]


@pytest.fixture(params=["local", "replay"])
def backend(request):
    return request.getfixturevalue(request.param)


@pytest.mark.parametrize("name,sample,sampling", CALLS)
def test_outcomes_come_in_order_ungraded_and_measured(backend, prompts, name, sample, sampling):
    asked = prompts[::-1]
    answers = backend.call_many(name, asked, sampling, sample)
    assert [a.prompt_id for a in answers] == [p.prompt_id for p in asked]
    for answer, prompt in zip(answers, asked, strict=True):
        assert answer.as_prompt == prompt
        assert (answer.model_name, answer.sample) == (name, sample)
        assert answer.is_correct is None and answer.quality is None and not answer.grader and not answer.error
        usage = answer.token_usage
        assert usage.input > 5 and 1 <= usage.output <= 12 and not usage.estimated
        assert answer.finish_reason in ("stop", "length") and answer.latency_s > 0
        assert answer.logprob_min <= answer.logprob_mean <= 0
        assert outcome_from_row(answer.as_row(), "row") == answer


@pytest.mark.parametrize("name,sample,sampling", CALLS)
def test_local_and_replay_say_the_same(local, replay, prompts, name, sample, sampling):
    both = [backend.call_many(name, prompts, sampling, sample) for backend in (local, replay)]
    for fresh, recorded in zip(*both, strict=True):
        assert replace(fresh, latency_s=None, logprob_mean=None, logprob_min=None) == \
            replace(recorded, latency_s=None, logprob_mean=None, logprob_min=None)
        assert fresh.logprob_mean == pytest.approx(recorded.logprob_mean, abs=1e-3)


def test_one_call_is_a_batch_of_one(backend, prompts):
    one = backend.call("cheap", prompts[3], Sampling())
    many = backend.call_many("cheap", prompts, Sampling())[3]
    assert (one.response, one.token_usage) == (many.response, many.token_usage)


def test_no_prompts_no_answers(backend):
    assert backend.call_many("cheap", [], Sampling()) == []


def test_an_unknown_model_is_named_with_its_nearest(backend, prompts):
    with pytest.raises(UserError, match="cheep.*did you mean 'cheap'"):
        backend.call_many("cheep", prompts, Sampling())
