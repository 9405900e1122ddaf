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
               python src/train_deberta.py --cache data/sample --model_name tiny --epochs 8
Many devices:  NUM_GPUS=4 ./cmd/run_train_deberta.sh ...        (torchrun)
               NUM_PROCESSES=2 ./cmd/run_train_deberta.sh ...   (the same on a CPU, over gloo)

Reads DATA and VAL, or `--cache`. Writes into OUT: the router folder (Hugging Face weights, router.json), the resumable
checkpoints `checkpoint-<step>` with a name `checkpoint_epoch_<k>` for each epoch's end, train_log.jsonl,
dev_scores.json and config.resolved.yaml; in pool form also monitor.jsonl, what the decisions are worth on the dev
prompts at each epoch, with a warning where they collapse to one model. CoBench's default OUT is `deberta_checkpoints`;
here it stands under data/runs/, which git ignores. The same line again goes on where a stopped run was.

Measured on one AMD EPYC core (torch 2.13.0+cpu): the bare run with `tiny` (400 rows, 3 epochs) takes 11 CPU seconds and
0.7 GB, half of the time in imports; a 22.7M-parameter encoder at batch 32 trains on 1,200 useful tokens a CPU second in
fp32 and 2,400 in bf16 (tests/benchmarks/bench_train_deberta.py). No GPU was measured; CoBench reports about 8 GB per
GPU for DeBERTa-v3-base.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, Literal

import numpy as np

from routewright import router_data
from routewright.base_models import Base, choose_precision, find_base, load_pretrained, median_rows
from routewright.errors import UserError
from routewright.launch import launch
from routewright.router_data import Examples, Source
from routewright.textfiles import write_json
from routewright.training import (
    LOG_STEPS,
    Say,
    check_sizes,
    check_trainer_names,
    console,
    is_complete,
    is_score,
    make_reporter,
    quiet_libraries,
    save_weights,
)

LEARNING_RATE = 2e-5
TINY_LEARNING_RATE = 1e-3  # weights that start from nothing want bigger steps
OWNED = {"output_dir": "output_dir", "per_device_train_batch_size": "batch_size", "learning_rate": "learning_rate",
         "gradient_accumulation_steps": "global_batch_size", "num_train_epochs": "epochs", "seed": "seed",
         "bf16": "precision", "fp16": "precision", "report_to": "wandb"}

Rows = list[dict[str, Any]]


