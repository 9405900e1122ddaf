"""The cache: every row checked, what is written comes back, the dense table adds up."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from planted import make_outcomes, make_table, two_model_pool

from routewright.errors import UserError
from routewright.outcomes import OutcomeTable, fingerprint, outcome_from_row, read_outcomes, write_outcomes
from routewright.pool import Pool
from routewright.schema import ModelSpec, Outcome, TokenUsage

ROW = {"prompt_id": "a", "prompt": "q", "model_name": "cheap", "response": "r", "is_correct": True,
       "token_usage": {"input": 3, "output": 4}}


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.parquet"])
def test_a_cache_comes_back_as_written(name, tmp_path):
    outcomes = make_outcomes(30, samples=2)
    assert read_outcomes(write_outcomes(tmp_path / name, outcomes)) == outcomes


text = st.text(st.characters(exclude_categories=("Cs",)), min_size=1).filter(str.strip)


@given(st.builds(
    Outcome, prompt_id=text, prompt=text, model_name=text, response=st.text(st.characters(exclude_categories=("Cs",))),
    quality=st.floats(0, 1), sample=st.integers(0, 9),
    reference=st.one_of(st.none(), st.text(min_size=1), st.lists(st.text())),
    token_usage=st.builds(TokenUsage, input=st.integers(0, 99), output=st.integers(0, 99), estimated=st.booleans()),
    cost_usd=st.one_of(st.none(), st.floats(0, 9)), split=st.sampled_from(["", "train", "dev", "test"])))
def test_any_outcome_survives_its_row(outcome):
    assert outcome_from_row(json.loads(json.dumps(outcome.as_row())), "x:1") == outcome


@pytest.mark.parametrize("change, message", [
    ({"prompt": ""}, "prompt must be a non-empty text; got ''"),
    ({"prompt": None}, "prompt must be a non-empty text"),
    ({"model_name": 3}, "model_name must be a non-empty text; got 3"),
    ({"is_correct": "yes"}, "is_correct must be true or false"),
    ({"is_correct": 1}, "is_correct must be true or false"),
    ({"quality": 1.5}, "quality must be a number from 0 to 1; got 1.5"),
    ({"quality": "1"}, "quality must be a number"),
    ({"sample": -1}, "sample must be a whole number"),
    ({"split": "val"}, "split must be train, dev, test or empty"),
    ({"token_usage": {"input": -1}}, "token_usage.input"),
    ({"token_usage": {"inputs": 1}}, "did you mean 'input'"),
    ({"token_usage": {"input": 1, "cached": 2}}, "cannot exceed"),
    ({"token_usage": [1]}, "must be an object"),
    ({"cost_usd": -1}, "must not be negative"),
    ({"latency_s": "fast"}, "finite number"),
    ({"modle_name": "x"}, "unknown field 'modle_name'"),
    ({"response": 5}, "response must be text"),
])
def test_a_bad_row_names_file_line_and_field(change, message, tmp_path):
    path = tmp_path / "outcomes.jsonl"
    path.write_text(json.dumps(ROW) + "\n" + json.dumps({**ROW, **change}) + "\n")
    with pytest.raises(UserError, match="outcomes.jsonl:2: ") as caught:
        read_outcomes(path)
    assert message in str(caught.value)


def test_missing_field_is_named(tmp_path):
    path = tmp_path / "outcomes.jsonl"
    path.write_text(json.dumps({k: v for k, v in ROW.items() if k != "model_name"}))
    with pytest.raises(UserError, match="outcomes.jsonl:1: model_name .* missing"):
        read_outcomes(path)


def test_fingerprint_ignores_order_and_sees_every_change():
    outcomes = make_outcomes(20)
    assert fingerprint(outcomes) == fingerprint(outcomes[::-1])
    changed = [replace(outcomes[0], response="other"), *outcomes[1:]]
    assert fingerprint(changed) != fingerprint(outcomes)


def test_the_dense_table_adds_up():
    table = make_table(40, samples=3)
    assert table.quality.shape == table.cost.shape == (40, 2)
    words = len(table.prompts[0].prompt.split()) - 2
    assert table.cost[0, 1] == pytest.approx((words * 1.5 + 10 * 6.0) / 1e6)
    assert np.all((0 <= table.quality_mean) & (table.quality_mean <= 1))
    assert sum(table.splits.values()) == 40


def test_repricing_calls_nobody_and_leaves_recorded_money():
    table = make_table(10)
    dear = Pool("dear", (ModelSpec("cheap", 0.2, 0.8), ModelSpec("strong", 3.0, 12.0)))
    assert np.allclose(table.reprice(dear).cost, 2 * table.cost)
    outcomes = [replace(o, cost_usd=0.5) if o.model_name == "strong" else o for o in make_outcomes(10)]
    recorded = OutcomeTable.from_outcomes(outcomes, two_model_pool())
    assert np.all(recorded.reprice(dear).cost[:, 1] == 0.5)
    with pytest.raises(UserError, match="no price"):
        table.reprice(Pool("other", (ModelSpec("cheap", 1, 1),)))


def test_reasoning_and_cached_tokens_are_billed():
    pool = Pool("p", (ModelSpec("a", 1.0, 10.0, price_cached=0.1, price_reasoning=5.0),))
    row = Outcome("x", "q", "a", quality=1.0, token_usage=TokenUsage(100, 10, 20, 50))
    table = OutcomeTable.from_outcomes([row], pool)
    assert table.cost[0, 0] == pytest.approx((50 * 1 + 50 * .1 + 10 * 10 + 20 * 5) / 1e6)
    assert table.output_tokens[0, 0] == 30


def test_a_hole_a_double_and_an_ungraded_answer_are_refused():
    pool, outcomes = two_model_pool(), make_outcomes(5)
    with pytest.raises(UserError, match="has no recorded answer .*1 of 10 pairs"):
        OutcomeTable.from_outcomes(outcomes[:-1], pool)
    with pytest.raises(UserError, match="stands twice"):
        OutcomeTable.from_outcomes([*outcomes, outcomes[0]], pool)
    with pytest.raises(UserError, match="not graded"):
        OutcomeTable.from_outcomes([replace(outcomes[0], quality=None, is_correct=None), *outcomes[1:]], pool)
    with pytest.raises(UserError, match="two different prompts"):
        OutcomeTable.from_outcomes([*outcomes[:-1], replace(outcomes[-1], prompt="other")], pool)
    with pytest.raises(UserError, match="never recorded"):
        OutcomeTable.from_outcomes(outcomes, pool, models=["cheap", "stron"])


def test_a_failed_call_counts_as_wrong():
    outcomes = [replace(o, error="timeout", quality=1.0) if o.model_name == "cheap" else o for o in make_outcomes(5)]
    assert np.all(OutcomeTable.from_outcomes(outcomes, two_model_pool()).quality[:, 0] == 0)


def test_subsets_and_splits():
    table = make_table(60)
    parts = [table.split(name) for name in ("train", "dev", "test")]
    assert sum(p.n for p in parts) == 60
    assert np.array_equal(table.rows([3, 1]).quality, table.quality[[3, 1]])
    assert table.pick_models(["strong"]).quality.shape == (60, 1)
    with pytest.raises(UserError, match="no prompt in split 'dev'"):
        parts[0].split("dev")
    assert make_table(4).with_splits(["test"] * 4).split("test").n == 4


def test_pool_beside_the_cache(tmp_path):
    write_outcomes(tmp_path, make_outcomes(5))
    with pytest.raises(UserError, match="no pool.yaml beside it"):
        OutcomeTable.load(tmp_path)
    (tmp_path / "pool.yaml").write_text("name: p\nmodels:\n  - {name: cheap, price_input: 1, price_output: 2}\n"
                                        "  - {name: strong, price_input: 1, price_output: 2}\n")
    assert OutcomeTable.load(tmp_path).models == ("cheap", "strong")
    with pytest.raises(UserError, match="no such outcome cache"):
        OutcomeTable.load(tmp_path / "nope")


def test_a_prompt_has_one_split_and_a_sample_one_answer():
    outcomes, pool = make_outcomes(6, samples=2), two_model_pool()
    with pytest.raises(UserError, match="stands in split .* and in "):
        other = "dev" if outcomes[0].split != "dev" else "test"
        OutcomeTable.from_outcomes([replace(outcomes[0], split=other), *outcomes[1:]], pool)
    with pytest.raises(UserError, match="sample 1 of .* stands twice"):
        OutcomeTable.from_outcomes([*outcomes, outcomes[1]], pool)


def test_a_response_cut_inside_a_character_is_kept(tmp_path):
    outcomes = [replace(o, response="cut \ud83d") for o in make_outcomes(3)]
    write_outcomes(tmp_path, outcomes)
    assert read_outcomes(tmp_path) == outcomes
    assert fingerprint(read_outcomes(tmp_path)) == fingerprint(outcomes)


def test_no_call_has_more_tokens_than_an_array_holds(tmp_path):
    row = {**make_outcomes(1)[0].as_row(), "token_usage": {"input": 1 << 63}}
    with pytest.raises(UserError, match="x:1: token_usage.input must be a whole number"):
        outcome_from_row(row, "x:1")
