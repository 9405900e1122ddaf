"""What the cheap model shows of a prompt before it answers: hidden states, and a cache for whatever is read off it.

A `PromptReader` reads numbers off prompts with a base model and keeps them on disk under the hash of the prompt, so
that several seeds and routers share one forward pass, and a stopped run loses one batch. `StateReader` reads the hidden
states: one vector per layer (the embeddings first), each the mean over the prompt's tokens, as CoBench does. Tokens and
layers of a prompt are reduced inside its batch; (N, T, L, D) is never held.

Prompts of like length share a batch, padded on the right: under causal attention no token sees what comes after it, so
a state does not depend on the company a prompt keeps.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from routewright.errors import MissingSetup, UserError
from routewright.language_models import ADAPTER_CARD, adapter_base, batches, find_folder
from routewright.templates import WRAPS, Template
from routewright.textfiles import write_atomic

if TYPE_CHECKING:
    from routewright.pool import Pool

PRECISIONS = ("auto", "fp32", "bf16")
MAX_LENGTH = 1024  # tokens of a prompt, CoBench's limit
_REPOSITORY = Path(__file__).resolve().parents[2]
_MERGE_BYTES = 256 << 20  # blocks are merged into files of about this size when a reading is complete
_MOST_MODELS = 2  # base models kept in memory at once

log = logging.getLogger(__name__)


# ---------------------------------------------------------------- the base model

def cheap_model(pool: Pool | None) -> tuple[str, str]:
    """(name, weights folder) of the pool's cheapest model. Raises UserError where it has no `path`."""
    if pool is None:
        raise UserError("no pool is known, so the cheap model is not known either; give `base`, a weights folder or "
                        "hub id")
    name = pool.by_price()[0]
    path = pool[name].path
    if not path:
        raise UserError(f"{pool.source or pool.name}: {name!r}, the cheapest model, has no `path` to its weights; give "
                        "the router a `base`, a weights folder or hub id of a model that stands for it")
    beside = Path(pool.source).parent / path if pool.source else Path(path)
    return name, _portable(beside if beside.is_dir() or path.startswith(".") else Path(path))


def _portable(path: Path) -> str:
    """A path as router.json keeps it: relative to the working folder where it lies below it."""
    if path.is_dir() and path.resolve().is_relative_to(Path.cwd()):
        return path.resolve().relative_to(Path.cwd()).as_posix()
    return path.as_posix()


def base_shape(folder: Path) -> tuple[int, int]:
    """(layers with the embeddings, hidden size) from the config of a weights or adapter folder; nothing is loaded."""
    folder = adapter_base(folder) if (folder / ADAPTER_CARD).is_file() else folder
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        config = config.get("text_config") or config
        layers, width = (config.get(name, config.get(old)) for name, old in
                         (("num_hidden_layers", "n_layer"), ("hidden_size", "n_embd")))
        return int(layers) + 1, int(width)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise MissingSetup(f"{folder}: config.json says no num_hidden_layers and hidden_size "
                           f"({type(error).__name__}); a base is the folder of a causal language model") from None


def open_base(folder: Path, precision: str) -> tuple[Any, Any]:
    """(model, tokenizer), loaded once per process: routers and seeds share them."""
    key = (str(folder), precision)
    if key not in _OPEN:
        from routewright.language_models import load_causal

        while len(_OPEN) >= _MOST_MODELS:
            del _OPEN[next(iter(_OPEN))]
        _OPEN[key] = load_causal(folder, dtype=precision)
    return _OPEN[key]


_OPEN: dict[tuple[str, str], tuple[Any, Any]] = {}


def choose_precision(asked: str) -> str:
    """"fp32" or "bf16"; auto takes bf16 where a GPU has it. Raises UserError."""
    if asked not in PRECISIONS:
        raise UserError(f"precision must be one of {', '.join(PRECISIONS)}; got {asked!r}")
    if asked != "auto":
        return asked
    import torch

    cuda = torch.cuda.is_available() and torch.cuda.is_bf16_supported(including_emulation=False)
    return "bf16" if cuda else "fp32"


def find_wrap(asked: str, folder: Path) -> str:
    """`asked`, or for auto `chat` where the tokenizer of the folder has a chat template, else `none`: the bare text.

    Read from the files, so that the name of a reading is known before anything is loaded.
    """
    if asked not in ("auto", *WRAPS):
        raise UserError(f"wrap must be one of auto, {', '.join(WRAPS)}; got {asked!r}")
    if asked != "auto":
        return asked
    folder = adapter_base(folder) if (folder / ADAPTER_CARD).is_file() else folder
    config = folder / "tokenizer_config.json"
    inside = config.is_file() and '"chat_template"' in config.read_text(encoding="utf-8", errors="replace")
    return "chat" if inside or (folder / "chat_template.jinja").is_file() else "none"


