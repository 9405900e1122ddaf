"""From a router's raw scores to predicted quality per model: logistic regressions on outcomes it was not trained on.

A router may read anything off a prompt: the log-odds of the decision tokens, one number between 0 and 1. `Calibration`
turns such features (N, F) into quality estimates (N, M), one logistic regression per model on the recorded quality.
The sign of every weight is learnt, so a score of the wrong polarity cannot turn a router upside down.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

L2 = 1e-3  # per prompt; enough to keep separable features finite
_SMALLEST_SPREAD = 1e-9


@dataclass(frozen=True)
class Calibration:
    """weights (F, M) and bias (M,) on standardised features; mean and scale (F,) of the features fitted on."""

    weights: np.ndarray
    bias: np.ndarray
    mean: np.ndarray
    scale: np.ndarray

    @classmethod
    def fit(cls, features: np.ndarray, quality: np.ndarray, l2: float = L2) -> Calibration:
        """Fit on features (N, F) and quality (N, M) in [0, 1]. Needs N >= 1; constant features get weight 0."""
        features = np.asarray(features, np.float64)
        mean, spread = features.mean(axis=0), features.std(axis=0)
        scale = np.where(spread > _SMALLEST_SPREAD, 1.0 / np.maximum(spread, _SMALLEST_SPREAD), 0.0)
        weights, bias = fit_logistic((features - mean) * scale, np.asarray(quality, np.float64), l2)
        return cls(weights, bias, mean, scale)

    def apply(self, features: np.ndarray) -> np.ndarray:
        """Quality estimates (N, M) of features (N, F)."""
        return sigmoid((np.asarray(features, np.float64) - self.mean) * self.scale @ self.weights + self.bias)

    def state(self) -> dict[str, np.ndarray]:
        """As arrays for a router's weights file; `from_state` reads them back."""
        return {"calibration_weights": self.weights, "calibration_bias": self.bias, "calibration_mean": self.mean,
                "calibration_scale": self.scale}

    @classmethod
    def from_state(cls, state: Mapping[str, np.ndarray], models: int) -> Calibration:
        """Raises KeyError or ValueError where the arrays are missing or do not fit `models`."""
        weights, bias = state["calibration_weights"], state["calibration_bias"]
        mean, scale = state["calibration_mean"], state["calibration_scale"]
        if weights.ndim != 2 or weights.shape[1] != models or bias.shape != (models,) \
                or mean.shape != (len(weights),) or scale.shape != (len(weights),):
            raise ValueError(f"calibration of shape {weights.shape} for {models} models")
        return cls(weights, bias, mean, scale)


def sigmoid(z: np.ndarray) -> np.ndarray:
    return 0.5 * (1.0 + np.tanh(0.5 * z))


def fit_logistic(x: np.ndarray, y: np.ndarray, l2: float,
                 start: tuple[np.ndarray, np.ndarray] | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Weights (D, M) and bias (M,) of M logistic regressions on soft labels y (N, M): mean cross-entropy plus
    l2 / 2 |w|^2, the bias free. They share no parameter, so one L-BFGS run fits them all."""
    from scipy.optimize import minimize

    n, m = y.shape
    x = np.ascontiguousarray(x, dtype=np.float64)
    mean = np.clip(y.mean(axis=0), 1e-4, 1 - 1e-4)
    weights, bias = start or (np.zeros((x.shape[1], m)), np.log(mean / (1 - mean)))

    def loss(flat: np.ndarray) -> tuple[float, np.ndarray]:
        w, b = flat[:-m].reshape(-1, m), flat[-m:]
        z = x @ w + b
        value = (np.logaddexp(0.0, z) - y * z).sum() / n + 0.5 * l2 * (w * w).sum()
        slope = (sigmoid(z) - y) / n
        return value, np.concatenate([(x.T @ slope + l2 * w).ravel(), slope.sum(axis=0)])

    found = minimize(loss, np.concatenate([weights.ravel(), bias]), jac=True, method="L-BFGS-B",
                     options={"maxiter": 300, "ftol": 1e-9, "gtol": 1e-6})
    return found.x[:-m].reshape(-1, m), found.x[-m:]
