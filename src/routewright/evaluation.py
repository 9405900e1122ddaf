"""One evaluation for every router: load, fit, estimate, score beside the controls, and write what a person can open.

`evaluate.py` and `run.py` both come here. Routers are named in a YAML file or on the command line; those of a folder
are taken as trained, the others are fitted on the train split of the cache (again for every seed). All of them see the
same prompts and are scored in replay: no model is called.

Dev is where routers stop training, are calibrated and have their setting chosen, so what they score there flatters
them. Test plays no part in any of it: a router folder says which prompts made it, and one that met test prompts is
refused.

Files of the output folder. Byte-identical when run twice: samples.csv, results_<router>.json, comparison.json,
leaderboard.md, decisions.parquet (unless a router has `gpu_usd_per_hour`, which turns measured seconds into dollars).
Holding dates or measured seconds: provenance.json, timing.json, report.html.
"""

from __future__ import annotations

import csv
import io
import re
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from routewright import metrics, tracking
from routewright.errors import UserError
from routewright.outcomes import OutcomeTable
from routewright.scoring import Comparison, Contestant, Estimates, Rules, View, clean, compare, indifference_weight
from routewright.textfiles import check_keys, nearest, read_yaml, write_atomic, write_json

CONTENT_CONTROLS = ("length", "group_table", "knn")  # set beside every router, named in the file or not
CLOSED_FORM = ("always", "random_mix", "fixed_split", "shuffled", "oracle")  # computed for everybody, exactly
RESERVED = ("oracle", "shuffled", "fixed split", "best random mix")  # rows of every report
NEAR_CHECK_LIMIT = 20_000  # prompts up to which near-duplicates across splits are looked for; exact ones always are
MANY_EXAMPLES, FEW_EXAMPLES = 20, 5
MOST_ANSWERS = 6  # shown beside an example; a pool may have dozens of models
LONGEST_TEXT = 1500  # characters of a prompt or an answer in the report


@dataclass
class Entry:
    """One router to score: where it was named, its options, and the folder of a trained one."""

    where: str
    name: str
    options: dict[str, Any]
    is_control: bool = False

    @property
    def path(self) -> str | None:
        return self.options.get("path")

    @property
    def per_seed(self) -> bool:
        """Whether there is one folder per seed, trained on that seed's division: `path: data/runs/mine-{seed}`."""
        return "{seed}" in (self.path or "")

    def for_seed(self, seed: int) -> Entry:
        """The entry with the folder of one seed."""
        return replace(self, options={**self.options, "path": self.path.replace("{seed}", str(seed))})


def evaluate(*, cache: str, output_dir: str, routers: str | None = None, router_type: str | None = None,
             router_model_path: str | None = None, pool: str | None = None, models: Sequence[str] | None = None,
             train_split: str = "train", dev_split: str = "dev", test_split: str = "test",
             seeds: int | Sequence[int] = 1,
             reward: str = "linear", cost_weight: float | None = None, n_settings: int = 101, n_resamples: int = 1000,
             level: float = 0.95, allow_overlap: bool = False, plots: bool = True, wandb: str = "auto",
             wandb_project: str = "routewright") -> dict[str, Any]:
    """Score routers and write the report. Returns the content of comparison.json. Raises UserError before any fitting.

    The options are those of src/evaluate.py, which explains them.
    """
    began = time.perf_counter()
    _check_numbers(n_settings, n_resamples, level, cost_weight)
    tracking.check_mode(wandb)
    entries = read_entries(routers) if routers else []
    if router_type or router_model_path:
        entries.append(entry_from_flags(router_type, router_model_path))
    if not entries:
        raise UserError("no router is named; use --routers configs/routers/quickstart.yaml or --router_type and "
                        "--router_model_path")
    _check_names(entries)
    notes: list[str] = []
    entries = _complete(entries)
    table = OutcomeTable.load(cache, pool, models)
    views, recorded = make_views(table, seeds, (train_split, dev_split, test_split), entries, notes)
    _check_views(table, views, notes)
    # Every mistake of a file shows before any work starts.
    made = [(entry, _make(entry, views[-1].seed)) for entry in entries]
    overlaps = _check_trained(table, views, recorded, made, allow_overlap)
    rules = Rules(_reward(reward, cost_weight, table, views), n_settings, n_resamples, level)
    contestants, timing = _estimate_all(table, views, recorded, made)
    began_scoring = time.perf_counter()
    comparison = compare(table, views, contestants, rules)
    timing["scoring_s"] = time.perf_counter() - began_scoring
    results = comparison.results
    results |= {"schema": 1, "cache": _cache_card(table, cache),
                "reward": _reward_card(rules.reward, reward, cost_weight),
                "overlaps": overlaps, "warnings": [*notes, *_warnings(results, table)]}
    from routewright.report import headline

    results["headline"] = headline(results)
    _check_ledger(comparison)
    folder = Path(output_dir)
    examples = _examples(table, views, contestants, comparison)
    timing["total_s"] = time.perf_counter() - began
    provenance = _provenance(cache, table, comparison)
    _write(folder, table, views, comparison, timing, provenance, examples, plots)
    _track(folder, results, wandb, wandb_project, plots)
    return results