def _chat_form(folder: Path) -> str:
    """A mark of the chat template where it lies in a file of its own, which the mark of the weights passes over."""
    folder = adapter_base(folder) if (folder / ADAPTER_CARD).is_file() else folder
    file = folder / "chat_template.jinja"
    return hashlib.sha256(file.read_bytes()).hexdigest()[:12] if file.is_file() else ""


def _mark(*parts: str) -> str:
    return hashlib.sha256("\x1f".join(parts).encode()).hexdigest()[:16]


# ---------------------------------------------------------------- reading with a cache

class PromptReader:
    """Numbers read off prompts by a base model: `read(texts) -> (N, *shape)`, kept on disk per prompt.

    Args:
        base: weights folder, adapter folder, or hub id in the local cache
        wrap: none, the bare text; chat, inside the tokenizer's chat template; auto, chat where there is one
        max_length: tokens kept of a prompt, its wrapping included; its end is cut
        precision: fp32, bf16, or auto (bf16 on a GPU that has it)
        cache: folder of the cache, True for data/runs/.cache, False for none

    After a reading, `seconds_per_text` is what it takes per text, whether it came from the cache or not, and
    `spent_per_text` what this process waited, loading the base model included; `fresh` counts the texts that were not
    in the cache.
    """

    what = ""  # names the reading in the cache

    def __init__(self, base: str, *, wrap: str = "none", max_length: int = MAX_LENGTH, batch_size: int = 32,
                 precision: str = "auto", cache: str | Path | bool = True) -> None:
        from routewright.encoders import weights_identity

        self.base, self.max_length, self.batch_size = base, max_length, batch_size
        self.folder = find_folder(base)
        self.wrap = find_wrap(wrap, self.folder)
        self.precision = choose_precision(precision)
        self.weights = weights_identity(self.folder)
        if (self.folder / ADAPTER_CARD).is_file():  # other weights below an adapter read otherwise
            self.weights = _mark(self.weights, weights_identity(adapter_base(self.folder)))
        self.seconds_per_text = self.spent_per_text = 0.0
        self.fresh = 0
        options = "-".join(str(part) for part in (self.wrap, max_length, self.precision, *self._more()))
        if self.wrap == "chat":
            options += _chat_form(self.folder)
        mark = hashlib.sha256(f"{self.what} {options}".encode()).hexdigest()[:12]
        self._cache = _BlockCache(cache_folder(cache), f"{self.what}-{self.weights}-{mark}")

    def read(self, texts: Sequence[str]) -> np.ndarray:
        """(N, *shape), in the order of `texts`. Equal texts are read once."""
        began = time.perf_counter()
        texts = [text.encode("utf-8", "replace").decode() for text in texts]  # half a surrogate pair is no text
        keys = [hashlib.sha256(text.encode()).digest() for text in texts]
        missing = {key: text for key, text in zip(keys, texts, strict=True) if key not in self._cache}
        self.fresh = len(missing)
        loading = 0.0
        if missing:
            model, tokenizer = self.open()
            loading = time.perf_counter() - began
            self._read_missing(model, tokenizer, missing)
        values, seconds = self._cache.rows(keys)
        self.spent_per_text = (time.perf_counter() - began) / max(1, len(texts))
        spared = sum(took for key, took in zip(keys, seconds, strict=True) if key not in missing)
        # Loading the weights is no prompt's overhead.
        self.seconds_per_text = self.spent_per_text + (spared - loading) / max(1, len(texts))
        return values

    def open(self) -> tuple[Any, Any]:
        """The base model and its tokenizer."""
        return open_base(self.folder, self.precision)

    def _read_missing(self, model: Any, tokenizer: Any, missing: dict[bytes, str]) -> None:
        keys, rows = list(missing), self._encode(tokenizer, model, list(missing.values()))
        done, told = 0, time.monotonic()
        for index in batches([len(row) for row in rows], self.batch_size):
            wall, cpu = time.perf_counter(), time.process_time()
            values = self._compute(model, tokenizer, [missing[keys[i]] for i in index], [rows[i] for i in index])
            wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
            # The figure outlives this run, so a machine that was busy with other work must not inflate it.
            took = wall if next(model.parameters()).is_cuda else min(wall, cpu)
            self._cache.add([keys[i] for i in index], values, took / len(index))
            done += len(index)
            if time.monotonic() - told > 15 and os.environ.get("RANK", "0") == "0":
                told = time.monotonic()
                print(f"read {done} of {len(keys)} prompts ({self.what}) with {self.base}", file=sys.stderr, flush=True)
        self._cache.merge()

    def _more(self) -> tuple[Any, ...]:
        """Further options that shape the values."""
        return ()

    def _encode(self, tokenizer: Any, model: Any, texts: list[str]) -> list[list[int]]:
        """Token ids of each text, at least one."""
        return encode(tokenizer, texts, self.wrap, self._longest(model, tokenizer))

    def _longest(self, model: Any, tokenizer: Any) -> int:
        from routewright.encoders import longest_input

        return min(self.max_length, longest_input(model, tokenizer))

    def _compute(self, model: Any, tokenizer: Any, texts: list[str], rows: list[list[int]]) -> np.ndarray:
        """(B, *shape) of one batch."""
        raise NotImplementedError


