"""Turning prompts into vectors, and loading weights and tokenizers without surprises.

Three rules hold for everything loaded here. Weights come from a folder or from the local Hugging Face cache: nothing
is ever downloaded, so a missing model is reported within seconds instead of after a network time-out. No code that
lies beside weights is executed. A tokenizer is tried on a probe sentence before it is handed out, because
transformers 5 returns an empty one without any error when its vocabulary file is missing.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from routewright.errors import MissingSetup

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PROBE = "What is 2 + 2?"
SMALLEST_VOCABULARY = 16  # a blank tokenizer holds 5 to 7 special tokens
MOST_UNKNOWN = 0.5  # share of unknown tokens on the probe above which the vocabulary cannot be the right one
_COMPARED = ("model", "normalizer", "pre_tokenizer")  # what decides how a text is cut


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
