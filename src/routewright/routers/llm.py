"""Routers that are language models: `llm` (supervised, or a base model as it is) and `dpo` (preference-trained).

The network reads the prompt in the words of a `Template` and would answer with one token: the label of a model, or a
level of difficulty. The router never lets it speak. It reads the logits of the allowed tokens in one forward pass and
turns them into quality estimates with a calibration fitted on outcomes the network was not trained on. So the estimate
is a probability per model, equal for equal prompts, and a score of the wrong polarity cannot turn it upside down.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Self

import numpy as np

from routewright.calibration import Calibration
from routewright.errors import UserError
from routewright.language_models import (
    ADAPTER_CARD,
    DTYPES,
    adapter_base,
    check_weights,
    choose_wrap,
    encode_instructions,
    features,
    find_folder,
    label_ids,
    label_logits,
    load_causal,
    weights_hash,
)
from routewright.routers.base import (
    CARD,
    WEIGHTS,
    Router,
    check_options,
    pool_from_card,
    prompt_hashes,
    prompt_text,
    prompts_behind,
    read_card,
)
from routewright.schema import Prompt
from routewright.templates import MODES, STYLES, WRAPS, Template

if TYPE_CHECKING:
    from routewright.language_models import Say
    from routewright.outcomes import OutcomeTable
    from routewright.pool import Pool

_DEFAULTS: dict[str, Any] = {"mode": "difficulty", "style": "full", "about": "", "wrap": "auto", "max_length": 512,
                             "batch_size": 32, "four_bit": False, "dtype": "fp32"}
_TAKEN_FROM_TRAINING = ("mode", "style", "about", "wrap")  # a trained network knows no other way to be asked
_NETWORK_FILES = ("*.json", "*.jinja", "*.model", "*.txt", "*model*.safetensors")
_NOT_IN_CARD = ("kind", "name", "models", "pool", "options", "decision", "created_with")


@dataclass(kw_only=True)
class LlmRouter(Router):
    """A causal language model that chooses among labels, calibrated.

    path: a folder of train_llm.py (or one that this router saved), whole or adapter. It needs no fitting.
    model: or a base model as it is, a folder or a hub id. Nothing of it is trained; `fit` calibrates what it says on
    the train split. CoBench's `llm` router is this in mode `difficulty`.
    Empty options mean: as router.json says, else difficulty, full, auto, 512, 32, fp32.
    """

    kind: ClassVar[str] = "llm"
    trainer: ClassVar[str] = "train_llm.py"

    path: str = ""
    model: str = ""
    mode: str = ""
    style: str = ""
    about: str | None = None
    wrap: str = ""
    max_length: int | None = None
    batch_size: int | None = None
    four_bit: bool | None = None
    dtype: str = ""

    template: Template | None = field(default=None, init=False, repr=False)
    calibration: Calibration | None = field(default=None, init=False, repr=False)
    _trained: bool = field(default=False, init=False, repr=False)  # whether `path` is a finished router folder
    _loaded: tuple[Any, Any] | None = field(default=None, init=False, repr=False)
    _answers: list[int] | None = field(default=None, init=False, repr=False)  # the tokens of the labels

    def __post_init__(self) -> None:
        own = bool(self.path) and (Path(self.path) / CARD).is_file()
        if not own and bool(self.path) == bool(self.model):
            raise UserError(f"router {self.name or self.kind!r}: {self.kind} needs `path`, the folder that "
                            f"{self.trainer} wrote, or `model`, a base model to be used as it is")
        if own:
            self._take_folder(Path(self.path))
        for name, default in _DEFAULTS.items():
            if self._is_unset(name):
                setattr(self, name, default)
        super().__post_init__()
        self._check_options()

    def _is_unset(self, name: str) -> bool:
        return getattr(self, name) == getattr(type(self), name)  # the default of a field is the class's attribute

    def _check_options(self) -> None:
        for name, allowed in {"mode": MODES, "style": STYLES, "wrap": ("auto", *WRAPS), "dtype": DTYPES}.items():
            if getattr(self, name) not in allowed:
                raise UserError(f"router {self.name!r}: {name} must be one of {', '.join(allowed)}; "
                                f"got {getattr(self, name)!r}")
        if self.batch_size < 1 or self.max_length < 1:
            raise UserError(f"router {self.name!r}: batch_size and max_length must be at least 1; got "
                            f"{self.batch_size} and {self.max_length}")

    # ------------------------------------------------------------ the contract

    @property
    def needs_training(self) -> bool:  # type: ignore[override]
        """Whether `fit` learns anything: yes for a base model as it is, no for a folder that was trained."""
        return not self._trained

    @property
    def trained_models(self) -> tuple[str, ...]:
        """The models that the template offers and the calibration knows; () before `fit`."""
        return self.template.models if self.calibration is not None else ()

    def fit(self, train: OutcomeTable, dev: OutcomeTable | None = None, seed: int = 0) -> Self:
        """Calibrate a base model on the train split. A trained folder only takes over the models it shares."""
        return self.bind(train.models, train.pool) if self._trained else super().fit(train, dev, seed)

    def bind(self, models: Sequence[str], pool: Pool | None) -> Self:
        """Take over the models of a pool. Of those a trained folder names, the ones in the pool stay, in its order."""
        if not self._trained:
            return super().bind(models, pool)
        return self.bind_known(self.trained_models, models, pool, self.path)

    def choices(self, prompts: Sequence[Prompt]) -> np.ndarray:
        """The label the network would emit for each prompt (N,): a column of `models`, or a level of difficulty."""
        if not prompts:
            return np.zeros(0, dtype=np.int64)
        logits = self._logits(prompts)
        if self.template.mode == "decision":
            logits = logits[:, self._columns()]
        return logits.argmax(axis=1)

    @classmethod
    def load(cls, folder: str | Path, **options: Any) -> Self:
        return cls(**check_options(cls, {"path": str(folder), **options}, str(Path(folder) / CARD)))

    def save(self, folder: str | Path) -> Path:
        """Copy the network, if it lies in a router folder, and write calibration and router.json."""
        source, folder = Path(self.path or folder), Path(folder)
        if source.resolve() != folder.resolve():
            folder.mkdir(parents=True, exist_ok=True)
            (folder / CARD).unlink(missing_ok=True)
            for file in (found for pattern in _NETWORK_FILES for found in source.glob(pattern)):
                if file.name not in (CARD, WEIGHTS):
                    shutil.copyfile(file, folder / file.name)
        return super().save(folder)

    def as_card(self) -> dict[str, Any]:
        card = super().as_card()
        card["options"] = {key: value for key, value in card["options"].items() if key != "path"}
        return {**card, "template": self.template.as_card() if self.template else None}

    # ------------------------------------------------------------ learning and estimating

    def _fit(self, train: OutcomeTable, dev: OutcomeTable | None, seed: int) -> None:
        self.template = Template.of_pool(train.pool, train.models, self.mode, self.style, self.about)
        self._answers = None
        self.card |= {"base_model": self.model or self.path, "calibrated_on": {"split": "train", "prompts": train.n},
                      "base_weights": weights_hash(self._network_folder())}
        met = prompts_behind(self._network_folder())
        self.card["train_prompts"] = sorted({*self.card["train_prompts"], *met})
        self.calibration = Calibration.fit(features(self.template, self._logits(train.prompts)), train.quality_mean)

    def _estimate(self, prompts: Sequence[Prompt]) -> np.ndarray:
        if self.calibration is None:
            raise UserError(f"router {self.name!r}: {self.path} holds no router.json, so nothing says how its answers "
                            "translate into quality; give it as `model:` instead of `path:`, and it is calibrated on "
                            "the train split")
        read = features(self.template, self._logits(prompts))
        return self.calibration.apply(read)[:, self._columns()]

    def _columns(self) -> list[int]:
        return [self.template.models.index(name) for name in self.models]

    def _logits(self, prompts: Sequence[Prompt]) -> np.ndarray:
        """(N, K) logits of the labels."""
        network, tokenizer = self._load()
        wrap = choose_wrap(self.wrap, tokenizer)
        if self._answers is None:
            self._answers = label_ids(tokenizer, self.template, wrap)
            known = self.card.setdefault("answer_tokens", self._answers)
            if known != self._answers:
                raise UserError(f"router {self.name!r}: it was trained to answer with the tokens {known} and the "
                                f"tokenizer beside it now gives {self._answers}; put its own tokenizer there, or train "
                                "it again")
        return prompt_logits(network, tokenizer, self.template, wrap, prompts, self.max_length, self._answers,
                             self.batch_size)

    def _load(self) -> tuple[Any, Any]:
        if self._loaded is None:
            folder = self._network_folder()
            if not (folder / ADAPTER_CARD).is_file() and self.card.get("base_weights"):
                check_weights(folder, self.card["base_weights"], f"router {self.name!r}")
            self._loaded = load_causal(folder, four_bit=self.four_bit, dtype=self.dtype)
        return self._loaded

    def _network_folder(self) -> Path:
        holds = self.path and any((Path(self.path) / name).is_file() for name in (ADAPTER_CARD, "config.json"))
        return find_folder(self.path if holds or not self.model else self.model)

    # ------------------------------------------------------------ the folder

    def _take_folder(self, folder: Path) -> None:
        card = read_card(folder)
        if card["kind"] != self.kind:
            raise UserError(f"{folder / CARD}: kind is {card['kind']!r}, not {self.kind!r}; load it by `path` alone")
        where = str(folder / CARD)
        self.template = Template.from_card(card.get("template") or {}, where)
        options = card.get("options") or {}
        stored = check_options(type(self), {k: v for k, v in options.items() if k != "name"}, where)
        for name in _TAKEN_FROM_TRAINING:
            given, known = getattr(self, name), stored.get(name, _DEFAULTS[name])
            if not self._is_unset(name) and given != known:
                raise UserError(f"{folder}: the router was trained with {name} {known!r} and is asked for {given!r}; "
                                f"leave {name} away, or train another")
        for name, value in stored.items():
            if self._is_unset(name):
                setattr(self, name, value)
        self.models, self.pool = tuple(card["models"]), pool_from_card(card.get("pool"), folder)
        self.name = self.name or str(card.get("name") or "")
        self.decision = dict(card.get("decision") or {})
        self.card = {key: value for key, value in card.items() if key not in _NOT_IN_CARD}
        self._read_calibration(folder)
        self._trained = True

    def _read_calibration(self, folder: Path) -> None:
        from safetensors import SafetensorError
        from safetensors.numpy import load_file

        try:
            state = load_file(folder / WEIGHTS)
            self.calibration = Calibration.from_state(state, len(self.template.models))
            if not all(np.isfinite(array).all() for array in state.values()):
                raise ValueError("it holds what is no number")
            if set(self.models) - set(self.template.models):
                raise ValueError("the template does not name all models")
        except KeyError as error:
            raise UserError(f"{folder / WEIGHTS}: lacks {error}; train or fetch the router again") from None
        except (SafetensorError, OSError, ValueError) as error:
            raise UserError(f"{folder / WEIGHTS}: does not fit {CARD} ({str(error)[:150]}); train or fetch the router "
                            "again") from None

    def _state(self) -> dict[str, np.ndarray]:
        return self.calibration.state() if self.calibration is not None else {}

    def _base_model(self) -> str:
        return str(self.card.get("base_model") or self.model)


@dataclass(kw_only=True)
class DpoRouter(LlmRouter):
    """A language model trained on preferences between decisions (train_dpo.py): base model and LoRA adapter."""

    kind: ClassVar[str] = "dpo"
    trainer: ClassVar[str] = "train_dpo.py"


_CLASSES = {cls.kind: cls for cls in (LlmRouter, DpoRouter)}


def prompt_logits(model: Any, tokenizer: Any, template: Template, wrap: str, prompts: Sequence[Prompt],
                  max_length: int, ids: Sequence[int], batch_size: int = 32) -> np.ndarray:
    """(N, K) logits of the template's labels `ids` for prompts: what a router reads, in training as in serving."""
    rows = encode_instructions(tokenizer, template, wrap, [template.render(prompt_text(p)) for p in prompts],
                               max_length)
    return label_logits(model, rows, ids, batch_size, tokenizer.pad_token_id or 0)


