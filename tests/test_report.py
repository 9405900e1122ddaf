"""The report: what it says in words, that it stands alone, and that prompts cannot break it."""

from __future__ import annotations

import copy
import json
import re
import shutil
import subprocess

import pytest
import yaml
from test_evaluation import LINEAR, QUICK, make_outcomes, replace_outcome, write_cache, write_routers

from routewright import charts, report
from routewright.evaluation import evaluate, slugs

HOSTILE = '</script><script>alert("x")</script><img src=x onerror=alert(1)> {{ 7*7 }} | &amp; "quoted"'


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """(results, folder): a run over prompts that hold markup."""
    folder = tmp_path_factory.mktemp("report")
    outcomes = [replace_outcome(o, prompt=f"{HOSTILE} {o.prompt}", response=f"{HOSTILE} {o.response}",
                                task=f"{o.task} <b>|")
                for o in make_outcomes(700, signal=0.85)]
    cache = write_cache(folder / "cache", outcomes)
    routers = write_routers(folder / "r.yaml", LINEAR, {"name": "second", "kind": "linear", "l2": 1.0})
    options = {**QUICK, "plots": True}
    return evaluate(cache=str(cache), routers=routers, output_dir=str(folder / "out"), **options), folder / "out"


@pytest.fixture
def results(made):
    return copy.deepcopy(made[0])


def parity(results, router="linear", **changes):
    point = results["routers"][router]["points"]["parity"]
    for key, (value, lo, hi, verdict) in changes.items():
        point[key] |= {"value": value, "lo": lo, "hi": hi} | ({"verdict": verdict} if verdict else {})
    return point


def reach(results, **dev_ratio):
    for name, router in results["routers"].items():
        router["points"]["parity"]["dev_quality_difference"] = 0.0 if name in dev_ratio else -0.01
        if name in dev_ratio:
            router["points"]["parity"]["dev_cost_ratio"] = dev_ratio[name]


# ---------------------------------------------------------------- the headline

def test_headline_of_a_saving(results):
    reach(results, linear=0.4, second=0.6)
    parity(results, cost_ratio=(0.41, 0.36, 0.46, None), quality_difference=(-0.001, -0.01, 0.01, "ties"),
           versus_mix=(0.05, 0.03, 0.07, "beats"))
    said = report.headline(results)
    assert said["text"].replace("\u00a0", " ") == (
        "At the best single model's quality, linear costs 41 % (95 % interval 36\u201346) of it.")
    assert said["tone"] == "good" and said["router"] == "linear"
    assert "5.0 points above the best random mix" in said["detail"]


def test_headline_where_equal_quality_is_not_shown(results):
    reach(results, linear=0.4)
    parity(results, cost_ratio=(0.41, 0.36, 0.46, None), quality_difference=(-0.014, -0.046, 0.021, "ties"),
           versus_mix=(0.05, 0.03, 0.07, "beats"))
    said = report.headline(results)
    assert said["text"].endswith("of strong, the best single model, for \u22121.4 points of quality.")
    assert said["tone"] == "mixed"
    assert "cannot tell the two qualities apart" in said["detail"]


def test_the_router_of_the_headline_is_picked_on_dev(results):
    reach(results, linear=0.7, second=0.6)
    parity(results, "linear", cost_ratio=(0.1, 0.1, 0.1, None), quality_difference=(0.1, 0.1, 0.1, "beats"))
    assert report.headline(results)["router"] == "second"


def test_headline_of_a_quality_that_is_missed_on_test(results):
    reach(results, linear=0.4)
    parity(results, cost_ratio=(0.41, 0.36, 0.46, None), quality_difference=(-0.031, -0.05, -0.01, "loses"),
           versus_mix=(0.0, -0.01, 0.01, "ties"))
    said = report.headline(results)
    assert "falls 3.1 points short of strong" in said["text"] and said["tone"] == "bad"
    assert "may do as well at that cost" in said["detail"]


def test_headline_of_a_saving_that_is_not_shown(results):
    reach(results, linear=0.98)
    parity(results, cost_ratio=(0.97, 0.92, 1.02, None), quality_difference=(0.02, 0.01, 0.03, "beats"),
           versus_mix=(0.01, 0.005, 0.02, "beats"))
    said = report.headline(results)
    assert "answers better than strong" in said["text"] and said["tone"] == "mixed"
    assert "A saving is not shown" in said["detail"]


