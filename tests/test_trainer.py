"""The safety net on a model of ten thousand parameters: what is broken off goes on as if it had not been.

Every test trains in this process except those of ranks and kills, which use `kill_training`.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import kill_training as kt
import pytest

from routewright import checkpoints as ck
from routewright.errors import MissingSetup, PartialRun, UserError

pytest.importorskip("transformers")
SEVEN = ("model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json",
         "training_args.bin", "config.json")


@pytest.fixture(autouse=True)
def quiet(monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


def at_step(step: int, act):
    """A callback that calls `act()` at the end of one step."""
    from transformers import TrainerCallback

    class At(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == step:
                act()

    return At()


def sigterm() -> None:
    os.kill(os.getpid(), signal.SIGTERM)


def figures(trainer, result) -> dict:
    """All that must be equal between a broken and an unbroken run."""
    from routewright.trainer import train_log

    keep = ("loss", "grad_norm", "learning_rate", "step", "epoch", "eval_loss", "train_loss")
    return {"log": train_log(trainer.args.output_dir), "train_loss": result.training_loss,
            "history": [{k: row[k] for k in keep if k in row} for row in trainer.state.log_history],
            "weights": kt.weights_digest(trainer)}


def broken_then_resumed(out: Path, steps: list[int], **options) -> dict:
    for step in steps:
        trainer = kt.make(out, **options)
        trainer.add_callback(at_step(step, sigterm))
        # The signal arrives in the step after the one named, or in that one, as the thread has it.
        with pytest.raises(PartialRun, match=r"SIGTERM after step \d+ of .*checkpoint-\d+"):
            trainer.run()
    trainer = kt.make(out, **options)
    return figures(trainer, trainer.run())


def unbroken_run(out: Path, **options) -> dict:
    trainer = kt.make(out, **options)
    return figures(trainer, trainer.run())


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    return unbroken_run(tmp_path_factory.mktemp("whole") / "run")


@pytest.fixture(scope="module")
def half_run(tmp_path_factory):
    """A run folder that was stopped after step 14, with checkpoints of several steps."""
    out = tmp_path_factory.mktemp("half") / "run"
    trainer = kt.make(out)
    trainer.add_callback(at_step(14, sigterm))
    with pytest.raises(PartialRun):
        trainer.run()
    return out


@pytest.fixture
def half(half_run, tmp_path):
    shutil.copytree(half_run, tmp_path / "run", symlinks=True)
    return tmp_path / "run"


# ---- resume ---------------------------------------------------------------------------------------------------------

def test_a_run_stopped_twice_equals_an_unbroken_one(tmp_path, unbroken):
    assert broken_then_resumed(tmp_path / "run", [6, 19]) == unbroken
    assert len(unbroken["log"]) == 36


def test_epoch_names_load_and_the_last_one_is_the_final_model(tmp_path):
    import torch
    from transformers import BertForSequenceClassification

    trainer = kt.make(tmp_path / "run", save_strategy="epoch")
    trainer.run()
    batch = {k: v for k, v in kt.collate(kt.rows()[:4]).items() if k in ("input_ids", "attention_mask")}
    loaded = BertForSequenceClassification.from_pretrained(tmp_path / "run/checkpoint_epoch_3").eval()
    with torch.no_grad():
        assert torch.equal(loaded(**batch).logits, trainer.model.eval()(**batch).logits)
    assert sorted(ck.epoch_names(tmp_path / "run")) == [f"checkpoint_epoch_{k}" for k in (1, 2, 3)]


def test_length_grouped_order_survives_a_stop_in_a_later_epoch(tmp_path):
    options = {"train_sampling_strategy": "group_by_length", "gradient_accumulation_steps": 2}
    assert broken_then_resumed(tmp_path / "b", [10], **options) == unbroken_run(tmp_path / "a", **options)


def test_adapters_are_sealed_and_resumed_like_whole_weights(tmp_path, monkeypatch):
    from peft import LoraConfig, PeftModel, get_peft_model

    whole_model = kt.model

    def adapted(dropout):
        config = LoraConfig(r=4, target_modules="all-linear", lora_dropout=0.1, task_type="SEQ_CLS")
        return get_peft_model(whole_model(dropout), config)

    monkeypatch.setattr(kt, "model", adapted)
    out = tmp_path / "broken"
    assert broken_then_resumed(out, [9]) == unbroken_run(tmp_path / "whole")
    _, newest = ck.checkpoints(out)[-1]
    files = ck.verify(newest).manifest["files"]
    assert {"adapter_model.safetensors", "adapter_config.json"} <= files.keys() and "model.safetensors" not in files
    loaded = PeftModel.from_pretrained(whole_model(), newest)
    assert any(value.abs().sum() > 0 for name, value in loaded.state_dict().items() if "lora_B" in name)
    # A torn adapter is noticed, and the checkpoint before it taken.
    os.truncate(newest / "adapter_model.safetensors", 50)
    assert ck.newest_verified(out, lambda text: None).step < int(newest.name.split("-")[1])


class Crash(Exception):
    """Stands for a kill at one point of the program."""


SCORES = {1: 0.5, 2: 0.9, 3: 0.8, 4: 0.7, 5: 0.99}


def early_stopping_run(out: Path, crash: str = "", at: int = 0) -> dict:
    """Scores by epoch: the best is 2 and, with a patience of 2, 4 is the last. Crashes where it is told to."""
    from transformers import EarlyStoppingCallback, TrainerCallback

    def score(prediction) -> dict:
        epoch = round(trainer.state.epoch)
        if (crash, at) == ("evaluate", epoch):
            raise Crash
        return {"score": SCORES[epoch]}

    class At(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if (crash, at) == ("step", state.global_step):
                raise Crash

        def on_save(self, args, state, control, **kwargs):
            if (crash, at) == ("saved", state.global_step):
                raise Crash

    trainer = kt.make(out, eval_strategy="epoch", save_steps=4, load_best_model_at_end=False, num_train_epochs=5,
                      metric_for_best_model="score", greater_is_better=True, save_total_limit=1,
                      options={"eval_dataset": kt.rows(8), "compute_metrics": score})
    trainer.args.load_best_model_at_end = True  # the Trainer wants equal strategies for it; the net does not need them
    trainer.add_callback(EarlyStoppingCallback(early_stopping_patience=2))
    trainer.add_callback(At())
    if crash:
        with pytest.raises(Crash):
            trainer.run()
        return {}
    result = trainer.run()
    return {**figures(trainer, result), "best": Path(trainer.state.best_model_checkpoint).name,
            "metric": trainer.state.best_metric}


def test_evaluation_early_stopping_and_the_best_model_survive_crashes(tmp_path):
    whole = early_stopping_run(tmp_path / "a")
    assert len(whole["log"]) == 48 and whole["best"] == "checkpoint-24" and whole["metric"] == 0.9
    for crash, at in (("evaluate", 2), ("step", 41), ("saved", 48)):
        early_stopping_run(tmp_path / "b", crash, at)
    assert early_stopping_run(tmp_path / "b") == whole


def test_the_best_model_is_found_where_the_run_folder_went(tmp_path):
    whole = early_stopping_run(tmp_path / "a")
    early_stopping_run(tmp_path / "b", "step", 41)
    (tmp_path / "b").rename(tmp_path / "c")
    assert early_stopping_run(tmp_path / "c") == whole
    (tmp_path / "c").rename(tmp_path / "b")
    assert early_stopping_run(tmp_path / "b") == whole  # a finished one too


def test_a_signal_during_a_save_lets_it_end_and_stops_after_it(tmp_path, unbroken):
    from routewright.trainer import SafeTrainer

    class Saves(SafeTrainer):
        def _save_optimizer_and_scheduler(self, folder):
            if self.state.global_step == 8:
                sigterm()
            super()._save_optimizer_and_scheduler(folder)

    out = tmp_path / "run"
    with pytest.raises(PartialRun, match="SIGTERM after step 9"):
        kt.make(out, base=Saves).run()
    assert [step for step, _ in ck.checkpoints(out)][-2:] == [8, 9] and not list(out.glob(".tmp-*"))
    trainer = kt.make(out)
    assert figures(trainer, trainer.run()) == unbroken


def test_nothing_to_resume_says_so_and_none_keeps_the_old_ones_aside(half, capsys, unbroken):
    trainer = kt.make(half)
    assert figures(trainer, trainer.run(resume="none")) == unbroken
    assert "previous-checkpoint-" in capsys.readouterr().out
    assert (half / "previous-checkpoint-12").is_dir()


def test_a_finished_run_resumes_to_its_end(half, unbroken, capsys):
    trainer = kt.make(half)
    trainer.run()
    assert not trainer.was_finished and "nothing is left" not in capsys.readouterr().out
    trainer = kt.make(half)
    assert figures(trainer, trainer.run()) == unbroken
    assert trainer.was_finished
    assert "checkpoint-36 (step 36 of 36) is the end of this run: nothing is left to train" in capsys.readouterr().out


def test_a_path_resumes_from_there_and_sets_the_later_ones_aside(half, unbroken):
    trainer = kt.make(half)
    assert figures(trainer, trainer.run(resume=half / "checkpoint_epoch_1")) == unbroken
    assert any(p.name.startswith("previous-checkpoint-1") for p in half.iterdir())


# ---- damage ---------------------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def chooser(tmp_path_factory):
    return kt.make(tmp_path_factory.mktemp("chooser") / "run")


@pytest.mark.parametrize("how", ["half", "empty", "missing"])
@pytest.mark.parametrize("name", SEVEN)
def test_21_damaged_checkpoints_fall_back_and_a_path_stops_with_the_name(half, chooser, capsys, name, how):
    steps = [step for step, _ in ck.checkpoints(half)]
    newest = half / f"checkpoint-{steps[-1]}"
    file = newest / name
    if how == "missing":
        file.unlink()
    else:
        file.write_bytes(file.read_bytes()[: file.stat().st_size // 2 if how == "half" else 0])
    chooser.args.output_dir = str(half)
    with pytest.raises(UserError, match=f"{newest.name}/{name}"):
        chooser._choose(str(newest))
    assert chooser._choose("auto").step == steps[-2]
    told = capsys.readouterr().err
    assert told.count("\n") == 1 and name in told and (half / f"torn-{newest.name}").is_dir()


def test_a_damaged_newest_checkpoint_does_not_change_the_result(half, unbroken):
    (ck.checkpoints(half)[-1][1] / "optimizer.pt").write_bytes(b"junk")
    trainer = kt.make(half)
    assert figures(trainer, trainer.run()) == unbroken


def test_a_folder_of_the_stock_trainer_is_set_aside(half, chooser):
    newest = ck.checkpoints(half)[-1][1]
    (newest / ck.MANIFEST).unlink()
    chooser.args.output_dir = str(half)
    assert chooser._choose("auto").path != newest and (half / f"torn-{newest.name}").is_dir()


# ---- what must not change -------------------------------------------------------------------------------------------

@pytest.mark.parametrize("change, named", [
    ({"learning_rate": 2e-2}, "trainer learning_rate: 0.01 then, 0.02 now"),
    ({"data": kt.rows()[1:]}, "data: .* then, .* now; trainer rows: 48 then, 47 now"),
    ({"dropout": 0.2}, "config dropout: 0.1 then, 0.2 now"),
    ({"num_train_epochs": 4}, "num_train_epochs: 3 then, 4 now"),
    ({"per_device_train_batch_size": 8}, "global batch of 4"),
])
def test_changed_data_or_settings_refuse(half, change, named):
    with pytest.raises(UserError, match=named) as told:
        kt.make(half, **change).run()
    assert "--resume none" in str(told.value) and not list(half.glob("previous-*"))


def test_half_the_batch_with_twice_the_accumulation_goes_on(half, chooser):
    chooser.args.output_dir = str(half)
    found = ck.Checkpoint(half, {"step": 4, "global_batch": 16, "world_size": 2})
    assert chooser._accumulation_for(found) == 4  # one rank x 4 rows
    with pytest.raises(UserError, match="the product is 18"):
        chooser._accumulation_for(ck.Checkpoint(half, {"step": 4, "global_batch": 18, "world_size": 3}))


def test_accumulation_does_not_change_the_loss(tmp_path):
    """The stock Trainer doubles it: a plain mean is taken for one divided by the items of the whole batch."""
    one = unbroken_run(tmp_path / "a", dropout=0.0, max_steps=6)["log"]
    two = unbroken_run(tmp_path / "b", dropout=0.0, max_steps=6, per_device_train_batch_size=2,
                       gradient_accumulation_steps=2)["log"]
    assert [row["loss"] for row in two] == pytest.approx([row["loss"] for row in one], abs=1e-5)
    assert [row["grad_norm"] for row in two] == pytest.approx([row["grad_norm"] for row in one], abs=1e-4)


# ---- NaN, memory, disk ----------------------------------------------------------------------------------------------

@pytest.mark.parametrize("options", [{}, {"train_sampling_strategy": "group_by_length"},
                                     {"gradient_accumulation_steps": 3}])
def test_an_inf_loss_stops_before_the_update_and_names_its_row(tmp_path, options):
    out = tmp_path / "run"
    trainer = kt.make(out, data=kt.rows(poison=17), save_steps=1, options={"row_names": lambda i: f"row-{i}"},
                      **options)
    with pytest.raises(PartialRun, match="loss is .* at step .*row-17") as told:
        trainer.run()
    dump = json.loads((out / "nan_batch.json").read_text())
    assert str(out / "nan_batch.json") in str(told.value)
    assert "row-17" in dump["ranks"][0]["rows"] and len(dump["ranks"][0]["rows"]) == 4
    assert dump["step"] == trainer.state.global_step + 1 and dump["value"] in ("inf", "nan")
    steps = [step for step, _ in ck.checkpoints(out)]
    assert max(steps, default=0) == trainer.state.global_step
    if steps:
        from safetensors.numpy import load_file

        saved = load_file(out / f"checkpoint-{steps[-1]}/model.safetensors")
        now = {k: v.numpy() for k, v in trainer.model.state_dict().items()}
        assert all((saved[k] == now[k]).all() for k in saved), "the weights moved after the last good step"


def test_a_nan_gradient_with_a_finite_loss_stops_too(tmp_path):
    trainer = kt.make(tmp_path / "run")
    weight = trainer.model.classifier.weight
    trainer.add_callback(at_step(5, lambda: weight.register_hook(lambda gradient: gradient * float("nan"))))
    with pytest.raises(PartialRun, match="gradient norm is nan at step 6"):
        trainer.run()
    assert trainer.state.global_step == 5


def failing(error, step: int):
    """A base class whose step fails."""
    from routewright.trainer import SafeTrainer

    class Fails(SafeTrainer):
        def training_step(self, *args, **kwargs):
            if self.state.global_step == step:
                super().training_step(*args, **kwargs)
                raise error
            return super().training_step(*args, **kwargs)

    return Fails


def test_out_of_memory_names_the_next_smaller_setting(tmp_path):
    import torch

    trainer = kt.make(tmp_path / "run", base=failing(torch.OutOfMemoryError("CUDA out of memory"), 2), save_steps=2)
    with pytest.raises(PartialRun, match=r"out of memory at step 2 with batch size 4 x length \d+; try "
                       r"--batch_size 2 --global_batch_size 4 .*-2"):
        trainer.run()
    trainer = kt.make(tmp_path / "one", base=failing(RuntimeError("DefaultCPUAllocator: can't allocate memory"), 0),
                      per_device_train_batch_size=1)
    with pytest.raises(PartialRun, match="shorter length"):
        trainer.run()


def test_a_full_disk_in_a_save_keeps_the_last_checkpoint(tmp_path):
    from routewright.trainer import SafeTrainer

    class Full(SafeTrainer):
        def _save_optimizer_and_scheduler(self, folder):
            if self.state.global_step == 8:
                raise OSError(errno.ENOSPC, "No space left on device")
            super()._save_optimizer_and_scheduler(folder)

    with pytest.raises(MissingSetup, match="disk is full.*checkpoint-4"):
        kt.make(tmp_path / "run", base=Full).run()
    assert [p.name for p in (tmp_path / "run").iterdir() if "checkpoint" in p.name] == ["checkpoint-4"]


def test_another_error_stays_what_it_is(tmp_path):
    with pytest.raises(RuntimeError, match="a mistake of ours"):
        kt.make(tmp_path / "run", base=failing(RuntimeError("a mistake of ours"), 1)).run()
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_one_process_takes_one_of_several_gpus(tmp_path, capsys):
    """The Trainer would spread it over all of them, so that the batch grows with the machine."""
    from routewright.trainer import SafeTrainer

    known = kt.make(tmp_path / "run")
    for gpus in (4, 1):
        known.args._n_gpu = gpus
        trainer = SafeTrainer(model=known.model, args=known.args)
        assert trainer.args.n_gpu == 1 and trainer.args.train_batch_size == trainer.args.per_device_train_batch_size
        assert ("one of 4 GPUs" in capsys.readouterr().out) == (gpus == 4)


def test_ranks_that_would_train_alone_are_refused(tmp_path, monkeypatch):
    trainer = kt.make(tmp_path / "run")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="use_cpu"):
        trainer.run()


# ---- processes ------------------------------------------------------------------------------------------------------

def run_kills(folder: Path, kills: int, in_save: int) -> dict:
    done = subprocess.run(
        [sys.executable, kt.__file__, "--kills", str(kills), "--in_save", str(in_save), "--folder", str(folder)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"},
        capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def check_kills(told: dict, kills: int, in_save: int) -> None:
    assert told["kills"] == told["resumes"] == kills and told["in_save"] >= in_save and told["by_hand"] == 0, told
    assert told["losses_equal"] == told["weights_equal"] == told["runs"], told


@pytest.mark.slow
def test_four_kills_leave_the_same_losses_and_weights(tmp_path):
    check_kills(run_kills(tmp_path, 4, 2), 4, 2)


@pytest.mark.heavy
@pytest.mark.timeout(1800)
def test_thirty_kills_leave_the_same_losses_and_weights(tmp_path):
    check_kills(run_kills(tmp_path, 30, 8), 30, 8)


@pytest.mark.slow
@pytest.mark.parametrize("action", ["kill", "stop"])
def test_a_dead_or_hung_rank_takes_the_job_down(tmp_path, action):
    told = kt.rank_trial(tmp_path, action, timeout=5)
    assert told["left"] == 0 and told["code"] == 1
    assert told["seconds"] <= (10 if action == "kill" else 5 + 35), told
    what = "died" if action == "kill" else "is stopped"
    assert any("rank 1 (pid" in line and what in line for line in told["said"])


@pytest.mark.slow
def test_two_ranks_stop_together_on_a_signal_and_go_on_as_one(tmp_path):
    from routewright.trainer import train_log

    told = kt.rank_trial(tmp_path / "run", "term")
    assert told["left"] == 0 and told["seconds"] < 30 and any("SIGTERM after step" in line for line in told["said"])
    step = ck.newest_verified(tmp_path / "run").step

    def go_on(out: Path, accumulation: int) -> list[dict]:
        trainer = kt.make(out, dropout=0.0, per_device_train_batch_size=2, max_steps=100000, save_steps=20,
                          gradient_accumulation_steps=accumulation)
        trainer.add_callback(at_step(step + 5, sigterm))
        with pytest.raises(PartialRun):
            trainer.run()
        assert trainer.args.gradient_accumulation_steps == 2
        return train_log(out)[: step + 5]

    broken, alone = go_on(tmp_path / "run", 1), go_on(tmp_path / "alone", 2)
    assert [row["step"] for row in broken] == [row["step"] for row in alone] == list(range(1, step + 6))
    assert max(abs(a["loss"] - b["loss"]) for a, b in zip(broken, alone, strict=True)) < 1e-5
    assert max(abs(a["grad_norm"] - b["grad_norm"]) for a, b in zip(broken, alone, strict=True)) < 1e-4


@pytest.mark.slow
def test_two_ranks_stop_together_on_an_inf_loss(tmp_path):
    told = kt.rank_trial(tmp_path / "run", "none", poison=17)
    assert told["left"] == 0 and told["code"] == 1
    assert any("loss is" in line and "rows" in line for line in told["said"])
    dump = json.loads((tmp_path / "run/nan_batch.json").read_text())
    assert sorted(len(part["rows"]) for part in dump["ranks"]) == [0, 2]
    assert 17 in [row for part in dump["ranks"] for row in part["rows"]]
