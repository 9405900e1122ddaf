"""Imports: every recorded data set, the golden numbers, any table, and damaged input that is named."""

from __future__ import annotations

import gzip
import json
from collections import defaultdict

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from import_outcomes import main
from routewright.errors import UserError
from routewright.importing import Notes, finish, read_contaminated, read_table, read_wide
from routewright.launch import run
from routewright.outcomes import OutcomeTable, outcome_from_row, read_outcomes
from routewright.pool import Pool
from routewright.textfiles import read_yaml

POOL = "name: p\nprices_dated: 2026-11-20\nmodels:\n  - {name: cheap, price_input: 0.1, price_output: 0.4}\n" \
       "  - {name: strong, price_input: 1.5, price_output: 6}\n"


@pytest.fixture
def pool_file(tmp_path):
    file = tmp_path / "prices.yaml"
    file.write_text(POOL)
    return file


def wide_row(i: int, **changes):
    row = {"id": f"r{i}", "task": "sums", "prompt": f"How much is {i} plus {i}? Say it in words.",
           "reference": str(2 * i),
           "outcomes": {"cheap": {"score": i % 2, "answer": "x" * 40},
                        "strong": {"score": 1, "tok_in": 9, "tok_out": 3, "cost_usd": 0.25, "latency_ms": 1500}}}
    row.update(changes)
    return row


def write_rows(path, rows):
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


def cli(*words) -> int:
    return run(main, [str(w) for w in words])


# ---------------------------------------------------------------- wide

def test_wide_rows_become_a_cache(tmp_path, pool_file):
    source = write_rows(tmp_path / "in.jsonl", [wide_row(i) for i in range(40)])
    out = tmp_path / "cache"
    assert cli("--source", source, "--pool", pool_file, "--output_dir", out) == 0
    table = OutcomeTable.load(out)
    assert (table.n, table.models, table.estimated) == (40, ("cheap", "strong"), True)
    assert table.quality.mean(0).tolist() == [0.5, 1.0]
    assert table.output_tokens[0].tolist() == [10, 3]  # 40 characters / 4; recorded
    assert table.input_tokens[0].tolist() == [round(len(wide_row(0)["prompt"]) / 4), 9]
    assert table.cost[0, 1] == 0.25 and table.latency[0, 1] == 1.5
    assert set(table.splits) == {"train", "dev", "test"}
    assert (out / "pool.yaml").read_text() == POOL
    about = json.loads((out / "provenance.json").read_text())
    assert about["tokens_estimated"] and about["outcomes_with_estimated_tokens"] == 40
    assert about["sources"][0]["rows"] == 40 and len(about["sources"][0]["sha256"]) == 64
    assert read_yaml(out / "config.resolved.yaml")["source"] == str(source)


def test_a_different_cache_is_not_overwritten_unasked(tmp_path, pool_file, capsys):
    source = write_rows(tmp_path / "in.jsonl", [wide_row(i) for i in range(4)])
    words = ("--source", source, "--pool", pool_file, "--output_dir", tmp_path / "cache")
    assert cli(*words) == 0
    before = (tmp_path / "cache/outcomes.jsonl.gz").read_bytes()
    assert cli(*words) == 0
    assert "already holds exactly this" in capsys.readouterr().out
    assert cli(*words, "--salt", "other") == 2
    assert "--overwrite" in capsys.readouterr().err
    assert (tmp_path / "cache/outcomes.jsonl.gz").read_bytes() == before
    assert cli(*words, "--salt", "other", "--overwrite") == 0
    assert cli(*words) == 2


def test_question_options_and_paragraph(tmp_path):
    rows = [wide_row(0, prompt="TEMPLATE " * 50 + "Which?", question="Which?", options=["red", "blue"], para="p1"),
            wide_row(1, para="p1"), wide_row(2, para="p2", context_chars=400)]
    outcomes = read_wide(write_rows(tmp_path / "in.jsonl", rows), Notes())
    assert outcomes[0].prompt == "Which?\nA. red\nB. blue"
    assert outcomes[0].token_usage.input == round((9 * 50 + 6) / 4)  # counted on what was sent
    assert outcomes[4].token_usage.input == round((len(rows[2]["prompt"]) + 400) / 4)
    done = finish(outcomes, Pool.load(_pool(tmp_path)), Notes())
    assert done[0].group == done[2].group != done[4].group


