"""Checks this machine for everything Routewright needs, in about a second: it imports nothing heavy.

Each line is OK, WARN (works, with a limit that is named) or FAIL, with the cure beside it. Exit code 3 when
anything fails. Keys are only looked for, never shown.

    python src/check_setup.py
    python src/check_setup.py --json true
"""

from __future__ import annotations

import importlib.metadata
import json as json_library
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from routewright.errors import PartialRun
from routewright.launch import launch

ROOT = Path(__file__).resolve().parents[1]
PROVIDER_KEYS = ("OPENAI_API_KEY", "TOGETHER_API_KEY", "GEMINI_API_KEY", "ANTHROPIC_API_KEY", "OPENROUTER_API_KEY")
CUDA_13_DRIVER = 580  # the oldest NVIDIA driver that runs CUDA 13 builds of torch
SMALL_GPU = 12000  # MiB; one card below this is trained on with four bits and LoRA, as cmd/launch.sh decides
LEAST_GPU = 7500  # MiB; what the rtx4060 profile is made for
NEED_GB, WISH_GB = 2, 10


class Check(NamedTuple):
    status: str  # OK, WARN, FAIL
    what: str
    seen: str
    cure: str = ""


def main(
    *,
    # Output
    json: bool = False,  # print the checks as JSON, for scripts
) -> None:
    """Check requirements, GPU, compiler, keys, W&B mode and disk; exit 3 if anything fails."""
    checks = [*python_and_packages(), *accelerate(), *gpu(), *compiler(), *keys(), *tracking(), *hub(), *disk(),
              *sample_data()]
    if json:
        print(json_library.dumps([c._asdict() for c in checks], indent=2))
    else:
        width = max(len(c.what) for c in checks)
        for check in checks:
            cure = f"  ->  {check.cure}" if check.cure else ""
            print(f"{check.status:<4}  {check.what:<{width}}  {check.seen}{cure}")
    failed = [c.what for c in checks if c.status == "FAIL"]
    if failed:
        raise PartialRun(f"{len(failed)} of {len(checks)} checks failed ({', '.join(failed)}); the cures stand above")


def requirements() -> dict[str, str]:
    """Pinned name -> version for this platform, from requirements.txt."""
    pins = {}
    for line in (ROOT / "requirements.txt").read_text().splitlines():
        text, _, marker = line.split("#")[0].partition(";")
        match = re.match(r"\s*([\w-]+)(?:\[\w+\])?==(\S+)", text)
        if not match:
            continue
        if "linux" in marker and sys.platform != "linux" or "darwin" in marker and sys.platform == "darwin":
            continue
        pins[match[1]] = match[2]
    return pins


def python_and_packages() -> Iterator[Check]:
    version = ".".join(map(str, sys.version_info[:3]))
    if sys.version_info >= (3, 11):  # noqa: UP036 - to be told is better than to fail
        yield Check("OK", "python", version)
    else:
        yield Check("FAIL", "python", version, "install Python 3.11 or newer and run cmd/setup.sh again")
    for name, pinned in requirements().items():
        try:
            seen = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            yield Check("FAIL", name, "not installed", "run cmd/setup.sh")
            continue
        if name == "litellm" and seen in ("1.82.7", "1.82.8"):
            yield Check("FAIL", name, f"{seen} is a compromised release (2026-03)", "uninstall it, change your keys")
        elif seen.split("+")[0] == pinned:
            yield Check("OK", name, seen)
        else:
            yield Check("WARN", name, f"{seen}, measured with {pinned}", "run cmd/setup.sh")


def accelerate() -> Iterator[Check]:
    """Whether `accelerate launch --config rtx4060.yaml ...` works as people type it, in this shell."""
    ours = ROOT / "cmd" / "bin" / "accelerate"
    beside = Path(sys.executable).with_name("accelerate")
    found = shutil.which("accelerate") or (str(beside) if beside.is_file() else "")
    if not found:
        return  # the package's own line says that it is missing
    pointer = Path(found).stat().st_size < 4096 and str(ours) in Path(found).read_text(errors="replace")
    if Path(found).resolve() == ours or pointer:
        yield Check("OK", "accelerate line", "takes --config rtx4060.yaml before the script")
        return
    own = Path(found).resolve().is_relative_to(ROOT / ".venv")
    yield Check("WARN", "accelerate line", f"{found} knows only --config_file and whole paths",
                ("pip wrote it anew: run cmd/setup.sh" if own else "source cmd/env.sh")
                + ", or type --config_file accelerate_configs/rtx4060.yaml")


def gpu() -> Iterator[Check]:
    try:
        torch_build = importlib.metadata.version("torch")
    except importlib.metadata.PackageNotFoundError:
        torch_build = ""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        yield Check("WARN", "GPU", "no NVIDIA driver found",
                    "the CPU runs everything on sample models; 4-bit and real base models want a GPU")
        return
    query = "--query-gpu=name,memory.total,driver_version"
    try:
        done = subprocess.run([tool, query, "--format=csv,noheader,nounits"], capture_output=True, text=True,
                              timeout=10)
        rows = [line.split(", ") for line in done.stdout.strip().splitlines()]
    except (OSError, subprocess.TimeoutExpired):
        rows = []
    if not rows or any(len(row) != 3 for row in rows):
        yield Check("WARN", "GPU", "nvidia-smi does not answer", "check the driver: run nvidia-smi by hand")
        return
    for index, (name, memory, driver) in enumerate(rows):
        size = f"{int(memory) / 1024:.1f} GiB" if memory.isdigit() else "memory unknown"
        yield Check("OK", f"GPU {index}", f"{name}, {size}, driver {driver}")
    yield profile([int(memory) for _, memory, _ in rows if memory.isdigit()])
    driver = rows[0][2]
    if torch_build.endswith("+cpu"):
        yield Check("WARN", "torch build", torch_build, "this is a CPU build; install the CUDA build to use the GPU")
    elif int(driver.split(".")[0]) < CUDA_13_DRIVER:
        yield Check("WARN", "driver", driver, f"CUDA 13 builds of torch need {CUDA_13_DRIVER} or newer: update the "
                    "driver, or install torch from the cu126 index")


