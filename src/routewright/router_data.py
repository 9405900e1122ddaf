"""Rows, labels, token ids and batches for training an encoder as a router.

Two shapes of training set meet here. `pair`: CoBench's JSON lines `question`, `llm_id`, `label`, one row a prompt and
model. `pool`: an outcome cache, one row a prompt with one soft label per model. Every row is checked before any weight
is loaded, and a bad one is named by file and line.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from routewright.errors import UserError
from routewright.textfiles import nearest, open_text, read_jsonl

PAIR_FIELDS = ("question", "llm_id", "label")
SEPARATOR = "<SEP>"  # CoBench's own marker; used in `compat` texts only
RARE_SHARE = 0.10  # a class rarer than this is reported, with the cure
MEGA_BATCHES = 100  # batches sorted by length together; more pads less and shuffles less
MAX_POS_WEIGHT = 20.0


# --- rows -------------------------------------------------------------------------------------------------------------

@dataclass
class PairData:
    """N rows of (question, llm_id, label). `labels` is int64 (N,), or float64 in [0, 1] for a single output."""

    questions: list[str]
    llm_ids: list[str]
    labels: np.ndarray
    lines: list[int]
    source: str
    skipped: list[str] = field(default_factory=list)  # messages of rows passed over under skip_bad

    def __len__(self) -> int:
        return len(self.questions)

    def take(self, index: Sequence[int] | np.ndarray) -> PairData:
        """The rows of this index, in its order."""
        keep = [int(i) for i in index]
        return PairData([self.questions[i] for i in keep], [self.llm_ids[i] for i in keep], self.labels[keep],
                        [self.lines[i] for i in keep], self.source, self.skipped)


def read_pairs(path: str | Path, num_labels: int = 2, skip_bad: int = 0) -> PairData:
    """CoBench rows of a JSONL(.gz) file. Fields beyond the three are ignored.

    num_labels 2 and more wants whole labels 0..num_labels-1; 1 wants a number in [0, 1], the share of right answers.
    Up to `skip_bad` bad rows are passed over and listed in `.skipped`; one more raises UserError naming file and line.
    """
    questions, llm_ids, labels, lines, skipped = [], [], [], [], []
    for number, row in _rows(path, skip_bad, skipped):
        try:
            question, llm_id, label = _pair(row, f"{path}:{number}", num_labels)
        except UserError as error:
            _skip(error, skip_bad, skipped)
            continue
        questions.append(question)
        llm_ids.append(llm_id)
        labels.append(label)
        lines.append(number)
    if not questions:
        raise UserError(f"{path}: no usable row ({len(skipped)} skipped as bad); one object per line with "
                        f"{', '.join(PAIR_FIELDS)} is needed")
    dtype = np.float64 if num_labels == 1 else np.int64
    return PairData(questions, llm_ids, np.asarray(labels, dtype), lines, str(path), skipped)


def pairs_of_table(table: Any) -> PairData:
    """The rows of an outcome cache as pairs: one per prompt and model, label 1 where the recorded answer was right."""
    from routewright.routers.base import prompt_text

    questions = [prompt_text(p) for p in table.prompts for _ in table.models]
    llm_ids = [name for _ in table.prompts for name in table.models]
    labels = (np.asarray(table.quality) >= 0.5).astype(np.int64).reshape(-1)
    return PairData(questions, llm_ids, labels, list(range(1, len(questions) + 1)), "cache")


def _rows(path: str | Path, skip_bad: int, skipped: list[str]) -> Iterator[tuple[int, dict[str, Any]]]:
    """read_jsonl, going on after a line that is no JSON object while skips are left."""
    if not skip_bad:
        yield from read_jsonl(path)
        return
    from routewright.textfiles import _parse

    with open_text(path) as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                row = _parse(line, f"{path}:{number}", torn=not line.endswith("\n"))
            except UserError as error:
                _skip(error, skip_bad, skipped)
                continue
            yield number, row


def _skip(error: UserError, skip_bad: int, skipped: list[str]) -> None:
    if len(skipped) >= skip_bad:
        more = f" ({len(skipped)} bad rows were skipped before it, as --skip_bad {skip_bad} allows)" if skip_bad else ""
        raise UserError(f"{error}{more}") from None
    skipped.append(str(error))


def _pair(row: dict[str, Any], where: str, num_labels: int) -> tuple[str, str, float]:
    for name in PAIR_FIELDS:
        if name not in row:
            close = nearest(name, [k for k in row if k not in PAIR_FIELDS])
            raise UserError(f"{where}: `{name}` is missing{close}; a row needs {', '.join(PAIR_FIELDS)}")
    for name in ("question", "llm_id"):
        value = row[name]
        if not isinstance(value, str) or not value.strip():
            raise UserError(f"{where}: `{name}` must be a text that is not empty; got {_short(value)}")
        if any("\ud800" <= c <= "\udfff" for c in value):
            raise UserError(f"{where}: `{name}` holds half of a surrogate pair, which no tokenizer can read; fix or remove the row")
    return row["question"], row["llm_id"], _label(row["label"], where, num_labels)


def _label(value: Any, where: str, num_labels: int) -> float:
    if num_labels == 1:
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value <= 1:
            raise UserError(f"{where}: `label` must be a number in [0, 1] with one output; got {_short(value)}")
        return float(value)
    if isinstance(value, bool) or not isinstance(value, int):
        hint = f"; write {int(value)}" if isinstance(value, bool) else "; write it as a whole number"
        raise UserError(f"{where}: `label` must be a whole number 0..{num_labels - 1}; got {_short(value)}{hint}")
    if not 0 <= value < num_labels:
        raise UserError(f"{where}: `label` is {value} but NUM_LABELS is {num_labels}, so 0..{num_labels - 1} are known; "
                        "fix the row or raise --num_labels")
    return value


def _short(value: Any) -> str:
    text = repr(value)
    return f"{type(value).__name__} {text[:40]}{'...' if len(text) > 40 else ''}"


# --- labels -----------------------------------------------------------------------------------------------------------

def check_labels(data: PairData, num_labels: int) -> list[str]:
    """Warnings to show; UserError where nothing can be learnt because all labels are equal."""
    values, counts = np.unique(data.labels, return_counts=True)
    if len(values) < 2:
        raise UserError(f"{data.source}: all {len(data)} labels are {values[0]:g}; a router needs right and wrong answers to learn "
                        "from, so add rows of the other class")
    if num_labels == 1:
        return []
    warnings = []
    share = {int(v): c / len(data) for v, c in zip(values, counts, strict=True)}
    absent = [k for k in range(num_labels) if k not in share]
    if absent:
        warnings.append(f"{data.source}: no row carries label {', '.join(map(str, absent))}; its output will never be chosen "
                        f"(--num_labels {max(share) + 1} would do)")
    if min(share.values()) < RARE_SHARE:
        table = ", ".join(f"label {k}: {int(c)} rows ({c / len(data):.1%})" for k, c in zip(values, counts, strict=True))
        warnings.append(f"{data.source}: heavily uneven labels: {table}; --class_weights balanced evens them out in the loss")
    warnings += _contradictions(data)
    return warnings


def _contradictions(data: PairData) -> list[str]:
    seen: dict[tuple[str, str], tuple[float, int]] = {}
    clashes = []
    for question, llm_id, label, line in zip(data.questions, data.llm_ids, data.labels, data.lines, strict=True):
        before = seen.setdefault((question, llm_id), (label, line))
        if before[0] != label:
            clashes.append((before[1], line))
    if not clashes:
        return []
    return [f"{data.source}: {len(clashes)} rows repeat a question and llm_id with another label (first: lines {clashes[0][0]} "
            f"and {clashes[0][1]}); they are kept as noise"]


def check_soft_labels(quality: np.ndarray, models: Sequence[str]) -> list[str]:
    """Warnings for soft labels (N, M); UserError where no model's quality varies."""
    mean = quality.mean(0)
    constant = [m for m, column in zip(models, quality.T, strict=True) if np.ptp(column) == 0]
    if len(constant) == len(models):
        raise UserError(f"the cache gives every model the same quality on all {len(quality)} train prompts; there is nothing to "
                        "learn, so record harder prompts or check the grading")
    warnings = [f"model {name!r} has the same quality on every train prompt; its column carries no signal" for name in constant]
    rare = [m for m, p in zip(models, mean, strict=True) if m not in constant and min(p, 1 - p) < RARE_SHARE]
    if rare:
        table = ", ".join(f"{m}: {p:.1%} right" for m, p in zip(models, mean, strict=True))
        warnings.append(f"heavily uneven labels: {table}; --class_weights balanced evens them out in the loss "
                        "(the estimates are then no longer plain probabilities)")
    return warnings


