"""The one evaluation: what it refuses, what it writes, and that its numbers are the rulers' numbers."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from planted import make_outcomes, make_table, two_model_pool

from routewright import metrics
from routewright.decide import expected_cost
from routewright.errors import UserError
from routewright.evaluation import _warnings, evaluate, make_views, read_entries
from routewright.outcomes import OutcomeTable, write_outcomes
from routewright.prompts import seed_splits
from routewright.reward import Reward
from routewright.routers.base import make_router, prompt_hashes
from routewright.scoring import (
    Board,
    Contestant,
    Estimates,
    Rules,
    View,
    best_single,
    compare,
    hull_quality,
    indifference_weight,
    line_quality,
    sweep_settings,
)
from routewright.textfiles import write_json

SAME_BYTES = ("samples.csv", "comparison.json", "leaderboard.md", "decisions.parquet", "results_linear.json",
              "results_length.json", "results_task-table.json")
QUICK = {"n_resamples": 100, "n_settings": 31, "plots": False, "wandb": "off"}


def write_cache(folder, outcomes, pool="tiny"):
    folder.mkdir(parents=True, exist_ok=True)
    write_outcomes(folder, outcomes)
    models = [{"name": "cheap", "price_input": 0.1, "price_output": 0.4},
              {"name": "strong", "price_input": 1.5, "price_output": 6.0}]
    (folder / "pool.yaml").write_text(yaml.safe_dump({"name": pool, "models": models}))
    return folder


def write_routers(path, *entries):
    path.write_text(yaml.safe_dump({"routers": list(entries)}))
    return str(path)


LINEAR = {"name": "linear", "kind": "linear", "l2": 0.003}


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return write_cache(tmp_path_factory.mktemp("cache"), make_outcomes(900, signal=0.85))


@pytest.fixture(scope="module")
def evaluated(cache, tmp_path_factory):
    """(results, folder) of one run."""
    folder = tmp_path_factory.mktemp("evaluated")
    routers = write_routers(folder / "routers.yaml", LINEAR)
    return evaluate(cache=str(cache), routers=routers, output_dir=str(folder / "out"), **QUICK), folder / "out"


# ---------------------------------------------------------------- the whole

def test_a_planted_signal_is_found_and_controls_do_not_find_it(evaluated):
    results, _ = evaluated
    assert results["routers"]["linear"]["verdict"] == "beats"
    assert results["routers"]["linear"]["aiq_versus_mix"]["verdict"] == "beats"
    for control in ("length", "task table"):
        assert results["routers"][control]["control"]
        assert results["routers"][control]["verdict"] != "beats"
        assert results["routers"]["linear"]["points"]["balanced"]["controls"][control]["verdict"] == "beats"
    for control in ("shuffled", "fixed split", "kNN control"):
        assert control in results["routers"]["linear"]["points"]["balanced"]["controls"]
    assert results["best_single"] == "strong"


def test_every_promised_file_is_there_and_holds_no_nan(evaluated):
    results, folder = evaluated
    for name in (*SAME_BYTES, "timing.json", "provenance.json", "report.html"):
        assert (folder / name).stat().st_size > 0, name
    for path in folder.glob("*.json"):
        json.loads(path.read_text(), parse_constant=lambda c: pytest.fail(f"a file holds {c}"))
    assert json.loads((folder / "comparison.json").read_text()) == results
    assert (folder / "samples.csv").read_text().count("\n") == results["views"][0]["test"] + 1


def test_the_ledger_adds_up_to_the_reported_cost(evaluated):
    import pyarrow.parquet as parquet

    results, folder = evaluated
    ledger = parquet.read_table(folder / "decisions.parquet").to_pandas()
    for name, router in results["routers"].items():
        for point in ("balanced", "parity"):
            mine = ledger[(ledger.router == name) & (ledger.point == point)]
            assert len(mine) == results["views"][0]["test"]
            assert (mine.cost_usd + mine.overhead_usd).mean() * 1000 == pytest.approx(
                router["points"][point]["cost_per_1k"]["value"], rel=1e-12)
            assert mine.quality.mean() == pytest.approx(router["points"][point]["quality"]["value"], rel=1e-12)


def test_two_runs_give_the_same_bytes(cache, evaluated, tmp_path):
    _, first = evaluated
    evaluate(cache=str(cache), routers=write_routers(tmp_path / "r.yaml", LINEAR), output_dir=str(tmp_path / "out"),
             **QUICK)
    for name in SAME_BYTES:
        assert (first / name).read_bytes() == (tmp_path / "out" / name).read_bytes(), name


def test_another_pool_changes_costs_and_calls_no_model(cache, evaluated, tmp_path):
    results, _ = evaluated
    raw = yaml.safe_load((cache / "pool.yaml").read_text())
    for model in raw["models"]:
        model["price_input"], model["price_output"] = 3 * model["price_input"], 3 * model["price_output"]
    (tmp_path / "dear.yaml").write_text(yaml.safe_dump(raw))
    dear = evaluate(cache=str(cache), routers=write_routers(tmp_path / "r.yaml", LINEAR),
                    pool=str(tmp_path / "dear.yaml"),
                    output_dir=str(tmp_path / "out"), **QUICK)
    for name, model in dear["models"].items():
        assert model["cost_per_1k"]["value"] == pytest.approx(3 * results["models"][name]["cost_per_1k"]["value"])
        assert model["quality"] == results["models"][name]["quality"]
    # All prices times three is the same trade: the decisions and their quality stay.
    assert dear["routers"]["linear"]["points"]["balanced"]["quality"]["value"] == pytest.approx(
        results["routers"]["linear"]["points"]["balanced"]["quality"]["value"], abs=0.01)


def test_several_seeds_divide_anew_and_are_averaged(cache, tmp_path):
    results = evaluate(cache=str(cache), routers=write_routers(tmp_path / "r.yaml", LINEAR), seeds=[3, 5],
                       output_dir=str(tmp_path / "out"), **QUICK)
    assert [v["name"] for v in results["views"]] == ["seed 3", "seed 5"]
    point = results["routers"]["linear"]["points"]["balanced"]
    assert point["quality"]["seed_sd"] is not None and len(point["cost_weight"]) == 2
    assert point["quality"]["lo"] < point["quality"]["value"] < point["quality"]["hi"]
    assert point["versus_mix"]["verdict"] == "beats"


# ---------------------------------------------------------------- trained routers

@pytest.fixture(scope="module")
def trained(cache, tmp_path_factory):
    """A router folder trained on the train split, and one that has seen the test prompts."""
    table = OutcomeTable.load(cache)
    folder = tmp_path_factory.mktemp("trained")
    honest = make_router("linear", name="honest", l2=0.003).fit(table.split("train"), table.split("dev"), 0)
    peeked = make_router("linear", name="peeked", l2=0.003).fit(table, None, 0)
    honest.save(folder / "honest")
    peeked.save(folder / "peeked")
    return folder


def test_a_router_that_saw_the_test_prompts_is_refused_or_reported(cache, trained, tmp_path):
    routers = write_routers(tmp_path / "r.yaml", {"name": "peeked", "path": str(trained / "peeked")})
    with pytest.raises(UserError, match="was trained on .* test prompts.*--allow_overlap"):
        evaluate(cache=str(cache), routers=routers, output_dir=str(tmp_path / "out"), **QUICK)
    assert not (tmp_path / "out").exists()
    results = evaluate(cache=str(cache), routers=routers, output_dir=str(tmp_path / "out"), allow_overlap=True, **QUICK)
    assert results["overlaps"][0]["prompts"] == results["views"][0]["test"]
    for name in ("leaderboard.md", "report.html"):
        assert "its scores are inflated" in (tmp_path / "out" / name).read_text()


def test_a_router_that_was_calibrated_or_stopped_on_test_prompts_is_refused(cache, tmp_path):
    """Its train split is clean; what it calls dev is what is scored here."""
    table = OutcomeTable.load(cache)
    make_router("linear", name="tuned").fit(table.split("train"), table.split("test"), 0).save(tmp_path / "tuned")
    with pytest.raises(UserError, match=r"was calibrated or stopped \(its dev split\) on .* of the .* test prompts"):
        evaluate(cache=str(cache), router_type="linear", router_model_path=str(tmp_path / "tuned"),
                 output_dir=str(tmp_path / "out"), **QUICK)


@pytest.mark.parametrize(("kind", "option"), [("llm", "model"), ("probe", "base"), ("semantic_entropy", "base")])
def test_a_router_fitted_over_a_network_that_saw_the_test_prompts_is_refused(cache, tmp_path, kind, option):
    """Its own fit would be clean; what it reads with is not. Nothing is loaded for that."""
    table = OutcomeTable.load(cache)
    write_json(tmp_path / "sft" / "router.json", {"kind": "llm", "models": list(table.models),
                                                  **prompt_hashes(table.prompts)})
    routers = write_routers(tmp_path / "r.yaml", {"kind": kind, option: str(tmp_path / "sft")})
    for seeds in (1, 2):
        with pytest.raises(UserError, match=rf"router '{kind}' was trained on .* test prompts.*--allow_overlap"):
            evaluate(cache=str(cache), routers=routers, output_dir=str(tmp_path / "out"), seeds=seeds, **QUICK)


def test_run_and_evaluate_are_one_evaluation(root, cache, trained, tmp_path):
    out = tmp_path / "run"
    done = subprocess.run([sys.executable, str(root / "src" / "run.py"), "--cache", str(cache), "--router_type",
                           "linear",
                           "--router_model_path", str(trained / "honest"), "--output_dir", str(out), "--wandb", "off",
                           "--n_resamples", "50"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (out / "config.resolved.yaml").exists()
    same = evaluate(cache=str(cache), router_type="linear", router_model_path=str(trained / "honest"),
                    output_dir=str(tmp_path / "evaluate"), n_resamples=50, plots=False, wandb="off")
    assert json.loads((out / "comparison.json").read_text()) == same
    assert same["routers"]["honest"]["facts"]["source"].endswith("honest")


def test_a_folder_of_another_kind_is_refused(cache, trained, tmp_path):
    with pytest.raises(UserError, match="holds a router of kind 'linear', not 'knn'"):
        evaluate(cache=str(cache), router_type="knn", router_model_path=str(trained / "honest"),
                 output_dir=str(tmp_path / "out"), **QUICK)


def test_folders_keep_the_recorded_splits_while_others_are_fitted_per_seed(cache, trained, tmp_path):
    routers = write_routers(tmp_path / "r.yaml", LINEAR, {"name": "folder", "path": str(trained / "honest")})
    results = evaluate(cache=str(cache), routers=routers, output_dir=str(tmp_path / "out"), seeds=2, **QUICK)
    assert results["routers"]["folder"]["views"] == ["recorded"]
    assert results["routers"]["linear"]["views"] == results["routers"]["length"]["views"] == ["seed 0", "seed 1"]
    assert "task table" in results["routers"]["folder"]["points"]["balanced"]["controls"]


# ---------------------------------------------------------------- a router folder per seed

@pytest.fixture(scope="module")
def seeded(cache, tmp_path_factory):
    """Folders mine-0 and mine-1, each trained on its seed's train split."""
    table = OutcomeTable.load(cache)
    folder = tmp_path_factory.mktemp("seeded")
    for seed in (0, 1):
        own = table.with_splits(seed_splits(table.prompts, seed))
        make_router("linear", name="mine", l2=0.003).fit(own.split("train"), own.split("dev"), seed).save(
            folder / f"mine-{seed}")
    return folder