def _check_numbers(n_settings: int, n_resamples: int, level: float, cost_weight: float | None) -> None:
    for name, value, least in (("n_settings", n_settings, 2), ("n_resamples", n_resamples, 20)):
        if value < least:
            raise UserError(f"--{name} must be at least {least}; got {value}")
    if not 0 < level < 1:
        raise UserError(f"--level must lie between 0 and 1, such as 0.95; got {level}")
    if cost_weight is not None and not (np.isfinite(cost_weight) and cost_weight >= 0):
        raise UserError(f"--cost_weight is quality per USD, 0 or more; got {cost_weight}")


# ---------------------------------------------------------------- which routers

_ALIASES = {"router_type": "kind", "type": "kind", "router_model_path": "path", "model_path": "path"}
# CoBench's names for what are options of one kind here.
_COBENCH_KINDS = {"logits_margin": ("logit_score", {"score": "margin"}),
                  "max_logits": ("logit_score", {"score": "max_logit"}),
                  **{name: ("logit_score", {"score": name})
                     for name in ("top10_variance", "entropy", "confidence_margin")}}
# Kinds that can read with a language model as it is, and the option that names it.
ON_A_BASE = {"llm": "model", "dpo": "model", "probe": "base", "self_questioning": "base", "logit_score": "base",
             "semantic_entropy": "base"}


def read_entries(file: str | Path) -> list[Entry]:
    """The routers of a YAML file. Raises UserError naming the file and the entry.

    `kind` may be written router_type and `path` router_model_path or model_path, as CoBench's files do. A file
    that describes one router at the top level, without a `routers` list, is read too. Its names of logit scores are
    kinds too, and a `path` that is a language model, not a router folder, is the base model of the kinds that take one.
    """
    raw = read_yaml(file)
    if "routers" not in raw and any(key in raw for key in ("kind", "path", *_ALIASES)):
        raw = {"routers": [raw]}
    check_keys(raw, ("routers",), ("description",), str(file))
    if not isinstance(raw["routers"], list) or not raw["routers"]:
        raise UserError(f"{file}: `routers` must be a list with at least one entry such as {{name: knn, kind: knn}}")
    return [_entry(given, f"{file}: routers[{i}]") for i, given in enumerate(raw["routers"])]


def _check_names(entries: Sequence[Entry]) -> None:
    taken: set[str] = set()
    for entry in entries:
        if entry.name in taken:
            raise UserError(f"{entry.where}: the name {entry.name!r} stands twice; give each router its own `name`, "
                            "or drop one")
        if entry.name in RESERVED:
            raise UserError(f"{entry.where}: the name {entry.name!r} is that of a row of every report; give the router "
                            "another `name`")
        taken.add(entry.name)


def entry_from_flags(router_type: str | None, router_model_path: str | None) -> Entry:
    """The router of --router_type and --router_model_path."""
    options = {"kind": router_type, "path": router_model_path}
    return _entry({k: v for k, v in options.items() if v}, "--router_type, --router_model_path")


def check_entry(given: Mapping[str, Any], where: str) -> None:
    """Raise UserError where the routers file with this entry would be refused."""
    entry = _entry(given, where)
    if not entry.per_seed:
        _make(entry, 0)


