"""The charts of a report, as Vega-Lite specifications: plain JSON that draws the page, the PNG and W&B's image alike.

Each function takes the content of comparison.json and returns a specification without colours of axes and text:
those come from `theme`, so that the page can follow the reader's light or dark setting. `write_png` needs no browser.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from routewright.textfiles import write_atomic

SCHEMA = "https://vega.github.io/schema/vega-lite/v6.json"  # a name, never fetched
# Distinct for the common forms of colour blindness and legible on white and on near-black.
COLOURS = ("#3f7fe0", "#e07b29", "#1f9d78", "#b4559c", "#8a6fe0", "#b8931f", "#3aa0c2", "#d1495b", "#6f8f3a", "#a0704a")
CONTROL_COLOURS = ("#8b93a1", "#a79f93", "#94a89b", "#a196a8")
OTHERS = "other models"
LOG_FROM = 8.0  # ratio of dearest to cheapest at which a linear cost axis would hide the cheap end
FEWEST_TASKS, MOST_TASKS, MOST_NAMES = 2, 24, 8


def theme(dark: bool = False) -> dict[str, Any]:
    """The colours and fonts of axes, legends and text."""
    ink, faint, line = ("#e8eaed", "#9aa3b0", "#2c333d") if dark else ("#1c2430", "#5c6675", "#e3e6eb")
    font = "Inter, system-ui, -apple-system, 'Segoe UI', Roboto, sans-serif"
    return {
        "background": "transparent" if dark else "#ffffff", "font": font, "view": {"stroke": None},
        "axis": {"labelColor": faint, "titleColor": faint, "gridColor": line, "domainColor": line, "tickColor": line,
                 "labelFontSize": 12, "titleFontSize": 12, "titleFontWeight": "normal", "titlePadding": 10,
                 "labelLimit": 180},
        "legend": {"labelColor": ink, "titleColor": faint, "labelFontSize": 12, "titleFontSize": 12, "orient": "bottom",
                   "columns": 6, "labelLimit": 200, "titleFontWeight": "normal"},
        "text": {"color": ink, "fontSize": 12}, "title": {"color": ink, "anchor": "start", "fontSize": 14}}


def in_order(results: Mapping[str, Any]) -> dict[str, Any]:
    """The results with models in pool order, and routers as they were named with the controls last: a JSON file has its
    keys sorted."""
    order = results["order"]
    names = sorted(order["routers"], key=lambda n: results["routers"][n]["control"])
    return {**results, "models": {n: results["models"][n] for n in order["models"]},
            "routers": {n: results["routers"][n] for n in names}}


def short_names(results: Mapping[str, Any]) -> dict[str, str]:
    """Model -> its name without the maker's folder ("mistralai/"), where that leaves the names distinct."""
    cut = {name: name.rsplit("/", 1)[-1] for name in results["models"]}
    return cut if len(set(cut.values())) == len(cut) else {name: name for name in cut}


def worth_naming(results: Mapping[str, Any]) -> list[str]:
    """The models a plot names: all of a small pool, else those on the hull and the best single one."""
    from routewright.metrics import hull

    names = list(results["models"])
    if len(names) <= MOST_NAMES:
        return names
    on_hull = hull([results["models"][n]["cost_per_1k"]["value"] for n in names],
                   [results["models"][n]["quality"]["value"] for n in names])
    return [n for i, n in enumerate(names) if i in set(on_hull.tolist()) or n == results["best_single"]]


def colours(results: Mapping[str, Any]) -> tuple[list[str], list[str]]:
    """(names, colours): routers in the bright colours, content controls in greys."""
    routers = [n for n, r in results["routers"].items() if not r["control"]]
    controls = [n for n, r in results["routers"].items() if r["control"]]
    return [*routers, *controls], [*(COLOURS[i % len(COLOURS)] for i in range(len(routers))),
                                   *(CONTROL_COLOURS[i % len(CONTROL_COLOURS)] for i in range(len(controls)))]


