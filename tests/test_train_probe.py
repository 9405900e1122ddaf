"""The script that trains probes, as a user meets it: what it learns, writes, refuses, and what a kill costs."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from routewright.errors import UserError
from routewright.outcomes import OutcomeTable
from routewright.prompts import seed_splits
from routewright.routers import load_router


def script(root, *flags):
    return subprocess.run([sys.executable, str(root / "src" / "train_probe.py"), *map(str, flags)],
                          capture_output=True, text=True, cwd=root, env={**os.environ, "PYTHONWARNINGS": "ignore"})


@pytest.fixture(scope="module")
def main(root):
    """The script's function, in this process: torch is imported once for all tests."""
    import importlib.util

    spec = importlib.util.spec_from_file_location("train_probe_under_test", root / "src" / "train_probe.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.main


@pytest.fixture(scope="module")
def states(tmp_path_factory):
    return tmp_path_factory.mktemp("states")


@pytest.fixture(scope="module")
def sample(root):
    table = OutcomeTable.load(root / "data" / "sample")
    return table.with_splits(seed_splits(table.prompts, 3))


@pytest.fixture(scope="module")
def trained(main, states, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "my-probe"
    main(output_dir=str(out), split_seed=3, state_cache=str(states), epochs=12, cost_weight=2000.0)
    return out


def test_the_router_beats_every_random_mix_on_the_test_prompts(trained, sample):
    """On the sample's own cheap model: what is learnt on train and chosen on dev holds on test."""
    from routewright import decide, metrics

    router, train, test = load_router(trained), sample.split("train"), sample.split("test")
    assert router.name == "my-probe" and router.decision == {"cost_weight": 2000.0} and router.member == "cheap"
    estimate = router.estimate(test.prompts)
    assert metrics.auroc(test.quality[:, 0] >= 0.5, estimate[:, 0]) > 0.78
    expected = decide.expected_cost(train, test)
    swept = decide.sweep_scores(estimate, expected, test.quality, test.cost, decide.cost_weights(estimate, expected))
    spread = metrics.pool_range(test.cost)
    mixes = metrics.aiq(test.cost.mean(axis=0), test.quality.mean(axis=0), spread)
    assert metrics.aiq(swept.cost, swept.quality, spread) > mixes + 0.02
    assert np.unique(decide.choose(estimate, expected, 2000.0)).size > 1
    assert metrics.brier(estimate, test.quality_mean) < 0.8 * test.quality_mean.var(axis=0).mean()


def test_dev_scores_and_the_monitor_are_written(trained):
    scores = json.loads((trained / "dev_scores.json").read_text())
    assert scores["probe"] == "dirichlet" and scores["auroc/cheap"] > 0.75 and 0.5 < scores["aiq"] < 1
    assert sum(scores["layer_weights"]) == pytest.approx(1, abs=1e-3) and len(scores["layer_weights"]) == 3
    looks = [json.loads(line) for line in (trained / "monitor.jsonl").read_text().splitlines()]
    assert [row["step"] for row in looks] == list(range(1, scores["epochs"] + 1))
    assert {"dev/quality", "dev/cost_usd", "share/cheap", "collapse/gain"} <= set(looks[0])
    assert {p.name for p in trained.iterdir()} == {"router.json", "weights.safetensors", "dev_scores.json",
                                                   "monitor.jsonl"}


def test_again_gives_the_same_bytes(main, states, trained, tmp_path):
    out = tmp_path / "my-probe"
    main(output_dir=str(out), split_seed=3, state_cache=str(states), epochs=12, cost_weight=2000.0)
    for name in ("router.json", "weights.safetensors", "monitor.jsonl"):
        assert (out / name).read_bytes() == (trained / name).read_bytes(), name


def test_all_kinds_are_tried_and_the_best_on_dev_is_kept(main, states, tmp_path, capsys):
    main(output_dir=str(tmp_path / "p"), split_seed=3, state_cache=str(states), epochs=4, hidden_sizes=[16],
         probe_kind="all", seeds=2)
    scores = json.loads((tmp_path / "p" / "dev_scores.json").read_text())
    tried = scores["tried"]
    assert len(tried) == 12 and {run["probe"] for run in tried} == {"last", "mean", "max", "mean_max", "softmax",
                                                                    "dirichlet"}
    assert scores["dev_loss"] == min(run["dev_loss"] for run in tried) == tried[0]["dev_loss"]
    router = load_router(tmp_path / "p")
    assert router.probe == scores["probe"] and router.decision == {}
    assert "dev loss  AUROC     AIQ" in capsys.readouterr().err


def test_losses_and_decisions_reach_the_tracker(main, states, tmp_path, monkeypatch):
    from routewright import tracking

    seen: dict[int, dict[str, float]] = {}

    class Recorder(tracking.Silent):
        def log(self, scalars, step=None):
            seen.setdefault(step, {}).update(scalars)

    monkeypatch.setattr(tracking, "start", lambda *args, **kwargs: Recorder())
    main(output_dir=str(tmp_path / "p"), split_seed=3, state_cache=str(states), epochs=3, wandb=True)
    assert sorted(seen) == [1, 2, 3]
    assert {"train/loss", "dev/loss", "dev/auroc", "dev/quality", "dev/cost_usd", "share/strong",
            "collapse/top_share"} <= set(seen[3])
    assert seen[3]["train/loss"] < seen[1]["train/loss"]


def test_check_only_writes_no_router(main, states, tmp_path):
    main(output_dir=str(tmp_path / "p"), state_cache=str(states), check_only=True)
    assert not (tmp_path / "p").exists()


@pytest.mark.parametrize(("flags", "code", "said"), [
    (["--probe_kind", "dirichlett"], 2, "did you mean 'dirichlet'"),
    (["--hidden_sizes", "[0]"], 2, "hidden_sizes must be a list of whole numbers above 0"),
    (["--seeds", "0"], 2, "--seeds must be 1 or more"),
    (["--base", "no-such/model"], 4, "hf download no-such/model"),
])
def test_mistakes_stop_before_anything_is_written(root, tmp_path, flags, code, said):
    done = script(root, "--output_dir", tmp_path / "o", *flags)
    assert done.returncode == code and said in done.stderr and "Traceback" not in done.stderr
    assert not (tmp_path / "o").exists()


def test_a_pool_without_local_weights_says_so(main, root, tmp_path):
    pool = (root / "data" / "sample" / "pool.yaml").read_text()
    (tmp_path / "pool.yaml").write_text("\n".join(line for line in pool.splitlines() if "path:" not in line))
    with pytest.raises(UserError, match="'cheap', the cheapest model, has no `path`"):
        main(pool=str(tmp_path / "pool.yaml"), output_dir=str(tmp_path / "o"))


@pytest.mark.slow
def test_a_kill_costs_a_batch_of_states(main, root, states, tmp_path, monkeypatch):
    """kill -9 while the states are read: the same line goes on from the blocks on disk and ends at the same bytes."""
    from routewright import hidden_states

    killed, options = tmp_path / "states", {"split_seed": 3, "epochs": 3, "read_batch": 8}
    flags = [f"--{name}={value}" for name, value in options.items()]
    run = subprocess.Popen(
        [sys.executable, str(root / "src" / "train_probe.py"), f"--output_dir={tmp_path / 'a' / 'p'}",
         f"--state_cache={killed}", *flags], cwd=root, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        end = time.monotonic() + 180
        while time.monotonic() < end and len(list(killed.rglob("batch-*"))) < 20 and run.poll() is None:
            time.sleep(0.02)
        run.send_signal(signal.SIGKILL)
        assert run.wait() == -signal.SIGKILL
    finally:
        run.kill()
    kept = list(killed.rglob("batch-*.safetensors"))
    assert len(kept) >= 20 and not (tmp_path / "a" / "p" / "router.json").exists()

    fresh = []

    def count(self, keys, values, seconds):
        fresh.extend(keys)
        return add(self, keys, values, seconds)

    add = hidden_states._BlockCache.add
    monkeypatch.setattr(hidden_states._BlockCache, "add", count)
    main(output_dir=str(tmp_path / "a" / "p"), state_cache=str(killed), **options)
    scores = json.loads((tmp_path / "a" / "p" / "dev_scores.json").read_text())
    assert 0 < len(fresh) <= scores["train_prompts"] + scores["dev_prompts"] - 8 * len(kept)
    assert not list(killed.rglob("batch-*"))  # merged
    main(output_dir=str(tmp_path / "b" / "p"), state_cache=str(tmp_path / "unbroken"), **options)
    one, other = ((tmp_path / run / "p" / "weights.safetensors").read_bytes() for run in "ab")
    assert one == other