def test_a_folder_per_seed_is_scored_on_its_own_division(cache, seeded, tmp_path):
    path = str(seeded / "mine-{seed}")
    routers = write_routers(tmp_path / "r.yaml", {"name": "folders", "path": path}, {**LINEAR, "name": "same"})
    results = evaluate(cache=str(cache), routers=routers, output_dir=str(tmp_path / "out"), seeds=[0, 1], **QUICK)
    assert results["routers"]["folders"]["views"] == ["seed 0", "seed 1"] and not results["overlaps"]
    assert results["routers"]["folders"]["facts"]["source"] == path
    # Fitting on the same division gives the same router, so each folder met the division it was trained for.
    for point in ("balanced", "parity"):
        mine, same = (results["routers"][n]["points"][point] for n in ("folders", "same"))
        assert mine["quality"] == same["quality"] and mine["cost_per_1k"] == same["cost_per_1k"]


def test_one_seed_with_a_folder_per_seed_divides_anew(cache, seeded, tmp_path):
    results = evaluate(cache=str(cache), router_type="linear", router_model_path=str(seeded / "mine-{seed}"),
                       output_dir=str(tmp_path / "out"), seeds=1, **QUICK)
    assert [v["name"] for v in results["views"]] == ["seed 0"]
    assert results["routers"]["length"]["views"] == results["routers"]["mine"]["views"] == ["seed 0"]


