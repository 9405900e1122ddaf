"""Trains a causal language model as a router on preferences between decisions: DPO with LoRA, in 4 bits on 8 GB.

A pair is one prompt and two labels: the model whose answer earned more there (chosen) and one whose answer earned
less (rejected), quality and cost weighed by the reward of the set. `build_sets.py` makes pairs from an outcome cache;
without `--data` they are built from `--cache` in memory. DPO (Rafailov et al. 2023, TRL's DPOTrainer) raises the
log-prob of the chosen label over that of the rejected one, measured from where training began. A router of train_llm.py
or of this script can be that beginning (`--warm_start`). Afterwards the router reads the logits of the labels.

Departures from the offline-DPO project and from TRL:
- any number of models with their recorded costs, where there was one fixed remote call and no cost in the pairs
- a pair is one sequence and the vocabulary is computed for answer positions only (`shared_prefix`): equal losses
- no end token after a label: its log-prob could move the loss without moving a decision
- the reference is the policy at the start, warm start included: its log-probs are kept in the run folder, so that no
  second model is held and a resumed run measures from the same place
- the epoch that is kept is the one whose decisions earn most on the cache's dev prompts. The loss on dev pairs counts
  a pair worth .01 like one worth .9, so it may fall while decisions get worse; it decides only where no cache is known
- base models over 7B parameters are refused; neither Ray nor vLLM nor SGLang plays a part

8 GB card:     accelerate launch --config rtx4060.yaml src/train_dpo.py        (in a shell that sourced cmd/env.sh)
               accelerate launch --config_file accelerate_configs/rtx4060.yaml src/train_dpo.py
               ... src/train_dpo.py --config configs/train_dpo/rtx4060.yaml --warm_start data/runs/sft
Any device:    python src/train_dpo.py                          (bare: pairs of the shipped sample cache)
               python src/train_dpo.py --config configs/train_dpo/sample.yaml
Many devices:  torchrun --nproc_per_node=4 src/train_dpo.py ...

Reads DATA, its card and dev twin, and the cache the card names; or the cache alone. Writes into OUT: the router folder
(LoRA adapter, or whole weights for --lora_r 0, tokenizer, router.json), the resumable checkpoints `checkpoint-<step>`
with a name `checkpoint_epoch_<k>` for each epoch's end (the last 3 and the best are kept), reference_logps.safetensors,
train_log.jsonl, monitor.jsonl, dev_scores.json (each figure also at the start) and config.resolved.yaml. The same line
again goes on where a stopped run was.

Measured on one AMD EPYC core (torch 2.13.0+cpu): the bare run takes 87 CPU seconds. A step on two pairs (prompt 300,
answer 8) of the Qwen2.5-0.5B shape with LoRA takes 12.1 CPU seconds where TRL's DPOTrainer takes 55.0, and half of the
memory over the model's own (tests/benchmarks/bench_train_dpo.py --layers 24).
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from routewright import sets
from routewright.base_models import choose_precision, median_rows
from routewright.errors import UserError
from routewright.language_models import (
    ADAPTER_CARD,
    adapter_base,
    add_lora,
    check_size,
    choose_wrap,
    count_parameters,
    encode_instructions,
    find_causal,
    label_ids,
    label_logits,
    load_causal,
)
from routewright.launch import launch
from routewright.prompts import full_text
from routewright.reward import Reward
from routewright.router_data import LengthGroupedOrder, PadBatch, hold_out
from routewright.templates import Template
from routewright.textfiles import write_json
from routewright.training import (
    LOG_STEPS,
    Say,
    best_by,
    check_sizes,
    check_trainer_names,
    console,
    is_complete,
    is_score,
    kept_checkpoint,
    last_epochs,
    make_reporter,
    own_settings,
    quiet_libraries,
    save_weights,
    told_as_user_errors,
    write_router,
)
from routewright.training_sets import Rows, TrainingSet, add_outcomes, read_with_twin

BASE_MODEL = "Qwen/Qwen2.5-1.5B-Instruct"
LEARNING_RATE = 5e-5
SMALL, SMALL_LEARNING_RATE = 50_000_000, 1e-3  # parameters below which a base is a toy: bigger steps, bare style
VALIDATION_SHARE = 0.1  # held out by near-duplicate group where the set has no dev twin
KEPT = 3  # checkpoints; the best one is always among them
PLAIN = Template("difficulty", ("any",), "bare")  # for pairs without a card: the prompt is all prompt
OWNED = {"output_dir": "output_dir", "per_device_train_batch_size": "batch_size", "learning_rate": "learning_rate",
         "gradient_accumulation_steps": "global_batch_size", "num_train_epochs": "epochs", "seed": "seed",
         "bf16": "precision", "fp16": "precision", "report_to": "wandb", "max_length": "max_length", "beta": "beta",
         "loss_type": "loss"}


def main(
    *,
    # Files
    data: str = "",  # pairs: prompt, chosen, rejected (JSON list or JSONL), card beside it; empty: built from --cache
    val: str = "",  # pairs to validate on; empty: the dev twin that the card names, else a tenth held out by group
    # outcome cache: pairs where there is no --data, calibration and the monitor; empty: the one the card names, or
    # data/sample
    cache: str = "",
    output_dir: str = "data/runs/dpo",  # the router folder and its checkpoints
    min_margin: float = 0.0,  # train on pairs whose rewards differ by at least this much
    skip_bad: int = 0,  # bad rows to pass over before stopping
    # Model
    # folder or hub id, up to 7B parameters; auto: Qwen/Qwen2.5-1.5B-Instruct, or the sample pool's strong model where
    # its weights are neither on this machine nor to be had from the hub
    model_name: str = "auto",
    warm_start: str = "",  # router folder of train_llm.py or train_dpo.py to begin with, whole or adapter
    max_length: int = 1024,  # tokens of a prompt with its answer; only the prompt inside it is cut
    wrap: Literal["auto", "alpaca", "chat", "none"] = "auto",  # around the prompt; auto: the warm start's, or chat
    four_bit: bool | None = None,  # 4-bit base weights (NF4, double quantisation); none: on a GPU yes, on a CPU no
    lora_r: int = 16,  # rank of LoRA adapters on all linear layers; 0: all weights are trained
    lora_alpha: int = 32,  # their scale is alpha / r
    lora_dropout: float = 0.05,  # dropout inside them
    # Training
    beta: float = 0.1,  # how dear it is to leave the start
    loss: Literal["sigmoid", "ipo", "hinge", "robust"] = "sigmoid",  # robust takes --trainer.label_smoothing
    batch_size: int = 1,  # pairs per device and step
    global_batch_size: int = 16,  # pairs per update over devices and accumulation
    learning_rate: float | None = None,  # peak, after 10 % warm-up, then cosine to 0; none: 5e-5, 1e-3 for toy bases
    epochs: int = 3,  # passes over the pairs; a checkpoint_epoch_k each
    patience: int = 2,  # epochs without a better dev reward (dev loss without a cache) before stopping; 0: never
    # auto: bf16 where the GPU has it, or where this CPU is measured to gain by it; 4-bit weights always take bf16
    precision: Literal["auto", "bf16", "fp32"] = "auto",
    seed: int = 42,  # of new adapters, the order of pairs and dropout
    # Run
    # auto: go on from the newest whole checkpoint of output_dir; none: start anew and set older ones aside; or the
    # path of a checkpoint
    resume: str = "auto",
    wandb: bool = False,  # record to W&B, offline where there is no key
    check_only: bool = False,  # check options, pairs, weights and answer tokens, then stop
    trainer: dict | None = None,  # more settings under their trl.DPOConfig names
) -> None:
    say = console()
    extra = check_options(locals())
    out = Path(output_dir)

    start = find_start(model_name, warm_start, wrap, out, say)
    source = load_source(data, val, cache, skip_bad, start, say)
    keep_clear_pairs(source, min_margin)
    if four_bit is None:
        four_bit = on_gpu() and (bool(lora_r) or start.adapter)
    check_method(start, four_bit, lora_r, precision, say)
    learning_rate = learning_rate or (SMALL_LEARNING_RATE if start.small else LEARNING_RATE)
    say(f"{len(source.train)} train and {len(source.dev)} validation pairs, {source.words}, base model {start.name}"
        f"{', warm start ' + warm_start if warm_start else ''}, {'LoRA' if lora_r or start.adapter else 'all weights'}"
        f"{' over 4 bits' if four_bit else ''}, learning rate {learning_rate:g}")
    if check_only:
        check_tokens(start, source, max_length)
        return

    from routewright import tracking
    from routewright.encoders import longest_input
    from routewright.rank_watch import guard_process

    guard_process()
    quiet_libraries()
    model, tokenizer = build_model(start, four_bit, lora_r, lora_alpha, lora_dropout, seed)
    wrap = choose_wrap(start.wrap, tokenizer)
    longest = min(max_length, longest_input(model, tokenizer))
    rows = tuple(encode(tokenizer, source, part, wrap, longest) for part in (source.train, source.dev))
    bf16 = four_bit or choose_precision(precision, model, probe_batch(tokenizer, rows[0]), out, say) == "bf16"
    arguments = training_arguments(
        output_dir=output_dir, batch_size=batch_size, global_batch_size=global_batch_size, learning_rate=learning_rate,
        epochs=epochs, bf16=bf16, seed=seed, rows=len(rows[0]), max_length=longest, beta=beta, loss=loss,
        dropout=bool(lora_r and lora_dropout), four_bit=four_bit, by_reward=source.rewards is not None, extra=extra)
    method = {"pairs": source.words, "base_model": start.name, "warm_start": warm_start, "max_length": longest,
              "wrap": wrap, "four_bit": four_bit, "lora_r": lora_r, "lora_alpha": lora_alpha,
              "lora_dropout": lora_dropout, "min_margin": min_margin, "beta": beta, "loss": loss, "bf16": bf16,
              "patience": patience, **own_settings(arguments, extra)}

    with tracking.start("routewright", f"train_dpo-{out.name}", out,
                        {**method, "learning_rate": learning_rate, "epochs": epochs, "rows": len(rows[0])},
                        mode="auto" if wandb else "off", job_type="train") as tracker:
        reader = Reader(source, tokenizer, wrap, longest) if source.rewards is not None else None
        with told_as_user_errors(extra):
            run = build_trainer(model, tokenizer, arguments, source, rows, reader, method=method, tracker=tracker,
                                say=say)
        run.run(resume=resume)
        if is_complete(run, out, "dev_scores.json", *(["router.json"] if source.table is not None else [])):
            say(f"this run was finished before; its {source.product}: {out} (--resume none trains anew)")
            return
        scores = score_validation(run, reader, source)
        save_weights(run, out)
        if source.table is not None:
            write_router(run, out, "dpo", source, tokenizer, wrap=wrap, max_length=longest, base_model=start.name,
                         four_bit=four_bit, seed=seed, say=say, **({"warm_start": warm_start} if warm_start else {}))
        if run.is_world_process_zero():
            report(scores, out, source, tracker, say)
        run.accelerator.wait_for_everyone()


# --- options ----------------------------------------------------------------------------------------------------------

def check_options(given: dict[str, Any]) -> dict[str, Any]:
    """Ranges of the numbers and names in `trainer`, before any file is read. Returns the trainer mapping."""
    least_values = {"skip_bad": 0, "max_length": 8, "lora_r": 0, "lora_alpha": 1, "batch_size": 1,
                    "global_batch_size": 1, "epochs": 1, "patience": 0}
    check_sizes(given, least_values)
    for name in ("learning_rate", "beta"):
        if given[name] is not None and not given[name] > 0:
            raise UserError(f"--{name} must be above 0; got {given[name]}")
    if not given["min_margin"] >= 0:
        raise UserError(f"--min_margin must be 0 or more; got {given['min_margin']}")
    if not 0 <= given["lora_dropout"] < 1:
        raise UserError(f"--lora_dropout must be from 0 to below 1; got {given['lora_dropout']}")
    if given["val"] and not given["data"]:
        raise UserError("--val belongs to --data; a cache brings its own dev split")
    extra = check_trainer_names(dict(given["trainer"] or {}), OWNED, "trl:DPOConfig")
    check_smoothing(given["loss"], extra.get("label_smoothing", 0.0))
    return extra


def check_smoothing(loss: str, smoothing: float) -> None:
    """`--trainer.label_smoothing`, the share of pairs that are taken to be the wrong way round. Raises UserError."""
    if loss in ("ipo", "hinge") and smoothing:
        raise UserError(f"--trainer.label_smoothing: --loss {loss} does not read it; sigmoid and robust do")
    if not 0 <= smoothing < 0.5:
        raise UserError("--trainer.label_smoothing, the share of pairs taken to be the wrong way round, must be from 0 "
                        f"to below 0.5; got {smoothing}")
    if loss == "robust" and not smoothing:
        raise UserError("--loss robust without --trainer.label_smoothing is --loss sigmoid; add the share of pairs "
                        "that may be the wrong way round, such as 0.1")


def on_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


def check_method(start: Start, four_bit: bool, lora_r: int, precision: str, say: Say) -> None:
    """What this base model can be trained with on this machine. Raises UserError."""
    if four_bit and not (lora_r or start.adapter):
        raise UserError("--four_bit true freezes the base weights, so there is nothing to train without adapters; "
                        "leave --lora_r at 16")
    if four_bit and precision == "fp32":
        raise UserError("--four_bit computes in bf16; leave --precision auto")
    if four_bit and not on_gpu():
        say("WARNING: 4-bit on the CPU, slow; --four_bit false is faster here")


# --- where training begins --------------------------------------------------------------------------------------------

@dataclass
class Start:
    """The weights to begin with. name: of the base model; folder: of the weights or adapter; template, wrap: how a
    warm start was asked, else None and what `--wrap` says."""

    name: str
    folder: Path
    adapter: bool
    small: bool
    wrap: str
    template: Template | None = None


def find_start(model_name: str, warm_start: str, wrap: str, out: Path, say: Say) -> Start:
    """Base model or warm start, found and small enough. Raises UserError and MissingSetup."""
    card: dict[str, Any] = {}
    if warm_start:
        card, folder = read_warm_start(warm_start, out)
        name = str(card.get("base_model") or folder)
    else:
        base = find_causal(model_name, say, BASE_MODEL)
        folder, name = base.folder, base.name
    adapter = (folder / ADAPTER_CARD).is_file()
    check_size(folder, name)
    if warm_start and model_name != "auto":
        check_same_base(folder, adapter, model_name, warm_start, say)
    if warm_start and not adapter:
        name = str(warm_start)  # its weights are a base model of their own
    known = str((card.get("options") or {}).get("wrap") or "auto")
    if "auto" not in (known, wrap) and known != wrap:
        raise UserError(f"{warm_start}: it was trained with wrap {known} and is asked for {wrap}; leave --wrap away")
    template = Template.from_card(card.get("template") or {}, f"{warm_start}/router.json") if card else None
    return Start(name, folder, adapter, count_parameters(folder) < SMALL, known if wrap == "auto" else wrap, template)


def read_warm_start(warm_start: str, out: Path) -> tuple[dict[str, Any], Path]:
    """(router.json, folder) of a language-model router that decides. Raises UserError."""
    from routewright.routers.base import read_card

    folder = Path(warm_start)
    card = read_card(folder)
    if folder.resolve() == out.resolve():
        raise UserError(f"--warm_start {warm_start} is the output folder too, whose weights would be overwritten; "
                        "choose another --output_dir")
    if card["kind"] not in ("llm", "dpo") or not any((folder / n).is_file() for n in (ADAPTER_CARD, "config.json")):
        raise UserError(f"{warm_start}: a {card['kind']} router cannot be trained further here; --warm_start takes a "
                        "folder of train_llm.py or train_dpo.py")
    mode = (card.get("template") or {}).get("mode")
    if mode != "decision":
        raise UserError(f"{warm_start}: its answers are levels of difficulty, and pairs hold decisions; warm-start "
                        "from a router of decisions (build_sets.py --mode decision)")
    return card, folder


def check_same_base(folder: Path, adapter: bool, model_name: str, warm_start: str, say: Say) -> None:
    """A base model that is named beside a warm start must be the one that it belongs to."""
    if not adapter:
        raise UserError(f"--warm_start {warm_start} holds whole weights, so --model_name {model_name} would not be "
                        "used; give one of the two")
    own, named = adapter_base(folder), find_causal(model_name, say, BASE_MODEL).folder
    if own.resolve() != Path(named).resolve():
        raise UserError(f"--warm_start {warm_start}: this adapter belongs to the base model {own}, not to "
                        f"{model_name}; leave --model_name away")


# --- pairs ------------------------------------------------------------------------------------------------------------

def load_source(data: str, val: str, cache: str, skip_bad: int, start: Start, say: Say) -> TrainingSet:
    """Every pair checked before any weight is loaded; warnings go to `say`. Raises UserError naming file and row."""
    if not data:
        return pairs_of_cache(cache or "data/sample", start, say)
    rows, held, card = read_with_twin("dpo", data, val, hold_out_prompts, skip_bad, say)
    if card is None:
        say(f"WARNING: {data} has no card, so nothing says which models its answers stand for: the result will be a "
            "preference-tuned language model and no router; build pairs with build_sets.py to train one")
        if start.template:
            raise UserError(f"{data}: pairs without a card do not say whether their answers mean what those of the "
                            "warm start mean; build them with build_sets.py")
        return TrainingSet(data, rows, held)
    source = TrainingSet(data, rows, held, Template.from_card(card["template"], data))
    check_template(source, start)
    add_outcomes(source, card, cache, say)
    return source


def hold_out_prompts(rows: Rows) -> tuple[Rows, Rows]:
    """(train, held) pairs; all pairs of a prompt, and of its near-duplicates, on one side."""
    prompts = list(dict.fromkeys(row["prompt"] for row in rows))
    held = {prompts[i] for i in hold_out(prompts, VALIDATION_SHARE)[1]}
    return [r for r in rows if r["prompt"] not in held], [r for r in rows if r["prompt"] in held]


def keep_clear_pairs(source: TrainingSet, min_margin: float) -> None:
    """Leave train pairs of a smaller margin out: which of two models earns .02 more is mostly chance."""
    if min_margin:
        lacking = next((i for i, row in enumerate(source.train, 1) if "margin" not in row), None)
        if lacking:
            raise UserError(f"{source.name}: row {lacking} has no `margin`, which --min_margin needs; build the pairs "
                            "with build_sets.py")
        source.train = [row for row in source.train if row["margin"] >= min_margin]
        if not source.train:
            raise UserError(f"{source.name}: no pair has a margin of {min_margin} or more; lower --min_margin")


def check_template(source: TrainingSet, start: Start) -> None:
    """Labels must be decisions, and a warm start must have been asked as these pairs ask, or its own would mean other
    models."""
    if source.template.mode != "decision":
        raise UserError(f"{source.name}: the labels of its card are levels of difficulty, and pairs hold decisions; "
                        "build the set again with build_sets.py --mode decision")
    if start.template and start.template != source.template:
        theirs, ours = start.template, source.template
        what = (f"models {', '.join(theirs.models)}" if theirs.models != ours.models else f"style {theirs.style}"
                if theirs.style != ours.style else "other words or prices")
        raise UserError(f"{source.name}: these pairs ask otherwise than the warm start was trained to answer (there: "
                        f"{what}); build both sets with one call of build_sets.py")


def pairs_of_cache(cache: str, start: Start, say: Say) -> TrainingSet:
    """Pairs of the linear reward, best model against each other one, as build_sets.py makes them by default."""
    table = sets.table_of_cache(cache, models=start.template.models if start.template else None)
    for split in ("train", "dev"):
        if split not in table.splits:
            raise UserError(f"{cache}: no prompt is in split {split}; divide it with build_sets.py --split_seed 0 and "
                            "give its pairs as --data")
    style = start.template.style if start.template else "bare" if start.small else "full"
    template = Template.of_pool(table.pool, table.models, "decision", style)
    check_template(TrainingSet(cache, [], [], template), start)
    reward, parts = Reward.named("linear"), {}
    unit = sets.cost_unit_of(table.split("train"))
    for split in ("train", "dev"):
        part, _ = sets.merge_duplicates(table.split(split))
        rewards = sets.reward_table(part, reward, unit_usd=unit)
        parts[split] = sets.dpo_rows(part, template, sets.preference_pairs(rewards, part.cost, part.quality_mean))
    if not parts["train"] or not parts["dev"]:
        raise UserError(f"{cache}: its models earn the same on every prompt of a split, so there are no pairs")
    say(f"pairs of {cache}: linear reward, the best model against each other one (build_sets.py offers more)")
    dev = table.split("dev")
    return TrainingSet(cache, parts["train"], parts["dev"], template, table.split("train"), dev,
                       sets.reward_table(dev, reward, unit_usd=unit))


# --- token ids --------------------------------------------------------------------------------------------------------

def encode(tokenizer: Any, source: TrainingSet, rows: Rows, wrap: str, max_length: int) -> Rows:
    """prompt_ids, chosen_ids and rejected_ids per pair; of a label its one token, of free text also the end token."""
    sides = ("chosen", "rejected")
    if source.template is not None:
        ids = label_ids(tokenizer, source.template, wrap)
        answers = {label: [ids[i]] for i, label in enumerate(source.template.labels)}
        texts = {row[side]: answers[source.template.labels[source.template.parse(row[side])]]
                 for row in rows for side in sides}
    else:
        distinct = list(dict.fromkeys(row[side] for row in rows for side in sides))
        end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
        found = tokenizer(distinct, add_special_tokens=False)["input_ids"]
        texts = {text: answer + end for text, answer in zip(distinct, found, strict=True)}
    room = max_length + 1 - min(max(map(len, texts.values())), max_length // 2)
    prompts = list(dict.fromkeys(row["prompt"] for row in rows))  # a prompt has up to M - 1 pairs
    made = encode_instructions(tokenizer, source.template or PLAIN, wrap, prompts, room)
    of_prompt = dict(zip(prompts, made, strict=True))
    return [{"prompt_ids": of_prompt[row["prompt"]], "chosen_ids": texts[row["chosen"]],
             "rejected_ids": texts[row["rejected"]]} for row in rows]


def check_tokens(start: Start, source: TrainingSet, max_length: int) -> None:
    """Whether the tokenizer has the wrap and the labels, without loading any weight."""
    from routewright.encoders import load_tokenizer

    quiet_libraries()
    tokenizer = load_tokenizer(adapter_base(start.folder) if start.adapter else start.folder)
    encode(tokenizer, source, source.train[:8], choose_wrap(start.wrap, tokenizer), max_length)


def probe_batch(tokenizer: Any, rows: Rows) -> dict[str, Any]:
    """A few prompts of median length: what a precision is timed on."""
    return PadBatch(tokenizer.pad_token_id)(median_rows([{"input_ids": row["prompt_ids"]} for row in rows], 4))


class Reader:
    """Reads the network's decisions on the dev prompts of the cache."""

    def __init__(self, source: TrainingSet, tokenizer: Any, wrap: str, max_length: int) -> None:
        template, self.pad_id = source.template, tokenizer.pad_token_id
        prompts = [template.render(full_text(prompt)) for prompt in source.dev_table.prompts]
        self.rows = encode_instructions(tokenizer, template, wrap, prompts, max_length)
        self.labels = label_ids(tokenizer, template, wrap)
        self.columns = np.array([source.dev_table.models.index(name) for name in template.models])

    def decisions(self, model: Any) -> np.ndarray:
        """(N,) the model that the network's first choice names, as columns of the table."""
        return self.columns[label_logits(model, self.rows, self.labels, pad_id=self.pad_id).argmax(1)]


