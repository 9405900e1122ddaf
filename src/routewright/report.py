"""What a person reads: the headline, the table in Markdown and in the terminal, and one self-contained HTML page.

Everything is made from the content of comparison.json, so a report can be made again from the file. Numbers that do
not exist are written n/a. Differences of quality are in points: 1 point is one answer in a hundred.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from routewright import charts

NONE = "n/a"
THIN, MINUS = "\u00a0", "\u2212"  # a blank that does not break, a minus as long as a plus
MARGIN = 0.02  # two points of quality: as much as an interval may reach below 0 and still be called the same quality
CHARTS = ("frontier", "shares", "calibration", "budget", "tasks")
COLUMNS = ("router", "role", "verdict", "versus_mix_points", "versus_mix_lo", "versus_mix_hi", "quality", "quality_lo",
           "quality_hi", "usd_per_1k", "cost_ratio", "parity_cost_ratio", "parity_cost_ratio_lo",
           "parity_cost_ratio_hi",
           "parity_quality_points", "aiq", "aiq_verdict", "regret", "arena", "largest_share")


# ---------------------------------------------------------------- words for numbers

def percent(value: float | None, digits: int = 1) -> str:
    return NONE if value is None else f"{100 * value:.{digits}f}{THIN}%"


def points(value: float | None) -> str:
    """A difference of quality in points, signed."""
    return NONE if value is None else signed(100 * value)


def signed(value: float) -> str:
    """One digit with its sign; what rounds to 0 has none."""
    text = f"{value:+.1f}"
    return "0.0" if text in ("+0.0", "-0.0") else text.replace("-", MINUS)


def money(value: float | None) -> str:
    """USD with three significant digits, never in powers of ten."""
    if value is None:
        return NONE
    if value == 0:
        return "$0"
    if value >= 1000:
        return f"${value:,.0f}"
    from math import floor, log10

    return f"${value:.{max(2, 2 - floor(log10(abs(value))))}f}"


def span(said: Mapping[str, Any] | None, form: Any, joint: str = " to ") -> str:
    """The interval of {value, lo, hi}, both ends in the same form."""
    return NONE if not said or said["lo"] is None else f"{form(said['lo'])}{joint}{form(said['hi'])}"


def percent_range(said: Mapping[str, Any] | None, digits: int = 1) -> str:
    """An interval of percentages with one sign of percent."""
    return span(said, lambda v: f"{100 * v:.{digits}f}",
                "\u2013") + ("" if not said or said["lo"] is None else f"{THIN}%")


def _level(results: Mapping[str, Any]) -> str:
    return f"{100 * results['level']:g}{THIN}% interval"


# ---------------------------------------------------------------- the headline

def headline(results: Mapping[str, Any]) -> dict[str, Any]:
    """One sentence that sums the evaluation up, and a second that qualifies it.

    Returns {text, detail, router, tone}: tone is good, mixed or bad. The router spoken of is picked on dev (the lowest
    cost at which it reaches the best single model's quality there), never by its test scores.
    """
    results = charts.in_order(results)
    routers = {n: r for n, r in results["routers"].items() if not r["control"]}
    best, level = short_names(results)[results["best_single"]], _level(results)
    reaching = {n: r for n, r in routers.items() if r["points"]["parity"]["dev_quality_difference"] >= -1e-12
                and (r["points"]["parity"]["dev_cost_ratio"] or 1.0) < 1}
    if not reaching:
        return _headline_none(results, routers)
    name = min(reaching, key=lambda n: (reaching[n]["points"]["parity"]["dev_cost_ratio"], n))
    point = reaching[name]["points"]["parity"]
    ratio, gap = point["cost_ratio"], point["quality_difference"]
    cost = f"{percent(ratio['value'], 0)} ({level} {span(ratio, lambda v: f'{100 * v:.0f}', '–')})"
    detail = f"Quality on test: {points(gap['value'])} points against always {best} ({level} {span(gap, points)})."
    tone = "good"
    if gap["verdict"] == "loses":
        text, tone = (f"{name} falls {abs(100 * gap['value']):.1f} points short of {best}, whose quality it was set to "
                      f"match, at {cost} of its cost."), "bad"
    elif gap["verdict"] == "beats":
        text = f"{name} answers better than {best}, the best single model, at {cost} of its cost."
    elif gap["lo"] is not None and gap["lo"] < -MARGIN:  # a wide interval around 0 is no proof of equal quality
        text, tone = (f"{name} costs {cost} of {best}, the best single model, for {points(gap['value'])} points of "
                      "quality."), "mixed"
        detail = (f"These prompts cannot tell the two qualities apart ({level} of the difference: {span(gap, points)} "
                  "points).")
    else:
        text = f"At the best single model's quality, {name} costs {cost} of it."
    if ratio["hi"] is not None and ratio["hi"] >= 1:
        detail += " A saving is not shown: the interval of the cost reaches that of the model itself."
        tone = "mixed" if tone == "good" else tone
    mix = point["versus_mix"]
    if mix["verdict"] != "beats":
        word = "may do as well" if mix["verdict"] == "ties" else "does better"
        detail += (f" A random mix of models that reads no prompt {word} at that cost (difference "
                   f"{points(mix['value'])} points, {span(mix, points)}).")
        tone = "mixed" if tone == "good" else tone
    else:
        detail += (f" That is {100 * mix['value']:.1f} points above the best random mix of models at the same cost "
                   f"({span(mix, points)}).")
    return {"text": text, "detail": detail, "router": name, "tone": tone}


def _headline_none(results: Mapping[str, Any], routers: Mapping[str, Any]) -> dict[str, Any]:
    """No router reached the best single model's quality for less on dev."""
    best = short_names(results)[results["best_single"]]
    if not routers:
        return {"text": f"No router was judged: only controls stand beside {best}.", "detail": "", "router": None,
                "tone": "bad"}
    name = max(routers, key=lambda n: (routers[n]["points"]["balanced"]["dev_reward"], -list(routers).index(n)))
    point = routers[name]["points"]["balanced"]
    mix = point["versus_mix"]
    side = "above" if mix["value"] >= 0 else "below"
    judged = {"beats": "a real gain", "ties": "no difference that these prompts can show",
              "loses": "a real loss"}[mix["verdict"]]
    quality, ratio = percent(point["quality"]["value"]), percent(point["cost_ratio"]["value"], 0)
    detail = ("On the dev prompts no cheaper setting of any router reached its quality. At its balanced setting "
              f"{name} reaches {quality} quality at {ratio} of the cost of {best}. That is "
              f"{abs(100 * mix['value']):.1f} points {side} the best random mix of models at that cost "
              f"({_level(results)} {span(mix, points)}), {judged}.")
    return {"text": f"No router is shown to match {best}, the best single model, for less money.", "detail": detail,
            "router": name, "tone": "mixed" if mix["verdict"] == "beats" else "bad"}


def worth_naming(results: Mapping[str, Any]) -> list[str]:
    """The models a plot names and a terminal shows; see `charts.worth_naming`."""
    return charts.worth_naming(results)


def short_names(results: Mapping[str, Any]) -> dict[str, str]:
    """Model -> its name without the maker's folder, where that leaves the names distinct."""
    return charts.short_names(results)


# ---------------------------------------------------------------- tables

def leaderboard_rows(results: Mapping[str, Any]) -> tuple[list[str], list[list[Any]]]:
    """(columns, rows) of plain values: routers, content controls, models, mix and oracle. For W&B and the tables."""
    results = charts.in_order(results)
    rows: list[list[Any]] = []
    for name, router in results["routers"].items():
        b, p = router["points"]["balanced"], router["points"]["parity"]
        rows.append([name, "control" if router["control"] else "router", b["versus_mix"]["verdict"],
                     _hundred(b["versus_mix"]["value"]), _hundred(b["versus_mix"]["lo"]),
                     _hundred(b["versus_mix"]["hi"]),
                     b["quality"]["value"], b["quality"]["lo"], b["quality"]["hi"], b["cost_per_1k"]["value"],
                     b["cost_ratio"]["value"], *(p["cost_ratio"][k] for k in ("value", "lo", "hi")),
                     _hundred(p["quality_difference"]["value"]), router["aiq"]["value"],
                     router["aiq_versus_mix"]["verdict"],
                     b["regret"]["value"], b["arena"], b["largest_share"]])
    rows.sort(key=lambda r: r[1] == "control")
    gap = [None] * len(COLUMNS)
    for name, model in results["models"].items():
        rows.append([f"always {short_names(results)[name]}", "model", *gap[2:6],
                     *(model["quality"][k] for k in ("value", "lo", "hi")),
                     model["cost_per_1k"]["value"], *gap[10:]])
    rows.append(["best random mix", "content-free", *gap[2:15], results["mix"]["aiq"]["value"], *gap[16:]])
    oracle = results["oracle"]
    rows.append(["oracle", "ceiling", *gap[2:6], *(oracle["quality"][k] for k in ("value", "lo", "hi")),
                 oracle["cost_per_1k"]["value"], *gap[10:]])
    return list(COLUMNS), rows


def _hundred(value: float | None) -> float | None:
    return None if value is None else 100 * value


def table_cells(results: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """(headings, rows) of the leaderboard in words, for Markdown and the terminal."""
    heads = ["router", "verdict", "against the mix (points)", "quality", "$ per 1K", "cost at best single's quality",
             "quality there (points)", "AIQ", "whole curve"]
    rows = []
    for row in leaderboard_rows(results)[1]:
        of = dict(zip(COLUMNS, row, strict=True))
        mix = {"value": of["versus_mix_points"], "lo": of["versus_mix_lo"], "hi": of["versus_mix_hi"]}
        quality = {"lo": of["quality_lo"], "hi": of["quality_hi"]}
        parity = {"lo": of["parity_cost_ratio_lo"], "hi": of["parity_cost_ratio_hi"]}
        bare = lambda v: f"{100 * v:.1f}"  # noqa: E731
        whole = lambda v: f"{100 * v:.0f}"  # noqa: E731
        judged = of["role"] in ("router", "control")
        role = " (control)" if of["role"] == "control" else ""
        rows.append([
            f"{of['router']}{role}", (of["verdict"] or NONE) if judged else "",
            f"{signed(mix['value'])} ({span(mix, signed)})" if mix["value"] is not None else "",
            f"{percent(of['quality'])} ({span(quality, bare, '–')})" if of["quality"] is not None else "",
            money(of["usd_per_1k"]) if of["usd_per_1k"] is not None else "",
            f"{percent(of['parity_cost_ratio'], 0)} ({span(parity, whole, '–')})"
            if of["parity_cost_ratio"] is not None else "",
            signed(of["parity_quality_points"]) if of["parity_quality_points"] is not None else "",
            f"{of['aiq']:.4f}" if of["aiq"] is not None else "", (of["aiq_verdict"] or "") if judged else ""])
    return heads, rows


def reward_words(results: Mapping[str, Any]) -> str:
    """The reward as a formula, and what it values a point of quality at."""
    reward = results["reward"]
    weight = reward["cost_weight"]
    K, most = reward.get("K", 1), _number(reward.get("cost_max"))
    formula = {"linear": f"quality - {weight:g} x cost", "binary": f"correct x ({K:g} - {weight:g} x cost)",
               "capped": f"quality x ({K:g} - min({weight:g} x cost, {most}))"}
    said = f"{formula[reward['kind']]} (cost in USD per answer)"
    if reward["kind"] == "linear" and weight > 0:
        said += f": one point of quality on 1,000 prompts is worth {money(10.0 / weight)}"
    if reward["cost_weight_source"] == "indifference":
        said += (f"; the weight at which the cheapest and the best single model earn the same on the train and dev "
                 f"prompts ({results['views'][0]['name']})")
    return said


def _number(value: float | None) -> str:
    return "no limit" if value is None else f"{value:g}"


def method_lines(results: Mapping[str, Any]) -> list[str]:
    """How the numbers came about, for the foot of every table."""
    views = results["views"]
    tests = ", ".join(dict.fromkeys(f"{v['test']:,}" for v in views))
    kind = f"{len(views)} divisions of the prompts ({', '.join(v['name'] for v in views)})" if len(views) > 1 else \
        f"one division of the prompts ({views[0]['name']})"
    return [
        f"{tests} test prompts, {kind}; {results['n_resamples']:,} paired bootstrap resamples of "
        f"{results['groups_resampled']:,} groups (near-duplicate prompts are drawn together), "
        f"{100 * results['level']:g} % percentile intervals. They stand for another draw of prompts, not for another "
        "training, and run short where a handful of prompts decides.",
        f"Settings are chosen on dev and reported on test. Balanced: best dev reward, {reward_words(results)}. Parity: "
        f"the cheapest setting that reaches the dev quality of the best single model ({results['best_single']}); "
        "relative costs are against that model.",
        "Verdict: the interval of the quality difference to the best content-free control (the upper hull of the "
        "always-one-model points on the test prompts) at the router's own cost. That interval is never narrower than "
        "what the router's calls, dealt out over the prompts at random, would show. Whole curve: the same for AIQ, the "
        "mean quality over the cost range of the pool. Costs include the router's own overhead in dollars."]


def markdown(results: Mapping[str, Any]) -> str:
    """leaderboard.md"""
    heads, rows = table_cells(results)
    lines = [f"# {results['headline']['text']}", "", results["headline"]["detail"], ""]
    lines += [f"> {warning}" for warning in _warnings(results)]
    lines += [""] if _warnings(results) else []
    lines += [f"| {' | '.join(heads)} |", f"|{'|'.join(' --- ' if i < 2 else ' ---: ' for i in range(len(heads)))}|"]
    lines += [f"| {' | '.join(c.replace('|', '/') for c in row)} |" for row in rows]
    lines += ["", *(f"- {line}" for line in method_lines(results)), ""]
    return "\n".join(lines)


def _warnings(results: Mapping[str, Any]) -> list[str]:
    return [o["note"] for o in results.get("overlaps", [])] + list(results.get("warnings", []))


def terminal(results: Mapping[str, Any]) -> None:
    """Print the leaderboard."""
    results = charts.in_order(results)
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    console = Console(highlight=False)
    if not console.is_terminal:  # a log file has no width; wrapped cells help nobody
        console = Console(highlight=False, width=150)
    wide = console.width >= 120
    heads, rows = table_cells(results)
    kept = [i for i, head in enumerate(heads) if wide or head not in ("quality there (points)", "AIQ", "whole curve")]
    table = Table(show_edge=False, pad_edge=False, header_style="bold")
    for i in kept:
        table.add_column(heads[i], justify="left" if i < 2 else "right", overflow="fold")
    table.columns[0].min_width = 16
    colour = {"beats": "green", "loses": "red", "ties": "yellow"}
    shown = {f"always {short_names(results)[m]}" for m in worth_naming(results)}
    hidden = sum(row[0].startswith("always ") and row[0] not in shown for row in rows)
    for row in rows:
        if row[0].startswith("always ") and row[0] not in shown:
            continue
        table.add_row(*(f"[{colour[row[i]]}]{row[i]}[/]" if row[i] in colour else escape(row[i]) for i in kept))
    tone = {"good": "green", "mixed": "yellow", "bad": "red"}[results["headline"]["tone"]]
    console.print()
    console.print(f"[bold {tone}]{escape(results['headline']['text'])}[/]")
    if results["headline"]["detail"]:
        console.print(escape(results["headline"]["detail"]))
    for warning in _warnings(results):
        console.print(f"[yellow]note:[/] {escape(warning)}")
    console.print()
    console.print(table)
    if hidden:
        console.print(f"[dim]{hidden} more models, all below the mix of these, stand in leaderboard.md[/]")
    console.print()


# ---------------------------------------------------------------- the page

def chart_specs(results: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """The charts of this evaluation by file name."""
    results = charts.in_order(results)
    specs = {"frontier": charts.frontier(results), "shares": charts.shares(results),
             "calibration": charts.calibration(results)}
    lead = results["headline"]["router"]
    if lead is not None:
        specs["budget"] = charts.budget(results, lead)
        by_task = charts.tasks(results, lead)
        if by_task is not None:
            specs["tasks"] = by_task
    return specs


def html(results: Mapping[str, Any], specs: Mapping[str, Any], examples: Mapping[str, Any],
         provenance: Mapping[str, Any],
         timing: Mapping[str, Any]) -> str:
    """The page: everything inline, nothing fetched. Prompts and answers are escaped."""
    results = charts.in_order(results)
    from jinja2 import Environment, StrictUndefined

    environment = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=StrictUndefined)
    environment.filters |= {"percent": percent, "points": points, "money": money}
    template = environment.from_string((Path(__file__).parent / "report_page.html").read_text(encoding="utf-8"))
    return template.render(
        r=results, short=short_names(results), named=worth_naming(results), lead=results["headline"]["router"],
        examples=examples, provenance=provenance, timing=timing,
        routers={n: v for n, v in results["routers"].items() if not v["control"]},
        controls={n: v for n, v in results["routers"].items() if v["control"]},
        warnings=_warnings(results), methods=method_lines(results), reward_words=reward_words(results),
        level=_level(results), span=span, points=points, percent=percent, range=percent_range,
        versus=_versus_names(results), specs=_for_script(dict(specs)),
        has={name: name in specs for name in CHARTS},
        themes=_for_script({"light": {**charts.theme(), "background": "transparent"}, "dark": charts.theme(dark=True)}),
        vega=charts.page_script().replace("</script", "<\\/script"))


def _versus_names(results: Mapping[str, Any]) -> list[str]:
    """The controls that any router is set beside, in one order."""
    names: list[str] = []
    for router in results["routers"].values():
        names += [n for n in router["points"]["balanced"]["controls"] if n not in names]
    return names


def _for_script(value: Any) -> str:
    """JSON that may stand inside a script element."""
    text = json.dumps(value, ensure_ascii=False, allow_nan=False)
    for character, code in (("<", "\\u003c"), (">", "\\u003e"), ("&", "\\u0026"), ("\u2028", "\\u2028"),
                            ("\u2029", "\\u2029")):
        text = text.replace(character, code)
    return text
