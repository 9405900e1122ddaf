"""Rewards: the golden values of the published formulas, and what must hold of any reward."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from routewright.errors import UserError
from routewright.reward import PRESETS, Reward

quality = st.floats(0, 1)
cost = st.floats(0, 100)


@pytest.mark.parametrize(("score", "usd", "expected"),
                         [(1, 0.01, 0.97), (1, 0.2, 0.4), (1, 0.5, 0.2), (0, 0.01, 0), (0, 9, 0)])
def test_xrouter_golden_values(score, usd, expected):
    assert Reward.named("xrouter_code").of(score, usd) == pytest.approx(expected, abs=1e-12)


def test_xrouter_readme_differs_from_its_code():
    assert Reward.named("xrouter_readme").of(1, 0.2) == pytest.approx(0.6)
    assert Reward.named("xrouter_readme").of(1, 5) == pytest.approx(0.4)


def test_offline_dpo_is_one_minus_a_tenth_of_the_cost_and_zero_when_wrong():
    reward = Reward.named("offline_dpo")
    assert reward.of(1, 0.5) == pytest.approx(0.95)
    assert reward.of(0, 0.5) == 0
    assert reward.of(1, 20) == pytest.approx(-1.0)  # no cap


def test_binary_reads_correct_where_quality_is_no_yes_or_no():
    reward = Reward("binary", cost_weight=1)
    assert reward.of([0.4, 0.4], [0.1, 0.1], correct=[True, False]).tolist() == pytest.approx([0.9, 0.0])
    assert reward.of([0.99, 1.0], 0.1).tolist() == pytest.approx([0.0, 0.9])


def test_a2c_terms_and_caps():
    reward = Reward.named("a2c")
    assert reward.of(0.9, tokens=256, strong=1, retries=1) == pytest.approx(0.9 - 0.01 * 0.5 - 0.7 - 0.2 * 0.5)
    assert reward.of(0.9, tokens=9999) == pytest.approx(0.89)
    assert Reward.named("a2c", w_strong=0.0).of(0.5, strong=1) == pytest.approx(0.5)


def test_arrays_broadcast():
    table = Reward.named("linear", cost_weight=2).of(np.ones((5, 3)), np.array([0.0, 0.1, 0.2]))
    assert table.shape == (5, 3)
    assert table[4].tolist() == pytest.approx([1.0, 0.8, 0.6])


@given(quality, cost, cost,
       st.sampled_from(["binary", "capped", "linear", "xrouter_code", "xrouter_readme", "offline_dpo"]))
def test_dearer_never_earns_more_and_better_never_less(worth, a, b, name):
    reward = Reward.named(name)
    low, high = sorted((a, b))
    assert reward.of(worth, low) >= reward.of(worth, high)
    if name not in ("binary", "offline_dpo"):
        assert reward.of(1.0, a) >= reward.of(worth, a)


@given(cost)
def test_capped_keeps_a_right_answer_above_its_floor_and_a_wrong_one_at_zero(usd):
    assert Reward.named("xrouter_code").of(1, usd) >= 0.2 - 1e-12
    assert Reward.named("xrouter_code").of(0, usd) == 0


@pytest.mark.parametrize("settings",
                         [{"cost_weight": -1}, {"K": float("nan")}, {"cost_weight": "3"}, {"token_budget": 0},
                                      {"w_token": float("inf")}, {"cost_wieght": 1}])
def test_bad_settings_are_refused(settings):
    with pytest.raises(UserError):
        Reward.named("capped", **settings)


def test_names_are_checked_and_the_nearest_is_offered():
    with pytest.raises(UserError, match="xrouter_code"):
        Reward.named("xrouter_cod")
    with pytest.raises(UserError, match="capped"):
        Reward("cappd")
    assert set(PRESETS) >= {"binary", "capped", "linear", "a2c", "offline_dpo", "xrouter_code", "xrouter_readme"}


@pytest.mark.parametrize(("worth", "usd"), [(1.5, 0), (-0.1, 0), (float("nan"), 0), (1, -1), (1, float("nan"))])
def test_impossible_values_are_refused(worth, usd):
    with pytest.raises(ValueError):
        Reward.named("linear").of(worth, usd)
