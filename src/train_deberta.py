"""Trains an encoder (DeBERTa-v3 by default) as a router: will this model answer this prompt well?

Two forms. `pair` is CoBench's: JSON lines `question`, `llm_id`, `label`; the encoder reads the question and the name of
the model and a softmax over NUM_LABELS says whether the answer will be right. `pool` trains straight from an outcome
cache: one encoder pass scores every model of the pool at once (one sigmoid each, soft labels = mean recorded quality).

Departures from CoBench's script:
- the validation file is used: loss, accuracy and AUROC each epoch, early stop, and the best epoch is what is kept;
  without one, a tenth of the rows is held out by near-duplicate group (a test split is never read)
- question and model name are a native text pair, where only the question is cut; their `question <SEP> llm_id <SEP>`
  text, which loses the name on long questions, stays available as `--form pair_compat`
- batches of like lengths padded to their longest, instead of every row padded to 512
- a bad row stops the run with its file and line (`--skip_bad N` passes over N), instead of being dropped in silence
- bf16 where the hardware gains by it; a kill, a NaN or another number of GPUs never costs more than the last checkpoint

One device:    ./cmd/run_train_deberta.sh                       (bare: the shipped sample rows)
               ./cmd/run_train_deberta.sh DATA VAL MODEL NUM_LABELS BATCH LR EPOCHS OUT
               python src/train_deberta.py --cache data/sample --model_name tiny --learning_rate 1e-3 --epochs 8
Many devices:  NUM_GPUS=4 ./cmd/run_train_deberta.sh ...        (torchrun; NUM_PROCESSES=2 does the same on a CPU, over gloo)

Reads DATA and VAL, or `--cache`. Writes into OUT: the router folder (Hugging Face weights, router.json), the resumable
checkpoints `checkpoint-<step>` with a name `checkpoint_epoch_<k>` for each epoch's end, train_log.jsonl, dev_scores.json
and config.resolved.yaml. The default OUT stands under data/runs/, which git ignores.
"""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from routewright import router_data
from routewright.errors import MissingSetup, UserError
from routewright.launch import launch
from routewright.textfiles import nearest, write_json

BASE_MODEL = "microsoft/deberta-v3-base"
VALIDATION_SHARE = 0.1  # held out by group where no validation rows are given
BF16_GAIN = 1.1  # a CPU must be this much faster in bf16 before `auto` takes it
BF16_MIN_WIDTH = 256  # below this hidden size the casts cost more than the products save
PROBE_SECONDS = 2.0
OWNED = {"output_dir": "output_dir", "per_device_train_batch_size": "batch_size", "learning_rate": "learning_rate",
         "gradient_accumulation_steps": "global_batch_size", "num_train_epochs": "epochs", "seed": "seed", "bf16": "precision",
         "fp16": "precision", "report_to": "wandb"}


