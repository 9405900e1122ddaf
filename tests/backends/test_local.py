"""The local backend: batches do not change answers, sampling is seeded, limits hold, faults are told."""

from __future__ import annotations

import pytest

from routewright.backends import backend_for
from routewright.backends.base import Sampling
from routewright.backends.local import LocalBackend, _Chooser
from routewright.errors import MissingSetup, UserError
from routewright.pool import Pool
from routewright.schema import ModelSpec, Prompt


@pytest.mark.parametrize("sampling", [Sampling(), Sampling(0.7), Sampling(1.0, top_p=0.5)])
def test_batch_size_changes_no_answer(pool_file, prompts, sampling):
    answers = [[(a.response, a.token_usage) for a in LocalBackend(Pool.load(pool_file), batch_size=size).call_many(
        "strong", prompts, sampling, 1)] for size in (1, 3, 10)]
    assert answers[0] == answers[1] == answers[2]


def test_greedy_equals_step_by_step_argmax(local, prompts):
    """An independent loop without cache, padding or batch gives the same tokens and log-probabilities."""
    import torch
    model, tokenizer = local._load("strong")
    for prompt in prompts[:3]:
        turn = [{"role": "user", "content": prompt.prompt}]
        text = tokenizer.apply_chat_template(turn, add_generation_prompt=True, tokenize=False)
        ids = tokenizer(text, add_special_tokens=False, return_tensors="pt")["input_ids"]
        start, logprobs = ids.shape[1], []
        while ids.shape[1] - start < 12:
            with torch.no_grad():
                scores = torch.log_softmax(model(ids).logits[0, -1], -1)
            token = int(scores.argmax())
            logprobs.append(float(scores[token]))
            ids = torch.cat([ids, torch.tensor([[token]])], 1)
            if token == tokenizer.eos_token_id:
                break
        answer = local.call("strong", prompt, Sampling())
        assert answer.response == tokenizer.decode(ids[0, start:], skip_special_tokens=True).strip()
        assert answer.token_usage.input == start and answer.token_usage.output == len(logprobs)
        assert answer.logprob_mean == pytest.approx(sum(logprobs) / len(logprobs), abs=1e-4)
        assert answer.logprob_min == pytest.approx(min(logprobs), abs=1e-4)


def test_samples_differ_and_repeat(local, prompts):
    hot = Sampling(1.0, seed=5)
    first = [a.response for a in local.call_many("cheap", prompts, hot, 1)]
    assert first == [a.response for a in local.call_many("cheap", prompts, hot, 1)]
    assert first != [a.response for a in local.call_many("cheap", prompts, hot, 2)]
    assert first != [a.response for a in local.call_many("cheap", prompts, Sampling(1.0, seed=6), 1)]


def test_noise_draws_from_the_tempered_distribution():
    import torch
    logits = torch.tensor([[2.0, 1.0, 0.0, -1.0]]).repeat(10_000, 1)
    for temperature, top_p in ((1.0, 1.0), (0.5, 1.0), (1.0, 0.8)):
        chooser = _Chooser(Sampling(temperature, top_p), range(10_000))
        drawn = torch.bincount(chooser(None, logits).argmax(-1), minlength=4) / 10_000
        wanted = (logits[0] / temperature).softmax(-1)
        if top_p < 1:
            wanted = torch.where(wanted.cumsum(-1) - wanted < top_p, wanted, 0)
            wanted = wanted / wanted.sum()
        assert torch.allclose(drawn, wanted, atol=0.02)


def test_limits_of_length(local, prompts):
    short = local.call("strong", prompts[0], Sampling(max_new_tokens=2))
    assert short.token_usage.output <= 2
    long = Prompt("long", "many words " * 400, reference="1")
    answers = local.call_many("cheap", [long, prompts[0]], Sampling())
    assert "context window 512" in answers[0].error and answers[0].finish_reason == "error" and not answers[1].error


def test_context_stands_before_the_prompt(local):
    with_context = local.call("cheap", Prompt("a", "How many?", context="Ann has 3 pens."), Sampling())
    joined = local.call("cheap", Prompt("b", "Ann has 3 pens.\n\nHow many?"), Sampling())
    assert (with_context.response, with_context.token_usage) == (joined.response, joined.token_usage)


def test_any_text_can_be_asked(local):
    answers = local.call_many("cheap", [Prompt("u", "東京 🙂 <b>\x00 1e999"), Prompt("s", " x ")], Sampling())
    assert all(a.token_usage.output >= 1 and not a.error for a in answers)


def test_faults_are_told_before_any_call(pool_file, tmp_path):
    bare = Pool("p", (ModelSpec("far", 1, 1, litellm_id="openai/x"), ModelSpec("none", 1, 1),
                      ModelSpec("gone", 1, 1, path="./no")), source=str(tmp_path / "pool.yaml"))
    with pytest.raises(UserError, match="litellm_id 'openai/x'"):
        backend_for(bare, ["far"])
    with pytest.raises(UserError, match="no path"):
        backend_for(bare, ["none"])
    with pytest.raises(MissingSetup, match="no such weights folder"):
        LocalBackend(bare).identity("gone")
    with pytest.raises(UserError, match="batch_size"):
        LocalBackend(bare, batch_size=0)


def test_damaged_weights_are_told(pool_file, tmp_path, prompts):
    import shutil
    shutil.copytree(pool_file.parent, tmp_path / "p")
    weights = tmp_path / "p/models/cheap/model.safetensors"
    weights.write_bytes(weights.read_bytes()[:500])
    with pytest.raises(MissingSetup, match="weights of 'cheap' do not load"):
        LocalBackend(Pool.load(tmp_path / "p/pool.yaml")).call("cheap", prompts[0], Sampling())


def test_identity_changes_with_the_weights(local):
    assert local.identity("cheap") == local.identity("cheap") != local.identity("strong")


@pytest.mark.parametrize("wrong", [{"temperature": -1}, {"temperature": float("nan")}, {"top_p": 0}, {"top_p": 1.1},
                                   {"max_new_tokens": 0}])
def test_sampling_is_checked(wrong):
    with pytest.raises(UserError, match=next(iter(wrong))):
        Sampling(**wrong)