def test_a_folder_per_seed_beside_one_of_the_recorded_splits(cache, seeded, trained, tmp_path):
    routers = write_routers(tmp_path / "r.yaml", {"name": "folders", "path": str(seeded / "mine-{seed}")},
                            {"name": "one", "path": str(trained / "honest")})
    results = evaluate(cache=str(cache), routers=routers, output_dir=str(tmp_path / "out"), seeds=2, **QUICK)
    assert results["routers"]["one"]["views"] == ["recorded"]
    assert results["routers"]["folders"]["views"] == ["seed 0", "seed 1"]
    assert not results["overlaps"]


def test_a_missing_folder_of_one_seed_is_refused(cache, seeded, tmp_path):
    routers = write_routers(tmp_path / "r.yaml", {"name": "folders", "path": str(seeded / "mine-{seed}")})
    with pytest.raises(UserError, match=r"r\.yaml: routers\[0\]: path: .*mine-2: no such router folder.*'mine-"):
        evaluate(cache=str(cache), routers=routers, output_dir=str(tmp_path / "out"), seeds=3, **QUICK)
    assert not (tmp_path / "out").exists()


def test_folders_of_other_seeds_are_refused_or_reported(cache, seeded, tmp_path):
    (tmp_path / "mine-0").symlink_to(seeded / "mine-1")
    (tmp_path / "mine-1").symlink_to(seeded / "mine-1")
    routers = write_routers(tmp_path / "r.yaml", {"name": "swapped", "path": str(tmp_path / "mine-{seed}")})
    with pytest.raises(UserError, match=r"routers\[0\]: router 'swapped' was trained on .* test prompts of seed 0"):
        evaluate(cache=str(cache), routers=routers, output_dir=str(tmp_path / "out"), seeds=2, **QUICK)
    results = evaluate(cache=str(cache), routers=routers, output_dir=str(tmp_path / "out"), seeds=2, allow_overlap=True,
                       **QUICK)
    assert len(results["overlaps"]) == 1 and "seed 0" in results["overlaps"][0]["note"]


# ---------------------------------------------------------------- refusals