def _entry(given: Any, where: str) -> Entry:
    from routewright.routers.base import ROUTER_KINDS, expand

    if not isinstance(given, Mapping):
        raise UserError(f"{where}: expected a mapping such as {{name: knn, kind: knn}}; got {given!r}")
    options: dict[str, Any] = {}
    for key, value in given.items():
        name = _ALIASES.get(str(key), str(key))
        if name in options:
            raise UserError(f"{where}: {key!r} and another key both give `{name}`; keep one")
        options[name] = value
    theirs = str(options.get("kind"))
    if theirs in _COBENCH_KINDS:
        kind, fixed = _COBENCH_KINDS[theirs]
        for name in fixed:
            if name in options:
                raise UserError(f"{where}: {name}: the kind {theirs!r} says it already; leave it away")
        options = {"name": theirs, **options, "kind": kind, **fixed}
    kind, path = options.get("kind"), options.get("path")
    if kind is None and path is None:
        raise UserError(f"{where}: needs `kind` (one of {', '.join(ROUTER_KINDS)}) or `path` (a router folder); "
                        f"got the keys {', '.join(map(str, given)) or 'none'}")
    if kind is not None and str(kind) not in ROUTER_KINDS:
        raise UserError(f"{where}: unknown router kind {kind!r}{nearest(str(kind), ROUTER_KINDS)}; known: "
                        f"{', '.join(ROUTER_KINDS)}")
    if path is not None:
        try:
            options["path"] = path = expand(str(path))
        except UserError as error:
            raise UserError(f"{where}: {error}") from None
        if _is_base(kind, path):
            option = ON_A_BASE[kind]
            if options.get(option):
                raise UserError(f"{where}: path {path!r} is a language model, and so is {option} {options[option]!r}; "
                                "keep one")
            options[option], path = options.pop("path"), None
        elif "{seed}" not in path:
            _need_folder(path, where)
    name = str(options.get("name") or (re.sub(r"[-_.]*\{seed\}", "", Path(path).name) if path else "") or kind)
    if not re.fullmatch(r"[\w .,:+=()@-]{1,80}", name):
        raise UserError(f"{where}: the name {name!r} must be up to 80 letters, digits, blanks or _ - . , : + = ( ) @")
    return Entry(where, name, options)


def _is_base(kind: Any, path: str) -> bool:
    """Whether a path names the language model that a router of this kind reads with: its folder, or a hub id."""
    folder = Path(path)
    if kind not in ON_A_BASE or (folder / "router.json").is_file():
        return False
    if folder.is_dir():
        return any((folder / name).is_file() for name in ("config.json", "adapter_config.json"))
    return bool(re.fullmatch(r"[\w.-]+/[\w.-]+", path)) and not folder.parent.is_dir()


def _need_folder(path: str, where: str) -> None:
    if not Path(path).is_dir():
        parent = Path(path).parent
        beside = [p.name for p in parent.iterdir()] if parent.is_dir() else []
        raise UserError(f"{where}: path: {path}: no such router folder{nearest(Path(path).name, beside)}; "
                        "a train_*.py script writes one")


def _complete(entries: list[Entry]) -> list[Entry]:
    """The routers, and the content controls that nobody named.

    Always-one-model, mixes, the best fixed split, shuffled decisions and the oracle are computed exactly for every
    report, so entries of those kinds add nothing.
    """
    kept = [e for e in entries if e.options.get("kind") not in CLOSED_FORM]
    if not kept:
        raise UserError(f"{entries[0].where}: only controls are named, and those stand in every report; name a router "
                        "to be judged, such as {name: knn, kind: knn}")
    if len(kept) < len(entries):
        print(f"{', '.join(e.name for e in entries if e not in kept)}: in every report already", flush=True)
    labels = {"group_table": "task table", "knn": "kNN control"}
    for kind in CONTENT_CONTROLS:
        if not any(e.options.get("kind") == kind for e in kept):
            name = labels.get(kind, kind)
            while any(e.name == name for e in kept):
                name += "'"
            options = {"name": name, "kind": kind, **({"encoder": "tfidf"} if kind == "knn" else {})}
            kept.append(Entry("the control", name, options, is_control=True))
    return kept


def _make(entry: Entry, seed: int) -> Any:
    """The router of an entry, loaded or unfitted. `seed` picks the folder where there is one per seed."""
    from routewright.routers.base import CARD, load_router, make_router, router_class

    own = entry.for_seed(seed) if entry.per_seed else entry
    options = {**own.options, "name": entry.name}
    kind, path = options.pop("kind", None), options.get("path")
    try:
        if path and (kind is None or kind in ON_A_BASE or (Path(path) / CARD).is_file()):
            router = load_router(options.pop("path"), **options)
            if kind is not None and router.kind != kind:
                raise UserError(f"{path}: holds a router of kind {router.kind!r}, not {kind!r}")
        else:
            router = make_router(kind, **options)
    except UserError as error:
        raise UserError(str(error) if entry.where in str(error) else f"{entry.where}: {error}") from None
    entry.is_control = entry.is_control or router_class(router.kind).is_control
    return router


# ---------------------------------------------------------------- views: divisions of the prompts

