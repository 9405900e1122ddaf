"""train_llm from its options to its router folder: both modes, full weights and adapters, and the ways it must stop."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import kill_script
import numpy as np
import pytest
import yaml
from planted import write_name_cache

import train_llm as script
from routewright import sets
from routewright.errors import UserError
from routewright.launch import run
from routewright.outcomes import OutcomeTable
from routewright.reward import Reward
from routewright.routers.base import pool_card
from routewright.templates import Template
from routewright.textfiles import write_jsonl

ROOT = Path(__file__).resolve().parents[1]
STRONG, CHEAP = (str(ROOT / "data" / "sample" / "models" / name) for name in ("strong", "cheap"))
LEARNS = {"batch_size": 4, "global_batch_size": 8, "learning_rate": 3e-3, "epochs": 5, "patience": 0}


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return write_name_cache(tmp_path_factory.mktemp("cache"))


def build(folder, cache, mode, about=""):
    """A set of the planted cache in the bare style, as build_sets writes it; the path of its train rows."""
    table = OutcomeTable.load(cache)
    reward, template = Reward.named("linear", cost_weight=.3), Template.of_pool(table.pool, table.models, mode, "bare",
                                                                                about)
    unit = sets.cost_unit_of(table.split("train"))
    for split in ("train", "dev"):
        part = table.split(split)
        targets = sets.difficulty_targets(part, about) if mode == "difficulty" else sets.decision_targets(
            sets.reward_table(part, reward, unit_usd=unit), part.cost)
        card = {"kind": "alpaca", "template": template.as_card(), "pool": pool_card(part.pool),
                "models": list(part.models), "reward": sets.reward_card("linear", reward), "cost_unit": "dearest",
                "unit_usd": unit, "quality": "mean", "cache": str(cache), "cache_fingerprint": part.fingerprint,
                "split": split, "split_seed": None, "counts": {}, "dropped": {}, "dev": "alpaca_dev.jsonl"}
        sets.write_set(folder / f"alpaca_{split}.jsonl", sets.alpaca_rows(part, template, targets), card)
    return folder / "alpaca_train.jsonl"


@pytest.fixture(scope="module")
def rows(tmp_path_factory, cache):
    return build(tmp_path_factory.mktemp("decision"), cache, "decision")


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)  # sums over two threads round differently
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def trained(tmp_path_factory, rows):
    """Five epochs of all weights of the strong sample model in decision mode."""
    out = tmp_path_factory.mktemp("trained") / "router"
    script.main(data=str(rows), model_name=STRONG, output_dir=str(out), **LEARNS)
    return out


def losses(folder, name="loss"):
    return [json.loads(line)[name] for line in (folder / "train_log.jsonl").read_text().splitlines()]


def weights(folder, name="model.safetensors"):
    from safetensors.numpy import load_file

    return load_file(Path(folder) / name)


def auroc(router, cache):
    """How well the estimate of the cheap model tells its right answers on the test prompts."""
    from routewright.metrics import auroc as measure

    test = OutcomeTable.load(cache).split("test")
    return measure(test.quality[:, 0] >= .5, router.estimate(test.prompts)[:, 0]), test


# --- before any work starts -------------------------------------------------------------------------------------------

@pytest.mark.parametrize(("words", "told"), [
    (["--epoch", "3"], "did you mean 'epochs'"),
    (["--epochs", "0"], "--epochs must be 1 or more"),
    (["--learning_rate", "-1"], "above 0"),
    (["--batch_size", "12", "--global_batch_size", "16"], "no multiple of batch_size x devices = 12 x 1"),
    (["--four_bit", "true"], "add --lora_r 16"),
    (["--four_bit", "true", "--lora_r", "4", "--precision", "fp32"], "--four_bit computes in bf16"),
    (["--trainer.learning_rates", "1"], "did you mean 'learning_rate'"),
    (["--trainer.seed", "1"], "use --seed"),
    (["--trainer.packing", "true"], "use --packing"),
    (["--trainer.packing_strategy", "wrapped"], "use --packing"),  # its packs would see each other
    (["--trainer.weight_decay", "abc"], "is no float"),
    (["--data", "nowhere.jsonl"], "no such file"),
    (["--wrap", "vicuna"], "wrap"),
])
def test_bad_options_stop_with_one_sentence_and_exit_2(words, told, capsys, tmp_path):
    assert run(script.main, [*words, "--output_dir", str(tmp_path / "out")]) == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert said.startswith("error: ") and told in said
    assert not (tmp_path / "out").exists()


def test_the_global_batch_counts_all_devices(monkeypatch, capsys, tmp_path):
    monkeypatch.setenv("WORLD_SIZE", "3")
    assert run(script.main, ["--output_dir", str(tmp_path / "out")]) == 2
    assert "--global_batch_size 64 is no multiple of batch_size x devices = 4 x 3 = 12" in capsys.readouterr().err


def test_the_defaults_are_the_eight_positionals_of_the_launcher():
    import inspect

    given = {name: p.default for name, p in inspect.signature(script.main).parameters.items()}
    assert (given["data"], given["output_dir"]) == ("data/sample_alpaca_data.jsonl", "data/runs/sft")
    assert [given[n] for n in ("batch_size", "global_batch_size", "epochs", "max_length")] == [4, 64, 3, 512]
    assert script.BASE_MODEL == "Qwen/Qwen2.5-0.5B" and script.LEARNING_RATE == 2e-5


def changed_rows(rows, folder, change, card=True):
    """A copy of the set whose rows went through `change`."""
    folder.mkdir()
    for name in ("alpaca_dev.jsonl", "alpaca_dev.card.json", *(["alpaca_train.card.json"] if card else [])):
        shutil.copy(rows.parent / name, folder)
    made = change([json.loads(line) for line in rows.read_text().splitlines()])
    return write_jsonl(folder / "alpaca_train.jsonl", made)


@pytest.mark.parametrize(("change", "told"), [
    (lambda rows: [*rows[:3], {"instruction": "Why?"}], "alpaca_train.jsonl:4: `response` is missing"),
    (lambda rows: [*rows[:3], {"instruction": "Why?", "response": "7"}], "alpaca_train.jsonl:4: `response` str '7' is"),
    (lambda rows: [{**row, "response": "1"} for row in rows], "all 144 responses are '1', so there is nothing"),
    (lambda rows: [], "the file is empty"),
])
def test_bad_rows_exit_2_and_write_nothing(change, told, rows, tmp_path, capsys):
    file = changed_rows(rows, tmp_path / "set", change)
    assert run(script.main, ["--data", str(file), "--output_dir", str(tmp_path / "out"), "--model_name", CHEAP]) == 2
    assert told in capsys.readouterr().err.splitlines()[-1]
    assert not (tmp_path / "out").exists()


def test_bad_rows_can_be_skipped(rows, tmp_path):
    file = changed_rows(rows, tmp_path / "set", lambda rows: [*rows, {"instruction": "Why?"}])
    said = []
    source = script.load_source(str(file), "", "", 1, said.append)
    assert len(source.train) == 144 and "alpaca_train.jsonl:145" in said[0]


def test_validation_rows_must_be_new_and_of_the_same_template(rows, tmp_path, cache):
    twin = rows.with_name("alpaca_dev.jsonl")
    seen = changed_rows(rows, tmp_path / "seen", lambda rows: [*rows, json.loads(twin.read_text().splitlines()[4])])
    with pytest.raises(UserError, match=r"alpaca_dev.jsonl: row 5: .* \(.*alpaca_train.jsonl: row 145\)"):
        script.load_source(str(seen), "", "", 0, print)
    (tmp_path / "hard").mkdir()
    hard = build(tmp_path / "hard", cache, "difficulty").with_name("alpaca_dev.jsonl")
    with pytest.raises(UserError, match="another template"):
        script.load_source(str(rows), str(hard), "", 0, print)


def test_without_a_twin_a_tenth_is_held_out_and_without_a_cache_there_is_a_warning(rows, tmp_path):
    file = changed_rows(rows, tmp_path / "set", lambda rows: rows)
    file.with_name("alpaca_dev.jsonl").unlink()
    card = sets.card_path(file)
    card.write_text(json.dumps({**json.loads(card.read_text()), "cache": str(tmp_path / "moved")}))
    said = []
    source = script.load_source(str(file), "", "", 0, said.append)
    assert 5 <= len(source.dev) <= 30 and len(source.train) + len(source.dev) == 144
    assert "is not there" in said[0] and "moved is not here" in said[1] and source.table is None
    assert not {r["instruction"] for r in source.train} & {r["instruction"] for r in source.dev}


def test_missing_weights_exit_4_within_seconds(rows, tmp_path, capsys):
    words = ["--data", str(rows), "--output_dir", str(tmp_path / "out"), "--model_name"]
    assert run(script.main, [*words, "Qwen/Qwen2.5-0.5B"]) == 4
    assert "hf download Qwen/Qwen2.5-0.5B" in capsys.readouterr().err.splitlines()[-1]
    empty = tmp_path / "empty"
    empty.mkdir()
    assert run(script.main, [*words, str(empty), "--check_only"]) == 4
    assert not (tmp_path / "out").exists()


def test_check_only_reads_everything_and_writes_nothing(rows, tmp_path, capsys):
    words = ["--data", str(rows), "--output_dir", str(tmp_path / "out"), "--check_only", "--model_name"]
    assert run(script.main, [*words, CHEAP]) == 0
    assert "144 train and 48 validation rows, decisions among cheap, strong" in capsys.readouterr().err
    bare = tmp_path / "bare"
    shutil.copytree(CHEAP, bare)
    (bare / "chat_template.jinja").unlink()
    assert run(script.main, [*words, str(bare), "--wrap", "chat"]) == 2
    assert "has none" in capsys.readouterr().err.splitlines()[-1]
    assert run(script.main, [*words, CHEAP, "--wrap", "alpaca", "--max_length", "40"]) == 2
    assert "max_length 40 holds no prompt" in capsys.readouterr().err.splitlines()[-1]
    assert not (tmp_path / "out").exists()


def test_the_shipped_settings_are_options_of_the_script():
    from routewright.launch import read_options, resolve

    files = sorted((ROOT / "configs" / "train_llm").glob("*.yaml"))
    assert {f.name for f in files} >= {"sample.yaml", "rtx4060.yaml"}
    for file in files:
        resolved, _ = resolve(read_options(script.main), ["--config", str(file)])
        script.check_options(resolved)
        assert f"--config configs/train_llm/{file.name}" in file.read_text()
    small = yaml.safe_load((ROOT / "configs" / "train_llm" / "rtx4060.yaml").read_text())
    assert small["four_bit"] is True and small["lora_r"] == 16


# --- token ids --------------------------------------------------------------------------------------------------------

def test_training_reads_the_ids_of_serving_and_only_the_response_counts(rows):
    from routewright.encoders import load_tokenizer
    from routewright.language_models import encode_instructions, label_ids

    tokenizer = load_tokenizer(STRONG)
    source = script.load_source(str(rows), "", "", 0, print)
    source.train.append({"instruction": "Ann " * 400, "response": "2", "label": 1})
    for wrap in ("chat", "alpaca", "none"):
        made = script.encode(tokenizer, source, source.train, wrap, 128)
        served = encode_instructions(tokenizer, source.template, wrap, [r["instruction"] for r in source.train], 128)
        answers = label_ids(tokenizer, source.template, wrap)
        for row, ids, given in zip(made, served, source.train, strict=True):
            answer = answers[given["label"]]
            assert row["input_ids"] in (ids + [answer, tokenizer.eos_token_id], ids + [answer])
            assert row["labels"] == [-100] * len(ids) + row["input_ids"][len(ids):]
        # The long prompt was cut, its answer was not.
        assert len(made[-1]["input_ids"]) in (127, 128) and answers[1] in made[-1]["labels"]


def test_plain_rows_keep_their_response(rows):
    from routewright.encoders import load_tokenizer

    tokenizer = load_tokenizer(STRONG)
    source = script.TrainingSet("x", [], [])
    given = [{"instruction": "Ann has 3 nuts. " * 50, "response": "Ben has 4."},
             {"instruction": "A", "response": "B " * 99}]
    made = script.encode(tokenizer, source, given, "alpaca", 200)
    for row, words in zip(made, given, strict=True):
        assert len(row["input_ids"]) <= 200
        response = [i for i in row["labels"] if i >= 0]
        assert words["response"].startswith(tokenizer.decode(response, skip_special_tokens=True)) and len(response) > 4
    assert made[0]["labels"][-1] == tokenizer.eos_token_id


def test_decisions_from_estimates_are_calibrated_on_the_other_half_and_weigh_cost():
    random = np.random.default_rng(1)
    feature = random.random((200, 1))
    quality = np.column_stack([feature[:, 0] < .5, np.ones(200)]).astype(float)
    estimate = script.cross_calibrated(feature, quality)
    assert ((estimate[:, 0] > .5) == (quality[:, 0] > .5)).mean() > .95
    # A half that saw noise alone says nothing of the other half's own labels.
    noise = (random.random((200, 1)) < .5).astype(float)
    assert abs(np.corrcoef(script.cross_calibrated(feature, noise)[:, 0], noise[:, 0])[0, 1]) < .25
    cost = np.tile([.1, 1.], (200, 1))
    for kind in ("linear", "binary", "capped"):
        value = script.expected_reward(Reward(kind, cost_weight=.3), cost, estimate)
        assert ((value.argmax(1) == 0) == (quality[:, 0] > .5)).mean() > .9, kind


# --- what is learnt ---------------------------------------------------------------------------------------------------

def test_all_weights_move_and_the_decisions_beat_every_constant(trained, cache):
    from routewright.routers.base import load_router

    before, after = weights(STRONG), weights(trained)
    assert before.keys() == after.keys()
    assert not [name for name in before if np.array_equal(before[name].astype(np.float32), after[name])]
    router = load_router(trained)
    area, test = auroc(router, cache)
    assert router.models == ("cheap", "strong") and area > .85
    choices = router.choices(test.prompts)
    rewards = sets.reward_table(test, Reward.named("linear", cost_weight=.3), unit_usd=sets.cost_unit_of(test))
    assert rewards[np.arange(test.n), choices].mean() > rewards.mean(0).max() + .03
    scores = json.loads((trained / "dev_scores.json").read_text())
    assert scores["label_accuracy"] > .85 and scores["reward"] > scores["best_constant_reward"] + .03
    # The end token is learnt too, so the loss is half that of the label.
    assert scores["loss"] < .25


def test_a_run_leaves_named_epochs_a_card_and_the_monitors_looks(trained, cache):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    names = {p.name for p in trained.iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json", "weights.safetensors", "router.json",
            "dev_scores.json", "train_log.jsonl", "monitor.jsonl"} <= names
    assert not list(trained.glob("*.bin")) and not (trained / "README.md").exists()
    AutoModelForCausalLM.from_pretrained(trained / "checkpoint_epoch_5")
    assert len(AutoTokenizer.from_pretrained(trained)) == len(AutoTokenizer.from_pretrained(STRONG))
    looks = [json.loads(line) for line in (trained / "monitor.jsonl").read_text().splitlines()]
    assert [row["step"] for row in looks] == [0, 18, 36, 54, 72, 90]
    assert looks[-1]["collapse/gain"] > .03 and {"share/cheap", "dev/cost_usd"} <= looks[-1].keys()
    card = json.loads((trained / "router.json").read_text())
    assert card["kind"] == "llm" and card["template"]["style"] == "bare" and card["base_model"] == STRONG
    assert card["calibrated_on"] == {"split": "dev", "prompts": 48} and len(card["train_prompts"]) > 140
    assert card["cache_fingerprint"] == OutcomeTable.load(cache).fingerprint
    # What is kept is the best epoch.
    state = json.loads((trained / "checkpoint_epoch_5" / "trainer_state.json").read_text())
    best = min((h for h in state["log_history"] if "eval_loss" in h), key=lambda h: h["eval_loss"])
    kept = f"checkpoint_epoch_{int(best['epoch'])}"
    # The last three epochs and the best one stay.
    assert {name for name in names if name.startswith("checkpoint_")} == {kept, *(f"checkpoint_epoch_{k}" for k in
                                                                                  (3, 4, 5))}
    assert len(list(trained.glob("checkpoint-*"))) == len({kept, 3, 4, 5}) - (kept[-1] in "345")
    assert (trained / kept / "model.safetensors").read_bytes() == (trained / "model.safetensors").read_bytes()


def test_the_same_line_again_changes_nothing_and_another_setting_is_refused(trained, rows, capsys):
    before = {p.name: p.read_bytes() for p in trained.iterdir() if p.is_file() and p.name != "train_log.jsonl"}
    again = dict(data=str(rows), model_name=STRONG, output_dir=str(trained), **LEARNS)
    script.main(**again)
    said = capsys.readouterr()
    assert said.err.splitlines()[-1].startswith("this run was finished before; its router: ")
    assert {name: (trained / name).read_bytes() for name in before} == before
    with pytest.raises(UserError, match="wrap: chat then, alpaca now.*--resume none"):
        script.main(**again, wrap="alpaca")
    # A run whose end was cut off writes what is missing.
    (trained / "router.json").unlink()
    script.main(**again)
    assert {name: (trained / name).read_bytes() for name in before} == before


def test_a_resumed_run_takes_the_same_steps_to_the_same_weights(trained, rows, tmp_path):
    out = tmp_path / "again"
    script.main(data=str(rows), model_name=STRONG, output_dir=str(out), **LEARNS,
                resume=str(trained / "checkpoint_epoch_4"))
    assert losses(out) == losses(trained)[72:]
    assert (out / "checkpoint_epoch_5" / "model.safetensors").read_bytes() == (
        trained / "checkpoint_epoch_5" / "model.safetensors").read_bytes()


def test_the_output_folder_is_not_the_start_and_another_start_is_refused(trained, rows, tmp_path):
    from safetensors.numpy import save_file

    with pytest.raises(UserError, match="is the output folder too"):
        script.main(data=str(rows), model_name=str(trained), output_dir=str(trained), **LEARNS)
    base = Path(shutil.copytree(STRONG, tmp_path / "base"))
    before = script.start_weights(base)
    save_file({name: value * np.float16(1.5) for name, value in weights(base).items()}, base / "model.safetensors",
              metadata={"format": "pt"})
    assert before == script.start_weights(Path(STRONG)) != script.start_weights(base)


@pytest.mark.parametrize("plain", [False, True])
def test_accumulation_changes_neither_loss_nor_step(plain, rows, tmp_path):
    """16 rows at once, or one after the other: also where rows hold unequal numbers of response tokens."""
    data = rows
    if plain:
        data = write_jsonl(tmp_path / "plain.jsonl", [
            {"instruction": f"Say {i}.", "response": f"{i} for Ann" + " and Ben" * (i % 7)} for i in range(40)])
    given = dict(data=str(data), model_name=CHEAP, global_batch_size=16, epochs=1, learning_rate=1e-3, patience=0,
                 trainer={"max_steps": 2})
    for batch in (16, 1):
        script.main(**given, batch_size=batch, output_dir=str(tmp_path / str(batch)))
    for name in ("loss", "grad_norm"):
        one, many = (losses(tmp_path / batch, name) for batch in ("16", "1"))
        assert len(one) == 2 and one == pytest.approx(many, rel=2e-4), name
    a, b = (weights(tmp_path / batch) for batch in ("16", "1"))
    assert max(np.abs(a[name].astype(float) - b[name].astype(float)).max() for name in a) < 2e-4


def test_difficulty_mode_learns_and_decides_by_calibrated_estimates(tmp_path, cache):
    from routewright.routers.base import load_router

    data = build(tmp_path, cache, "difficulty", "cheap")
    script.main(data=str(data), model_name=STRONG, output_dir=str(tmp_path / "out"), **LEARNS)
    router = load_router(tmp_path / "out")
    area, test = auroc(router, cache)
    assert area > .85 and router.template.mode == "difficulty"
    levels = router.choices(test.prompts)
    assert levels[test.quality_mean[:, 0] == 0].mean() > 6 > 3 > levels[test.quality_mean[:, 0] == 1].mean()
    scores = json.loads((tmp_path / "out" / "dev_scores.json").read_text())
    assert scores["reward"] > scores["best_constant_reward"] + .03


@pytest.fixture(scope="module")
def knows_digits(tmp_path_factory):
    """The strong sample model as if it had seen the digits 1 and 2 alone, and not only after a blank.

    Rows of tokens it never saw are all alike; adapters leave them so, and no router could tell its answers apart.
    """
    from safetensors.numpy import save_file

    from routewright.encoders import load_tokenizer

    folder = tmp_path_factory.mktemp("base") / "digits"
    shutil.copytree(STRONG, folder)
    tensors, tokenizer = weights(folder), load_tokenizer(folder)
    table = tensors["model.embed_tokens.weight"]
    for digit in "12":
        table[tokenizer.convert_tokens_to_ids(digit)] = table[tokenizer.convert_tokens_to_ids(f" {digit}")]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def test_adapters_alone_move_and_learn(tmp_path, knows_digits, rows, cache):
    from safetensors.numpy import load_file

    from routewright.language_models import load_causal
    from routewright.routers.base import load_router

    out = tmp_path / "out"
    script.main(data=str(rows), model_name=str(knows_digits), output_dir=str(out), lora_r=8, **LEARNS)
    assert not (out / "model.safetensors").exists() and not (out / "README.md").exists()
    adapter = load_file(out / "adapter_model.safetensors")
    assert all("lora_" in name for name in adapter) and len(adapter) == 2 * 7 * 4
    assert all(np.abs(value).max() > 0 for value in adapter.values())  # B starts at 0
    model, _ = load_causal(out)
    base = {name.replace(".base_layer", "").removeprefix("base_model.model."): p for name, p in
            model.state_dict().items() if "lora_" not in name}
    assert all(np.array_equal(base[name].numpy(), value.astype(np.float32))
               for name, value in weights(knows_digits).items())
    assert auroc(load_router(out), cache)[0] > .85
    scores = json.loads((out / "dev_scores.json").read_text())
    assert scores["reward"] > scores["best_constant_reward"] + .03


def test_plain_alpaca_rows_train_with_a_warning_and_make_no_router(tmp_path, capsys):
    from transformers import AutoModelForCausalLM

    words = [{"instruction": f"Say {i}.", "response": f"{i} nuts for Ann" + " and Ben" * (i % 5)} for i in range(60)]
    data = write_jsonl(tmp_path / "plain.jsonl", words)
    script.main(data=str(data), model_name=CHEAP, output_dir=str(tmp_path / "out"), **{**LEARNS, "epochs": 2},
                wrap="alpaca")
    said = capsys.readouterr().err
    assert "has no card" in said and "no router" in said and said.splitlines()[-1].startswith("weights: ")
    assert not (tmp_path / "out" / "router.json").exists()
    AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    seen = losses(tmp_path / "out")
    assert np.mean(seen[-4:]) < .7 * np.mean(seen[:2])


# --- packing ----------------------------------------------------------------------------------------------------------

def test_packed_rows_do_not_see_each_other(rows, tmp_path):
    """The mean loss of the rows is the same however they are packed, and an epoch has fewer, fuller sequences."""
    from routewright import tracking

    source = script.load_source(str(rows), "", "", 0, print)
    found = {}
    for packing in (False, True):
        model, tokenizer = script.build_model(Path(STRONG), 0, False, 0)
        made = script.encode(tokenizer, source, source.train[:40], "chat", 128)
        made = script.pack(made, 128) if packing else made
        arguments = script.training_arguments(
            output_dir=str(tmp_path), batch_size=4, global_batch_size=4, learning_rate=1e-3, epochs=1, bf16=False,
            seed=0, rows=len(made), packing=packing, max_length=128, extra={})
        trainer = script.build_trainer(model, tokenizer, arguments, source, (made, made), None,
                                       method={"patience": 0}, tracker=tracking.Silent(), say=print)
        loss = tokens = 0
        for batch in trainer.get_eval_dataloader():
            batch = trainer._prepare_inputs(batch)
            loss += float(trainer.compute_loss(trainer.model, batch, num_items_in_batch=1).detach())
            tokens += int((batch["labels"] >= 0).sum())
        found[packing] = loss, tokens, len(made)
    assert found[True][1] == found[False][1] == 80
    assert found[True][0] == pytest.approx(found[False][0], rel=1e-5)
    assert found[True][2] < found[False][2] / 3


# --- whole runs from the command line ---------------------------------------------------------------------------------

def flags(rows, **change):
    given = {"data": rows, "model_name": STRONG, **LEARNS, **change}
    return [str(word) for name, value in given.items() for word in (f"--{name}", value)]


@pytest.mark.slow
def test_a_killed_run_goes_on_to_the_same_weights(trained, rows, tmp_path):
    """One kill -9 inside a save; tests/kill_script.py makes any number, anywhere."""
    told = kill_script.trial("train_llm", flags(rows), tmp_path, kills=1, in_save=1, whole=trained)
    assert told["kills"] == told["runs"] == told["losses_equal"] == told["weights_equal"] == told["scores_equal"] == 1
    assert told["by_hand"] == 0


@pytest.mark.slow
def test_two_processes_take_the_steps_of_one(trained, rows, tmp_path):
    """The global batch of 8 as two micro-batches of 4, and as two gloo ranks of 4."""
    out = tmp_path / "ranks"
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "--",
         str(ROOT / "src" / "train_llm.py"), *flags(rows, output_dir=out)],
        env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1",
             "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("kept checkpoint-") == 1  # rank 0 alone speaks
    # Sums in another order: the curves agree, and drift apart by what float32 lets them.
    assert losses(out)[:20] == pytest.approx(losses(trained)[:20], rel=2e-3)
    assert np.mean(losses(out)) == pytest.approx(np.mean(losses(trained)), rel=.05)
    assert losses(out, "grad_norm")[0] == pytest.approx(losses(trained, "grad_norm")[0], rel=1e-4)
    assert (out / "router.json").exists()


@pytest.mark.slow
def test_four_bit_weights_train_through_adapters(tmp_path, knows_digits, rows, cache):
    pytest.importorskip("bitsandbytes")
    from routewright.routers.base import load_router

    out = tmp_path / "out"
    script.main(data=str(rows), model_name=str(knows_digits), output_dir=str(out), lora_r=8, four_bit=True, **LEARNS)
    router = load_router(out)
    assert {str(value.dtype) for value in weights(out, "adapter_model.safetensors").values()} == {"float32"}
    assert router.four_bit and auroc(router, cache)[0] > .85
    scores = json.loads((out / "dev_scores.json").read_text())
    assert scores["reward"] > scores["best_constant_reward"] + .03
