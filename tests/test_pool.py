"""Prices are checked when they are read, and dollars are hand-worked."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from routewright.errors import UserError
from routewright.pool import Pool, estimate_tokens
from routewright.schema import ModelSpec, TokenUsage

GOOD = "name: p\nprices_dated: 2026-11-20\nmodels:\n  - {name: a, price_input: 1, price_output: 2}\n"


def load(tmp_path, text: str) -> Pool:
    path = tmp_path / "pool.yaml"
    path.write_text(text)
    return Pool.load(path)


def test_every_shipped_pool_loads(root):
    files = sorted((root / "configs" / "pools").glob("*.yaml"))
    assert files
    for path in files:
        pool = Pool.load(path)
        assert pool.models and pool.prices_dated, path


def test_dollars_by_hand():
    pool = Pool("p", (ModelSpec("a", 2.0, 8.0, price_cached=0.5),))
    # 1,000 in of which 400 cached, 300 out, 200 reasoning: 600*2 + 400*.5 + 300*8 + 200*8 = 5,400 millionths
    assert pool.cost("a", TokenUsage(1000, 300, 200, 400)) == pytest.approx(0.0054, abs=1e-15)


@given(st.integers(0, 10**6), st.integers(0, 10**6), st.integers(0, 10**6))
def test_cost_is_linear_and_never_negative(tokens_in, tokens_out, reasoning):
    pool = Pool("p", (ModelSpec("a", 0.3, 1.7),))
    one = pool.cost("a", TokenUsage(tokens_in, tokens_out, reasoning))
    assert one >= 0
    assert pool.cost("a", TokenUsage(2 * tokens_in, 2 * tokens_out, 2 * reasoning)) == pytest.approx(2 * one)


@pytest.mark.parametrize("text, message", [
    (GOOD.replace("price_output", "price_outpt"), "did you mean 'price_output'"),
    (GOOD.replace("price_input: 1", "price_input: -1"), "0 or more; got -1"),
    (GOOD.replace("price_input: 1", "price_input: free"), "got 'free'"),
    (GOOD.replace("price_input: 1", "price_input: .nan"), "got nan"),
    (GOOD.replace(", price_output: 2", ""), "`price_output` is missing"),
    (GOOD + "  - {name: a, price_input: 1, price_output: 2}\n", "'a' stands twice"),
    ("name: p\nmodels: []\n", "at least one model"),
    (GOOD.replace("models", "modles"), "did you mean 'models'"),
    (GOOD.replace("2026-11-20", "soon"), "is no date"),
    (GOOD.replace("price_output: 2", "price_output: 2, tiers: [cheapest]"), "is not one of premium"),
])
def test_a_bad_pool_file_is_refused_by_name(text, message, tmp_path):
    with pytest.raises(UserError, match=message) as caught:
        load(tmp_path, text)
    assert "pool.yaml" in str(caught.value)


def test_unknown_model_has_no_price(tmp_path):
    with pytest.raises(UserError, match="has no price in pool 'p'"):
        load(tmp_path, GOOD)["b"]


def test_order_by_price(tiny_pool):
    assert tiny_pool.by_price() == ("cheap", "strong")
    assert tiny_pool.subset(["strong"]).names == ("strong",)


def test_tokens_from_characters():
    assert [estimate_tokens(c) for c in (0, 1, 4, 400)] == [0, 1, 1, 100]


@pytest.mark.parametrize(("change", "said"), [
    ("name: ''", "name must be a text"), ("name: [a]", "name must be a text"), ("path: 3", "path must be text"),
    ("context_window: '512'", "context_window must be a whole number"),
    ("max_output_tokens: 0", "max_output_tokens must be a whole number"),
])
def test_every_field_of_a_model_is_checked(tmp_path, change, said):
    name = "" if change.startswith("name") else "name: a, "
    with pytest.raises(UserError, match=said):
        load(tmp_path, f"name: p\nmodels:\n  - {{{name}{change}, price_input: 1, price_output: 1}}\n")