def make_views(table: OutcomeTable, seeds: int | Sequence[int], splits: tuple[str, str, str], entries: Sequence[Entry],
               notes: list[str]) -> tuple[list[View], int | None]:
    """(views, place of the view with the recorded splits or None).

    One seed uses the recorded splits where the cache has them. Several seeds divide the prompts anew, each by its own
    salt. A router folder knows one division only: the recorded one, or that of its seed where there is a folder per
    seed (and then one seed divides anew too). Raises UserError.
    """
    numbers = list(range(seeds)) if isinstance(seeds, int) else [int(s) for s in seeds]
    if not numbers or len(set(numbers)) != len(numbers):
        raise UserError(f"--seeds is a count from 1 or a list of different whole numbers; got {seeds}")
    has_recorded = all(name in table.splits for name in splits)
    folders = [e.name for e in entries if e.path and not e.per_seed]
    anew = len(numbers) > 1 or any(e.per_seed for e in entries)
    for entry in entries:
        for seed in numbers if entry.per_seed else ():
            _need_folder(entry.for_seed(seed).path, entry.where)
    if anew and not folders and splits != ("train", "dev", "test"):
        raise UserError("--train_split, --dev_split and --test_split name recorded splits, but several seeds (and a "
                        "router folder per seed) divide the prompts anew; drop one of the two")
    views: list[View] = []
    if has_recorded and (not anew or folders):
        views.append(_view("recorded", numbers[0], table, [p.split for p in table.prompts], splits))
        left_out = table.n - sum(table.splits[name] for name in dict.fromkeys(splits))
        if left_out:
            notes.append(f"{left_out} of {table.n} prompts are in none of the splits {', '.join(splits)} and were left "
                         "out")
    if views and not anew:
        return views, 0
    if folders and not views:
        seen = ", ".join(f"{k or 'unassigned'} {v}" for k, v in table.splits.items())
        if anew or set(splits) != {"train", "dev", "test"}:
            raise UserError(f"{folders[0]!r} was trained on one division of the prompts, and the cache records none "
                            f"({seen}); evaluate it with --seeds 1, or import with --splits hash")
    if not has_recorded and splits != ("train", "dev", "test"):
        raise UserError(f"the cache has no prompts in split {next(s for s in splits if s not in table.splits)!r} "
                        f"(it has: {', '.join(f'{k or chr(39) * 2} {v}' for k, v in table.splits.items())})")
    from routewright.prompts import seed_splits

    recorded = 0 if views else None
    for seed in numbers:
        views.append(_view(f"seed {seed}", seed, table, seed_splits(table.prompts, seed), ("train", "dev", "test")))
    if not has_recorded and not anew:
        notes.append("the cache records no splits; prompts were divided 60/20/20 by their group")
        recorded = 0 if folders else None
    return views, recorded


def _view(name: str, seed: int, table: OutcomeTable, own: Sequence[str], splits: tuple[str, str, str]) -> View:
    own_array = np.array(own)
    rows = [np.flatnonzero(own_array == split) for split in splits]
    for split, found in zip(splits, rows, strict=True):
        if not len(found):
            raise UserError(f"{name}: none of {table.n} prompts falls into split {split!r}; record more, or name other "
                            "splits with --train_split, --dev_split, --test_split")
    return View(name, seed, *rows)


def _check_views(table: OutcomeTable, views: Sequence[View], notes: list[str]) -> None:
    """Refuse a view whose train or dev prompts stand in its test prompts too."""
    from routewright.prompts import check_no_overlap

    near = table.n <= NEAR_CHECK_LIMIT
    if not near:
        notes.append(f"{table.n} prompts: the splits were checked for exact duplicates and shared groups, not for near "
                     "duplicates")
    grouped = any(p.group not in ("", p.prompt_id) for p in table.prompts)  # near-duplicates were looked for already
    for view in views:
        learnt = np.concatenate([view.train, view.dev])
        if set(learnt.tolist()) & set(view.test.tolist()):
            raise UserError(f"{view.name}: the test split is also a train or dev split; name three different splits")
        check_no_overlap([table.prompts[i] for i in view.test], [table.prompts[i] for i in learnt],
                         f"the test split ({view.name})", "the train and dev splits",
                         near=near and (not grouped or view.name == "recorded"))


