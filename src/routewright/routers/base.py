"""The router contract: fit, estimate, save, load, and the router folder that evaluation and serving know.

A router predicts, before any model is called, how good each model's answer to a prompt would be. `decide` turns
those estimates into decisions. Options of a router are the init fields of its dataclass, so a YAML entry, a
command line and a router.json hold the same names and are checked in one place.

A router folder holds `router.json` (written last: a folder without it is unfinished), `weights.safetensors` and
plain JSON. Nothing in it is ever unpickled.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.metadata
import json
import logging
import math
import os
import re
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Self

import numpy as np

from routewright.errors import UserError
from routewright.prompts import full_text
from routewright.schema import Prompt
from routewright.textfiles import nearest, write_atomic, write_json

if TYPE_CHECKING:
    from routewright.outcomes import OutcomeTable
    from routewright.pool import Pool

CARD = "router.json"
WEIGHTS = "weights.safetensors"
ROUTER_KINDS: dict[str, str] = {  # kind -> module:class, imported on use so that this package stays light
    "always": "controls:AlwaysRouter",
    "random_mix": "controls:RandomMixRouter",
    "fixed_split": "controls:FixedSplitRouter",
    "shuffled": "controls:ShuffledRouter",
    "oracle": "controls:OracleRouter",
    "length": "controls:LengthRouter",
    "group_table": "controls:GroupTableRouter",
    "knn": "embedding:KnnRouter",
    "linear": "embedding:LinearRouter",
    "mf": "embedding:MfRouter",
    "deberta": "deberta:DebertaRouter",
    "trained_deberta": "deberta:TrainedDebertaRouter",
    "llm": "llm:LlmRouter",
    "dpo": "llm:DpoRouter",
    "probe": "probe:ProbeRouter",
    "self_questioning": "scores:SelfQuestioningRouter",
    "logit_score": "scores:LogitScoreRouter",
    "semantic_entropy": "scores:SemanticEntropyRouter",
}
_CARD_TYPES = {"kind": str, "name": str, "options": dict, "decision": dict, "pool": dict, "train_prompts": list,
               "dev_prompts": list}
_PROBE_PROMPTS = 64  # how many prompts are timed when overhead is asked for before any estimate
_VERSIONED = ("numpy", "scipy", "scikit-learn", "torch", "transformers", "sentence-transformers")

log = logging.getLogger(__name__)


def prompt_text(prompt: Prompt) -> str:
    """What a router reads of a prompt: the question, then its context, so that a cut at the end spares the question."""
    return full_text(prompt)


@dataclass(kw_only=True)
class Router:
    """One router. Subclasses implement `_fit`, `_estimate`, `_state` and `_set_state`.

    kind            its name in YAML and router.json
    needs_training  whether `fit` learns anything (else it only takes over the models and prices)
    is_control      a yardstick, never a product
    content_free    its decisions do not depend on what the prompt says
    needs_outcomes  it must be shown the outcomes it is scored on (`see`): the oracle
    """

    kind: ClassVar[str] = ""
    needs_training: ClassVar[bool] = True
    is_control: ClassVar[bool] = False
    content_free: ClassVar[bool] = False
    needs_outcomes: ClassVar[bool] = False

    name: str = ""
    gpu_usd_per_hour: float = 0.0  # turns the router's own measured seconds into dollars; 0: the machine is yours

    models: tuple[str, ...] = field(default=(), init=False)
    pool: Pool | None = field(default=None, init=False, repr=False)
    decision: dict[str, float] = field(default_factory=dict, init=False)  # {"cost_weight": w} or {"threshold": t}
    card: dict[str, Any] = field(default_factory=dict, init=False, repr=False)  # provenance, filled by fit and load
    seconds_per_prompt: float | None = field(default=None, init=False, repr=False)  # measured by the last estimate

    def __post_init__(self) -> None:
        self.name = self.name or self.kind

    # ------------------------------------------------------------ the contract

    def fit(self, train: OutcomeTable, dev: OutcomeTable | None = None, seed: int = 0) -> Self:
        """Learn from the outcomes of the train split; `dev` chooses sizes and stops training. Returns self."""
        self.bind(train.models, train.pool)
        self.card = {"cache_fingerprint": train.fingerprint, "seed": seed}
        if self.needs_training:
            self.card |= prompt_hashes(train.prompts, dev.prompts if dev is not None else ())
        self._fit(train, dev, seed)
        return self

    def bind(self, models: Sequence[str], pool: Pool | None) -> Self:
        """Take over the models (the columns of every estimate) and their prices. Returns self."""
        self.models = tuple(models)
        self.pool = pool.subset(models) if pool is not None else None
        return self

    def bind_known(self, known: Sequence[str], models: Sequence[str], pool: Pool | None, path: str) -> Self:
        """`bind` of a router folder at `path` whose outputs stand for `known`: those in the pool stay, in its order."""
        kept = [name for name in known if name in models]
        if not kept:
            raise UserError(f"{path}: the router knows {', '.join(known)}, and the pool has none of them (it has: "
                            f"{', '.join(models)}); evaluate it on the models it was trained for")
        return Router.bind(self, kept, pool or self.pool)

    def estimate(self, prompts: Sequence[Prompt]) -> np.ndarray:
        """Predicted quality, (N, M) float64 in [0, 1], columns in the order of `self.models`."""
        if not self.models:
            raise UserError(f"router {self.name!r} ({self.kind}) does not know its models yet; fit it on a cache, "
                            "or load a folder whose router.json names them")
        if not prompts:
            return np.zeros((0, len(self.models)))
        start = time.perf_counter()
        estimate = np.asarray(self._estimate(prompts), dtype=np.float64)
        self.seconds_per_prompt = (time.perf_counter() - start) / len(prompts) + self._hidden_seconds()
        assert estimate.shape == (len(prompts), len(self.models)), f"{self.kind}: {estimate.shape}"
        if not np.isfinite(estimate).all():
            row = int(np.flatnonzero(~np.isfinite(estimate).all(axis=1))[0])
            raise UserError(f"router {self.name!r}: its estimate for prompt {prompts[row].prompt_id!r} is not a "
                            "number; the weights are damaged, so train or fetch the folder again")
        return np.clip(estimate, 0.0, 1.0)

    def overhead(self, prompts: Sequence[Prompt]) -> tuple[np.ndarray, np.ndarray]:
        """What the router itself costs: USD (N,) and seconds (N,) per prompt.

        Seconds are the mean of the last estimate on this machine, made in batches: a single request waits longer.
        """
        if self.seconds_per_prompt is None and prompts:
            self.estimate(prompts[:_PROBE_PROMPTS])
        seconds = np.full(len(prompts), self.seconds_per_prompt or 0.0)
        return seconds * self.gpu_usd_per_hour / 3600.0, seconds

    def decide(self, prompts: Sequence[Prompt]) -> np.ndarray | None:
        """Model indices (N,) where the decision does not follow from the estimates (some controls); else None."""
        return None

    def see(self, table: OutcomeTable) -> None:
        """Be shown the outcomes that will be scored. Only the oracle looks."""

    # ------------------------------------------------------------ the folder

    def save(self, folder: str | Path) -> Path:
        """Write the router folder; router.json comes last, so an interrupted save is never mistaken for a router."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / CARD).unlink(missing_ok=True)
        state = {key: np.ascontiguousarray(value) for key, value in self._state().items()}
        if state:
            from safetensors.numpy import save as to_bytes

            write_atomic(folder / WEIGHTS, to_bytes(state))
        self._save_parts(folder)
        write_json(folder / CARD, self.as_card())
        return folder

    def as_card(self) -> dict[str, Any]:
        """The content of router.json."""
        return {**self.card, "kind": self.kind, "name": self.name, "models": list(self.models),
                "pool": pool_card(self.pool), "base_model": self._base_model(), "options": self.options,
                "decision": self.decision, "created_with": versions()}

    @classmethod
    def load(cls, folder: str | Path, **options: Any) -> Self:
        """Read a folder that `save` wrote. `options` win over those in router.json."""
        folder = Path(folder)
        card = read_card(folder)
        if card["kind"] != cls.kind:
            raise UserError(f"{folder / CARD}: kind is {card['kind']!r}, not {cls.kind!r}; load it with load_router")
        stored = {key: value for key, value in card.get("options", {}).items() if key != "name"}
        router = cls(**check_options(cls, {"name": card.get("name", ""), **stored, **options}, str(folder / CARD)))
        router.models = tuple(card["models"])
        router.pool = pool_from_card(card.get("pool"), folder)
        router.decision = dict(card.get("decision") or {})
        router.card = {key: card[key] for key in card if key not in
                       ("kind", "name", "models", "pool", "base_model", "options", "decision", "created_with")}
        router._load_parts(folder)
        try:
            router._set_state(_read_weights(folder))
        except (KeyError, IndexError, TypeError, ValueError) as error:
            if isinstance(error, UserError):
                raise
            what = f"lacks {error}" if isinstance(error, KeyError) else f"does not fit {CARD} ({error})"
            raise UserError(f"{folder / WEIGHTS}: {what}; train or fetch the router again") from None
        return router

    @property
    def options(self) -> dict[str, Any]:
        """What a YAML entry would hold."""
        return {f.name: getattr(self, f.name) for f in fields(self) if f.init and f.name != "name"}

    # ------------------------------------------------------------ what a kind implements

    def _fit(self, train: OutcomeTable, dev: OutcomeTable | None, seed: int) -> None:
        pass

    def _estimate(self, prompts: Sequence[Prompt]) -> np.ndarray:
        raise NotImplementedError

    def _state(self) -> dict[str, np.ndarray]:
        return {}

    def _set_state(self, state: dict[str, np.ndarray]) -> None:
        pass

    def _save_parts(self, folder: Path) -> None:
        pass

    def _load_parts(self, folder: Path) -> None:
        pass

    def _base_model(self) -> str:
        return ""

    def _hidden_seconds(self) -> float:
        """Seconds per prompt that the last estimate was spared by a cache."""
        return 0.0


