"""build_sets.py as a user calls it: what it writes, what it refuses, and that splits and prices are what they say."""

from __future__ import annotations

import importlib.util
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import yaml
from planted import make_outcomes

from routewright import sets
from routewright.launch import run
from routewright.outcomes import OutcomeTable, read_outcomes, write_outcomes
from routewright.prompts import full_text, normalise, seed_splits
from routewright.templates import Template

POOL = {"name": "tiny",
        "models": [{"name": "cheap", "price_input": 0.1, "price_output": 0.4},
                   {"name": "strong", "price_input": 1.5, "price_output": 6.0}]}
FILES = {"alpaca_train.jsonl", "alpaca_dev.jsonl", "dpo_train_data.json", "dpo_dev_data.json"}
CALL = ["--cache", "cache"]
CARDS = {"alpaca_train.card.json", "alpaca_dev.card.json", "dpo_train_data.card.json", "dpo_dev_data.card.json"}


@pytest.fixture(scope="module")
def main(root):
    spec = importlib.util.spec_from_file_location("script_build_sets", root / "src" / "build_sets.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.main


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save_cache(make_outcomes(150, samples=2))
    return tmp_path / "cache"


def save_cache(outcomes, pool=POOL):
    Path("cache").mkdir(exist_ok=True)
    write_outcomes("cache/outcomes.jsonl", outcomes)
    Path("cache/pool.yaml").write_text(yaml.safe_dump(pool))


def build(main, *words: str, out: str = "out") -> dict[str, bytes]:
    """Files written by a call that must succeed."""
    assert run(main, [*CALL, "--output_dir", out, *words]) == 0
    return {p.name: p.read_bytes() for p in Path(out).iterdir()}


def refused(main, capsys, *words: str) -> str:
    """The one sentence of a call that must end in exit 2 with nothing written."""
    capsys.readouterr()
    given = [] if "--cache" in words else CALL[:2]
    assert run(main, [*given, "--output_dir", "out", *words]) == 2
    assert not Path("out").exists()
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith("error: ")
    return line


# --- what it writes ---------------------------------------------------------------------------------------------------

def test_files_cards_and_report(main, cache, capsys):
    written = build(main, "--reward_settings.cost_weight", ".3")
    assert set(written) == FILES | CARDS | {"config.resolved.yaml"}
    table = OutcomeTable.load("cache")
    told = capsys.readouterr().out
    for name in FILES:
        rows, card = sets.read_set(f"out/{name}")  # checks every row against the card
        split = "train" if "train" in name else "dev"
        known = {p.prompt_id: p for p in table.split(split).prompts}
        assert {row["prompt_id"] for row in rows} == set(known)
        template = Template.from_card(card["template"], name)
        for row in rows:
            asked = row["prompt" if card["kind"] == "dpo" else "instruction"]
            assert template.prompt_of(asked) == known[row["prompt_id"]].prompt
        assert card["split"] == split and card["models"] == ["cheap", "strong"] and card["cache"] == "cache"
        assert card["dev"] == name.replace("train", "dev") and card["cache_fingerprint"] == table.fingerprint
        assert card["unit_usd"] == pytest.approx(table.split("train").cost.mean(0).max())
        assert card["counts"]["rows"] == len(rows) and card["counts"]["prompts"] == len(known)
        for shares in card["counts"]["shares"].values():
            assert sum(shares.values()) == pytest.approx(1)
        assert f"out/{name}: {len(rows)} {'pairs' if card['kind'] == 'dpo' else 'rows'}" in told
    # The planted signal: `hard` prompts are for the strong model.
    rows, card = sets.read_set("out/alpaca_train.jsonl")
    right = np.mean([(row["response"] == "2") == ("hard" in row["instruction"]) for row in rows])
    assert right > 0.85
    assert card["counts"]["shares"]["response"]["strong"] == pytest.approx(
        np.mean([row["response"] == "2" for row in rows]))


def test_equal_calls_write_equal_bytes_and_older_files_leave(main, cache):
    first = build(main)
    assert build(main) == first
    again = build(main, out="elsewhere")
    again.pop("config.resolved.yaml"), first.pop("config.resolved.yaml")
    assert again == first
    assert set(build(main, "--mode", "difficulty")) == {n for n in FILES | CARDS if n.startswith("alpaca")} | {
        "config.resolved.yaml"}  # no pairs of an older call beside other rows


def test_the_test_split_is_never_read(main, cache):
    before = build(main)
    outcomes = [replace(o, quality=1 - o.quality, is_correct=not o.is_correct) if o.split == "test" else o
                for o in read_outcomes("cache")]
    save_cache(outcomes)
    after = build(main)
    assert all(before[name] == after[name] for name in FILES)
    texts = {split: {normalise(full_text(p)) for p in OutcomeTable.load("cache").split(split).prompts}
             for split in ("train", "dev", "test")}
    for name in FILES:
        rows, card = sets.read_set(f"out/{name}")
        template = Template.from_card(card["template"], name)
        seen = {normalise(template.prompt_of(row.get("prompt", row.get("instruction")))) for row in rows}
        split = "train" if "train" in name else "dev"
        assert seen <= texts[split] and not seen & texts["test"] and not seen & texts["dev" if split == "train"
                                                                                       else "train"]


def test_another_price_makes_other_pairs_and_calls_no_model(main, cache):
    before = build(main)
    newer = {**POOL, "models": [POOL["models"][0], {**POOL["models"][1], "price_input": 0.05, "price_output": 0.2}]}
    Path("newer.yaml").write_text(yaml.safe_dump(newer))
    after = build(main, "--pool", "newer.yaml")
    assert before["dpo_train_data.json"] != after["dpo_train_data.json"]
    pairs = [{(r["prompt_id"], r["chosen"]) for r in json.loads(files["dpo_train_data.json"])}
             for files in (before, after)]
    shares = [json.loads(files["dpo_train_data.card.json"])["counts"]["shares"]["chosen"]["strong"]
              for files in (before, after)]
    assert len(pairs[0] - pairs[1]) > 30 and shares[1] > shares[0] + 0.3  # the better model is now the cheaper one too
    card = json.loads(after["dpo_train_data.card.json"])
    assert card["pool"]["models"][1]["price_input"] == 0.05
    # The card leads back to the outcomes at those prices.
    assert sets.table_of_card(card, "card").cost[0, 1] < OutcomeTable.load("cache").cost[0, 1]


def test_cost_weight_0_asks_for_the_best_and_a_large_one_for_the_cheapest(main, cache, capsys):
    best = json.loads(build(main, "--reward_settings.cost_weight", "0")["dpo_train_data.card.json"])
    dear = json.loads(build(main, "--reward_settings.cost_weight", ".9")["dpo_train_data.card.json"])
    assert best["counts"]["shares"]["chosen"]["cheap"] < dear["counts"]["shares"]["chosen"]["cheap"]
    assert best["reward"]["cost_weight"] == 0 and dear["reward"]["cost_weight"] == 0.9


def test_dollars_and_presets_go_into_the_card(main, cache):
    files = build(main, "--reward", "xrouter_readme", "--cost_unit", "usd", "--pairs", "all_ordered")
    card = json.loads(files["dpo_train_data.card.json"])
    assert (card["cost_unit"], card["unit_usd"], card["options"]["pairs"]) == ("usd", 1.0, "all_ordered")
    assert card["reward"] == {**card["reward"], "name": "xrouter_readme", "kind": "capped", "cost_weight": 2.0,
                              "cost_max": 0.6}
    assert sets.reward_of_card(card, "card").cost_max == 0.6


def test_split_seed_divides_as_evaluation_does(main, cache):
    build(main, "--split_seed", "3")
    prompts = OutcomeTable.load("cache").prompts
    wanted = {p.prompt_id for p, s in zip(prompts, seed_splits(prompts, 3), strict=True) if s == "train"}
    rows, card = sets.read_set("out/alpaca_train.jsonl")
    assert {row["prompt_id"] for row in rows} == wanted and card["split_seed"] == 3
    assert {p.prompt_id for p in sets.table_of_card(card, "card").split("train").prompts} == wanted


def test_difficulty_levels_of_one_model(main, cache):
    build(main, "--mode", "difficulty", "--about", "cheap")
    rows, card = sets.read_set("out/alpaca_train.jsonl")
    table = sets.table_of_card(card, "card").split("train")
    assert {row["response"] for row in rows} == {"0", "4", "9"}  # two samples: 0, 4.5 and 9, halves to even
    level = dict(zip([p.prompt_id for p in table.prompts], 9 * (1 - table.quality_mean[:, 0]), strict=True))
    assert all(abs(int(row["response"]) - level[row["prompt_id"]]) <= 0.5 for row in rows)
    assert "for the model cheap?" in rows[0]["instruction"]


def test_models_quality_and_all_wrong_are_heeded(main, cache):
    build(main, "--models", "[strong,cheap]", "--quality", "greedy", "--all_wrong", "drop",
          "--reward_settings.cost_weight", "0.1")
    rows, card = sets.read_set("out/alpaca_train.jsonl")
    assert card["models"] == ["strong", "cheap"] and card["quality"] == "greedy"
    table = OutcomeTable.load("cache").split("train")
    lost = {p.prompt_id for p, q in zip(table.prompts, table.quality.max(1), strict=True) if q == 0}
    assert lost and card["dropped"]["all wrong"] == len(lost) and not lost & {row["prompt_id"] for row in rows}
    wanted = {p.prompt_id: "2" if q[0] == 1 else "1" for p, q in zip(table.prompts, table.quality, strict=True)}
    assert all(row["response"] == wanted[row["prompt_id"]] for row in rows)


def test_balance_and_max_rows_thin_train_alone(main, cache):
    whole = {n: json.loads(b)["counts"]["rows"] for n, b in build(main).items() if n in CARDS}
    build(main, "--balance", "undersample", "--max_rows", "40", "--seed", "5")
    for name in ("alpaca_train.jsonl", "dpo_train_data.json"):
        rows, card = sets.read_set(f"out/{name}")
        answer = "response" if card["kind"] == "alpaca" else "chosen"
        rare = whole[f"{name.split('.')[0]}.card.json"] - card["dropped"]["balanced away"]
        assert len(rows) == 40 and card["dropped"]["over max_rows"] == rare - 40
        assert 0.25 < np.mean([row[answer] == "1" for row in rows]) < 0.75
    for name in ("alpaca_dev", "dpo_dev_data"):
        assert json.loads(Path(f"out/{name}.card.json").read_text())["counts"]["rows"] == whole[f"{name}.card.json"]
    first = Path("out/alpaca_train.jsonl").read_bytes()
    assert build(main, "--max_rows", "40", "--seed", "6")["alpaca_train.jsonl"] != first


def test_duplicate_prompts_are_merged_and_counted(main, cache):
    outcomes = read_outcomes("cache")
    train = list(dict.fromkeys(o.prompt_id for o in outcomes if o.split == "train"))
    text = next(o.prompt for o in outcomes if o.prompt_id == train[0])
    save_cache([replace(o, prompt=text.upper()) if o.prompt_id == train[1] else o for o in outcomes])
    rows = json.loads(build(main, "--style", "bare")["dpo_train_data.json"])
    assert text in {row["prompt"] for row in rows} and text.upper() not in {row["prompt"] for row in rows}
    assert json.loads(Path("out/alpaca_train.card.json").read_text())["dropped"]["duplicate prompt"] == 1


def test_one_alpaca_file_alone(main, cache):
    assert run(main, ["--cache", "cache", "--output_dir", "out", "--alpaca_file", "rows/mine.jsonl", "--max_rows",
                      "30"]) == 0
    assert sorted(p.name for p in Path("rows").iterdir()) == ["mine.card.json", "mine.jsonl"]
    rows, card = sets.read_set("rows/mine.jsonl", "alpaca")
    assert len(rows) == 30 and card["dev"] == "" and not Path("out").exists()


def test_others_can_load_what_is_written(main, cache, tmp_path):
    """The files are plain enough for `datasets`, with the columns TRL's trainers want and every text unchanged."""
    import datasets

    outcomes = read_outcomes("cache")
    text = "Show that \\boxed{41} \\frac{1}{2}\n\tand \u2028 \u00e9 \U0001f600 \"quoted\" \\n \\u0041 stay"
    first = next(o.prompt_id for o in outcomes if o.split == "train")
    save_cache([replace(o, prompt=text) if o.prompt_id == first else o for o in outcomes])
    for style in ("full", "bare"):
        build(main, "--style", style)
        for name, needed in (("dpo_train_data.json", {"prompt", "chosen", "rejected"}),
                             ("alpaca_train.jsonl", {"instruction", "response"})):
            loaded = datasets.load_dataset("json", data_files=f"out/{name}", cache_dir=str(tmp_path / "hf"))["train"]
            rows, card = sets.read_set(f"out/{name}")
            assert needed < set(loaded.column_names) and list(loaded) == rows
            asked = [row[sorted(needed & {"prompt", "instruction"})[0]] for row in loaded
                     if row["prompt_id"] == first]
            template = Template.from_card(card["template"], name)
            assert asked and {template.prompt_of(a) for a in asked} == {text}
            assert all(text not in row.get("chosen", "") + row.get("rejected", "") for row in rows)
        assert rb"\\boxed{41} \\frac{1}{2}\n\tand" in Path("out/dpo_train_data.json").read_bytes()


# --- what it refuses --------------------------------------------------------------------------------------------------

@pytest.mark.parametrize(("words", "said"), [
    ("--reward offline_dop", "did you mean 'offline_dpo'?"),
    ("--reward_settings.cost_wieght 1", "did you mean 'cost_weight'?"),
    ("--reward_settings.cost_weight -1", "cost_weight must be a number, 0 or more; got -1"),
    ("--models [cheap,strnog]", "'strnog' was never recorded (did you mean 'strong'?)"),
    ("--models [cheap]", "--models needs two or more different models"),
    ("--models [cheap,cheap]", "--models needs two or more different models"),
    ("--mode difficulty --about strnog", "'strnog', which is not among the models"),
    ("--about cheap", "--about names the model of --mode difficulty"),
    ("--pairs best", "best"),
    ("--min_margin -0.5", "--min_margin must be 0 or more"),
    ("--max_rows -1", "--max_rows must be 0 (all) or more"),
    ("--alpaca_file rows.txt", "name a file that ends in .jsonl"),
    ("--pool nowhere.yaml", "nowhere.yaml: no such file"),
    ("--cache nowhere", "nowhere: no such outcome cache"),
])
def test_mistakes_in_options_are_named(main, cache, capsys, words, said):
    assert said in refused(main, capsys, *words.split())


def test_nothing_left_is_refused_with_the_reasons(main, cache, capsys):
    line = refused(main, capsys, "--min_margin", "5", "--all_wrong", "drop")
    assert "no pair is left of" in line and "below margin" in line and "all wrong" in line and "--min_margin" in line
    save_cache([replace(o, quality=0.0, is_correct=False) for o in read_outcomes("cache")])
    assert "no row is left of" in refused(main, capsys, "--all_wrong", "drop")


def test_one_answer_for_everything_is_refused(main, cache, capsys):
    line = refused(main, capsys, "--reward_settings.cost_weight", "100")
    assert "the response is 'cheap' in all" in line and "cost weight" in line
    line = refused(main, capsys, "--mode", "difficulty", "--about", "strong", "--cache", flat_cache())
    assert "the response is '0' in all" in line


def flat_cache() -> str:
    Path("flat").mkdir()
    write_outcomes("flat/outcomes.jsonl", [replace(o, quality=1.0) for o in read_outcomes("cache")])
    Path("flat/pool.yaml").write_text(yaml.safe_dump(POOL))
    return "flat"


def test_a_lopsided_set_is_a_warning(main, cache, capsys):
    build(main, "--reward_settings.cost_weight", ".99", "--quality", "greedy")
    assert "warning" not in capsys.readouterr().err
    outcomes = read_outcomes("cache")
    hard = {o.prompt_id for o in outcomes if "hard" in o.prompt.split()}
    keep = set(sorted(hard)[:6])
    save_cache([o for o in outcomes if o.prompt_id not in hard - keep])
    build(main)
    err = capsys.readouterr().err
    assert "warning: 'cheap' is 9" in err and "--balance undersample" in err


def test_prompts_in_two_splits_are_refused(main, cache, capsys):
    outcomes = read_outcomes("cache")
    by_split = {s: next(o.prompt_id for o in outcomes if o.split == s) for s in ("train", "dev", "test")}
    for a, b in (("train", "dev"), ("train", "test"), ("dev", "test")):
        text = next(o.prompt for o in outcomes if o.prompt_id == by_split[a])
        save_cache([replace(o, prompt=f"{text.upper()}!", group="") if o.prompt_id == by_split[b] else o
                    for o in outcomes])
        line = refused(main, capsys)
        assert f"prompts of cache ({a}) stand in its" in line and "1 exact" in line and by_split[b] in line


def test_splits_that_are_missing_are_told(main, cache, capsys):
    outcomes = read_outcomes("cache")
    save_cache([replace(o, split="") for o in outcomes])
    assert "no prompt is in split train (found: unassigned); divide it with --split_seed 0" in refused(main, capsys)
    save_cache([o for o in outcomes if o.split == "train"])
    assert set(build(main)) == {n for n in FILES | CARDS if "train" in n} | {"config.resolved.yaml"}
    assert "warning: cache has no dev split" in capsys.readouterr().err
    assert sets.read_set("out/alpaca_train.jsonl")[1]["dev"] == ""


def test_half_a_surrogate_pair_is_refused_by_name(main, cache, capsys):
    outcomes = read_outcomes("cache")
    first = next(o.prompt_id for o in outcomes if o.split == "train")
    save_cache([replace(o, prompt=o.prompt + "\ud83d") if o.prompt_id == first else o for o in outcomes])
    assert f"cache: prompt_id '{first}': prompt holds half of a surrogate pair" in refused(main, capsys)


def test_a_card_knows_when_its_cache_has_changed(main, cache):
    build(main)
    card = sets.read_card("out/alpaca_train.jsonl")
    table = sets.table_of_card(card, "card")
    rewards = sets.reward_table(table.split("train"), sets.reward_of_card(card, "card"), unit_usd=card["unit_usd"])
    targets = sets.decision_targets(rewards, table.split("train").cost)
    rows, _ = sets.read_set("out/alpaca_train.jsonl")
    assert [int(row["response"]) - 1 for row in rows] == targets.tolist()
    save_cache([replace(o, response="another") if i == 0 else o for i, o in enumerate(read_outcomes("cache"))])
    with pytest.raises(sets.UserError, match="card: the set was made from other outcomes"):
        sets.table_of_card(card, "card")
    for key in ("cache", "pool", "models"):
        with pytest.raises(sets.UserError, match=f"card: .*{key}"):
            sets.table_of_card({k: v for k, v in card.items() if k != key}, "card")


# --- what is shipped --------------------------------------------------------------------------------------------------

def test_the_shipped_rows_are_what_their_config_makes(main, root, tmp_path, monkeypatch):
    monkeypatch.chdir(root)
    made = tmp_path / "sample_alpaca_data.jsonl"
    assert run(main, ["--config", "configs/build_sets/sample_alpaca.yaml", "--output_dir", str(tmp_path / "none"),
                      "--alpaca_file", str(made)]) == 0
    shipped = root / "data" / "sample_alpaca_data.jsonl"
    assert shipped.read_bytes() == made.read_bytes() and shipped.stat().st_size < 150_000
    assert sets.card_path(shipped).read_bytes() == sets.card_path(made).read_bytes()


def test_the_shipped_rows_teach_decisions_and_all_of_them(root, monkeypatch):
    monkeypatch.chdir(root)
    rows, card = sets.read_set("data/sample_alpaca_data.jsonl", "alpaca")
    assert 200 <= len(rows) <= 400 and card["dev"] == ""
    counts = np.bincount([int(row["response"]) for row in rows], minlength=4)[1:]
    assert (counts >= 10).all() and counts.max() / len(rows) < 0.65
    train = sets.table_of_card(card, "card").split("train")
    texts = {p.prompt_id: p.prompt for p in train.prompts}
    assert all(texts[row["prompt_id"]] == row["instruction"] for row in rows)
    # The rows are worth learning: following them beats any one model, in reward, on these prompts.
    rewards = sets.reward_table(train, sets.reward_of_card(card, "card"), unit_usd=card["unit_usd"])
    at = {p.prompt_id: i for i, p in enumerate(train.prompts)}
    index = [at[row["prompt_id"]] for row in rows]
    followed = np.mean([rewards[i, int(row["response"]) - 1] for i, row in zip(index, rows, strict=True)])
    assert followed > rewards[index].mean(0).max() + 0.1
