"""The script that fits light routers, from the command line as a user meets it."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import numpy as np
import pytest
from planted import make_outcomes, make_table

from routewright.outcomes import write_outcomes
from routewright.routers import load_router

POOL = """\
name: tiny
prices_dated: 2026-11-20
models:
  - {name: cheap, price_input: 0.1, price_output: 0.4}
  - {name: strong, price_input: 1.5, price_output: 6}
"""


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cache")
    write_outcomes(folder / "outcomes.jsonl.gz", make_outcomes(n=240))
    (folder / "pool.yaml").write_text(POOL)
    return folder


def script(root, *flags):
    return subprocess.run([sys.executable, str(root / "src" / "train_embedding.py"), *map(str, flags)],
                          capture_output=True, text=True, cwd=root, env={**os.environ, "PYTHONWARNINGS": "ignore"})


def test_its_decisions_reach_the_dashboard(root, cache, tmp_path):
    done = script(root, "--cache", cache, "--output_dir", tmp_path / "r", "--wandb", "true")
    assert done.returncode == 0, done.stderr
    record, = (tmp_path / "r" / "wandb").glob("offline-run-*")
    seen = subprocess.run([f"{sys.prefix}/bin/wandb", "leet", "inspect", "--summary", "--json", str(record)],
                          capture_output=True, text=True, check=True)
    summary = json.loads(seen.stdout)["summary"]
    found = json.loads((tmp_path / "r" / "dev_scores.json").read_text())["decisions"]
    assert {name: summary[name] for name in found} == pytest.approx(found)


@pytest.mark.parametrize("kind", ["linear", "group_table"])
def test_writes_a_router_that_loads(root, cache, tmp_path, kind):
    out = tmp_path / "my-router"
    done = script(root, "--cache", cache, "--kind", kind, "--output_dir", out, "--cost_weight", 50)
    assert done.returncode == 0, done.stderr
    assert f"{kind} router of" in done.stdout and "AUROC" in done.stdout
    router = load_router(out)
    assert router.name == "my-router" and router.decision == {"cost_weight": 50.0}
    scores = json.loads((out / "dev_scores.json").read_text())
    assert set(scores["models"]) == {"cheap", "strong"}
    if kind == "linear":
        assert scores["models"]["cheap"]["auroc"] > 0.7
        assert scores["models"]["cheap"]["brier"] < scores["models"]["cheap"]["brier_constant"]
        assert scores["decisions"]["collapse/gain"] > .05 and "dev reward" in done.stdout
    assert (out / "config.resolved.yaml").is_file()
    assert np.isfinite(router.estimate(make_table(n=10).prompts)).all()


@pytest.mark.parametrize(("flags", "said"), [
    (["--kind", "liner"], "did you mean 'linear'"),
    (["--router.kk", "3"], "has no option 'kk'"),
    (["--kind", "length", "--encoder", "tfidf"], "--encoder has no meaning for kind length"),
    (["--encodr", "tfidf"], "did you mean"),
])
def test_mistakes_stop_before_anything_is_written(root, cache, tmp_path, flags, said):
    done = script(root, "--cache", cache, "--output_dir", tmp_path / "o", *flags)
    assert done.returncode == 2 and said in done.stderr and "Traceback" not in done.stderr
    assert not (tmp_path / "o").exists()


def test_missing_weights_exit_4(root, cache, tmp_path):
    done = script(root, "--cache", cache, "--output_dir", tmp_path / "o", "--encoder", "no-such/encoder")
    assert done.returncode == 4 and "hf download no-such/encoder" in done.stderr
    assert not (tmp_path / "o").exists()