@pytest.mark.parametrize(("text", "said"), [
    ("router: []", "unknown key 'router'.*did you mean 'routers'"),
    ("routers: []", "`routers` must be a list with at least one entry"),
    ("routers: [3]", r"routers\[0\]: expected a mapping"),
    ("routers: [{name: a}]", r"routers\[0\]: needs `kind`"),
    ("routers: [{name: a, kind: lnear}]", r"routers\[0\]: unknown router kind 'lnear' \(did you mean 'linear'"),
    ("routers: [{kind: knn, encodr: tfidf}]", r"routers\[0\].*'encodr' \(did you mean 'encoder'"),
    ("routers: [{kind: [knn]}]", r"routers\[0\]: unknown router kind \['knn'\]"),
    ("routers: [{kind: knn, k: many}]", r"routers\[0\].*many"),
    ("routers: [{path: nowhere/router}]", r"routers\[0\]: path: nowhere/router: no such router folder"),
    ("routers: [{kind: knn}, {kind: linear, name: knn}]", r"routers\[1\]: the name 'knn' stands twice"),
    ("routers: [{kind: always}]", "only controls are named"),
    ("routers: [{kind: knn, router_type: knn}]", "keep one"),
    ("routers: [{kind: knn, name: a/b}]", "the name 'a/b' must be"),
    ("routers: [{kind: knn, name: oracle}]", r"routers\[0\]: the name 'oracle' is that of a row of every report"),
])
def test_a_mistake_in_the_file_names_file_and_entry(cache, tmp_path, text, said):
    (tmp_path / "r.yaml").write_text(text)
    with pytest.raises(UserError, match=said) as caught:
        evaluate(cache=str(cache), routers=str(tmp_path / "r.yaml"), output_dir=str(tmp_path / "out"), **QUICK)
    assert "r.yaml" in str(caught.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("options", "said"), [
    ({"n_resamples": 1}, "--n_resamples must be at least 20"), ({"n_settings": 1}, "--n_settings"),
    ({"level": 1.0}, "--level"), ({"cost_weight": -1.0}, "--cost_weight"),
    ({"reward": "linnear"}, "did you mean 'linear'"),
    ({"reward": "a2c"}, "counts retries"), ({"seeds": 0}, "--seeds"), ({"seeds": [1, 1]}, "--seeds"),
    ({"test_split": "tset"}, "no prompts in split 'tset'"), ({"dev_split": "test"}, "also a train or dev split"),
    ({"routers": None}, "no router is named"), ({"models": ["cheap"]}, "nothing to route"),
    ({"models": ["chaep"]}, "did you mean 'cheap'"), ({"wandb": "maybe"}, "wandb mode"),
    ({"seeds": 2, "dev_split": "train", "test_split": "dev"}, "divide the prompts anew"),
    ({"router_type": "linear"}, "--router_type, --router_model_path: the name 'linear' stands twice"),
    ({"router_model_path": "nowhere"}, "--router_model_path: path: nowhere: no such router folder"),
    ({"routers": "configs/nowhere.yaml"}, "configs/nowhere.yaml: no such file"),
    ({"cache": "data/nowhere"}, "data/nowhere"), ({"pool": "configs/pools/nowhere.yaml"}, "nowhere.yaml: no such file"),
])
def test_a_wrong_option_is_refused(cache, tmp_path, options, said):
    routers = write_routers(tmp_path / "r.yaml", LINEAR)
    with pytest.raises(UserError, match=said):
        evaluate(**{"cache": str(cache), "routers": routers, "output_dir": str(tmp_path / "out"), **QUICK, **options})


def test_a_missing_answer_is_refused_and_never_counted_as_wrong(tmp_path):
    outcomes = make_outcomes(60)
    cache = write_cache(tmp_path / "cache", outcomes[:-1])
    with pytest.raises(UserError, match="has no recorded answer to prompt"):
        evaluate(cache=str(cache), router_type="linear", output_dir=str(tmp_path / "out"), **QUICK)


def test_prompts_in_two_splits_are_refused(tmp_path):
    outcomes = make_outcomes(200)
    train = next(o for o in outcomes if o.split == "train")
    doubled = [replace_outcome(o, prompt=train.prompt)
               if o.prompt_id == next(p.prompt_id for p in outcomes if p.split == "test")
               else o for o in outcomes]
    cache = write_cache(tmp_path / "cache", doubled)
    with pytest.raises(UserError, match="stand in the train and dev splits too"):
        evaluate(cache=str(cache), router_type="linear", output_dir=str(tmp_path / "out"), **QUICK)


def test_a_tiny_cache_over_many_seeds_is_scored(tmp_path):
    # Some resamples hold no prompt of a small test split: its means are undefined there and left out.
    cache = write_cache(tmp_path / "cache", make_outcomes(24))
    results = evaluate(cache=str(cache), router_type="linear", output_dir=str(tmp_path / "out"), seeds=6, **QUICK)
    assert results["routers"]["linear"]["points"]["balanced"]["quality"]["lo"] is not None
    assert any("test prompts: intervals are wide" in w for w in results["warnings"])


def replace_outcome(outcome, **changes):
    row = {**{name: getattr(outcome, name) for name in outcome.__slots__}, **changes}
    return type(outcome)(**row)


def test_a_cache_without_splits_is_divided_and_says_so(tmp_path):
    cache = write_cache(tmp_path / "cache", [replace_outcome(o, split="") for o in make_outcomes(300)])
    results = evaluate(cache=str(cache), router_type="linear", output_dir=str(tmp_path / "out"), **QUICK)
    assert any("divided 60/20/20" in w for w in results["warnings"])


