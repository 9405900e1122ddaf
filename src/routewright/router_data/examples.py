"""Training and validation examples of a router, from CoBench rows or from an outcome cache."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from routewright.errors import UserError
from routewright.router_data.labels import check_labels, check_soft_labels, hold_out
from routewright.router_data.rows import PairData, pairs_of_table, read_pairs

VALIDATION_SHARE = 0.1  # held out by group where no validation rows are given

Say = Callable[[str], None]


@dataclass
class Examples:
    """Rows to train or validate on; `names` says where each is from, for messages.

    labels: (N,) in pair form, (N, M) in pool form.
    """

    questions: list[str]
    llm_ids: list[str] | None
    labels: np.ndarray
    names: list[str]

    def __len__(self) -> int:
        return len(self.questions)


@dataclass
class Source:
    """What the rows are: their form, the models, and the cache behind them where there is one."""

    form: str
    models: tuple[str, ...]
    num_labels: int
    table: Any = None  # the train split
    dev_table: Any = None

    @property
    def pool(self) -> bool:
        return self.form == "pool"


def load_examples(data: str, val: str, cache: str, form: str, num_labels: int, skip_bad: int, say: Say,
                  split_seed: int | None = None) -> tuple[Examples, Examples, Source]:
    """(train, validation, source), every row checked; warnings go to `say`. Raises UserError naming file and line.

    A test split is never read, and without validation rows a tenth of the training groups is held out. `split_seed`
    divides a cache anew, as evaluation's seed of that number does.
    """
    if cache:
        return load_cache(cache, "pool" if form == "auto" else form, num_labels, say, split_seed)
    pairs = read_pairs(data, num_labels, skip_bad)
    if val:
        held = read_pairs(val, num_labels, skip_bad)
        check_apart(pairs, held)
    else:
        keep, out = hold_out(pairs.questions, VALIDATION_SHARE)
        pairs, held = pairs.take(keep), pairs.take(out)
    for message in dict.fromkeys([*pairs.skipped, *held.skipped]):
        say(f"skipped: {message}")
    for message in check_labels(pairs, num_labels):
        say(f"warning: {message}")
    models = tuple(dict.fromkeys(pairs.llm_ids))
    strange = sorted(set(held.llm_ids) - set(models))
    if strange:
        say(f"warning: {held.source}: llm_id {strange[0]!r} never occurs in the training rows; its estimates are "
            "guesses")
    source = Source("pair" if form == "auto" else form, models, num_labels)
    return pair_examples(pairs), pair_examples(held), source


def load_cache(cache: str, form: str, num_labels: int, say: Say,
               split_seed: int | None = None) -> tuple[Examples, Examples, Source]:
    from routewright.outcomes import OutcomeTable
    from routewright.prompts import seed_splits
    from routewright.routers.base import prompt_text

    table = OutcomeTable.load(cache)
    if split_seed is not None:
        table = table.with_splits(seed_splits(table.prompts, split_seed))
    if "train" not in table.splits:
        found = ", ".join(map(str, table.splits)) or "none"
        raise UserError(f"{cache}: no prompt carries split 'train' (found: {found}); give the cache splits with "
                        "build_cache.py or import_outcomes.py")
    train = table.split("train")
    if "dev" in table.splits:
        dev = table.split("dev")
    else:
        say(f"warning: {cache} has no dev split; a tenth of its train prompts is held out for validation")
        keep, out = hold_out([p.prompt for p in train.prompts], VALIDATION_SHARE,
                                         [p.group or p.prompt_id for p in train.prompts])
        train, dev = train.rows(keep), train.rows(out)
    if form == "pool":
        messages = check_soft_labels(train.quality_mean, train.models, str(cache))
        parts = [Examples([prompt_text(p) for p in t.prompts], None, t.quality_mean.astype(np.float64),
                          [f"{cache} prompt {p.prompt_id}" for p in t.prompts]) for t in (train, dev)]
        source = Source(form, tuple(train.models), train.m, train, dev)
    else:
        pairs = pairs_of_table(train)
        messages = check_labels(pairs, num_labels)
        parts = [pair_examples(pairs), pair_examples(pairs_of_table(dev))]
        source = Source(form, tuple(train.models), num_labels, train, dev)
    for message in messages:
        say(f"warning: {message}")
    return parts[0], parts[1], source


def pair_examples(pairs: PairData) -> Examples:
    return Examples(pairs.questions, pairs.llm_ids, pairs.labels, [f"{pairs.source}:{line}" for line in pairs.lines])


def check_apart(train: PairData, held: PairData) -> None:
    """Validation questions must be new: a question seen in training measures memory."""
    from routewright.prompts import normalise

    seen = {normalise(q): line for q, line in zip(train.questions, train.lines, strict=True)}
    shared = [(line, seen[key]) for question, line in zip(held.questions, held.lines, strict=True)
              if (key := normalise(question)) in seen]
    if shared:
        here, there = shared[0]
        raise UserError(f"{held.source}:{here}: this question is also in the training rows ({train.source}:{there}), "
                        f"as are {len(shared) - 1} more; remove them, or leave VAL empty to hold rows out by group")
