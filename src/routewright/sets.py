"""From outcomes to what a language model is trained on: decisions, levels of difficulty, and preference pairs.

Every target is what the router emits, a label of its template, never the answer to the question:

    outcomes -> rewards (N, M) -> the best model of each prompt        Alpaca rows: instruction, response
                               -> pairs of models, better and worse    DPO rows: prompt, chosen, rejected
             -> mean quality of one model                              Alpaca rows, the response a level 0..9

Rewards are expected ones, over all recorded samples of an answer, so that one lucky draw decides nothing. Their cost
counts in units of the dearest model's mean cost in training: a cost weight of 1 says that its answer costs as much as
a right answer is worth, whatever the currency. Where two models earn the same, the cheaper one is the better one.

A set is a file with a card beside it (`NAME.jsonl`, `NAME.card.json`), which holds the template, the pool, the reward
and where the outcomes came from: all that a trainer and a router need to know.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np

from routewright.errors import UserError
from routewright.outcomes import OutcomeTable
from routewright.pool import Pool, model_from_entry
from routewright.prompts import full_text, normalise, seed_splits
from routewright.reward import Reward
from routewright.templates import LEVELS, Template
from routewright.textfiles import (
    check_present,
    check_row_text,
    nearest,
    need_file,
    parse_row,
    read_jsonl,
    short,
    write_atomic,
    write_json,
    write_jsonl,
)

COST_UNITS = ("dearest", "usd")
QUALITIES = ("mean", "greedy")
PAIR_POLICIES = ("best_vs_each", "adjacent", "all_ordered")
ALL_WRONG = ("cheapest", "drop")
KINDS = {"alpaca": ("instruction", "response"), "dpo": ("prompt", "chosen", "rejected")}
TOP_SHARE = 0.9  # of one label, from which the set is reported as lopsided
_SAME = 1e-9  # rewards this close are equal: sums in another order must not make a winner
_SOURCE_KEYS = ("pool", "models", "cache", "cache_fingerprint", "split_seed")  # of a card: what to load outcomes by
_CURE = "build the set again with build_sets.py"

Say = Callable[[str], None]


# --- rewards ----------------------------------------------------------------------------------------------------------

def cost_unit_of(table: OutcomeTable, cost_unit: str = "dearest") -> float:
    """USD that count as one unit of cost: the dearest model's mean cost in `table` (train), or 1.

    A pool that costs nothing has no dearest model; its unit is 1 USD. Raises UserError for another name.
    """
    if cost_unit not in COST_UNITS:
        raise UserError(f"cost unit {cost_unit!r} is not one of {', '.join(COST_UNITS)}"
                        f"{nearest(str(cost_unit), COST_UNITS)}")
    dearest = float(table.cost.mean(axis=0).max()) if cost_unit == "dearest" and table.n else 0.0
    return dearest or 1.0


def reward_table(table: OutcomeTable, reward: Reward, cost_unit: str = "dearest",
                 unit_usd: float | None = None) -> np.ndarray:
    """Expected reward of each model on each prompt, (N, M), over the recorded samples.

    Quality is `quality_mean`: under `binary` that makes p * (K - cost_weight * cost), p being the share of right
    answers. Cost is the recorded one of sample 0, in units of `cost_unit`; `unit_usd` is the unit that train fixed,
    and is handed in for dev. Under a2c the strong model is the dearest by price, and tokens are those in and out.
    """
    unit = cost_unit_of(table, cost_unit) if unit_usd is None else unit_usd
    quality, cost = table.quality_mean, table.cost / unit
    if reward.kind == "binary":
        return quality * (reward.K - reward.cost_weight * cost)
    if reward.kind == "a2c":
        strong = np.array([name == table.pool.by_price()[-1] for name in table.models])
        return reward.of(quality, cost, tokens=table.input_tokens + table.output_tokens, strong=strong)
    return reward.of(quality, cost)


def reward_card(name: str, reward: Reward) -> dict[str, Any]:
    """A reward as JSON: its preset and every setting; no cap is null."""
    settings = {f.name: getattr(reward, f.name) for f in fields(reward)}
    return {"name": name, **{k: None if v == math.inf else v for k, v in settings.items()}}


def reward_of_card(card: Mapping[str, Any], where: str) -> Reward:
    """The reward that a set's card holds. Raises UserError naming `where`."""
    entry = card.get("reward")
    try:
        settings = {k: math.inf if v is None else v for k, v in entry.items() if k != "name"}
        return Reward(**settings)
    except (AttributeError, TypeError, UserError) as error:
        raise UserError(f"{where}: the reward is damaged ({error}); {_CURE}") from None