def test_shipped_router_files_are_well_formed(root, tmp_path):
    files = sorted((root / "configs" / "routers").glob("*.yaml"))
    assert files
    for file in files:
        raw = yaml.safe_load(file.read_text())
        raw["routers"] = [e for e in raw["routers"] if "path" not in e]  # folders that the reader has yet to train
        (tmp_path / file.name).write_text(yaml.safe_dump(raw))
        assert read_entries(tmp_path / file.name)


def test_the_short_form_of_a_config_is_read(tmp_path):
    (tmp_path / "one.yaml").write_text("router_type: linear\nname: mine\n")
    assert [(e.name, e.options["kind"]) for e in read_entries(tmp_path / "one.yaml")] == [("mine", "linear")]


@pytest.mark.slow
def test_wandb_holds_scalars_table_image_and_artifact(cache, tmp_path):
    evaluate(cache=str(cache), router_type="linear", output_dir=str(tmp_path / "out"),
             **{**QUICK, "plots": True, "wandb": "offline"})
    run = next((tmp_path / "out" / "wandb").glob("offline-run-*"))
    done = subprocess.run([str(Path(sys.executable).with_name("wandb")), "leet", "inspect", "--summary", "--json",
                           str(run)],
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    seen = json.loads(done.stdout)["summary"]
    results = json.loads((tmp_path / "out" / "comparison.json").read_text())
    assert seen["linear/quality"] == results["routers"]["linear"]["points"]["balanced"]["quality"]["value"]
    assert seen["linear/verdict"] == "beats" and seen["headline"] == results["headline"]["text"]
    assert "frontier/linear/cost_per_1k" in seen and seen["leaderboard"]["ncols"] > 10
    assert seen["frontier"]["_type"] == "image-file"
    assert b"evaluation-" in next(run.glob("*.wandb")).read_bytes()


# ---------------------------------------------------------------- the parts, against the plain way

def test_hull_and_line_agree_with_the_rulers_row_by_row():
    random = np.random.default_rng(0)
    for m in (1, 2, 3, 7):
        cost, quality = random.random((6, m)), random.random((6, m))
        at = np.sort(random.random((6, 9)), axis=1)
        for row in range(6):
            expected = metrics.mix_quality(at[row], cost[row], quality[row])
            cheapest = quality[row, cost[row].argmin()]
            np.testing.assert_allclose(hull_quality(cost, quality, at)[row],
                                       np.where(np.isnan(expected), cheapest, expected))
            order = np.argsort(cost[row])
            np.testing.assert_allclose(line_quality(cost, quality, at)[row],
                                       np.interp(at[row], cost[row][order], quality[row][order]))


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(st.sampled_from([0.0, 0.25, 0.5, 1.0]), st.sampled_from([0.0, 0.5, 1.0])), min_size=1,
                max_size=6))
def test_hull_with_tied_points(points):
    cost, quality = np.array(points).T
    at = np.array([0.0, 0.1, 0.25, 0.7, 1.0, 2.0])
    expected = metrics.mix_quality(at, cost, quality)
    found = hull_quality(cost[None], quality[None], at[None])[0]
    reachable = ~np.isnan(expected)
    np.testing.assert_allclose(found[reachable], expected[reachable], atol=1e-12)


def test_board_means_are_those_of_the_resamples():
    views = [View("a", 0, np.array([0]), np.array([1]), np.array([2, 4, 6, 8])),
             View("b", 1, np.array([0]), np.array([1]), np.array([3, 4, 5, 8]))]
    board = Board(views, Rules(Reward(), n_resamples=30), range(9))
    values = np.array([1.0, 0.0, 0.5, 0.25])
    mask = board.mask(1, np.array([True, False, True, True]))
    handles = [board.add(0, values), board.add(1, values, mask)]
    board.solve()
    counts = np.concatenate([c for _, _, c in board.resampler.counts()], axis=1).astype(float)
    rows = {row: i for i, row in enumerate((2, 3, 4, 5, 6, 8))}
    weights = [counts[:, [rows[r] for r in view.test]] for view in views]
    with np.errstate(invalid="ignore"):
        np.testing.assert_allclose(board[handles[0]][1:], weights[0] @ values / weights[0].sum(axis=1))
        kept = weights[1] * np.array([1, 0, 1, 1])
        np.testing.assert_allclose(board[handles[1]][1:], kept @ values / kept.sum(axis=1))
    assert board[handles[0]][0] == values.mean()


def test_near_duplicates_are_drawn_together():
    view = View("a", 0, np.array([0]), np.array([1]), np.arange(2, 8))
    one = Board([view], Rules(Reward(), n_resamples=40), ["", "", "a", "b", "a", "c", "b", "c"])
    values = np.array([1.0, 0.5, 0.0, 0.25, 0.75, 1.0])
    handle = one.add(0, values)
    one.solve()
    assert one.resampler.n == 3
    counts = np.concatenate([c for _, _, c in one.resampler.counts()], axis=1).astype(float)
    groups = counts @ np.array([1.0 + 0.0, 0.5 + 0.75, 0.25 + 1.0]) / 6  # three groups of two: the size is always six
    np.testing.assert_allclose(one[handle][1:], groups)
    assert one[handle][0] == values.mean()