# ---------------------------------------------------------------- making and loading

def router_class(kind: str) -> type[Router]:
    """The class of a kind. Raises UserError with the nearest name."""
    if kind not in ROUTER_KINDS:
        raise UserError(f"unknown router kind {kind!r}{nearest(str(kind), ROUTER_KINDS)}; "
                        f"known: {', '.join(ROUTER_KINDS)}")
    module, _, name = ROUTER_KINDS[kind].partition(":")
    return getattr(importlib.import_module(f"routewright.routers.{module}"), name)


def make_router(kind: str, **options: Any) -> Router:
    """An unfitted router from the options of a YAML entry. Texts may hold ${NAME} or ${NAME:-default}.

    Raises UserError for an unknown kind, an unknown option (with the nearest name) and a value of the wrong type.
    """
    cls = router_class(kind)
    return cls(**check_options(cls, expand(options), f"router {options.get('name', kind)!r}"))


def load_router(folder: str | Path, **options: Any) -> Router:
    """The router of a folder, whatever its kind. `options` (name, path forms ...) win over those in router.json.

    A sequence-classification checkpoint without router.json is taken as `trained_deberta`; it learns its models
    with `bind`. Raises UserError when the folder holds no router.
    """
    folder = Path(expand(str(folder)))
    if not (folder / CARD).is_file() and (folder / "config.json").is_file():
        return make_router("trained_deberta", path=str(folder), **options)
    return router_class(read_card(folder)["kind"]).load(folder, **expand(options))