def main(
    *,
    # Files
    data: str = "data/sample_data.jsonl",  # CoBench rows: question, llm_id, label (JSONL or .gz)
    val: str = "",  # rows to validate on; empty: a tenth of the data is held out by near-duplicate group
    cache: str = "",  # train on an outcome cache instead: its train split, validated on its dev split
    output_dir: str = "data/runs/deberta_checkpoints",  # the router folder and its checkpoints
    # Data
    form: Literal["auto", "pair", "pair_compat", "pool"] = "auto",  # auto: pool for a cache, pair for rows
    num_labels: int = 2,  # classes of `label` in pair form; 1 takes shares in [0, 1]
    skip_bad: int = 0,  # bad rows to pass over before stopping
    class_weights: Literal["none", "balanced"] = "none",  # balanced: rare classes weigh more in the loss
    # Model
    model_name: str = "auto",  # folder or hub id; tiny: built from the data; auto: microsoft/deberta-v3-base, or tiny where its weights cannot be had
    max_length: int = 512,  # tokens kept of a row
    # Training
    batch_size: int = 16,  # rows per device and step
    global_batch_size: int = 0,  # rows per update over devices and accumulation; 0: batch_size x devices
    learning_rate: float | None = None,  # peak, after 10 % warm-up, then linear to 0; none: 2e-5, and 1e-3 for tiny
    epochs: int = 3,
    patience: int = 2,  # epochs without a better validation loss before stopping; 0: never
    precision: Literal["auto", "bf16", "fp32"] = "auto",  # auto: bf16 where the GPU has it, or where this CPU is measured faster
    seed: int = 42,
    # Run
    wandb: bool = False,  # record to W&B, offline where there is no key
    check_only: bool = False,  # check options, rows and weights, then stop
    trainer: dict | None = None,  # more settings under their transformers.TrainingArguments names
) -> None:
    speaks = os.environ.get("RANK", "0") == "0"
    say = (lambda text: print(text, file=sys.stderr, flush=True)) if speaks else (lambda text: None)
    trainer = check_options(locals())
    train, dev, source = load_examples(data, val, cache, form, num_labels, skip_bad, say)
    base = find_base(model_name, say)
    learning_rate = learning_rate or (2e-5 if base.folder else 1e-3)
    say(f"{len(train)} train and {len(dev)} validation rows, form {source.form}, base model {base.name}, learning rate {learning_rate:g}")
    if check_only:
        return

    from routewright.encoders import longest_input
    from routewright.trainer import guard_process
    guard_process()
    quiet_libraries()
    out = Path(output_dir)
    model, tokenizer = build_model(base, train, source, seed, out)
    longest = min(max_length, longest_input(model, tokenizer))
    train_rows, dev_rows = (encode(tokenizer, part, source, longest) for part in (train, dev))
    bf16 = choose_precision(precision, model, train_rows, tokenizer, batch_size, out, say) == "bf16"
    weights = loss_weights(class_weights, train, source)
    arguments = training_arguments(output_dir=output_dir, batch_size=batch_size, global_batch_size=global_batch_size,
                                   learning_rate=learning_rate, epochs=epochs, patience=patience, bf16=bf16, seed=seed,
                                   rows=len(train_rows), extra=trainer)

    from routewright import tracking
    tracker = tracking.start("routewright", f"train_deberta-{out.name}", out, {"form": source.form, "base_model": base.name,
                             "learning_rate": learning_rate, "epochs": epochs, "batch_size": batch_size, "rows": len(train)},
                             mode="auto" if wandb else "off", job_type="train")
    with tracker:
        run = build_trainer(model, tokenizer, arguments, train_rows, dev_rows, train, source, weights, patience, tracker, say,
                            config={"form": source.form, "base_model": base.name, "max_length": max_length, "class_weights": class_weights,
                                    "bf16": bf16, "models": list(source.models), "num_labels": source.num_labels})
        run.run(resume="auto")
        scores = score_validation(run, dev_rows, source)
        if run.is_world_process_zero():
            save_router(run, out, base, train, source, max_length)
            report(scores, out, tracker, say)
        run.accelerator.wait_for_everyone()


# --- options ----------------------------------------------------------------------------------------------------------

def check_options(given: dict[str, Any]) -> dict[str, Any]:
    """Ranges of the numbers and names in `trainer`, before any file is read. Returns the trainer mapping."""
    for name, least in (("num_labels", 1), ("skip_bad", 0), ("max_length", 8), ("batch_size", 1), ("global_batch_size", 0),
                        ("epochs", 1), ("patience", 0)):
        if given[name] < least:
            raise UserError(f"--{name} must be {least} or more; got {given[name]}")
    if given["learning_rate"] is not None and not given["learning_rate"] > 0:
        raise UserError(f"--learning_rate must be above 0; got {given['learning_rate']}")
    if given["cache"] and given["val"]:
        raise UserError("--val belongs to --data; a cache brings its own dev split")
    if given["form"] == "pool" and not given["cache"]:
        raise UserError("--form pool needs --cache: rows of question, llm_id, label hold one model each")
    world = int(os.environ.get("WORLD_SIZE", "1"))
    whole = given["batch_size"] * world
    if given["global_batch_size"] % whole:
        raise UserError(f"--global_batch_size {given['global_batch_size']} is no multiple of batch_size x devices = "
                        f"{given['batch_size']} x {world} = {whole}; choose one, or another --batch_size")
    return check_trainer_names(dict(given["trainer"] or {}))