# --- targets ----------------------------------------------------------------------------------------------------------

def decision_targets(rewards: np.ndarray, cost: np.ndarray, all_wrong: str = "cheapest",
                     quality: np.ndarray | None = None) -> np.ndarray:
    """Column of the model with the best reward on each prompt, (N,); -1 where the prompt is dropped.

    Equal rewards go to the cheaper model, then to the first column.

    Args:
        rewards: (N, M)
        cost: (N, M) or (M,), in any unit
        all_wrong: `cheapest` keeps prompts that no model answers right, whose best reward is the least spent on them;
            `drop` drops them
        quality: (N, M), needed to know them
    """
    _check_name("all_wrong", all_wrong, ALL_WRONG)
    order = _best_first(rewards, cost)
    targets = order[:, 0].astype(np.int64)
    if all_wrong == "drop":
        targets[_nobody_right(quality, len(targets))] = -1
    return targets


def difficulty_targets(table: OutcomeTable, about: str = "") -> np.ndarray:
    """Level of difficulty of each prompt, (N,) of 0..9: round(9 x (1 - mean quality)) of the model `about`.

    "" stands for the mean over the pool.
    """
    if about and about not in table.models:
        raise UserError(f"difficulty for {about!r}, which is not among the models {', '.join(table.models)}"
                        f"{nearest(about, table.models)}")
    quality = table.quality_mean[:, table.models.index(about)] if about else table.quality_mean.mean(axis=1)
    return np.rint((len(LEVELS) - 1) * (1.0 - quality)).astype(np.int64)


@dataclass(frozen=True)
class Pairs:
    """P preferences. prompt: (P,) row of the prompt; chosen, rejected: (P,) columns; margin: (P,) of reward.

    dropped counts what did not become a pair, by reason: `all wrong` in prompts, the others in pairs.
    """

    prompt: np.ndarray
    chosen: np.ndarray
    rejected: np.ndarray
    margin: np.ndarray
    dropped: dict[str, int]

    def __len__(self) -> int:
        return len(self.prompt)

    def take(self, index: np.ndarray) -> Pairs:
        """The pairs of this index, in its order."""
        return Pairs(self.prompt[index], self.chosen[index], self.rejected[index], self.margin[index], self.dropped)