def from_entry(entry: Mapping[str, Any], where: str = "router entry") -> Router:
    """The router of one YAML entry: `kind` plus options makes one, `path` alone loads a folder."""
    options = {str(key): value for key, value in entry.items()}
    kind = options.pop("kind", None)
    if kind is not None:
        return make_router(str(kind), **options)
    if "path" not in options:
        raise UserError(f"{where}: {dict(entry)!r} needs `kind` (one of {', '.join(ROUTER_KINDS)}) or `path` "
                        "(a router folder)")
    return load_router(options.pop("path"), **options)


def expand(value: Any) -> Any:
    """`value` with ${NAME} and ${NAME:-default} in its texts replaced from the environment, at any depth.

    Raises UserError when a variable is not set and has no default.
    """
    if isinstance(value, Mapping):
        return {key: expand(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [expand(item) for item in value]
    if not isinstance(value, str):
        return value

    def replace(match: re.Match[str]) -> str:
        name, default = match.group(1), match.group(2)
        found = os.environ.get(name) or default
        if found is None:
            raise UserError(f"{value!r}: the variable {name} is not set; run `export {name}=...` first, or write "
                            f"${{{name}:-some/default}}")
        return found

    return re.sub(r"\$\{(\w+)(?::-([^}]*))?\}", replace, value)


def check_options(cls: type[Router], options: Mapping[str, Any], where: str) -> dict[str, Any]:
    """The options, each known to the router and of the right type. Raises UserError."""
    known = {f.name: str(f.type) for f in fields(cls) if f.init}
    checked = {}
    for key, value in options.items():
        if key not in known:
            raise UserError(f"{where}: {cls.kind} has no option {key!r}{nearest(key, known)}; "
                            f"known: {', '.join(known)}")
        checked[key] = _of_type(value, known[key], f"{where}: {key}")
    return checked


_TYPES: dict[str, tuple[type, ...]] = {"str": (str,), "int": (int,), "float": (float,), "bool": (bool,),
                                       "list": (list, tuple), "dict": (dict,), "None": (type(None),), "Any": (object,)}


def _of_type(value: Any, annotation: str, where: str) -> Any:
    allowed = [part.split("[")[0].strip() for part in annotation.split("|")]
    if "float" in allowed and isinstance(value, int) and not isinstance(value, bool):
        return float(value) if "int" not in allowed else value
    if isinstance(value, bool) and "bool" not in allowed and "Any" not in allowed:
        raise UserError(f"{where} must be {annotation}; got {value!r}")
    if not any(isinstance(value, _TYPES.get(part, (object,))) for part in allowed):
        raise UserError(f"{where} must be {annotation}; got {value!r}")
    return value


# ---------------------------------------------------------------- router.json

def read_card(folder: str | Path) -> dict[str, Any]:
    """router.json of a folder, with `kind` and `models` present. Raises UserError."""
    path = Path(folder) / CARD
    if not path.is_file():
        state = "does not exist"
        if path.parent.is_dir():
            state = "has no router.json, so it is no router (or an unfinished one)"
        raise UserError(f"{path.parent}: the router folder {state}; a train_*.py script writes one")
    try:
        card = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path}: not JSON ({error}); train or fetch the router again") from None
    missing = [key for key in ("kind", "models") if not isinstance(card, dict) or key not in card]
    if missing:
        raise UserError(f"{path}: `{missing[0]}` is missing; train or fetch the router again")
    models = card["models"]
    named = isinstance(models, list) and all(isinstance(name, str) and name for name in models)
    wrong = [key for key, kind in _CARD_TYPES.items() if not isinstance(card.get(key), (kind, type(None)))]
    if wrong or not named or len(set(models)) != len(models):
        raise UserError(f"{path}: `{(wrong or ['models'])[0]}` is damaged; train or fetch the router again")
    bad = {key: value for key, value in (card.get("decision") or {}).items()
           if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value)}
    if bad:
        raise UserError(f"{path}: decision must hold numbers; got {bad}")
    return card