def _pool(tmp_path):
    (tmp_path / "pool.yaml").write_text(POOL)
    return tmp_path / "pool.yaml"


def test_another_number_as_quality(tmp_path):
    rows = [wide_row(0, outcomes={"cheap": {"score": 0, "f1": 0.5}})]
    outcome = read_wide(write_rows(tmp_path / "in.jsonl", rows), Notes(), quality="f1")[0]
    assert (outcome.quality, outcome.is_correct) == (0.5, False)


def test_near_duplicates_share_a_split_and_recorded_splits_that_leak_are_refused(tmp_path, pool_file, capsys):
    long = "In a small town by the river the baker sells bread to the people of the valley every morning before the " \
           "sun rises and asks his daughter to count the loaves that are left over at noon"
    rows = [wide_row(0, prompt=long, split="train"), wide_row(1, prompt=long + " today", split="test")]
    source = write_rows(tmp_path / "in.jsonl", rows)
    assert cli("--source", source, "--pool", pool_file, "--output_dir", tmp_path / "a") == 0
    assert len({o.split for o in read_outcomes(tmp_path / "a")}) == 1
    assert cli("--source", source, "--pool", pool_file, "--output_dir", tmp_path / "b", "--splits", "keep") == 2
    assert "near-duplicate in another split" in capsys.readouterr().err
    rows[1]["prompt"] = "Something quite different"
    write_rows(source, rows)
    assert cli("--source", source, "--pool", pool_file, "--output_dir", tmp_path / "b", "--splits", "keep") == 0
    assert [o.split for o in read_outcomes(tmp_path / "b")] == ["train", "train", "test", "test"]


@pytest.mark.parametrize(("changes", "says"), [
    ({"id": ""}, "`id` must be"), ({"id": "r0"}, "ids must be unique"), ({"outcomes": {}}, "`outcomes` must map"),
    ({"outcomes": {"cheap": {"score": 2}}}, "quality must be a number from 0 to 1"),
    ({"outcomes": {"cheap": {"scor": 1}}}, "did you mean 'scor'"),
    ({"outcomes": {"cheap": {"score": None}}}, "got None"),
    ({"outcomes": {"cheap": {"score": 1, "tok_in": -3}}}, "tok_in must be"),
    ({"outcomes": {"cheap": {"score": 1, "out_chars": 1.5}}}, "whole number"),
    ({"outcomes": {"cheap": 1}}, "must be an object"),
    ({"prompt": "  "}, "non-empty"), ({"prompt": 7}, "non-empty"), ({"split": "tset"}, "split must be"),
])
def test_bad_rows_are_named_with_line_and_cure(tmp_path, changes, says):
    source = write_rows(tmp_path / "in.jsonl", [wide_row(0), wide_row(1, **changes), wide_row(2)])
    with pytest.raises(UserError, match="in.jsonl:2") as error:
        read_wide(source, Notes())
    assert says in str(error.value) and "--skip_bad" in str(error.value)
    notes = Notes(skip_bad=1)
    assert {o.prompt_id for o in read_wide(source, notes)} == {"r0", "r2"}
    assert len(notes.bad_rows) == 1


values = st.recursive(st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5),
                      lambda inner: st.lists(inner,
                                             max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
                                             max_leaves=5)


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.sampled_from(["id", "task", "subject", "prompt", "question", "options", "reference", "split", "group",
                        "para", "context", "context_chars", "outcomes"]), values)
def test_any_value_in_any_field_is_taken_or_named(tmp_path, name, value):
    source = write_rows(tmp_path / "in.jsonl", [wide_row(0), wide_row(1, **{name: value})])
    try:
        outcomes = read_wide(source, Notes())
    except UserError as error:
        assert "in.jsonl:2" in str(error)
    else:
        for outcome in outcomes:
            outcome_from_row(json.loads(json.dumps(outcome.as_row())), "row")


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.sampled_from(["score", "cost_usd", "tok_in", "tok_out", "latency_ms", "answer", "pred", "response",
                        "out_chars"]), values)
def test_any_value_in_any_outcome_is_taken_or_named(tmp_path, name, value):
    row = wide_row(0, outcomes={"cheap": {"score": 1, name: value}})
    try:
        outcomes = read_wide(write_rows(tmp_path / "in.jsonl", [row]), Notes())
    except UserError as error:
        assert "in.jsonl:1" in str(error)
    else:
        outcome_from_row(json.loads(json.dumps(outcomes[0].as_row())), "row")


