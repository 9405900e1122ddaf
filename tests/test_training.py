"""What training scripts share: the console line that comes in time, the check of library settings, what is kept."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from routewright import checkpoints as ck
from routewright import training
from routewright.errors import UserError


def test_a_console_line_comes_at_least_every_so_often_with_the_time_left(monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(training.time, "monotonic", lambda: clock[0])
    said = []
    reporter = training.make_reporter(None, said.append)
    state = SimpleNamespace(global_step=4, max_steps=104, epoch=0.1, is_world_process_zero=True)
    reporter.on_train_begin(None, state, None)
    for step in range(5, 25):
        clock[0] += 7
        state.global_step = step
        reporter.on_step_end(None, state, SimpleNamespace(should_log=False))
    assert len(said) == 4 and said[0] == "step 9/104  epoch 0.10  training  at most 11 min left"
    for _ in range(20):
        clock[0] += 7
        reporter.on_prediction_step(None, state, None)
    assert len(said) == 8 and "scoring the validation rows" in said[-1]
    assert [training.span(s) for s in (59.6, 600, 8000)] == ["60 s", "10 min", "2.2 h"]


def test_the_best_checkpoint_is_the_lowest_loss_or_the_highest_of_anything_else():
    def best(*measured, **extra):
        found = training.best_by(extra, measured)
        return found["metric_for_best_model"], found["greater_is_better"]

    assert best("reward", "loss") == ("reward", True) and best("loss", "label_accuracy") == ("loss", False)
    assert best("reward", "loss", metric_for_best_model="loss") == ("loss", False)
    assert best("loss", "label_accuracy", metric_for_best_model="eval_label_accuracy") == ("label_accuracy", True)
    assert best("loss", greater_is_better=True) == ("loss", True)  # who says so means it
    with pytest.raises(UserError, match=r"measures loss, label_accuracy \(did you mean 'label_accuracy'"):
        best("loss", "label_accuracy", metric_for_best_model="label_acuracy")


def test_library_settings_a_bare_no_and_what_shapes_the_loss():
    extra = training.check_trainer_names({"eval_strategy": False, "weight_decay": .1}, {})
    assert extra["eval_strategy"] == "no"
    arguments = SimpleNamespace(label_smoothing=.1, weight_decay=.1)
    assert training.own_settings(arguments, {"label_smoothing": .1, "weight_decay": .1}) == {"label_smoothing": .1}


def test_what_a_library_refuses_is_a_user_error_only_where_the_user_set_something():
    with pytest.raises(UserError, match=r"refuses these settings \(--trainer.loss_type\): no such loss"), \
            training.told_as_user_errors({"loss_type": "x"}):
        raise ValueError("no such loss\nand more")
    with pytest.raises(ValueError, match="ours"), training.told_as_user_errors({}):
        raise ValueError("ours")


def test_the_newest_epochs_and_the_best_one_stay(tmp_path):
    keeper = training.last_epochs()
    args = SimpleNamespace(output_dir=str(tmp_path), should_save=True, save_total_limit=3)
    best = str(tmp_path / "checkpoint-10")
    for epoch in range(1, 7):
        folder = tmp_path / f"checkpoint-{5 * epoch}"
        folder.mkdir()
        ck.seal(folder, step=5 * epoch)
        state = SimpleNamespace(global_step=5 * epoch, epoch=float(epoch),
                                best_model_checkpoint=best if epoch > 1 else None)
        keeper.on_save(args, state, None)
    assert {p.name for _, p in ck.checkpoints(tmp_path)} == {f"checkpoint-{step}" for step in (10, 20, 25, 30)}
    assert set(ck.epoch_names(tmp_path)) == {f"checkpoint_epoch_{k}" for k in (2, 4, 5, 6)}


def test_a_run_ends_with_its_best_checkpoint_or_where_none_is_loaded_with_its_last():
    def kept(load, best):
        return training.kept_checkpoint(SimpleNamespace(
            args=SimpleNamespace(load_best_model_at_end=load, output_dir="out"),
            state=SimpleNamespace(best_model_checkpoint=best, global_step=9))).name

    assert [kept(True, "out/checkpoint-6"), kept(False, "out/checkpoint-6"), kept(True, None)] == [
        "checkpoint-6", "checkpoint-9", "checkpoint-9"]


def test_what_a_library_rounds_over_4_bit_weights_is_put_back():
    import torch

    model = torch.nn.Linear(4, 4)
    came = model.weight.detach().clone()
    for packed in (True, False):
        model.is_loaded_in_4bit = packed
        model.weight.data = came.clone()
        with training.unrounded(model):
            model.weight.data = model.weight.data.bfloat16()
        assert (model.weight.dtype == torch.float32 and torch.equal(model.weight.data, came)) == packed
