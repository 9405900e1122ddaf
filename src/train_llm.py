"""Trains a causal language model as a router: it reads a prompt and answers with one token, which model or how hard.

The rows are CoBench's Alpaca form, JSON lines `instruction`, `response`. `build_sets.py` makes them from an outcome
cache, with a card beside the file that says what the responses mean: a decision (the label of the model with the best
reward) or a difficulty (a level from 0 to 9). The loss is taken on the response and its end alone. Afterwards nothing
is sampled: the router reads the logits of the allowed answers in one forward pass and calibrates them on the dev split.

Departures from CoBench's script:
- the response is the decision or the difficulty; there, models were trained on answers to the question and then asked
  for a difficulty that nothing had taught them. Rows without a card still train as plain supervised fine-tuning, with
  a warning that the result is no router
- a dev set is read: loss and accuracy of the label each epoch, the decisions' reward, cost and collapse on the cache's
  dev prompts, early stop, and the best epoch is what is kept
- accumulation is global batch / (batch x devices), and a global batch that does not divide is an error
- training and serving make the very same token ids, and a long prompt never loses the question or its answer
- batches of like lengths (or packs of several rows, `--packing true`), instead of every row padded to the longest
- bf16 where the hardware gains by it; LoRA and 4-bit weights for an 8 GB card; a kill costs no more than an epoch

One device:    ./cmd/run_train_llm.sh                          (bare: the shipped sample rows)
               ./cmd/run_train_llm.sh DATA MODEL OUT BATCH GLOBAL_BATCH LR EPOCHS MAXLEN
               python src/train_llm.py --config configs/train_llm/sample.yaml
8 GB card:     python src/train_llm.py --config configs/train_llm/rtx4060.yaml
Many devices:  NUM_GPUS=4 ./cmd/run_train_llm.sh ...           (torchrun)
               NUM_PROCESSES=2 ./cmd/run_train_llm.sh ...      (the same on a CPU, over gloo)

Reads DATA, its card and dev twin, and the cache that the card names. Writes into OUT: the router folder (Hugging Face
weights or a LoRA adapter, tokenizer, router.json), the resumable checkpoints `checkpoint-<step>` with a name
`checkpoint_epoch_<k>` for each epoch's end (the last 3 and the best are kept), train_log.jsonl, monitor.jsonl,
dev_scores.json and config.resolved.yaml. The same line again goes on where a stopped run was.

Measured on one AMD EPYC core (torch 2.13.0+cpu): configs/train_llm/sample.yaml (1,168 rows of about 36 tokens, 0.57 M
parameters, 7 epochs) takes 45 CPU seconds, imports and calibration included. On three divisions of the sample pool's
prompts its decisions earn 0.056 a dev prompt more than the best constant model (0.047 to 0.062; the oracle 0.15 more).
10 kill -9s of one line (tests/kill_script.py): no resume needed hands, losses and weights equal to an unbroken run's.
No GPU was measured; CoBench reports about 4 GB per GPU for a 0.5B model.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, Literal

import numpy as np

from routewright.base_models import Base, choose_precision, median_rows
from routewright.errors import UserError
from routewright.language_models import (
    ADAPTER_CARD,
    adapter_base,
    add_lora,
    check_size,
    choose_wrap,
    count_parameters,
    encode_instructions,
    features,
    find_causal,
    label_ids,
    label_logits,
    load_causal,
    weights_hash,
)
from routewright.launch import launch
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
    unrounded,
    write_router,
)
from routewright.training_sets import Rows, TrainingSet, add_outcomes, read_with_twin

BASE_MODEL = "Qwen/Qwen2.5-0.5B"
LEARNING_RATE = 2e-5
LORA_LEARNING_RATE = 2e-4  # adapters start from nothing and are few
SMALL_LEARNING_RATE, SMALL = 1e-3, 20_000_000  # models of fewer parameters, the sample pool's, want bigger steps
VALIDATION_SHARE = 0.1  # held out by near-duplicate group where the set has no dev twin
KEPT = 3  # newest checkpoints; the best one stays as well
PLAIN = Template("difficulty", ("any",), "bare")  # for rows without a card: the instruction is all prompt
OWNED = {"output_dir": "output_dir", "per_device_train_batch_size": "batch_size", "learning_rate": "learning_rate",
         "gradient_accumulation_steps": "global_batch_size", "num_train_epochs": "epochs", "seed": "seed",
         "bf16": "precision", "fp16": "precision", "report_to": "wandb", "packing": "packing",
         "packing_strategy": "packing", "padding_free": "packing", "eval_packing": "packing",
         "shuffle_dataset": "seed", "max_length": "max_length"}


def main(
    *,
    # Files
    data: str = "data/sample_alpaca_data.jsonl",  # Alpaca rows: instruction, response (JSONL); card beside it
    val: str = "",  # rows to validate on; empty: the dev twin that the card names, else a tenth held out by group
    cache: str = "",  # outcome cache behind the rows, for calibration and the monitor; empty: the one the card names
    output_dir: str = "data/runs/sft",  # the router folder and its checkpoints
    skip_bad: int = 0,  # bad rows to pass over before stopping
    # Model
    # folder (weights, or an adapter to go on with) or hub id; auto: Qwen/Qwen2.5-0.5B, or the sample pool's strong
    # model where its weights are neither on this machine nor to be had from the hub
    model_name: str = "auto",
    max_length: int = 512,  # tokens of a row, answer included; only the prompt inside it is cut
    wrap: Literal["auto", "alpaca", "chat", "none"] = "auto",  # around the instruction; auto: chat where there is one
    lora_r: int = 0,  # rank of LoRA adapters on all linear layers; 0: all weights are trained
    four_bit: bool = False,  # 4-bit base weights (NF4), with LoRA only
    # Training
    batch_size: int = 4,  # rows per device and step
    global_batch_size: int = 64,  # rows per update over devices and accumulation
    # peak, after 10 % warm-up, then linear to 0; none: 2e-5, for LoRA 2e-4, for models under 20 million parameters 1e-3
    learning_rate: float | None = None,
    epochs: int = 3,  # passes over the rows; a checkpoint_epoch_k each
    patience: int = 2,  # epochs without a better validation loss before stopping; 0: never
    packing: bool = False,  # several rows in one sequence of max_length; a batch then counts such packs
    # auto: bf16 where the GPU has it, or where this CPU is measured to gain by it; 4-bit weights always take bf16
    precision: Literal["auto", "bf16", "fp32"] = "auto",
    seed: int = 42,  # of new adapters, the batch order and dropout
    # Run
    # auto: go on from the newest whole checkpoint of output_dir; none: start anew and set older ones aside; or the
    # path of a checkpoint
    resume: str = "auto",
    wandb: bool = False,  # record to W&B, offline where there is no key
    check_only: bool = False,  # check options, rows, weights and answer tokens, then stop
    trainer: dict | None = None,  # more settings under their trl.SFTConfig names
) -> None:
    say = console()
    extra = check_options(locals())
    out = Path(output_dir)

    source = load_source(data, val, cache, skip_bad, say)
    base = find_causal(model_name, say, BASE_MODEL)
    adapted = check_base(base, out, lora_r, four_bit, say)
    small = count_parameters(base.folder) < SMALL
    usual = SMALL_LEARNING_RATE if small else LORA_LEARNING_RATE if adapted else LEARNING_RATE
    learning_rate = learning_rate or usual
    say(f"{len(source.train)} train and {len(source.dev)} validation rows, {source.words}, base model {base.name}, "
        f"{'LoRA' if adapted else 'all weights'}, learning rate {learning_rate:g}")
    if check_only:
        check_tokens(base.folder, source, wrap, max_length)
        return

    from routewright import tracking
    from routewright.encoders import longest_input
    from routewright.rank_watch import guard_process

    guard_process()
    quiet_libraries()
    model, tokenizer = build_model(base.folder, lora_r, four_bit, seed)
    wrap = choose_wrap(wrap, tokenizer)
    longest = min(max_length, longest_input(model, tokenizer))
    train_rows, dev_rows = (encode(tokenizer, source, part, wrap, longest) for part in (source.train, source.dev))
    bf16 = four_bit or choose_precision(precision, model, probe_batch(tokenizer, train_rows, batch_size), out,
                                        say) == "bf16"
    if packing:
        train_rows = pack(train_rows, longest)
    arguments = training_arguments(
        output_dir=output_dir, batch_size=batch_size, global_batch_size=global_batch_size, learning_rate=learning_rate,
        epochs=epochs, bf16=bf16, seed=seed, rows=len(train_rows), packing=packing, max_length=longest,
        router=source.template is not None, extra=extra)
    method = {"mode": source.words, "base_model": base.name, "base_weights": start_weights(base.folder),
              "max_length": longest, "wrap": wrap, "packing": packing, "lora_r": lora_r, "four_bit": four_bit,
              "bf16": bf16, "patience": patience, **own_settings(arguments, extra)}

    with tracking.start("routewright", f"train_llm-{out.name}", out,
                        {**method, "learning_rate": learning_rate, "epochs": epochs, "rows": len(train_rows)},
                        mode="auto" if wandb else "off", job_type="train") as tracker:
        reader = Reader(source, tokenizer, wrap, longest) if source.template else None
        with told_as_user_errors(extra):
            run = build_trainer(model, tokenizer, arguments, source, (train_rows, dev_rows), reader, method=method,
                                tracker=tracker, say=say)
        run.run(resume=resume)
        if is_complete(run, out, "dev_scores.json", *(["router.json"] if source.table is not None else [])):
            say(f"this run was finished before; its {source.product}: {out} (--resume none trains anew)")
            return
        scores = score_validation(run, reader, source)
        save_weights(run, out)
        if source.table is not None:
            write_router(run, out, "llm", source, tokenizer, wrap=wrap, max_length=longest, base_model=base.name,
                         four_bit=four_bit, seed=seed, say=say)
        if run.is_world_process_zero():
            report(scores, kept_checkpoint(run), out, source, tracker, say)
        run.accelerator.wait_for_everyone()


# --- options ----------------------------------------------------------------------------------------------------------

def check_options(given: dict[str, Any]) -> dict[str, Any]:
    """Ranges of the numbers and names in `trainer`, before any file is read. Returns the trainer mapping."""
    least_values = {"skip_bad": 0, "max_length": 8, "lora_r": 0, "batch_size": 1, "global_batch_size": 1, "epochs": 1,
                    "patience": 0}
    check_sizes(given, least_values)
    if given["learning_rate"] is not None and not given["learning_rate"] > 0:
        raise UserError(f"--learning_rate must be above 0; got {given['learning_rate']}")
    if given["four_bit"] and given["precision"] == "fp32":
        raise UserError("--four_bit computes in bf16; leave --precision auto")
    return check_trainer_names(dict(given["trainer"] or {}), OWNED, "trl:SFTConfig")


def check_base(base: Base, out: Path, lora_r: int, four_bit: bool, say: Say) -> bool:
    """Whether adapters are trained, and whether this base can be trained so. Raises UserError."""
    if base.folder.resolve() == out.resolve():
        raise UserError(f"--model_name {base.name} is the output folder too, whose weights would be overwritten; "
                        "choose another --output_dir")
    own = (base.folder / ADAPTER_CARD).is_file()
    if own and lora_r:
        say(f"warning: {base.name} is an adapter and goes on with its own rank; --lora_r {lora_r} is not used")
    if four_bit and not (own or lora_r):
        raise UserError("--four_bit true freezes the base weights, so there is nothing to train without adapters; add "
                        "--lora_r 16")
    if four_bit:
        check_size(base.folder, base.name)
    return own or bool(lora_r)


# --- rows -------------------------------------------------------------------------------------------------------------

def load_source(data: str, val: str, cache: str, skip_bad: int, say: Say) -> TrainingSet:
    """Every row checked before any weight is loaded; warnings go to `say`. Raises UserError naming file and line."""
    rows, held, card = read_with_twin("alpaca", data, val, hold_out_rows, skip_bad, say)
    if card is None:
        say(f"WARNING: {data} has no card, so nothing says which models its responses choose among: the result will be "
            "a fine-tuned language model and no router; build rows with build_sets.py to train one")
        return TrainingSet(data, rows, held)
    source = TrainingSet(data, rows, held, Template.from_card(card["template"], data))
    read_labels(source)
    add_outcomes(source, card, cache, say)
    return source


def hold_out_rows(rows: Rows) -> tuple[Rows, Rows]:
    """(train, held) rows; near-duplicates stay on one side."""
    keep, hold = hold_out([row["instruction"] for row in rows], VALIDATION_SHARE)
    return [rows[i] for i in keep], [rows[i] for i in hold]


def read_labels(source: TrainingSet) -> None:
    """`label` of each row: the place of its response among the template's. Raises UserError where all are the same."""
    template = source.template
    for row in (*source.train, *source.dev):
        row["label"] = template.parse(row["response"])
        if row["label"] is None:
            raise UserError(f"{source.name}: the response {row['response']!r:.40} is none of the answers "
                            f"{', '.join(template.labels)} of the card's template; build the set again")
    found = {row["label"] for row in source.train}
    if len(found) < 2:
        raise UserError(f"{source.name}: all {len(source.train)} responses are {template.labels[found.pop()]!r}, so "
                        "there is nothing to learn; build the set with another cost weight, or from other prompts")


