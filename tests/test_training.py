"""What training scripts share: the console line that comes in time, and the check of library settings."""

from __future__ import annotations

from routewright import training


def test_a_console_line_comes_at_least_every_so_often_with_the_time_left(monkeypatch):
    from types import SimpleNamespace

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
