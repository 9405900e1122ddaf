"""What a user gets wrong, script by script: one sentence naming the file and the cure, an exit code, nothing written.

Every case runs the real `main` of a script through the same door as the command line, in this process.
"""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path

import pytest
import yaml
from planted import make_outcomes

from routewright.launch import read_options, run
from routewright.textfiles import write_jsonl

POOL = {"name": "tiny", "models": [{"name": "cheap", "price_input": 0.1, "price_output": 0.4},
                                   {"name": "strong", "price_input": 1.5, "price_output": 6}]}
WORDS = "amber birch cedar delta ember fjord grove heath inlet jetty knoll larch maple north ocean".split()
LINE = 3  # the line that is damaged

# script -> the file it reads, and how it is told of it
CHEAP = Path(__file__).resolve().parents[1] / "data" / "sample" / "models" / "cheap"
READS = {
    "import_outcomes": ("wide.jsonl", "--source wide.jsonl --pool pool.yaml --output_dir out"),
    "build_cache": ("prompts.jsonl", "--prompts prompts.jsonl --pool pool.yaml --output_dir out"),
    "train_deberta": ("rows.jsonl", "--data rows.jsonl --model_name tiny --check_only true --output_dir out"),
    "train_embedding": ("cache/outcomes.jsonl", "--cache cache --output_dir out"),
    "evaluate": ("cache/outcomes.jsonl", "--cache cache --routers routers.yaml --wandb off --output_dir out"),
    "run": ("cache/outcomes.jsonl", "--cache cache --router_type length --wandb off --output_dir out"),
    "check_leaks": ("rows.jsonl", "--a rows.jsonl --b prompts.jsonl --output out/leaks.json"),
    "make_sample_pool": ("cache/outcomes.jsonl", "--output_dir cache --report true"),
    "build_sets": ("cache/outcomes.jsonl", "--cache cache --output_dir out"),
    "train_llm": ("alpaca.jsonl", f"--data alpaca.jsonl --model_name {CHEAP} --check_only true --output_dir out"),
    "train_dpo": ("pairs.jsonl", f"--data pairs.jsonl --model_name {CHEAP} --check_only true --output_dir out"),
    "train_probe": ("cache/outcomes.jsonl", f"--cache cache --base {CHEAP} --check_only true --output_dir out"),
}
NEEDED = {"wide.jsonl": "outcomes", "prompts.jsonl": "prompt", "rows.jsonl": "question", "alpaca.jsonl": "instruction",
          "pairs.jsonl": "prompt", "cache/outcomes.jsonl": "prompt"}


@pytest.fixture
def world(tmp_path, monkeypatch):
    """A folder with one good file of every kind; each case spoils one of them."""
    monkeypatch.chdir(tmp_path)
    texts = [f"What is {a} {b} number {i}?" for i, (a, b) in enumerate((a, b) for a in WORDS for b in WORDS)][:60]
    save("wide.jsonl", [{"id": f"w{i}", "prompt": text, "outcomes": {"cheap": {"score": i % 2}, "strong": {"score": 1}}}
                        for i, text in enumerate(texts)])
    save("prompts.jsonl", [{"prompt_id": f"p{i}", "prompt": f"prompts {text}", "reference": str(i)}
                           for i, text in enumerate(texts)])
    save("rows.jsonl", [{"question": text, "llm_id": "cheap", "label": i % 2} for i, text in enumerate(texts)])
    save("alpaca.jsonl", [{"instruction": text, "response": str(1 + i % 2)} for i, text in enumerate(texts)])
    save("pairs.jsonl", [{"prompt": text, "chosen": str(1 + i % 2), "rejected": str(2 - i % 2)}
                         for i, text in enumerate(texts)])
    save("cache/outcomes.jsonl", [o.as_row() for o in make_outcomes(60)])
    for name in ("pool.yaml", "cache/pool.yaml"):
        Path(name).write_text(yaml.safe_dump(POOL))
    Path("routers.yaml").write_text("routers:\n  - {name: short, kind: length}\n")
    return tmp_path


def save(name: str, rows: list[dict]) -> None:
    write_jsonl(name, rows)


def load(name: str) -> list[dict]:
    return [json.loads(line) for line in Path(name).read_text().splitlines()]


def script(root: Path, name: str):
    spec = importlib.util.spec_from_file_location(f"script_{name}", root / "src" / f"{name}.py")
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)  # dataclasses look their module up there
    spec.loader.exec_module(module)
    return module.main


