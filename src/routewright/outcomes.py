"""The outcome cache: every answer of every model, read, checked, written, and seen as one dense table.

A cache is a file of JSON lines (`.jsonl`, `.jsonl.gz`), a Parquet file, or a folder that holds one of them as
`outcomes.*` beside the `pool.yaml` with its prices. `OutcomeTable` is what rulers, routers and evaluation see.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from routewright.errors import UserError
from routewright.pool import Pool
from routewright.schema import OUTCOME_FIELDS, USAGE_FIELDS, Outcome, Prompt, TokenUsage
from routewright.textfiles import nearest, read_jsonl, write_atomic, write_jsonl

NAMES = ("outcomes.jsonl.gz", "outcomes.jsonl", "outcomes.parquet")
SPLITS = ("train", "dev", "test")
MOST_TOKENS = 1 << 53  # of one call; more is no count, and would not fit an array
_TEXT = ("prompt_id", "prompt", "model_name", "response", "task", "group", "split", "context", "finish_reason",
         "error", "grader")
_NUMBERS = ("cost_usd", "latency_s", "logprob_mean", "logprob_min")


def cache_file(path: str | Path) -> Path:
    """The file of a cache given as a file or a folder. Raises UserError."""
    path = Path(path)
    if path.is_dir():
        for name in NAMES:
            if (path / name).is_file():
                return path / name
        raise UserError(f"{path}: no outcome cache in this folder; expected one of {', '.join(NAMES)}")
    if not path.exists():
        beside = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
        raise UserError(f"{path}: no such outcome cache{nearest(path.name, beside)}; "
                        "import_outcomes.py or build_cache.py writes one")
    return path


def read_outcomes(path: str | Path) -> list[Outcome]:
    """All outcomes of a cache, every row checked. Raises UserError with the file and the line of the first bad row."""
    path = cache_file(path)
    if path.suffix == ".parquet":
        rows: Iterable[tuple[int, dict[str, Any]]] = _parquet_rows(path)
    else:
        rows = read_jsonl(path)
    return [outcome_from_row(row, f"{path}:{line}") for line, row in rows]


def _parquet_rows(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    import pyarrow as arrow
    import pyarrow.parquet as parquet

    try:
        table = parquet.read_table(path)
    except (arrow.ArrowInvalid, OSError) as error:
        raise UserError(f"{path}: not a readable Parquet file ({error}); write it again") from None
    for line, row in enumerate(table.to_pylist(), 1):
        reference = row.get("reference")
        if isinstance(reference, str):
            row["reference"] = json.loads(reference)
        if row.get("token_usage"):
            row["token_usage"] = {k: v for k, v in row["token_usage"].items() if v is not None}
        yield line, {k: v for k, v in row.items() if v is not None}


def outcome_from_row(row: dict[str, Any], where: str) -> Outcome:
    """One checked outcome of one row. `where` is file:line for the message. Raises UserError."""
    for key in row:
        if key not in OUTCOME_FIELDS:
            raise UserError(f"{where}: unknown field {key!r}{nearest(key, OUTCOME_FIELDS)}; "
                            "other shapes come in through import_outcomes.py")
    for key in ("prompt_id", "prompt", "model_name"):
        if not isinstance(row.get(key), str) or not row[key].strip():
            seen = f"got {row[key]!r}" if key in row else "the field is missing"
            raise UserError(f"{where}: {key} must be a non-empty text; {seen}")
    for key in _TEXT:
        if key in row and not isinstance(row[key], str):
            raise UserError(f"{where}: {key} must be text; got {row[key]!r}")
    for key in _NUMBERS:
        value = row.get(key)
        if value is None:
            continue
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
            raise UserError(f"{where}: {key} must be a finite number; got {value!r}")
        if key in ("cost_usd", "latency_s") and value < 0:
            raise UserError(f"{where}: {key} must not be negative; got {value!r}")
    quality, correct = row.get("quality"), row.get("is_correct")
    if correct is not None and not isinstance(correct, bool):
        raise UserError(f"{where}: is_correct must be true or false; got {correct!r}")
    if quality is None and correct is not None:
        quality = float(correct)
    if quality is not None and (isinstance(quality, bool) or not isinstance(quality, (int, float))
                                or not 0.0 <= quality <= 1.0):
        raise UserError(f"{where}: quality must be a number from 0 to 1; got {quality!r}")
    sample = row.get("sample", 0)
    if isinstance(sample, bool) or not isinstance(sample, int) or sample < 0:
        raise UserError(f"{where}: sample must be a whole number, 0 for the greedy call; got {sample!r}")
    if row.get("split", "") not in ("", *SPLITS):
        raise UserError(f"{where}: split must be train, dev, test or empty; got {row['split']!r}")
    return Outcome(**{**row, "quality": None if quality is None else float(quality),
                      "token_usage": _usage(row.get("token_usage"), where)})


def _usage(raw: Any, where: str) -> TokenUsage:
    if raw is None:
        return TokenUsage()
    if not isinstance(raw, dict):
        raise UserError(f"{where}: token_usage must be an object such as {{\"input\": 12, \"output\": 3}}; got {raw!r}")
    for key, value in raw.items():
        if key not in USAGE_FIELDS:
            raise UserError(f"{where}: token_usage has an unknown key {key!r}{nearest(key, USAGE_FIELDS)}")
        if key == "estimated":
            if not isinstance(value, bool):
                raise UserError(f"{where}: token_usage.estimated must be true or false; got {value!r}")
        elif isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < MOST_TOKENS:
            raise UserError(f"{where}: token_usage.{key} must be a whole number of tokens; got {value!r}")
    usage = TokenUsage(**raw)
    if usage.cached > usage.input:
        raise UserError(f"{where}: token_usage.cached ({usage.cached}) is part of input ({usage.input}) and cannot "
                        "exceed it")
    return usage


def write_outcomes(path: str | Path, outcomes: Sequence[Outcome]) -> Path:
    """Write a cache file whole or not at all; equal outcomes give equal bytes. The suffix picks the format.

    A folder gets `outcomes.jsonl.gz`.
    """
    path = Path(path)
    if path.is_dir() or not path.suffix:
        path = path / NAMES[0]
    if path.suffix != ".parquet":
        return write_jsonl(path, (o.as_row() for o in outcomes))
    import pyarrow as arrow
    import pyarrow.parquet as parquet

    rows = []
    for outcome in outcomes:
        row = outcome.as_row()
        if "reference" in row:  # any JSON value: one column type for all of them
            row["reference"] = json.dumps(row["reference"], ensure_ascii=False)
        if not row["token_usage"]:
            del row["token_usage"]
        rows.append(row)
    columns = [name for name in OUTCOME_FIELDS if any(name in row for row in rows)]
    rows = [{name: row.get(name) for name in columns} for row in rows]  # Arrow takes its columns from the first row
    return write_atomic(path, lambda file: parquet.write_table(arrow.Table.from_pylist(rows), file, compression="zstd"))


def fingerprint(outcomes: Iterable[Outcome]) -> str:
    """16 hexadecimal digits that change with any recorded outcome, and not with the order of the rows."""
    total = 0
    for outcome in outcomes:
        row = json.dumps(outcome.as_row(), sort_keys=True, ensure_ascii=False).encode("utf-8", "backslashreplace")
        total = (total + int.from_bytes(hashlib.sha256(row).digest()[:16], "big")) % (1 << 128)
    return f"{total:032x}"[:16]


@dataclass
class OutcomeTable:
    """The dense view of a cache: N prompts (rows) by M models (columns, in pool order).

    quality         (N, M) in [0, 1], of sample 0
    cost            (N, M) USD of that call, from its tokens and the pool's prices, or the money the source recorded
    latency         (N, M) seconds, nan where nobody recorded it
    input_tokens    (N, M)
    output_tokens   (N, M), reasoning included
    quality_mean    (N, M) mean over all recorded samples: the soft labels trainers use
    estimated       whether any token count was derived from characters; reports say so
    money_recorded  (N, M) USD the source recorded, nan elsewhere; repricing leaves it alone
    """

    prompts: list[Prompt]
    models: tuple[str, ...]
    pool: Pool
    quality: np.ndarray
    cost: np.ndarray
    latency: np.ndarray
    input_tokens: np.ndarray
    output_tokens: np.ndarray
    quality_mean: np.ndarray
    estimated: bool
    fingerprint: str
    responses: list[dict[str, str]] | None = None
    reasoning_tokens: np.ndarray | None = None
    cached_tokens: np.ndarray | None = None
    money_recorded: np.ndarray | None = None

    @classmethod
    def load(cls, path: str | Path, pool: Pool | str | Path | None = None,
             models: Sequence[str] | None = None) -> OutcomeTable:
        """Read a cache. `pool` defaults to the pool.yaml beside it; `models` picks and orders columns."""
        file = cache_file(path)
        if pool is None:
            pool = file.parent / "pool.yaml"
            if not pool.is_file():
                raise UserError(f"{file}: there is no pool.yaml beside it, so nothing has a price; "
                                "name a pool file with --pool configs/pools/NAME.yaml")
        if not isinstance(pool, Pool):
            pool = Pool.load(pool)
        return cls.from_outcomes(read_outcomes(file), pool, models, source=str(file))

    @classmethod
    def from_outcomes(cls, outcomes: Sequence[Outcome], pool: Pool, models: Sequence[str] | None = None,
                      source: str = "the cache") -> OutcomeTable:
        """Lay outcomes out densely.

        Without `models` the columns are the pool's models that the cache holds, in pool order. Raises UserError when
        a model has no price, when a (prompt, model) pair is missing or stands twice, or when one is not graded.
        """
        if not outcomes:
            raise UserError(f"{source}: no outcomes")
        recorded = dict.fromkeys(o.model_name for o in outcomes)
        if models is None:
            for name in recorded:
                pool[name]  # raises with the cure where a recorded model has no price
            models = [name for name in pool.names if name in recorded]
        for name in models:
            if name not in recorded:
                raise UserError(f"{source}: model {name!r} was never recorded{nearest(name, recorded)}; "
                                f"recorded: {', '.join(recorded)}")
        pool = pool.subset(models)
        column = {name: i for i, name in enumerate(models)}
        rows: dict[str, int] = {}
        prompts: list[Prompt] = []
        first: dict[tuple[int, int], Outcome] = {}
        samples: dict[tuple[int, int], dict[int, float]] = defaultdict(dict)
        for outcome in outcomes:
            if outcome.model_name not in column:
                continue
            row = rows.setdefault(outcome.prompt_id, len(prompts))
            if row == len(prompts):
                prompts.append(outcome.as_prompt)
            else:
                _check_same(prompts[row], outcome, source)
            key = (row, column[outcome.model_name])
            if outcome.sample in samples[key]:
                raise UserError(f"{source}: sample {outcome.sample} of ({outcome.prompt_id!r}, "
                                f"{outcome.model_name!r}) stands twice; remove one")
            if outcome.sample == 0:
                first[key] = outcome
            samples[key][outcome.sample] = _graded(outcome, source)
        return cls._dense(prompts, tuple(models), pool, first, samples, fingerprint(outcomes), source)

    @classmethod
    def _dense(cls, prompts: list[Prompt], models: tuple[str, ...], pool: Pool, first: dict[tuple[int, int], Outcome],
               samples: dict[tuple[int, int], dict[int, float]], mark: str, source: str) -> OutcomeTable:
        n, m = len(prompts), len(models)
        missing = [(row, col) for row in range(n) for col in range(m) if (row, col) not in first]
        if missing:
            row, col = missing[0]
            raise UserError(f"{source}: model {models[col]!r} has no recorded answer to prompt "
                            f"{prompts[row].prompt_id!r} ({len(missing)} of {n * m} pairs are missing); record them, "
                            "or import with --missing drop_prompt or --missing drop_model")

        def array(value: Any, dtype: Any = np.float64) -> np.ndarray:
            return np.array([[value(first[row, col]) for col in range(m)] for row in range(n)], dtype=dtype)

        table = cls(
            prompts=prompts, models=models, pool=pool,
            quality=array(lambda o: _graded(o, source)),
            cost=np.zeros((n, m)),
            latency=array(lambda o: np.nan if o.latency_s is None else o.latency_s),
            input_tokens=array(lambda o: o.token_usage.input, np.int64),
            output_tokens=array(lambda o: o.token_usage.output + o.token_usage.reasoning, np.int64),
            quality_mean=np.array([[np.mean(list(samples[row, col].values())) for col in range(m)]
                                   for row in range(n)]),
            estimated=any(o.token_usage.estimated for o in first.values()),
            fingerprint=mark,
            responses=[{models[col]: first[row, col].response for col in range(m)} for row in range(n)],
            reasoning_tokens=array(lambda o: o.token_usage.reasoning, np.int64),
            cached_tokens=array(lambda o: o.token_usage.cached, np.int64),
            money_recorded=array(lambda o: np.nan if o.cost_usd is None else o.cost_usd),
        )
        return table.reprice(pool)

    @property
    def n(self) -> int:
        return len(self.prompts)

    @property
    def m(self) -> int:
        return len(self.models)

    @property
    def splits(self) -> dict[str, int]:
        """Prompts per split; "" counts those not assigned."""
        counts: dict[str, int] = {}
        for prompt in self.prompts:
            counts[prompt.split] = counts.get(prompt.split, 0) + 1
        return counts

    def rows(self, index: Any) -> OutcomeTable:
        """The prompts of a boolean mask or an integer index, in that order."""
        index = np.asarray(index)
        if index.dtype == bool:
            index = np.flatnonzero(index)
        pick = {name: None if getattr(self, name) is None else getattr(self, name)[index] for name in _ARRAYS}
        return replace(self, prompts=[self.prompts[i] for i in index],
                       responses=None if self.responses is None else [self.responses[i] for i in index], **pick)

    def split(self, name: str) -> OutcomeTable:
        """The prompts of one split. Raises UserError when it is empty."""
        mask = np.array([p.split == name for p in self.prompts])
        if not mask.any():
            seen = ", ".join(f"{k or 'unassigned'} {v}" for k, v in self.splits.items())
            raise UserError(f"the cache has no prompt in split {name!r} (it has: {seen}); "
                            "import with --splits hash, or evaluate with --seeds, to assign splits")
        return self.rows(mask)

    def with_splits(self, splits: Sequence[str]) -> OutcomeTable:
        """The same table with these splits, one per prompt."""
        if len(splits) != self.n:
            raise ValueError(f"{len(splits)} splits for {self.n} prompts")
        return replace(self, prompts=[replace(p, split=s) for p, s in zip(self.prompts, splits, strict=True)])

    def pick_models(self, models: Sequence[str]) -> OutcomeTable:
        """The same prompts with these columns, in this order."""
        columns = [self.models.index(self.pool[name].name) for name in models]
        pick = {name: None if getattr(self, name) is None else getattr(self, name)[:, columns] for name in _ARRAYS}
        return replace(self, models=tuple(models), pool=self.pool.subset(models), **pick)

    def reprice(self, pool: Pool) -> OutcomeTable:
        """The same outcomes at another pool's prices; no model is called. Recorded money stays as it was recorded."""
        pool = pool.subset(self.models)
        cost = np.empty((self.n, self.m))
        cached = np.zeros_like(self.input_tokens) if self.cached_tokens is None else self.cached_tokens
        reasoning = np.zeros_like(self.input_tokens) if self.reasoning_tokens is None else self.reasoning_tokens
        for col, name in enumerate(self.models):  # Pool.cost is plain arithmetic, so columns pass through it whole
            usage = TokenUsage(self.input_tokens[:, col], self.output_tokens[:, col] - reasoning[:, col],
                               reasoning[:, col], cached[:, col])
            cost[:, col] = pool.cost(name, usage)
        if self.money_recorded is not None:
            cost = np.where(np.isnan(self.money_recorded), cost, self.money_recorded)
        return replace(self, pool=pool, cost=cost)


_ARRAYS = ("quality", "cost", "latency", "input_tokens", "output_tokens", "quality_mean", "reasoning_tokens",
           "cached_tokens", "money_recorded")


def _check_same(prompt: Prompt, outcome: Outcome, source: str) -> None:
    """One id, one prompt, one split. Raises UserError."""
    if (prompt.prompt, prompt.context) != (outcome.prompt, outcome.context):
        raise UserError(f"{source}: prompt_id {outcome.prompt_id!r} stands for two different prompts "
                        f"({prompt.prompt[:40]!r} and {outcome.prompt[:40]!r}); ids must be unique")
    if prompt.split != outcome.split:
        raise UserError(f"{source}: prompt_id {outcome.prompt_id!r} stands in split {prompt.split or 'unassigned'} and "
                        f"in {outcome.split or 'unassigned'}; a prompt has one split")


def _graded(outcome: Outcome, source: str) -> float:
    if outcome.error:
        return 0.0  # a failed call is an answer of no use, never a hole in the denominator
    if outcome.quality is None:
        raise UserError(f"{source}: the answer of {outcome.model_name!r} to prompt {outcome.prompt_id!r} is not "
                        "graded; grade the cache first: build_cache.py --regrade")
    return outcome.quality
