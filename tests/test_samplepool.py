"""The sample pool: problems are right and repeatable, the tokenizer reloads whole, training resumes bit for bit."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from dataclasses import replace

import pytest

from routewright import samplepool as pool_of
from routewright.errors import PartialRun, UserError
from routewright.grading import grade

ODD_TEXTS = ("Hello, 250 Wörld!! 12.5 x1 007 'tis ~|{}", "3 pens",
             "\n\ta  b\r\n", "東京 🙂 1999 -4", " 7", "Answer: 199200")


@pytest.fixture(scope="module")
def tokenizer():
    return pool_of.build_tokenizer(pool_of.vocabulary_texts())


def test_problems_are_worked_right_and_stay_in_range():
    for problem in pool_of.make_problems("test", 3000):
        value = None
        for line in problem.working:
            a, op, b, c = re.fullmatch(r"(\d+) ([-+*/]) (\d+) = (\d+)", line).groups()
            a, b = int(a), int(b)
            assert {"+": a + b, "-": a - b, "*": a * b, "/": a / max(1, b)}[op] == int(c), problem
            assert value is None or value == a, problem
            value = int(c)
        assert value is None or value == problem.answer
        assert all(0 <= int(n) <= pool_of.LARGEST for n in re.findall(r"\d+", problem.text + problem.solution(True)))
        assert grade("number", problem.solution(True), str(problem.answer)).correct
        assert grade("number", problem.solution(False), str(problem.answer)).correct


def test_counting_stories_tell_the_sum_that_was_worked():
    """Read the story independently: the sentences alone lead to the answer."""
    words = {"finds": 1, "buys": 1, "gets": 1, "gives": 1, "loses": -1, "sells": -1, "drops": -1}
    for problem in pool_of.make_problems("stories", 300, {"count": 1.0}):
        if problem.distractors:
            continue
        first, *rest = problem.text.split(". ")
        value = int(re.search(r"\d+", first)[0])
        for line in rest[:-1]:
            number = re.search(r"\d+", line)
            if "twice" in line or "doubles" in line:
                value *= 2
            elif "half" in line:
                value //= 2
            elif line.endswith("away"):
                value -= int(number[0])
            else:
                value += int(number[0]) * next(sign for word, sign in words.items() if word in line)
        assert value == problem.answer, problem


def test_clock_answers_are_hours():
    for problem in pool_of.make_problems("clock", 300, {"clock": 1.0}):
        now, k = [int(n) for n in re.findall(r"\d+", problem.text)]
        back = " ago" in problem.text or " before" in problem.text
        assert problem.answer == (now + (-k if back else k) - 1) % 12 + 1, problem


def test_problems_repeat_by_seed_and_leave_out_what_is_held_out():
    first = pool_of.make_problems("a", 200)
    assert first == pool_of.make_problems("a", 200) != pool_of.make_problems("b", 200)
    held = {p.text for p in first}
    assert not held & {p.text for p in pool_of.make_problems("a", 200, exclude=held)}
    with pytest.raises(UserError, match="ask for fewer"):
        pool_of.make_problems("a", 100, {"clock": 1.0}, exclude=_Everything())


class _Everything:
    def __contains__(self, text):
        return True


def test_prompt_ids_tell_the_difficulty():
    problem = pool_of.make_problems("ids", 1, {"money": 1.0})[0]
    prompt = problem.as_prompt(7)
    assert pool_of.difficulty(prompt.prompt_id) == {
        "task": "money", "steps": problem.steps, "distractors": problem.distractors,
        "size": "large" if problem.large else "small"}
    assert prompt.task == "money" and prompt.reference == str(problem.answer)
    with pytest.raises(UserError, match="was not made by the sample pool"):
        pool_of.difficulty("gsm8k-1")


def test_length_says_little_about_difficulty():
    """Long easy and short hard problems exist in number, or a router of length alone would do."""
    problems = pool_of.make_problems("length", 3000)
    words = {task: [len(p.text.split()) for p in problems if p.task == task] for task in pool_of.TASKS}
    mean = {task: sum(v) / len(v) for task, v in words.items()}
    assert mean["lookup"] > mean["compare"] > mean["riddle"]


def test_tokenizer_reloads_the_same_through_every_loader(tokenizer, tmp_path):
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    from routewright.encoders import load_tokenizer
    recipe = pool_of.QUICK_RECIPES[0]
    pool_of.save_model(pool_of.make_model(recipe, tokenizer), tokenizer, tmp_path)
    texts = [f"{pool_of.chat_text(p.text)} {p.solution(True)}<eos>" for p in pool_of.make_problems("tokens", 500)]
    loaded = [AutoTokenizer.from_pretrained(tmp_path), PreTrainedTokenizerFast.from_pretrained(tmp_path),
              load_tokenizer(tmp_path)]
    for text in [*texts, *ODD_TEXTS]:
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        assert tokenizer.unk_token_id not in ids
        for other in loaded:
            assert other(text, add_special_tokens=False)["input_ids"] == ids
            assert other.decode(ids) == text
    for other in loaded:
        assert (other.pad_token, other.bos_token, other.eos_token, other.unk_token) == pool_of.SPECIAL_TOKENS[:4]
        assert other.padding_side == "left"


def test_words_and_numbers_are_one_token_each(tokenizer):
    for problem in pool_of.make_problems("one token", 300, {**pool_of.CACHE_MIX, "clock": 0.0}):
        pieces = re.findall(r"[^\W\d]+|\d+|[^\w\s]", problem.text)
        assert len(tokenizer(f" {problem.text}", add_special_tokens=False)["input_ids"]) == len(pieces), problem.text
    for n in range(pool_of.LARGEST + 1):
        assert len(tokenizer(f" {n}", add_special_tokens=False)["input_ids"]) == 1


def test_chat_template_is_what_training_uses(tokenizer):
    turn = [{"role": "user", "content": " How many? "}]
    asked = tokenizer.apply_chat_template(turn, add_generation_prompt=True, tokenize=False)
    assert asked == pool_of.chat_text("How many?")
    whole = tokenizer.apply_chat_template([*turn, {"role": "assistant", "content": "4"}], tokenize=False)
    assert whole == asked + " 4<eos>"


def test_labels_cover_the_answer_only(tokenizer):
    recipe = replace(pool_of.QUICK_RECIPES[2], batch_size=8)
    ids, labels = next(pool_of.batches(recipe, tokenizer, 0))
    for row, wanted in zip(ids, labels, strict=True):
        told = tokenizer.decode(wanted[wanted != -100])
        asked = tokenizer.decode(row[:int((wanted != -100).nonzero()[0])])
        assert asked.startswith("<bos><user> ") and asked.endswith("<assistant>")
        assert re.fullmatch(r".*Answer: \d+<eos>", told)


def test_batches_go_on_where_they_stopped(tokenizer):
    import torch
    recipe = replace(pool_of.QUICK_RECIPES[0], batch_size=4)
    stream = pool_of.batches(recipe, tokenizer, 0)
    whole = [next(stream) for _ in range(20)]
    for first in (3, 8, 17):
        again = next(pool_of.batches(recipe, tokenizer, first))
        assert torch.equal(whole[first][0], again[0]) and torch.equal(whole[first][1], again[1])


def test_training_learns_and_resumes_to_the_same_weights(tokenizer, tmp_path):
    import torch
    recipe = replace(pool_of.QUICK_RECIPES[0], steps=30)
    said = []
    whole, measured = pool_of.train(recipe, tokenizer, (), tmp_path / "a.pt", say=said.append)
    assert measured["problems"] == 480 and said[-1].startswith("cheap: step 30/30")
    first = next(pool_of.batches(recipe, tokenizer, 0))
    begin = pool_of.answer_loss(pool_of.make_model(recipe, tokenizer), *first).item()
    assert measured["final_loss"] < begin
    with pytest.raises(PartialRun, match="run the same command"):
        pool_of.train(recipe, tokenizer, (), tmp_path / "b.pt", save_every=7, stop_after=17, say=said.append)
    resumed, _ = pool_of.train(recipe, tokenizer, (), tmp_path / "b.pt", save_every=7, say=said.append)
    assert "cheap: resumed after step 14" in said
    for name, value in whole.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name]), name


def test_checkpoints_of_another_recipe_or_torn_ones_stop(tokenizer, tmp_path):
    recipe = replace(pool_of.QUICK_RECIPES[0], steps=2)
    path = tmp_path / "c.pt"
    pool_of.train(recipe, tokenizer, (), path, say=lambda text: None)
    with pytest.raises(UserError, match="learning_rate changed"):
        pool_of.train(replace(recipe, learning_rate=1.0), tokenizer, (), path)
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(UserError, match="not a whole checkpoint"):
        pool_of.train(recipe, tokenizer, (), path)


def test_a_loss_that_is_not_finite_stops(tokenizer, tmp_path):
    with pytest.raises(PartialRun, match="lower its learning_rate"):
        pool_of.train(replace(pool_of.QUICK_RECIPES[0], learning_rate=1e30, warmup=1), tokenizer, (), tmp_path / "d.pt")
    assert not (tmp_path / "d.pt").exists()


def test_script_makes_a_quick_pool(root, tmp_path):
    command = [sys.executable, str(root / "src/make_sample_pool.py"), "--output_dir", str(tmp_path / "out"),
               "--work_dir", str(tmp_path / "work"), "--prompts", "60", "--quick", "true", "--models", "cheap"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=root)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "out/models/cheap/model.safetensors").is_file() and (tmp_path / "out/pool.yaml").is_file()
    assert json.loads((tmp_path / "out/models/cheap/training.json").read_text())["measured"]["steps"] == 120
    done = subprocess.run([*command[:-1], "cheep"], capture_output=True, text=True, cwd=root)
    assert done.returncode == 2 and "did you mean 'cheap'" in done.stderr


# What ships ----------------------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def shipped(root):
    from routewright.outcomes import OutcomeTable
    return OutcomeTable.load(root / "data" / "sample")


def test_shipped_cache_meets_its_aim(shipped):
    cheap, strong = shipped.models.index("cheap"), shipped.models.index("strong")
    mean = shipped.quality.mean(0)
    assert .35 <= mean[cheap] <= .60 and .75 <= mean[strong] <= .95
    assert shipped.quality.max(1).mean() > mean[strong] + .01
    assert shipped.n >= 1900 and set(shipped.splits) == {"train", "dev", "test"} and not shipped.estimated
    prices = [shipped.pool[name] for name in ("cheap", "strong")]
    assert prices[1].price_input == 15 * prices[0].price_input and prices[1].price_output == 15 * prices[0].price_output


def test_shipped_prompts_are_those_of_the_generator(shipped):
    problems = pool_of.cache_problems(1, shipped.n)  # checks them against everything the models were trained on
    assert sorted(p.text for p in problems) == sorted(p.prompt for p in shipped.prompts)


@pytest.mark.parametrize("sample", [0, 1])
def test_shipped_weights_give_the_recorded_answers(root, shipped, sample):
    """What ships is what answered. Near-ties may round differently on another machine, hence the one in thirty."""
    from routewright.backends.base import Sampling
    from routewright.backends.local import LocalBackend
    from routewright.backends.replay import ReplayBackend
    made = json.loads((root / "data/sample/cache.json").read_text(encoding="utf-8"))
    sampling = Sampling(made["temperature"] if sample else 0.0, made["top_p"], made["max_new_tokens"], made["seed"])
    local, replay = LocalBackend(shipped.pool), ReplayBackend.load(root / "data" / "sample")
    for name in shipped.models:
        fresh = local.call_many(name, shipped.prompts[:60], sampling, sample)
        recorded = replay.call_many(name, shipped.prompts[:60], sampling, sample)
        same = sum((a.response, a.token_usage) == (b.response, b.token_usage)
                   for a, b in zip(fresh, recorded, strict=True))
        assert same >= 58, (name, same)


def test_shipped_training_notes_are_those_of_the_recipes(root):
    for recipe in pool_of.RECIPES:
        made = json.loads((root / "data/sample/models" / recipe.name / "training.json").read_text(encoding="utf-8"))
        assert {k: v for k, v in made.items() if k != "measured"} == json.loads(json.dumps(pool_of.as_row(recipe)))


def test_shipped_readme_holds_the_figures_of_the_cache(root):
    from routewright.outcomes import read_outcomes
    folder = root / "data" / "sample"
    assert (folder / "README.md").read_text(encoding="utf-8") == pool_of.readme(read_outcomes(folder), folder)


def test_cobench_rows_are_what_the_models_did(root):
    from routewright import router_data
    from routewright.outcomes import read_outcomes
    file = root / "data/sample_data.jsonl"
    outcomes = read_outcomes(root / "data" / "sample")
    rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    assert rows == pool_of.cobench_rows(outcomes) and len(rows) == 400
    known = {(o.prompt, o.model_name): o for o in outcomes if o.sample == 0}
    assert all(known[row["question"], row["llm_id"]].is_correct == bool(row["label"])
               and known[row["question"], row["llm_id"]].split == "train" for row in rows)
    for name in ("cheap", "strong"):  # neither class is rare enough for a warning, model by model
        right = [row["label"] for row in rows if row["llm_id"] == name]
        assert .1 < sum(right) / len(right) < .9
    assert router_data.check_labels(router_data.read_pairs(file), 2) == []


def test_shipped_files_can_be_read_by_everybody(root):
    for path in (root / "data" / "sample").rglob("*"):
        assert path.stat().st_mode & 0o044 == 0o044, path


def test_shipped_tokenizers_are_the_generated_one(root, tokenizer):
    from transformers import AutoTokenizer

    from routewright.encoders import load_tokenizer
    texts = [f"{pool_of.chat_text(p.text)} {p.solution(True)}<eos>" for p in pool_of.make_problems("shipped", 100)]
    for name in ("cheap", "mid", "strong"):
        folder = root / "data/sample/models" / name
        for loaded in (AutoTokenizer.from_pretrained(folder), load_tokenizer(folder)):
            for text in [*texts, *ODD_TEXTS]:
                ids = loaded(text, add_special_tokens=False)["input_ids"]
                assert ids == tokenizer(text, add_special_tokens=False)["input_ids"]