def preference_pairs(rewards: np.ndarray, cost: np.ndarray, quality: np.ndarray, *, policy: str = "best_vs_each",
                     min_margin: float = 0.0, all_wrong: str = "cheapest") -> Pairs:
    """Which model should be preferred to which, prompt by prompt.

    Models are ranked by reward, equal rewards by cost. `best_vs_each` sets the first against every other one,
    `adjacent` each against the next, `all_ordered` each against all behind it. A pair equal in both reward and cost is
    dropped as a tie, and one whose rewards differ by less than `min_margin` as below the margin. Prompts that no model
    answers right are kept, so that the cheapest is preferred, or dropped.

    Args:
        rewards, quality: (N, M)
        cost: (N, M) or (M,), in any unit
    """
    _check_name("pairs", policy, PAIR_POLICIES)
    _check_name("all_wrong", all_wrong, ALL_WRONG)
    rewards = np.asarray(rewards, np.float64)
    n, m = rewards.shape
    cost = np.broadcast_to(np.asarray(cost, np.float64), (n, m))
    order = _best_first(rewards, cost)
    places = [(a, b) for a in range(m) for b in range(a + 1, m)
              if policy == "all_ordered" or (a == 0 if policy == "best_vs_each" else b == a + 1)]
    ahead, behind = (np.array([p[k] for p in places], int) for k in (0, 1))
    rows = np.repeat(np.arange(n), len(places))
    chosen, rejected = order[:, ahead].ravel(), order[:, behind].ravel()
    margin = np.maximum(rewards[rows, chosen] - rewards[rows, rejected], 0.0)
    lost = _nobody_right(quality, n) if all_wrong == "drop" else np.zeros(n, bool)
    tie = (margin <= _SAME) & np.isclose(cost[rows, chosen], cost[rows, rejected], rtol=_SAME, atol=0.0)
    small = margin < min_margin
    keep = ~lost[rows] & ~tie & ~small
    dropped = {"all wrong": int(lost.sum()), "tie": int((tie & ~lost[rows]).sum()),
               "below margin": int((small & ~tie & ~lost[rows]).sum())}
    return Pairs(rows[keep], chosen[keep], rejected[keep], margin[keep], dropped)


def _best_first(rewards: np.ndarray, cost: np.ndarray) -> np.ndarray:
    """(N, M) columns from the best reward to the worst; equal rewards by cost, then by column."""
    rewards = np.asarray(rewards, np.float64)
    cost = np.broadcast_to(np.asarray(cost, np.float64), rewards.shape)
    rows = np.arange(len(rewards))[:, None]
    by_reward = np.argsort(-rewards, axis=1, kind="stable")
    falls = np.diff(-rewards[rows, by_reward], axis=1, prepend=0.0) > _SAME
    falls[:, 0] = False
    rank = np.empty(rewards.shape, np.int64)
    rank[rows, by_reward] = np.cumsum(falls, axis=1)  # equal rewards share a rank
    columns = np.broadcast_to(np.arange(rewards.shape[1]), rewards.shape)
    return np.lexsort((columns, cost, rank), axis=1)


def _nobody_right(quality: np.ndarray | None, n: int) -> np.ndarray:
    assert quality is not None and len(quality) == n, "all_wrong needs the quality of every answer"
    return np.asarray(quality).max(axis=1) <= 0.0


def _check_name(what: str, name: str, known: Sequence[str]) -> None:
    if name not in known:
        raise UserError(f"{what} {name!r} is not one of {', '.join(known)}{nearest(str(name), known)}")


# --- prompts ----------------------------------------------------------------------------------------------------------

def merge_duplicates(table: OutcomeTable) -> tuple[OutcomeTable, int]:
    """The table with each prompt once, and how many rows were merged away.

    Prompts are the same when `prompts.normalise` says so; the first text stays, and what was measured is averaged. The
    merged costs are means already, so reprice before merging.
    """
    first: dict[str, int] = {}
    home = np.array([first.setdefault(normalise(full_text(p)), len(first)) for p in table.prompts], int)
    if len(first) == table.n:
        return table, 0
    keep = np.unique(home, return_index=True)[1]
    counts = np.bincount(home)[:, None]

    def mean(values: np.ndarray) -> np.ndarray:
        total = np.zeros((len(first), table.m))
        np.add.at(total, home, values)
        found = total / counts
        return (found if values.dtype.kind == "f" else np.rint(found)).astype(values.dtype)

    averaged = {name: mean(getattr(table, name))
                for name in ("quality", "cost", "quality_mean", "input_tokens", "output_tokens")}
    return replace(table.rows(keep), **averaged), table.n - len(keep)


def table_of_cache(cache: str | Path, pool: Pool | str | Path | None = None, models: Sequence[str] | None = None,
                   split_seed: int | None = None, quality: str = "mean") -> OutcomeTable:
    """A cache as sets are built from it: at these prices, for these models, divided as this seed divides it.

    quality: `mean` of all recorded samples, or `greedy`, sample 0 alone; `quality_mean` holds it either way.
    """
    _check_name("quality", quality, QUALITIES)
    table = OutcomeTable.load(cache, pool, models)
    if split_seed is not None:
        table = table.with_splits(seed_splits(table.prompts, split_seed))
    return replace(table, quality_mean=table.quality) if quality == "greedy" else table