def test_damaged_lines(tmp_path):
    source = write_rows(tmp_path / "in.jsonl", [wide_row(0), '{"id": "torn', wide_row(2)])
    with pytest.raises(UserError, match="in.jsonl:2.*not JSON"):
        read_wide(source, Notes())
    assert len(read_wide(source, Notes(skip_bad=5))) == 4
    source.write_bytes(source.read_bytes() + b'{"id": "\xff"}\n')
    with pytest.raises(UserError, match="in.jsonl:4.*after 1 skipped"):
        read_wide(source, Notes(skip_bad=1))
    source.write_text("")
    with pytest.raises(UserError, match="empty"):
        read_wide(source, Notes())


@pytest.mark.parametrize(("missing", "models", "prompts"), [("drop_prompt", 2, 9), ("drop_model", 1, 10)])
def test_missing_outcomes(tmp_path, pool_file, missing, models, prompts, capsys):
    rows = [wide_row(i) for i in range(10)]
    del rows[3]["outcomes"]["strong"]
    words = ("--source", write_rows(tmp_path / "in.jsonl", rows), "--pool", pool_file, "--output_dir",
             tmp_path / "cache")
    assert cli(*words) == 2
    assert "strong: 1" in (message := capsys.readouterr().err) and "keeps the 9 prompts" in message
    assert cli(*words, "--missing", missing) == 0
    table = OutcomeTable.load(tmp_path / "cache")
    assert (table.m, table.n) == (models, prompts)
    assert "dropped" in capsys.readouterr().out


def test_a_model_without_a_price_and_a_misspelt_one(tmp_path, pool_file, capsys):
    rows = [wide_row(i) for i in range(3)]
    rows[0]["outcomes"]["stron"] = {"score": 1}
    words = ("--source", write_rows(tmp_path / "in.jsonl", rows), "--pool", pool_file, "--output_dir",
             tmp_path / "cache")
    assert cli(*words) == 2
    assert "'stron' has no price" in (message := capsys.readouterr().err) and "did you mean 'strong'" in message
    assert cli(*words, "--models", "[cheap, strnog]") == 2
    assert "did you mean 'strong'" in capsys.readouterr().err
    assert cli(*words, "--models", "[strong, cheap]") == 0
    assert not (tmp_path / "cache/outcomes.jsonl.gz.tmp").exists()
    assert OutcomeTable.load(tmp_path / "cache").models == ("cheap", "strong")


def test_options_that_belong_elsewhere(tmp_path, pool_file, capsys):
    source = write_rows(tmp_path / "in.jsonl", [wide_row(0)])
    words = ("--source", source, "--pool", pool_file, "--output_dir", tmp_path / "cache")
    assert cli(*words, "--columns.prompt", "x") == 2
    assert cli(*words, "--fractions", "{train: 0.5}") == 2
    assert cli(*words, "--formt", "wide") == 2
    assert cli("--source", tmp_path / "inn.jsonl", *words[2:]) == 2
    assert "did you mean 'in.jsonl'" in capsys.readouterr().err
    assert not (tmp_path / "cache").exists()


# ---------------------------------------------------------------- tables

LONG = ("question,llm,score,out\nOne plus one?,cheap,1,two\nOne plus one?,strong,1,two\n"
        "\"Two,\nplus two?\",cheap,0,five\n\"Two,\nplus two?\",strong,1,four\n")


def test_long_csv(tmp_path, pool_file):
    source = tmp_path / "calls.csv"
    source.write_text(LONG)
    assert cli("--format", "table", "--source", source, "--pool", pool_file, "--output_dir", tmp_path / "cache",
               "--columns.prompt", "question",
               "--columns.model", "llm", "--columns.quality", "score", "--columns.response", "out", "--task",
               "sums") == 0
    table = OutcomeTable.load(tmp_path / "cache")
    assert table.quality.tolist() == [[1, 1], [0, 1]]
    assert table.prompts[1].prompt == "Two,\nplus two?" and table.prompts[1].task == "sums"
    assert table.responses[1] == {"cheap": "five", "strong": "four"}