def frontier(results: Mapping[str, Any]) -> dict[str, Any]:
    """Quality over cost: a curve with its band per router, the models as labelled points, the mix, the oracle."""
    names, palette = colours(results)
    per_1k = [c * 1000 for c in results["grid"]]
    x = _cost_axis([*per_1k, results["oracle"]["cost_per_1k"]["value"]])
    # Dozens of poor models would press the curves together: the plot ends a little below the named ones.
    lowest = min([results["models"][m]["quality"]["value"] for m in worth_naming(results)]
                 + [q for r in results["routers"].values() for q in r["curve"]["lo"] if q is not None])
    y = {"field": "quality", "type": "quantitative", "title": "quality", "axis": {"format": ".0%", "tickCount": 6},
         "scale": {"zero": False}}
    if len(results["models"]) > MOST_NAMES:
        y["scale"]["domain"] = [max(0.0, lowest - 0.01), min(1.0, results["oracle"]["quality"]["value"] + 0.03)]
    colour = {"field": "router", "type": "nominal", "title": None, "scale": {"domain": names, "range": palette},
              "legend": {"symbolType": "stroke", "symbolStrokeWidth": 4, "symbolSize": 220, "symbolOpacity": 1}}
    curve_rows, point_rows = _router_rows(results)
    short, named = short_names(results), worth_naming(results)
    model_rows = [{"name": short[n], "label": short[n] if n in named else "", **_dot(m)}
                  for n, m in results["models"].items()]
    oracle_rows = [{"name": "oracle", "label": "oracle", **_dot(results["oracle"])}]
    mix_rows = [{"cost": c, "quality": q} for c, q in zip(per_1k, results["mix"]["quality"], strict=True)]
    picked = {"param": "router_picked"}
    lead = results["headline"]["router"]
    band = ("length(data('router_picked_store')) ? vlSelectionTest('router_picked_store', datum) : "
            f"datum.router === {json.dumps(lead)}")
    tip = [_tip("cost", "cost per 1,000 (USD)", ".4~g"), _tip("quality", "quality", ".1%"),
           _tip("interval", f"{100 * results['level']:g} % interval")]
    return _spec([
        {"data": {"values": [r for r in curve_rows if not r["control"]]},
         "mark": {"type": "area", "clip": True}, "encoding": {  # one band at a time: several turn into fog
            "x": x, "y": {**y, "field": "lo"}, "y2": {"field": "hi"}, "color": colour,
            "opacity": {"condition": {"test": band, "value": 0.16}, "value": 0}}},
        {"data": {"values": mix_rows}, "mark": {"type": "line", "strokeDash": [5, 4], "color": "#7d8694",
                                                "strokeWidth": 1.6},
         "encoding": {"x": x, "y": y}},
        {"data": {"values": curve_rows}, "params": [{"name": "router_picked",
                                                     "select": {"type": "point", "fields": ["router"]},
                                                     "bind": "legend"}],
         "mark": {"type": "line", "interpolate": "linear"}, "encoding": {
            "x": x, "y": y, "color": colour, "strokeWidth": {"condition": {"test": "datum.control", "value": 1.2},
                                                             "value": 2.4},
            "opacity": {"condition": {**picked, "value": 1}, "value": 0.12},
            "tooltip": [_tip("router", "router"), _tip("cost", "cost per 1,000 (USD)", ".4~g"),
                        _tip("quality", "quality", ".1%"),
                        _tip("lo", "from", ".1%"), _tip("hi", "to", ".1%")]}},
        {"data": {"values": point_rows}, "mark": {"type": "point", "filled": True, "size": 90, "stroke": "white",
                                                  "strokeWidth": 1}, "encoding": {
            "x": x, "y": y, "color": colour, "shape": {"field": "setting", "type": "nominal", "title": None, "scale": {
                "domain": ["balanced", "parity"], "range": ["circle", "diamond"]}},
            "opacity": {"condition": {**picked, "value": 1}, "value": 0.12},
            "tooltip": [_tip("router", "router"), _tip("setting", "setting"), *tip,
                        _tip("weight", "cost weight", ".4~g"),
                        _tip("calls", "calls"), _tip("against the mix", "against the mix (points)")]}},
        *_labelled(model_rows, x, y, tip, "square", 80, "#5c6675"),
        *_labelled(oracle_rows, x, y, tip, "triangle-up", 110, "#c08a00"),
    ], height=440)