def fixed_contestant(view, dev, test, name="fixed"):
    """A contestant with the given decisions and no settings."""
    half = np.full((len(dev), 2), 0.5), np.full((len(test), 2), 0.5)
    return Contestant(name, "test", False, {0: Estimates(np.arange(2), *half, np.zeros(len(dev)), np.zeros(len(test)),
                                                         dev, test)})


def hand_table(small, quality, cost):
    """The first rows of a table with other outcomes; every row is train and dev and test."""
    table, _ = small
    n = len(quality)
    part = table.rows(np.arange(n))
    prompts = [replace(p, task="t", group="") for p in part.prompts]
    rows = np.arange(n)
    return replace(part, prompts=prompts, quality=np.array(quality, float), cost=np.array(cost, float),
                   quality_mean=np.array(quality, float)), View("hand", 0, rows, rows, rows)


def test_a_case_worked_by_hand(small):
    # Cheap (1 USD) is right on two of four prompts, strong (3 USD) on three; on the third prompt none is.
    table, view = hand_table(small, [[1, 1], [1, 1], [0, 0], [0, 1]], [[1, 3]] * 4)
    perfect = np.array([0, 0, 0, 1])  # quality .75 for 1.5 USD
    rules = Rules(Reward("linear", cost_weight=0.1), n_resamples=20)
    found = compare(table, [view], [fixed_contestant(view, perfect, perfect)], rules).results
    router, point = found["routers"]["fixed"], found["routers"]["fixed"]["points"]["balanced"]
    assert point["quality"]["value"] == 0.75 and point["cost_per_1k"]["value"] == 1500.0
    assert point["reward"]["value"] == pytest.approx(0.6) and point["regret"]["value"] == pytest.approx(0.0)
    # The mix that costs 1.5 has a quarter strong calls: quality .5 + .25 * .25 = .5625.
    assert point["versus_mix"]["value"] == pytest.approx(0.1875) and point["mix_quality"] == pytest.approx(0.5625)
    assert point["cost_ratio"]["value"] == pytest.approx(0.5)
    assert point["controls"]["shuffled"]["quality"] == pytest.approx(0.5625)
    assert point["controls"]["fixed split"]["quality"] == pytest.approx(0.5625)
    # Curves over 1..3 USD. Mix: from .5 to .75, mean .625. Router: up to .75 at 1.5 and flat, mean .71875.
    assert found["mix"]["aiq"]["value"] == pytest.approx(0.625)
    assert router["aiq"]["value"] == pytest.approx(0.71875, abs=2e-4)  # the grid cuts the corner at 1.5 a little
    assert found["oracle"]["quality"]["value"] == 0.75 and found["oracle"]["cost_per_1k"]["value"] == 1500.0
    wrong = np.array([1, 1, 1, 0])  # quality .5 for 2.5 USD: reward .25 against .6
    lost = compare(table, [view], [fixed_contestant(view, wrong, wrong)], rules).results["routers"]["fixed"]
    assert lost["points"]["balanced"]["regret"]["value"] == pytest.approx(0.35)


def test_a_handful_of_lucky_prompts_is_no_gain(small):
    # Four of 200 prompts go to the cheap model, which is right on eight in ten anyway, and happens to be on these.
    random = np.random.default_rng(0)
    quality = np.stack([random.random(200) < 0.8, random.random(200) < 0.9], axis=1).astype(float)
    lucky = np.flatnonzero(quality.all(axis=1))[:4]
    table, view = hand_table(small, quality, [[1.0, 15.0]] * 200)
    picks = np.ones(200, int)
    picks[lucky] = 0
    said = compare(table, [view], [fixed_contestant(view, picks, picks)], Rules(Reward(), n_resamples=200)).results
    router = said["routers"]["fixed"]
    for judged in (router["points"]["balanced"]["versus_mix"], router["aiq_versus_mix"],
                   router["points"]["balanced"]["controls"]["shuffled"]):
        assert judged["value"] > 0 and judged["verdict"] == "ties"


@pytest.mark.parametrize("moved", [4, 100])
def test_a_router_that_reads_nothing_seldom_beats_the_mix(small, moved):
    beats = 0
    for seed in range(150):
        random = np.random.default_rng([seed, moved])
        quality = np.stack([random.random(200) < 0.7, random.random(200) < 0.9], axis=1).astype(float)
        table, view = hand_table(small, quality, [[1.0, 15.0]] * 200)
        picks = np.ones(200, int)
        picks[random.choice(200, moved, replace=False)] = 0
        rules = Rules(Reward(), n_resamples=200, seed=seed)
        found = compare(table, [view], [fixed_contestant(view, picks, picks)], rules).results["routers"]["fixed"]
        beats += found["verdict"] == "beats"
    assert beats <= 9  # 2.5 % of 150 are 3.75; more than 9 come up in less than 1 % of such tests


def planted_contestant(table, view, noise=0.1, name="planted"):
    """A contestant whose estimates are the truth with noise."""
    random = np.random.default_rng(1)
    estimate = np.clip(table.quality_mean + random.normal(0, noise, table.quality.shape), 0, 1)
    zeros = np.zeros(len(view.dev)), np.zeros(len(view.test))
    return Contestant(name, "test", False, {0: Estimates(np.arange(table.m), estimate[view.dev], estimate[view.test],
                                                         *zeros)})


