"""Memory and speed of the training steps in the shapes of real base models, with random weights and without the hub.

    python tests/benchmarks/bench_llm_gpu.py                      # everything; without a GPU: the arithmetic
    python tests/benchmarks/bench_llm_gpu.py --cases dpo --max_length 8192 --cap_gb 8
    python tests/benchmarks/bench_llm_gpu.py --cases dpo --cpu --steps 1 --max_length 256     # a real step on a CPU

dpo      train_dpo in the rtx4060 profile: Qwen2.5-1.5B in NF4, LoRA r 16 on all linear layers, batch 1, activation
         checkpointing, prompt shared by the pair, 8-bit Adam; under a cap of 8 GB for the process
sft      train_llm: Qwen2.5-0.5B in full, bf16
deberta  train_deberta: DeBERTa-v3-base in full, bf16, batches of 32

Each case runs the script itself (its options, its trainer) on rows that fill `--max_length`, and reports the peak of
the allocator (dpo: over the whole run; else up to the last timed step), useful tokens a second, and two utilisations.
MFU counts the arithmetic of the model itself, HFU also what activation checkpointing computes twice; both against the
dense bf16 rate of the data sheet, or of a large matmul where the GPU is not in the table. The bar: `dpo` at its default
length peaks under 7.5 GB. What the CUDA context itself takes (0.3-0.5 GB) is not in the allocator's figures.

Without a GPU nothing is measured, and the bytes of a DPO step are added up from the formulae below. On a CPU the
working set of one layer at the real width was measured (torch's own record of allocations, 256 and 512 tokens): 290,520
and 289,780 bytes a token with the inputs of two blocks, where the formulae for a CPU say 313,792. The third line ran
once on two shared cores at load 5: 48 s for the 256 tokens and the update, 6.6 GB resident at most, loading included.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import re
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("WANDB_MODE", "offline")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "src"), str(ROOT / "tests")]

BAR_GB = 7.5  # of an 8 GB card
LORA_RANK = 16
LENGTHS = (512, 1024, 2048, 4096, 8192)
LONGEST = 32_768  # positions of Qwen2.5
SCORING_ROWS = 32  # of a batch in which decisions are read, as the scripts call label_logits
ANSWER_TOKENS, PROMPT_TOKENS = 8, 300  # of the trial whose logits are 8 of 308 positions


@dataclass(frozen=True)
class Shape:
    """A decoder of the Qwen2 family as its published config.json has it; sizes in numbers, not bytes."""

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    intermediate: int
    vocab: int

    @property
    def kv_width(self) -> int:
        return self.hidden // self.heads * self.kv_heads

    @property
    def linear_sizes(self) -> list[tuple[int, int]]:
        """(inputs, outputs) of the linear layers of one block: q, k, v, o, gate, up, down."""
        h, i, k = self.hidden, self.intermediate, self.kv_width
        return [(h, h), (h, k), (h, k), (h, h), (h, i), (h, i), (i, h)]

    @property
    def linear_parameters(self) -> int:
        return self.layers * sum(a * b for a, b in self.linear_sizes)

    @property
    def embedding_parameters(self) -> int:
        return self.vocab * self.hidden  # tied with the head

    @property
    def parameters(self) -> int:
        """All of them: Qwen2 has biases on q, k and v, two norms a block and one at the end."""
        small = self.layers * (self.hidden + 2 * self.kv_width + 2 * self.hidden) + self.hidden
        return self.linear_parameters + self.embedding_parameters + small

    def lora_parameters(self, rank: int = LORA_RANK) -> int:
        return self.layers * sum((a + b) * rank for a, b in self.linear_sizes)


QWEN_1_5B = Shape(1536, 28, 12, 2, 8960, 151_936)
QWEN_0_5B = Shape(896, 24, 14, 2, 4864, 151_936)
# DeBERTa-v3-base: hidden 768, 12 layers, intermediate 3072, vocabulary 128,100, 2 x 256 relative positions.
DEBERTA = {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "intermediate_size": 3072,
           "vocab_size": 128_100, "max_position_embeddings": 512, "position_buckets": 256, "relative_attention": True,
           "pos_att_type": ["p2c", "c2p"], "share_att_key": True, "norm_rel_ebd": "layer_norm", "type_vocab_size": 0,
           "position_biased_input": False, "layer_norm_eps": 1e-7, "max_relative_positions": -1, "pad_token_id": 0}

# Dense bf16 rates with fp32 accumulation, TFLOP/s, from NVIDIA's data sheets.
RATES = {"H200": 989, "H100": 989, "A100": 312, "L40S": 362, "L4": 121, "RTX 4090": 165, "RTX 4060": 30}


# ---- bytes -----------------------------------------------------------------------------------------------------------

def nf4_bytes(parameters: int) -> float:
    """NF4 with double quantisation: half a byte each, one 8-bit scale for 64 of them, one float for 256 scales."""
    return parameters * (1 / 2 + 1 / 64 + 4 / (64 * 256))


def adapter_bytes(parameters: int, adam_bits: int = 32) -> int:
    """LoRA weights and gradients in float32, and the two moments of Adam."""
    return parameters * (4 + 4 + 2 * adam_bits // 8)


def static_bytes(shape: Shape, adam_bits: int = 32, embedding_bytes: int = 2) -> float:
    """What lies in memory between two steps; the 0.1 MB of norms and biases are left out."""
    return (nf4_bytes(shape.linear_parameters) + embedding_bytes * shape.embedding_parameters
            + adapter_bytes(shape.lora_parameters(), adam_bits))


def checkpoint_bytes(shape: Shape, tokens: int) -> int:
    """The bf16 input of every block, which activation checkpointing keeps."""
    return 2 * shape.layers * shape.hidden * tokens


def plain_layer_bytes(shape: Shape, tokens: int) -> int:
    """bf16 values of one block kept while it is computed again: 4 of the MLP's width and 6 of the hidden width."""
    return 2 * (4 * shape.intermediate + 6 * shape.hidden) * tokens