def class_weights(labels: np.ndarray, num_labels: int) -> np.ndarray:
    """(K,) weights n / (K count), 1 on average over the rows; 0 for a class without rows."""
    counts = np.bincount(labels.astype(int), minlength=num_labels).astype(float)
    present = counts > 0
    weights = np.zeros(num_labels)
    weights[present] = len(labels) / (present.sum() * counts[present])
    return weights


def positive_weights(quality: np.ndarray) -> np.ndarray:
    """(M,) weight of the right answers in a binary loss, (1 - p) / p, held within 1/20 and 20."""
    share = quality.mean(0)
    return np.clip((1 - share) / np.maximum(share, 1e-9), 1 / MAX_POS_WEIGHT, MAX_POS_WEIGHT)


# --- splits -----------------------------------------------------------------------------------------------------------

def hold_out(texts: Sequence[str], fraction: float, groups: Sequence[str] | None = None, salt: str = "validation") -> tuple[np.ndarray, np.ndarray]:
    """(train, validation) row indices. Near-duplicate texts stay on one side; the choice hangs on the texts alone.

    Raises UserError when the rows are too few to leave both sides with something.
    """
    from routewright.prompts import assign_splits, group_near_duplicates

    distinct = list(dict.fromkeys(texts))
    if groups is None:
        named = dict(zip(distinct, group_near_duplicates(distinct), strict=True))
        groups = [named[t] for t in texts]
    splits = np.asarray(assign_splits(groups, {"train": 1 - fraction, "dev": fraction}, salt=salt))
    train, dev = np.flatnonzero(splits == "train"), np.flatnonzero(splits == "dev")
    if not len(train) or not len(dev):
        raise UserError(f"{len(texts)} rows in {len(set(groups))} groups are too few to hold out {fraction:.0%} for validation; "
                        "give more rows or a validation file")
    return train, dev