@pytest.fixture(scope="module")
def small():
    table = make_table(300)
    splits = np.array([p.split for p in table.prompts])
    return table, View("recorded", 0, *(np.flatnonzero(splits == s) for s in ("train", "dev", "test")))


def test_the_matched_difference_is_the_plain_bootstrap(small):
    table, view = small
    rules = Rules(Reward("linear", cost_weight=2000.0), n_settings=21, n_resamples=60)
    contestant = planted_contestant(table, view, noise=0.5)
    found = compare(table, [view], [contestant], rules)
    run, test = found.swept["planted", 0], table.rows(view.test)
    rows, picks = np.arange(test.n), run.decisions[run.chosen["balanced"]]
    board = Board([view], rules, range(table.n))
    counts = np.concatenate([c for _, _, c in board.resampler.counts()], axis=1).astype(float)
    samples = []
    for weights in [np.ones(test.n), *counts]:
        weights = weights / weights.sum()
        mine = weights @ test.quality[rows, picks], weights @ test.cost[rows, picks]
        samples.append(mine[0] - metrics.mix_quality(mine[1], weights @ test.cost, weights @ test.quality))
    said = found.results["routers"]["planted"]["points"]["balanced"]["versus_mix"]
    assert said["value"] == pytest.approx(samples[0], abs=1e-12)
    lo, hi = np.quantile(samples[1:], [0.025, 0.975])
    reach = 1.959963984540054 * metrics.chance_sd(test.quality, np.eye(2)[picks])
    np.testing.assert_allclose([said["lo"], said["hi"]], [min(lo, samples[0] - reach), max(hi, samples[0] + reach)],
                               atol=1e-9)


def test_areas_are_those_of_the_ruler(small):
    table, view = small
    found = compare(table, [view], [planted_contestant(table, view)], Rules(Reward(), n_settings=21, n_resamples=20))
    test = table.rows(view.test)
    means = test.cost.mean(axis=0), test.quality.mean(axis=0)
    assert found.results["mix"]["aiq"]["value"] == pytest.approx(metrics.aiq(*means, metrics.pool_range(test.cost)),
                                                                 abs=1e-12)


def test_settings_are_chosen_on_dev(small):
    table, view = small
    train, dev, test = (table.rows(r) for r in (view.train, view.dev, view.test))
    rules = Rules(Reward("linear", cost_weight=3000.0), n_settings=51)
    est = planted_contestant(table, view).estimates[0]
    run = sweep_settings(train, dev, test, est, rules, (expected_cost(train, dev), expected_cost(train, test)))
    needed = dev.quality[:, best_single(dev)].mean()
    good = np.flatnonzero(run.dev_quality >= needed - 1e-12)
    assert run.reached and run.chosen["parity"] in good
    assert run.dev_cost[run.chosen["parity"]] == run.dev_cost[good].min()
    assert run.dev_reward[run.chosen["balanced"]] == run.dev_reward.max()
    # Test outcomes must not reach the choice: with other ones it stays.
    other = replace(test, quality=1 - test.quality)
    again = sweep_settings(train, dev, other, est, rules)
    assert again.chosen == run.chosen and (again.frontier == run.frontier).all()


def test_decisions_know_nothing_that_only_the_answer_tells(small):
    table, view = small
    train, dev, test = (table.rows(r) for r in (view.train, view.dev, view.test))
    est, rules = planted_contestant(table, view).estimates[0], Rules(Reward("linear", cost_weight=3000.0))
    random = np.random.default_rng(0)
    other = replace(test, output_tokens=random.integers(1, 9999, test.output_tokens.shape),
                    cost=random.random(test.cost.shape), latency=random.random(test.cost.shape),
                    quality=1 - test.quality, quality_mean=1 - test.quality_mean)
    runs = [sweep_settings(train, dev, part, est, rules) for part in (test, other)]
    assert (runs[0].decisions == runs[1].decisions).all() and runs[0].chosen == runs[1].chosen
    assert (expected_cost(train, test) == expected_cost(train, other)).all()


def test_at_the_indifference_weight_both_ends_earn_the_same(small):
    table, _ = small
    weight = indifference_weight(table)
    earned = table.quality.mean(axis=0) - weight * table.cost.mean(axis=0)
    assert earned[0] == pytest.approx(earned[1], abs=0.01)


def test_a_constant_in_disguise_is_called_one(small):
    table, view = small
    contestant = planted_contestant(table, view, name="constant")
    for part in ("dev", "test"):
        setattr(contestant.estimates[0], part, np.full((len(getattr(view, part)), 2), 0.5))
    found = compare(table, [view], [contestant], Rules(Reward(), n_resamples=20)).results
    router = found["routers"]["constant"]
    assert router["points"]["balanced"]["largest_share"] == 1.0 and router["points"]["balanced"]["entropy_bits"] == 0.0
    assert router["verdict"] == "ties"
    assert any("constant in disguise" in w for w in _warnings(found, table))