def check_trainer_names(extra: dict[str, Any]) -> dict[str, Any]:
    if not extra:
        return extra
    from dataclasses import fields

    from transformers import TrainingArguments
    known = {f.name: f for f in fields(TrainingArguments) if f.init}
    for name, value in extra.items():
        if name in OWNED:
            raise UserError(f"--trainer.{name}: this script sets it; use --{OWNED[name]}")
        if name not in known:
            raise UserError(f"--trainer.{name}: transformers.TrainingArguments has no such setting{nearest(name, known)}")
        default = known[name].default
        wrong = type(default) in (bool, int, float) and (not isinstance(value, (int, float)) or isinstance(default, bool) != isinstance(value, bool))
        if wrong:
            raise UserError(f"--trainer.{name}: {value!r} is no {type(default).__name__} (its default is {default!r})")
    return extra


def quiet_libraries() -> None:
    """Leave the console to the run: progress bars per saved file and notes about packages that play no part here."""
    import contextlib
    import io
    import logging

    import torch
    for name in ("bitsandbytes", "accelerate"):
        logging.getLogger(name).setLevel(logging.ERROR)
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # else deepspeed, imported by accelerate, warns that it found no GPU
    with contextlib.redirect_stdout(io.StringIO()):
        import transformers.trainer  # noqa: F401 - it prints a line about W&B on import
    from transformers.utils import logging as hf_logging
    hf_logging.disable_progress_bar()
    hf_logging.set_verbosity_error()


# --- data -------------------------------------------------------------------------------------------------------------

@dataclass
class Examples:
    """Rows to train or validate on. `labels` is (N,) in pair form and (N, M) in pool form; `names` says where a row is from."""

    questions: list[str]
    llm_ids: list[str] | None
    labels: np.ndarray
    names: list[str]

    def __len__(self) -> int:
        return len(self.questions)


@dataclass
class Source:
    """What the rows are: their form, the models, and the cache behind them where there is one."""

    form: str
    models: tuple[str, ...]
    num_labels: int
    table: Any = None  # the train split
    dev_table: Any = None

    @property
    def pool(self) -> bool:
        return self.form == "pool"


def load_examples(data: str, val: str, cache: str, form: str, num_labels: int, skip_bad: int, say: Any) -> tuple[Examples, Examples, Source]:
    """(train, validation, source), every row checked. Raises UserError naming file and line."""
    if cache:
        return load_cache(cache, "pool" if form == "auto" else form, num_labels, say)
    pairs = router_data.read_pairs(data, num_labels, skip_bad)
    if val:
        held = router_data.read_pairs(val, num_labels, skip_bad)
        check_apart(pairs, held)
    else:
        keep, out = router_data.hold_out(pairs.questions, VALIDATION_SHARE)
        pairs, held = pairs.take(keep), pairs.take(out)
    for message in dict.fromkeys([*pairs.skipped, *held.skipped]):
        say(f"skipped: {message}")
    for message in router_data.check_labels(pairs, num_labels):
        say(f"warning: {message}")
    models = tuple(dict.fromkeys(pairs.llm_ids))
    strange = sorted(set(held.llm_ids) - set(models))
    if strange:
        say(f"warning: {held.source}: llm_id {strange[0]!r} never occurs in the training rows; its estimates are guesses")
    source = Source("pair" if form == "auto" else form, models, num_labels)
    return pair_examples(pairs), pair_examples(held), source