def shares(results: Mapping[str, Any]) -> dict[str, Any]:
    """Which model gets the calls at each router's balanced setting, and what an oracle would do."""
    of_router = {**{n: r["points"]["balanced"]["shares"] for n, r in results["routers"].items()},
                 "oracle": results["oracle"]["shares"]}
    named = _most_called(results, of_router.values())
    rows = [{"router": router, "model": model, "share": share, "order": place}
            for router, called in of_router.items()
            for place, (model, share) in enumerate(_gather(results, called, named))]
    return _spec([{
        "data": {"values": rows}, "mark": {"type": "bar", "height": {"band": 0.72}, "cornerRadius": 2}, "encoding": {
            "y": {"field": "router", "type": "nominal", "title": None, "sort": list(of_router),
                  "axis": {"ticks": False, "domain": False}},
            "x": {"field": "share", "type": "quantitative", "title": "share of prompts", "axis": {"format": ".0%"},
                  "scale": {"domain": [0, 1]}},
            "color": _model_colour(results, named), "order": {"field": "order"},
            "tooltip": [_tip("router", "router"), _tip("model", "model"), _tip("share", "share", ".1%")]}}],
        height=26 * len(of_router) + 10)


def budget(results: Mapping[str, Any], router: str) -> dict[str, Any]:
    """How one router spreads its calls as the budget grows."""
    settings = results["routers"][router]["settings"]
    called = [dict(zip(results["order"]["models"], share, strict=True)) for share in settings["shares"]]
    named = _most_called(results, called)
    rows, seen = [], set()
    for cost, at in sorted(zip(settings["test_cost_per_1k"], range(len(called)), strict=True)):
        if f"{cost:.3g}" not in seen:
            seen.add(f"{cost:.3g}")
            rows += [{"cost": cost, "model": model, "share": share, "order": place}
                     for place, (model, share) in enumerate(_gather(results, called[at], named))]
    return _spec([{
        "data": {"values": rows}, "mark": {"type": "area"}, "encoding": {
            "x": _cost_axis([r["cost"] for r in rows], padding=0),
            "y": {"field": "share", "type": "quantitative", "stack": "normalize", "title": "share of prompts",
                  "axis": {"format": ".0%"}},
            "color": _model_colour(results, named), "order": {"field": "order"},
            "tooltip": [_tip("cost", "cost per 1,000 (USD)", ".4~g"), _tip("model", "model"),
                        _tip("share", "share", ".1%")]}}],
        height=240)


def calibration(results: Mapping[str, Any]) -> dict[str, Any]:
    """Predicted against recorded quality, in groups of equal size; on the diagonal a prediction means what it says."""
    names, palette = colours(results)
    rows = [{"router": name, "predicted": b["estimate"], "recorded": b["quality"], "prompts": b["n"],
             "control": router["control"]}
            for name, router in results["routers"].items() for b in router["calibration"]["bins"]]
    x = {"field": "predicted", "type": "quantitative", "title": "predicted quality", "axis": {"format": ".0%"},
         "scale": {"domain": [0, 1]}}
    y = {"field": "recorded", "type": "quantitative", "title": "recorded quality", "axis": {"format": ".0%"},
         "scale": {"domain": [0, 1]}}
    colour = {"field": "router", "type": "nominal", "title": None, "scale": {"domain": names, "range": palette}}
    tip = [_tip("router", "router"), _tip("predicted", "predicted", ".1%"), _tip("recorded", "recorded", ".1%"),
           _tip("prompts", "estimates", ",")]
    faded = {"condition": {"param": "router_picked", "value": 1}, "value": 0.1}
    return _spec([
        {"data": {"values": [{"predicted": 0, "recorded": 0}, {"predicted": 1, "recorded": 1}]},
         "mark": {"type": "line", "strokeDash": [5, 4], "color": "#7d8694"}, "encoding": {"x": x, "y": y}},
        {"data": {"values": rows}, "params": [{"name": "router_picked",
                                               "select": {"type": "point", "fields": ["router"]},
                                               "bind": "legend"}],
         "mark": {"type": "line", "point": {"size": 45}}, "encoding": {
            "x": x, "y": y, "color": colour, "tooltip": tip, "opacity": faded,
            "strokeWidth": {"condition": {"test": "datum.control", "value": 1}, "value": 2}}}], height=340)