def main(
    *,
    # Files
    data: str = "data/sample_data.jsonl",  # CoBench rows: question, llm_id, label (JSONL or .gz)
    val: str = "",  # rows to validate on; empty: a tenth of the data is held out by near-duplicate group
    cache: str = "",  # train on an outcome cache instead: its train split, validated on its dev split
    output_dir: str = "data/runs/deberta_checkpoints",  # the router folder and its checkpoints
    # Data
    split_seed: int | None = None,  # divide the cache anew, as evaluate.py --seeds does; none: its recorded splits
    form: Literal["auto", "pair", "pair_compat", "pool"] = "auto",  # auto: pool for a cache, pair for rows
    num_labels: int = 2,  # classes of `label` in pair form; 1 takes shares in [0, 1]
    skip_bad: int = 0,  # bad rows to pass over before stopping
    class_weights: Literal["none", "balanced"] = "none",  # balanced: rare classes weigh more in the loss
    # Model
    # folder or hub id; tiny: built from the data; auto: microsoft/deberta-v3-base, or tiny where its weights are
    # neither on this machine nor to be had from the hub
    model_name: str = "auto",
    max_length: int = 512,  # tokens kept of a row
    # Training
    batch_size: int = 16,  # rows per device and step
    global_batch_size: int = 0,  # rows per update over devices and accumulation; 0: batch_size x devices
    learning_rate: float | None = None,  # peak, after 10 % warm-up, then linear to 0; none: 2e-5, and 1e-3 for tiny
    epochs: int = 3,  # passes over the rows; a checkpoint_epoch_k each
    patience: int = 2,  # epochs without a better validation loss before stopping; 0: never
    # auto: bf16 where the GPU has it, or where this CPU is measured to gain by it
    precision: Literal["auto", "bf16", "fp32"] = "auto",
    seed: int = 42,  # of the new weights, the batch order and dropout
    # Run
    # auto: go on from the newest whole checkpoint of output_dir; none: start anew and set older ones aside; or the
    # path of a checkpoint
    resume: str = "auto",
    wandb: bool = False,  # record to W&B, offline where there is no key
    check_only: bool = False,  # check options, rows and weights, then stop
    trainer: dict | None = None,  # more settings under their transformers.TrainingArguments names
) -> None:
    say = console()
    extra = check_options(locals())
    out = Path(output_dir)

    train, dev, source = router_data.load_examples(data, val, cache, form, num_labels, skip_bad, say, split_seed)
    base = find_base(model_name, say)
    learning_rate = learning_rate or (LEARNING_RATE if base.folder else TINY_LEARNING_RATE)
    say(f"{len(train)} train and {len(dev)} validation rows, form {source.form}, base model {base.name}, "
        f"learning rate {learning_rate:g}")
    if check_only:
        return

    from routewright import tracking
    from routewright.encoders import longest_input
    from routewright.rank_watch import guard_process

    guard_process()
    quiet_libraries()
    model, tokenizer = build_model(base, train, source, seed)
    longest = min(max_length, longest_input(model, tokenizer))
    train_rows, dev_rows = (encode(tokenizer, part, source, longest) for part in (train, dev))
    probe = router_data.PadBatch(tokenizer.pad_token_id)(median_rows(train_rows, min(batch_size, 8)))
    bf16 = choose_precision(precision, model, probe, out, say) == "bf16"
    arguments = training_arguments(
        output_dir=output_dir, batch_size=batch_size, global_batch_size=global_batch_size, learning_rate=learning_rate,
        epochs=epochs, bf16=bf16, seed=seed, rows=len(train_rows), extra=extra)
    method = {"form": source.form, "base_model": base.name, "max_length": max_length, "class_weights": class_weights,
              "bf16": bf16, "models": list(source.models), "num_labels": source.num_labels, "patience": patience}

    with tracking.start("routewright", f"train_deberta-{out.name}", out,
                        {**method, "learning_rate": learning_rate, "epochs": epochs, "rows": len(train)},
                        mode="auto" if wandb else "off", job_type="train") as tracker:
        run = build_trainer(model, tokenizer, arguments, (train, dev), (train_rows, dev_rows), source, method=method,
                            weights=loss_weights(class_weights, train, source), tracker=tracker, say=say)
        run.run(resume=resume)
        if is_complete(run, out, "router.json", "dev_scores.json"):
            say(f"this run was finished before; its router: {out} (--resume none trains anew)")
            return
        scores = score_validation(run, dev_rows, source)
        save_weights(run, out)
        if run.is_world_process_zero():
            write_router(out, base, (train, dev), source, max_length)
            report(scores, out, tracker, say)
        run.accelerator.wait_for_everyone()


# --- options ----------------------------------------------------------------------------------------------------------

def check_options(given: dict[str, Any]) -> dict[str, Any]:
    """Ranges of the numbers and names in `trainer`, before any file is read. Returns the trainer mapping."""
    least_values = {"num_labels": 1, "skip_bad": 0, "max_length": 8, "batch_size": 1, "global_batch_size": 0,
                    "epochs": 1, "patience": 0}
    check_sizes(given, least_values)
    if given["learning_rate"] is not None and not given["learning_rate"] > 0:
        raise UserError(f"--learning_rate must be above 0; got {given['learning_rate']}")
    if given["cache"] and given["val"]:
        raise UserError("--val belongs to --data; a cache brings its own dev split")
    if given["split_seed"] is not None and not given["cache"]:
        raise UserError("--split_seed divides the prompts of a cache, so it needs --cache")
    if given["form"] == "pool" and not given["cache"]:
        raise UserError("--form pool needs --cache: rows of question, llm_id, label hold one model each")
    return check_trainer_names(dict(given["trainer"] or {}), OWNED)


# --- model ------------------------------------------------------------------------------------------------------------

def build_model(base: Base, train: Examples, source: Source, seed: int) -> tuple[Any, Any]:
    """(model, tokenizer) in float32 with a fresh head; label names are the models in pool form."""
    from transformers import set_seed

    from routewright.tiny_deberta import build_tiny, check_tokenizer
    set_seed(seed)
    names = source.models if source.pool else [f"label_{k}" for k in range(source.num_labels)]
    one_of = not source.pool and source.num_labels > 1
    labels = {"id2label": dict(enumerate(names)), "label2id": {n: i for i, n in enumerate(names)},
              "problem_type": "single_label_classification" if one_of else "multi_label_classification"}
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


