"""run.py: CoBench's router types and paths come out as entries of this project, and one of them is scored."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest
from planted import make_outcomes

from routewright.errors import UserError
from routewright.outcomes import write_outcomes


@pytest.fixture(scope="module")
def run(root):
    spec = importlib.util.spec_from_file_location("run_under_test", root / "src" / "run.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def cheap(root):
    return str(root / "data" / "sample" / "models" / "cheap")


def test_cobench_names_and_paths(run, cheap, tmp_path):
    entry = run.router_entry
    assert entry("knn", None, {"k": 3}) == {"kind": "knn", "k": 3}
    assert entry("logits_margin", None, {}) == {"kind": "logit_score", "score": "margin", "name": "logits_margin"}
    assert entry("entropy", cheap, {})["base"] == cheap
    for kind in run.ON_A_BASE:  # the folder of a language model is its base, a router folder is loaded
        assert entry(kind, cheap, {}) == {"kind": kind, "base": cheap}
        assert entry(kind, "Qwen/Qwen2.5-0.5B", {})["base"] == "Qwen/Qwen2.5-0.5B"
        (tmp_path / "router.json").write_text("{}")
        assert entry(kind, str(tmp_path), {}) == {"kind": kind, "path": str(tmp_path)}
    for kind in ("trained_deberta", "llm", "dpo"):
        assert entry(kind, cheap, {}) == {"kind": kind, "path": cheap}
    assert entry("probe", "data/runs/nothing", {})["path"] == "data/runs/nothing"
    with pytest.raises(UserError, match="router_type 'entropy' says it already"):
        entry("entropy", None, {"score": "margin"})
    with pytest.raises(UserError, match="--router_model_path"):
        entry("probe", None, {"path": "x"})


def test_a_score_of_the_cheap_model_is_evaluated(run, cheap, tmp_path, monkeypatch):
    monkeypatch.setenv("ROUTEWRIGHT_CACHE", str(tmp_path / "states"))
    write_outcomes(tmp_path / "cache" / "outcomes.jsonl.gz", make_outcomes(n=120))
    (tmp_path / "cache" / "pool.yaml").write_text(
        "name: tiny\nprices_dated: 2026-11-20\nmodels:\n  - {name: cheap, price_input: 0.1, price_output: 0.4}\n"
        "  - {name: strong, price_input: 1.5, price_output: 6}\n")
    flags = {"cache": str(tmp_path / "cache"), "output_dir": str(tmp_path / "out"), "n_resamples": 20, "wandb": "off"}
    with pytest.raises(UserError, match="did you mean 'entropy'"):
        run.main(router_type="logit_score", router_model_path=cheap, router={"score": "entrpy"}, **flags)
    assert not Path(flags["output_dir"]).exists()
    run.main(router_type="max_logits", router_model_path=cheap, **flags)
    results = json.loads((tmp_path / "out" / "comparison.json").read_text())
    assert "max_logits" in results["routers"]
    assert "score: max_logit" in (tmp_path / "out" / "router.yaml").read_text()
