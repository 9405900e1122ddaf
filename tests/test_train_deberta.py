"""train_deberta from its options to its router folder: both forms, both launch doors, and the ways it must stop."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import yaml
from planted import make_outcomes

import train_deberta as script
from routewright import base_models
from routewright.errors import MissingSetup, UserError
from routewright.launch import run
from routewright.outcomes import OutcomeTable, write_outcomes
from routewright.router_data import PadBatch, load_examples
from routewright.textfiles import write_jsonl

ROOT = Path(__file__).resolve().parents[1]
LAUNCHER = ROOT / "cmd" / "run_train_deberta.sh"
POOL = """name: t
prices_dated: 2026-11-20
models:
  - {name: cheap, price_input: 0.1, price_output: 0.4}
  - {name: strong, price_input: 1.5, price_output: 6.0}
"""


def environment(**change):
    ours = ("NUM_GPUS", "PROFILE", "DRY_RUN", "NUM_PROCESSES", "RANK", "WORLD_SIZE")
    kept = {k: v for k, v in os.environ.items() if k not in ours}
    return {**kept, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "WANDB_MODE": "offline", "CUDA_VISIBLE_DEVICES": "",
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", **change}


def launcher(*words, cwd=ROOT, **change):
    return subprocess.run([str(LAUNCHER), *map(str, words)], cwd=cwd, env=environment(**change), capture_output=True,
                          text=True, timeout=300)


def script_run(*words):
    return subprocess.run([sys.executable, str(ROOT / "src" / "train_deberta.py"), *map(str, words)], env=environment(),
                          capture_output=True, text=True, timeout=300)


def wait_for_steps(folder, count, process):
    until = time.monotonic() + 120
    log = folder / "train_log.jsonl"
    while time.monotonic() < until and process.poll() is None:
        if log.exists() and log.read_text().count("\n") >= count:
            return
        time.sleep(.02)
    raise AssertionError(f"{count} steps were not seen; the run ended with {process.poll()}")


def losses(folder, name="loss"):
    return [json.loads(line)[name] for line in (folder / "train_log.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def rows_file(tmp_path_factory):
    """160 rows whose label hangs on one word, so that two epochs are enough to learn it."""
    random = np.random.default_rng(0)
    words = np.array("river stone window garden paper silver market morning travel winter letter simple".split())
    rows = []
    for i in range(160):
        hard = i % 2
        text = " ".join(random.choice(words, size=int(random.integers(4, 24))))
        text += f" {'hard' if hard else 'plain'} case {i}"
        rows.append({"question": text, "llm_id": "cheap", "label": 1 - hard})
    return write_jsonl(tmp_path_factory.mktemp("rows") / "rows.jsonl", rows)


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cache")
    write_outcomes(folder / "outcomes.jsonl.gz", make_outcomes(240, samples=2))
    (folder / "pool.yaml").write_text(POOL)
    return folder


@pytest.fixture(scope="module")
def still_base(tmp_path_factory, rows_file):
    """A tiny base model without dropout: what differs between two runs is then arithmetic, not chance."""
    from routewright.router_data import read_pairs
    from routewright.tiny_deberta import build_tiny

    model, tokenizer = build_tiny(read_pairs(rows_file).questions + ["cheap"], 2, hidden_dropout_prob=0.0,
                                  attention_probs_dropout_prob=0.0)
    folder = tmp_path_factory.mktemp("base")
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


# --- before any work starts -------------------------------------------------------------------------------------------

@pytest.mark.parametrize(("words", "told"), [
    (["--epoch", "3"], "did you mean 'epochs'"),
    (["--epochs", "0"], "--epochs must be 1 or more"),
    (["--learning_rate", "-1"], "above 0"),
    (["--batch_size", "12", "--global_batch_size", "16"], "no multiple of batch_size x devices = 12 x 1"),
    (["--form", "pool"], "needs --cache"),
    (["--cache", "x", "--val", "y"], "brings its own dev split"),
    (["--trainer.learning_rates", "1"], "did you mean 'learning_rate'"),
    (["--trainer.seed", "1"], "use --seed"),
    (["--trainer.weight_decay", "abc"], "is no float"),
    (["--data", "nowhere.jsonl"], "no such file"),
    (["--num_labels", "two"], "whole number"),
])
def test_bad_options_stop_with_one_sentence_and_exit_2(words, told, capsys, tmp_path):
    assert run(script.main, [*words, "--output_dir", str(tmp_path / "out")]) == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert said.startswith("error: ") and told in said
    assert not (tmp_path / "out").exists()


def test_bad_rows_and_one_class_labels_exit_2(tmp_path, capsys):
    rows = [{"question": "a", "llm_id": "m", "label": 1}, {"question": "b", "llm_id": "m", "label": 7}]
    file = write_jsonl(tmp_path / "d.jsonl", rows)
    assert run(script.main, ["--data", str(file), "--check_only"]) == 2
    assert "d.jsonl:2: `label` is 7 but NUM_LABELS is 2" in capsys.readouterr().err
    rows = [{"question": f"unlike {i * 977} {chr(97 + i % 26) * 9}", "llm_id": "m", "label": 1} for i in range(80)]
    file = write_jsonl(tmp_path / "d.jsonl", rows)
    assert run(script.main, ["--data", str(file), "--check_only"]) == 2
    assert "labels are 1; a router needs right and wrong answers" in capsys.readouterr().err


def test_validation_questions_must_be_new(tmp_path, rows_file):
    rows = [json.loads(line) for line in rows_file.read_text().splitlines()]
    val = write_jsonl(tmp_path / "val.jsonl", [{"question": "Fresh", "llm_id": "cheap", "label": 0},
                                               {**rows[4], "question": rows[4]["question"].upper()}])
    with pytest.raises(UserError, match=r"val.jsonl:2: .*rows.jsonl:5"):
        load_examples(str(rows_file), str(val), "", "auto", 2, 0, print)


def test_a_named_model_is_found_or_the_run_stops_and_only_auto_falls_back(monkeypatch):
    said = []
    assert base_models.find_base("tiny", said.append).folder is None and not said
    with pytest.raises(MissingSetup, match="hf download microsoft/deberta-v3-base.*--model_name tiny"):
        base_models.find_base("microsoft/deberta-v3-base", said.append)
    assert base_models.find_base("auto", said.append).name == "tiny" and "WARNING" in said[0]
    # With the hub allowed but dead, the answer must come in seconds too.
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    for name in ("HTTPS_PROXY", "https_proxy"):
        monkeypatch.delenv(name, raising=False)
    start = time.monotonic()
    with pytest.raises(MissingSetup):
        base_models.find_base("microsoft/deberta-v3-base", said.append)
    assert time.monotonic() - start < 5


def test_a_cache_gives_train_and_dev_and_never_test(cache):
    table = OutcomeTable.load(cache)
    train, dev, source = load_examples("", "", str(cache), "auto", 2, 0, lambda text: None)
    assert source.form == "pool" and source.models == ("cheap", "strong")
    assert len(train) == table.splits["train"] and len(dev) == table.splits["dev"]
    assert np.array_equal(train.labels, table.split("train").quality_mean)
    assert set(np.unique(train.labels)) == {0, .5, 1}
    test = {p.prompt for p in table.split("test").prompts}
    assert not test & {*train.questions, *dev.questions}
    train, dev, source = load_examples("", "", str(cache), "pair", 2, 0, lambda text: None)
    assert len(train) == 2 * table.splits["train"] and source.num_labels == 2
    assert train.llm_ids[:2] == ["cheap", "strong"]


def test_split_seed_divides_as_evaluation_does_and_never_reads_its_test_prompts(cache):
    from routewright.prompts import seed_splits

    prompts = OutcomeTable.load(cache).prompts
    found = {}
    for seed in (0, 1):
        splits = dict(zip([p.prompt_id for p in prompts], seed_splits(prompts, seed), strict=True))
        for form in ("pool", "pair"):
            train, dev, source = load_examples("", "", str(cache), form, 2, 0, lambda text: None, seed)
            assert {p.prompt_id for p in source.table.prompts} == {k for k, v in splits.items() if v == "train"}
            assert {p.prompt_id for p in source.dev_table.prompts} == {k for k, v in splits.items() if v == "dev"}
            test = {p.prompt for p in prompts if splits[p.prompt_id] == "test"}
            assert test and not test & {*train.questions, *dev.questions}
        found[seed] = splits
    assert found[0] != found[1]


def test_logging_is_frequent_even_on_long_runs():
    settings = {"output_dir": "x", "batch_size": 32, "global_batch_size": 0, "learning_rate": 1e-3, "epochs": 1,
                "bf16": False, "seed": 1, "extra": {}}
    assert [script.training_arguments(rows=n, **settings).logging_steps for n in (8490, 320)] == [25, 5]


def test_validation_metrics():
    pair = script.Source("pair", ("m",), 2)
    logits = np.array([[2, 0], [1, 0], [0, 1], [0, .5]])
    assert script.validation_metrics(logits, np.array([0, 0, 1, 1]), pair) == {"accuracy": 1.0, "auroc": 1.0}
    assert script.validation_metrics(logits, np.array([1, 1, 0, 0]), pair)["auroc"] == 0.0
    assert "auroc" not in script.validation_metrics(logits, np.array([1, 1, 1, 1]), pair)
    pool = script.Source("pool", ("a", "b"), 2)
    found = script.validation_metrics(np.array([[3., -1], [-1, 2], [1, 1]]), np.array([[1, 0], [0, .5], [1, 1]]), pool)
    assert found["auroc/a"] == 1.0 and found["auroc/b"] == 1.0 and found["auroc"] == 1.0
    ordinal = script.validation_metrics(np.eye(3) * 5, np.arange(3), script.Source("pair", ("m",), 3))
    assert ordinal["auroc"] == 1.0


def test_the_precision_probe_leaves_model_and_chance_as_they_were(still_base, rows_file):
    import torch

    model, tokenizer = base_models.load_pretrained(still_base, {})
    before = [p.clone() for p in model.parameters()]
    state = torch.random.get_rng_state()
    rows = base_models.median_rows([{"input_ids": [2, *range(9, 9 + n), 3], "labels": 1} for n in range(21)], 5)
    assert [len(r["input_ids"]) for r in rows] == [10, 11, 12, 13, 14] and "labels" not in rows[0]
    fp32, bf16 = base_models.time_precisions(model, PadBatch(tokenizer.pad_token_id)(rows))
    assert fp32 > 0 and bf16 > 0 and torch.equal(state, torch.random.get_rng_state())
    assert all(torch.equal(a, b) and b.grad is None for a, b in zip(before, model.parameters(), strict=True))


# --- the launcher -----------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("folder", [".", "cmd"])
def test_dry_run_prints_the_torchrun_line_from_anywhere(folder):
    bare = launcher(cwd=ROOT / folder, DRY_RUN="1").stdout.split()
    assert bare[:4] == ["torchrun", "--standalone", "--nproc_per_node=1", "--"]
    assert bare[bare.index("--data") + 1] == str(ROOT / "data" / "sample_data.jsonl")
    assert bare[bare.index("--output_dir") + 1] == str(ROOT / "data" / "runs" / "deberta_checkpoints")
    done = launcher("data/sample_data.jsonl", "", "tiny", 2, 8, "1e-3", 2, "out", "--seed", 3, cwd=ROOT / folder,
                    DRY_RUN="1", NUM_GPUS="4")
    words = done.stdout.split()
    assert "--nproc_per_node=4" in words
    flags = dict(zip(words[5::2], words[6::2], strict=True))
    assert (ROOT / folder / flags.pop("--data")).samefile(ROOT / "data" / "sample_data.jsonl")
    assert flags == {"--model_name": "tiny", "--num_labels": "2", "--batch_size": "8", "--learning_rate": "1e-3",
                     "--epochs": "2", "--output_dir": "out", "--seed": "3"}


def test_profiles_and_process_counts():
    assert "--nproc_per_node=4" in launcher(DRY_RUN="1", PROFILE="4gpu").stdout
    small = launcher(DRY_RUN="1", PROFILE="rtx4060").stdout
    assert "--nproc_per_node=1" in small and "--batch_size 8 --global_batch_size 16" in small
    assert "--nproc_per_node=2" in launcher(DRY_RUN="1", PROFILE="cpu", NUM_PROCESSES="2").stdout
    cached = launcher("--cache", "c", DRY_RUN="1").stdout
    assert "--cache c" in cached and "--data" not in cached
    for code, change in ((2, {"PROFILE": "h200"}), (2, {"NUM_GPUS": "some"}), (2, {"NUM_PROCESSES": "0"}),
                         (4, {"NUM_GPUS": "9"})):
        done = launcher(**change)
        assert done.returncode == code and done.stderr.startswith("error: "), change
    done = launcher("a", "b", "c", 2, 16, "2e-5", 3, "out", "ninth")
    assert done.returncode == 2 and "'ninth' is a ninth positional" in done.stderr
    assert "OUT" in launcher("--help").stdout


def test_mistakes_show_once_with_their_own_exit_code(tmp_path):
    start = time.monotonic()
    done = launcher("data/sample_data.jsonl", "", "microsoft/deberta-v3-base", NUM_PROCESSES="2", cwd=ROOT / "cmd")
    assert done.returncode == 4 and "hf download microsoft/deberta-v3-base" in done.stderr.splitlines()[-1]
    assert time.monotonic() - start < 5
    (tmp_path / "bad.jsonl").write_text('{"question": "a", "llm_id": "m", "label": 1}\n{"question": "b"')
    done = launcher("bad.jsonl", "", "tiny", cwd=tmp_path, NUM_PROCESSES="2")
    assert done.returncode == 2 and "bad.jsonl:2: not JSON" in done.stderr.splitlines()[-1]
    assert done.stderr.count("not JSON") == 1


# --- whole runs -------------------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def pair_run(tmp_path_factory, rows_file):
    """Two epochs of the tiny model, all 8 positionals, from cmd/, through torchrun, tracked offline."""
    out = tmp_path_factory.mktemp("pair") / "router"
    done = launcher(rows_file, "", "tiny", 2, 16, "2e-3", 2, out, "--wandb", "true", cwd=ROOT / "cmd")
    assert done.returncode == 0, done.stderr
    return out, done


def test_a_run_leaves_a_router_folder_and_named_epochs(pair_run):
    out, done = pair_run
    assert {"config.json", "model.safetensors", "tokenizer.json", "router.json", "dev_scores.json", "train_log.jsonl",
            "config.resolved.yaml", "checkpoint_epoch_1", "checkpoint_epoch_2"} <= {p.name for p in out.iterdir()}
    assert not list(out.glob("*.bin"))
    resolved = yaml.safe_load((out / "config.resolved.yaml").read_text())
    assert resolved["model_name"] == "tiny" and resolved["learning_rate"] == 2e-3 and resolved["epochs"] == 2
    assert {"loss", "accuracy", "auroc"} <= json.loads((out / "dev_scores.json").read_text()).keys()
    assert "dev auroc" in done.stderr and "Traceback" not in done.stderr
    assert "wandb leet" in done.stdout
    record, = (out / "wandb").glob("offline-run-*")
    seen = subprocess.run([str(Path(sys.executable).with_name("wandb")), "leet", "inspect", "--summary", "--json",
                           str(record)], env=environment(), capture_output=True, text=True, check=True)
    assert {"train/loss", "train/learning_rate", "dev/loss", "dev/auroc"} <= json.loads(seen.stdout)["summary"].keys()
    assert losses(out)[-1] < losses(out)[0]


def test_every_checkpoint_loads_in_the_named_classes_and_the_best_one_is_kept(pair_run):
    import torch
    from transformers import AutoModelForSequenceClassification, AutoTokenizer, DebertaV2ForSequenceClassification

    out, _ = pair_run
    tokenizer = AutoTokenizer.from_pretrained(out)
    texts = ["river stone hard case 3", "winter letter plain"]
    batch = tokenizer(texts, ["cheap"] * 2, return_tensors="pt", padding=True)
    found = {}
    with torch.no_grad():
        for name in ("checkpoint_epoch_1", "checkpoint_epoch_2", "."):
            logits = [kind.from_pretrained(out / name).eval()(**batch).logits
                      for kind in (DebertaV2ForSequenceClassification, AutoModelForSequenceClassification)]
            assert torch.equal(*logits)
            found[name] = logits[0]
    state = json.loads((out / "checkpoint_epoch_2" / "trainer_state.json").read_text())
    best = min((h for h in state["log_history"] if "eval_loss" in h), key=lambda h: h["eval_loss"])
    assert torch.equal(found["."], found[f"checkpoint_epoch_{int(best['epoch'])}"])


def test_the_folder_is_a_router(pair_run, rows_file):
    from routewright.prompts import text_hash
    from routewright.routers.base import load_router
    from routewright.schema import Prompt

    out, _ = pair_run
    router = load_router(out)
    assert router.models == ("cheap",) and router.form == "pair"
    rows = [json.loads(line) for line in rows_file.read_text().splitlines()]
    estimate = router.estimate([Prompt(str(i), r["question"]) for i, r in enumerate(rows)])
    labels = np.array([r["label"] for r in rows])
    # Polarity: 1 means that this model will be right.
    assert estimate.shape == (160, 1) and script.auroc(labels == 1, estimate[:, 0]) > .9
    card = json.loads((out / "router.json").read_text())
    assert card["base_model"] == "tiny" and card["kind"] == "trained_deberta"
    trained = set(card["train_prompts"])
    seen = sum(text_hash(r["question"]) in trained for r in rows)
    assert 100 < seen < 160  # the held-out rows are not among them


def test_running_the_same_line_again_changes_nothing_and_another_setting_is_refused(pair_run, rows_file):
    out, _ = pair_run
    before = (out / "model.safetensors").read_bytes()
    words = ["--data", rows_file, "--model_name", "tiny", "--learning_rate", "2e-3", "--epochs", 2, "--output_dir", out]
    scored = (out / "dev_scores.json").stat().st_mtime_ns
    done = script_run(*words)
    assert done.returncode == 0 and "nothing is left to train" in done.stdout, done.stderr
    assert done.stderr.splitlines()[-1].startswith("this run was finished before; its router: ")
    assert (out / "model.safetensors").read_bytes() == before
    assert (out / "dev_scores.json").stat().st_mtime_ns == scored
    done = script_run(*words, "--max_length", "64", "--patience", "5")
    assert done.returncode == 2 and "max_length: 512 then, 64 now; config patience: 2 then, 5 now" in done.stderr
    assert "--resume none" in done.stderr.splitlines()[-1]
    assert (out / "model.safetensors").read_bytes() == before and (out / "router.json").exists()


def test_pool_form_learns_a_planted_signal_in_one_pass_per_prompt(tmp_path, cache):
    from routewright.routers.base import load_router

    out = tmp_path / "router"
    words = ["--cache", cache, "--model_name", "tiny", "--epochs", 6, "--output_dir", out]
    done = script_run(*words, "--wandb", "true")
    assert done.returncode == 0, done.stderr
    router = load_router(out)
    assert router.models == ("cheap", "strong") and router.form == "pool"
    test = OutcomeTable.load(cache).split("test")
    estimate = router.estimate(test.prompts)
    assert script.auroc(test.quality[:, 0] >= .5, estimate[:, 0]) > .8
    scores = json.loads((out / "dev_scores.json").read_text())
    assert {"auroc/cheap", "aiq", "apgr"} <= scores.keys() and scores["apgr"] > .6
    card = json.loads((out / "router.json").read_text())
    assert card["cache_fingerprint"] and card["pool"]["models"][0]["price_input"] == 0.1
    check_monitor(out, OutcomeTable.load(cache), router, scores)
    before = (out / "monitor.jsonl").read_bytes()
    assert script_run(*words).returncode == 0 and (out / "monitor.jsonl").read_bytes() == before


def check_monitor(out, table, router, scores):
    """The history, the kept scores and W&B's record agree with what the saved router decides on the dev prompts."""
    from routewright import decide, scoring
    from routewright.monitor import read_history

    train, dev = table.split("train"), table.split("dev")
    weight = scoring.indifference_weight(train)
    chosen = decide.choose(router.estimate(dev.prompts), decide.expected_cost(train, dev), weight)
    reward = (dev.quality_mean - weight * dev.cost)[np.arange(dev.n), chosen].mean()
    history = read_history(out)
    assert len(history) == 6 and scores["reward"] == pytest.approx(reward, abs=1e-7)
    kept = [row for row in history if row["dev/reward"] == pytest.approx(reward, abs=1e-6)]
    assert kept and kept[0]["share/strong"] == pytest.approx(chosen.mean()) and scores["collapse/gain"] > .05
    record, = (out / "wandb").glob("offline-run-*")
    wandb = [str(Path(sys.executable).with_name("wandb")), "leet", "inspect", "--json"]
    summary, lines = (subprocess.run([*wandb, *more, str(record)], env=environment(), capture_output=True, text=True,
                                     check=True).stdout for more in (["--summary"], []))
    assert json.loads(summary)["summary"]["dev/reward"] == pytest.approx(reward, abs=1e-6)
    drawn = [row["history"]["item"] for row in map(json.loads, lines.splitlines()) if row["type"] == "history"]
    for name in ("dev/loss", "dev/quality", "dev/cost_usd", "dev/reward", "share/cheap", "collapse/top_share",
                 "collapse/entropy", "collapse/gain"):
        points = [(row["_step"], row[name]) for row in drawn if name in row]
        assert len(points) == 6, name
        if name != "dev/loss":
            assert points == [(row["step"], pytest.approx(row[name])) for row in history], name
    assert any("train/loss" in row for row in drawn)