def refused(root, capsys, name: str, words: str, *said: str, code: int = 2) -> None:
    """The script stops with `code` and one sentence that holds every text of `said`, and leaves no output."""
    before = {p: p.read_bytes() for p in Path().rglob("*") if p.is_file()}
    main = script(root, name)
    assert run(main, words.split()) == code
    lines = capsys.readouterr().err.splitlines()
    options = list(read_options(main))
    if lines[0].split()[0] == options[0]:
        lines = lines[len(options):]
    assert len(lines) == 1, lines
    assert lines[0].startswith("stopped: " if code == 3 else "error: ")
    for text in said:
        assert text in lines[0], lines[0]
    assert {p: p.read_bytes() for p in Path().rglob("*") if p.is_file()} == before
    assert not Path("out").exists()


# --- damaged files ----------------------------------------------------------------------------------------------------

def missing_field(file: str) -> tuple[str, str]:
    rows = load(file)
    del rows[LINE - 1][NEEDED[file]]
    save(file, rows)
    return f"{file}:{LINE}", NEEDED[file]


def wrong_type(file: str) -> tuple[str, str]:
    rows = load(file)
    rows[LINE - 1][NEEDED[file]] = 7
    save(file, rows)
    return f"{file}:{LINE}", "7"


def torn_last_line(file: str) -> tuple[str, str]:
    text = Path(file).read_text()
    Path(file).write_text(text[:-15])
    return f"{file}:{text.count(chr(10))}", "the last line is cut off"


def empty_file(file: str) -> tuple[str, str]:
    Path(file).write_text("")
    return file, "the file is empty"


@pytest.mark.parametrize("damage", [missing_field, wrong_type, torn_last_line, empty_file])
@pytest.mark.parametrize("name", READS)
def test_damaged_files_are_named_with_their_line(world, root, capsys, name, damage):
    file, words = READS[name]
    where, said = damage(file)
    refused(root, capsys, name, words, where, said)


# --- the command line -------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("name", READS)
def test_unknown_flags_and_config_keys_are_named(world, root, capsys, name):
    words = READS[name][1]
    flag = words.split()[0].removeprefix("--")
    refused(root, capsys, name, f"{words} --{flag}x 3", f"unknown option --{flag}x", f"did you mean '{flag}'?")
    Path("config.yaml").write_text(f"{flag}x: 3\n")
    refused(root, capsys, name, f"{words} --config config.yaml", "config.yaml: unknown key", f"did you mean '{flag}'?")


@pytest.mark.parametrize("name", ["import_outcomes", "build_cache", "train_embedding", "evaluate", "run", "build_sets",
                                  "train_probe"])
def test_wrong_keys_and_missing_prices_of_a_pool_are_named(world, root, capsys, name):
    words = READS[name][1]
    file = "cache/pool.yaml" if "--cache" in words else "pool.yaml"
    text = Path(file).read_text()
    Path(file).write_text(text.replace("price_input: 1.5", "price_imput: 1.5"))
    refused(root, capsys, name, words, f"{file}: models[1]: unknown key 'price_imput' (did you mean 'price_input'?)")
    Path(file).write_text(text.replace("  price_output: 6\n", ""))
    refused(root, capsys, name, words, f"{file}: models[1]: `price_output` is missing")


@pytest.mark.parametrize("name", ["import_outcomes", "train_embedding", "evaluate", "run", "build_sets", "train_probe"])
def test_models_without_a_price_are_named(world, root, capsys, name):
    words = READS[name][1]
    file = "cache/pool.yaml" if "--cache" in words else "pool.yaml"
    Path(file).write_text(yaml.safe_dump({**POOL, "models": POOL["models"][:1]}))
    refused(root, capsys, name, words, f"model 'strong' has no price in pool 'tiny' ({file})", "add it there with")


def test_a_cache_to_train_on_needs_its_prices_too(world, root, capsys):
    Path("cache/pool.yaml").write_text(yaml.safe_dump({**POOL, "models": POOL["models"][:1]}))
    refused(root, capsys, "train_deberta", "--cache cache --model_name tiny --check_only true --output_dir out",
            "model 'strong' has no price", "cache/pool.yaml")


@pytest.mark.parametrize(("name", "words", "said"), [
    ("import_outcomes", "--models strnog", "'strnog' was never recorded (did you mean 'strong'?)"),
    ("build_cache", "--models strnog", "model 'strnog' has no price in pool 'tiny' (pool.yaml) (did you mean 'strong'"),
    ("evaluate", "--models [cheap,strnog]", "model 'strnog' was never recorded (did you mean 'strong'?)"),
    ("make_sample_pool", "--models strnog", "has no such model (did you mean 'strong'?)"),
    ("build_cache", "", "pool.yaml: model 'cheap' has no path; give it `path:`"),
    ("evaluate", "--router_type lenght", "did you mean 'length'?"),
    ("train_embedding", "--kind linaer", "did you mean 'linear'?"),
    ("train_embedding", "--router.name mine", "--name"),
    ("train_embedding", "--router.kind knn", "--kind"),
    ("train_embedding", "--cost_weight nan", "nan is no finite number"),
    ("build_cache", "--grader nubmer", "did you mean 'number'?"),
    ("make_sample_pool", "--prompts 0", "--prompts must be at least 1; got 0"),
])
def test_unknown_names_are_named_with_the_nearest(world, root, capsys, name, words, said):
    given = READS[name][1] if name != "make_sample_pool" else "--output_dir out"
    refused(root, capsys, name, f"{given} {words}", said)


