"""Light routers over prompt vectors: nearest neighbours, a logistic regression per model, matrix factorisation.

All three learn from soft labels (the mean quality over recorded samples), give estimates in [0, 1] for every model
of the pool at once, and are fitted in seconds. Hyperparameters are chosen on the dev split, never on test.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from routewright.calibration import fit_logistic, sigmoid
from routewright.encoders import Encoder, make_encoder
from routewright.errors import UserError
from routewright.routers.base import Router, prompt_text, shaped
from routewright.schema import Prompt

if TYPE_CHECKING:
    from routewright.outcomes import OutcomeTable

log = logging.getLogger(__name__)

L2_GRID = (1.0, 0.3, 0.1, 0.03, 0.01, 3e-3, 1e-3, 3e-4, 1e-4, 1e-5)  # from nearly constant to nearly free
K_GRID = (5, 10, 20, 40, 80, 160)
TEMPERATURES = (0.05, 0.1, 0.3, 1.0)
DEFAULT_L2, DEFAULT_K, DEFAULT_TEMPERATURE = 3e-3, 40, 0.1  # without a dev split
_EPS = 1e-7


def log_loss(labels: np.ndarray, estimate: np.ndarray) -> np.ndarray:
    """Mean cross-entropy per model, (M,), of soft labels (N, M); the proper score every choice on dev uses."""
    p = np.clip(estimate, _EPS, 1 - _EPS)
    return -(labels * np.log(p) + (1 - labels) * np.log(1 - p)).mean(axis=0)


@dataclass(kw_only=True)
class EncoderRouter(Router):
    """A router over an encoder.

    encoder  `tfidf`, a weights folder, a hub id, or a mapping {name: ..., and the encoder's own options}
    cache    the folder of the embedding cache; empty: data/runs/.cache; `none`: keep nothing
    """

    encoder: str | dict = "tfidf"
    cache: str = ""

    constant: np.ndarray | None = field(default=None, init=False, repr=False)  # (M,) of one-class columns, nan else
    _encoder: Encoder | None = field(default=None, init=False, repr=False)

    def _open_encoder(self) -> Encoder:
        return make_encoder(self.encoder, {"": True, "none": False}.get(self.cache, self.cache))

    def _fit(self, train: OutcomeTable, dev: OutcomeTable | None, seed: int) -> None:
        texts = [prompt_text(p) for p in train.prompts]
        self._encoder = self._open_encoder().fit(texts)
        labels = train.quality_mean
        self.constant = np.where(np.ptp(labels, axis=0) == 0, labels[0], np.nan)
        for model, value in zip(self.models, self.constant, strict=True):
            if not np.isnan(value):
                log.warning("router %r: every train prompt gives model %r the same quality (%.3g), so its estimate is "
                            "that constant; more or harder train prompts are the cure", self.name, model, value)
        held = None if dev is None else (self._encoder.encode([prompt_text(p) for p in dev.prompts]), dev.quality_mean)
        self._fit_vectors(self._encoder.encode(texts), labels, held, seed)

    def _estimate(self, prompts: Sequence[Prompt]) -> np.ndarray:
        assert self._encoder is not None, "fit or load first"
        try:
            estimate = self._estimate_vectors(self._encoder.encode([prompt_text(p) for p in prompts]))
        except ValueError as error:  # matrices whose sizes do not meet
            raise UserError(f"router {self.name!r}: its weights do not fit its encoder ({error}); train or fetch the "
                            "folder again") from None
        return np.where(np.isnan(self.constant), estimate, self.constant)

    def _fit_vectors(self, x: np.ndarray, y: np.ndarray, dev: tuple[np.ndarray, np.ndarray] | None, seed: int) -> None:
        raise NotImplementedError

    def _estimate_vectors(self, x: np.ndarray) -> np.ndarray:
        raise NotImplementedError

    def _state(self) -> dict[str, np.ndarray]:
        return {"constant": self.constant}

    def _set_state(self, state: dict[str, np.ndarray]) -> None:
        self.constant = shaped(state, "constant", len(self.models), finite=False)
        self._set_fitted(state)

    def _set_fitted(self, state: dict[str, np.ndarray]) -> None:
        raise NotImplementedError

    def _save_parts(self, folder: Path) -> None:
        self._encoder.save(folder)

    def _load_parts(self, folder: Path) -> None:
        self._encoder = self._open_encoder().load(folder)
        stored, found = self.card.get("encoder_identity"), self._encoder.identity
        if stored and stored != found:
            raise UserError(f"{folder}: it was trained over other encoder weights ({stored}) than "
                            f"{self._base_model()!r} holds now ({found}); point `encoder` at the former weights or "
                            "train again")

    def as_card(self) -> dict[str, Any]:
        return {**super().as_card(), "encoder_identity": self._encoder.identity}

    def _base_model(self) -> str:
        return str(self.encoder.get("name", "tfidf") if isinstance(self.encoder, dict) else self.encoder)

    def _hidden_seconds(self) -> float:
        return max(0.0, self._encoder.seconds_per_text - self._encoder.spent_per_text)


@dataclass(kw_only=True)
class KnnRouter(EncoderRouter):
    """Similarity-weighted mean of the soft labels of the k nearest train prompts (cosine).

    A neighbour's weight is exp((similarity - highest) / temperature). Left at 0, k and temperature are chosen on dev by
    the squared error of the estimates.
    """

    kind: ClassVar[str] = "knn"

    k: int = 0
    temperature: float = 0.0
    vectors: np.ndarray | None = field(default=None, init=False, repr=False)  # (train, D), unit length
    labels: np.ndarray | None = field(default=None, init=False, repr=False)  # (train, M)
    chosen: tuple[int, float] = field(default=(0, 0.0), init=False)  # k, temperature

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.k < 0 or self.temperature < 0:
            raise UserError(f"router {self.name!r}: k and temperature must be 0 (chosen on dev) or more; "
                            f"got k {self.k}, temperature {self.temperature}")

    def _fit_vectors(self, x: np.ndarray, y: np.ndarray, dev: tuple[np.ndarray, np.ndarray] | None, seed: int) -> None:
        self.vectors, self.labels = _unit(x).astype(np.float32), y.astype(np.float32)
        ks = [self.k] if self.k else sorted({min(k, len(x)) for k in K_GRID})
        temperatures = [self.temperature] if self.temperature else TEMPERATURES
        self.chosen = (self.k or DEFAULT_K, self.temperature or DEFAULT_TEMPERATURE)
        if dev is None or len(ks) * len(temperatures) == 1:
            return
        similarity, near = self._nearest(dev[0], max(ks))
        errors = {(k, t): np.mean((self._average(similarity[:, :k], near[:, :k], t) - dev[1]) ** 2)
                  for k in ks for t in temperatures}
        self.chosen = min(errors, key=errors.__getitem__)

    def _estimate_vectors(self, x: np.ndarray) -> np.ndarray:
        k, temperature = self.chosen
        parts = [self._average(*self._nearest(x[i:i + 1024], k), temperature) for i in range(0, len(x), 1024)]
        return np.vstack(parts)

    def _nearest(self, x: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        """Similarities and row numbers of the k nearest train prompts, (N, k) each, nearest first."""
        k = min(k, len(self.vectors))
        similarities, rows = [], []
        for start in range(0, len(x), 1024):
            similarity = _unit(x[start:start + 1024]).astype(np.float32) @ self.vectors.T  # (B, train)
            near = np.argpartition(-similarity, k - 1, axis=1)[:, :k]
            close = np.take_along_axis(similarity, near, axis=1)
            order = np.lexsort((near, -close), axis=1)  # ties by row number, whatever the partition did
            similarities.append(np.take_along_axis(close, order, axis=1))
            rows.append(np.take_along_axis(near, order, axis=1))
        return np.vstack(similarities), np.vstack(rows)

    def _average(self, similarity: np.ndarray, near: np.ndarray, temperature: float) -> np.ndarray:
        weight = np.exp((similarity - similarity[:, :1]) / temperature)
        return np.einsum("bk,bkm->bm", weight / weight.sum(axis=1, keepdims=True), self.labels[near])

    def _state(self) -> dict[str, np.ndarray]:
        return super()._state() | {"vectors": self.vectors, "labels": self.labels,
                                   "chosen": np.array(self.chosen, np.float64)}

    def _set_fitted(self, state: dict[str, np.ndarray]) -> None:
        self.vectors = shaped(state, "vectors", None, None)
        self.labels = shaped(state, "labels", len(self.vectors), len(self.models))
        k, temperature = shaped(state, "chosen", 2).tolist()
        if not (len(self.vectors) and k >= 1 and temperature > 0):
            raise ValueError(f"k {k}, temperature {temperature}")
        self.chosen = int(k), temperature


def _unit(x: np.ndarray) -> np.ndarray:
    return x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-9)


@dataclass(kw_only=True)
class LinearRouter(EncoderRouter):
    """A logistic regression per model, on soft labels, with an L2 penalty chosen per model on dev.

    `l2` fixes the penalty (per prompt) instead; `standardise` gives every column of the vectors the same spread. The
    grid starts so strong that a model without any signal in the prompts keeps a nearly constant estimate.
    """

    kind: ClassVar[str] = "linear"

    l2: float = 0.0
    standardise: bool = False
    weights: np.ndarray | None = field(default=None, init=False, repr=False)  # (D, M)
    bias: np.ndarray | None = field(default=None, init=False, repr=False)  # (M,)
    chosen_l2: list[float] = field(default_factory=list, init=False)
    scale: tuple[np.ndarray, np.ndarray] | None = field(default=None, init=False, repr=False)  # mean, factor (D,)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.l2 < 0:
            raise UserError(f"router {self.name!r}: l2 must be 0 (chosen on dev) or more; got {self.l2}")

    def _fit_vectors(self, x: np.ndarray, y: np.ndarray, dev: tuple[np.ndarray, np.ndarray] | None, seed: int) -> None:
        if self.standardise:
            # Unit length again on average, so that one grid of penalties fits both kinds of columns.
            self.scale = x.mean(axis=0), 1.0 / (np.maximum(x.std(axis=0), 1e-6) * np.sqrt(x.shape[1]))
        x, dev = self._scaled(x), None if dev is None else (self._scaled(dev[0]), dev[1])
        grid = (self.l2,) if self.l2 else L2_GRID if dev is not None else (DEFAULT_L2,)
        best = np.full(y.shape[1], np.inf)
        self.weights, self.bias = np.zeros((x.shape[1], y.shape[1])), np.zeros(y.shape[1])
        chosen = np.full(y.shape[1], grid[0])
        start = None
        worse = 0
        for l2 in grid:  # from strong to weak, each fit starting from the former one
            start = weights, bias = fit_logistic(x, y, l2, start)
            loss = np.zeros(y.shape[1]) if dev is None else log_loss(dev[1], sigmoid(dev[0] @ weights + bias))
            better = loss < best - 1e-9
            self.weights[:, better], self.bias[better] = weights[:, better], bias[better]
            best, chosen = np.where(better, loss, best), np.where(better, l2, chosen)
            worse = 0 if better.any() else worse + 1
            if worse == 2:
                break
        self.chosen_l2 = chosen.tolist()

    def _scaled(self, x: np.ndarray) -> np.ndarray:
        return x if self.scale is None else (x - self.scale[0]) * self.scale[1]

    def _estimate_vectors(self, x: np.ndarray) -> np.ndarray:
        return sigmoid(self._scaled(x) @ self.weights + self.bias)

    def _state(self) -> dict[str, np.ndarray]:
        state = super()._state() | {"weights": self.weights, "bias": self.bias, "l2": np.array(self.chosen_l2)}
        return state if self.scale is None else state | {"scale_mean": self.scale[0], "scale_factor": self.scale[1]}

    def _set_fitted(self, state: dict[str, np.ndarray]) -> None:
        m = len(self.models)
        self.weights, self.bias = shaped(state, "weights", None, m), shaped(state, "bias", m)
        self.chosen_l2 = shaped(state, "l2", m).tolist()
        if self.standardise:
            self.scale = tuple(shaped(state, key, len(self.weights)) for key in ("scale_mean", "scale_factor"))


@dataclass(kw_only=True)
class MfRouter(EncoderRouter):
    """Matrix factorisation: a prompt's vector and a learnt vector per model meet in a low-dimensional space.

    After the `mf` router of RouteLLM (arXiv 2406.18665), which scores a pair of models from human preferences as
    sigmoid(w . ((P_strong - P_weak) * (W q))) with unit-length P. Here every model is scored by itself, estimate_m =
    sigmoid(w . (P_m * (W q)) + b_m), on the soft quality labels of all models at once: the pool may hold any number
    of models, and the estimates are qualities rather than win rates. Early stop on dev.
    """

    kind: ClassVar[str] = "mf"

    dimensions: int = 32
    learning_rate: float = 0.01
    weight_decay: float = 0.05
    batch_size: int = 256
    epochs: int = 100
    patience: int = 8
    parameters: dict[str, np.ndarray] = field(default_factory=dict, init=False, repr=False)
    history: list[float] = field(default_factory=list, init=False, repr=False)  # dev loss per epoch

    def __post_init__(self) -> None:
        super().__post_init__()
        for option in ("dimensions", "learning_rate", "batch_size", "epochs", "patience"):
            if getattr(self, option) <= 0:
                raise UserError(f"router {self.name!r}: {option} must be above 0; got {getattr(self, option)}")

    def _fit_vectors(self, x: np.ndarray, y: np.ndarray, dev: tuple[np.ndarray, np.ndarray] | None, seed: int) -> None:
        if dev is None:  # a tenth of train decides when to stop
            order = np.random.default_rng(seed).permutation(len(x))
            held = max(1, len(x) // 10)
            dev = x[order[:held]], y[order[:held]]
            if len(x) > held:
                x, y = x[order[held:]], y[order[held:]]
        self.parameters, self.history = train_factors(
            x, y, dev, seed, dimensions=self.dimensions, learning_rate=self.learning_rate, epochs=self.epochs,
            weight_decay=self.weight_decay, batch_size=self.batch_size, patience=self.patience)

    def _estimate_vectors(self, x: np.ndarray) -> np.ndarray:
        p = self.parameters
        return sigmoid((x @ p["project"]) @ (_unit(p["models"]) * p["weigh"]).T + p["bias"])

    def _state(self) -> dict[str, np.ndarray]:
        return super()._state() | self.parameters

    def _set_fitted(self, state: dict[str, np.ndarray]) -> None:
        project, m = shaped(state, "project", None, None), len(self.models)
        d = project.shape[1]
        self.parameters = {"project": project, "models": shaped(state, "models", m, d),
                           "weigh": shaped(state, "weigh", d), "bias": shaped(state, "bias", m)}


def initial_factors(features: int, y: np.ndarray, dimensions: int, seed: int) -> dict[str, np.ndarray]:
    """Start values: project (D, d), models (M, d), weigh (d,), bias (M,) at the logit of each model's mean quality."""
    random = np.random.default_rng(seed)
    mean = np.clip(y.mean(axis=0), 0.01, 0.99)
    return {"project": random.normal(0, features**-0.5, (features, dimensions)).astype(np.float32),
            "models": random.normal(0, 1, (y.shape[1], dimensions)).astype(np.float32),
            "weigh": np.ones(dimensions, np.float32),
            "bias": np.log(mean / (1 - mean)).astype(np.float32)}


def train_factors(x: np.ndarray, y: np.ndarray, dev: tuple[np.ndarray, np.ndarray], seed: int, *, dimensions: int,
                  learning_rate: float, epochs: int, weight_decay: float, batch_size: int, patience: int,
                  say: Callable[[str], None] | None = None) -> tuple[dict[str, np.ndarray], list[float]]:
    """The best parameters on dev and the dev loss per epoch. AdamW, binary cross-entropy on soft labels, CPU."""
    import torch
    from torch.nn.functional import binary_cross_entropy_with_logits as cross_entropy
    from torch.nn.functional import normalize

    start = initial_factors(x.shape[1], y, dimensions, seed)
    values = {key: torch.nn.Parameter(torch.from_numpy(value.copy())) for key, value in start.items()}
    optimizer = torch.optim.AdamW([{"params": [values["project"], values["models"], values["weigh"]]},
                                   {"params": [values["bias"]], "weight_decay": 0.0}],
                                  lr=learning_rate, weight_decay=weight_decay)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs)
    xs, ys = torch.from_numpy(np.asarray(x, np.float32)), torch.from_numpy(np.asarray(y, np.float32))
    dev_x, dev_y = (torch.from_numpy(np.asarray(part, np.float32)) for part in dev)

    def logits(rows: torch.Tensor) -> torch.Tensor:
        return (rows @ values["project"]) @ (normalize(values["models"], dim=1) * values["weigh"]).T + values["bias"]

    batch_size = min(batch_size, max(16, len(xs) // 10))  # a small train split still gets ten steps an epoch
    generator = torch.Generator().manual_seed(seed)
    best, best_loss, history = start, np.inf, []
    for epoch in range(epochs):
        for rows in torch.randperm(len(xs), generator=generator).split(batch_size):
            optimizer.zero_grad()
            cross_entropy(logits(xs[rows]), ys[rows]).backward()
            optimizer.step()
        scheduler.step()
        with torch.no_grad():
            history.append(float(cross_entropy(logits(dev_x), dev_y)))
        if history[-1] < best_loss - 1e-5:
            best_loss = history[-1]
            best = {key: value.detach().numpy().copy() for key, value in values.items()}
        if say:
            say(f"epoch {epoch + 1}: dev loss {history[-1]:.4f}")
        if epoch + 1 - (int(np.argmin(history)) + 1) >= patience:
            break
    return best, history
