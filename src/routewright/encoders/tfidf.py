"""TF-IDF vectors: an encoder that needs no weights."""

from __future__ import annotations

import hashlib
import json
import time
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from routewright.encoders.base import Encoder
from routewright.errors import UserError
from routewright.textfiles import write_atomic


class TfidfEncoder(Encoder):
    """Word (1-2) and character (2-4, inside words) n-gram TF-IDF, reduced by SVD, beside the surface numbers.

    It needs no weights. `dimensions` is the rank of the SVD, 0 keeps the sparse columns as they are; `features`
    caps each of the two vocabularies. It is persisted as vocabulary.json and arrays, and rebuilt exactly.
    """

    name = "tfidf"

    def __init__(self, dimensions: int = 128, features: int = 20_000, characters: bool = True, surface: bool = True):
        self.dimensions, self.features, self.characters, self.surface = dimensions, features, characters, surface
        self._parts: list[Any] = []
        self._components: np.ndarray | None = None
        self._key = ""  # of the fit, for the memo; none after load

    @property
    def learns(self) -> bool:
        return True

    @property
    def identity(self) -> str:
        return f"tfidf-{self.dimensions}-{self.features}-{int(self.characters)}-{int(self.surface)}"

    def fit(self, texts: Sequence[str]) -> TfidfEncoder:
        super().fit(texts)
        self._key = f"{self.identity}-{_texts_hash(texts)}"
        if self._key in _MEMO:
            self._parts, self._components = _MEMO[self._key]
            return self
        self._parts = self._vectorizers()
        blocks = []
        for part in self._parts:
            try:
                blocks.append(part.fit_transform(texts))
            except ValueError:  # nothing survives the floor on document frequency: a tiny or wordless train split
                part.min_df = 1
                try:
                    blocks.append(part.fit_transform(texts))
                except ValueError:
                    raise UserError(f"the {len(texts)} train prompts hold no words, so tfidf has nothing to learn; "
                                    "check the prompts, or use a pretrained encoder") from None
        matrix = _join(blocks)
        rank = min(self.dimensions, matrix.shape[1] - 1, matrix.shape[0] - 1)
        self._components = None
        if self.dimensions and rank >= 1:
            from sklearn.decomposition import TruncatedSVD

            self._components = TruncatedSVD(rank, random_state=0, n_iter=3).fit(matrix).components_.astype(np.float32)
        _remember(self._key, (self._parts, self._components))
        return self

    def _vectorizers(self, vocabulary: dict[str, list[str]] | None = None) -> list[Any]:
        from sklearn.feature_extraction.text import TfidfVectorizer

        def part(key: str, **options: Any) -> Any:
            known = None if vocabulary is None else {term: i for i, term in enumerate(vocabulary[key])}
            return TfidfVectorizer(sublinear_tf=True, dtype=np.float32, max_features=self.features, min_df=2,
                                   vocabulary=known, **options)

        # Single characters count as words: in a word problem every digit matters.
        parts = [part("words", ngram_range=(1, 2), token_pattern=r"(?u)\b\w+\b")]
        if self.characters:
            parts.append(part("characters", analyzer="char_wb", ngram_range=(2, 4)))
        return parts

    def _encode(self, texts: Sequence[str]) -> tuple[np.ndarray, float]:
        assert self._parts, "fit or load first"
        key = f"{self._key}-{_texts_hash(texts)}" if self._key else ""
        if key in _MEMO:
            return _MEMO[key]
        began = time.perf_counter()
        rows = []
        for start in range(0, len(texts), 4096):
            matrix = _join([part.transform(texts[start:start + 4096]) for part in self._parts])
            if self._components is None:
                rows.append(matrix.toarray())
                continue
            dense = np.asarray(matrix @ self._components.T)
            rows.append(dense / np.maximum(np.linalg.norm(dense, axis=1, keepdims=True), 1e-9))
        vectors = np.vstack(rows).astype(np.float32)
        if key:
            _remember(key, (vectors, time.perf_counter() - began))
        return vectors, 0.0

    def save(self, folder: Path) -> None:
        super().save(folder)
        names = ("words", "characters")[:len(self._parts)]
        terms = {name: part.get_feature_names_out().tolist() for name, part in zip(names, self._parts, strict=True)}
        write_atomic(folder / "vocabulary.json", json.dumps(terms, ensure_ascii=False))

    def _state(self) -> dict[str, np.ndarray]:
        state = {f"idf_{i}": part.idf_ for i, part in enumerate(self._parts)}
        return state if self._components is None else state | {"components": self._components}

    def _set_state(self, state: dict[str, np.ndarray], folder: Path) -> None:
        vocabulary = json.loads((folder / "vocabulary.json").read_text(encoding="utf-8"))
        self._parts = self._vectorizers(vocabulary)
        for i, part in enumerate(self._parts):
            part.idf_ = state[f"idf_{i}"]
        self._components = state.get("components")


_MEMO: OrderedDict[str, Any] = OrderedDict()  # the last fits and encodings: an evaluation fits several routers over one


def _remember(key: str, value: Any) -> None:
    _MEMO[key] = value
    while len(_MEMO) > 12:
        _MEMO.popitem(last=False)


def _texts_hash(texts: Sequence[str]) -> str:
    digest = hashlib.sha256()
    for text in texts:
        digest.update(text.encode("utf-8", "surrogatepass") + b"\x1f")
    return digest.hexdigest()[:16]


def _join(blocks: list[Any]) -> Any:
    from scipy.sparse import hstack

    return hstack(blocks, format="csr")
