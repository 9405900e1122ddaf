"""Pretrained sentence vectors, and the cache that keeps them between runs."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import sys
import time
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from routewright.encoders.base import Encoder
from routewright.encoders.weights import (
    find_weights,
    load_encoder,
    load_tokenizer,
    longest_input,
    not_loading,
    torch_device,
    weights_identity,
)
from routewright.errors import MissingSetup
from routewright.textfiles import write_atomic

DEFAULT_ENCODER = "sentence-transformers/all-MiniLM-L6-v2"

log = logging.getLogger(__name__)


class TextEncoder(Encoder):
    """Pretrained sentence vectors, of unit length: any sentence-transformers folder or hub id, else any encoder of
    transformers with mean pooling over its tokens.

    Texts are sorted by length before they are batched (random order costs several times more in padding), and each
    vector is kept in the embedding cache under the hash of its text, so that several seeds and routers embed once.
    """

    def __init__(self, name: str = DEFAULT_ENCODER, cache: str | Path | bool = True, max_length: int | None = None,
                 batch_size: int = 32, surface: bool = False):
        self.name, self.max_length, self.batch_size, self.surface = str(name), max_length, batch_size, surface
        self.folder = find_weights(self.name)
        self.identity = f"{weights_identity(self.folder)}-{max_length or 'own'}"
        self._cache = _VectorCache(_cache_folder(cache), self.identity)

    def _encode(self, texts: Sequence[str]) -> tuple[np.ndarray, float]:
        # Half a surrogate pair is no text to any tokenizer.
        texts = [text.encode("utf-8", "replace").decode() for text in texts]
        keys = [hashlib.sha256(text.encode()).digest() for text in texts]
        missing = {key: text for key, text in zip(keys, texts, strict=True) if key not in self._cache}
        spared = sum(self._cache.seconds(key) for key in keys if key not in missing)
        if missing:
            _open_model(self.folder)  # outside the clock
            order = sorted(missing, key=lambda key: len(missing[key]))
            for start in range(0, len(order), _CHUNK):
                chunk = order[start:start + _CHUNK]
                wall, cpu = time.perf_counter(), time.process_time()
                vectors = _embed(self.folder, [missing[key] for key in chunk], self.batch_size, self.max_length)
                wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
                # The figure outlives this run, so a machine that was busy with other work must not inflate it.
                self._cache.add(chunk, vectors, (wall if torch_device() == "cuda" else min(wall, cpu)) / len(chunk))
                done = start + len(chunk)
                if done == len(order) or done % (16 * _CHUNK) == 0:
                    self._cache.flush()
                    if len(order) > 8 * _CHUNK:
                        print(f"embedded {done} of {len(order)} texts with {self.name}", file=sys.stderr, flush=True)
        return self._cache.vectors(keys), spared


_CHUNK = 256  # texts of like length that are timed together
_MODELS: dict[str, Any] = {}  # loaded once per process: seeds and routers share them


@dataclass
class _SentenceModel:
    """A network, its tokenizer, and how token states become one vector."""

    network: Any
    tokenizer: Any
    pooling: str  # "mean" or "cls"
    max_length: int

    def embed(self, texts: list[str], batch_size: int, max_length: int | None) -> np.ndarray:
        import torch

        limit = min(self.max_length, max_length or self.max_length)
        rows = []
        with torch.inference_mode():
            for start in range(0, len(texts), batch_size):
                batch = self.tokenizer(texts[start:start + batch_size], padding=True, truncation=True, max_length=limit,
                                       return_tensors="pt").to(self.network.device)
                hidden = self.network(**batch).last_hidden_state.float()  # (B, T, D)
                if self.pooling == "cls":
                    vectors = hidden[:, 0]
                else:
                    mask = batch["attention_mask"].unsqueeze(-1).float()
                    vectors = (hidden * mask).sum(1) / mask.sum(1).clamp(min=1.0)
                rows.append(torch.nn.functional.normalize(vectors, dim=1).cpu().numpy())
        return np.vstack(rows)


def _open_model(folder: Path) -> Any:
    """The model of a folder, loaded once per process. Raises MissingSetup when the weights do not load."""
    key = str(folder)
    if key not in _MODELS:
        chain = _read_chain(folder)
        if chain is None:
            _MODELS[key] = _load_sentence_transformer(folder)
        else:
            network, tokenizer = load_encoder(folder)
            own = min(chain["max_length"] or 512, longest_input(network, tokenizer))
            _MODELS[key] = _SentenceModel(network, tokenizer, chain["pooling"], own)
    return _MODELS[key]


def _embed(folder: Path, texts: list[str], batch_size: int, max_length: int | None) -> np.ndarray:
    """float32 (N, D), each of length 1."""
    model = _open_model(folder)
    if isinstance(model, _SentenceModel):
        return model.embed(texts, batch_size, max_length)
    model.max_seq_length = min(max_length or model.own_length, model.own_length)
    return model.encode(texts, batch_size=batch_size, normalize_embeddings=True, show_progress_bar=False,
                        convert_to_numpy=True).astype(np.float32)


def _read_chain(folder: Path) -> dict[str, Any] | None:
    """Pooling and length limit of a folder that is encoder, mean or cls pooling, and perhaps normalising; else None.

    Nearly every sentence encoder is such a chain. Reading it here spares the import of sentence_transformers, which
    costs more seconds than embedding a small cache, and lets the checked tokenizer be used.
    """
    def read(name: str) -> Any:
        path = folder / name
        try:
            return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
        except ValueError as error:
            raise MissingSetup(f"{path}: not JSON ({error}); fetch the file again") from None

    modules = read("modules.json")
    if not modules:
        return {"pooling": "mean", "max_length": None}
    kinds = [str(module.get("type", "")).rsplit(".", 1)[-1] for module in modules]
    own = read("sentence_bert_config.json")
    if kinds not in (["Transformer", "Pooling"], ["Transformer", "Pooling", "Normalize"]) or modules[0].get("path"):
        return None
    pooling = read(f"{modules[1]['path']}/config.json")
    prefix = "pooling_mode_"
    modes = [pooling["pooling_mode"]] if "pooling_mode" in pooling else [
        key.removeprefix(prefix).removesuffix("_tokens").removesuffix("_token")
        for key, on in pooling.items() if key.startswith(prefix) and on]
    if modes not in (["mean"], ["cls"]) or pooling.get("include_prompt") is False or own.get("do_lower_case"):
        return None
    return {"pooling": modes[0], "max_length": own.get("max_seq_length")}


def _load_sentence_transformer(folder: Path) -> Any:
    """Every other kind of sentence encoder, by sentence-transformers itself."""
    load_tokenizer(folder)  # for its check
    from sentence_transformers import SentenceTransformer

    try:
        model = SentenceTransformer(str(folder), local_files_only=True, trust_remote_code=False, device=torch_device())
    except (OSError, ValueError, ImportError, RuntimeError) as error:
        raise not_loading(folder, error) from None
    model.own_length = model.max_seq_length or 512
    return model.eval()


def _cache_folder(cache: str | Path | bool) -> Path | None:
    if cache is False:
        return None
    if cache is True:
        root = Path(__file__).resolve().parents[3]  # of the repository
        return Path(os.environ.get("ROUTEWRIGHT_CACHE") or root / "data" / "runs" / ".cache")
    return Path(cache)


class _VectorCache:
    """Vectors by text hash, with the seconds each once took: one npz per encoder. Damaged files are built anew."""

    def __init__(self, folder: Path | None, identity: str):
        self._file = None if folder is None else folder / f"{identity}.npz"
        self._rows: dict[bytes, int] = {}
        self._blocks: list[np.ndarray] = []
        self._seconds: list[float] = []
        self._read()

    def __contains__(self, key: bytes) -> bool:
        return key in self._rows

    def seconds(self, key: bytes) -> float:
        return self._seconds[self._rows[key]]

    def add(self, keys: Sequence[bytes], vectors: np.ndarray, seconds: float) -> None:
        for key in keys:
            self._rows[key] = len(self._seconds)
            self._seconds.append(seconds)
        self._blocks.append(vectors)

    def vectors(self, keys: Sequence[bytes]) -> np.ndarray:
        if len(self._blocks) > 1:
            self._blocks = [np.vstack(self._blocks)]
        if not keys:
            return np.zeros((0, 1), np.float32)
        return self._blocks[0][[self._rows[key] for key in keys]]

    def _read(self) -> None:
        if self._file is None or not self._file.is_file():
            return
        try:
            with np.load(self._file, allow_pickle=False) as stored:
                keys, vectors, seconds = stored["keys"], stored["vectors"], stored["seconds"]
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
            log.warning("%s: the embedding cache is damaged (%s); it is built anew", self._file, error)
            return
        fresh = [i for i, key in enumerate(keys) if key.tobytes() not in self._rows]
        if fresh:
            for i in fresh:
                self._rows[keys[i].tobytes()] = len(self._seconds)
                self._seconds.append(float(seconds[i]))
            self._blocks.append(vectors[fresh])

    def flush(self) -> None:
        """Write all vectors, with those another process has written meanwhile."""
        if self._file is None:
            return
        self._read()
        keys = np.frombuffer(b"".join(self._rows), dtype=np.uint8).reshape(-1, 32)
        vectors = self.vectors(list(self._rows))
        seconds = np.array(self._seconds, dtype=np.float32)
        write_atomic(self._file, lambda file: np.savez(file, keys=keys, vectors=vectors, seconds=seconds))
