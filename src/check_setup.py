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
    checks = [*python_and_packages(), *gpu(), *compiler(), *keys(), *tracking(), *hub(), *disk(), *sample_data()]
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
        yield Check("OK", f"GPU {index}", f"{name}, {int(memory) / 1024:.1f} GiB, driver {driver}")
    driver = rows[0][2]
    if torch_build.endswith("+cpu"):
        yield Check("WARN", "torch build", torch_build, "this is a CPU build; install the CUDA build to use the GPU")
    elif int(driver.split(".")[0]) < CUDA_13_DRIVER:
        yield Check("WARN", "driver", driver, f"CUDA 13 builds of torch need {CUDA_13_DRIVER} or newer: update the "
                    "driver, or install torch from the cu126 index")


def compiler() -> Iterator[Check]:
    found = next((name for name in ("c++", "g++", "clang++") if shutil.which(name)), None)
    if found:
        yield Check("OK", "C++ compiler", found)
    else:
        yield Check("WARN", "C++ compiler", "none",
                    "DeepSpeed builds extensions at run time: apt install g++; other profiles run")
    try:
        ninja = shutil.which("ninja") or importlib.metadata.version("ninja")
        yield Check("OK", "ninja", str(ninja))
    except importlib.metadata.PackageNotFoundError:
        yield Check("WARN", "ninja", "none", "DeepSpeed needs it: pip install ninja")


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