def encode(tokenizer: Any, part: Examples, source: Source, max_length: int) -> Rows:
    """Token ids and labels, made once before the first step."""
    rows = router_data.encode(tokenizer, part.questions, part.llm_ids, max_length, compat=source.form == "pair_compat")
    return router_data.with_labels(rows, part.labels)


# --- training ---------------------------------------------------------------------------------------------------------

def loss_weights(class_weights: str, train: Examples, source: Source) -> np.ndarray | None:
    """(K,) class weights in pair form, (M,) weights of right answers in pool form, or None."""
    if class_weights == "none":
        return None
    if source.pool or source.num_labels == 1:
        return router_data.positive_weights(train.labels.reshape(len(train), -1))
    return router_data.class_weights(train.labels, source.num_labels)


def training_arguments(*, output_dir: str, batch_size: int, global_batch_size: int, learning_rate: float, epochs: int,
                       bf16: bool, seed: int, rows: int, extra: dict[str, Any]) -> Any:
    """TrainingArguments: CoBench's optimizer and schedule, the safety net's, then what the user put in `trainer`."""
    from transformers import TrainingArguments

    from routewright.trainer import safety_arguments

    world = int(os.environ.get("WORLD_SIZE", "1"))
    accumulation = max(1, global_batch_size // (batch_size * world))
    steps = -(-rows // (batch_size * world * accumulation))
    settings = {
        **safety_arguments(), "output_dir": output_dir, "seed": seed, "bf16": bf16,
        "per_device_train_batch_size": batch_size, "per_device_eval_batch_size": max(32, batch_size),
        "gradient_accumulation_steps": accumulation, "num_train_epochs": epochs, "learning_rate": learning_rate,
        "weight_decay": 0.01, "warmup_steps": 0.1, "lr_scheduler_type": "linear", "max_grad_norm": 1.0,
        "eval_strategy": "epoch", "save_strategy": "epoch", "load_best_model_at_end": True,
        "metric_for_best_model": "loss", "greater_is_better": False,
        "logging_steps": min(LOG_STEPS, max(1, steps // 2)), "disable_tqdm": True,
        "log_level": "error", "log_level_replica": "error", **extra}
    try:
        return TrainingArguments(**settings)
    except (ValueError, TypeError) as error:
        raise UserError(f"these training settings do not go together: {str(error).splitlines()[0]}") from None


def build_trainer(model: Any, tokenizer: Any, arguments: Any, parts: tuple[Examples, Examples],
                  encoded: tuple[Rows, Rows], source: Source, *, method: dict[str, Any], weights: np.ndarray | None,
                  tracker: Any, say: Say) -> Any:
    """The Trainer in the safety net, with our batch order and losses; loop, optimizer and schedule are the library's.

    parts, encoded: train and validation examples, and their token ids. They and `method` are fingerprinted: a run is
    only resumed with the same ones.
    """
    import torch
    from transformers import EarlyStoppingCallback, PrinterCallback, ProgressCallback, Trainer

    from routewright.checkpoints import fingerprint
    from routewright.trainer import EpochNames, SafetyNet

    whole = arguments.train_batch_size * arguments.gradient_accumulation_steps * arguments.world_size
    order = router_data.LengthGroupedOrder([len(r["input_ids"]) for r in encoded[0]], whole, arguments.seed)
    digests = {name: fingerprint([part.questions, part.llm_ids, part.labels.tolist()])
               for name, part in zip(("data", "validation data"), parts, strict=True)}

    if source.pool:
        from routewright.monitor import monitor_callback, monitor_of_estimates

        monitor, decide = monitor_of_estimates(source.table, source.dev_table, tracker, say,
                                               folder=arguments.output_dir)

    class RouterTrainer(SafetyNet, Trainer):
        def _get_train_sampler(self, train_dataset: Any = None) -> Any:
            return order

        def _get_eval_sampler(self, eval_dataset: Any) -> list[int]:
            return length_order(eval_dataset).tolist()

        def compute_loss(self, model: Any, inputs: dict, return_outputs: bool = False, **_: Any) -> Any:
            labels = inputs.pop("labels")
            outputs = model(**inputs)
            loss = router_loss(outputs.logits, labels, source, weights)
            return (loss, outputs) if return_outputs else loss

        def evaluation_loop(self, *args: Any, metric_key_prefix: str = "eval", **kwargs: Any) -> Any:
            found = super().evaluation_loop(*args, metric_key_prefix=metric_key_prefix, **kwargs)
            # The library averages the ranks' batches, padded ones included; the loss of the gathered rows is exact.
            rows = (torch.as_tensor(found.predictions), torch.as_tensor(found.label_ids))
            found.metrics[f"{metric_key_prefix}_loss"] = float(router_loss(*rows, source, weights))
            if source.pool:
                self.decisions = decide(probabilities(found.predictions, encoded[1]))
                if metric_key_prefix == "eval" and self.is_world_process_zero():
                    monitor.observe(self.state.global_step, self.decisions)
            return found

    callbacks = [EpochNames(), make_reporter(tracker, say, order.set_epoch)]
    if method["patience"] and arguments.load_best_model_at_end:
        callbacks.append(EarlyStoppingCallback(method["patience"]))
    if source.pool:
        callbacks.append(monitor_callback(monitor, None))  # the validation computes what it needs
    trainer = RouterTrainer(
        model=model, args=arguments, train_dataset=encoded[0], eval_dataset=encoded[1], processing_class=tokenizer,
        data_collator=router_data.PadBatch(tokenizer.pad_token_id, 8 if torch.cuda.is_available() else 1),
        compute_metrics=lambda found: validation_metrics(found.predictions, found.label_ids, source),
        callbacks=callbacks, row_names=parts[0].names, fingerprints={**digests, "config": method})
    # compute_loss takes a plain mean whatever the model's own forward does, so it never divides by the accumulation
    # steps; the safety net can only judge by that forward.
    trainer.model_accepts_loss_kwargs = False
    trainer.remove_callback(PrinterCallback)
    trainer.remove_callback(ProgressCallback)
    trainer.monitor = monitor if source.pool else None
    return trainer


def probabilities(predictions: np.ndarray, rows: Rows) -> np.ndarray:
    """Estimates (N, M) in the order of the rows, from logits in the order of `length_order`."""
    logits = np.empty(predictions.shape)
    logits[length_order(rows)] = predictions
    return 1 / (1 + np.exp(-logits))


def length_order(rows: Rows) -> np.ndarray:
    """Row indices from the longest to the shortest: what scoring batches are cut from."""
    return np.argsort([-len(r["input_ids"]) for r in rows], kind="stable")


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


# --- scores -----------------------------------------------------------------------------------------------------------

def validation_metrics(logits: np.ndarray, labels: np.ndarray, source: Source) -> dict[str, float]:
    """accuracy and AUROC on the validation rows, per model in pool form; those of a single class are left out."""
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


def score_validation(run: Any, dev_rows: Rows, source: Source) -> dict[str, float]:
    """Scores of the weights that were kept, on the validation rows; for a cache also of its cost-quality curve."""
    found = run.predict(dev_rows, metric_key_prefix="dev")
    scores = {name.removeprefix("dev_"): float(value) for name, value in found.metrics.items() if is_score(name)}
    if source.pool:
        scores |= curve_scores(probabilities(found.predictions, dev_rows), source)
        earned = run.monitor.measure(run.decisions)
        scores |= {name.removeprefix("dev/"): value for name, value in earned.items()}
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
    from routewright.tracking import dev_names

    kept = {name: round(value, 8) for name, value in scores.items()}
    write_json(out / "dev_scores.json", kept)
    tracker.summary(dev_names(kept))
    words = "  ".join(f"{name} {value:.4g}" for name, value in kept.items())
    say(f"kept the best epoch, on the validation rows: {words}\nrouter: {out}")


# --- saving -----------------------------------------------------------------------------------------------------------

def write_router(out: Path, base: Base, parts: tuple[Examples, Examples], source: Source, max_length: int) -> None:
    """router.json beside the final weights; parts: train and validation examples."""
    from routewright.routers.base import write_card
    from routewright.schema import Prompt

    if source.table is not None:
        prompts, held = source.table.prompts, source.dev_table.prompts
        pool, cache = source.table.pool, source.table.fingerprint
    else:
        prompts, held = ([Prompt(*row) for row in zip(part.names, part.questions, strict=True)] for part in parts)
        pool, cache = None, ""
    write_card(out, kind="trained_deberta", name=out.name, models=source.models, pool=pool, train_prompts=prompts,
               dev_prompts=held, cache_fingerprint=cache, base_model=base.name,
               options={"form": source.form.removesuffix("_compat"), "compat": source.form == "pair_compat",
                        "max_length": max_length, "context": source.table is not None})


if __name__ == "__main__":
    launch(main)