@pytest.mark.parametrize(("text", "said"), [
    ("routers:\n  - {name: a, kidn: knn}\n", "kidn"),
    ("routers:\n  - {name: a, kind: linear, l2x: 1}\n", "did you mean 'l2'?"),
    ("ruoters: []\n", "did you mean 'routers'?"),
    ("routers:\n  - [a\n", "routers.yaml:3: not YAML"),
    ("", "routers.yaml: the file is empty"),
])
def test_wrong_router_files_are_named(world, root, capsys, text, said):
    Path("routers.yaml").write_text(text)
    refused(root, capsys, "evaluate", READS["evaluate"][1], "routers.yaml", said)


@pytest.mark.parametrize("name", [name for name, (_, words) in READS.items() if "--output_dir out" in words])
def test_an_output_folder_that_is_a_file_stops_before_work(world, root, capsys, name):
    words = READS[name][1].replace("--output_dir out", "--output_dir pool.yaml/out")
    refused(root, capsys, name, words, "pool.yaml is a file; name a folder")


# --- labels and splits ------------------------------------------------------------------------------------------------

def test_one_class_of_labels_teaches_nothing(world, root, capsys):
    save("rows.jsonl", [{**row, "label": 1} for row in load("rows.jsonl")])
    refused(root, capsys, "train_deberta", READS["train_deberta"][1], "rows.jsonl: all", "add rows of the other class")
    save("cache/outcomes.jsonl", [{**row, "quality": 1.0, "is_correct": True} for row in load("cache/outcomes.jsonl")])
    said = "cache: every model has the same quality", "nothing to learn"
    refused(root, capsys, "train_deberta", "--cache cache --model_name tiny --check_only true --output_dir out", *said)
    for kind in ("linear", "group_table"):
        refused(root, capsys, "train_embedding", f"{READS['train_embedding'][1]} --kind {kind}", *said)


@pytest.mark.parametrize("name", ["evaluate", "run"])
def test_train_and_test_that_share_prompts_are_refused(world, root, capsys, name):
    rows = load("cache/outcomes.jsonl")
    texts = {split: next(row["prompt"] for row in rows if row["split"] == split) for split in ("train", "test")}
    for row in rows:
        if row["prompt"] == texts["test"]:
            row["prompt"] = texts["train"].upper()
    save("cache/outcomes.jsonl", rows)
    # A router that learns from the train split; the length rule learns nothing, so nothing could leak.
    words = READS[name][1].replace("--router_type length", "--router_type linear")
    Path("routers.yaml").write_text("routers:\n  - {name: learnt, kind: linear}\n")
    refused(root, capsys, name, words, "1 exact", "remove them from one side")


def test_validation_rows_that_were_trained_on_are_refused(world, root, capsys):
    save("val.jsonl", [{"question": "New?", "llm_id": "cheap", "label": 1}, *load("rows.jsonl")[:2]])
    refused(root, capsys, "train_deberta", f"{READS['train_deberta'][1]} --val val.jsonl",
            "val.jsonl:2", "rows.jsonl:1", "remove them, or leave VAL empty")


def test_recorded_splits_that_leak_are_refused(world, root, capsys):
    wide, prompts = load("wide.jsonl"), load("prompts.jsonl")
    for rows in (wide, prompts):
        for i, row in enumerate(rows):
            row["split"] = "test" if i == 1 else "train"
        rows[1]["prompt"] = rows[0]["prompt"].upper()
    save("wide.jsonl", wide)
    save("prompts.jsonl", prompts)
    refused(root, capsys, "import_outcomes", f"{READS['import_outcomes'][1]} --splits keep", "splits leak",
            "--splits hash assigns clean ones")
    Path("pool.yaml").write_text(yaml.safe_dump({**POOL, "models": [{**m, "path": "w"} for m in POOL["models"]]}))
    refused(root, capsys, "build_cache", READS["build_cache"][1], "prompts.jsonl: its splits leak", "leave `split` out")


def test_shared_prompts_of_two_files_end_in_exit_3(world, root, capsys):
    save("prompts.jsonl", [{"prompt": load("rows.jsonl")[0]["question"]}])
    refused(root, capsys, "check_leaks", "--a rows.jsonl --b prompts.jsonl", "1 of 60 prompts of rows.jsonl stand in "
            "prompts.jsonl too", "remove them from one side", code=3)