def encode(tokenizer: Any, texts: Sequence[str], wrap: str, max_length: int) -> list[list[int]]:
    """Token ids of each wrapped prompt, at least one and at most `max_length`: only the prompt's own end is ever cut.

    Raises UserError for the chat wrap where the tokenizer has no chat template.
    """
    from routewright.language_models import choose_wrap, encode_instructions

    bare = Template("difficulty", ("base",), "bare")
    # One more than may be: a place is kept for an answer, which nobody gives here.
    return encode_instructions(tokenizer, bare, choose_wrap(wrap, tokenizer), list(texts), max_length + 1)


class StateReader(PromptReader):
    """Hidden states: `read(texts) -> (N, L + 1, D)`, per layer the mean over the prompt's tokens. Embeddings first,
    the last layer after the model's final norm."""

    what = "states"

    def _compute(self, model: Any, tokenizer: Any, texts: list[str], rows: list[list[int]]) -> np.ndarray:
        import torch

        inner = model.get_base_model() if hasattr(model, "get_base_model") else model  # below an adapter's wrapper
        trunk = inner.base_model  # without the language-model head, so that no (B, T, vocabulary) is made
        width = max(len(row) for row in rows)
        ids = torch.full((len(rows), width), tokenizer.pad_token_id or 0)
        mask = torch.zeros_like(ids)
        for i, row in enumerate(rows):
            ids[i, :len(row)] = torch.tensor(row)
            mask[i, :len(row)] = 1
        ids, mask = ids.to(inner.device), mask.to(inner.device)
        share = (mask / mask.sum(1, keepdim=True)).unsqueeze(1).float()  # (B, 1, T)
        means: list[Any] = []  # one (B, D) a layer

        def keep(hidden: Any) -> None:
            means.append(torch.bmm(share, hidden.float())[:, 0])

        def keep_input(_: Any, args: tuple, named: dict[str, Any]) -> None:
            keep(args[0] if args else named["hidden_states"])

        # A layer's states are reduced as they pass into the next one, so that those of one layer are held, not of all.
        blocks = getattr(trunk, "layers", None) or ()
        hooks = [block.register_forward_pre_hook(keep_input, with_kwargs=True) for block in blocks]
        try:
            with torch.inference_mode():
                out = trunk(input_ids=ids, attention_mask=mask, use_cache=False, output_hidden_states=not hooks)
                for hidden in (out.last_hidden_state,) if hooks else out.hidden_states:
                    keep(hidden)
        finally:
            for hook in hooks:
                hook.remove()
        return torch.stack(means, dim=1).cpu().numpy()


# ---------------------------------------------------------------- the cache on disk

def cache_folder(cache: str | Path | bool) -> Path | None:
    """Where readings are kept: `cache`, or for True ROUTEWRIGHT_CACHE or data/runs/.cache; None for False."""
    if cache is False:
        return None
    if cache is True:
        return Path(os.environ.get("ROUTEWRIGHT_CACHE") or _REPOSITORY / "data" / "runs" / ".cache")
    return Path(cache)