def _check_trained(table: OutcomeTable, views: Sequence[View], recorded: int | None, made: Sequence[tuple[Entry, Any]],
                   allow: bool) -> list[dict[str, Any]]:
    """Refuse routers that were made with test prompts, or note the overlap where that was allowed.

    A router that is fitted here was too, where the language model or encoder it reads with is a router folder. A folder
    keeps hashes of its normalised prompts, so equal ones are found and merely similar ones are not; within one cache
    those share a group, which no division tears apart.
    """
    from routewright.routers.base import prompts_behind

    found: list[dict[str, Any]] = []
    for entry, router in made:
        if entry.per_seed:
            pairs = [(view, _make(entry, view.seed)) for i, view in enumerate(views) if i != recorded]
        else:
            pairs = [(views[recorded], router)] if entry.path else []
        for view, loaded in pairs:
            found += [said for said in _overlap(table, view, entry, loaded.card, allow) if said not in found]
        for folder in () if entry.path else _read_with(entry):
            card = {"train_prompts": sorted(prompts_behind(folder))}
            for view in (view for i, view in enumerate(views) if i != recorded or len(views) == 1):
                found += [said for said in _overlap(table, view, entry, card, allow) if said not in found]
    return found


def _read_with(entry: Entry) -> list[Path]:
    """The folders that training left, of this project, which a router that is fitted here reads prompts with."""
    from routewright.routers.base import expand

    encoder = entry.options.get("encoder")
    named = [entry.options.get("base"), entry.options.get("model"),
             encoder.get("name") if isinstance(encoder, Mapping) else encoder]
    folders = [Path(expand(name)) for name in named if name and isinstance(name, str)]
    return [f for f in folders if any((f / mark).is_file() for mark in ("router.json", "config.resolved.yaml"))]


def _overlap(table: OutcomeTable, view: View, entry: Entry, card: Mapping[str, Any],
             allow: bool) -> list[dict[str, Any]]:
    """What the report says of a router and the view it is scored on; nothing where they share no prompt."""
    from routewright.prompts import text_hash

    trained = set(card.get("train_prompts") or ())
    if not trained:
        return [{"router": entry.name, "prompts": None,
                 "note": "its folder does not say what it was trained on, so an overlap cannot be ruled out"}]
    hashes = {i: text_hash(table.prompts[i].prompt) for i in view.test}
    shared, how = [i for i in view.test if hashes[i] in trained], "trained on"
    if not shared:
        chosen = set(card.get("dev_prompts") or ())
        shared, how = [i for i in view.test if hashes[i] in chosen], "calibrated or stopped (its dev split) on"
    if not shared:
        return []
    said = (f"router {entry.name!r} was {how} {len(shared)} of the {len(view.test)} test prompts of {view.name} "
            f"(first: {table.prompts[shared[0]].prompt_id!r})")
    if not allow:
        raise UserError(f"{entry.where}: {said}, so its scores would flatter it; train it on the train split (one "
                        "that was made with --split_seed is named by a path with {seed} in it), or say --allow_overlap "
                        "true and the report will say so")
    return [{"router": entry.name, "prompts": len(shared), "note": f"{said}; its scores are inflated"}]


# ---------------------------------------------------------------- estimates

def _estimate_all(table: OutcomeTable, views: Sequence[View], recorded: int | None,
                  made: Sequence[tuple[Entry, Any]]) -> tuple[list[Contestant], dict[str, Any]]:
    """Fit what can be fitted and estimate every dev and test prompt. Returns contestants and measured seconds."""
    contestants, timing = [], {}
    for entry, router in made:
        # Routers from folders know the recorded view only, the others the seeds; controls stand beside both.
        seeds = [i for i in range(len(views)) if i != recorded or len(views) == 1]
        folder = entry.path and not entry.per_seed
        own = [recorded] if folder else [*range(len(views))] if entry.is_control and not entry.per_seed else seeds
        found, fit_s, per_prompt = {}, 0.0, []
        for turn, i in enumerate(own):
            view = views[i]
            train, dev, test = (table.rows(r) for r in (view.train, view.dev, view.test))
            # A folder per seed is another router each time, and nothing learnt in one view may reach the next.
            router = router if turn == 0 and not entry.per_seed else _make(entry, view.seed)
            start = time.perf_counter()
            router.fit(train, dev, view.seed) if not entry.path else _bind(router, table, entry)
            fit_s += time.perf_counter() - start
            found[i], seconds = _estimates(router, table, dev, test, entry)
            per_prompt.append(seconds)
        print(f"{entry.name}: {'loaded' if entry.path else f'fitted in {fit_s:.1f} s'}, "
              f"{np.median(np.concatenate(per_prompt)) * 1e3:.2f} ms per prompt", flush=True)
        timing[entry.name] = {"fit_s": fit_s, "overhead_p50_s": clean(np.quantile(np.concatenate(per_prompt), 0.5)),
                              "overhead_p95_s": clean(np.quantile(np.concatenate(per_prompt), 0.95))}
        facts = {"source": entry.path or "fitted on the train split",
                 "options": {k: v for k, v in entry.options.items() if k not in ("name", "kind", "path")},
                 "base_model": router.card.get("base_model", ""),
                 "trained_on": router.card.get("cache_fingerprint", "")}
        learns = router.needs_training or entry.path
        whole = None if learns else router.estimate(table.prompts)[:, [router.models.index(m) for m in table.models]]
        contestants.append(Contestant(entry.name, router.kind, entry.is_control, found, facts, whole,
                                      () if folder else tuple(seeds)))
    return contestants, {"routers": timing}


