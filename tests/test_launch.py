"""The Fire door: nothing starts before every name and type is checked."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path
from typing import Literal

import pytest
import yaml

from routewright.errors import MissingSetup, PartialRun, UserError
from routewright.launch import help_text, read_options, run

calls: list[dict] = []


def main(
    *,
    # Files
    cache: str = "data/sample",  # the outcome cache
    output_dir: str | None = None,
    # Training
    epochs: int = 3,
    # a longer note that
    # goes over two lines
    lr: float = 1e-5,
    fp16: bool = False,
    seeds: list[int] | None = None,
    names: list[str] | None = None,
    size: int | str = "auto",
    mode: Literal["fast", "slow"] = "fast",
    trainer: dict | None = None,  # library settings
) -> None:
    """Train something small."""
    calls.append(locals())


@pytest.fixture(autouse=True)
def fresh():
    calls.clear()


def test_flags_reach_main_with_their_types():
    words = "--lr 5e-7 --epochs=2 --fp16 true --seeds 1,2 --names [gpt-4o,m2] --size 4 --mode slow"
    assert run(main, words.split()) == 0
    got = calls[0]
    assert got == {"cache": "data/sample", "output_dir": None, "epochs": 2, "lr": 5e-7, "fp16": True, "seeds": [1, 2],
                   "names": ["gpt-4o", "m2"], "size": 4, "mode": "slow", "trainer": None}


@pytest.mark.parametrize("text, value", [("--fp16", True), ("--fp16 false", False), ("--fp16=no", False),
                                         ("--nofp16", False)])
def test_booleans_are_never_true_by_being_text(text, value):
    assert run(main, text.split()) == 0
    assert calls[0]["fp16"] is value


@pytest.mark.parametrize("words, message", [
    ("--lrr 3", "unknown option --lrr (did you mean 'lr'?)"),
    ("--lr abc", "--lr: 'abc' is not a number"),
    ("--lr", "--lr has no value"),
    ("stray", "'stray' stands alone"),
    ("--mode slwo", "did you mean 'slow'?"),
    ("--epochs 1.5", "--epochs: '1.5' is not a whole number"),
    ("--fp16=maybe", "neither true nor false"),
    ("--cache.x 2", "--cache holds one value"),
    ("--lr 1 --lr 2", "given twice"),
    ("--config nowhere.yaml", "no such file"),
    ("--seeds 1,b", "is not a whole number"),
    ("--lr nan", "--lr: nan is no finite number"),
    ("--lr 1e999", "--lr: inf is no finite number"),
])
def test_a_mistake_is_one_sentence_and_main_never_starts(words, message, capsys):
    assert run(main, words.split()) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert not calls


def test_file_then_flags(tmp_path):
    config = tmp_path / "c.yaml"
    config.write_text("lr: 1e-5\nepochs: 4\nmode: slow\ntrainer: {warmup_steps: 10, learning_rate: 1e-4}\n")
    assert run(main, ["--config", str(config), "--epochs", "5", "--trainer.learning_rate", "5e-7"]) == 0
    got = calls[0]
    assert got["lr"] == 1e-5 and got["epochs"] == 5 and got["mode"] == "slow"
    assert got["trainer"] == {"warmup_steps": 10, "learning_rate": 5e-7}


@pytest.mark.parametrize("text, message", [
    ("epochz: 4", "unknown key 'epochz' (did you mean 'epochs'?)"),
    ("cache: no", "cache: False is not a text; put it in quotes"),
    ("epochs: three", "epochs: 'three' is not a whole number"),
    ("fp16: 'false'", "fp16: 'false' is not a true|false"),
    ("lr: 1\nlr: 2", "key 'lr' stands twice"),
    ("- a", "expected a mapping"),
    ("a: [", "not YAML"),
])
def test_a_bad_file_names_the_file_and_the_key(text, message, tmp_path, capsys):
    config = tmp_path / "c.yaml"
    config.write_text(text)
    assert run(main, ["--config", str(config)]) == 2
    error = capsys.readouterr().err
    assert message in error and str(config) in error
    assert not calls


@pytest.mark.parametrize("error, code", [(UserError("x"), 2), (PartialRun("x"), 3), (MissingSetup("x"), 4),
                                         (RuntimeError("x"), 1)])
def test_exit_codes(error, code, capsys):
    def main(*, epochs: int = 1) -> None:
        raise error

    assert run(main, []) == code
    assert "Traceback" not in capsys.readouterr().err


def test_what_was_resolved_is_saved_and_repeats_the_run(tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    assert run(main, ["--output_dir", str(folder), "--lr", "0.5", "--trainer.a", "1e-3"]) == 0
    saved = folder / "config.resolved.yaml"
    assert yaml.safe_load(saved.read_text())["lr"] == 0.5
    assert run(main, ["--config", str(saved)]) == 0
    assert calls[0] == calls[1]


def test_help_names_every_option_and_its_heading(capsys):
    assert run(main, ["--lrr", "3", "--help"]) == 0
    text = capsys.readouterr().out
    assert not calls
    assert "Train something small." in text and "Training:" in text
    assert "a longer note that goes over two lines" in " ".join(text.split())
    for name in read_options(main):
        assert f"--{name}" in text
    assert help_text(main, read_options(main)).startswith(Path(sys.argv[0]).name)


def test_required_option():
    def main(*, data: str, epochs: int = 1) -> None:
        calls.append({"data": data})

    assert run(main, []) == 2
    assert run(main, ["--data", "x"]) == 0 and calls == [{"data": "x"}]


def _scripts(root: Path) -> list[Path]:
    return sorted(p for p in (root / "src").glob("*.py"))


def test_help_of_every_script_is_quick_and_imports_nothing_heavy(root):
    """Under 0.3 s of CPU each; measured with the child's own clock, best of three."""
    code = ("import runpy, sys, time\n"
            "sys.argv = [sys.argv[1], '--help']\n"
            "try:\n    runpy.run_path(sys.argv[0], run_name='__main__')\n"
            "except SystemExit as stop:\n    assert not stop.code, stop.code\n"
            "heavy = {'torch', 'transformers', 'pandas', 'sklearn', 'litellm', 'wandb', 'altair', 'numba'}\n"
            "heavy &= set(sys.modules)\n"
            "assert not heavy, heavy\n"
            "print('CPU', time.process_time())\n")
    for script in _scripts(root):
        best = 9.0
        for _ in range(3):
            done = subprocess.run([sys.executable, "-c", code, str(script)], capture_output=True, text=True,
                                  env={"PYTHONPATH": str(root / "src"), "PATH": "/usr/bin:/bin"})
            assert done.returncode == 0, f"{script.name}: {done.stderr}"
            best = min(best, float(done.stdout.rsplit("CPU ", 1)[1]))
            if best < 0.3:
                break
        assert best < 0.3, f"{script.name} --help took {best:.2f} s of CPU"


def test_misspelt_flag_stops_a_real_script_at_once(root):
    script = root / "src" / "check_setup.py"
    start = time.monotonic()
    done = subprocess.run([sys.executable, str(script), "--jsn"], capture_output=True, text=True)
    assert done.returncode == 2 and "did you mean 'json'?" in done.stderr
    assert time.monotonic() - start < 5


def test_numbers_inside_lists_and_mappings_are_numbers():
    assert run(main, ["--trainer", "{lr: 1e-5, betas: [9e-1, 5E-1]}", "--trainer.warmup", "[1e-3]"]) == 0
    assert calls[0]["trainer"] == {"lr": 1e-5, "betas": [0.9, 0.5], "warmup": [1e-3]}


@pytest.mark.parametrize("words", ["--help", "--json true"])
def test_a_reader_that_leaves_early_is_no_traceback(root, words):
    """`script | head -1`: the pipe is closed before a word is written."""
    line = f"{sys.executable} {root / 'src' / 'check_setup.py'} {words} | true; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", line], capture_output=True, text=True)
    assert done.returncode in (0, 141) and not done.stderr.count("Broken") and "Traceback" not in done.stderr
