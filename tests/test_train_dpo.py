"""train_dpo from its options to its router folder: 4 bits and LoRA for real, warm starts, kills, and refusals."""

from __future__ import annotations

import json
import math
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

import train_dpo as script
from routewright import sets
from routewright.errors import UserError
from routewright.launch import run
from routewright.outcomes import OutcomeTable
from routewright.reward import Reward
from routewright.routers.base import load_router, pool_card
from routewright.shared_prefix import REFERENCE
from routewright.templates import Template

ROOT = Path(__file__).resolve().parents[1]
STRONG, CHEAP = (str(ROOT / "data" / "sample" / "models" / name) for name in ("strong", "cheap"))
LEARNS = {"batch_size": 8, "global_batch_size": 8, "learning_rate": 4e-3, "epochs": 4, "patience": 0, "lora_r": 8,
          "lora_alpha": 16}


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return write_name_cache(tmp_path_factory.mktemp("cache"))


def build(folder, cache, style="bare"):
    """Pairs of the planted cache as build_sets writes them; the path of the train pairs."""
    table = OutcomeTable.load(cache)
    reward = Reward.named("linear", cost_weight=.3)
    template = Template.of_pool(table.pool, table.models, "decision", style)
    unit = sets.cost_unit_of(table.split("train"))
    for split in ("train", "dev"):
        part = table.split(split)
        pairs = sets.preference_pairs(sets.reward_table(part, reward, unit_usd=unit), part.cost, part.quality_mean)
        card = {"kind": "dpo", "template": template.as_card(), "pool": pool_card(part.pool),
                "models": list(part.models), "reward": sets.reward_card("linear", reward), "cost_unit": "dearest",
                "unit_usd": unit, "quality": "mean", "cache": str(cache), "cache_fingerprint": part.fingerprint,
                "split": split, "split_seed": None, "counts": {}, "dropped": {}, "dev": "dpo_dev_data.json"}
        sets.write_set(folder / f"dpo_{split}_data.json", sets.dpo_rows(part, template, pairs), card)
    return folder / "dpo_train_data.json"


@pytest.fixture(scope="module")
def pairs(tmp_path_factory, cache):
    return build(tmp_path_factory.mktemp("pairs"), cache)


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)  # sums over two threads round differently
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def first(tmp_path_factory, pairs):
    """One short epoch over 4-bit weights: a router that has begun to learn, for warm starts."""
    out = tmp_path_factory.mktemp("first") / "router"
    script.main(data=str(pairs), model_name=STRONG, output_dir=str(out), four_bit=True, **{**LEARNS, "epochs": 1})
    return out


def read(folder, name="dev_scores.json"):
    return json.loads((folder / name).read_text())


def losses(folder, name="loss"):
    return [json.loads(line)[name] for line in (folder / "train_log.jsonl").read_text().splitlines()]


def weights(folder, name="adapter_model.safetensors"):
    from safetensors.numpy import load_file

    return load_file(Path(folder) / name)


def script_run(*words, ranks):
    command = [sys.executable, "-m", "routewright.torchrun", "--standalone", f"--nproc_per_node={ranks}", "--"]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "WANDB_MODE": "offline",
                   "OMP_WAIT_POLICY": "PASSIVE", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT / "src")}
    return subprocess.run([*command, str(ROOT / "src" / "train_dpo.py"), *map(str, words)], env=environment,
                          capture_output=True, text=True, timeout=300, cwd=ROOT)


# --- before any work starts -------------------------------------------------------------------------------------------