def write_llm_router(folder: str | Path, *, kind: str, model: Any, tokenizer: Any, template: Template, wrap: str,
                     max_length: int, base_model: str, four_bit: bool, train: OutcomeTable,
                     dev: OutcomeTable | None, seed: int, say: Say, **more: Any) -> LlmRouter:
    """Calibrate a trained network and make its folder a router folder; router.json is written last.

    The weights (whole, or an adapter) lie in `folder` already; `model` is the same network in memory. It is calibrated
    on `dev`, and on `train` where there is none, which makes it too sure of itself. `more` goes into router.json;
    where training began with another router folder (`base_model`, or `warm_start` in `more`), its prompts count as met.
    Every rank may call it; rank 0 writes. Returns the router, with the network loaded.
    """
    folder = Path(folder)
    if os.environ.get("RANK", "0") == "0":
        (folder / CARD).unlink(missing_ok=True)
    table, split = (dev, "dev") if dev is not None and dev.n else (train, "train")
    if split == "train":
        say("WARNING: calibrated on the train split, for want of a dev split; the estimates will be too sure")
    ids = label_ids(tokenizer, template, wrap)
    logits = prompt_logits(model, tokenizer, template, wrap, table.prompts, max_length, ids)
    router = _CLASSES[kind](name=folder.name, path=str(folder), mode=template.mode, style=template.style,
                            about=template.about, wrap=wrap, max_length=max_length, four_bit=four_bit,
                            dtype=_dtype_of(model))
    unknown = [name for name in template.models if name not in table.models]
    if unknown:
        raise UserError(f"the template offers {unknown[0]!r}, which the cache does not hold (it holds "
                        f"{', '.join(table.models)}); calibrate on the cache that the set was built from")
    quality = table.quality_mean[:, [table.models.index(name) for name in template.models]]
    router.template, router.calibration = template, Calibration.fit(features(template, logits), quality)
    Router.bind(router, template.models, train.pool)
    router.card = {**more, **prompt_hashes(train.prompts, dev.prompts if dev is not None else ()),
                   "cache_fingerprint": train.fingerprint, "seed": seed, "base_model": base_model,
                   "answer_tokens": ids, "calibrated_on": {"split": split, "prompts": table.n}}
    router.card["train_prompts"] = sorted({*router.card["train_prompts"], *prompts_behind(base_model),
                                           *prompts_behind(more.get("warm_start") or base_model)})
    router._loaded, router._trained = (model, tokenizer), True
    if os.environ.get("RANK", "0") == "0":
        adapter = (folder / ADAPTER_CARD).is_file()
        router.card["base_weights"] = weights_hash(adapter_base(folder) if adapter else folder)
        if not adapter and not (folder / "tokenizer.json").is_file():
            tokenizer.save_pretrained(folder)
        router.save(folder)
    return router


def _dtype_of(model: Any) -> str:
    import torch

    network = getattr(model, "module", model)
    return "fp32" if network.get_input_embeddings().weight.dtype == torch.float32 else "bf16"
