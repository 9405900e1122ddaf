"""Kill a small CPU training run many times and see whether its resumed life equals an unbroken one.

One warm process forks a child per life, so that a life costs a second instead of the imports. The full trial:

    OMP_NUM_THREADS=1 PYTHONPATH=src:tests python tests/kill_training.py --kills 30 --in_save 8

ends in one JSON line: kills, kills inside a save, resumes that needed hands, equal losses, equal weights. Also run
under torchrun as a script (`--rank_of DIR`) by the tests of dying and hanging ranks.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import signal
import sys
import time
from pathlib import Path
from typing import Any

ROWS, LENGTH, WORDS = 48, 12, 60


def rows(n: int = ROWS, poison: int | None = None) -> list[dict[str, Any]]:
    """Random token ids of different lengths with a learnable label; row `poison` has an Inf feature weight."""
    draw = random.Random(5)
    made = []
    for i in range(n):
        ids = [draw.randrange(5, WORDS) for _ in range(draw.randrange(4, LENGTH))]
        made.append({"input_ids": ids, "labels": int(sum(ids) % 2), "weight": float("inf") if i == poison else 1.0})
    return made


def collate(batch: list[dict[str, Any]]) -> dict[str, Any]:
    import torch

    longest = max(len(r["input_ids"]) for r in batch)
    ids = torch.tensor([r["input_ids"] + [0] * (longest - len(r["input_ids"])) for r in batch])
    return {
        "input_ids": ids, "attention_mask": (ids > 0).long(),
        "labels": torch.tensor([r["labels"] for r in batch]),
        "weight": torch.tensor([r["weight"] for r in batch])}


def model(dropout: float = 0.1) -> Any:
    """A one-layer BERT classifier of about 10 thousand parameters, fixed seed."""
    import torch
    from transformers import BertConfig, BertForSequenceClassification

    torch.manual_seed(0)
    return BertForSequenceClassification(BertConfig(
        vocab_size=WORDS, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32,
        max_position_embeddings=LENGTH, num_labels=2, hidden_dropout_prob=dropout,
        attention_probs_dropout_prob=dropout))


def make(out: str | Path, data: list[dict[str, Any]] | None = None, slow_save: float = 0.0, slow_step: float = 0.0,
         dropout: float = 0.1, base: type | None = None, options: dict[str, Any] | None = None,
         **arguments: Any) -> Any:
    """A SafeTrainer on the small task. slow_save, slow_step: seconds of sleep per saved file and per micro-batch."""
    import torch
    from transformers import TrainingArguments, logging

    from routewright import checkpoints as ck
    from routewright.trainer import EpochNames, SafeTrainer, safety_arguments

    logging.set_verbosity_error()
    torch.set_num_threads(1)

    class Small(base or SafeTrainer):
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            weight = inputs.pop("weight").mean()
            out = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
            return (out[0] * weight, out[1]) if return_outputs else out * weight

        def training_step(self, *a, **k):
            time.sleep(slow_step)
            return super().training_step(*a, **k)

        def _save_rng_state(self, folder):
            time.sleep(slow_save)
            super()._save_rng_state(folder)
            time.sleep(slow_save)

        def _finish_checkpoint(self, staged, final):
            time.sleep(slow_save)
            super()._finish_checkpoint(staged, final)

    arguments = {"output_dir": str(out), **safety_arguments(), "per_device_train_batch_size": 4, "num_train_epochs": 3,
                 "learning_rate": 1e-2, "save_strategy": "steps", "save_steps": 4, "logging_steps": 5,
                 "disable_tqdm": True,
                 "save_total_limit": 3, "remove_unused_columns": False, "seed": 11, "label_names": ["labels"],
                 **arguments}
    data = data if data is not None else rows()
    return Small(model=model(dropout), args=TrainingArguments(**arguments), train_dataset=data, data_collator=collate,
                 fingerprints={"data": ck.fingerprint(data[0]["input_ids"]), "config": {"dropout": dropout}},
                 callbacks=[EpochNames()], **(options or {}))


def weights_digest(trainer: Any) -> str:
    digest = hashlib.sha256()
    for name, value in sorted(trainer.model.state_dict().items()):
        digest.update(name.encode() + value.detach().contiguous().numpy().tobytes())
    return digest.hexdigest()


def life(out: Path, quiet: bool = True, **options: Any) -> None:
    """One life of the run: resume, train to the end, leave `result.json`."""
    if quiet:
        os.dup2(os.open(out / "life.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND), 1)
        os.dup2(1, 2)
    trainer = make(out, **options)
    result = trainer.run(resume="auto")
    history = [{k: v for k, v in row.items() if k in ("loss", "step", "grad_norm", "learning_rate", "train_loss")}
               for row in trainer.state.log_history]
    (out / "result.json").write_text(json.dumps(
        {"weights": weights_digest(trainer), "train_loss": result.training_loss, "history": history}))


def fork_life(out: Path, **options: Any) -> int:
    """Start a life in a forked child; returns its pid."""
    out.mkdir(parents=True, exist_ok=True)
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        life(out, **options)
        code = 0
    except BaseException as error:
        print(f"{type(error).__name__}: {error}", flush=True)
        code = getattr(error, "exit_code", 1)
    finally:
        os._exit(code)


def ended(pid: int) -> int | None:
    """Exit code of a child that has ended, else None."""
    done, status = os.waitpid(pid, os.WNOHANG)
    return os.waitstatus_to_exitcode(status) if done else None


def kill_in_life(out: Path, pid: int, when: str, wait: float) -> str:
    """Kill -9 the child: inside a save, or `wait` seconds after its start or its first new step. Says what happened."""
    begun, log, in_save = time.monotonic(), out / "train_log.jsonl", when == "save"
    lines = None
    due = begun + wait if when == "start" else None
    while (code := ended(pid)) is None:
        now = time.monotonic()
        saving = any(p.name.startswith(".tmp-checkpoint-") for p in out.iterdir())
        size = log.stat().st_size if log.exists() else 0
        if due is None and (life_log := out / "life.log").exists() and life_log.stat().st_size > 0:
            lines = size if lines is None else lines
            if size > lines:
                due = now + wait
        if due is not None and (saving if in_save else now >= due):
            time.sleep(random.uniform(0, 0.03) if in_save else 0)
            saving = any(p.name.startswith(".tmp-checkpoint-") for p in out.iterdir())
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            return "in save" if saving else "elsewhere"
        if now - begun > 120:
            raise RuntimeError("the child makes no step")
        time.sleep(0.002)
    return f"ended with {code}"


def trial(folder: Path, kills: int, in_save: int, seed: int = 0, **options: Any) -> dict[str, Any]:
    """An unbroken run, then broken ones killed `kills` times in all; what was equal and what was not."""
    draw = random.Random(seed)
    whole = folder / "whole"
    if os.waitpid(fork_life(whole, **options), 0)[1]:
        raise RuntimeError((whole / "life.log").read_text())
    wanted = json.loads((whole / "result.json").read_text())
    wanted_log = [json.loads(x) for x in (whole / "train_log.jsonl").read_text().splitlines()]
    told = {"kills": 0, "in_save": 0, "resumes": 0, "by_hand": 0, "runs": 0, "losses_equal": 0, "weights_equal": 0,
            "torn_set_aside": 0, "steps": len(wanted_log)}
    saves_left = in_save
    while told["kills"] < kills:
        out = folder / f"run{told['runs']}"
        told["runs"] += 1
        in_this_run = min(kills - told["kills"], draw.randint(1, 4))
        for _ in range(in_this_run):
            pid = fork_life(out, slow_save=0.02, slow_step=0.01, **options)
            when = "save" if saves_left > 0 and draw.random() < 0.7 else draw.choice(["start", "step", "step"])
            how = kill_in_life(out, pid, when, draw.uniform(0, 1.0 if when == "start" else 0.25))
            if how == "ended with 0":
                break
            if how.startswith("ended"):
                raise RuntimeError(how + "\n" + (out / "life.log").read_text()[-2000:])
            told["kills"] += 1
            told["in_save"] += how == "in save"
            saves_left -= how == "in save"
        code = os.waitstatus_to_exitcode(os.waitpid(fork_life(out, **options), 0)[1])
        told["by_hand"] += code != 0
        got = json.loads((out / "result.json").read_text())
        got_log = [json.loads(x) for x in (out / "train_log.jsonl").read_text().splitlines()]
        told["losses_equal"] += got_log == wanted_log and _losses(got) == _losses(wanted)
        told["weights_equal"] += got["weights"] == wanted["weights"]
        told["torn_set_aside"] += len(list(out.glob("torn-*")))
    told["resumes"] = told["kills"]
    return told


def _losses(result: dict[str, Any]) -> Any:
    return result["train_loss"], result["history"]


def rank_trial(out: Path, action: str, timeout: int = 10, ranks: int = 2, steps: int = 100000, limit: float = 90,
               poison: int | None = None) -> dict[str, Any]:
    """A torchrun job, disturbed after some steps: what was left, how long until all were gone, what it said.

    action: kill (rank 1, -9), kill0, stop (rank 1, SIGSTOP), term (the agent), killagent (-9), none (let it end).
    """
    import subprocess

    out.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}", "--",
               __file__, "--rank_of", str(out), "--timeout", str(timeout), "--steps", str(steps)]
    command += [] if poison is None else ["--poison", str(poison)]
    paths = os.pathsep.join([str(Path(__file__).parents[1] / "src"), str(Path(__file__).parent)])
    environment = {**os.environ, "PYTHONPATH": paths, "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1", "OMP_NUM_THREADS": "1",
                   "HF_HUB_OFFLINE": "1", "WANDB_MODE": "offline", "OMP_WAIT_POLICY": "PASSIVE"}
    log, said = out / "train_log.jsonl", out / f"said_{action}.txt"
    before = log.stat().st_size if log.exists() else 0
    with open(said, "w") as file:
        agent = subprocess.Popen(command, env=environment, stdout=file, stderr=file, cwd=out)
    pids: list[int] = []
    try:
        until = time.monotonic() + limit
        while agent.poll() is None and action != "none" and time.monotonic() < until:
            if log.exists() and log.stat().st_size > before + 2000:
                break
            time.sleep(0.1)
        pids = [int(p.read_text()) for p in sorted(out.glob("pid_*"))]
        if action != "none" and agent.poll() is None:
            target, number = {"kill": (pids[-1], signal.SIGKILL), "kill0": (pids[0], signal.SIGKILL),
                              "stop": (pids[-1], signal.SIGSTOP), "term": (agent.pid, signal.SIGTERM),
                              "killagent": (agent.pid, signal.SIGKILL)}[action]
            os.kill(target, number)
        begun, until = time.monotonic(), time.monotonic() + limit
        gone: dict[str, float] = {}
        while time.monotonic() < until and (agent.poll() is None or any(map(alive, pids))):
            time.sleep(0.1)
            for rank, pid in enumerate(pids):
                if not alive(pid):
                    gone.setdefault(f"rank {rank}", round(time.monotonic() - begun, 1))
        pids = [int(p.read_text()) for p in sorted(out.glob("pid_*"))]
        return {"action": action, "seconds": round(time.monotonic() - begun, 1), "ranks_gone": gone,
                "code": agent.poll(), "left": sum(map(alive, pids)), "said": [
                    line for line in said.read_text().splitlines() if line.startswith(("rank ", "stopped", "warning"))]}
    finally:
        for pid in (*pids, agent.pid):
            if pid == agent.pid and agent.poll() is not None:
                continue
            if alive(pid):
                os.kill(pid, signal.SIGKILL)
        agent.wait()


def alive(pid: int) -> bool:
    from routewright.rank_watch import process_state

    return process_state(pid) not in ("", "Z", "X")


def main() -> None:
    ask = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    ask.add_argument("--kills", type=int, default=30)
    ask.add_argument("--in_save", type=int, default=8)
    ask.add_argument("--folder", type=Path, default=Path("/tmp/kill_training"))
    ask.add_argument("--rank_of", type=Path, help="be one torchrun rank that trains into this folder")
    ask.add_argument("--timeout", type=int, default=60)
    ask.add_argument("--steps", type=int, default=100000)
    ask.add_argument("--poison", type=int)
    ask.add_argument("--ranks", nargs="*", help="disturb a 2-rank torchrun job: kill kill0 stop term killagent none")
    given = ask.parse_args()
    if given.rank_of:
        return be_a_rank(given)
    import shutil

    shutil.rmtree(given.folder, ignore_errors=True)
    for action in given.ranks or []:
        print(json.dumps(rank_trial(given.folder / action, action, given.timeout)), flush=True)
    if given.ranks:
        return
    import transformers.trainer  # noqa: F401 - warm before the forks
    begun = time.time()
    told = trial(given.folder, given.kills, given.in_save)
    print(json.dumps({**told, "seconds": round(time.time() - begun)}))


def be_a_rank(given: argparse.Namespace) -> None:
    from routewright.errors import PartialRun, UserError
    from routewright.rank_watch import guard_process

    guard_process()
    out = given.rank_of
    out.mkdir(parents=True, exist_ok=True)
    trainer = make(out, data=rows(poison=given.poison), slow_step=0.02, ddp_timeout=given.timeout,
                   max_steps=given.steps, dropout=0.0, per_device_train_batch_size=2, save_steps=20)
    (out / f"pid_{os.environ['RANK']}").write_text(str(os.getpid()))
    try:
        trainer.run(resume="auto")
        if trainer.is_world_process_zero():
            (out / "result.json").write_text(json.dumps({"weights": weights_digest(trainer)}))
    except (PartialRun, UserError) as error:
        print(f"rank {os.environ['RANK']}: {error}", file=sys.stderr, flush=True)
        sys.exit(error.exit_code)


if __name__ == "__main__":
    main()
