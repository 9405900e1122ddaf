"""Token ids, padded batches, and the order in which an epoch sees its rows."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

SEPARATOR = "<SEP>"  # CoBench's own marker; used in `compat` texts only
MEGA_BATCHES = 100  # batches sorted by length together; more pads less and shuffles less


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
