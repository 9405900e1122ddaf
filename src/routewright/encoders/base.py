"""The encoder contract, and the plain facts of a text that every encoder may set beside its vector."""

from __future__ import annotations

import math
import re
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from routewright.errors import UserError
from routewright.textfiles import write_atomic

STATE = "encoder.safetensors"


class Encoder:
    """Texts to vectors. `fit` sees train texts only; `encode` gives float32 (N, D).

    `seconds_per_text` is what encoding took per text, in batches, when it was really done: a cached vector keeps the
    time it once cost, so that the overhead of a router does not vanish with a warm cache.
    """

    name: str
    surface: bool
    identity: str  # changes with the weights and options that shape the vectors
    seconds_per_text: float = 0.0  # of the last encode: the true cost
    spent_per_text: float = 0.0  # of the last encode: what this process really waited

    @property
    def learns(self) -> bool:
        """Whether `fit` leaves something that must be saved."""
        return self.surface

    def fit(self, texts: Sequence[str]) -> Encoder:
        """Learn whatever the encoder learns (vocabulary, scales) from train texts."""
        if self.surface:
            raw = surface_numbers(texts)
            self._mean, self._scale = raw.mean(axis=0), np.maximum(raw.std(axis=0), 1e-6)
        return self

    def encode(self, texts: Sequence[str]) -> np.ndarray:
        """float32 (N, D)."""
        start = time.perf_counter()
        vectors, spared = self._encode(texts)
        if self.surface:
            scaled = np.clip((surface_numbers(texts) - self._mean) / self._scale, -3.0, 3.0)
            # The block as a whole weighs half as much as the unit-length text vector.
            vectors = np.hstack([vectors, (0.5 / np.sqrt(scaled.shape[1])) * scaled]).astype(np.float32)
        self.spent_per_text = (time.perf_counter() - start) / max(len(texts), 1)
        self.seconds_per_text = self.spent_per_text + spared / max(len(texts), 1)
        return vectors

    def save(self, folder: Path) -> None:
        """Write what `fit` learnt, never pickled."""
        from safetensors.numpy import save as to_bytes

        state = self._state()
        if self.surface:
            state |= {"surface_mean": self._mean, "surface_scale": self._scale}
        if state:
            write_atomic(folder / STATE, to_bytes({k: np.ascontiguousarray(v) for k, v in state.items()}))

    def load(self, folder: Path) -> Encoder:
        """Read what `save` wrote. Raises UserError when a file is missing or damaged."""
        path = folder / STATE
        if not path.is_file() and not self.learns:
            return self
        from safetensors import SafetensorError
        from safetensors.numpy import load_file

        try:
            state = load_file(path)
            if self.surface:
                self._mean, self._scale = (_ten(state[key]) for key in ("surface_mean", "surface_scale"))
            self._set_state(state, folder)
        except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
            raise UserError(f"{path}: not readable ({error}); train or fetch the router again") from None
        return self

    def _encode(self, texts: Sequence[str]) -> tuple[np.ndarray, float]:
        """Vectors, and the seconds that a cache spared."""
        raise NotImplementedError

    def _state(self) -> dict[str, np.ndarray]:
        return {}

    def _set_state(self, state: dict[str, np.ndarray], folder: Path) -> None:
        pass


def _ten(array: np.ndarray) -> np.ndarray:
    if array.shape != (10,):
        raise ValueError(f"surface numbers of shape {array.shape}")
    return array


_NUMBER = re.compile(r"\d+(?:[.,]\d+)*")


def surface_numbers(texts: Sequence[str]) -> np.ndarray:
    """Ten plain facts of each text, (N, 10): lengths, digits, numbers and their size, questions, symbols, lines."""
    rows = np.empty((len(texts), 10))
    for row, text in enumerate(texts):
        numbers = _NUMBER.findall(text)
        words = text.split()
        largest = max((len(n.split(".")[0].replace(",", "")) for n in numbers), default=0)
        rows[row] = (math.log1p(len(text)), math.log1p(len(words)), sum(c.isdigit() for c in text) / max(len(text), 1),
                     math.log1p(len(numbers)), largest, text.count("?"),
                     math.log1p(sum(c in "+-*/=^%$\\<>" for c in text)),
                     math.log1p(text.count("\n")), math.log1p(text.count(",") + text.count(".")),
                     len(set(words)) / max(len(words), 1))
    return rows
