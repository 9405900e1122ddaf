"""The router contract, for every kind: it learns a planted signal, survives its folder, and refuses nonsense."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
from planted import make_table, minilm_folder, two_model_pool

from routewright.errors import MissingSetup, UserError
from routewright.metrics import auroc
from routewright.prompts import text_hash
from routewright.routers import ROUTER_KINDS, expand, from_entry, load_router, make_router, write_card
from routewright.routers.base import read_card, router_class
from routewright.schema import Prompt

LEARNT = {"knn": {}, "linear": {}, "mf": {"epochs": 40}}
SMALL = {"name": "tfidf", "dimensions": 32}


@pytest.fixture(scope="module")
def parts():
    table = make_table(n=500, seed=3)
    return table.split("train"), table.split("dev"), table.split("test")


def entry(kind: str) -> dict:
    options = {"kind": kind} | LEARNT.get(kind, {})
    return options | {"encoder": SMALL} if kind in LEARNT else options


def fitted(kind: str, parts, seed: int = 0, **options):
    return from_entry(entry(kind) | options).fit(parts[0], parts[1], seed)


@pytest.mark.parametrize("kind", LEARNT)
def test_polarity_high_estimates_are_good_answers(kind, parts):
    """On planted data the cheap model's quality depends on one word; a flipped sign would fall below one half."""
    estimate = fitted(kind, parts).estimate(parts[2].prompts)
    assert auroc(parts[2].quality[:, 0], estimate[:, 0]) > 0.75
    hard = np.array(["hard" in p.prompt for p in parts[2].prompts])
    assert estimate[~hard, 0].mean() > estimate[hard, 0].mean() + 0.3


@pytest.mark.parametrize("kind", LEARNT)
def test_beats_the_best_random_mix_at_its_own_cost(kind, parts):
    from routewright.metrics import mix_quality

    test = parts[2]
    estimate = fitted(kind, parts).estimate(test.prompts)
    decision = (estimate[:, 0] < estimate[:, 1] - 0.3).astype(int)
    rows = np.arange(test.n)
    quality, cost = test.quality[rows, decision].mean(), test.cost[rows, decision].mean()
    assert 0.2 < decision.mean() < 0.8
    assert quality > mix_quality(cost, test.cost.mean(axis=0), test.quality.mean(axis=0)) + 0.1


@pytest.mark.parametrize("kind", LEARNT)
def test_estimates_are_calibrated(kind, parts):
    estimate = fitted(kind, parts).estimate(parts[2].prompts)
    assert estimate.dtype == np.float64 and estimate.shape == (parts[2].n, 2)
    assert 0 <= estimate.min() and estimate.max() <= 1
    assert np.abs(estimate.mean(axis=0) - parts[2].quality.mean(axis=0)).max() < 0.12


@pytest.mark.parametrize("kind", [*LEARNT, "length", "group_table", "always", "random_mix", "fixed_split"])
def test_save_and_load_give_equal_estimates_and_no_pickle(kind, parts, tmp_path):
    router = fitted(kind, parts, name=f"my {kind}")
    router.decision = {"cost_weight": 3.0}
    before = router.estimate(parts[2].prompts)
    folder = router.save(tmp_path / "router")
    again = load_router(folder)
    assert type(again) is type(router) and again.name == f"my {kind}"
    assert again.models == ("cheap", "strong") and again.pool.models == router.pool.models
    assert again.decision == {"cost_weight": 3.0} and again.options == router.options
    assert np.abs(again.estimate(parts[2].prompts) - before).max() < 1e-6
    suffixes = {p.suffix for p in folder.rglob("*") if p.is_file()}
    assert suffixes <= {".json", ".safetensors"}
    # A second save of what was loaded says the same.
    assert load_router(again.save(tmp_path / "twice")).as_card() == again.as_card()


@pytest.mark.parametrize("kind", LEARNT)
def test_equal_seeds_give_equal_bytes(kind, parts, tmp_path):
    for run in "ab":
        fitted(kind, parts, seed=5).save(tmp_path / run)
    for file in (tmp_path / "a").iterdir():
        assert file.read_bytes() == (tmp_path / "b" / file.name).read_bytes(), file.name


