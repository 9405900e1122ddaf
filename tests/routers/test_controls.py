"""Controls: what each knows, and the published golden figures of the length router."""

from __future__ import annotations

import csv
import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from planted import make_table, two_model_pool

from routewright.errors import UserError
from routewright.routers import make_router
from routewright.routers.controls import prompt_draws
from routewright.schema import Prompt


@pytest.fixture(scope="module")
def table():
    return make_table(n=400, seed=1)


def test_flags_say_what_each_control_knows():
    free = {kind: make_router(kind, **options).content_free for kind, options in (
        ("always", {}), ("random_mix", {}), ("fixed_split", {}), ("shuffled", {"of": {"kind": "length"}}),
        ("length", {}), ("group_table", {}), ("oracle", {}))}
    assert free == {"always": True, "random_mix": True, "fixed_split": True, "shuffled": True, "length": False,
                    "group_table": False, "oracle": False}
    assert make_router("oracle").needs_outcomes and make_router("length").is_control
    assert not make_router("linear").is_control


@pytest.mark.parametrize(("model", "column"), [("cheapest", 0), ("dearest", 1), ("cheap", 0), ("strong", 1)])
def test_always_one_model(table, model, column):
    router = make_router("always", model=model).fit(table)
    assert (router.decide(table.prompts) == column).all()
    assert (router.estimate(table.prompts).argmax(axis=1) == column).all()


def test_always_an_unknown_model_is_named(table):
    with pytest.raises(UserError, match=r"model 'stron' is not in the pool \(did you mean 'strong'\?\)"):
        make_router("always", model="stron").fit(table)


def test_random_mix_keeps_its_shares_and_ignores_row_order(table):
    router = make_router("random_mix", shares={"cheap": 3, "strong": 1}).fit(table)
    chosen = router.decide(table.prompts)
    assert abs(chosen.mean() - 0.25) < 0.07
    assert (router.decide(table.prompts[::-1])[::-1] == chosen).all()
    other = make_router("random_mix", shares={"cheap": 3, "strong": 1}, seed=1).fit(table)
    assert (other.decide(table.prompts) != chosen).any()


def test_random_mix_without_shares_is_noise_that_sweeps(table):
    router = make_router("random_mix").fit(table)
    assert router.decide(table.prompts) is None
    estimate = router.estimate(table.prompts)
    assert abs((estimate[:, 0] > estimate[:, 1]).mean() - 0.5) < 0.08
    assert abs(np.corrcoef(estimate[:, 0], table.quality[:, 0])[0, 1]) < 0.15


def test_random_mix_rejects_bad_shares(table):
    with pytest.raises(UserError, match="must be a number of 0 or more"):
        make_router("random_mix", shares={"cheap": -1}).fit(table)
    with pytest.raises(UserError, match="add up to 0"):
        make_router("random_mix", shares={"cheap": 0}).fit(table)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 9))
def test_draws_are_uniform_numbers_of_prompt_and_seed(seed, columns):
    prompts = [Prompt(f"p{i}", f"text {i}") for i in range(40)]
    draws = prompt_draws(prompts, seed, columns)
    assert draws.shape == (40, columns) and 0 <= draws.min() and draws.max() < 1
    assert (prompt_draws(prompts[5:6], seed, columns)[0] == draws[5]).all()
    assert len(np.unique(draws)) == draws.size


def test_fixed_split_spends_its_budget(table):
    cost = table.cost.mean(axis=0)
    half = float(cost.mean())
    router = make_router("fixed_split", budget=half).fit(table, table)
    assert np.allclose(router.shares, [0.5, 0.5])
    chosen = router.decide(table.prompts)
    assert abs(chosen.mean() - 0.5) < 0.1
    estimate = router.estimate(table.prompts)
    assert np.ptp(estimate, axis=0).max() == 0 and np.allclose(estimate[0], table.quality.mean(axis=0))


def test_fixed_split_without_a_budget_is_the_best_single(table):
    assert make_router("fixed_split").fit(table).shares.tolist() == [0, 1]
    assert make_router("fixed_split", cost_weight=1e9).fit(table).shares.tolist() == [1, 0]