class _BlockCache:
    """Rows by the hash of their text, in blocks: a file per batch, merged when a reading is complete.

    A sentence's vector fits the single file of the embedding cache; the states of all layers of a thousand prompts are
    hundreds of megabytes, which cannot be written anew at each batch. Blocks are read when their rows are asked for.
    Damaged files are passed over with a warning, and what they held is read anew.
    """

    def __init__(self, folder: Path | None, identity: str) -> None:
        self._folder = None if folder is None else folder / identity
        self._where: dict[bytes, tuple[Any, int]] = {}  # key -> (file, or the block itself without a folder; row)
        self._seconds: dict[bytes, float] = {}
        for file in sorted(self._folder.glob("*.safetensors")) if self._folder and self._folder.is_dir() else ():
            self._index(file)

    def __contains__(self, key: bytes) -> bool:
        return key in self._where

    def add(self, keys: Sequence[bytes], values: np.ndarray, seconds: float) -> None:
        """Keep the rows of a batch, on disk at once."""
        values = np.ascontiguousarray(values)
        if not np.isfinite(values).all():
            raise UserError("the base model gives values that are no numbers; its weights are damaged, or it needs "
                            "precision fp32")
        block = values if self._folder is None else self._write(keys, values, np.full(len(keys), seconds, np.float32))
        for row, key in enumerate(keys):
            self._where[key], self._seconds[key] = (block, row), seconds

    def rows(self, keys: Sequence[bytes]) -> tuple[np.ndarray, list[float]]:
        """(N, *shape) and the seconds that each row once took."""
        self._find_again(keys)
        wanted: dict[int, tuple[Any, list[int], list[int]]] = {}
        for place, key in enumerate(keys):
            block, row = self._where[key]
            _, places, rows = wanted.setdefault(id(block), (block, [], []))
            places.append(place)
            rows.append(row)
        found: np.ndarray | None = None
        for block, places, rows in wanted.values():
            values = _load_rows(block, rows) if isinstance(block, Path) else block[rows]
            if found is None:
                found = np.empty((len(keys), *values.shape[1:]), values.dtype)
            found[places] = values
        return np.zeros((0, 1), np.float32) if found is None else found, [self._seconds[key] for key in keys]

    def _find_again(self, keys: Sequence[bytes]) -> None:
        """Look the folder through once more where a block was merged away by another process."""
        blocks = {id(block): block for block, _ in (self._where[key] for key in keys)}.values()
        gone = [block for block in blocks if isinstance(block, Path) and not block.is_file()]
        if not gone:
            return
        lost = [key for key, (block, _) in self._where.items() if block in gone]
        for key in lost:
            del self._where[key]
        for file in sorted(self._folder.glob("*.safetensors")):
            self._index(file)
        if any(key not in self._where for key in keys):
            raise MissingSetup(f"{gone[0]}: this block of the cache of readings was deleted meanwhile; run the command "
                               "again, its prompts are read anew")

    def merge(self) -> None:
        """Put the small blocks of this folder together; blocks that another process wrote stay as they are."""
        small: dict[Path, list[bytes]] = {}
        for key, (block, _) in self._where.items():
            if isinstance(block, Path) and block.name.startswith("batch-"):
                small.setdefault(block, []).append(key)
        group: list[Path] = []
        size = 0
        for file in [*small, None]:
            if group and (file is None or size + file.stat().st_size > _MERGE_BYTES):
                if len(group) > 1:
                    self._merge_files(group, small)
                group, size = [], 0
            if file is not None:
                group.append(file)
                size += file.stat().st_size

    def _merge_files(self, files: list[Path], members: dict[Path, list[bytes]]) -> None:
        keys = [key for file in files for key in members[file]]
        values, seconds = self.rows(keys)
        merged = self._write(keys, values, np.array(seconds, np.float32), "block")
        for row, key in enumerate(keys):
            self._where[key] = (merged, row)
        for file in files:
            if file != merged:
                file.unlink(missing_ok=True)

    def _write(self, keys: Sequence[bytes], values: np.ndarray, seconds: np.ndarray, kind: str = "batch") -> Path:
        from safetensors.numpy import save

        marks = np.frombuffer(b"".join(keys), np.uint8).reshape(-1, 32).copy()
        name = f"{kind}-{hashlib.sha256(marks.tobytes()).hexdigest()[:16]}.safetensors"
        return write_atomic(self._folder / name, save({"keys": marks, "values": values, "seconds": seconds}))

    def _index(self, file: Path) -> None:
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(str(file), "numpy") as stored:
                keys, seconds = stored.get_tensor("keys"), stored.get_tensor("seconds")
                if keys.shape != (len(seconds), 32) or stored.get_slice("values").get_shape()[0] != len(seconds):
                    raise ValueError("its parts differ in length")
        except (SafetensorError, OSError, ValueError) as error:
            log.warning("%s: the cache of readings is damaged (%s); those prompts are read again", file, error)
            file.unlink(missing_ok=True)
            return
        for row, key in enumerate(keys):
            self._where[key.tobytes()] = (file, row)
            self._seconds[key.tobytes()] = float(seconds[row])


def _load_rows(file: Path, rows: list[int]) -> np.ndarray:
    """These rows of a block; a few of many are read one by one."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(str(file), "numpy") as stored:
            part = stored.get_slice("values")
            if len(rows) * 4 < part.get_shape()[0]:
                return np.concatenate([part[row:row + 1] for row in rows])
            return stored.get_tensor("values")[rows]
    except (SafetensorError, OSError) as error:
        raise MissingSetup(f"{file}: this block of the cache of readings is damaged ({error}); delete it and run the "
                           "command again, its prompts are read anew") from None
