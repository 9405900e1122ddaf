"""Watches, while a router trains, whether it still chooses: the collapse monitor.

A router that sends nearly all prompts to one model has learnt nothing that a constant does not know, yet its loss may
look well (Router-R1's released weights send 98 % of their calls to one model). So at every look the decisions on the
dev prompts are scored from the cache, and one sentence warns, once for each cause, while there is time to stop:

- one model gets more than `warn_share` of the prompts although another choice would earn more
- the entropy of the decisions keeps falling and the reward does not rise with it
- after a third of the training the best constant model still earns more than the router

Where one model truly is best for nearly all prompts (the oracle itself takes it above `warn_share`), all of this is
right and nothing is said. Figures are what W&B draws under the same names in every training script:

    dev/quality, dev/cost_usd, dev/reward    mean over the dev prompts of the models called
    dev/regret                               reward of the best model for each prompt, minus dev/reward
    share/<model>                            share of the prompts sent to it
    collapse/top_share, collapse/entropy     share of the most used model; entropy of the shares, 1 = all alike
    collapse/gain                            dev/reward minus that of the best constant model. No random mix of models
                                             that never reads the prompt earns more than the best constant
    collapse/gain_at_cost                    dev/quality minus that of the best such mix at the same cost
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from routewright import metrics
from routewright.errors import UserError
from routewright.textfiles import write_atomic

if TYPE_CHECKING:
    from routewright.outcomes import OutcomeTable

HISTORY = "monitor.jsonl"  # in the run folder: one line a look
PATIENT_UNTIL = 1 / 3  # share of the training before which one bad look is not yet a warning
FALLEN = 0.6  # entropy below this part of its highest, and of the oracle's, counts as fallen
EQUAL = 1e-9  # rewards closer than this are the same


class DecisionMonitor:
    """Scores the decisions on the dev prompts and warns of a collapse.

    Args:
        dev: the dev split of the cache
        rewards: (N, M) what each model earns on each dev prompt
        tracker: as `tracking.start` returns it
        say: hears a warning; the console of a training script
        warn_share: share of one model above which it counts as a collapse
        folder: the run folder, to keep HISTORY in; none: memory only
        total_steps: length of the training, where it is known (`monitor_callback` sets it)

    Attributes: `history`, one dict of figures with its `step` a look; `warned`, the causes told so far.
    """

    def __init__(self, dev: OutcomeTable, rewards: np.ndarray, tracker: Any, say: Callable[[str], None], *,
                 warn_share: float = 0.95, folder: str | Path | None = None, total_steps: int | None = None) -> None:
        self.rewards = np.asarray(rewards, dtype=float)
        if self.rewards.shape != dev.quality.shape or not np.isfinite(self.rewards).all():
            raise ValueError(f"rewards of shape {self.rewards.shape} do not fit {dev.n} prompts x {dev.m} models, "
                             "or are not finite")
        self.models = dev.models
        self.quality, self.cost = dev.quality_mean, dev.cost
        self.tracker, self.say, self.warn_share = tracker, say, warn_share
        self.folder = Path(folder) if folder and os.environ.get("RANK", "0") == "0" else None
        self.total_steps = total_steps
        self.history: list[dict[str, Any]] = []
        self.warned: list[str] = []
        self.constant = int(self.rewards.mean(axis=0).argmax())
        self.best = metrics.collapse(metrics.reward_oracle(self.rewards, self.cost), dev.m)
        self.one_is_best = self.best.top_share > warn_share

    # ---- looking ----

    def observe(self, step: int, decisions: np.ndarray) -> dict[str, float]:
        """Scores `decisions` (N,), columns of the table, as those of training step `step`; logs and returns them."""
        decisions = np.asarray(decisions)
        if decisions.shape != (len(self.rewards),) or not ((decisions >= 0) & (decisions < len(self.models))).all():
            raise UserError(f"the monitor needs one decision among {len(self.models)} models for each of "
                            f"{len(self.rewards)} dev prompts; got an array of shape {decisions.shape}")
        figures = self.measure(decisions)
        self.tracker.log(figures, step=step)
        self.history.append({"step": int(step), **figures})
        told = list(self._causes())
        for cause, sentence in told:
            self.warned.append(cause)
            self.say(f"WARNING: {sentence}")
        if self.folder:
            self.folder.mkdir(parents=True, exist_ok=True)
            row = self.history[-1] | ({"warned": [cause for cause, _ in told]} if told else {})
            with open(self.folder / HISTORY, "a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")
        return figures

    def measure(self, decisions: np.ndarray) -> dict[str, float]:
        """The figures of the module's table, without logging them."""
        spread = metrics.collapse(decisions, len(self.models))
        share = np.bincount(decisions, minlength=len(self.models)) / len(decisions)
        quality, cost, reward = (float(metrics.picked(table, decisions).mean())
                                 for table in (self.quality, self.cost, self.rewards))
        constants = self.cost.mean(axis=0), self.quality.mean(axis=0)
        mix = float(metrics.mix_quality(max(cost, constants[0].min()), *constants))
        return {
            "dev/quality": quality, "dev/cost_usd": cost, "dev/reward": reward,
            "dev/regret": float(metrics.regret(self.rewards, decisions).mean()),
            **{f"share/{name}": float(part) for name, part in zip(self.models, share, strict=True)},
            "collapse/top_share": spread.top_share, "collapse/entropy": spread.entropy_share or 0.0,
            "collapse/gain": reward - float(self.rewards[:, self.constant].mean()),
            "collapse/gain_at_cost": quality - mix}

    def resume(self, step: int) -> None:
        """Take up HISTORY of the run folder as it stood at `step`; at 0 an older one is set beside. Rank 0."""
        if not self.folder or not (self.folder / HISTORY).exists():
            return
        path = self.folder / HISTORY
        if step == 0:
            os.replace(path, path.with_name("previous-" + HISTORY))
            return
        rows = [row for row in read_history(self.folder) if row["step"] <= step]
        write_atomic(path, "".join(json.dumps(row) + "\n" for row in rows))
        self.warned = [cause for row in rows for cause in row.pop("warned", [])]
        self.history = rows

    # ---- warning ----

    def _causes(self) -> Iterator[tuple[str, str]]:
        """(cause, sentence) of what the newest look adds to what was said before."""
        if self.one_is_best or len(self.models) < 2 or self.history[-1]["step"] == 0:
            return  # an untrained router's decisions say nothing yet
        for cause, find in (("share", self._one_model), ("entropy", self._falling), ("gain", self._no_gain)):
            sentence = None if cause in self.warned else find()
            if sentence:
                yield cause, sentence

    def _late(self) -> bool:
        return bool(self.total_steps) and self.history[-1]["step"] >= PATIENT_UNTIL * self.total_steps

    def _one_model(self) -> str | None:
        now, looks = self.history[-1], [row for row in self.history if row["step"] > 0]
        twice = len(looks) > 1 and looks[-2]["collapse/top_share"] > self.warn_share
        if now["collapse/top_share"] <= self.warn_share or now["dev/regret"] <= EQUAL or not (twice or self._late()):
            return None
        top = max(self.models, key=lambda name: now[f"share/{name}"])
        constant = (f" and always calling {self.models[self.constant]!r} {-now['collapse/gain']:.4f}"
                    if now["collapse/gain"] < -EQUAL else "")
        return (f"at step {now['step']} {now['collapse/top_share']:.1%} of the dev prompts go to {top!r} and earn "
                f"{now['dev/reward']:.4f} each, though the best model for each prompt would earn "
                f"{now['dev/regret']:.4f}{constant} more; look at the balance of the training targets, and try "
                "a lower learning rate or more epochs")

    def _falling(self) -> str | None:
        if len(self.history) < 3 or "share" in self.warned:
            return None
        entropies = [row["collapse/entropy"] for row in self.history]
        highest = int(np.argmax(entropies))
        now, peak = self.history[-1], self.history[highest]
        falls = entropies[-3] > entropies[-2] > entropies[-1]
        fallen = entropies[-1] < FALLEN * min(entropies[highest], self.best.entropy_share or 0.0)
        if not (falls and fallen) or now["dev/reward"] > peak["dev/reward"] + EQUAL:
            return None
        return (f"the decisions narrow: their entropy fell from {peak['collapse/entropy']:.2f} at step {peak['step']} "
                f"to {now['collapse/entropy']:.2f} at step {now['step']} (best decisions: "
                f"{self.best.entropy_share:.2f}) and the dev reward from {peak['dev/reward']:.4f} to "
                f"{now['dev/reward']:.4f}; try a lower learning rate, or keep the checkpoint of step {peak['step']}")

    def _no_gain(self) -> str | None:
        now = self.history[-1]
        if not self._late() or now["collapse/gain"] >= -EQUAL:
            return None
        name = self.models[self.constant]
        return (f"at step {now['step']} of {self.total_steps} the router earns {now['dev/reward']:.4f} a dev prompt, "
                f"{-now['collapse/gain']:.4f} less than always calling {name!r}; if this does not turn, "
                "give it more data or epochs, another learning rate or another base model")


