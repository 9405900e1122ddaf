"""Encoder routers: a frozen pretrained encoder with a fitted head, and checkpoints written by train_deberta.

CoBench's own `deberta` router left its head untrained, so its scores were noise. Here the head is always fitted, and
a checkpoint whose classification head is missing is refused rather than scored with random weights.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Self

import numpy as np

from routewright.encoders import find_weights, load_tokenizer, longest_input, quiet_loading, torch_device
from routewright.errors import MissingSetup, UserError
from routewright.routers.base import CARD, Router, check_options, pool_from_card, prompt_text, read_card
from routewright.routers.embedding import LinearRouter
from routewright.schema import Prompt

if TYPE_CHECKING:
    from routewright.outcomes import OutcomeTable
    from routewright.pool import Pool

FORMS = ("pool", "pair")


@dataclass(kw_only=True)
class DebertaRouter(LinearRouter):
    """Mean-pooled states of a frozen encoder, standardised, and a logistic head per model fitted on the train split.

    `encoder` is any encoder folder or hub id. It trains in the time of one pass over the prompts and is the honest
    baseline for `trained_deberta`, which also trains the encoder.
    """

    kind: ClassVar[str] = "deberta"

    encoder: str | dict = "microsoft/deberta-v3-base"
    standardise: bool = True


@dataclass(kw_only=True)
class TrainedDebertaRouter(Router):
    """A sequence-classification checkpoint: a folder of train_deberta, or one of CoBench without router.json.

    form `pool`: one output per model, a sigmoid each. form `pair`: the text is the question and a model's name, scored
    once per model; the estimate is the expected label, which with two labels is the softmax of class 1. Left empty, the
    form is read from router.json, else `pair` is taken for up to two outputs. `models` for a checkpoint without
    router.json come from the pool (`bind`).
    """

    kind: ClassVar[str] = "trained_deberta"
    needs_training: ClassVar[bool] = False

    path: str = ""
    form: str = ""
    max_length: int = 512
    batch_size: int = 32
    compat: bool | None = None  # CoBench's `question <SEP> llm_id <SEP>`; None: where the tokenizer knows <SEP>
    context: bool | None = None  # whether a prompt's context is read after the question; None: as train_deberta does

    trained_models: tuple[str, ...] = field(default=(), init=False)  # as router.json names them; () without one
    _loaded: tuple[Any, Any] | None = field(default=None, init=False, repr=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.path:
            raise UserError(f"router {self.name!r}: trained_deberta needs `path`, the folder that train_deberta.py "
                            "wrote")
        if self.form not in ("", *FORMS):
            raise UserError(f"router {self.name!r}: form must be pool or pair; got {self.form!r}")
        if (Path(self.path) / CARD).is_file():
            self._take_card(read_card(self.path))

    @classmethod
    def load(cls, folder: str | Path, **options: Any) -> Self:
        return cls(**check_options(cls, {"path": str(folder), **options}, str(Path(folder) / CARD)))

    def save(self, folder: str | Path) -> Path:
        """Copy the checkpoint and write its router.json."""
        source, folder = find_weights(self.path), Path(folder)
        if folder.resolve() != source.resolve():
            shutil.copytree(source, folder, dirs_exist_ok=True, ignore=shutil.ignore_patterns("checkpoint*", CARD))
        return super().save(folder)

    def as_card(self) -> dict[str, Any]:
        return {**super().as_card(), "form": self.form or self._form(), "options": {
            key: value for key, value in self.options.items() if key != "path"}}

    def bind(self, models: Sequence[str], pool: Pool | None) -> Self:
        """Take over the models of a pool. Of those that router.json names, the ones in the pool stay, in its order."""
        if not self.trained_models:
            return super().bind(models, pool)
        return self.bind_known(self.trained_models, models, pool, self.path)

    def fit(self, train: OutcomeTable, dev: OutcomeTable | None = None, seed: int = 0) -> Self:
        """The weights are trained already; this only binds the models."""
        return self.bind(train.models, train.pool)

    def _take_card(self, card: dict[str, Any]) -> None:
        if card["kind"] != self.kind:
            raise UserError(f"{Path(self.path) / CARD}: kind is {card['kind']!r}, not {self.kind!r}; load it by `path` "
                            "alone")
        stored = {**card.get("options", {}), **card}
        self.card = {key: value for key, value in card.items() if key not in
                     ("kind", "name", "models", "pool", "base_model", "options", "decision", "created_with")}
        self.name = self.name if self.name != self.kind else str(card.get("name") or self.kind)
        self.trained_models = self.models = tuple(card["models"])
        self.pool = pool_from_card(card.get("pool"), self.path)
        self.decision = dict(card.get("decision") or {})
        self.form = self.form or stored.get("form", "")
        self.compat = stored.get("compat") if self.compat is None else self.compat
        self.context = stored.get("context") if self.context is None else self.context
        if isinstance(stored.get("max_length"), int):
            self.max_length = min(self.max_length, stored["max_length"])

    def _base_model(self) -> str:
        return str(self.card.get("base_model", ""))

    # ------------------------------------------------------------ scoring

    def _load(self) -> tuple[Any, Any]:
        if self._loaded is None:
            self._loaded = load_classifier(self.path)
        return self._loaded

    def _form(self) -> str:
        if self.form:
            return self.form
        return "pair" if self._load()[0].config.num_labels <= 2 else "pool"

    def _estimate(self, prompts: Sequence[Prompt]) -> np.ndarray:
        network, tokenizer = self._load()
        form = self._form()
        context = form == "pool" if self.context is None else self.context
        texts = [prompt_text(p) if context else p.prompt for p in prompts]
        texts = [text.encode("utf-8", "replace").decode() for text in texts]  # half a surrogate pair is no text
        if form == "pool":
            known = self.trained_models or self.models
            outputs = network.config.num_labels
            if outputs != len(known):
                raise UserError(f"{self.path}: the checkpoint has {outputs} outputs and the router {len(known)} models "
                                f"({', '.join(known)}); the pool form needs one output per model")
            return self._sigmoid(self._logits(texts, None))[:, [known.index(name) for name in self.models]]
        columns = [self._expected_label(self._logits(texts, [model] * len(texts))) for model in self.models]
        return np.stack(columns, axis=1)

    def _logits(self, texts: Sequence[str], llm_ids: Sequence[str] | None) -> np.ndarray:
        """(N, num_labels). Batches hold texts of like length; results come back in the order of `texts`."""
        import torch

        from routewright.router_data import SEPARATOR, PadBatch, encode

        network, tokenizer = self._load()
        compat = SEPARATOR in tokenizer.get_vocab() if self.compat is None else self.compat
        rows = encode(tokenizer, texts, llm_ids, min(self.max_length, longest_input(network, tokenizer)), compat)
        order = np.argsort([-len(row["input_ids"]) for row in rows], kind="stable")
        pad = PadBatch(tokenizer.pad_token_id or 0)
        logits = np.empty((len(rows), network.config.num_labels))
        with torch.inference_mode():
            for start in range(0, len(order), self.batch_size):
                index = order[start:start + self.batch_size]
                batch = {key: value.to(network.device) for key, value in pad([rows[i] for i in index]).items()}
                logits[index] = network(**batch).logits.float().cpu().numpy()
        return logits

    @staticmethod
    def _sigmoid(logits: np.ndarray) -> np.ndarray:
        return 0.5 * (1.0 + np.tanh(0.5 * logits))

    def _expected_label(self, logits: np.ndarray) -> np.ndarray:
        if logits.shape[1] == 1:
            return self._sigmoid(logits[:, 0])
        odds = np.exp(logits - logits.max(axis=1, keepdims=True))
        return (odds / odds.sum(axis=1, keepdims=True)) @ np.linspace(0.0, 1.0, logits.shape[1])


def load_classifier(path: str | Path) -> tuple[Any, Any]:
    """(network, tokenizer) of a sequence-classification checkpoint, in eval mode. Raises MissingSetup or UserError.

    Refuses a folder without a trained head: the stock loader would give it random weights and only log it.
    """
    folder = find_weights(path)
    tokenizer = load_tokenizer(folder)
    from transformers import AutoModelForSequenceClassification

    try:
        with quiet_loading():
            network, report = AutoModelForSequenceClassification.from_pretrained(
                str(folder), local_files_only=True, trust_remote_code=False, output_loading_info=True)
    except (OSError, ValueError, ImportError, RuntimeError) as error:
        first = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise MissingSetup(f"{path}: the checkpoint does not load ({first[:200]}); train it again or fetch the whole "
                           "folder") from None
    if report["missing_keys"]:
        raise UserError(f"{path}: {len(report['missing_keys'])} weights are not in the file (first: "
                        f"{sorted(report['missing_keys'])[0]}), so its scores would be random; this is a base model, "
                        "not a trained router: train it with train_deberta.py, or use kind deberta, which fits a head")
    return network.to(torch_device()).float().eval(), tokenizer