def adapter_layer_bytes(shape: Shape, tokens: int, mask_bytes: int = 1, rank: int = LORA_RANK) -> int:
    """What LoRA adds to a block: each of the 7 inputs dropped out in float32 with its mask, and the low-rank values.

    mask_bytes: 1 on a GPU; a CPU keeps the mask in float32.
    """
    inputs = sum(a for a, _ in shape.linear_sizes)
    return ((4 + mask_bytes) * inputs + 4 * rank * len(shape.linear_sizes)) * tokens


def gradient_bytes(shape: Shape, tokens: int) -> int:
    """Gradients alive at the block's widest place, the input of `down`: in float32 through LoRA, twice in bf16."""
    return 8 * shape.intermediate * tokens


def layer_bytes(shape: Shape, tokens: int, mask_bytes: int = 1) -> int:
    """All that one block needs while it is computed again and differentiated."""
    return (plain_layer_bytes(shape, tokens) + adapter_layer_bytes(shape, tokens, mask_bytes)
            + gradient_bytes(shape, tokens))


def logit_bytes(shape: Shape, positions: int) -> dict[str, int]:
    """Logits of `positions` places: bf16, float32, and their gradient in bf16."""
    return {"bf16": 2 * shape.vocab * positions, "fp32": 4 * shape.vocab * positions,
            "gradient": 2 * shape.vocab * positions}


def forward_bytes(shape: Shape, tokens: int) -> int:
    """A pass without gradients at its widest place, `down` in eval mode: the MLP four times in bf16 and once in float32
    for LoRA (12 bytes of its width), and the hidden states around it."""
    return (12 * shape.intermediate + 13 * shape.hidden) * tokens