def test_overhead_is_part_of_every_cost(small):
    table, view = small
    free, paid = planted_contestant(table, view, name="free"), planted_contestant(table, view, name="paid")
    for part in ("dev", "test"):
        setattr(paid.estimates[0], f"{part}_overhead", np.full(len(getattr(view, part)), 1e-5))
    found = compare(table, [view], [free, paid], Rules(Reward("linear", cost_weight=2000.0), n_resamples=20)).results
    cost = {n: r["points"]["balanced"]["cost_per_1k"]["value"] for n, r in found["routers"].items()}
    assert cost["paid"] == pytest.approx(cost["free"] + 0.01)
    assert found["routers"]["paid"]["points"]["balanced"]["overhead_per_1k"] == pytest.approx(0.01)
    assert found["routers"]["paid"]["aiq"]["value"] < found["routers"]["free"]["aiq"]["value"]


def test_the_report_says_where_the_cost_weight_comes_from(cache, tmp_path):
    said = {}
    for source, options in (("indifference", {}), ("given", {"cost_weight": 50.0}), ("preset", {"reward": "capped"})):
        results = evaluate(cache=str(cache), router_type="length", output_dir=str(tmp_path / "out"), **QUICK, **options)
        said[source] = (tmp_path / "out" / "leaderboard.md").read_text()
        assert results["reward"]["cost_weight_source"] == source
    assert [source for source, text in said.items() if "earn the same on the train and dev" in text] == ["indifference"]


def test_unrecorded_latency_is_none_and_not_a_number(small):
    table, view = small
    silent = replace(table, latency=np.full_like(table.latency, np.nan))
    found = compare(silent, [view], [planted_contestant(table, view)], Rules(Reward(), n_resamples=20)).results
    assert found["routers"]["planted"]["points"]["balanced"]["latency_s"] is None
    assert any("latency was not recorded" in w for w in _warnings(found, silent))


def test_a_free_pool_and_equal_prices_give_a_report_without_ratios(cache, tmp_path):
    raw = yaml.safe_load((cache / "pool.yaml").read_text())
    for price in (0.0, 1.0):
        for model in raw["models"]:
            model["price_input"] = model["price_output"] = price
        (tmp_path / "pool.yaml").write_text(yaml.safe_dump(raw))
        results = evaluate(cache=str(cache), routers=write_routers(tmp_path / "r.yaml", LINEAR), **QUICK,
                           pool=str(tmp_path / "pool.yaml"), output_dir=str(tmp_path / "out"))
        page = (tmp_path / "out" / "report.html").read_text()
        assert "nan" not in (tmp_path / "out" / "leaderboard.md").read_text() and "n/a" in page or price
        assert (results["routers"]["linear"]["points"]["parity"]["cost_ratio"]["value"] is None) == (price == 0.0)


def test_one_seed_takes_the_recorded_splits(small):
    table, _ = small
    views, recorded = make_views(table, 1, ("train", "dev", "test"), [], [])
    assert recorded == 0 and [v.name for v in views] == ["recorded"]
    views, recorded = make_views(table, 3, ("train", "dev", "test"), [], [])
    assert recorded is None and len(views) == 3
    assert len({tuple(v.test) for v in views}) == 3


def test_three_models_have_no_two_model_scores(small):
    table, view = small
    wide = replace(table, models=(*table.models, "third"), quality=np.c_[table.quality, table.quality[:, 0]],
                   cost=np.c_[table.cost, 2 * table.cost[:, 0]], latency=np.c_[table.latency, table.latency[:, 0]],
                   input_tokens=np.c_[table.input_tokens, table.input_tokens[:, 0]],
                   output_tokens=np.c_[table.output_tokens, table.output_tokens[:, 0]],
                   quality_mean=np.c_[table.quality_mean, table.quality_mean[:, 0]],
                   pool=replace(two_model_pool(), models=(*two_model_pool().models,
                                                          replace(two_model_pool().models[0], name="third"))))
    found = compare(wide, [view], [planted_contestant(wide, view)], Rules(Reward(), n_resamples=20)).results
    assert found["routers"]["planted"]["two_model"] is None
    assert set(found["routers"]["planted"]["points"]["balanced"]["shares"]) == {"cheap", "strong", "third"}


def test_the_length_control_gives_routellms_golden_values(root, shared_data, tmp_path):
    source = shared_data("routellm") / "original" / "gsm8k"
    done = subprocess.run([sys.executable, str(root / "src" / "import_outcomes.py"), "--format", "routellm", "--source",
                           str(source), "--pool", str(root / "configs" / "pools" / "routellm.yaml"), "--output_dir",
                           str(tmp_path / "gsm8k")], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    results = evaluate(cache=str(tmp_path / "gsm8k"), router_type="linear", output_dir=str(tmp_path / "out"), **QUICK)
    golden = results["routers"]["length"]["two_model"]["all_prompts"]
    assert golden["compat_apgr"] == pytest.approx(0.5986554769191534, abs=1e-9)
    assert golden["compat_auc"] == pytest.approx(76.92523162606857, abs=1e-9)
    assert golden["compat_cpt50"] == pytest.approx(36.513280139906, abs=1e-9)
    assert any("estimated from characters" in w for w in results["warnings"])
