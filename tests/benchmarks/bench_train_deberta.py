"""Benchmark of train_deberta's training step: useful tokens per CPU second beside transformers' Trainer.

    OMP_NUM_THREADS=1 python tests/benchmarks/bench_train_deberta.py            # about 20 CPU minutes
    OMP_NUM_THREADS=1 python tests/benchmarks/bench_train_deberta.py --rounds 1 --batches 4

One process, one thread, CPU time of the training loop alone (from `on_train_begin` to `on_train_end`), medians over
interleaved rounds. Same for all: MiniLM weights (22.7M parameters) with a fresh head and no dropout, 21,515 real
prompts (RouteLLM's MMLU and GSM8K's training questions, cut at 512 tokens), batches of 32, AdamW, clipping at 1.0.

pad_512    Trainer, random order, every row padded to 512 tokens: the classic script
dynamic    Trainer, random order, padded to the longest row of the batch
grouped    Trainer with its own length grouping (`train_sampling_strategy="group_by_length"`)
ours       train_deberta's trainer, batch order and safety net (its checks are in the time), fp32
ours_bf16  the same with `--precision bf16`

An epoch of these takes hours, so every variant trains on batches of its own epoch that stand for it: the epoch's
batches are sorted by padded size, cut into equal strata, and one batch of each stratum is taken, another one each
round. `pad_512` does the same work for any batch; its rate counts the mean useful tokens of a batch. A useful
token is one that is not padding. Before the clock starts, ours and the Trainer train on the same batches in the same
order and must report the same losses.
"""

from __future__ import annotations

import argparse
import gzip
import json
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("WANDB_MODE", "offline")
ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "src"), str(ROOT / "tests")]

import numpy as np  # noqa: E402

import train_deberta as script  # noqa: E402
from routewright import router_data  # noqa: E402

DATA = ROOT.parent / "shared" / "data"
BATCH = 32
MODELS = ("cheap", "strong")
# Token lengths of the prompts above at the 0th, 5th, ... 100th percentile: stands in where they are absent.
LENGTHS = (12, 26, 30, 34, 37, 41, 44, 48, 52, 56, 61, 66, 72, 79, 88, 100, 116, 138, 179, 283, 512)
VARIANTS = ("pad_512", "dynamic", "grouped", "ours", "ours_bf16")


def prompts() -> list[str]:
    """The real prompts, or [] where the recordings are not on this machine."""
    mmlu, gsm = DATA / "routellm" / "mmlu.jsonl.gz", DATA / "gsm8k_openai" / "train.jsonl"
    if not (mmlu.exists() and gsm.exists()):
        return []
    with gzip.open(mmlu, "rt", encoding="utf-8") as file:
        found = [json.loads(line)["prompt"] for line in file]
    with open(gsm, encoding="utf-8") as file:
        return found + [json.loads(line)["question"] for line in file]


def encoded_rows(tokenizer: Any) -> tuple[list[dict], str]:
    """Token ids with random labels (N, 2): the arithmetic does not care what they say."""
    random = np.random.default_rng(0)
    texts = prompts()
    if texts:
        rows, source = router_data.encode(tokenizer, texts), "real prompts"
    else:
        lengths = np.interp(random.random(20_000) * 20, np.arange(21), LENGTHS).astype(int)
        rows = [{"input_ids": random.integers(1000, 20_000, n).tolist()} for n in lengths]
        source = "lengths drawn from a stored histogram"
    labels = random.integers(0, 2, (len(rows), 2)).astype(float)
    return router_data.with_labels([{"input_ids": r["input_ids"]} for r in rows], labels), source


def load_model() -> tuple[Any, Any]:
    """(model, tokenizer): MiniLM with a two-output head and no dropout, the same weights each time."""
    import torch
    from planted import minilm_folder

    torch.manual_seed(0)
    settings = {"id2label": dict(enumerate(MODELS)), "label2id": {m: i for i, m in enumerate(MODELS)},
                "problem_type": "multi_label_classification", "hidden_dropout_prob": 0.0,
                "attention_probs_dropout_prob": 0.0, "classifier_dropout": 0.0}
    return script.load_pretrained(minilm_folder(), settings)


