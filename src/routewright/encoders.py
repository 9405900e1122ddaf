"""Turning prompts into vectors, and loading weights and tokenizers without surprises.

Three rules hold for everything loaded here. Weights come from a folder or from the local Hugging Face cache: nothing
is ever downloaded, so a missing model is reported within seconds instead of after a network time-out. No code that
lies beside weights is executed. A tokenizer is tried on a probe sentence before it is handed out, because
transformers 5 returns an empty one without any error when its vocabulary file is missing.
"""

from __future__ import annotations

import hashlib
import inspect
import json
import logging
import math
import os
import re
import time
import zipfile
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from routewright.errors import MissingSetup, UserError
from routewright.textfiles import nearest, write_atomic

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

DEFAULT_ENCODER = "sentence-transformers/all-MiniLM-L6-v2"
PROBE = "What is 2 + 2?"
SMALLEST_VOCABULARY = 16  # a blank tokenizer holds 5 to 7 special tokens
MOST_UNKNOWN = 0.5  # share of unknown tokens on the probe above which the vocabulary cannot be the right one
_COMPARED = ("model", "normalizer", "pre_tokenizer")  # what decides how a text is cut

log = logging.getLogger(__name__)


def find_weights(name: str | Path) -> Path:
    """The folder of a model: the folder itself, or the snapshot of a hub id in the local cache. No network.

    Raises MissingSetup with the download command when it is neither.
    """
    folder = Path(name).expanduser()
    if folder.is_dir():
        return folder
    text = str(name)
    if text.startswith((".", "/", "~")) or text.count("/") != 1:
        raise MissingSetup(f"{text}: no such weights folder; give a folder with config.json and model.safetensors, "
                           "or a hub id such as sentence-transformers/all-MiniLM-L6-v2")
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(text, local_files_only=True))
    except (OSError, ValueError):  # LocalEntryNotFoundError and HFValidationError
        raise MissingSetup(f"weights of {text!r} are not on this machine (neither a folder nor in the Hugging Face "
                           f"cache); fetch them with `hf download {text}`, or give the path of a folder") from None


def load_tokenizer(path: str | Path, probe: str = PROBE) -> PreTrainedTokenizerBase:
    """The tokenizer of a weights folder or cached hub id, checked before use.

    Two faults of the stock loader are caught. A missing vocabulary file gives a blank tokenizer, where every word is
    unknown: that raises. A `tokenizer.json` beside a config of another family (`model_type: qwen2`) is replaced by
    that family's own tokenizer, which may silently drop words: then the file is loaded as it is written.

    Raises MissingSetup when the tokenizer is absent, unreadable or blank.
    """
    folder = find_weights(path)
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
    except Exception as error:  # noqa: BLE001 - the loader raises a dozen kinds, all mean the same to the user
        tokenizer = None
        failure = error
    if (folder / "tokenizer.json").is_file():
        tokenizer = _as_written(folder, tokenizer)
    if tokenizer is None:
        first = str(failure).strip().splitlines()[0] if str(failure).strip() else type(failure).__name__
        raise MissingSetup(f"{path}: the tokenizer does not load ({first[:200]}); fetch the whole folder again with "
                           "`hf download`, and `pip install sentencepiece` where it ships only spm.model") from None
    _check_not_blank(tokenizer, path, probe)
    return tokenizer


def _as_written(folder: Path, tokenizer: PreTrainedTokenizerBase | None) -> PreTrainedTokenizerBase | None:
    """`tokenizer` where it cuts text as the folder's tokenizer.json says; else one read from that file."""
    try:
        wanted = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise MissingSetup(f"{folder / 'tokenizer.json'}: not readable ({error}); fetch the file again") from None
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        loaded = json.loads(backend.to_str())
        if all(_plain(loaded.get(part)) == _plain(wanted.get(part)) for part in _COMPARED):
            return tokenizer
    from transformers import PreTrainedTokenizerFast

    try:
        exact = PreTrainedTokenizerFast.from_pretrained(str(folder), local_files_only=True)
    except Exception:  # noqa: BLE001 - the caller reports the first failure, or goes on with what it has
        return tokenizer
    if tokenizer is not None:
        # Class defaults (pad, mask ...) are kept where the file has the token and the plain loader did not name it.
        known = exact.get_vocab()
        for role, token in tokenizer.special_tokens_map.items():
            if isinstance(token, str) and getattr(exact, role, None) is None and token in known:
                setattr(exact, role, token)
        exact.model_max_length = min(exact.model_max_length, tokenizer.model_max_length)
    return exact


def _plain(part: Any) -> Any:
    """A tokenizer.json section without the differences that mean nothing: merges as lists or as 'a b' text."""
    if isinstance(part, dict) and isinstance(part.get("merges"), list):
        part = {**part, "merges": [m.split(" ", 1) if isinstance(m, str) else list(m) for m in part["merges"]]}
    return part