def load_cache(cache: str, form: str, num_labels: int, say: Any) -> tuple[Examples, Examples, Source]:
    from routewright.outcomes import OutcomeTable
    from routewright.routers.base import prompt_text

    table = OutcomeTable.load(cache)
    if "train" not in table.splits:
        raise UserError(f"{cache}: no prompt carries split \"train\" (found: {', '.join(map(str, table.splits)) or 'none'}); "
                        "give the cache splits with build_cache.py or import_outcomes.py")
    train = table.split("train")
    if "dev" in table.splits:
        dev = table.split("dev")
    else:
        say(f"warning: {cache} has no dev split; a tenth of its train prompts is held out for validation")
        keep, out = router_data.hold_out([p.prompt for p in train.prompts], VALIDATION_SHARE,
                                         [p.group or p.prompt_id for p in train.prompts])
        train, dev = train.rows(keep), train.rows(out)
    if form == "pool":
        messages = router_data.check_soft_labels(train.quality_mean, train.models)
        parts = [Examples([prompt_text(p) for p in t.prompts], None, t.quality_mean.astype(np.float64),
                          [f"{cache} prompt {p.prompt_id}" for p in t.prompts]) for t in (train, dev)]
        source = Source(form, tuple(train.models), train.m, train, dev)
    else:
        pairs = router_data.pairs_of_table(train)
        messages = router_data.check_labels(pairs, num_labels)
        parts = [pair_examples(pairs), pair_examples(router_data.pairs_of_table(dev))]
        source = Source(form, tuple(train.models), num_labels, train, dev)
    for message in messages:
        say(f"warning: {message}")
    return parts[0], parts[1], source


def pair_examples(pairs: router_data.PairData) -> Examples:
    return Examples(pairs.questions, pairs.llm_ids, pairs.labels, [f"{pairs.source}:{line}" for line in pairs.lines])


def check_apart(train: router_data.PairData, held: router_data.PairData) -> None:
    """Validation questions must be new: a question seen in training measures memory."""
    from routewright.prompts import normalise

    seen = {normalise(q): line for q, line in zip(train.questions, train.lines, strict=True)}
    shared = [(line, seen[key]) for q, line in zip(held.questions, held.lines, strict=True) if (key := normalise(q)) in seen]
    if shared:
        raise UserError(f"{held.source}:{shared[0][0]}: this question is also in the training rows ({train.source}:{shared[0][1]}), as are "
                        f"{len(shared) - 1} more; remove them, or leave VAL empty to hold rows out by group")


# --- model ------------------------------------------------------------------------------------------------------------

@dataclass(frozen=True)
class Base:
    """The base model: its name for router.json, and the folder of its weights (None: build tiny)."""

    name: str
    folder: Path | None


def find_base(model_name: str, say: Any) -> Base:
    """Where the weights are. Only `auto` falls back to tiny; a model asked for by name is found or the run stops."""
    if model_name == "tiny":
        return Base("tiny", None)
    name = BASE_MODEL if model_name == "auto" else model_name
    try:
        return Base(name, fetch_weights(name))
    except MissingSetup as error:
        if model_name != "auto":
            raise MissingSetup(f"{error}; or use --model_name tiny, which is built from your data") from None
        say(f"WARNING: {error}.\nWARNING: going on with `tiny`, a small DeBERTa-v2 trained from nothing on your rows; it is no match for "
            f"{BASE_MODEL}")
        return Base("tiny", None)


def fetch_weights(name: str) -> Path:
    """The folder of weights: local, cached, or downloaded when the hub answers. Raises MissingSetup within seconds."""
    from routewright.encoders import find_weights

    try:
        return find_weights(name)
    except MissingSetup:
        if Path(name).is_absolute() or os.environ.get("HF_HUB_OFFLINE", "0").lower() in ("1", "true", "yes", "on") or not hub_answers():
            raise
    from huggingface_hub import snapshot_download
    try:
        return Path(snapshot_download(name, allow_patterns=["*.json", "*.model", "*.txt", "*.safetensors", "pytorch_model*.bin"]))
    except Exception as error:  # noqa: BLE001 - gated, renamed, rate-limited: the cure is the same
        raise MissingSetup(f"{name} could not be downloaded ({type(error).__name__}); try `hf download {name}`") from None


def hub_answers(seconds: float = 2.0) -> bool:
    """Whether the hub (or the proxy in front of it) takes a connection. The library itself would retry for a minute."""
    import socket
    from urllib.parse import urlsplit

    proxy = os.environ.get("HTTPS_PROXY") or os.environ.get("https_proxy")
    url = urlsplit(proxy or os.environ.get("HF_ENDPOINT", "https://huggingface.co"))
    try:
        with socket.create_connection((url.hostname or "", url.port or 443), timeout=seconds):
            return True
    except OSError:
        return False