def epoch_batches(name: str, lengths: np.ndarray, seed: int) -> np.ndarray:
    """(K, 32) row indices of one epoch in the variant's own order; a last part batch is left out."""
    import torch
    from transformers.trainer_pt_utils import get_length_grouped_indices

    whole = len(lengths) // BATCH * BATCH
    if name.startswith("ours"):
        order = router_data.LengthGroupedOrder(lengths, BATCH, seed).order()
    elif name == "grouped":
        generator = torch.Generator().manual_seed(seed)
        order = np.array(get_length_grouped_indices(lengths.tolist(), BATCH, generator=generator))
    else:
        order = np.random.default_rng(seed).permutation(len(lengths))
    return order[:whole].reshape(-1, BATCH)


def chosen_batches(batches: np.ndarray, lengths: np.ndarray, count: int, seed: int) -> np.ndarray:
    """One batch of each of `count` strata by padded size, in random order."""
    random = np.random.default_rng(seed)
    by_size = batches[np.argsort(lengths[batches].max(1), kind="stable")]
    edges = np.linspace(0, len(by_size), count + 1).astype(int)
    taken = [int(random.integers(a, b)) for a, b in zip(edges[:-1], edges[1:], strict=True)]
    return by_size[taken][random.permutation(count)]


class Clock:
    """CPU seconds between the start and the end of the training loop."""

    def callback(self) -> Any:
        from transformers import TrainerCallback

        clock = self

        class Callback(TrainerCallback):
            def on_train_begin(self, *_: Any, **__: Any) -> None:
                clock.begin = time.process_time()

            def on_train_end(self, *_: Any, **__: Any) -> None:
                clock.seconds = time.process_time() - clock.begin

        return Callback()


def train(name: str, rows: list[dict], folder: Path) -> tuple[float, list[float]]:
    """(CPU seconds, loss per step) of training on these rows in this order, 32 at a time."""
    from transformers import PrinterCallback, ProgressCallback, Trainer

    model, tokenizer = load_model()
    settings = script.training_arguments(
        output_dir=str(folder / name), batch_size=BATCH, global_batch_size=0, learning_rate=2e-5, epochs=1,
        bf16=name == "ours_bf16", seed=0, rows=len(rows), extra={
            "eval_strategy": "no", "save_strategy": "no", "load_best_model_at_end": False, "logging_steps": 1,
            "train_sampling_strategy": "sequential", "use_cpu": True})
    clock = Clock()
    if name.startswith("ours"):
        source = script.Source("pool", MODELS, 2)
        labels = np.array([r["labels"] for r in rows])
        examples = script.Examples([""] * len(rows), None, labels, [str(i) for i in range(len(rows))])
        from routewright.tracking import Silent
        trainer = script.build_trainer(model, tokenizer, settings, (examples, examples), (rows, rows[:1]), source,
                                       method={"patience": 0}, weights=None, tracker=Silent(), say=lambda text: None)
        trainer._get_train_sampler = lambda dataset=None: list(range(len(rows)))
    else:
        pad = router_data.PadBatch(tokenizer.pad_token_id, fixed_length=512 if name == "pad_512" else None)
        trainer = Trainer(model=model, args=settings, train_dataset=rows, processing_class=tokenizer, data_collator=pad)
        trainer.remove_callback(PrinterCallback)
        trainer.remove_callback(ProgressCallback)
    trainer.add_callback(clock.callback())
    trainer.run(resume="none") if name.startswith("ours") else trainer.train()
    return clock.seconds, [h["loss"] for h in trainer.state.log_history if "loss" in h]