def scoring_tokens(length: int) -> int:
    """Tokens of a batch in which the decisions on the dev prompts are read (`language_models.label_logits`)."""
    from routewright.language_models import MOST_TOKENS

    return length * max(1, min(SCORING_ROWS, MOST_TOKENS // length))


def mask_bytes_of(tokens: int) -> int:
    """The bf16 attention mask of a pair that shares its prompt: one number for each pair of places."""
    return 2 * tokens * tokens


def budget(shape: Shape, tokens: int, adam_bits: int = 8, answer_positions: int = ANSWER_TOKENS) -> dict[str, float]:
    """The bytes of a DPO step by part, on a GPU. `tokens`: the prompt once, and both answers.

    `dev decisions` is all that lies in memory while the monitor and the calibration read the dev prompts at that
    length, `peak` the larger of that and `step`.
    """
    logits = logit_bytes(shape, 2 * answer_positions)
    parts = {"weights": nf4_bytes(shape.linear_parameters) + 2 * shape.embedding_parameters,
             "adapter": float(adapter_bytes(shape.lora_parameters(), adam_bits)),
             "checkpoints": float(checkpoint_bytes(shape, tokens)), "one layer": float(layer_bytes(shape, tokens)),
             "mask": float(mask_bytes_of(tokens)), "answer logits": float(sum(logits.values()))}
    step = sum(parts.values())
    reading = parts["weights"] + parts["adapter"] + forward_bytes(shape, scoring_tokens(tokens))
    return {**parts, "step": step, "dev decisions": reading, "peak": max(step, reading)}


# ---- arithmetic ------------------------------------------------------------------------------------------------------

def dpo_flops(shape: Shape, recomputed: bool) -> float:
    """FLOP a token of a LoRA step: 2 P forward and 2 P for the gradient of the activations (the weights are frozen);
    checkpointing adds a second forward pass. Without attention and logits."""
    return (6 if recomputed else 4) * shape.linear_parameters


def sft_flops(shape: Shape, answer_only: bool) -> float:
    """FLOP a token of full training, 6 P; the head counts for every place, or (answer_only) for next to none."""
    return 6 * (shape.linear_parameters + (0 if answer_only else shape.embedding_parameters))


def deberta_flops(length: int, tokens_per_batch: int) -> float:
    """FLOP a token of a training step of DeBERTa-v3-base, with its three attention terms."""
    h, layers, span = DEBERTA["hidden_size"], DEBERTA["num_hidden_layers"], 2 * DEBERTA["position_buckets"]
    linear = 4 * h * h + 2 * h * DEBERTA["intermediate_size"]
    attention = 2 * length * h + 2 * span * h  # content by content and values; content by position, both ways
    positions = 2 * span * h * h / tokens_per_batch  # keys and queries of the positions, once a batch
    return 3 * 2 * layers * (linear + attention + positions)


def longest_reading(shape: Shape) -> int:
    """The longest rows, in steps of 256 tokens, whose training step needs less than reading the dev prompts."""
    parts = ((tokens, budget(shape, tokens)) for tokens in range(256, 65_537, 256))
    return max((tokens for tokens, p in parts if p["step"] < p["dev decisions"]), default=0)


def print_arithmetic(max_length: int | None) -> None:
    shape = QWEN_1_5B
    print("No GPU here: nothing was measured; this is the arithmetic of a DPO step (Qwen2.5-1.5B, NF4, LoRA r 16,\n"
          f"{shape.lora_parameters() / 1e6:.1f}M trained parameters, 8-bit Adam). GB by part; a "
          "token counts once for both answers\nof a pair, and one layer at a time is computed again.\n")
    lengths = sorted({*LENGTHS, *([max_length] if max_length else [])})
    names = list(budget(shape, 1))
    print("tokens  " + "  ".join(names) + "  full logits")
    for tokens in lengths:
        parts = budget(shape, tokens)
        full = sum(logit_bytes(shape, tokens).values())
        print(f"{tokens:6}" + "".join(f"{parts[n] / 1e9:{len(n) + 2}.2f}" for n in names) + f"{full / 1e9:13.2f}")
    longest = max(t for t in range(256, 65_537, 256) if budget(shape, t)["peak"] < BAR_GB * 1e9)
    print(f"\n`dev decisions`: reading the dev prompts in batches of {SCORING_ROWS}, weights included; it is the peak "
          f"up to {longest_reading(shape):,} tokens.\n`full logits`: what a trainer adds that computes the head for "
          f"every place. Under {BAR_GB} GB up to {longest:,} tokens;\nthe CUDA context takes 0.3-0.5 GB more. FLOP a "
          f"token: DPO {dpo_flops(shape, True) / 1e9:.2f} G (4P = {dpo_flops(shape, False) / 1e9:.2f} G without "
          f"recomputing),\nSFT of 0.5B {sft_flops(QWEN_0_5B, False) / 1e9:.2f} G, DeBERTa-v3-base "
          f"{deberta_flops(512, 16_384) / 1e9:.2f} G at 512 tokens.")



# ---- models and rows -------------------------------------------------------------------------------------------------

def random_words(count: int, words: int, seed: int) -> list[str]:
    """`count` unlike texts that are longer than any row is read."""
    import numpy as np

    random = np.random.default_rng(seed)
    letters = np.array(list("abcdefghijklmnopqrstuvwxyz"))
    return [" ".join("".join(random.choice(letters, size=5)) for _ in range(words)) for _ in range(count)]


def write_decoder(shape: Shape, folder: Path) -> Path:
    """A Qwen2 folder of this shape: random bf16 weights, the small tokenizer of the sample pool."""
    import torch
    from transformers import AutoTokenizer, Qwen2Config, Qwen2ForCausalLM

    config = Qwen2Config(hidden_size=shape.hidden, num_hidden_layers=shape.layers, num_attention_heads=shape.heads,
                         num_key_value_heads=shape.kv_heads, intermediate_size=shape.intermediate,
                         vocab_size=shape.vocab, tie_word_embeddings=True, max_position_embeddings=LONGEST)
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        Qwen2ForCausalLM(config).save_pretrained(folder)
    finally:
        torch.set_default_dtype(before)
    tokenizer = AutoTokenizer.from_pretrained(ROOT / "data" / "sample" / "models" / "strong")
    tokenizer.model_max_length = LONGEST
    tokenizer.save_pretrained(folder)
    return folder


def write_deberta(folder: Path, texts: list[str], shape: dict[str, Any] | None = None) -> Path:
    """A DeBERTa-v2 folder in the shape of v3-base: random weights, a tokenizer made from the texts."""
    import torch
    from transformers import DebertaV2Config, DebertaV2ForSequenceClassification

    from routewright.tiny_deberta import build_tiny

    _, tokenizer = build_tiny(texts, 2, 0)
    torch.manual_seed(0)
    DebertaV2ForSequenceClassification(DebertaV2Config(**{**DEBERTA, **(shape or {})})).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def dpo_case(folder: Path, shape: Shape, options: argparse.Namespace) -> tuple[Callable, dict[str, Any]]:
    """train_dpo in the rtx4060 profile, on a cache whose prompts fill max_length: it makes the pairs itself.

    On a GPU the run goes on to its end, so that the peak holds all that a user's run does: the reference, the decisions
    on a batch of dev prompts, the evaluation, the calibration.
    """
    import torch

    import train_dpo
    from routewright.textfiles import read_yaml

    profile = ROOT / "configs" / "train_dpo" / "rtx4060.yaml"
    given = read_yaml(profile) if profile.is_file() else {}
    length = options.max_length or given.get("max_length", 1024)
    gpu = torch.cuda.is_available()
    write_cache(folder / "cache", options.steps + (not gpu), SCORING_ROWS if gpu else 2, length)
    chosen = {"cache": str(folder / "cache"), "wrap": "none", "four_bit": True, "max_length": length,
              "global_batch_size": min(16, options.steps), "epochs": 1, "model_name":
              str(write_decoder(shape, folder / "model")), "output_dir": str(folder / "out")}
    return train_dpo.main, {**given, **chosen}


def write_cache(folder: Path, train: int, dev: int, words: int) -> None:
    """An outcome cache of two models that are right in turns, so that each prompt makes one pair."""
    from routewright.outcomes import write_outcomes
    from routewright.schema import Outcome, TokenUsage

    rows = []
    for i, text in enumerate(random_words(train + dev, words, 0)):
        split = "train" if i < train else "dev"
        rows += [Outcome(f"p{i}", text, name, "", right, float(right), TokenUsage(words, 4), group=f"g{i}", split=split)
                 for name, right in (("cheap", i % 2 == 0), ("strong", i % 2 == 1))]
    write_outcomes(folder / "outcomes.jsonl", rows)
    (folder / "pool.yaml").write_text("name: bench\nprices_dated: 2026-11-20\nmodels:\n"
                                      "  - {name: cheap, price_input: 0.1, price_output: 0.4}\n"
                                      "  - {name: strong, price_input: 1.5, price_output: 6.0}\n")


def sft_case(folder: Path, shape: Shape, options: argparse.Namespace) -> tuple[Callable, dict[str, Any]]:
    """train_llm of all weights, on rows that fill max_length."""
    import train_llm
    from routewright.textfiles import write_jsonl

    length = options.max_length or 512
    batch = options.batch_size or 8
    texts = random_words((options.steps + 2) * batch, length, 0)
    rows = [{"instruction": text, "response": str(i % 3)} for i, text in enumerate(texts)]
    write_jsonl(folder / "rows.jsonl", rows[batch:])
    write_jsonl(folder / "dev.jsonl", rows[:batch])
    return train_llm.main, {
        "data": str(folder / "rows.jsonl"), "val": str(folder / "dev.jsonl"), "wrap": "none", "max_length": length,
        "batch_size": batch, "global_batch_size": batch, "epochs": 1, "output_dir": str(folder / "out"),
        "model_name": str(write_decoder(shape, folder / "model")), "precision": "bf16"}


def deberta_case(folder: Path, shape: dict[str, Any] | None, options: argparse.Namespace) -> tuple[Callable, dict]:
    """train_deberta of all weights, on rows that fill max_length."""
    import train_deberta
    from routewright.textfiles import write_jsonl

    length = min(options.max_length or 512, 512)
    batch = options.batch_size or 32
    texts = random_words((options.steps + 2) * batch, length, 0)
    rows = [{"question": text, "llm_id": "cheap", "label": i % 2} for i, text in enumerate(texts)]
    write_jsonl(folder / "rows.jsonl", rows[batch:])
    write_jsonl(folder / "dev.jsonl", rows[:batch])
    return train_deberta.main, {
        "data": str(folder / "rows.jsonl"), "val": str(folder / "dev.jsonl"), "max_length": length, "batch_size": batch,
        "epochs": 1, "output_dir": str(folder / "out"), "precision": "bf16",
        "model_name": str(write_deberta(folder / "model", texts[:50], shape))}


CASES: dict[str, tuple[Callable, Any]] = {"dpo": (dpo_case, QWEN_1_5B), "sft": (sft_case, QWEN_0_5B),
                                          "deberta": (deberta_case, None)}


# ---- measuring -------------------------------------------------------------------------------------------------------

class _Enough(BaseException):
    """The last step was seen: end the training without saving anything."""


@contextmanager
def step_clock(steps: int) -> Iterator[list[tuple[float, int]]]:
    """Notes (second, tokens) as each of the first `steps` micro-batches begins, and once more as the next one would."""
    import torch
    from transformers import Trainer

    seen: list[tuple[float, int]] = []
    original = Trainer.training_step

    def timed(self: Any, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        seen.append((time.perf_counter(), count_tokens(inputs)))
        if len(seen) > steps:
            raise _Enough
        return original(self, model, inputs, *args, **kwargs)

    Trainer.training_step = timed
    try:
        yield seen
    finally:
        Trainer.training_step = original


def count_tokens(inputs: Any) -> int:
    """Tokens of a batch that are not padding; of a pair that shares its prompt, the prompt once."""
    if "part" in inputs:
        return int((inputs["part"] >= 0).sum())
    mask = inputs.get("attention_mask")
    return int(mask.sum()) if mask is not None and mask.dim() == 2 else int(inputs["input_ids"].numel())


def measure(case: str, options: argparse.Namespace, shape: Any = None) -> dict[str, Any]:
    """Runs one case and returns its figures: tokens and seconds of a micro-batch, peak bytes."""
    import torch

    make, own = CASES[case]
    gpu = torch.cuda.is_available()
    with tempfile.TemporaryDirectory(prefix="bench-llm-") as folder:
        main, settings = make(Path(folder), shape or own, options)
        gc.collect()  # a trainer holds itself in circles; what the case before left would count here
        if gpu:
            total = torch.cuda.get_device_properties(0).total_memory
            torch.cuda.set_per_process_memory_fraction(min(1.0, options.cap_gb * 1e9 / total) if case == "dpo" else 1.0)
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        reset_resident()
        began = time.perf_counter()
        with step_clock(options.steps) as seen:
            try:
                main(**settings)
            except _Enough:
                pass
    spans = [b[0] - a[0] for a, b in zip(seen, seen[1:], strict=False)]
    found = {"case": case, "max_length": settings["max_length"], "batch": settings.get("batch_size", 1),
             "tokens": statistics.median(tokens for _, tokens in seen[:len(spans)]),
             # The first third warms up. A mean, because only every few micro-batches end in an update.
             "seconds": statistics.fmean(spans[len(spans) // 3:]), "loading_s": seen[0][0] - began}
    if gpu:
        found |= {"allocated": torch.cuda.max_memory_allocated(), "reserved": torch.cuda.max_memory_reserved()}
    else:
        found["resident"] = peak_resident()
    return found


def attempt(case: str, options: argparse.Namespace) -> dict[str, Any] | None:
    """`measure`, or None after a sentence: a card that is too small for one case says so and goes on to the next."""
    import torch

    from routewright.errors import MissingSetup, PartialRun, UserError

    try:
        return measure(case, options)
    except (PartialRun, UserError, MissingSetup, torch.OutOfMemoryError) as error:
        print(f"{case:8} was not measured: {str(error).splitlines()[0]}", flush=True)
        return None


def reset_resident() -> None:
    """Forget the process's peak memory so far (Linux)."""
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def peak_resident() -> int:
    """Peak bytes of the process since `reset_resident`."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    return 0


def flops_of(found: dict[str, Any]) -> tuple[float, float]:
    """(FLOP a token of the model, FLOP a token with what checkpointing computes twice)."""
    if found["case"] == "dpo":
        return dpo_flops(QWEN_1_5B, False), dpo_flops(QWEN_1_5B, True)
    if found["case"] == "sft":
        return (sft_flops(QWEN_0_5B, True),) * 2
    return (deberta_flops(found["max_length"], max(1, int(found["tokens"]))),) * 2


def known_rate(name: str) -> int:
    """TFLOP/s of the data sheet, 0 where the GPU is not in the table."""
    return next((rate for key, rate in RATES.items() if re.search(rf"\b{key}\b", name)), 0)


def peak_rate(name: str) -> tuple[float, str]:
    """Dense bf16 TFLOP/s of a GPU and where the figure is from."""
    known = known_rate(name)
    if known:
        return float(known), "data sheet"
    import torch

    a = torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16)
    for turn in range(2):
        torch.cuda.synchronize()
        began = time.perf_counter()
        for _ in range(3 + 17 * turn):
            a @ a
        torch.cuda.synchronize()
    return 20 * 2 * 8192**3 / (time.perf_counter() - began) / 1e12, "matmul of 8,192 measured here"


def report(found: dict[str, Any], rate: float) -> str:
    """One line of figures."""
    model, executed = flops_of(found)
    speed = found["tokens"] / found["seconds"]
    words = (f"{found['case']:8} length {found['max_length']}, batch {found['batch']}: {found['seconds']:.3f} s for "
             f"{found['tokens']:,.0f} tokens, {speed:,.0f} tokens/s")
    if rate:
        words += f", MFU {speed * model / rate / 1e12:.1%}, HFU {speed * executed / rate / 1e12:.1%}"
    if "allocated" in found:
        words += f", peak {found['allocated'] / 1e9:.2f} GB allocated, {found['reserved'] / 1e9:.2f} GB reserved"
    else:
        words += (f", peak resident {found['resident'] / 1e9:.2f} GB (with the libraries), "
                  f"{found['loading_s']:.0f} s until the first step")
    return words


def number(least: float, most: float, kind: type = int) -> Callable[[str], Any]:
    """A reader of one number of the command line, which argparse refuses in a sentence outside of its range."""
    def read(text: str) -> Any:
        with suppress(ValueError):
            if least <= kind(text) <= most:
                return kind(text)
        raise argparse.ArgumentTypeError(f"{text!r} is no number from {least:,} to {most:,}")

    return read


def read_options(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line, checked before anything is built: a run takes minutes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", choices=list(CASES), default=list(CASES))
    parser.add_argument("--steps", type=number(1, 10_000), default=48, help="micro-batches to time")
    parser.add_argument("--max_length", type=number(16, LONGEST), default=None,
                        help="tokens of a row; none: the script's own default")
    parser.add_argument("--batch_size", type=number(1, 4096), default=None, help="rows of a step of sft and deberta")
    parser.add_argument("--cap_gb", type=number(0.1, 10_000, float), default=8.0,
                        help="memory the dpo case may take, GB of 1e9 bytes")
    parser.add_argument("--cpu", action="store_true", help="run the steps on a CPU instead of printing arithmetic")
    parser.add_argument("--json", default="", help="write the figures here too")
    options = parser.parse_args(argv)
    if options.json and not Path(options.json).resolve().parent.is_dir():
        parser.error(f"--json {options.json}: there is no folder {Path(options.json).parent}")
    return options


def main() -> int:
    options = read_options()
    os.environ.setdefault("CUDA_VISIBLE_DEVICES", "0")  # before torch is imported: one card is measured

    import torch

    if not torch.cuda.is_available() and not options.cpu:
        print_arithmetic(options.max_length)
        return 0
    rate = 0.0
    if torch.cuda.is_available():
        options.steps = max(2, options.steps)  # a step is timed to the next one's beginning
        rate, source = peak_rate(torch.cuda.get_device_name(0))
        print(f"{torch.cuda.get_device_name(0)}, bf16 rate {rate:.0f} TFLOP/s ({source}), torch {torch.__version__}")
    results, late = [], False
    for case in options.cases:
        found = attempt(case, options)
        late |= found is None and case == "dpo"
        if found is None:
            continue
        results.append(found)
        print(report(found, rate), flush=True)
        if case == "dpo" and "allocated" in found:
            late |= found["allocated"] > BAR_GB * 1e9
            print(f"{'':8} the bar of {BAR_GB} GB is {'MISSED' if late else 'kept'}; the formulae say "
                  f"{budget(QWEN_1_5B, found['max_length'])['peak'] / 1e9:.2f} GB")
    if options.json:
        Path(options.json).write_text(json.dumps(results, indent=1) + "\n")
    return 1 if late else 0


if __name__ == "__main__":
    sys.exit(main())
