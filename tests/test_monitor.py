"""The collapse monitor: right figures, warnings that come in time and only where something is to be gained."""

from __future__ import annotations

import json

import numpy as np
import pytest
from planted import make_table

from routewright import metrics
from routewright.errors import UserError
from routewright.monitor import HISTORY, DecisionMonitor, monitor_callback, read_history
from routewright.tracking import Silent


class Notes(Silent):
    def __init__(self):
        self.rows = {}

    def log(self, scalars, step=None):
        self.rows.setdefault(step, {}).update(scalars)


@pytest.fixture
def dev():
    return make_table(400).split("dev")


def worth(dev):
    """Rewards at which the strong model costs a quarter of a right answer."""
    return dev.quality_mean - 3000 * dev.cost


def monitor_of(dev, rewards=None, **options):
    said, notes = [], Notes()
    rewards = worth(dev) if rewards is None else rewards
    return DecisionMonitor(dev, rewards, notes, said.append, **options), said, notes


def knows_words(dev):
    """What a router that reads the planted word would do."""
    return np.array([int(" hard" in f" {p.prompt}") for p in dev.prompts])


def test_figures_are_those_of_a_plain_count(dev):
    monitor, said, notes = monitor_of(dev)
    chosen = knows_words(dev)
    found = monitor.observe(3, chosen)
    rows = np.arange(dev.n)
    reward = worth(dev)
    assert found == notes.rows[3] and not said
    assert found["dev/quality"] == pytest.approx(dev.quality_mean[rows, chosen].mean())
    assert found["dev/cost_usd"] == pytest.approx(dev.cost[rows, chosen].mean())
    assert found["dev/reward"] == pytest.approx(reward[rows, chosen].mean())
    assert found["dev/regret"] == pytest.approx((reward.max(1) - reward[rows, chosen]).mean())
    assert found["share/cheap"] == pytest.approx(1 - chosen.mean())
    assert found["share/strong"] == pytest.approx(chosen.mean())
    p = chosen.mean()
    assert found["collapse/entropy"] == pytest.approx(-(p * np.log2(p) + (1 - p) * np.log2(1 - p)))
    assert found["collapse/gain"] == pytest.approx(reward[rows, chosen].mean() - reward.mean(0).max())
    assert found["collapse/gain"] > .05 and found["collapse/gain_at_cost"] > .1
    # Decisions dealt out at random gain nothing at their cost, up to chance; one constant gains exactly nothing.
    dealt = np.random.default_rng(0).permutation(chosen)
    assert abs(monitor.measure(dealt)["collapse/gain_at_cost"]) < 3 * metrics.chance_sd(
        dev.quality_mean, np.eye(2)[dealt])
    for column in (0, 1):
        assert monitor.measure(np.full(dev.n, column))["collapse/gain_at_cost"] == pytest.approx(0, abs=1e-12)


def test_a_constant_router_is_told_of_once_and_before_a_third_of_the_training(dev):
    monitor, said, _ = monitor_of(dev, total_steps=100)
    for step in (0, 10, 20, 30):
        monitor.observe(step, np.ones(dev.n, int))
    assert len(said) == 1 and monitor.warned == ["share"]
    assert "at step 20 100.0% of the dev prompts go to 'strong'" in said[0] and "learning rate" in said[0]
    monitor.observe(40, np.zeros(dev.n, int))
    monitor.observe(90, np.zeros(dev.n, int))
    assert monitor.warned == ["share", "gain"] and "less than always calling 'strong'" in said[1]


def test_a_single_bad_look_at_the_start_is_no_warning_but_a_late_one_is(dev):
    monitor, said, _ = monitor_of(dev, total_steps=100)
    monitor.observe(10, np.ones(dev.n, int))
    monitor.observe(20, knows_words(dev))
    monitor.observe(30, np.ones(dev.n, int))
    assert not said
    monitor.observe(40, np.ones(dev.n, int))
    assert monitor.warned == ["share"]
    late, said, _ = monitor_of(dev, total_steps=3)
    late.observe(1, np.ones(dev.n, int))
    assert len(said) == 1