def expected_reward(reward: Any, cost: np.ndarray, estimate: np.ndarray) -> np.ndarray:
    """(N, M) reward to expect of estimates (N, M), at costs in the reward's unit."""
    if reward.kind == "binary":
        return estimate * (reward.K - reward.cost_weight * cost)
    return reward.of(estimate, cost)


# --- token ids --------------------------------------------------------------------------------------------------------

def encode(tokenizer: Any, source: TrainingSet, rows: Rows, wrap: str, max_length: int) -> Rows:
    """input_ids and labels per row: the wrapped instruction, then the response and the end token, which alone count."""
    texts = [row["instruction"] for row in rows]
    if source.template is not None:
        ids = label_ids(tokenizer, source.template, wrap)
        answers = [[ids[row["label"]]] for row in rows]
        room = max_length
    else:
        answers = tokenizer([row["response"] for row in rows], add_special_tokens=False)["input_ids"]
        room = max_length - min(max(map(len, answers)), max_length // 2)
    starts = encode_instructions(tokenizer, source.template or PLAIN, wrap, texts, room)
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    made = []
    for start, answer in zip(starts, answers, strict=True):
        response = (answer + end)[:max_length - len(start)]
        made.append({"input_ids": start + response, "labels": [-100] * len(start) + response})
    return made


def check_tokens(folder: Path, source: TrainingSet, wrap: str, max_length: int) -> None:
    """Whether the tokenizer has the wrap and the answers, without loading any weight."""
    from routewright.encoders import load_tokenizer

    quiet_libraries()
    tokenizer = load_tokenizer(adapter_base(folder) if (folder / ADAPTER_CARD).is_file() else folder)
    encode(tokenizer, source, source.train[:8], choose_wrap(wrap, tokenizer), max_length)


def probe_batch(tokenizer: Any, rows: Rows, batch_size: int) -> dict[str, Any]:
    """A few rows of median length: what a precision is timed on."""
    return PadBatch(tokenizer.pad_token_id)(median_rows(rows, min(batch_size, 8)))


def pack(rows: Rows, max_length: int) -> Rows:
    """Rows laid end to end into sequences of up to max_length, best fit first; each keeps its own positions."""
    from datasets import Dataset
    from trl.data_utils import pack_dataset

    return list(pack_dataset(Dataset.from_list(rows), max_length, "bfd"))


# --- model ------------------------------------------------------------------------------------------------------------

def build_model(folder: Path, lora_r: int, four_bit: bool, seed: int) -> tuple[Any, Any]:
    """(model, tokenizer) with what is to be trained in float32: fresh adapters where asked, those of an adapter folder,
    or all weights. 4-bit weights have the rest in bf16."""
    from transformers import set_seed

    set_seed(seed)
    model, tokenizer = load_causal(folder, four_bit=four_bit, dtype="bf16" if four_bit else "fp32",
                                   trainable_adapter=True)
    if lora_r and not (folder / ADAPTER_CARD).is_file():
        model = add_lora(model, r=lora_r, alpha=2 * lora_r, seed=seed)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    return model, tokenizer


def start_weights(folder: Path) -> str:
    """A name for the weights that training begins with: a run goes on from the same ones only."""
    from routewright.checkpoints import fingerprint

    if (folder / ADAPTER_CARD).is_file():
        return f"{weights_hash(adapter_base(folder))} {fingerprint(folder / 'adapter_model.safetensors')}"
    return weights_hash(folder)


# --- training ---------------------------------------------------------------------------------------------------------

def training_arguments(*, output_dir: str, batch_size: int, global_batch_size: int, learning_rate: float, epochs: int,
                       bf16: bool, seed: int, rows: int, packing: bool, max_length: int, router: bool = True,
                       extra: dict[str, Any]) -> Any:
    """SFTConfig: CoBench's optimizer and schedule, the safety net's, then what the user put in `trainer`."""
    import torch
    from trl import SFTConfig

    from routewright.trainer import safety_arguments

    world = int(os.environ.get("WORLD_SIZE", "1"))
    accumulation = global_batch_size // (batch_size * world)
    steps = -(-rows // global_batch_size)
    settings = {
        **safety_arguments(), "output_dir": output_dir, "seed": seed, "bf16": bf16,
        # Rows may hold different numbers of response tokens: each token weighs the same whatever rank it is on.
        "average_tokens_across_devices": True,
        "per_device_train_batch_size": batch_size, "gradient_accumulation_steps": accumulation,
        "per_device_eval_batch_size": batch_size if packing else max(8, batch_size),
        "num_train_epochs": epochs, "learning_rate": learning_rate, "weight_decay": 0.0, "warmup_steps": 0.1,
        "lr_scheduler_type": "linear", "max_grad_norm": 1.0, "activation_checkpointing": torch.cuda.is_available(),
        "max_length": max_length, "packing": packing, "eval_packing": False,
        "dataset_kwargs": {"skip_prepare_dataset": True},
        "eval_strategy": "epoch", "save_strategy": "epoch", "save_total_limit": KEPT, "load_best_model_at_end": True,
        "logging_steps": min(LOG_STEPS, max(1, steps // 2)), "disable_tqdm": True,
        "log_level": "error", "log_level_replica": "error", **extra,
        **best_by(extra, ("loss", "label_accuracy") if router else ("loss",))}
    try:
        return SFTConfig(**settings)
    except (ValueError, TypeError) as error:
        raise UserError(f"these training settings do not go together: {' '.join(str(error).split())}") from None


class Reader:
    """What the network answers to the validation rows and to the dev prompts: one pass over both, kept for a step."""

    def __init__(self, source: TrainingSet, tokenizer: Any, wrap: str, max_length: int) -> None:
        self.source, self.pad_id = source, tokenizer.pad_token_id
        texts = [row["instruction"] for row in source.dev]
        if source.dev_table is not None:
            from routewright.decide import expected_cost
            from routewright.prompts import full_text

            self.cost = expected_cost(source.table, source.dev_table) / source.unit_usd
            texts += [source.template.render(full_text(prompt)) for prompt in source.dev_table.prompts]
        distinct = list(dict.fromkeys(texts))
        place = {text: i for i, text in enumerate(distinct)}
        index = np.array([place[text] for text in texts])
        self.of_rows, self.of_prompts = index[:len(source.dev)], index[len(source.dev):]
        self.ids = encode_instructions(tokenizer, source.template, wrap, distinct, max_length)
        self.answers = label_ids(tokenizer, source.template, wrap)
        self.truth = np.array([row["label"] for row in source.dev])
        self.kept: tuple[int, np.ndarray] | None = None

    def logits(self, model: Any, step: int) -> np.ndarray:
        """(distinct texts, K); every rank reads all, as sharded weights demand."""
        if self.kept is None or self.kept[0] != step:
            self.kept = (step, label_logits(model, self.ids, self.answers, pad_id=self.pad_id))
        return self.kept[1]

    def accuracy(self, model: Any, step: int) -> float:
        """Share of the validation rows whose label has the highest logit among the answers."""
        return float((self.logits(model, step)[self.of_rows].argmax(1) == self.truth).mean())

    def decisions(self, model: Any, step: int) -> np.ndarray:
        """(N,) the model chosen for each dev prompt: the label itself, or by estimates calibrated on the other half."""
        logits = self.logits(model, step)[self.of_prompts]
        if self.source.template.mode == "decision":
            return logits.argmax(1)
        estimate = cross_calibrated(features(self.source.template, logits), self.source.dev_table.quality_mean)
        return expected_reward(self.source.reward, self.cost, estimate).argmax(1)


def cross_calibrated(found: np.ndarray, quality: np.ndarray) -> np.ndarray:
    """Estimates (N, M) from features (N, F), each half of the rows by a calibration fitted on the other half."""
    from routewright.calibration import Calibration

    halves = np.arange(len(found)) % 2 == 0
    estimate = np.empty(quality.shape)
    for half in (halves, ~halves):
        estimate[half] = Calibration.fit(found[~half], quality[~half]).apply(found[half])
    return estimate


def build_trainer(model: Any, tokenizer: Any, arguments: Any, source: TrainingSet, encoded: tuple[Rows, Rows],
                  reader: Reader | None, *, method: dict[str, Any], tracker: Any, say: Say) -> Any:
    """TRL's SFTTrainer in the safety net, with our batch order; loss, loop, optimizer and schedule are the library's.

    Token ids and `method` are fingerprinted: a run is only resumed with the same ones.
    """
    from datasets import Dataset
    from transformers import EarlyStoppingCallback, PrinterCallback, ProgressCallback
    from trl import SFTTrainer

    from routewright.checkpoints import fingerprint
    from routewright.trainer import SafetyNet

    whole = arguments.train_batch_size * arguments.gradient_accumulation_steps * arguments.world_size
    lengths = [[len(row["input_ids"]) for row in rows] for rows in encoded]
    order = LengthGroupedOrder(lengths[0], whole, arguments.seed, grouped=not arguments.packing)
    eval_order = np.argsort(-np.asarray(lengths[1]), kind="stable").tolist()

    class RouterSFT(SafetyNet, SFTTrainer):
        def _get_train_sampler(self, train_dataset: Any = None) -> Any:
            return order

        def _get_eval_sampler(self, eval_dataset: Any) -> list[int]:
            return eval_order

        def evaluation_loop(self, *args: Any, metric_key_prefix: str = "eval", **kwargs: Any) -> Any:
            found = super().evaluation_loop(*args, metric_key_prefix=metric_key_prefix, **kwargs)
            if reader:
                found.metrics[f"{metric_key_prefix}_label_accuracy"] = reader.accuracy(self.model,
                                                                                       self.state.global_step)
            return found

        def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
            for figures in self._metrics.values():  # which leaves the share of response tokens that were right
                for name in ("num_tokens", "entropy"):
                    figures.pop(name, None)
            super().log(logs, *args, **kwargs)

        def create_model_card(self, *args: Any, **kwargs: Any) -> None:
            """router.json says what this is; the library's own page would be written anew at each checkpoint."""

    callbacks = [last_epochs(), make_reporter(tracker, say, order.set_epoch)]
    if method["patience"] and arguments.load_best_model_at_end:
        callbacks.append(EarlyStoppingCallback(method["patience"]))
    names = ([f"pack {i}" for i in range(len(encoded[0]))] if arguments.packing else
             [row_name(source.name, i, row) for i, row in enumerate(source.train)])
    marks = {"data": fingerprint(encoded[0]), "validation data": fingerprint(encoded[1]), "config": method}
    with unrounded(model):
        run = RouterSFT(model=model, args=arguments, train_dataset=Dataset.from_list(encoded[0]),
                        eval_dataset=Dataset.from_list(encoded[1]), processing_class=tokenizer, callbacks=callbacks,
                        row_names=names, fingerprints=marks)
    run.remove_callback(PrinterCallback)
    run.remove_callback(ProgressCallback)
    if source.rewards is not None:
        from routewright.monitor import DecisionMonitor, monitor_callback

        run.monitor = DecisionMonitor(source.dev_table, source.rewards, tracker, say, folder=arguments.output_dir)
        run.add_callback(monitor_callback(run.monitor, lambda: reader.decisions(run.model, run.state.global_step)))
    return run


def row_name(path: str, index: int, row: dict[str, Any]) -> str:
    return f"{path} prompt {row['prompt_id']}" if row.get("prompt_id") else f"{path}:{index + 1}"


# --- scores -----------------------------------------------------------------------------------------------------------

def score_validation(run: Any, reader: Reader | None, source: TrainingSet) -> dict[str, float]:
    """Scores of the weights that were kept: loss and label accuracy, and on a cache what the decisions earn."""
    if reader:
        reader.kept = None
    found = run.evaluate(metric_key_prefix="eval")
    scores = {name.removeprefix("eval_"): float(value) for name, value in found.items()
              if is_score(name) and name.startswith("eval_")}
    if source.rewards is not None:
        decisions = reader.decisions(run.model, run.state.global_step)
        earned = run.monitor.measure(decisions)
        scores |= {name.removeprefix("dev/"): value for name, value in earned.items()}
        scores["best_constant_reward"] = float(source.rewards.mean(0).max())
    return scores


def report(scores: dict[str, float], checkpoint: Path, out: Path, source: TrainingSet, tracker: Any, say: Any) -> None:
    """dev_scores.json, the tracker's summary and one line."""
    from routewright.tracking import dev_names

    kept = {name: round(value, 8) for name, value in scores.items()}
    write_json(out / "dev_scores.json", kept)
    tracker.summary(dev_names(kept))
    words = "  ".join(f"{name} {value:.4g}" for name, value in kept.items())
    say(f"kept {checkpoint.name}; on the validation rows and dev prompts: {words}\n{source.product}: {out}")


if __name__ == "__main__":
    launch(main)