def _check_not_blank(tokenizer: PreTrainedTokenizerBase, path: str | Path, probe: str) -> None:
    size = len(tokenizer)
    ids = tokenizer(probe, add_special_tokens=False)["input_ids"]
    unknown = sum(i == tokenizer.unk_token_id for i in ids) / len(ids) if ids else 1.0
    if size >= SMALLEST_VOCABULARY and unknown <= MOST_UNKNOWN:
        return
    raise MissingSetup(f"{path}: the tokenizer is blank ({size} tokens, {unknown:.0%} of the probe {probe!r} unknown); "
                       "its vocabulary file (tokenizer.json, spm.model or vocab.txt) is missing, so fetch the whole "
                       "folder again")


# ---------------------------------------------------------------- encoders

def make_encoder(spec: str | dict[str, Any], cache: str | Path | bool = True) -> Encoder:
    """An encoder from its entry: `tfidf`, a weights folder, a hub id, or a mapping with `name` and its options.

    `cache` is the folder of the embedding cache, True for data/runs/.cache, False for none. Raises UserError.
    """
    options = dict(spec) if isinstance(spec, dict) else {"name": spec}
    name = options.pop("name", "tfidf")
    cls: type[Encoder] = TfidfEncoder if name == "tfidf" else TextEncoder
    if cls is TextEncoder:
        options |= {"name": name, "cache": cache}
    known = [key for key in inspect.signature(cls).parameters if key not in ("name", "cache")]
    for key in options:
        if key not in (*known, "name", "cache"):
            raise UserError(f"encoder {name!r} has no option {key!r}{nearest(key, known)}; known: {', '.join(known)}")
    return cls(**options)


class Encoder:
    """Texts to vectors. `fit` sees train texts only; `encode` gives float32 (N, D).

    `seconds_per_text` is what encoding took per text, in batches, when it was really done: a cached vector keeps the
    time it once cost, so that the overhead of a router does not vanish with a warm cache.
    """

    name: str
    surface: bool
    seconds_per_text: float = 0.0  # of the last encode: the true cost
    spent_per_text: float = 0.0  # of the last encode: what this process really waited

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
            write_atomic(folder / "encoder.safetensors", to_bytes({k: np.ascontiguousarray(v) for k, v in state.items()}))

    def load(self, folder: Path) -> Encoder:
        """Read what `save` wrote. Raises UserError when a file is missing or damaged."""
        path = folder / "encoder.safetensors"
        if not path.is_file() and not (self.surface or isinstance(self, TfidfEncoder)):
            return self
        from safetensors import SafetensorError
        from safetensors.numpy import load_file

        try:
            state = load_file(path)
            if self.surface:
                self._mean, self._scale = state["surface_mean"], state["surface_scale"]
            self._set_state(state, folder)
        except (SafetensorError, OSError, KeyError, ValueError) as error:
            raise UserError(f"{path}: not readable ({error}); train or fetch the router again") from None
        return self

    def _encode(self, texts: Sequence[str]) -> tuple[np.ndarray, float]:
        """Vectors, and the seconds that a cache spared."""
        raise NotImplementedError

    def _state(self) -> dict[str, np.ndarray]:
        return {}

    def _set_state(self, state: dict[str, np.ndarray], folder: Path) -> None:
        pass


_NUMBER = re.compile(r"\d+(?:[.,]\d+)*")


def surface_numbers(texts: Sequence[str]) -> np.ndarray:
    """Ten plain facts of each text, (N, 10): lengths, digits, numbers and their size, questions, symbols, lines."""
    rows = np.empty((len(texts), 10))
    for row, text in enumerate(texts):
        numbers = _NUMBER.findall(text)
        words = text.split()
        largest = max((len(n.split(".")[0].replace(",", "")) for n in numbers), default=0)
        rows[row] = (math.log1p(len(text)), math.log1p(len(words)), sum(c.isdigit() for c in text) / max(len(text), 1),
                     math.log1p(len(numbers)), largest, text.count("?"), math.log1p(sum(c in "+-*/=^%$\\<>" for c in text)),
                     math.log1p(text.count("\n")), math.log1p(text.count(",") + text.count(".")),
                     len(set(words)) / max(len(words), 1))
    return rows


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
                    raise UserError(f"the {len(texts)} train prompts hold no words, so tfidf has nothing to learn; check the "
                                    "prompts, or use a pretrained encoder") from None
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
        keys = [hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest() for text in texts]
        missing = {key: text for key, text in zip(keys, texts, strict=True) if key not in self._cache}
        spared = sum(self._cache.seconds(key) for key in keys if key not in missing)
        if missing:
            order = sorted(missing, key=lambda key: len(missing[key]))
            for start in range(0, len(order), _CHUNK):
                chunk = order[start:start + _CHUNK]
                began = time.perf_counter()
                vectors = _embed(self.folder, [missing[key] for key in chunk], self.batch_size, self.max_length)
                self._cache.add(chunk, vectors, (time.perf_counter() - began) / len(chunk))
            self._cache.flush()
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