@pytest.mark.parametrize(("words", "told"), [
    (["--epoch", "3"], "did you mean 'epochs'"),
    (["--epochs", "0"], "--epochs must be 1 or more"),
    (["--beta", "0"], "--beta must be above 0"),
    (["--lora_dropout", "1"], "--lora_dropout must be from 0 to below 1"),
    (["--loss", "sigmod"], "sigmoid"),
    (["--batch_size", "12", "--global_batch_size", "16"], "no multiple of batch_size x devices = 12 x 1"),
    (["--four_bit", "true", "--lora_r", "0", "--model_name", STRONG], "nothing to train without adapters"),
    (["--four_bit", "true", "--precision", "fp32", "--model_name", STRONG], "--four_bit computes in bf16"),
    (["--val", "x.json"], "--val belongs to --data"),
    (["--min_margin", "-1"], "--min_margin must be 0 or more"),
    (["--trainer.beta", "1"], "use --beta"),
    (["--trainer.betas", "1"], "did you mean 'beta'"),
    (["--trainer.label_smoothing", "0.5"], "must be from 0 to below 0.5; got 0.5"),
    (["--loss", "ipo", "--trainer.label_smoothing", "0.1"], "--loss ipo does not read it"),
    (["--loss", "robust"], "is --loss sigmoid; add the share of pairs"),
    (["--data", "nowhere.json", "--model_name", STRONG], "no such file"),
    (["--warm_start", "nowhere"], "does not exist"),
])
def test_bad_options_stop_with_one_sentence_and_exit_2(words, told, capsys, tmp_path):
    assert run(script.main, [*words, "--output_dir", str(tmp_path / "out")]) == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert said.startswith("error: ") and told in said
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("change", "told"), [
    ({"chosen": ""}, "`chosen` must be a text that is not empty"),
    ({"rejected": "1", "chosen": "1"}, "chosen and rejected are the same text"),
    ({"chosen": "3"}, "none of the labels 1, 2"),
    ({"margin": "much"}, "`margin` must be a finite number"),
])
def test_a_bad_pair_stops_with_file_and_row(change, told, pairs, tmp_path, capsys):
    folder = Path(shutil.copytree(pairs.parent, tmp_path / "pairs"))
    rows = read(folder, pairs.name)
    rows[4] |= change
    (folder / pairs.name).write_text(json.dumps(rows))
    words = ["--data", str(folder / pairs.name), "--model_name", STRONG, "--output_dir", str(tmp_path / "out")]
    assert run(script.main, words) == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert f"{pairs.name}: row 5: " in said and told in said


def test_a_base_model_over_seven_billion_parameters_is_refused(tmp_path, pairs, capsys):
    big = {"model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"], "vocab_size": 152064, "hidden_size": 5120,
           "intermediate_size": 13824, "num_hidden_layers": 48, "num_attention_heads": 40, "num_key_value_heads": 8}
    (tmp_path / "big").mkdir()
    (tmp_path / "big" / "config.json").write_text(json.dumps(big))
    assert run(script.main, ["--model_name", str(tmp_path / "big"), "--data", str(pairs)]) == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert "billion parameters" in said and "Qwen/Qwen2.5-1.5B-Instruct" in said


