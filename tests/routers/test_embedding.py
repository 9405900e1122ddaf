"""Nearest neighbours, logistic regression and matrix factorisation against plain definitions of each."""

from __future__ import annotations

import numpy as np
import pytest

from routewright.calibration import fit_logistic, sigmoid
from routewright.routers import make_router
from routewright.routers.embedding import initial_factors, log_loss, train_factors


@pytest.fixture(scope="module")
def planted():
    """(x, y, true logits): vectors whose first columns decide the quality of three models."""
    random = np.random.default_rng(0)
    x = random.normal(size=(600, 12)).astype(np.float32) / np.sqrt(12)
    truth = random.normal(size=(12, 3)) * 4
    logits = x @ truth + np.array([0.5, 0.0, -0.5])
    return x, (random.random((600, 3)) < sigmoid(logits)).astype(float), logits


def test_knn_is_the_weighted_mean_of_the_nearest(planted):
    x, y, _ = planted
    router = make_router("knn", k=7, temperature=0.2)
    router._fit_vectors(x[:300], y[:300], None, 0)
    query = x[300:310]
    found = router._estimate_vectors(query)
    unit = x / np.linalg.norm(x, axis=1, keepdims=True)
    for row in range(10):
        similarity = unit[:300] @ unit[300 + row]
        near = np.argsort(-similarity)[:7]
        weight = np.exp(similarity[near] / 0.2)
        assert np.allclose(found[row], weight @ y[near] / weight.sum(), atol=1e-5)


def test_knn_chooses_its_size_on_dev(planted):
    x, y, logits = planted
    router = make_router("knn")
    router._fit_vectors(x[:400], y[:400], (x[400:], y[400:]), 0)
    errors = {}
    for k in (5, 10, 20, 40, 80, 160):
        for temperature in (0.05, 0.1, 0.3, 1.0):
            fixed = make_router("knn", k=k, temperature=temperature)
            fixed._fit_vectors(x[:400], y[:400], None, 0)
            errors[k, temperature] = np.mean((fixed._estimate_vectors(x[400:]) - y[400:]) ** 2)
    assert np.isclose(errors[router.chosen], min(errors.values()), atol=1e-9)


def test_knn_with_fewer_train_prompts_than_neighbours():
    router = make_router("knn", k=40)
    router._fit_vectors(np.eye(3, dtype=np.float32), np.array([[0.0], [1.0], [0.5]]), None, 0)
    assert 0 <= router._estimate_vectors(np.ones((2, 3), np.float32)).min()


def test_logistic_regression_agrees_with_sklearn_on_hard_labels(planted):
    from sklearn.linear_model import LogisticRegression

    x, y, _ = planted
    weights, bias = fit_logistic(x, y, l2=0.01)
    for column in range(3):
        theirs = LogisticRegression(C=1 / (0.01 * len(x)), tol=1e-8, max_iter=1000).fit(x, y[:, column])
        assert np.allclose(weights[:, column], theirs.coef_[0], atol=5e-3)
        assert np.isclose(bias[column], theirs.intercept_[0], atol=5e-3)


def test_logistic_regression_on_soft_labels_is_the_weighted_two_row_fit(planted):
    from sklearn.linear_model import LogisticRegression

    x, y, logits = planted
    soft = sigmoid(logits[:, :1])
    weights, bias = fit_logistic(x, soft, l2=0.01)
    doubled = LogisticRegression(C=1 / (0.01 * len(x)), tol=1e-8, max_iter=1000).fit(
        np.vstack([x, x]), np.r_[np.ones(len(x)), np.zeros(len(x))], np.r_[soft[:, 0], 1 - soft[:, 0]])
    assert np.allclose(weights[:, 0], doubled.coef_[0], atol=5e-3)
    assert np.isclose(bias[0], doubled.intercept_[0], atol=5e-3)


def test_linear_chooses_a_strong_penalty_where_there_is_nothing_to_learn():
    random = np.random.default_rng(1)
    x = random.normal(size=(1200, 40)).astype(np.float32) / np.sqrt(40)
    noise = (random.random((1200, 2)) < 0.7).astype(float)
    router = make_router("linear")
    router._fit_vectors(x[:600], noise[:600], (x[600:], noise[600:]), 0)
    free = make_router("linear", l2=1e-5)
    free._fit_vectors(x[:600], noise[:600], None, 0)
    spread = np.std(router._estimate_vectors(x[600:]), axis=0).max()
    assert spread < 0.03 < np.std(free._estimate_vectors(x[600:]), axis=0).max()


def test_linear_standardises_columns_of_any_spread(planted):
    x, y, _ = planted
    stretched = x * np.logspace(-3, 3, 12).astype(np.float32) + 5.0
    router = make_router("linear", standardise=True)
    router._fit_vectors(stretched[:400], y[:400], (stretched[400:], y[400:]), 0)
    plain = make_router("linear")
    plain._fit_vectors(x[:400], y[:400], (x[400:], y[400:]), 0)
    good, base = (log_loss(y[400:], r._estimate_vectors(v)).mean() for r, v in
                  ((router, stretched[400:]), (plain, x[400:])))
    assert good < base + 0.02


def test_every_parameter_of_the_factorisation_moves(planted):
    x, y, _ = planted
    options = dict(dimensions=4, learning_rate=0.01, epochs=20, weight_decay=0.05, batch_size=64, patience=20)
    best, history = train_factors(x[:450], y[:450], (x[450:], y[450:]), 3, **options)
    start = initial_factors(12, y[:450], 4, 3)
    assert set(best) == set(start) == {"project", "models", "weigh", "bias"}
    for key, value in start.items():
        assert (best[key] != value).all(), key
    assert history[int(np.argmin(history))] < history[0] and len(history) <= 20
    again, _ = train_factors(x[:450], y[:450], (x[450:], y[450:]), 3, **options)
    assert all((again[key] == best[key]).all() for key in best)
    other, _ = train_factors(x[:450], y[:450], (x[450:], y[450:]), 4, **options)
    assert (other["models"] != best["models"]).any()


def test_factorisation_stops_early_and_keeps_its_best_epoch(planted):
    x, y, _ = planted
    router = make_router("mf", patience=3, learning_rate=0.1, weight_decay=0.0)
    router._fit_vectors(x[:300], y[:300], (x[300:], y[300:]), 0)
    assert len(router.history) < 100
    kept = log_loss(y[300:], router._estimate_vectors(x[300:])).mean()
    assert np.isclose(kept, min(router.history), atol=1e-4)


def test_factorisation_reaches_the_truth_as_well_as_the_regression(planted):
    x, y, logits = planted
    scores = {}
    for kind in ("mf", "linear"):
        router = make_router(kind)
        router._fit_vectors(x[:400], y[:400], (x[400:500], y[400:500]), 0)
        scores[kind] = np.corrcoef(router._estimate_vectors(x[500:]).ravel(), sigmoid(logits[500:]).ravel())[0, 1]
    assert scores["mf"] > 0.85 and scores["mf"] > scores["linear"] - 0.05