def _bind(router: Any, table: OutcomeTable, entry: Entry) -> None:
    """A loaded router keeps its own models, at the prices of this evaluation; a bare checkpoint takes over both."""
    if not router.models:
        router.bind(table.models, table.pool)
    missing = [name for name in router.models if name not in table.models]
    if missing:
        raise UserError(f"{entry.where}: router {entry.name!r} knows model {missing[0]!r}, which the cache does not "
                        f"hold (it holds {', '.join(table.models)}); evaluate it on a cache of its own pool")
    router.pool = table.pool.subset(router.models)


def _estimates(router: Any, table: OutcomeTable, dev: OutcomeTable, test: OutcomeTable,
               entry: Entry) -> tuple[Estimates, np.ndarray]:
    _bind(router, table, entry)
    columns = np.array([table.models.index(name) for name in router.models])
    parts = {}
    for key, part in (("dev", dev), ("test", test)):
        router.see(part)
        parts[key] = router.estimate(part.prompts)
        parts[f"{key}_overhead"], seconds = router.overhead(part.prompts)
        parts[f"{key}_fixed"] = router.decide(part.prompts)
    return Estimates(columns, **parts), np.asarray(seconds)


# ---------------------------------------------------------------- the reward

def _reward(name: str, cost_weight: float | None, table: OutcomeTable, views: Sequence[View]) -> Any:
    from routewright.reward import Reward

    if name == "a2c":
        raise UserError("--reward a2c counts retries, which a router never makes; use linear, binary or capped")
    settings = {} if cost_weight is None else {"cost_weight": cost_weight}
    if name == "linear" and cost_weight is None:
        seen = np.concatenate([views[0].train, views[0].dev])
        settings["cost_weight"] = indifference_weight(table.rows(seen))
    return Reward.named(name, **settings)


def _reward_card(reward: Any, name: str, cost_weight: float | None) -> dict[str, Any]:
    """What was rewarded, without the settings that this kind does not read."""
    read = {"linear": ("cost_weight",), "binary": ("cost_weight", "K"), "capped": ("cost_weight", "K", "cost_max")}
    source = "given" if cost_weight is not None else "indifference" if name == "linear" else "preset"
    return {"name": name, "kind": reward.kind, "cost_weight_source": source,
            **{k: v if np.isfinite(v) else None for k, v in asdict(reward).items() if k in read[reward.kind]}}


# ---------------------------------------------------------------- what is said beside the scores

def _cache_card(table: OutcomeTable, cache: str) -> dict[str, Any]:
    return {"path": str(cache), "fingerprint": table.fingerprint, "prompts": table.n, "models": list(table.models),
            "pool": table.pool.name, "prices_dated": table.pool.prices_dated, "estimated_tokens": table.estimated,
            "recorded_latency": bool(np.isfinite(table.latency).all())}


def _warnings(results: Mapping[str, Any], table: OutcomeTable) -> list[str]:
    said = []
    if table.estimated:
        said.append("token counts of this cache were estimated from characters (4 per token), so every cost rests on "
                    "an estimate")
    tests = [v["test"] for v in results["views"]]
    if min(tests) < 100:
        said.append(f"only {min(tests)} test prompts: intervals are wide and percentile intervals run short")
    for name, router in results["routers"].items():
        if router["control"]:
            continue
        point = router["points"]["balanced"]
        largest = max(point["shares"], key=lambda m: point["shares"][m] or 0.0)
        if min(max(s) for s in router["settings"]["shares"]) >= 0.98:
            said.append(f"{name} sends at least 98 % of the prompts to one model at every setting: it is a constant in "
                        "disguise")
        elif point["largest_share"] >= 0.98:
            said.append(f"{name} sends {point['largest_share']:.0%} of the prompts to {largest} at its balanced "
                        "setting: there it is a constant in all but name")
    short = [n for n, r in results["routers"].items()
             if not r["control"] and r["points"]["parity"]["dev_quality_difference"] < -1e-12]
    if short:
        said.append(f"the best single model's quality on dev is out of reach for {', '.join(short)}: the parity "
                    "setting is the one that comes nearest")
    if not np.isfinite(table.latency).all():
        said.append("latency was not recorded for every answer and is left out")
    return said