def write_card(folder: str | Path, *, kind: str, name: str, models: Sequence[str], pool: Pool | None,
               train_prompts: Iterable[Prompt], cache_fingerprint: str = "", base_model: str = "",
               options: Mapping[str, Any] | None = None, decision: Mapping[str, float] | None = None,
               dev_prompts: Iterable[Prompt] = (), **more: Any) -> Path:
    """router.json for a folder whose weights another program wrote (train_deberta). `more` is kept as it is."""
    return write_json(Path(folder) / CARD, {
        **more, **prompt_hashes(train_prompts, dev_prompts), "kind": kind, "name": name, "models": list(models),
        "pool": pool_card(pool), "cache_fingerprint": cache_fingerprint, "base_model": base_model,
        "options": dict(options or {}), "decision": dict(decision or {}), "created_with": versions()})


def prompt_hashes(prompts: Iterable[Prompt], dev: Iterable[Prompt] = ()) -> dict[str, Any]:
    """What router.json keeps of the train prompts, and of the dev prompts that calibrated or stopped it: enough to find
    an overlap, too little to read them."""
    from routewright.prompts import prompts_hash, text_hash

    prompts = list(prompts)
    ids = "\n".join(sorted(p.prompt_id for p in prompts))
    return {"train_prompts_hash": prompts_hash(prompts),
            "train_prompt_ids_hash": hashlib.sha256(ids.encode()).hexdigest(),
            "train_prompts": sorted({text_hash(p.prompt) for p in prompts}),
            **({"dev_prompts": sorted({text_hash(p.prompt) for p in dev})} if dev else {})}