def test_headline_where_nobody_reaches_the_best_model(results):
    reach(results)
    results["routers"]["second"]["points"]["balanced"]["dev_reward"] = 9.0
    point = results["routers"]["second"]["points"]["balanced"]
    point["versus_mix"] |= {"value": -0.02, "lo": -0.03, "hi": -0.01, "verdict": "loses"}
    said = report.headline(results)
    assert said["text"].startswith("No router is shown to match strong") and said["tone"] == "bad"
    assert said["router"] == "second" and "2.0 points below the best random mix" in said["detail"]


# ---------------------------------------------------------------- words for numbers

@pytest.mark.parametrize(("value", "said"), [
    (None, "n/a"), (0, "$0"), (12345.6, "$12,346"), (3.7812, "$3.78"), (12.34, "$12.34"), (0.08231, "$0.0823"),
    (0.00000123456, "$0.00000123")])
def test_money(value, said):
    assert report.money(value) == said


def test_points_have_signs_and_zero_has_none():
    assert [report.points(v) for v in (0.012, -0.012, 0.0001, -0.0001, None)] == ["+1.2", "\u22121.2", "0.0", "0.0",
                                                                                  "n/a"]


# ---------------------------------------------------------------- tables

def test_leaderboard_has_everybody_and_no_nan(made):
    results, folder = made
    text = (folder / "leaderboard.md").read_text()
    for name in ("linear", "second", "length (control)", "task table (control)", "kNN control (control)",
                 "always cheap",
                 "always strong", "best random mix", "oracle"):
        assert f"| {name} |" in text, name
    assert not re.search(r"\b(nan|inf|None|null)\b", text)
    widths = {line.count("|") for line in text.splitlines() if line.startswith("|")}
    assert len(widths) == 1
    columns, rows = report.leaderboard_rows(results)
    assert all(len(row) == len(columns) for row in rows)


def test_what_does_not_exist_is_written_so(results):
    for point in results["routers"]["linear"]["points"].values():
        for key in ("cost_ratio", "versus_mix", "quality_difference"):
            point[key] |= {"value": None, "lo": None, "hi": None, "verdict": None}
    results["headline"] = {"text": "t", "detail": "", "router": None, "tone": "bad"}
    assert "nan" not in report.markdown(results)
    report.terminal(results)


def test_terminal_prints_the_headline(made, capsys):
    results, _ = made
    report.terminal(results)
    printed = capsys.readouterr().out
    assert "linear" in printed and "beats" in printed and "oracle" in printed


def test_terminal_shows_brackets_of_names_as_they_are(made, capsys):
    results, _ = made
    results = {**results, "warnings": ["prompt 'p1[/b]' and [red]model[/red]"],
               "headline": {**results["headline"], "text": "[/x] wins", "detail": "over [y"}}
    report.terminal(results)
    printed = capsys.readouterr().out
    for text in ("'p1[/b]'", "[red]model[/red]", "[/x] wins", "over [y"):
        assert text in printed


def test_the_notes_say_what_was_resampled_and_what_an_interval_stands_for(made):
    results, folder = made
    for text in ((folder / "leaderboard.md").read_text(), (folder / "report.html").read_text()):
        assert "near-duplicate prompts are drawn together" in text and "not for another training" in text
    assert results["groups_resampled"] == results["views"][0]["test"]  # no two of these prompts are alike


# ---------------------------------------------------------------- the page

def test_the_page_stands_alone(made):
    _, folder = made
    page = (folder / "report.html").read_text()
    assert len(page.encode()) < 2 * 2**20
    assert not re.search(r"<(?:link|img|iframe|object)\b", page.split("<script>")[0] + page.rsplit("</script>", 1)[1])
    assert not re.search(r"""(?:src|href)\s*=\s*["'](?:https?:)?//""", page)
    assert "default-src 'none'" in page and "connect-src" not in page
    assert 'name="viewport"' in page