def test_no_warning_where_one_model_is_truly_best(dev):
    rewards = np.tile([0.0, 1.0], (dev.n, 1))
    rewards[: dev.n // 25] = [1.0, 0.0]
    monitor, said, _ = monitor_of(dev, rewards, total_steps=10)
    for step in (1, 5, 10):
        monitor.observe(step, np.ones(dev.n, int))
    assert monitor.one_is_best and not said
    # With a quarter of the prompts better served by the other model, the same decisions are a collapse.
    rewards[: dev.n // 4] = [1.0, 0.0]
    monitor, said, _ = monitor_of(dev, rewards, total_steps=10)
    monitor.observe(5, np.ones(dev.n, int))
    assert len(said) == 1


def test_a_falling_entropy_warns_before_the_bound_unless_the_reward_rises(dev):
    best = knows_words(dev)
    random = np.random.default_rng(1)

    def narrowed(share, better):
        """Decisions that send `share` of the prompts that need the strong model to the cheap one."""
        chosen = best.copy()
        hard = np.flatnonzero(best)
        chosen[random.permutation(hard)[: int(share * len(hard))]] = 0
        return chosen if not better else np.where(np.arange(dev.n) < dev.n * (1 - share), 1 - chosen, chosen)

    monitor, said, _ = monitor_of(dev, total_steps=1000)
    for step, share in enumerate((0, .3, .6, .85), 1):
        monitor.observe(step, narrowed(share, False))
    assert monitor.warned == ["entropy"] and "their entropy fell from" in said[0]
    assert monitor.history[-1]["collapse/top_share"] < .95
    quiet, said, _ = monitor_of(dev, np.stack([np.ones(dev.n), best * 1.5], 1), total_steps=1000)
    wrong = 1 - best  # a bad start of high entropy, ever fewer calls of the strong model, ever more reward
    for step, share in enumerate((0, .5, .8, .9), 1):
        chosen = wrong.copy()
        chosen[np.flatnonzero(wrong)[: int(share * wrong.sum())]] = 0
        quiet.observe(step, chosen)
    assert quiet.history[-1]["collapse/entropy"] < .6 * quiet.history[0]["collapse/entropy"] and not said


def test_decisions_that_do_not_fit_are_refused(dev):
    monitor, _, _ = monitor_of(dev)
    for wrong in (np.zeros(3, int), np.full(dev.n, 2), np.full(dev.n, -1)):
        with pytest.raises(UserError, match="one decision among 2 models"):
            monitor.observe(1, wrong)
    with pytest.raises(ValueError, match="do not fit"):
        monitor_of(dev, np.full(dev.quality.shape, np.nan))


def test_the_history_in_the_run_folder_is_cut_where_a_run_resumes(dev, tmp_path):
    monitor, _, _ = monitor_of(dev, folder=tmp_path, total_steps=10)
    for step in (0, 4, 8):
        monitor.observe(step, np.ones(dev.n, int))
    assert monitor.warned == ["share"]
    with open(tmp_path / HISTORY, "a") as file:
        file.write('{"step": 9, "dev/qual')  # a kill in the middle of a line
    again, said, _ = monitor_of(dev, folder=tmp_path, total_steps=10)
    again.resume(4)
    assert [row["step"] for row in read_history(tmp_path)] == [0, 4] and again.history[-1]["share/strong"] == 1
    again.observe(8, np.ones(dev.n, int))
    rows = [json.loads(line) for line in (tmp_path / HISTORY).read_text().splitlines()]
    assert [row["step"] for row in rows] == [0, 4, 8]
    anew, _, _ = monitor_of(dev, folder=tmp_path)
    anew.resume(0)
    assert not (tmp_path / HISTORY).exists() and (tmp_path / f"previous-{HISTORY}").exists()


# --- in a Trainer -----------------------------------------------------------------------------------------------------


def trained(tmp_path, dev, every=None, **options):
    """Losses of a small network with dropout on random rows, with or without a monitor that draws and dawdles."""
    import torch
    from transformers import Trainer, TrainingArguments

    torch.manual_seed(0)

    class Network(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Dropout(.5), torch.nn.Linear(8, 1))

        def forward(self, x, labels):
            out = self.layers(x)[:, 0]
            return {"loss": (out - labels).square().mean(), "logits": out}

    model, seen, losses = Network(), [], []
    said, notes = [], Notes()
    monitor = DecisionMonitor(dev, worth(dev), notes, said.append, folder=tmp_path / "run")

    def decide():
        import random
        seen.append((model.layers.training, torch.is_grad_enabled()))
        random.random()
        np.random.default_rng()
        np.random.rand(3)  # noqa: NPY002
        torch.rand(3)
        model.train()
        return np.ones(dev.n, int)

    random = np.random.default_rng(0)
    rows = [{"x": random.normal(size=4).astype("f4"), "labels": np.float32(i % 2)} for i in range(24)]
    arguments = TrainingArguments(str(tmp_path / "out"), use_cpu=True, report_to="none", num_train_epochs=3,
                                  per_device_train_batch_size=4, logging_steps=1, save_strategy="no", disable_tqdm=True,
                                  learning_rate=.01, seed=1)

    class Kept(Trainer):
        def log(self, logs, *args, **kwargs):
            losses.append(logs.get("loss"))

    callbacks = [monitor_callback(monitor, decide, every, **options)] if every else []
    Kept(model=model, args=arguments, train_dataset=rows, callbacks=callbacks).train()
    return losses, monitor, seen


def test_losses_with_and_without_a_monitor_are_identical(tmp_path, dev):
    plain, *_ = trained(tmp_path, dev)
    by_epoch, monitor, seen = trained(tmp_path, dev, "epoch")
    by_step, steps, _ = trained(tmp_path, dev, 4, at_start=False)
    assert len(plain) == 19 and by_epoch == plain and by_step == plain
    assert [row["step"] for row in monitor.history] == [0, 6, 12, 18]
    assert [row["step"] for row in steps.history] == [4, 8, 12, 16, 18]
    assert set(seen) == {(False, False)}, "decide runs in eval mode and without gradients"
    assert monitor.total_steps == 18 and monitor.warned == ["share"]
    assert [row["step"] for row in read_history(tmp_path / "run")] == [4, 8, 12, 16, 18]
    with pytest.raises(ValueError, match="every"):
        monitor_callback(monitor, lambda: None, 0)


def test_each_module_gets_its_own_mode_back():
    import torch

    from routewright.monitor import undisturbed

    model = torch.nn.Sequential(torch.nn.Dropout(), torch.nn.Dropout())
    model[1].eval()
    with pytest.raises(KeyError), undisturbed(model):
        assert not model[0].training
        model.train()
        raise KeyError
    assert model.training and model[0].training and not model[1].training
