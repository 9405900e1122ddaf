"""Turn an outcome cache into what language models are trained on as routers: Alpaca rows and preference pairs.

What a row teaches is the decision, never the answer to the question: its response (or chosen and rejected) is one
label of the template, the number of a model. A model of the pool that is also the base model in training thereby
learns when to answer directly. Departures from the two sources:

- CoBench trains its LLM router on answers and asks it for a difficulty later; here the response is the decision
  (`--mode decision`) or the difficulty (`--mode difficulty`) itself
- the offline DPO data know one fixed remote call and no cost; here every model of the pool is a choice and
  R = correct * (K - cost_weight * cost) ranks them, expected over all recorded samples
- the prompt stands once, in `prompt`, and nothing in it is interpreted: a backslash stays a backslash

Run it:
  python src/build_sets.py                                        (the sample cache -> data/sets/sample)
  python src/build_sets.py --cache data/outcomes/mine --output_dir data/sets/mine --reward offline_dpo
  python src/build_sets.py --pool newer_prices.yaml ...           (the same answers at other prices: other pairs)

Reads the cache: train prompts for the train files, dev prompts for the dev files. Of test prompts only the texts are
looked at, to make sure that none stands in train or dev. Writes `alpaca_train.jsonl`, `alpaca_dev.jsonl` (instruction,
response, prompt_id), and in decision mode `dpo_train_data.json`, `dpo_dev_data.json` (prompt, chosen, rejected,
prompt_id, margin), each with a card `<stem>.card.json`. Prints the share of every label and what was dropped and why.

Cost is counted in units of the dearest model's mean cost on train prompts, so a cost weight means the same for any
pool: at 1, an answer of the dearest model costs as much as a right answer is worth. `--cost_unit usd` counts dollars.

2,000 prompts x 3 models x 3 samples take 1.5 seconds of one core.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from routewright import sets
from routewright.errors import UserError
from routewright.launch import launch
from routewright.outcomes import OutcomeTable
from routewright.prompts import check_no_overlap, check_text, full_text
from routewright.reward import Reward
from routewright.routers.base import pool_card
from routewright.sets import TOP_SHARE
from routewright.templates import Template
from routewright.training import console

FILES = {("alpaca", "train"): "alpaca_train.jsonl", ("alpaca", "dev"): "alpaca_dev.jsonl",
         ("dpo", "train"): "dpo_train_data.json", ("dpo", "dev"): "dpo_dev_data.json"}


def main(
    *,
    # Files
    cache: str = "data/sample",  # outcome cache: a folder or a file
    pool: str | None = None,  # pool file with prices; by default the pool.yaml beside the cache
    output_dir: str = "data/sets/sample",  # folder of the sets
    alpaca_file: str = "",  # write the Alpaca train rows to this file instead, and nothing else
    # What is asked
    mode: Literal["decision", "difficulty"] = "decision",  # which model should answer, or how hard is it, 0 to 9
    # full: the question and the models are put before the prompt; bare: the prompt alone, for very small base models
    style: Literal["full", "bare"] = "full",
    about: str = "",  # difficulty for this model; empty: mean over the pool
    models: list[str] | None = None,  # models to choose from, in this order; by default all of the cache
    # What is better
    reward: str = "linear",  # a preset: linear, binary, capped, offline_dpo, xrouter_readme, xrouter_code, a2c
    reward_settings: dict | None = None,  # settings of it to replace, e.g. --reward_settings.cost_weight 0.3
    cost_unit: Literal["dearest", "usd"] = "dearest",  # what a cost of 1 is: the dearest model's mean, or a dollar
    quality: Literal["mean", "greedy"] = "mean",  # mean of all recorded samples, or the greedy one alone
    all_wrong: Literal["cheapest", "drop"] = "cheapest",  # prompts that no model answers right
    # Pairs
    pairs: Literal["best_vs_each", "adjacent", "all_ordered"] = "best_vs_each",  # which models are set against which
    min_margin: float = 0.0,  # least difference of reward; above 0 equally good models make no pair
    # Rows
    split_seed: int | None = None,  # divide the prompts anew, as evaluate.py --seeds does; none: the recorded splits
    balance: Literal["none", "undersample"] = "none",  # undersample: every label (or chosen) equally often in train
    max_rows: int = 0,  # at most so many train rows or pairs, drawn at random; 0: all
    seed: int = 0,  # of those draws
) -> None:
    """Turn an outcome cache into Alpaca rows and preference pairs whose answers are routing decisions."""
    chosen_reward = Reward.named(reward, **(reward_settings or {}))
    check_options(locals())
    say = console()
    table = sets.table_of_cache(cache, pool, models, split_seed, quality)
    parts, merged = divide(table, cache, say)
    template = Template.of_pool(table.pool, table.models, mode, style, about)
    unit = sets.cost_unit_of(parts["train"], cost_unit)
    rules = Rules(chosen_reward, unit, pairs, min_margin, all_wrong, balance, max_rows, seed)
    kinds = ("alpaca", "dpo") if mode == "decision" and not alpaca_file else ("alpaca",)
    built = {(kind, split): build(kind, split, part, template, rules) for kind in kinds
             for split, part in parts.items() if split == "train" or not alpaca_file}
    for one in built.values():
        one.dropped["duplicate prompt"] = merged[one.split]
        check(one, say)

    base = {"template": template.as_card(), "pool": pool_card(table.pool), "models": list(table.models),
            "reward": sets.reward_card(reward, chosen_reward), "cost_unit": cost_unit, "unit_usd": unit,
            "quality": quality, "cache": cache, "cache_fingerprint": table.fingerprint, "split_seed": split_seed,
            "options": {"pairs": pairs, "min_margin": min_margin, "all_wrong": all_wrong, "balance": balance,
                        "max_rows": max_rows, "seed": seed}}
    print(f"{table.n} prompts x {table.m} models of {cache}; one unit of cost is {unit:.3g} USD")
    write(built, base, Path(output_dir), alpaca_file)


# --- options and prompts ----------------------------------------------------------------------------------------------

def check_options(given: dict[str, Any]) -> None:
    """What options allow only together. Raises UserError."""
    if given["about"] and given["mode"] == "decision":
        raise UserError("--about names the model of --mode difficulty; a decision is about all of them")
    if not 0 <= given["min_margin"]:
        raise UserError(f"--min_margin must be 0 or more; got {given['min_margin']}")
    if given["max_rows"] < 0:
        raise UserError(f"--max_rows must be 0 (all) or more; got {given['max_rows']}")
    if given["models"] is not None and len(set(given["models"])) < max(2, len(given["models"])):
        raise UserError(f"--models needs two or more different models to choose from; got {given['models']}")
    file = given["alpaca_file"]
    if file and (not file.endswith(".jsonl") or Path(file).is_dir()):
        raise UserError(f"--alpaca_file {file}: name a file that ends in .jsonl")


def divide(table: OutcomeTable, cache: str, say: sets.Say) -> tuple[dict[str, OutcomeTable], dict[str, int]]:
    """({"train", "dev"} -> their outcomes with each prompt once, rows merged away); no prompt stands in two splits."""
    if "train" not in table.splits:
        found = ", ".join(name or "unassigned" for name in table.splits)
        raise UserError(f"{cache}: no prompt is in split train (found: {found}); divide it with --split_seed 0")
    if "dev" not in table.splits:
        say(f"warning: {cache} has no dev split, so no dev files are written; --split_seed 0 divides it anew")
    texts = {split: [p for p in table.prompts if p.split == split] for split in ("train", "dev", "test")}
    for split in ("train", "dev"):
        for prompt in texts[split]:
            check_text(full_text(prompt), f"{cache}: prompt_id {prompt.prompt_id!r}")
    check_no_overlap(texts["train"], texts["dev"] + texts["test"], f"{cache} (train)", "its dev or test split")
    check_no_overlap(texts["dev"], texts["test"], f"{cache} (dev)", "its test split")
    parts, merged = {}, {}
    for split in ("train", "dev"):
        if texts[split]:
            parts[split], merged[split] = sets.merge_duplicates(table.split(split))
    return parts, merged


# --- rows -------------------------------------------------------------------------------------------------------------

class Rules(NamedTuple):
    """How outcomes become rows; `unit` is USD per unit of cost."""

    reward: Reward
    unit: float
    pairs: str
    min_margin: float
    all_wrong: str
    balance: str
    max_rows: int
    seed: int


class Built(NamedTuple):
    """One file to be: its rows, the share of each label in its answers, and how many were dropped for which reason."""

    kind: str
    split: str
    prompts: int
    rows: list[dict[str, Any]]
    shares: dict[str, dict[str, float]]
    dropped: dict[str, int]


def build(kind: str, split: str, table: OutcomeTable, template: Template, rules: Rules) -> Built:
    """The rows of one file from the outcomes of its split. Only train is thinned out."""
    rewards = sets.reward_table(table, rules.reward, unit_usd=rules.unit)
    if kind == "dpo":
        found = sets.preference_pairs(rewards, table.cost, table.quality_mean, policy=rules.pairs,
                                      min_margin=rules.min_margin, all_wrong=rules.all_wrong)
        dropped, labels = dict(found.dropped), found.chosen
    else:
        if template.mode == "difficulty":
            targets = sets.difficulty_targets(table, template.about)
        else:
            targets = sets.decision_targets(rewards, table.cost, rules.all_wrong, table.quality_mean)
        dropped, labels = {"all wrong": int((targets < 0).sum())}, targets[targets >= 0]
    keep = np.arange(len(labels))
    if split == "train":
        keep, thinned = thin(labels, rules)
        dropped |= thinned
    if kind == "dpo":
        rows = sets.dpo_rows(table, template, found.take(keep))
    else:
        kept = np.flatnonzero(targets >= 0)[keep]
        rows = sets.alpaca_rows(table.rows(kept), template, targets[kept])
    names = dict(zip(template.labels, template.models if template.mode == "decision" else template.labels, strict=True))
    answers = sets.KINDS[kind][1:]
    shares = {name: sets.label_shares([row[name] for row in rows], names) for name in answers}
    return Built(kind, split, table.n, rows, shares, dropped)


def thin(labels: np.ndarray, rules: Rules) -> tuple[np.ndarray, dict[str, int]]:
    """(index of the rows to keep, rows left out by reason): balanced first, then cut to the largest number."""
    keep, left = np.arange(len(labels)), {}
    if rules.balance == "undersample":
        keep = sets.undersample(labels, rules.seed)
        left["balanced away"] = len(labels) - len(keep)
    if rules.max_rows and len(keep) > rules.max_rows:
        left["over max_rows"] = len(keep) - rules.max_rows
        rng = np.random.default_rng([rules.seed, 2])
        keep = np.sort(rng.choice(keep, rules.max_rows, replace=False))
    return keep, left


def check(built: Built, say: sets.Say) -> None:
    """UserError where the train rows can teach nothing; a warning where one label holds nearly all of them."""
    what = "pair" if built.kind == "dpo" else "row"
    reasons = ", ".join(f"{reason} {n}" for reason, n in built.dropped.items())
    shares = built.shares[sets.KINDS[built.kind][1]]
    top, share = max(shares.items(), key=lambda item: item[1])
    cure = "change --reward or its cost weight (--reward_settings.cost_weight), --min_margin, --all_wrong or --models"
    if not built.rows:
        if built.split == "train":
            raise UserError(f"no {what} is left of {built.prompts} train prompts (dropped: {reasons}); {cure}")
        say(f"warning: no {what} is left of {built.prompts} dev prompts (dropped: {reasons}); no dev file is written")
    elif share == 1.0 and built.split == "train":
        raise UserError(f"{'chosen' if what == 'pair' else 'the response'} is {top!r} in all {len(built.rows)} train "
                        f"{what}s, so there is nothing to decide; {cure}")
    elif share > TOP_SHARE:
        say(f"warning: {top!r} is {share:.0%} of what the {built.split} {what}s teach; a router may learn nothing "
            f"else: {cure}, or set --balance undersample")


# --- files ------------------------------------------------------------------------------------------------------------

def write(built: dict[tuple[str, str], Built], base: dict[str, Any], folder: Path, alpaca_file: str) -> None:
    """Write every set with its card, remove those that an older call left in the folder, and print the report."""
    kept = {key: one for key, one in built.items() if one.rows}
    for key, name in FILES.items():
        if key not in kept and not alpaca_file:
            sets.card_path(folder / name).unlink(missing_ok=True)
            (folder / name).unlink(missing_ok=True)
    for (kind, split), one in kept.items():
        path = Path(alpaca_file) if alpaca_file else folder / FILES[kind, split]
        twin = FILES[kind, "dev"] if (kind, "dev") in kept else ""
        card = {**base, "kind": kind, "split": split, "dev": twin, "dropped": one.dropped,
                "counts": {"prompts": one.prompts, "rows": len(one.rows), "shares": one.shares}}
        sets.write_set(path, one.rows, card)
        print(report(path, one))


def report(path: Path, one: Built) -> str:
    """Rows, drops by reason, and the share of each label, as lines for a person."""
    reasons = ", ".join(f"{reason} {n}" for reason, n in one.dropped.items() if n) or "nothing"
    lines = [f"{path}: {len(one.rows)} {'pairs' if one.kind == 'dpo' else 'rows'} of {one.prompts} prompts "
             f"(dropped: {reasons})"]
    lines += [f"  {name:<9} " + "  ".join(f"{label} {share:.1%}" for label, share in shares.items())
              for name, shares in one.shares.items()]
    return "\n".join(lines)


if __name__ == "__main__":
    launch(main)