def test_a_tokenizer_without_the_labels_is_refused_before_weights_are_loaded(tmp_path, pairs, capsys):
    from tokenizers import Tokenizer, models, pre_tokenizers

    base = Path(shutil.copytree(STRONG, tmp_path / "words"))
    words = Tokenizer(models.WordLevel({"<unk>": 0, "Ann": 1, "Ben": 2, "for": 3, "What": 4, "is": 5}, "<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.save(str(base / "tokenizer.json"))
    (base / "model.safetensors").write_bytes((base / "model.safetensors").read_bytes()[:5000])
    code = run(script.main, ["--model_name", str(base), "--data", str(pairs), "--check_only", "true", "--wrap",
                             "alpaca"])
    said = capsys.readouterr().err.splitlines()[-1]
    assert code in (2, 4) and ("one token" in said or "tokenizer" in said)


def test_without_bitsandbytes_a_four_bit_profile_says_so(monkeypatch, pairs, tmp_path, capsys):
    import importlib.util

    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec",
                        lambda name, *more: None if name == "bitsandbytes" else find(name, *more))
    words = ["--data", str(pairs), "--model_name", STRONG, "--four_bit", "true", "--output_dir", str(tmp_path / "o")]
    assert run(script.main, words) == 4
    assert "pip install bitsandbytes" in capsys.readouterr().err.splitlines()[-1]


def test_the_rtx4060_settings_fit_this_script_and_the_bare_line_trains_the_same(capsys):
    import inspect

    settings = yaml.safe_load((ROOT / "configs" / "train_dpo" / "rtx4060.yaml").read_text())
    defaults = {n: p.default for n, p in inspect.signature(script.main).parameters.items()}
    assert settings["four_bit"] is True and defaults["four_bit"] is None  # which on a GPU means true
    same = {k: v for k, v in settings.items() if k in defaults and k not in ("four_bit", "model_name", "output_dir")}
    assert all(defaults[name] == value or defaults[name] is None for name, value in same.items())
    assert (settings["lora_r"], settings["batch_size"], settings["global_batch_size"]) == (16, 1, 16)
    words = ["--config", str(ROOT / "configs/train_dpo/rtx4060.yaml"), "--model_name", STRONG, "--check_only", "true"]
    assert run(script.main, words) == 0
    assert "4-bit on the CPU, slow" in capsys.readouterr().err


# --- training ---------------------------------------------------------------------------------------------------------

def test_four_bits_and_lora_train_for_real_with_evaluations_between(first, cache):
    """bitsandbytes repacks 4-bit weights at an evaluation on some CPUs; adapters then train no more, or it raises."""
    import torch
    from peft import LoraConfig

    config = LoraConfig.from_pretrained(first)
    assert config.r == 8 and len(config.target_modules) == 7  # all linear layers
    adapter = weights(first)
    assert all(np.abs(value).max() > 0 for name, value in adapter.items() if "lora_B" in name)  # they began at 0
    assert {value.dtype for value in adapter.values()} == {np.dtype(np.float32)}
    begun = script.build_model(script.find_start(STRONG, "", "auto", Path("x"), print), True, 8, 16, .05, 42)[0]
    fresh = {name.replace(".default", ""): value.detach().float().numpy() for name, value in begun.named_parameters()
             if "lora_" in name}
    assert fresh.keys() == adapter.keys() and all((fresh[n] != adapter[n]).any() for n in adapter)
    router = load_router(first)
    network = router._load()[0]
    frozen = {n.replace(".default", ""): p for n, p in network.named_parameters() if "lora_" not in n}
    came = {n.replace(".default", ""): p for n, p in begun.named_parameters() if "lora_" not in n}
    assert frozen.keys() == came.keys() and all(torch.equal(frozen[n], came[n]) for n in frozen)
    assert router.kind == "dpo" and router.four_bit
    scores = read(first)
    assert scores["margin"] > scores["start/margin"] and scores["reward_margin"] > 0
    assert not (first / "training_args.bin").exists() and not (first / "README.md").exists()


def test_a_warm_start_goes_on_and_its_router_beats_the_best_constant(first, pairs, cache, tmp_path):
    out = tmp_path / "second"
    script.main(data=str(pairs), warm_start=str(first), output_dir=str(out), four_bit=True, **LEARNS)
    before, scores = read(first), read(out)
    assert scores["start/margin"] == pytest.approx(before["margin"], abs=.05)  # it begins where the first one ended
    assert scores["start/reward"] == pytest.approx(before["reward"], abs=1e-6)
    assert losses(out)[0] == pytest.approx(math.log(2), abs=.02)  # the warm start is the reference
    assert scores["margin"] > scores["start/margin"] + .5 and scores["accuracy"] > .9
    assert scores["reward"] > scores["start/reward"] + .01
    assert scores["reward"] > scores["best_constant_reward"] + .05
    moved = weights(out)
    assert all((moved[name] != value).any() for name, value in weights(first).items())

    from routewright.metrics import auroc, picked

    router, test = load_router(out), OutcomeTable.load(cache).split("test")
    assert auroc(test.quality[:, 0] >= .5, router.estimate(test.prompts)[:, 0]) > .9
    rewards = sets.reward_table(test, Reward.named("linear", cost_weight=.3))
    assert picked(rewards, router.choices(test.prompts)).mean() > rewards.mean(0).max() + .05
    history = [json.loads(line) for line in (out / "monitor.jsonl").read_text().splitlines()]
    assert [row["step"] for row in history][0] == 0 and len(history) == 5
    assert (out / REFERENCE).is_file() and len(list(out.glob("checkpoint-*"))) <= 4


def test_the_same_line_again_finds_its_work_done_and_other_starts_are_refused(first, pairs, tmp_path, capsys):
    given = dict(data=str(pairs), model_name=STRONG, four_bit=True, **{**LEARNS, "epochs": 1})
    before = (first / "router.json").read_bytes()
    script.main(output_dir=str(first), **given)
    assert "this run was finished before; its router" in capsys.readouterr().err
    assert (first / "router.json").read_bytes() == before
    with pytest.raises(UserError, match="config beta: 0.1 then, 0.2 now"):
        script.main(output_dir=str(first), **given, beta=.2)
    out = Path(shutil.copytree(first, tmp_path / "moved", symlinks=True))
    other = Path(shutil.copytree(STRONG, tmp_path / "strong"))
    from safetensors.numpy import load_file, save_file

    changed = {name: value * np.float32(1.01) for name, value in load_file(other / "model.safetensors").items()}
    save_file(changed, other / "model.safetensors", metadata={"format": "pt"})
    with pytest.MonkeyPatch.context() as patch:  # the same name, other weights
        patch.setattr(script, "find_start", lambda *_: script.Start(STRONG, other, False, True, "auto"))
        with pytest.raises(UserError, match="other start weights"):
            script.main(output_dir=str(out), **given)


def test_evaluations_between_epochs_judge_the_weights_of_their_step_and_the_loss_can_decide(pairs, tmp_path):
    """The dev reward is looked at each epoch; an evaluation at another step must not take an older look for its own."""
    given = dict(data=str(pairs), model_name=CHEAP, **{**LEARNS, "learning_rate": 2e-2, "epochs": 2, "patience": 2})
    steps = {"eval_strategy": "steps", "save_strategy": "steps", "eval_steps": 13, "save_steps": 13}
    script.main(**given, output_dir=str(tmp_path / "a"), trainer={**steps, "label_smoothing": .1, "max_steps": 30})
    newest = max((tmp_path / "a").glob("checkpoint-*"), key=lambda p: int(p.name.rpartition("-")[2]))
    looks = {row["step"]: row["dev/reward"] for row in
             map(json.loads, (tmp_path / "a" / "monitor.jsonl").read_text().splitlines())}
    judged = {h["step"]: h["eval_reward"] for h in read(newest, "trainer_state.json")["log_history"]
              if "eval_reward" in h}
    assert set(judged) >= {13, 26} and judged == {step: looks[step] for step in judged}
    assert looks[13] != looks[0]
    with pytest.raises(UserError, match="config label_smoothing: 0.1 then, 0.2 now"):
        script.main(**given, output_dir=str(tmp_path / "a"), trainer={**steps, "label_smoothing": .2, "max_steps": 30})

    script.main(**{**given, "epochs": 6}, output_dir=str(tmp_path / "b"), trainer={
        "metric_for_best_model": "loss", "save_total_limit": 1, "max_steps": 120})
    folders = sorted((tmp_path / "b").glob("checkpoint-*"), key=lambda p: int(p.name.rpartition("-")[2]))
    judged = [h["eval_loss"] for h in read(folders[-1], "trainer_state.json")["log_history"] if "eval_loss" in h]
    assert read(tmp_path / "b")["loss"] == pytest.approx(min(judged)) != max(judged)
    assert len(folders) <= 2  # the newest and the best


def test_all_weights_of_a_small_base_train_from_the_cache_alone(cache, tmp_path, capsys):
    out = tmp_path / "full"
    script.main(cache=str(cache), model_name=CHEAP, output_dir=str(out), **{
        **LEARNS, "lora_r": 0, "epochs": 2, "learning_rate": 1e-3, "loss": "ipo", "beta": .5})
    said = capsys.readouterr().err
    assert "linear reward, the best model against each other one" in said and "all weights" in said
    moved, base = weights(out, "model.safetensors"), weights(CHEAP, "model.safetensors")
    assert all((moved[name] != value).any() for name, value in base.items())
    assert read(out)["margin"] > read(out)["start/margin"]
    assert load_router(out).kind == "dpo"


def test_warm_starts_that_do_not_fit_are_refused(first, pairs, cache, tmp_path, capsys):
    def told(*words, out=tmp_path / "out"):
        assert run(script.main, ["--output_dir", str(out), *map(str, words)]) == 2
        return capsys.readouterr().err.splitlines()[-1]

    assert "belongs to the base model" in told("--warm_start", first, "--data", pairs, "--model_name", CHEAP)
    assert "is the output folder too" in told("--warm_start", first, "--data", pairs, out=first)
    assert "leave --wrap away" in told("--warm_start", first, "--data", pairs, "--wrap", "alpaca")
    full = build(tmp_path, cache, "full")
    assert "ask otherwise than the warm start" in told("--warm_start", first, "--data", full)
    other = Path(shutil.copytree(first, tmp_path / "hard", ignore=shutil.ignore_patterns("checkpoint*")))
    card = read(other, "router.json")
    card["template"]["mode"] = "difficulty"
    (other / "router.json").write_text(json.dumps(card))
    assert "levels of difficulty" in told("--warm_start", other, "--data", pairs)
    plain = tmp_path / "plain.json"
    rows = [{k: row[k] for k in ("prompt", "chosen", "rejected")} for row in read(pairs.parent, pairs.name)]
    plain.write_text(json.dumps(rows))
    assert "do not say whether" in told("--warm_start", first, "--data", plain)


def test_only_clear_pairs_are_trained_on_where_asked(pairs):
    source = script.load_source(str(pairs), "", "", 0, script.find_start(STRONG, "", "auto", Path("x"), print), print)
    margins = np.array([row["margin"] for row in source.train])
    dev = len(source.dev)
    script.keep_clear_pairs(source, .5)
    assert 0 < len(source.train) == (margins >= .5).sum() < len(margins) and len(source.dev) == dev
    with pytest.raises(UserError, match="lower --min_margin"):
        script.keep_clear_pairs(source, 99.)


def test_free_answers_train_too_but_make_no_router(pairs, tmp_path, capsys):
    rows = [{"prompt": row["prompt"], "chosen": f"call {row['chosen']} now", "rejected": f"ask {row['rejected']}"}
            for row in read(pairs.parent, pairs.name)[:60]]
    (tmp_path / "plain.json").write_text(json.dumps(rows))
    out = tmp_path / "plain"
    script.main(data=str(tmp_path / "plain.json"), model_name=CHEAP, output_dir=str(out), **{**LEARNS, "epochs": 2})
    assert "no router" in capsys.readouterr().err and not (out / "router.json").exists()
    assert read(out)["reward_margin"] > .05 and "reward" not in read(out)


# --- kills and ranks --------------------------------------------------------------------------------------------------

@pytest.mark.slow
def test_a_killed_run_ends_as_an_unbroken_one(pairs, tmp_path):
    """Dropout on: the random state, the order and the reference all have to come back."""
    flags = ["--data", str(pairs), "--model_name", CHEAP, "--epochs", "3", "--batch_size", "8", "--global_batch_size",
             "16", "--learning_rate", "2e-3", "--patience", "0"]
    told = kill_script.trial("train_dpo", flags, tmp_path, kills=1, in_save=1)
    assert told["by_hand"] == 0 and told["losses_equal"] == told["weights_equal"] == told["scores_equal"] == \
        told["runs"]


@pytest.mark.slow
def test_two_ranks_give_the_losses_of_one(pairs, tmp_path):
    settings = {"data": str(pairs), "model_name": CHEAP, "epochs": 2, "global_batch_size": 16, "learning_rate": 2e-3,
                "patience": 0, "lora_dropout": 0.0}
    script.main(**settings, batch_size=16, output_dir=str(tmp_path / "1"))
    flags = [word for name, value in settings.items() for word in (f"--{name}", value)]
    done = script_run(*flags, "--batch_size", 8, "--output_dir", tmp_path / "2", ranks=2)
    assert done.returncode == 0, done.stderr[-2000:]
    one, two = losses(tmp_path / "1"), losses(tmp_path / "2")
    assert len(one) == len(two) and np.allclose(one, two, atol=1e-4)
    a, b = (read(tmp_path / ranks) for ranks in "12")
    assert a["reward"] == b["reward"] and a["margin"] == pytest.approx(b["margin"], abs=1e-2)