def test_wide_csv_with_a_model_pattern_and_percentages(tmp_path):
    source = tmp_path / "w.csv"
    source.write_text("prompt,cheap_score,strong_score,cheap_text,strong_text\nA?,0,100,x,yy\nB?,50,100,x,yy\n")
    outcomes = read_table(source, Notes(), {"prompt": "prompt", "quality": "{model}_score",
                                            "response": "{model}_text"}, ["cheap", "strong"], 100)
    assert [(o.model_name, o.quality, o.is_correct, o.response) for o in outcomes] == [
        ("cheap", 0, False, "x"), ("strong", 1, True, "yy"), ("cheap", 0.5, False, "x"), ("strong", 1, True, "yy")]


def test_jsonl_table_graded_on_the_way_with_samples(tmp_path):
    rows = [{"q": "6x7", "m": "cheap", "a": "It is 42.", "gold": 42, "k": 0},
            {"q": "6x7", "m": "cheap", "a": "41", "gold": 42, "k": 1}]
    columns = {"prompt": "q", "model": "m", "response": "a", "reference": "gold", "sample": "k"}
    outcomes = read_table(write_rows(tmp_path / "t.jsonl", rows), Notes(), columns, grader="number")
    assert [(o.sample, o.quality, o.grader) for o in outcomes] == [(0, 1.0, "number"), (1, 0.0, "number")]
    done = finish(outcomes, Pool.load(_pool(tmp_path)), Notes())
    assert [o.sample for o in done] == [0, 1]
    outcomes[1].sample = 0
    with pytest.raises(UserError, match="--columns.sample"):
        finish(outcomes, Pool.load(_pool(tmp_path)), Notes())


@pytest.mark.parametrize(("columns", "says"), [
    ({"model": "llm", "quality": "score"}, "--columns.prompt is needed"),
    ({"prompt": "question", "quality": "score"}, "name the models one way"),
    ({"prompt": "question", "model": "llm"}, "--columns.quality is needed"),
    ({"prompt": "quetsion", "model": "llm", "quality": "score"}, "did you mean 'question'"),
    ({"prompt": "question", "modle": "llm", "quality": "score"}, "did you mean 'model'"),
    ({"prompt": "question", "quality": "{model}"}, "--models"),
    ({"prompt": "{model}", "quality": "{model}"}, "belongs to the prompt"),
    ({"prompt": "question", "model": "llm", "quality": 3}, "must name a column"),
])
def test_bad_column_mappings(tmp_path, columns, says):
    (tmp_path / "calls.csv").write_text(LONG)
    with pytest.raises(UserError) as error:
        read_table(tmp_path / "calls.csv", Notes(), columns)
    assert says in str(error.value)


@pytest.mark.parametrize(("text", "says"), [
    ("question,llm,score\nA?,cheap\n", "t.csv:2: 2 fields where the header has 3"), ("", "empty"),
    ("question,llm,score\nA?,cheap,good\n", "t.csv:2"),
    ("question,llm,llm\n", "stands twice"), ("question,llm,score\n\"A?,cheap,1\n", "t.csv:2: not CSV"),
    ("question,llm,score\nA?,,1\n", "is empty"),
    ("question,llm,score\nA?,cheap,85\n", "--quality_max"), ("question,llm,score\nA?,cheap,nan\n", "from 0 to 1"),
    ("question,llm,score\n", "no row"),
])
def test_damaged_csv(tmp_path, text, says):
    (tmp_path / "t.csv").write_text(text)
    with pytest.raises(UserError) as error:
        read_table(tmp_path / "t.csv", Notes(), {"prompt": "question", "model": "llm", "quality": "score"})
    assert says in str(error.value)


def test_an_empty_cell_is_an_outcome_that_was_not_recorded(tmp_path):
    (tmp_path / "t.csv").write_text("prompt,cheap,strong\nA?,1,\nB?,0,True\n")
    outcomes = read_table(tmp_path / "t.csv", Notes(), {"prompt": "prompt", "quality": "{model}"}, ["cheap", "strong"])
    assert len(outcomes) == 3
    with pytest.raises(UserError, match="strong: 1"):
        finish(outcomes, Pool.load(_pool(tmp_path)), Notes())


# ---------------------------------------------------------------- recorded data sets

