"""What a language-model trainer reads before it loads weights: rows, their validation twin, the outcomes behind them.

A set of build_sets.py is a file of rows with a card beside it; the card says what the answers mean, which file is the
dev twin and which outcome cache the rows came from. Everything is checked here, so that a mistake costs seconds.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from routewright import sets
from routewright.errors import UserError
from routewright.templates import Template

if TYPE_CHECKING:
    from routewright.outcomes import OutcomeTable
    from routewright.reward import Reward

Rows = list[dict[str, Any]]
Say = Callable[[str], None]
_KINDS = {"alpaca": ("instruction", "rows"), "dpo": ("prompt", "pairs")}  # kind -> (column, word)


@dataclass
class TrainingSet:
    """Rows to train and to validate on, and the outcomes behind them.

    template: None for answers that are any text. table, dev_table: the train and dev split of the cache; rewards:
    (N, M) of the dev split, with the models of the template as columns; reward, unit_usd: how they came about.
    """

    name: str
    train: Rows
    dev: Rows
    template: Template | None = None
    table: OutcomeTable | None = None
    dev_table: OutcomeTable | None = None
    rewards: np.ndarray | None = None
    reward: Reward | None = None
    unit_usd: float = 1.0

    @property
    def words(self) -> str:
        """What the answers are, for the console."""
        if self.template is None:
            return "plain answers"
        if self.template.mode == "decision":
            return f"decisions among {', '.join(self.template.models)}"
        return f"difficulty for {self.template.about or 'the pool'} among {', '.join(self.template.models)}"

    @property
    def product(self) -> str:
        """What comes out: without outcomes nothing can be calibrated, so the weights alone."""
        return "router" if self.table is not None else "weights"


def read_with_twin(kind: str, data: str, val: str, hold_out: Callable[[Rows], tuple[Rows, Rows]], skip_bad: int,
                   say: Say) -> tuple[Rows, Rows, dict[str, Any] | None]:
    """(train rows, validation rows, card of the train rows) of a set; kind is "alpaca" or "dpo".

    Validation rows come from `val`, else from the twin that the card names, else `hold_out` divides the rows.
    Raises UserError naming file and row, also where the two share a prompt or were built with different templates.
    """
    what = _KINDS[kind][1]
    rows, card = sets.read_set(data, kind, skip_bad, say)
    twin = val or (str(Path(data).parent / str(card["dev"])) if card and card.get("dev") else "")
    if twin and not val and not Path(twin).is_file():
        say(f"warning: {data}: its dev set {twin} is not there; a part of the {what} is held out instead")
        twin = ""
    if not twin:
        return *hold_out(rows), card
    held, held_card = sets.read_set(twin, kind, skip_bad, say)
    _check_apart(kind, rows, held, data, twin)
    if held_card and (card is None or held_card["template"] != card["template"]):
        raise UserError(f"{twin}: these {what} were built with another template than {data}; build both in one go")
    if card and not held_card:  # then nothing has compared its answers with the template
        template = Template.from_card(card["template"], data)
        for number, row in enumerate(held, 1):
            sets.check_row(row, f"{twin}: row {number}", kind, template)
    return rows, held, card


def _check_apart(kind: str, rows: Rows, held: Rows, data: str, twin: str) -> None:
    """Validation prompts must be new: one that was seen in training measures memory."""
    column, what = _KINDS[kind]
    seen = {row[column]: number for number, row in enumerate(rows, 1)}
    shared = [number for number, row in enumerate(held, 1) if row[column] in seen]
    if shared:
        there = seen[held[shared[0] - 1][column]]
        raise UserError(f"{twin}: row {shared[0]}: this {column} is also among the training {what} ({data}: row "
                        f"{there}), as are {len(shared) - 1} more; remove them, or leave --val empty")


def add_outcomes(source: TrainingSet, card: dict[str, Any], cache: str, say: Say) -> None:
    """Fill in the outcomes that calibrate the router and show what its decisions earn, divided as the rows were.

    cache: another place than the card's. Where the card's is not on this machine, a warning says what is lost. Columns
    are the template's models in its order, whatever the card lists. Raises UserError for a damaged card, and for rows
    of another split than train: a router is calibrated on dev, and what was trained on would be too sure of itself.
    """
    from routewright.outcomes import cache_file

    _check_card(source.name, card)
    try:
        cache_file(cache or card["cache"])
    except UserError:
        if cache:
            raise
        say(f"WARNING: {source.name}: its cache {card['cache']} is not here, so the weights will be trained but no "
            "router.json written; give --cache, now or by running the same line again")
        return
    table = sets.table_of_card({**card, "models": list(source.template.models)}, source.name, cache)
    source.table = table.split("train")
    source.reward, source.unit_usd = sets.reward_of_card(card, source.name), card["unit_usd"]
    if "dev" in table.splits:
        source.dev_table = table.split("dev")
        source.rewards = sets.reward_table(source.dev_table, source.reward, card["cost_unit"], card["unit_usd"])


def _check_card(where: str, card: dict[str, Any]) -> None:
    """What `add_outcomes` needs of a card. Raises UserError."""
    cure = "build the set again with build_sets.py"
    missing = [name for name in ("cache", "split", "cost_unit", "unit_usd") if name not in card]
    if missing:
        raise UserError(f"{where}: `{missing[0]}` is missing from its card, so the outcomes behind the rows are not "
                        f"known; {cure}")
    if (card["split"] or "train") != "train":
        raise UserError(f"{where}: these are rows of split {card['split']}, which calibrates the router or tests it; "
                        "train on the rows of split train")
    unit = card["unit_usd"]
    if isinstance(unit, bool) or not isinstance(unit, (int, float)) or not 0 < unit < math.inf:
        raise UserError(f"{where}: unit_usd of its card must be a number above 0; got {unit!r}; {cure}")