# --- token ids and batches --------------------------------------------------------------------------------------------

def encode(tokenizer: Any, questions: Sequence[str], llm_ids: Sequence[str] | None = None, max_length: int = 512,
           compat: bool = False) -> list[dict[str, list[int]]]:
    """Token ids per row, cut to max_length, not padded. Training and inference both come through here.

    Without llm_ids: the question alone (pool form). With them: the tokenizer's own text pair, where only the question
    is cut, so that the model's name always survives; `compat` writes CoBench's `question <SEP> llm_id <SEP>` as one
    text instead, which loses the name on long questions.
    """
    if llm_ids is None:
        packed = tokenizer(list(questions), truncation=True, max_length=max_length)
    elif compat:
        texts = [f"{q} {SEPARATOR} {m} {SEPARATOR}" for q, m in zip(questions, llm_ids, strict=True)]
        packed = tokenizer(texts, truncation=True, max_length=max_length)
    else:
        packed = tokenizer(list(questions), list(llm_ids), truncation="only_first", max_length=max_length)
    names = [n for n in ("input_ids", "token_type_ids") if n in packed]
    return [{n: packed[n][i] for n in names} for i in range(len(packed["input_ids"]))]


def with_labels(rows: list[dict[str, Any]], labels: np.ndarray) -> list[dict[str, Any]]:
    """The rows with their labels beside the token ids: a plain list that any data loader takes."""
    assert len(rows) == len(labels)
    values = labels.tolist()
    return [{**row, "labels": value} for row, value in zip(rows, values, strict=True)]


class PadBatch:
    """Rows to tensors, padded to the longest of the batch (rounded up to `multiple`, for tensor cores)."""

    def __init__(self, pad_id: int, multiple: int = 1, fixed_length: int | None = None):
        self.pad_id, self.multiple, self.fixed_length = pad_id, multiple, fixed_length

    def __call__(self, rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
        import torch

        longest = self.fixed_length or max(len(r["input_ids"]) for r in rows)
        width = math.ceil(longest / self.multiple) * self.multiple
        ids = np.full((len(rows), width), self.pad_id, dtype=np.int64)  # (B, T)
        mask = np.zeros((len(rows), width), dtype=np.int64)
        types = np.zeros((len(rows), width), dtype=np.int64) if "token_type_ids" in rows[0] else None
        for i, row in enumerate(rows):
            n = len(row["input_ids"])
            ids[i, :n] = row["input_ids"]
            mask[i, :n] = 1
            if types is not None:
                types[i, :n] = row["token_type_ids"]
        batch = {"input_ids": torch.from_numpy(ids), "attention_mask": torch.from_numpy(mask)}
        if types is not None:
            batch["token_type_ids"] = torch.from_numpy(types)
        if "labels" in rows[0]:
            batch["labels"] = torch.tensor([row["labels"] for row in rows])
        return batch


class LengthGroupedOrder:
    """Row order of an epoch: batches of like lengths in random sequence, the longest batch first.

    The order is a function of (seed, epoch) alone, never of the number of processes, so every world size that keeps
    the global batch sees the same updates and a resumed run can skip to where it was. The last batch is filled up from
    the front of the epoch's shuffle: every batch is whole, and every row is seen.

    batch_size: rows per optimizer step over all processes and accumulation steps.
    """

    def __init__(self, lengths: Sequence[int], batch_size: int, seed: int, grouped: bool = True):
        assert len(lengths) and batch_size > 0
        self.lengths = np.asarray(lengths)
        self.batch_size, self.seed, self.grouped, self.epoch = batch_size, seed, grouped, 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return math.ceil(len(self.lengths) / self.batch_size) * self.batch_size

    def __iter__(self) -> Iterator[int]:
        return iter(self.order().tolist())

    def order(self) -> np.ndarray:
        """(ceil(N / batch) * batch,) row indices."""
        rng = np.random.default_rng([self.seed, self.epoch])
        shuffled = rng.permutation(len(self.lengths))
        shuffled = np.resize(shuffled, len(self))
        if not self.grouped:
            return shuffled
        batches = len(shuffled) // self.batch_size
        # At least four mega-batches, so that small sets keep some chance in who meets whom.
        mega = min(MEGA_BATCHES, max(1, batches // 4)) * self.batch_size
        for start in range(0, len(shuffled), mega):
            part = shuffled[start:start + mega]
            shuffled[start:start + mega] = part[np.argsort(-self.lengths[part], kind="stable")]
        grid = shuffled.reshape(batches, self.batch_size)
        grid = grid[rng.permutation(batches)]
        # The widest batch comes first: too little memory shows at the first step, not an hour in.
        widest = int(self.lengths[grid].max(1).argmax())
        grid[[0, widest]] = grid[[widest, 0]]
        return grid.reshape(-1)
