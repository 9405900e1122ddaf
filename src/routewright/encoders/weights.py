"""Finding and loading pretrained weights and tokenizers without surprises.

Three rules hold for everything loaded here. Weights come from a folder or from the local Hugging Face cache: nothing
is ever downloaded, so a missing model is reported within seconds instead of after a network time-out. No code that
lies beside weights is executed. A tokenizer is tried on a probe sentence before it is handed out, because
transformers 5 returns an empty one without any error when its vocabulary file is missing.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
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
    if text.startswith((".", "/", "~")) or text.count("/") > 1 or not text:
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


def load_encoder(path: str | Path) -> tuple[Any, PreTrainedTokenizerBase]:
    """(network, tokenizer) of a pretrained encoder, in eval mode, on the GPU where there is one.

    Raises MissingSetup when the folder does not load or lacks weights.
    """
    folder = find_weights(path)
    tokenizer = load_tokenizer(folder)
    from transformers import AutoModel

    try:
        with quiet_loading():
            network, report = AutoModel.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False,
                                                        output_loading_info=True)
    except (OSError, ValueError, ImportError, RuntimeError) as error:
        raise not_loading(path, error) from None
    fresh = [key for key in report["missing_keys"] if "pooler" not in key]  # we pool ourselves
    if fresh:
        raise MissingSetup(f"{path}: {len(fresh)} weights are missing from the file (first: {sorted(fresh)[0]}), so "
                           "parts of the encoder would be random; fetch the whole folder again")
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


def not_loading(path: str | Path, error: Exception) -> MissingSetup:
    """The message for weights that a library could not load."""
    first = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
    return MissingSetup(f"{path}: the weights do not load ({first[:200]}); fetch the whole folder again with "
                        "`hf download`")


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