def test_shuffled_makes_the_same_calls_without_the_content(table):
    train, test = table.split("train"), table.split("test")
    router = make_router("linear", encoder={"name": "tfidf", "dimensions": 32}).fit(train, table.split("dev"))
    mixed = make_router("shuffled", of=router)
    straight, dealt = router.estimate(test.prompts), mixed.estimate(test.prompts)
    assert mixed.models == router.models and mixed.name == "shuffled linear"
    assert np.allclose(np.sort(straight, axis=0), np.sort(dealt, axis=0)) and not np.allclose(straight, dealt)
    entry = make_router("shuffled", of={"kind": "linear", "encoder": {"name": "tfidf", "dimensions": 32}})
    assert np.allclose(entry.fit(train, table.split("dev")).estimate(test.prompts), dealt)
    with pytest.raises(UserError, match="not saved"):
        mixed.save("/nowhere")


def test_oracle_sees_only_what_it_was_shown(table):
    test = table.split("test")
    oracle = make_router("oracle").fit(table.split("train"))
    with pytest.raises(UserError, match="not shown the outcomes"):
        oracle.estimate(test.prompts)
    oracle.see(test)
    assert (oracle.estimate(test.prompts[::-1]) == test.quality[::-1]).all()


def test_group_table_shrinks_small_groups(table):
    router = make_router("group_table", shrinkage=10).fit(table)
    overall = table.quality_mean.mean(axis=0)
    odd = np.array([p.task == "odd" for p in table.prompts])
    rows = table.quality_mean[odd]
    expected = (rows.sum(axis=0) + 10 * overall) / (len(rows) + 10)
    estimate = router.estimate([Prompt("a", "x", task="odd"), Prompt("b", "x", task="never seen")])
    assert np.allclose(estimate, [expected, overall])
    raw = make_router("group_table", shrinkage=0).fit(table).estimate([Prompt("a", "x", task="odd")])
    assert np.allclose(raw[0], rows.mean(axis=0))


def test_length_orders_by_characters_and_price():
    prompts = [Prompt("a", "x"), Prompt("b", "x" * 1000), Prompt("c", "x" * 5000)]
    router = make_router("length").bind(("strong", "cheap"), two_model_pool())
    estimate = router.estimate(prompts)
    assert estimate[:, 0].tolist() == [1, 1, 1]  # the dearest stands at 1 whatever the length
    assert np.allclose(estimate[:, 1], [1 - 1 / 2000, 0.5, 0.0])
    with pytest.raises(UserError, match="needs prices"):
        make_router("length").bind(("a", "b"), None).estimate(prompts)


def test_length_gives_the_golden_routellm_figures(shared_data):
    """Public data, published code: APGR 0.5986554769191534 on the decontaminated GSM8K responses (n = 1307)."""
    from routewright.decide import two_model_score
    from routewright.metrics.compat import routellm

    folder = shared_data("routellm") / "original" / "gsm8k"
    lines = open(folder / "contaminated_prompts.jsonl", encoding="utf-8")
    contaminated = {json.loads(line)["eval_prompt"] for line in lines if line.strip()}
    with open(folder / "gsm8k_responses.csv", newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["prompt"] not in contaminated]
    assert len(rows) == 1307
    weak = np.array([row["mistralai/Mixtral-8x7B-Instruct-v0.1"] == "True" for row in rows], float)
    strong = np.array([row["gpt-4-1106-preview"] == "True" for row in rows], float)
    prompts = [Prompt(str(i), row["prompt"]) for i, row in enumerate(rows)]
    estimate = make_router("length").bind(("cheap", "strong"), two_model_pool()).estimate(prompts)
    scores = routellm(1.0 - two_model_score(estimate), weak, strong)
    assert abs(scores.apgr - 0.5986554769191534) < 1e-9
    assert abs(scores.auc - 76.92523162606857) < 1e-9
    assert abs(scores.cpt[50] - 36.513280139906) < 1e-9
