"""run.py: CoBench's router types and paths come out as entries of this project, and one of them is scored."""

from __future__ import annotations

import importlib.util
import json
import shutil
from pathlib import Path

import pytest
from planted import make_outcomes

from routewright.errors import UserError
from routewright.evaluation import ON_A_BASE, check_entry
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


def entry_of(kind, path=None, **options):
    """What the flags of evaluate.py, run.py and a routers file are taken for."""
    from routewright.evaluation import _entry

    given = {"router_type": kind, **({"router_model_path": path} if path else {}), **options}
    return _entry(given, "here").options


def test_cobench_names_and_paths(cheap, tmp_path):
    assert entry_of("knn", k=3) == {"kind": "knn", "k": 3}
    assert entry_of("logits_margin") == {"kind": "logit_score", "score": "margin", "name": "logits_margin"}
    assert entry_of("entropy", cheap) == {"kind": "logit_score", "score": "entropy", "name": "entropy", "base": cheap}
    for kind, option in ON_A_BASE.items():  # the folder of a language model is its base, a router folder is loaded
        assert entry_of(kind, cheap) == {"kind": kind, option: cheap}
        assert entry_of(kind, "Qwen/Qwen2.5-0.5B") == {"kind": kind, option: "Qwen/Qwen2.5-0.5B"}
        (tmp_path / "router.json").write_text("{}")
        assert entry_of(kind, str(tmp_path)) == {"kind": kind, "path": str(tmp_path)}
        with pytest.raises(UserError, match=f"is a language model, and so is {option} 'other'"):
            entry_of(kind, cheap, **{option: "other"})
    assert entry_of("trained_deberta", cheap) == {"kind": "trained_deberta", "path": cheap}
    with pytest.raises(UserError, match="no such router folder"):
        entry_of("probe", f"{tmp_path}/nothing")
    with pytest.raises(UserError, match="score: the kind 'entropy' says it already"):
        entry_of("entropy", score="margin")


def test_an_option_that_a_flag_gives_is_refused(run, tmp_path):
    with pytest.raises(UserError, match="--router.path: give it as"):
        run.main(router_type="probe", router={"path": "x"}, output_dir=str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_a_folder_that_is_neither_router_nor_model_is_refused_before_any_work(tmp_path):
    """The folder of a training run that was stopped."""
    (tmp_path / "run" / "checkpoint-3").mkdir(parents=True)
    for kind in ON_A_BASE:
        with pytest.raises(UserError, match="has no router.json, so it is no router"):
            check_entry({"kind": kind, "path": str(tmp_path / "run")}, "here")


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
    shutil.copytree(cheap, tmp_path / "base")
    (tmp_path / "base" / "config.resolved.yaml").touch()  # as training without a cache leaves it
    cheap = str(tmp_path / "base")
    run.main(router_type="max_logits", router_model_path=cheap, router={"wrap": "none"}, **flags)
    results = json.loads((tmp_path / "out" / "comparison.json").read_text())
    assert results["routers"]["max_logits"]["facts"]["options"] == {"base": cheap, "score": "max_logit", "wrap": "none"}
    assert "does not say what it was trained on" in results["overlaps"][0]["note"]
    from routewright.evaluation import read_entries

    again = read_entries(tmp_path / "out" / "router.yaml")[0]
    assert again.options["score"] == "max_logit" and again.options["base"] == cheap
