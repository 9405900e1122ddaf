"""torchrun with our exit codes, on ranks that import nothing."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import pytest

pytest.importorskip("torch")
# Each rank ends as its word says: a code, kill (-9), or wait until it is told to end, and then with that code. The
# others begin when the one that waits is there.
RANK = """
import os, pathlib, signal, sys, time
word = sys.argv[1:][int(os.environ["RANK"])]
ready = pathlib.Path(__file__).with_name("ready")
if word.startswith("wait"):
    signal.signal(signal.SIGTERM, lambda *_: os._exit(int(word[4:])))
    ready.touch()
    time.sleep(60)
while "wait" in " ".join(sys.argv) and not ready.exists():
    time.sleep(.02)
if word == "kill":
    os.kill(os.getpid(), signal.SIGKILL)
sys.exit(int(word))
"""


@pytest.fixture
def script(tmp_path):
    folder = tmp_path / "a folder"
    folder.mkdir()
    (folder / "rank.py").write_text(RANK)
    return folder / "rank.py"


@pytest.fixture(autouse=True)
def one_thread(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("TORCH_DISABLE_SHARE_RDZV_TCP_STORE", "1")


@pytest.mark.parametrize(("words", "code", "told"), [
    ("0 0", 0, ""),
    ("2 0", 2, ""),
    ("4 wait0", 4, ""),
    ("3 3", 3, ""),
    ("kill wait3", 3, ""),  # the other rank saw the death, told it, and knows the checkpoint
    ("kill wait0", 1, "rank 0 ended with SIGKILL; all ranks were stopped, run the same line again to go on"),
    ("1 wait3", 1, "rank 0 ended with code 1; all ranks were stopped, its message stands above"),
    ("7 wait0", 1, "rank 0 ended with code 7"),
])
def test_the_job_ends_with_the_code_that_explains_it(script, capsys, words, code, told):
    from routewright import torchrun

    handlers = {number: signal.getsignal(number)
                for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT)}
    try:
        found = torchrun.run(["--standalone", "--nproc_per_node=2", "--", str(script), *words.split()])
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    said = capsys.readouterr().err
    assert found == code
    assert told in said and "Traceback" not in said and ("error: rank" in said) == bool(told)


def test_a_signal_to_the_job_is_exit_3_and_leaves_no_rank(script, root):
    command = [sys.executable, "-m", "routewright.torchrun", "--standalone", "--nproc_per_node=1", "--", script,
               "wait3"]
    environment = {**os.environ, "PYTHONPATH": str(root / "src")}
    job = subprocess.Popen([str(word) for word in command], env=environment, stderr=subprocess.PIPE, text=True)
    until = time.monotonic() + 60
    while not (script.parent / "ready").exists() and job.poll() is None and time.monotonic() < until:
        time.sleep(.05)
    job.send_signal(signal.SIGTERM)
    said = job.communicate(timeout=60)[1]
    assert job.returncode == 3 and said.count("\n") == 1
    assert said.startswith("stopped by SIGTERM; run the same line again")


def test_accelerate_ends_with_the_code_of_its_one_process(script, capsys, monkeypatch):
    from routewright import torchrun

    for word, code, told in (("0", 0, ""), ("2", 2, ""), ("4", 4, ""), ("kill", 1, "the script ended with SIGKILL")):
        command = [sys.executable, str(script), word]

        def launch(command=command):
            subprocess.run(command, check=True, env={**os.environ, "RANK": "0"})

        assert torchrun._ending(launch) == code
        said = capsys.readouterr().err
        assert told in said and said.count("\n") == bool(told)


def test_a_signal_to_accelerate_reaches_its_script_and_is_waited_for(script, root):
    profile = root / "accelerate_configs" / "cpu.yaml"
    command = [sys.executable, root / "cmd/bin/accelerate", "launch", "--config", profile, script, "wait3"]
    job = subprocess.Popen([str(word) for word in command], env={**os.environ, "RANK": "0"}, stderr=subprocess.PIPE,
                           text=True)
    until = time.monotonic() + 60
    while not (script.parent / "ready").exists() and job.poll() is None and time.monotonic() < until:
        time.sleep(.05)
    job.send_signal(signal.SIGTERM)
    said = job.communicate(timeout=60)[1]
    assert job.returncode == 3 and "Traceback" not in said


def test_accelerate_that_is_not_installed_is_one_sentence(monkeypatch, capsys):
    from routewright import torchrun

    monkeypatch.setattr(torchrun.importlib.util, "find_spec", lambda name: None)
    assert torchrun.accelerate(["launch", "x.py"]) == 4
    assert "run cmd/setup.sh" in capsys.readouterr().err