@pytest.mark.slow
def test_accumulation_and_two_processes_take_the_same_steps(tmp_path, still_base, rows_file):
    """One global batch of 16, cut three ways: whole, as two micro-batches, as two gloo ranks."""
    common = ["--data", rows_file, "--model_name", still_base, "--epochs", 1, "--learning_rate", "1e-3",
              "--global_batch_size", 16]
    for name, batch, ranks in (("whole", 16, 1), ("halves", 8, 1), ("ranks", 8, 2)):
        done = launcher(*common, "--batch_size", batch, "--output_dir", tmp_path / name, NUM_PROCESSES=str(ranks))
        assert done.returncode == 0, done.stderr
        assert done.stderr.count("kept the best epoch") == 1  # rank 0 alone speaks
    whole = losses(tmp_path / "whole")
    for name in ("halves", "ranks"):
        assert losses(tmp_path / name) == pytest.approx(whole, abs=2e-4), name
        # Equal norms of the whole gradient are clipped equally.
        assert losses(tmp_path / name, "grad_norm") == pytest.approx(losses(tmp_path / "whole", "grad_norm"), rel=2e-3)
    scores = [json.loads((tmp_path / n / "dev_scores.json").read_text())["loss"] for n in ("whole", "halves", "ranks")]
    assert scores == pytest.approx([scores[0]] * 3, abs=1e-4)