def monitor_of_estimates(train: OutcomeTable, dev: OutcomeTable, tracker: Any, say: Callable[[str], None],
                         **more: Any) -> tuple[DecisionMonitor, Callable[[np.ndarray], np.ndarray]]:
    """(monitor, rule) for a router that estimates quality; the rule turns estimates (N, M) on dev into decisions (N,).

    Both stand at the cost weight where the cheapest and the best single model of the train split earn the same: there
    no constant and no random mix is favoured, so what is gained is gained by reading prompts. It is evaluation's own
    default reward.
    """
    from routewright.decide import choose, expected_cost
    from routewright.scoring import indifference_weight

    weight, expected = indifference_weight(train), expected_cost(train, dev)
    monitor = DecisionMonitor(dev, dev.quality_mean - weight * dev.cost, tracker, say, **more)
    return monitor, lambda estimates: choose(estimates, expected, weight)


def read_history(folder: str | Path) -> list[dict[str, Any]]:
    """The looks of a run, from HISTORY of its folder; a torn last line is dropped."""
    rows = []
    for line in (Path(folder) / HISTORY).read_text(encoding="utf-8").splitlines():
        try:
            rows.append(json.loads(line))
        except ValueError:
            continue
    return rows


# ---- in a Trainer ---------------------------------------------------------------------------------------------------


