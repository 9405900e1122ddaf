"""Replay: recorded answers under the identity of whoever asks; what was not recorded is named."""

from __future__ import annotations

from dataclasses import replace

import pytest

from routewright.backends.base import Sampling
from routewright.backends.replay import ReplayBackend
from routewright.errors import UserError
from routewright.outcomes import write_outcomes
from routewright.schema import Outcome, Prompt, TokenUsage

ROW = Outcome("p1", "How many?", "cheap", "4", True, 1.0, TokenUsage(3, 1), reference="4", grader="number",
              latency_s=.5)


def test_the_asking_prompt_gives_the_identity():
    asked = Prompt("other", "How many?", task="t", group="g", split="dev", reference="5")
    answer = ReplayBackend([ROW]).call("cheap", asked, Sampling())
    assert answer == replace(ROW, prompt_id="other", task="t", group="g", split="dev", reference="5", is_correct=None,
                             quality=None, grader="")
    assert ROW.is_correct is True  # the recording is not touched


@pytest.mark.parametrize("prompt,sample", [(Prompt("p1", "How much?"), 0), (Prompt("p1", "How many?"), 1),
                                           (Prompt("p1", "How many?", context="more"), 0)])
def test_a_missing_answer_is_named(prompt, sample):
    with pytest.raises(UserError, match=rf"no recorded answer of 'cheap' to prompt 'p1' .*sample {sample}"):
        ReplayBackend([ROW]).call("cheap", prompt, Sampling(), sample)


def test_an_empty_recording_names_no_model():
    with pytest.raises(UserError, match="recorded: none"):
        ReplayBackend([]).call("cheap", ROW.as_prompt, Sampling())


def test_loads_a_cache(tmp_path):
    write_outcomes(tmp_path / "outcomes.jsonl", [ROW])
    assert ReplayBackend.load(tmp_path).call("cheap", ROW.as_prompt, Sampling()).response == "4"


def test_the_first_of_two_recordings_of_a_text_stands():
    twice = [ROW, replace(ROW, prompt_id="p2", response="5")]
    assert ReplayBackend(twice).call("cheap", Prompt("p2", "How many?"), Sampling()).response == "4"
