"""CoBench's JSON lines, `question`, `llm_id`, `label`: every row is checked, a bad one is named by file and line."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from routewright.errors import UserError
from routewright.textfiles import check_present, check_row_text, read_jsonl, short

PAIR_FIELDS = ("question", "llm_id", "label")


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
    on_bad = partial(_skip, skip_bad=skip_bad, skipped=skipped) if skip_bad else None
    for number, row in read_jsonl(path, on_bad):
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


def _skip(error: UserError, skip_bad: int, skipped: list[str]) -> None:
    if len(skipped) >= skip_bad:
        more = f" ({len(skipped)} bad rows were skipped before it, as --skip_bad {skip_bad} allows)" if skip_bad else ""
        raise UserError(f"{error}{more}") from None
    skipped.append(str(error))


def _pair(row: dict[str, Any], where: str, num_labels: int) -> tuple[str, str, float]:
    for name in PAIR_FIELDS:
        check_present(row, name, PAIR_FIELDS, where)
    for name in ("question", "llm_id"):
        check_row_text(row[name], name, where)
    return row["question"], row["llm_id"], _label(row["label"], where, num_labels)


def _label(value: Any, where: str, num_labels: int) -> float:
    if num_labels == 1:
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value <= 1:
            raise UserError(f"{where}: `label` must be a number in [0, 1] with one output; got {short(value)}")
        return float(value)
    if isinstance(value, bool) or not isinstance(value, int):
        hint = f"; write {int(value)}" if isinstance(value, bool) else "; write it as a whole number"
        raise UserError(f"{where}: `label` must be a whole number 0..{num_labels - 1}; got {short(value)}{hint}")
    if not 0 <= value < num_labels:
        raise UserError(f"{where}: `label` is {value} but NUM_LABELS is {num_labels}, so 0..{num_labels - 1} are "
                        "known; fix the row or raise --num_labels")
    return value
