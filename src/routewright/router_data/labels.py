"""What labels must hold for training to make sense, their weights in the loss, and which rows to validate on."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from routewright.errors import UserError
from routewright.router_data.rows import PairData

RARE_SHARE = 0.10  # a class rarer than this is reported, with the cure
MAX_POS_WEIGHT = 20.0


def check_labels(data: PairData, num_labels: int) -> list[str]:
    """Warnings to show; UserError where nothing can be learnt because all labels are equal."""
    values, counts = np.unique(data.labels, return_counts=True)
    if len(values) < 2:
        raise UserError(f"{data.source}: all {len(data)} labels are {values[0]:g}; a router needs right and wrong "
                        "answers to learn from, so add rows of the other class")
    if num_labels == 1:
        return []
    warnings = []
    share = {int(v): c / len(data) for v, c in zip(values, counts, strict=True)}
    absent = [k for k in range(num_labels) if k not in share]
    if absent:
        warnings.append(f"{data.source}: no row carries label {', '.join(map(str, absent))}; its output will never be "
                        f"chosen (--num_labels {max(share) + 1} would do)")
    if min(share.values()) < RARE_SHARE:
        table = ", ".join(f"label {k}: {c} rows ({c / len(data):.1%})" for k, c in zip(values, counts, strict=True))
        warnings.append(f"{data.source}: heavily uneven labels: {table}; --class_weights balanced evens them out in "
                        "the loss")
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
    first, second = clashes[0]
    return [f"{data.source}: {len(clashes)} rows repeat a question and llm_id with another label (first: lines {first} "
            f"and {second}); they are kept as noise"]


def check_soft_labels(quality: np.ndarray, models: Sequence[str], source: str = "the cache") -> list[str]:
    """Warnings for soft labels (N, M) of `source`; UserError where no model's quality varies."""
    mean = quality.mean(0)
    constant = [m for m, column in zip(models, quality.T, strict=True) if np.ptp(column) == 0]
    if len(constant) == len(models):
        raise UserError(f"{source}: every model has the same quality on all {len(quality)} train prompts; there is "
                        "nothing to learn, so record harder prompts or check the grading")
    warnings = [f"model {name!r} has the same quality on every train prompt; its column carries no signal"
                for name in constant]
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


def hold_out(texts: Sequence[str], fraction: float, groups: Sequence[str] | None = None,
             salt: str = "validation") -> tuple[np.ndarray, np.ndarray]:
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
        raise UserError(f"{len(texts)} rows in {len(set(groups))} groups are too few to hold out {fraction:.0%} for "
                        "validation; give more rows or a validation file")
    return train, dev
