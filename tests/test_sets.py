"""Sets for language models: rewards to targets and pairs by hand and by property, and every way a set file is bad."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from planted import make_table

from routewright import sets
from routewright.errors import UserError
from routewright.outcomes import OutcomeTable
from routewright.pool import Pool
from routewright.reward import PRESETS, Reward
from routewright.schema import ModelSpec, Outcome, TokenUsage
from routewright.templates import Template

COST = np.array([0.1, 0.4, 1.0])  # of one answer of cheap, mid, strong, in units of the dearest
QUALITY = np.array([
    [1.0, 1.0, 1.0],
    [0.0, 1.0, 1.0],
    [0.0, 0.0, 1.0],
    [0.0, 0.0, 0.0],
    [2 / 3, 1 / 3, 1.0]])
TEXTS = [r"Simplify $\frac{2}{4}$ and \boxed{it}", "two\nlines", "drei Äpfel 苹果", "four", "Prompt:\nfive"]


def table_of(quality: np.ndarray = QUALITY, samples: int = 3, split: str = "train", prices=(1.0, 4.0, 10.0)):
    """Outcomes with these mean qualities over `samples` right or wrong answers; every call reads 100 tokens."""
    names = ("cheap", "mid", "strong")
    pool = Pool("hand", tuple(ModelSpec(n, p, 0.0) for n, p in zip(names, prices, strict=True)))
    outcomes = [Outcome(f"p{i}", TEXTS[i], name, "answer", None, float(s < round(quality[i, j] * samples)),
                        TokenUsage(100, 0), split=split, sample=s)
                for i in range(len(quality)) for j, name in enumerate(names) for s in range(samples)]
    return OutcomeTable.from_outcomes(outcomes, pool)


TEMPLATE = Template("decision", ("cheap", "mid", "strong"), "bare")


# --- rewards by hand --------------------------------------------------------------------------------------------------

def test_expected_rewards_in_units_of_the_dearest_model():
    table = table_of()
    assert sets.cost_unit_of(table) == pytest.approx(1e-3) and sets.cost_unit_of(table, "usd") == 1.0
    linear = sets.reward_table(table, Reward("linear", cost_weight=0.5))
    np.testing.assert_allclose(linear, [[.95, .8, .5], [-.05, .8, .5], [-.05, -.2, .5], [-.05, -.2, -.5],
                                        [2 / 3 - .05, 1 / 3 - .2, .5]], atol=1e-12)
    binary = sets.reward_table(table, PRESETS["offline_dpo"])
    np.testing.assert_allclose(binary, [[.99, .96, .9], [0, .96, .9], [0, 0, .9], [0, 0, 0], [.66, .32, .9]],
                               atol=1e-12)
    capped = sets.reward_table(table, PRESETS["xrouter_code"])  # 1 - min(3 cost, .8)
    np.testing.assert_allclose(capped[[0, 4]], [[.7, .2, .2], [2 / 3 * .7, 1 / 3 * .2, .2]], atol=1e-12)
    a2c = sets.reward_table(table, Reward.named("a2c", token_budget=200))  # 100 of 200 tokens, strong = dearest
    np.testing.assert_allclose(a2c[1], [-.005, .995, .295], atol=1e-12)


def test_the_expected_reward_is_the_mean_reward_of_the_samples():
    table = table_of()
    for name in ("binary", "capped", "linear", "offline_dpo", "xrouter_readme"):
        reward = PRESETS[name]
        single = [[np.mean([reward.of(float(s < round(q * 3)), c) for s in range(3)])
                   for q, c in zip(row, COST, strict=True)] for row in QUALITY]
        np.testing.assert_allclose(sets.reward_table(table, reward), single, atol=1e-12)


def test_prices_that_move_together_change_nothing_and_dev_is_counted_in_the_unit_of_train():
    reward = Reward("linear", cost_weight=0.5)
    rewards, dearer = (sets.reward_table(table_of(prices=p), reward) for p in ((1, 4, 10), (7.2, 28.8, 72)))
    np.testing.assert_allclose(rewards, dearer, atol=1e-12)
    in_usd, dearer_usd = (sets.reward_table(table_of(prices=p), reward, "usd") for p in ((1, 4, 10), (7.2, 28.8, 72)))
    assert np.abs(in_usd - dearer_usd).max() > 1e-3
    np.testing.assert_allclose(in_usd, QUALITY - 0.5 * COST * 1e-3, atol=1e-12)
    train, dev = table_of(), table_of(prices=(2, 8, 20))  # as if dev answers were twice as long
    unit = sets.cost_unit_of(train)
    np.testing.assert_allclose(sets.reward_table(dev, reward, unit_usd=unit), QUALITY - COST, atol=1e-12)


def test_a_pool_that_costs_nothing_is_judged_by_quality_alone():
    free = table_of(prices=(0, 0, 0))
    assert sets.cost_unit_of(free) == 1.0
    np.testing.assert_allclose(sets.reward_table(free, PRESETS["linear"]), QUALITY, atol=1e-12)
    with pytest.raises(UserError, match="did you mean 'dearest'"):
        sets.cost_unit_of(free, "dearst")


# --- targets and pairs by hand ----------------------------------------------------------------------------------------

LINEAR = QUALITY - 0.5 * COST
BINARY = QUALITY * (1 - 0.1 * COST)
CHEAP, MID, STRONG = range(3)


def as_tuples(pairs: sets.Pairs) -> list[tuple[int, int, int]]:
    return list(zip(pairs.prompt.tolist(), pairs.chosen.tolist(), pairs.rejected.tolist(), strict=True))


def test_targets_by_hand():
    assert sets.decision_targets(LINEAR, COST).tolist() == [CHEAP, MID, STRONG, CHEAP, CHEAP]
    assert sets.decision_targets(BINARY, COST).tolist() == [CHEAP, MID, STRONG, CHEAP, STRONG]
    assert sets.decision_targets(LINEAR, COST, "drop", QUALITY).tolist() == [CHEAP, MID, STRONG, -1, CHEAP]
    # Right for the same reward: the cheaper one, wherever it stands.
    assert sets.decision_targets(np.ones((1, 3)), COST[::-1]).tolist() == [2]
    assert sets.decision_targets(np.ones((1, 3)), np.ones(3)).tolist() == [0]


@pytest.mark.parametrize(("policy", "wanted"), [
    ("best_vs_each", [(0, CHEAP, MID), (0, CHEAP, STRONG), (1, MID, STRONG), (1, MID, CHEAP), (2, STRONG, CHEAP),
                      (2, STRONG, MID), (3, CHEAP, MID), (3, CHEAP, STRONG), (4, CHEAP, STRONG), (4, CHEAP, MID)]),
    ("adjacent", [(0, CHEAP, MID), (0, MID, STRONG), (1, MID, STRONG), (1, STRONG, CHEAP), (2, STRONG, CHEAP),
                  (2, CHEAP, MID), (3, CHEAP, MID), (3, MID, STRONG), (4, CHEAP, STRONG), (4, STRONG, MID)]),
    ("all_ordered", [(0, CHEAP, MID), (0, CHEAP, STRONG), (0, MID, STRONG), (1, MID, STRONG), (1, MID, CHEAP),
                     (1, STRONG, CHEAP), (2, STRONG, CHEAP), (2, STRONG, MID), (2, CHEAP, MID), (3, CHEAP, MID),
                     (3, CHEAP, STRONG), (3, MID, STRONG), (4, CHEAP, STRONG), (4, CHEAP, MID), (4, STRONG, MID)])])
def test_pairs_by_hand(policy, wanted):
    pairs = sets.preference_pairs(LINEAR, COST, QUALITY, policy=policy)
    assert as_tuples(pairs) == wanted
    assert pairs.dropped == {"all wrong": 0, "tie": 0, "below margin": 0}
    np.testing.assert_allclose(pairs.margin, [LINEAR[i, a] - LINEAR[i, b] for i, a, b in wanted], atol=1e-12)


def test_equal_rewards_are_ordered_by_cost_and_equal_costs_too_make_no_pair():
    # Binary: two wrong answers both earn 0, whatever they cost; the cheaper wrong one is preferred.
    pairs = sets.preference_pairs(BINARY, COST, QUALITY, policy="all_ordered")
    assert (2, CHEAP, MID) in as_tuples(pairs) and pairs.dropped["tie"] == 0 and len(pairs) == 15
    same_price = np.array([0.1, 1.0, 1.0])
    pairs = sets.preference_pairs(QUALITY, same_price, QUALITY, policy="all_ordered")
    # mid and strong cost the same; they are equally good on prompts 0, 1 and 3
    assert pairs.dropped == {"all wrong": 0, "tie": 3, "below margin": 0} and len(pairs) == 12
    assert not {(0, MID, STRONG), (1, MID, STRONG), (3, MID, STRONG)} & set(as_tuples(pairs))


def test_small_margins_and_prompts_nobody_answers_are_dropped_and_counted():
    pairs = sets.preference_pairs(LINEAR, COST, QUALITY, min_margin=0.2, all_wrong="drop")
    # margins: .15 .45 | .3 .85 | .55 .7 | all wrong | .1167 .4833
    assert as_tuples(pairs) == [(0, CHEAP, STRONG), (1, MID, STRONG), (1, MID, CHEAP), (2, STRONG, CHEAP),
                                (2, STRONG, MID), (4, CHEAP, MID)]
    assert pairs.dropped == {"all wrong": 1, "tie": 0, "below margin": 2}
    kept = sets.preference_pairs(BINARY, COST, QUALITY, min_margin=0.01)
    assert 3 not in kept.prompt and kept.dropped["below margin"] == 2  # all wrong: equal rewards, ordered by cost only


def test_a_changed_price_changes_the_pairs():
    reward = Reward("linear", cost_weight=0.5)
    table = table_of()
    dearer = table.reprice(Pool("new", tuple(replace(m, price_input=30.0) if m.name == "cheap" else m
                                             for m in table.pool.models)))
    before, after = (as_tuples(sets.preference_pairs(sets.reward_table(t, reward), t.cost, t.quality_mean))
                     for t in (table, dearer))
    assert (0, CHEAP, MID) in before and (0, MID, CHEAP) in after


def test_unknown_policies_are_named():
    for key in ("policy", "all_wrong"):
        with pytest.raises(UserError, match="is not one of"):
            sets.preference_pairs(LINEAR, COST, QUALITY, **{key: "best"})


def test_difficulty_levels():
    table = table_of()
    assert sets.difficulty_targets(table, "cheap").tolist() == [0, 9, 9, 9, 3]
    assert sets.difficulty_targets(table).tolist() == [0, 3, 6, 9, 3]
    with pytest.raises(UserError, match="did you mean 'cheap'"):
        sets.difficulty_targets(table, "chaep")


# --- properties -------------------------------------------------------------------------------------------------------

@st.composite
def outcomes(draw):
    n, m = draw(st.integers(1, 5)), draw(st.integers(2, 5))
    grid = lambda *values: np.array(draw(st.lists(st.sampled_from(values), min_size=n * m, max_size=n * m)))
    return grid(0.0, 1 / 3, 2 / 3, 1.0).reshape(n, m), grid(0.0, 0.1, 0.1 + 1e-13, 0.5, 1.0).reshape(n, m)


@settings(max_examples=150, deadline=None)
@given(outcomes(), st.sampled_from(["linear", "binary", "capped"]), st.sampled_from([0.0, 0.1, 1.0, 5.0]),
       st.sampled_from(sets.PAIR_POLICIES), st.sampled_from([0.0, 0.2]), st.sampled_from(sets.ALL_WRONG))
def test_pairs_prefer_reward_then_cost_and_targets_are_best(drawn, kind, weight, policy, min_margin, all_wrong):
    quality, cost = drawn
    rewards = Reward(kind, cost_weight=weight, cost_max=0.8).of(quality, cost, correct=quality >= 0.5)
    pairs = sets.preference_pairs(rewards, cost, quality, policy=policy, min_margin=min_margin, all_wrong=all_wrong)
    for i, a, b, margin in zip(pairs.prompt, pairs.chosen, pairs.rejected, pairs.margin, strict=True):
        assert a != b and margin >= min_margin and margin == pytest.approx(rewards[i, a] - rewards[i, b], abs=1e-8)
        assert rewards[i, a] > rewards[i, b] + 1e-9 or cost[i, a] < cost[i, b]
        assert all_wrong == "cheapest" or quality[i].max() > 0
    assert len(set(as_tuples(pairs))) == len(pairs)
    n, m = quality.shape
    lost = pairs.dropped["all wrong"]
    assert lost == (0 if all_wrong == "cheapest" else (quality.max(1) == 0).sum())
    per_prompt = m * (m - 1) // 2 if policy == "all_ordered" else m - 1
    assert len(pairs) + pairs.dropped["tie"] + pairs.dropped["below margin"] == (n - lost) * per_prompt

    targets = sets.decision_targets(rewards, cost, all_wrong, quality)
    for i, target in enumerate(targets):
        if target == -1:
            assert all_wrong == "drop" and quality[i].max() == 0
            continue
        assert rewards[i, target] == pytest.approx(rewards[i].max(), abs=1e-8)
        equal = np.abs(rewards[i] - rewards[i, target]) < 1e-10
        assert cost[i, target] <= cost[i, equal].min() + 1e-12
        if policy == "best_vs_each":  # the two kinds of set teach the same
            assert set(pairs.chosen[pairs.prompt == i]) <= {target}


@settings(max_examples=60, deadline=None)
@given(outcomes())
def test_cost_weight_zero_picks_the_best_quality_and_a_huge_one_the_cheapest(drawn):
    quality, cost = drawn
    rows = np.arange(len(quality))
    best = sets.decision_targets(Reward("linear", cost_weight=0.0).of(quality, cost), cost)
    np.testing.assert_allclose(quality[rows, best], quality.max(1))
    cheapest = sets.decision_targets(Reward("linear", cost_weight=1e6).of(quality, cost), cost)
    np.testing.assert_allclose(cost[rows, cheapest], cost.min(1), atol=1e-5)


# --- prompts and rows -------------------------------------------------------------------------------------------------

def test_duplicate_prompts_are_merged_into_their_mean():
    table = make_table(20)
    prompts = list(table.prompts)
    prompts[5] = replace(prompts[5], prompt=prompts[2].prompt.upper() + " ?")
    prompts[9] = replace(prompts[9], prompt=prompts[2].prompt)
    twice = replace(table, prompts=prompts)
    merged, gone = sets.merge_duplicates(twice)
    assert gone == 2 and merged.n == 18 and merged.prompts[2] == prompts[2]
    np.testing.assert_allclose(merged.quality_mean[2], table.quality_mean[[2, 5, 9]].mean(0))
    np.testing.assert_allclose(merged.cost[2], table.cost[[2, 5, 9]].mean(0))
    assert merged.input_tokens.dtype == table.input_tokens.dtype
    np.testing.assert_array_equal(merged.quality_mean[3], table.quality_mean[3])
    assert sets.merge_duplicates(table) == (table, 0)


def test_rows_hold_the_prompt_once_and_a_label():
    table = table_of()
    pairs = sets.preference_pairs(LINEAR, COST, QUALITY)
    for template in (TEMPLATE, Template.of_pool(table.pool, table.models)):
        rows = sets.dpo_rows(table, template, pairs)
        assert len(rows) == len(pairs)
        for row, i in zip(rows, pairs.prompt, strict=True):
            assert template.prompt_of(row["prompt"]) == TEXTS[i] and row["prompt"].count(TEXTS[i]) == 1
            assert row["chosen"] in template.labels and row["rejected"] in template.labels
            assert TEXTS[i] not in row["chosen"] + row["rejected"] and row["prompt_id"] == f"p{i}"
        rows = sets.alpaca_rows(table, template, np.array([0, -1, 2, 1, -1]))
        assert [(r["prompt_id"], template.parse(r["response"])) for r in rows] == [("p0", 0), ("p2", 2), ("p3", 1)]


def test_undersampling_levels_the_labels_and_depends_on_the_seed_alone():
    labels = np.array([0] * 50 + [2] * 7 + [1] * 20)
    keep = sets.undersample(labels, 3)
    assert np.bincount(labels[keep]).tolist() == [7, 7, 7] and (np.diff(keep) > 0).all()
    np.testing.assert_array_equal(keep, sets.undersample(labels, 3))
    assert keep.tolist() != sets.undersample(labels, 4).tolist()
    assert len(sets.undersample([], 0)) == 0


# --- files ------------------------------------------------------------------------------------------------------------

CARD = {"kind": "alpaca", "template": TEMPLATE.as_card(), "note": "é"}
ALPACA = [{"instruction": text, "response": str(i % 3 + 1)} for i, text in enumerate(TEXTS)]
DPO = [{"prompt": text, "chosen": str(i % 3 + 1), "rejected": str((i + 1) % 3 + 1)} for i, text in enumerate(TEXTS)]
NAMES = ["set.jsonl", "set.jsonl.gz", "set.json"]
# What JSON carries and a tokenizer reads: all but lone surrogates; a text must hold more than white space.
TEXT = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=40).filter(str.strip)


@pytest.mark.parametrize("name", NAMES)
def test_a_set_comes_back_as_it_was_written_in_equal_bytes(tmp_path, name):
    for kind, rows in (("alpaca", ALPACA), ("dpo", DPO)):
        card = {**CARD, "kind": kind}
        file = sets.write_set(tmp_path / name, rows, card)
        assert file == tmp_path / name and (tmp_path / "set.card.json").is_file()
        assert sets.read_set(file) == (rows, card) == sets.read_set(file, kind)
        first = file.read_bytes()
        assert sets.write_set(tmp_path / name, rows, card).read_bytes() == first
        (tmp_path / "set.card.json").unlink()
        assert sets.read_set(file) == (rows, None)


def test_backslashes_stand_in_the_file_as_they_were_typed(tmp_path):
    text = "\\boxed{41} \\frac \\\\ \\n not a newline, \b a backspace"
    for name in ("a.jsonl", "a.json"):
        file = sets.write_set(tmp_path / name, [{"instruction": text, "response": "1"}], CARD)
        assert rb"\\boxed{41} \\frac \\\\ \\n not" in file.read_bytes()
        assert sets.read_set(file)[0][0]["instruction"] == text


@settings(max_examples=80, deadline=None)
@given(st.lists(st.tuples(TEXT, st.sampled_from("123")), min_size=1, max_size=4), st.sampled_from(NAMES))
def test_any_text_survives_the_file(tmp_path_factory, drawn, name):
    rows = [{"instruction": text, "response": label} for text, label in drawn]
    file = sets.write_set(tmp_path_factory.getbasetemp() / name, rows, CARD)
    assert sets.read_set(file) == (rows, CARD)


def damaged(row: dict, **change) -> dict:
    return {k: v for k, v in {**row, **change}.items() if v is not ...}


BAD_ALPACA = [
    (damaged(ALPACA[0], response=...), "`response` is missing"),
    (damaged(ALPACA[0], response=..., respond="1"), "`response` is missing (did you mean 'respond'?)"),
    (damaged(ALPACA[0], response=""), "`response` must be a text that is not empty"),
    (damaged(ALPACA[0], instruction=" \n"), "`instruction` must be a text that is not empty"),
    (damaged(ALPACA[0], response=2), "got int 2"),
    (damaged(ALPACA[0], instruction=None), "got NoneType None"),
    (damaged(ALPACA[0], instruction=[{"role": "user", "content": "x"}]), "got list"),
    (damaged(ALPACA[0], instruction="half \ud83d"), "half of a surrogate pair"),
    (damaged(ALPACA[0], input="more"), "`input` would not be read"),
    (damaged(ALPACA[0], response="7"), "`response` str '7' is none of the labels 1, 2, 3"),
    (damaged(ALPACA[0], response="cheap"), "none of the labels"),
]
BAD_DPO = [
    (damaged(DPO[0], rejected=...), "`rejected` is missing"),
    (damaged(DPO[0], rejected=None), "`rejected` must be a text"),
    (damaged(DPO[0], rejected=DPO[0]["chosen"]), "chosen and rejected are the same text"),
    (damaged(DPO[0], rejected=DPO[0]["chosen"] + " "), "chosen and rejected are the same text"),
    (damaged(DPO[0], chosen=DPO[0]["prompt"] + "1"), "`chosen` repeats the prompt"),
    (damaged(DPO[0], rejected="I can solve this"), "none of the labels"),
    (damaged(DPO[0], margin="much"), "`margin` must be a finite number"),
    (damaged(DPO[0], margin=True), "`margin` must be a finite number"),
]


@pytest.mark.parametrize("name", ["set.jsonl", "set.json"])
@pytest.mark.parametrize(("kind", "good", "bad", "said"), [("alpaca", ALPACA, *case) for case in BAD_ALPACA]
                         + [("dpo", DPO, *case) for case in BAD_DPO])
def test_every_bad_row_is_named_and_can_be_skipped(tmp_path, name, kind, good, bad, said):
    file = sets.write_set(tmp_path / name, [good[0], good[1], bad, good[2]], {**CARD, "kind": kind})
    where = f"{file}:3: " if name.endswith("l") else f"{file}: row 3: "
    with pytest.raises(UserError) as caught:
        sets.read_set(file)
    assert str(caught.value).startswith(where) and said in str(caught.value)
    told = []
    rows, _ = sets.read_set(file, skip_bad=1, say=told.append)
    assert rows == [good[0], good[1], good[2]] and told == [f"skipped: {caught.value}"]


LINE = json.dumps(ALPACA[1])


@pytest.mark.parametrize(("raw", "said"), [
    (b"", ": the file is empty"),
    (b"\xef\xbb\xbf  \n", ": the file is empty"),
    (b'{"instruction": "a", "response": "1"}\n{"instruction": "b", "resp', ":2: not JSON"),
    (b'{"instruction": "a", "response": "1"}\n[1]\n', ":2: expected a JSON object, got list"),
    (b'{"instruction": "a", "instruction": "b", "response": "1"}\n', ":1: key 'instruction' stands twice"),
    (b'{"instruction": "a", "response": NaN}\n', ":1: NaN is no JSON number"),
    (b'{"instruction": "a", "response": "1"}\n{"instruction": "\xff", "response": "1"}\n', ":2: not valid UTF-8"),
    (b"[" * 100_000 + b"\n", ":1: nested too deeply"),
])
def test_damaged_json_lines_are_named_with_their_line(tmp_path, raw, said):
    (tmp_path / "a.jsonl").write_bytes(raw)
    with pytest.raises(UserError) as caught:
        sets.read_set(tmp_path / "a.jsonl")
    assert str(caught.value).startswith(f"{tmp_path / 'a.jsonl'}{said}")


@pytest.mark.parametrize(("raw", "said"), [
    (b"[]", ": no usable row; rows with instruction, response are needed"),
    (b" [ ] \n", ": no usable row"),
    (b'[{"instruction": "a", "response": "1"}, {"instruction": "b", "resp', ": row 2: the file is cut off in it"),
    (b'[{"instruction": "a", "response": "1"},', ": row 2: the file is cut off"),
    (b'[{"instruction": "a", "response": "1"}', ": row 1: a comma or the end of the list must follow it, but the file "
                                              "is cut off"),
    (b'[{"instruction": "a", "response": "1"} {"b"', ": row 1: a comma or the end of the list must follow"),
    (b'[{"instruction": "a", "response": "1"},\n]', ": row 2: not JSON (Expecting value in line 2)"),
    (b'[{"instruction": "a", "response": "1"}, 7]', ": row 2: expected a JSON object, got int"),
    (b'[{"instruction": "a", "response": "1"}, [7]]', ": row 2: expected a JSON object, got list"),
    (b'[{"instruction": "a", "response": "1", "response": "2"}]', ": row 1: key 'response' stands twice"),
    (b'[{"instruction": "a", "response": -Infinity}]', ": row 1: -Infinity is no JSON number"),
    (b'[{"instruction": "a", "response": "1"}] tail', ": text follows the end of the list ('tail')"),
    (b'[{"instruction": "a",\n"response": "\xff"}]', ":2: not valid UTF-8"),
    (b"[" * 100_000, ": row 1: "),
    (b'[{"instruction": "a", "response": ' + b"9" * 5000 + b"}]", ": row 1: not readable"),
])
def test_damaged_json_lists_are_named_with_their_row(tmp_path, raw, said):
    file = tmp_path / "a.json"
    file.write_bytes(raw)
    with pytest.raises(UserError) as caught:
        sets.read_set(file)
    assert str(caught.value).startswith(f"{file}{said}"), caught.value


def test_a_prompt_may_be_a_label_itself(tmp_path):
    rows = [{"prompt": "1", "chosen": "1", "rejected": "2"}]
    file = sets.write_set(tmp_path / "a.json", rows, {**CARD, "kind": "dpo"})
    assert sets.read_set(file)[0] == rows


def test_other_shapes_of_good_files_are_read(tmp_path):
    mark = b"\xef\xbb\xbf"
    cases = {"bom.jsonl": mark + LINE.encode(), "blank.jsonl": f"\n{LINE}\n\n".encode(),
             "bom.json": mark + f"\n[{LINE}]".encode(), "lines.json": f"{LINE}\n".encode(),
             "wide.json": json.dumps([ALPACA[1]], indent=4).encode(), "crlf.jsonl": f"{LINE}\r\n".encode()}
    for name, raw in cases.items():
        (tmp_path / name).write_bytes(raw)
        assert sets.read_set(tmp_path / name) == ([ALPACA[1]], None), name


def test_skipping_stops_at_its_number_and_leaves_something(tmp_path):
    bad = BAD_ALPACA[0][0]
    file = sets.write_set(tmp_path / "a.jsonl", [bad, ALPACA[0], bad, bad], CARD)
    with pytest.raises(UserError, match=r"a.jsonl:4: .*\(2 bad rows were skipped before it, as --skip_bad 2 allows\)"):
        sets.read_set(file, skip_bad=2)
    file = sets.write_set(tmp_path / "b.jsonl", [bad, bad], CARD)
    with pytest.raises(UserError, match=r"no usable row \(2 skipped as bad\)"):
        sets.read_set(file, skip_bad=5)


def test_a_row_that_another_template_wrote_is_refused(tmp_path):
    full = Template.of_pool(table_of().pool, ("cheap", "mid", "strong"))
    file = sets.write_set(tmp_path / "a.jsonl", ALPACA, {**CARD, "template": full.as_card()})
    with pytest.raises(UserError, match=r"a.jsonl:1: the instruction .* was not made by this template"):
        sets.read_set(file)


@pytest.mark.parametrize(("text", "said"), [
    ("{}", "no card of a training set (kind is None"),
    ('{"kind": "sft", "template": {}}', "kind is 'sft'"),
    ('{"kind": "alpaca"}', "has no template"),
    ('{"kind": "alpaca", "template": {"mode": "decision"}}', "the template is damaged"),
    ('{"kind": "alpaca", ', "not JSON"),
    ("[]", "expected a JSON object"),
])
def test_a_damaged_card_is_named(tmp_path, text, said):
    file = sets.write_set(tmp_path / "a.jsonl", ALPACA, CARD)
    (tmp_path / "a.card.json").write_text(text)
    with pytest.raises(UserError) as caught:
        sets.read_set(file)
    assert str(caught.value).startswith(str(tmp_path / "a.card.json")) and said in str(caught.value)


def test_a_set_of_the_other_kind_and_a_missing_one_are_named(tmp_path):
    file = sets.write_set(tmp_path / "alpaca.jsonl", ALPACA, CARD)
    with pytest.raises(UserError, match=r"a set of kind alpaca, but dpo rows \(prompt, chosen, rejected\) are needed"):
        sets.read_set(file, "dpo")
    with pytest.raises(UserError, match=r"no such file \(did you mean 'alpaca.jsonl'\?\)"):
        sets.read_set(tmp_path / "alpacca.jsonl")
    with pytest.raises(UserError, match="is a folder"):
        sets.read_set(tmp_path)


def test_rewards_survive_their_card():
    for name, reward in PRESETS.items():
        card = {"reward": json.loads(json.dumps(sets.reward_card(name, reward), allow_nan=False))}
        assert sets.reward_of_card(card, "here") == reward
    for broken in (None, {"kind": "linaer"}, {"kind": "linear", "wieght": 1}):
        with pytest.raises(UserError, match="here: the reward is damaged"):
            sets.reward_of_card({"reward": broken}, "here")
