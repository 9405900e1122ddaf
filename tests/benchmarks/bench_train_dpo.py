"""Benchmark of a DPO step on router pairs: TRL's DPOTrainer beside the one that shares the prompt of a pair.

    python tests/benchmarks/bench_train_dpo.py                            # 4 layers, about 15 CPU minutes
    python tests/benchmarks/bench_train_dpo.py --layers 24 --pairs 2 --steps 2 --rounds 1      # 0.5B, 6 GB
    python tests/benchmarks/bench_train_dpo.py --answer 1                 # a router's labels
    python tests/benchmarks/bench_train_dpo.py --device cuda --layers 24 --pairs 16 --steps 20

Same for all: random weights of the Qwen2.5-0.5B shape (hidden 896, vocabulary 151,936), LoRA on all linear layers,
the same pairs in the same order, no dropout, activation checkpointing off unless asked for. Every variant runs in a
process of its own, in alternation, one thread; its losses must agree with the stock ones to 1e-4.

stock      DPOTrainer as it comes: the reference is computed in every step, with the adapter switched off
stock_pre  the same with `precompute_ref_log_probs`, so that its steps do what ours do
ours       SharedPrefixTrainer, reference precomputed too

On a CPU: user CPU seconds per optimizer step (median, reference pass apart), and by how much the peak resident memory
rises over the model's own. On a GPU: milliseconds by CUDA events, and peak allocated memory over the model's own.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
VARIANTS = ("stock", "stock_pre", "ours")
TOKENIZER = ROOT / "data" / "sample" / "models" / "strong"
OWN_VOCABULARY = 151_936


def main() -> int:
    ask = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, default in {"layers": 4, "hidden": 896, "vocab": OWN_VOCABULARY, "prompt": 300, "answer": 8, "pairs": 4,
                          "steps": 3, "rounds": 2}.items():
        ask.add_argument(f"--{name}", type=int, default=default)
    ask.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    ask.add_argument("--bf16", action="store_true", help="bf16 weights and autocast; losses then agree less")
    ask.add_argument("--checkpointing", action="store_true", help="activation checkpointing in all variants")
    ask.add_argument("--variants", nargs="*", default=VARIANTS, choices=VARIANTS)
    ask.add_argument("--json", type=Path, help="write the figures here")
    ask.add_argument("--be", choices=VARIANTS, help=argparse.SUPPRESS)
    given = ask.parse_args()
    if given.be:
        print(json.dumps(measure(given)), flush=True)
        return 0
    told: dict[str, list[dict[str, Any]]] = {name: [] for name in given.variants}
    words = [f"--{n}={getattr(given, n)}" for n in ("layers", "hidden", "vocab", "prompt", "answer", "pairs", "steps",
                                                    "device")]
    words += [f"--{n}" for n in ("bf16", "checkpointing") if getattr(given, n)]
    for number in range(given.rounds):
        for name in given.variants:
            told[name].append(in_process(name, words))
            one = told[name][-1]
            print(f"round {number + 1}  {name:<9} {one['step']:8.2f} {one['unit']} a step   {one['peak_mb']:7.0f} MB "
                  f"over the model's {one['model_mb']:.0f}   reference {one['reference']:.1f} {one['unit']}   losses "
                  f"{' '.join(f'{x:.5f}' for x in one['losses'])}", flush=True)
    return report(told, given)


def in_process(name: str, words: list[str]) -> dict[str, Any]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE", "HF_HUB_OFFLINE": "1",
                   "WANDB_MODE": "offline", "TQDM_DISABLE": "1"}
    done = subprocess.run([sys.executable, __file__, "--be", name, *words], env=environment, capture_output=True,
                          text=True)
    if done.returncode:
        raise SystemExit(f"{name} ended with {done.returncode}\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def report(told: dict[str, list[dict[str, Any]]], given: argparse.Namespace) -> int:
    """Medians, ratios to ours, and whether the losses agree."""
    figures = {name: {key: statistics.median(run[key] for run in runs) for key in ("step", "peak_mb", "reference")}
               for name, runs in told.items()}
    first = next(iter(told.values()))[0]["losses"]
    differ = max(abs(a - b) for runs in told.values() for run in runs
                 for a, b in zip(first, run["losses"], strict=True))
    print(f"largest difference of losses: {differ:.1e} over {len(first)} steps, {first[0]:.4f} to {first[-1]:.4f}")
    for name in told:
        if name != "ours" and "ours" in told:
            print(f"{name} / ours: {figures[name]['step'] / figures['ours']['step']:.2f}x time, "
                  f"{figures[name]['peak_mb'] / figures['ours']['peak_mb']:.2f}x peak increment")
    if given.json:
        given.json.write_text(json.dumps({"options": {k: str(v) for k, v in vars(given).items()}, "median": figures,
                                          "loss_difference": differ, "runs": told}, indent=1) + "\n")
    return 0 if differ < (1e-4 if not given.bf16 else 0.05) else 1


# --- one variant, in its own process ----------------------------------------------------------------------------------

def measure(given: argparse.Namespace) -> dict[str, Any]:
    sys.path.insert(0, str(ROOT / "src"))
    import torch

    from routewright.training import quiet_libraries

    torch.set_num_threads(1)
    quiet_libraries()
    from trl import DPOTrainer  # noqa: F401 - what the imports hold is not the training's

    model, tokenizer = build(given)
    clock = Clock(given.device)
    with tempfile.TemporaryDirectory() as folder:
        trainer = build_trainer(given, model, tokenizer, folder)
        trainer.add_callback(clock.callback())
        clock.reference = trainer.reference_seconds
        trainer.train()
    return {"losses": [h["loss"] for h in trainer.state.log_history if "loss" in h], **clock.figures()}


def build(given: argparse.Namespace) -> tuple[Any, Any]:
    import torch
    from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

    from routewright.language_models import add_lora

    torch.manual_seed(0)
    heads = max(1, given.hidden // 64)
    config = Qwen2Config(vocab_size=given.vocab, hidden_size=given.hidden, num_hidden_layers=given.layers,
                         intermediate_size=round(given.hidden * 38 / 7), num_attention_heads=heads,
                         num_key_value_heads=2 if heads % 2 == 0 else 1, tie_word_embeddings=True,
                         max_position_embeddings=4096)
    torch.set_default_dtype(torch.bfloat16 if given.bf16 else torch.float32)
    model = Qwen2ForCausalLM(config)
    torch.set_default_dtype(torch.float32)
    model = add_lora(model.to(given.device), r=16, alpha=32, dropout=0.0, seed=0)
    return model, PreTrainedTokenizerFast.from_pretrained(TOKENIZER)


def build_trainer(given: argparse.Namespace, model: Any, tokenizer: Any, folder: str) -> Any:
    import numpy as np
    from datasets import Dataset
    from transformers import PrinterCallback, ProgressCallback
    from trl import DPOConfig, DPOTrainer

    from routewright.shared_prefix import SharedPrefixTrainer

    draw = np.random.default_rng(0)
    ids = lambda n: draw.integers(10, given.vocab, n).tolist()
    rows = [{"prompt_ids": ids(given.prompt), "chosen_ids": ids(given.answer), "rejected_ids": ids(given.answer)}
            for _ in range(given.pairs)]
    rows = Dataset.from_list(rows * given.steps)  # the same each step, so that the losses move
    # One pair a micro-batch would be the profile's way; a batch at once shows what memory a pair takes.
    arguments = DPOConfig(
        output_dir=folder, use_cpu=given.device == "cpu", bf16=given.bf16, per_device_train_batch_size=given.pairs,
        max_steps=given.steps, learning_rate=1e-3, lr_scheduler_type="constant", train_sampling_strategy="sequential",
        activation_checkpointing=given.checkpointing, logging_steps=1, save_strategy="no", report_to="none",
        disable_tqdm=True, max_length=None, dataloader_pin_memory=False, precompute_ref_log_probs=given.be != "stock",
        log_level="error")

    class Stock(DPOTrainer):
        def _prepare_dataset(self, dataset: Any, *_: Any) -> Any:
            return dataset

    cls = SharedPrefixTrainer if given.be == "ours" else Stock
    begun = time.process_time()
    trainer = cls(model=model, args=arguments, train_dataset=rows, processing_class=tokenizer)
    if given.be == "ours":
        trainer.add_reference()
    trainer.reference_seconds = time.process_time() - begun if given.be != "stock" else 0.0
    trainer.remove_callback(PrinterCallback)
    trainer.remove_callback(ProgressCallback)
    return trainer


class Clock:
    """Time of each optimizer step, and the peak of memory over what it was when the model stood there."""

    def __init__(self, device: str) -> None:
        self.gpu = device == "cuda"
        self.marks: list[Any] = []
        self.before = self.resident()
        self.forget_peak()
        self.reference = 0.0

    def resident(self) -> float:
        """MB held now."""
        if self.gpu:
            import torch

            return torch.cuda.memory_allocated() / 2**20
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20

    def peak(self) -> float:
        if self.gpu:
            import torch

            return torch.cuda.max_memory_allocated() / 2**20
        lines = Path("/proc/self/status").read_text().splitlines()
        return int(next(line.split()[1] for line in lines if line.startswith("VmHWM"))) / 1024

    def forget_peak(self) -> None:
        """Building random weights peaks half a gigabyte over what they hold; that is not the training's."""
        if self.gpu:
            import torch

            torch.cuda.reset_peak_memory_stats()
        else:
            Path("/proc/self/clear_refs").write_text("5")

    def mark(self) -> None:
        if self.gpu:
            import torch

            self.marks.append(torch.cuda.Event(enable_timing=True))
            self.marks[-1].record()
        else:
            self.marks.append(time.process_time())

    def callback(self) -> Any:
        from transformers import TrainerCallback

        clock = self

        class Callback(TrainerCallback):
            def on_train_begin(self, *_: Any, **__: Any) -> None:
                clock.mark()

            def on_step_end(self, *_: Any, **__: Any) -> None:
                clock.mark()

        return Callback()

    def figures(self) -> dict[str, Any]:
        pairs = list(zip(self.marks[:-1], self.marks[1:], strict=True))
        if self.gpu:
            import torch

            torch.cuda.synchronize()
            spans = [a.elapsed_time(b) for a, b in pairs]
        else:
            spans = [b - a for a, b in pairs]
        spans = spans[1:] if len(spans) > 2 else spans  # the first step also fills caches
        return {"step": statistics.median(spans), "unit": "ms" if self.gpu else "s", "peak_mb": self.peak() -
                self.before, "model_mb": self.before, "reference": self.reference}


if __name__ == "__main__":
    sys.exit(main())