def monitor_callback(monitor: DecisionMonitor, decide: Callable[[], np.ndarray] | None, every: str | int = "epoch",
                     at_start: bool = True) -> Any:
    """A `transformers.TrainerCallback` that looks at each epoch's end, or each `every` steps and at the last one.

    With no `decide` it never looks and only tells the monitor how long the run is and where it resumes: for a trainer
    that hands the decisions of its own evaluation to `observe`.

    All ranks call `decide` at the same places (sharded weights need that), rank 0 scores. `decide` runs without
    gradients and in eval mode; training mode of every module and all random states are put back, so that the losses are
    those of a run without a monitor. Only rank 0's result is read.
    """
    from transformers import TrainerCallback

    if every != "epoch" and not (isinstance(every, int) and every > 0):
        raise ValueError(f"every must be 'epoch' or a number of steps; got {every!r}")

    class Monitor(TrainerCallback):
        looked = -1

        def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
            monitor.total_steps = state.max_steps
            if state.is_world_process_zero:
                monitor.resume(state.global_step)
            # Whether to look must not hang on the history, which rank 0 alone has.
            if at_start and state.global_step == 0:
                self.look(state, model)

        def on_epoch_end(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
            if every == "epoch":
                self.look(state, model)

        def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
            if every != "epoch" and (state.global_step % every == 0 or state.global_step >= state.max_steps):
                self.look(state, model)

        def look(self, state: Any, model: Any) -> None:
            if decide is None or state.global_step == self.looked:
                return
            self.looked = state.global_step
            with undisturbed(model):
                decisions = decide()
            if state.is_world_process_zero:
                monitor.observe(state.global_step, decisions)

    return Monitor()


@contextmanager
def undisturbed(model: Any = None) -> Iterator[None]:
    """Eval mode without gradients; afterwards each module's mode and Python's, numpy's and torch's random states are
    what they were."""
    import random

    import torch

    modes = [] if model is None else [(module, module.training) for module in model.modules()]
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()  # noqa: NPY002 - the library's own draw
    gpu = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else None
    try:
        if model is not None:
            model.eval()
        with torch.no_grad():
            yield
    finally:
        for module, mode in modes:
            module.training = mode
        random.setstate(states[0])
        np.random.set_state(states[1])  # noqa: NPY002
        torch.set_rng_state(states[2])
        if gpu is not None:
            torch.cuda.set_rng_state_all(gpu)
