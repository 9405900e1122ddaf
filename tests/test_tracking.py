"""Tracking: offline without a key, silent where it must be, and no secret in any file."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from routewright import tracking
from routewright.errors import UserError


@pytest.fixture
def keyless(monkeypatch, tmp_path):
    for name in list(os.environ):
        if name.startswith("WANDB_"):
            monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.delenv("NETRC", raising=False)


def inspect(folder):
    leet = Path(sys.executable).with_name("wandb")
    done = subprocess.run([str(leet), "leet", "inspect", "--summary", "--json", str(folder)], capture_output=True,
                          text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_without_a_key_the_run_is_offline_and_one_line_shows_it(keyless, tmp_path, capsys):
    from PIL import Image

    Image.new("RGB", (8, 8), "white").save(tmp_path / "plot.png")
    (tmp_path / "scores.json").write_text("{}")
    with tracking.start("routewright", "first", tmp_path, {"learning_rate": 1e-4}, job_type="train") as run:
        assert run.mode == "offline"
        folder = run.folder
        run.define("frontier/*", step="frontier/cost")
        run.log({"frontier/cost": 0.5, "frontier/quality": 0.75, "bad": float("nan"), "none": None, "word": "x"})
        run.summary({"accuracy": 0.9, "headline": "words"})
        run.table("leaderboard", ["router", "latency"], [["knn", None], ["linear", 0.5]])
        run.image("frontier_plot", tmp_path / "plot.png", "a plot")
        run.artifact("evaluation 1", "evaluation", [tmp_path / "scores.json"], {"n": 3})
    assert f"wandb leet {folder}" in capsys.readouterr().out
    seen = inspect(folder)
    assert seen["state"] == "finished" and seen["project"] == "routewright"
    assert seen["summary"]["accuracy"] == 0.9 and seen["summary"]["frontier/quality"] == 0.75
    assert not {"bad", "none", "word"} & set(seen["summary"])
    assert seen["summary"]["leaderboard"]["nrows"] == 2
    assert seen["config"]["learning_rate"] == 1e-4


def test_the_summary_stands_for_the_whole_run_and_not_for_its_last_step(keyless, tmp_path):
    with tracking.start("p", "kept", tmp_path) as run:
        run.log({"dev/loss": 0.5}, step=1)
        run.log({"dev/loss": 0.7}, step=2)
        run.summary({"dev/loss": 0.5})
        folder = run.folder
    assert inspect(folder)["summary"]["dev/loss"] == 0.5


def test_no_key_reaches_a_file_by_argv_config_or_environment(tmp_path, root):
    canaries = ("CANARY-ARGV-123456", "CANARY-CONFIG-123456", "CANARY-ENV-123456")
    code = (f"import sys; sys.path.insert(0, {str(root / 'src')!r})\n"
            "from routewright import tracking\n"
            f"with tracking.start('p', 'n', {str(tmp_path)!r}, {{'api_key': 'CANARY-CONFIG-123456', "
            "'note': 'uses CANARY-ENV-123456', 'max_new_tokens': 5, "
            "'nested': {'hf_token': 'CANARY-CONFIG-123456'}}) as run:\n"
            "    run.log({'a': 1.0})\n    print(run.folder)\n")
    done = subprocess.run([sys.executable, "-c", code, "--api_key", canaries[0]], capture_output=True, text=True,
                          env={**os.environ, "WANDB_MODE": "offline", "OTHER_API_KEY": canaries[2]})
    assert done.returncode == 0, done.stderr
    files = [p for p in tmp_path.rglob("*") if p.is_file()]
    assert files
    for path in files:
        data = path.read_bytes()
        assert not [c for c in canaries if c.encode() in data], path
    config = inspect(done.stdout.splitlines()[0])["config"]
    assert config["max_new_tokens"] == 5 and config["api_key"] == "***"


def test_a_shown_command_hides_the_values_of_keys(monkeypatch):
    monkeypatch.setenv("OTHER_API_KEY", "from-the-environment")
    argv = ["python", "x.py", "--api_key", "one", "--hf-token=two", "--max_new_tokens", "5", "--note",
            "from-the-environment", "--cache", "data/sample"]
    assert tracking.masked_command(argv) == ("python x.py --api_key '***' '--hf-token=***' --max_new_tokens 5 --note "
                                             "'***' --cache data/sample")


@pytest.mark.parametrize(("environment", "asked", "mode"), [
    ({}, "auto", "offline"), ({"WANDB_API_KEY": "x" * 40}, "auto", "online"),
    ({"WANDB_API_KEY": "x" * 40}, "offline", "offline"),
    ({"WANDB_API_KEY": "x" * 40, "WANDB_MODE": "offline"}, "auto", "offline"),
    ({"WANDB_MODE": "disabled"}, "auto", "off"),
    ({}, "off", "off"), ({"WANDB_MODE": "disabled"}, "offline", "off")])
def test_modes(keyless, monkeypatch, environment, asked, mode):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert tracking.check_mode(asked) == mode


def test_online_without_a_key_is_refused_at_once(keyless):
    with pytest.raises(UserError, match="needs a key"):
        tracking.check_mode("online")
    with pytest.raises(UserError, match="not one of"):
        tracking.check_mode("sometimes")


def test_a_key_in_netrc_is_seen(keyless, monkeypatch, tmp_path):
    (tmp_path / "netrc").write_text("machine api.wandb.ai login user password abcdefgh\n")
    (tmp_path / "netrc").chmod(0o600)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    assert tracking.has_key()


def test_silent_does_nothing_and_has_every_method(tmp_path, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    run = tracking.start("p", "n", tmp_path / "none")
    assert type(run) is tracking.Silent and not (tmp_path / "none").exists()
    with run:
        run.log({"a": 1})
        run.define("a/*", "a/b")
        run.summary({"a": 1})
        run.table("t", ["a"], [[1]])
        run.image("i", "nowhere.png")
        run.artifact("a", "k", [])
    assert {n for n in vars(tracking.Tracker) if not n.startswith("_")} <= set(dir(tracking.Silent))