def test_router_json_names_what_evaluation_needs(parts, tmp_path):
    card = read_card(fitted("linear", parts).save(tmp_path / "r"))
    assert card["cache_fingerprint"] == parts[0].fingerprint
    assert card["pool"]["models"][0] == {"name": "cheap", "price_input": 0.1, "price_output": 0.4}
    assert text_hash(parts[0].prompts[0].prompt) in card["train_prompts"]
    assert text_hash(parts[2].prompts[0].prompt) not in card["train_prompts"]
    assert len(card["train_prompts"]) <= parts[0].n and {len(h) for h in card["train_prompts"]} == {12}
    assert card["train_prompts_hash"] and card["train_prompt_ids_hash"] and card["created_with"]["numpy"]


def test_write_card_for_weights_of_another_program(tmp_path):
    write_card(tmp_path, kind="trained_deberta", name="d", models=["cheap"], pool=two_model_pool(), form="pool",
               train_prompts=[Prompt("a", "What is it?")], base_model="tiny")
    card = read_card(tmp_path)
    assert card["form"] == "pool" and card["base_model"] == "tiny"
    assert card["train_prompts"] == [text_hash("what IS it")]


def test_estimates_do_not_depend_on_the_company_a_prompt_keeps(parts):
    for kind in LEARNT:
        router = fitted(kind, parts)
        together = router.estimate(parts[2].prompts[:20])
        alone = np.vstack([router.estimate([p]) for p in parts[2].prompts[:20]])
        assert np.abs(together - alone).max() < 1e-5, kind


def test_empty_prompt_lists_and_empty_texts_pass_through(parts):
    router = fitted("linear", parts)
    assert router.estimate([]).shape == (0, 2)
    assert np.isfinite(router.estimate([Prompt("e", ""), Prompt("s", "\ud800 half a pair")])).all()


def test_one_class_columns_get_a_constant_and_a_warning(parts, caplog):
    train, dev, test = parts
    ones = replace(train, quality_mean=np.column_stack([np.ones(train.n), train.quality_mean[:, 1]]))
    for kind in LEARNT:
        with caplog.at_level(logging.WARNING, "routewright"):
            estimate = fitted(kind, (ones, dev)).estimate(test.prompts)
        assert np.all(estimate[:, 0] == 1.0) and np.ptp(estimate[:, 1]) >= 0, kind
        assert "'cheap' the same quality" in caplog.text
        caplog.clear()


def test_fits_without_a_dev_split_and_on_a_handful(parts):
    for kind in LEARNT:
        few = parts[0].rows(np.arange(6))
        assert fitted(kind, (few, None)).estimate(parts[2].prompts[:3]).shape == (3, 2), kind


def test_overhead_is_measured_and_priced(parts):
    router = fitted("linear", parts, gpu_usd_per_hour=3600.0)
    usd, seconds = router.overhead(parts[2].prompts)
    assert usd.shape == seconds.shape == (parts[2].n,)
    assert 0 < seconds[0] < 1 and np.allclose(usd, seconds)
    free, _ = fitted("knn", parts).overhead(parts[2].prompts)
    assert not free.any()


# ---------------------------------------------------------------- what people get wrong

@pytest.mark.parametrize(("options", "said"), [
    ({"kind": "knnn"}, r"unknown router kind 'knnn' \(did you mean 'knn'\?\)"),
    ({"kind": "knn", "kk": 3}, r"knn has no option 'kk' \(did you mean 'k'\?\)"),
    ({"kind": "knn", "k": "many"}, r"k must be int; got 'many'"),
    ({"kind": "knn", "k": True}, r"k must be int; got True"),
    ({"kind": "knn", "k": -1}, r"k and temperature must be 0"),
    ({"kind": "linear", "l2": -1.0}, r"l2 must be 0"),
    ({"kind": "mf", "epochs": 0}, r"epochs must be above 0"),
    ({"kind": "trained_deberta"}, r"needs `path`"),
    ({"kind": "trained_deberta", "path": "x", "form": "triple"}, r"form must be pool or pair"),
    ({"kind": "shuffled"}, r"needs `of`"),
    ({"kind": "group_table", "by": "colour"}, r"by must be task or group"),
    ({"name": "nothing"}, r"needs `kind` .* or `path`"),
    ({"kind": "linear", "encoder": "${NOWHERE_AT_ALL}"}, r"variable NOWHERE_AT_ALL is not set"),
])
def test_wrong_entries_are_named(options, said):
    with pytest.raises(UserError, match=said):
        from_entry(options)