def table_of_card(card: Mapping[str, Any], where: str, cache: str | Path = "") -> OutcomeTable:
    """The outcomes a set was made from, at the prices, for the models and with the splits of its card.

    `cache` stands in for the path in the card, where the cache has moved. Raises UserError when it is missing or holds
    other outcomes.
    """
    missing = [key for key in _SOURCE_KEYS if key not in card]
    if missing:
        raise UserError(f"{where}: `{missing[0]}` is missing, so the outcomes behind the set are not known; {_CURE}")
    table = table_of_cache(cache or card["cache"], pool_of_card(card, where), card["models"], card["split_seed"],
                           card.get("quality", "mean"))
    if table.fingerprint != card["cache_fingerprint"]:
        raise UserError(f"{where}: the set was made from other outcomes (fingerprint {card['cache_fingerprint']}) than "
                        f"{cache or card['cache']} holds now ({table.fingerprint}); {_CURE}")
    return table


def pool_of_card(card: Mapping[str, Any], where: str) -> Pool:
    """The pool, prices included, that a set's card holds. Raises UserError naming `where`."""
    entry = card.get("pool")
    if not isinstance(entry, Mapping) or not isinstance(entry.get("models"), list):
        raise UserError(f"{where}: the pool is damaged; {_CURE}")
    models = tuple(model_from_entry(model, f"{where}: pool.models[{i}]") for i, model in enumerate(entry["models"]))
    return Pool(str(entry.get("name", "")), models, str(entry.get("prices_dated", "")), where)


# --- rows -------------------------------------------------------------------------------------------------------------

def alpaca_rows(table: OutcomeTable, template: Template, targets: np.ndarray) -> list[dict[str, Any]]:
    """{instruction, response, prompt_id} of each prompt whose target is not -1."""
    return [{"instruction": template.render(full_text(prompt)), "response": template.answer(int(target)),
             "prompt_id": prompt.prompt_id}
            for prompt, target in zip(table.prompts, targets, strict=True) if target >= 0]


def dpo_rows(table: OutcomeTable, template: Template, pairs: Pairs) -> list[dict[str, Any]]:
    """{prompt, chosen, rejected, prompt_id, margin} of each pair: the prompt once, and two labels."""
    rows = []
    # Nine digits of the margin: JSON readers that are quick with numbers lose the last of seventeen.
    for i, chosen, rejected, margin in zip(pairs.prompt, pairs.chosen, pairs.rejected, pairs.margin, strict=True):
        prompt = table.prompts[i]
        rows.append({"prompt": template.render(full_text(prompt)), "chosen": template.answer(int(chosen)),
                     "rejected": template.answer(int(rejected)), "prompt_id": prompt.prompt_id,
                     "margin": float(f"{margin:.9g}")})
    return rows


def undersample(labels: Sequence[int] | np.ndarray, seed: int) -> np.ndarray:
    """Index of rows, in their order, that holds every occurring label equally often: as often as the rarest."""
    labels = np.asarray(labels)
    values, counts = np.unique(labels, return_counts=True)
    rng = np.random.default_rng([seed, 1])
    picked = [rng.choice(np.flatnonzero(labels == value), counts.min(), replace=False) for value in values]
    return np.sort(np.concatenate(picked)) if picked else np.empty(0, int)


def label_shares(labels: Collection[str], names: Mapping[str, str]) -> dict[str, float]:
    """Share of each name among the labels; `names` maps every label the template knows to what it stands for."""
    total = max(len(labels), 1)
    return {name: sum(label == key for label in labels) / total for key, name in names.items()}


# --- files ------------------------------------------------------------------------------------------------------------