def test_markup_in_prompts_stays_text(made):
    _, folder = made
    page = (folder / "report.html").read_text()
    assert 'alert("x")</script>' not in page and "<img src=x" not in page
    assert "&lt;/script&gt;" in page and "{{ 7*7 }}" in page
    scripts = re.findall(r"<script>(.*?)</script>", page, re.S)
    assert len(scripts) == 3  # the theme, Vega, the charts
    specs = re.search(r"const specs = (\{.*?\}), themes = ", scripts[2], re.S)[1]
    assert set(json.loads(specs)) >= {"frontier", "shares", "calibration"}
    assert "<" not in specs


def test_the_page_shows_no_python_values(made):
    _, folder = made
    text = re.sub(r"<(script|style)>.*?</\1>", "", (folder / "report.html").read_text(), flags=re.S)
    text = re.sub(r"<[^>]+>", " ", text)
    assert not re.search(r"\b(nan|None|inf|undefined|Undefined)\b", text)
    assert "costliest mistakes" in text and "Where the numbers come from" in text


def test_the_pages_of_several_seeds_and_of_many_models_render(tmp_path):
    outcomes = make_outcomes(400)
    third = [replace_outcome(o, model_name="third") for o in outcomes if o.model_name == "cheap"]
    cache = write_cache(tmp_path / "cache", [replace_outcome(o, latency_s=None) for o in [*outcomes, *third]])
    (cache / "pool.yaml").write_text(_pool_with_third(cache))
    evaluate(cache=str(cache), routers=write_routers(tmp_path / "r.yaml", LINEAR), seeds=2,
             output_dir=str(tmp_path / "out"),
             **QUICK)
    page = (tmp_path / "out" / "report.html").read_text()
    assert "seeds ±" in page and "always third" in page


def _pool_with_third(cache):
    raw = yaml.safe_load((cache / "pool.yaml").read_text())
    raw["models"].append({"name": "third", "price_input": 1.0, "price_output": 2.0})
    return yaml.safe_dump(raw)


# ---------------------------------------------------------------- charts

def test_charts_are_valid_vega_lite_and_become_png(made):
    alt = pytest.importorskip("altair")
    results, folder = made
    specs = report.chart_specs(results)
    assert set(specs) == set(report.CHARTS)
    for name, spec in specs.items():
        alt.Chart.from_dict({**spec, "config": charts.theme()})
        assert (folder / f"{name}.png").read_bytes().startswith(b"\x89PNG"), name


def test_cost_axis_is_logarithmic_only_where_costs_are_far_apart():
    assert charts._cost_axis([1.0, 2.0])["scale"].get("type") is None
    axis = charts._cost_axis([0.01, 0.9])
    assert axis["scale"]["type"] == "log" and axis["axis"]["values"] == [0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0]
    assert charts._cost_axis([0.0, 1.0])["scale"].get("type") is None  # a free model has no logarithm


def test_model_names_lose_their_folder_only_where_they_stay_distinct():
    assert charts.short_names({"models": {"a/x": 0, "y": 0}}) == {"a/x": "x", "y": "y"}
    assert charts.short_names({"models": {"a/x": 0, "b/x": 0}}) == {"a/x": "a/x", "b/x": "b/x"}


def test_file_names_of_routers():
    assert slugs(["linear + surface", "../up", "()"]) == {"linear + surface": "linear-surface", "../up": "up",
                                                          "()": "router"}
    assert slugs(["a b", "a-b"]) == {"a b": "a-b", "a-b": "a-b_"}


@pytest.mark.slow
def test_a_browser_draws_every_chart_with_no_error(made, tmp_path):
    browser = shutil.which("chromium") or shutil.which("google-chrome")
    if browser is None:
        pytest.skip("no Chromium on this machine")
    _, folder = made
    done = subprocess.run([browser, "--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking",
                           f"--user-data-dir={tmp_path}", "--enable-logging=stderr", "--virtual-time-budget=8000",
                           "--dump-dom",
                           f"file://{folder / 'report.html'}"], capture_output=True, text=True, timeout=120)
    drawn = re.findall(r'data-chart="(\w+)"[^>]*>.*?<svg', done.stdout, re.S)
    assert set(drawn) == {"frontier", "shares", "calibration", "budget", "tasks"}
    assert not [line for line in done.stderr.splitlines() if "CONSOLE" in line and ("rror" in line or "WARN" in line)]
