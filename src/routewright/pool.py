"""The pool: models with dated prices, and the one place where tokens become dollars.

A pool file (configs/pools/*.yaml):

    name: sample
    prices_dated: 2026-11-20
    models:
      - {name: cheap, price_input: 0.10, price_output: 0.40}

Prices are USD per million tokens. Every key is checked, because a misspelt price would silently cost nothing.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from datetime import date
from pathlib import Path
from typing import Any

from routewright.errors import UserError
from routewright.schema import ModelSpec, TokenUsage
from routewright.textfiles import check_keys, nearest, read_yaml

CHARACTERS_PER_TOKEN = 4.0  # the usual rule of thumb for English; only for sources that recorded no tokens
TIERS = ("premium", "standard", "budget", "specialized")
_MODEL_KEYS = tuple(f.name for f in fields(ModelSpec))


@dataclass(frozen=True)
class Pool:
    """Models in the order of the file. `cheap` and `strong` are the ends of the price order."""

    name: str
    models: tuple[ModelSpec, ...]
    prices_dated: str = ""
    source: str = ""  # where it was read from, for messages

    @classmethod
    def load(cls, path: str | Path) -> Pool:
        """Read a pool file. Raises UserError naming the file and the key."""
        raw = read_yaml(path)
        check_keys(raw, ("name", "models"), ("prices_dated",), str(path))
        if not isinstance(raw["models"], list) or not raw["models"]:
            raise UserError(f"{path}: `models` must be a list with at least one model")
        models = tuple(model_from_entry(entry, f"{path}: models[{i}]") for i, entry in enumerate(raw["models"]))
        names = [m.name for m in models]
        twice = sorted({n for n in names if names.count(n) > 1})
        if twice:
            raise UserError(f"{path}: model {twice[0]!r} stands twice; keep one entry per name")
        dated = raw.get("prices_dated", "")
        if dated and not isinstance(dated, date):
            raise UserError(f"{path}: prices_dated: {dated!r} is no date; write it as 2026-11-20")
        return cls(str(raw["name"]), models, str(dated), str(path))

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(m.name for m in self.models)

    def __getitem__(self, name: str) -> ModelSpec:
        for model in self.models:
            if model.name == name:
                return model
        raise UserError(f"model {name!r} has no price in pool {self.name!r} ({self.source or 'built in code'})"
                        f"{nearest(name, self.names)}; add it there with price_input and price_output")

    def subset(self, names: Iterable[str]) -> Pool:
        """The same prices for these models only, in this order. Unknown names raise UserError."""
        return Pool(self.name, tuple(self[n] for n in names), self.prices_dated, self.source)

    def by_price(self) -> tuple[str, ...]:
        """Names from cheapest to dearest, by price_input + price_output; ties keep the file's order."""
        return tuple(m.name for m in sorted(self.models, key=lambda m: m.price_input + m.price_output))

    def cost(self, name: str, usage: TokenUsage) -> float:
        """Dollars of one call: tokens / 1e6 x price. Cached input falls back to the full input price, reasoning
        to the output price, so that nothing is free by omission."""
        model = self[name]
        cached_price = model.price_input if model.price_cached is None else model.price_cached
        reasoning_price = model.price_output if model.price_reasoning is None else model.price_reasoning
        return ((usage.input - usage.cached) * model.price_input + usage.cached * cached_price
                + usage.output * model.price_output + usage.reasoning * reasoning_price) / 1e6


def estimate_tokens(characters: int | float) -> int:
    """Tokens for a text whose tokens nobody recorded: characters / 4, at least 1 for a non-empty text."""
    return max(1, round(characters / CHARACTERS_PER_TOKEN)) if characters > 0 else 0


def price_per_call(model: ModelSpec, input_tokens: Any, output_tokens: Any) -> Any:
    """Dollars for arrays or numbers of tokens, without caching or reasoning. Used for expected cost."""
    return (input_tokens * model.price_input + output_tokens * model.price_output) / 1e6


def model_from_entry(entry: Any, where: str) -> ModelSpec:
    """One checked model of a pool file or of a router's card. Raises UserError that starts with `where`."""
    if not isinstance(entry, dict):
        raise UserError(f"{where}: expected a mapping with name, price_input, price_output; got {entry!r}")
    check_keys(entry, ("name", "price_input", "price_output"), _MODEL_KEYS, where)
    entry = dict(entry)
    if not isinstance(entry["name"], (str, int)) or not str(entry["name"]).strip():
        raise UserError(f"{where}: name must be a text that is not empty; got {entry['name']!r}")
    entry["name"] = str(entry["name"])
    where = f"{where} ({entry['name']})"
    for key in ("price_input", "price_output", "price_cached", "price_reasoning"):
        if entry.get(key) is None:
            continue
        value = entry[key]
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value) or value < 0:
            raise UserError(f"{where}: {key} must be USD per million tokens, 0 or more; got {value!r}")
        entry[key] = float(value)
    for key in ("tiers", "capabilities"):
        value = entry.get(key, ())
        if isinstance(value, str):
            value = (value,)
        if not isinstance(value, Sequence):
            raise UserError(f"{where}: {key} must be a list; got {value!r}")
        entry[key] = tuple(str(v) for v in value)
    unknown = [t for t in entry["tiers"] if t not in TIERS]
    if unknown:
        raise UserError(f"{where}: tier {unknown[0]!r} is not one of {', '.join(TIERS)}")
    for key in ("context_window", "max_output_tokens"):
        value = entry.get(key)
        if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
            raise UserError(f"{where}: {key} must be a whole number of tokens; got {value!r}")
    for key in ("litellm_id", "path", "description"):
        if entry.get(key) is not None and not isinstance(entry[key], str):
            raise UserError(f"{where}: {key} must be text; got {entry[key]!r}")
    return ModelSpec(**entry)