def _check_ledger(comparison: Comparison) -> None:
    """The reported costs are the sums of the ledger."""
    ledger, results = comparison.decisions, comparison.results
    spent = ledger["cost_usd"] + ledger["overhead_usd"]
    for name, router in results["routers"].items():
        for point, said in router["points"].items():
            mine = (ledger["router"] == name) & (ledger["point"] == point)
            per_view = [spent[mine & (ledger["view"] == view)].mean() * 1000 for view in router["views"]]
            assert np.isclose(np.mean(per_view), said["cost_per_1k"]["value"],
                              rtol=1e-9), f"{name}: costs do not add up"


def _examples(table: OutcomeTable, views: Sequence[View], contestants: Sequence[Contestant],
              comparison: Comparison) -> dict[str, Any]:
    """The costliest mistakes and the dearest needless calls of each router: balanced setting, first view."""
    lead = comparison.results["headline"].get("router")
    found = {}
    for contestant in contestants:
        if contestant.is_control:
            continue
        view = next(iter(contestant.estimates))
        run = comparison.swept[contestant.name, view]
        rows, picks = views[view].test, run.decisions[run.chosen["balanced"]]
        quality, cost = table.quality[rows], table.cost[rows]
        at = np.arange(len(rows))
        ideal = metrics.oracle(quality, cost)
        lost = quality[at, ideal] - quality[at, picks]
        wasted = cost[at, picks] - cost[at, ideal]
        limit = MANY_EXAMPLES if contestant.name == lead else FEW_EXAMPLES
        wrong = np.lexsort((at, -cost[at, picks], -lost))
        needless = np.lexsort((at, -wasted))
        found[contestant.name] = {
            "mistakes": [_example(table, rows[i], picks[i], ideal[i]) for i in wrong[:limit] if lost[i] > 0],
            "n_mistakes": int((lost > 0).sum()),
            "needless": [_example(table, rows[i], picks[i], ideal[i])
                         for i in needless if lost[i] <= 0 < wasted[i]][:limit],
            "n_needless": int(((lost <= 0) & (wasted > 0)).sum()),
            "wasted_usd": clean(wasted[(lost <= 0) & (wasted > 0)].sum()), "n": len(rows)}
    return found


def _example(table: OutcomeTable, row: int, pick: int, ideal: int) -> dict[str, Any]:
    prompt = table.prompts[row]
    said = table.responses[row] if table.responses is not None else {}
    rest = [j for j in table.cost[row].argsort(kind="stable").tolist() if j not in (pick, ideal)]
    shown = list(dict.fromkeys([int(pick), int(ideal)])) + rest
    shown = sorted(shown[:MOST_ANSWERS], key=lambda j: (table.cost[row, j], j))
    return {"prompt_id": prompt.prompt_id, "task": prompt.task, "prompt": _short(prompt.prompt),
            "context": _short(prompt.context),
            "reference": _short("" if prompt.reference is None else str(prompt.reference)),
            "picked": table.models[pick], "ideal": table.models[ideal],
            "others": max(0, table.m - len(shown)),
            "answers": [{"model": table.models[j], "quality": clean(table.quality[row, j]),
                         "cost_usd": clean(table.cost[row, j]),
                         "response": _short(said.get(table.models[j], ""))} for j in shown]}


def _short(text: str) -> str:
    return text if len(text) <= LONGEST_TEXT else f"{text[:LONGEST_TEXT].rstrip()} ... ({len(text):,} characters)"


def _provenance(cache: str, table: OutcomeTable, comparison: Comparison) -> dict[str, Any]:
    from routewright.routers.base import versions

    return {"command": tracking.masked_command(["python", *sys.argv]),
            "written": datetime.now(UTC).isoformat(timespec="seconds"),
            "git": _git_commit(), "versions": versions(), "cache": str(cache), "cache_fingerprint": table.fingerprint,
            "pool": table.pool.name, "prices_dated": table.pool.prices_dated, "views": comparison.results["views"]}