def build_model(base: Base, train: Examples, source: Source, seed: int, out: Path) -> tuple[Any, Any]:
    """(model, tokenizer) in float32 with a fresh head; label names are the models in pool form."""
    from transformers import set_seed

    from routewright.tiny_deberta import build_tiny, check_tokenizer
    set_seed(seed)
    names = source.models if source.pool else [f"label_{k}" for k in range(source.num_labels)]
    problem = "single_label_classification" if not source.pool and source.num_labels > 1 else "multi_label_classification"
    labels = {"id2label": dict(enumerate(names)), "label2id": {n: i for i, n in enumerate(names)}, "problem_type": problem}
    if base.folder is None:
        texts = train.questions if train.llm_ids is None else [*train.questions, *dict.fromkeys(train.llm_ids)]
        model, tokenizer = build_tiny(texts, len(names), seed, **labels)
    else:
        model, tokenizer = load_pretrained(base.folder, labels)
    if source.form == "pair_compat":
        tokenizer.add_special_tokens({"additional_special_tokens": [router_data.SEPARATOR]})
        rows = model.get_input_embeddings().num_embeddings
        if len(tokenizer) > rows:  # DeBERTa-v3's table is larger than its vocabulary; never shrink it
            model.resize_token_embeddings(len(tokenizer))
    check_tokenizer(tokenizer, train.questions, base.folder or "tiny")
    return model, tokenizer