def card_path(path: str | Path) -> Path:
    """NAME.card.json beside NAME.jsonl, NAME.jsonl.gz or NAME.json."""
    path = Path(path)
    stem = path.name.removesuffix(".gz").removesuffix(".jsonl").removesuffix(".json")
    return path.with_name(f"{stem}.card.json")


def write_set(path: str | Path, rows: Sequence[Mapping[str, Any]], card: Mapping[str, Any]) -> Path:
    """Write a set and its card, each whole or not at all; equal rows give equal bytes.

    `.json` gets one JSON list with a row per line, anything else JSON lines. A set is only as good as its card, so a
    card of older rows is removed before the rows are replaced.
    """
    path = Path(path)
    card_path(path).unlink(missing_ok=True)
    if path.suffix == ".json":
        lines = ",\n".join(json.dumps(dict(row), ensure_ascii=False, allow_nan=False) for row in rows)
        write_atomic(path, f"[\n{lines}\n]\n".encode("utf-8", "backslashreplace"))
    else:
        write_jsonl(path, map(dict, rows))
    write_json(card_path(path), card)
    return path


def read_set(path: str | Path, kind: str = "", skip_bad: int = 0,
             say: Say | None = None) -> tuple[list[dict[str, Any]], dict[str, Any] | None]:
    """(rows, card) of a set; the card is None where there is none beside the file.

    Every row is checked: the fields of its kind are texts that are not empty, the two answers of a pair differ and do
    not repeat the prompt, and where there is a card, each answer is a label of its template. UserError names file and
    line (file and row for a JSON list). Up to `skip_bad` bad rows are passed over instead, and each told to `say`.

    kind: "alpaca" or "dpo" where only one will do; "" takes what the card or the first row shows.
    """
    path = Path(path)
    card = read_card(path, kind)
    template = Template.from_card(card["template"], str(card_path(path))) if card else None
    kind = kind or (card["kind"] if card else "")
    rows: list[dict[str, Any]] = []
    skipped: list[str] = []

    def pass_over(error: UserError) -> None:
        if len(skipped) >= skip_bad:
            more = f" ({skip_bad} bad rows were skipped before it, as --skip_bad {skip_bad} allows)" if skip_bad else ""
            raise UserError(f"{error}{more}") from None
        skipped.append(str(error))
        if say:
            say(f"skipped: {error}")

    for where, row in _numbered_rows(path, pass_over):
        kind = kind or ("dpo" if {"prompt", "chosen", "rejected"} & set(row) else "alpaca")
        try:
            check_row(row, where, kind, template)
        except UserError as error:
            pass_over(error)
        else:
            rows.append(row)
    if not rows:
        bad = f" ({len(skipped)} skipped as bad)" if skipped else ""
        raise UserError(f"{path}: no usable row{bad}; rows with {', '.join(KINDS.get(kind, KINDS['alpaca']))} are "
                        "needed, as build_sets.py writes them")
    return rows, card


def read_card(path: str | Path, kind: str = "") -> dict[str, Any] | None:
    """The card of the set `path`, checked; None where there is none. Raises UserError."""
    need_file(path)
    file = card_path(path)
    if not file.is_file():
        return None
    card = parse_row(_decoded(file.read_bytes(), file), str(file))
    if card.get("kind") not in KINDS or not isinstance(card.get("template"), dict):
        seen = "has no template" if card.get("kind") in KINDS else f"kind is {card.get('kind')!r}, not alpaca or dpo"
        raise UserError(f"{file}: no card of a training set ({seen}); {_CURE}")
    if kind and card["kind"] != kind:
        raise UserError(f"{path}: a set of kind {card['kind']}, but {kind} rows ({', '.join(KINDS[kind])}) are needed "
                        "here; build_sets.py writes both kinds into one folder")
    return card


