"""What a language-model trainer reads first: cards, twins and splits that would give a wrong router are refused."""

from __future__ import annotations

import json

import numpy as np
import pytest

from routewright import sets, training_sets
from routewright.errors import UserError
from routewright.outcomes import write_outcomes
from routewright.reward import Reward
from routewright.routers.base import pool_card
from routewright.samplepool import THINGS
from routewright.schema import Outcome, TokenUsage
from routewright.templates import Template
from routewright.textfiles import write_jsonl

POOL = """name: t
prices_dated: 2026-11-20
models:
  - {name: a, price_input: 0.1, price_output: 0.4}
  - {name: b, price_input: 0.5, price_output: 2.0}
  - {name: c, price_input: 1.5, price_output: 6.0}
"""
QUALITY = {"a": .2, "b": .5, "c": .9}


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    """Three models, each with its own quality and price, so that a swap of columns shows."""
    folder, random = tmp_path_factory.mktemp("cache"), np.random.default_rng(0)
    write_outcomes(folder / "outcomes.jsonl.gz", [
        Outcome(f"p{i}", f"{i} {THINGS[i % 20]}.", name, "x", right, float(right), TokenUsage(10, 10), task="t",
                group=f"g{i}", split=("train", "dev")[i % 2], reference="x", sample=0, grader="exact")
        for i in range(80) for name, chance in QUALITY.items() for right in [bool(random.random() < chance)]])
    (folder / "pool.yaml").write_text(POOL)
    return folder


@pytest.fixture
def built(tmp_path, cache):
    """(path of the train rows, its card); the twin lies beside it."""
    table = sets.table_of_cache(cache)
    template = Template.of_pool(table.pool, table.models, "decision", "bare")
    reward, unit = Reward.named("linear"), sets.cost_unit_of(table.split("train"))
    for split in ("dev", "train"):
        part = table.split(split)
        targets = sets.decision_targets(sets.reward_table(part, reward, unit_usd=unit), part.cost)
        card = {"kind": "alpaca", "template": template.as_card(), "pool": pool_card(part.pool),
                "models": list(part.models), "reward": sets.reward_card("linear", reward), "cost_unit": "dearest",
                "unit_usd": unit, "quality": "mean", "cache": str(cache), "cache_fingerprint": part.fingerprint,
                "split": split, "split_seed": None, "counts": {}, "dropped": {}, "dev": "dev.jsonl"}
        sets.write_set(tmp_path / f"{split}.jsonl", sets.alpaca_rows(part, template, targets), card)
    return tmp_path / "train.jsonl", card


def read(path, val="", say=print):
    return training_sets.read_with_twin("alpaca", str(path), val, lambda rows: (rows[9:], rows[:9]), 0, say)


def filled(path, card, cache=""):
    source = training_sets.TrainingSet(str(path), [], [], Template.from_card(card["template"], "x"))
    training_sets.add_outcomes(source, card, cache, print)
    return source


def test_columns_are_the_templates_models_whatever_order_the_card_lists(built):
    path, card = built
    plain = filled(path, card)
    turned = filled(path, {**card, "models": ["c", "a", "b"],
                           "template": {**card["template"], "models": ["b", "c", "a"]}})
    assert turned.table.models == turned.dev_table.models == ("b", "c", "a")
    assert np.allclose(turned.rewards, plain.rewards[:, [1, 2, 0]]) and len(set(plain.rewards.mean(0))) == 3
    assert turned.table.quality.mean(0).argmax() == 1


def test_prices_are_those_of_the_card_not_of_the_cache_now(built, cache, tmp_path):
    path, card = built
    moved = tmp_path / "moved"
    moved.mkdir()
    (moved / "outcomes.jsonl.gz").write_bytes((cache / "outcomes.jsonl.gz").read_bytes())
    (moved / "pool.yaml").write_text(POOL.replace("price_output: 0.4", "price_output: 40"))
    assert np.array_equal(filled(path, card, str(moved)).rewards, filled(path, card).rewards)


@pytest.mark.parametrize("name", ["cache", "split", "cost_unit", "unit_usd", "pool", "reward"])
def test_a_damaged_card_is_one_sentence(built, name):
    path, card = built
    with pytest.raises(UserError, match=r"train.jsonl: .*build the set again"):
        filled(path, {k: v for k, v in card.items() if k != name})


def test_a_unit_of_cost_that_is_no_number_is_refused(built):
    path, card = built
    for unit in (0, "much", None, float("nan")):
        with pytest.raises(UserError, match="unit_usd of its card must be a number above 0"):
            filled(path, {**card, "unit_usd": unit})


def test_rows_of_the_dev_split_calibrate_and_do_not_train(built):
    path, _ = built
    card = json.loads((path.parent / "dev.card.json").read_text())
    with pytest.raises(UserError, match="rows of split dev, which calibrates the router or tests it"):
        filled(path.with_name("dev.jsonl"), card)


def test_a_card_without_a_twin_holds_a_part_out(built):
    path, card = built
    sets.card_path(path).write_text(json.dumps({k: v for k, v in card.items() if k != "dev"}))
    assert [len(part) for part in read(path)[:2]] == [31, 9]


def test_validation_rows_without_a_card_are_checked_against_the_template(built, tmp_path):
    path, _ = built
    (tmp_path / "more").mkdir()
    for answer, told in (("7", "row 2: `response` str '7' is none of the labels 1, 2, 3"), ("3", "")):
        rows = [{"instruction": "Why?", "response": "1"}, {"instruction": "How?", "response": answer}]
        val = str(write_jsonl(tmp_path / "more" / "val.jsonl", rows))
        if told:
            with pytest.raises(UserError, match=told):
                read(path, val)
        else:
            assert read(path, val)[1] == rows


def test_a_prompt_that_both_sides_hold_is_named(built):
    path, _ = built
    with pytest.raises(UserError, match=r"row 1: this instruction is also among the training rows \(.*row 1\), as are "
                                        "39 more"):
        read(path, str(path))