def prompts_behind(folder: str | Path) -> set[str]:
    """Hashes of all prompts that made the network in a router folder; none of a folder without router.json.

    Who reads prompts with such a network, or trains it further, has met these prompts too.
    """
    if not (Path(folder) / CARD).is_file():
        return set()
    card = read_card(folder)
    return {*(card.get("train_prompts") or ()), *(card.get("dev_prompts") or ())}


def pool_card(pool: Pool | None) -> dict[str, Any] | None:
    """A pool as JSON: its prices travel with the router, so that its decisions can be made anywhere."""
    if pool is None:
        return None
    models = [{key: value for key, value in asdict(model).items() if value not in (None, (), "")}
              for model in pool.models]
    return {"name": pool.name, "prices_dated": pool.prices_dated, "models": models}


def pool_from_card(card: Mapping[str, Any] | None, folder: str | Path) -> Pool | None:
    """The pool a router.json holds, if any."""
    from routewright.pool import Pool, model_from_entry

    if not card:
        return None
    if not isinstance(card.get("models"), list):
        raise UserError(f"{Path(folder) / CARD}: pool is damaged (no list of models); train or fetch the router again")
    models = tuple(model_from_entry(model, f"{Path(folder) / CARD}: pool.models[{i}]")
                   for i, model in enumerate(card["models"]))
    return Pool(str(card.get("name", "")), models, str(card.get("prices_dated", "")), str(Path(folder) / CARD))


def versions() -> dict[str, str]:
    """Python and the libraries that shape estimates, as installed."""
    found = {"python": ".".join(map(str, sys.version_info[:3]))}
    for package in _VERSIONED:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def shaped(state: Mapping[str, np.ndarray], key: str, *shape: int | None, finite: bool = True) -> np.ndarray:
    """An array of the weights, if it has this shape (None: any size). KeyError or ValueError otherwise."""
    array = state[key]
    if array.ndim != len(shape) or any(want not in (None, have) for want, have in zip(shape, array.shape, strict=True)):
        raise ValueError(f"{key} has shape {array.shape}")
    if finite and not np.isfinite(array).all():
        raise ValueError(f"{key} holds what is no number")
    return array


def _read_weights(folder: Path) -> dict[str, np.ndarray]:
    path = folder / WEIGHTS
    if not path.is_file():
        return {}
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path}: not readable ({error}); train or fetch the router again") from None
