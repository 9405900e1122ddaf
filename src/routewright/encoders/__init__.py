"""Turning prompts into vectors: TF-IDF or pretrained sentence encoders, behind one contract."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

from routewright.encoders.base import Encoder, surface_numbers
from routewright.encoders.sentences import DEFAULT_ENCODER, TextEncoder
from routewright.encoders.tfidf import TfidfEncoder
from routewright.encoders.weights import (
    find_weights,
    load_encoder,
    load_tokenizer,
    longest_input,
    quiet_loading,
    torch_device,
    weights_identity,
)
from routewright.errors import UserError
from routewright.textfiles import nearest

__all__ = ["DEFAULT_ENCODER", "Encoder", "TextEncoder", "TfidfEncoder", "find_weights", "load_encoder",
           "load_tokenizer", "longest_input", "make_encoder", "quiet_loading", "surface_numbers", "torch_device",
           "weights_identity"]


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