def load_pretrained(folder: Path, labels: dict[str, Any]) -> tuple[Any, Any]:
    import torch
    from transformers import AutoConfig, AutoModelForSequenceClassification

    from routewright.encoders import load_tokenizer
    tokenizer = load_tokenizer(folder)
    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        for name, value in labels.items():
            setattr(config, name, value)
        model = AutoModelForSequenceClassification.from_pretrained(
            folder, config=config, dtype=torch.float32, ignore_mismatched_sizes=True, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        raise MissingSetup(f"{folder}: the weights do not load as an encoder ({str(error).splitlines()[0][:200]}); fetch the whole folder again") from None
    return model, tokenizer


def encode(tokenizer: Any, part: Examples, source: Source, max_length: int) -> list[dict[str, Any]]:
    rows = router_data.encode(tokenizer, part.questions, part.llm_ids, max_length, compat=source.form == "pair_compat")
    return router_data.with_labels(rows, part.labels)


# --- precision --------------------------------------------------------------------------------------------------------

def choose_precision(asked: str, model: Any, rows: list[dict[str, Any]], tokenizer: Any, batch_size: int, out: Path, say: Any) -> str:
    """"bf16" or "fp32". A measured choice is kept in the run folder, so that a resumed run does not choose anew."""
    import torch

    if asked != "auto":
        return asked
    if torch.cuda.is_available():
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"
    if model.config.hidden_size < BF16_MIN_WIDTH:
        return "fp32"
    chosen = [None]
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if world > 1:
        from datetime import timedelta

        from accelerate import PartialState
        PartialState(cpu=True, timeout=timedelta(seconds=600))
    if os.environ.get("RANK", "0") == "0":
        chosen = [probed_precision(model, rows, tokenizer, batch_size, out, say)]
    if world > 1:
        torch.distributed.broadcast_object_list(chosen)
    return chosen[0]


def probed_precision(model: Any, rows: list[dict[str, Any]], tokenizer: Any, batch_size: int, out: Path, say: Any) -> str:
    import json

    file = out / "precision.json"
    if file.is_file() and any(out.glob("checkpoint-*")):
        return json.loads(file.read_text())["precision"]
    fp32, bf16 = time_precisions(model, rows, tokenizer, batch_size)
    chosen = "bf16" if fp32 / bf16 > BF16_GAIN else "fp32"
    say(f"precision: {chosen} (a step took {fp32:.2f} CPU seconds in fp32, {bf16:.2f} in bf16)")
    write_json(file, {"precision": chosen, "fp32_seconds": round(fp32, 4), "bf16_seconds": round(bf16, 4)})
    return chosen


def time_precisions(model: Any, rows: list[dict[str, Any]], tokenizer: Any, batch_size: int) -> tuple[float, float]:
    """CPU seconds of one forward and backward pass in (fp32, bf16) on rows of median length; model and RNG are left as found."""
    import time

    import torch
    middle = sorted(rows, key=lambda r: len(r["input_ids"]))[len(rows) // 2:][:min(batch_size, 8)]
    batch = router_data.PadBatch(tokenizer.pad_token_id)([{k: v for k, v in r.items() if k != "labels"} for r in middle])
    best = {False: float("inf"), True: float("inf")}
    state = torch.random.get_rng_state()
    model.train()
    end = time.perf_counter() + PROBE_SECONDS
    for trial in range(6):
        if trial >= 2 and time.perf_counter() > end:
            break
        for low in best:
            start = time.process_time()
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=low):
                loss = model(**batch).logits.float().square().mean()
            loss.backward()
            best[low] = min(best[low], time.process_time() - start)
    model.zero_grad(set_to_none=True)
    torch.random.set_rng_state(state)
    return best[False], best[True]


# --- training ---------------------------------------------------------------------------------------------------------

def loss_weights(class_weights: str, train: Examples, source: Source) -> np.ndarray | None:
    """(K,) class weights in pair form, (M,) weights of right answers in pool form, or None."""
    if class_weights == "none":
        return None
    if source.pool or source.num_labels == 1:
        return router_data.positive_weights(train.labels.reshape(len(train), -1))
    return router_data.class_weights(train.labels, source.num_labels)


def training_arguments(*, output_dir: str, batch_size: int, global_batch_size: int, learning_rate: float, epochs: int, patience: int,
                       bf16: bool, seed: int, rows: int, extra: dict[str, Any]) -> Any:
    from transformers import TrainingArguments

    from routewright.trainer import safety_arguments
    world = int(os.environ.get("WORLD_SIZE", "1"))
    accumulation = max(1, global_batch_size // (batch_size * world))
    steps = -(-rows // (batch_size * world * accumulation))
    settings = {
        **safety_arguments(), "output_dir": output_dir, "per_device_train_batch_size": batch_size,
        "per_device_eval_batch_size": max(32, batch_size), "gradient_accumulation_steps": accumulation,
        "num_train_epochs": epochs, "learning_rate": learning_rate, "weight_decay": 0.01, "warmup_steps": 0.1,
        "lr_scheduler_type": "linear", "max_grad_norm": 1.0, "bf16": bf16, "seed": seed,
        "eval_strategy": "epoch", "save_strategy": "epoch", "load_best_model_at_end": True, "metric_for_best_model": "loss",
        "greater_is_better": False, "logging_steps": min(100, max(1, steps // 2)), "disable_tqdm": True, "log_level": "error", "log_level_replica": "error", **extra}
    try:
        return TrainingArguments(**settings)
    except (ValueError, TypeError) as error:
        raise UserError(f"these training settings do not go together: {str(error).splitlines()[0]}") from None


def build_trainer(model: Any, tokenizer: Any, arguments: Any, train_rows: list, dev_rows: list, train: Examples, source: Source,
                  weights: np.ndarray | None, patience: int, tracker: Any, say: Any, config: dict[str, Any]) -> Any:
    import torch
    from transformers import EarlyStoppingCallback, PrinterCallback, ProgressCallback, Trainer

    from routewright.checkpoints import fingerprint
    from routewright.trainer import EpochNames, SafetyNet
    whole = arguments.per_device_train_batch_size * arguments.gradient_accumulation_steps * arguments.world_size
    order = router_data.LengthGroupedOrder([len(r["input_ids"]) for r in train_rows], whole, arguments.seed)

    class RouterTrainer(SafetyNet, Trainer):
        """Our batch order and our losses; the loop, the optimizer and the schedule are the library's."""

        def _get_train_sampler(self, train_dataset: Any = None) -> Any:
            return order

        def _get_eval_sampler(self, eval_dataset: Any) -> Any:
            return np.argsort([-len(r["input_ids"]) for r in eval_dataset], kind="stable").tolist()

        def compute_loss(self, model: Any, inputs: dict, return_outputs: bool = False, num_items_in_batch: Any = None) -> Any:
            labels = inputs.pop("labels")
            outputs = model(**inputs)
            loss = router_loss(outputs.logits, labels, source, weights)
            return (loss, outputs) if return_outputs else loss

        def evaluation_loop(self, *args: Any, metric_key_prefix: str = "eval", **kwargs: Any) -> Any:
            found = super().evaluation_loop(*args, metric_key_prefix=metric_key_prefix, **kwargs)
            # The library averages the ranks' batches, padded ones included; the loss of the gathered rows is exact.
            rows = (torch.as_tensor(found.predictions), torch.as_tensor(found.label_ids))
            found.metrics[f"{metric_key_prefix}_loss"] = float(router_loss(*rows, source, weights))
            return found

    multiple = 8 if torch.cuda.is_available() else 1
    callbacks = [EpochNames(), make_reporter(order, tracker, say)]
    if patience and arguments.load_best_model_at_end:
        callbacks.append(EarlyStoppingCallback(patience))
    trainer = RouterTrainer(
        model=model, args=arguments, train_dataset=train_rows, eval_dataset=dev_rows, processing_class=tokenizer,
        data_collator=router_data.PadBatch(tokenizer.pad_token_id, multiple), callbacks=callbacks,
        compute_metrics=lambda p: validation_metrics(p.predictions, p.label_ids, source),
        fingerprints={"data": fingerprint([train.questions, train.llm_ids, train.labels.tolist()]), "config": config},
        row_names=train.names)
    # Both would claim that the loss is already divided by the accumulation steps; ours is a plain mean.
    trainer.model_accepts_loss_kwargs = False
    trainer.remove_callback(PrinterCallback)
    trainer.remove_callback(ProgressCallback)
    return trainer


def router_loss(logits: Any, labels: Any, source: Source, weights: np.ndarray | None) -> Any:
    """Mean loss of a batch: binary cross entropy per model, or cross entropy over the labels.

    A plain mean over the rows, weighted or not, so that a batch cut into equal parts keeps its gradient.
    """
    import torch
    from torch.nn import functional as F

    logits = logits.float()
    weight = None if weights is None else torch.as_tensor(weights, dtype=torch.float32, device=logits.device)
    if source.pool or source.num_labels == 1:
        return F.binary_cross_entropy_with_logits(logits, labels.float().view_as(logits), pos_weight=weight)
    return F.cross_entropy(logits, labels, weight=weight, reduction="none").mean()


def make_reporter(order: router_data.LengthGroupedOrder, tracker: Any, say: Any) -> Any:
    """Console lines and tracker scalars from the library's log events, and the epoch for the batch order."""
    from transformers import TrainerCallback

    class Reporter(TrainerCallback):
        def on_epoch_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            order.set_epoch(int(state.epoch or 0))

        def on_log(self, args: Any, state: Any, control: Any, logs: dict | None = None, **_: Any) -> None:
            if not state.is_world_process_zero or not logs or "train_runtime" in logs:
                return
            shown = {k: v for k, v in logs.items() if isinstance(v, (int, float)) and not k.endswith(("_runtime", "_per_second", "flos"))}
            tracker.log({k.replace("eval_", "dev/") if k.startswith("eval_") else f"train/{k}": v for k, v in shown.items()}, step=state.global_step)
            words = "  ".join(f"{k.replace('eval_', 'dev ')} {v:.4g}" for k, v in shown.items() if k != "epoch")
            say(f"step {state.global_step}/{state.max_steps}  epoch {state.epoch:.2f}  {words}")

    return Reporter()


# --- scores -----------------------------------------------------------------------------------------------------------

def validation_metrics(logits: np.ndarray, labels: np.ndarray, source: Source) -> dict[str, float]:
    """accuracy and AUROC on the validation rows; per model in pool form. Undefined ones (one class only) are left out."""
    logits = np.asarray(logits, np.float64)
    if source.pool:
        found: dict[str, float] = {}
        truth = labels >= 0.5
        found["accuracy"] = float(((logits > 0) == truth).mean())
        areas = {name: auroc(truth[:, i], logits[:, i]) for i, name in enumerate(source.models)}
        found.update({f"auroc/{name}": area for name, area in areas.items() if area == area})
        return with_mean(found, areas)
    if source.num_labels == 1:
        truth, score = labels.reshape(-1) >= 0.5, logits.reshape(-1)
        areas = {"1": auroc(truth, score)}
        return with_mean({"accuracy": float(((score > 0) == truth).mean())}, areas)
    found = {"accuracy": float((logits.argmax(1) == labels).mean())}
    if source.num_labels == 2:
        return with_mean(found, {"1": auroc(labels == 1, logits[:, 1] - logits[:, 0])})
    shifted = logits - logits.max(1, keepdims=True)
    share = np.exp(shifted) / np.exp(shifted).sum(1, keepdims=True)
    return with_mean(found, {str(k): auroc(labels == k, share[:, k]) for k in range(source.num_labels)})


def with_mean(found: dict[str, float], areas: dict[str, float]) -> dict[str, float]:
    defined = [a for a in areas.values() if a == a]
    return {**found, "auroc": float(np.mean(defined))} if defined else found


def auroc(truth: np.ndarray, score: np.ndarray) -> float:
    from routewright.metrics import auroc as measure

    area = measure(truth, score)
    return float("nan") if area is None else float(area)


def score_validation(run: Any, dev_rows: list[dict[str, Any]], source: Source) -> dict[str, float]:
    """Scores of the weights that were kept, on the validation rows. A cache adds its cost-quality curve in one number."""
    found = run.predict(dev_rows, metric_key_prefix="dev")
    scores = {k.removeprefix("dev_"): float(v) for k, v in found.metrics.items() if not k.endswith(("_runtime", "_per_second", "_time"))}
    if source.pool:
        logits = np.empty_like(found.predictions, dtype=np.float64)
        logits[run._get_eval_sampler(dev_rows)] = found.predictions  # back from length order
        scores |= curve_scores(1 / (1 + np.exp(-logits)), source)
    return scores


def curve_scores(estimate: np.ndarray, source: Source) -> dict[str, float]:
    """AIQ over the pool's cost range, and APGR for two models, of estimates (N, M) on the validation prompts."""
    from routewright import decide, metrics

    dev = source.dev_table
    expected = decide.expected_cost(source.table, dev)
    swept = decide.sweep_scores(estimate, expected, dev.quality, dev.cost, decide.cost_weights(estimate, expected))
    found = {"aiq": metrics.aiq(swept.cost, swept.quality, metrics.pool_range(dev.cost))}
    if dev.m == 2:
        cheap, strong = (dev.models.index(name) for name in dev.pool.subset(dev.models).by_price())
        score = decide.two_model_score(estimate, cheap, strong)
        found["apgr"] = metrics.apgr(metrics.threshold_curve(score, dev.quality[:, cheap], dev.quality[:, strong]))
    return {name: value for name, value in found.items() if value is not None}


def report(scores: dict[str, float], out: Path, tracker: Any, say: Any) -> None:
    """dev_scores.json, the tracker's summary and one line."""
    kept = {name: round(value, 6) for name, value in scores.items()}
    write_json(out / "dev_scores.json", kept)
    tracker.summary({f"dev/{k}": v for k, v in kept.items()})
    say(f"kept the best epoch, on the validation rows: {'  '.join(f'{k} {v:.4g}' for k, v in kept.items())}\nrouter: {out}")


# --- saving -----------------------------------------------------------------------------------------------------------

def save_router(run: Any, out: Path, base: Base, train: Examples, source: Source, max_length: int) -> None:
    """The final weights and router.json beside the checkpoints. router.json goes first and comes last: it marks a whole folder."""
    from routewright.routers.base import write_card
    from routewright.schema import Prompt

    (out / "router.json").unlink(missing_ok=True)
    run.save_model(str(out))
    (out / "training_args.bin").unlink(missing_ok=True)  # a pickle, and nothing reads it
    if source.table is not None:
        prompts, pool, cache = source.table.prompts, source.table.pool, source.table.fingerprint
    else:
        prompts = [Prompt(name, question) for name, question in zip(train.names, train.questions, strict=True)]
        pool, cache = None, ""
    write_card(out, kind="trained_deberta", name=out.name, models=source.models, pool=pool, train_prompts=prompts,
               cache_fingerprint=cache, base_model=base.name,
               options={"form": source.form.removesuffix("_compat"), "compat": source.form == "pair_compat", "max_length": max_length,
                        "context": source.table is not None})


if __name__ == "__main__":
    launch(main)