# --- model ------------------------------------------------------------------------------------------------------------

def build_model(start: Start, four_bit: bool, lora_r: int, alpha: int, dropout: float, seed: int) -> tuple[Any, Any]:
    """(model, tokenizer) with what is to be trained in float32: fresh adapters, a warm start's, or all weights.

    Frozen weights are held in 4 bits, in bf16 on a GPU, else in float32.
    """
    from transformers import set_seed

    set_seed(seed)
    frozen = bool(lora_r) or start.adapter
    dtype = "bf16" if four_bit or (frozen and on_gpu()) else "fp32"
    model, tokenizer = load_causal(start.folder, four_bit=four_bit, dtype=dtype, trainable_adapter=True)
    if lora_r and not start.adapter:
        model = add_lora(model, r=lora_r, alpha=alpha, dropout=dropout, seed=seed)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    return model, tokenizer


# --- training ---------------------------------------------------------------------------------------------------------

def training_arguments(*, output_dir: str, batch_size: int, global_batch_size: int, learning_rate: float, epochs: int,
                       bf16: bool, seed: int, rows: int, max_length: int, beta: float, loss: str, dropout: bool,
                       four_bit: bool, by_reward: bool, extra: dict[str, Any]) -> Any:
    """DPOConfig: the offline-DPO project's optimizer and schedule, the safety net's, then what `trainer` holds."""
    from trl import DPOConfig

    from routewright.trainer import safety_arguments

    gpu = on_gpu()
    accumulation = global_batch_size // (batch_size * int(os.environ.get("WORLD_SIZE", "1")))
    steps = -(-rows // global_batch_size)
    settings = {
        **safety_arguments(), "output_dir": output_dir, "seed": seed, "bf16": bf16, "max_length": max_length,
        "beta": beta, "loss_type": loss, "disable_dropout": not dropout,
        "per_device_train_batch_size": batch_size, "gradient_accumulation_steps": accumulation,
        "per_device_eval_batch_size": max(8, batch_size), "num_train_epochs": epochs, "learning_rate": learning_rate,
        "weight_decay": 0.0, "warmup_steps": 0.1, "lr_scheduler_type": "cosine", "max_grad_norm": 1.0,
        "optim": "paged_adamw_8bit" if gpu and four_bit else "adamw_torch", "activation_checkpointing": gpu,
        "eval_strategy": "epoch", "save_strategy": "epoch", "save_total_limit": KEPT, "load_best_model_at_end": True,
        "logging_steps": min(LOG_STEPS, max(1, steps // 2)), "disable_tqdm": True,
        "log_level": "error", "log_level_replica": "error", **extra,
        **best_by(extra, ("reward", "loss") if by_reward else ("loss",))}
    if not gpu and "8bit" in str(settings["optim"]):
        raise UserError(f"--trainer.optim {settings['optim']}: 8-bit optimizers need a GPU; leave it away here")
    try:
        return DPOConfig(**settings)
    except (ValueError, TypeError) as error:
        raise UserError(f"these training settings do not go together: {' '.join(str(error).split())}") from None


def build_trainer(model: Any, tokenizer: Any, arguments: Any, source: TrainingSet, encoded: tuple[Rows, Rows],
                  reader: Reader | None, *, method: dict[str, Any], tracker: Any, say: Say) -> Any:
    """TRL's DPOTrainer on shared prefixes, in the safety net; loss, loop, optimizer and schedule are the library's.

    Token ids and `method` are fingerprinted: a run is only resumed with the same ones.
    """
    from datasets import Dataset
    from transformers import EarlyStoppingCallback, PrinterCallback, ProgressCallback

    from routewright.checkpoints import fingerprint
    from routewright.shared_prefix import SharedPrefixTrainer
    from routewright.trainer import SafetyNet

    whole = arguments.train_batch_size * arguments.gradient_accumulation_steps * arguments.world_size
    lengths = [len(row["prompt_ids"]) for row in encoded[0]]
    order = LengthGroupedOrder(lengths, whole, arguments.seed, grouped=arguments.train_batch_size > 1)

    class RouterDPO(SafetyNet, SharedPrefixTrainer):
        monitor: Any = None
        looks: Any = None  # the monitor's callback

        def _get_train_sampler(self, train_dataset: Any = None) -> Any:
            return order

        def evaluation_loop(self, *args: Any, metric_key_prefix: str = "eval", **kwargs: Any) -> Any:
            found = super().evaluation_loop(*args, metric_key_prefix=metric_key_prefix, **kwargs)
            if self.monitor:
                self.looks.look(self.state, self.model)  # where it has not at this step
                seen = self.monitor.history[-1]["dev/reward"] if self.monitor.history else None  # rank 0 has it
                found.metrics[f"{metric_key_prefix}_reward"] = self._from_all(seen)[0]
            return found

        def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
            for figures in self._metrics.values():  # of no meaning where an answer is one label
                for name in ("num_tokens", "entropy", "mean_token_accuracy", "logits/chosen", "logits/rejected"):
                    figures.pop(name, None)
            super().log(logs, *args, **kwargs)

        def create_model_card(self, *args: Any, **kwargs: Any) -> None:
            """router.json says what this is; the library's own page would be written anew at each checkpoint."""

    callbacks = [last_epochs(), make_reporter(tracker, say, order.set_epoch)]
    if method["patience"] and arguments.load_best_model_at_end:
        callbacks.append(EarlyStoppingCallback(method["patience"]))
    run = RouterDPO(
        model=model, args=arguments, train_dataset=Dataset.from_list(encoded[0]),
        eval_dataset=Dataset.from_list(encoded[1]), processing_class=tokenizer, callbacks=callbacks,
        row_names=[row_name(source.name, i, row) for i, row in enumerate(source.train)],
        fingerprints={"data": fingerprint(encoded[0]), "validation data": fingerprint(encoded[1]), "config": method})
    run.remove_callback(PrinterCallback)
    run.remove_callback(ProgressCallback)
    if reader:
        from routewright.monitor import DecisionMonitor, monitor_callback

        run.monitor = DecisionMonitor(source.dev_table, source.rewards, tracker, say, folder=arguments.output_dir)
        run.looks = monitor_callback(run.monitor, lambda: reader.decisions(run.model))
        run.add_callback(run.looks)
    return run


def row_name(path: str, index: int, row: dict[str, Any]) -> str:
    where = f"{path} prompt {row['prompt_id']}" if row.get("prompt_id") else f"{path}: row {index + 1}"
    return f"{where}, {row['chosen'][:20]!r} over {row['rejected'][:20]!r}"


# --- scores -----------------------------------------------------------------------------------------------------------

def score_validation(run: Any, reader: Reader | None, source: TrainingSet) -> dict[str, float]:
    """Scores of the weights that were kept, on the dev pairs and prompts; `start/<name>`: the same before training."""
    rows = run.eval_dataset
    before = np.array([rows["ref_chosen_logps"], rows["ref_rejected_logps"]]).T
    after = run.pair_logps(rows)
    gain = run.beta * ((after - before) @ [1.0, -1.0])
    scores = {**figures_of(run, kept_checkpoint(run)), "reward_margin": float(gain.mean()),
              "reward_accuracy": float((gain > 0).mean())}
    for prefix, logps in (("", after), ("start/", before)):
        margin = logps @ [1.0, -1.0]
        scores |= {f"{prefix}margin": float(margin.mean()), f"{prefix}accuracy": float((margin > 0).mean())}
    if reader:
        scores |= named(run.monitor.measure(reader.decisions(run.model)), "")
        first = run.monitor.history[0] if run.monitor.history else {}
        if first.get("step") == 0:
            scores |= named({k: v for k, v in first.items() if "/" in k}, "start/")
        scores["best_constant_reward"] = float(source.rewards.mean(0).max())
    return scores


def named(figures: dict[str, float], prefix: str) -> dict[str, float]:
    return {prefix + name.removeprefix("dev/"): value for name, value in figures.items()}


def figures_of(run: Any, checkpoint: Path) -> dict[str, float]:
    """Epoch of a checkpoint and the loss on the dev pairs as it was logged there; no loss where none was."""
    step = int(checkpoint.name.rpartition("-")[2])
    logged = [entry for entry in run.state.log_history if entry["step"] == step]
    epoch = next((entry["epoch"] for entry in logged), run.state.epoch)
    losses = [entry["eval_loss"] for entry in logged if "eval_loss" in entry]
    return {"epoch_kept": epoch, **({"loss": losses[-1]} if losses else {})}


def report(scores: dict[str, float], out: Path, source: TrainingSet, tracker: Any, say: Say) -> None:
    """dev_scores.json, the tracker's summary, and what has moved."""
    from routewright.tracking import dev_names

    kept = {name: round(value, 8) for name, value in scores.items() if value == value and is_score(name)}
    write_json(out / "dev_scores.json", kept)
    tracker.summary(dev_names(kept))
    moved = [f"{name} {kept['start/' + name]:.4g} -> {kept[name]:.4g}"
             for name in ("margin", "accuracy", "reward", "quality", "cost_usd") if "start/" + name in kept]
    say(f"kept epoch {kept['epoch_kept']:g}, on the validation pairs and prompts: {'  '.join(moved)}")
    now, first = (kept.get(name, 0.0) for name in ("reward", "start/reward"))
    if now < first:
        say(f"WARNING: its decisions earn {now:.4f} a prompt, those of the start {first:.4f}; keep the start, or try "
            "a lower learning rate, more pairs or a higher --beta")
    say(f"{source.product}: {out}")


if __name__ == "__main__":
    launch(main)
