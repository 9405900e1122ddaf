"""The base model that a trainer starts from: where its weights are, loading them, and the precision to train it in."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from routewright.errors import MissingSetup
from routewright.textfiles import write_json

BASE_MODEL = "microsoft/deberta-v3-base"
BF16_GAIN = 1.1  # a CPU must be this much faster in bf16 before `auto` takes it
BF16_MIN_WIDTH = 256  # below this hidden size the casts cost more than the products save
PROBE_SECONDS = 2.0
PRECISION_FILE = "precision.json"
_WEIGHT_FILES = ["*.json", "*.model", "*.txt", "*.safetensors", "pytorch_model*.bin"]

Say = Callable[[str], None]


@dataclass(frozen=True)
class Base:
    """The base model: its name for router.json, and the folder of its weights (None: build tiny)."""

    name: str
    folder: Path | None


def find_base(model_name: str, say: Say) -> Base:
    """Where the weights are. Only `auto` falls back to tiny; a model asked for by name is found or the run stops.

    Raises MissingSetup within seconds, naming the download command.
    """
    if model_name == "tiny":
        return Base("tiny", None)
    name = BASE_MODEL if model_name == "auto" else model_name
    try:
        return Base(name, fetch_weights(name))
    except MissingSetup as error:
        if model_name != "auto":
            raise MissingSetup(f"{error}; or use --model_name tiny, which is built from your data") from None
        say(f"WARNING: {error}.\nWARNING: going on with `tiny`, a small DeBERTa-v2 trained from nothing on your rows; "
            f"it is no match for {BASE_MODEL}")
        return Base("tiny", None)


def fetch_weights(name: str) -> Path:
    """The folder of weights: local, cached, or downloaded when the hub answers. Raises MissingSetup within seconds."""
    from routewright.encoders import find_weights

    try:
        return find_weights(name)
    except MissingSetup:
        offline = os.environ.get("HF_HUB_OFFLINE", "0").lower() in ("1", "true", "yes", "on")
        if name.startswith((".", "/", "~")) or name.count("/") != 1 or offline or not hub_answers():
            raise
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, allow_patterns=_WEIGHT_FILES))
    except Exception as error:  # noqa: BLE001 - gated, renamed, rate-limited: the cure is the same
        raise MissingSetup(f"{name}: the download failed ({type(error).__name__}); try `hf download {name}`") from None


def hub_answers(seconds: float = 2.0) -> bool:
    """Whether the hub (or the proxy in front of it) takes a connection. The library itself would retry for a minute."""
    import socket
    from urllib.parse import urlsplit

    proxy = os.environ.get("HTTPS_PROXY") or os.environ.get("https_proxy")
    url = urlsplit(proxy or os.environ.get("HF_ENDPOINT", "https://huggingface.co"))
    try:
        port = url.port or {"http": 80}.get(url.scheme, 443)
        with socket.create_connection((url.hostname or "", port), timeout=seconds):
            return True
    except (OSError, ValueError):
        return False


def load_pretrained(folder: Path, settings: dict[str, Any]) -> tuple[Any, Any]:
    """(model, tokenizer) of an encoder folder with a classification head, in float32; `settings` go into its config.

    A head of another size is made anew. Raises MissingSetup when the folder does not load.
    """
    import torch
    from transformers import AutoConfig, AutoModelForSequenceClassification

    from routewright.encoders import load_tokenizer

    tokenizer = load_tokenizer(folder)
    local = {"local_files_only": True, "trust_remote_code": False}
    try:
        config = AutoConfig.from_pretrained(folder, **local)
        for name, value in settings.items():
            setattr(config, name, value)
        model = AutoModelForSequenceClassification.from_pretrained(
            folder, config=config, dtype=torch.float32, ignore_mismatched_sizes=True, **local)
    except (OSError, ValueError, KeyError) as error:
        first = (str(error).splitlines() or [type(error).__name__])[0][:200]
        raise MissingSetup(f"{folder}: the weights do not load as an encoder ({first}); fetch the whole folder "
                           "again") from None
    return model, tokenizer


# --- precision --------------------------------------------------------------------------------------------------------

def choose_precision(asked: str, model: Any, batch: dict[str, Any], run_folder: str | Path, say: Say) -> str:
    """"bf16" or "fp32"; `auto` takes bf16 where the GPU has it, or where this CPU is measured faster on `batch`.

    A measured choice is kept in the run folder, so that a resumed run does not choose anew. Call it on every rank.
    """
    import torch

    if asked != "auto":
        return asked
    if torch.cuda.is_available():
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"
    if model.config.hidden_size < BF16_MIN_WIDTH:
        return "fp32"
    chosen = [_measured(model, batch, Path(run_folder), say) if os.environ.get("RANK", "0") == "0" else ""]
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        from datetime import timedelta

        from accelerate import PartialState

        PartialState(cpu=True, timeout=timedelta(seconds=600))  # what TrainingArguments would start a moment later
        torch.distributed.broadcast_object_list(chosen)
    return chosen[0]


def _measured(model: Any, batch: dict[str, Any], run_folder: Path, say: Say) -> str:
    file = run_folder / PRECISION_FILE
    if file.is_file() and any(run_folder.glob("checkpoint-*")):
        return json.loads(file.read_text())["precision"]
    fp32, bf16 = time_precisions(model, batch)
    chosen = "bf16" if fp32 / bf16 > BF16_GAIN else "fp32"
    say(f"precision: {chosen} (a step took {fp32:.2f} CPU seconds in fp32, {bf16:.2f} in bf16)")
    write_json(file, {"precision": chosen, "fp32_seconds": round(fp32, 4), "bf16_seconds": round(bf16, 4)})
    return chosen


def time_precisions(model: Any, batch: dict[str, Any]) -> tuple[float, float]:
    """CPU seconds of one forward and backward pass in (fp32, bf16); model and random state are left as found."""
    import torch

    best = {False: float("inf"), True: float("inf")}
    state = torch.random.get_rng_state()
    model.train()
    end = time.perf_counter() + PROBE_SECONDS
    for trial in range(6):
        if trial >= 2 and time.perf_counter() > end:
            break
        for low in best:
            start = time.process_time()
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=low):
                loss = model(**batch).logits.float().square().mean()
            loss.backward()
            best[low] = min(best[low], time.process_time() - start)
    model.zero_grad(set_to_none=True)
    torch.random.set_rng_state(state)
    return best[False], best[True]


def median_rows(rows: Sequence[dict[str, Any]], count: int) -> list[dict[str, Any]]:
    """`count` rows of about median length, without their labels: what a precision is timed on."""
    ordered = sorted(rows, key=lambda row: len(row["input_ids"]))
    start = max(0, (len(ordered) - count) // 2)
    return [{k: v for k, v in row.items() if k != "labels"} for row in ordered[start:start + count]]