@pytest.mark.slow
def test_bf16_balanced_compat_and_one_output(tmp_path, rows_file):
    done = script_run("--data", rows_file, "--form", "pair_compat", "--model_name", "tiny", "--epochs", 1,
                      "--precision", "bf16", "--class_weights", "balanced", "--output_dir", tmp_path / "a")
    assert done.returncode == 0, done.stderr
    from transformers import AutoTokenizer
    assert "<SEP>" in AutoTokenizer.from_pretrained(tmp_path / "a").get_vocab()
    done = script_run("--data", rows_file, "--num_labels", 1, "--model_name", "tiny", "--epochs", 1,
                      "--output_dir", tmp_path / "b")
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "b" / "config.json").read_text())["id2label"] == {"0": "label_0"}


@pytest.mark.slow
def test_a_killed_run_goes_on_to_the_same_weights(tmp_path, cache):
    words = ["--cache", str(cache), "--model_name", "tiny", "--epochs", "3", "--output_dir"]
    assert script_run(*words, tmp_path / "whole").returncode == 0
    broken = tmp_path / "broken"
    process = subprocess.Popen([sys.executable, str(ROOT / "src" / "train_deberta.py"), *words, str(broken)],
                               env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
                               start_new_session=True)
    wait_for_steps(broken, len(losses(tmp_path / "whole")) // 2, process)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert not (broken / "router.json").exists()
    assert script_run(*words, broken).returncode == 0
    assert losses(broken) == losses(tmp_path / "whole")
    for name in ("model.safetensors", "monitor.jsonl"):
        assert (broken / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name
    shutil.rmtree(broken)


@pytest.mark.slow
def test_a_rank_that_dies_takes_the_job_down_with_exit_3_and_no_orphans(tmp_path, rows_file):
    out = tmp_path / "router"
    words = ["--data", rows_file, "--model_name", "tiny", "--epochs", 60, "--patience", 0, "--output_dir", out]
    with open(tmp_path / "err", "w") as said:
        process = subprocess.Popen([str(LAUNCHER), *map(str, words)], env=environment(NUM_PROCESSES="2"), stderr=said,
                                   stdout=subprocess.DEVNULL)
        wait_for_steps(out, 8, process)
        ranks = [int(p) for p in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()]
        ranks = [p for p in ranks if b"train_deberta.py" in Path(f"/proc/{p}/cmdline").read_bytes()]
        assert len(ranks) == 2
        os.kill(ranks[1], signal.SIGKILL)
        start = time.monotonic()
        assert process.wait(timeout=60) == 3
    assert time.monotonic() - start < 15  # 10 s on a machine of its own
    assert not any(Path(f"/proc/{p}").exists() for p in ranks)
    assert "died; run the same command again" in (tmp_path / "err").read_text()
