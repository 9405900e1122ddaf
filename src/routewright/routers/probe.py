"""Probes: small heads on the hidden states of the cheap model, and what every router over a base model shares.

The cheap model reads the prompt once, without answering; its states, averaged over the prompt's tokens, tell much of
whether it will answer well. The kinds of head are CoBench's; four things differ:

- one output per model of the pool, trained on soft labels (the mean quality over the recorded samples), where CoBench
  has one output for the cheap model's single recorded answer
- every layer is standardised with the mean and spread of the train prompts before layers are put together; otherwise
  the last layers, whose numbers are the largest, decide alone
- the base model's weights, its number of layers and their size stand in router.json and are checked on loading
- the outputs are calibrated on dev
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from routewright.calibration import Calibration, sigmoid
from routewright.errors import MissingSetup, UserError
from routewright.hidden_states import (
    MAX_LENGTH,
    PRECISIONS,
    PromptReader,
    StateReader,
    base_shape,
    cheap_model,
)
from routewright.language_models import find_folder
from routewright.routers.base import CARD, Router, prompt_text, prompts_behind, shaped
from routewright.schema import Prompt
from routewright.templates import WRAPS
from routewright.textfiles import nearest

if TYPE_CHECKING:
    from routewright.outcomes import OutcomeTable

PROBES = ("last", "mean", "max", "mean_max", "softmax", "dirichlet")
LEAST_EPOCHS = 10  # before early stopping may end the training
LEAST_DEV = 50  # dev prompts below which the outputs are left as they were trained
_CHUNK = 1024  # prompts whose states are in memory at once when estimating
_EPS = 1e-6
_SMALL = 16_384  # numbers per prompt below which one thread trains a head fastest

Parameters = dict[str, np.ndarray]

log = logging.getLogger(__name__)


@dataclass(kw_only=True)
class BaseModelRouter(Router):
    """A router that reads prompts with a base model, usually the pool's cheap one.

    base        weights folder or hub id; empty: the `path` of the pool's cheapest model
    wrap        what stands around the prompt: none, chat (the tokenizer's template), alpaca, or auto: chat where the
                tokenizer has a template
    max_length  tokens kept of a prompt
    precision   fp32, bf16, or auto: bf16 on a GPU that has it
    read_batch  prompts per forward pass
    cache       folder of the cache of readings; empty: data/runs/.cache; `none`: keep nothing
    """

    base: str = ""
    wrap: str = "none"
    max_length: int = MAX_LENGTH
    precision: str = "auto"
    read_batch: int = 32
    cache: str = ""

    _reader: PromptReader | None = field(default=None, init=False, repr=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        for option, known in (("wrap", ("auto", *WRAPS)), ("precision", PRECISIONS)):
            self._check_choice(option, known)
        for option in ("max_length", "read_batch"):
            self._check_least(option, 1)

    def _check_choice(self, option: str, known: Sequence[str]) -> None:
        value = getattr(self, option)
        if value not in known:
            raise UserError(f"router {self.name!r}: {option} must be one of {', '.join(known)}; got {value!r}"
                            f"{nearest(str(value), known)}")

    def _check_least(self, option: str, least: float) -> None:
        value = getattr(self, option)
        if not value >= least:
            raise UserError(f"router {self.name!r}: {option} must be {least} or more; got {value!r}")

    @property
    def reader(self) -> PromptReader:
        """Reads prompts with the base model; opened when first asked for."""
        if self._reader is None:
            self._reader = self._make_reader(
                base=self.base, wrap=self.wrap, max_length=self.max_length, batch_size=self.read_batch,
                precision=self.precision, cache={"": True, "none": False}.get(self.cache, self.cache))
        return self._reader

    def _make_reader(self, **options: Any) -> PromptReader:
        raise NotImplementedError

    def prepare(self) -> None:
        """Settle on the base model and note it for router.json. Called by fit, after the models are known."""
        member, path = "", ""
        if not self.base or (self.pool and self.pool[self.pool.by_price()[0]].path):
            member, path = cheap_model(self.pool)
        self.base = self.base or path
        folder = find_folder(self.base)
        try:
            same = bool(path) and find_folder(path).resolve() == folder.resolve()
        except MissingSetup:  # the pool's own weights are not needed where another base is named
            same = False
        layers, width = base_shape(folder)
        self.card["base"] = {"model": member if same else "", "layers": layers, "width": width,
                             "weights": self.reader.weights}
        met = prompts_behind(folder)
        if met:
            self.card["train_prompts"] = sorted({*self.card.get("train_prompts", ()), *met})

    @property
    def member(self) -> str:
        """The model of the pool that the base is; "" where it is none."""
        return str((self.card.get("base") or {}).get("model", ""))

    def _read(self, prompts: Sequence[Prompt]) -> np.ndarray:
        return self.reader.read([prompt_text(prompt) for prompt in prompts])

    def _load_parts(self, folder: Path) -> None:
        """Refuse another base model than the one the router was fitted on."""
        stored = self.card.get("base")
        if not isinstance(stored, dict) or not {"layers", "width", "weights"} <= set(stored):
            raise UserError(f"{folder / CARD}: `base` is damaged; train or fetch the router again")
        layers, width = base_shape(find_folder(self.base))
        if (layers, width) != (stored["layers"], stored["width"]):
            raise UserError(f"{folder}: it was fitted on a base model with {stored['layers']} layers of states of size "
                            f"{stored['width']} (embeddings included), and {self.base} has {layers} of size {width}; "
                            "point `base` at the model it was fitted on, or train again")
        if self.reader.weights != stored["weights"]:
            raise UserError(f"{folder}: it was fitted on other weights ({stored['weights']}) than {self.base} holds "
                            f"now ({self.reader.weights}); point `base` at the former weights, or train again")

    def _base_model(self) -> str:
        return self.base

    def _hidden_seconds(self) -> float:
        # Below 0 where the first estimate had to load the base model.
        return self.reader.seconds_per_text - self.reader.spent_per_text


@dataclass(kw_only=True)
class ProbeRouter(BaseModelRouter):
    """A head on the hidden states of the base model: one sigmoid per model of the pool.

    probe         what of the layers the head sees: `last`; their `mean`, `max`, or both (`mean_max`); a weighted mean
                  with learnt weights (`softmax`); or `dirichlet`, whose weights are drawn from
                  Dirichlet(exp(beta0) * softmax(logits)) in training and stand at their expectation afterwards
    hidden_sizes  of the head's layers; empty: a linear head
    max_samples   train prompts used, drawn at random; 0: all

    Binary cross entropy on soft labels, Adam, the learning rate halved when dev stands still for 5 epochs; stops after
    `patience` epochs without a better dev loss (not before epoch 10) and keeps the best epoch.
    """

    kind: ClassVar[str] = "probe"

    probe: str = "dirichlet"
    hidden_sizes: list = field(default_factory=lambda: [256, 64])
    dropout: float = 0.1
    learning_rate: float = 1e-3
    weight_decay: float = 1e-3
    batch_size: int = 32
    epochs: int = 50
    patience: int = 8
    max_samples: int = 4000

    parameters: Parameters = field(default_factory=dict, init=False, repr=False)
    scale: tuple[np.ndarray, np.ndarray] | None = field(default=None, init=False, repr=False)  # mean, factor (L, D)
    calibration: Calibration | None = field(default=None, init=False, repr=False)
    history: list[dict[str, float]] = field(default_factory=list, init=False, repr=False)  # losses per epoch
    # Called after each epoch with (epoch from 1, its losses, a function that gives the dev estimates (N, M)).
    on_epoch: Callable[[int, dict[str, float], Callable[[], np.ndarray]], None] | None = field(
        default=None, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_choice("probe", PROBES)
        if not all(isinstance(size, int) and not isinstance(size, bool) and size > 0 for size in self.hidden_sizes):
            raise UserError(f"router {self.name!r}: hidden_sizes must be a list of whole numbers above 0, such as "
                            f"[256, 64], or empty for a linear head; got {self.hidden_sizes!r}")
        self.hidden_sizes = list(self.hidden_sizes)
        for option, least in (("dropout", 0), ("weight_decay", 0), ("max_samples", 0), ("learning_rate", 1e-12),
                              ("batch_size", 1), ("epochs", 1), ("patience", 1)):
            self._check_least(option, least)
        if self.dropout >= 1:
            raise UserError(f"router {self.name!r}: dropout must be below 1; got {self.dropout}")

    def _make_reader(self, **options: Any) -> PromptReader:
        return StateReader(**options)

    # ------------------------------------------------------------ fitting

    def _fit(self, train: OutcomeTable, dev: OutcomeTable | None, seed: int) -> None:
        self.prepare()
        random = np.random.default_rng(seed)
        rows = np.arange(train.n)
        if self.max_samples and train.n > self.max_samples:
            rows = np.sort(random.choice(train.n, self.max_samples, replace=False))
        labels = train.quality_mean[rows]
        for model, column in zip(self.models, labels.T, strict=True):
            if np.ptp(column) == 0:
                log.warning("router %r: every train prompt gives model %r the same quality (%.3g), so its estimate "
                            "is about that constant; more or harder train prompts are the cure", self.name, model,
                            column[0])
        states = self._states([train.prompts[i] for i in rows])
        self.scale = states.mean(axis=0), (1.0 / np.maximum(states.std(axis=0), _EPS)).astype(np.float32)
        x = self._seen(states)
        del states
        if dev is not None:
            held = self._seen(self._states(dev.prompts)), dev.quality_mean
        else:  # a tenth of train decides when to stop
            order = random.permutation(len(x))
            last, rest = order[:max(1, len(x) // 10)], order[max(1, len(x) // 10):]
            held = x[last], labels[last]
            x, labels = (x[rest], labels[rest]) if len(rest) else (x, labels)
        self.calibration = None
        self.parameters, self.history = train_head(
            x, labels, held, seed, probe=self.probe, hidden_sizes=self.hidden_sizes, dropout=self.dropout,
            learning_rate=self.learning_rate, weight_decay=self.weight_decay, batch_size=self.batch_size,
            epochs=self.epochs, patience=self.patience, on_epoch=self.on_epoch)
        if dev is not None and dev.n >= LEAST_DEV:
            self.calibration = Calibration.fit(head_logits(self.parameters, held[0]), dev.quality_mean)

    def _states(self, prompts: Sequence[Prompt]) -> np.ndarray:
        """(N, L, D) states; of the last layer alone where the head sees no other."""
        states = self._read(prompts)
        return np.ascontiguousarray(states[:, -1:]) if self.probe == "last" else states

    def _seen(self, states: np.ndarray) -> np.ndarray:
        """What the head learns from: (N, K) where the layers meet by a fixed rule, else all of them (N, L, D)."""
        mean, factor = self.scale
        x = (states - mean) * factor
        if self.probe in ("softmax", "dirichlet"):
            return x
        parts = {"last": lambda: [x[:, -1]], "mean": lambda: [x.mean(axis=1)], "max": lambda: [x.max(axis=1)],
                 "mean_max": lambda: [x.mean(axis=1), x.max(axis=1)]}
        return np.concatenate(parts[self.probe](), axis=1)

    # ------------------------------------------------------------ estimating

    def _estimate(self, prompts: Sequence[Prompt]) -> np.ndarray:
        assert self.scale is not None, "fit or load first"
        parts, waited, whole = [], 0.0, 0.0
        for start in range(0, len(prompts), _CHUNK):
            chunk = prompts[start:start + _CHUNK]
            states = self._states(chunk)
            if states.shape[1:] != self.scale[0].shape:
                raise UserError(f"router {self.name!r}: {self.base} gives states of shape {states.shape[1:]} and the "
                                f"probe was trained on {self.scale[0].shape}; train it again")
            parts.append(head_logits(self.parameters, self._seen(states)))
            waited += self.reader.spent_per_text * len(chunk)
            whole += self.reader.seconds_per_text * len(chunk)
        self.reader.spent_per_text, self.reader.seconds_per_text = waited / len(prompts), whole / len(prompts)
        logits = np.vstack(parts)
        return sigmoid(logits) if self.calibration is None else self.calibration.apply(logits)

    @property
    def layer_weights(self) -> np.ndarray | None:
        """(L,) shares of the layers, embeddings first, where they are learnt."""
        return layer_shares(self.parameters) if "layer_logits" in self.parameters else None

    # ------------------------------------------------------------ the folder

    def _state(self) -> Parameters:
        state = {**self.parameters, "scale_mean": self.scale[0], "scale_factor": self.scale[1]}
        return state if self.calibration is None else state | self.calibration.state()

    def _set_state(self, state: Parameters) -> None:
        base, m = self.card["base"], len(self.models)
        layers = 1 if self.probe == "last" else base["layers"]
        self.scale = tuple(shaped(state, key, layers, base["width"]) for key in ("scale_mean", "scale_factor"))
        sizes = [base["width"] * (2 if self.probe == "mean_max" else 1), *self.hidden_sizes, m]
        self.parameters = {}
        for i, (into, out) in enumerate(zip(sizes, sizes[1:], strict=False)):
            self.parameters[f"weight_{i}"] = shaped(state, f"weight_{i}", into, out)
            self.parameters[f"bias_{i}"] = shaped(state, f"bias_{i}", out)
        if self.probe in ("softmax", "dirichlet"):
            self.parameters["layer_logits"] = shaped(state, "layer_logits", layers)
        if self.probe == "dirichlet":
            self.parameters["beta0"] = shaped(state, "beta0", 1)
        if any(key.startswith("calibration_") for key in state):
            self.calibration = Calibration.from_state(state, m)
            if not all(np.isfinite(value).all() for value in self.calibration.state().values()):
                raise ValueError("the calibration holds what is no number")


# ---------------------------------------------------------------- the head

def layer_shares(parameters: Parameters) -> np.ndarray:
    """softmax of the layer logits, (L,): also the expectation of the Dirichlet kind, whatever its concentration."""
    odds = np.exp(parameters["layer_logits"] - parameters["layer_logits"].max())
    return odds / odds.sum()


def head_logits(parameters: Parameters, x: np.ndarray) -> np.ndarray:
    """(N, M) logits of standardised states, (N, K) or (N, L, D); plain numpy, so that serving needs no torch here."""
    if x.ndim == 3:
        x = np.einsum("nld,l->nd", x, layer_shares(parameters).astype(x.dtype))
    depth = sum(key.startswith("weight_") for key in parameters)
    for i in range(depth):
        x = x @ parameters[f"weight_{i}"] + parameters[f"bias_{i}"]
        if i < depth - 1:
            x = np.maximum(x, 0.0)
    return x.astype(np.float64)


def initial_head(inputs: int, layers: int, y: np.ndarray, probe: str, hidden_sizes: Sequence[int],
                 seed: int) -> Parameters:
    """Start values: He-normal weights (zero before the outputs), output biases at the logit of each mean quality."""
    random = np.random.default_rng(seed)
    mean = np.clip(y.mean(axis=0), 0.01, 0.99)
    sizes = [inputs, *hidden_sizes, y.shape[1]]
    start: Parameters = {}
    for i, (into, out) in enumerate(zip(sizes, sizes[1:], strict=False)):
        spread = 0.0 if i == len(sizes) - 2 else (2.0 / into) ** 0.5
        start[f"weight_{i}"] = random.normal(0.0, 1.0, (into, out)).astype(np.float32) * np.float32(spread)
        start[f"bias_{i}"] = np.zeros(out, np.float32)
    start[f"bias_{len(sizes) - 2}"] = np.log(mean / (1 - mean)).astype(np.float32)
    if probe in ("softmax", "dirichlet"):
        start["layer_logits"] = np.zeros(layers, np.float32)
    if probe == "dirichlet":
        start["beta0"] = np.full(1, np.log(layers), np.float32)  # all shares equally likely at the start
    return start


def train_head(x: np.ndarray, y: np.ndarray, dev: tuple[np.ndarray, np.ndarray], seed: int, *, probe: str,
               hidden_sizes: Sequence[int], dropout: float, learning_rate: float, weight_decay: float, batch_size: int,
               epochs: int, patience: int, on_epoch: Any = None) -> tuple[Parameters, list[dict[str, float]]]:
    """The best parameters on dev, and {train_loss, dev_loss, learning_rate} per epoch.

    x: standardised states (N, K) or (N, L, D); y: soft labels (N, M). Equal seeds give equal parameters, and torch's
    own random state is left as it was.
    """
    import torch
    from torch.nn.functional import binary_cross_entropy_with_logits as cross_entropy

    start = initial_head(x.shape[-1], x.shape[1], y, probe, hidden_sizes, seed)
    values = {key: torch.nn.Parameter(torch.from_numpy(value.copy())) for key, value in start.items()}
    decayed = [value for key, value in values.items() if key.startswith("weight_")]
    free = [value for key, value in values.items() if not key.startswith("weight_")]
    optimizer = torch.optim.AdamW([{"params": decayed, "weight_decay": weight_decay},
                                   {"params": free, "weight_decay": 0.0}], lr=learning_rate)
    schedule = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, factor=0.5, patience=5)
    xs, ys = torch.from_numpy(np.asarray(x, np.float32)), torch.from_numpy(np.asarray(y, np.float32))
    dev_x, dev_y = np.asarray(dev[0], np.float32), torch.from_numpy(np.asarray(dev[1], np.float32))
    batch_size = min(batch_size, max(8, len(xs) // 10))  # a small train split still gets ten steps an epoch

    def current() -> Parameters:
        return {key: value.detach().numpy().copy() for key, value in values.items()}

    best, best_loss, since, history = start, np.inf, 0, []
    with torch.random.fork_rng(devices=[]), _threads(1 if x[0].size < _SMALL else None):
        torch.manual_seed(seed)
        for epoch in range(1, epochs + 1):
            total = 0.0
            for rows in torch.randperm(len(xs)).split(batch_size):
                optimizer.zero_grad()
                loss = cross_entropy(_train_logits(values, xs[rows], probe, dropout), ys[rows])
                loss.backward()
                optimizer.step()
                total += loss.item() * len(rows)
            parameters = current()
            dev_loss = float(cross_entropy(torch.from_numpy(head_logits(parameters, dev_x)).float(), dev_y))
            if not np.isfinite(dev_loss):
                raise UserError(f"the probe's dev loss is {dev_loss} at epoch {epoch}; lower its learning_rate "
                                f"({learning_rate:g})")
            history.append({"train_loss": total / len(xs), "dev_loss": dev_loss,
                            "learning_rate": optimizer.param_groups[0]["lr"]})
            schedule.step(dev_loss)
            since += 1
            if dev_loss < best_loss - 1e-5:
                best, best_loss, since = parameters, dev_loss, 0
            if on_epoch is not None:
                on_epoch(epoch, history[-1], lambda now=parameters: sigmoid(head_logits(now, dev_x)))
            if since >= patience and epoch >= LEAST_EPOCHS:
                break
    return best, history


@contextmanager
def _threads(count: int | None) -> Iterator[None]:
    """Threads of torch for a while: for small products, waiting for one another costs several times the work."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _train_logits(values: dict[str, Any], x: Any, probe: str, dropout: float) -> Any:
    """(B, M): as `head_logits`, with dropout before each layer and layer shares drawn anew for each prompt."""
    import torch
    from torch.nn.functional import dropout as drop

    if x.ndim == 3:
        shares = values["layer_logits"].softmax(0)
        if probe == "dirichlet":
            concentration = (values["beta0"].exp() * shares).clamp(min=1e-3).expand(len(x), -1)
            x = torch.einsum("bld,bl->bd", x, torch.distributions.Dirichlet(concentration).rsample())
        else:
            x = torch.einsum("bld,l->bd", x, shares)
    depth = sum(key.startswith("weight_") for key in values)
    for i in range(depth):
        x = drop(x, dropout) @ values[f"weight_{i}"] + values[f"bias_{i}"]
        if i < depth - 1:
            x = x.relu()
    return x