def profile(memory: list[int]) -> Check:
    """What PROFILE=auto of the launchers takes on these GPUs (MiB each), and whether it fits."""
    if len(memory) > 1:
        return Check("OK", "profile", f"{len(memory)} GPUs: DeepSpeed ZeRO-2 for language models, DDP for encoders")
    if not memory or memory[0] >= SMALL_GPU:
        return Check("OK", "profile", "one GPU, plain")
    if memory[0] < LEAST_GPU:
        seen = f"rtx4060 (four bits, LoRA) is made for 8 GB, here are {memory[0] / 1024:.1f} GiB"
        return Check("WARN", "profile", seen, "give a smaller --model_name or --max_length")
    try:
        on_windows = "microsoft" in Path("/proc/version").read_text().lower()
    except OSError:
        on_windows = False
    note = "; Windows keeps about 1 GB of the card, close what else draws on it" if on_windows else ""
    return Check("OK", "profile", f"rtx4060: four bits and LoRA{note}")


def compiler() -> Iterator[Check]:
    found = next((name for name in ("c++", "g++", "clang++") if shutil.which(name)), None)
    if found:
        yield Check("OK", "C++ compiler", found)
    else:
        yield Check("WARN", "C++ compiler", "none",
                    "all profiles run; only DeepSpeed settings of your own with offloading or its optimizers are "
                    "compiled at run time: apt install g++")
    try:
        ninja = shutil.which("ninja") or importlib.metadata.version("ninja")
        yield Check("OK", "ninja", str(ninja))
    except importlib.metadata.PackageNotFoundError:
        yield Check("WARN", "ninja", "none", "what DeepSpeed compiles needs it: run cmd/setup.sh")


def keys() -> Iterator[Check]:
    in_file = set()
    env_file = ROOT / ".env"
    if env_file.is_file():
        in_file = {line.split("=")[0].removeprefix("export ").strip()
                   for line in env_file.read_text().splitlines() if "=" in line}
    there = [name for name in PROVIDER_KEYS if os.environ.get(name) or name in in_file]
    if there:
        yield Check("OK", "provider keys", f"set: {', '.join(there)} (never shown)")
    else:
        yield Check("WARN", "provider keys", "none set", f"live calls need one of {', '.join(PROVIDER_KEYS)}; "
                    "replay and local models need none")


def tracking() -> Iterator[Check]:
    mode = os.environ.get("WANDB_MODE", "")
    netrc = Path.home() / ".netrc"
    logged_in = bool(os.environ.get("WANDB_API_KEY")) or (netrc.is_file() and "api.wandb.ai" in netrc.read_text())
    if mode in ("offline", "disabled"):
        yield Check("OK", "W&B", f"{mode} (WANDB_MODE); wandb leet shows recorded runs")
    elif logged_in:
        yield Check("OK", "W&B", "a key is set (never shown): runs are sent")
    else:
        yield Check("OK", "W&B", "no key: runs are recorded offline; wandb leet shows them")


def hub() -> Iterator[Check]:
    home = Path(os.environ.get("HF_HOME", Path.home() / ".cache/huggingface"))
    cache = Path(os.environ.get("HF_HUB_CACHE") or home / "hub")
    offline = " (HF_HUB_OFFLINE is set)" if os.environ.get("HF_HUB_OFFLINE") in ("1", "true", "True") else ""
    yield Check("OK", "hub cache", f"{len(list(cache.glob('models--*')))} models in {cache}{offline}")


def disk() -> Iterator[Check]:
    free = shutil.disk_usage(ROOT).free / 2**30
    if free < NEED_GB:
        yield Check("FAIL", "disk", f"{free:.1f} GiB free", f"free at least {NEED_GB} GiB on the disk of {ROOT}")
    elif free < WISH_GB:
        yield Check("WARN", "disk", f"{free:.1f} GiB free", "base models and checkpoints soon fill this")
    else:
        yield Check("OK", "disk", f"{free:.0f} GiB free")
    runs = ROOT / "data"
    if os.access(runs, os.W_OK):
        yield Check("OK", "data folder", f"{runs} can be written")
    else:
        yield Check("FAIL", "data folder", f"{runs} cannot be written", "give yourself write permission there")


def sample_data() -> Iterator[Check]:
    missing = [name for name in ("outcomes.jsonl.gz", "pool.yaml") if not (ROOT / "data" / "sample" / name).is_file()]
    if missing:
        yield Check("FAIL", "sample cache", f"data/sample lacks {', '.join(missing)}", "git checkout data/sample")
    else:
        yield Check("OK", "sample cache", "data/sample")


if __name__ == "__main__":
    launch(main)