def test_wrong_encoder_options_are_named(parts):
    with pytest.raises(UserError, match=r"encoder 'tfidf' has no option 'dims'"):
        make_router("linear", encoder={"name": "tfidf", "dims": 3}).fit(*parts[:2])


def test_missing_weights_are_named_at_once(parts):
    with pytest.raises(MissingSetup, match=r"hf download no-such/encoder"):
        make_router("linear", encoder="no-such/encoder").fit(*parts[:2])


def test_folders_that_are_no_routers(tmp_path, parts):
    with pytest.raises(UserError, match="does not exist"):
        load_router(tmp_path / "absent")
    (tmp_path / "router.json").write_text("{")
    with pytest.raises(UserError, match="router.json: not JSON"):
        load_router(tmp_path)
    (tmp_path / "router.json").write_text('{"kind": "linear"}')
    with pytest.raises(UserError, match="`models` is missing"):
        load_router(tmp_path)


@pytest.mark.parametrize("file", ["weights.safetensors", "encoder.safetensors", "vocabulary.json"])
@pytest.mark.parametrize("damage", ["half", "empty", "missing"])
def test_damaged_router_files_are_named(file, damage, parts, tmp_path):
    folder = fitted("linear", parts).save(tmp_path / "r")
    data = (folder / file).read_bytes()
    if damage == "missing":
        (folder / file).unlink()
    else:
        (folder / file).write_bytes(data[:len(data) // 2] if damage == "half" else b"")
    with pytest.raises(UserError, match="fetch the"):
        load_router(folder)


def test_options_given_at_loading_win(parts, tmp_path):
    folder = fitted("linear", parts).save(tmp_path / "r")
    assert load_router(folder, name="other", gpu_usd_per_hour=1).gpu_usd_per_hour == 1.0
    with pytest.raises(UserError, match="has no option 'nmae'"):
        load_router(folder, nmae="other")


def test_another_encoder_than_trained_over_is_refused(parts, tmp_path):
    folder = fitted("linear", parts).save(tmp_path / "r")
    card = json.loads((folder / "router.json").read_text())
    card["encoder_identity"] = "other"
    (folder / "router.json").write_text(json.dumps(card))
    with pytest.raises(UserError, match="other encoder weights"):
        load_router(folder)


def test_expand_reads_the_environment(monkeypatch):
    monkeypatch.setenv("RW_FOLDER", "/weights")
    found = expand({"a": ["${RW_FOLDER}/x", 3], "b": "${RW_NONE:-hub/name}"})
    assert found == {"a": ["/weights/x", 3], "b": "hub/name"}


def test_every_kind_has_a_class_that_agrees():
    for kind in ROUTER_KINDS:
        assert router_class(kind).kind == kind


def test_importing_the_package_is_light(root):
    heavy = "torch transformers sklearn scipy pandas numba sentence_transformers safetensors".split()
    code = ("import sys; import routewright.routers, routewright.encoders, routewright.routers.embedding, "
            f"routewright.routers.controls, routewright.routers.deberta; "
            f"print([m for m in {heavy!r} if m in sys.modules])")
    out = subprocess.run([sys.executable, "-c", code], cwd=root / "src", capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"


def test_example_configs_hold_known_entries(root, monkeypatch):
    """Every `kind` entry of the shipped files can be made; paths are made by other scripts and are only looked at."""
    from routewright.textfiles import read_yaml

    monkeypatch.delenv("MINILM", raising=False)
    for name in ("quickstart", "examples", "routellm", "sample_seeds", "language"):
        rows = read_yaml(root / "configs" / "routers" / f"{name}.yaml")["routers"]
        assert len({row["name"] for row in rows}) == len(rows)
        for row in rows:
            if "kind" in row:
                assert from_entry(row).name == row["name"]
            else:
                assert set(row) == {"name", "path"}


def test_over_real_sentence_vectors(parts, tmp_path):
    options = {"kind": "linear", "encoder": str(minilm_folder()), "cache": str(tmp_path / "cache")}
    small = [parts[0].rows(np.arange(90)), parts[1].rows(np.arange(30)), parts[2].rows(np.arange(30))]
    router = from_entry(options).fit(small[0], small[1], 0)
    before = router.estimate(small[2].prompts)
    _, seconds = router.overhead(small[2].prompts)
    assert seconds[0] > 1e-4
    again = load_router(router.save(tmp_path / "r"))
    assert np.abs(again.estimate(small[2].prompts) - before).max() < 1e-6
    # The second look comes from the cache, and still reports what embedding cost.
    assert again.overhead(small[2].prompts)[1][0] > 1e-4


# ---------------------------------------------------------------- what a router may see

@pytest.mark.parametrize("kind", [*LEARNT, "length", "group_table"])
def test_references_and_responses_never_reach_an_estimate(kind, parts):
    def told(table, text):
        return replace(table, prompts=[replace(p, reference=text) for p in table.prompts],
                       responses=[dict.fromkeys(table.models, text) for _ in table.prompts])

    plain = fitted(kind, parts).estimate(parts[2].prompts)
    train, dev, test = (told(table, f"hard {i}") for i, table in enumerate(parts))
    assert np.array_equal(fitted(kind, (train, dev)).estimate(test.prompts), plain)


# ---------------------------------------------------------------- folders from elsewhere

CARDS = {
    "kind a list": ({"kind": ["linear"]}, "`kind` is damaged"),
    "models a text": ({"models": "cheap"}, "`models` is damaged"),
    "a model twice": ({"models": ["cheap", "cheap"]}, "`models` is damaged"),
    "a model too many": ({"models": ["cheap", "mid", "strong"]}, "weights.safetensors: does not fit router.json"),
    "options a list": ({"options": [1]}, "`options` is damaged"),
    "decision a text": ({"decision": {"cost_weight": "1"}}, "decision must hold numbers"),
    "decision nan": ({"decision": {"cost_weight": float("nan")}}, "decision must hold numbers"),
    "pool without models": ({"pool": {"name": "x"}}, "pool is damaged"),
    "a price nan": ({"pool": {"models": [{"name": "cheap", "price_input": float("nan"), "price_output": 1}]}},
                    "price_input must be USD"),
    "a price key too many": ({"pool": {"models": [{"name": "cheap", "price_input": 1, "price_output": 1, "x": 1}]}},
                             "unknown key 'x'"),
}


@pytest.mark.parametrize("name", CARDS)
def test_tampered_cards_are_refused(name, parts, tmp_path):
    change, said = CARDS[name]
    folder = fitted("linear", parts).save(tmp_path / "r")
    card = json.loads((folder / "router.json").read_text())
    (folder / "router.json").write_text(json.dumps(card | change))
    with pytest.raises(UserError, match=said):
        load_router(folder)


@pytest.mark.parametrize("kind", [*LEARNT, "group_table", "fixed_split"])
@pytest.mark.parametrize("change", ["another shape", "another rank", "missing", "nan"])
def test_weights_of_the_wrong_shape_are_refused(kind, change, parts, tmp_path):
    from safetensors.numpy import load_file, save_file

    folder = fitted(kind, parts).save(tmp_path / "r")
    whole = load_file(folder / "weights.safetensors")
    for key, value in whole.items():
        state = dict(whole)
        if change == "missing":
            del state[key]
        elif change == "nan":
            state[key] = np.full_like(value, np.nan)
        else:
            state[key] = value[None] if change == "another rank" else np.concatenate([value, value])
        save_file({k: np.ascontiguousarray(v) for k, v in state.items()}, folder / "weights.safetensors")
        if change == "nan" and key == "constant":
            continue  # there it is the mark of a column that is not constant
        with pytest.raises(UserError, match="again"):
            load_router(folder).estimate(parts[2].prompts[:3])