def tasks(results: Mapping[str, Any], router: str) -> dict[str, Any] | None:
    """Quality difference of one router to the best single model on each task. None for a single task."""
    found = results["routers"][router]["tasks"]
    rows = [{"task": name or "(no task)", "n": t["n"], "cost": t["cost_per_1k"]["value"],
             "difference": 100 * t["versus_best_single"]["value"], "lo": 100 * t["versus_best_single"]["lo"],
             "hi": 100 * t["versus_best_single"]["hi"], "verdict": t["versus_best_single"]["verdict"]}
            for name, t in found.items() if t["versus_best_single"]["lo"] is not None]
    rows = sorted(rows, key=lambda r: -r["n"])[:MOST_TASKS]
    if len(rows) < FEWEST_TASKS:
        return None
    y = {"field": "task", "type": "nominal", "title": None, "sort": [r["task"] for r in rows],
         "axis": {"ticks": False, "domain": False}}
    x = {"field": "difference", "type": "quantitative",
         "title": f"points of quality, {router} minus the best single model"}
    colour = {"field": "verdict", "type": "nominal", "legend": None, "scale": {
        "domain": ["beats", "ties", "loses"], "range": ["#1f9d78", "#8b93a1", "#d1495b"]}}
    tip = [_tip("task", "task"), _tip("n", "prompts", ","), _tip("difference", "points", "+.1f"),
           _tip("lo", "from", "+.1f"),
           _tip("hi", "to", "+.1f"), _tip("cost", "cost per 1,000 (USD)", ".4~g")]
    return _spec([
        {"data": {"values": [{"zero": 0}]}, "mark": {"type": "rule", "color": "#7d8694", "strokeDash": [5, 4]},
         "encoding": {"x": {"field": "zero", "type": "quantitative"}}},
        {"data": {"values": rows}, "mark": {"type": "rule", "strokeWidth": 2}, "encoding": {
            "y": y, "x": {**x, "field": "lo", "title": x["title"]}, "x2": {"field": "hi"}, "color": colour,
            "tooltip": tip}},
        {"data": {"values": rows}, "mark": {"type": "point", "filled": True, "size": 70, "opacity": 1}, "encoding": {
            "y": y, "x": x, "color": colour, "tooltip": tip}}], height=24 * len(rows) + 10)


def write_png(path: str | Path, spec: Mapping[str, Any], width: int = 860) -> Path:
    """Draw a specification into a PNG file, light, without a browser and without the network."""
    import vl_convert

    drawn = {**spec, "width": width, "config": theme()}
    return write_atomic(path, vl_convert.vegalite_to_png(drawn, scale=2))


def page_script() -> str:
    """The JavaScript that draws Vega-Lite specifications in a page: Vega, Vega-Lite and vega-embed as `vegaEmbed`."""
    import vl_convert

    return vl_convert.javascript_bundle("window.vegaEmbed = vegaEmbed;")


# ---------------------------------------------------------------- parts

def _router_rows(results: Mapping[str, Any]) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """(points of the curves, chosen settings) of every router."""
    short = short_names(results)
    curves, chosen = [], []
    for name, router in results["routers"].items():
        for cost, *heights in zip(results["grid"], *(router["curve"][k] for k in ("quality", "lo", "hi")), strict=True):
            curves.append({"router": name, "control": router["control"], "cost": cost * 1000,
                           **dict(zip(("quality", "lo", "hi"), heights, strict=True))})
        for label, point in router["points"].items():
            calls = ", ".join(f"{short[m]} {s:.0%}" for m, s in point["shares"].items() if s and s >= 0.005)
            mix = point["versus_mix"]
            chosen.append({"router": name, "control": router["control"], "setting": label, "calls": calls,
                           "weight": point["cost_weight"][0], **_dot(point),
                           "against the mix": f"{mix['verdict']} {_interval(mix)}"})
    return curves, chosen


def _dot(said: Mapping[str, Any]) -> dict[str, Any]:
    return {"cost": said["cost_per_1k"]["value"], "quality": said["quality"]["value"],
            "interval": _interval(said["quality"])}


def _spec(layers: Sequence[Mapping[str, Any]], height: int) -> dict[str, Any]:
    return {"$schema": SCHEMA, "width": "container", "height": height,
            "autosize": {"type": "fit-x", "contains": "padding"},
            "layer": list(layers)}


def _labelled(rows: list[dict[str, Any]], x: dict, y: dict, tip: list, shape: str, size: int,
              colour: str) -> list[dict[str, Any]]:
    tooltip = [_tip("name", "always" if shape == "square" else "model"), *tip]
    mark = {"type": "point", "shape": shape, "filled": True, "size": size, "color": colour, "opacity": 1,
            "stroke": "white",
            "strokeWidth": 1, "clip": True}
    layers = [{"data": {"values": rows}, "mark": mark, "encoding": {"x": x, "y": y, "tooltip": tooltip}}]
    middle = sum(_place(x, r["cost"]) for r in rows) / len(rows) if len(rows) > 1 else None
    for right in (False, True):  # names of dear models stand left of their point, so that they stay on the page
        some = [r for r in rows if r["label"] and (middle is not None and _place(x, r["cost"]) > middle) == right]
        if some:
            layers.append({"data": {"values": some}, "mark": {
                "type": "text", "align": "right" if right else "left", "dx": -10 if right else 9,
                "dy": -9 if right else 11,
                "fontWeight": 600}, "encoding": {"x": x, "y": y, "text": {"field": "label"}}})
    return layers