def test_routellm_gsm8k_golden_numbers(tmp_path, root, shared_data):
    """Weak, strong and either-one accuracy of the decontaminated file, to the published digits."""
    source = shared_data("routellm") / "original" / "gsm8k"
    words = ("--format", "routellm", "--source", source, "--pool", root / "configs/pools/routellm.yaml")
    assert cli(*words, "--output_dir", tmp_path / "a") == 0
    table = OutcomeTable.load(tmp_path / "a")
    assert table.n == 1307
    assert table.models == ("mistralai/Mixtral-8x7B-Instruct-v0.1", "gpt-4-1106-preview")
    assert table.quality.mean(0) * 100 == pytest.approx([63.7337413925, 85.7689364958], abs=1e-9)
    assert table.quality.max(1).mean() * 100 == pytest.approx(92.9609793420, abs=1e-9)
    assert table.estimated and table.responses[0]["gpt-4-1106-preview"].startswith("James runs 3 sprints")
    assert cli(*words, "--output_dir", tmp_path / "b", "--keep_contaminated") == 0
    assert OutcomeTable.load(tmp_path / "b").n == 1319


def test_routellm_whole_folder_and_lists(tmp_path, root, shared_data, capsys):
    folder = shared_data("routellm") / "original"
    assert cli("--format", "routellm", "--source", folder, "--pool", root / "configs/pools/routellm.yaml",
               "--output_dir", tmp_path / "a") == 0
    table = OutcomeTable.load(tmp_path / "a")
    assert table.n == 1307 + 100 + 100 + 272
    assert {p.task for p in table.prompts} == {"gsm8k", "mmlu/abstract_algebra", "mmlu/global_facts",
                                               "mmlu/professional_medicine"}
    letters = np.array([p.task != "gsm8k" for p in table.prompts])
    assert (table.output_tokens[letters] == 1).all()
    assert len(read_contaminated(folder / "mmlu/contaminated_prompts.jsonl")) == 5
    # A list of another data set is a mistake, not a clean import.
    assert cli("--source", shared_data("routellm") / "gsm8k.jsonl.gz", "--pool", root / "configs/pools/routellm.yaml",
               "--output_dir",
               tmp_path / "b", "--contaminated", folder / "mmlu/contaminated_prompts.jsonl") == 2
    assert "another data set" in capsys.readouterr().err


@pytest.mark.parametrize(("file", "pool", "options", "n", "m"), [
    ("routellm/gsm8k.jsonl.gz", "routellm", [], 1319, 2),
    ("gsm8k_openai/outcomes.jsonl.gz", "gsm8k_openai", [], 1319, 4),
    ("anlp_automix/outcomes.jsonl.gz", "automix", ["--without_text", "use_id"], 4000, 2),
    ("zeroeval/crux.jsonl.gz", "zeroeval", [], 800, 51),
    pytest.param("ulab_llmrouter/train.jsonl.gz", "ulab", [], 5608, 9, marks=pytest.mark.slow),
])
def test_recorded_data_sets(tmp_path, root, shared_data, file, pool, options, n, m):
    folder, name = file.split("/")
    source = shared_data(folder) / name
    assert cli("--source", source, "--pool", root / f"configs/pools/{pool}.yaml", "--output_dir", tmp_path / "cache",
               *options) == 0
    about = json.loads((tmp_path / "cache/provenance.json").read_text())
    assert (about["prompts"], len(about["models"])) == (n, m)
    scores = defaultdict(list)
    with gzip.open(source, "rt") as rows:
        for line in rows:
            for model, outcome in json.loads(line)["outcomes"].items():
                scores[model].append(outcome["score"])
    if m < 20:
        table = OutcomeTable.load(tmp_path / "cache")
        assert table.quality.mean(0) == pytest.approx([np.mean(scores[model]) for model in table.models])
        by_group = defaultdict(set)
        for prompt in table.prompts:
            by_group[prompt.group].add(prompt.split)
        assert all(len(splits) == 1 for splits in by_group.values())


@pytest.mark.parametrize("name", ["routellm", "mmlu_pro", "zeroeval", "ulab", "automix", "squad", "gsm8k_openai"])
def test_shipped_pools_load_and_say_where_prices_are_from(root, name):
    file = root / f"configs/pools/{name}.yaml"
    pool = Pool.load(file)
    assert pool.prices_dated and len(pool.models) >= 2
    comment = [line for line in file.read_text().splitlines() if line.startswith("#")]
    assert len(comment) >= 3 and any("price" in line for line in comment)