def check_losses(rows: list[dict], folder: Path) -> float:
    """Largest difference between our losses and the Trainer's on the same batches in the same order."""
    short = sorted(rows, key=lambda r: len(r["input_ids"]))[:BATCH * 40:8][:BATCH * 5]
    ours, theirs = (train(name, short, folder)[1] for name in ("ours", "grouped"))
    assert len(ours) == len(theirs) == 5, (ours, theirs)
    return max(abs(a - b) for a, b in zip(ours, theirs, strict=True))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--batches", type=int, default=12, help="batches per round of the grouped variants")
    parser.add_argument("--json", type=Path, help="write the figures here")
    options = parser.parse_args()
    import torch
    torch.set_num_threads(1)
    script.quiet_libraries()

    _, tokenizer = load_model()
    rows, source = encoded_rows(tokenizer)
    lengths = np.array([len(r["input_ids"]) for r in rows])
    print(f"{len(rows)} rows ({source}), {lengths.mean():.1f} tokens on average, median {np.median(lengths):.0f}, "
          f"longest {lengths.max()}")
    figures: dict[str, Any] = {"rows": len(rows), "source": source, "mean_tokens": float(lengths.mean()),
                               "rates": {n: [] for n in VARIANTS}}
    with tempfile.TemporaryDirectory() as scratch:
        figures["loss_difference"] = check_losses(rows, Path(scratch))
        print(f"losses on the same order: largest difference {figures['loss_difference']:.2e}", flush=True)
        counts = {"pad_512": 1, "dynamic": max(2, options.batches // 3)}
        for round_ in range(options.rounds):
            for name in VARIANTS:
                batches = epoch_batches(name, lengths, seed=round_)
                picked = chosen_batches(batches, lengths, counts.get(name, options.batches), seed=100 + round_)
                seconds, _ = train(name, [rows[i] for i in picked.reshape(-1)], Path(scratch) / str(round_))
                useful = lengths.mean() * BATCH * len(picked) if name == "pad_512" else float(lengths[picked].sum())
                figures["rates"][name].append(useful / seconds)
                print(f"round {round_ + 1}  {name:<10} {useful / seconds:8.1f} useful tokens per CPU second  "
                      f"({len(picked)} batches, {seconds:.1f} s)", flush=True)
    return summary(figures, lengths, options.json)


def summary(figures: dict[str, Any], lengths: np.ndarray, file: Path | None) -> int:
    rate = {name: statistics.median(found) for name, found in figures["rates"].items()}
    share = {"pad_512": lengths.mean() / 512}
    for name in VARIANTS[1:]:
        batches = epoch_batches(name, lengths, seed=0)
        share[name] = float(lengths[batches].sum() / (lengths[batches].max(1) * BATCH).sum())
    print(f"\n{'variant':<10} {'tokens/CPU s':>13} {'min':>8} {'max':>8} {'useful share':>13}")
    for name in VARIANTS:
        found = figures["rates"][name]
        print(f"{name:<10} {rate[name]:>13.1f} {min(found):>8.1f} {max(found):>8.1f} {share[name]:>13.1%}")
    best = max(rate["ours"], rate["ours_bf16"])
    goals = {"ours (faster of fp32 and bf16) / pad_512, at least 6": (best / rate["pad_512"], 6.0),
             "ours (faster of fp32 and bf16) / dynamic, at least 4": (best / rate["dynamic"], 4.0),
             "ours in fp32 / pad_512, at least 6": (rate["ours"] / rate["pad_512"], 6.0),
             "ours in fp32 / dynamic, at least 4": (rate["ours"] / rate["dynamic"], 4.0),
             "ours in fp32 / grouped, at least 0.9": (rate["ours"] / rate["grouped"], 0.9),
             "ours in bf16 / grouped, above 1": (rate["ours_bf16"] / rate["grouped"], 1.0)}
    met = figures["loss_difference"] < 1e-5
    print(f"{'met ' if met else 'MISS'}  same losses on the same order: {figures['loss_difference']:.1e}")
    for words, (ratio, goal) in goals.items():
        met &= ratio >= goal
        print(f"{'met ' if ratio >= goal else 'MISS'}  {words}: {ratio:.2f}")
    if file:
        ratios = {words: ratio for words, (ratio, _) in goals.items()}
        figures |= {"medians": rate, "useful_share": share, "ratios": ratios}
        file.write_text(json.dumps(figures, indent=2) + "\n")
    return 0 if met else 1


if __name__ == "__main__":
    sys.exit(main())