def _embed(folder: Path, texts: list[str], batch_size: int, max_length: int | None) -> np.ndarray:
    """float32 (N, D), each of length 1. Raises MissingSetup when the weights do not load."""
    key = str(folder)
    if key not in _MODELS:
        chain = _read_chain(folder)
        if chain is None:
            _MODELS[key] = _load_sentence_transformer(folder)
        else:
            network, tokenizer = load_encoder(folder)
            own = min(chain["max_length"] or 512, longest_input(network, tokenizer))
            _MODELS[key] = _SentenceModel(network, tokenizer, chain["pooling"], own)
    model = _MODELS[key]
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
    modes = [pooling["pooling_mode"]] if "pooling_mode" in pooling else [
        key.removeprefix("pooling_mode_").split("_")[0] for key, on in pooling.items() if key.startswith("pooling_mode_") and on]
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
        raise _not_loading(folder, error) from None
    model.own_length = model.max_seq_length or 512
    return model.eval()


def load_encoder(path: str | Path) -> tuple[Any, PreTrainedTokenizerBase]:
    """(network, tokenizer) of a pretrained encoder, in eval mode, on the GPU where there is one. Raises MissingSetup."""
    folder = find_weights(path)
    tokenizer = load_tokenizer(folder)
    from transformers import AutoModel

    try:
        with quiet_loading():
            network, report = AutoModel.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False,
                                                        output_loading_info=True)
    except (OSError, ValueError, ImportError, RuntimeError) as error:
        raise _not_loading(path, error) from None
    fresh = [key for key in report["missing_keys"] if "pooler" not in key]  # we pool ourselves
    if fresh:
        raise MissingSetup(f"{path}: {len(fresh)} weights are missing from the file (first: {sorted(fresh)[0]}), so parts "
                           "of the encoder would be random; fetch the whole folder again")
    if len(tokenizer) > network.get_input_embeddings().num_embeddings:
        raise MissingSetup(f"{path}: the tokenizer knows {len(tokenizer)} tokens and the network "
                           f"{network.get_input_embeddings().num_embeddings}; they do not belong together")
    return network.to(torch_device()).float().eval(), tokenizer


@contextmanager
def quiet_loading() -> Iterator[None]:
    """No progress bars and no loading report while weights load: what matters in the report is raised by the caller."""
    from transformers.utils import logging as theirs

    level, bars = theirs.get_verbosity(), theirs.is_progress_bar_enabled()
    theirs.set_verbosity_error()
    theirs.disable_progress_bar()
    try:
        yield
    finally:
        theirs.set_verbosity(level)
        if bars:
            theirs.enable_progress_bar()


def longest_input(network: Any, tokenizer: Any) -> int:
    """Tokens the network can take: the smaller of its positions and the tokenizer's own limit."""
    positions = getattr(network.config, "max_position_embeddings", None) or 10**9
    if getattr(network.config, "relative_attention", False):
        positions = 10**9  # DeBERTa's relative positions have no hard end
    elif getattr(network.config, "model_type", "") in ("roberta", "xlm-roberta", "camembert"):
        positions -= 2  # the first two rows are reserved
    return int(min(positions, tokenizer.model_max_length))


def torch_device() -> str:
    """`cuda` where there is one, else `cpu`."""
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def _not_loading(path: str | Path, error: Exception) -> MissingSetup:
    first = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
    return MissingSetup(f"{path}: the weights do not load ({first[:200]}); fetch the whole folder again with `hf download`")


def weights_identity(folder: Path) -> str:
    """A name for the weights in a folder that changes with them: hashed from the small files whole, from large ones
    their size, head and tail (a gigabyte of weights would take seconds)."""
    digest = hashlib.sha256()
    for path in sorted(folder.rglob("*")):
        if path.suffix not in (".json", ".safetensors", ".bin", ".model", ".txt") or not path.is_file():
            continue
        size = path.stat().st_size
        digest.update(f"{path.relative_to(folder)}\x1f{size}\x1f".encode())
        with open(path, "rb") as file:
            digest.update(file.read(1 << 20))
            if size > 2 << 20:
                file.seek(-(1 << 20), os.SEEK_END)
                digest.update(file.read())
    return digest.hexdigest()[:16]


def _cache_folder(cache: str | Path | bool) -> Path | None:
    if cache is False:
        return None
    if cache is True:
        return Path(os.environ.get("ROUTEWRIGHT_CACHE") or Path(__file__).resolve().parents[2] / "data" / "runs" / ".cache")
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