def _place(x: Mapping[str, Any], cost: float) -> float:
    return math.log(cost) if x["scale"].get("type") == "log" else cost


def _most_called(results: Mapping[str, Any], called: Iterable[Mapping[str, float | None]]) -> list[str]:
    """The models worth a colour of their own, in price order: all of a small pool, else the MOST_NAMES most used."""
    largest = dict.fromkeys(_by_price(results), 0.0)
    for shares_of in called:
        for model, share in shares_of.items():
            largest[model] = max(largest[model], share or 0.0)
    if len(largest) <= MOST_NAMES:
        return list(largest)
    kept = sorted(largest, key=lambda m: -largest[m])[:MOST_NAMES]
    return [m for m in largest if m in kept]


def _gather(results: Mapping[str, Any], called: Mapping[str, float | None],
            named: list[str]) -> list[tuple[str, float]]:
    """(short name, share) of the named models in price order, and of all the others together."""
    short = short_names(results)
    found = [(short[m], called[m] or 0.0) for m in named]
    return found if len(named) == len(results["models"]) else [*found,
                                                               (OTHERS, max(0.0, 1.0 - sum(s for _, s in found)))]


def _model_colour(results: Mapping[str, Any], named: list[str]) -> dict[str, Any]:
    """Cheap models light, dear ones dark: one hue, because price is an order."""
    names, ramp = [short_names(results)[m] for m in named], _ramp(len(named))
    if len(named) < len(results["models"]):
        names, ramp = [*names, OTHERS], [*ramp, "#a7adb8"]
    return {"field": "model", "type": "nominal", "title": None, "sort": names,
            "scale": {"domain": names, "range": ramp}}


def _by_price(results: Mapping[str, Any]) -> list[str]:
    models = results["models"]
    return sorted(models, key=lambda m: models[m]["price_input"] + models[m]["price_output"])


def _ramp(n: int) -> list[str]:
    stops = [(168, 203, 240), (63, 127, 224), (38, 52, 120)]
    found = []
    for i in range(n):
        at = 2.0 * i / max(n - 1, 1)
        a, b, part = stops[min(int(at), 1)], stops[min(int(at), 1) + 1], at - min(int(at), 1)
        found.append("#" + "".join(f"{round(u + (v - u) * part):02x}" for u, v in zip(a, b, strict=True)))
    return found


def _cost_axis(costs: Sequence[float | None], padding: int = 20) -> dict[str, Any]:
    """The encoding of cost: logarithmic, with ticks at 1, 2, 5, where the costs are far apart."""
    axis = {"field": "cost", "type": "quantitative", "title": "cost per 1,000 prompts (USD)"}
    known = [c for c in costs if c is not None and c > 0]
    if len(known) < 2 or len(known) < len(costs) or max(known) / min(known) < LOG_FROM:
        return {**axis, "scale": {"zero": False, "nice": False, "padding": padding},
                "axis": {"format": "~g", "tickCount": 6}}
    low, high = math.floor(math.log10(min(known))), math.ceil(math.log10(max(known)))
    ticks = [float(f"{step}e{power}") for power in range(low, high + 1) for step in (1, 2, 5)]
    return {**axis, "scale": {"type": "log", "nice": False, "padding": padding},
            "axis": {"format": "~g", "values": [t for t in ticks if 0.8 * min(known) <= t <= 1.25 * max(known)]}}


def _tip(field: str, title: str, form: str | None = None) -> dict[str, Any]:
    kind = "quantitative" if form else "nominal"
    return {"field": field, "type": kind, "title": title, **({"format": form} if form else {})}


def _interval(said: Mapping[str, Any]) -> str:
    if said.get("lo") is None:
        return "n/a"
    signed = "+.1f" if "verdict" in said else ".1f"
    return f"{100 * said['lo']:{signed}} to {100 * said['hi']:{signed}}"