def _git_commit() -> str:
    """The commit of the code that ran, marked where the tree had changes; "" outside of a repository."""
    import subprocess

    here = Path(__file__).parent
    try:
        commit = subprocess.run(["git", "-C", str(here), "rev-parse", "HEAD"], capture_output=True, text=True,
                                timeout=10)
        changed = subprocess.run(["git", "-C", str(here), "status", "--porcelain", "--untracked-files=no"],
                                 capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return commit.stdout.strip() + (" with changes" if changed.stdout.strip() else "") if commit.returncode == 0 else ""


# ---------------------------------------------------------------- files

def slugs(names: Iterable[str]) -> dict[str, str]:
    """Router -> its name as part of a file name, distinct for each."""
    found: dict[str, str] = {}
    for name in names:
        mark = re.sub(r"[^A-Za-z0-9._-]+", "-", name).strip("-.") or "router"
        while mark in found.values():
            mark += "_"
        found[name] = mark
    return found


def _write(folder: Path, table: OutcomeTable, views: Sequence[View], comparison: Comparison, timing: dict[str, Any],
           provenance: dict[str, Any], examples: dict[str, Any], plots: bool) -> None:
    from routewright import report

    results = comparison.results
    folder.mkdir(parents=True, exist_ok=True)
    for stale in (*folder.glob("results_*.json"), *(folder / f"{name}.png" for name in report.CHARTS)):
        stale.unlink(missing_ok=True)  # of an earlier run with other routers
    write_atomic(folder / "samples.csv", _samples_csv(table, views))
    _write_decisions(folder / "decisions.parquet", comparison.decisions)
    for name, mark in slugs(results["routers"]).items():
        write_json(folder / f"results_{mark}.json",
                   {"name": name, **results["routers"][name], "examples": examples.get(name)})
    write_json(folder / "timing.json", timing)
    write_json(folder / "provenance.json", provenance)
    write_json(folder / "comparison.json", results)
    write_atomic(folder / "leaderboard.md", report.markdown(results))
    specs = report.chart_specs(results)
    if plots:
        from routewright.charts import write_png

        for name, spec in specs.items():
            write_png(folder / f"{name}.png", spec)
    write_atomic(folder / "report.html", report.html(results, specs, examples, provenance, timing))
    report.terminal(results)
    print(f"report: {folder / 'report.html'}", flush=True)


def _samples_csv(table: OutcomeTable, views: Sequence[View]) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["view", "prompt_id", "task", "group", "prompt"])
    for view in views:
        for i in view.test:
            prompt = table.prompts[i]
            writer.writerow([view.name, prompt.prompt_id, prompt.task, prompt.group, prompt.prompt])
    return text.getvalue()


def _write_decisions(path: Path, columns: Mapping[str, np.ndarray]) -> None:
    import pyarrow as arrow
    import pyarrow.parquet as parquet

    table = arrow.table({key: arrow.array(values) for key, values in columns.items()})
    write_atomic(path, lambda file: parquet.write_table(table, file, compression="zstd"))


# ---------------------------------------------------------------- W&B

def _track(folder: Path, results: Mapping[str, Any], mode: str, project: str, plots: bool) -> None:
    from routewright import report

    config = {"reward": results["reward"], "cache": results["cache"], "seeds": [v["seed"] for v in results["views"]],
              "n_resamples": results["n_resamples"], "level": results["level"]}
    with tracking.start(project, f"evaluate {folder.name}", folder, config, mode=mode, job_type="evaluate",
                        tags=["evaluation"]) as run:
        for name, mark in slugs(results["routers"]).items():
            router = results["routers"][name]
            run.define(f"frontier/{mark}/*", step=f"frontier/{mark}/cost_per_1k")
            settings = router["settings"]
            for place in settings["frontier"]:
                run.log({f"frontier/{mark}/cost_per_1k": settings["test_cost_per_1k"][place],
                         f"frontier/{mark}/quality": settings["test_quality"][place],
                         f"frontier/{mark}/cost_weight": settings["cost_weight"][place]})
            point = router["points"]["balanced"]
            run.summary({f"{mark}/quality": point["quality"]["value"],
                         f"{mark}/cost_per_1k": point["cost_per_1k"]["value"],
                         f"{mark}/versus_mix": point["versus_mix"]["value"], f"{mark}/verdict": router["verdict"],
                         f"{mark}/aiq": router["aiq"]["value"], f"{mark}/regret": point["regret"]["value"]})
        run.summary({"headline": results["headline"]["text"]})
        columns, rows = report.leaderboard_rows(results)
        run.table("leaderboard", columns, rows)
        if plots:
            run.image("frontier", folder / "frontier.png", results["headline"]["text"])
        files = [folder / n for n in ("comparison.json", "leaderboard.md", "decisions.parquet", "samples.csv",
                                      "report.html")]
        run.artifact(f"evaluation-{results['cache']['fingerprint']}", "evaluation", files,
                     {"headline": results["headline"]["text"]})