def check_row(row: Mapping[str, Any], where: str, kind: str, template: Template | None = None) -> None:
    """Raise UserError that starts with `where` unless the row can be trained on."""
    needed = KINDS[kind]
    for name in needed:
        check_present(row, name, needed, where)
        check_row_text(row[name], name, where)
    if kind == "alpaca" and row.get("input"):
        raise UserError(f"{where}: `input` would not be read; join it to `instruction`")
    asked, answers = row[needed[0]], needed[1:]
    if kind == "dpo":
        if row["chosen"].strip() == row["rejected"].strip():
            raise UserError(f"{where}: chosen and rejected are the same text, {short(row['chosen'])}; a pair needs a "
                            "better and a worse answer")
        labels = () if template is None else template.labels  # a prompt may be the text "1" and its answer too
        repeats = next((name for name in answers if row[name].startswith(asked) and row[name] not in labels), "")
        if repeats:
            raise UserError(f"{where}: `{repeats}` repeats the prompt, which training would join to it a second time; "
                            "keep the answer alone")
        margin = row.get("margin", 0.0)
        if isinstance(margin, bool) or not isinstance(margin, (int, float)) or not math.isfinite(margin):
            raise UserError(f"{where}: `margin` must be a finite number; got {short(margin)}")
    if template is not None:
        _check_against(template, asked, {name: row[name] for name in answers}, where)


def _check_against(template: Template, asked: str, answers: Mapping[str, str], where: str) -> None:
    for name, answer in answers.items():
        if template.parse(answer) is None:
            raise UserError(f"{where}: `{name}` {short(answer)} is none of the labels {', '.join(template.labels)} of "
                            "the card beside the file")
    try:
        template.prompt_of(asked)
    except UserError as error:
        raise UserError(f"{where}: {error}") from None


def _numbered_rows(path: Path, on_bad: Callable[[UserError], None]) -> Iterator[tuple[str, dict[str, Any]]]:
    """(where, row) of JSON lines, or of one JSON list in a file that begins with a bracket."""
    need_file(path)
    if path.suffix == ".json":
        raw = path.read_bytes()
        if raw.removeprefix(b"\xef\xbb\xbf").lstrip()[:1] == b"[":
            yield from _list_rows(_decoded(raw, path), path, on_bad)
            return
    for line, row in read_jsonl(path, on_bad):
        yield f"{path}:{line}", row


def _decoded(raw: bytes, path: Path) -> str:
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise UserError(f"{path}:{line}: not valid UTF-8 ({error.reason}); re-save the file as UTF-8") from None


def _list_rows(text: str, path: Path, on_bad: Callable[[UserError], None]) -> Iterator[tuple[str, dict[str, Any]]]:
    at, number = _skip_blanks(text, text.index("[") + 1), 0
    more = text[at:at + 1] != "]"
    while more:
        number += 1
        where = f"{path}: row {number}"
        end = _end_of_value(text, at, where)
        try:
            row = parse_row(text[at:end], where)
        except UserError as error:
            on_bad(error)
        else:
            yield where, row
        at = _skip_blanks(text, end)
        more = text[at:at + 1] == ","
        if not more and text[at:at + 1] != "]":
            what = f"found {text[at:at + 20]!r}" if text[at:] else "the file is cut off"
            raise UserError(f"{where}: a comma or the end of the list must follow it, but {what}; write the file again")
        at = _skip_blanks(text, at + 1) if more else at
    rest = text[_skip_blanks(text, at + 1):]
    if rest:
        raise UserError(f"{path}: text follows the end of the list ({rest[:40]!r}); remove it")


def _end_of_value(text: str, at: int, where: str) -> int:
    """Where the JSON value that begins at `at` ends. Raises UserError starting with `where`."""
    try:
        return json.JSONDecoder().raw_decode(text, at)[1]
    except json.JSONDecodeError as error:
        cut = error.pos >= len(text.rstrip()) or error.msg.startswith("Unterminated string")
        what = "the file is cut off in it" if cut else f"not JSON ({error.msg} in line {error.lineno})"
        raise UserError(f"{where}: {what}; write the file again") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where}: not readable ({error}); fix or remove the row") from None


def _skip_blanks(text: str, at: int) -> int:
    while at < len(text) and text[at] in " \t\r\n":
        at += 1
    return at
