"""Calibration: raw scores of any polarity, scale or number become honest qualities, and nothing breaks it."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from routewright.calibration import Calibration, fit_logistic, sigmoid
from routewright.metrics import auroc


def planted(n: int = 600, seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """features (N, 2), true quality (N, 3) and recorded quality (N, 3) of three samples each.

    Model 0 gets worse as feature 0 grows, model 1 better, model 2 heeds neither.
    """
    rng = np.random.default_rng(seed)
    features = rng.normal(size=(n, 2)) * [3.0, 0.01] + [40.0, -7.0]
    z = (features[:, :1] - 40.0) / 3.0 * np.array([-2.0, 1.0, 0.0]) + [0.0, 1.0, 0.5]
    truth = 1 / (1 + np.exp(-z))
    return features, truth, rng.binomial(3, truth) / 3


def test_learns_each_models_own_polarity_and_the_right_share():
    features, truth, quality = planted()
    fresh, fresh_truth, fresh_quality = planted(seed=1)
    estimate = Calibration.fit(features, quality).apply(fresh)
    assert np.abs(estimate - fresh_truth).mean(0).max() < 0.05  # calibrated, not only ranked
    assert auroc(fresh_quality[:, 0] >= 0.5, estimate[:, 0]) > 0.85
    assert auroc(fresh_quality[:, 1] >= 0.5, estimate[:, 1]) > 0.7
    assert np.corrcoef(estimate[:, 0], estimate[:, 1])[0, 1] < -0.9  # one rises where the other falls


def test_polarity_and_scale_of_a_score_do_not_matter():
    features, _, quality = planted()
    straight = Calibration.fit(features, quality).apply(features)
    for change in (np.array([-1.0, 1.0]), np.array([1e-4, 1e5])):
        turned = Calibration.fit(features * change + 3.0, quality).apply(features * change + 3.0)
        np.testing.assert_allclose(turned, straight, atol=1e-3)


def test_features_that_say_nothing_leave_the_mean():
    _, _, quality = planted()
    flat = np.full((len(quality), 2), 1e6)
    for features in (flat, np.empty((len(quality), 0))):
        found = Calibration.fit(features, quality)
        np.testing.assert_allclose(found.apply(features), np.broadcast_to(quality.mean(0), quality.shape), atol=1e-3)
    # A feature that was constant in fitting cannot upset what comes later.
    np.testing.assert_allclose(Calibration.fit(flat, quality).apply(flat + 1e4)[0], quality.mean(0), atol=1e-3)


def test_separable_and_one_sided_labels_stay_finite():
    features = np.array([[0.0], [1.0]] * 50)
    quality = np.hstack([features, 1 - features, np.ones_like(features), np.zeros_like(features)])
    estimate = Calibration.fit(features, quality).apply([[0.0], [1.0], [50.0], [-50.0]])
    assert np.isfinite(estimate).all() and (estimate >= 0).all() and (estimate <= 1).all()
    assert estimate[1, 0] > 0.9 > 0.1 > estimate[0, 0] and estimate[0, 1] > 0.9
    assert (estimate[:2, 2] > 0.99).all() and (estimate[:2, 3] < 0.01).all()


def test_one_prompt_is_enough_not_to_break():
    found = Calibration.fit([[0.3, 0.7]], [[1.0, 0.0]])
    assert np.isfinite(found.apply([[0.3, 0.7], [5.0, -5.0]])).all()
    assert found.apply([[0.3, 0.7]])[0, 0] > 0.5 > found.apply([[0.3, 0.7]])[0, 1]


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 8).flatmap(lambda n: st.tuples(
    arrays(np.float64, (n, 3), elements=st.floats(-1e6, 1e6)),
    arrays(np.float64, (n, 2), elements=st.floats(0, 1)),
    arrays(np.float64, (4, 3), elements=st.floats(-1e6, 1e6)))))
def test_any_finite_features_give_qualities(drawn):
    features, quality, later = drawn
    found = Calibration.fit(features, quality)
    for part in (features, later):
        estimate = found.apply(part)
        assert estimate.shape == (len(part), 2) and ((estimate >= 0) & (estimate <= 1)).all()
    np.testing.assert_array_equal(found.apply(later), Calibration.fit(features, quality).apply(later))  # deterministic


def test_arrays_survive_a_weights_file_and_misfits_are_told(tmp_path):
    from safetensors.numpy import load_file, save_file

    features, _, quality = planted(50)
    found = Calibration.fit(features, quality)
    save_file(found.state(), tmp_path / "weights.safetensors")
    state = load_file(tmp_path / "weights.safetensors")
    np.testing.assert_array_equal(Calibration.from_state(state, 3).apply(features), found.apply(features))
    with pytest.raises(ValueError, match="for 2 models"):
        Calibration.from_state(state, 2)
    for name in state:
        with pytest.raises(KeyError):
            Calibration.from_state({k: v for k, v in state.items() if k != name}, 3)
        with pytest.raises(ValueError):
            Calibration.from_state({**state, name: state[name][..., :-1]}, 3)


def test_the_logistic_fit_is_at_its_minimum():
    features, _, quality = planted(200)
    x = (features - features.mean(0)) / features.std(0)
    weights, bias = fit_logistic(x, quality, 0.01)
    slope = (sigmoid(x @ weights + bias) - quality) / len(x)
    np.testing.assert_allclose(x.T @ slope + 0.01 * weights, 0, atol=1e-4)
    np.testing.assert_allclose(slope.sum(0), 0, atol=1e-4)
    again = fit_logistic(x, quality, 0.01, start=(weights, bias))
    np.testing.assert_allclose(again[0], weights, atol=1e-3)
    stronger, _ = fit_logistic(x, quality, 10.0)
    assert np.abs(stronger).max() < np.abs(weights).max() / 5


def test_sigmoid_has_no_overflow():
    with np.errstate(all="raise", under="ignore"):
        np.testing.assert_allclose(sigmoid(np.array([-1e4, -1.0, 0.0, 1.0, 1e4])),
                                   [0, 1 / (1 + np.e), 0.5, np.e / (1 + np.e), 1], atol=1e-15)
