"""The script that compares two prompt sets: every format it reads, what it prints, and its exit codes."""

from __future__ import annotations

import importlib.util
import json

import pytest
from planted import make_outcomes

from routewright.launch import run
from routewright.outcomes import write_outcomes
from routewright.textfiles import write_jsonl

TEXTS = ["How many pears are left in the bag of Ann now?", "Which hour does the old clock of Ben show then?",
         "What was the secret number that Eva thought of?"]
FORMATS = {
    "prompts": [{"prompt_id": f"q{i}", "prompt": text, "reference": "1"} for i, text in enumerate(TEXTS)],
    "instructions": [{"instruction": text} for text in TEXTS],
    "cobench": [{"question": text, "llm_id": name, "label": 1} for text in TEXTS for name in ("cheap", "strong")],
    "alpaca": [{"instruction": text, "response": "cheap"} for text in TEXTS],
    "alpaca output": [{"instruction": text, "input": "", "output": "cheap"} for text in TEXTS],
    "cache": [{"prompt_id": f"q{i}", "prompt": text, "model_name": name} for i, text in enumerate(TEXTS)
              for name in ("cheap", "strong")],
}


@pytest.fixture(scope="module")
def main(root):
    spec = importlib.util.spec_from_file_location("check_leaks", root / "src" / "check_leaks.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.main


def check(main, capsys, *words) -> tuple[int, str, str]:
    code = run(main, [str(word) for word in words])
    said = capsys.readouterr()
    return code, said.out, said.err


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_is_read_and_each_prompt_counts_once(main, capsys, tmp_path, name):
    write_jsonl(tmp_path / "a.jsonl", FORMATS[name])
    write_jsonl(tmp_path / "b.jsonl.gz", [{"prompt": TEXTS[1].upper(), "prompt_id": "mine"}])
    code, out, err = check(main, capsys, "--a", tmp_path / "a.jsonl", "--b", tmp_path / "b.jsonl.gz",
                           "--output", tmp_path / "o.json")
    assert code == 3 and "3 prompts" in out and "shared: 1 exact, 0 near, 0 group" in out
    assert TEXTS[1] in out and "b mine: " in out and err.splitlines()[-1].startswith("stopped: 1 of 3 prompts")
    found = json.loads((tmp_path / "o.json").read_text())
    assert found["counts"] == {"exact": 1, "near": 0, "group": 0} and found["prompts_a"] == 3
    assert found["overlaps"][0]["b_id"] == "mine" and found["overlaps"][0]["a_text"] == TEXTS[1]


def test_near_duplicates_and_groups_count_and_may_be_left_out(main, capsys, tmp_path):
    long = "the brown fox walks over the hill and meets a small dog that sleeps beside the river in the morning sun"
    write_jsonl(tmp_path / "a.jsonl", [{"prompt": long}, {"prompt": TEXTS[0], "group": "g"}])
    write_jsonl(tmp_path / "b.jsonl", [{"prompt": f"{long} today"}, {"prompt": TEXTS[2], "group": "g"}])
    words = "--a", tmp_path / "a.jsonl", "--b", tmp_path / "b.jsonl"
    code, out, _ = check(main, capsys, *words)
    assert code == 3 and "0 exact, 1 near, 1 group" in out
    code, out, _ = check(main, capsys, *words, "--near", "false", "--show", 0)
    assert code == 3 and "0 exact, 0 near, 1 group" in out and "fox" not in out


def test_two_splits_of_one_cache(main, capsys, tmp_path):
    outcomes = make_outcomes(60)
    write_outcomes(tmp_path, outcomes)
    words = "--a", tmp_path, "--split_a", "test", "--split_b", "train", "--output", tmp_path / "o.json"
    code, out, err = check(main, capsys, *words)
    assert code == 0 and "shared: 0 exact, 0 near, 0 group" in out and "stopped" not in err
    assert json.loads((tmp_path / "o.json").read_text())["overlaps"] == []
    test = next(o.prompt for o in outcomes if o.split == "test")
    train = next(o.prompt_id for o in outcomes if o.split == "train")
    for outcome in outcomes:
        outcome.prompt = test if outcome.prompt_id == train else outcome.prompt
    write_outcomes(tmp_path, outcomes)
    assert check(main, capsys, *words)[0] == 3


@pytest.mark.parametrize(("words", "said"), [
    ("--a {0} --b {0}", "give two files, or two splits"),
    ("--a {0}", "give two files, or two splits"),
    ("--a {0} --split_a test", "give two files, or two splits"),
    ("--a {0} --split_a test --split_b train", "no prompt in split 'test' (it has: unassigned 3)"),
    ("--a {0} --b {1}/none.jsonl", "no such file"),
    ("--a {0} --b {1}", "no outcome cache in this folder"),
    ("--a {0} --b {0} --threshold 2", "give two files"),
    ("--b {0}", "--a is needed"),
])
def test_mistakes(main, capsys, tmp_path, words, said):
    write_jsonl(tmp_path / "a.jsonl", FORMATS["prompts"])
    code, _, err = check(main, capsys, *words.format(tmp_path / "a.jsonl", tmp_path).split())
    assert code == 2 and said in err.splitlines()[-1]


def test_the_shipped_splits_share_nothing(main, capsys, root):
    for other in ("train", "dev"):
        assert check(main, capsys, "--a", root / "data/sample", "--split_a", "test", "--split_b", other)[0] == 0
