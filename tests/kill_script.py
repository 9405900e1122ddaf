"""Kill -9 a training script's own command line at random instants; does its resumed life equal an unbroken one?

    PYTHONPATH=src:tests python tests/kill_script.py --script train_llm --kills 10 --in_save 3 -- \
        --data data/sets/sample/alpaca_train.jsonl --model_name data/sample/models/cheap --epochs 4 --learning_rate 1e-3

Every life is the very same line, a new process with its own imports; nobody lends a hand in between. Instants are
drawn: anywhere from the start, some steps into the training, while a checkpoint is being written, or after the last
step, while the router is written. What is compared at the end: every row of train_log.jsonl, the bytes of every
safetensors file of the router folder, and the dev scores. Ends in one JSON line.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
INSTANTS = ("start", "step", "save", "end")
LONGEST = 600.0  # seconds of one life before the trial gives up


def start(script: str, flags: list[str], out: Path) -> subprocess.Popen:
    """One life of the script, writing what it says into `<out>.said`."""
    out.parent.mkdir(parents=True, exist_ok=True)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE", "HF_HUB_OFFLINE": "1",
                   "WANDB_MODE": "offline", "TOKENIZERS_PARALLELISM": "false", "CUDA_VISIBLE_DEVICES": ""}
    with open(out.with_suffix(".said"), "a") as said:
        return subprocess.Popen([sys.executable, str(ROOT / "src" / f"{script}.py"), *flags, "--output_dir", str(out)],
                                stdout=said, stderr=said, env=environment, cwd=ROOT, start_new_session=True)


def lines(out: Path) -> int:
    log = out / "train_log.jsonl"
    return log.read_bytes().count(b"\n") if log.exists() else 0


def saving(out: Path, pid: int) -> bool:
    """Whether this life is writing a checkpoint; what an earlier one left behind bears another process id."""
    return out.exists() and any(p.name.startswith(".tmp-checkpoint-") and p.name.endswith(f"-{pid}")
                                for p in out.iterdir())


def touched(out: Path, since: float) -> bool:
    """Whether a life begun at this wall-clock time has come to its training: it cuts the log before the first step."""
    log = out / "train_log.jsonl"
    return log.exists() and log.stat().st_mtime > since


def ending(out: Path, steps: int, pid: int) -> bool:
    """All steps are made and the router folder is not whole yet."""
    return lines(out) >= steps and not (out / "router.json").exists() and not saving(out, pid)


def kill_at(life: subprocess.Popen, out: Path, instant: str, steps: int, seconds: float, draw: random.Random) -> str:
    """Wait for the instant, then kill the whole process group. Returns where it struck, or the exit code.

    steps: of the unbroken run; seconds: what the unbroken run took, from the start to its end.
    """
    begun, started, before = time.monotonic(), time.time(), lines(out)
    due = begun + draw.uniform(0.0, 0.8) * seconds if instant == "start" else None
    left = max(1, steps - before)
    wanted = before + draw.randint(1, left)
    while life.poll() is None:
        now = time.monotonic()
        if due is None:
            if (lines(out) >= wanted if instant == "step" else saving(out, life.pid) if instant == "save"
                    else ending(out, steps, life.pid)):
                due = now + draw.uniform(0.0, {"save": 0.05, "end": 1.0}.get(instant, 0.02))
        if due is not None and now >= due:
            where = "save" if saving(out, life.pid) else "start" if not touched(out, started) else \
                "end" if lines(out) >= steps else "training"
            os.killpg(life.pid, signal.SIGKILL)
            life.wait()
            return where
        if now - begun > LONGEST:
            os.killpg(life.pid, signal.SIGKILL)
            life.wait()
            raise RuntimeError(f"no end after {LONGEST:.0f} s; see {out.with_suffix('.said')}")
        time.sleep(0.003)
    return f"ended with {life.returncode}"


def finish(script: str, flags: list[str], out: Path) -> int:
    return start(script, flags, out).wait(timeout=LONGEST)


def result(out: Path) -> dict[str, Any]:
    """What two runs are compared by."""
    rows = [json.loads(line) for line in (out / "train_log.jsonl").read_text().splitlines()]
    scores = out / "dev_scores.json"
    return {"losses": rows, "weights": {p.name: p.read_bytes() for p in sorted(out.glob("*.safetensors"))},
            "scores": scores.read_bytes() if scores.exists() else b""}


def trial(script: str, flags: list[str], folder: Path, kills: int, in_save: int = 0, seed: int = 0,
          whole: Path | None = None, instants: tuple[str, ...] = INSTANTS) -> dict[str, Any]:
    """An unbroken run (or the one in `whole`), then runs killed `kills` times in all, each resumed to its end.

    in_save: that many kills at the least wait for a checkpoint being written.
    """
    draw = random.Random(seed)
    began = time.monotonic()
    if whole is None:
        whole = folder / "whole"
        if finish(script, flags, whole):
            raise RuntimeError(whole.with_suffix(".said").read_text()[-2000:])
    seconds = max(10.0, time.monotonic() - began)
    wanted = result(whole)
    if not wanted["weights"]:
        raise RuntimeError(f"{whole}: the unbroken run left no weights")
    told = {"script": script, "kills": 0, "struck": {}, "runs": 0, "by_hand": 0, "losses_equal": 0, "weights_equal": 0,
            "scores_equal": 0, "steps": len(wanted["losses"])}
    saves_left = in_save
    while told["kills"] < kills:
        out = folder / f"run{told['runs']}"
        told["runs"] += 1
        for _ in range(min(kills - told["kills"], draw.randint(1, 4))):
            instant = "save" if saves_left > 0 else draw.choice(instants)
            where = kill_at(start(script, flags, out), out, instant, told["steps"], seconds, draw)
            if where == "ended with 0":
                break
            if where.startswith("ended"):
                raise RuntimeError(f"{where}\n{out.with_suffix('.said').read_text()[-2000:]}")
            told["kills"] += 1
            told["struck"][where] = told["struck"].get(where, 0) + 1
            saves_left -= where == "save"
        told["by_hand"] += finish(script, flags, out) != 0
        got = result(out)
        for name in ("losses", "weights", "scores"):
            told[f"{name}_equal"] += got[name] == wanted[name]
    return told


def main() -> None:
    ask = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    ask.add_argument("--script", default="train_llm", help="a name in src/, without .py")
    ask.add_argument("--kills", type=int, default=10)
    ask.add_argument("--in_save", type=int, default=3, help="kills that wait for a checkpoint being written")
    ask.add_argument("--seed", type=int, default=0, help="of the instants")
    ask.add_argument("--folder", type=Path, default=Path("/tmp/kill_script"))
    ask.add_argument("flags", nargs=argparse.REMAINDER, help="after --: the flags of the script, without --output_dir")
    given = ask.parse_args()
    import shutil

    shutil.rmtree(given.folder, ignore_errors=True)
    begun = time.time()
    told = trial(given.script, [f for f in given.flags if f != "--"], given.folder, given.kills, given.in_save,
                 given.seed)
    print(json.dumps({**told, "seconds": round(time.time() - begun)}), flush=True)


if __name__ == "__main__":
    main()
